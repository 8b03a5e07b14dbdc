"""Low-rank updates of the language model's linears: Partial LoRA of pyvlm, and LoRA of peft.

They are put into a model that already has its weights, since they start as nothing: with either, a new model
computes what it computed before.
"""

import copy
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from pyvlm.models.config import LanguageConfig, LoRAConfig, PartialLoRAConfig, VLMConfig
from pyvlm.models.language import LanguageModel
from pyvlm.nn.moe import MoE
from pyvlm.nn.partial_lora import PartialLoRALinear

if TYPE_CHECKING:
    from pyvlm.models.vlm import VLM

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def inject_adapters(language: LanguageModel, backend: str = "auto") -> None:
    """Replaces linears of the decoder by those with the updates that `language.config` asks for.

    Weights keep their values, and under Partial LoRA their names; peft calls those of the linear X
    `X.base_layer`. All parameters keep their `requires_grad`; what learns is for a stage to say.

    Raises:
        ValueError: a target of `lora` that no linear has.
        ImportError: `lora` without peft.
    """
    if language.config.partial_lora is not None:
        _inject_partial_lora(language, language.config.partial_lora, backend)
    if language.config.lora is not None:
        _inject_lora(language, language.config.lora)


def with_adapters(
    model: "VLM", *, partial_lora: PartialLoRAConfig | None = None, lora: LoRAConfig | None = None
) -> "VLM":
    """A model like `model` with an update of its language model that starts as nothing.

    This is the way from a checkpoint that has no update to one that has:
    `with_adapters(VLM.from_pretrained(folder), partial_lora=PartialLoRAConfig(rank=256))`.

    Returns:
        A new model whose `config` says what it is. Its other parameters are the very tensors of `model`.

    Raises:
        ValueError: both kinds or none, or `model` has updates already; or as `inject_adapters`.
    """
    if (partial_lora is None) == (lora is None):
        raise ValueError("with_adapters needs one of partial_lora and lora")
    language = model.config.language
    if language.lora is not None or language.partial_lora is not None:
        raise ValueError("the model has updates already: merge_lora them, or go on with them")
    new = copy_with_language(model, {"partial_lora": partial_lora, "lora": lora})
    inject_adapters(new.language, model.config.backend)
    return new


def merge_lora(model: "VLM") -> "VLM":
    """A plain model that computes what `model` does: the updates of `language.lora` added to the weights.

    Returns:
        A new model; parameters without an update are the very tensors of `model`.

    Raises:
        ValueError: `model` has no such updates. Those of Partial LoRA cannot be merged: text has none.
    """
    if model.config.language.lora is None:
        raise ValueError("the model has no language.lora to merge")
    new = copy_with_language(model, {"lora": None})
    for parent in list(new.language.layers.modules()):
        for name, child in list(parent.named_children()):
            if _is_lora(child):
                setattr(parent, name, _merged(child))
    return new


def copy_with_language(model: "VLM", changes: dict[str, Any]) -> "VLM":
    """A model of the same tensors whose language model has modules of its own, and a changed configuration.

    Raises:
        ValueError: a configuration that cannot be.
    """
    language = LanguageConfig.model_validate(model.config.language.model_dump() | changes)
    new = shallow_copy(model)
    new.language = copy_modules(model.language)
    new.language.config = language
    new.config = VLMConfig.model_validate(model.config.model_dump() | {"language": language})
    return new


def copy_modules(module: ModuleType) -> ModuleType:
    """A tree of modules of its own over the very same parameters and buffers."""
    new = shallow_copy(module)
    for name, child in module.named_children():
        setattr(new, name, copy_modules(child))
    return new


def shallow_copy(module: ModuleType) -> ModuleType:
    """The same module with tables of its own: what is put in one is not put in the other."""
    new = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(new, table, getattr(module, table).copy())
    return new


def _inject_partial_lora(language: LanguageModel, config: PartialLoRAConfig, backend: str) -> None:
    options = config.model_dump(exclude={"modules"})
    for layer in language.layers:
        for parent_name in config.modules:
            parent = layer.get_submodule(parent_name)
            # Of experts and their router nothing is a plain linear that tells image tokens apart.
            if isinstance(parent, MoE):
                continue
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PartialLoRALinear.from_linear(child, **options, backend=backend))


def _inject_lora(language: LanguageModel, config: LoRAConfig) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f'language.lora needs peft: pip install "pyvlm[lora]" ({error})') from error
    linears = {
        name.rsplit(".", 1)[-1] for name, m in language.layers.named_modules() if isinstance(m, nn.Linear)
    }
    if unknown := sorted(set(config.target_modules) - linears):
        raise ValueError(
            f"lora.target_modules {unknown} are no linears of the decoder; it has "
            + ", ".join(sorted(linears))
        )
    learns = {id(p): p.requires_grad for p in language.parameters()}
    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it, of whatever type
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
    )
    inject_adapter_in_model(options, language.layers)
    for parameter in language.parameters():
        parameter.requires_grad_(learns.get(id(parameter), True))


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _merged(layer: Any) -> nn.Module:
    """The plain linear of one of peft's, with the update in its weight."""
    linear: nn.Module = shallow_copy(layer.get_base_layer())
    (adapter,) = layer.lora_A
    weight = linear.get_parameter("weight")
    merged = weight.detach() + layer.get_delta_weight(adapter).detach().to(weight.dtype)
    linear.register_parameter("weight", nn.Parameter(merged, weight.requires_grad))
    return linear
