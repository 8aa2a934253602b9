"""
A page to drop images on: verdict first, the reasons under it, and the report to take away. A Gradio Space,
and `python app.py` on one's own machine.
"""

import argparse
import os
import tempfile
from pathlib import Path

import gradio as gr
from protoleak.forensics.report import Examiner, reasons_in_words, verdict_in_words, write_report

HERE = Path(__file__).parent
MOST = 20  # images at a time


def make_page(examiner: Examiner) -> gr.Blocks:
    """The page, for a checkpoint that is loaded."""

    def examine(files: list[str] | None):
        if not files:
            raise gr.Error("Drop at least one image.")
        if len(files) > MOST:
            raise gr.Error(f"At most {MOST} images at a time; use `protoleak attribute` for folders.")
        records = []
        for file in files:
            record = examiner.examine(file)
            name = Path(file).name  # not where this server keeps it
            if record["error"]:
                record["error"] = record["error"].replace(str(file), name)
            records.append(record)
        verdicts = [[Path(record["file"]).name, verdict_in_words(record)] for record in records]
        reasons = [
            [Path(record["file"]).name, reason]
            for record in records
            if not record["error"]
            for reason in reasons_in_words(record)
        ]
        report = Path(tempfile.mkdtemp()) / "report.html"
        write_report(examiner, records, report)
        return (
            gr.update(value=verdicts, visible=True),
            gr.update(value=reasons, visible=bool(reasons)),
            gr.update(value=str(report), visible=True),
        )

    known = ", ".join(examiner.network.config.label_names)
    with gr.Blocks(title="Proto-LeakNet") as page:
        gr.Markdown(
            "# Which generator made this image?\n"
            f"This model knows {known}. It tells which of them an image fits, several if it can't decide, or "
            "that it fits none. It is evidence to weigh, not proof; the report tells how often it errs."
        )
        files = gr.File(label="Images", file_count="multiple", type="filepath", elem_id="images")
        button = gr.Button("Examine", variant="primary", elem_id="examine")
        verdicts = gr.Dataframe(
            headers=["file", "verdict"], visible=False, wrap=True, interactive=False, elem_id="verdicts"
        )
        reasons = gr.Dataframe(
            headers=["file", "reason"], visible=False, wrap=True, interactive=False, elem_id="reasons"
        )
        report = gr.File(label="Report", visible=False, interactive=False, elem_id="report")
        button.click(examine, files, [verdicts, reasons, report], api_name="examine")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("PROTOLEAK_MODEL", str(HERE)))
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    arguments = parser.parse_args()
    make_page(Examiner(arguments.model)).launch(server_port=arguments.port)


if __name__ == "__main__":
    main()
