"""Trainers that know nothing of pyvlm: the same losses, and checkpoints that plain transformers reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_causal_models import WORDS, build
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import pyvlm
from pyvlm.integrations.transformers.lazy_logits import LazyLogits

STEPS = 20
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
    "save_strategy": "no",
}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 autocast": {"bf16": True},
    "two batches a step": {"gradient_accumulation_steps": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
}


def examples(count: int) -> list[dict[str, Tensor]]:
    """Sequences of 16 tokens, of which a varying number at the end has labels."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 90, (count, 16), generator=generator)
    first = torch.randint(4, 15, (count, 1), generator=generator)
    labels = torch.where(torch.arange(16) >= first, ids, -100)
    return [{"input_ids": i, "labels": x} for i, x in zip(ids, labels, strict=True)]


class Watching(Trainer):
    """A Trainer that notes whether the logits it was given were computed for the loss."""

    computed: set[bool]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        lazy = isinstance(outputs["logits"], LazyLogits)
        self.computed.add(not lazy or outputs["logits"].behind.computed is not None)
        return (loss, outputs) if return_outputs else loss


def train(model: PreTrainedModel, folder: Path, **options: Any) -> Watching:
    arguments = TrainingArguments(str(folder), **OPTIONS, **options)
    trainer = Watching(model, arguments, train_dataset=examples(16), eval_dataset=examples(4))
    trainer.computed = set()
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("case", CASES)
def test_trainer(case: str, tmp_path: Path) -> None:
    plain = train(build("llama, tied"), tmp_path / "plain", **CASES[case])
    model = build("llama, tied")
    served = {change.part for change in pyvlm.accelerate(model).changes if change.kernel is not None}
    assert served == {"attention", "mlp", "norm", "loss"}
    ours = train(model, tmp_path / "ours", **CASES[case])
    assert plain.computed == {True}
    # LabelSmoother takes the labels away and reads the logits.
    assert ours.computed == {case == "label smoothing"}
    assert len(losses(ours)) == STEPS
    assert losses(ours)[-1] < losses(ours)[0] - 0.1
    tolerance = 2e-3 if "bf16" in CASES[case] else 2e-5
    assert losses(ours) == pytest.approx(losses(plain), rel=tolerance)

    ours.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.config.to_dict().keys() == plain.model.config.to_dict().keys()
    assert saved.state_dict().keys() == plain.model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(saved.state_dict()[key], value)
    mine, theirs = ours.predict(examples(4)), plain.predict(examples(4))
    assert mine.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=tolerance)
    assert mine.predictions.shape == theirs.predictions.shape == (4, 16, WORDS)
    ids = torch.stack([e["input_ids"] for e in examples(4)])
    saved_logits = saved.eval()(ids).logits.detach()
    assert torch.allclose(
        torch.from_numpy(mine.predictions), saved_logits, atol=0.1 if "bf16" in CASES[case] else 1e-5
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(3, WORDS)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def test_trl_sft_trainer(tmp_path: Path) -> None:
    """TRL has a fused head of its own, which reads the weight of ours; its evaluation reads the logits."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "prompt": " ".join(f"w{int(i)}" for i in e["input_ids"][:6]),
            "completion": " " + " ".join(f"w{int(i)}" for i in e["input_ids"][6:]),
        }
        for e in examples(16)
    ]
    histories = []
    for name in ("plain", "ours"):
        model = build("llama")
        if name == "ours":
            pyvlm.accelerate(model)
        arguments = trl.SFTConfig(str(tmp_path / name), bf16=False, gradient_checkpointing=False, **OPTIONS)
        data = datasets.Dataset.from_list(rows)
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        histories.append(
            [(e["loss"], e["mean_token_accuracy"]) for e in log] + [trainer.evaluate()["eval_loss"]]
        )
    *plain, plain_eval = histories[0]
    *ours, our_eval = histories[1]
    assert len(ours) == STEPS
    assert torch.allclose(torch.tensor(ours), torch.tensor(plain), rtol=2e-5, atol=1e-6)
    assert our_eval == pytest.approx(plain_eval, rel=2e-5)


def test_a_trainer_that_reads_the_logits_for_its_metrics(tmp_path: Path) -> None:
    """As TRL's did before it had a fused head: token accuracy from outputs.logits at every step."""

    class Accuracy(Trainer):
        accuracies: list[float]

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            with torch.no_grad():
                shifted, labels = outputs.logits[..., :-1, :].contiguous(), inputs["labels"][..., 1:]
                right = (shifted.argmax(-1) == labels) & (labels != -100)
            self.accuracies.append((right.sum() / (labels != -100).sum()).item())
            return (loss, outputs) if return_outputs else loss

    results = []
    for name in ("plain", "ours"):
        model = build("llama")
        if name == "ours":
            pyvlm.accelerate(model)
        arguments = TrainingArguments(str(tmp_path / name), **OPTIONS | {"learning_rate": 1e-2})
        trainer = Accuracy(model, arguments, train_dataset=examples(8))
        trainer.accuracies = []
        trainer.train()
        results.append(trainer.accuracies)
    assert len(results[1]) == STEPS
    assert results[1][-1] > 0.3
    assert results[1] == pytest.approx(results[0], abs=0.03)
