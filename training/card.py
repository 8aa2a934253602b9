"""The model card of a checkpoint: README.md rendered from model_card.md with the metrics of its own run."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.protocol import Evaluation
from ..evaluation.report import TITLES, format_bias_sentence, format_report

TEMPLATE = Path(__file__).parent.parent / "model_card.md"
MARK = "Rendered by protoleak from model_card.md."
PACKAGES = ("torch", "transformers", "diffusers", "datasets", "accelerate", "scikit-learn")
NEEDED = ("torch>=2.13", "transformers>=5.23,<6", "diffusers>=0.42,<0.43", "pillow>=12.3")  # to load it
OF_FOLDER = "imagefolder"  # what the Hub's cards call the type of a data set that is not on it
HUB_METRICS = {
    "accuracy": "accuracy",
    "macro_auc": "roc_auc",
    "brier": "brier_score",
}  # ids that the Hub knows
SHORTCUTS = {"files": "What files say (format, mode, size, metadata)", "source": "The source"}


@dataclass(frozen=True)
class HubFacts:
    """
    What the Hub files a model under.

    Args:
        license (`str`, *optional*): Of the weights; none is stamped on them.
        base_model (`str`, *optional*): Hub id of the model that this one was made from.
        datasets (`Sequence[str]`): Hub ids of what it was trained on.
    """

    license: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()


def write_card(
    folder: Path,
    model: Any,
    origin: str,
    command: str,
    summary: dict[str, Any] | None = None,
    hub: HubFacts = HubFacts(),  # noqa: B008 (it is frozen)
) -> ModelCard | None:
    """
    Write README.md into a checkpoint's folder, unless there is one that this function didn't write.

    Args:
        folder (`Path`): The checkpoint.
        model ([`ProtoLeakForImageAttribution`]): What was saved there.
        origin (`str`): A sentence on where the weights come from.
        command (`str`): What makes the checkpoint again.
        summary (`dict`, *optional*): An [`Evaluation`] as a dict, with `dataset`, and with `warnings` and
            `shortcuts` of the training images; without, the card has no metrics. Drawings in the
            checkpoint's `figures/` are shown.
        hub ([`HubFacts`]): For the card's head.
    """
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return None
    config, summary = model.config, summary or {}
    measured = "splits" in summary
    card = ModelCard.from_template(
        _card_data(folder.resolve().name, summary, hub),
        template_path=str(TEMPLATE),
        title=folder.resolve().name,
        origin=origin,
        command=command,
        labels=config.label_names,
        vae=type(model.vae).__name__,
        install=" ".join(f'"{package}"' for package in NEEDED),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        **{name: getattr(config, name) for name in ("latent_channels", "timesteps", "noise_seed")},
        **{name: getattr(config, name) for name in ("num_prototypes", "alpha", "open_set_title")},
        has_picture="picture_statistics" in config.texture_families,
        scope=config.scope_title,
        warnings=summary.get("warnings", []),
        shortcuts=[
            format_bias_sentence(bias, SHORTCUTS[name]) for name, bias in summary.get("shortcuts", {}).items()
        ],
        thumbnails=0 if model.detector is None else len(model.detector.thumbnails_),
        dataset=summary.get("dataset"),
        report=format_report(Evaluation.from_dict(summary)) if measured else None,
        drawings=sorted(drawing.stem for drawing in (folder / "figures").glob("*.png")),
    )
    card.save(path)
    return card


def _card_data(name: str, summary: dict[str, Any], hub: HubFacts) -> ModelCardData:
    results = []
    if "splits" in summary:
        results = [
            EvalResult(
                task_type="image-classification",
                task_name="Image attribution",
                dataset_type=hub.datasets[0] if len(hub.datasets) == 1 else OF_FOLDER,
                dataset_name=summary["dataset"],
                dataset_split=split,
                metric_type=metric,
                metric_name=title,
                metric_value=of.metrics[metric],
            )
            for split, of in Evaluation.from_dict(summary).splits.items()
            for metric, title in TITLES.items()
            if metric in of.metrics
        ]
    measured = {result.metric_type for result in results}
    return ModelCardData(
        license=hub.license,
        library_name="transformers",
        pipeline_tag="image-attribution",  # `pipeline(model=ID)` of transformers takes its task from here
        tags=[
            "image-attribution",
            "image-classification",
            "synthetic-image-detection",
            "open-set",
            "signal-leak",
        ],
        base_model=hub.base_model,
        datasets=list(hub.datasets) or None,
        metrics=[known for metric, known in HUB_METRICS.items() if metric in measured] or None,
        model_name=name,
        eval_results=results or None,
    )
