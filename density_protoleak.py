"""
What is known: the detector that holds open-set scores of the known classes and their conformal calibration,
and its life in a model, from fitting and enrolling to the file of a checkpoint.

Higher scores mean more like the known. Attributes that end in `_` are fitted.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F
from transformers.utils import cached_file, logging

from .scores_protoleak import OPEN_SET_SCORES, GaussianKDE, OpenSetScore, as_samples
from .state_protoleak import read_state, write_state

logger = logging.get_logger(__name__)

DETECTOR_FILE = "density.pkl"
FORMAT_VERSION = 6
MAX_FOLDS = 20  # in which images calibrate what is fitted on the others
PARTS = ("embeddings", "gates", "statistics", "labels")  # of the images that a detector remembers
HALVED = ("gates", "statistics")  # the parts that are rounded to float16, as they are on disk
STATE = (
    "labels", "open_set_scores", "train_", "held_out_", "chosen_", "spreads_", "calibration_",
    "own_calibration_", "temperature_", "class_calibration_", "thumbnails_", "probe_",
)  # fmt: skip


# --- the detector -------------------------------------------------------------------------------------------


class OpenSetDetector:
    """
    What is known, with its calibration: open-set scores, p-values, and the temperature of the logits. On disk
    it is `density.pkl`.

    Attributes:
        labels (`list[str]`): The known classes, in the order of the logits.
        open_set_scores (`dict[str, str]`):
            A name of `OPEN_SET_SCORES` for `"embeddings"`, for `"statistics"`, or for both.
        train_, held_out_ (`dict[str, torch.Tensor]`):
            Embeddings and gates (n, D), statistics (n, S) and labels (n,) of training images, and of held-out
            ones (validation).
        scores_ (`dict[str, OpenSetScore]`): Fitted on those of training images; not on disk, see there.
        chosen_ (`dict[str, dict[str, float]]`): What fitting them chose, such as a bandwidth.
        spreads_ (`dict[str, list[float]]`):
            Median and interquartile range of each score on held-out images: the units in which two are added.
        calibration_ (`torch.Tensor` of shape `(m,)`): Sorted open-set scores of held-out images.
        own_calibration_ (`dict[int, torch.Tensor]`): The same of each class that has no held-out images.
        temperature_ (`float`): What class scores are divided by.
        class_calibration_ (`list[torch.Tensor]`):
            For each class, the sorted probabilities of that class for its held-out images.
        thumbnails_ (`dict[int, bytes]`):
            Of training images, by their place in `train_`: small JPEG files, for those nearest to prototypes.
        probe_ (`torch.Tensor` of shape `(embedding_size,)`):
            What the network gave for a fixed input when this was fitted; a network that gives something else
            has changed.
    """

    def __init__(self):
        self.labels: list[str] = []
        self.open_set_scores: dict[str, str] = {}
        self.chosen_: dict[str, dict[str, float]] = {}
        self.spreads_: dict[str, list[float]] = {}
        self.own_calibration_: dict[int, torch.Tensor] = {}
        self.temperature_ = 1.0
        self.thumbnails_: dict[int, bytes] = {}
        self._scores: dict[str, OpenSetScore] = {}

    @property
    def embedding_size(self) -> int:
        return self.train_["embeddings"].shape[1]

    @property
    def scores_(self) -> dict[str, OpenSetScore]:
        """
        The open-set scores, fitted when they are first needed: their matrices take more room than what they
        are fitted on.
        """
        if not self._scores:
            self._scores = self._fitted(self.train_, self.chosen_)
            self.chosen_ = {features: score.chosen() for features, score in self._scores.items()}
        return self._scores

    def _fitted(
        self, known: dict[str, torch.Tensor], chosen: dict[str, dict[str, float]]
    ) -> dict[str, OpenSetScore]:
        return {
            features: OPEN_SET_SCORES[name](**chosen.get(features, {})).fit(known[features], known["labels"])
            for features, name in self.open_set_scores.items()
        }

    # --- fitting

    def fit(
        self,
        train: Any,
        held_out: Any,
        label_names: list[str],
        open_set_scores: dict[str, str] | None = None,
    ) -> "OpenSetDetector":
        """
        Args:
            train, held_out: Objects or dicts with `embeddings` and `gates` (n, D), `statistics` (n, S) and
                `labels` 0..K-1 (n,). The held-out ones calibrate. A class that has none, one that was
                enrolled, is calibrated by its own training images, each scored by what is fitted on the
                others (if they are many, on those of other folds), and for itself alone: a few images of it
                don't lie as close to the known as hundreds of another class do.
            label_names (`list[str]`): K names.
            open_set_scores (`dict[str, str]`, *optional*):
                A name of `OPEN_SET_SCORES` for `"embeddings"`, for `"statistics"`, or for both; by default
                the paper's `"kde"` of embeddings.
        """
        self.labels = list(label_names)
        self.open_set_scores = dict(open_set_scores or {"embeddings": "kde"})
        self.train_, self.held_out_ = _remembered(train), _remembered(held_out)
        self._scores, self.chosen_, self.spreads_ = {}, {}, {}
        held_out_scores = _scored(self.scores_, self.held_out_)
        for features, scores in held_out_scores.items():
            low, median, high = np.quantile(scores, [0.25, 0.5, 0.75])
            self.spreads_[features] = [float(median), max(float(high - low), 1e-12)]
        self.calibration_ = torch.from_numpy(np.sort(self._added(held_out_scores)))
        self.own_calibration_ = self._own_calibration()
        return self

    def _own_calibration(self) -> dict[int, torch.Tensor]:
        """For each class without held-out images the sorted scores of its own, fitted on the others."""
        own: dict[int, list[float]] = {}
        places = torch.tensor(self._without_held_out(), dtype=torch.long)
        labels = self.train_["labels"]
        for fold in range(min(MAX_FOLDS, len(places))):
            left_out = places[fold::MAX_FOLDS]
            others = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, left_out, False)
            fitted = self._fitted({name: part[others] for name, part in self.train_.items()}, {})
            scores = self._added(
                _scored(fitted, {name: part[left_out] for name, part in self.train_.items()})
            )
            for label, score in zip(labels[left_out].tolist(), scores.tolist(), strict=True):
                own.setdefault(label, []).append(score)
        return {k: torch.tensor(sorted(scores), dtype=torch.float64) for k, scores in own.items()}

    def _without_held_out(self) -> list[int]:
        """Training images of classes that have no held-out images."""
        labels = self.train_["labels"]
        return (~torch.isin(labels, self.held_out_["labels"])).nonzero()[:, 0].tolist()

    def calibration_set(self) -> dict[str, torch.Tensor]:
        """What logits are calibrated on: embeddings, gates (m, D), statistics (m, S), labels (m,)."""
        own = self._without_held_out()
        return {name: torch.cat([self.held_out_[name], self.train_[name][own]]) for name in PARTS}

    def calibrate(self, class_scores: torch.Tensor) -> None:
        """
        Fit the temperature by the likelihood of the right classes (Guo et al. 2017), then keep the
        probabilities that label-conditional p-values compare with.

        Args:
            class_scores: Of the images of [`calibration_set`], (m, K).
        """
        scores, labels = class_scores.double().cpu(), self.calibration_set()["labels"]

        def loss(log_temperature: float) -> float:
            return F.cross_entropy(scores / math.exp(log_temperature), labels).item()

        log_temperature = minimize_scalar(loss, bounds=(math.log(1e-3), math.log(1e3)), method="bounded").x
        self.temperature_ = math.exp(log_temperature)
        probabilities = (scores / self.temperature_).softmax(dim=1)[torch.arange(len(labels)), labels]
        self.class_calibration_ = [probabilities[labels == k].sort().values for k in range(len(self.labels))]

    def enroll(self, name: str, images: Any) -> "OpenSetDetector":
        """
        A new detector, yet to be calibrated, that also knows `name`, from a few images of it, at least 2:
        `embeddings` and `gates` (n, D), `statistics` (n, S).
        """
        new = _remembered(images, np.full(len(images["embeddings"]), len(self.labels)))
        if name in self.labels:
            raise ValueError(f"{name!r} is already known; the known classes are {self.labels}")
        if len(new["labels"]) < 2:
            raise ValueError(f"enrolling {name!r} needs at least 2 images; got {len(new['labels'])}")
        train = {part: torch.cat([self.train_[part], new[part]]) for part in PARTS}
        detector = OpenSetDetector().fit(train, self.held_out_, [*self.labels, name], self.open_set_scores)
        detector.thumbnails_ = dict(self.thumbnails_)
        return detector

    # --- verdicts

    def open_set_score(self, images: Mapping[str, Any]) -> np.ndarray:
        """
        How much like the known images are, (n,), from their `embeddings` (n, D) and `statistics` (n, S): a
        log density in nats, or what `open_set_scores` has in its place. Two of them are added, each less its
        median on held-out images, in units of its interquartile range there.
        """
        return self._added(_scored(self.scores_, images))

    def _added(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        if len(scores) == 1:
            return next(iter(scores.values()))
        return sum((scores[f] - median) / spread for f, (median, spread) in self.spreads_.items())

    def calibration_of(self, label: int | None = None) -> torch.Tensor:
        """The sorted scores that an image attributed to a class is compared with."""
        return self.own_calibration_.get(label, self.calibration_)

    def p_value(self, scores: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """
        Split-conformal p-value of "made by a known class", (n,) in (0, 1], from open-set scores (n,):
        (1 + #{calibration <= score}) / (m + 1). For an image exchangeable with the calibration images,
        P(p <= alpha) <= alpha (Vovk et al. 2005). Where there are `labels` (n,), the likeliest classes,
        images of enrolled ones are compared with these classes' own.
        """
        p_values = _conformal_p_values(self.calibration_, scores)
        for label, calibration in self.own_calibration_.items() if labels is not None else ():
            p_values[labels == label] = _conformal_p_values(calibration, scores[labels == label])
        return p_values

    def threshold(self, alpha: float, label: int | None = None) -> float:
        """The open-set score below which the p-value is at most `alpha`; -inf where none is so low."""
        calibration = self.calibration_of(label)
        rank = math.floor(alpha * (len(calibration) + 1) + 1e-9) - 1
        if rank < 0:
            return -math.inf
        return calibration[rank].item() if rank < len(calibration) else math.inf

    def class_p_values(self, probabilities: np.ndarray) -> np.ndarray:
        """
        Label-conditional p-value of each class, (n, K), from class probabilities (n, K): for an image of
        class k, exchangeable with the held-out ones, P(p_k <= alpha) <= alpha, so that the classes with p_k >
        alpha are a set that has the right one with probability 1 - alpha.
        """
        columns = [
            _conformal_p_values(calibration, probabilities[:, k])
            for k, calibration in enumerate(self.class_calibration_)
        ]
        return np.stack(columns, axis=1)

    def verdict(self, output: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        `open_set_score`, `p_values` and `class_p_values` of an `ImageAttributionOutput`, whose logits are
        divided by the temperature.
        """
        scores = self.open_set_score(output)
        probabilities = output["logits"].detach().double().softmax(dim=1).cpu().numpy()
        return {
            "open_set_score": torch.from_numpy(scores),
            "p_values": torch.from_numpy(self.p_value(scores, probabilities.argmax(axis=1))),
            "class_p_values": torch.from_numpy(self.class_p_values(probabilities)),
        }

    # --- files

    def save(self, path: str | os.PathLike) -> None:
        """A crash or a full disk leaves the previous file whole."""
        state = {name: getattr(self, name) for name in STATE}
        for name in ("train_", "held_out_"):
            state[name] = state[name] | {part: state[name][part].half() for part in HALVED}
        write_state(path, state, FORMAT_VERSION)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "OpenSetDetector":
        """
        Raises:
            ValueError: the file is damaged, of another version, or holds anything but plain values: nothing
            in it is run.
        """
        try:
            state = read_state(path, FORMAT_VERSION)
            if set(state) != set(STATE):
                raise ValueError(f"it must hold {STATE}; it differs by {sorted(set(state) ^ set(STATE))}")
            detector = cls()
            vars(detector).update(state)
            detector.train_, detector.held_out_ = map(_remembered, (state["train_"], state["held_out_"]))
            for features, name in detector.open_set_scores.items():
                OPEN_SET_SCORES[name](**detector.chosen_.get(features, {}))  # there is such a score
        except OSError:
            raise
        except Exception as error:  # a hostile or damaged pickle can raise anything
            raise ValueError(f"{path} was refused: {error}; fit the detector again with train.py") from error
        return detector


def _remembered(source: Any, labels: Any = None) -> dict[str, torch.Tensor]:
    """Embeddings, gates, statistics and labels of an object or a dict, as tensors that agree."""

    def part(name: str) -> Any:
        return source[name] if isinstance(source, dict) else getattr(source, name)

    parts = {name: as_samples(part(name)).float() for name in PARTS[:-1]}
    parts |= {name: parts[name].half().float() for name in HALVED}
    parts["labels"] = torch.as_tensor(np.asarray(part("labels") if labels is None else labels)).long()
    shapes = [tuple(values.shape) for values in parts.values()]
    if shapes[0] != shapes[1] or len({shape[0] for shape in shapes}) > 1 or len(shapes[3]) != 1:
        raise ValueError(
            f"embeddings, gates, statistics and labels must be (n, D), (n, D), (n, S) and (n,); got {shapes}"
        )
    return parts


def _scored(scores: dict[str, OpenSetScore], images: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {features: score.score_samples(images[features]) for features, score in scores.items()}


def _conformal_p_values(calibration: torch.Tensor, scores: np.ndarray) -> np.ndarray:
    below = np.searchsorted(calibration.numpy(), scores, side="right")
    return (1 + below) / (len(calibration) + 1)


# --- what a model does with it ------------------------------------------------------------------------------


class DetectorMixin:
    """
    The known classes of a model, and the life of its `detector`, `None` before it is fitted: fitting,
    enrolling, checking, and its file.
    """

    detector: OpenSetDetector | None = None

    def probe(self) -> torch.Tensor:
        """What VAE and network make of a fixed image, (D,): with the same probe they are the same."""
        generator = torch.Generator("cpu").manual_seed(0)
        pixel_values = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
        training = self.training
        with torch.no_grad():
            embedding = self.eval().base_model(pixel_values).embeddings[0].float().cpu()
        self.train(training)
        return embedding

    def fit_detector(self, train: Any, held_out: Any) -> None:
        """
        Fit open-set scores and calibration on this network's embeddings of known classes.

        Args:
            train, held_out: With `embeddings`, `gates`, `statistics` and `labels`; see
                [`OpenSetDetector.fit`].
        """
        names, scores = self.config.label_names, self.config.open_set_scores
        self._take_detector(OpenSetDetector().fit(train, held_out, names, scores))

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
        detector goes.
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
        self.detector = None

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
        from sklearn.cluster import KMeans

        if self.detector is None:
            raise ValueError("this model has no detector to extend; train it with train.py first")
        detector = self.detector.enroll(name, images)
        embeddings = detector.train_["embeddings"][detector.train_["labels"] == len(detector.labels) - 1]
        count = min(self.config.num_prototypes, max(1, len(embeddings) // 4))
        centres = KMeans(count, n_init=10, random_state=0).fit(embeddings.numpy()).cluster_centers_
        self.set_labels(detector.labels)
        self.head.place(len(detector.labels) - 1, torch.from_numpy(centres))
        self._take_detector(detector)

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
                f"the detector was fitted for {detector.labels}, but this model's labels are {names}"
            )
        tolerance = 1e-3 if {self.dtype, self.vae.dtype} == {torch.float32} else 0.1
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


__all__ = ["GaussianKDE", "OpenSetDetector"]
