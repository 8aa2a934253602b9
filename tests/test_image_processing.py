import base64
import contextlib
import functools
import http.server
import inspect
import io
import socket
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from protoleak import ProtoLeakImageProcessor, image_files_protoleak
from protoleak.decoding_protoleak import orientation_of, turned
from protoleak.image_processing_protoleak import open_image, preview


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG"} | options)
    return buffer.getvalue()


def test_every_way_to_pass_an_image_gives_the_same_pixels(photo, processor, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(content := encoded(photo))
    array = np.asarray(photo)
    text = base64.b64encode(content).decode()
    sources = [photo, path, str(path), content, io.BytesIO(content), array, array.transpose(2, 0, 1)]
    sources += [torch.from_numpy(array.copy()), text, f"data:image/png;base64,{text}"]
    sources += [path.as_uri(), {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}]
    expected = processor(photo)["pixel_values"]
    for source in sources:
        assert torch.equal(processor(source)["pixel_values"], expected), type(source)
    assert processor(sources)["pixel_values"].shape == (len(sources), 3, 32, 32)


def test_urls_are_fetched(photo, processor, tmp_path):
    (tmp_path / "photo.png").write_bytes(encoded(photo))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert torch.equal(processor(f"{url}/photo.png")["pixel_values"], processor(photo)["pixel_values"])
        with pytest.raises(OSError, match=r"missing\.png.*404"):
            processor(f"{url}/missing.png")
        server.shutdown()


def test_a_url_that_never_answers_is_given_up(photo):
    with socket.create_server(("127.0.0.1", 0)) as server:  # it takes calls, and says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}/photo.png"
        with pytest.raises(OSError, match=r"can't be fetched: it takes longer than timeout = 0\.1 seconds"):
            open_image(url, timeout=0.1)
    assert 0 < inspect.signature(open_image).parameters["timeout"].default < 60


class BadServer(http.server.BaseHTTPRequestHandler):
    """Answers that are too long, said or not, too short, or come byte by byte."""

    def do_GET(self):  # noqa: N802 (the library's name)
        told = {"/told.png": 10**6, "/short.png": 3000}.get(self.path)
        self.send_response(200)
        if told:
            self.send_header("Content-Length", str(told))
        self.end_headers()
        slow = self.path == "/slow.png"
        with contextlib.suppress(OSError):  # it goes away in the middle
            for _ in range(1 if told else 10**4):
                self.wfile.write(b"." if slow else bytes(1000))
                time.sleep(0.02 if slow else 0)

    def log_message(self, *arguments):
        """Nothing."""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("endless", "it has more than 5000 bytes"),
        ("told", "it has more than 5000 bytes"),
        ("short", "2000 more expected"),
        ("slow", "it takes longer than timeout = 1 seconds"),
    ],
)
def test_what_a_url_may_take_is_bounded(name, error, monkeypatch):
    monkeypatch.setattr(image_files_protoleak, "MAX_BYTES", 5000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadServer) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        begin = time.monotonic()
        with pytest.raises(OSError, match=rf"{name}\.png can't be fetched: .*{error}"):
            open_image(f"http://127.0.0.1:{server.server_port}/{name}.png", timeout=1)
        assert time.monotonic() - begin < 5
        server.shutdown()


def test_a_dict_without_an_image_is_refused():
    with pytest.raises(ValueError, match=r"bytes or path; got \['image', 'label'\]"):
        open_image({"image": 1, "label": 2})


def test_it_is_called_as_other_image_processors_are(photo, tmp_path):
    processor = ProtoLeakImageProcessor(crop_size=32)
    expected = ProtoLeakImageProcessor(crop_size=16, do_resize=False)(photo)["pixel_values"]
    for size in (16, {"shortest_edge": 16}, {"height": 16, "width": 16}):
        assert torch.equal(processor(photo, size=size, do_resize=False)["pixel_values"], expected), size
        assert ProtoLeakImageProcessor(size=size).crop_size == 16
    assert processor.crop_size == 32, "a call changes that call alone"
    assert processor(photo, device="meta")["pixel_values"].is_meta
    processor.save_pretrained(tmp_path)
    loaded = ProtoLeakImageProcessor.from_pretrained(tmp_path, size=16, do_resize=False, device="cpu")
    assert torch.equal(loaded(photo)["pixel_values"], expected)
    assert loaded.size == {"height": 16, "width": 16}
    assert "device" not in loaded.to_dict()
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (processor.image_mean, processor.image_std))
    pixels = np.asarray(photo.crop((8, 4, 40, 36)), np.float32).transpose(2, 0, 1) / 255
    values = processor(photo.crop((8, 4, 40, 36)))["pixel_values"][0]
    np.testing.assert_allclose(values, (pixels - mean) / std, atol=1e-6)
    with pytest.raises(ValueError, match=r"takes crop_size.* got \['mean'\]"):
        processor(photo, mean=0)
    for size in ({"longest_edge": 16}, {"height": 16, "width": 24}, "large"):
        with pytest.raises(ValueError, match="size must be"):
            processor(photo, size=size)


def test_pixel_values_are_the_pixels_from_minus_one_to_one():
    array = np.zeros((8, 8, 3), np.uint8)
    array[..., 0], array[0, 0, 1] = 255, 51
    pixels = ProtoLeakImageProcessor(crop_size=8)(array)["pixel_values"][0]
    assert pixels.dtype == torch.float32
    assert torch.all(pixels[0] == 1)
    assert pixels[1, 0, 0] == pytest.approx(51 / 127.5 - 1)


def test_modes_look_as_a_viewer_shows_them():
    grey = Image.fromarray(np.full((4, 4), 100, np.uint8))
    wide = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    palette = Image.new("P", (4, 4))
    palette.putpalette([5, 6, 7] * 256)
    cases = {
        (100, 100, 100): [grey, wide, grey.convert("RGB"), grey.convert("LA")],
        (255, 255, 255): [clear],
        (5, 6, 7): [palette],
    }
    for colour, images in cases.items():
        for image in images:
            assert open_image(image).getpixel((0, 0)) == colour, image.mode
            if image.mode != "I;16":
                assert open_image(encoded(image)).getpixel((0, 0)) == colour, image.mode
    cmyk = Image.new("RGB", (8, 8), (200, 40, 40)).convert("CMYK")
    assert (
        np.abs(np.array(open_image(encoded(cmyk, format="JPEG")).getpixel((3, 3))) - (200, 40, 40)).max() < 6
    )


def oriented(image: Image.Image, orientation: int) -> bytes:
    exif = image.getexif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif)


def test_an_orientation_does_not_change_the_evidence(photo):
    """The same stored pixels are the same crops; only what is shown is turned."""
    processor = ProtoLeakImageProcessor(crop_size=16, do_resize=False, num_crops=4)
    expected = processor.pixel_values(photo)
    for orientation in range(1, 9):
        content = oriented(photo, orientation)
        assert np.array_equal(processor.pixel_values(content), expected)
        assert preview(content, 100).size == (photo.size if orientation < 5 else photo.size[::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_the_image(orientation):
    painted = Image.new("RGB", (50, 30))
    painted.paste("white", (7, 3, 18, 8))
    (box,), size = turned([(7, 3, 11, 5)], painted.size, orientation)
    upright = preview(oriented(painted, orientation), 100)
    assert orientation_of(Image.open(io.BytesIO(oriented(painted, orientation)))) == orientation
    assert upright.size == size
    assert upright.getbbox() == (box[0], box[1], box[0] + box[2], box[1] + box[3])


def test_a_preview_is_small_and_has_the_colours(tmp_path):
    half = Image.new("RGB", (900, 1400), "red")
    half.paste("blue", (0, 700, 900, 1400))
    for format in ("PNG", "JPEG", "GIF"):
        small = preview(encoded(half, format=format), 64)
        assert small.size == (41, 64)
        assert np.abs(np.subtract(small.getpixel((20, 5)), (255, 0, 0))).max() < 8
        assert np.abs(np.subtract(small.getpixel((20, 60)), (0, 0, 255))).max() < 8


def test_native_crops_are_pixels_of_the_image(photo):
    array = np.asarray(photo)
    centre = ProtoLeakImageProcessor(crop_size=16, do_resize=False).pixel_values(photo)
    assert np.array_equal(
        np.round((centre + 1) * 127.5).astype(np.uint8), array[12:28, 16:32].transpose(2, 0, 1)
    )
    crops = ProtoLeakImageProcessor(crop_size=16, do_resize=False, num_crops=4).pixel_values(photo)
    assert crops.shape == (4, 3, 16, 16)
    corners = [array[:16, :16], array[:16, -16:], array[-16:, :16], array[-16:, -16:]]
    for crop, corner in zip(crops, corners, strict=True):
        assert np.array_equal(np.round((crop + 1) * 127.5).astype(np.uint8), corner.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("size", "count"),
    [((256, 256), 1), ((100, 30), 1), ((257, 256), 2), ((512, 512), 4), ((1024, 1024), 9), ((300, 4000), 6)],
)
def test_an_image_has_as_many_crops_as_its_size_asks_for(size, count):
    processor = ProtoLeakImageProcessor(do_resize=False, num_crops=9)
    boxes = processor.crop_boxes(*size)
    assert len(boxes) == count == len(processor.pixel_values(Image.new("RGB", size)))
    assert {x for x, *_ in boxes} | {x + width for x, _, width, _ in boxes} >= {0, size[0]}, "edge to edge"
    assert {y for _, y, *_ in boxes} | {y + height for *_, y, _, height in boxes} >= {0, size[1]}


def test_crop_boxes_say_where_the_pixels_of_crops_are(photo):
    array = np.asarray(photo)
    for num_crops in (1, 4, 9, 16):
        processor = ProtoLeakImageProcessor(crop_size=16, do_resize=False, num_crops=num_crops)
        crops, boxes = processor.pixel_values(photo), processor.crop_boxes(*photo.size)
        assert len(boxes) == min(num_crops, 9), "48 x 40 pixels hold no more than 3 x 3"
        for crop, (x, y, width, height) in zip(crops.reshape(-1, 3, 16, 16), boxes, strict=True):
            expected = array[y : y + height, x : x + width].transpose(2, 0, 1)
            assert np.array_equal(np.round((crop + 1) * 127.5).astype(np.uint8), expected)


def test_crop_boxes_are_of_the_image_before_resizing_and_without_padding():
    assert ProtoLeakImageProcessor(crop_size=32).crop_boxes(640, 320) == [(160, 0, 320, 320)]
    assert ProtoLeakImageProcessor(crop_size=32, num_crops=4).crop_boxes(640, 320) == [
        (0, 0, 320, 320),
        (320, 0, 320, 320),
    ]
    small = ProtoLeakImageProcessor(crop_size=32, do_resize=False, num_crops=4)
    assert small.crop_boxes(20, 40) == [(0, 0, 20, 32), (0, 8, 20, 32)]


def test_images_with_fewer_crops_are_filled_up_with_flat_ones():
    processor = ProtoLeakImageProcessor(crop_size=16, do_resize=False, num_crops=9)
    small, wide = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (40, 16), "blue")
    pixels = processor([small, wide])["pixel_values"]
    assert pixels.shape == (2, 3, 3, 16, 16)
    assert torch.equal(pixels[0, :1], processor(small)["pixel_values"][0])
    assert torch.equal(pixels[1], processor(wide)["pixel_values"][0])
    assert not pixels[0, 1:].any()


def test_paint_outside_one_crop_shows_in_the_others():
    """Everything but the middle painted magenta."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    painted = np.full_like(noise, (255, 0, 255))
    painted[16:32, 16:32] = noise[16:32, 16:32]
    processor = ProtoLeakImageProcessor(crop_size=16, do_resize=False, num_crops=9)
    before, after = processor.pixel_values(noise), processor.pixel_values(painted)
    differs = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert differs == [k != 4 for k in range(9)]
    assert all(np.ptp(crop, axis=(1, 2)).max() == 0 for crop in np.delete(after, 4, axis=0)), "flat"


@pytest.mark.parametrize("num_crops", [0, 2, 25, "4", None])
def test_a_number_of_crops_that_is_no_grid_is_named(num_crops):
    with pytest.raises(ValueError, match=r"num_crops must be one of \(1, 4, 9, 16\)"):
        ProtoLeakImageProcessor(num_crops=num_crops)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (40, 2)])
@pytest.mark.parametrize("do_resize", [True, False])
def test_small_images_fill_the_crop(size, do_resize):
    pixels = ProtoLeakImageProcessor(crop_size=32, do_resize=do_resize)(Image.new("RGB", size, "red"))[
        "pixel_values"
    ]
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.equal(pixels[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_bad_input_is_named(tmp_path, photo, processor):
    (tmp_path / "page.png").write_text("<html></html>")
    (tmp_path / "cut.png").write_bytes(encoded(photo)[:200])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("page.png", "cut.png", "empty.png", "missing.png"):
        with pytest.raises(OSError, match=name):
            processor(tmp_path / name)
    with pytest.raises(ValueError, match="max_pixels = 100"):
        ProtoLeakImageProcessor(max_pixels=100)(photo)
    with pytest.raises(ValueError, match="shape"):
        processor(np.zeros((2, 2, 7)))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        processor(np.full((4, 4, 3), 7.5))
    with pytest.raises(ValueError, match="empty"):
        processor([])
    with pytest.raises(ValueError, match="NoneType"):
        processor(None)
    with pytest.raises(ValueError, match="crop_size"):
        ProtoLeakImageProcessor(crop_size=0)


def test_a_processor_survives_saving(tmp_path):
    processor = ProtoLeakImageProcessor(crop_size=40, do_resize=False, num_crops=4)
    processor.save_pretrained(tmp_path)
    assert ProtoLeakImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
