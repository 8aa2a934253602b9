"""Many files: order, resuming, tables, processes."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from protoleak.cli import main
from protoleak.forensics import scan as scan_module
from protoleak.forensics import tables
from protoleak.forensics.scan import prefetched, read_records, scan
from protoleak.forensics.tables import write_table


@pytest.fixture
def folder(tmp_path):
    """Eleven different images, and two that are none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(11):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (folder / "03b.png").write_text("no image")
    (folder / "07b.png").write_text("no image either")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(record):
    return (
        record["open_set_score"],
        record["p_value"],
        {a["label"]: a["score"] for a in record["attributions"]},
    )


def assert_same(found, expected):
    assert [r["file"] for r in found] == [r["file"] for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a["label"], a["sha256"], a["error"]) == (b["label"], b["sha256"], b["error"])
        if a["error"] is None:
            for x, y in zip(numbers(a), numbers(b), strict=True):
                assert x == pytest.approx(y, abs=1e-5)


def test_a_stopped_run_goes_on_and_gives_the_same_records(attributor, folder, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "records.jsonl"
    scan(attributor, [str(folder)], whole)
    rows = whole.read_text().splitlines(keepends=True)
    output.write_text("".join(rows[:5]) + rows[5][:40])  # killed while it wrote the sixth
    counts = scan(attributor, [str(folder)], output, resume=True, batch_size=4)
    assert counts == {"files": 13, "done": 4, "written": 9, "failed": 2}  # one of the five was an error
    by_name = lambda records: sorted(records, key=lambda r: r["file"])  # noqa: E731
    assert_same(by_name(lines(output)), by_name(lines(whole)))
    again = scan(attributor, [str(folder)], output, resume=True)
    assert again == {"files": 13, "done": 11, "written": 2, "failed": 2}


def test_nothing_is_overwritten_or_mixed(attributor, checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "records.jsonl"
    output.write_text("precious\n")
    with pytest.raises(FileExistsError, match="--resume"):
        scan(attributor, [str(folder)], output)
    with pytest.raises(ValueError, match="line 1"):
        scan(attributor, [str(folder)], output, resume=True)
    assert output.read_text() == "precious\n"
    output.unlink()
    scan(attributor, [str(folder)], output)
    attributor.facts["model_sha256"] = "of another"
    with pytest.raises(ValueError, match="another model"):
        scan(attributor, [str(folder)], output, resume=True)
    assert main(["attribute", str(folder), "--model", str(checkpoint), "--resume"]) == 2
    assert "--output" in capsys.readouterr().err


def test_a_file_that_moved_or_was_copied_or_changed_is_not_done(attributor, folder, tmp_path):
    output = tmp_path / "records.jsonl"
    scan(attributor, [str(folder)], output)
    (folder / "00.png").rename(folder / "moved.png")
    shutil.copy(folder / "02.png", folder / "copied.png")
    Image.new("RGB", (40, 40), "red").save(folder / "01.png")
    counts = scan(attributor, [str(folder)], output, resume=True)
    assert counts == {"files": 14, "done": 9, "written": 5, "failed": 2}


def test_the_same_image_under_other_names_has_its_rows_after_resuming(attributor, folder, tmp_path):
    for i in range(3):
        shutil.copy(folder / "00.png", folder / f"00_{i}.png")
    whole, output = tmp_path / "whole.jsonl", tmp_path / "records.jsonl"
    scan(attributor, [str(folder)], whole)
    output.write_text("".join(whole.read_text().splitlines(keepends=True)[:2]))
    scan(attributor, [str(folder)], output, resume=True)
    assert_same(lines(output), lines(whole))


def test_records_come_before_all_is_read():
    """Threads read ahead, but no further than they may."""
    read, lock = [], threading.Lock()

    def function(i):
        with lock:
            read.append(i)
        return i * i

    results = prefetched(function, range(1000), workers=3, ahead=10)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    time.sleep(0.1)
    assert len(read) <= 15
    results.close()
    assert len(read) <= 15


@pytest.mark.parametrize("batch_size", [1, 2, 5, 30])
def test_threads_share_the_images_out(attributor, folder, batch_size):
    """In order, a batch a thread, which computes alone; of few images all threads work on each."""
    files, network, used = sorted(folder.iterdir()), attributor.network, []
    expected = list(attributor.records(files, batch_size=1, workers=1))

    def count(_, inputs):
        used.append((len(inputs[0]), torch.get_num_threads()))

    hook = network.register_forward_pre_hook(count)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = list(attributor.records(files, batch_size))
        assert torch.get_num_threads() == 2
        stopped = attributor.records(files, batch_size)
        next(stopped)
        stopped.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        hook.remove()
    assert_same(found, expected)
    assert {number for _, number in used} == ({1} if batch_size in (2, 5) else {2})
    assert max(size for size, _ in used) == {1: 1, 2: 1, 5: 2, 30: 11}[batch_size]


def test_files_named_on_standard_input_are_answered_one_by_one(checkpoint, folder, monkeypatch, capsys):
    names, told = [*sorted(folder.glob("0[0-2].png")), folder / "none.png"], []

    def lines():
        for i, name in enumerate(names):
            told.extend(capsys.readouterr().out.splitlines())
            assert len(told) == i, "the verdict before is out"
            yield bytes(name) + b"\n"

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=lines()))
    assert main(["attribute", "-", "--model", str(checkpoint)]) == 1
    told += capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == [name.name for name in names]
    assert "no such file" in told[-1]


def test_ctrl_c_keeps_what_is_written(checkpoint, folder, tmp_path):
    """In a process of its own, that is interrupted once its first records are on disk."""
    output = tmp_path / "records.jsonl"
    slow = f"""
import signal, sys, time
from protoleak.forensics import scan as scan_module
from protoleak.forensics import tables
from protoleak.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # where pytest itself runs in the background
read = scan_module.Attributor.read
scan_module.Attributor.read = lambda self, file, done: (time.sleep(0.5), read(self, file, done))[1]
sys.exit(main(["attribute", {str(folder)!r}, "--model", {str(checkpoint)!r}, "--output", {str(output)!r},
    "--batch_size", "1", "--workers", "1"]))
"""
    process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while time.time() < deadline and not (output.exists() and output.read_text().count("\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    done = list(read_records(output))
    assert 2 <= len(done) < 13


def test_tables_have_a_row_a_file_and_no_formula(attributor, folder, tmp_path, monkeypatch):
    (folder / "00.png").rename(folder / "=HYPERLINK(1).png")
    monkeypatch.chdir(folder)
    files = [p.relative_to(folder) for p in sorted(folder.iterdir())]
    records = list(attributor.records(files))
    write_table(records, tmp_path / "table.csv")
    write_table(records, tmp_path / "table.parquet")
    with (tmp_path / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(records) == 13
    assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row.values())
    assert any(row["file"] == "'=HYPERLINK(1).png" for row in rows)
    files = {"train": str(tmp_path / "table.parquet")}
    table = load_dataset("parquet", data_files=files, cache_dir=tmp_path / "cache")["train"]
    assert table["sha256"][:] == [record["sha256"] for record in records]
    for name in ("verdict", "origin", "generated_p_value"):
        assert table[name][:] == [record[name] for record in records]
    assert table["ruled_out"][:] == [", ".join(record["ruled_out"] or []) for record in records]
    assert table["p(a)"][:] == [None if r["error"] else numbers(r)[2]["a"] for r in records]
    with pytest.raises(ValueError, match=r"\.csv or \.parquet"):
        write_table(records, tmp_path / "table.xlsx")


def test_cells_can_begin_no_formula_in_any_country():
    cells = {"=1": "'=1", " +1": " '+1", ";=1": ";'=1", "a;\t@b": "a;\t'@b", 'a,"=b': "a,\"'=b"}
    cells |= {"\uff1d1": "'\uff1d1", "\uff20x": "'\uff20x", "a|-b": "a|'-b", "x\n=y": "x\n'=y"}
    cells |= {name: name for name in ("a=b", "a - b", "0 20", "x; y", "")} | {0.5: 0.5, None: None}
    assert {cell: tables._inert(cell) for cell in cells} == cells


def test_two_processes_give_what_one_gives(checkpoint, folder, tmp_path):
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    command = ["attribute", str(folder), "--model", str(checkpoint), "--output"]
    assert main([*command, str(alone)]) == 1  # two files are no images
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, "-m", "protoleak.cli", *command, str(shared)], capture_output=True, text=True
    )
    assert run.stderr.count("2 processes share the work") == 1
    assert "2 of 13 files could not be read" in run.stderr, run.stderr
    assert_same(lines(shared), lines(alone))
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_give_what_their_files_give(attributor, folder, tmp_path, streaming):
    """Streamed or not, alone or shared out over two processes: each image once."""
    files = sorted(p for p in folder.iterdir() if "b" not in p.name)
    (tmp_path / "set" / "train").mkdir(parents=True)
    for file in files:
        (tmp_path / "set" / "train" / file.name).write_bytes(file.read_bytes())
    data = str(tmp_path / "set")
    rows = load_dataset(data, split="train", streaming=streaming, cache_dir=tmp_path / "cache")
    output = tmp_path / "records.jsonl"
    assert scan(attributor, rows, output)["written"] == 11
    by_content = {r["sha256"]: numbers(r) for r in lines(output)}
    expected = {r["sha256"]: numbers(r) for r in attributor.records(files)}
    assert by_content.keys() == expected.keys()
    for key, values in by_content.items():
        for x, y in zip(values, expected[key], strict=True):
            assert x == pytest.approx(y, abs=1e-5)
    shares = [list(scan_module._share(rows, process, 2)) for process in range(2)]
    names = [str(row) for share in shares for row in share]
    assert len(set(names)) == 11
    assert {row.content for share in shares for row in share} == {file.read_bytes() for file in files}


def test_the_decoder_is_not_kept_and_the_model_says_so_when_saved(attributor, tmp_path):
    assert attributor.network.vae.decoder is None
    with pytest.raises(ValueError, match="decoder was dropped"):
        attributor.network.save_pretrained(tmp_path / "copy")


def test_parts_of_a_killed_run_on_two_processes_are_taken_over(attributor, folder, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "records.jsonl"
    scan(attributor, [str(folder)], whole)
    rows = whole.read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl.part0").write_text("".join(rows[0:4:2]))
    (tmp_path / "records.jsonl.part1").write_text("".join(rows[1:3:2]) + rows[3][:10])
    with pytest.raises(FileExistsError):
        scan(attributor, [str(folder)], output)
    counts = scan(attributor, [str(folder)], output, resume=True)
    assert counts["done"] == 3
    assert sorted(r["file"] for r in lines(output)) == sorted(r["file"] for r in lines(whole))
    assert not list(tmp_path.glob("*.part*"))


def test_a_full_disk_is_told_and_leaves_the_previous_table_whole(attributor, folder, tmp_path, monkeypatch):
    records = list(attributor.records(sorted(folder.iterdir())[:2]))
    path = tmp_path / "table.csv"
    write_table(records, path)
    before = path.read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.csv, "DictWriter", full)
    with pytest.raises(OSError, match=r"table\.csv can't be written.*No space left"):
        write_table(records, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.glob("table*")] == ["table.csv"]
