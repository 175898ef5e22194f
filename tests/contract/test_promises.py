"""Every promise of every registered method, as tests. What a method does not promise is not run.

A new method is tested by being registered: its file, its line in the table of methods, and its
page under docs/methods.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contract.subjects import (
    DEPTH,
    VOCABULARY,
    Subject,
    backward,
    batch,
    every,
    every_pair,
    gpt,
    gradients,
    has_other_weights,
    is_bitwise,
    is_default,
    is_exact,
    is_noisy,
    is_of_the_batch,
    is_of_the_optimizer,
    optimizer,
    put,
    train,
)
from shoestring.errors import ConfigError, StackError
from shoestring.meter import Meter
from shoestring.methods import apply_spans
from shoestring.optim import InTurns
from shoestring.planner import simulate
from shoestring.rows import cut
from shoestring.stack import Span, Stack
from shoestring.training.load import load_model

# ---- gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["float32", "bfloat16 autocast"])
@every_pair(is_exact, is_bitwise)
def test_gradients_are_bit_equal(subject: Subject, kind: str, mode: str) -> None:
    stored, ours = subject.yardstick(kind, dropout=0.1), subject.applied(kind, dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode != "float32"):
        loss, expected = gradients(stored, batch())
        again, found = gradients(ours, batch())
    assert torch.equal(loss, again)
    assert expected.keys() == found.keys()
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []
    assert len(expected) > 6 * DEPTH


@every_pair(is_exact, lambda s: not is_bitwise(s))
def test_gradients_are_equal_within_the_stated_bound(subject: Subject, kind: str) -> None:
    loss, expected = gradients(subject.yardstick(kind), batch())
    again, found = gradients(subject.applied(kind), batch())
    bound = subject.promises.bound_eps * torch.finfo(torch.float32).eps
    assert (loss - again).abs() <= bound * loss.abs()
    assert expected.keys() == found.keys()
    worst = max(
        float((found[n].double() - e.double()).norm() / e.double().norm())
        for n, e in expected.items()
    )
    assert worst <= bound, f"{worst / torch.finfo(torch.float32).eps:.1f} eps"


@every(is_exact)
def test_a_bound_is_declared_where_one_is_needed(subject: Subject) -> None:
    assert subject.promises.grade in ("bitwise", "reassociated")
    assert (subject.promises.bound_eps is None) == is_bitwise(subject)


@every_pair()
def test_undo_gives_the_network_back(subject: Subject, kind: str) -> None:
    model = subject.network(kind)
    before = gradients(model, batch())
    undo = put(subject.method, model, subject.settings)
    gradients(model, batch())
    undo()
    after = gradients(model, batch())
    assert before[1].keys() == after[1].keys()
    if has_other_weights(subject):  # frozen weights come back as they were decoded
        assert torch.allclose(before[0], after[0], rtol=2**-5)
        assert all(g.dtype == after[1][n].dtype for n, g in before[1].items())
    elif is_exact(subject) or not is_of_the_optimizer(subject):
        assert torch.equal(before[0], after[0])
        assert all(torch.equal(g, after[1][n]) for n, g in before[1].items())
    else:  # weights may have been in fewer bits meanwhile
        assert torch.allclose(before[0], after[0], rtol=2**-8)
        assert all(g.dtype == after[1][n].dtype for n, g in before[1].items())
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in subject.network(kind).named_parameters()
    ]


DRAWS = (4, 16, 64)


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of the whole gradient (L2)."""
    assert expected.keys() == found.keys()
    off = sum(float((found[n].double() - e.double()).square().sum()) for n, e in expected.items())
    return (off / sum(float(e.double().square().sum()) for e in expected.values())) ** 0.5


@every_pair(is_noisy)
def test_one_draw_of_an_unbiased_gradient_is_within_the_stated_error(
    subject: Subject, kind: str
) -> None:
    bound = subject.method.gradient_error(subject.method.configure(subject.settings))
    stored, ours = subject.yardstick(kind, dropout=0.1), subject.applied(kind, dropout=0.1)
    for mode in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode):
            loss, expected = gradients(stored, batch())
            again, found = gradients(ours, batch())
        assert torch.equal(loss, again)  # the function is the same
        error = relative_error(found, expected)
        assert 0 < error <= bound


@every_pair(is_noisy)
def test_the_mean_of_draws_approaches_the_exact_gradient(subject: Subject, kind: str) -> None:
    data = batch()
    _, expected = gradients(subject.yardstick(kind), data)
    ours, means, errors = subject.applied(kind), {}, {}
    for draw in range(1, DRAWS[-1] + 1):
        _, found = gradients(ours, data, seed=draw)
        means = {n: g + means[n] if n in means else g for n, g in found.items()}
        errors[draw] = relative_error({n: m / draw for n, m in means.items()}, expected)
    for draws in DRAWS:
        # A draw is off by about errors[1]; 1.5 leaves room for chance, and for small biases.
        assert errors[draws] <= 1.5 * errors[1] / draws**0.5


@every(lambda s: s.promises.fidelity == "unbiased", lambda s: s.promises.applies_to == "span")
def test_an_unbiased_method_says_how_far_off_it_is(subject: Subject) -> None:
    assert subject.promises.gradient_error > 0
    assert subject.promises.grade is None


# ---- bytes ---------------------------------------------------------------------------------


def measured_peak(model: nn.Module, data: Mapping[str, Tensor]) -> int:
    """Peak of two whole steps, in each turn where there are turns, counted on real tensors."""
    adamw = optimizer(model)
    with Meter(model, adamw) as meter:
        for _ in adamw.parts if isinstance(adamw, InTurns) else (0,):
            for _ in range(2):
                backward(model, data)
                adamw.step()
                adamw.zero_grad(set_to_none=True)
            if isinstance(adamw, InTurns):
                adamw.end_turn()
    return meter.peak_bytes


@every_pair()
def test_measured_bytes_never_exceed_predicted(subject: Subject, kind: str) -> None:
    data = batch(rows=4, tokens=64)
    twins = []

    def apply(twin: nn.Module) -> None:
        put(subject.method, twin, subject.settings)
        twins.append(twin)

    config = subject.method.configure(subject.settings)
    if is_of_the_batch(subject):
        del data["attention_mask"]  # only one of the parts would have a mask that is used
    pieces = cut(data, config.parts if is_of_the_batch(subject) else 1)
    predicted = simulate(
        subject.network(kind),
        pieces[0],
        apply=apply,
        optimizer=lambda ps: optimizer(twins[0], ps),
        accumulate=len(pieces),
    ).peak_bytes
    measured = measured_peak(subject.applied(kind), data)
    assert 0 <= (predicted - measured) / measured <= 0.03


def saved_bytes(model: nn.Module, rows: int, tokens: int) -> int:
    data = batch(rows, tokens)
    del data["attention_mask"]  # it grows with the square of the length
    with Meter(model) as meter:
        backward(model, data)
    return meter.retained_bytes


def own_bytes(subject: Subject, depth: int, rows: int, tokens: int) -> int:
    """What the method itself saves: of a span everything, of a part the difference it makes."""
    used = saved_bytes(subject.applied(depth=depth), rows, tokens)
    if subject.promises.applies_to == "span":
        return used
    return used - saved_bytes(subject.network(depth=depth), rows, tokens)


SIZES = {"depth": (4, 8, 12), "batch": (2, 4, 6), "length": (32, 64, 96)}


@pytest.mark.parametrize("axis", SIZES)
@every(is_default)
def test_saved_bytes_grow_as_declared(subject: Subject, axis: str) -> None:
    fixed = {"depth": 4, "batch": 2, "length": 32}
    sizes = [{**fixed, axis: size} for size in SIZES[axis]]
    own = [own_bytes(subject, s["depth"], s["batch"], s["length"]) for s in sizes]
    first, second = own[1] - own[0], own[2] - own[1]
    if axis in subject.promises.saved_grows_with:
        assert abs(first) > 0.1 * abs(own[0])
        assert abs(second - first) <= 0.02 * abs(first)
    else:
        assert max(own) - min(own) <= 0.05 * max(map(abs, own))


# ---- repeating -----------------------------------------------------------------------------


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@every()
def test_two_runs_with_one_seed_are_bit_equal(subject: Subject) -> None:
    runs = []
    for _ in range(2):
        model = subject.applied(dropout=0.1)
        runs.append((train(model, 4, lambda step: batch())[0], model))
    assert runs[0][0] == runs[1][0]
    assert same_weights(runs[0][1], runs[1][1])


@every_pair()
def test_a_run_goes_on_from_disk_bit_for_bit(subject: Subject, kind: str, tmp_path: Path) -> None:
    whole = subject.applied(kind, dropout=0.1)
    expected, _ = train(whole, 6, lambda step: batch())
    first = subject.applied(kind, dropout=0.1)
    losses, adamw = train(first, 3, lambda step: batch())
    if has_other_weights(
        subject
    ):  # its weights have names, or dtypes, that the plain model has not
        save_file(first.state_dict(), tmp_path / "all.safetensors")
        second = subject.applied(kind, dropout=0.1)
        second.load_state_dict(load_file(tmp_path / "all.safetensors"))
    else:
        first.save_pretrained(tmp_path)
        second = load_model(tmp_path).train()
        put(subject.method, second, subject.settings)
    rest, _ = train(second, 6, lambda step: batch(), start=3, state=adamw.state_dict())
    assert losses + rest == expected
    assert same_weights(whole, second)


# ---- use -----------------------------------------------------------------------------------


@every_pair(lambda s: not has_other_weights(s))
def test_a_saved_model_gives_the_same_logits_and_text(
    subject: Subject, kind: str, tmp_path: Path
) -> None:
    model = subject.applied(kind)
    train(model, 2, lambda step: batch())
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).eval()
    if is_of_the_optimizer(subject):
        put(subject.method, loaded, subject.settings)  # the weights may be in another dtype
    prompt = {k: v[:1, :8] for k, v in batch().items() if k != "labels"}
    with torch.no_grad():
        ours, theirs = model(**prompt).logits, loaded(**prompt).logits
    if is_bitwise(subject) or is_of_the_optimizer(subject) or is_noisy(subject):
        assert torch.equal(ours, theirs)
    else:
        bound = subject.promises.bound_eps * torch.finfo(torch.float32).eps
        assert (ours - theirs).norm() <= bound * theirs.norm()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**prompt, **settings), loaded.generate(**prompt, **settings))


def text_batches(step: int) -> dict[str, Tensor]:
    """Pieces of the licence, one letter a token: a real text, if a small one."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    letters = {c: k for k, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] % VOCABULARY for c in text])
    starts = torch.randint(0, len(ids) - 33, (8,), generator=torch.Generator().manual_seed(step))
    pieces = torch.stack([ids[s : s + 32] for s in starts])
    return {"input_ids": pieces, "labels": pieces}


@pytest.fixture(scope="module")
def plain_losses() -> list[float]:
    """What the plain network, everything kept, reaches on the same task."""
    return train(gpt(), 40, text_batches)[0]


@every(is_default, lambda s: not has_other_weights(s))
def test_it_trains_on_a_text(subject: Subject, plain_losses: list[float]) -> None:
    losses, stepping = train(subject.applied(), 40, text_batches)
    start, end = plain_losses[0], sum(plain_losses[-5:]) / 5
    assert end < 0.8 * start  # the task can be learned
    lag = 0.15
    if isinstance(stepping, InTurns):
        plain_losses = train(only_trained_in(stepping, subject.network()), 40, text_batches)[0]
        start, end, lag = plain_losses[0], sum(plain_losses[-5:]) / 5, 0.25
        assert end < 0.9 * start
    # A structural network may lag, an exact method may not; all must win most of what plain wins
    # with the same weights.
    assert sum(losses[-5:]) / 5 <= end + lag * (start - end)


def only_trained_in(stepping: InTurns, model: nn.Module) -> nn.Module:
    """The model with all weights frozen that no turn trains."""
    given = [p for group in stepping.param_groups for p in group["params"]]
    trained = {id(p) for part in stepping.parts for p in part}
    for parameter, theirs in zip(model.parameters(), given, strict=True):
        parameter.requires_grad_(id(theirs) in trained)
    return model


# ---- misuse --------------------------------------------------------------------------------


@every(is_default)
def test_an_unknown_setting_is_refused_by_name(subject: Subject) -> None:
    with pytest.raises(ConfigError, match=f"method '{subject.method.name}' has no setting 'nap'"):
        subject.method.configure({"nap": 1})


@every(is_default)
def test_settings_survive_json(subject: Subject) -> None:
    config = subject.method.configure(subject.settings)
    again = json.loads(json.dumps(dataclasses.asdict(config)))
    assert subject.method.configure(again) == config
    hash(config)  # frozen, all the way down


@every(is_default)
def test_a_method_used_as_what_it_is_not_is_refused(subject: Subject) -> None:
    method, model = subject.method, subject.network()
    if method.promises.applies_to == "span":
        wrong = functools.partial(method.apply, model, method.configure())
    else:
        wrong = functools.partial(method.executor, Stack.of(model), 0, DEPTH, method.configure())
    with pytest.raises(ConfigError, match=f"method '{method.name}'"):
        wrong()


@every(is_default, lambda s: s.promises.applies_to not in ("optimizer", "batch"))
def test_a_model_without_layers_is_refused(subject: Subject) -> None:
    with pytest.raises(StackError):
        put(subject.method, nn.Linear(4, 4), {})


@every(is_default, lambda s: s.promises.applies_to == "span")
def test_a_span_outside_the_stack_is_refused(subject: Subject) -> None:
    stack = Stack.of(subject.network())
    before = stack.executors
    with pytest.raises((StackError, ConfigError), match="span"):
        apply_spans(stack, [Span(0, DEPTH + 1, subject.method.name)])
    assert stack.executors == before


@every(is_default, lambda s: s.promises.rebuilds == "streams")
def test_a_network_without_streams_is_refused(subject: Subject) -> None:
    with pytest.raises(StackError, match="not reversible"):
        put(subject.method, gpt(), {})


@every(is_default, lambda s: s.promises.applies_to not in ("span", "optimizer", "batch"))
def test_applying_twice_is_refused(subject: Subject) -> None:
    model = subject.applied()
    with pytest.raises(StackError):
        put(subject.method, model, {})


# ---- the page ------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"
HEADINGS = [
    "Idea", "Equations", "Memory", "Time", "Exactness", "Limits", "When not to use it", "Measured",
    "Source",
]  # fmt: skip


@every(is_default)
def test_there_is_a_page_with_the_usual_headings(subject: Subject) -> None:
    page = (DOCS / "methods" / f"{subject.method.name}.md").read_text(encoding="utf-8")
    lines = page.splitlines()
    assert lines[0] == f"# {subject.method.name}"
    assert [line[3:] for line in lines if line.startswith("## ")] == HEADINGS


@every(is_default)
def test_the_table_of_promises_says_what_is_declared(subject: Subject) -> None:
    assert promise_row(subject) in (DOCS / "index.md").read_text(encoding="utf-8").splitlines()


def promise_row(subject: Subject) -> str:
    """The line of docs/index.md for a method, from its declaration."""
    promises: Any = subject.promises
    grade = promises.grade or "-"
    if promises.gradient_error is not None:
        grade = f"gradient off by {promises.gradient_error:.1%} a draw"
    if promises.bound_eps is not None:
        grade += f", {promises.bound_eps:g} eps"
    grows = ", ".join(a for a in SIZES if a in promises.saved_grows_with) or "nothing"
    name = subject.method.name
    return (
        f"| [{name}](methods/{name}.md) | {promises.fidelity} | {grade} "
        f"| {promises.applies_to} | {grows} |"
    )
