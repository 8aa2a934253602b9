"""Work that several processes share, as `torchrun` or `accelerate launch` starts them."""

import logging

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

logger = logging.getLogger(__name__)


def join_processes() -> PartialState:
    """
    This process's place among all; the main one logs how many there are. Without a GPU they compute on the
    CPU, where `torchrun` starts them: `accelerate launch --cpu` starts one, whatever --num_processes says.
    """
    began = not PartialState._shared_state
    state = PartialState(
        cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    )
    if began and state.num_processes > 1 and state.is_main_process:
        logger.warning(f"{state.num_processes} processes share the work")
    return state
