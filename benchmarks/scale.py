"""
The price of a verdict: folders of large images, many images, several processes, as ratios of one run.

    python benchmarks/scale.py [--quick] [large_images] [processes] [many_images]

All of it takes 30 minutes on 2 cores, --quick 3.
"""

import io
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from protoleak import ProtoLeakConfig, ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.vae_protoleak import load_vae

sys.path.insert(0, str(Path(__file__).parent))
from speed import HERE, QUICK, RECIPE, fit_random_detector, header, median_seconds, row, timed_command

SIDE = 1024  # of a large image, pixels
WORKERS = 2  # threads that decode, as `protoleak attribute` has
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def attribute(*arguments: str | Path) -> tuple[float, float]:
    """Seconds and peak memory in GB of `protoleak attribute`."""
    return timed_command(sys.executable, "-m", "protoleak.cli", "attribute", *arguments)


# --- large images -------------------------------------------------------------------------------------------


def large_images(folder: Path) -> None:
    """What `protoleak attribute FOLDER --output` takes, over decoding alone by as many threads."""
    count = 32 if QUICK else 1_000
    draw_large(folder / "large", count)
    files = sorted((folder / "large").iterdir())

    def decode() -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda file: Image.open(file).convert("RGB").load(), files))

    alone = median_seconds(decode, 3)
    few = folder / "few"
    few.mkdir()
    shutil.copy(files[0], few)
    start = attribute(few, "--output", folder / "few.jsonl")[0]
    seconds, peak = attribute(folder / "large", "--output", folder / "large.jsonl")
    per_image = 1000 * (seconds - start) / (count - 1)
    title = f"`protoleak attribute FOLDER --output`, {count:,} PNG of {SIDE} px, 9 crops, over decoding alone"
    row(title, f"{seconds / alone:.1f} ({per_image:.0f} and {1000 * alone / count:.0f} ms an image)", "3")
    row("its peak memory", f"{peak:.2f} GB")


def draw_large(folder: Path, count: int) -> None:
    """Photographs of examples/, enlarged, with grain, each another part."""
    folder.mkdir()
    photos = [Image.open(file).convert("RGB") for file in sorted((HERE / "examples").glob("photo_*.jpg"))]
    rng = np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        scale = 1.2 * SIDE / min(photo.size)
        left, top = (rng.integers(0, n - SIDE / scale) for n in photo.size)
        box = (left, top, left + SIDE / scale, top + SIDE / scale)
        pixels = np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box))
        grain = rng.integers(-6, 7, (SIDE, SIDE, 1))
        grainy = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
        grainy.save(folder / f"{i:05}.png", compress_level=6)


# --- many images --------------------------------------------------------------------------------------------


def many_images(folder: Path) -> None:
    """A streamed data set, and ten times as many images: memory, and --resume when all is done."""
    small_checkpoint(folder / "small")
    peaks = []
    for count in (500, 5_000) if QUICK else (10_000, 100_000):
        data, records = folder / f"data_{count}", folder / f"{count}.jsonl"
        draw_many(data, count)
        command = ("--model", folder / "small", "--dataset", data, "--streaming", "--output", records)
        seconds, peak = attribute(*command)
        peaks.append(peak)
        row(f"{count:,} streamed images of 64 px, LeakZoo's recipe", f"{seconds:.0f} s, {peak:.2f} GB")
    with records.open() as lines:
        assert sum(1 for _ in lines) == count
    row("peak memory at ten times the images", f"{peaks[1] / peaks[0]:.2f}", "1.1")
    row("`--resume` where all of them are done", f"{attribute(*command, '--resume')[0]:.0f} s")


def draw_many(folder: Path, count: int) -> None:
    """Noise of 64 pixels a side, JPEG, as Parquet files of at most 10,000 images."""
    features = datasets.Features({"image": datasets.Image()})
    rng = np.random.default_rng(0)
    folder.mkdir()
    for start in range(0, count, 10_000):
        contents = []
        for _ in range(start, min(start + 10_000, count)):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            encoded = io.BytesIO()
            coarse.resize((64, 64), Image.Resampling.BICUBIC).save(encoded, "JPEG")
            contents.append({"bytes": encoded.getvalue(), "path": None})
        rows = datasets.Dataset.from_dict({"image": contents}, features=features)
        rows.to_parquet(folder / f"train-{start:06}.parquet")


def small_checkpoint(folder: Path) -> None:
    """LeakZoo's recipe with random weights."""
    config = ProtoLeakConfig.from_pretrained(RECIPE, num_labels=7)
    model = ProtoLeakForImageAttribution(config).eval()
    model.attach_vae(load_vae(RECIPE, config))
    processor = ProtoLeakImageProcessor.from_pretrained(RECIPE)
    fit_random_detector(model, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# --- processes ----------------------------------------------------------------------------------------------


def processes(folder: Path) -> None:
    """One process, which has both cores for its threads, against two that share the files."""
    part, few = folder / "part", folder / "first"
    draw_large(part, 32 if QUICK else 100)
    draw_large(few, 1)
    files = list(part.iterdir())
    rates = {}
    for count in (1, 2):
        command = (*TORCHRUN, str(count), "--module", "protoleak.cli", "attribute")
        long, short = (
            timed_command(*command, place, "--output", folder / f"{count}_{place.name}.jsonl")[0]
            for place in (part, few)
        )
        rates[count] = (len(files) - 1) / (long - short)
    title = "images a second by two processes (`torchrun --nproc-per-node 2`), over one with 2 threads"
    row(title, f"{rates[2] / rates[1]:.2f} ({rates[2]:.1f} and {rates[1]:.1f})", "1.8, or what is to be had")
    one = rate_of_one_thread(folder, part, few)
    row("over one process with 1 thread", f"{rates[2] / one:.2f} ({one:.1f} images a second)")


def rate_of_one_thread(folder: Path, part: Path, few: Path) -> float:
    long, short = (
        timed_command(
            sys.executable, "-m", "protoleak.cli", "attribute", place,
            "--output", folder / f"thread_{place.name}.jsonl", OMP_NUM_THREADS="1",
        )[0]
        for place in (part, few)
    )  # fmt: skip
    return (len(list(part.iterdir())) - 1) / (long - short)


def main() -> None:
    header()
    with tempfile.TemporaryDirectory() as place:
        sections = (large_images, processes, many_images)
        for section in [s for s in sections if s.__name__ in sys.argv] or sections:
            started = time.perf_counter()
            section(Path(place))
            print(f"{section.__name__}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
