"""What training looks at first, what it warns of, and what a checkpoint and its card say of themselves."""

import json
import shutil
import tracemalloc

import datasets
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from protoleak import ProtoLeakConfig, ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.cli import main
from protoleak.evaluation.splits import load_splits
from protoleak.forensics.scan import Attributor
from protoleak.postprocessing_protoleak import postprocess
from protoleak.train import train
from protoleak.training.card import HubFacts, write_card
from protoleak.training.checks import Screen

from .conftest import arguments, draw


def test_bad_data_is_named(tmp_path, folder, recipe, caplog):
    """All images that can't be read at once, and training goes on without them if it is asked to."""
    for place in ("train/a/0.png", "test/b/3.png"):
        (folder / place).write_text("broken")
    with pytest.raises(OSError, match=r"2 images can't be read:[\s\S]*--skip_unreadable") as told:
        train(arguments(tmp_path, folder, recipe))
    assert all(place in str(told.value) for place in ("train/a/0.png", "test/b/3.png"))
    summary = train(arguments(tmp_path, folder, recipe, num_train_epochs=1, skip_unreadable=True))
    assert "train/a/0.png" in caplog.text
    assert summary["splits"]["test"]["num_test"] == 23
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["scope"]["images"] == 47
    (tmp_path / "wild/Closed_Set").mkdir(parents=True)
    with pytest.raises(ValueError, match="Closed_Set"):
        load_splits(str(tmp_path / "wild"))
    missing = {"skip_unreadable": True, "vae_name_or_path": str(tmp_path / "no_such_vae")}
    with pytest.raises(OSError, match="no_such_vae"):
        train(arguments(tmp_path, folder, recipe, **missing))


def test_images_are_screened_without_holding_them_all():
    images = [{"bytes": bytes([i]) * 100_000, "path": None} for i in range(200)]  # 20 MB
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image(decode=False))
    del images
    screen = Screen(max_pixels=100)
    tracemalloc.start()
    assert len(screen("train", rows)) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(screen.faults) == 200
    assert peak < 8e6


def test_training_warns_of_what_ruins_it_and_the_checkpoint_says_what_it_is_for(
    tmp_path, folder, recipe, caplog
):
    """
    Real images saved as JPEG, generated ones as PNG, few of each. Without splits, 2 of 10 images of a class
    calibrate: too few to call anything unknown.
    """
    for path in list(folder.rglob("real/*.png")):
        Image.open(path).save(path.with_suffix(".jpg"), quality=85)
        path.unlink()
    for split in ("validation", "test", "unknown"):
        shutil.rmtree(folder / split)
    for path in [*folder.rglob("1[0-9].*")]:
        path.unlink()
    quick = {"num_train_epochs": 1, "augmented_views": 0, "bootstrap_resamples": 2}
    train(arguments(tmp_path, folder, recipe, **quick, scope="noise in\nthree tints", license="cc0-1.0"))
    card = ModelCard.load(tmp_path / "run/README.md")
    config = ProtoLeakConfig.from_pretrained(tmp_path / "run")
    warnings = (
        "file format, metadata and JPEG quality alone tell the classes apart",
        "fewer than 50 images to learn from: a (5), b (5), real (5)",
        "only 6 images calibrate it, so that none is ever called unknown at alpha 0.05",
        "too few images calibrate a, b, real to ever rule them out at alpha 0.05",
    )
    for line in warnings:
        assert f"warning: {line}" in caplog.text
        assert line in card.text
    limits = config.scope.pop("limits")
    assert config.scope == {
        "trained_on": "data", "kind": "noise in three tints", "images": 15,
        "formats": ["JPEG", "PNG"], "sizes": [40, 40],
    }  # fmt: skip
    assert len(limits) == 3
    assert card.data.license == "cc0-1.0"
    record = Attributor(str(tmp_path / "run")).records([next(folder.rglob("*.png"))])
    assert "none is ever called unknown" in next(record)["scope"]


def test_a_normalised_format_stays_with_the_checkpoint(tmp_path, folder, recipe, caplog):
    """PNG and JPEG files of the same pixels differ by their formats no more, and the check knows it."""
    for path in list(folder.rglob("real/*.png")):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    quick = {"num_train_epochs": 1, "augmented_views": 0, "bootstrap_resamples": 2}
    summary = train(arguments(tmp_path, folder, recipe, **quick, normalise_format=True))
    assert "alone tell the classes apart" not in caplog.text
    assert summary["shortcuts"]["files"]["values"] == {"size": 1}
    processor = ProtoLeakImageProcessor.from_pretrained(tmp_path / "run")
    assert processor.jpeg_quality == 90
    image = Image.open(next(folder.rglob("*.png")))
    encoded = postprocess(image, "jpeg", 90)
    plain = ProtoLeakImageProcessor(**processor.to_dict() | {"jpeg_quality": None})
    np.testing.assert_array_equal(processor.pixel_values(image), plain.pixel_values(encoded))
    assert (processor.pixel_values(image) != plain.pixel_values(image)).any()
    model = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "run")
    model.check_processor(processor)
    with pytest.raises(ValueError, match="'jpeg_quality': 90"):
        model.check_processor(plain)


def test_the_head_of_a_card_is_what_the_hub_indexes(trained, tmp_path):
    """Of data sets and a base model on the Hub; those of folders are in other tests."""
    card = ModelCard.load(trained.checkpoint / "README.md")
    assert card.data.pipeline_tag == "image-attribution"
    assert card.data.metrics == ["accuracy", "roc_auc", "brier_score"]
    assert card.data.get("license") is card.data.get("datasets") is card.data.get("base_model") is None
    assert {result.dataset_type for result in card.data.eval_results} == {"imagefolder"}
    assert "No picture of a training image" in card.text
    assert 'pip install "torch>=' in card.text
    assert "`model.fit_open_set(dataset)`" in card.text
    model = ProtoLeakForImageAttribution.from_pretrained(trained.checkpoint)
    hub = HubFacts(license="mit", base_model="someone/base", datasets=["someone/images"])
    model.detector.thumbnails_ = {0: b"", 1: b""}
    written = write_card(tmp_path, model, "Trained.", "python train.py", trained.summary, hub)
    assert (written.data.license, written.data.base_model) == ("mit", "someone/base")
    assert written.data.datasets == ["someone/images"]
    assert {result.dataset_type for result in written.data.eval_results} == {"someone/images"}
    assert "small pictures of 2 training images" in written.text


def test_integers_are_classes_and_their_names(tmp_path, recipe):
    """Trained on to the card."""
    rng, rows = np.random.default_rng(0), {"photo": [], "labels": []}
    for label, generator in enumerate("ab"):
        rows["photo"] += [draw(generator, rng) for _ in range(6)]
        rows["labels"] += [label] * 6
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    train(arguments(tmp_path, tmp_path / "data", recipe, num_train_epochs=1, augmented_views=0))
    assert "known classes made an image, or none of them: 0, 1." in (tmp_path / "run/README.md").read_text()


def test_an_enrolled_class_is_in_the_scope_and_no_picture_of_it_is_kept_unasked(
    trained, tmp_path, photo, capsys
):
    for name in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        photo.save(tmp_path / f"images/{name}.webp")
    before = ProtoLeakConfig.from_pretrained(trained.checkpoint).scope
    command = ["enroll", "new", str(tmp_path / "images"), "--model", str(trained.checkpoint), "--output_dir"]
    for run, wanted in {"plain": [], "pictured": ["--thumbnails"]}.items():
        assert main([*command, str(tmp_path / run), *wanted]) == 0
        model = ProtoLeakForImageAttribution.from_pretrained(tmp_path / run)
        assert bool(model.detector.thumbnails_) == bool(wanted)
        assert model.config.scope["trained_on"] == f"{before['trained_on']} and 2 images of new"
        assert model.config.scope["images"] == before["images"] + 2
        assert model.config.scope["sizes"] == [40, 48]
        assert "new" in model.config.scope["limits"][0]
        card = (tmp_path / run / "README.md").read_text()
        assert str(tmp_path) not in card
        assert str(trained.checkpoint) not in card
        assert ("small pictures of" in card) == bool(wanted)
