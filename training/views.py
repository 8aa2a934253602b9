"""Which views of the training images are cached, and which of them an image shows."""

from dataclasses import dataclass

import torch
from datasets import DatasetDict
from torch.utils.data import ConcatDataset, Dataset

from .latents import LatentCache, LatentDataset, View

IN_TURN = ("step1", "step2", "jpeg", "step3")  # one to three random operators; JPEG, as all that is shared is


def training_views(orientations: int, augmented_views: int) -> list[View]:
    """
    Args:
        orientations (`int`): Of the untouched image, itself first.
        augmented_views (`int`): Further ones, post-processed as `IN_TURN`.
    """
    untouched = [View(orientation) for orientation in range(orientations)]
    processed = [View(i % orientations, IN_TURN[i % len(IN_TURN)], seed=i) for i in range(augmented_views)]
    return untouched + processed


def without_fillers(crops: torch.Tensor) -> torch.Tensor:
    """
    Those of some latents (V, C, H, W) that are of crops of an image, not of what fills a batch up: that is
    flat. At least one.
    """
    varied = crops.flatten(2).amax(dim=2) > crops.flatten(2).amin(dim=2)
    varied = varied.any(dim=1)
    return crops[varied] if varied.any() else crops[:1]


class RandomView(Dataset):
    """One of several views of each image, and one of its crops, drawn anew each time."""

    def __init__(self, views: list[LatentDataset]):
        self.views, self.labels = views, views[0].labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        latents, label = self.views[int(torch.randint(len(self.views), ()))][index]
        if latents.ndim == 4:
            latents = without_fillers(latents)
            latents = latents[int(torch.randint(len(latents), ()))]
        return latents, label


class ViewsInTurn(Dataset):
    """One view of each image, always the same: of image i that at place i modulo the number of views."""

    def __init__(self, views: list[LatentDataset]):
        self.views = views

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.views[index % len(self.views)][index]


@dataclass(frozen=True)
class EncodedSplits:
    """
    A data set's images as latents or features, each split as a map-style data set of these and label.

    Args:
        train ([`RandomView`]): What the network learns from, in all views.
        untouched ([`LatentDataset`]): The training images as they are.
        known (`torch.utils.data.Dataset`): What the open-set detector is fitted on: each training image as it
            is, and where training sees post-processed ones, post-processed once as well.
        validation (`torch.utils.data.Dataset`, *optional*): The same of validation images, which tell which
            weights are best and calibrate; `None` where sources are left out for that.
        evaluated (`dict[str, LatentDataset]`): `test`, and `cross` and `unknown` where the data set has
            these splits, as they are.
    """

    train: RandomView
    untouched: LatentDataset
    known: Dataset
    validation: Dataset | None
    evaluated: dict[str, LatentDataset]


def encode_splits(
    splits: DatasetDict, cache: LatentCache, orientations: int, augmented_views: int, seed: int
) -> EncodedSplits:
    """
    Args:
        splits (`DatasetDict`): From [`load_splits`].
        cache ([`LatentCache`]): Encodes what is not at hand.
        orientations, augmented_views (`int`): See [`training_views`].
        seed (`int`): Of what is done to the post-processed validation images.
    """
    views = cache.encode_views(splits["train"], training_views(orientations, augmented_views))
    known, validation = [views[View()]], []
    if processed := [latents for view, latents in views.items() if view.operator is not None]:
        known.append(ViewsInTurn(processed))
    if "validation" in splits:
        validation.append(cache.encode(splits["validation"]))
        if processed:
            validation.append(cache.encode(splits["validation"], View(operator="step2", seed=seed)))
    return EncodedSplits(
        train=RandomView(list(views.values())),
        untouched=views[View()],
        known=ConcatDataset(known),
        validation=ConcatDataset(validation) if validation else None,
        evaluated={
            name: cache.encode_held_out(splits[name])
            for name in ("test", "cross", "unknown")
            if name in splits
        },
    )
