"""A model before its first epoch: new or from a checkpoint, whitening, and the start as a discriminant."""

import logging
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from ..checkpoint_protoleak import has_vae_folder, load_autoencoder, load_vae
from ..configuration_protoleak import ProtoLeakConfig
from ..evaluation.protocol import REAL
from ..image_processing_protoleak import ProtoLeakImageProcessor
from ..modeling_protoleak import ProtoLeakForImageAttribution
from .arguments import TrainingArguments
from .latents import LatentDataset
from .views import RandomView

logger = logging.getLogger("protoleak.train")


def class_names(labels: Iterable[str]) -> list[str]:
    """The classes in the order of the logits: "real" first, where there is one, then by name."""
    return sorted(set(labels), key=lambda name: (name != REAL, name))


def make_model(
    arguments: TrainingArguments, label_names: list[str], vae: nn.Module | None = None
) -> tuple[ProtoLeakForImageAttribution, ProtoLeakImageProcessor]:
    """
    A new model by `config_name`, or the checkpoint `model_name_or_path` with a head for these classes.

    Args:
        arguments ([`TrainingArguments`]): Of the run.
        label_names (`list[str]`): The classes in the order of the logits.
        vae (`torch.nn.Module`, *optional*): Used instead of the one that `arguments` name.
    """
    source = arguments.model_name_or_path or arguments.config_name
    overrides = {k: v for k in ("crop_size", "num_crops") if (v := getattr(arguments, k)) is not None}
    values = ProtoLeakImageProcessor.get_image_processor_dict(source)[0]
    processor = ProtoLeakImageProcessor(**values | overrides)
    if arguments.model_name_or_path:
        model = ProtoLeakForImageAttribution.from_pretrained(source, vae=vae)
        model.set_labels(label_names)
        return model, processor
    config = ProtoLeakConfig.from_pretrained(source)
    changes = {"id2label": dict(enumerate(label_names))}
    changes["label2id"] = {name: k for k, name in enumerate(label_names)}
    if arguments.vae_name_or_path:
        changes |= {"vae_name_or_path": arguments.vae_name_or_path, "vae_revision": None}
        changes["vae_subfolder"] = "vae" if has_vae_folder(arguments.vae_name_or_path) else None
        vae = vae or load_autoencoder(changes["vae_name_or_path"], changes["vae_subfolder"])
    vae = vae or load_vae(source, config)
    changes["latent_channels"] = vae.config.latent_channels
    model = ProtoLeakForImageAttribution(ProtoLeakConfig(**config.to_dict() | changes))
    model.attach_vae(vae)
    return model, processor


def fit_whitening(model: ProtoLeakForImageAttribution, images: LatentDataset) -> None:
    """Fit the model's whitening, where its config has one, on the latents of training images."""
    if model.protoleak.whitening is not None:
        own = torch.Generator()  # so that a loader, which seeds its workers, draws nothing from all others'
        model.protoleak.whitening.fit(latents for latents, _ in DataLoader(images, 16, generator=own))


def begin_as_discriminant(
    model: ProtoLeakForImageAttribution, train: RandomView, validation: Dataset, max_samples: int = 10_000
) -> dict[str, float]:
    """
    Make a new network a shrunk linear discriminant of its pooled features, from where it learns on.

    Args:
        model ([`ProtoLeakForImageAttribution`]): Its whitening is fitted.
        train ([`RandomView`]): Training images.
        validation (`torch.utils.data.Dataset`): Images by whose likelihood shrinkage and scale are chosen.
        max_samples (`int`): Views of training images, their crops counted one by one, that are looked at.

    Returns:
        `shrinkage` and the validation `loss`.
    """
    samples = choose_samples(train, model.config.num_labels, max_samples)
    model.train()
    pool_features(model, samples[0], average_crops=False)  # settles the statistics of the backbone's norms
    model.eval()
    features, labels = pool_features(model, ConcatDataset(samples), average_crops=False)
    held_out, targets = pool_features(model, validation, average_crops=True)
    start = model.initialise_as_discriminant(features, labels, held_out, targets)
    logger.info("begins as a discriminant, shrinkage %(shrinkage)s, validation loss %(loss).3f", start)
    return start


def choose_samples(train: RandomView, num_labels: int, max_samples: int) -> list[Subset]:
    """
    The same random images in several views, evenly spaced: as many views as `max_samples` crops allow.
    Classes take turns, so that none is missed.
    """
    crops = math.prod(train.views[0].shape[:-3])
    order = torch.randperm(len(train))
    of_class = F.one_hot(train.labels[order], num_labels)
    rank = (of_class.cumsum(dim=0) * of_class).sum(dim=1)  # the how-manieth of its class an image is
    max_images = max(num_labels, max_samples // crops)
    order = order[rank.argsort(stable=True)[:max_images].sort().values]
    count = max(1, min(len(train.views), max_samples // (len(order) * crops)))
    places = np.linspace(0, len(train.views) - 1, count).round().astype(int)
    return [Subset(train.views[place], order.tolist()) for place in places]


@torch.no_grad()
def pool_features(
    model: ProtoLeakForImageAttribution, images: Dataset, average_crops: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the encoder pools, averaged over timesteps, (n, F), and labels (n,): a row an image with
    `average_crops`, else a row a crop.
    """
    features, labels = [], []
    for latents, targets in DataLoader(images, 64):
        noisy = model.protoleak.simulate(latents.flatten(0, -4))  # (BV, T, C, H, W)
        rows = len(latents) if average_crops else len(noisy)
        pooled = model.protoleak.encoder.pool(noisy.flatten(0, 1))[0]
        features.append(pooled.unflatten(0, (rows, -1)).mean(dim=1).cpu())
        labels.append(targets.repeat_interleave(rows // len(targets)))
    return torch.cat(features), torch.cat(labels)
