"""From any image to pixel values: the one place where images are opened and checked."""

import io
import math
import os
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging

from .decoding_protoleak import MAX_PIXELS, check_bounds, from_array, is_deep, shown, to_rgb
from .evidence_protoleak import LEAST_SIDE, SUFFICIENT, lack_of_evidence
from .files_protoleak import shown_name
from .image_files_protoleak import open_encoded
from .postprocessing_protoleak import TREATMENTS, postprocess, treated_size, treated_window

logger = logging.get_logger(__name__)

JPEG_QUALITY = 90  # that image formats are normalised by
NUM_CROPS = (1, 4, 9, 16)
LARGEST_CROP = 2048
TIMEOUT = 20.0  # seconds that a URL may take


def open_image(
    source: Any, max_pixels: int = MAX_PIXELS, timeout: float | None = TIMEOUT, name: str | None = None
) -> Image.Image:
    """
    Open an image as 8-bit RGB, its pixels where they are stored.

    An EXIF orientation is left to viewers: the same pixels are the same evidence. Transparency is laid over
    white, 16-bit and floating-point values are scaled to 8 bits, the first frame of an animation is taken.

    Args:
        source: Path, http(s) or file URL, base64 or `data:` string, bytes, binary file, a dict with `bytes`
            or `path` as `datasets` has them, PIL image, or an array or tensor of shape (H, W), (H, W, C) or
            (C, H, W) with 1, 3 or 4 channels: uint8 in [0, 255], uint16 in [0, 65535], or floating point in
            [0, 1].
        max_pixels (`int`): Larger images are refused before they are decoded.
        timeout (`float`, *optional*): Seconds that a URL may take in all; without end with `None`.
        name (`str`, *optional*): What errors call it.

    Raises:
        OSError: the file is missing, no regular file, unreadable, truncated, not an image, or, from a URL, of
            more than `MAX_BYTES` of `files_protoleak.py`.
        ValueError: the image is too large, or would take too long to decode, see `decoding_protoleak.py`, or
            the array, or an image's values, have no image's shape, type or range.
    """
    source = _addressed(source)
    if name is None:
        name = shown_name(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    name = name if len(name) <= 200 else f"...{name[-200:]}"
    image = open_container(source, name, max_pixels, timeout)
    try:
        image.load()
        image = image if is_deep(image) else to_rgb(image)
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise OSError(f"{name} can't be decoded, it may be truncated or damaged: {error}") from error
    return to_rgb(image, name)


def _addressed(source: Any) -> Any:
    """The bytes or the path of a dict of `datasets` or of a file URL; anything else as it is."""
    if isinstance(source, Mapping):
        content, path = source.get("bytes"), source.get("path")
        if content is None and path is None:
            raise ValueError(f"a dict must have an image's bytes or path; got {sorted(map(str, source))}")
        return _addressed(path) if content is None else content
    if isinstance(source, str) and source.startswith("file:"):
        return urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
    return source


def open_container(
    source: Any, name: str, max_pixels: int = MAX_PIXELS, timeout: float | None = TIMEOUT
) -> Image.Image:
    """The image in a source, its pixels not decoded; [`open_image`] tells what is taken, and what refused."""
    source = _addressed(source)
    if hasattr(source, "__array__") and not isinstance(source, Image.Image):
        return from_array(np.asarray(source), name)
    image = source if isinstance(source, Image.Image) else open_encoded(source, name, timeout)
    check_bounds(image, name, max_pixels)
    return image


def preview(source: Any, side: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image as a viewer shows it, upright and small: see [`shown`]."""
    name = shown_name(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    image = open_container(source, name, max_pixels)
    return shown(image.copy() if image is source else image, side, name)


def thumbnail(source: Any, side: int = 64) -> bytes:
    """A small JPEG file of an image, at most `side` pixels wide and high."""
    content = io.BytesIO()
    preview(source, side).save(content, "JPEG", quality=85)
    return content.getvalue()


class ProtoLeakImagesKwargs(TypedDict, total=False):
    """What [`ProtoLeakImageProcessor`] takes, once for all or with a call."""

    crop_size: int
    size: int | dict[str, int]
    do_resize: bool
    resample: int
    num_crops: int
    max_pixels: int
    device: str | None
    return_tensors: str | None


class ProtoLeakImageProcessor(BaseImageProcessor):
    r"""
    Turns images into pixel values in [-1, 1].

    Args:
        crop_size (`int`, defaults to 256): Side of the square crops in pixels, a multiple of the VAE's
            reduction (8).
        do_resize (`bool`, defaults to `True`):
            Whether the shorter side is resized to `crop_size` first, as in the paper. Without, crops are cut
            at native resolution, which keeps the traces that resampling destroys; smaller images are padded
            by reflection.
        resample (`int`, defaults to 3, bicubic): Filter of the resizing, as in `PIL.Image.Resampling`.
        num_crops (`int`, defaults to 1):
            The most crops an image, 1, 4, 9 or 16. One is at the centre. Of several, those that an image gets
            follow from its size: along either side as many as fit without overlapping, rounded up, at most
            the root of `num_crops`, spread evenly from edge to edge.
        max_pixels (`int`): Larger images are refused.
        size (`int` or `dict[str, int]`, *optional*): `crop_size` as other image processors call it: a number,
            `{"shortest_edge": 256}`, or height and width that are equal. It overrides `crop_size`.
        device (`str`, *optional*): Where pixel values go.
        jpeg_quality (`int`, *optional*): Every image is encoded as JPEG of this quality, 1 to 95, before it
            is cut, so that a model that was trained so does not tell PNG files from JPEG files.

    Attributes:
        image_mean, image_std (`list[float]`): What pixel values are normalised by, as in
            `torchvision.transforms.Normalize`; with `size` all that tutorials read of an image processor.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = ProtoLeakImagesKwargs
    image_mean = [0.5] * 3
    image_std = [0.5] * 3

    def __init__(
        self,
        crop_size: int = 256,
        do_resize: bool = True,
        resample: int = Image.Resampling.BICUBIC,
        num_crops: int = 1,
        max_pixels: int = MAX_PIXELS,
        size: int | Mapping[str, int] | None = None,
        device: str | None = None,
        jpeg_quality: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        crop_size = crop_size if size is None else _side(size)
        for argument, value in {
            "crop_size": crop_size,
            "max_pixels": max_pixels,
        }.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{argument} must be an integer of at least 1; got {argument}={value!r}")
        if crop_size > LARGEST_CROP:
            raise ValueError(
                f"crop_size must be at most {LARGEST_CROP}, as an image's crops are held together; "
                f"got crop_size={crop_size}"
            )
        if num_crops not in NUM_CROPS:
            raise ValueError(f"num_crops must be one of {NUM_CROPS}; got num_crops={num_crops!r}")
        if resample not in list(Image.Resampling):
            raise ValueError(
                f"resample must be one of {[int(r) for r in Image.Resampling]}; got resample={resample!r}"
            )
        if jpeg_quality is not None and jpeg_quality not in range(1, 96):
            raise ValueError(f"jpeg_quality must be within 1 and 95, or None; got {jpeg_quality!r}")
        self.jpeg_quality = jpeg_quality
        self.crop_size, self.do_resize, self.resample = crop_size, do_resize, int(resample)
        self.num_crops, self.max_pixels, self.device = num_crops, max_pixels, device

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As that of [`BaseImageProcessor`]; the pipeline that has no use for a refusal is warned of."""
        if kwargs.get("_from_pipeline") == "image-classification":  # every pipeline loads its processor so
            logger.warning(
                'pipeline("image-classification") gives probabilities of the known classes alone, with no '
                '"unknown", no "can\'t tell" and no p-value; pipeline("image-attribution", model=..., '
                "trust_remote_code=True) has them"
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def settings(self) -> dict[str, int]:
        """What pixel values depend on, besides the image."""
        names = ["crop_size", "do_resize", "num_crops"]
        names += ["resample"] if self.do_resize else []
        names += [] if self.jpeg_quality is None else ["jpeg_quality"]
        return {name: int(getattr(self, name)) for name in names}

    @property
    def size(self) -> dict[str, int]:
        """Height and width of a crop."""
        return {"height": self.crop_size, "width": self.crop_size}

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **changes: Any) -> BatchFeature:
        """
        Args:
            images: One image or several, see [`~ProtoLeakImageProcessor.several`], each anything that
                [`open_image`] takes.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"`, or `None` for a list.
            changes (*optional*): Arguments of the processor that are others in this call.

        Returns:
            `BatchFeature` with `pixel_values` of shape (batch_size, 3, crop_size, crop_size), or, unless
            `num_crops` is 1, (batch_size, V, 3, crop_size, crop_size), V the most crops that an image of the
            batch has, see [`stack_crops`]: float32 in [-1, 1]; and `no_evidence` of shape (batch_size,), see
            [`~ProtoLeakImageProcessor.lack_of_evidence`].
        """
        processor = self._changed(changes)
        several = self.several(images)
        images = [images] if several is None else several
        if not len(images):
            raise ValueError("images is empty; pass at least one image")
        images = [processor.open(image) for image in images]
        pixel_values = stack_crops([processor.pixel_values(image) for image in images])
        lacks = np.array([processor.lack_of_evidence(image) for image in images])
        data = {"pixel_values": pixel_values, "no_evidence": lacks}
        inputs = BatchFeature(data, tensor_type=return_tensors)
        return inputs if processor.device is None else inputs.to(processor.device)

    @staticmethod
    def several(images: Any) -> Sequence[Any] | None:
        """
        The images of a list, a tuple, a column of a data set or an array of four dimensions; `None` where it
        is one image.
        """
        if getattr(images, "ndim", None) == 4:
            return list(images)
        return (
            images
            if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray)
            else None
        )

    def _changed(self, changes: dict[str, Any]) -> "ProtoLeakImageProcessor":
        """This processor with other arguments."""
        allowed = self.valid_kwargs.__annotations__
        if unknown := set(changes) - set(allowed):
            raise ValueError(f"the image processor takes {', '.join(allowed)}; got {sorted(unknown)}")
        changes = {name: value for name, value in changes.items() if value is not None}
        if not changes:
            return self
        own = ("crop_size", "do_resize", "resample", "num_crops", "max_pixels", "device", "jpeg_quality")
        return type(self)(**{name: getattr(self, name) for name in own} | changes)

    def open(self, image: Any, timeout: float | None = TIMEOUT) -> Image.Image:
        """[`open_image`] within `max_pixels`."""
        return open_image(image, self.max_pixels, timeout)

    def lack_of_evidence(self, image: Any) -> int:
        """
        What an image lacks for an attribution, 0 for nothing: see `evidence_protoleak.py`. Of models of crops
        below `LEAST_SIDE` pixels, nothing: such small pictures are theirs.
        """
        return SUFFICIENT if self.crop_size < LEAST_SIDE else lack_of_evidence(self.open(image))

    def pixel_values(self, image: Any) -> np.ndarray:
        """
        The crops of one image: float32 (3, S, S), or (V, 3, S, S) unless `num_crops` is 1, in [-1, 1]; V as
        its size asks for.
        """
        image = self.open(image)
        if self.jpeg_quality is not None:
            image = postprocess(image, "jpeg", self.jpeg_quality)
        size = self._working_size(*image.size)
        if size != image.size:
            image = image.resize(size, self.resample)
        return self._stacked([image.crop(window) for window in self._windows(*size)])

    def _stacked(self, crops: list[Image.Image]) -> np.ndarray:
        arrays = [_reflect_pad(np.asarray(crop), self.crop_size) for crop in crops]
        pixels = np.stack(arrays).transpose(0, 3, 1, 2).astype(np.float32, order="C")
        pixels /= 127.5
        pixels -= 1
        return pixels[0] if self.num_crops == 1 else pixels

    def crop_boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """
        What the crops of an image of this size show, in the order of `pixel_values`: (x, y, width, height) of
        each, in pixels of the image as stored, before any resizing.
        """
        wide, high = self._working_size(width, height)
        boxes = []
        for window in self._windows(wide, high):
            left, right = (round(x * width / wide) for x in window[::2])
            top, bottom = (round(y * height / high) for y in window[1::2])
            boxes.append((left, top, right - left, bottom - top))
        return boxes

    def _working_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image as crops are cut from it."""
        if not self.do_resize:
            return width, height
        scale = self.crop_size / min(width, height)
        return max(self.crop_size, round(width * scale)), max(self.crop_size, round(height * scale))

    def _windows(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """Left, top, right and bottom of each crop, within an image of this size; row by row."""
        side, most = self.crop_size, math.isqrt(self.num_crops)
        lefts, tops = (_spread(max(0, n - side), min(most, math.ceil(n / side))) for n in (width, height))
        return [(x, y, min(x + side, width), min(y + side, height)) for y in tops for x in lefts]

    @property
    def treatments(self) -> list[str]:
        """What a verdict should survive, in words: the ways of [`~ProtoLeakImageProcessor.treated`]."""
        return [f"{treatment} {strength:g}" for treatment, strength in TREATMENTS]

    def treated(self, image: Any) -> list[np.ndarray]:
        """
        [`~ProtoLeakImageProcessor.pixel_values`] of an image after each of the `treatments`. Where crops are
        cut of the pixels as they are, only what they show is treated, however large the image is.
        """
        image, several = self.open(image), []
        for treatment in TREATMENTS:
            size = treated_size(image.size, *treatment)
            if self.do_resize or self.jpeg_quality is not None:
                several.append(self.pixel_values(treated_window(image, *treatment, (0, 0, *size))))
            else:
                crops = [treated_window(image, *treatment, window) for window in self._windows(*size)]
                several.append(self._stacked(crops))
        return several

    def with_treated(self, image: Any) -> BatchFeature:
        """As [`~ProtoLeakImageProcessor.preprocess`] an image, then the same image after each treatment."""
        image = self.open(image)
        several = [self.pixel_values(image), *self.treated(image)]
        lacks = np.full(len(several), self.lack_of_evidence(image))
        return BatchFeature({"pixel_values": stack_crops(several), "no_evidence": lacks}, tensor_type="pt")

    def to_dict(self) -> dict[str, Any]:
        name, values = type(self).__name__, super().to_dict()
        values.pop("device", None)  # it is the machine's, not the checkpoint's
        return values | {"auto_map": {"AutoImageProcessor": f"image_processing_protoleak.{name}"}}


def _side(size: Any) -> Any:
    """The side of a crop from what other image processors call `size`."""
    sides = set(size.values()) if isinstance(size, Mapping) else {size}
    allowed = not isinstance(size, Mapping) or set(size) in ({"shortest_edge"}, {"height", "width"})
    if not allowed or len(sides) != 1:
        raise ValueError(
            f"size must be a number, {{'shortest_edge': number}}, or equal height and width; "
            f"got size={size!r}"
        )
    return sides.pop()


def stack_crops(images: list[np.ndarray]) -> np.ndarray:
    """
    What [`~ProtoLeakImageProcessor.pixel_values`] gives for several images as one batch: (B, 3, S, S), or
    (B, V, 3, S, S) with V the most crops that one of them has. Those with fewer are filled up with crops of
    zeros, which are flat and so carry no evidence.
    """
    if images[0].ndim == 3:
        return np.stack(images)
    most = max(len(crops) for crops in images)
    batch = np.zeros((len(images), most, *images[0].shape[1:]), np.float32)
    for row, crops in zip(batch, images, strict=True):
        row[: len(crops)] = crops
    return batch


def _spread(free: int, count: int) -> list[int]:
    return [free // 2] if count == 1 else [round(i * free / (count - 1)) for i in range(count)]


def _reflect_pad(array: np.ndarray, size: int) -> np.ndarray:
    """Pad (H, W, 3) evenly to at least size x size; "symmetric" also works for a side of one pixel."""
    missing = [max(0, size - n) for n in array.shape[:2]]
    if not any(missing):
        return array
    return np.pad(array, [(n // 2, n - n // 2) for n in missing] + [(0, 0)], mode="symmetric")


__all__ = ["ProtoLeakImageProcessor"]
