"""What was measured, as a table for people and as JSON for programs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text as Line

from qjax.hf.extras import require, write_whole
from qjax.quality.measure import Measured, Text
from qjax.quality.models import Loaded
from qjax.quality.plot import plot_layers

_SHOWN = 8  # layers in the table


def check_outputs(out: Path | None, plot: Path | None) -> None:
    """Raise, before anything is measured, if the results could not be written.

    Raises:
        ValueError: no such folder.
        ModuleNotFoundError: matplotlib (extra `plots`) is not installed.
    """
    for file in (out, plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file}: there is no folder {file.absolute().parent}")
    if plot is not None:
        require("matplotlib.figure", "plots")


def as_json(models: list[Loaded], found: Measured, text: Text) -> dict[str, Any]:
    """Return all numbers; of two models, those of the second as `reference_...`."""
    first, rest = models[0], models[1:]
    data: dict[str, Any] = {"model": first.name, "params": first.params, "bytes": first.nbytes}
    data["bits_per_param"] = first.bits_per_param
    for other in rest:
        data |= {"reference": other.name, "reference_params": other.params}
        data |= {"reference_bytes": other.nbytes}
        data |= {"reference_bits_per_param": other.bits_per_param}
    data |= {"text": str(text.file), "window": found.window, "stride": found.stride}
    for measured in (found.quality, found.similarity):
        if measured is not None:
            fields = dataclasses.asdict(measured)
            data |= {name: value for name, value in fields.items() if value is not None}
    if found.layers is not None:
        data["layer_errors"] = found.layers
    return data


def as_table(models: list[Loaded], found: Measured, titles: tuple[str, str]) -> Group:
    """Return the numbers of the models side by side, and the weights that differ most."""
    names = [Line(f"{title}: {each.name}") for title, each in zip(titles, models, strict=False)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in titles[: len(models)]:
        table.add_column(title, justify="right")
    table.add_row("bytes", *[f"{each.nbytes:,}" for each in models])
    table.add_row("bits a parameter", *[f"{each.bits_per_param:.3f}" for each in models])
    lines = []
    if (quality := found.quality) is not None:
        perplexities = (quality.perplexity, quality.reference_perplexity)[: len(models)]
        table.add_row("perplexity", *[f"{value:.4f}" for value in perplexities])
        lines.append(f"{quality.tokens:,} tokens, windows of {found.window}")
        if quality.kl is not None:
            lines.append(f"KL divergence from {titles[1]}: {quality.kl:.5f} nats a token")
            lines.append(f"same most likely token: {quality.agreement:.2%}")
    if (near := found.similarity) is not None:
        lines.append(f"{near.texts:,} texts of up to {found.window} tokens")
        lines.append(f"cosine of the embeddings: {near.cosine:.5f}, lowest {near.lowest:.5f}")
    parts = [*names, table, *map(Line, lines)]
    if found.unlike:
        parts.append(Line(f"Weights are not compared: {found.unlike}"))
    if found.layers is not None:
        parts.append(_layers(found.layers))
    return Group(*parts)


def _layers(errors: dict[str, float]) -> Table | Line:
    if not errors:
        return Line("All weights are equal.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"largest of {len(errors)} differences")
    table.add_column("relative", justify="right")
    for path in sorted(errors, key=lambda path: -errors[path])[:_SHOWN]:
        table.add_row(Line(path), f"{errors[path]:.4f}")
    return table


def write_outputs(
    models: list[Loaded], found: Measured, text: Text, out: Path | None, plot: Path | None
) -> None:
    """Write the JSON and the picture that were asked for."""
    if out is not None:
        content = json.dumps(as_json(models, found, text), indent=1) + "\n"
        write_whole(out, lambda file: file.write_text(content, encoding="utf-8"))
    if plot is not None and found.layers is None:
        raise ValueError(f"{plot}: there is nothing to plot: {found.unlike}")
    if plot is not None:
        title = "\nagainst ".join(Path(each.name).name for each in models)
        write_whole(plot, lambda file: plot_layers(found.layers or {}, file, title))
