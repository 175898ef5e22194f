"""Vectors into rows of codes, from one tier's rows to the next's, and back.

By the compiled kernel where there is one and it takes what is given, else by torch; the rows are
the same.
"""

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import DataError
from ..ops import native, row_kernel
from ..ops.row_code import RowCode, coefficients
from .form import Turn

if TYPE_CHECKING:
    from ..ops.row_triton import TritonCode

# B batch, H heads, t tokens, d width of a head, D of its codes

_KERNELS: WeakKeyDictionary[RowCode, row_kernel.KernelCode] = WeakKeyDictionary()
_TRITON: WeakKeyDictionary[RowCode, dict[torch.device, "TritonCode"]] = WeakKeyDictionary()
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEVELS = ("plain C", "AVX2", "AVX-512", "AVX-512")


def in_use(device: torch.device | str = "cpu") -> str:
    """What attends over codes on a device, and why if it is not the kernel for it."""
    if torch.device(device).type == "cuda":
        why = without_triton()
        return "Triton" if why is None else f"torch ({why})"
    if torch.device(device).type != "cpu":
        return "torch (there is no kernel for it)"
    if row_kernel.available():
        return f"compiled kernel ({_LEVELS[row_kernel.level()]})"
    return f"torch ({native.reason()})"


def kernel_takes(x: Tensor) -> bool:
    """Whether the compiled kernel is there and takes heads like these (..., d)."""
    width = x.shape[-1]
    return (
        x.is_cpu
        and x.dtype in _DTYPES
        and width % 8 == 0
        and width <= row_kernel.MOST_WIDTH
        and row_kernel.available()
    )


def kernel_code(code: RowCode) -> row_kernel.KernelCode:
    """The same, as the kernel needs it; made once."""
    found = _KERNELS.get(code)
    if found is None:
        found = _KERNELS[code] = row_kernel.KernelCode(
            code.bits, code.weights, code.scale_bytes, coefficients()
        )
    return found


@cache
def without_triton() -> str | None:
    """Why attention over codes on a CUDA device is not Triton's; None where it is. It is tried
    once, since Triton needs a compiler of its own."""
    if os.environ.get("SHOESTRING_NATIVE") == "0":
        return "switched off by SHOESTRING_NATIVE=0"
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return "Triton is not installed, or there is no CUDA device"
    from ..ops import row_triton

    try:
        row_triton.tried(torch.device("cuda"))
    except Exception as error:  # whatever Triton raises without its compiler
        return f"Triton does not work here: {error}"[:200]
    return None


def triton_code(code: RowCode, device: torch.device) -> "TritonCode":
    """The same, as the Triton kernel needs it; made once."""
    from ..ops.row_triton import TritonCode

    found = _TRITON.setdefault(code, {})
    if device not in found:
        found[device] = TritonCode.of(code.bits, code.scale_bytes, coefficients(), device)
    return found[device]


def encode(
    keys: Tensor, values: Tensor, turn: Turn, mean: Tensor | None, code: RowCode
) -> Tensor:  # fmt: skip
    """(B, H, t, d) each, mean (2, B or 1, H, d) float64 -> rows (B, t, row bytes).

    DataError for NaN, infinity, and vectors too long for a scale."""
    forward, _ = turn.to(keys.device)
    if kernel_takes(keys):
        rows = torch.empty(keys.shape[0], keys.shape[2], code.row_bytes, dtype=torch.uint8)
        mean = turn.no_mean() if mean is None else mean
        failed = row_kernel.encode(
            keys, values, forward, mean, kernel_code(code), rows, torch.get_num_threads()
        )
        return _checked(rows, failed)
    x = torch.stack([keys, values], dim=1).double()
    if mean is not None:
        x = x - mean.transpose(0, 1).unsqueeze(3)
    return code.encode(x @ forward.mT)


def recode(rows: Tensor, before: RowCode, after: RowCode) -> Tensor:
    """Rows of one tier (B, t, row bytes) -> of the next. Nothing is turned, only cut."""
    if rows.is_cpu and row_kernel.available() and before.width <= row_kernel.MOST_WIDTH:
        new = torch.empty(*rows.shape[:2], after.row_bytes, dtype=torch.uint8)
        failed = row_kernel.recode(
            rows, kernel_code(before), new, kernel_code(after), torch.get_num_threads()
        )
        return _checked(new, failed)
    return after.encode(before.decode(rows, torch.float64))


def decode(rows: Tensor, code: RowCode) -> Tensor:
    """(B, n, row bytes) -> (B, 2, H, n, D) float32, turned and without the mean."""
    if rows.is_cpu and row_kernel.available() and code.width <= row_kernel.MOST_WIDTH:
        return row_kernel.decode(rows, kernel_code(code), threads=torch.get_num_threads())
    return code.decode(rows)


def _checked(rows: Tensor, failed: int) -> Tensor:
    if failed == row_kernel.NOT_FINITE:
        raise DataError("a vector to be coded holds NaN or infinity", expected="finite numbers")
    if failed == row_kernel.NO_HALF:
        raise DataError("a vector to be coded is too long", expected="a scale up to 65504")
    return rows
