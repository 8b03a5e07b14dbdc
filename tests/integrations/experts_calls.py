"""How the tests of transformers' experts see that pyvlm's kernel ran."""

from typing import Any

import pytest
from torch import Tensor

from pyvlm.integrations.transformers import experts


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of tokens of each call of `expert_mlp` by the integration."""
    tokens: list[int] = []
    original = experts.expert_mlp

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens.append(len(x))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(experts, "expert_mlp", counted)
    return tokens
