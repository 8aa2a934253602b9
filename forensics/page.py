"""A page to drop images on: what the report shows, as images are examined, and the report (Gradio)."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rendering import make_case, render_cases, write_report
from .report import Examiner

try:
    import gradio
except ImportError as error:
    raise ImportError("the page needs Gradio; pip install 'protoleak[demo]'") from error

MOST = 20  # images at a time
KEPT = 3600  # seconds that uploads and reports stay on the server
INTRODUCTION = """# Which generator made this image?
This model knows {known}. It tells a camera, a generator, or that it can't tell, which of its classes an image
fits, and which are ruled out. It is evidence to weigh, not proof.

**How often it errs.** {errors}

**Scope.** {scope}

Files and reports are deleted from the server after {hours:g} h, and when it stops."""


def examine_uploads(
    examiner: Examiner, files: list[str] | None, folder: Path
) -> Iterator[tuple[str, str | None]]:
    """
    What the page shows before each image and at the end, as HTML, with the path of the report once it is
    written into `folder`.

    Raises:
        gradio.Error: no images, or more than `MOST`.
    """
    if not files:
        raise gradio.Error("Drop at least one image.")
    if len(files) > MOST:
        raise gradio.Error(f"At most {MOST} images at a time; use `protoleak report` for folders.")
    records: list[dict[str, Any]] = []
    cases: list[dict[str, Any]] = []
    for i, file in enumerate(files, 1):
        status = f"Examining image {i} of {len(files)}: {Path(file).name}"
        yield render_cases(cases, status), None
        records.append(_without_folder(examiner.examine(file)))
        cases.append(make_case(examiner, records[-1], folders=False, drawn=False))
    yield render_cases(cases, "Drawing the report"), None
    report = write_report(examiner, records, folder / "report.html", folders=False)
    yield render_cases(cases), str(report)


def _without_folder(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose error does not tell where this server keeps its files."""
    if record["error"]:
        file = record["file"]
        record["error"] = record["error"].replace(file, Path(file).name)
    return record


def make_page(examiner: Examiner, kept: int = KEPT) -> gradio.Blocks:
    """The page, for a checkpoint that is loaded; not yet launched. Files are deleted after `kept` seconds."""

    def examine(files: list[str] | None) -> Iterator[tuple]:
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the report while the last value is out
            for html, report in examine_uploads(examiner, files, Path(folder)):
                yield html, gradio.update(value=report, visible=report is not None)

    about = examiner.about()
    told = {
        "known": ", ".join(about["classes"]),
        "errors": about["errors"] or "Not measured.",
        "scope": about["scope"] or "This checkpoint doesn't tell what images it is valid for.",
        "hours": kept / 3600,
    }
    with gradio.Blocks(title="Proto-LeakNet", delete_cache=(max(1, kept // 10), kept)) as page:
        gradio.Markdown(INTRODUCTION.format(**told))
        files = gradio.File(label="Images", file_count="multiple", type="filepath", elem_id="images")
        button = gradio.Button("Examine", variant="primary", elem_id="examine")
        results = gradio.HTML(elem_id="results")
        report = gradio.File(label="Report", elem_id="report", visible=False, interactive=False)
        button.click(examine, files, [results, report], api_name="examine", show_progress="hidden")
    return page


__all__ = ["examine_uploads", "make_page"]
