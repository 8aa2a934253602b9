"""
What simple statistics tell of images: of their pixels, and of whitened blocks of pixels, without a network.

N, H, W in shape comments: images, height, width; F: features. Pixels are in [-1, 1].
"""

import sys
from pathlib import Path

import torch
from protoleak.statistics_protoleak import grid_statistics, normalise_contrast, partial_correlations
from protoleak.texture_protoleak import NEIGHBOURHOOD, RESIDUALS, RIDGE, cooccurrences
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from baselines import radial_spectra

FIRST, SECOND, LAPLACE = (residual for residual, _ in RESIDUALS)
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])


def grid_and_partial(latents: torch.Tensor) -> torch.Tensor:
    """The plain trial of the data set's card: (N, C, H, W), whitened -> (N, F)"""
    contrast = normalise_contrast(latents)
    return torch.cat([grid_statistics(contrast), partial_correlations(contrast)], dim=1)


def log_covariance(latents: torch.Tensor) -> torch.Tensor:
    """
    The matrix logarithm of the covariance of 2x2 neighbouring latents (log-Euclidean metric, Arsigny et al.
    2006); entries off the diagonal stand for two: (N, C, H, W), whitened -> (N, 2 C (4 C + 1))
    """
    positions = F.unfold(latents - latents.mean(dim=(2, 3), keepdim=True), NEIGHBOURHOOD)
    size = positions.shape[1]
    covariance = (positions @ positions.mT / positions.shape[2]).double()
    values, vectors = torch.linalg.eigh(covariance + RIDGE * torch.eye(size).double())
    logarithm = (vectors * values.log()[:, None]) @ vectors.mT
    rows, columns = torch.triu_indices(size, size)
    return logarithm[:, rows, columns].float() * torch.where(rows == columns, 1.0, 2**0.5)


def covariance_of_contrast(latents: torch.Tensor) -> torch.Tensor:
    """The logarithm of neighbours' covariance, each place as busy: (N, C, H, W), whitened -> (N, F)"""
    return log_covariance(normalise_contrast(latents))


def opponents(pixels: torch.Tensor) -> torch.Tensor:
    """Luminance, and blue and red less luminance, in grey levels: (N, 3, H, W) -> (N, 3, H, W)"""
    levels = (pixels + 1) * 127.5
    luminance = torch.einsum("c,nchw->nhw", LUMINANCE, levels)
    return torch.stack([luminance, levels[:, 2] - luminance, levels[:, 0] - luminance], dim=1)


def spectra(pixels: torch.Tensor) -> torch.Tensor:
    """Radial, and mean colour: (N, 3, H, W) -> (N, F)"""
    return torch.from_numpy(radial_spectra(pixels))


def harmonics(pixels: torch.Tensor, period: int = 16) -> torch.Tensor:
    """Log power at multiples of 1/period, less the mean around each: (N, 3, H, W) -> (N, F)"""
    planes = opponents(pixels)
    height, width = planes.shape[-2:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    centred = planes - planes.mean(dim=(2, 3), keepdim=True)
    power = (torch.fft.fft2(centred * window).abs().square() + 1).log()
    around = F.avg_pool2d(F.pad(power, (3, 3, 3, 3), mode="circular"), 7, stride=1)
    peaks = (power - around)[..., :: height // period, :: width // period]
    return peaks[..., : period // 2 + 1, :].flatten(1)


def cyclic_statistics(pixels: torch.Tensor, period: int = 16) -> torch.Tensor:
    """How residuals vary with their place modulo `period`: (N, 3, H, W) -> (N, F)"""
    sizes = F.pad(LAPLACE(opponents(pixels))[0], (1, 1, 1, 1)).abs().clamp_max(20)
    count, channels, height, width = sizes.shape
    tiles = sizes.view(count, channels, height // period, period, width // period, period)
    spectrum = torch.fft.fft2(tiles.mean(dim=(2, 4))).abs()
    relative = (spectrum / spectrum[..., :1, :1].clamp_min(1e-3) + 1e-4).log()
    return relative[..., : period // 2 + 1, :].flatten(1)[:, 1:]


def of_luminance(pixels: torch.Tensor, first=(), second=(), laplace=()) -> torch.Tensor:
    """Co-occurrences of residuals of luminance, by steps in grey levels: (N, 3, H, W) -> (N, F)"""
    each = (FIRST, first), (SECOND, second), (LAPLACE, laplace)
    residuals = tuple((residual, steps) for residual, steps in each if steps)
    return cooccurrences(opponents(pixels)[:, 0], residuals)


def of_chroma(pixels: torch.Tensor) -> torch.Tensor:
    """Of blue and red less luminance, by steps of 3 to 6 grey levels: (N, 3, H, W) -> (N, F)"""
    residuals = (FIRST, (3, 6)), (SECOND, (4,))
    return torch.cat([cooccurrences(plane, residuals) for plane in opponents(pixels)[:, 1:].unbind(1)], dim=1)


def of_triplets(pixels: torch.Tensor, step: float) -> torch.Tensor:
    """How often first differences of red, green and blue occur together: (N, 3, H, W) -> (N, 125)"""
    counts = torch.zeros(len(pixels), 125)
    for differences in FIRST(pixels):
        levels = (differences * 127.5 / step).round().clamp(-2, 2) + 2
        places = torch.einsum("c,nchw->nhw", torch.tensor([25.0, 5.0, 1.0]), levels).long().flatten(1)
        counts = counts.scatter_add(1, places, torch.ones_like(places, dtype=counts.dtype))
    counts = counts + counts.flip(1)  # a triplet counts as its negative
    return (counts / counts.sum(dim=1, keepdim=True)).sqrt()
