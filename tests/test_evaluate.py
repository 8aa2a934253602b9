import evaluate
import numpy as np
import pytest
from huggingface_hub import RepoCard
from protoleak.evaluate_protoleak.app import EXAMPLE, compute, make_page
from protoleak.evaluate_protoleak.evaluate_protoleak import (
    one_vs_rest_auc,
    open_set_classification_rate,
    open_set_metrics,
)
from sklearn.metrics import roc_auc_score

from . import ROOT


@pytest.fixture
def metric():
    return evaluate.load(str(ROOT / "evaluate_protoleak"))


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    references = np.arange(60) % 3
    predictions = rng.dirichlet(np.ones(3), 60) + 0.5 * np.eye(3)[references]
    return predictions, references, rng.normal(1, 1, 60), rng.normal(0, 1, 40)


def test_macro_auc_is_scikit_learns(metric, scores):
    predictions, references, *_ = scores
    predictions = predictions / predictions.sum(1, keepdims=True)
    result = metric.compute(predictions=predictions, references=references, label_names=["real", "a", "b"])
    expected = roc_auc_score(references, predictions, multi_class="ovr", average="macro")
    assert result["macro_auc"] == pytest.approx(expected)
    aucs = [result[f"auc_{name}"] for name in ("real", "a", "b")]
    assert np.mean(aucs) == pytest.approx(expected)
    assert all(isinstance(value, float) for value in result.values()), "loggers take numbers"
    assert result["accuracy"] == (predictions.argmax(1) == references).mean()
    assert "auroc" not in result


def test_aucs_count_ties_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 4, (50, 4)).astype(float), rng.integers(0, 3, 50)
    aucs = one_vs_rest_auc(predictions, references)
    expected = [roc_auc_score(references == k, predictions[:, k]) for k in range(3)]
    assert aucs[:3] == pytest.approx(expected)
    assert np.isnan(aucs[3])


def test_both_configurations_agree_and_batches_can_be_added(metric, scores):
    predictions, references, known, unknown = scores
    plain = metric.compute(
        predictions=predictions, references=references, known_scores=known, unknown_scores=unknown
    )
    other = evaluate.load(str(ROOT / "evaluate_protoleak"), "open-set")
    other.add_batch(predictions=predictions, references=references, scores=known, is_known=[True] * 60)
    other.add_batch(
        predictions=np.zeros((40, 3)), references=[-1] * 40, scores=unknown, is_known=[False] * 40
    )
    for name, value in other.compute().items():
        assert value == pytest.approx(plain[name]), name


def test_open_set_metrics_by_counting():
    known, unknown = np.array([3.0, 2.0, 1.0, 4.0]), np.array([0.5, 2.5, 0.0, 0.2])
    result = open_set_metrics(known, unknown)
    pairs = [(k > u) + 0.5 * (k == u) for k in known for u in unknown]
    assert result["auroc"] == pytest.approx(np.mean(pairs))
    assert result["fpr95"] == 0.25  # all four known are above 1.0, and of the unknown only 2.5 is
    assert result["eer"] == 0.25
    assert result["overlap"] == 0.25


def test_oscr_by_counting():
    known, unknown, correct = np.array([3.0, 2.0, 1.0]), np.array([2.5, 0.5]), np.array([True, False, True])
    # accepting from the top: 3.0 right (1/3), 2.5 unknown, 2.0 wrong, 1.0 right (2/3), 0.5 unknown
    assert open_set_classification_rate(correct, known, unknown) == pytest.approx(0.5 * 1 / 3 + 0.5 * 2 / 3)
    assert open_set_classification_rate(np.ones(3), known + 10, unknown) == 1.0


def test_classes_without_images_are_left_out(metric, scores, caplog):
    """The average is over the others, each against all images."""
    predictions, references, *_ = scores
    here = references != 1
    result = metric.compute(predictions=predictions[here], references=references[here])
    expected = [roc_auc_score(references[here] == k, predictions[here, k]) for k in (0, 2)]
    assert result["macro_auc"] == pytest.approx(np.mean(expected))
    assert {name for name in result if name.startswith("auc_")} == {"auc_0", "auc_2"}
    assert "classes [1] have no image" in caplog.text
    right = predictions[here].argmax(1) == references[here]
    recalls = [right[references[here] == k].mean() for k in (0, 2)]
    assert result["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    one = metric.compute(predictions=predictions[references == 1], references=references[references == 1])
    assert set(one) == {"accuracy", "balanced_accuracy"}, "no AUC of one class"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": [3] * 60}, "within 0 and 2"),
        ({"predictions": np.full((60, 3), np.nan)}, "NaN"),
        ({"predictions": np.zeros((60, 1))}, "K >= 2"),
        ({"known_scores": None}, "both known_scores and unknown_scores"),
        ({"known_scores": np.zeros(3)}, "60 scores"),
        ({"unknown_scores": []}, "at least one score"),
        ({"unknown_scores": [np.inf]}, "unknown_scores contains NaN"),
        ({"label_names": ["a"]}, "3 classes"),
    ],
)
def test_degenerate_input_is_refused(metric, scores, change, message):
    predictions, references, known, unknown = scores
    arguments = {
        "predictions": predictions,
        "references": references,
        "known_scores": known,
        "unknown_scores": unknown,
    }
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments | change)


def test_an_unknown_configuration_is_refused():
    with pytest.raises(ValueError, match="other"):
        evaluate.load(str(ROOT / "evaluate_protoleak"), "other")


def test_the_cards_example_says_what_it_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    card = (ROOT / "evaluate_protoleak" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert capsys.readouterr().out.strip() == code.rsplit("# ", 1)[1].strip()


def test_the_space_computes_and_explains():
    assert compute(*EXAMPLE)["auroc"] == 0.875
    assert "auroc" not in compute(*EXAMPLE[:2])
    with pytest.raises(ValueError, match="references must be a JSON list"):
        compute(EXAMPLE[0], "[0, 1")
    assert len(make_page().input_components) == 4


def test_the_space_has_its_front_matter_and_requirements():
    folder = ROOT / "evaluate_protoleak"
    card = RepoCard.load(folder / "README.md", ignore_metadata_errors=False).data.to_dict()
    assert card["sdk"] == "gradio"
    assert (folder / card["app_file"]).exists()
    requirements = {line.split(">=")[0] for line in (folder / "requirements.txt").read_text().split()}
    assert requirements == {"datasets", "evaluate", "gradio", "scikit-learn"}
