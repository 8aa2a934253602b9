"""What `Trainer` and its tutorials do with a checkpoint."""

import copy
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from protoleak import ImageAttributionPipeline, ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from . import ROOT
from .conftest import LABELS, draw, tiny_model

CHANGES = [{"crop_size": 64}, {"do_resize": False}, {"num_crops": 4}, {"resample": 0}, {"jpeg_quality": 90}]
OWN = ["b", "real", "a"]  # the data set's order of classes, which is not the model's


@pytest.fixture(autouse=True)
def precision_of_its_own():
    """What a Trainer asks for is the whole process's, until it is forgotten."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data() -> DatasetDict:
    rng, splits = np.random.default_rng(0), DatasetDict()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=OWN)})
    for split, count in {"train": 36, "validation": 24}.items():
        rows = {
            "image": [draw(OWN[i % 3], rng) for i in range(count)],
            "label": [i % 3 for i in range(count)],
        }
        splits[split] = Dataset.from_dict(rows, features)
    return splits


def prepared(data: DatasetDict, processor: ProtoLeakImageProcessor) -> DatasetDict:
    """As tutorials prepare images: a transform that gives what the model takes."""

    def transform(rows):
        labels = [LABELS.index(OWN[label]) for label in rows["label"]]
        return {"pixel_values": processor(rows["image"])["pixel_values"], "labels": labels}

    return data.with_transform(transform)


def make_trainer(model, data: DatasetDict, folder: Path, **changes) -> Trainer:
    values = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "learning_rate": 1e-2}
    values |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    values |= {"load_best_model_at_end": True, "metric_for_best_model": "macro_auc", "logging_steps": 1}
    values |= {"bf16": True, "use_cpu": True, "remove_unused_columns": False, "report_to": [], "max_steps": 4}
    metric = evaluate.load(str(ROOT / "evaluate_protoleak"))

    def compute_metrics(predicted):
        probabilities = torch.from_numpy(predicted.predictions).softmax(dim=1).numpy()
        return metric.compute(predictions=probabilities, references=predicted.label_ids, label_names=LABELS)

    return Trainer(
        model,
        TrainingArguments(str(folder), **values | changes),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=compute_metrics,
    )


def test_fine_tuning_from_a_checkpoint_to_new_verdicts(checkpoint, data, tmp_path, caplog):
    """Accumulation, bf16, evaluation, the best model, resuming; then a new detector, saved and loaded."""
    model = ProtoLeakForImageAttribution.from_pretrained(checkpoint)
    processor = ProtoLeakImageProcessor.from_pretrained(checkpoint)
    images = prepared(data, processor)
    trainer = make_trainer(model, images, tmp_path / "run")
    trainer.train()
    assert model.detector is None
    assert caplog.text.count("the open-set detector is dropped") == 1
    evaluated = [row for row in trainer.state.log_history if "eval_macro_auc" in row]
    assert {row["step"] for row in evaluated} == {2, 4}
    assert {f"eval_auc_{name}" for name in LABELS} <= set(evaluated[0])
    assert all(isinstance(value, int | float) for row in trainer.state.log_history for value in row.values())
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, best[name]), name

    again = make_trainer(tiny_model(), images, tmp_path / "run", max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    model = again.model
    attribute = ImageAttributionPipeline(model=model, image_processor=processor)
    assert attribute(data["train"][0]["image"])["p_value"] is None

    model.fit_open_set(data, processor=processor)
    model.save_pretrained(tmp_path / "tuned")
    processor.save_pretrained(tmp_path / "tuned")
    loaded = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "tuned")
    records = [
        ImageAttributionPipeline(model=m, image_processor=processor)(data["validation"]["image"])
        for m in (model, loaded)
    ]
    assert records[0] == records[1]
    assert all(record["p_value"] > 0 for record in records[1])
    expected = [LABELS.index(OWN[label]) for label in data["validation"]["label"]]
    assert loaded.detector.held_out_["labels"].tolist() == expected, "labels go by name, not by number"


def test_accumulated_steps_count_like_one_large_step(data, tmp_path):
    processor, losses = ProtoLeakImageProcessor(crop_size=32), {}
    for size, steps in ((12, 1), (3, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        changes |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        trainer = make_trainer(tiny_model(), prepared(data, processor), tmp_path, **changes)
        trainer.train()
        row = next(row for row in trainer.state.log_history if "loss" in row)
        losses[steps] = np.array([row["loss"], row["grad_norm"]])
    np.testing.assert_allclose(losses[4], losses[1], rtol=0.5)


# --- no stale verdicts --------------------------------------------------------------------------------------


def test_a_training_step_drops_the_detector_and_nothing_else_does(fitted_model, caplog):
    latents, labels = torch.randn(6, 4, 8, 8), torch.arange(6) % 3
    fitted_model.train()
    with torch.no_grad():
        fitted_model(latents=latents)
    fitted_model.eval()(latents=latents, labels=labels).loss.backward()
    assert fitted_model.detector is not None
    assert fitted_model(latents=latents).p_values is not None
    for _ in range(3):
        fitted_model.train()(latents=latents, labels=labels).loss.backward()
    assert caplog.text.count("model.fit_open_set(dataset)") == 1
    assert fitted_model.eval()(latents=latents).p_values is None


def test_replicas_are_trained_like_the_model(fitted_model, monkeypatch):
    """As by `torch.nn.DataParallel`, which `Trainer` takes on several GPUs; here they are CPUs."""
    replicating = sys.modules["torch.nn.parallel.replicate"]
    to_each = lambda tensors, devices, detach: [list(tensors) for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", to_each)
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, optional: device)
    pixel_values, labels = torch.rand(6, 3, 32, 32) * 2 - 1, torch.arange(6) % 3
    with torch.no_grad():
        evaluated, _ = replicating.replicate(fitted_model, [0, 1])
        assert torch.equal(evaluated(pixel_values).logits, fitted_model(pixel_values).logits)
    assert fitted_model.detector is not None
    for replica in replicating.replicate(fitted_model.train(), [0, 1]):
        replica(pixel_values, labels=labels).loss.backward()
    assert fitted_model.detector is None
    assert fitted_model.head.prototypes.grad.abs().sum() > 0


def test_other_weights_drop_the_detector(fitted_model, caplog):
    same = copy.deepcopy(fitted_model.state_dict())
    fitted_model.load_state_dict(same)
    assert fitted_model.detector is not None
    same["protoleak.encoder.projections.0.weight"] += 1
    fitted_model.load_state_dict(same)
    assert fitted_model.detector is None
    assert "other weights" in caplog.text


@torch.no_grad()
def test_saving_changes_nothing(fitted_model, tmp_path):
    fitted_model.train()
    fitted_model.head.eval()
    modes = [module.training for module in fitted_model.modules()]
    fitted_model.save_pretrained(tmp_path)
    fitted_model.head.temperature_logit += 1
    fitted_model.protoleak.encoder.projections[0].weight += 1  # without a training step
    detector = fitted_model.detector
    fitted_model.save_pretrained(tmp_path)
    assert not (tmp_path / "density.pkl").exists(), "a detector of other weights is left out"
    assert fitted_model.detector is detector
    assert [module.training for module in fitted_model.modules()] == modes


def test_other_preprocessing_than_the_detectors_is_refused(data, tmp_path, caplog):
    model, processor = tiny_model(), ProtoLeakImageProcessor(crop_size=32)
    rows = [{"image": row["image"], "labels": OWN[row["label"]]} for row in data["train"]]
    model.fit_open_set(rows, processor=processor)
    assert len(model.detector.held_out_["labels"]) == 12, "a third"
    assert "12 images calibrate; below 19, none can be called unknown at alpha 0.05" in caplog.text
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ProtoLeakForImageAttribution.from_pretrained(tmp_path)
    for fitted in (model, loaded):
        ImageAttributionPipeline(model=fitted, image_processor=processor)(rows[0]["image"])
        for changes in CHANGES:
            other = ProtoLeakImageProcessor(**{"crop_size": 32} | changes)
            with pytest.raises(ValueError, match="fitted on images prepared with"):
                ImageAttributionPipeline(model=fitted, image_processor=other)(rows[0]["image"])
    loaded.fit_open_set(data["train"], data["validation"])
    assert len(loaded.detector.held_out_["labels"]) == 24, "its own checkpoint's processor"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got 0 with columns"),
        ([{"picture": 1, "label": 0}], "'image' and 'label'"),
        ([{"image": np.zeros((40, 40), np.uint8), "label": "x"}], "row 0 has label 'x'"),
        ([{"image": np.zeros((40, 40), np.uint8), "label": 3}], "row 0 has label 3"),
        ([{"image": np.zeros((40, 40), np.uint8), "label": i % 2} for i in range(8)], r"of classes \['b'\]"),
        ([{"image": np.zeros((40, 40), np.uint8), "label": i % 3} for i in range(6)], "to calibrate by"),
        ({"test": []}, r"one called 'train'; it has \['test'\]"),
    ],
)
def test_a_data_set_that_no_detector_can_be_fitted_on_is_named(model, processor, rows, message):
    with pytest.raises(ValueError, match=message):
        model.fit_open_set(rows, processor=processor)
    assert model.detector is None


def test_fitting_needs_a_processor(model, data):
    with pytest.raises(ValueError, match="pass its image processor="):
        model.fit_open_set(data)


def test_a_detector_of_before_tells_no_processor(fitted_model, tmp_path):
    from protoleak import density_protoleak as density

    state = {name: getattr(fitted_model.detector, name) for name in density.STATE if name != "processor_"}
    density.write_state(tmp_path / "density.pkl", state, density.FORMAT_VERSION)
    assert density.OpenSetDetector.load(tmp_path / "density.pkl").processor_ is None
