"""
Fitted state on disk: a pickle of plain containers, numbers, strings and bytes, which needs no import, and is
read by an unpickler that allows none. What reading it takes grows with the file's size alone.
"""

import io
import os
import pickle
import pickletools
from typing import Any

import numpy as np
import torch

from .files_protoleak import read_file, write_whole

DTYPES = ("<f2", "<f4", "<f8", "<i8")  # of tensors in a file, as NumPy writes them
MAX_DEPTH = 20  # of containers in containers


class PlainUnpickler(pickle.Unpickler):
    """
    Reads pickles of plain containers, numbers and bytes. Whatever needs an import is refused before it runs.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and such a file needs no import at all")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to an outside object")


def check_memo(content: bytes) -> None:
    """
    Raise `ValueError` where a pickle puts a value at a place of its memo that is beyond what it can have
    filled: Python's reader makes room for all places before it, however many.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise ValueError(f"it asks for room for {argument} values")


def pack(value: Any) -> Any:
    """Tensors to {"dtype", "shape", "data"}, inside any depth of dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().numpy()
        return {"dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}
    if isinstance(value, dict):
        return {k: pack(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [pack(v) for v in value]
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"a state file holds plain values and tensors, not {type(value).__name__}")


class Unpacker:
    """
    What [`pack`] packed, tuples as lists. Containers that refer to one another can stand for more than any
    memory holds, so no more values, nor bytes of tensors, are given than the file has bytes.

    Args:
        size (`int`): Bytes of the file.
    """

    def __init__(self, size: int):
        self.values = self.tensors = size

    def unpack(self, value: Any, depth: int = 0) -> Any:
        """`ValueError` for a tensor of another kind of number, and for what is too deep or too much."""
        self.values -= 1
        if self.values < 0 or depth > MAX_DEPTH:
            raise ValueError("its containers hold one another over and over, or are too deep")
        if isinstance(value, list):
            return [self.unpack(v, depth + 1) for v in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"dtype", "shape", "data"}:
            return self._tensor(value)
        return {k: self.unpack(v, depth + 1) for k, v in value.items()}

    def _tensor(self, value: dict[str, Any]) -> torch.Tensor:
        if value["dtype"] not in DTYPES:
            raise ValueError(f"it has a tensor of {value['dtype']!r}, and only {DTYPES} are allowed")
        self.tensors -= len(value["data"])
        if self.tensors < 0:
            raise ValueError("its tensors are larger than the file")
        array = np.frombuffer(value["data"], value["dtype"]).reshape(value["shape"])
        return torch.from_numpy(array.copy())


def write_state(path: str | os.PathLike, state: dict[str, Any], version: int) -> None:
    """A crash or a full disk leaves the previous file whole, see [`write_whole`]."""
    content = pickle.dumps({"version": version, "state": pack(state)}, protocol=4)
    write_whole(path, lambda partial: partial.write_bytes(content))


def read_state(path: str | os.PathLike, version: int) -> dict[str, Any]:
    """
    The state in a file; nothing in the file is run.

    Raises:
        Exception: of many kinds, where the file is damaged or holds anything but plain values.
        ValueError: it is no state, or of another version; the message tells both.
    """
    file = read_file(path)
    check_memo(file)
    content = PlainUnpickler(io.BytesIO(file)).load()
    if not isinstance(content, dict) or "version" not in content:
        raise ValueError("it is not a state file")
    if content["version"] != version:
        raise ValueError(f"it is of version {content['version']!r}, and this code reads version {version}")
    state = Unpacker(len(file)).unpack(content["state"])
    if not isinstance(state, dict):
        raise ValueError(f"its state is a {type(state).__name__}, not a dict")
    return state
