"""
Why an image got its scores, as plain values: the nearest prototypes with training images near them, what each
dimension of the embedding contributes, and the image's place among known ones.

The `model` of every function is a `ProtoLeakForImageAttribution`.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from .calibration_protoleak import REAL
from .image_processing_protoleak import thumbnail


def explain(
    model: Any,
    output: Any,
    num_prototypes: int = 3,
    crop_boxes: Sequence[Sequence[tuple[int, int, int, int]]] | None = None,
) -> list[dict[str, Any]]:
    """
    Why each image of an output got its scores.

    Args:
        output (`ImageAttributionOutput`): What the model gave, with the dimension of images.
        num_prototypes (`int`): How many of the nearest prototypes are told.
        crop_boxes (*optional*): For each image what its crops show, see
            [`~ProtoLeakImageProcessor.crop_boxes`].

    Returns:
        For each image a `dict` with
        - prototypes: the nearest, each with `label`, `prototype` (its place in the class), `distance`, and
          `examples`, the training images nearest to it (`index`, `label`), where a detector is fitted;
        - contributions: see [`contributions`];
        - timesteps: `scale`, `timestep` and `weight` of each;
        - open_set: see [`place_among_known`];
        - crops: see [`crops_of`]; `None` without `crop_boxes`;
        - embedding: h.
    """
    distances = model.head.distances(output.embeddings, output.gates)  # (B, K, M)
    examples = {} if model.detector is None else prototype_examples(model)
    reasons = []
    for i in range(len(distances)):
        weights = output.temporal_weights[i].tolist()
        steps = zip(product(model.config.scales, model.config.timesteps), weights, strict=True)
        reasons.append(
            {
                "prototypes": nearest_prototypes(model, distances[i], examples, num_prototypes),
                "contributions": contributions(model, output, i),
                "timesteps": [{"scale": s, "timestep": t, "weight": weight} for (s, t), weight in steps],
                "open_set": place_among_known(model, output, i),
                "crops": None if crop_boxes is None else crops_of(model, output, i, crop_boxes[i]),
                "embedding": output.embeddings[i].float().tolist(),
            }
        )
    return reasons


def nearest_prototypes(
    model: Any, distances: torch.Tensor, examples: dict[tuple[int, int], list], count: int
) -> list[dict[str, Any]]:
    """The nearest of an image's distances (K, M), each with its [`prototype_examples`]."""
    names, rows = model.config.label_names, []
    for place in distances.flatten().argsort()[:count].tolist():
        k, m = divmod(place, distances.shape[1])
        row = {"label": names[k], "prototype": m, "distance": distances[k, m].item()}
        rows.append(row | {"examples": examples.get((k, m), [])})
    return rows


def contributions(model: Any, output: Any, i: int) -> dict[str, Any] | None:
    """
    What makes the difference of image i's logits of the `first` and the `second` class: `dimensions`, one
    value for each of the embedding, from w_d (h_d - p_d)^2, and `sharing`, how evenly each class's prototypes
    share the image. They add up to `difference`. `None` for a model of one class.

    tau logsumexp_m(-d_m / tau) = -sum_m r_m d_m + tau H(r) with r = softmax(-d / tau), and d_m is a sum over
    dimensions: a class score is a sum over dimensions and one more term, exactly.
    """
    logits = output.logits[i]
    if len(logits) < 2:
        return None
    embedding, gate = output.embeddings[i].float(), output.gates[i].float()
    temperature = 1.0 if model.detector is None else model.detector.temperature_
    order = logits.argsort(descending=True)[:2]
    tau = model.head.temperature
    parts = gate * (embedding - model.head.prototypes[order].float()).square()  # (2, M, D)
    log_shares = (-parts.sum(dim=2) / tau).log_softmax(dim=1)  # (2, M)
    shares = log_shares.exp()
    of_dimensions = -(shares[..., None] * parts).sum(dim=1) / temperature  # (2, D)
    of_sharing = -tau * (shares * log_shares).sum(dim=1) / temperature  # (2,)
    names = [model.config.label_names[k] for k in order.tolist()]
    return {
        "first": names[0],
        "second": names[1],
        "difference": (logits[order[0]] - logits[order[1]]).item(),
        "dimensions": (of_dimensions[0] - of_dimensions[1]).tolist(),
        "sharing": (of_sharing[0] - of_sharing[1]).item(),
    }


def place_among_known(model: Any, output: Any, i: int) -> dict[str, Any] | None:
    """
    Image i's `open_set_score`, the `threshold` at `alpha` below which it would be called unknown, and `rank`,
    the share of the `count` calibration images that score lower. `None` without a detector.
    """
    if model.detector is None:
        return None
    label, score = output.logits[i].argmax().item(), output.open_set_score[i].item()
    calibration = model.detector.calibration_of(label)
    return {
        "open_set_score": score,
        "threshold": model.detector.threshold(model.config.alpha, label),
        "alpha": model.config.alpha,
        "rank": (calibration < score).double().mean().item(),
        "count": len(calibration),
    }


def crops_of(
    model: Any, output: Any, i: int, boxes: Sequence[tuple[int, int, int, int]]
) -> list[dict[str, Any]]:
    """
    For each crop of image i where it lies (`x`, `y`, `width`, `height`, in pixels of the image as stored),
    its `weight`, the share of the evidence that it has, the likeliest class of it alone (`label`) with its
    probability (`score`), and the probability of "real" (`real_score`, `None` without such a class). A crop
    of weight 0 was passed over: what it says means nothing.
    """
    logits, weights = output.logits[i][None], torch.ones(1)
    if output.get("crop_logits") is not None:  # an image has these with several crops; fillers come last
        logits, weights = output["crop_logits"][i], output["crop_weights"][i]
    names = model.config.label_names
    crops = []
    for box, weight, row in zip(boxes, weights.tolist(), logits.double().softmax(dim=1), strict=False):
        likeliest = int(row.argmax())
        crop = dict(zip(("x", "y", "width", "height"), box, strict=True))
        crop |= {"weight": weight, "label": names[likeliest], "score": row[likeliest].item()}
        crops.append(crop | {"real_score": row[names.index(REAL)].item() if REAL in names else None})
    return crops


def prototype_examples(model: Any, count: int = 3) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """
    For each class k and prototype m the training images nearest to it, each seen through its own gates:
    `index` in the detector's training images, `label`, and `origin`, where it comes from, if that was kept.
    Prototypes that enrolling left unused have none.

    Raises:
        ValueError: the model has no detector, so its training images are not known.
    """
    if model.detector is None:
        raise ValueError("this model has no detector, so its training images are not known; run train.py")
    known, names = model.detector.train_, model.config.label_names
    embeddings, gates = (known[name].to(model.device) for name in ("embeddings", "gates"))
    distances = model.head.distances(embeddings, gates)
    examples = {}
    for k, m in model.head.in_use().nonzero().tolist():
        nearest = distances[:, k, m].argsort()[:count].tolist()
        examples[k, m] = [
            {"index": n, "label": names[int(known["labels"][n])], "origin": model.detector.origins_.get(n)}
            for n in nearest
        ]
    return examples


def keep_origins(model: Any, tell_origin: Callable[[int], str]) -> None:
    """
    Keep where the training images nearest to each prototype come from with the detector.

    Args:
        tell_origin (`Callable`): From an image's place among the detector's training images, as it was given
            to `fit_detector`, to a few words.
    """
    nearest = (row["index"] for rows in prototype_examples(model).values() for row in rows)
    model.detector.origins_ = {index: tell_origin(index) for index in nearest}


def keep_thumbnails(
    model: Any, open_training_image: Callable[[int], Any], max_bytes: int = 1_000_000
) -> None:
    """
    Keep small pictures of the training images nearest to each prototype with the detector.

    Args:
        open_training_image (`Callable`): From an image's place among the detector's training images, as it
            was given to `fit_detector`, to the image, or `None`: then the picture that is there stays.
        max_bytes (`int`): Of all together; the nearest come first.
    """
    examples = prototype_examples(model).values()
    nearest_first = [row["index"] for rank in zip(*examples, strict=False) for row in rank]
    thumbnails: dict[int, bytes] = {}
    room = max_bytes
    for index in dict.fromkeys(nearest_first):
        image = open_training_image(index)
        content = model.detector.thumbnails_.get(index) if image is None else thumbnail(image)
        if content is not None and len(content) <= room:
            thumbnails[index] = content
            room -= len(content)
    model.detector.thumbnails_ = thumbnails
