"""Which weights are held in half precision while others learn."""

import torch
from torch import nn

from pyvlm.nn.linear import Linear

# Their forward is a product of input and weight and nothing else, which autocast computes in its own type.
LINEARS = (nn.Linear, Linear)


def hold_frozen(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Holds frozen linear weights of stacks of layers in `dtype` where no bit is lost, all others in float32.

    Under autocast of `dtype` a linear layer casts its weight in each pass, so that the products are the same,
    bit for bit, and the weights take half the memory. No bit is lost where the weights came in `dtype`, as
    from a bf16 checkpoint: whether one was is read off its values. So a later stage that trains a weight has
    it in float32 as it was, a checkpoint may hold it in either, and what was read in fp32 or fp16 stays fp32.
    Weights outside of lists of layers stay too: of embeddings and heads, others ask for the dtype.

    Args:
        model: what learns requires a gradient. Parameters stay the same objects.
        dtype: autocast's; None: all in float32.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    linears = {
        id(parameter)
        for stack in stacks
        for module in stack.modules()
        if type(module) in LINEARS
        for parameter in module.parameters(recurse=False)
    }
    shared = {
        id(parameter)
        for module in model.modules()
        if type(module) not in LINEARS
        for parameter in module.parameters(recurse=False)
    }
    linears -= shared
    for parameter in model.parameters():
        exact = parameter.data.float()
        half = exact if dtype is None or parameter.requires_grad else exact.to(dtype)
        may = id(parameter) in linears
        parameter.data = half if may and torch.equal(half.float(), exact) else exact
