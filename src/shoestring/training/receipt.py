"""The receipt of a run: what was promised, what was measured, on what, from what.

Plain JSON. Bytes are bytes and seconds are seconds; what was not measured is null, never 0.
"""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LIBRARIES = ("shoestring", "torch", "transformers", "safetensors", "tokenizers")
_ALLOCATOR = ("MALLOC_", "LD_PRELOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware: what a number measured here depends on."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _LIBRARIES},
        },
        "hardware": {
            "device": _device_name(device),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "allocator": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ALLOCATOR)},
        },
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Name, size and rule of a model, for a receipt."""
    config = getattr(model, "config", None)
    rule = getattr(config, "rule", None)
    recorded = getattr(config, "shoestring", None)
    if not rule and isinstance(recorded, Mapping):
        rule = recorded.get("rule")
    return {
        "name": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rule": rule or "residual",
    }


def error_of(promised: float | None, measured: float | None) -> float | None:
    """(promised - measured) / measured: above 0 when less was taken than promised."""
    return None if promised is None or not measured else (promised - measured) / measured


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
