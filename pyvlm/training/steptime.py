"""How long a training step takes, beside the same model on the reference backend, measured in one run."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyvlm.models.inputs import to_device
from pyvlm.models.vlm import VLM


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of forward and backward, median and quartiles over the repetitions."""

    backend: str
    median: float
    low: float
    high: float


def compare_backends(
    model: VLM, batch: Mapping[str, Tensor | None], repetitions: int = 7, warmup: int = 2
) -> list[StepTime]:
    """Times forward and backward on `batch` for the model's own backend and for "reference".

    Both have the same weights and take turns, so that whatever else the machine does touches both alike.
    """
    reference = VLM(model.config, backend="reference")
    reference.load_state_dict(model.state_dict())
    device = next(model.parameters()).device
    inputs = to_device(batch, device)
    own = VLM(model.config)
    own.load_state_dict(model.state_dict())
    models = {model.config.backend: own.to(device).train(), "reference": reference.to(device).train()}
    seconds: dict[str, list[float]] = {backend: [] for backend in models}
    for repetition in range(warmup + repetitions):
        for backend, candidate in models.items():
            taken = _time_step(candidate, inputs)
            if repetition >= warmup:
                seconds[backend].append(taken)
    return [_summary(backend, taken) for backend, taken in seconds.items()]


def _time_step(model: VLM, inputs: Mapping[str, Tensor | None]) -> float:
    model.zero_grad()
    _wait(model)
    start = time.perf_counter()
    model(**inputs).loss.backward()
    _wait(model)
    return time.perf_counter() - start


def _wait(model: VLM) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def _summary(backend: str, seconds: list[float]) -> StepTime:
    low, median, high = (1000 * q for q in statistics.quantiles(seconds, n=4, method="inclusive"))
    return StepTime(backend, median, low, high)
