"""chunked_loss: the language model loss without ever holding all logits.

Idea: the model's own forward runs as it is; only the product with the output head is put off.
In its place stands a `DeferredLogits`, which takes note of what the model does to the logits
(float, shift, scale, softcap) until cross entropy is asked of it, and then makes them chunk by
chunk. So shifting, ignored labels, num_items_in_batch, router losses and whatever else a model
adds stay the model's own.
Equations: those of `ops.chunked_loss`.
Memory: one chunk of logits, instead of two to four times batch x tokens x vocabulary.
Time: `gradients="forward"` 1.0 of the head's matrix products, "backward" 1.33.
Exactness: reassociated. Scale and softcap are taken in float32, also where the model's own are in
16 bits.
Limits: with labels the output has no logits (without labels nothing changes: generate and plain
calls see the untouched forward). The head must be a plain nn.Linear; what the model does to the
logits must be in the list above, else the error names it. No double backward.
Source: see `ops.chunked_loss`.
"""

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils.parametrize import is_parametrized

from ..errors import ConfigError, StackError
from ..meter import active_tracker
from ..ops.chunked_loss import linear_cross_entropy
from .base import Method, Promises, Undo

Real = float  # the class below has a method of that name
CHECK_TOKENS = 8
CHECK_EPS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkedLossConfig:
    """How the loss is cut."""

    chunk_rows: int | None = None
    """Tokens whose logits exist at once; None = as many as hardly raise the peak."""
    gradients: Literal["auto", "forward", "backward"] = "auto"
    """When the gradients are made; see `ops.chunked_loss.linear_cross_entropy`."""
    check: bool = True
    """Compare with the model's own loss on a few tokens when applied (not on fake tensors)."""

    def __post_init__(self) -> None:
        rows = self.chunk_rows
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise ConfigError(
                f"chunked_loss: chunk_rows = {rows!r}", expected="a positive number, or None"
            )
        if self.gradients not in ("auto", "forward", "backward"):
            raise ConfigError(
                f"chunked_loss: gradients = {self.gradients!r}",
                expected="'auto', 'forward' or 'backward'",
            )


class DeferredLogits:
    """What the head would have returned, with its product put off.

    Not a tensor: it answers to shape, dtype and device, to reshaping and row selection, to
    float and to products with numbers and tanh, and to `F.cross_entropy`. Anything else is a
    StackError that names it.
    """

    def __init__(self, hidden: Tensor, head: nn.Linear, config: ChunkedLossConfig) -> None:
        self.hidden = hidden
        self.head = head
        self.config = config
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        self.scale = 1.0
        self.cap: Real | None = None  # factor outside the tanh, once there is one

    def _with(self, **changes: Any) -> "DeferredLogits":
        new = DeferredLogits.__new__(DeferredLogits)
        new.__dict__.update(self.__dict__, **changes)
        return new

    # ---- shape -----------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    def dim(self) -> int:
        return self.hidden.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> "DeferredLogits":
        return self

    def view(self, *shape: Any) -> "DeferredLogits":
        """Any shape that keeps the vocabulary as the last dimension."""
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if wanted[-1] != self.head.out_features:
            raise _cannot(f"view{wanted}", f"(..., {self.head.out_features})")
        return self._with(hidden=self.hidden.reshape(*wanted[:-1], self.hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index: Any) -> "DeferredLogits":
        """Rows only: the vocabulary has to stay whole."""
        parts = index if isinstance(index, tuple) else (index,)
        to_the_end = any(p is Ellipsis for p in parts[:-1]) or len(parts) == self.ndim
        if to_the_end and not (parts[-1] is Ellipsis or parts[-1] == slice(None)):
            raise _cannot(f"[{index}]", "an index that leaves the last dimension whole")
        return self._with(hidden=self.hidden[index])

    # ---- values ----------------------------------------------------------------------------

    def float(self) -> "DeferredLogits":
        return self._with(dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> "DeferredLogits":
        """Another dtype; the device it is on."""
        wanted = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if wanted.device != self.device:
            raise _cannot(f"to({wanted.device})", f"its own device, {self.device}")
        return self._with(dtype=wanted.dtype)

    def __mul__(self, factor: Any) -> "DeferredLogits":
        if isinstance(factor, bool) or not isinstance(factor, int | Real):
            raise _cannot(f"a product with {type(factor).__name__}", "a product with a number")
        if self.cap is not None:
            return self._with(cap=self.cap * factor)
        return self._with(scale=self.scale * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "DeferredLogits":
        if isinstance(divisor, bool) or not isinstance(divisor, int | Real):
            raise _cannot(f"a division by {type(divisor).__name__}", "a division by a number")
        return self * (1 / divisor)

    def tanh(self) -> "DeferredLogits":
        if self.cap is not None:
            raise _cannot("a second tanh", "one softcap")
        return self._with(cap=1.0)

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: Real = 0.0,
    ) -> Tensor:
        """As F.cross_entropy; class weights, smoothing and single losses are refused."""
        asked = {"weight": weight, "size_average": size_average, "reduce": reduce}
        wrong = [name for name, value in asked.items() if value is not None]
        wrong += ["label_smoothing"] if label_smoothing else []
        wrong += [f"reduction={reduction!r}"] if reduction not in ("mean", "sum") else []
        if wrong:
            raise _cannot(f"cross_entropy with {', '.join(wrong)}", "the mean or the sum of rows")
        if self.ndim != 2:
            raise _cannot(f"cross_entropy of {tuple(self.shape)}", "logits of shape (N, V)")
        tracker = active_tracker()
        if tracker is not None and tracker.phase == "forward":
            tracker.phase = "loss"
        loss = linear_cross_entropy(
            self.hidden,
            self.head.weight,
            target,
            bias=self.head.bias,
            chunk_rows=self.config.chunk_rows or "auto",
            ignore_index=ignore_index,
            reduction=reduction,  # type: ignore[arg-type]
            # c tanh(s z) = c tanh(s c z / c)
            logit_scale=self.scale if self.cap is None else self.scale * self.cap,
            softcap=self.cap,
            gradients=self.config.gradients,
        )
        return loss.to(self.dtype)

    # ---- everything else -------------------------------------------------------------------

    def _sum(self, other: Any) -> "DeferredLogits":
        raise _cannot(f"a sum with {type(other).__name__}", "a product with a number, or tanh")

    __add__ = __radd__ = __sub__ = __rsub__ = _sum

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        logits = args[0] if args else None
        if isinstance(logits, cls):
            if func is F.cross_entropy:
                return logits.cross_entropy(*args[1:], **(kwargs or {}))
            if func is torch.tanh:
                return logits.tanh()
        raise _cannot(getattr(func, "__name__", str(func)), "cross_entropy")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise _cannot(f".{name}", "shape, dtype, device, view, float, *, /, tanh, cross_entropy")


def _cannot(what: str, expected: str) -> StackError:
    return StackError(
        f"with chunked_loss the logits are never whole, but the model (or its loss) asks: {what}",
        expected=expected,
        hint="Leave chunked_loss out for this model, or compute this from a call without labels.",
    )


class _Gate:
    """Stands in a module's instance `forward`; refers to the module weakly, and a deepcopy of the
    module gets one of its own."""

    def __init__(self, module: nn.Module, inner: Any, config: ChunkedLossConfig) -> None:
        self._module = weakref.ref(module)
        self.inner = inner
        self.config = config

    @property
    def module(self) -> Any:
        module = self._module()
        assert module is not None
        return module

    @property
    def original(self) -> Callable[..., Any]:
        return self.inner or type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Gate":
        module = self.module
        return type(self)(memo.get(id(module), module), self.inner, self.config)

    def __reduce__(self) -> Any:
        return type(self), (self.module, self.inner, self.config)


class HeadGate(_Gate):
    """The head's forward: puts its product off while the model's gate says so."""

    deferring = False

    def __call__(self, hidden: Tensor) -> Any:
        if not self.deferring:
            return self.original(hidden)
        return DeferredLogits(hidden, self.module, self.config)


class ModelGate(_Gate):
    """The model's forward: with labels, the head's product is put off."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _argument(self.original, "labels", args, kwargs) is None:
            return self.original(*args, **kwargs)
        head = self.module.get_output_embeddings()
        gate = head.__dict__.get("forward")
        if not isinstance(gate, HeadGate):
            raise StackError(
                "the output head was replaced after chunked_loss was applied",
                hint="Undo chunked_loss before resizing or wrapping the head, and apply it after.",
            )
        gate.deferring = True
        try:
            return _without_logits(self.original(*args, **kwargs))
        finally:
            gate.deferring = False


def _argument(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if name in kwargs or not args:
        return kwargs.get(name)
    return inspect.signature(function).bind_partial(*args, **kwargs).arguments.get(name)


def _without_logits(output: Any) -> Any:
    """The output with None where deferred logits stand."""
    if isinstance(output, tuple | list):
        return type(output)(None if isinstance(x, DeferredLogits) else x for x in output)
    if is_dataclass(output) and not isinstance(output, type):
        values = {f.name: getattr(output, f.name) for f in fields(output)}
        kept = {k: None if isinstance(v, DeferredLogits) else v for k, v in values.items()}
        if kept.get("loss") is None:
            raise StackError(
                f"{type(output).__name__} has no loss although labels were given",
                expected="a model that computes its loss from labels",
            )
        return type(output)(**kept)
    return output


class ChunkedLoss(Method):
    """Loss from chunks of logits."""

    name = "chunked_loss"
    promises = Promises(
        fidelity="exact",
        grade="reassociated",
        bound_eps=32,
        applies_to="loss",
        saved_grows_with=frozenset({"batch", "length"}),
    )
    Config = ChunkedLossConfig

    def apply(self, model: nn.Module, config: ChunkedLossConfig) -> Undo:
        """Patch the model and its output head in place; the result undoes it.

        StackError when the head is not a plain linear layer, when the model does something to
        its logits that is not known here, or when the losses differ on the few tokens tried.
        """
        base = getattr(model, "get_base_model", None)  # of a model wrapped for adapters
        if callable(base):
            model = base()
        head = _head_of(model)
        comparable = config.check and _has_values(model)
        plain = _plain_loss(model) if comparable else None
        gates: dict[nn.Module, _Gate] = {
            head: HeadGate(head, None, config),
            model: ModelGate(model, model.__dict__.get("forward"), config),
        }

        def undo() -> None:
            for module, gate in gates.items():
                if module.__dict__.get("forward") is not gate:
                    raise StackError(
                        f"{type(module).__name__}.forward was replaced after chunked_loss",
                        hint="Undo in the reverse order of applying.",
                    )
            for module, gate in gates.items():
                if gate.inner is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = gate.inner

        for module, gate in gates.items():
            module.__dict__["forward"] = gate
        try:
            if plain is not None:
                _compare(plain, _loss_on_few_tokens(model), head.weight.dtype)
        except BaseException:
            undo()
            raise
        return undo


def _head_of(model: nn.Module) -> nn.Linear:
    finder = getattr(model, "get_output_embeddings", None)
    head = finder() if callable(finder) else None
    if head is None:
        raise StackError(
            f"{type(model).__name__} names no output head",
            expected="a language model whose get_output_embeddings() returns its last layer",
        )
    name = next((n for n, m in model.named_modules() if m is head), "the output head")
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or any(True for _ in head.children()) or is_parametrized(head):
        raise StackError(
            f"{name} is a {type(head).__name__}, not a plain linear layer",
            expected="nn.Linear (no adapter, quantisation or parametrisation on the head)",
            hint="Leave the head out of the adapter's target modules, or leave out chunked_loss.",
        )
    if "forward" in head.__dict__:
        raise StackError(
            f"the forward of {name} has been replaced already",
            expected="a head that nothing else has patched",
            hint="chunked_loss can be applied once.",
        )
    return head


def _has_values(model: nn.Module) -> bool:
    return not any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters())


def _plain_loss(model: nn.Module) -> Tensor:
    try:
        return _loss_on_few_tokens(model)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise StackError(
            f"{type(model).__name__} gave no loss for {CHECK_TOKENS} token ids: {error}",
            expected="a model called with input_ids and labels",
            hint="Pass check=False if its inputs are others.",
        ) from error


def _loss_on_few_tokens(model: Any) -> Tensor:
    """Loss without dropout; leaves training flags and random state as they were."""
    modes = [(m, m.training) for m in model.modules()]
    embedding = model.get_input_embeddings()
    ids = torch.arange(CHECK_TOKENS, device=embedding.weight.device)[None]
    ids %= min(embedding.num_embeddings, model.get_output_embeddings().out_features)
    model.eval()
    try:
        with torch.no_grad():
            loss: Tensor = model.forward(input_ids=ids, labels=ids.clone()).loss
            return loss
    finally:
        for module, mode in modes:
            module.training = mode


def _compare(plain: Tensor, chunked: Tensor, dtype: torch.dtype) -> None:
    near = CHECK_EPS * torch.finfo(dtype).eps
    if not torch.allclose(chunked.double(), plain.double(), rtol=near, atol=near):
        raise StackError(
            f"chunked_loss would change the loss of this model from {plain.item():.7g} "
            f"to {chunked.item():.7g}",
            expected="equal losses on the few tokens tried",
            hint="The model treats its logits in a way that is not known here; "
            "leave chunked_loss out.",
        )
