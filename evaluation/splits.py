"""
Image data sets as `datasets` loads them: splits, labels, groups and sources.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from ..image_files_protoleak import SUFFIXES, find_images

GROUP_COLUMNS = ("group", "photo", "prompt")  # rows that share one of these never go to different splits
SOURCE = "source"  # the column that tells where an image was collected
CROSS = "cross"  # the split of known classes from sources that training never sees
# shares, where a data set has no such split (WILD's 300 and 200 of 1,000)
HELD_OUT = {"test": 0.3, "validation": 0.2}


def load_splits(name: str | Sequence[str], seed: int = 0, source_column: str = SOURCE) -> DatasetDict:
    """
    Train, validation, test and, where there are such, cross and unknown, with columns `image` (not decoded),
    `label` (str), and `source` where images have one.

    Missing validation and test splits are cut from train, by group where a column tells it. Several data sets
    are joined split by split; a generator that one of them trains on is no longer unknown in another.

    Args:
        source_column (`str`): What the column of sources is called; it becomes `source`.

    Raises:
        ValueError: a data set has no images or labels, or the known classes are fewer than two; no data set
            has `source_column`, and it is not the default; `cross` has a class that train lacks, or a source
            that its class has in train or validation.
    """
    names = [name] if isinstance(name, str) else list(name)
    parts = [_load(part, seed, source_column) for part in names]
    if source_column != SOURCE and not any(SOURCE in part["train"].column_names for part in parts):
        raise ValueError(f"{', '.join(names)} has no column {source_column!r} that tells the sources")
    splits = parts[0] if len(parts) == 1 else _joined(parts, names)
    name, known = ", ".join(names), set(splits["train"]["label"])
    if len(known) < 2:
        raise ValueError(f"{name} has {len(known)} class in its train split, but at least 2 are needed")
    for split in ("validation", "test"):
        if extra := set(splits[split]["label"]) ^ known:
            raise ValueError(
                f"{name}: train and {split!r} must have the same classes; they differ by {sorted(extra)}"
            )
    if CROSS in splits:
        _check_cross(splits, known, name)
    if "unknown" in splits and known & set(splits["unknown"]["label"]):
        labels = np.array(splits["unknown"]["label"])
        splits["unknown"] = splits["unknown"].select(np.flatnonzero(~np.isin(labels, list(known))))
        if not len(splits["unknown"]):
            del splits["unknown"]
    return splits


def _joined(parts: Sequence[DatasetDict], names: Sequence[str]) -> DatasetDict:
    """
    Data sets split by split, with `group` and `source` where any of them has such. A group of one is none of
    another's; a data set that tells no sources is one source.
    """
    sources = any(SOURCE in part["train"].column_names for part in parts)
    groups = any(groups_of(part["train"]) is not None for part in parts)
    splits = DatasetDict()
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
    if SOURCE not in cross.column_names:
        return
    of_class = set(zip(cross["label"], cross[SOURCE], strict=True))
    for split in ("train", "validation"):
        seen = set(zip(splits[split]["label"], splits[split][SOURCE], strict=True))
        if both := sorted(of_class & seen):
            raise ValueError(
                f"{name}: {CROSS!r} must have other sources of a class than {split!r}; both have {both[:5]}"
            )


def _load(name: str, seed: int, source_column: str) -> DatasetDict:
    """One data set with train, validation, test and perhaps cross and unknown."""
    splits = _read(name, source_column)
    if "train" not in splits:
        raise ValueError(f"{name} has splits {sorted(splits)}, but training needs one called 'train'")
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
    if Path(name).is_dir() and any(
        p.is_file() and p.suffix.lower() in SUFFIXES for p in Path(name).iterdir()
    ):
        files = [str(p) for p in find_images([name])]
        rows = Dataset.from_dict({"image": files, "label": ["unknown"] * len(files)})
        return _normalise(rows.cast_column("image", datasets.Image()), name)
    parts = [rows.select_columns(["image", "label"]) for rows in _read(name).values()]
    return datasets.concatenate_datasets(parts)


def held_out_images(
    name: str, label_names: Sequence[str], unknown: str | None = None, source_column: str = SOURCE
) -> DatasetDict:
    """
    What a model of these classes is measured on: the splits `test` and, where there is one, `cross` of a data
    set, and `unknown`, its own unknown split and the images of another data set, where there are any.

    Raises:
        ValueError: the test split has other classes, or an unknown image is of a known one.
    """
    available, known = load_splits(name, source_column=source_column), set(label_names)
    splits = DatasetDict({split: available[split] for split in ("test", CROSS) if split in available})
    parts = [available["unknown"]] if "unknown" in available else []
    if unknown:
        parts.append(load_unknown(unknown))
    if parts:
        columns = [rows.select_columns(["image", "label"]) for rows in parts]
        splits["unknown"] = datasets.concatenate_datasets(columns)
    if differing := known ^ set(splits["test"]["label"]):
        raise ValueError(
            f"{name} and the model must have the same classes; they differ by {sorted(differing)}"
        )
    if parts and (both := known & set(splits["unknown"]["label"])):
        raise ValueError(
            f"unknown images must be by generators that the model does not know; got {sorted(both)}"
        )
    return splits


def _read(name: str, source_column: str = SOURCE) -> DatasetDict:
    """The splits that a data set has, with columns `image` (not decoded), `label` (str), perhaps `source`."""
    if (Path(name) / "Closed_Set").is_dir():
        splits = DatasetDict(train=_class_folders(Path(name) / "Closed_Set"))
        if (Path(name) / "Open_Set").is_dir():
            splits["unknown"] = _class_folders(Path(name) / "Open_Set")
    elif (Path(name) / "train").is_dir() and not (Path(name) / "README.md").exists():
        # `datasets` would pass over a folder of another name than its usual splits, such as unknown
        folders = {p.name: str(p / "**") for p in Path(name).iterdir() if p.is_dir()}
        splits = _load_dataset(name, "imagefolder", data_files=folders)
    elif (parquet := list(Path(name).glob("*.parquet"))) and not (Path(name) / "README.md").exists():
        files: dict[str, list[str]] = {}  # split-00000-of-00001.parquet, and a split called unknown alike
        for path in sorted(parquet):
            files.setdefault(path.stem.split("-")[0], []).append(str(path))
        splits = _load_dataset(name, "parquet", data_files=files)
    else:
        splits = _load_dataset(name, name)
        if Path(name).is_dir() and "label" not in next(iter(splits.values())).features:
            # folders of one class
            splits = _load_dataset(name, "imagefolder", data_dir=name, drop_labels=False)
    return DatasetDict(
        {split: _normalise(rows, f"{name}, split {split!r}", source_column) for split, rows in splits.items()}
    )


def _load_dataset(source: str, *arguments, **options) -> DatasetDict:
    """
    `datasets.load_dataset`. It caches a folder with a card under the folder's name, and would give what was
    there before: here the names, sizes and times of a folder's files are part of the key.
    """
    if Path(source).is_dir():
        files = sorted(path for path in Path(source).rglob("*") if path.is_file())
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / "protoleak" / key)
    return load_dataset(*arguments, **options)


def _class_folders(root: Path) -> Dataset:
    """
    Images below `root`, labelled by the first folder, however deep they lie (WILD's step1, step2, step3). The
    last number in a file's name is its prompt's, where all classes have the same ones.
    """
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{root} holds no images; expected {root}/<generator>/*.png")
    labels = [p.relative_to(root).parts[0] for p in files]
    columns = {"image": [str(p) for p in files], "label": labels}
    prompts = [int(numbers[-1]) if (numbers := re.findall(r"\d+", p.stem)) else None for p in files]
    of_class = [{n for n, label in zip(prompts, labels, strict=True) if label == k} for k in set(labels)]
    if None not in prompts and all(numbers == of_class[0] for numbers in of_class):
        columns["prompt"] = prompts  # every generator has the same numbers: they are those of the prompts
    return Dataset.from_dict(columns).cast_column("image", datasets.Image())


def _normalise(rows: Dataset, what: str, source_column: str = SOURCE) -> Dataset:
    columns = {
        name: feature for name, feature in rows.features.items() if isinstance(feature, datasets.Image)
    }
    if not columns or "label" not in rows.features:
        raise ValueError(f"{what} needs an image column and a column 'label'; got {rows.features}")
    image = next(iter(columns))
    rows = rows if image == "image" else rows.rename_column(image, "image")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    if source_column in rows.column_names and source_column != SOURCE:
        unused = [SOURCE] if SOURCE in rows.column_names else []
        rows = rows.remove_columns(unused).rename_column(source_column, SOURCE)
    if isinstance(label := rows.features["label"], ClassLabel):
        names = label.int2str(rows["label"][:])
        rows = rows.remove_columns("label").add_column("label", names)
    return rows


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
        cut = np.isin(groups, names[: max(1, round(share * len(names)))])
    else:
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            cut[members[: max(1, round(share * len(members)))]] = True
    return rows.select(np.flatnonzero(~cut)), rows.select(np.flatnonzero(cut))
