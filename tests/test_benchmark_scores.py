"""The scores that benchmarks/open_set.py compares: against scikit-learn and scipy used another way."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from protoleak.evaluation.predictions import Predictions
from protoleak.scores_protoleak import OPEN_SET_SCORES as OF_THE_PACKAGE
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

from . import ROOT


def load_benchmark(name: str):
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


zoo = load_benchmark("scores")


# --- class scorers ------------------------------------------------------------------------------------------


def test_llr_is_linear_discriminant_analysis(blobs):
    """By the formula, x' S^-1 m_k - m_k' S^-1 m_k / 2 + log prior_k; and, unshrunk, by scikit-learn."""
    samples, labels, queries = blobs
    shrinkage = 0.05
    means = np.stack([samples[labels == k].mean(0) for k in range(3)])
    centred = samples - means[labels]
    covariance = (1 - shrinkage) * centred.T @ centred / len(samples)
    covariance += shrinkage * np.square(centred).mean() * np.eye(128)
    weights = np.linalg.solve(covariance, means.T)
    expected = queries @ weights - (means.T * weights).sum(0) / 2 + np.log(1 / 3)
    scores = zoo.CLASS_SCORERS["llr"]().fit(samples, labels).score_samples(queries)
    differences = scores - expected
    np.testing.assert_allclose(differences, np.broadcast_to(differences[:, :1], differences.shape), atol=1e-6)
    unshrunk = LinearDiscriminantAnalysis(solver="lsqr").fit(samples, labels).decision_function(queries)
    scores = zoo.LogLikelihoodRatio(shrinkage=0).fit(samples, labels).score_samples(queries)
    np.testing.assert_allclose(np.diff(scores, axis=1), np.diff(unshrunk, axis=1), atol=1e-6)


def test_diagonal_mahalanobis_is_the_gaussian_exponent(blobs):
    samples, labels, queries = blobs
    scores = zoo.DiagonalMahalanobis(shrinkage=0).fit(samples, labels).score_samples(queries)
    for k in range(3):
        members = samples[labels == k]
        normal = multivariate_normal(members.mean(0), np.diag(members.var(0)))
        expected = 2 * (normal.logpdf(queries) - normal.logpdf(members.mean(0)))
        np.testing.assert_allclose(scores[:, k], expected, atol=1e-6)


def test_gmm_is_a_mixture_a_class_of_standardised_features(blobs):
    samples, labels, queries = blobs
    scores = zoo.CLASS_SCORERS["gmm"]().fit(samples, labels).score_samples(queries)
    mean, std = samples.mean(0), samples.std(0)
    for k in range(3):
        mixture = GaussianMixture(2, covariance_type="diag", reg_covar=1e-2, random_state=0)
        mixture.fit((samples[labels == k] - mean) / std)
        np.testing.assert_allclose(scores[:, k], mixture.score_samples((queries - mean) / std), atol=1e-6)


def test_class_kde_is_a_kde_a_class(blobs):
    samples, labels, queries = blobs
    scorer = zoo.CLASS_SCORERS["kde"]().fit(samples, labels)
    for k, scores in enumerate(scorer.score_samples(queries).T):
        members = samples[labels == k]
        kde = KernelDensity(bandwidth=scorer.densities_[k].bandwidth_, leaf_size=len(members)).fit(members)
        np.testing.assert_allclose(scores, kde.score_samples(queries), atol=1e-6)


@pytest.mark.parametrize("name", zoo.CLASS_SCORERS)
@pytest.mark.parametrize("num_labels", [2, 3])
def test_every_scorer_finds_separated_classes(blobs, name, num_labels):
    samples, labels, _ = blobs
    samples, labels = samples[labels < num_labels], labels[labels < num_labels]
    half = len(labels) // 2
    scores = zoo.CLASS_SCORERS[name]().fit(samples[:half], labels[:half]).score_samples(samples[half:])
    assert scores.shape == (len(labels) - half, num_labels)
    assert (scores.argmax(axis=1) == labels[half:]).mean() > 0.95
    with pytest.raises(ValueError, match="at least 2 samples"):
        zoo.CLASS_SCORERS[name]().fit(samples[: num_labels + 1], labels[: num_labels + 1])


def test_the_temperature_is_the_likeliest():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(200, 3))
    labels = (true + rng.gumbel(size=true.shape)).argmax(1)  # drawn from softmax(true)
    grid = np.geomspace(1, 50, 2000)
    losses = [-torch.tensor(true * 7 / t).log_softmax(1)[np.arange(200), labels].mean() for t in grid]
    assert zoo.temperature_of(true * 7, labels) == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)


# --- open-set scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_THE_PACKAGE)
def test_the_packages_scores_are_the_same_here(blobs, name):
    """Two ways to compute them, with scikit-learn and without; but for a constant."""
    samples, labels, queries = blobs
    found, expected = (
        scores[name]().fit(samples, labels).score_samples(queries)
        for scores in (zoo.OPEN_SET_SCORES, OF_THE_PACKAGE)
    )
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-6)


@pytest.mark.parametrize("name", zoo.OPEN_SET_SCORES)
def test_every_open_set_score_ranks_strangers_last(blobs, name):
    samples, labels, _ = blobs
    score = zoo.OPEN_SET_SCORES[name]().fit(samples[:150], labels[:150])
    strangers = np.random.default_rng(1).normal(size=(50, 128)) * 0.5 - 1.5 * np.sign(samples[0])
    known, unknown = score.score_samples(samples[150:]), score.score_samples(strangers)
    assert roc_auc_score(np.repeat([1, 0], [len(known), 50]), np.concatenate([known, unknown])) > 0.95


@pytest.mark.parametrize("name", zoo.OPEN_SET_SCORES)
def test_embeddings_of_two_classes_on_a_line_are_scored(name):
    """As a network of two classes begins: one dimension tells them apart, the others are zero."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 2
    samples = np.zeros((60, 5))
    samples[:, 0] = labels * 6 - 3 + rng.normal(size=60) / 2
    scores = zoo.OPEN_SET_SCORES[name]().fit(samples, labels).score_samples(samples)
    assert np.isfinite(scores).all()


def test_whitening_makes_the_classes_covariance_the_identity(blobs):
    samples, labels, _ = blobs
    few = samples[:, :5] @ np.random.default_rng(0).normal(size=(5, 5))
    white = zoo.WithinClassWhitening(shrinkage=0.0).fit_transform(few, labels)
    centred = white - np.stack([white[labels == k].mean(0) for k in range(3)])[labels]
    np.testing.assert_allclose(centred.T @ centred / len(centred), np.eye(5), atol=1e-9)


def test_gaussians_that_share_a_covariance_are_scipys(blobs):
    samples, labels, queries = (part[:, :4] if part.ndim == 2 else part for part in blobs)
    means = np.stack([samples[labels == k].mean(0) for k in range(3)])
    centred = samples - means[labels]
    covariance = centred.T @ centred / len(samples)
    expected = logsumexp([multivariate_normal(mean, covariance).logpdf(queries) for mean in means], axis=0)
    found = zoo.ClassMixture(zoo.SharedGaussians(shrinkage=0.0)).fit(samples, labels).score_samples(queries)
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-8)
    expected -= multivariate_normal(samples.mean(0), np.cov(samples.T, bias=True)).logpdf(queries)
    found = zoo.RelativeGaussians(shrinkage=0.0).fit(samples, labels).score_samples(queries)
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-8)


def test_neighbour_distance_is_that_to_the_fifth_nearest_at_unit_length(blobs):
    samples, labels, queries = blobs
    known, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (samples, queries))
    distances = np.linalg.norm(asked[:, None] - known, axis=2)
    found = zoo.OPEN_SET_SCORES["knn"]().fit(samples, labels).score_samples(queries)
    np.testing.assert_allclose(found, -np.sort(distances, axis=1)[:, 4], atol=1e-6)


def test_scores_of_logits_are_those_of_the_head(fitted_model):
    output = fitted_model(torch.rand(6, 3, 32, 32) * 2 - 1)
    probabilities = output.logits.double().softmax(dim=1)
    predictions = Predictions(
        *(part.detach().numpy() for part in (output.embeddings, probabilities)), np.zeros(6, int),
        gates=output.gates.detach().numpy(),
    )  # fmt: skip
    scores = zoo.scores_of_logits(fitted_model, predictions)
    np.testing.assert_allclose(scores["max_softmax"], probabilities.amax(dim=1).detach())
    prototypes, h, w = (
        fitted_model.head.prototypes,
        output.embeddings[:, None, None],
        output.gates[:, None, None],
    )
    distances = (w * (h - prototypes).square()).sum(dim=-1)  # (6, K, M)
    nearest = distances.flatten(1).amin(dim=1).detach()
    np.testing.assert_allclose(scores["prototype_distance"], -nearest, atol=1e-4)
    tau = fitted_model.head.temperature
    energy = torch.logsumexp(tau * torch.logsumexp(-distances / tau, dim=2), dim=1).detach()
    np.testing.assert_allclose(scores["energy"], energy, atol=1e-4)
