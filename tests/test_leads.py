"""What benchmarks/leads.py measures features of images by, and the features that are its own."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from .test_benchmark_scores import load_benchmark

leads = load_benchmark("leads")
left_out, across, statistics = leads.sys.modules["left_out"], leads.across, leads.ps


@pytest.fixture
def samples():
    """Of classes 0 to 2 in three sources each, and of class 3, all of one source that is left out last."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4
    features = torch.randn(240, 12, generator=generator) + torch.randn(4, 12, generator=generator)[labels]
    folds = torch.where(labels == 3, 2, torch.arange(240) // 4 % 3)
    groups = labels * 3 + folds
    trials = left_out.in_folds(labels.numpy(), folds.numpy())
    return across.Grouped([features, features[:, :5] ** 2], labels, 4, 4, groups), trials


@pytest.fixture
def settings(samples):
    return left_out.choose(*samples)


def test_whole_sources_are_left_out():
    sources = np.array(["dcsan/imagen", "Indyandie/dallecious", "jcraigk/blog", *"abcdefgh"] * 3)
    folds = leads.source_folds(sources)
    assert all(len(set(folds[sources == source])) == 1 for source in sources)
    assert folds[0] == folds[1] != folds[2]
    assert np.bincount(folds[3:11]).tolist() == [2, 2, 2, 2]


def test_classes_that_are_left_out_altogether_are_strangers(samples):
    labels, (*others, last) = samples[0].labels.numpy(), samples[1]
    assert all(not trial.strange.any() for trial in others)
    assert (last.strange == (labels == 3)).all()
    assert not (last.fitted & last.asked).any()
    assert (samples[0].groups.numpy()[last.known] % 3 == 2).all()


def test_one_source_of_each_class_is_learned_from(samples):
    labels, groups = samples[0].labels.numpy(), samples[0].groups.numpy()
    trials = left_out.from_one_source(labels, groups, varied=0, draws=3)
    for trial in trials:
        learned = [len(set(groups[trial.fitted & (labels == k)])) for k in range(4)]
        assert learned == [1, 1, 1, 1]
        assert (trial.known == ~trial.fitted).all()
        assert not trial.strange.any()
    assert len({tuple(set(groups[trial.fitted & (labels == 1)])) for trial in trials}) == 3


def test_scores_are_those_of_the_discriminants(samples, settings):
    """Softmax of minus half the squared distances, of models without the images."""
    samples, trials = samples
    learned_on = left_out.by_gradient(samples, trials, settings, epochs=0, learning_rate=0.0)
    unchanged = [
        left_out.by_discriminants(samples, trials, settings),
        learned_on,
        across.by_robust_loss(samples, trials, settings, penalty=None, steps=0),
        across.by_contrast(samples, trials, settings, steps=0),
        across.by_source_scatter(samples, trials, settings, weight=1),
        left_out.by_prototypes(samples, trials, settings, count=1),
    ]
    for place, trial in enumerate(trials):
        found = samples.fit(trial.fitted, [(s,) for s in settings.shrinkages])
        held_out = samples.untouched(trial.asked)
        distances = sum(
            d[0].squared_distances(x) * s**2 for d, x, s in zip(found, held_out, settings.scales, strict=True)
        )
        for scores in unchanged:
            torch.testing.assert_close(
                scores[place].softmax(1), (-distances / 2).softmax(1), atol=1e-4, rtol=0
            )


def test_a_class_is_never_told_by_its_own_source(samples, settings):
    samples, trials = samples
    names, labels = ["real", "a", "b", "c"], samples.labels
    certain = [(torch.eye(4)[labels[torch.from_numpy(trial.asked)]] - 1) * 1e4 for trial in trials]
    figures = left_out.measure(certain, labels.numpy(), trials, names)
    assert figures == dict.fromkeys(("macro_auc", "accuracy", "real_auroc", "coverage"), 1.0) | {"auroc": 0.5}
    twice = replace(samples, families=[torch.cat([x, x + 0.1]) for x in samples.families])
    for of, score in (
        (samples, left_out.by_subspaces),
        (samples, partial(left_out.by_prototypes, count=2)),
        (samples, partial(left_out.by_prototypes, count=2, seed=0)),
        (samples, partial(across.by_subclasses, softness=1)),
        (samples, partial(across.by_contrast, steps=2)),
        (samples, partial(across.by_robust_loss, penalty=1.0, steps=2)),
        (twice, partial(across.by_equalising, weight=1)),
    ):
        *_, last = score(of, trials, settings)
        assert last.softmax(1)[:, 3].max() < 1e-6
        figures = left_out.measure(score(of, trials, settings), labels.numpy(), trials, names)
        assert figures["macro_auc"] > 0.8


def test_what_post_processing_changes_tells_little(samples, settings):
    """A feature that it changes moves the scores of the images asked about the less, the more that counts."""
    samples, trials = samples
    settings = replace(settings, scales=(1.0, 1.0))
    changed = [torch.cat([x, x]) for x in samples.families]
    changed[0][240:, 0] += 3
    moved = [x.clone() for x in changed]
    moved[0][:240, 0] += ~torch.from_numpy(trials[0].fitted) * 1.0
    moves = []
    for weight in (0, 1, 5):
        before, after = (
            across.by_equalising(replace(samples, families=x), trials[:1], settings, weight=weight)[0]
            for x in (changed, moved)
        )
        moves.append((after - before).log_softmax(1).std())
    assert moves[0] > 2 * moves[1] > 2 * moves[2]


def test_what_looks_like_a_reconstruction_is_less_likely_a_photograph(samples, settings):
    samples, trials = samples
    places = np.flatnonzero(samples.labels.numpy() == 0)
    decoded = [x[places] for x in samples.families]
    decoded[0][:, 0] -= 3
    samples.families[0][places] = decoded[0]  # those that are asked about look like it, and all others too
    without = left_out.by_discriminants(samples, trials, settings)
    found = across.with_reconstructions(samples, trials, settings, places, decoded)
    for trial, of_trial, before in zip(trials, found, without, strict=True):
        real = torch.from_numpy(samples.labels.numpy()[trial.asked] == 0)
        torch.testing.assert_close(of_trial.exp().sum(dim=1), torch.ones(len(of_trial)).double())
        assert of_trial.exp()[real, 0].mean() < 0.6 * before.softmax(1)[real, 0].mean()


def test_positives_are_of_other_sources():
    """Those of the own source count only where a class has no other."""
    embeddings = torch.tensor([[1.0, 0], [1, 0], [0, 1], [-1, 0]])
    labels, groups = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 2])
    apart = across.contrast_loss(embeddings, labels, groups)
    together = across.contrast_loss(embeddings, labels, torch.tensor([0, 1, 1, 2]))
    assert together < apart


def test_images_that_moved_far_are_less_familiar(samples, settings):
    samples, (trial, *_) = samples
    far = replace(samples, families=[x.clone() for x in samples.families])
    far.families[0][torch.from_numpy(trial.asked)] += 100
    near, away = (
        across.familiarity(x, trial, settings, left_out.by_discriminants(x, [trial], settings)[0])
        for x in (samples, far)
    )
    for name in ("distance to the fifth neighbour", "kernel density", "distance to the nearest mean"):
        assert away[name].max() < near[name].min()


@pytest.mark.parametrize("name", ["harmonics", "cyclic_statistics"])
def test_a_grid_of_the_period_shows(name):
    """Most in the frequencies of a grid of 16 pixels, whatever lies below it."""
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    grid = pixels.clone()
    grid[..., ::16, :] += 0.5
    describe = getattr(statistics, name)
    change = (describe(grid) - describe(pixels)).abs()
    assert change.max() > 1.5
    assert change.median() < 0.5


def test_triplets_tell_whether_colours_change_together():
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    grey = noise[:, :1].expand_as(noise)
    shares = statistics.of_triplets(torch.cat([noise, grey]), step=4).square()
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    assert (shares[2:] > 0).sum(1).max() <= 5
    assert (shares[:2] > 0).sum(1).min() > 100
