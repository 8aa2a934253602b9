"""The stage of diffusion models: the generators of the zoo, how they are trained, and their images."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from autoencoders import LATENT_CHANNELS, load_autoencoder, load_decoder, load_latents, train_loop
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from photographs import LAYOUT_SIZE, SIZE, SPLIT_SIZES, layouts, load_patches, to_tensor
from torch import nn
from workspace import Workspace


@dataclass(frozen=True)
class Generator:
    """One generator of the zoo: a denoiser with its noise process, a sampler, and a decoder."""

    name: str
    recipe: str
    known: bool = True
    denoiser: str = ""  # the generator whose trained weights it samples from; its own when empty
    base: str = ""  # the generator whose weights its own training starts from; from scratch when empty
    training_steps: int = 6000
    decoder: str | None = "a"  # None: it works in pixel space
    noise: dict = field(default_factory=dict)  # its noise schedule, as arguments of a diffusers scheduler
    offset_noise: float = 0.0
    sampler: type = DDIMScheduler
    sampler_options: dict = field(default_factory=dict)
    sampling_steps: int = 50

    @property
    def is_flow(self) -> bool:
        return self.sampler is FlowMatchEulerDiscreteScheduler

    def make_sampler(self):
        return self.sampler(**self.noise, **self.sampler_options)


STABLE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
)
COSINE = dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
DDIM = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
ANCESTRAL = dict(sampler=EulerAncestralDiscreteScheduler, sampling_steps=8)
GENERATORS = (
    Generator("ldm", "scaled-linear betas, v-prediction, DDIM 50", noise=STABLE, sampler_options=DDIM),
    Generator(
        "ldm_zero_snr",
        "as ldm, zero terminal SNR, Euler ancestral 8 with trailing steps",
        base="ldm",
        training_steps=1500,
        noise=STABLE | dict(rescale_betas_zero_snr=True),
        sampler_options=dict(timestep_spacing="trailing"),
        **ANCESTRAL,
    ),
    Generator("ldm_decoder_b", "as ldm", denoiser="ldm", decoder="b", noise=STABLE, sampler_options=DDIM),
    Generator(
        "ldm_cosine",
        "cosine betas, Euler ancestral 8",
        base="ldm",
        training_steps=1500,
        decoder="b",
        noise=COSINE,
        **ANCESTRAL,
    ),
    Generator(
        "ldm_offset_noise",
        "as ldm, offset noise 0.1, Euler ancestral 8",
        base="ldm",
        training_steps=1500,
        decoder="e",
        noise=STABLE,
        offset_noise=0.1,
        **ANCESTRAL,
    ),
    Generator(
        "flow_matching",
        "rectified flow, logit-normal times, Euler 25",
        decoder="d",
        sampler=FlowMatchEulerDiscreteScheduler,
        sampling_steps=25,
    ),
    Generator(
        "ldm_decoder_c", "as ldm", False, denoiser="ldm", decoder="c", noise=STABLE, sampler_options=DDIM
    ),
    Generator(
        "ldm_lcm",
        "as ldm, sampled by the consistency sampler LCM, 4 steps",
        known=False,
        denoiser="ldm",
        noise=STABLE,
        sampler=LCMScheduler,
        sampling_steps=4,
    ),
    Generator(
        "pixel_diffusion",
        "in pixel space, cosine betas, x-prediction, DDIM 50",
        known=False,
        decoder=None,
        training_steps=1500,
        noise=COSINE | dict(prediction_type="sample"),
        sampler_options=DDIM,
    ),
)


def make_denoiser(generator: Generator) -> UNet2DModel:
    """A small UNet over 2x2 patches of latents or 4x4 patches of pixels, with the layout as more channels."""
    patch, channels = (2, LATENT_CHANNELS) if generator.decoder else (4, 3)
    size = SIZE // 4 // patch if generator.decoder else SIZE // patch
    widths = (64, 128) if generator.decoder else (64, 96, 128)
    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=size,
        in_channels=channels * patch**2 + 3 * (LAYOUT_SIZE // size) ** 2,
        out_channels=channels * patch**2,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        norm_num_groups=16,
        attention_head_dim=32,
    )


def noisy_and_target(
    spec: Generator, scheduler, clean: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    A batch of noisy samples, their times, and what is to be predicted, by the generator's own process: the
    velocity, or in pixel space, whose many dimensions of noise a small network can't carry, the clean sample
    (Li and He 2025).
    """
    noise = torch.randn(clean.shape, generator=generator)
    if spec.is_flow:  # Esser et al. 2024, eq. 1 and 19
        sigma = torch.sigmoid(torch.randn(len(clean), generator=generator)).view(-1, 1, 1, 1)
        return (1 - sigma) * clean + sigma * noise, 1000 * sigma.flatten(), noise - clean
    if spec.offset_noise:
        noise = noise + spec.offset_noise * torch.randn(*clean.shape[:2], 1, 1, generator=generator)
    times = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
    noisy = scheduler.add_noise(clean, noise, times)
    if scheduler.config.prediction_type == "sample":
        return noisy, times, clean
    return noisy, times, scheduler.get_velocity(clean, noise, times)


def predict(
    denoiser: UNet2DModel, noisy: torch.Tensor, layout: torch.Tensor, times: torch.Tensor, is_flow: bool
) -> torch.Tensor:
    """
    The UNet's prediction for `noisy` (N, C, h, w), cut into the patches that it works on. For a flow it is
    preconditioned to unit variance (Karras et al. 2022): with s^2 = (1 - sigma)^2 + sigma^2 the network sees
    x / s and gives F, and noise - clean is (2 sigma - 1) / s^2 x + F / s.
    """
    sigma = (times / 1000).view(-1, 1, 1, 1)
    scale = ((1 - sigma) ** 2 + sigma**2).sqrt() if is_flow else 1.0
    size = denoiser.config.sample_size
    patch = noisy.shape[-1] // size
    layout = F.pixel_unshuffle(layout, layout.shape[-1] // size)
    patches = torch.cat([F.pixel_unshuffle(noisy / scale, patch), layout], dim=1)
    output = F.pixel_shuffle(denoiser(patches, times).sample, patch)
    return (2 * sigma - 1) / scale**2 * noisy + output / scale if is_flow else output


def train_denoiser(workspace: Workspace, spec: Generator) -> UNet2DModel:
    """
    Train one denoiser on the patches' latents or pixels, from scratch or, as vendors do, from another
    generator's weights.
    """
    images = to_tensor(load_patches(workspace)["pool"])
    generator = workspace.generator(f"denoiser {spec.name}")
    clean = load_latents(workspace) if spec.decoder else images
    denoiser, scheduler = make_denoiser(spec), DDPMScheduler(**spec.noise)
    if spec.base:
        denoiser.load_state_dict(load_denoiser(workspace, spec.base).state_dict())

    def loss_of_step(step: int) -> torch.Tensor:
        index = torch.randint(len(clean), (32,), generator=generator)
        noisy, times, target = noisy_and_target(spec, scheduler, clean[index], generator)
        layout = layouts(images[index], generator)
        return F.mse_loss(predict(denoiser, noisy, layout, times, spec.is_flow), target)

    lr = 3e-4 if spec.base else 1e-3
    train_loop(denoiser, loss_of_step, spec.training_steps, lr, f"denoiser {spec.name}")
    return denoiser


class LayoutToImagePipeline(DiffusionPipeline):
    """Images that follow layouts, sampled with any diffusers scheduler; `decoder=None`: in pixel space."""

    def __init__(
        self, unet: UNet2DModel, scheduler, decoder: nn.Module | None = None, scaling_factor: float = 1.0
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.decoder, self.scaling_factor = decoder, scaling_factor

    @torch.inference_mode()
    def __call__(
        self, layout: torch.Tensor, num_inference_steps: int, generator: torch.Generator
    ) -> torch.Tensor:
        """(N, 3, 16, 16) layouts -> (N, 3, H, W) images in [-1, 1]."""
        is_flow = isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)
        channels, reduction = (LATENT_CHANNELS, 4) if self.decoder is not None else (3, 1)
        shape = (len(layout), channels, SIZE // reduction, SIZE // reduction)
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.randn(shape, generator=generator)
        sample = sample * (1.0 if is_flow else self.scheduler.init_noise_sigma)
        extra = {} if isinstance(self.scheduler, DDIMScheduler) else {"generator": generator}
        for time in self.progress_bar(self.scheduler.timesteps):
            noisy = sample if is_flow else self.scheduler.scale_model_input(sample, time)
            prediction = predict(self.unet, noisy, layout, time.expand(len(layout)), is_flow)
            sample = self.scheduler.step(prediction, time, sample, **extra).prev_sample
        if self.decoder is not None:
            sample = self.decoder(sample / self.scaling_factor)
        return sample.clamp(-1, 1)


def sample_generator(workspace: Workspace, spec: Generator) -> dict[str, np.ndarray]:
    """Images (N, 64, 64, 3) uint8 of one generator for each split that it belongs to."""
    denoiser = load_denoiser(workspace, spec.denoiser or spec.name)
    decoder = load_decoder(workspace, spec.decoder) if spec.decoder else None
    scaling = load_autoencoder(workspace, "a").config.scaling_factor if spec.decoder else 1.0
    pipeline = LayoutToImagePipeline(denoiser, spec.make_sampler(), decoder, scaling)
    pipeline.set_progress_bar_config(desc=f"sampling {spec.name}", mininterval=5)
    generator, images = workspace.generator(f"samples {spec.name}"), {}
    for split in SPLIT_SIZES if spec.known else ("test",):
        layout = layouts(to_tensor(load_patches(workspace)[split]), generator)
        sampled = pipeline(layout, spec.sampling_steps, generator)
        images[split] = sampled.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return images


def load_denoiser(workspace: Workspace, name: str) -> UNet2DModel:
    """The denoiser of one generator, trained where it has no file yet."""
    spec = next(spec for spec in GENERATORS if spec.name == name)
    return workspace.weights(
        f"denoiser_{name}", lambda: make_denoiser(spec), lambda: train_denoiser(workspace, spec)
    )


def load_samples(workspace: Workspace, spec: Generator) -> dict[str, np.ndarray]:
    """The images of one generator, as [`sample_generator`] gives them."""
    return workspace.arrays(f"samples_{spec.name}", lambda: sample_generator(workspace, spec))
