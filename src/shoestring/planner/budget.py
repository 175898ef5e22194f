"""A budget in bytes: given, or what the device has free less a margin.

The budget counts live tensors, weights included. What a process needs beyond them is the
margin of `auto`:

CPU: what the C allocator adds to live tensors. With the mmap threshold set (as the command line
starts Python) the resident set peaks a few percent above them: 8 %. Without it glibc keeps freed
blocks and the resident set peaks up to 38 % above: 40 %. Free is the smaller of MemAvailable and
what every enclosing cgroup (v2 or v1) leaves. Both margins are measured.
CUDA: what is free once the context and the matrix library's workspaces exist (measured by
touching them first), plus what torch holds unused; 5 % for fragmentation, which is assumed.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..allocator import is_tuned
from ..cgroups import enclosing
from ..errors import ConfigError
from ..meter import tensors_in
from ..units import EXPECTED_BYTES, parse_bytes

CPU_MARGIN_TUNED = 0.08
CPU_MARGIN_DEFAULT = 0.40
CUDA_MARGIN = 0.05  # assumed, not measured


def budget_bytes(budget: int | str, model: nn.Module | None, device: torch.device) -> int:
    """Bytes of a budget: an int, "300 MiB", or "auto" (see `free_bytes`). ConfigError else."""
    if not isinstance(budget, str) or budget.strip().lower() != "auto":
        try:
            return parse_bytes(budget)
        except ConfigError as error:
            raise ConfigError(
                f"budget: {error.what}", expected=f"{EXPECTED_BYTES}, or auto"
            ) from None
    return automatic(resident_bytes(model, device), device)


def automatic(resident: int, device: torch.device) -> int:
    """What a training step may take: free memory, and what the model holds already, less the
    margin of the device."""
    if device.type == "cuda":
        return int((cuda_free_bytes(device) + resident) * (1 - CUDA_MARGIN))
    margin = CPU_MARGIN_TUNED if is_tuned() else CPU_MARGIN_DEFAULT
    return int((cpu_free_bytes() + resident) / (1 + margin))


def resident_bytes(model: nn.Module | None, device: torch.device) -> int:
    """Bytes of weights, buffers and gradients the model holds on the device, each once."""
    if model is None:
        return 0
    seen = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if part is not None and part.device.type == device.type:
                for plain in tensors_in((part,)):  # of a divided one, the part that is here
                    storage = plain.untyped_storage()
                    seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())


def cuda_free_bytes(device: torch.device) -> int:
    """Free bytes once context and workspaces exist, and what torch holds without using it."""
    probe = torch.zeros(64, 64, device=device, requires_grad=True)
    (probe @ probe).sum().backward()
    torch.cuda.synchronize(device)
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + held)


def cpu_free_bytes(root: Path = Path("/")) -> int:
    """Bytes this process may still take: the least of what the machine and its cgroups leave.

    `root` stands in for / in tests. ConfigError where the system tells nothing.
    """
    found = [*_machine(root), *(group.left_bytes for group in enclosing(root=root))]
    if not found:
        raise ConfigError(
            "budget = 'auto': this system does not tell how much memory is free",
            expected=EXPECTED_BYTES,
        )
    return max(0, min(found))


def _machine(root: Path) -> Iterator[int]:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
    except OSError:
        names = getattr(os, "sysconf_names", {})
        if root == Path("/") and "SC_AVPHYS_PAGES" in names:
            yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
