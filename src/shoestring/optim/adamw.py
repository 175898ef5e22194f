"""AdamW whose moments and weights may be kept in few bits; what it computes in is float32.

A parameter is updated in pieces of 65,536 values: moments are decoded, the update is made, moments
are encoded again, weights are rounded. So what a step holds for itself does not depend on the size
of a parameter: TEMPORARY_BYTES at most, whatever the settings.

Random numbers for rounding come from a generator of its own, seeded anew by (seed, place of the
parameter, number of the step). So the order in which parameters are stepped does not matter, and a
run that is resumed draws what it would have drawn: seed and step are part of the state_dict.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..ops.state_codes import Coder, Format
from ..ops.stochastic_rounding import to_bfloat16
from .stepping import evaluated

PIECE = 1 << 16
"""Values that are updated at a time; a multiple of every block."""
SMALL = 4096
"""Moments of fewer values than this stay float32: they are few bytes, and often of norms."""
TEMPORARY_BYTES = 2_400_000
_TORCH_ONLY = frozenset(
    "amsgrad maximize capturable differentiable foreach fused decoupled_weight_decay".split()
)
_OURS = ("decoupled", "bits", "rounding", "stochastic_weights")
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether they have a sign


class ChunkedAdamW(Optimizer):
    """AdamW (arXiv 1711.05101), or Adam where decoupled = False.

    bits: of the moments: 32, 8 or 4.  rounding: of moments, "stochastic" or "nearest".
    stochastic_weights: bfloat16 weights are rounded by chance, not to the nearest.
    seed: of the generator that rounds.
    With bits = 32 and float32 weights every step is bit for bit that of torch's AdamW
    (foreach=False, fused=False).

    A state holds "step" (an int) and the moments: float32 tensors of the parameter's shape, or
    codes (uint8) and, under "exp_avg_scale" and "exp_avg_sq_scale", the blocks' largest
    magnitudes (float32).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        decoupled: bool = True,
        bits: int = 32,
        rounding: str = "stochastic",
        stochastic_weights: bool = False,
        seed: int = 0,
    ) -> None:
        self._places: dict[int, int] = {}
        self._coders: dict[Any, Coder] = {}
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "decoupled": decoupled, "bits": bits, "rounding": rounding,
            "stochastic_weights": stochastic_weights, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults)

    @classmethod
    def like(cls, made: Optimizer, **settings: Any) -> "ChunkedAdamW":
        """With the groups of an Adam, AdamW or ChunkedAdamW, and these settings in all of them.

        ConfigError for any other optimizer, for one that has begun, and for amsgrad, maximize,
        capturable and differentiable.
        """
        if not isinstance(made, torch.optim.Adam | torch.optim.AdamW | ChunkedAdamW):
            raise ConfigError(
                f"the optimizer is a {type(made).__name__}",
                expected="torch.optim.AdamW or Adam: its two moments are what is kept otherwise",
            )
        if made.state:
            raise ConfigError(
                f"this {type(made).__name__} has made steps already",
                expected="a new one; load_state_dict comes afterwards",
            )
        groups = []
        for group in made.param_groups:
            for name in ("amsgrad", "maximize", "capturable", "differentiable"):
                if group.get(name):
                    raise ConfigError(
                        f"{type(made).__name__}({name}=True) cannot keep its states in few bits",
                        expected=f"{name}=False",
                    )
            decoupled = group.get("decoupled", group.get("decoupled_weight_decay"))
            if decoupled is None:
                decoupled = isinstance(made, torch.optim.AdamW)
            taken = {k: v for k, v in group.items() if k not in _TORCH_ONLY}
            taken["params"] = list(group["params"])
            groups.append({**taken, "decoupled": decoupled, **settings})
        return cls(groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ConfigError(
                    f"a parameter of {parameter.dtype}",
                    expected="float32, bfloat16 or float16: updates are computed in float32",
                )
            self._places[id(parameter)] = len(self._places)
            for key in MOMENTS:  # tables are made here, not in the middle of a step
                self._coder(self.param_groups[-1], parameter, key)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a state_dict of the same kind; in 32 bits, from one of torch's Adam and AdamW too.

        ConfigError, before anything is changed, where moments are kept in other bits. How they
        are kept is not loaded; the seed is.
        """
        states: dict[Any, Any] = {}
        groups = []
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            kept = {name: mine[name] for name in _OURS}
            loaded = {k: v for k, v in saved.items() if k not in _TORCH_ONLY}
            groups.append({"seed": mine["seed"], **loaded, **kept})
            for key, parameter in zip(saved["params"], mine["params"], strict=False):
                if key in state_dict["state"]:
                    state = _on(parameter.device, state_dict["state"][key])
                    states[parameter] = self._checked(mine, parameter, state)
        groups += state_dict["param_groups"][len(groups) :]
        # torch would cast every tensor of the state to the parameter's dtype.
        super().load_state_dict({**state_dict, "param_groups": groups, "state": {}})
        self.state.update(states)

    # ---- one parameter ---------------------------------------------------------------------

    def _update(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        state = self._checked(group, parameter, self.state[parameter])
        if not state:
            self._begin(group, parameter, state)
        state["step"] += 1
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise ConfigError("a sparse gradient", expected="dense gradients (sparse=False)")
        order = _order(parameter)
        weight, gradient = _flat(parameter, order), _in_order(gradient, order).reshape(-1)
        moments = [
            _Moment(state, key, self._coder(group, parameter, key), order) for key in MOMENTS
        ]
        draw = _Draw(self._generator(group, parameter, state["step"]))
        for piece in _pieces(parameter):
            _step_piece(weight[piece], gradient[piece], moments, piece, group, state["step"], draw)

    def _begin(self, group: dict[str, Any], parameter: nn.Parameter, state: dict[str, Any]) -> None:
        state["step"] = 0
        count, device = parameter.numel(), parameter.device
        for key in MOMENTS:
            coder = self._coder(group, parameter, key)
            if coder is None:
                state[key] = torch.zeros_like(parameter, dtype=torch.float32)
                continue
            # Every code of a block whose magnitude is 0 stands for 0.
            form = coder.form
            state[key] = torch.zeros(form.code_bytes(count), dtype=torch.uint8, device=device)
            state[f"{key}_scale"] = torch.zeros(form.blocks(count), device=device)

    def _checked(
        self, group: dict[str, Any], parameter: nn.Parameter, state: dict[str, Any]
    ) -> dict[str, Any]:
        """The state, if it is one that this parameter would have here (or none yet)."""
        if not state:
            return state
        if isinstance(state.get("step"), Tensor):
            state["step"] = int(state["step"])  # as torch's AdamW has it
        for key in MOMENTS:
            coder = self._coder(group, parameter, key)
            size = coder.form.code_bytes(parameter.numel()) if coder else parameter.numel()
            fits = (coder is not None) == (f"{key}_scale" in state) and key in state
            if not fits or state[key].numel() != size:
                raise ConfigError(
                    f"the state that was loaded does not keep {key!r} of a parameter of "
                    f"{parameter.numel()} values in {group['bits']} bits",
                    expected=f"a state of an optimizer with bits = {group['bits']}",
                )
        return state

    def _coder(self, group: dict[str, Any], parameter: nn.Parameter, key: str) -> Coder | None:
        if group["bits"] == 32 or parameter.numel() < SMALL:
            return None
        name = (group["bits"], MOMENTS[key], group["rounding"], parameter.device)
        if name not in self._coders:
            self._coders[name] = Coder(
                Format(group["bits"], MOMENTS[key]), parameter.device,
                stochastic=group["rounding"] == "stochastic",
            )  # fmt: skip
        return self._coders[name]

    def _generator(
        self, group: dict[str, Any], parameter: nn.Parameter, step: int
    ) -> torch.Generator | None:
        by_chance = group["stochastic_weights"] and parameter.dtype == torch.bfloat16
        coded = group["bits"] != 32 and group["rounding"] == "stochastic"
        if isinstance(parameter, FakeTensor) or not (by_chance or coded):
            return None  # fake tensors have no values to draw
        seed = _mixed(group["seed"], self._places[id(parameter)], step)
        return torch.Generator(parameter.device).manual_seed(seed)


@dataclass(slots=True)
class _Draw:
    """Random numbers of one update."""

    generator: torch.Generator | None

    def uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.numel(), device=like.device, generator=self.generator)

    def sixteen_bits(self, like: Tensor) -> Tensor:
        return torch.randint(
            1 << 16, (like.numel(),), dtype=torch.int32, device=like.device,
            generator=self.generator,
        )  # fmt: skip


class _Moment:
    """One moment of one parameter, piece by piece in float32."""

    def __init__(
        self, state: dict[str, Any], key: str, coder: Coder | None, order: list[int] | None
    ) -> None:
        self.coder = coder
        if coder is None:
            self.kept = _flat(state[key], order)
        else:
            self.kept, self.scale = state[key], state[f"{key}_scale"]

    def _places(self, piece: slice) -> tuple[slice, slice]:
        assert self.coder is not None
        form, count = self.coder.form, piece.stop - piece.start
        first_byte, first_block = form.code_bytes(piece.start), form.blocks(piece.start)
        return (
            slice(first_byte, first_byte + form.code_bytes(count)),
            slice(first_block, first_block + form.blocks(count)),
        )

    def read(self, piece: slice) -> Tensor:
        """Its values; where it is not coded, a view of them."""
        if self.coder is None:
            return self.kept[piece]
        codes, blocks = self._places(piece)
        return self.coder.decode(self.kept[codes], self.scale[blocks], piece.stop - piece.start)

    def write(self, piece: slice, values: Tensor, draw: _Draw) -> None:
        """Keep the values."""
        if self.coder is None:
            return
        codes, blocks = self._places(piece)
        noise = draw.uniform(values) if self.coder.stochastic else None
        self.kept[codes], self.scale[blocks] = self.coder.encode(values, noise)


def _step_piece(
    weight: Tensor, gradient: Tensor, moments: list[_Moment], piece: slice,
    group: dict[str, Any], step: int, draw: _Draw,
) -> None:  # fmt: skip
    # A function of its own, so that nothing of one piece is there during the next.
    mean, square = (moment.read(piece) for moment in moments)
    _update_piece(weight, gradient, mean, square, group, step, draw)
    for moment, values in zip(moments, (mean, square), strict=True):
        moment.write(piece, values, draw)


def _update_piece(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any],
    step: int, draw: _Draw,
) -> None:  # fmt: skip
    """AdamW on float32 moments, which change in place; operation for operation as torch has it."""
    lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
    value, gradient = weight.float(), gradient.float()  # themselves where they are float32
    if decay and group["decoupled"]:
        value.mul_(1 - lr * decay)
    elif decay:
        gradient = gradient.add(value, alpha=decay)
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    spread = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    value.addcdiv_(mean, spread, value=-lr / (1 - beta1**step))
    del spread
    if weight.dtype == torch.bfloat16 and group["stochastic_weights"]:
        weight.copy_(to_bfloat16(value, draw.sixteen_bits(value)))
    elif value.dtype != weight.dtype:
        weight.copy_(value)


def _on(device: torch.device, state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()}


def _pieces(parameter: nn.Parameter) -> Iterator[slice]:
    count = parameter.numel()
    starts = range(0, count, PIECE)
    if isinstance(parameter, FakeTensor) and len(starts) > 2:
        starts = range(0, count, (len(starts) - 1) * PIECE)  # those between cost what these do
    for start in starts:
        yield slice(start, min(start + PIECE, count))


def _order(parameter: Tensor) -> list[int] | None:
    """The dimensions as they lie in memory; None where that is their own order."""
    if parameter.is_contiguous():
        return None
    return sorted(range(parameter.ndim), key=parameter.stride().__getitem__, reverse=True)


def _in_order(tensor: Tensor, order: list[int] | None) -> Tensor:
    tensor = tensor.detach()
    return tensor if order is None else tensor.permute(order)


def _flat(tensor: Tensor, order: list[int] | None) -> Tensor:
    """The same values in that order, (n,), never a copy. ConfigError where there are gaps."""
    try:
        return _in_order(tensor, order).view(-1)
    except RuntimeError as error:
        raise ConfigError(
            f"a parameter of shape {tuple(tensor.shape)} and strides {tensor.stride()}",
            expected="one that fills its memory without gaps",
        ) from error


def _mixed(*numbers: int) -> int:
    """Integers -> 64 bits that look random (the finalizer of splitmix64, one round a number)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed
