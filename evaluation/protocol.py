"""The evaluation of a checkpoint: metrics of its test images, with intervals, and what they are made of."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from accelerate import Accelerator

from ..configuration_protoleak import FEATURES
from ..evaluate_protoleak.evaluate_protoleak import (
    attribution_metrics,
    closed_set_metrics,
    open_set_metrics,
)
from ..scores_protoleak import OPEN_SET_SCORES
from ..training.latents import LatentDataset, View
from .predictions import Predictions, Subject, predict
from .shortcuts import format_bias

REAL = "real"
RESAMPLES = 300
OVER_NOISE = ("macro_auc", "accuracy", "real_auroc", "auroc", "false_unknown_rate")

Metrics = dict[str, Any]  # a number by its name, see `report.TITLES`; and `per_class_auc`, a number a class


@dataclass
class SplitEvaluation:
    """
    What was measured on one test split, and on unknown images beside it.

    Args:
        num_test, num_unknown (`int`): Images of known classes, and by unknown generators.
        metrics (`dict`): See [`compute_metrics`].
        intervals (`dict`): [low, high] of every metric that is one number; 95 %, bootstrap over images.
        confusion (`list[list[int]]`): Counts; rows are true classes, columns verdicts, "unknown" the last.
        reliability (`list[dict]`): See [`reliability`].
        scores (`dict[str, list[float]]`): What ROC curves are drawn from: the open-set scores of `known` and
            `unknown` images, and the probabilities of the class "real" of `real` and `generated` ones.
        shuffled_macro_auc (`float`): With the labels permuted, mean of 20; near 0.5.
        per_unknown (`dict[str, dict]`, *optional*): AUROC of known against each unknown generator, how much
            of it is rejected, and the known class that most of it looks like, with its share.
        open_set_scores (`dict[str, dict]`, *optional*): Metrics of each open-set score of the package.
        noise (`dict[str, list[float]]`, *optional*): The main metrics for each draw of the evaluation noise,
            the config's first.
        format_bias (`dict`, *optional*): See [`format_bias`].
    """

    num_test: int
    num_unknown: int
    metrics: Metrics
    intervals: dict[str, list[float]]
    confusion: list[list[int]]
    reliability: list[dict[str, float]]
    scores: dict[str, list[float]]
    shuffled_macro_auc: float
    per_unknown: dict[str, dict[str, Any]] | None = None
    open_set_scores: dict[str, dict[str, float]] | None = None
    noise: dict[str, list[float]] | None = None
    format_bias: dict[str, Any] | None = None


@dataclass
class Evaluation:
    """
    Everything that is known of how well a checkpoint does.

    Args:
        labels (`list[str]`): The known classes.
        alpha (`float`): Level of the verdicts.
        open_set_score (`str`): Name of the one in use.
        splits (`dict[str, SplitEvaluation]`): By the name of the test split; the first is the main one.
    """

    labels: list[str]
    alpha: float
    open_set_score: str
    splits: dict[str, SplitEvaluation]

    @property
    def main(self) -> SplitEvaluation:
        return next(iter(self.splits.values()))

    @property
    def metrics(self) -> Metrics:
        """Those of the main split."""
        return self.main.metrics

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as metrics.json has them; what was not measured is left out."""
        splits = {
            name: {key: value for key, value in asdict(split).items() if value is not None}
            for name, split in self.splits.items()
        }
        return asdict(self) | {"splits": splits}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """The same again, from a dict that may have more keys, such as that of metrics.json."""
        splits = {name: SplitEvaluation(**split) for name, split in values["splits"].items()}
        return cls(**{f.name: values[f.name] for f in fields(cls)} | {"splits": splits})


# --- metrics ------------------------------------------------------------------------------------------------


def compute_metrics(
    test: Predictions, unknown: Predictions | None, label_names: list[str], alpha: float = 0.05
) -> Metrics:
    """
    All metrics of held-out test images of known classes, and of images by unknown generators where there are
    some.

    Keys are those of `evaluate_protoleak`, and see `report.TITLES`; `real_...` are those of the probability
    of the class "real", where there is one, against generated images. Error rates of verdicts are at the
    level `alpha`.
    """
    open_set = unknown is not None and test.open_set_score is not None
    metrics = attribution_metrics(
        test.probabilities,
        test.labels,
        known_scores=test.open_set_score if open_set else None,
        unknown_scores=unknown.open_set_score if open_set else None,
        label_names=label_names,
    )
    if REAL in label_names:
        scores = _real_scores(test, label_names.index(REAL))
        metrics |= {f"real_{name}": value for name, value in open_set_metrics(*scores).items()}
    own = np.eye(len(label_names))[test.labels]
    metrics["ece"] = expected_calibration_error(test.probabilities, test.labels)
    metrics["brier"] = float(np.square(test.probabilities - own).sum(axis=1).mean())
    return metrics if test.p_values is None else metrics | _verdict_metrics(test, unknown, alpha)


def _real_scores(test: Predictions, column: int) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the class "real", of real and of generated images."""
    score, is_real = test.probabilities[:, column], test.labels == column
    return score[is_real], score[~is_real]


def _verdict_metrics(test: Predictions, unknown: Predictions | None, alpha: float) -> dict[str, float]:
    """Error rates of "unknown", and what the prediction sets hold; a set has at least the likeliest class."""
    metrics = {"false_unknown_rate": float((test.p_values <= alpha).mean())}
    if unknown is not None:
        metrics["unknown_rejected"] = float((unknown.p_values <= alpha).mean())
    images, in_set = np.arange(len(test)), test.class_p_values > alpha
    in_set[images, test.likeliest()] = True
    metrics["set_coverage"] = float(in_set[images, test.labels].mean())
    metrics["ambiguous_rate"] = float((in_set.sum(axis=1) > 1).mean())
    return metrics


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


def bootstrap_intervals(
    test: Predictions,
    unknown: Predictions | None,
    label_names: list[str],
    alpha: float = 0.05,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, list[float]]:
    """95 % intervals of every metric that is one number; known images are drawn within each class."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(test.labels == k) for k in range(len(label_names))]
    draws: dict[str, list[float]] = {}
    for _ in range(resamples):
        known = test.take(np.concatenate([rng.choice(m, len(m)) for m in members]))
        other = None if unknown is None else unknown.take(rng.integers(len(unknown), size=len(unknown)))
        for name, value in compute_metrics(known, other, label_names, alpha).items():
            if not isinstance(value, dict):
                draws.setdefault(name, []).append(value)
    return {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in draws.items()}


# --- a test split -------------------------------------------------------------------------------------------


def evaluate_predictions(
    test: Predictions,
    unknown: Predictions | None,
    label_names: list[str],
    alpha: float = 0.05,
    unknown_names: list[str] | None = None,
    resamples: int = RESAMPLES,
) -> SplitEvaluation:
    """
    The evaluation of what a model, or a baseline, gives for test images.

    Args:
        test: Of images of known classes, each with at least one.
        unknown (*optional*): Of images by unknown generators.
        unknown_names (`list[str]`, *optional*): Of each of these, its generator.
        resamples (`int`): Of the bootstrap.
    """
    names = ["unknown"] * (0 if unknown is None else len(unknown)) if unknown_names is None else unknown_names
    open_set = unknown is not None and test.open_set_score is not None
    return SplitEvaluation(
        num_test=len(test),
        num_unknown=0 if unknown is None else len(unknown),
        metrics=compute_metrics(test, unknown, label_names, alpha),
        intervals=bootstrap_intervals(test, unknown, label_names, alpha, resamples),
        confusion=_confusion(test, alpha),
        reliability=reliability(test.probabilities, test.labels),
        scores=_roc_scores(test, unknown, label_names),
        shuffled_macro_auc=_shuffled_macro_auc(test),
        per_unknown=_per_unknown(test, unknown, label_names, names, alpha) if open_set else None,
    )


def _confusion(test: Predictions, alpha: float) -> list[list[int]]:
    num_labels = test.probabilities.shape[1]
    counts = np.zeros((num_labels, num_labels + 1), int)
    np.add.at(counts, (test.labels, test.verdicts(alpha)), 1)
    return counts.tolist()


def _roc_scores(test: Predictions, unknown: Predictions | None, label_names: list[str]) -> dict:
    scores = {}
    if test.open_set_score is not None:
        scores["known"] = test.open_set_score
    if unknown is not None and unknown.open_set_score is not None:
        scores["unknown"] = unknown.open_set_score
    if REAL in label_names:
        scores["real"], scores["generated"] = _real_scores(test, label_names.index(REAL))
    return {name: values.tolist() for name, values in scores.items()}


def _shuffled_macro_auc(test: Predictions, repeats: int = 20) -> float:
    rng = np.random.default_rng(0)
    labels = [rng.permutation(test.labels) for _ in range(repeats)]
    return float(np.mean([closed_set_metrics(test.probabilities, y)["macro_auc"] for y in labels]))


def _per_unknown(
    test: Predictions, unknown: Predictions, label_names: list[str], generators: list[str], alpha: float
) -> dict[str, dict[str, Any]]:
    rows = {}
    for generator in np.unique(generators):
        part = unknown.take(np.array(generators) == generator)
        counts = np.bincount(part.likeliest(), minlength=len(label_names))
        row = {"auroc": open_set_metrics(test.open_set_score, part.open_set_score)["auroc"]}
        if part.p_values is not None:
            row["unknown_rejected"] = float((part.p_values <= alpha).mean())
        row["likeliest"] = label_names[counts.argmax()]
        row["likeliest_share"] = float(counts.max() / counts.sum())
        rows[str(generator)] = row
    return rows


# --- a checkpoint -------------------------------------------------------------------------------------------


def evaluate_model(
    model,
    test: LatentDataset,
    unknown: LatentDataset | None,
    accelerator: Accelerator,
    unknown_names: list[str] | None = None,
    noise_seeds: int = 3,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """
    Everything that is to be known of a checkpoint.

    Args:
        model ([`ProtoLeakForImageAttribution`]): With a detector.
        test, unknown: Latents, and labels 0..K-1 of known classes.
        unknown_names (`list[str]`, *optional*): Of each unknown image, its generator.
        noise_seeds (`int`): How many draws of the evaluation noise the main metrics are given for.
        resamples (`int`): Of the bootstrap.
    """
    config = model.config
    known = predict(model, test, accelerator)
    other = predict(model, unknown, accelerator) if unknown is not None else None
    split = evaluate_predictions(known, other, config.label_names, config.alpha, unknown_names, resamples)
    if other is not None:
        split.open_set_scores = compare_open_set_scores(model, known, other)
    split.noise = _over_noise_seeds(model, test, unknown, accelerator, split.metrics, noise_seeds)
    return Evaluation(config.label_names, config.alpha, config.open_set_title, {"test": split})


def evaluate_subject(subject: Subject, noise_seeds: int = 3, normalise_format: bool = False) -> Evaluation:
    """
    [`evaluate_model`] and [`format_bias`] of a checkpoint that is loaded with its images.

    Args:
        normalise_format (`bool`): Whether every image is encoded as JPEG of quality 90 first.
    """
    splits, cache = subject.splits, subject.cache()
    view = View(operator="jpeg", strength=90.0) if normalise_format else View()
    data = {split: cache.encode(rows, view) for split, rows in splits.items()}
    names = splits["unknown"]["label"] if "unknown" in splits else None
    latents = (data["test"], data.get("unknown"))
    evaluation = evaluate_model(subject.model, *latents, subject.accelerator, names, noise_seeds)
    evaluation.main.format_bias = format_bias(splits["test"])
    return evaluation


def compare_open_set_scores(model, known: Predictions, unknown: Predictions) -> dict[str, dict[str, float]]:
    """
    AUROC, AUPR, FPR95, EER and overlap of the score in use, and of each of the package's, fitted on the
    checkpoint's training images. benchmarks/open_set.py compares many more.
    """
    train = model.detector.train_
    table = {model.config.open_set_title: open_set_metrics(known.open_set_score, unknown.open_set_score)}
    for features in (name for name in FEATURES if name in train):
        for name, make in OPEN_SET_SCORES.items():
            score = make().fit(train[features], train["labels"])
            parts = [score.score_samples(getattr(part, features)) for part in (known, unknown)]
            table[f"{name} of {features}"] = open_set_metrics(*parts)
    return table


def _over_noise_seeds(
    model, test, unknown, accelerator, first: Metrics, count: int
) -> dict[str, list[float]]:
    """The main metrics for each draw of the noise; those of the config's own are at hand in `first`."""
    own_seed, names = model.config.noise_seed, model.config.label_names
    draws = {name: [first[name]] for name in OVER_NOISE if name in first}
    try:
        for seed in range(own_seed + 1, own_seed + count):
            model.protoleak.set_noise_seed(seed)
            other = predict(model, unknown, accelerator) if unknown is not None else None
            known = predict(model, test, accelerator)
            metrics = compute_metrics(known, other, names, model.config.alpha)
            for name, values in draws.items():
                values.append(metrics[name])
    finally:
        model.protoleak.set_noise_seed(own_seed)
    return draws
