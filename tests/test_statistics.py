"""Statistics of latents against NumPy, the discriminant against scikit-learn."""

import numpy as np
import pytest
import torch
from protoleak.statistics_protoleak import (
    SHRINKAGES,
    LatentWhitening,
    fit_discriminant,
    grid_statistics,
    normalise_contrast,
    partial_correlations,
)
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from .conftest import tiny_model
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


def test_the_discriminant_is_scikit_learns_of_classes_that_count_alike(samples):
    features, labels, held_out, targets = samples
    found = fit_discriminant(features, labels, held_out, targets, num_labels=3, max_axes=16)
    assert found.projection.shape == (6, 2)
    assert found.shrinkage in SHRINKAGES
    repeats = torch.tensor([1, 3, 6])[labels]  # of a class, so that all have 60 samples
    even, of_even = features.repeat_interleave(repeats, dim=0), labels.repeat_interleave(repeats)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=found.shrinkage)
    theirs.fit(even.double().numpy(), of_even.numpy())
    ours, means = found.projection.numpy(), found.means.numpy()
    within = ours.T @ theirs.covariance_ @ ours  # of a class: a scale, squared, times the identity
    np.testing.assert_allclose(within, within[0, 0] * np.eye(2), atol=1e-4 * within[0, 0])
    expected = (theirs.coef_ - theirs.coef_.mean(axis=0)) * within[0, 0]
    np.testing.assert_allclose(means @ ours.T, expected, atol=1e-4 * np.abs(expected).max())
    projected = (theirs.means_ - found.centre.numpy()) @ ours
    np.testing.assert_allclose(means, projected, atol=1e-4 * np.abs(means).max())


def test_the_discriminants_loss_is_that_of_held_out_features(samples):
    features, labels, held_out, targets = samples
    found = fit_discriminant(features, labels, held_out, targets, num_labels=3, max_axes=16)
    projected = (held_out.double() - found.centre) @ found.projection
    logits = -(projected[:, None] - found.means).square().sum(dim=2) / 2
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item())
    assert found.loss < np.log(3) / 2
    one = fit_discriminant(features, labels, held_out, targets, num_labels=3, max_axes=1)
    assert one.projection.shape == (6, 1)
    assert one.loss >= found.loss


def test_a_class_without_samples_is_named(samples):
    features, labels, held_out, targets = samples
    with pytest.raises(ValueError, match=r"counts \[60, 20, 10, 0\]"):
        fit_discriminant(features, labels, held_out, targets, num_labels=4, max_axes=16)


@pytest.mark.parametrize("pooling", ["mean", "statistics"])
def test_a_network_begins_as_the_discriminant_of_its_features(pooling):
    model = tiny_model(pooling=pooling, timesteps=[0])
    labels = torch.arange(90) % 3
    tint = torch.randn(3, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    z = latents(90) + 2 * tint[labels]
    with torch.no_grad():
        pooled = model.protoleak.encoder.pool(model.protoleak.simulate(z).flatten(0, 1))[0]
        start = model.initialise_as_discriminant(pooled, labels, pooled, labels)
        output = model(latents=z)
    assert set(start) == {"shrinkage", "loss"}
    assert (output.logits.argmax(dim=1) == labels).all()
    torch.testing.assert_close(output.gates, torch.full_like(output.gates, 0.5))
    normalised, _ = model.protoleak.encoder.normalise(pooled, pooled)
    found = fit_discriminant(normalised, labels, normalised, labels, 3, 16)
    expected = (normalised.double() - found.centre) @ found.projection
    torch.testing.assert_close(output.embeddings[:, :2].double(), expected, atol=1e-4, rtol=1e-3)
    assert not output.embeddings[:, 2:].any(), "further dimensions begin empty"
    if pooling == "statistics":
        torch.testing.assert_close(normalised.mean(dim=0), torch.zeros_like(normalised[0]), atol=1e-4, rtol=0)
