"""The `evaluate` metric of image attribution: closed-set and open-set metrics."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

logger = evaluate.logging.get_logger(__name__)

_DESCRIPTION = """
Metrics of image attribution. Closed set: which of the known generators made an image. Open set: whether any
of them did.
"""

_INPUTS = """
Args:
    predictions (list of list of float): Class scores of each image, higher is likelier; used as they are.
    references (list of int): The true classes, 0..K-1; in the configuration "open-set", -1 for an unknown
        generator.
    known_scores (list of float, optional): "Known-ness" of each of these images, higher is more known (a log
        density).
    unknown_scores (list of float, optional): The same of images by unknown generators.
    label_names (list of str, optional): Names of the classes, for `auc_NAME`; else their numbers are.

    The configuration "open-set" has the open-set scores as columns, so that `add_batch` works: `scores` and
    `is_known` instead of the two arguments.
Returns:
    Numbers by name, as loggers take them.
    macro_auc: One-vs-rest AUC, averaged over classes.
    auc_NAME: One-vs-rest AUC of each class.
    accuracy, balanced_accuracy: Of the class with the highest score.
    A class without an image is left out of the averages, with a warning; where all images are of one class
    there is no AUC.
    With open-set scores also
    auroc, aupr: Known against unknown, known is positive.
    fpr95: Share of unknown images taken for known where 95 % of known ones are.
    eer: Where both error rates are equal.
    overlap: 1 - max(TPR - FPR), what the two distributions have in common.
    oscr: Area under correct classification rate against false positive rate (Dhamija et al. 2018).
Raises:
    ValueError: on scores of fewer than two classes, NaN, or shapes that don't agree.
Examples:
    >>> metric = evaluate.load("./evaluate_protoleak")
    >>> result = metric.compute(
    ...     predictions=[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.4, 0.6]], references=[0, 1, 0, 1],
    ...     known_scores=[3.0, 2.0, 4.0, 1.0], unknown_scores=[0.5, 1.5],
    ... )
    >>> print(result["macro_auc"], result["auroc"])
    1.0 0.875
"""


def closed_set_metrics(
    predictions: np.ndarray, references: np.ndarray, label_names: Sequence[str] | None = None
) -> dict[str, float | dict[str, float]]:
    """
    Macro AUC and its companions, from class scores (N, K) and classes (N,) in 0..K-1: `per_class_auc` holds
    one number a class. Classes that don't occur are left out; where one alone does, there is no AUC.
    """
    predictions, references = np.asarray(predictions, float), np.asarray(references)
    if predictions.ndim != 2 or predictions.shape[1] < 2:
        raise ValueError(
            f"predictions must be (N, K) scores of K >= 2 classes; got shape {predictions.shape}"
        )
    if references.shape != predictions.shape[:1] or not len(references):
        raise ValueError(
            f"references must be (N,) with N = {len(predictions)} > 0; got shape {references.shape}"
        )
    _require_finite("predictions", predictions)
    classes = np.arange(predictions.shape[1])
    if not np.isin(references, classes).all():
        raise ValueError(
            f"references must be within 0 and {classes[-1]}; got {sorted(set(references.tolist()))}"
        )
    names = list(label_names) if label_names is not None else [str(k) for k in classes]
    if len(names) != len(classes):
        raise ValueError(f"label_names must name {len(classes)} classes; got {len(names)}")
    present, best = np.unique(references), predictions.argmax(axis=1)
    metrics = {
        "accuracy": float(accuracy_score(references, best)),
        "balanced_accuracy": float(recall_score(references, best, labels=present, average="macro")),
    }
    if len(present) < 2:
        return metrics
    aucs = one_vs_rest_auc(predictions, references)
    per_class = {names[k]: float(aucs[k]) for k in present}
    return {"macro_auc": float(np.mean(list(per_class.values()))), "per_class_auc": per_class} | metrics


def one_vs_rest_auc(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """
    AUC of each class against all others, (K,), NaN where one of both has no image: the statistic of Mann and
    Whitney over its largest value, which is scikit-learn's `roc_auc_score`, of all classes at once.
    """
    own = np.asarray(references)[:, None] == np.arange(np.shape(predictions)[1])
    positive, ranks = own.sum(axis=0), rankdata(predictions, axis=0)
    above = (ranks * own).sum(axis=0) - positive * (positive + 1) / 2
    pairs = (positive * (len(own) - positive)).astype(float)
    return np.divide(above, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def open_set_metrics(known_scores: np.ndarray, unknown_scores: np.ndarray) -> dict[str, float]:
    """Known against unknown from scores that are higher for known images: (N,), (U,)."""
    known, unknown = np.asarray(known_scores, float), np.asarray(unknown_scores, float)
    for name, scores in (("known_scores", known), ("unknown_scores", unknown)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name} must be a list of at least one score; got shape {scores.shape}")
        _require_finite(name, scores)
    scores, is_known = np.concatenate([known, unknown]), np.repeat([1, 0], [len(known), len(unknown)])
    false_positive, true_positive, _ = roc_curve(is_known, scores, drop_intermediate=False)
    crossing = np.argmin(np.abs(false_positive - (1 - true_positive)))
    return {
        "auroc": float(roc_auc_score(is_known, scores)),
        "aupr": float(average_precision_score(is_known, scores)),
        "fpr95": float(false_positive[np.searchsorted(true_positive, 0.95)]),
        "eer": float((false_positive[crossing] + 1 - true_positive[crossing]) / 2),
        "overlap": float(1 - (true_positive - false_positive).max()),
    }


def open_set_classification_rate(
    correct: np.ndarray, known_scores: np.ndarray, unknown_scores: np.ndarray
) -> float:
    """OSCR: as a threshold falls, known images both accepted and right, against unknown images accepted."""
    scores = np.concatenate([known_scores, unknown_scores])
    order = np.argsort(-scores, kind="stable")
    right = np.concatenate([np.asarray(correct, float), np.zeros(len(unknown_scores))])[order]
    wrong = np.repeat([0.0, 1.0], [len(known_scores), len(unknown_scores)])[order]
    last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    rate = np.append(0, np.cumsum(right)[last_of_ties] / len(known_scores))
    false_positive = np.append(0, np.cumsum(wrong)[last_of_ties] / len(unknown_scores))
    return float(np.trapezoid(rate, false_positive))


def attribution_metrics(
    predictions: np.ndarray,
    references: np.ndarray,
    known_scores: np.ndarray | None = None,
    unknown_scores: np.ndarray | None = None,
    label_names: Sequence[str] | None = None,
) -> dict:
    """All metrics, see the description of this module's [`ProtoLeakMetric`]."""
    metrics = closed_set_metrics(predictions, references, label_names)
    if (known_scores is None) != (unknown_scores is None):
        raise ValueError("open-set metrics need both known_scores and unknown_scores; got one of them")
    if known_scores is not None:
        if len(known_scores) != len(references):
            raise ValueError(
                f"known_scores must hold {len(references)} scores, one a reference; got {len(known_scores)}"
            )
        metrics |= open_set_metrics(known_scores, unknown_scores)
        correct = np.argmax(predictions, axis=1) == np.asarray(references)
        metrics["oscr"] = open_set_classification_rate(
            correct, np.asarray(known_scores), np.asarray(unknown_scores)
        )
    return metrics


def _require_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name} contains NaN or infinite values, at {np.argwhere(~np.isfinite(values))[:3].tolist()}"
        )


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ProtoLeakMetric(evaluate.Metric):
    """Macro AUC, accuracy, and open-set metrics; configurations "default" and "open-set"."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float32")),
            "references": datasets.Value("int64"),
        }
        if self.config_name == "open-set":
            features |= {"scores": datasets.Value("float64"), "is_known": datasets.Value("bool")}
        elif self.config_name != "default":
            raise ValueError(f'the configurations are "default" and "open-set"; got {self.config_name!r}')
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Giusti, Guarnera, Battiato: Proto-LeakNet, arXiv 2511.04260",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self,
        predictions,
        references,
        scores=None,
        is_known=None,
        known_scores=None,
        unknown_scores=None,
        label_names=None,
    ) -> dict:
        predictions, references = np.array(predictions), np.array(references)
        if self.config_name == "open-set":
            is_known, scores = np.array(is_known, bool), np.array(scores)
            predictions, references = predictions[is_known], references[is_known]
            known_scores, unknown_scores = scores[is_known], scores[~is_known]
        metrics = attribution_metrics(predictions, references, known_scores, unknown_scores, label_names)
        if absent := sorted(set(range(predictions.shape[1])) - set(references.tolist())):
            logger.warning("classes %s have no image; averages are over the others", absent)
        of_class = {f"auc_{name}": auc for name, auc in metrics.pop("per_class_auc", {}).items()}
        return metrics | of_class
