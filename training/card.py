"""The model card of a checkpoint: README.md rendered from model_card.md with the metrics of its own run."""

import importlib.metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.protocol import Evaluation
from ..evaluation.report import TITLES, format_report

TEMPLATE = Path(__file__).parent.parent / "model_card.md"
MARK = "Rendered by protoleak from model_card.md."
PACKAGES = ("torch", "transformers", "diffusers", "datasets", "accelerate", "scikit-learn")


def write_card(
    folder: Path, model: Any, origin: str, command: str, summary: dict[str, Any] | None = None
) -> ModelCard | None:
    """
    Write README.md into a checkpoint's folder, unless there is one that this function didn't write.

    Args:
        folder (`Path`): The checkpoint.
        model ([`ProtoLeakForImageAttribution`]): What was saved there.
        origin (`str`): A sentence on where the weights come from.
        command (`str`): What makes the checkpoint again.
        summary (`dict`, *optional*): An [`Evaluation`] as a dict, with `dataset`; without, the card has no
            metrics. Drawings in the checkpoint's `figures/` are shown.
    """
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return None
    config = model.config
    card = ModelCard.from_template(
        _card_data(folder.resolve().name, summary),
        template_path=str(TEMPLATE),
        title=folder.resolve().name,
        origin=origin,
        command=command,
        labels=config.label_names,
        vae=type(model.vae).__name__,
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        **{name: getattr(config, name) for name in ("latent_channels", "timesteps", "noise_seed")},
        **{name: getattr(config, name) for name in ("num_prototypes", "alpha", "open_set_title")},
        dataset=summary and summary["dataset"],
        report=summary and format_report(Evaluation.from_dict(summary)),
        drawings=sorted(drawing.stem for drawing in (folder / "figures").glob("*.png")),
    )
    card.save(path)
    return card


def _card_data(name: str, summary: dict[str, Any] | None) -> ModelCardData:
    results = []
    if summary is not None:
        splits = Evaluation.from_dict(summary).splits
        results = [
            EvalResult(
                task_type="image-classification",
                task_name="Image attribution",
                dataset_type=summary["dataset"],
                dataset_name=summary["dataset"],
                dataset_split=name,
                metric_type=metric,
                metric_name=title,
                metric_value=split.metrics[metric],
            )
            for name, split in splits.items()
            for metric, title in TITLES.items()
            if metric in split.metrics
        ]
    return ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-attribution", "synthetic-image-detection", "open-set", "signal-leak"],
        datasets=[summary["dataset"]] if summary is not None else None,
        model_name=name,
        eval_results=results or None,
    )
