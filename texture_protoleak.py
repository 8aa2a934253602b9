"""
What a network pools from a re-simulated latent without a backbone: statistics of its texture, whatever its
size, of fourth order (which residuals occur side by side) and of second (how neighbours vary together).

Residuals and their co-occurrences are those of steganalysis (Fridrich and Kodovský, "Rich Models for
Steganalysis of Digital Images", 2012), with steps that are wide enough for what compression leaves behind.
Ternary patterns are those of Tan and Triggs ("Enhanced Local Texture Feature Sets", 2010), contrast is
normalised as by Mittal et al. ("No-Reference Image Quality Assessment in the Spatial Domain", 2012).
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

TRUNCATION = 2  # residuals are quantised to -2..2
LEVELS = 2 * TRUNCATION + 1
RUN = 4  # neighbours in a row that are counted together
CONTRAST_WINDOW = 7  # side of the square whose mean and deviation a pixel is compared with
CONTRAST_FLOOR = 1 / 16  # added to that deviation, in units of the plane's own
SQUARE_STEP = 0.6  # contrast is quantised by, where squares of it are counted
SPACINGS = (1, 2)  # between the corners of such a square
RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))  # a pixel's neighbours in turn
RADII = (1, 2, 4)  # how far away they are
THRESHOLD = 5 / 16  # by which they differ, in units of the plane's standard deviation
NEIGHBOURHOOD = 2  # side of the squares of latents whose covariance is taken
RIDGE = 1e-3  # added to the covariance's diagonal, in units of a whitened latent's variance


def _first(plane: torch.Tensor) -> torch.Tensor:
    return plane[..., 1:] - plane[..., :-1]


def _second(plane: torch.Tensor) -> torch.Tensor:
    return (plane[..., 2:] + plane[..., :-2]) / 2 - plane[..., 1:-1]


def _laplace(plane: torch.Tensor) -> torch.Tensor:
    inner = plane[..., 1:-1, 1:-1]
    across = plane[..., 1:-1, 2:] + plane[..., 1:-1, :-2]
    return (across + plane[..., 2:, 1:-1] + plane[..., :-2, 1:-1]) / 4 - inner


Residuals = tuple[tuple[Callable[[torch.Tensor], torch.Tensor], tuple[float, ...]], ...]
# differences along a row, and the steps they are quantised by, in units of the plane's standard deviation
RESIDUALS: Residuals = (
    (_first, (1 / 8, 1 / 4)),
    (_second, (1 / 16, 1 / 8, 1 / 4)),
    (_laplace, (1 / 8,)),
)
OF_CONTRAST: Residuals = ((_first, (1 / 4, 1 / 2, 1)),)  # the same, where contrast is normalised


@cache
def _patterns() -> torch.Tensor:
    """
    Which of the distinct patterns each run of four levels is, (625,): a run counts as its mirror image and as
    its negative.
    """
    runs = torch.arange(LEVELS**RUN).view([LEVELS] * RUN)
    mirrored = runs.permute(3, 2, 1, 0)
    same = torch.stack([runs, mirrored, runs.flip(0, 1, 2, 3), mirrored.flip(0, 1, 2, 3)])
    return same.amin(dim=0).flatten().unique(return_inverse=True)[1]


NUM_PATTERNS = int(_patterns().max()) + 1
NUM_COOCCURRENCES = NUM_PATTERNS * sum(len(steps) for _, steps in RESIDUALS)


def cooccurrences(plane: torch.Tensor, residuals: Residuals = RESIDUALS) -> torch.Tensor:
    """
    Square roots of how often each pattern of four neighbouring residuals occurs, along rows and columns, for
    each residual and step.

    Args:
        plane: (N, H, W) in units of its standard deviation over many images; H and W at least 6.
        residuals: Differences along a row, and their steps in the plane's units.

    Returns:
        (N, NUM_PATTERNS times the number of steps), float32; NUM_COOCCURRENCES by default.
    """
    patterns = _patterns().to(plane.device)
    described = []
    for residual, steps in residuals:
        directions = [residual(plane), residual(plane.mT)]  # of a turned plane, so that turns count alike
        for step in steps:
            counts = sum(_count_runs((x / step).round().clamp(-TRUNCATION, TRUNCATION)) for x in directions)
            shares = counts / counts.sum(dim=1, keepdim=True)
            merged = shares.new_zeros(len(shares), NUM_PATTERNS).index_add(1, patterns, shares)
            described.append(merged.sqrt())
    return torch.cat(described, dim=1)


def _count_runs(levels: torch.Tensor) -> torch.Tensor:
    """Runs of four along rows and along columns: (N, H, W) in -2..2 -> counts (N, 625)"""
    levels = (levels + TRUNCATION).to(torch.int16)
    counts = torch.zeros(len(levels), LEVELS**RUN, device=levels.device)
    for grid in (levels, levels.mT):
        pairs = grid[..., :-1] * LEVELS + grid[..., 1:]
        runs = (pairs[..., :-2] * LEVELS**2 + pairs[..., 2:]).flatten(1).long()
        counts = counts.scatter_add(1, runs, torch.ones_like(runs, dtype=counts.dtype))
    return counts


@cache
def _square_patterns() -> torch.Tensor:
    """
    Which of the distinct patterns each square of four levels is, (625,), corners row by row: a square counts
    as it is turned and mirrored.
    """
    squares = torch.arange(LEVELS**4).view([LEVELS] * 4)
    turned = [squares, squares.permute(2, 0, 3, 1), squares.permute(3, 2, 1, 0), squares.permute(1, 3, 0, 2)]
    same = [square for way in turned for square in (way, way.permute(0, 2, 1, 3))]
    return torch.stack(same).amin(dim=0).flatten().unique(return_inverse=True)[1]


NUM_SQUARES = int(_square_patterns().max()) + 1
NUM_COOCCURRENCES_OF_CONTRAST = NUM_PATTERNS * len(OF_CONTRAST[0][1]) + NUM_SQUARES * len(SPACINGS)


def cooccurrences_of_contrast(plane: torch.Tensor) -> torch.Tensor:
    """
    Where every pixel is in units of the deviation around it, so that faint texture counts like strong:
    [`cooccurrences`] of first differences, and of the values at the corners of squares.

    Args:
        plane: (N, H, W) in units of its standard deviation over many images; H and W at least 6.

    Returns:
        (N, NUM_COOCCURRENCES_OF_CONTRAST), float32.
    """
    values = plane[:, None]
    mean, square = _around(values), _around(values.square())
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    contrast = ((values - mean) / (deviation + CONTRAST_FLOOR))[:, 0]
    levels = ((contrast / SQUARE_STEP).round().clamp(-TRUNCATION, TRUNCATION) + TRUNCATION).long()
    described = [cooccurrences(contrast, OF_CONTRAST)]
    for spacing in SPACINGS:
        rows = levels[..., :-spacing] * LEVELS + levels[..., spacing:]
        squares = rows[:, :-spacing] * LEVELS**2 + rows[:, spacing:]
        described.append(_roots_of_shares(squares.flatten(1), _square_patterns()))
    return torch.cat(described, dim=1)


def _roots_of_shares(codes: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """Square roots of how often each pattern occurs: codes (N, L), long, and the pattern of each -> (N, P)"""
    counts = torch.zeros(len(codes), len(patterns), device=codes.device)
    counts = counts.scatter_add(1, codes, torch.ones_like(codes, dtype=counts.dtype))
    merged = counts.new_zeros(len(codes), int(patterns.max()) + 1)
    return (merged.index_add(1, patterns.to(codes.device), counts) / codes.shape[1]).sqrt()


def _around(values: torch.Tensor) -> torch.Tensor:
    """The mean of the square around each pixel, (N, 1, H, W), mirrored at the border."""
    padded = F.pad(values, [CONTRAST_WINDOW // 2] * 4, mode="reflect")
    return F.avg_pool2d(padded, CONTRAST_WINDOW, stride=1)


@cache
def _ring_patterns() -> torch.Tensor:
    """
    Which of the distinct patterns each ring of eight signs is, (6561,): a ring counts as it is turned by
    quarters, mirrored, and as its negative.
    """
    rings = torch.arange(3**8).view([3] * 8)
    starts, ways = range(0, 8, 2), (1, -1)
    orders = [[(start + way * i) % 8 for i in range(8)] for start in starts for way in ways]
    same = [ring for order in orders for ring in (rings.permute(order), rings.permute(order).flip(*range(8)))]
    return torch.stack(same).amin(dim=0).flatten().unique(return_inverse=True)[1]


NUM_RINGS = int(_ring_patterns().max()) + 1
NUM_TERNARY_PATTERNS = NUM_RINGS * len(RADII)


def ternary_patterns(plane: torch.Tensor) -> torch.Tensor:
    """
    Square roots of how often each pattern of a pixel's eight neighbours occurs: which of them are brighter by
    a threshold, and which darker, for each radius.

    Args:
        plane: (N, H, W) in units of its standard deviation over many images; H and W at least 9.

    Returns:
        (N, NUM_TERNARY_PATTERNS), float32.
    """
    described = []
    for radius in RADII:
        height, width = (size - 2 * radius for size in plane.shape[1:])
        corners = [(radius * (1 + i), radius * (1 + j)) for i, j in RING]
        middle = plane[:, radius : radius + height, radius : radius + width]
        differences = [plane[:, i : i + height, j : j + width] - middle for i, j in corners]
        rings = torch.zeros(middle.shape, dtype=torch.int16, device=plane.device)
        for difference in differences:
            rings = rings * 3 + 1 + (difference > THRESHOLD) - (difference < -THRESHOLD).to(torch.int16)
        described.append(_roots_of_shares(rings.flatten(1).long(), _ring_patterns()))
    return torch.cat(described, dim=1)


def log_covariance(latents: torch.Tensor) -> torch.Tensor:
    """
    The matrix logarithm of the covariance of 2x2 neighbouring latents, in which linear methods see ratios of
    variances (log-Euclidean metric, Arsigny et al. 2006). Entries off the diagonal stand for two.

    Args:
        latents: (N, C, H, W), whitened.

    Returns:
        (N, 2 C (4 C + 1)), float32.
    """
    size = latents.shape[1] * NEIGHBOURHOOD**2
    positions = F.unfold(latents, NEIGHBOURHOOD)  # (N, 4C, L)
    positions = positions - positions.mean(dim=2, keepdim=True)
    covariance = (positions @ positions.mT / positions.shape[2]).double()
    values, vectors = torch.linalg.eigh(covariance + RIDGE * torch.eye(size).to(covariance))
    logarithm = (vectors * values.clamp_min(RIDGE / 2).log()[:, None]) @ vectors.mT
    rows, columns = torch.triu_indices(size, size, device=latents.device)
    weights = torch.where(rows == columns, 1.0, math.sqrt(2))
    return logarithm[:, rows, columns].float() * weights


def num_log_covariances(channels: int) -> int:
    """Length of [`log_covariance`] of so many latent channels."""
    size = channels * NEIGHBOURHOOD**2
    return size * (size + 1) // 2


class PrincipalPlane(nn.Module):
    """
    Lays latents of p x p patches out on their grid again, p^2 channels a plane, and mixes the planes to the
    one that varies most, in units of its standard deviation: the luminance, of an autoencoder of pixels. It
    is read from whitened latents. The first plane is taken until it is fitted.
    """

    def __init__(self, channels: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("readout", torch.eye(channels)[: patch_size**2].clone())
        self.register_buffer("offset", torch.zeros(patch_size**2))

    @torch.no_grad()
    def fit(self, mean: torch.Tensor, covariance: torch.Tensor, whitening: torch.Tensor) -> None:
        """
        Args:
            mean (`torch.DoubleTensor` of shape `(C,)`), covariance (`torch.DoubleTensor` of shape `(C, C)`):
                Of latents at their grid positions.
            whitening (`torch.DoubleTensor` of shape `(C, C)`): The matrix that whitens them.
        """
        places = self.patch_size**2
        planes = len(mean) // places
        blocks = covariance.view(planes, places, planes, places)
        between = blocks.diagonal(dim1=1, dim2=3).mean(dim=-1)  # of planes, at the same place
        variances, vectors = torch.linalg.eigh(between)
        mixture = vectors[:, -1] / variances[-1].sqrt()
        mixture = mixture * mixture[mixture.abs().argmax()].sign()  # its sign is made the same everywhere
        mix = torch.kron(mixture[None], torch.eye(places).to(mixture))  # (p^2, C)
        self.readout.copy_(mix @ torch.linalg.inv(whitening))
        self.offset.copy_(mix @ mean)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, p H, p W)"""
        places = torch.einsum("kc,nchw->nkhw", self.readout, latents) + self.offset[:, None, None]
        return F.pixel_shuffle(places, self.patch_size)[:, 0]
