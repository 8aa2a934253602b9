"""The last stage: the data set as parquet, its figures, and its card."""

import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoders import encode, load_autoencoder, load_decoder, psnr
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusion_models import GENERATORS, load_samples
from huggingface_hub import DatasetCardData
from photographs import PHOTOS, SHORTER_SIDES, SPLIT_SIZES, TRAINING_PATCHES, load_patches, to_tensor
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from workspace import Workspace


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_parquet(workspace: Workspace) -> None:
    """train, validation, test and unknown as parquet, with image, label (ClassLabel), generator and photo."""
    names = ["real"] + [spec.name for spec in sorted(GENERATORS, key=lambda spec: not spec.known)]
    features = Features(
        image=ImageFeature(), label=ClassLabel(names=names), generator=Value("string"), photo=Value("string")
    )
    for split in (*SPLIT_SIZES, "unknown"):
        path = workspace.output_dir / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(split_rows(workspace, split), features=features).to_parquet(path)


def split_rows(workspace: Workspace, split: str) -> dict[str, list]:
    """The columns of one split: real patches, then the generators' images in the order of GENERATORS."""
    patches, layout_split = load_patches(workspace), "test" if split == "unknown" else split
    classes = [] if split == "unknown" else [("real", "photograph", patches[split])]
    classes += [
        (spec.name, spec.recipe, load_samples(workspace, spec)[layout_split])
        for spec in GENERATORS
        if spec.known == (split != "unknown")
    ]
    rows = {"image": [], "label": [], "generator": [], "photo": []}
    for label, recipe, images in classes:
        rows["image"] += [{"bytes": png(image), "path": None} for image in images]
        rows["label"] += [label] * len(images)
        rows["generator"] += [recipe] * len(images)
        rows["photo"] += patches[f"{layout_split}_photo"].tolist()
    return rows


def content_auroc(real: np.ndarray, generated: np.ndarray) -> float:
    """Cross-validated AUROC of a logistic regression that tells generated from real 8x8 thumbnails."""
    images = to_tensor(np.concatenate([real, generated]))
    features = F.adaptive_avg_pool2d(images, 8).flatten(1).numpy()
    labels = np.repeat([0, 1], [len(real), len(generated)])
    # an image and its twin stay together
    groups = np.concatenate([np.arange(len(real)), np.arange(len(generated))])
    regression = LogisticRegressionCV(
        Cs=8, scoring="roc_auc", max_iter=2000, l1_ratios=(0,), use_legacy_attributes=False
    )
    model = make_pipeline(StandardScaler(), regression)
    scores = cross_val_predict(
        model, features, labels, groups=groups, cv=GroupKFold(5), method="decision_function"
    )
    return float(roc_auc_score(labels, scores))


@torch.inference_mode()
def reconstruction_psnr(workspace: Workspace, split: str) -> dict[str, float]:
    """PSNR of every autoencoder and decoder on the patches of a split."""
    images = to_tensor(load_patches(workspace)[split])
    latents = encode(load_autoencoder(workspace, "a"), images)
    analysis = load_autoencoder(workspace, "analysis")
    decoded = {"analysis": analysis.decode(encode(analysis, images)).sample}
    decoded |= {f"decoder {name.upper()}": load_decoder(workspace, name)(latents) for name in "abcde"}
    return {name: psnr(output, images) for name, output in decoded.items()}


def measure(workspace: Workspace) -> dict:
    """The figures of the data set card: PSNR on held-out photographs, and what thumbnails give away."""
    held_out = {split: reconstruction_psnr(workspace, split) for split in ("test", "validation")}
    content = {}
    for spec in GENERATORS:
        splits = SPLIT_SIZES if spec.known else ("test",)
        real = np.concatenate([load_patches(workspace)[split] for split in splits])
        generated = np.concatenate([load_samples(workspace, spec)[split] for split in splits])
        content[spec.name] = content_auroc(real, generated)
    return {
        "psnr_db": {name: {split: held_out[split][name] for split in held_out} for name in held_out["test"]},
        "content_auroc": content,
        "size_mb": sum(path.stat().st_size for path in workspace.output_dir.glob("*.parquet")) / 1e6,
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
"analysis" is the autoencoder in `recipe/vae/`, in whose latents a model of this data set looks.

All figures on this page are printed by `python leakzoo/make_leakzoo.py --stages figures` and written beside
it as figures.json.

## Photographs

Real patches stay under the licence of their photograph. Generated images, and the script, are under the MIT
licence.

| photo | author | licence | from | split |
| --- | --- | --- | --- | --- |
{photos}
"""


def write_figures(workspace: Workspace) -> None:
    """Print the figures, and write them and the card that shows them."""
    figures = measure(workspace)
    text = json.dumps(figures, indent=2)
    print(text)
    (workspace.output_dir / "figures.json").write_text(text + "\n")
    write_card(workspace.output_dir, figures)


def write_card(folder: Path, figures: dict) -> None:
    """README.md of the data set, from the tables of photographs and generators, and the figures."""
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
