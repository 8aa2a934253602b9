"""Cached latents: keyed by what they depend on, read row by row, whole or not there."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from protoleak import ProtoLeakImageProcessor
from protoleak.evaluation.splits import load_splits
from protoleak.training.features import pool_features
from protoleak.training.latents import LatentCache, View
from protoleak.training.views import RandomView, ViewsInTurn, training_views

from .conftest import TEXTURE, draw, tiny_model


@pytest.fixture
def encoder(processor, tmp_path) -> LatentCache:
    encoder = LatentCache(tiny_model(), processor, Accelerator())
    encoder.folder = tmp_path / "latents"
    return encoder


@pytest.fixture
def rows(folder):
    return load_splits(str(folder))["train"]


def stacked(dataset) -> torch.Tensor:
    return torch.stack([latents for latents, _ in dataset])


def test_latents_are_cached_by_content_processor_and_vae(encoder, rows, monkeypatch):
    first = stacked(encoder.encode(rows))
    pixels = encoder.processor([rows[5]["image"]["path"]])["pixel_values"]
    (direct,) = encoder.model.protoleak.encode(pixels)
    torch.testing.assert_close(first[5:6].float(), direct, atol=2e-3, rtol=1e-3)  # on disk in float16
    key = encoder.content_key(rows)
    monkeypatch.setattr(encoder.model.protoleak, "encode", None)  # encoding again would fail
    assert torch.equal(stacked(encoder.encode(rows)), first)
    monkeypatch.undo()
    other = LatentCache(encoder.model, ProtoLeakImageProcessor(crop_size=40), encoder.accelerator)
    assert other.content_key(rows) != key
    with torch.no_grad():
        next(encoder.model.vae.parameters()).add_(1)
    assert encoder.content_key(rows) != key
    encoder.model = tiny_model()
    assert encoder.content_key(rows) == key
    draw("c", np.random.default_rng(5)).save(rows[0]["image"]["path"])
    assert encoder.content_key(rows) != key


def test_labels_are_those_of_the_model(encoder, rows):
    assert encoder.encode(rows).labels.tolist() == [["real", "a", "b"].index(name) for name in rows["label"]]
    encoder.model.set_labels(["real", "b"])
    assert set(encoder.encode(rows).labels.tolist()) == {0, 1, -1}


def test_views_turn_mirror_and_process_the_pixels(encoder, rows):
    views = [View(), View(1), View(2), View(5), View(operator="jpeg", strength=50.0)]
    encoded = encoder.encode_views(rows.select([3]), views)
    pixels = encoder.processor([rows[3]["image"]["path"]])["pixel_values"]
    expected = {View(1): pixels.flip(-1), View(2): pixels.rot90(1, (-2, -1))}
    expected[View(5)] = pixels.rot90(2, (-2, -1)).flip(-1)
    for view, turned in expected.items():
        (direct,) = encoder.model.protoleak.encode(turned)[0]
        torch.testing.assert_close(encoded[view][0][0].float(), direct, atol=2e-3, rtol=1e-3)
    assert len({tuple(stacked(part).flatten().tolist()) for part in encoded.values()}) == len(views)


def test_files_of_few_rows_hold_what_one_file_holds(encoder, rows, tmp_path):
    whole = encoder.encode(rows)
    encoder.shard_size, encoder.folder = 7, tmp_path / "shards"
    shards = encoder.encode(rows)
    assert (len(whole.files), len(shards.files)) == (1, 7)  # 48 images
    assert torch.equal(stacked(shards), stacked(whole))
    assert torch.equal(shards[-1][0], stacked(whole)[-1])
    with pytest.raises(IndexError):
        shards[48]


def test_a_run_that_is_stopped_leaves_no_half_file(encoder, rows, monkeypatch):
    encoder.shard_size = 20
    encode, calls = LatentCache._encode_batch, []

    def stop_in_the_second_file(cache, images, view):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(cache, images, view)

    monkeypatch.setattr(LatentCache, "_encode_batch", stop_in_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(rows)
    assert len(list(encoder.folder.iterdir())) == 1, "the first 20 images are whole"
    assert len(encoder.encode(rows)) == 48
    assert sum(calls) == 20 + 16 + 4 + 20 + 8, "those that were whole are not encoded again"


def test_a_file_of_another_size_is_written_again(encoder, rows):
    encoded = encoder.encode(rows)
    first = stacked(encoded)
    encoded.files[0].write_bytes(b"cut off")
    assert torch.equal(stacked(encoder.encode(rows)), first)


def test_crops_are_drawn_in_training(encoder, rows):
    encoder.processor = ProtoLeakImageProcessor(crop_size=16, do_resize=False, num_crops=4)
    encoded = encoder.encode(rows)
    assert encoder.shape == encoded[0][0].shape == (4, 4, 4, 4)
    drawn = [RandomView([encoded])[2][0] for _ in range(50)]
    places = {next(i for i, crop in enumerate(encoded[2][0]) if torch.equal(crop, d)) for d in drawn}
    assert places == {0, 1, 2, 3}


def test_views_are_drawn_in_training_and_taken_in_turn_by_the_detector(encoder, rows):
    views = encoder.encode_views(rows, training_views(orientations=2, augmented_views=2))
    assert [view.operator for view in views] == [None, None, "step1", "step2"]
    parts = list(views.values())
    torch.manual_seed(0)
    drawn = [RandomView(parts)[2][0] for _ in range(60)]
    counts = [sum(torch.equal(d, part[2][0]) for d in drawn) for part in parts]
    assert min(counts) >= 5
    assert sum(counts) == 60
    turn = ViewsInTurn(parts[2:])
    assert [torch.equal(turn[i][0], parts[2 + i % 2][i][0]) for i in range(48)] == [True] * 48


# --- of a network that takes features -----------------------------------------------------------------------


@pytest.fixture
def pooler(tmp_path) -> LatentCache:
    """Of a network as training begins with it: in training, and of several crops an image."""
    processor = ProtoLeakImageProcessor(crop_size=16, do_resize=False, num_crops=9)
    encoder = LatentCache(tiny_model(**TEXTURE).train(), processor, Accelerator())
    encoder.folder = tmp_path / "features"
    return encoder


def test_features_are_cached_as_a_verdict_pools_them(pooler, rows):
    """With the noise of evaluation, though the network is in training, and filled-up crops passed over."""
    cached = pooler.encode(rows.select(range(5)))
    assert pooler.model.training
    pixels = pooler.processor([row["image"]["path"] for row in rows.select(range(5))])["pixel_values"]
    direct = pooler.model.eval()(pixels).features
    assert cached.shape == direct.shape[1:]
    torch.testing.assert_close(stacked(cached).float(), direct, atol=5e-3, rtol=2e-3)
    other = pooler.model.protoleak
    other.set_noise_seed(1)
    assert (pooler.model(pixels).features - direct).abs().max() > 0.02, "other noise would have shown"


def test_features_are_cached_by_all_that_they_are_made_with(pooler, rows):
    model = pooler.model
    keys = {pooler.content_key(rows)}
    changes = {"noise_seed": 1, "timesteps": [0, 30], "scales": [1], "sigma_normalization": True}
    changes |= {"contrast_normalization": True, "patch_size": 1, "beta_end": 0.02}
    for name, value in changes.items():
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        keys.add(pooler.content_key(rows))
        setattr(model.config, name, before)
    assert pooler.content_key(rows) in keys
    for module in (model.protoleak.whitening, model.protoleak.encoder.plane):
        for buffer in module.buffers():
            buffer += 0.1
            keys.add(pooler.content_key(rows))
    assert len(keys) == 1 + len(changes) + 4
    with torch.no_grad():
        model.head.prototypes += 1
        model.protoleak.encoder.projections[0].weight += 1
    assert pooler.content_key(rows) in keys, "what is learned comes after"


def test_crops_that_fill_up_are_neither_drawn_nor_pooled(encoder, tmp_path):
    """Whatever the VAE's padding makes of them."""
    rng = np.random.default_rng(0)
    for label, side in (("real", 16), ("a", 40)):
        target = tmp_path / "two/Closed_Set" / label
        target.mkdir(parents=True)
        for i in range(10):
            noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(noise).save(target / f"{i}.png")
    rows = load_splits(str(tmp_path / "two"))["train"]
    encoder.processor = ProtoLeakImageProcessor(crop_size=16, do_resize=False, num_crops=9)
    encoded = encoder.encode(rows)
    small = [i for i, name in enumerate(rows["label"]) if name == "real"]
    drawn = [RandomView([encoded])[small[0]][0] for _ in range(40)]
    assert all(torch.equal(crop, encoded[small[0]][0][0]) for crop in drawn)
    pooled, labels = pool_features(encoder.model.eval(), encoded, average_crops=False)
    counts = [1 if name == "real" else 9 for name in rows["label"]]
    assert len(pooled) == sum(counts)
    assert labels.tolist() == np.repeat(encoded.labels.numpy(), counts).tolist()
