"""
Pipelines: `ImageAttributionPipeline` for transformers and `ProtoLeakDiffusionPipeline` for diffusers. The
record of one attribution is made here.

This module imports no other of the package: diffusers loads it alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from transformers import AutoImageProcessor, AutoModelForImageClassification, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

TASK = "image-attribution"
UNKNOWN = "unknown"
KDE_OF_EMBEDDINGS = {"embeddings": "kde"}  # the open-set score that is a log density in nats
RECORD_FIELDS = (
    "label", "score", "is_unknown", "p_value", "open_set_score", "prediction_set", "attributions",
)  # fmt: skip


def attribution_record(
    probabilities: torch.Tensor,
    labels: list[str],
    open_set_score: float | None,
    p_value: float | None,
    class_p_values: torch.Tensor | None,
    alpha: float,
) -> dict[str, Any]:
    """
    One attribution as plain values.

    Args:
        probabilities: Of the known classes, (K,), summing to 1.
        labels (`list[str]`): Their names.
        open_set_score (`float`, *optional*), p_value (`float`, *optional*): As in `ImageAttributionOutput`;
            `None` for a model without a detector, which then never answers "unknown".
        class_p_values (*optional*): Label-conditional p-values, (K,).
        alpha (`float`): The verdict is "unknown" when `p_value <= alpha`.

    Returns:
        `dict` with
        - label: a known class, or "unknown";
        - score: the probability of that class among the known ones; for "unknown" 1 - p_value, the share of
          held-out known images that look more like the known classes than this one;
        - is_unknown, p_value, open_set_score;
        - prediction_set: the likeliest class and every other with a p-value above alpha, likeliest first; of
          images by a class, like its held-out ones, at least 1 - alpha have that class in their set. More
          than one: the verdict is ambiguous. Empty when `is_unknown`, `None` without a detector;
        - attributions: every known class with its probability, sorted.
    """
    order = probabilities.argsort(descending=True).tolist()
    attributions = [{"label": labels[k], "score": float(probabilities[k])} for k in order]
    is_unknown = p_value is not None and p_value <= alpha
    prediction_set = None
    if class_p_values is not None:
        likely = [k for k in order if k == order[0] or class_p_values[k] > alpha]
        prediction_set = [] if is_unknown else [labels[k] for k in likely]
    return {
        "label": UNKNOWN if is_unknown else attributions[0]["label"],
        "score": 1 - p_value if is_unknown else attributions[0]["score"],
        "is_unknown": is_unknown,
        "p_value": p_value,
        "open_set_score": open_set_score,
        "prediction_set": prediction_set,
        "attributions": attributions,
    }


class ImageAttributionPipeline(Pipeline):
    """
    Which known generator made an image, or none: `pipeline("image-attribution", model=...,
    trust_remote_code=True)`.

    Takes what [`ProtoLeakImageProcessor`] takes (path, URL, bytes, PIL image, array), or a list of them, and
    returns a record or a list of records, see [`attribution_record`]. `alpha=` overrides the level of the
    "unknown" verdict. With `explain=True` a record also has `explanation`: what
    [`ProtoLeakForImageAttribution.explain`] tells, and `stability`, the verdict on the image after each of
    the processor's `REENCODINGS`, with how many of how many agree; each image is then run alone with these.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.model.config.model_type != "protoleak":
            raise ValueError(
                f"{TASK!r} needs a model of type 'protoleak'; got {self.model.config.model_type!r}. "
                f"Other classifiers run under 'image-classification'"
            )

    def _sanitize_parameters(self, alpha: float | None = None, explain: bool | None = None, **kwargs):
        if kwargs:
            raise ValueError(
                f"the {TASK} pipeline takes alpha and explain besides the inputs; got {sorted(kwargs)}"
            )
        if alpha is not None and not 0 < alpha < 1:
            raise ValueError(f"alpha must be in (0, 1); got alpha={alpha!r}")
        steps = {} if explain is None else {"explain": explain}
        return steps, {}, steps | ({} if alpha is None else {"alpha": alpha})

    def __call__(self, inputs: Any, **kwargs) -> dict[str, Any] | list[dict[str, Any]]:
        """Attribute one image, or a list of images."""
        if isinstance(inputs, list | tuple) and not inputs:
            return []
        if kwargs.get("explain", self._preprocess_params.get("explain")):
            kwargs["batch_size"] = 1  # of one image and its re-encodings
        return super().__call__(inputs, **kwargs)

    def preprocess(self, image: Any, explain: bool = False):
        images = [image, *self.image_processor.reencoded(image)] if explain else image
        return self.image_processor(images, return_tensors="pt")

    def _forward(self, model_inputs):
        return self.model(**model_inputs)

    def postprocess(self, model_outputs, alpha: float | None = None, explain: bool = False) -> dict[str, Any]:
        record, *others = records_of(model_outputs, self.model.config, alpha)
        if explain:
            record["explanation"] = self.model.explain(model_outputs)[0]
            record["explanation"]["stability"] = stability(record, self.image_processor.reencodings, others)
        return record


def records_of(output, config, alpha: float | None = None) -> list[dict[str, Any]]:
    """
    The records of a batch, from an `ImageAttributionOutput`. Where the open-set score is the paper's, the KDE
    of embeddings, they also have it as `log_density`, in nats.
    """
    has_verdict = output.get("p_values") is not None
    records = [
        attribution_record(
            output["logits"][i].double().softmax(dim=0).cpu(),
            config.label_names,
            open_set_score=float(output["open_set_score"][i]) if has_verdict else None,
            p_value=float(output["p_values"][i]) if has_verdict else None,
            class_p_values=output["class_p_values"][i] if has_verdict else None,
            alpha=config.alpha if alpha is None else alpha,
        )
        for i in range(len(output["logits"]))
    ]
    if has_verdict and config.open_set_scores == KDE_OF_EMBEDDINGS:
        records = [record | {"log_density": record["open_set_score"]} for record in records]
    return records


def stability(record: dict[str, Any], treatments: list[str], others: list[dict[str, Any]]) -> dict[str, Any]:
    """How many records of an image after these treatments have the same verdict: `agreeing` of `count`."""
    verdicts = [{"treatment": t, "label": o["label"]} for t, o in zip(treatments, others, strict=True)]
    agreeing = sum(verdict["label"] == record["label"] for verdict in verdicts)
    return {"agreeing": agreeing, "count": len(verdicts), "verdicts": verdicts}


@dataclass
class ProtoLeakPipelineOutput(BaseOutput):
    """
    Args:
        labels (`list[str]`): The verdict for each image, a known class or "unknown".
        scores, open_set_scores, p_values (`list[float]`): As in the records.
        records (`list[dict]`): See [`attribution_record`].
        latents (`torch.FloatTensor`, *optional*):
            The re-simulated z_t, `(batch_size, num_timesteps, channels, height, width)`.
    """

    labels: list[str]
    scores: list[float]
    open_set_scores: list[float | None]
    p_values: list[float | None]
    records: list[dict[str, Any]]
    latents: torch.Tensor | None = None


class ProtoLeakDiffusionPipeline(DiffusionPipeline):
    """
    Attribution as a diffusers pipeline: `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`.

    Components are `vae`, `scheduler` (its noise schedule is what is re-simulated) and `attribution_model`,
    which is loaded on first use and shares the VAE. A VAE or scheduler that is swapped in is used from then
    on; the detector doesn't fit it, which is an error until `attribution_model.detector` is fitted anew or
    `None`.
    """

    _optional_components = ["attribution_model"]

    def __init__(self, vae, scheduler, attribution_model=None):
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler, attribution_model=attribution_model)
        self._image_processor = None

    def _prepare(self):
        """The attribution model with this pipeline's VAE and noise schedule, which its detector must fit."""
        source = self.config._name_or_path
        if self.attribution_model is None:
            model = AutoModelForImageClassification.from_pretrained(
                source, trust_remote_code=True, vae=self.vae
            )
            self.register_modules(attribution_model=model.to(self.vae.device).eval())
        if self._image_processor is None:
            self._image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
        model = self.attribution_model
        if model.vae is not self.vae:
            model.attach_vae(self.vae)
        model.protoleak.set_scheduler(self.scheduler)
        if model.detector is not None:
            model.check_detector(model.detector)
        return model

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        batch_size: int = 16,
        alpha: float | None = None,
        output_latents: bool = False,
        return_dict: bool = True,
    ) -> ProtoLeakPipelineOutput | tuple:
        """
        Args:
            images: One image or a list of them: path, URL, bytes, PIL image, array.
            batch_size (`int`): Images that go through the VAE together.
            alpha (`float`, *optional*): Level of the "unknown" verdict, instead of the config's.
            output_latents (`bool`): Whether to return the re-simulated latents of every timestep.
        """
        model = self._prepare()
        images = images if isinstance(images, list | tuple) else [images]
        records, latents = [], []
        for start in self.progress_bar(range(0, len(images), batch_size)):
            pixel_values = self._image_processor(images[start : start + batch_size])["pixel_values"]
            output = model(pixel_values.to(self.vae.device), output_noisy_latents=output_latents)
            records += records_of(output, model.config, alpha)
            latents.append(output.get("noisy_latents"))
        result = ProtoLeakPipelineOutput(
            labels=[record["label"] for record in records],
            scores=[record["score"] for record in records],
            open_set_scores=[record["open_set_score"] for record in records],
            p_values=[record["p_value"] for record in records],
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

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Write a checkpoint that every loader takes: weights, VAE, detector, processor and code."""
        self._prepare().save_pretrained(save_directory, *args, **kwargs)
        self._image_processor.save_pretrained(save_directory)


if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        TASK, ImageAttributionPipeline, pt_model=AutoModelForImageClassification, type="image"
    )


__all__ = ["ImageAttributionPipeline", "ProtoLeakDiffusionPipeline", "attribution_record"]
