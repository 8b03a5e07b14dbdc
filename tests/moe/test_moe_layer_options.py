"""What the options of `pyvlm.nn.MoE`'s routers do: capacity, normalisation, noise, split experts, losses."""

import math
from typing import Any

import conformance
import pytest
import torch
from conformance import Case
from moe_helpers import chosen, dense_weights
from moe_layers import layer_of, layout_of
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.nn import MoE, RouterOptions
from pyvlm.ops import (
    expert_choice,
    expert_mlp,
    importance_loss,
    load_balancing_loss,
    load_loss,
    merge_routings,
    router_z_loss,
    token_choice,
)

TOKEN_CHOICE = {"image_router": "token_choice"}


def stored_layer(case: Case, gate_up: Tensor, down: Tensor, **options: Any) -> MoE:
    experts, hidden, intermediate = down.shape
    layer = MoE(hidden, intermediate, experts, **TOKEN_CHOICE, **options)
    layer.load_state_dict(
        {"gate.weight": case["param.router"], "gate_up_proj": gate_up.contiguous(), "down_proj": down}
    )
    return layer


@pytest.mark.parametrize("case", conformance.cases("moe/deepspeed_top2"))
def test_deepspeeds_layer(case: Case) -> None:
    settings = case.settings
    gate_up = torch.cat([case["param.w_gate"], case["param.w_up"]], dim=2).transpose(1, 2)
    top_k = settings["k"]
    layer = stored_layer(
        case,
        gate_up,
        case["param.w_down"].transpose(1, 2).contiguous(),
        top_k=top_k,
        drop={"probs": "priority"}.get(settings["drop_policy"], "position"),
        token_capacity_factor=settings["capacity_factor"],
        aux_loss_coef=1.0,
    )
    rows, length, _ = case["input.x"].shape
    y, stats = layer(case["input.x"], layout_of(["t" * length] * rows))
    assert_conforms(y.detach(), case["output.y"])
    assert_conforms(stats.aux_loss.detach(), case["output.l_aux"])
    assert stats.dropped.sum() == settings["dropped_routes"]
    assert stats.dispatched.max() <= settings["capacity"]
    if top_k > 2:  # top2gating counts first choices alone
        assert (stats.dispatched + stats.dropped)[0].equal(case["output.exp_counts"])


@pytest.mark.parametrize("case", conformance.cases("moe/transformers_experts"))
def test_transformers_layer(case: Case) -> None:
    settings = case.settings
    layer = stored_layer(
        case,
        case["param.gate_up"],
        case["param.down"],
        top_k=settings["top_k"],
        normalize="after_drop" if settings["norm_topk_prob"] else "none",
        aux_loss_coef=1.0,
        aux_loss_form="transformers",
    )
    rows, length, _ = case["input.x"].shape
    y, stats = layer(case["input.x"], layout_of(["t" * length] * rows))
    assert_conforms(y.detach(), case["output.y"])
    if settings["layers_in_aux_loss"] == 1:
        assert_conforms(stats.aux_loss.detach(), case["output.load_balancing_loss"])


@pytest.mark.parametrize("normalize", ["after_drop", "before_drop", "none"])
@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_what_weights_are_divided_by(normalize: str, noise: str | None) -> None:
    layer = layer_of(**TOKEN_CHOICE, token_capacity_factor=0.6, normalize=normalize, noise=noise)
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    layout = layout_of(["t" * 40])
    torch.manual_seed(5)
    kept = layer(x, layout)[1].routing
    dropless = layer_of(**TOKEN_CHOICE, noise=noise)  # the same choices, nothing dropped
    dropless.load_state_dict(layer.state_dict())
    torch.manual_seed(5)
    wanted = chosen(dropless(x, layout)[1].routing)
    p = layer.gate(x)[0].softmax(-1)
    keeps = chosen(kept)
    assert (keeps & ~wanted).sum() == 0
    assert keeps.sum(1).unique().tolist() == [0, 1, 2]
    total = {
        "after_drop": (p * keeps).sum(1, keepdim=True).clamp(min=1e-9),
        "before_drop": (p * wanted).sum(1, keepdim=True),
        "none": torch.ones_like(p),
    }[normalize]
    assert_conforms(dense_weights(kept).detach(), (p * keeps / total).detach())


def test_dropped_counts_by_expert_and_modality() -> None:
    rows = ["tt0000tttt11ttP", "ttt00000tttttt1"]
    layout = layout_of(rows)
    layer = layer_of(**TOKEN_CHOICE, token_capacity_factor=0.5, eval_token_capacity_factor=0.75)
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    logits, real = layer.gate(x).flatten(0, 1), (layout.kind != 0).flatten()
    image = (layout.kind == 2).flatten()[real]
    for training, factor in ((True, 0.5), (False, 0.75)):
        stats = layer.train(training)(x, layout)[1]
        capacity = math.ceil(factor * 2 * 29 / 4)
        kept, wanted = (chosen(token_choice(logits[real], 2, c)) for c in (capacity, None))
        for m, of_modality in enumerate((~image, image)):
            assert stats.dispatched[m].equal(kept[of_modality].sum(0))
            assert stats.dropped[m].equal((wanted & ~kept)[of_modality].sum(0))
            assert stats.unrouted[m] == (~kept[of_modality].any(1)).sum()
        assert stats.dispatched.sum(0).max() == capacity
        assert stats.dropped.sum() > 0


def test_modalities_compete_only_for_experts_that_they_share() -> None:
    layout = layout_of(["tttttt000000"])
    split = layer_of(**TOKEN_CHOICE, image_experts=2, token_capacity_factor=1.0)
    stats = split(torch.randn(1, 12, 8, dtype=torch.float64), layout)[1]
    assert stats.dispatched[0, :2].tolist() == stats.dispatched[1, 2:].tolist() == [0, 0]
    # Two choices among two experts: all take all, and nothing is refused.
    assert stats.dispatched.sum(1).tolist() == [12, 12]


@pytest.mark.parametrize("image_router", ["expert_choice", "token_choice"])
def test_split_experts_are_two_layers_in_one(image_router: str) -> None:
    rows = ["tt00000tttt", "t0011111ttP"]
    layout = layout_of(rows)
    layer = MoE(8, 6, 5, image_experts=2, image_router=image_router, capacity_factor=0.7).double()
    torch.nn.init.normal_(layer.gate.weight)
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    y, stats = layer(x, layout)
    logits, flat = layer.gate(x).flatten(0, 1), x.flatten(0, 1)
    kind = layout.kind.flatten()
    for m, experts, code in ((0, slice(2, 5), 1), (1, slice(0, 2), 2)):
        rows_m = (kind == code).nonzero()[:, 0]
        scores = logits[rows_m, experts]
        if m == 1 and image_router == "expert_choice":
            parts = [expert_choice(s, math.ceil(0.7 * len(s) / 2)) for s in scores.split([5, 2, 5])]
            starts = [torch.arange(0, 5), torch.arange(5, 7), torch.arange(7, 12)]
            routing = merge_routings(list(zip(parts, starts, strict=True)), 12)
        else:
            routing = token_choice(scores, 2)
        expected = expert_mlp(flat[rows_m], routing, layer.gate_up_proj[experts], layer.down_proj[experts])
        assert_conforms(y.flatten(0, 1)[rows_m].detach(), expected.detach())
        assert stats.dispatched[m, experts].equal(routing.expert_offsets.diff().long())
        assert stats.dispatched[m].sum() == len(routing.token)
    (y.sum() + stats.aux_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_gumbel_noise_draws_the_second_choice() -> None:
    """As often as the softmax of the others says, with the weights of p itself, and in training alone."""
    layer, layout = layer_of(**TOKEN_CHOICE, noise="gumbel"), layout_of(["t" * 8000])
    x = 0.3 * torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 8000, 8)
    p = layer.gate(x[0, 0]).softmax(-1).detach()
    routing = layer(x, layout)[1].routing
    counts, first = routing.expert_offsets.diff(), int(p.argmax())
    assert counts[first] == 8000
    others = p.clone()
    others[first] = 0
    others /= others.sum()
    deviation = (others * (1 - others) / 8000).sqrt()
    frequency = counts / 8000
    frequency[first] = 0
    assert ((frequency - others).abs() <= 4 * deviation).all()
    assert (others[others > 0] > 0.01).all()  # all three can come up

    weights = dense_weights(routing).detach()
    expected = p * chosen(routing)
    assert_conforms(weights, expected / expected.sum(1, keepdim=True))
    assert chosen(layer.eval()(x, layout)[1].routing).unique(dim=0).shape == (1, 4)


def test_gumbel_noise_follows_torchs_seed_and_lets_gradients_through() -> None:
    layer, layout = layer_of(**TOKEN_CHOICE, noise="gumbel"), layout_of(["t" * 30])
    x = torch.randn(1, 30, 8, dtype=torch.float64)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x, layout)[0]

    assert run(1).equal(run(1))
    assert not run(1).equal(run(2))
    run(1).sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("image_router", ["expert_choice", "token_choice", "threshold_choice"])
def test_gaussian_noise_is_on_the_logits(image_router: str) -> None:
    layer = layer_of(
        image_router=image_router,
        noise="gaussian",
        noise_std=2.0,
        importance_loss_coef=0.2,
        load_loss_coef=0.3,
        aux_loss_coef=0.5,
        z_loss_coef=0.7,
    )
    layout = layout_of(["t" * 50])
    x = torch.randn(1, 50, 8, dtype=torch.float64)
    logits = layer.gate(x)[0].detach()
    torch.manual_seed(3)
    noisy = logits + torch.randn_like(logits) * 2.0 / 4
    torch.manual_seed(3)
    _, stats = layer(x, layout)
    assert_conforms(dense_weights(stats.routing).detach(), dense_weights(token_choice(noisy, 2)))
    loss = 0.5 * load_balancing_loss(noisy, 2) + 0.2 * importance_loss(logits)
    loss = loss + 0.3 * load_loss(logits, noisy, 2, 0.5) + 0.7 * router_z_loss(logits)
    assert_conforms(stats.aux_loss.detach(), loss)

    _, stats = layer.eval()(x, layout)
    assert_conforms(dense_weights(stats.routing).detach(), dense_weights(token_choice(logits, 2)))
    loss = 0.5 * load_balancing_loss(logits, 2) + 0.2 * importance_loss(logits) + 0.7 * router_z_loss(logits)
    assert_conforms(stats.aux_loss.detach(), loss)


def test_gaussian_noise_reaches_images_too() -> None:
    layer, layout = layer_of(noise="gaussian", noise_std=20.0), layout_of(["0" * 40])
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    assert not layer(x, layout)[0].equal(layer(x, layout)[0])
    assert layer.eval()(x, layout)[0].equal(layer(x, layout)[0])


@pytest.mark.parametrize("noise", ["gumbel", "gaussian"])
def test_evaluation_is_never_random(noise: str) -> None:
    layer, layout = layer_of(**TOKEN_CHOICE, noise=noise).eval(), layout_of(["ttt0000tt"] * 3)
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    quiet = layer_of(**TOKEN_CHOICE)
    quiet.load_state_dict(layer.state_dict())
    state = torch.get_rng_state()
    assert layer(x, layout)[0].equal(quiet(x, layout)[0])
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"top_k": 5}, "top_k must be 1 to num_experts=4, got 5"),
        ({"top_k": 0}, "top_k must be 1 to num_experts=4, got 0"),
        ({"top_k": 2, "image_experts": 3}, "top_k must be 1 to the 1 experts for text, got 2"),
        (
            {"top_k": 2, "image_experts": 1, "image_router": "token_choice"},
            "top_k must be 1 to the 1 experts for image, got 2",
        ),
        ({"image_experts": 4}, "image_experts must leave experts for both modalities, 1 to 3, got 4"),
        ({"image_experts": 0}, "image_experts must leave .* got 0"),
        ({"capacity_factor": 0.0}, "capacity_factor must be above 0, got 0.0"),
        ({"capacity_factor": math.inf}, "capacity_factor must be above 0, got inf; expected a finite number"),
        (
            TOKEN_CHOICE | {"token_capacity_factor": math.nan},
            "token_capacity_factor must be above 0, got nan",
        ),
        ({"eval_token_capacity_factor": -1.0}, "eval_token_capacity_factor must be above 0, got -1.0"),
        ({"noise_std": 0.0}, "noise_std must be above 0"),
        ({"threshold_momentum": 1.0}, "threshold_momentum must be at least 0 and below 1, got 1.0"),
        ({"bias_rate": -0.1}, "bias_rate must be at least 0 and finite, got -0.1"),
        ({"load_loss_coef": math.nan}, "load_loss_coef must be at least 0 and finite, got nan"),
        ({"image_router": "soft"}, "image_router='soft' is unknown; expected \"expert_choice\" or "),
        ({"text_router": "expert_choice"}, "a token would depend on later ones"),
        ({"text_router": "hash"}, "text_router='hash' is unknown"),
        ({"drop": "last"}, "drop='last' is unknown"),
        ({"normalize": "before"}, "normalize='before' is unknown; expected \"after_drop\" or "),
        ({"noise": "uniform"}, 'noise=\'uniform\' is unknown; expected "gumbel" or "gaussian" or None'),
        ({"aux_loss_form": "switch"}, "aux_loss_form='switch' is unknown"),
        ({"noise": "gumbel", "top_k": 1}, "second of two choices: expected top_k=2"),
        ({"noise": "gumbel", "bias_rate": 0.1}, "bias_rate=0, got 2, 'position' and 0.1"),
        ({"noise": "gumbel", "drop": "priority"}, 'expected .* drop="position"'),
        ({"load_loss_coef": 0.1, "noise": "gumbel"}, "expected noise=\"gaussian\", got 'gumbel'"),
        (
            {"text_router": "threshold_choice", "bias_rate": 0.1},
            "bias_rate is of token choice, and no modality",
        ),
        (
            {"text_router": "threshold_choice", "token_capacity_factor": 1.5},
            "token_capacity_factor is of token choice",
        ),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterOptions(**{"num_experts": 4, **options})


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="'topk'"):
        MoE(8, 6, 4, topk=2)
