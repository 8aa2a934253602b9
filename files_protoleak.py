"""Writing files so that nothing is lost: under another name first, moved when they are whole."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """
    Have `write` make a file under a temporary name beside `path`, then move it there: whatever goes wrong,
    the previous file stays as it was.

    Raises:
        OSError: it can't be written, for example because the disk is full; the message names the file.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{path} can't be written, what was there stays: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary folder beside `folder`, whose files are moved into it at the end, unless something went wrong:
    then `folder` stays as it was.
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for source in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / source.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
    except OSError as error:
        message = f"{folder} can't be written, what was there stays: {error}"
        raise OSError(error.errno, message) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
