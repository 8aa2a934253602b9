"""
What latents look like as textures, without what they show: statistics over the grid, partial correlations,
whitening, normalisation of contrast; and the discriminant of such features that a network begins as.

N, C, H, W in shape comments: latents or feature maps, channels, height, width; F: features, K: classes.
Rows of features (n, F) are a tensor, or stand for one that is not in memory: they have its `shape`, and a
slice of them is a tensor.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FULL_EVIDENCE = 0.1  # deviation of whitened latents from which on a crop counts fully
FLAT = 1e-4  # deviation up to which a crop shows nothing but rounding
BLOCK = 2**20  # features that are looked at at once: 8 MB in float64


def blocks(rows: Any, least: int = 0) -> list[slice]:
    """Slices of rows (n, ...), at least one, of up to `BLOCK` or `least` numbers each."""
    step = max(1, max(BLOCK, least) // math.prod(rows.shape[1:]))
    return [slice(start, min(start + step, len(rows))) for start in range(0, max(1, len(rows)), step)]


def normalise_contrast(latents: torch.Tensor) -> torch.Tensor:
    """
    Divide by the root mean square over the channels at each grid position, as divisive normalisation in
    vision does: statistics of what is left are not those of the few busy places alone. Squares have 1e-3
    added. (N, C, H, W) -> (N, C, H, W)
    """
    first, *others = latents.unbind(1)
    squares = first.square()
    for channel in others:  # in place: an array of all squares takes twice as long
        squares = squares.addcmul_(channel, channel)
    return latents * (squares / latents.shape[1]).add_(1e-3).rsqrt_()[:, None]


def evidence(latents: torch.Tensor) -> torch.Tensor:
    """
    How much a crop counts, (N,) in [0, 1]: the standard deviation of its whitened z_0 over the grid, root
    mean square over channels, in units of `FULL_EVIDENCE`, and at most 1. A flat crop counts nothing; of one
    that is not finite it is NaN. (N, C, H, W) -> (N,)
    """
    grid = latents.flatten(2)
    size = torch.linalg.vector_norm(grid - grid.mean(dim=2, keepdim=True), dim=(1, 2))  # `var` is slow
    deviation = size / math.sqrt(math.prod(latents.shape[1:]))
    return torch.where(deviation <= FLAT, 0.0, deviation / FULL_EVIDENCE).clamp_max(1)


class _GridMoments(torch.autograd.Function):
    """
    What [`grid_statistics`] is made of, with its gradient in closed form: a fifth of the passes over memory
    that autograd would need.
    """

    @staticmethod
    def moments(features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        (N, C, H, W) -> mean, std, third and fourth moment, right, below (N, C), correlation (N, C, C); and
        what they come from, the standardised features (N, C, H, W).
        """
        count = features.shape[2] * features.shape[3]
        flat = features.flatten(2)  # (N, C, HW)
        mean = flat.mean(dim=2, keepdim=True)
        unit = flat - mean
        std = torch.linalg.vector_norm(unit, dim=2, keepdim=True).square().div(count).add(1e-4).sqrt()
        unit = unit / std
        squares = unit.square()
        third = torch.linalg.vecdot(squares, unit) / count
        fourth = torch.linalg.vector_norm(squares, dim=2).square() / count
        grid = unit.view_as(features)
        right = (grid[..., :, 1:] * grid[..., :, :-1]).mean(dim=(2, 3))
        below = (grid[..., 1:, :] * grid[..., :-1, :]).mean(dim=(2, 3))
        correlation = unit @ unit.transpose(1, 2) / count
        return mean.squeeze(2), std.squeeze(2), third, fourth, right, below, correlation, grid

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *moments, grid = _GridMoments.moments(features)
        ctx.save_for_backward(grid, moments[1][..., None])
        return tuple(moments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, mean, std, third, fourth, right, below, correlation) -> torch.Tensor:
        grid, scale = ctx.saved_tensors
        unit, (height, width) = grid.flatten(2), grid.shape[2:]
        count = height * width
        of_unit = unit * (fourth * 4 / count)[..., None]  # first the gradient of the standardised features
        of_unit.add_((third * 3 / count)[..., None]).mul_(unit).mul_(unit)
        of_unit.baddbmm_(correlation + correlation.transpose(1, 2), unit, alpha=1 / count)
        of_grid = of_unit.view_as(grid)
        if width > 1:
            step = grid * (right / (height * (width - 1)))[..., None, None]
            of_grid[..., :, 1:] += step[..., :, :-1]
            of_grid[..., :, :-1] += step[..., :, 1:]
        if height > 1:
            step = grid * (below / ((height - 1) * width))[..., None, None]
            of_grid[..., 1:, :] += step[..., :-1, :]
            of_grid[..., :-1, :] += step[..., 1:, :]
        along = torch.linalg.vecdot(of_unit, unit)[..., None] / count - std[..., None] * scale / count
        of_unit = of_unit.sub_(of_unit.mean(dim=2, keepdim=True)).addcmul_(unit, along, value=-1)
        return of_unit.div_(scale).add_(mean[..., None] / count).view_as(grid)


def grid_statistics(features: torch.Tensor) -> torch.Tensor:
    """
    Describe a feature map as a stationary texture, whatever its size: mean, log standard deviation, skewness
    and log kurtosis of each channel, correlations between channels, and of each channel with its right and
    lower neighbour. Variances have 1e-4 added, so that a constant channel gives finite values and gradients.

    Args:
        features: (N, C, H, W).

    Returns:
        (N, 6 C + C (C - 1) / 2).
    """
    features = features.float()
    learning = torch.is_grad_enabled() and features.requires_grad
    described = _GridMoments.apply(features) if learning else _GridMoments.moments(features)[:-1]
    mean, std, third, fourth, right, below, correlation = described
    rows, columns = torch.triu_indices(features.shape[1], features.shape[1], offset=1, device=features.device)
    moments = [mean, std.log(), third, fourth.add(1e-4).log()]
    return torch.cat([*moments, right, below, correlation[:, rows, columns]], dim=1)


def partial_correlations(features: torch.Tensor) -> torch.Tensor:
    """
    Log precision of each channel, and the correlations of pairs of channels given all others, which tell a
    direct dependence from one that other channels pass on. The covariance has a fiftieth of its mean variance
    added on the diagonal, so that few grid positions are enough.

    Args:
        features: (N, C, H, W).

    Returns:
        (N, C + C (C - 1) / 2).
    """
    flat = features.float().flatten(2)
    channels = flat.shape[1]
    centred = flat - flat.mean(dim=2, keepdim=True)
    covariance = centred @ centred.transpose(1, 2) / flat.shape[2]
    ridge = covariance.diagonal(dim1=1, dim2=2).mean(dim=1) * 0.02 + 1e-4
    inverse = _inverse(covariance + ridge[:, None, None] * torch.eye(channels, device=flat.device))
    precision = inverse.diagonal(dim1=1, dim2=2)
    scale = precision.rsqrt()
    rows, columns = torch.triu_indices(channels, channels, offset=1, device=flat.device)
    correlations = -inverse * scale[:, :, None] * scale[:, None, :]
    return torch.cat([precision.log(), correlations[:, rows, columns]], dim=1)


def _inverse(matrices: torch.Tensor) -> torch.Tensor:
    """Of positive definite matrices, (N, C, C)."""
    if not torch.compiler.is_exporting():
        return torch.cholesky_inverse(torch.linalg.cholesky(matrices))
    # ONNX has no factorisation: minus the inverse, by sweeping each channel in turn (Goodnight 1979)
    unit = torch.eye(matrices.shape[1], device=matrices.device)
    swept = matrices - 2 * unit
    for k in range(matrices.shape[1]):
        v = swept[:, :, k] + unit[k]
        swept = swept - v[:, :, None] * (v / (swept[:, k, k, None] + 2))[:, None, :]
    return -swept


class LatentWhitening(nn.Module):
    """
    Rotates latents to the principal components of their grid positions, each of unit variance: `matrix` times
    (z - `mean`). It changes nothing until it is fitted.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels))

    def fit(self, batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """
        Args:
            batches: z_0 of training images, batch by batch, each (N, C, H, W), crops if any after N.

        Returns:
            The covariance of latents at their grid positions, (C, C), float64.
        """
        channels = len(self.mean)
        total, products, count = torch.zeros(channels).double(), torch.zeros(channels, channels).double(), 0
        for latents in batches:
            positions = latents.double().flatten(0, -4).transpose(0, 1).flatten(1)  # (C, n)
            total += positions.sum(dim=1)
            products += positions @ positions.T
            count += positions.shape[1]
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        variances, components = torch.linalg.eigh(covariance)
        largest = components.abs().argmax(dim=0)  # the sign of a component is made the same everywhere
        components = components * components.gather(0, largest[None]).sign()
        floor = 1e-8 * variances.max()  # below is rounding
        self.mean.copy_(mean)
        self.matrix.copy_((components / variances.clamp_min(floor).sqrt()).T)
        return covariance

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H, W)"""
        rotated = self.matrix @ latents.flatten(2)
        return rotated.sub_((self.matrix @ self.mean)[:, None]).view_as(latents)


def shrunk(covariance: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """A covariance (F, F), drawn to a multiple of the identity, which is never zero."""
    drawn = covariance * (1 - shrinkage)
    drawn.diagonal().add_(shrinkage * covariance.diagonal().mean().clamp_min(1e-9))
    return drawn


@dataclass
class Discriminant:
    """
    A linear discriminant, x -> (x - `centre`) @ `projection`, in units in which a class has unit covariance.

    Args:
        projection (`torch.DoubleTensor` of shape `(F, A)`): Its axes, A at most K - 1.
        centre (`torch.DoubleTensor` of shape `(F,)`): The mean of the classes' means.
        means (`torch.DoubleTensor` of shape `(K, A)`): The classes' means, projected; NaN without a sample.
    """

    projection: torch.Tensor
    centre: torch.Tensor
    means: torch.Tensor

    def project(self, features: Any) -> torch.Tensor:
        """Rows (n, F) -> (n, A)"""
        parts = [(features[rows].double() - self.centre) @ self.projection for rows in blocks(features)]
        return torch.cat(parts)

    def squared_distances(self, features: Any) -> torch.Tensor:
        """To each class's mean: rows (n, F) -> (n, K); infinite where a class has none."""
        return torch.cdist(self.project(features), self.means).square().nan_to_num(nan=torch.inf)


def fit_discriminant(
    features: Any, labels: torch.Tensor, num_labels: int, shrinkages: Sequence[float], max_axes: int
) -> list[Discriminant]:
    """
    The shrunk linear discriminants of rows of features (n, F) with labels 0..K-1 (n,), one for each of
    `shrinkages`: how far the covariance within classes is drawn to a multiple of the identity. Classes count
    alike, however many samples they have.
    """
    sums = torch.zeros(num_labels, features.shape[1], dtype=torch.float64)
    for rows in blocks(features):
        sums.index_add_(0, labels[rows], features[rows].double())
    class_means = sums / labels.bincount(minlength=num_labels)[:, None]  # NaN without a sample
    deviations = _Deviations(features, labels, class_means)
    return discriminants_of(class_means, deviations, shrinkages, max_axes)


class _Deviations:
    """Rows of features (n, F) less the mean of their class, weighed so that classes count alike."""

    def __init__(self, features: Any, labels: torch.Tensor, class_means: torch.Tensor):
        self.features, self.labels, self.means = features, labels, class_means.float()
        counts = labels.bincount()
        self.weights = (1 / counts[labels] / (counts > 0).sum()).sqrt()[:, None]
        self.shape = features.shape

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return (self.features[rows] - self.means[self.labels[rows]]).mul_(self.weights[rows])


def discriminants_of(
    class_means: torch.Tensor, deviations: Any, shrinkages: Sequence[float], max_axes: int
) -> list[Discriminant]:
    """
    The linear discriminants of classes with these means (K, F), NaN for those without a sample, and a
    covariance that is the sum of squares of `deviations`, rows (m, F), shrunk by each of `shrinkages`.
    """
    seen = (~class_means.isnan().any(dim=1)).nonzero()[:, 0]
    centre = class_means[seen].double().mean(dim=0)
    centred, discriminants = class_means[seen].double() - centre, []
    for solved in _solve_shrunk(deviations, centred, shrinkages):
        projection = _discriminant_axes(solved, centred, max_axes)
        means = torch.full((len(class_means), projection.shape[1]), torch.nan, dtype=torch.float64)
        means[seen] = centred @ projection
        discriminants.append(Discriminant(projection, centre, means))
    return discriminants


def _solve_shrunk(
    deviations: Any, means: torch.Tensor, shrinkages: Sequence[float]
) -> Iterator[torch.Tensor]:
    """
    Means (K, F) divided by the shrunk covariance of deviations, rows (m, F): (F, K) for each shrinkage. Of
    fewer deviations than features it is their products with each other that are inverted (Woodbury's
    identity). Deviations are read block by block, so that memory is that of the smaller matrix.
    """
    count, size = deviations.shape
    if count >= size:
        covariance = _covariance(deviations)
        for shrinkage in shrinkages:
            yield torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk(covariance, shrinkage)))
        return
    products = _products(deviations)
    ridge = (products.trace() / size).clamp_min(1e-9)
    along = torch.cat([deviations[rows].double() @ means.T for rows in blocks(deviations)])
    for shrinkage in shrinkages:
        factor = (1 - shrinkage) * products
        factor.diagonal().add_(shrinkage * ridge)
        inner = torch.cholesky_solve(along, torch.linalg.cholesky(factor))
        back = sum(deviations[rows].double().T @ inner[rows] for rows in blocks(deviations))
        yield (means.T - (1 - shrinkage) * back) / (shrinkage * ridge)


def _covariance(deviations: Any) -> torch.Tensor:
    """The sum of squares of rows (m, F): (F, F), float64."""
    size = deviations.shape[1]
    covariance = torch.zeros(size, size, dtype=torch.float64)
    for rows in blocks(deviations, least=size * size // 2):  # few, as each changes all of it
        block = deviations[rows]
        covariance += block.T @ block
    return covariance


def _products(deviations: Any) -> torch.Tensor:
    """Of rows (m, F) with each other: (m, m), float64."""
    products = torch.empty(len(deviations), len(deviations), dtype=torch.float64)
    parts = blocks(deviations, least=32 * BLOCK)  # few, as each is read for every other
    for i, rows in enumerate(parts):
        block = deviations[rows]
        for others in parts[: i + 1]:
            found = block @ (block if others == rows else deviations[others]).T
            products[rows, others], products[others, rows] = found, found.T
    return products


def _discriminant_axes(solved: torch.Tensor, means: torch.Tensor, max_axes: int) -> torch.Tensor:
    """
    Where centred class means (K, F) differ, in units in which the covariance is the identity, (F, A); solved
    (F, K) are the means divided by the covariance.
    """
    values, vectors = torch.linalg.eigh(means @ solved)
    used = values.argsort(descending=True)[: min(len(means) - 1, max_axes)]
    return solved @ vectors[:, used] / values[used].clamp_min(1e-12).sqrt()
