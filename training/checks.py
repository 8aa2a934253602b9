"""What is looked at before anything is learned: whether images can be read, and what would ruin a model."""

import logging
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from datasets import Dataset

from ..configuration_protoleak import LONGEST_TEXT
from ..evaluation.shortcuts import find_shortcuts, open_header, shortcut_warnings
from ..evaluation.splits import SOURCE
from ..image_processing_protoleak import open_image
from .cross_fitting import count_sources

FEW = 50  # below so many images of a class its figures mean little
TOLD = 20  # so many unreadable images at most are named in an error
NAMED = 10  # so many classes at most are named in a limit
logger = logging.getLogger("protoleak.train")


class Screen:
    """
    Keeps images that can't be read out of the splits that it is called with, and remembers them.

    Args:
        max_pixels (`int`): Larger ones can't.
    """

    def __init__(self, max_pixels: int):
        self.max_pixels = max_pixels
        self.faults: list[str] = []

    def __call__(self, what: str, rows: Dataset) -> Dataset:
        """The rows whose images can be read; `what` names the split."""
        with ThreadPoolExecutor(2) as pool:
            batches = rows.select_columns("image").iter(16)  # all at once would be in memory
            reasons = [reason for batch in batches for reason in pool.map(self._fault, batch["image"])]
        told = [f"{what}, row {i}: {reason}" for i, reason in enumerate(reasons) if reason]
        self.faults += told
        readable = np.flatnonzero([reason is None for reason in reasons])
        return rows.select(readable) if told else rows

    def _fault(self, image: dict[str, Any]) -> str | None:
        try:
            open_image(image, self.max_pixels, name=image["path"])
        except (OSError, ValueError, MemoryError) as error:
            return str(error) or type(error).__name__
        return None

    def settle(self, skip: bool) -> None:
        """
        Tell all that could not be read.

        Raises:
            OSError: there are such images, and they are not to be skipped.
        """
        if not self.faults:
            return
        lines = self.faults[:TOLD] + (["..."] if len(self.faults) > TOLD else [])
        told = "\n  ".join([f"{len(self.faults)} images can't be read:", *lines])
        if not skip:
            raise OSError(f"{told}\nMend or remove them, or go on without them with --skip_unreadable")
        logger.warning("%s\nThey are left out.", told)


def look_for_faults(rows: Dataset, normalised: bool) -> dict[str, Any]:
    """
    What ruins a model that learns from `rows`, told in a line each.

    Args:
        rows (`Dataset`): Training images, with `label` and perhaps `source`.
        normalised (`bool`): Whether their format is normalised.

    Returns:
        `dict` with `shortcuts`, see [`find_shortcuts`], and `warnings`, the lines.
    """
    shortcuts = find_shortcuts(rows, normalised)
    warnings = [*shortcut_warnings(shortcuts), *_of_few(rows), *_of_one_source(rows)]
    for line in warnings:
        logger.warning("warning: %s", line)
    return {"shortcuts": shortcuts, "warnings": warnings}


def _of_few(rows: Dataset) -> list[str]:
    few = {label: count for label, count in sorted(Counter(rows["label"]).items()) if count < FEW}
    told = ", ".join(f"{label} ({count})" for label, count in few.items())
    return [f"fewer than {FEW} images to learn from: {told}; their figures mean little"] if few else []


def _of_one_source(rows: Dataset) -> list[str]:
    if SOURCE not in rows.column_names:
        return []
    alone = sorted(label for label, count in count_sources(rows).items() if count == 1)
    told = ", ".join(alone)
    return [f"a single source: {told}; what is learned of these may be that source"] if alone else []


# --- what a model is valid for ------------------------------------------------------------------------------


def note_scope(model: Any, rows: Dataset, titles: list[str], kind: str | None = None) -> None:
    """
    Write into the config of a model what it learned from, and what its detector can never say, see `scope` of
    [`ProtoLeakConfig`].

    Args:
        model ([`ProtoLeakForImageAttribution`]): With a detector.
        rows (`Dataset`): What it learned from.
        titles (`list[str]`): What the data sets are called.
        kind (`str`, *optional*): What the images are, in words.
    """
    formats, sides = set(), set()
    for row in rows.select_columns("image"):
        with open_header(row["image"]) as image:
            formats.add(image.format)
            sides |= set(image.size)
    scope = {
        "trained_on": as_line(" and ".join(titles)),
        "kind": kind and as_line(kind),
        "images": len(rows),
        "sources": len(set(rows[SOURCE])) if SOURCE in rows.column_names else None,
        "formats": sorted(formats),
        "sizes": [min(sides), max(sides)],
        "limits": limits_of(model.detector, model.config.alpha, model.config.camera_alpha),
    }
    model.config.scope = {name: value for name, value in scope.items() if value}
    for line in scope["limits"]:
        logger.warning("warning: %s", line)


def note_enrolled(model: Any, name: str, sizes: Iterable[tuple[int, int]]) -> None:
    """
    Add a class that was enrolled to the scope of a model, where that has one.

    Args:
        sizes: Width and height of each of its images.
    """
    config, sides = model.config, [side for size in sizes for side in size]
    if not config.scope:
        return
    count, scope = len(sides) // 2, dict(config.scope)
    scope["trained_on"] = as_line(f"{scope.get('trained_on', 'others')} and {count} images of {name}")
    scope["images"] = scope.get("images", 0) + count
    known = scope.get("sizes", sides)
    scope["sizes"] = [min(*known, *sides), max(*known, *sides)]
    scope["limits"] = limits_of(model.detector, config.alpha, config.camera_alpha)
    config.scope = {key: value for key, value in scope.items() if value}


def as_line(text: str) -> str:
    """Text as a config's scope takes it: one line of printable characters, not too long."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in line)[:LONGEST_TEXT]


def limits_of(detector: Any, alpha: float, camera_alpha: float) -> list[str]:
    """What a detector can never say at these levels, as too few images calibrate it: a sentence each."""
    limits, at = [], f"at alpha {alpha:g}"
    if detector.p_value(np.array([-np.inf]))[0] > alpha:
        count = len(detector.calibration_)
        limits.append(f"only {count} images calibrate it, so that none is ever called unknown {at}")
    probabilities = 1 - np.eye(len(detector.labels))
    p_values = detector.class_p_values(probabilities / probabilities.sum(axis=1, keepdims=True)).diagonal()
    if kept := [name for name, p in zip(detector.labels, p_values, strict=True) if p > alpha]:
        names = ", ".join(kept[:NAMED]) + (f" and {len(kept) - NAMED} more" if len(kept) > NAMED else "")
        limits.append(as_line(f"too few images calibrate {names} to ever rule them out {at}"))
    generated = detector.generated_calibration_
    if generated is not None and 1 / (1 + len(generated)) > camera_alpha:
        limits.append(
            f"only {len(generated)} generated images calibrate it, so that none is ever called a camera's at "
            f"camera_alpha {camera_alpha:g}"
        )
    return limits
