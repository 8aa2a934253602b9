"""
Proto-LeakNet: which generator made this image, or was it one nobody has seen, or a camera?

Importing it tells transformers of config, models, image processor and pipeline, so that the Auto classes and
`pipeline("image-attribution")` load checkpoints with the installed code, without `trust_remote_code`.
"""

import sys

from .interruption import end_with_a_word, is_command

if is_command():
    sys.excepthook = end_with_a_word  # also while what follows is imported, which takes seconds

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from .calibration_protoleak import CrossFitted
from .configuration_protoleak import ProtoLeakConfig
from .density_protoleak import OpenSetDetector
from .diffusion_protoleak import ProtoLeakDiffusionPipeline
from .image_processing_protoleak import ProtoLeakImageProcessor
from .modeling_protoleak import ProtoLeakForImageAttribution, ProtoLeakModel
from .pipeline_protoleak import ImageAttributionPipeline
from .scores_protoleak import GaussianKDE

__version__ = "0.1.0"

AutoConfig.register(ProtoLeakConfig.model_type, ProtoLeakConfig)
AutoModel.register(ProtoLeakConfig, ProtoLeakModel)
AutoModelForImageClassification.register(ProtoLeakConfig, ProtoLeakForImageAttribution)
AutoImageProcessor.register(ProtoLeakConfig, image_processor_classes={"pil": ProtoLeakImageProcessor})

__all__ = [
    "CrossFitted",
    "GaussianKDE",
    "ImageAttributionPipeline",
    "OpenSetDetector",
    "ProtoLeakConfig",
    "ProtoLeakDiffusionPipeline",
    "ProtoLeakForImageAttribution",
    "ProtoLeakImageProcessor",
    "ProtoLeakModel",
]
