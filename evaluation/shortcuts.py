"""What tells the classes apart without a look at the pixels, which a model may have learned instead."""

import io
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

FACTS = ("format", "mode", "size", "fields", "quantization")


def format_bias(rows: Dataset, folds: int = 5) -> dict[str, Any]:
    """
    How well file format, mode, size and metadata fields alone tell the class: cross-validated balanced
    accuracy of a decision tree, and the chance of as many right answers by guessing. No pixel is read.

    Returns:
        `dict` with `balanced_accuracy`, `chance` (1 / K), `p_value`, `values` (distinct ones of each).

    Raises:
        ValueError: fewer than two classes, or a class of one image.
    """
    facts = np.array([_facts(image) for image in rows["image"]])
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
    cv = StratifiedKFold(folds, shuffle=True, random_state=0)
    guesses = cross_val_predict(tree, facts, labels, cv=cv)
    right = int((guesses == labels).sum())
    return {
        "balanced_accuracy": float(balanced_accuracy_score(labels, guesses)),
        "chance": 1 / len(classes),
        "p_value": float(binomtest(right, len(labels), counts.max() / len(labels), "greater").pvalue),
        "values": {name: len(set(column)) for name, column in zip(FACTS, facts.T, strict=True)},
    }


def _facts(image: dict[str, Any]) -> list[str]:
    """Those of `FACTS` of an image that is not decoded."""
    source = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
    with Image.open(source) as opened:
        tables = getattr(opened, "quantization", None)
        return [opened.format, opened.mode, str(opened.size), str(sorted(opened.info)), str(tables)]


def tells_classes(bias: dict[str, Any], level: float = 0.01) -> bool:
    """Whether what [`format_bias`] gives is more than chance."""
    return bias["p_value"] < level
