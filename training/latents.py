"""Latents of a data set's images: encoded once, in files that are read row by row, never all in memory."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from ..evidence_protoleak import SUFFICIENT
from ..files_protoleak import write_whole
from ..image_processing_protoleak import ProtoLeakImageProcessor, open_image
from ..modeling_protoleak import ProtoLeakForImageAttribution
from ..postprocessing_protoleak import postprocess

logger = logging.getLogger(__name__)

ITEM_SIZE = np.dtype(np.float16).itemsize


def cache_folder() -> Path:
    """Where latents are kept."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "protoleak"


@dataclass(frozen=True)
class View:
    """
    What is done to an image before the VAE encodes it.

    Args:
        orientation (`int`): 0..7; pixels are turned by `orientation // 2` quarters, and mirrored if odd.
        operator (`str`, *optional*), strength (`float`, *optional*), seed (`int`):
            How the image is post-processed before that, see [`postprocess`]; not at all by default.
    """

    orientation: int = 0
    operator: str | None = None
    strength: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Part of the names of the files that hold this view's latents."""
        processed = "" if self.operator is None else f"-{self.operator}-{self.strength}-{self.seed}"
        return f"{self.orientation}{processed}"

    def process(self, image: str | bytes, max_pixels: int) -> Image.Image | str | bytes:
        """The post-processed image; where there is no operator, the file as it is."""
        if self.operator is None:
            return image
        return postprocess(open_image(image, max_pixels), self.operator, self.strength, self.seed)

    def orient(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(..., 3, h, w) -> (..., 3, h, w), or (..., 3, w, h) after an odd number of quarters"""
        turned = pixel_values.rot90(self.orientation // 2, (-2, -1))
        return turned.flip(-1) if self.orientation % 2 else turned


class LatentDataset(torch.utils.data.Dataset):
    """
    Pairs of latents, float16 (C, H, W) or (crops, C, H, W), and label; or of features, float16 (S, T, P), and
    label. A row is read from its file when it is asked for; nothing of the files stays in this process's
    memory. A file ends with a byte for each of its rows, which tells what the image lacks.

    Args:
        files (`list[Path]`): Of `shard_size` rows each, the last of those that are left.
        shape (`tuple[int, ...]`): Of one row.
        labels (`torch.LongTensor` of shape `(num_images,)`): Classes 0..K-1, -1 for any other.
        shard_size (`int`): Rows of a file.

    Attributes:
        is_refused (`np.ndarray` of shape `(num_images,)`, *optional*): Which images have no evidence, where
            that was looked at.
    """

    def __init__(self, files: list[Path], shape: tuple[int, ...], labels: torch.Tensor, shard_size: int):
        self.files, self.shape, self.labels, self.shard_size = files, shape, labels, shard_size
        self.is_refused: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def lacks(self) -> np.ndarray:
        """What each image lacks for an attribution, (num_images,): see `evidence_protoleak.py`."""
        size = math.prod(self.shape) * ITEM_SIZE
        counts = [file.stat().st_size // (size + 1) for file in self.files]
        parts = [np.fromfile(f, np.uint8, offset=n * size) for f, n in zip(self.files, counts, strict=True)]
        return np.concatenate(parts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shard, place = divmod(range(len(self))[index], self.shard_size)
        size = math.prod(self.shape)
        row = np.fromfile(self.files[shard], np.float16, size, offset=place * size * ITEM_SIZE)
        return torch.from_numpy(row).view(self.shape), self.labels[index]


class LatentCache:
    """
    Encodes images with a model's VAE, and keeps the latents in files under the `datasets` cache, keyed by
    what they depend on: content of the images, image processor, VAE and view. Of a model whose pooling has
    nothing to learn, what it pools is kept in their place, and depends on its whitening and noise as well.
    Processes share the files out, and a file appears only when it is whole, so that a run that was stopped
    goes on.

    Args:
        model ([`ProtoLeakForImageAttribution`]): Its VAE encodes; its labels number the classes.
        processor ([`ProtoLeakImageProcessor`]): Makes pixel values of images.
        accelerator (`Accelerator`): Of the processes that take part.
        batch_size (`int`): Images that are encoded at once.
        shard_size (`int`): Images in a file.
    """

    def __init__(
        self,
        model: ProtoLeakForImageAttribution,
        processor: ProtoLeakImageProcessor,
        accelerator: Accelerator,
        batch_size: int = 16,
        shard_size: int = 2048,
    ):
        self.model, self.processor, self.accelerator = model, processor, accelerator
        self.batch_size, self.shard_size = batch_size, shard_size
        self.folder = cache_folder()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's latents, (C, H, W) or (crops, C, H, W), or of its features, (S, T, P)."""
        if self.model.takes_features:
            own = self.model.config
            return len(own.scales), len(own.timesteps), sum(self.model.protoleak.encoder.parts.values())
        config = self.model.vae.config
        blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        side = self.processor.crop_size // 2 ** (len(blocks) - 1)
        crops = () if self.processor.num_crops == 1 else (self.processor.num_crops,)
        return (*crops, self.model.config.latent_channels, side, side)

    def content_key(self, rows: Dataset) -> str:
        """Of all that the latents of `rows` depend on but the view. 32 hexadecimal digits."""
        vae = self.model.vae
        vae_config = {k: v for k, v in vae.config.items() if not k.startswith("_")}  # not where it lies
        processor = {k: v for k, v in self.processor.to_dict().items() if v is not None}
        facts, weights = [processor, vae_config], dict(vae.state_dict())
        if self.model.takes_features:
            own = self.model.config
            facts += [own.scales, own.timesteps, own.noise_seed, own.noise_schedule, own.patch_size]
            facts += [own.sigma_normalization, own.contrast_normalization, "noise of evaluation"]
            facts += [own.texture_families, "all steps of a residual counted at once, Cholesky factors"]
            base = self.model.protoleak
            weights |= {f"whitening.{k}": v for k, v in base.whitening.state_dict().items()}
            readers = {"plane": base.encoder.plane, "picture": base.encoder.picture}
            for reader, module in readers.items():
                weights |= {f"{reader}.{k}": v for k, v in module.state_dict().items()} if module else {}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, weight in sorted(weights.items()):
            content = weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            digest.update(name.encode() + content)
        for batch in rows.select_columns("image").iter(self.batch_size):
            for image in batch["image"]:
                content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
                digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()[:32]

    def encode(self, rows: Dataset, view: View = View()) -> LatentDataset:  # noqa: B008 (it is frozen)
        """The latents of one view of `rows`, which have columns `image` (not decoded) and `label` (str)."""
        return self.encode_views(rows, [view])[view]

    def encode_held_out(self, rows: Dataset) -> LatentDataset:
        """[`~LatentCache.encode`] of images whose verdicts count, with which of them are refused one."""
        encoded = self.encode_views(rows, [View()], held_out=True)[View()]
        if encoded.is_refused.any():
            count = f"{encoded.is_refused.sum()} of {len(rows)} images"
            logger.warning(f'{count} show nothing to go by; their verdicts count as "no evidence"')
        return encoded

    def encode_views(
        self, rows: Dataset, views: Iterable[View], held_out: bool = False
    ) -> dict[View, LatentDataset]:
        """
        The latents of several views of the same images, of which the content is read for the key only once;
        with which views of images are refused a verdict, where these are `held_out`.
        """
        key, index = self.content_key(rows), {k: n for n, k in enumerate(self.model.config.label_names)}
        labels = torch.tensor([index.get(name, -1) for name in rows["label"]])
        encoded = {}
        for view in views:
            files = self._encode_shards(rows, view, f"{key}-{view.name}")
            encoded[view] = LatentDataset(files, self.shape, labels, self.shard_size)
            if held_out:
                encoded[view].is_refused = encoded[view].lacks() != SUFFICIENT
        return encoded

    def _encode_shards(self, rows: Dataset, view: View, name: str) -> list[Path]:
        """The files of a view's latents; those that are missing are written first."""
        count = max(1, math.ceil(len(rows) / self.shard_size))
        files = [self.folder / f"{name}-{number}-of-{count}.latents" for number in range(count)]
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(self.accelerator.process_index, count, self.accelerator.num_processes):
            members = range(number * self.shard_size, min((number + 1) * self.shard_size, len(rows)))
            size = len(members) * (math.prod(self.shape) * ITEM_SIZE + 1)
            if not files[number].exists() or files[number].stat().st_size != size:
                self._write_shard(rows.select(members), view, files[number], members.start)
        self.accelerator.wait_for_everyone()
        return files

    def _write_shard(self, rows: Dataset, view: View, path: Path, first: int) -> None:
        bar = tqdm(
            total=len(rows),
            desc="encoding images with the VAE",
            leave=False,
            disable=None if self.accelerator.is_main_process else True,  # None: on a terminal alone
        )

        def write(partial: Path) -> None:
            lacks = bytearray()
            with bar, partial.open("wb") as file:
                for batch in rows.select_columns("image").iter(self.batch_size):
                    encoded, lacking = self._encode_named(batch["image"], view, rows.split, first + bar.n)
                    file.write(encoded.tobytes())
                    lacks += lacking.astype(np.uint8).tobytes()
                    bar.update(len(batch["image"]))
                file.write(lacks)

        write_whole(path, write)

    def latents(self, rows: Dataset) -> Iterator[torch.Tensor]:
        """z_0 at the first scale, batch by batch, of `rows` as they are; they are not kept."""
        for batch in rows.select_columns("image").iter(self.batch_size):
            yield self.model.protoleak.encode(self._pixels(batch["image"], View())[0])[0]

    def _encode_named(
        self, images: list[dict[str, Any]], view: View, split: Any, first: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        [`~LatentCache._encode_batch`]; of an image that can't be opened the error has its path, or its row.
        It is no `OSError`, which writing the file would raise.
        """
        try:
            return self._encode_batch(images, view)
        except (OSError, ValueError):
            for row, image in enumerate(images, first):
                where = f"row {row}" + (f" of split {str(split)!r}" if split else "")
                try:
                    open_image(image, self.processor.max_pixels, name=image["path"] or where)
                except (OSError, ValueError) as error:
                    raise ValueError(f"{error}. Mend the image or leave it out") from error
            raise

    @torch.no_grad()
    def _encode_batch(self, images: list[dict[str, Any]], view: View) -> tuple[np.ndarray, np.ndarray]:
        """
        Images as `datasets` holds them, to latents or features (B, *shape), float16, and what they lack,
        (B,); features with the noise of evaluation, whatever mode the model is in.
        """
        pixels, lacks = self._pixels(images, view)
        pyramid = self.model.protoleak.encode(pixels)
        if self.model.takes_features:
            training = self.model.training
            self.model.eval()
            encoded = self.model.protoleak.describe(pyramid)["features"]
            self.model.train(training)
        else:
            (encoded,) = pyramid
        return encoded.reshape(len(images), *self.shape).half().cpu().numpy(), lacks

    def _pixels(self, images: list[dict[str, Any]], view: View) -> tuple[torch.Tensor, np.ndarray]:
        """
        Pixel values of images in a view, (B, 3, h, w) or (B, V, 3, h, w), V fixed for latents; and what they
        lack, (B,).
        """
        contents = [image["bytes"] if image["bytes"] is not None else image["path"] for image in images]
        processed = [view.process(content, self.processor.max_pixels) for content in contents]
        inputs = self.processor(processed)
        pixels = inputs["pixel_values"]
        if pixels.ndim == 5 and not self.model.takes_features:  # V the most crops of an image of this batch
            missing = self.processor.num_crops - pixels.shape[1]
            pixels = torch.nn.functional.pad(pixels, (0, 0) * 3 + (0, missing))
        return view.orient(pixels), inputs["no_evidence"].numpy()
