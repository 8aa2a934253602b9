"""The `protoleak` command, thin over the package."""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from .files_protoleak import check_writable, printable

HERE = Path(__file__).parent


def attribute(arguments: argparse.Namespace) -> int:
    """
    `protoleak attribute`: a verdict for each file; exit status 1 if any could not be read.
    """
    from .forensics.tables import write_table

    _check_attribute_arguments(arguments)
    from tqdm import tqdm

    from .forensics.scan import Attributor, images_of, names_in, read_records, scan

    output, records = arguments.output, []
    images = arguments.paths or images_of(arguments.dataset, arguments.split, arguments.streaming)
    if arguments.paths == ["-"]:  # each verdict is out before the next name is waited for
        images, arguments.batch_size, arguments.workers = names_in(sys.stdin.buffer), 1, 1

    def show(record: dict[str, Any]) -> None:
        if not output:
            print(format_row(record), flush=True)
        elif record["error"]:
            tqdm.write(format_row(record), file=sys.stderr)
        if arguments.table and not output:
            records.append(record)

    attributor = Attributor(arguments.model, arguments.revision, arguments.stability)
    if attributor.is_main_process:
        print(format_scope(attributor.network.config.scope_title), file=sys.stderr, flush=True)
    options = (arguments.resume, arguments.batch_size, arguments.workers)
    try:
        counts = scan(attributor, images, output, *options, on_record=show)
    except KeyboardInterrupt as error:
        advice = f"what was done is there; go on with --output {output} --resume" if output else ""
        raise KeyboardInterrupt(advice) from error
    if attributor.is_main_process and arguments.table:
        write_table(read_records(Path(output)) if output else records, arguments.table)
    return _tell_counts(arguments, counts) if attributor.is_main_process else 0


def _check_attribute_arguments(arguments: argparse.Namespace) -> None:
    from .forensics.tables import check_table

    if arguments.resume and not arguments.output:
        raise ValueError("--resume goes on in the file that --output names; name it")
    if bool(arguments.paths) == bool(arguments.dataset):
        raise ValueError("name either images and folders, or a --dataset")
    if (arguments.split or arguments.streaming) and not arguments.dataset:
        raise ValueError("--split and --streaming are of a --dataset; name it")
    if arguments.output and arguments.output == arguments.table:
        raise ValueError("--output and --table must name two files")
    if arguments.output:
        check_writable(arguments.output)
    if arguments.table:
        check_table(arguments.table)


def _tell_counts(arguments: argparse.Namespace, counts: dict[str, int]) -> int:
    """What a scan could not do, on standard error; the exit status."""
    if not counts["files"]:
        print(f"no images found in {arguments.dataset or ', '.join(arguments.paths)}", file=sys.stderr)
    if counts["done"]:
        print(f"{counts['done']} files were done before", file=sys.stderr)
    if counts["failed"]:
        print(f"{counts['failed']} of {counts['files']} files could not be read", file=sys.stderr)
    return 1 if counts["failed"] or not counts["files"] else 0


def explain(arguments: argparse.Namespace) -> int:
    """`protoleak explain`: the verdict on each image, and the reasons."""
    from .forensics.report import Examiner, explanation_lines

    files = _find(arguments.images)
    examiner = Examiner(arguments.model, arguments.revision)
    scope, failed = format_scope(examiner.network.config.scope_title), 0
    for file in files:
        record = examiner.examine(file)
        failed += record["error"] is not None
        if arguments.format == "json":
            print(json.dumps(record), flush=True)
        else:
            reasons = [] if record["error"] else [*map(printable, explanation_lines(record)), scope, ""]
            print(format_row(record), *reasons, sep="\n", flush=True)
    return 1 if failed else 0


def report(arguments: argparse.Namespace) -> int:
    """`protoleak report`: verdicts, reasons and what a second examiner needs, in one file."""
    check_writable(arguments.output)
    from tqdm import tqdm

    from .forensics.rendering import write_report
    from .forensics.report import Examiner

    files = _find(arguments.images)
    examiner = Examiner(arguments.model, arguments.revision)
    bar = tqdm(files, unit="image", disable=not sys.stderr.isatty())
    records = [examiner.examine(file) for file in bar]
    path = write_report(examiner, records, arguments.output, arguments.format)
    failed = sum(record["error"] is not None for record in records)
    print(f"{len(records)} images, {failed} of which could not be read; written to {path}")
    return 1 if failed else 0


def _find(paths: list[str]) -> list[Path]:
    from .image_files_protoleak import find_images

    files = find_images(paths)
    if not files:
        raise ValueError(f"no images found in {', '.join(paths)}")
    return files


def enroll(arguments: argparse.Namespace) -> int:
    """`protoleak enroll`: one more generator, from a handful of its images, as a new checkpoint."""
    check_writable(arguments.output_dir, is_folder=True)
    from .training.enrolment import write_enrolled

    files = _find(arguments.images)
    extended = (arguments.model, arguments.name, files, arguments.output_dir, arguments.thumbnails)
    labels = write_enrolled(*extended)
    print(
        f"{arguments.name} enrolled from {len(files)} images; {len(labels)} classes in {arguments.output_dir}"
    )
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """`protoleak evaluate`: every metric of a checkpoint on a data set's test splits."""
    from .evaluation.protocol import evaluate_subject
    from .evaluation.report import format_report, write_results
    from .evaluation.shortcuts import shortcut_warnings

    subject = _subject(arguments)
    evaluation = evaluate_subject(subject, arguments.noise_seeds, arguments.normalise_format)
    if not subject.accelerator.is_main_process:
        return 0
    text = format_report(evaluation)
    print(text)
    if bias := evaluation.main.format_bias:
        for warning in shortcut_warnings({"files": bias}):
            print(f"warning: {warning}", file=sys.stderr)
    if arguments.output_dir:
        from .forensics.figures import draw_evaluation, save_figures

        about = {"model": arguments.model, "dataset": arguments.dataset}
        about["normalised_format"] = arguments.normalise_format
        write_results(arguments.output_dir, "evaluation", about | evaluation.to_dict(), text)
        figures = draw_evaluation(evaluation, subject.model.detector)
        save_figures(figures, Path(arguments.output_dir) / "figures")
    return 0


def robustness(arguments: argparse.Namespace) -> int:
    """`protoleak robustness`: the metrics again after every kind of post-processing."""
    from .evaluation.report import format_robustness, write_results
    from .evaluation.robustness import measure_robustness

    subject = _subject(arguments)
    table = measure_robustness(subject, arguments.quick)
    if subject.accelerator.is_main_process:
        text = format_robustness(table)
        print(text)
        if arguments.output_dir:
            from .forensics.figures import draw_robustness, save_figures

            write_results(arguments.output_dir, "robustness", table, text)
            save_figures({"robustness": draw_robustness(table)}, arguments.output_dir)
    return 0


def _subject(arguments: argparse.Namespace):
    """The checkpoint and the data set that are named, where results can be written."""
    if arguments.output_dir:
        check_writable(arguments.output_dir, is_folder=True)
    from .evaluation.columns import Columns
    from .evaluation.predictions import Subject

    columns = Columns(
        arguments.image_column_name, arguments.label_column_name, source=arguments.source_column
    )
    data = (arguments.dataset, arguments.unknown, columns, arguments.dataset_config_name)
    return Subject.load(arguments.model, *data)


def export(arguments: argparse.Namespace) -> int:
    """`protoleak export`: the network, with the VAE or without, as an ONNX file."""
    target = Path(arguments.output)
    if target.exists():
        raise FileExistsError(f"{target} exists; name another file")
    check_writable(target)
    from .image_processing_protoleak import ProtoLeakImageProcessor
    from .modeling_protoleak import ProtoLeakForImageAttribution
    from .training.export import export_onnx

    model = ProtoLeakForImageAttribution.from_pretrained(arguments.model)
    crop_size = ProtoLeakImageProcessor.from_pretrained(arguments.model).crop_size
    print(f"written to {export_onnx(model, crop_size, target, arguments.part)}")
    return 0


def format_row(record: dict[str, Any]) -> str:
    """One attribution as a line of a table: the record's verdict, and the numbers that it stands on."""
    name = Path(record["file"]).name
    if record["error"]:
        return printable(f"{name:<30} error: {record['error']}")
    best = ", ".join(f"{a['label']} {a['score']:.3f}" for a in record["attributions"][:2])
    p_value = "" if record["p_value"] is None else f"p(known) {record['p_value']:.3f}"
    known, ruled_out = len(record["attributions"]), record["ruled_out"] or []
    rules_out = f"; rules out {len(ruled_out)} of {known}" if ruled_out and not record["is_unknown"] else ""
    first = f"{record['contradiction']}; verdict: " if record["contradiction"] else ""
    return printable(f"{name:<30} {p_value:<16} {first}{record['verdict']} ({best}{rules_out})")


def format_scope(scope: str | None) -> str:
    """What images the verdicts are valid for."""
    return f"scope: {scope or 'not told by this checkpoint'}"


# --- arguments ----------------------------------------------------------------------------------------------


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be an integer of at least 1; got {text!r}")
    return int(text)


def _attribute_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("paths", nargs="*", help="image files, and folders; - reads names, a line each")
    command.add_argument("--dataset", help="instead: the images of a data set, Hub id or folder")
    command.add_argument("--split", help="of --dataset (default: train; of a folder of images: all of it)")
    command.add_argument("--streaming", action="store_true", help="don't download --dataset as a whole")
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")
    command.add_argument("--output", help="write JSON lines here, as they come, instead of a table")
    command.add_argument("--resume", action="store_true", help="go on in --output, without what it has")
    command.add_argument("--table", help="also write a table at the end, .csv or .parquet")
    what = "also tell whether each verdict holds when the image is saved again; four times the work"
    command.add_argument("--stability", action="store_true", help=what)
    command.add_argument("--batch_size", type=_count, default=8, help="images at a time")
    command.add_argument("--workers", type=_count, default=2, help="threads that read images")


def _explain_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="+", help="image files, and folders")
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")
    command.add_argument("--format", choices=("text", "json"), default="text")


def _report_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="+", help="image files, and folders")
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")
    command.add_argument("--format", choices=("html", "json"), default="html")
    command.add_argument("--output", required=True, help="file to write")


def _enroll_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", help="what to call it")
    command.add_argument("images", nargs="+", help="its images: files, and folders, searched recursively")
    command.add_argument("--output_dir", required=True, help="new folder for the extended checkpoint")
    what = "keep small pictures of its images in the checkpoint, for reports"
    command.add_argument("--thumbnails", action="store_true", help=what)


def _measuring_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", required=True, help="as train.py takes it")
    command.add_argument("--unknown", help="images by generators that the model does not know")
    command.add_argument("--output_dir", help="write the results there, as JSON, Markdown and figures")
    for name in ("image_column_name", "label_column_name", "dataset_config_name"):
        command.add_argument(f"--{name}", help="of --dataset, as train.py takes it")
    what = "the data set's column that tells where an image was collected (default: source)"
    command.add_argument("--source_column", default="source", help=what)


def _evaluate_arguments(command: argparse.ArgumentParser) -> None:
    _measuring_arguments(command)
    command.add_argument("--noise_seeds", type=_count, default=3, help="draws of the evaluation noise")
    what = "encode every image as JPEG of quality 90 first"
    command.add_argument("--normalise_format", action="store_true", help=what)


def _robustness_arguments(command: argparse.ArgumentParser) -> None:
    _measuring_arguments(command)
    command.add_argument("--quick", action="store_true", help="fewer images and strengths")


def _export_arguments(command: argparse.ArgumentParser) -> None:
    parts = ("whole", "network")
    command.add_argument("--part", choices=parts, default="whole", help="with the VAE, or what comes after")
    command.add_argument("--output", required=True, help="file to write")


COMMANDS = {  # name: (function, its arguments, what it is for)
    "attribute": (attribute, _attribute_arguments, "a verdict for each image"),
    "explain": (explain, _explain_arguments, "the reasons of the verdict on each image"),
    "report": (
        report,
        _report_arguments,
        "a report with reasons and what is needed to repeat it, as one file",
    ),
    "enroll": (enroll, _enroll_arguments, "add a generator from a few images, without training"),
    "evaluate": (evaluate, _evaluate_arguments, "every metric on test images, also from other sources"),
    "robustness": (robustness, _robustness_arguments, "the metrics after every kind of post-processing"),
    "export": (export, _export_arguments, "the network as an ONNX file"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="protoleak",
        description="Which generator made this image, or was it one nobody has seen, or a camera?",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, add_arguments, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        add_arguments(command)
        which = "checkpoint, folder or Hub id (default: the bundled one)"
        command.add_argument("--model", default=str(HERE), help=which)
        command.set_defaults(run=run)
    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that their encoding lacks end no run
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt as error:
        print("; ".join(filter(None, ["stopped", str(error)])), file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError) as error:
        words = str(error).split("\n")
        if "huggingface.co" in words[0] and not Path(arguments.model).is_dir():
            words.append(f"There is no folder {arguments.model} here, so the Hub was asked for it.")
        print("protoleak:", "\n".join(map(printable, words)), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
