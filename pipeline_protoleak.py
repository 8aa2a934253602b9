"""Pipelines: `ImageAttributionPipeline` for transformers; the record of one attribution is made here."""

from typing import Any

import torch
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

TASK = "image-attribution"
UNKNOWN = "unknown"
RECORD_FIELDS = ("label", "score", "is_unknown", "p_value", "log_density", "attributions")


def attribution_record(
    probabilities: torch.Tensor,
    labels: list[str],
    log_density: float | None,
    p_value: float | None,
    alpha: float,
) -> dict[str, Any]:
    """
    One attribution as plain values.

    Args:
        probabilities: Of the known classes, (K,), summing to 1.
        labels (`list[str]`): Their names.
        log_density (`float`, *optional*), p_value (`float`, *optional*): As in `ImageAttributionOutput`;
            `None` for a model
            without a density, which then never answers "unknown".
        alpha (`float`): The verdict is "unknown" when `p_value <= alpha`.

    Returns:
        `dict` with
        - label: a known class, or "unknown";
        - score: the probability of that class among the known ones; for "unknown" 1 - p_value, the share of
          held-out known
          images that look more like the known classes than this one;
        - is_unknown, p_value, log_density;
        - attributions: every known class with its probability, sorted.
    """
    order = probabilities.argsort(descending=True).tolist()
    attributions = [{"label": labels[k], "score": float(probabilities[k])} for k in order]
    is_unknown = p_value is not None and p_value <= alpha
    return {
        "label": UNKNOWN if is_unknown else attributions[0]["label"],
        "score": 1 - p_value if is_unknown else attributions[0]["score"],
        "is_unknown": is_unknown,
        "p_value": p_value,
        "log_density": log_density,
        "attributions": attributions,
    }


class ImageAttributionPipeline(Pipeline):
    """
    Which known generator made an image, or none: `pipeline("image-attribution", model=...,
    trust_remote_code=True)`.

    Takes what [`ProtoLeakImageProcessor`] takes (path, URL, bytes, PIL image, array), or a list of them, and
    returns a record or a list of records, see [`attribution_record`]. `alpha=` overrides the level of the
    "unknown" verdict.
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

    def _sanitize_parameters(self, alpha: float | None = None, **kwargs):
        if kwargs:
            raise ValueError(f"the {TASK} pipeline takes alpha besides the inputs; got {sorted(kwargs)}")
        if alpha is not None and not 0 < alpha < 1:
            raise ValueError(f"alpha must be in (0, 1); got alpha={alpha!r}")
        return {}, {}, {} if alpha is None else {"alpha": alpha}

    def __call__(self, inputs: Any, **kwargs) -> dict[str, Any] | list[dict[str, Any]]:
        """Attribute one image, or a list of images."""
        if isinstance(inputs, list | tuple) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def preprocess(self, image: Any):
        return self.image_processor(image, return_tensors="pt")

    def _forward(self, model_inputs):
        return self.model(**model_inputs)

    def postprocess(self, model_outputs, alpha: float | None = None) -> dict[str, Any]:
        config = self.model.config
        has_density = model_outputs.get("p_values") is not None
        return attribution_record(
            model_outputs["logits"][0].double().softmax(dim=0),
            [config.id2label[k] for k in range(config.num_labels)],
            log_density=float(model_outputs["log_density"][0]) if has_density else None,
            p_value=float(model_outputs["p_values"][0]) if has_density else None,
            alpha=config.alpha if alpha is None else alpha,
        )


if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    from transformers import AutoModelForImageClassification

    PIPELINE_REGISTRY.register_pipeline(
        TASK, ImageAttributionPipeline, pt_model=AutoModelForImageClassification, type="image"
    )


__all__ = ["ImageAttributionPipeline", "attribution_record"]
