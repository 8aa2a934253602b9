"""What images are trained and measured on: train, validation, test, cross and unknown of data sets."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetDict

from ..image_files_protoleak import find_images
from .columns import SOURCE, Columns, normalise
from .layouts import CROSS, TEST_SPLITS, UNKNOWN, Splits, read_splits

GROUP_COLUMNS = ("group", "photo", "prompt")  # rows that share one of these never go to different splits
FEWEST = {"train": 2, "validation": 1, "test": 1}  # images that a class needs in each split
# shares, where a data set has no such split (WILD's 300 and 200 of 1,000)
HELD_OUT = {"test": 0.3, "validation": 0.2}
logger = logging.getLogger(__name__)


def load_splits(
    name: str | Sequence[str],
    seed: int = 0,
    columns: Columns = Columns(),  # noqa: B008 (it is frozen)
    config_name: str | None = None,
    screen: Callable[[str, Dataset], Dataset] | None = None,
) -> Splits:
    """
    Train, validation, test and, where there are such, cross and unknown, with columns `image` (not decoded),
    `label` (str), and `source` where images have one.

    Missing validation and test splits are cut from train, by group where a column tells it. Several data sets
    are joined split by split; a generator that one of them trains on is no longer unknown in another.

    Args:
        columns ([`Columns`]): What the data set calls them.
        config_name (`str`, *optional*): Which of the data set's configurations.
        screen (`Callable`, *optional*): Is given the name of each split and all its rows in their order, and
            returns those to go on with.

    Raises:
        ValueError: a data set has no images or labels, or the known classes are fewer than two, or have too
            few images, or one is called "unknown"; no data set has the named column of sources; `cross` has a
            class that train lacks, or a source that its class has in train or validation.
    """
    names = [name] if isinstance(name, str) else list(name)
    return _for_training(
        [read_splits(part, columns, config_name) for part in names], names, seed, columns, screen
    )


def _for_training(
    parts: Sequence[Splits], names: Sequence[str], seed: int, columns: Columns, screen: Callable | None = None
) -> Splits:
    """What [`load_splits`] gives, from the splits that data sets have."""
    parts = [_with_held_out(part, name, seed, screen) for part, name in zip(parts, names, strict=True)]
    _check_source(columns, [part["train"] for part in parts], ", ".join(names))
    splits = parts[0] if len(parts) == 1 else _joined(parts, names)
    name, known = ", ".join(names), set(splits["train"]["label"])
    splits.label_names = [label for label in _numbered(parts) if label in known]
    _check_classes(splits, known, name)
    if CROSS in splits:
        _check_cross(splits, known, name)
    if UNKNOWN in splits and known & set(splits[UNKNOWN]["label"]):
        labels = np.array(splits[UNKNOWN]["label"])
        splits[UNKNOWN] = splits[UNKNOWN].select(np.flatnonzero(~np.isin(labels, list(known))))
        if not len(splits[UNKNOWN]):
            del splits[UNKNOWN]
    return splits


def _check_source(columns: Columns, parts: Sequence[Dataset], name: str) -> None:
    """That there is the column of sources, if it is named."""
    if columns.source != SOURCE and not any(SOURCE in part.column_names for part in parts):
        raise ValueError(f"{name} has no column {columns.source!r} that tells the sources")


def _numbered(parts: Sequence[Splits]) -> list[str]:
    """The classes as the first data set that has them numbers them; none if one has names alone."""
    if not all(part.label_names for part in parts):
        return []
    return list(dict.fromkeys(label for part in parts for label in part.label_names))


def _check_classes(splits: DatasetDict, known: set[str], name: str) -> None:
    """That there are classes to tell apart, with images enough in each split to train and measure them."""
    if len(known) < 2:
        raise ValueError(f"{name} has {len(known)} class in its train split, but at least 2 are needed")
    if UNKNOWN in known:
        raise ValueError(
            f"{name} has a class {UNKNOWN!r}, which is what a verdict calls an image of no known class; name "
            f"it otherwise, or put its images into a split {UNKNOWN!r}, which is never trained on"
        )
    counts = {split: Counter(splits[split]["label"]) for split in FEWEST}
    for split in ("validation", "test"):
        if extra := set(counts[split]) - known:
            raise ValueError(f"{name}: {split!r} has classes that train lacks: {sorted(extra)}")
    few = {
        label: ", ".join(f"{counts[split][label]} in {split}" for split in FEWEST)
        for label in sorted(known)
        if any(counts[split][label] < least for split, least in FEWEST.items())
    }
    if few:
        told = "; ".join(f"{label}: {numbers}" for label, numbers in few.items())
        needed = " and ".join(f"{least} in {split}" for split, least in FEWEST.items())
        raise ValueError(
            f"{name} has too few images of some classes; each needs {needed}, which takes 4 where the splits "
            f"are cut here, and more where they are cut by group. It has of {told}"
        )


def _joined(parts: Sequence[Splits], names: Sequence[str]) -> Splits:
    """
    Data sets split by split, with `group` and `source` where any of them has such. A group of one is none of
    another's; a data set that tells no sources is one source.
    """
    sources = any(SOURCE in part["train"].column_names for part in parts)
    groups = any(groups_of(part["train"]) is not None for part in parts)
    splits = Splits()
    for split in dict.fromkeys(split for part in parts for split in part):
        shares = []
        for name, part in ((n, p[split]) for n, p in zip(names, parts, strict=True) if split in p):
            rows, of_group = part.select_columns(["image", "label"]), groups_of(part)
            if sources:
                told = part[SOURCE][:] if SOURCE in part.column_names else [name] * len(part)
                rows = rows.add_column(SOURCE, [str(source) for source in told])
            if groups:
                told = [f"{split}:{i}" for i in range(len(part))] if of_group is None else of_group
                rows = rows.add_column("group", [f"{name}:{group}" for group in told])
            shares.append(rows)
        splits[split] = datasets.concatenate_datasets(shares)
    return splits


def _check_cross(splits: DatasetDict, known: set[str], name: str) -> None:
    """That the split `cross` shows known classes from sources that these classes don't have in training."""
    cross = splits[CROSS]
    if extra := set(cross["label"]) - known:
        raise ValueError(f"{name}: {CROSS!r} must have classes of train alone; it also has {sorted(extra)}")
    _check_compared(cross["label"], CROSS, name)
    if SOURCE not in cross.column_names:
        return
    of_class = set(zip(cross["label"], cross[SOURCE], strict=True))
    for split in ("train", "validation"):
        seen = set(zip(splits[split]["label"], splits[split][SOURCE], strict=True))
        if both := sorted(of_class & seen):
            raise ValueError(
                f"{name}: {CROSS!r} must have other sources of a class than {split!r}; both have {both[:5]}"
            )


def _with_held_out(splits: Splits, name: str, seed: int, screen: Callable | None) -> Splits:
    """One data set with train, validation, test and perhaps cross and unknown."""
    if "train" not in splits:
        raise ValueError(f"{name} has splits {sorted(splits)}, but training needs one called 'train'")
    if screen is not None:
        for split, rows in splits.items():
            splits[split] = screen(f"{name}, split {split!r}", rows)
    for split in ("test", "validation"):
        if split not in splits:
            share = HELD_OUT[split] / (1 - HELD_OUT["test"] if split == "validation" else 1)
            splits["train"], splits[split] = _cut(splits["train"], share, seed)
    return splits


def load_unknown(name: str) -> Dataset:
    """
    Every image of a data set, whatever its splits, labelled by its column `label`, by its folders where there
    are any, or else as "unknown".
    """
    files = [str(p) for p in find_images([name])] if Path(name).is_dir() else []
    if any(Path(file).parent == Path(name) for file in files):
        rows = Dataset.from_dict({"image": files, "label": [UNKNOWN] * len(files)})
        return normalise(rows.cast_column("image", datasets.Image()), name)[0]
    parts = [rows.select_columns(["image", "label"]) for rows in read_splits(name).values()]
    return datasets.concatenate_datasets(parts)


def held_out_images(
    name: str,
    label_names: Sequence[str],
    unknown: str | None = None,
    columns: Columns = Columns(),  # noqa: B008 (it is frozen)
    config_name: str | None = None,
) -> DatasetDict:
    """
    What a model of these classes is measured on: the splits `test` and `cross` of a data set, and `unknown`,
    its own unknown split and the images of another data set, where there are any. A data set with a split
    `train` is taken as training takes it, one without as it is; it need not show all of the classes.

    Raises:
        ValueError: the data set has neither split, or one shows fewer than two classes, or some that the
            model does not know, or that `test` lacks; or an unknown image is of a class that it knows.
    """
    available, known = read_splits(name, columns, config_name), set(label_names)
    if "train" in available:
        count, is_cut = len(available["train"]), "test" not in available
        available = _for_training([available], [name], 0, columns)
        if is_cut:
            logger.warning(
                f"{name} has no split 'test': of its {count} images the {len(available['test'])} that "
                f"training would hold out are measured on. To measure on all, put them into a split 'test'"
            )
    splits = DatasetDict({split: available[split] for split in TEST_SPLITS if split in available})
    if not splits:
        raise ValueError(
            f"{name} has splits {sorted(available)}; to be measured on, it needs 'test' or 'cross', or "
            f"'train' to cut one from"
        )
    _check_source(columns, list(splits.values()), name)
    for split, rows in splits.items():
        _check_measured(rows["label"], known, split, name)
    parts = {f"{name}, split {UNKNOWN!r}": available[UNKNOWN]} if UNKNOWN in available else {}
    parts |= {unknown: load_unknown(unknown)} if unknown else {}
    for what, part in parts.items():
        if both := known & set(part["label"]):
            raise ValueError(
                f"{what}: unknown images must be by generators that the model does not know; it knows "
                f"{sorted(both)}"
            )
    if parts:
        rows = [part.select_columns(["image", "label"]) for part in parts.values()]
        splits[UNKNOWN] = datasets.concatenate_datasets(rows)
    shown = [set(splits[split]["label"]) for split in TEST_SPLITS if split in splits]
    if extra := shown[-1] - shown[0]:  # none of one split alone
        raise ValueError(
            f"{name}: {CROSS!r} is compared with 'test', which lacks classes that it has: {sorted(extra)}. "
            f"Measure on each alone, as data sets of their own"
        )
    return splits


def _check_measured(labels: Sequence[str], known: set[str], split: str, name: str) -> None:
    """That a split has images of classes that a model knows."""
    if strange := set(labels) - known:
        raise ValueError(
            f"{name}, split {split!r}, has classes that the model does not know: {sorted(strange)}. Put "
            f"their images into a split {UNKNOWN!r}, or name their folder as unknown images; it knows "
            f"{sorted(known)}"
        )
    _check_compared(labels, split, name)


def _check_compared(labels: Sequence[str], split: str, name: str) -> None:
    if (count := len(set(labels))) < 2:
        raise ValueError(f"{name}, split {split!r}, has images of {count} class; metrics compare two or more")


def groups_of(rows: Dataset) -> np.ndarray | None:
    """The column that tells which rows belong together, where there is one. (N,)"""
    column = next((c for c in GROUP_COLUMNS if c in rows.column_names), None)
    return None if column is None else np.array(rows[column])


def count_sources(rows: Dataset) -> int | None:
    """How many sources the rows are from, where a column tells it."""
    return len(set(rows[SOURCE])) if SOURCE in rows.column_names else None


def _cut(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Cut a share off, by group if a column tells it, else within each class."""
    rng = np.random.default_rng(seed)
    groups = groups_of(rows)
    labels, cut = np.array(rows["label"]), np.zeros(len(rows), bool)
    if groups is not None:
        names = rng.permutation(np.unique(groups))
        cut = np.isin(groups, names[: _share_of(len(names), share)])
    else:
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            cut[members[: _share_of(len(members), share)]] = True
    return rows.select(np.flatnonzero(~cut)), rows.select(np.flatnonzero(cut))


def _share_of(count: int, share: float) -> int:
    """How many of `count` are cut off: one at least, but never all."""
    return min(count - 1, max(1, round(share * count)))
