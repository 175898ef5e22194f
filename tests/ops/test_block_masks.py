"""The mask of clean and noised rows, and that nothing leaks through it."""

import pytest
import torch
import torch.nn.functional as F

from shoestring.errors import ConfigError
from shoestring.ops import block_masks
from shoestring.ops.block_masks import may_look_ref

S = 6


@pytest.mark.parametrize(("size", "shifted"), [(1, False), (1, True), (2, False), (3, False)])
def test_mask_is_that_of_its_twin(size, shifted):
    mask = block_masks.block_mask(S, size=size, shifted=shifted)
    for row in range(2 * S):
        for column in range(2 * S):
            assert bool(mask[row, column]) == may_look_ref(row, column, S, size, shifted)
    assert mask.any(dim=1).all()  # a row that may look nowhere would give NaN


def attended(clean, noised, mask):
    """Two layers of attention over both halves."""
    x = torch.cat((clean, noised))[None, None]
    for _ in range(2):
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask) + x
    return x[0, 0, :S], x[0, 0, S:]


def nothing_leaks(shifted):
    """A noised row knows no token from its own on, no other noised row, and no clean row knows a
    noised one."""
    generator = torch.Generator().manual_seed(0)
    clean, noised = torch.randn(2, S, 4, generator=generator, dtype=torch.float64)
    mask = block_masks.block_mask(S, shifted=shifted)
    _, before = attended(clean, noised, mask)
    for j in range(S):
        changed = clean.clone()
        changed[j] += 1.0
        _, after = attended(changed, noised, mask)
        answers = j if shifted else j + 1  # rows whose target is at or before token j
        assert torch.equal(before[:answers], after[:answers])
        assert not torch.equal(before[answers:], after[answers:]) or answers == S
        changed = noised.clone()
        changed[j] += 1.0
        still, after = attended(clean, changed, mask)
        others = [i for i in range(S) if i != j]
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[j], after[j])
        assert torch.equal(still, attended(clean, noised, mask)[0])


@pytest.mark.parametrize("shifted", [False, True])
def test_nothing_leaks(shifted):
    nothing_leaks(shifted)


def plain_causal(length, *, size=1, shifted=False, device=None):
    return torch.ones(2 * length, 2 * length, dtype=torch.bool).tril()


def other_convention(length, *, size=1, shifted=False, device=None):
    return REAL(length, size=size, shifted=not shifted)


def noised_rows_see_each_other(length, *, size=1, shifted=False, device=None):
    mask = REAL(length, size=size, shifted=shifted)
    mask[length:, length:] = torch.ones(length, length, dtype=torch.bool).tril()
    return mask


def no_context(length, *, size=1, shifted=False, device=None):
    mask = REAL(length, size=size, shifted=shifted)
    mask[length:, :length] = False
    return mask


REAL = block_masks.block_mask


@pytest.mark.parametrize(
    "bug", [plain_causal, other_convention, noised_rows_see_each_other, no_context]
)
@pytest.mark.parametrize("shifted", [False, True])
def test_planted_bug_is_seen(monkeypatch, bug, shifted):
    monkeypatch.setattr(block_masks, "block_mask", bug)
    with pytest.raises(AssertionError):
        nothing_leaks(shifted)


@pytest.mark.parametrize(
    ("length", "size", "shifted"), [(0, 1, False), (6, 4, False), (6, 0, False), (6, 2, True)]
)
def test_pieces_that_do_not_fill_the_text_are_refused(length, size, shifted):
    with pytest.raises(ConfigError, match="a size that divides the length"):
        block_masks.block_mask(length, size=size, shifted=shifted)
