"""Training of one arm: what comes out is a model that samples and scores as any merged one.

Blocks are jobs of `training/blockwise`, one after the other; end to end is such a job of one block.
*Greedy* trains the layers in runs, each on top of the frozen ones before it, with a readout of its
own and at all noise levels (greedy local losses: arXiv 1812.11446; 2101.10832, section 3). A frozen
run costs its forward, and no gradient, states or activations. The embedding and the condition are
the first run's; the readout that stays is the last one's. So what comes out is an ordinary network
of all layers. *Recomputed* is end to end with every layer's activations computed again in
backward: the same function, which is shown and not trained again.
"""

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...meter import Meter
from ...models.dit import Block, DiT
from ...models.dit_layers import Layer
from ...training.blockwise.config import (
    BlockDataConfig,
    BlockRunConfig,
    BlocksConfig,
    BlockwiseConfig,
    DenoiserConfig,
)
from ...training.blockwise.job import train_block
from ...training.blockwise.merging import Merged, load_merged, merge, objective_of
from ...training.blockwise.task import Task, task_of
from ...training.config import OptimConfig, ScheduleConfig
from ...training.optimizer import clip_, gradient_norm, optimizer_factory, set_learning_rate
from ...training.schedule import learning_rate
from .size import PARTS, Arm, Part, Size

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a part's data lie, and what its network and noise need to know of them."""

    part: Part
    path: str
    patch: int = 4
    data_std: float = 0.5
    held_out: float = 0.01


def config_of(source: Source, arm: Arm, size: Size, seed: int, directory: Path) -> BlockwiseConfig:
    """The run that an arm is; greedy and recomputed ones are of one block."""
    is_text = source.part == "text"
    steps = max(1, round(size.steps[source.part] * arm.share))
    return BlockwiseConfig(
        run=BlockRunConfig(directory=str(directory), seed=seed, steps=steps, device="cpu"),
        model=DenoiserConfig(
            num_hidden_layers=size.layers // arm.depth, hidden_size=size.width,
            num_attention_heads=size.heads, condition_size=size.condition, patch_size=source.patch,
        ),
        data=BlockDataConfig(
            source=source.path, sequence_length=size.length, held_out=source.held_out,
            batch_size=size.texts if is_text else size.batch,
        ),
        blockwise=BlocksConfig(
            blocks=arm.blocks if arm.kind == "blocks" else 1, spacing=arm.spacing,
            objective="masked" if is_text else "edm", data_std=source.data_std,
        ),
        optim=OptimConfig(lr=size.lr[PARTS.index(source.part)], weight_decay=0.01),
        schedule=ScheduleConfig(final_share=0.02),
    )  # fmt: skip


def trained(
    source: Source, arm: Arm, size: Size, seed: int, directory: Path
) -> tuple[Merged, Task, dict[str, Any]]:
    """(the model, its task, what training took). Goes on from what is in the directory.

    KeyboardInterrupt where a job was interrupted, after it was saved.
    """
    config = config_of(source, arm, size, seed, directory)
    task = task_of(config)
    is_fresh, started = not directory.exists(), time.process_time()
    make = _greedy if arm.kind == "greedy" else _blocks
    merged, facts = make(task, config, arm.blocks)
    # What an earlier process had done of the arm is not in this one's seconds.
    cpu = time.process_time() - started if is_fresh else None
    return merged, task, {**facts, "updates": config.run.steps, "cpu_seconds": cpu}


def _blocks(
    task: Task, config: BlockwiseConfig, blocks: int
) -> tuple[Merged, dict[str, Any]]:  # fmt: skip
    """Every block as a job."""
    receipts = []
    for block in range(1, blocks + 1):
        done = train_block(config, block, task=task)
        if done.status == "interrupted":
            raise KeyboardInterrupt(f"interrupted in block {block}; run it again to go on")
        receipts.append(done.receipt)
        gc.collect()
    peaks = [receipt["peak"] for receipt in receipts if receipt["peak"]]
    facts = {
        "parameters": receipts[0]["parameters"],
        "layers": config.model.num_hidden_layers // blocks,
        "seconds": sum(receipt["seconds"] for receipt in receipts),
        **_peak(*(peak["by_category"] for peak in peaks)),
    }  # fmt: skip
    return load_merged(merge([config.run.directory])), facts


def _peak(*by_category: Mapping[str, int]) -> dict[str, Any]:
    """The largest peak of some updates: weights, gradients, states and activations. What else is
    alive then, the data and a text's table, is the same in every arm and not counted."""
    if not by_category:
        return {"peak_bytes": None, "by_category": None}
    sums = [sum(found.values()) - found["other"] for found in by_category]
    return {"peak_bytes": max(sums), "by_category": dict(by_category[sums.index(max(sums))])}


# ---- greedy local losses -----------------------------------------------------------------------


def _greedy(
    task: Task, config: BlockwiseConfig, runs: int
) -> tuple[Merged, dict[str, Any]]:  # fmt: skip
    """All layers in `runs` runs, each with its own local loss and as many updates."""
    model = task.fresh(1, CPU)
    assert isinstance(model, DiT)
    net, every = model.block(1), list(model.block(1).layers)
    each = len(every) // runs
    peak: dict[str, Any] = {}
    started = time.monotonic()
    for run in range(runs):
        net.layers = nn.ModuleList(every[: (run + 1) * each])
        parameters = _own(net, run, each)
        peak = _train(task, net, parameters, config, first=run * config.run.steps)
    facts = {
        "parameters": sum(p.numel() for p in parameters), "layers": each,
        "seconds": time.monotonic() - started, **peak,
    }  # fmt: skip
    identity = task.identity()
    objective = objective_of(identity, model.config)
    return Merged(model.eval().requires_grad_(False), objective, identity), facts


def _own(net: Block, run: int, each: int) -> list[nn.Parameter]:
    """What run number `run` trains: its layers and a fresh readout, the first one the ends before
    them, too. The rest is frozen."""
    net.requires_grad_(run == 0)
    with torch.no_grad():
        net.modulation.weight.zero_()
        net.modulation.bias.zero_()
        net.head.weight.zero_()
        net.head.bias.zero_()
    for part in (*net.layers[run * each :], net.modulation, net.head):
        part.requires_grad_(True)
    return [p for p in net.parameters() if p.requires_grad]


def _train(
    task: Task, net: Block, parameters: list[nn.Parameter], config: BlockwiseConfig, *, first: int
) -> dict[str, Any]:
    """All updates of a run of layers; the peak of the second one."""
    optimizer = optimizer_factory(config.optim, CPU)(parameters)
    peak = _peak()
    for step in range(1, config.run.steps + 1):
        if step == 2:
            with Meter(net, optimizer) as meter:
                _update(task, net, parameters, optimizer, config, step, first)
            peak = _peak(meter.by_category)
        else:
            _update(task, net, parameters, optimizer, config, step, first)
    return peak


def _update(
    task: Task, net: Block, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer,
    config: BlockwiseConfig, step: int, first: int = 0,
) -> None:  # fmt: skip
    """As a job makes it. first: added to the step, for other draws."""
    rate = learning_rate(config.schedule, step, peak=config.optim.lr, steps=config.run.steps)
    set_learning_rate(optimizer, rate)
    task.step_loss(net, 1, first + step, 0).backward()
    clip_(parameters, float(gradient_norm(parameters)), config.optim.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---- recomputing -------------------------------------------------------------------------------


def recompute(net: Block) -> None:
    """Run every layer of a block under torch's checkpoint."""
    for layer in net.layers:
        assert isinstance(layer, Layer)
        plain = layer.forward
        layer.forward = (  # type: ignore[method-assign]
            lambda *args, plain=plain: checkpoint(
                plain, *args, use_reentrant=False, preserve_rng_state=False
            )
        )


def compared(source: Source, arm: Arm, size: Size, seed: int, directory: Path) -> dict[str, Any]:
    """End to end, plain and recomputed, some updates in turn: whether all weights are equal to the
    last bit, the peak of a recomputed update, and the ratio of the medians of their seconds."""
    config = config_of(source, arm, size, seed, directory)
    task = task_of(config)
    nets, optimizers = [], []
    for _ in range(2):
        model = task.fresh(1, CPU)
        assert isinstance(model, DiT)
        nets.append(model.block(1))
        optimizers.append(optimizer_factory(config.optim, CPU)(list(nets[-1].parameters())))
    recompute(nets[1])
    seconds: tuple[list[float], list[float]] = ([], [])
    for step in range(1, size.paired + 1):
        for net, optimizer, taken in zip(nets, optimizers, seconds, strict=True):
            started = time.monotonic()
            _update(task, net, list(net.parameters()), optimizer, config, step)
            taken.append(time.monotonic() - started)
    pairs = zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    equal = all(torch.equal(one, other) for one, other in pairs)
    del nets[0], optimizers[0]
    with Meter(nets[0], optimizers[0]) as meter:
        _update(task, nets[0], list(nets[0].parameters()), optimizers[0], config, size.paired + 1)
    plain, again = (statistics.median(taken) for taken in seconds)
    return {
        "equal": equal, "compared": size.paired, **_peak(meter.by_category),
        "seconds_ratio": again / plain,
        "parameters": sum(p.numel() for p in nets[0].parameters()),
        "layers": size.layers, "updates": config.run.steps,
    }  # fmt: skip
