"""float32 to bfloat16 by chance, against Python integers."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.ops.stochastic_rounding import to_bfloat16, to_bfloat16_ref


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.integers(0, (1 << 16) - 1),
)
def test_bits_are_those_of_the_twin(value: float, noise: int) -> None:
    found = to_bfloat16(torch.tensor([value]), torch.tensor([noise], dtype=torch.int32))
    assert float(found) == to_bfloat16_ref(value, noise)


def test_only_the_two_neighbours_come_out_with_the_right_mean() -> None:
    draws = 1 << 16
    for value in (1.003, -1.003, 3.1e-5, -7.7e8):
        x = torch.full((draws,), value)
        every = torch.arange(draws, dtype=torch.int32)  # each noise once: the mean is exact
        kept = to_bfloat16(x, every).double()
        assert len(kept.unique()) == 2
        assert math.isclose(float(kept.mean()), float(x[0]), rel_tol=1e-9)


def test_what_bfloat16_holds_stays_and_so_do_infinities_and_nan() -> None:
    held = torch.randn(500).bfloat16().float()
    special = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    noise = torch.randint(0, 1 << 16, (500,), dtype=torch.int32)
    assert torch.equal(to_bfloat16(held, noise).float(), held)
    assert torch.equal(to_bfloat16(special, noise[:4]).float(), special)
    full = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert to_bfloat16(full, torch.full((2,), 0xFFFF, dtype=torch.int32)).isnan().all()
