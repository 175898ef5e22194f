"""float32 to bfloat16 by chance: up or down, so that the mean is the value itself.

bfloat16 is float32 without its low 16 bits. A uniform 16-bit integer is added to the bits and the
low 16 are cleared: the carry rounds the magnitude up with probability (low bits) / 2^16, for both
signs. Exact on what bfloat16 can hold. Infinities and NaN stay what they are.
"""

import struct

import torch
from torch import Tensor


def to_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """float32 (...) -> bfloat16 (...), rounded by `noise`, int32 (...) in 0..65535."""
    bits = (values.view(torch.int32) + noise).bitwise_and_(-65536)
    # A NaN whose bits are all ones would carry into the sign.
    return torch.where(values.isnan(), values, bits.view(torch.float32)).to(torch.bfloat16)


def to_bfloat16_ref(value: float, noise: int) -> float:
    """Twin of `to_bfloat16`, for one value that float32 can hold, in Python integers."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    (rounded,) = struct.unpack("<f", struct.pack("<I", (bits + noise) & 0xFFFF0000))
    return float(rounded)
