import copyreg
import pickle
import pickletools

import numpy as np
import pytest
import scipy.stats
import torch
from protoleak import GaussianKDE, KnownDensity
from protoleak.density_protoleak import (
    OPEN_SET_SCORES,
    SCORERS,
    GaussianDensity,
    GMMScorer,
    KDEScorer,
    LLRScorer,
    MahalanobisScorer,
    NeighbourDistance,
    OpenSetScore,
)
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.neighbors import KernelDensity, NearestNeighbors


@pytest.fixture
def blobs():
    """300 samples of 3 classes at D = 128, and 50 queries."""
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    centres = rng.normal(size=(3, 128))
    return centres[labels] + rng.normal(size=(300, 128)), labels, rng.normal(size=(50, 128)) * 1.5


@pytest.mark.parametrize("name", OPEN_SET_SCORES)
def test_embeddings_of_two_classes_on_a_line_are_scored(name):
    """As a network of two classes begins: one dimension tells them apart, the others are zero."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 2
    samples = np.zeros((60, 5))
    samples[:, 0] = labels * 6 - 3 + rng.normal(size=60) / 2
    scores = OPEN_SET_SCORES[name]().fit(samples, labels).score_samples(samples)
    assert np.isfinite(scores).all()


def test_float32_is_off_by_no_more_than_is_said(blobs):
    samples, _, queries = blobs
    for bandwidth in (0.1, 0.5, 2.0):
        exact, single = (GaussianKDE(bandwidth, dtype=t).fit(samples) for t in ("float64", "float32"))
        bound = 1e-6 * np.square(queries - samples.mean(axis=0)).sum(axis=1) / bandwidth**2
        off = np.abs(single.score_samples(queries) - exact.score_samples(queries))
        assert np.all(off < bound)
        assert off.max() > 1e-8  # it is another precision indeed
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64'"):
        GaussianKDE(1.0, dtype="float16").fit(samples)


@pytest.mark.parametrize("bandwidth", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("block_size", [7, 4096])
def test_kde_equals_brute_force_scikit_learn(blobs, bandwidth, block_size):
    samples, _, queries = blobs
    expected = KernelDensity(bandwidth=bandwidth, leaf_size=len(samples)).fit(samples).score_samples(queries)
    kde = GaussianKDE(bandwidth, block_size=block_size).fit(samples)
    np.testing.assert_allclose(kde.score_samples(queries), expected, atol=1e-6, rtol=0)
    assert kde.score(queries) == pytest.approx(expected.sum(), abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kde_on_a_device_equals_the_cpu(blobs):
    samples, _, queries = blobs
    on_cpu, on_gpu = (GaussianKDE(0.5, device=d).fit(samples).score_samples(queries) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-6, rtol=0)


def test_bandwidth_is_that_of_scikit_learns_grid_search(blobs):
    samples = blobs[0]
    kde = GaussianKDE(bandwidths=(0.3, 0.6, 0.9, 1.2, 2.0), n_folds=4).fit(samples)
    grid = [h * kde.samples_.square().mean().sqrt().item() for h in kde.bandwidths]
    folds = PredefinedSplit(np.arange(len(samples)) % 4)
    search = GridSearchCV(KernelDensity(leaf_size=len(samples)), {"bandwidth": grid}, cv=folds).fit(samples)
    assert kde.bandwidth_ == pytest.approx(search.best_params_["bandwidth"])


def test_kde_is_a_scikit_learn_estimator(blobs):
    kde = clone(GaussianKDE(bandwidth=0.7, block_size=64))
    assert kde.get_params()["bandwidth"] == 0.7
    assert np.isfinite(kde.fit(blobs[0]).score(blobs[2]))


def test_kde_refuses_what_it_cannot_use(blobs):
    with pytest.raises(ValueError, match="not fitted"):
        GaussianKDE(1.0).score_samples(blobs[2])
    with pytest.raises(ValueError, match="128"):
        GaussianKDE(1.0).fit(blobs[0]).score_samples(blobs[2][:, :5])
    with pytest.raises(ValueError, match="NaN"):
        GaussianKDE(1.0).fit(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="bandwidth"):
        GaussianKDE(-1.0).fit(blobs[0])
    with pytest.raises(ValueError, match="at least 2"):
        GaussianKDE().fit(blobs[0][:1])


def test_llr_is_linear_discriminant_analysis(blobs):
    samples, labels, queries = blobs
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(samples, labels)
    scores = LLRScorer(shrinkage=0).fit(samples, labels).score_samples(queries)
    expected = lda.decision_function(queries)
    np.testing.assert_allclose(
        scores - scores.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=1e-6
    )


def test_mahalanobis_is_the_gaussian_exponent(blobs):
    samples, labels, queries = blobs
    scaled = (samples - samples.mean(0)) / samples.std(0)
    query = (queries - samples.mean(0)) / samples.std(0)
    scores = MahalanobisScorer(shrinkage=0).fit(samples, labels).score_samples(queries)
    for k in range(3):
        members = scaled[labels == k]
        normal = multivariate_normal(members.mean(0), np.diag(members.var(0)))
        np.testing.assert_allclose(
            scores[:, k], 2 * (normal.logpdf(query) - normal.logpdf(members.mean(0))), atol=1e-6
        )


def test_gmm_scores_as_scikit_learn(blobs):
    samples, labels, queries = blobs
    scores = GMMScorer(n_components=2, seed=3).fit(samples, labels).score_samples(queries)
    mean, std = samples.mean(0), samples.std(0)
    for k in range(3):
        mixture = GaussianMixture(2, covariance_type="diag", reg_covar=1e-2, random_state=3)
        mixture.fit((samples[labels == k] - mean) / std)
        np.testing.assert_allclose(scores[:, k], mixture.score_samples((queries - mean) / std), atol=1e-6)


def test_class_kde_is_a_kde_a_class(blobs):
    samples, labels, queries = blobs
    scores = KDEScorer(bandwidth=0.8).fit(samples, labels).score_samples(queries)
    for k in range(3):
        members = samples[labels == k]
        expected = KernelDensity(bandwidth=0.8, leaf_size=len(members)).fit(members).score_samples(queries)
        np.testing.assert_allclose(scores[:, k], expected, atol=1e-6)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_finds_separated_classes(blobs, name):
    samples, labels, _ = blobs
    scores = SCORERS[name]().fit(samples[:150], labels[:150]).score_samples(samples[150:])
    assert (scores.argmax(axis=1) == labels[150:]).mean() > 0.95
    with pytest.raises(ValueError, match="at least 2 samples"):
        SCORERS[name]().fit(samples[:4], labels[:4])


# --- calibration --------------------------------------------------------------------------------------------


def test_p_values_keep_their_promise(blobs):
    """
    On exchangeable images the share with p <= alpha is at most alpha, averaged over draws of the calibration
    set.
    """
    rng = np.random.default_rng(1)
    density = KnownDensity()
    alpha, realised = 0.1, []
    for _ in range(400):
        scores = rng.normal(size=60)
        density.calibration_ = torch.from_numpy(np.sort(scores[:40]))
        realised.append((density.p_value(scores[40:]) <= alpha).mean())
    assert abs(np.mean(realised) - 4 / 41) < 0.015  # exactly floor(alpha (m + 1)) / (m + 1), m = 40


def test_p_values_rise_with_density():
    density = KnownDensity()
    density.calibration_ = torch.tensor([0.0, 1.0, 2.0])
    assert density.p_value(np.array([-1.0, 0.0, 1.5, 9.0])).tolist() == [0.25, 0.5, 0.75, 1.0]


# --- files --------------------------------------------------------------------------------------------------


def images(embeddings: np.ndarray) -> dict[str, np.ndarray]:
    return {"embeddings": embeddings, "gates": np.ones_like(embeddings), "statistics": embeddings[:, :5]}


@pytest.fixture
def density(blobs) -> KnownDensity:
    samples, labels, queries = blobs
    train = images(samples) | {"labels": labels}
    held_out = images(queries) | {"labels": np.arange(len(queries)) % 3}
    density = KnownDensity().fit(train, held_out, ["real", "a", "b"])
    density.probe_ = torch.zeros(128)
    return density


def test_a_density_survives_saving(density, blobs, tmp_path, monkeypatch):
    density.save(tmp_path / "density.pkl")
    loaded = KnownDensity.load(tmp_path / "density.pkl")
    queries = blobs[2]
    scores = loaded.log_density(images(queries))
    np.testing.assert_allclose(scores, density.log_density(images(queries)), atol=1e-9)
    assert loaded.labels == density.labels
    assert (
        loaded.chosen_
        == density.chosen_
        == {"embeddings": {"bandwidth": density.scores_["embeddings"].kde_.bandwidth_}}
    )
    monkeypatch.setattr(GaussianKDE, "_held_out_log_likelihood", None)  # nothing is chosen again
    again = KnownDensity.load(tmp_path / "density.pkl")
    np.testing.assert_allclose(again.log_density(images(queries)), scores, atol=1e-9)
    for name in SCORERS:
        expected = density.scorers_[name].score_samples(queries)
        np.testing.assert_allclose(loaded.scorers_[name].score_samples(queries), expected, atol=1e-9)


def test_the_file_needs_no_import(density, tmp_path):
    density.save(path := tmp_path / "density.pkl")
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
                KnownDensity.load(path)
            assert not victim.exists()
    copyreg.add_extension("os", "mkdir", 240)
    try:
        path.write_bytes(pickle.dumps(os.mkdir, protocol=2))
        with pytest.raises(ValueError, match="refused"):
            KnownDensity.load(path)
    finally:
        copyreg.remove_extension("os", "mkdir", 240)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"version": 99, "density": {}})]
)
def test_damaged_files_are_named(content, tmp_path):
    (tmp_path / "density.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"density\.pkl was refused"):
        KnownDensity.load(tmp_path / "density.pkl")


@pytest.mark.parametrize(
    ("name", "value"),
    [("open_set_scores", {"embeddings": "system"}), ("chosen_", {"embeddings": {"command": "true"}})],
)
def test_a_score_that_does_not_exist_is_refused(density, name, value, tmp_path):
    setattr(density, name, value)
    density.save(tmp_path / "density.pkl")
    with pytest.raises(ValueError, match=r"density\.pkl was refused"):
        KnownDensity.load(tmp_path / "density.pkl")


def test_enrolling_extends_the_density(density, blobs):
    rng = np.random.default_rng(5)
    new = rng.normal(size=(10, 128)) * 0.5 + 6
    queries = rng.normal(size=(20, 128)) * 0.5 + 6
    enrolled = density.enroll("c", images(new))
    assert enrolled.labels == ["real", "a", "b", "c"]
    assert (density.p_value(density.log_density(images(queries))) <= 0.05).all()
    assert (enrolled.p_value(enrolled.log_density(images(queries)), np.repeat(3, 20)) > 0.05).all()
    assert (enrolled.scorers_["mahalanobis"].score_samples(queries).argmax(1) == 3).all()
    again = enrolled.enroll("d", images(-new))
    for more, count in ((enrolled, 10), (again, 20)):
        assert sum(map(len, more.own_calibration_.values())) == count
        assert len(more.calibration_set()["labels"]) == len(density.calibration_) + count
    others = type(enrolled.scores_["embeddings"])().fit(
        enrolled.train_["embeddings"][:-1], enrolled.train_["labels"][:-1]
    )
    left_out = others.score_samples(enrolled.train_["embeddings"][-1:])[0]
    own = enrolled.own_calibration_[3]
    assert (own - left_out).abs().min() < 1e-9, "an enrolled image is scored by the others"
    with pytest.raises(ValueError, match="already known"):
        density.enroll("a", images(new))
    with pytest.raises(ValueError, match="at least 2"):
        density.enroll("c", images(new[:1]))
    with pytest.raises(ValueError, match=r"\(10, 128\), \(5, 128\)"):
        density.enroll("c", images(new) | {"gates": new[:5]})


def test_many_enrolled_images_calibrate_in_folds(density, monkeypatch):
    fits = []
    fitted = KnownDensity._fitted
    monkeypatch.setattr(KnownDensity, "_fitted", lambda *given: fits.append(1) or fitted(*given))
    new = np.random.default_rng(7).normal(size=(50, 128)) * 0.5 + 6
    own = density.enroll("c", images(new)).own_calibration_[3]
    assert (len(own), len(fits)) == (50, 1 + 20)
    assert own.isfinite().all()
    assert own.std() > 0


def test_two_scores_are_added_in_units_of_their_spread_on_held_out_images(blobs):
    samples, labels, queries = blobs
    train = images(samples) | {"labels": labels}
    held_out = images(queries) | {"labels": np.arange(len(queries)) % 3}
    both = KnownDensity().fit(train, held_out, ["real", "a", "b"], {"embeddings": "knn", "statistics": "kde"})
    known, expected = both.held_out_, 0
    for features, score in both.open_set_scores.items():
        alone = KnownDensity().fit(train, held_out, ["real", "a", "b"], {features: score}).log_density(known)
        expected = expected + (alone - np.median(alone)) / scipy.stats.iqr(alone)
    np.testing.assert_allclose(both.log_density(known), expected, atol=1e-9)
    assert np.std(expected) > 0.1
    strangers = both.log_density(images(queries * 4))
    assert np.median(strangers) < both.calibration_.min()


def test_held_out_images_calibrate_and_an_enrolled_class_itself(density, blobs):
    samples, labels, queries = blobs
    train = images(samples) | {"labels": labels}
    held_out = images(queries) | {"labels": np.arange(len(queries)) % 3}
    fitted = KnownDensity().fit(train, held_out, ["real", "a", "b"], {"statistics": "mahalanobis"})
    expected = np.sort(fitted.scores_["statistics"].score_samples(fitted.held_out_["statistics"]))
    np.testing.assert_array_equal(fitted.calibration_, expected)
    enrolled = fitted.enroll("c", images(queries[:4] + 9))
    assert len(enrolled.calibration_) == len(queries)
    (own,) = enrolled.own_calibration_.values()
    assert len(own) == 4
    score = np.repeat(float(own[1]), 2)
    assert enrolled.p_value(score, np.array([3, 0])).tolist() == [3 / 5, enrolled.p_value(score)[0]]
    assert enrolled.threshold(0.4, 3) == own[1]


# --- open-set scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPEN_SET_SCORES)
def test_every_open_set_score_ranks_strangers_last(blobs, name):
    samples, labels, _ = blobs
    score = OPEN_SET_SCORES[name]().fit(samples[:150], labels[:150])
    strangers = np.random.default_rng(1).normal(size=(50, 128)) * 0.5 - 1.5 * np.sign(samples[0])
    known, unknown = score.score_samples(samples[150:]), score.score_samples(strangers)
    assert roc_auc_score(np.repeat([1, 0], [len(known), 50]), np.concatenate([known, unknown])) > 0.95


def test_whitening_makes_the_classes_covariance_the_identity(blobs):
    samples, labels, _ = blobs
    few = samples[:, :5] @ np.random.default_rng(0).normal(size=(5, 5))
    score = OpenSetScore("whiten", shrinkage=0.0)
    score._fit = lambda samples, labels, num_labels: None
    white = score.fit(few, labels)._transformed(torch.from_numpy(few)).numpy()
    centred = white - np.stack([white[labels == k].mean(0) for k in range(3)])[labels]
    np.testing.assert_allclose(centred.T @ centred / len(centred), np.eye(5), atol=1e-9)


def test_gaussian_density_is_scipys(blobs):
    samples, labels, queries = blobs
    few, asked = samples[:, :4], queries[:, :4]
    score = GaussianDensity(shrinkage=0.0)
    means = np.stack([few[labels == k].mean(0) for k in range(3)])
    centred = few - means[labels]
    covariance = centred.T @ centred / len(few)
    densities = [multivariate_normal(mean, covariance).pdf(asked) for mean in means]
    found = score.fit(few, labels).score_samples(asked)
    expected = np.log(sum(densities))
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-8)
    pooled = multivariate_normal(few.mean(0), np.cov(few.T, bias=True)).logpdf(asked)
    relative = GaussianDensity(shrinkage=0.0, relative=True).fit(few, labels).score_samples(asked)
    np.testing.assert_allclose(relative - relative[0], expected - pooled - (expected - pooled)[0], atol=1e-8)


def test_neighbour_distance_is_scikit_learns(blobs):
    samples, labels, queries = blobs
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (samples, queries)]
    distances, _ = NearestNeighbors(n_neighbors=5).fit(unit[0]).kneighbors(unit[1])
    found = NeighbourDistance().fit(samples, labels).score_samples(queries)
    np.testing.assert_allclose(found, -distances[:, 4], atol=1e-6)


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
    density = KnownDensity()
    for _ in range(200):
        order = rng.permutation(100)
        density.calibration_ = torch.from_numpy(np.sort(values[order[:60]]))
        realised.append((density.p_value(values[order[60:]]) <= 0.05).mean())
    assert np.mean(realised) == pytest.approx(3 / 61, abs=0.012)
    assert np.mean(realised) <= 0.05 + 0.012


def test_prediction_sets_have_the_right_class(density):
    """Label-conditional coverage of at least 1 - alpha in every class, over random calibration splits."""
    rng = np.random.default_rng(0)
    alpha, missed = 0.1, {0: [], 1: [], 2: []}
    for _ in range(200):
        labels = np.arange(120) % 3
        scores = rng.normal(size=(120, 3)) + np.eye(3)[labels] * [1, 2, 3]
        probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        own = probabilities[np.arange(60), labels[:60]]
        density.class_calibration_["prototype"] = [
            torch.from_numpy(np.sort(own[labels[:60] == k])) for k in range(3)
        ]
        p_values = density.class_p_values("prototype", probabilities[60:])
        for k in range(3):
            missed[k].append((p_values[labels[60:] == k, k] <= alpha).mean())
    for k in range(3):
        assert np.mean(missed[k]) == pytest.approx(2 / 21, abs=0.02)


def test_the_temperature_is_found(density):
    rng = np.random.default_rng(0)
    labels = density.calibration_set()["labels"].numpy()
    true = rng.normal(size=(len(labels), 3))
    draws = (true + rng.gumbel(size=true.shape)).argmax(1)  # labels drawn from softmax(true)
    density.held_out_["labels"] = torch.from_numpy(draws)
    density.calibrate("prototype", torch.from_numpy(true * 7.0))
    found = density.temperatures_["prototype"]
    grid = np.geomspace(1, 50, 2000)
    losses = [-torch.tensor(true * 7 / t).log_softmax(1)[np.arange(len(draws)), draws].mean() for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)
    assert 3 < found < 14
