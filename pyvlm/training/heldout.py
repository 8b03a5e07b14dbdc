"""A quick look at held-out data during training, and whether it was the best so far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyvlm._tell import tell
from pyvlm.data.files import FilesConfig
from pyvlm.models.inputs import to_device
from pyvlm.models.processor import IGNORED, Processor
from pyvlm.models.vlm import VLM
from pyvlm.training.bundled import bundled_dialogues
from pyvlm.training.dialogue import Dialogue
from pyvlm.training.evaluate import evaluate
from pyvlm.training.recipe import Recipe
from pyvlm.training.sources import SampleSource, make_source

HIGHER_IS_BETTER = {"held_out_accuracy": True, "held_out_loss": False}


@dataclass(frozen=True)
class Look:
    """What was found; `metric` is a key of `HIGHER_IS_BETTER`."""

    metric: str
    value: float

    def beats(self, other: "Look | None") -> bool:
        """Whether it is better than an earlier one, or the first."""
        if other is None or other.metric != self.metric:
            return True
        return self.value > other.value if HIGHER_IS_BETTER[self.metric] else self.value < other.value


def best_look(metrics: Sequence[Mapping[str, Any]]) -> Look | None:
    """The best look among the lines of metrics.jsonl; of equal ones the first."""
    best = None
    for line in metrics:
        for metric in HIGHER_IS_BETTER.keys() & line.keys():
            look = Look(metric, line[metric])
            best = look if look.beats(best) else best
    return best


class HeldOut:
    """A recipe's held-out data, opened and read once; `look` as often as wanted.

    Args:
        recipe: `recipe.held_out` says which data, `recipe.evaluation` how many at a look.
        processors: any of them may encode the data; those of the stages, which may differ in their images.
        tell: is told of records that are left out.
        cache: the folder that keeps lengths of files, see `pyvlm.data.files.FilesSource`.

    Raises:
        ValueError: the data are missing or cannot be read; the message says what is wrong with them.
    """

    def __init__(
        self,
        recipe: Recipe,
        processors: Sequence[Processor],
        tell: Callable[[str], None] = tell,
        cache: Path | None = None,
    ) -> None:
        self.settings, data = recipe.evaluation, recipe.held_out
        self.dialogues: list[Dialogue] = []
        self.sources: dict[Processor, SampleSource] = {}
        if isinstance(data, FilesConfig):
            try:
                for processor in dict.fromkeys(processors):
                    self.sources[processor] = make_source(
                        data,
                        "test",
                        recipe.seed,
                        processor,
                        batch_size=self.settings.batch_size,
                        tell=tell,
                        cache=cache,
                    )
            except ValueError as error:
                raise ValueError(f"evaluation.data: {error}") from error
        else:
            data = data.model_copy(update={"rounds": (1, 1)})
            source = bundled_dialogues("test", data, recipe.seed)
            self.dialogues = source.batch(0, range(self.settings.quick_dialogues))

    def look(self, model: VLM, processor: Processor) -> Look:
        """The accuracy of first answers where the data are bundled dialogues, and else the loss.

        The model is left in training mode.

        Args:
            processor: one of those given at the start, that of the stage.
        """
        count, batch_size = self.settings.quick_dialogues, self.settings.batch_size
        if self.dialogues:
            look = Look("held_out_accuracy", evaluate(model, processor, self.dialogues, batch_size).accuracy)
        else:
            loss = held_out_loss(model, processor, self.sources[processor], count, batch_size)
            look = Look("held_out_loss", loss)
        model.train()
        return look


@torch.no_grad()
def held_out_loss(
    model: VLM, processor: Processor, source: SampleSource, count: int, batch_size: int
) -> float:
    """The mean cross-entropy over the labelled tokens of the first `count` samples, or all where there are
    fewer; without the routers' losses."""
    model.eval()
    device = next(model.parameters()).device
    if source.epoch_size is not None:
        count = min(count, source.epoch_size)
    total, labelled = 0.0, 0
    for step, start in enumerate(range(0, count, batch_size)):
        samples = source.samples(step, range(min(batch_size, count - start)))
        batch = processor.collate(samples)
        labels = batch["labels"]
        assert labels is not None
        words = int((labels[:, 1:] != IGNORED).sum())
        total += words * model(**to_device(batch, device)).cross_entropy.item()
        labelled += words
    return total / labelled if labelled else float("nan")
