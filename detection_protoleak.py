"""
The known classes of a model, and the life of its detector, from fitting and enrolling to the file of a
checkpoint.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file, logging

from .calibration_protoleak import CrossFitted
from .density_protoleak import OpenSetDetector
from .pipeline_protoleak import check_options, records_of

logger = logging.get_logger(__name__)

DETECTOR_FILE = "density.pkl"


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
        pixel_values = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
        training = self.training
        with torch.no_grad():
            embedding = self.eval().base_model(pixel_values, return_dict=True).embeddings[0].cpu()
        self.train(training)
        return embedding

    def fit_detector(
        self, train: Any, held_out: Any, cross_fitted: CrossFitted | dict[str, Any] | None = None
    ) -> None:
        """
        Fit open-set scores and calibration on this network's embeddings of known classes.

        Args:
            train, held_out: With `embeddings`, `gates`, `labels` and, where a score is of them, `statistics`.
            cross_fitted (*optional*): Calibrates in the place of `held_out`; see [`OpenSetDetector.fit`].
        """
        names, scores = self.config.label_names, self.config.open_set_scores
        self._take_detector(OpenSetDetector().fit(train, held_out, names, scores, cross_fitted))

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
        self.config.label2id = {name: k for k, name in enumerate(names)}
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
        try:  # where transformers doesn't look for what a checkpoint's code needs: loading doesn't
            from sklearn.cluster import KMeans
        except ImportError as error:
            raise ImportError("enrolling needs scikit-learn: pip install scikit-learn") from error
        if self.detector is None:
            raise ValueError("this model has no detector to extend; train it with train.py first")
        detector = self.detector.enroll(name, images)
        embeddings = detector.train_["embeddings"][detector.train_["labels"] == len(detector.labels) - 1]
        count = min(self.config.num_prototypes, max(1, len(embeddings) // 4))
        centres = KMeans(count, n_init=10, random_state=0).fit(embeddings.numpy()).cluster_centers_
        scope = self.config.scope
        self.set_labels(detector.labels)
        self.config.scope = scope  # of all but the new class
        self.head.place(len(detector.labels) - 1, torch.from_numpy(centres))
        self._take_detector(detector)

    def records(self, output: Any, **options: Any) -> list[dict[str, Any]]:
        """What this model's output says of each image, in plain values and in words, see [`records_of`]."""
        return records_of(output, self.config, **options)

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
                f"these, load it with ignore_mismatched_sizes=True, which leaves the detector out"
            )
        tolerance = 0.1 if self.vae.dtype in (torch.float16, torch.bfloat16) else 1e-3
        expected = detector.probe_.float()
        tolerance *= float(expected.abs().max())
        if not torch.allclose(self.probe(), expected, atol=tolerance, rtol=0):
            raise ValueError(
                "the detector was fitted for other weights, timesteps or VAE; fit it again with train.py"
            )

    def _load_detector(self, name: str | os.PathLike, hub: dict[str, Any]) -> None:
        path = cached_file(name, DETECTOR_FILE, _raise_exceptions_for_missing_entries=False, **hub)
        if path is not None:
            detector = OpenSetDetector.load(path)
            self.check_detector(detector)
            self.detector = detector

    def _save_detector(self, folder: Path) -> None:
        if self.detector is not None:
            try:
                self.check_detector(self.detector)
            except ValueError as error:
                logger.warning("%s is left out: %s", DETECTOR_FILE, error)
                self.detector = None
        if self.detector is not None:
            self.detector.save(folder / DETECTOR_FILE)
        else:
            (folder / DETECTOR_FILE).unlink(missing_ok=True)


__all__ = ["DetectorMixin"]
