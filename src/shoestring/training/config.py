"""The settings of one training run, as frozen dataclasses: no torch here.

A run is one TOML file with a table per section below. Reading refuses what it does not know:
an unknown key with the nearest known one, a wrong type, a value out of range, and settings that
do not go together. `RunConfig.to_toml` writes the resolved settings back, so that
`RunConfig.load` of what was written gives an equal config. The command line makes its dotted
flags (`--optim.lr 1e-3`) out of the same classes.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, nearest_divisors
from ..units import EXPECTED_BYTES, parse_bytes
from . import toml

Rule = Literal["residual", "feistel", "bdia", "random_sign", "midpoint", "leapfrog"]
TRACKERS = ("tensorboard", "trackio", "wandb")
PRESETS: dict[str, dict[str, int]] = {
    # name: depth, width and heads of our GPT; anything may be overridden by its own field
    "tiny": {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 2},
    "deep": {"num_hidden_layers": 32, "hidden_size": 128, "num_attention_heads": 4},
    "small": {"num_hidden_layers": 12, "hidden_size": 512, "num_attention_heads": 8},
    "gpt2": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
}


def _require(is_fine: bool, name: str, value: object, expected: str) -> None:
    if not is_fine:
        raise ConfigError(f"{name} = {value!r} cannot be used", expected=expected)


def _at_least(low: float, section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value is None or value >= low, f"{section}.{name}", value, f"{low} or more")


def _share(section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(0 <= value <= 1, f"{section}.{name}", value, "a share from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """Where the run is kept, how long it is, and what it may spend."""

    directory: str = "runs/run"
    """Folder that the run writes; made when missing."""
    seed: int = 0
    """Seed of weights, data order and dropout."""
    steps: int = 1000
    """Optimizer updates."""
    minutes: float = 0.0
    """Stop, evaluate and save after this many minutes of training, whatever is left; 0 = never."""
    device: str = "auto"
    """auto (CUDA when there is one, else CPU), cpu, cuda or cuda:N."""
    budget: str = "auto"
    """Peak bytes that training may use, such as 300MiB; auto = what the device has free, less a
    margin; none = no limit, nothing is planned."""
    allow: Literal["bitwise", "exact", "unbiased", "structural"] = "exact"
    """What the planner may change about the network as given: nothing (exact), the gradient in
    expectation only (unbiased), or the network or its objective (structural)."""
    sharding: Literal["none", "full"] = "none"
    """What a group of processes (torchrun) divides: nothing (none: every one holds everything), or
    weights, gradients and optimizer states (full)."""
    threads: int = 0
    """CPU threads; 0 = torch's own choice."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or a gradient is not finite: stop before the update, or skip that update (ten
    skips in a row stop the run all the same)."""
    replace: bool = False
    """Start anew in a directory that already holds a run, whose files are then lost."""

    def __post_init__(self) -> None:
        _require(bool(self.directory.strip()), "run.directory", self.directory, "a folder")
        _at_least(0, "run", self, "seed", "threads", "minutes")
        _at_least(1, "run", self, "steps")
        kind, _, index = self.device.partition(":")
        is_device = self.device in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdigit())
        _require(is_device, "run.device", self.device, "auto, cpu, cuda or cuda:N")
        if self.budget not in ("auto", "none"):
            try:
                parse_bytes(self.budget)
            except ConfigError as error:
                expected = f"auto, none, or {EXPECTED_BYTES}"
                raise ConfigError(f"run.budget: {error.what}", expected=expected) from None

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes; None for auto and none."""
        return None if self.budget in ("auto", "none") else parse_bytes(self.budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Our GPT from scratch (name empty), or a Hugging Face model (name given)."""

    name: str = ""
    """A Hugging Face model directory, or a model's name on the hub; empty = our GPT."""
    from_scratch: bool = False
    """With a name: take its config only and start from random weights."""
    rule: Rule = "residual"
    """How blocks pass on their stream: residual = the ordinary x + f(x); the others can be run
    backwards, so training stores no activations of the stack."""
    preset: str = "deep"
    """Depth, width and heads of our GPT: tiny, deep, small or gpt2."""
    hidden_size: int | None = None
    """Width; None = the preset's."""
    num_hidden_layers: int | None = None
    """Blocks; None = the preset's."""
    num_attention_heads: int | None = None
    """Heads; None = the preset's."""
    num_key_value_heads: int | None = None
    """Key and value heads; None = as many as heads."""
    intermediate_size: int | None = None
    """Width inside the MLP; None = 8/3 of the width, which in three matrices is 4 in two."""
    max_position_embeddings: int | None = None
    """Longest sequence; None = data.sequence_length."""
    dropout: float = 0.0
    """Share of activations zeroed while training."""
    tie_word_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""

    def __post_init__(self) -> None:
        known = ", ".join(PRESETS)
        _require(self.preset in PRESETS, "model.preset", self.preset, f"one of {known}")
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        _at_least(1, "model", self, *sizes, "intermediate_size", "max_position_embeddings")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a share below 1")
        if self.name:
            self._refuse_shape_of_named_model()
        else:
            _require(
                not self.from_scratch, "model.from_scratch", True, "model.name with it: our own "
                "GPT always starts from scratch",
            )  # fmt: skip
            self._check_shape()

    def _refuse_shape_of_named_model(self) -> None:
        for name in (*PRESETS["tiny"], "num_key_value_heads", "intermediate_size"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"model.{name} is set beside model.name = {self.name!r}",
                    expected="one of the two: a named model brings its own shape",
                )

    def _check_shape(self) -> None:
        shape = self.gpt_fields()
        width, heads = shape["hidden_size"], shape["num_attention_heads"]
        _require(
            width % (2 * heads) == 0, "model.hidden_size", width,
            f"a multiple of twice model.num_attention_heads = {heads} (rotary heads are even)",
        )  # fmt: skip
        groups = self.num_key_value_heads or heads
        _require(
            heads % groups == 0, "model.num_key_value_heads", groups, f"a divisor of {heads} heads"
        )

    def gpt_fields(self) -> dict[str, int]:
        """Shape of our GPT with the preset filled in; the sizes still None are left out."""
        names = (*PRESETS["tiny"], "num_key_value_heads", "intermediate_size")
        given = {name: getattr(self, name) for name in (*names, "max_position_embeddings")}
        return PRESETS[self.preset] | {k: v for k, v in given.items() if v is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where text comes from and how it is cut into batches."""

    source: str = "stdlib"
    """stdlib (Python's own standard library), a text, jsonl or parquet file, a folder of them, or
    hf:NAME, a Hugging Face dataset."""
    text_field: str = "text"
    """Column or key that holds the text in jsonl, parquet and Hugging Face data."""
    tokenizer: str = "auto"
    """auto (the named model's own; for our GPT one trained on the source), or the directory or
    name of a tokenizer."""
    vocabulary: int = 4096
    """Size of a tokenizer that is trained here."""
    sequence_length: int = 256
    """Tokens a row."""
    batch_size: int = 4
    """Rows a microbatch; an update sees optim.accumulate of them."""
    held_out: float = 0.02
    """Share of the documents kept out of training, for evaluation."""

    def __post_init__(self) -> None:
        _require(bool(self.source.strip()), "data.source", self.source, "a file, folder or name")
        _require(bool(self.tokenizer), "data.tokenizer", self.tokenizer, "auto or a directory")
        _require(bool(self.text_field), "data.text_field", self.text_field, "a column's name")
        _at_least(259, "data", self, "vocabulary")  # 256 bytes and 3 marks
        _at_least(2, "data", self, "sequence_length")
        _at_least(1, "data", self, "batch_size")
        _require(0 < self.held_out < 1, "data.held_out", self.held_out, "a share between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW (fused), clipping and gradient accumulation."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    lr: float = 1e-3
    """Learning rate at the top of the schedule."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors are not decayed."""
    grad_clip: float = 1.0
    """Largest norm of all gradients together; 0 = no clipping."""
    accumulate: int = 1
    """Microbatches whose gradients are summed before an update."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", self.lr, "more than 0")
        _require(self.eps > 0, "optim.eps", self.eps, "more than 0")
        _require(
            all(0 <= b < 1 for b in self.betas),
            "optim.betas",
            self.betas,
            "two shares from 0 to below 1",
        )
        _at_least(0, "optim", self, "weight_decay", "grad_clip")
        _at_least(1, "optim", self, "accumulate")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over the run, as shares of its steps."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine down to final_share; wsd = warm-up, stable, then linear decay; constant."""
    warmup_share: float = 0.05
    """Share of the steps that climb linearly from 0."""
    decay_share: float = 0.2
    """Share of the steps that decay at the end; wsd only."""
    final_share: float = 0.1
    """Learning rate at the end, as a share of optim.lr."""

    def __post_init__(self) -> None:
        _share("schedule", self, "warmup_share", "decay_share", "final_share")
        both = self.warmup_share + self.decay_share
        if self.kind == "wsd":
            _require(both <= 1, "schedule.decay_share", self.decay_share, "1 less warmup_share")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """Which numbers the step computes in; weights and optimizer stay float32."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 by autocast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Held-out loss and samples, taken at step 0, during the run, and at its end."""

    every: int = 0
    """Steps between evaluations; 0 = only at the start and the end."""
    batches: int = 8
    """Held-out microbatches an evaluation reads."""
    sample_tokens: int = 0
    """Tokens to sample after an evaluation; 0 = none."""

    def __post_init__(self) -> None:
        _at_least(0, "evaluate", self, "every", "sample_tokens")
        _at_least(1, "evaluate", self, "batches")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the run saves all that it needs to go on, bit for bit."""

    every: int = 0
    """Updates between two checkpoints; 0 = by the clock alone."""
    minutes: float = 10.0
    """Minutes between two checkpoints; 0 = by updates alone. With both 0 only an ending or
    interrupted run writes one."""
    keep: int = 2
    """How many to keep; should the newest turn out damaged, the one before it is used."""
    background: bool = False
    """Write from a copy while training goes on; the copy is counted in the plan."""

    def __post_init__(self) -> None:
        _at_least(0, "checkpoint", self, "every", "minutes")
        _at_least(1, "checkpoint", self, "keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackConfig:
    """Where metrics go besides metrics.jsonl."""

    to: tuple[str, ...] = ()
    """Trackers to report to as well: tensorboard, trackio, wandb; each is an extra to install."""
    project: str = "shoestring"
    """The project that trackers file the run under."""

    def __post_init__(self) -> None:
        for name in self.to:
            _require(name in TRACKERS, "track.to", name, f"some of {', '.join(TRACKERS)}")
        _require(len(set(self.to)) == len(self.to), "track.to", self.to, "each tracker once")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What the planner may choose from."""

    only: tuple[str, ...] = ()
    """Methods it may use; empty = every method that run.allow permits."""
    never: tuple[str, ...] = ()
    """Methods it may not use."""
    file: str = ""
    """A plan.json to apply as it is, in place of planning."""
    guard: bool = True
    """Stop the run when a measured peak exceeds the budget."""

    def __post_init__(self) -> None:
        both = sorted(set(self.only) & set(self.never))
        _require(not both, "plan.never", tuple(both), "methods that are not in plan.only")


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnsConfig:
    """Training one block of neighbouring layers at a time, all else frozen: block by block."""

    blocks: int = 0
    """How many blocks; a divisor of the model's layers. 0 = all weights are trained at once."""
    steps: int = 50
    """Updates of a turn; optimizer states begin anew with each."""
    order: Literal["random", "ascending", "descending"] = "random"
    """Whose turn is next: a new permutation for each round, or from the first or last layers on."""

    def __post_init__(self) -> None:
        _at_least(0, "turns", self, "blocks")
        _at_least(1, "turns", self, "steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiseConfig:
    """With [turns]: updates in which the block denoises the text alone (DiffusionBlocks)."""

    mode: Literal["off", "mixed", "both", "pure"] = "off"
    """off; mixed = every `every`-th update is of the next token, the others denoise; both = every
    update is the sum of the two; pure = every update denoises, which unlearns the model's own
    objective."""
    every: int = 2
    """mixed: how often the next token is learned."""
    weight: float = 1.0
    """Of the denoising loss."""
    sigma_min: float = 0.002
    """Lowest noise, on input embeddings at length 1."""
    sigma_max: float = 80.0
    """Highest noise."""
    sigma_mean: float = -1.2
    """Mean of ln sigma."""
    sigma_std: float = 1.2
    """Deviation of ln sigma."""
    overlap: float = 0.1
    """How far a block's levels reach into its neighbours', as a share of its own."""
    condition_size: int = 64
    """Width of the vector that a noise level becomes."""

    def __post_init__(self) -> None:
        _at_least(2, "denoise", self, "every")
        _at_least(1, "denoise", self, "condition_size")
        _require(0 < self.weight < math.inf, "denoise.weight", self.weight, "more than 0")
        ends = (self.sigma_min, self.sigma_max)
        _require(
            0 < ends[0] < ends[1] < math.inf, "denoise.sigma_min", ends[0],
            f"more than 0 and less than denoise.sigma_max = {ends[1]}",
        )  # fmt: skip
        _require(self.sigma_std > 0, "denoise.sigma_std", self.sigma_std, "more than 0")
        _require(0 <= self.overlap < 1, "denoise.overlap", self.overlap, "a share below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run: one table of the TOML file for each field."""

    run: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    denoise: DenoiseConfig = field(default_factory=DenoiseConfig)

    def __post_init__(self) -> None:
        longest = self.model.max_position_embeddings
        if longest is not None and longest < self.data.sequence_length:
            raise ConfigError(
                f"data.sequence_length = {self.data.sequence_length} is longer than "
                f"model.max_position_embeddings = {longest}",
                hint="Shorten the sequence or lengthen the model.",
            )
        if self.run.sharding != "none" and self.checkpoint.background:
            raise ConfigError(
                f"checkpoint.background is set beside run.sharding = {self.run.sharding!r}",
                expected="one of the two: the copy that is written from would be of everything "
                "that is divided, in one process",
            )
        self._check_turns()
        pretrained = bool(self.model.name) and not self.model.from_scratch
        if pretrained and self.model.rule != "residual" and self.run.allow != "structural":
            raise ConfigError(
                f"model.rule = {self.model.rule!r} makes another network out of {self.model.name}",
                expected='run.allow = "structural" with it',
                hint="Leave model.rule at residual to train the network as it is.",
            )

    def _check_turns(self) -> None:
        if not self.turns.blocks:
            if self.denoise.mode != "off":
                raise ConfigError(
                    f"denoise.mode = {self.denoise.mode!r} without turns.blocks",
                    expected="the number of blocks that the layers are divided into, and that are "
                    "trained in turns",
                )
            return
        beside = {
            "plan.file": bool(self.plan.file),
            "run.sharding": self.run.sharding != "none",
            "model.rule": self.model.rule != "residual",
            "checkpoint.background": self.checkpoint.background,
        }
        if wrong := [name for name, is_set in beside.items() if is_set]:
            raise ConfigError(
                f"{wrong[0]} is set beside turns.blocks = {self.turns.blocks}",
                expected="one of the two",
            )
        layers = self.model.gpt_fields()["num_hidden_layers"]
        if not self.model.name and layers % self.turns.blocks:
            raise ConfigError(
                f"turns.blocks = {self.turns.blocks} does not divide the {layers} layers",
                expected="a divisor of the layers",
                hint=f"The nearest: {nearest_divisors(layers, self.turns.blocks)}.",
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RunConfig":
        """The run described by a TOML file. ConfigError for anything that cannot be used."""
        toml.refuse(
            Path(path),
            "blockwise",
            "is a run of blocks, which is not planned or resumed",
            "shoestring train goes on with what was begun, and merge puts it together.",
        )
        return toml.read(Path(path), cls)

    def to_toml(self) -> str:
        """This config as TOML, every setting spelled out; settings that are None are left out."""
        return toml.write(self)
