import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from protoleak.postprocessing_protoleak import (
    CHAINS,
    OPERATORS,
    TREATMENTS,
    postprocess,
    treated_size,
    treated_window,
)

CASES = [(name, strength) for name, (_, strengths) in OPERATORS.items() for strength in strengths]


@pytest.mark.parametrize(("operator", "strength"), CASES + [(name, None) for name in CHAINS])
def test_an_operator_changes_the_pixels_the_same_way_each_time(photo, operator, strength):
    before = photo.tobytes()
    first, second = (postprocess(photo, operator, strength, seed=3) for _ in range(2))
    assert photo.tobytes() == before
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()
    assert first.size != photo.size or first.tobytes() != before
    if operator not in ("crop", *CHAINS):
        assert first.size == photo.size
        difference = np.asarray(first, float) - np.asarray(photo, float)
        assert np.abs(difference).mean() < 60, "it is still the same picture"


@pytest.mark.parametrize("operator", ["gaussian_noise", "crop", "step2"])
def test_the_seed_and_the_pixels_decide(photo, operator):
    strength = OPERATORS[operator][1][0] if operator in OPERATORS else None
    results = {postprocess(photo, operator, strength, seed).tobytes() for seed in range(5)}
    assert len(results) > 1


@pytest.mark.parametrize("operator", ["jpeg", "gaussian_blur", "gaussian_noise", "resize_bicubic", "crop"])
def test_strengths_go_from_weak_to_strong(photo, operator):
    if operator == "crop":
        areas = [np.prod(postprocess(photo, operator, s).size) for s in OPERATORS[operator][1]]
        assert areas == sorted(areas, reverse=True)
        return
    errors = [
        np.abs(np.asarray(postprocess(photo, operator, s), float) - np.asarray(photo, float)).mean()
        for s in OPERATORS[operator][1]
    ]
    assert errors == sorted(errors)


def test_one_pixel_survives_everything():
    dot = Image.new("RGB", (1, 1), (200, 10, 10))
    for operator, strength in CASES:
        assert postprocess(dot, operator, strength).size == (1, 1)


def test_bad_arguments_are_named(photo):
    with pytest.raises(ValueError, match="'jepg'"):
        postprocess(photo, "jepg", 5)


def test_a_strength_that_is_not_given_is_one_of_the_operators(photo):
    strengths = OPERATORS["jpeg"][1]
    saved = {postprocess(photo, "jpeg", strength).tobytes(): strength for strength in strengths}
    drawn = [postprocess(photo, "jpeg", seed=seed).tobytes() for seed in range(30)]
    assert {saved[pixels] for pixels in drawn} == set(strengths)
    assert drawn[0] == postprocess(photo, "jpeg", seed=0).tobytes()


@pytest.mark.parametrize(("treatment", "strength"), TREATMENTS)
@pytest.mark.parametrize("size", [(301, 217), (64, 80), (33, 7), (1, 1)])
def test_a_treated_window_is_that_of_the_whole_image_treated(size, treatment, strength):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1))
    whole = treated_window(image, treatment, strength, (0, 0, *(treated_size(size, treatment, strength))))
    if treatment == "JPEG":
        image.save(buffer := io.BytesIO(), "JPEG", quality=strength)
        assert np.array_equal(whole, Image.open(buffer))
    else:
        assert np.array_equal(whole, image.resize(whole.size, Image.Resampling.BICUBIC))
    rng = np.random.default_rng(1)
    for _ in range(20):
        left, top = (int(rng.integers(n)) for n in whole.size)
        right, bottom = int(rng.integers(left, whole.width)) + 1, int(rng.integers(top, whole.height)) + 1
        window = (left, top, right, bottom)
        part = treated_window(image, treatment, strength, window)
        assert part.size == (window[2] - left, window[3] - top)
        difference = np.asarray(part, int) - np.asarray(whole.crop(window), int)
        assert np.abs(difference).max() <= (treatment == "reduction"), "of resizing by fractions of a pixel"
