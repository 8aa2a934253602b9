"""What an encoder pools of images, in temporary files that are read block by block, never all in memory."""

import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..modeling_protoleak import ProtoLeakForImageAttribution
from ..statistics_protoleak import blocks
from .cross_fitting import Samples
from .latents import cache_folder
from .views import without_fillers


class FeatureRows:
    """
    Rows of features (n, ...), float32, in a file. A slice of them is read; places (m,) give these rows in
    their order, which are not yet read.

    Args:
        file (`BinaryIO`): Open for reading and writing; it has rows and nothing else.
        width (`tuple[int, ...]`): Shape of a row.
        places (`range` or `np.ndarray` of shape `(n,)`): Of the rows in the file.
    """

    def __init__(self, file: BinaryIO, width: tuple[int, ...] = (), places: range | np.ndarray = range(0)):
        self.file, self.width, self.places = file, width, places

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.width

    def __len__(self) -> int:
        return len(self.places)

    def append(self, rows: torch.Tensor) -> None:
        """Write more rows, (m, ...), to the end of a file of which these are all."""
        self.width = tuple(rows.shape[1:])
        self.places = range(len(self) + len(rows))
        self.file.seek(0, 2)
        self.file.write(rows.float().numpy().tobytes())
        self.file.flush()

    def __getitem__(self, rows: slice | torch.Tensor) -> "torch.Tensor | FeatureRows":
        if not isinstance(rows, slice):
            return FeatureRows(self.file, self.width, np.asarray(self.places)[rows.numpy()])
        # mapped anew each time: what was read is no longer in this process's memory
        mapped = np.memmap(self.file, np.float32, "r").reshape(-1, *self.width)
        return torch.from_numpy(mapped[np.asarray(self.places[rows])])


def new_rows() -> FeatureRows:
    """None yet, in a file without a name, beside the cached latents: it ends with its last reader."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return FeatureRows(tempfile.TemporaryFile(dir=cache_folder()))


def in_blocks(*parts: FeatureRows) -> Iterator[torch.Tensor]:
    """All rows of all parts."""
    return (part[rows] for part in parts for rows in blocks(part))


def pool_features(
    model: ProtoLeakForImageAttribution, images: Dataset, average_crops: bool
) -> tuple[FeatureRows, torch.Tensor]:
    """
    What the encoder pools, averaged over timesteps, (n, S, P), and labels (n,): a row an image with
    `average_crops`, else a row a crop, without those that fill a batch up.
    """
    rows, labels = new_rows(), []
    for features, targets in pool_batches(model, images, average_crops):
        rows.append(features)
        labels += targets.tolist()  # as tensors these, small as they are, would keep apart what is freed
    return rows, torch.tensor(labels)


@torch.no_grad()
def pool_batches(
    model: ProtoLeakForImageAttribution, images: Dataset, average_crops: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same, batch by batch."""
    for inputs, targets in DataLoader(images, 64):
        if inputs.ndim == 5 and not average_crops:
            crops = [without_fillers(image) for image in inputs]
            inputs, counts = torch.cat(crops), torch.tensor([len(image) for image in crops])
            targets = targets.repeat_interleave(counts)
        pooled = inputs.float() if model.takes_features else model.protoleak.describe([inputs])["features"]
        yield pooled.mean(dim=2).cpu(), targets


def make_samples(
    model: ProtoLeakForImageAttribution, batches: Iterable[torch.Tensor], labels: torch.Tensor
) -> Samples:
    """
    Features as discriminants see them, of batches (m, S, P) of all views of images with labels (num_images,).
    """
    encoder = model.protoleak.encoder
    families = [new_rows() for _ in encoder.families]
    for batch in batches:
        for rows, features in zip(families, encoder.family_features(batch), strict=True):
            rows.append(features)
    return Samples(families, labels, model.config.num_labels, model.config.embedding_size)
