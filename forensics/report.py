"""
A report on images: the verdict in words, the reasons drawn, and what a second examiner needs to repeat it.
One HTML file that needs nothing else, or JSON.
"""

import base64
import importlib.metadata
import io
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from transformers import Pipeline

from ..decoding_protoleak import orientation_of, turned
from ..evaluation.report import TITLES
from ..files_protoleak import path_of, write_whole
from ..image_processing_protoleak import open_container, preview
from ..pipeline_protoleak import RECORD_FIELDS, ImageAttributionPipeline
from .figures import (
    EmbeddingMap,
    draw_contributions,
    draw_crops,
    draw_open_set_score,
    draw_timesteps,
    step_in_words,
)
from .provenance import contradiction, summarise_provenance
from .scan import Attributor, checkpoint_file

TEMPLATE = "report_template.html"
PACKAGES = ("protoleak", "torch", "transformers", "diffusers", "numpy", "pillow", "scikit-learn")
PREVIEW = 512
SIDES = ("x", "y", "width", "height")


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
            "measured_on": self.measured.get("dataset"),
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


# --- words --------------------------------------------------------------------------------------------------


def verdict_of(record: dict[str, Any]) -> str:
    """The sentence that a record says, or why there is none."""
    return f"could not be examined: {record['error']}" if record["error"] else record["verdict"]


def meaning_in_words(record: dict[str, Any]) -> str:
    """What a verdict means, and what it does not."""
    fitting = record["prediction_set"]
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
    if fitting == ["real"] and record["origin"] == "can't tell":
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
    if record["error"]:
        return [f"  {verdict_of(record)}"]
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


def write_report(
    examiner: Examiner, records: list[dict[str, Any]], output: str | os.PathLike, format: str = "html"
) -> Path:
    """
    Write the records of [`Examiner.examine`] and [`Examiner.about`] to one file, first to a temporary name.

    Args:
        format (`str`): `"html"`, with images and drawings inside, or `"json"`.
    """
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "json":
        text = json.dumps({"about": examiner.about(), "records": records}, indent=2) + "\n"
    else:
        text = render(examiner, records)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def render(examiner: Examiner, records: list[dict[str, Any]]) -> str:
    """The HTML of a report. Every text is escaped; there is no script and nothing is fetched."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(default=True)
    )
    cases = [_case(examiner, record) for record in records]
    return environment.get_template(TEMPLATE).render(cases=cases, about=examiner.about())


def _case(examiner: Examiner, record: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of a record."""
    failed = record["error"] is not None
    return {
        "record": record,
        "name": Path(record["file"]).name,
        "verdict": verdict_of(record),
        "meaning": None if failed else meaning_in_words(record),
        "kind": _kind(record),
        "claims": summarise_provenance(record["provenance"]) if record["provenance"] else [],
        "preview": None if failed else _preview(record["file"]),
        "reasons": [] if failed else reasons_in_words(record),
        "drawings": [] if failed else _drawings(examiner, record),
        "prototypes": [] if failed else _pictured(examiner, record),
    }


def _kind(record: dict[str, Any]) -> str:
    """What a verdict's colour tells."""
    if record["error"]:
        return "error"
    if record["origin"] is None:
        return "unknown" if record["is_unknown"] else "known"
    return {"can't tell": "undecided"}.get(record["origin"], record["origin"])


def _preview(file: str) -> str:
    content = io.BytesIO()
    preview(path_of(file), PREVIEW).save(content, "PNG")
    return _data_uri(content.getvalue(), "image/png")


def map_of_crops(record: dict[str, Any]) -> Any | None:
    """The crops of an explained record drawn on its image, a matplotlib figure; `None` where it has none."""
    crops = None if record["error"] else record["explanation"].get("crops")
    if not crops:
        return None
    stored, file = (record["width"], record["height"]), path_of(record["file"])
    boxes = [tuple(crop[side] for side in SIDES) for crop in crops]
    boxes, size = turned(boxes, stored, orientation_of(open_container(file, record["file"])))
    crops = [crop | dict(zip(SIDES, box, strict=True)) for crop, box in zip(crops, boxes, strict=True)]
    return draw_crops(preview(file, PREVIEW), crops, size)


def _pictured(examiner: Examiner, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The nearest prototypes, with thumbnails of the training images near them as `pictures`."""
    detector = examiner.network.detector
    thumbnails = detector.thumbnails_ if detector is not None else {}

    def pictures(row: dict[str, Any]) -> list[dict[str, str]]:
        shown = [example for example in row["examples"] if example["index"] in thumbnails]
        return [
            {"label": example["label"], "uri": _data_uri(thumbnails[example["index"]], "image/jpeg")}
            for example in shown
        ]

    return [row | {"pictures": pictures(row)} for row in record["explanation"]["prototypes"]]


def _drawings(examiner: Examiner, record: dict[str, Any]) -> list[dict[str, str]]:
    """Title and SVG of each drawing of a record's reasons."""
    reason, detector = record["explanation"], examiner.network.detector
    crops = map_of_crops(record)
    figures = {} if crops is None else {"Where the evidence lies": crops}
    if reason["contributions"]:
        title = "What speaks for the first class against the second"
        figures[title] = draw_contributions(reason["contributions"])
    figures["Attention over timesteps"] = draw_timesteps(reason["timesteps"])
    if detector is not None:
        figures["Where the image lies among the known classes"] = examiner.map.draw(reason["embedding"])
        likeliest = examiner.network.config.label2id[record["attributions"][0]["label"]]
        calibration = detector.calibration_of(likeliest)  # what the threshold in the reason is of
        figures["How usual it is among known images"] = draw_open_set_score(calibration, reason["open_set"])
    return [{"title": title, "uri": _svg(figure)} for title, figure in figures.items()]


def _svg(figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return _data_uri(content.getvalue(), "image/svg+xml")


def _data_uri(content: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"


__all__ = ["Examiner", "map_of_crops", "render", "verdict_of", "write_report"]
