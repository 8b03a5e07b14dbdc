"""A training step of a whole language model over image and text tokens: pyvlm's kernels beside transformers'.

The model is transformers' own, random, and everything enters it by its official extension points; a step is
forward, backward and AdamW. Shapes: B batch, L tokens, T = B·L, H heads, D head dimension, K experts a token.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from attention.cases import DIALOGUE, AttentionCase
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.attention import flex_masks
from benchmarks.harness.limits import COPY, GEMM, limits
from benchmarks.harness.measure import interleave, peak_memory, summary
from benchmarks.harness.run import TIMED, UNAVAILABLE, WRONG, Record, check_device
from benchmarks.harness.workload import TRAINING
from pyvlm.ops import linear_cross_entropy, span_attention
from pyvlm.spans import AttentionSpans

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Context

KINDS = ("llava-mmca", "moe-llava")
CASES = tuple((kind, compiled) for compiled in (False, True) for kind in KINDS)  # what compiles comes last
LOSSES_MAY_DIFFER = 0.02  # of a bfloat16 model's, whose attention and experts round apart

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def by_spans(spans: AttentionSpans) -> Attend:
    return lambda q, k, v, scale: span_attention(q, k, v, spans, scale=scale)


def by_dense_masks(spans: AttentionSpans) -> Attend:
    """SDPA, one call a softmax: what there is for such a mask without a kernel of its own."""
    dense_BRQK = spans.dense() if spans.separate else spans.dense().any(1, keepdim=True)
    masks = [mask.unsqueeze(1).contiguous() for mask in dense_BRQK.unbind(1)]

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        calls = (
            F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            for mask in masks
        )
        return reduce(torch.add, calls)

    return attend


def by_flex(spans: AttentionSpans) -> Attend:
    masks = flex_masks(spans)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        calls = (compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped) for mask in masks)
        return reduce(torch.add, calls)

    return attend


def by_causal_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Without a mask: the fastest that transformers has."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls; of no step, for its register would keep that one's model for ever."""
    return module.attend(q, k, v, scaling).transpose(1, 2).contiguous(), None


class Step:
    """A model, its batch, and steps of it with some attention, experts and loss.

    Args:
        compiled: forward and backward are made by torch.compile, for what the first call has.
    """

    def __init__(self, kind: str, context: "Context", compiled: bool = False) -> None:
        import transformers

        # Its package makes experts_implementation="pyvlm" known.
        from pyvlm.integrations.transformers import mlp, norms

        tiny, device = context.dry_run, context.device
        sizes = (64, 128, 2, 2) if tiny else (2048, 5504, 12 if kind == "moe-llava" else 24, 16)
        hidden, intermediate, layers, heads = sizes
        options = {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": 320 if tiny else 32_000,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        }
        transformers.AttentionInterface.register("measured", _attention)
        transformers.AttentionMaskInterface.register("measured", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        with torch.device(device):
            if kind == "moe-llava":
                config = transformers.MixtralConfig(
                    **options, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
                )
                self.model: Any = transformers.MixtralForCausalLM(config)
            else:
                self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
        self.model.to(torch.bfloat16).set_attn_implementation("measured")
        self.forward = torch.compile(self._forward) if compiled else self._forward
        self.layers, self.served = (mlp.MLPS.apply, norms.apply), []
        row = DIALOGUE[0] if not tiny else "t8 i16 t9 i16 t15"
        rule = "mmca" if kind == "llava-mmca" else "causal"
        case = AttentionCase(kind, "", rule, (row,) * 2)
        self.spans, self.kind_BL = case.spans(device), case.layout(device).kind
        generator = torch.Generator().manual_seed(1)
        shape = (2, case.length)
        self.embeddings = torch.randn(*shape, hidden, generator=generator).to(device, torch.bfloat16)
        labels = torch.randint(0, options["vocab_size"], shape, generator=generator).to(device)
        # Answers carry the loss: the last eighth of each row, text alone.
        answers = torch.arange(case.length, device=device) >= case.length * 7 // 8
        self.labels = torch.where(answers & (self.kind_BL == 1), labels, -100)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=device.type == "cuda")
        self.shape = (
            f"{sum(p.numel() for p in self.model.parameters()) / 1e9:.2f} G parameters, B2 L{case.length}"
        )

    def loss(self, attend: Attend, experts: str | None, own: bool) -> Tensor:
        """By an attention, an implementation of experts, and pyvlm's norms, MLPs and loss or the model's."""
        for layer in self.model.model.layers:
            layer.self_attn.attend = attend
        self._serve_layers(own)
        if experts is not None:
            self.model.set_experts_implementation(experts)
        return self.forward(own)

    def _forward(self, own: bool) -> Tensor:
        if not own:
            return self.model(inputs_embeds=self.embeddings, labels=self.labels, use_cache=False).loss
        hidden = self.model.model(inputs_embeds=self.embeddings, use_cache=False).last_hidden_state
        labels = F.pad(self.labels, (0, 1), value=-100)[:, 1:]  # shifted, as the model does
        return linear_cross_entropy(hidden.flatten(0, 1), self.model.lm_head.weight, labels.flatten())

    def _serve_layers(self, own: bool) -> None:
        if own and not self.served:
            self.served = [change for apply in self.layers for change in apply(self.model)]
        elif not own:
            for change in self.served:
                if change.undo is not None:
                    change.undo()
            self.served = []

    def run(self, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def run(kind: str, compiled: bool, context: "Context") -> Iterator[Record]:
    """pyvlm's row and its peers'; compiled, each of them has a model of its own, which nobody changes."""
    torch.compiler.reset()
    step = Step(kind, context, compiled)
    experts = {"pyvlm": "pyvlm", "others": "grouped_mm"} if kind == "moe-llava" else {}
    causal = kind == "moe-llava"
    builds: dict[str, Callable[[], Attend]] = {"pyvlm": lambda: by_spans(step.spans)}
    if compiled:
        builds["compile"] = lambda: by_causal_sdpa if causal else by_flex(step.spans)
    else:
        builds["sdpa"] = lambda: by_causal_sdpa if causal else by_dense_masks(step.spans)
        if not causal:
            builds["flex"] = lambda: by_flex(step.spans)
    outcomes: dict[str, Record] = {}
    calls: dict[str, Callable[[], object]] = {}
    expected = None
    for name, build in builds.items():
        own = name == "pyvlm"
        try:
            attend = build()
            of_row = step if own or not compiled else Step(kind, context, compiled)
            how = (attend, experts.get("pyvlm" if own else "others"), own)
            loss = of_row.loss(*how)
            loss.backward()
            of_row.optimizer.zero_grad(set_to_none=True)
        except Exception as error:  # a peer may raise anything; it is told in its row
            check_device(context.device)
            outcomes[name] = {"status": UNAVAILABLE, "detail": f"{type(error).__name__}: {error}"[:300]}
            continue
        expected = loss.item() if expected is None else expected
        if not abs(loss.item() - expected) <= LOSSES_MAY_DIFFER * abs(expected):  # NaN is not either
            outcomes[name] = {"status": WRONG, "detail": f"its loss is {loss.item():.4f}, not {expected:.4f}"}
            continue
        calls[name] = lambda of_row=of_row, how=how: of_row.run(lambda: of_row.loss(*how))
    product, copy = limits(context.device, torch.bfloat16, context.dry_run)
    samples = interleave(
        {**calls, GEMM: product.call, COPY: copy.call},
        context.device,
        context.settings.budget_s * 4,
        min_rounds=3,
        sweep=None if context.dry_run else copy.call,
    )
    for name, call in calls.items():
        outcomes[name] = {
            "status": TIMED,
            **summary(samples[name]),
            "peak_bytes": peak_memory(call, context.device),
        }
    yield {
        "op": "step",
        "case": case_name(kind, compiled),
        "reason": "forward, backward and AdamW" + (", both compiled" if compiled else ""),
        "shape": step.shape,
        "dtype": "bf16",
        "pass": TRAINING,
        "gemm_gflops": product.amount / summary(samples[GEMM])["median_s"] / 1e9,
        "copy_gbytes_per_s": copy.amount / summary(samples[COPY])["median_s"] / 1e9,
        "providers": {name: outcomes[name] for name in builds},
    }


def case_name(kind: str, compiled: bool) -> str:
    return f"{kind}-compiled" if compiled else kind
