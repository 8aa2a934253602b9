"""
What statistics of different latents tell, without a network: a linear discriminant for the known classes, the
open-set score l2_mahalanobis for known against unknown. Fitted on train, scored on test and unknown.

    python benchmarks/latents.py [DATASET]

Of images larger than 64 pixels four crops of 128 are samples of their own, and their scores are averaged.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.density_protoleak import OPEN_SET_SCORES
from protoleak.evaluate_protoleak.evaluate_protoleak import closed_set_figures, open_set_figures
from protoleak.evaluation.splits import load_splits
from protoleak.statistics_protoleak import LatentWhitening, grid_statistics, normalise_contrast
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn import functional as F

HERE = Path(__file__).parent.parent


@torch.no_grad()
def statistics_of(pixels: torch.Tensor, encode: Callable, change: Callable) -> np.ndarray:
    """(N, V, 3, S, S) -> (N, V, number of statistics)"""
    made = []
    for batch in pixels.split(8):
        made.append(grid_statistics(change(encode(batch.flatten(0, 1)))))
    return torch.cat(made).unflatten(0, pixels.shape[:2]).numpy()


def figures(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """Macro AUC and accuracy of the discriminant, AUROC of the open-set score."""
    views = features["train"].shape[1]
    samples, targets = features["train"].reshape(-1, features["train"].shape[2]), labels["train"]
    classes = len(np.unique(targets))
    discriminant = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage="auto", priors=np.full(classes, 1 / classes)
    ).fit(samples, np.repeat(targets, views))
    scores = discriminant.predict_log_proba(features["test"].reshape(-1, samples.shape[1]))
    probabilities = np.exp(scores.reshape(-1, views, classes).mean(axis=1))
    closed = closed_set_figures(probabilities / probabilities.sum(axis=1, keepdims=True), labels["test"])
    score = OPEN_SET_SCORES["l2_mahalanobis"]().fit(features["train"].mean(axis=1), targets)
    known, unknown = (score.score_samples(features[split].mean(axis=1)) for split in ("test", "unknown"))
    return closed["macro_auc"], closed["accuracy"], open_set_figures(known, unknown)["auroc"]


def main() -> None:
    splits = load_splits(sys.argv[1] if len(sys.argv) > 1 else str(HERE / "leakzoo"))
    names = sorted(set(splits["train"]["label"]))
    labels = {
        s: np.array([names.index(n) if n in names else -1 for n in r["label"]]) for s, r in splits.items()
    }
    crop = {"crop_size": 128, "num_crops": 4} if len(sys.argv) > 1 else {"crop_size": 64, "num_crops": 1}
    processor = ProtoLeakImageProcessor(do_resize=False, **crop)
    pixels = {}
    for split in ("train", "test", "unknown"):
        images = [image["bytes"] or image["path"] for image in splits[split]["image"]]
        pixels[split] = processor(images)["pixel_values"].view(len(images), -1, 3, *2 * [crop["crop_size"]])
    model = ProtoLeakForImageAttribution.from_pretrained(HERE)
    spaces = {
        "blocks of 2x2 pixels": lambda x: F.pixel_unshuffle(x, 2),
        "blocks of 4x4 pixels": lambda x: F.pixel_unshuffle(x, 4),
        "the bundled VAE's latents": model.protoleak.encode,
    }
    print("| statistics of | Macro AUC | accuracy | open-set AUROC |\n| --- | --- | --- | --- |")
    for name, encode in spaces.items():
        latents = torch.cat([encode(batch.flatten(0, 1)) for batch in pixels["train"].split(8)])
        whitening = LatentWhitening(latents.shape[1])
        whitening.fit(latents.split(64))
        changes = {
            "as they are": lambda z: z,
            "whitened": whitening,
            "whitened, contrast normalised": lambda z, whiten=whitening: normalise_contrast(whiten(z)),
        }
        for title, change in changes.items():
            features = {split: statistics_of(part, encode, change) for split, part in pixels.items()}
            cells = [f"{value:.3f}" for value in figures(features, labels)]
            print(f"| {name}, {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
