import io

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image, ImageFilter
from protoleak import ImageAttributionPipeline, ProtoLeakImageProcessor
from protoleak.evaluation.predictions import ORIGINS, predict_splits
from protoleak.evaluation.protocol import evaluate_splits, verdicts_in
from protoleak.evidence_protoleak import (
    LEAST_LAYOUT,
    LEAST_ROUGHNESS,
    NOISE,
    SUFFICIENT,
    TOO_SMALL,
    TOO_SMOOTH,
    lack_of_evidence,
    layout,
    roughness,
    tiles,
)
from protoleak.forensics.scan import Attributor
from protoleak.pipeline_protoleak import LACKS, NO_EVIDENCE, RECORD_FIELDS
from protoleak.training.latents import LatentCache, View

from . import ROOT
from .test_pipeline import in_diffusers

SIDE = 256
RAMP = np.linspace(0, 255, SIDE)


def jpeg(image: Image.Image, quality: int = 75) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return Image.open(content).convert("RGB")


def noise(width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bell(deviation: float) -> Image.Image:
    values = np.random.default_rng(0).normal(128, deviation, (SIDE, SIDE, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def gradient(*channels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([c + np.zeros((SIDE, SIDE)) for c in channels], axis=2).astype(np.uint8))


across, down = RAMP[None], RAMP[:, None]
distance = np.hypot(np.arange(SIDE) - 128, np.arange(SIDE)[:, None] - 128)
LACKING = {
    TOO_SMALL: {
        "side": Image.open(ROOT / "examples/photo_1.jpg").resize((63, 63)),
        "strip": Image.open(ROOT / "examples/photo_1.jpg").crop((0, 0, 300, 40)),
        "pixel": Image.new("RGB", (1, 1)),
    },
    TOO_SMOOTH: {
        "white": Image.new("RGB", (SIDE, SIDE), "white"),
        "colour": jpeg(Image.new("RGB", (900, 700), (10, 90, 200))),
        "gradient": gradient(across, across, across),
        "of colours": gradient((across + down) / 2, down, 255 - across),
        "as JPEG": jpeg(gradient((across + down) / 2, down, 255 - across)),
        "radial": jpeg(gradient(*[255 - distance] * 3)),
        "blurred noise": noise().filter(ImageFilter.GaussianBlur(6)),
    },
    NOISE: {
        "uniform": noise(),
        "large": noise(1000, 700),
        "small": noise(64, 64),
        "normal": bell(5),
        "strong": bell(60),
        "grey": noise().convert("L").convert("RGB"),
        "as JPEG": jpeg(noise()),
        "poor JPEG": jpeg(noise(), 30),
        "enlarged": noise(128, 128).resize((SIDE, SIDE)),
    },
}


@pytest.mark.parametrize(("lack", "name"), [(lack, name) for lack, of in LACKING.items() for name in of])
def test_pictures_that_show_nothing_are_told(lack, name):
    assert lack_of_evidence(LACKING[lack][name].convert("RGB")) == lack


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.*g")), ids=lambda path: path.name)
def test_photographs_and_generated_images_have_evidence(path):
    with Image.open(path) as file:
        image = file.convert("RGB")
    assert lack_of_evidence(image) == SUFFICIENT
    assert lack_of_evidence(jpeg(image, 50)) == SUFFICIENT


def test_one_tile_with_evidence_is_enough():
    image = Image.new("RGB", (1200, 900), "white")
    image.paste(Image.open(ROOT / "examples/photo_1.jpg").resize((256, 256)), (944, 644))
    assert lack_of_evidence(image) == SUFFICIENT
    assert next(tiles(1200, 900)) == (472, 322, 728, 578), "the middle first"
    assert len(set(tiles(1200, 900))) == 9
    assert list(tiles(100, 80)) == [(0, 0, 100, 80)]


def test_measures_are_what_they_say():
    assert layout(np.asarray(noise())) == pytest.approx(1 / 256, rel=0.3)
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 200
    assert layout(halves) == pytest.approx(1)
    assert roughness(halves) == pytest.approx(2 / 62)
    steps = np.zeros((64, 64, 3), np.uint8)
    steps[10, 10, 1], steps[20, 20] = 2, 1
    assert roughness(steps) == 1 / 62**2, "one grey level is rounding"
    assert 0 < LEAST_ROUGHNESS < 2 / 62
    assert 1 / 256 < LEAST_LAYOUT < 1


def test_every_way_to_a_record_answers_no_evidence(fitted_model, tmp_path):
    processor = ProtoLeakImageProcessor(crop_size=64, do_resize=False)
    images = [noise(), Image.open(ROOT / "examples/photo_2.jpg"), Image.new("RGB", (90, 70), "white")]
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    records = attribute(images, batch_size=2)
    assert records[1]["verdict"] == attribute(images[1])["verdict"]
    for record, lack in ((records[0], NOISE), (records[2], TOO_SMOOTH)):
        assert tuple(record)[: len(RECORD_FIELDS)] == RECORD_FIELDS
        assert record["verdict"] == f"no evidence: {LACKS[lack]}"
        assert (record["label"], record["score"], record["is_unknown"]) == ("no evidence", None, False)
        assert record["origin"] == "can't tell"
        assert sorted(record["prediction_set"]) == sorted(fitted_model.config.label_names)
        assert record["ruled_out"] == []
    output = fitted_model(processor(images)["pixel_values"])
    assert [r["p_value"] for r in records] == pytest.approx(output.p_values.tolist()), "as measured"
    verdicts = [record["verdict"] for record in records]
    assert in_diffusers(fitted_model, processor)(images, batch_size=2).verdicts == verdicts
    fitted_model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, image in zip(files, images, strict=True):
        image.save(file)
    scanned = Attributor(str(tmp_path / "checkpoint")).records(files)
    assert [record["verdict"] for record in scanned] == verdicts
    fitted_model.detector = None
    record = attribute(noise())
    assert (record["verdict"], record["origin"]) == (verdicts[0], None)
    assert record["prediction_set"] is record["ruled_out"] is None


def test_evaluation_counts_a_refusal_as_attribute_has_it(fitted_model, tmp_path, caplog, monkeypatch):
    """Of no evidence no class is ruled out, whatever the model measured."""
    processor = ProtoLeakImageProcessor(crop_size=64, do_resize=False)
    images = [noise(), Image.open(ROOT / "examples/photo_2.jpg"), Image.new("RGB", (90, 70), "white")]
    fitted_model.config.alpha = alpha = 0.9  # most is ruled out
    labels = fitted_model.config.label_names
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    rows = datasets.Dataset.from_dict({"image": images, "label": labels[:3]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    made = predict_splits(fitted_model, processor, {"test": rows}, Accelerator())["test"]
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    levels = (alpha, fitted_model.config.camera_alpha, labels.index("real"))
    records = attribute(images)
    assert [record["label"] == NO_EVIDENCE for record in records] == [True, False, True]
    assert [ORIGINS[place] for place in made.origins(*levels)] == [record["origin"] for record in records]
    sets = [sorted(record["prediction_set"]) for record in records if not record["is_unknown"]]
    own = [sorted(np.array(labels)[row]) for row in made.in_sets(*levels)]
    assert [row for row, record in zip(own, records, strict=True) if not record["is_unknown"]] == sets
    assert (made.p_values <= alpha).tolist() == [record["is_unknown"] for record in records]
    assert "2 of 3 images show nothing to go by" in caplog.text
    verdicts = [*labels, "unknown", NO_EVIDENCE]
    assert [verdicts[k] for k in made.verdicts(alpha)] == [record["label"] for record in records]
    (split,) = evaluate_splits({"test": made}, labels, alpha, levels[1]).values()
    assert [row[-1] for row in split.confusion][:3] == [1, 0, 1]
    assert verdicts_in(labels, split.confusion) == verdicts


def test_a_view_of_an_image_is_refused_as_it_is_then(fitted_model, tmp_path, monkeypatch):
    """Whether that is told by the cache or anew."""
    processor = ProtoLeakImageProcessor(crop_size=64, do_resize=False)
    photo = Image.open(ROOT / "examples/photo_2.jpg")
    images = [photo, photo.resize((200, 100)), noise(), photo.resize((300, 300))]
    rows = datasets.Dataset.from_dict({"image": images, "label": ["real"] * 4})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    cache = LatentCache(fitted_model, processor, Accelerator(), batch_size=2, shard_size=3)
    cache.folder = tmp_path
    views = [View(), View(operator="crop", strength=0.5)]
    for _ in range(2):
        found = cache.encode_views(rows, views, held_out=True)
        assert found[views[0]].is_refused.tolist() == [False, False, True, False]
        assert found[views[1]].is_refused.tolist() == [False, True, True, False], "of 50 pixels"
        monkeypatch.setattr(cache, "_encode_batch", None)  # all is there
    assert cache.encode_views(rows, views)[views[0]].is_refused is None
    assert cache.encode_held_out(rows.select([])).is_refused.tolist() == []
