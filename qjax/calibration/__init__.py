"""Better 4 bits: weights quantized again, by what the model's activations say or by search."""

from qjax.calibration.allocate import allocate_bits as allocate_bits
from qjax.calibration.calibrate import calibrate as calibrate
