"""Figures of a checkpoint and of its evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve

from ..evaluation.protocol import Evaluation, verdicts_in
from ..files_protoleak import printable

BLUE, RED, GREY = "#4c72b0", "#c44e52", "#999999"


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: a pair of "$" would make it a formula."""
    return printable(text).replace("$", r"\$")


def _axes(width: float, height: float, **labels: str):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


# --- one image ----------------------------------------------------------------------------------------------


class EmbeddingMap:
    """
    Two-dimensional map of a checkpoint's training embeddings: the first two principal components, or UMAP,
    which needs umap-learn.

    Args:
        detector ([`OpenSetDetector`]): Of the checkpoint.
        method (`str`): `"pca"` or `"umap"`.
    """

    def __init__(self, detector: Any, method: str = "pca"):
        known = detector.train_["embeddings"].numpy()
        self.labels, self.members = detector.labels, detector.train_["labels"].numpy()
        if method == "umap":
            from umap import UMAP

            self.reducer, self.axes = UMAP(random_state=0), ("UMAP 1", "UMAP 2")
            self.known = self.reducer.fit_transform(known)
        elif method == "pca":
            self.reducer = PCA(2, random_state=0).fit(known)
            self.known = self.reducer.transform(known)
            shares = self.reducer.explained_variance_ratio_
            self.axes = tuple(
                f"component {i + 1} ({share:.0%} of variance)" for i, share in enumerate(shares)
            )
        else:
            raise ValueError(f"method must be 'pca' or 'umap'; got {method!r}")

    def draw(self, embedding: Any = None) -> Figure:
        """The map, with one more embedding (D,) as a star."""
        figure, axes = _axes(5.2, 4, xlabel=self.axes[0], ylabel=self.axes[1])
        for k, label in enumerate(self.labels):
            points = self.known[self.members == k].T
            style = {"s": 7, "alpha": 0.5, "linewidths": 0, "rasterized": True}  # small in SVG
            axes.scatter(*points, label=plain(label), **style)
        if embedding is not None:
            point = self.reducer.transform(np.asarray(embedding, np.float32)[None])[0]
            axes.scatter(*point, s=180, marker="*", color="black", label="this image")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return figure


def draw_open_set_score(calibration: Any, reason: dict[str, Any]) -> Figure:
    """Histogram of the calibration images' open-set scores, with the threshold and this image's."""
    scores = np.asarray(calibration)
    low, high = np.quantile(scores, [0.005, 0.995])
    score = reason["open_set_score"]
    figure, axes = _axes(5.2, 2.6, xlabel="open-set score", ylabel="known images, held out")
    left, right = min(low, score), max(high, score)
    axes.hist(scores.clip(left, right), bins=50, range=(left, right), color=GREY)
    if np.isfinite(reason["threshold"]):
        axes.axvline(
            reason["threshold"], color=RED, linestyle="--", label=f"threshold, alpha {reason['alpha']:g}"
        )
    axes.axvline(score, color=BLUE, linewidth=2, label="this image")
    axes.legend(fontsize=7, frameon=False, loc="upper left")  # looking for the best place is slow
    return figure


def draw_contributions(contributions: dict[str, Any], count: int = 12) -> Figure:
    """The dimensions that speak most for the first or the second class, the others, and the sharing."""
    values = np.array(contributions["dimensions"])
    order = np.argsort(-np.abs(values))[:count]
    names = [f"dimension {i}" for i in order] + [f"other {len(values) - len(order)}", "sharing"]
    bars = [*values[order], values.sum() - values[order].sum(), contributions["sharing"]]
    title = plain(f"towards {contributions['first']} (right) or {contributions['second']} (left)")
    figure, axes = _axes(5.2, 3.4, xlabel="logits", title=title)
    axes.barh(names, bars, color=[BLUE if bar > 0 else RED for bar in bars])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.title.set_fontsize(9)
    return figure


def draw_crops(image: Any, crops: list[dict[str, Any]], size: tuple[int, int]) -> Figure:
    """
    The crops that a verdict stands on, over the image: the stronger the colour, the larger a crop's share of
    the evidence, and the colour is what it says alone, blue toward a camera and red toward a generator.

    Args:
        image (`PIL.Image.Image`): Shown below them, of any size.
        crops (`list[dict]`): `explanation["crops"]` of a record.
        size (`tuple[int, int]`): Width and height of the image whose pixels the crops are told in.
    """
    width, height = size
    figure, axes = _axes(5.2, min(8, max(1.5, 4.8 * height / width)) + 0.5)
    axes.imshow(np.asarray(image.convert("RGB")), extent=(0, width, height, 0))
    largest = max(crop["weight"] for crop in crops) or 1
    scale = LinearSegmentedColormap.from_list("origin", [RED, "white", BLUE])
    for crop in crops:
        colour = GREY if crop["real_score"] is None else scale(crop["real_score"])
        corner, sides = (crop["x"], crop["y"]), (crop["width"], crop["height"])
        strength = 0.6 * crop["weight"] / largest
        axes.add_patch(Rectangle(corner, *sides, facecolor=colour, alpha=strength, linewidth=0))
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=colour, linewidth=1))
        centre, text = np.add(corner, np.divide(sides, 2)), f"{plain(crop['label'])}\n{crop['weight']:.0%}"
        box = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1}
        axes.annotate(text, centre, ha="center", va="center", fontsize=6, bbox=box)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if any(crop["real_score"] is not None for crop in crops):
        titles = {"toward a camera": BLUE, "toward a generator": RED}
        handles = [Rectangle((0, 0), 1, 1, color=colour, label=title) for title, colour in titles.items()]
        figure.legend(handles=handles, fontsize=7, ncols=2, frameon=False, loc="outside lower center")
    return figure


def step_in_words(row: dict[str, Any]) -> str:
    """A timestep, and the scale where images are reduced."""
    return f"t = {row['timestep']}" + ("" if row["scale"] == 1 else f" at 1/{row['scale']}")


def draw_timesteps(rows: list[dict[str, Any]]) -> Figure:
    """The weight of each timestep, and scale, in the embedding."""
    figure, axes = _axes(5.2, 1.8, xlabel="timestep t of the forward diffusion", ylabel="attention")
    axes.bar([step_in_words(row) for row in rows], [row["weight"] for row in rows], color=BLUE)
    axes.set_ylim(0, 1)
    return figure


# --- many images --------------------------------------------------------------------------------------------


def draw_roc(curves: dict[str, tuple[Any, Any]]) -> Figure:
    """ROC curves by title, from the scores of the positives and those of the negatives."""
    figure, axes = _axes(4.4, 4, xlabel="false positive rate", ylabel="true positive rate")
    for title, (positive, negative) in curves.items():
        truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
        axes.plot(*roc_curve(truth, np.r_[positive, negative])[:2], label=title)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    axes.legend(fontsize=7, loc="lower right", frameon=False)
    return figure


def draw_confusion(labels: list[str], confusion: list[list[int]]) -> Figure:
    """
    Rows are true classes, those that have images, columns verdicts, see [`verdicts_in`]; shades are shares of
    a row.
    """
    counts = np.array(confusion)
    seen = counts.any(axis=1)
    counts, names = counts[seen], [plain(label) for label, has in zip(labels, seen, strict=True) if has]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    verdicts = verdicts_in([*map(plain, labels)], confusion)
    size = 1.5 + 0.5 * len(verdicts)
    height = max(min(4.0, size), size - 0.5 * (len(labels) - len(names)))
    figure, axes = _axes(size + 0.8, height, xlabel="verdict", ylabel="true class")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(verdicts)), verdicts, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, count, ha="center", va="center", color=colour)
    return figure


def draw_reliability(rows: list[dict[str, float]]) -> Figure:
    """Accuracy against confidence of the likeliest class; dots are as large as their share of images."""
    figure, axes = _axes(4, 4, xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    confidence, accuracy, share = (
        [row[name] for row in rows] for name in ("confidence", "accuracy", "share")
    )
    axes.scatter(confidence, accuracy, s=[20 + 600 * s for s in share], color=BLUE, alpha=0.7)
    return figure


def draw_evaluation(evaluation: Evaluation, detector: Any) -> dict[str, Figure]:
    """
    Figures of an evaluation, by name: roc, of every test split; confusion and reliability, of the main one
    under these names and of another with its name behind; and embeddings.
    """
    pairs = {
        "known against unknown": ("known", "unknown"),
        "real against generated": ("real", "generated"),
    }
    several = len(evaluation.splits) > 1
    curves = {
        f"{title}, {name}" if several else title: (split.scores[a], split.scores[b])
        for name, split in evaluation.splits.items()
        for title, (a, b) in pairs.items()
        if a in split.scores and b in split.scores
    }
    figures = {"roc": draw_roc(curves)} if curves else {}
    for name, split in evaluation.splits.items():
        behind = "" if split is evaluation.main else f"_{name}"
        figures[f"confusion{behind}"] = draw_confusion(evaluation.labels, split.confusion)
        figures[f"reliability{behind}"] = draw_reliability(split.reliability)
    return figures | {"embeddings": EmbeddingMap(detector).draw()}


def draw_robustness(table: list[dict[str, Any]]) -> Figure:
    """The main metrics of each row of [`measure_robustness`] as bars."""
    names = ("macro_auc", "auroc", "false_unknown_rate", "stability")
    columns = [name for name in names if name in table[0]]
    labels = [row["operator"] + ("" if row["strength"] is None else f" {row['strength']:g}") for row in table]
    figure = Figure(figsize=(3.2 * len(columns) + 2, 0.2 * len(table) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, columns, strict=True):
        axes.barh(labels, [row[name] for row in table], color=BLUE)
        axes.axvline(table[0][name], color="black", linewidth=0.8)
        axes.set(title=name.replace("_", " "), xlim=(0, 1))
        axes.tick_params(labelsize=7)
    figure.axes[0].invert_yaxis()
    return figure


def save_figures(figures: dict[str, Figure], folder: str | Path) -> list[Path]:
    """Write each as NAME.png into the folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = [target / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=130)
    return paths
