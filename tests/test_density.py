import copyreg
import pickle
import pickletools

import numpy as np
import pytest
import scipy.stats
import torch
from protoleak import GaussianKDE, OpenSetDetector
from protoleak.density_protoleak import STATE
from protoleak.scores_protoleak import OPEN_SET_SCORES

# --- calibration --------------------------------------------------------------------------------------------


def test_p_values_keep_their_promise(blobs):
    """
    On exchangeable images the share with p <= alpha is at most alpha, averaged over draws of the calibration
    set.
    """
    rng = np.random.default_rng(1)
    detector = OpenSetDetector()
    alpha, realised = 0.1, []
    for _ in range(400):
        scores = rng.normal(size=60)
        detector.calibration_ = torch.from_numpy(np.sort(scores[:40]))
        realised.append((detector.p_value(scores[40:]) <= alpha).mean())
    assert abs(np.mean(realised) - 4 / 41) < 0.015  # exactly floor(alpha (m + 1)) / (m + 1), m = 40


def test_p_values_rise_with_the_score():
    detector = OpenSetDetector()
    detector.calibration_ = torch.tensor([0.0, 1.0, 2.0])
    assert detector.p_value(np.array([-1.0, 0.0, 1.5, 9.0])).tolist() == [0.25, 0.5, 0.75, 1.0]


# --- files --------------------------------------------------------------------------------------------------


def images(embeddings: np.ndarray) -> dict[str, np.ndarray]:
    return {"embeddings": embeddings, "gates": np.ones_like(embeddings), "statistics": embeddings[:, :5]}


@pytest.fixture
def detector(blobs) -> OpenSetDetector:
    samples, labels, queries = blobs
    train = images(samples) | {"labels": labels}
    held_out = images(queries) | {"labels": np.arange(len(queries)) % 3}
    detector = OpenSetDetector().fit(train, held_out, ["real", "a", "b"])
    rng = np.random.default_rng(2)
    detector.calibrate(torch.from_numpy(rng.normal(size=(len(queries), 3))))
    detector.probe_ = torch.zeros(128)
    return detector


def test_a_detector_survives_saving(detector, blobs, tmp_path, monkeypatch):
    detector.save(tmp_path / "density.pkl")
    loaded = OpenSetDetector.load(tmp_path / "density.pkl")
    queries = blobs[2]
    scores = loaded.open_set_score(images(queries))
    np.testing.assert_allclose(scores, detector.open_set_score(images(queries)), atol=1e-9)
    assert loaded.labels == detector.labels
    assert (
        loaded.chosen_
        == detector.chosen_
        == {"embeddings": {"bandwidth": detector.scores_["embeddings"].kde_.bandwidth_}}
    )
    monkeypatch.setattr(GaussianKDE, "_held_out_log_likelihood", None)  # nothing is chosen again
    again = OpenSetDetector.load(tmp_path / "density.pkl")
    np.testing.assert_allclose(again.open_set_score(images(queries)), scores, atol=1e-9)
    for name in STATE:
        expected, value = getattr(detector, name), getattr(loaded, name)
        if name in ("train_", "held_out_"):
            assert (
                set(value) == set(expected) == {"embeddings", "gates", "labels"}
            )  # no score is of statistics
            assert all(torch.equal(value[part], expected[part]) for part in value)  # rounded in the fit
        elif name == "class_calibration_":
            assert all(map(torch.equal, value, expected))
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(value, expected)
        else:
            assert value == expected


def test_the_file_needs_no_import(detector, tmp_path):
    detector.save(path := tmp_path / "density.pkl")
    operations = {operation.name for operation, _, _ in pickletools.genops(path.read_bytes())}
    assert not operations & {
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
        "INST",
        "OBJ",
        "NEWOBJ",
        "NEWOBJ_EX",
    }
    assert not operations & {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}


class _Attack:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_malicious_files_run_nothing(tmp_path):
    import os

    victim = tmp_path / "victim"
    path = tmp_path / "density.pkl"
    for attack in (_Attack(os.mkdir, str(victim)), _Attack(eval, f"__import__('os').mkdir({str(victim)!r})")):
        for protocol in range(6):
            path.write_bytes(pickle.dumps({"version": 2, "density": attack}, protocol=protocol))
            with pytest.raises(ValueError, match="refused"):
                OpenSetDetector.load(path)
            assert not victim.exists()
    copyreg.add_extension("os", "mkdir", 240)
    try:
        path.write_bytes(pickle.dumps(os.mkdir, protocol=2))
        with pytest.raises(ValueError, match="refused"):
            OpenSetDetector.load(path)
    finally:
        copyreg.remove_extension("os", "mkdir", 240)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"version": 99, "density": {}})]
)
def test_damaged_files_are_named(content, tmp_path):
    (tmp_path / "density.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"density\.pkl was refused"):
        OpenSetDetector.load(tmp_path / "density.pkl")


def test_a_file_of_the_format_before_tells_what_to_do(tmp_path):
    """As the previous version wrote it."""
    before = {"version": 6, "state": {"labels": ["real", "a"]}}
    (tmp_path / "density.pkl").write_bytes(pickle.dumps(before, protocol=4))
    with pytest.raises(ValueError, match=r"density\.pkl.*version 6.*reads version 7.*again with train\.py"):
        OpenSetDetector.load(tmp_path / "density.pkl")


@pytest.mark.parametrize(
    ("name", "value"),
    [("open_set_scores", {"embeddings": "system"}), ("chosen_", {"embeddings": {"command": "true"}})],
)
def test_a_score_that_does_not_exist_is_refused(detector, name, value, tmp_path):
    setattr(detector, name, value)
    detector.save(tmp_path / "density.pkl")
    with pytest.raises(ValueError, match=r"density\.pkl was refused"):
        OpenSetDetector.load(tmp_path / "density.pkl")


def test_enrolling_extends_the_detector(detector, blobs):
    rng = np.random.default_rng(5)
    new = rng.normal(size=(10, 128)) * 0.5 + 6
    queries = rng.normal(size=(20, 128)) * 0.5 + 6
    enrolled = detector.enroll("c", images(new))
    assert enrolled.labels == ["real", "a", "b", "c"]
    assert (detector.p_value(detector.open_set_score(images(queries))) <= 0.05).all()
    assert (enrolled.p_value(enrolled.open_set_score(images(queries)), np.repeat(3, 20)) > 0.05).all()
    again = enrolled.enroll("d", images(-new))
    for more, count in ((enrolled, 10), (again, 20)):
        assert sum(map(len, more.own_calibration_.values())) == count
        assert len(more.calibration_set()["labels"]) == len(detector.calibration_) + count
    others = type(enrolled.scores_["embeddings"])(**enrolled.chosen_["embeddings"]).fit(
        enrolled.train_["embeddings"][:-1], enrolled.train_["labels"][:-1]
    )
    left_out = others.score_samples(enrolled.train_["embeddings"][-1:])[0]
    own = enrolled.own_calibration_[3]
    assert (own - left_out).abs().min() < 1e-9, "an enrolled image is scored by the others"
    with pytest.raises(ValueError, match="already known"):
        detector.enroll("a", images(new))
    with pytest.raises(ValueError, match="at least 2"):
        detector.enroll("c", images(new[:1]))
    with pytest.raises(ValueError, match=r"\(10, 128\), 'gates': \(5, 128\)"):
        detector.enroll("c", images(new) | {"gates": new[:5]})


def test_many_enrolled_images_calibrate_in_folds(detector, monkeypatch):
    fits = []
    fitted = OpenSetDetector._fitted
    monkeypatch.setattr(OpenSetDetector, "_fitted", lambda *given: fits.append(1) or fitted(*given))
    new = np.random.default_rng(7).normal(size=(50, 128)) * 0.5 + 6
    own = detector.enroll("c", images(new)).own_calibration_[3]
    assert (len(own), len(fits)) == (50, 1 + 20)
    assert own.isfinite().all()
    assert own.std() > 0


def test_two_scores_are_added_in_units_of_their_spread_on_held_out_images(blobs):
    samples, labels, queries = blobs
    train = images(samples) | {"labels": labels}
    held_out = images(queries) | {"labels": np.arange(len(queries)) % 3}
    names, scores = ["real", "a", "b"], {"embeddings": "kde", "statistics": "l2_mahalanobis"}
    both = OpenSetDetector().fit(train, held_out, names, scores)
    known, expected = both.held_out_, 0
    for features, score in both.open_set_scores.items():
        one = OpenSetDetector().fit(train, held_out, names, {features: score})
        alone = one.open_set_score(known)
        expected = expected + (alone - np.median(alone)) / scipy.stats.iqr(alone)
    np.testing.assert_allclose(both.open_set_score(known), expected, atol=1e-9)
    assert np.std(expected) > 0.1
    strangers = both.open_set_score(images(queries * 4))
    assert np.median(strangers) < both.calibration_.min()


def test_held_out_images_calibrate_and_an_enrolled_class_itself(detector, blobs):
    samples, labels, queries = blobs
    train = images(samples) | {"labels": labels}
    held_out = images(queries) | {"labels": np.arange(len(queries)) % 3}
    fitted = OpenSetDetector().fit(train, held_out, ["real", "a", "b"], {"statistics": "l2_mahalanobis"})
    expected = np.sort(fitted.scores_["statistics"].score_samples(fitted.held_out_["statistics"]))
    np.testing.assert_array_equal(fitted.calibration_, expected)
    enrolled = fitted.enroll("c", images(queries[:4] + 9))
    assert len(enrolled.calibration_) == len(queries)
    (own,) = enrolled.own_calibration_.values()
    assert len(own) == 4
    score = np.repeat(float(own[1]), 2)
    assert enrolled.p_value(score, np.array([3, 0])).tolist() == [3 / 5, enrolled.p_value(score)[0]]
    assert enrolled.threshold(0.4, 3) == own[1]


# --- conformal sets and temperature -------------------------------------------------------------------------


def test_false_unknowns_stay_within_alpha_over_random_calibration_splits(blobs):
    """
    Whatever the score. Of 200 calibration splits of 60 images and 40 others each, the share of false
    unknowns averages floor(alpha (m + 1)) / (m + 1); its standard error is under 0.004.
    """
    samples, labels, _ = blobs
    rng, realised = np.random.default_rng(0), []
    score = OPEN_SET_SCORES["kde"]().fit(samples[:100], labels[:100])
    values = score.score_samples(samples[100:200])
    detector = OpenSetDetector()
    for _ in range(200):
        order = rng.permutation(100)
        detector.calibration_ = torch.from_numpy(np.sort(values[order[:60]]))
        realised.append((detector.p_value(values[order[60:]]) <= 0.05).mean())
    assert np.mean(realised) == pytest.approx(3 / 61, abs=0.012)
    assert np.mean(realised) <= 0.05 + 0.012


def test_prediction_sets_have_the_right_class(detector):
    """Label-conditional coverage of at least 1 - alpha in every class, over random calibration splits."""
    rng = np.random.default_rng(0)
    alpha, missed = 0.1, {0: [], 1: [], 2: []}
    for _ in range(200):
        labels = np.arange(120) % 3
        scores = rng.normal(size=(120, 3)) + np.eye(3)[labels] * [1, 2, 3]
        probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        own = (probabilities / probabilities.max(1, keepdims=True))[np.arange(60), labels[:60]]
        detector.class_calibration_ = [torch.from_numpy(np.sort(own[labels[:60] == k])) for k in range(3)]
        p_values = detector.class_p_values(probabilities[60:])
        for k in range(3):
            missed[k].append((p_values[labels[60:] == k, k] <= alpha).mean())
    assert np.mean(missed[0]) == pytest.approx(2 / 21, abs=0.02)
    for k in (1, 2):  # mostly the likeliest class of their images, which is never ruled out
        assert np.mean(missed[k]) <= 2 / 21 + 0.02


def test_the_temperature_is_found(detector):
    rng = np.random.default_rng(0)
    labels = detector.calibration_set()["labels"].numpy()
    true = rng.normal(size=(len(labels), 3))
    draws = (true + rng.gumbel(size=true.shape)).argmax(1)  # labels drawn from softmax(true)
    detector.held_out_["labels"] = torch.from_numpy(draws)
    detector.calibrate(torch.from_numpy(true * 7.0))
    found = detector.temperature_
    grid = np.geomspace(1, 50, 2000)
    own = np.arange(len(draws)), draws
    weights = torch.from_numpy(1 / np.bincount(draws)[draws])  # classes count alike
    losses = [-(weights * torch.tensor(true * 7 / t).log_softmax(1)[own]).sum() for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)
    assert 3 < found < 14


# --- cross-fitting ------------------------------------------------------------------------------------------

NAMES = ["real", "a", "b"]


def cross_fitted(labels: np.ndarray, num_sources: list[int], seed: int = 3, strangers: int = 0) -> dict:
    """Scores that tell the classes somewhat apart; strangers without column 1."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(strangers, 3))
    logits[:, 1] = -np.inf
    scores = rng.normal(size=(len(labels), 3)) + 2 * np.eye(3)[labels]
    of_images = {"embeddings": rng.normal(size=len(labels))}
    return {
        "open_set_scores": of_images, "class_scores": scores, "labels": labels, "num_sources": num_sources,
        "strangers": logits,
    }  # fmt: skip


@pytest.fixture
def trained_on(blobs) -> dict[str, np.ndarray]:
    samples, labels, _ = blobs
    return images(samples) | {"labels": labels}


def softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp(scores / temperature)
    return weights / weights.sum(axis=1, keepdims=True)


def test_cross_fitting_calibrates_everything(trained_on):
    given = cross_fitted(labels := np.repeat([0, 1, 2], [50, 10, 5]), [3, 2, 1], strangers=20)
    detector = OpenSetDetector().fit(trained_on, None, NAMES, cross_fitted=given)
    assert detector.held_out_ is None
    scores = given["open_set_scores"]["embeddings"]
    np.testing.assert_array_equal(detector.calibration_, np.sort(scores))
    assert detector.spreads_["embeddings"] == pytest.approx([np.median(scores), scipy.stats.iqr(scores)])
    probabilities = softmax(given["class_scores"], detector.temperature_)
    own = (probabilities / probabilities.max(1, keepdims=True))[np.arange(65), labels]
    for k, members in enumerate((own[:50], own[50:60], own[60:])):
        np.testing.assert_allclose(detector.class_calibration_[k], np.sort(members))
    np.testing.assert_allclose(
        detector.generators_calibration_, np.sort(own[50:60]), err_msg="a has 2 sources"
    )
    generated = [*probabilities[50:, 0], *softmax(given["strangers"], detector.temperature_)[:, 0]]
    np.testing.assert_allclose(detector.generated_calibration_, np.sort(generated))
    assert detector.own_calibration_ == {}
    assert len(detector.calibration_set()["labels"]) == 0
    temperature, calibration = detector.temperature_, list(detector.class_calibration_)
    detector.calibrate(torch.empty(0, 3))  # as a model does when it takes the detector
    assert detector.temperature_ == temperature
    assert all(map(torch.equal, detector.class_calibration_, calibration))


def test_generators_are_compared_with_each_other_and_photographs_are_not(trained_on):
    """The p-value of a generator is the mean of that among its own images and among all generators'."""
    given = cross_fitted(np.repeat([0, 1, 2], 8), [1, 1, 4])
    detector = OpenSetDetector().fit(trained_on, None, NAMES, cross_fitted=given)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    ratios = probabilities / probabilities.max(1, keepdims=True)

    def among(calibration, k):
        return (1 + (calibration.numpy() <= ratios[:, k, None]).sum(1)) / (len(calibration) + 1)

    own = [among(detector.class_calibration_[k], k) for k in range(3)]
    p_values = detector.class_p_values(probabilities)
    np.testing.assert_allclose(p_values[:, 0], own[0], err_msg="real")
    for k in (1, 2):
        np.testing.assert_allclose(p_values[:, k], (own[k] + among(detector.generators_calibration_, k)) / 2)
    single = OpenSetDetector().fit(trained_on, None, NAMES, cross_fitted=given | {"num_sources": [5, 1, 1]})
    assert single.generators_calibration_ is None, "no generator has several sources"


def test_a_big_class_does_not_set_the_temperature(trained_on):
    given = cross_fitted(np.repeat([0, 1, 2], [300, 20, 20]), [2, 2, 2])
    once = OpenSetDetector().fit(trained_on, None, NAMES, cross_fitted=given).temperature_
    big = given["labels"] == 0
    doubled = given | {
        name: np.concatenate([given[name], given[name][big]]) for name in ("class_scores", "labels")
    }
    doubled["open_set_scores"] = {"embeddings": np.zeros(640)}
    again = OpenSetDetector().fit(trained_on, None, NAMES, cross_fitted=doubled).temperature_
    assert again == pytest.approx(once, rel=1e-3)


def test_p_values_of_generated_keep_their_promise():
    """Of generated images exchangeable with the calibration ones at most alpha have p <= alpha."""
    rng, detector, realised = np.random.default_rng(1), OpenSetDetector(), []
    detector.labels = NAMES
    for _ in range(400):
        probabilities = rng.dirichlet([1, 2, 2], size=60)
        detector.generated_calibration_ = torch.from_numpy(np.sort(probabilities[:40, 0]))
        realised.append((detector.generated_p_values(probabilities[40:]) <= 0.1).mean())
    assert np.mean(realised) == pytest.approx(4 / 41, abs=0.015)
    detector.generated_calibration_ = torch.tensor([0.1, 0.5, 0.5])
    probabilities = np.array([[0.6, 0.2, 0.2], [0.5, 0.3, 0.2], [0.0, 0.5, 0.5]])
    assert detector.generated_p_values(probabilities).tolist() == [0.25, 0.75, 1.0]


def test_held_out_generated_images_calibrate_without_cross_fitting(detector):
    assert len(detector.generated_calibration_) == (detector.held_out_["labels"] != 0).sum()
    detector.labels = ["c", "a", "b"]
    detector.calibrate(torch.zeros(len(detector.held_out_["labels"]), 3))
    assert detector.generated_calibration_ is None
    verdict = detector.verdict(images(np.zeros((2, 128))) | {"logits": torch.zeros(2, 3)})
    assert verdict["generated_p_values"] is None


def test_cross_fitted_calibration_survives_saving_and_enrolling(trained_on, tmp_path):
    given = cross_fitted(np.arange(60) % 3, [2, 2, 1], strangers=5)
    detector = OpenSetDetector().fit(trained_on, None, NAMES, cross_fitted=given)
    detector.probe_ = torch.zeros(128)
    detector.save(path := tmp_path / "density.pkl")
    loaded = OpenSetDetector.load(path)
    rng = np.random.default_rng(4)
    new = images(rng.normal(size=(6, 128)) + 4)
    enrolled = loaded.enroll("c", new)
    assert enrolled.calibration_set()["labels"].tolist() == [3] * 6
    enrolled.calibrate(torch.from_numpy(rng.normal(size=(6, 4))))
    again = enrolled.enroll("d", new)
    again.calibrate(torch.from_numpy(rng.normal(size=(6, 5))))
    for more, num_new in ((enrolled, 1), (again, 2)):
        assert more.temperature_ == detector.temperature_
        assert torch.equal(more.calibration_, detector.calibration_)
        assert more.chosen_ == detector.chosen_, "as what it compares with was scored"
        assert all(map(torch.equal, more.class_calibration_[:3], detector.class_calibration_))
        assert [len(part) for part in more.class_calibration_[3:]] == [6] * num_new
        assert len(more.generated_calibration_) == 45 + 6 * num_new
        assert [len(part) for part in more.own_calibration_.values()] == [6] * num_new
    assert len(loaded.class_calibration_) == 3, "the detector that was extended stays as it was"


def test_a_detector_of_2500_images_is_small(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(2500) % 3
    train = images(rng.normal(size=(2500, 128))) | {"labels": labels, "statistics": None}
    given = cross_fitted(labels, [2, 2, 2], strangers=1000)
    detector = OpenSetDetector().fit(train, None, NAMES, {"embeddings": "l2_kde"}, given)
    detector.probe_ = torch.zeros(128)
    detector.save(path := tmp_path / "density.pkl")
    assert path.stat().st_size < 3e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(60, int)}, "every class"), ({"num_sources": [1, 2]}, "num_sources"),
        ({"open_set_scores": {"embeddings": np.zeros(9)}}, "open_set_scores embeddings"),
        ({"open_set_scores": {"statistics": np.zeros(60)}}, r"\['embeddings'\].*\['statistics'\]"),
        ({"class_scores": np.full((60, 3), np.nan)}, "NaN"),
        ({"strangers": np.full((5, 3), -np.inf)}, "NaN"), ({"strangers": np.zeros((5, 2))}, "strangers"),
    ],
)  # fmt: skip
def test_cross_fitted_scores_that_do_not_fit_are_named(trained_on, change, message):
    given = cross_fitted(np.arange(60) % 3, [2, 2, 1]) | change
    with pytest.raises(ValueError, match=message):
        OpenSetDetector().fit(trained_on, None, NAMES, cross_fitted=given)
