"""A budget as text."""

from collections.abc import Iterable, Iterator, Sequence

from pyvlm.training.budget import BYTES, Budget
from pyvlm.training.flops import VISION_SIDE, total

LEGEND = """\
FLOPs: matrix products and convolutions only; a multiply-add is two. Attention: the pairs of query and key
  that the rule lets through; kernels compute whole tiles and so a little more. Head and loss: labelled
  tokens only. Padding is computed like any token. Backward: no gradient of frozen weights, and none below
  the lowest that learns. Experts: what their routers are to hand out; a capacity that drops tokens makes it
  less. Gradient checkpointing is not in the FLOPs of a stage.
Bytes: weights, inputs and outputs of these products, read or written once each; the rest taken as fused.
Memory: gradients and AdamW's two moments for what learns. The bf16 figures are for all of it in bf16;
  precision bf16 in a recipe is autocast, which keeps all of it in fp32 but the linear layers that are frozen
  and came in bf16. Every expert takes memory, however few of them a token activates.
Activations: of one batch, what PyTorch keeps for backward with fused attention; buffers of kernels, of the
  head and of communication come on top, and towers of type vit count their attention scores.
Hours: at the full rate of matrix products, which no training reaches: divide by the utilisation you expect.
K, M, G, T, P: powers of 1000."""


def format_budget(budget: Budget) -> str:
    """For a terminal: parameters, one forward pass, memory, and each stage."""
    head = (
        f"{budget.name}: {human(budget.total_parameters)} parameters, {budget.precision}; a batch of "
        f"{budget.batch} x {budget.length:,} tokens with {budget.images} images each, "
        f"{budget.tokens_per_image:,} tokens an image"
    )
    if budget.changes:
        head += "\nthe model as the last stage leaves it"
    if budget.image_size is not None:
        height, width = budget.image_size
        head += (
            f"\nevery image is taken to be {height} pixels high and {width} wide, which makes "
            f"{budget.maps_per_image} maps of it, its base view and its tiles (--image-size)"
        )
    sections = [head, _parameters(budget), _forward(budget), _memory(budget), _stages(budget), LEGEND]
    return "\n\n".join(sections)


def _parameters(budget: Budget) -> str:
    rows = [
        (name, human(part.total), human(part.text_token), human(part.image_token))
        for name, part in budget.parameters.items()
    ]
    parts = budget.parameters.values()
    text, image = sum(p.text_token for p in parts), sum(p.image_token for p in parts)
    rows.append(("all", human(budget.total_parameters), human(text), human(image)))
    return align([("parameters", "held", "a text token", "an image token"), *rows])


def _forward(budget: Budget) -> str:
    size, images = BYTES[budget.precision], budget.batch * budget.images
    tokens = budget.batch * budget.length
    everything = total(budget.forward.values())
    rows = []
    for name, cost in [*budget.forward.items(), ("all", everything)]:
        of_image = name.split(".")[0] in VISION_SIDE
        units, unit = (images, "an image") if of_image else (tokens, "a token")
        each = f"{human(cost.forward / units)} {unit}"
        moved = cost.forward_elements * size
        rows.append(
            (
                name,
                human(cost.forward),
                f"{cost.forward / everything.forward:.1%}",
                "" if name == "all" else each,
                human(moved) + "B",
                f"{cost.forward / moved:.0f}",
            )
        )
    vision = total(c for name, c in budget.forward.items() if name.split(".")[0] in VISION_SIDE).forward
    language = everything.forward - vision
    lines = [align([("forward", "FLOPs", "share", "each", "bytes", "FLOPs/byte"), *rows])]
    lines.append(
        f"vision side to language model: {vision / language:.2f} in FLOPs, "
        f"{_vision_parameters(budget):.2f} in parameters"
    )
    step = budget.decoding
    lines.append(
        f"each further token of an answer: {human(step.flops)}FLOPs; {human(step.weight_bytes)}B of weights "
        f"and {human(step.cache_bytes)}B of keys and values to read"
    )
    return "\n".join(lines)


def _vision_parameters(budget: Budget) -> float:
    vision = sum(part.total for name, part in budget.parameters.items() if name.split(".")[0] in VISION_SIDE)
    return vision / (budget.total_parameters - vision)


def _memory(budget: Budget) -> str:
    active = sum(part.text_token for part in budget.parameters.values())
    rows = [("memory", *BYTES)]
    for what, number in (("weights", budget.total_parameters), ("only what a text token activates", active)):
        rows.append((what, *(human(number * size) + "B" for size in BYTES.values())))
    kept = budget.activations
    return "\n".join(
        [
            align(rows),
            f"in {budget.precision}: keys and values {human(budget.cache_bytes)}B; activations where all "
            f"learns {human(kept.plain)}B, with gradient checkpointing {human(kept.checkpointed)}B "
            f"(and {human(kept.extra_flops)}FLOPs more)",
        ]
    )


def _stages(budget: Budget) -> str:
    names = list(dict.fromkeys(name for stage in budget.stages for name in stage.step))
    rows = [("training, FLOPs a step", *(stage.name for stage in budget.stages))]
    for name in names:
        rows.append((name, *(human(s.step[name].total) if name in s.step else "" for s in budget.stages)))
    sums = [total(stage.step.values()) for stage in budget.stages]
    rows += [
        ("forward", *(human(cost.forward) for cost in sums)),
        ("backward", *(human(cost.backward) for cost in sums)),
        ("all parts", *(human(cost.total) for cost in sums)),
        ("learns", *(human(stage.trainable) for stage in budget.stages)),
        ("tokens a step", *(f"{stage.tokens:,}" for stage in budget.stages)),
        ("images a step", *(f"{stage.images:,}" for stage in budget.stages)),
    ]
    for number, precision in enumerate(BYTES):
        memory = (human(stage.memory[number].total) + "B" for stage in budget.stages)
        rows.append((f"weights and optimizer, {precision}", *memory))
    rows.append(("activations", *(human(stage.activations.plain) + "B" for stage in budget.stages)))
    rows.append(("  checkpointed", *(human(stage.activations.checkpointed) + "B" for stage in budget.stages)))
    rows.append(("steps", *("?" if stage.steps is None else f"{stage.steps:,}" for stage in budget.stages)))
    rows.append(("FLOPs", *("?" if stage.flops is None else human(stage.flops) for stage in budget.stages)))
    rows.append(("hours", *("?" if stage.hours is None else f"{stage.hours:.3g}" for stage in budget.stages)))
    prices = [stage.price for stage in budget.stages]
    if any(price is not None for price in prices):
        rows.append(("price", *("?" if price is None else f"{price:,.2f}" for price in prices)))
    data = "; ".join(dict.fromkeys(stage.data for stage in budget.stages))
    return "\n".join([align(rows), f"stages reckoned with {data}", *_sums(budget)])


def _sums(budget: Budget) -> Iterator[str]:
    known = [stage for stage in budget.stages if stage.flops is not None]
    if known:
        which = "all stages" if len(known) == len(budget.stages) else "stages of known length"
        flops, hours = sum(stage.flops or 0 for stage in known), sum(stage.hours or 0.0 for stage in known)
        prices = [stage.price for stage in known if stage.price is not None]
        price = f", price {sum(prices):,.2f}" if prices else ""
        yield (
            f"{which}: {human(flops)}FLOPs, {hours:.3g} hours at {human(budget.rate)}FLOP/s "
            f"({budget.rate_source}){price}"
        )
    open_ended = [stage.name for stage in budget.stages if stage.flops is None]
    if open_ended:
        yield (
            f"{', '.join(open_ended)}: epochs of data whose size the recipe does not know; give it with "
            f"--set stages.{open_ended[0]}.samples=NUMBER"
        )


def align(rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is flush left, the others flush right; a rule under the first row."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def human(number: float) -> str:
    """Three digits and a unit, with a space after the number: "6.74 G"."""
    for unit in ("", "K", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5 or unit == "E":
            break
        number /= 1000
    digits = f"{number:.0f}" if not unit and number == int(number) else f"{number:.3g}"
    return f"{digits} {unit}"
