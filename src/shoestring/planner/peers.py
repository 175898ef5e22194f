"""The fixed recipes that people use where nothing is planned, by the same costs as plans.

Each is a schedule on the model's own chain with a few methods at their default settings, priced by
the same measurements and simulated as every plan is, so that its bytes and seconds may stand
beside theirs. Recipes are told by what methods declare; what is not in the table of methods, or
does not fit the model, makes no recipe. What a plan is allowed does not restrict them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..methods import METHODS, Method
from .chain import Chain, Kept, Redone, Schedule, keep_all, nested
from .choose import Choice, Planner, choice
from .fake import Profile
from .in_place import strip
from .variants import Patches
from .ways import Way, apply_ways, takes

EVERY_BLOCK = "checkpoint every block"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as a choice. note: what is to be known of it, such as that it does what plans are
    not allowed; fidelity: the least of its parts."""

    name: str
    note: str
    choice: Choice
    fidelity: str


def recipes(planner: Planner) -> list[Recipe]:
    """The usual recipes for this model. Its stack is plain in them, whatever is in place."""
    found = [_recipe(planner, name, note, schedule, ())
             for name, note, schedule in _schedules(planner)]  # fmt: skip
    by_name = {r.name: r for r in found}
    for name, patches in _patched(planner, EVERY_BLOCK in by_name):
        schedule = by_name[EVERY_BLOCK if EVERY_BLOCK in name else "plain"].choice.schedule
        found.append(_recipe(planner, name, "", schedule, patches))
    return found


def _schedules(planner: Planner) -> Iterator[tuple[str, str, Schedule]]:
    variant = planner.costs.variant((), plain=planner.offer.streams)
    chain, offer, n = variant.chain, variant.offer, len(variant.chain.blocks)
    yield "plain", "everything is kept", keep_all(chain)
    redo = offer.redo
    if redo is None or not all(b.redone for b in chain.blocks):
        return
    yield EVERY_BLOCK, "Hugging Face's gradient_checkpointing", nested(chain, 1)
    yield "checkpoint every other block", "the first, the third, ...", _every_other(chain)
    segment = math.isqrt(n - 1) + 1
    yield f"nested, segments of {segment}", "square root of the depth", nested(chain, segment)
    for index, way in enumerate(offer.kept):
        if way.method == redo.method:
            modes = ", ".join(str(value) for value in way.config.values())
            yield f"selective checkpoint, {modes} kept", "in every block", keep_all(chain, index)


def _every_other(chain: Chain) -> Schedule:
    return tuple(
        Kept(i, 0) if i % 2 else Redone(i, i + 1) for i in range(len(chain.blocks))
    )  # fmt: skip


def _patched(planner: Planner, has_redo: bool) -> Iterator[tuple[str, Patches]]:
    """Names and patches: methods of the loss, and of what the optimizer holds, at their default
    settings: the loss alone and with checkpoints, the others with both."""
    losses = [way for m in METHODS.values() if (way := _default(planner, m, "loss"))]
    held = [
        way for m in METHODS.values()
        if not m.promises.frees_gradients and not m.promises.changes_weights
        and (way := _default(planner, m, "optimizer"))
    ]  # fmt: skip
    for way in losses:
        yield _words(way), (way,)
        if has_redo:
            yield f"{EVERY_BLOCK}, {_words(way)}", (way,)
    for way in held:
        # With the rest of the usual set only: their simulation takes longest.
        both = (*losses[:1], way)
        words = ", ".join(map(_words, both))
        yield (f"{EVERY_BLOCK}, {words}" if has_redo else words), both


def _words(way: Way) -> str:
    return way.method.replace("_", " ")


def _default(planner: Planner, m: Method, applies_to: str) -> Way | None:
    """The method at its default settings, where it is of that sort and this model takes it."""
    if m.promises.applies_to != applies_to:
        return None
    way = Way(m.name, dict((m.variants or ({},))[0]))
    make = planner.step.make if applies_to == "optimizer" else None
    with planner.base.mode:
        return way if takes(planner.base.model, [way], make) else None


def _recipe(
    planner: Planner, name: str, note: str, schedule: Schedule, patches: Patches
) -> Recipe:  # fmt: skip
    variant = planner.costs.variant(patches, plain=planner.offer.streams, timed=planner.timed)
    if not {w.method for w in patches} <= {m.name for m in planner.methods}:
        note = "more than these plans may do"
    fidelity = next((w.promises.fidelity for w in patches if w.promises.fidelity != "exact"),
                    "exact")  # fmt: skip
    return Recipe(name=name, note=note, choice=choice(variant, schedule), fidelity=fidelity)


def simulated(planner: Planner, recipe: Recipe) -> Profile:
    """The recipe in a simulation of whole steps."""
    if not planner.offer.streams:
        return planner.promise(recipe.choice)

    def put(model: nn.Module) -> None:
        strip(model)
        apply_ways(model, recipe.choice.patches, recipe.choice.spans)

    return planner.step.simulate(put, recipe.choice.patches)
