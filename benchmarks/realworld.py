"""
Images by real generators: the method with the bundled VAE, or another, beside a baseline on pixels.

    python benchmarks/realworld.py PATH [--vae taef2 | both | HUB_ID_OR_FOLDER] [any argument of train.py]

PATH is any data set that train.py takes, of images of at least 256 pixels a side. The baseline is fitted on
its train and validation splits; Proto-LeakNet on the same images, but for a tenth of them, whole groups
(`group`, where there is such a column), which it stops and calibrates by. "taef2" is the encoder in
PATH/../taef2, a tiny autoencoder distilled from FLUX.2's, for measuring alone; "both" is its latents beside
those of the bundled VAE.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import protoleak.train
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from protoleak.data_protoleak import groups_of, load_splits
from protoleak.evaluation_protoleak import format_report, format_summary, summarize
from protoleak.modeling_protoleak import load_autoencoder
from protoleak.train import TrainingArguments, train
from safetensors.torch import load_file
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parent))
from baselines import linear_predictions, load_pixels, radial_spectra

HERE = Path(__file__).parent.parent
DEFAULTS = "--output_dir runs/realworld --crop_size 128 --num_crops 4 --orientations 2 --augmented_views 0"


class Taef2Block(nn.Module):
    """relu(three convolutions (x) + x), the input first added to what 256 pooled channels make of it."""

    def __init__(self, pooled: bool, width: int = 64):
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        self.pool = None
        if pooled:
            first, last = nn.Conv2d(width, 256, 1, bias=False), nn.Conv2d(256, width, 1, bias=False)
            self.pool = nn.Sequential(first, nn.GroupNorm(4, 256), nn.ReLU(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Taef2Encoder(ModelMixin, ConfigMixin):
    """TAEF2's encoder, as the README beside its weights tells it."""

    @register_to_config
    def __init__(self, latent_channels: int = 32, scaling_factor: float = 1.0, block_out_channels=(64,) * 4):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), Taef2Block(False)]
        for pooled in (False, False, True):
            layers.append(nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False))
            layers += [Taef2Block(pooled) for _ in range(3)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, latent_channels, 3, padding=1))

    @classmethod
    def load(cls, folder: Path) -> "Taef2Encoder":
        encoder = cls()
        weights = load_file(folder / "encoder.safetensors")
        encoder.layers.load_state_dict({name: weight.float() for name, weight in weights.items()})
        return encoder.eval()

    def encode(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """(N, 3, H, W) in [-1, 1] -> latents (N, 32, H / 8, W / 8)"""
        return SimpleNamespace(latents=self.layers(pixel_values / 2 + 0.5))


class BothEncoders(ModelMixin, ConfigMixin):
    """The bundled VAE's latents, and TAEF2's brought to their grid, as the channels of one."""

    @register_to_config
    def __init__(self, latent_channels: int = 80, scaling_factor: float = 1.0, block_out_channels=(64,) * 3):
        super().__init__()
        self.bundled, self.taef2 = load_autoencoder(HERE, "vae"), Taef2Encoder()

    @classmethod
    def load(cls, folder: Path) -> "BothEncoders":
        encoders = cls()
        encoders.taef2 = Taef2Encoder.load(folder)
        return encoders.eval()

    def encode(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """(N, 3, H, W) in [-1, 1] -> latents (N, 80, H / 4, W / 4)"""
        fine, coarse = self.bundled.encode(pixel_values).latent, self.taef2.encode(pixel_values).latents
        return SimpleNamespace(latents=torch.cat([fine, F.interpolate(coarse, fine.shape[-2:])], dim=1))


def join(path: str, folder: str) -> None:
    """Train and validation made one, a tenth of which, whole groups, is the validation split that is left."""
    splits = load_splits(path)
    rows = datasets.concatenate_datasets([splits["train"], splits["validation"]])
    groups = groups_of(rows)
    groups = np.arange(len(rows)) if groups is None else groups
    folds = StratifiedGroupKFold(10, shuffle=True, random_state=0)
    kept, held_out = next(folds.split(groups, rows["label"], groups))
    splits |= {"train": rows.select(kept), "validation": rows.select(held_out)}
    for split, part in splits.items():
        part.cast_column("image", datasets.Image()).to_parquet(f"{folder}/{split}.parquet")


def block_dct(pixels: torch.Tensor, size: int = 8) -> np.ndarray:
    """Log standard deviation of every coefficient of the luminance's block DCT. (N, 3, H, W) -> (N, 64)"""
    place = torch.arange(size, dtype=torch.float32)
    basis = torch.cos((2 * place + 1) * place[:, None] * torch.pi / (2 * size)) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    filters = torch.einsum("ai,bj->abij", basis, basis).reshape(size * size, 1, size, size)
    return F.conv2d(grey, filters, stride=size).flatten(2).std(dim=2).add(1e-6).log().numpy()


def baseline(path: str) -> dict:
    """Radial spectra and block DCT of pixels, logistic regression; open-set score: KDE of its features."""
    pixels, labels, names = load_pixels(path, 256)
    features = {s: np.hstack([radial_spectra(p), block_dct(p)]) for s, p in pixels.items()}
    made = linear_predictions(features, labels, ("train", "validation"))
    return summarize(made["test"], made.get("unknown"), names)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    path, *rest = sys.argv[1:]
    if "--vae" in rest:
        place = rest.index("--vae")
        name = rest[place + 1]
        rest[place : place + 2] = ["--vae_name_or_path", name]
        if kind := {"taef2": Taef2Encoder, "both": BothEncoders}.get(name):
            encoder = kind.load(Path(path).resolve().parent / "taef2")
            protoleak.train.load_autoencoder = lambda name, subfolder: encoder
    print("radial spectra and block DCT of pixels, logistic regression on train and validation")
    print(format_summary(baseline(path)))
    with tempfile.TemporaryDirectory() as folder:
        join(path, folder)
        words = ["--dataset_name", folder, *DEFAULTS.split(), *rest]
        summary = train(HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)[0])
    print(f"\nProto-LeakNet, {summary['epochs']} epochs, {summary['seconds']['total']} s")
    print(format_report(summary))


if __name__ == "__main__":
    main()
