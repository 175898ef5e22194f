"""Attention over rows of codes by Triton is that over what they decode to."""

import importlib.util
import os
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not CUDA:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported before it could be interpreted", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

from shoestring.errors import ConfigError  # noqa: E402
from shoestring.ops.row_triton import TritonCode, TritonSegment, attend  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
# x, and a bend that tells the three coefficients apart
P = torch.tensor([[1.0, 0.5, 0.25]] * 9, dtype=torch.float64)


def decoded(bits, scale_bytes, rows):
    """rows (B, n, row_bytes) -> (2, B, H, n, d) float64, from the definition of a row."""
    (_, H, g), (B, n, size) = bits.shape, rows.shape
    z = torch.zeros(2, B, H, n, 8 * g, dtype=torch.float64)
    at, first_scale = 0, size - 2 * H * scale_bytes
    for side in range(2):
        for head in range(H):
            start = first_scale + (side * H + head) * scale_bytes
            stored = rows[..., start : start + scale_bytes].contiguous()
            scale = stored[..., 0].double()
            scale = torch.where(scale == 0, 0.0, torch.exp2((scale - 128) / 16))
            if scale_bytes == 2:
                scale = stored.view(torch.float16)[..., 0].double()
            for group in range(g):
                b = int(bits[side, head, group])
                word = sum(rows[..., at + j].long() << (8 * j) for j in range(b))
                at += b
                for i in range(8 if b else 0):
                    x = (((word >> (i * b)) & (2**b - 1)) - (2**b - 1) / 2) / 2 ** (b - 1)
                    level = x * (1 + x**2 * (0.5 + 0.25 * x**2))
                    z[side, :, head, :, 8 * group + i] = scale * level
    return z


def random_rows(bits, scale_bytes, B, n, g):
    size = int(bits.sum()) + 2 * bits.shape[1] * scale_bytes
    rows = torch.randint(0, 256, (B, n, size), generator=g).to(torch.uint8)
    scales = torch.rand(B, n, 2 * bits.shape[1], generator=g).half().view(torch.uint8)
    if scale_bytes == 1:
        scales = torch.randint(0, 130, (B, n, 2 * bits.shape[1]), generator=g).to(torch.uint8)
    rows[..., int(bits.sum()) :] = scales
    return rows


@pytest.mark.parametrize("scale_bytes", [1, 2])
@pytest.mark.parametrize(("B", "H", "G", "d", "n"), [(1, 3, 3, 64, 70), (2, 1, 1, 80, 600)])
def test_attention_is_that_over_what_rows_decode_to(B, H, G, d, n, scale_bytes):
    g = torch.Generator().manual_seed(d + scale_bytes)
    bits = torch.randint(0, 9, (2, H, d // 8), generator=g).to(torch.uint8)
    rows = random_rows(bits, scale_bytes, B, n, g)
    raw = torch.randn(B, 9, 2 * H * d, generator=g)
    seen = torch.tensor([[3, n - 2], [0, n + 5]])[:B]
    inverse, mean = torch.randn(2, H, d, d, generator=g) / d**0.5, torch.randn(2, B, H, d)
    q = torch.randn(B, H * G, 1, d, generator=g)
    own = torch.randn(2, B, H, 1, d, generator=g)
    code = TritonCode.of(bits, scale_bytes, P, DEVICE)
    segments = [
        TritonSegment(code, rows.to(DEVICE), seen.to(DEVICE)),
        TritonSegment(None, raw.to(DEVICE)),
    ]
    found = attend(
        q.to(DEVICE), *own.to(DEVICE).unbind(0), segments, inverse.to(DEVICE), mean.to(DEVICE), 0.2
    ).cpu()

    z = decoded(bits, scale_bytes, rows) @ inverse.double().mT[:, None]
    z = z + mean.double()[..., None, :]
    plain = raw.double().view(B, 9, 2, H, d).permute(2, 0, 3, 1, 4)
    both = torch.cat([z, plain, own.double()], 3).repeat_interleave(G, 2)
    at = torch.arange(n)
    hidden = (at < seen[:, :1]) | (at >= seen[:, 1:])
    scores = q.double() @ both[0].mT * 0.2
    scores[..., :n].masked_fill_(hidden[:, None, None], -torch.inf)
    wanted = (scores.softmax(-1) @ both[1]).transpose(1, 2)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_without_rows_only_the_token_itself_is_seen():
    bits = torch.full((2, 2, 8), 3, dtype=torch.uint8)
    code = TritonCode.of(bits, 2, P, DEVICE)
    q, k, v = torch.randn(3, 1, 2, 1, 64, device=DEVICE).unbind(0)
    none = torch.zeros(1, 0, code.row_bytes, dtype=torch.uint8, device=DEVICE)
    raw = torch.zeros(1, 0, 2 * 2 * 64, device=DEVICE)
    one = torch.eye(64, device=DEVICE).repeat(2, 2, 1, 1)
    mean = torch.zeros(2, 1, 2, 64, device=DEVICE)
    segments = [TritonSegment(code, none), TritonSegment(None, raw)]
    found = attend(q, k, v, segments, one, mean, 1.0)
    torch.testing.assert_close(found, v.transpose(1, 2))


def test_what_does_not_fit_is_refused():
    bits = torch.full((2, 1, 8), 3, dtype=torch.uint8)
    one, mean = torch.eye(64).repeat(2, 1, 1, 1), torch.zeros(2, 1, 1, 64)
    q = torch.zeros(1, 1, 2, 64)
    with pytest.raises(ConfigError, match="2 queries"):
        attend(q, q, q, [], one, mean, 1.0)
    code = TritonCode.of(bits, 2, P, "cpu")
    wrong = TritonSegment(code, torch.zeros(1, 4, code.row_bytes + 1, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="bytes"):
        attend(q[:, :, :1], q[:, :, :1], q[:, :, :1], [wrong], one, mean, 1.0)
    with pytest.raises(ConfigError, match="1 or 2"):
        TritonCode.of(bits, 3, P, "cpu")
    with pytest.raises(ConfigError, match="0 to 8"):
        TritonCode.of(bits + 9, 2, P, "cpu")
