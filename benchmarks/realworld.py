"""
Images by real generators: the method with the bundled VAE and with another, beside a baseline on pixels.

    python benchmarks/realworld.py PATH [--vae HUB_ID_OR_FOLDER] [any argument of train.py]

PATH is any data set that train.py takes, of images of at least 256 pixels a side. The baseline is fitted on
its train and validation splits; Proto-LeakNet on the same images, but for a tenth of them, whole groups
(`group`, where there is such a column), which it stops and calibrates by. The other VAE is by default the
encoder in PATH/../taef2, where there is one, a tiny autoencoder distilled from FLUX.2's, for measuring alone;
in the end both models are asked together.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.density_protoleak import OpenSetDetector
from protoleak.evaluation.predictions import Predictions, predict_splits
from protoleak.evaluation.protocol import Evaluation, SplitEvaluation, evaluate_predictions
from protoleak.evaluation.report import format_report, format_summary
from protoleak.evaluation.splits import groups_of, load_splits
from protoleak.scores_protoleak import OPEN_SET_SCORES
from protoleak.train import TrainingArguments, train
from safetensors.torch import load_file
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import normalize
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parent))
from baselines import linear_predictions, load_pixels, radial_spectra

BUNDLED = "bundled"
DEFAULTS = "--crop_size 128 --num_crops 4 --orientations 1 --augmented_views 0"


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


def join(path: str, folder: str) -> None:
    """Train and validation in one, a tenth of which, whole groups, is the validation split that is left."""
    splits = load_splits(path)
    rows = datasets.concatenate_datasets([splits["train"], splits["validation"]])
    groups = groups_of(rows)
    groups = np.arange(len(rows)) if groups is None else groups
    folds = StratifiedGroupKFold(10, shuffle=True, random_state=0)
    training, held_out = next(folds.split(groups, rows["label"], groups))
    splits |= {"train": rows.select(training), "validation": rows.select(held_out)}
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


def baseline(path: str) -> SplitEvaluation:
    """Radial spectra and block DCT of pixels, logistic regression; open-set score: KDE of its features."""
    pixels, labels, names = load_pixels(path, crop_size=256)
    features = {s: np.hstack([radial_spectra(p), block_dct(p)]) for s, p in pixels.items()}
    parts = linear_predictions(features, labels, ("train", "validation"))
    return evaluate_predictions(parts["test"], parts.get("unknown"), names)


def measure(
    data: str, encoder: nn.Module | None, words: list[str]
) -> tuple[dict, dict[str, Predictions], OpenSetDetector]:
    """Train on `data`: the summary, predictions of the test and unknown images, and the detector."""
    arguments = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)[0]
    summary = train(arguments, vae=encoder)
    model = ProtoLeakForImageAttribution.from_pretrained(arguments.output_dir, vae=encoder)
    processor = ProtoLeakImageProcessor.from_pretrained(arguments.output_dir)
    rows = {split: part for split, part in load_splits(data).items() if split in ("test", "unknown")}
    return summary, predict_splits(model, processor, rows, Accelerator()), model.detector


def together(
    models: list[dict[str, Predictions]], detectors: list[OpenSetDetector], names: list[str]
) -> SplitEvaluation:
    """
    Two models asked together: class probabilities are the geometric mean of theirs, and the open-set score is
    the config's, of their embeddings side by side, each of unit length.
    """

    def side_by_side(parts: list) -> np.ndarray:
        return np.hstack([normalize(part) for part in parts])

    known = side_by_side([detector.train_["embeddings"] for detector in detectors])
    name = detectors[0].open_set_scores["embeddings"]
    score = OPEN_SET_SCORES[name]().fit(known, detectors[0].train_["labels"])
    joined = {}
    for split in models[0]:
        one, other = (predictions[split] for predictions in models)
        embeddings = side_by_side([one.embeddings, other.embeddings])
        probabilities = np.sqrt(one.probabilities * other.probabilities)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        joined[split] = Predictions(embeddings, probabilities, one.labels, score.score_samples(embeddings))
    return evaluate_predictions(joined["test"], joined.get("unknown"), names)


def encoders(path: str, words: list[str]) -> tuple[dict[str, nn.Module | None], list[str]]:
    """The VAEs to look through, `None` for one that a checkpoint loads; and the words without --vae."""
    taef2 = Path(path).resolve().parent / "taef2"
    if "--vae" in words:
        place = words.index("--vae")
        return {BUNDLED: None, words[place + 1]: None}, words[:place] + words[place + 2 :]
    return {BUNDLED: None} | ({str(taef2): Taef2Encoder.load(taef2)} if taef2.is_dir() else {}), words


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    path = sys.argv[1]
    vaes, words = encoders(path, sys.argv[2:])
    print("radial spectra and block DCT of pixels, logistic regression on train and validation")
    print(format_summary({"test": baseline(path)}), flush=True)
    runs = []
    with tempfile.TemporaryDirectory() as data:
        join(path, data)
        for name, encoder in vaes.items():
            own = ["--output_dir", f"runs/realworld/{Path(name).name}", "--dataset_name", data]
            own += [] if name == BUNDLED else ["--vae_name_or_path", name]
            summary, *rest = measure(data, encoder, [*own, *DEFAULTS.split(), *words])
            evaluation = Evaluation.from_dict(summary)
            runs.append((evaluation.labels, *rest))
            print(f"\nProto-LeakNet, VAE {name}: {summary['epochs']} epochs, {summary['seconds']['total']} s")
            print(format_report(evaluation), flush=True)
    if len(runs) == 2:
        labels, models, detectors = zip(*runs, strict=True)
        print("\nboth asked together")
        print(format_summary({"test": together(models, detectors, labels[0])}))


if __name__ == "__main__":
    main()
