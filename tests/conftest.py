"""Tiny models of the real architectures, with random weights or trained once for all tests."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from protoleak import ProtoLeakConfig, ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.forensics.scan import Attributor
from protoleak.train import train
from protoleak.training.arguments import TrainingArguments
from protoleak.training.patches import make_patch_autoencoder

LABELS = ["real", "a", "b"]

# tests run in two processes, and tiny models are faster on one thread; so are the processes that tests start
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

COSTLY = (
    "copy",
    "workspace",
    "address",
    "found",
    "across_sources",
)  # no two processes should make these


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what is costly to make run in one process."""
    for item in items:
        for name in set(COSTLY) & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(name))


def tiny_vae(latent_channels: int = 4, **overrides) -> AutoencoderKL:
    """Stable Diffusion 2.1's architecture, small: reduces four times."""
    torch.manual_seed(0)
    values = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": latent_channels,
        "scaling_factor": 6.0,  # random weights give small latents; this brings them near unit variance
    }
    return AutoencoderKL(**values | overrides)


def tiny_config(**overrides) -> ProtoLeakConfig:
    backbone = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8],
        "depths": [1],
        "layer_type": "basic",
    }
    values = {"backbone_config": backbone, "keep_resolution": True, "embedding_size": 16, "num_prototypes": 3}
    values |= {"id2label": dict(enumerate(LABELS)), "label2id": {name: k for k, name in enumerate(LABELS)}}
    return ProtoLeakConfig(**values | {"timesteps": [0, 50, 200]} | overrides)


TEXTURE = {  # what makes a tiny model one of the root's kind
    "pooling": "texture",
    "latent_channels": 12,
    "patch_size": 2,
    "latent_whitening": True,
    "scales": [1, 2],
    "timesteps": [0, 20],
}


def tiny_model(**overrides) -> ProtoLeakForImageAttribution:
    torch.manual_seed(0)
    model = ProtoLeakForImageAttribution(tiny_config(**overrides)).eval()
    texture = model.config.pooling == "texture"
    model.attach_vae(make_patch_autoencoder() if texture else tiny_vae(model.config.latent_channels))
    return model


def fit_random_detector(model: ProtoLeakForImageAttribution, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    size, num_labels = model.config.embedding_size, model.config.num_labels
    num_statistics = model.protoleak.encoder.parts.get("grid_statistics", 0)

    def draw(count: int) -> dict[str, np.ndarray]:
        labels = np.arange(count) % num_labels
        embeddings = rng.normal(size=(count, size)) + labels[:, None]
        gates, statistics = rng.uniform(size=(count, size)), rng.normal(size=(count, num_statistics))
        return {"embeddings": embeddings, "gates": gates, "statistics": statistics, "labels": labels}

    model.fit_detector(draw(60), draw(40))


@pytest.fixture
def model() -> ProtoLeakForImageAttribution:
    return tiny_model()


@pytest.fixture
def fitted_model() -> ProtoLeakForImageAttribution:
    model = tiny_model()
    fit_random_detector(model)
    return model


@pytest.fixture
def processor() -> ProtoLeakImageProcessor:
    return ProtoLeakImageProcessor(crop_size=32)


@pytest.fixture
def photo() -> Image.Image:
    """48 x 40 smooth colour noise."""
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC)


@pytest.fixture
def checkpoint(fitted_model, processor, tmp_path) -> Path:
    """The folder of a checkpoint with a detector."""
    fitted_model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def attributor(checkpoint) -> Attributor:
    return Attributor(str(checkpoint))


@pytest.fixture
def blobs():
    """300 samples of 3 classes at D = 128, and 50 queries."""
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    centres = rng.normal(size=(3, 128))
    return centres[labels] + rng.normal(size=(300, 128)), labels, rng.normal(size=(50, 128)) * 1.5


# --- training -----------------------------------------------------------------------------------------------


def draw(generator: str, rng: np.random.Generator) -> Image.Image:
    """Noise whose tint and grain tell the generator."""
    noise = rng.normal(128, 30, (40, 40, 3))
    if generator == "a":
        noise = noise.repeat(8, axis=0)[:40] + (70, 0, -70)
    if generator == "b":
        noise = noise.repeat(8, axis=1)[:, :40] - (70, 0, -70)
    if generator == "c":
        noise = noise.mean(axis=(0, 1), keepdims=True) + np.zeros((40, 40, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def draw_folder(target: Path) -> Path:
    """An imagefolder with splits and an unknown generator, 104 images."""
    rng = np.random.default_rng(0)
    sizes = {"train": 16, "validation": 8, "test": 8, "unknown": 8}
    for split, size in sizes.items():
        for generator in ("c",) if split == "unknown" else ("real", "a", "b"):
            (target / split / generator).mkdir(parents=True)
            for i in range(size):
                draw(generator, rng).save(target / split / generator / f"{i}.png")
    return target


def save_recipe(target: Path) -> Path:
    """Where a new model's config, processor and VAE come from."""
    tiny_config(pooling="statistics").save_pretrained(target)
    ProtoLeakImageProcessor(crop_size=32).save_pretrained(target)
    tiny_vae().save_pretrained(target / "vae")
    return target


def arguments(tmp_path: Path, folder: Path, recipe: Path, **changes: Any) -> TrainingArguments:
    """Of a run of a few seconds, which writes tmp_path/run."""
    values = {"dataset_name": [str(folder)], "config_name": str(recipe), "output_dir": str(tmp_path / "run")}
    values |= {"augmented_views": 2, "bootstrap_resamples": 20}
    return TrainingArguments(
        **values | {"num_train_epochs": 20, "batch_size": 8, "learning_rate": 1e-2} | changes
    )


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """The cache of `datasets`, and of latents, of all tests and of the processes that they start."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return draw_folder(tmp_path / "data")


@pytest.fixture
def recipe(tmp_path) -> Path:
    return save_recipe(tmp_path / "recipe")


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint that training made, the data set and the recipe that it was made from, and its summary."""

    checkpoint: Path
    folder: Path
    recipe: Path
    summary: dict[str, Any]

    def copy_checkpoint(self, target: Path) -> Path:
        """For a test that changes it."""
        return Path(shutil.copytree(self.checkpoint, target))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cache) -> TrainedRun:
    """Trained once; nothing may be changed in its folders."""
    place = tmp_path_factory.mktemp("trained")
    folder, recipe = draw_folder(place / "data"), save_recipe(place / "recipe")
    return TrainedRun(place / "run", folder, recipe, train(arguments(place, folder, recipe)))
