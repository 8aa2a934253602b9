"""
Unknown generators of LeakZoo before and after enrolling 10 of their images; metrics of the other 70.

    python benchmarks/enroll.py [GENERATOR ...]
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.evaluation.splits import load_splits

HERE = Path(__file__).parent.parent
MODEL = HERE / "runs" / "leakzoo"  # python train.py --output_dir runs/leakzoo
ENROLLED = 10


def share(condition: torch.Tensor) -> float:
    return condition.double().mean().item()


@torch.no_grad()
def measure(name: str, splits: dict[str, Dataset], processor: ProtoLeakImageProcessor) -> dict[str, float]:
    """Shares of a generator's other images, and the accuracy on known classes, before and after."""
    model = ProtoLeakForImageAttribution.from_pretrained(MODEL)

    def outputs(rows: Dataset):
        return model(processor([image["bytes"] for image in rows["image"]])["pixel_values"])

    rows = splits["unknown"].filter(lambda row: row["label"] == name)
    few, rest, test = rows.select(range(ENROLLED)), rows.select(range(ENROLLED, len(rows))), splits["test"]
    before, known_before = outputs(rest), outputs(test)
    model.enroll(name, outputs(few))
    after, known_after = outputs(rest), outputs(test)
    index, alpha = model.config.label2id, model.config.alpha
    labels = torch.tensor([index[label] for label in test["label"]])
    return {
        "rejected before": share(before.p_values <= alpha),
        "rejected after": share(after.p_values <= alpha),
        "recognised after": share((after.logits.argmax(1) == index[name]) & (after.p_values > alpha)),
        "accuracy on the known classes, before": share(known_before.logits.argmax(1) == labels),
        "after": share(known_after.logits.argmax(1) == labels),
    }


def main() -> None:
    splits = load_splits(str(HERE / "leakzoo"))
    processor = ProtoLeakImageProcessor.from_pretrained(MODEL)
    for number, name in enumerate(sys.argv[1:] or sorted(set(splits["unknown"]["label"]))):
        row = measure(name, splits, processor)
        if number == 0:
            print(f"| generator | {' | '.join(row)} |")
            print("| --- " * (len(row) + 1) + "|", flush=True)
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in row.values())} |", flush=True)


if __name__ == "__main__":
    main()
