"""Statistics of latents against NumPy, the discriminant against scikit-learn."""

import numpy as np
import pytest
import torch
from protoleak import statistics_protoleak
from protoleak.statistics_protoleak import (
    LatentWhitening,
    discriminants_of,
    fit_discriminant,
    grid_statistics,
    normalise_contrast,
    partial_correlations,
)
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from .conftest import TEXTURE, tiny_model
from .test_modeling import latents


def test_grid_statistics_are_numpys():
    features = latents(2, 3, 6)
    described = grid_statistics(features)
    for row, image in zip(described, features.numpy(), strict=True):
        flat = image.reshape(3, -1)
        unit = (image - flat.mean(1)[:, None, None]) / flat.std(1)[:, None, None]
        right = (unit[:, :, 1:] * unit[:, :, :-1]).mean((1, 2))
        below = (unit[:, 1:] * unit[:, :-1]).mean((1, 2))
        moments = [flat.mean(1), np.log(flat.std(1)), (unit**3).mean((1, 2)), np.log((unit**4).mean((1, 2)))]
        expected = np.concatenate([*moments, right, below, np.corrcoef(flat)[np.triu_indices(3, 1)]])
        np.testing.assert_allclose(row, expected, atol=5e-4)  # variances have a floor of 1e-4


def test_gradient_of_grid_statistics_is_that_of_finite_differences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # gradcheck needs double precision
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(grid_statistics, features)


def test_partial_correlations_are_the_inverse_covariances():
    features = latents(2, 5, 6) * torch.tensor([1, 2, 3, 0.5, 0]).view(5, 1, 1)  # one channel is constant
    features[:, 1] += features[:, 0]
    for row, image in zip(partial_correlations(features), features.double().numpy(), strict=True):
        covariance = np.cov(image.reshape(5, -1), bias=True)
        ridge = covariance.trace() / 5 * 0.02 + 1e-4
        precision = np.linalg.inv(covariance + ridge * np.eye(5))
        scale = np.sqrt(np.diag(precision))
        expected = (-precision / np.outer(scale, scale))[np.triu_indices(5, 1)]
        np.testing.assert_allclose(row, [*np.log(np.diag(precision)), *expected], atol=1e-4)


def test_contrast_normalization_makes_flat_and_busy_places_alike():
    features = latents(2, 6, 4)
    busy = torch.ones(4, 4)
    busy[:2] = 100.0
    made = normalise_contrast(features * busy)
    torch.testing.assert_close(made, normalise_contrast(features), rtol=0, atol=1e-2)
    torch.testing.assert_close(made.square().mean(dim=1), torch.ones(2, 4, 4), rtol=0, atol=1e-2)
    model = tiny_model(contrast_normalization=True, timesteps=[0])
    seen = model(latents=features[:, :4], output_noisy_latents=True).noisy_latents[:, 0]
    abar = model.protoleak.alphas_cumprod()[0]
    noise = model.protoleak.evaluation_noise(seen.shape[1:])[0]
    expected = abar.sqrt() * normalise_contrast(features[:, :4]) + (1 - abar).sqrt() * noise
    torch.testing.assert_close(seen, expected)


def test_whitened_latents_have_unit_covariance():
    z = latents(20, 5) * torch.tensor([0.1, 1, 2, 3, 4]).view(5, 1, 1)
    z[:, 1] += z[:, 2]
    whitening = LatentWhitening(5)
    assert torch.equal(whitening(z), z), "it changes nothing until it is fitted"
    whitening.fit(z.split(64))
    positions = whitening(z).transpose(0, 1).flatten(1)
    torch.testing.assert_close(positions.mean(dim=1), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(positions, correction=0), torch.eye(5), atol=1e-3, rtol=0)


# --- the discriminant ---------------------------------------------------------------------------------------


@pytest.fixture
def samples():
    """90 features of 6 dimensions, 3 classes of 60, 20 and 10, and as many held out."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 60 + [1] * 20 + [2] * 10)
    centres, mix = torch.randn(3, 6, generator=rng) * 2, torch.randn(6, 6, generator=rng)
    draws = [centres[labels] + torch.randn(90, 6, generator=rng) @ mix for _ in range(2)]
    return draws[0], labels, draws[1], labels


@pytest.mark.parametrize("place", [0, 1])
def test_the_discriminant_is_scikit_learns_of_classes_that_count_alike(samples, place):
    features, labels, _, _ = samples
    shrinkage = (0.05, 0.4)[place]
    found = fit_discriminant(features, labels, 3, (0.05, 0.4), max_axes=16)[place]
    assert found.projection.shape == (6, 2)
    repeats = torch.tensor([1, 3, 6])[labels]  # of a class, so that all have 60 samples
    even, of_even = features.repeat_interleave(repeats, dim=0), labels.repeat_interleave(repeats)
    target = np.eye(6) * even_covariance(even, of_even).trace() / 6
    within = (1 - shrinkage) * even_covariance(even, of_even) + shrinkage * target
    ours, means = found.projection.numpy(), found.means.numpy()
    np.testing.assert_allclose(ours.T @ within @ ours, np.eye(2), atol=1e-4)  # of a class: the identity
    theirs = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Fixed(within))
    theirs.fit(even.double().numpy(), of_even.numpy())
    expected = theirs.coef_ - theirs.coef_.mean(axis=0)
    np.testing.assert_allclose(means @ ours.T, expected, atol=1e-4 * np.abs(expected).max())
    projected = (theirs.means_ - found.centre.numpy()) @ ours
    np.testing.assert_allclose(means, projected, atol=1e-4 * np.abs(means).max())


def even_covariance(features: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Within classes of one size, (F, F)."""
    return np.mean([np.cov(features[labels == k].double().numpy().T, bias=True) for k in range(3)], axis=0)


class Fixed:
    """A covariance estimator of scikit-learn that has estimated."""

    def __init__(self, covariance: np.ndarray):
        self.covariance_ = covariance

    def fit(self, features: np.ndarray) -> "Fixed":
        return self


class Drawn:
    """Rows of three classes that are never all in memory: each slice is drawn when it is read."""

    def __init__(self, count: int, size: int):
        self.shape, self.read, self.largest = (count, size), 0, 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        places = torch.arange(rows.start, rows.stop)
        self.read, self.largest = self.read + places.numel(), max(self.largest, places.numel())
        columns = torch.arange(1, self.shape[1] + 1)
        return (places[:, None] * columns * 0.37).sin() + (places % 3)[:, None] / columns


@pytest.mark.parametrize("count", [30, 200])
def test_rows_are_read_block_by_block_and_give_what_all_of_them_at_once_give(count, monkeypatch):
    drawn, labels = Drawn(count, 40), torch.arange(count) % 3
    features = drawn[slice(0, count)]
    whole = fit_discriminant(features, labels, 3, (0.05, 0.4), max_axes=16)
    drawn = Drawn(count, 40)
    monkeypatch.setattr(statistics_protoleak, "BLOCK", 4)
    found = fit_discriminant(drawn, labels, 3, (0.05, 0.4), max_axes=16)
    assert drawn.largest <= 20 < 30 <= drawn.read  # rows: half as many numbers as the covariance has
    for one, other in zip(found, whole, strict=True):
        expected = other.squared_distances(features)
        torch.testing.assert_close(one.squared_distances(drawn), expected, rtol=1e-4, atol=1e-4)


def test_it_is_the_same_whether_there_are_more_features_or_more_samples():
    """Deviations of zero change no covariance, only which way it is inverted."""
    rng = torch.Generator().manual_seed(0)
    means, deviations = torch.randn(4, 40, generator=rng), torch.randn(20, 40, generator=rng)
    means[2] = torch.nan
    longer = torch.cat([deviations, torch.zeros(30, 40)])
    features = torch.randn(10, 40, generator=rng)
    few, many = (discriminants_of(means, x, (0.05, 0.4), max_axes=16) for x in (deviations, longer))
    for one, other in zip(few, many, strict=True):
        assert one.projection.shape == (40, 2)
        torch.testing.assert_close(
            one.squared_distances(features), other.squared_distances(features), rtol=1e-4, atol=1e-4
        )


def test_squared_distances_are_mahalanobis(samples):
    """To the classes' means, where all axes are there; fewer axes see less of them."""
    features, labels, held_out, _ = samples
    found, one = (fit_discriminant(features, labels, 3, (0.1,), max_axes=axes)[0] for axes in (16, 1))
    means = torch.stack([features[labels == k].mean(dim=0) for k in range(3)]).double()
    within = sum(np.cov(features[labels == k].double().numpy().T, bias=True) / 3 for k in range(3))
    within = 0.9 * within + 0.1 * np.eye(6) * within.trace() / 6
    differences = (held_out.double()[:, None] - means).numpy()
    expected = np.einsum("nki,ij,nkj->nk", differences, np.linalg.inv(within), differences)
    distances = found.squared_distances(held_out).numpy()
    between = lambda d: d - d[:, :1]  # noqa: E731 (what lies across all axes is the same for all classes)
    np.testing.assert_allclose(between(distances), between(expected), atol=1e-3 * expected.max())
    assert one.projection.shape == (6, 1)
    assert (one.squared_distances(held_out) <= found.squared_distances(held_out) + 1e-9).all()


def test_a_class_without_samples_is_infinitely_far_and_no_network_begins_with_it(samples):
    features, labels, held_out, _ = samples
    (found,) = fit_discriminant(features, labels * 2, 5, (0.1,), max_axes=16)  # classes 0, 2 and 4
    distances = found.squared_distances(held_out)
    assert distances[:, [1, 3]].isinf().all()
    (without,) = fit_discriminant(features, labels, 3, (0.1,), max_axes=16)
    torch.testing.assert_close(distances[:, [0, 2, 4]], without.squared_distances(held_out))
    model = tiny_model(id2label={k: str(k) for k in range(5)}, label2id={str(k): k for k in range(5)})
    with pytest.raises(ValueError, match=r"none of classes \[1, 3\]"):
        model.initialise_as_discriminant([found], [1.0], model.head.prototypes)


@pytest.mark.parametrize(
    "overrides", [{}, {"pooling": "statistics"}, TEXTURE], ids=["mean", "statistics", "texture"]
)
def test_a_network_begins_as_the_discriminants_of_its_features(overrides):
    """One a family, each in dimensions of its own, over all scales together."""
    model = tiny_model(**{"timesteps": [0, 20], **overrides})
    labels = torch.arange(90) % 3
    rng = torch.Generator().manual_seed(1)
    channels, scales = model.config.latent_channels, model.config.scales
    tint = torch.randn(3, channels, 1, 1, generator=rng)
    z = [
        torch.randn(90, channels, 16 // s, 16 // s, generator=rng) * (1 + labels.view(-1, 1, 1, 1))
        + 2 * tint[labels]
        for s in scales
    ]
    torch.nn.init.zeros_(model.protoleak.attention.query)
    encoder = model.protoleak.encoder
    pooled = model(latents=z).features.mean(dim=2)
    encoder.fit_norm([pooled])
    families, factors = encoder.family_features(pooled), [0.5, 0.25][: len(encoder.families)]
    found = [fit_discriminant(family, labels, 3, (0.1,), 8)[0] for family in families]
    means = torch.cat([d.means * s for d, s in zip(found, factors, strict=True)], dim=1)
    prototypes = torch.zeros_like(model.head.prototypes)
    prototypes[..., : means.shape[1]] = means[:, None]
    model.initialise_as_discriminant(found, factors, prototypes)
    with torch.no_grad():
        output = model(latents=z)
    assert (output.logits.argmax(dim=1) == labels).all()
    torch.testing.assert_close(output.gates, torch.full_like(output.gates, 0.5))
    parts = [
        ((x.double() - d.centre) @ d.projection) * s for d, x, s in zip(found, families, factors, strict=True)
    ]
    expected = torch.cat(parts, dim=1)
    used = 2 * len(families)
    torch.testing.assert_close(output.embeddings[:, :used].double(), expected, atol=1e-3, rtol=1e-3)
    assert not output.embeddings[:, used:].any(), "further dimensions begin empty"
    if model.config.pooling != "mean":
        normalised = torch.cat(families, dim=1)
        torch.testing.assert_close(normalised.mean(dim=0), torch.zeros_like(normalised[0]), atol=1e-3, rtol=0)
