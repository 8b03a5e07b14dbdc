"""FLOPs of a VLM part by part, from shapes alone: forward, and backward as far as frozen parts leave it.

The vision side is counted by running it on the meta device (`pyvlm.training.products`); the language model,
whose attention and experts depend on what the tokens are, by formulas over its modules. What a FLOP is, and
what is left out, says `Cost`.

Shapes: B samples, L tokens a row, N images, H heads, G key-value heads, D head size.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pyvlm.layout import IMAGE, TEXT, TokenLayout
from pyvlm.models.config import VLMConfig
from pyvlm.models.encoders import Pair
from pyvlm.models.inputs import default_layout, next_labels
from pyvlm.models.language import DecoderLayer, SwiGLU
from pyvlm.models.processor import IGNORED
from pyvlm.models.vlm import VLM
from pyvlm.nn.moe import MoE
from pyvlm.nn.moe_options import TEXT_ROW, RouterOptions, Share
from pyvlm.nn.moe_routing import TokenGroups
from pyvlm.ops._backends import resolve
from pyvlm.training.products import Cost, count_products

VISION_SIDE = ("vision", "fusion", "connector")
ASSUMED_IMAGE = (
    480,
    640,
)  # (height, width) of the commonest photographs of COCO, which LLaVA's data are made of


@dataclass(frozen=True)
class Workload:
    """What a batch is, as far as its cost goes.

    Attributes:
        layout: of its tokens, on the CPU; padding is computed like any other token.
        labelled: tokens whose next one is learned; the head is computed for them alone.
        images: how many the vision towers see; with tiling, base views and tiles.
    """

    layout: TokenLayout
    labelled: int
    images: int

    @property
    def tokens(self) -> int:
        return self.layout.kind.numel()

    @cached_property
    def image_tokens(self) -> int:
        return int((self.layout.kind == IMAGE).sum())

    @classmethod
    def of_batch(cls, config: VLMConfig, batch: Mapping[str, Any]) -> "Workload":
        """That of a batch of `Processor.collate`."""
        input_ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
        layout = default_layout(
            config,
            input_ids,
            batch["attention_mask"].cpu(),
            labels,
            image_sizes=batch.get("image_sizes"),
            documents=batch.get("documents"),
        )
        labelled = int((next_labels(labels, layout) != IGNORED).sum())
        return cls(layout, labelled, 0 if batch["images"] is None else len(batch["images"]))

    @classmethod
    def of_shape(
        cls, config: VLMConfig, batch: int, length: int, images: int, image_size: Pair = ASSUMED_IMAGE
    ) -> "Workload":
        """Rows of one token, then their images, a token between them, then text whose second half is learned.

        Args:
            image_size: (height, width) of every image, which matters with tiling only.

        Raises:
            ValueError: the images do not fit into the rows.
        """
        each, maps = image_cost(config, image_size)
        text = length - images * (each + 1)
        if text < 1:
            raise ValueError(
                f"length {length} has no room for {images} images of {each} tokens and a token of text "
                f"before and after each: give at least {images * (each + 1) + 1}, or fewer images"
            )
        kinds = ([TEXT] + [IMAGE] * each) * images + [TEXT] * text
        kind = torch.tensor(kinds, dtype=torch.uint8).expand(batch, length).contiguous()
        labelled = text // 2
        prefix = torch.arange(length).expand(batch, length) < length - labelled
        return cls(TokenLayout(kind, prefix=prefix), batch * labelled, batch * images * maps)

    @classmethod
    def of_text(cls, tokens: int) -> "Workload":
        """One row of text, learned to the last token."""
        kind = torch.full((1, tokens), TEXT, dtype=torch.uint8)
        return cls(TokenLayout(kind, prefix=torch.ones(1, tokens, dtype=torch.bool)), tokens, 0)


class StepCosts:
    """Costs of batches for one model and one choice of parts that learn.

    Args:
        config: the model; its weights are not read, and none are made.
        train: the parts that learn, as `VLM.parts` names them; None: all of them.

    Raises:
        ValueError: a part that the model does not have.
    """

    def __init__(self, config: VLMConfig, train: Sequence[str] | None = None) -> None:
        self.config, self.model = config, skeleton(config)
        parts = self.model.parts(sorted({part for part in train or () if "." in part}))
        train = list(parts) if train is None else train
        if unknown := sorted(set(train) - set(parts)):
            raise ValueError(f"the model has no part {unknown[0]!r} to train; it has {', '.join(parts)}")
        for part, parameters in parts.items():
            for parameter in parameters:
                parameter.requires_grad_(part in train)
        # Of n images it is a + b·n: what depends on no image, such as a resampler's queries, is made once.
        self.one_image, self.two_images = (self._vision_side(n) for n in (1, 2))

    def of(self, workload: Workload) -> dict[str, Cost]:
        """The cost of one forward and backward pass, by part, in the order of forward.

        "vision.NAME" a tower, fusion, connector; of the language model: projections (of attention), attention
        (its pairs of query and key), mlp, experts (routers included), partial_lora, lora; head (with the
        loss). Parts that the model lacks are left out.
        """
        costs = {}
        if workload.images:
            for name, one in self.one_image.items():
                costs[name] = one + (self.two_images[name] - one) * (workload.images - 1)
        costs.update(self.walk(workload).costs)
        return {name: cost for name, cost in costs.items() if cost.forward}

    def _vision_side(self, images: int) -> dict[str, Cost]:
        image = self.config.image
        pixels = torch.empty(images, image.channels, image.size, image.size, device="meta")
        regions: dict[str, nn.Module] = {
            f"vision.{name}": tower for name, tower in self.model.vision_towers.items()
        }
        regions |= {"fusion": self.model.fusion, "connector": self.model.connector}
        return count_products(lambda: self.model.image_features(pixels), regions, "connector")

    def walk(self, workload: Workload) -> "Walk":
        """The way of a batch through the language model."""
        language, config = self.model.language, self.config.language
        vision_learns = any(p.requires_grad for name in VISION_SIDE for p in self.model.parts()[name])
        walk = Walk(workload, (bool(workload.images) and vision_learns) or _learns(language.embed_tokens))
        windows = {config.window_of(i) for i in range(config.num_layers)}
        spans = {window: workload.layout.spans(config.attention_rule, window) for window in windows}
        pairs = {window: of_window.visible_pairs() for window, of_window in spans.items()}
        streams = 2 if next(iter(spans.values())).separate else 1
        for i, layer in enumerate(language.layers):
            assert isinstance(layer, DecoderLayer)
            walk.layer(layer, pairs[config.window_of(i)], streams)
        walk.save(
            "attention", 2 * workload.tokens * config.head_size
        )  # cosines and sines, once for all layers
        walk.norm("head", language.norm)
        walk.product("head", workload.labelled, language.head_weight)
        if walk.needs_grad or language.head_weight.requires_grad:
            walk.save("head", workload.tokens * config.hidden_size)
        return walk


class Walk:
    """Goes through the decoder in the order of its computation.

    Attributes:
        needs_grad: something before this place learns, so that its gradient has to come through here.
        costs: by part, so far.
        saved_by_layer: elements that each layer keeps for backward.
    """

    def __init__(self, workload: Workload, needs_grad: bool) -> None:
        self.workload, self.needs_grad = workload, needs_grad
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.saved_by_layer: list[int] = []

    def layer(self, layer: DecoderLayer, pairs: int, streams: int) -> None:
        experts, attended = "", False
        saved_before = total(self.costs.values()).saved
        for path, module in layer.named_modules():
            if experts and path.startswith(experts):
                continue
            if path.startswith("attention.o_proj") and not attended:
                attended = True
                self.attention(layer, pairs, streams)
            if isinstance(module, MoE):
                experts = path + "."
                self.experts(module)
            elif isinstance(module, nn.Linear):
                part, rows = self.kind_of(path)
                self.product(part, rows, module.weight)
                self.save_around(layer, path, part, rows, module)
            elif path.endswith("_norm") and not isinstance(module, nn.Identity):
                self.norm("mlp" if path.startswith("mlp") else "projections", module)
            self.needs_grad |= any(p.requires_grad for p in module.parameters(recurse=False))
        self.saved_by_layer.append(total(self.costs.values()).saved - saved_before)

    def kind_of(self, path: str) -> tuple[str, int]:
        """The part that a linear layer of the decoder belongs to, and how many rows it sees."""
        if "lora_a" in path or "lora_b" in path:
            return "partial_lora", self.workload.image_tokens
        if "lora_A" in path or "lora_B" in path:  # peft's
            return "lora", self.workload.tokens
        return ("projections" if path.startswith("attention.") else "mlp"), self.workload.tokens

    def product(self, part: str, rows: int, weight: Tensor) -> None:
        out_features, in_features = weight.shape
        flops, elements = 2 * rows * weight.numel(), rows * (in_features + out_features) + weight.numel()
        gradients = self.needs_grad + weight.requires_grad
        self.costs[part] += Cost(flops, gradients * flops, elements, gradients * elements)

    def save(self, part: str, elements: int) -> None:
        self.costs[part] += Cost(saved=elements)

    def save_around(self, layer: DecoderLayer, path: str, part: str, rows: int, linear: nn.Linear) -> None:
        """What a linear layer keeps, its input, and what the gate behind it does."""
        if linear.weight.requires_grad and not path.startswith("attention.o_proj"):  # attention keeps that
            self.save(part, rows * linear.in_features)
        if (
            path.startswith("mlp.gate_up_proj")
            and part == "mlp"
            and (self.needs_grad or linear.weight.requires_grad)
        ):
            # Both halves; where no kernel computes the gate's activation again, that too.
            halves = 3 if _gates_in_passes(layer.mlp) else 2
            self.save(part, rows * linear.out_features * halves // 2)

    def norm(self, part: str, module: nn.Module) -> None:
        """A norm keeps its input, and a number a token."""
        channels, learns = sum(p.numel() for p in module.parameters(recurse=False)), _learns(module)
        if self.needs_grad or learns:
            self.save(part, self.workload.tokens * (channels + 1))
        self.needs_grad |= learns

    def attention(self, layer: DecoderLayer, pairs: int, streams: int) -> None:
        attention = layer.attention
        heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_dim
        flops = 4 * pairs * heads * size
        elements = self.workload.tokens * 2 * (heads + kv_heads) * size  # query, output; key, value
        twice = 2 * self.needs_grad
        # For backward: the rotated queries and keys; the values, and with them the unrotated rest of their
        # projection; one output, with a second stream that one's too; and a number a query, head and stream.
        kept = (heads + kv_heads) + (heads + 2 * kv_heads) + streams * heads
        saved = self.workload.tokens * (kept * size + streams * heads) * self.needs_grad
        self.costs["attention"] += Cost(flops, twice * flops, elements, twice * elements, saved)

    def experts(self, moe: MoE) -> None:
        self.product("experts", self.workload.tokens, moe.gate.weight)
        slots = sum(expected_slots(moe.options, self.workload.layout).values())
        weights = [moe.gate_up_proj, moe.down_proj]
        read = min(moe.num_experts, slots)
        if self.needs_grad or any(weight.requires_grad for weight in (moe.gate.weight, *weights)):
            of_tokens = self.workload.tokens * (moe.gate.in_features + moe.num_experts)
            self.save("experts", of_tokens + slots * moe.gate_up_proj.shape[1])
        for weight in weights:
            _, out_features, in_features = weight.shape
            each = out_features * in_features
            flops, elements = 2 * slots * each, slots * (in_features + out_features) + read * each
            gradients = self.needs_grad + weight.requires_grad
            self.costs["experts"] += Cost(flops, gradients * flops, elements, gradients * elements)
            # The routing's weights carry a gradient to the router wherever that learns.
            self.needs_grad |= weight.requires_grad or moe.gate.weight.requires_grad


def image_cost(config: VLMConfig, image_size: Pair) -> tuple[int, int]:
    """Tokens of an image of (height, width), and maps that the vision towers make of it."""
    if config.tiling is None:
        return config.tokens_per_image, 1
    tile = config.image.size
    tokens = config.tiling.num_tokens(image_size, tile, config.tokens_per_image)
    return tokens, config.tiling.num_maps(image_size, tile)


def skeleton(config: VLMConfig) -> VLM:
    """The model on the meta device: all shapes and no memory."""
    with torch.device("meta"):
        return VLM(config.without_sources())


def expected_slots(options: RouterOptions, layout: TokenLayout, training: bool = True) -> dict[Share, int]:
    """How many (token, expert) pairs each router makes.

    Exact for expert choice and for token choice without a capacity; with one, an upper bound; under threshold
    choice what its thresholds aim at.
    """
    groups = TokenGroups.of(layout)
    slots = {}
    for share in options.shares:
        tokens = len(groups.rows(share.modalities))
        if share.router == "expert_choice":
            _, known = groups.image_capacity(options, share.num_experts)
            assert known is not None, "the layout is no traced one"
            slots[share] = known
            continue
        slots[share] = tokens * options.top_k
        capacity = options.token_capacity(tokens, share.num_experts, training)
        if share.router == "token_choice" and capacity is not None:
            slots[share] = min(slots[share], share.num_experts * capacity)
    return slots


def experts_per_token(options: RouterOptions, modality: int = TEXT_ROW) -> float:
    """How many experts a token of a modality gets, on average and before any is full."""
    share = next(share for share in options.shares if modality in share.modalities)
    return options.capacity_factor if share.router == "expert_choice" else options.top_k


def moe_layers(model: VLM) -> list[MoE]:
    return [module for module in model.language.modules() if isinstance(module, MoE)]


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, start=Cost())


def _gates_in_passes(mlp: nn.Module) -> bool:
    """Whether a SwiGLU has no kernel on the devices of this machine, and runs as PyTorch's passes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return isinstance(mlp, SwiGLU) and resolve("gated_activation", mlp.backend, device) == "reference"


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
