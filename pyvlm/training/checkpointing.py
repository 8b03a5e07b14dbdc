"""Checkpoints of a run: all that is needed to go on as if nothing had happened, there whole or not at all."""

import json
import os
import pickle
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from pyvlm.models import checkpoint
from pyvlm.models.processor import Processor
from pyvlm.models.vlm import VLM

STATE, FACTS = "trainer.pt", "facts.json"


@dataclass(frozen=True)
class Position:
    """How far a run has come: `step` steps of stage number `stage` are done, and `total` of all stages."""

    stage: int = 0
    step: int = 0
    total: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from: the model with its weights, and the state for the optimizer of its stage."""

    position: Position
    model: VLM
    optimizer: dict[str, Any]


def save_checkpoint(
    folder: str | os.PathLike[str], model: VLM, optimizer: Optimizer, position: Position
) -> None:
    """Replaces the checkpoint in `folder` in one step.

    The architecture (which may change from stage to stage) and the weights are as `VLM.save_pretrained`
    writes them; the optimizer's moments are tensors in `trainer.pt`.

    Raises:
        ValueError: it cannot be written, as on a full disk; the old checkpoint is then as it was.
    """
    try:
        with checkpoint.replace_folder(folder) as aside:
            checkpoint.write_model(model, model.config, aside)
            state = {"position": asdict(position), "optimizer": optimizer.state_dict()}
            with open(aside / STATE, "wb") as file:  # of a path torch does not tell why it cannot be written
                torch.save(state, file)
    except (OSError, RuntimeError, checkpoint.SafetensorError) as error:
        raise ValueError(
            f"checkpoint {folder} cannot be written ({error}); the one before it is kept, and the run can go "
            "on from it"
        ) from error


def load_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """Reads what `save_checkpoint` wrote.

    Returns:
        None where there is no checkpoint.

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
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: missing or damaged ({reason}); begin the run in another folder") from error
    model = VLM.from_pretrained(folder)
    for parameter in model.parameters():
        # Out of the file's buffer: a GEMM's sums may depend on how memory is aligned, and resuming is exact.
        parameter.data = parameter.data.clone()
    return Checkpoint(position, model.train(), optimizer)


def save_model(
    folder: str | os.PathLike[str], model: VLM, processor: Processor, facts: dict[str, Any]
) -> None:
    """Replaces a model that is kept on the way, all in float32, with `facts.json` beside its files.

    Raises:
        ValueError: it cannot be written; what was there before is kept.
    """
    try:
        with checkpoint.replace_folder(folder) as aside:
            checkpoint.write_model(model, model.config, aside, torch.float32)
            processor.save_pretrained(aside)
            (aside / FACTS).write_text(json.dumps(facts, indent=2))
    except (OSError, checkpoint.SafetensorError) as error:
        raise ValueError(
            f"model {folder} cannot be written ({error}); what was there is kept, and the run can go on from "
            "its last checkpoint"
        ) from error
