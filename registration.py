"""What `import protoleak` gives: the public classes, of which transformers is told."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from .calibration_protoleak import CrossFitted
from .configuration_protoleak import ProtoLeakConfig
from .density_protoleak import OpenSetDetector
from .diffusion_protoleak import ProtoLeakDiffusionPipeline
from .image_processing_protoleak import ProtoLeakImageProcessor
from .modeling_protoleak import ProtoLeakForImageAttribution, ProtoLeakModel
from .pipeline_protoleak import ImageAttributionPipeline
from .scores_protoleak import GaussianKDE

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
