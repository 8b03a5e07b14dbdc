"""The head that is asked for a loss."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_conforms

from pyvlm.nn import LinearCrossEntropy


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_loss_is_that_of_its_logits(softcap: float | None) -> None:
    head = LinearCrossEntropy(
        6, 11, bias=True, softcap=softcap, ignore_index=-1, label_smoothing=0.1
    ).double()
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    labels = torch.tensor([[3, -1, 0, 10, -1], [-1, -1, 7, 7, 2]])
    expected = F.cross_entropy(
        head.logits(hidden).flatten(0, 1), labels.flatten(), ignore_index=-1, label_smoothing=0.1
    )
    assert_conforms(head(hidden, labels), expected)


def test_the_weights_of_a_plain_head_load() -> None:
    plain, head = torch.nn.Linear(4, 9, bias=False), LinearCrossEntropy(4, 9)
    head.load_state_dict(plain.state_dict())
    hidden = torch.randn(3, 4)
    assert head.logits(hidden).equal(plain(hidden))
