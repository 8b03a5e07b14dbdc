"""The head and loss of transformers' causal language models and VLMs, by `pyvlm.ops.linear_cross_entropy`.

While a model is called with `labels`, its head returns logits that are computed only where somebody reads
them (`lazy_logits`). The model's `loss_function` takes the hidden states behind them instead, so that rows
without a label (images, prompts) cost nothing and the logits are never all in memory. `outputs.logits` is
right all the same: reading it runs the head.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from pyvlm._autocast import autocasts
from pyvlm.integrations.transformers.changes import Change
from pyvlm.integrations.transformers.lazy_logits import LazyLogits, Source, lazy_logits
from pyvlm.nn.linear import FEWEST_TOKENS, few_tokens
from pyvlm.ops.loss import linear_cross_entropy

_LOG = logging.getLogger(__name__)
_KERNEL = "pyvlm.ops.linear_cross_entropy"


def apply(model: nn.Module) -> list[Change]:
    """Lets the losses of the models in `model` be computed from hidden states.

    It serves models whose head is a plain `nn.Linear` and whose forward calls `self.loss_function`, where
    that is transformers' `ForCausalLMLoss`. Parameters, state_dict and config stay as they are. There are
    these differences to see: in float16 and bfloat16 the loss comes from logits that were not rounded; the
    gradient of the loss does not pass `outputs.logits`, so that hooks on it do not see it; the loss has no
    second derivative; and `outputs.logits` has to be read before the weights change.

    Where the model is traced (torch.compile, torch.export), transformed (torch.func) or its head is
    distributed, the head and the loss are those of transformers.

    Args:
        model: a transformers model, or any module that holds some (one of peft, say).

    Returns:
        One `Change` for each head found; none where there is no head.
    """
    return [_serve(name, head, owners) for name, head, owners in _heads(model)]


@dataclass
class _Call:
    """One call of an owner with labels: whose it is, and the logits that its head returned."""

    owner: int
    logits: list[LazyLogits] = field(default_factory=list)


class _LazyHead(nn.Linear):
    """An `nn.Linear` that returns lazy logits while `call` says that its model was given labels."""

    call: _Call | None = None

    def forward(self, input: Tensor) -> Tensor:
        # FSDP makes a subclass of it, and takes the weight away after its forward.
        ordinary = type(self) is _LazyHead and _can_be_lazy(input, self.weight, self.bias)
        if ordinary and self.call is not None:
            logits = lazy_logits(input, self.weight, self.bias)
            self.call.logits.append(logits)
            return logits
        # For a view of the last tokens torch copies the whole weight, 6 % of a prefill in bf16: also for that
        # of one row, which counts as contiguous, whatever its strides. Viewed again it has its own.
        rows = input.contiguous().view(input.shape)
        if ordinary and rows.numel() < FEWEST_TOKENS * self.in_features:
            return few_tokens(rows, self.weight, self.bias)
        return super().forward(rows)


def _can_be_lazy(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are ordinary tensors, met by nothing that traces or transforms their products."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    tensors = [hidden, weight] if bias is None else [hidden, weight, bias]
    if any(type(x) not in (Tensor, nn.Parameter) or x.device != hidden.device for x in tensors):
        return False  # a distributed, quantised or fake tensor
    if hidden.device.type == "meta" or hasattr(
        weight, "ds_id"
    ):  # DeepSpeed takes the weight away after its use
        return False
    if not autocasts(hidden.device) and any(x.dtype != hidden.dtype for x in tensors):
        return False
    return hidden.is_floating_point() and hidden.dim() >= 2 and hidden.shape[-1:] == weight.shape[1:]


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[PreTrainedModel]]]:
    """The output embeddings in a model, each with its name and the models that call it theirs."""
    names = {id(module): name for name, module in model.named_modules()}
    heads: dict[int, tuple[nn.Module, list[PreTrainedModel]]] = {}
    for owner in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        head = owner.get_output_embeddings()
        if isinstance(head, nn.Module):
            heads.setdefault(id(head), (head, []))[1].append(owner)
    for key, (head, owners) in heads.items():
        yield names.get(key, ""), head, owners


def _serve(name: str, head: nn.Module, owners: list[PreTrainedModel]) -> Change:
    reason = _why_not_head(head)
    reasons = [_why_not_owner(owner) for owner in owners]
    owners = [owner for owner, why in zip(owners, reasons, strict=True) if why is None]
    if reason is None and not owners:
        reason = "; ".join(why for why in reasons if why is not None)
    if reason is not None:
        return Change(name, "loss", None, reason, None)
    undo = [_watch(owner) for owner in owners]
    head.__class__ = _LazyHead
    held = ref(head)

    def restore() -> None:
        for put_back in undo:
            put_back()
        if type(served := held()) is _LazyHead:
            served.__class__ = nn.Linear  # type: ignore[assignment]
            served.__dict__.pop("call", None)

    return Change(name, "loss", _KERNEL, "logits are computed only where they are read", restore)


def _why_not_head(head: nn.Module) -> str | None:
    if type(head) is _LazyHead:
        return "it is served already"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__module__}.{type(head).__qualname__}, expected a torch.nn.Linear"
    if "forward" in vars(head):
        return "another library has replaced the head's forward"
    if type(head.weight) is not nn.Parameter or head.weight.device.type == "meta":
        return "the head's weight is no plain parameter in memory: it is distributed, quantised or offloaded"
    return None


def _why_not_owner(owner: PreTrainedModel) -> str | None:
    name = type(owner).__name__
    forward = inspect.unwrap(owner.forward)
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return f"{name}.forward computes its loss itself, without self.loss_function"
    if owner.loss_function is not ForCausalLMLoss:
        loss = getattr(owner.loss_function, "__name__", type(owner.loss_function).__name__)
        return f"the loss of {name} is {loss}, expected ForCausalLMLoss"
    return None


def _watch(owner: PreTrainedModel) -> Callable[[], None]:
    """Tells the head of an owner's calls with labels and replaces its loss; returns what undoes both."""
    hooks = (
        owner.register_forward_pre_hook(_begin, with_kwargs=True),
        owner.register_forward_hook(_end, always_call=True),
    )
    had = vars(owner).get("_loss_function")  # where transformers' setter puts it
    loss = functools.partial(causal_lm_loss, owner.loss_function)
    owner.loss_function = loss
    held = ref(owner)

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        watched = held()
        if watched is None or vars(watched).get("_loss_function") is not loss:
            return  # it is gone, or somebody set another since
        if had is None:
            del watched._loss_function
        else:
            watched.loss_function = had

    return undo


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's inputs, in their order."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _begin(owner: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    head = owner.get_output_embeddings()
    if torch.compiler.is_compiling() or not isinstance(head, _LazyHead) or head.call is not None:
        return
    given = {**dict(zip(_parameters(type(owner).forward), args, strict=False)), **kwargs}
    if given.get("labels") is not None:
        head.call = _Call(id(owner))


def _end(owner: PreTrainedModel, args: tuple[Any, ...], output: Any) -> None:
    head = owner.get_output_embeddings()
    if not isinstance(head, _LazyHead) or head.call is None or head.call.owner != id(owner):
        return
    call, head.call = head.call, None
    if any(logits.behind.computed is not None for logits in call.logits):
        _warn_of_reading(type(owner).__name__)


@functools.cache
def _warn_of_reading(name: str) -> None:
    _LOG.warning(
        "%s read its logits for its loss, in a way that %s does not know: the loss is right, but takes the "
        "time and memory that it takes without",
        name,
        _KERNEL,
    )


def causal_lm_loss(
    original: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`transformers.loss.loss_utils.ForCausalLMLoss`, from the hidden states where the logits are lazy.

    Args:
        original: the loss for all other logits.
        logits: [.., T, V].
        labels: int64 [.., T], not shifted: row t is scored against labels[t + 1].
        vocab_size: V.
        num_items_in_batch: what the sum is divided by; None for the number of labelled rows.
        ignore_index: the label of rows that have none.
        shift_labels: int64 [.., T], shifted already, to be used in place of `labels`.

    Returns:
        A scalar in float32 (float64 for float64 logits); NaN where no row has a label, as there.
    """
    source = logits.source if isinstance(logits, LazyLogits) else None
    targets = shift_labels
    if targets is None:
        targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if source is None or not _fits(logits, targets, vocab_size):
        options = {"ignore_index": ignore_index, "shift_labels": shift_labels, **kwargs}
        return original(logits, labels, vocab_size, num_items_in_batch, **options)
    targets = targets.to(logits.device).flatten()
    loss = _summed(source, targets, ignore_index)
    items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


def _fits(logits: Tensor, targets: Tensor, vocab_size: int) -> bool:
    """Whether the kernel takes them. What it refuses, the original answers with its own errors."""
    return (
        targets.dtype == torch.int64
        and vocab_size == logits.shape[-1]
        and targets.numel() == logits.shape[:-1].numel()
    )


def _summed(source: Source, targets: Tensor, ignore_index: int) -> Tensor:
    hidden, bias = source.hidden.flatten(0, -2), source.bias
    if source.scale != 1.0:
        hidden, bias = hidden * source.scale, None if bias is None else bias * source.scale
    return linear_cross_entropy(
        hidden, source.weight, targets, ignore_index, bias, source.softcap, reduction="sum"
    )
