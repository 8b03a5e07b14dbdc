"""Draws docs/masks.png, the README's picture of the rules: python docs/masks.py"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pyvlm import TokenLayout
from pyvlm.layout import IMAGE, RULES, TEXT
from pyvlm.plotting import CLASS_COLOURS, FIRST, SECOND

KINDS = [TEXT] * 2 + [IMAGE] * 4 + [TEXT] * 3 + [IMAGE] * 3 + [TEXT] * 3
PREFIX = 6  # tokens: the text and the image that the dialogue begins with


def figure() -> Figure:
    """The masks of all rules for one small dialogue of text and two images."""
    prefix = torch.arange(len(KINDS)) < PREFIX
    layout = TokenLayout(torch.tensor([KINDS], dtype=torch.uint8), prefix=prefix[None])
    picture = Figure(figsize=(12, 6.9), layout="constrained")
    for number, rule in enumerate(RULES):
        ax = picture.add_subplot(2, 4, number + 1)
        layout.spans(rule).plot(ax=ax, legend=False)
        ax.set_title(rule + (", two softmaxes" if layout.spans(rule).separate else ""), fontsize=11)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel("key" if number >= 4 else "")
        ax.set_ylabel("query" if number % 4 == 0 else "")
    colours = {
        "text token": CLASS_COLOURS[TEXT],
        "image token": CLASS_COLOURS[IMAGE],
        "seen in the first softmax or range": FIRST,
        "seen in the second": SECOND,
    }
    handles = [Patch(facecolor=c, edgecolor="#666666", linewidth=0.6, label=x) for x, c in colours.items()]
    picture.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return picture


if __name__ == "__main__":
    figure().savefig(Path(__file__).with_suffix(".png"), dpi=100)
