"""What is uploaded, and what is said when it can't be."""

import subprocess
import tomllib

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from protoleak.train import train
from protoleak.training.card import NEEDED
from protoleak.training.publishing import prepare_repository, publish

from . import ROOT
from .conftest import arguments

WHO = {"name": "you", "orgs": [{"name": "yours"}]}


@pytest.fixture
def hub(monkeypatch) -> dict[str, list]:
    """A Hub on which `you` are logged in; what it was asked for, by method."""
    calls: dict[str, list] = {"create_repo": [], "upload_folder": []}

    def create_repo(self, repo_id, **options):
        calls["create_repo"].append((repo_id, options))
        return type("RepoUrl", (), {"repo_id": repo_id})

    monkeypatch.setattr(HfApi, "whoami", lambda self: WHO)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, **options: calls["upload_folder"].append(options)
    )
    return calls


def raising(error: Exception):
    def method(self, *args, **options):
        raise error

    return method


@pytest.mark.parametrize("repo_id", ["you/mine", "yours/mine", "mine"])
def test_ones_own_repository_is_made(hub, repo_id):
    prepare_repository(repo_id, private=True)
    assert hub["create_repo"] == [(repo_id, {"private": True, "exist_ok": True})]


def test_somebody_elses_is_refused(hub):
    with pytest.raises(OSError, match="'they/mine': you can write to you, yours"):
        prepare_repository("they/mine", private=False)
    assert hub["create_repo"] == []


@pytest.mark.parametrize("error", [LocalTokenNotFoundError("no token"), ConnectionError("no network")])
def test_nothing_is_trained_where_nothing_can_be_pushed(hub, monkeypatch, tmp_path, folder, recipe, error):
    monkeypatch.setattr(HfApi, "whoami", raising(error))
    monkeypatch.setattr("protoleak.train.load_splits", lambda *a, **k: pytest.fail("it went on"))
    with pytest.raises(OSError, match=rf"'you/mine': {error}; log in with `hf auth login`"):
        train(arguments(tmp_path, folder, recipe, push_to_hub="you/mine"))


def test_a_misspelt_id_is_explained(monkeypatch):
    monkeypatch.setattr(HfApi, "whoami", lambda self: WHO)
    with pytest.raises(OSError, match=r"'you/my model': .*log in with"):
        prepare_repository("you/my model", private=False)


def test_a_checkpoint_is_uploaded_and_nothing_else(hub, trained):
    publish(str(trained.checkpoint), "you/mine", private=False)
    (options,) = hub["upload_folder"]
    assert options["repo_id"] == "you/mine"
    files = [
        p.relative_to(trained.checkpoint).as_posix() for p in trained.checkpoint.rglob("*") if p.is_file()
    ]
    kept = set(filter_repo_objects(files, allow_patterns=options["allow_patterns"]))
    assert kept == set(files)
    stray = ["optimizer.pt", "training_state/3/model.safetensors", "checkpoint-8/config.json", "notes.txt"]
    assert list(filter_repo_objects(stray, allow_patterns=options["allow_patterns"])) == []


def test_an_upload_that_fails_loses_nothing(hub, monkeypatch):
    monkeypatch.setattr(HfApi, "upload_folder", raising(ConnectionError("it broke")))
    command = r"hf upload you/mine 'runs/my model' \. --private"
    with pytest.raises(OSError, match=rf"is in runs/my model, but .*it broke.*\n  {command}"):
        publish("runs/my model", "you/mine", private=True)


def test_cards_ask_for_what_loading_needs():
    """In the versions of pyproject.toml, before anything else that they say."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(NEEDED) <= set(needed)
    line = "pip install " + " ".join(f'"{package}"' for package in NEEDED)
    assert line in (ROOT / "README.md").read_text()
    template = (ROOT / "model_card.md").read_text()
    assert template.index("pip install {{ install }}") < template.index("```python") < template.index("scope")


def test_large_files_go_to_lfs():
    """Whoever pushes this folder by git."""
    files = [
        "model.safetensors",
        "density.pkl",
        "vae/diffusion_pytorch_model.safetensors",
        "leakzoo/x.parquet",
    ]
    command = ["git", "check-attr", "filter", "text", "--", *files]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for file in files:
        assert f"{file}: filter: lfs" in lines
        assert f"{file}: text: unset" in lines
