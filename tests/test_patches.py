"""The autoencoder of pixels in patches."""

import pytest
import torch
from diffusers import AutoModel
from protoleak.checkpoint_protoleak import encode_with, in_patches, lays_out_pixels
from protoleak.training.patches import make_patch_autoencoder

from .conftest import TEXTURE, tiny_model


@pytest.fixture(params=[False, True], ids=["made", "reloaded"])
def vae(request, tmp_path):
    vae = make_patch_autoencoder()
    if request.param:
        vae.save_pretrained(tmp_path / "vae")
        vae = AutoModel.from_pretrained(str(tmp_path / "vae"))
    return vae


@pytest.fixture(params=["noise", "extremes", "one colour"])
def pixels(request) -> torch.Tensor:
    noise = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"noise": noise, "extremes": noise.sign(), "one colour": torch.full_like(noise, -0.3)}[
        request.param
    ]


@torch.no_grad()
def test_latents_are_the_pixels_of_patches(vae, pixels):
    encoded = vae.encode(pixels).latent
    assert torch.equal(encoded, torch.nn.functional.pixel_unshuffle(pixels, 2))
    assert (vae.decode(encoded).sample - pixels).abs().max() < 1e-4


def test_a_patch_is_seen_by_no_other(vae):
    """Gradients of a latent are of its own patch alone."""
    pixels = torch.zeros(1, 3, 8, 8, requires_grad=True)
    vae.encode(pixels).latent[0, :, 1, 2].sum().backward()
    expected = torch.zeros(8, 8)
    expected[2:4, 4:6] = 1
    assert torch.equal(pixels.grad[0], expected.expand(3, 8, 8))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_laid_out_without_convolutions_as_by_them(vae, pixels, dtype):
    vae = vae.to(dtype)
    assert lays_out_pixels(vae)
    assert torch.equal(in_patches(pixels.to(dtype)), encode_with(vae, pixels))


@torch.no_grad()
@pytest.mark.parametrize(
    "weight", ["conv_in.conv.weight", "conv_in.conv.bias", "conv_out.weight", "conv_out.bias"]
)
def test_a_vae_with_other_weights_is_asked(weight):
    """Any one of them, however little another: nothing but its own encoder tells its latents then."""
    model, pixels = tiny_model(**TEXTURE), torch.rand(1, 3, 16, 16)
    vae = make_patch_autoencoder()
    vae.encoder.get_parameter(weight).view(-1)[-1] += 1e-3
    assert not lays_out_pixels(vae)
    model.attach_vae(vae)
    (encoded,) = model.protoleak.encode(pixels)[:1]
    assert torch.equal(encoded, encode_with(vae, pixels))
    assert not torch.equal(encoded, in_patches(pixels))
