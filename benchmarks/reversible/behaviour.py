"""What users expect of a module in training: the checks of tests/reversible, one row each."""

import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from equality import one_value_off

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from reversible import test_behaviour as checks
from reversible.workers import MODES, work

# What is compared with is the same network with stored activations, bit for bit where nothing
# else is said.
ROWS: dict[str, tuple[Callable[[], None], ...]] = {
    "gradients, float32 and float64": tuple(
        functools.partial(
            checks.test_gradients_equal_those_of_stored_activations_bit_for_bit, double=double
        )
        for double in (False, True)
    ),
    "dropout: masks repeated, and gradients against finite differences": (
        checks.test_dropout_draws_the_same_masks_in_backward,
        checks.test_dropout_gradients_match_finite_differences,
    ),
    "two forwards before one backward, dropout": (
        functools.partial(
            checks.test_two_forwards_before_a_backward_each_use_their_own_streams, dropout=0.3
        ),
    ),
    "backwards in any order": (checks.test_backwards_may_come_in_any_order,),
    "input of the stack needs no gradient": (
        checks.test_parameters_get_gradients_when_the_input_needs_none,
    ),
    "frozen attention, frozen body, all but one bias frozen": tuple(
        functools.partial(
            checks.test_frozen_parameters_get_nothing_and_the_others_what_they_should, frozen=frozen
        )
        for frozen in ("attention", "body", "all but one bias")
    ),
    "unused parameter in a sub-block": (checks.test_an_unused_parameter_is_left_alone,),
    "autograd.grad": (checks.test_autograd_grad_works_and_leaves_grad_attributes_alone,),
    "double backward (to 1e-11)": (checks.test_double_backward_is_right,),
    "backward twice with retain_graph": (
        checks.test_backward_twice_with_retain_graph_doubles_the_gradient,
    ),
    "bf16 autocast around forward only": (
        checks.test_the_recompute_runs_under_the_autocast_of_forward,
    ),
    "16-bit streams are refused": tuple(
        functools.partial(
            checks.test_sixteen_bit_streams_are_refused_with_the_way_out, streams=streams
        )
        for streams in ("bfloat16", "float16")
    ),
    "random state unchanged by backward": (checks.test_backward_leaves_the_random_state_as_it_was,),
    "BatchNorm statistics move once a step": (checks.test_batch_norm_statistics_move_once_a_step,),
    "functional_call": (checks.test_functional_call_sends_gradients_to_the_functional_parameters,),
    "torch.compile of each sub-block": (checks.test_sub_blocks_can_be_compiled_one_by_one,),
    "torch.compile of the network (with graph breaks)": (
        checks.test_a_whole_network_may_be_compiled,
    ),
    "post-accumulate hooks fire once": (
        checks.test_post_accumulate_hooks_fire_once_for_every_parameter,
    ),
    "optimizer step inside backward": (checks.test_an_optimizer_may_step_inside_backward,),
    "deepcopy and state_dict after a step": (
        checks.test_deepcopy_and_state_dict_after_a_step_give_the_same_network,
    ),
}


def verdict(tries: tuple[Callable[[], None], ...]) -> str:
    """ "pass", or what went wrong in the first try that failed."""
    for check in tries:
        torch.manual_seed(0)  # as every test starts
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check()
        except Exception as error:  # whatever it is, it is a row of the table
            return f"fail: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return "pass"


def distributed() -> dict[str, str]:
    """Two processes in every mode: what either found."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder,), nprocs=2)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    problems = {mode: next((f[mode] for f in found if f[mode]), "") for mode in MODES}
    return {
        f"{mode}, 2 processes": f"fail: {problem.splitlines()[-1]}" if problem else "pass"
        for mode, problem in problems.items()
    }


def run(*, smoke: bool) -> dict[str, Any]:
    """Every row, and a control: the first row with one rebuilt value off, which has to fail."""
    rows = {name: verdict(tries) for name, tries in ROWS.items()}
    if not smoke:
        rows.update(distributed())
    for name, found in rows.items():
        print(f"  {name:70} {found}", flush=True)
    first = next(iter(ROWS))
    with one_value_off():
        control = verdict(ROWS[first])
    assert control != "pass", "the check of gradients is blind"
    return {"rows": rows, "control": {f"{first}, one stream value one step off": control}}
