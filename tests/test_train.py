import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.evaluation.predictions import predict
from protoleak.evaluation.protocol import evaluate_predictions
from protoleak.evaluation.splits import load_splits
from protoleak.train import TrainingArguments, begin_as_discriminant, train
from protoleak.training.latents import RandomView, content_key, encode_split
from safetensors.torch import load_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.utils.data import TensorDataset

from . import ROOT
from .conftest import tiny_config, tiny_model, tiny_vae


def draw(generator: str, rng: np.random.Generator) -> Image.Image:
    """Noise whose tint and grain tell the generator."""
    noise = rng.normal(128, 30, (40, 40, 3))
    if generator == "a":
        noise = noise.repeat(8, axis=0)[:40] + (70, 0, -70)
    if generator == "b":
        noise = noise.repeat(8, axis=1)[:, :40] - (70, 0, -70)
    if generator == "c":
        noise = noise.mean(axis=(0, 1), keepdims=True) + np.zeros((40, 40, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """An imagefolder with splits and an unknown generator."""
    rng = np.random.default_rng(0)
    sizes = {"train": 16, "validation": 8, "test": 8, "unknown": 8}
    for split, size in sizes.items():
        for generator in ("c",) if split == "unknown" else ("real", "a", "b"):
            target = tmp_path / "data" / split / generator
            target.mkdir(parents=True)
            for i in range(size):
                draw(generator, rng).save(target / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def recipe(tmp_path, processor):
    """Where a new model's config, processor and VAE come from."""
    tiny_config(pooling="statistics").save_pretrained(tmp_path / "recipe")
    processor.save_pretrained(tmp_path / "recipe")
    tiny_vae().save_pretrained(tmp_path / "recipe" / "vae")
    return tmp_path / "recipe"


@pytest.fixture(autouse=True)
def _cache_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def arguments(tmp_path, folder, recipe, **changes) -> TrainingArguments:
    values = {"dataset_name": [str(folder)], "config_name": str(recipe), "output_dir": str(tmp_path / "run")}
    values["augmented_views"] = 1
    return TrainingArguments(
        **values | {"num_train_epochs": 20, "batch_size": 8, "learning_rate": 1e-2} | changes
    )


def test_training_learns_and_writes_a_checkpoint(tmp_path, folder, recipe):
    summary = train(arguments(tmp_path, folder, recipe))
    split = summary["splits"]["test"]
    metrics = split["metrics"]
    assert metrics["macro_auc"] > 0.9
    assert set(metrics) >= {"accuracy", "real_auroc", "auroc", "fpr95", "eer", "oscr", "per_class_auc"}
    assert list(metrics["per_class_auc"]) == ["real", "a", "b"]
    for name, (low, high) in split["intervals"].items():
        assert low <= metrics[name] <= high, name
    assert json.loads((tmp_path / "run/metrics.json").read_text())["splits"]["test"] == split
    card = ModelCard.load(tmp_path / "run/README.md")
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {name: value for name, value in metrics.items() if name != "per_class_auc"}
    assert card.data.license == "mit"
    for value in results.values():
        assert f"{value:.4f}" in card.text
    model = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "run")
    assert model.detector.labels == ["real", "a", "b"]
    # the metrics are those of the checkpoint that was written
    splits = load_splits(str(folder))
    processor = ProtoLeakImageProcessor.from_pretrained(tmp_path / "run")
    test = encode_split(splits["test"], ["real", "a", "b"], model, processor, Accelerator())
    predictions = predict(model, test, Accelerator())
    assert (predictions.probabilities.argmax(1) == predictions.labels).mean() == pytest.approx(
        metrics["accuracy"]
    )


def test_processed_images_are_known_and_calibrate_where_training_sees_them(tmp_path, folder, recipe):
    counts = {}
    for views in (0, 2):
        train(arguments(tmp_path, folder, recipe, num_train_epochs=1, augmented_views=views))
        detector = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "run").detector
        counts[views] = len(detector.train_["labels"]), len(detector.calibration_)
    assert counts == {0: (48, 24), 2: (96, 48)}
    first, second = detector.train_["statistics"].split(48)
    assert (detector.train_["labels"][:48] == detector.train_["labels"][48:]).all()
    assert ((first - second).abs().amax(dim=1) > 1e-3).all()


def test_a_new_network_begins_as_scikit_learns_discriminant():
    """Of the pooled features of the training images, with the shrinkage that validation chose."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    tint = torch.randn(3, 4, 1, 1, generator=rng)
    data = TensorDataset(torch.randn(90, 4, 8, 8, generator=rng) + tint[labels], labels)
    model = tiny_model(pooling="statistics", timesteps=[0])
    begin_as_discriminant(model, RandomView([data]), data)
    model.eval()
    encoder = model.protoleak.encoder
    with torch.no_grad():
        output = model(latents=data.tensors[0])
        features = encoder.norm(encoder.pool(model.protoleak.simulate(data.tensors[0]).flatten(0, 1))[0])
    assert (output.logits.argmax(dim=1) == labels).all()
    agreed = []
    for shrinkage in (0.05, 0.1, 0.2, 0.4, 0.7, 0.9):
        theirs = LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage).fit(
            features.numpy(), labels.numpy()
        )
        ours, axes = output.embeddings[:, :2].numpy(), theirs.transform(features.numpy())
        # the same plane, whatever its axes: each of ours is a linear map of theirs
        mapped = axes @ np.linalg.lstsq(axes, ours - ours.mean(0), rcond=None)[0]
        agreed.append(np.abs(ours - ours.mean(0) - mapped).max() / np.abs(ours).max())
    assert min(agreed) < 0.05, agreed
    torch.testing.assert_close(output.gates, torch.full_like(output.gates, 0.5))


def test_a_rare_class_is_not_missed_where_not_all_images_are_looked_at():
    rng = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1] * 100 + [2] * 3)
    data = TensorDataset(torch.randn(203, 4, 8, 8, generator=rng) + labels.view(-1, 1, 1, 1), labels)
    model = tiny_model(pooling="statistics")
    begin_as_discriminant(model, RandomView([data]), data, most_samples=20)
    assert model.head.prototypes.isfinite().all()
    with torch.no_grad():
        assert (model(latents=data.tensors[0][-3:]).logits.argmax(dim=1) == 2).all()


def test_the_same_seed_gives_the_same_weights(tmp_path, folder, recipe):
    short = {"num_train_epochs": 2}
    first = train(arguments(tmp_path, folder, recipe, output_dir=str(tmp_path / "one"), **short))
    second = train(arguments(tmp_path, folder, recipe, output_dir=str(tmp_path / "two"), **short))
    assert first["history"] == second["history"]
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "two")]
    assert weights[0] == weights[1]


def command(tmp_path, folder, recipe, run: str, *more: str) -> list[str]:
    """train.py as a process of its own."""
    values = {"dataset_name": folder, "config_name": recipe, "output_dir": tmp_path / run, "batch_size": 8}
    values["augmented_views"] = 1
    return [str(ROOT / "train.py"), *(f"--{name}={value}" for name, value in values.items()), *more]


def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path, folder, recipe):
    """SIGKILL at random moments, also between epochs, and again while it goes on."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    epochs = "--num_train_epochs=30"
    whole = [sys.executable, *command(tmp_path, folder, recipe, "whole", epochs)]
    subprocess.run(whole, env=environment, check=True, capture_output=True)
    state, rng, kills, seen = tmp_path / "killed" / "training_state.pt", random.Random(), 0, 0.0
    while kills < 3:
        process = subprocess.Popen(
            [sys.executable, *command(tmp_path, folder, recipe, "killed", epochs)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not (state.exists() and state.stat().st_mtime > seen):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        seen = state.stat().st_mtime if state.exists() else seen
        kills += 1
    assert kills > 0, "it ended before it could be killed"
    resumed = subprocess.run(
        [sys.executable, *command(tmp_path, folder, recipe, "killed", epochs)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    expected, found = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0)
    histories = [
        json.loads((tmp_path / run / "metrics.json").read_text())["history"] for run in ("whole", "killed")
    ]
    assert histories[0] == histories[1]
    assert not state.exists()
    assert not list(tmp_path.glob("*.partial*"))


def test_a_state_of_other_arguments_is_passed_over_and_a_damaged_one_told(tmp_path, folder, recipe, caplog):
    wanted = arguments(tmp_path, folder, recipe, num_train_epochs=2)
    reference = train(wanted)["history"]
    path = tmp_path / "run" / "training_state.pt"
    torch.save({"run": "another"}, path)
    assert train(wanted)["history"] == reference
    assert "other arguments" in caplog.text
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"training_state\.pt can't be read"):
        train(wanted)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, folder, recipe, monkeypatch):
    wanted = arguments(tmp_path, folder, recipe, num_train_epochs=1)
    train(wanted)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("protoleak.density_protoleak.OpenSetDetector.save", full)
    with pytest.raises(OSError, match=r"run can't be written.*No space left"):
        train(arguments(tmp_path, folder, recipe, num_train_epochs=1, seed=1))
    (tmp_path / "run" / "training_state.pt").unlink()  # from which it goes on
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert not list(tmp_path.glob("*.partial*"))


def test_two_processes_train_one_checkpoint(tmp_path, folder, recipe):
    """Sharded latents, one summary, and metrics that one process gives again."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    run = subprocess.run(
        [*launch, *command(tmp_path, folder, recipe, "two", "--num_train_epochs=3")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Macro AUC") == 1
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())["splits"]["test"]["metrics"]
    model = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "two")
    processor = ProtoLeakImageProcessor.from_pretrained(tmp_path / "two")
    splits = load_splits(str(folder))
    names, accelerator = model.config.label_names, Accelerator()
    data = {s: encode_split(splits[s], names, model, processor, accelerator) for s in ("test", "unknown")}
    again = evaluate_predictions(*(predict(model, d, accelerator) for d in data.values()), names).metrics
    assert again["macro_auc"] == pytest.approx(metrics["macro_auc"], abs=1e-6)
    assert again["auroc"] == pytest.approx(metrics["auroc"], abs=1e-6)


def test_a_checkpoint_is_fine_tuned_on_other_classes(tmp_path, folder, recipe):
    train(arguments(tmp_path, folder, recipe, num_train_epochs=2))
    for split in ("train", "validation", "test"):
        (folder / split / "b").rename(folder / split / "newer")
        (folder / split / "a").rename(folder / split / "new")
    tuned = arguments(
        tmp_path, folder, recipe, model_name_or_path=str(tmp_path / "run"),
        output_dir=str(tmp_path / "tuned"), num_train_epochs=2,
    )  # fmt: skip
    train(tuned)
    model = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "tuned")
    assert model.detector.labels == [model.config.id2label[k] for k in range(3)] == ["real", "new", "newer"]


def test_classes_are_added_and_the_old_ones_kept(tmp_path, folder, recipe):
    """FOLDER holds one new generator; the data set of the old ones is named beside it."""
    train(arguments(tmp_path, folder, recipe, num_train_epochs=2))
    rng = np.random.default_rng(1)
    for i in range(16):
        (tmp_path / "more/c").mkdir(parents=True, exist_ok=True)
        draw("c", rng).save(tmp_path / f"more/c/{i}.png")
    tuned = arguments(
        tmp_path, folder, recipe, model_name_or_path=str(tmp_path / "run"),
        dataset_name=[str(folder), str(tmp_path / "more")],
        output_dir=str(tmp_path / "tuned"), num_train_epochs=2,
    )  # fmt: skip
    summary = train(tuned)
    metrics = summary["splits"]["test"]["metrics"]
    assert list(metrics["per_class_auc"]) == ["real", "a", "b", "c"]
    assert "auroc" not in metrics, "c is known now, and nothing else was unknown"
    assert f"--dataset_name {folder} {tmp_path / 'more'}" in (tmp_path / "tuned/README.md").read_text()


@pytest.mark.parametrize("place", ["vae", "."])
def test_a_new_model_on_a_given_vae(tmp_path, folder, recipe, place):
    tiny_vae(16).save_pretrained(tmp_path / "mine" / place)
    train(arguments(tmp_path, folder, recipe, vae_name_or_path=str(tmp_path / "mine"), num_train_epochs=1))
    model = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "run")
    assert model.config.latent_channels == model.vae.config.latent_channels == 16


def test_latents_are_cached_by_content_processor_and_vae(folder, processor, monkeypatch):
    model = tiny_model()
    rows = load_splits(str(folder))["train"]
    accelerator = Accelerator()
    labels = ["real", "a", "b"]
    first = encode_split(rows, labels, model, processor, accelerator).tensors[0]
    direct = model.protoleak.encode(processor([rows[5]["image"]["path"]])["pixel_values"])
    torch.testing.assert_close(first[5:6], direct, atol=2e-3, rtol=1e-3)  # on disk in float16
    key = content_key(rows, model, processor)
    monkeypatch.setattr(model.protoleak, "encode", None)  # encoding again would fail
    assert torch.equal(encode_split(rows, labels, model, processor, accelerator).tensors[0], first)
    monkeypatch.undo()
    other = type(processor)(crop_size=40)
    assert content_key(rows, model, other) != key
    with torch.no_grad():
        next(model.vae.parameters()).add_(1)
    assert content_key(rows, model, processor) != key
    model = tiny_model()
    assert content_key(rows, model, processor) == key
    draw("c", np.random.default_rng(5)).save(rows[0]["image"]["path"])
    assert content_key(rows, model, processor) != key


def test_splits_are_cut_where_there_are_none(tmp_path):
    rng = np.random.default_rng(0)
    for generator in ("real", "a"):
        for step in ("step1", "step2"):
            for root in ("Closed_Set", "Open_Set"):
                target = tmp_path / "wild" / root / (generator if root == "Closed_Set" else "c") / step
                target.mkdir(parents=True, exist_ok=True)
                for i in range(10):
                    draw(generator, rng).save(target / f"{generator}{i}.webp")
    splits = load_splits(str(tmp_path / "wild"))
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 20, "validation": 8, "test": 12, "unknown": 40,
    }  # fmt: skip
    assert set(splits["train"]["label"]) == {"real", "a"}
    assert set(splits["unknown"]["label"]) == {"c"}
    files = [row["path"] for split in ("train", "validation", "test") for row in splits[split]["image"]]
    assert len(set(files)) == 40
    prompts = [set(splits[split]["prompt"]) for split in ("train", "validation", "test")]
    assert sorted(map(len, prompts)) == [2, 3, 5]
    assert len(set.union(*prompts)) == 10, "a prompt is in one split alone"


def test_parquet_files_keep_their_unknown_split(tmp_path, folder):
    splits = load_splits(str(folder))
    (tmp_path / "parquet").mkdir()
    for split, rows in splits.items():
        rows.to_parquet(tmp_path / f"parquet/{split}-00000-of-00001.parquet")
    found = load_splits(str(tmp_path / "parquet"))
    assert {split: rows["label"][:] for split, rows in found.items()} == {
        split: rows["label"][:] for split, rows in splits.items()
    }


def test_a_data_set_that_was_made_again_is_read_again(tmp_path, folder):
    """Also where it has a card, by whose name alone `datasets` knows it."""
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    splits = ("train", "validation", "test")
    files = "".join(f"\n  - split: {split}\n    path: {split}-*.parquet" for split in splits)
    (zoo / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:{files}\n---\n")
    contents = []
    for kept in ("ab", ("a", "real")):
        for split, rows in load_splits(str(folder)).items():
            if split in splits:
                rows = rows.filter(lambda row, kept=kept: row["label"] in kept)
                rows.to_parquet(zoo / f"{split}-00000-of-00001.parquet")
        contents.append(set(load_splits(str(zoo))["train"]["label"]))
    assert contents == [{"a", "b"}, {"a", "real"}]


def test_groups_are_not_split(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    lines = ["file_name,label,group"]
    for i in range(40):
        draw("real", rng).save(tmp_path / f"data/{i}.png")
        lines.append(f"{i}.png,{'ab'[i % 2]},p{i // 4}")
    (tmp_path / "data/metadata.csv").write_text("\n".join(lines))
    splits = load_splits(str(tmp_path / "data"))
    groups = [set(splits[split]["group"]) for split in ("train", "validation", "test")]
    assert sum(map(len, groups)) == 10
    assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])


def test_bad_data_is_named(tmp_path, folder, recipe):
    (folder / "train/a/0.png").write_text("broken")
    with pytest.raises(OSError, match=r"train/a/0\.png"):
        train(arguments(tmp_path, folder, recipe))
    (tmp_path / "wild/Closed_Set").mkdir(parents=True)
    with pytest.raises(ValueError, match="Closed_Set"):
        load_splits(str(tmp_path / "wild"))
    with pytest.raises(OSError, match="no_such_vae"):
        train(arguments(tmp_path, folder, recipe, vae_name_or_path=str(tmp_path / "no_such_vae")))


def test_leakzoo_is_what_its_card_says():
    from . import ROOT

    zoo = load_dataset(str(ROOT / "leakzoo"))
    labels = zoo["train"].features["label"]
    known = set(labels.int2str(zoo["train"]["label"][:]))
    unknown = set(labels.int2str(zoo["unknown"]["label"][:]))
    assert len(known) >= 7
    assert len(unknown) >= 3
    assert "real" in known
    assert not known & unknown
    photos = [set(zoo[split]["photo"]) for split in ("train", "validation", "test")]
    assert not (photos[0] & photos[1] | photos[0] & photos[2] | photos[1] & photos[2])
    sizes = {"train": 150, "validation": 50, "test": 80, "unknown": 80}
    for split, size in sizes.items():
        counts = np.bincount(zoo[split]["label"])
        assert set(counts[counts > 0]) == {size}
        assert {image.size for image in zoo[split]["image"][::50]} == {(64, 64)}
        assert {(image.format, image.mode) for image in zoo[split]["image"][::50]} == {("PNG", "RGB")}
    assert sum(path.stat().st_size for path in (ROOT / "leakzoo").glob("*.parquet")) <= 16e6
