"""The script that makes LeakZoo, at a few images and steps, and the data set's card."""

import dataclasses
import functools
import hashlib
import importlib
import json
import sys

import pytest
from datasets import load_dataset

from . import ROOT

MODULES = ("workspace", "photographs", "autoencoders", "diffusion_models", "dataset_card", "make_leakzoo")
IMAGES = {"train": 12, "validation": 6, "test": 12}


def import_script(patch: pytest.MonkeyPatch) -> dict:
    """make_leakzoo.py's modules by name, imported afresh as `python leakzoo/make_leakzoo.py` does."""
    patch.syspath_prepend(str(ROOT / "leakzoo"))
    for name in MODULES:
        patch.delitem(sys.modules, name, raising=False)
    return {name: importlib.import_module(name) for name in MODULES}


@pytest.fixture(scope="module")
def script():
    """The script's modules with few images and steps, and scikit-learn's two photographs alone."""
    with pytest.MonkeyPatch.context() as patch:
        modules = import_script(patch)

        def set_everywhere(name, value):
            for module in modules.values():
                if hasattr(module, name):
                    patch.setattr(module, name, value)

        china, flower = (p for p in modules["photographs"].PHOTOS if p.package == "scikit-learn")
        photos = (china, flower, dataclasses.replace(china, name="part_of_china", split="validation"))
        set_everywhere("PHOTOS", photos)
        set_everywhere("TRAINING_PATCHES", 40)
        for split, size in IMAGES.items():
            patch.setitem(modules["photographs"].SPLIT_SIZES, split, size)
        specs = modules["diffusion_models"].GENERATORS
        set_everywhere("GENERATORS", tuple(dataclasses.replace(spec, sampling_steps=2) for spec in specs))
        train_loop, sharpen = modules["autoencoders"].train_loop, modules["autoencoders"].sharpen_decoder
        set_everywhere("train_loop", lambda model, loss, steps, *rest: train_loop(model, loss, 2, *rest))
        set_everywhere("sharpen_decoder", functools.partial(sharpen, steps=2))
        regression = modules["dataset_card"].LogisticRegressionCV
        set_everywhere("LogisticRegressionCV", lambda **options: regression(**options | {"Cs": 1}))
        yield modules


@pytest.fixture(scope="module")
def workspace(script, tmp_path_factory):
    """A workspace after every stage."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "root/leakzoo").mkdir(parents=True)
    (folder / "work").mkdir()
    workspace = script["workspace"].Workspace(folder / "work", folder / "root/leakzoo", seed=0)
    for run in script["make_leakzoo"].list_stages(workspace).values():
        run()
    return workspace


def test_every_stage_runs_and_the_data_set_loads(script, workspace):
    names = {spec.name: spec.known for spec in script["diffusion_models"].GENERATORS}
    zoo = load_dataset(str(workspace.output_dir), cache_dir=str(workspace.work_dir / "cache"))
    labels = zoo["train"].features["label"]
    for split, size in IMAGES.items():
        assert zoo[split].num_rows == size * (1 + sum(names.values()))
    unknown = {name for name, known in names.items() if not known}
    assert set(labels.int2str(zoo["unknown"]["label"][:])) == unknown
    assert set(json.loads((workspace.output_dir / "figures.json").read_text())["content_auroc"]) == set(names)
    assert (workspace.output_dir / "recipe/vae/config.json").exists()


@pytest.mark.parametrize("stage", ["decoder_c.pt", "denoiser_ldm_cosine.pt", "samples_ldm_lcm.npz"])
def test_a_stage_that_is_run_again_alone_gives_the_same_file(script, workspace, stage):
    path = workspace.work_dir / stage
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    fresh = type(workspace)(workspace.work_dir, workspace.output_dir, workspace.seed)
    script["make_leakzoo"].list_stages(fresh)[path.stem]()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_the_card_is_written_from_the_figures(tmp_path, monkeypatch):
    card = import_script(monkeypatch)["dataset_card"]
    card.write_card(tmp_path, json.loads((ROOT / "leakzoo/figures.json").read_text()))
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "leakzoo/README.md").read_bytes()
