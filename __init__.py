"""
Proto-LeakNet: which generator made this image, or was it one nobody has seen, or a camera?

Importing it tells transformers of config, models, image processor and pipeline, so that the Auto classes and
`pipeline("image-attribution")` load checkpoints with the installed code, without `trust_remote_code`. In a
command that waits until something of it is used, so that `--help` and wrong arguments are answered at once.
"""

import sys
from typing import Any

from .interruption import end_with_a_word, is_command

__version__ = "0.1.0"

if is_command():
    sys.excepthook = end_with_a_word  # also while what follows is imported, which takes seconds

    def __getattr__(name: str) -> Any:
        if name.startswith("_") or name.islower():  # no class of ours
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import registration

        return getattr(registration, name)

else:
    from .registration import *  # noqa: F403
    from .registration import __all__  # noqa: F401
