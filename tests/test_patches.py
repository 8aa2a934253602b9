"""The autoencoder of pixels in patches."""

import contextlib
import copy
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError

import pytest
import torch
from diffusers import AutoencoderDC, AutoModel
from protoleak import ProtoLeakConfig, ProtoLeakForImageAttribution
from protoleak.training.patches import make_patch_autoencoder
from protoleak.vae_protoleak import (
    VAE_WEIGHTS,
    PixelLayout,
    encode_with,
    in_patches,
    lays_out_pixels,
    load_vae,
)
from safetensors.torch import load_file, save_file

from .conftest import TEXTURE, fit_random_detector, tiny_model


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


# --- what stands for it -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with a detector, whose autoencoder lays out pixels."""
    model = tiny_model(**TEXTURE)
    fit_random_detector(model)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_verdict_needs_no_diffusers(saved, monkeypatch):
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    model = ProtoLeakForImageAttribution.from_pretrained(saved)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "diffusers", None)  # to import it is an error
        model = ProtoLeakForImageAttribution.from_pretrained(saved)
        laid_out = model.to(dtype=torch.bfloat16)(pixels)
        moved = copy.deepcopy(model).to("meta")
        with pytest.raises(ImportError):
            model.vae  # noqa: B018
    assert isinstance(model.vae, AutoencoderDC)
    assert (model.vae.dtype, moved.vae.device.type) == (torch.bfloat16, "meta")
    assert not model.vae.training
    assert not any(p.requires_grad for p in model.vae.parameters())
    encoded = model(pixels)
    for name in ("logits", "embeddings", "p_values"):
        assert torch.equal(laid_out[name], encoded[name])


def test_the_autoencoder_itself_is_what_was_saved_also_where_its_files_are_gone(saved, tmp_path):
    expected = {file.name: file.read_bytes() for file in (saved / "vae").iterdir()}
    original = AutoModel.from_pretrained(str(saved / "vae"))
    model = ProtoLeakForImageAttribution.from_pretrained(saved)
    shutil.rmtree(saved)
    generator = torch.random.get_rng_state()
    assert {k: v for k, v in model.vae.config.items() if k != "_name_or_path"} == {
        k: v for k, v in original.config.items() if k != "_name_or_path"
    }
    assert torch.equal(generator, torch.random.get_rng_state())
    for name, weight in original.state_dict().items():
        assert torch.equal(model.vae.state_dict()[name], weight)
    model.save_pretrained(tmp_path / "again")
    assert {file.name: file.read_bytes() for file in (tmp_path / "again" / "vae").iterdir()} == expected


def test_an_autoencoder_without_a_decoder_is_told_when_it_is_wanted(saved):
    weights = load_file(saved / "vae" / VAE_WEIGHTS)
    save_file({k: v for k, v in weights.items() if k.startswith("encoder.")}, saved / "vae" / VAE_WEIGHTS)
    model = ProtoLeakForImageAttribution.from_pretrained(saved)
    assert model(torch.rand(1, 3, 32, 32)).p_values is not None
    with pytest.raises(OSError, match=r"(?s)checkpoint.vae is not whole: .*decoder"):
        model.vae  # noqa: B018


@pytest.mark.parametrize("change", ["weights", "scaling_factor", "shift_factor", "shortcut"])
def test_any_other_autoencoder_is_loaded_at_once(saved, change):
    vae = make_patch_autoencoder()
    if change == "weights":
        vae.encoder.conv_in.conv.weight.data[0, 1] += 1e-3
    vae.save_pretrained(saved / "vae")
    changes = {"scaling_factor": {"scaling_factor": 0.5}, "shift_factor": {"shift_factor": 0.1}}
    changes["shortcut"] = {"encoder_out_shortcut": False}
    config = json.loads((saved / "vae" / "config.json").read_text()) | changes.get(change, {})
    (saved / "vae" / "config.json").write_text(json.dumps(config))
    held = load_vae(saved, ProtoLeakConfig.from_pretrained(saved))
    assert isinstance(held, AutoencoderDC)


@pytest.mark.parametrize("name", ["config.json", VAE_WEIGHTS])
def test_damaged_files_are_told_at_once(saved, name):
    file = saved / "vae" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"(?s)checkpoint.*vae=AutoencoderKL"):
        ProtoLeakForImageAttribution.from_pretrained(saved)


@pytest.mark.parametrize("content", ["[]", "null", '{"encoder_out_shortcut": true, "scaling_factor": 1}'])
def test_a_config_that_is_none_is_told_at_once(saved, content):
    content = content.replace("{", '{"_class_name": "AutoencoderDC", ')
    (saved / "vae" / "config.json").write_text(content)
    with pytest.raises(OSError, match=r"(?s)checkpoint.*vae=AutoencoderKL"):
        ProtoLeakForImageAttribution.from_pretrained(saved)


def test_threads_that_ask_for_the_autoencoder_get_the_same(saved, monkeypatch):
    model, all_here = ProtoLeakForImageAttribution.from_pretrained(saved), Barrier(2)
    load = PixelLayout.load

    def slow(layout: PixelLayout) -> AutoencoderDC:
        with contextlib.suppress(BrokenBarrierError):  # the other can't come before this is done
            all_here.wait(0.2)
        return load(layout)

    monkeypatch.setattr(PixelLayout, "load", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: model.vae, range(2))
    assert first is second is model.held_vae
