"""Open-set scores against SciPy and scikit-learn."""

import numpy as np
import pytest
import torch
from protoleak import GaussianKDE, statistics_protoleak
from protoleak.scores_protoleak import OPEN_SET_SCORES, GaussianDensity
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.neighbors import KernelDensity


@pytest.mark.parametrize("bandwidth", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("block_size", [7, 4096])
def test_kde_equals_brute_force_scikit_learn(blobs, bandwidth, block_size):
    samples, _, queries = blobs
    expected = KernelDensity(bandwidth=bandwidth, leaf_size=len(samples)).fit(samples).score_samples(queries)
    kde = GaussianKDE(bandwidth, block_size=block_size).fit(samples)
    np.testing.assert_allclose(kde.score_samples(queries), expected, atol=1e-6, rtol=0)
    assert kde.score(queries) == pytest.approx(expected.sum(), abs=1e-4)


def test_float32_is_off_by_no_more_than_is_said(blobs):
    samples, _, queries = blobs
    for bandwidth in (0.1, 0.5, 2.0):
        exact, single = (GaussianKDE(bandwidth, dtype=t).fit(samples) for t in ("float64", "float32"))
        bound = 1e-6 * np.square(queries - samples.mean(axis=0)).sum(axis=1) / bandwidth**2
        off = np.abs(single.score_samples(queries) - exact.score_samples(queries))
        assert np.all(off < bound)
        assert off.max() > 1e-8  # it is another precision indeed
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64'"):
        GaussianKDE(1.0, dtype="float16").fit(samples)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kde_on_a_device_equals_the_cpu(blobs):
    samples, _, queries = blobs
    on_cpu, on_gpu = (GaussianKDE(0.5, device=d).fit(samples).score_samples(queries) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-6, rtol=0)


def test_bandwidth_is_that_of_scikit_learns_grid_search(blobs):
    samples = blobs[0]
    kde = GaussianKDE(bandwidths=(0.3, 0.6, 0.9, 1.2, 2.0), n_folds=4).fit(samples)
    grid = [h * kde.samples_.square().mean().sqrt().item() for h in kde.bandwidths]
    folds = PredefinedSplit(np.arange(len(samples)) % 4)
    search = GridSearchCV(KernelDensity(leaf_size=len(samples)), {"bandwidth": grid}, cv=folds).fit(samples)
    assert kde.bandwidth_ == pytest.approx(search.best_params_["bandwidth"])


def test_kde_is_a_scikit_learn_estimator(blobs):
    kde = clone(GaussianKDE(bandwidth=0.7, block_size=64))
    assert kde.get_params()["bandwidth"] == 0.7
    assert np.isfinite(kde.fit(blobs[0]).score(blobs[2]))


def test_kde_refuses_what_it_cannot_use(blobs):
    with pytest.raises(ValueError, match="not fitted"):
        GaussianKDE(1.0).score_samples(blobs[2])
    with pytest.raises(ValueError, match="128"):
        GaussianKDE(1.0).fit(blobs[0]).score_samples(blobs[2][:, :5])
    with pytest.raises(ValueError, match="NaN"):
        GaussianKDE(1.0).fit(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="bandwidth"):
        GaussianKDE(-1.0).fit(blobs[0])
    with pytest.raises(ValueError, match="at least 2"):
        GaussianKDE().fit(blobs[0][:1])


@pytest.mark.parametrize("name", OPEN_SET_SCORES)
def test_embeddings_of_two_classes_on_a_line_are_scored(name):
    """As a network of two classes begins: one dimension tells them apart, the others are zero."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 2
    samples = np.zeros((60, 5))
    samples[:, 0] = labels * 6 - 3 + rng.normal(size=60) / 2
    scores = OPEN_SET_SCORES[name]().fit(samples, labels).score_samples(samples)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", OPEN_SET_SCORES)
def test_every_open_set_score_ranks_strangers_last(blobs, name):
    samples, labels, _ = blobs
    score = OPEN_SET_SCORES[name]().fit(samples[:150], labels[:150])
    strangers = np.random.default_rng(1).normal(size=(50, 128)) * 0.5 - 1.5 * np.sign(samples[0])
    known, unknown = score.score_samples(samples[150:]), score.score_samples(strangers)
    assert roc_auc_score(np.repeat([1, 0], [len(known), 50]), np.concatenate([known, unknown])) > 0.95


def test_gaussian_density_is_scipys(blobs):
    samples, labels, queries = blobs
    few, asked = samples[:, :4], queries[:, :4]
    means = np.stack([few[labels == k].mean(0) for k in range(3)])
    centred = few - means[labels]
    covariance = centred.T @ centred / len(few)
    densities = [multivariate_normal(mean, covariance).pdf(asked) for mean in means]
    found = GaussianDensity(shrinkage=0.0).fit(few, labels).score_samples(asked)
    expected = np.log(sum(densities))
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-8)


@pytest.mark.parametrize("name", sorted(OPEN_SET_SCORES))
def test_scores_are_the_same_however_few_rows_are_looked_at_at_once(blobs, name, monkeypatch):
    samples, labels, queries = blobs
    expected = OPEN_SET_SCORES[name]().fit(samples, labels).score_samples(queries)
    monkeypatch.setattr(statistics_protoleak, "BLOCK", 7 * samples.shape[1])
    found = OPEN_SET_SCORES[name]().fit(samples, labels).score_samples(queries)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["l2_kde", "l2_mahalanobis"])
def test_scores_of_unit_length_are_those_of_directions(blobs, name):
    samples, labels, queries = blobs
    score = OPEN_SET_SCORES[name]().fit(samples, labels)
    lengths = np.linspace(0.1, 10, len(queries))[:, None]
    found = score.score_samples(queries)
    np.testing.assert_allclose(score.score_samples(queries * lengths), found, rtol=1e-9)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (samples, queries)]
    plain = type(score)().fit(unit[0], labels)
    np.testing.assert_allclose(found, plain.score_samples(unit[1]), rtol=1e-9)


def test_a_label_a_row_is_asked_for(blobs):
    samples, labels, _ = blobs
    with pytest.raises(ValueError, match="got 299 for 300"):
        OPEN_SET_SCORES["kde"]().fit(samples, labels[1:])
