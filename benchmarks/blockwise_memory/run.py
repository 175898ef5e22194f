"""What does a block hold that is trained alone, against the whole network trained end to end?

A diffusion transformer of 12 layers of width 768 with AdaLN of width 128, float32 and AdamW: on
images (32 x 32 with 4 channels in patches of 2, 8 at a time) and as masked diffusion of text (4 x
512 tokens, a frozen table of 32,768 rows; logits in chunks in every arm), and from left to right of
the same texts: end to end on the next token (512 rows a text), a block on clean and noised rows
(twice as many). Arms: end to end; one of
B blocks alone, the others never made; all blocks and their optimizer states in one process, with
the gradients of one at a time, as the paper's released code has it; and the rival that everybody
has, recomputing every layer in backward. Each arm is a process of its own, which makes one update
with one sample, for the states to be there, and measures the second one with all of them.

Peak: bytes of live tensors by the meter; resident: growth of the process's peak resident set since
before the model was made. Writes results/memory.json and results/memory.md.
"""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shoestring.meter import Meter
from shoestring.models.causal import Causal
from shoestring.models.causal_config import CausalConfig
from shoestring.models.dit import Block, DiT, unit_table
from shoestring.models.dit_config import DiTConfig
from shoestring.models.dit_layers import Layer
from shoestring.objectives.denoise import Denoise
from shoestring.objectives.masked_diffusion import MaskedDiffusion
from shoestring.objectives.token_denoising import TokenDenoising
from shoestring.ops.noise_levels import LogNormal, MaskTime, partition
from shoestring.rss import RssPeak, status_bytes
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
KINDS = ("images", "masked diffusion", "autoregressive")
BARS = {2: 0.55, 3: 0.40, 4: 0.30}
NO_BARS = ("autoregressive",)  # twice the rows: told as it is
# blocks, whether all are resident, whether layers are recomputed
ARMS: dict[str, tuple[int, bool, bool]] = {
    "end to end": (1, False, False),
    "end to end, recomputed": (1, False, True),
    "1 of 2 blocks": (2, False, False),
    "1 of 3 blocks": (3, False, False),
    "1 of 4 blocks": (4, False, False),
    "1 of 4 blocks, recomputed": (4, False, True),
    "3 blocks in turn, all resident": (3, True, False),
}
FULL = {"layers": 12, "width": 768, "heads": 12, "condition": 128}
SMOKE = {"layers": 12, "width": 48, "heads": 2, "condition": 16}


def shape_of(kind: str, blocks: int, smoke: bool) -> DiTConfig:
    sizes: dict[str, Any] = {"blocks": blocks, **(SMOKE if smoke else FULL)}
    if kind == "images":
        return DiTConfig(size=8 if smoke else 32, channels=4, patch=2, classes=1000, **sizes)
    text = {"vocabulary": 256 if smoke else 32768, "length": 32 if smoke else 512, **sizes}
    return CausalConfig(**text) if kind == "autoregressive" else DiTConfig(**text)


def loss_of(kind: str, shape: DiTConfig, block: int, count: int, table: Tensor | None) -> Any:
    """A function of a block: the loss of `count` samples."""
    draws = torch.Generator().manual_seed(0)
    if kind == "images":
        denoise = Denoise(kind="edm", partition=partition(LogNormal(), shape.blocks), classes=1000)
        size = (count, shape.channels, shape.size, shape.size)
        images, labels = torch.rand(size, generator=draws) * 2 - 1, torch.arange(count)
        drawn = denoise.draw(block, images, labels, draws)
        return lambda net: denoise.loss(net, images, drawn)
    tokens = torch.randint(shape.vocabulary, (count, shape.length), generator=draws)
    assert table is not None
    if kind == "autoregressive":
        ahead = TokenDenoising(partition=partition(LogNormal(), shape.blocks))
        if shape.blocks == 1:
            return lambda net: ahead.ordinary_loss(net, tokens, table)
        noised = ahead.draw(block, tokens, shape.row, draws)
        return lambda net: ahead.loss(net, tokens, noised, table)
    masked = MaskedDiffusion(partition=partition(MaskTime(), shape.blocks))
    draw = masked.draw(block, tokens, draws)
    return lambda net: masked.loss(net, tokens, draw, table)


def recompute(net: Block) -> None:
    """Run every layer of a block under torch's checkpoint."""
    for layer in net.layers:
        assert isinstance(layer, Layer)
        plain = layer.forward
        layer.forward = (  # type: ignore[method-assign]
            lambda *args, plain=plain: checkpoint(
                plain, *args, use_reentrant=False, preserve_rng_state=False
            )
        )


def measure(kind: str, arm: str, smoke: bool) -> dict[str, Any]:
    """One arm, in this process."""
    blocks, resident, recomputed = ARMS[arm]
    shape = shape_of(kind, blocks, smoke)
    gc.collect()
    before = status_bytes("VmRSS")
    table = unit_table(shape.vocabulary, shape.row, seed=0) if shape.vocabulary else None
    rss = RssPeak()
    rss.start()  # the table is made by way of float64, which is not what is asked here
    make = Causal.make if kind == "autoregressive" else DiT.make
    model = make(shape, seed=0, only=None if resident else 1, table=table)
    trained = list(range(1, blocks + 1)) if resident else [1]
    nets = [model.block(block) for block in trained]
    parameters = [p for net in nets for p in net.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    if recomputed:
        recompute(nets[0])
    for block, net in zip(trained, nets, strict=True):
        loss_of(kind, shape, block, 1, table)(net).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    count = 2 if smoke else 8 if kind == "images" else 4
    loss = loss_of(kind, shape, 1, count, table)
    with Meter(model, optimizer) as meter:
        loss(nets[0]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak, message = rss.read()
    return {
        "peak_bytes": meter.peak_bytes, "by_category": meter.by_category, "instant": meter.instant,
        "saved_bytes": meter.retained_bytes,
        "resident_bytes": None if peak is None else peak - before, "resident_message": message,
        "parameters_made": sum(p.numel() for p in parameters),
        "table_bytes": 0 if table is None else table.nbytes,
    }  # fmt: skip


def apart(kind: str, arm: str, smoke: bool) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--kind", kind, "--arm", arm]
    done = subprocess.run(
        [*command, *(["--smoke"] if smoke else [])], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table_of(result: dict[str, Any]) -> str:
    mib = 1 << 20
    heads = ["", "peak, MiB", "of end to end", "bar", "weights", "gradients", "optimizer",
             "saved for backward", "resident, MiB"]  # fmt: skip
    lines = []
    for kind, rows in result["rows"].items():
        if not rows:
            continue
        lines += [f"| {' | '.join([kind, *heads[1:]])} |", "|---" * len(heads) + "|"]
        whole = rows["end to end"]["peak_bytes"]
        for arm, row in rows.items():
            blocks = ARMS[arm][0]
            has_bar = arm == f"1 of {blocks} blocks" and kind not in NO_BARS
            bar = BARS.get(blocks) if has_bar else None
            cells = [arm, f"{row['peak_bytes'] / mib:,.0f}", f"{row['peak_bytes'] / whole:.2f}",
                     "" if bar is None else f"{bar:.2f}"]  # fmt: skip
            cells += [f"{row['by_category'].get(name, 0) / mib:,.0f}"
                      for name in ("weights", "gradients", "optimizer")]  # fmt: skip
            cells.append(f"{row['saved_bytes'] / mib:,.0f}")
            found = row["resident_bytes"]
            cells.append("" if found is None else f"{found / mib:,.0f}")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    hardware = result["hardware"]
    lines.append(
        f"12 layers of width {result['config']['width']}, float32, AdamW. Categories are those of "
        f"the peak, saved the most there was. {hardware['device']}, {hardware['threads']} thread; "
        f"torch {result['versions']['torch']}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small, nothing written")
    parser.add_argument("--kind", choices=KINDS, help="with --arm: one arm, in this process")
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument(
        "--only", choices=KINDS, help="one kind; the others stay as they are stored"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.arm:
        print(json.dumps(measure(arguments.kind, arguments.arm, arguments.smoke)))
        return
    result: dict[str, Any] = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": SMOKE if arguments.smoke else FULL,
        "bars": BARS,
        **environment(torch.device("cpu")),
        "rows": {kind: {} for kind in KINDS},
    }
    if arguments.only and not arguments.smoke:
        result["rows"].update(json.loads((RESULTS / "memory.json").read_text())["rows"])
    for kind in [arguments.only] if arguments.only else KINDS:
        for arm in ARMS:
            result["rows"][kind][arm] = row = apart(kind, arm, arguments.smoke)
            print(kind, arm, json.dumps(row), flush=True)
    if arguments.smoke:
        print(table_of(result))
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "memory.md").write_text(table_of(result))


if __name__ == "__main__":
    main()
