"""
Unknown generators of LeakZoo before and after enrolling 10 of their images; figures on the other 70.

    python benchmarks/enroll.py [GENERATOR]
"""

import sys
from pathlib import Path

import torch
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.evaluation.splits import load_splits

HERE = Path(__file__).parent.parent
ENROLLED = 10


@torch.no_grad()
def main() -> None:
    splits = load_splits(str(HERE / "leakzoo"))
    model = ProtoLeakForImageAttribution.from_pretrained(HERE)
    processor = ProtoLeakImageProcessor.from_pretrained(HERE)
    names = sorted(set(splits["unknown"]["label"])) if len(sys.argv) < 2 else sys.argv[1:]

    def outputs(rows):
        return model(processor([image["bytes"] for image in rows["image"]])["pixel_values"])

    for name in names:
        rows = splits["unknown"].filter(lambda row, name=name: row["label"] == name)
        few, rest = rows.select(range(ENROLLED)), rows.select(range(ENROLLED, len(rows)))
        test = splits["test"]
        before = outputs(rest).p_values
        known_before = outputs(test)
        model.enroll(name, outputs(few))
        after, known_after = outputs(rest), outputs(test)
        column, alpha = model.config.label2id[name], model.config.alpha
        labels = torch.tensor([model.config.label2id[label] for label in test["label"]])
        recognised = ((after.logits.argmax(1) == column) & (after.p_values > alpha)).double().mean()
        accuracies = [(o.logits.argmax(1) == labels).double().mean() for o in (known_before, known_after)]
        print(
            f"{name}: rejected before {(before <= alpha).double().mean():.2f}; after {ENROLLED} images "
            f"rejected {(after.p_values <= alpha).double().mean():.2f}, recognised {recognised:.2f}; "
            f"accuracy on the known classes {accuracies[0]:.3f}, then {accuracies[1]:.3f}"
        )
        model = ProtoLeakForImageAttribution.from_pretrained(HERE)


if __name__ == "__main__":
    main()
