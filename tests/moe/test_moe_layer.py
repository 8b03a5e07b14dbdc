"""`pyvlm.nn.MoE`: every modality by its own router, no text row from the future, padding nowhere."""

import pytest
import torch
from moe_layers import LAYOUTS, layer_of, layout_of
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.layout import TokenLayout
from pyvlm.nn import MoE, MoEStats, TokenGroups
from pyvlm.ops import expert_choice, expert_mlp, load_balancing_loss, router_z_loss, token_choice


def expected(layer: MoE, x: Tensor, rows: list[str]) -> Tensor:
    """Token by token for text, image by image for images."""
    y = torch.zeros_like(x)
    weights, options = (layer.gate_up_proj, layer.down_proj), layer.options
    for b, row in enumerate(rows):
        for i, c in enumerate(row):
            if c == "t" or (c.isdigit() and options.image_router == "token_choice"):
                token = x[b, i : i + 1]
                y[b, i] = expert_mlp(token, token_choice(layer.gate(token), options.top_k), *weights)[0]
        images = {c for c in row if c.isdigit()} if options.image_router == "expert_choice" else set()
        for image in sorted(images):
            place = slice(row.index(image), row.rindex(image) + 1)
            tokens = x[b, place]
            capacity = -int(-options.capacity_factor * len(tokens) // layer.num_experts)
            y[b, place] = expert_mlp(tokens, expert_choice(layer.gate(tokens), capacity), *weights)
    return y


@pytest.mark.parametrize("image_router", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, image_router: str) -> None:
    rows, layout = LAYOUTS[name], layout_of(LAYOUTS[name])
    layer = layer_of(image_router=image_router, capacity_factor=1.5)
    x = torch.randn(*layout.kind.shape, 8, dtype=torch.float64, requires_grad=True)
    y, stats = layer(x, layout)
    assert_conforms(y.detach(), expected(layer, x, rows).detach())
    # Every parameter has a gradient, whatever is in the batch.
    (y.sum() + stats.aux_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_packed_documents_may_number_their_images_alike() -> None:
    kind = torch.tensor([[2, 2, 2, 2, 2, 2, 2, 2]], dtype=torch.uint8)
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    layer, x = layer_of(), torch.randn(1, 8, 8, dtype=torch.float64)
    packed, _ = layer(x, TokenLayout(kind, torch.zeros_like(document), document))
    for part in (slice(0, 3), slice(3, 8)):
        alone, _ = layer(x[:, part], layout_of(["0" * (part.stop - part.start)]))
        assert_conforms(packed[:, part].detach(), alone.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_text_row_depends_on_a_later_token(dtype: torch.dtype) -> None:
    """Bitwise: scaling a token keeps its experts, so that every product keeps its shape and its rounding."""
    rows = ["tt000000tttt", "t0000tttt111", "tttttttttttt", "PPtt0000tt11"]
    layout, layer = layout_of(rows), layer_of(dtype)
    x = torch.randn(4, 12, 8).to(dtype)
    before, _ = layer(x, layout)
    text = layout.kind == 1
    for i in range(1, 12):
        later = x.clone()
        later[:, i:] *= torch.where(text[:, i:, None], 4.0, 1.0).to(dtype)
        after, _ = layer(later, layout)
        assert after[:, :i][text[:, :i]].equal(before[:, :i][text[:, :i]])
        assert not after.equal(before)


def test_no_text_row_depends_on_what_a_later_token_is() -> None:
    rows = ["ttt0000tttttt", "t00000ttt11tt"]
    layout, layer = layout_of(rows), layer_of()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    before = layer(x, layout)[0].detach()
    for i in range(1, 13):
        later = x.clone()
        later[:, i:] = torch.randn(2, 13 - i, 8, dtype=torch.float64)
        after = layer(later, layout)[0].detach()
        text = (layout.kind == 1)[:, :i]
        assert_conforms(after[:, :i][text], before[:, :i][text])


def test_images_do_not_touch_each_other_or_the_text() -> None:
    layout, layer = layout_of(["t0000t11111t"]), layer_of()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    before = layer(x, layout)[0].detach()
    changed = x.clone()
    changed[:, 1:5] = torch.randn(1, 4, 8, dtype=torch.float64)
    after = layer(changed, layout)[0].detach()
    others = torch.ones(12, dtype=torch.bool)
    others[1:5] = False
    assert_conforms(after[:, others], before[:, others])


def test_token_by_token_equals_one_pass() -> None:
    row = "tt00000ttttt"
    layer, x = layer_of(), torch.randn(1, 12, 8, dtype=torch.float64)
    whole = layer(x, layout_of([row]))[0].detach()
    prefill = layer(x[:, :7], layout_of([row[:7]]))[0].detach()
    steps = [layer(x[:, i : i + 1], layout_of(["t"]))[0].detach() for i in range(7, 12)]
    assert_conforms(torch.cat([prefill, *steps], dim=1), whole)


def test_a_batch_gives_what_its_rows_give_alone() -> None:
    rows = ["tt000tt", "Pt0001111tt", "000000000tttt"]
    layout, layer = layout_of(rows), layer_of()
    x = torch.randn(*layout.kind.shape, 8, dtype=torch.float64)
    together = layer(x, layout)[0].detach()
    for b, row in enumerate(rows):
        alone = layer(x[b : b + 1, : len(row)], layout_of([row]))[0].detach()
        assert_conforms(together[b : b + 1, : len(row)], alone)


def test_padding_is_routed_nowhere_and_pays_nothing() -> None:
    layout, layer = layout_of(["PPtt000", "t00000P"]), layer_of(z_loss_coef=0.1)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    padding = layout.kind == 0
    y, stats = layer(x, layout)
    x[padding] = 1e3
    y_again, stats_again = layer(x, layout)
    assert (y[padding] == 0).all()
    assert y_again.equal(y)
    for again, first in zip(stats_again[:4], stats[:4], strict=True):
        assert again.equal(first)
    assert not padding.flatten()[stats.routing.token].any()


def test_statistics_count_what_was_dispatched_and_dropped() -> None:
    layout, layer = layout_of(["tt00000000", "PPt0000ttt"]), layer_of(capacity_factor=0.5)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    stats = layer(x, layout)[1]
    assert isinstance(stats, MoEStats)
    assert stats.dispatched.sum(1).tolist() == [6 * 2, 4 * (1 + 1)]  # images of 8 and 4: capacity 1 and 1
    assert stats.dispatched[1].tolist() == [2, 2, 2, 2]
    untouched = (layer(x, layout)[0] == 0).all(-1) & (layout.kind == 2)
    assert stats.unrouted.tolist() == [0, untouched.sum()]
    assert stats.unrouted[1] >= 12 - 8
    assert not stats.dropped.any()  # who is not chosen was not refused either


@pytest.mark.parametrize("image_router", ["expert_choice", "token_choice"])
def test_the_balance_loss_is_over_the_tokens_that_choose(image_router: str) -> None:
    layout = layout_of(["tt000tP", "tttt000"])
    layer = layer_of(image_router=image_router, aux_loss_coef=0.3, z_loss_coef=0.7)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    logits = layer.gate(x)
    real = logits[layout.kind != 0]
    choosing = real if image_router == "token_choice" else logits[layout.kind == 1]
    loss = 0.3 * load_balancing_loss(choosing, 2) + 0.7 * router_z_loss(real)
    assert_conforms(layer(x, layout)[1].aux_loss.detach(), loss.detach())


def test_gradients() -> None:
    layout = layout_of(["t000tt", "P0000t"])
    layer = MoE(3, 2, 3, top_k=2, z_loss_coef=0.1).double()
    torch.nn.init.normal_(layer.gate.weight)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        call = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, layout))
        return call[0], call[1].aux_loss

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_the_same_bits_every_time() -> None:
    layout, layer = layout_of(["ttt00000tt1111111tt"] * 8), layer_of(torch.float32)
    x = torch.randn(8, 19, 8, requires_grad=True)

    def run() -> list[Tensor]:
        y, stats = layer(x, layout)
        return [y, *torch.autograd.grad(y.square().sum() + stats.aux_loss, [x, *layer.parameters()])]

    first = run()
    assert all(again.equal(result) for again, result in zip(run(), first, strict=True))


def test_the_router_is_float32_under_autocast() -> None:
    layout, layer = layout_of(["tttttt0000tt"]), layer_of(torch.float32)
    x = torch.randn(1, 12, 8)
    _, plain = layer(x, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, stats = layer(x, layout)
    assert y.dtype == torch.bfloat16
    assert stats.aux_loss.equal(plain.aux_loss)
    assert stats.dispatched.equal(plain.dispatched)


def test_evaluation_is_not_random() -> None:
    layout, layer = layout_of(["ttt0000tt"]), layer_of()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    assert layer.train()(x, layout)[0].equal(layer.eval()(x, layout)[0])


def test_state_dict_names_and_round_trip() -> None:
    layer, other = layer_of(), layer_of()
    assert list(layer.state_dict()) == ["gate_up_proj", "down_proj", "gate.weight"]
    other.load_state_dict(layer.state_dict())
    layout, x = layout_of(["tt000"]), torch.randn(1, 5, 8, dtype=torch.float64)
    assert other(x, layout)[0].equal(layer(x, layout)[0])


def test_groups_made_beforehand_and_statistics_left_out() -> None:
    layout, layer = layout_of(["ttt0000tt", "PPt000111"]), layer_of()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    y, none = layer(x, layout, TokenGroups.of(layout), statistics=False)
    assert y.equal(layer(x, layout)[0])
    assert none is None


def test_hidden_states_that_do_not_match() -> None:
    layer = layer_of()
    with pytest.raises(ValueError, match=r"must be \[1, 5, 8\].* got \[1, 4, 8\]"):
        layer(torch.zeros(1, 4, 8, dtype=torch.float64), layout_of(["tt000"]))
    with pytest.raises(ValueError, match=r"must be \[1, 5, 8\].* got \[1, 5, 9\]"):
        layer(torch.zeros(1, 5, 9, dtype=torch.float64), layout_of(["tt000"]))
    with pytest.raises(RuntimeError, match="has no triton implementation"):
        layer_of(backend="triton")(torch.zeros(1, 5, 8, dtype=torch.float64), layout_of(["tt000"]))
