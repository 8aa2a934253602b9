"""
Class scorers beside the prototype head, and open-set scores of embeddings, statistics and logits: one table.

    python benchmarks/open_set.py [--checkpoint FOLDER] [--leave_out] [--sums N] [any argument of train.py]

A checkpoint is trained first, unless one is named. Its scores are compared on the data set's test and unknown
images, and so must not be chosen by that: --leave_out adds a choice on known classes alone, for which a
family of known generators in turn is left out of training and taken for unknown. A family is generators that
are hardly told apart: a tenth of one's validation images or more are called another. To leave out one of them
alone would ask for what nobody promises, to refuse a twin of a known one. Of the sums of a score of
embeddings and one of statistics, the best N are shown, 8 unless it is said.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import datasets
import numpy as np
from accelerate import Accelerator
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.configuration_protoleak import FEATURES
from protoleak.evaluate_protoleak.evaluate_protoleak import closed_set_metrics, open_set_metrics
from protoleak.evaluation.predictions import Predictions, predict_splits
from protoleak.evaluation.protocol import REAL
from protoleak.evaluation.report import markdown_table
from protoleak.evaluation.splits import load_splits
from protoleak.train import TrainingArguments, train
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import confusion_matrix
from sklearn.preprocessing import RobustScaler
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parent))
from scores import CLASS_SCORERS, OPEN_SET_SCORES, calibrated_probabilities, scores_of_logits

Rows = dict[str, dict[str, float]]  # a row of the table by its title, its cells by their column
CLOSED, OPEN = ("macro_auc", "accuracy"), ("auroc", "fpr95")
TITLES = {"macro_auc": "Macro AUC", "accuracy": "accuracy", "auroc": "AUROC", "fpr95": "FPR95"}
HEAD = "class scorer prototypes (in use)"
IN_USE = " (in use)"


# --- scores -------------------------------------------------------------------------------------------------


def compare_class_scorers(model: ProtoLeakForImageAttribution, test: Predictions) -> Rows:
    """Macro AUC and accuracy of the prototype head, and of scorers fitted on the training embeddings."""
    known, held_out = model.detector.train_, model.detector.held_out_
    probabilities = {HEAD: test.probabilities}
    for name, make in CLASS_SCORERS.items():
        scorer = make().fit(_doubles(known["embeddings"]), np.asarray(known["labels"]))
        samples = (_doubles(held_out["embeddings"]), np.asarray(held_out["labels"]))
        probabilities[f"class scorer {name}"] = calibrated_probabilities(
            scorer, *samples, _doubles(test.embeddings)
        )
    metrics = {name: closed_set_metrics(values, test.labels) for name, values in probabilities.items()}
    return {title: {name: values[name] for name in CLOSED} for title, values in metrics.items()}


def compare_open_set_scores(
    model: ProtoLeakForImageAttribution, test: Predictions, unknown: Predictions
) -> Rows:
    """AUROC and FPR95, known against unknown, of every score and of every sum; the one in use is marked."""
    scores = dict(fitted_scores(model, vars(test), vars(unknown)))
    for name in scores_of_logits(model, test):
        scores[f"{name} of logits"] = [scores_of_logits(model, part)[name] for part in (test, unknown)]
    rows = {}
    for title, (known, other) in scores.items():
        metrics = open_set_metrics(known, other)
        mark = IN_USE if title == model.config.open_set_title else ""
        rows[title + mark] = {name: metrics[name] for name in OPEN}
    return rows


def fitted_scores(
    model: ProtoLeakForImageAttribution, *images: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """
    Title of every score of embeddings and of statistics, fitted on the training images, and what it gives for
    each of `images`; then of every sum of two, each in units of its spread on held-out images.
    """
    known, held_out = model.detector.train_, model.detector.held_out_
    in_spreads: dict[str, dict[str, list[np.ndarray]]] = {features: {} for features in FEATURES}
    for features, (name, make) in product(FEATURES, OPEN_SET_SCORES.items()):
        score = make().fit(_doubles(known[features]), np.asarray(known["labels"]))
        values = [score.score_samples(_doubles(part[features])) for part in (held_out, *images)]
        yield f"{name} of {features}", values[1:]
        spread = RobustScaler().fit(values[0][:, None])
        in_spreads[features][name] = [spread.transform(part[:, None]).ravel() for part in values[1:]]
    first, second = FEATURES
    for (one, these), (other, those) in product(in_spreads[first].items(), in_spreads[second].items()):
        title = f"{one} of {first} and {other} of {second}"
        yield title, [a + b for a, b in zip(these, those, strict=True)]


def _doubles(features) -> np.ndarray:
    return np.asarray(features, float)


# --- the choice on known classes alone ----------------------------------------------------------------------


def families(validation: Predictions, names: list[str]) -> list[set[str]]:
    """Generators, real photographs aside, joined where a tenth of one or more are called another."""
    confusion = confusion_matrix(validation.labels, validation.likeliest(), normalize="true")
    generated = [k for k, name in enumerate(names) if name != REAL]
    linked = confusion[np.ix_(generated, generated)] >= 0.1
    of_family = connected_components(linked, directed=False)[1]
    return [
        {names[k] for k, f in zip(generated, of_family, strict=True) if f == family}
        for family in range(of_family.max() + 1)
    ]


def leave_out(names: set[str], source: list[str], folder: Path) -> None:
    """A data set without some generators, whose test images become the unknown split."""
    splits = load_splits(source)
    for split in ("train", "validation", "test", "unknown"):
        rows = splits["test" if split == "unknown" else split]
        is_left_out = np.isin(rows["label"], list(names))
        rows = rows.select(np.flatnonzero(is_left_out == (split == "unknown")))
        rows = rows.cast_column("image", datasets.Image())
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def compare_left_out(arguments: TrainingArguments, left_out: list[set[str]]) -> dict[str, list[float]]:
    """AUROC of every score, of each family that is left out of training in turn."""
    columns: dict[str, list[float]] = {}
    for names in left_out:
        with tempfile.TemporaryDirectory() as folder:
            leave_out(names, arguments.dataset_name, Path(folder))
            of_rest = replace(arguments, dataset_name=[folder], output_dir=f"{folder}/run")
            train(of_rest)
            model, parts = predictions_of(of_rest.output_dir, of_rest.dataset_name, "test", "unknown")
        for title, row in compare_open_set_scores(model, parts["test"], parts["unknown"]).items():
            columns.setdefault(title, []).append(row["auroc"])
    return columns


# --- the table ----------------------------------------------------------------------------------------------


def predictions_of(
    checkpoint: str, dataset_name: list[str], *splits: str
) -> tuple[ProtoLeakForImageAttribution, dict[str, Predictions]]:
    """A checkpoint, and what it gives for those of the splits that there are."""
    model = ProtoLeakForImageAttribution.from_pretrained(checkpoint)
    processor = ProtoLeakImageProcessor.from_pretrained(checkpoint)
    rows = {name: part for name, part in load_splits(dataset_name).items() if name in splits}
    return model, predict_splits(model, processor, rows, Accelerator())


def format_comparison(rows: Rows, columns: list[str], sums: int) -> str:
    """Class scorers in their order, then open-set scores, best first by the last column that all have."""
    by = next(name for name in ("mean AUROC, left out", "auroc") if name in columns)
    classes = {title: row for title, row in rows.items() if "macro_auc" in row}
    others = sorted((item for item in rows.items() if item[0] not in classes), key=lambda item: -item[1][by])
    of_two = [title for title, _ in others if " and " in title]
    hidden = {title for title in of_two[sums:] if IN_USE not in title}
    shown = [*classes.items(), *((title, row) for title, row in others if title not in hidden)]
    cells = ((title, *(f"{row[c]:.3f}" if c in row else "" for c in columns)) for title, row in shown)
    return markdown_table(("score", *(TITLES.get(name, name) for name in columns)), cells)


def main(argv: list[str] | None = None) -> Rows:
    parser = HfArgumentParser(TrainingArguments, description=__doc__.split("\n")[1])
    parser.add_argument("--checkpoint", help="compare its scores instead of those of a new one")
    parser.add_argument("--leave_out", action="store_true", help="choose on known classes alone")
    parser.add_argument("--sums", type=int, default=8, help="how many sums of two scores are shown")
    arguments, own = parser.parse_args_into_dataclasses(argv)
    with tempfile.TemporaryDirectory() as folder:
        if not own.checkpoint:
            train(replace(arguments, output_dir=f"{folder}/all"))
        checkpoint = own.checkpoint or f"{folder}/all"
        model, parts = predictions_of(checkpoint, arguments.dataset_name, "validation", "test", "unknown")
    rows, columns = compare_class_scorers(model, parts["test"]), list(CLOSED)
    if "unknown" in parts:
        rows |= compare_open_set_scores(model, parts["test"], parts["unknown"])
        columns += OPEN
    if own.leave_out:
        left_out = families(parts["validation"], model.config.label_names)
        titles = ["without " + " and ".join(sorted(names)) for names in left_out]
        columns += ["mean AUROC, left out", *titles]
        for title, aurocs in compare_left_out(arguments, left_out).items():
            choice = {
                "mean AUROC, left out": float(np.mean(aurocs)),
                **dict(zip(titles, aurocs, strict=True)),
            }
            rows[title] = rows.get(title, {}) | choice
    if len(columns) == len(CLOSED):
        raise ValueError(f"{arguments.dataset_name} has no unknown split; pass --leave_out")
    print(format_comparison(rows, columns, own.sums))
    return rows


if __name__ == "__main__":
    main()
