import numpy as np
import pytest
from PIL import Image
from protoleak.postprocessing_protoleak import CHAINS, OPERATORS, postprocess

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
    with pytest.raises(ValueError, match="'jpeg' needs a strength"):
        postprocess(photo, "jpeg")
