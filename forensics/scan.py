"""
Attribution of many files: workers read and decode while the model runs, records are written as they come,
and a run that was stopped goes on where it was.

Under `torchrun` the files are shared out over the processes; the main one joins their records.
"""

import hashlib
import io
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers.utils import cached_file

from ..files_protoleak import printable, read_file, shown_name, write_whole
from ..image_files_protoleak import find_images
from ..image_processing_protoleak import ProtoLeakImageProcessor, open_image, stack_crops
from ..modeling_protoleak import ProtoLeakForImageAttribution
from ..pipeline_protoleak import RECORD_FIELDS, records_of, with_stability
from ..processes import join_processes
from .provenance import contradiction, read_provenance

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

TABLES = (".parquet", ".arrow", ".tar", ".zip")  # that `datasets` takes images of
WEIGHT_FILES = (
    "config.json", "model.safetensors", "density.pkl", "preprocessor_config.json",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """An image of a data set."""

    name: str
    content: bytes


class Attributor:
    """
    A checkpoint, loaded once, that attributes files.

    Args:
        model (`str`): Checkpoint folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        stability (`bool`): Whether [`~Attributor.records`] also tell how stable verdicts are.
    """

    def __init__(self, model: str, revision: str | None = None, stability: bool = False):
        hub = {"revision": revision or "main"}
        self.network = ProtoLeakForImageAttribution.from_pretrained(model, **hub).eval()
        self.processor = ProtoLeakImageProcessor.from_pretrained(model, **hub)
        self.network.check_processor(self.processor)
        self.name, self.revision, self.stability = printable(str(model)), revision, stability
        self.network.drop_decoder()
        self.network.to(join_processes().device)
        self.weights = weight_digests(model, **hub)
        self.facts = {
            "model": self.name,
            "revision": revision,
            "model_sha256": hashlib.sha256(json.dumps(self.weights).encode()).hexdigest(),
            "noise_seed": self.network.config.noise_seed,
            "timesteps": self.network.config.timesteps,
        }

    @property
    def is_main_process(self) -> bool:
        return PartialState().is_main_process

    def open(
        self, file: "Path | Row", done: Collection[tuple[str, str]] = ()
    ) -> tuple[dict[str, Any], Image.Image | None]:
        """
        What is known of a file before the model sees it, and its image: `None` with an error, and without one
        for a file whose name and sha256 are among `done`, which is not decoded.
        """
        name = shown_name(file.name if isinstance(file, Row) else file)
        row = {"file": name, "sha256": None, "width": None, "height": None, "provenance": None}
        row |= {**self.facts, "error": None}
        try:
            content = file.content if isinstance(file, Row) else read_file(file, name)
            row["sha256"] = hashlib.sha256(content).hexdigest()
            if (name, row["sha256"]) in done:
                return row, None
            image = open_image(content, self.processor.max_pixels, name=name)
            row["width"], row["height"] = image.size
            row["provenance"] = read_provenance(content, self.processor.max_pixels, name)
            return row, image
        except (OSError, ValueError, MemoryError) as error:
            row["error"] = str(error) or type(error).__name__
            return row, None

    def read(
        self, file: "Path | Row", done: Collection[tuple[str, str]] = ()
    ) -> tuple[dict[str, Any], list[tuple[np.ndarray, int]]]:
        """
        As [`~Attributor.open`], with the image's pixel values and what it lacks in its place, and with
        `stability` the same of the image after each treatment; none without an image.
        """
        row, image = self.open(file, done)
        try:
            if image is None:
                return row, []
            lack = self.processor.lack_of_evidence(image)
            treated = self.processor.treated(image) if self.stability else []
            return row, [(values, lack) for values in [self.processor.pixel_values(image), *treated]]
        except (OSError, ValueError, MemoryError) as error:
            return row | {"error": str(error) or type(error).__name__}, []

    def records(
        self,
        files: "Iterable[Path | Row]",
        batch_size: int = 8,
        workers: int = 2,
        done: Collection[tuple[str, str]] = (),
    ) -> Iterator[dict[str, Any]]:
        """
        The record of each file, in order: `attribution_record`'s keys and

        - file, sha256, width, height;
        - provenance: what the file says of itself, see `provenance.py`;
        - contradiction: where that contradicts the verdict, in words;
        - model, revision, model_sha256 (of the digests of its files), noise_seed, timesteps;
        - error: `None`, or why the file could not be read; the other values are `None` then;
        - stability, where it was asked for, see [`with_stability`].

        Args:
            files: Images, paths or rows of a data set.
            batch_size (`int`): Images that go through the model at a time, all threads' together.
            workers (`int`): Threads that read and decode.
            done (`Collection[tuple[str, str]]`): `file` and sha256 of those to pass over.
        """
        ahead = batch_size if workers == 1 else 2 * max(batch_size, 2 * workers)
        read = prefetched(partial(self.read, done=done), files, workers, ahead)
        # threads that compute on images of their own keep a CPU busier than all of them on the same ones
        threads = torch.get_num_threads()
        several = min(threads, batch_size) if self.network.device.type == "cpu" else 1
        share = batch_size // several
        batches = iter(lambda: list(islice(read, share)), [])
        first = next(batches, [])
        if len(first) < share:  # there are no more
            yield from self._attribute(first)
            return
        own, begun = partial(torch.set_num_threads, threads // several), max(several, min(batch_size, 2))
        try:
            for records in prefetched(self._attribute, chain([first], batches), several, begun, own):
                yield from records
        finally:
            torch.set_num_threads(threads)  # where threads share one setting

    @torch.inference_mode()
    def _attribute(self, batch: list[tuple[dict[str, Any], list]]) -> list[dict[str, Any]]:
        """The records of what [`~Attributor.read`] gave of several files, without those that are done."""
        verdicts: Iterator[dict[str, Any]] = iter(())
        if pixels := [values for _, several in batch for values in several]:
            crops, lacks = zip(*pixels, strict=True)
            pixel_values = torch.from_numpy(stack_crops(crops)).to(self.network.device)
            output = self.network(pixel_values, return_dict=True)
            verdicts = iter(records_of(output, self.network.config, no_evidence=lacks))
        records = []
        for row, several in batch:
            if several or row["error"] is not None:
                record = (self._stable(*islice(verdicts, len(several))) if several else self._blank()) | row
                told = {"contradiction": contradiction(record["origin"], record["provenance"])}
                records.append(record | told)
        return records

    def _stable(self, record: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
        return with_stability(record, list(others)) if others else record

    def _blank(self) -> dict[str, Any]:
        """The verdict on what could not be read."""
        return dict.fromkeys((*RECORD_FIELDS, "stability") if self.stability else RECORD_FIELDS)


def prefetched(
    function: Callable, items: Iterable, workers: int, ahead: int, initializer: Callable | None = None
) -> Iterator:
    """
    `map(function, items)` by threads, each of which begins with `initializer`, at most `ahead` results in
    advance of what was taken.
    """
    items = iter(items)
    pool = ThreadPoolExecutor(workers, initializer=initializer)
    try:
        waiting = deque(pool.submit(function, item) for item in islice(items, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def weight_digests(model: str, **hub) -> dict[str, str]:
    """sha256 of every file of a checkpoint that verdicts depend on, by its name."""
    digests = {}
    for name in WEIGHT_FILES:
        if path := checkpoint_file(model, name, **hub):
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def checkpoint_file(model: str, name: str, **hub) -> Path | None:
    """Where a file of a checkpoint's folder or Hub id lies, `None` if it has no such file."""
    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if path is None else Path(path)


# --- a run that can be stopped ------------------------------------------------------------------------------


def scan(
    attributor: Attributor,
    paths: "list[str] | Iterator[Path] | Dataset | IterableDataset",
    output: str | os.PathLike | None = None,
    resume: bool = False,
    batch_size: int = 8,
    workers: int = 2,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
    quiet: bool = False,
) -> dict[str, int]:
    """
    Attribute files and folders; with `output` a JSON line a file is written as soon as it is known.

    Args:
        attributor ([`Attributor`]): What attributes them.
        paths: Files, and folders, which are searched recursively; or files that are named one by one; or a
            data set with an image column, which may be streamed: then no more than a few batches of it are in
            memory.
        output: JSON lines.
        resume (`bool`): Go on in an `output` that exists: files that have a record there under their name
            and content (sha256), by this very model, are passed over; those with an error are tried again.
        on_record (`Callable`): Called with each record of this process.
        quiet (`bool`): No progress bar.

    Returns:
        `files`, how many of them were `done` before, `written` and `failed`, over all processes.

    Raises:
        FileExistsError: `output` exists and `resume` is false.
        OSError: it can't be written; what was done stays there.
        ValueError: what is there was not written by this model.
    """
    state = join_processes()
    target = Path(output) if output else None
    if target and state.is_main_process:
        _prepare(target, resume, attributor)
    state.wait_for_everyone()
    done = _done(target) if target and resume else set()
    mine = _share(paths, state.process_index, state.num_processes)
    own = target if target is None or state.num_processes == 1 else _part(target, state.process_index)
    counts = {"files": 0, "done": 0, "written": 0, "failed": 0}
    hidden = quiet or not state.is_main_process or not os.isatty(2)

    files = _counted(tqdm(mine, unit="image", disable=hidden), counts)
    with own.open("ab", buffering=0) if own else nullcontext() as stream:
        for record in attributor.records(files, batch_size, workers, done):
            if stream:
                _append(stream, record, own)
            counts["written"] += 1
            counts["failed"] += record["error"] is not None
            on_record(record)
    counts["done"] = counts["files"] - counts["written"]
    state.wait_for_everyone()
    if state.num_processes > 1:
        counts = _sum_over_processes(counts, state)
        if target and state.is_main_process:
            _join(target, state.num_processes)
    return counts


def _append(stream: io.RawIOBase, record: dict[str, Any], path: Path) -> None:
    line = (json.dumps(record) + "\n").encode()
    try:
        while line:
            line = line[stream.write(line) :]
    except OSError as error:
        raise OSError(
            f"{path} can't be written: {error.strerror or error}. What was done is there; go on with --resume"
        ) from error


def _counted(files: "Iterable[Path | Row]", counts: dict[str, int]) -> "Iterator[Path | Row]":
    for file in files:
        counts["files"] += 1
        yield file


def images_of(name: str, split: str | None, streaming: bool) -> "list[str] | Dataset | IterableDataset":
    """
    What [`scan`] takes for the images of a data set: its rows, of the split `train` unless it is named. A
    folder of image files is searched as a whole, or its folder `split`: `datasets` would take the names of
    files for splits and pass over the others.

    Args:
        name (`str`): Hub id or folder.
        streaming (`bool`): Don't download a data set of the Hub as a whole.
    """
    if Path(name).is_dir() and not _has_tables(Path(name)):
        folder = Path(name, split or "")
        if not folder.is_dir():
            others = sorted(shown_name(p.name) for p in Path(name).iterdir() if p.is_dir())
            raise ValueError(f"{name} has no folder {split!r}; it has {others}")
        return [str(folder)]
    from datasets import load_dataset

    return load_dataset(name, split=split or "train", streaming=streaming)


def _has_tables(folder: Path) -> bool:
    """Whether a folder's images are in tables or archives, or its card says what its splits are."""
    card = folder / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.M):
        return True
    return any(path.suffix in TABLES for path in folder.rglob("*"))


def names_in(lines: Iterable[bytes]) -> Iterator[Path]:
    """The files that lines name, such as those of standard input, as they come."""
    for line in lines:
        if name := line.rstrip(b"\r\n"):
            yield Path(os.fsdecode(name))


def _share(
    paths: "list[str] | Iterator[Path] | Dataset | IterableDataset", process: int, processes: int
) -> "Iterable[Path | Row]":
    """
    What this process attributes: files and rows in turn; of a streamed data set its own files, where there
    are enough of them, so that no process reads what another does.
    """
    if isinstance(paths, list):
        logging.getLogger(find_images.__module__).disabled = process > 0  # one of them tells
        return find_images(paths)[process::processes]
    if isinstance(paths, Iterator):
        if processes > 1:
            raise ValueError("files that are named one by one are for one process")
        return paths
    import datasets
    from datasets.distributed import split_dataset_by_node

    if isinstance(paths, datasets.IterableDataset):
        mine = split_dataset_by_node(paths, process, processes) if processes > 1 else paths
        return _rows(mine, lambda i: f"row {i}" + (f" of part {process}" if processes > 1 else ""))
    mine = paths.shard(processes, process, contiguous=False)
    return _rows(mine, lambda i: f"row {i * processes + process}")


def _rows(rows: "Dataset | IterableDataset", name: Callable[[int], str]) -> "Iterator[Row]":
    """The images of a data set, not decoded."""
    import datasets

    columns = [name for name, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"the data set needs an image column; got {rows.features}")
    image = columns[0]
    for i, row in enumerate(rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))):
        path, content = row[image]["path"], row[image]["bytes"]
        label = name(i) + (f" ({Path(path).name})" if path else "")
        yield Row(label, content if content is not None else Path(path).read_bytes())


def _prepare(target: Path, resume: bool, attributor: Attributor) -> None:
    """Refuse to overwrite; keep what a stopped run left, up to its last whole line, of all processes."""
    parts = sorted(target.parent.glob(f"{target.name}.part*"))
    if not resume and (target.exists() or parts):
        raise FileExistsError(f"{target} exists; pass --resume to go on in it, or name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        return
    records = [record for path in [target, *parts] if path.exists() for record in read_records(path)]
    for record in records:
        if record.get("model_sha256") != attributor.facts["model_sha256"]:
            raise ValueError(
                f"{target} was written by another model ({record.get('model')}); name another file"
            )
        if ("stability" in record) != attributor.stability:
            how = "without" if attributor.stability else "with"
            raise ValueError(f"{target} was written {how} --stability; go on so, or name another file")
    _write_lines(target, [record for record in records if record["error"] is None])
    for part in parts:
        part.unlink()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records in a file of JSON lines, without a last line that was not written to its end."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not a record: {error}") from error


def _write_lines(target: Path, records: Iterable[dict[str, Any]]) -> None:
    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)

    write_whole(target, write)


def _done(target: Path) -> set[tuple[str, str]]:
    return {(record["file"], record["sha256"]) for record in read_records(target)}


def _part(target: Path, process: int) -> Path:
    return target.with_name(f"{target.name}.part{process}")


def _sum_over_processes(counts: dict[str, int], state: PartialState) -> dict[str, int]:
    total = torch.tensor(list(counts.values()), device=state.device)
    torch.distributed.all_reduce(total)
    return dict(zip(counts, total.tolist(), strict=True))


def _join(target: Path, processes: int) -> None:
    """The parts of all processes, which took files in turn, after what was there before."""
    parts = [_part(target, process) for process in range(processes)]
    before = read_records(target) if target.exists() else ()
    in_turn = chain.from_iterable(zip_longest(*map(read_records, parts)))
    _write_lines(target, chain(before, (record for record in in_turn if record is not None)))
    for part in parts:
        part.unlink()


__all__ = ["Attributor", "read_records", "scan"]
