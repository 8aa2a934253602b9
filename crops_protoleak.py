"""
What the crops of an image count, which timesteps each is looked at in, and what they say together.

B, V, S, T, P in shape comments: batch, crops, scales, timesteps, pooled features.
"""

import torch

from .statistics_protoleak import evidence

MANY = 2  # crops for each timestep, from which on a crop is looked at in one timestep alone


def crop_weights(latents: torch.Tensor) -> torch.Tensor:
    """
    The [`evidence`] of whitened crops (B, V, C, H, W) as their shares of the image, (B, V); where none has
    any, the first counts alone.

    Raises:
        ValueError: latents are not finite.
    """
    weights = evidence(latents.flatten(0, 1)).view(latents.shape[:2])
    if weights.isnan().any():
        raise ValueError(
            "latents have NaN or infinite values, as where a VAE overflows in float16; have it compute in "
            "bfloat16 or float32"
        )
    weights[:, 0] = torch.where(weights.sum(dim=1) > 0, weights[:, 0], 1.0)
    return weights / weights.sum(dim=1, keepdim=True)


def looked_at(weights: torch.Tensor, timesteps: int, in_turn: bool) -> torch.Tensor:
    """
    Which timesteps each crop is looked at in: (B, V) -> (B, V, T), bool. None without weight; else all, or,
    `in_turn`, of an image with `MANY` times as many crops as there are timesteps, one after the other.
    """
    counts = weights > 0
    turn = (counts.cumsum(dim=1) - 1) % timesteps
    alone = turn[..., None] == torch.arange(timesteps, device=weights.device)
    many = counts.sum(dim=1) >= MANY * timesteps
    everywhere = ~many[:, None, None] if in_turn else torch.ones_like(many)[:, None, None]
    return counts[..., None] & (alone | everywhere)


def join_crops(
    features: torch.Tensor, weights: torch.Tensor, looked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Features of images, the mean over their crops at each timestep, and of each crop: where it was not looked
    at, it is taken to differ from that mean as it does where it was.

    Args:
        features (`torch.FloatTensor` of shape `(B, V, S, T, P)`): Of the crops where they were looked at.
        weights (`torch.FloatTensor` of shape `(B, V)`): See [`crop_weights`].
        looked (`torch.BoolTensor` of shape `(B, V, T)`): See [`looked_at`].

    Returns:
        (B, S, T, P), and (B, V, S, T, P), zero for crops without weight.
    """
    shares = weights[..., None] * looked
    mean = torch.einsum("bvt,bvstp->bstp", shares / shares.sum(dim=1, keepdim=True), features)
    if bool((looked.all(dim=2) | ~looked.any(dim=2)).all()):
        return mean, features
    seen = looked[:, :, None, :, None]
    apart = (features - mean[:, None]) * seen
    apart = apart.sum(dim=3, keepdim=True) / seen.sum(dim=3, keepdim=True).clamp_min(1)
    filled = torch.where(seen, features, mean[:, None] + apart)
    return mean, filled * seen.any(dim=3, keepdim=True)
