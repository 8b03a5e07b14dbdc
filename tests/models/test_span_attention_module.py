"""The attention module: rotary positions, grouped heads and the cache."""

from itertools import pairwise

import pytest
import torch
from tolerance import assert_conforms

from pyvlm.layout import RULES, TokenLayout
from pyvlm.models.language import slice_layout
from pyvlm.models.positions import position_ids
from pyvlm.nn import KeyValueCache, SpanAttention, rotary_tables
from pyvlm.nn.attention import rotate


def test_it_is_plain_attention_where_the_rule_is_causal() -> None:
    module = SpanAttention(12, num_heads=4, num_kv_heads=2, head_dim=6, bias=True).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    spans = TokenLayout(torch.ones(2, 7, dtype=torch.uint8)).spans("causal")
    rotary = rotary_tables(torch.arange(7).expand(2, -1), 6, 10000.0)
    q, k, v = module.qkv_proj(x).split([24, 12, 12], dim=-1)
    q, k, v = (t.unflatten(-1, (-1, 6)) for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (rotate(q, rotary), rotate(k, rotary), v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = module.o_proj(out.transpose(1, 2).flatten(2))
    assert_conforms(module(x, spans, rotary), expected)


def test_softcap_bounds_the_scores() -> None:
    module = SpanAttention(8, num_heads=2, softcap=0.5).double()
    x = 9 * torch.randn(1, 5, 8, dtype=torch.float64)
    spans = TokenLayout(torch.ones(1, 5, dtype=torch.uint8)).spans("bidirectional")
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in module.qkv_proj(x).chunk(3, dim=-1))
    weights = (0.5 * torch.tanh(q @ k.mT / 2 / 0.5)).softmax(-1)
    assert_conforms(module(x, spans), module.o_proj((weights @ v).transpose(1, 2).flatten(2)))


def test_scale_and_sinks_are_handed_on() -> None:
    module = SpanAttention(8, num_heads=2, scale=0.3, sinks=True).double()
    assert module.sinks.tolist() == [0, 0]
    with torch.no_grad():
        module.sinks += torch.tensor([-1.0, 2.0])
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    spans = TokenLayout(torch.ones(1, 5, dtype=torch.uint8)).spans("bidirectional")
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in module.qkv_proj(x).chunk(3, dim=-1))
    scores = (0.3 * q @ k.mT).exp()
    weights = scores / (scores.sum(-1, keepdim=True) + module.sinks.exp()[:, None, None])
    assert_conforms(module(x, spans), module.o_proj((weights @ v).transpose(1, 2).flatten(2)))


def test_no_sinks_are_learned_unless_asked_for() -> None:
    assert [name for name, _ in SpanAttention(8, num_heads=2).named_parameters()] == [
        "qkv_proj.weight",
        "o_proj.weight",
    ]


@pytest.mark.parametrize("rule", ["mmca_image", "bidirectional_image"])
def test_gradients_reach_the_input_and_every_parameter(rule: str) -> None:
    module = SpanAttention(6, 2, 1, head_dim=4, bias=True, softcap=3.0, sinks=True).double()
    kind = torch.tensor([[0, 1, 2, 2, 1], [1, 2, 2, 1, 0]], dtype=torch.uint8)
    layout = TokenLayout(kind)
    rotary = rotary_tables(position_ids(layout), 4, 100.0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def out(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        arguments = (x, layout.spans(rule), rotary)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), arguments)

    parameters = tuple(module.parameters())
    assert torch.autograd.gradcheck(out, (x, *parameters))
    out(x, *parameters).square().sum().backward()
    for name, leaf in zip(["x", *names], [x, *parameters], strict=True):
        assert leaf.grad.any(), name


# Padding before, after and amid; images that the second cut goes through.
CACHED = [[0, 0, 0, 1, 1, 2, 2, 2, 1, 2, 2, 1, 1], [1, 2, 2, 2, 2, 2, 2, 1, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "bidirectional"])
@pytest.mark.parametrize("cuts", [[4, 6], list(range(1, 13))], ids=["chunks", "one by one"])
def test_the_cache_gives_the_rows_of_one_pass(cuts: list[int], rule: str) -> None:
    kind = torch.tensor(CACHED, dtype=torch.uint8)
    prefix = torch.arange(13) < 4
    layout = TokenLayout(kind, prefix=prefix.expand(2, -1))
    module = SpanAttention(12, 4, 2, head_dim=6, sinks=True).double()
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    cos_and_sin = rotary_tables(position_ids(layout), 6, 100.0)
    cache = KeyValueCache(13)
    whole, rows = [], []
    with torch.no_grad():
        for start, stop in pairwise([0, *cuts, 13]):
            # What is not in the cache yet cannot be seen: an image or prefix that goes on ends here for now.
            so_far = slice_layout(layout, 0, stop)
            rotary = tuple(table[:, start:stop] for table in cos_and_sin)
            spans = so_far.spans(rule, window=9, query_start=start)
            rows.append(module(x[:, start:stop], spans, rotary, cache))
            everything = tuple(table[:, :stop] for table in cos_and_sin)
            one_pass = module(x[:, :stop], so_far.spans(rule, window=9), everything)
            whole.append(one_pass[:, start:])
    assert cache.length == 13
    assert_conforms(torch.cat(rows, 1), torch.cat(whole, 1))
    if rule in ("causal", "mmca", "mmca_released"):  # no row changes when later tokens come
        with torch.no_grad():
            assert_conforms(torch.cat(rows, 1), module(x, layout.spans(rule, window=9), cos_and_sin))


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        at = [rotary_tables(torch.tensor([[position]]).double(), 8, 100.0) for position in (i, j)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    assert_conforms(score(5, 3), score(105, 103))
    assert_conforms(score(0, 0), (q * k).sum())
    assert not torch.isclose(score(5, 3), score(5, 4))


def test_rotary_is_that_of_the_paper() -> None:
    """Pair p turns by position · θ^(−2p/D)."""
    x = torch.zeros(1, 1, 1, 6)
    x[..., 1] = 1  # first half of pair 1
    turned = rotate(x, rotary_tables(torch.tensor([[3]]), 6, 100.0))[0, 0, 0]
    angle = torch.tensor(3 * 100.0 ** (-2 / 6))
    expected = torch.zeros(6)
    expected[1], expected[4] = angle.cos(), angle.sin()
    assert_conforms(turned, expected)


def test_positions_skip_padding_and_restart_with_documents() -> None:
    kind = torch.tensor([[0, 0, 1, 2, 2, 1, 1, 1], [1, 1, 1, 1, 2, 1, 0, 0]], dtype=torch.uint8)
    document = torch.tensor([[0] * 8, [0, 0, 1, 1, 1, 2, 2, 2]], dtype=torch.int32)
    got = position_ids(TokenLayout(kind, document=document))
    assert got[0, 2:].tolist() == [0, 1, 2, 3, 4, 5]
    assert got[1, :6].tolist() == [0, 1, 0, 1, 2, 0]


def test_cache_appends_in_place_and_refuses_what_does_not_fit() -> None:
    cache = KeyValueCache(5)
    k, v = torch.randn(2, 1, 2, 5, 3)
    first = cache.append(k[:, :, :3], v[:, :, :3])
    keys, values = cache.append(k[:, :, 3:], v[:, :, 3:])
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    assert keys.data_ptr() == first[0].data_ptr()
    with pytest.raises(ValueError, match="holds 5 tokens a row, of which 5 are taken: 1 more do not fit"):
        cache.append(k[:, :, :1], v[:, :, :1])


def test_wrong_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=4 is no multiple of num_kv_heads=3"):
        SpanAttention(12, num_heads=4, num_kv_heads=3)
