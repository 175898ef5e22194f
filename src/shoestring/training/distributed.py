"""Data-parallel training under torchrun: who am I, what is summed, how gradients are averaged.

One process is the same code with a world of one: every function below is then the identity.
Gloo carries CPU tensors, NCCL carries CUDA tensors. Gradients live in DDP's buckets
(`gradient_as_bucket_view`), so that averaging needs no second copy of them; or, with
run.sharding = "full", in the parts that `sharding` makes.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ..errors import CheckpointError, ConfigError, ShoestringError
from ..planner.division import Division
from .peers import Peers
from .sharding import rehearsed, shard


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device
    sharding: str = "none"
    peers: Peers | None = None

    @property
    def shards(self) -> bool:
        """Whether weights, gradients and optimizer states are divided over the processes."""
        return self.size > 1 and self.sharding != "none"

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum of small lists of numbers over all processes."""
        if self.size == 1:
            return values
        # float64 carries token counts exactly; NCCL needs the tensor on the device.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return list(map(float, total.tolist()))

    def share(self, text: str) -> str:
        """The first process's text, on all of them."""
        if self.size == 1:
            return text
        # As bytes in a tensor: torch's own way to send objects pickles them.
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(content)], device=self.device)
        dist.broadcast(length, src=0)
        if not self.is_first:
            content = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, src=0)
        return bytes(content.tolist()).decode()

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of every process, by rank, on the CPU. All have the same shape and dtype."""
        if self.size == 1:
            return [tensor.cpu()]
        mine = tensor.to(self.device)
        everybodys = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everybodys, mine)
        return [each.cpu() for each in everybodys]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training: averages gradients over the world in backward.

        Where the world shards the parameters are others afterwards: an optimizer comes later.
        """
        if self.size == 1:
            return model
        if self.shards:
            shard(model, init_device_mesh(self.device.type, (self.size,)))
            return model
        index = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=index, gradient_as_bucket_view=True)

    def rehearsal(self) -> contextlib.AbstractContextManager[Division | None]:
        """How a planner divides fake twins as `wrap` divides the model; None where it does not.
        All processes enter it together."""
        return rehearsed(self.size, self.device) if self.shards else contextlib.nullcontext()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(device: str, sharding: str = "none") -> Iterator[World]:
    """Join the processes that torchrun started, or stand alone; leaves the group it joined.

    PeerLost, in place of whatever came of it, where another process of the group is gone.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(rank=rank, size=size, device=chosen)
        return
    joins = not dist.is_initialized()
    if joins:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    alone = World(rank=rank, size=size, device=chosen, sharding=sharding)
    peers = Peers(rank, size, alone.share)
    failure: BaseException | None = None
    try:
        yield dataclasses.replace(alone, peers=peers)
        dist.barrier()  # who leaves while others still speak to it makes them fail
    except BaseException as error:
        failure = error
        if _is_news_of_a_loss(error, peers):
            failure = peers.error()
            raise failure from error
        raise
    finally:
        if joins and peers.lost is None:  # else it could wait for the one that is gone
            dist.destroy_process_group()
        peers.close(failure)


def _is_news_of_a_loss(error: BaseException, peers: Peers) -> bool:
    """Whether what failed here failed because another process is gone. What only libraries raise,
    and what came of it in a checkpoint, may be ahead of the news; all else that we raise has a
    reason of its own. A signal is what torchrun sends to those that are left."""
    if isinstance(error, ShoestringError) and not isinstance(error, CheckpointError):
        return False
    return peers.verdict() if isinstance(error, Exception) else peers.lost is not None


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device; ConfigError when it is not there."""
    has_cuda = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return torch.device("cpu")
    count = torch.cuda.device_count() if has_cuda else 0
    index = int(name.partition(":")[2] or local_rank) if name != "auto" else local_rank
    if index >= count:
        raise ConfigError(
            f"run.device = {name!r}: there is no CUDA device {index}",
            expected=f"cpu, or one of {count} CUDA devices" if count else "cpu: no CUDA device",
            hint="Start as many processes as there are devices." if local_rank else None,
        )
    return torch.device("cuda", index)
