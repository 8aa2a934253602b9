"""
What a GPU makes of attribution: images a second, against the VAE alone, and whether it says the same.

    python benchmarks/gpu.py     # 10 minutes on an H200; ends with an error where there is no GPU

The bundled checkpoint, and the paper's setting (Stable Diffusion 2.1's VAE, ResNet-18) with random weights.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.image_processing_protoleak import stack_crops

sys.path.insert(0, str(Path(__file__).parent))
from scale import draw_large
from speed import HERE, paper_model, row, steps_of, timed_command

BATCHES = {256: 64, 1024: 8}  # images at once, by their side in pixels: one crop, and nine
# the dtype of the VAE, and whether it is compiled
VAES = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))


def rate(function: Callable[[], object], images: int, seconds: float = 3.0) -> float:
    """Images a second, after two calls that are not counted."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        function()
        torch.cuda.synchronize()
        calls += 1
    return images * calls / (time.perf_counter() - started)


def pixels(side: int) -> torch.Tensor:
    """Noise of as many crops as an image of this side has, on the GPU."""
    crops = 1 if side == 256 else 9
    shape = (BATCHES[side], crops, 3, 256, 256)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).cuda() * 2 - 1


@torch.inference_mode()
def throughput(name: str, make: Callable[[], ProtoLeakForImageAttribution]) -> None:
    for dtype, compiled in VAES:
        model = make().cuda().to(dtype)
        if compiled:
            model.vae.encoder.compile()
        for side, count in BATCHES.items():
            values = pixels(side)
            torch.cuda.reset_peak_memory_stats()
            whole = rate(partial(model, values), count)
            peak = torch.cuda.max_memory_allocated() / 1e9
            alone = rate(partial(model.protoleak.encode, values), count)
            how = f"{str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}"
            measured = f"{whole:.0f} images/s, VAE alone {alone:.0f}, {peak:.1f} GB"
            row(f"{name}, {side} px, VAE in {how}", measured)


@torch.inference_mode()
def parts() -> None:
    """Where the bundled model's time goes: 64 crops, both scales and timesteps."""
    values = pixels(256)[:, 0]
    for name, step in steps_of(bundled().cuda(), values).items():
        row(f"{name}, a crop", f"{1000 / rate(step, len(values), 1.0):.2f} ms")


def bundled() -> ProtoLeakForImageAttribution:
    return ProtoLeakForImageAttribution.from_pretrained(HERE).eval()


@torch.inference_mode()
def agreement() -> None:
    """Scores of examples/ on the GPU and on the CPU, and where PyTorch is told to round on the GPU."""
    processor = ProtoLeakImageProcessor.from_pretrained(HERE)
    files = sorted(f for f in (HERE / "examples").iterdir() if f.suffix in (".png", ".jpg", ".webp"))
    values = torch.from_numpy(stack_crops([processor.pixel_values(f) for f in files]))
    model = bundled()
    here, there = (model.to(device)(values.to(device)) for device in ("cpu", "cuda"))
    torch.set_float32_matmul_precision("medium")
    rounded = model(values.to("cuda"))
    torch.set_float32_matmul_precision("highest")
    for field in ("logits", "embeddings", "open_set_score"):
        a, b, c = (np.asarray(torch.as_tensor(x[field]).cpu(), dtype=float) for x in (here, there, rounded))
        differences = [f"{np.abs(other - a).max() / a.std():.1e}" for other in (b, c)]
        row(f"{field} of examples/, GPU less CPU, over their spread", differences[0])
        row('the same after `torch.set_float32_matmul_precision("medium")`', differences[1])


def command() -> None:
    """`protoleak attribute` on files: what reading and decoding leave of it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        draw_large(folder / "many", 400)
        draw_large(folder / "few", 16)
        long, short = (
            timed_command(
                sys.executable, "-m", "protoleak.cli", "attribute", folder / name, "--output",
                folder / f"{name}.jsonl", "--workers", "8",
            )[0]
            for name in ("many", "few")
        )  # fmt: skip
    row("`protoleak attribute FOLDER`, PNG of 1024 px, 8 workers", f"{384 / (long - short):.0f} images/s")


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: there is no GPU here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| what | measured | target |")
    print("| --- | --- | --- |")
    agreement()
    parts()
    throughput("bundled", bundled)
    throughput("SD 2.1's VAE, ResNet-18", paper_model)
    command()


if __name__ == "__main__":
    main()
