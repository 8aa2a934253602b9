"""
Which open-set score to use, chosen on known classes alone: a family of known generators in turn is left out
of training and taken for unknown. LeakZoo's own unknown split is not looked at.

    python benchmarks/open_set.py [any argument of train.py]

A family is generators that are hardly told apart: a tenth of one's validation images or more are called
another. To leave out one of them alone would ask for what nobody promises, to refuse a twin of a known one.
"""

import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import datasets
import numpy as np
from accelerate import Accelerator
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.configuration_protoleak import FEATURES
from protoleak.density_protoleak import OpenSetDetector
from protoleak.evaluate_protoleak.evaluate_protoleak import open_set_figures
from protoleak.evaluation.protocol import REAL, Predictions, all_open_set_scores, predict_splits
from protoleak.evaluation.splits import load_splits
from protoleak.train import TrainingArguments, train
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import confusion_matrix
from sklearn.preprocessing import RobustScaler
from transformers import HfArgumentParser


def leave_out(names: set[str], source: list[str], folder: Path) -> None:
    """A data set without some generators, whose test images become the unknown split."""
    splits = load_splits(source)
    for split in ("train", "validation", "test", "unknown"):
        rows = splits["test" if split == "unknown" else split]
        kept = [i for i, label in enumerate(rows["label"]) if (label in names) == (split == "unknown")]
        rows = rows.select(kept).cast_column("image", datasets.Image())
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def trained(
    arguments: TrainingArguments, *splits: str
) -> tuple[ProtoLeakForImageAttribution, dict[str, Predictions]]:
    """A model, and what it makes of the splits."""
    train(arguments)
    model = ProtoLeakForImageAttribution.from_pretrained(arguments.output_dir)
    processor = ProtoLeakImageProcessor.from_pretrained(arguments.output_dir)
    rows = load_splits(arguments.dataset_name)
    return model, predict_splits(model, processor, {split: rows[split] for split in splits}, Accelerator())


def families(made: Predictions, names: list[str]) -> list[set[str]]:
    """Generators, real photographs aside, joined where a tenth of one or more are called another."""
    confusion = confusion_matrix(made.labels, made.probabilities.argmax(axis=1), normalize="true")
    generated = [k for k, name in enumerate(names) if name != REAL]
    linked = confusion[np.ix_(generated, generated)] >= 0.1
    of_family = connected_components(linked, directed=False)[1]
    return [
        {names[k] for k, f in zip(generated, of_family, strict=True) if f == family}
        for family in range(of_family.max() + 1)
    ]


def all_scores(detector: OpenSetDetector, known: Predictions, unknown: Predictions) -> dict[str, float]:
    """AUROC of every score, and of every score of embeddings added to every one of statistics."""
    made = {}
    for name, scores in all_open_set_scores(detector, detector.held_out_, vars(known), vars(unknown)):
        in_spreads = RobustScaler().fit(scores[0][:, None])
        made[name] = [in_spreads.transform(one[:, None]).ravel() for one in scores[1:]]
    of_embeddings, of_statistics = (
        [name for name in made if name.endswith(features)] for features in FEATURES
    )
    for one, other in product(of_embeddings, of_statistics):
        made[f"{one} and {other}"] = [a + b for a, b in zip(made[one], made[other], strict=True)]
    return {name: open_set_figures(*scores)["auroc"] for name, scores in made.items()}


def main() -> None:
    arguments = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()[0]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, made = trained(replace(arguments, output_dir=f"{folder}/all"), "validation")
    left_out = families(made["validation"], model.config.label_names)
    for names in left_out:
        with tempfile.TemporaryDirectory() as folder:
            leave_out(names, arguments.dataset_name, Path(folder))
            of_rest = replace(arguments, dataset_name=[folder], output_dir=f"{folder}/run")
            model, made = trained(of_rest, "test", "unknown")
            for score, auroc in all_scores(model.detector, made["test"], made["unknown"]).items():
                found.setdefault(score, []).append(auroc)
    titles = [" and ".join(sorted(names)) for names in left_out]
    print(f"| open-set score | mean AUROC | without {' | '.join(titles)} |")
    print("| --- " * (len(titles) + 2) + "|")
    for score, values in sorted(found.items(), key=lambda item: -np.mean(item[1])):
        print(f"| {score} | {np.mean(values):.3f} | {' | '.join(f'{v:.3f}' for v in values)} |")


if __name__ == "__main__":
    main()
