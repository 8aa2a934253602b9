"""Where a run stands after an epoch, on disk, so that a run that was stopped goes on from there."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..files_protoleak import PARTIAL, written_to
from ..modeling_protoleak import ProtoLeakForImageAttribution
from .arguments import TrainingArguments

STATE_FOLDER = "training_state"  # in output_dir, while a run is not finished
RUN_FILE = "run.json"
logger = logging.getLogger("protoleak.train")


class Progress:
    """
    Figures of each epoch, the first row those of the start, and the weights with the lowest validation loss.
    Accelerate saves it with the rest of a run's state.
    """

    def __init__(self):
        self.history: list[dict[str, float]] = []
        self.best_weights: dict[str, torch.Tensor] = {}

    @property
    def best(self) -> dict[str, float]:
        """The row with the lowest validation loss."""
        return min(self.history, key=lambda row: row["validation_loss"])

    def add(self, row: dict[str, float], model: ProtoLeakForImageAttribution) -> None:
        """Append an epoch's losses; the model's weights are copied if they are the best."""
        if not self.history or row["validation_loss"] < self.best["validation_loss"]:
            self.best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.history.append(row)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best_weights": self.best_weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.best_weights = state["history"], state["best_weights"]


class TrainingState:
    """
    A folder for each epoch, named by its number, in `training_state/`. It appears when it is whole, and only
    then the one before is deleted: a run that is killed at any moment goes on from one of both. What is read
    is a pickle in part; go on only from folders that are your own.

    Args:
        output_dir (`Path`): Of the run.
        arguments ([`TrainingArguments`]): Of the run; a state of other ones, of another number of processes
            or another version of torch is passed over.
        accelerator (`Accelerator`): Holds model and optimizer, and what was registered for checkpointing.
    """

    def __init__(self, output_dir: Path, arguments: TrainingArguments, accelerator: Accelerator):
        self.folder, self.accelerator = output_dir / STATE_FOLDER, accelerator
        facts = [dataclasses.asdict(arguments), accelerator.num_processes, torch.__version__]
        self.run = json.dumps(facts, sort_keys=True)

    def load(self) -> None:
        """
        Bring all that `accelerator` holds to the last state on disk, where there is one of this run.

        Raises:
            ValueError: it is damaged; the message names it.
        """
        runs = {folder: folder / RUN_FILE for folder in self.folder.glob("*") if folder.name.isdigit()}
        whole = {folder: file.read_text() for folder, file in runs.items() if file.exists()}
        own = [folder for folder, run in whole.items() if run == self.run]
        if not own:
            if whole:
                logger.warning("%s is of a run with other arguments; training starts anew", self.folder)
            return
        last = max(own, key=lambda folder: int(folder.name))
        try:
            self.accelerator.load_state(str(last))
        except Exception as error:  # safetensors, torch and pickle raise many kinds for a damaged file
            raise ValueError(f"{last} can't be read: {error}; delete it to train from the start") from error
        logger.info("going on after epoch %s of %s", last.name, self.folder)

    def save(self, epoch: int) -> None:
        """Write the state after an epoch. All processes must call this."""
        partial, main = self.folder / f"{epoch}{PARTIAL}", self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        with written_to(partial):
            self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if main:
            (partial / RUN_FILE).write_text(self.run)
            shutil.rmtree(self.folder / str(epoch), ignore_errors=True)  # of another run
            partial.replace(self.folder / str(epoch))
            for other in self.folder.iterdir():
                if other.name != str(epoch):
                    shutil.rmtree(other)
