"""Where gptjax keeps what it can make again."""

import os
from pathlib import Path

from gptjax.version import __version__


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
    """The version of gptjax."""
    return __version__
