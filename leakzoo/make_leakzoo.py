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
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from autoencoders import load_autoencoder, load_decoder, load_fitted_decoder, load_latents
from dataset_card import write_figures, write_parquet
from diffusion_models import GENERATORS, load_denoiser, load_samples
from photographs import load_patches
from tqdm import tqdm
from workspace import Workspace


def list_stages(workspace: Workspace) -> dict[str, Callable[[], object]]:
    """Every stage by name, in an order in which each finds what it needs."""
    stages = {
        "patches": partial(load_patches, workspace),
        "autoencoder_a": partial(load_autoencoder, workspace, "a"),
        "autoencoder_analysis": partial(load_autoencoder, workspace, "analysis"),
        "latents": partial(load_latents, workspace),
    }
    stages |= {f"decoder_{name}": partial(load_fitted_decoder, workspace, name) for name in "bcde"}
    stages |= {f"sharp_decoder_{name}": partial(load_decoder, workspace, name) for name in "abcde"}
    own = [spec.name for spec in GENERATORS if not spec.denoiser]
    stages |= {f"denoiser_{name}": partial(load_denoiser, workspace, name) for name in own}
    stages |= {f"samples_{spec.name}": partial(load_samples, workspace, spec) for spec in GENERATORS}
    stages["parquet"] = partial(write_parquet, workspace)
    stages["figures"] = partial(write_figures, workspace)
    stages["vae"] = partial(copy_vae, workspace)
    return stages


def copy_vae(workspace: Workspace) -> None:
    """The analysis autoencoder goes to recipe/vae/ in the data set's folder."""
    target = workspace.output_dir / "recipe" / "vae"
    shutil.copytree(workspace.work_dir / "autoencoder_analysis", target, dirs_exist_ok=True)
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
    stages = list_stages(Workspace(arguments.work_dir, arguments.output_dir, arguments.seed))
    chosen = arguments.stages or list(stages)
    if unknown := set(chosen) - set(stages):
        parser.error(f"no such stages: {sorted(unknown)}; there are {list(stages)}")
    for name in chosen:
        stages[name]()
        tqdm.write(f"{name}: done")


if __name__ == "__main__":
    main()
