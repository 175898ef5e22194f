"""The meter against torch's own allocator, to the byte, and its words."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from shoestring import allocator, rss
from shoestring.meter import (
    CATEGORIES,
    Meter,
    Tracker,
    active_tracker,
    allocator_peak,
    count_again,
    leave_out,
)
from shoestring.meter.history import POINTS

WIDTH, TOKENS, VOCABULARY = 32, 48, 64
RNG_STATE = 5056  # bytes of torch.get_rng_state() on CPU


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(self.norm(x)).view(batch, tokens, 3, 4, WIDTH // 4)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(mixed.transpose(1, 2).reshape(x.shape), self.dropout)
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """A small language model; `again` runs its blocks under checkpoint."""

    def __init__(
        self, blocks: int = 4, dropout: float = 0.0, again: bool = False, vocabulary: int = 64
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.again = again

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        logits = self.head(x).flatten(0, 1).float()
        return F.cross_entropy(logits, tokens.flatten())


def training(
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.float32,
    adamw: dict | None = None,
    **settings,
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    torch.manual_seed(0)
    model = Model(**settings)
    if dtype is not torch.float32:  # even an idle cast is refused under fake tensors
        model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **(adamw or {"fused": True}))
    batch = torch.randint(0, VOCABULARY, (2, tokens))

    def step() -> None:
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, optimizer, step


def weights_bytes(model: nn.Module) -> int:
    return sum(each.nbytes for each in model.parameters())


CASES = {
    "plain": {},
    "checkpointed": {"again": True},
    "dropout": {"dropout": 0.1},
    "checkpointed dropout": {"again": True, "dropout": 0.1},
    "bf16": {"dtype": torch.bfloat16},
    "optimizer: default": {"adamw": {}, "tokens": 4},
    "optimizer: foreach": {"adamw": {"foreach": True}, "tokens": 4},
    "optimizer: fused": {"adamw": {"fused": True}, "tokens": 4},
    "large vocabulary": {"vocabulary": 2048},
}


@pytest.mark.parametrize("case", CASES)
def test_peak_equals_the_allocators_to_the_byte(case: str) -> None:
    model, optimizer, step = training(**CASES[case])
    step()  # the optimizer's states exist from here on
    expected = allocator_peak(step)
    with Meter(model, optimizer) as seeded:
        step()
    with Meter() as bare:
        step()
    assert expected > 100_000
    assert seeded.peak_bytes - seeded.baseline_bytes == expected
    assert bare.peak_bytes - bare.baseline_bytes == expected
    assert bare.peak_bytes == seeded.peak_bytes


def test_the_first_step_counts_the_states_it_makes() -> None:
    model, optimizer, step = training()
    expected = allocator_peak(step)
    model, optimizer, step = training()
    with Meter(model, optimizer) as meter:
        step()
    assert meter.peak_bytes - meter.baseline_bytes == expected
    assert meter.end_bytes - meter.baseline_bytes >= 2 * weights_bytes(model)


def test_a_second_window_does_not_inherit_the_first() -> None:
    _, _, step = training()
    step()
    peaks = set()
    for _ in range(2):
        kept = [torch.empty(1000) for _ in range(10)]
        peaks.add(allocator_peak(step))
        del kept  # freed outside of any window
    assert len(peaks) == 1


def test_categories_add_up_and_name_what_they_hold() -> None:
    model, optimizer, step = training(tokens=4, adamw={"foreach": True})
    step()
    with Meter(model, optimizer) as meter:
        step()
    assert meter.instant == "optimizer step"
    assert tuple(meter.by_category) == CATEGORIES
    assert sum(meter.by_category.values()) == meter.peak_bytes
    count = len(list(model.parameters()))
    assert meter.by_category["weights"] == weights_bytes(model)
    assert meter.by_category["gradients"] == weights_bytes(model)
    assert meter.by_category["optimizer"] == 2 * weights_bytes(model) + 4 * count
    assert meter.by_category["saved"] == 0


def test_what_the_backward_waits_for_is_saved() -> None:
    model, optimizer, step = training(vocabulary=2048)
    step()
    with Meter(model, optimizer) as meter:
        step()
    assert meter.instant == "loss backward"
    logits = 2 * TOKENS * 2048 * 4
    # log-probabilities are held for the backward; two gradients of that size are made of them
    assert logits < meter.retained_bytes < 2.5 * logits
    assert meter.by_category["saved"] <= meter.retained_bytes
    assert meter.by_category["gradients"] == 0
    assert 1.9 * logits < meter.by_category["transient"] < 2.1 * logits


def test_an_unseeded_meter_finds_the_categories() -> None:
    model, optimizer, step = training(tokens=4, adamw={"foreach": True})
    step()
    with Meter(model, optimizer) as seeded:
        step()
    with Meter() as bare:
        step()
    assert bare.by_category == seeded.by_category


def test_gradients_that_stay_are_gradients() -> None:
    model, _, _ = training()
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS))
    model(tokens).backward()
    with Meter(model) as meter:
        model(tokens).backward()
    assert meter.by_category["gradients"] == weights_bytes(model)
    assert meter.end_bytes == meter.baseline_bytes


def test_stepping_inside_the_backward_frees_gradients_early() -> None:
    model, _, _ = training()
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS))
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def release(each: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            each.grad = None

        parameter.register_post_accumulate_grad_hook(release)
    expected = allocator_peak(lambda: model(tokens).backward())
    with Meter(model) as meter:
        model(tokens).backward()
    assert meter.peak_bytes - meter.baseline_bytes == expected
    assert meter.end_bytes == meter.baseline_bytes


def test_retained_bytes_without_a_backward_and_at_a_mark() -> None:
    model, _, _ = training()
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS))
    with Meter(model) as forward_only:
        loss = model(tokens)
    del loss
    with Meter(model) as whole:
        loss = model(tokens)
        whole.mark("backward")
        loss.backward()
    # the gradient of the loss itself is made before anything of the graph runs
    assert whole.retained_bytes == forward_only.retained_bytes > 0
    with torch.no_grad(), Meter(model) as nothing:
        loss = model(tokens)
    assert nothing.retained_bytes == loss.nbytes


def test_a_checkpoint_that_preserves_randomness_keeps_a_state() -> None:
    x = torch.randn(4, WIDTH, requires_grad=True)
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
    retained = []
    for preserve in (False, True):
        with Meter(layers) as meter:
            y = x
            for layer in layers:
                y = checkpoint(layer, y, use_reentrant=False, preserve_rng_state=preserve)
            y.sum().backward()
        retained.append(meter.retained_bytes)
    assert retained[1] - retained[0] == len(layers) * RNG_STATE


def test_a_view_keeps_all_of_its_storage() -> None:
    with Meter() as meter:
        row = torch.zeros(100, 100)[0]
        part = row[:2]
    assert meter.end_bytes == part.untyped_storage().nbytes() == 100 * 100 * 4


def test_resizing_a_storage_is_followed() -> None:
    with Tracker() as tracker:
        x = torch.zeros(1000)
        x.untyped_storage().resize_(0)
        assert tracker.live_bytes == 0
        x.untyped_storage().resize_(8000)
        assert tracker.live_bytes == 8000
    assert tracker.ledger.peak == 8000
    untouched = torch.zeros(10)
    untouched.untyped_storage().resize_(0)  # the patch is gone


def test_mixed_dtypes_count_the_copies_that_the_cpu_makes() -> None:
    full, half = torch.randn(1000), torch.randn(1000).bfloat16()
    column, whole = torch.randn(1000, 1).bfloat16(), torch.arange(1000)
    for work in (
        lambda: full * half,
        lambda: half + full,
        lambda: half.add_(full),
        lambda: full.mul_(half),
        lambda: full - column,
        lambda: full > half,
        lambda: full * 0.5,
        lambda: half + 1,
        lambda: whole + 1,
        lambda: whole * 0.5,
        lambda: full.div_(2.0),
        lambda: torch._foreach_add_([full, full], 1e-8),
    ):
        expected = allocator_peak(work)
        with Meter() as meter:
            work()
        assert meter.peak_bytes - meter.baseline_bytes == expected > 0


def test_sparse_gradients_are_counted() -> None:
    table = nn.Embedding(1000, 16, sparse=True)
    tokens = torch.tensor([1, 2, 3])
    with Meter(table) as meter:
        table(tokens).sum().backward()
    grad = table.weight.grad
    assert meter.end_bytes - meter.baseline_bytes >= grad._values().nbytes + grad._indices().nbytes
    assert meter.peak_bytes - meter.baseline_bytes < 1000 * 16 * 4


def test_wrapper_tensors_are_counted_by_what_they_hold() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    pair = TwoTensor(torch.randn(100), torch.randn(100))
    with Meter() as meter:
        out = pair + 1
    assert meter.baseline_bytes == 800
    assert meter.end_bytes - meter.baseline_bytes == 800
    del out


def test_fake_and_real_are_counted_alike() -> None:
    def numbers() -> tuple[int, int, dict[str, int]]:
        model, optimizer, step = training()
        with Meter(model, optimizer) as meter:
            step()
            step()
        return meter.peak_bytes, meter.retained_bytes, meter.by_category

    real = numbers()
    with FakeTensorMode():
        fake = numbers()
    assert real == fake


def test_phases_come_in_order() -> None:
    model, optimizer, _ = training()
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS))
    with Meter(model, optimizer) as meter:
        for _ in range(2):
            model(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    names = [name for name, _ in meter.timeline]
    order = [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]
    once = ["forward", "loss", "loss backward", "backward"]
    assert order == [*once, *once, "after backward", "optimizer step"]
    assert max(count for _, count in meter.timeline) == meter.peak_bytes


def test_a_mark_names_the_instant() -> None:
    with Meter() as meter:
        small = torch.zeros(10)
        meter.mark("saving")
        large = torch.zeros(1000)
    assert meter.instant == "saving"
    assert meter.timeline == [("forward", 40), ("saving", 4040)]
    del small, large


def held(history: dict, category: str) -> list[int]:
    return history["bytes"].get(category, [0] * len(history["at"]))


def totals(history: dict) -> list[int]:
    return [sum(column) for column in zip(*history["bytes"].values(), strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_history_shows_the_peak_and_what_it_is_made_of(case: str) -> None:
    model, optimizer, step = training(**CASES[case])
    step()
    with Meter(model, optimizer, history=True) as meter:
        step()
    history, sums = meter.history, totals(meter.history)
    assert max(sums) == history["peak_bytes"] == meter.peak_bytes
    at = sums.index(max(sums))
    shown = {name: held(history, name)[at] for name in CATEGORIES}
    assert shown == meter.by_category
    assert sums[0] == meter.baseline_bytes
    assert sums[-1] == meter.end_bytes


def test_history_grows_saved_bytes_in_the_forward_and_gradients_in_the_backward() -> None:
    model, optimizer, step = training()
    step()
    with Meter(model, optimizer, history=True) as meter:
        step()
    starts = dict(meter.history["phases"])
    saved, gradients = (held(meter.history, name) for name in ("saved", "gradients"))
    forward, back = slice(0, starts["loss"]), slice(starts["backward"], None)
    assert saved[0] == max(gradients[forward]) == 0
    assert max(saved) == meter.retained_bytes
    assert sorted(saved[forward]) == saved[forward]
    assert saved[back][-1] == 0
    assert max(gradients) == weights_bytes(model)


def test_history_is_kept_only_when_asked() -> None:
    with Meter() as meter:
        torch.zeros(10)
    assert meter.history is None


def test_history_of_a_long_step_keeps_its_heights() -> None:
    model, optimizer, step = training(blocks=40)
    step()
    with Meter(model, optimizer, history=True) as meter:
        step()
    history = meter.history
    assert 300 < len(history["at"]) <= POINTS < history["instants"]
    assert max(totals(history)) == meter.peak_bytes
    assert history["at"] == sorted(set(history["at"]))
    assert [name for name, _ in history["phases"]][:2] == ["forward", "loss"]


def test_history_stops_where_it_would_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.meter.history.LIVES_LIMIT", 20)
    with Meter(history=True) as meter:
        kept = [torch.zeros(10) for _ in range(15)]
        kept += [torch.zeros(10) for _ in range(50)]
    assert meter.history["is_cut"]
    assert meter.peak_bytes == 65 * 40
    assert totals(meter.history)[:21] == [40 * count for count in range(21)]


def test_history_follows_a_resized_storage() -> None:
    with Meter(history=True) as meter:
        x = torch.zeros(1000)
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(8000)
    assert totals(meter.history) == [0, 4000, 0, 8000, 8000]


def test_what_follows_the_last_backward_is_no_forward() -> None:
    model, _, _ = training()
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS))
    with Meter(model, history=True) as meter:
        for _ in range(2):
            model(tokens).backward()
        torch.stack([each.grad.norm() for each in model.parameters()]).sum()
    once = ["forward", "loss", "loss backward", "backward"]
    assert [name for name, _ in meter.history["phases"]] == [*once, *once, "after backward"]


def test_random_draws_and_the_active_tracker() -> None:
    assert active_tracker() is None
    with Tracker() as outer:
        with Tracker() as inner:
            assert active_tracker() is inner
            F.dropout(torch.ones(4), 0.5)
            torch.get_rng_state()
        F.dropout(torch.ones(4), 0.5)
    assert (inner.random_draws, outer.random_draws) == (1, 2)
    assert outer.ledger.peak >= inner.ledger.peak >= RNG_STATE
    assert active_tracker() is None


def test_the_meter_changes_no_result() -> None:
    results = []
    for metered in (False, True):
        model, _, step = training(dropout=0.1, again=True)
        for _ in range(2):
            if metered:
                with Meter():
                    step()
            else:
                step()
        results.append([each.detach().clone() for each in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_error_inside_leaves_nothing_behind() -> None:
    before = torch.get_rng_state, torch.UntypedStorage.resize_
    with pytest.raises(ZeroDivisionError), Meter():
        _ = 1 // 0
    assert (torch.get_rng_state, torch.UntypedStorage.resize_) == before
    assert active_tracker() is None


def test_rss_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rss, "_PROC", tmp_path / "absent")
    with Meter() as meter:
        torch.zeros(10)
    assert meter.rss_peak_bytes is None
    assert "not available on this system" in (meter.rss_message or "")


def test_settings_do_not_apply_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.os, "confstr", lambda name: None)
    assert allocator.tuned_environment() == {}
    assert not allocator.is_tuned()
    assert "not glibc" in allocator.explain()


RSS_SCRIPT = """
import json, sys, torch
from torch import nn
from shoestring.allocator import is_tuned
from shoestring.meter import Meter
from shoestring.rss import status_bytes

torch.manual_seed(0)
model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(512, 512), nn.GELU())])
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
x = torch.randn(3072, 512)

def step():
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

small = torch.randn(64, 512)
model(small).square().mean().backward()  # libraries are loaded, threads started
model.zero_grad(set_to_none=True)
base = status_bytes("VmRSS")
with Meter(model, optimizer) as meter:
    step()
    step()
print(json.dumps([is_tuned(), meter.peak_bytes - meter.baseline_bytes,
                  meter.rss_peak_bytes - base]))
"""


@pytest.mark.skipif(not allocator.tuned_environment(), reason="needs glibc")
def test_tuned_settings_keep_the_process_near_its_tensors() -> None:
    import json
    import os

    environment = {**os.environ, **allocator.SETTINGS}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(rss.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", RSS_SCRIPT], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    is_tuned, tensors, resident = json.loads(done.stdout)
    assert is_tuned
    assert tensors > 70_000_000
    assert resident / tensors < 1.06


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_the_allocators() -> None:
    model, optimizer, _ = training()
    model.cuda()
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS), device="cuda")
    model(tokens).backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    with Meter(model, optimizer) as meter:
        model(tokens).backward()
        optimizer.step()
    assert meter.cuda_peak_bytes is not None
    assert abs(meter.peak_bytes / meter.cuda_peak_bytes - 1) < 0.05


def test_what_is_left_out_is_not_counted_and_its_copies_are() -> None:
    with FakeTensorMode():
        outside, inside = torch.empty(1000), torch.empty(10)
        leave_out([outside])
        with Tracker() as tracker:
            tracker.assign("weights", [outside, inside])
            copy = outside.clone()
            assert tracker.live_bytes == 40 + copy.nbytes
            count_again([outside])
            outside.add_(1)
            assert tracker.live_bytes == 40 + 2 * copy.nbytes


def test_empty_storage_that_is_given_memory_counts_from_then_on() -> None:
    # as FSDP2 keeps what it gathers: the storage is there all along, its bytes are not
    kept = torch.empty(1000)
    kept.untyped_storage().resize_(0)
    with Meter() as meter:
        torch.ones(500).sum()
        kept.untyped_storage().resize_(4000)
        kept.fill_(1.0)
        kept.untyped_storage().resize_(0)
    assert meter.baseline_bytes == 0
    assert meter.peak_bytes == 4000
    assert meter.end_bytes == 0
