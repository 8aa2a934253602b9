"""
Every loader on every kind of checkpoint, each kind in a fresh process and offline: the largest score
difference.

    python tests/hub_matrix.py [CHECKPOINT]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
LOADERS = (
    "package",
    "AutoModelForImageClassification",
    "AutoModel",
    "image-attribution",
    "image-classification",
    "DiffusionPipeline",
)
HUB_ID = "org/protoleak"


def scores_by_loader(source: str, image: str) -> dict[str, dict[str, float]]:
    """Class probabilities (and the open-set score, where a loader gives it) of one image by every loader."""
    import protoleak
    import torch
    from diffusers import DiffusionPipeline
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

    trust = {"trust_remote_code": True}

    def of_output(model, output) -> dict[str, float]:
        probabilities = output.logits[0].double().softmax(dim=0).tolist()
        names = [model.config.id2label[k] for k in range(len(probabilities))]
        return dict(zip(names, probabilities, strict=True)) | {
            "open_set_score": float(output.open_set_score[0])
        }

    def of_record(record) -> dict[str, float]:
        return {a["label"]: a["score"] for a in record["attributions"]} | {
            "open_set_score": record["open_set_score"]
        }

    found = {}
    with torch.no_grad():
        model = protoleak.ProtoLeakForImageAttribution.from_pretrained(source)
        processor = protoleak.ProtoLeakImageProcessor.from_pretrained(source)
        found["package"] = of_output(model, model(**processor(image)))
        auto = AutoModelForImageClassification.from_pretrained(source, **trust)
        processor = AutoImageProcessor.from_pretrained(source, **trust)
        found["AutoModelForImageClassification"] = of_output(auto, auto(**processor(image)))
        base = AutoModel.from_pretrained(source, **trust)(**processor(image))
        logits = model.head(base.embeddings, base.gates) / model.detector.temperature_
        verdict = model.detector.verdict({**base, "logits": logits})
        found["AutoModel"] = of_output(model, SimpleNamespace(**verdict, logits=logits))
    found["image-attribution"] = of_record(pipeline("image-attribution", model=source, **trust)(image))
    records = pipeline("image-classification", model=source, **trust)(image, top_k=1000)
    found["image-classification"] = {record["label"]: record["score"] for record in records}
    found["DiffusionPipeline"] = of_record(
        DiffusionPipeline.from_pretrained(source, **trust)(image).records[0]
    )
    return found


def simulate_hub_cache(checkpoint: Path, hf_home: Path) -> str:
    """Lay a checkpoint out as the Hub cache has it; returns the id under which it loads."""
    repository = hf_home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(
        checkpoint, repository / "snapshots" / commit, ignore=shutil.ignore_patterns(".git", "leakzoo")
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return HUB_ID


def make_kinds(checkpoint: Path, folder: Path, dataset: str, enroll: list[str]) -> dict[str, str]:
    """The five kinds of checkpoint, made from one: name to what a loader is given."""
    from diffusers import DiffusionPipeline
    from protoleak.cli import main
    from protoleak.train import TrainingArguments, train

    pipe = DiffusionPipeline.from_pretrained(str(checkpoint), trust_remote_code=True)
    pipe.save_pretrained(folder / "re-saved")
    train(
        TrainingArguments(
            dataset_name=[dataset],
            model_name_or_path=str(checkpoint),
            output_dir=str(folder / "fine-tuned"),
            num_train_epochs=1,
            orientations=1,
            augmented_views=0,
        )
    )
    main(
        ["enroll", "newcomer", *enroll, "--model", str(checkpoint), "--output_dir", str(folder / "enrolled")]
    )
    kinds = {"local": str(checkpoint), "Hub cache": simulate_hub_cache(checkpoint, folder / "hf")}
    return kinds | {kind: str(folder / kind) for kind in ("re-saved", "fine-tuned", "enrolled")}


def differences(kinds: dict[str, str], image: str, hf_home: Path) -> dict[str, dict[str, float]]:
    """
    For every kind and loader the largest difference from what the package gives; one fresh process a kind.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hf_home)}
    table = {}
    for kind, source in kinds.items():
        run = subprocess.run(
            [sys.executable, __file__, "--scores", source, image],
            env=environment,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise RuntimeError(f"{kind}: {run.stderr}")
        found = json.loads(run.stdout.splitlines()[-1])
        reference = found["package"]
        table[kind] = {
            loader: max(abs(value - reference[name]) for name, value in found[loader].items())
            for loader in LOADERS
        }
    return table


def main() -> None:
    if sys.argv[1:2] == ["--scores"]:
        print(json.dumps(scores_by_loader(*sys.argv[2:])))
        return
    checkpoint = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT).resolve()
    images = sorted(str(path) for path in (ROOT / "examples").glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        kinds = make_kinds(checkpoint, Path(folder), str(ROOT / "leakzoo"), images[-3:])
        table = differences(kinds, images[0], Path(folder) / "hf")
    print("| loader | " + " | ".join(table) + " |")
    print("| --- " * (len(table) + 1) + "|")
    for loader in LOADERS:
        print(f"| {loader} | " + " | ".join(f"{table[kind][loader]:.1e}" for kind in table) + " |")


if __name__ == "__main__":
    main()
