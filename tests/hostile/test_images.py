"""A corpus of images as a hostile world has them: each gives a record, with a verdict or a clear error."""

import contextlib
import io
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from protoleak import decoding_protoleak
from protoleak.decoding_protoleak import MAX_SCANS, count_scans
from protoleak.files_protoleak import path_of, printable
from protoleak.forensics.provenance import read_provenance
from protoleak.forensics.scan import scan
from protoleak.image_files_protoleak import find_images
from protoleak.image_processing_protoleak import open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file whose header says what it likes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def corpus() -> dict[str, tuple[bytes, bool]]:
    """File name to content, and whether it is an image after all."""
    photo = Image.fromarray(noise(40, 48, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "A" * 4000
    transparent = Image.new("P", (40, 40), 3)
    transparent.info["transparency"] = 3
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = [Image.fromarray(noise(40, 40, 3)) for _ in range(3)]
    good = {
        "plain.png": encoded(photo),
        "wrong_suffix.jpg": encoded(photo),
        "one_pixel.png": encoded(Image.new("RGB", (1, 1))),
        "long.png": encoded(Image.new("RGB", (20000, 1), "red")),
        "tall.png": encoded(Image.new("L", (1, 20000))),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "sixteen_bits.png": encoded(Image.fromarray(noise(40, 48, dtype=np.uint16))),
        "thirty_two_bits.tif": encoded(Image.fromarray(noise(40, 48).astype(np.float32) / 255), "TIFF"),
        "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "lab.tif": encoded(photo.convert("LAB"), "TIFF"),
        "palette.png": encoded(transparent, transparency=3),
        "grey_alpha.png": encoded(photo.convert("LA")),
        "one_bit.png": encoded(photo.convert("1")),
        "exif.jpg": encoded(photo, "JPEG", exif=exif),
        "broken_exif.jpg": encoded(photo, "JPEG", exif=b"Exif\x00\x00MM\x00*" + b"\xff" * 60),
        "broken_icc.jpg": encoded(photo, "JPEG", icc_profile=b"\xff" * 200),
        "icc.jpg": encoded(photo, "JPEG", icc_profile=profile),
        "trailing_bytes.png": encoded(photo) + b"<script>alert(1)</script>" * 100,
        "=cmd|' ' !A0.png": encoded(photo),
        "<img src=x onerror=alert(1)>.png": encoded(photo),
        "new\nline.png": encoded(photo),
    }
    bad = {
        "empty.png": b"",
        "zeros.png": bytes(1000),
        "html.png": b"<!doctype html><script>alert(1)</script>",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "bomb.png": png_of(60000, 60000),
        "huge_bomb.png": png_of(2**31 - 1, 2**31 - 1),
        "no_pixels.png": png_of(0, 0),
        "lies_about_size.png": png_of(40, 40, b"\x00" * 10),
        "only_magic.png": b"\x89PNG\r\n\x1a\n",
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(id) system\n",
        "pdf.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "executable.gif": b"MZ" + bytes(500),
    }
    for format in FORMATS:
        content = encoded(photo, format)
        bad[f"truncated_header.{format.lower()}"] = content[:7]
        if format not in ("GIF", "BMP", "TIFF", "PPM"):
            bad[f"truncated.{format.lower()}"] = content[: len(content) // 2]
    return {name: (c, True) for name, c in good.items()} | {name: (c, False) for name, c in bad.items()}


def test_every_file_of_the_corpus_has_its_record(attributor, tmp_path, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    files = corpus()
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    output = tmp_path / "records.jsonl"
    counts = scan(attributor, [str(folder)], output, batch_size=8)
    records = {path_of(r["file"]).name: r for r in map(json.loads, output.read_text().splitlines())}
    assert set(records) == set(files)
    for name, (_, is_image) in files.items():
        error = records[name]["error"]
        assert (error is None) == is_image, f"{name}: {error}"
        assert is_image or error == printable(error)
        assert is_image or records[name]["label"] is None
    failed = sum(not is_image for _, is_image in files.values())
    assert counts == {"files": len(files), "done": 0, "written": len(files), "failed": failed}
    with capsys.disabled():
        print(
            f"\n{len(files)} hostile files: {len(files) - failed} verdicts, {failed} clear errors, no crash"
        )


def test_loops_of_links_and_unreadable_things_end(attributor, tmp_path):
    folder = tmp_path / "loop"
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "again").symlink_to(folder)
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "folder.png").mkdir()
    (folder / "inside" / "a.png").write_bytes(encoded(Image.fromarray(noise(40, 40, 3))))
    files = find_images([folder])
    assert sorted(f.name for f in files) == ["a.png", "gone.png", "self.png"]
    records = list(attributor.records(files))
    assert [r["error"] is None for r in records] == [f.name == "a.png" for f in files]


def test_pixels_are_capped_before_they_are_decoded():
    with pytest.raises(ValueError, match="max_pixels = 100"):
        open_image(png_of(11, 10), max_pixels=100)
    for content in (png_of(60000, 60000), png_of(2**31 - 1, 2**31 - 1)):
        with pytest.raises(ValueError, match="pixels"):
            read_provenance(content)


def with_scans(count: int) -> bytes:
    """A progressive JPEG file whose last scan is there so many times more."""
    content = encoded(Image.new("RGB", (64, 64), "red"), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * count + content[-2:]


def test_scans_of_a_jpeg_are_capped_before_they_are_decoded():
    """Each takes the time of a whole image: 0.7 MB of them took minutes."""
    usual = len(re.findall(rb"\xff\xda", with_scans(0)))
    assert open_image(with_scans(MAX_SCANS - usual)).size == (64, 64)
    for read in (open_image, read_provenance):
        with pytest.raises(ValueError, match="JPEG file of 3010 scans"):
            read(with_scans(3000))


def test_what_looks_like_a_scan_in_other_data_is_none():
    """Thumbnails and videos that cameras put into a JPEG file, before its scan and behind its end."""
    spurious = b"\xff\xda" * 500
    content = encoded(Image.new("RGB", (64, 64)), "JPEG", comment=spurious) + spurious
    assert (content.count(b"\xff\xda"), count_scans(content)) == (1001, 1)


MEASURE = """
import importlib.util, re, sys
from pathlib import Path
from PIL import Image
spec = importlib.util.spec_from_file_location("decoding", sys.argv[1])
decoding = importlib.util.module_from_spec(spec)
spec.loader.exec_module(decoding)
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
image = Image.open(sys.argv[2])
before = peak()
decoding.to_rgb(image)
print((peak() - before) / image.width / image.height)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_decoding_takes_no_more_memory_than_it_says(tmp_path):
    """A few kilobytes with 20 million pixels, in a fresh process: what is stored, its RGB, and a strip."""
    path = tmp_path / "large.png"
    path.write_bytes(encoded(Image.new("P", (5000, 4000)), transparency=3))
    code = Path(decoding_protoleak.__file__)
    run = subprocess.run([sys.executable, "-c", MEASURE, code, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 4 < float(run.stdout) < 11, "bytes a pixel"


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_damaged_files_never_crash_the_loader(data):
    """Bytes of real files overwritten, cut and added: an image or one of two errors, in bounded time."""
    format = data.draw(st.sampled_from(FORMATS))
    content = bytearray(encoded(Image.fromarray(noise(24, 24, 3)), format))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        kind = data.draw(st.sampled_from(("overwrite", "insert", "cut")))
        if kind == "overwrite":
            content[place : place + len(patch)] = patch
        elif kind == "insert":
            content[place:place] = patch
        elif len(content) > 20:
            del content[place : place + len(patch)]
    for read in (lambda c: open_image(c, max_pixels=10**6), lambda c: read_provenance(c, 10**6)):
        with contextlib.suppress(OSError, ValueError):
            read(bytes(content))


@settings(max_examples=150, deadline=2000, derandomize=True)
@given(content=st.binary(max_size=400))
def test_any_bytes_are_an_image_or_an_error(content):
    with contextlib.suppress(OSError, ValueError):
        open_image(content, max_pixels=10**6)
