"""Weights, gradients and optimizer states divided over a group of processes (FSDP2).

Every block of the stack is a unit of `torch.distributed.fsdp.fully_shard`, and what is left of
the model another: a unit's weights are gathered for the time it runs and divided again after it.
Tensors are divided along their first dimension as `torch.chunk` divides, so that a whole tensor is
the processes' parts one after the other: a checkpoint is written part by part, by the first
process, and is the same file that one process would have written.

Sums are forced to be sums, and divided afterwards: gloo and NCCL then do the same arithmetic.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..checkpoint.tensors import InParts
from ..errors import ConfigError
from ..planner.division import Division
from ..planner.ways import stack_of
from ..stack import Runner


class Gathering:
    """Stands in a block's instance `forward`, below whatever a plan puts there: a block that is
    run again to rebuild an input is run outside of its own forward and backward, where its weights
    are divided, and has to have them gathered."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self._forward, self._block = forward, cast(Any, block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or not is_divided(self._block):
            return self._forward(*args, **kwargs)
        self._block.unshard()
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._block.reshard()


def _make_gatherable(blocks: Sequence[nn.Module]) -> None:
    for block in blocks:
        runner, forward = None, vars(block).get("forward")
        while isinstance(forward, Runner):  # plans, and what makes up the network, stay above
            runner, forward = forward, forward.inner
        lowest = Gathering(block, forward or type(block).forward.__get__(block))
        if runner is None:
            block.__dict__["forward"] = lowest
        else:
            runner.inner = lowest


class _Gloo:
    """What FSDP2 sends over gloo, whose threads let go of a tensor a moment after they are done
    with it: here that moment is waited for, or memory would be taken by chance."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @contextlib.contextmanager
    def _let_go(self, tensor: Tensor) -> Iterator[None]:
        before, end = _references(tensor), time.monotonic() + 1
        yield
        while _references(tensor) > before and time.monotonic() < end:
            time.sleep(0)


class _Gather(_Gloo):
    """Gathers weights."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        if async_op:
            return gather(output_tensor, input_tensor, group=group, async_op=True)
        with self._let_go(output_tensor):  # the input is a part of it
            gather(output_tensor, input_tensor, group=group)
        return None


class _SumInPlace(_Gloo):
    """Sums divided gradients: gloo's own way is this one on a copy of them. What they are summed
    in is FSDP2's, and read by nobody afterwards."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any,
        async_op: bool = False,
    ) -> None:  # fmt: skip
        assert not async_op
        with self._let_go(input_tensor):
            dist.all_reduce(input_tensor, op=op, group=group)
        output_tensor.copy_(input_tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)])


def _references(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


class _HandOn:
    """What methods note on a block's hidden state, handed on to the tensor that FSDP2 puts in its
    place: `before` and `after` are hooks around FSDP2's own."""

    def __init__(self) -> None:
        self._given: list[Tensor] = []

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._given = _tensors(args, kwargs)

    def after(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given, self._given = self._given, []
        for old, new in zip(given, _tensors(args, kwargs), strict=True):
            if new is not old:
                for name in [n for n in vars(old) if n.startswith("_shoestring_")]:
                    # Not on both: what is noted may refer to the tensor it is noted on.
                    setattr(new, name, vars(old).pop(name))


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]


def shard(model: nn.Module, mesh: Any) -> None:
    """Divide the model's weights over a mesh of one dimension, in place; from here on the
    parameters are DTensors. ConfigError for what cannot be divided, before anything is."""
    from torch.distributed.fsdp import fully_shard

    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(
                f'run.sharding = "full" cannot divide {name}, which is a single number',
                expected="weights with at least one dimension",
                hint='Train with run.sharding = "none".',
            )
    # The carriers of a reversible stack are views that nobody changes in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view")
    blocks = stack_of(model).blocks
    _make_gatherable(blocks)
    for unit in (*blocks, model):
        whole: Any = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        whole.set_force_sum_reduction_for_comms(True)
        if mesh.device_type == "cpu":
            whole.set_custom_all_gather(_Gather())
            whole.set_custom_reduce_scatter(_SumInPlace())
    for block in blocks:
        hand_on = _HandOn()
        block.register_forward_pre_hook(hand_on.before, prepend=True, with_kwargs=True)
        block.register_forward_pre_hook(hand_on.after, with_kwargs=True)


@contextlib.contextmanager
def rehearsed(size: int, device: torch.device) -> Iterator[Division]:
    """How a planner divides fake twins: over a group of `size` that moves nothing. Within a group
    of processes all of them have to take part."""
    # Registers the backend "fake", which is what torch's own estimates of memory run on.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    group = dist.group.WORLD if alone else dist.new_group(backend="fake")
    try:
        # A name of its own: to DTensor's caches equal meshes are one, and this one goes.
        mesh = DeviceMesh.from_group(cast(Any, group), device.type, mesh_dim_names=("rehearsed",))
        yield Division(size=size, divide=lambda model: shard(model, mesh))
    finally:
        dist.destroy_process_group(None if alone else group)


def is_divided(module: nn.Module) -> bool:
    """Whether this process has only its part of the weights now."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is divided; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of_rank(rows: int, rank: int, size: int) -> tuple[int, int]:
    """(first row, one past the last) of a rank's part: `size` chunks, the last ones shorter."""
    chunk = -(-rows // size)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


def own_part(whole: Tensor, like: DTensor) -> Tensor:
    """This process's rows of a whole tensor, as `like` is divided: a view."""
    mesh = like.device_mesh
    first, stop = rows_of_rank(len(whole), mesh.get_local_rank(), mesh.size())
    return whole[first:stop]


def divided(whole: Tensor, like: DTensor) -> DTensor:
    """A whole tensor, divided as `like` is; the part is a copy on the device of `like`."""
    part = own_part(whole, like).to(like.device, copy=True)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False,
        shape=like.shape, stride=like.stride(),
    )  # fmt: skip


class Spread(InParts):
    """A divided tensor, for a writer on the first process: the parts of one rank after the other,
    each there only while it is written.

    All processes take part, each with its tensors in the same order: the first calls `parts`, the
    others `finish`. The first calls `finish` too, whatever became of its writing: the others would
    else wait for somebody to take their parts.
    """

    def __init__(self, tensor: DTensor) -> None:
        self.shape, self.dtype, self.layout = tensor.shape, tensor.dtype, torch.strided
        self._local = tensor.to_local().detach()
        self._rank, self._size = tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()
        self._next = 0  # the rank whose part comes next

    def parts(self) -> Iterator[Tensor]:
        """On the first process: what is left of the parts, in order."""
        assert self._rank == 0
        while self._next < self._size:
            rank = self._next
            self._next += 1
            yield self._local if rank == 0 else self._from(rank)

    def _from(self, rank: int) -> Tensor:
        first, stop = rows_of_rank(self.shape[0], rank, self._size)
        part = self._local.new_empty((stop - first, *self.shape[1:]))
        if part.numel():
            dist.recv(part, src=rank)
        return part

    def finish(self) -> None:
        """On the first process: take what it did not; on the others: hand over the part."""
        if self._rank == 0:
            for _ in self.parts():
                pass
        elif not self._next:
            self._next = self._size
            if self._local.numel():
                dist.send(self._local.contiguous(), dst=0)


def finish(spread: Sequence[Spread]) -> None:
    """`Spread.finish` of all, in order."""
    for each in spread:
        each.finish()
