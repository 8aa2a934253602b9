"""The frozen VAE, and what is saved and loaded with the weights."""

import copy

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from protoleak import ProtoLeakForImageAttribution, ProtoLeakModel
from protoleak.checkpoint_protoleak import make_alphas_cumprod, make_scheduler
from protoleak.configuration_protoleak import BETA_SCHEDULES, FEATURES, OPEN_SET_SCORES
from protoleak.vae_protoleak import load_vae
from safetensors.torch import load_file, save_file

from . import ROOT
from .conftest import fit_random_detector, tiny_config, tiny_model, tiny_vae
from .test_modeling import latents

# --- the VAE ------------------------------------------------------------------------------------------------


def test_latents_are_the_scaled_and_shifted_mode(model):
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    model.attach_vae(vae)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = (vae.encode(pixels).latent_dist.mode() - 0.25) * 0.5
    (encoded,) = model.protoleak.encode(pixels)
    torch.testing.assert_close(encoded, expected)


@pytest.mark.parametrize(
    "vae",
    [
        lambda: AutoencoderTiny(
            latent_channels=4, encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3,
            num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3,
        ),
        lambda: AutoencoderDC(
            latent_channels=4, encoder_block_types=("ResBlock",) * 3, decoder_block_types=("ResBlock",) * 3,
            encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3,
            encoder_layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3,
            encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3,
        ),
    ],
)  # fmt: skip
def test_other_autoencoders_give_latents(model, vae):
    model.attach_vae(vae())
    (encoded,) = model.protoleak.encode(torch.zeros(1, 3, 32, 32))
    assert encoded.shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("channels", "settings"),
    [
        (4, {"scaling_factor": 0.18215}),  # Stable Diffusion 2.1
        (4, {"scaling_factor": 0.13025, "force_upcast": True}),  # SDXL
        (16, {"scaling_factor": 1.5305, "shift_factor": 0.0609}),  # Stable Diffusion 3
        (16, {"scaling_factor": 0.3611, "shift_factor": 0.1159}),  # FLUX.1
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vendors_autoencoders_in_every_precision(channels, settings, dtype, tmp_path):
    """One tiny AutoencoderKL with each vendor's channels, shift and scale, saved and loaded by its folder."""
    options = {"use_quant_conv": False, "use_post_quant_conv": False} if channels == 16 else {}
    tiny_vae(channels, **options, **settings).save_pretrained(tmp_path / "vae")
    model = tiny_model(latent_channels=channels, vae_name_or_path=str(tmp_path), vae_subfolder="vae")
    vae = load_vae(tmp_path / "nothing here", model.config)
    model.attach_vae(vae.to(dtype))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    output = model(pixels)
    assert output.logits.dtype == output.embeddings.dtype == torch.float32
    exact = vae.float().encode(pixels).latent_dist.mode()
    expected = (exact - settings.get("shift_factor", 0)) * settings["scaling_factor"]
    (found,) = model.protoleak.encode(pixels)
    torch.testing.assert_close(found, expected)
    vae.to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
    assert (model.protoleak.encode(pixels)[0] - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_vae_is_frozen_and_no_part_of_the_networks_weights(model):
    model.train()
    assert not model.vae.training
    assert not any(p.requires_grad for p in model.vae.parameters())
    assert model.vae is model.protoleak.vae
    own = {id(p) for p in model.vae.parameters()}
    assert not any(id(p) in own for p in model.parameters())
    assert {name.split(".")[0] for name in model.state_dict()} == {"protoleak", "head"}
    assert {name.split(".")[1] for name in model.state_dict() if name.startswith("protoleak.")} == {
        "encoder", "gate", "attention",
    }  # fmt: skip


def test_a_detector_is_not_taken_for_a_head_that_is_made_up(fitted_model, tmp_path):
    """Embeddings are the same, but p-values of classes are of its scores."""
    fitted_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.prototypes"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"fitted with head\.prototypes, which .* lacks"):
        ProtoLeakForImageAttribution.from_pretrained(tmp_path)
    (tmp_path / "density.pkl").unlink()
    assert ProtoLeakForImageAttribution.from_pretrained(tmp_path).detector is None


def test_weights_load_strictly_where_a_vae_is_held(fitted_model, tmp_path):
    fitted_model.save_pretrained(tmp_path)
    other = tiny_model()
    with torch.no_grad():
        other.head.prototypes.zero_()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other.head.prototypes, fitted_model.head.prototypes)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize(
    ("arguments", "options", "device", "dtype"),
    [
        ((torch.bfloat16,), {}, "cpu", torch.bfloat16),
        (("meta",), {}, "meta", torch.float32),
        (("meta", torch.float16), {}, "meta", torch.float16),
        ((), {"device": torch.device("meta"), "dtype": torch.float64}, "meta", torch.float64),
        ((torch.zeros(1, dtype=torch.float16),), {"non_blocking": True}, "cpu", torch.float16),
    ],
)
def test_a_device_moves_all_and_a_dtype_the_vae_alone(model, base, arguments, options, device, dtype):
    model = model.protoleak if base else model
    assert model.to(*arguments, **options) is model
    assert {p.device.type for p in (*model.parameters(), *model.vae.parameters())} == {device}
    assert {p.dtype for p in model.vae.parameters()} == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_way_of_moving_moves_the_vae(model):
    assert model.to_empty(device="meta").vae.device.type == "meta"
    copied = copy.deepcopy(tiny_model())
    assert copied.vae is not None
    assert copied.vae is copied.protoleak.vae
    with pytest.raises(TypeError, match="floating point"):
        copied.to(torch.int32)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 1000])
def test_the_noise_schedule_is_that_of_diffusers(schedule, steps):
    config = tiny_config(beta_schedule=schedule, num_train_timesteps=steps, timesteps=[0], beta_end=0.02)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(make_alphas_cumprod(config), make_scheduler(config).alphas_cumprod)
    finally:
        torch.set_default_dtype(torch.float32)


# --- saving -------------------------------------------------------------------------------------------------


def test_a_checkpoint_gives_the_same_scores(fitted_model, tmp_path):
    fitted_model.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert weights < 4 * 1.05 * fitted_model.num_parameters() + 20_000
    assert (tmp_path / "vae" / "config.json").exists()
    reloaded = ProtoLeakForImageAttribution.from_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    expected, found = fitted_model(pixels), reloaded(pixels)
    for name in ("logits", "embeddings", "open_set_score", "p_values"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        ProtoLeakModel.from_pretrained(tmp_path)(pixels).embeddings, expected.embeddings
    )
    own = tiny_vae()
    assert ProtoLeakForImageAttribution.from_pretrained(tmp_path, vae=own).vae is own


@pytest.mark.parametrize(
    "scores",
    [{features: name} for name in OPEN_SET_SCORES for features in FEATURES]
    + [{"embeddings": "l2_kde", "statistics": "l2_mahalanobis"}],
)
def test_the_open_set_scores_are_saved_with_the_checkpoint(scores, tmp_path):
    model = tiny_model(open_set_scores=scores)
    fit_random_detector(model)
    model.save_pretrained(tmp_path)
    output = model(latents=latents(3))
    reloaded = ProtoLeakForImageAttribution.from_pretrained(tmp_path)(latents=latents(3))
    for part in ("logits", "open_set_score", "p_values", "class_p_values"):
        torch.testing.assert_close(reloaded[part], output[part], atol=1e-6, rtol=1e-6)


def test_a_detector_of_other_weights_is_refused_and_not_saved(fitted_model, tmp_path, caplog):
    fitted_model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        fitted_model.protoleak.encoder.projections[0].weight += 0.1
    fitted_model.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / "density.pkl").exists()
    (tmp_path / "second" / "density.pkl").write_bytes((tmp_path / "first" / "density.pkl").read_bytes())
    with pytest.raises(ValueError, match="other weights"):
        ProtoLeakForImageAttribution.from_pretrained(tmp_path / "second")


def test_a_detector_of_other_labels_or_size_is_refused(fitted_model):
    detector = fitted_model.detector
    other = tiny_model(embedding_size=8)
    with pytest.raises(ValueError, match="size 16.*embedding_size is 8"):
        other.check_detector(detector)
    names = {0: "x", 1: "y", 2: "z"}
    with pytest.raises(ValueError, match="'real', 'a', 'b'.*'x', 'y', 'z'"):
        tiny_model(id2label=names, label2id={v: k for k, v in names.items()}).check_detector(detector)


def test_a_checkpoint_carries_the_code_of_the_root(fitted_model, tmp_path):
    fitted_model.save_pretrained(tmp_path)
    modules = {path.name: path.read_bytes() for path in ROOT.glob("*_protoleak.py")}
    assert len(modules) >= 10
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.py")} == modules


def test_a_missing_vae_is_explained(model, tmp_path):
    model.config.vae_name_or_path = str(tmp_path / "nowhere")
    model.save_pretrained(tmp_path)
    for file in (tmp_path / "vae").iterdir():
        file.unlink()
    with pytest.raises(OSError, match=r"(?s)nowhere.*vae=AutoencoderKL"):
        ProtoLeakForImageAttribution.from_pretrained(tmp_path)


def test_a_gated_vae_is_explained(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("403 Client Error: access to model vendor/gated is restricted")

    monkeypatch.setattr("diffusers.AutoModel.from_pretrained", refuse)
    config = tiny_config(vae_name_or_path="vendor/gated", vae_revision="v2")
    with pytest.raises(OSError, match=r"(?s)'vendor/gated'.*'v2'.*restricted.*vae=AutoencoderKL"):
        load_vae(tmp_path, config)


def test_a_random_detector_answers_finite_numbers(fitted_model):
    fit_random_detector(fitted_model, seed=3)
    assert torch.isfinite(fitted_model(latents=latents() * 100).open_set_score).all()


def test_known_classes_keep_their_prototypes(fitted_model):
    before = fitted_model.head.prototypes.detach().clone()
    fitted_model.set_labels(["new", "b", "real"])
    after = fitted_model.head.prototypes
    assert torch.equal(after[1], before[2])
    assert torch.equal(after[2], before[0])
    assert not torch.equal(after[0], before[1])
    assert fitted_model.config.id2label == {0: "new", 1: "b", 2: "real"}
    assert fitted_model.detector is None
    assert fitted_model(latents=latents()).logits.shape == (3, 3)


def test_an_enrolled_class_is_recognised(fitted_model, tmp_path):
    with torch.no_grad():
        near = fitted_model(latents=latents(8) * 0.1 + 3)
    fitted_model.enroll("new", near)
    output = fitted_model(latents=latents(4, seed=9) * 0.1 + 3)
    assert (output.logits.argmax(dim=1) == 3).all()
    assert (output.p_values > 0.05).all()
    fitted_model.save_pretrained(tmp_path)
    reloaded = ProtoLeakForImageAttribution.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(latents=latents()).logits, fitted_model(latents=latents()).logits)
    fitted_model.detector = None
    with pytest.raises(ValueError, match="no detector"):
        fitted_model.enroll("newer", near)
