"""
Time and memory of training, attribution and the density, as README and the issue state them.

    python benchmarks/speed.py
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from protoleak import GaussianKDE, ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.data_protoleak import load_splits
from sklearn.neighbors import KernelDensity

HERE = Path(__file__).parent.parent


def timed_command(*command: str | Path, **environment: str) -> tuple[float, float]:
    """Seconds and peak resident memory in GB of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, env=os.environ | environment, cwd=HERE, check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return time.perf_counter() - started, peak


def attribution() -> None:
    seconds, peak = timed_command("protoleak", "attribute", "examples")
    print(f"protoleak attribute examples/: {seconds:.1f} s with imports, peak {peak:.2f} GB")


def training() -> None:
    """
    A cold run, and an epoch against what the released code's flow adds to each: encoding every image again.
    """
    with tempfile.TemporaryDirectory() as folder:
        seconds, peak = timed_command(
            sys.executable, "train.py", "--output_dir", f"{folder}/run", HF_DATASETS_CACHE=f"{folder}/cache"
        )
        metrics = json.loads(Path(f"{folder}/run/metrics.json").read_text())
    epoch = metrics["seconds"]["training"] / metrics["epochs"]
    print(f"python train.py, cold cache: {seconds:.0f} s, peak {peak:.2f} GB, {metrics['epochs']} epochs")
    encoding = encoding_seconds()
    print(
        f"an epoch from cached latents: {epoch:.2f} s; encoding train and validation anew: {encoding:.2f} s; "
        f"an epoch that encodes again costs {(epoch + encoding) / epoch:.1f} times as much"
    )


def encoding_seconds() -> float:
    splits = load_splits(str(HERE / "leakzoo"))
    model = ProtoLeakForImageAttribution.from_pretrained(HERE)
    processor = ProtoLeakImageProcessor.from_pretrained(HERE)
    started = time.perf_counter()
    for split in ("train", "validation"):
        images = [image["bytes"] for image in splits[split]["image"]]
        for start in range(0, len(images), 16):
            model.protoleak.encode(processor(images[start : start + 16])["pixel_values"])
    return time.perf_counter() - started


def density() -> None:
    """2,000 x 10,000 at D = 128 against scikit-learn's exact setting."""
    rng = np.random.default_rng(0)
    samples, queries = rng.normal(size=(10_000, 128)), rng.normal(size=(2_000, 128))
    kde = GaussianKDE(bandwidth=0.5).fit(samples)
    ours, theirs = [], []
    reference = KernelDensity(bandwidth=0.5, leaf_size=len(samples)).fit(samples)
    for _ in range(3):
        started = time.perf_counter()
        found = kde.score_samples(queries)
        ours.append(time.perf_counter() - started)
    started = time.perf_counter()
    expected = reference.score_samples(queries)
    theirs.append(time.perf_counter() - started)
    ratio = theirs[0] / np.median(ours)
    print(
        f"KDE 2,000 x 10,000, D = 128: {np.median(ours):.2f} s, scikit-learn exact: {theirs[0]:.2f} s, "
        f"{ratio:.1f} times; largest difference {np.abs(found - expected).max():.1e} nats"
    )


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    density()
    attribution()
    training()
