"""offload: what leaves memory, in which order it comes back, and disks that fill up."""

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from faults.victims import can_mount
from shoestring.errors import ConfigError, StackError
from shoestring.meter import Meter, Tracker
from shoestring.methods import apply_spans, method
from shoestring.methods.offload import OffloadExecutor
from shoestring.spill import Away, _Imagined
from shoestring.stack import Span, Stack

WIDTH, TOKENS, DEPTH = 64, 128, 4


class Block(nn.Module):
    """Norm, attention whose queries, keys and values share a storage, MLP, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = (p.view(*x.shape[:2], 4, -1) for p in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(*(p.transpose(1, 2) for p in parts), is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(x.shape)))
        return x + self.drop(self.mlp(x))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*[Block() for _ in range(DEPTH)]).train()


def offloaded(what: str = "saved", **settings: Any) -> nn.Sequential:
    model = network()
    stack = Stack.of(model)
    apply_spans(stack, [Span(0, DEPTH, "offload", {"what": what, **settings})])
    return model


def data() -> Tensor:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    return x.requires_grad_()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    loss: Tensor = model(x).square().mean()
    return loss


def gradients(model: nn.Module) -> list[Tensor]:
    x = data()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [*torch.autograd.grad(loss_of(model, x), wanted)]


def all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


both = pytest.mark.parametrize("what", ["saved", "input"])


@both
def test_nothing_large_is_held_from_forward_to_backward(what):
    held = {}
    for name, model in (("keep", network()), ("offload", offloaded(what))):
        x = data()
        with Meter(model) as meter:
            model(x).sum().backward()
        held[name] = meter.retained_bytes
    # The graph of one block's inside is 16 tensors of the hidden state's size and more.
    assert held["keep"] > DEPTH * 15 * x.nbytes
    random_states = DEPTH * 5056
    assert held["offload"] < x.nbytes + DEPTH * 8192 + random_states


@both
def test_a_second_backward_and_a_gradient_of_part_are_equal(what):
    stored, ours = network(), offloaded(what)
    x, y = data(), data()
    expected, found = loss_of(stored, x), loss_of(ours, y)
    upper = (list(stored[2].parameters()), list(ours[2].parameters()))
    assert all_equal(
        [*torch.autograd.grad(expected, upper[0], retain_graph=True)],
        [*torch.autograd.grad(found, upper[1], retain_graph=True)],
    )
    for _ in range(3):
        assert torch.equal(
            torch.autograd.grad(expected, x, retain_graph=True)[0],
            torch.autograd.grad(found, y, retain_graph=True)[0],
        )


@both
def test_double_backward_is_equal(what):
    results = []
    for model in (nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)]),):
        for twin, spans in ((copy.deepcopy(model), []), (copy.deepcopy(model), [1])):
            if spans:
                apply_spans(Stack.of(twin), [Span(0, 3, "offload", {"what": what})])
            x = torch.linspace(-1, 1, 64 * 64).view(64, 64).requires_grad_()
            (g,) = torch.autograd.grad(twin(x).square().sum(), x, create_graph=True)
            g.square().sum().backward()
            results.append([x.grad, *(p.grad for p in twin.parameters())])
    assert all_equal(*results)


@both
@pytest.mark.parametrize("frozen", [{0, 1}, {1, 3}, {0, 1, 2, 3}])
def test_frozen_blocks_are_equal(what, frozen):
    pair = network(), offloaded(what)
    for model in pair:
        for k in frozen:
            model[k].requires_grad_(False)
    assert all_equal(*(gradients(model) for model in pair))


@both
def test_two_forwards_before_their_backwards_are_equal(what):
    results = []
    for model in (network(), offloaded(what)):
        x, y = data(), data()
        first, second = loss_of(model, x), loss_of(model, y * 2)
        first.backward()
        second.backward()
        results.append([x.grad, y.grad, *(p.grad for p in model.parameters())])
    assert all_equal(*results)


@both
def test_a_deepcopy_works_by_itself(what):
    model = offloaded(what)
    loss = loss_of(model, data())
    twin = copy.deepcopy(model)
    executors = {id(m.__dict__["forward"].executor) for m in (model[0], twin[0])}
    assert len(executors) == 2
    expected = gradients(network())
    del model
    assert all_equal(gradients(twin), expected)
    loss.backward()


@both
def test_a_graph_that_is_dropped_gives_its_part_of_the_file_back(what):
    model = offloaded(what)
    place = model[0].__dict__["forward"].executor._place("cpu")
    for _ in range(3):
        loss = loss_of(model, data())
        size = os.fstat(place._file.descriptor).st_size
        del loss
        gc.collect()
        assert place._file.take(size)[0] == 0
        place._file.give_back((0, -(-size // 4096) * 4096))


def test_queries_keys_and_values_are_written_once():
    model = offloaded()
    loss = loss_of(model, data())
    place = model[0].__dict__["forward"].executor._place("cpu")
    unit = 2 * TOKENS * WIDTH * 4
    # x, norm, qkv 3, attention's output, dropout's mask, sum, norm, MLP 4 + 4, mask: 18.
    log_sum_exp = 2 * TOKENS * 4 * 4
    assert place._file.end == DEPTH * (18 * unit + log_sum_exp)
    del loss


# ---- fetching ahead ----------------------------------------------------------------------------


class Ahead:
    """A place that notes what is asked of it."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.count = 0

    def put(self, flat: Tensor) -> Away:
        log, copied, number = self.log, flat.clone(), self.count
        self.count += 1

        class Noted:
            def start(self) -> None:
                log.append(("start", number))

            def back(self) -> Tensor:
                log.append(("back", number))
                return copied.clone()

            def let_go(self) -> None:
                log.append(("let go", number))

        return Noted()


def test_a_block_is_fetched_while_the_one_above_it_runs_backward_every_time():
    model = offloaded("input")
    executor = model[0].__dict__["forward"].executor
    assert isinstance(executor, OffloadExecutor)
    place = executor._places["cpu"] = Ahead()
    x = data()
    loss = loss_of(model, x)
    # One block's copy may be under way while the next block computes; none at the end.
    assert place.log == [("let go", k) for k in range(DEPTH)]
    for _ in range(3):
        place.log.clear()
        torch.autograd.grad(loss, x, retain_graph=True)
        first = [event for n, event in enumerate(place.log) if event not in place.log[:n]]
        assert first == [
            ("start", 3), ("start", 2), ("back", 3), ("start", 1), ("back", 2), ("start", 0),
            ("back", 1), ("back", 0),
        ]  # fmt: skip


def test_fetching_ahead_holds_two_blocks_at_most_and_is_seen_under_fake_tensors():
    class Imagined:
        def put(self, flat: Tensor) -> Away:
            return _Imagined(flat, 1)

    with FakeTensorMode():
        model = nn.Sequential(*[
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Tanh()) for _ in range(DEPTH)
        ])  # fmt: skip
        apply_spans(Stack.of(model), [Span(0, DEPTH, "offload")])
        model[0].__dict__["forward"].executor._places["cpu"] = Imagined()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        x = torch.ones(1024, WIDTH, requires_grad=True)
        tracker = Tracker()
        tracker.seed(model)
        tracker.assign("other", [x])
        with tracker:
            y = model(x)
            loss = y.sum()
            held = tracker.live_bytes - tracker.ledger.existing
            tracker.mark("backward")
            tracker.ledger.peak = tracker.live_bytes
            loss.backward()
    assert held == y.nbytes + 4  # the output, which the caller has, and the loss
    above = tracker.ledger.peak - tracker.ledger.existing
    saved = 3 * x.nbytes  # of one block: its input and two results
    assert 2 * saved <= above - y.nbytes <= 2 * saved + 3 * x.nbytes


# ---- places that cannot be used ----------------------------------------------------------------


def test_a_wrong_setting_is_refused():
    with pytest.raises(ConfigError, match="what = 'outputs'; expected 'saved' or 'input'"):
        method("offload").configure({"what": "outputs"})


def test_a_directory_in_memory_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("shoestring.mapped.filesystem", lambda path: "tmpfs")
    monkeypatch.delenv("SHOESTRING_SPILL_DIR", raising=False)
    with pytest.raises(StackError, match=r"lies in memory.*Name one in SHOESTRING_SPILL_DIR"):
        offloaded()


def test_a_plan_is_not_offered_a_place_that_cannot_be_used(monkeypatch, tmp_path):
    from shoestring.planner.ways import allowed, offer_for

    monkeypatch.delenv("SHOESTRING_SPILL_DIR", raising=False)
    stack, names = Stack.of(network()), {}
    for kind in ("ext4", "tmpfs"):
        monkeypatch.setattr("shoestring.mapped.filesystem", lambda path, kind=kind: kind)
        names[kind] = {way.method for way in offer_for(stack, allowed("exact")).kept}
    assert names["ext4"] - names["tmpfs"] == {"offload"}


def test_a_device_without_a_place_is_refused():
    model = network().to("meta")
    with pytest.raises(StackError, match="no place for tensors of meta"):
        apply_spans(Stack.of(model), [Span(0, DEPTH, "offload")])


FULL = """
import os, resource, sys
from pathlib import Path
import torch
from faults.victims import mount
from methods.test_offload import all_equal, gradients, network, offloaded
from shoestring import mapped
from shoestring.errors import SpillError

mapped.filesystem = lambda path: "ext4"  # a small disk is only to be had in memory
directory, limit = Path(sys.argv[1]), sys.argv[2]
directory.mkdir()
expected = gradients(network())
if limit == "disk":
    mount(directory, size=1 << 22)
    (directory / "ballast").write_bytes(bytes((1 << 22) - (1 << 17)))
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, resource.RLIM_INFINITY))
models = [offloaded(what, directory=str(directory)) for what in ("saved", "input")]
for model in models * 2:
    try:
        gradients(model)
    except SpillError as error:
        print(error)
    else:
        raise SystemExit("it fitted")
if limit == "disk":
    (directory / "ballast").unlink()
    mount(directory, size=1 << 24, flags=32)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert all(all_equal(gradients(model), expected) for model in models)
print("equal")
"""


@pytest.mark.parametrize("limit", ["disk", "size"])
def test_a_full_disk_is_an_error_that_says_what_to_do_and_the_model_goes_on(tmp_path, limit):
    if limit == "disk" and not can_mount():
        pytest.skip("this system lets nobody have a disk of its own")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "disk"), limit],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.strip().splitlines()
    assert (len(errors), last) == (4, "equal")
    for told in errors:
        assert "cannot write" in told
        assert f"in {tmp_path / 'disk'}" in told
        assert ("No space left" if limit == "disk" else "File too large") in told
        assert "set SHOESTRING_SPILL_DIR" in told


@pytest.mark.gpu
@both
def test_on_cuda_gradients_are_equal_and_the_memory_is_the_hosts(what):
    x = data().detach().cuda()
    results, held = [], []
    for model in (network().cuda(), offloaded(what).cuda()):
        for _ in range(3):
            model.zero_grad()
            loss = loss_of(model, x)
            held.append(torch.cuda.memory_allocated())
            loss.backward()
        results.append([p.grad.clone() for p in model.parameters()])
        del model, loss
    assert all_equal(*results)
    assert held[-1] < held[0] - DEPTH * 12 * x.nbytes
