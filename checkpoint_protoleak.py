"""
A checkpoint's folder: loading and saving it, with all that lies beside the weights (VAE, scheduler, detector,
code), holding the frozen VAE, and the noise schedule.
"""

import json
import math
import os
import shutil
import threading
from collections.abc import Collection, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn
from transformers.utils import cached_file, logging, resolve_revision

from .configuration_protoleak import ProtoLeakConfig
from .vae_protoleak import PixelLayout, load_vae, save_autoencoder

logger = logging.get_logger(__name__)

CODE = "*_protoleak.py"  # what a checkpoint carries of this folder
LICENCE = "LICENSE-APACHE"  # of the frozen network in its weights
PICTURE = "encoder.picture"  # that network, in the base model
HUB_ARGUMENTS = ("cache_dir", "force_download", "token", "revision", "local_files_only")
RESOLVING_ARGUMENTS = ("revision", "token", "local_files_only", "cache_dir")  # what tells a commit
UPLOAD_ARGUMENTS = ("revision", "commit_message", "commit_description", "create_pr")
CHECKPOINT_FILES = (  # what is pushed of a checkpoint's folder, and nothing else that lies there
    "README.md", "config.json", "model*.safetensors*", "adapter_*", "density.pkl", "metrics.json",
    "preprocessor_config.json", "model_index.json", "vae/*", "scheduler/*", "figures/*", CODE, LICENCE,
)  # fmt: skip
LOADING = threading.Lock()  # of what a PixelLayout stands for: threads that ask for it get the same
AUTO_MAP = {
    "AutoConfig": "configuration_protoleak.ProtoLeakConfig",
    "AutoModel": "modeling_protoleak.ProtoLeakModel",
    "AutoModelForImageClassification": "modeling_protoleak.ProtoLeakForImageAttribution",
}
CUSTOM_PIPELINE = {
    "impl": "pipeline_protoleak.ImageAttributionPipeline",
    "pt": ["AutoModelForImageClassification"],
    "type": "image",
}


class WeightsDontFitError(RuntimeError, ValueError):
    """Weights of other shapes than the config's: transformers' RuntimeError, and a ValueError as all here."""


class CheckpointMixin:
    """
    What a Proto-LeakNet model adds to [`PreTrainedModel`]: it holds a frozen VAE, and loads and saves what
    lies beside its weights.

    The VAE is an attribute of the base model, but not a submodule of it: it is in none of `parameters()`,
    `state_dict()` and `train()`, and moves with the model by [`CheckpointMixin._apply`].
    """

    # --- the VAE

    @property
    def vae(self) -> nn.Module | None:
        """The frozen autoencoder, or `None` before one is attached."""
        with LOADING:
            if isinstance(self.held_vae, PixelLayout):
                self.attach_vae(self.held_vae.load())
            return self.held_vae

    @property
    def held_vae(self) -> nn.Module | None:
        """The same, or the [`PixelLayout`] that stands for it as long as that is enough."""
        return vars(self.base_model).get("_vae")

    def attach_vae(self, vae: nn.Module) -> None:
        """Hold `vae`, frozen; its latent channels must be those of the config (`ValueError`)."""
        channels = vae.config.latent_channels
        if channels != self.config.latent_channels:
            raise ValueError(
                f"the VAE has latent_channels = {channels}, but this model was made for "
                f"latent_channels = {self.config.latent_channels}; pass the VAE that it was trained with"
            )
        vars(self.base_model)["_vae"] = vae.requires_grad_(False).eval()  # past the registry of submodules

    def attach_components(self, vae: nn.Module, scheduler) -> None:
        """
        Hold `vae`, and take over the noise schedule of `scheduler`. Where one of them can't be used, or the
        detector wasn't fitted with them, it is a `ValueError`, and all stays as it was.
        """
        vae_before, scheduler_before = self.held_vae, make_scheduler(self.config)
        try:
            if vae is not self.held_vae:
                self.attach_vae(vae)
            self.base_model.set_scheduler(scheduler)
            if self.detector is not None:
                self.check_detector(self.detector)
        except ValueError:
            vars(self.base_model)["_vae"] = vae_before
            self.base_model.set_scheduler(scheduler_before)
            raise

    def drop_decoder(self) -> None:
        """Free the half of the VAE's memory that attribution never needs; the model can't be saved then."""
        if hasattr(self.held_vae, "decoder"):
            self.held_vae.decoder = None

    def _apply(self, fn, recurse: bool = True):
        """What moves the base model (`to`, `cuda`, `cpu`, ...) moves the VAE that it holds."""
        if (vae := vars(self).get("_vae")) is not None:
            vae._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # --- loading

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, vae: nn.Module | None = None, **kwargs
    ):
        """
        As [`PreTrainedModel.from_pretrained`], and attaches the VAE and the fitted detector.

        Args:
            vae (*optional*):
                The autoencoder to hold; by default the checkpoint's `vae/`, else `config.vae_name_or_path`.

        Raises:
            OSError: the weights are damaged, or no VAE can be loaded; the message tells which was looked for
                and how to pass another.
            ValueError: the weights are not finite, not of the config's shapes, or without some that are not
                learned, or the detector doesn't belong to them, or is not safe to read. With
                `ignore_mismatched_sizes=True`, as for a new head, it is left out with a warning.
        """
        name = pretrained_model_name_or_path
        hub = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
        resolving = {argument: hub[argument] for argument in RESOLVING_ARGUMENTS if argument in hub}
        hub["revision"] = resolve_revision(name, **resolving)  # so that all files are of one commit
        options = kwargs | hub | {"output_loading_info": True}
        try:
            model, info = super().from_pretrained(name, *model_args, **options)
        except SafetensorError as error:
            raise OSError(f"model.safetensors of {name} is damaged: {error}; fetch it again") from error
        except RuntimeError as error:  # shapes that are not those of the config
            raise WeightsDontFitError(f"the weights of {name} don't fit: {error}") from error
        check_weights(model, name, info["missing_keys"])
        model.base_model.encoder.freeze()
        hub["subfolder"] = kwargs.get("subfolder") or ""
        model.attach_vae(load_vae(name, model.config, **hub) if vae is None else vae)
        try:
            model._load_detector(name, hub, info["missing_keys"])
        except ValueError as error:
            if not kwargs.get("ignore_mismatched_sizes"):
                raise
            logger.warning("the detector is left out: %s", error)  # a new head was asked for
        vars(model.base_model)["_origin"] = name, hub
        return (model, info) if kwargs.get("output_loading_info") else model

    def _load_detector(self, name: str | os.PathLike, hub: dict[str, Any], missing: Collection[str]) -> None:
        """The base model has no use for a detector."""

    # --- saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs,
    ):
        """
        As [`PreTrainedModel.save_pretrained`]; writes the VAE, the scheduler, the detector and the code
        beside, and then, with `push_to_hub`, uploads the whole checkpoint: see [`upload_checkpoint`].
        """
        upload = {name: kwargs.pop(name) for name in ("private", *UPLOAD_ARGUMENTS) if name in kwargs}
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = {"image-attribution": dict(CUSTOM_PIPELINE)}
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        scheduler = make_scheduler(self.config)
        scheduler.save_pretrained(folder / "scheduler")
        if self.vae is not None:
            self._save_vae(folder, type(scheduler).__name__)
        self._save_detector(folder)
        for file in Path(__file__).parent.glob(CODE):
            (folder / file.name).write_bytes(file.read_bytes())
        if "picture_statistics" in self.config.texture_families:
            self._save_licence(folder)
        mode = (folder / "config.json").stat().st_mode  # safetensors and diffusers keep files to their owner
        for file in (*folder.glob("*.safetensors"), *folder.glob("vae/*")):
            file.chmod(mode)
        if push_to_hub:
            upload_checkpoint(folder, repo_id or folder.resolve().name, token=kwargs.get("token"), **upload)

    def _save_vae(self, folder: Path, scheduler_class: str) -> None:
        """`vae/`, and the index by which diffusers finds it."""
        if getattr(self.vae, "decoder", self.vae) is None:
            raise ValueError("the VAE's decoder was dropped, so it can't be saved; load the model again")
        save_autoencoder(self.vae, folder / "vae")
        index = {
            "_class_name": ["diffusion_protoleak", "ProtoLeakDiffusionPipeline"],
            "vae": ["diffusers", type(self.vae).__name__],
            "scheduler": ["diffusers", scheduler_class],
            "attribution_model": [None, None],
            "image_processor": [None, None],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _save_licence(self, folder: Path) -> None:
        """The frozen network's, from beside this code or the weights that were loaded."""
        file = Path(__file__).parent / LICENCE
        if not file.exists():
            file = _licence(*vars(self.base_model).get("_origin", (None, {})))
        if file is None:
            logger.warning("%s is not here; add it to %s before you pass that on", LICENCE, folder)
        elif file.resolve() != (folder / LICENCE).resolve():
            shutil.copyfile(file, folder / LICENCE)

    def _save_detector(self, folder: Path) -> None:
        """The base model has none."""


def check_weights(model: nn.Module, name: str | os.PathLike, missing: Iterable[str] = ()) -> None:
    """
    Raise `ValueError` where among the `missing` weights from `name` are some that are not learned, those of
    the frozen network and buffers, which hold anything then; or where weights are not finite.
    """
    buffers = dict(model.named_buffers())
    if fixed := sorted(key for key in missing if key in buffers or f"{PICTURE}." in key):
        raise ValueError(
            f"the weights of {name} lack {', '.join(fixed[:3])}{', ...' if fixed[3:] else ''}, which are not "
            f"learned by fine-tuning; fetch the checkpoint again, or train a new one with train.py"
        )
    for weight_name, weight in model.state_dict().items():
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError(f"{weight_name} of {name} has NaN or infinite values")


def _licence(name: str | os.PathLike | None, hub: dict[str, Any]) -> Path | None:
    """Of a checkpoint's frozen network, beside its weights; `None` where it can't be had."""
    if name is None:
        return None
    lenient = ("missing_entries", "connection_errors", "gated_repo")
    options = {f"_raise_exceptions_for_{kind}": False for kind in lenient}
    path = cached_file(name, LICENCE, **options, **hub)
    return None if path is None else Path(path)


def make_scheduler(config: ProtoLeakConfig):
    """The diffusers scheduler whose `alphas_cumprod` is the noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**config.noise_schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def make_alphas_cumprod(config: ProtoLeakConfig) -> torch.Tensor:
    """
    abar of all training timesteps, (num_train_timesteps,), as that scheduler has it: betas as of Ho et al.
    (2020), their roots so spaced (Rombach et al. 2022), or by the cosine of Nichol and Dhariwal (2021).
    """
    steps, first, last = config.num_train_timesteps, config.beta_start, config.beta_end
    options = {"device": "cpu", "dtype": torch.float32}  # whatever a program's defaults are
    if config.beta_schedule == "squaredcos_cap_v2":
        left = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in pairwise(left)]
        betas = torch.tensor(betas, **options)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(first, last, steps, **options)
    else:
        betas = torch.linspace(first**0.5, last**0.5, steps, **options) ** 2
    return (1 - betas).cumprod(dim=0)


def schedule_of(scheduler, config: ProtoLeakConfig) -> dict[str, Any]:
    """
    The noise schedule of a diffusers scheduler as fields of the config.

    Raises:
        ValueError: it has none, or one that these fields alone don't tell.
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"{name} has no alphas_cumprod, which the forward diffusion takes from it")
    schedule = {field: scheduler.config[field] for field in config.noise_schedule}
    expected = make_alphas_cumprod(type(config)(**{**config.to_dict(), **schedule}))
    if not torch.allclose(scheduler.alphas_cumprod.cpu(), expected, atol=1e-6):
        raise ValueError(f"the noise schedule of {name} is not made by {schedule} alone")
    return schedule


def upload_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    **upload: Any,
):
    """
    Push the checkpoint in a folder, in one commit; other files that lie there stay where they are. `upload`
    is what [`~HfApi.upload_folder`] takes besides. Returns its `CommitInfo`.
    """
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return hub.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=list(CHECKPOINT_FILES), **upload
    )
