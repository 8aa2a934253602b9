"""
Cross-fitting over sources: models that never saw an image's source score it, so that settings are chosen and
verdicts calibrated by images like those of a new source.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from ..calibration_protoleak import CrossFitted
from ..configuration_protoleak import ProtoLeakConfig
from ..evaluation.splits import SOURCE
from ..fitting_protoleak import centres_of
from ..modeling_protoleak import PrototypeHead
from ..scores_protoleak import OPEN_SET_SCORES
from ..statistics_protoleak import Discriminant, fit_discriminant

SHRINKAGES = (0.05, 0.1, 0.2, 0.4)  # of which a discriminant's is chosen
FOLDS = 5
EMBEDDED = 256  # images whose features are in memory at a time
STRANGER_FOLDS = 5  # in which classes are left out in turn
logger = logging.getLogger("protoleak.train")


@dataclass(frozen=True)
class Settings:
    """
    What a network begins as.

    Args:
        shrinkages (`tuple[float, ...]`): One for each family of features: how far its discriminant's
            covariance is drawn to a multiple of the identity.
        scales (`tuple[float, ...]`): The factor of each discriminant's projection: all count alike.
        loss (`float`): Cross-entropy of the held-out images that chose them, classes weighed alike.
    """

    shrinkages: tuple[float, ...]
    scales: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Samples:
    """
    Features of training images.

    Args:
        families (`list`): For each family rows (n, F), n = images times views, all images of the first view
            first: tensors, or in files.
        labels (`torch.LongTensor` of shape `(num_images,)`): Classes 0..K-1.
        num_labels (`int`): K.
        embedding_size (`int`): D, of which each family's discriminant has its share.
    """

    families: list[torch.Tensor]
    labels: torch.Tensor
    num_labels: int
    embedding_size: int

    @property
    def max_axes(self) -> int:
        """Axes that each discriminant may have: what D leaves over is of none."""
        return self.embedding_size // len(self.families)

    def fit(self, images: np.ndarray, shrinkages: Sequence[Sequence[float]]) -> list[list[Discriminant]]:
        """Discriminants of some images (mask, (num_images,)) in all their views: by family and shrinkage."""
        views = len(self.families[0]) // len(self.labels)
        rows = torch.from_numpy(np.flatnonzero(np.tile(images, views)))
        labels = self.labels[rows % len(self.labels)]
        return [
            fit_discriminant(family[rows], labels, self.num_labels, values, self.max_axes)
            for family, values in zip(self.families, shrinkages, strict=True)
        ]

    def untouched(self, images: np.ndarray) -> list:
        """The families of some images in their first view."""
        rows = torch.from_numpy(np.flatnonzero(images))
        return [family[rows] for family in self.families]

    def known(self, images: np.ndarray) -> tuple[list, torch.Tensor]:
        """
        The families and labels of some images as a detector remembers them: in their first view and, where
        there are others, once more in one of these in turn.
        """
        places, count = np.flatnonzero(images), len(self.labels)
        others = len(self.families[0]) // count - 1
        turns = [(1 + places % others) * count + places] if others else []
        rows = torch.from_numpy(np.concatenate([places, *turns]))
        return [family[rows] for family in self.families], self.labels[rows % count]


def join_learned(splits: DatasetDict) -> DatasetDict:
    """
    The splits as cross-fitting over sources needs them: training and validation images in one, where they
    have sources and some class has several; else as they are.
    """
    train = splits["train"]
    if SOURCE not in train.column_names or not any(c > 1 for c in count_sources(train).values()):
        return splits
    shared = [name for name in train.column_names if name in splits["validation"].column_names]
    parts = [part.select_columns(shared) for part in (train, splits["validation"])]
    others = {name: part for name, part in splits.items() if name not in ("train", "validation")}
    return DatasetDict(train=concatenate_datasets(parts), **others)


def count_sources(rows: Dataset) -> dict[str, int]:
    """How many sources each class has."""
    pairs = set(zip(rows["label"], rows[SOURCE], strict=True))
    return Counter(label for label, _ in pairs)


def source_folds(
    labels: np.ndarray, sources: np.ndarray, groups: np.ndarray, num_folds: int = FOLDS, seed: int = 0
) -> np.ndarray:
    """
    A fold for each image, (n,): whole sources together. Images of a class with a single source, which could
    not be left out without the class, are split by group, and where they are of one group, each alone. No
    fold has all images of a class; where that asks for it, there is a fold more.

    Args:
        labels, sources, groups (`np.ndarray` of shape `(n,)`): Of each image.
        num_folds (`int`): At least 2.
        seed (`int`): Of the order in which sources of one size are taken.
    """
    classes, of_class = np.unique(labels, return_inverse=True)
    units = _units(labels, sources, groups)
    names, of_unit, counts = np.unique(units, return_inverse=True, return_counts=True)
    images = np.zeros((len(names), len(classes)), dtype=int)  # of each class, in each unit
    np.add.at(images, (of_unit, of_class), 1)
    divisible = (images > 0).sum(axis=0) > 1  # a class of a single image can't be
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-counts[order], kind="stable")]
    in_folds, fold_of = np.zeros((num_folds, len(classes)), dtype=int), np.zeros(len(names), dtype=int)
    for unit in order:
        whole = (in_folds + images[unit] == images.sum(axis=0)) & (images[unit] > 0) & divisible
        allowed = np.flatnonzero(~whole.any(axis=1))
        if not len(allowed):
            allowed, in_folds = [len(in_folds)], np.pad(in_folds, ((0, 1), (0, 0)))
        fold_of[unit] = min(allowed, key=lambda f: in_folds[f].sum())
        in_folds[fold_of[unit]] += images[unit]
    return fold_of[of_unit]


def _units(labels: np.ndarray, sources: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """What stays together, (n,): the source, or of a class with a single source the group or the image."""
    units = sources.astype(str)
    for k in np.unique(labels):
        members = np.flatnonzero(labels == k)
        if len(set(sources[members])) == 1:
            kind, values = (
                ("group:", groups) if len(set(groups[members])) > 1 else ("image:", np.arange(len(labels)))
            )
            names = np.char.add(kind, values.astype(str))
            units = np.where(labels == k, names, units)
    return units


def class_folds(labels: np.ndarray, spared: int | None, num_folds: int = STRANGER_FOLDS) -> list[np.ndarray]:
    """Sets of classes that are left out together, all classes in turn but the one that is spared."""
    classes = [k for k in np.unique(labels) if k != spared]
    return [np.array(classes[fold::num_folds]) for fold in range(min(num_folds, len(classes)))]


# --- choosing settings --------------------------------------------------------------------------------------


def choose_settings(samples: Samples, splits: Sequence[tuple[np.ndarray, np.ndarray]]) -> Settings:
    """
    Shrinkages and scales of the discriminants, by the likelihood of held-out images.

    Args:
        samples ([`Samples`]): Features and classes.
        splits (`list` of pairs of masks, `(num_images,)` each): Which images are fitted on, and which are
            then held out.
    """
    distances, targets = [], []
    for fitted, held_out in splits:
        discriminants = samples.fit(fitted, [SHRINKAGES] * len(samples.families))
        families = samples.untouched(held_out)
        distances.append(
            [
                torch.stack([discriminant.squared_distances(family) for discriminant in of_family])
                for of_family, family in zip(discriminants, families, strict=True)
            ]
        )
        targets.append(samples.labels[torch.from_numpy(held_out)])
    labels = torch.cat(targets)
    pooled = [torch.cat(parts, dim=1) for parts in zip(*distances, strict=True)]  # (shrinkages, n, K) each
    weights = 1 / labels.bincount(minlength=samples.num_labels)[labels].double()
    best = [
        min(range(len(SHRINKAGES)), key=lambda i: _fit_scales([family[i]], labels, weights)[1])
        for family in pooled
    ]
    chosen = [family[i] for family, i in zip(pooled, best, strict=True)]
    scales, loss = _fit_scales(chosen, labels, weights)
    settings = Settings(tuple(SHRINKAGES[i] for i in best), scales, loss)
    logger.info("begins as discriminants: %s", settings)
    return settings


def _fit_scales(
    distances: list[torch.Tensor], labels: torch.Tensor, weights: torch.Tensor
) -> tuple[tuple[float, ...], float]:
    """
    The factors of squared distances (n, K) by which families count alike and images are likeliest, as scales,
    and that loss. A factor each, by likelihood, would drop families that help to rank.
    """
    spreads = [_spread(d) for d in distances]
    joined = sum(d / spread for d, spread in zip(distances, spreads, strict=True))

    def loss(log_factor: float) -> float:
        losses = F.cross_entropy(joined * -float(np.exp(log_factor)), labels, reduction="none").clamp_max(50)
        return float((losses * weights).sum() / weights.sum())

    found = minimize_scalar(loss, bounds=(-7, 4), method="bounded")
    return tuple(float(np.sqrt(2 * np.exp(found.x) / spread)) for spread in spreads), float(found.fun)


def _spread(distances: torch.Tensor) -> float:
    """The standard deviation of finite squared distances (n, K), less the mean of their row."""
    finite = distances.isfinite()
    values = distances.where(finite, 0)
    mean = values.sum(dim=1, keepdim=True) / finite.sum(dim=1, keepdim=True)
    return float((values - mean)[finite].square().mean().sqrt().clamp_min(1e-9))


# --- calibrating --------------------------------------------------------------------------------------------


def cross_fit(
    samples: Samples,
    settings: Settings,
    folds: np.ndarray,
    num_sources: np.ndarray,
    config: ProtoLeakConfig,
    real: int | None,
) -> CrossFitted:
    """
    Scores of every image by a model of the other folds, and of images by a model without their class.

    Args:
        samples ([`Samples`]), settings ([`Settings`]): Of the network that is calibrated.
        folds (`np.ndarray` of shape `(num_images,)`): From [`source_folds`].
        num_sources (`np.ndarray` of shape `(K,)`): How many sources each class has.
        config ([`ProtoLeakConfig`]): The network's; its open-set score is that of embeddings.
        real (`int`, *optional*): Which class is no generator; it is never left out.
    """
    labels, score = samples.labels.numpy(), config.open_set_scores["embeddings"]
    class_scores = torch.zeros(len(labels), samples.num_labels).double()
    open_set_scores, embedded = np.zeros(len(labels)), []
    for fold in np.unique(folds):
        held_out = folds == fold
        network = Start(samples, settings, ~held_out, config)
        families, (known, known_labels) = samples.untouched(held_out), samples.known(~held_out)
        class_scores[torch.from_numpy(held_out)] = network.class_scores(families)
        embedded.append((held_out, network.embed(known), known_labels, network.embed(families)))
    chosen = OPEN_SET_SCORES[score]().choose([(known, asked) for _, known, _, asked in embedded])
    for held_out, known, known_labels, asked in embedded:
        fitted = OPEN_SET_SCORES[score](**chosen).fit(known, known_labels)
        open_set_scores[held_out] = fitted.score_samples(asked)
    strangers = []
    for left_out in class_folds(labels, real):
        strange = np.isin(labels, left_out)
        start = Start(samples, settings, ~strange, config)
        scores = start.class_scores(samples.untouched(strange))
        strangers.append(scores.index_fill(1, torch.from_numpy(left_out), -torch.inf))
    return CrossFitted(
        open_set_scores={"embeddings": open_set_scores},
        class_scores=class_scores.float(),
        labels=samples.labels,
        num_sources=torch.from_numpy(num_sources),
        strangers=torch.cat(strangers).float(),
        chosen={"embeddings": chosen},
    )


class Start:
    """
    The network that some images (mask, (num_images,)) make before anything is trained: discriminants of their
    features, and prototypes at the centres of their embeddings.
    """

    def __init__(self, samples: Samples, settings: Settings, images: np.ndarray, config: ProtoLeakConfig):
        shrinkages = [(shrinkage,) for shrinkage in settings.shrinkages]
        self.discriminants = [d[0] for d in samples.fit(images, shrinkages)]
        self.scales, self.size, self.head = settings.scales, samples.embedding_size, PrototypeHead(config)
        fitted, labels = torch.from_numpy(np.flatnonzero(images)), samples.labels[torch.from_numpy(images)]
        parts = fitted.split(EMBEDDED)
        embeddings = torch.cat([self.embed([family[rows] for family in samples.families]) for rows in parts])
        for k in range(samples.num_labels):
            self.head.place(k, centres_of(embeddings[labels == k], config.num_prototypes))

    @torch.no_grad()
    def class_scores(self, families: list) -> torch.Tensor:
        """Rows (m, F) for each family -> (m, K)"""
        embeddings = self.embed(families)
        gates = torch.full_like(embeddings, 0.5)  # those of a new network
        return self.head(embeddings, gates).double().clamp_min(-1e4)

    def embed(self, families: list) -> torch.Tensor:
        """Rows (m, F) for each family -> (m, D): a density depends on all dimensions, used or not."""
        parts = zip(self.discriminants, self.scales, families, strict=True)
        used = torch.cat([d.project(x) * scale for d, scale, x in parts], dim=1)
        return F.pad(used, (0, self.size - used.shape[1]))
