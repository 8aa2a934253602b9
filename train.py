"""
Train Proto-LeakNet on any image data set with `datasets` and Accelerate.

    python train.py                                             # LeakZoo, from scratch
    python train.py --dataset_name FOLDER --output_dir runs/mine
    python train.py --model_name_or_path . --dataset_name leakzoo FOLDER    # the known classes, and FOLDER's
    accelerate launch train.py ...                              # on several processes or machines

Every image passes the VAE once: its latents are cached under the `datasets` cache, keyed by the VAE's
weights, the image processor and the image files' content.
"""

import dataclasses
import hashlib
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_dataset
from huggingface_hub import HfApi
from protoleak import ProtoLeakConfig, ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.card_protoleak import write_card
from protoleak.evaluation_protoleak import format_summary, predict, summarize
from protoleak.image_processing_protoleak import SUFFIXES
from protoleak.modeling_protoleak import has_vae_folder, load_autoencoder, load_vae
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import HfArgumentParser

HERE = Path(__file__).parent
GROUP_COLUMNS = ("group", "photo", "prompt")  # rows that share one of these never go to different splits
HELD_OUT = {
    "test": 0.3,
    "validation": 0.2,
}  # shares, where a data set has no such split (WILD's 300 and 200 of 1,000)
logger = logging.getLogger("protoleak.train")


@dataclass
class TrainingArguments:
    """Everything that a run depends on."""

    dataset_name: list[str] = field(
        default_factory=lambda: [str(HERE / "leakzoo")],
        metadata={
            "help": "Hub id or folder that `load_dataset` takes, or a folder with Closed_Set/<generator>/; "
            "of several, the splits are joined."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from. By default weights are new."}
    )
    config_name: str = field(
        default=str(HERE), metadata={"help": "Where a new model's config, image processor and VAE come from."}
    )
    vae_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Autoencoder of a new model, Hub id or folder, instead of `config_name`'s."},
    )
    output_dir: str = field(default="runs/protoleak", metadata={"help": "Where the checkpoint is written."})
    num_train_epochs: int = field(default=60, metadata={"help": "Epochs at most."})
    patience: int = field(
        default=15, metadata={"help": "Epochs without a better validation loss before it stops."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images a step and process."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of AdamW's learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Gradients are clipped to this norm."})
    orientations: int = field(
        default=8, metadata={"help": "Cached views of a training image: 1, 2 (mirrored) or 8 (and turned)."}
    )
    crop_size: int | None = field(default=None, metadata={"help": "Overrides the image processor's."})
    num_crops: int | None = field(default=None, metadata={"help": "Overrides the image processor's."})
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16."})
    report_to: str | None = field(
        default=None, metadata={"help": "A tracker of Accelerate, such as tensorboard or wandb."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Hub id that the finished checkpoint is uploaded to."}
    )
    seed: int = field(default=0, metadata={"help": "Fixes initial weights, batches and noise."})


# --- data ---------------------------------------------------------------------------------------------------


def load_splits(name: str | Sequence[str], seed: int = 0) -> DatasetDict:
    """
    Train, validation, test and, where there is one, unknown, with columns `image` (not decoded) and `label`
    (str).

    Missing validation and test splits are cut from train, by group where a column tells it. Several data sets
    are joined split by split; a generator that one of them trains on is no longer unknown in another.

    Raises:
        ValueError: a data set has no images or labels, or the known classes are fewer than two.
    """
    names = [name] if isinstance(name, str) else list(name)
    parts = [_load(part, seed) for part in names]
    if len(parts) == 1:
        (splits,) = parts
    else:
        splits = DatasetDict()
        for split in dict.fromkeys(split for part in parts for split in part):
            rows = [part[split].select_columns(["image", "label"]) for part in parts if split in part]
            splits[split] = datasets.concatenate_datasets(rows)
    name, known = ", ".join(names), set(splits["train"]["label"])
    if len(known) < 2:
        raise ValueError(f"{name} has {len(known)} class in its train split, but at least 2 are needed")
    for split in ("validation", "test"):
        if extra := set(splits[split]["label"]) ^ known:
            raise ValueError(
                f"{name}: train and {split!r} must have the same classes; they differ by {sorted(extra)}"
            )
    if "unknown" in splits and known & set(splits["unknown"]["label"]):
        labels = np.array(splits["unknown"]["label"])
        splits["unknown"] = splits["unknown"].select(np.flatnonzero(~np.isin(labels, list(known))))
        if not len(splits["unknown"]):
            del splits["unknown"]
    return splits


def _load(name: str, seed: int) -> DatasetDict:
    """One data set with train, validation, test and perhaps unknown."""
    if (Path(name) / "Closed_Set").is_dir():
        splits = DatasetDict(train=_class_folders(Path(name) / "Closed_Set"))
        if (Path(name) / "Open_Set").is_dir():
            splits["unknown"] = _class_folders(Path(name) / "Open_Set")
    elif (Path(name) / "train").is_dir() and not (Path(name) / "README.md").exists():
        # `datasets` would pass over a folder of another name than its usual splits, such as unknown
        folders = {p.name: str(p / "**") for p in Path(name).iterdir() if p.is_dir()}
        splits = load_dataset("imagefolder", data_files=folders)
    else:
        splits = load_dataset(name)
        if Path(name).is_dir() and "label" not in next(iter(splits.values())).features:
            splits = load_dataset("imagefolder", data_dir=name, drop_labels=False)  # folders of one class
    if "train" not in splits:
        raise ValueError(f"{name} has splits {sorted(splits)}, but training needs one called 'train'")
    splits = DatasetDict(
        {split: _normalise(rows, f"{name}, split {split!r}") for split, rows in splits.items()}
    )
    for split in ("test", "validation"):
        if split not in splits:
            share = HELD_OUT[split] / (1 - HELD_OUT["test"] if split == "validation" else 1)
            splits["train"], splits[split] = _cut(splits["train"], share, seed)
    return splits


def _class_folders(root: Path) -> Dataset:
    """
    Images below `root`, labelled by the first folder, however deep they lie (WILD's step1, step2, step3).
    """
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{root} holds no images; expected {root}/<generator>/*.png")
    labels = [p.relative_to(root).parts[0] for p in files]
    return Dataset.from_dict({"image": [str(p) for p in files], "label": labels}).cast_column(
        "image", datasets.Image()
    )


def _normalise(rows: Dataset, what: str) -> Dataset:
    columns = {
        name: feature for name, feature in rows.features.items() if isinstance(feature, datasets.Image)
    }
    if not columns or "label" not in rows.features:
        raise ValueError(f"{what} needs an image column and a column 'label'; got {rows.features}")
    image = next(iter(columns))
    rows = rows if image == "image" else rows.rename_column(image, "image")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    if isinstance(label := rows.features["label"], ClassLabel):
        names = label.int2str(rows["label"][:])
        rows = rows.remove_columns("label").add_column("label", names)
    return rows


def _cut(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Cut a share off, by group if a column tells it, else within each class."""
    rng = np.random.default_rng(seed)
    column = next((c for c in GROUP_COLUMNS if c in rows.column_names), None)
    labels, cut = np.array(rows["label"]), np.zeros(len(rows), bool)
    if column:
        groups = np.array(rows[column])
        names = rng.permutation(np.unique(groups))
        cut = np.isin(groups, names[: max(1, round(share * len(names)))])
    else:
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            cut[members[: max(1, round(share * len(members)))]] = True
    return rows.select(np.flatnonzero(~cut)), rows.select(np.flatnonzero(cut))


def content_key(
    rows: Dataset, model: ProtoLeakForImageAttribution, processor: ProtoLeakImageProcessor
) -> str:
    """What the latents depend on: image content, processor, VAE. 32 hexadecimal digits."""
    digest = hashlib.sha256(
        json.dumps([processor.to_dict(), dict(model.vae.config)], sort_keys=True, default=str).encode()
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
    accelerator: Accelerator, orientation: int = 0, batch_size: int = 16, key: str | None = None,
) -> TensorDataset:  # fmt: skip
    """
    Latents (N, C, H, W) or (N, crops, C, H, W) and labels (N,), -1 for other classes; cached. `orientation`
    0..7 mirrors (odd) and turns (by orientation // 2 quarters) the pixels first; `key` is the rows'
    [`content_key`], where it is at hand.
    """
    channels, side = model.config.latent_channels, processor.crop_size // _reduction(model.vae)
    views = () if processor.num_crops == 1 else (processor.num_crops,)
    shape = (*views, channels, side, side)

    def encode(batch: dict[str, list]) -> dict[str, np.ndarray]:
        images = [image["bytes"] if image["bytes"] is not None else image["path"] for image in batch["image"]]
        pixels = processor(images)["pixel_values"].rot90(orientation // 2, (-2, -1))
        latents = model.protoleak.encode(pixels.flip(-1) if orientation % 2 else pixels)
        return {"latents": latents.flatten(1).cpu().numpy()}

    key = f"{key or content_key(rows, model, processor)}-{orientation}"
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "protoleak"
    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        encoded = rows.map(
            encode,
            batched=True,
            batch_size=batch_size,
            remove_columns=rows.column_names,
            features=Features(latents=List(Value("float32"), length=math.prod(shape))),
            cache_file_name=str(folder / f"{key}.arrow"),
            new_fingerprint=key,
            desc="encoding images with the VAE",
        )
    latents = torch.from_numpy(encoded.with_format("numpy")["latents"][:]).view(-1, *shape)
    index = {name: k for k, name in enumerate(label_names)}
    return TensorDataset(latents, torch.tensor([index.get(name, -1) for name in rows["label"]]))


class RandomOrientation(torch.utils.data.Dataset):
    """One of several encodings of each image, drawn anew each time."""

    def __init__(self, orientations: list[TensorDataset]):
        self.orientations = orientations

    def __len__(self) -> int:
        return len(self.orientations[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return self.orientations[int(torch.randint(len(self.orientations), ()))][index]


def _reduction(vae) -> int:
    """How many pixels one side of a latent stands for."""
    blocks = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels")
    return 2 ** (len(blocks) - 1)


# --- training -----------------------------------------------------------------------------------------------


def make_model(
    arguments: TrainingArguments, label_names: list[str]
) -> tuple[ProtoLeakForImageAttribution, ProtoLeakImageProcessor]:
    """A new model by `config_name`, or the checkpoint `model_name_or_path` with a head for these classes."""
    source = arguments.model_name_or_path or arguments.config_name
    overrides = {k: v for k in ("crop_size", "num_crops") if (v := getattr(arguments, k)) is not None}
    processor = ProtoLeakImageProcessor(
        **ProtoLeakImageProcessor.get_image_processor_dict(source)[0] | overrides
    )
    if arguments.model_name_or_path:
        model = ProtoLeakForImageAttribution.from_pretrained(source)
        model.set_labels(label_names)
    else:
        id2label = dict(enumerate(label_names))
        label2id = {name: k for k, name in id2label.items()}
        config = ProtoLeakConfig.from_pretrained(source, id2label=id2label, label2id=label2id)
        if arguments.vae_name_or_path:
            name = arguments.vae_name_or_path
            subfolder = "vae" if has_vae_folder(name) else None
            vae = load_autoencoder(name, subfolder)
            of_vae = {"vae_name_or_path": name, "vae_subfolder": subfolder, "vae_revision": None}
            of_vae["latent_channels"] = vae.config.latent_channels
            config = ProtoLeakConfig(**{**config.to_dict(), **of_vae})
        else:
            vae = load_vae(source, config)
        model = ProtoLeakForImageAttribution(config)
        model.attach_vae(vae)
    return model, processor


def fit(
    model: ProtoLeakForImageAttribution, train: torch.utils.data.Dataset, validation: TensorDataset,
    arguments: TrainingArguments, accelerator: Accelerator,
) -> list[dict[str, float]]:  # fmt: skip
    """
    Train in place; the weights at the end are those of the epoch with the lowest validation loss. Returns its
    history.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, arguments.learning_rate, weight_decay=arguments.weight_decay)
    generator = torch.Generator().manual_seed(arguments.seed)
    loader = DataLoader(train, arguments.batch_size, shuffle=True, generator=generator)
    steps = arguments.num_train_epochs * math.ceil(len(loader) / accelerator.num_processes)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, steps))
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    history, best, best_weights = [], math.inf, None
    bar = tqdm(range(arguments.num_train_epochs), desc="epochs", disable=not accelerator.is_main_process)
    for epoch in bar:
        wrapped.train()
        losses = []
        for latents, labels in loader:
            with accelerator.autocast():
                loss = wrapped(latents=latents, labels=labels).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        predictions = predict(wrapped, validation, accelerator)
        truth = predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels]
        row = {
            "epoch": epoch,
            "train_loss": float(np.mean(losses)),
            "validation_loss": float(-np.log(truth.clip(1e-12)).mean()),
            "validation_accuracy": float(
                (predictions.probabilities.argmax(axis=1) == predictions.labels).mean()
            ),
        }
        history.append(row)
        accelerator.log(row, step=epoch)
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items() if name != "epoch"})
        if not math.isfinite(row["train_loss"]):
            raise ValueError(f"the loss became {row['train_loss']} in epoch {epoch}; lower learning_rate")
        if row["validation_loss"] < best:
            best, best_weights = row["validation_loss"], _network_weights(model)
        elif epoch - min(history, key=lambda r: r["validation_loss"])["epoch"] >= arguments.patience:
            break
    model.load_state_dict(best_weights, strict=False)
    return history


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _network_weights(model: ProtoLeakForImageAttribution) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "_vae." not in name}


def train(arguments: TrainingArguments) -> dict[str, Any]:
    """
    Train, fit the density and the scorers, write the checkpoint to `output_dir`, and return the summary.
    """
    started = time.perf_counter()
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.report_to,
        project_dir=arguments.output_dir,
    )
    if arguments.report_to:
        accelerator.init_trackers("protoleak", config=dataclasses.asdict(arguments))
    set_seed(arguments.seed)
    splits = load_splits(arguments.dataset_name, arguments.seed)
    label_names = sorted(set(splits["train"]["label"]), key=lambda name: (name != "real", name))
    model, processor = make_model(arguments, label_names)
    model.to(accelerator.device)
    data = {
        split: encode_split(rows, label_names, model, processor, accelerator)
        for split, rows in splits.items()
        if split != "train"
    }
    key = content_key(splits["train"], model, processor)
    seen = RandomOrientation(
        [
            encode_split(splits["train"], label_names, model, processor, accelerator, orientation, key=key)
            for orientation in range(arguments.orientations)
        ]
    )
    data["train"] = seen.orientations[0]
    encoded = time.perf_counter()
    history = fit(model, seen, data["validation"], arguments, accelerator)
    trained = time.perf_counter()
    known = {split: predict(model, data[split], accelerator) for split in ("train", "validation")}
    model.fit_density(known["train"].embeddings, known["train"].labels, known["validation"].embeddings)
    test = predict(model, data["test"], accelerator)
    unknown = predict(model, data["unknown"], accelerator) if "unknown" in data else None
    summary = {
        "dataset": " and ".join(Path(name).name for name in arguments.dataset_name),
        "epochs": len(history),
        "seconds": {
            "encoding": round(encoded - started, 1),
            "training": round(trained - encoded, 1),
            "total": round(time.perf_counter() - started, 1),
        },
        **summarize(test, unknown, label_names),
        "history": history,
    }
    if accelerator.is_main_process:
        save(model, processor, summary, arguments)
        if arguments.push_to_hub:
            hub = HfApi()
            hub.create_repo(arguments.push_to_hub, exist_ok=True)
            hub.upload_folder(repo_id=arguments.push_to_hub, folder_path=arguments.output_dir)
    accelerator.end_training()
    return summary


def save(
    model: ProtoLeakForImageAttribution,
    processor: ProtoLeakImageProcessor,
    summary: dict[str, Any],
    arguments: TrainingArguments,
) -> None:
    """Write a checkpoint that every loader takes, with its figures in metrics.json and in its card."""
    folder = Path(arguments.output_dir)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    origin = f"Trained on {summary['dataset']} for {summary['epochs']} epochs."
    write_card(folder, model, origin, _command(arguments), summary)


def _command(arguments: TrainingArguments) -> str:
    changed = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
    defaults = TrainingArguments()
    words = ["python train.py"]
    for name, value in changed.items():
        if value != getattr(defaults, name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words).replace("'python train.py'", "python train.py")


def main() -> None:
    arguments = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()[0]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    datasets.disable_progress_bars() if not sys.stderr.isatty() else None
    summary = train(arguments)
    if Accelerator().is_main_process:
        print(format_summary(summary))
        seconds = summary["seconds"]["total"]
        print(f"  {summary['epochs']} epochs, {seconds} s; written to {arguments.output_dir}")


if __name__ == "__main__":
    main()
