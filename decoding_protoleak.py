"""
Encoded images to 8-bit RGB, within bounds of memory and time: what is too large or too slow is refused
before it is decoded, and beside the decoded image and its RGB nothing is held whole.

Decoding takes up to 16 bytes a pixel (WebP and floating-point TIFF; PNG and JPEG up to 8), so 2.9 GB at
`MAX_PIXELS`, and what is kept of it 4.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 178_956_970  # above which Pillow itself refuses an image as a decompression bomb
MAX_SCANS = 100  # of a JPEG file; encoders write up to about 20, and each takes about 1 ms a megapixel
STRIP = 2**22  # pixels that are converted at a time
SAMPLED = 4  # a preview is reduced from so many times its side

# How a viewer turns stored pixels, by EXIF orientation: whether x and y change places, and whether the x, and
# the y, that follow count from the other end.
TURNS = {
    1: (False, False, False), 2: (False, True, False), 3: (False, True, True), 4: (False, False, True),
    5: (True, False, False), 6: (True, True, False), 7: (True, True, True), 8: (True, False, True),
}  # fmt: skip
Box = tuple[int, int, int, int]  # x, y, width, height


def check_bounds(image: Image.Image, name: str, max_pixels: int) -> None:
    """Raise `ValueError` for an image, not yet decoded, that would take too much memory or time."""
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"{name} has {image.width} x {image.height} pixels, more than max_pixels = {max_pixels}; "
            f"reduce it or raise max_pixels in preprocessor_config.json"
        )
    source = getattr(image, "fp", None)
    if image.format in ("JPEG", "MPO") and source is not None:
        place = source.tell()
        source.seek(0)
        scans = count_scans(source.read())
        source.seek(place)
        if scans > MAX_SCANS:
            raise ValueError(
                f"{name} is a JPEG file of {scans} scans, and each takes the time of a whole image; encoders "
                f"write no more than {MAX_SCANS}. Save it again to examine it"
            )


def count_scans(content: bytes) -> int:
    """How many scans the first image in a JPEG file has: its markers of that kind (ITU-T T.81, B.1.1)."""
    # FF is followed by 00 or a restart marker in coded data alone, and by itself where it fills up
    marker, scans, place = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])"), 0, 2
    while (match := marker.search(content, place)) and match[1] != b"\xd9":
        scans += match[1] == b"\xda"
        has_length = match[1] not in (b"\x01", b"\xd8")
        place = match.end() + (int.from_bytes(content[match.end() : match.end() + 2]) if has_length else 0)
    return scans


# --- pixels -------------------------------------------------------------------------------------------------


def is_deep(image: Image.Image) -> bool:
    """Whether its values have more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """
    The stored pixels of an image in 8-bit RGB, transparency laid over white; `image` itself where it is that.
    `name` is what errors call it.
    """
    image.load()
    if is_deep(image):
        image = from_array(np.asarray(image), name)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    whole, rows = Image.new("RGB", image.size), max(1, STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        whole.paste(strip.convert("RGB"), (0, top))
    return whole


def from_array(array: np.ndarray, name: str) -> Image.Image:
    """(H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4, values as [`to_uint8`] takes them."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(
            f"an array must be (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4; got shape {array.shape}"
        )
    return Image.fromarray(to_uint8(array, name))


def to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 in [0, 255], uint16 in [0, 65535] or floating point in [0, 1], to uint8 of the same shape."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return (array // 257).astype(np.uint8)
    if (
        np.issubdtype(array.dtype, np.floating)
        and np.isfinite(array).all()
        and array.min() >= 0
        and array.max() <= 1
    ):
        return np.round(array * 255).astype(np.uint8)
    if np.issubdtype(array.dtype, np.integer) and array.min() >= 0 and array.max() <= 65535:
        return (array // 257).astype(np.uint8) if array.max() > 255 else array.astype(np.uint8)
    raise ValueError(
        f"{name}: values must be uint8, uint16, or floating point in [0, 1]; "
        f"got {array.dtype} within [{array.min()}, {array.max()}]; scale them to one of these"
    )


# --- as a viewer shows it -----------------------------------------------------------------------------------


def shown(image: Image.Image, side: int, name: str = "the image") -> Image.Image:
    """
    An image, not yet decoded, as a viewer shows it: turned by its EXIF orientation, 8-bit RGB, at most `side`
    pixels wide and high. Of a large one only some of the pixels are looked at.
    """
    near = SAMPLED * side
    image.draft("RGB", (near, near))
    if max(image.size) > near:
        scale = near / max(image.size)
        small = [max(1, round(scale * n)) for n in image.size]
        image = image.resize(small, Image.Resampling.NEAREST)
    image = to_rgb(ImageOps.exif_transpose(image), name)
    image.thumbnail((side, side))
    return image


def turned(
    boxes: Sequence[Box], size: tuple[int, int], orientation: int
) -> tuple[list[Box], tuple[int, int]]:
    """
    Boxes in an image of this size, as stored, and the size, as they are once a viewer has turned it by its
    EXIF orientation, 1 to 8 (any other is 1).
    """
    swap, from_right, from_below = TURNS.get(orientation, TURNS[1])
    wide, high = size[::-1] if swap else size
    places = []
    for x, y, width, height in boxes:
        if swap:
            x, y, width, height = y, x, height, width
        x = wide - x - width if from_right else x
        y = high - y - height if from_below else y
        places.append((x, y, width, height))
    return places, (wide, high)


def orientation_of(image: Any) -> int:
    """The EXIF orientation of a `PIL.Image.Image`, 1 where there is none or it can't be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 (Pillow raises many kinds for damaged EXIF)
        return 1
