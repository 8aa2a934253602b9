"""`protoleak evaluate` and `protoleak robustness`, and the metrics that they print."""

import json
import subprocess
import sys

import numpy as np
import pytest
from protoleak.cli import main
from protoleak.evaluation.predictions import Predictions
from protoleak.evaluation.protocol import (
    Evaluation,
    compute_metrics,
    evaluate_predictions,
    expected_calibration_error,
    reliability,
)
from protoleak.evaluation.report import TITLES, format_report
from protoleak.evaluation.shortcuts import format_bias, tells_classes
from protoleak.evaluation.splits import load_splits, load_unknown
from protoleak.scores_protoleak import OPEN_SET_SCORES

from .conftest import draw

NAMES = ["real", "a"]


def predictions(probability_of_a, labels, p_values=None, class_p_values=None) -> Predictions:
    probabilities = np.stack([1 - np.array(probability_of_a), np.array(probability_of_a)], axis=1)
    return Predictions(
        np.zeros((len(labels), 1)), probabilities, np.array(labels), np.array(p_values),
        p_values=np.array(p_values), class_p_values=np.array(class_p_values),
    )  # fmt: skip


def test_verdict_metrics_by_counting():
    test = predictions(
        [0.1, 0.6, 0.9, 0.8], [0, 0, 1, 1], p_values=[0.5, 0.05, 0.3, 0.2],
        class_p_values=[[0.5, 0.01], [0.04, 0.5], [0.06, 0.5], [0.01, 0.02]],
    )  # fmt: skip
    unknown = predictions([0.5, 0.5], [-1, -1], [0.01, 0.9], [[0.1, 0.1]] * 2)
    result = compute_metrics(test, unknown, NAMES, alpha=0.05)
    assert result["false_unknown_rate"] == 0.25
    assert result["unknown_rejected"] == 0.5
    assert result["set_coverage"] == 0.75  # of the second image, the right class has p 0.04
    assert result["ambiguous_rate"] == 0.25  # the third: both above 0.05
    assert result["brier"] == pytest.approx(2 * (0.1**2 + 0.6**2 + 0.1**2 + 0.2**2) / 4)
    assert result["real_auroc"] == 1.0
    assert set(result) - {"per_class_auc"} == set(TITLES), "every metric has a title"


def test_an_evaluation_has_its_test_splits_by_name():
    """A baseline without verdicts can be evaluated too, and a report tells every split."""
    rng = np.random.default_rng(0)
    splits = {}
    for name, gain in (("same_sources", 4), ("other_sources", 1)):
        labels = np.arange(60) % 2
        probabilities = 1 / (1 + np.exp(-(gain * (labels - 0.5) + rng.normal(size=60))))
        test = Predictions(np.zeros((60, 1)), np.stack([1 - probabilities, probabilities], 1), labels)
        splits[name] = evaluate_predictions(test, None, NAMES)
    evaluation = Evaluation(NAMES, 0.05, "kde of embeddings", splits)
    assert evaluation.metrics == splits["same_sources"].metrics
    assert evaluation.metrics["macro_auc"] > splits["other_sources"].metrics["macro_auc"]
    assert [sum(row) for row in splits["other_sources"].confusion] == [30, 30]
    assert [row[-1] for row in splits["other_sources"].confusion] == [0, 0]  # nothing is called unknown
    values = json.loads(json.dumps(evaluation.to_dict() | {"dataset": "zoo"}))
    assert Evaluation.from_dict(values) == evaluation
    assert "per_unknown" not in values["splits"]["same_sources"]
    report = format_report(evaluation)
    for name, split in splits.items():
        assert f"### {name}" in report
        assert f"| {split.metrics['macro_auc']:.4f} |" in report


def test_calibration_error_by_counting():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.5 * 0.4 + 0.5 * 0.3)
    assert [row["share"] for row in reliability(probabilities, labels)] == [0.5, 0.5]
    rng = np.random.default_rng(0)
    honest = rng.dirichlet(np.ones(3), 20_000)
    drawn = (honest.cumsum(1) > rng.uniform(size=(20_000, 1))).argmax(1)
    assert expected_calibration_error(honest, drawn) < 0.02


def test_evaluate_and_robustness(trained, tmp_path, capsys):
    more = tmp_path / "more"
    more.mkdir()
    draw("c", np.random.default_rng(3)).save(more / "0.png")
    options = ["--model", str(trained.checkpoint), "--dataset", str(trained.folder)]
    assert main(["evaluate", *options, "--unknown", str(more), "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    values = json.loads((tmp_path / "out/evaluation.json").read_text())
    evaluation = Evaluation.from_dict(values)
    assert evaluation.to_dict() == {
        name: value for name, value in values.items() if name not in ("model", "dataset", "normalised_format")
    }
    split = evaluation.splits["test"]
    assert (tmp_path / "out/evaluation.md").read_text().strip() in printed.out
    assert (split.num_test, split.num_unknown) == (24, 9)
    assert set(split.per_unknown) == {"c", "unknown"}
    assert split.per_unknown["unknown"]["likeliest"] in evaluation.labels
    assert split.per_unknown["unknown"]["likeliest_share"] == 1  # one image
    expected = {f"{name} of embeddings" for name in OPEN_SET_SCORES}  # the detector keeps no statistics
    assert set(split.open_set_scores) == expected
    assert split.open_set_scores["kde of embeddings"]["auroc"] == evaluation.metrics["auroc"]
    of_training = Evaluation.from_dict(trained.summary).metrics
    assert evaluation.metrics["macro_auc"] == pytest.approx(of_training["macro_auc"], abs=1e-6)
    assert np.sum(split.confusion) == 24
    assert split.noise["macro_auc"][0] == evaluation.metrics["macro_auc"]
    assert any(len(set(v)) > 1 for v in split.noise.values()), split.noise
    assert split.shuffled_macro_auc == pytest.approx(0.5, abs=0.1)
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


def test_what_cannot_be_evaluated_is_named(trained, folder, capsys):
    options = ["evaluate", "--model", str(trained.checkpoint), "--dataset", str(folder)]
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
    assert (tells_classes(same), tells_classes(differ)) == (False, True)
    assert same["p_value"] > 0.05
    assert same["balanced_accuracy"] == same["chance"] == 0.5
    assert differ["p_value"] < 1e-4
    assert differ["balanced_accuracy"] == 1.0
    assert differ["values"]["format"] == 2


def test_unknown_images_come_as_a_folder_of_any_shape(tmp_path, folder):
    assert set(load_unknown(str(folder / "unknown/c"))["label"]) == {"unknown"}
    assert set(load_unknown(str(folder / "unknown"))["label"]) == {"c"}
    assert len(load_unknown(str(folder / "unknown"))) == 8


def test_two_processes_evaluate_as_one_does(trained, tmp_path):
    command = ["evaluate", "--model", str(trained.checkpoint), "--dataset", str(trained.folder)]
    command += ["--noise_seeds", "1"]
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    run = subprocess.run(
        [*launch, "-m", "protoleak.cli", *command, "--output_dir", str(tmp_path / "two")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    one, two = (
        Evaluation.from_dict(json.loads((tmp_path / run / "evaluation.json").read_text())).main
        for run in ("one", "two")
    )
    assert run.stdout.count("24 test images of known classes") == 1  # by the main process alone
    assert two.confusion == one.confusion
    for name, value in one.metrics.items():
        assert two.metrics[name] == pytest.approx(value, abs=1e-6), name
