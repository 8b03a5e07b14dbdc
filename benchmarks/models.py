"""Models of transformers on pyvlm beside transformers' own: prefill, decoding, a training step.

Models of the 0.5B class, cut to a few layers and with random weights: every layer costs what it costs in the
whole model. One row with four images of 576 tokens and 128 tokens of text, of which the last 64 are learned.
The inputs of every provider are the parameters themselves, so that training gives the gradient of each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.workload import FORWARD, TRAINING, Cost, Function, Operation, Provider, Workload

IMAGE_TOKEN = 3
PREFILL, DECODE, STEP = "prefill", "decode", "training-step"


@dataclass(frozen=True)
class ModelCase:
    """A model and what is done with it."""

    family: str  # "llava", "gemma3" or "moe"
    phase: str
    images: int = 4
    side: int = 24  # patches, and tokens, along a side of an image
    text: int = 128
    learned: int = 64
    layers: int = 4
    vision_layers: int = 2
    words: int = 32_000
    narrower: int = 1  # divides all widths

    @property
    def name(self) -> str:
        return f"{self.family}-{self.phase}"

    @property
    def tokens(self) -> int:
        return self.images * self.side**2 + self.text

    def reduced(self) -> "ModelCase":
        return ModelCase(self.family, self.phase, 2, 4, 12, 6, 2, 1, 512, 8)

    def config(self) -> Any:
        import transformers as hf

        pixels = {"image_size": 14 * self.side, "patch_size": 14, "num_hidden_layers": self.vision_layers}
        common = {"vocab_size": self.words, "num_hidden_layers": self.layers, "max_position_embeddings": 8192}
        if self.family == "gemma3":  # Gemma 3 1B, and SigLIP's So400m as its encoder
            text = hf.Gemma3TextConfig(
                hidden_size=1152 // self.narrower,
                intermediate_size=6912 // self.narrower,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=256,
                sliding_window=512,
                layer_types=["sliding_attention"] * (self.layers - 1) + ["full_attention"],
                **common,
            )
            vision = hf.SiglipVisionConfig(
                hidden_size=1152 // self.narrower,
                intermediate_size=4304 // self.narrower,
                num_attention_heads=16,
                vision_use_head=False,
                **pixels,
            )
            return hf.Gemma3Config(
                text_config=text,
                vision_config=vision,
                mm_tokens_per_image=self.side**2,
                image_token_id=IMAGE_TOKEN,
            )
        if self.family == "moe":  # MoE-LLaVA's four experts of which two take a token, at the width of 0.5B
            text = hf.Qwen3MoeConfig(
                hidden_size=1024 // self.narrower,
                intermediate_size=2816 // self.narrower,
                moe_intermediate_size=2816 // self.narrower,
                num_experts=4,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                num_attention_heads=16,
                num_key_value_heads=4,
                head_dim=64,
                **common,
            )
        else:  # Qwen2 0.5B
            text = hf.Qwen2Config(
                hidden_size=896 // self.narrower,
                intermediate_size=4864 // self.narrower,
                num_attention_heads=14,
                num_key_value_heads=2,
                **common,
            )
        vision = hf.CLIPVisionConfig(
            hidden_size=1024 // self.narrower,
            intermediate_size=4096 // self.narrower,
            num_attention_heads=16,
            projection_dim=768,
            **pixels,
        )
        return hf.LlavaConfig(
            text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, vision_feature_layer=-1
        )

    def model(self, dtype: torch.dtype, attention: str, experts: str | None = None) -> nn.Module:
        import transformers as hf

        config = self.config()
        name = (
            "Gemma3ForConditionalGeneration" if self.family == "gemma3" else "LlavaForConditionalGeneration"
        )
        torch.manual_seed(0)
        model = getattr(hf, name)._from_config(
            config, dtype=dtype, attn_implementation=attention, experts_implementation=experts
        )
        return model.eval()

    def batch(self, dtype: torch.dtype) -> dict[str, Tensor]:
        # Of experts one where no learned token lies so near a tie that bf16 decides it: with seed 1 one of 64
        # goes to another expert than in float64, on fewer flips in all than torch's own, and shifts the loss;
        # with 2 a router's gradient is 2.8 times as far off as torch's, with 3 all of torch's are 5 times as
        # far off as pyvlm's. Here torch.compile's is too far.
        random = torch.Generator().manual_seed(4 if self.family == "moe" else 1)
        prompt = torch.randint(4, self.words, (self.text - self.learned,), generator=random)
        answer = torch.randint(4, self.words, (self.learned,), generator=random)
        pictures = torch.full((self.images * self.side**2,), IMAGE_TOKEN)
        if self.family == "gemma3":  # Gemma 3 takes neighbouring images for one block: a word stands between
            words = torch.randint(4, self.words, (self.images,), generator=random)
            runs = [part for word in words for part in (pictures[: self.side**2], word[None])]
            pictures, prompt = torch.cat(runs), prompt[self.images :]
        ids = torch.cat([pictures, prompt, answer])[None]
        pixels = torch.randn(self.images, 3, 14 * self.side, 14 * self.side, generator=random)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}
        if self.family == "gemma3":
            batch["token_type_ids"] = (ids == IMAGE_TOKEN).long()
        return batch

    def labels(self, ids: Tensor) -> Tensor:
        return torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - self.learned, -100, ids)


FAMILIES = ("llava", "gemma3", "moe")
CASES = [ModelCase(family, phase) for family in FAMILIES for phase in (PREFILL, DECODE, STEP)]


def workload(case: ModelCase, device: torch.device, dtype: torch.dtype) -> Workload:
    model = case.model(dtype, "sdpa").to(device)
    parameters = tuple(p.detach() for _, p in _used(model))
    training = case.phase == STEP
    flops = _flops(case, model)
    nbytes = sum(p.nbytes for p in parameters)
    cost = Cost(3 * flops, 3 * nbytes) if training else Cost(flops, nbytes)
    return Workload(
        case=case.name,
        reason="0.5B class, a few layers",
        shape=f"{case.images} images of {case.side**2} tokens, {case.text} of text, {case.layers} layers",
        dtype=dtype,
        inputs=parameters,
        cotangent=torch.ones((), device=device),
        costs={TRAINING if training else FORWARD: cost},
        terms=(0.0,) * (len(parameters) + 1),
        payload=case,
    )


def _used(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that reach the result: LLaVA reads CLIP before its last norm."""
    unread = "post_layernorm" if model.config.model_type == "llava" else None
    return [(name, p) for name, p in model.named_parameters() if unread is None or unread not in name]


def _flops(case: ModelCase, model: nn.Module) -> int:
    """Products of one pass with the weights that a token meets, and attention over what it sees."""
    config = model.config.get_text_config()
    decoding = case.phase == DECODE
    tokens = 1 if decoding else case.tokens
    patches = 0 if decoding else case.images * case.side**2
    total = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "embed" in name:
            continue
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1.0
        if "lm_head" in name:
            rows = case.learned if case.phase == STEP else 1
        else:
            rows = patches if "vision" in name or "projector" in name else tokens
        total += int(2 * share * rows * parameter.numel())
    pairs = case.tokens if decoding else case.tokens * (case.tokens + 1) // 2
    width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    total += case.layers * 4 * pairs * config.num_attention_heads * width
    if not decoding:
        total += case.vision_layers * 4 * case.images * case.side**4 * model.config.vision_config.hidden_size
    return total


def workloads(
    device: torch.device, dtypes: list[torch.dtype], names: list[str] | None, quick: bool
) -> Iterator[Workload]:
    for case in CASES:
        if names is None or case.name in names:
            for dtype in dtypes:
                yield workload(case.reduced() if quick else case, device, dtype)


def _provider(
    attention: str, experts: str | None, finish: Callable[[nn.Module], nn.Module], work: Workload
) -> Function:
    """Runs the case on a model of the parameters' dtype, made at its first call; they are its own."""
    case: ModelCase = work.payload
    runs: dict[torch.dtype, Callable[[tuple[Tensor, ...]], Tensor]] = {}

    def run(*parameters: Tensor) -> Tensor:
        dtype = parameters[0].dtype
        if dtype not in runs:
            runs[dtype] = _bound(case, case.model(dtype, attention, experts).to(work.device), finish, dtype)
        return runs[dtype](parameters)

    return run


def _bound(
    case: ModelCase, model: nn.Module, finish: Callable[[nn.Module], nn.Module], dtype: torch.dtype
) -> Callable[[tuple[Tensor, ...]], Tensor]:
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in case.batch(dtype).items()}
    owners = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in _used(model)
    ]
    tied = model.config.tie_word_embeddings or model.config.get_text_config().tie_word_embeddings
    finished = finish(model)
    bound: list[Tensor] = []
    kept: list[Any] = []

    def bind(parameters: tuple[Tensor, ...]) -> None:
        if bound and bound[0] is parameters[0]:
            return
        bound[:] = parameters
        for (owner, name), parameter in zip(owners, parameters, strict=True):
            owner._parameters[name] = parameter  # type: ignore[assignment]
        if tied:
            model.get_output_embeddings()._parameters["weight"] = model.get_input_embeddings().weight

    def prefill(parameters: tuple[Tensor, ...]) -> Tensor:
        bind(parameters)
        return finished(**batch, logits_to_keep=1, use_cache=True).logits[0]

    def decode(parameters: tuple[Tensor, ...]) -> Tensor:
        """One token after the row; the cache is as long again afterwards as it was before."""
        bind(parameters)
        if not kept:
            with torch.no_grad():
                kept.append(model(**batch, use_cache=True).past_key_values)
        (cache,) = kept
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long, device=device)
        token = torch.full((1, 1), 7, device=device)
        out = finished(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits[0]
        if case.family != "gemma3":  # its sliding layers cannot be cut; one token more is nothing to it
            cache.crop(-1)
        return out

    def step(parameters: tuple[Tensor, ...]) -> Tensor:
        bind(parameters)
        return finished(**batch, labels=case.labels(batch["input_ids"]), use_cache=False).loss

    return {PREFILL: prefill, DECODE: decode, STEP: step}[case.phase]


def _accelerated(model: nn.Module) -> nn.Module:
    import pyvlm

    pyvlm.accelerate(model, linear=True)
    return model


def _compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model)


def _same(model: nn.Module) -> nn.Module:
    return model


_defaults = partial(_provider, "sdpa", None, _same)  # transformers' own: SDPA and, for experts, grouped_mm

OPERATION = Operation(
    name="models",
    workloads=workloads,
    case_names=tuple(case.name for case in CASES),
    providers=(
        Provider("pyvlm", partial(_provider, "sdpa", None, _accelerated)),
        Provider("sdpa", _defaults),
        Provider("eager", partial(_provider, "eager", "eager", _same)),
        Provider("compile", partial(_provider, "sdpa", None, _compiled)),
    ),
    reference=partial(_provider, "sdpa", "eager", _same),  # grouped_mm knows no float64
    plain=_defaults,
)
