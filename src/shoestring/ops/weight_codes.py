"""Frozen weights kept in codes: 8 bits a value, or 4 (NF4), decoded for the time of a product.

int8: a row of W (out, in) shares its largest magnitude a, and code = round(127 w / a).
nf4: 64 consecutive values share theirs, and a code is the nearest of the 16 quantiles of a normal
distribution (QLoRA, arXiv 2305.14314, section 3 and appendix E), two codes to a byte, the first in
the high half. bitsandbytes encodes and decodes NF4 (`quantize_4bit`, `dequantize_4bit`); what
holds its codes is a plain tensor, so that fake ones say what it costs.

The gradient goes to the input (and the bias), never to the codes: the weight is decoded once more
for it, and only the codes are saved.
Memory: 1 byte a value and 4 a row, or 0.5625 a value; a decoded weight while its product runs.
"""

import importlib.util
import logging
import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError

BASES = ("int8", "nf4")
BLOCK = 64
"""Values that share a magnitude, at 4 bits."""
SCALE = "weight_scale"
"""The buffer that holds the magnitudes, beside the weight that holds the codes."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """What a weight was before it was kept in codes."""

    base: str
    shape: torch.Size
    dtype: torch.dtype

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The weight (out, in), as far as its codes say it."""
        if self.base == "int8":
            return (codes * (scale.float() / 127)[:, None]).to(self.dtype)
        ops: Any = torch.ops.bitsandbytes
        # Flat: bitsandbytes 0.50 on a CPU takes blocks to begin anew in every row, which gives
        # wrong values where rows are no multiple of a block.
        n = self.shape.numel()
        found = ops.dequantize_4bit(codes, scale.float(), BLOCK, "nf4", [n], self.dtype)
        return cast(Tensor, found).view(self.shape)


def check_library() -> None:
    """ConfigError where bitsandbytes, which codes NF4, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "weights at 4 bits need bitsandbytes, which is not installed",
            expected="bitsandbytes", hint="pip install 'shoestring[qlora]'",
        )  # fmt: skip


def _register() -> None:
    """Import what registers the operators; it logs that a faster kernel could be downloaded."""
    log = logging.getLogger("bitsandbytes")
    was = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        log.setLevel(was)


def encode(weight: Tensor, base: str) -> tuple[Tensor, Tensor, Form]:
    """weight (out, in) -> (codes, scale, what decoding needs besides). int8: codes (out, in),
    scale (out,); nf4: codes (ceil(n / 2), 1), scale (ceil(n / 64),), n values in all."""
    form = Form(base, weight.shape, weight.dtype)
    if base == "int8":
        # Not the library's, which leaves large values to a path of their own.
        scale = weight.float().abs().amax(1)
        steps = weight.float() * (127 / torch.where(scale > 0, scale, 1.0))[:, None]
        return steps.round_().to(torch.int8), scale, form
    check_library()
    _register()
    ops: Any = torch.ops.bitsandbytes
    codes, scale = ops.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
    return codes, scale, form


class DecodedLinear(torch.autograd.Function):
    """x W^T + b with W decoded for the time of a product, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, form: Form
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.form, ctx.bias = form, None if bias is None else bias.dtype
        weight = form.decode(codes, scale).to(x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            codes, scale = ctx.saved_tensors
            dx = gradient @ ctx.form.decode(codes, scale).to(gradient.dtype)
        if ctx.bias is not None and ctx.needs_input_grad[1]:
            dbias = gradient.flatten(0, -2).sum(0).to(ctx.bias)
        return dx, dbias, None, None, None


class Decoding:
    """Stands in the `forward` of a linear layer whose weight holds codes; refers to it weakly, and
    a deepcopy of the layer gets one of its own."""

    def __init__(self, layer: nn.Linear, form: Form) -> None:
        self._layer, self.form = weakref.ref(layer), form

    @property
    def layer(self) -> nn.Linear:
        """The layer it stands in."""
        layer = self._layer()
        assert layer is not None
        return layer

    def __call__(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        scale = getattr(layer, SCALE)
        made: Tensor = DecodedLinear.apply(x, layer.bias, layer.weight, scale, self.form)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "Decoding":
        # deepcopy registers the new module before it copies the module's attributes.
        return Decoding(memo.get(id(self.layer), self.layer), deepcopy(self.form, memo))


def is_coded(module: nn.Module) -> bool:
    """Whether the weight of this layer is kept in codes."""
    return isinstance(vars(module).get("forward"), Decoding)


def keep_in_codes(layers: Iterable[nn.Linear], base: str) -> Callable[[], None]:
    """Keep the weights of these layers in codes, in place and one after another, and train them no
    more; the result decodes them. An error undoes what was done, but for what codes lost."""
    done: list[tuple[nn.Linear, Form]] = []

    def undo() -> None:
        for layer, form in done:
            # Whoever takes a plan out has put the forward back already: the weight is what tells.
            if not layer.weight.is_floating_point():
                _decode(layer, form)

    try:
        for layer in layers:
            codes, scale, form = encode(layer.weight.detach(), base)
            layer.weight.requires_grad_(False)
            layer.weight.data = codes
            layer.register_buffer(SCALE, scale)
            layer.__dict__["forward"] = Decoding(layer, form)
            done.append((layer, form))
    except BaseException:
        undo()
        raise
    return undo


def decode_layer(layer: nn.Linear) -> None:
    """Give a layer in codes its decoded weight back; nothing where it has it."""
    if is_coded(layer):
        _decode(layer, vars(layer)["forward"].form)


def _decode(layer: nn.Linear, form: Form) -> None:
    scale: Tensor = getattr(layer, SCALE)
    layer.weight.data = form.decode(layer.weight.detach(), scale)
    delattr(layer, SCALE)
    if is_coded(layer):
        del layer.__dict__["forward"]


# ---- twins -------------------------------------------------------------------------------------


def round_trip_ref(weight: Tensor, base: str) -> Tensor:
    """Twin of encode and decode, from the equations in float64."""
    w = weight.double()
    if base == "int8":
        top = w.abs().amax(1, keepdim=True)
        return torch.where(top > 0, (w * 127 / top).round() * top / 127, 0.0)
    table = torch.tensor(NF4, dtype=torch.float64)
    found = w.flatten().clone()
    for part in found.split(BLOCK):
        top = part.abs().max()
        if top > 0:
            part.copy_(table[(part[:, None] / top - table).abs().argmin(1)] * top)
        else:
            part.zero_()
    return found.view_as(w)
