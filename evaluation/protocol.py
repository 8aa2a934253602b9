"""The evaluation of a checkpoint: metrics of its test images, with intervals, and what they are made of."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from accelerate import Accelerator

from ..configuration_protoleak import FEATURES
from ..evaluate_protoleak.evaluate_protoleak import closed_set_metrics, open_set_metrics
from ..image_processing_protoleak import JPEG_QUALITY
from ..scores_protoleak import OPEN_SET_SCORES
from ..training.latents import LatentDataset
from .metrics import RESAMPLES, Metrics, bootstrap, compute_metrics, quantiles, real_scores, reliability
from .predictions import Predictions, Subject, predict
from .shortcuts import find_shortcuts
from .splits import TEST_SPLITS, count_sources
from .verdicts import (
    REAL,
    count_origins,
    exact_intervals,
    origin_counts,
    place_of_real,
    verdict_counts,
)

OVER_NOISE = ("macro_auc", "accuracy", "real_auroc", "auroc", "false_unknown_rate")
OF_UNKNOWN = ("unknown_rejected", "unknown_called_camera")  # which no image of a known class changes


@dataclass
class SplitEvaluation:
    """
    What was measured on one test split, and on unknown images beside it.

    Args:
        num_test, num_unknown (`int`): Images of known classes, and by unknown generators.
        metrics (`dict`): See [`compute_metrics`].
        intervals (`dict`): [low, high] of every metric that is one number, 95 %: exact for rates of verdicts,
            by bootstrap over images for the others.
        per_class (`dict[str, dict]`): Of each class that occurs its `images`, the one-vs-rest `auc`, the
            `recall` (of the likeliest class), and the `set_coverage` where there are prediction sets.
        confusion (`list[list[int]]`): Counts; rows are true classes, columns verdicts, after those "unknown",
            and "no evidence" where any image has that.
        reliability (`list[dict]`): See [`reliability`].
        scores (`dict[str, list[float]]`): What ROC curves are drawn from: the open-set scores of `known` and
            `unknown` images, and the probabilities of the class "real" of `real` and `generated` ones.
        shuffled_macro_auc (`float`): With the labels permuted, mean of 20; near 0.5.
        num_sources (`int`, *optional*): Of the images of known classes, where the data set tells it.
        origins (`dict[str, dict[str, int]]`, *optional*): See [`origin_counts`].
        same_classes (`dict`, *optional*): The main split's metrics on its images of the classes that occur
            here; for other splits than the main one.
        gap (`dict[str, list[float]]`, *optional*): [difference, low, high] of each metric from
            `same_classes`, 95 %, bootstrap over images; the same unknown images are drawn for both.
        per_unknown (`dict[str, dict]`, *optional*): Of each unknown generator its `images`, the AUROC of
            known images against it, how much of it is rejected, the counts of its `origins`, and the known
            class that most of it looks like, with its share.
        open_set_scores (`dict[str, dict]`, *optional*): Metrics of each open-set score of the package.
        noise (`dict[str, list[float]]`, *optional*): The main metrics for each draw of the evaluation noise,
            the config's first.
        format_bias (`dict`, *optional*): Of the files, see [`find_shortcuts`].
    """

    num_test: int
    num_unknown: int
    metrics: Metrics
    intervals: dict[str, list[float]]
    per_class: dict[str, dict[str, float]]
    confusion: list[list[int]]
    reliability: list[dict[str, float]]
    scores: dict[str, list[float]]
    shuffled_macro_auc: float
    num_sources: int | None = None
    origins: dict[str, dict[str, int]] | None = None
    same_classes: Metrics | None = None
    gap: dict[str, list[float]] | None = None
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
        alpha (`float`): Level of "unknown" and of the prediction sets.
        camera_alpha (`float`): Level of "a camera".
        open_set_score (`str`): Name of the one in use.
        splits (`dict[str, SplitEvaluation]`): By the name of the test split; the first is the main one.
    """

    labels: list[str]
    alpha: float
    camera_alpha: float
    open_set_score: str
    splits: dict[str, SplitEvaluation]

    @property
    def main(self) -> SplitEvaluation:
        return next(iter(self.splits.values()))

    @property
    def metrics(self) -> Metrics:
        """Those of the main split."""
        return self.main.metrics

    def note_sources(self, rows: Mapping[str, Any]) -> None:
        """Set each split's `num_sources` from the data set's rows of that split."""
        for name, split in self.splits.items():
            split.num_sources = count_sources(rows[name])

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


# --- a test split -------------------------------------------------------------------------------------------


def evaluate_predictions(
    test: Predictions,
    unknown: Predictions | None,
    label_names: list[str],
    alpha: float = 0.05,
    unknown_names: list[str] | None = None,
    resamples: int = RESAMPLES,
    camera_alpha: float = 0.01,
) -> SplitEvaluation:
    """
    The evaluation of what a model, or a baseline, gives for test images.

    Args:
        test: Of images of known classes, at least two.
        unknown (*optional*): Of images by unknown generators.
        unknown_names (`list[str]`, *optional*): Of each of these, its generator.
        resamples (`int`): Of the bootstrap.
    """
    parts = {"test": test} | ({} if unknown is None else {"unknown": unknown})
    return evaluate_splits(parts, label_names, alpha, camera_alpha, unknown_names, resamples)["test"]


def evaluate_splits(
    parts: Mapping[str, Predictions],
    label_names: list[str],
    alpha: float = 0.05,
    camera_alpha: float = 0.01,
    unknown_names: list[str] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, SplitEvaluation]:
    """
    The evaluation of each of `TEST_SPLITS` that is among `parts`, against the part `unknown` where there is
    one; the later one is compared with the first.
    """
    unknown, levels = parts.get("unknown"), (alpha, camera_alpha)
    splits, main_draws, main = {}, {}, None
    for stream, name in enumerate(TEST_SPLITS):
        if name not in parts:
            continue
        draws = bootstrap(parts[name], unknown, label_names, *levels, resamples, stream)
        split = _evaluate_split(parts[name], unknown, label_names, levels, unknown_names, draws)
        if splits:
            common = main.take(np.isin(main.labels, np.unique(parts[name].labels)))
            if len(common) < len(main):
                main_draws = bootstrap(common, unknown, label_names, *levels, resamples)
            split.same_classes = compute_metrics(common, unknown, label_names, *levels)
            split.gap = _gap(split, draws, main_draws)
        splits[name], main_draws, main = split, draws, parts[name]
    return splits


def _evaluate_split(
    test: Predictions, unknown: Predictions | None, label_names: list[str], levels: tuple[float, float],
    unknown_names: list[str] | None, draws: dict[str, np.ndarray],
) -> SplitEvaluation:  # fmt: skip
    names = ["unknown"] * (0 if unknown is None else len(unknown)) if unknown_names is None else unknown_names
    metrics = compute_metrics(test, unknown, label_names, *levels)
    intervals = {name: quantiles(values) for name, values in draws.items() if name in metrics}
    if test.p_values is not None:
        intervals |= exact_intervals(verdict_counts(test, unknown, label_names, *levels))
    open_set = unknown is not None and test.open_set_score is not None
    return SplitEvaluation(
        num_test=len(test),
        num_unknown=0 if unknown is None else len(unknown),
        metrics=metrics,
        intervals=intervals,
        per_class=_per_class(test, metrics["per_class_auc"], label_names, *levels),
        confusion=_confusion(test, levels[0]),
        reliability=reliability(test.probabilities, test.labels),
        scores=_roc_scores(test, unknown, label_names),
        shuffled_macro_auc=_shuffled_macro_auc(test),
        origins=origin_counts(test, unknown, label_names, *levels),
        per_unknown=_per_unknown(test, unknown, label_names, names, levels) if open_set else None,
    )


def _gap(
    split: SplitEvaluation, draws: dict[str, np.ndarray], main_draws: dict[str, np.ndarray]
) -> dict[str, list[float]]:
    """How far a split is from `same_classes`, with intervals."""
    names = [name for name in draws if name in main_draws and name not in OF_UNKNOWN]
    measured = [name for name in names if name in split.metrics and name in split.same_classes]
    return {
        name: [split.metrics[name] - split.same_classes[name], *quantiles(draws[name] - main_draws[name])]
        for name in measured
    }


def _per_class(
    test: Predictions, aucs: dict[str, float], label_names: list[str], alpha: float, camera_alpha: float
) -> dict[str, dict[str, float]]:
    rows, levels = {}, (alpha, camera_alpha, place_of_real(label_names))
    for name, auc in aucs.items():
        k = label_names.index(name)
        part = test.take(test.labels == k)
        rows[name] = {"images": len(part), "auc": auc, "recall": float((part.likeliest() == k).mean())}
        if part.class_p_values is not None:
            rows[name]["set_coverage"] = float(part.in_sets(*levels)[:, k].mean())
    return rows


def _confusion(test: Predictions, alpha: float) -> list[list[int]]:
    num_labels = test.probabilities.shape[1]
    counts = np.zeros((num_labels, num_labels + 2), int)
    np.add.at(counts, (test.labels, test.verdicts(alpha)), 1)
    return (counts if counts[:, -1].any() else counts[:, :-1]).tolist()


def verdicts_in(labels: list[str], confusion: list[list[int]]) -> list[str]:
    """The columns of a confusion matrix."""
    return [*labels, "unknown", "no evidence"][: len(confusion[0])]


def _roc_scores(test: Predictions, unknown: Predictions | None, label_names: list[str]) -> dict:
    scores = {}
    if test.open_set_score is not None:
        scores["known"] = test.open_set_score
    if unknown is not None and unknown.open_set_score is not None:
        scores["unknown"] = unknown.open_set_score
    scores["real"], scores["generated"] = real_scores(test, label_names)
    return {name: values.tolist() for name, values in scores.items() if len(values)}


def _shuffled_macro_auc(test: Predictions, repeats: int = 20) -> float:
    rng = np.random.default_rng(0)
    labels = [rng.permutation(test.labels) for _ in range(repeats)]
    return float(np.mean([_macro_auc(test.probabilities, y) for y in labels]))


def _macro_auc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return closed_set_metrics(probabilities, labels)["macro_auc"]


def _per_unknown(
    test: Predictions, unknown: Predictions, label_names: list[str], generators: list[str],
    levels: tuple[float, float],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    rows = {}
    for generator in np.unique(generators):
        part = unknown.take(np.array(generators) == generator)
        counts = np.bincount(part.likeliest(), minlength=len(label_names))
        row = {"images": len(part)}
        row["auroc"] = open_set_metrics(test.open_set_score, part.open_set_score)["auroc"]
        if part.p_values is not None:
            row["unknown_rejected"] = float((part.p_values <= levels[0]).mean())
        if REAL in label_names and part.generated_p_values is not None:
            row["origins"] = count_origins(part.origins(*levels, label_names.index(REAL)))
        row["likeliest"] = label_names[counts.argmax()]
        row["likeliest_share"] = float(counts.max() / counts.sum())
        rows[str(generator)] = row
    return rows


# --- a checkpoint -------------------------------------------------------------------------------------------


def evaluate_model(
    model,
    data: Mapping[str, LatentDataset],
    accelerator: Accelerator,
    unknown_names: list[str] | None = None,
    noise_seeds: int = 3,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """
    Everything that is to be known of a checkpoint.

    Args:
        model ([`ProtoLeakForImageAttribution`]): With a detector.
        data (`dict[str, LatentDataset]`): One of `TEST_SPLITS` or both, with labels 0..K-1 of known classes,
            and perhaps `unknown`.
        unknown_names (`list[str]`, *optional*): Of each unknown image, its generator.
        noise_seeds (`int`): How many draws of the evaluation noise the main metrics are given for.
        resamples (`int`): Of the bootstrap.
    """
    config = model.config
    noise_seeds = 1 if model.takes_features else noise_seeds  # features hold the noise they were pooled with
    compared = "unknown" in data
    parts = {name: predict(model, latents, accelerator, compared) for name, latents in data.items()}
    levels = (config.alpha, config.camera_alpha)
    splits = evaluate_splits(parts, config.label_names, *levels, unknown_names, resamples)
    if compared:
        for name, table in compare_open_set_scores(model, parts).items():
            splits[name].open_set_scores = table
    first = {name: split.metrics for name, split in splits.items()}
    for name, draws in _over_noise_seeds(model, data, accelerator, first, noise_seeds).items():
        splits[name].noise = draws
    return Evaluation(config.label_names, *levels, config.open_set_title, splits)


def evaluate_subject(subject: Subject, noise_seeds: int = 3, normalise_format: bool = False) -> Evaluation:
    """
    [`evaluate_model`] and [`find_shortcuts`] of a checkpoint that is loaded with its images.

    Args:
        normalise_format (`bool`): Whether every image is encoded as JPEG of quality 90 first, as it is in any
            case where the checkpoint's image processor does so.
    """
    rows, processor = subject.splits, subject.processor
    if normalise_format:
        processor.jpeg_quality = JPEG_QUALITY
    cache = subject.cache()
    data = {name: cache.encode_held_out(part) for name, part in rows.items()}
    names = rows["unknown"]["label"] if "unknown" in rows else None
    evaluation = evaluate_model(subject.model, data, subject.accelerator, names, noise_seeds)
    evaluation.note_sources(rows)
    normalised = processor.jpeg_quality is not None
    evaluation.main.format_bias = find_shortcuts(rows[subject.main], normalised).get("files")
    return evaluation


def compare_open_set_scores(
    model, parts: Mapping[str, Predictions]
) -> dict[str, dict[str, dict[str, float]]]:
    """
    For each of `TEST_SPLITS` among `parts` AUROC, AUPR, FPR95, EER and overlap against the part `unknown`: of
    the score in use, as verdicts have it, and of each other one of the package, fitted on the checkpoint's
    training images.
    benchmarks/open_set.py compares many more.
    """
    train, known = model.detector.train_, [name for name in TEST_SPLITS if name in parts]
    scores = {model.config.open_set_title: {name: part.open_set_score for name, part in parts.items()}}
    for features in (name for name in FEATURES if name in train):
        for name, make in OPEN_SET_SCORES.items():
            if (title := f"{name} of {features}") in scores:
                continue
            score = make().fit(train[features], train["labels"])
            scores[title] = {
                split: score.score_samples(getattr(part, features)) for split, part in parts.items()
            }
    return {
        split: {title: open_set_metrics(of[split], of["unknown"]) for title, of in scores.items()}
        for split in known
    }


def _over_noise_seeds(
    model, data: Mapping[str, LatentDataset], accelerator: Accelerator, first: dict[str, Metrics], count: int
) -> dict[str, dict[str, list[float]]]:
    """The main metrics of each split for each draw of the noise; `first` are those of the config's own."""
    config, own_seed = model.config, model.config.noise_seed
    draws = {
        split: {name: [metrics[name]] for name in OVER_NOISE if name in metrics}
        for split, metrics in first.items()
    }
    try:
        for seed in range(own_seed + 1, own_seed + count):
            model.protoleak.set_noise_seed(seed)
            parts = {name: predict(model, latents, accelerator, False) for name, latents in data.items()}
            for split, values in draws.items():
                metrics = compute_metrics(
                    parts[split], parts.get("unknown"), config.label_names, config.alpha, config.camera_alpha
                )
                for name in values:
                    values[name].append(metrics[name])
    finally:
        model.protoleak.set_noise_seed(own_seed)
    return draws
