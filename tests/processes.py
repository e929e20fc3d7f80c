"""Whether other processes have ended."""

import time
from collections.abc import Iterable
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and is not yet fetched does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(pids: Iterable[int], seconds: float = 30) -> bool:
    """Waits for processes to end, which takes a killed one a moment; whether all have."""
    until = time.monotonic() + seconds
    while running := [pid for pid in pids if alive(pid)]:
        if time.monotonic() > until:
            return False
        pids = running
        time.sleep(0.05)
    return True
