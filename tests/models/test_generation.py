"""Token by token with a cache is the same as computing everything again."""

import pytest
import torch
from tiny_vlm import IMAGE_ID, VOCAB, batch, pictures, tiny_vlm, tokens
from tolerance import assert_conforms
from torch import Tensor

from pyvlm.layout import RULES, TokenLayout
from pyvlm.models import VLM
from pyvlm.models.generation import outlasts_its_prompt
from pyvlm.models.inputs import default_layout
from pyvlm.models.language import slice_layout

CAUSAL_RULES = [rule for rule in RULES if rule != "bidirectional"]
NEW = 5


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded rows with two images, one image at the very end, and none."""
    input_ids, real = batch(tokens(2, "image", 3, "image", 2), tokens(1, "image"), tokens(3))
    return input_ids, pictures(3), real


def with_answer(model: VLM, input_ids: Tensor, real: Tensor, answer: Tensor) -> tuple[Tensor, TokenLayout]:
    """Prompts and answers as one sequence; the answers are text, and not of the prefix."""
    whole = torch.cat([input_ids, answer], dim=1)
    mask = torch.cat([real, torch.ones_like(answer)], dim=1)
    layout = default_layout(model.config, whole, mask)
    if layout.prefix is not None:
        layout.prefix[:, input_ids.shape[1] :] = False
    return whole, layout


def generate_without_cache(model: VLM, input_ids: Tensor, images: Tensor, real: Tensor) -> Tensor:
    answer = input_ids[:, :0]
    for _ in range(NEW):
        whole, layout = with_answer(model, input_ids, real, answer)
        logits = model(whole, images, layout=layout).logits[:, -1]
        logits[:, IMAGE_ID] = -torch.inf
        answer = torch.cat([answer, logits.argmax(-1, keepdim=True)], dim=1)
    return answer


@pytest.mark.parametrize("rule", CAUSAL_RULES)
def test_generate_equals_full_recomputation(rule: str) -> None:
    model = tiny_vlm(attention_rule=rule, window=6, window_layers=[0, 2])
    input_ids, images, real = prompts()
    expected = generate_without_cache(model, input_ids, images, real)
    assert torch.equal(model.generate(input_ids, images, real, max_new_tokens=NEW), expected)
    assert len(expected.unique()) > 3  # not one word over and over, which would prove little


@pytest.mark.parametrize("rule", CAUSAL_RULES)
def test_cached_logits_equal_the_full_pass(rule: str) -> None:
    model = tiny_vlm(attention_rule=rule)
    input_ids, images, real = prompts()
    whole, layout = with_answer(model, input_ids, real, torch.randint(3, VOCAB, (3, NEW)))
    full = model(whole, images, layout=layout).logits
    start, pieces, cache = 0, [], model.new_cache(whole.shape[1])
    for stop in range(input_ids.shape[1], whole.shape[1] + 1):
        so_far = slice_layout(layout, 0, stop)
        pieces.append(
            model(whole[:, start:stop], None if start else images, layout=so_far, cache=cache).logits
        )
        start = stop
    seen = layout.kind > 0
    assert_conforms(torch.cat(pieces, dim=1)[seen], full[seen])


def test_a_dialogue_goes_on_with_new_images_in_the_cache() -> None:
    model = tiny_vlm()
    turns = [torch.tensor([tokens(2, "image", 3)]), torch.tensor([tokens(1, "image", "image", 2)])]
    images = pictures(3)
    layout = default_layout(model.config, torch.cat(turns, dim=1))
    full = model(torch.cat(turns, dim=1), images, layout=layout).logits
    cache = model.new_cache(layout.length)
    first = model(turns[0], images[:1], layout=slice_layout(layout, 0, 9), cache=cache).logits
    second = model(turns[1], images[1:], layout=layout, cache=cache).logits
    assert_conforms(torch.cat([first, second], dim=1), full)


def test_rows_stop_at_the_end_token_each_for_itself() -> None:
    model = tiny_vlm(tie_embeddings=False)  # tied, it says one word over and over
    input_ids, images, real = prompts()
    free = model.generate(input_ids, images, real, max_new_tokens=NEW)
    end = free[0, 1].item()
    expected = free.clone()
    for row in expected:
        for first in (row == end).nonzero()[:1]:
            row[first:] = end
    assert free[0, 0] != end
    assert (expected[-1] != end).all()  # this row never ends
    assert not torch.equal(expected, free)  # and others would go on with other words
    stopped = model.generate(input_ids, images, real, max_new_tokens=NEW, eos_token_id=end)
    assert torch.equal(stopped, expected)
    alone = model.generate(input_ids[:1], images[:2], real[:1], max_new_tokens=NEW, eos_token_id=end)
    assert torch.equal(alone, expected[:1, :2])


def test_sampling_follows_the_generator_and_the_distribution() -> None:
    model = tiny_vlm()
    input_ids = torch.tensor([tokens(4)]).expand(4000, -1)

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(input_ids, max_new_tokens=1, temperature=2.0, generator=generator)

    drawn = sample(1)
    assert torch.equal(drawn, sample(1))
    assert not torch.equal(drawn, sample(2))
    logits = model(input_ids[:1]).logits[0, -1]
    logits[IMAGE_ID] = -torch.inf
    probability = (logits / 2.0).softmax(-1)
    frequency = drawn.flatten().bincount(minlength=VOCAB) / len(drawn)
    deviation = (probability * (1 - probability) / len(drawn)).sqrt()
    assert ((frequency - probability).abs() <= 4 * deviation).all()
    assert frequency[IMAGE_ID] == 0


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_top_p_draws_among_the_likeliest_that_reach_it(top_p: float) -> None:
    model = tiny_vlm()
    input_ids = torch.tensor([tokens(4)]).expand(1000, -1)
    logits = model(input_ids[:1]).logits[0, -1]
    logits[IMAGE_ID] = -torch.inf
    probability = (logits / 4.0).softmax(-1).detach()
    kept, reached = set(), 0.0
    for token in probability.argsort(descending=True).tolist():
        if reached >= top_p or probability[token] == 0:
            break
        kept.add(token)
        reached += probability[token].item()
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(
        input_ids, max_new_tokens=1, temperature=4.0, top_p=top_p, generator=generator
    ).flatten()
    frequency = drawn.bincount(minlength=VOCAB) / len(drawn)
    expected = torch.tensor([probability[i] / reached if i in kept else 0.0 for i in range(VOCAB)])
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((frequency - expected).abs() <= 4 * deviation).all()
    assert (frequency > 0).sum() > 1


def test_the_likeliest_token_is_left_however_small_top_p() -> None:
    model = tiny_vlm()
    input_ids = torch.tensor([tokens(4)]).expand(50, -1)
    drawn = model.generate(input_ids, max_new_tokens=1, temperature=4.0, top_p=1e-9)
    assert torch.equal(drawn, model.generate(input_ids, max_new_tokens=1))


def test_any_of_several_tokens_ends_a_row() -> None:
    model = tiny_vlm(tie_embeddings=False)
    input_ids, images, real = prompts()
    free = model.generate(input_ids, images, real, max_new_tokens=NEW)

    def length(row: list[int], *ends: int) -> int:
        return min([row.index(end) + 1 for end in ends if end in row], default=NEW)

    # Two of which each ends a row that the other does not.
    rows, words = free.tolist(), free.unique().tolist()
    first, second = next(
        (a, b)
        for a in words
        for b in words
        if any(length(row, a) < length(row, b) for row in rows)
        and any(length(row, b) < length(row, a) for row in rows)
    )
    stopped = model.generate(input_ids, images, real, max_new_tokens=NEW, eos_token_id=[first, second])
    lengths = [length(row, first, second) for row in rows]
    assert stopped.tolist() == [
        (row[:end] + [first] * NEW)[: max(lengths)] for row, end in zip(rows, lengths, strict=True)
    ]
    assert torch.equal(
        model.generate(input_ids, images, real, max_new_tokens=NEW, eos_token_id=[]), free
    )  # none: rows run on


def test_callback_can_stop_all_rows() -> None:
    model = tiny_vlm()
    input_ids, images, real = prompts()
    free = model.generate(input_ids, images, real, max_new_tokens=NEW)
    seen: list[Tensor] = []

    def two(token_B: Tensor) -> bool:
        seen.append(token_B)
        return len(seen) == 2

    stopped = model.generate(input_ids, images, real, max_new_tokens=NEW, callback=two)
    assert torch.equal(stopped, free[:, :2])


@pytest.mark.parametrize("rule", CAUSAL_RULES)
def test_a_longer_prompt_goes_on_from_the_cache_of_a_shorter_one(rule: str) -> None:
    model = tiny_vlm(attention_rule=rule)
    images = pictures(2)
    first = torch.tensor([tokens(2, "image", 3)])
    cache = model.new_cache(first.shape[1] + NEW)
    said = model.generate(first, images[:1], max_new_tokens=NEW, cache=cache)
    assert cache[0].length == first.shape[1] + NEW - 1
    longer = torch.cat([first, said, torch.tensor([tokens(1, "image", 2)])], dim=1)
    reused = [layer.first(cache[0].length, longer.shape[1] + NEW) for layer in cache]
    again = model.generate(longer, images[1:], max_new_tokens=NEW, cache=reused)
    fresh = model.generate(longer, images, max_new_tokens=NEW)
    if outlasts_its_prompt(model.config):
        assert torch.equal(again, fresh)
        assert len(fresh.unique()) > 2
    else:
        assert rule in ("prefix", "all_images")


def test_a_capacity_for_tokens_binds_them_to_their_prompt() -> None:
    moe = {"layers": [1], "num_experts": 3, "intermediate_size": 8}
    assert outlasts_its_prompt(tiny_vlm(moe=moe).config)
    assert not outlasts_its_prompt(tiny_vlm(moe=moe | {"eval_token_capacity_factor": 2.0}).config)


def test_a_copied_cache_is_one_of_its_own() -> None:
    model = tiny_vlm()
    prompt = torch.tensor([tokens(6)])
    cache = model.new_cache(6)
    model(prompt, cache=cache)
    part = [layer.first(4, 9) for layer in cache]
    assert [(layer.length, layer.max_length) for layer in part] == [(4, 9)] * 3
    other = torch.cat([prompt[:, :4], torch.tensor([tokens(3)])], dim=1)
    fresh = model.generate(other, max_new_tokens=2)
    assert torch.equal(model.generate(other, max_new_tokens=2, cache=part), fresh)
    # The original is as it was: what was written behind the copy's four tokens is not in it.
    same = [layer.first(5, 8) for layer in cache]
    assert torch.equal(
        model.generate(prompt, max_new_tokens=2, cache=same), model.generate(prompt, max_new_tokens=2)
    )
    with pytest.raises(ValueError, match="holds 6 tokens a row: no copy of 7"):
        cache[0].first(7, 9)
    with pytest.raises(ValueError, match="room for 3"):
        cache[0].first(4, 3)
    with pytest.raises(ValueError, match="at least one must be new"):
        model.generate(prompt, max_new_tokens=1, cache=[layer.first(6, 9) for layer in cache])


def test_callback_streams_what_is_returned_and_modes_are_kept() -> None:
    model = tiny_vlm().train()
    input_ids, images, real = prompts()
    streamed: list[Tensor] = []
    result = model.generate(input_ids, images, real, max_new_tokens=3, callback=streamed.append)
    assert torch.equal(torch.stack(streamed, dim=1), result)
    assert model.training

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(input_ids, images, real, max_new_tokens=3, callback=interrupt)
    assert model.training


def test_bad_requests_are_refused() -> None:
    model = tiny_vlm()
    input_ids, images, real = prompts()
    right_ids, right_real = batch(tokens(2), tokens(4), side="right")
    cases = [
        ("max_new_tokens must be at least 1, got 0", (input_ids, images, real), {"max_new_tokens": 0}),
        ("temperature .* got -1", (input_ids, images, real), {"max_new_tokens": 1, "temperature": -1.0}),
        (
            "temperature .* got nan",
            (input_ids, images, real),
            {"max_new_tokens": 1, "temperature": float("nan")},
        ),
        ("top_p .* got 0", (input_ids, images, real), {"max_new_tokens": 1, "top_p": 0.0}),
        ("top_p .* got nan", (input_ids, images, real), {"max_new_tokens": 1, "top_p": float("nan")}),
        ("pad on the left", (right_ids, None, right_real), {"max_new_tokens": 1}),
        ("pad on the left", (input_ids[:, :0],), {"max_new_tokens": 1}),
        ("but 2 images were given", (input_ids, images[:2], real), {"max_new_tokens": 1}),
    ]
    for message, arguments, options in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(*arguments, **options)


def test_misuse_of_the_cache_is_refused() -> None:
    model = tiny_vlm()
    input_ids, images, real = prompts()
    layout = default_layout(model.config, input_ids, real)
    with pytest.raises(ValueError, match="labels need a full pass"):
        model(input_ids, images, real, labels=input_ids, cache=model.new_cache(20))
    with pytest.raises(ValueError, match="holds 10 tokens a row, of which 0 are taken: 15 more do not fit"):
        model(input_ids, images, real, cache=model.new_cache(10))
    with pytest.raises(ValueError, match="no attention_mask"):
        model(input_ids, images, real, layout=layout)
    with pytest.raises(
        ValueError, match=r"layout is of \[3, 14\] tokens, .* 0 cached ones a row and .* \[3, 15\]"
    ):
        model(input_ids, images, layout=slice_layout(layout, 1, 15))
    cache = model.new_cache(20)
    model(input_ids, images, real, cache=cache)
    with pytest.raises(ValueError, match="with tokens in the cache a layout is needed"):
        model(torch.tensor([[5], [6], [7]]), cache=cache)
