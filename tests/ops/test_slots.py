"""The slots of a decoder: as few as possible, and never one taken while its key is still to be seen."""

import numpy as np
import pytest

from attn_zoo.attention.block import Options as Block
from attn_zoo.attention.block import pattern as block_pattern
from attn_zoo.ops.block_mask import visibility
from attn_zoo.ops.patterns import CAUSAL, Band, Every, Prefix
from attn_zoo.ops.slots import plan_slots

T = 150
PATTERNS = {
    "band": Band(7, 0),
    "causal": CAUSAL,
    "global-window": CAUSAL & (Prefix(3) | Band(7, 7)),
    "strided": CAUSAL & (Band(5, 5) | Every(13)),
    "block": block_pattern(Block(8, 1, 1, 2), T, T, True),
    "dilated": Band(12, 0) & Every(4),
}


def dense(pattern):
    return np.broadcast_to(pattern.mask(np.arange(T)[:, None], np.arange(T)[None, :]), (T, T))


@pytest.mark.parametrize("name", PATTERNS)
def test_visibility_is_that_of_the_dense_mask(name):
    mask = dense(PATTERNS[name])
    last, seen = visibility(PATTERNS[name], T)
    np.testing.assert_array_equal(seen, mask.sum(axis=1))
    np.testing.assert_array_equal(last, np.where(mask.any(axis=0), T - 1 - mask[::-1].argmax(axis=0), -1))


@pytest.mark.parametrize("name", PATTERNS)
def test_no_slot_is_taken_before_its_key_was_last_seen(name):
    slots, mask = plan_slots(PATTERNS[name], T), dense(PATTERNS[name])
    where = [j % slots.count for j in range(T)] if slots.of is None else slots.of
    held = {}
    for i in range(T):
        held[where[i]] = i
        assert set(np.flatnonzero(mask[i])) <= set(held.values())
        assert mask[i].sum() <= slots.most
    live = max(int(((np.arange(T) <= i) & mask[i:].any(axis=0)).sum()) for i in range(T))
    assert slots.count == live, "as many slots as keys are alive at once"


def test_every_stride_is_judged_by_its_corners():
    for stride in (1, 3, 64, 200):
        i0, j0 = np.arange(0, 300, 7)[:, None], np.arange(0, 300, 5)[None, :]
        some, every = Every(stride).blocks(i0, i0 + 6, j0, j0 + 4)
        seen = Every(stride).mask((i0 + np.arange(7)[:, None, None, None]), (j0 + np.arange(5)[:, None, None]))
        np.testing.assert_array_equal(some, seen.any(axis=(0, 1)))
        np.testing.assert_array_equal(every, seen.all(axis=(0, 1)))
