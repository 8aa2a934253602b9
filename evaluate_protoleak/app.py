"""The metric's Space: paste scores, read metrics. (`evaluate`'s own widget needs a Gradio of 2022.)"""

import json
from pathlib import Path

import evaluate

HERE = Path(__file__).parent
EXAMPLE = (
    "[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.4, 0.6]]",
    "[0, 1, 0, 1]",
    "[3.0, 2.0, 4.0, 1.0]",
    "[0.5, 1.5]",
)


def compute(predictions: str, references: str, known_scores: str = "", unknown_scores: str = "") -> dict:
    """All four as JSON lists; the open-set scores may be empty. `ValueError` tells what is wrong."""
    texts = {
        "predictions": predictions,
        "references": references,
        "known_scores": known_scores,
        "unknown_scores": unknown_scores,
    }
    values = {}
    for name, text in texts.items():
        if text.strip() or name in ("predictions", "references"):
            try:
                values[name] = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} must be a JSON list, such as {EXAMPLE[1]}: {error}") from error
    return evaluate.load(str(HERE)).compute(**values)


def make_page():
    """The page, not yet launched."""
    import gradio

    def answer(*texts: str) -> dict:
        try:
            return compute(*texts)
        except (ValueError, TypeError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    titles = (
        "Class scores of each image (N x K)",
        "True classes (N)",
        "Open-set scores of these images (optional)",
        "Open-set scores of images by unknown generators (optional)",
    )
    return gradio.Interface(
        answer,
        [gradio.Textbox(value, label=title) for title, value in zip(titles, EXAMPLE, strict=True)],
        gradio.JSON(label="Metrics"),
        title="Attribution metric",
        article=(HERE / "README.md").read_text(encoding="utf-8").split("---", 2)[2],
    )


if __name__ == "__main__":
    make_page().launch()
