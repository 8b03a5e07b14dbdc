"""Checkpoints of a run: all that is needed to go on as if nothing had happened, there whole or not at all."""

import os
import pickle
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pyvlm.models import checkpoint
from pyvlm.models.config import VLMConfig

STATE = "trainer.pt"


@dataclass(frozen=True)
class Position:
    """How far a run has come: `step` steps of stage number `stage` are done, and `total` of all stages."""

    stage: int = 0
    step: int = 0
    total: int = 0


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    config: VLMConfig,
    optimizer: Optimizer,
    position: Position,
) -> None:
    """Replaces the checkpoint in `folder` in one step.

    Weights are safetensors; the optimizer's moments and torch's random state are tensors in `trainer.pt`.

    Raises:
        ValueError: it cannot be written, as on a full disk; the old checkpoint is then as it was.
    """
    try:
        with checkpoint.replace_folder(folder) as aside:
            checkpoint.write_model(model, config, aside)
            state = {
                "position": asdict(position),
                "optimizer": optimizer.state_dict(),
                "random_state": torch.get_rng_state(),
            }
            torch.save(state, aside / STATE)
    except (OSError, RuntimeError, checkpoint.SafetensorError) as error:
        raise ValueError(
            f"checkpoint {folder} cannot be written ({error}); the one before it is kept, and the run can go "
            "on from it"
        ) from error


def load_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module
) -> tuple[Position, dict[str, Any]] | None:
    """Gives `model` its weights, as new parameters, and torch its random state.

    Returns:
        The position, and the state for the optimizer of its stage; None where there is no checkpoint.

    Raises:
        ValueError: a missing, damaged or unfitting file; the message names it.
    """
    try:
        folder = checkpoint.find_folder(folder)
    except ValueError:
        return None
    path = folder / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        position, optimizer = Position(**state["position"]), state["optimizer"]
        random_state = state["random_state"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: missing or damaged ({reason}); begin the run in another folder") from error
    checkpoint.load_weights(model, folder / checkpoint.WEIGHTS)
    for parameter in model.parameters():
        # Out of the file's buffer: a GEMM's sums may depend on how memory is aligned, and resuming is exact.
        parameter.data = parameter.data.clone()
    torch.set_rng_state(random_state)
    return position, optimizer
