"""
Proto-LeakNet: image attribution from signal leaks in the latents of a diffusion VAE.

After "Proto-LeakNet: Towards Signal-Leak Aware Attribution in Synthetic Human Face Imagery"
(Giusti, Guarnera, Battiato, arXiv 2511.04260). B, T, K, M, D in shape comments: batch, timesteps, classes,
prototypes a class, embedding size; V: crops (views) of an image; C, H, W: latent channels, height, width.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoBackbone, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, cached_file, logging

from .configuration_protoleak import SCORERS, ProtoLeakConfig
from .density_protoleak import DENSITY_FILE, KnownDensity

if TYPE_CHECKING:  # transformers follows these lines when it copies a checkpoint's code
    from .image_processing_protoleak import ProtoLeakImageProcessor  # noqa: F401
    from .pipeline_protoleak import ImageAttributionPipeline  # noqa: F401

logger = logging.get_logger(__name__)

PARKED = 1e4


class WeightsDontFitError(RuntimeError, ValueError):
    """Weights of other shapes than the config's: transformers' RuntimeError, and a ValueError as all here."""


@dataclass
class ProtoLeakModelOutput(ModelOutput):
    """
    Args:
        embeddings (`torch.FloatTensor` of shape `(batch_size, embedding_size)`): h, attended over timesteps.
        gates (`torch.FloatTensor` of shape `(batch_size, embedding_size)`): w in (0, 1), attended alike.
        temporal_weights (`torch.FloatTensor` of shape `(batch_size, num_timesteps)`): alpha, each row sums to
            1.
        statistics (`torch.FloatTensor` of shape `(batch_size, num_statistics)`):
            [`grid_statistics`] of the re-simulated latents, attended alike.
        noisy_latents (`torch.FloatTensor` of shape `(batch_size, num_timesteps, channels, height, width)`,
        *optional*):
            z_t, with `output_noisy_latents=True`. With several crops an image, there is a dimension of crops
            after the first.
    """

    embeddings: torch.FloatTensor | None = None
    gates: torch.FloatTensor | None = None
    temporal_weights: torch.FloatTensor | None = None
    statistics: torch.FloatTensor | None = None
    noisy_latents: torch.FloatTensor | None = None


@dataclass
class ImageAttributionOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): With `labels`.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): Class scores of the config's scorer.
        log_density (`torch.DoubleTensor` of shape `(batch_size,)`, *optional*):
            Log density in nats of the embedding under the known classes' (or what `open_set_scores`
            have in its place), once a density is fitted.
        p_values (`torch.DoubleTensor` of shape `(batch_size,)`, *optional*): Conformal p of "made by a known
            class".
        class_p_values (`torch.DoubleTensor` of shape `(batch_size, num_labels)`, *optional*):
            Label-conditional conformal p of each class.
        embeddings, gates, temporal_weights, statistics, noisy_latents: As in [`ProtoLeakModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    log_density: torch.Tensor | None = None
    p_values: torch.Tensor | None = None
    class_p_values: torch.Tensor | None = None
    embeddings: torch.FloatTensor | None = None
    gates: torch.FloatTensor | None = None
    temporal_weights: torch.FloatTensor | None = None
    statistics: torch.FloatTensor | None = None
    noisy_latents: torch.FloatTensor | None = None


def forward_diffusion(
    latents: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    sigma_normalization: bool = False,
) -> torch.Tensor:
    """
    Re-simulate the forward process: z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4).

    Args:
        latents: z_0, (B, C, H, W).
        noise: eps ~ N(0, 1), (T, C, H, W) for every image alike, or (B, T, C, H, W).
        alphas_cumprod: abar at the T timesteps, (T,).
        sigma_normalization: Whether z_t is divided by sqrt(1 - abar_t).

    Returns:
        z_t, (B, T, C, H, W).
    """
    alphas_cumprod = alphas_cumprod.to(latents).view(-1, 1, 1, 1)
    sigma = (1 - alphas_cumprod).sqrt()
    noisy = alphas_cumprod.sqrt() * latents[:, None] + sigma * noise
    return noisy / sigma if sigma_normalization else noisy


def normalize_contrast(latents: torch.Tensor) -> torch.Tensor:
    """
    Divide by the root mean square over the channels at each grid position, as divisive normalisation in
    vision does: statistics of what is left are not those of the few busy places alone. Squares have 1e-3
    added.
    (N, C, H, W) -> (N, C, H, W)
    """
    return latents * latents.square().mean(dim=1, keepdim=True).add(1e-3).rsqrt()


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
    lower neighbour.
    Variances have 1e-4 added, so that a constant channel gives finite values and gradients.

    Args:
        features: (N, C, H, W).

    Returns:
        (N, 6 C + C (C - 1) / 2).
    """
    features = features.float()
    learning = torch.is_grad_enabled() and features.requires_grad
    made = _GridMoments.apply(features) if learning else _GridMoments.moments(features)[:-1]
    mean, std, third, fourth, right, below, correlation = made
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
    unit = torch.eye(channels, device=flat.device)
    # minus the inverse by sweeping each channel in turn (Goodnight 1979), in operations that ONNX has too
    swept = covariance + ridge[:, None, None] * unit - 2 * unit
    for k in range(channels):
        v = swept[:, :, k] + unit[k]
        swept = swept - v[:, :, None] * (v / (swept[:, k, k, None] + 2))[:, None, :]
    precision = (-swept).diagonal(dim1=1, dim2=2)
    scale = precision.rsqrt()
    rows, columns = torch.triu_indices(channels, channels, offset=1, device=flat.device)
    correlations = swept * scale[:, :, None] * scale[:, None, :]
    return torch.cat([precision.log(), correlations[:, rows, columns]], dim=1)


class LeakEncoder(nn.Module):
    """
    One noisy latent to one embedding: backbone, pooling over the latent grid, projection. Shared by all
    timesteps.
    """

    def __init__(self, config: ProtoLeakConfig):
        super().__init__()
        self.pooling = config.pooling
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        if config.keep_resolution:
            stem = self.backbone.embedder
            stem.embedder.convolution = nn.Conv2d(
                config.latent_channels,
                config.backbone_config.embedding_size,
                kernel_size=3,
                padding=1,
                bias=False,
            )
            stem.pooler = nn.Identity()
        channels = self.backbone.channels[-1]
        if config.pooling == "statistics":
            latent = config.latent_channels
            size = 7 * latent + latent * (latent - 1) + 6 * channels + channels * (channels - 1) // 2
            self.norm = nn.BatchNorm1d(size, affine=False)
            self.projection = nn.Linear(size, config.embedding_size)
        else:
            self.norm = nn.Identity()
            self.projection = nn.Linear(channels, config.embedding_size)
        self.dropout = nn.Dropout(config.feature_dropout)

    def pool(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, C, H, W) -> pooled features (N, F), and the latents' own [`grid_statistics`] (N, S)"""
        features = self.backbone(latents).feature_maps[-1]
        statistics = grid_statistics(latents)
        if self.pooling == "mean":
            return features.mean(dim=(2, 3)), statistics
        # of the latents beside those of the features that the backbone finds in them
        described = [statistics, partial_correlations(latents), grid_statistics(features)]
        return torch.cat(described, dim=1), statistics

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, C, H, W) -> embeddings (N, D), and the latents' own [`grid_statistics`] (N, S)"""
        pooled, statistics = self.pool(latents)
        return self.projection(self.dropout(self.norm(pooled))), statistics


class LatentWhitening(nn.Module):
    """
    Rotates latents to the principal components of their grid positions, each of unit variance: `matrix` times
    (z - `mean`). It changes nothing until it is fitted.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels))

    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """
        Args:
            batches: z_0 of training images, batch by batch, each (N, C, H, W), crops if any after N.
        """
        channels = len(self.mean)
        total, products, count = torch.zeros(channels).double(), torch.zeros(channels, channels).double(), 0
        for latents in batches:
            positions = latents.double().flatten(0, -4).transpose(0, 1).flatten(1)  # (C, n)
            total += positions.sum(dim=1)
            products += positions @ positions.T
            count += positions.shape[1]
        mean = total / count
        variances, components = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        largest = components.abs().argmax(dim=0)  # the sign of a component is made the same everywhere
        components = components * components.gather(0, largest[None]).sign()
        floor = 1e-8 * variances.max()  # below is rounding
        self.mean.copy_(mean)
        self.matrix.copy_((components / variances.clamp_min(floor).sqrt()).T)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H, W)"""
        centred = latents - self.mean[:, None, None]
        return torch.einsum("kc,nchw->nkhw", self.matrix, centred)


class FeatureGate(nn.Module):
    """w = sigmoid(MLP(h)): how much each dimension of the embedding counts."""

    def __init__(self, embedding_size: int):
        super().__init__()
        self.hidden = nn.Linear(embedding_size, embedding_size)
        self.output = nn.Linear(embedding_size, embedding_size)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.output(F.relu(self.hidden(embeddings))))


class TemporalAttention(nn.Module):
    """alpha = softmax over timesteps of a learned query on h_t, with whole timesteps dropped in training."""

    def __init__(self, embedding_size: int, time_dropout: float):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(embedding_size))
        self.time_dropout = time_dropout

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T)"""
        scores = embeddings @ self.query.to(embeddings) / math.sqrt(embeddings.shape[-1])
        if self.training and self.time_dropout > 0:
            dropped = torch.rand_like(scores) < self.time_dropout
            dropped &= ~dropped.all(dim=1, keepdim=True)  # an image keeps at least one timestep
            scores = scores.masked_fill(dropped, -torch.inf)
        return scores.softmax(dim=1)


class PrototypeHead(nn.Module):
    """
    M prototypes a class; a class scores by the soft minimum of the feature-weighted distances to its
    prototypes.
    """

    def __init__(self, config: ProtoLeakConfig):
        super().__init__()
        self.prototypes = nn.Parameter(
            torch.zeros(config.num_labels, config.num_prototypes, config.embedding_size)
        )
        self.temperature_range = config.temperature_range
        self.temperature_logit = nn.Parameter(torch.zeros(()))

    @property
    def temperature(self) -> torch.Tensor:
        """tau, a scalar within `temperature_range`."""
        low, high = self.temperature_range
        return low + (high - low) * torch.sigmoid(self.temperature_logit.float())

    def distances(self, embeddings: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """
        d_km = sum_i w_i (h_i - p_kmi)^2, as three matrix products: (B, K, M, D) is never made.

        Args:
            embeddings: h, (B, D).
            gates: w, (B, D).

        Returns:
            (B, K, M), float32.
        """
        prototypes = self.prototypes.float().flatten(0, 1)  # (KM, D)
        embeddings, gates = embeddings.float(), gates.float()
        constant = (gates * embeddings.square()).sum(dim=1, keepdim=True)
        distances = constant - 2 * (gates * embeddings) @ prototypes.T + gates @ prototypes.square().T
        return distances.clamp_min(0).unflatten(1, self.prototypes.shape[:2])

    def forward(self, embeddings: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """score_k = tau logsumexp_m(-d_km / tau). (B, D), (B, D) -> (B, K), float32"""
        with torch.autocast(embeddings.device.type, enabled=False):
            tau = self.temperature
            return tau * torch.logsumexp(-self.distances(embeddings, gates) / tau, dim=2)


class ProtoLeakPreTrainedModel(PreTrainedModel):
    """Loading and saving. The frozen VAE is held once, in `vae`, and stays out of the network's weights."""

    config_class = ProtoLeakConfig
    base_model_prefix = "protoleak"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, TemporalAttention):
            init.normal_(module.query, std=0.02)
        elif isinstance(module, LatentWhitening):
            init.zeros_(module.mean)
            init.eye_(module.matrix)
        elif isinstance(module, PrototypeHead):
            init.normal_(module.prototypes, std=0.5)
            init.zeros_(module.temperature_logit)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    # --- the VAE

    @property
    def vae(self) -> nn.Module | None:
        """The frozen autoencoder, or `None` before one is attached."""
        return self.base_model._modules.get("_vae")

    def attach_vae(self, vae: nn.Module) -> None:
        """Hold `vae`, frozen; its latent channels must be those of the config (`ValueError`)."""
        channels = vae.config.latent_channels
        if channels != self.config.latent_channels:
            raise ValueError(
                f"the VAE has latent_channels = {channels}, but this model was made for "
                f"latent_channels = {self.config.latent_channels}; pass the VAE that it was trained with"
            )
        self.base_model._modules["_vae"] = vae.requires_grad_(False).eval()

    def drop_decoder(self) -> None:
        """Free the half of the VAE's memory that attribution never needs; the model can't be saved then."""
        if hasattr(self.vae, "decoder"):
            self.vae.decoder = None

    def to(self, *args, **kwargs):
        """
        As [`torch.nn.Module.to`], but a floating-point dtype is that of the VAE alone: it has nearly all of
        the computation, and embeddings of a network rounded to half precision would not fit the density.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and self.vae is not None:
            self.vae.to(dtype)
        return super().to(device=device, non_blocking=non_blocking) if device is not None else self

    def train(self, mode: bool = True):
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()  # frozen also in what it does
        return self

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, vae: nn.Module | None = None, **kwargs
    ):
        """
        As [`PreTrainedModel.from_pretrained`], and attaches the VAE and the fitted density.

        Args:
            vae (*optional*):
                The autoencoder to hold; by default the checkpoint's `vae/`, else `config.vae_name_or_path`.

        Raises:
            OSError: the weights are damaged, or no VAE can be loaded; the message tells which was looked for
                and how to pass another.
            ValueError: the weights are not finite or not of the config's shapes, or the density doesn't
                belong to these weights, or is not safe to read. With
                `ignore_mismatched_sizes=True`, as for a new head, it is left out with a warning.
        """
        try:
            result = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"model.safetensors of {pretrained_model_name_or_path} is damaged: {error}; fetch it again"
            ) from error
        except RuntimeError as error:  # shapes that are not those of the config
            message = f"the weights of {pretrained_model_name_or_path} don't fit: {error}"
            raise WeightsDontFitError(message) from error
        model = result[0] if isinstance(result, tuple) else result
        for name, weight in model.state_dict().items():
            if not weight.is_meta and not weight.isfinite().all():
                raise ValueError(f"{name} of {pretrained_model_name_or_path} has NaN or infinite values")
        hub = {
            k: kwargs[k]
            for k in ("cache_dir", "force_download", "token", "revision", "local_files_only")
            if k in kwargs
        }
        model.attach_vae(
            vae if vae is not None else load_vae(pretrained_model_name_or_path, model.config, **hub)
        )
        try:
            model._load_density(pretrained_model_name_or_path, hub)
        except ValueError as error:
            if not kwargs.get("ignore_mismatched_sizes"):
                raise
            logger.warning("%s is left out: %s", DENSITY_FILE, error)  # a new head was asked for
        return result

    def _load_density(self, name: str | os.PathLike, hub: dict[str, Any]) -> None:
        """The base model has no use for a density."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        As [`PreTrainedModel.save_pretrained`]; writes the VAE, the scheduler, the density and the code
        beside.
        """
        state_dict = kwargs.pop("state_dict", None) or self.state_dict()
        kwargs["state_dict"] = {k: v for k, v in state_dict.items() if "_vae." not in k}
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = {"image-attribution": dict(CUSTOM_PIPELINE)}
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._save_companions(Path(save_directory))

    def _save_companions(self, folder: Path) -> None:
        scheduler = make_scheduler(self.config)
        scheduler.save_pretrained(folder / "scheduler")
        if self.vae is not None:
            if getattr(self.vae, "decoder", self.vae) is None:
                raise ValueError("the VAE's decoder was dropped, so it can't be saved; load the model again")
            self.vae.save_pretrained(folder / "vae")
            for file in (folder / "vae").iterdir():
                file.chmod(0o644)  # diffusers writes weights that only their owner can read
            index = {
                "_class_name": ["pipeline_protoleak", "ProtoLeakDiffusionPipeline"],
                "vae": ["diffusers", type(self.vae).__name__],
                "scheduler": ["diffusers", type(scheduler).__name__],
                "attribution_model": [None, None],
            }
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for part in CODE:
            code = Path(__file__).with_name(f"{part}_protoleak.py").read_bytes()
            (folder / f"{part}_protoleak.py").write_bytes(code)


AUTO_MAP = {
    "AutoConfig": "configuration_protoleak.ProtoLeakConfig",
    "AutoModel": "modeling_protoleak.ProtoLeakModel",
    "AutoModelForImageClassification": "modeling_protoleak.ProtoLeakForImageAttribution",
}
CODE = ("configuration", "files", "postprocessing", "image_processing", "density", "modeling", "pipeline")
CUSTOM_PIPELINE = {
    "impl": "pipeline_protoleak.ImageAttributionPipeline",
    "pt": ["AutoModelForImageClassification"],
    "type": "image",
}


def make_scheduler(config: ProtoLeakConfig):
    """The diffusers scheduler whose `alphas_cumprod` is the noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**config.noise_schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def load_vae(checkpoint: str | os.PathLike, config: ProtoLeakConfig, **hub) -> nn.Module:
    """The VAE in the checkpoint's `vae/`; where there is none, the one that the config names."""
    if has_vae_folder(checkpoint, **hub):
        return load_autoencoder(checkpoint, "vae", **hub)
    hub["revision"] = config.vae_revision
    return load_autoencoder(config.vae_name_or_path, config.vae_subfolder, **hub)


def has_vae_folder(name: str | os.PathLike, **hub) -> bool:
    """Whether the Hub id or folder has its autoencoder in `vae/`, as checkpoints and pipelines do."""
    if Path(name).is_absolute() or Path(name).is_dir():
        return (Path(name) / "vae" / "config.json").exists()
    found = cached_file(
        name, "config.json", subfolder="vae", _raise_exceptions_for_missing_entries=False, **hub
    )
    return found is not None


def load_autoencoder(name: str | os.PathLike, subfolder: str | None = None, **hub) -> nn.Module:
    """
    An autoencoder of diffusers from a Hub id or a folder.

    Raises:
        OSError: telling which, why, and how to pass another.
    """
    import diffusers

    try:
        return diffusers.AutoModel.from_pretrained(str(name), subfolder=subfolder, **hub)
    except Exception as error:  # also what a missing, gated or damaged repository raises
        raise OSError(
            f"the VAE {str(name)!r} (subfolder {subfolder!r}, revision {hub.get('revision')!r}) can't be "
            f"loaded: {error}; pass one with from_pretrained(..., vae=AutoencoderKL.from_pretrained(FOLDER)) "
            f"or set config.vae_name_or_path to a local folder"
        ) from error


class ProtoLeakModel(ProtoLeakPreTrainedModel):
    """Embeddings of images: VAE, forward diffusion, encoder, gates, temporal attention."""

    def __init__(self, config: ProtoLeakConfig):
        super().__init__(config)
        self.whitening = LatentWhitening(config.latent_channels) if config.latent_whitening else None
        self.encoder = LeakEncoder(config)
        self.gate = FeatureGate(config.embedding_size)
        self.attention = TemporalAttention(config.embedding_size, config.time_dropout)
        self._constants: dict[Any, torch.Tensor] = {}
        self.post_init()

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        z_0, the scaled posterior mode of the VAE. (..., 3, h, w) in [-1, 1] -> (..., C, H, W), float32
        """
        if self.vae is None:
            raise ValueError("no VAE is attached; call attach_vae, or pass latents instead of pixel_values")
        flat = pixel_values.flatten(0, -4).to(device=self.vae.device, dtype=self.vae.dtype)
        encoded = self.vae.encode(flat)
        if hasattr(encoded, "latent_dist"):  # AutoencoderKL
            latents = encoded.latent_dist.mode()
        else:  # AutoencoderTiny has `latents`, AutoencoderDC `latent`
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents = (latents.float() - shift) * self.vae.config.scaling_factor
        return latents.unflatten(0, pixel_values.shape[:-3])

    def set_scheduler(self, scheduler) -> None:
        """Take over a diffusers scheduler's noise schedule; the config says so from then on."""
        if getattr(scheduler, "alphas_cumprod", None) is None:
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod, which the forward diffusion takes from it"
            )
        schedule = {name: scheduler.config[name] for name in self.config.noise_schedule}
        expected = make_scheduler(type(self.config)(**{**self.config.to_dict(), **schedule})).alphas_cumprod
        if not torch.allclose(scheduler.alphas_cumprod.cpu(), expected, atol=1e-6):
            raise ValueError(
                f"the noise schedule of {type(scheduler).__name__} is not made by {schedule} alone"
            )
        for name, value in schedule.items():
            setattr(self.config, name, value)
        self._constants.pop("alphas_cumprod", None)

    def set_noise_seed(self, seed: int) -> None:
        """Draw other noise for evaluation; the config says so from then on."""
        self.config.noise_seed = seed
        self._constants.clear()

    def alphas_cumprod(self) -> torch.Tensor:
        """abar at the config's timesteps, (T,), from the diffusers scheduler."""
        if (
            "alphas_cumprod" not in self._constants
        ):  # made late: from_pretrained constructs on the meta device
            self._constants["alphas_cumprod"] = make_scheduler(self.config).alphas_cumprod[
                self.config.timesteps
            ]
        return self._constants["alphas_cumprod"]

    def evaluation_noise(self, shape: torch.Size) -> torch.Tensor:
        """
        The noise of evaluation, (T, C, H, W): one draw for every image, fixed by `noise_seed` alone, so that
        an image has the same score in any batch, place, process and device.
        """
        if shape not in self._constants:
            generator = torch.Generator("cpu").manual_seed(self.config.noise_seed)
            draws = [torch.randn(shape, generator=generator) for _ in self.config.timesteps]
            self._constants[shape] = torch.stack(draws)
        return self._constants[shape]

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        latents: torch.FloatTensor | None = None,
        output_noisy_latents: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ProtoLeakModelOutput | tuple:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`):
                In [-1, 1], from [`ProtoLeakImageProcessor`]; with several crops an image `(batch_size,
                num_crops, 3, height, width)`, whose embeddings are averaged.
            latents (`torch.FloatTensor` of shape `(batch_size, channels, height, width)`):
                z_0 from [`~ProtoLeakModel.encode`], instead of `pixel_values`; crops as above.

        Raises:
            ValueError: both or neither of them given, or another number of dimensions.
        """
        if (pixel_values is None) == (latents is None):
            raise ValueError("pass either pixel_values or latents")
        latents = self.encode(pixel_values) if latents is None else latents
        if latents.ndim not in (4, 5):
            raise ValueError(
                f"images must be (batch, channels, height, width), crops if any after the batch; "
                f"got shape {tuple((pixel_values if pixel_values is not None else latents).shape)}"
            )
        views = latents.shape[1:-3]  # () or (V,)
        noisy = self.simulate(latents.flatten(0, -4))  # (BV, T, C, H, W)
        encoded = self.encoder(noisy.flatten(0, 1).to(self.dtype))
        embeddings, statistics = (x.unflatten(0, noisy.shape[:2]) for x in encoded)  # (BV, T, D), (BV, T, S)
        gates = self.gate(embeddings)
        weights = self.attention(embeddings)  # (BV, T)
        attended = [
            torch.einsum("bt,btd->bd", weights, x.to(weights)) for x in (embeddings, gates, statistics)
        ]
        if views:
            *attended, weights = (x.unflatten(0, latents.shape[:2]).mean(dim=1) for x in (*attended, weights))
        output = ProtoLeakModelOutput(
            embeddings=attended[0],
            gates=attended[1],
            temporal_weights=weights,
            statistics=attended[2],
            noisy_latents=noisy.unflatten(0, latents.shape[:-3]) if output_noisy_latents else None,
        )
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if return_dict else output.to_tuple()

    def simulate(self, latents: torch.Tensor) -> torch.Tensor:
        """z_0 to z_t at the config's timesteps: (N, C, H, W) -> (N, T, C, H, W)"""
        latents = latents.to(self.device, torch.float32)
        if self.whitening is not None:
            latents = self.whitening(latents)
        if self.config.contrast_normalization:
            latents = normalize_contrast(latents)
        noise = self._noise(latents)
        return forward_diffusion(latents, noise, self.alphas_cumprod(), self.config.sigma_normalization)

    def _noise(self, latents: torch.Tensor) -> torch.Tensor:
        if self.training:  # fresh at every step
            return torch.randn(
                len(latents), len(self.config.timesteps), *latents.shape[1:], device=latents.device
            )
        return self.evaluation_noise(latents.shape[1:]).to(latents)


class ProtoLeakForImageAttribution(ProtoLeakPreTrainedModel):
    """
    Which known generator made an image, or none: prototypes for the classes, a density for what is known at
    all.
    """

    def __init__(self, config: ProtoLeakConfig):
        super().__init__(config)
        self.protoleak = ProtoLeakModel(config)
        self.head = PrototypeHead(config)
        self.density: KnownDensity | None = None
        self.post_init()

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        latents: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_noisy_latents: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ImageAttributionOutput | tuple:
        r"""
        Args:
            pixel_values, latents: As in [`ProtoLeakModel`].
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Classes 0..K-1, for the loss:
                cross-entropy
                plus `attention_entropy_weight * (log T - H(alpha))`, which keeps the attention from
                collapsing.
        """
        model = self.protoleak(pixel_values, latents, output_noisy_latents, return_dict=True)
        prototype_logits = self.head(model.embeddings, model.gates)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(prototype_logits, labels) + self._attention_loss(model.temporal_weights)
        verdict = {"logits": prototype_logits} if self.training else self._verdict(model, prototype_logits)
        output = ImageAttributionOutput(loss=loss, **verdict, **model)
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _attention_loss(self, weights: torch.Tensor) -> torch.Tensor:
        weights = weights.float()
        entropy = -(weights * weights.clamp_min(1e-8).log()).sum(dim=1).mean()  # dropped timesteps weigh 0
        return self.config.attention_entropy_weight * (math.log(weights.shape[1]) - entropy)

    def _verdict(
        self, model: ProtoLeakModelOutput, prototype_scores: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Logits of the config's scorer at its temperature, and what the density says, where there is one."""
        scorer, density = self.config.scorer, self.density
        logits = self._class_scores(scorer, model.embeddings, prototype_scores)
        if density is None:
            return {"logits": logits}
        logits = logits / density.temperatures_[scorer]
        log_density = density.log_density(model)
        probabilities = logits.detach().double().softmax(dim=1).cpu().numpy()
        return {
            "logits": logits,
            "log_density": torch.from_numpy(log_density),
            "p_values": torch.from_numpy(density.p_value(log_density, probabilities.argmax(axis=1))),
            "class_p_values": torch.from_numpy(density.class_p_values(scorer, probabilities)),
        }

    def _class_scores(self, scorer: str, embeddings, prototype_scores: torch.Tensor) -> torch.Tensor:
        if scorer == "prototype":
            return prototype_scores
        if self.density is None:
            raise ValueError(f"scorer={scorer!r} needs a density; run train.py, or set scorer='prototype'")
        scores = self.density.scorers_[scorer].score_samples(embeddings)
        return torch.from_numpy(scores).to(prototype_scores)

    # --- reasons

    @torch.no_grad()
    def explain(self, output: ImageAttributionOutput, num_prototypes: int = 3) -> list[dict[str, Any]]:
        """
        Why each image of an output got its scores, as plain values.

        Args:
            output (`ImageAttributionOutput`): What this model gave, with the dimension of images.
            num_prototypes (`int`): How many of the nearest prototypes are told.

        Returns:
            For each image a `dict` with
            - prototypes: the nearest, each with `label`, `prototype` (its place in the class), `distance`,
              and `examples`, the training images nearest to it (`index`, `label`), where a density is fitted;
            - contributions: what makes the difference of the logits of the `first` and the `second` class:
              `dimensions`, one value for each of the embedding, from w_i (h_i - p_i)^2, and
              `sharing`, how evenly each class's prototypes share the image. They add up to `difference`.
              `None` with another scorer than the prototypes;
            - timesteps: `timestep` and `weight` of each;
            - density: `log_density`, the `threshold` at `alpha` below which an image is called unknown, and
              `rank`, the share of the `count` calibration images that score lower. `None` without a density;
            - embedding: h.
        """
        embeddings, gates = output.embeddings.float(), output.gates.float()
        distances = self.head.distances(embeddings, gates)  # (B, K, M)
        examples = self.prototype_examples() if self.density is not None else {}
        names = self.config.label_names
        reasons = []
        for i in range(len(embeddings)):
            nearest = distances[i].flatten().argsort()[:num_prototypes].tolist()
            prototypes = []
            for place in nearest:
                k, m = divmod(place, distances.shape[2])
                row = {"label": names[k], "prototype": m, "distance": distances[i, k, m].item()}
                prototypes.append(row | {"examples": examples.get((k, m), [])})
            weights = output.temporal_weights[i].tolist()
            steps = zip(self.config.timesteps, weights, strict=True)
            reasons.append(
                {
                    "prototypes": prototypes,
                    "contributions": self._contributions(embeddings[i], gates[i], output.logits[i]),
                    "timesteps": [{"timestep": t, "weight": weight} for t, weight in steps],
                    "density": self._place_in_density(output, i),
                    "embedding": embeddings[i].tolist(),
                }
            )
        return reasons

    def _contributions(self, embedding, gate, logits) -> dict[str, Any] | None:
        """
        tau logsumexp_m(-d_m / tau) = -sum_m r_m d_m + tau H(r) with r = softmax(-d / tau), and d_m is a sum
        over dimensions: a class score is a sum over dimensions and one more term, exactly.
        """
        if self.config.scorer != "prototype" or len(logits) < 2:
            return None
        temperature = 1.0 if self.density is None else self.density.temperatures_["prototype"]
        order = logits.argsort(descending=True)[:2]
        tau = self.head.temperature
        parts = gate * (embedding - self.head.prototypes[order].float()).square()  # (2, M, D)
        log_shares = (-parts.sum(dim=2) / tau).log_softmax(dim=1)  # (2, M)
        shares = log_shares.exp()
        of_dimensions = -(shares[..., None] * parts).sum(dim=1) / temperature  # (2, D)
        of_sharing = -tau * (shares * log_shares).sum(dim=1) / temperature  # (2,)
        names = [self.config.label_names[k] for k in order.tolist()]
        return {
            "first": names[0],
            "second": names[1],
            "difference": (logits[order[0]] - logits[order[1]]).item(),
            "dimensions": (of_dimensions[0] - of_dimensions[1]).tolist(),
            "sharing": (of_sharing[0] - of_sharing[1]).item(),
        }

    def _place_in_density(self, output: ImageAttributionOutput, i: int) -> dict[str, Any] | None:
        if self.density is None:
            return None
        label = output.logits[i].argmax().item()
        score, calibration = output.log_density[i].item(), self.density.calibration_of(label)
        return {
            "log_density": score,
            "threshold": self.density.threshold(self.config.alpha, label),
            "alpha": self.config.alpha,
            "rank": (calibration < score).double().mean().item(),
            "count": len(calibration),
        }

    @torch.no_grad()
    def prototype_examples(self, count: int = 3) -> dict[tuple[int, int], list[dict[str, Any]]]:
        """
        For each class k and prototype m the training images nearest to it, each seen through its own gates:
        `index` in the density's training images, and `label`. Prototypes that enrolling left unused have
        none.
        """
        if self.density is None:
            raise ValueError("this model has no density, so its training images are not known; run train.py")
        known = self.density.train_
        distances = self.head.distances(known["embeddings"].to(self.device), known["gates"].to(self.device))
        names = self.config.label_names
        found = {}
        for k, m in torch.cartesian_prod(*map(torch.arange, distances.shape[1:])).tolist():
            if self.head.prototypes[k, m].max() < PARKED:
                nearest = distances[:, k, m].argsort()[:count].tolist()
                found[k, m] = [{"index": n, "label": names[int(known["labels"][n])]} for n in nearest]
        return found

    def keep_thumbnails(self, open_training_image: Callable[[int], Any], max_bytes: int = 1_000_000) -> None:
        """
        Keep small pictures of the training images nearest to each prototype with the density.

        Args:
            open_training_image (`Callable`): From an image's place among the density's training images, as it
                was given to [`~ProtoLeakForImageAttribution.fit_density`], to the image, or `None`.
            max_bytes (`int`): Of all together; the nearest come first.
        """
        from .image_processing_protoleak import thumbnail

        examples = self.prototype_examples().values()
        nearest_first = [row["index"] for rank in zip(*examples, strict=False) for row in rank]
        kept: dict[int, bytes] = {}
        for index in dict.fromkeys(nearest_first):
            image = open_training_image(index)
            content = self.density.thumbnails_.get(index) if image is None else thumbnail(image)
            if content is not None and sum(map(len, kept.values())) + len(content) <= max_bytes:
                kept[index] = content
        self.density.thumbnails_ = kept

    # --- the density

    def probe(self) -> torch.Tensor:
        """What VAE and network make of a fixed image, (D,): with the same probe they are the same."""
        generator = torch.Generator("cpu").manual_seed(0)
        pixel_values = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
        training = self.training
        with torch.no_grad():
            embedding = self.eval().protoleak(pixel_values).embeddings[0].float().cpu()
        self.train(training)
        return embedding

    def fit_density(self, train: Any, held_out: Any) -> None:
        """
        Fit density, scorers and calibration on this network's embeddings of known classes.

        Args:
            train, held_out: With `embeddings`, `gates`, `statistics` and `labels`; see [`KnownDensity.fit`].
        """
        config = self.config
        chosen = config.label_names, config.open_set_scores
        self._take_density(KnownDensity().fit(train, held_out, *chosen))

    @torch.no_grad()
    def _take_density(self, density: KnownDensity) -> None:
        """Calibrate every scorer, and hold the density."""
        self.density = density
        images = density.calibration_set()
        gates, embeddings = images["gates"].to(self.device), images["embeddings"].to(self.device)
        prototype_scores = self.head(embeddings, gates)
        for scorer in SCORERS:
            density.calibrate(scorer, self._class_scores(scorer, embeddings, prototype_scores))
        density.probe_ = self.probe()

    @torch.no_grad()
    def set_labels(self, names: list[str]) -> None:
        """
        Make `names` the classes: a class that was known keeps its prototypes, a new one begins at random.
        """
        known = {self.config.id2label[k]: k for k in range(self.config.num_labels)}
        old = self.head.prototypes
        new = torch.randn(len(names), *old.shape[1:], dtype=old.dtype).to(old.device) * 0.5
        for k, name in enumerate(names):
            if name in known:
                new[k] = old[known[name]]
        self.head.prototypes = nn.Parameter(new)
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: k for k, name in enumerate(names)}
        self.density = None

    @torch.no_grad()
    def enroll(self, name: str, images: Any) -> None:
        """
        Learn one more generator without training: its prototypes are centres of its images' embeddings
        (k-means), and density, scorers and calibration are fitted again.

        Args:
            name (`str`): The new class.
            images: This model's output for 2 of its images or more, or a dict of its `embeddings`, `gates`
                and `statistics`.

        Raises:
            ValueError: there is no density to extend, the name is taken, or there are too few images.
        """
        from sklearn.cluster import KMeans

        if self.density is None:
            raise ValueError("this model has no density to extend; train it with train.py first")
        density = self.density.enroll(name, images)
        embeddings = density.train_["embeddings"][density.train_["labels"] == len(density.labels) - 1]
        count = min(self.config.num_prototypes, max(1, len(embeddings) // 4))
        centres = KMeans(count, n_init=10, random_state=0).fit(embeddings.numpy()).cluster_centers_
        self.set_labels(density.labels)
        new = self.head.prototypes[-1]
        new.fill_(PARKED)  # prototypes without a centre lie where no embedding comes
        new[:count] = torch.from_numpy(centres).to(new)
        self._take_density(density)

    def check_density(self, density: KnownDensity) -> None:
        """
        Raise `ValueError` unless `density` was fitted on embeddings of this very network, for these labels.
        """
        names = self.config.label_names
        if density.embedding_size != self.config.embedding_size:
            raise ValueError(
                f"the density was fitted on embeddings of size {density.embedding_size}, but this model's "
                f"embedding_size is {self.config.embedding_size}; fit it again with train.py"
            )
        if density.labels != names:
            raise ValueError(
                f"the density was fitted for {density.labels}, but this model's labels are {names}"
            )
        probe = self.probe()
        tolerance = 1e-3 if {self.dtype, self.vae.dtype} == {torch.float32} else 0.1
        if not torch.allclose(
            probe, density.probe_.float(), atol=tolerance * float(density.probe_.abs().max()), rtol=0
        ):
            raise ValueError(
                "the density was fitted for other weights, timesteps or VAE; fit it again with train.py"
            )

    def _load_density(self, name: str | os.PathLike, hub: dict[str, Any]) -> None:
        path = cached_file(name, DENSITY_FILE, _raise_exceptions_for_missing_entries=False, **hub)
        if path is not None:
            density = KnownDensity.load(path)
            self.check_density(density)
            self.density = density

    def _save_companions(self, folder: Path) -> None:
        super()._save_companions(folder)
        target = folder / DENSITY_FILE
        if self.density is not None:
            try:
                self.check_density(self.density)
            except ValueError as error:
                logger.warning("%s is left out: %s", DENSITY_FILE, error)
                self.density = None
        if self.density is not None:
            self.density.save(target)
        else:
            target.unlink(missing_ok=True)


__all__ = ["ImageAttributionOutput", "ProtoLeakForImageAttribution", "ProtoLeakModel", "ProtoLeakModelOutput"]
