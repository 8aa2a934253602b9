"""
Time and memory, as ratios measured in one run.

    python benchmarks/speed.py [--quick]     # --quick: fewer repeats and sizes, under 5 minutes on 2 cores
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from protoleak import GaussianKDE, ProtoLeakConfig, ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.evaluation.splits import load_splits
from protoleak.forensics.scan import Attributor
from protoleak.vae_protoleak import load_vae
from sklearn.neighbors import KernelDensity
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent.parent
RECIPE = HERE / "leakzoo" / "recipe"
QUICK = "--quick" in sys.argv
SD21 = {  # Stable Diffusion 2.1's VAE
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}


def row(what: str, measured: str, target: str = "") -> None:
    print(f"| {what} | {measured} | {target} |", flush=True)


def median_seconds(function: Callable[[], object], repeats: int, clock=time.perf_counter) -> float:
    times = []
    for _ in range(repeats):
        started = clock()
        function()
        times.append(clock() - started)
    return statistics.median(times)


def timed_command(*command: str | Path, **environment: str) -> tuple[float, float]:
    """Seconds and peak resident memory in GB of a command that must succeed."""
    code = (
        "import os, resource, subprocess, sys, time; started = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)],
        env=os.environ | environment, cwd=HERE, check=True, capture_output=True, text=True,
    )  # fmt: skip
    seconds, peak = map(float, run.stdout.split())
    return seconds, peak


# --- start-up and attribution -------------------------------------------------------------------------------


def start_up() -> None:
    seconds = statistics.median(timed_command("protoleak", "--help")[0] for _ in range(3))
    row("`protoleak --help`", f"{seconds:.1f} s")
    first = statistics.median(
        timed_command("protoleak", "attribute", "examples/ldm_1.png")[0] for _ in range(5)
    )
    row("first verdict", f"{first:.1f} s", "4 s")
    imports = (sys.executable, "-c", "import transformers.modeling_utils")
    alone = statistics.median(timed_command(*imports)[0] for _ in range(5))
    row("importing what `PreTrainedModel` needs, alone", f"{alone:.1f} s")
    seconds, peak = timed_command("protoleak", "attribute", "examples")
    row("`protoleak attribute examples/` with imports", f"{seconds:.1f} s, {peak:.2f} GB", "20 s, 1.5 GB")


def inference() -> None:
    """Files on disk to records, against `vae.encode` of the same pixel values in the same batches."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i in range(4 if QUICK else 8):
            pixels = np.random.default_rng(i).integers(0, 256, (300, 400, 3), dtype=np.uint8)
            files.append(Path(folder) / f"{i}.png")
            Image.fromarray(pixels).save(files[-1])
        random_checkpoint(Path(folder) / "sd21")
        attributor = Attributor(f"{folder}/sd21")
        ratio = pipeline_ratio(attributor, files, 4, 1 if QUICK else 3)
        row("whole pipeline over `vae.encode` alone, SD 2.1's architecture, 256 px", ratio, "1.10")
        with FlopCounterMode(display=False) as counted:
            attributor.network.protoleak.encode(torch.zeros(1, 3, 256, 256))
        row(
            "what its encoder computes for an image of 256 px",
            f"{counted.get_total_flops() / 1e12:.2f} TFLOP",
        )


def pipeline_ratio(attributor: Attributor, files: list[Path], batch_size: int, repeats: int) -> str:
    """Both in turn, so that a busy machine slows both."""
    values = [attributor.read(file)[1][0][0] for file in files]
    starts = range(0, len(values), batch_size)
    batches = [torch.from_numpy(np.stack(values[s : s + batch_size])) for s in starts]
    encode = attributor.network.protoleak.encode
    encode(batches[0])
    alone, whole = [], []
    for _ in range(repeats):
        alone.append(median_seconds(lambda: [encode(batch) for batch in batches], 1))
        whole.append(median_seconds(lambda: list(attributor.records(files, batch_size)), 1))
    ratio = statistics.median(w / a for w, a in zip(whole, alone, strict=True))
    per_image = statistics.median(whole) / len(files)
    return f"{ratio:.2f} ({1000 * per_image:.1f} ms an image)"


def random_checkpoint(folder: Path) -> None:
    """[`paper_model`] and its image processor."""
    paper_model().save_pretrained(folder)
    ProtoLeakImageProcessor(crop_size=256).save_pretrained(folder)


def paper_model() -> ProtoLeakForImageAttribution:
    """The paper's setting with random weights, and a detector fitted on random embeddings."""
    labels = {k: f"class {k}" for k in range(10)}
    config = ProtoLeakConfig(id2label=labels, label2id={name: k for k, name in labels.items()})
    model = ProtoLeakForImageAttribution(config).eval()
    model.attach_vae(AutoencoderKL(**SD21))
    fit_random_detector(model, ProtoLeakImageProcessor(crop_size=256))
    return model


def fit_random_detector(model: ProtoLeakForImageAttribution, processor: ProtoLeakImageProcessor) -> None:
    """On random embeddings, 1,000 and 500 to calibrate by."""
    rng, labels = np.random.default_rng(0), model.config.num_labels
    channels = model.config.latent_channels
    sizes = dict.fromkeys(("embeddings", "gates"), model.config.embedding_size)
    sizes["statistics"] = 6 * channels + channels * (channels - 1) // 2

    def draw(count: int) -> dict[str, np.ndarray]:
        drawn = {name: rng.normal(size=(count, size)) for name, size in sizes.items()}
        return drawn | {"labels": np.arange(count) % labels}

    model.fit_detector(draw(1000), draw(500), processor=processor)


def parts() -> None:
    """Where the bundled model's time goes, on one thread: a crop of 256 pixels, both scales and timesteps."""
    attributor = Attributor(str(HERE))
    pixels = torch.from_numpy(attributor.read(HERE / "examples" / "photo_4.jpg")[1][0][0][:1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        opening = "opening, crops and claims of a JPEG of 640 x 427 pixels"
        steps = {opening: lambda: attributor.read(HERE / "examples" / "photo_4.jpg")}
        for name, step in (steps | steps_of(attributor.network, pixels)).items():
            row(f"{name}, a crop", f"{1000 * median_seconds(step, 9, time.thread_time):.1f} ms")
    torch.set_num_threads(threads)


def steps_of(network: ProtoLeakForImageAttribution, pixels: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What a texture model does with crops (N, 3, h, w), both scales and timesteps, step by step."""
    base = network.protoleak
    latents = base.encode(pixels)
    noisy = [base.simulate(base.whiten(z)).flatten(0, 1) for z in latents]
    both = [(z, base.encoder.plane(z)) for z in noisy]
    features = base(pixels[:, None]).features

    def describe(name: str) -> list[torch.Tensor]:
        return [base.encoder.describe(name, *pair) for pair in both]

    return {
        "autoencoder": lambda: base.encode(pixels),
        "whitening and forward diffusion": lambda: [base.simulate(base.whiten(z)) for z in latents],
        **{name: partial(describe, name) for name in base.encoder.parts},
        "attention, prototypes and open-set verdict": lambda: network(features=features),
    }


# --- training -----------------------------------------------------------------------------------------------


def training() -> None:
    """A run, an epoch from cached latents, and what encoding every image again would add to each."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"HF_DATASETS_CACHE": f"{folder}/cache"}
        command = [sys.executable, "train.py", "--output_dir", f"{folder}/run"]
        if QUICK:
            command += ["--num_train_epochs", "10", "--orientations", "1", "--augmented_views", "0"]
        seconds, peak = timed_command(*command, **environment)
        metrics = json.loads(Path(f"{folder}/run/metrics.json").read_text())
    epochs, parts = metrics["epochs"], metrics["seconds"]
    title = f"`{' '.join(['python', *command[1:2], *command[4:]])}`, cold cache, {epochs} epochs"
    row(title, f"{seconds:.0f} s, {peak:.2f} GB", "" if QUICK else "360 s, 3 GB")
    epoch, encoding = parts["training"] / epochs, encoding_seconds()
    network = network_seconds(350 if QUICK else 700)  # untouched, and post-processed where views are
    row("an epoch from cached latents", f"{epoch:.2f} s")
    row("encoding train and validation again", f"{encoding:.2f} s")
    row("an epoch that encodes again, over one that does not", f"{(epoch + encoding) / epoch:.1f}", "8")
    row("an epoch from cached latents, over the network alone", f"{epoch / network:.2f}", "1.1")
    flow = 10 * (epoch + encoding) / (encoding + 10 * epoch)
    row("10 epochs that encode again, over encoding once and 10 epochs", f"{flow:.1f}", "6")
    paper = sd21_training()
    row("the same with SD 2.1's VAE at 256 px and ResNet-18 (8 images)", f"{paper:.1f}", "6")


FACTORS = (1, 4, 10)


def training_memory() -> None:
    """
    Peak memory of a run by LeakZoo's recipe, and of ones on more images, with latents as large as they
    become: 48 channels, 0.1 MB for each of 2 views of a crop of 128 pixels. Resident memory, all in all.
    """
    count = 100 if QUICK else 1_000
    with tempfile.TemporaryDirectory() as folder:
        peaks = {}
        for factor in FACTORS:
            place = Path(folder) / str(factor)
            draw_noise(place / "data", factor * count)
            environment = {"HF_DATASETS_CACHE": str(place / "cache"), "PYTHONPATH": str(HERE.parent)}
            peaks[factor] = timed_command(sys.executable, "-c", TRAIN_ON_NOISE, place, **environment)[1]
    for factor in FACTORS[1:]:
        title = f"peak memory of training on {factor * count:,} images of 128 px, over that on {count:,}"
        row(title, f"{peaks[factor] / peaks[1]:.2f} ({peaks[1]:.2f} GB, {peaks[factor]:.2f} GB)", "1.10")


TRAIN_ON_NOISE = """
import sys
from diffusers import AutoencoderKL
from protoleak import ProtoLeakConfig, ProtoLeakImageProcessor
from protoleak.train import train
from protoleak.training.arguments import ROOT, TrainingArguments

folder = sys.argv[1]
ProtoLeakConfig.from_pretrained(ROOT / "leakzoo" / "recipe").save_pretrained(folder)
ProtoLeakImageProcessor(crop_size=128).save_pretrained(folder)
vae = AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=4, latent_channels=48,
    mid_block_add_attention=False,
)
options = {"orientations": 2, "augmented_views": 0, "num_train_epochs": 1, "batch_size": 32}
options |= {"bootstrap_resamples": 2, "output_dir": folder + "/run"}
train(TrainingArguments(dataset_name=[folder + "/data"], config_name=folder, **options), vae=vae)
"""


def draw_noise(folder: Path, count: int) -> None:
    """Noise of 128 pixels a side, two classes of different strength; a quarter as many for other splits."""
    rng = np.random.default_rng(0)
    for split, images in {"train": count, "validation": count // 4, "test": count // 4}.items():
        for label, strength in {"real": 30, "noisy": 60}.items():
            (folder / split / label).mkdir(parents=True)
            for i in range(images // 2):
                pixels = rng.normal(128, strength, (128, 128, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{i}.webp")


def leakzoo_model() -> ProtoLeakForImageAttribution:
    """A network of LeakZoo's recipe, not trained."""
    model = ProtoLeakForImageAttribution(ProtoLeakConfig.from_pretrained(RECIPE, num_labels=7))
    model.attach_vae(load_vae(RECIPE, model.config))
    return model


def encoding_seconds() -> float:
    splits = load_splits(str(HERE / "leakzoo"))
    model, processor = leakzoo_model(), ProtoLeakImageProcessor.from_pretrained(RECIPE)
    started = time.perf_counter()
    for split in ("train", "validation"):
        images = [image["bytes"] for image in splits[split]["image"]]
        for start in range(0, len(images), 16):
            model.protoleak.encode(processor(images[start : start + 16])["pixel_values"])
    return time.perf_counter() - started


def network_seconds(validated: int) -> float:
    """Forward and backward over as many latents as an epoch trains on, forward over those it validates."""
    model, size = leakzoo_model(), ProtoLeakImageProcessor.from_pretrained(RECIPE).crop_size // 4
    latents = torch.randn(64, model.config.latent_channels, size, size)
    labels = torch.arange(64) % model.config.num_labels
    model.detector = None

    def epoch() -> None:
        model.train()
        for _ in range(16):  # and 26 more: 1,050 images
            model(latents=latents, labels=labels).loss.backward()
        model(latents=latents[:26], labels=labels[:26]).loss.backward()
        model.eval()
        with torch.no_grad():
            for start in range(0, validated, 64):
                model(latents=latents[: validated - start])

    epoch()
    return median_seconds(epoch, 3)


def sd21_training() -> float:
    config = ProtoLeakConfig(num_labels=10)
    model = ProtoLeakForImageAttribution(config).train()
    model.attach_vae(AutoencoderKL(**SD21))
    pixels, labels = torch.randn(8, 3, 256, 256), torch.arange(8)
    model.protoleak.encode(pixels[:1])
    encoding = median_seconds(lambda: model.protoleak.encode(pixels), 1)
    latents = model.protoleak.encode(pixels)
    step = lambda: model(latents=latents, labels=labels).loss.backward()  # noqa: E731
    step()
    network = median_seconds(step, 3)
    return 10 * (encoding + network) / (encoding + 10 * network)


# --- density and export -------------------------------------------------------------------------------------


def density() -> None:
    """Against scikit-learn's exact setting and its default, D = 128."""
    rng = np.random.default_rng(0)
    sizes = (1_000, 10_000) if QUICK else (1_000, 10_000, 100_000)
    for n in sizes:
        samples, queries = rng.normal(size=(n, 128)), rng.normal(size=(2_000, 128))
        kde = GaussianKDE(bandwidth=0.5).fit(samples)
        ours = median_seconds(lambda kde=kde, q=queries: kde.score_samples(q), 3)
        few = queries[: 200 if n > 10_000 else 2_000]
        exact = KernelDensity(bandwidth=0.5, leaf_size=n).fit(samples)
        theirs = median_seconds(lambda e=exact, q=few: e.score_samples(q), 1) * len(queries) / len(few)
        apart = np.abs(kde.score_samples(few) - exact.score_samples(few)).max()
        target = "10" if n == 10_000 else ""
        measured = f"{theirs / ours:.1f} ({ours:.2f} s; {apart:.0e} nats apart)"
        row(f"scikit-learn's exact KDE over ours, 2,000 x {n:,}", measured, target)
        single = GaussianKDE(bandwidth=0.5, dtype="float32").fit(samples)
        seconds = median_seconds(lambda kde=single, q=queries: kde.score_samples(q), 3)
        off = np.abs(kde.score_samples(queries) - single.score_samples(queries)).max()
        row(f"ours over ours in float32, 2,000 x {n:,}", f"{ours / seconds:.1f} ({off:.0e} nats apart)")
        if n == 1_000 or (n == 10_000 and not QUICK):
            tree = KernelDensity(bandwidth=0.5).fit(samples)
            default = median_seconds(lambda t=tree, q=queries: t.score_samples(q), 1)
            wrong = np.abs(kde.score_samples(queries) - tree.score_samples(queries)).max()
            row(f"its default over ours, 2,000 x {n:,}", f"{default / ours:.1f} ({wrong:.0e} nats apart)")
    if not QUICK:
        code = """
import re, numpy as np
from pathlib import Path
from protoleak import GaussianKDE
memory = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
before, rng = memory("VmRSS"), np.random.default_rng(0)
kde = GaussianKDE(bandwidth=0.5).fit(rng.normal(size=(100_000, 128)))
kde.score_samples(rng.normal(size=(10_000, 128)))
print(memory("VmHWM") - before)
"""
        command = [sys.executable, "-c", code]
        added = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row("memory that KDE 10,000 x 100,000 adds, samples included", f"{float(added):.2f} GB", "1 GB")
    samples = rng.normal(size=(1_000 if QUICK else 10_000, 128))
    ours = median_seconds(lambda: GaussianKDE(bandwidth=None).fit(samples), 1)
    row(f"bandwidth among 25 by 5 folds, n = {len(samples):,}", f"{ours:.2f} s")


def onnx() -> None:
    import onnxruntime
    from protoleak.training.export import export_onnx

    model = leakzoo_model().eval()
    pixels = torch.rand(16, 3, 64, 64) * 2 - 1
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for part in ("network", "whole"):
        with tempfile.TemporaryDirectory() as folder:
            path = export_onnx(model, 64, Path(folder) / "model.onnx", part)
            session = onnxruntime.InferenceSession(str(path), options)
        inputs = pixels if part == "whole" else model.protoleak.encode(pixels)[0]
        feed = {session.get_inputs()[0].name: inputs.numpy()}
        name = "pixel_values" if part == "whole" else "latents"
        with torch.no_grad():
            eager = median_seconds(lambda n=name, x=inputs: model(**{n: x}), 7)
            expected = model(**{name: inputs}).logits.softmax(dim=1).numpy()
        ratio = eager / median_seconds(lambda s=session, f=feed: s.run(None, f), 7)
        logits = torch.from_numpy(session.run(None, feed)[0])
        apart = np.abs(logits.softmax(dim=1).numpy() - expected).max()
        row(f"eager over onnxruntime, {part}, batch of 16", f"{ratio:.2f} (probabilities {apart:.0e} apart)")


def header() -> None:
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | measured | target |\n| --- | --- | --- |", flush=True)


def main() -> None:
    header()
    for part in (start_up, parts, inference, density, onnx, training, training_memory):
        part()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row("peak memory of this benchmark", f"{peak:.2f} GB")


if __name__ == "__main__":
    main()
