"""The rows of hub_matrix: each does what users do, and asserts what they expect. None needs the package."""

import json
import os
import shutil
import stat
from pathlib import Path

from hub_matrix import (
    HUB_ID,
    LOADERS,
    by_auto_class,
    by_diffusers,
    by_own_pipeline,
    diffusion_pipeline,
    of_record,
)
from hub_server import hub_with

TRUST = {"trust_remote_code": True}


def same(scores: dict, task: dict) -> None:
    """The scores of the local checkpoint, by the package."""
    assert set(scores) == set(task["expected"]), sorted(scores)
    assert max(abs(scores[name] - value) for name, value in task["expected"].items()) <= 1e-5


def fails(kind: type, words: str, call, *args, **options) -> None:
    said = None
    try:
        call(*args, **options)
    except kind as error:
        said = str(error)
    assert words in (said or ""), f"{said!r} should tell {words!r}"


def other_vae(task: dict):
    from diffusers import AutoModel

    vae = AutoModel.from_pretrained(task["local"], subfolder="vae")
    for weight in vae.parameters():
        weight.data.add_(0.1)
    return vae


def copied(task: dict, name: str = "copy") -> Path:
    """The local checkpoint once more, for a row that changes it."""
    beside = shutil.ignore_patterns(".*", "leakzoo", "wild", "benchmarks", "tests", "runs")
    return Path(shutil.copytree(task["local"], Path(task["folder"]) / name, ignore=beside))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- loading ------------------------------------------------------------------------------------------------


def nothing_more_is_installed(task: dict) -> None:
    import importlib.util

    names = ("protoleak", "sklearn", "scipy", "accelerate", "datasets", "evaluate", "matplotlib")
    assert [name for name in names if importlib.util.find_spec(name)] == []
    same(by_auto_class(task["local"], task["image"], **TRUST), task)


def trust_is_asked_for(task: dict) -> None:
    from diffusers import DiffusionPipeline

    os.environ["CODE_THAT_RAN"] = "nothing should"
    for name, load in LOADERS.items():
        if name != "DiffusionPipeline":
            fails(ValueError, "trust_remote_code=True", load, HUB_ID, task["image"], trust_remote_code=False)
    fails(ValueError, "trust_remote_code=True", DiffusionPipeline.from_pretrained, task["local"])


def a_task_that_is_misspelt(task: dict) -> None:
    from transformers import pipeline

    fails(KeyError, "image-atribution", pipeline, "image-atribution", model=task["local"], **TRUST)


def two_revisions_in_one_process(task: dict) -> None:
    for revision in ("v1", "main", "v1"):
        Path(os.environ["CODE_THAT_RAN"]).write_text("")
        pipe = diffusion_pipeline(HUB_ID, revision=revision)
        known = pipe(task["image"]).records[0]["attributions"]
        assert ("newcomer" in {a["label"] for a in known}) == (revision == "main")
        assert set(Path(os.environ["CODE_THAT_RAN"]).read_text().split()) <= {revision}
    same(of_record(pipe(task["image"]).records[0]), task)


def a_branch_that_moves_meanwhile(task: dict) -> None:
    """What was loaded of "main" stays what it was."""
    reference = Path(task["folder"], "cache", f"models--{HUB_ID.replace('/', '--')}", "refs", "main")
    shutil.copytree(task["cache"], Path(task["folder"]) / "cache")
    commits = {name: (reference.parent / name).read_text() for name in ("v1", "main")}
    reference.write_text(commits["v1"])
    pipe = diffusion_pipeline(HUB_ID, cache_dir=str(Path(task["folder"]) / "cache"))
    reference.write_text(commits["main"])
    same(of_record(pipe(task["image"]).records[0]), task)


def a_relative_folder_and_another_working_directory(task: dict) -> None:
    copied(task, "elsewhere/mine")
    pipe = diffusion_pipeline("mine")
    os.chdir("..")
    same(of_record(pipe(task["image"]).records[0]), task)


def a_private_repository(task: dict) -> None:
    """Downloaded by each loader alone, with the token of a login, or as docs/publishing.md says, its own."""
    from huggingface_hub import snapshot_download

    files = contents(copied(task))
    caches = [str(Path(task["folder"], f"cache{i}")) for i in range(5)]
    with hub_with("you/mine", files, token="secret"):
        fails(OSError, "metadata from the Hub", diffusion_pipeline, "you/mine", cache_dir=caches[0])
        same(by_auto_class("you/mine", task["image"], cache_dir=caches[1], token="secret", **TRUST), task)
        folder = snapshot_download("you/mine", token="secret", cache_dir=caches[2])
        same(by_diffusers(folder, task["image"]), task)
        os.environ["HF_TOKEN"] = "secret"
        for load, cache in ((by_own_pipeline, caches[3]), (by_diffusers, caches[4])):
            same(load("you/mine", task["image"], cache_dir=cache, **TRUST), task)


def offline_after_a_download(task: dict) -> None:
    """As docs/publishing.md says for diffusers, which asks the Hub for a pipeline's code all the same."""
    from huggingface_hub import constants, snapshot_download
    from transformers import pipeline

    os.environ["HF_TOKEN"], constants.HF_HUB_CACHE = "secret", str(Path(task["folder"], "cache"))
    with hub_with("you/mine", contents(copied(task)), token="secret"):
        snapshot_download("you/mine")
    assert constants.HF_HUB_OFFLINE
    folder = snapshot_download("you/mine")
    same(of_record(diffusion_pipeline(folder)(task["image"]).records[0]), task)
    attribute = pipeline("image-attribution", model="you/mine", local_files_only=True, **TRUST)
    same(of_record(attribute(task["image"])), task)


def the_working_directory_gives_no_vae(task: dict) -> None:
    folder = copied(task)
    shutil.move(folder / "vae", "vae")
    for name in (".", "vae"):
        config = json.loads((folder / "config.json").read_text()) | {"vae_name_or_path": name}
        (folder / "config.json").write_text(json.dumps(config))
        fails(OSError, "vae=", by_auto_class, str(folder), task["image"], **TRUST)
    shutil.move("vae", folder / "vae")
    same(by_auto_class(str(folder), task["image"], **TRUST), task)


def weights_load_strictly(task: dict) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(task["local"], **TRUST)
    found = model.load_state_dict(load_file(Path(task["local"], "model.safetensors")))
    assert (found.missing_keys, found.unexpected_keys) == ([], [])


# --- diffusers ----------------------------------------------------------------------------------------------


def a_vae_before_the_first_call(task: dict) -> None:
    pipe = diffusion_pipeline(task["local"])
    own, pipe.vae = pipe.vae, other_vae(task)
    fails(ValueError, "fitted for other", pipe, task["image"])
    assert pipe.attribution_model.vae is own, "what failed changes nothing"
    pipe.vae = own
    same(of_record(pipe(task["image"]).records[0]), task)


def a_vae_that_is_given(task: dict) -> None:
    pipe = diffusion_pipeline(task["local"], vae=other_vae(task))
    fails(ValueError, "fitted for other", pipe, task["image"])
    pipe.attribution_model.detector = None
    assert pipe(task["image"]).p_values == [None]
    assert pipe.attribution_model.vae is pipe.vae
    fails(ValueError, "which revision", diffusion_pipeline, HUB_ID, vae=other_vae(task))


def no_vae(task: dict) -> None:
    pipe = diffusion_pipeline(task["local"], vae=None)
    fails(ValueError, "no vae; set pipe.vae", pipe, task["image"])
    pipe.vae = pipe.attribution_model.vae
    same(of_record(pipe(task["image"]).records[0]), task)


def from_pipe(task: dict) -> None:
    from diffusers import DDIMScheduler

    pipe = diffusion_pipeline(HUB_ID, revision="v1")
    again = type(pipe).from_pipe(pipe)
    assert again.attribution_model is pipe.attribution_model
    same(of_record(again(task["image"]).records[0]), task)
    again = type(pipe)(**pipe.components)
    same(of_record(again(task["image"]).records[0]), task)
    empty = type(pipe)(pipe.vae, DDIMScheduler())
    fails(ValueError, "no attribution_model", type(pipe).from_pipe, empty)
    fails(ValueError, "no attribution_model", empty, task["image"])


def a_scheduler_that_does_not_fit(task: dict) -> None:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    pipe = diffusion_pipeline(task["local"])
    before, config = pipe.scheduler, pipe.attribution_model.config.to_dict()
    schedulers = {"fitted for other": DDPMScheduler(), "alphas_cumprod": FlowMatchEulerDiscreteScheduler()}
    for words, pipe.scheduler in schedulers.items():
        fails(ValueError, words, pipe, task["image"])
        assert pipe.attribution_model.config.to_dict() == config
    pipe.scheduler = before
    same(of_record(pipe(task["image"]).records[0]), task)


# --- saving and pushing -------------------------------------------------------------------------------------


def saving_changes_nothing(task: dict) -> None:
    """Weights in half precision stay so, files keep their bytes, and others may read them."""
    from safetensors.torch import load_file, save_file

    folder, saved = copied(task), [Path(task["folder"], name) for name in ("first", "second")]
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(file).items()}, file)
    (folder / "density.pkl").unlink(missing_ok=True)  # it is of the VAE before
    source = str(folder)
    for target in saved:
        diffusion_pipeline(source).save_pretrained(target)
        source = str(target)
    assert contents(saved[0]) == contents(saved[1])
    assert contents(saved[0])["vae/" + file.name] == file.read_bytes()
    assert contents(saved[0])["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    ordinary = stat.S_IMODE((saved[0] / "config.json").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in saved[0].rglob("*") if p.is_file()} == {ordinary}
    assert task["folder"] not in "".join(path.read_text() for path in saved[0].rglob("*.json"))


def a_precision_to_compute_with_is_not_saved(task: dict) -> None:
    import torch

    pipe = diffusion_pipeline(task["local"], torch_dtype=torch.bfloat16)
    target = Path(task["folder"], "saved")
    pipe.save_pretrained(target)
    same(by_diffusers(str(target), task["image"]), task)


def on_a_hub_of_this_machine(task: dict) -> str:
    """What is uploaded to "you/mine" from here on can be loaded from there."""
    import huggingface_hub

    snapshot = Path(task["folder"], "hub", "models--you--mine", "snapshots", "3" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)

    def put(name: str, content: bytes) -> None:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content)

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            with operation.as_file() as content:
                put(operation.path_in_repo, content.read())

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, **options):
        files = contents(Path(folder_path))
        for name in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            put(name, files[name])

    def create_repo(self, repo_id, private=None, **options):
        assert (repo_id, private) == ("you/mine", True), "what was asked for goes through"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    for method in (create_commit, upload_folder, create_repo):
        setattr(huggingface_hub.HfApi, method.__name__, method)
    return str(snapshot.parents[2])


def check_push(task: dict, cache: str, stray: str | None = None) -> None:
    """What lies on the Hub is all that the checkpoint has, and every loader takes it."""
    snapshot = Path(cache, "models--you--mine", "snapshots", "3" * 40)
    wanted = {"config.json", "model.safetensors", "density.pkl", "model_index.json", "vae/config.json"}
    wanted |= {"vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    wanted |= {path.name for path in Path(task["local"]).glob("*_protoleak.py")}
    assert wanted <= set(contents(snapshot)), sorted(wanted - set(contents(snapshot)))
    assert stray not in contents(snapshot)
    same(by_diffusers("you/mine", task["image"], cache_dir=cache), task)


def a_push_of_the_pipeline(task: dict) -> None:
    cache, target = on_a_hub_of_this_machine(task), Path(task["folder"], "saved")
    (target / "checkpoint-1").mkdir(parents=True)
    (target / "checkpoint-1" / "optimizer.pt").write_text("")
    options = {"push_to_hub": True, "repo_id": "you/mine", "private": True}
    diffusion_pipeline(task["local"]).save_pretrained(target, **options)
    check_push(task, cache, "checkpoint-1/optimizer.pt")


def push_to_hub_of_the_pipeline(task: dict) -> None:
    cache = on_a_hub_of_this_machine(task)
    diffusion_pipeline(task["local"]).push_to_hub("you/mine", private=True)
    check_push(task, cache)


def a_push_of_model_and_processor(task: dict) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    cache, target = on_a_hub_of_this_machine(task), str(Path(task["folder"], "mine"))
    options = {"push_to_hub": True, "repo_id": "you/mine", "private": True}
    model = AutoModelForImageClassification.from_pretrained(task["local"], **TRUST)
    model.save_pretrained(target, **options)
    AutoImageProcessor.from_pretrained(task["local"], **TRUST).save_pretrained(target, **options)
    check_push(task, cache)


def push_to_hub_of_model_and_processor(task: dict) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    cache = on_a_hub_of_this_machine(task)
    for kind in (AutoModelForImageClassification, AutoImageProcessor):
        kind.from_pretrained(task["local"], **TRUST).push_to_hub("you/mine", private=True)
    check_push(task, cache)


def a_push_of_the_transformers_pipeline(task: dict) -> None:
    from transformers import pipeline

    cache, target = on_a_hub_of_this_machine(task), str(Path(task["folder"], "mine"))
    options = {"push_to_hub": True, "repo_id": "you/mine", "private": True}
    pipeline("image-attribution", model=task["local"], **TRUST).save_pretrained(target, **options)
    check_push(task, cache)


ROWS = {
    "load with torch, transformers and diffusers alone": nothing_more_is_installed,
    "load without trust": trust_is_asked_for,
    "a task that is misspelt": a_task_that_is_misspelt,
    "two revisions in one process": two_revisions_in_one_process,
    "a branch that moves between loading and use": a_branch_that_moves_meanwhile,
    "download from a private repository": a_private_repository,
    "offline after a download": offline_after_a_download,
    "a relative folder, used from another": a_relative_folder_and_another_working_directory,
    "a checkpoint without its VAE, beside another VAE": the_working_directory_gives_no_vae,
    "load_state_dict of model.safetensors": weights_load_strictly,
    "another VAE, before the first call": a_vae_before_the_first_call,
    "DiffusionPipeline with vae=": a_vae_that_is_given,
    "DiffusionPipeline with vae=None": no_vae,
    "from_pipe, and components": from_pipe,
    "a scheduler that does not fit": a_scheduler_that_does_not_fit,
    "load and save twice, the VAE in half precision": saving_changes_nothing,
    "load in bfloat16, and save": a_precision_to_compute_with_is_not_saved,
    "push the diffusers pipeline as it is saved": a_push_of_the_pipeline,
    "push_to_hub of the diffusers pipeline": push_to_hub_of_the_pipeline,
    "push model and image processor as they are saved": a_push_of_model_and_processor,
    "push_to_hub of model and image processor": push_to_hub_of_model_and_processor,
    "push the transformers pipeline as it is saved": a_push_of_the_transformers_pipeline,
}
