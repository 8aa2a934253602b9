"""The frozen network that looks at the picture a latent stands for, and where its weights come from."""

import copy
import importlib.util

import pytest
import torch
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor, checkpoint_protoleak
from protoleak.checkpoint_protoleak import LICENCE, PICTURE
from protoleak.picture_protoleak import NUM_PICTURE_STATISTICS, PictureStatistics, convolved
from protoleak.training.arguments import TrainingArguments
from protoleak.training.initialisation import make_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME as WEIGHTS

from . import ROOT
from .conftest import TEXTURE, tiny_model

NAMES = ["real", "a", "b"]
NETWORK = f"protoleak.{PICTURE}"


@pytest.fixture(scope="module")
def model():
    model = tiny_model(**TEXTURE, texture_families=["picture_statistics"])
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model.protoleak.fit_whitening([model.protoleak.encode(pixels)[0]])
    return model


@torch.no_grad()
def test_the_picture_is_that_of_the_latents(model):
    pixels = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = model.protoleak.encode(pixels)
    for reduced, z in zip((pixels, nn.functional.avg_pool2d(pixels, 2)), latents, strict=True):
        picture = model.protoleak.encoder.picture.picture(model.protoleak.whiten(z))
        torch.testing.assert_close(picture, reduced, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", [2, 33, 64])
def test_statistics_are_means_and_deviations_of_the_last_blocks(side):
    network, seen = PictureStatistics(3, 1), []
    for block in network.blocks[5:]:
        block.register_forward_hook(lambda _, __, found: seen.append(found))
    described = network(torch.randn(2, 3, side, side))
    expected = [f for x in seen for f in (x.mean((2, 3)), x.std((2, 3), correction=0))]
    torch.testing.assert_close(described, torch.cat(expected, dim=1), atol=1.1e-3, rtol=0)
    assert described.shape == (2, NUM_PICTURE_STATISTICS)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 7), (5, 6), (2, 2), (1, 1)])
def test_a_convolution_is_padded_as_tensorflow_does(size, kernel, stride):
    """Rows and columns of zeros, one more below and at the right where their number is odd ("SAME")."""
    layer = nn.Conv2d(4, 4, kernel, stride, groups=4)
    plane = torch.rand(2, 4, *size)
    totals = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in reversed(size)]
    sides = [side for total in totals for side in (total // 2, total - total // 2)]
    expected = layer(nn.functional.pad(plane, sides))
    found = convolved(plane, layer)
    assert found.shape[2:] == tuple(-(-n // stride) for n in size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_normalisation_is_folded_into_its_convolution():
    generator = torch.Generator().manual_seed(0)
    convolution, norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=1e-3).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.copy_(torch.rand(5, generator=generator) + 0.5)
    weights = {f"c.{k}": v for k, v in convolution.state_dict().items()}
    weights |= {f"n.{k}": v for k, v in norm.state_dict().items()}
    folded = nn.Conv2d(3, 5, 3)
    spec = importlib.util.spec_from_file_location("make_backbone", ROOT / "wild" / "make_backbone.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folded.load_state_dict(script.folded(weights, "c", "n"))
    images = torch.randn(2, 3, 8, 8, generator=generator)
    torch.testing.assert_close(folded(images), norm(convolution(images)), atol=1e-5, rtol=1e-5)


def save(model, folder):
    model.save_pretrained(folder)
    ProtoLeakImageProcessor(crop_size=32).save_pretrained(folder)


def test_a_new_model_takes_the_network_of_its_recipe(model, tmp_path):
    save(model, tmp_path)
    arguments = TrainingArguments(dataset_name=["x"], config_name=str(tmp_path))
    new = make_model(arguments, NAMES)[0].protoleak.encoder.picture.state_dict()
    for name, weight in model.protoleak.encoder.picture.state_dict().items():
        assert torch.equal(new[name], weight) != (name in ("readout", "offset")), name


def test_a_recipes_network_must_be_finite(model, tmp_path):
    save(model, tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights[f"{NETWORK}.stem.bias"][0] = torch.nan
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"stem\.bias of .* has NaN"):
        make_model(TrainingArguments(dataset_name=["x"], config_name=str(tmp_path)), NAMES)


def test_nothing_trains_the_network_of_a_checkpoint(model, tmp_path):
    save(model, tmp_path)
    loaded = ProtoLeakForImageAttribution.from_pretrained(tmp_path).train()
    before = copy.deepcopy(loaded.protoleak.encoder.picture.state_dict())
    optimiser = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    images = torch.rand(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loaded(images, labels=torch.arange(3)).loss.backward()
    optimiser.step()
    assert not torch.equal(loaded.head.prototypes, model.head.prototypes)
    for name, weight in loaded.protoleak.encoder.picture.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert not any(parameter.requires_grad for parameter in loaded.protoleak.encoder.picture.parameters())


@pytest.mark.parametrize("lost", [NETWORK, f"{NETWORK}.readout", "protoleak.whitening.mean"])
def test_a_checkpoint_without_what_is_not_learned_is_refused(model, tmp_path, lost):
    """Such weights would be made up, and nothing would tell."""
    save(model, tmp_path)
    weights = {name: w for name, w in load_file(tmp_path / WEIGHTS).items() if not name.startswith(lost)}
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lack {lost}.*not learned by fine-tuning"):
        ProtoLeakForImageAttribution.from_pretrained(tmp_path)


def test_what_is_loaded_can_be_told(model, tmp_path):
    save(model, tmp_path)
    loaded, info = ProtoLeakForImageAttribution.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.vae is not None
    assert not info["missing_keys"]


def test_the_licence_of_a_checkpoint_goes_with_it_where_its_code_is_a_copy(
    model, tmp_path, monkeypatch, caplog
):
    """The Hub's loaders copy code alone."""
    save(model, tmp_path / "checkpoint")
    monkeypatch.setattr(checkpoint_protoleak, "__file__", str(tmp_path / "modules" / "x.py"))
    loaded = ProtoLeakForImageAttribution.from_pretrained(tmp_path / "checkpoint")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / LICENCE).read_text() == (ROOT / LICENCE).read_text()
    (tmp_path / "checkpoint" / LICENCE).unlink()
    loaded.save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third" / LICENCE).exists()
    assert f"{LICENCE} is not here" in caplog.text


def test_others_licence_goes_with_the_network_alone(model, tmp_path):
    for name, saved in (("with", model), ("without", tiny_model(**TEXTURE))):
        saved.save_pretrained(tmp_path / name)
    assert (tmp_path / "with" / LICENCE).read_text() == (ROOT / LICENCE).read_text()
    assert not (tmp_path / "without" / LICENCE).exists()


def test_a_recipe_without_the_network_says_what_adds_it(model, tmp_path):
    save(model, tmp_path)
    arguments = TrainingArguments(dataset_name=["x"], config_name=str(tmp_path))
    (tmp_path / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(OSError, match=rf"{WEIGHTS} is damaged"):
        make_model(arguments, NAMES)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"no frozen network.*make_backbone"):
        make_model(arguments, NAMES)
