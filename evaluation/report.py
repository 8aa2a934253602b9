"""Evaluations as text: tables for a terminal and for Markdown, and the files that commands write."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .predictions import ORIGINS
from .protocol import Evaluation, SplitEvaluation, verdicts_in

TITLES = {
    "macro_auc": "Macro AUC, closed set",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "coverage_at_90": "share that can be answered, 90 % of it right",
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
    "generated_called_camera": "generated images called a camera",
    "unknown_called_camera": "images by unknown generators called a camera",
    "real_called_camera": "real images called a camera",
    "camera_called_generated": "real images called generated",
    "real_cant_tell": "real images of which it can't tell",
    "single_rate": "known images answered with one class",
    "single_precision": "of these answers, right",
    "false_unknown_rate": "known images called unknown, at alpha",
    "unknown_rejected": "unknown images called unknown, at alpha",
    "set_coverage": "prediction sets with the right class",
    "ambiguous_rate": "prediction sets of more than one class",
    "mean_set_size": "classes in a prediction set, mean",
    "ece": "ECE",
    "brier": "Brier score",
}
ROBUSTNESS_TITLES = {
    "macro_auc": "Macro AUC",
    "accuracy": "accuracy",
    "auroc": "open-set AUROC",
    "false_unknown_rate": "known called unknown",
    "unknown_rejected": "unknown called unknown",
    "generated_called_camera": "generated called a camera",
    "unknown_called_camera": "unknown called a camera",
    "no_evidence": "no evidence",
    "stability": "verdict kept",
}


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- several test splits side by side -----------------------------------------------------------------------


def format_summary(splits: Mapping[str, SplitEvaluation]) -> str:
    """Metrics and intervals as a table for a terminal, a column a test split."""
    header, *rows = [_metrics_header(splits), *_metrics_rows(splits)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_images_sentence(splits)]
    for row in [header, *rows]:
        lines.append("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    lines.append("  one-vs-rest AUC of each class")
    for name in _classes(splits):
        aucs = [_cell(split.per_class.get(name, {}).get("auc")) for split in splits.values()]
        lines.append(f"    {name:<40} {'  '.join(f'{auc:<6}' for auc in aucs)}".rstrip())
    return "\n".join(lines)


def format_report(evaluation: Evaluation) -> str:
    """The whole evaluation as Markdown: the test splits side by side, then what is of one of them."""
    splits = evaluation.splits
    levels = f"alpha = {evaluation.alpha}, camera_alpha = {evaluation.camera_alpha}"
    parts = [f"{_images_sentence(splits)}; 95 % intervals; {levels}.", *_notes(splits)]
    parts += [markdown_table(_metrics_header(splits), _metrics_rows(splits)), _per_class_table(splits)]
    parts += [table(splits) for table in (_origins_table, _per_unknown_table) if table(splits)]
    if evaluation.main.open_set_scores:
        parts.append(_open_set_table(splits, evaluation.open_set_score))
    for name, split in splits.items():
        parts += [f"### {name}"] if len(splits) > 1 else []
        parts += _split_sections(evaluation, split)
    return "\n\n".join(parts)


def _images_sentence(splits: Mapping[str, SplitEvaluation]) -> str:
    (first, main), *others = splits.items()
    seen, known = len(main.per_class), len(main.confusion)
    of_them = "known classes" if seen == known else f"{seen} of {known} known classes"
    sources = _from_sources(main, "" if first == "test" else "other ")
    parts = [f"{main.num_test} test images of {of_them}{sources}"]
    for name, split in others:
        share = f"{len(split.per_class)} of {len(main.per_class)} classes"
        parts.append(f"{split.num_test} of {share}{_from_sources(split, 'other ')} ({name})")
    return ", ".join([*parts, f"{main.num_unknown} by unknown generators"])


def _from_sources(split: SplitEvaluation, other: str) -> str:
    return "" if split.num_sources is None else f" from {split.num_sources} {other}sources"


def _notes(splits: Mapping[str, SplitEvaluation]) -> list[str]:
    """What a reader must know of the columns."""
    (first, main), *others = splits.items()
    notes = []
    if len(main.per_class) < len(main.confusion):
        notes.append("Averages are over the classes that occur; a model may call an image any that it knows.")
    if not others and first == "test" and main.num_sources is not None:
        notes.append(
            "The data set has no split `cross`: where training saw the sources of these images, what the "
            "figures are on other sources is not known."
        )
    for name, split in others:
        note = f"The gap is {name} less test"
        if len(split.per_class) < len(main.per_class):
            note += f", both on the {len(split.per_class)} classes that {name} has"
        notes.append(
            f"{note}. Accuracy, AUPR and calibration also depend on how many images each class has, which "
            "differs between them; balanced accuracy doesn't. Intervals tell of other images of these "
            "sources; other sources may differ by more."
        )
    return notes


def _measured(splits: Mapping[str, SplitEvaluation]) -> list[str]:
    """The metrics that there are."""
    return [name for name in TITLES if any(name in split.metrics for split in splits.values())]


def _metrics_header(splits: Mapping[str, SplitEvaluation]) -> list[str]:
    (first, main), *others = splits.items()
    header = ["metric", first]
    for name, split in others:
        header += [f"{first}, classes of {name}"] if len(split.per_class) < len(main.per_class) else []
        header += [name, "gap"]
    return header


def _metrics_rows(splits: Mapping[str, SplitEvaluation]) -> list[list[str]]:
    (_, main), *others = splits.items()
    rows = []
    for metric in _measured(splits):
        row = [TITLES[metric], _cell(main.metrics.get(metric), main.intervals.get(metric))]
        for _, split in others:
            if len(split.per_class) < len(main.per_class):
                row.append(_cell(split.same_classes.get(metric)))
            row.append(_cell(split.metrics.get(metric), split.intervals.get(metric)))
            gap = split.gap.get(metric)
            row.append("" if gap is None else f"{gap[0]:+.4f} [{gap[1]:+.4f}, {gap[2]:+.4f}]")
        rows.append(row)
    return rows


def _cell(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A figure with its interval; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _classes(splits: Mapping[str, SplitEvaluation]) -> list[str]:
    return list(dict.fromkeys(name for split in splits.values() for name in split.per_class))


def _per_class_table(splits: Mapping[str, SplitEvaluation]) -> str:
    titles = {"images": "images", "auc": "AUC", "recall": "recall", "set_coverage": "set coverage"}
    told = [row for split in splits.values() for row in split.per_class.values()]
    shown = [key for key in titles if any(key in row for row in told)]
    header = ["class", *(f"{name}: {titles[key]}" for name in splits for key in shown)]
    rows = []
    for label in _classes(splits):
        figures = [split.per_class.get(label, {}).get(key) for split in splits.values() for key in shown]
        rows.append([label, *(str(f) if isinstance(f, int) else _cell(f) for f in figures)])
    return markdown_table(header, rows)


def _origins_table(splits: Mapping[str, SplitEvaluation]) -> str | None:
    """What images of each kind are said to be: how many, and their share."""
    rows = {}
    for name, split in splits.items():
        for kind, counts in (split.origins or {}).items():
            title = "by unknown generators" if kind == "unknown" else f"{kind}, {name}"
            rows[title] = [f"{n} ({n / sum(counts.values()):.1%})" for n in counts.values()]
    header = ("images", *(f"said to be: {origin}" for origin in ORIGINS))
    return markdown_table(header, ([title, *cells] for title, cells in rows.items())) if rows else None


def _per_unknown_table(splits: Mapping[str, SplitEvaluation]) -> str | None:
    told = {name: split.per_unknown for name, split in splits.items() if split.per_unknown}
    if not told:
        return None
    of_main = next(iter(told.values()))
    origins = any("origins" in row for row in of_main.values())
    header = ["unknown generator", "images", *(f"AUROC, {name} against it" for name in told)]
    header += ["called unknown", *(ORIGINS if origins else []), "most look like"]
    rows = []
    for generator, row in of_main.items():
        cells = [generator, str(row["images"])]
        cells += [_cell(table[generator]["auroc"]) for table in told.values()]
        cells += [_cell(row.get("unknown_rejected")), *map(str, row.get("origins", {}).values())]
        rows.append([*cells, f"{row['likeliest']}, {row['likeliest_share']:.2f}"])
    return markdown_table(header, rows)


def _open_set_table(splits: Mapping[str, SplitEvaluation], in_use: str) -> str:
    """All figures of the main split; of the others the AUROC."""
    (_, main), *others = splits.items()
    header = ["open-set score", "AUROC", "AUPR", "FPR95", "EER", "overlap"]
    header += [f"AUROC, {name}" for name, _ in others]
    rows = []
    for name, row in main.open_set_scores.items():
        figures = [row[key] for key in ("auroc", "aupr", "fpr95", "eer", "overlap")]
        figures += [split.open_set_scores[name]["auroc"] for _, split in others]
        rows.append([f"{name} (in use)" if name == in_use else name, *map(_cell, figures)])
    return markdown_table(header, rows)


# --- one test split -----------------------------------------------------------------------------------------


def _split_sections(evaluation: Evaluation, split: SplitEvaluation) -> list[str]:
    sections = [_confusion_table(evaluation.labels, split), _reliability_table(split)]
    if split.noise and len(split.noise["macro_auc"]) > 1:
        sections.append(_noise_list(split))
    sections.append(f"Macro AUC with permuted labels: {split.shuffled_macro_auc:.4f} (0.5 is chance).")
    if split.format_bias:
        sections[-1] += "\n" + format_bias_sentence(split.format_bias)
    return sections


def _confusion_table(labels: list[str], split: SplitEvaluation) -> str:
    counted = zip(labels, split.confusion, strict=True)
    rows = ([name, *map(str, counts)] for name, counts in counted if name in split.per_class)
    return markdown_table(("true class, then verdicts", *verdicts_in(labels, split.confusion)), rows)


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


def format_bias_sentence(bias: Mapping[str, Any], what: str = "File format, mode, size and metadata") -> str:
    """How well `what` alone tells the classes, from what [`guessed_from`] gives."""
    return (
        f"{what} alone: balanced accuracy {bias['balanced_accuracy']:.4f} "
        f"(chance {bias['chance']:.4f}, p = {bias['p_value']:.2g})."
    )


def format_robustness(table: list[dict[str, Any]]) -> str:
    """The rows of [`measure_robustness`] as Markdown, under how many images they are of."""
    images = "{num_test} images of known classes, {num_unknown} by unknown generators.".format(**table[0])
    columns = [name for name in ROBUSTNESS_TITLES if name in table[0]]
    rows = (
        (
            row["operator"],
            "" if row["strength"] is None else f"{row['strength']:g}",
            *(f"{row[name]:.3f}" for name in columns),
        )
        for row in table
    )
    header = ("operator", "strength", *(ROBUSTNESS_TITLES[name] for name in columns))
    return f"{images}\n\n{markdown_table(header, rows)}"


def write_results(folder: str | Path, name: str, values: Any, text: str) -> None:
    """Write NAME.json and NAME.md into a folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (target / f"{name}.md").write_text(text + "\n", encoding="utf-8")
