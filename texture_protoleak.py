"""
What a network pools from a re-simulated latent without a backbone: statistics of its texture, whatever its
size, of fourth order (which residuals occur side by side) and of second (how neighbours vary together).

Residuals and their co-occurrences are those of steganalysis (Fridrich and Kodovský, "Rich Models for
Steganalysis of Digital Images", 2012), with steps that are wide enough for what compression leaves behind.
Ternary patterns are those of Tan and Triggs ("Enhanced Local Texture Feature Sets", 2010), contrast is
normalised as by Mittal et al. ("No-Reference Image Quality Assessment in the Spatial Domain", 2012).
"""

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
LEAST_SIDE = RUN + 2  # of a plane, and of one whose ternary patterns are counted
LEAST_OF_TERNARY_PATTERNS = 2 * max(RADII) + 1
THRESHOLD = 5 / 16  # by which they differ, in units of the plane's standard deviation
TOGETHER = 4  # crops that a thread encodes at a time: with fewer it waits for Python, more leave its caches
POSITIONS = 4 * 128**2  # of a grid of latents that it describes at a time
NEIGHBOURHOOD = 2  # side of the squares of latents whose covariance is taken
RIDGE = 1e-3  # added to the covariance's diagonal, in units of a whitened latent's variance
ROUNDING = 1e-5  # more is added where the largest variance times this is more


def _windows(plane: torch.Tensor, count: int, along: int, spacing: int = 1) -> list[torch.Tensor]:
    """Views of a plane, each so many pixels further along a dimension than the one before, of one shape."""
    size = plane.shape[along] - (count - 1) * spacing
    return [plane.narrow(along, i * spacing, size) for i in range(count)]


def _first(plane: torch.Tensor) -> list[torch.Tensor]:
    return [after - before for before, after in (_windows(plane, 2, along) for along in DIRECTIONS)]


def _second(plane: torch.Tensor) -> list[torch.Tensor]:
    triples = (_windows(plane, 3, along) for along in DIRECTIONS)
    return [(after + before).mul_(0.5).sub_(middle) for before, middle, after in triples]


def _laplace(plane: torch.Tensor) -> list[torch.Tensor]:
    (left, middle, right), (above, _, below) = (_windows(plane, 3, along) for along in DIRECTIONS)
    across = left[..., 1:-1, :] + right[..., 1:-1, :]
    down = above[..., 1:-1] + below[..., 1:-1]
    return [across.add_(down).mul_(0.25).sub_(middle[..., 1:-1, :])]


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
    runs = torch.arange(LEVELS**RUN, device="cpu").view([LEVELS] * RUN)
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
        residuals: Differences, along rows and columns alike, as arrays of their own, and at most three steps
            of each in the plane's units.

    Returns:
        (N, NUM_PATTERNS times the number of steps), float32; NUM_COOCCURRENCES by default.
    """
    described = []
    for residual, steps in residuals:
        cells = [_cells(x, steps) for x in residual(plane * (2 / min(steps)))]
        counts = _count_runs(cells, 2 * TRUNCATION * len(steps) + 1)
        described += [_roots_of_shares(counts, *patterns) for patterns in _patterns_of_cells(steps)]
    return torch.cat(described, dim=1)


def _thresholds(steps: tuple[float, ...]) -> list[float]:
    """From which on a value is of the next level, in any of the steps that it is rounded to; ascending."""
    return sorted((level + 0.5) * step for step in steps for level in range(TRUNCATION))


@cache
def _ladders(steps: tuple[float, ...]) -> list[tuple[float, int]]:
    """The same, in units of the lowest, as multiples of few distances: each, and how often it is taken."""
    thresholds = _thresholds(steps)
    left, ladders = [x / thresholds[0] for x in thresholds], []
    while left:
        distance, count = left[0], 0
        while (count + 1) * distance in left:
            count += 1
            left.remove(count * distance)
        ladders.append((distance, count))
    return ladders


def _cells(values: torch.Tensor, steps: tuple[float, ...]) -> torch.Tensor:
    """
    Between which thresholds a value lies, 0 to twice their number, uint8: this tells its level in each step,
    how many steps it is, rounded and at most TRUNCATION, and all are counted in one histogram. Values are in
    units of the lowest threshold, half the smallest step, and are lost.
    """
    (unit, count), *others = _ladders(steps)
    cells = values.clamp(-count - 0.5, count + 0.5).to(torch.int8)  # towards zero
    for distance, count in others:
        values.mul_(unit / distance)
        cells += values.clamp(-count - 0.5, count + 0.5).to(torch.int8)
        unit = distance
    return cells.add_(TRUNCATION * len(steps)).view(torch.uint8)


@cache
def _patterns_of_cells(steps: tuple[float, ...]) -> list[tuple[torch.Tensor, int]]:
    """Which pattern each run of four cells is in each step, (cells to the fourth power,)."""
    several = []
    for step in steps:
        above = [sum(own <= x for own in _thresholds((step,))) for x in _thresholds(steps)]
        levels = torch.tensor([-n for n in above[::-1]] + [0] + above, device="cpu") + TRUNCATION
        runs = levels
        for _ in range(RUN - 1):
            runs = (runs[:, None] * LEVELS + levels).flatten()
        several.append((_patterns()[runs], NUM_PATTERNS))
    return several


def _count_runs(several: list[torch.Tensor], base: int) -> torch.Tensor:
    """
    Runs of four along rows and along columns: (N, H, W) each, 0 to base - 1, uint8 -> counts (N, base^4), at
    most 2^15.
    """
    count, begin = len(several[0]), 0
    sizes = [h * (w - RUN + 1) + (h - RUN + 1) * w for h, w in (digits.shape[1:] for digits in several)]
    codes = torch.empty(count, sum(sizes), dtype=torch.int16, device=several[0].device)
    for digits in several:
        for along in DIRECTIONS:
            pairs = _joined(*_windows(digits, 2, along), base).to(torch.int16)
            first, second = _windows(pairs, 2, along, spacing=2)
            end = begin + first[0].numel()
            torch.add(second, first, alpha=base**2, out=codes[:, begin:end].view_as(first))
            begin = end
    return _count(codes, base**RUN)


def _joined(first: torch.Tensor, second: torch.Tensor, base: int) -> torch.Tensor:
    """Two digits as one number."""
    return torch.add(second, first, alpha=base)


def _count(codes: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of 0..size-1 occurs in each image: (N, L), int16 -> (N, size), int64"""
    if codes.device.type != "cpu":  # which waits for each count
        return _count_at_once(codes, size)
    counts = torch.empty(len(codes), size, dtype=torch.int64, device="cpu")
    for row, image in zip(counts, codes, strict=True):
        row.copy_(torch.bincount(image, minlength=size))
    return counts


def _count_at_once(codes: torch.Tensor, size: int) -> torch.Tensor:
    """The same, by one histogram that has a part for each image."""
    begins = torch.arange(len(codes), device=codes.device)[:, None] * size
    return torch.bincount((codes + begins).flatten(), minlength=len(codes) * size).view(-1, size)


def _roots_of_shares(counts: torch.Tensor, patterns: torch.Tensor, size: int) -> torch.Tensor:
    """Roots of how often each of P patterns occurs: counts (N, L), which pattern each is (L,) -> (N, P)"""
    merged = counts.new_zeros(len(counts), size).index_add(1, patterns.to(counts.device), counts)
    return (merged / merged.sum(dim=1, keepdim=True)).sqrt()


@cache
def _square_patterns() -> torch.Tensor:
    """
    Which of the distinct patterns each square of four levels is, (625,), corners row by row: a square counts
    as it is turned and mirrored.
    """
    squares = torch.arange(LEVELS**4, device="cpu").view([LEVELS] * 4)
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
    contrast = _contrast(plane)
    levels = _cells(contrast * (2 / SQUARE_STEP), (SQUARE_STEP,))
    described = [cooccurrences(contrast, OF_CONTRAST)]
    for spacing in SPACINGS:
        rows = _joined(*_windows(levels, 2, -1, spacing), LEVELS).to(torch.int16)
        squares = _joined(*_windows(rows, 2, -2, spacing), LEVELS**2)
        counts = _count(squares.flatten(1), LEVELS**4)
        described.append(_roots_of_shares(counts, _square_patterns(), NUM_SQUARES))
    return torch.cat(described, dim=1)


def _contrast(plane: torch.Tensor) -> torch.Tensor:
    """How far each pixel is from the mean of the square around it, in units of the deviation there."""
    padded = F.pad(plane[:, None], [CONTRAST_WINDOW // 2] * 4, mode="reflect")[:, 0]
    mean, variance = _total_around(padded), _total_around(padded.square_())
    mean /= CONTRAST_WINDOW**2
    variance.div_(CONTRAST_WINDOW**2).addcmul_(mean, mean, value=-1)
    return (plane - mean).div_(variance.clamp_min_(0).sqrt_().add_(CONTRAST_FLOOR))


def _total_around(padded: torch.Tensor) -> torch.Tensor:
    """Of squares of seven pixels a side, of four and two and one: (N, H + 6, W + 6) -> (N, H, W)"""
    total = padded
    for along in DIRECTIONS:
        first, second = _windows(total, 2, along)
        pairs = first + second
        first, second = _windows(pairs, 2, along, spacing=2)
        size = total.shape[along] - CONTRAST_WINDOW + 1
        fours, last = (first + second).narrow(along, 0, size), total.narrow(along, 6, size)
        total = fours.add_(pairs.narrow(along, 4, size)).add_(last)
    return total


@cache
def _ring_patterns() -> torch.Tensor:
    """
    Which of the distinct patterns each ring of eight signs is, (6561,): a ring counts as it is turned by
    quarters, mirrored, and as its negative.
    """
    rings = torch.arange(3**8, device="cpu").view([3] * 8)
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
        plane: (N, H, W) in units of its standard deviation over many images; H and W at least
            `LEAST_OF_TERNARY_PATTERNS`.

    Returns:
        (N, NUM_TERNARY_PATTERNS), float32.
    """
    plane, described = plane / THRESHOLD, []
    for radius in RADII:
        height, width = (size - 2 * radius for size in plane.shape[1:])
        shape = 2, len(plane), height, width
        halves = torch.full(shape, 3**4 // 2, dtype=torch.int8, device=plane.device)  # four signs each
        for place in NOT_ABOVE:
            down, right = (radius * step for step in RING[place])
            signs, left = _signs(plane, down, right), max(0, -right)
            here = signs[:, radius:, radius - left :][:, :height, :width]
            across = signs[:, radius - down :, radius - right - left :][:, :height, :width]
            opposite = (place + 4) % 8  # of which it is the negative
            halves[place // 4].add_(here, alpha=3 ** (3 - place % 4))
            halves[opposite // 4].sub_(across, alpha=3 ** (3 - opposite % 4))
        rings = _joined(*halves.to(torch.int16), 3**4)
        described.append(_roots_of_shares(_count(rings.flatten(1), 3**8), _ring_patterns(), NUM_RINGS))
    return torch.cat(described, dim=1)


def _signs(plane: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Whether the pixel so far away is brighter by 1 or more (1) or darker (-1), int8, in the plane."""
    height, width, left = plane.shape[1] - down, plane.shape[2] - abs(right), max(0, -right)
    here = plane[:, :height, left : left + width]
    there = plane[:, down:, left + right : left + right + width]
    return (there - here).clamp_(-1.5, 1.5).to(torch.int8)


def log_cholesky(latents: torch.Tensor) -> torch.Tensor:
    """
    The Cholesky factor of the covariance of 2x2 neighbouring latents, with logarithms on its diagonal: what
    is left of a latent's variance where those before it are known, in which linear methods see ratios, and
    how it goes with them (log-Cholesky metric, Lin 2019).

    Args:
        latents: (N, C, H, W), whitened.

    Returns:
        (N, 2 C (4 C + 1)), float32: the lower triangle, row by row.
    """
    size = latents.shape[1] * NEIGHBOURHOOD**2
    covariance = _covariance_of_squares(latents - latents.mean(dim=(2, 3), keepdim=True)).double()
    places = torch.arange(size, device=latents.device).view(NEIGHBOURHOOD**2, -1).T.flatten()
    covariance = covariance[:, places[:, None], places]  # channel by channel
    ridge = (covariance.diagonal(dim1=1, dim2=2).amax(dim=1) * ROUNDING).clamp_min(RIDGE)
    factor = torch.linalg.cholesky(covariance + ridge[:, None, None] * torch.eye(size, device=latents.device))
    logarithms = factor.diagonal(dim1=1, dim2=2).log()
    rows, columns = torch.tril_indices(size, size, device=latents.device)
    return (factor.tril(-1) + torch.diag_embed(logarithms))[:, rows, columns].float()


def _covariance_of_squares(centred: torch.Tensor) -> torch.Tensor:
    """
    Covariance of the latents at the corners of 2x2 squares, corner by corner: (N, C, H, W) of mean zero ->
    (N, 4 C, 4 C). Corners so far apart have one product over the whole grid, less what lies at its border
    where the squares that have them don't reach: a third of the multiplications, and no array of squares.
    """
    height, width = centred.shape[2:]
    lines = centred.flatten(2)

    def lag(places: int) -> torch.Tensor:
        return lines[..., : lines.shape[2] - places] @ lines[..., places:].mT

    rows = centred[:, :, [-1, 0]].transpose(1, 2)  # (N, 2, C, W), which upper and lower corners lack
    columns = centred[..., [-1, 0]].permute(0, 3, 1, 2)  # (N, 2, C, H), left and right ones
    last, first = columns.unbind(1)  # a line's end and the next one's start are no neighbours
    corners = rows[..., [-1, 0]].mT  # (N, 2, 2, C)
    same = lag(0)[:, None, None] - (rows @ rows.mT)[:, :, None] - (columns @ columns.mT)[:, None]
    same = same + corners[..., None] * corners[..., None, :]  # (N, 2, 2, C, C)
    right = (lag(1) - last[..., :-1] @ first[..., 1:].mT)[:, None] - rows[..., :-1] @ rows[..., 1:].mT
    below = lag(width)[:, None] - columns[..., :-1] @ columns[..., 1:].mT  # (N, 2, C, C)
    falling = lag(width + 1) - last[..., :-2] @ first[..., 2:].mT
    rising = lag(width - 1) - first @ last.mT
    blocks = [
        [same[:, 0, 0], right[:, 0], below[:, 0], falling],
        [right[:, 0].mT, same[:, 0, 1], rising, below[:, 1]],
        [below[:, 0].mT, rising.mT, same[:, 1, 0], right[:, 1]],
        [falling.mT, below[:, 1].mT, right[:, 1].mT, same[:, 1, 1]],
    ]
    products = torch.cat([torch.cat(row, dim=2) for row in blocks], dim=1)
    mean = (corners - rows.sum(dim=3)[:, :, None] - columns.sum(dim=3)[:, None]).flatten(1)
    count = (height - 1) * (width - 1)
    return products / count - mean[:, :, None] * mean[:, None] / count**2


def num_log_cholesky(channels: int) -> int:
    """Length of [`log_cholesky`] of so many latent channels."""
    size = channels * NEIGHBOURHOOD**2
    return size * (size + 1) // 2


def lay_out(latents: torch.Tensor, readout: torch.Tensor, offset: torch.Tensor, side: int) -> torch.Tensor:
    """
    What is read from latents, on the grid of the pixels that they stand for: (N, C, H, W), of K planes
    (K p^2, C) and (K p^2,), and p -> (N, K, p H, p W)
    """
    count, _, height, width = latents.shape
    values = (readout @ latents.flatten(2)).add_(offset[:, None]).view(count, -1, side**2, height, width)
    planes = values.new_empty(count, values.shape[1], side * height, side * width)
    for place in range(side**2):  # in half the time of `pixel_shuffle`
        planes[..., place // side :: side, place % side :: side] = values[:, :, place]
    return planes


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
        apart = torch.eye(places, dtype=mixture.dtype, device=mixture.device)
        mix = torch.kron(mixture[None], apart)  # (p^2, C)
        self.readout.copy_(mix @ torch.linalg.inv(whitening))
        self.offset.copy_(mix @ mean)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, p H, p W)"""
        return lay_out(latents, self.readout, self.offset, self.patch_size)[:, 0]


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
