"""The MLPs of transformers' models: the activation, and where there is a gate the product, in one pass.

PyTorch's passes, two for a gated MLP and three for CLIP's, write tensors of tokens by intermediate channels,
whose memory is new each time. On two cores of an AMD EPYC, gated, 2,432 tokens by 6,912 channels: 10 ms in
place of 54 to 63 in fp32, 6 to 11 in place of 32 to 39 in bf16; 4 and 2 written over the gate, which is done
where no gradient is needed. Training keeps the inputs of the pass, and not what lies between.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyvlm.integrations.transformers.experts import activation_name
from pyvlm.integrations.transformers.replacement import Served
from pyvlm.ops import gated_activation

# Tokens at once, on the CPU and where no gradient is needed. Of 2,436 tokens of Gemma 3 1B 600 at once take
# 150 ms in bf16, 360 in fp32; all at once 162 and 465, and 73 and 146 MB in place of 27 and 42; 256 are 4 to
# 8 % slower.
PIECE = 800
# What classes call their projections, the last one last, and their activation.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2"), ("linear_fc1", "linear_fc2"))
_ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)), or fc2(act(fc1(x)))."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] → [.., C]."""
        layers, function, traced = _projections_of(self), _function_of(self), torch.compiler.is_compiling()
        if not traced and _are_watched([function]):  # somebody wants to see the activation
            out: Tensor = super().forward(x)
            return out
        at_once = not x.is_cpu or x.numel() <= PIECE * x.shape[-1]
        if at_once or traced or torch.is_grad_enabled() or _are_watched(layers):
            return self._project(x, function, *layers)
        rows = x.reshape(-1, x.shape[-1])
        pieces = rows.tensor_split(-(-rows.shape[0] // PIECE))
        out = torch.cat([self._project(piece, function, *layers) for piece in pieces])
        return out.view(*x.shape[:-1], out.shape[-1])

    def _project(self, x: Tensor, function: Any, first: nn.Module, *others: nn.Module) -> Tensor:
        *second, last = others
        gate, up = first(x), second[0](x) if second else None
        activation = activation_name(function)
        assert activation is not None, "it was asked for before this class was given"
        out: Tensor = last(gated_activation(gate, up, activation, inplace=_may_overwrite(first, gate, up)))
        return out


def _projections_of(module: nn.Module) -> list[nn.Module]:
    given: Any = module._modules
    names = next(names for names in _PROJECTIONS if names[0] in given)
    return [given[name] for name in names]


def _function_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    return next((getattr(module, name) for name in _ACTIVATIONS if hasattr(module, name)), None)


def _may_overwrite(first: nn.Module, gate: Tensor, up: Tensor | None) -> bool:
    """Nobody needs the gate again: no gradient, no hook that may have kept it, no tracer."""
    learns = gate.requires_grad or (up is not None and up.requires_grad)
    return not (
        (torch.is_grad_enabled() and learns)
        or first._forward_hooks
        or (up is not None and gate.dtype != up.dtype)
        or torch.compiler.is_compiling()
    )


def _are_watched(layers: list[Any]) -> bool:
    """Whether somebody looks at a layer's calls, or loads its weight for each, and wants one."""
    return any(
        layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        for layer in layers
        if isinstance(layer, nn.Module)  # an activation may be a function
    )


def _why_not(module: Any) -> str | None:
    function = _function_of(module)
    if activation_name(function) is None:
        return f"its activation {getattr(function, '__name__', type(function).__name__)} is none of pyvlm's"
    return None


MLPS = Served(
    MLP,
    {
        "LlamaMLP": "llama",
        "MistralMLP": "mistral",
        "Qwen2MLP": "qwen2",
        "Qwen3MLP": "qwen3",
        "Qwen3MoeMLP": "qwen3_moe",
        "Qwen2_5_VLMLP": "qwen2_5_vl",
        "Qwen3VLTextMLP": "qwen3_vl",
        "Qwen3VLMoeTextMLP": "qwen3_vl_moe",
        "GemmaMLP": "gemma",
        "Gemma2MLP": "gemma2",
        "Gemma3MLP": "gemma3",
        "Molmo2MLP": "molmo2",
        "PixtralMLP": "pixtral",
        "Llama4TextMLP": "llama4",
        "CLIPMLP": "clip",
        "SiglipMLP": "siglip",
        "Dinov2MLP": "dinov2",
        "Idefics3VisionMLP": "idefics3",
        "SmolVLMVisionMLP": "smolvlm",
        "InternVLVisionMLP": "internvl",
        "VisionMlp": "qwen2_vl",
        "Qwen3VLVisionMLP": "qwen3_vl",
        "Qwen3VLMoeVisionMLP": "qwen3_vl_moe",
        "Llama4VisionMLP": "llama4",
        "Molmo2VisionMLP": "molmo2",
    },
    __name__,
    "mlp",
    "gated_activation",
    _why_not,
)


def __getattr__(name: str) -> Any:
    """The replacements by the names of the originals: pickle looks for them here."""
    return MLPS.named(name)
