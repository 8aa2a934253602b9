"""A page to drop images on: verdict first, the reasons under it, and the report to take away (Gradio)."""

import tempfile
from pathlib import Path
from typing import Any

from .report import Examiner, reasons_in_words, verdict_in_words, write_report

try:
    import gradio
except ImportError as error:
    raise ImportError("the page needs Gradio; pip install 'protoleak[demo]'") from error

MOST = 20  # images at a time
INTRODUCTION = """# Which generator made this image?
This model knows {known}. It tells which of them an image fits, several if it can't decide, or that it fits
none. It is evidence to weigh, not proof; the report tells how often it errs."""


def examine_uploads(examiner: Examiner, files: list[str] | None) -> tuple[list, list, str]:
    """
    Rows of file and verdict, rows of file and reason, and the path of the report.

    Raises:
        gradio.Error: no images, or more than `MOST`.
    """
    if not files:
        raise gradio.Error("Drop at least one image.")
    if len(files) > MOST:
        raise gradio.Error(f"At most {MOST} images at a time; use `protoleak attribute` for folders.")
    records = [_without_folder(examiner.examine(file)) for file in files]
    verdicts = [[Path(record["file"]).name, verdict_in_words(record)] for record in records]
    reasons = [
        [Path(record["file"]).name, reason]
        for record in records
        if not record["error"]
        for reason in reasons_in_words(record)
    ]
    report = write_report(examiner, records, Path(tempfile.mkdtemp()) / "report.html")
    return verdicts, reasons, str(report)


def _without_folder(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose error does not tell where this server keeps its files."""
    if record["error"]:
        file = record["file"]
        record["error"] = record["error"].replace(file, Path(file).name)
    return record


def make_page(examiner: Examiner) -> gradio.Blocks:
    """The page, for a checkpoint that is loaded; not yet launched."""

    def examine(files: list[str] | None) -> tuple:
        return tuple(
            gradio.update(value=value, visible=bool(value)) for value in examine_uploads(examiner, files)
        )

    known = ", ".join(examiner.network.config.label_names)
    with gradio.Blocks(title="Proto-LeakNet") as page:
        gradio.Markdown(INTRODUCTION.format(known=known))
        files = gradio.File(label="Images", file_count="multiple", type="filepath", elem_id="images")
        button = gradio.Button("Examine", variant="primary", elem_id="examine")
        hidden = {"visible": False, "interactive": False}
        verdicts, reasons = (
            gradio.Dataframe(headers=["file", column], wrap=True, elem_id=f"{column}s", **hidden)
            for column in ("verdict", "reason")
        )
        report = gradio.File(label="Report", elem_id="report", **hidden)
        button.click(examine, files, [verdicts, reasons, report], api_name="examine")
    return page


__all__ = ["examine_uploads", "make_page"]
