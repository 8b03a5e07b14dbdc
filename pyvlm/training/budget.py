"""What a recipe takes before anything is bought: parameters, FLOPs, memory, hours, stage by stage.

Everything comes from shapes (`pyvlm.training.flops`): no weights are made and no checkpoint is read.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pyvlm.data.files import FilesConfig
from pyvlm.models.checkpoint import write_file
from pyvlm.models.config import VLMConfig
from pyvlm.models.encoders import Pair
from pyvlm.models.upcycling import upcycle
from pyvlm.models.vlm import VLM
from pyvlm.nn.moe_options import IMAGE_ROW, TEXT_ROW
from pyvlm.training.bundled import bundled_dialogues
from pyvlm.training.conversation import dialogue_messages
from pyvlm.training.flops import (
    ASSUMED_IMAGE,
    StepCosts,
    Workload,
    experts_per_token,
    image_cost,
    moe_layers,
    skeleton,
    total,
)
from pyvlm.training.products import Cost
from pyvlm.training.recipe import Recipe
from pyvlm.training.utilization import measured_limit

BYTES = {"fp32": 4, "bf16": 2}
ADAMW_MOMENTS = 2
TEXT_BESIDE_IMAGES = 128  # tokens of text in a batch of which nothing is said
DRAWN_STEPS = 4  # of a stage's own data, spread over it


@dataclass(frozen=True)
class PartParameters:
    """How many parameters a part has, and through how many of them one token of a modality goes."""

    total: int
    text_token: float
    image_token: float


@dataclass(frozen=True)
class Memory:
    """Bytes where every number takes as many as `precision` says."""

    precision: str
    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


@dataclass(frozen=True)
class Activations:
    """Bytes that one forward pass keeps for backward, in the recipe's precision.

    Attributes:
        plain, checkpointed: without and with gradient checkpointing of the language model's layers.
        extra_flops: of checkpointing, which runs each layer's forward pass again.
    """

    plain: int
    checkpointed: int
    extra_flops: int


@dataclass(frozen=True)
class Decoding:
    """One further token of one answer, behind `length` others: what it computes, and what it has to read."""

    length: int
    flops: int
    weight_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class StageBudget:
    """A stage: the mean cost of its steps by part, and what all of them come to.

    Attributes:
        data: what its batches are.
        steps: None where the stage counts epochs of data whose size the recipe does not know.
        tokens, images: of a step, padding included.
        hours: at the given rate; price: of these hours, None where none is given.
    """

    name: str
    data: str
    train: list[str]
    trainable: int
    steps: int | None
    tokens: int
    images: int
    step: dict[str, Cost]
    activations: Activations
    memory: list[Memory]
    hours: float | None
    price: float | None

    @property
    def flops(self) -> int | None:
        """Of all steps."""
        return None if self.steps is None else self.steps * total(self.step.values()).total


@dataclass(frozen=True)
class Budget:
    """All of `pyvlm budget`; what is not of a stage is of the model that the last one leaves.

    Attributes:
        changes: whether stages make another model of it, as experts of its MLPs.
        image_size: (height, width) that images are taken to have; None without tiling, where it is no matter.
        maps_per_image: what the vision towers see of an image: with tiling its base view and its tiles.
        forward: by part, of the batch named by `batch`, `length` and `images` (of each row).
        cache_bytes: of the key-value caches for that batch.
        rate: FLOPs a second that hours are reckoned with; rate_source: where it comes from.
    """

    name: str
    precision: str
    changes: bool
    batch: int
    length: int
    images: int
    image_size: Pair | None
    tokens_per_image: int
    maps_per_image: int
    parameters: dict[str, PartParameters]
    forward: dict[str, Cost]
    cache_bytes: int
    activations: Activations
    decoding: Decoding
    stages: list[StageBudget]
    rate: float
    rate_source: str

    @property
    def total_parameters(self) -> int:
        return sum(part.total for part in self.parameters.values())


def make_budget(
    recipe: Recipe,
    batch: int = 1,
    length: int | None = None,
    images: int | None = None,
    rate: float | None = None,
    price_per_hour: float | None = None,
    image_size: Pair | None = None,
) -> Budget:
    """The budget of a recipe: of the model that its last stage leaves, and of each stage.

    Args:
        batch, length, images: rows, tokens a row and images a row of the batch whose forward pass is shown;
            by default one image and 128 tokens of text. Where `length` or `images` is given, stages are
            reckoned with such rows too, and otherwise with rows of their own data.
        rate: FLOPs a second; None: that of a matrix product on this machine, measured now.
        price_per_hour: of a machine with that rate.
        image_size: (height, width) of every image, for a model with tiling; None: 480 by 640.

    Raises:
        ValueError: an image size without tiling, the images do not fit into the rows, or a stage trains a
            part that the model lacks.
    """
    models, size = stage_models(recipe), BYTES[recipe.precision]
    config = models[-1]
    if image_size is not None and config.tiling is None:
        side = config.image.size
        raise ValueError(
            f"every image is made {side} by {side} pixels: an image size is for models with tiling"
        )
    shape = None if length is None and images is None else (length, images)
    seen = image_size or ASSUMED_IMAGE
    length, images = row_shape(config, length, images, seen)
    workload = Workload.of_shape(config, batch, length, images, seen)
    source = "given"
    if rate is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rate, source = (
            measured_limit(device, recipe.precision),
            f"torch.mm in {recipe.precision}, measured here",
        )
    stages = []
    for name, model in zip(recipe.stages, models, strict=True):
        steps, data = stage_workloads(recipe, name, shape, seen)
        stages.append(_budget_stage(recipe, model, name, steps, data, rate, price_per_hour))
    costs = StepCosts(config)
    language = config.language
    cached = 2 * language.num_layers * language.kv_heads * language.head_size * size
    return Budget(
        recipe.name,
        recipe.precision,
        config != recipe.model,
        batch,
        length,
        images,
        None if config.tiling is None else seen,
        *image_cost(config, seen),
        count_parameters(costs.model),
        costs.of(workload),
        batch * length * cached,
        count_activations(costs, workload, size),
        count_decoding(costs, length, size),
        stages,
        rate,
        source,
    )


def count_parameters(model: VLM) -> dict[str, PartParameters]:
    """The parameters of every part, towers apart; the parts' totals add up to all of the model's.

    A token of text passes the language model and its share of the experts; one of an image the parts that
    make it besides. Embeddings and head count whole.
    """
    parts = {name: sum(p.numel() for p in parameters) for name, parameters in model.parts().items()}
    counts = {}
    for name, tower in model.vision_towers.items():
        of_tower = sum(p.numel() for p in tower.parameters())
        counts[f"vision.{name}"] = PartParameters(of_tower, 0, of_tower)
    text_experts, image_experts = (_active_experts(model, row) for row in (TEXT_ROW, IMAGE_ROW))
    for name, number in parts.items():
        if name == "vision" or name.startswith("vision."):
            continue
        if name == "moe":
            counts[name] = PartParameters(number, text_experts, image_experts)
        elif name in ("fusion", "connector", "partial_lora"):
            counts[name] = PartParameters(number, 0, number)
        else:
            counts[name] = PartParameters(number, number, number)
    return {name: part for name, part in counts.items() if part.total}


def _active_experts(model: VLM, modality: int) -> float:
    """Parameters of routers, and of the experts that a token gets on average."""
    active = 0.0
    for moe in moe_layers(model):
        gate = sum(p.numel() for p in moe.gate.parameters())
        experts = sum(p.numel() for p in moe.parameters()) - gate
        active += gate + experts * experts_per_token(moe.options, modality) / moe.num_experts
    return active


def count_memory(parameters: int, trainable: int) -> list[Memory]:
    """Weights, and the gradients and AdamW's moments of those that learn; activations are apart."""
    return [
        Memory(precision, parameters * size, trainable * size, trainable * size * ADAMW_MOMENTS)
        for precision, size in BYTES.items()
    ]


def count_activations(costs: StepCosts, workload: Workload, size: int) -> Activations:
    """What one batch keeps; `size`: bytes a number."""
    walk = costs.walk(workload)
    plain = total(costs.of(workload).values()).saved
    layers = walk.saved_by_layer
    if not sum(layers):  # nothing comes back through the decoder
        return Activations(size * plain, size * plain, 0)
    inputs = len(layers) * workload.tokens * costs.config.language.hidden_size
    again = sum(cost.forward for name, cost in walk.costs.items() if name != "head")
    return Activations(size * plain, size * (plain - sum(layers) + inputs + max(layers)), again)


def count_decoding(costs: StepCosts, length: int, size: int) -> Decoding:
    """One token of text behind `length` others."""
    language = costs.config.language
    one = costs.walk(Workload.of_text(1)).costs
    flops = sum(cost.forward for name, cost in one.items() if name != "attention")
    elements = sum(cost.forward_elements for name, cost in one.items() if name != "attention")
    cache = 0
    for layer in range(language.num_layers):
        keys = min(length + 1, language.window_of(layer) or length + 1)
        flops += 4 * keys * language.num_heads * language.head_size
        cache += 2 * keys * language.kv_heads * language.head_size
    return Decoding(length, flops, size * elements, size * cache)


def row_shape(config: VLMConfig, length: int | None, images: int | None, image_size: Pair) -> tuple[int, int]:
    """Tokens and images of a row, with what is left open: one image, and 128 tokens of text."""
    images = 1 if images is None else images
    each, _ = image_cost(config, image_size)
    return images * (each + 1) + TEXT_BESIDE_IMAGES if length is None else length, images


def stage_workloads(
    recipe: Recipe,
    name: str,
    shape: tuple[int | None, int | None] | None = None,
    image_size: Pair = ASSUMED_IMAGE,
) -> tuple[list[list[Workload]], str]:
    """The batches of some steps of a stage, and in words what they are.

    Args:
        name: of the stage.
        shape: tokens and images a row, see `row_shape`; None: those of the stage's own data, where these come
            with pyvlm.
        image_size: (height, width) of the images of such rows, which matters with tiling only.
    """
    stage, model = recipe.stages[name], recipe.model_in(name)
    size = stage.batch_size // stage.accumulation
    if shape is not None or isinstance(stage.data, FilesConfig):
        length, images = row_shape(model, *(shape or (None, None)), image_size)
        batches = [Workload.of_shape(model, size, length, images, image_size)] * stage.accumulation
        return [batches], f"rows of {length:,} tokens with {images} images"
    processor = recipe.processor(name).changed(form=stage.form)
    source = bundled_dialogues("train", stage.data, recipe.seed)
    steps = []
    for number in range(DRAWN_STEPS):
        dialogues = source.batch(1 + stage.count_steps() * number // DRAWN_STEPS, range(stage.batch_size))
        samples = [processor.encode(dialogue_messages(dialogue)) for dialogue in dialogues]
        collated = [processor.collate(samples[i : i + size]) for i in range(0, len(samples), size)]
        steps.append([Workload.of_batch(model, batch) for batch in collated])
    return steps, f"{DRAWN_STEPS} steps of its own data"


def step_cost(costs: StepCosts, steps: Sequence[Sequence[Workload]]) -> dict[str, Cost]:
    """The mean cost of a step by part."""
    summed: dict[str, Cost] = {}
    for workload in (workload for step in steps for workload in step):
        for name, cost in costs.of(workload).items():
            summed[name] = summed.get(name, Cost()) + cost
    return {name: cost // len(steps) for name, cost in summed.items()}


def stage_models(recipe: Recipe) -> list[VLMConfig]:
    """The model of each stage: MLPs that one stage makes experts of are experts in the next ones too, and
    images keep the size that one stage gives them."""
    language, configs = recipe.model.language, []
    for name, stage in recipe.stages.items():
        config = recipe.model_in(name).model_copy(update={"language": language})
        if stage.upcycle is not None:
            config = upcycle(skeleton(config), stage.upcycle, recipe.seed).config
            language = config.language
        configs.append(config)
    return configs


def _budget_stage(
    recipe: Recipe,
    model: VLMConfig,
    name: str,
    steps: list[list[Workload]],
    data: str,
    rate: float,
    price_per_hour: float | None,
) -> StageBudget:
    stage, size = recipe.stages[name], BYTES[recipe.precision]
    costs = StepCosts(model, stage.train)
    step = step_cost(costs, steps)
    count = None if stage.steps is None and stage.samples is None else stage.count_steps()
    hours = None if count is None else count * total(step.values()).total / rate / 3600
    parameters = list(costs.model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    largest = max((batch for batches in steps for batch in batches), key=lambda batch: batch.tokens)
    return StageBudget(
        name,
        data,
        list(stage.train),
        trainable,
        count,
        sum(batch.tokens for batches in steps for batch in batches) // len(steps),
        sum(batch.images for batches in steps for batch in batches) // len(steps),
        step,
        count_activations(costs, largest, size),
        count_memory(sum(p.numel() for p in parameters), trainable),
        hours,
        None if hours is None or price_per_hour is None else hours * price_per_hour,
    )


def write_json(path: str | os.PathLike[str], budget: Budget) -> None:
    """All of a budget, and of each stage its FLOPs."""
    content: dict[str, Any] = asdict(budget) | {"total_parameters": budget.total_parameters}
    for entry, stage in zip(content["stages"], budget.stages, strict=True):
        entry["flops"] = stage.flops
    write_file(Path(path), json.dumps(content, indent=2).encode())
