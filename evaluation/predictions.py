"""What a checkpoint gives for many images: arrays that metrics are computed from."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader

from ..image_processing_protoleak import ProtoLeakImageProcessor
from ..modeling_protoleak import ProtoLeakForImageAttribution
from ..processes import join_processes
from ..training.latents import LatentCache, LatentDataset
from .columns import Columns
from .splits import TEST_SPLITS, held_out_images

ORIGINS = ("camera", "generated", "can't tell")  # what a record's `origin` may be


@dataclass
class Predictions:
    """
    Of N images, as a model or a baseline gives them.

    Args:
        embeddings (`np.ndarray` of shape `(N, D)`): What an open-set score is fitted on.
        probabilities (`np.ndarray` of shape `(N, K)`): Of the known classes; each row sums to 1.
        labels (`np.ndarray` of shape `(N,)`): The true classes 0..K-1, -1 for an unknown generator.
        open_set_score (`np.ndarray` of shape `(N,)`, *optional*): Higher for images like the known ones.
        gates (`np.ndarray` of shape `(N, D)`, *optional*): In (0, 1).
        statistics (`np.ndarray` of shape `(N, S)`, *optional*): Of the re-simulated latents.
        p_values (`np.ndarray` of shape `(N,)`, *optional*): Conformal, of "made by a known class".
        class_p_values (`np.ndarray` of shape `(N, K)`, *optional*): Conformal, of each class.
        generated_p_values (`np.ndarray` of shape `(N,)`, *optional*): Conformal, of "made by a generator,
            known or not"; where there is a class "real".
        is_refused (`np.ndarray` of shape `(N,)`, *optional*): Which images are given no verdict.
    """

    embeddings: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    open_set_score: np.ndarray | None = None
    gates: np.ndarray | None = None
    statistics: np.ndarray | None = None
    p_values: np.ndarray | None = None
    class_p_values: np.ndarray | None = None
    generated_p_values: np.ndarray | None = None
    is_refused: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> "Predictions":
        """The images at these places, or where a mask (N,) is true."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Predictions(**{name: None if part is None else part[index] for name, part in parts.items()})

    def without_evidence(self, is_refused: np.ndarray) -> "Predictions":
        """
        The same where no verdict is given on some images, a mask (N,), as records have it: no class is ruled
        out of them, and they are called neither unknown nor a camera's, for which p-values of 1 stand.
        """
        names = ("p_values", "class_p_values", "generated_p_values")
        parts = {name: part.copy() for name in names if (part := getattr(self, name)) is not None}
        for part in parts.values():
            part[is_refused] = 1
        return replace(self, **parts, is_refused=is_refused)

    def likeliest(self) -> np.ndarray:
        """Index of the known class with the highest probability. (N,)"""
        return self.probabilities.argmax(axis=1)

    def verdicts(self, alpha: float) -> np.ndarray:
        """
        Index of the class that an image is attributed to; K for "unknown", K + 1 for "no evidence". (N,)
        """
        found, num_labels = self.likeliest(), self.probabilities.shape[1]
        if self.p_values is not None:
            found = np.where(self.p_values <= alpha, num_labels, found)
        return found if self.is_refused is None else np.where(self.is_refused, num_labels + 1, found)

    def in_sets(self, alpha: float, camera_alpha: float, real: int | None) -> np.ndarray:
        """
        Of each class whether `alpha` does not rule it out, or it is the likeliest, as records have them; of a
        camera's images class `real` alone is left, `None` where there is no such class. (N, K)
        """
        rows = self.class_p_values > alpha
        rows[np.arange(len(self)), self.likeliest()] = True
        if real is not None and self.generated_p_values is not None:
            rows[self.cameras(alpha, camera_alpha, real)] = np.arange(rows.shape[1]) == real
        return rows

    def cameras(self, alpha: float, camera_alpha: float, real: int) -> np.ndarray:
        """Whether "a camera" is said: where `real` is likeliest and every generator ruled out. (N,)"""
        likely = (self.likeliest() == real) & (self.p_values > alpha)
        return likely & (self.generated_p_values <= camera_alpha)

    def origins(self, alpha: float, camera_alpha: float, real: int) -> np.ndarray:
        """
        Places in `ORIGINS`, as records have them: a camera by [`Predictions.cameras`]; a generator where
        `alpha` rules out class `real`, and it is not the likeliest or the image is called unknown. (N,)
        """
        camera = self.cameras(alpha, camera_alpha, real)
        kept = (self.likeliest() == real) & (self.p_values > alpha)
        generated = (self.class_p_values[:, real] <= alpha) & ~kept
        return np.select([camera, generated], [0, 1], 2)


@torch.no_grad()
def predict(
    model, data: LatentDataset, accelerator: Accelerator, statistics: bool = True, batch_size: int = 64
) -> Predictions:
    """
    Run `model` over (latents, labels), shared out over the processes of `accelerator`; each gets all results:
    with `statistics`, which are large, where an open-set score is to be fitted or compared.
    """
    module = accelerator.unwrap_model(model)
    training = module.training
    module.eval()
    columns, done = {}, 0
    kind = "features" if module.takes_features else "latents"
    for inputs, labels in accelerator.prepare(DataLoader(data, batch_size)):
        output = module(**{kind: inputs.float()}, return_dict=True)
        row = _columns(output, accelerator.device, statistics) | {"labels": labels}
        for name, part in accelerator.gather_for_metrics(row).items():
            if name not in columns:  # whole from the start: joined parts would be in memory twice
                columns[name] = np.empty((len(data), *part.shape[1:]), part.cpu().numpy().dtype)
            columns[name][done : done + len(part)] = part.cpu()
        done += len(part)
    module.train(training)
    made = Predictions(**columns)
    is_refused = getattr(data, "is_refused", None)
    return made if is_refused is None else made.without_evidence(is_refused)


def _columns(output, device: torch.device, statistics: bool) -> dict[str, torch.Tensor]:
    """The fields of [`Predictions`] that a model's output has, labels aside."""
    columns = {name: getattr(output, name).float() for name in ("embeddings", "gates")}
    if statistics and output.statistics is not None:
        columns["statistics"] = output.statistics.float()
    columns["probabilities"] = output.logits.double().softmax(dim=1)
    names = ("open_set_score", "p_values", "class_p_values", "generated_p_values")
    verdict = {name: getattr(output, name, None) for name in names}
    return columns | {name: part.to(device) for name, part in verdict.items() if part is not None}


def predict_splits(
    model, processor, rows: Mapping[str, Dataset], accelerator: Accelerator
) -> dict[str, Predictions]:
    """[`predict`] of each split of `rows`, its images encoded with `processor` and the model's VAE."""
    cache = LatentCache(model, processor, accelerator)
    return {split: predict(model, cache.encode_held_out(part), accelerator) for split, part in rows.items()}


@dataclass
class Subject:
    """
    A checkpoint and the images that it is measured on: one of `TEST_SPLITS` or both, the first of them
    `main`, and `unknown` if any.
    """

    model: ProtoLeakForImageAttribution
    processor: ProtoLeakImageProcessor
    splits: DatasetDict
    accelerator: Accelerator

    @classmethod
    def load(
        cls,
        checkpoint: str,
        dataset: str,
        unknown: str | None = None,
        columns: Columns = Columns(),  # noqa: B008 (it is frozen)
        config_name: str | None = None,
    ) -> "Subject":
        """
        Args:
            checkpoint (`str`): Folder or Hub id.
            dataset (`str`): Whose images are looked at, see [`held_out_images`].
            unknown (`str`, *optional*): More images by generators that the model doesn't know.
            columns ([`Columns`]), config_name (`str`, *optional*): Of the data set, see [`load_splits`].

        Raises:
            ValueError: the checkpoint has no verdicts, or other classes than the data set.
        """
        model = ProtoLeakForImageAttribution.from_pretrained(checkpoint)
        if model.detector is None:
            raise ValueError(f"{checkpoint} has no detector, so it has no verdicts to evaluate; run train.py")
        processor = ProtoLeakImageProcessor.from_pretrained(checkpoint)
        model.check_processor(processor)
        splits = held_out_images(dataset, model.config.label_names, unknown, columns, config_name)
        join_processes()
        accelerator = Accelerator()
        return cls(model.to(accelerator.device), processor, splits, accelerator)

    @property
    def main(self) -> str:
        return next(split for split in TEST_SPLITS if split in self.splits)

    def cache(self) -> LatentCache:
        """Of the latents of its images."""
        return LatentCache(self.model, self.processor, self.accelerator)
