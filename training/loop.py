"""The training loop: epochs with Accelerate, moving averages of the weights, and early stopping."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..evaluation.predictions import predict
from ..modeling_protoleak import ProtoLeakForImageAttribution
from .arguments import TrainingArguments
from .state import Progress, TrainingState


def fit(
    model: ProtoLeakForImageAttribution, train: Dataset, validation: Dataset,
    arguments: TrainingArguments, accelerator: Accelerator,
) -> list[dict[str, float]]:  # fmt: skip
    """
    Train in place. Validated and kept are moving averages of the weights; those at the end are of the epoch
    with the lowest validation loss. Returns the history.

    After each epoch the state goes to `output_dir`, and a run with the same arguments goes on from there. All
    that is random is seeded anew in each epoch, so that it ends with the weights of a run that never stopped.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, arguments.learning_rate, weight_decay=arguments.weight_decay)
    order = torch.Generator()
    loader = DataLoader(train, arguments.batch_size, shuffle=True, generator=order)
    steps = arguments.num_train_epochs * math.ceil(len(loader) / accelerator.num_processes)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, steps))
    network, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    average = EMAModel(parameters, decay=arguments.ema_decay, use_ema_warmup=True, power=1.0)
    progress = Progress()
    accelerator.register_for_checkpointing(schedule, average, progress)
    state = TrainingState(Path(arguments.output_dir), arguments, accelerator)
    state.load()
    average.to(accelerator.device)
    if not progress.history:  # row 0 is the start
        progress.add({"epoch": 0, **validate(network, validation, accelerator)}, model)
    first, last = len(progress.history), arguments.num_train_epochs
    shown = accelerator.is_main_process
    bar = tqdm(range(first, last + 1), initial=first - 1, total=last, desc="epochs", disable=not shown)
    for epoch in bar:
        if epoch - 1 - progress.best["epoch"] >= arguments.patience:
            break
        set_seed(arguments.seed + 1_000_003 * (epoch + 1), device_specific=True)
        order.manual_seed(arguments.seed + epoch)
        losses = []
        for loss in train_steps(network, loader, optimizer, arguments.max_grad_norm, accelerator):
            schedule.step()
            average.step(parameters)
            losses.append(loss)
        if not math.isfinite(train_loss := float(np.mean(losses))):
            raise ValueError(f"the loss became {train_loss} in epoch {epoch}; lower learning_rate")
        average.store(parameters)
        average.copy_to(parameters)
        row = {"epoch": epoch, "train_loss": train_loss, **validate(network, validation, accelerator)}
        progress.add(row, model)
        average.restore(parameters)
        accelerator.log(row, step=epoch)
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items() if name != "epoch"})
        state.save(epoch)
    model.load_state_dict(progress.best_weights)
    return progress.history


def train_steps(
    network: torch.nn.Module, loader: DataLoader, optimizer, max_grad_norm: float, accelerator: Accelerator
) -> Iterator[float]:
    """One epoch; after each step its loss."""
    network.train()
    kind = "features" if accelerator.unwrap_model(network).takes_features else "latents"
    for inputs, labels in loader:
        with accelerator.autocast():
            loss = network(**{kind: inputs.float()}, labels=labels, return_dict=True).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def validate(network: torch.nn.Module, validation: Dataset, accelerator: Accelerator) -> dict[str, float]:
    """Cross-entropy and accuracy."""
    predictions = predict(network, validation, accelerator, statistics=False)
    probabilities, labels = predictions.probabilities, predictions.labels
    return {
        "validation_loss": float(-np.log(probabilities[np.arange(len(labels)), labels].clip(1e-12)).mean()),
        "validation_accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
    }


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
