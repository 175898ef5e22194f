"""What does training by reversal cost, in bytes, operations, seconds and accuracy; is it exact?

    python benchmarks/reversible/run.py [--smoke] [--part NAME ...] [--rounds N]

Every row trains the network of networks.py. Parts: memory (and operations), depth, accuracy, inputs
(accuracy over many of them), equality (with stored activations, to the bit), behaviour (the checks
of tests/reversible) and time. Times are taken in processes of their own, one for each allocator
setting and number of threads, as medians over rounds in which every row runs once, in turn. One
JSON a part goes to results/; tables.py makes the tables of docs/methods/reversible.md from them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import behaviour
import equality
import tables
import torch
from measure import (
    gradients,
    memory,
    paired,
    relative_error,
    rounded,
    seconds,
    sharpened,
)
from networks import PEERS, Network, peer_version

from shoestring.training.receipt import environment

HERE = Path(__file__).parent
SEED = 0
# The configuration that published comparisons of these libraries were run in.
FULL = {"L": 24, "D": 256, "T": 256, "B": 8}
SMOKE = {"L": 2, "D": 32, "T": 16, "B": 2}
TUNED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "tuned": TUNED}


def ours(shape: dict[str, int]) -> dict[str, dict[str, Any]]:
    """The rows of ours: settings of ReversibleStack by name. keep_top counts sub-blocks."""
    every_mlp = tuple(range(1, 2 * shape["L"], 2))
    return {
        "ours, keep_top=0": {},
        "ours, keep_top=2": {"keep_top": 2},
        "ours, keep_top=4": {"keep_top": 4},
        "ours, MLP outputs held": {"hold_outputs": every_mlp},
        "ours, MLP in 4 slices": {"mlp_slices": 4},
        "ours, MLP in 4 slices, MLP outputs held": {"mlp_slices": 4, "hold_outputs": every_mlp},
    }


def rows(shape: dict[str, int], *, peers: bool = True) -> dict[str, Callable[[], Network]]:
    """Name -> how to build the network, for everything that is installed."""
    sizes = {"L": shape["L"], "D": shape["D"], "seed": SEED}
    found: dict[str, Callable[[], Network]] = {
        "plain": lambda: Network("plain", **sizes),
        "checkpoint": lambda: Network("checkpoint", **sizes),
    }
    for name in PEERS if peers else ():
        if peer_version(name) is not None:
            found[name] = lambda name=name: Network(name, **sizes)
    for name, settings in ours(shape).items():
        found[name] = lambda settings=settings: Network("ours", **sizes, **settings)
    return found


def data(shape: dict[str, int], seed: int = SEED + 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape["B"], shape["T"], shape["D"], generator=generator)


def run_memory(shape: dict[str, int]) -> dict[str, Any]:
    x, found = data(shape), {}
    base = None
    for name, make in rows(shape).items():
        numbers = memory(make(), x)
        base = base or numbers["operations"]  # plain comes first
        found[name] = {**numbers, "flops_x": numbers["operations"] / base}
        print(f"  {name:42} {found[name]}", flush=True)
    return {"rows": found, "skipped": [n for n in PEERS if peer_version(n) is None]}


def run_depth(shape: dict[str, int], depths: tuple[int, ...]) -> dict[str, Any]:
    """Bytes against the number of blocks."""
    ways: dict[str, dict[str, Any]] = {
        "plain": {"way": "plain"},
        "checkpoint": {"way": "checkpoint"},
        "feistel": {"way": "ours"},
        "feistel, dropout 0.1": {"way": "ours", "dropout": 0.1},
        "bdia": {"way": "ours", "rule": "bdia", "scale_bits": 14},
    }
    x, found = data(shape), {}
    for name, settings in ways.items():
        found[name] = {
            str(L): memory(Network(L=L, D=shape["D"], seed=SEED, **settings), x) for L in depths
        }
        print(f"  {name:24} {[v['peak_mb'] for v in found[name].values()]}", flush=True)
    n = x.numel()
    return {
        "rows": found,
        "expected_growth_bytes_per_block": {
            "feistel": 0,
            "feistel, dropout 0.1": 2 * torch.get_rng_state().numel(),
            "bdia": 2 * (-(-n // 8) + 4 * shape["B"]),
        },
    }


def run_accuracy(shape: dict[str, int], factors: tuple[float, ...]) -> dict[str, Any]:
    """Relative gradient error against stored activations in float64, and of the rebuilt input."""
    x, found = data(shape), {}
    ways = ["stored", *(n for n in PEERS if peer_version(n)), "ours"]
    for factor in factors:

        def net(way: str, factor: float = factor) -> Network:
            sizes = {"L": shape["L"], "D": shape["D"], "seed": SEED}
            return sharpened(lambda: Network(way, **sizes), factor)  # type: ignore[return-value]

        exact = gradients(net("stored").double(), x.double())
        errors = {way: relative_error(gradients(net(way), x), exact) for way in ways}
        errors["ours / stored"] = errors["ours"] / errors["stored"]
        errors["ours, rebuilt input"] = rebuilt_error(net("ours"), x)
        found[f"x{factor:g}"] = errors
        print(f"  x{factor:g} {errors}", flush=True)
    return {"rows": found}


def run_inputs(shape: dict[str, int], factors: tuple[float, ...], count: int) -> dict[str, Any]:
    """The gradient error of ours over that of stored float32, input by input: of one input either
    may be luckier."""
    found: dict[str, Any] = {}
    for factor in factors:

        def net(way: str, factor: float = factor) -> Network:
            sizes = {"L": shape["L"], "D": shape["D"], "seed": SEED}
            return sharpened(lambda: Network(way, **sizes), factor)  # type: ignore[return-value]

        exact, stored, ours = net("stored").double(), net("stored"), net("ours")
        ratios = []
        for seed in range(count):
            x = data(shape, seed)
            truth = gradients(exact, x.double())
            errors = [relative_error(gradients(each, x), truth) for each in (ours, stored)]
            ratios.append(errors[0] / errors[1])
        found[f"x{factor:g}"] = {
            "median": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
            "ratios": ratios,
        }  # fmt: skip
        print(f"  x{factor:g} {found[f'x{factor:g}']}", flush=True)
    return {"rows": found, "inputs": count}


def rebuilt_error(net: Network, x: torch.Tensor) -> float:
    """Largest |rebuilt - original| over the inputs of all sub-blocks; 0 is bit-equal."""
    seen: dict[int, list[torch.Tensor]] = {}

    def note(k: int) -> Callable[..., None]:
        return lambda module, args: seen.setdefault(k, []).append(args[0].detach().clone())

    net(x)  # calibrates
    blocks = list(net.body.stack.sub_blocks)
    for k, block in enumerate(blocks):
        block.register_forward_pre_hook(note(k))
    net(x).backward()
    assert all(len(seen[k]) == 2 for k in range(len(blocks)))
    return max(float((first - again).abs().max()) for first, again in seen.values())


def run_time(shape: dict[str, int], rounds: int, *, peers: bool) -> dict[str, Any]:
    """In this process: seconds of every row, and ratios paired within rounds."""
    nets = {name: make() for name, make in rows(shape, peers=peers).items()}
    taken = seconds(nets, data(shape), rounds=rounds)
    found = {
        name: {
            "median_wall_s": statistics.median(t["wall_s"] for t in taken[name]),
            **{
                f"{key}_x_{base}": paired(taken, name, base, f"{key}_s")
                for key in ("wall", "processor")
                for base in ("plain", "checkpoint")
            },
        }
        for name in nets
    }
    return {"rows": found, "rounds": rounds, "seconds": taken}


def time_apart(allocator: str, threads: int, arguments: list[str]) -> dict[str, Any]:
    """`run_time` in a process with other allocator settings."""
    script = [sys.executable, str(HERE / "run.py"), "--time-here", str(threads), *arguments]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        script, env={**kept, **ALLOCATORS[allocator]}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"timing under {allocator} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def save(part: str, shape: dict[str, int], numbers: dict[str, Any], *, smoke: bool) -> None:
    receipt = {
        "question": "what does training by reversal cost?",
        "part": part,
        "smoke": smoke,
        "config": {**shape, "dtype": "float32"},
        "seed": SEED,
        "peers": {name: peer_version(name) for name in PEERS},
        **environment(torch.device("cpu")),
        "numbers": numbers,
    }
    text = json.dumps(rounded(receipt), indent=1)
    if smoke:
        print(text)  # sizes of no interest: nothing is stored
        return
    path = HERE / "results" / f"{part}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    tables.write()
    print(f"wrote {path.relative_to(HERE)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds")
    parser.add_argument("--part", nargs="*", default=[*PARTS, "time"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--allocators", nargs="*", default=list(ALLOCATORS), choices=ALLOCATORS)
    parser.add_argument("--time-here", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SMOKE if args.smoke else FULL
    rounds = 2 if args.smoke else args.rounds
    if args.time_here:
        torch.set_num_threads(args.time_here)
        # The peers are slower or as fast; one setting tells. It is half of the waiting.
        peers = args.time_here == 1 and not os.environ.get("MALLOC_TRIM_THRESHOLD_")
        numbers = run_time(shape, rounds, peers=peers)
        print(json.dumps({**numbers, "process": environment(torch.device("cpu"))}))
        return
    torch.set_num_threads(1)  # bytes and gradients do not depend on it; the machine is spared
    for part in args.part:
        print(part, flush=True)
        if part == "time":
            time_parts(shape, rounds, args)
            continue
        sizes = sizes_of(part, smoke=args.smoke)
        save(part, sizes, PARTS[part](sizes, args.smoke), smoke=args.smoke)


def time_parts(shape: dict[str, int], rounds: int, args: argparse.Namespace) -> None:
    """One receipt for each allocator setting and number of threads."""
    flags = ["--rounds", str(rounds), *(["--smoke"] if args.smoke else [])]
    for threads in args.threads:
        for allocator in args.allocators:
            numbers = time_apart(allocator, threads, flags)
            save(f"time-{allocator}-{threads}", shape, numbers, smoke=args.smoke)


PARTS: dict[str, Callable[[dict[str, int], bool], dict[str, Any]]] = {
    "memory": lambda shape, smoke: run_memory(shape),
    "depth": lambda shape, smoke: run_depth(shape, (2, 4) if smoke else (6, 12, 24, 48, 96)),
    "accuracy": lambda shape, smoke: run_accuracy(shape, (1.0, 4.0, 8.0)),
    "inputs": lambda shape, smoke: run_inputs(shape, (1.0, 4.0, 8.0), 2 if smoke else 25),
    "equality": lambda shape, smoke: equality.run(
        data(shape), (2,) if smoke else (24, 48), shape["D"], SEED
    ),
    "behaviour": lambda shape, smoke: behaviour.run(smoke=smoke),
}


def sizes_of(part: str, *, smoke: bool) -> dict[str, int]:
    """Depth and accuracy are taken at smaller sizes; L = 0 stands for the depths run."""
    if smoke:
        return SMOKE
    small = {"depth": {"L": 0, "D": 128, "T": 128, "B": 2}}
    small["accuracy"] = {"L": 24, "D": 128, "T": 64, "B": 2}
    small["inputs"] = small["accuracy"]
    small["equality"] = {"L": 0, "D": 128, "T": 64, "B": 2}
    small["behaviour"] = {"L": 3, "D": 16, "T": 8, "B": 2}
    return small.get(part, FULL)


if __name__ == "__main__":
    main()
