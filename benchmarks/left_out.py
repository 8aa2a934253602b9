"""
Class scores of images by models that never saw their source, in several ways, and what they are worth.

n, K, F in shape comments: images, classes, features. A lead's scores are a list, for each trial (m, K), of
the images that the trial asks about in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import set_seed
from protoleak import ProtoLeakConfig
from protoleak.evaluation.metrics import compute_metrics
from protoleak.evaluation.predictions import Predictions
from protoleak.evaluation.verdicts import coverage_at_precision
from protoleak.statistics_protoleak import Discriminant
from protoleak.training.cross_fitting import Samples, Settings, Start, choose_settings
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

AVERAGED = ("macro_auc", "accuracy", "real_auroc", "auroc")  # over trials


@dataclass(frozen=True)
class Trial:
    """
    Which images are learned from, and which of classes that are among these, or of others, are then asked
    about: masks (n,).
    """

    fitted: np.ndarray
    known: np.ndarray
    strange: np.ndarray

    @property
    def asked(self) -> np.ndarray:
        return self.known | self.strange


def in_folds(labels: np.ndarray, folds: np.ndarray) -> list[Trial]:
    """Each fold (n,) is left out in turn."""
    trials = []
    for fold in np.unique(folds):
        fitted = folds != fold
        seen = np.isin(labels, labels[fitted])
        trials.append(Trial(fitted, ~fitted & seen, ~fitted & ~seen))
    return trials


def from_one_source(
    labels: np.ndarray, sources: np.ndarray, varied: int, draws: int = 4, seed: int = 0
) -> list[Trial]:
    """
    Of every class with several sources one is learned from, another in each draw, of the class `varied` half
    of them; the other sources are asked about. Classes with one source are learned whole.
    """
    rng, trials = np.random.default_rng(seed), []
    order = {k: rng.permutation(np.unique(sources[labels == k])) for k in np.unique(labels)}
    for draw in range(draws):
        fitted = np.full(len(labels), False)
        for k, names in order.items():
            kept = np.roll(names, -draw)[: max(1, len(names) // 2) if k == varied else 1]
            fitted |= (labels == k) & np.isin(sources, kept)
        trials.append(Trial(fitted, ~fitted, np.full(len(labels), False)))
    return trials


def choose(samples: Samples, trials: Sequence[Trial]) -> Settings:
    """Shrinkages and scales, by the likelihood of images left out."""
    return choose_settings(samples, [(trial.fitted, trial.known) for trial in trials])


def discriminants(samples: Samples, trial: Trial, settings: Settings) -> list[Discriminant]:
    """Of what a trial learns from, one a family."""
    return [d[0] for d in samples.fit(trial.fitted, [(s,) for s in settings.shrinkages])]


def by_discriminants(samples: Samples, trials: Sequence[Trial], settings: Settings) -> list[torch.Tensor]:
    """One shrunk linear discriminant a family, added."""
    scores = []
    for trial in trials:
        asked = zip(
            discriminants(samples, trial, settings),
            samples.untouched(trial.asked),
            settings.scales,
            strict=True,
        )
        scores.append(-sum(d.squared_distances(x) * scale**2 for d, x, scale in asked).clamp_max(2e4) / 2)
    return scores


def by_prototypes(
    samples: Samples, trials: Sequence[Trial], settings: Settings, count: int, seed: int | None = None
) -> list[torch.Tensor]:
    """
    As training begins: so many prototypes a class, at centres of its embeddings, or, with a `seed`, all at
    its mean but for noise of 0.1, where they began until 1b81a6d.
    """
    sizes = {"num_labels": samples.num_labels, "embedding_size": samples.embedding_size}
    config = ProtoLeakConfig(**sizes, num_prototypes=count if seed is None else 1)
    generator, scores = torch.Generator().manual_seed(seed or 0), []
    for trial in trials:
        start = Start(samples, settings, trial.fitted, config)
        if seed is not None:
            means = start.head.prototypes.data.expand(-1, count, -1)
            start.head.prototypes.data = means + 0.1 * torch.randn(means.shape, generator=generator)
        scores.append(start.class_scores(samples.untouched(trial.asked)))
    return scores


def by_subspaces(
    samples: Samples, trials: Sequence[Trial], settings: Settings, count: int = 10
) -> list[torch.Tensor]:
    """The mean over discriminants of random halves of each family, of the same shrinkages and scales."""
    rng, total = np.random.default_rng(0), [0] * len(trials)
    for _ in range(count):
        halves = [x[:, rng.permutation(x.shape[1])[: x.shape[1] // 2]] for x in samples.families]
        scores = by_discriminants(replace(samples, families=halves), trials, settings)
        total = [before + of_trial / count for before, of_trial in zip(total, scores, strict=True)]
    return total


def by_gradient(
    samples: Samples, trials: Sequence[Trial], settings: Settings, epochs: int, learning_rate: float
) -> list[torch.Tensor]:
    """What discriminants become as they learn on."""
    scores = []
    set_seed(0)
    for trial in trials:
        layer = as_layer(discriminants(samples, trial, settings), settings.scales)
        learn(layer, samples, trial.fitted, epochs, learning_rate)
        with torch.no_grad():
            scores.append(layer(torch.cat(samples.untouched(trial.asked), dim=1)).double())
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
    scores: Sequence[torch.Tensor],
    labels: np.ndarray,
    trials: Sequence[Trial],
    names: list[str],
    open_set: Sequence[np.ndarray] | None = None,
) -> dict[str, float]:
    """
    Means over trials of the metrics of `AVERAGED`, "auroc" telling known from other classes by the scores
    `open_set`, (m,) a trial, or else by the likeliest class's probability; and over all trials together the
    coverage at 90 % precision.
    """
    figures, probabilities, targets = [], [], []
    for place, (trial, of_trial) in enumerate(zip(trials, scores, strict=True)):
        likely, truth = of_trial.double().softmax(dim=1).numpy(), labels[trial.asked]
        familiar = likely.max(axis=1) if open_set is None else open_set[place]
        everything, known = Predictions(of_trial.numpy(), likely, truth, familiar), trial.known[trial.asked]
        strangers = everything.take(~known) if trial.strange.any() else None
        figures.append(compute_metrics(everything.take(known), strangers, names))
        probabilities.append(likely[known])
        targets.append(truth[known])
    means = {name: float(np.mean([of[name] for of in figures if name in of] or np.nan)) for name in AVERAGED}
    return means | {"coverage": coverage_at_precision(np.concatenate(probabilities), np.concatenate(targets))}
