"""
What simple methods reach on the same splits: radial spectra with logistic regression, and a ResNet on pixels.
Where the data set has a split `cross`, known classes from sources that training does not see, the figures of
both stand side by side.

    python benchmarks/baselines.py [DATASET] [--only resnet] [--epochs 40]
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from protoleak import GaussianKDE, ProtoLeakImageProcessor
from protoleak.evaluation.predictions import Predictions
from protoleak.evaluation.protocol import TEST_SPLITS, evaluate_splits
from protoleak.evaluation.report import format_summary
from protoleak.evaluation.splits import load_splits
from protoleak.training.initialisation import class_names
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

HERE = Path(__file__).parent.parent


def load_pixels(
    name: str, wanted: tuple[str, ...] = ("train", "validation", *TEST_SPLITS, "unknown"), **crop: int
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray], list[str]]:
    """
    Native crops in [-1, 1], `crop_size` a side and perhaps `num_crops` an image, and labels, -1 for unknown
    generators, of the wanted splits that there are; and the label names.
    """
    splits = load_splits(name)
    names = class_names(splits["train"]["label"])
    index = {n: k for k, n in enumerate(names)}
    processor = ProtoLeakImageProcessor(do_resize=False, **crop)
    pixels, labels = {}, {}
    for split in (s for s in wanted if s in splits):
        images = [image["bytes"] or image["path"] for image in splits[split]["image"]]
        pixels[split] = processor(images)["pixel_values"]
        labels[split] = np.array([index.get(n, -1) for n in splits[split]["label"]])
    return pixels, labels, names


def radial_spectra(pixels: torch.Tensor, batch_size: int = 64) -> np.ndarray:
    """
    Log power of each colour channel in rings of the spectrum, and its mean colour. (N, 3, S, S) -> (N, 3 S /
    2 + 3)
    """
    side = pixels.shape[-1]
    y, x = torch.meshgrid(*[torch.arange(side) - side // 2] * 2, indexing="ij")
    rings = (x**2 + y**2).sqrt().round().long().clamp(max=side // 2)
    masks = torch.stack([(rings == r).float() / (rings == r).sum() for r in range(1, side // 2 + 1)])
    masks = torch.fft.ifftshift(masks, (1, 2))
    parts = []
    for batch in pixels.split(batch_size):
        means = batch.mean(dim=(2, 3))
        power = torch.fft.fft2(batch - means[..., None, None]).abs().square()
        log_power = (torch.einsum("nchw,rhw->ncr", power, masks) + 1e-6).log()
        parts.append(torch.cat([log_power.flatten(1), means], dim=1))
    return torch.cat(parts).numpy()


def spectra_predictions(pixels, labels) -> dict[str, Predictions]:
    """Logistic regression on radial spectra, its strength chosen on train."""
    return linear_predictions({split: radial_spectra(p) for split, p in pixels.items()}, labels)


def linear_predictions(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray], fitted_on: tuple[str, ...] = ("train",)
) -> dict[str, Predictions]:
    """Logistic regression on features (N, F) of each split; open-set score: KDE of them, standardised."""
    known, targets = (np.concatenate([part[split] for split in fitted_on]) for part in (features, labels))
    classifier = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(Cs=8, max_iter=3000, l1_ratios=(0,), use_legacy_attributes=False),
    )
    classifier.fit(known, targets)
    scaled = {split: classifier[0].transform(f) for split, f in features.items()}
    kde = GaussianKDE().fit(classifier[0].transform(known))
    return {
        s: Predictions(f, classifier.predict_proba(f), labels[s], kde.score_samples(scaled[s]))
        for s, f in features.items()
    }


def pixel_resnet_predictions(
    pixels, labels, num_labels: int, epochs: int = 40, seed: int = 0
) -> dict[str, Predictions]:
    """
    A ResNet of the network's size on pixels, cross-entropy, best validation loss; open-set score: KDE of its
    features.
    """
    set_seed(seed)
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 96], "depths": [1, 1, 1]}
    config = ResNetConfig(num_labels=num_labels, layer_type="basic", **sizes)
    model = ResNetForImageClassification(config)
    print(f"ResNet on pixels: {sum(p.numel() for p in model.parameters()):,} parameters")
    fit_pixel_resnet(model, pixels, labels, epochs)
    outputs = {split: _infer(model, p) for split, p in pixels.items()}
    kde = GaussianKDE().fit(outputs["train"][0])
    return {
        s: Predictions(f.numpy(), logits.double().softmax(1).numpy(), labels[s], kde.score_samples(f))
        for s, (f, logits) in outputs.items()
    }


def fit_pixel_resnet(model, pixels, labels, epochs: int) -> None:
    """Train in place; the weights at the end are those with the lowest validation loss."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4)
    loader = DataLoader(TensorDataset(pixels["train"], torch.from_numpy(labels["train"])), 64, shuffle=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * len(loader))
    best, best_weights = np.inf, None
    for _ in tqdm(range(epochs), desc="ResNet on pixels", disable=not sys.stderr.isatty()):
        model.train()
        for images, targets in loader:
            flipped = images.flip(-1) if torch.rand(()) < 0.5 else images
            model(flipped, labels=targets).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        logits = _infer(model, pixels["validation"])[1]
        loss = float(nn.functional.cross_entropy(logits, torch.from_numpy(labels["validation"])))
        if loss < best:
            best, best_weights = loss, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_weights)


@torch.inference_mode()
def _infer(model, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    features = torch.cat([model.resnet(batch).pooler_output.flatten(1) for batch in pixels.split(64)])
    return features, model.classifier(features[..., None, None])


def main() -> None:
    parser = argparse.ArgumentParser(description="Simple methods on the same splits.")
    parser.add_argument("dataset", nargs="?", default=str(HERE / "leakzoo"), help="what `load_dataset` takes")
    parser.add_argument("--only", nargs="+", choices=("spectra", "resnet"), default=("spectra", "resnet"))
    parser.add_argument("--epochs", type=int, default=40, help="of the ResNet")
    arguments = parser.parse_args()
    crop_size = 64 if "leakzoo" in arguments.dataset else 256
    pixels, labels, names = load_pixels(arguments.dataset, crop_size=crop_size)
    if "spectra" in arguments.only:
        print("radial spectra, logistic regression")
        print(format_summary(evaluate_splits(spectra_predictions(pixels, labels), names)), flush=True)
    if "resnet" in arguments.only:
        print(f"ResNet on pixels, {arguments.epochs} epochs")
        predictions = pixel_resnet_predictions(pixels, labels, len(names), arguments.epochs)
        print(format_summary(evaluate_splits(predictions, names)), flush=True)


if __name__ == "__main__":
    main()
