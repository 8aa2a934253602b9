"""README and docs/ say what is so: each snippet is taken from its page and run in a copy of the clone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet
import pytest
from protoleak import OpenSetDetector
from protoleak.cli import main
from protoleak.image_files_protoleak import find_images

from . import ROOT
from .fresh import Interpreter

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
LINKING = (
    *PAGES,
    *(ROOT / name / "README.md" for name in ("leakzoo", "wild", "evaluate_protoleak", "examples")),
)
LINKING += (ROOT / "benchmarks/RESULTS.md",)
TEST_COMMAND = 'pip install -e ".[test]" && pytest'
EXTRAS = {
    "demo": ["gradio"],
    "heif": ["pillow_heif"],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "provenance": ["c2pa"],
}
# a piece of each snippet, by which the tests below find it; none is left out
SNIPPETS = {
    "python": {
        "README.md": ["transformers import pipeline"],
        "usage.md": ["explain=True", "AutoModelForImageClassification", "DiffusionPipeline", "evaluate.load"],
        "publishing.md": ["upload_folder"],
        "training.md": ["Trainer"],
    },
    "bash": {
        "README.md": ["protoleak attribute examples/", TEST_COMMAND],
        "usage.md": ["--table records.csv", "protoleak explain", "protoleak export"],
        "training.md": [
            "train.py --dataset",
            "train.py --output_dir",
            "train.py --model",
            "protoleak enroll",
            "protoleak evaluate",
        ],
    },
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def snippet(name: str, marker: str, language: str = "bash") -> str:
    """The one snippet of a page that has the marker."""
    page = next(page for page in PAGES if page.name == name)
    texts = [text for text in blocks(page, language) if marker in text]
    assert len(texts) == 1, f"{name} should have one snippet with {marker!r}, and has {len(texts)}"
    return texts[0]


def extras_of(name: str, text: str) -> set[str]:
    """The extras that a page's section names before a snippet."""
    page = next(page for page in PAGES if page.name == name).read_text(encoding="utf-8")
    section = page[: page.index(text)].rsplit("\n## ", 1)[-1]
    return set(re.findall(r"extra `(\w+)`", section))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the clone, in which LeakZoo has every twentieth of its images: 7, 2 and 4 of each class."""
    folder = tmp_path_factory.mktemp("readme") / "protoleak"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info"))
    for path in (folder / "leakzoo").glob("*.parquet"):
        images = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(images.take(list(range(0, images.num_rows, 20))), path)
    return folder


@pytest.fixture(scope="module")
def run(copy, tmp_path_factory):
    """Runs a command in the copy as if no extra were installed but those that the snippet's section names."""
    interpreters = {}

    def run(command: list[str], extras: set[str] = frozenset()) -> str:
        missing = [module for extra in EXTRAS.keys() - extras for module in EXTRAS[extra]]
        key = tuple(sorted(missing))
        if key not in interpreters:
            interpreters[key] = Interpreter(tmp_path_factory.mktemp("interpreter"), copy.parent, missing)
        return interpreters[key].run(command, copy)

    yield run
    for interpreter in interpreters.values():
        interpreter.close()


@pytest.fixture(scope="module")
def leakzoo_model(copy, run) -> Path:
    """What the page's command trains on LeakZoo, in short."""
    run(in_short(snippet("training.md", "train.py --output_dir").strip()))
    return copy / "runs/leakzoo"


def in_short(command: str) -> list[str]:
    """
    A command's words; training sees one small crop of each image, for one epoch, and the model that an image
    is enrolled in is small.
    """
    if "train.py" in command:
        command += " --num_train_epochs 1 --orientations 1 --augmented_views 0 --bootstrap_resamples 20"
        command += " --crop_size 64"
    return (command + (" --model runs/leakzoo" if "enroll " in command else "")).split()


@pytest.mark.parametrize("language", SNIPPETS)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_snippet_is_left_out(page, language):
    markers = SNIPPETS[language].get(page.name, [])
    assert len(blocks(page, language)) == len(markers)
    for marker in markers:
        snippet(page.name, marker, language)


def test_python_snippets(run):
    """One after the other in one process, README's first; none needs an extra."""
    expected = [
        ("README.md", "transformers import pipeline", "["),
        ("usage.md", "explain=True", "\n"),
        ("usage.md", "AutoModelForImageClassification", "tensor"),
        ("usage.md", "DiffusionPipeline", "torch.Size([2,"),
        ("usage.md", "evaluate.load", "'macro_auc': 1.0"),
    ]
    texts = [snippet(page, marker, "python") for page, marker, _ in expected]
    output = run(["python", "-c", "\n".join(f"exec({text!r}, {{}}); print('=====')" for text in texts)])
    for printed, (_, marker, wanted) in zip(output.split("=====\n"), expected, strict=False):
        assert wanted in printed, marker


def test_publishing_uploads_the_checkpoint(monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **k: calls.append((a, k)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, *a, **k: calls.append((a, k)))
    exec(snippet("publishing.md", "upload_folder", "python"), {})
    assert calls[1] == ((), {"repo_id": "you/your-model", "folder_path": "runs/mine"})


def test_the_first_commands_attribute_the_examples(copy, run):
    install, command = snippet("README.md", "protoleak attribute examples/").strip().splitlines()
    assert install == "pip install -e ."
    lines = run(command.split()).splitlines()
    files = [path.name for path in find_images([copy / "examples"])]
    assert [line.split()[0] for line in lines] == files
    assert len(files) == 10, "README says of how many lines it shows four"
    [shown] = re.findall(
        r"```\n(\w+\.(?:png|jpg) .*?)\n```", README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert set(shown.splitlines()) <= set(lines), "README shows what the command prints"
    assert len(shown.splitlines()) == 4
    named = [line for line in shown.splitlines() if "generated, by " in line]
    assert named == shown.splitlines()[:1], "README says that the first line is wrong"
    assert "photo" not in named[0]


def test_the_test_command_stands_where_ci_looks_for_it():
    look = "sed -n '/<!-- test command -->/,/```$/p' README.md | sed -n '/^pip install/p'"
    assert look in (ROOT / ".ci/run").read_text(encoding="utf-8")
    result = subprocess.run(["bash", "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == TEST_COMMAND


def test_training_and_enrolling_commands(copy, run, leakzoo_model):
    """FOLDER is a small data set, IMAGES and NAME some of the examples."""
    for split, count in {"train": 4, "validation": 2, "test": 2}.items():
        for label in ("real", "mine"):
            (copy / "FOLDER" / split / label).mkdir(parents=True)
            for i in range(count):
                example = find_images([copy / "examples"])[i + (label == "mine")]
                shutil.copy(example, copy / "FOLDER" / split / label / f"{i}.png")
    trainer = snippet("training.md", "Trainer", "python").replace('"."', '"runs/leakzoo"')
    run(["python", "-c", trainer.replace("epochs=3", "epochs=1")])
    detector = OpenSetDetector.load(copy / "runs/tuned/density.pkl")
    assert (detector.labels, len(detector.held_out_["labels"])) == (["mine", "real"], 4)
    examples = " ".join(f"examples/{path.name}" for path in find_images([copy / "examples"])[:3])
    markers = ("train.py --dataset", "train.py --model", "protoleak enroll")
    for command in "".join(snippet("training.md", marker) for marker in markers).strip().splitlines():
        run(in_short(re.sub(r"IMAGES(\.\.\.)?", examples, command)))
    assert (copy / "runs/mine/README.md").exists()
    assert (copy / "runs/enrolled/density.pkl").exists()
    labels = json.loads((copy / "runs/more/config.json").read_text())["id2label"].values()
    assert {"real", "ldm", "mine"} < set(labels)


def test_folder_reason_and_export_commands(copy, run):
    (copy / "FOLDER2").mkdir()
    for path in find_images([copy / "examples"])[:2]:
        shutil.copy(path, copy / "FOLDER2")
    scan = snippet("usage.md", "--table records.csv").strip().replace("FOLDER", "FOLDER2")
    run(scan.split())
    assert len((copy / "records.jsonl").read_text().splitlines()) == 2
    assert len((copy / "records.csv").read_text().splitlines()) == 3
    reasons = snippet("usage.md", "protoleak explain")
    explain, report, page = reasons.replace("examples/ ", "FOLDER2 ").strip().splitlines()
    extras = extras_of("usage.md", reasons)
    assert "attention over timesteps" in run(explain.split(), extras)
    assert "2 images, 0 of which" in run(report.split(), extras)
    assert page == "python app.py"  # test_app.py starts it
    export = snippet("usage.md", "protoleak export")
    run(export.split(), extras_of("usage.md", export))
    assert (copy / "runs/network.onnx").stat().st_size > 100_000


@pytest.mark.parametrize(
    "name",
    ["macro_auc", "accuracy", "real_auroc", "auroc", "set_coverage", "generated_called_camera"],
)
def test_the_figures_are_those_of_the_bundled_checkpoint(name):
    splits = json.loads((ROOT / "metrics.json").read_text())["splits"]
    cells = []
    for split in ("test", "cross"):
        low, high = splits[split]["intervals"][name]
        cells.append(f"{splits[split]['metrics'][name]:.3f} [{low:.3f}, {high:.3f}]")
    assert f"| {' | '.join(cells)} |" in README.read_text(encoding="utf-8")


def test_measuring_commands(copy, run, leakzoo_model):
    text = snippet("training.md", "protoleak evaluate")
    for command in text.strip().splitlines():
        printed = run(command.split(), extras_of("training.md", text))
        assert printed.startswith(("28 test images", "7 images of known classes"))
    assert {path.name for path in (copy / "runs/figures").iterdir()} == {
        "evaluation.json", "evaluation.md", "robustness.json", "robustness.md", "robustness.png", "figures",
    }  # fmt: skip


def test_the_keys_of_a_record_are_documented(capsys):
    """Tables of the record, of what the command adds, of stability, a file's claims, and the explanation."""
    page = (ROOT / "docs/records.md").read_text(encoding="utf-8")
    tables = re.findall(r"\| key \| meaning \|\n\| --- \| --- \|\n((?:\|.*\n)+)", page)
    record, added, stability, claims, explanation = (
        {key for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1])}
        for table in tables
    )
    assert main(["explain", str(ROOT / "examples/ldm_1.png"), "--format", "json"]) == 0
    keys = json.loads(capsys.readouterr().out)
    assert set(keys["explanation"]) == explanation
    assert set(keys) == record | added | stability | {"explanation"}
    assert set(keys["provenance"]) <= claims


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, fragment = link.partition("#")
        if path.startswith("https://"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not fragment or fragment in anchors(target), f"{page.name}: {link}"


def test_readme_is_short():
    assert len(README.read_bytes()) <= 8000
