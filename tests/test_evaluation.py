"""`protoleak evaluate` and `protoleak robustness`, and the figures that they print."""

import json
import subprocess
import sys

import numpy as np
import pytest
from protoleak.cli import main
from protoleak.density_protoleak import OPEN_SET_SCORES
from protoleak.evaluation.protocol import (
    TITLES,
    Predictions,
    expected_calibration_error,
    figures,
    format_bias,
    reliability,
)
from protoleak.evaluation.splits import load_splits, load_unknown
from protoleak.train import train

from .conftest import arguments, draw

NAMES = ["real", "a"]


def predictions(probability_of_a, labels, p_values=None, class_p_values=None) -> Predictions:
    probabilities = np.stack([1 - np.array(probability_of_a), np.array(probability_of_a)], axis=1)
    return Predictions(
        np.zeros((len(labels), 1)), probabilities, np.array(labels), np.array(p_values),
        p_values=np.array(p_values), class_p_values=np.array(class_p_values),
    )  # fmt: skip


def test_verdict_figures_by_counting():
    test = predictions(
        [0.1, 0.6, 0.9, 0.8], [0, 0, 1, 1], p_values=[0.5, 0.05, 0.3, 0.2],
        class_p_values=[[0.5, 0.01], [0.04, 0.5], [0.06, 0.5], [0.01, 0.02]],
    )  # fmt: skip
    unknown = predictions([0.5, 0.5], [-1, -1], [0.01, 0.9], [[0.1, 0.1]] * 2)
    result = figures(test, unknown, NAMES, alpha=0.05)
    assert result["false_unknown_rate"] == 0.25
    assert result["unknown_rejected"] == 0.5
    assert result["set_coverage"] == 0.75  # of the second image, the right class has p 0.04
    assert result["ambiguous_rate"] == 0.25  # the third: both above 0.05
    assert result["brier"] == pytest.approx(2 * (0.1**2 + 0.6**2 + 0.1**2 + 0.2**2) / 4)
    assert result["real_auroc"] == 1.0
    assert set(result) - {"per_class_auc"} == set(TITLES), "every figure has a title"


def test_calibration_error_by_counting():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.5 * 0.4 + 0.5 * 0.3)
    assert [row["share"] for row in reliability(probabilities, labels)] == [0.5, 0.5]
    rng = np.random.default_rng(0)
    honest = rng.dirichlet(np.ones(3), 20_000)
    drawn = (honest.cumsum(1) > rng.uniform(size=(20_000, 1))).argmax(1)
    assert expected_calibration_error(honest, drawn) < 0.02


def test_evaluate_and_robustness(tmp_path, folder, recipe, capsys):
    train(arguments(tmp_path, folder, recipe))
    more = tmp_path / "more"
    more.mkdir()
    draw("c", np.random.default_rng(3)).save(more / "0.png")
    options = ["--model", str(tmp_path / "run"), "--dataset", str(folder)]
    assert main(["evaluate", *options, "--unknown", str(more), "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (tmp_path / "out/evaluation.md").read_text().strip() in printed.out
    assert (report["num_test"], report["num_unknown"]) == (24, 9)
    assert set(report["per_unknown"]) == {"c", "unknown"}
    assert report["per_unknown"]["unknown"]["likeliest"] in report["labels"]
    assert report["per_unknown"]["unknown"]["likeliest_share"] == 1  # one image
    expected = {
        f"{name} of {features}" for name in OPEN_SET_SCORES for features in ("embeddings", "statistics")
    }
    assert set(report["open_set_scores"]) == expected
    assert report["open_set_scores"]["kde of embeddings"]["auroc"] == report["figures"]["auroc"]
    trained = json.loads((tmp_path / "run/metrics.json").read_text())["figures"]
    assert report["figures"]["macro_auc"] == pytest.approx(trained["macro_auc"], abs=1e-6)
    assert np.sum(report["confusion"]) == 24
    assert report["noise"]["macro_auc"][0] == report["figures"]["macro_auc"]
    assert any(len(set(v)) > 1 for v in report["noise"].values()), report["noise"]
    assert report["shuffled_macro_auc"] == pytest.approx(0.5, abs=0.1)
    for title in TITLES.values():
        assert title in printed.out

    assert main(["robustness", *options, "--quick", "--output_dir", str(tmp_path / "out")]) == 0
    table = json.loads((tmp_path / "out/robustness.json").read_text())
    assert (table[0]["operator"], table[0]["stability"]) == ("none", 1.0)
    assert {"jpeg", "crop", "step3"} < {row["operator"] for row in table}
    assert min(row["stability"] for row in table) < 1
    assert all(0 <= row["false_unknown_rate"] <= 1 and 0 <= row["unknown_rejected"] <= 1 for row in table)
    assert (tmp_path / "out/robustness.png").stat().st_size > 5000
    for name in ("roc", "confusion", "reliability", "embeddings"):
        assert (tmp_path / f"out/figures/{name}.png").stat().st_size > 5000
    assert "| gaussian_blur | 1 |" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_named(tmp_path, folder, recipe, capsys):
    train(arguments(tmp_path, folder, recipe, num_train_epochs=1))
    options = ["evaluate", "--model", str(tmp_path / "run"), "--dataset", str(folder)]
    assert main([*options, "--unknown", str(folder / "test")]) == 2
    assert "does not know" in capsys.readouterr().err
    for split in ("train", "validation", "test"):
        (folder / split / "a").rename(folder / split / "other")
    assert main(options) == 2
    assert "['a', 'other']" in capsys.readouterr().err


def test_formats_that_give_the_class_away_are_noticed(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("same", "differ"):
        for generator in ("real", "a"):
            target = tmp_path / kind / generator
            target.mkdir(parents=True)
            for i in range(20):
                suffix = "jpg" if kind == "differ" and generator == "real" else "png"
                draw("real", rng).save(target / f"{i}.{suffix}")
    same, differ = (format_bias(load_splits(str(tmp_path / kind))["train"]) for kind in ("same", "differ"))
    assert same["p_value"] > 0.05
    assert same["balanced_accuracy"] == same["chance"] == 0.5
    assert differ["p_value"] < 1e-4
    assert differ["balanced_accuracy"] == 1.0
    assert differ["values"]["format"] == 2


def test_unknown_images_come_as_a_folder_of_any_shape(tmp_path, folder):
    assert set(load_unknown(str(folder / "unknown/c"))["label"]) == {"unknown"}
    assert set(load_unknown(str(folder / "unknown"))["label"]) == {"c"}
    assert len(load_unknown(str(folder / "unknown"))) == 8


def test_two_processes_evaluate_as_one_does(tmp_path, folder, recipe):
    train(arguments(tmp_path, folder, recipe, num_train_epochs=1))
    command = ["evaluate", "--model", str(tmp_path / "run"), "--dataset", str(folder), "--noise_seeds", "1"]
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    run = subprocess.run(
        [*launch, "-m", "protoleak.cli", *command, "--output_dir", str(tmp_path / "two")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    one, two = (json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("one", "two"))
    assert run.stdout.count("24 test images of known classes") == 1  # by the main process alone
    assert two["confusion"] == one["confusion"]
    for name, value in one["figures"].items():
        assert two["figures"][name] == pytest.approx(value, abs=1e-6), name
