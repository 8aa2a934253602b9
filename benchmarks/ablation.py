"""
What each part of the method is worth: LeakZoo's recipe against itself with one thing changed.

    python benchmarks/ablation.py [--only WORDS] [--seeds N] [any argument of train.py]

Mean over seeds, from the lowest to the highest in brackets. --only takes variants whose name has these words.
Unless they are given, there are at most 12 epochs and no post-processed views, which saves most of the time.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import protoleak.modeling_protoleak
import protoleak.train
import torch
from datasets import DatasetDict
from protoleak import ProtoLeakConfig, ProtoLeakImageProcessor
from protoleak.evaluation.protocol import Evaluation
from protoleak.evaluation.splits import load_splits
from protoleak.modeling_protoleak import FeatureGate, ProtoLeakModel, TemporalAttention
from protoleak.train import train
from protoleak.training.arguments import TrainingArguments
from protoleak.vae_protoleak import load_vae
from transformers import HfArgumentParser

RECIPE_FOLDER = Path(__file__).parent.parent / "leakzoo" / "recipe"


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


def shuffled(name: list[str], seed: int, *how) -> DatasetDict:
    """The control: training and validation images with one another's labels."""
    splits = load_splits(name, seed, *how)
    for split in ("train", "validation"):
        labels = np.random.default_rng(seed).permutation(splits[split]["label"])
        splits[split] = splits[split].remove_columns("label").add_column("label", labels.tolist())
    return splits


def backbone(width: int, depth: int = 1) -> dict:
    values = {"model_type": "resnet", "embedding_size": width, "hidden_sizes": [width], "depths": [depth]}
    return {"backbone_config": values | {"layer_type": "basic"}}


RECIPE = "LeakZoo's recipe"
# name: (fields of the config, of the training arguments, and methods that are replaced)
Variant = tuple[dict, dict, list[tuple[Any, str, Callable]]]
VARIANTS: dict[str, Variant] = {
    RECIPE: ({}, {}, []),
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
    "mean pooling, as in the paper": ({"pooling": "mean"}, {}, []),
    "twice the width": (backbone(32), {}, []),
    "half the width": (backbone(8), {}, []),
    "one orientation cached": ({}, {"orientations": 1}, []),
}  # fmt: skip


def run(variant: Variant, name: str, arguments: TrainingArguments) -> dict[str, dict[str, float]]:
    """Metrics of a variant; of the recipe itself also that of the paper's open-set score."""
    fields, changes, replaced = variant
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        recipe = Path(folder) / "recipe"
        ProtoLeakImageProcessor.from_pretrained(RECIPE_FOLDER).save_pretrained(recipe)
        own = ProtoLeakConfig.from_pretrained(RECIPE_FOLDER)
        ProtoLeakConfig(**own.to_dict() | fields).save_pretrained(recipe)
        for owner, method, other in replaced:
            patches.enter_context(patch.object(owner, method, other))
        changes = {"config_name": str(recipe), "output_dir": f"{folder}/run"} | changes
        evaluation = Evaluation.from_dict(
            train(replace(arguments, **changes), vae=load_vae(RECIPE_FOLDER, own))
        )
        rows = {name: evaluation.metrics}
        if name == RECIPE:
            paper = evaluation.main.open_set_scores["kde of embeddings"]
            rows["the paper's open-set score, KDE of embeddings"] = {"auroc": paper["auroc"]}
    return rows


def main() -> None:
    parser = HfArgumentParser(TrainingArguments, description=__doc__.split("\n")[1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.set_defaults(num_train_epochs=12, augmented_views=0)
    arguments, own = parser.parse_args_into_dataclasses()
    print(f"{own.seeds} seeds, at most {arguments.num_train_epochs} epochs\n")
    print("| variant | Macro AUC | accuracy | open-set AUROC |\n| --- | --- | --- | --- |", flush=True)
    for name, variant in VARIANTS.items():
        if own.only not in name:
            continue
        runs = [run(variant, name, replace(arguments, seed=seed)) for seed in range(own.seeds)]
        for row in runs[0]:
            print(f"| {row} | {' | '.join(cell([of_seed[row] for of_seed in runs]))} |", flush=True)


def cell(runs: list[dict[str, float]]) -> Iterator[str]:
    for name in ("macro_auc", "accuracy", "auroc"):
        values = [metrics[name] for metrics in runs if name in metrics]
        span = f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "as above"
        yield span


if __name__ == "__main__":
    main()
