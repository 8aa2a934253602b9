import json
import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from protoleak import (
    ImageAttributionPipeline,
    ProtoLeakDiffusionPipeline,
    ProtoLeakForImageAttribution,
    ProtoLeakImageProcessor,
)
from protoleak.checkpoint_protoleak import make_scheduler
from protoleak.cli import main
from protoleak.pipeline_protoleak import (
    RECORD_FIELDS,
    attribution_record,
    is_kept,
    verdict_sentence,
    with_stability,
    without_evidence,
)
from transformers import pipeline

from .conftest import LABELS, fit_random_detector, tiny_model

RUN_FIELDS = (
    "provenance",
    "contradiction",
    "model_sha256",
    "file",
    "sha256",
    "width",
    "height",
    "model",
    "revision",
    "noise_seed",
    "timesteps",
    "error",
)


@pytest.fixture
def images(tmp_path):
    """Nine images and one that is none."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(9):
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("deeper" if i % 2 else ".") / f"{i}.png")
    (folder / "bad.png").write_text("not an image")
    return folder


def record_of(class_p_values, p_value=0.4, generated_p_value=0.5, labels=LABELS, **levels):
    """Of probabilities in the order a, real, b."""
    probabilities = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    of_class = None if class_p_values is None else torch.tensor(class_p_values, dtype=torch.float64)
    levels = {"alpha": 0.05, "camera_alpha": 0.01} | levels
    return attribution_record(probabilities, labels, -3.0, p_value, of_class, generated_p_value, **levels)


def test_a_record_says_what_the_numbers_say():
    known = record_of([0.06, 0.5, 0.05])
    assert tuple(known) == RECORD_FIELDS
    assert (known["label"], known["score"], known["is_unknown"]) == ("a", pytest.approx(0.7), False)
    assert [a["label"] for a in known["attributions"]] == ["a", "real", "b"]
    assert known["prediction_set"] == ["a", "real"], "b is at alpha"
    assert known["ruled_out"] == ["b"]
    unlikely = record_of([0, 0, 0])
    assert unlikely["prediction_set"] == ["a"], "the likeliest class is always in"
    assert unlikely["ruled_out"] == ["real", "b"]
    unknown = record_of([0.06, 0.5, 0.05], p_value=0.05)
    assert (unknown["prediction_set"], unknown["ruled_out"]) == ([], ["b"])
    assert (unknown["label"], unknown["score"], unknown["is_unknown"]) == (
        "unknown",
        pytest.approx(0.95),
        True,
    )
    assert unknown["attributions"] == known["attributions"]
    without = record_of(None, None, None)
    assert (without["is_unknown"], without["prediction_set"], without["ruled_out"]) == (False, None, None)
    assert (without["origin"], without["verdict"]) == (None, "of 3 classes likeliest a")


REAL_FIRST = ["a", "real", "b"]
DOUBT = "can't tell whether a camera or a generator: "
VERDICTS = [
    # p-values of the classes, of "known", of "generated", names; origin and verdict
    ([0.01, 0.5, 0.01], 0.4, 0.005, REAL_FIRST, "camera", "a camera"),
    ([0.01, 0.5, 0.01], 0.4, 0.010, REAL_FIRST, "camera", "a camera"),
    ([0.01, 0.5, 0.01], 0.4, 0.011, REAL_FIRST, "can't tell", DOUBT + "real fits"),
    ([0.06, 0.5, 0.06], 0.4, 0.010, REAL_FIRST, "camera", "a camera"),
    ([0.06, 0.5, 0.01], 0.4, 0.011, REAL_FIRST, "can't tell", DOUBT + "real or a fit"),
    ([0.06, 0.5, 0.06], 0.4, 0.011, REAL_FIRST, "can't tell", DOUBT + "real, a or b fit"),
    ([0.06, 0.5, 0.06], 0.4, 0.010, LABELS, "can't tell", DOUBT + "a, real or b fit"),
    ([0.01, 0.04, 0.01], 0.4, 0.5, REAL_FIRST, "can't tell", DOUBT + "real fits"),
    ([0.01, 0.5, 0.01], 0.05, 0.005, REAL_FIRST, "can't tell", DOUBT + "like no class that the model knows"),
    ([0.05, 0.5, 0.01], 0.4, 0.5, LABELS, "generated", "generated, by a"),
    ([0.05, 0.5, 0.5], 0.4, 0.5, LABELS, "generated", "generated, by a or b"),
    ([0.05, 0.5, 0.5], 0.05, 0.5, LABELS, "generated", "generated, by no generator that the model knows"),
    ([0.5, 0.05, 0.01], 0.4, None, ["c", "a", "b"], None, "a or c"),
    ([0.5, 0.05, 0.01], 0.01, None, ["c", "a", "b"], None, "like no class that the model knows"),
]


@pytest.mark.parametrize(("of_class", "p_value", "generated", "labels", "origin", "verdict"), VERDICTS)
def test_the_verdict_follows_from_the_p_values(of_class, p_value, generated, labels, origin, verdict):
    record = record_of(of_class, p_value, generated, labels)
    assert (record["origin"], record["verdict"]) == (origin, verdict)
    assert verdict_sentence(record) == verdict


def test_many_classes_are_counted_rather_than_named():
    labels = ["real", "a", "b", "c", "d"]
    probabilities = torch.tensor([0.1, 0.3, 0.25, 0.2, 0.15])
    of_class = torch.tensor([0.01, 0.5, 0.5, 0.5, 0.5])
    record = attribution_record(probabilities, labels, 0.0, 0.4, of_class, 0.5, 0.05, 0.01)
    assert record["verdict"] == "generated, by one of 4 known generators"
    record = attribution_record(probabilities, labels, 0.0, 0.4, of_class, 0.5, 0.005, 0.01)
    assert record["verdict"] == DOUBT + "5 of 5 classes fit"
    record = attribution_record(probabilities, ["e", *labels[1:]], 0.0, 0.4, of_class, None, 0.05, 0.01)
    assert record["verdict"] == "one of 4 known classes"


def test_a_verdict_that_does_not_hold_says_so():
    kept = record_of([0.05, 0.5, 0.01], labels=LABELS)
    assert kept["verdict"] == "generated, by a"
    wider = record_of([0.05, 0.5, 0.5], labels=LABELS)  # a or b: a still fits
    camera = record_of([0.01, 0.5, 0.01], 0.4, 0.005, REAL_FIRST)
    unknown = record_of([0.05, 0.5, 0.01], p_value=0.05, labels=LABELS)
    other = record_of([0.05, 0.5, 0.01], labels=["real", "b", "a"])
    assert [is_kept(kept, r) for r in (kept, wider, camera, unknown, other)] == [True, True, *[False] * 3]
    assert is_kept(unknown, unknown)
    assert not is_kept(unknown, kept)
    stable = with_stability(kept, [kept, wider])
    assert (stable["verdict"], stable["stability"]) == (kept["verdict"], {"kept": 2, "of": 2})
    shaken = with_stability(kept, [kept, wider, other])
    assert shaken["stability"] == {"kept": 2, "of": 3}
    assert shaken["verdict"] == (
        "generated, by a; but it changes when the image is saved again (kept 2 of 3 times)"
    )
    flat = without_evidence(kept, 2)
    assert with_stability(flat, [flat])["verdict"] == "no evidence: the picture is flat or too smooth"
    bare = record_of(None, None, None)
    assert with_stability(bare, [bare])["stability"] == {"kept": 1, "of": 1}


def test_the_pipeline_gives_the_models_numbers(fitted_model, processor, photo):
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    record = attribute(photo)
    output = fitted_model(**processor(photo))
    assert record["open_set_score"] == pytest.approx(float(output.open_set_score))
    assert record["log_density"] == record["open_set_score"], "the paper's score is one in nats"
    assert record["p_value"] == float(output.p_values)
    probabilities = dict(zip(LABELS, output.logits[0].softmax(0).tolist(), strict=True))
    for attribution in record["attributions"]:
        assert attribution["score"] == pytest.approx(probabilities[attribution["label"]])
    assert sum(a["score"] for a in record["attributions"]) == pytest.approx(1)
    json.dumps(record)


def test_a_score_that_is_no_log_density_is_not_called_one(processor, photo):
    model = tiny_model(open_set_scores={"embeddings": "kde", "statistics": "l2_mahalanobis"})
    fit_random_detector(model)
    record = ImageAttributionPipeline(model=model, image_processor=processor)(photo)
    assert tuple(record) == RECORD_FIELDS
    model.detector = None
    model.config.open_set_scores = {"embeddings": "kde"}
    record = ImageAttributionPipeline(model=model, image_processor=processor)(photo)
    assert tuple(record) == RECORD_FIELDS
    assert record["open_set_score"] is record["p_value"] is record["prediction_set"] is None


def test_an_image_has_one_record_in_any_batch(fitted_model, processor):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(9)]
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    alone = [attribute(image) for image in images]
    for batch_size in (2, 9):
        for found, expected in zip(attribute(images, batch_size=batch_size), alone, strict=True):
            assert found["open_set_score"] == pytest.approx(expected["open_set_score"], abs=1e-5)
            for a, b in zip(found["attributions"], expected["attributions"], strict=True):
                assert a["label"] == b["label"]
                assert a["score"] == pytest.approx(b["score"], abs=1e-5)
    assert attribute([]) == []


def test_images_of_different_sizes_have_one_record_in_any_batch(fitted_model):
    processor = ProtoLeakImageProcessor(crop_size=32, do_resize=False, num_crops=4)
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    images = [np.random.default_rng(0).integers(0, 256, (n, n, 3), dtype=np.uint8) for n in (32, 40, 64, 50)]
    shapes = []
    fitted_model.register_forward_pre_hook(lambda model, given: shapes.append(tuple(given[0].shape)))
    assert len(attribute(images, batch_size=4)) == 4
    assert [attribute(image)["label"] for image in images]
    assert [shape[:2] for shape in shapes] == [(4, 4), (1, 1), (1, 4), (1, 4), (1, 4)]


def test_an_explanation_tells_of_each_crop(fitted_model, photo):
    processor = ProtoLeakImageProcessor(crop_size=32, do_resize=False, num_crops=4)
    (whole,) = ImageAttributionPipeline(
        model=fitted_model, image_processor=ProtoLeakImageProcessor(crop_size=32)
    )(photo, explain=True)["explanation"]["crops"]
    assert [whole[side] for side in ("x", "y", "width", "height")] == [4, 0, 40, 40]
    assert whole["weight"] == 1
    output = fitted_model(**processor(photo))
    logits = torch.tensor([[[0.0, 2, 0], [0, 0, 3], [5, 0, 0], [0, 0, 0], [9, 9, 9]]])
    output["crop_logits"], output["crop_weights"] = logits, torch.tensor([[0.5, 0.2, 0.3, 0.0, 0.0]])
    boxes = processor.crop_boxes(*photo.size)
    (reason,) = fitted_model.explain(output, crop_boxes=[boxes])
    crops = reason["crops"]
    assert [tuple(crop[s] for s in ("x", "y", "width", "height")) for crop in crops] == boxes
    assert [crop["weight"] for crop in crops] == pytest.approx([0.5, 0.2, 0.3, 0.0]), "without the filler"
    assert [crop["label"] for crop in crops][:3] == ["a", "b", "real"]
    probabilities = logits[0].softmax(dim=1)
    for crop, row in zip(crops, probabilities, strict=False):
        assert (crop["score"], crop["real_score"]) == pytest.approx((row.max().item(), row[0].item()))
    json.dumps(crops)
    assert fitted_model.explain(output)[0]["crops"] is None


def test_camera_alpha_moves_the_verdict(fitted_model, processor, photo):
    detector, config = fitted_model.detector, fitted_model.config
    detector.calibration_ = torch.full((10,), -1e9).double()
    detector.class_calibration_ = [torch.zeros(9).double(), *[torch.ones(99).double()] * 2]  # only real fits
    logits = fitted_model(**processor(photo)).logits
    likeliest = logits.argmax().item()
    config.id2label = {k: f"class {k}" for k in range(3)} | {likeliest: "real"}
    detector.labels = config.label_names
    detector.class_calibration_.insert(likeliest, detector.class_calibration_.pop(0))
    probability = logits.softmax(dim=1)[0, likeliest].item()
    detector.generated_calibration_ = torch.zeros(99).double()
    detector.generated_calibration_[-1] = (probability + 1) / 2
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    record = attribute(photo)
    assert (record["generated_p_value"], record["origin"]) == (0.02, "can't tell")
    assert attribute(photo, camera_alpha=0.02)["origin"] == "camera"
    config.camera_alpha = 0.02
    assert attribute(photo)["verdict"] == "a camera"


def test_alpha_moves_the_verdict(fitted_model, processor, photo):
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    score = attribute(photo)["open_set_score"]
    fitted_model.detector.calibration_ = torch.tensor([score - 1, score + 1, score + 2])
    p_value = attribute(photo)["p_value"]
    assert p_value == 0.5
    assert attribute(photo, alpha=p_value)["is_unknown"]
    assert not attribute(photo, alpha=p_value - 1e-6)["is_unknown"]


def in_diffusers(model, processor) -> ProtoLeakDiffusionPipeline:
    """The pipeline of diffusers around a model in memory."""
    pipe = ProtoLeakDiffusionPipeline(model.vae, make_scheduler(model.config), model, processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("option", ["alpha", "camera_alpha", "top_k", "timeout", "top_p"])
def test_an_option_out_of_range_is_named(fitted_model, processor, photo, option):
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    diffusion = in_diffusers(fitted_model, processor)
    for value in ("0.1", 0, -2, [0.1]):
        with pytest.raises(ValueError, match=option):
            attribute(photo, **{option: value})
        if option != "top_p":
            with pytest.raises(ValueError, match=f"^{option} must be"):
                diffusion(photo, **{option: value})


def test_top_k_limits_attributions_alone(fitted_model, processor, photo):
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    whole, cut = attribute(photo), attribute(photo, top_k=2)
    assert cut["attributions"] == whole["attributions"][:2]
    assert cut | {"attributions": 0} == whole | {"attributions": 0}
    assert attribute(photo, top_k=99) == whole


def test_several_images_come_in_any_container(fitted_model, processor, tmp_path):
    """None of them is lost, and one image has a record rather than a list."""
    images = [np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8) for i in range(3)]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file)
    paths = Dataset.from_dict({"image": list(map(str, files))})
    encoded = paths.cast_column("image", ImageFeature(decode=False))
    containers = {
        "tuple": tuple(images),
        "array": np.stack(images),
        "URLs": [file.as_uri() for file in files],
        "column": encoded.cast_column("image", ImageFeature())["image"],
        "encoded column": encoded["image"],
    }
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    diffusion = in_diffusers(fitted_model, processor)
    expected = [attribute(image) for image in images]
    for name, container in containers.items():
        assert attribute(container) == expected, name
        scores = diffusion(container, batch_size=2).open_set_scores
        assert scores == pytest.approx([record["open_set_score"] for record in expected]), name
        assert attribute(container[0]) == expected[0], name
    assert attribute(()) == attribute(encoded.select([])["image"]) == []
    for call in (attribute, diffusion):
        with pytest.raises(ValueError, match="got list. Pass several as one flat list"):
            call([images[:2], images[2:]])
        with pytest.raises(ValueError, match="got Dataset.*column of images"):
            call(encoded)


def test_a_model_may_give_tuples_by_its_config(checkpoint, photo, processor):
    model = ProtoLeakForImageAttribution.from_pretrained(checkpoint)
    of_tuples = ProtoLeakForImageAttribution.from_pretrained(checkpoint, return_dict=False)
    assert of_tuples.detector is not None
    values = of_tuples(**processor(photo))
    assert isinstance(values, tuple)
    assert torch.equal(values[0], model(**processor(photo)).logits)
    records = [
        ImageAttributionPipeline(model=m, image_processor=processor)(photo) for m in (model, of_tuples)
    ]
    assert records[0] == records[1]


def test_the_classification_pipeline_says_what_it_lacks(checkpoint, photo, caplog):
    """It reads logits alone, so that a refusal is lost."""
    rows = pipeline("image-classification", model=str(checkpoint), trust_remote_code=True)(photo)
    assert {row["label"] for row in rows} == set(LABELS)
    assert 'pipeline("image-attribution"' in caplog.text
    caplog.clear()
    pipeline("image-attribution", model=str(checkpoint), trust_remote_code=True)
    assert "image-classification" not in caplog.text


# --- the command --------------------------------------------------------------------------------------------


def test_attribute_writes_a_record_a_file_and_goes_on_after_a_bad_one(checkpoint, images, tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    status = main(
        ["attribute", str(images), "--model", str(checkpoint), "--output", str(output), "--batch_size", "4"]
    )
    assert status == 1
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [os.path.relpath(r["file"], images) for r in records] == sorted(
        ["0.png", "2.png", "4.png", "6.png", "8.png", "bad.png", *(f"deeper/{i}.png" for i in (1, 3, 5, 7))]
    )
    for record in records:
        assert set(record) - {"log_density"} == {*RECORD_FIELDS, *RUN_FIELDS}
        assert record["timesteps"] == [0, 50, 200]
        if record["file"].endswith("bad.png"):
            assert "bad.png" in record["error"]
            assert record["label"] is None
        else:
            assert record["error"] is None
            assert (record["width"], record["height"]) == (48, 40)
            assert len(record["sha256"]) == 64
    assert "1 of 10 files" in capsys.readouterr().err


def test_attribute_takes_images_of_different_sizes_in_one_batch(checkpoint, tmp_path):
    ProtoLeakImageProcessor(crop_size=32, do_resize=False, num_crops=4).save_pretrained(checkpoint)
    (folder := tmp_path / "sizes").mkdir()
    for side in (20, 32, 64):
        Image.new("RGB", (side, side), "green").save(folder / f"{side}.png")
    output = tmp_path / "sizes.jsonl"
    assert main(["attribute", str(folder), "--model", str(checkpoint), "--output", str(output)]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["width"] for record in records] == [20, 32, 64]
    assert all(record["verdict"] for record in records)


def test_the_scope_is_shown_with_every_verdict(processor, images, tmp_path, capsys):
    """In the pipeline's and the command's records, and on the terminal; none is made up."""
    model = tiny_model(scope={"trained_on": "wild", "images": 2497})
    fit_random_detector(model)
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    words = "valid for images like the 2,497 that it was trained on (wild)"
    image, named = str(images / "0.png"), ["--model", str(tmp_path / "checkpoint")]
    assert main(["attribute", image, *named, "--output", str(tmp_path / "records.jsonl")]) == 0
    assert json.loads((tmp_path / "records.jsonl").read_text())["scope"].startswith(words)
    assert f"scope: {words}" in capsys.readouterr().err
    assert main(["explain", image, *named]) == 0
    assert f"scope: {words}" in capsys.readouterr().out
    model.config.scope = None
    assert ImageAttributionPipeline(model=model, image_processor=processor)(image)["scope"] is None


def test_attribute_prints_a_table(checkpoint, images, capsys):
    assert main(["attribute", str(images / "0.png"), str(images / "2.png"), "--model", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0.png", "2.png"]
    assert all("p(known)" in line for line in lines)


def test_attribute_tells_stability_when_asked(checkpoint, images, tmp_path, capsys):
    output, table = tmp_path / "records.jsonl", tmp_path / "records.csv"
    command = ["attribute", str(images), "--model", str(checkpoint), "--output", str(output)]
    assert main([*command, "--stability", "--table", str(table)]) == 1
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["stability"] is None for r in records] == [r["error"] is not None for r in records]
    attribute = pipeline("image-attribution", model=str(checkpoint), trust_remote_code=True)
    assert len(records) == 10
    for record in records[:3]:
        alone = attribute(record["file"], stability=True)
        assert (record["stability"], record["verdict"]) == (alone["stability"], alone["verdict"])
    held = records[0]["stability"]
    assert f"{held['kept']} of 3" in table.read_text()
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    assert "written with --stability" in capsys.readouterr().err


def test_attribute_explains_what_is_missing(checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["attribute", str(tmp_path / "empty"), "--model", str(checkpoint)]) == 1
    assert "no images found" in capsys.readouterr().err
    assert main(["attribute", str(tmp_path / "nowhere.png"), "--model", str(checkpoint)]) == 1
    assert "nowhere.png" in capsys.readouterr().out
    assert main(["attribute", str(tmp_path), "--model", str(tmp_path / "empty")]) == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err
