"""Colors, dashes and sizes of the figures."""

from typing import Any

OURS, REFERENCE = "pliant", "no-change"

# Okabe & Ito 2008: told apart by color-blind readers too. Each opponent keeps its color on every page.
BLUE, ORANGE = "#0072B2", "#D55E00"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLORS = {OURS: BLUE, "plain": "#7a5c00", "retrained": ORANGE, "boosting": "#009E73", "frozen": "#CC79A7",
          "majority": "#E69F00", "mean": "#E69F00", REFERENCE: "#666666", "seasonal": "#56B4E9",
          "hoeffding-tree": "#000000",
          # Of another set for color-blind readers, Tol 2021, since Okabe & Ito have no more.
          "adaptive-forest": "#882255"}  # fmt: skip
STRANGER = "#999933"
DOTTED, DASHED = (0, (1.5, 1.5)), (0, (5, 1.5))
DASHES: dict[str, Any] = {"retrained": "-", "frozen": DASHED, "majority": DOTTED, "mean": DOTTED,
                          REFERENCE: (0, (4, 3)), "seasonal": (0, (3, 1)), "hoeffding-tree": (0, (6, 1.5, 1.5, 1.5)),
                          "adaptive-forest": (0, (8, 1.5))}  # fmt: skip

WIDE, HALF, SMALL = (11.0, 3.3), (5.4, 3.7), (5.4, 2.4)  # inches; the page scales them
LEFT, RIGHT = 0.8, 0.35  # margins, inches
FONT = 9.5  # points
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "pliant", "text.parse_math": False, "font.size": FONT,
    "font.family": ["DejaVu Sans"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#888888", "axes.labelcolor": "#444444", "xtick.color": "#888888", "ytick.color": "#888888",
    "xtick.labelcolor": "#444444", "ytick.labelcolor": "#444444", "axes.facecolor": "none", "figure.facecolor": "none",
}  # fmt: skip


def color_of(name: str) -> str:
    """The color of a member."""
    return COLORS.get(name, STRANGER)


def dashes_of(name: str) -> Any:
    """The dashes of a member's line."""
    return DASHES.get(name, "-")


def dark(color: str) -> str:
    """The color for text, dark enough to be read on white."""
    return blend(color, "#000000", 0.62) if color != BLUE else BLUE


def blend(color: str, other: str, share: float) -> str:
    """`share` of one color and the rest of another."""
    pairs = [(int(color[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{int(a * share + b * (1 - share)):02x}" for a, b in pairs)
