"""Optimizers, for `optax`, that need less of the device's memory."""

from qjax.optim.adam8bit import adamw8bit as adamw8bit
from qjax.optim.adam8bit import scale_by_adam8bit as scale_by_adam8bit
from qjax.optim.offload import offload_state as offload_state
