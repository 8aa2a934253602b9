"""The columns of an image data set, whatever it calls them, as `image`, `label` (text) and `source`."""

import math
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from ..fitting_protoleak import LABEL_COLUMNS

SOURCE = "source"  # the column that tells where an image was collected
UNTOLD = "not told"  # the source of images that have none, where others have
TOLD = 10  # so many rows at most are named in an error


@dataclass(frozen=True)
class Columns:
    """
    What a data set calls its columns.

    Args:
        image (`str`, *optional*): By default `image`, or the only column of images.
        label (`str`, *optional*): By default `label`, or `labels`, or the only `ClassLabel`.
        source (`str`): Where images come from; a data set may have none.
    """

    image: str | None = None
    label: str | None = None
    source: str = SOURCE

    def image_in(self, rows: Dataset) -> str | None:
        """Which column of `rows` has the images, `None` if that is not clear."""
        of_images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if self.image:
            return self.image if self.image in rows.column_names else None
        return "image" if "image" in of_images else (of_images[0] if len(of_images) == 1 else None)

    def label_in(self, rows: Dataset) -> str | None:
        """Which column of `rows` has the labels, `None` if that is not clear."""
        if self.label:
            return self.label if self.label in rows.column_names else None
        if named := [name for name in LABEL_COLUMNS if name in rows.column_names]:
            return named[0]
        numbered = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
        return numbered[0] if len(numbered) == 1 else None


def normalise(
    rows: Dataset,
    what: str,
    columns: Columns = Columns(),  # noqa: B008 (it is frozen)
    missing: str | None = None,
) -> tuple[Dataset, list[str]]:
    """
    Rows with columns `image` (not decoded), `label` (str) and perhaps `source`, and the names of a
    `ClassLabel` in their order, none for other labels.

    Args:
        rows (`Dataset`): As it was loaded.
        what (`str`): What errors call it.
        columns ([`Columns`]): What it calls them.
        missing (`str`, *optional*): The label of rows that have none.

    Raises:
        ValueError: a column is missing or not clear, labels are no names or numbers, or rows have no image
            or no label; these are told by their number.
    """
    image, label = columns.image_in(rows), columns.label_in(rows)
    for column, kind in ((image, "image"), (label, "label")):
        if column is None:
            raise ValueError(
                f"{what} has no column that is clearly that of the {kind}s; name it by "
                f"--{kind}_column_name. Its columns: {', '.join(rows.column_names)}"
            )
    feature = rows.features[label]
    names = _label_names(rows, what, label, missing)
    rows = rows.remove_columns([column for column in {label, "label"} if column in rows.column_names])
    rows = _renamed(rows.add_column("label", names), image, "image")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    _require_all(_has_image(rows), what, f"no image in column {image!r}")
    if columns.source in rows.column_names:
        told = [UNTOLD if source is None else str(source) for source in rows[columns.source]]
        unused = [column for column in {columns.source, SOURCE} if column in rows.column_names]
        rows = rows.remove_columns(unused).add_column(SOURCE, told)
    return rows, feature.names if isinstance(feature, ClassLabel) else []


def _renamed(rows: Dataset, column: str, name: str) -> Dataset:
    """`column` as `name`, in the place of another one that was called so."""
    if column == name:
        return rows
    unused = [name] if name in rows.column_names else []
    return rows.remove_columns(unused).rename_column(column, name)


def _label_names(rows: Dataset, what: str, column: str, missing: str | None) -> list[str]:
    """The labels as text: names of a `ClassLabel`, texts as they are, numbers as they are written."""
    values, feature = rows[column][:], rows.features[column]
    if isinstance(feature, ClassLabel):
        values = [None if k is None or k < 0 else feature.int2str(k) for k in values]
    names = [_as_name(value, what, column) for value in values]
    if missing is None:
        _require_all(list(map(bool, names)), what, f"no label in column {column!r}")
    return [name or missing for name in names]


def _as_name(value: Any, what: str, column: str) -> str | None:
    """A label as text; `None` for one that is missing."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():  # of a table with gaps
        value = int(value)
    if not isinstance(value, str | int):
        raise ValueError(
            f"{what}: labels must be one name or number an image; column {column!r} holds {value!r}. Another "
            f"column is named by --label_column_name"
        )
    return str(value)


def _has_image(rows: Dataset) -> list[bool]:
    """Of each row whether it has an image, by its content or its path, which are not read."""
    told = []
    for batch in rows.select_columns("image").with_format("arrow").iter(1000):
        images = batch["image"].combine_chunks()
        given = [pc.is_valid(images.field(name)) for name in ("bytes", "path")]
        told += pc.and_(pc.is_valid(images), pc.or_(*given)).to_pylist()
    return told


def _require_all(told: list[bool], what: str, fault: str) -> None:
    bad = [i for i, holds in enumerate(told) if not holds]
    if bad:
        rows = ", ".join(map(str, bad[:TOLD])) + (", ..." if len(bad) > TOLD else "")
        raise ValueError(
            f"{what}: {len(bad)} of {len(told)} rows have {fault}, counted from 0: {rows}; give them one or "
            f"leave these rows out"
        )
