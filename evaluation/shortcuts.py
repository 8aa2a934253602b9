"""What tells the classes apart without a look at the pixels, which a model may have learned instead."""

from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.tree import DecisionTreeClassifier

from ..image_files_protoleak import open_encoded
from .columns import SOURCE

FACTS = ("format", "mode", "size", "fields", "quantization")
TITLES = {
    "format": "file format",
    "mode": "colour mode",
    "size": "image size",
    "fields": "metadata",
    "quantization": "JPEG quality",
}
LEVEL = 0.01  # below which a p-value is more than chance
MOST = 500  # images of a class that are looked at


def find_shortcuts(rows: Dataset, normalised: bool = False) -> dict[str, dict[str, Any]]:
    """
    What [`guessed_from`] gives for `files`, their format, mode, size, metadata and quantization tables
    together, and for `source`, where a column tells it. No pixel is read. Empty where a class has one image.

    Args:
        rows (`Dataset`): With `image` (not decoded), `label`, and perhaps `source`.
        normalised (`bool`): Whether all images are encoded alike before a model sees them, so that of the
            files size alone may tell.
    """
    rows = rows.select(_some(np.array(rows["label"])))
    labels = np.array(rows["label"])
    if np.unique(labels, return_counts=True)[1].min() < 2:
        return {}
    facts = {name: np.array(column) for name, column in zip(FACTS, _facts(rows), strict=True)}
    told = {"size": facts["size"]} if normalised else facts
    shortcuts = {"files": guessed_from(told, labels)}
    if SOURCE in rows.column_names:
        shortcuts["source"] = guessed_from({SOURCE: np.array(rows[SOURCE])}, labels)
    return shortcuts


def guessed_from(facts: dict[str, np.ndarray], labels: np.ndarray, folds: int = 5) -> dict[str, Any]:
    """
    How well facts alone, (n,) each, tell the class: cross-validated balanced accuracy of a decision tree, and
    the chance that guesses as often of each class, made without a look, are right as often.

    Returns:
        `dict` with `balanced_accuracy`, `chance` (1 / K), `p_value`, `values` (distinct ones of each fact),
        and `telling`, the facts that tell the class by themselves.
    """
    accuracy, p_value = _cross_validate(np.stack(list(facts.values()), axis=1), labels, folds)
    telling = [
        name for name, column in facts.items() if _cross_validate(column[:, None], labels, folds)[1] < LEVEL
    ]
    return {
        "balanced_accuracy": accuracy,
        "chance": 1 / len(np.unique(labels)),
        "p_value": p_value,
        "values": {name: len(set(column)) for name, column in facts.items()},
        "telling": telling,
    }


def _cross_validate(facts: np.ndarray, labels: np.ndarray, folds: int) -> tuple[float, float]:
    """Balanced accuracy and p-value of guesses from facts (n, F)."""
    classes, counts = np.unique(labels, return_counts=True)
    tree = make_pipeline(
        OneHotEncoder(handle_unknown="ignore"),
        DecisionTreeClassifier(class_weight="balanced", random_state=0),
    )
    cv = StratifiedKFold(min(folds, int(counts.min())), shuffle=True, random_state=0)
    guesses = cross_val_predict(tree, facts, labels, cv=cv)
    by_chance = sum(
        share * (guesses == k).mean() for k, share in zip(classes, counts / len(labels), strict=True)
    )
    right = int((guesses == labels).sum())
    p_value = float(binomtest(right, len(labels), min(1.0, by_chance), "greater").pvalue)
    return float(balanced_accuracy_score(labels, guesses)), p_value


def _some(labels: np.ndarray) -> np.ndarray:
    """Places of at most `MOST` images of each class, in order."""
    order = np.random.default_rng(0).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == k][:MOST] for k in np.unique(labels)]))


def _facts(rows: Dataset) -> list[list[str]]:
    """Of each of `FACTS` a list of what the images say, which are not decoded."""
    table = []
    for row in rows.select_columns("image"):
        with open_header(row["image"]) as opened:
            tables = getattr(opened, "quantization", None)
            facts = [opened.format, opened.mode, opened.size, sorted(map(str, opened.info)), tables]
            table.append(list(map(str, facts)))
    return [list(column) for column in zip(*table, strict=True)]


def open_header(image: dict[str, Any]) -> Image.Image:
    """An image as `datasets` holds it, its pixels not decoded; to be closed."""
    return open_encoded(image["path"] if image["bytes"] is None else image["bytes"], str(image["path"]))


def shortcut_warnings(shortcuts: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each of what [`find_shortcuts`] gives that tells the classes, and what helps."""
    lines = []
    for name, bias in shortcuts.items():
        if bias["p_value"] >= LEVEL:
            continue
        told = f"(balanced accuracy {bias['balanced_accuracy']:.2f}, chance {bias['chance']:.2f})"
        if name == SOURCE:
            lines.append(
                f"the source alone tells the class {told}, so that a model may know sources for generators; "
                f"collect each class from several, and measure on other ones, in a split `cross`"
            )
            continue
        telling = bias.get("telling") or [fact for fact, count in bias["values"].items() if count > 1]
        *others, last = [TITLES[fact] for fact in telling]
        facts = f"{', '.join(others)} and {last}" if others else last
        helps = [] if telling == ["size"] else ["encode them alike, or use --normalise_format"]
        helps += ["cut all to one size"] if "size" in telling else []
        lines.append(
            f"{facts} alone tell the classes apart {told}, so that a model may learn these in the place of "
            f"how images were made; {'; '.join(helps)}"
        )
    return lines
