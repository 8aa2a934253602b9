"""What a person meets at the terminal: names, wrong arguments, failures, full disks, Ctrl-C."""

import contextlib
import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from protoleak import ProtoLeakImageProcessor
from protoleak.cli import main
from protoleak.files_protoleak import check_writable, path_of, whole_folder
from protoleak.forensics.scan import Attributor, scan

from . import ROOT
from .test_image_files import encoded

NAMES = (
    b"plain.png",
    b"caf\xe9.png",
    b"new\nline.png",
    b"\x1b[31mred.png",
    rb"back\slash.png",
    "文字.png".encode(),
)


def noise(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.fixture
def strange(tmp_path):
    """A folder with names as they come."""
    folder = tmp_path / "strange"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        (folder / os.fsdecode(name)).write_bytes(encoded(noise(i)))
    return folder


def test_names_are_bytes_everywhere(strange, checkpoint, tmp_path, monkeypatch, capsys):
    """On a strict terminal that knows ASCII alone: each file has its line, row and section."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    command = [str(strange), "--model", str(checkpoint)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert main(["attribute", *command, "--table", str(tmp_path / "table.csv")]) == 0
        assert main(["attribute", *command, "--output", str(tmp_path / "records.jsonl")]) == 0
    terminal.seek(0)
    lines = terminal.read().splitlines()
    assert len(lines) == len(NAMES)
    assert all(line.isprintable() for line in lines)
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as stream:
        names = [row["file"] for row in csv.DictReader(stream)]
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == names
    assert {os.fsencode(path_of(name).name) for name in names} == set(NAMES)
    report = str(tmp_path / "report.html")
    assert main(["report", *map(str, map(path_of, names[:2])), *command[1:], "--output", report]) == 0
    assert "2 images, 0 of which could not be read" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name.rsplit("/", 1)[-1] in page for name in names[:2])
    assert "\x1b" not in page


def test_failures_are_told_on_standard_error_as_they_come(checkpoint, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded(noise(0)))
    (folder / "cut.png").write_bytes(encoded(noise(1))[:500])
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe.png")
    command = ["attribute", str(folder), "--model", str(checkpoint), "--output", str(tmp_path / "o.jsonl")]
    assert main(command) == 1
    told = capsys.readouterr().err.splitlines()
    assert any(line.startswith("cut.png ") and "truncated" in line for line in told)
    assert any(line.startswith("pipe.png ") and "is a pipe" in line for line in told)
    assert told[-1] == "2 of 3 files could not be read"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["attribute", "x.png", "--table", "table.xlsx"], r".csv or .parquet"),
        (["attribute", "x.png", "--table", "file/table.csv"], "file/table.csv can't be written"),
        (["attribute", "x.png", "--output", "file/records.jsonl"], "records.jsonl can't be written"),
        (["attribute", "x.png", "--output", "folder"], "folder can't be written"),
        (["attribute", "x.png", "--output", "a.csv", "--table", "a.csv"], "two files"),
        (["attribute", "x.png", "--split", "test"], "--dataset"),
        (["attribute", "--dataset", "folder", "--split", "test"], "no folder 'test'; it has ['inner']"),
        (["attribute", "x.png", "--batch_size", "0"], "--batch_size: it must be an integer of at least 1"),
        (["attribute", "x.png", "--workers", "-1"], "--workers"),
        (["report", "x.png", "--output", "file/report.html"], "file/report.html can't be written"),
        (["report", "x.png", "--output", "/dev/null"], "/dev/null can't be written"),
        (["report", "folder", "--output", "report.html"], "no images found in folder"),
        (["explain", "folder"], "no images found in folder"),
        (["enroll", "name", "x.png", "--output_dir", "file"], "file can't be written"),
        (["evaluate", "--dataset", "x", "--output_dir", "file/figures"], "file/figures can't be written"),
        (["robustness", "--dataset", "x", "--output_dir", "file"], "file can't be written"),
        (["export", "--output", "file/graph.onnx"], "file/graph.onnx can't be written"),
    ],
)
def test_wrong_arguments_are_told_before_the_work(command, told, tmp_path, monkeypatch, capsys):
    def load(*arguments, **options):
        raise AssertionError("nothing may be loaded first")

    monkeypatch.setattr("protoleak.ProtoLeakForImageAttribution.from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="^2$"):
        raise SystemExit(main(command))
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_can_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in ("file", "new", "a/b/new"):
        check_writable(tmp_path / path)
    for path in (".", "a", "a/b"):
        check_writable(tmp_path / path, is_folder=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_folders_of_outputs_are_made(strange, checkpoint, tmp_path):
    command = ["attribute", str(strange), "--model", str(checkpoint), "--output", str(tmp_path / "a/o.jsonl")]
    assert main([*command, "--table", str(tmp_path / "b/c/table.parquet")]) == 0
    assert (tmp_path / "b/c/table.parquet").stat().st_size > 0


def test_a_folder_given_as_a_data_set_is_attributed_as_a_whole(checkpoint, tmp_path, capsys):
    """Whatever its files are called; or of it the folder that --split names."""
    folder = tmp_path / "set"
    (folder / "test").mkdir(parents=True)
    for i, name in enumerate(("train.png", "a.png", "test_01.png", "test/b.png")):
        (folder / name).write_bytes(encoded(noise(i)))
    command = ["attribute", "--dataset", str(folder), "--model", str(checkpoint)]
    assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main([*command, "--split", "test"]) == 0
    assert capsys.readouterr().out.startswith("b.png")


def test_an_image_processor_that_the_detector_was_not_fitted_with_is_refused(trained, tmp_path, capsys):
    """As where somebody edits preprocessor_config.json: by every command that gives or measures verdicts."""
    model = trained.copy_checkpoint(tmp_path / "model")
    processor = ProtoLeakImageProcessor.from_pretrained(model)
    processor.jpeg_quality = 75
    processor.save_pretrained(model)
    images = str(trained.folder / "unknown/c")
    for command in (
        ["attribute", images],
        ["explain", f"{images}/0.png"],
        ["report", images, "--output", str(tmp_path / "report.html")],
        ["enroll", "c", images, "--output_dir", str(tmp_path / "enrolled")],
        ["evaluate", "--dataset", str(trained.folder)],
    ):
        assert main([*command, "--model", str(model)]) == 2, command
        assert "the detector was fitted on images prepared with" in capsys.readouterr().err
    assert not (tmp_path / "enrolled").exists()


# --- interrupted --------------------------------------------------------------------------------------------


def test_ctrl_c_is_a_word_at_any_time(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Attributor, "__init__", interrupted)
    assert main(["attribute", "x.png"]) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (["-m", "protoleak.cli", "attribute", "x.png"], 130), (["protoleak", "attribute", "x.png"], 130),
        ([str(ROOT / "train.py")], -signal.SIGINT),
    ],
)  # fmt: skip
def test_ctrl_c_is_a_word_while_the_package_is_imported(start, status, tmp_path):
    """As if it came during the first import that takes long; also of the script that pip writes."""
    for name in ("transformers", "torch", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
    (tmp_path / "protoleak").write_text("import sys\nfrom protoleak.cli import main\nsys.exit(main())")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, *start], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (status, "stopped\n")


def test_help_is_there_without_a_slow_import(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "protoleak.cli"]
    told = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (told.returncode, told.stderr) == (0, "")
    wrong = [*command, "attribute", "--resume", "x.png"]
    told = subprocess.run(wrong, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert told.stderr == "protoleak: --resume goes on in the file that --output names; name it\n"


@contextlib.contextmanager
def files_of_at_most(size: int):
    """As on a full disk, every write beyond these bytes of a file fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_ends_a_run_that_can_go_on(attributor, strange, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "records.jsonl"
    scan(attributor, [str(strange)], whole)
    lines = whole.read_text().splitlines(keepends=True)
    size = len("".join(lines[:3])) + 40
    with files_of_at_most(size), pytest.raises(OSError, match=r"records\.jsonl can't be written.*--resume"):
        scan(attributor, [str(strange)], output)
    assert output.stat().st_size == size
    counts = scan(attributor, [str(strange)], output, resume=True)
    assert counts["done"] == 3
    assert [json.loads(line)["file"] for line in output.read_text().splitlines()] == [
        json.loads(line)["file"] for line in lines
    ]


def test_a_full_disk_leaves_no_half_checkpoint(checkpoint, strange, tmp_path, capsys):
    target = tmp_path / "enrolled"
    command = ["enroll", "new", str(strange), "--model", str(checkpoint), "--output_dir", str(target)]
    with files_of_at_most(2000):
        assert main(command) == 2
    assert "enrolled can't be written" in capsys.readouterr().err
    assert not target.exists()


def test_enrolling_names_every_image_that_cant_be_read(checkpoint, strange, tmp_path, capsys):
    bad = ("a.png", "b.png")
    for name in bad:
        (strange / name).write_bytes(b"no image")
    target = tmp_path / "enrolled"
    command = ["enroll", "new", str(strange), "--model", str(checkpoint), "--output_dir", str(target)]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"2 of {len(NAMES) + 2} images can't be read" in told
    lines = told.splitlines()
    assert all(any(line.startswith(f"{strange}/{name} is not an image") for line in lines) for name in bad)
    assert not target.exists()


@pytest.mark.parametrize(
    "message", ["I/O error: No space left on device (os error 28)", "PytorchStreamWriter"]
)
def test_errors_of_the_disk_are_such_whoever_raises_them(tmp_path, message):
    with pytest.raises(OSError, match="run can't be written"), whole_folder(tmp_path / "run"):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="of something else"), whole_folder(tmp_path / "run"):
        raise RuntimeError("of something else")


def test_a_table_stays_where_its_successor_fails(strange, checkpoint, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("before")
    command = ["attribute", str(strange), "--model", str(checkpoint), "--table", str(table)]
    with files_of_at_most(500):
        assert main(command) == 2
    assert table.read_text() == "before"


def test_a_model_that_is_no_folder_is_told_as_such(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["attribute", "x.png", "--model", "runs/typo"]) == 2
    assert "There is no folder runs/typo here, so the Hub was asked for it" in capsys.readouterr().err
