"""Errors whose text is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the caller gave cannot be honoured.

    The message is one line that says what was given, what is legal and what to do. Commands and
    experiments print it without a traceback and exit with status 2.
    """


class NonFiniteLossError(UserError):
    """The loss or the gradient stopped being a finite number."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the known name closest to `name`, or the legal names.

    Examples:
        >>> nearest("cpu-moderm", ["cpu", "cpu-modern"])
        "; did you mean 'cpu-modern'?"
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return "; known: " + ", ".join(sorted(known))
