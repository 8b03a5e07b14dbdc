"""Which keys each query may see: `AttentionSpans`, what a mask of a vision-language model comes down to.

Shapes: B batch, Q queries, K keys, R ranges a query (1 or 2).
"""

from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PADDING, TEXT, IMAGE = 0, 1, 2  # the classes of key that have a meaning of their own; others up to 7 are free
MAX_CLASS = 7
EVERY_CLASS = 0xFE  # the bits of all classes but padding


@dataclass(frozen=True, eq=False)
class AttentionSpans:
    """The keys that each query sees: V_r(i) = {j : lo_ir ≤ j < hi_ir and bit class_j of mask_r is set}.

    Joint (`separate=False`): one softmax over the union of a query's sets. The ranges may overlap: it is a
    union of sets, and a key that lies in both counts once. Separate: one softmax a range, and the results are
    added, so that a key in both ranges counts in each.

    Attributes:
        bounds: int32 [B, Q, R, 2], the half-open ranges [lo, hi) of each query, 0 ≤ lo ≤ hi ≤ K.
        key_class: uint8 [B, K], the class of each key: 0 padding, 1 text, 2 image, up to 7.
        range_classes: R bitmasks, bit c set where the range sees keys of class c; never bit 0 (padding).
        separate: one softmax a range (multimodal causal attention) instead of one over all of them.
        values_known: not kept; the values are right by their making and need not be read.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, device, R or bitmask. For CPU tensors also a class above 7 or a range
            outside the keys; on other devices values are not read, since that would stall the device.
    """

    bounds: Tensor
    key_class: Tensor
    range_classes: tuple[int, ...]
    separate: bool
    values_known: InitVar[bool] = False

    def __post_init__(self, values_known: bool) -> None:
        bounds, key_class = self.bounds, self.key_class
        expect_dtype("bounds", bounds, torch.int32)
        expect_dtype("key_class", key_class, torch.uint8)
        if bounds.dim() != 4 or bounds.shape[2] not in (1, 2) or bounds.shape[3] != 2:
            raise ValueError(f"bounds must be [batch, queries, 1 or 2 ranges, 2], got {list(bounds.shape)}")
        if key_class.dim() != 2 or key_class.shape[0] != bounds.shape[0]:
            raise ValueError(
                f"key_class must be [batch, keys] with the batch of bounds {list(bounds.shape)}, "
                f"got {list(key_class.shape)}"
            )
        expect_device("key_class", key_class, "bounds", bounds)
        if len(self.range_classes) != bounds.shape[2]:
            raise ValueError(
                f"range_classes holds {len(self.range_classes)} bitmasks for {bounds.shape[2]} ranges: "
                "give one a range"
            )
        for mask in self.range_classes:
            if not isinstance(mask, int) or mask & ~EVERY_CLASS:
                raise ValueError(
                    f"range_classes={self.range_classes!r}: each must be an int with no bits but 1 to "
                    f"{MAX_CLASS} (bit c: sees class c; class 0, padding, is never seen)"
                )
        if not values_known and is_readable(bounds):
            self._check_values()

    def _check_values(self) -> None:
        bounds, keys = self.bounds, self.key_class.shape[1]
        expect_classes("key_class", self.key_class)
        lo, hi = bounds.unbind(-1)
        bad = (lo < 0) | (lo > hi) | (hi > keys)
        if bad.any():
            b, i, r = first_true(bad)
            raise ValueError(
                f"bounds[{b}, {i}, {r}] is the range [{lo[b, i, r]}, {hi[b, i, r]}), which is not within the "
                f"{keys} keys: ranges must satisfy 0 <= lo <= hi <= {keys}"
            )

    def dense(self) -> Tensor:
        """The sets V_r as masks, bool [B, R, Q, K], for looking and testing; joint: their union counts."""
        device = self.bounds.device
        key = torch.arange(self.key_class.shape[1], device=device)
        lo, hi = self.bounds.movedim(2, 1).unsqueeze(-1).unbind(-2)  # both [B, R, Q, 1]
        mask = torch.tensor(self.range_classes, device=device)[:, None]
        sees_class = (mask >> self.key_class.long()[:, None, :]) & 1 == 1  # [B, R, K]
        return (lo <= key) & (key < hi) & sees_class[:, :, None, :]

    def visible_pairs(self) -> int:
        """How many (query, key) pairs the batch's softmaxes hold: `dense` counted without being made.

        Joint: a key that lies in both ranges of a query counts once; separate: in each. On a GPU this waits
        for the device.
        """

        def count(lo_BQ: Tensor, hi_BQ: Tensor, classes: int) -> int:
            seen_BK = (classes >> self.key_class.long()) & 1
            before_BK1 = torch.nn.functional.pad(seen_BK.cumsum(1), (1, 0))  # such keys before each place
            pairs_BQ = before_BK1.gather(1, hi_BQ.long()) - before_BK1.gather(1, lo_BQ.long())
            return int(pairs_BQ.clamp(min=0).sum())

        lo_BQR, hi_BQR = self.bounds.unbind(-1)
        pairs = sum(
            count(lo_BQR[:, :, r], hi_BQR[:, :, r], classes) for r, classes in enumerate(self.range_classes)
        )
        if not self.separate and len(self.range_classes) == 2:
            first, second = self.range_classes
            pairs -= count(lo_BQR.amax(-1), hi_BQR.amin(-1), first & second)
        return pairs

    def plot(
        self,
        row: int = 0,
        ax: "Axes | None" = None,
        tile: int | None = None,
        query_start: int | None = None,
        legend: bool = True,
    ) -> "Axes":
        """Draws the mask of one row of the batch: queries down, keys across, a colour for each range.

        Above the mask are the classes of the keys and, where their place among the keys is known, on its left
        those of the queries. A long row is drawn in cells of several tokens, paler where less is seen.

        Args:
            row: of the batch.
            ax: matplotlib axes to draw into; None: those of a new figure, which pyplot knows nothing of.
            tile: also marks which tiles of tile × tile pairs are empty, partial or full; at most 64 a side.
            query_start: the position of the first query among the keys; None: 0 where there are as many
                queries as keys, else unknown.
            legend: says what the colours mean.

        Returns:
            The axes; `spans.plot().figure.savefig("mask.png")` saves the picture.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: an argument does not fit the spans, or there are no queries or no keys.
        """
        from pyvlm.plotting import plot_spans

        return plot_spans(self, row, ax, tile, query_start, legend)

    def to(self, device: torch.device | str) -> "AttentionSpans":
        """The same spans on another device."""
        bounds, key_class = self.bounds.to(device), self.key_class.to(device)
        return AttentionSpans(bounds, key_class, self.range_classes, self.separate)


def is_readable(tensor: Tensor) -> bool:
    """Whether values may be checked: reading another device would stall it, and a traced tensor has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def first_true(bad: Tensor) -> list[int]:
    """Index of the first True."""
    return bad.nonzero()[0].tolist()


def expect_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of {dtype}, got {given}")


def expect_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {other_name} on {other.device}: move them to one device"
        )


def expect_classes(name: str, classes: Tensor) -> None:
    bad = classes > MAX_CLASS
    if bad.any():
        b, i = first_true(bad)
        raise ValueError(f"{name}[{b}, {i}] is {classes[b, i]}: classes run from 0 (padding) to {MAX_CLASS}")
