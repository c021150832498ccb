"""Whether an array's values can be looked at."""

import jax


def is_concrete(x: jax.Array) -> bool:
    """Return True for an array with values that this process has, False while it is traced."""
    try:
        return x.is_fully_addressable or x.is_fully_replicated
    except jax.errors.ConcretizationTypeError:
        return False
