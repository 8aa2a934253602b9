"""Reasons, provenance, report and figures."""

import html
import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from protoleak import ImageAttributionPipeline, ProtoLeakImageProcessor, app
from protoleak.cli import format_row, main
from protoleak.evaluation.predictions import Predictions
from protoleak.evaluation.protocol import Evaluation, evaluate_splits
from protoleak.explanation_protoleak import keep_thumbnails
from protoleak.forensics.figures import (
    EmbeddingMap,
    draw_confusion,
    draw_crops,
    draw_evaluation,
    draw_reliability,
    draw_roc,
    save_figures,
)
from protoleak.forensics.rendering import render, write_report
from protoleak.forensics.report import (
    Examiner,
    crops_in_words,
    meaning_in_words,
    ruled_out_in_words,
    verdict_of,
)
from protoleak.image_processing_protoleak import thumbnail


@pytest.fixture
def fitted_model(fitted_model):
    """With thumbnails of its training images."""
    pictures = np.random.default_rng(0).integers(0, 256, (60, 80, 100, 3), dtype=np.uint8)
    keep_thumbnails(fitted_model, lambda i: Image.fromarray(pictures[i]))
    return fitted_model


@pytest.fixture
def image(photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# --- reasons ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [(), (3,)])
def test_contributions_add_up_to_the_difference_of_the_logits(fitted_model, views):
    fitted_model.detector.temperature_ = 1.7
    pixel_values = torch.rand(5, *views, 3, 32, 32) * 2 - 1
    output = fitted_model(pixel_values)
    for reason, logits in zip(fitted_model.explain(output), output.logits, strict=True):
        parts = reason["contributions"]
        first, second = (fitted_model.config.label2id[parts[name]] for name in ("first", "second"))
        assert logits.argsort(descending=True)[:2].tolist() == [first, second]
        assert parts["difference"] == pytest.approx((logits[first] - logits[second]).item(), abs=1e-5)
        assert sum(parts["dimensions"]) + parts["sharing"] == pytest.approx(parts["difference"], abs=1e-3)
        assert len(parts["dimensions"]) == fitted_model.config.embedding_size
        assert sum(step["weight"] for step in reason["timesteps"]) == pytest.approx(1)
        json.dumps(reason)


def test_a_dimension_that_does_not_count_contributes_nothing(fitted_model):
    output = fitted_model(torch.rand(1, 3, 32, 32))
    output.gates[:, 3] = 0
    output.logits = fitted_model.head(output.embeddings, output.gates)
    assert fitted_model.explain(output)[0]["contributions"]["dimensions"][3] == 0


def test_nearest_prototypes_and_their_examples_are_the_nearest(fitted_model):
    output = fitted_model(torch.rand(1, 3, 32, 32))
    head, known = fitted_model.head, fitted_model.detector.train_
    distances = head.distances(output.embeddings, output.gates)[0]
    told = fitted_model.explain(output, num_prototypes=4)[0]["prototypes"]
    assert [row["distance"] for row in told] == distances.flatten().sort().values[:4].tolist()
    k, m = fitted_model.config.label2id[told[0]["label"]], told[0]["prototype"]
    assert distances[k, m] == distances.min()
    by_image = (known["gates"] * (known["embeddings"] - head.prototypes[k, m]).square()).sum(dim=1)
    assert [row["index"] for row in told[0]["examples"]] == by_image.argsort()[:3].tolist()


def test_the_place_among_the_known_is_that_of_the_verdict(fitted_model):
    output = fitted_model(torch.rand(40, 3, 32, 32) * 2 - 1)
    calibration = output.open_set_score.sort().values[5:].clone()
    fitted_model.detector.calibration_ = calibration
    output = fitted_model(torch.rand(40, 3, 32, 32) * 2 - 1)
    for alpha in (0.01, 0.05, 0.2, 0.99):
        threshold = fitted_model.detector.threshold(alpha)
        p_values = fitted_model.detector.p_value(output.open_set_score.numpy())
        np.testing.assert_array_equal(output.open_set_score.numpy() < threshold, p_values <= alpha)
    assert fitted_model.detector.threshold(0.01) == -math.inf
    place = fitted_model.explain(output)[0]["open_set"]
    assert place["rank"] == pytest.approx(float((calibration < output.open_set_score[0]).double().mean()))


def test_the_pipeline_explains_and_tells_what_the_verdict_is_after_each_treatment(fitted_model, photo):
    processor = ProtoLeakImageProcessor(crop_size=32, do_resize=False, num_crops=4)
    attribute = ImageAttributionPipeline(model=fitted_model, image_processor=processor)
    plain, (told, _) = attribute(photo), attribute([photo, photo], explain=True, batch_size=2)
    assert {"explanation", "stability"}.isdisjoint(plain)
    assert (told["label"], told["p_value"]) == (plain["label"], pytest.approx(plain["p_value"]))
    photo.save(jpeg := io.BytesIO(), "JPEG", quality=60)
    smaller = photo.resize((36, 30), Image.Resampling.BICUBIC)
    expected = [attribute(jpeg.getvalue())["verdict"], attribute(smaller)["verdict"]]
    treatments = told["explanation"]["treatments"]
    assert (
        [t["treatment"] for t in treatments]
        == processor.treatments
        == ["JPEG 85", "JPEG 60", "reduction 0.75"]
    )
    assert [t["verdict"] for t in treatments][1:] == expected
    assert told["stability"] == {"kept": sum(t["kept"] for t in treatments), "of": 3}
    cheap = attribute(photo, stability=True)
    assert (cheap["stability"], cheap["verdict"]) == (told["stability"], told["verdict"])
    assert "explanation" not in cheap


def test_thumbnails_are_kept_with_the_checkpoint_within_their_room(fitted_model, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    size = len(thumbnail(picture))
    keep_thumbnails(fitted_model, lambda i: picture, max_bytes=3 * size)
    assert len(fitted_model.detector.thumbnails_) == 3
    fitted_model.save_pretrained(tmp_path)
    loaded = type(fitted_model).from_pretrained(tmp_path)
    assert loaded.detector.thumbnails_ == fitted_model.detector.thumbnails_


# --- the report ---------------------------------------------------------------------------------------------


def test_a_report_tells_all_that_is_needed_to_repeat_it(checkpoint, image, tmp_path):
    (checkpoint / "metrics.json").write_text(
        json.dumps(
            {
                "dataset": "zoo",
                "splits": {
                    "test": {
                        "metrics": {"macro_auc": 0.5, "accuracy": 0.4},
                        "intervals": {"macro_auc": [0.4, 0.6], "accuracy": [0.3, 0.5]},
                    },
                    "cross": {"metrics": {"macro_auc": 0.3}, "intervals": {"macro_auc": [0.2, 0.4]}},
                },
            }
        )
    )
    output = tmp_path / "report.json"
    command = ["report", str(image), "--model", str(checkpoint), "--output", str(output), "--format", "json"]
    assert main(command) == 0
    report = json.loads(output.read_text())
    about, (record,) = report["about"], report["records"]
    assert set(about["files"]) == {
        "config.json", "model.safetensors", "density.pkl", "preprocessor_config.json", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert about["classes"] == ["real", "a", "b"]
    test, cross = {"value": 0.5, "interval": [0.4, 0.6]}, {"value": 0.3, "interval": [0.2, 0.4]}
    both = {"name": "Macro AUC, closed set", "splits": {"test": test, "cross": cross}}
    assert about["error_rates"][0] == both
    page = render(Examiner(str(checkpoint)), [])
    assert "0.300\n      (0.200 to 0.400)" in page
    assert "sources that training did not see" in page
    assert {"torch", "transformers", "protoleak", "python"} <= set(about["versions"])
    assert record["stability"]["of"] == len(record["explanation"]["treatments"]) == 3
    assert len(record["sha256"]) == 64


def test_the_page_is_one_file_that_fetches_and_runs_nothing(checkpoint, image, tmp_path):
    examiner = Examiner(str(checkpoint))
    path = write_report(examiner, [examiner.examine(image)], tmp_path / "report.html")
    page = path.read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/svg+xml") == 5
    assert page.index('class="overview"') < page.index('id="image-1"')
    assert page.count('href="#image-1"') == 1
    assert str(image) in page  # not its name alone
    assert page.index("For an examiner") < page.index("prototype")  # jargon comes last, folded
    assert "Where the evidence lies" in page
    assert page.count("data:image/jpeg") > 0  # the training images nearest to the prototypes


def test_text_from_files_and_labels_is_escaped(checkpoint, photo, tmp_path):
    attack = "<script>alert(1)</script>"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", attack)
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    photo.save(path, pnginfo=texts)
    examiner = Examiner(str(checkpoint))
    network = examiner.network
    network.config.id2label = {0: "real", 1: attack, 2: "b"}
    network.config.label2id = {"real": 0, attack: 1, "b": 2}
    (tmp_path / "bad<b>.png").write_text("no image")
    page = render(examiner, [examiner.examine(path), examiner.examine(tmp_path / "bad<b>.png")])
    assert attack not in page
    assert "<img src=x" not in page
    assert "bad<b>" not in page
    assert "&lt;script&gt;alert(1)" in page


RECORD = {
    "file": "x.png", "error": None, "label": "real", "is_unknown": False, "prediction_set": ["real"],
    "ruled_out": ["a", "b"], "origin": "camera", "verdict": "a camera", "p_value": 0.5, "contradiction": None,
    "attributions": [{"label": k, "score": p} for k, p in (("real", 0.9), ("a", 0.06), ("b", 0.04))],
}  # fmt: skip


def test_a_verdict_comes_with_what_it_means_and_rules_out():
    assert verdict_of(RECORD) == "a camera"
    assert "truncated" in verdict_of(RECORD | {"error": "truncated", "verdict": None})
    assert "may leave the same traces" in meaning_in_words(RECORD)
    assert "are not ruled out" in meaning_in_words(RECORD | {"origin": "can't tell"})
    assert "the first is the likeliest" in meaning_in_words(RECORD | {"prediction_set": ["real", "a"]})
    assert "never seen" in meaning_in_words(RECORD | {"is_unknown": True, "prediction_set": []})
    assert ruled_out_in_words(RECORD) == ["ruled out, 2 of 3 classes: a, b"]
    assert "rules out 2 of 3" in format_row(RECORD)
    unknown = RECORD | {"is_unknown": True, "prediction_set": [], "ruled_out": ["real", "a", "b"]}
    assert ruled_out_in_words(unknown) == []
    assert "rules out" not in format_row(unknown)


def test_a_record_without_a_detector_is_told_too():
    """It has neither sets nor origin."""
    nothing = dict.fromkeys(("prediction_set", "ruled_out", "origin", "generated_p_value", "p_value"))
    record = RECORD | nothing | {"verdict": "real"}
    assert "can't rule out any" in meaning_in_words(record)
    assert ruled_out_in_words(record) == []
    assert format_row(record).endswith("real (real 0.900, a 0.060)")


def crop(x, y, weight, real_score, side=256):
    verdict = {"label": "a", "score": 0.8, "real_score": real_score}
    return {"x": x, "y": y, "width": side, "height": side, "weight": weight} | verdict


def test_crops_in_words():
    crops = [crop(256 * i, 0, weight, 0.1) for i, weight in enumerate((0.2, 0.5, 0.29, 0.01))]
    lines = crops_in_words(crops)
    assert lines[0] == "what was looked at: 4 crops of 256 pixels, 3 with evidence"
    assert lines[1] == "at (256, 0), 50% of the evidence: a 0.80, a camera 0.10"
    assert len(lines) == 4
    assert "1 crop of 64 pixels" in crops_in_words([crop(0, 0, 1.0, None, 64)])[0]
    assert "a camera" not in crops_in_words([crop(0, 0, 1.0, None)])[1]
    mixed = [crop(0, 0, 1 / 3, 0, side) for side in (512, 256, 128)]
    assert "3 crops of 128 to 512 pixels" in crops_in_words(mixed)[0]
    assert crops_in_words([]) == []


def test_the_map_of_crops_is_coloured_by_what_each_says_and_shaded_by_its_weight(photo):
    crops = [crop(0, 0, 0.75, 1.0, 20), crop(20, 0, 0.25, 0.0, 20), crop(20, 20, 0.0, 0.5, 20)]
    figure = draw_crops(photo, crops, (48, 40))
    shades = [patch for patch in figure.axes[0].patches if patch.get_fill()]
    assert [patch.get_xy() for patch in shades] == [(0, 0), (20, 0), (20, 20)]
    camera, generated, flat = (np.array(patch.get_facecolor()) for patch in shades)
    assert camera[2] > camera[0]  # blue
    assert generated[0] > generated[2]  # red
    assert camera[3] == pytest.approx(3 * generated[3])
    assert flat[3] == 0
    assert figure.axes[0].get_xlim() == (0, 48)
    assert figure.axes[0].get_ylim() == (40, 0)
    without = draw_crops(photo, [crop(0, 0, 1.0, None, 20)], (48, 40))
    assert not without.legends
    assert figure.legends


def test_explain_prints_reasons_and_goes_on_after_a_bad_file(checkpoint, image, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    assert main(["explain", str(tmp_path / "bad.png"), str(image), "--model", str(checkpoint)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("bad.png is not an image") == 1
    for words in ("attention over timesteps", "saved again", "open-set score"):
        assert words in printed
    assert "what was looked at: " in printed


def test_the_page_without_its_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "protoleak.forensics.page", raising=False)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit, match=r"app\.py: the page needs Gradio; pip install 'protoleak\[demo\]'"):
        app.main()


def test_every_place_says_the_same_sentence(checkpoint, image, tmp_path, capsys):
    """Terminal, reasons, report, page and JSON."""
    examiner = Examiner(str(checkpoint))
    record = examiner.examine(image)
    sentence = record["verdict"]
    for command in ("attribute", "explain"):
        assert main([command, str(image), "--model", str(checkpoint)]) == 0
        assert capsys.readouterr().out.count(sentence) == 1
    assert html.escape(sentence, quote=True) in render(examiner, [record]).replace("&#39;", "&#x27;")
    page = pytest.importorskip("protoleak.forensics.page")
    *_, (shown, _) = page.examine_uploads(examiner, [str(image)], tmp_path)
    assert html.escape(sentence) in shown.replace("&#39;", "&#x27;")


def test_the_page_examines_uploads_and_tells_nobody_where_it_keeps_them(checkpoint, image, tmp_path):
    """Its functions, without a browser; test_app.py opens it in one."""
    gradio = pytest.importorskip("gradio")
    page = pytest.importorskip("protoleak.forensics.page")
    examiner = Examiner(str(checkpoint))
    (tmp_path / "bad.png").write_text("no image")
    files = [str(image), str(tmp_path / "bad.png")]
    folder = tmp_path / "report"
    steps = list(page.examine_uploads(examiner, files, folder))
    assert [path for _, path in steps] == [None, None, None, str(folder / "report.html")]
    assert "Examining image 1 of 2: photo.png" in steps[0][0]
    assert "photo.png</td>" in steps[1][0]  # what is known is shown while the rest is examined
    assert "Examining image 2 of 2: bad.png" in steps[1][0]
    last, report = steps[-1][0], (folder / "report.html").read_text(encoding="utf-8")
    assert "working" not in last.partition("</style>")[2]
    for shown in (last, report):
        assert "could not be examined" in shown
        assert "the file makes no claim of its origin" in shown
        assert "Examined: " in shown
        assert str(tmp_path) not in shown.replace(str(checkpoint), "")
    assert "To repeat this examination" in report
    for files, message in ((None, "at least one"), ([str(image)] * 21, "At most 20")):
        with pytest.raises(gradio.Error, match=message):
            next(page.examine_uploads(examiner, files, folder))
    assert "This model knows real, a, b." in str(page.make_page(examiner).get_config_file())


# --- figures ------------------------------------------------------------------------------------------------


def test_a_confusion_matrix_has_a_row_a_class_and_nothing_below():
    """Its counts stand in their cells, and the picture ends where the last class does."""
    axes = draw_confusion(["real", "a"], [[3, 0, 1], [2, 4, 0]]).axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "3", (1, 0): "0", (2, 0): "1", (0, 1): "2", (1, 1): "4", (2, 1): "0"}
    assert sorted(axes.get_ylim()) == [-0.5, 1.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["real", "a"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["real", "a", "unknown"]
    axes = draw_confusion(["real", "a"], [[3, 0, 1, 0], [2, 4, 0, 5]]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()][2:] == ["unknown", "no evidence"]
    axes = draw_confusion(["real", "a"], [[0, 0, 0], [2, 4, 0]]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a"], "those that have images"
    assert sorted(axes.get_ylim()) == [-0.5, 0.5]


def test_figures_are_drawn(fitted_model, tmp_path):
    confusion = [[3, 0, 0, 1], [0, 4, 0, 0], [1, 0, 2, 0]]
    rng = np.random.default_rng(0)
    figures = {
        "embeddings": EmbeddingMap(fitted_model.detector).draw(np.zeros(16)),
        "confusion": draw_confusion(["real", "a", "b"], confusion),
        "reliability": draw_reliability([{"confidence": 0.9, "accuracy": 0.8, "share": 1.0}]),
        "roc": draw_roc({"known against unknown": (rng.normal(1, 1, 50), rng.normal(0, 1, 50))}),
    }
    for path in save_figures(figures, tmp_path / "figures"):
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(10**6)) > 20  # something is on it
    with pytest.raises(ValueError, match="'pca' or 'umap'"):
        EmbeddingMap(fitted_model.detector, "tsne")


def test_every_test_split_is_drawn(fitted_model):
    labels = np.arange(60) % 3
    rng = np.random.default_rng(0)
    probabilities = (np.zeros((60, 1)), rng.dirichlet(np.ones(3), 60), labels)
    parts = {"test": Predictions(*probabilities), "cross": Predictions(*probabilities)}
    splits = evaluate_splits(parts, ["real", "a", "b"], resamples=2)
    evaluation = Evaluation(["real", "a", "b"], 0.05, 0.01, "none", splits)
    figures = draw_evaluation(evaluation, fitted_model.detector)
    assert set(figures) == {
        "roc", "confusion", "reliability", "confusion_cross", "reliability_cross", "embeddings",
    }  # fmt: skip
    assert len(figures["roc"].axes[0].get_legend().get_texts()) == 2
