"""
The diffusers pipeline: `ProtoLeakDiffusionPipeline`.

This module imports no other of the package: diffusers runs it anew for each checkpoint of a process, but not
what it would import.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
)
from diffusers.utils import BaseOutput
from huggingface_hub import snapshot_download
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)

HUB_ARGUMENTS = ("cache_dir", "force_download", "token", "revision", "local_files_only")
CHECKPOINT_FILES = (  # what is loaded
    "*_protoleak.py", "config.json", "model*.safetensors*", "density.pkl", "preprocessor_config.json",
    "model_index.json", "vae/*", "scheduler/*",
)  # fmt: skip
BY_DIFFUSERS = __name__.startswith("diffusers_modules.")  # it runs a checkpoint's copy where it is trusted
LISTS = (  # what a diffusers output has of all records, as lists
    "label", "verdict", "origin", "score", "open_set_score", "p_value", "generated_p_value",
)  # fmt: skip


@dataclass
class ProtoLeakPipelineOutput(BaseOutput):
    """
    Args:
        labels (`list[str]`): The verdict for each image, a known class or "unknown".
        verdicts (`list[str]`): The same in a sentence each.
        origins (`list[str]`), scores, open_set_scores, p_values, generated_p_values (`list[float]`):
            As in the records.
        records (`list[dict]`): See [`attribution_record`].
        latents (`torch.FloatTensor`, *optional*):
            The re-simulated z_t, `(batch_size, num_timesteps, channels, height, width)`.
    """

    labels: list[str]
    verdicts: list[str]
    origins: list[str | None]
    scores: list[float | None]
    open_set_scores: list[float | None]
    p_values: list[float | None]
    generated_p_values: list[float | None]
    records: list[dict[str, Any]]
    latents: torch.Tensor | None = None


def checkpoint_folder(name: str, vae: torch.nn.Module | None) -> str:
    """
    The folder on this machine with all files of the checkpoint that a pipeline with this VAE was loaded from.
    `name` is a folder, or a Hub id: which commit of it was asked for, the place of the VAE's files tells.

    Raises:
        ValueError: it doesn't tell.
    """
    if Path(name).is_dir():
        return str(Path(name).resolve())
    snapshot = Path("" if vae is None else vae.config.get("_name_or_path", "")).parent
    repository = f"models--{name.replace('/', '--')}"
    if snapshot.parts[-3:-1] != (repository, "snapshots"):  # CACHE/models--a--b/snapshots/COMMIT
        raise ValueError(
            f"which revision of {name!r} is meant can't be told when its VAE is not loaded with it: set "
            f"pipe.vae afterwards, or give a folder, as snapshot_download({name!r}, revision=...) returns it"
        )
    place = {"revision": snapshot.name, "cache_dir": snapshot.parents[2]}
    return snapshot_download(name, **place, allow_patterns=list(CHECKPOINT_FILES))


class ProtoLeakDiffusionPipeline(DiffusionPipeline):
    """
    Attribution as a diffusers pipeline: `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`,
    or `ProtoLeakDiffusionPipeline.from_pretrained(FOLDER)` where the package is installed.

    Components are `vae`, `scheduler` (its noise schedule is what is re-simulated), `attribution_model`, which
    shares the VAE, and `image_processor`. A VAE or scheduler that is swapped in is used from then on; the
    detector doesn't fit it, which is an error until `attribution_model.detector` is fitted anew or `None`.
    """

    model_cpu_offload_seq = "vae->attribution_model"
    _optional_components = ["vae", "attribution_model", "image_processor"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC | AutoencoderTiny,
        scheduler: DDIMScheduler | DDPMScheduler,
        attribution_model: PreTrainedModel | None = None,
        image_processor: BaseImageProcessor | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            scheduler=scheduler,
            attribution_model=attribution_model,
            image_processor=image_processor,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As [`DiffusionPipeline.from_pretrained`]; the installed package runs no code of the checkpoint."""
        name = str(pretrained_model_name_or_path)
        if not BY_DIFFUSERS and not Path(name).is_dir():
            hub = {argument: kwargs.pop(argument) for argument in HUB_ARGUMENTS if argument in kwargs}
            name = snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES), **hub)
        return super().from_pretrained(name, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """What model_index.json says; for the installed package without the file of code that it names."""
        config = super().load_config(*args, **kwargs)
        return config if BY_DIFFUSERS else config | {"_class_name": cls.__name__}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """As [`DiffusionPipeline.from_pipe`]; what another kind of pipeline doesn't have, is to be passed."""
        for name in ("attribution_model", "image_processor"):  # no code of where it is from is run for them
            if kwargs.get(name, getattr(pipeline, name, None)) is None:
                raise ValueError(f"{type(pipeline).__name__} has no {name}; pass {name}=")
        return super().from_pipe(pipeline, **kwargs)

    def register_to_config(self, **kwargs) -> None:
        """`from_pretrained` ends with it, telling where it loaded from; the rest is loaded from there too."""
        super().register_to_config(**kwargs)
        if name := kwargs.get("_name_or_path"):
            self._load_rest(str(name))

    def _load_rest(self, name: str) -> None:
        """The components that diffusers can't load, from the very files that the others are from."""
        if self.attribution_model is not None and self.image_processor is not None:
            return
        folder, trust = checkpoint_folder(name, self.vae), {"trust_remote_code": BY_DIFFUSERS}
        config = Path(folder, "config.json")
        kind = json.loads(config.read_text()).get("model_type") if config.exists() else None
        if kind != "protoleak":
            raise ValueError(f"{name} has model_type {kind!r}, not 'protoleak'; pass attribution_model=")
        if self.image_processor is None:
            processor = AutoImageProcessor.from_pretrained(folder, **trust)
            self.register_modules(image_processor=processor)
        if self.attribution_model is None:
            own = self.vae is not None and Path(self.vae.config.get("_name_or_path", "")).resolve()
            vae = self.vae if own == Path(folder, "vae").resolve() else None
            model = AutoModelForImageClassification.from_pretrained(folder, **trust, vae=vae)
            device = model.device if self.vae is None else self.vae.device
            self.register_modules(attribution_model=model.to(device).eval())

    def _prepare(self):
        """The attribution model with this pipeline's VAE and noise schedule, which its detector must fit."""
        missing = [name for name, component in self.components.items() if component is None]
        if missing:
            raise ValueError(f"the pipeline has no {' and no '.join(missing)}; set pipe.{missing[0]}")
        self.attribution_model.attach_components(self.vae, self.scheduler)
        self.attribution_model.check_processor(self.image_processor)
        return self.attribution_model

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        batch_size: int = 16,
        alpha: float | None = None,
        camera_alpha: float | None = None,
        output_latents: bool = False,
        return_dict: bool = True,
        top_k: int | None = None,
        timeout: float | None = None,
    ) -> ProtoLeakPipelineOutput | tuple:
        """
        Args:
            images: One image or several, as [`ImageAttributionPipeline`] takes them.
            batch_size (`int`): Images that go through the VAE together.
            alpha, camera_alpha (`float`, *optional*): Levels of the verdict, instead of the config's.
            top_k (`int`, *optional*): How many classes a record's attributions have at most.
            timeout (`float`, *optional*): How many seconds a URL may take, instead of the processor's.
            output_latents (`bool`): Whether to return the re-simulated latents of every timestep.
        """
        model, processor = self._prepare(), self.image_processor
        levels = {"alpha": alpha, "camera_alpha": camera_alpha, "top_k": top_k}
        model.check_options(levels | {"timeout": timeout})
        several = processor.several(images)
        images = [images] if several is None else several
        waiting = {} if timeout is None else {"timeout": timeout}
        records, latents = [], []
        for start in self.progress_bar(range(0, len(images), batch_size)):
            opened = [processor.open(image, **waiting) for image in images[start : start + batch_size]]
            inputs = processor(opened)
            pixel_values = inputs["pixel_values"].to(self._execution_device)
            output = model(pixel_values, output_noisy_latents=output_latents, return_dict=True)
            records += model.records(output, **levels, no_evidence=inputs["no_evidence"])
            latents.append(output.get("noisy_latents"))
        self.maybe_free_model_hooks()
        result = ProtoLeakPipelineOutput(
            **{f"{name}s": [record[name] for record in records] for name in LISTS},
            records=records,
            latents=torch.cat(latents) if output_latents and latents else None,
        )
        return result if return_dict else result.to_tuple()

    def enable_vae_slicing(self) -> None:
        """Encode one image after another."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode a batch at once again."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode large images in tiles."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode whole images again."""
        self.vae.disable_tiling()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs,
    ) -> None:
        """
        Write a checkpoint that every loader takes: weights, VAE, detector, processor and code. `push_to_hub`,
        `repo_id`, `private` and the like are those of the attribution model's `save_pretrained`.
        """
        if not safe_serialization or variant is not None:
            raise ValueError("a checkpoint is saved as safetensors, and has no variants")
        model = self._prepare()
        self.image_processor.save_pretrained(save_directory)  # before the model, which uploads all
        model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> None:
        """Upload what [`~ProtoLeakDiffusionPipeline.save_pretrained`] writes, as it takes `private` etc."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)


__all__ = ["ProtoLeakDiffusionPipeline"]
