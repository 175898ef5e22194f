"""All blocks in one process, one of them in memory at a time.

Between two turns a block's weights and optimizer states are in its checkpoint and nowhere else, so
what is held is what one job holds. What comes of it is bit for bit what the jobs give apart: every
draw of a step depends on the seed, the block and the step alone.
"""

import dataclasses
import gc
from pathlib import Path

from ...checkpoint import Lock, Store
from .config import BlockwiseConfig
from .job import Progress, Trained, folder_of, newest, remove, train_block
from .task import task_of


def train_every_block(
    config: BlockwiseConfig, *, progress: Progress | None = None
) -> list[Trained]:
    """Train all blocks, `run.turn` updates of one before the next has its turn (0: all of them).

    Returns how each ended; the list ends early, with the block it happened to, when interrupted.
    Raises what `train_block` raises.
    """
    task = task_of(config)
    config = cleared(config)
    ended: dict[int, Trained] = {}
    blocks = range(1, config.blockwise.blocks + 1)
    found = turns(config)
    # Where each block has one turn, there is none to pass over.
    made = {block: _made(config, block) if len(found) > 1 else 0 for block in blocks}
    for until in found:
        for block in blocks:
            if until <= made[block] and until < config.updates:
                continue  # a turn of an earlier time
            ended[block] = train_block(config, block, task=task, until=until, progress=progress)
            gc.collect()  # the block that just ended, before the next one is made
            if ended[block].asked:
                return list(ended.values())
    return list(ended.values())


def _made(config: BlockwiseConfig, block: int) -> int:
    """Updates that a block has made by its newest good checkpoint."""
    found, _ = newest(Store(folder_of(Path(config.run.directory), block) / "checkpoints"))
    return found.step if found else 0


def turns(config: BlockwiseConfig) -> list[int]:
    """Up to which update each block is trained when it has its turn. Updates along the chain come
    last and in one turn: they need the blocks before it as they stay."""
    steps = config.run.steps
    if not config.run.turn:
        return [config.updates]
    found = [min(until, steps) for until in range(config.run.turn, steps + config.run.turn,
                                                  config.run.turn)]  # fmt: skip
    return found if config.updates == steps else [*found, config.updates]


def cleared(config: BlockwiseConfig) -> BlockwiseConfig:
    """With `run.replace`, remove what was trained in its directory, blocks that this run does not
    have among it, and return settings that go on from what is there: nothing."""
    if not config.run.replace:
        return config
    for folder in sorted(Path(config.run.directory).glob("block-*")):
        if folder.name.removeprefix("block-").isdigit() and folder.is_dir():
            with Lock(folder):
                remove(folder)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, replace=False))
