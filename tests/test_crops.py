"""Crops of an image: which timesteps each is looked at in, and what they say together."""

import pytest
import torch
from protoleak.crops_protoleak import join_crops, looked_at
from protoleak.encoder_protoleak import LeakEncoder

from .conftest import TEXTURE, tiny_model
from .test_modeling import NINE, picture, texture_model


def test_few_crops_are_looked_at_in_every_timestep():
    weights = torch.tensor([[0.5, 0.0, 0.25, 0.25], [1, 0, 0, 0]])
    expected = (weights > 0)[..., None].expand(2, 4, 2)
    assert torch.equal(looked_at(weights, 2, in_turn=True), expected)


def test_many_take_timesteps_in_turn_those_without_evidence_passed_over():
    weights = torch.tensor([[0.2, 0, 0.2, 0.2, 0.2, 0.2]])
    looked = looked_at(weights, 2, in_turn=True)[0].int().tolist()
    assert looked == [[1, 0], [0, 0], [0, 1], [1, 0], [0, 1], [1, 0]]
    assert looked_at(weights, 2, in_turn=False)[0].int().tolist() == [[int(w > 0)] * 2 for w in weights[0]]


def test_each_timestep_is_the_mean_of_its_own_crops_and_a_crop_is_filled_by_what_sets_it_apart():
    features = torch.arange(4.0).view(1, 4, 1, 1, 1) + torch.tensor([0, 10.0]).view(1, 1, 1, 2, 1)
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    looked = looked_at(weights, 2, in_turn=True)
    seen = features * looked[:, :, None, :, None]
    mean, crops = join_crops(seen, weights, looked)
    means = [(0.1 * 0 + 0.3 * 2) / 0.4, (0.2 * 1 + 0.4 * 3) / 0.6 + 10]
    assert mean.flatten().tolist() == pytest.approx(means)
    apart = [0 - means[0], 11 - means[1], 2 - means[0], 13 - means[1]]
    expected = [[means[0] + a, means[1] + a] for a in apart]
    torch.testing.assert_close(crops.flatten(2)[0], torch.tensor(expected))


def test_where_all_was_looked_at_nothing_is_filled():
    features, weights = torch.randn(2, 3, 2, 2, 5), torch.tensor([[0.5, 0.5, 0], [1, 0, 0]])
    features = features * (weights > 0)[..., None, None, None]
    mean, crops = join_crops(features, weights, looked_at(weights, 2, in_turn=True))
    torch.testing.assert_close(mean, torch.einsum("bv,bvstp->bstp", weights, features))
    assert crops is features


@torch.no_grad()
def test_a_texture_model_looks_at_half_as_much_of_many_crops():
    model = tiny_model(**TEXTURE).protoleak
    noise = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise[1, 2:] = 0  # an image of two crops
    output = model(noise)
    alone = model(noise.flatten(0, 1)).features.unflatten(0, (2, 4))
    expected = torch.stack([alone[0, ::2, :, 0].mean(dim=0), alone[0, 1::2, :, 1].mean(dim=0)], dim=1)
    weights = output.crop_weights[0]
    assert weights.tolist() == pytest.approx([0.25] * 4, rel=0.1)
    torch.testing.assert_close(output.features[0], expected, atol=0.02, rtol=0.02)
    few = (output.crop_weights[1, :2, None, None, None] * alone[1, :2]).sum(dim=0)
    torch.testing.assert_close(output.features[1], few)
    for crop, timestep in ((0, 0), (1, 1), (2, 0), (3, 1)):
        torch.testing.assert_close(output.crop_features[0, crop, :, timestep], alone[0, crop, :, timestep])


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_crop_whose_latents_are_not_finite_is_not_passed_over(value):
    model = tiny_model(**TEXTURE).protoleak
    noise = torch.rand(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode(noise)
    latents[0][0, 1, 3, 5, 5] = value
    with pytest.raises(ValueError, match=r"NaN or infinite.*bfloat16"):
        model(latents=latents)


def test_flat_crops_are_not_looked_at(monkeypatch):
    model, image = texture_model(), picture()
    image[:, :64] = 7
    pool, counts = LeakEncoder.pool, []

    def counted(encoder, latents):
        counts.append(len(latents))
        return pool(encoder, latents)

    monkeypatch.setattr(LeakEncoder, "pool", counted)
    output = model(NINE([image, picture(side=32)])["pixel_values"])
    assert sum(counts) == 2 * 2 * (3 + 1), "at two scales and timesteps: of 9 and 9 crops three and one"
    torch.testing.assert_close(output.crop_weights[0], torch.tensor([0, 0, 1 / 3] * 3))
