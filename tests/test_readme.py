"""README's snippets do what README says: each is taken from README and run in a copy of the repository."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info"))
    return folder


def snippet(snippets: list[str], marker: str) -> str:
    """The one snippet that has the marker."""
    found = [text for text in snippets if marker in text]
    assert len(found) == 1, f"README should have one snippet with {marker!r}, and has {len(found)}"
    return found[0]


def run(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("marker", "printed"),
    [
        ("transformers import pipeline", "0."),
        ("AutoModelForImageClassification", "tensor"),
        ("DiffusionPipeline", "torch.Size([2,"),
        ("evaluate.load", "'macro_auc': 1.0"),
    ],
)
def test_a_python_snippet(copy, marker, printed):
    assert printed in run([sys.executable, "-c", snippet(PYTHON, marker)], copy)


def test_publishing_uploads_the_checkpoint(monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **k: calls.append((a, k)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, *a, **k: calls.append((a, k)))
    exec(snippet(PYTHON, "upload_folder"), {})
    assert calls[1] == ((), {"repo_id": "you/your-model", "folder_path": "runs/mine"})


def test_the_first_command_attributes_the_examples(copy):
    install, command = snippet(SHELL, "protoleak attribute examples/").strip().split(" && ")
    assert install == "pip install -e ."
    output = run(command.split(), copy)
    files = sorted(path.name for path in (copy / "examples").iterdir())
    assert len(files) >= 12
    assert [line.split()[0] for line in output.splitlines()] == files
    assert output.strip() in README, "README shows what the command prints"


def test_training_and_enrolling_commands(copy):
    """FOLDER is a small data set, IMAGES and NAME some of the examples."""
    for split, count in {"train": 4, "validation": 2, "test": 2}.items():
        for label in ("real", "mine"):
            (copy / "FOLDER" / split / label).mkdir(parents=True)
            for i in range(count):
                example = sorted((copy / "examples").iterdir())[i + (label == "mine")]
                shutil.copy(example, copy / "FOLDER" / split / label / f"{i}.png")
    examples = " ".join(f"examples/{path.name}" for path in sorted((copy / "examples").iterdir())[:3])
    markers = ("train.py --dataset_name", "--dataset_name leakzoo FOLDER", "protoleak enroll")
    for command in "".join(snippet(SHELL, marker) for marker in markers).strip().splitlines():
        command = re.sub(r"IMAGES(\.\.\.)?", examples, command).replace("python ", f"{sys.executable} ")
        short = " --num_train_epochs 1 --orientations 1 --augmented_views 0"
        command += short if "train.py" in command else ""
        run(command.split(), copy)
    assert (copy / "runs/mine/README.md").exists()
    assert (copy / "runs/enrolled/density.pkl").exists()
    labels = json.loads((copy / "runs/more/config.json").read_text())["id2label"].values()
    assert {"real", "ldm", "mine"} < set(labels)


def test_folder_reason_and_export_commands(copy):
    (copy / "FOLDER2").mkdir()
    for path in sorted((copy / "examples").iterdir())[:2]:
        shutil.copy(path, copy / "FOLDER2")
    scan = snippet(SHELL, "--table records.csv").strip().replace("FOLDER", "FOLDER2")
    run(scan.split(), copy)
    assert len((copy / "records.jsonl").read_text().splitlines()) == 2
    assert len((copy / "records.csv").read_text().splitlines()) == 3
    explain, report, page = snippet(SHELL, "protoleak explain").strip().splitlines()
    assert "attention over timesteps" in run(explain.split(), copy)
    assert "13 images, 0 of which" in run(report.split(), copy)
    assert page == "python app.py"  # test_app.py starts it
    run(snippet(SHELL, "protoleak export").strip().split(), copy)
    assert (copy / "runs/model.onnx").stat().st_size > 1_000_000


def test_the_figures_are_those_of_the_bundled_checkpoint():
    measured = json.loads((ROOT / "metrics.json").read_text())["splits"]["test"]
    for name in ("macro_auc", "accuracy", "real_auroc", "auroc", "false_unknown_rate", "unknown_rejected"):
        low, high = measured["intervals"][name]
        assert f"| {measured['metrics'][name]:.3f} [{low:.3f}, {high:.3f}] |" in README, name


def test_measuring_commands(copy):
    for command in snippet(SHELL, "protoleak evaluate").strip().splitlines():
        assert run(command.split(), copy).startswith(("560 test images", "| operator"))
    assert {path.name for path in (copy / "runs/figures").iterdir()} == {
        "evaluation.json", "evaluation.md", "robustness.json", "robustness.md", "robustness.png", "figures",
    }  # fmt: skip
