"""`protoleak evaluate` and `protoleak robustness`, and the metrics that they print."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from protoleak.cli import main
from protoleak.evaluate_protoleak.evaluate_protoleak import open_set_metrics
from protoleak.evaluation.metrics import compute_metrics, expected_calibration_error, reliability
from protoleak.evaluation.predictions import ORIGINS, Predictions
from protoleak.evaluation.protocol import (
    Evaluation,
    compare_open_set_scores,
    evaluate_predictions,
    evaluate_splits,
)
from protoleak.evaluation.report import TITLES, format_report, format_summary
from protoleak.evaluation.shortcuts import find_shortcuts, shortcut_warnings
from protoleak.evaluation.splits import load_splits, load_unknown
from protoleak.evaluation.verdicts import coverage_at_precision, exact_intervals
from protoleak.modeling_protoleak import ImageAttributionOutput
from protoleak.pipeline_protoleak import records_of
from protoleak.scores_protoleak import OPEN_SET_SCORES

from .conftest import draw, tiny_config

NAMES = ["real", "a"]


def predictions(
    probability_of_a, labels, p_values=None, class_p_values=None, generated_p_values=None
) -> Predictions:
    probabilities = np.stack([1 - np.array(probability_of_a), np.array(probability_of_a)], axis=1)
    return Predictions(
        np.zeros((len(labels), 1)), probabilities, np.array(labels), np.array(p_values),
        p_values=np.array(p_values), class_p_values=np.array(class_p_values),
        generated_p_values=None if generated_p_values is None else np.array(generated_p_values),
    )  # fmt: skip


def test_verdict_metrics_by_counting():
    test = predictions(
        [0.1, 0.6, 0.9, 0.8, 0.2], [0, 0, 1, 1, 1], [0.5, 0.05, 0.3, 0.2, 0.4],
        [[0.5, 0.01], [0.04, 0.5], [0.06, 0.5], [0.01, 0.02], [0.9, 0.03]], [0.01, 0.9, 0.9, 0.9, 0.002],
    )  # fmt: skip
    unknown = predictions([0.5, 0.6], [-1, -1], [0.01, 0.9], [[0.1, 0.1], [0.01, 0.1]], [0.5, 0.5])
    result = compute_metrics(test, unknown, NAMES, alpha=0.05, camera_alpha=0.01)
    assert result["false_unknown_rate"] == 0.2
    assert result["unknown_rejected"] == 0.5
    assert result["set_coverage"] == 0.6  # of the second image the right class has p 0.04, of the last 0.03
    assert result["ambiguous_rate"] == 0.2  # the third: both above 0.05
    assert result["mean_set_size"] == 1.2
    assert result["single_rate"] == 0.6  # the second is called unknown
    assert result["single_precision"] == pytest.approx(2 / 3)  # the last is no camera's
    assert result["real_called_camera"] == 0.5
    assert result["camera_called_generated"] == 0.5  # real has p 0.04
    assert result["real_cant_tell"] == 0
    assert result["generated_called_camera"] == pytest.approx(1 / 3)
    assert result["unknown_called_camera"] == 0
    assert result["brier"] == pytest.approx(2 * (0.1**2 + 0.6**2 + 0.1**2 + 0.2**2 + 0.8**2) / 5)
    assert result["real_auroc"] == pytest.approx(5 / 6)
    assert set(result) - {"per_class_auc"} == set(TITLES), "every metric has a title"
    split = evaluate_predictions(test, unknown, NAMES, 0.05, resamples=5)
    assert split.origins == {
        "real": dict(zip(ORIGINS, (1, 1, 0), strict=True)),
        "generated": dict(zip(ORIGINS, (1, 1, 1), strict=True)),
        "unknown": dict(zip(ORIGINS, (0, 1, 1), strict=True)),
    }
    assert split.per_unknown["unknown"]["origins"] == split.origins["unknown"]
    assert split.per_class["a"] == {
        "images": 3, "auc": result["per_class_auc"]["a"], "recall": 2 / 3, "set_coverage": 2 / 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("p_value", "class_p_values", "generated_p_value", "origin"),
    [
        (0.5, [0.5, 0.01], 0.01, "camera"),
        (0.5, [0.5, 0.01], 0.011, "can't tell"),  # a generator is not ruled out at its own level
        (0.5, [0.5, 0.06], 0.001, "camera"),  # all generators together are
        (0.05, [0.5, 0.01], 0.001, "can't tell"),  # unknown, and real fits
        (0.05, [0.05, 0.01], 0.001, "generated"),  # unknown, and real is ruled out
        (0.5, [0.05, 0.5], 0.5, "generated"),
    ],
)
def test_a_camera_is_said_only_where_every_generator_is_ruled_out(
    p_value, class_p_values, generated_p_value, origin
):
    likeliest = float(class_p_values[1] > class_p_values[0])
    image = predictions([likeliest], [0], [p_value], [class_p_values], [generated_p_value])
    assert ORIGINS[image.origins(0.05, 0.01, real=0)[0]] == origin


def test_origins_and_sets_are_those_of_the_records():
    """Of 3,000 images with small p-values, so that every case occurs."""
    rng = np.random.default_rng(0)
    logits, of_class = rng.normal(size=(3000, 3)), rng.uniform(size=(3000, 3)) ** 4
    generated, p_values = rng.uniform(size=3000) ** 8, rng.uniform(size=3000) ** 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    images = Predictions(
        np.zeros((3000, 1)), probabilities, np.zeros(3000, int), p_values=p_values, class_p_values=of_class,
        generated_p_values=generated,
    )  # fmt: skip
    output = ImageAttributionOutput(
        logits=torch.from_numpy(logits), open_set_score=torch.zeros(3000),
        p_values=torch.from_numpy(p_values), class_p_values=torch.from_numpy(of_class),
        generated_p_values=torch.from_numpy(generated),
    )  # fmt: skip
    config = tiny_config()
    real = config.label_names.index("real")
    records = records_of(output, config)
    origins = images.origins(config.alpha, config.camera_alpha, real)
    assert [ORIGINS[place] for place in origins] == [record["origin"] for record in records]
    assert set(origins) == {0, 1, 2}
    in_sets = images.in_sets(config.alpha, config.camera_alpha, real)
    for in_set, record in zip(in_sets, records, strict=True):
        names = [] if record["is_unknown"] else [config.label_names[k] for k in np.flatnonzero(in_set)]
        assert sorted(record["prediction_set"]) == sorted(names)


def test_a_rate_of_nothing_still_has_an_interval():
    low, high = exact_intervals({"none of a hundred": (0, 100)})["none of a hundred"]
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 100))


def test_coverage_at_a_precision_by_counting():
    confidence = np.array([0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55])
    probabilities, right = np.stack([confidence, 1 - confidence], axis=1), np.zeros(10, int)
    wrong_third = np.eye(10, dtype=int)[2]
    assert coverage_at_precision(probabilities, right) == 1
    assert coverage_at_precision(probabilities, wrong_third) == 1  # 9 of 10
    assert coverage_at_precision(probabilities[:9], wrong_third[:9]) == pytest.approx(2 / 9)
    assert coverage_at_precision(probabilities, 1 - right) == 0
    even = np.tile([0.7, 0.3], (4, 1))
    assert coverage_at_precision(even, np.array([0, 0, 0, 1])) == 0, "equal ones come together"


def synthetic(classes, gain, rng, per_class=30) -> Predictions:
    """Of three classes, real the first; p-values that a calibrated model might give."""
    labels = np.repeat(classes, per_class)
    logits = rng.normal(size=(len(labels), 3)) + gain * np.eye(3)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    score = probabilities.max(axis=1)
    return Predictions(
        np.zeros((len(labels), 1)), probabilities, labels, score, p_values=score,
        class_p_values=probabilities, generated_p_values=1 - probabilities[:, 0],
    )  # fmt: skip


def test_same_and_other_sources_stand_side_by_side():
    """With the gap on the classes that both have; unknown images count against both."""
    rng = np.random.default_rng(0)
    parts = {"test": synthetic([0, 1, 2], 4, rng), "cross": synthetic([0, 1], 1, rng)}
    parts["unknown"] = synthetic([2], 0, rng)
    names = ["real", "a", "b"]
    splits = evaluate_splits(parts, names, 0.1, 0.05, ["c"] * 30, resamples=40)
    test, cross = splits["test"], splits["cross"]
    common = compute_metrics(parts["test"].take(parts["test"].labels < 2), parts["unknown"], names, 0.1, 0.05)
    assert cross.same_classes == common
    assert set(cross.per_class) == {"real", "a"}
    for name in ("macro_auc", "accuracy", "auroc", "set_coverage"):
        gap, low, high = cross.gap[name]
        assert gap == pytest.approx(cross.metrics[name] - common[name])
        assert low <= gap <= high
    assert cross.gap["accuracy"][2] < 0, "it is worse on other sources"
    assert test.gap is None
    assert "unknown_rejected" not in cross.gap
    evaluation = Evaluation(names, 0.1, 0.05, "kde of embeddings", splits)
    sources = {"test": ["x", "y"], "cross": ["z"]}
    evaluation.note_sources({name: Dataset.from_dict({"source": of}) for name, of in sources.items()})
    report = format_report(evaluation)
    first = (
        "90 test images of known classes from 2 sources, 60 of 2 of 3 classes from 1 other sources (cross)"
    )
    assert report.startswith(f"{first}, 30 by unknown generators; 95 % intervals; alpha = 0.1")
    assert "| metric | test | test, classes of cross | cross | gap |" in report
    row = next(line for line in report.splitlines() if line.startswith("| accuracy |"))
    for figure in (test.metrics["accuracy"], common["accuracy"], cross.metrics["accuracy"]):
        assert f"| {figure:.4f}" in row
    assert "| b | 30 |" in report
    assert "said to be: camera" in report
    assert "not known" not in report
    assert f"{cross.metrics['macro_auc']:.4f}" in format_summary(splits)
    values = json.loads(json.dumps(evaluation.to_dict() | {"dataset": "zoo"}))
    assert Evaluation.from_dict(values) == evaluation
    assert "gap" not in values["splits"]["test"]


def test_equal_quality_on_other_sources_is_no_gap():
    rng = np.random.default_rng(1)
    parts = {"test": synthetic([0, 1, 2], 2, rng, 200), "cross": synthetic([0, 1, 2], 2, rng, 200)}
    splits = evaluate_splits(parts, ["real", "a", "b"], resamples=60)
    gap = splits["cross"].gap["macro_auc"]
    assert gap[1] < 0 < gap[2]
    assert splits["cross"].same_classes == splits["test"].metrics
    report = format_report(Evaluation(["real", "a", "b"], 0.05, 0.01, "kde of embeddings", splits))
    assert "| metric | test | cross | gap |" in report


def test_sources_without_a_cross_split_are_said_to_tell_nothing_of_others():
    parts = {"test": synthetic([0, 1, 2], 2, np.random.default_rng(0))}
    splits = evaluate_splits(parts, ["real", "a", "b"], resamples=5)
    evaluation = Evaluation(["real", "a", "b"], 0.05, 0.01, "kde of embeddings", splits)
    assert "other sources" not in format_report(evaluation)
    evaluation.note_sources({"test": Dataset.from_dict({"source": ["x", "y"]})})
    assert "on other sources is not known" in format_report(evaluation)


def test_a_baseline_without_verdicts_can_be_evaluated():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    probabilities = 1 / (1 + np.exp(-(4 * (labels - 0.5) + rng.normal(size=60))))
    test = Predictions(np.zeros((60, 1)), np.stack([1 - probabilities, probabilities], 1), labels)
    split = evaluate_predictions(test, None, NAMES, resamples=20)
    assert [sum(row) for row in split.confusion] == [30, 30]
    assert [row[-1] for row in split.confusion] == [0, 0]  # nothing is called unknown
    assert not {"set_coverage", "generated_called_camera", "auroc"} & set(split.metrics)
    evaluation = Evaluation(NAMES, 0.05, 0.01, "none", {"test": split})
    assert "per_unknown" not in evaluation.to_dict()["splits"]["test"]
    assert f"| {split.metrics['macro_auc']:.4f} [" in format_report(evaluation)
    assert "said to be" not in format_report(evaluation)


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
    expected = {f"{name} of embeddings" for name in OPEN_SET_SCORES}  # what the detector remembers
    assert set(split.open_set_scores) == expected
    assert split.open_set_scores["kde of embeddings"]["auroc"] == evaluation.metrics["auroc"]
    of_training = Evaluation.from_dict(trained.summary).metrics
    assert evaluation.metrics["macro_auc"] == pytest.approx(of_training["macro_auc"], abs=1e-6)
    assert np.sum(split.confusion) == 24
    assert split.noise["macro_auc"][0] == evaluation.metrics["macro_auc"]
    assert any(len(set(v)) > 1 for v in split.noise.values()), split.noise
    assert split.shuffled_macro_auc == pytest.approx(0.5, abs=0.1)
    for name in evaluation.metrics:
        assert TITLES.get(name, "AUC") in printed.out

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


def test_evaluate_shows_same_and_other_sources(trained, tmp_path, capsys):
    """On a data set whose split `cross` has two of the classes, and whose sources have another name."""
    (tmp_path / "data").mkdir()
    splits = load_splits(str(trained.folder))
    splits["cross"] = splits["test"].filter(lambda row: row["label"] != "b")
    for name, rows in splits.items():
        places = [f"{name if name == 'cross' else 'same'}{i % 2}" for i in range(len(rows))]
        rows.add_column("place", places).to_parquet(tmp_path / f"data/{name}.parquet")
    options = ["--model", str(trained.checkpoint), "--dataset", str(tmp_path / "data"), "--noise_seeds", "2"]
    command = ["evaluate", *options, "--source_column", "place", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    same, other = (
        "24 test images of known classes from 2 sources",
        "16 of 2 of 3 classes from 2 other sources",
    )
    assert printed.startswith(f"{same}, {other} (cross), 8 by unknown generators")
    evaluation = Evaluation.from_dict(json.loads((tmp_path / "out/evaluation.json").read_text()))
    test, cross = evaluation.splits["test"], evaluation.splits["cross"]
    assert cross.metrics["accuracy"] == cross.same_classes["accuracy"], "these are the same images"
    assert cross.gap["accuracy"][0] == 0
    assert set(cross.open_set_scores) == set(test.open_set_scores)
    assert len(cross.noise["macro_auc"]) == 2
    assert (tmp_path / "out/figures/confusion_cross.png").exists()


@pytest.mark.parametrize("split", ["test", "cross"])
def test_a_folder_of_test_images_alone_is_looked_at_whole(trained, folder, tmp_path, capsys, split):
    """Of some of the classes, with strangers, as one who did not train the model has them."""
    mine = tmp_path / "mine"
    shutil.copytree(folder / "test", mine / split)
    shutil.rmtree(mine / split / "real")
    shutil.copytree(folder / "unknown", mine / "unknown")
    options = ["--model", str(trained.checkpoint), "--dataset", str(mine)]
    assert main(["evaluate", *options, "--noise_seeds", "1", "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "noise seeds" not in printed, "one draw has no range"
    assert printed.startswith("16 test images of 2 of 3 known classes, 8 by unknown generators")
    found = Evaluation.from_dict(json.loads((tmp_path / "out/evaluation.json").read_text()))
    [(name, measured)], known = found.splits.items(), trained.summary["splits"]["test"]
    assert name == split
    assert {label: row["recall"] for label, row in measured.per_class.items()} == {
        label: known["per_class"][label]["recall"] for label in ("a", "b")
    }
    assert measured.metrics["unknown_rejected"] == known["metrics"]["unknown_rejected"]
    for image in [path for path in mine.rglob("*.png") if path.stem != "0"]:
        image.unlink()
    assert main(["robustness", *options, "--quick"]) == 0, "one of a class is looked at, if not one in four"
    printed = capsys.readouterr().out
    assert printed.startswith("2 images of known classes, 1 by unknown generators.")
    assert "| none |" in printed


def test_the_open_set_score_in_use_is_told_as_verdicts_have_it():
    """Not fitted again, without what calibrates it."""
    rng = np.random.default_rng(0)
    train = {"embeddings": rng.normal(size=(40, 3)), "labels": np.arange(40) % 2}
    config = SimpleNamespace(open_set_title="l2_kde of embeddings")
    model = SimpleNamespace(config=config, detector=SimpleNamespace(train_=train))
    parts = {"test": synthetic([0, 1, 2], 4, rng), "unknown": synthetic([2], 0, rng)}
    for part in parts.values():
        part.embeddings = rng.normal(size=(len(part), 3))
    found = compare_open_set_scores(model, parts)["test"]
    own = open_set_metrics(parts["test"].open_set_score, parts["unknown"].open_set_score)
    assert found["l2_kde of embeddings"] == own
    assert list(found)[0] == "l2_kde of embeddings"
    assert len(found) == len(OPEN_SET_SCORES)


def test_what_cannot_be_evaluated_is_named(trained, folder, tmp_path, capsys):
    options = ["evaluate", "--model", str(trained.checkpoint), "--dataset", str(folder)]
    assert main([*options, "--unknown", str(folder / "test")]) == 2
    assert "does not know" in capsys.readouterr().err
    for split in ("train", "validation", "test"):
        (folder / split / "a").rename(folder / split / "other")
    assert main(options) == 2
    assert "'test', has classes that the model does not know: ['other']. Put" in capsys.readouterr().err
    for split in ("train", "validation"):
        shutil.rmtree(folder / split)
    (folder / "test/other").rename(folder / "test/a")
    shutil.copytree(folder / "test", folder / "cross")
    shutil.rmtree(folder / "test/a")
    assert main(options) == 2
    assert (
        "'cross' is compared with 'test', which lacks classes that it has: ['a']" in capsys.readouterr().err
    )
    shutil.rmtree(folder / "cross/a")
    shutil.rmtree(folder / "cross/real")
    assert main(options) == 2
    assert "'cross', has images of 1 class" in capsys.readouterr().err
    shutil.rmtree(folder / "cross")
    (folder / "test").rename(folder / "validation")
    assert main(options) == 2
    assert "needs 'test' or 'cross', or 'train' to cut one from" in capsys.readouterr().err


def test_an_image_that_cannot_be_opened_is_named(trained, folder, tmp_path, capsys):
    options = ["evaluate", "--model", str(trained.checkpoint), "--dataset"]
    broken = folder / "test/a/3.png"
    broken.write_bytes(broken.read_bytes()[:500])
    rows = load_splits(str(folder))["test"]
    contents = [{"bytes": Path(image["path"]).read_bytes(), "path": None} for image in rows["image"]]
    tables = tmp_path / "tables"
    tables.mkdir()
    Dataset.from_dict({"image": contents, "label": rows["label"][:]}).cast_column(
        "image", datasets.Image()
    ).to_parquet(tables / "test.parquet")
    for data, told in {folder: f"protoleak: {broken} can't", tables: "row 3 of split 'test'"}.items():
        assert main([*options, str(data)]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "can't be written" not in error


def test_formats_that_give_the_class_away_are_noticed(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("same", "differ"):
        for generator in ("real", "a"):
            target = tmp_path / kind / generator
            target.mkdir(parents=True)
            for i in range(20):
                suffix = "jpg" if kind == "differ" and generator == "real" else "png"
                draw("real", rng).save(target / f"{i}.{suffix}")
    same, differ = (load_splits(str(tmp_path / kind))["train"] for kind in ("same", "differ"))
    unbiased, biased = find_shortcuts(same)["files"], find_shortcuts(differ)["files"]
    assert unbiased["p_value"] > 0.05
    assert unbiased["balanced_accuracy"] == unbiased["chance"] == 0.5
    assert biased["p_value"] < 1e-4
    assert biased["balanced_accuracy"] == 1.0
    assert biased["values"]["format"] == 2
    assert shortcut_warnings({"files": unbiased}) == []
    [line] = shortcut_warnings({"files": biased})
    assert line.startswith("file format, metadata and JPEG quality alone tell the classes apart")
    assert "--normalise_format" in line
    assert shortcut_warnings(find_shortcuts(differ, normalised=True)) == [], "of files size alone is left"


def labelled(images, labels, sources=None):
    """Rows as `load_splits` gives them."""
    contents = []
    for image, options in images:
        file = io.BytesIO()
        image.save(file, **options)
        contents.append({"bytes": file.getvalue(), "path": None})
    columns = {"image": contents, "label": labels} | ({} if sources is None else {"source": sources})
    return Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))


def test_each_way_to_know_a_class_without_its_pixels_is_named():
    """Size, JPEG quality and source; classes of unlike size, of which the largest is of every kind."""
    picture, labels = draw("real", np.random.default_rng(0)), ["real"] * 60 + ["a"] * 20
    large, png = picture.resize((80, 80)), {"format": "PNG"}
    jpeg = [{"format": "JPEG", "quality": quality} for quality in (75, 95)]
    cases = {
        "image size": [(large if i % 2 else picture, png) for i in range(60)] + [(large, png)] * 20,
        "JPEG quality": [(picture, jpeg[i % 2]) for i in range(60)] + [(picture, jpeg[1])] * 20,
    }
    for named, images in cases.items():
        [line] = shortcut_warnings(find_shortcuts(labelled(images, labels)))
        assert line.startswith(f"{named} alone tell the classes apart"), line
        assert ("--normalise_format" in line) == (named == "JPEG quality")
    sources = ["s1"] * 30 + ["s2"] * 30 + ["s3"] * 20
    [line] = shortcut_warnings(find_shortcuts(labelled([(picture, png)] * 80, labels, sources)))
    assert line.startswith("the source alone tells the class (balanced accuracy 1.00, chance 0.50)")
    assert find_shortcuts(labelled([(picture, png)] * 3, ["real", "real", "a"])) == {}


def test_unknown_images_come_as_a_folder_of_any_shape(tmp_path, folder):
    assert set(load_unknown(str(folder / "unknown/c"))["label"]) == {"unknown"}
    assert set(load_unknown(str(folder / "unknown"))["label"]) == {"c"}
    assert len(load_unknown(str(folder / "unknown"))) == 8


def test_two_processes_evaluate_as_one_does(trained, tmp_path):
    command = ["evaluate", "--model", str(trained.checkpoint), "--dataset", str(trained.folder)]
    command += ["--noise_seeds", "1"]
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, "-m", "protoleak.cli", *command, "--output_dir", str(tmp_path / "two")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("2 processes share the work") == 1
    one, two = (
        Evaluation.from_dict(json.loads((tmp_path / run / "evaluation.json").read_text())).main
        for run in ("one", "two")
    )
    assert run.stdout.count("24 test images of known classes") == 1  # by the main process alone
    assert two.confusion == one.confusion
    for name, value in one.metrics.items():
        assert two.metrics[name] == pytest.approx(value, abs=1e-6), name
