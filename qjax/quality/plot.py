"""The errors of a model's layers as a picture."""

import re
from collections.abc import Mapping
from pathlib import Path

from qjax.hf.extras import require

_LAYER = re.compile(r"(^|/)(\d+)/")  # the index of a layer in a path


def plot_layers(errors: Mapping[str, float], file: Path, title: str) -> None:
    """Draw the relative error of each weight to a PNG: a line for each kind, over the layers.

    Raises:
        ModuleNotFoundError: matplotlib (extra `plots`) is not installed.
    """
    figures = require("matplotlib.figure", "plots")  # no pyplot: no window system, no global state
    axes = (figure := figures.Figure(figsize=(7, 4), layout="constrained")).subplots()
    draw_layers(axes, errors)
    axes.set_title(title, fontsize="medium")
    figure.savefig(file, dpi=150, format="png")


def draw_layers(axes, errors: Mapping[str, float]) -> None:
    """Draw the same on axes of one's own."""
    lines: dict[str, dict[int, float]] = {}
    for path, error in errors.items():
        found = _LAYER.search(path)
        kind = path if found is None else path[found.end() :]
        lines.setdefault(kind.removesuffix("/kernel"), {})[int(found[2]) if found else -1] = error
    for number, (kind, points) in enumerate(lines.items()):
        style = {"label": kind, "color": f"C{number % 10}"}
        if -1 in points:  # no layer's: an embedding, the output head
            axes.axhline(points[-1], linestyle="--", **style)
        else:
            axes.plot(sorted(points), [points[i] for i in sorted(points)], marker=".", **style)
    axes.set(xlabel="layer", ylabel="relative error of the weight (rms)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize="small", ncols=2)
