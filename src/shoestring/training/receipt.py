"""The receipt of a run: what was promised, what was measured, on what, from what.

Plain JSON. Bytes are bytes and seconds are seconds; what was not measured is null, never 0.
"""

import os
import platform
import statistics
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.tokenizer import tokenizer_digest
from ..objectives.scaffolding import taken_out
from .distributed import World

if TYPE_CHECKING:
    from .job import Job

_LIBRARIES = ("shoestring", "torch", "transformers", "safetensors", "tokenizers")
_ALLOCATOR = ("MALLOC_", "LD_PRELOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def receipt_of(job: "Job", status: str, error: str | None) -> dict[str, Any]:
    """The receipt of a run that ends with a status such as "finished"."""
    promised = job.plan.peak_bytes if job.plan else None
    promised_s = job.plan.step_seconds if job.plan else None
    measured = job.budget.peak_bytes
    measured_s = statistics.median(job.step_seconds) if job.step_seconds else None
    return {
        "status": status,
        "error": error,
        "steps": job.updates,
        "seed": job.config.run.seed,
        "processes": job.world.size,
        "model": describe_model(job.model),
        "data": {
            "source": job.config.data.source,
            "digest": job.data.corpus.digest,
            "tokenizer": tokenizer_digest(job.data.tokenizer),
            "tokens": job.data.corpus.num_tokens,
            "epochs": job.batches.epoch,
        },
        "memory": {
            "budget_bytes": job.limit_bytes,
            "promised_bytes": promised,
            "measured_bytes": measured,
            "error": error_of(promised, measured),
            "promised_by_category": dict(job.plan.by_category) if job.plan else None,
            "measured_by_category": job.budget.by_category,
            "rss_growth_bytes": job.budget.rss_peak_bytes,
        },
        "seconds": {
            "promised_step": promised_s,
            "measured_step": measured_s,
            "error": error_of(promised_s, measured_s),
            "training": job.seconds,
            "total": time.monotonic() - job.started,
        },
        "methods": job.plan.methods if job.plan else [],
        "quality": {
            when: result.to_json() if result else None for when, result in job.quality.items()
        },
        **environment(job.world.device),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware: what a number measured here depends on."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: library_version(name) for name in _LIBRARIES},
        },
        "hardware": {
            "device": _device_name(device),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "allocator": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ALLOCATOR)},
        },
    }


def machine(world: World) -> dict[str, Any]:
    """What the last bits of a sum depend on, besides what the run's settings say."""
    found = environment(world.device)
    return {
        "device": found["hardware"]["device"],
        "threads": found["hardware"]["threads"],
        "processes": world.size,
        "torch": found["versions"]["torch"],
        "transformers": found["versions"]["transformers"],
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Name, size and rule of a model, for a receipt."""
    config = getattr(model, "config", None)
    rule = getattr(config, "rule", None)
    recorded = getattr(config, "shoestring", None)
    if not rule and isinstance(recorded, Mapping):
        rule = recorded.get("rule")
    with taken_out(model):
        parameters = sum(p.numel() for p in model.parameters())
    return {
        "name": type(model).__name__.removeprefix("FSDP"),  # what sharding makes of a class
        "parameters": parameters,
        "rule": rule or "residual",
    }


def error_of(promised: float | None, measured: float | None) -> float | None:
    """(promised - measured) / measured: above 0 when less was taken than promised."""
    return None if promised is None or not measured else (promised - measured) / measured


def library_version(name: str) -> str | None:
    """The version that is installed; None without one."""
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
