"""
Fitted state on disk: a pickle of plain containers, numbers, strings and bytes, which needs no import, and is
read by an unpickler that allows none.
"""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files_protoleak import write_whole

DTYPES = ("<f2", "<f4", "<f8", "<i8")  # of tensors in a file, as NumPy writes them


class PlainUnpickler(pickle.Unpickler):
    """
    Reads pickles of plain containers, numbers and bytes. Whatever needs an import is refused before it runs.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and such a file needs no import at all")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to an outside object")


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


def unpack(value: Any) -> Any:
    """What [`pack`] packed, tuples as lists; `ValueError` for a tensor of another kind of number."""
    if isinstance(value, list):
        return [unpack(v) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"dtype", "shape", "data"}:
        if value["dtype"] not in DTYPES:
            raise ValueError(f"it has a tensor of {value['dtype']!r}, and only {DTYPES} are allowed")
        array = np.frombuffer(value["data"], value["dtype"]).reshape(value["shape"])
        return torch.from_numpy(array.copy())
    return {k: unpack(v) for k, v in value.items()}


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
    content = PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    if not isinstance(content, dict) or "version" not in content:
        raise ValueError("it is not a state file")
    if content["version"] != version:
        raise ValueError(f"it is of version {content['version']!r}, and this code reads version {version}")
    state = unpack(content["state"])
    if not isinstance(state, dict):
        raise ValueError(f"its state is a {type(state).__name__}, not a dict")
    return state
