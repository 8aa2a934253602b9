"""
Calibration: the temperature of class scores, conformal p-values, and what cross-fitting over sources gives
for both.

n, m, K in shapes: images of known classes, images of strangers, known classes.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

REAL = "real"  # the class of photographs; every other is a generator


@dataclass
class CrossFitted:
    """
    What models said of images whose sources they never saw: those of the folds of a cross-fitting. Arrays or
    tensors are taken, and held as tensors.

    Args:
        open_set_scores (`dict[str, torch.DoubleTensor]` of shape `(n,)`):
            For `"embeddings"`, `"statistics"` or both, the raw score of each image by its fold's model,
            fitted on that fold's training images.
        class_scores (`torch.DoubleTensor` of shape `(n, K)`): Logits before the temperature, by the same
            models.
        labels (`torch.LongTensor` of shape `(n,)`): Classes 0..K-1. Each class has images.
        num_sources (`torch.LongTensor` of shape `(K,)`): How many sources each class has.
        chosen (`dict[str, dict[str, float]]`): For the same, the parameters of these scores that suit unseen
            sources, such as a bandwidth, which a detector takes over.
        strangers (`torch.DoubleTensor` of shape `(m, K)`, *optional*):
            Logits of generated images by models that did not see their class, -inf in the columns of the
            classes left out. m may be 0.

    Raises:
        ValueError: the shapes don't agree, a class has no image, or a value is NaN or infinite.
    """

    open_set_scores: dict[str, Any]
    class_scores: Any
    labels: Any
    num_sources: Any
    strangers: Any = None
    chosen: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self):
        self.class_scores = as_double(self.class_scores)
        self.labels, self.num_sources = as_long(self.labels), as_long(self.num_sources)
        self.open_set_scores = {name: as_double(part) for name, part in self.open_set_scores.items()}
        if self.class_scores.ndim != 2:
            raise ValueError(f"class_scores must be (n, K); got {tuple(self.class_scores.shape)}")
        n, num_labels = self.class_scores.shape
        self.strangers = as_double(torch.empty(0, num_labels) if self.strangers is None else self.strangers)
        shapes = {"labels": (self.labels, (n,)), "num_sources": (self.num_sources, (num_labels,))}
        shapes |= {f"open_set_scores {name}": (x, (n,)) for name, x in self.open_set_scores.items()}
        shapes["strangers"] = self.strangers, (len(self.strangers), num_labels)
        for name, (part, shape) in shapes.items():
            if tuple(part.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape}, as class_scores have; got {tuple(part.shape)}"
                )
        for part in (self.class_scores, *self.open_set_scores.values(), self.strangers.softmax(dim=1)):
            if not part.isfinite().all():
                raise ValueError("cross-fitted scores contain NaN or infinite values")
        if self.labels.unique().tolist() != list(range(num_labels)):
            raise ValueError(
                f"every class 0..{num_labels - 1} needs cross-fitted images, and no other may have any; got "
                f"labels {self.labels.unique().tolist()}"
            )


def as_double(values: Any) -> torch.Tensor:
    return torch.as_tensor(values if isinstance(values, torch.Tensor) else np.asarray(values)).double().cpu()


def as_long(values: Any) -> torch.Tensor:
    return torch.as_tensor(values if isinstance(values, torch.Tensor) else np.asarray(values)).long().cpu()


def fit_temperature(class_scores: torch.Tensor, labels: torch.Tensor) -> float:
    """
    The number that class scores (n, K) are to be divided by, by the likelihood of the right classes (n,) (Guo
    et al. 2017). Classes count alike, however many images they have.
    """
    counts = labels.bincount(minlength=class_scores.shape[1])
    weights = 1 / counts[labels].double() / (counts > 0).sum()
    own = torch.arange(len(labels)), labels

    def loss(log_temperature: float) -> float:
        log_probabilities = (class_scores / math.exp(log_temperature)).log_softmax(dim=1)[own]
        return -(weights * log_probabilities).sum().item()

    try:  # where transformers doesn't look for what a checkpoint's code needs: loading doesn't
        from scipy.optimize import minimize_scalar
    except ImportError as error:
        raise ImportError("fitting a detector needs SciPy: pip install scipy") from error
    bounds = math.log(1e-3), math.log(1e3)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def relative(probabilities: torch.Tensor) -> torch.Tensor:
    """Class probabilities (n, K) over that of the likeliest class: what p-values of classes compare."""
    return probabilities / probabilities.amax(dim=1, keepdim=True)


def calibrate_classes(
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    num_sources: torch.Tensor | None = None,
    real: int | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """
    What p-values of classes compare with: for each class the sorted [`relative`] probabilities of that class
    for its own images; and the same of all images of generators with two sources or more, or `None` without
    `num_sources`.

    A class shows little of how it varies from source to source if it has one source, whose images can only be
    left out in groups, or two. So the p-value of a generator is the mean of that among its own images and of
    that among the generators'. Class `real` has many sources, and its own images alone.

    Args:
        probabilities, labels: (n, K) and (n,).
        num_sources (*optional*): (K,).
        real (`int`, *optional*): The place of the class of photographs.
    """
    own = relative(probabilities)[torch.arange(len(labels)), labels]
    classes = [own[labels == k].sort().values for k in range(probabilities.shape[1])]
    if num_sources is None:
        return classes, None
    varied = (num_sources[labels] >= 2) & (labels != (-1 if real is None else real))
    return classes, own[varied].sort().values if varied.any() else None


def conformal_p_values(calibration: torch.Tensor, scores: np.ndarray) -> np.ndarray:
    """(1 + #{calibration <= score}) / (m + 1), (n,), of sorted calibration scores (m,) and scores (n,)."""
    below = np.searchsorted(calibration.numpy(), scores, side="right")
    return (1 + below) / (len(calibration) + 1)


def upper_p_values(calibration: torch.Tensor, scores: np.ndarray) -> np.ndarray:
    """(1 + #{calibration >= score}) / (m + 1), (n,), of the same."""
    return conformal_p_values(-calibration.flip(0), -scores)


__all__ = ["REAL", "CrossFitted"]
