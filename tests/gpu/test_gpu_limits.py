"""What the ops take in memory on a GPU, and tensors of more than 2³¹ elements.

On the CPU the bodies run at small sizes, where torch's allocator cannot be asked and nothing is that long.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import Tensor

from benchmarks.harness.measure import peak_memory
from pyvlm.layout import TokenLayout
from pyvlm.ops import (
    Routing,
    add_at_image_tokens,
    expert_mlp,
    fuse_grids,
    gated_activation,
    linear_cross_entropy,
    local_cross_attention,
    merge_levels,
    pack_image_tokens,
    place_image_tokens,
    rms_norm,
    span_attention,
    token_choice,
)

pytestmark = pytest.mark.xdist_group("memory")  # gigabytes each: one after the other

MEGABYTE = 2**20
PAST_32_BITS = 2**31 + 2**20


def random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    """Made on the device, in bfloat16: gigabytes would take long elsewhere, and twice the memory in float."""
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=scale)


def assert_peak(device: torch.device, call: Callable[[], object], most: float) -> None:
    call()  # kernels are compiled, and libraries take their workspaces
    peak = peak_memory(call, device)
    if device.type == "cuda":  # on the CPU it is the process's, allocator and all
        assert peak is not None
        assert peak <= most, f"{peak / MEGABYTE:.1f} MiB at the peak, {most / MEGABYTE:.1f} are meant"


def multimodal(device: torch.device, tokens: int) -> TokenLayout:
    position = torch.arange(tokens, device=device)
    kind = torch.where(position % 1024 < 576, 2, 1).to(torch.uint8)[None]
    return TokenLayout(kind)


@pytest.mark.parametrize("rule", ["mmca", "bidirectional_image"])
def test_attention_keeps_neither_scores_nor_a_mask(rule: str, device: torch.device) -> None:
    tokens = 16_384 if device.type == "cuda" else 512
    spans = multimodal(device, tokens).spans(rule)
    q, k, v = (random(device, 1, 4, tokens, 64).requires_grad_() for _ in range(3))
    cotangent = torch.ones_like(q)
    streams = 2 if spans.separate else 1
    lse = 4 * 4 * tokens * streams
    with torch.no_grad():
        # Out, the share of the first of two softmaxes, and lse. The scores would be gigabytes.
        assert_peak(device, lambda: span_attention(q, k, v, spans), streams * q.nbytes + lse + 2 * MEGABYTE)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(span_attention(q, k, v, spans), (q, k, v), cotangent)

    assert_peak(device, train, (streams + 3) * q.nbytes + 3 * lse + 4 * MEGABYTE)


def test_the_loss_keeps_no_logits(device: torch.device) -> None:
    tokens, features, words = (4096, 1024, 131_072) if device.type == "cuda" else (64, 32, 500)
    hidden = random(device, tokens, features).requires_grad_()
    weight = random(device, words, features, scale=features**-0.5).requires_grad_()
    labels = torch.full((tokens,), -100, device=device)
    labels[::7] = 3

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))

    # Both gradients and a room for those of some logits. All logits in float32 would be 2 GiB.
    assert_peak(device, train, weight.nbytes + hidden.nbytes + 32 * MEGABYTE + 4 * MEGABYTE)


def test_merged_levels_are_never_normalised_in_memory(device: torch.device) -> None:
    levels, images, tokens, channels = (24, 4, 576, 1024) if device.type == "cuda" else (4, 2, 20, 32)
    maps = [random(device, images, tokens, channels).requires_grad_() for _ in range(levels)]
    alpha, weight = random(device, levels), random(device, channels, channels, scale=channels**-0.5)
    leaves = (*maps, alpha.requires_grad_(), weight.requires_grad_())
    cotangent = torch.ones_like(maps[0])
    with torch.no_grad():
        # The sum and the output; normalised levels would be 24 of them.
        assert_peak(device, lambda: merge_levels(maps, alpha, weight), 4 * maps[0].nbytes + 8 * MEGABYTE)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(merge_levels(maps, alpha, weight), leaves, cotangent)

    # The output, all gradients, and the sum and its gradient.
    gradients = levels * maps[0].nbytes + weight.nbytes
    assert_peak(device, train, gradients + 3 * maps[0].nbytes + 8 * MEGABYTE)


def test_experts_keep_rows_of_what_their_backward_reads(device: torch.device) -> None:
    tokens, hidden, intermediate = (8192, 1024, 1024) if device.type == "cuda" else (64, 32, 32)
    experts = 8
    x = random(device, tokens, hidden).requires_grad_()
    gate_up = random(device, experts, 2 * intermediate, hidden, scale=hidden**-0.5)
    down = random(device, experts, hidden, intermediate, scale=intermediate**-0.5)
    routing = token_choice(torch.randn(tokens, experts, device=device), 2)
    slot_row = 2 * tokens * x.element_size()  # bytes of one number a slot
    with torch.no_grad():
        # The activations and a row a slot, then y: no gathered copy of x.
        most = slot_row * (intermediate + hidden) + x.nbytes + 8 * MEGABYTE
        assert_peak(device, lambda: expert_mlp(x, routing, gate_up, down), most)
    leaves = (x, gate_up.requires_grad_(), down.requires_grad_())
    cotangent = torch.ones_like(x)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(expert_mlp(x, routing, gate_up, down), leaves, cotangent)

    # What comes before the activation, its gradient, and the activations again; y and x's gradient. Beside
    # these a row a slot of x's gradient, or the weights' gradients.
    held = slot_row * 5 * intermediate + 2 * x.nbytes
    beside = max(slot_row * hidden, gate_up.nbytes + down.nbytes)
    assert_peak(device, train, held + beside + 8 * MEGABYTE)


@pytest.mark.parametrize("op", [place_image_tokens, add_at_image_tokens], ids=["place", "add"])
def test_placement_keeps_one_text(op: Callable[..., Tensor], device: torch.device) -> None:
    length, width = (8192, 4096) if device.type == "cuda" else (64, 32)
    text, features = (random(device, *shape).requires_grad_() for shape in ((1, length, width), (20, width)))
    mask = torch.zeros(1, length, dtype=torch.bool, device=device)
    mask[0, 5:25] = True
    cotangent = torch.ones_like(text)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(text, features, mask), (text, features), cotangent)

    # The result, and the text's gradient; where the images are is a number a token.
    assert_peak(device, train, 2 * text.nbytes + features.nbytes + 4 * MEGABYTE)


def test_grids_are_never_concatenated(device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    images, side, widths, features = (16, 32, (1024, 1536, 256), 1024) if on_gpu else (2, 4, (24, 40, 8), 16)
    grids = ((side, side), (side, side), (side // 2, side // 2))
    maps = [
        random(device, images, rows * columns, width)
        for (rows, columns), width in zip(grids, widths, strict=True)
    ]
    weight = random(device, features, sum(widths), scale=sum(widths) ** -0.5)
    out = images * side**2 * features * 2
    # The last map is resized in float32, and again has its own dtype; cuBLAS may take a workspace.
    resized = 2 * maps[2].nbytes + images * side**2 * widths[2] * (4 + 2)
    with torch.no_grad():
        assert_peak(device, lambda: fuse_grids(maps, grids, grids[0], weight), out + resized + 36 * MEGABYTE)


def test_windows_are_never_rearranged(device: torch.device) -> None:
    grid, side, heads, dim = ((24, 24), 4, 16, 64) if device.type == "cuda" else ((2, 3), 2, 2, 16)
    queries = grid[0] * grid[1]

    def tokens(count: int) -> Tensor:
        return random(device, 4, count, heads, dim).transpose(1, 2).requires_grad_()

    query, key, value = tokens(queries), tokens(queries * side**2), tokens(queries * side**2)
    cotangent = torch.ones_like(query)

    def train() -> tuple[Tensor, ...]:
        out = local_cross_attention(query, [key], [value], grid)
        return torch.autograd.grad(out, (query, key, value), cotangent)

    # The output and every gradient.
    assert_peak(device, train, 2 * query.nbytes + key.nbytes + value.nbytes + 8 * MEGABYTE)


def test_norms_and_gates_keep_no_more_than_they_were_given(device: torch.device) -> None:
    tokens, channels = (8192, 4096) if device.type == "cuda" else (64, 32)
    x, gate, up = (random(device, tokens, channels).requires_grad_() for _ in range(3))
    weight, cotangent = random(device, channels).requires_grad_(), random(device, tokens, channels)

    def train_norm() -> tuple[Tensor, ...]:
        return torch.autograd.grad(rms_norm(x, weight), (x, weight), cotangent)

    def train_gate() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gated_activation(gate, up), (gate, up), cotangent)

    # What comes out, and the gradients; the norm's programs share up to 512 rows of float32.
    assert_peak(device, train_norm, 2 * x.nbytes + 4 * 512 * channels + 2 * MEGABYTE)
    assert_peak(device, train_gate, 3 * x.nbytes + 2 * MEGABYTE)


@pytest.fixture
def sizes(device: torch.device) -> Callable[..., int]:
    """The number of rows of some width that is more than 2³¹ elements; on the CPU a few."""

    def rows(width: int, few: int = 8) -> int:
        return -(-PAST_32_BITS // width) if device.type == "cuda" else few

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if free < 40e9:
            pytest.skip(f"{free / 1e9:.0f} GB of GPU memory are free; these tensors take up to 40")
    return rows


def test_queries_of_attention(device: torch.device, sizes: Callable[..., int]) -> None:
    tokens, head_dim = (65_536, 128) if device.type == "cuda" else (64, 16)
    heads = sizes(tokens * head_dim, 3)
    spans = multimodal(device, tokens).spans("causal", window=100)
    q = random(device, 1, heads, tokens, head_dim).requires_grad_()
    k, v = (random(device, 1, 1, tokens, head_dim) for _ in range(2))
    out = span_attention(q, k, v, spans)
    last = q.detach()[:, -1:].clone().requires_grad_()
    expected = span_attention(last, k, v, spans)
    assert out[:, -1:].equal(expected)
    cotangent = torch.ones_like(out)
    (grad,) = torch.autograd.grad(out, q, cotangent)
    (expected_grad,) = torch.autograd.grad(expected, last, cotangent[:, -1:])
    assert grad[:, -1:].equal(expected_grad)


def test_keys_of_attention(device: torch.device, sizes: Callable[..., int]) -> None:
    tokens, head_dim = (65_536, 128) if device.type == "cuda" else (64, 16)
    heads = sizes(tokens * head_dim, 3)
    spans = multimodal(device, tokens).spans("causal", window=100, query_start=tokens - 5)
    k = random(device, 1, heads, tokens, head_dim)
    q = random(device, 1, heads, 5, head_dim)
    out = span_attention(q, k, k, spans)
    # Of one head alone other parts of the keys would be added up: the policy has room for that.
    last = (q[:, -1:], k[:, -1:], k[:, -1:])
    plain = span_attention(*last, spans, backend="reference")
    exact = span_attention(*(x.double() for x in last), spans, backend="reference")
    assert_close(out[:, -1:], exact, plain)


def test_gradients_of_keys(device: torch.device, sizes: Callable[..., int]) -> None:
    """Of too many queries for the kernel that decodes."""
    tokens, head_dim, queries = (65_536, 128, 200) if device.type == "cuda" else (64, 16, 5)
    heads = sizes(tokens * head_dim, 3)
    spans = multimodal(device, tokens).spans("causal", window=300, query_start=tokens - queries)
    q, k = (random(device, 1, heads, count, head_dim).requires_grad_() for count in (queries, tokens))
    v = k.detach().requires_grad_()
    cotangent = torch.ones_like(q)

    def last_gradients(rows: slice) -> list[Tensor]:
        leaves = [x[:, rows].detach().requires_grad_() for x in (q, k, v)]
        out = span_attention(*leaves, spans)
        return [grad[:, -1] for grad in torch.autograd.grad(out, leaves, cotangent[:, rows])]

    everything, alone = last_gradients(slice(None)), last_gradients(slice(heads - 1, None))
    for actual, expected in zip(everything, alone, strict=True):
        assert actual.equal(expected)
        assert expected.count_nonzero() > 0


def test_text_and_image_rows(device: torch.device, sizes: Callable[..., int]) -> None:
    width = 4096 if device.type == "cuda" else 32
    length = sizes(width, 20)
    text, features = random(device, 1, length, width), random(device, 5, width)
    mask = torch.zeros(1, length, dtype=torch.bool, device=device)
    mask[0, -6:-1] = True
    placed = place_image_tokens(text, features, mask)
    assert placed[0, -6:-1].equal(features)
    assert placed[0, -1].equal(text[0, -1])
    assert placed[0, length // 2].equal(text[0, length // 2])
    del placed
    added = add_at_image_tokens(text, features, mask)
    assert added[0, -6:-1].equal(text[0, -6:-1] + features)
    del added
    leaves, cotangent = (text.requires_grad_(), features.requires_grad_()), random(device, 1, length, width)
    for op in (place_image_tokens, add_at_image_tokens):
        grad_text, grad_features = torch.autograd.grad(op(*leaves, mask), leaves, cotangent)
        assert grad_features.equal(cotangent[0, -6:-1])
        seen = cotangent[0, -6:] if op is add_at_image_tokens else cotangent[0, -6:] * ~mask[0, -6:, None]
        assert grad_text[0, -6:].equal(seen)
        assert grad_text[0, length // 2].equal(cotangent[0, length // 2])
        del grad_text
    text = text.detach()
    index = torch.tensor([length - 1, 0, length - 3], device=device)
    assert pack_image_tokens(text[0], index, None).equal(text[0][index])


def test_rows_of_norms_and_gates(device: torch.device, sizes: Callable[..., int]) -> None:
    channels = 4096 if device.type == "cuda" else 32
    rows = sizes(channels, 20)
    x = random(device, rows, channels).requires_grad_()
    weight, cotangent = random(device, channels), torch.ones((), device=device, dtype=x.dtype)
    last = x.detach()[-3:].clone().requires_grad_()

    def y_and_grad(leaf: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        y = run(leaf)
        (grad,) = torch.autograd.grad(y, leaf, cotangent.expand(y.shape))
        return y[-3:].detach().clone(), grad[-3:].clone()

    for run in (lambda x: rms_norm(x, weight), lambda x: gated_activation(x, None, "gelu_tanh")):
        for actual, expected in zip(y_and_grad(x, run), y_and_grad(last, run), strict=True):
            assert actual.equal(expected)


def test_levels(device: torch.device, sizes: Callable[..., int]) -> None:
    tokens, channels = (576, 1024) if device.type == "cuda" else (6, 16)
    images = sizes(tokens * channels, 3)
    maps = [random(device, images, tokens, channels) for _ in range(2)]
    alpha, weight = random(device, 2), random(device, 8, channels, scale=channels**-0.5)
    with torch.no_grad():
        out = merge_levels(maps, alpha, weight)
        expected = merge_levels([level[-1:].clone() for level in maps], alpha, weight)
    torch.testing.assert_close(out[-1:], expected)  # the product is of other shapes, cuBLAS's
    cotangent = random(device, images, tokens, 8)

    def gradients(rows: slice) -> list[Tensor]:
        leaves = [level[rows].detach().requires_grad_() for level in maps]
        grads = torch.autograd.grad(merge_levels(leaves, alpha, weight), leaves, cotangent[rows])
        return [grad[-1:].clone() for grad in grads]

    for actual, alone in zip(gradients(slice(None)), gradients(slice(images - 1, None)), strict=True):
        torch.testing.assert_close(actual, alone, rtol=2e-2, atol=2e-2)


def test_words(device: torch.device, sizes: Callable[..., int]) -> None:
    features = 4096 if device.type == "cuda" else 32
    words = sizes(features, 50)
    hidden = random(device, 64, features).requires_grad_()
    weight = random(device, words, features, scale=features**-0.5).requires_grad_()
    labels = torch.randint(words - 20, words, (64,), device=device)
    labels[::3] = -100
    loss = linear_cross_entropy(hidden, weight, labels)
    with torch.no_grad():
        expected = F.cross_entropy(F.linear(hidden, weight).float(), labels)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-2, atol=1e-2)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    assert grad_hidden.isfinite().all()
    word = int(labels[1])
    rows = (labels == word).nonzero()[:, 0]
    count = int((labels != -100).sum())
    with torch.no_grad():  # p − 1 times the rows of its own tokens, p times those of others
        probability = F.linear(hidden, weight).float().softmax(-1)[:, word]
        share = torch.where(labels == word, probability - 1, probability) * (labels != -100) / count
        expected_row = share @ hidden.float()
    assert len(rows) > 0
    torch.testing.assert_close(grad_weight[word].float(), expected_row, rtol=3e-2, atol=3e-3)


def test_rows_of_the_loss(device: torch.device, sizes: Callable[..., int]) -> None:
    features = 4096 if device.type == "cuda" else 32
    rows = sizes(features, 20)
    hidden, weight = random(device, rows, features), random(device, 60, features, scale=features**-0.5)
    labels = torch.full((rows,), -100, device=device)
    labels[-3:] = torch.tensor([3, 59, 7], device=device)

    def results(last: int) -> list[Tensor]:
        leaves = (hidden[-last:].detach().requires_grad_(), weight.detach().requires_grad_())
        loss = linear_cross_entropy(*leaves, labels[-last:])
        grad_hidden, grad_weight = torch.autograd.grad(loss, leaves)
        return [loss.detach(), grad_hidden[-4:].clone(), grad_weight]

    for actual, expected in zip(results(rows), results(5), strict=True):
        torch.testing.assert_close(actual, expected)
        assert expected.count_nonzero() > 0


# So few that all experts and one alone have the tiles of few rows, and so many that both have those of many.
@pytest.mark.parametrize("tokens", [16, 5000])
def test_weights_of_experts(tokens: int, device: torch.device, sizes: Callable[..., int]) -> None:
    hidden, intermediate = (2048, 2048) if device.type == "cuda" else (32, 24)
    experts = sizes(2 * intermediate * hidden, 3)
    gate_up = random(device, experts, 2 * intermediate, hidden, scale=hidden**-0.5)
    down = random(device, experts, hidden, intermediate, scale=intermediate**-0.5)
    x = random(device, tokens, hidden).requires_grad_()
    logits = torch.full((tokens, experts), -9.0, device=device)
    logits[:, -1] = 9.0

    def results(*weights: Tensor, logits: Tensor) -> list[Tensor]:
        """y and the gradients of x and of the last expert's weights."""
        routing: Routing = token_choice(logits, 1)
        leaves = [x, *(weight.requires_grad_() for weight in weights)]
        y = expert_mlp(x, routing, *leaves[1:])
        grad_x, *grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        return [y.detach(), grad_x, *(grad[-1].clone() for grad in grads)]

    everything = results(gate_up, down, logits=logits)
    last = (gate_up.detach()[-1:].clone(), down.detach()[-1:].clone())
    alone = results(*last, logits=logits[:, -1:].clone())
    for actual, expected in zip(everything, alone, strict=True):
        torch.testing.assert_close(actual, expected)


def test_rows_of_experts(device: torch.device, sizes: Callable[..., int]) -> None:
    hidden, few = (4096, 5000) if device.type == "cuda" else (32, 100)  # which have the tiles of many rows
    rows = sizes(hidden, 200)
    x, cotangent = (random(device, rows, hidden) for _ in range(2))
    gate_up = random(device, 2, 32, hidden, scale=hidden**-0.5)
    down = random(device, 2, hidden, 16, scale=0.25)

    def results(last: int) -> list[Tensor]:
        leaf = x[-last:].detach().requires_grad_()
        routing = token_choice(torch.tensor([0.0, 1.0], device=device).expand(last, 2).contiguous(), 1)
        y = expert_mlp(leaf, routing, gate_up, down)
        (grad,) = torch.autograd.grad(y, leaf, cotangent[-last:])
        return [y[-3:].detach().clone(), grad[-3:].clone()]

    for actual, expected in zip(results(rows), results(few), strict=True):
        torch.testing.assert_close(actual, expected)


def test_maps_of_windows(device: torch.device, sizes: Callable[..., int]) -> None:
    grid, side, heads, dim = ((24, 24), 4, 16, 64) if device.type == "cuda" else ((2, 3), 2, 2, 16)
    queries = grid[0] * grid[1]
    images = sizes(queries * side**2 * heads * dim, 3)

    def tokens(count: int) -> Tensor:
        return random(device, images, count, heads, dim).transpose(1, 2)

    query, key, value = tokens(queries), tokens(queries * side**2), tokens(queries * side**2)
    cotangent = tokens(queries)

    def results(rows: slice) -> list[Tensor]:
        leaves = [x[rows].detach().requires_grad_() for x in (query, key, value)]
        out = local_cross_attention(leaves[0], leaves[1:2], leaves[2:], grid)
        grads = torch.autograd.grad(out, leaves, cotangent[rows])
        return [x[-1:].detach().clone() for x in (out, *grads)]

    for actual, expected in zip(results(slice(None)), results(slice(images - 1, None)), strict=True):
        assert actual.equal(expected)
