"""The tests of kernels run with poisoned memory: what nobody wrote is NaN, so that reading it shows."""

import torch


def test_unwritten_memory_is_poisoned() -> None:
    like = torch.zeros(7)
    half = torch.empty(2, 3, dtype=torch.bfloat16)
    for unwritten in (torch.empty(7), torch.empty_like(like), like.new_empty(7), half):
        assert unwritten.isnan().all()
    assert (torch.empty(5, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
