import gc
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from PIL import Image
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.evaluation.predictions import predict
from protoleak.evaluation.protocol import evaluate_predictions
from protoleak.evaluation.splits import load_splits
from protoleak.train import main, start_accelerator, train
from protoleak.training.initialisation import begin_as_discriminant, make_model
from protoleak.training.latents import LatentCache
from protoleak.training.patches import make_patch_autoencoder
from protoleak.training.state import TrainingState
from protoleak.training.views import RandomView, encode_splits
from safetensors.torch import load_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.utils.data import TensorDataset

from . import ROOT
from .conftest import TEXTURE, TrainedRun, arguments, draw, tiny_config, tiny_model, tiny_vae


def load(checkpoint: Path) -> tuple[ProtoLeakForImageAttribution, LatentCache]:
    model = ProtoLeakForImageAttribution.from_pretrained(checkpoint)
    return model, LatentCache(model, ProtoLeakImageProcessor.from_pretrained(checkpoint), Accelerator())


def test_training_learns_and_writes_a_checkpoint(trained):
    split = trained.summary["splits"]["test"]
    metrics = split["metrics"]
    assert metrics["macro_auc"] > 0.85  # of 24 images; seeds give 0.88 to 0.97
    assert set(metrics) >= {"accuracy", "real_auroc", "auroc", "fpr95", "eer", "oscr", "per_class_auc"}
    assert list(metrics["per_class_auc"]) == ["a", "b", "real"], "as the data set numbers them"
    for name, (low, high) in split["intervals"].items():
        assert low <= metrics[name] <= high, name
    assert json.loads((trained.checkpoint / "metrics.json").read_text())["splits"]["test"] == split
    card = ModelCard.load(trained.checkpoint / "README.md")
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert results == {name: value for name, value in metrics.items() if name != "per_class_auc"}
    for value in results.values():
        assert f"{value:.4f}" in card.text
    model, cache = load(trained.checkpoint)
    assert model.detector.labels == ["a", "b", "real"]
    # the metrics are those of the checkpoint that was written
    predictions = predict(model, cache.encode(load_splits(str(trained.folder))["test"]), Accelerator())
    assert (predictions.probabilities.argmax(1) == predictions.labels).mean() == pytest.approx(
        metrics["accuracy"]
    )


def test_processed_images_are_known_and_calibrate_where_training_sees_them(trained):
    model, cache = load(trained.checkpoint)  # with a post-processed view of each image
    assert (len(model.detector.train_["labels"]), len(model.detector.calibration_)) == (96, 48)
    first, second = model.detector.train_["embeddings"].split(48)
    assert (model.detector.train_["labels"][:48] == model.detector.train_["labels"][48:]).all()
    assert ((first - second).abs().amax(dim=1) > 1e-3).all()
    untouched = encode_splits(load_splits(str(trained.folder)), cache, 2, augmented_views=0, seed=0)
    assert (len(untouched.known), len(untouched.validation), len(untouched.train)) == (48, 24, 48)


# --- the start ----------------------------------------------------------------------------------------------


class InMemory(TensorDataset):
    """What [`LatentDataset`] has in files."""

    def __init__(self, latents: torch.Tensor, labels: torch.Tensor):
        super().__init__(latents, labels)
        self.shape, self.labels = latents.shape[1:], labels


def test_a_new_network_begins_as_scikit_learns_discriminant():
    """Of the pooled features of the training images, with the shrinkage that validation chose."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    tint = torch.randn(3, 4, 1, 1, generator=rng)
    data = InMemory(torch.randn(90, 4, 8, 8, generator=rng) + tint[labels], labels)
    model = tiny_model(pooling="statistics", timesteps=[0])
    settings = begin_as_discriminant(model, RandomView([data]), data)
    model.eval()
    with torch.no_grad():
        output = model(latents=data.tensors[0])
        (features,) = model.protoleak.encoder.family_features(output.features.mean(dim=2))
    assert (output.logits.argmax(dim=1) == labels).all()
    theirs = LinearDiscriminantAnalysis(solver="eigen", shrinkage=settings.shrinkages[0])
    axes = theirs.fit(features.numpy(), labels.numpy()).transform(features.numpy())
    ours = output.embeddings[:, :2].numpy()
    # the same plane, whatever its axes: each of ours is a linear map of theirs
    mapped = axes @ np.linalg.lstsq(axes, ours - ours.mean(0), rcond=None)[0]
    assert np.abs(ours - ours.mean(0) - mapped).max() < 0.05 * np.abs(ours).max()
    torch.testing.assert_close(output.gates, torch.full_like(output.gates, 0.5))


def test_a_rare_class_is_not_missed_where_not_all_images_are_looked_at():
    rng = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1] * 100 + [2] * 3)
    data = InMemory(torch.randn(203, 4, 8, 8, generator=rng) + labels.view(-1, 1, 1, 1), labels)
    model = tiny_model(pooling="statistics")
    begin_as_discriminant(model, RandomView([data]), data, max_samples=20)
    assert model.head.prototypes.isfinite().all()
    with torch.no_grad():
        assert (model(latents=data.tensors[0][-3:]).logits.argmax(dim=1) == 2).all()


@pytest.mark.parametrize("place", ["vae", "."])
def test_a_new_model_on_the_vae_that_arguments_name(tmp_path, recipe, place):
    tiny_vae(16).save_pretrained(tmp_path / "mine" / place)
    named = arguments(tmp_path, tmp_path, recipe, vae_name_or_path=str(tmp_path / "mine"))
    model, _ = make_model(named, ["real", "a"])
    assert model.config.latent_channels == model.vae.config.latent_channels == 16
    assert model.config.backbone_config.num_channels == 16
    assert (model.config.vae_name_or_path, model.config.vae_subfolder) == (
        str(tmp_path / "mine"),
        "vae" if place == "vae" else None,
    )


# --- runs ---------------------------------------------------------------------------------------------------


def test_a_given_vae_is_trained_on_and_the_seed_fixes_the_weights(tmp_path, folder, recipe):
    """The recipe's own VAE has 4 latent channels."""
    vae, short = tiny_vae(6), {"num_train_epochs": 2}
    first = train(arguments(tmp_path, folder, recipe, output_dir=str(tmp_path / "one"), **short), vae=vae)
    second = train(arguments(tmp_path, folder, recipe, output_dir=str(tmp_path / "two"), **short), vae=vae)
    assert first["history"] == second["history"]
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "two")]
    assert weights[0] == weights[1]
    model = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "one")
    assert model.config.latent_channels == model.vae.config.latent_channels == 6


def as_words(wanted) -> list[str]:
    """train.py as a process of its own."""
    values = {name: value for name, value in asdict(wanted).items() if value is not None}
    values["dataset_name"] = wanted.dataset_name[0]
    return [str(ROOT / "train.py"), *(f"--{name}={value}" for name, value in values.items())]


def kill_after_an_epoch(wanted, seen: float, wait: float) -> float:
    """Start the run, SIGKILL it `wait` seconds after a state newer than `seen`; when that was written."""
    state = Path(wanted.output_dir) / "training_state"
    process = subprocess.Popen(
        [sys.executable, *as_words(wanted)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    newest = lambda: max((p.stat().st_mtime for p in state.glob("*/run.json")), default=0.0)  # noqa: E731
    while process.poll() is None and newest() <= seen:
        time.sleep(0.002)
    time.sleep(wait)
    assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    process.wait()
    return newest()


def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path, folder, recipe):
    """SIGKILL at random moments, also between epochs, and again while it goes on."""
    long = {"num_train_epochs": 30, "patience": 30}
    train(arguments(tmp_path, folder, recipe, output_dir=str(tmp_path / "whole"), **long))
    wanted = arguments(tmp_path, folder, recipe, output_dir=str(tmp_path / "killed"), **long)
    rng, seen = random.Random(), 0.0
    for _ in range(2):
        seen = kill_after_an_epoch(wanted, seen, rng.uniform(0, 0.3))
    assert len(list((tmp_path / "killed").iterdir())) == 1, "there is a state and nothing else yet"
    train(wanted)
    expected, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    for name, weight in expected.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-6, rtol=0)
    histories = [
        json.loads((tmp_path / run / "metrics.json").read_text())["history"] for run in ("whole", "killed")
    ]
    assert histories[0] == histories[1]
    assert not (tmp_path / "killed/training_state").exists()
    assert not list(tmp_path.glob("*.partial*"))


def test_a_crash_while_a_state_is_written_leaves_the_one_before(tmp_path, folder, recipe, monkeypatch):
    wanted = arguments(tmp_path, folder, recipe, num_train_epochs=4)
    expected = train(wanted)["history"]
    save_state, calls = Accelerator.save_state, []

    def crash_at_the_third(accelerator, place):
        calls.append(place)
        save_state(accelerator, place)
        if len(calls) == 3:
            (Path(place) / "optimizer.bin").write_bytes(b"half")
            raise KeyboardInterrupt

    monkeypatch.setattr(Accelerator, "save_state", crash_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(wanted)
    states = {path.name for path in (tmp_path / "run/training_state").iterdir()}
    assert states == {"2", "3.partial"}
    assert train(wanted)["history"] == expected
    assert len(calls) == 5, "it went on after the second epoch"


def test_a_state_of_another_run_is_passed_over_and_a_damaged_one_told(
    tmp_path, folder, recipe, monkeypatch, caplog
):
    """Another run: other arguments, another number of processes, or another version of torch."""
    wanted = arguments(tmp_path, folder, recipe, num_train_epochs=2)
    save, unwanted = TrainingState.save, []

    def stop_after_the_first(state, epoch):
        save(state, epoch)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        train(wanted)
    monkeypatch.undo()
    state, place = TrainingState(tmp_path / "run", wanted, Accelerator()), tmp_path / "run/training_state/1"
    assert state.run == (place / "run.json").read_text()
    for other, version in ((arguments(tmp_path, folder, recipe, seed=1), None), (wanted, "2.0.0")):
        if version:
            monkeypatch.setattr(torch, "__version__", version)
        unwanted.append(TrainingState(tmp_path / "run", other, Accelerator()))
    for another in unwanted:
        caplog.clear()
        another.load()  # without what training registers, loading would fail
        assert "other arguments" in caplog.text
    monkeypatch.undo()
    (place / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"training_state/1 can't be read"):
        train(wanted)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(trained, tmp_path, folder, recipe, monkeypatch):
    run = trained.copy_checkpoint(tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("protoleak.density_protoleak.OpenSetDetector.save", full)
    with pytest.raises(OSError, match=r"run can't be written.*No space left"):
        train(arguments(tmp_path, folder, recipe, num_train_epochs=1))
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert {p: content for p, content in after.items() if "training_state" not in p.parts} == before
    assert not list(tmp_path.glob("*.partial*"))


def test_two_processes_train_one_checkpoint(tmp_path, folder, recipe):
    """Sharded latents, one summary, and metrics that one process gives again."""
    wanted = arguments(tmp_path, folder, recipe, num_train_epochs=3)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}  # nothing is encoded yet
    run = subprocess.run([*launch, *as_words(wanted)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("2 processes share the work") == 1
    assert run.stdout.count("Macro AUC") == 1
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["splits"]["test"]["metrics"]
    model, cache = load(tmp_path / "run")
    splits = load_splits(str(folder))
    made = [predict(model, cache.encode(splits[s]), cache.accelerator) for s in ("test", "unknown")]
    again = evaluate_predictions(*made, model.config.label_names, resamples=2).metrics
    assert again["macro_auc"] == pytest.approx(metrics["macro_auc"], abs=1e-6)
    assert again["auroc"] == pytest.approx(metrics["auroc"], abs=1e-6)


# --- images that tell their source --------------------------------------------------------------------------


def draw_sources(target: Path) -> Path:
    """
    Two classes from four sources that are brighter or darker, and one from one of them: 48 training, 24
    validation and 24 test images, 12 of other sources and 8 unknown ones.
    """
    rng, records = np.random.default_rng(0), {}
    for split, size in {"train": 16, "validation": 8, "test": 8, "cross": 4, "unknown": 8}.items():
        for generator in ("c",) if split == "unknown" else ("real", "a", "b"):
            for i in range(size):
                source = 10 + i % 2 if split in ("cross", "unknown") else i % (1 if generator == "b" else 4)
                pixels = np.asarray(draw(generator, rng)) / 255.0
                image = Image.fromarray((255 * pixels ** (0.8 + 0.1 * source)).astype(np.uint8))
                row = {
                    "image": image,
                    "label": generator,
                    "source": f"s{source}",
                    "group": f"{split}{i // 2}",
                }
                records.setdefault(split, []).append(row)
    target.mkdir()
    for split, rows in records.items():
        datasets.Dataset.from_list(rows).to_parquet(target / f"{split}.parquet")
    return target


@pytest.fixture(scope="session")
def across_sources(tmp_path_factory, cache) -> TrainedRun:
    """Trained once by a recipe of the root's kind; nothing may be changed in its folders."""
    place = tmp_path_factory.mktemp("across_sources")
    recipe, folder = place / "recipe", draw_sources(place / "data")
    tiny_config(**TEXTURE | {"scales": [1], "open_set_scores": {"embeddings": "l2_kde"}}).save_pretrained(
        recipe
    )
    ProtoLeakImageProcessor(crop_size=24, do_resize=False, num_crops=4).save_pretrained(recipe)
    make_patch_autoencoder().save_pretrained(recipe / "vae")
    wanted = arguments(place, folder, recipe, orientations=1)
    return TrainedRun(place / "run", folder, recipe, train(wanted))


def test_images_with_sources_are_all_learned_from_and_left_out_in_turn(across_sources):
    """Validation images too, and no epochs follow; what calibrates is all of them, by models without them."""
    model, _ = load(across_sources.checkpoint)
    detector = model.detector
    assert across_sources.summary["epochs"] == 0
    assert detector.held_out_ is None
    assert len(detector.calibration_) == 48 + 24
    assert len(detector.train_["labels"]) == 2 * (48 + 24), "with a post-processed view of each"
    assert set(across_sources.summary["splits"]) == {"test", "cross"}
    assert (
        "a single source: b; what is learned of these may be that source"
        in across_sources.summary["warnings"]
    )
    assert model.config.scope["sources"] == 4
    assert across_sources.summary["splits"]["test"]["metrics"]["macro_auc"] > 0.9
    resubstituted = detector.open_set_score({"embeddings": detector.train_["embeddings"][:72]})
    assert detector.calibration_.median() < np.median(resubstituted), (
        "sources left out are less like the known"
    )


def test_a_checkpoint_gives_its_files_the_verdicts_that_its_metrics_are_of(across_sources):
    """From pixels, as from the features that training cached."""
    model, cache = load(across_sources.checkpoint)
    rows = load_splits(str(across_sources.folder))["test"]
    predictions = predict(model, cache.encode(rows), Accelerator())
    metrics = across_sources.summary["splits"]["test"]["metrics"]
    accuracy = (predictions.probabilities.argmax(1) == predictions.labels).mean()
    assert accuracy == pytest.approx(metrics["accuracy"])
    output = model.eval()(cache.processor([row["image"]["bytes"] for row in rows])["pixel_values"])
    probabilities = output.logits.double().softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(predictions.probabilities, probabilities, atol=0.01)
    np.testing.assert_allclose(predictions.open_set_score, output.open_set_score, rtol=0.01, atol=0.1)


def test_without_sources_validation_images_are_held_out(trained):
    model, _ = load(trained.checkpoint)
    assert len(model.detector.held_out_["labels"]) == 48
    assert len(trained.summary["history"]) == trained.summary["epochs"] + 1 > 1


# --- from a checkpoint on -----------------------------------------------------------------------------------


def test_a_checkpoint_is_fine_tuned_on_other_classes(trained, tmp_path, folder, recipe):
    for split in ("train", "validation", "test"):
        (folder / split / "b").rename(folder / split / "newer")
        (folder / split / "a").rename(folder / split / "new")
    source = {"model_name_or_path": str(trained.checkpoint), "num_train_epochs": 1}
    train(arguments(tmp_path, folder, recipe, **source))
    model = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "run")
    assert model.detector.labels == [model.config.id2label[k] for k in range(3)] == ["new", "newer", "real"]


def test_classes_are_added_and_the_old_ones_kept(trained, tmp_path, folder, recipe):
    """FOLDER holds one new generator; the data set of the old ones is named beside it."""
    rng = np.random.default_rng(1)
    for i in range(16):
        (tmp_path / "more/c").mkdir(parents=True, exist_ok=True)
        draw("c", rng).save(tmp_path / f"more/c/{i}.png")
    both = [str(folder), str(tmp_path / "more")]
    source = {"model_name_or_path": str(trained.checkpoint), "num_train_epochs": 1}
    summary = train(arguments(tmp_path, folder, recipe, dataset_name=both, **source))
    metrics = summary["splits"]["test"]["metrics"]
    assert list(metrics["per_class_auc"]) == ["a", "b", "real", "c"], "the old ones keep their numbers"
    assert "auroc" not in metrics, "c is known now, and nothing else was unknown"
    card = (tmp_path / "run/README.md").read_text()
    assert "--dataset_name data more" in card
    assert str(tmp_path) not in card, "no path of this machine"
    assert summary["dataset"] == "data and more"


# --- what training reads ------------------------------------------------------------------------------------


def test_ctrl_c_is_a_word(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("protoleak.train.train", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert main() == 130
    assert capsys.readouterr().err.endswith("stopped; the same command goes on after its last epoch\n")


def test_what_is_asked_for_in_vain_is_told_before_any_work(tmp_path, folder, recipe, monkeypatch):
    """A tracker that is not installed, a place that can't be written, an argument that there is not."""
    monkeypatch.setattr("protoleak.train.load_data", lambda arguments: pytest.fail("it has begun"))
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ImportError, match="pip install tensorboard"):
        train(arguments(tmp_path, folder, recipe, report_to="tensorboard"))
    (tmp_path / "file").write_text("of another")
    with pytest.raises(OSError, match="file can't be written"):
        train(arguments(tmp_path, folder, recipe, output_dir=str(tmp_path / "file")))
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "3"])
    with pytest.raises(SystemExit, match=r"train\.py: .*--epochs"):
        main()


def test_trackers_get_numbers_and_texts(tmp_path, folder, recipe, monkeypatch):
    """TensorBoard refuses anything else, such as the list of data sets."""
    told = {}
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda names, place: names)
    monkeypatch.setattr("protoleak.train.Accelerator.init_trackers", lambda *_, config: told.update(config))
    start_accelerator(arguments(tmp_path, folder, recipe, report_to="tensorboard"))
    assert told["dataset_name"] == str([str(folder)])
    assert {type(value) for value in told.values()} <= {int, float, str, bool}


def test_training_never_holds_many_latents(trained, monkeypatch, tmp_path):
    """Rows come from files when they are asked for. Nothing else in training is in half precision."""
    alive = []

    def count(*_):
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        alive.append(sum(one.numel() for one in tensors if one.dtype == torch.float16))
        return {"validation_loss": 1.0}

    monkeypatch.setattr("protoleak.training.loop.validate", count)
    train(arguments(tmp_path, trained.folder, trained.recipe, num_train_epochs=1))
    assert len(alive) == 2, "before and after the epoch"
    row = 4 * 8 * 8
    assert max(alive) <= 8 * row, "no more than a batch; of the training images alone there are 480 rows"
