"""Files of images: found by their content, and opened in whatever format Pillow reads, not yet decoded."""

import base64
import binascii
import functools
import http.client
import io
import logging
import os
import queue
import stat
import struct
import threading
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from .files_protoleak import MAX_BYTES, read_file, shown_name

logger = logging.getLogger(__name__)

# names that promise an image: where such a file is none, that is an error. Of other names the content tells.
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".heic", ".heif", ".hif",
    ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ico", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
IGNORED = ("Thumbs.db", ".DS_Store", "desktop.ini")  # what systems leave in folders, and ._x.png besides
TOLD = 5  # names of files that are no images, in the line that counts them
# they run another program, or Pillow has no decoder of its own
UNREAD_FORMATS = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
# what begins so is an image, but none that Pillow reads alone
JPEG_XL = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
PNG = b"\x89PNG\r\n\x1a\n"
UNREAD_TEXTS = "texts not read"  # key of `Image.info`
PIECE = 1 << 16  # bytes of a URL that are taken at a time


@functools.cache
def _formats() -> tuple[list[str], dict[str, str]]:
    """Formats of Pillow that are read: those with a signature, and others by the suffix of their files."""
    Image.init()
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        logger.debug("no HEIF: pillow-heif is not installed")
    read = [name for name in Image.OPEN if name not in UNREAD_FORMATS]
    signed = [name for name in read if Image.OPEN[name][1] is not None]
    others = {s: name for s, name in Image.EXTENSION.items() if name in read and name not in signed}
    return signed, others


def open_encoded(source: Any, name: str, timeout: float | None = None) -> Image.Image:
    """
    An image that is not an array, its pixels not decoded: path, URL, base64, bytes, binary file.

    Colour profile and texts of a PNG that inflate beyond what Pillow takes are passed over; `info` has what
    they are called as `UNREAD_TEXTS`.

    Args:
        name (`str`): What errors call it; the suffix tells formats that have no signature, such as TGA.
        timeout (`float`, *optional*): Seconds that a URL may take in all.

    Raises:
        OSError: there is no regular file, it is not an image of a format that is read, or a URL gives more
            than `MAX_BYTES`, or takes longer than `timeout`.
        ValueError: the source is of another type, or its header tells more pixels than Pillow takes.
    """
    content, unread = _without_large_texts(_content(source, name, timeout))
    signed, others = _formats()
    by_suffix = others.get(os.path.splitext(name)[1].lower())
    try:
        image = Image.open(io.BytesIO(content), formats=[*signed, *([by_suffix] if by_suffix else [])])
    except UnidentifiedImageError as error:
        raise OSError(f"{name} {_why_not_read(content)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise OSError(f"{name} can't be opened, it may be damaged: {error}") from error
    image.info |= {UNREAD_TEXTS: unread} if unread else {}
    return image


def _why_not_read(content: bytes) -> str:
    if not content:
        return "is empty"
    if _is_heif(content):
        return "is HEIF; pip install 'protoleak[heif]' to read it, or convert it to PNG"
    if content.startswith(JPEG_XL):
        return "is JPEG XL, which is not read; convert it to PNG"
    return "is not an image that can be read (PNG, JPEG, WebP, AVIF, TIFF and most others that Pillow knows)"


def _is_heif(content: bytes) -> bool:
    return content[4:8] == b"ftyp" and content[8:12] in HEIF_BRANDS


def _content(source: Any, name: str, timeout: float | None) -> bytes:
    """The bytes of an encoded image, wherever it is."""
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if hasattr(source, "read"):
        if hasattr(source, "seek"):
            source.seek(0)
        return source.read()
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _fetched(source, name, timeout)
    if isinstance(source, str) and source.startswith("data:"):
        return _from_base64(source.partition(",")[2], name)
    if isinstance(source, str) and len(source) > 1024 and not os.path.exists(source[:255]):
        return _from_base64(source, name)
    if isinstance(source, str | os.PathLike):
        return read_file(source, name)
    raise ValueError(
        f"an image is a path, URL, bytes, file, PIL image, array or tensor; got {name}. Pass several as "
        f"one flat list, and of a data set its column of images"
    )


def _fetched(url: str, name: str, timeout: float | None) -> bytes:
    """What a URL gives, by a thread that can be left to itself: a server may send its bytes one by one."""
    answers: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    is_late = threading.Event()
    threading.Thread(target=_fetch, args=(url, timeout, answers, is_late), daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except queue.Empty:
        is_late.set()
        answer = TimeoutError(f"it takes longer than timeout = {timeout:g} seconds")
    if isinstance(answer, Exception):
        raise OSError(f"{name} can't be fetched: {answer}") from answer
    return answer


def _fetch(url: str, timeout: float | None, answers: queue.SimpleQueue, is_late: threading.Event) -> None:
    content = bytearray()
    try:
        silence = None if timeout is None else 2 * timeout  # who waits gives up before
        with urllib.request.urlopen(url, timeout=silence) as response:
            while not is_late.is_set() and (piece := response.read(PIECE)):
                content += piece
                if len(content) + (response.length or 0) > MAX_BYTES:
                    raise OSError(f"it has more than {MAX_BYTES} bytes, the most that is read")
            if response.length:
                raise http.client.IncompleteRead(bytes(content), response.length)
        answers.put(bytes(content))
    except Exception as error:  # noqa: BLE001 (whatever it is, who waits is told)
        answers.put(error)


def _from_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise OSError(f"{name} is neither a path, a URL nor base64: {error}") from error


# --- PNG files with large texts -----------------------------------------------------------------------------


def _without_large_texts(content: bytes) -> tuple[bytes, str]:
    """A PNG file without the chunks at which Pillow would give up, and what these are called."""
    if not content.startswith(PNG):
        return content, ""
    pieces, unread, total, start = [], [], 0, 0
    for begin, end, kind in png_chunks(content):
        size = _inflated_size(kind, content[begin + 8 : end - 4])
        if size > PngImagePlugin.MAX_TEXT_CHUNK or total + size > PngImagePlugin.MAX_TEXT_MEMORY:
            unread.append(content[begin + 8 : begin + 88].partition(b"\0")[0].decode("latin-1"))
            pieces.append(content[start:begin])
            start = end
        else:
            total += size
    return (b"".join([*pieces, content[start:]]) if pieces else content), ", ".join(unread[:TOLD])


def png_chunks(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Begin, end and kind of each whole chunk of a PNG file."""
    begin = len(PNG)
    while begin + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, begin)
        end = begin + 12 + length
        if end > len(content):
            return
        yield begin, end, kind
        begin = end


def _inflated_size(kind: bytes, data: bytes) -> int:
    """Bytes of a chunk's text or colour profile, at most one more than Pillow takes; 0 of other chunks."""
    _, _, rest = data.partition(b"\0")
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    elif kind in (b"zTXt", b"iCCP"):
        packed = rest[1:]
    else:
        return 0
    try:
        return len(zlib.decompressobj().decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return 0


# --- images of a folder -------------------------------------------------------------------------------------


def find_images(paths: list[str | Path]) -> list[Path]:
    """
    The files among `paths`, each once, with folders searched recursively for images, by content and not by
    name, each folder in sorted order. One line is logged of the rest: how many files are no images, and
    their names. Links to folders are not followed, so that a loop of them can't catch the search; another
    line tells them.

    What can't be told to be no image stays, so that opening it reports it: a path that does not exist, a
    folder or file that can't be read, a pipe or device, and a file that is named like an image.
    """
    files: list[Path] = []
    others: list[Path] = []
    links: list[Path] = []
    for path in paths:
        if not os.fspath(path):
            raise ValueError("a path is empty; name a file or a folder, the current one as .")
        files += _search(Path(path), others, links) if os.path.isdir(path) else [Path(path)]
    _tell("1 file is no image", "{} files are not images", "that can be read", others)
    _tell("1 link to a folder is", "{} links to folders are", "not followed; name it to search it", links)
    return list(dict.fromkeys(files))


def _tell(one: str, several: str, what: str, paths: list[Path]) -> None:
    if paths:
        names = ", ".join(map(shown_name, sorted(paths)[:TOLD]))
        more = f" and {len(paths) - TOLD} more" if len(paths) > TOLD else ""
        count = one if len(paths) == 1 else several.format(len(paths))
        logger.warning(f"{count} {what}: {names}{more}")


def _search(folder: Path, others: list[Path], links: list[Path]) -> list[Path]:
    """The images below a folder, with what can't be told to be none; the rest joins `others` and `links`."""
    images: list[Path] = []
    refused: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=refused.append):
        links += [path for name in folders if (path := Path(place, name)).is_symlink()]
        for name in names:
            if not name.startswith("._") and name not in IGNORED:
                path = Path(place, name)
                (images if _may_be_image(path) else others).append(path)
    return sorted(images) + [Path(error.filename) for error in refused]


def _may_be_image(path: Path) -> bool:
    if path.name.lower().endswith(SUFFIXES):
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return True
        with path.open("rb") as file:
            begin = file.read(64)
            if begin.startswith((PNG, *JPEG_XL)) or _is_heif(begin):
                return True
            file.seek(0)
            return _is_identified(file, path.suffix.lower())
    except OSError:
        return True


def _is_identified(file: Any, suffix: str) -> bool:
    signed, others = _formats()
    try:
        Image.open(file, formats=[*signed, *([others[suffix]] if suffix in others else [])])
    except Image.DecompressionBombError:
        return True
    except Exception:  # noqa: BLE001 (Pillow's decoders raise many kinds for what is none of their files)
        return False
    return True


__all__ = ["find_images", "open_encoded", "png_chunks"]
