import copy
from threading import Event, Thread

import pytest
import torch
from protoleak import ImageAttributionPipeline, ProtoLeakForImageAttribution, texture_protoleak
from protoleak.precision_protoleak import full_precision

from .conftest import TEXTURE, tiny_config, tiny_model


def dtypes_of(model) -> set[torch.dtype]:
    """Of the network, all but numbers of batches."""
    return {value.dtype for value in model.state_dict().values() if value.is_floating_point()}


WAYS_TO_ASK = {
    "to": lambda model: model.to(torch.bfloat16),
    "to a device as well": lambda model: model.to("cpu", torch.bfloat16),
    "to by name": lambda model: model.to(device="cpu", dtype=torch.bfloat16),
    "to as a tensor": lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)),
    "its own": lambda model: model.bfloat16(),
    "of the base model": lambda model: (model.protoleak.bfloat16(), model)[1],
}


@pytest.mark.parametrize("way", WAYS_TO_ASK)
@torch.no_grad()
def test_a_dtype_is_the_vaes(fitted_model, way):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    before = fitted_model(pixels)
    model = WAYS_TO_ASK[way](fitted_model)
    assert model.vae.dtype == torch.bfloat16
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {
        torch.float32
    }
    for values in (pixels, pixels.bfloat16()):
        after = model(values)
        assert after.logits.dtype == after.embeddings.dtype == torch.float32
        assert 0 < (after.logits - before.logits).abs().max() < 0.1
        assert after.p_values is not None


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", torch.float64, "auto", None])
@torch.no_grad()
def test_a_checkpoint_loads_in_every_dtype(checkpoint, processor, photo, dtype):
    expected = (
        torch.float32
        if dtype in ("auto", None)
        else getattr(torch, dtype)
        if isinstance(dtype, str)
        else dtype
    )
    model = ProtoLeakForImageAttribution.from_pretrained(checkpoint, dtype=dtype)
    assert (model.vae.dtype, model.dtype, model.config.dtype) == (expected, torch.float32, torch.float32)
    assert model(torch.zeros(1, 3, 32, 32).to(expected)).p_values is not None
    assert ImageAttributionPipeline(model=model, image_processor=processor)(photo)["p_value"] is not None


def test_a_model_in_half_precision_is_loaded_again(fitted_model, checkpoint, tmp_path):
    """Its VAE is saved as precisely as it is known: as it is on disk, else as it is in memory."""
    loaded = ProtoLeakForImageAttribution.from_pretrained(checkpoint, dtype=torch.bfloat16)
    for name, model, dtype in (
        ("on disk", loaded, torch.float32),
        ("in memory", fitted_model.bfloat16(), torch.bfloat16),
    ):
        model.save_pretrained(tmp_path / name)
        again = ProtoLeakForImageAttribution.from_pretrained(tmp_path / name)
        assert again.detector is not None, name
        assert again.vae.dtype == dtype, name


def test_a_model_can_be_made_in_no_other_dtype():
    model = ProtoLeakForImageAttribution._from_config(tiny_config(), dtype=torch.bfloat16)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {
        torch.float32
    }


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model(**TEXTURE)])
def test_mixed_precision_is_off_inside(make):
    model, pixels, labels = make().train(), torch.rand(3, 3, 32, 32) * 2 - 1, torch.tensor([0, 1, 2])
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = model(pixels, labels=labels)
            latents, logits = model.protoleak.encode(pixels), model.head(output.embeddings, output.gates)
        model.zero_grad()
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([output.loss, output.logits, *latents, logits, *gradients])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(expected, found)


@pytest.mark.parametrize("texture", [False, True])
def test_scores_do_not_move_with_how_the_process_multiplies(texture):
    model, pixels = tiny_model(**TEXTURE if texture else {}), torch.rand(2, 3, 32, 32) * 2 - 1
    latents = model.protoleak.encode(pixels)  # in which the VAE does as it is told
    expected, setting, seen = model(latents=latents), torch.backends.mkldnn.matmul, []

    def look(*_) -> None:
        seen.append((setting.fp32_precision, torch.backends.mkldnn.conv.fp32_precision))

    for module in (model.protoleak.encoder.norm, model.protoleak.gate):
        module.register_forward_hook(look)
    distances = model.head.distances
    model.head.distances = lambda *inputs: look() or distances(*inputs)
    torch.set_float32_matmul_precision("medium")
    try:
        found = model(latents=latents)
        with pytest.raises(ValueError, match="latents must be"):
            model(latents=torch.zeros(3))
        assert (setting.fp32_precision, torch.get_float32_matmul_precision()) == ("bf16", "medium")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(seen) == 3
    assert {"bf16", "tf32"}.isdisjoint(value for values in seen for value in values)
    for name in ("logits", "embeddings"):
        assert torch.equal(found[name], expected[name])


def test_settings_that_are_inherited_stay_so():
    settings = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    for setting in settings:
        setting.fp32_precision = "none"
    torch.backends.fp32_precision = "bf16"
    try:
        with full_precision(), full_precision():
            assert [setting.fp32_precision for setting in settings] == ["ieee"] * 2
        assert [setting.fp32_precision for setting in settings] == ["bf16"] * 2
        torch.backends.fp32_precision = "ieee"
        assert [setting.fp32_precision for setting in settings] == ["ieee"] * 2
    finally:
        torch.backends.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_thread_that_is_done_leaves_another_its_precision():
    setting = torch.backends.mkldnn.matmul
    begun, done = Event(), Event()

    def first() -> None:
        with full_precision():
            begun.set()
            done.wait(10)

    torch.set_float32_matmul_precision("medium")
    try:
        thread = Thread(target=first)
        thread.start()
        assert begun.wait(10)
        with full_precision():
            done.set()
            thread.join()
            assert setting.fp32_precision == "ieee"
        assert (setting.fp32_precision, torch.get_float32_matmul_precision()) == ("bf16", "medium")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_compiled_model_does_not_round_either():
    model, seen = tiny_model(), []
    latents = model.protoleak.encode(torch.rand(1, 3, 32, 32) * 2 - 1)[0]

    def backend(graph, _):
        multiplies = {"linear", "conv2d", "einsum", "matmul"} & {
            getattr(node.target, "__name__", "") for node in graph.graph.nodes
        }

        def run(*values):
            if multiplies:
                seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return graph(*values)

        return run

    torch.set_float32_matmul_precision("medium")
    try:
        torch.compile(model, backend=backend)(latents=latents)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.compiler.reset()
    assert set(seen) == {"ieee"}


def test_scores_do_not_move_with_the_default_dtype(fitted_model):
    model, pixels = copy.deepcopy(fitted_model), torch.rand(2, 3, 32, 32) * 2 - 1
    expected = fitted_model(pixels)
    torch.set_default_dtype(torch.float64)
    try:
        model.check_detector(model.detector)
        found = model(pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("logits", "embeddings"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("threads", [1, 2])  # a default device is of one thread alone
@pytest.mark.parametrize("texture", [False, True])
def test_scores_do_not_move_with_the_default_device(texture, threads):
    """Of a model that is elsewhere; `meta` has no values that could be copied."""
    several = [tiny_model(**TEXTURE if texture else {}) for _ in range(2)]
    pixels = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = several[0](pixels)
        texture_protoleak._patterns_of_cells.cache_clear()
        torch.set_default_device("meta")
        found = several[1](pixels)
    finally:
        torch.set_default_device(None)
        torch.set_num_threads(before)
    for name in ("logits", "embeddings"):
        assert torch.equal(found[name], expected[name])
