"""
A checkpoint's folder: loading and saving it, with all that lies beside the weights (VAE, scheduler, detector,
code), and holding the frozen VAE.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file, logging, resolve_revision

from .configuration_protoleak import ProtoLeakConfig

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
PATCH_ENCODER = {  # shapes of the weights of an encoder that can do no more than lay out pixels
    "conv_in.conv.weight": (3, 3, 3, 3), "conv_in.conv.bias": (3,),
    "conv_out.weight": (12, 12, 3, 3), "conv_out.bias": (12,),
}  # fmt: skip
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
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
        vae_before, scheduler_before = self.vae, make_scheduler(self.config)
        try:
            if vae is not self.vae:
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
        if hasattr(self.vae, "decoder"):
            self.vae.decoder = None

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
        vars(model.base_model)["_licence"] = _licence(name, model.config, hub)
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
        files = Path(__file__).parent / LICENCE, vars(self.base_model).get("_licence")
        file = next((file for file in files if file is not None and file.exists()), None)
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


def _licence(name: str | os.PathLike, config: ProtoLeakConfig, hub: dict[str, Any]) -> Path | None:
    """The licence of a checkpoint's frozen network, beside its weights; `None` where it can't be had."""
    if "picture_statistics" not in config.texture_families:
        return None
    lenient = ("missing_entries", "connection_errors", "gated_repo")
    options = {f"_raise_exceptions_for_{kind}": False for kind in lenient}
    path = cached_file(name, LICENCE, **options, **hub)
    return None if path is None else Path(path)


def make_scheduler(config: ProtoLeakConfig):
    """The diffusers scheduler whose `alphas_cumprod` is the noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**config.noise_schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


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
    expected = make_scheduler(type(config)(**{**config.to_dict(), **schedule})).alphas_cumprod
    if not torch.allclose(scheduler.alphas_cumprod.cpu(), expected, atol=1e-6):
        raise ValueError(f"the noise schedule of {name} is not made by {schedule} alone")
    return schedule


def encode_with(vae: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The scaled posterior mode of a VAE: (N, 3, h, w) in [-1, 1] -> latents (N, C, H, W), float32"""
    # diffusers' `enable_model_cpu_offload` moves the VAE when it is called, but not what it is called with
    hook = getattr(vae, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) or vae.device
    encoded = vae.encode(pixel_values.to(device=device, dtype=vae.dtype))
    if hasattr(encoded, "latent_dist"):  # AutoencoderKL
        latents = encoded.latent_dist.mode()
    else:  # AutoencoderTiny has `latents`, AutoencoderDC `latent`
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor


def lays_out_pixels(vae: nn.Module) -> bool:
    """
    Whether latents are the pixels of 2x2 patches, as those of `make_patch_autoencoder` are: by its weights,
    which may have been changed. Its convolutions take a CPU long for nothing.
    """
    config = vae.config
    if not config.get("encoder_out_shortcut") or config.scaling_factor != 1 or config.get("shift_factor"):
        return False
    weights = dict(vae.encoder.state_dict())
    if {name: tuple(weight.shape) for name, weight in weights.items()} != PATCH_ENCODER:
        return False
    first = weights.pop("conv_in.conv.weight")
    return torch.equal(first, nn.init.dirac_(torch.empty_like(first))) and not any(
        weight.any() for weight in weights.values()
    )


def in_patches(pixel_values: torch.Tensor) -> torch.Tensor:
    """
    `pixel_unshuffle` in half its time: (N, 3, h, w) -> (N, 12, h / 2, w / 2), float32; `ValueError` where h
    or w is odd.
    """
    count, colours, height, width = pixel_values.shape
    if height % 2 or width % 2:
        raise ValueError(
            f"this VAE takes images of even sides, at each of the model's scales; got {width} x {height} "
            f"pixels. Choose a crop_size that is a multiple of twice the largest scale"
        )
    shape = count, colours, 2, 2, height // 2, width // 2
    latents = pixel_values.new_empty(shape, dtype=torch.float32)
    for row in range(2):
        for column in range(2):
            latents[:, :, row, column] = pixel_values[..., row::2, column::2]
    return latents.flatten(1, 3)


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


# --- the VAE's files ----------------------------------------------------------------------------------------


def load_vae(checkpoint: str | os.PathLike, config: ProtoLeakConfig, subfolder: str = "", **hub) -> nn.Module:
    """The VAE in the checkpoint's `vae/`; where there is none, the one that the config names."""
    own = f"{subfolder}/vae" if subfolder else "vae"
    if _vae_folder(checkpoint, own, **hub):
        return load_autoencoder(checkpoint, own, **hub)
    hub["revision"] = config.vae_revision
    return load_autoencoder(_named_vae(checkpoint, config.vae_name_or_path), config.vae_subfolder, **hub)


def _named_vae(checkpoint: str | os.PathLike, name: str) -> str:
    """
    What a config's `vae_name_or_path` means: an absolute folder, one beside the checkpoint's files if it
    begins with a dot, else a Hub id. It never is what happens to lie in the working directory (`OSError`).
    """
    if name.startswith(".") and Path(checkpoint).is_dir():
        return str(Path(checkpoint, name).resolve())
    if not Path(name).is_absolute() and (name.startswith(".") or Path(name).exists()):
        raise OSError(
            f"{checkpoint} has no vae/ folder, and its config's vae_name_or_path = {name!r} would be in the "
            f"working directory; pass an autoencoder with from_pretrained(..., vae=)"
        )
    return name


def has_vae_folder(name: str | os.PathLike, **hub) -> bool:
    """Whether the Hub id or folder has its autoencoder in `vae/`, as checkpoints and pipelines do."""
    return _vae_folder(name, "vae", **hub) is not None


def _vae_folder(name: str | os.PathLike, subfolder: str | None, **hub) -> Path | None:
    """The folder on this machine with an autoencoder's config, `None` where there is none."""
    if Path(name).is_absolute() or Path(name).is_dir():
        folder = Path(name, subfolder or "").resolve()
        return folder if (folder / "config.json").exists() else None
    options = {"subfolder": subfolder or "", "_raise_exceptions_for_missing_entries": False}
    path = cached_file(name, "config.json", **options, **hub)
    return None if path is None else Path(path).parent


def load_autoencoder(name: str | os.PathLike, subfolder: str | None = None, **hub) -> nn.Module:
    """
    An autoencoder of diffusers from a Hub id or a folder. Its config's `_name_or_path` is the folder on this
    machine that its files are in, and its dtype theirs.

    Raises:
        OSError: telling which, why, and how to pass another.
    """
    import diffusers

    try:
        vae = diffusers.AutoModel.from_pretrained(str(name), subfolder=subfolder, **hub)
        folder = _vae_folder(name, subfolder, **hub)
        vae.register_to_config(_name_or_path=str(folder))
        nn.Module.to(vae, _stored_dtype(folder / VAE_WEIGHTS))
    except Exception as error:  # also what a missing, gated or damaged repository raises
        raise OSError(
            f"the VAE {str(name)!r} (subfolder {subfolder!r}, revision {hub.get('revision')!r}) can't be "
            f"loaded: {error}; pass one with from_pretrained(..., vae=AutoencoderKL.from_pretrained(FOLDER)) "
            f"or set config.vae_name_or_path to a local folder"
        ) from error
    return vae


def _stored_dtype(file: Path) -> torch.dtype:
    """Of the weights in a file; float32 where there is no such, as of weights in several files."""
    if not file.exists():
        return torch.float32
    with safe_open(file, framework="pt") as stored:
        return stored.get_tensor(next(iter(stored.keys()))).dtype


def save_autoencoder(vae: nn.Module, folder: Path) -> None:
    """
    Write an autoencoder. Files that it was loaded from are copied byte by byte where they still say the same:
    a precision to compute with is not one to save, and another version of diffusers no reason to write anew.
    """
    source = vae.config.get("_name_or_path")
    source = None if source is None else Path(source).resolve()
    if source is None or not _has_weights_of(source / VAE_WEIGHTS, vae):
        vae.save_pretrained(folder)
    elif source != folder.resolve():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / VAE_WEIGHTS, folder / VAE_WEIGHTS)
    content = json.loads(vae.to_json_string())
    content.pop("_name_or_path", None)  # a place on this machine
    if source is not None and (stored := source / "config.json").exists():
        earlier = json.loads(stored.read_text())
        if earlier | {"_diffusers_version": content["_diffusers_version"]} == content:
            content = earlier
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _has_weights_of(file: Path, vae: nn.Module) -> bool:
    """Whether a file has these weights, perhaps more precisely."""
    weights = vae.state_dict()
    try:
        with safe_open(file, framework="pt") as stored:
            return set(stored.keys()) == set(weights) and all(
                torch.equal(stored.get_tensor(name).to(weight.dtype), weight.cpu())
                for name, weight in weights.items()
            )
    except (OSError, SafetensorError):  # it is gone, or not whole
        return False
