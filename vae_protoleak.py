"""
The frozen autoencoder: its files, what it makes of pixels, and what stands for it where that is known.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import nn
from transformers.utils import cached_file

from .configuration_protoleak import ProtoLeakConfig

PATCH_ENCODER = {  # shapes of the weights of an encoder that can do no more than lay out pixels
    "conv_in.conv.weight": (3, 3, 3, 3), "conv_in.conv.bias": (3,),
    "conv_out.weight": (12, 12, 3, 3), "conv_out.bias": (12,),
}  # fmt: skip
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


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
    which may have been changed. Its convolutions take a CPU long for nothing, and a GPU rounds in them.
    """
    if isinstance(vae, PixelLayout) or torch.compiler.is_compiling() or vae.device.type == "meta":
        return isinstance(vae, PixelLayout)  # values can't be looked at
    return _is_plain(vae.config) and _is_identity(vae.encoder.state_dict())


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a config adds nothing to an encoder's convolutions but a shortcut over the last."""
    shifted = config.get("scaling_factor") != 1 or config.get("shift_factor")
    return bool(config.get("encoder_out_shortcut")) and not shifted


def _is_of_patches(config: Mapping[str, Any]) -> bool:
    channels = PATCH_ENCODER["conv_out.bias"][0]
    return (config.get("_class_name"), config.get("latent_channels")) == ("AutoencoderDC", channels)


def _is_identity(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are an encoder's that hands pixels on."""
    if {name: tuple(weight.shape) for name, weight in weights.items()} != PATCH_ENCODER:
        return False
    first, *others = (weights[name] for name in PATCH_ENCODER)
    return torch.equal(first, nn.init.dirac_(torch.empty_like(first))) and not any(x.any() for x in others)


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


class PixelLayout(nn.Module):
    """
    Stands for an autoencoder that lays out pixels until something else of it is wanted: to import diffusers
    takes longer than a verdict. It has the autoencoder's device and dtype, and is moved as one.

    Args:
        folder (`str`): Where its files are.
        config (`dict`): Of the autoencoder.
        weights (`dict[str, torch.Tensor]`): All of it.
    """

    def __init__(self, folder: str, config: dict[str, Any], weights: dict[str, torch.Tensor]):
        super().__init__()
        self.folder, self.config, self._weights = folder, SimpleNamespace(**config), weights
        self.register_buffer("moved", torch.empty(0, dtype=next(iter(weights.values())).dtype))

    @property
    def device(self) -> torch.device:
        return self.moved.device

    @property
    def dtype(self) -> torch.dtype:
        return self.moved.dtype

    def load(self) -> nn.Module:
        """The autoencoder of diffusers, an `AutoencoderDC`."""
        from diffusers import AutoencoderDC

        with torch.device("meta"):
            vae = AutoencoderDC.from_config(vars(self.config))
        try:
            vae.load_state_dict(self._weights, assign=True)
        except RuntimeError as error:
            raise OSError(f"the VAE in {self.folder} is not whole: {error}; fetch it again") from error
        vae.register_to_config(_name_or_path=self.folder)
        return nn.Module.to(vae, self.device, self.dtype)


# --- the VAE's files ----------------------------------------------------------------------------------------


def load_vae(checkpoint: str | os.PathLike, config: ProtoLeakConfig, subfolder: str = "", **hub) -> nn.Module:
    """
    The VAE in the checkpoint's `vae/`, or a [`PixelLayout`] where it does no more than that; where there is
    none, the one that the config names.
    """
    own = f"{subfolder}/vae" if subfolder else "vae"
    if folder := _vae_folder(checkpoint, own, **hub):
        return _pixel_layout(folder, checkpoint, own, **hub) or load_autoencoder(checkpoint, own, **hub)
    hub["revision"] = config.vae_revision
    return load_autoencoder(_named_vae(checkpoint, config.vae_name_or_path), config.vae_subfolder, **hub)


def _pixel_layout(folder: Path, name: str | os.PathLike, subfolder: str, **hub) -> PixelLayout | None:
    """`None` also where files can't be read, which [`load_autoencoder`] then says."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict) or not _is_plain(config) or not _is_of_patches(config):
            return None
        weights = load(Path(cached_file(name, VAE_WEIGHTS, subfolder=subfolder, **hub)).read_bytes())
    except (OSError, ValueError, SafetensorError):
        return None
    encoder = {key.removeprefix("encoder."): x for key, x in weights.items() if key.startswith("encoder.")}
    return PixelLayout(str(folder), config, weights) if _is_identity(encoder) else None


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
