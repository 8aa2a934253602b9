"""A model before its first epoch: new or from a checkpoint, whitening, and the start as a discriminant."""

import logging
import math
from collections.abc import Iterable, Sequence

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from ..calibration_protoleak import CrossFitted
from ..checkpoint_protoleak import PICTURE, check_weights
from ..configuration_protoleak import ProtoLeakConfig
from ..evaluation.splits import SOURCE, groups_of
from ..evaluation.verdicts import REAL
from ..image_processing_protoleak import JPEG_QUALITY, ProtoLeakImageProcessor
from ..modeling_protoleak import ProtoLeakForImageAttribution
from ..vae_protoleak import has_vae_folder, load_autoencoder, load_vae
from .arguments import TrainingArguments
from .cross_fitting import (
    Samples,
    Settings,
    Start,
    choose_settings,
    count_sources,
    cross_fit,
    source_folds,
)
from .features import in_blocks, make_samples, pool_batches, pool_features
from .latents import LatentCache
from .views import RandomView, without_fillers

logger = logging.getLogger("protoleak.train")


def class_names(labels: Iterable[str], numbered: Sequence[str] = ()) -> list[str]:
    """
    The classes in the order of the logits: as a data set has `numbered` them, else "real" first, where there
    is one, then by name.
    """
    order = {name: place for place, name in enumerate(numbered)}
    return sorted(set(labels), key=lambda name: (order.get(name, len(order)), name != REAL, name))


def make_processor(arguments: TrainingArguments) -> ProtoLeakImageProcessor:
    """The image processor of `config_name` or of `model_name_or_path`, as the arguments change it."""
    source = arguments.model_name_or_path or arguments.recipe
    changes = {k: v for k in ("crop_size", "num_crops") if (v := getattr(arguments, k)) is not None}
    if arguments.normalise_format:
        changes["jpeg_quality"] = JPEG_QUALITY
    values = ProtoLeakImageProcessor.get_image_processor_dict(source)[0]
    return ProtoLeakImageProcessor(**values | changes)


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
    source, processor = arguments.model_name_or_path or arguments.recipe, make_processor(arguments)
    if arguments.model_name_or_path:
        model = ProtoLeakForImageAttribution.from_pretrained(source, vae=vae)
        model.set_labels(label_names)
        return model, processor
    config = ProtoLeakConfig.from_pretrained(source)
    changes = {"id2label": dict(enumerate(label_names)), "scope": None}
    changes["label2id"] = {name: k for k, name in enumerate(label_names)}
    if arguments.vae_name_or_path:
        changes |= {"vae_name_or_path": arguments.vae_name_or_path, "vae_revision": None}
        changes["vae_subfolder"] = "vae" if has_vae_folder(arguments.vae_name_or_path) else None
        vae = vae or load_autoencoder(changes["vae_name_or_path"], changes["vae_subfolder"])
    vae = vae or load_vae(source, config)
    changes["latent_channels"] = vae.config.latent_channels
    model = ProtoLeakForImageAttribution(ProtoLeakConfig(**config.to_dict() | changes))
    model.attach_vae(vae)
    if "picture_statistics" in config.texture_families:
        take_network(model, source)
    return model, processor


def take_network(model: ProtoLeakForImageAttribution, source: str) -> None:
    """
    The frozen network of "picture_statistics", from the weights in a recipe's or a checkpoint's folder or Hub
    id.

    Raises:
        OSError: the weights are damaged.
        ValueError: the network is not there, or not finite.
    """
    found, prefix = {}, f"protoleak.{PICTURE}."
    if path := cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False):
        try:
            with safe_open(path, "pt") as weights:
                names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118
                found = {name.removeprefix(prefix): weights.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise OSError(f"{path} is damaged: {error}; fetch or make it again") from error
    network = model.protoleak.get_submodule(PICTURE)
    fitted = dict(network.named_buffers())
    try:
        network.load_state_dict(found | fitted)
    except RuntimeError as error:
        raise ValueError(
            f"{source} has no frozen network for texture_families: picture_statistics; wild/make_backbone.py "
            "adds one"
        ) from error
    check_weights(network, source)


def fit_whitening(model: ProtoLeakForImageAttribution, rows: datasets.Dataset, cache: LatentCache) -> None:
    """Fit the model's whitening, where its config has one, on the latents of training images as they are."""
    if model.protoleak.whitening is not None:
        model.protoleak.fit_whitening(without_fillers(z.flatten(0, -4)) for z in cache.latents(rows))


def begin_as_discriminant(
    model: ProtoLeakForImageAttribution, train: RandomView, validation: Dataset, max_samples: int = 10_000
) -> Settings:
    """
    Make a new network shrunk linear discriminants of its pooled features, from where it learns on.

    Args:
        model ([`ProtoLeakForImageAttribution`]): Its whitening is fitted.
        train ([`RandomView`]): Training images.
        validation (`torch.utils.data.Dataset`): Images by whose likelihood shrinkage and scale are chosen.
        max_samples (`int`): Views of training images, their crops counted one by one, that are looked at.
    """
    subsets = choose_samples(train, model.config.num_labels, max_samples)
    model.train()
    for _ in pool_batches(model, subsets[0], average_crops=False):  # settles the backbone's norms
        pass
    model.eval()
    pooled, labels = pool_features(model, ConcatDataset(subsets), average_crops=False)
    held_out, targets = pool_features(model, validation, average_crops=True)
    fitted = np.arange(len(labels) + len(targets)) < len(labels)
    model.protoleak.encoder.fit_norm(in_blocks(pooled))
    samples = make_samples(model, in_blocks(pooled, held_out), torch.cat([labels, targets]))
    settings = choose_settings(samples, [(fitted, ~fitted)])
    begin_as(model, samples, fitted, settings)
    return settings


def begin_across_sources(
    model: ProtoLeakForImageAttribution, views: list[Dataset], rows: datasets.Dataset
) -> CrossFitted:
    """
    Make a new network discriminants of the features of all images, of settings that do best on sources left
    out, and score every image by such a network that its source was left out of.

    Args:
        model ([`ProtoLeakForImageAttribution`]): Its whitening is fitted.
        views (`list[torch.utils.data.Dataset]`): Of the same images, those as they are first.
        rows (`datasets.Dataset`): The same images' labels and sources, see [`join_learned`].
    """
    model.eval()
    pooled, labels = zip(*(pool_features(model, view, average_crops=True) for view in views), strict=True)
    model.protoleak.encoder.fit_norm(in_blocks(*pooled))
    samples = make_samples(model, in_blocks(*pooled), labels[0])
    groups = groups_of(rows)
    groups = np.arange(len(rows)) if groups is None else groups
    folds = source_folds(labels[0].numpy(), np.array(rows[SOURCE]), groups)
    everything = np.full(len(rows), True)
    settings = choose_settings(samples, [(folds != fold, folds == fold) for fold in np.unique(folds)])
    begin_as(model, samples, everything, settings)
    names, counts = model.config.label_names, count_sources(rows)
    num_sources = np.array([counts[name] for name in names])
    real = names.index(REAL) if REAL in names else None
    return cross_fit(samples, settings, folds, num_sources, model.config, real)


def begin_as(
    model: ProtoLeakForImageAttribution, samples: Samples, fitted: np.ndarray, settings: Settings
) -> None:
    """Make the network the [`Start`] that some samples (mask, (num_images,)) make."""
    start = Start(samples, settings, fitted, model.config)
    model.initialise_as_discriminant(start.discriminants, settings.scales, start.head.prototypes)


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
