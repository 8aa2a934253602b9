"""
The leak encoder: a re-simulated latent becomes a vector of pooled features, and these, scale by scale, become
embeddings of the same space.

B, S, T, D in shape comments: batch, scales, timesteps, embedding size; P, F: pooled features, and those of
them that are projected; C, H, W: latent channels, height, width.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import AutoBackbone

from .configuration_protoleak import ProtoLeakConfig
from .picture_protoleak import NUM_PICTURE_STATISTICS, PictureStatistics
from .statistics_protoleak import Discriminant, grid_statistics, normalise_contrast, partial_correlations
from .texture_protoleak import (
    LEAST_OF_TERNARY_PATTERNS,
    LEAST_SIDE,
    NUM_COOCCURRENCES,
    NUM_COOCCURRENCES_OF_CONTRAST,
    NUM_TERNARY_PATTERNS,
    PrincipalPlane,
    cooccurrences,
    cooccurrences_of_contrast,
    log_cholesky,
    num_log_cholesky,
    ternary_patterns,
)

TEXTURES = {  # what each part is of whitened latents and their plane, but for "picture_statistics"
    "cooccurrences": lambda _, plane: cooccurrences(plane),
    "log_cholesky": lambda latents, _: log_cholesky(latents),
    "log_cholesky_of_contrast": lambda latents, _: log_cholesky(normalise_contrast(latents)),
    "cooccurrences_of_contrast": lambda _, plane: cooccurrences_of_contrast(plane),
    "ternary_patterns": lambda _, plane: ternary_patterns(plane),
}
COVARIANCES = ("log_cholesky", "log_cholesky_of_contrast")


class LeakEncoder(nn.Module):
    """
    Pooling is the same for all scales and timesteps; each scale has a projection of its own.

    Attributes:
        parts (`dict[str, int]`): What is pooled, and how many features of each.
        families (`list[tuple[str, ...]]`): The parts that are projected; those of one family are seen
            together by the discriminant that a network begins as.
    """

    def __init__(self, config: ProtoLeakConfig):
        super().__init__()
        self.num_scales, channels = len(config.scales), config.latent_channels
        grid = 6 * channels + channels * (channels - 1) // 2
        self.picture = None
        if config.pooling == "texture":
            self.plane = PrincipalPlane(channels, config.patch_size)
            if "picture_statistics" in config.texture_families:
                self.picture = PictureStatistics(channels, config.patch_size)
            sizes = dict.fromkeys(COVARIANCES, num_log_cholesky(channels)) | {
                "cooccurrences": NUM_COOCCURRENCES,
                "cooccurrences_of_contrast": NUM_COOCCURRENCES_OF_CONTRAST,
                "ternary_patterns": NUM_TERNARY_PATTERNS,
                "picture_statistics": NUM_PICTURE_STATISTICS,
            }
            self.families = [
                COVARIANCES if name == "covariances" else (name,) for name in config.texture_families
            ]
            self.parts = {name: sizes[name] for family in self.families for name in family}
        else:
            self.backbone = _backbone(config)
            width = self.backbone.channels[-1]
            if config.pooling == "mean":
                self.parts = {"features": width, "grid_statistics": grid}
                self.families = [("features",)]
            else:
                partial = channels + channels * (channels - 1) // 2
                found = 6 * width + width * (width - 1) // 2
                self.parts = {"grid_statistics": grid, "partial_correlations": partial, "features": found}
                self.families = [tuple(self.parts)]
        self.pooling = config.pooling
        projected = sum(self.parts[name] for family in self.families for name in family)
        self.norm = nn.Identity()
        if config.pooling != "mean":
            rare = 1e-7 if config.pooling == "texture" else 1e-5  # the least variance, of rare patterns
            self.norm = nn.BatchNorm1d(self.num_scales * projected, affine=False, eps=rare)
        self.dropout = nn.Dropout(config.feature_dropout)
        self.projections = nn.ModuleList(
            nn.Linear(projected, config.embedding_size) for _ in range(self.num_scales)
        )

    @property
    def is_frozen(self) -> bool:
        """Whether nothing that is trained takes part in [`LeakEncoder.pool`]."""
        return self.pooling == "texture"

    def freeze(self) -> None:
        """Let nothing train the network that looks at pictures: weights that are loaded are trainable."""
        if self.picture is not None:
            self.picture.requires_grad_(False)

    @torch.no_grad()
    def fit_readouts(self, mean: torch.Tensor, covariance: torch.Tensor, whitening: torch.Tensor) -> None:
        """
        What reads a plane or a picture of latents, where the config has them: see [`PrincipalPlane.fit`].
        """
        if self.pooling == "texture":
            self.plane.fit(mean, covariance, whitening)
        if self.picture is not None:
            self.picture.fit(mean, whitening)

    def pool(self, latents: torch.Tensor) -> torch.Tensor:
        """Features of z_t in the order of `parts`: (N, C, H, W) -> (N, P), float32"""
        if self.pooling == "texture":
            described = self._textures(latents)
        elif self.pooling == "mean":
            found = self.backbone(latents).feature_maps[-1]
            described = [found.mean(dim=(2, 3)), grid_statistics(latents)]
        else:
            found = self.backbone(latents).feature_maps[-1]
            described = [grid_statistics(latents), partial_correlations(latents), grid_statistics(found)]
        return torch.cat(described, dim=1)

    @torch.compiler.disable  # which takes minutes over counting, and gains nothing
    def _textures(self, latents: torch.Tensor) -> list[torch.Tensor]:
        plane = self.plane(latents)
        least = LEAST_OF_TERNARY_PATTERNS if "ternary_patterns" in self.parts else LEAST_SIDE
        if min(plane.shape[1:]) < least:
            raise ValueError(
                f"textures are of {least} x {least} pixels or more, at each of the model's scales; "
                f"got {plane.shape[2]} x {plane.shape[1]}. Choose a larger crop_size"
            )
        return [self.describe(name, latents, plane) for name in self.parts]

    def describe(self, part: str, latents: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
        """One of `parts` of a texture: (N, C, H, W) and its plane (N, p H, p W) -> (N, its size), float32"""
        return self.picture(latents) if part == "picture_statistics" else TEXTURES[part](latents, plane)

    def take(self, pooled: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        """Some parts of pooled features, (..., P) -> (..., their number); more than one are joined."""
        parts = dict(zip(self.parts, pooled.split(list(self.parts.values()), dim=-1), strict=True))
        return torch.cat([parts[name] for name in names], dim=-1)

    def statistics(self, pooled: torch.Tensor) -> torch.Tensor | None:
        """The latents' own [`grid_statistics`] among pooled features: (..., P) -> (..., S'), or `None`"""
        return self.take(pooled, ("grid_statistics",)) if "grid_statistics" in self.parts else None

    def projected(self, pooled: torch.Tensor) -> torch.Tensor:
        """What of pooled features is projected: (..., P) -> (..., F)"""
        return self.take(pooled, tuple(name for family in self.families for name in family))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, S, T, P) -> (B, S T, D), scale by scale"""
        features = self.projected(pooled).transpose(1, 2)  # (B, T, S, F)
        features = self.norm(features.flatten(0, 1).flatten(1)).view_as(features)
        features = self.dropout(features).unbind(dim=2)
        embeddings = [project(x) for project, x in zip(self.projections, features, strict=True)]
        return torch.cat(embeddings, dim=1)

    # --- the start as a discriminant

    @torch.no_grad()
    def fit_norm(self, batches: Iterable[torch.Tensor]) -> None:
        """Fit `norm`, where there is one, to pooled features, batches (n, S, P) of at least 2 in all."""
        if isinstance(self.norm, nn.BatchNorm1d):
            count, total, squares = 0, *torch.zeros(2, self.norm.num_features, dtype=torch.float64)
            for pooled in batches:
                features = self.projected(pooled).flatten(1).double()
                count += len(features)
                total += features.sum(dim=0)
                squares += features.square().sum(dim=0)
            self.norm.running_mean.copy_(total / count)
            self.norm.running_var.copy_((squares - total.square() / count).clamp_min(0) / (count - 1))

    @torch.no_grad()
    def family_features(self, pooled: torch.Tensor) -> list[torch.Tensor]:
        """What each family's discriminant sees, normalised: (n, S, P) -> (n, S F_family) each, float32"""
        features = self.projected(pooled)
        normalised = self.norm(features.flatten(1).to(self.device)).view_as(features).cpu()
        return [part.flatten(1) for part in normalised.split(self.family_sizes, dim=-1)]

    @property
    def family_sizes(self) -> list[int]:
        """Features of each family."""
        return [sum(self.parts[name] for name in family) for family in self.families]

    @property
    def device(self) -> torch.device:
        return self.projections[0].weight.device

    @torch.no_grad()
    def begin_as(self, discriminants: Sequence[Discriminant], scales: Sequence[float]) -> None:
        """
        Make the embedding, at even attention, the projections of one discriminant a family, each in
        dimensions of its own and times its scale, which must fit into D; all other dimensions are zero.

        Raises:
            ValueError: a class had no samples.
        """
        if absent := sorted({k for d in discriminants for k in d.means.isnan().nonzero()[:, 0].tolist()}):
            raise ValueError(f"discriminants need samples of every class; there are none of classes {absent}")
        for layer in self.projections:
            layer.weight.zero_()
            layer.bias.zero_()
        row, column = 0, 0
        for discriminant, scale, size in zip(discriminants, scales, self.family_sizes, strict=True):
            axes = (discriminant.projection * scale).view(self.num_scales, size, -1)  # (S, F_family, A)
            shift = (discriminant.centre @ discriminant.projection) * scale
            used = slice(row, row + axes.shape[2])
            for s, layer in enumerate(self.projections):
                layer.weight[used, column : column + size] = axes[s].T.to(layer.weight) * self.num_scales
                layer.bias[used] = -shift.to(layer.bias)
            row, column = used.stop, column + size


def _backbone(config: ProtoLeakConfig) -> nn.Module:
    backbone = AutoBackbone.from_config(config.backbone_config)
    if config.keep_resolution:
        stem, width = backbone.embedder, config.backbone_config.embedding_size
        stem.embedder.convolution = nn.Conv2d(config.latent_channels, width, 3, padding=1, bias=False)
        stem.pooler = nn.Identity()
    return backbone
