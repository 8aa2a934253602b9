"""What a training run depends on."""

import os
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..evaluation.columns import Columns

ROOT = Path(__file__).parent.parent  # the package, which is a checkpoint too


@dataclass
class TrainingArguments:
    """Everything that a run depends on."""

    dataset_name: list[str] = field(
        default_factory=lambda: [str(ROOT / "leakzoo")],
        metadata={
            "help": "Hub id or folder that `load_dataset` takes, a folder that `save_to_disk` wrote, or one "
            "with Closed_Set/<generator>/; of several, the splits are joined."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, where it has several."}
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "By default `image`, or the only column of images."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "By default `label`, `labels`, or the only column of classes."}
    )
    source_column: str = field(
        default="source",
        metadata={
            "help": "Column that tells where an image comes from. With it a new model is chosen and "
            "calibrated on sources left out, and validation images are learned from too."
        },
    )
    skip_unreadable: bool = field(
        default=False, metadata={"help": "Go on without images that can't be read, and name them."}
    )
    normalise_format: bool = field(
        default=False,
        metadata={
            "help": "Encode every image as JPEG of quality 90 first, when training and from then on in every "
            "verdict, so that what the files were before tells less."
        },
    )
    scope: str | None = field(
        default=None,
        metadata={
            "help": "What kind of images the model is for, in your words; shown with every verdict beside "
            "what is counted of the training images."
        },
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Of the weights, for the card, as the Hub names it: mit, cc-by-4.0, other, ..."},
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
            "help": "More cached views of a training image: post-processed by random operators, or JPEG."
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
    private: bool = field(
        default=False, metadata={"help": "Make that repository a private one, if there is none yet."}
    )
    seed: int = field(default=0, metadata={"help": "Fixes initial weights, batches and noise."})

    @property
    def recipe(self) -> str:
        """Where a new model's config, image processor and VAE come from."""
        own = ROOT / "leakzoo" / "recipe" if self.dataset_name == [str(ROOT / "leakzoo")] else ROOT
        return self.config_name or str(own)

    @property
    def columns(self) -> Columns:
        """What the data set calls its columns."""
        return Columns(self.image_column_name, self.label_column_name, self.source_column)

    @property
    def data_titles(self) -> list[str]:
        """What the data sets are called where others read it: Hub ids, and names of folders."""
        return [public_name(name) for name in self.dataset_name]

    @property
    def command(self) -> str:
        """
        What is typed for this run: every argument that isn't the default. Of a path on this machine, the last
        name alone.
        """
        defaults = TrainingArguments()
        words = ["python", "train.py"]
        for name in (f.name for f in fields(self)):
            if (value := getattr(self, name)) != getattr(defaults, name):
                values = value if isinstance(value, list) else [value]
                words += [f"--{name}", *(without_place(str(v)) for v in values)]
        return shlex.join(words)


def is_local(name: str) -> bool:
    """Whether a data set or a model is a folder on this machine, and not a Hub id."""
    return os.path.exists(name) or name.startswith(("/", ".", "~")) or "\\" in name


def hub_id(name: str | None) -> str | None:
    """A Hub id as it is; `None` for a folder on this machine."""
    return None if name is None or is_local(name) else name


def public_name(name: str) -> str:
    """What a data set or a model is called where others read it: its Hub id, or its folder's name alone."""
    return Path(name).resolve().name if is_local(name) else name


def without_place(word: str) -> str:
    """A word of a command; of a path that tells where it lies on this machine, the last name alone."""
    tells = os.path.isabs(word) or word.startswith("~") or ".." in Path(word).parts
    return Path(word).name if tells else word
