"""Data sets as `load_splits` reads them."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from protoleak import ProtoLeakConfig
from protoleak.evaluation.columns import Columns
from protoleak.evaluation.splits import count_sources, groups_of, held_out_images, load_splits
from protoleak.training.initialisation import class_names

from . import ROOT
from .conftest import draw


def test_splits_are_cut_where_there_are_none(tmp_path):
    rng = np.random.default_rng(0)
    for generator in ("real", "a"):
        for step in ("step1", "step2"):
            for root in ("Closed_Set", "Open_Set"):
                target = tmp_path / "wild" / root / (generator if root == "Closed_Set" else "c") / step
                target.mkdir(parents=True, exist_ok=True)
                for i in range(10):
                    draw(generator, rng).save(target / f"{generator}{i}.webp")
    splits = load_splits(str(tmp_path / "wild"))
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 20, "validation": 8, "test": 12, "unknown": 40,
    }  # fmt: skip
    assert set(splits["train"]["label"]) == {"real", "a"}
    assert set(splits["unknown"]["label"]) == {"c"}
    files = [row["path"] for split in ("train", "validation", "test") for row in splits[split]["image"]]
    assert len(set(files)) == 40
    prompts = [set(splits[split]["prompt"]) for split in ("train", "validation", "test")]
    assert sorted(map(len, prompts)) == [2, 3, 5]
    assert len(set.union(*prompts)) == 10, "a prompt is in one split alone"


def test_parquet_files_keep_their_unknown_split(tmp_path, folder):
    splits = load_splits(str(folder))
    (tmp_path / "parquet").mkdir()
    for split, rows in splits.items():
        rows.to_parquet(tmp_path / f"parquet/{split}-00000-of-00001.parquet")
    found = load_splits(str(tmp_path / "parquet"))
    assert {split: rows["label"][:] for split, rows in found.items()} == {
        split: rows["label"][:] for split, rows in splits.items()
    }


def test_a_data_set_that_was_made_again_is_read_again(tmp_path, folder):
    """Also where it has a card, by whose name alone `datasets` knows it."""
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    splits = ("train", "validation", "test")
    files = "".join(f"\n  - split: {split}\n    path: {split}-*.parquet" for split in splits)
    (zoo / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:{files}\n---\n")
    contents = []
    for kept in ("ab", ("a", "real")):
        for split, rows in load_splits(str(folder)).items():
            if split in splits:
                rows = rows.filter(lambda row, kept=kept: row["label"] in kept)
                rows.to_parquet(zoo / f"{split}-00000-of-00001.parquet")
        contents.append(set(load_splits(str(zoo))["train"]["label"]))
    assert contents == [{"a", "b"}, {"a", "real"}]


def test_groups_are_not_split(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    lines = ["file_name,label,group"]
    for i in range(40):
        draw("real", rng).save(tmp_path / f"data/{i}.png")
        lines.append(f"{i}.png,{'ab'[i % 2]},p{i // 4}")
    (tmp_path / "data/metadata.csv").write_text("\n".join(lines))
    splits = load_splits(str(tmp_path / "data"))
    groups = [set(splits[split]["group"]) for split in ("train", "validation", "test")]
    assert sum(map(len, groups)) == 10
    assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])


def write_sources(target, column="source", **changes):
    """Parquet files with sources: splits of two classes, `changes` in the place of these rows."""
    rows = {
        "train": [("real", "s1"), ("real", "s2"), ("a", "s1"), ("a", "s3")],
        "validation": [("real", "s1"), ("a", "s3")],
        "test": [("real", "s2"), ("a", "s1")],
        "cross": [("a", "s2"), ("real", "s4")],  # s2 holds photographs in training, and no image of a
    }
    target.mkdir()
    for split, pairs in (rows | changes).items():
        labels, sources = zip(*pairs, strict=True)
        picture = draw("real", np.random.default_rng(0))
        images = [picture] * len(pairs)
        data = Dataset.from_dict(
            {"image": images, "label": labels, column: sources, "group": range(len(pairs))}
        )
        data.to_parquet(target / f"{split}.parquet")
    return str(target)


def test_sources_and_the_split_of_other_ones_are_kept(tmp_path):
    name = write_sources(tmp_path / "data")
    splits = load_splits(name)
    assert list(splits["cross"]["source"]) == ["s2", "s4"]
    assert count_sources(splits["train"]) == 3
    assert set(held_out_images(name, ["real", "a"])) == {"test", "cross"}
    other = write_sources(tmp_path / "other", column="origin")
    assert count_sources(load_splits(other)["train"]) is None
    assert list(load_splits(other, columns=Columns(source="origin"))["cross"]["source"]) == ["s2", "s4"]
    with pytest.raises(ValueError, match="no column 'camera'"):
        load_splits(other, columns=Columns(source="camera"))


@pytest.mark.parametrize(
    ("cross", "message"),
    [
        ([("b", "s9")], r"has \['b'\]"),
        ([("a", "s3"), ("real", "s4")], r"both have \[\('a', 's3'\)\]"),
        ([("a", "s2"), ("a", "s4")], "'cross', has images of 1 class"),
    ],
)
def test_a_split_of_other_sources_that_is_none_is_refused(tmp_path, cross, message):
    with pytest.raises(ValueError, match=message):
        load_splits(write_sources(tmp_path / "data", cross=cross))


def test_joined_data_sets_keep_sources_and_groups_apart(tmp_path, folder):
    """A data set that tells no sources is one; a group of one is none of the other's."""
    names = [write_sources(tmp_path / "with"), write_sources(tmp_path / "again"), str(folder)]
    splits = load_splits(names)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 8 + 48, "validation": 4 + 24, "test": 4 + 24, "cross": 4, "unknown": 8,
    }  # fmt: skip
    assert set(splits["train"]["source"]) == {"s1", "s2", "s3", str(folder)}
    assert len(set(groups_of(splits["train"]))) == 8 + 48


# --- data as it comes ---------------------------------------------------------------------------------------


def rows_of(labels, column="label", feature=None, image="image", count=4):
    """`count` images of each label, in memory."""
    picture = draw("real", np.random.default_rng(0))
    labels = [label for label in labels for _ in range(count)]
    rows = Dataset.from_dict({image: [picture] * len(labels), column: labels})
    return rows if feature is None else rows.cast_column(column, feature)


@pytest.mark.parametrize(
    ("labels", "column", "feature", "columns", "expected"),
    [
        ([3, 7], "label", None, Columns(), ["3", "7"]),
        ([1.0, 2.0], "label", None, Columns(), ["1", "2"]),
        (["b", "a"], "labels", None, Columns(), ["a", "b"]),
        ([0, 1], "kind", ClassLabel(names=["z", "real"]), Columns(), ["real", "z"]),
        (["b", "a"], "generator", None, Columns(label="generator"), ["a", "b"]),
    ],
)
def test_labels_of_any_name_and_type_are_taken(tmp_path, labels, column, feature, columns, expected):
    rows_of(labels, column, feature, image="photo").save_to_disk(tmp_path / "data")
    splits = load_splits(str(tmp_path / "data"), columns=columns)
    assert sorted(set(splits["train"]["label"])) == expected
    assert set(splits) == {"train", "validation", "test"}
    assert splits["test"].features["image"] == Image(decode=False)


def put(target, labels, count=3):
    """Images of each label in a folder of its own; of "" in `target` itself."""
    for label in labels:
        (target / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            draw("real", np.random.default_rng(i)).save(target / label / f"{i}.png")


def held_out(folder, known=("real", "a", "b")):
    return {split: rows["label"][:] for split, rows in held_out_images(str(folder), known).items()}


@pytest.mark.parametrize("name", ["data", "data [1]*"])
@pytest.mark.parametrize("card", [None, "# My images", "---\nlicense: mit\n---\n"])
def test_only_folders_of_splits_are_read_and_a_readme_is_no_card(tmp_path, name, card):
    """Results, what is hidden, and notes lie beside; strangers without folders have no name."""
    data = tmp_path / name
    put(data / "cross", ["real", "a"])
    put(data / "unknown", ["", "c"])
    put(data, ["figures", ".hidden", "cross/.hidden"])
    draw("a", np.random.default_rng(0)).save(data / "figure.png")
    if card is not None:
        (data / "README.md").write_text(card)
    assert held_out(data) == {"cross": ["a"] * 3 + ["real"] * 3, "unknown": ["unknown"] * 3 + ["c"] * 3}


def test_folders_of_classes_may_be_links(tmp_path):
    put(tmp_path / "kept", ["x", "a"])
    (tmp_path / "data/test").mkdir(parents=True)
    for place in (tmp_path / "data/test/real", tmp_path / "data/test/a"):
        place.symlink_to(tmp_path / "kept" / ("x" if place.name == "real" else "a"))
    assert sorted(held_out(tmp_path / "data")["test"]) == ["a"] * 3 + ["real"] * 3
    put(tmp_path / "kept", ["a"], 4)
    assert len(held_out(tmp_path / "data")["test"]) == 7, "what is new there is noticed"


def test_a_table_may_tell_the_classes_of_one_split(tmp_path):
    put(tmp_path / "test", [""], 4)
    put(tmp_path / "unknown", ["c"])
    lines = [f"{i}.png,{label}" for i, label in enumerate(["real", "a"] * 2)]
    (tmp_path / "test/metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert held_out(tmp_path) == {"test": ["real", "a"] * 2, "unknown": ["c"] * 3}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["test/real"], "'test', has images of 1 class"),
        (["test/real", "unknown/c"], "'test', has images of 1 class"),
        (["test"], "'test': each image must lie in a folder of its class.* such as .*test/2.png$"),
        (["test/real", "test/a/more"], "such as [^,]*test/a/more/2.png$"),
        (["test/real", "test/a", "unknown/b"], r"'unknown': .* does not know; it knows \['b'\]"),
    ],
)
def test_folders_that_tell_no_classes_are_said(tmp_path, places, message):
    put(tmp_path, places)
    with pytest.raises(ValueError, match=message):
        held_out(tmp_path)


def test_splits_without_images_are_said(tmp_path, caplog):
    some, none = rows_of(["real", "a"]), rows_of(["c"]).select([])
    put(tmp_path / "folders/test", ["real", "a"])
    (tmp_path / "folders/unknown").mkdir()
    (tmp_path / "folders/unknown/x.heic").write_bytes(b"x")
    (tmp_path / "tables").mkdir()
    some.to_parquet(tmp_path / "tables/test.parquet")
    none.to_parquet(tmp_path / "tables/unknown.parquet")
    for name in ("folders", "tables"):
        with pytest.raises(ValueError, match=f"{name}, split 'unknown', has no images"):
            held_out(tmp_path / name)
    assert "passed over, as no images that are read here (1)" in caplog.text
    assert "x.heic" in caplog.text
    DatasetDict(test=some, unknown=none).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved has a split without images"):
        held_out(tmp_path / "saved")


def test_a_split_is_a_folder_or_a_table(tmp_path):
    rows_of(["real", "a"]).to_parquet(tmp_path / "test.parquet")
    put(tmp_path / "unknown", ["c"])
    assert held_out(tmp_path) == {"test": ["real"] * 4 + ["a"] * 4, "unknown": ["c"] * 3}
    put(tmp_path / "test", ["real", "a"])
    with pytest.raises(ValueError, match=r"\['test'\] as folders and as parquet files; keep one"):
        held_out(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("my test", "my test.parquet must be named after its split"), ("test", "test.parquet can't be read")],
)
def test_a_table_that_is_none_is_named(tmp_path, name, message):
    (tmp_path / f"{name}.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=message):
        held_out(tmp_path)


def test_arguments_that_a_data_set_has_nothing_for_are_refused(tmp_path):
    rows_of(["real", "a"]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="no column 'place' that tells the sources"):
        held_out_images(str(tmp_path), ["real", "a"], columns=Columns(source="place"))
    with pytest.raises(ValueError, match="no card that tells configurations such as 'two'"):
        held_out_images(str(tmp_path), ["real", "a"], config_name="two")
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"README.md: .* is no YAML"):
        held_out_images(str(tmp_path), ["real", "a"])


def test_what_is_cut_from_images_without_splits_is_said(tmp_path, caplog):
    put(tmp_path, ["real", "a"], 6)
    assert len(held_out(tmp_path)["test"]) == 4
    assert "has no split 'test': of its 12 images the 4 that training would hold out" in caplog.text


def test_what_save_to_disk_wrote_is_read_with_its_splits_and_its_order(tmp_path):
    names = ClassLabel(names=["z", "unseen", "real", "a"])
    rows = rows_of([0, 2, 3], feature=names)
    unknown = rows_of([1], feature=names)
    splits = {"train": rows, "validation": rows, "test": rows, "unknown": unknown}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    loaded = load_splits(str(tmp_path / "data"))
    assert loaded.label_names == ["z", "real", "a"]
    assert class_names(loaded["train"]["label"], loaded.label_names) == ["z", "real", "a"]
    assert set(loaded["unknown"]["label"]) == {"unseen"}
    assert class_names(["b", "real", "a"]) == ["real", "a", "b"], "names alone have no order"


def test_models_number_classes_as_leakzoo_does():
    zoo = load_splits(str(ROOT / "leakzoo"))
    names = class_names(zoo["train"]["label"], zoo.label_names)
    feature = load_dataset(str(ROOT / "leakzoo"))["train"].features["label"]
    assert names == feature.names[: len(names)]
    assert ProtoLeakConfig.from_pretrained(ROOT / "leakzoo/recipe").label_names == names


def test_a_configuration_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    for name, labels in {"one": "ab", "two": "cd"}.items():
        rows_of(labels).to_parquet(tmp_path / f"data/{name}.parquet")
    configs = "".join(f"\n- config_name: {name}\n  data_files: {name}.parquet" for name in ("one", "two"))
    (tmp_path / "data/README.md").write_text(f"---\nconfigs:{configs}\n---\n")
    assert set(load_splits(str(tmp_path / "data"), config_name="two")["train"]["label"]) == {"c", "d"}


@pytest.mark.parametrize(
    ("labels", "feature", "rows"),
    [
        (["a", "b", None], None, "8, 9, 10, 11"),
        ([0, -1, 1], ClassLabel(names=["a", "b"]), "4, 5, 6, 7"),
        (["a", "", "b"], None, "4, 5, 6, 7"),
    ],
)
def test_rows_without_a_label_are_told_by_number(tmp_path, labels, feature, rows):
    data = rows_of(labels, feature=feature)
    data.save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=f"'train': 4 of 12 rows have no label in column 'label'.*{rows}"):
        load_splits(str(tmp_path / "data"))
    known = rows_of("ab")
    DatasetDict(train=known, unknown=data.cast_column("label", Value("string"))).save_to_disk(
        tmp_path / "other"
    )
    if feature is None:
        assert "unknown" in load_splits(str(tmp_path / "other"))["unknown"]["label"][:]


def test_rows_without_an_image_are_told_by_number(tmp_path):
    data = rows_of("ab").to_dict()
    data["image"][3] = None
    Dataset.from_dict(data).cast_column("image", Image()).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"'train': 1 of 8 rows have no image in column 'image'.*: 3;"):
        load_splits(str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("data", "columns", "message"),
    [
        (rows_of("ab", column="kind"), Columns(), r"--label_column_name.*columns: image, kind"),
        (rows_of("ab"), Columns(label="kind"), r"--label_column_name.*columns: image, label"),
        (rows_of("ab"), Columns(image="photo"), r"--image_column_name"),
        (rows_of([[0, 1], [1, 0]]), Columns(), r"one name or number an image; column 'label' holds \[0, 1\]"),
        (rows_of(["a", "unknown"]), Columns(), r"class 'unknown', which is what a verdict calls"),
        (rows_of("ab", count=3), Columns(), r"too few .* a: 1 in train, 1 in validation, 1 in test; b: 1 in"),
        (rows_of("ab", count=2), Columns(), r"too few .* a: 1 in train, 0 in validation, 1 in test; b: 1 in"),
        (rows_of("a"), Columns(), "1 class"),
    ],
)
def test_what_cannot_be_trained_on_is_said_with_what_to_do(tmp_path, data, columns, message):
    data.save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / "data"), columns=columns)


def test_two_columns_of_images_are_not_guessed_between(tmp_path):
    pictures = rows_of("ab")["image"][:]
    data = Dataset.from_dict({"before": pictures, "after": pictures, "label": list("aaaabbbb")})
    data.save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="clearly that of the images; name it by --image_column_name"):
        load_splits(str(tmp_path / "data"))
    splits = load_splits(str(tmp_path / "data"), columns=Columns(image="after"))
    assert splits["train"].column_names == ["before", "image", "label"]


def test_leakzoo_is_what_its_card_says():
    zoo = load_dataset(str(ROOT / "leakzoo"))
    labels = zoo["train"].features["label"]
    known = set(labels.int2str(zoo["train"]["label"][:]))
    unknown = set(labels.int2str(zoo["unknown"]["label"][:]))
    assert len(known) >= 7
    assert len(unknown) >= 3
    assert "real" in known
    assert not known & unknown
    photos = [set(zoo[split]["photo"]) for split in ("train", "validation", "test")]
    assert not (photos[0] & photos[1] | photos[0] & photos[2] | photos[1] & photos[2])
    sizes = {"train": 150, "validation": 50, "test": 80, "unknown": 80}
    for split, size in sizes.items():
        counts = np.bincount(zoo[split]["label"])
        assert set(counts[counts > 0]) == {size}
        assert {image.size for image in zoo[split]["image"][::50]} == {(64, 64)}
        assert {(image.format, image.mode) for image in zoo[split]["image"][::50]} == {("PNG", "RGB")}
    assert sum(path.stat().st_size for path in (ROOT / "leakzoo").glob("*.parquet")) <= 16e6
