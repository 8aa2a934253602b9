"""How often verdicts are right: counts, their exact intervals, and how many images can be answered."""

import numpy as np
from scipy.stats import binomtest

from ..calibration_protoleak import REAL
from .predictions import ORIGINS, Predictions

Counts = dict[str, tuple[int, int]]  # by a rate's name: of how many images it holds, and of how many in all


def verdict_counts(
    test: Predictions, unknown: Predictions | None, label_names: list[str], alpha: float, camera_alpha: float
) -> Counts:
    """
    What the verdicts on images of known classes, and on images by unknown generators, come to.

    Returns:
        `dict` of counts, without those that are of no image; all but the first two leave it aside whether an
        image is called unknown, unless they say so.
        - false_unknown_rate, unknown_rejected: known and unknown images that are called unknown;
        - set_coverage: known images whose class is in their prediction set;
        - ambiguous_rate: known images with more than one class in it;
        - single_rate: known images answered with one class: alone in its set, and not called unknown;
        - single_precision: of these, the images that are of that class;
        - those of [`origin_counts`], where there is a class "real".
    """
    in_set = test.in_sets(alpha, camera_alpha, place_of_real(label_names))
    own = np.arange(len(test)), test.labels
    called_unknown = test.p_values <= alpha
    single = (in_set.sum(axis=1) == 1) & ~called_unknown
    masks = {
        "false_unknown_rate": called_unknown,
        "set_coverage": in_set[own],
        "ambiguous_rate": in_set.sum(axis=1) > 1,
        "single_rate": single,
        "single_precision": in_set[own][single],
    }
    if unknown is not None:
        masks["unknown_rejected"] = unknown.p_values <= alpha
    counts = {name: (int(mask.sum()), len(mask)) for name, mask in masks.items() if len(mask)}
    table = origin_counts(test, unknown, label_names, alpha, camera_alpha)
    return counts | (_origin_rates(table) if table else {})


def place_of_real(label_names: list[str]) -> int | None:
    """Which class is that of photographs, or `None`."""
    return label_names.index(REAL) if REAL in label_names else None


def origin_counts(
    test: Predictions, unknown: Predictions | None, label_names: list[str], alpha: float, camera_alpha: float
) -> dict[str, dict[str, int]] | None:
    """
    How many images of class "real", by known generators ("generated"), and by unknown ones ("unknown") have
    each of `ORIGINS`. `None` where no origin is told: without a class "real", or without p-values.
    """
    if REAL not in label_names or test.generated_p_values is None:
        return None
    real = label_names.index(REAL)
    parts = {REAL: test.take(test.labels == real), "generated": test.take(test.labels != real)}
    parts |= {} if unknown is None else {"unknown": unknown}
    levels = (alpha, camera_alpha, real)
    return {kind: count_origins(part.origins(*levels)) for kind, part in parts.items() if len(part)}


def count_origins(origins: np.ndarray) -> dict[str, int]:
    """How often each of `ORIGINS` is among their places (N,)."""
    return dict(zip(ORIGINS, np.bincount(origins, minlength=len(ORIGINS)).tolist(), strict=True))


def _origin_rates(table: dict[str, dict[str, int]]) -> Counts:
    """
    - generated_called_camera, unknown_called_camera: images by known and by unknown generators with origin
      "camera", the error that must be rarest;
    - real_called_camera, camera_called_generated, real_cant_tell: images of class "real" with each origin.
    """
    names = {
        "generated_called_camera": ("generated", "camera"),
        "unknown_called_camera": ("unknown", "camera"),
        "real_called_camera": (REAL, "camera"),
        "camera_called_generated": (REAL, "generated"),
        "real_cant_tell": (REAL, "can't tell"),
    }
    return {
        name: (table[kind][origin], sum(table[kind].values()))
        for name, (kind, origin) in names.items()
        if kind in table
    }


def exact_intervals(counts: Counts) -> dict[str, list[float]]:
    """
    95 % intervals of rates, exact (Clopper and Pearson 1934): where none of 100 images is wrong, up to 3.6 %
    may be, which a bootstrap would not tell.
    """
    return {name: list(binomtest(k, n).proportion_ci(method="exact")) for name, (k, n) in counts.items()}


def coverage_at_precision(probabilities: np.ndarray, labels: np.ndarray, precision: float = 0.9) -> float:
    """
    The largest share of images, taken in the order of the likeliest class's probability, of which at least
    this share is given its true class; 0 where there is none. Images of equal probability come together.

    The bound that this would take is not known beforehand: it is what an ideal choice of it would answer.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    order = np.argsort(-confidence, kind="stable")
    last_of_ties = np.append(np.diff(confidence[order]) != 0, True)
    answered = np.arange(1, len(labels) + 1)
    enough = last_of_ties & (np.cumsum(right[order]) >= precision * answered - 1e-9)
    return float(answered[enough].max(initial=0) / len(labels))
