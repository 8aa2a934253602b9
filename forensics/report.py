"""What a report tells: verdicts and reasons in words, and what a second examiner needs to repeat them."""

import importlib.metadata
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import Pipeline

from ..evaluation.report import TITLES
from ..pipeline_protoleak import CANT_TELL, NO_EVIDENCE, REAL, RECORD_FIELDS, ImageAttributionPipeline
from .figures import EmbeddingMap, step_in_words
from .provenance import contradiction, summarise_provenance
from .scan import Attributor, checkpoint_file

PACKAGES = ("protoleak", "torch", "transformers", "diffusers", "numpy", "pillow", "scikit-learn")


class Examiner:
    """
    Attributes images with their reasons.

    Args:
        model (`str`): Checkpoint folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
    """

    def __init__(self, model: str, revision: str | None = None):
        self.attributor = Attributor(model, revision)
        self.network = self.attributor.network
        self.pipeline: Pipeline = ImageAttributionPipeline(
            model=self.network, image_processor=self.attributor.processor
        )
        self.measured = _measured(model, revision)
        self.map = EmbeddingMap(self.network.detector) if self.network.detector is not None else None

    def examine(self, file: str | os.PathLike) -> dict[str, Any]:
        """
        The record of a file as `protoleak attribute` gives it, with `explanation`; `error` tells why there is
        none.
        """
        row, image = self.attributor.open(Path(file))
        if image is None:
            return dict.fromkeys((*RECORD_FIELDS, "stability", "explanation", "contradiction")) | row
        record = self.pipeline(image, explain=True) | row
        return record | {"contradiction": contradiction(record["origin"], record["provenance"])}

    def about(self) -> dict[str, Any]:
        """
        What a second examiner needs: files and their digests, versions, settings, error rates, classes; and
        when it was asked for.
        """
        config = self.network.config
        detector = self.network.detector
        return {
            "model": self.attributor.name,
            "revision": self.attributor.revision,
            "files": self.attributor.weights,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            "noise_seed": config.noise_seed,
            "timesteps": config.timesteps,
            "alpha": config.alpha,
            "camera_alpha": config.camera_alpha,
            "threshold": detector.threshold(config.alpha) if detector is not None else None,
            "open_set_score": config.open_set_title,
            "classes": config.label_names,
            "error_rates": _error_rates(self.measured),
            "errors": errors_in_words(self.measured),
            "measured_on": self.measured.get("dataset"),
            "scope": config.scope_title,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _measured(model: str, revision: str | None) -> dict[str, Any]:
    """The checkpoint's metrics.json, empty where there is none; `ValueError` where it is something else."""
    path = checkpoint_file(model, "metrics.json", revision=revision or "main")
    if path is None:
        return {}
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        _error_rates(measured)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what training writes, numbers by test split: {error!r}; remove it, or train again"
        ) from error
    return measured


def _error_rates(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric with its title, and its value and interval by the name of the test split."""
    splits = measured.get("splits", {})
    rows = []
    for name, title in TITLES.items():
        told = {}
        for split, of in splits.items():
            if name in of["metrics"]:
                low, high = map(float, of["intervals"][name])
                told[split] = {"value": float(of["metrics"][name]), "interval": [low, high]}
        rows += [{"name": title, "splits": told}] if told else []
    return rows


def errors_in_words(measured: dict[str, Any]) -> str | None:
    """
    How often verdicts on cameras and generators were wrong, on images of other sources where these were
    measured; `None` where nothing was.
    """
    splits = measured.get("splits", {})
    name = "cross" if "cross" in splits else next(iter(splits), None)
    rates = splits[name]["metrics"] if name else {}
    told = ("camera_called_generated", "real_called_camera", "real_cant_tell", "generated_called_camera")
    if any(rate not in rates for rate in told):
        return None
    wrong, right, open_, missed = (f"{100 * rates[rate]:.1f}" for rate in told)
    where = "from sources that training never saw" if name == "cross" else "that training never saw"
    return (
        f"Measured on images {where}: of 100 photographs {wrong} were called generated, {right} a camera's, "
        f"and of {open_} it could not tell; of 100 generated images {missed} were called a camera's."
    )


# --- words --------------------------------------------------------------------------------------------------


def verdict_of(record: dict[str, Any]) -> str:
    """The sentence that a record says, or why there is none."""
    return f"could not be examined: {record['error']}" if record["error"] else record["verdict"]


def how_sure(record: dict[str, Any]) -> str:
    """
    "not" where the model can't tell, "weakly" where the verdict changed when the image was saved again or the
    file claims otherwise, "steadily" else; with the likeliest class and what was tried.
    """
    if record["error"]:
        return ""
    best, tried = record["attributions"][0], record.get("stability")
    doubted = record["contradiction"] or (tried and tried["kept"] < tried["of"])
    told = record["origin"] != CANT_TELL and record["label"] != NO_EVIDENCE
    grade = "not" if not told else "weakly" if doubted else "steadily"
    held = f"; held {tried['kept']} of {tried['of']} times" if tried else ""
    return f"{grade}; likeliest {best['label']} ({best['score']:.0%}){held}"


def meaning_in_words(record: dict[str, Any]) -> str:
    """What a verdict means, and what it does not."""
    fitting = record["prediction_set"]
    if record["label"] == NO_EVIDENCE:
        return "Nothing is said of such a picture, as its pixels have no traces that could be told apart."
    if record["is_unknown"]:
        return (
            "The image is unlike those of every class that the model knows. It may be by a generator, or of "
            "a kind, that the model has never seen."
        )
    if fitting is None:
        return "This is the likeliest of the classes that the model knows; it can't rule out any."
    if len(fitting) > 1:
        return "The model can't rule out any of the classes that fit; the first is the likeliest."
    sentence = "Of the classes that the model knows, this one alone fits."
    if fitting == [REAL] and record["origin"] == CANT_TELL:
        return f"{sentence} But generators are not ruled out at the level that a camera needs."
    return f"{sentence} A generator that it doesn't know may leave the same traces."


def ruled_out_in_words(record: dict[str, Any]) -> list[str]:
    """One line of the known classes that are ruled out; none where that says nothing."""
    ruled_out = record["ruled_out"]
    if record["is_unknown"] or not ruled_out:
        return []
    return [f"ruled out, {len(ruled_out)} of {len(record['attributions'])} classes: {', '.join(ruled_out)}"]


def crops_in_words(crops: list[dict[str, Any]], shown: int = 3) -> list[str]:
    """
    How many crops were looked at, how many have evidence (a tenth of an even share or more), and what those
    with the largest shares say alone.
    """
    if not crops:
        return []
    sizes = sorted({(crop["width"], crop["height"]) for crop in crops})
    size = " to ".join(str(w) if w == h else f"{w}x{h}" for w, h in sizes[:: max(1, len(sizes) - 1)])
    evident = sum(crop["weight"] >= 0.1 / len(crops) for crop in crops)
    number = "1 crop" if len(crops) == 1 else f"{len(crops)} crops"
    lines = [f"what was looked at: {number} of {size} pixels, {evident} with evidence"]
    for crop in sorted(crops, key=lambda crop: -crop["weight"])[:shown]:
        real = "" if crop["real_score"] is None else f", a camera {crop['real_score']:.2f}"
        place = f"at ({crop['x']}, {crop['y']}), {crop['weight']:.0%} of the evidence"
        lines.append(f"{place}: {crop['label']} {crop['score']:.2f}{real}")
    return lines


def explanation_lines(record: dict[str, Any]) -> list[str]:
    """What the verdict means, reasons and the file's claims: for a terminal, below the verdict."""
    reasons = reasons_in_words(record)
    reasons += [f"the file's claim: {claim}" for claim in summarise_provenance(record["provenance"])]
    return [f"  {meaning_in_words(record)}", *(f"  - {reason}" for reason in reasons)]


def reasons_in_words(record: dict[str, Any]) -> list[str]:
    """The explanation of a record as sentences."""
    reason = record["explanation"]
    lines = ruled_out_in_words(record) + crops_in_words(reason.get("crops") or [])
    lines += [_prototype_in_words(row) for row in reason["prototypes"]]
    if reason["contributions"]:
        lines.append(_contributions_in_words(reason["contributions"]))
    steps = ", ".join(f"{step_in_words(row)}: {row['weight']:.2f}" for row in reason["timesteps"])
    lines.append(f"attention over timesteps: {steps}")
    if place := reason["open_set"]:
        lines.append(
            f"open-set score {place['open_set_score']:.2f}, higher than that of {place['rank']:.1%} of "
            f"{place['count']} known images that calibrate it; "
            f"below {place['threshold']:.2f} it would be unknown"
        )
    lines.append(_stability_in_words(record["stability"], reason["treatments"]))
    return lines


def _prototype_in_words(row: dict[str, Any]) -> str:
    line = f"prototype {row['prototype']} of {row['label']} at distance {row['distance']:.2f}"
    examples = ", ".join(_counted(row["examples"]))
    return f"{line}, near training images of {examples}" if examples else line


def _contributions_in_words(contributions: dict[str, Any]) -> str:
    values = contributions["dimensions"]
    strongest = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:3]
    others = sum(values) - sum(values[i] for i in strongest)
    return (
        f"{contributions['first']} over {contributions['second']} by {contributions['difference']:.2f} "
        f"logits: {', '.join(f'dimension {i} {values[i]:+.2f}' for i in strongest)}, the other dimensions "
        f"{others:+.2f}, sharing {contributions['sharing']:+.2f}"
    )


def _stability_in_words(stability: dict[str, int], treatments: list[dict[str, Any]]) -> str:
    """How often the verdict was kept, and what it was where it was not."""
    changed = "; ".join(f"{t['treatment']}: {t['verdict']}" for t in treatments if not t["kept"])
    ways = ", ".join(t["treatment"] for t in treatments)
    line = f"saved again ({ways}), the verdict is kept {stability['kept']} of {stability['of']} times"
    return f"{line}; {changed}" if changed else line


def _counted(examples: list[dict[str, Any]]) -> list[str]:
    labels = [row["label"] for row in examples]
    return [f"{label} ({labels.count(label)})" for label in dict.fromkeys(labels)]


__all__ = ["Examiner", "errors_in_words", "how_sure", "verdict_of"]
