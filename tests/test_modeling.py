import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor, ProtoLeakModel
from protoleak.modeling_protoleak import PrototypeHead, forward_diffusion
from protoleak.statistics_protoleak import evidence
from safetensors.torch import load_file, save_file

from .conftest import TEXTURE, fit_random_detector, tiny_config, tiny_model, tiny_vae


def latents(count: int = 3, channels: int = 4, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


# --- forward diffusion --------------------------------------------------------------------------------------


def test_forward_diffusion_is_the_schedulers():
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    clean, times = latents(5), torch.tensor([0, 100, 999])
    noise = torch.randn(3, 4, 8, 8)
    noisy = forward_diffusion(clean, noise, scheduler.alphas_cumprod[times])
    for t, time in enumerate(times):
        expected = scheduler.add_noise(clean, noise[t].expand_as(clean), time.expand(5))
        torch.testing.assert_close(noisy[:, t], expected)


def test_the_schedule_is_stable_diffusions(model):
    assert float(tiny_model(timesteps=[999]).protoleak.alphas_cumprod().sqrt()) == pytest.approx(
        0.0683, abs=1e-4
    )


def test_sigma_normalization_divides_by_sigma():
    clean, noise, abar = latents(2), torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.2])
    plain, normal = (forward_diffusion(clean, noise, abar, flag) for flag in (False, True))
    torch.testing.assert_close(normal, plain / (1 - abar).sqrt().view(1, 2, 1, 1, 1))


# --- the network --------------------------------------------------------------------------------------------


def test_prototype_scores_are_the_formula():
    head = PrototypeHead(tiny_config())
    torch.nn.init.normal_(head.prototypes)
    embeddings, gates = torch.randn(5, 16), torch.rand(5, 16)
    distances = (gates[:, None, None] * (embeddings[:, None, None] - head.prototypes).square()).sum(
        -1
    )  # (B, K, M)
    torch.testing.assert_close(head.distances(embeddings, gates), distances, atol=1e-4, rtol=1e-4)
    tau = head.temperature
    assert 0.5 < tau.item() < 5
    expected = tau * torch.logsumexp(-distances / tau, dim=2)
    torch.testing.assert_close(head(embeddings, gates), expected, atol=1e-4, rtol=1e-4)


def test_outputs_have_their_shapes_and_ranges(fitted_model):
    output = fitted_model(latents=latents(), labels=torch.tensor([0, 1, 2]), output_noisy_latents=True)
    assert output.loss.ndim == 0
    assert output.logits.shape == (3, 3)
    assert output.embeddings.shape == output.gates.shape == (3, 16)
    assert output.noisy_latents.shape == (3, 3, 4, 8, 8)
    assert torch.all((output.gates > 0) & (output.gates < 1))
    torch.testing.assert_close(output.temporal_weights.sum(dim=1), torch.ones(3))
    assert torch.all((output.p_values > 0) & (output.p_values <= 1))
    as_tuple = fitted_model(latents=latents(), return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)


def test_all_but_the_verdict_is_torch(fitted_model):
    """As one exported graph, whose gradients come through: nothing leaves torch before the boundary."""

    class Classified(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = fitted_model

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.model.classify(latents=z).logits

    z = latents().requires_grad_()
    fitted_model(latents=z)  # draws the noise, which the graph then holds
    graph = torch.export.export(Classified(), (z,)).module()
    torch.testing.assert_close(graph(z), fitted_model(latents=z).logits)
    (gradient,) = torch.autograd.grad(fitted_model.classify(latents=z).logits.sum(), z)
    assert gradient.abs().sum() > 0


def test_logits_are_divided_by_the_temperature_in_evaluation_alone(fitted_model):
    fitted_model.detector.temperature_ = 2.0
    output = fitted_model(latents=latents(), labels=torch.tensor([0, 1, 2]))
    scores = fitted_model.head(output.embeddings, output.gates)
    torch.testing.assert_close(output.logits, scores / 2)
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(output.loss, expected + fitted_model._attention_loss(output.temporal_weights))
    assert fitted_model.train()(latents=latents()).p_values is None


def test_attention_loss_is_zero_for_even_and_log_t_for_one_timestep(model):
    even, one = torch.full((2, 3), 1 / 3), torch.eye(3)
    assert float(model._attention_loss(even)) == pytest.approx(0, abs=1e-6)
    assert float(model._attention_loss(one)) == pytest.approx(0.1 * np.log(3))


def test_time_dropout_drops_whole_timesteps_but_never_all():
    attention = tiny_model(time_dropout=0.9).protoleak.attention.train()
    weights = attention(torch.randn(200, 3, 16))
    assert (weights == 0).any()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(200))


# --- several crops ------------------------------------------------------------------------------------------

NINE = ProtoLeakImageProcessor(crop_size=32, do_resize=False, num_crops=9)


def texture_model() -> ProtoLeakForImageAttribution:
    """Of the root's kind: it sees pixels as they are."""
    return begun(tiny_model(**TEXTURE))


def statistics_model() -> ProtoLeakForImageAttribution:
    """Of LeakZoo's kind: its VAE pads, so that the latents of one colour are not flat."""
    return begun(tiny_model(pooling="statistics", latent_whitening=True))


@torch.no_grad()
def begun(model: ProtoLeakForImageAttribution) -> ProtoLeakForImageAttribution:
    """With features in units of their deviation, and a detector."""
    noise = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    model.protoleak.fit_whitening([model.protoleak.encode(noise)[0]])
    model.protoleak.encoder.fit_norm([model(noise).features.mean(dim=2)])
    fit_random_detector(model)
    model.detector.temperature_ = 1.0  # random embeddings would ask for logits of nearly zero
    return model


def picture(seed: int = 0, side: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_several_crops_average_their_features(model):
    views = latents(6).view(2, 3, 4, 8, 8) * torch.tensor([1, 1, 0.04]).view(3, 1, 1, 1)
    together = model(latents=views)
    alone = model(latents=views.flatten(0, 1))
    deviations = views.var(dim=(3, 4), correction=0).mean(dim=2).sqrt()
    weights = (deviations / 0.1).clamp_max(1)
    assert (weights[:, 2] < 0.6).all()
    weights = weights / weights.sum(dim=1, keepdim=True)
    torch.testing.assert_close(together.crop_weights, weights)
    torch.testing.assert_close(together.crop_features.flatten(0, 1), alone.features)
    torch.testing.assert_close(together.crop_logits.flatten(0, 1), alone.logits)
    features = (weights[..., None, None, None] * together.crop_features).sum(dim=1)
    torch.testing.assert_close(together.features, features)
    torch.testing.assert_close(together.logits, model(features=features).logits)
    noisy = model(pixel_values=torch.zeros(2, 3, 3, 32, 32), output_noisy_latents=True).noisy_latents
    assert noisy.shape == (2, 3, 3, 4, 8, 8)


@pytest.mark.parametrize("make", [texture_model, statistics_model])
def test_all_of_an_image_counts(make):
    """Painting over everything but the middle crop changes the verdict, and what each crop but it says."""
    model, image = make(), picture()
    painted = np.full_like(image, (255, 0, 255))
    grained = picture(seed=1) // 2
    painted[32:64, 32:64] = grained[32:64, 32:64] = image[32:64, 32:64]
    before, magenta, grain = (model(NINE([part])["pixel_values"]) for part in (image, painted, grained))
    alone = model(NINE([image[32:64, 32:64]])["pixel_values"])
    for after in (magenta, grain):
        differences = (after.crop_logits - before.crop_logits).abs().amax(dim=2)[0]
        others = differences[[0, 1, 2, 3, 5, 6, 7, 8]]
        assert (others > 1e-3).all()
        if make is texture_model:  # each at one timestep, so that the others tell what it is at the other
            assert differences[4] < others.min()
        else:
            assert differences[4] < 1e-4
        assert (after.logits - before.logits).abs().max() > 1e-3
        assert abs(after.open_set_score - before.open_set_score) > 1e-3
    assert magenta.crop_weights[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    for name in ("features", "logits", "open_set_score", "p_values", "class_p_values"):
        torch.testing.assert_close(magenta[name], alone[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [texture_model, statistics_model])
@pytest.mark.parametrize("kind", ["one crop", "six crops", "one colour", "two colours"])
def test_what_fills_a_batch_up_counts_nothing(make, kind):
    """An image gives the same alone and beside one of more crops."""
    model = make()
    image = {
        "one crop": picture(side=32),
        "six crops": picture()[:64],
        "one colour": np.full((32, 32, 3), 90, dtype=np.uint8),
        "two colours": np.repeat(np.uint8([10, 200]), 32 * 32 * 3).reshape(64, 32, 3),
    }[kind]
    alone = model(NINE([image])["pixel_values"])
    beside = model(NINE([picture(seed=3), image])["pixel_values"])
    own = alone.crop_weights.shape[1]
    assert beside.crop_weights.shape == (2, 9)
    torch.testing.assert_close(beside.crop_weights[1:, :own], alone.crop_weights)
    assert (beside.crop_weights[1, own:] == 0).all()
    for name in ("features", "embeddings", "logits", "open_set_score", "p_values", "class_p_values"):
        torch.testing.assert_close(beside[name][1:], alone[name], atol=1e-4, rtol=1e-4)
    assert beside.crop_logits.isfinite().all()


def test_rounding_is_no_evidence():
    shades = torch.full((1, 12, 16, 16), 0.3) * (1 + 1e-6 * torch.randn(1, 12, 16, 16))
    assert evidence(shades).item() == 0
    faint = shades.clone()
    faint[0, 0, 0, 0] += 0.2  # one value of a patch
    assert 0 < evidence(faint).item() < 0.1
    assert evidence(torch.randn(1, 12, 16, 16)).item() == 1


def test_features_can_be_given_in_the_place_of_latents():
    model = texture_model()
    output = model(NINE([picture()])["pixel_values"])
    again = model(features=output.features)
    for name in ("logits", "embeddings", "gates", "open_set_score", "p_values"):
        torch.testing.assert_close(again[name], output[name])


# --- several scales -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_scales_are_averages_of_squares_of_pixels_and_each_has_a_projection():
    model = texture_model()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    first, second = model.protoleak.encode(pixels)
    squares = pixels.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(first, torch.nn.functional.pixel_unshuffle(pixels, 2))
    torch.testing.assert_close(second, torch.nn.functional.pixel_unshuffle(squares, 2))
    before = model(pixels)
    assert before.features.shape[1:3] == (2, 2)
    assert before.temporal_weights.shape == (2, 4), "over scales and timesteps"
    torch.testing.assert_close(model(latents=[first, second]).logits, before.logits)
    alone = tiny_model(**TEXTURE | {"scales": [2]}).protoleak
    for module in ("whitening", "plane"):
        whole = model.protoleak.whitening if module == "whitening" else model.protoleak.encoder.plane
        own = alone.whitening if module == "whitening" else alone.encoder.plane
        own.load_state_dict(whole.state_dict())
    torch.testing.assert_close(alone(pixels).features[:, 0], before.features[:, 1])
    encoder, features = model.protoleak.encoder, before.features
    for scale in (0, 1):
        projected = encoder(features).unflatten(1, (2, 2))[:, scale]
        encoder.projections[scale].bias += 1
        moved = encoder(features).unflatten(1, (2, 2))
        torch.testing.assert_close(moved[:, scale], projected + 1)


@pytest.mark.parametrize(
    "backbone",
    [
        {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
        },
        {"model_type": "convnext", "patch_size": 1, "num_stages": 1, "hidden_sizes": [8], "depths": [1]},
    ],
)
@pytest.mark.parametrize("pooling", ["mean", "statistics"])
def test_any_backbone_with_either_pooling(backbone, pooling):
    model = tiny_model(backbone_config=backbone, keep_resolution=False, pooling=pooling)
    assert model(latents=latents(2, size=32)).embeddings.shape == (2, 16)


def test_wrong_input_is_named(model):
    one = "pass one of pixel_values, latents and features"
    with pytest.raises(ValueError, match=one):
        model()
    with pytest.raises(ValueError, match=one):
        model(pixel_values=torch.zeros(1, 3, 32, 32), latents=latents())
    with pytest.raises(ValueError, match=one):
        model(latents=latents(), features=model(latents=latents()).features)
    with pytest.raises(ValueError, match=r"got shapes \[\(3, 4, 8, 8\), \(3, 4, 8, 8\)\]"):
        model(latents=[latents(), latents()])
    with pytest.raises(ValueError, match=r"got shapes \[\(4, 8, 8\)\]"):
        model(latents=latents()[0])
    with pytest.raises(ValueError, match="latent_channels = 16"):
        model.attach_vae(tiny_vae(16))
    with pytest.raises(ValueError, match="attach_vae"):
        ProtoLeakModel(tiny_config())(torch.zeros(1, 3, 32, 32))


# --- same image, same score ---------------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_batch(fitted_model):
    pixels = torch.rand(9, 3, 32, 32) * 2 - 1
    together = fitted_model(pixels)
    for place in range(9):
        rolled = fitted_model(pixels.roll(place, dims=0))
        alone = fitted_model(pixels[place : place + 1])
        for name in ("logits", "embeddings", "open_set_score", "p_values"):
            expected = together[name][place]
            torch.testing.assert_close(alone[name][0], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                rolled[name].roll(-place, dims=0)[place], expected, atol=1e-5, rtol=1e-5
            )


def test_evaluation_is_deterministic_and_fixed_by_the_noise_seed(model):
    first = model(latents=latents()).embeddings
    torch.manual_seed(123)
    assert torch.equal(model(latents=latents()).embeddings, first)
    assert not torch.equal(tiny_model(noise_seed=1)(latents=latents()).embeddings, first)
    model.train()
    assert not torch.equal(model(latents=latents()).embeddings, model(latents=latents()).embeddings)


SCORE = """
import sys, torch
from protoleak import ProtoLeakForImageAttribution
model = ProtoLeakForImageAttribution.from_pretrained(sys.argv[1])
pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
output = model(pixels)
print(*output.logits.flatten().tolist(), *output.open_set_score.tolist())
"""


def test_scores_are_equal_in_fresh_processes(fitted_model, tmp_path):
    fitted_model.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = fitted_model(pixels)
    expected = [*output.logits.flatten().tolist(), *output.open_set_score.tolist()]
    for threads in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", SCORE, tmp_path],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        np.testing.assert_allclose([float(x) for x in run.stdout.split()], expected, atol=1e-5, rtol=1e-5)


def test_known_and_unknown_images_take_one_path(fitted_model):
    """
    The score of an image can't depend on whether it is thought known: forward has no such argument, and gives
    the same for an image beside known and beside unknown ones.
    """
    image, known, unknown = latents(1, seed=1), latents(4, seed=2), latents(4, seed=3) * 5
    beside_known = fitted_model(latents=torch.cat([image, known]))
    beside_unknown = fitted_model(latents=torch.cat([image, unknown]))
    for name in ("embeddings", "gates", "logits", "open_set_score"):
        torch.testing.assert_close(beside_known[name][0], beside_unknown[name][0], atol=1e-5, rtol=1e-5)
    scores = fitted_model.detector.open_set_score(beside_known)
    torch.testing.assert_close(beside_known.open_set_score, torch.from_numpy(scores))


# --- training -----------------------------------------------------------------------------------------------


def test_every_part_is_trained_and_survives_a_reload(model, tmp_path):
    before, before_vae = copy.deepcopy(model.state_dict()), copy.deepcopy(model.vae.state_dict())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        model(latents=latents(12, seed=step), labels=torch.arange(12) % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "protoleak.attention.query" in trained
    for name in trained:
        assert not torch.equal(model.state_dict()[name], before[name]), f"{name} did not move"
    for name, value in model.vae.state_dict().items():
        assert torch.equal(value, before_vae[name]), f"{name} of the frozen VAE moved"
    model.save_pretrained(tmp_path)
    reloaded = ProtoLeakForImageAttribution.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value), f"{name} did not survive"


def test_the_loss_falls():
    torch.manual_seed(0)
    model = tiny_model().train()
    images, labels = latents(30), torch.arange(30) % 3
    images = images + labels.view(-1, 1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(latents=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- what transformers asks of every model ------------------------------------------------------------------


def test_tuples_and_dicts_hold_the_same(fitted_model):
    labels = torch.tensor([0, 1, 2])
    output = fitted_model(latents=latents(3), labels=labels)
    values = fitted_model(latents=latents(3), labels=labels, return_dict=False)
    assert isinstance(values, tuple)
    for expected, found in zip(output.to_tuple(), values, strict=True):
        assert torch.equal(expected, found)
    assert fitted_model.protoleak(latents=latents(3), return_dict=False)[0].shape == (3, 16)


@pytest.mark.parametrize("pooling", ["mean", "statistics"])
def test_weights_are_initialised_and_by_the_seed_alone(pooling):
    first, second = tiny_model(pooling=pooling), tiny_model(pooling=pooling)
    for name, value in first.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, second.state_dict()[name]), name
    assert first.head.prototypes.std().item() == pytest.approx(0.5, rel=0.2)
    assert 0 < first.protoleak.attention.query.std() < 0.05
    assert (first.protoleak.encoder.projections[0].bias == 0).all()


def test_weights_missing_from_a_checkpoint_are_initialised(fitted_model, tmp_path):
    fitted_model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "prototypes" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    (tmp_path / "density.pkl").unlink()
    model, report = ProtoLeakForImageAttribution.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"head.prototypes"}
    assert model.head.prototypes.std().item() == pytest.approx(0.5, rel=0.2)


def test_gradient_checkpointing_gives_the_same_gradients():
    """Where the backbone has it; the ResNet of transformers has not."""
    backbone = {"model_type": "swin", "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2]}
    backbone |= {"num_heads": [2], "window_size": 4, "drop_path_rate": 0.0}
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(backbone_config=backbone, keep_resolution=False, time_dropout=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        torch.manual_seed(1)
        model(latents=latents(4, size=16), labels=torch.arange(4) % 3).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_checkpointing_without_a_backbone_that_has_it_is_refused(model):
    for without in (model, tiny_model(**TEXTURE)):
        with pytest.raises(ValueError, match="does not support activation checkpointing"):
            without.activation_checkpointing_enable()


def test_a_head_of_another_size_can_be_asked_for(fitted_model, tmp_path, caplog):
    fitted_model.save_pretrained(tmp_path)
    labels = {"id2label": {0: "real", 1: "x"}, "label2id": {"real": 0, "x": 1}}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ProtoLeakForImageAttribution.from_pretrained(tmp_path, **labels)
    model = ProtoLeakForImageAttribution.from_pretrained(tmp_path, **labels, ignore_mismatched_sizes=True)
    assert model.head.prototypes.shape == (2, 3, 16)
    assert model.detector is None
    kept = fitted_model.protoleak.encoder.projections[0].weight
    assert torch.equal(model.protoleak.encoder.projections[0].weight, kept)


@torch.no_grad()
def test_caching_latents_in_float16_errs_less_than_the_noise(trained):
    """Of LeakZoo's kind: of a model that takes latents."""
    model = ProtoLeakForImageAttribution.from_pretrained(trained.checkpoint)
    processor = ProtoLeakImageProcessor.from_pretrained(trained.checkpoint)
    images = sorted((trained.folder / "test").rglob("*.png"))
    (clean,) = model.protoleak.encode(processor(images)["pixel_values"])
    cached, whiten = clean.half().float(), model.protoleak.whiten
    errors = (whiten(clean) - whiten(cached)).square().mean(dim=(0, 2, 3)).sqrt()  # of each component
    noise = (1 - model.protoleak.alphas_cumprod()[1]).sqrt()
    assert errors.mean() < noise / 10
    assert errors.max() < noise / 5
    probabilities = [model(latents=z).logits.softmax(dim=1) for z in (clean, cached)]
    assert (probabilities[0] - probabilities[1]).abs().max() < 0.02
