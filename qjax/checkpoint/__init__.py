"""Saving and loading with Orbax: models, states and parameter trees that hold 4-bit weights.

On disk a checkpoint is an ordinary Orbax one, of nested dicts of arrays: `kernel/packed`,
`kernel/scales/codes`. What a dict of arrays cannot say (the fields of each QTensor, an adapter's
scaling, a checksum of each array) is JSON in Orbax's custom metadata, under "qjax".

- `tree`: any model or tree as named arrays, and back.
- `header`: the JSON, checked field by field.
- `saving`, `loading`: the two directions.
"""

from qjax.checkpoint.loading import load as load
from qjax.checkpoint.saving import save as save
from qjax.checkpoint.saving import save_async as save_async
