"""chunked_mlp: token-wise sub-modules run in slices of tokens, one slice's inside at a time.

Idea: an MLP treats every token alone, so its wide inside need never exist for all tokens at once
(Reformer's chunked feed-forward, arXiv 2001.04451). Forward runs slice by slice and keeps only
the input; backward runs each slice again with gradients and is done with it before the next.
Equations: none change; the weight gradient is summed slice by slice.
Memory: for an MLP of width m on N tokens, the input (N x d) instead of the input and 2 to 4 times
N x m; while it runs, that inside for N / slices tokens, and one gradient of the weights more.
Time: one more forward of the MLP. Inside a recomputed block none more: the input is handed to
autograd before the MLP runs, so a recomputation stops there and never evaluates it.
Exactness: reassociated (a matrix product over other numbers of rows may round differently). With
dropout the masks are drawn slice by slice: same distribution, other numbers than unsliced.
Limits: forward hooks *inside* a sliced module fire once per slice, and again in backward. Modules
that mix tokens, experts behind a router (their routing is read by others through hooks) and
modules whose output differs in shape from their input stay as they are.
Source: arXiv 2001.04451 section 2.2 for the slices; the two-part node is ours.
"""

# N rows (tokens of all sequences), d width

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ConfigError, StackError
from ..quiet import quiet_fakes
from ..stack import Stack
from ..tape import Modes, RandomState
from .base import Method, Promises, Undo

PROBE_ROWS = 13
"""Rows of the trial input: a size that no width or number of heads has."""
PROBE_EPS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkedMlpConfig:
    """How the tokens are cut."""

    slices: int = 4
    """Number of slices; a module called with fewer tokens than that uses one per token."""

    def __post_init__(self) -> None:
        if not isinstance(self.slices, int) or isinstance(self.slices, bool) or self.slices < 1:
            raise ConfigError(
                f"chunked_mlp: slices = {self.slices!r}", expected="a positive number"
            )


# ---- running -----------------------------------------------------------------------------------


class _Call:
    """One forward of one sliced module: what backward needs besides tensors."""

    def __init__(self, run: Callable[[Tensor], Tensor], module: nn.Module, slices: int) -> None:
        self.run = run
        self.module = module
        self.slices = slices
        self.names: tuple[str, ...] = ()
        self.random: RandomState | None = None
        self.input: Tensor | None = None  # for the forward only
        self.autocast: dict[str, Any] = {}
        self.modes = Modes(module)

    def evaluate(self, x_Nd: Tensor) -> Tensor:
        """The slices one after another, without gradients; remembers whether they drew."""
        before = RandomState(x_Nd)
        y_Nd: Tensor | None = None
        for rows in _slices(x_Nd.shape[-2], self.slices):
            part = self.run(x_Nd[..., rows, :])
            if y_Nd is None:
                y_Nd = part.new_empty(x_Nd.shape)
            y_Nd[..., rows, :] = part
            del part
        assert y_Nd is not None
        self.random = before if before.was_used() else None
        return y_Nd

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """Random numbers, autocast and modes (train or eval) as they were in forward."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.modes.restored())
            if self.random is not None:
                stack.enter_context(self.random.restored())
            stack.enter_context(torch.autocast(**self.autocast))
            yield

    def with_parameters(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        """The module on x with these tensors in place of its parameters."""
        named = dict(zip(self.names, values, strict=True))
        with _reparametrize_module(self.module, named):
            return self.run(x)


class SliceInput(torch.autograd.Function):
    """Takes hold of the input before the module runs, and does its whole backward.

    Returns a tensor of no bytes that carries the graph to `SliceOutput`. As everything that is
    saved is saved here, a checkpoint around the block stops its recomputation at this node.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, x_Nd: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x_Nd, *parameters)
        return x_Nd.new_empty(1).expand(x_Nd.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_Nd,) = grad_outputs
        call: _Call = ctx.call
        x_Nd, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return (None, *_whole_vjp(call, x_Nd, parameters, grad_Nd, wanted))
        leaves = [p.detach().requires_grad_(w) for p, w in zip(parameters, wanted[1:], strict=True)]
        dx_Nd = torch.empty_like(x_Nd) if wanted[0] else None
        with call.replaying(), torch.enable_grad():
            for rows in _slices(x_Nd.shape[-2], call.slices):
                _slice_vjp(call, x_Nd, grad_Nd, rows, leaves, dx_Nd)
        return (None, dx_Nd, *(leaf.grad for leaf in leaves))


class SliceOutput(torch.autograd.Function):
    """Runs the slices; keeps nothing. Its gradient goes to `SliceInput` as it is."""

    @staticmethod
    def forward(ctx: Any, call: _Call, carrier: Tensor) -> Tensor:
        x_Nd, call.input = call.input, None
        assert x_Nd is not None
        return call.evaluate(x_Nd)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return None, grad_outputs[0]


def _slice_vjp(
    call: _Call,
    x_Nd: Tensor,
    grad_Nd: Tensor,
    rows: slice,
    leaves: list[Tensor],
    dx_Nd: Tensor | None,
) -> None:
    """Run one slice again; its share is added to the leaves' gradients as each is made, so that
    no second set of weight gradients exists."""
    part = x_Nd[..., rows, :].detach().requires_grad_(dx_Nd is not None)
    y = call.with_parameters(leaves, part)
    inputs = [t for t in (part, *leaves) if t.requires_grad]
    torch.autograd.backward(y, grad_Nd[..., rows, :].to(y.dtype), inputs=inputs)
    if dx_Nd is not None:
        dx_Nd[..., rows, :] = 0 if part.grad is None else part.grad


def _whole_vjp(
    call: _Call,
    x_Nd: Tensor,
    parameters: list[Tensor],
    grad_Nd: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients with a graph of their own (create_graph=True): unsliced in memory, right."""
    with call.replaying():
        parts = [
            call.with_parameters(parameters, x_Nd[..., rows, :])
            for rows in _slices(x_Nd.shape[-2], call.slices)
        ]
        y_Nd = torch.cat(parts, dim=-2)
    inputs = [t for t, w in zip((x_Nd, *parameters), wanted, strict=True) if w]
    given = iter(
        torch.autograd.grad(y_Nd, inputs, grad_Nd.to(y_Nd.dtype), create_graph=True,
                            allow_unused=True)
    )  # fmt: skip
    return [next(given) if w else None for w in wanted]


def _slices(rows: int, slices: int) -> Iterator[slice]:
    """Even slices, none empty."""
    count = max(1, min(rows, slices))
    edges = [rows * k // count for k in range(count + 1)]
    return (slice(a, b) for a, b in itertools.pairwise(edges))


class Sliced:
    """Stands in a token-wise module's instance `forward`; refers to the module weakly, and a
    deepcopy of the module gets one of its own."""

    def __init__(self, module: nn.Module, inner: Any, config: ChunkedMlpConfig) -> None:
        self._module = weakref.ref(module)
        self.inner = inner  # what stood in the instance before, if anything
        self.config = config

    @property
    def original(self) -> Callable[..., Tensor]:
        if self.inner is not None:
            return self.inner
        module = self._module()
        assert module is not None
        return type(module).forward.__get__(module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, x: Tensor) -> Tensor:
        # All tokens in one dimension, the number of dimensions kept: modules may look at it.
        flat = x.reshape(*(1 for _ in range(x.dim() - 2)), -1, x.shape[-1])
        return self._run(flat).reshape(x.shape)

    def _run(self, x_Nd: Tensor) -> Tensor:
        module = self._module()
        assert module is not None
        call = _Call(self.original, module, self.config.slices)
        named = dict(module.named_parameters())
        needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x_Nd, *named.values()))
        if not needed:
            return call.evaluate(x_Nd)
        call.names = tuple(named)
        call.autocast = _autocast_now(x_Nd.device.type)
        carrier = SliceInput.apply(call, x_Nd, *named.values())
        call.input = x_Nd.detach()
        out: Tensor = SliceOutput.apply(call, carrier)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sliced":
        module = self._module()
        assert module is not None
        return Sliced(memo.get(id(module), module), self.inner, self.config)

    def __reduce__(self) -> Any:
        return Sliced, (self._module(), self.inner, self.config)


def _autocast_now(device: str) -> dict[str, Any]:
    return {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
        # Slices are given detached weights, whose casts no cache would be asked for again.
        "cache_enabled": False,
    }


# ---- finding -----------------------------------------------------------------------------------

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.Identity)


def token_wise(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the largest token-wise modules of a block, the block itself included."""
    found: list[tuple[str, nn.Module]] = []

    def search(module: nn.Module, path: str) -> None:
        if _why_not(module) is None:
            found.append((path, module))
            return
        for name, child in module.named_children():
            search(child, f"{path}.{name}" if path else name)

    search(block, "")
    return found


def _why_not(module: nn.Module) -> str | None:
    """None for a module that can be sliced, else the first reason against it."""
    leaves = [m for m in module.modules() if not any(True for _ in m.children())]
    linear = [m for m in leaves if _is_linear(m)]
    if len(linear) < 2:
        return "holds fewer than two linear layers"
    for leaf in leaves:
        if not (_is_linear(leaf) or _is_harmless(leaf)):
            return f"holds a {type(leaf).__name__}"
    if any(True for m in module.modules() if m not in leaves for _ in m.parameters(False)):
        return "has parameters of its own"
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return "has no readable signature"
    if len(parameters) != 1 or parameters[0].kind is inspect.Parameter.VAR_KEYWORD:
        return "takes more than one argument"
    return _why_not_by_trial(module, linear)


def _is_linear(leaf: nn.Module) -> bool:
    # Conv1D is what GPT-2 calls a linear layer whose weight is stored the other way round.
    return isinstance(leaf, nn.Linear) or type(leaf).__name__ == "Conv1D"


def _is_harmless(leaf: nn.Module) -> bool:
    """Activations, dropout, norms over the last dimension, empty containers."""
    if isinstance(leaf, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.MultiheadAttention):
        return False
    own = list(leaf.parameters(False))
    if isinstance(leaf, _CONTAINERS):
        return not own
    # A norm has one or two vectors of the width; an activation has nothing, or one number.
    return len(own) <= 2 and all(p.dim() <= 1 for p in own)


def _why_not_by_trial(module: nn.Module, linear: list[nn.Module]) -> str | None:
    """Run PROBE_ROWS rows: the operators must be token-wise, and so must the numbers."""
    weight = next(linear[0].parameters())
    widths = {w for leaf in linear for w in _widths(leaf)}
    first = _widths(linear[0])  # likely that of its input; adapters have smaller ones
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    state = torch.get_rng_state()
    try:
        for width in sorted(widths, key=lambda w: (w not in first, w)):
            x = _probe(weight, width)
            witness = _Witness(PROBE_ROWS)
            try:
                with quiet_fakes(), torch.no_grad(), witness:
                    y = module.forward(x)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
                continue
            if not isinstance(y, Tensor) or y.shape != x.shape:
                continue
            if witness.refused:
                return f"may mix tokens ({witness.refused})"
            return None if _same_in_parts(module, x, y) else "mixes tokens"
        return "does not return what it is given in shape"
    finally:
        torch.set_rng_state(state)
        for part, mode in modes:
            part.training = mode


def _widths(leaf: nn.Module) -> tuple[int, ...]:
    return tuple(next(leaf.parameters()).shape)


def _probe(weight: Tensor, width: int) -> Tensor:
    x = weight.new_empty(1, PROBE_ROWS, width).detach()
    if isinstance(x, FakeTensor) or x.is_meta:
        return x
    generator = torch.Generator().manual_seed(0)
    return x.copy_(torch.randn(x.shape, generator=generator))


def _same_in_parts(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    if isinstance(x, FakeTensor) or x.is_meta:
        return True  # no values to compare; the operators were looked at
    with torch.no_grad():
        cut = PROBE_ROWS // 2
        parts = torch.cat([module.forward(x[:, :cut]), module.forward(x[:, cut:])], dim=1)
    near = PROBE_EPS * torch.finfo(y.dtype).eps * y.abs().max().item()
    return torch.allclose(parts, y, rtol=0, atol=max(near, 1e-30))


class _Witness(TorchDispatchMode):
    """Looks at every operator of a forward and names the first that could mix rows.

    Works on fake tensors too. Everything that is not known to be token-wise counts as mixing.
    """

    _TOKEN_WISE = frozenset(
        "mm addmm linear native_layer_norm _fused_rms_norm native_dropout t detach alias view "
        "_unsafe_view reshape expand clone _to_copy empty_like zeros_like ones_like "
        "scalar_tensor lift_fresh unsqueeze squeeze new_empty empty".split()
    )
    _ALONG_A_DIMENSION = frozenset(
        "split split_with_sizes slice chunk mean sum amax var _softmax glu select cat".split()
    )

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.refused: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        answers = isinstance(out, Tensor | tuple | list)  # else a property, such as its device
        if answers and self.refused is None:
            if not self._is_token_wise(func, name, args, kwargs or {}):
                self.refused = name
        return out

    def _is_token_wise(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        first = args[0] if args else None
        if isinstance(first, Tensor) and self.rows not in first.shape:
            return True  # works on weights only
        if torch.Tag.pointwise in func.tags or name in self._TOKEN_WISE:
            return True
        if name in self._ALONG_A_DIMENSION:
            tensor = first[0] if isinstance(first, list | tuple) else first
            last = {-1, tensor.dim() - 1} if isinstance(tensor, Tensor) else set()
            return self._dimensions(func, args, kwargs) <= last
        return False

    @staticmethod
    def _dimensions(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
        for k, argument in enumerate(func._schema.arguments):
            if argument.name == "dim":
                value = args[k] if k < len(args) else kwargs.get("dim", argument.default_value)
                return set(value) if isinstance(value, list | tuple) else {value}
        return {0}  # no dimension: over everything


# ---- the method --------------------------------------------------------------------------------


class ChunkedMlp(Method):
    """Token-wise modules in slices."""

    name = "chunked_mlp"
    promises = Promises(
        fidelity="exact",
        grade="reassociated",
        bound_eps=64,
        applies_to="module",
        saved_grows_with=frozenset({"depth", "batch", "length"}),
    )
    Config = ChunkedMlpConfig

    def apply(self, model: nn.Module, config: ChunkedMlpConfig) -> Undo:
        """Slice the token-wise modules of every block, in place; the result undoes it.

        StackError when no block has one, or when they are sliced already.
        """
        return slice_blocks(Stack.of(model).blocks, config)


def slice_blocks(blocks: Sequence[nn.Module], config: ChunkedMlpConfig) -> Undo:
    """As `ChunkedMlp.apply`, for blocks that are not part of a model."""
    gates: dict[nn.Module, Sliced] = {}
    for block in blocks:
        for path, module in block.named_modules():
            inner = module.__dict__.get("forward")
            if isinstance(inner, Sliced):
                raise _replaced_already(path, module)
        for path, module in token_wise(block):
            inner = module.__dict__.get("forward")
            if module is block and inner is not None:
                raise _replaced_already(path, module)
            gates[module] = Sliced(module, inner, config)
    if not gates:
        kinds = sorted({type(b).__name__ for b in blocks})
        reasons = _reasons(blocks[0]) if blocks else "there are no blocks"
        raise StackError(
            f"no token-wise module in the blocks ({', '.join(kinds)}): {reasons}",
            expected="a module of linear layers, activations, dropout and norms that takes one "
            "tensor and returns one of the same shape",
        )
    for module, gate in gates.items():
        module.__dict__["forward"] = gate

    def undo() -> None:
        for module, gate in gates.items():
            if module.__dict__.get("forward") is not gate:
                raise StackError(
                    f"{type(module).__name__}.forward was replaced after chunked_mlp",
                    hint="Undo in the reverse order of applying.",
                )
        for module, gate in gates.items():
            if gate.inner is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = gate.inner

    return undo


def _replaced_already(path: str, module: nn.Module) -> StackError:
    return StackError(
        f"the forward of {path or type(module).__name__} has been replaced already",
        hint="Apply chunked_mlp once, and before the blocks are given to a span method.",
    )


def _reasons(block: nn.Module) -> str:
    """Why each part of a block that has linear layers was not taken."""
    parts = [
        f"{name or type(m).__name__} {_why_not(m)}"
        for name, m in block.named_modules()
        if any(True for _ in m.children())
    ]
    return "; ".join(parts[:6]) or "it holds no other modules"
