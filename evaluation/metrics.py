"""Every metric of images that a model gave predictions for, and the same on resampled images."""

from dataclasses import replace
from typing import Any

import numpy as np

from ..evaluate_protoleak.evaluate_protoleak import attribution_metrics, open_set_metrics
from .predictions import Predictions
from .verdicts import REAL, coverage_at_precision, place_of_real, verdict_counts

RESAMPLES = 300

Metrics = dict[str, Any]  # a number by its name, see `report.TITLES`; and `per_class_auc`, a number a class


def compute_metrics(
    test: Predictions,
    unknown: Predictions | None,
    label_names: list[str],
    alpha: float = 0.05,
    camera_alpha: float = 0.01,
) -> Metrics:
    """
    All metrics of held-out test images of known classes, and of images by unknown generators where there are
    some. Averages over classes are over those that occur, at least two.

    Keys are those of `evaluate_protoleak`, and see `report.TITLES`; `real_...` are those of the probability
    of the class "real", where there is one, against generated images. Rates of verdicts, see
    [`verdict_counts`], are at the levels `alpha` and `camera_alpha`. What is of no image is left out.
    """
    if len(np.unique(test.labels)) < 2:
        raise ValueError("metrics need images of at least two known classes; got those of fewer")
    open_set = unknown is not None and test.open_set_score is not None
    metrics = attribution_metrics(
        test.probabilities,
        test.labels,
        known_scores=test.open_set_score if open_set else None,
        unknown_scores=unknown.open_set_score if open_set else None,
        label_names=label_names,
    )
    real, generated = real_scores(test, label_names)
    if len(real) and len(generated):
        metrics |= {f"real_{name}": value for name, value in open_set_metrics(real, generated).items()}
    own = np.eye(len(label_names))[test.labels]
    metrics["ece"] = expected_calibration_error(test.probabilities, test.labels)
    metrics["brier"] = float(np.square(test.probabilities - own).sum(axis=1).mean())
    metrics["coverage_at_90"] = coverage_at_precision(test.probabilities, test.labels)
    if test.p_values is None:
        return metrics
    metrics["mean_set_size"] = float(
        test.in_sets(alpha, camera_alpha, place_of_real(label_names)).sum(axis=1).mean()
    )
    counts = verdict_counts(test, unknown, label_names, alpha, camera_alpha)
    return metrics | {name: k / n for name, (k, n) in counts.items()}


def real_scores(test: Predictions, label_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the class "real", of real and of generated images; none where there is no such."""
    if REAL not in label_names:
        return np.empty(0), np.empty(0)
    score, is_real = test.probabilities[:, label_names.index(REAL)], test.labels == label_names.index(REAL)
    return score[is_real], score[~is_real]


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """
    ECE of the likeliest class: mean gap of confidence and accuracy in bins of equal width (Guo et al. 2017).
    """
    rows = reliability(probabilities, labels, bins)
    return float(sum(row["share"] * abs(row["confidence"] - row["accuracy"]) for row in rows))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[dict[str, float]]:
    """Share of images, mean confidence and accuracy in each bin of the likeliest class's probability."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "share": float((place == b).mean()),
            "confidence": float(confidence[place == b].mean()),
            "accuracy": float(right[place == b].mean()),
        }
        for b in range(bins)
        if (place == b).any()
    ]


def bootstrap(
    test: Predictions, unknown: Predictions | None, label_names: list[str], alpha: float = 0.05,
    camera_alpha: float = 0.01, resamples: int = RESAMPLES, stream: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """
    Every metric that is one number on resampled images, `(resamples,)`, NaN where it is of no image. Known
    images are drawn within each class, by `stream`; unknown ones are the same for every `stream`.
    """
    if unknown is not None:
        unknown = replace(unknown, gates=None, statistics=None)  # which no metric is of
    test = replace(test, gates=None, statistics=None)
    of_known, of_unknown = np.random.default_rng([0, stream]), np.random.default_rng(1)
    members = [np.flatnonzero(test.labels == k) for k in np.unique(test.labels)]
    draws = []
    for _ in range(resamples):
        known = test.take(np.concatenate([of_known.choice(m, len(m)) for m in members]))
        chosen = None if unknown is None else of_unknown.integers(len(unknown), size=len(unknown))
        other = None if unknown is None else unknown.take(chosen)
        draws.append(compute_metrics(known, other, label_names, alpha, camera_alpha))
    names = {name for draw in draws for name, value in draw.items() if not isinstance(value, dict)}
    return {name: np.array([draw.get(name, np.nan) for draw in draws]) for name in sorted(names)}


def quantiles(draws: np.ndarray) -> list[float]:
    """Where the middle 95 % of them lie."""
    return np.nanquantile(draws, [0.025, 0.975]).tolist()
