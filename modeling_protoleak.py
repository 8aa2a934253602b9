"""
Proto-LeakNet: image attribution from signal leaks in the latents of a diffusion VAE.

After "Proto-LeakNet: Towards Signal-Leak Aware Attribution in Synthetic Human Face Imagery"
(Giusti, Guarnera, Battiato, arXiv 2511.04260). B, T, K, M, D in shape comments: batch, timesteps, classes,
prototypes a class, embedding size; V: crops (views) of an image; S: scales; P: pooled features; C, H, W:
latent channels, height, width.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .checkpoint_protoleak import CheckpointMixin, make_alphas_cumprod, schedule_of
from .configuration_protoleak import ProtoLeakConfig
from .crops_protoleak import crop_weights, join_crops, looked_at
from .detection_protoleak import DetectorMixin
from .encoder_protoleak import LeakEncoder
from .explanation_protoleak import explain
from .outputs_protoleak import ImageAttributionOutput, ProtoLeakModelOutput
from .precision_protoleak import PrecisionMixin, full_precision, without_autocast
from .statistics_protoleak import Discriminant, LatentWhitening, normalise_contrast
from .texture_protoleak import POSITIONS, TOGETHER, PrincipalPlane, in_threads
from .vae_protoleak import encode_with, in_patches, lays_out_pixels

if TYPE_CHECKING:  # transformers follows this line when it copies a checkpoint's code
    from .diffusion_protoleak import ProtoLeakDiffusionPipeline  # noqa: F401

PARKED = 1e4  # where prototypes lie that are not in use: no embedding comes there


# --- the parts of the network -------------------------------------------------------------------------------


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
    noisy = (alphas_cumprod.sqrt() * latents[:, None]).add_(sigma * noise)
    return noisy / sigma if sigma_normalization else noisy


class TemporalAttention(nn.Module):
    """alpha = softmax over scales and timesteps of a learned query on h_t, with some dropped in training."""

    def __init__(self, embedding_size: int, time_dropout: float):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(embedding_size))
        self.time_dropout = time_dropout

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, ST, D) -> (B, ST)"""
        scores = embeddings @ self.query.to(embeddings) / math.sqrt(embeddings.shape[-1])
        if self.training and self.time_dropout > 0:
            dropped = torch.rand_like(scores) < self.time_dropout
            dropped &= ~dropped.all(dim=1, keepdim=True)  # an image keeps at least one
            scores = scores.masked_fill(dropped, -torch.inf)
        return scores.softmax(dim=1)


class FeatureGate(nn.Module):
    """w = sigmoid(MLP(h)): how much each dimension of the embedding counts."""

    def __init__(self, embedding_size: int):
        super().__init__()
        self.hidden = nn.Linear(embedding_size, embedding_size)
        self.output = nn.Linear(embedding_size, embedding_size)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.output(F.relu(self.hidden(embeddings))))


class PrototypeHead(nn.Module):
    """M prototypes a class, which scores by the soft minimum of the feature-weighted distances to them."""

    def __init__(self, config: ProtoLeakConfig):
        super().__init__()
        shape = config.num_labels, config.num_prototypes, config.embedding_size
        self.prototypes = nn.Parameter(torch.zeros(shape))
        self.temperature_range = config.temperature_range
        self.temperature_logit = nn.Parameter(torch.zeros(()))

    @property
    def temperature(self) -> torch.Tensor:
        """tau, a scalar within `temperature_range`."""
        low, high = self.temperature_range
        return low + (high - low) * torch.sigmoid(self.temperature_logit.float())

    def distances(self, embeddings: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """
        d_km = sum_i w_i (h_i - p_kmi)^2, as three matrix products: (B, K, M, D) is never held.

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

    def in_use(self) -> torch.Tensor:
        """Which prototypes are not parked, (K, M)."""
        return self.prototypes.amax(dim=2) < PARKED

    @torch.no_grad()
    def place(self, k: int, centres: torch.Tensor) -> None:
        """Make `centres` (m, D), m at most M, the prototypes of class k, and park its others."""
        self.prototypes[k].fill_(PARKED)
        self.prototypes[k, : len(centres)] = centres.to(self.prototypes)

    @without_autocast
    @full_precision()
    def forward(self, embeddings: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """score_k = tau logsumexp_m(-d_km / tau). (B, D), (B, D) -> (B, K), float32"""
        tau = self.temperature
        return tau * torch.logsumexp(-self.distances(embeddings, gates) / tau, dim=2)


# --- the models ---------------------------------------------------------------------------------------------


class ProtoLeakPreTrainedModel(PrecisionMixin, CheckpointMixin, PreTrainedModel):
    """
    How weights begin; [`CheckpointMixin`] holds the frozen VAE, and loads and saves; [`PrecisionMixin`] says
    what a dtype means.
    """

    config_class = ProtoLeakConfig
    base_model_prefix = "protoleak"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean: `Trainer` divides it by the steps that it accumulates
    _no_split_modules = []

    @property
    def device(self) -> torch.device:
        """Of the weights; a replica of `torch.nn.DataParallel`, too, has those, but no `parameters()`."""
        return self.base_model.encoder.device

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether the backbone does; textures have none."""
        backbone = getattr(self.base_model.encoder, "backbone", None)
        return backbone is not None and backbone.supports_gradient_checkpointing

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, TemporalAttention):
            init.normal_(module.query, std=0.02)
        elif isinstance(module, LatentWhitening):
            init.zeros_(module.mean)
            init.eye_(module.matrix)
        elif isinstance(module, PrincipalPlane):
            init.eye_(module.readout)
            init.zeros_(module.offset)
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

    @without_autocast
    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """
        z_0 at each of the config's scales, by [`encode_with`] the VAE: (..., 3, h, w) in [-1, 1] -> for each
        scale s (..., C, h / r s, w / r s), r the VAE's reduction, float32. Pixels are averaged in squares. A
        crop of an image that is of one colour, which may only fill a batch up, has latents of zero.
        """
        if self.held_vae is None:
            raise ValueError("no VAE is attached; call attach_vae, or pass latents instead of pixel_values")
        flat, views = pixel_values.flatten(0, -4), pixel_values.shape[:-3]
        pyramid = (flat if scale == 1 else F.avg_pool2d(flat, scale) for scale in self.config.scales)
        encoded = [self._encode(pixels) for pixels in pyramid]
        if len(views) > 1:
            varied = (flat.flatten(2).amax(dim=2) > flat.flatten(2).amin(dim=2)).any(dim=1)
            encoded = [latents.mul_(varied.to(latents)[:, None, None, None]) for latents in encoded]
        return [latents.unflatten(0, views) for latents in encoded]

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, h, w) -> (N, C, H, W), float32"""
        vae = self.held_vae
        encode = in_patches if lays_out_pixels(vae) else partial(encode_with, vae)
        pixel_values = pixel_values.to(vae.device, vae.dtype)
        if vae.device.type != "cpu" or torch.compiler.is_compiling():
            return encode(pixel_values)
        return torch.cat(in_threads(encode, pixel_values.split(TOGETHER)))

    def fit_whitening(self, batches: Iterable[torch.Tensor]) -> None:
        """
        Fit what whitens latents, and what reads them, where the config has them.

        Args:
            batches: z_0 of training images at the first scale, batch by batch, each (N, C, H, W).
        """
        if self.whitening is not None:
            covariance = self.whitening.fit(batches).to(self.device)
            mean, matrix = self.whitening.mean.double(), self.whitening.matrix.double()
            self.encoder.fit_readouts(mean, covariance, matrix)

    def set_scheduler(self, scheduler) -> None:
        """Take over a diffusers scheduler's noise schedule; the config says so from then on."""
        vars(self.config).update(schedule_of(scheduler, self.config))
        self._constants.pop("alphas_cumprod", None)

    def set_noise_seed(self, seed: int) -> None:
        """Draw other noise for evaluation; the config says so from then on."""
        self.config.noise_seed = seed
        self._constants.clear()

    def alphas_cumprod(self) -> torch.Tensor:
        """abar at the config's timesteps, (T,)."""
        if "alphas_cumprod" not in self._constants:  # not in __init__, which may run on the meta device
            self._constants["alphas_cumprod"] = make_alphas_cumprod(self.config)[self.config.timesteps]
        return self._constants["alphas_cumprod"]

    def evaluation_noise(self, shape: torch.Size) -> torch.Tensor:
        """(T, C, H, W): one draw for every image, fixed by `noise_seed` alone, so that scores are as well."""
        if shape not in self._constants:
            generator = torch.Generator("cpu").manual_seed(self.config.noise_seed)
            options = {"generator": generator, "device": "cpu", "dtype": torch.float32}
            draws = [torch.randn(shape, **options) for _ in self.config.timesteps]
            self._constants[shape] = torch.stack(draws)
        return self._constants[shape]

    @without_autocast
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        latents: torch.FloatTensor | Sequence[torch.FloatTensor] | None = None,
        features: torch.FloatTensor | None = None,
        output_noisy_latents: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ProtoLeakModelOutput | tuple:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`):
                In [-1, 1], from [`ProtoLeakImageProcessor`]; with several crops an image `(batch_size,
                num_crops, 3, height, width)`, whose features are averaged by their evidence.
            latents (`torch.FloatTensor` of shape `(batch_size, channels, height, width)`):
                z_0 from [`~ProtoLeakModel.encode`], instead of `pixel_values`; crops as above. With several
                scales a list, one for each.
            features (`torch.FloatTensor` of shape `(batch_size, num_scales, num_timesteps, num_features)`):
                What was pooled before, see [`ProtoLeakModelOutput`], instead of either.

        Raises:
            ValueError: none or more than one of them given, or another number of dimensions.
        """
        if sum(given is not None for given in (pixel_values, latents, features)) != 1:
            raise ValueError("pass one of pixel_values, latents and features")
        described = {"features": features}
        if features is None:
            latents = self.encode(pixel_values) if latents is None else latents
            pyramid = [latents] if isinstance(latents, torch.Tensor) else list(latents)
            described = self.describe(pyramid, output_noisy_latents)
        output = ProtoLeakModelOutput(**self._attend(described["features"]), **described)
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if return_dict else output.to_tuple()

    @full_precision()
    def _attend(self, features: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """What an image is at all scales and timesteps together, from its features: see `forward`."""
        features = features.to(self.device, torch.float32)
        embeddings = self.encoder(features)  # (B, ST, D)
        gates, weights = self.gate(embeddings), self.attention(embeddings)  # (B, ST, D), (B, ST)
        statistics = self.encoder.statistics(features.flatten(1, 2))
        attended = [
            None if x is None else torch.einsum("bt,btd->bd", weights, x.to(weights))
            for x in (embeddings, gates, statistics)
        ]
        attended = dict(zip(("embeddings", "gates", "statistics"), attended, strict=True))
        return attended | {"temporal_weights": weights}

    @full_precision()
    def describe(
        self, pyramid: list[torch.Tensor], output_noisy_latents: bool = False
    ) -> dict[str, torch.Tensor | None]:
        """
        The fields of [`ProtoLeakModelOutput`] from `noisy_latents` on, from z_0 at each scale, (B, C, H, W)
        or (B, V, C, H, W) each. Of several crops those without evidence are not looked at, and of many, where
        nothing is trained of what looks, each at one timestep: see `crops_protoleak.py`.
        """
        views, scales = pyramid[0].shape[:-3], len(self.config.scales)
        if len(views) not in (1, 2) or len(pyramid) != scales:
            shapes = [tuple(latents.shape) for latents in pyramid]
            raise ValueError(
                f"latents must be {scales} (one a scale) of (batch, channels, height, width), crops if any "
                f"after the batch; got shapes {shapes}"
            )
        whitened = [self.whiten(latents.flatten(0, -4)) for latents in pyramid]
        described = {"noisy_latents": None}
        if len(views) == 1:
            described["features"] = self.pool(whitened)
        else:
            weights = crop_weights(whitened[0].unflatten(0, views))
            in_turn = self.encoder.is_frozen and not self.training
            looked = looked_at(weights, len(self.config.timesteps), in_turn)
            crops = self._pool_crops(whitened, looked.flatten(0, 1)).unflatten(0, views)
            described["features"], described["crop_features"] = join_crops(crops, weights, looked)
            described["crop_weights"] = weights
        if output_noisy_latents:
            described["noisy_latents"] = self.simulate(whitened[0]).unflatten(0, views)
        return described

    def _pool_crops(self, pyramid: list[torch.Tensor], looked: torch.Tensor) -> torch.Tensor:
        """[`~ProtoLeakModel.pool`] where `looked` (N, T) asks for it; zero elsewhere. (N, S, T, P)"""
        size = len(self.config.scales), looked.shape[1], sum(self.encoder.parts.values())
        features = pyramid[0].new_zeros(len(looked), *size)
        for pattern in looked.unique(dim=0):
            timesteps = pattern.nonzero()[:, 0].tolist()
            chosen = (looked == pattern).all(dim=1).nonzero()[:, 0]
            if timesteps:
                pooled = self.pool([latents[chosen] for latents in pyramid], timesteps)
                for place, timestep in enumerate(timesteps):
                    features[chosen, :, timestep] = pooled[:, :, place]
        return features

    def pool(self, pyramid: list[torch.Tensor], timesteps: Sequence[int] | None = None) -> torch.Tensor:
        """
        What the encoder pools of z_t, from whitened z_0 at each scale, (N, C, H, W) each: (N, S, T, P), at
        all of the config's timesteps or those at some places. Of textures a CPU takes a few crops at a time,
        which then stay in its caches.
        """

        def pool(latents: torch.Tensor) -> torch.Tensor:
            noisy = self.simulate(latents, timesteps)  # (n, T, C, H, W)
            return self.encoder.pool(noisy.flatten(0, 1)).unflatten(0, noisy.shape[:2])

        if self.training or not self.encoder.is_frozen or self.device.type != "cpu":
            return torch.stack([pool(latents) for latents in pyramid], dim=1)
        parts = [latents.split(max(1, POSITIONS // math.prod(latents.shape[2:]))) for latents in pyramid]
        pooled = iter(in_threads(pool, [part for of_scale in parts for part in of_scale]))
        return torch.stack([torch.cat([next(pooled) for _ in of_scale]) for of_scale in parts], dim=1)

    def whiten(self, latents: torch.Tensor) -> torch.Tensor:
        """z_0 as it is noised, (N, C, H, W) -> (N, C, H, W)"""
        latents = latents.to(self.device, torch.float32)
        return latents if self.whitening is None else self.whitening(latents)

    def simulate(self, latents: torch.Tensor, timesteps: Sequence[int] | None = None) -> torch.Tensor:
        """Whitened z_0 to z_t, at all of the config's timesteps or some: (N, C, H, W) -> (N, T, C, H, W)"""
        if self.config.contrast_normalization:
            latents = normalise_contrast(latents)
        count, *shape = latents.shape
        places = list(range(len(self.config.timesteps)) if timesteps is None else timesteps)
        if self.training:  # fresh at every step
            noise = torch.randn(count, len(places), *shape, device=latents.device)
        else:
            noise = self.evaluation_noise(latents.shape[1:])[places].to(latents)
        alphas = self.alphas_cumprod()[places]
        return forward_diffusion(latents, noise, alphas, self.config.sigma_normalization)


class ProtoLeakForImageAttribution(DetectorMixin, ProtoLeakPreTrainedModel):
    """
    Which known generator made an image, or none: prototypes for the classes, and a detector for what is
    known, see [`DetectorMixin`].
    """

    def __init__(self, config: ProtoLeakConfig):
        super().__init__(config)
        self.protoleak = ProtoLeakModel(config)
        self.head = PrototypeHead(config)
        self.post_init()

    @property
    def takes_features(self) -> bool:
        """Whether what is pooled can be kept for training, since nothing that is trained comes before."""
        return self.protoleak.encoder.is_frozen

    @without_autocast
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        latents: torch.FloatTensor | Sequence[torch.FloatTensor] | None = None,
        features: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_noisy_latents: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ImageAttributionOutput | tuple:
        r"""
        Args:
            pixel_values, latents, features: As in [`ProtoLeakModel`].
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Classes 0..K-1, for the loss:
                cross-entropy plus `attention_entropy_weight * (log T - H(alpha))`, which keeps the attention
                from collapsing.
        """
        self._drop_detector_in_training()
        inputs = {"pixel_values": pixel_values, "latents": latents, "features": features}
        output = self.classify(labels, **inputs, output_noisy_latents=output_noisy_latents)
        if self.detector is not None and not self.training:  # the boundary: NumPy from here on
            output = ImageAttributionOutput(**output, **self.detector.verdict(output))
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if return_dict else output.to_tuple()

    @without_autocast
    def classify(self, labels: torch.LongTensor | None = None, **inputs: Any) -> ImageAttributionOutput:
        """
        [`~ProtoLeakForImageAttribution.forward`] but for the open-set verdict: pure torch. `inputs` are those
        of [`ProtoLeakModel`].
        """
        model = self.protoleak(**inputs, return_dict=True)
        logits, loss = self.head(model.embeddings, model.gates), None
        if labels is not None:
            loss = F.cross_entropy(logits, labels) + self._attention_loss(model.temporal_weights.float())
        if self.detector is not None and not self.training:
            logits = logits / self.detector.temperature_
        output = ImageAttributionOutput(loss=loss, logits=logits, **model)
        if model.crop_features is not None and not self.training:
            crops = self.classify(features=model.crop_features.flatten(0, 1)).logits
            output.crop_logits = crops.unflatten(0, model.crop_weights.shape)
        return output

    def _attention_loss(self, weights: torch.Tensor) -> torch.Tensor:
        entropy = -(weights * weights.clamp_min(1e-8).log()).sum(dim=1).mean()  # dropped timesteps weigh 0
        return self.config.attention_entropy_weight * (math.log(weights.shape[1]) - entropy)

    @torch.no_grad()
    def initialise_as_discriminant(
        self, discriminants: Sequence[Discriminant], scales: Sequence[float], prototypes: torch.Tensor
    ) -> None:
        """
        Make a new network linear discriminants of its pooled features, from where it learns on: the first
        dimensions of the embedding are their projections.

        Args:
            discriminants (`list[Discriminant]`): One for each of the encoder's families of features, fitted
                to [`LeakEncoder.family_features`] averaged over timesteps.
            scales (`list[float]`): What each counts: the factor of its projection.
            prototypes (`torch.Tensor` of shape `(K, M, D)`): Of each class, in these embeddings.
        """
        for parameter in self.protoleak.gate.output.parameters():
            parameter.zero_()  # every dimension weighs a half
        self.protoleak.encoder.begin_as(discriminants, scales)
        self.head.prototypes.copy_(prototypes)

    @torch.no_grad()
    def explain(self, output: ImageAttributionOutput, **options: Any) -> list[dict[str, Any]]:
        """Why each image of an output got its scores, as plain values: see `explanation_protoleak.py`."""
        return explain(self, output, **options)


__all__ = ["ImageAttributionOutput", "ProtoLeakForImageAttribution", "ProtoLeakModel", "ProtoLeakModelOutput"]
