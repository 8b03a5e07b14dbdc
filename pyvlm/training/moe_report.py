"""`pyvlm moe-report`: what a model's experts work on, and the pathways that tokens take through its layers.

After the analysis in MoE-LLaVA (arXiv 2401.15947), but from what was dispatched, not from what was preferred.

Shapes: T tokens of a batch, E experts, M MoE layers.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pyvlm.models.checkpoint import write_file
from pyvlm.models.inputs import default_layout, to_device
from pyvlm.models.processor import Processor, Sample
from pyvlm.models.vlm import VLM
from pyvlm.nn.moe_options import MODALITIES
from pyvlm.nn.moe_routing import TokenGroups
from pyvlm.ops.moe import Routing

NO_EXPERT = -1


@dataclass(frozen=True)
class Load:
    """What a layer did with the tokens of a modality: by expert, and how many had no expert at all."""

    dispatched: list[int]
    dropped: list[int]
    unrouted: int

    @property
    def shares(self) -> list[float]:
        """Of the dispatched tokens, by expert."""
        return [count / max(sum(self.dispatched), 1) for count in self.dispatched]


@dataclass(frozen=True)
class Pathway:
    """The expert of the largest weight in each MoE layer (−1: none), and how many tokens went this way."""

    experts: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class ExpertReport:
    """Loads by modality and MoE layer; pathways by modality, the commonest first; the layers' numbers."""

    conversations: int
    tokens: dict[str, int]
    layers: list[int]
    loads: dict[str, list[Load]]
    pathways: dict[str, list[Pathway]]


@torch.no_grad()
def report_experts(
    model: VLM, processor: Processor, samples: Iterable[Sample], batch_size: int = 16
) -> ExpertReport:
    """Runs the samples through the model in evaluation mode and counts.

    Raises:
        ValueError: a model without experts, or no samples.
    """
    moe = model.config.language.moe
    if moe is None:
        raise ValueError("the model has no mixture-of-experts layers: language.moe is not in its config")
    model.eval()
    device = next(model.parameters()).device
    layers = model.config.language.moe_layers
    shape = len(layers), len(MODALITIES), moe.num_experts
    dispatched, dropped = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    unrouted = torch.zeros(shape[:2], dtype=torch.int64)
    pathways: list[Counter[tuple[int, ...]]] = [Counter() for _ in MODALITIES]
    conversations, stream = 0, iter(samples)
    while part := list(islice(stream, batch_size)):
        conversations += len(part)
        batch = to_device(processor.collate(part), device)
        input_ids, image_sizes = batch["input_ids"], batch.get("image_sizes")
        layout = default_layout(
            model.config, input_ids, batch["attention_mask"], batch["labels"], image_sizes
        )
        stats = model.hidden_states(input_ids, batch["images"], layout, image_sizes=image_sizes)[1]
        dispatched += torch.stack([layer.dispatched for layer in stats]).cpu()
        dropped += torch.stack([layer.dropped for layer in stats]).cpu()
        unrouted += torch.stack([layer.unrouted for layer in stats]).cpu()
        way_TM = torch.stack([top_experts(layer.routing) for layer in stats], dim=1)
        groups = TokenGroups.of(layout)
        for counter, rows in zip(pathways, (groups.text, groups.image), strict=True):
            ways, counts = way_TM[rows].unique(dim=0, return_counts=True)
            for way, count in zip(ways.tolist(), counts.tolist(), strict=True):
                counter[tuple(way)] += count
    if not conversations:
        raise ValueError("there are no conversations to report on")
    report = ExpertReport(conversations, {}, layers, {}, {})
    for m, modality in enumerate(MODALITIES):
        counts = zip(dispatched[:, m].tolist(), dropped[:, m].tolist(), unrouted[:, m].tolist(), strict=True)
        report.loads[modality] = [Load(*of_layer) for of_layer in counts]
        report.tokens[modality] = pathways[m].total()
        ranked = sorted(pathways[m].items(), key=lambda item: (-item[1], item[0]))
        report.pathways[modality] = [Pathway(*item) for item in ranked]
    return report


def top_experts(routing: Routing) -> Tensor:
    """The expert of the largest weight of each token, ties to the lower; −1 where it has none: int64 [T]."""
    weight_TE = routing.weight.new_full((routing.num_tokens, routing.num_experts), -1.0)
    weight_TE[routing.token.long(), routing.expert] = routing.weight
    return weight_TE.argmax(-1).masked_fill(routing.token_offsets.diff() == 0, NO_EXPERT)


def format_pathway(experts: Iterable[int]) -> str:
    return " → ".join("-" if expert == NO_EXPERT else str(expert) for expert in experts)


def format_report(report: ExpertReport, top: int) -> str:
    """The report for a terminal, with the `top` most frequent pathways of each modality."""
    counts = " and ".join(f"{count:,} {modality}" for modality, count in report.tokens.items())
    lines = [f"{report.conversations:,} conversations, {counts} tokens", ""]
    lines.append(f"{'layer':>5}{'expert':>12}" + "".join(f"{modality:>10}" for modality in MODALITIES))
    for i, layer in enumerate(report.layers):
        loads = [report.loads[modality][i] for modality in MODALITIES]
        rows = [(str(e), shares) for e, shares in enumerate(zip(*(x.shares for x in loads), strict=True))]
        refused = [sum(x.dropped) / max(sum(x.dropped) + sum(x.dispatched), 1) for x in loads]
        tokens = [max(report.tokens[modality], 1) for modality in MODALITIES]
        alone = [load.unrouted / count for load, count in zip(loads, tokens, strict=True)]
        for name, shares in (*rows, ("(dropped)", refused), ("(no expert)", alone)):
            lines.append(f"{layer:>5}{name:>12}" + "".join(f"{share:>10.1%}" for share in shares))
    for modality, pathways in report.pathways.items():
        layers = ", ".join(map(str, report.layers))
        lines += ["", f"{modality}: the commonest of {len(pathways):,} pathways through layers {layers}"]
        for pathway in pathways[:top]:
            share = pathway.tokens / report.tokens[modality]
            lines.append(f"{share:>8.1%}  {format_pathway(pathway.experts)}")
    return "\n".join(lines)


def write_json(path: str | os.PathLike[str], report: ExpertReport) -> None:
    """Everything in the report, all pathways included."""
    write_file(Path(path), json.dumps(asdict(report)).encode())
