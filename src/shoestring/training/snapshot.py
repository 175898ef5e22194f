"""All that a run needs to go on bit for bit: weights, optimizer, random numbers, positions.

`Snapshot.of` takes what is alive without copying it; `copied` is a copy of its own, for a writer
in the background. Weights that two names share are written once. What is divided over a group of
processes is written part by part, as the file that one process would have written, and every
process reads back its own part: a run may go on with another number of them.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoint import Checkpoint
from ..checkpoint.tensors import InParts
from ..errors import CheckpointError
from ..optim import InTurns, put_state
from ..optim.turns import STEP, TURN
from .distributed import World
from .out_of_memory import is_out_of_memory
from .sharding import Spread, divided, own_part

MODEL, OPTIMIZER, RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"
STATE = "state.json"
_SEPARATOR = "|"  # no parameter's name holds it


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What a checkpoint holds; see `Store.save`."""

    tensors: dict[str, dict[str, Tensor | InParts]]
    facts: dict[str, Any]

    @classmethod
    def of(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, **facts: Any
    ) -> "Snapshot":
        """Everything as it is now. Every process has to take part; the first one writes, and all
        call `finish` afterwards."""
        weights, aliases = _weights(model)
        states, groups = _optimizer(model, optimizer)
        tensors = {MODEL: weights, OPTIMIZER: states, RANDOM: _random_tensors(world)}
        return cls(
            tensors={file: _writable(part) for file, part in tensors.items()},
            facts={
                **facts, "aliases": aliases, "groups": groups, "random": _random_numbers(),
                "processes": world.size, "model_info": getattr(_config(model), "shoestring", None),
            },
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.itemsize for part in self.tensors.values() for t in part.values())

    def copied(self) -> "Snapshot":
        """The same with tensors of its own, in host memory. Not of what is divided."""

        def copy(tensor: Tensor | InParts) -> Tensor:
            assert isinstance(tensor, Tensor)
            return tensor.detach().to("cpu", copy=True)

        tensors: dict[str, dict[str, Tensor | InParts]] = {
            file: {name: copy(t) for name, t in part.items()} for file, part in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def finish(self) -> None:
        """Let every process be done with what is divided: see `Spread`."""
        for part in self.tensors.values():
            for tensor in part.values():
                if isinstance(tensor, Spread):
                    tensor.finish()

    def texts(self) -> dict[str, str]:
        """The JSON that goes beside the tensors."""
        return {STATE: json.dumps(self.facts, indent=1) + "\n"}


def restore(
    saved: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
) -> dict[str, Any]:
    """Put a checkpoint back in place; returns its facts. CheckpointError when it does not fit."""
    facts = saved.json(STATE)
    try:
        with torch.no_grad():
            _restore_weights(saved, model, facts)
            _restore_optimizer(saved, model, optimizer, facts["groups"])
        info = getattr(_config(model), "shoestring", None)
        if isinstance(info, dict) and isinstance(facts["model_info"], dict):
            info.update(facts["model_info"])  # in place: the stack's runners hold it
        _restore_random(saved, world, facts["random"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, CheckpointError) or is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{saved.path} does not fit this run: {error}",
            expected="a checkpoint of the same model and optimizer",
        ) from error
    return dict(facts)


def _writable(tensors: dict[str, Tensor]) -> dict[str, Tensor | InParts]:
    return {n: Spread(t) if isinstance(t, DTensor) else t for n, t in tensors.items()}


# ---- weights -----------------------------------------------------------------------------------


def writable_weights(model: nn.Module) -> tuple[dict[str, Tensor | InParts], dict[str, str]]:
    """As a checkpoint has them: each tensor once, and the names that share one."""
    weights, aliases = _weights(model)
    return _writable(weights), aliases


def _weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors of the state_dict, each once; name -> the name that its tensor is kept under)."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owner: dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} of the model's state is a {type(tensor).__name__}",
                expected="tensors only: nothing is ever pickled",
            )
        place: Any = id(tensor)  # a part of no rows lies where others do
        if not isinstance(tensor, DTensor):
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        tensor = tensor.detach()
        first = owner.setdefault(place, name) if tensor.numel() else name
        if first == name:
            kept[name] = tensor
        else:
            aliases[name] = first
    return kept, aliases


def _restore_weights(saved: Checkpoint, model: nn.Module, facts: Mapping[str, Any]) -> None:
    mine, aliases = _weights(model)
    if aliases != facts["aliases"]:
        raise ValueError(f"its tied weights are {facts['aliases']}, the model's are {aliases}")
    extra: dict[str, Tensor] = {}
    seen = set()
    for name, value in saved.tensors(MODEL):
        if name not in mine:
            raise ValueError(f"the model has no {name}")
        target = mine[name]
        if (target.shape, target.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{name} is {tuple(value.shape)} {value.dtype} in it, "
                f"{tuple(target.shape)} {target.dtype} in the model"
            )
        seen.add(name)
        if name.endswith("_extra_state"):
            extra[name] = value
        elif isinstance(target, DTensor):
            target.to_local().copy_(own_part(value, target))
        else:
            target.copy_(value)
    if missing := set(mine) - seen:
        raise ValueError(f"it lacks {sorted(missing)[0]}")
    for name, value in extra.items():
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


# ---- optimizer ---------------------------------------------------------------------------------


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(state tensors as "parameter|key", settings of the groups with their parameters' names)."""
    names = _names(model)
    states: dict[str, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        numbers: dict[str, dict[str, Any]] = {}
        for parameter in group["params"]:
            name = names[id(parameter)]
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    states[f"{name}{_SEPARATOR}{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        settings = {k: v for k, v in group.items() if k != "params"}
        parameters = [names[id(p)] for p in group["params"]]
        groups.append({"settings": settings, "parameters": parameters, "numbers": numbers})
    return states, groups


def _restore_optimizer(
    saved: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
) -> None:
    names = _names(model)
    mine = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if mine != [group["parameters"] for group in groups]:
        raise ValueError("its optimizer trains other parameters")
    owners = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: parameter for name, (parameter, _) in owners.items()}
    if isinstance(optimizer, InTurns):
        settings = groups[0]["settings"]
        optimizer.go_to(settings[TURN], settings[STEP])
    for name, value in saved.tensors(OPTIMIZER):
        parameter_name, _, key = name.rpartition(_SEPARATOR)
        parameter, group = owners[parameter_name]
        # As in torch's Optimizer.load_state_dict: only fused and capturable ones count steps there.
        counts_here = key != "step" or group.get("fused") or group.get("capturable")
        device = parameter.device if counts_here else torch.device("cpu")
        whole = isinstance(parameter, DTensor) and value.shape == parameter.shape
        put_state(
            optimizer, parameter, key,
            divided(value, parameter) if whole else value.to(device, copy=True),
        )  # fmt: skip
    for group in groups:
        for parameter_name, numbers in group["numbers"].items():
            optimizer.state[parameters[parameter_name]].update(numbers)


# ---- random numbers ----------------------------------------------------------------------------


def _random_tensors(world: World) -> dict[str, Tensor]:
    """The generators of torch, of every process: they drop out each on their own."""
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    found = {}
    for kind, state in states.items():
        for rank, each in enumerate(world.gather(state)):
            found[f"{kind}{_SEPARATOR}{rank}"] = each
    return found


def _random_numbers() -> dict[str, Any]:
    """The generators of Python and numpy, as JSON."""
    version, values, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(values), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), place, has_gauss, cached],
    }


def _restore_random(saved: Checkpoint, world: World, numbers: Mapping[str, Any]) -> None:
    version, values, gauss = numbers["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, place, has_gauss, cached = numbers["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    for name, state in saved.tensors(RANDOM):
        kind, _, rank = name.partition(_SEPARATOR)
        if int(rank) != world.rank:
            continue
        if kind == "cpu":
            torch.set_rng_state(state)
        elif world.device.type == "cuda":
            torch.cuda.set_rng_state(state, world.device)
