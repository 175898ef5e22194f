"""reversible: keep nothing per block, reconstruct every input from the streams above it.

Idea: two residual streams updated in turn can be walked backwards, so backward needs only the
last pair. Streams are fixed-point integers, so the walk is exact at any depth and whatever dtype
the blocks compute in: gradients are bit-identical to storing everything (`rules.py` has the
rules, `streams.py` the engine).
Equations: x[k+1] = A x[k-1] + B x[k] + C f_k(x[k]); Feistel: A = 1, B = 0, C = 1.
Memory: 4 n elements for the streams and their gradients plus one sub-block's inside, whatever
the depth; BDIA n/8 bytes per step more.
Time: one more forward of every block but the `keep_top` last ones.
Exactness: bitwise, against the same network with stored activations. *Running* a reversible
network so is exact; *making* a plain network reversible (`shoestring.reversible`) is structural:
another function is trained, except in the mean for bdia and random_sign, which are served plain.
Limits: hidden states between the blocks are not there to be read (output_hidden_states is
refused); whole-layer rules on 16-bit weights use the layer's branches instead, where `f(x) =
layer(x) - x` would cancel.
Source: arXiv 1707.04585, 2407.09093, 2512.02056; fixed point after Maclaurin et al. (ICML 2015).
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..branches import roles_of, split
from ..conversion import ConversionReport, Trial, measure_conversion
from ..errors import ConfigError, StackError, closest
from ..ops.fixed_point import DEFAULT_SCALE_BITS, Grid
from ..rules import RULES, Rule
from ..stack import BlockCall, Executor, Runner, Stack, hidden_of, uncompiled, with_hidden
from ..streams import StreamRun
from ..tape import RandomState, frozen_statistics
from .base import Method, Promises

log = logging.getLogger("shoestring")
Streams = Literal["int32", "int64", "float32", "float64"]


def rule_named(name: str) -> Rule:
    """The rule of that name. ConfigError names the nearest one."""
    if name not in RULES:
        raise ConfigError(
            f"rule = {name!r}", expected=f"one of {list(RULES)}", hint=closest(name, RULES)
        )
    return RULES[name]


def first_scale_bits(streams: str, scale_bits: int | str) -> int:
    """The k to begin with; 'auto' begins at the default and is calibrated by what is seen."""
    if scale_bits == "auto":
        return DEFAULT_SCALE_BITS.get(streams, 0)
    if not isinstance(scale_bits, int):
        raise ConfigError(f"scale_bits = {scale_bits!r}", expected="an integer, or 'auto'")
    return scale_bits


def recalibrated(streams: str, scale_bits: int, amax: float) -> int:
    """The k for the next pass after the largest value `amax` was seen. Finer only when much is
    to be won (8 bits), coarser as soon as less than a factor 4 is left."""
    best = Grid.calibrated(streams, amax)
    return best if best < scale_bits - 1 or best > scale_bits + 8 else scale_bits


class ReversibleStack(nn.Module):
    """Sub-blocks f_0, f_1, ... run as a reversible network: (p, q) -> (q, p + f_k(q)), in turn.

    Called as `stack(p, q) -> (p, q)`, tensors of one shape (batch, ..., width). Each sub-block
    maps the stream's shape to itself, its own norm included and no skip inside. For two-step
    rules p is x[-1] and q is x[0]; pass the same tensor twice to start from one.

    rule: "feistel", "midpoint", "leapfrog", "bdia" or "random_sign".  streams: "int32" (exact),
    "int64" (exact, for float64 sub-blocks), or "float32"/"float64" (inexact, for study).
    scale_bits: k of the grid 2^-k; "auto" calibrates it by a first pass without gradients and
    keeps it in the state dict.  keep_top: so many last sub-blocks keep their graph.
    hold_outputs: indices of sub-blocks whose output is held (n elements each), so that the replay
    of each ends before its last matrix product; worth it where that product is large.  verify:
    compare checksums of every reconstructed stream (16 bytes a sub-block).
    Raises StreamOverflow, TrainingDiverged, ReplayMismatch (verify), ConfigError.
    """

    def __init__(
        self,
        sub_blocks: Iterable[nn.Module],
        rule: str = "feistel",
        streams: Streams = "int32",
        scale_bits: int | Literal["auto"] = "auto",
        *,
        keep_top: int = 0,
        hold_outputs: Iterable[int] = (),
        verify: bool = False,
    ) -> None:
        super().__init__()
        self.sub_blocks = nn.ModuleList(sub_blocks)
        self.rule = rule_named(rule)
        self.auto = scale_bits == "auto"
        self.calibrated = False
        self.grid = Grid(streams, first_scale_bits(streams, scale_bits))
        self.keep_top = keep_top
        self.hold_outputs = frozenset(hold_outputs)
        self.verify = verify
        if not 0 <= keep_top <= len(self.sub_blocks):
            raise ConfigError(
                f"keep_top = {keep_top}", expected=f"0 to {len(self.sub_blocks)} sub-blocks"
            )

    @property
    def scale_bits(self) -> int:
        return self.grid.scale_bits

    @uncompiled
    def forward(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        for name, x in (("p", p), ("q", q)):
            if not x.is_floating_point() or x.shape != q.shape:
                raise StackError(
                    f"stream {name} has dtype {x.dtype} and shape {tuple(x.shape)}",
                    expected=f"floating point and shape {tuple(q.shape)}",
                )
        if self.auto and not self.calibrated and q.numel() and not isinstance(q, FakeTensor):
            self._calibrate(p, q)
        watch = self.auto and q.device.type == "cpu"
        run = StreamRun(
            self.rule, self.grid, training=self.training, verify=self.verify, watch=watch
        )
        if self.auto and torch.is_grad_enabled():
            run.tape.measured = self._measured
        run.start(p, q)
        replayed = len(self.sub_blocks) - self.keep_top if torch.is_grad_enabled() else 0
        for k, f in enumerate(self.sub_blocks):
            run.step(f, f, replay=k < replayed, hold_output=k in self.hold_outputs)
        return run.finish()

    def _measured(self, amax: float, in_range: bool) -> int:
        self._rescale(recalibrated(self.grid.streams, self.scale_bits, amax))
        if not in_range:
            self.calibrated = False  # what came after the first value too large is not known
        return self.scale_bits

    def _calibrate(self, p: Tensor, q: Tensor) -> None:
        """A pass without gradients on wide float streams; random numbers and norm statistics
        are as if it had not been."""
        if self.grid.exact:
            wide = Grid("float64" if self.grid.streams == "int64" else "float32")
            run = StreamRun(self.rule, wide, training=self.training)
            with torch.no_grad(), RandomState(q).restored(), frozen_statistics(self):
                run.start(p, q)
                for f in self.sub_blocks:
                    run.step(f, None, replay=False)
                amax = float(torch.stack(run.tape.sizes).max())
            if amax == amax and amax != float("inf"):
                self._rescale(Grid.calibrated(self.grid.streams, amax))
        self.calibrated = True

    def _rescale(self, scale_bits: int) -> None:
        if scale_bits != self.scale_bits and self.grid.exact:
            log.info("reversible streams: scale_bits %d -> %d", self.scale_bits, scale_bits)
            self.grid = Grid(self.grid.streams, scale_bits)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.scale_bits, int(self.calibrated)])

    def set_extra_state(self, state: Tensor) -> None:
        self.grid = Grid(self.grid.streams, int(state[0]))
        self.calibrated = bool(state[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class ReversibleConfig:
    """How a reversible stack is run."""

    keep_top: int = 0
    """So many last blocks keep their graph: less time, more memory."""
    hold_outputs: int = 0
    """In so many blocks below those, the last branch's output is held: its last matrix product
    is not run again, for n elements a block."""
    verify: bool = False
    """Compare a checksum of every reconstructed stream."""


class ReversibleExecutor(Executor):
    """Runs the layers of a model as a reversible network.

    `info` (JSON-able, shared with `model.config.shoestring`) says which: rule, streams,
    scale_bits, auto, branches (each layer is two sub-blocks) or whole layers.
    """

    always = True
    compiles = False  # the streams travel on the hidden state, which Dynamo does not follow

    def __init__(
        self, info: dict[str, Any], count: int, config: ReversibleConfig = ReversibleConfig()
    ) -> None:
        self.info = info
        self.count = count
        self.config = config
        self.rule = rule_named(info["rule"])
        # Whether a whole pass was in range: until then every size is read as it comes.
        self.settled = False

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        hidden = call.hidden
        assert hidden is not None
        call.hidden = None
        if self.rule.draws and not block.training:
            return call(hidden)  # served and evaluated as the plain network
        if not self.info["branches"]:
            _refuse_16_bit_differences(block, hidden)
        run = self._begin(block, hidden) if position == 0 else _run_of(hidden, position)
        if position:
            run.cur_carrier = hidden  # the same, unless a hook put itself into its graph (FSDP2)
        first_kept = self.count - self.config.keep_top
        replay = torch.is_grad_enabled() and position < first_kept
        hold = position >= first_kept - self.config.hold_outputs
        if self.info["branches"]:
            attention, mlp = split(block, call)
            run.step(attention, block, replay=replay)
            run.step(mlp, block, replay=replay, hold_output=hold)
            output: Any = (hidden,) if self.info["tuple"] else hidden
        else:
            output = run.step(_Difference(call), block, replay=replay, hold_output=hold)
        if position < self.count - 1:
            # The next layer finds the run on the carrier; nothing else may look at its values.
            following = run.cur_carrier
            following._shoestring_run = (run, position + 1)
        else:
            following = self._finish(run)
        return with_hidden(output, following)

    def _begin(self, block: nn.Module, hidden: Tensor) -> StreamRun:
        grid = Grid(self.info["streams"], self.info["scale_bits"])
        run = StreamRun(
            self.rule,
            grid,
            training=block.training,
            verify=self.config.verify,
            watch=self.info["auto"] and (hidden.device.type == "cpu" or not self.settled),
        )
        if self.info["auto"] and grid.exact and torch.is_grad_enabled():
            run.tape.measured = self._measured
        run.start(hidden, hidden)
        return run

    def _measured(self, amax: float, in_range: bool) -> int:
        bits = recalibrated(self.info["streams"], self.info["scale_bits"], amax)
        self.info["scale_bits"] = bits
        self.settled = in_range
        return bits

    def _finish(self, run: StreamRun) -> Tensor:
        prev, cur = run.finish()
        return (prev + cur) * 0.5 if self.rule.name == "feistel" else cur


def _refuse_16_bit_differences(block: nn.Module, hidden: Tensor) -> None:
    """layer(x) - x cancels in 16 bits, and a stored twin would err alike: no test sees it."""
    for what, tensors in (("weights", block.parameters()), ("hidden state", (hidden,))):
        low = next((t.dtype for t in tensors if t.dtype in _16_BIT), None)
        if low is not None:
            raise StackError(
                f"{type(block).__name__} has {what} of {low}, and this model was made reversible "
                "by whole layers, f(x) = layer(x) - x, whose error is then 15 %",
                expected="float32, or float32 under torch.autocast",
                hint="Call shoestring.methods.reversible.restore(model), convert it to 16 bits, "
                "then call reversible again: it will use the layers' branches.",
            )


_16_BIT = (torch.bfloat16, torch.float16)


class _Difference:
    """f(x) = layer(x) - x, in the shape of what the layer returns."""

    __slots__ = ("call",)

    def __init__(self, call: BlockCall) -> None:
        self.call = call

    def __call__(self, x: Tensor) -> Any:
        output = self.call(x)
        return with_hidden(output, hidden_of(output) - x)


def _run_of(hidden: Tensor, position: int) -> StreamRun:
    run, expected = getattr(hidden, "_shoestring_run", (None, None))
    if run is None or expected != position:
        raise StackError(
            f"the model changes or copies the hidden state before layer {position}, so its "
            "layers cannot run as a reversible stack",
            expected="every layer called once, on what the layer before it returned",
        )
    del hidden._shoestring_run  # type: ignore[attr-defined]
    return run


class Reversible(Method):
    """Reconstruct inputs from the streams above."""

    name = "reversible"
    promises = Promises(
        fidelity="exact",
        grade="bitwise",
        applies_to="span",
        rebuilds="streams",
        saved_grows_with=frozenset({"batch", "length"}),
    )
    Config = ReversibleConfig

    def fits(self, stack: Stack, config: Any = None) -> str | None:
        if _structural_runner(stack) is None:
            return "it is not reversible; shoestring.reversible(model) makes it so (structural)"
        return None

    def executor(self, stack: Stack, start: int, stop: int, config: Any) -> Executor:
        runner = _structural_runner(stack)
        assert runner is not None
        if (start, stop) != (0, len(stack)):
            raise ConfigError(
                f"reversible: span [{start}, {stop})",
                expected=f"the whole stack, [0, {len(stack)}), with keep_top for its end",
            )
        for setting in ("keep_top", "hold_outputs"):
            if not 0 <= getattr(config, setting) <= len(stack):
                raise ConfigError(
                    f"reversible: {setting} = {getattr(config, setting)}",
                    expected=f"0 to {len(stack)} blocks",
                )
        assert isinstance(runner.executor, ReversibleExecutor)
        return ReversibleExecutor(runner.executor.info, len(stack), config)


def _structural_runner(stack: Stack) -> Runner | None:
    """The runner of the first block that makes the stack reversible, below any plan's."""
    runner = stack.blocks[0].__dict__.get("forward")
    while isinstance(runner, Runner) and isinstance(runner.inner, Runner):
        runner = runner.inner
    found = isinstance(runner, Runner) and isinstance(runner.executor, ReversibleExecutor)
    return runner if found else None


def is_reversible(model: nn.Module) -> bool:
    """Whether `shoestring.reversible` has made this model's stack reversible."""
    return _structural_runner(Stack.of(model)) is not None


def reversible(
    model_or_blocks: nn.Module | Sequence[nn.Module],
    *,
    rule: str = "feistel",
    streams: Streams = "int32",
    keep_top: int = 0,
    verify: bool = False,
    scale_bits: int | Literal["auto"] = "auto",
    branches: bool | None = None,
) -> nn.Module:
    """Make a model's stack reversible, in place; or build a ReversibleStack from sub-blocks.

    A model (a Hugging Face decoder, `models.gpt.GPT`, or a plain model whose layers map the
    hidden state to itself) keeps its modules, names and state dict; how its layers are combined
    changes, which is structural. Feistel splits each layer into its attention and MLP branches
    (`branches.ROLES`) and is meant for training from scratch. bdia and random_sign start from
    pretrained weights: their mean step is the ordinary one, and in eval mode the model *is* the
    plain one. `restore(model)` makes it plain again.

    branches: whether each layer is two sub-blocks; None: where the rule or 16-bit weights ask for
    it. A loaded model needs what it was trained with, whatever its dtype is now.
    What was done is recorded in `model.config.shoestring`, which save_pretrained keeps.
    Raises ConfigError (unknown rule, 16-bit streams) and StackError (no stack, a layer that
    cannot be split).
    """
    if not isinstance(model_or_blocks, nn.Module) or isinstance(model_or_blocks, nn.ModuleList):
        blocks = list(model_or_blocks)
        return ReversibleStack(blocks, rule, streams, scale_bits, keep_top=keep_top, verify=verify)
    chosen = rule_named(rule)
    grid = Grid(streams, first_scale_bits(streams, scale_bits))
    if chosen.name == "feistel" and branches is False:
        raise ConfigError(
            "rule = 'feistel' with branches = False", expected="branches = True or None"
        )
    stack = Stack.of(model_or_blocks)
    if branches is None:
        branches = chosen.name == "feistel" or _is_16_bit(stack)
    _refuse_what_is_not_plain(stack)
    info: dict[str, Any] = {
        "rule": chosen.name,
        "streams": streams,
        "scale_bits": grid.scale_bits,
        "auto": scale_bits == "auto",
        "branches": branches,
        "tuple": False,
    }
    trial = Trial(splits=info["branches"])
    if info["branches"]:
        for block in stack.blocks:
            roles_of(block)
    trial.run_through(stack)
    info["tuple"] = trial.tuple and info["branches"]
    if info["auto"] and grid.exact and trial.amax:
        # Never finer than the default, because the weights may still be replaced by loaded ones.
        fitting = Grid.calibrated(streams, trial.amax, margin=2 * chosen.terms)
        info["scale_bits"] = min(grid.scale_bits, fitting)
    config = Reversible().configure({"keep_top": keep_top, "verify": verify})
    if not 0 <= keep_top <= len(stack):
        raise ConfigError(f"keep_top = {keep_top}", expected=f"0 to {len(stack)} blocks")
    stack.apply([(0, len(stack), ReversibleExecutor(info, len(stack), config))])
    _holder(stack).register_forward_pre_hook(_RefuseHiddenStates(chosen), with_kwargs=True)
    model_config: Any = getattr(model_or_blocks, "config", None)
    if model_config is not None:
        model_config.shoestring = info
    return model_or_blocks


def _refuse_what_is_not_plain(stack: Stack) -> None:
    if _structural_runner(stack) is not None:
        raise StackError(
            "this model is reversible already",
            hint="Call shoestring.methods.reversible.restore(model) first.",
        )
    if any(executor is not None for executor in stack.executors):
        # The plan's runners would be replaced, and restoring the plan would take these out.
        raise StackError(
            f"this {type(stack.model).__name__} runs under a plan, which was made for other "
            "layers than it would then have",
            expected="a model without a plan",
            hint="Call plan.restore(model) first, and plan again afterwards.",
        )


def restore(model: nn.Module) -> nn.Module:
    """Undo `reversible`: the plain architecture with the weights as they are now."""
    stack = Stack.of(model)
    while _structural_runner(stack) is not None:
        stack.restore()
    hooks = _holder(stack)._forward_pre_hooks
    for handle in [h for h, hook in hooks.items() if isinstance(hook, _RefuseHiddenStates)]:
        del hooks[handle]
        _holder(stack)._forward_pre_hooks_with_kwargs.pop(handle, None)
    if hasattr(getattr(model, "config", None), "shoestring"):
        del model.config.shoestring  # type: ignore[union-attr]
    return model


def conversion_report(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    rule: str = "bdia",
    draws: int = 4,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    **settings: Any,
) -> ConversionReport:
    """What making a pretrained model reversible does to its loss, before any training.

    loss: (model, batch) -> scalar; default `model(**batch).loss`. `settings` go to `reversible`.
    The model is left as it was: plain, its modes and the random state too.
    """
    _refuse_what_is_not_plain(Stack.of(model))
    return measure_conversion(
        model,
        batch,
        rule=rule,
        convert=lambda m: reversible(m, rule=rule, **settings),
        restore=restore,
        draws=draws,
        loss=loss,
    )


def _holder(stack: Stack) -> nn.Module:
    """The module that iterates over the layers."""
    return stack.model.get_submodule(stack.path.rpartition(".")[0])


class _RefuseHiddenStates:
    """What stands between two layers of a reversible stack has no value that could be read."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        wanted = kwargs.get("output_hidden_states")
        if wanted is None:
            wanted = getattr(getattr(module, "config", None), "output_hidden_states", False)
        if not wanted or (self.rule.draws and not module.training):
            return  # evaluated, a rule that draws is the plain network
        raise ConfigError(
            "output_hidden_states is asked of a reversible model",
            expected="no hidden states: between its layers there are two integer streams",
            hint="Call shoestring.methods.reversible.restore(model) first, or leave it out.",
        )


def _is_16_bit(stack: Stack) -> bool:
    return any(p.dtype in _16_BIT for b in stack.blocks for p in b.parameters())
