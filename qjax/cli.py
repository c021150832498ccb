"""The `qjax` command: one module of `qjax.commands` for each of its parts."""

import typer

from qjax import tune
from qjax.commands.compare import compare
from qjax.commands.demo import demo
from qjax.commands.eval import evaluate
from qjax.commands.finetune import finetune
from qjax.commands.generate import generate
from qjax.commands.inspect import inspect
from qjax.commands.plan import plan
from qjax.commands.quantize import quantize

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # reflows the docstrings
    pretty_exceptions_enable=False,
    help="4-bit models in JAX and Flax.",
)
for _command in (demo, quantize, inspect, generate, finetune, compare, plan):
    app.command()(_command)
app.command("eval")(evaluate)
app.command("tune")(tune.command)

if __name__ == "__main__":
    app()
