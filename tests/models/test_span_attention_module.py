"""The attention module: rotary positions, grouped heads and the cache."""

import pytest
import torch
from tolerance import assert_conforms

from pyvlm.layout import TokenLayout
from pyvlm.models.language import positions
from pyvlm.nn import SpanAttention
from pyvlm.nn.attention import KeyValueCache, rotary_tables, rotate


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
    got = positions(TokenLayout(kind, document=document))
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
