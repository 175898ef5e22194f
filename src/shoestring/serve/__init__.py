"""Serving in less memory: a context cache of a few bits a number, for `transformers`.

from shoestring.serve import CompressedCache

model.generate(**inputs, past_key_values=CompressedCache(model))
"""

from .attention import NAME, attach
from .cache import CompressedCache
from .calibration import Calibration, calibrate
from .coding import in_use as kernel_in_use

__all__ = ["NAME", "Calibration", "CompressedCache", "attach", "calibrate", "kernel_in_use"]
