"""
Which open-set score to use, chosen on known classes alone: each known generator in turn is left out of
training and taken for the unknown one. LeakZoo's own unknown split is not looked at.

    python benchmarks/open_set.py [--num_train_epochs N]
"""

import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
from accelerate import Accelerator
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.data_protoleak import encode_split, load_splits
from protoleak.evaluation_protoleak import REAL, open_set_table, predict
from protoleak.train import TrainingArguments, train

HERE = Path(__file__).parent.parent


def leave_out(name: str, folder: Path) -> None:
    """LeakZoo without one generator, whose test images become the unknown split."""
    splits = load_splits(str(HERE / "leakzoo"))
    for split in ("train", "validation", "test", "unknown"):
        rows = splits["test" if split == "unknown" else split]
        kept = [i for i, label in enumerate(rows["label"]) if (label == name) == (split == "unknown")]
        rows = rows.select(kept).cast_column("image", datasets.Image())
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def main() -> None:
    epochs = int(sys.argv[2]) if sys.argv[1:2] == ["--num_train_epochs"] else 40
    names = sorted(set(load_splits(str(HERE / "leakzoo"))["test"]["label"]) - {REAL})
    found: dict[str, list[float]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            leave_out(name, Path(folder))
            run = f"{folder}/run"
            train(TrainingArguments(dataset_name=[folder], output_dir=run, num_train_epochs=epochs))
            model = ProtoLeakForImageAttribution.from_pretrained(run)
            processor = ProtoLeakImageProcessor.from_pretrained(run)
            labels = model.config.label_names
            splits, accelerator = load_splits(folder), Accelerator()
            known, unknown = (
                predict(model, encode_split(splits[s], labels, model, processor, accelerator), accelerator)
                for s in ("test", "unknown")
            )
            for score, figures in open_set_table(model, known, unknown).items():
                found.setdefault(score, []).append(figures["auroc"])
    print(f"| open-set score | mean AUROC | without {' | '.join(names)} |")
    print("| --- " * (len(names) + 2) + "|")
    for score, values in sorted(found.items(), key=lambda item: -np.mean(item[1])):
        print(f"| {score} | {np.mean(values):.3f} | {' | '.join(f'{v:.3f}' for v in values)} |")


if __name__ == "__main__":
    main()
