"""Ctrl-C while a command loads."""

import sys
from types import TracebackType


def end_with_a_word(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An `excepthook`: a word for Ctrl-C, a traceback for all else."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
