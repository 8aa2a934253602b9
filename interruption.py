"""Ctrl-C while a command loads."""

import sys
from pathlib import Path
from types import TracebackType


def is_command() -> bool:
    """Whether this process was started as `protoleak`, as `train.py`, or as a module of either."""
    started = Path(sys.argv[0]).resolve()
    return (
        started.stem == "protoleak"
        or started == Path(__file__).resolve().with_name("train.py")
        or not {"protoleak.cli", "protoleak.train"}.isdisjoint(sys.orig_argv)
    )


def end_with_a_word(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An `excepthook`: a word for Ctrl-C, a traceback for all else."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
