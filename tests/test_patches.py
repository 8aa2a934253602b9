"""The autoencoder of pixels in patches."""

import pytest
import torch
from diffusers import AutoModel
from protoleak.training.patches import make_patch_autoencoder


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
