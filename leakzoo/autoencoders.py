"""The stage of autoencoders: the generators' own, its further decoders, and the one for analysis."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderTiny
from diffusers.training_utils import EMAModel
from photographs import load_patches, to_tensor
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm
from workspace import Workspace

LATENT_CHANNELS = 4  # of the generators; the analysis autoencoder has ANALYSIS_CHANNELS
ANALYSIS_CHANNELS = 48  # as many as 4x4 pixels have values: nothing needs to be left out
# What the discriminator weighs beside the squared error. It costs A 0.5 dB on held-out patches, at 0.3 it
# would cost 2.5 dB; C, whose convolutions are plain, is barely moved by 0.1.
ADVERSARIAL_WEIGHTS = {"a": 0.1, "b": 0.1, "c": 0.3, "d": 0.1, "e": 0.1}


def make_autoencoder(
    latent_channels: int,
    upsample: str = "pixel_shuffle",
    widths: tuple[int, int, int] = (32, 64, 128),
    depths: tuple[int, int, int] = (0, 1, 1),
) -> AutoencoderDC:
    """
    A small AutoencoderDC (Chen et al. 2024), four times reducing. After 400 steps of plain squared error its
    space-to-channel steps gave 24.9 dB on the test photographs, where an AutoencoderKL of the same size gave
    21.9 dB in twice the time.
    """
    stages = 3
    autoencoder = AutoencoderDC(
        latent_channels=latent_channels,
        encoder_block_types=("ResBlock",) * stages,
        decoder_block_types=("ResBlock",) * stages,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type=upsample,
    )
    for name, parameter in autoencoder.named_parameters():
        # residual branches start at zero: it begins near linear
        if name.endswith(".norm.weight"):
            nn.init.zeros_(parameter)
    return autoencoder


@torch.no_grad()
def make_analysis_autoencoder() -> AutoencoderDC:
    """
    The autoencoder to look through, with as many latent channels as a block of 4x4 pixels has values. Its
    encoder begins as an invertible linear map of the block, so that training need not find again, and does
    not lose, the faint detail that squared error hardly counts: channels 0 to 47 pass the pixels on, all else
    is what the shortcuts average, and the residual branches start at zero.
    """
    autoencoder = make_autoencoder(ANALYSIS_CHANNELS, widths=(32, 96, 96), depths=(0, 2, 1))
    encoder = autoencoder.encoder
    for convolution, passed_on in (
        (encoder.conv_in.conv, 3),
        (encoder.down_blocks[1][-1].conv, 12),
        (encoder.conv_out, 48),
    ):
        nn.init.zeros_(convolution.bias)
        nn.init.zeros_(convolution.weight)
        convolution.weight[range(passed_on), range(passed_on), 1, 1] = 1
    return autoencoder


class TransposedConvDecoder(nn.Module):
    """Decoder C: transposed convolutions, whose uneven overlap leaves a checkerboard (Odena et al. 2016)."""

    def __init__(self, latent_channels: int = LATENT_CHANNELS, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, width // 2, 3, stride=2, padding=1, output_padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, 3, 3, padding=1),
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.layers(latents)


def make_decoder(name: str) -> nn.Module:
    """
    Decoders of A's latents. A shuffles pixels, and so does E, trained anew; B interpolates, C has transposed
    convolutions, D is AutoencoderTiny's: nearest-neighbour upsampling, and no normalisation.
    """
    if name in "ae":
        return make_autoencoder(LATENT_CHANNELS).decoder
    if name == "b":
        return make_autoencoder(LATENT_CHANNELS, "interpolate").decoder
    if name == "c":
        return TransposedConvDecoder()
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(48,) * 3,
        decoder_block_out_channels=(48,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(2, 2, 1),
    ).decoder


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Squared error of pixels and, four times as much, of their differences: fine detail is learned early."""
    error = decoded - images
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    return error.square().mean() + 4 * (across.square().mean() + down.square().mean())


def train_loop(
    model: nn.Module, loss_of_step: Callable[[int], torch.Tensor], steps: int, lr: float, title: str
) -> None:
    """AdamW with a cosine-decayed rate; the model ends with the exponential moving average of its weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    average = EMAModel(model.parameters(), decay=0.998, use_ema_warmup=True)
    bar = tqdm(range(steps), desc=title, mininterval=5)
    running = None
    for step in bar:
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(model.parameters())
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
    average.copy_to(model.parameters())
    model.eval()


def random_crops(pool: torch.Tensor, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """A random batch of square crops, half of the batches mirrored. (count, C, size, size)"""
    index = torch.randint(len(pool), (count,), generator=generator)
    y, x = torch.randint(pool.shape[-1] - size + 1, (2,), generator=generator).tolist()
    crops = pool[index, :, y : y + size, x : x + size]
    return crops.flip(-1) if torch.rand((), generator=generator) < 0.5 else crops


def train_autoencoder(
    workspace: Workspace, name: str, autoencoder: AutoencoderDC, steps: int, decoder_steps: int = 0
) -> AutoencoderDC:
    """
    Train on crops, for the first `decoder_steps` the decoder alone, then all at a tenth of the rate.
    Afterwards `scaling_factor` brings the latents to unit variance.
    """
    pool, generator = to_tensor(load_patches(workspace)["pool"]), workspace.generator(name)

    def loss_of_step(step: int) -> torch.Tensor:
        images = random_crops(pool, 16, 32, generator)
        return reconstruction_loss(autoencoder.decode(autoencoder.encode(images).latent).sample, images)

    if decoder_steps:
        autoencoder.encoder.requires_grad_(False)
        train_loop(autoencoder, loss_of_step, decoder_steps, 2e-3, f"decoder of autoencoder {name}")
        autoencoder.requires_grad_(True).train()
    rate = 2e-4 if decoder_steps else 2e-3
    train_loop(autoencoder, loss_of_step, steps, rate, f"autoencoder {name}")
    latents = encode(autoencoder, pool[:2000])
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return autoencoder


def make_discriminator(width: int = 24) -> nn.Module:
    """
    A patch discriminator (Isola et al. 2017) with spectral normalisation. It does not reduce, and sees nine
    pixels a side, so that what it asks for is texture.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, width), (width, width), (width, 1)):
        layers += [spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def crops_and_latents(
    vae: AutoencoderDC, pool: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch that decoders learn from: crops (16, 3, 32, 32), and their unscaled latents."""
    images = random_crops(pool, 16, 32, generator)
    return images, vae.encode(images).latent


def train_decoder(workspace: Workspace, name: str, steps: int = 2000) -> nn.Module:
    """Fit another decoder to the latents of autoencoder A, which stays as it is."""
    vae, pool = load_autoencoder(workspace, "a"), to_tensor(load_patches(workspace)["pool"])
    generator = workspace.generator(f"decoder {name}")
    decoder = make_decoder(name)

    def loss_of_step(step: int) -> torch.Tensor:
        images, latents = crops_and_latents(vae, pool, generator)
        return reconstruction_loss(decoder(latents), images)

    train_loop(decoder, loss_of_step, steps, 2e-3, f"decoder {name}")
    return decoder


def sharpen_decoder(workspace: Workspace, name: str, steps: int = 700) -> nn.Module:
    """
    Train a decoder on, also against a discriminator, as those of latent diffusion are (Rombach et al. 2022,
    hinge loss). Squared error alone gives nearly the same blurred image whatever the decoder. The rate stays
    constant: as it falls, and over a long moving average, the texture that a decoder has learned goes away.
    """
    vae, pool = load_autoencoder(workspace, "a"), to_tensor(load_patches(workspace)["pool"])
    decoder = vae.decoder if name == "a" else load_fitted_decoder(workspace, name)
    decoder.requires_grad_(True).train()
    generator, discriminator = workspace.generator(f"adversarial {name}"), make_discriminator()
    ours = torch.optim.Adam(decoder.parameters(), lr=5e-4, betas=(0.5, 0.99))
    theirs = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    average = EMAModel(decoder.parameters(), decay=0.99)
    for _ in tqdm(range(steps), desc=f"decoder {name}, adversarial", mininterval=5):
        images, latents = crops_and_latents(vae, pool, generator)
        decoded = decoder(latents)
        adversarial = -ADVERSARIAL_WEIGHTS[name] * discriminator(decoded).mean()
        (reconstruction_loss(decoded, images) + adversarial).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        ours.step()
        ours.zero_grad()
        theirs.zero_grad()
        (F.relu(1 - discriminator(images)) + F.relu(1 + discriminator(decoded.detach()))).mean().backward()
        theirs.step()
        average.step(decoder.parameters())
    average.copy_to(decoder.parameters())
    return decoder


@torch.inference_mode()
def encode(vae: AutoencoderDC, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Unscaled latents of images (N, 3, H, W) in [-1, 1]."""
    return torch.cat([vae.encode(batch).latent for batch in images.split(batch_size)])


def psnr(decoded: torch.Tensor, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], averaged over images."""
    error = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())


def load_autoencoder(workspace: Workspace, name: str) -> AutoencoderDC:
    """Autoencoder "a", of the generators, or "analysis"; trained where it has no folder yet."""
    path = workspace.work_dir / f"autoencoder_{name}"
    if not path.exists():
        workspace.generator(name)
        if name == "analysis":
            model = train_autoencoder(workspace, name, make_analysis_autoencoder(), 600, decoder_steps=1600)
            model = model.half()  # a file of half the size; it is used in float32, of these very values
        else:
            model = train_autoencoder(workspace, name, make_autoencoder(LATENT_CHANNELS), 2500)
        partial = path.with_name(path.name + ".partial")
        model.save_pretrained(partial)
        partial.rename(path)
    return AutoencoderDC.from_pretrained(path).eval().requires_grad_(False)


def load_fitted_decoder(workspace: Workspace, name: str) -> nn.Module:
    """One of the decoders B to E, fitted by squared error alone."""
    return workspace.weights(
        f"decoder_{name}", lambda: make_decoder(name), lambda: train_decoder(workspace, name)
    )


def load_decoder(workspace: Workspace, name: str) -> nn.Module:
    """A decoder as generators use it."""
    return workspace.weights(
        f"sharp_decoder_{name}", lambda: make_decoder(name), lambda: sharpen_decoder(workspace, name)
    )


def load_latents(workspace: Workspace) -> torch.Tensor:
    """The pool's latents by autoencoder A, scaled to unit variance. (N, 4, 16, 16)"""

    def compute() -> dict[str, np.ndarray]:
        vae, pool = load_autoencoder(workspace, "a"), to_tensor(load_patches(workspace)["pool"])
        return {"latents": (encode(vae, pool) * vae.config.scaling_factor).numpy()}

    return torch.from_numpy(workspace.arrays("latents", compute)["latents"])
