"""The Hugging Face cache, laid out as the hub does it."""

import os
import shutil
from pathlib import Path


def lay_out_cache(name: str, source: Path, home: Path) -> None:
    """Lays a model out as the hub's cache does: names that link to blobs."""
    repository = home / "hub" / ("models--" + name.replace("/", "--"))
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / f"blob{number}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
