"""Latents of a data set's images, encoded once and cached."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, List, Value
from torch.utils.data import TensorDataset

from ..image_processing_protoleak import ProtoLeakImageProcessor, open_image
from ..modeling_protoleak import ProtoLeakForImageAttribution
from ..postprocessing_protoleak import postprocess

SHARD_SIZE = 2048  # images in a file of cached latents


def content_key(
    rows: Dataset, model: ProtoLeakForImageAttribution, processor: ProtoLeakImageProcessor
) -> str:
    """What the latents depend on: image content, processor, VAE. 32 hexadecimal digits."""
    vae_config = {k: v for k, v in model.vae.config.items() if not k.startswith("_")}  # not where it lies
    digest = hashlib.sha256(
        json.dumps([processor.to_dict(), vae_config], sort_keys=True, default=str).encode()
    )
    for name, weight in sorted(model.vae.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for image in rows["image"]:
        digest.update(hashlib.sha256(_image_bytes(image)).digest())
    return digest.hexdigest()[:32]


def _image_bytes(image: dict[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def encode_split(
    rows: Dataset, label_names: list[str],
    model: ProtoLeakForImageAttribution, processor: ProtoLeakImageProcessor,
    accelerator: Accelerator, orientation: int = 0, operator: str | None = None,
    strength: float | None = None, seed: int = 0, batch_size: int = 16, key: str | None = None,
) -> TensorDataset:  # fmt: skip
    """
    Latents (N, C, H, W) or (N, crops, C, H, W) and labels (N,), -1 for other classes. The latents are
    cached in float16, in files of `SHARD_SIZE` images, which processes share out, so that a run that was
    stopped goes on.
    `orientation` 0..7 mirrors (odd) and turns (by orientation // 2 quarters) the pixels first; `operator`,
    `strength` and `seed` [`postprocess`] the images before that; `key` is the rows' [`content_key`], where it
    is at hand.
    """
    channels, side = model.config.latent_channels, processor.crop_size // _reduction(model.vae)
    views = () if processor.num_crops == 1 else (processor.num_crops,)
    shape = (*views, channels, side, side)

    def encode(batch: dict[str, list]) -> dict[str, np.ndarray]:
        images = [image["bytes"] if image["bytes"] is not None else image["path"] for image in batch["image"]]
        if operator is not None:
            images = [open_image(image, processor.max_pixels) for image in images]
            images = [postprocess(image, operator, strength, seed) for image in images]
        pixels = processor(images)["pixel_values"].rot90(orientation // 2, (-2, -1))
        latents = model.protoleak.encode(pixels.flip(-1) if orientation % 2 else pixels)
        return {"latents": latents.flatten(1).half().cpu().numpy()}

    key = f"{key or content_key(rows, model, processor)}-{orientation}"
    if operator is not None:
        key += f"-{operator}-{strength}-{seed}"
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "protoleak"
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, math.ceil(len(rows) / SHARD_SIZE))

    def shard(number: int) -> Dataset:
        """A part of the latents, from its file, which appears only when it is whole."""
        name = f"{key}-{number}-of-{count}"
        chosen = rows.select(range(number * SHARD_SIZE, min((number + 1) * SHARD_SIZE, len(rows))))
        return chosen.map(
            encode,
            batched=True,
            batch_size=batch_size,
            remove_columns=rows.column_names,
            features=Features(latents=List(Value("float16"), length=math.prod(shape))),
            cache_file_name=str(folder / f"{name}.arrow"),
            new_fingerprint=hashlib.sha256(name.encode()).hexdigest()[:32],
            desc="encoding images with the VAE",
        )

    for number in range(accelerator.process_index, count, accelerator.num_processes):
        shard(number)
    accelerator.wait_for_everyone()
    parts = [shard(number).with_format("numpy")["latents"][:] for number in range(count)]
    latents = torch.from_numpy(np.concatenate(parts)).view(-1, *shape)
    index = {name: k for k, name in enumerate(label_names)}
    return TensorDataset(latents, torch.tensor([index.get(name, -1) for name in rows["label"]]))


class RandomView(torch.utils.data.Dataset):
    """One of several cached encodings of each image, and one of its crops, drawn anew each time."""

    def __init__(self, views: list[TensorDataset]):
        self.views = views

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        latents, label = self.views[int(torch.randint(len(self.views), ()))][index]
        if latents.ndim == 4:
            latents = latents[int(torch.randint(len(latents), ()))]
        return latents, label


def _reduction(vae) -> int:
    """How many pixels one side of a latent stands for."""
    blocks = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels")
    return 2 ** (len(blocks) - 1)
