"""Make the data set "wild" again from the public repositories that its images come from.

    python wild/make_wild.py --output_dir runs/wild_data

`facts.parquet` tells of every image the repository, the commit, the path, the file's sha256 and where the
crop was cut. Files are fetched at those commits alone (`git fetch --depth 1 --filter=blob:none`), checked and
cut. Crops wait under `--work_dir`, one file each, so that a killed run goes on where it stopped and a source
that is whole is not fetched again. What cannot be had any more (a repository that is gone, a file that
changed) is reported for each source and listed in missing.json; the rest is written as it is.

The crops are other people's images, many without a stated licence: never pass them on.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value
from PIL import Image as PillowImage
from PIL import ImageOps
from tqdm import tqdm

SIZE = 256
SPLITS = ("train", "validation", "test", "cross", "unknown")
TILE = re.compile(r"#tile(\d+)_(\d+)$")  # "grid.png#tile1_2": row 1, column 2 of a grid of images
# a stalled transfer ends, and nothing tidies up behind a folder that will soon be gone
GIT_SETTINGS = {
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "60",
    "gc.auto": "0",
    "maintenance.auto": "false",
}
CARD = """---
configs:
- config_name: default
  data_files:
{files}---
Made by wild/make_wild.py, whose card tells what this is. Never pass these images on.
"""
TEXTS = ("label", "version", "group", "source", "commit", "path", "sha256_16", "licence", "format")
NUMBERS = ("width", "height", "x", "y")
COLUMNS = (*TEXTS[:-1], "width", "height", "format", "x", "y")
FEATURES = Features(
    {"image": Image()} | {name: Value("int32" if name in NUMBERS else "string") for name in COLUMNS}
)

Fact = dict[str, Any]  # a row of facts.parquet


class GitError(OSError):
    """git could not do what it was asked for; the message is git's own."""


class Repository:
    """A public git repository, of which single files at single commits are fetched.

    Args:
        url: what `git fetch` takes.
        folder: an empty folder for git's objects.

    Raises:
        GitError: from every method, where git fails.
    """

    def __init__(self, url: str, folder: Path):
        self.folder = folder
        self._git("init", "--quiet", "--bare")
        self._git("remote", "add", "origin", url)
        for key, value in GIT_SETTINGS.items():
            self._git("config", key, value)

    def fetch(self, commit: str) -> dict[str, str]:
        """Fetches a commit without its files. Returns the object name of every file by its path."""
        self._git("fetch", "--quiet", "--depth=1", "--filter=blob:none", "--no-tags", "origin", commit)
        listing = self._git("ls-tree", "-r", "-z", commit).decode("utf-8", "surrogateescape")
        entries = (entry.split("\t", 1) for entry in listing.split("\0") if entry)
        return {path: entry.split()[2] for entry, path in entries}

    def fetch_files(self, names: set[str]) -> None:
        """Fetches files by their object names, all at once."""
        self._git(
            *("-c", "fetch.negotiationAlgorithm=noop", "fetch", "--quiet", "--no-tags", "--filter=blob:none"),
            *("--no-write-fetch-head", "--stdin", "origin"),
            stdin="".join(f"{name}\n" for name in sorted(names)).encode(),
        )

    def read(self, name: str) -> bytes:
        """A file by its object name."""
        return self._git("cat-file", "blob", name)

    def _git(self, *arguments: str, stdin: bytes = b"") -> bytes:
        environment = os.environ | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        command = ["git", "-C", str(self.folder), *arguments]
        run = subprocess.run(command, input=stdin, capture_output=True, env=environment)
        if run.returncode:
            lines = run.stderr.decode("utf-8", "replace").strip().splitlines()
            said = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines
            raise GitError(said[0] if said else f"git {arguments[0]} exits with {run.returncode}")
        return run.stdout


def cut(file: bytes, fact: Fact) -> bytes:
    """
    The crop of a file that its fact tells: 256x256 pixels at native resolution, as JPEG of quality 95 without
    chroma subsampling or metadata.

    Sizes and places are those of the upright image (EXIF's orientation is applied). A tile of a grid cannot
    be checked by its sha256, which is not the file's.

    Raises:
        ValueError: the file is another one, no image, of another size, or the crop is grey.
    """
    tile = TILE.search(fact["path"])
    if not tile and (digest := hashlib.sha256(file).hexdigest()[:16]) != fact["sha256_16"]:
        raise ValueError(f"another file: its sha256 starts with another 16 digits ({digest})")
    image, size = decode(file), (fact["width"], fact["height"])
    if tile:
        row, column = int(tile[1]), int(tile[2])
        left, top = column * size[0], row * size[1]
        if left + size[0] > image.width or top + size[1] > image.height:
            raise ValueError(f"an image of {image.width}x{image.height} pixels has no such tile")
        image = image.crop((left, top, left + size[0], top + size[1]))
    if image.size != size:
        raise ValueError(f"an image of {image.width}x{image.height} pixels, not {size[0]}x{size[1]}")
    x, y = fact["x"], fact["y"]
    if x < 0 or y < 0 or x + SIZE > image.width or y + SIZE > image.height:
        raise ValueError(f"a crop at ({x}, {y}) does not lie within {image.width}x{image.height} pixels")
    crop = image.crop((x, y, x + SIZE, y + SIZE))
    red, green, blue = (channel.tobytes() for channel in crop.split())
    if red == green == blue:
        raise ValueError("a grey crop; the data set leaves grey images out")
    stream = io.BytesIO()
    crop.save(stream, format="JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def decode(file: bytes) -> PillowImage.Image:
    """
    A file as an upright RGB image without metadata.

    Raises:
        ValueError: Pillow does not read the file.
    """
    try:
        image = ImageOps.exif_transpose(PillowImage.open(io.BytesIO(file))).convert("RGB")
    except (OSError, SyntaxError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"no image that Pillow reads: {error}") from error
    image.info.clear()
    return image


class Workspace:
    """Where crops wait until all sources were visited: one JPEG each, whole or not there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, fact: Fact) -> Path:
        return self.folder / fact["source"] / f"{fact['sha256_16']}.jpg"

    def make(self, facts: list[Fact], url: str) -> list[Fact]:
        """
        Fetches and cuts the crops of one source that are not there yet.

        Returns:
            The facts of those that could not be had, each with a `reason`.
        """
        wanted = [fact for fact in facts if not self.path(fact).exists()]
        if not wanted:
            return []
        self.path(wanted[0]).parent.mkdir(parents=True, exist_ok=True)
        missing = []
        with tempfile.TemporaryDirectory(prefix="git-", dir=self.folder) as folder:
            repository = Repository(url, Path(folder))
            for commit, of_commit in by_column(wanted, "commit"):
                try:
                    missing += self._make_commit(repository, commit, of_commit)
                except GitError as error:
                    missing += [fact | {"reason": str(error)} for fact in of_commit]
        return [fact for fact in missing if not self.path(fact).exists()]

    def _make_commit(self, repository: Repository, commit: str, facts: list[Fact]) -> list[Fact]:
        listing = repository.fetch(commit)
        names = [listing.get(TILE.sub("", fact["path"])) for fact in facts]
        repository.fetch_files(set(names) - {None})
        missing = []
        for fact, name in zip(facts, names, strict=True):
            if name is None:
                missing.append(fact | {"reason": "the commit has no such file"})
                continue
            try:
                crop = cut(repository.read(name), fact)
            except ValueError as error:
                missing.append(fact | {"reason": str(error)})
            else:
                write_whole(self.path(fact), lambda partial, crop=crop: partial.write_bytes(crop))
        return missing


def by_column(facts: list[Fact], column: str) -> Iterator[tuple[str, list[Fact]]]:
    """The facts of each value of a column, in the order of the values' names."""
    for value in sorted({fact[column] for fact in facts}):
        yield value, [fact for fact in facts if fact[column] == value]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a temporary name beside `path` and moves it there, so that a file is whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    partial.replace(path)


def write_splits(facts: list[Fact], workspace: Workspace, output_dir: Path) -> dict[str, int]:
    """
    Writes the crops that there are, a parquet file a split, and a README.md by which `datasets` loads them.

    Returns:
        The number of rows of each split that has any.

    Raises:
        ValueError: a file there has more rows than would replace it; nothing is written then.
    """
    splits = {
        split: [f for f in facts if f["split"] == split and workspace.path(f).exists()] for split in SPLITS
    }
    splits = {split: rows for split, rows in splits.items() if rows}
    for split, rows in splits.items():
        path = output_dir / f"{split}.parquet"
        if path.exists() and (there := pq.read_metadata(path).num_rows) > len(rows):
            raise ValueError(
                f"{path} has {there} rows, more than the {len(rows)} of this run; name another folder"
            )
    for split, rows in splits.items():
        write_whole(
            output_dir / f"{split}.parquet", lambda path, rows=rows: write_rows(rows, workspace, path)
        )
    if there := [split for split in SPLITS if (output_dir / f"{split}.parquet").exists()]:
        files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in there)
        write_whole(output_dir / "README.md", lambda path: path.write_text(CARD.format(files=files), "utf-8"))
    return {split: len(rows) for split, rows in splits.items()}


def write_rows(rows: list[Fact], workspace: Workspace, path: Path, batch_size: int = 256) -> None:
    """Crops and facts as a parquet file with `datasets`' features."""
    with pq.ParquetWriter(path, FEATURES.arrow_schema, compression="NONE") as writer:
        for start in range(0, len(rows), batch_size):
            batch = [
                {name: row[name] for name in COLUMNS}
                | {"image": {"bytes": workspace.path(row).read_bytes(), "path": workspace.path(row).name}}
                for row in rows[start : start + batch_size]
            ]
            writer.write_table(pa.Table.from_pylist(batch, schema=FEATURES.arrow_schema))


def format_source(source: str, count: int, missing: list[Fact]) -> str:
    """What a source gave, in a line, and a line for every reason why something is missing."""
    lines = [f"{source}: {count - len(missing)} of {count}"]
    for reason, times in Counter(fact["reason"] for fact in missing).most_common():
        first = next(fact["path"] for fact in missing if fact["reason"] == reason)
        lines.append(f"  {times} missing: {reason} ({first}{' and others' if times > 1 else ''})")
    return "\n".join(lines)


def read_facts(path: Path, sources: list[str] | None = None) -> list[Fact]:
    """
    The rows of a table of facts, of some sources or of all.

    Raises:
        ValueError: the table lacks a column, or a source that was asked for is not in it.
    """
    table = pq.read_table(path)
    if lacking := {"split", *COLUMNS} - set(table.column_names):
        raise ValueError(f"{path} lacks the columns {sorted(lacking)}")
    facts = table.to_pylist()
    if unknown := set(sources or ()) - {fact["source"] for fact in facts}:
        raise ValueError(f"{path} has no sources {sorted(unknown)}")
    return [fact for fact in facts if not sources or fact["source"] in sources]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="where the parquet files go")
    parser.add_argument(
        "--work_dir", type=Path, default=Path.home() / ".cache/wild", help="where crops wait in between"
    )
    parser.add_argument("--facts", type=Path, default=Path(__file__).with_name("facts.parquet"))
    parser.add_argument("--base_url", default="https://github.com/", help="what stands before owner/name")
    parser.add_argument("--sources", nargs="+", metavar="OWNER/NAME", help="only these")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Fact]:
    """Makes the data set. Returns the facts of the images that are missing, each with a `reason`."""
    arguments = parse_arguments(argv)
    facts = read_facts(arguments.facts, arguments.sources)
    for folder in (arguments.work_dir, arguments.output_dir):
        folder.mkdir(parents=True, exist_ok=True)
    workspace, missing = Workspace(arguments.work_dir), []
    for source, of_source in tqdm(list(by_column(facts, "source")), unit="source"):
        lost = workspace.make(of_source, f"{arguments.base_url.rstrip('/')}/{source}")
        tqdm.write(format_source(source, len(of_source), lost))
        missing += lost
    rows = write_splits(facts, workspace, arguments.output_dir)
    listing = [{k: fact[k] for k in ("source", "commit", "path", "reason")} for fact in missing]
    text = json.dumps(listing, indent=2, ensure_ascii=False) + "\n"
    write_whole(arguments.output_dir / "missing.json", lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{sum(rows.values())} of {len(facts)} images: {rows}; {len(missing)} missing")
    return missing


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
