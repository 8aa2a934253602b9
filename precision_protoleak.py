"""
What a dtype means, decided once: the network and its statistics are float32 and stay so, autocast is off in
them, and a dtype that is asked for is that of the frozen VAE, which has nearly all of the computation.
Embeddings of a network rounded to half precision would not fit the detector.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)
ACCELERATOR = torch.accelerator.current_accelerator()
DEVICE_TYPES = ("cpu",) if ACCELERATOR is None else ("cpu", ACCELERATOR.type)
SETTINGS = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
if torch.cuda.is_available():
    SETTINGS += [torch.backends.cuda.matmul, torch.backends.cudnn.conv]


class PrecisionMixin:
    """
    Whatever gives a model of transformers a dtype, here gives it to `vae`: `from_pretrained(dtype=)`, `to`,
    `half`, `bfloat16`, `float`, `double`. Without one the VAE keeps what it has.
    """

    def post_init(self):
        nn.Module.to(self, torch.float32)  # `from_config(dtype=)` builds in another
        super().post_init()

    @classmethod
    def from_pretrained(cls, *args, dtype: torch.dtype | str | None = None, **kwargs):
        """`dtype` (*optional*) is the VAE's, as a `torch.dtype` or by its name."""
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        result = super().from_pretrained(*args, dtype=torch.float32, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if dtype not in (None, "auto"):
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return result

    def to(self, *args, **kwargs):
        """As [`torch.nn.Module.to`], but for the dtype."""
        given = (*args, *kwargs.values())
        dtypes = [getattr(value, "dtype", value) for value in given]
        dtypes = [dtype for dtype in dtypes if isinstance(dtype, torch.dtype)]
        places = [value.device if isinstance(value, torch.Tensor) else value for value in args]
        places = [place for place in places if not isinstance(place, torch.dtype)]
        kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
        if places or kwargs:
            super().to(*places, **kwargs)
        if dtypes and self.held_vae is not None:
            nn.Module.to(self.held_vae, dtypes[0])  # diffusers' own says that no module is kept in float32
        return self

    def half(self):
        return self.to(torch.float16)

    def bfloat16(self):
        return self.to(torch.bfloat16)

    def float(self):
        return self.to(torch.float32)

    def double(self):
        return self.to(torch.float64)


def without_autocast(method: Callable) -> Callable:
    """A method of a module, run with autocast off; the first time that it was on, a warning says so."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        enabled = [device for device in DEVICE_TYPES if torch.is_autocast_enabled(device)]
        if enabled:
            logger.warning_once(
                "mixed precision is off within this model: its network is float32. To have the VAE compute "
                "in another dtype, ask for that with from_pretrained(dtype=) or model.to(dtype)"
            )
        with contextlib.ExitStack() as stack:
            for device in enabled:
                stack.enter_context(torch.autocast(device, enabled=False))
            return method(*args, **kwargs)

    return run


class Rounding:
    """
    What PyTorch rounds of factors in float32. Settings are the process's, so threads that want none share one
    of these: the first stops it, the last puts it back.
    """

    def __init__(self):
        self.lock, self.users = threading.Lock(), 0
        self.kept: list[tuple[Any, str]] = []

    @torch.compiler.disable
    def stop(self) -> None:
        with self.lock:
            self.users += 1
            found = [(setting, setting.fp32_precision) for setting in SETTINGS]
            found = [(setting, kept) for setting, kept in found if kept in ("tf32", "bf16")]
            self.kept += found
            for setting, _ in found:
                setting.fp32_precision = "ieee"

    @torch.compiler.disable
    def resume(self) -> None:
        with self.lock:
            self.users -= 1
            while self.kept and not self.users:
                setting, kept = self.kept.pop(0)
                setting.fp32_precision = "none"  # it follows a broader setting
                if setting.fp32_precision != kept:
                    setting.fp32_precision = kept


ROUNDING = Rounding()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """
    Products and convolutions in float32, wherever PyTorch was told to round what they multiply, as
    `torch.set_float32_matmul_precision` does, or does so by default: scores would move with a setting that
    nobody looks at. `torch.compile` compiles what is within by itself; in an exported graph nothing is set.
    """
    if torch.compiler.is_exporting():
        yield
        return
    ROUNDING.stop()
    try:
        yield
    finally:
        ROUNDING.resume()
