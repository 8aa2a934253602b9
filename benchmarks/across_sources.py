"""
Ways of learning from images that know their sources: what a class's sources differ in, group-robust losses,
positives of other sources, what post-processing changes, and reconstructions; and scores of strangers.

n, K, F, D in shape comments: images, classes, features, embedding size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import set_seed
from left_out import Trial, as_layer, discriminants
from protoleak.statistics_protoleak import Discriminant, discriminants_of
from protoleak.training.cross_fitting import Samples, Settings
from sklearn.neighbors import KernelDensity, NearestNeighbors
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Grouped(Samples):
    """
    Samples whose images know their group, (n,): a group is of one class and one source.

    Args:
        groups (`torch.LongTensor` of shape `(num_images,)`): 0..G-1.
    """

    groups: torch.Tensor = None


def _means(features: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """(n, F) and 0..count-1 (n,) -> (count, F), NaN without a sample"""
    sums = features.new_zeros(count, features.shape[1]).index_add(0, labels, features)
    counts = labels.bincount(minlength=count)[:, None]
    return torch.where(counts > 0, sums / counts.clamp_min(1), torch.nan)


def _even(labels: torch.Tensor) -> torch.Tensor:
    """Weights by which classes count alike, their sum 1: (n,) -> (n, 1)"""
    counts = labels.bincount()
    return (1 / counts[labels] / (counts > 0).sum())[:, None]


def _add(
    samples: Samples, trial: Trial, settings: Settings, fit: Callable[..., Discriminant], finish: Callable
) -> torch.Tensor:
    """What discriminants that `fit(features, labels, groups, shrinkage)` makes say of a trial's images."""
    rows, total = torch.from_numpy(trial.fitted), 0
    labels, groups = samples.labels[rows], samples.groups[rows]
    asked = samples.untouched(trial.asked)
    families = zip(samples.untouched(trial.fitted), asked, settings.shrinkages, settings.scales, strict=True)
    for learned, x, shrinkage, scale in families:
        found = fit(learned, labels, groups, shrinkage)
        total = total - found.squared_distances(x).clamp_max(1e5) * scale**2 / 2
    return finish(total)


def by_source_scatter(
    samples: Grouped, trials: Sequence[Trial], settings: Settings, weight: float
) -> list[torch.Tensor]:
    """What sources of a class differ in counts so many times in the covariance within classes."""

    def fit(features, labels, groups, shrinkage: float) -> Discriminant:
        means = _means(features, labels, samples.num_labels)
        of_groups = _means(features, groups, len(groups))[groups]
        even = _even(labels).sqrt()
        parts = [(features - of_groups) * even, (of_groups - means[labels]) * even * weight**0.5]
        return discriminants_of(means, torch.cat(parts), (shrinkage,), samples.max_axes)[0]

    return [_add(samples, trial, settings, fit, lambda scores: scores) for trial in trials]


def by_subclasses(
    samples: Grouped, trials: Sequence[Trial], settings: Settings, softness: float, only: int | None = None
) -> list[torch.Tensor]:
    """
    A mean for each source of a class (of one class `only`, if given), and a class is as likely as its sources
    together; the larger `softness`, the more alike they count.
    """
    parts = samples.groups if only is None else torch.where(samples.labels == only, samples.groups, -1)
    names = torch.stack([samples.labels, parts], dim=1)
    names, parts = names.unique(dim=0, return_inverse=True)

    def fit(features, labels, groups, shrinkage: float) -> Discriminant:
        means = _means(features, groups, len(names))
        deviations = (features - means[groups]) * _even(labels).sqrt()
        return discriminants_of(means, deviations, (shrinkage,), len(names))[0]

    def finish(scores: torch.Tensor) -> torch.Tensor:
        joined = []
        for k in range(samples.num_labels):
            of_class = scores[:, names[:, 0] == k]
            known = of_class[:, (of_class > -1e3).any(dim=0)]
            joined.append(
                (known / softness).logsumexp(dim=1) * softness - softness * np.log(known.shape[1])
                if known.shape[1]
                else scores.new_full((len(scores),), -1e4)
            )
        return torch.stack(joined, dim=1)

    by_part = replace(samples, groups=parts)
    return [_add(by_part, trial, settings, fit, finish) for trial in trials]


def by_equalising(
    samples: Grouped, trials: Sequence[Trial], settings: Settings, weight: float
) -> list[torch.Tensor]:
    """
    What the same post-processing changes in every image, the further views less the first, counts in the
    covariance within classes, so many times.
    """
    count = len(samples.labels)
    views = len(samples.families[0]) // count - 1
    scores = []
    for trial in trials:
        rows, total = torch.from_numpy(np.flatnonzero(trial.fitted)), 0
        labels = samples.labels[rows]
        even = _even(labels).sqrt()
        families = zip(samples.families, settings.shrinkages, settings.scales, strict=True)
        for family, shrinkage, scale in families:
            first = family[rows]
            means = _means(first, labels, samples.num_labels)
            changes = [family[rows + count * (1 + view)] - first for view in range(views)]
            changed = torch.cat([change * even * (weight / views) ** 0.5 for change in changes])
            deviations = torch.cat([(first - means[labels]) * even, changed])
            found = discriminants_of(means, deviations, (shrinkage,), samples.max_axes)[0]
            asked = family[:count][torch.from_numpy(trial.asked)]
            total = total - found.squared_distances(asked).clamp_max(1e5) * scale**2 / 2
        scores.append(total)
    return scores


# --- learning on, from the discriminants


def embed(samples: Samples, trial: Trial, settings: Settings) -> torch.Tensor:
    """All images in their first view, in the discriminants' axes and units: (n, D), float32"""
    everything = np.full(len(samples.labels), True)
    parts = zip(
        discriminants(samples, trial, settings), samples.untouched(everything), settings.scales, strict=True
    )
    return torch.cat([(x.double() - d.centre) @ d.projection * scale for d, x, scale in parts], dim=1).float()


def by_robust_loss(
    samples: Grouped,
    trials: Sequence[Trial],
    settings: Settings,
    penalty: float | None,
    steps: int = 30,
    learning_rate: float = 3e-5,
) -> list[torch.Tensor]:
    """
    Adam on the discriminants' weights for a loss over groups, their mean and `penalty` times their variance
    (V-REx, Krueger et al. 2021), or without a penalty their mean, weighed the more the worse it goes (group
    DRO, Sagawa et al. 2020).
    """
    scores = []
    for trial in trials:
        layer = as_layer(discriminants(samples, trial, settings), settings.scales)
        features, rows = torch.cat(samples.untouched(trial.fitted), dim=1), torch.from_numpy(trial.fitted)
        names, groups = samples.groups[rows].unique(return_inverse=True)
        classes = torch.stack([samples.labels[rows][groups == g][0] for g in range(len(names))])
        even = _even(classes)[:, 0]
        weights, optimizer = even, torch.optim.Adam(layer.parameters(), learning_rate)
        for _ in range(steps):
            losses = F.cross_entropy(layer(features), samples.labels[rows], reduction="none")
            risks = torch.zeros(len(names)).index_add(0, groups, losses) / groups.bincount()
            if penalty is None:
                weights = (weights * (0.1 * risks.detach()).exp()) / (
                    weights * (0.1 * risks.detach()).exp()
                ).sum()
                loss = (weights * risks).sum()
            else:
                mean = (even * risks).sum()
                loss = mean + penalty * (even * (risks - mean).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            scores.append(layer(torch.cat(samples.untouched(trial.asked), dim=1)).double())
    return scores


def by_contrast(
    samples: Grouped, trials: Sequence[Trial], settings: Settings, steps: int, learning_rate: float = 3e-5
) -> list[torch.Tensor]:
    """
    Supervised contrastive learning (Khosla et al. 2020) on the discriminants' projection, with positives of
    other sources where a class has any; scored by distances to the classes' means.
    """
    scores = []
    set_seed(0)
    for trial in trials:
        found = discriminants(samples, trial, settings)
        layer = nn.Linear(
            sum(d.projection.shape[0] for d in found), sum(d.projection.shape[1] for d in found)
        )
        blocks = [d.projection.T * scale for d, scale in zip(found, settings.scales, strict=True)]
        layer.weight.data = torch.block_diag(*blocks).float()
        layer.bias.data = -torch.cat(
            [block @ d.centre for block, d in zip(blocks, found, strict=True)]
        ).float()
        x, rows = torch.cat(samples.untouched(trial.fitted), dim=1), torch.from_numpy(trial.fitted)
        labels, groups = samples.labels[rows], samples.groups[rows]
        optimizer = torch.optim.AdamW(layer.parameters(), learning_rate, weight_decay=0.1)
        for _ in range(steps):
            batch = torch.multinomial(_even(labels)[:, 0], min(512, len(x)))
            loss = contrast_loss(layer(F.dropout(x[batch], 0.2)), labels[batch], groups[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            means = _means(layer(x), labels, samples.num_labels)
            asked = layer(torch.cat(samples.untouched(trial.asked), dim=1))
            distances = torch.cdist(asked, means).square().nan_to_num(nan=2e4)
        scores.append(-distances.double() / 2)
    return scores


def contrast_loss(
    embeddings: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor, temperature: float = 0.2
) -> torch.Tensor:
    """Of (n, D): an image's likeness to those of its class from other groups, or from its own if need be."""
    unit = F.normalize(embeddings)
    own = torch.eye(len(unit), dtype=torch.bool)
    log_shares = (unit @ unit.T / temperature).masked_fill(own, -1e4).log_softmax(dim=1)
    alike = (labels[:, None] == labels) & ~own
    elsewhere = alike & (groups[:, None] != groups)
    positive = torch.where(elsewhere.any(dim=1, keepdim=True), elsewhere, alike).float()
    counts = positive.sum(dim=1)
    return -((log_shares * positive).sum(dim=1) / counts.clamp_min(1))[counts > 0].mean()


# --- reconstructions


def with_reconstructions(
    samples: Grouped,
    trials: Sequence[Trial],
    settings: Settings,
    places: np.ndarray,
    decoded: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """
    A class more, of images at `places` (m,), all of class 0, after an autoencoder (features (m, F) of each
    family), where these images are learned from. Its share of the probability is the generators'.
    """
    place, scores, count = torch.from_numpy(places), [], samples.num_labels
    for trial in trials:
        rows = torch.from_numpy(trial.fitted)
        kept, total = rows[place], 0
        families = zip(samples.families, decoded, settings.shrinkages, settings.scales, strict=True)
        for family, more, shrinkage, scale in families:
            x = torch.cat([family[: len(rows)][rows], more[kept]])
            labels = torch.cat([samples.labels[rows], torch.full((int(kept.sum()),), count)])
            means = _means(x, labels, count + 1)
            deviations = (x - means[labels]) * _even(labels).sqrt()
            found = discriminants_of(means, deviations, (shrinkage,), samples.max_axes)[0]
            asked = family[: len(rows)][torch.from_numpy(trial.asked)]
            total = total - found.squared_distances(asked).clamp_max(1e5) * scale**2 / 2
        shares = total.softmax(dim=1)
        generated = shares[:, 1:count]
        grown = generated * (1 + shares[:, count:] / generated.sum(dim=1, keepdim=True).clamp_min(1e-30))
        scores.append(torch.cat([shares[:, :1], grown], dim=1).clamp_min(1e-30).log())
    return scores


# --- strangers


def familiarity(
    samples: Samples, trial: Trial, settings: Settings, scores: torch.Tensor
) -> dict[str, np.ndarray]:
    """How much like what was learned each asked image is, (m,), in several ways; higher for the known."""
    embeddings = embed(samples, trial, settings).numpy()
    learned, asked = embeddings[trial.fitted], embeddings[trial.asked]
    probabilities = scores.softmax(dim=1)
    sorted_shares = probabilities.sort(dim=1, descending=True).values
    neighbours = NearestNeighbors(n_neighbors=5).fit(learned).kneighbors(asked)[0]
    density = KernelDensity(bandwidth=1.0).fit(learned).score_samples(asked)
    return {
        "the likeliest class's probability": sorted_shares[:, 0].numpy(),
        "its lead over the second": (sorted_shares[:, 0] - sorted_shares[:, 1]).numpy(),
        "entropy": (probabilities * probabilities.clamp_min(1e-30).log()).sum(dim=1).numpy(),
        "distance to the nearest mean": scores.max(dim=1).values.numpy(),
        "length of the embedding": np.linalg.norm(asked, axis=1),
        "likelihood of all classes together": scores.logsumexp(dim=1).numpy(),
        "distance to the fifth neighbour": -neighbours[:, -1],
        "kernel density": density,
    }
