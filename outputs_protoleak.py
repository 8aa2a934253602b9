"""What the models give."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class ProtoLeakModelOutput(ModelOutput):
    """
    Args:
        embeddings (`torch.FloatTensor` of shape `(batch_size, embedding_size)`): h, attended over timesteps.
        gates (`torch.FloatTensor` of shape `(batch_size, embedding_size)`): w in (0, 1), attended alike.
        temporal_weights (`torch.FloatTensor` of shape `(batch_size, num_scales * num_timesteps)`): alpha, by
            scale, then timestep; each row sums to 1.
        statistics (`torch.FloatTensor` of shape `(batch_size, num_statistics)`, *optional*):
            [`grid_statistics`] of the re-simulated latents, attended alike; not with `pooling="texture"`.
        noisy_latents (`(batch_size, num_timesteps, channels, height, width)`, *optional*): z_t at the first
            scale, with `output_noisy_latents=True`; crops, if any, after the first dimension.
        features (`torch.FloatTensor` of shape `(batch_size, num_scales, num_timesteps, num_features)`):
            What [`LeakEncoder.pool`] gives, averaged over crops by their weights.
        crop_weights (`torch.FloatTensor` of shape `(batch_size, num_crops)`, *optional*): The crops' shares
            in that average, with several crops an image, and
        crop_features (`(batch_size, num_crops, num_scales, num_timesteps, num_features)`): those of each.
    """

    embeddings: torch.FloatTensor | None = None
    gates: torch.FloatTensor | None = None
    temporal_weights: torch.FloatTensor | None = None
    statistics: torch.FloatTensor | None = None
    noisy_latents: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    crop_weights: torch.FloatTensor | None = None
    crop_features: torch.FloatTensor | None = None


@dataclass
class ImageAttributionOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): With `labels`.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            Class scores of the prototypes; in evaluation over the detector's temperature, if there is one.
        open_set_score (`torch.DoubleTensor` of shape `(batch_size,)`, *optional*):
            How much like the known it is, by the config's `open_set_scores`, once a detector is fitted.
        p_values, generated_p_values (`torch.DoubleTensor` of shape `(batch_size,)`, *optional*):
            Conformal p of "made by a known class", and of "made by a generator, known or not".
        class_p_values (`torch.DoubleTensor` of shape `(batch_size, num_labels)`, *optional*):
            Label-conditional conformal p of each class.
        crop_logits (`torch.FloatTensor` of shape `(batch_size, num_crops, num_labels)`, *optional*): Class
            scores of each crop alone, like `logits`, with several crops an image.
        Others: As in [`ProtoLeakModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    open_set_score: torch.Tensor | None = None
    p_values: torch.Tensor | None = None
    class_p_values: torch.Tensor | None = None
    generated_p_values: torch.Tensor | None = None
    embeddings: torch.FloatTensor | None = None
    gates: torch.FloatTensor | None = None
    temporal_weights: torch.FloatTensor | None = None
    statistics: torch.FloatTensor | None = None
    noisy_latents: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    crop_weights: torch.FloatTensor | None = None
    crop_features: torch.FloatTensor | None = None
    crop_logits: torch.FloatTensor | None = None
