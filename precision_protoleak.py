"""
What a dtype means, decided once: the network and its statistics are float32 and stay so, autocast is off in
them, and a dtype that is asked for is that of the frozen VAE, which has nearly all of the computation.
Embeddings of a network rounded to half precision would not fit the detector.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)
ACCELERATOR = torch.accelerator.current_accelerator()
DEVICE_TYPES = ("cpu",) if ACCELERATOR is None else ("cpu", ACCELERATOR.type)
ROUNDING = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
if torch.cuda.is_available():
    ROUNDING += [torch.backends.cuda.matmul, torch.backends.cudnn.conv]


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


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """
    Products and convolutions in float32, wherever PyTorch was told to round what they multiply, as
    `torch.set_float32_matmul_precision` does, or does so by default: scores would move with a setting that
    nobody looks at. Settings are the process's, and are put back.
    """
    rounding = [] if torch.compiler.is_compiling() else [(x, x.fp32_precision) for x in ROUNDING]
    rounding = [(setting, kept) for setting, kept in rounding if kept in ("tf32", "bf16")]
    for setting, _ in rounding:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, kept in rounding:
            setting.fp32_precision = kept
