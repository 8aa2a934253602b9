"""
The transformers pipeline: `ImageAttributionPipeline`. The record of one attribution, and its verdict in
words, are made here.
"""

from numbers import Real
from typing import Any

import torch
from transformers import AutoModelForImageClassification, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

TASK = "image-attribution"
UNKNOWN = "unknown"
REAL = "real"  # the class of photographs; every other is a generator
CAMERA, GENERATED, CANT_TELL = "camera", "generated", "can't tell"  # the origins
NO_EVIDENCE = "no evidence"  # a label
LACKS = {  # what the image processor's `no_evidence` says
    1: "the picture is too small",
    2: "the picture is flat or too smooth",
    3: "the picture is nothing but noise",
}
LISTED = 3  # so many classes at most are named in a verdict
KDE_OF_EMBEDDINGS = {"embeddings": "kde"}  # the open-set score that is a log density in nats
RECORD_FIELDS = (
    "verdict", "origin", "label", "score", "is_unknown", "p_value", "generated_p_value", "open_set_score",
    "prediction_set", "ruled_out", "attributions", "scope",
)  # fmt: skip
BEFORE = ("timeout", "stability", "explain")  # what the pipeline takes, for inputs, and for records
AFTER = ("explain", "alpha", "camera_alpha", "top_k")
FACTS = ("no_evidence", "image_size")  # of images, which pass the model by


def attribution_record(
    probabilities: torch.Tensor,
    labels: list[str],
    open_set_score: float | None,
    p_value: float | None,
    class_p_values: torch.Tensor | None,
    generated_p_value: float | None,
    alpha: float,
    camera_alpha: float,
    scope: str | None = None,
) -> dict[str, Any]:
    """
    One attribution as plain values.

    Args:
        probabilities, labels (`list[str]`): Of the known classes, (K,), summing to 1, and their names.
        open_set_score, p_value, generated_p_value (`float`, *optional*): As in `ImageAttributionOutput`;
            `None` for a model without a detector, which then never answers "unknown".
        class_p_values (*optional*): Label-conditional p-values, (K,).
        alpha (`float`): "unknown" needs `p_value <= alpha`, and what rules a class out is its own p-value.
        camera_alpha (`float`): "camera" needs `generated_p_value <= camera_alpha`.
        scope (`str`, *optional*): What images the model is valid for, in words.

    Returns:
        `dict` with
        - verdict: all in one sentence;
        - origin: "camera", where "real" is likeliest and `camera_alpha` rules out all generators, known or
          not; "generated", where "real" is ruled out; else "can't tell". `None` without "real" or a detector;
        - label, score: a known class and its probability among these, or "unknown" and 1 - p_value;
        - is_unknown, p_value, generated_p_value, open_set_score;
        - prediction_set: the likeliest class and every other with a p-value above alpha, likeliest first; of
          images by a class, like its calibration images, at least 1 - alpha have it in their set. Empty when
          `is_unknown`, `None` without a detector;
        - ruled_out: the classes with a p-value of at most alpha that are not in the prediction set, and all
          generators for a camera, likeliest first; `None` without a detector;
        - attributions: every known class with its probability; and scope.
    """
    order = probabilities.argsort(descending=True).tolist()
    attributions = [{"label": labels[k], "score": float(probabilities[k])} for k in order]
    is_unknown = p_value is not None and p_value <= alpha
    sets, names = (None, None), [labels[k] for k in order]
    if class_p_values is not None:
        camera = _is_camera(names[0], is_unknown, generated_p_value, camera_alpha)
        is_low = class_p_values[order] <= alpha
        sets = (names[:1], names[1:]) if camera else _sets(names, is_low, is_unknown)
    record = {
        "origin": None,
        "label": UNKNOWN if is_unknown else attributions[0]["label"],
        "score": 1 - p_value if is_unknown else attributions[0]["score"],
        "is_unknown": is_unknown,
        "p_value": p_value,
        "generated_p_value": generated_p_value,
        "open_set_score": open_set_score,
        "prediction_set": sets[0],
        "ruled_out": sets[1],
        "attributions": attributions,
        "scope": scope,
    }
    record["origin"] = _origin(record, camera_alpha)
    return {"verdict": verdict_sentence(record)} | record


def without_evidence(record: dict[str, Any], lack: int) -> dict[str, Any]:
    """
    A record of a picture that lacks something, a key of `LACKS`: "no evidence" is its label and its verdict,
    it has no score, nothing is ruled out and no origin told. What was measured stays.
    """
    changes = {"verdict": f"{NO_EVIDENCE}: {LACKS[lack]}", "label": NO_EVIDENCE, "score": None}
    if record["origin"] is not None:
        changes["origin"] = CANT_TELL
    if record["prediction_set"] is not None:
        names = [attribution["label"] for attribution in record["attributions"]]
        changes |= {"prediction_set": names, "ruled_out": []}
    return record | changes | {"is_unknown": False}


def _sets(names: list[str], is_low: torch.Tensor, is_unknown: bool) -> tuple[list[str], list[str]]:
    """`prediction_set` and `ruled_out` of names, likeliest first, and whether each one's p-value is low."""
    out = [name for i, name in enumerate(names) if is_low[i] and (is_unknown or i > 0)]
    return [] if is_unknown else [name for name in names if name not in out], out


def _is_camera(label: str, is_unknown: bool, generated_p_value: float | None, camera_alpha: float) -> bool:
    """Whether "a camera" is said of an image whose likeliest class is `label`."""
    low = generated_p_value is not None and generated_p_value <= camera_alpha
    return label == REAL and not is_unknown and low


def _origin(record: dict[str, Any], camera_alpha: float) -> str | None:
    p_value = record["generated_p_value"]
    if p_value is None:
        return None
    if _is_camera(record["label"], record["is_unknown"], p_value, camera_alpha):
        return CAMERA
    return GENERATED if REAL in record["ruled_out"] else CANT_TELL


def verdict_sentence(record: dict[str, Any]) -> str:
    """
    What a record says, in the words that are used everywhere. It takes `origin`, `is_unknown`, `label`,
    `prediction_set` and `attributions`; where no origin is told, it names the classes alone.
    """
    origin, names, count = record["origin"], record["prediction_set"], len(record["attributions"])
    doubt = f"{CANT_TELL} whether a camera or a generator: "
    if origin == CAMERA:
        return "a camera"
    if record["is_unknown"]:
        if origin == GENERATED:
            return "generated, by no generator that the model knows"
        return f"{'' if origin is None else doubt}like no class that the model knows"
    if names is None:  # nothing is ruled out without a detector
        return f"of {count} classes likeliest {record['label']}"
    if origin == CANT_TELL:
        fitting = listed(names) if len(names) <= LISTED else f"{len(names)} of {count} classes"
        return f"{doubt}{fitting} {'fits' if len(names) == 1 else 'fit'}"
    kind = "known generators" if origin == GENERATED else "known classes"
    by = listed(names) if len(names) <= LISTED else f"one of {len(names)} {kind}"
    return f"generated, by {by}" if origin == GENERATED else by


def listed(names: list[str]) -> str:
    """ "a", "a or b", "a, b or c" """
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


class ImageAttributionPipeline(Pipeline):
    """
    Which known generator made an image, or none: `pipeline("image-attribution", model=...,
    trust_remote_code=True)`.

    Takes what [`ProtoLeakImageProcessor`] takes (path, URL, bytes, PIL image, array), and returns its record,
    see [`attribution_record`]; or several (a list, a tuple, a column of a data set), and returns a list of
    records. `timeout=` is how many seconds a URL may take, `top_k=` how many classes a record's attributions
    have at most; `alpha=` and `camera_alpha=` override the config's levels of the verdict. With
    `stability=True` a record also has `stability`, see [`with_stability`], and with `explain=True` besides
    `explanation`: what [`ProtoLeakForImageAttribution.explain`] tells, and `treatments`, the verdict on the
    image after each of the processor's; each image is then run alone with these.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        kwargs.pop("local_files_only", None)  # `pipeline()` loads by it, and hands it on
        super().__init__(*args, **kwargs)
        if self.model.config.model_type != "protoleak":
            raise ValueError(
                f"{TASK!r} needs a model of type 'protoleak'; got {self.model.config.model_type!r}. "
                f"Other classifiers run under 'image-classification'"
            )

    def _sanitize_parameters(self, **options: Any):
        allowed = dict.fromkeys((*BEFORE, *AFTER))
        if unknown := set(options) - set(allowed):
            raise ValueError(
                f"the {TASK} pipeline takes {', '.join(allowed)} besides the inputs; got {sorted(unknown)}"
            )
        options = {name: value for name, value in options.items() if value is not None}
        check_options(options)
        before = {name: options[name] for name in BEFORE if name in options}
        return before, {}, {name: value for name, value in options.items() if name in AFTER}

    def __call__(self, inputs: Any, **kwargs) -> dict[str, Any] | list[dict[str, Any]]:
        """Attribute one image, or a list of images."""
        self.model.check_processor(self.image_processor)
        several = self.image_processor.several(inputs)
        if several is not None and not len(several):
            return []
        if any(kwargs.get(name, self._preprocess_params.get(name)) for name in ("stability", "explain")):
            kwargs["batch_size"] = 1  # of one image and what it is after each treatment
        if several is None or isinstance(several, list):
            return super().__call__(inputs if several is None else several, **kwargs)
        return list(super().__call__((image for image in several), **kwargs))  # opened one after another

    def preprocess(
        self, image: Any, explain: bool = False, stability: bool = False, **timeout: float
    ) -> dict[str, Any]:
        image = self.image_processor.open(image, **timeout)
        treat = explain or stability
        inputs = self.image_processor.with_treated(image) if treat else self.image_processor(image)
        pixel_values, facts = inputs["pixel_values"], {"no_evidence": inputs["no_evidence"]}
        # transformers fills tensors of different lengths up with zeros, but for those named "pixel_values"
        name = "pixel_values" if pixel_values.ndim == 4 else "crops"
        return {name: pixel_values} | facts | ({"image_size": image.size} if treat else {})

    def _forward(self, model_inputs: dict[str, Any]):
        facts = {name: model_inputs.pop(name) for name in FACTS if name in model_inputs}
        (pixel_values,) = model_inputs.values()
        output = self.model(pixel_values, return_dict=True)
        for name, fact in facts.items():
            output[name] = fact
        return output

    def postprocess(self, model_outputs, explain: bool = False, **options: Any) -> dict[str, Any]:
        record, *others = records_of(model_outputs, self.model.config, **options)
        record = with_stability(record, others) if others else record
        if explain:
            boxes = self.image_processor.crop_boxes(*model_outputs["image_size"])
            crop_boxes = [boxes] * len(model_outputs["logits"])
            record["explanation"] = self.model.explain(model_outputs, crop_boxes=crop_boxes)[0]
            record["explanation"]["treatments"] = [
                {"treatment": treatment, "verdict": other["verdict"], "kept": is_kept(record, other)}
                for treatment, other in zip(self.image_processor.treatments, others, strict=True)
            ]
        return record


def check_options(options: dict[str, Any]) -> None:
    """Raise `ValueError` unless what is given of `timeout`, the levels and `top_k` is in its range."""
    timeout = options.get("timeout")
    if timeout is not None and not (isinstance(timeout, Real) and timeout > 0):
        raise ValueError(f"timeout must be a number of seconds above 0; got timeout={timeout!r}")
    for name in ("alpha", "camera_alpha"):
        level = options.get(name)
        if level is not None and not (isinstance(level, Real) and 0 < level < 1):
            raise ValueError(f"{name} must be a number in (0, 1); got {name}={level!r}")
    top_k = options.get("top_k")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k must be an integer of at least 1; got top_k={top_k!r}")


def records_of(
    output,
    config,
    alpha: float | None = None,
    camera_alpha: float | None = None,
    top_k: int | None = None,
    no_evidence: Any = None,
) -> list[dict[str, Any]]:
    """
    The records of a batch, from an `ImageAttributionOutput`, at the config's levels or at other ones. Where
    the open-set score is the paper's, the KDE of embeddings, they also have it as `log_density`, in nats.
    With `top_k` they have the likeliest attributions alone. `no_evidence` is the image processor's,
    (batch_size,); by default what the output has, or none.
    """
    check_options({"alpha": alpha, "camera_alpha": camera_alpha, "top_k": top_k})
    has_verdict = output.get("p_values") is not None
    levels = {
        "alpha": config.alpha if alpha is None else alpha,
        "camera_alpha": config.camera_alpha if camera_alpha is None else camera_alpha,
    }

    def value(name: str, i: int) -> float | None:
        return None if output.get(name) is None else float(output[name][i])

    records = [
        attribution_record(
            output["logits"][i].double().softmax(dim=0).cpu(),
            config.label_names,
            open_set_score=value("open_set_score", i),
            p_value=value("p_values", i),
            class_p_values=output["class_p_values"][i] if has_verdict else None,
            generated_p_value=value("generated_p_values", i),
            scope=config.scope_title,
            **levels,
        )
        for i in range(len(output["logits"]))
    ]
    if has_verdict and config.open_set_scores == KDE_OF_EMBEDDINGS:
        records = [record | {"log_density": record["open_set_score"]} for record in records]
    lacks = output.get("no_evidence") if no_evidence is None else no_evidence
    for i, lack in enumerate([] if lacks is None else map(int, lacks)):
        records[i] = without_evidence(records[i], lack) if lack else records[i]
    return [record | {"attributions": record["attributions"][:top_k]} for record in records]


def with_stability(record: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """
    A record with `stability`: after how many treatments of the image its verdict is `kept`, `of` how many.
    Where it is not kept after all of them, the verdict says so.

    Args:
        others (`list[dict]`): The records of the same image after each treatment.
    """
    kept, of = sum(is_kept(record, other) for other in others), len(others)
    doubt = f"; but it changes when the image is saved again (kept {kept} of {of} times)"
    verdict = record["verdict"] + (doubt if kept < of else "")
    return record | {"verdict": verdict, "stability": {"kept": kept, "of": of}}


def is_kept(record: dict[str, Any], other: dict[str, Any]) -> bool:
    """
    Whether another record tells the same: the origin, whether the image is unknown, and, if not, that the
    likeliest class fits.
    """
    same = all(record[name] == other[name] for name in ("origin", "is_unknown"))
    fitting = [other["label"], *(other["prediction_set"] or [])]
    return same and (record["is_unknown"] or record["label"] in fitting)


if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        TASK, ImageAttributionPipeline, pt_model=AutoModelForImageClassification, type="image"
    )


__all__ = [
    "ImageAttributionPipeline",
    "attribution_record",
    "records_of",
    "verdict_sentence",
]
