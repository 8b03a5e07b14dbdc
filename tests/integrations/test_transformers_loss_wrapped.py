"""The loss of models that other libraries wrap: distributed training and adapters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from loss_checks import assert_same_gradient, assert_same_step, is_read, step
from tiny_causal_models import batch, build
from torch import nn

from pyvlm.integrations.transformers.loss import apply


@contextmanager
def one_process_group(folder: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_distributed_data_parallel(tmp_path: Any, options: dict[str, bool]) -> None:
    with one_process_group(tmp_path):
        ours = build("llama")
        apply(ours)
        parallel = nn.parallel.DistributedDataParallel(ours, **options)
        outputs = parallel(**batch("llama"))
        outputs.loss.backward()
    assert not is_read(outputs.logits)
    _, expected, _ = step(build("llama"), batch("llama"))
    for name, parameter in ours.named_parameters():
        assert_same_gradient(parameter.grad, expected[name], name)


@pytest.mark.parametrize("head_apart", [False, True])
def test_fully_sharded(tmp_path: Any, head_apart: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with one_process_group(tmp_path):
        ours = build("llama")
        apply(ours)
        mesh = init_device_mesh("cpu", (1,))
        if head_apart:
            fully_shard(ours.lm_head, mesh=mesh)
        fully_shard(ours, mesh=mesh)
        outputs = ours(**batch("llama"))
        assert is_read(outputs.logits) == head_apart  # its weight is gone after its forward
        outputs.loss.backward()
        _, expected, _ = step(build("llama"), batch("llama"))
        grad = ours.lm_head.weight.grad.full_tensor()
        assert_same_gradient(grad, expected["lm_head.weight"], "lm_head.weight")


@pytest.mark.parametrize("before", [True, False], ids=["applied before peft", "applied after"])
@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ],
)
def test_peft(before: bool, options: dict[str, Any], served: bool) -> None:
    peft = pytest.importorskip("peft")
    models = []
    for ours in (False, True):
        model = build("llama")
        if ours and before:
            apply(model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
        if ours and not before:
            (change,) = apply(model)
            assert change.module == "base_model.model.lm_head"
            assert (change.kernel is not None) == served
            assert served or "expected a torch.nn.Linear" in change.reason
        models.append(model)
    assert_same_step(*models, batch("llama"))
    assert is_read(models[1](**batch("llama")).logits) != served
