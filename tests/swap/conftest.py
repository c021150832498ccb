"""What the tests of swapped models share."""

import pytest
from flax import nnx


@pytest.fixture(params=["graph", "tree"])
def mode(request):
    """Flax's two modes; in tree mode a model is an ordinary pytree."""
    if request.param == "graph":
        yield request.param
        return
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        yield request.param
