"""Cross-fitting over sources: what is left out together, what is chosen by it, and that nothing leaks."""

import numpy as np
import pytest
import scipy.linalg
import torch
from datasets import Dataset, DatasetDict
from protoleak import OpenSetDetector, ProtoLeakConfig
from protoleak.scores_protoleak import OPEN_SET_SCORES, PooledDensity
from protoleak.training.cross_fitting import (
    SHRINKAGES,
    Samples,
    Settings,
    Start,
    _spread,
    choose_settings,
    class_folds,
    count_sources,
    cross_fit,
    join_learned,
    source_folds,
)
from protoleak.training.features import make_samples
from protoleak.training.initialisation import begin_as

from .conftest import TEXTURE, tiny_model

# --- folds --------------------------------------------------------------------------------------------------


def check_folds(labels: np.ndarray, sources: np.ndarray, groups: np.ndarray, folds: np.ndarray) -> None:
    """What [`source_folds`] promises."""
    several = np.isin(labels, [k for k in np.unique(labels) if len(set(sources[labels == k])) > 1])
    for source in np.unique(sources[several]):
        assert len(set(folds[several & (sources == source)])) == 1, f"{source} is in several folds"
    for k in np.unique(labels):
        members = labels == k
        assert members.sum() == 1 or len(set(folds[members])) > 1, f"all of class {k} are in one fold"
        if not several[members].any() and len(set(groups[members])) > 1:
            for group in np.unique(groups[members]):
                assert len(set(folds[members & (groups == group)])) == 1, f"{group} is in several folds"


def draw_sources(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, sources and groups; sources have several classes, and classes from one source to several."""
    num_labels, num_sources, count = rng.integers(2, 9), rng.integers(2, 12), rng.integers(10, 120)
    labels = rng.integers(0, num_labels, count)
    offered = [
        rng.choice(num_sources, rng.integers(1, min(4, num_sources) + 1), replace=False)
        for _ in range(num_labels)
    ]
    sources = np.array([f"s{rng.choice(offered[k])}" for k in labels])
    return labels, sources, rng.integers(0, 20, count)


@pytest.mark.parametrize("num_folds", [2, 5])
def test_whole_sources_are_together_and_no_class_is_in_one_fold(num_folds):
    rng, used = np.random.default_rng(0), []
    for seed in range(200):
        drawn = draw_sources(rng)
        folds = source_folds(*drawn, num_folds=num_folds, seed=seed)
        check_folds(*drawn, folds)
        used.append(folds.max() + 1)
    assert np.median(used) == num_folds, "a fold more is the exception"


def test_a_source_that_fits_in_no_fold_has_its_own():
    """Each of five classes has two sources: one of its own, which fills a fold, and a common one."""
    labels = np.repeat(np.arange(5), 11)
    sources = np.array([f"s{k}" if i < 10 else "common" for k in range(5) for i in range(11)])
    folds = source_folds(labels, sources, np.arange(55))
    check_folds(labels, sources, np.arange(55), folds)
    assert set(folds[sources == "common"]) == {5}


def test_a_class_of_one_source_is_split_by_group_or_else_by_image():
    labels = np.array([0] * 20 + [1] * 20 + [2] * 10)
    sources = np.array(["a", "b"] * 10 + ["a"] * 30)
    groups = np.array([0] * 20 + [1, 2, 3, 4] * 5 + [5] * 10)
    folds = source_folds(labels, sources, groups)
    check_folds(labels, sources, groups, folds)
    assert len(set(folds[labels == 1])) > 1
    assert len(set(folds[labels == 2])) > 1, "of one group, but they are ten images"


def test_folds_are_even_and_fixed_by_the_seed():
    rng = np.random.default_rng(0)
    labels, sources = rng.integers(0, 4, 600), rng.integers(0, 60, 600).astype(str)
    folds = source_folds(labels, sources, np.zeros(600, dtype=int))
    assert np.ptp(np.bincount(folds)) <= 10
    assert np.array_equal(folds, source_folds(labels, sources, np.zeros(600, dtype=int)))
    assert not np.array_equal(folds, source_folds(labels, sources, np.zeros(600, dtype=int), seed=1))


def test_every_class_but_the_one_spared_is_left_out_once():
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 6])
    assert sorted(np.concatenate(class_folds(labels, spared=2)).tolist()) == [0, 1, 3, 4, 5, 6]
    assert sorted(np.concatenate(class_folds(labels, spared=None)).tolist()) == list(range(7))
    assert [len(fold) for fold in class_folds(np.array([0, 1, 1]), spared=0)] == [1]


# --- settings -----------------------------------------------------------------------------------------------


def draw_samples(views: int = 1, seed: int = 0) -> tuple[Samples, np.ndarray]:
    """Two families of features of 90 images of three classes, and the images' sources."""
    rng = np.random.default_rng(seed)
    labels, sources = np.repeat(np.arange(3), 30), np.tile(np.repeat(np.arange(5), 6), 3)
    families = []
    for size, signal in ((12, 0.5), (30, 0.3)):
        centres, shifts = rng.normal(size=(3, size)) * signal, rng.normal(size=(3, 5, size)) * 0.5
        spread = rng.uniform(0.2, 1.5, size)
        draws = [
            centres[labels] + shifts[labels, sources] + rng.normal(size=(90, size)) * spread
            for _ in range(views)
        ]
        families.append(torch.from_numpy(np.concatenate(draws)).float())
    return Samples(families, torch.from_numpy(labels), num_labels=3, embedding_size=16), sources


def squared_distances(
    features: np.ndarray, labels: np.ndarray, fitted: np.ndarray, shrinkage: float
) -> np.ndarray:
    """Of held-out features to class means, seen along the discriminant's axes, by generalised eigenvalues."""
    means = np.array([features[fitted & (labels == k)].mean(axis=0) for k in range(3)])
    within = sum(np.cov(features[fitted & (labels == k)].T, bias=True) for k in range(3)) / 3
    within = (1 - shrinkage) * within + shrinkage * np.eye(len(within)) * within.trace() / len(within)
    axes = scipy.linalg.eigh(np.cov(means.T), within)[1][:, -2:]
    return np.square((features[~fitted][:, None] - means) @ axes).sum(axis=2)


def even_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy, classes weighed alike."""
    losses = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return np.mean([losses[labels == k].mean() for k in range(3)])


@pytest.mark.parametrize("seed", range(3))
def test_settings_are_those_of_a_search_through_a_grid(seed):
    samples, sources = draw_samples(seed=seed)
    labels, folds = samples.labels.numpy(), sources % 3
    folds[:4] = 2  # classes differ in how many images are held out
    splits = [(folds != fold, folds == fold) for fold in (0, 1)]
    settings = choose_settings(samples, splits)
    targets, grid = np.concatenate([labels[held_out] for _, held_out in splits]), np.geomspace(0.02, 2, 60)
    chosen = []
    for family, found in zip(samples.families, settings.shrinkages, strict=True):
        features = family.double().numpy()
        distances = [
            np.concatenate(
                [squared_distances_of(features, labels, fitted, held_out, s) for fitted, held_out in splits]
            )
            for s in SHRINKAGES
        ]
        losses = [min(even_loss(-d * scale**2 / 2, targets) for scale in grid) for d in distances]
        assert found == SHRINKAGES[int(np.argmin(losses))]
        chosen.append(distances[int(np.argmin(losses))])
    spreads = [(d - d.mean(axis=1, keepdims=True)).std() for d in chosen]
    factors = [scale**2 * spread for scale, spread in zip(settings.scales, spreads, strict=True)]
    assert factors[0] == pytest.approx(factors[1], rel=1e-4), "both count alike"
    joint = lambda factor: even_loss(-factor * (chosen[0] / spreads[0] + chosen[1] / spreads[1]) / 2, targets)  # noqa: E731
    assert settings.loss <= min(joint(factor) for factor in np.geomspace(1e-3, 50, 300)) + 1e-4
    assert settings.loss == pytest.approx(joint(factors[0]), abs=1e-4)


def test_a_family_that_does_not_know_a_class_counts_like_others():
    """Distances to a class without samples are infinite, and no part of a family's spread."""
    distances = torch.tensor([[1.0, 3.0, torch.inf], [5.0, 1.0, torch.inf]]).double()
    assert _spread(distances) == pytest.approx(np.std([-1, 1, 2, -2]))


def squared_distances_of(features, labels, fitted, held_out, shrinkage) -> np.ndarray:
    either = fitted | held_out
    return squared_distances(features[either], labels[either], fitted[either], shrinkage)


# --- nothing leaks ------------------------------------------------------------------------------------------

SETTINGS = Settings(shrinkages=(0.1, 0.2), scales=(0.5, 0.3), loss=0.0)


def network_config(score: str = "kde", **changes) -> ProtoLeakConfig:
    """Of three classes, one prototype each."""
    sizes = {"num_labels": 3, "embedding_size": 16, "num_prototypes": 1}
    return ProtoLeakConfig(**sizes | changes, open_set_scores={"embeddings": score})


def cross_fitted(samples: Samples, folds: np.ndarray, score: str = "kde", **changes):
    return cross_fit(samples, SETTINGS, folds, np.full(3, 5), network_config(score, **changes), real=0)


def altered(samples: Samples, images: np.ndarray, views: int, relabelled: bool) -> Samples:
    """The same, but some images (places) have other features in all views, or another label."""
    labels, families = samples.labels.clone(), [family.clone() for family in samples.families]
    if relabelled:
        labels[images] = (labels[images] + 1) % 3
    else:
        rows = np.concatenate([images + 90 * view for view in range(views)])
        for family in families:
            family[rows] = family[rows] * -3 + 5
    return Samples(families, labels, num_labels=3, embedding_size=16)


@pytest.mark.parametrize("relabelled", [False, True])
@pytest.mark.parametrize("score", sorted(OPEN_SET_SCORES))
def test_an_images_scores_owe_nothing_to_its_own_source(score, relabelled, monkeypatch):
    """But for the bandwidth, one number that all share."""
    monkeypatch.setattr(PooledDensity, "choose", lambda self, folds: {"bandwidth": 1.0})
    samples, sources = draw_samples(views=2)
    folds = source_folds(samples.labels.numpy(), sources, np.arange(90))
    before = cross_fitted(samples, folds, score)
    for image in (0, 17, 40, 89):
        own = np.flatnonzero((sources == sources[image]) & (np.arange(90) != image))
        after = cross_fitted(altered(samples, own, 2, relabelled), folds, score)
        torch.testing.assert_close(after.class_scores[image], before.class_scores[image])
        for features, scores in before.open_set_scores.items():
            torch.testing.assert_close(after.open_set_scores[features][image], scores[image])
        other = np.flatnonzero(folds != folds[image])[:10]  # but to those of other folds it does
        moved = cross_fitted(altered(samples, other, 2, relabelled), folds, score)
        assert not torch.allclose(moved.class_scores[image], before.class_scores[image], rtol=1e-3)
        assert moved.open_set_scores["embeddings"][image] != before.open_set_scores["embeddings"][image]


@pytest.mark.parametrize("score", ["kde", "l2_kde"])
def test_folds_and_detector_have_the_bandwidth_that_suits_unseen_sources(score):
    samples, sources = draw_samples()
    folds = source_folds(samples.labels.numpy(), sources, np.arange(90))
    found = cross_fitted(samples, folds, score)
    known = {"embeddings": torch.randn(90, 16), "gates": torch.ones(90, 16), "labels": samples.labels}
    detector = OpenSetDetector().fit(known, None, ["real", "a", "b"], {"embeddings": score}, found)
    assert detector.chosen_ == found.chosen
    (chosen,) = found.chosen["embeddings"].values()
    held_out = {}
    for factor in (0.8, 1, 1.25):  # candidates are a factor of 1.21 apart
        scores = []
        for fold in np.unique(folds):
            network = Start(samples, SETTINGS, folds != fold, network_config())
            families, labels = samples.known(folds != fold)
            fitted = OPEN_SET_SCORES[score](bandwidth=chosen * factor).fit(network.embed(families), labels)
            scores.append(fitted.score_samples(network.embed(samples.untouched(folds == fold))))
        held_out[factor] = np.concatenate(scores).sum()
    assert max(held_out, key=held_out.get) == 1
    assert held_out[1] == pytest.approx(found.open_set_scores["embeddings"].sum().item())


def test_the_scores_of_a_fold_are_those_of_a_model_without_it():
    samples, sources = draw_samples()
    folds = sources % 3
    found = cross_fitted(samples, folds)
    for fold in range(3):
        held_out, fitted = folds == fold, folds != fold
        distances = [
            squared_distances(family.double().numpy(), samples.labels.numpy(), fitted, shrinkage) * scale**2
            for family, shrinkage, scale in zip(
                samples.families, SETTINGS.shrinkages, SETTINGS.scales, strict=True
            )
        ]
        expected = -sum(distances) / 2
        np.testing.assert_allclose(found.class_scores[held_out], expected, atol=1e-3 * np.abs(expected).max())
    assert torch.equal(found.labels, samples.labels)
    assert found.num_sources.tolist() == [5, 5, 5]


@pytest.mark.parametrize("embedding_size", [10, 11])
def test_open_set_scores_are_those_of_embeddings_of_the_networks_size(embedding_size):
    """Also where the families can't share D evenly: unused dimensions count in a density."""
    parts = {"pooling": "texture", "embedding_size": embedding_size}
    model = tiny_model(**TEXTURE | parts | {"scales": [1]})
    torch.manual_seed(0)
    views = torch.randn(60, 1, sum(model.protoleak.encoder.parts.values())).abs()
    labels, fitted = torch.arange(60) % 3, np.arange(60) % 5 > 0
    samples = make_samples(model, [views], labels)
    folds, config = np.where(fitted, 0, 1), model.config
    config.open_set_scores = {"embeddings": "kde"}
    found = cross_fit(samples, SETTINGS, folds, np.full(3, 5), config, real=None)
    begin_as(model, samples, fitted, SETTINGS)
    with torch.no_grad():
        embeddings = model.protoleak(features=views[:, :, None].expand(-1, -1, 2, -1)).embeddings
    kde = OPEN_SET_SCORES["kde"](**found.chosen["embeddings"]).fit(embeddings[fitted], labels[fitted])
    expected = kde.score_samples(embeddings[~fitted])
    np.testing.assert_allclose(found.open_set_scores["embeddings"][~fitted], expected, rtol=1e-3)
    with torch.no_grad():
        logits = model(features=views[:, :, None].expand(-1, -1, 2, -1)).logits
    torch.testing.assert_close(found.class_scores[~fitted].float(), logits[~fitted], rtol=1e-3, atol=1e-2)


def test_strangers_are_scored_by_a_model_without_their_class():
    samples, sources = draw_samples()
    labels = samples.labels.numpy()
    found = cross_fitted(samples, sources % 3).strangers
    assert found.shape == (60, 3), "all images but those of class 0, which is no generator"
    left_out = found.isinf()
    assert (found[left_out] == -torch.inf).all()
    expected = torch.nn.functional.one_hot(torch.from_numpy(np.repeat([1, 2], 30)), 3).bool()
    assert torch.equal(left_out, expected)
    one = np.flatnonzero(labels == 1)
    moved = cross_fitted(altered(samples, one[1:], 1, relabelled=False), sources % 3).strangers
    torch.testing.assert_close(moved[0], found[0])
    assert not torch.allclose(moved[30:, :2], found[30:, :2], rtol=1e-3), "of these, class 1 was known"


# --- what is learned from -----------------------------------------------------------------------------------


def rows(pairs: list[tuple[str, str]], **columns) -> Dataset:
    labels, sources = zip(*pairs, strict=True)
    return Dataset.from_dict({"label": labels, "source": sources, "image": range(len(pairs)), **columns})


def test_validation_images_are_learned_from_where_a_class_has_several_sources():
    train = rows([("real", "a"), ("real", "b"), ("x", "a")], group=[0, 1, 2])
    validation = rows([("real", "c"), ("x", "a")], seen=[0, 1])
    splits = DatasetDict(train=train, validation=validation, test=validation, unknown=validation)
    joined = join_learned(splits)
    assert set(joined) == {"train", "test", "unknown"}
    assert joined["train"]["label"][:] == ["real", "real", "x", "real", "x"]
    assert joined["train"]["source"][:] == ["a", "b", "a", "c", "a"]
    assert set(joined["train"].column_names) == {"label", "source", "image"}, "what both have"
    assert count_sources(joined["train"]) == {"real": 3, "x": 1}


def test_validation_images_stay_apart_where_no_source_can_be_left_out():
    one = rows([("real", "a"), ("x", "b")])
    told = DatasetDict(train=one, validation=one, test=one)
    assert join_learned(told) is told
    untold = DatasetDict({name: part.remove_columns("source") for name, part in told.items()})
    assert join_learned(untold) is untold
