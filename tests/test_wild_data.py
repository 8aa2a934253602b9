"""The script that makes ../shared/wild again, on repositories that the tests make, and its table of facts."""

import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image, JpegImagePlugin

from . import ROOT

SHARED = ROOT.parent / "shared/wild"
FACTS = ROOT / "wild/facts.parquet"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_wild", ROOT / "wild/make_wild.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(folder, *arguments):
    author = {
        f"GIT_{who}_{what}": "test@test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    run = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        run, check=True, capture_output=True, text=True, env=os.environ | author
    ).stdout.strip()


def encode(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def noise(seed, width, height):
    """Smooth noise in colour: survives JPEG of quality 95 nearly unchanged, and no two places are alike."""
    coarse = np.random.default_rng(seed).integers(
        0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8
    )
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def commit(folder, files):
    """Adds files, by their bytes, to a public repository, and returns the commit."""
    if not (folder / ".git").exists():
        folder.mkdir(parents=True)
        git(folder, "init", "--quiet")
        git(folder, "config", "uploadpack.allowFilter", "true")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "images")
    return git(folder, "rev-parse", "HEAD")


def fact(source, commit_name, path, content, image, **values):
    return {
        **{"split": "train", "label": "real", "version": "camera", "group": path, "source": source},
        **{"commit": commit_name, "path": path, "sha256_16": hashlib.sha256(content).hexdigest()[:16]},
        **{"licence": "MIT", "width": image.width, "height": image.height, "format": "PNG", "x": 0, "y": 0},
    } | values


@pytest.fixture
def web(tmp_path):
    """
    Two public repositories and the facts of six images: a photograph, one whose file was replaced by a later
    commit, a WebP in another split under a name that is not ASCII, one with alpha, one of EXIF orientation 6
    and a tile of a grid.
    """
    first, replaced, painting = noise(0, 300, 280), noise(1, 256, 256), noise(2, 400, 300)
    see_through, turned, grid = noise(3, 260, 270), noise(4, 300, 320), noise(5, 512, 512)
    see_through.putalpha(128)
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = {
        "first.png": encode(first, format="PNG"),
        "replaced.png": encode(replaced, format="PNG"),
        "obrázky/věž a liška.webp": encode(painting, format="WEBP", lossless=True),
        "alpha.png": encode(see_through, format="PNG"),
        "turned.jpg": encode(turned, format="JPEG", quality=98, exif=exif, comment=b"by ann"),
        "grid.png": encode(grid, format="PNG"),
    }
    a, b = tmp_path / "web/ann/photos", tmp_path / "web/bob/paintings"
    old = commit(a, {name: contents[name] for name in ("first.png", "replaced.png")})
    new = commit(a, {"replaced.png": b"gone", "turned.jpg": contents["turned.jpg"]})
    paintings = [name for name in contents if name.startswith("o") or name in ("alpha.png", "grid.png")]
    only = commit(b, {name: contents[name] for name in paintings})
    upright, webp = turned.transpose(Image.Transpose.ROTATE_270), "obrázky/věž a liška.webp"
    tile, tile_bytes = grid.crop((0, 256, 256, 512)), b"not the file's"
    facts = [
        fact("ann/photos", old, "first.png", contents["first.png"], first, x=44, y=13),
        fact("ann/photos", old, "replaced.png", contents["replaced.png"], replaced),
        fact("ann/photos", new, "turned.jpg", contents["turned.jpg"], upright, x=50, y=30, format="JPEG"),
        fact("bob/paintings", only, webp, contents[webp], painting, x=7, y=9, split="cross", format="WEBP"),
        fact("bob/paintings", only, "alpha.png", contents["alpha.png"], see_through, split="unknown", x=3),
        fact("bob/paintings", only, "grid.png#tile1_0", tile_bytes, tile, split="cross"),
    ]
    images = [first, replaced, upright, painting, see_through.convert("RGB"), tile]
    return tmp_path, facts, images


def run(script, web, *options, facts=None):
    """Runs the script over the repositories; returns what is missing."""
    folder, table = web[0], pa.Table.from_pylist(web[1] if facts is None else facts)
    pq.write_table(table, folder / "facts.parquet")
    places = [
        "--output_dir",
        folder / "wild",
        "--work_dir",
        folder / "work",
        "--facts",
        folder / "facts.parquet",
    ]
    return script.main([*map(str, places), "--base_url", f"file://{folder}/web", *options])


def rows_of(folder):
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["path"]: row for row in rows}


def test_the_data_set_is_made_again_and_loads(script, web):
    assert run(script, web) == []
    folder, facts, images = web
    made = load_dataset(str(folder / "wild"), cache_dir=str(folder / "cache"))
    assert {split: rows.num_rows for split, rows in made.items()} == {"train": 3, "cross": 2, "unknown": 1}
    rows = rows_of(folder / "wild")
    for told, image in zip(facts, images, strict=True):
        row = rows[told["path"]]
        assert {name: row[name] for name in told if name != "split"} == {
            name: value for name, value in told.items() if name != "split"
        }
        crop = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert (crop.format, crop.mode, crop.size) == ("JPEG", "RGB", (256, 256))
        assert JpegImagePlugin.get_sampling(crop) == 0  # 4:4:4
        expected = image.crop((told["x"], told["y"], told["x"] + 256, told["y"] + 256))
        difference = np.asarray(crop, dtype=int) - np.asarray(expected, dtype=int)
        assert np.abs(difference).mean() < 2, told["path"]
        assert not crop.getexif()
        assert "comment" not in crop.info


def test_only_the_named_files_of_the_named_commit_are_fetched(script, web):
    folder, facts, _ = web
    extra = np.random.default_rng(0).bytes(100_000)
    told = facts[0]
    commit(folder / "web/ann/photos", {"large.bin": extra})
    (folder / "git").mkdir()
    repository = script.Repository(f"file://{folder}/web/ann/photos", folder / "git")
    head = git(folder / "web/ann/photos", "rev-parse", "HEAD")
    listing = repository.fetch(head)
    assert set(listing) == {"first.png", "replaced.png", "turned.jpg", "large.bin"}
    repository.fetch_files({listing["first.png"]})
    listed = git(folder / "git", "cat-file", "--batch-all-objects", "--batch-check")
    there = {line.split()[0] for line in listed.splitlines()}
    assert listing["first.png"] in there
    assert listing["large.bin"] not in there
    assert hashlib.sha256(repository.read(listing["first.png"])).hexdigest()[:16] == told["sha256_16"]


def test_what_is_gone_is_reported_and_the_rest_is_made(script, web, capsys):
    folder, facts, _ = web
    gone = [
        fact("eve/gone", "0" * 40, f"{name}.png", name.encode(), noise(0, 256, 256), split="test")
        for name in "ab"
    ]
    changed = facts[0] | {"path": "replaced.png", "commit": facts[2]["commit"], "sha256_16": "0" * 16}
    absent = facts[0] | {"path": "absent.png", "sha256_16": "1" * 16}
    no_commit = facts[0] | {"commit": "1" * 40, "sha256_16": "2" * 16}
    missing = run(script, web, facts=[*gone, changed, absent, no_commit, *facts])
    assert Counter(row["source"] for row in missing) == {"eve/gone": 2, "ann/photos": 3}
    reasons = {row["sha256_16"]: row["reason"] for row in missing if row["source"] == "ann/photos"}
    assert "sha256" in reasons["0" * 16]
    assert reasons["1" * 16] == "the commit has no such file"
    assert "1" * 40 in reasons["2" * 16]
    assert len(rows_of(folder / "wild")) == len(facts)
    assert not (folder / "wild/test.parquet").exists()
    shown = capsys.readouterr().out
    assert "ann/photos: 3 of 6" in shown
    assert "eve/gone: 0 of 2" in shown
    assert re.search(r"2 missing: .+ does not appear to be a git repository \(a.png and others\)", shown)
    listed = json.loads((folder / "wild/missing.json").read_text())
    assert {(row["source"], row["path"]) for row in listed} == {(r["source"], r["path"]) for r in missing}


def test_a_source_that_is_whole_is_not_fetched_again(script, web, monkeypatch):
    folder, facts, _ = web
    (folder / "web/bob").rename(folder / "bob")
    assert len(run(script, web)) == 3  # bob's
    fetched = []
    repository = script.Repository

    def count(url, place):
        fetched.append(url.rsplit("/", 1)[-1])
        return repository(url, place)

    monkeypatch.setattr(script, "Repository", count)
    (folder / "bob").rename(folder / "web/bob")
    before = (folder / "wild/train.parquet").read_bytes()
    assert run(script, web) == []
    assert fetched == ["paintings"]
    assert (folder / "wild/train.parquet").read_bytes() == before
    assert not list(folder.rglob("*.partial"))
    assert not list((folder / "work").glob("git-*"))


def test_nothing_is_written_where_nothing_can_be_had(script, web):
    (web[0] / "web").rename(web[0] / "gone")
    assert len(run(script, web)) == len(web[1])
    assert [path.name for path in (web[0] / "wild").iterdir()] == ["missing.json"]


def test_a_killed_run_goes_on_and_leaves_nothing_half(script, web, monkeypatch):
    folder, facts, _ = web
    cut, calls = script.cut, []

    def killed(file, told):
        calls.append(told["path"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return cut(file, told)

    monkeypatch.setattr(script, "cut", killed)
    with pytest.raises(KeyboardInterrupt):
        run(script, web)
    assert not list((folder / "wild").glob("*.parquet"))
    monkeypatch.setattr(script, "cut", lambda file, told: (calls.append(told["path"]), cut(file, told))[1])
    calls.clear()
    assert run(script, web) == []
    assert len(calls) == len(facts) - 2


def test_a_write_that_fails_leaves_the_file_as_it_was(script, tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"whole")

    def fail(partial):
        partial.write_bytes(b"ha")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        script.write_whole(path, fail)
    assert path.read_bytes() == b"whole"


def test_a_larger_file_is_not_overwritten_by_a_smaller_one(script, web):
    folder, facts, _ = web
    run(script, web)
    before = {path.name: path.read_bytes() for path in (folder / "wild").glob("*.parquet")}
    with pytest.raises(ValueError, match="has 3 rows, more than the 1 of this run"):
        run(script, web, facts=facts[:1])
    assert {path.name: path.read_bytes() for path in (folder / "wild").glob("*.parquet")} == before


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_images_are_left_out(script, mode):
    image = noise(0, 256, 256).convert("L")
    file = encode(image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode), format="PNG")
    with pytest.raises(ValueError, match="grey"):
        script.cut(file, fact("a/b", "c", "p", file, image))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_images_in_colour_of_every_mode_are_cut(script, mode):
    image = noise(0, 300, 260)
    file = encode(image.convert(mode), format="TIFF")
    crop = script.cut(file, fact("a/b", "c", "p", file, image, x=44, y=4))
    assert Image.open(io.BytesIO(crop)).size == (256, 256)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 301}, "an image of 300x260 pixels, not 301x260"),
        ({"x": 45}, "does not lie within"),
        ({"sha256_16": "f" * 16}, "another file"),
        ({"path": "p#tile1_0"}, "no such tile"),
    ],
)
def test_a_file_that_does_not_fit_its_fact_is_refused(script, values, message):
    image = noise(0, 300, 260)
    file = encode(image, format="PNG")
    with pytest.raises(ValueError, match=message):
        script.cut(file, fact("a/b", "c", "p", file, image) | values)


def test_a_broken_image_is_refused(script):
    file = encode(noise(0, 256, 256), format="PNG")[:2000]
    with pytest.raises(ValueError, match="no image that Pillow reads"):
        script.cut(file, fact("a/b", "c", "p", file, noise(0, 256, 256)))


def test_a_table_without_its_columns_or_an_unknown_source_is_refused(script, web):
    with pytest.raises(ValueError, match=r"lacks the columns \['sha256_16'\]"):
        run(script, web, facts=[{k: v for k, v in web[1][0].items() if k != "sha256_16"}])
    with pytest.raises(ValueError, match=r"no sources \['x/y'\]"):
        run(script, web, "--sources", "x/y")
    assert run(script, web, "--sources", "bob/paintings") == []
    assert set(rows_of(web[0] / "wild")) == {row["path"] for row in web[1][3:]}


def test_the_facts_are_small_whole_and_without_pixels(script):
    assert FACTS.stat().st_size < 300_000
    table = pq.read_table(FACTS)
    assert table.column_names == ["split", *script.COLUMNS]
    facts = table.to_pylist()
    assert Counter(row["split"] for row in facts) == {
        **{"train": 2051, "validation": 446, "test": 814},
        **{"cross": 903, "unknown": 256},
    }
    assert len({row["sha256_16"] for row in facts}) == len(facts)  # the name of its file under --work_dir
    for row in facts:
        assert re.fullmatch("[0-9a-f]{40}", row["commit"])
        assert re.fullmatch("[0-9a-f]{16}", row["sha256_16"])
        assert row["x"] + 256 <= row["width"]
        assert row["y"] + 256 <= row["height"]


def test_the_splits_are_what_the_card_says():
    facts = pq.read_table(FACTS).to_pylist()
    of = {split: [row for row in facts if row["split"] == split] for split in {row["split"] for row in facts}}
    seen = ("train", "validation", "test")
    groups = [{row["group"] for row in of[split]} for split in seen]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    known = {row["label"] for row in of["train"]}
    assert len(known) == 21
    assert {row["label"] for row in of["test"]} == {row["label"] for row in of["validation"]} == known
    assert {row["label"] for row in of["cross"]} < known
    assert not {row["label"] for row in of["unknown"]} & known


def test_the_cards_table_of_classes_is_that_of_the_facts(script):
    facts = pq.read_table(FACTS).to_pylist()
    card = (ROOT / "wild/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \|" + r" (\d*) \|" * 7 + "$", card, re.MULTILINE)
    assert {row[0] for row in rows} == {fact["label"] for fact in facts}
    single = card[card.index("**One source.**") : card.index("They can be known by that source")]
    for label, *cells in rows:
        own = [fact for fact in facts if fact["label"] == label]
        counts = [sum(fact["split"] == split for fact in own) for split in script.SPLITS]
        sources = [{f["source"] for f in own if (f["split"] == "cross") == cross} for cross in (False, True)]
        assert not sources[0] & sources[1]
        assert [int(cell or 0) for cell in cells] == [*counts, *map(len, sources)]
        assert (label in single) == (counts[0] > 0 and len(sources[0]) == 1)


def test_the_cards_table_of_sources_is_that_of_the_facts():
    facts = pq.read_table(FACTS).to_pylist()
    card = (ROOT / "wild/README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[([\w./-]+)\]\(https://github.com/\1\) \| (.+) \| (.+) \| (.+) \| (\d+) \|$", card, re.M
    )
    assert len(rows) == 70
    for source, labels, splits, licences, count in rows:
        own = [row for row in facts if row["source"] == source]
        assert int(count) == len(own)
        assert labels.split(", ") == sorted({row["label"] for row in own})
        assert set(splits.split(", ")) == {row["split"] for row in own}
        assert licences == "; ".join(sorted({row["licence"] for row in own}))


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/wild is not there")
def test_the_facts_are_those_of_the_images(script):
    facts = pq.read_table(FACTS)
    for split in script.SPLITS:
        path = SHARED / f"{split}.parquet"
        assert pq.read_schema(path).equals(script.FEATURES.arrow_schema)
        told = facts.filter(pa.compute.equal(facts["split"], split)).drop_columns("split")
        assert told.to_pylist() == pq.read_table(path, columns=list(script.COLUMNS)).to_pylist()
