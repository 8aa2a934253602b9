"""The network as one graph, by `torch.export`: ONNX for runtimes without Python (extra `onnx`)."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files_protoleak import write_whole

PARTS = ("network", "whole")
OUTPUTS = ("logits", "embeddings", "statistics")


class Graph(nn.Module):
    """
    A model up to its open-set verdict, with one input, `pixel_values`, `latents` or `features`: of `OUTPUTS`
    those that the model has.
    """

    def __init__(self, model: Any, name: str):
        super().__init__()
        self.model, self.name = model, name
        self.vae = model.vae  # of which the model is not the owner

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model.classify(**{self.name: inputs})
        return tuple(output[name] for name in OUTPUTS if output.get(name) is not None)


def export_onnx(model: Any, crop_size: int, path: str | Path, part: str = "whole") -> Path:
    """
    Write an ONNX file, its batch size left open, with the noise of evaluation inside; beside it `NAME.json`
    with labels and image size. Open-set verdicts need the detector, which stays in `density.pkl`: it takes
    the graph's `embeddings` or `statistics`.

    Args:
        model ([`ProtoLeakForImageAttribution`]): With its VAE.
        crop_size (`int`): Side of the images in pixels, as the image processor makes them.
        path: Of the file.
        part (`str`): `"whole"`, from `pixel_values` (N, 3, S, S) on, or `"network"`, from `latents`
            (N, C, H, W) or, with `pooling="texture"`, from pooled `features` (N, scales, timesteps, F).

    Raises:
        ValueError: no such part, or the whole with `pooling="texture"`.
        ImportError: onnx and onnxscript are missing.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {PARTS}; got {part!r}")
    if part == "whole" and model.takes_features:
        raise ValueError(
            'with pooling="texture" the whole can\'t be exported: the Cholesky factors of covariances have '
            "no ONNX operator. Export what comes after, from pooled features on, by --part network"
        )
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("exporting needs onnx and onnxscript; pip install 'protoleak[onnx]'") from error
    path, model = Path(path), model.eval()
    with torch.no_grad():
        name, inputs = _example(model, torch.zeros(2, 3, crop_size, crop_size), part)
        # draws this size's noise of evaluation, which the graph holds
        example = model(**{name: inputs}, return_dict=True)
        outputs = [output for output in OUTPUTS if example.get(output) is not None]
        program = torch.onnx.export(
            Graph(model, name).eval(),
            (inputs,),
            input_names=[name],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: program.save(str(partial), external_data=False))
    facts = {"labels": model.config.label_names, "input": name, "shape": ["batch", *inputs.shape[1:]]}
    path.with_name(path.name + ".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return path


def _example(model: Any, pixel_values: torch.Tensor, part: str) -> tuple[str, torch.Tensor]:
    """The name of a part's input, and what it is of some images."""
    if part == "whole":
        return "pixel_values", pixel_values
    if model.takes_features:
        return "features", model(pixel_values=pixel_values, return_dict=True).features
    return "latents", model.protoleak.encode(pixel_values)[0]
