"""The loss of transformers' models from hidden states: equal to theirs, and without logits in memory."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_checks import assert_same_gradient, assert_same_step, is_read, step
from tiny_causal_models import MODELS, WORDS, batch, build
from tolerance import assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, ChameleonConfig, GPT2Config
from transformers.loss.loss_utils import ForCausalLMLoss

from pyvlm.integrations.transformers.lazy_logits import LazyLogits
from pyvlm.integrations.transformers.loss import apply

KERNEL = "pyvlm.ops.linear_cross_entropy"


class LargestTensor(TorchDispatchMode):
    """Counts the values of the largest tensor with V columns that any op makes."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is Tensor and x.dim() and x.shape[-1] == self.columns:
                self.rows = max(self.rows, x.numel() // self.columns)
        return out


def inputs_of(name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> dict[str, Tensor]:
    inputs = batch(name, **kwargs)
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    plain, ours = build(name), build(name)
    keys, identity = list(ours.state_dict()), {n: id(p) for n, p in ours.named_parameters()}
    (change,) = apply(ours)
    assert (change.module, change.part, change.kernel) == ("lm_head", "loss", KERNEL)
    assert list(ours.state_dict()) == keys
    assert {n: id(p) for n, p in ours.named_parameters()} == identity
    assert_same_step(plain, ours, inputs_of(name))


@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_of_tokens_by_words_is_made(name: str) -> None:
    inputs = inputs_of(name, tokens=40)
    rows = inputs["labels"].numel()
    with LargestTensor(WORDS) as plain:
        build(name)(**inputs).loss.backward()
    assert plain.rows >= rows
    ours = build(name)
    apply(ours)
    with LargestTensor(WORDS) as seen:
        outputs = ours(**inputs)
        outputs.loss.backward()
    assert not is_read(outputs.logits)
    assert seen.rows < rows


@pytest.mark.parametrize("name", ["llama, tied", "gemma2, softcap", "granite, divided", "llava"])
def test_bfloat16_is_as_close_as_transformers(name: str) -> None:
    exact = build(name).double()
    plain, ours = build(name, torch.bfloat16), build(name, torch.bfloat16)
    exact.load_state_dict(plain.state_dict())
    apply(ours)
    loss, grads, _ = step(ours, inputs_of(name, torch.bfloat16))
    plain_loss, plain_grads, _ = step(plain, inputs_of(name, torch.bfloat16))
    # the images as bfloat16 holds them
    exact_inputs = {
        k: x.double() if x.is_floating_point() else x for k, x in inputs_of(name, torch.bfloat16).items()
    }
    exact_loss, exact_grads, _ = step(exact, exact_inputs)
    assert abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 2e-3
    for key in ("lm_head.weight", "model.norm.weight", "model.language_model.norm.weight"):
        if key in grads:
            assert_close(grads[key], exact_grads[key], plain_grads[key], key)


def test_bfloat16_autocast_keeps_logits_lazy_in_bfloat16() -> None:
    plain, ours = build("llama"), build("llama")
    apply(ours)
    results = []
    for model in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**batch("llama"))
        outputs.loss.backward()
        results.append((outputs, model.lm_head.weight.grad, model.model.embed_tokens.weight.grad))
    (theirs, *their_grads), (mine, *my_grads) = results
    assert mine.logits.dtype == theirs.logits.dtype == torch.bfloat16
    assert not is_read(mine.logits.float())  # accelerate's convert_outputs_to_fp32
    assert torch.equal(mine.logits.float().clone(), theirs.logits.float())
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-3, atol=0)
    for grad, other in zip(my_grads, their_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=0.02 * other.abs().max().item())


OPTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "items of the batch": lambda b: {**b, "num_items_in_batch": torch.tensor(7)},
    "items as int": lambda b: {**b, "num_items_in_batch": 7},
    "another ignore_index": lambda b: {**b, "labels": b["labels"].clamp(min=-1), "ignore_index": -1},
    "labels shifted already": lambda b: {**b, "shift_labels": b["labels"].roll(-1, 1)},
    "last logits only": lambda b: {**b, "labels": b["labels"][:, -6:], "logits_to_keep": 6},
    "all rows labelled": lambda b: {**b, "labels": b["input_ids"]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_loss(option: str) -> None:
    plain, ours = build("llama"), build("llama")
    apply(ours)
    inputs = OPTIONS[option](batch("llama"))
    assert not is_read(ours(**inputs).logits)
    assert_same_step(plain, ours, inputs)


def test_no_labelled_row_is_nan_and_no_gradient_as_there() -> None:
    plain, ours = build("llama"), build("llama")
    apply(ours)
    inputs = batch("llama", labelled=0)
    assert_same_step(plain, ours, inputs)
    assert ours(**inputs).loss.isnan()
    assert_same_step(plain, ours, {**inputs, "num_items_in_batch": torch.tensor(3)})


def test_head_bias_gets_its_gradient() -> None:
    plain, ours = build("llama"), build("llama")
    for model in (plain, ours):
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, WORDS))
    apply(ours)
    assert not is_read(ours(**batch("llama")).logits)
    assert_same_step(plain, ours, batch("llama"))
    assert ours.lm_head.bias.grad is not None


def test_auxiliary_loss_stays() -> None:
    ours = build("mixtral, auxiliary loss")
    apply(ours)
    outputs = ours(**batch("mixtral, auxiliary loss"))
    (ours_alone,) = torch.autograd.grad(outputs.loss, outputs.router_logits[0], retain_graph=True)
    assert outputs.aux_loss > 0
    assert ours_alone.abs().max() > 0
    cross_entropy = ForCausalLMLoss(outputs.logits, batch("mixtral, auxiliary loss")["labels"], WORDS)
    torch.testing.assert_close(outputs.loss, cross_entropy + 0.5 * outputs.aux_loss)


def test_a_loss_on_the_logits_adds_its_gradients() -> None:
    plain, ours = build("llama, tied"), build("llama, tied")
    apply(ours)
    results = []
    for model in (plain, ours):
        outputs = model(**batch("llama, tied"))
        (outputs.loss + 0.1 * outputs.logits.softmax(-1).square().sum()).backward()
        results.append(model.lm_head.weight.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_labels_by_position_and_tuples() -> None:
    plain, ours = build("llama"), build("llama")
    apply(ours)
    b = batch("llama")
    positional = (b["input_ids"], b["attention_mask"], None, None, None, b["labels"])
    loss, logits = ours(*positional, return_dict=False)[:2]
    assert isinstance(logits, LazyLogits)
    torch.testing.assert_close(loss, plain(*positional).loss)


def test_without_labels_logits_are_plain() -> None:
    plain, ours = build("llama").eval(), build("llama").eval()
    apply(ours)
    b = batch("llama")
    logits = ours(b["input_ids"]).logits
    assert type(logits) is Tensor
    assert torch.equal(logits, plain(b["input_ids"]).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(b["input_ids"], **options), plain.generate(b["input_ids"], **options))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_last_token_of_a_row_comes_to_the_head_as_its_own(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a view of it torch copies the weight, though for one row the view counts as contiguous."""
    model = build("llama")
    apply(model)
    met, plain = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: met.append(x.stride()) or plain(x, *rest))
    hidden = torch.randn(rows, 7, 32)[:, -1:]
    expected = plain(hidden, model.lm_head.weight)
    assert torch.equal(model.lm_head(hidden), expected)
    assert met == [(32, 32, 1)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_with_labels(mode: Callable[[], Any]) -> None:
    plain, ours = build("llama").eval(), build("llama").eval()
    apply(ours)
    with mode():
        mine, theirs = ours(**batch("llama")), plain(**batch("llama"))
        assert not is_read(mine.logits)
        torch.testing.assert_close(mine.loss, theirs.loss)
        assert not mine.logits.requires_grad
        assert torch.equal(mine.logits.argmax(-1), theirs.logits.argmax(-1))


def test_an_error_in_the_forward_leaves_the_head_plain() -> None:
    ours = build("llama")
    apply(ours)
    with pytest.raises(IndexError):
        ours(input_ids=torch.tensor([[WORDS]]), labels=torch.tensor([[1]]))
    assert type(ours(batch("llama")["input_ids"]).logits) is Tensor


def test_undo_restores_exactly() -> None:
    ours = build("llava")
    before = vars(ours).copy(), vars(ours.lm_head).copy(), type(ours.lm_head)
    hooks = len(ours._forward_hooks), len(ours._forward_pre_hooks)
    (change,) = apply(ours)
    ours(**batch("llava"))
    assert apply(ours)[0].reason == "it is served already"
    change.undo()
    assert type(ours.lm_head) is before[2] is nn.Linear
    assert vars(ours).keys() == before[0].keys()
    assert vars(ours.lm_head).keys() == before[1].keys()
    assert (len(ours._forward_hooks), len(ours._forward_pre_hooks)) == hooks == (0, 0)
    assert not ours._forward_hooks_always_called
    assert ours.loss_function is ForCausalLMLoss
    assert type(ours(**batch("llava")).logits) is Tensor


def test_undo_puts_back_a_loss_that_was_set_and_leaves_one_set_since() -> None:
    ours = build("llama")
    ours.loss_function = ForCausalLMLoss
    (change,) = apply(ours)
    change.undo()
    assert vars(ours)["_loss_function"] is ForCausalLMLoss
    (change,) = apply(ours)
    ours.loss_function = other = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    outputs = ours(**batch("llama"))
    torch.testing.assert_close(outputs.loss, outputs.logits.sum())
    change.undo()
    assert ours.loss_function is other


def test_copies_and_pickles_of_a_model_are_served_too() -> None:
    ours = build("llama")
    apply(ours)
    ours(**batch("llama"))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for model in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert not is_read(model(**batch("llama")).logits)
        assert_same_step(build("llama"), model, batch("llama"))


def test_gradient_checkpointing() -> None:
    plain, ours = build("llama"), build("llama")
    apply(ours)
    for model in (plain, ours):
        model.gradient_checkpointing_enable()
    assert_same_step(plain, ours, {**batch("llama"), "use_cache": False})


def test_torch_compile_takes_the_plain_path(fresh_compiler: None) -> None:
    ours = build("llama")
    apply(ours)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    outputs = compiled(**batch("llama"))
    assert type(outputs.logits) is Tensor
    torch.testing.assert_close(outputs.loss, build("llama")(**batch("llama")).loss)


def test_functional_gradients_take_the_plain_path() -> None:
    ours = build("llama")
    apply(ours)
    parameters = dict(ours.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(ours, p, (), batch("llama")).loss)(
        parameters
    )
    _, expected, _ = step(build("llama"), batch("llama"))
    assert_same_gradient(grads["lm_head.weight"], expected["lm_head.weight"], "lm_head.weight")


def test_models_with_a_loss_of_their_own_are_refused() -> None:
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    (change,) = apply(bert)
    assert change.kernel is None
    assert change.undo is None
    assert "BertForMaskedLM.forward computes its loss itself" in change.reason
    assert type(bert.get_output_embeddings()) is nn.Linear

    ours = build("llama")
    ours.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    assert "expected ForCausalLMLoss" in apply(ours)[0].reason

    class OtherLinear(nn.Linear):
        """Stands for a quantised head."""

    ours = build("llama")
    ours.lm_head.__class__ = OtherLinear
    assert "OtherLinear, expected a torch.nn.Linear" in apply(ours)[0].reason
    ours = build("llama")
    ours.lm_head.forward = ours.lm_head.forward
    assert "replaced the head's forward" in apply(ours)[0].reason
    assert apply(nn.Sequential(nn.Linear(2, 2))) == []


def test_a_model_without_a_loss_type_is_served() -> None:
    config = GPT2Config(
        vocab_size=WORDS, n_layer=1, n_embd=16, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(config).eval()
    ours = copy.deepcopy(plain)
    assert apply(ours)[0].kernel == KERNEL
    assert_same_step(plain, ours, batch("llama"))


def test_a_model_that_writes_into_its_logits_is_right_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    images = {"<image>": 4, **{f"IMGIMG{chr(65 + i)}Z": 10 + i for i in range(4)}, "word": 5}
    config = ChameleonConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        vocabulary_map=images,
        vq_config={
            "base_channels": 32,
            "num_embeddings": 4,
            "embed_dim": 4,
            "latent_channels": 4,
            "resolution": 16,
        },
        tie_word_embeddings=False,
    )
    from transformers import ChameleonForConditionalGeneration

    torch.manual_seed(1)
    plain = ChameleonForConditionalGeneration(config)
    ours = copy.deepcopy(plain)
    apply(ours)
    inputs = batch("llama")
    inputs["labels"] = inputs["input_ids"].clamp(min=20)  # words that the model does not mask
    assert_same_step(plain, ours, inputs)
    assert "ChameleonForConditionalGeneration read its logits" in caplog.text


def test_states_are_freed_without_the_garbage_collector() -> None:
    ours = build("gemma2, softcap")
    apply(ours)
    states: list[Any] = []
    ours.lm_head.register_forward_pre_hook(lambda head, args: states.append(weakref.ref(args[0])))
    gc.collect()
    gc.disable()
    try:
        outputs = ours(**batch("gemma2, softcap"))
        outputs.loss.backward()
        logits = outputs.logits.float()
        assert states[0]() is not None
        del outputs, logits
        assert states[0]() is None
    finally:
        gc.enable()
