"""Statistics of texture against counts one by one, and against SciPy."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from protoleak.configuration_protoleak import TEXTURE_FAMILIES
from protoleak.picture_protoleak import PictureStatistics
from protoleak.texture_protoleak import (
    NUM_COOCCURRENCES,
    NUM_COOCCURRENCES_OF_CONTRAST,
    NUM_PATTERNS,
    NUM_TERNARY_PATTERNS,
    RESIDUALS,
    RIDGE,
    PrincipalPlane,
    _count,
    _count_at_once,
    cooccurrences,
    cooccurrences_of_contrast,
    log_cholesky,
    num_log_cholesky,
    ternary_patterns,
)

from .conftest import TEXTURE, tiny_model
from .test_modeling import latents

# --- co-occurrences -----------------------------------------------------------------------------------------


def canonical(run: tuple[int, ...]) -> tuple[int, ...]:
    """The first of a run, its mirror image, its negative and the mirror image of that."""
    negative = tuple(-level for level in run)
    return min(run, run[::-1], negative, negative[::-1])


PATTERNS = sorted({canonical(run) for run in itertools.product(range(-2, 3), repeat=4)})


def first(plane: np.ndarray) -> np.ndarray:
    return np.array([[row[j + 1] - row[j] for j in range(len(row) - 1)] for row in plane])


def second(plane: np.ndarray) -> np.ndarray:
    return np.array(
        [[(row[j - 1] + row[j + 1]) / 2 - row[j] for j in range(1, len(row) - 1)] for row in plane]
    )


def laplace(plane: np.ndarray) -> np.ndarray:
    height, width = plane.shape
    around = lambda i, j: plane[i - 1, j] + plane[i + 1, j] + plane[i, j - 1] + plane[i, j + 1]  # noqa: E731
    return np.array(
        [[around(i, j) / 4 - plane[i, j] for j in range(1, width - 1)] for i in range(1, height - 1)]
    )


KERNELS = [(first, (1 / 8, 1 / 4)), (second, (1 / 16, 1 / 8, 1 / 4)), (laplace, (1 / 8,))]


def counted(plane: np.ndarray) -> list[float]:
    """What [`cooccurrences`] gives, run by run."""
    described = []
    for residual, steps in KERNELS:
        for step in steps:
            runs = Counter()
            for turned in (plane, plane.T):
                levels = [[max(-2, min(2, round(x / step))) for x in row] for row in residual(turned)]
                lines = levels + [list(column) for column in zip(*levels, strict=True)]
                runs.update(canonical(tuple(line[i : i + 4])) for line in lines for i in range(len(line) - 3))
            described += [(runs[pattern] / runs.total()) ** 0.5 for pattern in PATTERNS]
    return described


def planes(count: int, height: int = 9, width: int = 7) -> torch.Tensor:
    """Noise whose residuals take all levels."""
    return torch.randn(count, height, width, generator=torch.Generator().manual_seed(0)) * 0.3


def test_there_are_169_patterns():
    """625 runs, of which 25 are their own mirror images, 25 their own negatives' and one its own negative."""
    assert NUM_PATTERNS == len(PATTERNS) == (625 + 25 + 25 + 1) // 4 == 169
    assert NUM_COOCCURRENCES == 6 * 169
    assert [steps for _, steps in RESIDUALS] == [steps for _, steps in KERNELS]


def test_cooccurrences_are_those_counted_one_by_one():
    images = planes(3)
    described = cooccurrences(images)
    assert described.shape == (3, NUM_COOCCURRENCES)
    for row, image in zip(described, images.double().numpy(), strict=True):
        np.testing.assert_allclose(row, counted(image), atol=1e-6)
    torch.testing.assert_close(described.view(3, 6, 169).square().sum(dim=2), torch.ones(3, 6))


@pytest.mark.parametrize("describe", [cooccurrences, cooccurrences_of_contrast, ternary_patterns])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_a_turned_or_mirrored_image_has_the_same_statistics(quarters, mirror, describe):
    images = planes(2, 13, 11)
    turned = images.rot90(quarters, (1, 2))
    turned = turned.flip(2) if mirror else turned
    torch.testing.assert_close(describe(turned), describe(images), atol=1e-6, rtol=0)
    if describe != cooccurrences_of_contrast:  # squares of dark and of light differ
        torch.testing.assert_close(describe(-turned), describe(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [(1 / 16, 1 / 8, 1 / 4), (0.5, 0.7), (0.25, 0.75), (0.6,)])
def test_steps_are_counted_together_as_one_by_one(steps):
    """Whatever their thresholds: doubling, at odds, and one that two of them share."""
    (first, _), *_ = RESIDUALS
    images = planes(2, 20, 30)
    alone = [cooccurrences(images, ((first, (step,)),)) for step in steps]
    torch.testing.assert_close(cooccurrences(images, ((first, steps),)), torch.cat(alone, dim=1))


def test_counts_of_many_images_are_the_same_at_once():
    """As where each count would be waited for."""
    codes = torch.randint(0, 28561, (3, 500), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    counts = _count(codes, 28561)
    assert [Counter(row.tolist()) for row in codes] == [
        Counter({k: n for k, n in enumerate(row.tolist()) if n}) for row in counts
    ]
    assert torch.equal(_count_at_once(codes, 28561), counts)
    assert _count(codes[:0], 625).shape == (0, 625)


def test_shuffled_pixels_have_other_cooccurrences():
    """It is their neighbourhood that counts."""
    smooth = torch.nn.functional.avg_pool2d(planes(1, 34, 34), 3, 1)
    shuffled = smooth.flatten()[torch.randperm(smooth.numel())].view_as(smooth)
    assert (cooccurrences(smooth) - cooccurrences(shuffled)).norm() > 0.3


def test_flat_images_are_one_pattern():
    described = cooccurrences(torch.full((1, 8, 8), 3.7)).view(6, 169)
    assert (described == 1).sum(dim=1).tolist() == [1] * 6
    assert described.argmax(dim=1).tolist() == [PATTERNS.index((0, 0, 0, 0))] * 6


# --- of contrast, and ternary patterns ----------------------------------------------------------------------


def of_square(orders: list[list[tuple[int, int]]], values: np.ndarray) -> tuple[int, ...]:
    """The first of what is read in several orders of places."""
    return min(tuple(int(values[place]) for place in order) for order in orders)


def turns(corners: list[tuple[int, int]], side: int) -> list[list[tuple[int, int]]]:
    """Places of a square of so many a side in all eight orders in which it can be turned and mirrored."""
    places = np.arange(side * side).reshape(side, side)
    ways = [np.rot90(way, k) for way in (places, places.T) for k in range(4)]
    return [[divmod(int(way[corner]), side) for corner in corners] for way in ways]


def shares(counts: Counter, rows: int) -> list[float]:
    """Roots of shares, the most frequent first, filled up to so many."""
    roots = sorted((count / counts.total()) ** 0.5 for count in counts.values())[::-1]
    return roots + [0.0] * (rows - len(roots))


def test_contrast_is_in_units_of_the_deviation_around():
    (image,) = planes(1, 12, 10).double().numpy()
    padded = np.pad(image, 3, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7)).reshape(12, 10, 49)
    contrast = (image - windows.mean(axis=2)) / (windows.std(axis=2) + 1 / 16)
    described = cooccurrences_of_contrast(torch.from_numpy(image[None]).float())[0]
    assert described.shape == (NUM_COOCCURRENCES_OF_CONTRAST,) == (3 * 169 + 2 * 120,)
    differences = lambda x: [x.diff(dim=-1), x.diff(dim=-2)]  # noqa: E731
    runs = cooccurrences(torch.from_numpy(contrast[None]), ((differences, (0.25, 0.5, 1)),))
    torch.testing.assert_close(described[:507], runs[0], atol=1e-5, rtol=0)
    levels = np.clip(np.round(contrast / 0.6), -2, 2)
    orders = turns([(0, 0), (0, 1), (1, 0), (1, 1)], 2)
    for spacing, squares in zip((1, 2), described[507:].split(120), strict=True):
        counts = Counter(
            of_square(orders, levels[i : i + spacing + 1 : spacing, j : j + spacing + 1 : spacing])
            for i in range(12 - spacing)
            for j in range(10 - spacing)
        )
        np.testing.assert_allclose(squares.sort(descending=True)[0], shares(counts, 120), atol=1e-6)


def test_faint_texture_has_the_contrast_of_strong():
    strong = 8 * planes(1, 40, 40)
    faint, wide = (
        cooccurrences_of_contrast(x) - cooccurrences_of_contrast(strong) for x in (strong / 2, strong / 16)
    )
    assert faint.norm() < 0.3 * (cooccurrences(strong / 2) - cooccurrences(strong)).norm()
    assert wide.norm() > faint.norm(), "but what is fainter than the floor is flat"


def test_ternary_patterns_are_those_counted_one_by_one():
    images = planes(2, 13, 11) * 2
    described = ternary_patterns(images)
    assert described.shape == (2, NUM_TERNARY_PATTERNS) == (2, 3 * 490)
    ring = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]
    for row, image in zip(described, images.double().numpy(), strict=True):
        for radius, rings in zip((1, 2, 4), row.split(490), strict=True):
            counts = Counter()
            for i in range(radius, 13 - radius):
                for j in range(radius, 11 - radius):
                    around = image[i - radius :: radius, j - radius :: radius][:3, :3] - image[i, j]
                    signs = (around > 5 / 16).astype(int) - (around < -5 / 16)
                    both = [of_square(turns(ring, 3), signs), of_square(turns(ring, 3), -signs)]
                    counts[min(both)] += 1
            np.testing.assert_allclose(rings.sort(descending=True)[0], shares(counts, 490), atol=1e-6)


def test_flat_planes_have_one_ternary_pattern_and_one_square():
    flat = torch.full((1, 12, 12), 3.7)
    assert (ternary_patterns(flat) == 1).sum() == 3
    assert (cooccurrences_of_contrast(flat) == 1).sum() == 3 + 2


@torch.no_grad()
def test_families_are_those_that_the_config_names():
    """In its order, each what it is alone; a checkpoint that names none has the first two."""
    z = [latents(2, 12, 16), latents(2, 12, 8)]
    network = PictureStatistics(12, 2)

    def features(names: Sequence[str]) -> torch.Tensor:
        model = tiny_model(**TEXTURE, texture_families=names)
        if model.protoleak.encoder.picture is not None:
            model.protoleak.encoder.picture = network
        return model(latents=z).features

    alone = {name: features([name]) for name in TEXTURE_FAMILIES}
    for names in (TEXTURE_FAMILIES, TEXTURE_FAMILIES[::-1]):
        joined = features(names)
        assert torch.equal(joined, torch.cat([alone[name] for name in names], dim=-1))
    default = torch.cat([alone["cooccurrences"], alone["covariances"]], dim=-1)
    assert torch.equal(tiny_model(**TEXTURE)(latents=z).features, default)


# --- Cholesky factors of covariances ------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 5, 6])
def test_the_factor_is_numpys_of_neighbours_covariance(width):
    images = latents(2, 3, 6)[..., :width] * torch.tensor([1, 0.1, 3]).view(3, 1, 1)
    described = log_cholesky(images)
    assert described.shape == (2, num_log_cholesky(3)) == (2, 78)
    for row, image in zip(described, images.double().numpy(), strict=True):
        squares = [image[:, i : i + 2, j : j + 2].flatten() for i in range(5) for j in range(width - 1)]
        covariance = np.cov(np.array(squares).T, bias=True)
        expected = np.linalg.cholesky(covariance + RIDGE * np.eye(12))
        np.fill_diagonal(expected, np.log(np.diag(expected)))
        np.testing.assert_allclose(row, expected[np.tril_indices(12)], atol=1e-3)


def test_a_ratio_of_variances_is_a_difference_of_logarithms():
    images = latents(1, 2, 64)
    difference = log_cholesky(images * 3) - log_cholesky(images)
    diagonal = torch.eye(8)[tuple(torch.tril_indices(8, 8))] == 1
    expected = torch.tensor(3.0).log().expand(8)
    torch.testing.assert_close(difference[0, diagonal], expected, atol=0.01, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("side", "family", "words"),
    [
        (16, "ternary_patterns", "9 x 9 pixels or more.*got 8 x 8"),
        (8, "cooccurrences", "6 x 6 pixels or more.*got 4 x 4"),
        (18, "cooccurrences", "even.*got 9 x 9"),
    ],
)
def test_images_too_small_for_it_or_of_odd_sides_are_refused(side, family, words):
    model = tiny_model(**TEXTURE, texture_families=[family])
    with pytest.raises(ValueError, match=rf"{words}.*crop_size"):
        model(torch.rand(1, 3, side, side))
    model(torch.rand(1, 3, 20, 20))


def test_flat_latents_have_a_finite_factor():
    described = log_cholesky(torch.full((1, 2, 8, 8), 5.0))
    identity = torch.eye(8)[tuple(torch.tril_indices(8, 8))]
    torch.testing.assert_close(described[0], np.log(RIDGE) / 2 * identity, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [1, 1e3, 1e6])
def test_stripes_and_checks_of_any_size_have_a_finite_factor(size):
    """Of few dimensions, so that rounding makes what is left negative."""
    rows, columns = torch.arange(64)[:, None] % 2, torch.arange(64) % 2
    patterns = torch.stack([(rows + columns) % 2, rows.expand(64, 64), columns.expand(64, 64)]).float() - 0.5
    images = size * (torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) @ patterns.flatten(1))
    assert log_cholesky(images.view(1, 12, 64, 64)).isfinite().all()


# --- the plane ----------------------------------------------------------------------------------------------


def photos(count: int, seed: int) -> torch.Tensor:
    """Smooth grey pictures with some colour and grain: pixels (N, 3, 32, 32) in [-1, 1]"""
    rng = torch.Generator().manual_seed(seed)
    grey = torch.nn.functional.interpolate(torch.randn(count, 1, 4, 4, generator=rng), size=32)
    grain = torch.randn(count, 3, 32, 32, generator=rng) * torch.tensor([0.1, 0.05, 0.2]).view(3, 1, 1)
    return (0.3 * grey * torch.tensor([0.9, 1.0, 0.7]).view(3, 1, 1) + 0.5 * grain + 0.1).clamp(-1, 1)


@torch.no_grad()
def test_the_plane_of_a_patch_autoencoder_is_the_luminance():
    """One mixture of red, green and blue at every pixel of every image, in units of its deviation."""
    model = tiny_model(**TEXTURE).protoleak
    seen, new = photos(40, seed=0), photos(10, seed=1)
    model.fit_whitening(model.encode(part)[0] for part in seen.split(8))
    read = [model.encoder.plane(model.whiten(model.encode(pixels)[0])) for pixels in (seen, new)]
    assert read[0].shape == (40, 32, 32)
    colours = [pixels.transpose(0, 1).flatten(1).double().numpy() for pixels in (seen, new)]
    mixture = np.linalg.lstsq(colours[0].T, read[0].flatten().double().numpy(), rcond=None)[0]
    for plane, colour in zip(read, colours, strict=True):
        np.testing.assert_allclose(plane.flatten(), mixture @ colour, atol=1e-3)
    assert (mixture > 0).all()
    assert read[0].std().item() == pytest.approx(1, abs=0.02)
    variances, vectors = np.linalg.eigh(np.cov(colours[0]))
    principal = vectors[:, -1] * np.sign(vectors[:, -1].sum()) / np.sqrt(variances[-1])
    np.testing.assert_allclose(mixture, principal, rtol=0.02)


def test_opposite_planes_of_one_variance_still_have_a_plane():
    """Whose mixture sums to zero."""
    plane, covariance = PrincipalPlane(2, 1), torch.tensor([[1, -0.9], [-0.9, 1]]).double()
    plane.fit(torch.zeros(2).double(), covariance, torch.eye(2).double())
    expected = torch.full((2,), 0.5**0.5 / 1.9**0.5)
    torch.testing.assert_close(plane.readout[0].abs(), expected)
    assert plane.readout[0].prod() < 0


def test_a_plane_is_laid_out_as_patches_were():
    plane, pixels = PrincipalPlane(4, 2), torch.randn(2, 1, 6, 8)
    assert torch.equal(plane(torch.nn.functional.pixel_unshuffle(pixels, 2)), pixels[:, 0])
