"""Evaluations as text: tables for a terminal and for Markdown, and the files that commands write."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Evaluation, SplitEvaluation

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
ROBUSTNESS_TITLES = {
    "macro_auc": "Macro AUC",
    "accuracy": "accuracy",
    "auroc": "open-set AUROC",
    "false_unknown_rate": "known called unknown",
    "unknown_rejected": "unknown called unknown",
    "stability": "verdict kept",
}
SHORTCUT_WARNING = (
    "file formats, sizes or metadata alone tell the classes apart, so a model may have learned those; "
    "evaluate with --normalise_format, and train on files that are encoded alike"
)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_summary(split: SplitEvaluation) -> str:
    """Metrics and intervals as a table for a terminal."""
    lines = [f"{split.num_test} test images of known classes, {split.num_unknown} by unknown generators"]
    for name, title in _measured(split):
        low, high = split.intervals[name]
        lines.append(f"  {title:<42} {split.metrics[name]:.4f}  [{low:.4f}, {high:.4f}]")
    lines.append("  one-vs-rest AUC of each class")
    lines += [f"    {name:<40} {auc:.4f}" for name, auc in split.metrics["per_class_auc"].items()]
    return "\n".join(lines)


def _measured(split: SplitEvaluation) -> list[tuple[str, str]]:
    """Name and title of the metrics that there are."""
    return [(name, title) for name, title in TITLES.items() if name in split.metrics]


def format_report(evaluation: Evaluation) -> str:
    """The whole evaluation as Markdown, one test split after another."""
    parts = []
    for name, split in evaluation.splits.items():
        parts += [f"### {name}"] if len(evaluation.splits) > 1 else []
        parts += _split_sections(evaluation, split)
    return "\n\n".join(parts)


def _split_sections(evaluation: Evaluation, split: SplitEvaluation) -> list[str]:
    sections = [
        f"{split.num_test} test images of known classes, {split.num_unknown} by unknown generators; "
        f"95 % bootstrap intervals over images; alpha = {evaluation.alpha}.",
        _metrics_table(split),
        markdown_table(
            ("class", "one-vs-rest AUC"),
            ((name, f"{auc:.4f}") for name, auc in split.metrics["per_class_auc"].items()),
        ),
    ]
    if split.per_unknown:
        sections.append(_per_unknown_table(split))
    if split.open_set_scores:
        sections.append(_open_set_table(split, evaluation.open_set_score))
    sections += [_confusion_table(evaluation.labels, split), _reliability_table(split)]
    if split.noise:
        sections.append(_noise_list(split))
    sections.append(f"Macro AUC with permuted labels: {split.shuffled_macro_auc:.4f} (0.5 is chance).")
    if split.format_bias:
        sections[-1] += "\n" + _format_bias_sentence(split)
    return sections


def _metrics_table(split: SplitEvaluation) -> str:
    rows = []
    for name, title in _measured(split):
        low, high = split.intervals[name]
        rows.append((title, f"{split.metrics[name]:.4f}", f"{low:.4f} to {high:.4f}"))
    return markdown_table(("metric", "value", "interval"), rows)


def _per_unknown_table(split: SplitEvaluation) -> str:
    header = ("unknown generator", "AUROC, known against it", "called unknown", "most look like")
    rows = (
        (
            name,
            f"{row['auroc']:.4f}",
            f"{row['unknown_rejected']:.4f}" if "unknown_rejected" in row else "",
            f"{row['likeliest']}, {row['likeliest_share']:.2f}",
        )
        for name, row in split.per_unknown.items()
    )
    return markdown_table(header, rows)


def _open_set_table(split: SplitEvaluation, in_use: str) -> str:
    header = ("open-set score", "AUROC", "AUPR", "FPR95", "EER", "overlap")
    rows = (
        (
            f"{name} (in use)" if name == in_use else name,
            *(f"{row[key]:.4f}" for key in ("auroc", "aupr", "fpr95", "eer", "overlap")),
        )
        for name, row in split.open_set_scores.items()
    )
    return markdown_table(header, rows)


def _confusion_table(labels: list[str], split: SplitEvaluation) -> str:
    rows = ((name, *map(str, counts)) for name, counts in zip(labels, split.confusion, strict=True))
    return markdown_table(("true class, then verdicts", *labels, "unknown"), rows)


def _reliability_table(split: SplitEvaluation) -> str:
    columns = ("confidence", "accuracy", "share")
    rows = ([f"{row[name]:.3f}" for name in columns] for row in split.reliability)
    return markdown_table(("confidence", "accuracy", "share of images"), rows)


def _noise_list(split: SplitEvaluation) -> str:
    lines = [f"Over {len(split.noise['macro_auc'])} noise seeds:"]
    lines += [
        f"- {TITLES[name]}: {np.mean(values):.4f} (from {min(values):.4f} to {max(values):.4f})"
        for name, values in split.noise.items()
    ]
    return "\n".join(lines)


def _format_bias_sentence(split: SplitEvaluation) -> str:
    bias = split.format_bias
    return (
        f"File format, mode, size and metadata alone: balanced accuracy {bias['balanced_accuracy']:.4f} "
        f"(chance {bias['chance']:.4f}, p = {bias['p_value']:.2g})."
    )


def format_robustness(table: list[dict[str, Any]]) -> str:
    """The rows of [`measure_robustness`] as Markdown."""
    columns = [name for name in ROBUSTNESS_TITLES if name in table[0]]
    rows = (
        (
            row["operator"],
            "" if row["strength"] is None else f"{row['strength']:g}",
            *(f"{row[name]:.3f}" for name in columns),
        )
        for row in table
    )
    return markdown_table(("operator", "strength", *(ROBUSTNESS_TITLES[name] for name in columns)), rows)


def write_results(folder: str | Path, name: str, values: Any, text: str) -> None:
    """Write NAME.json and NAME.md into a folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (target / f"{name}.md").write_text(text + "\n", encoding="utf-8")
