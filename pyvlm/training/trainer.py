"""The training loop.

Every step is a function of the weights, the optimizer's state and the step's number: samples are drawn from
(seed, step, index), all random generators are seeded by the step, and the learning rate is computed from it.
So a run that goes on from a checkpoint gives, on the same CPU with as many threads, the losses of an
uninterrupted one, bit for bit.
"""

import ctypes
import errno
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim import Optimizer

from pyvlm._tell import tell
from pyvlm.models.checkpoint import SafetensorError
from pyvlm.models.config import MoEConfig
from pyvlm.models.inputs import to_device
from pyvlm.models.pretrained_vision import TransformersTower
from pyvlm.models.processor import IGNORED, Processor
from pyvlm.models.resolution import change_image_size
from pyvlm.models.vlm import VLM, VLMOutput
from pyvlm.training.checkpointing import Position, load_checkpoint, save_checkpoint, save_model
from pyvlm.training.environment import describe_start
from pyvlm.training.flops import StepCosts, Workload
from pyvlm.training.heldout import HeldOut, best_look
from pyvlm.training.logs import StagePlan, TrainingLog
from pyvlm.training.optimization import check_parts, keep_moments, make_optimizer, set_learning_rate
from pyvlm.training.precision import hold_frozen
from pyvlm.training.profiling import NoProfile, Profile, StepProfile
from pyvlm.training.recipe import Recipe, Stage
from pyvlm.training.runfolder import RunFolder
from pyvlm.training.sources import SampleSource, make_source
from pyvlm.training.trackers import check_trackers
from pyvlm.training.utilization import measured_limit

Batch = dict[str, Any]  # of Processor.collate; images are None where there are none
SECONDS_BETWEEN_DRAWINGS = 60.0  # of curves.png; one took 0.5 s
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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

    Several processes that `accelerate launch` started share the samples of each step.

    Args:
        recipe: what to train.
        run_dir: see `pyvlm.training.runfolder`.
        progress: show a progress bar, and at the end where the time of a step went.
        after_step: called with the number of steps done after each of them.

    Raises:
        ValueError: the run folder is in use, belongs to another recipe or cannot be written, its checkpoint
            is damaged, the data cannot be read, or a stage names a part that the model lacks; the message
            says what to do.
    """
    check_trackers(recipe.trackers)
    keep_freed_memory()
    AcceleratorState._reset_state()  # else a second run in this process had to have the first one's precision
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        # Not every batch has images, and not every expert gets tokens.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    try:
        with RunFolder(run_dir, recipe, accelerator.is_main_process) as run:
            trainer = Trainer(recipe, run, accelerator, progress, after_step)
            trainer.fit()
            model = trainer.model.eval()
            if run.main:
                model.save_pretrained(run.model, trainer.processor)
            accelerator.wait_for_everyone()
            return Trained(model, trainer.processor)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in FULL_DISK:
            raise
        raise ValueError(
            f"run folder {run_dir} cannot be written ({error}): make room, and the same command goes on from "
            "the last checkpoint"
        ) from error


class Wrapped(torch.nn.Module):
    """What accelerate prepares in place of the model, anew for each stage.

    accelerate puts autocast into the `forward` of what it prepares, and marks it so as never to do so again.
    A model that is unwrapped keeps the mark: all stages but the first were computed in float32.
    """

    def __init__(self, model: VLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> VLMOutput:
        output: VLMOutput = self.model(**batch)
        return output


class Trainer:
    """A run in a locked folder; `fit` is all that there is to call."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        accelerator: Accelerator,
        progress: bool,
        after_step: Callable[[int], None] | None,
    ) -> None:
        self.recipe, self.run, self.accelerator, self.after_step = recipe, run, accelerator, after_step
        # Of each stage, for dialogues about images of its size.
        self.processors = stage_processors(recipe)
        self.processor = self.processors[0]
        # All data are opened before anything is trained: what is wrong with them is told now.
        to_tell, cache = tell if run.main else lambda line: None, run.lengths
        self.sources, self.plan = open_sources(
            recipe, self.processors, accelerator.num_processes, to_tell, cache
        )
        self.held_out = HeldOut(recipe, self.processors, to_tell, cache) if recipe.evaluation.every else None
        restored = load_checkpoint(run.checkpoint)
        self.position = restored.position if restored else Position()
        self.optimizer_state = restored.optimizer if restored else None
        # The checkpoint's own architecture: a stage may have changed it.
        self.model = restored.model if restored else new_model(recipe)
        check_parts(self.model, recipe.stages.items())
        self.forward: torch.nn.Module | None = None  # the model as accelerate wraps it for a stage
        self.optimizer: Optimizer | None = None
        self.costs: StepCosts | None = None  # of the stage, once they are asked for
        if run.main:
            run.note_start(describe_start(self.position.total, accelerator.num_processes))
        self.log = TrainingLog(run, recipe, self.plan, self.position.total, progress)
        self.best = best_look(run.read_metrics())

    def fit(self) -> None:
        with self.log:
            for index, stage in enumerate(self.recipe.stages.values()):
                if index >= self.position.stage:
                    self.run_stage(index, stage)
            self.log.draw()
        hold_frozen(self.model, None)

    def run_stage(self, index: int, stage: Stage) -> None:
        """The steps of a stage that are not done yet."""
        steps = self.plan[index].steps
        done = self.position.step if index == self.position.stage else 0
        self.processor = self.processors[index]
        if done == 0 and stage.image_size is not None:
            self.model = change_image_size(self.model, stage.image_size)
        if done == 0 and stage.upcycle is not None:
            seed_everything(self.recipe.seed, self.position.total, 0)
            self.model = with_experts(self.model, stage.upcycle, self.recipe.seed)
        optimizer = self.prepare(stage, resumes=done > 0)
        for step in range(done, steps):
            set_learning_rate(optimizer, stage, step, steps)
            total = self.position.total + 1
            self.measured_step(index, stage, step, total)
            self.position = Position(index, step + 1, total)
            if self.held_out is not None and total % self.recipe.evaluation.every == 0:
                self.look(total, self.held_out)
            if step + 1 == steps and self.recipe.keep_stages and self.run.main:
                facts = {"stage": self.plan[index].name, "step": total}
                save_model(self.run.stages / self.plan[index].name, self.model, self.processor, facts)
            if total % self.recipe.checkpoint_every == 0 or step + 1 == steps:
                self.save(optimizer)
            if self.after_step is not None:
                self.after_step(total)

    def prepare(self, stage: Stage, resumes: bool) -> Optimizer:
        """Frees and freezes the parts for a stage and makes its optimizer: with the checkpoint's state, or
        going on from the last stage's, or new."""
        self.forward = None
        self.accelerator.free_memory()
        self.accelerator.gradient_accumulation_steps = stage.accumulation
        self.model.to(self.accelerator.device)
        checkpoint_layers(self.model, self.recipe.gradient_checkpointing)
        made = make_optimizer(self.model, stage)
        hold_frozen(self.model, torch.bfloat16 if self.recipe.precision == "bf16" else None)
        self.forward = self.accelerator.prepare_model(Wrapped(self.model))
        optimizer = self.accelerator.prepare_optimizer(made)
        if resumes:
            assert self.optimizer_state is not None, "a checkpoint within a stage has the stage's optimizer"
            optimizer.load_state_dict(self.optimizer_state)
        elif stage.keep_optimizer and self.optimizer is not None:
            keep_moments(self.optimizer, optimizer)
        self.optimizer, self.optimizer_state = optimizer, None
        self.costs = None
        self.log.flops_per_token = 0.0
        return optimizer

    def measured_step(self, index: int, stage: Stage, step: int, total: int) -> None:
        """A step and its line in the log, and where its time went if that is to be told. Which steps these
        are does not depend on interruptions."""
        assert self.optimizer is not None
        every = self.recipe.profile_every
        if not every or total % every:
            loss, tokens, _ = self.train_step(stage, index, step, total, NoProfile())
            self.log.step(total, index, loss, self.optimizer, tokens)
            return
        with StepProfile(self.model, self.accelerator.device) as profile:
            loss, tokens, batches = self.train_step(stage, index, step, total, profile)
        self.log.step(total, index, loss, self.optimizer, tokens)
        self.log.flush()  # before FLOPs are counted, which takes time
        processes, device = self.accelerator.num_processes, self.accelerator.device
        self.log.flops_per_token = self.count_flops(stage, batches) * processes / tokens
        self.log.limit = measured_limit(device, self.recipe.precision) * processes
        self.log.profile(total, profile.seconds, tokens)
        self.log.forget_pause()

    def count_flops(self, stage: Stage, batches: Sequence[Batch]) -> int:
        """FLOPs that the model takes for batches, forward and backward, nothing of it twice."""
        config = self.model.config
        if self.costs is None:
            self.costs = StepCosts(config, stage.train)
        costs = [self.costs.of(Workload.of_batch(config, batch)) for batch in batches]
        return sum(cost.total for of_batch in costs for cost in of_batch.values())

    def train_step(
        self, stage: Stage, index: int, step: int, total: int, profile: Profile
    ) -> tuple[Tensor, int, list[Batch]]:
        """One optimizer step: the mean loss over its labelled tokens, how many tokens were read by all
        processes, and this one's batches."""
        accelerator, optimizer, forward = self.accelerator, self.optimizer, self.forward
        assert optimizer is not None
        assert forward is not None
        seed_everything(self.recipe.seed, total, accelerator.process_index)
        with profile.part("data"):
            # This process's share of the step's samples.
            mine = range(accelerator.process_index, stage.batch_size, accelerator.num_processes)
            batches = make_batches(self.processor, self.sources[index], step, mine, stage.accumulation)
            labelled = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
            all_labelled, all_tokens = sum(labelled), sum(int(b["attention_mask"].sum()) for b in batches)
            if accelerator.num_processes > 1:  # alone a GPU would only be waited for
                counts = torch.tensor([all_labelled, all_tokens], device=accelerator.device)
                all_labelled, all_tokens = accelerator.reduce(counts).tolist()
            on_device = [to_device(batch, accelerator.device) for batch in batches]
        loss = torch.zeros((), device=accelerator.device)
        moe_stats = []
        for batch, count in zip(on_device, labelled, strict=True):
            with accelerator.accumulate(forward):
                output = forward(**batch, label_smoothing=stage.label_smoothing, z_loss=stage.z_loss)
                # Weighed by its labels, so that accumulation changes the memory and not the loss; gradients
                # are averaged over processes.
                share = count * accelerator.num_processes / max(1, all_labelled)
                micro_loss = share * output.loss
                with profile.backward_of(micro_loss):
                    accelerator.backward(micro_loss * stage.accumulation)
                with profile.part("optimizer"):
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.model.parameters(), stage.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            loss += micro_loss.detach()
            moe_stats.append(output.moe_stats)
        self.model.update_router(*moe_stats)
        return accelerator.reduce(loss, "mean"), all_tokens, batches

    def save(self, optimizer: Optimizer) -> None:
        self.log.draw(SECONDS_BETWEEN_DRAWINGS)
        if self.run.main:
            save_checkpoint(self.run.checkpoint, self.model, optimizer, self.position)
        self.accelerator.wait_for_everyone()
        self.log.forget_pause()

    def look(self, step: int, held_out: HeldOut) -> None:
        """Held-out data on the way: the best model is kept beside the others, and chosen for nothing."""
        if self.run.main:
            with self.accelerator.autocast():
                look = held_out.look(self.model, self.processor)
            if look.beats(self.best):
                save_model(self.run.best, self.model, self.processor, {"step": step, look.metric: look.value})
                self.best = look
            self.log.look(step, look)
        self.accelerator.wait_for_everyone()


def stage_processors(recipe: Recipe) -> list[Processor]:
    """The processor of each stage, for dialogues: one and the same as long as images keep their size."""
    processors = [recipe.processor()]
    for model in map(recipe.model_in, recipe.stages):
        of_last = processors[-1]
        processors.append(of_last.changed(image=model.image, tokens_per_image=model.tokens_per_image))
    return processors[1:]


def open_sources(
    recipe: Recipe,
    processors: Sequence[Processor],
    processes: int = 1,
    tell: Callable[[str], None] = tell,
    cache: Path | None = None,
) -> tuple[list[SampleSource], list[StagePlan]]:
    """The data of every stage, in its form, and how much there is to do.

    Raises:
        ValueError: data that cannot be read, epochs of data without end, or a batch that so many processes
            cannot share; the message names the stage.
    """
    sources: list[SampleSource] = []
    plan: list[StagePlan] = []
    for (name, stage), processor in zip(recipe.stages.items(), processors, strict=True):
        if stage.batch_size % (stage.accumulation * processes):
            raise ValueError(
                f"stage {name!r}: batch_size {stage.batch_size} is no multiple of accumulation "
                f"{stage.accumulation} times {processes} processes"
            )
        try:
            source = make_source(
                stage.data,
                "train",
                recipe.seed,
                processor.changed(form=stage.form),
                batch_size=stage.batch_size,
                first_step=sum(earlier.steps for earlier in plan),
                tell=tell,
                cache=cache,
            )
            plan.append(StagePlan(name, stage.count_steps(source.epoch_size), stage.batch_size))
        except ValueError as error:
            raise ValueError(f"stage {name!r}: {error}") from error
        sources.append(source)
    return sources, plan


def make_batches(
    processor: Processor, source: SampleSource, step: int, indices: Sequence[int], parts: int = 1
) -> list[Batch]:
    """The samples of a step as tensors, in at most `parts` batches."""
    samples = source.samples(step, indices)
    size = math.ceil(len(samples) / parts)
    return [processor.collate(samples[i : i + size]) for i in range(0, len(samples), size)]


def new_model(recipe: Recipe) -> VLM:
    """The model as a run begins with it, in float32: small steps are lost on weights of half precision."""
    torch.manual_seed(recipe.seed)
    model = VLM(recipe.model)
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model.float()
    return model.train()


def with_experts(model: VLM, moe: MoEConfig, seed: int) -> VLM:
    """The model with experts that are copies of its MLPs, in training mode."""
    from pyvlm.models.upcycling import upcycle

    return upcycle(model, moe, seed).train()


def checkpoint_layers(model: VLM, enable: bool) -> None:
    """Whether the layers of the language model, and of encoders of transformers, are computed again in the
    backward pass."""
    model.language.gradient_checkpointing = enable
    for tower in model.vision_towers.values():
        if isinstance(tower, TransformersTower) and enable:
            encoder: Any = tower.encoder
            # The first name is that of transformers since 5.23.
            method = getattr(
                encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable
            )
            method({"use_reentrant": False})


def seed_everything(seed: int, step: int, process: int) -> None:
    """Seeds Python, NumPy and torch for one step, so that no generator's state has to be kept."""
    set_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0]))


def keep_freed_memory() -> None:
    """Has glibc keep the blocks of a step for the next one, in place of asking the system for cleared pages.

    A step of the demo took 28,000 page faults, 10 to 13 % of its time. Other allocators do so by themselves.
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold = -3, -1  # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes
        libc.mallopt(trim_threshold, 2**31 - 1)
