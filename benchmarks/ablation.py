"""
What each part of the method is worth on LeakZoo: the bundled recipe against itself with one thing changed.

    python benchmarks/ablation.py [--num_train_epochs N]
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from protoleak.train import TrainingArguments, train

HERE = Path(__file__).parent.parent
VARIANTS = {
    "the bundled recipe": {},
    "open-set score of the paper: KDE of embeddings": {
        "open_set_score": "kde",
        "open_set_features": "embeddings",
    },
    "t = 0 alone": {"timesteps": [0]},
    "two timesteps, 0 100": {"timesteps": [0, 100]},
    "mean pooling, as in the paper": {"pooling": "mean"},
}


def main() -> None:
    epochs = (
        int(sys.argv[2]) if sys.argv[1:2] == ["--num_train_epochs"] else TrainingArguments.num_train_epochs
    )
    print("| variant | Macro AUC | accuracy | open-set AUROC | epochs | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name, overrides in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe"
            shutil.copytree(HERE / "vae", recipe / "vae")
            shutil.copy(HERE / "preprocessor_config.json", recipe)
            config = json.loads((HERE / "config.json").read_text()) | overrides
            (recipe / "config.json").write_text(json.dumps(config))
            summary = train(
                TrainingArguments(
                    config_name=str(recipe), output_dir=f"{folder}/run", num_train_epochs=epochs
                )
            )
        cells = [
            f"{summary['figures'][figure]:.3f} [{summary['intervals'][figure][0]:.3f}, "
            f"{summary['intervals'][figure][1]:.3f}]"
            for figure in ("macro_auc", "accuracy", "auroc")
        ]
        seconds = summary["seconds"]["total"]
        print(f"| {name} | {' | '.join(cells)} | {summary['epochs']} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
