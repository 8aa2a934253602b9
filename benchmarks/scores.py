"""
Class scorers and open-set scores of the literature, on top of scikit-learn, to compare with the package's.

All are fitted on features of known images (n, F) and their labels 0..K-1, in float64. Higher is likelier, or
more like the known ones.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from protoleak import GaussianKDE
from protoleak.evaluation.predictions import Predictions
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.covariance import ShrunkCovariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler


def _by_class(samples: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """The samples of each class; `ValueError` for a class of fewer than 2."""
    counts = np.bincount(labels)
    if (counts < 2).any():
        raise ValueError(f"every class needs at least 2 samples; got counts {counts.tolist()}")
    return [samples[labels == k] for k in range(len(counts))]


def _within_classes(
    samples: np.ndarray, labels: np.ndarray, shrinkage: float
) -> tuple[np.ndarray, ShrunkCovariance]:
    """Class means (K, F), and the covariance about them, shrunk to a multiple of the identity."""
    means = np.stack([members.mean(axis=0) for members in _by_class(samples, labels)])
    estimator = ShrunkCovariance(assume_centered=True, shrinkage=shrinkage)
    return means, estimator.fit(samples - means[labels])


# --- class scorers: score_samples(X) is (n, K) --------------------------------------------------------------


class DiagonalMahalanobis(BaseEstimator):
    """Negative squared Mahalanobis distance to each class, which has a diagonal covariance of its own."""

    def __init__(self, variance_floor: float = 1e-3, shrinkage: float = 0.05):
        self.variance_floor, self.shrinkage = variance_floor, shrinkage

    def fit(self, X, y):  # noqa: N803 (scikit-learn's names)
        classes = _by_class(X, y)
        self.means_ = np.stack([members.mean(axis=0) for members in classes])  # (K, F)
        variances = np.stack([members.var(axis=0) for members in classes])
        median = np.median(variances, axis=1, keepdims=True)
        shrunk = (1 - self.shrinkage) * variances + self.shrinkage * median
        self.variances_ = np.maximum(shrunk, self.variance_floor)
        return self

    def score_samples(self, X):  # noqa: N803
        return -(np.square(X[:, None] - self.means_) / self.variances_).sum(axis=-1)


class DensityOfEachClass(BaseEstimator):
    """
    Log density under an estimator that is fitted on each class alone.

    Args:
        make (`Callable`): From a class's number of samples to an estimator with `score_samples`.
    """

    def __init__(self, make: Callable[[int], Any]):
        self.make = make

    def fit(self, X, y):  # noqa: N803
        self.densities_ = [self.make(len(members)).fit(members) for members in _by_class(X, y)]
        return self

    def score_samples(self, X):  # noqa: N803
        return np.stack([density.score_samples(X) for density in self.densities_], axis=1)


def kde(n_samples: int) -> GaussianKDE:
    return GaussianKDE()


def mixture(n_samples: int) -> GaussianMixture:
    """Two diagonal Gaussians, or one for one sample."""
    count = min(2, n_samples)
    return GaussianMixture(count, covariance_type="diag", reg_covar=1e-2, random_state=0)


class SharedGaussians(BaseEstimator):
    """Log density, but for a constant, under Gaussians that share a covariance, one a class."""

    def __init__(self, shrinkage: float = 0.1):
        self.shrinkage = shrinkage

    def fit(self, X, y):  # noqa: N803
        self.means_, self.covariance_ = _within_classes(X, y, self.shrinkage)
        return self

    def score_samples(self, X):  # noqa: N803
        return np.stack([-self.covariance_.mahalanobis(X - mean) / 2 for mean in self.means_], axis=1)


class LogLikelihoodRatio(LinearDiscriminantAnalysis):
    """Log-likelihood ratios of Gaussians that share a covariance: linear discriminant analysis."""

    def __init__(self, shrinkage: float = 0.05):
        super().__init__(solver="lsqr", shrinkage=shrinkage)

    def fit(self, X, y):  # noqa: N803
        _by_class(X, y)
        return super().fit(X, y)

    def score_samples(self, X):  # noqa: N803
        scores = self.decision_function(X)
        return scores if scores.ndim == 2 else np.stack([-scores / 2, scores / 2], axis=1)  # of two classes


CLASS_SCORERS: dict[str, Callable[[], Any]] = {
    "mahalanobis": lambda: make_pipeline(StandardScaler(), DiagonalMahalanobis()),
    "gmm": lambda: make_pipeline(StandardScaler(), DensityOfEachClass(mixture)),
    "kde": lambda: DensityOfEachClass(kde),
    "llr": LogLikelihoodRatio,
}


def temperature_of(scores: np.ndarray, labels: np.ndarray) -> float:
    """What class scores (n, K) are to be divided by for the likeliest labels (n,) (Guo et al. 2017)."""

    def loss(log_temperature: float) -> float:
        return -log_softmax(scores / np.exp(log_temperature), axis=1)[np.arange(len(labels)), labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=np.log([1e-3, 1e3]), method="bounded").x))


def calibrated_probabilities(scorer: Any, held_out: np.ndarray, labels: np.ndarray, test: np.ndarray):
    """Of the test features (n, F), (n, K), by a fitted class scorer at the temperature of held-out ones."""
    temperature = temperature_of(scorer.score_samples(held_out), labels)
    return softmax(scorer.score_samples(test) / temperature, axis=1)


# --- open-set scores: score_samples(X) is (n,) --------------------------------------------------------------


class WithinClassWhitening(TransformerMixin, BaseEstimator):
    """To unit covariance within the classes."""

    def __init__(self, shrinkage: float = 0.1):
        self.shrinkage = shrinkage

    def fit(self, X, y):  # noqa: N803
        values, vectors = np.linalg.eigh(_within_classes(X, y, self.shrinkage)[1].covariance_)
        self.whitening_ = vectors / np.sqrt(values)  # (F, F)
        self.mean_ = X.mean(axis=0)
        return self

    def transform(self, X):  # noqa: N803
        return (X - self.mean_) @ self.whitening_


class ClassMixture(BaseEstimator):
    """Log density under the mixture, even in its classes, of what a class scorer fits to each."""

    def __init__(self, scorer: Any):
        self.scorer = scorer

    def fit(self, X, y):  # noqa: N803
        self.scorer_ = clone(self.scorer).fit(X, y)
        return self

    def score_samples(self, X):  # noqa: N803
        scores = self.scorer_.score_samples(X)
        return logsumexp(scores, axis=1) - np.log(scores.shape[1])


class RelativeGaussians(ClassMixture):
    """[`SharedGaussians`], all together, over one Gaussian of all samples (Ren et al. 2021)."""

    def __init__(self, shrinkage: float = 0.1):
        super().__init__(SharedGaussians(shrinkage))
        self.shrinkage = shrinkage

    def fit(self, X, y):  # noqa: N803
        self.pooled_ = ShrunkCovariance(shrinkage=self.shrinkage).fit(X)
        return super().fit(X, y)

    def score_samples(self, X):  # noqa: N803
        return super().score_samples(X) + self.pooled_.mahalanobis(X) / 2


class NeighbourDistance(BaseEstimator):
    """Negative distance to the k-th nearest known sample (Sun et al. 2022)."""

    def __init__(self, n_neighbors: int = 5):
        self.n_neighbors = n_neighbors

    def fit(self, X, y=None):  # noqa: N803
        self.neighbours_ = NearestNeighbors(n_neighbors=min(self.n_neighbors, len(X))).fit(X)
        return self

    def score_samples(self, X):  # noqa: N803
        return -self.neighbours_.kneighbors(X)[0][:, -1]


class PooledKDE(GaussianKDE, BaseEstimator):
    """The package's [`GaussianKDE`] of all known samples, as the last step of a pipeline."""


OPEN_SET_SCORES: dict[str, Callable[[], Any]] = {
    "kde": PooledKDE,
    "whitened_kde": lambda: make_pipeline(StandardScaler(), WithinClassWhitening(), PooledKDE()),
    "l2_kde": lambda: make_pipeline(Normalizer(), PooledKDE()),
    "class_kde": lambda: ClassMixture(DensityOfEachClass(kde)),
    "whitened_class_kde": lambda: make_pipeline(
        StandardScaler(), WithinClassWhitening(), ClassMixture(DensityOfEachClass(kde))
    ),
    "l2_class_kde": lambda: make_pipeline(Normalizer(), ClassMixture(DensityOfEachClass(kde))),
    "knn": lambda: make_pipeline(Normalizer(), NeighbourDistance()),
    "mahalanobis": lambda: make_pipeline(StandardScaler(), ClassMixture(SharedGaussians())),
    "relative_mahalanobis": lambda: make_pipeline(StandardScaler(), RelativeGaussians()),
    "l2_mahalanobis": lambda: make_pipeline(Normalizer(), ClassMixture(SharedGaussians())),
    "gmm": lambda: make_pipeline(StandardScaler(), ClassMixture(DensityOfEachClass(mixture))),
}


@torch.no_grad()
def scores_of_logits(model, predictions: Predictions) -> dict[str, np.ndarray]:
    """
    Open-set scores that take what the prototype head gives: the highest probability (Hendrycks and Gimpel
    2017), the energy of the logits (Liu et al. 2020), and the distance to the nearest prototype.
    """
    parts = (predictions.embeddings, predictions.gates)
    embeddings, gates = (torch.from_numpy(part).to(model.device) for part in parts)
    distances = model.head.distances(embeddings, gates).flatten(1)
    return {
        "max_softmax": predictions.probabilities.max(axis=1),
        "energy": model.head(embeddings, gates).double().logsumexp(dim=1).cpu().numpy(),
        "prototype_distance": -distances.amin(dim=1).double().cpu().numpy(),
    }
