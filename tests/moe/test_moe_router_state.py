"""The state of `pyvlm.nn.MoE`'s routers: thresholds that follow a quantile, a bias that balances the load."""

from typing import Any

import pytest
import torch
from moe_layers import layer_of, layout_of
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.nn import MoE

THRESHOLDS = {"text_router": "threshold_choice"}


def random_tokens(rows: list[str], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(rows), len(rows[0]), 8, dtype=torch.float64, generator=generator)


def test_before_the_first_step_the_best_expert_takes_every_token() -> None:
    layer, rows = layer_of(**THRESHOLDS), ["t" * 100]
    p = layer.gate(random_tokens(rows)).softmax(-1)[0]
    stats = layer(random_tokens(rows), layout_of(rows))[1]
    assert stats.dispatched[0].equal((p >= 0.25).sum(0))
    assert stats.unrouted.tolist() == [0, 0]


@pytest.mark.parametrize("options", [{}, {"image_experts": 2, "top_k": 1}])
def test_each_expert_comes_to_take_its_share(options: dict[str, Any]) -> None:
    """Without momentum the thresholds are those of the last batch: of this one, each takes its share."""
    layer = layer_of(**THRESHOLDS, image_router="threshold_choice", threshold_momentum=0.0, **options)
    rows = ["ttttt000000ttttt", "PPtttt11111111tt"] * 5
    layout, x = layout_of(rows), random_tokens(rows)
    layer.update_router(layer(x, layout)[1])
    dispatched = layer(x, layout)[1].dispatched
    text, image = (int((layout.kind == kind).sum()) for kind in (1, 2))
    share = 0.5  # two of four, or one of two
    if options:
        expected = [[0, 0, round(text * share), round(text * share)], [round(image * share)] * 2 + [0, 0]]
    else:
        expected = [[round(text * share)] * 4, [round(image * share)] * 4]
    assert dispatched.tolist() == expected


def test_the_running_quantile_serves_new_tokens() -> None:
    layer, rows = layer_of(**THRESHOLDS, top_k=1), ["t" * 400]
    layout = layout_of(rows)
    for step in range(60):
        layer.update_router(layer(random_tokens(rows, step), layout)[1])
    taken = layer.eval()(random_tokens(["t" * 4000], 99), layout_of(["t" * 4000]))[1].dispatched[0] / 4000
    # A share of 1/4 of 4,000 tokens has a deviation of 0.007, and so has the mean of some twenty quantiles.
    assert ((taken - 0.25).abs() < 0.04).all()


def test_updates_are_a_moving_average_of_the_batches_of_a_step() -> None:
    layer = layer_of(**THRESHOLDS, threshold_momentum=0.75)
    rows = ["t" * 50]
    start = layer.thresholds.clone()
    assert start.tolist() == [[0.25] * 4, [0.0] * 4]
    batches = [layer(random_tokens(rows, seed), layout_of(rows))[1] for seed in (1, 2)]
    layer.update_router(*batches)
    mean = (batches[0].quantiles + batches[1].quantiles) / 2
    assert_conforms(layer.thresholds, 0.75 * start + 0.25 * mean)
    assert layer.thresholds[1].tolist() == [0.0] * 4


def test_a_batch_without_text_leaves_its_thresholds() -> None:
    layer, rows = layer_of(**THRESHOLDS), ["0000"]
    before = layer.thresholds.clone()
    layer.update_router(layer(random_tokens(rows), layout_of(rows))[1])
    assert layer.thresholds.equal(before)


def test_forward_reads_the_state_and_leaves_it() -> None:
    layer, rows = layer_of(**THRESHOLDS, image_router="token_choice", bias_rate=0.1), ["tt000tttt"]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for training in (True, False):
        stats = layer.train(training)(random_tokens(rows), layout_of(rows))[1]
        assert (stats.quantiles is not None) == training
    assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())


def test_the_state_is_saved() -> None:
    options = {**THRESHOLDS, "image_router": "token_choice", "bias_rate": 0.1}
    layer, other, rows = layer_of(**options), layer_of(**options), ["tt0000tttt"]
    assert {"thresholds", "balance_bias"} <= layer.state_dict().keys()
    layer.update_router(layer(random_tokens(rows), layout_of(rows))[1])
    other.load_state_dict(layer.state_dict())
    assert other(random_tokens(rows), layout_of(rows))[0].equal(
        layer(random_tokens(rows), layout_of(rows))[0]
    )


def load_after(layer: MoE, x: Tensor, rows: list[str], steps: int) -> Tensor:
    for _ in range(steps):
        layer.update_router(layer(x, layout_of(rows))[1])
    return layer(x, layout_of(rows))[1].dispatched


def test_the_bias_balances_the_load() -> None:
    rows = ["tttt000ttttt"] * 20
    layer, x = layer_of(bias_rate=0.01, top_k=1), random_tokens(rows)
    start = load_after(layer, x, rows, 0)[0]
    end = load_after(layer, x, rows, 100)[0]
    assert start.max() - start.min() > 4 * (end.max() - end.min())
    # Images are by expert choice, in balance by construction, and do not move the bias.
    before = layer.balance_bias.clone()
    layer.update_router(layer(random_tokens(["0" * 12]), layout_of(["0" * 12]))[1])
    assert layer.balance_bias.equal(before)


def test_the_bias_balances_each_modalitys_experts_for_themselves() -> None:
    rows = ["tttt0000000t"]
    layer = MoE(8, 6, 6, image_experts=3, image_router="token_choice", bias_rate=0.5, top_k=1).double()
    stats = layer(random_tokens(rows), layout_of(rows))[1]
    layer.update_router(stats)
    counts = stats.dispatched.double()
    expected = torch.cat([0.5 * (c.mean() - c).sign() for c in (counts[1, :3], counts[0, 3:])])
    assert_conforms(layer.balance_bias, expected)


def test_the_bias_changes_the_choice_and_not_the_weights() -> None:
    rows = ["t" * 30]
    layer = layer_of(bias_rate=0.1, normalize="none")
    layer.balance_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    stats = layer(random_tokens(rows), layout_of(rows))[1]
    assert stats.dispatched[0, 0] == 30
    p = layer.gate(random_tokens(rows)).softmax(-1)[0]
    assert_conforms(stats.routing.weight[:30].detach(), p[:, 0].detach())


def test_statistics_that_cannot_update() -> None:
    layer, rows = layer_of(**THRESHOLDS), ["tttt"]
    with pytest.raises(ValueError, match="at least one forward pass"):
        layer.update_router()
    with pytest.raises(ValueError, match="must be of forward passes in training mode"):
        layer.update_router(layer.eval()(random_tokens(rows), layout_of(rows))[1])
