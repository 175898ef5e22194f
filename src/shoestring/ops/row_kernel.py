"""Rows of coded keys and values by the compiled kernel (`native`): encode, recode, decode, attend.

`row_code` says what a row is and computes the same in torch. What is here takes tensors on the CPU
as they lie, checks them and hands pointers to C; nothing is copied. It is called for every layer
of every token, so what does not change is packed once: a `KernelCode`, a `Basis`, a `Segment`.

`available()` first: without a compiler there is no kernel, and every call here raises.
"""

import ctypes
import functools
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from . import native

# B batch, H heads of keys and values, G query heads for each, m queries, n rows, d a head's width

FINE, NOT_FINITE, NO_HALF = 0, 1, 2
"""What `encode` and `recode` return: done, NaN or infinity, a scale beyond half precision."""

MOST_WIDTH, MOST_QUERIES = 256, 64

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ALIGNED = 64
_ENCODING = struct.Struct("=2Q6q3q2Q2qQ2qq")
_MOVING = struct.Struct("=Q2qQ2q2qq")
_SEGMENT = struct.Struct("=Qq Q3qQ")
_ATTENTION = struct.Struct("=Q3q2Q2q2Q6qqQQq5qqQdQ")


@dataclass(frozen=True, slots=True)
class _Functions:
    room: Any
    prepare: Any
    encode: Any
    recode: Any
    decode: Any
    attend_room: Any
    attend: Any
    level: Any


def bound(library: ctypes.CDLL) -> _Functions:
    """The functions of a compiled kernel."""
    number, pointer, packed = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    takes = {
        "room": [number] * 2, "prepare": [pointer, *[number] * 3, *[pointer] * 4],
        "encode": [pointer, packed], "recode": [pointer, pointer, packed],
        "decode": [pointer, packed], "attend_room": [number] * 6, "attend": [packed, packed],
        "level": [],
    }  # fmt: skip
    found = {}
    for name, types in takes.items():
        found[name] = getattr(library, f"row_code_{name}")
        found[name].argtypes, found[name].restype = types, number
    return _Functions(**found)


@functools.cache
def _functions() -> _Functions:
    library = native.library()
    if library is None:
        raise ConfigError(
            f"there is no compiled kernel: {native.reason()}", hint="Ask available() first."
        )
    return bound(library)


def available() -> bool:
    """Whether there is a compiled kernel; `native.reason()` says why not."""
    return native.library() is not None


def level() -> int:
    """What it is compiled for: 0 vectors of 4 floats, 1 AVX2, 2 AVX-512, 3 AVX-512 with VBMI."""
    return int(_functions().level())


# ---- codes -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _tables(coefficients: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Levels, edges, scales of one byte and coefficients in float64; levels and scales in float32.
    Computed as the twin computes them, so that codes are the same."""
    p = torch.tensor(coefficients, dtype=torch.float64).view(9, 3)
    level = torch.zeros(9, 256, dtype=torch.float64)
    edge = torch.full((9, 256), torch.inf, dtype=torch.float64)
    for bits in range(1, 9):
        count = 2**bits
        x = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) / (count / 2)
        square = x * x
        each = x * (p[bits, 0] + square * (p[bits, 1] + square * p[bits, 2]))
        if not bool((each.diff() > 0).all()):
            raise ConfigError(f"levels of {bits} bits that do not ascend", expected="ascending")
        level[bits, :count], edge[bits, : count - 1] = each, (each[1:] + each[:-1]) / 2
    scale = torch.exp2((torch.arange(256, dtype=torch.float64) - 128) / 16)
    scale[0] = 0.0
    wide = torch.cat([level.flatten(), edge.flatten(), scale, p.flatten()])
    return wide, torch.cat([level.flatten(), scale]).float()


class KernelCode:
    """A row code as the kernel needs it.

    bits: (2, H, d / 8) uint8, 0 to 8; weights: the same, float64, above 0, alike where None;
    scale_bytes: 1 or 2; coefficients: (9, 3) float64, of levels.
    ConfigError for what cannot be, and where there is no kernel.
    """

    __slots__ = ("_room", "_tables", "heads", "pointer", "row_bytes", "width")

    def __init__(
        self, bits: Tensor, weights: Tensor | None, scale_bytes: int, coefficients: Tensor
    ) -> None:
        if bits.dim() != 3 or bits.shape[0] != 2 or bits.dtype != torch.uint8:
            raise ConfigError(
                f"bits {tuple(bits.shape)} of {bits.dtype}", expected="uint8 (2, heads, groups)"
            )
        self.heads, self.width = bits.shape[1], bits.shape[2] * 8
        if not 0 < self.width <= MOST_WIDTH or int(bits.max()) > 8 or scale_bytes not in (1, 2):
            raise ConfigError(
                f"heads of {self.width}, codes of {int(bits.max()) if bits.numel() else 0} bits, "
                f"scales of {scale_bytes} bytes",
                expected=f"a width of 8 to {MOST_WIDTH}, 0 to 8 bits, 1 or 2 bytes",
            )
        weights = torch.ones(bits.shape) if weights is None else weights
        weights = weights.to("cpu", torch.float64).contiguous()
        if weights.shape != bits.shape or not bool((weights > 0).all()):
            raise ConfigError(
                f"weights {tuple(weights.shape)}", expected=f"{tuple(bits.shape)}, above 0"
            )
        numbers = coefficients.to(torch.float64).flatten().tolist()
        self._tables = _tables(tuple(numbers))
        functions, bits = _functions(), bits.cpu().contiguous()
        size = functions.room(self.heads, self.width)
        self._room = torch.zeros(size + _ALIGNED, dtype=torch.uint8)
        start = self._room.data_ptr()
        self.pointer = start + -start % _ALIGNED
        self.row_bytes = functions.prepare(
            self.pointer, self.heads, self.width, scale_bytes, bits.data_ptr(), weights.data_ptr(),
            self._tables[0].data_ptr(), self._tables[1].data_ptr(),
        )  # fmt: skip


def encode(
    keys: Tensor,
    values: Tensor,
    A: Tensor,
    mean: Tensor,
    code: KernelCode,
    rows: Tensor,
    threads: int = 1,
) -> int:
    """keys, values (B, H, t, d) -> rows uint8 (B, t, row_bytes), of A (x - mean), in float64.

    A: (2, H, d, d), mean: (2, B or 1, H, d), float64. Returns FINE, NOT_FINITE or NO_HALF; rows are
    undefined then. ConfigError for shapes, dtypes and strides that do not fit.
    """
    B, H, t, d = keys.shape
    if (H, d) != (code.heads, code.width) or values.shape != keys.shape:
        raise ConfigError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)}",
            expected=f"alike, {code.heads} heads of {code.width}",
        )
    kind, size = _kind(keys), keys.element_size()
    if values.dtype != keys.dtype:
        raise ConfigError(f"keys of {keys.dtype} and values of {values.dtype}", expected="alike")
    strides = [size * each for x in (keys, values) for each in _strides(x)]
    for x, shape in ((A, (2, H, d, d)), (mean, (2, mean.shape[1], H, d))):
        if x.dtype != torch.float64 or x.shape != shape or not x.is_contiguous():
            raise ConfigError(
                f"{tuple(x.shape)} of {x.dtype}", expected=f"{shape} of float64, contiguous"
            )
    alone = _one_mean(mean, B)
    given = _ENCODING.pack(
        keys.data_ptr(), values.data_ptr(), *strides, kind, B, t, A.data_ptr(), mean.data_ptr(),
        mean.stride(0), 0 if alone else H * d, *_rows(rows, code, (B, t)), threads,
    )  # fmt: skip
    return int(_functions().encode(code.pointer, given))


def recode(
    rows: Tensor, code: KernelCode, out: Tensor, out_code: KernelCode, threads: int = 1
) -> int:
    """rows (B, n, row_bytes) of one code -> rows of another, in float64. Returns as `encode`."""
    if (code.heads, code.width) != (out_code.heads, out_code.width):
        raise ConfigError(
            f"{out_code.heads} heads of {out_code.width}",
            expected=f"{code.heads} heads of {code.width}, as before",
        )
    shape = (rows.shape[0], rows.shape[1])
    given = _MOVING.pack(*_rows(rows, code, shape), *_rows(out, out_code, shape), *shape, threads)
    return int(_functions().recode(code.pointer, out_code.pointer, given))


def decode(rows: Tensor, code: KernelCode, out: Tensor | None = None, threads: int = 1) -> Tensor:
    """rows (B, n, row_bytes) -> float32 (B, 2, H, n, d), level and scale each in float32."""
    B, n = rows.shape[0], rows.shape[1]
    shape = (B, 2, code.heads, n, code.width)
    if out is None:
        out = torch.empty(shape)
    elif out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ConfigError(
            f"{tuple(out.shape)} of {out.dtype} to decode into",
            expected=f"{shape} of float32, contiguous",
        )
    given = _MOVING.pack(*_rows(rows, code, (B, n)), out.data_ptr(), 0, 0, B, n, threads)
    _functions().decode(code.pointer, given)
    return out


def _kind(x: Tensor) -> int:
    kind = _KINDS.get(x.dtype)
    if kind is None or not x.is_cpu:
        raise ConfigError(
            f"{x.dtype} on {x.device}", expected="float32, float16 or bfloat16 on the CPU"
        )
    return kind


def _strides(x: Tensor) -> tuple[int, ...]:
    strides = x.stride()
    if strides[3] != 1 and x.shape[3] != 1:
        raise ConfigError(f"strides {strides}", expected="the last one 1")
    return strides[:3]


def _one_mean(mean: Tensor, B: int) -> bool:
    if mean.shape[1] not in (1, B):
        raise ConfigError(f"means of {mean.shape[1]} batch rows", expected=f"1 or {B}")
    return mean.shape[1] == 1


def _rows(rows: Tensor, code: KernelCode, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Pointer, batch stride, row stride."""
    strides = rows.stride()
    if (
        rows.dtype != torch.uint8
        or rows.shape != (*shape, code.row_bytes)
        or (strides[2] != 1 and code.row_bytes > 1)
        or not rows.is_cpu
    ):
        raise ConfigError(
            f"rows {tuple(rows.shape)} of {rows.dtype}, strides {strides}",
            expected=f"uint8 {(*shape, code.row_bytes)} on the CPU, the last stride 1",
        )
    return rows.data_ptr(), strides[0], strides[1]


# ---- attention ---------------------------------------------------------------------------------


class Basis:
    """What coded coordinates are of: x = inverse z + mean.

    inverse: (2, H, d, d) float32, mean: (2, B or 1, H, d) float32, contiguous; both are kept.
    """

    __slots__ = ("_kept", "packed", "shape")

    def __init__(self, inverse: Tensor, mean: Tensor) -> None:
        H, d = inverse.shape[1], inverse.shape[3]
        for x, shape in ((inverse, (2, H, d, d)), (mean, (2, mean.shape[1], H, d))):
            if x.dtype != torch.float32 or x.shape != shape or not x.is_contiguous():
                raise ConfigError(
                    f"{tuple(x.shape)} of {x.dtype}", expected=f"{shape} of float32, contiguous"
                )
        batch = mean.shape[1]
        self._kept = (inverse, mean)
        self.shape = (batch, H, d)
        self.packed = (
            inverse.data_ptr(), mean.data_ptr(), batch * H * d, 0 if batch == 1 else H * d
        )  # fmt: skip


class Segment:
    """Rows of one kind, the first `count` of each batch row, as `attend` takes them.

    code: of uint8 rows (B, n, row_bytes), with 16 bytes behind the last that may be read; None for
    raw ones, (B, n, 2 H d) float32, float16 or bfloat16: keys of all heads, then values.
    visible: int64 (B, 2), the first row that is seen and the one behind the last; None for all.
    The tensors are kept, and read when `attend` is called: what is in them may change till then.
    """

    __slots__ = ("_kept", "batch", "packed", "shape")

    def __init__(
        self, code: KernelCode | None, rows: Tensor, visible: Tensor | None = None
    ) -> None:
        B, n, size = rows.shape
        if code is None:
            kind, each, strides = _kind(rows), rows.element_size(), rows.stride()
            if strides[2] != 1:
                raise ConfigError(f"strides {strides}", expected="the last one 1")
            self.shape: tuple[int, int] | int = size
            place = (rows.data_ptr(), strides[0] * each, strides[1] * each)
        else:
            kind, place = 0, _rows(rows, code, (B, n))
            self.shape = (code.heads, code.width)
        if visible is not None and (
            visible.dtype != torch.int64
            or visible.shape != (B, 2)
            or not visible.is_contiguous()
            or not visible.is_cpu
        ):
            raise ConfigError(
                f"visible {tuple(visible.shape)} of {visible.dtype}",
                expected=f"int64 ({B}, 2), contiguous",
            )
        self.batch = B
        self._kept = (code, rows, visible)
        self.packed = _SEGMENT.pack(
            0 if code is None else code.pointer, kind, *place, n,
            0 if visible is None else visible.data_ptr(),
        )  # fmt: skip


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: list[Segment],
    basis: Basis,
    scaling: float,
    own_from: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """Attention of the newest m tokens over what is kept and over themselves.

    q: float32 (B, H G, m, d); keys, values: of the m tokens, (B, H, m, d), float32, float16 or
    bfloat16. Query i sees what its segments show and the own tokens up to i, from own_from (B,)
    int64 on. -> float32 (B, m, H G, d); zeros where nothing is seen.
    """
    B, heads, m, d = q.shape
    _, H, _, _ = keys.shape
    batch, basis_heads, width = basis.shape
    if (
        q.dtype is not torch.float32
        or keys.shape != (B, H, m, d)
        or values.shape != keys.shape
        or values.dtype is not keys.dtype
        or (H, d) != (basis_heads, width)
        or heads % H
        or batch not in (1, B)
        or m > MOST_QUERIES
    ):
        raise _misfit(q, keys, values, basis)
    for segment in segments:
        if segment.batch != B or segment.shape not in ((H, d), 2 * H * d):
            raise ConfigError(
                f"rows of {segment.batch} batch rows for {segment.shape}",
                expected=f"{B} batch rows of {H} heads of {d}",
            )
    if own_from is not None and (own_from.dtype != torch.int64 or own_from.shape != (B,)):
        raise ConfigError(f"own_from of {own_from.dtype}", expected=f"int64 ({B},)")
    kind, size = _kind(keys), keys.element_size()
    kb, kh, km = _strides(keys)
    vb, vh, vm = _strides(values)
    out = torch.empty(B, m, heads, d)
    functions, groups = _functions(), heads // H
    room = torch.empty(functions.attend_room(B, H, groups, m, d, threads), dtype=torch.uint8)
    given = _ATTENTION.pack(
        q.data_ptr(), *_strides(q), *basis.packed, keys.data_ptr(), values.data_ptr(),
        kb * size, kh * size, km * size, vb * size, vh * size, vm * size, kind,
        0 if own_from is None else own_from.data_ptr(), out.data_ptr(), len(segments),
        B, H, groups, m, d, threads, room.data_ptr(), scaling, 0,
    )  # fmt: skip
    functions.attend(given, b"".join([segment.packed for segment in segments]))
    return out


def _misfit(q: Tensor, keys: Tensor, values: Tensor, basis: Basis) -> ConfigError:
    return ConfigError(
        f"queries {tuple(q.shape)} of {q.dtype}, keys {tuple(keys.shape)} of {keys.dtype}, values "
        f"{tuple(values.shape)} of {values.dtype}, a basis of {basis.shape}",
        expected="(B, H G, m, d) of float32 and twice (B, H, m, d) alike, for the basis' (B or 1, "
        f"H, d), with up to {MOST_QUERIES} queries",
    )
