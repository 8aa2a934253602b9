"""
What is known: the detector that holds open-set scores of the known classes and their conformal calibration,
and its file.

Higher scores mean more like the known. Attributes that end in `_` are fitted.
"""

import copy
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from .calibration_protoleak import (
    REAL,
    CrossFitted,
    calibrate_classes,
    conformal_p_values,
    fit_temperature,
    relative,
    upper_p_values,
)
from .scores_protoleak import OPEN_SET_SCORES, GaussianKDE, OpenSetScore, as_samples
from .state_protoleak import read_state, write_state

FORMAT_VERSION = 7
MAX_FOLDS = 20  # in which images calibrate what is fitted on the others
HALVED = ("gates", "statistics")  # the parts that are rounded to float16, as they are on disk
FEATURES = ("embeddings", "statistics")  # what open-set scores are of
PARTS = (*FEATURES, "gates", "labels")  # what is remembered of images
RESERVED = ("unknown", "no evidence")  # what no class may be called: verdicts on images of no class
STATE = (
    "labels", "open_set_scores", "train_", "held_out_", "chosen_", "spreads_", "calibration_",
    "own_calibration_", "temperature_", "class_calibration_", "generators_calibration_",
    "generated_calibration_", "thumbnails_", "origins_", "probe_", "processor_",
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
            Embeddings and gates (n, D), labels (n,) and, where a score is of them, statistics (n, S),
            float16, of training images, and of held-out ones (validation). `held_out_` is `None` where
            cross-fitting calibrated.
        scores_ (`dict[str, OpenSetScore]`): Fitted on those of training images; not on disk, see there.
        chosen_ (`dict[str, dict[str, float]]`): What fitting them chose, such as a bandwidth.
        spreads_ (`dict[str, list[float]]`):
            Median and interquartile range of each score on calibration images, held-out or cross-fitted: the
            units in which two are added.
        calibration_ (`torch.Tensor` of shape `(m,)`): Sorted open-set scores of calibration images.
        own_calibration_ (`dict[int, torch.Tensor]`): The same of each class that was enrolled.
        temperature_ (`float`): What class scores are divided by.
        class_calibration_ (`list[torch.Tensor]`):
            For each class, the sorted [`relative`] probabilities of that class for its own
            calibration images.
        generators_calibration_ (`torch.Tensor` of shape `(v,)`, *optional*):
            The same of all generators with several sources, after cross-fitting.
        generated_calibration_ (`torch.Tensor` of shape `(g,)`, *optional*):
            The sorted probabilities of class "real" for generated ones; `None` without such a class.
        origins_ (`dict[int, str]`): Of the same training images, where each comes from, in words.
        thumbnails_ (`dict[int, bytes]`):
            Of training images, by their place in `train_`: small JPEG files, for those nearest to prototypes.
        processor_ (`dict[str, int]`, *optional*): The [`~ProtoLeakImageProcessor.settings`] of what prepared
            the images; `None` where that was not told.
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
        self.class_calibration_: list[torch.Tensor] = []
        self.generators_calibration_: torch.Tensor | None = None
        self.generated_calibration_: torch.Tensor | None = None
        self.origins_: dict[int, str] = {}
        self.thumbnails_: dict[int, bytes] = {}
        self.processor_: dict[str, int] | None = None
        self._scores: dict[str, OpenSetScore] = {}

    @property
    def embedding_size(self) -> int:
        return self.train_["embeddings"].shape[1]

    @property
    def real(self) -> int | None:
        """The place of class "real", `None` where there is none."""
        return self.labels.index(REAL) if REAL in self.labels else None

    @property
    def scores_(self) -> dict[str, OpenSetScore]:
        """
        The open-set scores, fitted when they are first needed: their matrices take more room than what they
        are fitted on.
        """
        if not self._scores:
            self._scores = self._fitted(self.train_)
            self.chosen_ = {features: score.chosen() for features, score in self._scores.items()}
        return self._scores

    def _fitted(self, known: dict[str, torch.Tensor]) -> dict[str, OpenSetScore]:
        """Scores fitted on some images, with the parameters that were chosen, if they were."""
        return {
            features: OPEN_SET_SCORES[name](**self.chosen_.get(features, {})).fit(
                known[features], known["labels"]
            )
            for features, name in self.open_set_scores.items()
        }

    # --- fitting

    def fit(
        self,
        train: Any,
        held_out: Any,
        label_names: list[str],
        open_set_scores: dict[str, str] | None = None,
        cross_fitted: CrossFitted | dict[str, Any] | None = None,
    ) -> "OpenSetDetector":
        """
        Args:
            train, held_out: Objects or dicts with `embeddings` and `gates` (n, D), `labels` 0..K-1 (n,) and,
                where a score is of them, `statistics` (n, S). The held-out ones calibrate. A class that has
                none, one that was enrolled, is calibrated by its own training images, each scored by what is
                fitted on the others (if they are many, on those of other folds), and for itself alone: a few
                images of it don't lie as close to the known as hundreds of another class do.
            label_names (`list[str]`): K names.
            open_set_scores (`dict[str, str]`, *optional*):
                A name of `OPEN_SET_SCORES` for `"embeddings"`, for `"statistics"`, or for both; by default
                the paper's `"kde"` of embeddings.
            cross_fitted ([`CrossFitted`] or its fields as a `dict`, *optional*):
                Calibrates in the place of `held_out`, which may then be `None`: by images of sources that the
                models that scored them never saw.
        """
        self.labels = list(label_names)
        self.open_set_scores = dict(open_set_scores or {"embeddings": "kde"})
        self.train_, self.held_out_ = self._remembered(train), None
        by_fold = CrossFitted(**cross_fitted) if isinstance(cross_fitted, dict) else cross_fitted
        self._scores, self.chosen_, self.spreads_ = {}, {}, {}
        if by_fold is not None:  # scores that are compared have the same parameters
            self.chosen_ = dict(by_fold.chosen)
        self.own_calibration_, self.class_calibration_ = {}, []
        self.generators_calibration_ = self.generated_calibration_ = None
        fitted = self.scores_  # now, so that what fitting chooses is in the file
        if by_fold is None:
            self.held_out_ = self._remembered(held_out)
            self._calibrate_scores(_scored(fitted, self.held_out_))
        else:
            self._calibrate_by(by_fold)
        self.own_calibration_ = self._own_calibration()
        return self

    def _remembered(self, source: Any, labels: Any = None) -> dict[str, torch.Tensor]:
        """
        Embeddings, gates, labels and, where a score is of them, statistics of an object or a dict, as tensors
        that agree.
        """

        def part(name: str) -> Any:
            return source[name] if isinstance(source, dict) else getattr(source, name)

        needed = {"embeddings": None, "gates": None} | self.open_set_scores
        kinds = {name: torch.float16 if name in HALVED else torch.float64 for name in needed}
        parts = {name: as_samples(part(name), dtype=kind) for name, kind in kinds.items()}
        parts |= {name: parts[name].float() for name in ("embeddings", "gates")}  # statistics are many
        parts["labels"] = torch.as_tensor(np.asarray(part("labels") if labels is None else labels)).long()
        shapes = {name: tuple(values.shape) for name, values in parts.items()}
        counts = {shape[0] for shape in shapes.values()}
        if shapes["embeddings"] != shapes["gates"] or len(counts) > 1 or len(shapes["labels"]) != 1:
            raise ValueError(
                f"embeddings and gates must be (n, D), statistics (n, S) and labels (n,); got {shapes}"
            )
        return parts

    def _calibrate_scores(self, scores: dict[str, np.ndarray]) -> None:
        """By the open-set scores of calibration images, each (m,)."""
        for features, values in scores.items():
            low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
            self.spreads_[features] = [float(median), max(float(high - low), 1e-12)]
        self.calibration_ = torch.from_numpy(np.sort(self._added(scores)))

    def _calibrate_by(self, cross_fitted: CrossFitted) -> None:
        """Open-set scores, temperature and classes."""
        scores = {name: part.numpy() for name, part in cross_fitted.open_set_scores.items()}
        columns = cross_fitted.class_scores.shape[1]
        if set(scores) != set(self.open_set_scores) or columns != len(self.labels):
            raise ValueError(
                f"cross_fitted must have open_set_scores of {sorted(self.open_set_scores)} and "
                f"class_scores of {len(self.labels)} classes; got {sorted(scores)} and {columns}"
            )
        self._calibrate_scores(scores)
        labels, real = cross_fitted.labels, self.real
        self.temperature_ = fit_temperature(cross_fitted.class_scores, labels)
        probabilities = self._probabilities(cross_fitted.class_scores)
        calibration = calibrate_classes(probabilities, labels, cross_fitted.num_sources, real)
        self.class_calibration_, self.generators_calibration_ = calibration
        if real is not None:
            strangers = self._probabilities(cross_fitted.strangers)
            generated = torch.cat([probabilities[labels != real], strangers])[:, real]
            self.generated_calibration_ = generated.sort().values

    def _probabilities(self, class_scores: torch.Tensor) -> torch.Tensor:
        return (class_scores / self.temperature_).softmax(dim=1)

    def _own_calibration(self) -> dict[int, torch.Tensor]:
        """For each class that calibrates itself the sorted scores of its own, fitted on the others."""
        own: dict[int, list[float]] = {}
        places = torch.tensor(self._self_calibrating(), dtype=torch.long)
        labels = self.train_["labels"]
        for fold in range(min(MAX_FOLDS, len(places))):
            left_out = places[fold::MAX_FOLDS]
            others = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, left_out, False)
            fitted = self._fitted({name: part[others] for name, part in self.train_.items()})
            scores = self._added(
                _scored(fitted, {name: part[left_out] for name, part in self.train_.items()})
            )
            for label, score in zip(labels[left_out].tolist(), scores.tolist(), strict=True):
                own.setdefault(label, []).append(score)
        return {k: torch.tensor(sorted(scores), dtype=torch.float64) for k, scores in own.items()}

    def _self_calibrating(self) -> list[int]:
        """Training images of classes that have no held-out images, or are not yet calibrated."""
        labels = self.train_["labels"]
        if self.held_out_ is None:
            return (labels >= len(self.class_calibration_)).nonzero()[:, 0].tolist()
        return (~torch.isin(labels, self.held_out_["labels"])).nonzero()[:, 0].tolist()

    def calibration_set(self) -> dict[str, torch.Tensor]:
        """
        What logits are yet to be calibrated on: embeddings, gates (m, D), labels (m,). After cross-fitting,
        that is none, or the images of a class just enrolled.
        """
        own = {name: part[self._self_calibrating()] for name, part in self.train_.items()}
        if self.held_out_ is None:
            return own
        return {name: torch.cat([self.held_out_[name], part]) for name, part in own.items()}

    def calibrate(self, class_scores: torch.Tensor) -> None:
        """
        Fit the temperature, by [`fit_temperature`], then keep the probabilities that p-values of classes, and
        of "generated", compare with. What cross-fitting calibrated stays.

        Args:
            class_scores: Of the images of [`calibration_set`], (m, K), before the temperature.
        """
        scores, labels = class_scores.double().cpu(), self.calibration_set()["labels"]
        if self.held_out_ is not None:
            self.temperature_ = fit_temperature(scores, labels)
            self.class_calibration_ = []
            self.generated_calibration_ = None if self.real is None else scores.new_empty(0)
        probabilities = self._probabilities(scores)
        done = self.class_calibration_
        self.class_calibration_ = done + calibrate_classes(probabilities, labels)[0][len(done) :]
        if self.generated_calibration_ is not None:
            generated = probabilities[labels != self.real, self.real]
            self.generated_calibration_ = torch.cat([self.generated_calibration_, generated]).sort().values

    def check_new(self, name: str) -> None:
        """Raise `ValueError` unless a class can be enrolled under this name."""
        if not name.strip() or name != name.strip() or not name.isprintable():
            raise ValueError(
                f"a class needs a name of printable characters, no space around it; got {name!r}"
            )
        if name.lower() in RESERVED:
            raise ValueError(f"{name!r} can't be a class's name: it is the verdict on images of no class")
        if name in self.labels:
            raise ValueError(f"{name!r} is already known; the known classes are {self.labels}")

    def enroll(self, name: str, images: Any) -> "OpenSetDetector":
        """
        A new detector, yet to be calibrated, that also knows `name`, from a few images of it, at least 2:
        `embeddings` and `gates` (n, D) and, where a score is of them, `statistics` (n, S).

        Where cross-fitting calibrated, the temperature and what the old classes compare with stay as they
        are, and the new class calibrates itself. Its sets cover images like those few, not those of other
        sources; and since it takes a share of the probability from all others, the old classes are ruled out
        somewhat more often than before, and a camera is told less often.
        """
        self.check_new(name)
        new = self._remembered(images, np.full(len(images["embeddings"]), len(self.labels)))
        if len(new["labels"]) < 2:
            raise ValueError(f"enrolling {name!r} needs at least 2 images; got {len(new['labels'])}")
        train = {part: torch.cat([values, new[part]]) for part, values in self.train_.items()}
        names = [*self.labels, name]
        if self.held_out_ is not None:
            detector = OpenSetDetector().fit(train, self.held_out_, names, self.open_set_scores)
            detector.thumbnails_ = dict(self.thumbnails_)
            detector.origins_, detector.processor_ = dict(self.origins_), self.processor_
            return detector
        detector = copy.copy(self)
        detector.labels, detector.train_ = names, train
        detector._scores = {}
        detector.thumbnails_ = dict(self.thumbnails_)
        detector.origins_ = dict(self.origins_)
        detector.own_calibration_ = self.own_calibration_ | detector._own_calibration()
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
        p_values = conformal_p_values(self.calibration_, scores)
        for label, calibration in self.own_calibration_.items() if labels is not None else ():
            p_values[labels == label] = conformal_p_values(calibration, scores[labels == label])
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
        class k, exchangeable with its calibration images, P(p_k <= alpha) <= alpha, so that the classes with
        p_k > alpha are a set that has the right one with probability 1 - alpha. See [`calibrate_classes`] for
        what is compared: after cross-fitting, the calibration images of a generator are in equal parts its
        own and those of all generators with several sources.
        """
        ratios = relative(torch.from_numpy(probabilities)).numpy()
        pairs = enumerate(self.class_calibration_)
        p_values = np.stack([conformal_p_values(own, ratios[:, k]) for k, own in pairs], axis=1)
        if self.generators_calibration_ is not None:
            among_all = conformal_p_values(self.generators_calibration_, ratios)
            generators = np.arange(p_values.shape[1]) != self.real
            p_values = np.where(generators, (p_values + among_all) / 2, p_values)
        return p_values

    def generated_p_values(self, probabilities: np.ndarray) -> np.ndarray | None:
        """
        Conformal p-value of "made by a generator, known or not", (n,), from class probabilities (n, K):
        (1 + #{calibration >= P(real)}) / (g + 1) over generated calibration images. For a generated image
        exchangeable with these, P(p <= alpha) <= alpha. `None` without a class "real".
        """
        if self.generated_calibration_ is None:
            return None
        return upper_p_values(self.generated_calibration_, probabilities[:, self.real])

    def verdict(self, output: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """
        `open_set_score`, `p_values`, `class_p_values` and `generated_p_values` of an
        `ImageAttributionOutput`, whose logits are divided by the temperature.
        """
        scores = self.open_set_score(output)
        probabilities = output["logits"].detach().double().softmax(dim=1).cpu().numpy()
        verdict = {
            "open_set_score": scores,
            "p_values": self.p_value(scores, probabilities.argmax(axis=1)),
            "class_p_values": self.class_p_values(probabilities),
            "generated_p_values": self.generated_p_values(probabilities),
        }
        return {name: None if part is None else torch.from_numpy(part) for name, part in verdict.items()}

    # --- files

    def save(self, path: str | os.PathLike) -> None:
        """A crash or a full disk leaves the previous file whole."""
        state = {name: getattr(self, name) for name in STATE}
        for name in ("train_", "held_out_"):
            halved = {part: values.half() for part, values in (state[name] or {}).items() if part in HALVED}
            state[name] = state[name] and state[name] | halved
        write_state(path, state, FORMAT_VERSION)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "OpenSetDetector":
        """
        Raises:
            ValueError: the file is damaged, of another version, or holds anything but plain values: nothing
            in it is run.
        """
        try:
            state = {"processor_": None} | read_state(path, FORMAT_VERSION)  # older files don't tell it
            if set(state) != set(STATE):
                raise ValueError(f"it must hold {STATE}; it differs by {sorted(set(state) ^ set(STATE))}")
            check_state(state)
            detector = cls()
            vars(detector).update(state)
            detector.train_ = detector._remembered(state["train_"])
            if detector.held_out_ is not None:
                detector.held_out_ = detector._remembered(state["held_out_"])
            for features, name in detector.open_set_scores.items():
                OPEN_SET_SCORES[name](**detector.chosen_.get(features, {}))  # there is such a score
        except OSError:
            raise
        except Exception as error:  # a hostile or damaged pickle can raise anything
            raise ValueError(f"{path} was refused: {error}; fit the detector again with train.py") from error
        return detector


# --- what a file may hold -----------------------------------------------------------------------------------


def check_state(state: Mapping[str, Any]) -> None:
    """Raise `ValueError` naming the part of a detector's state that is not of its kind."""
    names = state["labels"] if isinstance(state["labels"], list) else []
    classes = range(len(names))

    def is_dict(value: Any, is_key: Callable[[Any], bool], is_value: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(is_key(k) and is_value(v) for k, v in value.items())

    def of_features(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: is_dict(value, FEATURES.__contains__, is_value)

    def of_images(kind: type) -> Callable[[Any], bool]:
        return lambda value: is_dict(value, _is_count, lambda v: isinstance(v, kind))

    def optional(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: value is None or is_value(value)

    def is_each(value: Any, is_value: Callable[[Any], bool], count: int) -> bool:
        return isinstance(value, list) and len(value) == count and all(map(is_value, value))

    def is_parts(value: Any) -> bool:
        return is_dict(value, PARTS.__contains__, lambda v: isinstance(v, torch.Tensor))

    holds = {
        "labels": lambda v: bool(names) and all(isinstance(name, str) for name in v),
        "open_set_scores": of_features(lambda v: isinstance(v, str) and v in OPEN_SET_SCORES),
        "train_": is_parts,
        "held_out_": optional(is_parts),
        "chosen_": of_features(lambda v: is_dict(v, lambda k: isinstance(k, str), _is_number)),
        "spreads_": of_features(lambda v: is_each(v, _is_number, 2) and v[1] > 0),
        "calibration_": _is_sorted,
        "own_calibration_": lambda v: is_dict(v, lambda k: _is_count(k) and k in classes, _is_sorted),
        "temperature_": lambda v: _is_number(v) and v > 0,
        "class_calibration_": lambda v: is_each(v, _is_sorted, len(names)),
        "generators_calibration_": optional(_is_sorted),
        "generated_calibration_": optional(_is_sorted),
        "thumbnails_": of_images(bytes),
        "origins_": of_images(str),
        "processor_": optional(lambda v: is_dict(v, lambda k: isinstance(k, str), _is_count)),
        "probe_": lambda v: isinstance(v, torch.Tensor) and v.ndim == 1,
    }
    for name, is_right in holds.items():
        if not is_right(state[name]):
            raise ValueError(f"{name} is not what a detector has there")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_sorted(value: Any) -> bool:
    """Whether it is what p-values compare with: scores (m,) in order, without NaN."""
    return isinstance(value, torch.Tensor) and value.ndim == 1 and bool((value[1:] >= value[:-1]).all())


def _scored(scores: dict[str, OpenSetScore], images: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {features: score.score_samples(images[features]) for features, score in scores.items()}


__all__ = ["CrossFitted", "GaussianKDE", "OpenSetDetector"]
