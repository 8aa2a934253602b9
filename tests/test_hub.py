"""Save, reload and use, in fresh processes and offline, from a folder and from the Hub's cache."""

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from protoleak import (
    ImageAttributionPipeline,
    ProtoLeakConfig,
    ProtoLeakDiffusionPipeline,
    ProtoLeakForImageAttribution,
    ProtoLeakImageProcessor,
    ProtoLeakModel,
)
from protoleak.cli import main
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)

from .conftest import draw_folder, fit_random_detector, tiny_model, tiny_vae
from .hub_matrix import HUB_ID, LOADERS, lay_out_cache, matrix, rows


@pytest.fixture(scope="module")
def found(tmp_path_factory, cache) -> tuple[dict, dict, dict]:
    """The matrix of a tiny model; `python tests/hub_matrix.py` prints the bundled one's."""
    folder = tmp_path_factory.mktemp("hub")
    model, processor = tiny_model(), ProtoLeakImageProcessor(crop_size=32)
    fit_random_detector(model)
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    data = draw_folder(folder / "data")
    images = [str(path) for path in sorted((data / "unknown/c").iterdir())[:4]]
    return matrix(folder / "checkpoint", folder, str(data), images)


def test_every_loader_on_every_kind_of_checkpoint(found):
    columns = found[0]
    for name, column in columns.items():
        assert isinstance(column, dict), f"{name}: {column}"
        assert set(column) == set(LOADERS)
        assert max(column.values()) <= 1e-5, (name, column)


@pytest.mark.parametrize("row", rows())
def test_what_users_do(found, row):
    assert found[1][row] == "yes", found[1][row]


# --- diffusers ----------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(checkpoint):
    pipe = DiffusionPipeline.from_pretrained(str(checkpoint), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_diffusion_pipeline_gives_the_models_numbers(pipe, checkpoint, processor, photo):
    result = pipe([photo, photo], output_latents=True)
    model = ProtoLeakForImageAttribution.from_pretrained(checkpoint)
    output = model(**processor([photo, photo]), output_noisy_latents=True)
    torch.testing.assert_close(
        torch.tensor(result.open_set_scores, dtype=torch.float64), output.open_set_score
    )
    torch.testing.assert_close(result.latents, output.noisy_latents)
    assert result.latents.shape == (2, 3, 4, 8, 8)
    assert result.labels == [record["label"] for record in result.records]
    assert pipe.attribution_model.vae is pipe.vae
    assert pipe(photo, return_dict=False)[0] == result.labels[:1]


def test_dtype_is_that_of_the_vae_and_the_head_stays_in_float32(pipe, photo):
    expected = pipe(photo).open_set_scores[0]
    pipe.to(torch.bfloat16)
    assert pipe.vae.dtype == torch.bfloat16
    assert pipe.attribution_model.dtype == torch.float32
    assert pipe(photo).open_set_scores[0] == pytest.approx(expected, rel=0.2)


def test_a_swapped_scheduler_or_vae_does_not_keep_the_old_detector(pipe, photo):
    pipe(photo)
    before = pipe.scheduler
    pipe.scheduler = DDPMScheduler()  # linear betas
    with pytest.raises(ValueError, match="fitted for other"):
        pipe(photo)
    pipe.attribution_model.detector = None
    assert pipe(photo).p_values == [None]
    assert pipe.attribution_model.config.beta_schedule == "linear"
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="alphas_cumprod"):
        pipe(photo)
    pipe.scheduler = before
    pipe.vae = tiny_vae(16)
    with pytest.raises(ValueError, match="latent_channels = 16"):
        pipe(photo)


def test_a_swapped_vae_of_other_weights_is_noticed(pipe, photo):
    pipe(photo)
    other = tiny_vae()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    pipe.vae = other
    with pytest.raises(ValueError, match="fitted for other"):
        pipe(photo)


def test_slicing_changes_nothing(pipe, photo):
    expected = pipe([photo, photo]).open_set_scores
    pipe.enable_vae_slicing()
    assert pipe([photo, photo]).open_set_scores == pytest.approx(expected, abs=1e-5)


def test_the_parts_are_moved_by_their_hooks(pipe, photo):
    """What `enable_model_cpu_offload` hangs on the components; it itself asks for an accelerator."""
    expected = pipe(photo).records
    previous, parts = None, pipe.model_cpu_offload_seq.split("->")
    assert set(parts) == {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for part in parts:
        _, previous = cpu_offload_with_hook(getattr(pipe, part), "cpu", prev_module_hook=previous)
    assert pipe(photo).records == expected


# --- where the package is installed -------------------------------------------------------------------------


def test_an_imported_package_loads_without_trust(checkpoint, photo, tmp_path):
    """And nothing that lies in the checkpoint runs, be it in a folder or on the Hub."""
    expected = ImageAttributionPipeline(
        model=ProtoLeakForImageAttribution.from_pretrained(checkpoint),
        image_processor=ProtoLeakImageProcessor.from_pretrained(checkpoint),
    )(photo)
    for code in checkpoint.glob("*.py"):
        code.write_text("raise RuntimeError('it ran')")
    lay_out_cache(tmp_path / "cache", {"v1": str(checkpoint)})
    hub = {"revision": "v1", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    for source, options in ((str(checkpoint), {}), (HUB_ID, hub)):
        assert type(AutoConfig.from_pretrained(source, **options)) is ProtoLeakConfig
        assert type(AutoModel.from_pretrained(source, **options)) is ProtoLeakModel
        model = AutoModelForImageClassification.from_pretrained(source, **options)
        processor = AutoImageProcessor.from_pretrained(source, **options)
        attribute = pipeline("image-attribution", model=model, image_processor=processor)
        # pytest imports the clone as a package of its folder's name too, which registers its own
        assert type(attribute).__module__.split(".")[-1] == "pipeline_protoleak"
        assert not type(attribute).__module__.startswith("transformers_modules")
        assert attribute(photo) == expected
        pipe = ProtoLeakDiffusionPipeline.from_pretrained(source, **options)
        assert pipe(photo).records == [expected]
    assert pipeline("image-attribution", model=str(checkpoint))(photo) == expected


# --- what is wrong is said ----------------------------------------------------------------------------------


def test_enrolling_is_careful(checkpoint, folder, tmp_path, capsys):
    images = str(folder / "unknown/c")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("")
    for arguments, message in (
        (["c", images, "--output_dir", str(tmp_path / "full")], "not empty"),
        (["real", images, "--output_dir", str(tmp_path / "new")], "already known"),
        (["c", f"{images}/0.png", "--output_dir", str(tmp_path / "new")], "at least 2 images"),
        (["c", str(tmp_path / "full"), "--output_dir", str(tmp_path / "new")], "no images found"),
    ):
        assert main(["enroll", *arguments, "--model", str(checkpoint)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
