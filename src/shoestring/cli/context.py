"""`shoestring context MODEL`: what a context takes in bytes, by form, and how long it can be.

From the config alone: no weights are read and nothing is allocated.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import Positional, arg

from ..errors import ConfigError, OutOfBudget
from ..units import format_bytes, parse_bytes
from .arguments import Common
from .caches import check_cache, settings_of
from .subjects import model_config
from .terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """What a context takes in bytes, by form, and how long it can be."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A config.json, a directory with one, or a model's name on the hub."""
    cache: tuple[str, ...] = ("4/4", "4/2", "4bits")
    """Forms: bits of keys/values (4/2), bytes a token (4700B), or bits of a number (3.25bits)."""
    calibration: str = ""
    """Of `shoestring calibrate`, for forms by bytes or bits."""
    tokens: int = 4096
    """Length of the context."""
    batch_size: int = 1
    """Rows."""
    budget: str = ""
    """Bytes for the context of one row, such as 2GiB; then the longest is said too."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}", expected="1 or more"
                )
        for spec in self.cache:
            check_cache(spec, calibration="")
        if self.calibration and not any(spec[-1:].isalpha() for spec in self.cache):
            check_cache(self.cache[0] if self.cache else "", calibration=self.calibration)
        if self.budget:
            parse_bytes(self.budget)


def run(arguments: Arguments, terminal: Terminal) -> int:
    """The table; exit code 0, or 3 where no form fits into the budget."""
    import torch

    from ..serve import Calibration, CompressedCache
    from ..serve.config import numbers, shapes, text_config

    config = text_config(model_config(arguments.model))
    calibration = Calibration.load(arguments.calibration) if arguments.calibration else None
    budget = parse_bytes(arguments.budget) if arguments.budget else None
    dtype = config.dtype or torch.float32
    tokens, rows = arguments.tokens, arguments.batch_size
    found: list[dict[str, Any]] = []
    for name, size in (("float32", 4), ("16 bits", 2)):
        each = numbers(config) * size
        longest = None if budget is None else budget // each
        found.append({"cache": name, "bytes": rows * tokens * each, "longest": longest})
    for spec in arguments.cache:
        settings = settings_of(spec, calibration=calibration, context=tokens)
        try:
            cache = CompressedCache(config, **settings)
        except ConfigError as error:  # of this form alone
            found.append({"cache": spec, "error": str(error)})
            continue
        longest = None if budget is None else _longest(cache, budget, dtype)
        size = cache.bytes_at(tokens, batch=rows, dtype=dtype)
        found.append({"cache": spec, "bytes": size, "longest": longest})
    for row in found:
        if "bytes" in row:
            row["bytes_per_token"] = row["bytes"] / rows / tokens
    left = len(config.per_layer_config) - len(shapes(config))
    terminal.emit({
        "model": arguments.model, "tokens": tokens, "batch_size": rows, "forms": found,
        "other_layers": left,
    })  # fmt: skip
    terminal.say(_shown(found, tokens, arguments.budget))
    if left:
        terminal.say(f"and {left} sliding or linear layers, which take what they take anyway")
    if all("error" in row for row in found[2:]):
        raise ConfigError(found[2]["error"])
    if budget is not None and not any(row.get("longest") for row in found):
        raise OutOfBudget(f"no context fits into {arguments.budget}", expected="more")
    return 0


def _longest(cache: Any, budget: int, dtype: Any) -> int:
    try:
        tokens: int = cache.longest_context(budget, dtype=dtype)
    except OutOfBudget:
        return 0
    return tokens


def _shown(rows: list[dict[str, Any]], tokens: int, budget: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("cache")
    heads = ["bytes a token", f"{tokens:,} tokens"] + ([f"longest in {budget}"] if budget else [])
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        if "error" in row:
            table.add_row(row["cache"], row["error"])
            continue
        cells = [f"{row['bytes_per_token']:,.0f}", format_bytes(row["bytes"])]
        table.add_row(row["cache"], *cells, *([f"{row['longest']:,}"] if budget else []))
    return table
