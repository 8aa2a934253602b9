"""
What carries over to sources that training never saw: every lead that was tried on the data set wild, measured
on its train and validation images alone, in two ways. Whole sources are left out in turn, in four folds; a
class whose only source is left out is a stranger to that fold. And of every class with several sources one
alone is learned from, of the cameras half, as of classes that have no more than one.

    python benchmarks/leads.py ../shared/wild [--only GROUP ...]

Macro AUC, accuracy and real against generated are of classes that were known, means over the folds or draws;
coverage is over all of them together. Known against strangers is by the likeliest class's probability where
the row doesn't say otherwise. Shrinkages and scales of the discriminants are those that do best on these same
folds, so all figures are a little high, and alike so. Without labels, all images take part in whitening and
standardising, as they do in training.

What a lead computes of the images is kept under the `datasets` cache, by its name: delete `leads-*.npy` there
when its code changes.
"""

import argparse
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderDC
from protoleak import ProtoLeakImageProcessor
from protoleak.evaluation.splits import SOURCE, load_splits
from protoleak.evaluation.verdicts import REAL
from protoleak.statistics_protoleak import LatentWhitening
from protoleak.training.arguments import TrainingArguments
from protoleak.training.cross_fitting import join_learned
from protoleak.training.initialisation import class_names, fit_whitening, make_model
from protoleak.training.latents import LatentCache, View
from protoleak.training.views import training_views
from sklearn.decomposition import PCA
from sklearn.kernel_approximation import RBFSampler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
import across_sources as across
import pixel_statistics as ps
from left_out import (
    by_discriminants,
    by_gradient,
    by_prototypes,
    by_subspaces,
    choose,
    from_one_source,
    in_folds,
    measure,
)

# the generators' sources that are left out together; others, the cameras', are dealt to the folds in turn
FOLDS = (
    "dcsan/imagen Indyandie/dallecious chrisgoringe/mixed-gguf-converter "
    "PicoTrex/Awesome-Nano-Banana-images joone-org/SentioNova",
    "Zeqiang-Lai/t2i-cmp hvalfangst/daily-panda-image-bot dp0920/cs239_deepfake "
    "preangelleo/illustration-style-samples",
    "lipsumar/ai-bingo dakshces/FourierImageDiffuse songguoxs/gpt4o-image-prompts "
    "Prince2412k2/Book_Visualizer kenton0607/stylegan2-ada-pytorch",
    "bento170502/stable-diffusion jamez-bondos/awesome-gpt4o-images jcraigk/blog blechn/3dcv-final "
    "freestylefly/awesome-gpt-image-2 Extile1/stable-diffusion",
)
AS_THEY_ARE = (View(),)
# the same done to every image, whatever was done to it before
EQUALISED = (View(operator="jpeg", strength=75), View(operator="resize_bicubic", strength=0.5))
LEAKZOO_RECIPE = Path(__file__).parent.parent / "leakzoo" / "recipe"
# scales and timesteps that are pooled and cached together; the bundled checkpoint's come first
POOLED = (((1, 2), (0, 20)), ((4,), (0, 20)), ((1, 2), (60, 150)))
COOCCURRENCES = ("cooccurrences",)
COVARIANCES = ("log_cholesky", "log_cholesky_of_contrast")
EACH = (COOCCURRENCES, COVARIANCES)  # one discriminant each
COLUMNS = {
    "macro_auc": "Macro AUC",
    "accuracy": "accuracy",
    "real_auroc": "real against generated",
    "coverage": "coverage at 90 % precision",
    "auroc": "known against strangers",
}


# --- images and what is computed of them


class Images:
    """Train and validation images of a data set, n in all, and what is computed of them."""

    def __init__(self, dataset: str):
        splits = load_splits(dataset)
        if SOURCE not in splits["train"].column_names:
            raise SystemExit(f"{dataset} has no column {SOURCE!r}")
        self.rows = join_learned(splits)["train"]
        self.names = class_names(self.rows["label"])
        self.labels = np.array([self.names.index(name) for name in self.rows["label"]])
        sources = np.array(self.rows[SOURCE])
        pairs = np.char.add(np.char.add(self.rows["label"], " "), sources)
        self.groups = torch.from_numpy(np.unique(pairs, return_inverse=True)[1])
        real = self.names.index(REAL)
        self.trials = in_folds(self.labels, source_folds(sources))
        self.hard_trials = from_one_source(self.labels, sources, real)
        self.model, processor = make_model(TrainingArguments(dataset_name=[dataset]), self.names)
        self.cache = LatentCache(self.model.eval(), processor, Accelerator())
        self.pixels, self.whitened = ProtoLeakImageProcessor(crop_size=processor.crop_size), False
        digest = hashlib.sha256(b"".join(content for batch in self._contents() for content in batch))
        self.key = digest.hexdigest()[:16]

    def _contents(self) -> Iterator[list[bytes]]:
        for batch in self.rows.select_columns("image").iter(32):
            yield [image["bytes"] or Path(image["path"]).read_bytes() for image in batch["image"]]

    def batches(self, scale: int) -> Iterator[torch.Tensor]:
        """Pixels in [-1, 1], averaged in squares, (32, 3, S, S) each."""
        for contents in self._contents():
            yield F.avg_pool2d(self.pixels(contents)["pixel_values"], scale)

    @torch.no_grad()
    def described(self, name: str, describe: Callable, scale: int, block: int | None) -> torch.Tensor:
        """Features of pixels, or of whitened blocks of so many pixels a side: (n, F)"""
        path = self.cache.folder / f"leads-{self.key}-{name}-{scale}.npy"
        if not path.exists():
            prepare = nn.Sequential()
            if block:
                whitening = LatentWhitening(3 * block**2)
                whitening.fit(F.pixel_unshuffle(pixels, block) for pixels in self.batches(scale))
                prepare = nn.Sequential(nn.PixelUnshuffle(block), whitening)
            features = torch.cat([describe(prepare(pixels)) for pixels in self.batches(scale)])
            whole = path.with_name(f"{os.getpid()}-{path.name}")
            np.save(whole, features.numpy())
            whole.replace(path)
        return torch.from_numpy(np.load(path))

    def pooled(
        self, scales: Sequence[int], timesteps: Sequence[int], views: Sequence[View] = AS_THEY_ARE
    ) -> torch.Tensor:
        """What the model pools, averaged over timesteps, view by view: (n views, S, P)"""
        cells = {}
        for part in POOLED:
            if set(scales) & set(part[0]) and set(timesteps) & set(part[1]):
                features = self._pool(*part, views).unbind(1)
                for scale, of_scale in zip(part[0], features, strict=True):
                    cells |= {(scale, t): x for t, x in zip(part[1], of_scale.unbind(1), strict=True)}
        means = [sum(cells[s, t].float() for t in timesteps) / len(timesteps) for s in scales]
        return torch.stack(means, dim=1)

    def _pool(self, scales: Sequence[int], timesteps: Sequence[int], views: Sequence[View]) -> torch.Tensor:
        """(n views, S, T, P), float16"""
        if not self.whitened:  # takes a while, and leads of pixels do without
            fit_whitening(self.model, self.rows, self.cache)
            self.whitened = True
        config = self.model.config
        config.scales, config.timesteps = list(scales), list(timesteps)
        self.model.protoleak.set_noise_seed(config.noise_seed)  # noise is drawn for these timesteps
        encoded = self.cache.encode_views(self.rows, views).values()
        return torch.cat([features for view in encoded for features, _ in DataLoader(view, 256)])

    @torch.no_grad()
    def reconstructed(self, places: np.ndarray) -> torch.Tensor:
        """What the model pools of some images after LeakZoo's autoencoder, as [`Images.pooled`]: (m, S, P)"""
        path = self.cache.folder / f"leads-{self.key}-reconstructed-{len(places)}.npy"
        if not path.exists():
            self.pooled(*POOLED[0])  # fits the whitening, where it isn't yet
            autoencoder = AutoencoderDC.from_pretrained(LEAKZOO_RECIPE, subfolder="vae").eval()
            base, described = self.model.protoleak, []
            for contents in self.rows.select(places).select_columns("image").iter(8):
                images = [image["bytes"] or Path(image["path"]).read_bytes() for image in contents["image"]]
                latents = autoencoder.encode(self.pixels(images)["pixel_values"]).latent
                decoded = autoencoder.decode(latents).sample.clamp(-1, 1)
                rounded = ((decoded + 1) * 127.5).round() / 127.5 - 1
                described.append(base.describe(base.encode(rounded))["features"].mean(dim=2))
            np.save(path, torch.cat(described).numpy())
        return torch.from_numpy(np.load(path))

    def samples(self, families: Sequence[torch.Tensor]) -> across.Grouped:
        """Standardised features (n views, F) of each family."""
        standardised = [(x - x.mean(dim=0)) / (x.var(dim=0) + 1e-7).sqrt() for x in families]
        labels, count = torch.from_numpy(self.labels), len(self.names)
        return across.Grouped(standardised, labels, count, count * len(families), self.groups)


def source_folds(sources: np.ndarray) -> np.ndarray:
    """When each image is left out, (n,)"""
    fold_of = {source: fold for fold, together in enumerate(FOLDS) for source in together.split()}
    others = np.random.RandomState(0).permutation(sorted(set(sources) - set(fold_of)))
    fold_of |= {source: place % len(FOLDS) for place, source in enumerate(others)}
    return np.array([fold_of[source] for source in sources])


# --- the leads


@dataclass(frozen=True)
class Lead:
    """Features of images, by family, and ways to score classes by them, a row of the table each."""

    group: str
    title: str
    samples: Callable[[Images], across.Grouped]
    methods: dict[str, Callable] = field(default_factory=lambda: {"": by_discriminants})


def of_pixels(
    group: str, title: str, describe: Callable, scales=(1,), block: int | None = None, **options
) -> Lead:  # fmt: skip
    """Features of pixels, or of whitened blocks of pixels, joined over scales."""
    name = "-".join([describe.__name__, *(f"{k}_{v}" for k, v in options.items())])

    def samples(images: Images) -> across.Grouped:
        parts = [images.described(name, partial(describe, **options), s, block) for s in scales]
        return images.samples([torch.cat(parts, dim=1)])

    return Lead(group, title, samples)


def of_model(
    group: str, title: str, families=(COOCCURRENCES,), scales=(1, 2), timesteps=(0, 20), views=AS_THEY_ARE,
    **options,
) -> Lead:  # fmt: skip
    """What the bundled checkpoint's encoder pools, at these scales and timesteps."""

    def samples(images: Images) -> across.Grouped:
        pooled, take = images.pooled(scales, timesteps, views), images.model.protoleak.encoder.take
        return images.samples([take(pooled, parts).flatten(1) for parts in families])

    return Lead(group, title, samples, **options)


def recipe(images: Images) -> across.Grouped:
    """What the bundled checkpoint begins as discriminants of."""
    pooled = images.pooled(*POOLED[0], training_views(1, 2))
    encoder, config = images.model.protoleak.encoder, images.model.config
    encoder.fit_norm([pooled])
    families, labels = encoder.family_features(pooled), torch.from_numpy(images.labels)
    return across.Grouped(families, labels, config.num_labels, config.embedding_size, images.groups)


def canonical(images: Images, views: Sequence[View]) -> across.Grouped:
    """Co-occurrences of each of several views of an image, a family each."""
    described = [of_model("", "", views=(view,)).samples(images).families for view in views]
    return images.samples([family for families in described for family in families])


def kernel(images: Images, linear: bool, gamma: float = 1.0) -> across.Grouped:
    """Random Fourier features of the model's co-occurrences, beside them if `linear`."""
    features = of_model("", "").samples(images).families[0]
    reduced = PCA(min(500, len(features)), random_state=0).fit_transform(features.numpy())
    reduced /= np.sqrt(np.square(reduced).sum(axis=1).mean())
    random = RBFSampler(gamma=gamma, n_components=3000, random_state=0).fit_transform(reduced)
    return images.samples([features] * linear + [torch.from_numpy(random).float()])


def pixel_leads() -> Iterator[Lead]:
    for title, scales in (("native", (1,)), ("reduced twice", (2,)), ("both", (1, 2))):
        yield of_pixels("trial", f"grid statistics of 4x4 blocks, {title}", ps.grid_and_partial, scales, 4)
    yield of_pixels("covariance", "log covariance of 4x4 patches", ps.log_covariance, block=2)
    contrast = "log covariance of 4x4 patches, contrast normalised"
    yield of_pixels("covariance", contrast, ps.covariance_of_contrast, block=2)
    yield of_pixels("spectra", "radial spectra", ps.spectra)
    yield of_pixels("spectra", "harmonics of period 16", ps.harmonics)
    yield of_pixels("spectra", "cyclic statistics of period 16", ps.cyclic_statistics)
    title, describe = "co-occurrences of luminance's residuals", ps.of_luminance
    fine = dict(first=(1, 2), second=(1, 2), laplace=(1, 2))
    wide = dict(first=(8, 16), second=(4, 8, 16), laplace=(8,))
    yield of_pixels("luminance", f"{title}, steps 1 and 2", describe, **fine)
    yield of_pixels("luminance", f"{title}, steps 4 to 16", describe, **wide)
    for step in (1, 2, 4, 8, 16, 24, 36):
        yield of_pixels("step", f"of the first difference alone, step {step}", describe, first=(step,))
    yield of_pixels("colour", "co-occurrences of blue and of red less luminance", ps.of_chroma)
    for step in (1, 8):
        title = f"differences of red, green and blue that occur together, step {step}"
        yield of_pixels("colour", title, ps.of_triplets, step=step)


def model_leads() -> Iterator[Lead]:
    for scales in ((1,), (2,), (4,), (1, 2), (1, 2, 4)):
        title = f"the model's co-occurrences, scale {', '.join(map(str, scales))}"
        yield of_model("scales", title, scales=scales)
    for t in (0, 20, 60, 150):
        yield of_model("noise", f"at scales 1, 2, noise of t = {t} alone", timesteps=(t,))
    yield of_model("covariances", "the model's covariances", [COVARIANCES])
    title = "covariances and co-occurrences, in one discriminant"
    yield of_model("joined", title, [COOCCURRENCES + COVARIANCES])
    title = "covariances and co-occurrences, a discriminant each, added"
    yield of_model("each", title, EACH, methods=learning())
    bundled = (*EACH, ("ternary_patterns",), ("picture_statistics",))
    yield of_model("pictures", "picture statistics", bundled[3:])
    yield of_model("pictures", "the bundled families without them, added", bundled[:3])
    yield of_model("pictures", "the bundled families, added", bundled)
    prototypes = {f", prototypes a class {n}": partial(by_prototypes, count=n) for n in (1, 2, 4)}
    prototypes |= {
        f", 2 of noise around its mean, draw {seed}": partial(by_prototypes, count=2, seed=seed)
        for seed in range(4)
    }
    yield of_model("prototypes", "the bundled families", bundled, methods=prototypes)
    halves = {", mean over 10 random halves": by_subspaces}
    yield of_model("subspaces", "these", EACH, methods=halves)
    yield of_model("copies", "these with a post-processed copy", EACH, views=training_views(1, 1))
    yield of_model("copies", "these with three post-processed copies", EACH, views=training_views(1, 3))
    yield Lead("kernel", "random Fourier features of co-occurrences", partial(kernel, linear=False))
    yield Lead("kernel", "and co-occurrences themselves, added", partial(kernel, linear=True))
    yield Lead("recipe", "the bundled checkpoint's recipe, with two of its three copies", recipe)


def source_leads() -> Iterator[Lead]:
    """Of the model's co-occurrences, all of them."""
    yield of_model("sources", "co-occurrences", methods=by_sources())
    steps = {f", epochs {n} of contrast": partial(across.by_contrast, steps=4 * n) for n in (2, 10, 25)}
    yield of_model("contrastive", "co-occurrences", methods=steps)
    robust = {
        f", 30 steps of {name}": partial(across.by_robust_loss, penalty=penalty, steps=30)
        for name, penalty in (("group DRO", None), ("V-REx", 10.0), ("the mean over sources", 0.0))
    }
    yield of_model("robust", "co-occurrences", methods=robust)
    scatters = {
        f" in the scatter within classes, times {weight}": partial(across.by_equalising, weight=weight)
        for weight in (0.1, 1, 5, 20)
    }
    methods = {" as further images": by_discriminants} | scatters
    title = "co-occurrences, every image's JPEG and its reduction"
    yield of_model("equalised", title, views=AS_THEY_ARE + EQUALISED, methods=methods)
    for title, views in (
        ("JPEG", EQUALISED[:1]),
        ("reduction", EQUALISED[1:]),
        ("JPEG, reduction", EQUALISED),
    ):
        yield Lead(
            "canonical", f"co-occurrences of the image's {title} alone", partial(canonical, views=views)
        )
        views = AS_THEY_ARE + views
        yield Lead("canonical", f"of the image and its {title}, added", partial(canonical, views=views))


def by_sources() -> dict[str, Callable]:
    """What a class's sources differ in, more or less of it, and a mean for each source."""
    methods = {
        f", scatter between a class's sources times {weight}": partial(
            across.by_source_scatter, weight=weight
        )
        for weight in (0, 0.5, 2, 5, 10)
    }
    for name, only in (("a class", None), ("cameras", 0)):
        for softness in (1, 4):
            title = f", a mean for each source of {name}, softness {softness}"
            methods[title] = partial(across.by_subclasses, softness=softness, only=only)
    return methods


def learning() -> dict[str, Callable]:
    """Discriminants as they are, and learned on."""
    methods = {"": by_discriminants}
    for rate in (3e-4, 3e-5):
        for epochs in (1, 4, 12):
            title = f", then AdamW at {rate:.0e}, epochs {epochs}"
            methods[title] = partial(by_gradient, epochs=epochs, learning_rate=rate)
    return methods


def rows(lead: Lead, images: Images) -> Iterator[tuple[str, int, list[dict[str, float]]]]:
    """Title, number of features, and figures of both kinds of trials, of each method of a lead."""
    samples = lead.samples(images)
    count, settings = sum(x.shape[1] for x in samples.families), choose(samples, images.trials)
    for title, score in lead.methods.items():
        figures = [
            measure(score(samples, trials, settings), images.labels, trials, images.names)
            for trials in (images.trials, images.hard_trials)
        ]
        yield f"{lead.title}{title}", count, figures


def stranger_rows(images: Images) -> Iterator[tuple[str, int, list[dict[str, float]]]]:
    """The same of co-occurrences and log covariances, by several scores of strangers."""
    samples = of_model("", "", EACH).samples(images)
    count, settings = sum(x.shape[1] for x in samples.families), choose(samples, images.trials)
    kinds = (images.trials, images.hard_trials)
    scores = [by_discriminants(samples, trials, settings) for trials in kinds]
    familiar = [
        [across.familiarity(samples, *of) for of in zip(trials, [settings] * 9, found, strict=False)]
        for trials, found in zip(kinds, scores, strict=True)
    ]
    for name in familiar[0][0]:
        figures = [
            measure(found, images.labels, trials, images.names, [of[name] for of in each])
            for trials, found, each in zip(kinds, scores, familiar, strict=True)
        ]
        yield f"both families; strangers by {name}", count, figures


def decoder_rows(images: Images) -> Iterator[tuple[str, int, list[dict[str, float]]]]:
    """The same of co-occurrences, with a class more: every third photograph after LeakZoo's autoencoder."""
    places = np.flatnonzero(images.labels == images.names.index(REAL))[::3]
    pooled, take = images.pooled(*POOLED[0]), images.model.protoleak.encoder.take
    features, more = (take(x, COOCCURRENCES).flatten(1) for x in (pooled, images.reconstructed(places)))
    deviation = (features.var(dim=0) + 1e-7).sqrt()
    samples, decoded = images.samples([features]), [(more - features.mean(dim=0)) / deviation]
    settings = choose(samples, images.trials)
    figures = []
    for trials in (images.trials, images.hard_trials):
        scores = across.with_reconstructions(samples, trials, settings, places, decoded)
        figures.append(measure(scores, images.labels, trials, images.names))
    yield "co-occurrences, and photographs after LeakZoo's autoencoder", features.shape[1], figures


def main() -> None:
    leads = [*pixel_leads(), *model_leads(), *source_leads()]
    groups = [*dict.fromkeys(lead.group for lead in leads), "strangers", "decoders"]
    parser = argparse.ArgumentParser(description="What carries over to sources left out.")
    parser.add_argument("dataset", help="what `load_dataset` takes, with a column of sources")
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, metavar="GROUP")
    arguments = parser.parse_args()
    images = Images(arguments.dataset)
    print(f"| lead | features | {' | '.join(COLUMNS.values())} |")
    print("| --- " * (len(COLUMNS) + 2) + "|", flush=True)
    asked = {group: [rows(lead, images) for lead in leads if lead.group == group] for group in groups}
    asked |= {"strangers": [stranger_rows(images)], "decoders": [decoder_rows(images)]}
    chosen = itertools.chain.from_iterable(asked[group] for group in arguments.only)
    for title, count, figures in itertools.chain.from_iterable(chosen):
        cells = [[f"{of[name]:.3f}" for of in figures if not np.isnan(of[name])] for name in COLUMNS]
        print(f"| {title} | {count} | {' | '.join(' / '.join(cell) for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
