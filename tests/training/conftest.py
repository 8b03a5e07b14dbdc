import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvlm.training.recipe import Recipe, merge

SMALL = {
    "name": "small",
    "model": {
        "image": {"size": 8, "channels": 1},
        "vision_towers": [
            {
                "name": "vit",
                "type": "vit",
                "patch_size": 4,
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
            },
            {"name": "conv", "type": "conv", "channels": [8], "blocks": [1], "levels": [0, 1]},
        ],
        "fusion": {"grid": 2, "hidden_size": 16},
        "language": {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 32,
            "moe": {"layers": [1], "num_experts": 2, "intermediate_size": 16},
        },
    },
    "stages": {
        "one": {"steps": 5, "batch_size": 4, "lr": 1e-2, "data": {"rounds": [1, 2], "augment": 1.0}},
        "two": {"steps": 4, "batch_size": 4, "lr": 1e-2, "warmup": 2, "data": {"rounds": [1, 1]}},
    },
    "evaluation": {"dialogues": 4, "every": 3, "quick_dialogues": 4, "batch_size": 3},
    "checkpoint_every": 2,
    "log_every": 2,
}


@pytest.fixture(scope="session")
def frozen_by() -> Iterator[set[Path]]:
    """Files behind whose first test all that there was is no longer looked through for garbage."""
    yield set()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _imports_are_no_garbage(request: pytest.FixtureRequest, frozen_by: set[Path]) -> Iterator[None]:
    """accelerate collects garbage as a stage begins: a look at all that is imported took half of a run.

    The first test of a file has imported what the others need, some 2,000 modules with the first trainer.
    """
    yield
    if request.path not in frozen_by:
        frozen_by.add(request.path)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def small_recipe() -> Callable[..., Recipe]:
    """Makes a recipe that trains in a second; keys given replace its own, at any depth."""

    def make(**changes: Any) -> Recipe:
        return Recipe.model_validate(merge(SMALL, changes))

    return make
