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
import importlib.util
import json
import logging
import math
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi
from protoleak import ProtoLeakConfig, ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.checkpoint_protoleak import has_vae_folder, load_autoencoder, load_vae
from protoleak.evaluation.predictions import predict
from protoleak.evaluation.protocol import Evaluation, evaluate_model
from protoleak.evaluation.report import format_summary
from protoleak.evaluation.splits import load_splits
from protoleak.files_protoleak import whole_folder, write_whole
from protoleak.training.card import write_card
from protoleak.training.latents import RandomView, content_key, encode_split
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import HfArgumentParser

HERE = Path(__file__).parent
STATE_FILE = "training_state.pt"  # in output_dir, while a run is not finished
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
    num_train_epochs: int = field(default=40, metadata={"help": "Epochs at most."})
    patience: int = field(
        default=10, metadata={"help": "Epochs without a better validation loss before it stops."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images a step and process."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak of AdamW's learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Gradients are clipped to this norm."})
    ema_decay: float = field(default=0.98, metadata={"help": "Of the moving average of the weights."})
    orientations: int = field(
        default=8, metadata={"help": "Cached views of a training image: 1, 2 (mirrored) or 8 (and turned)."}
    )
    augmented_views: int = field(
        default=8,
        metadata={
            "help": "More cached views of a training image: post-processed by 1 to 3 random operators."
        },
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


@torch.no_grad()
def begin_as_discriminant(
    model: ProtoLeakForImageAttribution, train: RandomView, validation: TensorDataset,
    most_samples: int = 10_000,
) -> None:  # fmt: skip
    """
    Make a new network a shrunk linear discriminant of its pooled features, from where it learns on: the
    projection's first dimensions are those that tell the classes apart, in units in which a class has unit
    covariance, and all prototypes of a class begin near its mean. Classes count alike, however many images
    they have. Shrinkage and scale are those that make the validation images likeliest.

    Args:
        model, train, validation: As in [`fit`].
        most_samples (`int`): Views of training images, their crops counted one by one, that are looked at.
    """
    encoder, num_labels = model.protoleak.encoder, model.config.num_labels

    def pooled(views: list[TensorDataset], together: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Features averaged over timesteps, and over crops if `together`, (n, F), and labels (n,)"""
        features, labels = [], []
        for latents, targets in DataLoader(torch.utils.data.ConcatDataset(views), 64):
            noisy = model.protoleak.simulate(latents.flatten(0, -4))
            count = len(latents) if together else len(noisy)
            made = encoder.pool(noisy.flatten(0, 1))[0]
            features.append(made.unflatten(0, (count, -1)).mean(dim=1).cpu())
            labels.append(targets.repeat_interleave(count // len(targets)))
        return torch.cat(features), torch.cat(labels)

    crops = math.prod(train.views[0].tensors[0].shape[1:-3])
    order = torch.randperm(len(train))
    of_class = torch.nn.functional.one_hot(train.views[0].tensors[1][order], num_labels)
    rank = (of_class.cumsum(dim=0) * of_class).sum(dim=1)  # the how-manieth of its class an image is
    most_images = max(num_labels, most_samples // crops)
    order = order[rank.argsort(stable=True)[:most_images].sort().values]  # no class is missed
    count = max(1, min(len(train.views), most_samples // (len(order) * crops)))
    places = np.linspace(0, len(train.views) - 1, count).round().astype(int)
    seen = [torch.utils.data.Subset(train.views[place], order) for place in places]
    model.train()
    pooled(seen[:1], together=False)  # settles the statistics of the backbone's norms
    model.eval()
    (features, labels), (held_out, targets) = pooled(seen, False), pooled([validation], True)
    start = model.initialise_as_discriminant(features, labels, held_out, targets)
    logger.info("begins as a discriminant, shrinkage %(shrinkage)s, validation loss %(loss).3f", start)


def fit(
    model: ProtoLeakForImageAttribution, train: torch.utils.data.Dataset, validation: TensorDataset,
    arguments: TrainingArguments, accelerator: Accelerator,
) -> list[dict[str, float]]:  # fmt: skip
    """
    Train in place. Validated and kept are moving averages of the weights; those at the end are of the epoch
    with the lowest validation loss. Returns the history.

    After each epoch the state goes to `output_dir`, and a run with the same arguments goes on from there. All
    that is random is seeded anew in each epoch, so that it ends with the weights of a run that never stopped.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, arguments.learning_rate, weight_decay=arguments.weight_decay)
    order = torch.Generator()
    loader = DataLoader(train, arguments.batch_size, shuffle=True, generator=order)
    steps = arguments.num_train_epochs * math.ceil(len(loader) / accelerator.num_processes)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, steps))
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    average = EMAModel(parameters, decay=arguments.ema_decay, use_ema_warmup=True, power=1.0)
    state = TrainingState(Path(arguments.output_dir) / STATE_FILE, arguments, accelerator)
    history, best_weights = state.load(model, optimizer, schedule, average)
    if not history:  # row 0 is the start
        history = [{"epoch": 0, **_validate(wrapped, validation, accelerator)}]
        best_weights = _network_weights(model)
    bar = tqdm(
        range(len(history), arguments.num_train_epochs + 1),
        initial=len(history) - 1,
        total=arguments.num_train_epochs,
        desc="epochs",
        disable=not accelerator.is_main_process,
    )
    for epoch in bar:
        best = min(history, key=lambda r: r["validation_loss"])
        if epoch - 1 - best["epoch"] >= arguments.patience:
            break
        set_seed(arguments.seed + 1_000_003 * (epoch + 1), device_specific=True)
        order.manual_seed(arguments.seed + epoch)
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
            average.step(parameters)
            losses.append(loss.item())
        average.store(parameters)
        average.copy_to(parameters)
        row = {"epoch": epoch, "train_loss": float(np.mean(losses))}
        row |= _validate(wrapped, validation, accelerator)
        history.append(row)
        accelerator.log(row, step=epoch)
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items() if name != "epoch"})
        if not math.isfinite(row["train_loss"]):
            raise ValueError(f"the loss became {row['train_loss']} in epoch {epoch}; lower learning_rate")
        if row["validation_loss"] < best["validation_loss"]:
            best_weights = _network_weights(model)
        average.restore(parameters)
        state.save(model, optimizer, schedule, average, history, best_weights)
    model.load_state_dict(best_weights)
    return history


def _validate(model, validation: TensorDataset, accelerator: Accelerator) -> dict[str, float]:
    made = predict(model, validation, accelerator)
    truth = made.probabilities[np.arange(len(made.labels)), made.labels]
    return {
        "validation_loss": float(-np.log(truth.clip(1e-12)).mean()),
        "validation_accuracy": float((made.probabilities.argmax(axis=1) == made.labels).mean()),
    }


class TrainingState:
    """
    Where a run stands after an epoch, on disk.

    Args:
        path (`Path`): Of the file; it is written under another name and moved.
        arguments ([`TrainingArguments`]): Of the run; a state of other ones, or of another number of
            processes, is passed over.
        accelerator (`Accelerator`): Its main process writes.
    """

    def __init__(self, path: Path, arguments: TrainingArguments, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator
        facts = [dataclasses.asdict(arguments), accelerator.num_processes, torch.__version__]
        self.run = json.dumps(facts, sort_keys=True)

    def load(
        self, model, optimizer, schedule, average
    ) -> tuple[list[dict[str, float]], dict[str, torch.Tensor] | None]:
        """Bring everything to the state on disk; its history and best weights, empty where there is none."""
        if not self.path.exists():
            return [], None
        try:
            state = torch.load(self.path, map_location=self.accelerator.device, weights_only=True)
        except Exception as error:  # torch and pickle raise many kinds for a damaged file
            raise ValueError(
                f"{self.path} can't be read: {error}; delete it to train from the start"
            ) from error
        if state["run"] != self.run:
            logger.warning("%s is of a run with other arguments; training starts anew", self.path)
            return [], None
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average.load_state_dict(state["average"])
        logger.info("going on after epoch %d of %s", len(state["history"]), self.path)
        return state["history"], state["best_weights"]

    def save(self, model, optimizer, schedule, average, history, best_weights) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "run": self.run,
            "weights": _network_weights(model),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "average": average.state_dict(),
            "history": history,
            "best_weights": best_weights,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda partial: torch.save(state, partial))


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _network_weights(model: ProtoLeakForImageAttribution) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(arguments: TrainingArguments) -> dict[str, Any]:
    """
    Train, fit the detector, write the checkpoint to `output_dir`, and return the summary.
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
    views = [{"orientation": i} for i in range(arguments.orientations)]
    views += [
        {"orientation": i % arguments.orientations, "operator": f"step{1 + i % 3}", "seed": i}
        for i in range(arguments.augmented_views)
    ]
    key = content_key(splits["train"], model, processor)
    seen = RandomView(
        [
            encode_split(splits["train"], label_names, model, processor, accelerator, key=key, **view)
            for view in views
        ]
    )
    data["train"] = seen.views[0]
    if arguments.augmented_views:  # what is learned from is also what weights are kept by, and what is known
        view = {"operator": "step2", "seed": arguments.seed}
        processed = encode_split(splits["validation"], label_names, model, processor, accelerator, **view)
        data["validation"] = _joined(data["validation"], processed)
        augmented = seen.views[arguments.orientations :]
        one_each = [augmented[i % len(augmented)][i] for i in range(len(seen))]
        data["train"] = _joined(data["train"], TensorDataset(*map(torch.stack, zip(*one_each, strict=True))))
    if model.protoleak.whitening is not None and not arguments.model_name_or_path:
        model.protoleak.whitening.fit(seen.views[0].tensors[0])
    encoded = time.perf_counter()
    if not arguments.model_name_or_path:
        begin_as_discriminant(model, seen, data["validation"])
    begun = time.perf_counter()
    history = fit(model, seen, data["validation"], arguments, accelerator)
    trained = time.perf_counter()
    known = {split: predict(model, data[split], accelerator) for split in ("train", "validation")}
    model.fit_detector(known["train"], known["validation"])
    pictures = splits["train"]["image"]
    model.keep_thumbnails(lambda i: (one := pictures[i % len(pictures)])["bytes"] or one["path"])
    unknown_names = splits["unknown"]["label"] if "unknown" in splits else None
    summary = {
        "dataset": " and ".join(Path(name).name for name in arguments.dataset_name),
        "epochs": len(history) - 1,
        **evaluate_model(model, data["test"], data.get("unknown"), accelerator, unknown_names).to_dict(),
        "history": history,
    }
    summary["seconds"] = {
        "encoding": round(encoded - started, 1),
        "discriminant": round(begun - encoded, 1),
        "training": round(trained - begun, 1),
        "total": round(time.perf_counter() - started, 1),
    }
    if accelerator.is_main_process:
        save(model, processor, summary, arguments)
        (Path(arguments.output_dir) / STATE_FILE).unlink(missing_ok=True)
        if arguments.push_to_hub:
            hub = HfApi()
            hub.create_repo(arguments.push_to_hub, exist_ok=True)
            hub.upload_folder(repo_id=arguments.push_to_hub, folder_path=arguments.output_dir)
    accelerator.end_training()
    return summary


def _joined(*parts: TensorDataset) -> TensorDataset:
    return TensorDataset(*map(torch.cat, zip(*(part.tensors for part in parts), strict=True)))


def save(
    model: ProtoLeakForImageAttribution,
    processor: ProtoLeakImageProcessor,
    summary: dict[str, Any],
    arguments: TrainingArguments,
) -> None:
    """Write a checkpoint that every loader takes, with its figures in metrics.json and in its card."""
    folder = Path(arguments.output_dir)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n")
        if importlib.util.find_spec("matplotlib"):
            from protoleak.forensics.figures import draw_evaluation, save_figures

            save_figures(draw_evaluation(Evaluation.from_dict(summary), model.detector), partial / "figures")
    origin = f"Trained on {summary['dataset']} for {summary['epochs']} epochs."
    write_card(folder, model, origin, _command(arguments), summary)


def _command(arguments: TrainingArguments) -> str:
    changed = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
    defaults = TrainingArguments()
    words = ["python", "train.py"]
    for name, value in changed.items():
        if value != getattr(defaults, name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def main() -> None:
    arguments = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()[0]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    datasets.disable_progress_bars() if not sys.stderr.isatty() else None
    summary = train(arguments)
    if Accelerator().is_main_process:
        print(format_summary(Evaluation.from_dict(summary).main))
        seconds = summary["seconds"]["total"]
        print(f"  {summary['epochs']} epochs, {seconds} s; written to {arguments.output_dir}")


if __name__ == "__main__":
    main()
