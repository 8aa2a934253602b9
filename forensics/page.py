"""A page to drop images on: verdict first, the reasons under it, and the report to take away (Gradio)."""

import tempfile
from pathlib import Path
from typing import Any

from .report import Examiner, map_of_crops, meaning_in_words, reasons_in_words, verdict_of, write_report

try:
    import gradio
except ImportError as error:
    raise ImportError("the page needs Gradio; pip install 'protoleak[demo]'") from error

MOST = 20  # images at a time
INTRODUCTION = """# Which generator made this image?
This model knows {known}. It tells a camera, a generator, or that it can't tell, which of its classes an image
fits, and which are ruled out. It is evidence to weigh, not proof; the report tells how often it errs."""


def examine_uploads(examiner: Examiner, files: list[str] | None) -> tuple[list, list, list, str]:
    """
    Rows of file and verdict, rows of file and reason, pictures of where the evidence lies with their files'
    names, and the path of the report.

    Raises:
        gradio.Error: no images, or more than `MOST`.
    """
    if not files:
        raise gradio.Error("Drop at least one image.")
    if len(files) > MOST:
        raise gradio.Error(f"At most {MOST} images at a time; use `protoleak attribute` for folders.")
    records = [_without_folder(examiner.examine(file)) for file in files]
    folder = Path(tempfile.mkdtemp())
    verdicts = [[Path(record["file"]).name, verdict_of(record)] for record in records]
    reasons = [
        [Path(record["file"]).name, reason]
        for record in records
        if not record["error"]
        for reason in (meaning_in_words(record), *reasons_in_words(record))
    ]
    report = write_report(examiner, records, folder / "report.html")
    return verdicts, reasons, _maps(records, folder), str(report)


def _maps(records: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """Path and caption of a picture of the crops for each record that has them."""
    maps = []
    for i, record in enumerate(records):
        if (figure := map_of_crops(record)) is not None:
            figure.savefig(folder / f"{i}.png", dpi=130)
            maps.append((str(folder / f"{i}.png"), Path(record["file"]).name))
    return maps


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
        maps = gradio.Gallery(label="Where the evidence lies", elem_id="maps", **hidden)
        report = gradio.File(label="Report", elem_id="report", **hidden)
        button.click(examine, files, [verdicts, reasons, maps, report], api_name="examine")
    return page


__all__ = ["examine_uploads", "make_page"]
