"""Where gptjax keeps what it can make again."""

import importlib.metadata
import os
from pathlib import Path


def cache_directory() -> Path:
    """`$GPTJAX_CACHE`, else `gptjax` in `$XDG_CACHE_HOME`, else `~/.cache/gptjax`.

    Compiled programs lie in it, and dequantized models in `converted/`. It may be deleted at any
    time.
    """
    own = os.environ.get("GPTJAX_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "gptjax"


def gptjax_version() -> str:
    """The version of gptjax that is installed, or "" where it is not installed as a package."""
    try:
        return importlib.metadata.version("gptjax")
    except importlib.metadata.PackageNotFoundError:
        return ""
