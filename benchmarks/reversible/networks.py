"""The network that every row of the comparison trains, and the ways to run its body.

Input Linear(D, D) -> L x (attention, MLP) -> LayerNorm -> mean of squares. `plain` adds each
branch to one stream; every other body is the same two-stream network (both streams start from
the input, their mean is read out), with the same weights under one seed.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoestring.methods.chunked_mlp import ChunkedMlpConfig, slice_blocks
from shoestring.methods.reversible import ReversibleStack

# B batch, T tokens, D model width, H heads, L blocks of two sub-blocks each


class Attention(nn.Module):
    """LayerNorm, fused qkv, causal attention, projection; (B, T, D) -> (B, T, D)."""

    def __init__(self, D: int, H: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = H
        self.norm = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, D)))


class MLP(nn.Module):
    """LayerNorm, Linear D -> 4 D, GELU, Linear 4 D -> D."""

    def __init__(self, D: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, 4 * D)
        self.down = nn.Linear(4 * D, D)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Plain(nn.Module):
    """x + f(x), all kept; or one non-reentrant checkpoint per block."""

    def __init__(self, branches: list[nn.Module], *, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(pair) for pair in zip(branches[::2], branches[1::2], strict=True)
        )
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(self._block, block, x, use_reentrant=False)
            else:
                x = self._block(block, x)
        return x

    @staticmethod
    def _block(block: nn.ModuleList, x: Tensor) -> Tensor:
        for f in block:
            x = x + f(x)
        return x


class Ours(nn.Module):
    """ReversibleStack with the streams' mean read out."""

    def __init__(self, branches: list[nn.Module], **settings: Any) -> None:
        super().__init__()
        self.stack = ReversibleStack(branches, **settings)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.stack(x, x)
        return (p + q) * 0.5


class Stored(nn.Module):
    """Two float streams by the equations, every activation kept: the reference for gradients."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        p, q = x, x
        for f in self.branches:
            p, q = q, p + f(q)
        return (p + q) * 0.5


class Doubled(nn.Module):
    """A library's body, which takes the two streams side by side in the last dimension."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.body(torch.cat((x, x), dim=-1)).chunk(2, dim=-1)
        return (p + q) * 0.5


def pairs(branches: list[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    return list(zip(branches[::2], branches[1::2], strict=True))


def memcnn(branches: list[nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it decorates with names torch has deprecated
        from memcnn import AdditiveCoupling, InvertibleModuleWrapper
    wrapped = [
        InvertibleModuleWrapper(AdditiveCoupling(f, g, split_dim=2), keep_input=False)
        for f, g in pairs(branches)
    ]
    return Doubled(nn.Sequential(*wrapped))


def revlib(branches: list[nn.Module]) -> nn.Module:
    from revlib import ReversibleSequential

    return Doubled(ReversibleSequential(*branches, split_dim=2))


def revtorch(branches: list[nn.Module]) -> nn.Module:
    from revtorch import ReversibleBlock, ReversibleSequence

    blocks = [ReversibleBlock(f, g, split_along_dim=2) for f, g in pairs(branches)]
    return Doubled(ReversibleSequence(nn.ModuleList(blocks)))


def reformer(branches: list[nn.Module]) -> nn.Module:
    return Doubled(reformer_module().ReversibleSequence(pairs(branches)))


def reformer_module() -> ModuleType:
    """reformer_pytorch/reversible.py alone: the package itself imports more than it needs."""
    package = importlib.util.find_spec("reformer_pytorch")
    if package is None or not package.submodule_search_locations:
        raise ImportError("reformer-pytorch is not installed")
    path = Path(package.submodule_search_locations[0]) / "reversible.py"
    spec = importlib.util.spec_from_file_location("reformer_pytorch_reversible", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PEERS: dict[str, Callable[[list[nn.Module]], nn.Module]] = {
    "memcnn": memcnn,
    "revlib": revlib,
    "revtorch": revtorch,
    "reformer-pytorch": reformer,
}


def peer_version(name: str) -> str | None:
    """The installed version, or None: such a row is skipped with a note."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Network(nn.Module):
    """x (B, T, D) -> scalar loss. `way` names how the body is run (see `body`)."""

    def __init__(
        self, way: str, *, L: int, D: int, seed: int = 0, dropout: float = 0.0, **settings: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        slices = settings.pop("mlp_slices", 0)
        self.input = nn.Linear(D, D)
        branches = [kind(D, dropout=dropout) for _ in range(L) for kind in (Attention, MLP)]
        # In one order whatever the body calls them; a tuple is not registered a second time.
        self.branches = tuple(branches)
        if slices:
            slice_blocks(branches, ChunkedMlpConfig(slices=slices))
        self.norm = nn.LayerNorm(D)
        self.body = body(way, branches, settings)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        out = self.norm(self.body(self.input(x)))
        return (out if target is None else out - target).square().mean()


def body(way: str, branches: list[nn.Module], settings: dict[str, Any]) -> nn.Module:
    """The branches, run as `way` says."""
    if way == "plain":
        return Plain(branches)
    if way == "checkpoint":
        return Plain(branches, recompute=True)
    if way == "stored":
        return Stored(branches)
    if way == "ours":
        return Ours(branches, **settings)
    return PEERS[way](branches)
