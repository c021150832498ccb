"""Which activations of a block the backward pass keeps: the rest is computed again.

Blocks name them with `checkpoint_name`; `config.REMAT_SAVES` lists the names.
"""

import functools
from collections.abc import Callable

import jax

# cuDNN's backward pass needs its result and softmax statistics. No name reaches the latter, so its
# results are known by their primitive.
_FUSED_ATTENTION = "dot_product_attention_fwd"


@functools.cache
def remat_policy(names: tuple[str, ...]) -> Callable[..., bool]:
    """Return the policy for `jax.checkpoint` that keeps the activations of these names."""
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive, *avals, **params):
        if "attention" in names and primitive.name.startswith(_FUSED_ATTENTION):
            return True
        return named(primitive, *avals, **params)

    return policy
