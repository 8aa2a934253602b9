"""What a model gives for many images, and the figures of it: closed set, open set, real against generated."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.tree import DecisionTreeClassifier
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..configuration_protoleak import FEATURES
from ..density_protoleak import OPEN_SET_SCORES
from ..evaluate_protoleak.evaluate_protoleak import (
    attribution_figures,
    closed_set_figures,
    open_set_figures,
)
from ..postprocessing_protoleak import CHAINS, OPERATORS
from ..training.latents import LatentCache, LatentDataset, View

REAL = "real"
RESAMPLES = 300
OF_ROBUSTNESS = {
    "macro_auc": "Macro AUC",
    "accuracy": "accuracy",
    "auroc": "open-set AUROC",
    "false_unknown_rate": "known called unknown",
    "unknown_rejected": "unknown called unknown",
    "stability": "verdict kept",
}
OVER_NOISE = ("macro_auc", "accuracy", "real_auroc", "auroc", "false_unknown_rate")


@dataclass
class Predictions:
    """
    Of N images: embeddings (N, D), class probabilities (N, K), labels (N,), and where there are any
    open-set scores (N,), gates (N, D), statistics (N, S), p-values (N,) and class p-values (N, K).
    """

    embeddings: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    open_set_score: np.ndarray | None = None
    gates: np.ndarray | None = None
    statistics: np.ndarray | None = None
    p_values: np.ndarray | None = None
    class_p_values: np.ndarray | None = None

    def take(self, index: np.ndarray) -> "Predictions":
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Predictions(**{name: None if part is None else part[index] for name, part in parts.items()})


@torch.no_grad()
def predict(model, data: LatentDataset, accelerator: Accelerator, batch_size: int = 64) -> Predictions:
    """
    Run `model` over (latents, labels), shared out over the processes of `accelerator`; each gets all results.
    """
    module = accelerator.unwrap_model(model)
    training = module.training
    module.eval()
    parts: dict[str, list[np.ndarray]] = {}
    for latents, labels in accelerator.prepare(DataLoader(data, batch_size)):
        output = module(latents=latents)
        row = {
            "embeddings": output.embeddings.float(),
            "gates": output.gates.float(),
            "statistics": output.statistics.float(),
            "probabilities": output.logits.double().softmax(dim=1),
            "labels": labels,
        }
        for name in ("open_set_score", "p_values", "class_p_values"):
            if (part := getattr(output, name)) is not None:
                row[name] = part.to(accelerator.device)
        for name, part in accelerator.gather_for_metrics(row).items():
            parts.setdefault(name, []).append(part.cpu().numpy())
    module.train(training)
    return Predictions(**{name: np.concatenate(part) for name, part in parts.items()})


def predict_splits(
    model, processor, rows: Mapping[str, Dataset], accelerator: Accelerator
) -> dict[str, Predictions]:
    """[`predict`] of each split of `rows`, its images encoded with `processor` and the model's VAE."""
    cache = LatentCache(model, processor, accelerator)
    return {split: predict(model, cache.encode(part), accelerator) for split, part in rows.items()}


def figures(
    test: Predictions, unknown: Predictions | None, label_names: list[str], alpha: float = 0.05
) -> dict[str, Any]:
    """
    All figures of held-out test images of known classes, and of images by unknown generators where there are
    some.

    Keys are those of `evaluate_protoleak`, and see `TITLES`;
    `real_...` are those of the probability of the class "real", where there is one, against generated
    images. Error rates of verdicts are at the level `alpha`.
    """
    open_set = unknown is not None and test.open_set_score is not None
    result = attribution_figures(
        test.probabilities,
        test.labels,
        known_scores=test.open_set_score if open_set else None,
        unknown_scores=unknown.open_set_score if open_set else None,
        label_names=label_names,
    )
    if REAL in label_names:
        column = label_names.index(REAL)
        score, is_real = test.probabilities[:, column], test.labels == column
        of_real = open_set_figures(score[is_real], score[~is_real])
        result |= {f"real_{name}": value for name, value in of_real.items()}
    own = np.eye(len(label_names))[test.labels]
    result["ece"] = expected_calibration_error(test.probabilities, test.labels)
    result["brier"] = float(np.square(test.probabilities - own).sum(axis=1).mean())
    if test.p_values is not None:
        result["false_unknown_rate"] = float((test.p_values <= alpha).mean())
        if unknown is not None:
            result["unknown_rejected"] = float((unknown.p_values <= alpha).mean())
        best = test.probabilities.argmax(axis=1)
        in_set = test.class_p_values > alpha
        in_set[np.arange(len(best)), best] = True
        result["set_coverage"] = float(in_set[np.arange(len(best)), test.labels].mean())
        result["ambiguous_rate"] = float((in_set.sum(axis=1) > 1).mean())
    return result


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """
    ECE of the likeliest class: mean gap of confidence and accuracy in bins of equal width (Guo et al. 2017).
    """
    return float(sum(row["share"] * abs(row["confidence"] - row["accuracy"]) for row in
                     reliability(probabilities, labels, bins)))  # fmt: skip


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


def summarize(
    test: Predictions,
    unknown: Predictions | None,
    label_names: list[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
    alpha: float = 0.05,
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
        for name, value in figures(test.take(index), other, label_names, alpha).items():
            if name != "per_class_auc":
                draws.setdefault(name, []).append(value)
    return {
        "num_test": len(test.labels),
        "num_unknown": 0 if unknown is None else len(unknown.labels),
        "figures": figures(test, unknown, label_names, alpha),
        "intervals": {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in draws.items()},
    }


TITLES = {
    "macro_auc": "Macro AUC, closed set",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "real_auroc": "AUROC, real against generated",
    "real_aupr": "AUPR, real against generated",
    "real_fpr95": "FPR at 95 % TPR, generated taken for real",
    "real_eer": "EER, real against generated",
    "real_overlap": "overlap, real and generated",
    "auroc": "AUROC, known against unknown",
    "aupr": "AUPR, known against unknown",
    "fpr95": "FPR at 95 % TPR, unknown taken for known",
    "eer": "EER, known against unknown",
    "overlap": "overlap, known and unknown",
    "oscr": "OSCR",
    "false_unknown_rate": "known images called unknown, at alpha",
    "unknown_rejected": "unknown images called unknown, at alpha",
    "set_coverage": "prediction sets with the right class",
    "ambiguous_rate": "prediction sets of more than one class",
    "ece": "ECE",
    "brier": "Brier score",
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


# --- robustness ---------------------------------------------------------------------------------------------


def robustness(
    model, processor, splits: DatasetDict, accelerator: Accelerator, quick: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """
    The test and unknown images again, post-processed in every way of `OPERATORS` and `CHAINS`.

    Args:
        splits (`DatasetDict`): With `test` and perhaps `unknown`.
        quick (`bool`): Every fourth image, and the middle strength of each operator alone.

    Returns:
        A row for each operator and strength, the untouched images first: `operator`, `strength`,
        `macro_auc`, `accuracy`, `auroc` (known against unknown), `false_unknown_rate` and `unknown_rejected`
        (shares of known and of unknown images that are called unknown), `stability` (share of all images
        whose verdict is that of the untouched image).
    """
    names = model.config.label_names
    rows = {split: splits[split] for split in ("test", "unknown") if split in splits}
    if quick:
        rows = {split: part.select(range(0, len(part), 4)) for split, part in rows.items()}
    cases: list[tuple[str | None, float | None]] = [(None, None)]
    for name, (_, strengths) in OPERATORS.items():
        cases += [(name, s) for s in ((strengths[len(strengths) // 2],) if quick else strengths)]
    cases += [(name, None) for name in CHAINS]
    views = [View(operator=operator, strength=strength, seed=seed) for operator, strength in cases]
    cache = LatentCache(model, processor, accelerator)
    encoded = {split: cache.encode_views(part, views) for split, part in rows.items()}
    table, untouched = [], None
    for view in tqdm(views, desc="robustness", disable=not accelerator.is_main_process):
        made = {split: predict(model, of_views[view], accelerator) for split, of_views in encoded.items()}
        values = figures(made["test"], made.get("unknown"), names, model.config.alpha)
        verdicts = np.concatenate([_verdicts(part, model.config.alpha) for part in made.values()])
        untouched = verdicts if untouched is None else untouched
        row = {"operator": view.operator or "none", "strength": view.strength}
        row |= {name: values[name] for name in OF_ROBUSTNESS if name in values}
        table.append(row | {"stability": float((verdicts == untouched).mean())})
    return table


def _verdicts(predictions: Predictions, alpha: float) -> np.ndarray:
    """Index of the class that an image is attributed to; K for "unknown". (N,)"""
    unknown = predictions.probabilities.shape[1]
    return np.where(predictions.p_values <= alpha, unknown, predictions.probabilities.argmax(axis=1))


def format_robustness(table: list[dict[str, Any]]) -> str:
    """The rows of [`robustness`] as Markdown."""
    columns = [name for name in OF_ROBUSTNESS if name in table[0]]
    lines = [
        f"| operator | strength | {' | '.join(OF_ROBUSTNESS[c] for c in columns)} |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    for row in table:
        strength = "" if row["strength"] is None else f"{row['strength']:g}"
        values = " | ".join(f"{row[c]:.3f}" for c in columns)
        lines.append(f"| {row['operator']} | {strength} | {values} |")
    return "\n".join(lines)


# --- the whole protocol -------------------------------------------------------------------------------------


def evaluate_model(
    model,
    test: LatentDataset,
    unknown: LatentDataset | None,
    accelerator: Accelerator,
    unknown_names: list[str] | None = None,
    noise_seeds: int = 3,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """
    Everything that is to be known of a checkpoint: what [`summarize`] gives, and

    - per_unknown: AUROC of known against each unknown generator, how much of it is rejected, and the known
      class that most of it looks like, with its share;
    - confusion: counts, rows are true classes, columns verdicts with "unknown" as the last;
    - reliability: see [`reliability`];
    - open_set_scores: figures of every open-set score on the same embeddings;
    - noise: the main figures for each of `noise_seeds` draws of the evaluation noise, the config's first;
    - shuffled_macro_auc: with the test labels permuted, mean of 20; near 0.5;
    - scores: what the ROC curves are drawn from, open-set scores of `known` and `unknown` images, and
      probabilities of the class "real" for `real` and `generated` ones.

    Args:
        model ([`ProtoLeakForImageAttribution`]): With a detector.
        test, unknown: Latents, and labels 0..K-1 of known classes.
        unknown_names (`list[str]`, *optional*): Of each unknown image, its generator.
    """
    config = model.config
    names = config.label_names
    seen = predict(model, test, accelerator)
    strange = predict(model, unknown, accelerator) if unknown is not None else None
    report = {
        "labels": names,
        "alpha": config.alpha,
        "open_set_score": config.open_set_title,
    }
    report |= summarize(seen, strange, names, resamples, alpha=config.alpha)
    confusion = np.zeros((len(names), len(names) + 1), int)
    np.add.at(confusion, (seen.labels, _verdicts(seen, config.alpha)), 1)
    report["confusion"] = confusion.tolist()
    report["reliability"] = reliability(seen.probabilities, seen.labels)
    if strange is not None:
        report["open_set_scores"] = open_set_table(model, seen, strange)
        members = np.array(unknown_names) if unknown_names is not None else np.repeat("unknown", len(unknown))
        report["per_unknown"] = {}
        for name in np.unique(members):
            part = strange.take(np.flatnonzero(members == name))
            likeliest = np.bincount(part.probabilities.argmax(axis=1), minlength=len(names))
            report["per_unknown"][str(name)] = {
                "auroc": open_set_figures(seen.open_set_score, part.open_set_score)["auroc"],
                "unknown_rejected": float((part.p_values <= config.alpha).mean()),
                "likeliest": names[likeliest.argmax()],
                "likeliest_share": float(likeliest.max() / likeliest.sum()),
            }
    rng = np.random.default_rng(0)
    shuffled = [closed_set_figures(seen.probabilities, rng.permutation(seen.labels)) for _ in range(20)]
    report["shuffled_macro_auc"] = float(np.mean([f["macro_auc"] for f in shuffled]))
    report["scores"] = {"known": seen.open_set_score.tolist()}
    if strange is not None:
        report["scores"]["unknown"] = strange.open_set_score.tolist()
    if REAL in names:
        of_real, is_real = seen.probabilities[:, names.index(REAL)], seen.labels == names.index(REAL)
        report["scores"] |= {"real": of_real[is_real].tolist(), "generated": of_real[~is_real].tolist()}
    report["noise"] = _over_noise_seeds(model, test, unknown, accelerator, report["figures"], noise_seeds)
    return report


def _over_noise_seeds(model, test, unknown, accelerator, first: dict, count: int) -> dict[str, list[float]]:
    """The main figures for each draw of the noise; those of the config's own are at hand in `first`."""
    own_seed, names = model.config.noise_seed, model.config.label_names
    found = {name: [first[name]] for name in OVER_NOISE if name in first}
    try:
        for seed in range(own_seed + 1, own_seed + count):
            model.protoleak.set_noise_seed(seed)
            strange = predict(model, unknown, accelerator) if unknown is not None else None
            values = figures(predict(model, test, accelerator), strange, names, model.config.alpha)
            for name, of_seeds in found.items():
                of_seeds.append(values[name])
    finally:
        model.protoleak.set_noise_seed(own_seed)
    return found


def all_open_set_scores(
    detector, *images: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """
    Every score of `OPEN_SET_SCORES`, of embeddings and of statistics, fitted on a detector's training images:
    its name, and what it gives for each of `images`, which have `embeddings` and `statistics`.
    """
    train = detector.train_
    for features in FEATURES:
        for name, make in OPEN_SET_SCORES.items():
            score = make().fit(train[features], train["labels"])
            yield f"{name} of {features}", [score.score_samples(part[features]) for part in images]


def open_set_table(model, test: Predictions, unknown: Predictions) -> dict[str, dict[str, float]]:
    """AUROC, AUPR, FPR95, EER and overlap of every open-set score, fitted on the checkpoint's images."""
    table = {model.config.open_set_title: [test.open_set_score, unknown.open_set_score]}
    table |= all_open_set_scores(model.detector, vars(test), vars(unknown))
    return {name: open_set_figures(*scores) for name, scores in table.items()}


def format_bias(rows: Dataset, folds: int = 5) -> dict[str, Any]:
    """
    How well file format, mode, size and metadata fields alone tell the class: cross-validated balanced
    accuracy of a decision tree, and the chance of as many right answers by guessing. No pixel is read.

    Returns:
        `dict` with `balanced_accuracy`, `chance` (1 / K), `p_value`, `values` (distinct ones of each).
    """
    facts = []
    for image in rows["image"]:
        source = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
        with Image.open(source) as opened:
            tables = getattr(opened, "quantization", None)
            facts.append(
                [opened.format, opened.mode, str(opened.size), str(sorted(opened.info)), str(tables)]
            )
    labels = np.array(rows["label"])
    classes, counts = np.unique(labels, return_counts=True)
    folds = min(folds, int(counts.min()))
    if len(classes) < 2 or folds < 2:
        raise ValueError(
            f"format bias needs 2 classes of 2 images; got {dict(zip(classes, counts, strict=True))}"
        )
    tree = make_pipeline(
        OneHotEncoder(handle_unknown="ignore"),
        DecisionTreeClassifier(class_weight="balanced", random_state=0),
    )
    guesses = cross_val_predict(
        tree, np.array(facts), labels, cv=StratifiedKFold(folds, shuffle=True, random_state=0)
    )
    right = int((guesses == labels).sum())
    return {
        "balanced_accuracy": float(balanced_accuracy_score(labels, guesses)),
        "chance": 1 / len(classes),
        "p_value": float(binomtest(right, len(labels), counts.max() / len(labels), "greater").pvalue),
        "values": {
            name: len(set(column))
            for name, column in zip(
                ("format", "mode", "size", "fields", "quantization"), zip(*facts, strict=True), strict=True
            )
        },
    }


def format_report(report: dict[str, Any]) -> str:
    """The whole report of [`evaluate_model`] as Markdown."""
    lines = [
        f"{report['num_test']} test images of known classes, {report['num_unknown']} by unknown generators; "
        f"95 % bootstrap intervals over images; alpha = {report['alpha']}.",
        "",
        "| figure | value | interval |",
        "| --- | --- | --- |",
    ]
    for name, title in TITLES.items():
        if name in report["figures"]:
            low, high = report["intervals"][name]
            lines.append(f"| {title} | {report['figures'][name]:.4f} | {low:.4f} to {high:.4f} |")
    lines += ["", "| class | one-vs-rest AUC |", "| --- | --- |"]
    lines += [f"| {name} | {auc:.4f} |" for name, auc in report["figures"]["per_class_auc"].items()]
    if "per_unknown" in report:
        lines += [
            "",
            "| unknown generator | AUROC, known against it | called unknown | most look like |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {name} | {row['auroc']:.4f} | {row['unknown_rejected']:.4f} "
            f"| {row['likeliest']}, {row['likeliest_share']:.2f} |"
            for name, row in report["per_unknown"].items()
        ]
        lines += ["", "| open-set score | AUROC | AUPR | FPR95 | EER | overlap |", "| --- " * 6 + "|"]
        lines += [
            f"| {name}{' (in use)' if name == report['open_set_score'] else ''} | "
            + " | ".join(f"{row[key]:.4f}" for key in ("auroc", "aupr", "fpr95", "eer", "overlap"))
            + " |"
            for name, row in report["open_set_scores"].items()
        ]
    verdicts = [*report["labels"], "unknown"]
    lines += [
        "",
        f"| true class, then verdicts | {' | '.join(verdicts)} |",
        "| --- " * (len(verdicts) + 1) + "|",
    ]
    lines += [
        f"| {name} | {' | '.join(map(str, row))} |"
        for name, row in zip(report["labels"], report["confusion"], strict=True)
    ]
    lines += ["", "| confidence | accuracy | share of images |", "| --- | --- | --- |"]
    lines += [
        f"| {row['confidence']:.3f} | {row['accuracy']:.3f} | {row['share']:.3f} |"
        for row in report["reliability"]
    ]
    lines += ["", f"Over {len(report['noise']['macro_auc'])} noise seeds:"]
    lines += [
        f"- {TITLES[name]}: {np.mean(values):.4f} (from {min(values):.4f} to {max(values):.4f})"
        for name, values in report["noise"].items()
    ]
    lines += ["", f"Macro AUC with permuted labels: {report['shuffled_macro_auc']:.4f} (0.5 is chance)."]
    if "format_bias" in report:
        bias = report["format_bias"]
        lines.append(
            f"File format, mode, size and metadata alone: balanced accuracy {bias['balanced_accuracy']:.4f} "
            f"(chance {bias['chance']:.4f}, p = {bias['p_value']:.2g})."
        )
    return "\n".join(lines)
