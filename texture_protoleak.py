"""
What a network pools from a re-simulated latent without a backbone: statistics of its texture, whatever its
size, of fourth order (which residuals occur side by side) and of second (how neighbours vary together).

Residuals and their co-occurrences are those of steganalysis (Fridrich and Kodovský, "Rich Models for
Steganalysis of Digital Images", 2012), with steps that are wide enough for what compression leaves behind.
Ternary patterns are those of Tan and Triggs ("Enhanced Local Texture Feature Sets", 2010), contrast is
normalised as by Mittal et al. ("No-Reference Image Quality Assessment in the Spatial Domain", 2012).
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

TRUNCATION = 2  # residuals are quantised to -2..2
LEVELS = 2 * TRUNCATION + 1
RUN = 4  # neighbours in a row that are counted together
DIRECTIONS = (-1, -2)  # along rows, along columns
CONTRAST_WINDOW = 7  # side of the square whose mean and deviation a pixel is compared with
CONTRAST_FLOOR = 1 / 16  # added to that deviation, in units of the plane's own
SQUARE_STEP = 0.6  # contrast is quantised by, where squares of it are counted
SPACINGS = (1, 2)  # between the corners of such a square
RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))  # a pixel's neighbours in turn
NOT_ABOVE = range(3, 7)  # those of them whose row is not above
RADII = (1, 2, 4)  # how far away they are
THRESHOLD = 5 / 16  # by which they differ, in units of the plane's standard deviation
LANES = 4  # counts of neighbours are kept apart, as a CPU waits where one is changed twice in a row
TOGETHER = 4  # crops that a thread takes at a time: with fewer it waits for Python, more leave its caches
NEIGHBOURHOOD = 2  # side of the squares of latents whose covariance is taken
RIDGE = 1e-3  # added to the covariance's diagonal, in units of a whitened latent's variance


def _windows(plane: torch.Tensor, count: int, along: int, spacing: int = 1) -> list[torch.Tensor]:
    """Views of a plane, each so many pixels further along a dimension than the one before, of one shape."""
    size = plane.shape[along] - (count - 1) * spacing
    return [plane.narrow(along, i * spacing, size) for i in range(count)]


def _first(plane: torch.Tensor) -> list[torch.Tensor]:
    return [after - before for before, after in (_windows(plane, 2, along) for along in DIRECTIONS)]


def _second(plane: torch.Tensor) -> list[torch.Tensor]:
    triples = (_windows(plane, 3, along) for along in DIRECTIONS)
    return [(after + before) / 2 - middle for before, middle, after in triples]


def _laplace(plane: torch.Tensor) -> list[torch.Tensor]:
    (left, middle, right), (above, _, below) = (_windows(plane, 3, along) for along in DIRECTIONS)
    across, down = (left + right)[..., 1:-1, :], (above + below)[..., 1:-1]
    return [(across + down) / 4 - middle[..., 1:-1, :]]


Residuals = tuple[tuple[Callable[[torch.Tensor], list[torch.Tensor]], tuple[float, ...]], ...]
# differences along rows and columns, and the steps they are quantised by, in the plane's standard deviations
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
        residuals: Differences, along rows and columns alike, and their steps in the plane's units.

    Returns:
        (N, NUM_PATTERNS times the number of steps), float32; NUM_COOCCURRENCES by default.
    """
    described = []
    for residual, steps in residuals:
        differences = residual(plane)
        for step in steps:
            counts = sum(_count_runs(_levels(x, step)) for x in differences)
            described.append(_roots_of_shares(counts, _patterns()))
    return torch.cat(described, dim=1)


def _levels(values: torch.Tensor, step: float) -> torch.Tensor:
    """In steps, at most TRUNCATION of them, as 0..LEVELS-1, int16."""
    levels = (values / step).round_().clamp_(-TRUNCATION, TRUNCATION)
    return levels.add_(TRUNCATION).to(torch.int16)


def _count_runs(levels: torch.Tensor) -> torch.Tensor:
    """Runs of four along rows and along columns: (N, H, W) in 0..4 -> counts (N, 625)"""
    counts = []
    for along in DIRECTIONS:
        pairs = _joined(*_windows(levels, 2, along), LEVELS)
        runs = _joined(*_windows(pairs, 2, along, spacing=2), LEVELS**2)
        counts.append(_count(runs, LEVELS**RUN))
    return sum(counts)


def _joined(first: torch.Tensor, second: torch.Tensor, base: int) -> torch.Tensor:
    """Two digits as one number."""
    return torch.add(second, first, alpha=base)


def _count(codes: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of 0..size-1 occurs in each image: (N, H, W), int16 -> (N, size), int64"""
    count, _, width = codes.shape
    apart = (codes + _tables(count, width, size, codes.device)).flatten()
    counts = torch.bincount(apart, minlength=count * LANES * size)
    return counts.view(count, LANES, size).sum(dim=1)


@cache
def _tables(count: int, width: int, size: int, device: torch.device) -> torch.Tensor:
    """Where the counts of each image and lane begin, (N, 1, W)."""
    lanes = torch.arange(width, device=device) % LANES
    begins = (torch.arange(count, device=device)[:, None, None] * LANES + lanes) * size
    return begins.to(torch.int16 if count * LANES * size < 2**15 else torch.int32)


def _roots_of_shares(counts: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """Square roots of how often each pattern occurs: counts (N, L) and the pattern of each (L,) -> (N, P)"""
    merged = counts.new_zeros(len(counts), int(patterns.max()) + 1)
    merged = merged.index_add(1, patterns.to(counts.device), counts)
    return (merged / counts.sum(dim=1, keepdim=True)).sqrt()


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
    mean, square = _around(plane), _around(plane.square())
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    contrast = (plane - mean) / (deviation + CONTRAST_FLOOR)
    levels = _levels(contrast, SQUARE_STEP)
    described = [cooccurrences(contrast, OF_CONTRAST)]
    for spacing in SPACINGS:
        rows = _joined(*_windows(levels, 2, -1, spacing), LEVELS)
        squares = _joined(*_windows(rows, 2, -2, spacing), LEVELS**2)
        described.append(_roots_of_shares(_count(squares, LEVELS**4), _square_patterns()))
    return torch.cat(described, dim=1)


def _around(plane: torch.Tensor) -> torch.Tensor:
    """The mean of the square around each pixel, (N, H, W), mirrored at the border."""
    total = F.pad(plane[:, None], [CONTRAST_WINDOW // 2] * 4, mode="reflect")[:, 0]
    for along in DIRECTIONS:
        first, second, *others = _windows(total, CONTRAST_WINDOW, along)
        total = first + second
        for other in others:
            total += other
    return total / CONTRAST_WINDOW**2


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
        rings = torch.full((len(plane), height, width), 3**8 // 2, dtype=torch.int16, device=plane.device)
        for place in NOT_ABOVE:
            down, right = (radius * step for step in RING[place])
            signs, left = _signs(plane, down, right), max(0, -right)
            here = signs[:, radius:, radius - left :]
            across = signs[:, radius - down :, radius - right - left :]  # of which it is the negative
            rings.add_(here[:, :height, :width], alpha=3 ** (7 - place))
            rings.sub_(across[:, :height, :width], alpha=3 ** (7 - (place + 4) % 8))
        described.append(_roots_of_shares(_count(rings, 3**8), _ring_patterns()))
    return torch.cat(described, dim=1)


def _signs(plane: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Whether the pixel so far away is brighter (1) or darker (-1) by the threshold, in the plane."""
    height, width, left = plane.shape[1] - down, plane.shape[2] - abs(right), max(0, -right)
    here = plane[:, :height, left : left + width]
    there = plane[:, down:, left + right : left + right + width]
    steps = (there - here).div_(2 * THRESHOLD).round_().clamp_(-1, 1)
    return steps.to(torch.int16)


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
    centred = latents - latents.mean(dim=(2, 3), keepdim=True)
    rows = _windows(centred, NEIGHBOURHOOD, -2)
    squares = [window for row in rows for window in _windows(row, NEIGHBOURHOOD, -1)]
    positions = torch.stack(squares, dim=2).flatten(1, 2).flatten(2)  # (N, 4C, L)
    mean = positions.mean(dim=2, keepdim=True)  # next to nothing, by then
    covariance = (positions @ positions.mT / positions.shape[2] - mean @ mean.mT).double()
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


@torch.no_grad()
def in_threads(function: Callable[..., torch.Tensor], *arguments: Sequence) -> list[torch.Tensor]:
    """
    `map(function, *arguments)` by as many threads as PyTorch computes with, each of which computes alone:
    counting is no operation that PyTorch shares out. Nothing is recorded for gradients.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(arguments[0]) < 2:
        return list(map(function, *arguments))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(torch.no_grad()(function), *arguments))
    finally:
        torch.set_num_threads(threads)  # where threads share one setting
