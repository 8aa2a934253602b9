"""The `protoleak` command, thin over the package."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def attribute(arguments: argparse.Namespace) -> int:
    """
    `protoleak attribute`: a verdict for each file; exit status 1 if any could not be read, 130 after Ctrl-C.
    """
    from .forensics.scan import Attributor, read_records, scan, write_table

    if arguments.resume and not arguments.output:
        raise ValueError("--resume goes on in the file that --output names; name it")
    if bool(arguments.paths) == bool(arguments.dataset):
        raise ValueError("name either images and folders, or a --dataset")
    paths = arguments.paths
    if arguments.dataset:
        from datasets import load_dataset

        name, split = arguments.dataset, arguments.split
        paths = load_dataset(name, split=split, streaming=arguments.streaming)
    records = []

    def on_record(record: dict[str, Any]) -> None:
        if not arguments.output:
            print(format_row(record), flush=True)
            records.append(record)

    attributor = Attributor(arguments.model, arguments.revision)
    try:
        counts = scan(
            attributor,
            paths,
            arguments.output,
            arguments.resume,
            arguments.batch_size,
            arguments.workers,
            on_record,
        )
    except KeyboardInterrupt:
        kept = f"; go on with --output {arguments.output} --resume" if arguments.output else ""
        print(f"stopped, and what was done is kept{kept}" if kept else "stopped", file=sys.stderr)
        return 130
    if not attributor.is_main_process:
        return 0
    if arguments.table:
        write_table(read_records(Path(arguments.output)) if arguments.output else records, arguments.table)
    if not counts["found"]:
        where = arguments.dataset or ", ".join(arguments.paths)
        print(f"no images found in {where}", file=sys.stderr)
    if counts["done"]:
        print(f"{counts['done']} files were done before", file=sys.stderr)
    if counts["failed"]:
        print(f"{counts['failed']} of {counts['found']} files could not be read", file=sys.stderr)
    return 1 if counts["failed"] or not counts["found"] else 0


def explain(arguments: argparse.Namespace) -> int:
    """`protoleak explain`: the verdict on each image, and the reasons."""
    from .forensics.provenance import summarise_provenance
    from .forensics.report import Examiner, reasons_in_words, verdict_in_words
    from .image_processing_protoleak import find_images

    examiner = Examiner(arguments.model, arguments.revision)
    failed = 0
    for file in find_images(arguments.images):
        record = examiner.examine(file)
        failed += record["error"] is not None
        if arguments.format == "json":
            print(json.dumps(record), flush=True)
            continue
        print(format_row(record))
        print(f"  {verdict_in_words(record)}")
        if not record["error"]:
            for line in reasons_in_words(record):
                print(f"  - {line}")
            for line in summarise_provenance(record["provenance"]):
                print(f"  - the file's claim: {line}")
        print(flush=True)
    return 1 if failed else 0


def report(arguments: argparse.Namespace) -> int:
    """`protoleak report`: verdicts, reasons and what a second examiner needs, in one file."""
    from tqdm import tqdm

    from .forensics.report import Examiner, write_report
    from .image_processing_protoleak import find_images

    files = find_images(arguments.images)
    if not files:
        raise ValueError(f"no images found in {', '.join(arguments.images)}")
    examiner = Examiner(arguments.model, arguments.revision)
    bar = tqdm(files, unit="image", disable=not sys.stderr.isatty())
    records = [examiner.examine(file) for file in bar]
    path = write_report(examiner, records, arguments.output, arguments.format)
    failed = sum(record["error"] is not None for record in records)
    print(f"{len(records)} images, {failed} of which could not be read; written to {path}")
    return 1 if failed else 0


def enroll(arguments: argparse.Namespace) -> int:
    """`protoleak enroll`: one more generator, from a handful of its images, as a new checkpoint."""
    import torch

    from .files_protoleak import whole_folder
    from .image_processing_protoleak import ProtoLeakImageProcessor, find_images
    from .modeling_protoleak import ProtoLeakForImageAttribution
    from .training.card import write_card

    target = Path(arguments.output_dir)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new folder, so that nothing is overwritten")
    model = ProtoLeakForImageAttribution.from_pretrained(arguments.model)
    processor = ProtoLeakImageProcessor.from_pretrained(arguments.model)
    files = find_images(arguments.images)
    with torch.no_grad():
        outputs = [model(processor(file)["pixel_values"]) for file in files]
    if not outputs:
        raise ValueError(f"no images found in {', '.join(arguments.images)}")
    parts = ("embeddings", "gates", "statistics")
    model.enroll(arguments.name, {part: torch.cat([o[part] for o in outputs]) for part in parts})
    first = len(model.detector.train_["labels"]) - len(files)  # of the new among the training images
    model.keep_thumbnails(lambda i: files[i - first] if i >= first else None)
    with whole_folder(target) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    origin = f"{arguments.name} was enrolled in {arguments.model} from {len(files)} images, without training."
    command = f"protoleak enroll {arguments.name} IMAGES --model {arguments.model} --output_dir {target}"
    write_card(target, model, origin, command)
    count = model.config.num_labels
    print(f"{arguments.name} enrolled from {len(files)} images; {count} classes in {target}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """`protoleak evaluate`: every figure of a checkpoint on a data set's held-out test split."""
    from .evaluation.protocol import evaluate_model, format_bias, format_report
    from .training.latents import LatentCache, View

    model, processor, splits, accelerator = _load_for_evaluation(arguments)
    alike = View(operator="jpeg", strength=90.0) if arguments.normalise_format else View()
    cache = LatentCache(model, processor, accelerator)
    data = {split: cache.encode(rows, alike) for split, rows in splits.items()}
    report = {"model": arguments.model, "dataset": arguments.dataset}
    report["normalised_format"] = arguments.normalise_format
    report |= evaluate_model(
        model,
        data["test"],
        data.get("unknown"),
        accelerator,
        splits["unknown"]["label"] if "unknown" in splits else None,
        arguments.noise_seeds,
    )
    report["format_bias"] = format_bias(splits["test"])
    if accelerator.is_main_process:
        text = format_report(report)
        print(text)
        bias = report["format_bias"]
        if bias["p_value"] < 0.01 and not arguments.normalise_format:
            print(
                "warning: file formats, sizes or metadata alone tell the classes apart, so a model may have "
                "learned those; evaluate with --normalise_format, and train on files that are encoded alike",
                file=sys.stderr,
            )
        _write(arguments.output_dir, "evaluation", report, text)
        if arguments.output_dir:
            from .forensics.figures import draw_evaluation, save_figures

            save_figures(draw_evaluation(report, model.detector), Path(arguments.output_dir) / "figures")
    return 0


def robustness(arguments: argparse.Namespace) -> int:
    """`protoleak robustness`: the figures again after every kind of post-processing."""
    from .evaluation.protocol import format_robustness
    from .evaluation.protocol import robustness as measure

    model, processor, splits, accelerator = _load_for_evaluation(arguments)
    table = measure(model, processor, splits, accelerator, arguments.quick)
    if accelerator.is_main_process:
        text = format_robustness(table)
        print(text)
        _write(arguments.output_dir, "robustness", table, text)
        if arguments.output_dir:
            from .forensics.figures import draw_robustness, save_figures

            save_figures({"robustness": draw_robustness(table)}, arguments.output_dir)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """`protoleak export`: the network, with the VAE or without, as an ONNX file."""
    from .image_processing_protoleak import ProtoLeakImageProcessor
    from .modeling_protoleak import ProtoLeakForImageAttribution
    from .training.export import export_onnx

    target = Path(arguments.output)
    if target.exists():
        raise FileExistsError(f"{target} exists; name another file")
    model = ProtoLeakForImageAttribution.from_pretrained(arguments.model)
    crop_size = ProtoLeakImageProcessor.from_pretrained(arguments.model).crop_size
    print(f"written to {export_onnx(model, crop_size, target, arguments.part)}")
    return 0


def _load_for_evaluation(arguments: argparse.Namespace):
    """Model, processor, the test split with the model's classes, and unknown images where there are any."""
    from accelerate import Accelerator
    from datasets import DatasetDict, concatenate_datasets

    from .evaluation.splits import load_splits, load_unknown
    from .image_processing_protoleak import ProtoLeakImageProcessor
    from .modeling_protoleak import ProtoLeakForImageAttribution

    model = ProtoLeakForImageAttribution.from_pretrained(arguments.model)
    if model.detector is None:
        raise ValueError(
            f"{arguments.model} has no detector, so it has no verdicts to evaluate; run train.py"
        )
    processor = ProtoLeakImageProcessor.from_pretrained(arguments.model)
    found = load_splits(arguments.dataset)
    splits = DatasetDict(test=found["test"])
    unknown = [found["unknown"]] if "unknown" in found else []
    if arguments.unknown:
        unknown.append(load_unknown(arguments.unknown))
    if unknown:
        splits["unknown"] = concatenate_datasets(
            [rows.select_columns(["image", "label"]) for rows in unknown]
        )
    known = set(model.config.id2label.values())
    if missing := known ^ set(splits["test"]["label"]):
        raise ValueError(
            f"{arguments.dataset} and {arguments.model} must have the same classes; they differ by "
            f"{sorted(missing)}"
        )
    if unknown and (both := known & set(splits["unknown"]["label"])):
        raise ValueError(
            f"unknown images must be by generators that the model does not know; got {sorted(both)}"
        )
    accelerator = Accelerator()
    return model.to(accelerator.device), processor, splits, accelerator


def _write(folder: str | None, name: str, values: Any, text: str) -> None:
    if folder:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (target / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def format_row(record: dict[str, Any]) -> str:
    """One attribution as a line of a table: an ambiguous verdict reads "a or b"."""
    name = Path(record["file"]).name
    if record["error"]:
        return f"{name:<30} error: {record['error']}"
    best = ", ".join(f"{a['label']} {a['score']:.3f}" for a in record["attributions"][:2])
    p_value = "" if record["p_value"] is None else f"p(known) {record['p_value']:.3f}"
    verdict = " or ".join(record["prediction_set"] or [record["label"]])
    return f"{name:<30} {p_value:<16} {verdict} ({best})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="protoleak",
        description="Which generator made this image, or was it one nobody has seen, or a camera?",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("attribute", help="a verdict for each image")
    command.add_argument("paths", nargs="*", help="image files, and folders, which are searched recursively")
    command.add_argument("--dataset", help="instead: the images of a data set, Hub id or folder")
    command.add_argument("--split", default="train", help="of --dataset (default: train)")
    command.add_argument("--streaming", action="store_true", help="don't download --dataset as a whole")
    command.add_argument(
        "--model", default=str(HERE), help="checkpoint folder or Hub id (default: the bundled one)"
    )
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")
    command.add_argument("--output", help="write JSON lines here, as they come, instead of a table")
    command.add_argument("--resume", action="store_true", help="go on in --output, without what it has")
    command.add_argument("--table", help="also write a table at the end, .csv or .parquet")
    command.add_argument("--batch_size", type=int, default=16, help="images at a time")
    command.add_argument("--workers", type=int, default=2, help="threads that read images")
    command.set_defaults(run=attribute)
    for name, run, what in (
        ("explain", explain, "the reasons of the verdict on each image"),
        ("report", report, "a report with reasons and all that is needed to repeat it, as one file"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("images", nargs="+", help="image files, and folders")
        command.add_argument("--model", default=str(HERE), help="checkpoint (default: the bundled one)")
        command.add_argument("--revision", help="branch, tag or commit of a Hub id")
        formats = ("text", "json") if name == "explain" else ("html", "json")
        command.add_argument("--format", choices=formats, default=formats[0])
        if name == "report":
            command.add_argument("--output", required=True, help="file to write")
        command.set_defaults(run=run)
    command = commands.add_parser("enroll", help="add a generator from a few images, without training")
    command.add_argument("name", help="what to call it")
    command.add_argument(
        "images", nargs="+", help="its images: files, and folders, which are searched recursively"
    )
    command.add_argument("--model", default=str(HERE), help="checkpoint to extend (default: the bundled one)")
    command.add_argument("--output_dir", required=True, help="new folder for the extended checkpoint")
    command.set_defaults(run=enroll)
    for name, run, what in (
        ("evaluate", evaluate, "every figure on a data set's held-out test split"),
        ("robustness", robustness, "the figures after every kind of post-processing"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--model", default=str(HERE), help="checkpoint (default: the bundled one)")
        command.add_argument("--dataset", default=str(HERE / "leakzoo"), help="as train.py takes it")
        command.add_argument("--unknown", help="images by generators that the model does not know")
        command.add_argument("--output_dir", help=f"write {name}.json and {name}.md there")
        command.set_defaults(run=run)
        if name == "evaluate":
            command.add_argument("--noise_seeds", type=int, default=3, help="draws of the evaluation noise")
            command.add_argument(
                "--normalise_format",
                action="store_true",
                help="encode every image as JPEG of quality 90 first",
            )
        else:
            command.add_argument("--quick", action="store_true", help="fewer images and strengths")
    command = commands.add_parser("export", help="the network as an ONNX file")
    command.add_argument("--model", default=str(HERE), help="checkpoint (default: the bundled one)")
    command.add_argument(
        "--part", choices=("whole", "network"), default="whole", help="with the VAE, or after"
    )
    command.add_argument("--output", required=True, help="file to write")
    command.set_defaults(run=export)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, ImportError) as error:
        print(f"protoleak: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
