"""The training loop.

Every step is a function of the weights, the optimizer's state and the step's number: dialogues are drawn from
(seed, step, index), and the learning rate is computed from the step. So a run that goes on from a checkpoint
gives, on the same CPU with as many threads, the losses of an uninterrupted one, bit for bit.
"""

import ctypes
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pyvlm.models.processor import IGNORED, Processor
from pyvlm.models.vlm import VLM
from pyvlm.training.bundled import Dialogues, bundled_dialogues
from pyvlm.training.checkpointing import Position, load_checkpoint, save_checkpoint
from pyvlm.training.conversation import dialogue_messages
from pyvlm.training.digits import DigitDialogues
from pyvlm.training.evaluate import evaluate
from pyvlm.training.logs import TrainingLog
from pyvlm.training.recipe import Recipe, Stage
from pyvlm.training.runfolder import RunFolder

Batch = dict[str, Any]  # of Processor.collate; images are None where there are none


@dataclass
class Trained:
    """What `train` leaves: the model in evaluation mode and its processor."""

    model: VLM
    processor: Processor


def train(
    recipe: Recipe,
    run_dir: str | os.PathLike[str],
    *,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
) -> Trained:
    """Trains a recipe, from the last checkpoint in `run_dir` where there is one, and writes `run_dir`/model.

    Args:
        recipe: what to train.
        run_dir: see `pyvlm.training.runfolder`.
        progress: show a progress bar.
        after_step: called with the number of steps done after each of them.

    Raises:
        ValueError: the run folder is in use, belongs to another recipe or cannot be written, or its
            checkpoint is damaged; the message says what to do.
    """
    keep_freed_memory()
    with RunFolder(run_dir, recipe) as run:
        trainer = Trainer(recipe, run, progress, after_step)
        trainer.fit()
        model = trainer.model.eval()
        model.save_pretrained(run.model, trainer.processor)
        return Trained(model, trainer.processor)


class Trainer:
    """A run in a locked folder; `fit` is all that there is to call."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, progress: bool, after_step: Callable[[int], None] | None
    ) -> None:
        self.recipe, self.run, self.after_step = recipe, run, after_step
        torch.manual_seed(recipe.seed)
        self.model = VLM(recipe.model).train()
        self.processor = recipe.processor()
        restored = load_checkpoint(run.checkpoint, self.model)  # before anything holds the parameters
        self.position = restored[0] if restored else Position()
        self.optimizer_state = restored[1] if restored else None
        self.optimizer: Optimizer | None = None
        self.accelerator = Accelerator(mixed_precision="bf16" if recipe.precision == "bf16" else "no")
        self.forward = self.accelerator.prepare_model(self.model)
        self.log = TrainingLog(
            run, recipe, self.position.total, progress and self.accelerator.is_main_process
        )

    def fit(self) -> None:
        with self.log:
            for index, stage in enumerate(self.recipe.stages.values()):
                if index >= self.position.stage:
                    self.run_stage(index, stage)

    def run_stage(self, index: int, stage: Stage) -> None:
        """The steps of a stage that are not done yet."""
        done = self.position.step if index == self.position.stage else 0
        source = bundled_dialogues("train", stage.data, self.recipe.seed)
        optimizer = self.prepare_optimizer(stage, resumes=done > 0)
        self.accelerator.gradient_accumulation_steps = stage.accumulation
        for step in range(done, stage.steps):
            set_learning_rate(optimizer, stage, step)
            total = self.position.total + 1
            loss, tokens = self.train_step(optimizer, stage, source, total)
            self.log.step(total, index, loss, optimizer, tokens)
            self.position = Position(index, step + 1, total)
            if total % self.recipe.checkpoint_every == 0 or step + 1 == stage.steps:
                self.save(optimizer)
            if self.recipe.evaluation.every and total % self.recipe.evaluation.every == 0:
                self.look(total)
            if self.after_step is not None:
                self.after_step(total)

    def prepare_optimizer(self, stage: Stage, resumes: bool) -> Optimizer:
        """The optimizer of a stage: as the checkpoint has it, or going on from the last stage's, or new."""
        optimizer = self.accelerator.prepare_optimizer(make_optimizer(self.model, stage))
        if resumes:
            assert self.optimizer_state is not None, "a checkpoint within a stage has the stage's optimizer"
            optimizer.load_state_dict(self.optimizer_state)
        elif stage.keep_optimizer and self.optimizer is not None:
            keep_moments(self.optimizer, optimizer)
        self.optimizer = optimizer
        return optimizer

    def train_step(
        self, optimizer: Optimizer, stage: Stage, source: Dialogues, step: int
    ) -> tuple[Tensor, int]:
        """One optimizer step: the mean loss over its labelled tokens, and how many tokens it read."""
        # This process's share of the step's dialogues.
        mine = range(self.accelerator.process_index, stage.batch_size, self.accelerator.num_processes)
        batches = make_batches(self.processor, source, step, mine, stage.accumulation)
        labelled = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        loss, tokens = torch.zeros((), device=self.accelerator.device), 0
        moe_stats = []
        for batch, count in zip(batches, labelled, strict=True):
            tokens += int(batch["attention_mask"].sum())
            with self.accelerator.accumulate(self.forward):
                # Weighed by its labels, so that accumulation changes the memory and not the loss.
                share = count / sum(labelled)
                output = self.forward(**to_device(batch, self.accelerator.device))
                micro_loss = share * output.loss
                self.accelerator.backward(micro_loss * stage.accumulation)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), stage.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss += micro_loss.detach()
            moe_stats.append(output.moe_stats)
        self.model.update_router(*moe_stats)
        return loss, tokens

    def save(self, optimizer: Optimizer) -> None:
        self.log.flush()
        if self.accelerator.is_main_process:
            save_checkpoint(self.run.checkpoint, self.model, self.recipe.model, optimizer, self.position)
        self.accelerator.wait_for_everyone()

    def look(self, step: int) -> None:
        """Held-out accuracy on the way; nothing is chosen by it."""
        settings = self.recipe.evaluation
        data = settings.data.model_copy(update={"rounds": (1, 1)})
        dialogues = DigitDialogues("test", data, self.recipe.seed).batch(0, range(settings.quick_dialogues))
        result = evaluate(self.model, self.processor, dialogues, settings.batch_size)
        self.model.train()
        self.log.evaluation(step, result.accuracy)


def make_batches(
    processor: Processor, source: Dialogues, step: int, indices: Sequence[int], parts: int = 1
) -> list[Batch]:
    """The dialogues of a step as tensors, in at most `parts` batches."""
    samples = [processor.encode(dialogue_messages(d)) for d in source.batch(step, indices)]
    size = math.ceil(len(samples) / parts)
    return [processor.collate(samples[i : i + size]) for i in range(0, len(samples), size)]


def make_optimizer(model: VLM, stage: Stage) -> AdamW:
    """AdamW over the stage's parts, the others frozen; matrices and embeddings decay, vectors do not."""
    groups = []
    for part, parameters in model.parts().items():
        learns = part in stage.train
        for parameter in parameters:
            parameter.requires_grad_(learns)
        if not learns:
            parameters = []
        for decays in (True, False):
            members = [p for p in parameters if (p.dim() >= 2) == decays]
            if members:
                decay = stage.weight_decay if decays else 0.0
                groups.append({"params": members, "part": part, "weight_decay": decay})
    if not groups:
        raise ValueError(f"the model has no parameters in the parts to train, {stage.train}")
    return AdamW(groups, lr=0.0, betas=stage.betas, fused=True)


def keep_moments(old: Optimizer, new: Optimizer) -> None:
    """Gives `new` the state that `old` has for the parameters of both."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]


def set_learning_rate(optimizer: Optimizer, stage: Stage, step: int) -> None:
    """Linear warm-up, then a cosine down to `final_lr`; `step` counts from 0."""
    if step < stage.warmup:
        factor = (step + 1) / stage.warmup
    else:
        progress = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
        factor = stage.final_lr + (1 - stage.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = factor * stage.rate_of(group["part"])


def keep_freed_memory() -> None:
    """Has glibc keep the blocks of a step for the next one, in place of asking the system for cleared pages.

    A step of the demo took 28,000 page faults, 10 to 13 % of its time. Other allocators do so by themselves.
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold = -3, -1  # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes
        libc.mallopt(trim_threshold, 2**31 - 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: None if tensor is None else tensor.to(device) for name, tensor in batch.items()}
