"""The RMSNorms of transformers' models: one pass in place of six to eight.

Written out they keep two or three tensors of the input's size for backward, float32 ones where the model is
in half precision; here backward has the input and one number a row.
"""

from typing import Any

from torch import Tensor, nn

from pyvlm.integrations.transformers.changes import Change
from pyvlm.integrations.transformers.replacement import Served
from pyvlm.nn.norm import promoting_rms_norm
from pyvlm.ops import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in the wider of their dtypes."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] → [.., C]."""
        return promoting_rms_norm(x, self.weight, _eps(self))


class UnitOffsetRMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), in the dtype of x (Gemma)."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] → [.., C]."""
        return rms_norm(x, self.weight, _eps(self), unit_offset=True)


def _eps(module: Any) -> float:
    given = vars(module)  # what a module lacks takes it long to say
    eps: float = given["eps"] if "eps" in given else given["variance_epsilon"]
    return eps


NORMS = Served(
    RMSNorm,
    {
        "LlamaRMSNorm": "llama",
        "MistralRMSNorm": "mistral",
        "MixtralRMSNorm": "mixtral",
        "Mistral3RMSNorm": "mistral3",
        "PixtralRMSNorm": "pixtral",
        "Qwen2RMSNorm": "qwen2",
        "Qwen2VLRMSNorm": "qwen2_vl",
        "Qwen2_5_VLRMSNorm": "qwen2_5_vl",
        "Qwen3RMSNorm": "qwen3",
        "Qwen3MoeRMSNorm": "qwen3_moe",
        "Qwen3VLTextRMSNorm": "qwen3_vl",
        "Qwen3VLMoeTextRMSNorm": "qwen3_vl_moe",
        "Idefics3RMSNorm": "idefics3",
        "InternVLVisionRMSNorm": "internvl",
        "Molmo2RMSNorm": "molmo2",
        "Llama4TextRMSNorm": "llama4",
    },
    __name__,
    "norm",
    "rms_norm",
)
UNIT_OFFSET_NORMS = Served(
    UnitOffsetRMSNorm,
    {"GemmaRMSNorm": "gemma", "Gemma2RMSNorm": "gemma2", "Gemma3RMSNorm": "gemma3"},
    __name__,
    "norm",
    "rms_norm",
)


def apply(model: nn.Module) -> list[Change]:
    """Gives the RMSNorms of a model pyvlm's forward; nothing but their class changes."""
    return [*NORMS.apply(model), *UNIT_OFFSET_NORMS.apply(model)]


def __getattr__(name: str) -> Any:
    """The replacements by the names of the originals: pickle looks for them here."""
    return (UNIT_OFFSET_NORMS if name in UNIT_OFFSET_NORMS.folders else NORMS).named(name)
