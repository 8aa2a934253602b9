"""What a model gives for many images, and the figures of it: closed set, open set, real against generated."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from .evaluate_protoleak.evaluate_protoleak import attribution_figures, open_set_figures

REAL = "real"
RESAMPLES = 300


@dataclass
class Predictions:
    """Embeddings (N, D), class probabilities (N, K), log densities (N,) or `None`, labels (N,)."""

    embeddings: np.ndarray
    probabilities: np.ndarray
    log_density: np.ndarray | None
    labels: np.ndarray

    def take(self, index: np.ndarray) -> "Predictions":
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Predictions(**{name: None if part is None else part[index] for name, part in parts.items()})


@torch.no_grad()
def predict(model, data: TensorDataset, accelerator: Accelerator, batch_size: int = 64) -> Predictions:
    """
    Run `model` over (latents, labels), shared out over the processes of `accelerator`; each gets all results.
    """
    module = accelerator.unwrap_model(model)
    training = module.training
    module.eval()
    parts = []
    for latents, labels in accelerator.prepare(DataLoader(data, batch_size)):
        output = module(latents=latents)
        density = output.log_density if output.log_density is not None else torch.zeros(len(labels), 0)
        device = accelerator.device
        row = (output.embeddings.float(), output.logits.double().softmax(dim=1), density.to(device), labels)
        parts.append([part.cpu().numpy() for part in accelerator.gather_for_metrics(row)])
    module.train(training)
    embeddings, probabilities, density, labels = map(np.concatenate, zip(*parts, strict=True))
    return Predictions(embeddings, probabilities, density if density.ndim == 1 else None, labels)


def figures(test: Predictions, unknown: Predictions | None, label_names: list[str]) -> dict[str, Any]:
    """
    All figures of held-out test images of known classes, and of images by unknown generators where there are
    some.

    The open-set score is the log density. Keys are those of `evaluate_protoleak`; `real_auroc` is the AUROC
    of the probability of the class "real", where there is one, against generated images.
    """
    open_set = unknown is not None and test.log_density is not None
    result = attribution_figures(
        test.probabilities,
        test.labels,
        known_scores=test.log_density if open_set else None,
        unknown_scores=unknown.log_density if open_set else None,
        label_names=label_names,
    )
    if REAL in label_names:
        column = label_names.index(REAL)
        score, is_real = test.probabilities[:, column], test.labels == column
        result["real_auroc"] = open_set_figures(score[is_real], score[~is_real])["auroc"]
    return result


def summarize(
    test: Predictions,
    unknown: Predictions | None,
    label_names: list[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Figures with 95 % bootstrap intervals over images, drawn within each class.

    Returns:
        `dict` with `num_test`, `num_unknown`, `figures` and `intervals` ([low, high] of every scalar figure).
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(test.labels == k) for k in range(len(label_names))]
    draws: dict[str, list[float]] = {}
    for _ in range(resamples):
        index = np.concatenate([rng.choice(m, len(m)) for m in members])
        other = (
            None
            if unknown is None
            else unknown.take(rng.integers(len(unknown.labels), size=len(unknown.labels)))
        )
        for name, value in figures(test.take(index), other, label_names).items():
            if name != "per_class_auc":
                draws.setdefault(name, []).append(value)
    return {
        "num_test": len(test.labels),
        "num_unknown": 0 if unknown is None else len(unknown.labels),
        "figures": figures(test, unknown, label_names),
        "intervals": {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in draws.items()},
    }


TITLES = {
    "macro_auc": "Macro AUC, closed set",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "real_auroc": "AUROC, real against generated",
    "auroc": "AUROC, known against unknown",
    "aupr": "AUPR, known against unknown",
    "fpr95": "FPR at 95 % TPR, unknown taken for known",
    "eer": "EER, known against unknown",
    "oscr": "OSCR",
}


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a table for a terminal."""
    lines = [
        f"{summary['num_test']} test images of known classes, {summary['num_unknown']} by unknown generators"
    ]
    for name, title in TITLES.items():
        if name in summary["figures"]:
            low, high = summary["intervals"][name]
            lines.append(f"  {title:<42} {summary['figures'][name]:.4f}  [{low:.4f}, {high:.4f}]")
    lines.append("  one-vs-rest AUC of each class")
    lines += [f"    {name:<40} {auc:.4f}" for name, auc in summary["figures"]["per_class_auc"].items()]
    return "\n".join(lines)
