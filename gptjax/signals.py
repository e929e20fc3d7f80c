"""Stopping well: a signal asks, and the loop ends where its state is whole."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stop:
    """Whether a signal asked for a stop, and its name."""

    asked = False
    name = ""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Makes SIGINT and SIGTERM ask for a stop; a second one does what it did before.

    Outside the main thread, where Python lets nobody handle signals, it never asks.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        stop.asked, stop.name = True, signal.Signals(number).name
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
