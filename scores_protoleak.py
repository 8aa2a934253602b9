"""
Open-set scores: exact Gaussian kernel density, and what is fitted on features of the known classes, with the
interface of scikit-learn's estimators. Everything is computed in float64 unless another type is asked for.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .statistics_protoleak import blocks, shrunk

# candidates, in units of the samples' root mean square spread
BANDWIDTHS = tuple(float(h) for h in np.geomspace(0.05, 5.0, 25))


class Estimator:
    """
    The parameters of scikit-learn's estimators, which `clone` and searches ask for: those of `__init__`. Not
    by its base class, because importing scikit-learn takes half a second, and a verdict needs nothing of it.
    """

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> "Estimator":
        if unknown := set(params) - set(self.get_params()):
            raise ValueError(f"{type(self).__name__} has no parameters {sorted(unknown)}")
        vars(self).update(params)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"


def as_samples(
    array: Any, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float64
) -> torch.Tensor:
    """Rows of features, (n, F), as float64 or `dtype`; `ValueError` for none, another shape, or NaN."""
    tensor = torch.as_tensor(np.asarray(array) if not isinstance(array, torch.Tensor) else array)
    tensor = tensor.detach().to(device=device, dtype=dtype)
    if tensor.ndim != 2 or tensor.shape[0] == 0:
        raise ValueError(f"features must have shape (n, F), n at least 1; got {tuple(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError("features contain NaN or infinite values")
    return tensor


class GaussianKDE(Estimator):
    r"""
    Exact Gaussian kernel density with scikit-learn's estimator interface:
    log p(x) = logsumexp_i(-|x - x_i|^2 / 2 h^2) - log n - D/2 log(2 pi h^2).

    scikit-learn's `KernelDensity` gives wrong values at D = 128 unless `leaf_size >= n` (scikit-learn issue
    25799). Here distances come block by block from matrix products, so that memory stays bounded and the
    values stay exact.

    Args:
        bandwidth (`float`, *optional*): h; by default chosen in `fit` by held-out log-likelihood among
            `bandwidths`.
        bandwidths (`list[float]`): Candidates, in units of the root mean square spread per dimension of what
            is fitted.
        n_folds (`int`, defaults to 5): Folds of the choice; sample i is in fold i % n_folds.
        block_size (`int`, defaults to 1024): Rows and columns of a block of distances: 8 MB in float64.
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
        block_size: int = 1024,
        device: str = "cpu",
        dtype: str = "float64",
    ):
        self.bandwidth, self.bandwidths, self.n_folds = bandwidth, bandwidths, n_folds
        self.block_size, self.device, self.dtype = block_size, device, dtype

    def fit(self, X: Any, y: Any = None) -> "GaussianKDE":  # noqa: N803 (scikit-learn's names)
        """Keep the samples X of shape (n, D) and choose the bandwidth. `y` is ignored."""
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64'; got dtype={self.dtype!r}")
        samples = as_samples(X, self.device)
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
        queries = as_samples(X, self.device)
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
            distances = norms.addmm_(queries, block.T, alpha=-2).clamp_(min=0)
            nearest = distances.amin(dim=1)
            distances -= nearest[:, None]
            kernels = torch.empty_like(distances)  # for all bandwidths in turn
            for row, bandwidth in enumerate(bandwidths):
                factor = -0.5 / bandwidth**2
                block_sum = torch.mul(distances, factor, out=kernels).exp_().sum(dim=1).log()
                sums[row] = torch.logaddexp(sums[row], block_sum + nearest * factor)
        return sums

    def log_likelihoods(self, X: Any, bandwidths: list[float]) -> np.ndarray:  # noqa: N803
        """Total log-likelihood of X in nats, were the bandwidth each of these: (len(bandwidths),)"""
        queries = (as_samples(X, self.device) - self.mean_).to(self.samples_.dtype)
        norms = np.array([self._log_norm(h, len(self.samples_)) for h in bandwidths])
        blocks = queries.split(self.block_size)
        sums = sum(self._log_kernel_sums(block, self.samples_, bandwidths).sum(dim=1) for block in blocks)
        return sums.cpu().numpy() + len(queries) * norms

    def _held_out_log_likelihood(self, bandwidths: list[float]) -> np.ndarray:
        """
        Sum over folds of the log-likelihood of the fold under the density of the others, for every bandwidth.
        """
        n = len(self.samples_)
        if n < 2:
            raise ValueError("choosing a bandwidth needs at least 2 samples; pass bandwidth")
        folds = torch.arange(n, device=self.samples_.device) % min(self.n_folds, n)
        settings = {"block_size": self.block_size, "device": self.device, "dtype": self.dtype}
        total = np.zeros(len(bandwidths))
        for fold in range(int(folds.max()) + 1):
            others = GaussianKDE(bandwidths[0], **settings).fit(self.samples_[folds != fold])
            total += others.log_likelihoods(self.samples_[folds == fold], bandwidths)
        return total


# --- open-set scores ----------------------------------------------------------------------------------------


class OpenSetScore(Estimator):
    """
    `fit(X, y)` on features (n, F) of known classes and labels 0..K-1; `score_samples(X)` (n,) is higher the
    more a row is like theirs.

    Args:
        unit_length (`bool`): Whether every row, known or not, is scaled to unit length first.
    """

    def __init__(self, unit_length: bool = False):
        self.unit_length = unit_length

    def fit(self, X: Any, y: Any) -> "OpenSetScore":  # noqa: N803
        samples, labels = as_samples(X, dtype=None), torch.as_tensor(np.asarray(y)).long()
        if labels.shape != samples.shape[:1]:
            raise ValueError(f"y must hold a label a row of X; got {len(labels)} for {len(samples)}")
        self._fit(samples, labels)
        return self

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: N803
        samples = as_samples(X, dtype=None)
        return torch.cat([self._score(self._scaled(samples[rows])) for rows in blocks(samples)]).numpy()

    def chosen(self) -> dict[str, float]:
        """Parameters that `fit` chose at some cost: with them it need not do so again on the same images."""
        return {}

    def choose(self, folds: Sequence[tuple[Any, Any]]) -> dict[str, float]:
        """
        Parameters that suit held-out images, by pairs: what is fitted, (n, F), what is held out, (m, F).
        """
        return {}

    def _scaled(self, array: Any) -> torch.Tensor:
        samples = as_samples(array)
        return F.normalize(samples) if self.unit_length else samples

    def _fit(self, samples: torch.Tensor, labels: torch.Tensor) -> None:
        """On samples as they were given, which [`_scaled`] makes float64 of."""
        raise NotImplementedError

    def _score(self, samples: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class PooledDensity(OpenSetScore):
    """Log density under one Gaussian KDE of all known rows, of `bandwidth` or one chosen in `fit`."""

    def __init__(self, unit_length: bool = False, bandwidth: float | None = None):
        super().__init__(unit_length)
        self.bandwidth = bandwidth

    def _fit(self, samples, labels):
        self.kde_ = GaussianKDE(self.bandwidth).fit(self._scaled(samples))

    def chosen(self):
        return {"bandwidth": self.kde_.bandwidth_}

    def choose(self, folds):
        kdes = [GaussianKDE(1.0).fit(self._scaled(fitted)) for fitted, _ in folds]
        spread = np.mean([kde.samples_.square().mean().sqrt().item() for kde in kdes])
        candidates = [h * float(spread) for h in BANDWIDTHS]
        pairs = zip(kdes, (self._scaled(held_out) for _, held_out in folds), strict=True)
        total = sum(kde.log_likelihoods(held_out, candidates) for kde, held_out in pairs)
        return {"bandwidth": candidates[int(np.argmax(total))]}

    def _score(self, samples):
        return torch.from_numpy(self.kde_.score_samples(samples))


class GaussianDensity(OpenSetScore):
    """
    Log density, up to a constant, under a mixture of Gaussians, one a class, that share a covariance: nearly
    half the negative squared Mahalanobis distance to the nearest class (Lee et al. 2018).

    Args:
        shrinkage (`float`): How far the covariance is drawn to a multiple of the identity.
    """

    def __init__(self, unit_length: bool = False, shrinkage: float = 0.1):
        super().__init__(unit_length)
        self.shrinkage = shrinkage

    def _fit(self, samples, labels):
        counts, size = labels.bincount()[:, None], samples.shape[1]
        means = torch.zeros(len(counts), size, dtype=torch.float64)
        for rows in blocks(samples):
            means.index_add_(0, labels[rows], self._scaled(samples[rows]))
        means /= counts
        scatter = torch.zeros(size, size, dtype=torch.float64)
        for rows in blocks(samples):
            centred = self._scaled(samples[rows]) - means[labels[rows]]
            scatter += centred.T @ centred
        self.factor_ = torch.linalg.cholesky(shrunk(scatter / len(samples), self.shrinkage))
        self.means_ = self._whitened(means)  # (K, F)

    def _score(self, samples):
        distances = torch.cdist(
            self._whitened(samples), self.means_, compute_mode="donot_use_mm_for_euclid_dist"
        )
        log_kernels = -self.factor_.diagonal().log().sum() - distances.square() / 2
        return torch.logsumexp(log_kernels, dim=1)

    def _whitened(self, samples: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.factor_, samples.T, upper=False).T


OPEN_SET_SCORES: dict[str, Callable[..., OpenSetScore]] = {
    "kde": PooledDensity,
    "l2_kde": partial(PooledDensity, True),
    "l2_mahalanobis": partial(GaussianDensity, True),
}


__all__ = ["OPEN_SET_SCORES", "GaussianKDE", "OpenSetScore"]
