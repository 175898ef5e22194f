"""The settings of a block-wise run, as frozen dataclasses: no torch here.

A run file is block-wise when it has a table `[blockwise]`. Steps, schedule and learning rate are
those of *one* block: B blocks of 1000 steps make 1000 B updates in all.
"""

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import ConfigError, nearest_divisors
from .. import toml
from ..config import OptimConfig, ScheduleConfig, _at_least, _require, _share


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRunConfig:
    """Where the blocks are kept, and how long each is trained."""

    directory: str = "runs/blocks"
    """Folder that gets a folder for every block; made when missing."""
    seed: int = 0
    """Seed of weights, data order and noise, and of the table of a text."""
    steps: int = 1000
    """Updates of each block."""
    device: str = "auto"
    """auto (CUDA when there is one, else CPU), cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads; 0 = torch's own choice."""
    save_every: int = 0
    """Updates between two checkpoints; 0 = only at the end and when interrupted."""
    keep: int = 2
    """Checkpoints to keep of each block."""
    turn: int = 0
    """Without --block: updates of a block before the next one has its turn; 0 = all of them."""
    replace: bool = False
    """Start anew where a block has been trained before, which is then lost."""

    def __post_init__(self) -> None:
        _require(bool(self.directory.strip()), "run.directory", self.directory, "a folder")
        _at_least(0, "run", self, "seed", "threads", "save_every", "turn")
        _at_least(1, "run", self, "steps", "keep")
        kind, _, index = self.device.partition(":")
        is_device = self.device in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdigit())
        _require(is_device, "run.device", self.device, "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserConfig:
    """The shape of the whole diffusion transformer; what the data decide is not asked for."""

    num_hidden_layers: int = 12
    """Layers of all blocks together."""
    hidden_size: int = 384
    """Width."""
    num_attention_heads: int = 6
    """Heads."""
    intermediate_size: int | None = None
    """Width inside the MLP; None = 4 times the width."""
    condition_size: int = 128
    """Width of the vector that noise level and class become."""
    patch_size: int = 4
    """Pixels of a patch's side."""
    prelude_layers: int = 0
    """tokens in one block: layers that read a text once; those after them are run again at every
    noise level (recurrent depth). 0 = not recurrent."""
    coda_layers: int = 0
    """With prelude_layers: of the layers, the last ones, which are no part of the core."""
    diffusers: str = ""
    """Images: the config.json (or its folder) of a transformer of diffusers to train in blocks; it
    decides the shape, and the settings above do not count. Empty = a plain DiT."""
    weights: str = ""
    """With diffusers: the folder of safetensors files of the same model that blocks start from;
    a job reads its own block's weights only. Empty = fresh weights."""

    def __post_init__(self) -> None:
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        _at_least(1, "model", self, *names, "condition_size", "patch_size")
        _at_least(0, "model", self, "prelude_layers", "coda_layers")
        _require(
            self.hidden_size % self.num_attention_heads == 0, "model.hidden_size",
            self.hidden_size, f"a multiple of model.num_attention_heads = "
            f"{self.num_attention_heads}",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDataConfig:
    """Images from a safetensors file, or the bytes of a text."""

    source: str = "stdlib"
    """For images a safetensors file with `images` (N, C, H, W), bytes or floats in [-1, 1], and, if
    there are classes, `labels` (N,). For text stdlib, a text file, or a folder of them."""
    sequence_length: int = 256
    """Bytes of a text."""
    batch_size: int = 32
    """Images or texts a microbatch; an update sees optim.accumulate of them."""
    held_out: float = 0.1
    """Share kept out of training, for evaluation."""

    def __post_init__(self) -> None:
        _require(bool(self.source.strip()), "data.source", self.source, "a file, folder or name")
        _at_least(1, "data", self, "sequence_length", "batch_size")
        _require(0 < self.held_out < 1, "data.held_out", self.held_out, "a share between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlocksConfig:
    """How the network and the noise are divided."""

    blocks: int = 3
    """How many blocks; a divisor of model.num_hidden_layers."""
    objective: Literal["edm", "flow", "masked", "labels", "tokens"] = "edm"
    """edm or flow for images, masked for text, labels to classify images; tokens for text from left
    to right (experimental)."""
    spacing: Literal["equal", "uniform", "log", "useful"] = "equal"
    """Edges between the blocks' noise levels: equal shares of the training; evenly in the level or
    its logarithm; or equal shares of what the input tells beyond z (edm, flow, labels)."""
    overlap: float = 0.05
    """How far a block's training reaches into its neighbours' levels, as a share of its own."""
    sigma_min: float = 0.002
    """edm, labels, tokens: lowest noise."""
    sigma_max: float = 80.0
    """edm, labels, tokens: highest noise."""
    sigma_mean: float = -1.2
    """edm, labels, tokens: mean of ln sigma."""
    sigma_std: float = 1.2
    """edm, labels, tokens: deviation of ln sigma."""
    data_std: float = 0.5
    """edm: deviation of the images' values."""
    time_std: float = 0.0
    """flow: deviation of logit-normal times; 0 = uniform times."""
    alpha: Literal["linear", "cosine"] = "linear"
    """masked: how the share of unmasked tokens falls with time."""
    label_dropout: float = 0.1
    """edm, flow: share of the labels left out, which guidance needs."""
    top_share: float = 0.0
    """Share of block 1's draws that are at the highest noise, where a chain begins."""
    top_blocks: Literal["first", "all"] = "first"
    """labels: whose draws these are, block 1's or each block's."""
    context: str = ""
    """labels: a merged model of labels with one block (its directory, or its run), whose rows each
    block reads instead of the image; they are made once, and lie on disk. Empty = none."""
    sequential: bool = False
    """labels: a block reads the rows of the finished block before it, kept on disk, instead of the
    image. Blocks are then trained one after another."""
    chain_steps: int = 0
    """labels: further updates of a block, whose z come from the chain of the finished blocks before
    it; needed in order."""
    chain_rate: float = 0.3
    """Highest learning rate of these, as a share of optim.lr."""
    quiet_start: bool = False
    """labels: a block begins with a fixed row in which z is a tenth of what it else is. At high
    levels z is nothing but noise, which a small network may take long to see past."""
    within: Literal["keep", "recompute", "offload"] = "keep"
    """How a job runs its own block's layers: as they are, recomputed in backward, or with what
    backward needs moved to the CPU. All give the same bits."""
    beside: bool = True
    """tokens: noised rows begin with the clean row beside them, as the paper's do not."""
    mixed_every: int = 2
    """tokens: every so many updates one is of the ordinary next-token loss; 0 = none (pure), 1 =
    all (plain blocks, without a chain)."""
    table: str = ""
    """masked, labels, tokens: a safetensors file with the frozen `table` of unit rows (256 or
    classes, W); empty = one drawn from run.seed."""

    def __post_init__(self) -> None:
        _at_least(1, "blockwise", self, "blocks")
        _share("blockwise", self, "label_dropout", "top_share")
        _at_least(0, "blockwise", self, "chain_steps", "chain_rate")
        _require(0 <= self.overlap < 1, "blockwise.overlap", self.overlap, "a share below 1")
        _require(self.data_std > 0, "blockwise.data_std", self.data_std, "more than 0")
        _at_least(0, "blockwise", self, "time_std", "mixed_every")
        if self.spacing == "log" and self.objective not in ("edm", "labels", "tokens"):
            raise ConfigError(
                f"blockwise.spacing = 'log' with objective {self.objective!r}",
                expected="equal or uniform: its levels begin at 0",
            )
        if self.spacing == "useful" and self.objective in ("masked", "tokens"):
            raise ConfigError(
                f"blockwise.spacing = 'useful' with objective {self.objective!r}",
                expected="equal, uniform or log: it is for edm, flow and labels",
            )
        self._check_labels_only()
        if self.table and self.objective not in ("masked", "labels", "tokens"):
            raise ConfigError(
                f"blockwise.table is set with objective {self.objective!r}",
                expected="no table: images are their own targets",
            )

    def _check_labels_only(self) -> None:
        if self.objective != "labels":
            why = {
                "top_blocks": "first: later blocks' chains never are at the highest noise",
                "context": "no context: a model that draws has no input beside what it denoises",
                "sequential": "false: what a block would read is the noise that it denoises",
                "quiet_start": "false: what is denoised is all that a block reads",
                "chain_steps": "0: of a drawn image or text nobody knows what it should have been",
            }
            for name, expected in why.items():
                value = getattr(self, name)
                if value not in ("first", "", False, 0):
                    raise ConfigError(
                        f"blockwise.{name} = {value!r} with objective {self.objective!r}",
                        expected=expected, hint="It is for objective = 'labels'.",
                    )  # fmt: skip
        if self.context and self.sequential:
            raise ConfigError(
                "blockwise.context and blockwise.sequential are both set",
                expected="one of them: a block reads the encoder's rows, or those of the block "
                "before it",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockwiseConfig:
    """A whole block-wise run: one table of the TOML file for each field."""

    run: BlockRunConfig = field(default_factory=BlockRunConfig)
    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    data: BlockDataConfig = field(default_factory=BlockDataConfig)
    blockwise: BlocksConfig = field(default_factory=BlocksConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        layers, blocks = self.model.num_hidden_layers, self.blockwise.blocks
        objective = self.blockwise.objective
        if self.model.diffusers and objective not in ("edm", "flow"):
            raise ConfigError(
                f"model.diffusers with objective {objective!r}", expected="edm or flow: images"
            )
        if self.model.prelude_layers and objective != "tokens":
            raise ConfigError(
                f"model.prelude_layers with objective {objective!r}", expected="tokens"
            )
        if self.model.weights and not self.model.diffusers:
            raise ConfigError(
                "model.weights is set and model.diffusers is not", expected="both, or neither"
            )
        if layers % blocks and not self.model.diffusers:
            near = nearest_divisors(layers, blocks)
            raise ConfigError(
                f"blockwise.blocks = {blocks} does not divide model.num_hidden_layers = {layers}",
                expected="a divisor of the layers",
                hint=f"The nearest: {near}.",
            )
        if self.blockwise.sequential and 0 < self.run.turn < self.run.steps:
            raise ConfigError(
                f"run.turn = {self.run.turn} with blockwise.sequential",
                expected="0: a block is finished before the next one begins",
            )

    @property
    def updates(self) -> int:
        """Of each block in all."""
        return self.run.steps + self.blockwise.chain_steps

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "BlockwiseConfig":
        """The run described by a TOML file. ConfigError for anything that cannot be used."""
        return toml.read(Path(path), cls)

    def to_toml(self) -> str:
        """This config as TOML; settings that are None are left out."""
        return toml.write(self)


def is_blockwise(path: Path) -> bool:
    """Whether a run file has the table; False for one that cannot be read, which others report."""
    try:
        return "blockwise" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
