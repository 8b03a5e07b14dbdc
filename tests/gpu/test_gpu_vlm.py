"""pyvlm's own models, their training and their answers on a GPU, as on the CPU.

On the CPU one recipe runs: models and training have tests of their own.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.devices import on
from gpu.test_gpu_citizens import waiting_refused
from tolerance import assert_conforms
from torch import Tensor

pytest.importorskip("accelerate", reason="accelerate, which training needs, is not installed")
pytest.importorskip("matplotlib", reason="matplotlib, which a run's charts need, is not installed")
pytest.importorskip("pydantic", reason="pydantic, which recipes need, is not installed")
pytest.importorskip("skimage", reason="scikit-image, which has the tiny recipes' pictures, is not installed")
pytest.importorskip("sklearn", reason="scikit-learn, which has some of their pictures, is not installed")
pytest.importorskip("tensorboard", reason="tensorboard, which a run writes for, is not installed")
pytest.importorskip("tokenizers", reason="tokenizers, which processors need, is not installed")
from models.tiny_experts import EXPERTS, assert_no_logit_depends_on_what_comes_later, model_of
from PIL import Image

from pyvlm.models import VLM
from pyvlm.models.inputs import to_device
from pyvlm.models.speaker import Sampling
from pyvlm.training.chat import Chat, load_model
from pyvlm.training.photos import photographs
from pyvlm.training.recipe import Recipe, load_recipe, shipped_recipes
from pyvlm.training.replies import VLMSpeaker
from pyvlm.training.trainer import (
    make_batches,
    new_model,
    open_sources,
    stage_processors,
    train,
    with_experts,
)

SYSTEMS = tuple(name for name in shipped_recipes() if name != "demo")
each_system = pytest.mark.parametrize(
    ("device", "name"),
    [on("cpu", "moe-llava", name="-moe-llava"), *(on("cuda", n, name=f"-{n}") for n in SYSTEMS)],
)


def model_and_batch(recipe: Recipe) -> tuple[VLM, dict[str, Any]]:
    """The model as it begins, or where a stage gives it experts with those; and the first stage's data."""
    model, processors = new_model(recipe), stage_processors(recipe)
    for stage in recipe.stages.values():
        if stage.upcycle is not None:
            model = with_experts(model, stage.upcycle, recipe.seed)
    sources, _ = open_sources(recipe, processors, 1, lambda line: None, None)
    (batch,) = make_batches(processors[0], sources[0], 0, range(4), 1)
    return model.eval(), batch


def loss_and_gradients(model: VLM, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@each_system
def test_loss_and_gradients_are_those_of_the_cpu(device: torch.device, name: str) -> None:
    """And where no router has to know how many tokens there are, nothing waits for the GPU."""
    model, batch = model_and_batch(load_recipe(name, "tiny"))
    expected_loss, expected = loss_and_gradients(model, batch)
    model.to(device)
    given = to_device(batch, device)
    loss, gradients = loss_and_gradients(model, given)
    assert loss.device.type == device.type
    assert_conforms(loss.cpu(), expected_loss)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        assert_conforms(gradient.cpu(), expected[parameter], gradient=True)
    with waiting_refused(device) if model.config.language.moe is None else nullcontext():
        again, _ = loss_and_gradients(model, to_device(batch, device))
    assert torch.isfinite(again)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("rule", ["mmca", "mmca_image", "causal"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_no_logit_depends_on_later_tokens_or_images(
    experts: str, rule: str, training: bool, device: torch.device
) -> None:
    model = model_of(EXPERTS[experts], attention_rule=rule).train(training).to(device)
    assert_no_logit_depends_on_what_comes_later(model, device)


@each_system
def test_trains_and_answers(device: torch.device, name: str, tmp_path: Path) -> None:
    """accelerate takes the GPU where there is one, and torch's CPU else."""
    recipe = load_recipe(name, "tiny")
    short = {n: s.model_copy(update={"steps": 3, "batch_size": 4}) for n, s in recipe.stages.items()}
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("accelerate takes the GPU that is here")
    trained = train(recipe.model_copy(update={"stages": short}), tmp_path / "run", progress=False)
    assert next(trained.model.parameters()).device.type == device.type
    model, processor = load_model(tmp_path / "run", str(device))
    for mine, theirs in zip(model.parameters(), trained.model.parameters(), strict=True):
        assert torch.isfinite(mine).all()
        assert mine.equal(theirs)
    Image.fromarray(photographs()["cat"]).save(tmp_path / "cat.png")
    chat = Chat(VLMSpeaker(model, processor, Sampling()), [tmp_path / "cat.png"], lambda _: None)
    assert isinstance(chat.ask("What is in the image?"), str)
