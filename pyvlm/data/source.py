"""What every source of training conversations does."""

from collections.abc import Sequence
from typing import Protocol

from pyvlm.models.speaker import Messages


class Source(Protocol):
    """Conversations by number: the same for the same seed, step and index, whatever was asked for before.

    That is what makes resuming exact: a source has no state to save.
    """

    def batch(self, step: int, indices: Sequence[int]) -> list[Messages]:
        """The conversations of these indices of a step's batch, as `Processor.encode` takes them."""
        ...
