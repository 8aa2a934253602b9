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
from protoleak.evaluate_protoleak.evaluate_protoleak import closed_set_metrics, open_set_metrics
from protoleak.scores_protoleak import OPEN_SET_SCORES
from protoleak.statistics_protoleak import LatentWhitening, grid_statistics, normalise_contrast
from protoleak.vae_protoleak import encode_with, load_autoencoder
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from baselines import load_pixels

HERE = Path(__file__).parent.parent


@torch.no_grad()
def statistics_of(pixels: torch.Tensor, encode: Callable, change: Callable) -> np.ndarray:
    """(N, V, 3, S, S) -> (N, V, number of statistics)"""
    parts = [grid_statistics(change(encode(batch.flatten(0, 1)))) for batch in pixels.split(8)]
    return torch.cat(parts).unflatten(0, pixels.shape[:2]).numpy()


def metrics(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """Macro AUC and accuracy of the discriminant, AUROC of the open-set score."""
    views = features["train"].shape[1]
    samples, targets = features["train"].reshape(-1, features["train"].shape[2]), labels["train"]
    classes = len(np.unique(targets))
    discriminant = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage="auto", priors=np.full(classes, 1 / classes)
    ).fit(samples, np.repeat(targets, views))
    scores = discriminant.predict_log_proba(features["test"].reshape(-1, samples.shape[1]))
    probabilities = np.exp(scores.reshape(-1, views, classes).mean(axis=1))
    closed = closed_set_metrics(probabilities / probabilities.sum(axis=1, keepdims=True), labels["test"])
    score = OPEN_SET_SCORES["l2_mahalanobis"]().fit(features["train"].mean(axis=1), targets)
    known, unknown = (score.score_samples(features[split].mean(axis=1)) for split in ("test", "unknown"))
    return closed["macro_auc"], closed["accuracy"], open_set_metrics(known, unknown)["auroc"]


def spaces(vae: torch.nn.Module) -> dict[str, Callable]:
    """What is looked at: a title, and how pixels (N, 3, S, S) get there."""
    return {
        "blocks of 2x2 pixels": lambda x: F.pixel_unshuffle(x, 2),
        "blocks of 4x4 pixels": lambda x: F.pixel_unshuffle(x, 4),
        "LeakZoo's VAE's latents": lambda x: encode_with(vae, x),
    }


@torch.no_grad()
def changes(pixels: torch.Tensor, encode: Callable) -> dict[str, Callable]:
    """What is done to latents before their statistics are taken; whitening is fitted on training images."""
    latents = torch.cat([encode(batch.flatten(0, 1)) for batch in pixels.split(8)])
    whitening = LatentWhitening(latents.shape[1])
    whitening.fit(latents.split(64))
    return {
        "as they are": lambda z: z,
        "whitened": whitening,
        "whitened, contrast normalised": lambda z: normalise_contrast(whitening(z)),
    }


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else str(HERE / "leakzoo")
    crop = {"crop_size": 128, "num_crops": 4} if len(sys.argv) > 1 else {"crop_size": 64}
    pixels, labels, _ = load_pixels(name, ("train", "test", "unknown"), **crop)
    pixels = {split: part.reshape(len(part), -1, *part.shape[-3:]) for split, part in pixels.items()}
    print("| statistics of | Macro AUC | accuracy | open-set AUROC |\n| --- | --- | --- | --- |")
    for name, encode in spaces(load_autoencoder(HERE / "leakzoo" / "recipe", "vae")).items():
        for title, change in changes(pixels["train"], encode).items():
            features = {split: statistics_of(part, encode, change) for split, part in pixels.items()}
            cells = [f"{value:.3f}" for value in metrics(features, labels)]
            print(f"| {name}, {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
