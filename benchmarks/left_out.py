"""
Class scores of every image by models that never saw its source, in several ways, and what they are worth.

n, K, F in shape comments: images, classes, features. `folds` (n,) tells when an image is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate.utils import set_seed
from protoleak.evaluation.metrics import compute_metrics
from protoleak.evaluation.predictions import Predictions
from protoleak.evaluation.verdicts import coverage_at_precision
from protoleak.statistics_protoleak import Discriminant
from protoleak.training.cross_fitting import Samples, Settings, choose_settings
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

AVERAGED = ("macro_auc", "accuracy", "real_auroc", "auroc")  # over folds


def parted(labels: np.ndarray, folds: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each fold masks: images to fit on, those left out of a class among these, and all others."""
    for fold in np.unique(folds):
        fitted = folds != fold
        seen = np.isin(labels, labels[fitted])
        yield fitted, ~fitted & seen, ~fitted & ~seen


def choose(samples: Samples, folds: np.ndarray) -> Settings:
    """Shrinkages and scales, by the likelihood of images left out."""
    masks = parted(samples.labels.numpy(), folds)
    return choose_settings(samples, [(fitted, known) for fitted, known, _ in masks])


def by_discriminants(samples: Samples, folds: np.ndarray, settings: Settings) -> torch.Tensor:
    """One shrunk linear discriminant a family, added: (n, K)"""
    return by_gradient(samples, folds, settings, epochs=0, learning_rate=0.0)


def by_subspaces(samples: Samples, folds: np.ndarray, settings: Settings, count: int = 20) -> torch.Tensor:
    """The mean over discriminants of random halves of each family, of settings of their own: (n, K)"""
    rng, chosen, total = np.random.default_rng(0), None, 0
    for _ in range(count):
        halves = [x[:, rng.permutation(x.shape[1])[: x.shape[1] // 2]] for x in samples.families]
        part = replace(samples, families=halves)
        chosen = chosen or choose(part, folds)
        total = total + by_discriminants(part, folds, chosen)
    return total / count


def by_gradient(
    samples: Samples, folds: np.ndarray, settings: Settings, epochs: int, learning_rate: float
) -> torch.Tensor:
    """What discriminants become as they learn on: (n, K)"""
    scores = torch.zeros(len(samples.labels), samples.num_labels)
    set_seed(0)
    for fitted, *_ in parted(samples.labels.numpy(), folds):
        discriminants = [d[0] for d in samples.fit(fitted, [(s,) for s in settings.shrinkages])]
        layer = as_layer(discriminants, settings.scales)
        learn(layer, samples, fitted, epochs, learning_rate)
        with torch.no_grad():
            scores[torch.from_numpy(~fitted)] = layer(torch.cat(samples.untouched(~fitted), dim=1))
    return scores


def as_layer(discriminants: Sequence[Discriminant], scales: Sequence[float]) -> nn.Linear:
    """The scores that discriminants give together, but for what all classes share: F -> K"""
    weights, biases = [], []
    for d, scale in zip(discriminants, scales, strict=True):
        means = d.means.nan_to_num()
        weights.append(scale**2 * means @ d.projection.T)
        biases.append(-weights[-1] @ d.centre - scale**2 * means.square().sum(dim=1) / 2)
    unseen = discriminants[0].means.isnan().any(dim=1)
    layer = nn.Linear(sum(weight.shape[1] for weight in weights), len(unseen))
    layer.weight.data = torch.cat(weights, dim=1).float()
    layer.bias.data = (sum(biases) - 1e4 * unseen).float()
    return layer


def learn(layer: nn.Linear, samples: Samples, fitted: np.ndarray, epochs: int, learning_rate: float) -> None:
    """AdamW and cross-entropy of images in their first view, with dropout, classes weighed alike."""
    features, labels = torch.cat(samples.untouched(fitted), dim=1), samples.labels[torch.from_numpy(fitted)]
    weights = 1 / labels.bincount(minlength=samples.num_labels).clamp_min(1)
    optimizer = torch.optim.AdamW(layer.parameters(), learning_rate, weight_decay=1e-4)
    loader = DataLoader(TensorDataset(features, labels), 64, shuffle=True)
    for x, y in (batch for _ in range(epochs) for batch in loader):
        loss = F.cross_entropy(layer(F.dropout(x, 0.4)), y, weight=weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure(
    scores: torch.Tensor, labels: np.ndarray, folds: np.ndarray, names: list[str]
) -> dict[str, float]:
    """
    Means over folds of the metrics of `AVERAGED`, "auroc" telling known from other classes by the likeliest
    class's probability; and over all folds together the coverage at 90 % precision.
    """
    probabilities = scores.double().softmax(dim=1).numpy()
    everything = Predictions(scores.numpy(), probabilities, labels, probabilities.max(axis=1))
    figures, all_known = [], np.zeros(len(labels), bool)
    for _, known, others in parted(labels, folds):
        strangers = everything.take(others) if others.any() else None
        figures.append(compute_metrics(everything.take(known), strangers, names))
        all_known |= known
    means = {name: float(np.mean([of[name] for of in figures if name in of])) for name in AVERAGED}
    return means | {"coverage": coverage_at_precision(probabilities[all_known], labels[all_known])}
