"""Plans in models: put in, replaced, taken out, and not carried over into what is planned next.

What a plan put in place is noted in the model itself, as data, so that a copy of the model (the
planner's fake twin is one) knows which plan is in it. Methods stand in instance `forward`s, so
the note is: of which module, what stood there before, and what stands there now. What was done to
weights is undone by the methods themselves, in the model only, not in its copies.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import StackError
from ..methods import Undo
from ..stack import Runner, Span
from .made_for import Guard
from .ways import Way, apply_ways, stack_of

_NOTE = "_shoestring_plan"  # an attribute of the model


@dataclass(eq=False)
class InPlace:
    """(module, its instance `forward` before, and now; None = none), for what a plan changed."""

    changes: list[tuple[nn.Module, Any, Any]]
    weights: Undo | None = None
    """Undoes what was done to the weights; None where nothing was."""
    guard: Guard | None = None
    turns: Undo | None = None
    """Ends the turns that weights are trained in; None where they all are at once."""
    trained: tuple[str, ...] = ()
    """Names of the weights that are trained in turns."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "InPlace":
        # A copy has weights of its own, wherever its maker put them.
        changes, guard = copy.deepcopy((self.changes, self.guard), memo)
        return InPlace(changes, guard=guard, trained=self.trained)

    def watch(self, model: nn.Module) -> None:
        """Put the guard's hook in."""
        if self.guard is not None:
            model.register_forward_pre_hook(self.guard, with_kwargs=True)

    def unwatch(self, model: nn.Module) -> None:
        """Take the guard's hook out: by what it is, since handles do not follow a copy."""
        for key, hook in list(model._forward_pre_hooks.items()):
            if hook is self.guard:
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)


def put(
    model: nn.Module, patches: Sequence[Way], spans: Sequence[Span], guard: Guard | None = None
) -> InPlace:
    """Put patches and spans in place, instead of any plan that is. Errors change nothing.

    guard: looks at every training batch while they are.

    StackError also for a model whose weights a plan has moved: moving them back may need more
    memory than there is, so it is not done on the way.
    """
    before, notes = _forwards(model), list(_notes(model))
    if has_moved_weights(model):
        raise StackError(
            f"the weights of this {type(model).__name__} were moved or changed by the plan that is "
            "in it",
            expected="a model without such a plan",
            hint="Take it out first: plan.restore(model). Adapters are forgotten then, unless "
            "shoestring.methods.lora.merge(model) comes before.",
        )
    moving = [w for w in patches if w.applies_to == "weights" or w.promises.changes_weights]
    undo: Undo | None = None
    try:
        bare(model)
        plain = _forwards(model)
        rest = [w for w in patches if w not in moving and not w.promises.takes_turns]
        apply_ways(model, rest, ())
        undo = apply_ways(model, moving, ()) if moving else None
        apply_ways(model, (), spans)
    except BaseException:
        if undo is not None:
            undo()
        for module, forward in before.items():
            _set(module, forward)
        for module, note in notes:
            module.__dict__[_NOTE] = note
            note.watch(module)
        raise
    changes = [
        (m, plain.get(m), now) for m, now in _forwards(model).items() if now is not plain.get(m)
    ]
    turns = [w for w in patches if w.promises.takes_turns]
    note = model.__dict__[_NOTE] = InPlace(
        changes, undo, guard,
        turns=apply_ways(model, turns, ()) if turns else None,
        trained=tuple(n for n, p in model.named_parameters() if turns and p.requires_grad),
    )  # fmt: skip
    note.watch(model)
    return note


def put_again(patches: Sequence[Way], spans: Sequence[Span], twin: nn.Module) -> None:
    """Into a copy of a model with a plan: its weights are where their maker put them, in the
    dtype that the plan gave them."""
    bare(twin)
    apply_ways(twin, [w for w in patches if not w.promises.changes_weights], spans)


def note_of(model: nn.Module) -> InPlace | None:
    """What the plan in this model has changed; None without one."""
    return vars(model).get(_NOTE)


def has_moved_weights(model: nn.Module) -> bool:
    """Whether a plan that is in this model moved its weights, or changed their dtype."""
    return any(note.weights is not None for _, note in _notes(model))


def take_out(model: nn.Module) -> None:
    """Take the plan of this model out. StackError when something stands over it by now."""
    note = note_of(model)
    if note is None:
        return
    standing = []
    for module, before, now in note.changes:
        found = vars(module).get("forward")
        if found is now:
            standing.append((module, before))
        elif found is not before and not isinstance(found, Runner):
            # Another runner took this one's place and stays; anything else may call it.
            raise StackError(
                f"{type(module).__name__}.forward was replaced after a plan was applied",
                hint="Undo in the reverse order of applying.",
            )
    if note.weights is not None:
        note.weights()  # it finds what it put there
    for module, before in standing:
        _set(module, before)
    note.unwatch(model)
    del model.__dict__[_NOTE]
    if note.turns is not None:
        note.turns()
    for name, parameter in model.named_parameters():
        if name in note.trained:  # a copy was made in the middle of a turn
            parameter.requires_grad_(True)


def bare(model: nn.Module) -> None:
    """Take out plans, and runners that were put in by hand; those that make up the model's
    function stay, and so do patches that were put in by hand."""
    for module, _ in list(_notes(model)):
        take_out(module)
    stack = stack_of(model)
    while (top := [e for e in stack.executors if e is not None]) and not top[0].always:
        stack.restore()


def strip(model: nn.Module) -> None:
    """Take out every runner: the blocks run as their modules say."""
    bare(model)
    stack = stack_of(model)
    while any(e is not None for e in stack.executors):
        stack.restore()


def _notes(model: nn.Module) -> Iterator[tuple[nn.Module, InPlace]]:
    """Of the model, and of what it wraps."""
    for module in model.modules():
        if (note := note_of(module)) is not None:
            yield module, note


def _forwards(model: nn.Module) -> dict[nn.Module, Any]:
    return {module: vars(module).get("forward") for module in model.modules()}


def _set(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward
