"""
A report as one HTML file that needs nothing else, or as JSON: an overview, then each image with its verdict,
what was looked at and what the file claims, and below that what an examiner needs.
"""

import base64
import io
import json
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from ..decoding_protoleak import orientation_of, turned
from ..files_protoleak import path_of, write_whole
from ..image_processing_protoleak import open_container, preview, thumbnail
from .figures import draw_contributions, draw_crops, draw_open_set_score, draw_timesteps
from .provenance import summarise_provenance
from .report import Examiner, how_sure, meaning_in_words, reasons_in_words, verdict_of

PICTURE, THUMBNAIL = 640, 96  # sides of what is shown, in pixels
SIDES = ("x", "y", "width", "height")


def write_report(
    examiner: Examiner,
    records: list[dict[str, Any]],
    output: str | os.PathLike,
    format: str = "html",
    folders: bool = True,
) -> Path:
    """
    Write the records of [`Examiner.examine`] and [`Examiner.about`] to one file, first to a temporary name.

    Args:
        format (`str`): `"html"`, with images and drawings inside, or `"json"`.
        folders (`bool`): Whether an HTML report tells the folders of images besides their names.
    """
    path = Path(output)
    if format == "json":
        text = json.dumps({"about": examiner.about(), "records": records}, indent=2) + "\n"
    else:
        text = render(examiner, records, folders)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def render(examiner: Examiner, records: list[dict[str, Any]], folders: bool = True) -> str:
    """The HTML of a report. Every text is escaped; there is no script and nothing is fetched."""
    cases = [make_case(examiner, record, folders, drawn=True) for record in records]
    return _fill("report_template.html", cases, about=examiner.about())


def render_cases(cases: list[dict[str, Any]], status: str = "") -> str:
    """
    The part of a report that the page shows, of what [`make_case`] gives for each image: the overview, and
    the images, unless there is a `status` to tell of work that goes on.
    """
    return _fill("cases_template.html", cases, status=status)


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=select_autoescape(default=True))


def _fill(template: str, cases: list[dict[str, Any]], **values: Any) -> str:
    counts = Counter(case["kind_in_words"] for case in cases)
    return _environment().get_template(template).render(cases=cases, counts=counts, **values)


def make_case(examiner: Examiner, record: dict[str, Any], folders: bool, drawn: bool) -> dict[str, Any]:
    """What is shown of a record, with or without the image's folders, and drawings."""
    kind = _kind(record)
    case = {
        "record": record,
        "name": record["file"] if folders else Path(record["file"]).name,
        "verdict": verdict_of(record),
        "kind": kind,
        "kind_in_words": KINDS[kind],
        "sure": how_sure(record),
    }
    if record["error"]:
        return case
    crops, size = _upright_crops(record)
    claim = record["provenance"]["claim"]
    return case | {
        "claimed": None if claim is None or record["contradiction"] else claim["words"],
        "thumbnail": _data_uri(thumbnail(path_of(record["file"]), THUMBNAIL), "image/jpeg"),
        "meaning": meaning_in_words(record),
        "picture": _picture(record, crops, size),
        "claims": summarise_provenance(record["provenance"]),
        "reasons": reasons_in_words(record),
        "drawings": _drawings(examiner, record, crops, size) if drawn else [],
        "prototypes": _pictured(examiner, record) if drawn else [],
    }


KINDS = {  # what a verdict's colour tells, and how many are counted as
    "camera": "a camera",
    "generated": "generated",
    "undecided": "can't tell",
    "known": "like a known class",
    "unknown": "like no known class",
    "error": "could not be examined",
}


def _kind(record: dict[str, Any]) -> str:
    if record["error"]:
        return "error"
    if record["origin"] is None:
        return "unknown" if record["is_unknown"] else "known"
    return {"can't tell": "undecided"}.get(record["origin"], record["origin"])


# --- pictures -----------------------------------------------------------------------------------------------


def _upright_crops(record: dict[str, Any]) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """The crops of an explained record as a viewer shows them, and the size of the image so."""
    crops, file = record["explanation"].get("crops") or [], path_of(record["file"])
    boxes = [tuple(crop[side] for side in SIDES) for crop in crops]
    stored = record["width"], record["height"]
    boxes, size = turned(boxes, stored, orientation_of(open_container(file, record["file"])))
    return [crop | dict(zip(SIDES, box, strict=True)) for crop, box in zip(crops, boxes, strict=True)], size


def _picture(record: dict[str, Any], crops: list[dict[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
    """The image, its crops as [`_upright_crops`] gives them, and how much of it they are."""
    width, height = size
    covered = _covered([tuple(crop[side] for side in SIDES) for crop in crops])
    return {
        "uri": _data_uri(thumbnail(path_of(record["file"]), PICTURE), "image/jpeg"),
        "width": width,
        "height": height,
        "crops": crops,
        "share": min(1.0, covered / (width * height)),
        "stroke": max(width, height) / 250,
    }


def _covered(boxes: list[tuple[int, int, int, int]]) -> int:
    """Pixels that boxes (x, y, width, height) cover together."""
    columns = sorted({edge for x, _, width, _ in boxes for edge in (x, x + width)})
    rows = sorted({edge for _, y, _, height in boxes for edge in (y, y + height)})
    return sum(
        (right - left) * (bottom - top)
        for left, right in zip(columns, columns[1:], strict=False)
        for top, bottom in zip(rows, rows[1:], strict=False)
        if any(x <= left < x + width and y <= top < y + height for x, y, width, height in boxes)
    )


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


def _drawings(
    examiner: Examiner, record: dict[str, Any], crops: list[dict[str, Any]], size: tuple[int, int]
) -> list[dict[str, str]]:
    """Title and SVG of each drawing of a record's reasons, and of its crops, see [`_upright_crops`]."""
    reason, detector, figures = record["explanation"], examiner.network.detector, {}
    if crops:
        shown = preview(path_of(record["file"]), PICTURE)
        figures["Where the evidence lies"] = draw_crops(shown, crops, size)
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


__all__ = ["make_case", "render", "render_cases", "write_report"]
