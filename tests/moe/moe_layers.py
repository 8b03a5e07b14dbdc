"""Layouts written as strings and small `pyvlm.nn.MoE` layers, for the tests of the layer."""

import torch

from pyvlm.layout import TokenLayout
from pyvlm.nn import MoE

# P padding, t text, digits: the tokens of an image.
LAYOUTS = {
    "interleaved": ["ttt00000tt1111111tt", "t00t11111111tttttt"],
    "image first and last": ["000tt1", "t00000"],
    "images side by side": ["t0000111t", "000111222"],
    "left and right padding": ["PPPtt000tP", "t00000tttt", "PPPPPPPPPP"],
    "text only": ["tttttt", "Pttttt"],
    "images only": ["0000011", "0001111"],
    "padding only": ["PPP"],
    "one token": ["t"],
    "no tokens": [""],
}


def layout_of(rows: list[str]) -> TokenLayout:
    length = max(map(len, rows))
    rows = [row.ljust(length, "P") for row in rows]
    kind = [[{"P": 0, "t": 1}.get(c, 2) for c in row] for row in rows]
    image = [[int(c) if c.isdigit() else -1 for c in row] for row in rows]
    shape = (len(rows), length)
    return TokenLayout(
        torch.tensor(kind, dtype=torch.uint8).reshape(shape),
        torch.tensor(image, dtype=torch.int32).reshape(shape),
    )


def layer_of(dtype: torch.dtype = torch.float64, **arguments: object) -> MoE:
    layer = MoE(8, 6, 4, **arguments).to(dtype)
    torch.nn.init.normal_(layer.gate.weight)  # choices with clear winners
    return layer
