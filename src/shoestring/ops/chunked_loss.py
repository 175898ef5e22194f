"""Linear layer plus cross entropy without ever holding all logits.

Idea: the logits of N tokens over a vocabulary of V are N x V numbers, often more than the rest
of the network keeps. They are needed only to be reduced, so they are made and reduced in chunks.
Equations: z = h W^T + b, then z <- s z, then z <- c tanh(z / c) where a softcap c is given;
loss_n = logsumexp_v z_nv - z_ny;  dz_nv = a_n (softmax(z)_nv - [v = y_n]), a_n = 1 / count for
the mean; dh = dz W, dW = dz^T h, db = sum_n dz.
Memory: one chunk of logits (two with a softcap or in a 16-bit dtype) instead of two to four times
N x V, and dh (N x d) and dW (V x d), which the plain path has at the same instant.
Time: `gradients="forward"` makes the logits once and needs three matrix products, as the plain
path does; "backward" makes them again: four.
Exactness: reassociated. The weight gradient is summed chunk by chunk; the log-sum-exp and the
sums over tokens are float32 (float64 for float64 inputs) whatever the dtype of the product.
Limits: targets are class indices; no class weights, no label smoothing, no double backward.
Source: the same idea as Liger's fused linear cross entropy (arXiv 2410.10989) and Cut Cross
Entropy (arXiv 2411.09009), without kernels of its own.
"""

# N rows (tokens), d width, V vocabulary, R rows of a chunk, S columns of a slice

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..errors import ConfigError, DataError, StackError

CHUNK_BYTES = 8 * 2**20
"""Logits of a chunk may always take this much; below it a chunk saves nothing worth having."""
WEIGHT_SHARE = 4
"""... or this fraction (1/4) of the weight, if that is more: dW is as large as the weight and
alive at the same time, so a smaller chunk would hardly lower the peak, and every chunk has to
read the weight once (on a large vocabulary, small chunks are bound by that)."""
MIN_ROWS = 32


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call was asked for."""

    rows: int
    ignore_index: int
    scale: float
    softcap: float | None
    matmul_dtype: torch.dtype
    gradients: Literal["forward", "backward"]
    wants: tuple[bool, bool, bool]  # gradients of hidden, weight, bias

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.matmul_dtype, torch.float32)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_rows: Literal["auto"] | int = "auto",
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_items: Tensor | float | None = None,
    gradients: Literal["auto", "forward", "backward"] = "auto",
) -> Tensor:
    """Cross entropy of `hidden (N, d) @ weight (V, d).T` against targets (N,); a scalar.

    Equals `F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)` with the same
    ignore_index and reduction, the logits being multiplied by logit_scale and then softcapped.
    The result is float32 (float64 for float64 inputs). Under autocast the matrix products run in
    the autocast dtype, as `F.linear` would.

    chunk_rows: rows whose logits exist at once; "auto" takes CHUNK_BYTES or a fraction of the
    weight's bytes, whichever is more.  num_items: divide the sum by this instead of the number of
    targets that count (what Hugging Face calls num_items_in_batch); overrides reduction.
    gradients: where they are made. "forward": with the loss, at once, and kept till backward;
    the logits are made once. "backward": the logits are made again, vocabulary slice by slice, so
    that every part of dW is summed and rounded once; nothing but N floats is kept. At the moment
    that counts (end of forward, all activations alive) both need the same: dW is alive then
    either way. "auto" is "forward" for 32-bit products. For 16-bit ones (weights in 16 bits, or
    autocast) it is "backward" when the weight is trained: "forward" would add up rounded pieces
    of dW, in a float32 sum as large as the weight, and was measured slower. "backward" also
    serves when several losses are made before the first backward, or when most get none.

    ConfigError for arguments that do not fit; DataError for a target outside the vocabulary
    (checked on CPU; elsewhere it is the device's own assertion). StackError when the backward is
    asked for with create_graph=True.
    """
    _check(hidden, weight, targets, bias, reduction, gradients, softcap)
    call = _Call(
        rows=_rows(chunk_rows, hidden, weight),
        ignore_index=ignore_index,
        scale=float(logit_scale),
        softcap=softcap,
        matmul_dtype=_matmul_dtype(hidden),
        gradients=_where(gradients, hidden, weight),
        wants=_wants(hidden, weight, bias),
    )
    kept = targets != ignore_index
    _check_targets(targets, kept, weight.shape[0])
    if num_items is not None:
        divisor: Tensor | float = num_items
    else:
        divisor = kept.sum() if reduction == "mean" else 1
    if not isinstance(divisor, Tensor):
        divisor = torch.full((), divisor, dtype=call.sum_dtype, device=hidden.device)
    divisor = divisor.to(hidden.device, call.sum_dtype)
    if not any(call.wants):
        with torch.no_grad():
            return _losses(hidden, weight, bias, targets, call)[0].sum() / divisor
    return LinearCrossEntropy.apply(hidden, weight, bias, targets, divisor, call)


class LinearCrossEntropy(torch.autograd.Function):
    """The differentiable part; see `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        divisor: Tensor,
        call: _Call,
    ) -> Tensor:
        ctx.call = call
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (hidden, weight, bias))
        if call.gradients == "forward":
            losses, *gradients = _losses_and_gradients(hidden, weight, bias, targets, divisor, call)
            ctx.save_for_backward(*gradients)
        else:
            losses, lse = _losses(hidden, weight, bias, targets, call)
            ctx.save_for_backward(hidden, weight, bias, targets, divisor, lse)
        return losses.sum() / divisor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        if torch.is_grad_enabled():
            raise StackError(
                "the chunked loss has no second derivative (backward with create_graph=True)",
                expected="a backward without create_graph",
                hint="Use the plain loss where the gradient itself is differentiated.",
            )
        if ctx.call.gradients == "forward":
            # The buffers are ours to change in place, unless a second backward will want them.
            again = torch._C._autograd._get_current_graph_task_keep_graph()
            made = tuple(
                None if g is None else (g * grad if again else g.mul_(grad))
                for g in ctx.saved_tensors
            )
        else:
            hidden, weight, bias, targets, divisor, lse = ctx.saved_tensors
            made = _gradients_by_slice(hidden, weight, bias, targets, grad / divisor, lse, ctx.call)
        made = tuple(
            None if g is None else g.to(dtype) for g, dtype in zip(made, ctx.dtypes, strict=True)
        )
        return (*made, None, None, None)


# ---- the parts ---------------------------------------------------------------------------------
# What is done to one chunk is a function of its own, so that the chunk is gone before the next.


def _losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: _Call
) -> tuple[Tensor, Tensor]:
    """Loss of every row (0 where ignored) and its log-sum-exp, both (N,), row chunk by chunk."""

    def chunk(rows: slice) -> None:
        z_RV, _ = _logits(hidden[rows], w, b, call, for_gradient=False)
        losses[rows], lse[rows], _ = _reduce_(z_RV, targets[rows], call)

    losses = hidden.new_empty(hidden.shape[0], dtype=call.sum_dtype)
    lse = torch.empty_like(losses)
    with torch.autocast(hidden.device.type, enabled=False):
        w, b = _cast(weight, bias, call)
        for start in range(0, hidden.shape[0], call.rows):
            chunk(slice(start, start + call.rows))
    return losses, lse


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    divisor: Tensor,
    call: _Call,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `_losses`, and d(sum / divisor) by hidden, weight and bias on the same way."""

    def chunk(rows: slice) -> None:
        h_Rd = hidden[rows].to(call.matmul_dtype)
        dz_RV, tanh_RV = _logits(h_Rd, w, b, call)
        losses[rows], _, sums_R1 = _reduce_(dz_RV, targets[rows], call)
        factor_R1 = _factor(targets[rows], 1 / divisor, call)
        dz_RV.mul_(factor_R1 / sums_R1)
        dz_RV.scatter_add_(1, _index(targets[rows], call), -factor_R1)
        dz_RV = _through_scale_(dz_RV, tanh_RV, call)
        if db is not None:
            db.add_(dz_RV.sum(0))
        dz_RV = dz_RV.to(call.matmul_dtype)
        if dh is not None:
            _product_into(dh[rows], dz_RV, w)
        if dw is not None:
            _add_outer_(dw, dz_RV, h_Rd)

    wants_hidden, wants_weight, wants_bias = call.wants
    losses = hidden.new_empty(hidden.shape[0], dtype=call.sum_dtype)
    dh = torch.empty_like(hidden) if wants_hidden else None
    dw = torch.zeros_like(weight, dtype=_sum_of(weight)) if wants_weight else None
    db = losses.new_zeros(weight.shape[0]) if wants_bias else None
    with torch.autocast(hidden.device.type, enabled=False):
        w, b = _cast(weight, bias, call)
        for start in range(0, hidden.shape[0], call.rows):
            chunk(slice(start, start + call.rows))
    return losses, dh, dw, db


def _gradients_by_slice(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: Tensor,
    lse: Tensor,
    call: _Call,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """factor * d(sum of losses), slice by slice of the vocabulary, from the log-sum-exps."""

    def chunk(start: int, stop: int) -> None:
        w_Sd, b_S = _cast(weight[start:stop], None if bias is None else bias[start:stop], call)
        dz_NS, tanh_NS = _logits(h_Nd, w_Sd, b_S, call)
        dz_NS.sub_(lse[:, None]).exp_().mul_(factor_N1)
        here_N1 = (index_N1 >= start) & (index_N1 < stop)
        local_N1 = (index_N1 - start).clamp_(0, stop - start - 1)
        dz_NS.scatter_add_(1, local_N1, -factor_N1 * here_N1)
        dz_NS = _through_scale_(dz_NS, tanh_NS, call)
        if db is not None:
            db[start:stop] = dz_NS.sum(0)
        dz_NS = dz_NS.to(call.matmul_dtype)
        if dw is not None:
            _product_into(dw[start:stop], dz_NS.t(), h_Nd)
        if dh is not None:
            _add_product_(dh, dz_NS, w_Sd)

    wants_hidden, wants_weight, wants_bias = call.wants
    rows, vocab = hidden.shape[0], weight.shape[0]
    step = max(1, min(vocab, call.rows * vocab // max(rows, 1)))
    dh = torch.zeros_like(hidden, dtype=call.sum_dtype) if wants_hidden else None
    dw = torch.empty_like(weight) if wants_weight else None
    db = lse.new_empty(vocab) if wants_bias else None
    factor_N1 = _factor(targets, factor, call)
    index_N1 = _index(targets, call)
    with torch.autocast(hidden.device.type, enabled=False):
        h_Nd = hidden.to(call.matmul_dtype)
        for start in range(0, vocab, step):
            chunk(start, min(vocab, start + step))
    return dh, dw, db


def _logits(
    h: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, *, for_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Scaled and capped logits in the dtype of sums, and tanh(z / c) if the gradient needs it."""
    h = h.to(call.matmul_dtype)
    z = torch.mm(h, weight.t()) if bias is None else torch.addmm(bias, h, weight.t())
    z = z.to(call.sum_dtype)
    if call.scale != 1.0:
        z.mul_(call.scale)
    if call.softcap is None:
        return z, None
    tanh = z.div_(call.softcap).tanh_()
    if not for_gradient:
        return tanh.mul_(call.softcap), None
    return tanh * call.softcap, tanh


def _reduce_(z_RV: Tensor, targets: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (R,), log-sum-exp (R,), and sums (R, 1); leaves exp(z - max) in z_RV.

    In place on purpose: torch.logsumexp would make a second chunk.
    """
    top_R1 = z_RV.amax(1, keepdim=True)
    z_RV.sub_(top_R1)
    picked_R1 = z_RV.gather(1, _index(targets, call))
    sums_R1 = z_RV.exp_().sum(1, keepdim=True)
    log_R1 = sums_R1.log()
    loss_R = (log_R1 - picked_R1)[:, 0]
    loss_R = torch.where(targets != call.ignore_index, loss_R, loss_R.new_zeros(()))
    return loss_R, (log_R1 + top_R1)[:, 0], sums_R1


def _through_scale_(dz: Tensor, tanh: Tensor | None, call: _Call) -> Tensor:
    if tanh is not None:
        dz.mul_(tanh.square_().neg_().add_(1))
    return dz.mul_(call.scale) if call.scale != 1.0 else dz


def _factor(targets: Tensor, factor: Tensor, call: _Call) -> Tensor:
    """(R, 1): factor where the target counts, else 0."""
    return torch.where(targets != call.ignore_index, factor, torch.zeros_like(factor))[:, None]


def _index(targets: Tensor, call: _Call) -> Tensor:
    """(R, 1): the targets, with a harmless index where one is ignored."""
    return targets.masked_fill(targets == call.ignore_index, 0).long()[:, None]


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))


def _add_outer_(dw: Tensor, dz_RV: Tensor, h_Rd: Tensor) -> None:
    """dw += dz^T h. In a narrower dtype the product is a tensor of its own: slice by slice then,
    so that it stays as small as the chunk."""
    step = dw.shape[0]
    if dw.dtype != dz_RV.dtype:
        step = max(MIN_ROWS, dz_RV.numel() // h_Rd.shape[1])
    for start in range(0, dw.shape[0], step):
        _add_product_(dw[start : start + step], dz_RV[:, start : start + step].t(), h_Rd)


def _cast(weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor | None]:
    return weight.to(call.matmul_dtype), None if bias is None else bias.to(call.matmul_dtype)


def _sum_of(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _where(gradients: str, hidden: Tensor, weight: Tensor) -> Literal["forward", "backward"]:
    if gradients == "auto":
        narrow = _matmul_dtype(hidden).itemsize < 4
        return "backward" if weight.requires_grad and narrow else "forward"
    return "forward" if gradients == "forward" else "backward"


def _wants(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


def _rows(chunk_rows: Literal["auto"] | int, hidden: Tensor, weight: Tensor) -> int:
    """Rows of a chunk, evened out so that the last one is not a small rest."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    if chunk_rows == "auto":
        share = weight.numel() * weight.element_size() // WEIGHT_SHARE
        limit = max(MIN_ROWS, max(CHUNK_BYTES, share) // (4 * vocab))
    elif isinstance(chunk_rows, int) and not isinstance(chunk_rows, bool) and chunk_rows > 0:
        limit = chunk_rows
    else:
        raise ConfigError(
            f"chunk_rows = {chunk_rows!r}", expected="a positive number of rows, or 'auto'"
        )
    chunks = max(1, -(-rows // limit))
    return max(1, -(-rows // chunks))


# ---- what is refused ---------------------------------------------------------------------------


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    reduction: str,
    gradients: str,
    softcap: float | None,
) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, " + (
        f"targets {tuple(targets.shape)}"
    )
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or targets.shape != hidden.shape[:1]:
        raise ConfigError(shapes, expected="(N, d), (V, d) and (N,)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(f"bias {tuple(bias.shape)}", expected=f"({weight.shape[0]},)")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ConfigError(f"targets of {targets.dtype}", expected="class indices (int64)")
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction = {reduction!r}", expected="'mean' or 'sum'")
    if gradients not in ("auto", "forward", "backward"):
        raise ConfigError(f"gradients = {gradients!r}", expected="'auto', 'forward' or 'backward'")
    if softcap is not None and not softcap > 0:
        raise ConfigError(f"softcap = {softcap!r}", expected="a positive number, or None")


def _check_targets(targets: Tensor, kept: Tensor, vocab: int) -> None:
    # Reading values elsewhere would wait for the device; fake tensors have none.
    if targets.device.type != "cpu" or isinstance(targets, FakeTensor) or not targets.numel():
        return
    wrong = kept & ((targets < 0) | (targets >= vocab))
    if bool(wrong.any()):
        raise DataError(
            f"target {int(targets[wrong][0])} is outside the vocabulary",
            expected=f"0 to {vocab - 1}, or the ignored index",
            hint="Check that the tokenizer belongs to the model.",
        )


# ---- the reference -----------------------------------------------------------------------------


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """The equations as they stand, in float64, all logits at once; autograd differentiates it."""
    z = torch.einsum("nd,vd->nv", hidden.double(), weight.double())
    if bias is not None:
        z = z + bias.double()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    total, count = z.new_zeros(()), 0
    for z_V, target in zip(z, targets.tolist(), strict=True):
        if target != ignore_index:
            total = total + torch.log(torch.exp(z_V - z_V.max()).sum()) + z_V.max() - z_V[target]
            count += 1
    if num_items is not None:
        return total / num_items
    return total / count if reduction == "mean" else total
