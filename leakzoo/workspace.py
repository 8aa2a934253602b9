"""Where the stages keep what they make, and the random numbers that each draws from."""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn


class Workspace:
    """
    A folder with one file or folder for each finished stage.

    What has a file is read from it; what has none is computed, written under a temporary name, and moved.

    Args:
        work_dir (`Path`): Where stages keep their files.
        output_dir (`Path`): Where the data set goes.
        seed (`int`): From which each stage's own seed follows.
    """

    def __init__(self, work_dir: Path, output_dir: Path, seed: int):
        self.work_dir, self.output_dir, self.seed = work_dir, output_dir, seed
        self._memory: dict[str, dict[str, np.ndarray]] = {}

    def generator(self, name: str) -> torch.Generator:
        """Random numbers of one stage, whatever ran before it; seeds torch's global generator alike."""
        seed = zlib.crc32(f"{self.seed} {name}".encode())
        torch.manual_seed(seed)
        return torch.Generator().manual_seed(seed)

    def arrays(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of one stage, from `name`.npz or else from `compute`; read once."""
        path = self.work_dir / f"{name}.npz"
        if name not in self._memory:
            if not path.exists():
                partial = path.with_suffix(".partial")
                with partial.open("wb") as file:
                    np.savez(file, **compute())
                partial.rename(path)
            self._memory[name] = dict(np.load(path))
        return self._memory[name]

    def weights(self, name: str, blank: Callable[[], nn.Module], train: Callable[[], nn.Module]) -> nn.Module:
        """A frozen network: `blank()` with the weights of `name`.pt, or else of what `train()` returns."""
        path = self.work_dir / f"{name}.pt"
        if not path.exists():
            partial = path.with_suffix(".partial")
            torch.save(train().state_dict(), partial)
            partial.rename(path)
        model = blank()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval().requires_grad_(False)
