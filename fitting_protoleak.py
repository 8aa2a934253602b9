"""What fits without training: a detector on the labelled images of a data set, a class's prototypes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

LABEL_COLUMNS = ("label", "labels")
HELD_OUT = 3  # one image in so many calibrates, where a data set has no images for that


def known_and_held_out(dataset: Any, held_out: Any) -> tuple[Any, Any]:
    """The splits train and validation of a data set that has splits; of another itself, and `held_out`."""
    if not isinstance(dataset, Mapping):
        return dataset, held_out
    if "train" not in dataset:
        raise ValueError(f"a data set with splits needs one called 'train'; it has {sorted(dataset)}")
    return dataset["train"], dataset.get("validation") if held_out is None else held_out


def labelled_images(dataset: Any, names: list[str]) -> tuple[Sequence[Any], np.ndarray]:
    """
    Images, opened when they are taken, and classes 0..K-1, (n,).

    Args:
        dataset: A `datasets.Dataset`, whose transforms are passed over, or a sequence of dicts; with `image`
            and `label` (or `labels`): the name of a class, or its number, which is that of the data set's own
            names where it has such.
        names (`list[str]`): The model's classes.

    Raises:
        ValueError: a column is missing, there are no images, or a label is no class of the model.
    """
    if hasattr(dataset, "column_names"):
        rows = dataset.with_format(None)
        columns, features = rows.column_names, rows.features
    else:
        rows = list(dataset)
        columns, features = list(rows[0]) if rows else [], {}
    column = next((name for name in LABEL_COLUMNS if name in columns), None)
    if not len(rows) or "image" not in columns or column is None:
        raise ValueError(
            f"fitting needs rows with 'image' and 'label'; got {len(rows)} with columns {columns}"
        )
    if features:
        images, labels = rows["image"], rows[column][:]
    else:
        images, labels = [row["image"] for row in rows], [row[column] for row in rows]
    own = getattr(features.get(column), "names", None)
    return images, np.array([_class_of(label, own, names, i) for i, label in enumerate(labels)])


def _class_of(label: Any, own: list[str] | None, names: list[str], row: int) -> int:
    name = label
    if not isinstance(label, str):
        place, of = int(label), names if own is None else own
        name = of[place] if 0 <= place < len(of) else label
    if name not in names:
        raise ValueError(f"row {row} has label {name!r}, which is no class of the model: {names}")
    return names.index(name)


def cut(labels: np.ndarray) -> np.ndarray:
    """Which images calibrate, (n,): one in `HELD_OUT` of each class, the same ones each time."""
    held_out = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for k in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == k))
        held_out[own[: len(own) // HELD_OUT]] = True
    return held_out


def centres_of(embeddings: torch.Tensor, most: int) -> torch.Tensor:
    """
    Where a class's prototypes lie: k-means centres of its embeddings (n, D), one for every four of them and
    no more than `most`: (m, D), m = 0 without any.
    """
    try:  # where transformers doesn't look for what a checkpoint's code needs: loading doesn't
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("prototypes need scikit-learn: pip install scikit-learn") from error
    if not len(embeddings):
        return embeddings
    count = min(most, max(1, len(embeddings) // 4))
    found = KMeans(count, n_init=10, random_state=0).fit(embeddings.cpu().numpy())
    return torch.from_numpy(found.cluster_centers_)
