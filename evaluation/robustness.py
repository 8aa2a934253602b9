"""A checkpoint's metrics again, on images post-processed in every way of `OPERATORS` and `CHAINS`."""

from typing import Any

import numpy as np
from tqdm import tqdm

from ..postprocessing_protoleak import CHAINS, OPERATORS
from ..training.latents import View
from .metrics import compute_metrics
from .predictions import Subject, predict

ROBUSTNESS_METRICS = (
    "macro_auc", "accuracy", "auroc", "false_unknown_rate", "unknown_rejected", "generated_called_camera",
    "unknown_called_camera",
)  # fmt: skip


def measure_robustness(subject: Subject, quick: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """
    The images of a subject's main split, and its unknown ones, post-processed in each way in turn.

    Args:
        quick (`bool`): Every fourth image, or one of a class, and the middle strength of each operator alone.

    Returns:
        A row for each operator and strength, the untouched images first: `operator`, `strength`, `num_test`
        and `num_unknown` images, those of `ROBUSTNESS_METRICS` that there are, `no_evidence`, the share of
        all images that are refused, and `stability`, of those whose verdict is that of the untouched image.
    """
    model, accelerator = subject.model, subject.accelerator
    rows = {split: subject.splits[split] for split in (subject.main, "unknown") if split in subject.splits}
    names, alpha = model.config.label_names, model.config.alpha
    levels = alpha, model.config.camera_alpha
    if quick:
        rows = {split: part.select(_fewer(np.array(part["label"]))) for split, part in rows.items()}
    views = [View(operator=operator, strength=strength, seed=seed) for operator, strength in cases(quick)]
    encoded = {
        split: subject.cache().encode_views(part, views, held_out=True) for split, part in rows.items()
    }
    table, untouched = [], None
    for view in tqdm(views, "robustness", disable=not accelerator.is_main_process):
        parts = {
            split: predict(model, of_views[view], accelerator, statistics=False)
            for split, of_views in encoded.items()
        }
        metrics = compute_metrics(parts[subject.main], parts.get("unknown"), names, *levels)
        verdicts = np.concatenate([part.verdicts(alpha) for part in parts.values()])
        untouched = verdicts if untouched is None else untouched
        row = {"operator": view.operator or "none", "strength": view.strength}
        row |= {"num_test": len(parts[subject.main]), "num_unknown": len(parts.get("unknown", ()))}
        row |= {name: metrics[name] for name in ROBUSTNESS_METRICS if name in metrics}
        row["no_evidence"] = float((verdicts == len(names) + 1).mean())
        table.append(row | {"stability": float((verdicts == untouched).mean())})
    return table


def _fewer(labels: np.ndarray) -> np.ndarray:
    """Places of every fourth image, and of the first of each class that has none among them."""
    places = np.arange(0, len(labels), 4)
    classes, first = np.unique(labels, return_index=True)
    return np.union1d(places, first[~np.isin(classes, labels[places])])


def cases(quick: bool = False) -> list[tuple[str | None, float | None]]:
    """Operators and strengths, none first, chains last; `quick` takes the middle strength of each."""
    pairs: list[tuple[str | None, float | None]] = [(None, None)]
    for name, (_, strengths) in OPERATORS.items():
        pairs += [(name, s) for s in ((strengths[len(strengths) // 2],) if quick else strengths)]
    return pairs + [(name, None) for name in CHAINS]
