"""
What each part of the method is worth: the bundled recipe against itself with one thing changed.

    python benchmarks/ablation.py [--dataset NAME] [--epochs N] [--seeds N] [--only WORDS]

Mean over seeds, from the lowest to the highest in brackets. --only takes variants whose name has these words.
--augmented_views is train.py's, here 0 unless it is given: that halves the time.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import protoleak.modeling_protoleak
import protoleak.train
import torch
from datasets import DatasetDict
from protoleak.data_protoleak import load_splits
from protoleak.modeling_protoleak import FeatureGate, ProtoLeakModel, TemporalAttention
from protoleak.train import TrainingArguments, train

HERE = Path(__file__).parent.parent


def evaluation_noise(model: ProtoLeakModel, latents: torch.Tensor) -> torch.Tensor:
    return model.evaluation_noise(latents.shape[1:]).to(latents)


def no_weights(attention: TemporalAttention, embeddings: torch.Tensor) -> torch.Tensor:
    return torch.full_like(embeddings[..., 0], 1 / embeddings.shape[1])


def random_weights(attention: TemporalAttention, embeddings: torch.Tensor) -> torch.Tensor:
    """As in the released code, where the layer is neither trained nor saved."""
    size = embeddings.shape[-1]
    query = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(embeddings)
    return (embeddings @ query / size**0.5).softmax(dim=1)


def no_gate(gate: FeatureGate, embeddings: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(embeddings)


def nothing(latents: torch.Tensor) -> torch.Tensor:
    """Zeros for [`partial_correlations`], so that the network keeps its shape."""
    channels = latents.shape[1]
    return latents.new_zeros(len(latents), channels + channels * (channels - 1) // 2)


def shuffled(name: list[str], seed: int) -> DatasetDict:
    """The control: training and validation images with one another's labels."""
    splits = load_splits(name, seed)
    for split in ("train", "validation"):
        labels = np.random.default_rng(seed).permutation(splits[split]["label"])
        splits[split] = splits[split].remove_columns("label").add_column("label", labels.tolist())
    return splits


def backbone(width: int, depth: int = 1) -> dict:
    values = {"model_type": "resnet", "embedding_size": width, "hidden_sizes": [width], "depths": [depth]}
    return {"backbone_config": values | {"layer_type": "basic"}}


# name: (fields of the config, of the training arguments, and methods that are replaced)
Variant = tuple[dict, dict, list[tuple[Any, str, Callable]]]
VARIANTS: dict[str, Variant] = {
    "the bundled recipe": ({}, {}, []),
    "control: labels shuffled": ({}, {}, [(protoleak.train, "load_splits", shuffled)]),
    "latents not whitened": ({"latent_whitening": False}, {}, []),
    "contrast not normalised": ({"contrast_normalization": False}, {}, []),
    "a random start, learning rate 1e-3": (
        {}, {"learning_rate": 1e-3}, [(protoleak.train, "begin_as_discriminant", lambda *_: None)],
    ),
    "no partial correlations": ({}, {}, [(protoleak.modeling_protoleak, "partial_correlations", nothing)]),
    "t = 0 alone": ({"timesteps": [0]}, {}, []),
    "t = 0, 50, 150, 300": ({"timesteps": [0, 50, 150, 300]}, {}, []),
    "z_t divided by sigma_t, t = 25, 50": ({"timesteps": [25, 50], "sigma_normalization": True}, {}, []),
    "t = 25, 50": ({"timesteps": [25, 50]}, {}, []),
    "linear betas": ({"beta_schedule": "linear"}, {}, []),
    "one draw of the noise in training": ({}, {}, [(ProtoLeakModel, "_noise", evaluation_noise)]),
    "mean over timesteps": ({}, {}, [(TemporalAttention, "forward", no_weights)]),
    "temporal attention not trained": ({}, {}, [(TemporalAttention, "forward", random_weights)]),
    "no gate": ({}, {}, [(FeatureGate, "forward", no_gate)]),
    "1 prototype a class": ({"num_prototypes": 1}, {}, []),
    "6 prototypes a class": ({"num_prototypes": 6}, {}, []),
    "scorer llr": ({"scorer": "llr"}, {}, []),
    "scorer mahalanobis": ({"scorer": "mahalanobis"}, {}, []),
    "scorer gmm": ({"scorer": "gmm"}, {}, []),
    "scorer kde": ({"scorer": "kde"}, {}, []),
    "mean pooling, as in the paper": ({"pooling": "mean"}, {}, []),
    "twice the width": (backbone(32), {}, []),
    "half the width": (backbone(8), {}, []),
    "one orientation cached": ({}, {"orientations": 1}, []),
    "the paper's open-set score, KDE of embeddings": (
        {"open_set_score": "kde", "open_set_features": "embeddings"}, {}, [],
    ),
}  # fmt: skip


def run(variant: Variant, data: str, epochs: int, seed: int, more: dict) -> dict[str, float]:
    fields, changes, replaced = variant
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe"
        shutil.copytree(HERE / "vae", recipe / "vae")
        shutil.copy(HERE / "preprocessor_config.json", recipe)
        config = json.loads((HERE / "config.json").read_text()) | fields
        (recipe / "config.json").write_text(json.dumps(config))
        values = {"dataset_name": [data], "config_name": str(recipe), "output_dir": f"{folder}/run"}
        values |= {"num_train_epochs": epochs, "seed": seed} | more | changes
        patches = [patch.object(owner, name, method) for owner, name, method in replaced]
        for one in patches:
            one.start()
        try:
            return train(TrainingArguments(**values))["figures"]
        finally:
            for one in patches:
                one.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--dataset", default=str(HERE / "leakzoo"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--augmented_views", type=int, default=0)
    arguments = parser.parse_args()
    more = {"augmented_views": arguments.augmented_views}
    if "leakzoo" not in arguments.dataset:
        more |= {"crop_size": 128, "num_crops": 4, "orientations": 2}
    print(f"{arguments.seeds} seeds, {arguments.epochs} epochs\n")
    print("| variant | Macro AUC | accuracy | open-set AUROC |\n| --- | --- | --- | --- |", flush=True)
    for name, variant in VARIANTS.items():
        if arguments.only not in name:
            continue
        runs = [
            run(variant, arguments.dataset, arguments.epochs, seed, more) for seed in range(arguments.seeds)
        ]
        cells = []
        for figure in ("macro_auc", "accuracy", "auroc"):
            values = [found[figure] for found in runs if figure in found]
            cells.append(
                f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "none"
            )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
