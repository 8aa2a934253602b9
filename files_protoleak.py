"""
Files: read where they are regular ones, written under another name first and moved when they are whole, and
their names, which are bytes, as text.
"""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
MAX_BYTES = 1 << 30  # of one file that is read into memory
# controls, bytes that are not UTF-8 (as Python keeps them), separators of lines, and what turns the direction
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
OF_DISK = re.compile(r"os error \d+|PytorchStreamWriter|inline_container")  # in errors of safetensors, torch
ESCAPE = re.compile(r"\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4})")


def printable(text: str) -> str:
    r"""
    Text that a terminal, a table and any encoding of Unicode take as it is: each control, and each byte that
    is not UTF-8, is escaped, `\x1b` for a byte and `\u202e` for a character.
    """
    return UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match) -> str:
    code = ord(match[0])
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{byte:02x}" if byte < 0x80 or byte != code else f"\\u{code:04x}"


def shown_name(path: str | os.PathLike) -> str:
    """A path as [`printable`] text that [`path_of`] turns back; a backslash in a name is doubled for that."""
    name = os.fspath(path)
    return printable(name if os.sep == "\\" else name.replace("\\", "\\\\"))


def path_of(name: str) -> Path:
    """The file that [`shown_name`] shows as `name`."""
    return Path(name if os.sep == "\\" else ESCAPE.sub(_unescape, name))


def _unescape(match: re.Match) -> str:
    kind, digits = match[1][0], match[1][1:]
    if kind == "\\":
        return kind
    code = int(digits, 16)
    return chr(0xDC00 + code if kind == "x" and code >= 0x80 else code)


def read_file(path: str | os.PathLike, name: str | None = None) -> bytes:
    """
    The content of a regular file; others, such as pipes and devices, could be waited for for ever.

    Args:
        name (`str`, *optional*): What errors call it.

    Raises:
        FileNotFoundError: there is none, or only a link to one that is gone.
        OSError: it is no regular file, larger than `MAX_BYTES`, or can't be read.
    """
    name = shown_name(path) if name is None else name
    try:
        facts = os.stat(path)
        if stat.S_ISDIR(facts.st_mode):
            os.scandir(path).close()  # it was taken for a file where it can't be searched: that is the reason
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{name} is {_kind(facts.st_mode)}, and no regular file")
        if facts.st_size > MAX_BYTES:
            raise OSError(f"{name} has {facts.st_size} bytes; files of up to {MAX_BYTES} are read")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        gone = f" (a link to {shown_name(os.readlink(path))})" if os.path.islink(path) else ""
        raise FileNotFoundError(f"{name}: no such file{gone}") from error
    except OSError as error:
        raise error if error.errno is None else OSError(f"{name} can't be read: {error.strerror}") from error


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "a device")


def check_writable(path: str | os.PathLike, is_folder: bool = False) -> None:
    """
    That a file, or a folder with files, can be written at `path`; nothing of it is made yet. To be called
    before the work whose results go there.

    Raises:
        OSError: the message names it, and the reason.
    """
    target = Path(path).absolute()
    place = next(p for p in (target, *target.parents) if os.path.lexists(p))
    try:
        if place == target and not (place.is_dir() if is_folder else place.is_file()):
            raise OSError(
                f"there is no {'folder' if is_folder else 'regular file'} of this name, but another"
            )
        if place == target and not is_folder:
            place = place.parent  # where its successor is written
        with tempfile.TemporaryFile(dir=place):
            return
    except OSError as error:
        raise OSError(f"{shown_name(path)} can't be written: {error.strerror or error}") from error


@contextmanager
def written_to(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the disk, whoever raises them, as an `OSError` that names what is written."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not OF_DISK.search(str(error)):
            raise
        message = f"{shown_name(path)} can't be written, what was there stays: {error}"
        raise OSError(error.errno, message) if getattr(error, "errno", None) else OSError(message) from error


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """
    Have `write` make a file under a temporary name beside `path`, in a folder that is made where it is
    missing, then move it there: whatever goes wrong, the previous file stays as it was.

    Raises:
        OSError: it can't be written, for example because the disk is full; the message names the file.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with written_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            partial.replace(path)
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
        with written_to(folder):
            partial.mkdir(parents=True)
            yield partial
            for source in sorted(path for path in partial.rglob("*") if path.is_file()):
                target = folder / source.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                source.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
