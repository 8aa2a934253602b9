"""
What happens to images on their way: the operators of WILD and of social media, each with strengths, for
training on and for measuring robustness. Every result is fixed by the image's pixels and a seed.
"""

import hashlib
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, features

Resampling = Image.Resampling


def _reencode(kind: str) -> Callable:
    def apply(image: Image.Image, quality: float, rng: np.random.Generator | None) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=int(quality))
        return Image.open(buffer).convert("RGB")

    return apply


def _crop(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """A window of this share of either side, at a random place."""
    width, height = (max(1, round(share * n)) for n in image.size)
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def _resize(kernel: Resampling) -> Callable:
    def apply(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
        """By the factor, and back to the size that it had."""
        other = image.resize([max(1, round(factor * n)) for n in image.size], kernel)
        return other.resize(image.size, kernel)

    return apply


def _rotate(image: Image.Image, degrees: float, rng: np.random.Generator) -> Image.Image:
    """About the centre, either way; the corners show the image's reflection."""
    pad = (max(image.size) + 1) // 2
    padded = np.pad(np.asarray(image), ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    turned = Image.fromarray(padded).rotate(degrees * rng.choice([-1, 1]), Resampling.BICUBIC)
    return turned.crop((pad, pad, pad + image.width, pad + image.height))


def _enhance(kind: type) -> Callable:
    return lambda image, factor, rng: kind(image).enhance(factor)


def _blur(image: Image.Image, radius: float, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _grey(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    return image.convert("L").convert("RGB")


def _noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian, sigma in grey levels of 255."""
    noisy = np.asarray(image, float) + rng.normal(0, sigma, (image.height, image.width, 3))
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _palette(image: Image.Image, colours: float, rng: np.random.Generator) -> Image.Image:
    return image.quantize(int(colours)).convert("RGB")


def _screenshot(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Shown larger or smaller on a screen with another gamma, captured, and sent as JPEG."""
    shown = image.resize([max(1, round(factor * n)) for n in image.size], Resampling.BILINEAR)
    gamma = rng.uniform(0.95, 1.05)
    shown = shown.point([round(255 * (v / 255) ** gamma) for v in range(256)] * 3)
    return _reencode("JPEG")(shown.resize(image.size, Resampling.BICUBIC), 85, rng)


# name: (function of image, strength and random numbers; strengths, from weak to strong)
OPERATORS: dict[str, tuple[Callable, tuple[float, ...]]] = {
    "jpeg": (_reencode("JPEG"), (95, 85, 75, 50)),
    "webp": (_reencode("WEBP"), (90, 75, 50)),
    "crop": (_crop, (0.9, 0.75, 0.5)),
    "resize_bilinear": (_resize(Resampling.BILINEAR), (1.5, 0.75, 0.5)),
    "resize_bicubic": (_resize(Resampling.BICUBIC), (1.5, 0.75, 0.5)),
    "resize_lanczos": (_resize(Resampling.LANCZOS), (1.5, 0.75, 0.5)),
    "rotation": (_rotate, (1, 5, 15)),
    "contrast": (_enhance(ImageEnhance.Contrast), (0.9, 0.7, 1.3)),
    "brightness": (_enhance(ImageEnhance.Brightness), (0.9, 0.7, 1.3)),
    "colour": (_enhance(ImageEnhance.Color), (0.9, 0.5, 1.5)),
    "gaussian_blur": (_blur, (0.5, 1.0, 2.0)),
    "sharpening": (_enhance(ImageEnhance.Sharpness), (1.5, 2.0, 3.0)),
    "greyscale": (_grey, (1,)),
    "gaussian_noise": (_noise, (2, 5, 10)),
    "palette": (_palette, (256, 64, 16)),
    "screenshot": (_screenshot, (1.1, 1.5, 0.75)),
}
if features.check("avif"):
    OPERATORS["avif"] = (_reencode("AVIF"), (90, 75, 50))
CHAINS = {f"step{length}": length for length in (1, 2, 3)}  # as WILD calls chains of so many random operators


def postprocess(image: Image.Image, operator: str, strength: float | None = None, seed: int = 0):
    """
    Args:
        image (`PIL.Image.Image`): RGB.
        operator (`str`): One of `OPERATORS`, or of `CHAINS`: that many random ones of random strengths.
        strength (`float`, *optional*): What the operator takes, see `OPERATORS`, where one is drawn from if
            it is not given; a chain takes none.
        seed (`int`): With the pixels, fixes what is random.

    Returns:
        `PIL.Image.Image` in RGB. Only "crop" changes the size.

    Raises:
        ValueError: the operator is unknown.
    """
    if operator not in OPERATORS and operator not in CHAINS:
        raise ValueError(f"operator must be one of {[*OPERATORS, *CHAINS]}; got {operator!r}")
    digest = hashlib.sha256(image.tobytes())
    digest.update(f"{image.size} {operator} {strength} {seed}".encode())
    rng = np.random.default_rng(int.from_bytes(digest.digest()[:8], "big"))
    steps = [(operator, strength)]
    if operator in CHAINS:
        names = rng.choice(list(OPERATORS), CHAINS[operator], replace=False)
        steps = [(str(name), None) for name in names]
    steps = [(name, float(rng.choice(OPERATORS[name][1])) if s is None else s) for name, s in steps]
    for name, value in steps:
        image = OPERATORS[name][0](image, value, rng)
    return image


# --- an image that is saved again ---------------------------------------------------------------------------

# what a verdict should survive: JPEG by its quality, and a reduction by its factor
TREATMENTS = (("JPEG", 85), ("JPEG", 60), ("reduction", 0.75))
JPEG_BLOCK = 16  # the pixels that JPEG codes together, with their colours at half the resolution


def treated_size(size: tuple[int, int], treatment: str, strength: float) -> tuple[int, int]:
    """Width and height of an image after one of `TREATMENTS`."""
    return tuple(max(1, round(strength * n)) for n in size) if treatment == "reduction" else size


def treated_window(
    image: Image.Image, treatment: str, strength: float, window: tuple[int, int, int, int]
) -> Image.Image:
    """
    What a window of an image shows after one of `TREATMENTS`, without treating the rest of it, which may be
    large: nothing that is further away than a block has a part in it.

    Args:
        image (`PIL.Image.Image`): RGB.
        window (`tuple[int, int, int, int]`): Left, top, right and bottom, in the treated image.
    """
    left, top, right, bottom = window
    width, height = image.size
    if treatment == "reduction":
        reduced = treated_size(image.size, treatment, strength)
        wide, high = width / reduced[0], height / reduced[1]
        box = (left * wide, top * high, min(right * wide, width), min(bottom * high, height))
        return image.resize((right - left, bottom - top), Resampling.BICUBIC, box=box)
    x, y = (max(0, n // JPEG_BLOCK - 1) * JPEG_BLOCK for n in (left, top))
    end_x, end_y = ((n // JPEG_BLOCK + 2) * JPEG_BLOCK for n in (right, bottom))
    part = image.crop((x, y, min(end_x, width), min(end_y, height)))
    return _reencode(treatment)(part, strength, None).crop((left - x, top - y, right - x, bottom - y))


__all__ = ["CHAINS", "OPERATORS", "TREATMENTS", "postprocess", "treated_size", "treated_window"]
