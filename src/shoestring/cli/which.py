"""`shoestring plan MODEL MODEL ...`: which of them fits, trained how.

For every model ways to train it are tried from the strictest: all weights, by exact methods, then
by those of every looser fidelity that `--allow` lets in, then a LoRA beside float32 weights, then
beside 16-bit ones. The first that fits is the model's answer. What was not tried is said.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ..errors import ConfigError, OutOfBudget, ShoestringError
from ..units import format_bytes
from .subjects import subject_of_model
from .terminal import Terminal

if TYPE_CHECKING:
    from .plan import Arguments

_RANK = 16


@dataclass(frozen=True)
class Arm:
    """A way to train. allow: what plans may change about the network as it is then; rank: of a
    LoRA, 0 = all weights; bits: of the weights that are frozen, or else trained."""

    allow: str
    rank: int
    bits: int

    @property
    def is_structural(self) -> bool:
        """Whether what is trained is left to the plan."""
        return not self.rank and self.allow == "structural"

    def __str__(self) -> str:
        if self.is_structural:
            return "structural methods"
        if not self.rank:
            return f"all weights, {self.allow}"
        return f"LoRA of rank {self.rank} on {self.bits}-bit weights"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one way to train one model needs."""

    model: str
    arm: Arm
    parameters: int
    trained: int
    smallest_bytes: int
    fits: bool


def which_fits(arguments: "Arguments", terminal: Terminal) -> int:
    """Prints the table; exit code 0, or 3 by OutOfBudget when no model fits."""
    _refuse(arguments)
    arms, left_out = _arms(arguments)
    tried: list[Fit] = []
    for model in arguments.models:
        for arm in arms:
            with terminal.progress.status(f"{model}: {arm}"):
                tried.append(_fit(arguments, model, arm))
            if tried[-1].fits:
                break
    budget = _budget(arguments)
    fitting = [f for f in tried if f.fits]
    best = max(fitting, key=lambda f: f.parameters, default=None)
    in_full = [f for f in fitting if not f.arm.rank and not f.arm.is_structural]
    whole = max(in_full, key=lambda f: f.parameters, default=None)
    terminal.emit({
        "models": [asdict(f) for f in tried], "best": asdict(best) if best else None,
        "largest_in_full": asdict(whole) if whole else None, "budget": budget,
        "not_tried": left_out,
    })  # fmt: skip
    terminal.say(_table(tried))
    for words in left_out:
        terminal.note(f"not tried: {words}")
    if best is None:
        least = min(tried, key=lambda f: f.smallest_bytes)
        raise OutOfBudget(
            f"none of {len(arguments.models)} models fits into {budget}",
            expected=f"at least {least.smallest_bytes} bytes, for {least.model}: {least.arm}",
            smallest_bytes=least.smallest_bytes, changes=[],
        )  # fmt: skip
    terminal.say(f"largest that fits: {best.model}, {best.arm}")
    if whole is not None and whole.model != best.model:
        terminal.say(f"largest that fits with all its weights: {whole.model}, {whole.arm}")
    return 0


def _refuse(arguments: "Arguments") -> None:
    if arguments.max is not None:
        raise ConfigError("--max is given beside several models", expected="one MODEL with --max")
    for model in arguments.models:
        if model.endswith(".toml"):
            raise ConfigError(f"{model} is given beside other models",
                              expected="configs: a run has sizes of its own")  # fmt: skip


def _budget(arguments: "Arguments") -> str:
    return arguments.budget or "auto"


def _arms(arguments: "Arguments") -> tuple[list[Arm], list[str]]:
    """Ways to train, the strictest first, and what is not among them."""
    from ..planner.adapters import has_peft
    from ..planner.ways import FIDELITIES, allowed

    arms, left_out = [], []
    known: set[str] = set()
    for allow in FIDELITIES:
        names = {m.name for m in allowed(allow, hands_over=arguments.hands_over)}
        # Bitwise is exact without some methods: who does not ask for it is not shown it.
        asked = allow == arguments.allow or allow != "bitwise"
        if FIDELITIES.index(allow) > FIDELITIES.index(arguments.allow):
            if names - known:
                left_out.append(f"{allow} methods ({', '.join(sorted(names - known))}): --allow "
                                f"{allow} lets them in")  # fmt: skip
            known |= names
        elif asked and names - known:
            arms.append(Arm(allow, 0, 32))
            known |= names
    for each in sorted({"optimizer", "batch"} - {*arguments.hands_over}):
        left_out.append(f"methods of the {each}: --hands-over {each}, for a loop that leaves it to "
                        "the plan")  # fmt: skip
    rank = _RANK if arguments.lora_rank is None else arguments.lora_rank
    if rank and has_peft():
        arms += [Arm(arguments.allow, rank, bits) for bits in (32, 16)]
    elif rank:
        left_out.append("LoRA: peft is not installed (pip install shoestring[peft])")
    else:
        left_out.append("LoRA: --lora-rank 0")
    left_out.append("frozen weights of 8 and 4 bits: in a plan by name (lora, quantized_base)")
    return arms, left_out


def _fit(arguments: "Arguments", model: str, arm: Arm) -> Fit:
    subject = subject_of_model(arguments, model, allow=arm.allow, rank=arm.rank, bits=arm.bits)
    try:
        with subject.scope():
            plans = subject.plans_now(seconds=False)
            smallest = plans.smallest_bytes
            fits = plans.planner.choose(plans.limit_bytes(subject.budget)) is not None
    except ShoestringError as error:
        raise type(error)(f"{model}: {error}") from error
    parameters = list(plans.planner.base.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Fit(
        model=model, arm=arm, parameters=sum(p.numel() for p in parameters), trained=trained,
        smallest_bytes=smallest, fits=fits,
    )  # fmt: skip


def _table(tried: list[Fit]) -> Table:
    from ..report.receipts import count

    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("trained how")
    for name in ("parameters", "trained", "smallest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for fit in tried:
        table.add_row(
            _short(fit.model), str(fit.arm), count(fit.parameters), count(fit.trained),
            format_bytes(fit.smallest_bytes), "fits" if fit.fits else "does not fit",
        )  # fmt: skip
    return table


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_dir() else model
