"""
The paper's headline experiment, for whoever has WILD (Kaggle, pietrob92): Stable Diffusion 2.1's VAE at 256
pixels, ResNet-18, closed and open set, untouched and post-processed images.

    python benchmarks/wild.py PATH [--output_dir runs/wild] [any argument of train.py]

PATH holds Closed_Set/<generator>/ and Open_Set/<generator>/, with folders step1, step2, step3 of processed
images below where there are any. Images that share a number in their names are of one prompt and never go to
different splits: 50 % of the prompts train, 20 % validate, 30 % test.
"""

import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from protoleak import ProtoLeakConfig, ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.evaluation.metrics import compute_metrics
from protoleak.evaluation.predictions import predict_splits
from protoleak.evaluation.splits import load_splits
from protoleak.train import train
from protoleak.training.arguments import TrainingArguments
from transformers import HfArgumentParser

PAPER = 0.9813  # Macro AUC, closed set (arXiv 2511.04260)
DEFAULTS = "--output_dir runs/wild --learning_rate 3e-4 --orientations 1"
STEPS = ("step1", "step2", "step3")


def paper_recipe(folder: Path) -> Path:
    """The paper's setting, as a configuration to train a new model by."""
    ProtoLeakConfig().save_pretrained(folder)
    ProtoLeakImageProcessor(crop_size=256, do_resize=True).save_pretrained(folder)
    return folder


def treatment(path: str) -> str:
    """ "step1" to "step3" by the folder that an image lies in, or "untouched"."""
    return next((part for part in Path(path).parts if part in STEPS), "untouched")


def by_treatment(arguments: TrainingArguments) -> list[dict]:
    """Metrics of the trained checkpoint on all test images, and on those of each treatment."""
    model = ProtoLeakForImageAttribution.from_pretrained(arguments.output_dir)
    processor = ProtoLeakImageProcessor.from_pretrained(arguments.output_dir)
    splits, accelerator = load_splits(arguments.dataset_name, arguments.seed), Accelerator()
    model.to(accelerator.device)
    names = model.config.label_names
    shown = {split: splits[split] for split in ("test", "unknown") if split in splits}
    made = predict_splits(model, processor, shown, accelerator)
    treatments = {s: np.array([treatment(i["path"]) for i in part["image"]]) for s, part in shown.items()}
    rows = []
    for name in ("all", "untouched", *STEPS):
        chosen = {
            s: p if name == "all" else p.take(np.flatnonzero(treatments[s] == name)) for s, p in made.items()
        }
        if len(set(chosen["test"].labels.tolist())) < len(names):
            continue  # no such images of some class
        unknown = chosen.get("unknown")
        unknown = unknown if unknown is not None and len(unknown.labels) else None
        values = compute_metrics(chosen["test"], unknown, names, model.config.alpha)
        rows.append({"images": name, "count": len(chosen["test"].labels)} | values)
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        sys.exit(__doc__)
    path, *rest = argv
    arguments = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--dataset_name", path, *DEFAULTS.split(), *rest]
    )[0]
    if "--config_name" not in rest:
        arguments.config_name = str(paper_recipe(Path(arguments.output_dir) / "recipe"))
    train(arguments)
    rows = by_treatment(arguments)
    print("| test images | count | Macro AUC | paper | accuracy | open-set AUROC | FPR95 | EER |")
    print("| --- " * 8 + "|")
    for row in rows:
        paper = f"{PAPER:.4f}" if row["images"] == "all" else ""
        values = [f"{row[k]:.4f}" if k in row else "" for k in ("accuracy", "auroc", "fpr95", "eer")]
        cells = [row["images"], str(row["count"]), f"{row['macro_auc']:.4f}", paper, *values]
        print(f"| {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    main()
