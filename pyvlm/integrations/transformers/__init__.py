"""pyvlm in transformers: `accelerate(model)` for a model that is there, and "pyvlm" as the name of an
attention and an experts implementation for `from_pretrained`.

Only official extension points are used (the attention, mask and experts interfaces, `loss_function`, hooks,
and modules replaced as a whole); no forward of a model is copied.
"""

import warnings
from weakref import WeakKeyDictionary

import transformers
from packaging.version import Version
from torch import nn

from pyvlm.integrations.transformers import attention, connectors, experts, norms, rules
from pyvlm.integrations.transformers import linear as linear_layers
from pyvlm.integrations.transformers import loss as losses
from pyvlm.integrations.transformers.changes import Change, Report
from pyvlm.integrations.transformers.mlp import MLPS

__all__ = ["Change", "Report", "accelerate", "register", "restore"]

TESTED = ("5.17", "5.24")  # from the first, up to but without the second
_changes: WeakKeyDictionary[nn.Module, list[Change]] = WeakKeyDictionary()


def register() -> None:
    """Makes the names of pyvlm's implementations known to transformers; importing this package does it."""
    attention.register()
    experts.register()


def accelerate(
    model: nn.Module, attention_rule: str | None = None, linear: bool = False, report: bool = False
) -> Report:
    """Puts a model of transformers on pyvlm's kernels, in place; weights and checkpoints stay as they are.

    Attention, experts, MLPs, RMSNorms, the loss with the head before it, and the connectors that gain
    by it. A model that was accelerated already is restored first.

    Args:
        model: a `PreTrainedModel`, or anything that holds some (a peft model, for one).
        attention_rule: the rule of `TokenLayout.spans` that the language model attends by, as "mmca"; None:
            the model's own.
        linear: also its linear layers, each shape where it is measured to be faster here (which takes some
            seconds): torch's float32 products reach less than half of what some CPUs can do.
        report: also print the report.

    Returns:
        What runs on which kernel now, and what stays as it was and why.

    Raises:
        TypeError: not a module.
        ValueError: the attention rule is unknown, or the model cannot follow it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a torch.nn.Module, as from_pretrained gives"
        )
    restore(model)
    changes = _changes.setdefault(model, [])
    try:
        if attention_rule is not None:
            changes += rules.apply(model, attention_rule)
        # The loss wants a plain head, so it comes before the linear layers.
        replaced = (MLPS.apply, norms.apply, connectors.apply)
        for apply in (attention.apply, experts.apply, losses.apply, *replaced):
            changes += apply(model)
        if linear:
            changes += linear_layers.apply(model)
    except BaseException:  # an interrupted measurement of linear layers too: a model is changed whole or not
        restore(model)
        raise
    made = Report(type(model).__name__, changes)
    if report:
        print(made)
    return made


def restore(model: nn.Module) -> None:
    """Takes back what `accelerate` did to this model; nothing to do where it did nothing."""
    for change in reversed(_changes.pop(model, [])):
        if change.undo is not None:
            change.undo()


def _warn_outside_tested_range() -> None:
    if not Version(TESTED[0]) <= Version(transformers.__version__) < Version(TESTED[1]):
        warnings.warn(
            f"transformers {transformers.__version__} is outside the range that pyvlm is tested with, "
            f"{TESTED[0]} up to but without {TESTED[1]}: compare results with attn_implementation='eager'",
            stacklevel=2,
        )


_warn_outside_tested_range()
register()
