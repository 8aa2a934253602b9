"""Checkpoints from a stranger: nothing in them runs, and what is wrong is told."""

import json
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from protoleak import OpenSetDetector, ProtoLeakConfig
from protoleak.checkpoint_protoleak import load_vae
from protoleak.cli import main
from protoleak.density_protoleak import FORMAT_VERSION
from protoleak.forensics import report
from protoleak.forensics.figures import draw_confusion, draw_contributions, draw_crops
from protoleak.state_protoleak import pack
from safetensors.torch import load_file, save_file

# What pickles have been made to run, by the lists of picklescan, fickling and their advisories: module, name,
# and an argument that would leave a trace.
CALLABLES = [
    ("os", "system"), ("posix", "system"), ("os", "popen"), ("os", "mkdir"), ("os", "remove"),
    ("os", "execv"), ("subprocess", "Popen"), ("subprocess", "call"), ("subprocess", "check_output"),
    ("subprocess", "getoutput"),
    ("builtins", "eval"), ("builtins", "exec"), ("builtins", "open"), ("builtins", "__import__"),
    ("builtins", "compile"), ("builtins", "getattr"), ("builtins", "breakpoint"), ("runpy", "run_path"),
    ("runpy", "_run_code"), ("importlib", "import_module"), ("imp", "load_source"), ("code", "interact"),
    ("pdb", "run"), ("bdb", "Bdb.run"), ("cProfile", "run"), ("profile", "run"), ("trace", "Trace.run"),
    ("timeit", "timeit"), ("doctest", "debug_script"), ("pty", "spawn"), ("socket", "create_connection"),
    ("urllib.request", "urlopen"), ("webbrowser", "open"), ("shutil", "rmtree"), ("shutil", "copyfile"),
    ("tempfile", "mktemp"), ("ctypes", "CDLL"), ("asyncio.unix_events", "_UnixSubprocessTransport._start"),
    ("pickle", "loads"), ("_pickle", "loads"), ("marshal", "loads"), ("types", "FunctionType"),
    ("types", "CodeType"), ("operator", "attrgetter"), ("operator", "methodcaller"), ("functools", "partial"),
    ("functools", "reduce"), ("logging.config", "listen"), ("lib2to3.pgen2.grammar", "Grammar.loadm"),
    ("idlelib.autocomplete", "AutoComplete.get_entity"), ("ensurepip", "_run_pip"), ("venv", "create"),
    ("pip", "main"), ("numpy.testing._private.utils", "runstring"), ("numpy.f2py.crackfortran", "getlincoef"),
    ("torch", "load"), ("torch.hub", "load"), ("torch.utils._config_module", "load_config"),
    ("torch.jit.unsupported_tensor_ops", "execWrapper"), ("torch.utils.bottleneck.__main__", "run_cprofile"),
    ("numpy.core.multiarray", "_reconstruct"), ("copyreg", "_reconstructor"), ("builtins", "object"),
]  # fmt: skip


def as_reduce(module: str, name: str, argument: str) -> bytes:
    """GLOBAL, then REDUCE: as protocol 0 writes it."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def as_stack_global(module: str, name: str, argument: str) -> bytes:
    def text(value: str) -> bytes:
        content = value.encode()
        return b"\x8c" + bytes([len(content)]) + content

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def as_inst(module: str, name: str, argument: str) -> bytes:
    return f"(V{argument}\ni{module}\n{name}\n.".encode()


def as_object(module: str, name: str, argument: str) -> bytes:
    return f"(c{module}\n{name}\nV{argument}\no.".encode()


def as_new_object(module: str, name: str, argument: str) -> bytes:
    return b"\x80\x02" + f"c{module}\n{name}\n(V{argument}\nt".encode() + b"\x81."


def hidden_in_a_state(module: str, name: str, argument: str) -> bytes:
    """Where a reader expects the version: a dict that is whole but for one call."""
    return f"(dVversion\nc{module}\n{name}\n(V{argument}\ntRs.".encode()


WAYS = [as_reduce, as_stack_global, as_inst, as_object, as_new_object, hidden_in_a_state]


def test_no_known_attack_runs(tmp_path, capsys):
    victim, path = tmp_path / "victim", tmp_path / "density.pkl"
    attacks = [(way, module, name) for way in WAYS for module, name in CALLABLES]
    for way, module, name in attacks:
        path.write_bytes(way(module, name, str(victim)))
        with pytest.raises(ValueError, match=r"density\.pkl was refused") as caught:
            OpenSetDetector.load(path)
        assert f"{module}.{name}" in str(caught.value), f"{way.__name__} {module}.{name}: {caught.value}"
        assert not victim.exists()
    with capsys.disabled():
        kinds = f"{len(CALLABLES)} callables in {len(WAYS)} ways"
        print(f"\n{len(attacks)} malicious pickles ({kinds}): all refused, none ran")


def test_the_attacks_are_real(tmp_path):
    """The same bytes do run in Python's own reader, so that the test above can fail."""
    for way in (as_reduce, as_stack_global, as_inst, as_object, hidden_in_a_state):
        victim = tmp_path / way.__name__
        pickle.loads(way("os", "mkdir", str(victim)))
        assert victim.is_dir()


def test_growing_pickles_end(tmp_path):
    """Memo tricks that double a value with every few bytes, and lengths that lie."""
    path = tmp_path / "density.pkl"
    doubling = b"\x80\x04]\x94" + b"(h\x00h\x00e" * 5 + b"."
    lies = [b"\x80\x04\x8e" + struct.pack("<Q", 2**62), b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"1"]
    deep = b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b"."
    for content in (doubling, *lies, deep, b"\x80\x04K\x01" * 10_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="refused"):
            OpenSetDetector.load(path)


def nested(depth: int, ways: int = 2) -> list:
    """Lists that share lists: a value `ways` times in one, which is `ways` times in one, ..."""
    value = []
    for _ in range(depth):
        value = [value] * ways
    return value


SHARED = [
    nested(40),
    nested(5, 1000),
    {"labels": nested(19)},
    [{"dtype": "<f8", "shape": [10_000], "data": bytes(80_000)}] * 10_000,
]


@pytest.mark.parametrize("state", SHARED, ids=range(len(SHARED)))
def test_values_that_share_values_are_not_multiplied(tmp_path, state):
    """A file of 283 bytes stood for 2 ** 40 lists."""
    path = tmp_path / "density.pkl"
    path.write_bytes(pickle.dumps({"version": FORMAT_VERSION, "state": state}))
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ValueError, match=r"density\.pkl was refused.*(over and over|larger than the file)"):
        OpenSetDetector.load(path)
    assert time.process_time() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()


def test_a_place_far_out_in_the_memo_is_refused(tmp_path):
    """Python's own reader makes room for 2 ** 28 values, 4 GB, for these 9 bytes."""
    path = tmp_path / "density.pkl"
    for content in (b"\x80\x04]r\xff\xff\xff\x0f.", b"]p268435455\n.", b"]q\xff."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="refused: it asks for room"):
            OpenSetDetector.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature_", "1"), ("temperature_", float("nan")), ("temperature_", -1.0), ("temperature_", None),
        ("labels", "real"), ("labels", []), ("labels", [1, 2, 3]), ("calibration_", [1.0]),
        ("calibration_", np.array([2.0, 1.0])), ("calibration_", np.array([[1.0]])),
        ("calibration_", np.array([1.0, np.nan])), ("class_calibration_", {}), ("class_calibration_", []),
        ("spreads_", {"embeddings": ["0", "1"]}), ("spreads_", {"embeddings": [0.0, 0.0]}),
        ("chosen_", {"embeddings": {"bandwidth": "1"}}), ("open_set_scores", {"embeddings": ["kde"]}),
        ("open_set_scores", {"other": "kde"}), ("own_calibration_", {99: np.zeros(1)}),
        ("generated_calibration_", "0"), ("thumbnails_", {0: "picture"}), ("thumbnails_", {"0": b""}),
        ("origins_", {0: 1}), ("probe_", 1.0), ("train_", []), ("train_", {"embeddings": [1.0]}),
        ("held_out_", 0), ("processor_", {"crop_size": "256"}),
    ],
)  # fmt: skip
def test_state_of_a_wrong_kind_is_named(saved_detector, tmp_path, name, value):
    content = pickle.loads(saved_detector.read_bytes())

    def packed(part):
        if isinstance(part, dict):
            return {k: packed(v) for k, v in part.items()}
        return pack(torch.from_numpy(part)) if isinstance(part, np.ndarray) else part

    content["state"][name] = packed(value)
    path = tmp_path / "density.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"density\.pkl was refused.*{name}"):
        OpenSetDetector.load(path)


@pytest.mark.parametrize("name", ["unknown", "Unknown", "no evidence", "", " ", "a ", "new\nline", "\x1b[2J"])
def test_no_class_is_enrolled_under_a_name_that_misleads(saved_detector, name):
    with pytest.raises(ValueError, match="a class"):
        OpenSetDetector.load(saved_detector).enroll(name, {"embeddings": np.zeros((2, 16))})


def test_labels_that_look_like_formulas_are_drawn_as_they_are(tmp_path):
    labels = [r"$\foo$", "$", "$x^2$ $", "\x00\x1b\n"]
    draw_confusion(labels, np.ones((4, 5), int).tolist()).savefig(tmp_path / "confusion.svg")
    crop = {"x": 0, "y": 0, "width": 9, "height": 9, "weight": 1.0, "real_score": None, "score": 1.0}
    draw_crops(Image.new("RGB", (9, 9)), [crop | {"label": labels[0]}], (9, 9)).savefig(
        tmp_path / "crops.png"
    )
    parts = {"first": labels[0], "second": labels[3], "difference": 1.0, "dimensions": [1.0], "sharing": 0.0}
    draw_contributions(parts).savefig(tmp_path / "contributions.svg")
    for drawing in tmp_path.glob("*.svg"):
        ElementTree.parse(drawing)


METRICS = [
    "{", "[]", '"x"', '{"splits": []}', '{"splits": {"test": 1}}',
    '{"splits": {"test": {"metrics": {"accuracy": "high"}, "intervals": {"accuracy": [0, 1]}}}}',
    '{"splits": {"test": {"metrics": {"accuracy": 1}, "intervals": {"accuracy": "0"}}}}',
]  # fmt: skip


def test_metrics_that_are_none_are_named(tmp_path):
    for measured in METRICS:
        (tmp_path / "metrics.json").write_text(measured)
        with pytest.raises(ValueError, match=r"metrics\.json is not what training writes"):
            report._measured(str(tmp_path), None)


def test_a_crop_that_takes_all_memory_is_refused(checkpoint, capsys):
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"crop_size": 20000}))
    assert "crop_size must be at most 2048" in refused(checkpoint, capsys)


@settings(max_examples=300, deadline=2000, derandomize=True)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_refused_in_bounded_time(content):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzz-{os.getpid()}.pkl"
    path.write_bytes(b"\x80\x04" + content)
    try:
        with pytest.raises(ValueError, match="refused"):
            OpenSetDetector.load(path)
    finally:
        path.unlink()


@settings(max_examples=120, deadline=5000, derandomize=True)
@given(places=st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_damaged_detector_is_refused_or_whole(saved_detector, places):
    """Bytes changed anywhere in a real file: a clear error, or an object of the right shapes."""
    content = bytearray(saved_detector.read_bytes())
    for place, value in places:
        content[place % len(content)] = value
    path = saved_detector.with_name("damaged.pkl")
    path.write_bytes(bytes(content))
    try:
        detector = OpenSetDetector.load(path)
    except ValueError as refusal:
        message = str(refusal)
    else:
        message = "" if detector.train_["embeddings"].ndim == 2 else "of wrong shape"
    assert not message or "refused" in message


@pytest.fixture(scope="module")
def saved_detector(tmp_path_factory):
    from ..conftest import fit_random_detector, tiny_model

    model = tiny_model()
    fit_random_detector(model)
    path = tmp_path_factory.mktemp("detector") / "density.pkl"
    model.detector.save(path)
    return path


def refused(checkpoint: Path, capsys) -> str:
    """What the command says of a checkpoint that it does not take; it must not be a traceback."""
    image = checkpoint / "image.png"
    Image.new("RGB", (40, 40)).save(image)
    assert main(["attribute", str(image), "--model", str(checkpoint)]) == 2
    return capsys.readouterr().err


def test_truncated_and_corrupt_weights_are_named(checkpoint, capsys):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff" * 100, bytes(8) + content[8:]):
        path.write_bytes(damaged)
        assert "model.safetensors" in refused(checkpoint, capsys)


def test_weights_of_nan_or_another_shape_are_refused(checkpoint, capsys):
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("projections.0.weight"))
    save_file(weights | {name: weights[name] * float("nan")}, path, {"format": "pt"})
    assert "NaN" in refused(checkpoint, capsys)
    save_file(weights | {name: weights[name][:, :3].contiguous()}, path, {"format": "pt"})
    assert "don't fit" in refused(checkpoint, capsys)


def test_a_detector_of_nan_is_refused(checkpoint, fitted_model, capsys):
    fitted_model.detector.train_["embeddings"][0] = float("nan")
    fitted_model.detector.save(checkpoint / "density.pkl")
    assert "NaN" in refused(checkpoint, capsys)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timesteps", [0, 99999]), ("timesteps", []), ("alpha", 0), ("alpha", "0.05"), ("embedding_size", -1),
        ("num_prototypes", 10**9), ("latent_channels", 0), ("noise_seed", -1), ("time_dropout", 2),
        ("pooling", "os.system"), ("open_set_scores", {"embeddings": "os.system"}),
        ("open_set_scores", [1]), ("beta_end", 7),
        ("embedding_size", 10**12),
    ],
)  # fmt: skip
def test_config_fields_out_of_range_are_named(checkpoint, capsys, field, value):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert field in refused(checkpoint, capsys)


def test_a_config_that_is_no_json_is_named(checkpoint, capsys):
    (checkpoint / "config.json").write_text("{")
    assert "config.json" in refused(checkpoint, capsys)


def test_a_vae_folder_with_a_pickle_is_not_unpickled(checkpoint, capsys, tmp_path):
    """diffusers falls back to a .bin file; torch reads it with weights_only, which refuses the call."""
    victim = tmp_path / "victim"
    (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (checkpoint / "vae" / "diffusion_pytorch_model.bin").write_bytes(as_reduce("os", "mkdir", str(victim)))
    with pytest.raises(OSError, match="can't be loaded"):
        load_vae(checkpoint, ProtoLeakConfig.from_pretrained(checkpoint))
    assert not victim.exists()


def test_the_array_of_a_detector_can_hold_no_objects(checkpoint):
    content = pickle.loads((checkpoint / "density.pkl").read_bytes())
    for dtype in ("|O", "O", "V8", "no dtype", "<U4", "<c8", ["<f8"]):
        content["state"]["calibration_"]["dtype"] = dtype
        (checkpoint / "density.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="refused"):
            OpenSetDetector.load(checkpoint / "density.pkl")


def test_a_detector_sets_no_attribute_but_its_own(checkpoint):
    for name in ("__class__", "__dict__", "_scores", "scores_", "load", "a b", "", 1):
        content = pickle.loads((checkpoint / "density.pkl").read_bytes())
        content["state"][name] = 1
        (checkpoint / "attack.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="refused"):
            OpenSetDetector.load(checkpoint / "attack.pkl")


def test_a_detector_without_a_part_is_refused(checkpoint):
    for name in ("calibration_", "temperature_", "train_", "probe_"):
        content = pickle.loads((checkpoint / "density.pkl").read_bytes())
        del content["state"][name]
        (checkpoint / "attack.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"refused.*{name}"):
            OpenSetDetector.load(checkpoint / "attack.pkl")
