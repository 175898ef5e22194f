"""The compiled kernel gives the bytes of its twin, and attention over what they decode to."""

import math
import platform

import numpy as np
import pytest
import torch

from shoestring.errors import ConfigError
from shoestring.ops import native, row_kernel
from shoestring.ops.codebook import codebook
from shoestring.ops.row_kernel import (
    FINE,
    NO_HALF,
    NOT_FINITE,
    Basis,
    KernelCode,
    Segment,
    attend,
    decode,
    encode,
    recode,
)

X86 = platform.machine() in ("x86_64", "AMD64")
BUILDS = {"native": (), "portable": ("-DROW_CODE_PORTABLE",)}
if X86:
    BUILDS |= {"no-vbmi": ("-mno-avx512vbmi",), "avx2": ("-mno-avx512f",)}
SHAPES = [  # B, H, G, m, d
    (1, 3, 3, 1, 64), (2, 1, 2, 5, 80), (3, 2, 1, 16, 8), (1, 2, 5, 2, 128), (2, 1, 1, 1, 72),
    (1, 1, 4, 3, 256),
]  # fmt: skip


@pytest.fixture(params=BUILDS, autouse=True)
def build(request, monkeypatch):
    flags = BUILDS[request.param]
    library = native.library(*flags)
    if library is None:
        pytest.skip(f"no compiled kernel: {native.reason(*flags)}")
    functions = row_kernel.bound(library)
    monkeypatch.setattr(row_kernel, "_functions", lambda: functions)
    return request.param


# ---- twins, from the definition of a row ---------------------------------------------------------


def coefficients():
    """An odd polynomial through, or near, the levels of a normal law."""
    found = torch.zeros(9, 3, dtype=torch.float64)
    for bits in range(1, 9):
        x = places(bits)[2 ** (bits - 1) :].numpy()
        terms = min(3, len(x))
        powers = np.stack([x, x**3, x**5], axis=1)[:, :terms]
        level = np.array(codebook(bits).levels)[2 ** (bits - 1) :]
        found[bits, :terms] = torch.from_numpy(np.linalg.lstsq(powers, level, rcond=None)[0])
    return found


def places(bits):
    count = 2**bits
    return (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) / 2 ** (bits - 1)


P = coefficients()


def levels_of(bits):
    if bits == 0:
        return torch.zeros(1, dtype=torch.float64)
    x, p = places(bits), P[bits]
    return x * (p[0] + x * x * (p[1] + x * x * p[2]))


class Code:
    """A row code twice: as the kernel has it, and as it is defined."""

    def __init__(self, heads, width, scale_bytes, generator, most=8):
        shape = (2, heads, width // 8)
        self.bits = torch.randint(0, most + 1, shape, generator=generator).to(torch.uint8)
        self.weights = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
        self.scale_bytes = scale_bytes
        self.kernel = KernelCode(self.bits, self.weights, scale_bytes, P)

    def stored(self, s):
        if self.scale_bytes == 2:
            return list(torch.tensor(s, dtype=torch.float64).half()[None].view(torch.uint8))
        return [0 if s == 0 else int(min(max(round(16 * math.log2(s)) + 128, 1), 255))]

    def scale(self, stored):
        if self.scale_bytes == 2:
            return stored.contiguous().view(torch.float16).double()[..., 0]
        s = stored[..., 0].double()
        return torch.where(s == 0, 0.0, torch.exp2((s - 128) / 16))

    def row(self, z):
        """z (2, H, d) -> the bytes of its row."""
        codes, scales = [], []
        for side, head in np.ndindex(*self.bits.shape[:2]):
            bits = self.bits[side, head].tolist()
            x = z[side, head].double().view(-1, 8)
            kept = [g for g, b in enumerate(bits) if b]
            r = float(x[kept].square().mean().sqrt()) if kept else 0.0
            was = comes = 0.0
            for g in kept:
                level = levels_of(bits[g])
                u = x[g] / r if r >= 1e-30 else torch.zeros(8, dtype=torch.float64)
                code = ((level[1:] + level[:-1]) / 2 < u[:, None]).sum(1)
                weight = float(self.weights[side, head, g])
                was += weight * float(u.square().sum())
                comes += weight * float(level[code].square().sum())
                word = sum(int(c) << (i * bits[g]) for i, c in enumerate(code))
                codes += word.to_bytes(bits[g], "little")
            scales += self.stored(r * math.sqrt(was / comes) if r >= 1e-30 else 0.0)
        return torch.tensor([*codes, *(int(s) for s in scales)], dtype=torch.uint8)

    def rows(self, z):
        """z (B, 2, H, t, d) -> (B, t, row_bytes)"""
        return torch.stack([torch.stack([self.row(t) for t in b.unbind(2)]) for b in z.unbind(0)])

    def back(self, rows, dtype=torch.float64):
        """rows (B, n, row_bytes) -> z (B, 2, H, n, d), from levels and scales of that dtype"""
        (B, n, size), (_, H, g) = rows.shape, self.bits.shape
        z = torch.zeros(B, 2, H, n, 8 * g, dtype=dtype)
        at, first_scale = 0, size - 2 * H * self.scale_bytes
        for k, (side, head, group) in enumerate(np.ndindex(2, H, g)):
            bits = int(self.bits[side, head, group])
            start = first_scale + k // g * self.scale_bytes
            scale = self.scale(rows[..., start : start + self.scale_bytes]).to(dtype)
            word = sum(rows[..., at + j].long() << (8 * j) for j in range(bits))
            at += bits
            for i in range(8 if bits else 0):
                level = levels_of(bits)[(word >> (i * bits)) & (2**bits - 1)].to(dtype)
                z[:, side, head, :, 8 * group + i] = scale * level
        return z


def attended_ref(q, keys, values, visible, scaling):
    """q (B, H G, m, d), keys and values (B, H, n, d), visible (B, m, n), all float64."""
    groups = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    scores = (q @ keys.mT * scaling).masked_fill(~visible[:, None], -torch.inf)
    return (torch.nan_to_num(scores.softmax(-1)) @ values).transpose(1, 2)


def case(B, H, d, t, dtype=torch.float32, seed=0):
    """Keys, values, and what turns them: A (2, H, d, d), mean (2, B, H, d)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, B, t, H, d, generator=g).to(dtype).transpose(2, 3)
    A = torch.randn(2, H, d, d, generator=g, dtype=torch.float64) / d**0.5
    mean = torch.randn(2, B, H, d, generator=g, dtype=torch.float64)
    z = (x.double() - mean[..., None, :]) @ A.mT[:, None]
    return x[0], x[1], A, mean, z.transpose(0, 1), g


def coded(code, z):
    """Rows with spare bytes behind them, written by the kernel, of z (B, 2, H, t, d)."""
    B, _, H, t, d = z.shape
    one = torch.eye(d, dtype=torch.float64).expand(2, H, d, d).contiguous()
    none = torch.zeros(2, 1, H, d, dtype=torch.float64)
    rows = torch.zeros(B, t + 1, code.kernel.row_bytes + 16, dtype=torch.uint8)
    rows = rows[:, :t, : code.kernel.row_bytes]
    assert encode(z[:, 0].float(), z[:, 1].float(), one, none, code.kernel, rows) == FINE
    return rows


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_bytes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(3, 64), (1, 8), (2, 80), (1, 256)])
def test_rows_have_the_bytes_of_the_twin(heads, width, dtype, scale_bytes):
    keys, values, A, mean, z, g = case(2, heads, width, 11, dtype, seed=width)
    code = Code(heads, width, scale_bytes, g)
    rows = torch.zeros(2, 11, code.kernel.row_bytes, dtype=torch.uint8)
    assert encode(keys, values, A, mean, code.kernel, rows) == FINE
    assert torch.equal(rows, code.rows(z))


@pytest.mark.parametrize("scale_bytes", [1, 2])
def test_recoded_rows_have_the_bytes_of_the_twin(scale_bytes):
    *_, z, g = case(2, 3, 64, 9)
    code, other = Code(3, 64, scale_bytes, g), Code(3, 64, 3 - scale_bytes, g, most=4)
    rows = coded(code, z)
    out = torch.zeros(2, 9, other.kernel.row_bytes, dtype=torch.uint8)
    assert recode(rows, code.kernel, out, other.kernel) == FINE
    assert torch.equal(out, other.rows(code.back(rows)))


@pytest.mark.parametrize("scale_bytes", [1, 2])
@pytest.mark.parametrize(("heads", "width"), [(3, 64), (2, 72)])
def test_rows_decode_to_levels_times_scales_in_float32(heads, width, scale_bytes):
    *_, z, g = case(2, heads, width, 9)
    code = Code(heads, width, scale_bytes, g)
    rows = coded(code, z)
    assert torch.equal(decode(rows, code.kernel), code.back(rows, torch.float32))


def test_eight_bits_come_back_near():
    *_, z, g = case(1, 2, 64, 50)
    code = Code(2, 64, 2, g)
    code.kernel = KernelCode(torch.full_like(code.bits, 8), None, 2, P)
    off = decode(coded(code, z), code.kernel) - z
    assert float(off.norm() / z.norm()) < 0.02


def test_all_widths_of_codes_are_told_apart():
    """One group for each number of bits, 0 to 8, and the code that each coordinate should have."""
    bits = torch.arange(9, dtype=torch.uint8).expand(2, 1, 9).contiguous()
    code = Code(1, 72, 2, torch.Generator())
    code.bits, code.kernel = bits, KernelCode(bits, None, 2, P)
    rows = torch.randint(0, 256, (1, 200, code.kernel.row_bytes), dtype=torch.uint8)
    rows[..., -4:] = torch.tensor([1.0, 1.0]).half().view(torch.uint8)
    assert torch.equal(decode(rows, code.kernel), code.back(rows, torch.float32))


def test_only_rows_are_written():
    keys, values, A, mean, z, g = case(2, 1, 64, 5)
    code, other = Code(1, 64, 2, g), Code(1, 64, 1, g)
    for each, write in (
        (code, lambda rows: encode(keys, values, A, mean, code.kernel, rows)),
        (other, lambda rows: recode(coded(code, z), code.kernel, rows, other.kernel)),
    ):
        size = each.kernel.row_bytes
        buffer = torch.full((2, 9, size + 5), 77, dtype=torch.uint8)
        inner = buffer[:, 2:7, 3 : 3 + size]
        assert write(inner) == FINE
        whole = torch.full_like(buffer, 77)
        whole[:, 2:7, 3 : 3 + size] = inner
        assert torch.equal(buffer, whole)
        assert not bool((inner == 77).all())


def test_a_vector_of_zeros_has_no_scale():
    code = Code(1, 64, 2, torch.Generator())
    rows = coded(code, torch.zeros(1, 2, 1, 3, 64))
    assert torch.equal(rows, code.rows(torch.zeros(1, 2, 1, 3, 64)))
    assert not bool(decode(rows, code.kernel).any())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_told(wrong):
    keys, values, A, mean, _, g = case(1, 2, 64, 20)
    code = Code(2, 64, 2, g)
    rows = torch.zeros(1, 20, code.kernel.row_bytes, dtype=torch.uint8)
    values = values.clone()
    values[0, 1, 17, 5] = wrong
    assert encode(keys, values, A, mean, code.kernel, rows) == NOT_FINITE


def test_a_scale_beyond_half_precision_is_told():
    keys, values, A, mean, _, g = case(1, 2, 64, 3)
    two, one = Code(2, 64, 2, g), Code(2, 64, 1, g)
    for code, told in ((two, NO_HALF), (one, FINE)):
        rows = torch.zeros(1, 3, code.kernel.row_bytes, dtype=torch.uint8)
        assert encode(keys * 1e6, values, A, mean, code.kernel, rows) == told


def test_no_tokens_are_no_rows():
    keys, values, A, mean, _, g = case(2, 1, 64, 0)
    code = Code(1, 64, 2, g)
    rows = torch.zeros(2, 0, code.kernel.row_bytes, dtype=torch.uint8)
    assert encode(keys, values, A, mean, code.kernel, rows) == FINE
    assert decode(rows, code.kernel).shape == (2, 2, 1, 0, 64)


def test_threads_write_the_same_rows():
    keys, values, A, mean, _, g = case(2, 2, 64, 100)
    code, other = Code(2, 64, 2, g), Code(2, 64, 2, g)
    found = []
    for threads in (1, 3):
        rows, moved = (
            torch.zeros(2, 100, c.kernel.row_bytes, dtype=torch.uint8) for c in (code, other)
        )
        assert encode(keys, values, A, mean, code.kernel, rows, threads) == FINE
        assert recode(rows, code.kernel, moved, other.kernel, threads) == FINE
        found.append((rows, moved, decode(moved, other.kernel, threads=threads)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- attention -----------------------------------------------------------------------------------


class Context:
    """Two tiers and raw rows before m own tokens, all of them only partly visible."""

    def __init__(self, B, H, G, m, d, *, dtype=torch.float32, counts=(150, 70, 33), seed=1):
        *_, self.z, g = case(B, H, d, counts[0] + counts[2], seed=seed)
        self.shape, self.scaling = (B, H, G, m, d), 0.4 / d**0.5
        codes = Code(H, d, 2, g), Code(H, d, 1, g, most=5)
        rows = (
            coded(codes[0], self.z[:, :, :, : counts[0]]),
            torch.randn(B, counts[1] + 2, 2 * H * d, generator=g).to(dtype)[:, 1:-1],
            coded(codes[1], self.z[:, :, :, counts[0] :]),
        )
        self.q = torch.randn(B, m, H * G, d, generator=g).transpose(1, 2)
        self.own = torch.randn(2, B, m, H, d, generator=g).to(dtype).transpose(2, 3)
        self.inverse = torch.randn(2, H, d, d, generator=g) / d**0.5
        self.mean = torch.randn(2, (1, B)[seed % 2], H, d, generator=g)
        self.visible = [
            torch.stack(
                [
                    torch.randint(0, 9, (B,), generator=g),
                    n - torch.randint(-3, 9, (B,), generator=g),
                ],
                dim=1,
            )
            for n in counts
        ]
        self.own_from = torch.randint(0, m + 1, (B,), generator=g)
        self.segments = [
            Segment(code.kernel if code else None, each, seen)
            for code, each, seen in zip((codes[0], None, codes[1]), rows, self.visible, strict=True)
        ]
        self.basis = Basis(self.inverse, self.mean)
        turned = self.inverse.double()
        mean = self.mean.double().transpose(0, 1)[:, :, :, None]
        raw = rows[1].double().view(B, counts[1], 2, H, d).permute(0, 2, 3, 1, 4)
        first, last = (codes[k].back(rows[2 * k]) @ turned.mT + mean for k in (0, 1))
        self.all = torch.cat([first, raw, last, self.own.double().transpose(0, 1)], 3)

    def kernel(self, threads=1):
        keys, values = self.own
        return attend(
            self.q, keys, values, self.segments, self.basis, self.scaling, self.own_from, threads
        )

    def twin(self):
        B, _, _, m, _ = self.shape
        masks = []
        for segment, seen in zip(self.segments, self.visible, strict=True):
            at = torch.arange(segment._kept[1].shape[1])
            there = (at >= seen[:, :1]) & (at < seen[:, 1:])
            masks.append(there[:, None].expand(B, m, -1))
        at = torch.arange(m)
        masks.append((at <= at[:, None]) & (at >= self.own_from[:, None, None]))
        mask = torch.cat(masks, -1)
        keys, values = self.all.unbind(1)
        return attended_ref(self.q.double(), keys, values, mask, self.scaling)


def off(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_over_what_rows_decode_to(shape, dtype):
    context = Context(*shape, dtype=dtype)
    B, H, G, m, d = shape
    found = context.kernel()
    assert found.shape == (B, m, H * G, d)
    assert off(found, context.twin()) < 1e-5


@pytest.mark.parametrize("counts", [(1, 1, 1), (64, 0, 65), (0, 128, 0), (0, 0, 0), (7, 63, 128)])
@pytest.mark.parametrize("seed", range(3))
def test_any_number_of_tokens_is_attended_to(counts, seed):
    context = Context(2, 2, 3, 2, 64, counts=counts, seed=seed)
    assert off(context.kernel(), context.twin()) < 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_any_bits_are_attended_to(seed):
    context = Context(1, 4, 1, 1, 64, counts=(80, 3, 20), seed=seed)
    assert off(context.kernel(), context.twin()) < 1e-5


def test_threads_share_the_tokens():
    context = Context(2, 1, 3, 1, 64, counts=(1500, 130, 700))
    wanted = context.twin()
    for threads in (1, 2, 5, 16):
        assert off(context.kernel(threads), wanted) < 1e-5


def test_batch_rows_do_not_meet():
    context = Context(3, 2, 2, 2, 64)
    together = context.kernel()
    for row in range(3):
        keys, values = context.own[:, row : row + 1]
        segments = [
            Segment(code, rows[row : row + 1], seen[row : row + 1])
            for code, rows, seen in (segment._kept for segment in context.segments)
        ]
        basis = Basis(context.inverse, context.mean[:, row : row + 1].contiguous())
        alone = attend(
            context.q[row : row + 1], keys, values, segments, basis, context.scaling,
            context.own_from[row : row + 1],
        )  # fmt: skip
        assert torch.equal(alone[0], together[row])


def test_rows_may_grow_and_views_may_move_between_calls():
    """A segment is read when attended to: what is written into its rows counts."""
    context = Context(1, 1, 1, 1, 64)
    before = context.kernel()
    context.segments[1]._kept[1].mul_(2)
    assert not torch.equal(before, context.kernel())


def test_sharp_scores_do_not_overflow():
    context = Context(1, 2, 2, 3, 64)
    context.q = context.q * 100
    found = context.kernel()
    assert bool(torch.isfinite(found).all())
    assert off(found, context.twin()) < 1e-4  # scores near 500: an epsilon of them is 3e-5


def test_who_sees_nothing_gets_zeros():
    context = Context(2, 1, 2, 3, 64)
    for seen in context.visible:
        seen[0] = torch.tensor([4, 4])
    context.own_from[:] = torch.tensor([2, 0])
    found = context.kernel()
    assert not bool(found[0, :2].any())
    assert bool(found[0, 2].any())
    assert off(found, context.twin()) < 1e-5


def test_nan_in_a_query_is_not_hidden():
    context = Context(1, 1, 1, 1, 64)
    context.q = context.q * torch.nan
    assert bool(context.kernel().isnan().all())


def test_no_segments_are_plain_causal_attention():
    g = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 4, 7, 64, generator=g).unbind(0)
    basis = Basis(torch.eye(64).repeat(2, 4, 1, 1), torch.zeros(2, 1, 4, 64))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = attend(q, k, v, [], basis, 64**-0.5)
    torch.testing.assert_close(found, wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": torch.zeros(1, 4, 1, 64, dtype=torch.float64)}, "float64"),
        ({"q": torch.zeros(1, 3, 1, 64)}, "queries"),
        ({"keys": torch.zeros(1, 2, 1, 72)}, "queries"),
        ({"values": torch.zeros(1, 2, 1, 64).half()}, "float16"),
        ({"keys": torch.zeros(1, 2, 1, 128)[..., ::2]}, "last one 1"),
        ({"own_from": torch.zeros(1)}, "own_from"),
        ({"segments": "raw of another width"}, "2 heads"),
        ({"segments": "another batch"}, "batch rows"),
    ],
)  # fmt: skip
def test_attention_of_what_does_not_fit_is_refused(change, match):
    given = {
        "q": torch.zeros(1, 4, 1, 64), "keys": torch.zeros(1, 2, 1, 64),
        "values": torch.zeros(1, 2, 1, 64), "segments": [], "scaling": 1.0, "own_from": None,
        "basis": Basis(torch.zeros(2, 2, 64, 64), torch.zeros(2, 1, 2, 64)),
    }  # fmt: skip
    if change.get("segments") == "raw of another width":
        change = {"segments": [Segment(None, torch.zeros(1, 3, 2 * 64))]}
    elif change.get("segments") == "another batch":
        change = {"segments": [Segment(None, torch.zeros(2, 3, 4 * 64))]}
    with pytest.raises(ConfigError, match=match):
        attend(**{**given, **change})


def test_codes_that_cannot_be_are_refused():
    bits = torch.zeros(2, 1, 8, dtype=torch.uint8)
    for wrong in (bits[0], bits.int(), bits + 9, torch.zeros(2, 1, 33, dtype=torch.uint8)):
        with pytest.raises(ConfigError):
            KernelCode(wrong, None, 2, P)
    with pytest.raises(ConfigError, match="1 or 2 bytes"):
        KernelCode(bits, None, 4, P)
    with pytest.raises(ConfigError, match="above 0"):
        KernelCode(bits, torch.zeros(2, 1, 8), 2, P)
    with pytest.raises(ConfigError, match="ascend"):
        KernelCode(bits, None, 2, -P)


def test_rows_that_do_not_fit_are_refused():
    keys, values, A, mean, _, g = case(1, 1, 64, 3)
    code = Code(1, 64, 2, g).kernel
    rows = torch.zeros(1, 3, code.row_bytes, dtype=torch.uint8)
    for wrong in (rows[:, :2], rows[..., :-1], rows.int(), rows.mT.contiguous().mT):
        with pytest.raises(ConfigError, match="rows"):
            encode(keys, values, A, mean, code, wrong)
    with pytest.raises(ConfigError, match="float64"):
        encode(keys, values, A.float(), mean, code, rows)
    with pytest.raises(ConfigError, match="alike"):
        encode(keys, values[:, :, :2], A, mean, code, rows)
    with pytest.raises(ConfigError, match="float16 or bfloat16"):
        encode(keys.double(), values.double(), A, mean, code, rows)
    with pytest.raises(ConfigError, match="visible"):
        Segment(code, rows, torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="heads"):
        recode(rows, code, rows, Code(2, 64, 2, g).kernel)


@pytest.mark.parametrize("scale_bytes", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 33, 63, 65])
def test_what_lies_in_new_memory_does_not_matter(monkeypatch, count, scale_bytes):
    heads, width = 2, 64
    code = KernelCode(torch.full((2, heads, 8), 3, dtype=torch.uint8), None, scale_bytes, P)
    buffer = torch.zeros(count * code.row_bytes + 16, dtype=torch.uint8)
    rows = buffer[: count * code.row_bytes].view(1, count, -1)
    keys, values, own = torch.randn(3, 1, heads, count, width)
    eye = torch.eye(width, dtype=torch.float64).expand(2, heads, width, width).contiguous()
    encode(keys, values, eye, torch.zeros(2, 1, heads, width).double(), code, rows)
    basis = Basis(eye.float(), torch.zeros(2, 1, heads, width))
    new = own[:, :, :1].contiguous()
    given = new, new, new, [Segment(code, rows)], basis, 0.1
    wanted, real = attend(*given), torch.empty

    def dirty(*shape, **settings):
        made = real(*shape, **settings)
        return made.fill_(255) if made.dtype == torch.uint8 else made.fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", dirty)
    assert torch.equal(attend(*given), wanted)
