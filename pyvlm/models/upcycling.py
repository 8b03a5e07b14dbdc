"""Upcycling: a trained dense model becomes one with experts, each a copy of the MLP that it stands for."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyvlm.models.adapters import copy_with_language
from pyvlm.models.config import MoEConfig
from pyvlm.nn.experts import read_dense
from pyvlm.nn.moe import MoE

if TYPE_CHECKING:
    from pyvlm.models.vlm import VLM

# What copies of an MLP are is not for the experts' configuration to choose.
OF_THE_MLP = ("intermediate_size", "activation", "gated", "bias")


def upcycle(model: "VLM", moe: MoEConfig, seed: int = 0) -> "VLM":
    """A model with experts in `moe.layers`, copies of the MLPs there, behind routers that know nothing yet.

    So MoE-LLaVA (arXiv 2401.15947) begins its third stage. Where the weights of a token's experts add up to 1
    (token choice, not normalised "none", nothing dropped), it computes at first what `model` computes.

    Args:
        model: its language model has no experts.
        moe: `intermediate_size`, `activation`, `gated` and `bias` are those of the MLPs and can be left out.
        seed: of the routers' weights, which are normal of `config.initializer_range`. No other random number
            is drawn.

    Returns:
        A new model whose `config` says what it is, so that it is saved and read as any other. Everything but
        experts and routers is the very tensors of `model`.

    Raises:
        ValueError: `model` has experts already, or updates (LoRA) in these MLPs, or `moe` asks for other
            experts than copies.
    """
    language = model.config.language
    if language.moe is not None:
        raise ValueError(f"the model has experts already, in the layers {language.moe_layers}")
    if language.lora is not None:
        raise ValueError("the model has language.lora, which experts cannot take over: merge_lora it first")
    if language.partial_lora is not None and "mlp" in language.partial_lora.modules:
        raise ValueError("the MLPs have language.partial_lora, which experts cannot take over")
    moe = moe.model_copy(update=_of_the_mlps(model, moe))
    new = copy_with_language(model, {"moe": moe})
    options = moe.model_dump(exclude={"layers", *OF_THE_MLP})
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        for index in new.config.language.moe_layers:
            layer = new.language.layers[index]
            experts = MoE.from_dense(layer.get_submodule("mlp"), **options, backend=model.config.backend)
            router = torch.empty(experts.gate.weight.shape)
            nn.init.normal_(router, std=model.config.initializer_range, generator=generator)
            with torch.no_grad():
                experts.gate.weight.copy_(router)
            layer.mlp = experts
    return new


def _of_the_mlps(model: "VLM", moe: MoEConfig) -> dict[str, Any]:
    """What the experts are since the MLPs are it; ValueError where `moe` says otherwise."""
    mlp = read_dense(model.language.get_submodule("layers.0.mlp"), None)
    found = {
        "intermediate_size": mlp.down.shape[1],
        "activation": mlp.activation,
        "gated": mlp.gated,
        "bias": mlp.gate_up_bias is not None or mlp.down_bias is not None,
    }
    given = {name: getattr(moe, name) for name in OF_THE_MLP if name in moe.model_fields_set}
    for name, value in given.items():
        if value is not None and value != found[name]:
            raise ValueError(
                f"upcycling copies MLPs of {name} {found[name]}, got {name} {value}: leave it out"
            )
    return found
