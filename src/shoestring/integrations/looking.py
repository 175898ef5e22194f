"""The largest batch of a data loader, found without leaving a trace.

Whoever looks draws examples and runs the collator, and both may draw random numbers or count.
Afterwards every random state, and what data set, collator and sampler hold, is as it was, so that
the order of the data and all that is random in training come out as if nobody had looked.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, IterableDataset

from ..errors import ConfigError, DataError

GIVE_BATCH = (
    "Give one batch of the largest size that will come: batch=..., as the collator makes it."
)


@contextlib.contextmanager
def undisturbed(*objects: Any) -> Iterator[None]:
    """Puts back the global random states, and the attributes and generators of these objects."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    held = [(each, dict(vars(each))) for each in _with_parts(objects)]
    generators = [(g, _state(g)) for _, before in held for g in before.values() if _state(g)]
    try:
        yield
    finally:
        for each, before in held:
            vars(each).clear()
            vars(each).update(before)
        for generator, state in generators:
            _set_state(generator, state)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def _with_parts(objects: Sequence[Any]) -> list[Any]:
    """The objects that have attributes, and those that they wrap, each once."""
    found: dict[int, Any] = {}
    waiting = list(objects)
    while waiting:
        each = waiting.pop()
        if id(each) in found or not hasattr(each, "__dict__") or isinstance(each, type):
            continue
        found[id(each)] = each
        inner = ("dataset", "data_collator", "sampler", "batch_sampler", "base_dataloader")
        waiting += [vars(each)[name] for name in inner if name in vars(each)]
    return list(found.values())


def _state(value: Any) -> Any:
    """The state of a source of random numbers; None for what is none."""
    if isinstance(value, torch.Generator):
        return (value.get_state(),)
    if isinstance(value, random.Random):
        return (value.getstate(),)
    if isinstance(value, np.random.Generator):
        return (value.bit_generator.state,)
    if isinstance(value, np.random.RandomState):
        return (value.get_state(),)
    return None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(*state)
    elif isinstance(generator, random.Random):
        generator.setstate(*state)
    else:
        generator.bit_generator.state = state[0]


def largest_batch(loader: Any, *, what: str = "training") -> dict[str, Any]:
    """The largest batch that this loader can give: tensors by name.

    It is made by the loader's own collator from the longest examples, so it is the largest that
    padding, concatenating or stacking them gives. Every example is looked at for its length.
    ConfigError for loaders of which that cannot be known, DataError for one without examples.
    """
    dataset: Any = loader.dataset
    rows, collate = _rows(loader), loader.collate_fn
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"the {what} data can only be read from front to back, so its largest batch is not "
            "known",
            expected="a data set with a length", hint=GIVE_BATCH,
        )  # fmt: skip
    if rows is None:
        raise ConfigError(
            f"the {what} batches are put together by {type(loader.batch_sampler).__name__}, so "
            "the largest is not known",
            expected="batches of a fixed number of examples", hint=GIVE_BATCH,
        )  # fmt: skip
    if not len(dataset):
        raise DataError(f"there is no {what} example", expected="at least one")
    with undisturbed(dataset, collate, loader):
        lengths = _lengths(dataset)
        chosen = _longest(lengths, min(rows, len(dataset)))
        batch = collate([dataset[i] for i in chosen])
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"the collator gives a {type(batch).__name__}", expected="a mapping of tensors by name",
            hint=GIVE_BATCH,
        )  # fmt: skip
    return dict(batch)


def _rows(loader: Any) -> int | None:
    """Examples in a batch; None where a sampler decides that anew for each."""
    if loader.batch_size is not None:
        return int(loader.batch_size)
    sampler = loader.batch_sampler
    sampler = getattr(sampler, "batch_sampler", sampler)  # inside of Accelerate's
    return sampler.batch_size if type(sampler) is BatchSampler else None


def _longest(lengths: Mapping[str, Sequence[int]], rows: int) -> list[int]:
    """Places of the examples to put together: the longest of every column, then the longest in
    all columns together."""
    columns = list(lengths.values())
    total = [sum(each) for each in zip(*columns, strict=True)]
    places = range(len(total))
    first = [max(places, key=column.__getitem__) for column in columns]
    rest = sorted(places, key=lambda i: -total[i])
    return list(dict.fromkeys([*first, *rest]))[:rows]


def _lengths(dataset: Any) -> dict[str, list[int]]:
    """Elements of every column of every example."""
    quick = _lengths_in_arrow(dataset)
    if quick is not None:
        return quick
    columns: dict[str, list[int]] = {}
    for place in range(len(dataset)):
        example = dataset[place]
        named = example if isinstance(example, Mapping) else {"": example}
        for name, value in named.items():
            column = columns.setdefault(name, [])
            column += [0] * (place - len(column))
            column.append(_elements(value))
    for column in columns.values():
        column += [0] * (len(dataset) - len(column))
    return columns


def _lengths_in_arrow(dataset: Any) -> dict[str, list[int]] | None:
    """The same from the columns of a `datasets.Dataset`, without making a Python object of every
    token; None for other data sets, and for ones that are transformed when read."""
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "column_names"):
        return None
    if dataset.format["type"] == "custom":
        return None
    import pyarrow.compute as pc
    from pyarrow import types

    table = dataset.with_format("arrow")[:]
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        lists = types.is_list(column.type) or types.is_large_list(column.type)
        if lists and not types.is_nested(column.type.value_type):
            columns[name] = pc.fill_null(pc.list_value_length(column), 0).to_pylist()
        elif types.is_nested(column.type):
            return None
        else:
            columns[name] = [1] * len(column)
    return columns


def _elements(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, np.ndarray):
        return value.size
    if isinstance(value, list | tuple):
        return sum(_elements(v) for v in value) if value and _is_nested(value[0]) else len(value)
    return len(value) if isinstance(value, str | bytes) else 1


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple | Tensor | np.ndarray | str)
