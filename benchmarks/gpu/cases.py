"""The sizes that are measured on a GPU; what is most wanted comes first, for a part may run out of time."""

from attention.cases import DIALOGUE, AttentionCase
from fusion.cross_attention_cases import LocalCase
from fusion.fusion_cases import MergeCase
from fusion.gating_cases import GatingCase
from fusion.grid_cases import GridCase
from fusion.loss_cases import LossCase
from fusion.norm_cases import NormCase
from fusion.placement_cases import PlacementCase
from fusion.resample_cases import ResampleCase
from moe.cases import ExpertCase

from benchmarks.routing import ChoicesCase, ExpertChoiceCase


def _dialogue(tokens: int) -> str:
    """One document of images of 576 tokens among text."""
    return " ".join(DIALOGUE * (tokens // 4096))


def _attention(name: str, reason: str, rule: str, rows: tuple[str, ...], **options: object) -> AttentionCase:
    defaults = {"heads": 16, "kv_heads": 16, "head_dim": 128, "large": True}
    return AttentionCase(name, reason, rule, rows, **(defaults | options))


def _of_length(thousands: int) -> tuple[AttentionCase, ...]:
    tokens, heads = 1024 * thousands, 16 if thousands == 8 else 8
    heads_of = {"heads": heads, "kv_heads": heads}
    packed = " | ".join([f"t{tokens // 4}"] * 4)
    return (
        _attention(
            f"bidirectional-image-{thousands}k", "Gemma 3's", "bidirectional_image", (_dialogue(tokens),),
            **heads_of,
        ),
        _attention(
            f"causal-{thousands}k", "what flash and cuDNN are made for", "causal", (f"t{tokens}",),
            **heads_of,
        ),
        _attention(f"causal-packed-{thousands}k", "four documents a row", "causal", (packed,), **heads_of),
    )  # fmt: skip


def _short(tokens: int) -> tuple[str, ...]:
    return (f"t32 i{tokens // 4} t96 i{tokens // 4} t{tokens // 2 - 128}",) * 16


ATTENTION = (
    *_of_length(8),
    _attention("mmca-8k", "two softmaxes", "mmca", (_dialogue(8192),)),
    _attention("mmca-joint-8k", "its joint twin", "mmca", (_dialogue(8192),), one_softmax=True),
    _attention("short-1k", "batch 16", "bidirectional_image", _short(1024), head_dim=64),
    _attention(
        "decode-8k", "one new token for each of 16 caches", "bidirectional_image", (_dialogue(8192),) * 16,
        heads=32, kv_heads=8, query_start=-1,
    ),
    _attention(
        "decode-mmca-8k", "two softmaxes", "mmca", (_dialogue(8192),) * 16,
        heads=32, kv_heads=8, query_start=-1,
    ),
    _attention(
        "decode-one-8k", "a single cache, whose keys all multiprocessors share", "bidirectional_image",
        (_dialogue(8192),), heads=32, kv_heads=8, query_start=-1,
    ),
    _attention("short-mmca-1k", "batch 16", "mmca", _short(1024), head_dim=64),
    *_of_length(16),
    _attention("short-2k", "batch 16", "bidirectional_image", _short(2048), head_dim=64),
)  # fmt: skip

EXPERTS = (
    ExpertCase("moe-llava", "few experts, many tokens", 16_384, 2048, 5504, 4, 2, large=True),
    ExpertCase("fine-grained-e64", "many small experts", 16_384, 2048, 1024, 64, 8, large=True),
    ExpertCase("expert-choice", "the same routed by expert choice", 16_384, 2048, 5504, 4, 2,
               "expert_choice", large=True),
    ExpertCase("eight-experts", "twice as many, half as busy", 16_384, 2048, 5504, 8, 2, large=True),
    ExpertCase("expert-choice-images", "images of 576 tokens choose apart", 16_128, 2048, 5504, 8, 2,
               "expert_choice", large=True, groups=28),
    ExpertCase("expert-choice-e64", "fine-grained", 16_384, 2048, 1024, 64, 8, "expert_choice", large=True),
    ExpertCase("decode-t8", "eight sequences", 8, 2048, 5504, 4, 2, large=True, decode=True),
    ExpertCase("fine-grained-e128", "more of them", 16_384, 2048, 768, 128, 8, large=True),
)  # fmt: skip
ROUTING = (
    ExpertChoiceCase("expert-choice", "of the layer of that name", 16_384, 4, 8192),
    ExpertChoiceCase("expert-choice-images", "of that layer", 576, 8, 144, groups=28),
    ExpertChoiceCase("expert-choice-e64", "of that layer", 16_384, 64, 2048),
    ChoicesCase("choices", "of fine-grained-e128", 16_384, 128, 8),
    ChoicesCase("choices-t8", "eight sequences", 8, 128, 8),
)

FUSION = (
    MergeCase("comm-clip-l", "COMM's levels of CLIP-L at 336 pixels", 24, 16, 576, 1024, 1024, large=True),
    MergeCase("comm-clip-l-per-level", "the same, each with its projection", 24, 16, 576, 1024, 1024, "wbgn",
              large=True),
)  # fmt: skip

WINDOWS = (
    LocalCase("cambrian", "Cambrian-1's four encoders", 16, 16, 64, (24, 24), (1, 1, 1, 4), large=True),
)  # fmt: skip
GRIDS = (
    GridCase("eagle", "CLIP, ConvNeXt and SAM", 16, ((24, 24), (32, 32), (16, 16)), (1024, 1536, 256),
             (32, 32), 2048, align_corners=True, large=True),
)  # fmt: skip
RESAMPLE = (ResampleCase("qwen-vl", "Qwen-VL's, 16 images", 16, 32, 16, 4096, 32, 1664, large=True),)

LOSS = (
    LossCase("15-percent", "Qwen2's vocabulary, 15 % of rows supervised", 8192, 1229, 2048, 151_936,
             large=True),
    LossCase("all-labeled", "pretraining on text", 4096, 4096, 2048, 151_936, large=True),
)  # fmt: skip

PLACEMENT = (
    PlacementCase("place", "an image of 576 tokens a sample", "place", 16, 1472, 4096, 24, large=True),
    PlacementCase("add", "visual features into a decoder layer", "add", 16, 1472, 4096, 24, large=True),
    PlacementCase("place-tiles", "LLaVA-NeXT 7B's, packed on the way", "place", 8, 448, 4096, 24, (480, 640),
                  large=True),
)  # fmt: skip

GATING = (GatingCase("llama-7b", "its MLP's gate", 8192, 11_008, "silu", large=True),)

NORM = (
    NormCase("llama-7b", "its tokens", 8192, 4096, large=True),
    NormCase("qwen3-queries", "the heads of 8B's", 8192, 128, heads=32, large=True),
)
