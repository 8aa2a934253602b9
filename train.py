"""
Train Proto-LeakNet on any image data set with `datasets` and Accelerate.

    python train.py                                             # LeakZoo, from scratch
    python train.py --dataset_name FOLDER --output_dir runs/mine
    python train.py --model_name_or_path runs/leakzoo --dataset_name leakzoo FOLDER  # add FOLDER's classes
    torchrun --nproc-per-node 2 train.py ...                    # on several processes or machines

Every image passes the VAE once a view: its latents, or what is pooled of them, are cached under the
`datasets` cache, keyed by all that they depend on.
"""

if __name__ == "__main__":
    import protoleak  # noqa: F401  first, as it gives Ctrl-C a word while all else is imported

import dataclasses
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from protoleak import ProtoLeakForImageAttribution, ProtoLeakImageProcessor
from protoleak.calibration_protoleak import CrossFitted
from protoleak.evaluation.predictions import predict
from protoleak.evaluation.protocol import Evaluation, evaluate_model
from protoleak.evaluation.report import format_summary
from protoleak.evaluation.splits import load_splits
from protoleak.explanation_protoleak import keep_origins, keep_thumbnails
from protoleak.files_protoleak import check_writable, whole_folder
from protoleak.forensics.figures import draw_evaluation, save_figures
from protoleak.processes import join_processes
from protoleak.training.arguments import TrainingArguments, hub_id, public_name
from protoleak.training.card import HubFacts, write_card
from protoleak.training.checks import Screen, look_for_faults, note_scope
from protoleak.training.cross_fitting import join_learned
from protoleak.training.initialisation import (
    begin_across_sources,
    begin_as_discriminant,
    class_names,
    fit_whitening,
    make_model,
    make_processor,
)
from protoleak.training.latents import LatentCache
from protoleak.training.loop import fit
from protoleak.training.publishing import prepare_repository, publish
from protoleak.training.state import STATE_FOLDER
from protoleak.training.views import EncodedSplits, encode_splits
from transformers import HfArgumentParser

logger = logging.getLogger("protoleak.train")
ORIGIN_COLUMNS = {"source", "path", "sha256_16"}  # with all of these an image can be named without showing it


def train(arguments: TrainingArguments, vae: torch.nn.Module | None = None) -> dict[str, Any]:
    """
    Train, fit the open-set detector, write the checkpoint to `output_dir`, and return the summary.

    Args:
        arguments ([`TrainingArguments`]): Of the run.
        vae (`torch.nn.Module`, *optional*): The autoencoder, instead of the one that `arguments` name.
    """
    check_writable(arguments.output_dir, is_folder=True)
    accelerator, seconds = start_accelerator(arguments), {}
    if arguments.push_to_hub and accelerator.is_main_process:
        prepare_repository(arguments.push_to_hub, arguments.private)
    with timed("encoding", seconds):
        splits, names = load_data(arguments)
        faults = look_for_faults(splits["train"], arguments.normalise_format)
        model, processor = make_model(arguments, names, vae)
        new = not arguments.model_name_or_path
        model.to(accelerator.device)
        cache = LatentCache(model, processor, accelerator)
        if new:
            fit_whitening(model, splits["train"], cache)
        data = encode_splits(splits, cache, arguments.orientations, arguments.augmented_views, arguments.seed)
    cross_fitted, history = None, []
    if new:
        with timed("discriminant", seconds):
            if data.validation is None:
                cross_fitted = begin_across_sources(model, data.train.views, splits["train"])
            else:
                begin_as_discriminant(model, data.train, data.validation)
    if cross_fitted is None:
        with timed("training", seconds):
            history = fit(model, data.train, data.validation, arguments, accelerator)
    with timed("evaluation", seconds):
        fit_detector(model, processor, data, splits["train"], cross_fitted, arguments, accelerator)
        note_scope(model, splits["train"], arguments.data_titles, arguments.scope)
        summary = summarise(model, data, splits, history, arguments, accelerator) | faults
    summary["seconds"] = seconds | {"total": round(sum(seconds.values()), 1)}
    if accelerator.is_main_process:
        save(model, processor, summary, arguments)
        if arguments.push_to_hub:
            publish(arguments.output_dir, arguments.push_to_hub, arguments.private)
    accelerator.end_training()
    return summary


def load_data(arguments: TrainingArguments) -> tuple[datasets.DatasetDict, list[str]]:
    """The splits that training takes, without images that can't be read, and the classes in their order."""
    screen = Screen(make_processor(arguments).max_pixels)
    data = (arguments.columns, arguments.dataset_config_name, screen)
    splits = load_splits(arguments.dataset_name, arguments.seed, *data)
    screen.settle(arguments.skip_unreadable)
    names = class_names(splits["train"]["label"], splits.label_names)
    return splits if arguments.model_name_or_path else join_learned(splits), names


@contextmanager
def timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long a step takes."""
    started = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - started, 1)


def start_accelerator(arguments: TrainingArguments) -> Accelerator:
    """Accelerate with the run's precision and tracker, and everything random seeded."""
    join_processes()
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.report_to,
        project_dir=arguments.output_dir,
    )
    if arguments.report_to:
        if not accelerator.log_with:  # Accelerate leaves out, without a word, what is not installed
            raise ImportError(
                f"--report_to {arguments.report_to} needs it; pip install {arguments.report_to}"
            )
        given = dataclasses.asdict(arguments).items()  # of which TensorBoard takes numbers and texts alone
        config = {
            name: value if isinstance(value, int | float | str) else str(value) for name, value in given
        }
        accelerator.init_trackers("protoleak", config=config)
    set_seed(arguments.seed)
    return accelerator


def fit_detector(
    model: ProtoLeakForImageAttribution, processor: ProtoLeakImageProcessor, data: EncodedSplits,
    rows: datasets.Dataset, cross_fitted: CrossFitted | None, arguments: TrainingArguments,
    accelerator: Accelerator,
) -> None:  # fmt: skip
    """
    Fit the open-set detector, calibrated by cross-fitting over sources or by validation images, with what is
    to be told of the images nearest to each prototype.
    """
    held_out = None if data.validation is None else predict(model, data.validation, accelerator)
    model.fit_detector(predict(model, data.known, accelerator), held_out, cross_fitted, processor)
    if set(rows.column_names) >= ORIGIN_COLUMNS:
        origins = rows.select_columns(list(ORIGIN_COLUMNS))
        keep_origins(
            model, lambda i: "{source}: {path} (sha256 {sha256_16})".format(**origins[i % len(rows)])
        )
    if arguments.thumbnails:
        images = rows["image"]  # post-processed ones come after all others in `known`
        keep_thumbnails(model, lambda i: (image := images[i % len(images)])["bytes"] or image["path"])


def summarise(
    model: ProtoLeakForImageAttribution, data: EncodedSplits, splits: datasets.DatasetDict,
    history: list[dict[str, float]], arguments: TrainingArguments, accelerator: Accelerator,
) -> dict[str, Any]:  # fmt: skip
    """All metrics of the finished model on test, cross and unknown images, and the history of the run."""
    names = splits["unknown"]["label"] if "unknown" in splits else None
    resamples = arguments.bootstrap_resamples
    evaluation = evaluate_model(model, data.evaluated, accelerator, names, resamples=resamples)
    evaluation.note_sources(splits)
    return {
        "dataset": " and ".join(arguments.data_titles),
        "epochs": max(0, len(history) - 1),
        **evaluation.to_dict(),
        "history": history,
    }


def save(
    model: ProtoLeakForImageAttribution, processor: ProtoLeakImageProcessor,
    summary: dict[str, Any], arguments: TrainingArguments,
) -> None:  # fmt: skip
    """Write a checkpoint that every loader takes, with its metrics in metrics.json and in its card."""
    folder = Path(arguments.output_dir)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n")
        save_figures(draw_evaluation(Evaluation.from_dict(summary), model.detector), partial / "figures")
    how = (
        f"for {summary['epochs']} epochs"
        if summary["history"]
        else "as a discriminant, chosen and calibrated by leaving sources out"
    )
    base = arguments.model_name_or_path
    origin = f"Trained on {summary['dataset']} {how}{f', from {public_name(base)} on' if base else ''}."
    hub = HubFacts(
        license=arguments.license,
        base_model=hub_id(arguments.model_name_or_path),
        datasets=list(filter(None, map(hub_id, arguments.dataset_name))),
    )
    if write_card(folder, model, origin, arguments.command, summary, hub) and not hub.license:
        logger.info("the card names no licence of the weights; --license says which")
    shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of each file of each epoch's state
    datasets.disable_progress_bars() if not sys.stderr.isatty() else None
    try:
        (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
        summary = train(arguments)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on after its last epoch", file=sys.stderr)
        return 130
    if Accelerator().is_main_process:
        print(format_summary(Evaluation.from_dict(summary).splits))
        print(f"  {summary['epochs']} epochs, {summary['seconds']['total']} s; {arguments.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
