"""No token knows what comes later, however `pyvlm.nn.MoE` routes, but for a capacity, off by default.

The routing of earlier tokens is compared bit for bit. Their outputs are compared within float64's tolerance:
where later tokens go to other experts, the experts' products have other shapes and may round apart.
"""

from typing import Any

import pytest
import torch
from moe_layers import layer_of, layout_of
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.layout import TokenLayout
from pyvlm.nn import MoE
from pyvlm.ops import Routing

ROUTERS: dict[str, dict[str, Any]] = {
    "images by expert choice, text by token choice": {},
    "all by token choice": {"image_router": "token_choice"},
    "text by threshold": {"text_router": "threshold_choice"},
    "all by threshold": {"text_router": "threshold_choice", "image_router": "threshold_choice"},
    "split, images by expert choice": {"image_experts": 2},
    "split, all by token choice": {"image_experts": 2, "image_router": "token_choice"},
    "split, text by threshold": {"image_experts": 1, "text_router": "threshold_choice"},
    "weights not normalised, loss-free bias": {"normalize": "none", "bias_rate": 0.05},
}
ROWS = ["ttt000tt11111tt", "t0000tttt111ttt", "PPttttttttttttt", "tt0000tt11tttPP"]


def trained_layer(**options: Any) -> MoE:
    """A layer whose thresholds and bias have moved."""
    layer, layout = layer_of(**options), layout_of(["tttt0000tttt"] * 8)
    for _ in range(5):
        layer.update_router(layer(torch.randn(8, 12, 8, dtype=torch.float64), layout)[1])
    return layer


def routes_before(routing: Routing, layout: TokenLayout, end: int) -> list[Tensor]:
    """Token, expert and weight of each slot of the first `end` tokens of each row."""
    early = routing.token.long() % layout.length < end
    return [routing.token[early], routing.expert[early], routing.weight[early]]


def boundaries(rows: list[str]) -> list[int]:
    """Where every row can be cut without cutting an image."""
    length = len(rows[0])
    return [i for i in range(1, length) if all(row[i - 1] != row[i] or row[i] in "tP" for row in rows)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_row_depends_on_what_comes_later(router: str, training: bool) -> None:
    """Texts and whole images are replaced from a place on; every row before it stays, image rows too."""
    layer, layout = trained_layer(**ROUTERS[router]).train(training), layout_of(ROWS)
    x = torch.randn(4, 15, 8, dtype=torch.float64)
    before, stats = layer(x, layout)
    cuts = boundaries(ROWS)
    assert len(cuts) >= 3
    for i in cuts:
        later = x.clone()
        later[:, i:] = torch.randn(4, 15 - i, 8, dtype=torch.float64)
        after, stats_after = layer(later, layout)
        assert_conforms(after[:, :i].detach(), before[:, :i].detach())
        assert not torch.isclose(after[:, i:], before[:, i:]).all()
        expected = routes_before(stats.routing, layout, i)
        for actual, old in zip(routes_before(stats_after.routing, layout, i), expected, strict=True):
            assert actual.equal(old)


@pytest.mark.parametrize("router", ROUTERS)
def test_no_text_row_depends_on_a_later_token(router: str) -> None:
    """Every place, in the middle of an image too: text rows before it stay."""
    layer, layout = trained_layer(**ROUTERS[router]), layout_of(ROWS)
    x, text = torch.randn(4, 15, 8, dtype=torch.float64), layout.kind == 1
    before = layer(x, layout)[0].detach()
    for i in range(1, 15):
        later = x.clone()
        later[:, i:] = torch.randn(4, 15 - i, 8, dtype=torch.float64)
        after = layer(later, layout)[0].detach()
        assert_conforms(after[:, :i][text[:, :i]], before[:, :i][text[:, :i]])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_token_by_token_equals_one_pass(router: str, training: bool) -> None:
    layer = trained_layer(**ROUTERS[router]).train(training)
    row = "t00000ttt111tttt"
    x = torch.randn(1, len(row), 8, dtype=torch.float64)
    whole = layer(x, layout_of([row]))[0].detach()
    pieces = [slice(0, 1), slice(1, 6), *(slice(i, i + 1) for i in (6, 7, 8)), slice(9, 12)]
    pieces += [slice(i, i + 1) for i in range(12, len(row))]
    apart = [layer(x[:, piece], layout_of([row[piece]]))[0].detach() for piece in pieces]
    assert_conforms(torch.cat(apart, dim=1), whole)


@pytest.mark.parametrize("drop", ["position", "priority"])
def test_a_capacity_lets_later_tokens_push_out_earlier_ones(drop: str) -> None:
    """What the documentation warns of; and the proof that the tests above could fail."""
    layer = layer_of(image_router="token_choice", token_capacity_factor=0.5, drop=drop)
    layout = layout_of(["t" * 12])
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    x[0, :6] = x[0, 6:] * 0.5  # the same first choices with less confidence
    before = layer(x, layout)[0].detach()
    later = x.clone()
    later[:, 6:] = torch.randn(1, 6, 8, dtype=torch.float64) * 3
    after = layer(later, layout)[0].detach()
    assert not torch.isclose(after[:, :6], before[:, :6]).all()
    layer.eval()  # dropless
    assert_conforms(layer(later, layout)[0][:, :6].detach(), layer(x, layout)[0][:, :6].detach())
