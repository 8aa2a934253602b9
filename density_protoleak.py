"""
What is known, as densities of embeddings: exact Gaussian KDE, class scorers, conformal calibration, safe save
and load.

Everything is computed in float64. A fitted object's attributes that end in `_` are its state; they go to disk
as a pickle of plain containers, numbers and bytes, which needs no import and is read by an unpickler that
allows none.
"""

import inspect
import io
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from .files_protoleak import write_whole

DENSITY_FILE = "density.pkl"
FORMAT_VERSION = 5
MOST_FOLDS = 20  # in which images calibrate what is fitted on the others
BANDWIDTHS = tuple(
    float(h) for h in np.geomspace(0.05, 5.0, 25)
)  # in units of the embeddings' root mean square spread


# --- plain state --------------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """
    Reads pickles of plain containers, numbers and bytes. Whatever needs an import is refused before it runs.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and a density file needs no import at all"
        )

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to an outside object")


def _pack(value: Any) -> Any:
    """
    Tensors to {"dtype", "shape", "data"}, objects with state to {"class", "state"}; containers recursively.
    """
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().numpy()
        return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}
    if isinstance(value, _Stateful):
        return {"class": type(value).__name__, "state": {k: _pack(v) for k, v in value.state().items()}}
    if isinstance(value, dict):
        return {k: _pack(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v) for v in value]
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"a density file holds plain values and tensors, not {type(value).__name__}")


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(v) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"dtype", "shape", "data"}:
        return torch.from_numpy(
            np.frombuffer(value["data"], np.dtype(value["dtype"])).reshape(value["shape"]).copy()
        )
    if set(value) == {"class", "state"}:
        known = {cls.__name__: cls for cls in (GaussianKDE, KnownDensity, *SCORERS.values())}
        if value["class"] not in known:
            raise ValueError(f"it holds a {value['class']!r}, and only {sorted(known)} are known")
        instance = known[value["class"]]()
        for name, item in value["state"].items():
            if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
                raise ValueError(f"it would set {name!r}, and no attribute is called so")
            setattr(instance, name, _unpack(item))
        return instance
    return {k: _unpack(v) for k, v in value.items()}


class _Stateful:
    """An object whose parameters and fitted attributes, and nothing else, make its state."""

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class _Estimator:
    """
    The parameters of scikit-learn's estimators, which `clone` and searches ask for: those of `__init__`. Not
    by its base class, because importing scikit-learn takes half a second, and a verdict needs nothing of it.
    """

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> "_Estimator":
        if unknown := set(params) - set(self.get_params()):
            raise ValueError(f"{type(self).__name__} has no parameters {sorted(unknown)}")
        vars(self).update(params)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"


def _as_tensor(array: Any, device: str | torch.device = "cpu") -> torch.Tensor:
    tensor = torch.as_tensor(np.asarray(array) if not isinstance(array, torch.Tensor) else array)
    tensor = tensor.detach().to(device=device, dtype=torch.float64)
    if tensor.ndim != 2 or tensor.shape[0] == 0:
        raise ValueError(
            f"embeddings must have shape (n, embedding_size), n at least 1; got {tuple(tensor.shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError("embeddings contain NaN or infinite values")
    return tensor


# --- kernel density -----------------------------------------------------------------------------------------


class GaussianKDE(_Estimator, _Stateful):
    r"""
    Exact Gaussian kernel density with scikit-learn's estimator interface:
    log p(x) = logsumexp_i(-|x - x_i|^2 / 2 h^2) - log n - D/2 log(2 pi h^2).

    scikit-learn's `KernelDensity` gives wrong values at D = 128 unless `leaf_size >= n` (scikit-learn issue
    #25799). Here distances come block by block from matrix products, so that memory stays bounded and the
    # values stay
    exact.

    Args:
        bandwidth (`float`, *optional*): h; by default chosen in `fit` by held-out log-likelihood among
            `bandwidths`.
        bandwidths (`list[float]`): Candidates, in units of the root mean square spread per dimension of what
            is fitted.
        n_folds (`int`, defaults to 5): Folds of the choice; sample i is in fold i % n_folds.
        block_size (`int`, defaults to 2048): Rows and columns of a block of distances: 32 MB in float64.
        device (`str`, defaults to `"cpu"`): Where it is computed; a device without float64 (mps) won't do.
        dtype (`str`, defaults to `"float64"`):
            Of the distances: `"float32"` takes half the memory, and log densities are then off by about 1e-6
            of |x|^2 / h^2 (|x| from the samples' mean), because a squared distance is the small difference of
            large numbers. Sums over blocks are in float64 either way.
    """

    def __init__(
        self,
        bandwidth: float | None = None,
        bandwidths: tuple[float, ...] = BANDWIDTHS,
        n_folds: int = 5,
        block_size: int = 2048,
        device: str = "cpu",
        dtype: str = "float64",
    ):
        self.bandwidth, self.bandwidths, self.n_folds = bandwidth, bandwidths, n_folds
        self.block_size, self.device, self.dtype = block_size, device, dtype

    def fit(self, X: Any, y: Any = None) -> "GaussianKDE":  # noqa: N803 (scikit-learn's names)
        """Keep the samples X of shape (n, D) and choose the bandwidth. `y` is ignored."""
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64'; got dtype={self.dtype!r}")
        samples = _as_tensor(X, self.device)
        self.mean_ = samples.mean(dim=0)
        # centred: less cancellation in the distances
        self.samples_ = (samples - self.mean_).to(getattr(torch, self.dtype))
        if self.bandwidth is not None:
            if not self.bandwidth > 0:
                raise ValueError(f"bandwidth must be positive; got bandwidth={self.bandwidth!r}")
            self.bandwidth_ = float(self.bandwidth)
        else:
            spread = self.samples_.square().mean().sqrt().clamp_min(1e-12).item()
            candidates = [h * spread for h in self.bandwidths]
            held_out = self._held_out_log_likelihood(candidates)
            self.bandwidth_ = candidates[int(np.argmax(held_out))]
        return self

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: N803
        """Log density in nats of each row of X (n, D), as float64 of shape (n,)."""
        if not hasattr(self, "samples_"):
            raise ValueError("this GaussianKDE is not fitted; call fit first")
        queries = _as_tensor(X, self.device)
        if queries.shape[1] != self.samples_.shape[1]:
            raise ValueError(
                f"X has {queries.shape[1]} features, but the density was fitted on {self.samples_.shape[1]}"
            )
        scores = [
            self._log_kernel_sums(block, self.samples_, [self.bandwidth_])[0]
            for block in (queries - self.mean_).to(self.samples_.dtype).split(self.block_size)
        ]
        return (torch.cat(scores) + self._log_norm(self.bandwidth_, len(self.samples_))).cpu().numpy()

    def score(self, X: Any, y: Any = None) -> float:  # noqa: N803
        """Total log-likelihood of X in nats."""
        return float(self.score_samples(X).sum())

    def _log_norm(self, bandwidth: float, n: int) -> float:
        return -math.log(n) - self.samples_.shape[1] / 2 * math.log(2 * math.pi * bandwidth**2)

    def _log_kernel_sums(
        self, queries: torch.Tensor, samples: torch.Tensor, bandwidths: list[float]
    ) -> torch.Tensor:
        """
        logsumexp over samples of -d^2 / 2 h^2 for every h from one pass over the distances: (len(h),
        len(queries)).
        """
        sums = torch.full(
            (len(bandwidths), len(queries)), -torch.inf, dtype=torch.float64, device=queries.device
        )
        query_norms = queries.square().sum(dim=1, keepdim=True)
        for start in range(0, len(samples), self.block_size):
            block = samples[start : start + self.block_size]
            norms = query_norms + block.square().sum(dim=1)
            distances = torch.addmm(norms, queries, block.T, alpha=-2).clamp_(min=0)
            for row, bandwidth in enumerate(bandwidths):
                block_sum = torch.logsumexp(distances * (-0.5 / bandwidth**2), dim=1)
                sums[row] = torch.logaddexp(sums[row], block_sum)
        return sums

    def _held_out_log_likelihood(self, bandwidths: list[float]) -> np.ndarray:
        """
        Sum over folds of the log-likelihood of the fold under the density of the others, for every bandwidth.
        """
        n = len(self.samples_)
        if n < 2:
            raise ValueError("choosing a bandwidth needs at least 2 samples; pass bandwidth")
        folds = torch.arange(n, device=self.samples_.device) % min(self.n_folds, n)
        total = np.zeros(len(bandwidths))
        for fold in range(int(folds.max()) + 1):
            kept = self.samples_[folds != fold]
            norms = np.array([self._log_norm(h, len(kept)) for h in bandwidths])
            for queries in self.samples_[folds == fold].split(self.block_size):
                sums = self._log_kernel_sums(queries, kept, bandwidths).sum(dim=1).cpu().numpy()
                total += sums + len(queries) * norms
        return total


# --- class scorers ------------------------------------------------------------------------------------------


class ClassScorer(_Estimator, _Stateful):
    """
    `fit(X, y)` on embeddings (n, D) and labels 0..K-1; `score_samples(X)` gives class scores (n, K), higher
    is likelier.
    """

    def fit(self, X: Any, y: Any) -> "ClassScorer":  # noqa: N803
        samples, labels = _as_tensor(X), torch.as_tensor(np.asarray(y)).long()
        if labels.shape != samples.shape[:1]:
            raise ValueError(
                f"y must hold a label a row of X; got {tuple(labels.shape)} for {tuple(samples.shape)}"
            )
        counts = torch.bincount(labels)
        if (counts < 2).any():
            raise ValueError(f"every class needs at least 2 samples; got counts {counts.tolist()}")
        self._fit(samples, labels, len(counts))
        return self

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: N803
        return self._score(_as_tensor(X)).numpy()

    def _fit(self, samples: torch.Tensor, labels: torch.Tensor, num_labels: int) -> None:
        raise NotImplementedError

    def _score(self, samples: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _by_class(samples: torch.Tensor, labels: torch.Tensor, num_labels: int) -> Iterator[torch.Tensor]:
    return (samples[labels == k] for k in range(num_labels))


def _within_class_covariance(
    samples: torch.Tensor, labels: torch.Tensor, num_labels: int, shrinkage: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class means (K, D), and the covariance about them (D, D), shrunk to a multiple of the identity."""
    means = torch.stack([c.mean(dim=0) for c in _by_class(samples, labels, num_labels)])
    centred = samples - means[labels]
    covariance = centred.T @ centred / len(samples)
    return means, shrunk(covariance, shrinkage)


def shrunk(covariance: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """A covariance (D, D), drawn to a multiple of the identity, which is never zero."""
    target = torch.full_like(covariance.diagonal(), covariance.diagonal().mean().clamp_min(1e-9))
    return (1 - shrinkage) * covariance + shrinkage * target.diag()


class MahalanobisScorer(ClassScorer):
    """Negative squared diagonal Mahalanobis distance to each class, after a global z-score."""

    def __init__(self, variance_floor: float = 1e-3, shrinkage: float = 0.05):
        self.variance_floor, self.shrinkage = variance_floor, shrinkage

    def _fit(self, samples, labels, num_labels):
        self.mean_, self.scale_ = samples.mean(dim=0), samples.std(dim=0, correction=0).clamp_min(1e-12)
        scaled = (samples - self.mean_) / self.scale_
        self.means_ = torch.stack([c.mean(dim=0) for c in _by_class(scaled, labels, num_labels)])  # (K, D)
        variances = torch.stack([c.var(dim=0, correction=0) for c in _by_class(scaled, labels, num_labels)])
        median = variances.median(dim=1, keepdim=True).values
        self.variances_ = ((1 - self.shrinkage) * variances + self.shrinkage * median).clamp_min(
            self.variance_floor
        )

    def _score(self, samples):
        scaled = (samples - self.mean_) / self.scale_
        return -((scaled[:, None] - self.means_).square() / self.variances_).sum(dim=-1)


class GMMScorer(ClassScorer):
    """
    Log-likelihood under a diagonal Gaussian mixture for each class, fitted by scikit-learn after a global
    z-score.
    """

    def __init__(self, n_components: int = 2, variance_floor: float = 1e-2, seed: int = 0):
        self.n_components, self.variance_floor, self.seed = n_components, variance_floor, seed

    def _fit(self, samples, labels, num_labels):
        from sklearn.mixture import GaussianMixture

        self.mean_, self.scale_ = samples.mean(dim=0), samples.std(dim=0, correction=0).clamp_min(1e-12)
        mixtures = []
        for members in _by_class((samples - self.mean_) / self.scale_, labels, num_labels):
            mixture = GaussianMixture(
                min(self.n_components, len(members)), covariance_type="diag", reg_covar=self.variance_floor,
                random_state=self.seed,
            )  # fmt: skip
            mixtures.append(mixture.fit(members.numpy()))
        self.log_weights_ = [torch.from_numpy(np.log(m.weights_)) for m in mixtures]
        self.means_ = [torch.from_numpy(m.means_) for m in mixtures]
        self.variances_ = [torch.from_numpy(m.covariances_) for m in mixtures]

    def _score(self, samples):
        scaled = ((samples - self.mean_) / self.scale_)[:, None]  # (n, 1, D)
        scores = []
        for log_weights, means, variances in zip(
            self.log_weights_, self.means_, self.variances_, strict=True
        ):
            exponents = ((scaled - means).square() / variances + (2 * math.pi * variances).log()).sum(dim=-1)
            scores.append(torch.logsumexp(log_weights - exponents / 2, dim=1))
        return torch.stack(scores, dim=1)


class KDEScorer(ClassScorer):
    """Log density under a Gaussian KDE for each class, each with its own bandwidth."""

    def __init__(self, bandwidth: float | None = None):
        self.bandwidth = bandwidth

    def _fit(self, samples, labels, num_labels):
        self.densities_ = [GaussianKDE(self.bandwidth).fit(c) for c in _by_class(samples, labels, num_labels)]

    def _score(self, samples):
        return torch.stack(
            [torch.from_numpy(density.score_samples(samples)) for density in self.densities_], dim=1
        )


class LLRScorer(ClassScorer):
    """
    Log-likelihood ratios of Gaussians that share one covariance, with the full quadratic form (linear
    discriminant analysis): x' S^-1 m_k - m_k' S^-1 m_k / 2 + log prior_k. The covariance is shrunk to a
    multiple of the identity.
    """

    def __init__(self, shrinkage: float = 0.05):
        self.shrinkage = shrinkage

    def _fit(self, samples, labels, num_labels):
        means, covariance = _within_class_covariance(samples, labels, num_labels, self.shrinkage)
        self.weights_ = torch.linalg.lstsq(covariance, means.T, driver="gelsd").solution  # (D, K)
        log_prior = (torch.bincount(labels) / len(labels)).double().log()
        self.bias_ = log_prior - (means.T * self.weights_).sum(dim=0) / 2

    def _score(self, samples):
        return samples @ self.weights_ + self.bias_


SCORERS = {"mahalanobis": MahalanobisScorer, "gmm": GMMScorer, "kde": KDEScorer, "llr": LLRScorer}


# --- open-set scores ----------------------------------------------------------------------------------------


class OpenSetScore(_Estimator):
    """
    `fit(X, y)` on embeddings (n, D) of known classes and labels 0..K-1; `score_samples(X)` (n,) is higher the
    more an embedding is like theirs.

    Args:
        transform (`str`): What is done to every embedding first, known or not: `"none"`; `"whiten"`, to unit
            covariance within the classes; `"normalize"`, to unit length.
        shrinkage (`float`): How far covariances are drawn to a multiple of the identity.
        standardize (`bool`): Whether every feature is brought to zero mean and unit variance first of all.
    """

    def __init__(self, transform: str = "none", shrinkage: float = 0.1, standardize: bool = False):
        self.transform, self.shrinkage, self.standardize = transform, shrinkage, standardize

    def fit(self, X: Any, y: Any) -> "OpenSetScore":  # noqa: N803
        samples, labels = _as_tensor(X), torch.as_tensor(np.asarray(y)).long()
        num_labels = int(labels.max()) + 1
        if self.standardize:
            self.offset_, self.scale_ = samples.mean(dim=0), samples.std(dim=0).clamp_min(1e-12)
            samples = (samples - self.offset_) / self.scale_
        if self.transform == "whiten":
            self.mean_ = samples.mean(dim=0)
            _, covariance = _within_class_covariance(samples, labels, num_labels, self.shrinkage)
            eigenvalues, vectors = torch.linalg.eigh(covariance)
            self.whitening_ = vectors / eigenvalues.sqrt()  # (D, D)
        self._fit(self._transformed(samples), labels, num_labels)
        return self

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: N803
        samples = _as_tensor(X)
        if self.standardize:
            samples = (samples - self.offset_) / self.scale_
        return self._score(self._transformed(samples)).numpy()

    def chosen(self) -> dict[str, float]:
        """Parameters that `fit` chose at some cost: with them it need not do so again on the same images."""
        return {}

    def _transformed(self, samples: torch.Tensor) -> torch.Tensor:
        if self.transform == "whiten":
            return (samples - self.mean_) @ self.whitening_
        return torch.nn.functional.normalize(samples) if self.transform == "normalize" else samples

    def _fit(self, samples: torch.Tensor, labels: torch.Tensor, num_labels: int) -> None:
        raise NotImplementedError

    def _score(self, samples: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class PooledDensity(OpenSetScore):
    """Log density under one Gaussian KDE of all known embeddings, of `bandwidth` or one chosen in `fit`."""

    def __init__(
        self,
        transform: str = "none",
        shrinkage: float = 0.1,
        standardize: bool = False,
        bandwidth: float | None = None,
    ):
        super().__init__(transform, shrinkage, standardize)
        self.bandwidth = bandwidth

    def _fit(self, samples, labels, num_labels):
        self.kde_ = GaussianKDE(self.bandwidth).fit(samples)

    def chosen(self):
        return {"bandwidth": self.kde_.bandwidth_}

    def _score(self, samples):
        return torch.from_numpy(self.kde_.score_samples(samples))


class ClassDensity(OpenSetScore):
    """Log density under the mixture, even in its classes, of what a class scorer fits to each: KDE or GMM."""

    def __init__(
        self,
        transform: str = "none",
        shrinkage: float = 0.1,
        standardize: bool = False,
        scorer: str = "kde",
    ):
        super().__init__(transform, shrinkage, standardize)
        self.scorer = scorer

    def _fit(self, samples, labels, num_labels):
        self.scorer_ = SCORERS[self.scorer]().fit(samples, labels)

    def _score(self, samples):
        scores = torch.from_numpy(self.scorer_.score_samples(samples))
        return torch.logsumexp(scores, dim=1) - math.log(scores.shape[1])


class GaussianDensity(OpenSetScore):
    """
    Log density under a mixture of Gaussians, one a class, that share a covariance: nearly half the negative
    squared Mahalanobis distance to the nearest class (Lee et al. 2018). With `relative`, over one Gaussian of
    all (Ren et al. 2021).
    """

    def __init__(
        self,
        transform: str = "none",
        shrinkage: float = 0.1,
        standardize: bool = False,
        relative: bool = False,
    ):
        super().__init__(transform, shrinkage, standardize)
        self.relative = relative

    def _fit(self, samples, labels, num_labels):
        self.classes_ = self._gaussians(samples, labels, num_labels)
        self.pooled_ = self._gaussians(samples, labels * 0, 1) if self.relative else None

    def _score(self, samples):
        score = torch.logsumexp(self._log_kernels(samples, *self.classes_), dim=1)
        return score - self._log_kernels(samples, *self.pooled_)[:, 0] if self.relative else score

    def _gaussians(self, samples, labels, num_labels):
        """Cholesky factor of the shared covariance (D, D), and the means, whitened by it, (K, D)."""
        means, covariance = _within_class_covariance(samples, labels, num_labels, self.shrinkage)
        factor = torch.linalg.cholesky(covariance)
        return factor, _whitened(means, factor)

    @staticmethod
    def _log_kernels(samples, factor, means):
        """Log of K Gaussians, (n, K), up to one constant."""
        distances = torch.cdist(
            _whitened(samples, factor), means, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return -factor.diagonal().log().sum() - distances.square() / 2


def _whitened(samples: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve_triangular(factor, samples.T, upper=False).T


class NeighbourDistance(OpenSetScore):
    """Negative distance to the k-th nearest known embedding (Sun et al. 2022)."""

    def __init__(
        self,
        transform: str = "normalize",
        shrinkage: float = 0.1,
        standardize: bool = False,
        n_neighbors: int = 5,
    ):
        super().__init__(transform, shrinkage, standardize)
        self.n_neighbors = n_neighbors

    def _fit(self, samples, labels, num_labels):
        self.samples_ = samples

    def _score(self, samples):
        k = min(self.n_neighbors, len(self.samples_))
        blocks = [torch.cdist(block, self.samples_) for block in samples.split(2048)]
        return -torch.cat([block.kthvalue(k, dim=1).values for block in blocks])


OPEN_SET_SCORES: dict[str, Callable[..., OpenSetScore]] = {
    "kde": PooledDensity,
    "whitened_kde": partial(PooledDensity, "whiten", standardize=True),
    "l2_kde": partial(PooledDensity, "normalize"),
    "class_kde": ClassDensity,
    "whitened_class_kde": partial(ClassDensity, "whiten", standardize=True),
    "l2_class_kde": partial(ClassDensity, "normalize"),
    "knn": NeighbourDistance,
    "mahalanobis": partial(GaussianDensity, standardize=True),
    "relative_mahalanobis": partial(GaussianDensity, standardize=True, relative=True),
    "l2_mahalanobis": partial(GaussianDensity, "normalize"),
    "gmm": partial(ClassDensity, scorer="gmm"),
}


# --- what a checkpoint carries ------------------------------------------------------------------------------


def _embedded(source: Any, labels: Any = None) -> dict[str, torch.Tensor]:
    """Embeddings, gates, statistics and labels of an object or a dict, as tensors that agree."""
    names = ("embeddings", "gates", "statistics")
    values = [source[name] if isinstance(source, dict) else getattr(source, name) for name in names]
    parts = {name: _as_tensor(value).float() for name, value in zip(names, values, strict=True)}
    parts["statistics"] = parts["statistics"].half().float()  # as they will be on disk, which they fill
    if labels is None:
        labels = source["labels"] if isinstance(source, dict) else source.labels
    parts["labels"] = torch.as_tensor(np.asarray(labels)).long()
    shapes = [tuple(part.shape) for part in parts.values()]
    if shapes[0] != shapes[1] or len({shape[0] for shape in shapes}) > 1 or len(shapes[3]) != 1:
        raise ValueError(
            f"embeddings, gates, statistics and labels must be (n, D), (n, D), (n, S) and (n,); got {shapes}"
        )
    return parts


def _scored(scores: dict[str, OpenSetScore], images: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {features: score.score_samples(images[features]) for features, score in scores.items()}


def _conformal_p_values(calibration: torch.Tensor, scores: np.ndarray) -> np.ndarray:
    below = np.searchsorted(calibration.numpy(), scores, side="right")
    return (1 + below) / (len(calibration) + 1)


class KnownDensity(_Stateful):
    """
    What is known, with its calibration: the density of the known classes' embeddings and the fitted class
    scorers. On disk it is `density.pkl`.

    Attributes:
        labels (`list[str]`): The known classes, in the order of the scorers' columns.
        train_, held_out_ (`dict[str, torch.Tensor]`):
            Embeddings and gates (n, D), statistics (n, S) and labels (n,) of training images, and of held-out
            ones (validation).
        open_set_scores (`dict[str, str]`):
            A name of `OPEN_SET_SCORES` for `"embeddings"`, for `"statistics"`, or for both.
        scores_ (`dict[str, OpenSetScore]`): Fitted on those of training images; not on disk, see there.
        chosen_ (`dict[str, dict[str, float]]`): What fitting them chose, such as a bandwidth.
        spreads_ (`dict[str, tuple[float, float]]`):
            Median and interquartile range of each score on held-out images: the units in which two are added.
        calibration_ (`torch.Tensor` of shape `(m,)`): Sorted open-set scores of held-out images.
        own_calibration_ (`dict[int, torch.Tensor]`): The same of each class that has no held-out images.
        scorers_ (`dict[str, ClassScorer]`): By the names of `ProtoLeakConfig.scorer`.
        temperatures_ (`dict[str, float]`): What each scorer's class scores are divided by.
        class_calibration_ (`dict[str, list[torch.Tensor]]`):
            For each scorer and class, the sorted probabilities of that class for its held-out images.
        thumbnails_ (`dict[int, bytes]`):
            Of training images, by their place in `train_`: small JPEG files, for those nearest to prototypes.
        probe_ (`torch.Tensor` of shape `(embedding_size,)`):
            What the network gave for a fixed input when this was fitted; a network that gives something else
            has changed.
    """

    def __init__(self):
        self.labels: list[str] = []
        self.open_set_scores: dict[str, str] = {}
        self.chosen_: dict[str, dict[str, float]] = {}
        self.spreads_: dict[str, tuple[float, float]] = {}
        self.temperatures_: dict[str, float] = {}
        self.class_calibration_: dict[str, list[torch.Tensor]] = {}
        self.own_calibration_: dict[int, torch.Tensor] = {}
        self.thumbnails_: dict[int, bytes] = {}
        self._scores: dict[str, OpenSetScore] = {}

    def state(self) -> dict[str, Any]:
        halved = {part: dict(getattr(self, part)) for part in ("train_", "held_out_")}
        for part in halved.values():
            part["statistics"] = part["statistics"].half()
        return super().state() | halved

    def restore(self) -> None:
        """Undo what `state` did to save space."""
        for part in (self.train_, self.held_out_):
            part["statistics"] = part["statistics"].float()

    @property
    def scores_(self) -> dict[str, OpenSetScore]:
        """
        The open-set scores, fitted when they are first needed: their matrices take more room than what they
        are fitted on.
        """
        if not self._scores:
            self._scores = self._fitted(self.train_, self.chosen_)
            self.chosen_ = {features: score.chosen() for features, score in self._scores.items()}
        return self._scores

    def _fitted(
        self, known: dict[str, torch.Tensor], chosen: dict[str, dict[str, float]]
    ) -> dict[str, OpenSetScore]:
        return {
            features: OPEN_SET_SCORES[name](**chosen.get(features, {})).fit(known[features], known["labels"])
            for features, name in self.open_set_scores.items()
        }

    def fit(
        self,
        train: Any,
        held_out: Any,
        label_names: list[str],
        open_set_scores: dict[str, str] | None = None,
    ) -> "KnownDensity":
        """
        Args:
            train, held_out: Objects or dicts with `embeddings` and `gates` (n, D), `statistics` (n, S) and
                `labels` 0..K-1 (n,).
                The held-out ones calibrate. A class that has none, one that was enrolled, is calibrated by
                its own training images, each scored by what is fitted on the others (if they are many, on
                those of other folds), and for itself alone: a few images of it don't lie as close to the
                known as hundreds of another class do.
            label_names (`list[str]`): K names.
            open_set_scores (`dict[str, str]`, *optional*):
                A name of `OPEN_SET_SCORES` for `"embeddings"`, for `"statistics"`, or for both; by default
                the paper's `"kde"` of embeddings.
        """
        self.labels = list(label_names)
        self.open_set_scores = dict(open_set_scores or {"embeddings": "kde"})
        self.train_, self.held_out_ = _embedded(train), _embedded(held_out)
        embeddings, labels = self.train_["embeddings"], self.train_["labels"]
        self._scores, self.chosen_ = {}, {}
        held_out_scores = _scored(self.scores_, self.held_out_)
        self.spreads_ = {}
        for features, scores in held_out_scores.items():
            low, median, high = np.quantile(scores, [0.25, 0.5, 0.75])
            self.spreads_[features] = float(median), max(float(high - low), 1e-12)
        self.calibration_ = torch.from_numpy(np.sort(self._added(held_out_scores)))
        own: dict[int, list[float]] = {}
        left_out = torch.tensor(self._without_held_out(), dtype=torch.long)
        for fold in range(min(MOST_FOLDS, len(left_out))):
            some = left_out[fold::MOST_FOLDS]
            kept = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, some, False)
            others = self._fitted({name: part[kept] for name, part in self.train_.items()}, {})
            scores = self._added(_scored(others, {name: part[some] for name, part in self.train_.items()}))
            for label, score in zip(labels[some].tolist(), scores, strict=True):
                own.setdefault(label, []).append(float(score))
        self.own_calibration_ = {k: torch.tensor(sorted(scores)) for k, scores in own.items()}
        self.scorers_ = {name: scorer().fit(embeddings, labels) for name, scorer in SCORERS.items()}
        return self

    def _without_held_out(self) -> list[int]:
        """Training images of classes that have no held-out images."""
        labels = self.train_["labels"]
        return (~torch.isin(labels, self.held_out_["labels"])).nonzero()[:, 0].tolist()

    def calibration_set(self) -> dict[str, torch.Tensor]:
        """What class scores are calibrated on: embeddings, gates (m, D), statistics (m, S), labels (m,)."""
        own = self._without_held_out()
        return {name: torch.cat([self.held_out_[name], self.train_[name][own]]) for name in self.train_}

    def calibrate(self, scorer: str, class_scores: torch.Tensor) -> None:
        """
        Fit the temperature of a scorer by the likelihood of the right classes (Guo et al. 2017), then keep
        the probabilities that label-conditional p-values compare with.

        Args:
            scorer (`str`): Whose scores they are.
            class_scores: Of the images of [`calibration_set`], (m, K).
        """
        scores, labels = class_scores.double().cpu(), self.calibration_set()["labels"]
        own = torch.arange(len(labels))

        def loss(log_temperature: float) -> float:
            log_probabilities = (scores / math.exp(log_temperature)).log_softmax(dim=1)
            return -log_probabilities[own, labels].mean().item()

        found = minimize_scalar(loss, bounds=(math.log(1e-3), math.log(1e3)), method="bounded")
        self.temperatures_[scorer] = math.exp(found.x)
        probabilities = (scores / self.temperatures_[scorer]).softmax(dim=1)[own, labels]
        self.class_calibration_[scorer] = [
            probabilities[labels == k].sort().values for k in range(len(self.labels))
        ]

    def enroll(self, name: str, images: Any) -> "KnownDensity":
        """
        A new density, yet to be calibrated, that also knows `name`, from a few images of it, at least 2:
        `embeddings` and `gates` (n, D), `statistics` (n, S).
        """
        count = len(images["embeddings"])
        new = _embedded(images, np.full(count, len(self.labels)))
        if name in self.labels:
            raise ValueError(f"{name!r} is already known; the known classes are {self.labels}")
        if len(new["labels"]) < 2:
            raise ValueError(f"enrolling {name!r} needs at least 2 images; got {len(new['labels'])}")
        train = {part: torch.cat([self.train_[part], new[part]]) for part in new}
        names = [*self.labels, name]
        density = KnownDensity().fit(train, self.held_out_, names, self.open_set_scores)
        density.thumbnails_ = dict(self.thumbnails_)
        return density

    @property
    def embedding_size(self) -> int:
        return self.train_["embeddings"].shape[1]

    def log_density(self, images: Mapping[str, Any]) -> np.ndarray:
        """
        The open-set score, (n,), of images with `embeddings` (n, D) and `statistics` (n, S): a log density in
        nats, or what `open_set_scores` has in its place. Two of them are added, each less its median on
        held-out images, in units of its interquartile range there.
        """
        return self._added(_scored(self.scores_, images))

    def _added(self, found: dict[str, np.ndarray]) -> np.ndarray:
        if len(found) == 1:
            return next(iter(found.values()))
        return sum((found[f] - median) / spread for f, (median, spread) in self.spreads_.items())

    def calibration_of(self, label: int | None = None) -> torch.Tensor:
        """The sorted scores that an image attributed to a class is compared with."""
        return self.own_calibration_.get(label, self.calibration_)

    def p_value(self, log_density: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """
        Split-conformal p-value of "made by a known class", (n,) in (0, 1]: (1 + #{calibration <= score}) / (m
        + 1). For an image exchangeable with the calibration images, P(p <= alpha) <= alpha (Vovk et al.
        2005). Where there are `labels` (n,), the likeliest classes, images of enrolled ones are compared with
        these classes' own.
        """
        p_values = _conformal_p_values(self.calibration_, log_density)
        for label, calibration in self.own_calibration_.items() if labels is not None else ():
            p_values[labels == label] = _conformal_p_values(calibration, log_density[labels == label])
        return p_values

    def threshold(self, alpha: float, label: int | None = None) -> float:
        """The open-set score below which the p-value is at most `alpha`; -inf where none is so low."""
        calibration = self.calibration_of(label)
        rank = math.floor(alpha * (len(calibration) + 1) + 1e-9) - 1
        if rank < 0:
            return -math.inf
        return calibration[rank].item() if rank < len(calibration) else math.inf

    def class_p_values(self, scorer: str, probabilities: np.ndarray) -> np.ndarray:
        """
        Label-conditional p-value of each class, (n, K), from class probabilities (n, K): for an image of
        class k, exchangeable with the held-out ones, P(p_k <= alpha) <= alpha, so that the classes with p_k >
        alpha are a set that has the right one with probability 1 - alpha.
        """
        columns = [
            _conformal_p_values(calibration, probabilities[:, k])
            for k, calibration in enumerate(self.class_calibration_[scorer])
        ]
        return np.stack(columns, axis=1)

    def save(self, path: str | os.PathLike) -> None:
        """A crash or a full disk leaves the previous file whole, see [`write_whole`]."""
        content = pickle.dumps({"version": FORMAT_VERSION, "density": _pack(self)}, protocol=4)
        write_whole(path, lambda partial: partial.write_bytes(content))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KnownDensity":
        """
        Raises:
            ValueError: the file is damaged, of another version, or holds anything but plain values: nothing
            in it is run.
        """
        try:
            content = _PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
            if not isinstance(content, dict) or content.get("version") != FORMAT_VERSION:
                raise ValueError(f"it is not a density file of version {FORMAT_VERSION}")
            density = _unpack(content["density"])
            if not isinstance(density, cls):
                raise ValueError(f"it holds a {type(density).__name__}")
            for features, name in density.open_set_scores.items():
                OPEN_SET_SCORES[name](**density.chosen_.get(features, {}))  # there is such a score
            density.restore()
        except OSError:
            raise
        except Exception as error:  # a hostile or damaged pickle can raise anything
            raise ValueError(f"{path} was refused: {error}; fit the density again with train.py") from error
        return density
