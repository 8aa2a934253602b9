"""
Image data sets as `datasets` loads them: splits, labels, groups and sources.
"""

import glob
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.repocard import metadata_load
from pyarrow import parquet

from ..image_files_protoleak import find_images
from .columns import SOURCE, Columns, normalise

GROUP_COLUMNS = ("group", "photo", "prompt")  # rows that share one of these never go to different splits
CROSS = "cross"  # the split of known classes from sources that training never sees
TEST_SPLITS = ("test", CROSS)  # images of known classes: from the sources of training, and from other ones
UNKNOWN = "unknown"  # the split of generators that training never sees, and what a verdict calls their images
SPLITS = ("train", "validation", *TEST_SPLITS, UNKNOWN)
FEWEST = {"train": 2, "validation": 1, "test": 1}  # images that a class needs in each split
# shares, where a data set has no such split (WILD's 300 and 200 of 1,000)
HELD_OUT = {"test": 0.3, "validation": 0.2}
TOLD = 5  # names of files that are passed over
logger = logging.getLogger(__name__)


class Splits(DatasetDict):
    """
    A data set's splits.

    Attributes:
        label_names (`list[str]`): Known classes in the order in which the data set itself numbers them, so
            that a model's numbers are the data set's; empty where it has names alone.
    """

    label_names: list[str] = []


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
    return _for_training([_read(part, columns, config_name) for part in names], names, seed, columns, screen)


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
    parts = [rows.select_columns(["image", "label"]) for rows in _read(name).values()]
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
    available, known = _read(name, columns, config_name), set(label_names)
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
    if len(both := [splits[split]["label"] for split in TEST_SPLITS if split in splits]) == 2 and (
        extra := set(both[1]) - set(both[0])
    ):
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


def _read(
    name: str,
    columns: Columns = Columns(),  # noqa: B008 (it is frozen)
    config_name: str | None = None,
) -> Splits:
    """The splits that a data set has, with columns `image` (not decoded), `label` (str), perhaps `source`."""
    folder, in_folder = Path(name), None if _has_card(Path(name)) else _reader(Path(name))
    if in_folder is not None:
        if config_name is not None:
            raise ValueError(f"{name} has no card that tells configurations such as {config_name!r}")
        raw = in_folder(folder)
    else:
        raw = _load_dataset(name, name, config_name)
        if folder.is_dir() and columns.label_in(next(iter(raw.values()))) is None:
            # folders of one class
            raw = _load_dataset(name, "imagefolder", data_dir=name, drop_labels=False)
    splits = Splits()
    for split, rows in raw.items():
        what = f"{name}, split {split!r}"
        _require_images(len(rows), what)
        missing = UNKNOWN if split == UNKNOWN else None
        splits[split], numbered = normalise(rows, what, columns, missing)
        splits.label_names = splits.label_names or numbered
    return splits


def _require_images(count: int, what: str) -> None:
    if not count:
        raise ValueError(f"{what}, has no images; leave it out, or put some there")


def _has_card(folder: Path) -> bool:
    """Whether a README.md tells `datasets` what the folder holds; most say nothing of that."""
    card = folder / "README.md"
    try:
        return card.is_file() and not {"configs", "dataset_info"}.isdisjoint(metadata_load(card) or {})
    except yaml.YAMLError as error:
        raise ValueError(f"{card}: what stands between its lines '---' is no YAML: {error}") from error


def _reader(folder: Path) -> Callable[[Path], DatasetDict] | None:
    """What reads the splits of a folder without a card that is laid out in one of these ways."""
    if (folder / "Closed_Set").is_dir():
        return _wild_folders
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _saved
    with_images = ("train", *TEST_SPLITS)
    if any((folder / split).is_dir() for split in with_images) or any(folder.glob("*.parquet")):
        return _folders_and_tables
    return None


def _wild_folders(folder: Path) -> DatasetDict:
    """Closed_Set/CLASS/, Open_Set/NAME/"""
    raw = DatasetDict(train=_class_folders(folder / "Closed_Set"))
    if (folder / "Open_Set").is_dir():
        raw[UNKNOWN] = _class_folders(folder / "Open_Set")
    return raw


def _saved(folder: Path) -> DatasetDict:
    """What `save_to_disk` wrote."""
    try:
        raw = datasets.load_from_disk(str(folder))
    except IndexError as error:  # what `datasets` raises of a split without rows
        raise ValueError(f"{folder} has a split without images; save it without that") from error
    return raw if isinstance(raw, DatasetDict) else DatasetDict(train=raw)


def _folders_and_tables(folder: Path) -> DatasetDict:
    """Each split as a folder of images or as parquet files."""
    raw, tables = _split_folders(folder), _parquet_files(folder)
    if both := sorted(set(raw) & set(tables)):
        raise ValueError(f"{folder} has {both} as folders and as parquet files; keep one of them")
    return DatasetDict(raw | tables)


def _parquet_files(folder: Path) -> DatasetDict:
    """split-00000-of-00001.parquet, and a split called unknown alike"""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        split = path.stem.split("-")[0]
        if not re.fullmatch(r"\w+(\.\w+)*", split):
            raise ValueError(f"{path} must be named after its split, such as test.parquet")
        files.setdefault(split, []).append(path)
    for split, paths in files.items():
        _require_images(sum(map(_num_rows, paths)), f"{folder}, split {split!r}")
    patterns = {split: [glob.escape(str(path)) for path in paths] for split, paths in files.items()}
    return _load_dataset(str(folder), "parquet", data_files=patterns) if files else DatasetDict()


def _num_rows(path: Path) -> int:
    try:
        return parquet.read_metadata(path).num_rows
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as parquet: {error}") from error


def _split_folders(folder: Path) -> DatasetDict:
    """
    SPLIT/CLASS/, which `datasets` reads, but for splits of other names than its own. Other folders are passed
    over. Each split by itself: the first one would lose its labels where it has a single class.
    """
    raw = DatasetDict()
    for split in SPLITS:
        if (place := folder / split).is_dir():
            _check_class_folders(place, split)
            links = sorted(path for path in place.iterdir() if path.is_symlink() and path.is_dir())
            patterns = [f"{glob.escape(str(path))}/**" for path in (place, *links)]  # links aren't followed
            options = {"data_files": {split: patterns}, "drop_labels": False}
            raw[split] = _load_dataset(str(place), "imagefolder", **options)[split]
    return raw


def _check_class_folders(place: Path, split: str) -> None:
    """That each image of a split lies in a folder of its class, where no table tells them."""
    what, files = f"{place.parent}, split {split!r}", sorted(_files_in(place))
    tables = [path for path in files if path.name in ImageFolder.METADATA_FILENAMES]
    images = [path for path in files if path.suffix.lower() in ImageFolder.EXTENSIONS and path.is_file()]
    if others := [str(path) for path in sorted({*files} - {*tables, *images})]:
        named = ", ".join(others[:TOLD]) + (", ..." if len(others) > TOLD else "")
        logger.warning(f"{what}: passed over, as no images that are read here ({len(others)}): {named}")
    _require_images(len(images), what)
    depths = {len(path.relative_to(place).parts): path for path in images}
    if split != UNKNOWN and not tables and (len(depths) > 1 or 1 in depths):
        told = ", ".join(str(depths[depth]) for depth in sorted(depths) if depth != 2)
        raise ValueError(
            f"{what}: each image must lie in a folder of its class, {place}/CLASS/, or "
            f"{place}/metadata.csv must tell it; some lie elsewhere, such as {told}"
        )


def _files_in(folder: Path) -> Iterator[Path]:
    """All files, also behind links to folders, but what is hidden."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _load_dataset(source: str, *arguments, **options) -> DatasetDict:
    """
    `datasets.load_dataset`. It caches a folder with a card under the folder's name, and would give what was
    there before: here the names, sizes and times of a folder's files are part of the key.
    """
    if Path(source).is_dir():
        files = sorted(path for path in _files_in(Path(source)) if path.is_file())
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / "protoleak" / key)
    return load_dataset(*arguments, **options)


def _class_folders(root: Path) -> Dataset:
    """
    Images below `root`, labelled by the first folder, however deep they lie (WILD's step1, step2, step3). The
    last number in a file's name is its prompt's, where all classes have the same ones.
    """
    files = find_images([root])
    if not files:
        raise ValueError(f"{root} holds no images; expected {root}/<generator>/*.png")
    labels = [p.relative_to(root).parts[0] for p in files]
    columns = {"image": [str(p) for p in files], "label": labels}
    prompts = [int(numbers[-1]) if (numbers := re.findall(r"\d+", p.stem)) else None for p in files]
    of_class = [{n for n, label in zip(prompts, labels, strict=True) if label == k} for k in set(labels)]
    if None not in prompts and all(numbers == of_class[0] for numbers in of_class):
        columns["prompt"] = prompts  # every generator has the same numbers: they are those of the prompts
    return Dataset.from_dict(columns).cast_column("image", datasets.Image())


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
