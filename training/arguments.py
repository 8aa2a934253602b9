"""What a training run depends on."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).parent.parent  # the package, which is a checkpoint too


@dataclass
class TrainingArguments:
    """Everything that a run depends on."""

    dataset_name: list[str] = field(
        default_factory=lambda: [str(ROOT / "leakzoo")],
        metadata={
            "help": "Hub id or folder that `load_dataset` takes, or a folder with Closed_Set/<generator>/; "
            "of several, the splits are joined."
        },
    )
    source_column: str = field(
        default="source",
        metadata={
            "help": "Column that tells where an image comes from. With it a new model is chosen and "
            "calibrated on sources left out, and validation images are learned from too."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from. By default weights are new."}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Where a new model's config, image processor and VAE come from: by default the bundled "
            "checkpoint, for LeakZoo alone its own recipe."
        },
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
    thumbnails: bool = field(
        default=False, metadata={"help": "Keep small pictures of training images, for reports."}
    )
    bootstrap_resamples: int = field(
        default=300, metadata={"help": "Resamples of the test images that the metrics' intervals come from."}
    )
    mixed_precision: str = field(default="no", metadata={"help": "no, fp16 or bf16."})
    report_to: str | None = field(
        default=None, metadata={"help": "A tracker of Accelerate, such as tensorboard or wandb."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Hub id that the finished checkpoint is uploaded to."}
    )
    seed: int = field(default=0, metadata={"help": "Fixes initial weights, batches and noise."})

    @property
    def recipe(self) -> str:
        """Where a new model's config, image processor and VAE come from."""
        own = ROOT / "leakzoo" / "recipe" if self.dataset_name == [str(ROOT / "leakzoo")] else ROOT
        return self.config_name or str(own)

    @property
    def command(self) -> str:
        """What is typed for this run: every argument that isn't the default."""
        defaults = TrainingArguments()
        words = ["python", "train.py"]
        for name in (f.name for f in fields(self)):
            if (value := getattr(self, name)) != getattr(defaults, name):
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return shlex.join(words)
