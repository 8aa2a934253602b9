"""Files as they lie about: found by content, read where they are regular, their names kept."""

import io
import os
import socket
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from protoleak import image_files_protoleak
from protoleak.files_protoleak import MAX_BYTES, path_of, printable, read_file, shown_name
from protoleak.forensics.provenance import read_provenance
from protoleak.image_files_protoleak import find_images
from protoleak.image_processing_protoleak import open_image

pillow_heif.register_heif_opener()  # which also writes
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
# what Pillow writes and reads by a signature: format to mode
WRITTEN = {
    "AVIF": "RGB", "BLP": "P", "BMP": "RGB", "DDS": "RGB", "DIB": "RGB", "GIF": "P", "ICO": "RGB",
    "JPEG": "RGB", "JPEG2000": "RGB", "MPO": "RGB", "MSP": "1", "PCX": "RGB", "PNG": "RGB", "PPM": "RGB",
    "QOI": "RGB", "SGI": "RGB", "TIFF": "RGB", "WEBP": "RGB", "XBM": "1",
}  # fmt: skip


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    if format == "MPO":
        options = {"save_all": True, "append_images": [image]} | options
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo() -> Image.Image:
    return Image.fromarray(PIXELS)


def test_images_are_found_by_content(tmp_path, caplog):
    contents = {f"a_{name}": encoded(photo().convert(mode), name) for name, mode in WRITTEN.items()}
    contents |= {"x.jpg_large": encoded(photo(), "JPEG"), "y.jfif": encoded(photo(), "JPEG")}
    contents |= {"z.tga": encoded(photo(), "TGA"), "z.im": encoded(photo(), "IM")}
    others = {"notes.txt": b"Please look", "book.pdf": b"%PDF-1.7", "page.eps": encoded(photo(), "EPS")}
    others |= {"BMW": b"BMW is a car", "P5": b"P5 is a list", "ten": bytes([10, 0]) * 60, "empty": b""}
    ignored = {name: encoded(photo()) for name in ("._x.png", "Thumbs.db", ".DS_Store", "desktop.ini")}
    for name, content in (contents | others | ignored | {"broken.png": b"no image"}).items():
        (tmp_path / name).write_bytes(content)
    found = find_images([tmp_path, tmp_path / "missing", tmp_path / "z.im"])
    assert [path.name for path in found] == [*sorted([*contents, "broken.png"]), "missing"]
    [line] = caplog.messages
    shown = ", ".join(str(tmp_path / name) for name in sorted(others)[:5])
    assert line == f"7 files are not images that can be read: {shown} and 2 more"
    for path in found[1:3]:
        assert open_image(path).size == (32, 32)


@pytest.mark.parametrize("format", [*WRITTEN, "TGA", "IM", "HEIF"])
def test_what_pillow_reads_is_opened(format, tmp_path):
    path = tmp_path / f"image.{format.lower()}"
    path.write_bytes(encoded(photo().convert(WRITTEN.get(format, "RGB")), format))
    image = open_image(path)
    assert (image.mode, min(image.size)) == ("RGB", 32)
    assert read_provenance(path)["format"] == format


def test_heif_without_its_extra_names_it(monkeypatch, tmp_path):
    (tmp_path / "phone").write_bytes(encoded(photo(), "HEIF"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    image_files_protoleak._formats.cache_clear()
    try:
        assert find_images([tmp_path]) == [tmp_path / "phone"], "an image, though it can't be read"
        with pytest.raises(OSError, match=r"phone is HEIF; pip install 'protoleak\[heif\]'"):
            open_image(tmp_path / "phone")
    finally:
        image_files_protoleak._formats.cache_clear()


def test_jpeg_xl_is_called_by_its_name():
    with pytest.raises(OSError, match="JPEG XL"):
        open_image(b"\xff\x0a" + bytes(40))


def test_only_regular_files_are_opened(tmp_path, caplog):
    """None of these hangs; each stays, so that opening it tells why it can't be."""
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "control")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round.jpg").symlink_to(tmp_path / "round.jpg")
    (tmp_path / "folder").mkdir()
    (tmp_path / "again").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        files = find_images([tmp_path])
        errors = {path.name: str(pytest.raises(OSError, open_image, path).value) for path in files}
    patterns = {"control": "is a pipe", "gone.jpg": f"no such file (a link to {tmp_path}/nowhere)"}
    patterns |= {"pipe.png": "is a pipe", "round.jpg": "symbolic links", "socket": "is a socket"}
    assert errors.keys() == patterns.keys()
    for name, error in errors.items():
        assert patterns[name] in error
        assert str(tmp_path / name) in error
    assert caplog.messages == [f"1 link to a folder is not followed; name it to search it: {tmp_path}/again"]
    with pytest.raises(OSError, match="device"):
        read_file("/dev/zero")
    with pytest.raises(OSError, match="folder"):
        read_file(tmp_path)


def test_an_empty_path_is_not_the_current_folder():
    """What a script passes whose variable is not set."""
    with pytest.raises(ValueError, match="a path is empty"):
        find_images([""])


def test_an_empty_file_is_called_so(tmp_path):
    (tmp_path / "sent.jpg").write_bytes(b"")
    with pytest.raises(OSError, match=r"sent\.jpg is empty"):
        open_image(tmp_path / "sent.jpg")


def test_what_may_not_be_read_is_told(tmp_path, monkeypatch):
    """As for anybody but root, who may read all."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "secret").write_bytes(b"")
    scandir, open_path = os.scandir, type(tmp_path).open

    def refuse(path, *arguments, function, **options):
        if os.path.basename(os.fspath(path)) in ("closed", "secret"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return function(path, *arguments, **options)

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path, function=scandir))
    monkeypatch.setattr(type(tmp_path), "open", lambda *a, **k: refuse(*a, function=open_path, **k))
    assert find_images([tmp_path]) == [tmp_path / "secret", tmp_path / "closed"]
    with pytest.raises(OSError, match="closed can't be read: Permission denied"):
        read_file(tmp_path / "closed")


def test_a_file_too_large_for_memory_is_not_read(tmp_path):
    with (tmp_path / "huge.tif").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(OSError, match=rf"huge\.tif has {MAX_BYTES + 1} bytes"):
        read_file(tmp_path / "huge.tif")


# --- names --------------------------------------------------------------------------------------------------


@given(st.binary().map(lambda name: name.replace(b"\0", b"")))
def test_names_are_shown_without_loss(name):
    shown = shown_name(os.fsdecode(name))
    shown.encode("utf-8")
    assert printable(shown) == shown
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert path_of(shown) == Path(os.fsdecode(name))


def test_names_as_they_are_shown():
    names = {b"plain \xc3\xa9.png": "plain é.png", b"new\nline": r"new\x0aline", b"\xff\xc3\xa9": r"\xffé"}
    names |= {rb"a\b": r"a\\b", rb"\x0a": r"\\x0a", "\x9b1m\u202egnp.exe".encode(): r"\u009b1m\u202egnp.exe"}
    for name, shown in names.items():
        assert shown_name(os.fsdecode(name)) == shown
        assert os.fsencode(path_of(shown)) == name


# --- values and texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [np.float32([[0, 300]]), np.int32([[-5, 70000]]), np.float32([[np.nan, 0]])]
)
def test_values_outside_the_range_are_not_called_damage(tmp_path, values):
    Image.fromarray(values.repeat(9, axis=0)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match=r"wide\.tif: values must be .*got (float|int)32 within") as error:
        open_image(tmp_path / "wide.tif")
    assert "damaged" not in str(error.value)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("place", [33, -12])
@pytest.mark.parametrize(
    ("kind", "head"),
    [(b"zTXt", b"workflow\0\0"), (b"iTXt", b"workflow\0\1\0\0\0"), (b"iCCP", b"workflow\0\0")],
)
def test_pixels_are_read_where_texts_are_too_large_for_pillow(place, kind, head):
    plain = encoded(photo())
    large = chunk(kind, head + zlib.compress(bytes(2**20 + 1)))
    small = chunk(b"tEXt", b"parameters\0Steps: 20")
    content = plain[:place] + large + small + plain[place:]
    assert np.array_equal(np.asarray(open_image(content)), PIXELS)
    assert open_image(encoded(photo()) + large).size == (32, 32)
    claims = read_provenance(content)["text"]
    assert claims["texts not read"] == "workflow"
    assert claims["parameters"] == "Steps: 20", "beside it"


def test_a_png_with_texts_within_the_limit_is_read_as_it_is():
    content = encoded(photo())
    content = content[:33] + chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"a" * 2**20)) + content[33:]
    assert image_files_protoleak._without_large_texts(content) == (content, "")
    for cut in range(8, len(content), 97):
        assert image_files_protoleak._without_large_texts(content[:cut]) == (content[:cut], "")
