"""
What users of transformers and diffusers do with a checkpoint. Every column and every row has a process of its
own, offline, in an environment with torch, transformers, diffusers and what these ask for, and nothing else.

    python tests/hub_matrix.py [CHECKPOINT]
"""

import importlib.metadata
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HUB_ID = "org/protoleak"
COMMITS = {"v1": "1" * 40, "main": "2" * 40}
REPORTS_ITSELF = "\nimport os\nopen(os.environ['CODE_THAT_RAN'], 'a').write({!r})\n"


# --- what is loaded -----------------------------------------------------------------------------------------


def make_kinds(checkpoint: Path, folder: Path, dataset: str, enroll: list[str]) -> dict[str, str]:
    """Checkpoints made from one: name to folder."""
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
    return {"local": str(checkpoint)} | {
        kind: str(folder / kind) for kind in ("re-saved", "fine-tuned", "enrolled")
    }


def some_of_leakzoo(target: Path) -> str:
    """A data set of every twentieth image of LeakZoo."""
    import pyarrow.parquet

    target.mkdir()
    for path in (ROOT / "leakzoo").glob("*.parquet"):
        images = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(images.take(list(range(0, len(images), 20))), target / path.name)
    return str(target)


def scores_of_package(source: str, image: str) -> dict[str, float]:
    """Class probabilities and the open-set score of an image by the package."""
    import protoleak
    import torch

    model = protoleak.ProtoLeakForImageAttribution.from_pretrained(source)
    processor = protoleak.ProtoLeakImageProcessor.from_pretrained(source)
    with torch.no_grad():
        (record,) = model.records(model(**processor(image)))
    return of_record(record)


def lay_out_cache(cache: Path, revisions: dict[str, str]) -> None:
    """
    A Hub cache with these revisions (name to folder) of `HUB_ID`. All of their code reports that it ran, as
    the revision that it is of.
    """
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    for name, source in revisions.items():
        snapshot = repository / "snapshots" / COMMITS[name]
        beside = shutil.ignore_patterns(".*", "leakzoo", "wild", "benchmarks", "tests", "runs")
        shutil.copytree(source, snapshot, ignore=beside)
        for code in snapshot.glob("*_protoleak.py"):
            code.write_text(code.read_text() + REPORTS_ITSELF.format(f"{name}\n"))
        reference = repository / "refs" / name
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(COMMITS[name])


def lay_out_site(target: Path) -> None:
    """A folder of links to torch, transformers, diffusers and all that these ask for: an environment."""
    from packaging.requirements import Requirement

    target.mkdir()
    wanted, found = ["torch", "transformers", "diffusers"], set()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        distribution = importlib.metadata.distribution(name)
        site = Path(distribution.locate_file(""))
        for top in {
            file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (target / top).exists():
                (target / top).symlink_to(site / top)
        requirements = map(Requirement, distribution.requires or [])
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


# --- the loaders --------------------------------------------------------------------------------------------


def of_record(record: dict) -> dict[str, float]:
    scores = {a["label"]: a["score"] for a in record["attributions"]}
    return scores | {"open_set_score": record["open_set_score"]}


def by_auto_class(source: str, image: str, **hub) -> dict[str, float]:
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(source, **hub)
    processor = AutoImageProcessor.from_pretrained(source, **hub)
    with torch.no_grad():
        (record,) = model.records(model(**processor(image)))
    return of_record(record)


def by_base_class(source: str, image: str, **hub) -> dict[str, float]:
    """The base model's embeddings, in the head and the detector of the whole one."""
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    whole = AutoModelForImageClassification.from_pretrained(source, **hub)
    processor = AutoImageProcessor.from_pretrained(source, **hub)
    with torch.no_grad():
        base = AutoModel.from_pretrained(source, **hub)(**processor(image))
        logits = whole.head(base.embeddings, base.gates) / whole.detector.temperature_
        output = {**base, "logits": logits}
        (record,) = whole.records(output | whole.detector.verdict(output))
    return of_record(record)


def by_own_pipeline(source: str, image: str, **hub) -> dict[str, float]:
    return of_record(transformers_pipeline("image-attribution", source, hub)(image))


def by_classification_pipeline(source: str, image: str, **hub) -> dict[str, float]:
    records = transformers_pipeline("image-classification", source, hub)(image, top_k=1000)
    return {record["label"]: record["score"] for record in records}


def transformers_pipeline(task: str, source: str, hub: dict):
    from transformers import pipeline

    options = {"model_kwargs": {"cache_dir": hub["cache_dir"]}} if "cache_dir" in hub else {}
    options |= {name: hub[name] for name in ("revision", "trust_remote_code") if name in hub}
    return pipeline(task, model=source, **options)


def by_diffusers(source: str, image: str, **hub) -> dict[str, float]:
    return of_record(diffusion_pipeline(source, **hub)(image).records[0])


def diffusion_pipeline(source: str, **options):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(source, **{"trust_remote_code": True} | options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


LOADERS = {
    "AutoModelForImageClassification": by_auto_class,
    "AutoModel": by_base_class,
    "image-attribution": by_own_pipeline,
    "image-classification": by_classification_pipeline,
    "DiffusionPipeline": by_diffusers,
}


def differences(column: dict, image: str, expected: dict[str, float]) -> dict[str, float]:
    """Of every loader the largest difference to what the package gives."""
    found = {}
    for name, load in LOADERS.items():
        scores = load(column["source"], image, trust_remote_code=True, **column.get("hub", {}))
        assert set(expected) - {"open_set_score"} <= set(scores), f"{name} knows {sorted(scores)}"
        found[name] = max(abs(score - expected[label]) for label, score in scores.items())
    return found


# --- in the bare environment --------------------------------------------------------------------------------


def rows() -> dict:
    """What `hub_rows` does, by name."""
    sys.path.insert(0, str(Path(__file__).parent))
    from hub_rows import ROWS

    return ROWS


def timed(task: dict) -> tuple[Any, float]:
    """What [`run_task`] gives, and the seconds that it took."""
    start = time.monotonic()
    return run_task(task), time.monotonic() - start


def run_task(task: dict) -> dict | str:
    """One column or row: what it found, or how it failed."""
    import diffusers.utils.dynamic_modules_utils
    import transformers.dynamic_module_utils

    folder = Path(task["folder"])
    (folder / "elsewhere").mkdir(parents=True)
    os.chdir(folder / "elsewhere")
    for module in (diffusers.utils.dynamic_modules_utils, transformers.dynamic_module_utils):
        module.HF_MODULES_CACHE = str(folder / "modules")
    os.environ["CODE_THAT_RAN"] = str(folder / "ran.txt")
    try:
        if "row" in task:
            return rows()[task["row"]](task) or "yes"
        found = differences(task["column"], task["image"], task["expected"])
        ran = folder / "ran.txt"
        revisions = sorted(set(ran.read_text().split())) if ran.exists() else []
        assert revisions == task["column"].get("ran", []), f"code of {revisions} ran"
        return found
    except Exception:
        return traceback.format_exc()


def run_tasks(tasks: list[dict], site: Path, hf_home: Path) -> list:
    """What each task found, and its seconds, in fresh processes of the bare environment."""
    environment = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    environment |= {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "HF_HOME": str(hf_home)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-S", __file__, "--tasks"]
    text = json.dumps(tasks)
    run = subprocess.run(command, input=text, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def answer_tasks() -> None:
    """Import the libraries once, and fork a process from there for each task."""
    import torch
    from diffusers import AutoencoderKL, AutoModel, DDIMScheduler, DiffusionPipeline  # noqa: F401
    from transformers import AutoBackbone, AutoModelForImageClassification, pipeline  # noqa: F401

    torch.set_num_threads(1)
    tasks = json.loads(sys.stdin.read())
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(timed, tasks, chunksize=1)))


# --- the whole ----------------------------------------------------------------------------------------------


def matrix(checkpoint: Path, folder: Path, dataset: str, images: list[str]) -> tuple[dict, dict, dict]:
    """
    Differences by column and loader, what each row of `hub_rows` found ("yes", or how it failed), and the
    seconds of each column and row.

    Args:
        checkpoint (`Path`): What all is made from.
        folder (`Path`): Where all is written.
        dataset (`str`): To fine-tune on.
        images (`list[str]`): What is scored, the first, and enrolled.
    """
    kinds = make_kinds(checkpoint, folder, dataset, images)
    expected = {kind: scores_of_package(source, images[0]) for kind, source in kinds.items()}
    revisions = {"v1": kinds["local"], "main": kinds["enrolled"]}
    lay_out_cache(folder / "hf" / "hub", revisions)
    lay_out_cache(folder / "cache", revisions)
    lay_out_site(folder / "site")
    columns = {kind: {"source": source, "expected": kind} for kind, source in kinds.items()}
    columns["Hub cache"] = {"source": HUB_ID, "expected": "enrolled", "ran": ["main"]}
    pinned = {"source": HUB_ID, "expected": "local", "ran": ["v1"]}
    columns["revision v1"] = pinned | {"hub": {"revision": "v1"}}
    options = {"revision": "v1", "cache_dir": str(folder / "cache"), "local_files_only": True}
    columns["v1, cache_dir"] = pinned | {"hub": options}
    common = {"image": images[0], "local": kinds["local"], "cache": str(folder / "hf" / "hub")}
    tasks = [
        common | {"column": column, "expected": expected[column["expected"]]} for column in columns.values()
    ] + [common | {"row": row, "expected": expected["local"]} for row in rows()]
    for i, task in enumerate(tasks):
        task["folder"] = str(folder / "tasks" / str(i))
    found = dict(zip([*columns, *rows()], run_tasks(tasks, folder / "site", folder / "hf"), strict=True))
    seconds = {name: taken for name, (_, taken) in found.items()}
    return {name: found[name][0] for name in columns}, {name: found[name][0] for name in rows()}, seconds


def print_matrix(columns: dict, rows: dict, seconds: dict[str, float]) -> None:
    print("| loader | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for loader in LOADERS:
        cells = (f"{c[loader]:.1e}" if isinstance(c, dict) else "failed" for c in columns.values())
        print(f"| {loader} | " + " | ".join(cells) + " |")
    print("| seconds | " + " | ".join(f"{seconds[name]:.0f}" for name in columns) + " |")
    print("\n| what is done | as users expect | seconds |\n| --- | --- | --- |")
    for row, found in rows.items():
        print(f"| {row} | {'yes' if found == 'yes' else 'no'} | {seconds[row]:.0f} |")
    for name, found in (columns | rows).items():
        if isinstance(found, str) and found != "yes":
            print(f"\n{name}: {found}")


def main() -> None:
    if sys.argv[1:2] == ["--tasks"]:
        answer_tasks()
        return
    checkpoint = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT).resolve()
    images = sorted(str(path) for path in (ROOT / "examples").glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        dataset = some_of_leakzoo(Path(folder) / "data")
        print_matrix(*matrix(checkpoint, Path(folder), dataset, images[-3:]))


if __name__ == "__main__":
    main()
