"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

from qjax.hf.extras import require


def plot_losses(losses: Sequence[float], file: Path, title: str) -> None:
    """Draw the training loss of each step to a PNG.

    Raises:
        ModuleNotFoundError: matplotlib (extra `plots`) is not installed.
    """
    figures = require("matplotlib.figure", "plots")  # no pyplot: no window system, no global state
    axes = (figure := figures.Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
