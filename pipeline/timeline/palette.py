"""The colours of operations, for every picture of a step: the kind is the hue, the part the shade.

They stay apart for eyes that see two colours instead of three: in the simulations of Machado et al.
(2009) no two of the nine are closer than 17 (CIE 1976) without red or green, or than 12 without
blue.
"""

from collections.abc import Mapping
from typing import Literal

from model.network import BlockSpec
from pipeline.graph import Kind

Part = Literal["encoder", "decoder", "softmax"]
PARTS: tuple[Part, ...] = ("encoder", "decoder", "softmax")
KIND_WORDS: Mapping[Kind, str] = {
    "F": "forward",
    "I": "gradient of the inputs",
    "W": "gradient of the weights",
}
COLOURS: Mapping[Kind, Mapping[Part, str]] = {
    "F": {"encoder": "#7899ec", "decoder": "#1471da", "softmax": "#004b97"},
    "I": {"encoder": "#da884d", "decoder": "#b45500", "softmax": "#773500"},
    "W": {"encoder": "#87dcbd", "decoder": "#2bae89", "softmax": "#097b5f"},
}
INK, SOFT = "#1d2433", "#657085"
"""Text, and lesser text."""
GROUND, IDLE, LINE, WAIT = "#ffffff", "#f3f5f8", "#dfe3ea", "#c3c9d4"
"""The ground, a row without work, lines, and hatched waits."""
SUM = "#8a63c9"
"""Sums over ranks or replicas, and the update after them."""


def part_of(spec: BlockSpec) -> Part:
    """Return whose shade a block has: embeddings go with their side, the loss with the words."""
    if spec.kind in ("softmax", "loss"):
        return "softmax"
    return "encoder" if spec.side == "source" else "decoder"


def css_variables() -> str:
    """Return the colours as variables of a style sheet; a kind's is the middle of its shades."""
    named: dict[str, str] = {
        "ink": INK,
        "soft": SOFT,
        "line": LINE,
        "row": IDLE,
        "paper": GROUND,
        "wait": WAIT,
        "end": SUM,
    }
    named |= {kind: shades["decoder"] for kind, shades in COLOURS.items()}
    return " ".join(f"--{name}: {colour};" for name, colour in named.items())
