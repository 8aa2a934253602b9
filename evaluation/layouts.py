"""Data sets of images as they lie on disk or on the Hub: in folders, in tables, with a card or without."""

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.repocard import metadata_load
from pyarrow import parquet

from ..image_files_protoleak import find_images
from .columns import Columns, normalise

CROSS = "cross"  # the split of known classes from sources that training never sees
TEST_SPLITS = ("test", CROSS)  # images of known classes: from the sources of training, and from other ones
UNKNOWN = "unknown"  # the split of generators that training never sees, and what a verdict calls their images
SPLITS = ("train", "validation", *TEST_SPLITS, UNKNOWN)
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


def read_splits(
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
