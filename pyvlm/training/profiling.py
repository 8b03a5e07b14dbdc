"""Where the time of a training step goes: every moment of it belongs to one part.

Forward, hooks on the model's modules tell when a part begins and ends. Backward, each node of the autograd
graph is asked for the part in which it was made: nodes are numbered as they are made, and the hooks note the
numbers at each border. A hook before each node then tells whose gradient is computed. Nothing is inserted
into the graph, so that a profiled step computes what another one does, bit for bit.

The time between two marks goes to the part that was running, so that the parts sum to the step by
construction; "other" is what no part claims: embeddings, norms, residual sums, the placement of image tokens,
and the engine's own work.
"""

import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyvlm.models.language import DecoderLayer
from pyvlm.models.vlm import VLM
from pyvlm.nn.moe import MoE

PARTS = ("data", "vision", "fusion", "connector", "attention", "mlp", "experts", "loss", "optimizer", "other")


class Profile(Protocol):
    """What `Trainer.train_step` tells while it works."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside belongs to a part."""
        ...

    @contextmanager
    def backward_of(self, loss: Tensor) -> Iterator[None]:
        """What is done inside is the backward pass from `loss`, or from a multiple of it."""
        ...


class NoProfile:
    """For the steps that are not measured."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        yield

    @contextmanager
    def backward_of(self, loss: Tensor) -> Iterator[None]:
        yield


class StepProfile:
    """Measures one step; a context manager around it. Read `seconds` afterwards.

    On CUDA the marks are events on the current stream, so that they tell when the device did the work.

    Args:
        model: the model itself, not what accelerate made of it.
        device: where it runs.
    """

    def __init__(self, model: VLM, device: torch.device) -> None:
        self.model, self.cuda = model, device.type == "cuda"
        self.modules = profiled_modules(model)
        self.parameters = {
            id(parameter): part for module, part in self.modules.items() for parameter in module.parameters()
        }
        self.parameters[id(model.language.head_weight)] = "loss"
        self.running = ["other"]  # the innermost part last
        self.marks: list[tuple[Any, str]] = []
        self.borders: list[tuple[int, str]] = []  # from this number on nodes belong to the part
        self.handles: list[RemovableHandle] = []
        self.in_backward = False
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> "StepProfile":
        for module, part in {self.model: "other", **self.modules}.items():
            self.handles.append(module.register_forward_pre_hook(partial(self._begin, part)))
            # Always: checkpointing ends a recomputed forward pass by an exception.
            self.handles.append(module.register_forward_hook(self._end, always_call=True))
        self.handles.append(self.model.language.register_forward_hook(self._begin_loss))
        if self.cuda:
            torch.cuda.synchronize()
        self._mark("other")
        return self

    def __exit__(self, *_: object) -> None:
        self._mark("other", always=True)
        if self.cuda:
            torch.cuda.synchronize()
        for handle in self.handles:
            handle.remove()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        for (start, part), (stop, _next) in zip(self.marks, self.marks[1:], strict=False):
            self.seconds[part] += start.elapsed_time(stop) / 1000 if self.cuda else stop - start

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._begin(name)
        yield
        self._end()

    @contextmanager
    def backward_of(self, loss: Tensor) -> Iterator[None]:
        seen: set[Any] = set()
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            self.handles.append(node.register_prehook(partial(self._begin_node, self._part_of(node))))
            waiting += [following for following, _ in node.next_functions]
        self.in_backward = True
        yield
        self.in_backward, self.running = False, ["other"]
        self._mark("other")

    def _part_of(self, node: Any) -> str:
        if hasattr(node, "variable"):  # adds to the gradient of a parameter
            return self.parameters.get(id(node.variable), "other")
        place = bisect_right(self.borders, node._sequence_nr(), key=lambda border: border[0])
        return self.borders[place - 1][1] if place else "other"

    def _begin_node(self, part: str, *_: object) -> None:
        # What runs inside (a layer that is recomputed) comes on top, and is forgotten at the next node.
        self.running = ["other", part]
        self._mark(part)

    def _begin(self, part: str, *_: object) -> None:
        self.running.append(part)
        self._mark(part)

    def _end(self, *_: object) -> None:
        if len(self.running) > 1:
            self.running.pop()
        self._mark(self.running[-1])

    def _begin_loss(self, *_: object) -> None:
        # After the last layer the model computes its loss, until its own hook ends it.
        self.running[-1] = "loss"
        self._mark("loss")

    def _mark(self, part: str, always: bool = False) -> None:
        if not self.in_backward:
            self.borders.append((torch.autograd._get_sequence_nr(), part))
        if always or not self.marks or self.marks[-1][1] != part:
            self.marks.append((self._now(), part))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def profiled_modules(model: VLM) -> dict[nn.Module, str]:
    """The modules whose time is told apart, and the part of each."""
    modules: dict[nn.Module, str] = {tower: "vision" for tower in model.vision_towers.values()}
    modules |= {model.fusion: "fusion", model.connector: "connector"}
    for layer in model.language.layers:
        assert isinstance(layer, DecoderLayer)
        modules[layer.attention] = "attention"
        modules[layer.mlp] = "experts" if isinstance(layer.mlp, MoE) else "mlp"
    return modules
