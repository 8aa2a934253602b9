"""
The known classes of a model, and the life of its detector, from fitting and enrolling to the file of a
checkpoint.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import cached_file, logging

from .calibration_protoleak import CrossFitted
from .density_protoleak import OpenSetDetector
from .fitting_protoleak import centres_of, cut, known_and_held_out, labelled_images
from .image_processing_protoleak import ProtoLeakImageProcessor
from .pipeline_protoleak import check_options, records_of

logger = logging.get_logger(__name__)

DETECTOR_FILE = "density.pkl"


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; each module's mode is what it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class DetectorMixin:
    """
    The known classes of a model, and the life of its `detector`, `None` before it is fitted: fitting,
    enrolling, checking, and its file.
    """

    detector: OpenSetDetector | None = None
    check_options = staticmethod(check_options)  # of `records`

    def probe(self) -> torch.Tensor:
        """What VAE and network make of a fixed image, (D,): with the same probe they are the same."""
        generator = torch.Generator("cpu").manual_seed(0)
        options = {"generator": generator, "device": "cpu", "dtype": torch.float32}
        pixel_values = torch.rand(1, 3, 64, 64, **options) * 2 - 1
        with evaluating(self):
            return self.base_model(pixel_values, return_dict=True).embeddings[0].cpu()

    def fit_open_set(
        self,
        dataset: Any,
        held_out: Any = None,
        processor: ProtoLeakImageProcessor | None = None,
        batch_size: int = 16,
    ) -> None:
        """
        Fit the detector on a data set, as after fine-tuning: what is known, and by which images the p-values
        are calibrated.

        Args:
            dataset: Rows with `image` and `label`, see [`labelled_images`], or a `DatasetDict` with `train`
                and `validation`.
            held_out (*optional*): The same of images that the network didn't learn from, which calibrate. By
                default `validation`; else a third of each class of `dataset`, of which p-values hold as far
                as the network was not trained on them.
            processor (*optional*): Prepares images; by default that of the checkpoint that the model was
                loaded from.
            batch_size (`int`): Images that go through the model together.

        Raises:
            ValueError: a class has too few images, or as [`labelled_images`].
        """
        names = self.config.label_names
        dataset, held_out = known_and_held_out(dataset, held_out)
        processor = processor or self._own_processor()
        train = self._described(*labelled_images(dataset, names), processor, batch_size)
        if held_out is None:
            here = cut(train["labels"])
            train, calibration = ({name: x[rows] for name, x in train.items()} for rows in (~here, here))
        else:
            calibration = self._described(*labelled_images(held_out, names), processor, batch_size)
        for split, part in {"fit on": train, "calibrate by": calibration}.items():
            if few := [name for k, name in enumerate(names) if not (part["labels"] == k).any()]:
                raise ValueError(f"there are no images to {split} of classes {few}; add some of each")
        count, needed = len(calibration["labels"]), round(1 / self.config.alpha) - 1
        if count < needed:
            logger.warning(
                "%d images calibrate; below %d, none can be called unknown at alpha %g",
                count, needed, self.config.alpha,
            )  # fmt: skip
        self.fit_detector(train, calibration, processor=processor)

    def _own_processor(self) -> ProtoLeakImageProcessor:
        source = self.config._name_or_path
        if not source:
            raise ValueError("the model was not loaded from a checkpoint; pass its image processor=")
        return ProtoLeakImageProcessor.from_pretrained(source)

    def _described(
        self, images: Sequence[Any], labels: np.ndarray, processor: ProtoLeakImageProcessor, batch_size: int
    ) -> dict[str, np.ndarray]:
        """`embeddings`, `gates`, `statistics` if any, and `labels` of images."""
        parts: dict[str, list[np.ndarray]] = {}
        with evaluating(self):
            for start in range(0, len(labels), batch_size):
                pixel_values = processor(images[start : start + batch_size])["pixel_values"]
                output = self.base_model(pixel_values.to(self.device), return_dict=True)
                for name in ("embeddings", "gates", "statistics"):
                    if output.get(name) is not None:
                        parts.setdefault(name, []).append(output[name].float().cpu().numpy())
        return {name: np.concatenate(part) for name, part in parts.items()} | {"labels": labels}

    def drop_detector(self, reason: str) -> None:
        """Forget the detector, if there is one, and warn: verdicts by it would be wrong."""
        if self.detector is not None:
            logger.warning(
                "the open-set detector is dropped, since %s: there are no verdicts until it is fitted again "
                "with model.fit_open_set(dataset)", reason,
            )  # fmt: skip
            self.detector = None

    def _drop_detector_in_training(self) -> None:
        if self.training and torch.is_grad_enabled():
            self.drop_detector("the network is being trained")

    def _replicate_for_data_parallel(self):
        """What `torch.nn.DataParallel` trains in the model's place; each could only drop its own detector."""
        self._drop_detector_in_training()
        return super()._replicate_for_data_parallel()

    def load_state_dict(self, *args, **kwargs):
        """As [`torch.nn.Module.load_state_dict`]; a detector that doesn't fit the weights is dropped."""
        result = super().load_state_dict(*args, **kwargs)
        if self.detector is not None:
            try:
                self.check_detector(self.detector)
            except ValueError as error:
                self.drop_detector(str(error))
        return result

    def fit_detector(
        self,
        train: Any,
        held_out: Any,
        cross_fitted: CrossFitted | dict[str, Any] | None = None,
        processor: ProtoLeakImageProcessor | None = None,
    ) -> None:
        """
        Fit open-set scores and calibration on this network's embeddings of known classes.

        Args:
            train, held_out: With `embeddings`, `gates`, `labels` and, where a score is of them, `statistics`.
            cross_fitted (*optional*): Calibrates in the place of `held_out`; see [`OpenSetDetector.fit`].
            processor (*optional*): What prepared the images; other ones are refused from then on.
        """
        names, scores = self.config.label_names, self.config.open_set_scores
        detector = OpenSetDetector().fit(train, held_out, names, scores, cross_fitted)
        detector.processor_ = None if processor is None else processor.settings
        self._take_detector(detector)

    @torch.no_grad()
    def _take_detector(self, detector: OpenSetDetector) -> None:
        """Calibrate the logits, and hold the detector."""
        images = detector.calibration_set()
        embeddings, gates = (images[name].to(self.device) for name in ("embeddings", "gates"))
        detector.calibrate(self.head(embeddings, gates))
        detector.probe_ = self.probe()
        self.detector = detector

    @torch.no_grad()
    def set_labels(self, names: list[str]) -> None:
        """
        Make `names` the classes: a class that was known keeps its prototypes, a new one begins at random. The
        detector and the scope, which are of the old ones, go.
        """
        known = {self.config.id2label[k]: k for k in range(self.config.num_labels)}
        old = self.head.prototypes
        new = torch.randn(len(names), *old.shape[1:], dtype=old.dtype).to(old.device) * 0.5
        for k, name in enumerate(names):
            if name in known:
                new[k] = old[known[name]]
        self.head.prototypes = torch.nn.Parameter(new)
        self.config.id2label = dict(enumerate(names))
        self.detector = self.config.scope = None

    @torch.no_grad()
    def enroll(self, name: str, images: Any) -> None:
        """
        Learn one more generator without training: its prototypes are centres of its images' embeddings
        (k-means), and open-set scores and calibration are fitted again.

        Args:
            name (`str`): The new class.
            images: This model's output for 2 of its images or more, or a dict of its `embeddings`, `gates`
                and `statistics`.

        Raises:
            ValueError: there is no detector to extend, the name is taken, or there are too few images.
        """
        if self.detector is None:
            raise ValueError("this model has no detector to extend; train it with train.py first")
        detector = self.detector.enroll(name, images)
        embeddings = detector.train_["embeddings"][detector.train_["labels"] == len(detector.labels) - 1]
        centres = centres_of(embeddings, self.config.num_prototypes)
        scope = self.config.scope
        self.set_labels(detector.labels)
        self.config.scope = scope  # of all but the new class
        self.head.place(len(detector.labels) - 1, centres)
        self._take_detector(detector)

    def records(self, output: Any, **options: Any) -> list[dict[str, Any]]:
        """What this model's output says of each image, in plain values and in words, see [`records_of`]."""
        return records_of(output, self.config, **options)

    def check_processor(self, processor: ProtoLeakImageProcessor) -> None:
        """Raise `ValueError` where it prepares images otherwise than the detector was fitted on."""
        fitted = None if self.detector is None else self.detector.processor_
        if fitted is not None and fitted != processor.settings:
            raise ValueError(
                f"the detector was fitted on images prepared with {fitted}, but this image processor has "
                f"{processor.settings}; take the checkpoint's own, or fit again with "
                f"model.fit_open_set(dataset, processor=)"
            )

    def check_detector(self, detector: OpenSetDetector) -> None:
        """
        Raise `ValueError` unless `detector` was fitted on embeddings of this very network, for these labels.
        """
        names = self.config.label_names
        if detector.embedding_size != self.config.embedding_size:
            raise ValueError(
                f"the detector was fitted on embeddings of size {detector.embedding_size}, but this model's "
                f"embedding_size is {self.config.embedding_size}; fit it again with train.py"
            )
        if detector.labels != names:
            raise ValueError(
                f"the detector was fitted for {detector.labels}, but this model's are {names}; to train for "
                f"these, load it without, by ignore_mismatched_sizes=True, and fit one after training with "
                f"model.fit_open_set(dataset)"
            )
        tolerance = 0.1 if self.held_vae.dtype in (torch.float16, torch.bfloat16) else 1e-3
        expected = detector.probe_.float()
        tolerance *= float(expected.abs().max())
        if not torch.allclose(self.probe(), expected, atol=tolerance, rtol=0):
            raise ValueError(
                "the detector was fitted for other weights, timesteps or VAE; fit it again with "
                "model.fit_open_set(dataset)"
            )

    def _load_detector(self, name: str | os.PathLike, hub: dict[str, Any], missing: Collection[str]) -> None:
        """A checkpoint's, whose weights must not be `missing`: class scores are calibrated, too."""
        path = cached_file(name, DETECTOR_FILE, _raise_exceptions_for_missing_entries=False, **hub)
        if path is not None:
            if missing:
                lost = ", ".join(sorted(missing)[:3])
                raise ValueError(
                    f"the detector was fitted with {lost}, which {name} lacks; fetch the checkpoint again"
                )
            detector = OpenSetDetector.load(path)
            self.check_detector(detector)
            self.detector = detector

    def _save_detector(self, folder: Path) -> None:
        """`density.pkl`, or none where the detector doesn't fit the model, which stays as it is."""
        detector = self.detector
        if detector is not None:
            try:
                self.check_detector(detector)
            except ValueError as error:
                logger.warning("%s is left out: %s", DETECTOR_FILE, error)
                detector = None
        if detector is not None:
            detector.save(folder / DETECTOR_FILE)
        else:
            (folder / DETECTOR_FILE).unlink(missing_ok=True)


__all__ = ["DetectorMixin"]
