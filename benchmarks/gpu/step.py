"""A training step of a whole LLaVA on pixels and text: pyvlm's kernels beside transformers' own.

CLIP-L, frozen as in LLaVA's second stage, a connector and a language model, random; a step is forward,
backward and AdamW. pyvlm's row is `pyvlm.accelerate(model)`, nothing else. Shapes: B batch, L tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from attention.cases import DIALOGUE, AttentionCase
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.attention import flex_masks
from benchmarks.harness.limits import COPY, GEMM, limits
from benchmarks.harness.measure import interleave, kernels, peak_memory, summary
from benchmarks.harness.run import TIMED, UNAVAILABLE, WRONG, Record, check_device
from benchmarks.harness.workload import TRAINING
from pyvlm.layout import IMAGE
from pyvlm.spans import AttentionSpans

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Context

MMCA, MOE = "llava-mmca", "moe-llava"
KINDS = (MMCA, MOE)
CASES = tuple((kind, compiled) for compiled in (False, True) for kind in KINDS)  # what compiles comes last
IMAGE_TOKEN = 3
LOSSES_MAY_DIFFER = 0.02  # of a bfloat16 model's, whose attention and experts round apart

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


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


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls; of no step, for its register would keep that one's model for ever."""
    return module.attend(q, k, v, scaling).transpose(1, 2).contiguous(), None


def rows_of(kind: str, compiled: bool) -> tuple[str, ...]:
    """pyvlm's row, and those of the best that transformers has. MMCA, of which it has nothing, is written for
    it: dense masks, or FlexAttention's. Compiled, there is the better of these and whole models."""
    if compiled:
        return ("pyvlm", "compile")
    return ("pyvlm", "sdpa", "flex") if kind == MMCA else ("pyvlm", "sdpa")


def config_of(kind: str, tiny: bool) -> Any:
    """LLaVA-1.5 of 1.6 G parameters; or as MoE-LLaVA-1.6B, four experts in every second layer."""
    import transformers

    hidden, intermediate, layers, heads = (64, 128, 2, 2) if tiny else (2048, 5504, 24, 16)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64 if tiny else 1024,
        intermediate_size=128 if tiny else 4096,
        num_hidden_layers=3 if tiny else 24,
        num_attention_heads=2 if tiny else 16,
        image_size=56 if tiny else 336,
        patch_size=14,
    )
    common = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 320 if tiny else 32_000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    if kind == MOE:
        text: Any = transformers.Qwen3MoeConfig(
            **common,
            head_dim=hidden // heads,
            moe_intermediate_size=intermediate,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=2,
        )
    else:
        text = transformers.LlamaConfig(**common)
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


class Step:
    """A batch, the parameters and the optimizer that all rows share, and the model of each row."""

    def __init__(self, kind: str, context: "Context") -> None:
        import transformers

        transformers.AttentionInterface.register("measured", _attention)
        transformers.AttentionMaskInterface.register("measured", lambda *args, **kwargs: None)
        self.kind, self.device, self.tiny = kind, context.device, context.dry_run
        self.rule = "mmca" if kind == MMCA else "causal"
        row = "t8 i16 t9 i16 t15" if self.tiny else DIALOGUE[0]
        case = AttentionCase(kind, "", self.rule, (row,) * 2)
        self.spans = case.spans(self.device)
        self.inputs, self.labels = self._batch(case)
        torch.manual_seed(0)
        self.model = self._model("sdpa")
        learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=self.device.type == "cuda")
        size = sum(p.numel() for p in self.model.parameters()) / 1e9
        images = len(self.inputs["pixel_values"])
        self.shape = f"{size:.2f} G parameters, B{len(self.labels)} L{case.length}, {images} images"

    def _batch(self, case: AttentionCase) -> tuple[dict[str, Tensor], Tensor]:
        random = torch.Generator().manual_seed(1)
        config = config_of(self.kind, self.tiny)
        words, vision = config.text_config.vocab_size, config.vision_config
        cpu = torch.device("cpu")  # the same numbers on every device
        is_image = case.layout(cpu).kind == IMAGE
        text = torch.randint(IMAGE_TOKEN + 1, words, is_image.shape, generator=random, device=cpu)
        ids = torch.where(is_image, IMAGE_TOKEN, text)
        # Answers carry the loss: the last eighth of each row, text alone.
        is_answer = (torch.arange(case.length, device=cpu) >= case.length * 7 // 8) & ~is_image
        images = int(is_image.sum()) // (vision.image_size // vision.patch_size) ** 2
        shape = (images, 3, vision.image_size, vision.image_size)
        pixels = torch.randn(shape, generator=random, device=cpu)
        inputs = {"input_ids": ids.to(self.device), "pixel_values": pixels.to(self.device, torch.bfloat16)}
        return inputs, torch.where(is_answer, ids, -100).to(self.device)

    def _model(self, attention: str) -> Any:
        import transformers

        with torch.device(self.device):
            model = transformers.LlavaForConditionalGeneration._from_config(
                config_of(self.kind, self.tiny),  # its own, for it tells which attention runs
                dtype=torch.bfloat16,
                attn_implementation={"text_config": attention, "vision_config": "sdpa"},
            )
        if self.kind == MOE:
            model.model.language_model.set_experts_implementation("grouped_mm")
        model.model.vision_tower.requires_grad_(False)
        return model.train()

    def model_of(self, row: str) -> Any:
        """A row's model, on the parameters that all share."""
        import pyvlm

        own = row == "pyvlm"
        measured = not own and self.kind == MMCA
        model = self._model("measured" if measured else "sdpa")
        model.load_state_dict(self.model.state_dict(keep_vars=True), assign=True)
        if own:
            pyvlm.accelerate(model, attention_rule=self.rule if self.kind == MMCA else None)
        elif measured:
            attend = by_dense_masks(self.spans) if row == "sdpa" else by_flex(self.spans)
            for layer in model.model.language_model.layers:
                layer.self_attn.attend = attend
        return model

    def compiled(self, model: Any) -> Any:
        with torch.no_grad():
            self.loss(model)  # transformers hooks the layers at a model's first call, which breaks graphs
        # Else each graph ends where transformers looks whether there are as many features as image tokens.
        torch._dynamo.config.capture_scalar_outputs = True
        return torch.compile(model)

    def loss(self, model: Any) -> Tensor:
        return model(**self.inputs, labels=self.labels, use_cache=False).loss

    def run(self, model: Any) -> None:
        self.loss(model).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def run(kind: str, compiled: bool, context: "Context") -> Iterator[Record]:
    """A record of every row of a case."""
    torch.compiler.reset()
    step = Step(kind, context)
    names = rows_of(kind, compiled)
    outcomes: dict[str, Record] = {}
    calls: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        expected = step.loss(step.model_of("sdpa")).item()
    for name in names:
        try:
            model = step.model_of(name)
            if compiled:
                model = step.compiled(model)
            loss = step.loss(model)
            loss.backward()
            step.optimizer.zero_grad(set_to_none=True)
        except Exception as error:  # a peer may raise anything; it is told in its row
            check_device(context.device)
            torch.compiler.reset()  # what has failed to compile once would run in pieces, in pyvlm's row too
            outcomes[name] = {"status": UNAVAILABLE, "detail": f"{type(error).__name__}: {error}"[:300]}
            continue
        if not abs(loss.item() - expected) <= LOSSES_MAY_DIFFER * abs(expected):  # NaN is not either
            outcomes[name] = {"status": WRONG, "detail": f"its loss is {loss.item():.4f}, not {expected:.4f}"}
            continue
        calls[name] = partial(step.run, model)
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
        "providers": {name: outcomes[name] for name in names},
    }


def profile(kind: str, context: "Context") -> Iterator[Record]:
    """What a step runs in pyvlm's row."""
    step = Step(kind, context)
    model = step.model_of("pyvlm")
    yield {
        "op": "kernels of step",
        "case": kind,
        "pass": TRAINING,
        "kernels": kernels(lambda: step.run(model), context.device),
    }


def compile_row(kind: str, compiled: bool, row: str, context: "Context") -> None:
    """One forward and backward of a row."""
    step = Step(kind, context)
    model = step.model_of(row)
    step.loss(step.compiled(model) if compiled else model).backward()


def case_name(kind: str, compiled: bool) -> str:
    return f"{kind}-compiled" if compiled else kind
