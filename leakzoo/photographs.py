"""The stage of photographs: which they are, how they are fetched, and the patches that are cut from them."""

import importlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from workspace import Workspace

SIZE = 64
SPLIT_SIZES = {"train": 150, "validation": 50, "test": 80}
TRAINING_PATCHES = 12_000
# A photograph is reduced to these before it is cut: JPEG traces of the source go away.
SHORTER_SIDES = (192, 288, 432)
LAYOUT_SIZE, LAYOUT_NOISE = 16, 0.1

LOMIRI = "lomiri-wallpapers-16.04"
LOMIRI_20 = "lomiri-wallpapers-20.04"
MATE = "mate-backgrounds"
PLASMA = "plasma-workspace-wallpapers"


@dataclass(frozen=True)
class Photo:
    """One source photograph: where it comes from, who took it, its licence, and the split of its patches."""

    name: str
    package: str  # a Debian package, or a Python distribution that ships the file
    path: str
    author: str
    licence: str
    split: str = "train"


def _lomiri(file: str, author: str, licence: str, split: str = "train", package: str = LOMIRI) -> Photo:
    name, path = file.split("_by_")[0].lower(), f"usr/share/backgrounds/{file}.jpg"
    return Photo(name, package, path, author, licence, split)


def _mate(name: str, author: str, split: str = "train") -> Photo:
    path = f"usr/share/backgrounds/mate/nature/{name}.jpg"
    return Photo(name.lower(), MATE, path, author, "GPL-2.0-or-later", split)


def _plasma(name: str, author: str, split: str = "train") -> Photo:
    path = f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
    return Photo(name.lower(), PLASMA, path, author, "LGPL-3.0", split)


def _scikit(name: str, path: str, author: str, licence: str, split: str = "train") -> Photo:
    package = "scikit-learn" if path.startswith("sklearn") else "scikit-image"
    return Photo(name, package, path, author, licence, split)


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


def fetch_photo(photo: Photo, folder: Path) -> Image.Image:
    """A photograph as RGB; the Debian package that carries it is fetched into `folder` on first use."""
    if photo.package.startswith("scikit"):
        module, _, rest = photo.path.partition("/")
        return Image.open(Path(importlib.import_module(module).__file__).parent / rest).convert("RGB")
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
    """Random patches, uint8 (count, 64, 64, 3), of which few are flat: flat ones carry no trace."""
    patches = []
    while len(patches) < count:
        image = scales[rng.integers(len(scales))]
        y, x = (rng.integers(n - SIZE + 1) for n in image.shape[:2])
        patch = image[y : y + SIZE, x : x + SIZE]
        if patch.std(axis=(0, 1)).mean() > 12 or rng.random() < 0.02:
            patches.append(patch)
    return np.stack(patches)


def load_patches(workspace: Workspace) -> dict[str, np.ndarray]:
    """
    Patches, uint8 (N, 64, 64, 3): `train`, `validation`, `test`, and `pool`, what the generators learn from;
    `train_photo` and so on name the photograph of each patch.
    """
    return workspace.arrays("patches", lambda: cut_splits(workspace.seed, workspace.work_dir / "photos"))


def cut_splits(seed: int, photos_dir: Path) -> dict[str, np.ndarray]:
    """What [`load_patches`] gives, cut from the photographs."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, size in SPLIT_SIZES.items():
        photos = [photo for photo in PHOTOS if photo.split == split]
        names, patches = [], []
        for photo, share in zip(photos, np.array_split(np.arange(size), len(photos)), strict=True):
            scales = photo_scales(fetch_photo(photo, photos_dir))
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
