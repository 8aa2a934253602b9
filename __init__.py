"""Proto-LeakNet: which generator made this image, or was it one nobody has seen, or a camera?"""

import importlib

_MODULES = {
    "configuration_protoleak": ["ProtoLeakConfig"],
    "image_processing_protoleak": ["ProtoLeakImageProcessor"],
    "calibration_protoleak": ["CrossFitted"],
    "density_protoleak": ["GaussianKDE", "OpenSetDetector"],
    "modeling_protoleak": ["ProtoLeakForImageAttribution", "ProtoLeakModel"],
    "pipeline_protoleak": ["ImageAttributionPipeline", "ProtoLeakDiffusionPipeline"],
}
_OWNERS = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_OWNERS)


def __getattr__(name: str):
    """Load a name's module on first use: `import protoleak` itself costs nothing."""
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(f".{_OWNERS[name]}", __name__), name)
