"""Small sub-blocks and the comparison that most tests here make."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.methods.reversible import ReversibleStack

WIDTH = 16


class Attention(nn.Module):
    """Norm, causal attention with two heads, projection, dropout."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, 2, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, D)))


class MLP(nn.Module):
    """Norm, two linear layers with GELU between, dropout."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Network(nn.Module):
    """Linear -> ReversibleStack -> norm; scalar loss. `stored=True` keeps every activation."""

    def __init__(
        self,
        sub_blocks: list[nn.Module],
        *,
        stored: bool = False,
        scale: float = 1.0,
        **settings: object,
    ) -> None:
        super().__init__()
        width = sub_blocks[0].norm.normalized_shape[-1] if sub_blocks else WIDTH
        self.stem = nn.Linear(width, width)
        keep = {"keep_top": len(sub_blocks)} if stored else {}
        self.body = ReversibleStack(sub_blocks, **{**settings, **keep})
        self.head = nn.LayerNorm(width)
        with torch.no_grad():
            for p in self.body.parameters():
                if p.dim() == 2:
                    p *= scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        p, q = self.body(h, h)
        return (self.head(0.5 * (p + q)) * torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)).sum()


def sub_blocks(count: int, *, dropout: float = 0.0, width: int = WIDTH) -> list[nn.Module]:
    """Attention and MLP in turn; an odd count ends with attention."""
    return [(Attention, MLP)[i % 2](width, dropout) for i in range(count)]


def network(count: int = 6, *, seed: int = 1, dropout: float = 0.0, **settings) -> Network:
    torch.manual_seed(seed)
    return Network(sub_blocks(count, dropout=dropout), **settings)


def twins(count: int = 6, *, double: bool = False, **settings) -> tuple[Network, Network]:
    """The same network twice: run by reversal, and with stored activations."""
    streams = {"streams": "int64"} if double and "streams" not in settings else {}
    pair = (
        network(count, **streams, **settings),
        network(count, stored=True, **streams, **settings),
    )
    return tuple(net.double() for net in pair) if double else pair


def batch(*, seed: int = 7, double: bool = False, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8, width, generator=generator, dtype=torch.float64)
    return x if double else x.float()


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in net.named_parameters()}


def assert_equal_gradients(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit, and something was there to compare."""
    left, right = gradients(a), gradients(b)
    assert left.keys() == right.keys()
    for name, grad in left.items():
        other = right[name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name
    assert any(grad is not None and grad.abs().sum() > 0 for grad in left.values())


def run_seeded(step: Callable[[], Tensor], seed: int = 3) -> Tensor:
    """`step()` under a seed of its own, then backward."""
    torch.manual_seed(seed)
    loss = step()
    loss.backward()
    return loss.detach()
