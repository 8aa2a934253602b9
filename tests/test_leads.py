"""What benchmarks/leads.py measures features of images by, and the features that are its own."""

import numpy as np
import pytest
import torch
from protoleak.training.cross_fitting import Samples

from .test_benchmark_scores import load_benchmark

leads = load_benchmark("leads")
left_out, statistics = leads.sys.modules["left_out"], leads.ps


@pytest.fixture
def samples():
    """Of classes 0 to 2 in three sources each, and of class 3, all of one source that is left out last."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4
    features = torch.randn(240, 12, generator=generator) + torch.randn(4, 12, generator=generator)[labels]
    folds = np.where(labels == 3, 2, torch.arange(240) // 4 % 3)
    return Samples([features, features[:, :5] ** 2], labels, 4, 4), folds


def test_whole_sources_are_left_out():
    sources = np.array(["dcsan/imagen", "Indyandie/dallecious", "jcraigk/blog", *"abcdefgh"] * 3)
    folds = leads.source_folds(sources)
    assert all(len(set(folds[sources == source])) == 1 for source in sources)
    assert folds[0] == folds[1] != folds[2]
    assert np.bincount(folds[3:11]).tolist() == [2, 2, 2, 2]


def test_classes_that_are_left_out_altogether_are_strangers(samples):
    labels, folds = samples[0].labels.numpy(), samples[1]
    *others, (fitted, known, strange) = left_out.parted(labels, folds)
    assert all(not strangers.any() for _, _, strangers in others)
    assert (strange == (labels == 3)).all()
    assert not (fitted & (known | strange)).any()
    assert (folds[known] == 2).all()


def test_scores_are_those_of_the_discriminants(samples):
    """Softmax of minus half the squared distances, of models without the images."""
    samples, folds = samples
    settings = left_out.choose(samples, folds)
    scores = left_out.by_discriminants(samples, folds, settings)
    for fold in range(3):
        found = samples.fit(folds != fold, [(s,) for s in settings.shrinkages])
        held_out = samples.untouched(folds == fold)
        distances = sum(
            d[0].squared_distances(x) * s**2 for d, x, s in zip(found, held_out, settings.scales, strict=True)
        )
        expected, got = (
            (-distances / 2).softmax(1),
            scores[torch.from_numpy(folds == fold)].double().softmax(1),
        )
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_class_is_never_told_by_its_own_source(samples):
    samples, folds = samples
    names = ["real", "a", "b", "c"]
    certain = (torch.eye(4)[samples.labels] - 1) * 1e4
    figures = left_out.measure(certain, samples.labels.numpy(), folds, names)
    assert figures == dict.fromkeys(("macro_auc", "accuracy", "real_auroc", "coverage"), 1.0) | {"auroc": 0.5}
    settings = left_out.choose(samples, folds)
    for score in (left_out.by_discriminants, left_out.by_subspaces):
        probabilities = score(samples, folds, settings).softmax(1)
        assert probabilities[samples.labels == 3, 3].max() == 0


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
