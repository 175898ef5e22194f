"""What each of two processes does for test_distributed; imported afresh by both."""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from reversible.small import Network, batch, network

STEPS = 3


def plain(net: Network) -> nn.Module:
    return DistributedDataParallel(net)


def static_graph(net: Network) -> nn.Module:
    return DistributedDataParallel(net, static_graph=True)


def find_unused(net: Network) -> nn.Module:
    for block in net.body.sub_blocks:
        block.spare = nn.Parameter(torch.ones(3))
    return DistributedDataParallel(net, find_unused_parameters=True)


def sharded(net: Network) -> nn.Module:
    """FSDP2 on every sub-block, and on the whole."""
    mesh = init_device_mesh("cpu", (2,))
    for block in net.body.sub_blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


MODES: dict[str, Callable[[Network], nn.Module]] = {
    "DDP": plain,
    "DDP with a static graph": static_graph,
    "DDP looking for unused parameters": find_unused,
    "FSDP2 on every sub-block": sharded,
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(wrap: Callable[[Network], nn.Module], rank: int, *, stored: bool) -> dict[str, Tensor]:
    """Parameters after a few steps, every rank on data of its own, with dropout."""
    net = wrap(network(4, stored=stored, dropout=0.2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for step in range(STEPS):
        optimizer.zero_grad()
        net(batch(seed=10 * step + rank)).backward()
        optimizer.step()
    return {name: whole(p).detach() for name, p in net.named_parameters()}


def compare(mode: str, rank: int) -> str:
    """ "" when reversal gives what stored activations give, else what differs."""
    ours, stored = (train(MODES[mode], rank, stored=s) for s in (False, True))
    start = dict(network(4).named_parameters())
    different = [n for n, p in ours.items() if not torch.equal(p, stored[n])]
    moved = [n for n in start if not torch.equal(start[n], ours.get(n, ours.get(f"module.{n}")))]
    if different:
        return f"differ: {different}"
    return "" if len(moved) > len(start) // 2 else f"only {moved} moved"


def work(rank: int, folder: str) -> None:
    """Every mode in turn; what was found goes to a file."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = {}
    for mode in MODES:
        try:
            found[mode] = compare(mode, rank)
        except Exception:
            found[mode] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
