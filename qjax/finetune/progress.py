"""A progress bar with the loss and the speed of a training run."""

import math
import time
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def show_progress(
    losses: Iterable[float], *, first: int, steps: int, tokens: int, console: Console
) -> list[float]:
    """Run through the losses of the steps from `first` to `steps`, and return them.

    Args:
        tokens: of a step.
    """
    columns = (
        TextColumn("loss {task.fields[loss]:.3f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    seen: list[float] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, completed=first, loss=math.nan, speed=0.0)
        since = time.perf_counter()
        for loss in losses:
            seen.append(loss)
            if len(seen) == 1:  # compilation is not training speed
                since = time.perf_counter()
            speed = (len(seen) - 1) * tokens / max(time.perf_counter() - since, 1e-9)
            progress.update(task, advance=1, loss=loss, speed=speed)
    return seen
