import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthlong.boxes import box_at, box_of, crop, on_grid, overlap, widened, within

GRID = (10, 12, 9)
PAD = 60
RAMP = np.arange(np.prod(GRID), dtype=np.float32).reshape(GRID) + 1
BEYOND = np.pad(RAMP, PAD)


def seen(box):
    """What a box shows of the ramp, 0 beyond it: the reference."""
    return BEYOND[tuple(slice(b.start + PAD, b.stop + PAD) for b in box)]


boxes = st.builds(box_at, st.tuples(*[st.integers(-20, 30)] * 3), st.tuples(*[st.integers(1, 24)] * 3))


@given(boxes, st.integers(0, 9))
def test_a_widened_box_has_the_margin_on_each_face(box, margin):
    wide = widened(box, margin)
    assert np.array_equal(seen(wide)[tuple(slice(margin, n - margin) for n in seen(wide).shape)], seen(box))
    assert widened(wide, -margin) == box


@given(boxes)
def test_what_of_a_box_lies_on_the_grid(box):
    part = overlap(box, box_at((0, 0, 0), GRID))
    assert (part is not None) == bool(seen(box).any())
    assert np.array_equal(RAMP[on_grid(box, GRID)].ravel(), seen(box)[seen(box) > 0])
    if part:
        assert part == on_grid(box, GRID)
        assert np.array_equal(RAMP[part], seen(box)[within(part, box)])
        assert np.count_nonzero(seen(box)) == RAMP[part].size


@given(boxes, boxes)
def test_both_boxes_show_the_same_where_they_overlap(box, other):
    both = overlap(box, other)
    voxels = [set(range(b.start, b.stop)) & set(range(o.start, o.stop)) for b, o in zip(box, other, strict=True)]
    assert (0 if both is None else seen(both).size) == np.prod([len(along) for along in voxels])
    assert both == overlap(other, box)
    if both:
        assert np.array_equal(seen(box)[within(both, box)], seen(other)[within(both, other)])


@settings(max_examples=30)
@given(st.tuples(*[st.integers(-40, 50)] * 3), st.integers(1, 24))
def test_crop_is_a_slice_of_the_padded_grid(centre, side):
    cube, start = crop(RAMP, centre, side)
    assert start == tuple(c - side // 2 for c in centre)
    assert np.array_equal(cube, seen(box_at(start, (side,) * 3)))


def test_the_box_of_a_mask_stays_within_the_array():
    mask = np.zeros((6, 7, 8), bool)
    mask[0, 3, 6:8] = True
    assert box_of(mask, 2) == (slice(0, 3), slice(1, 6), slice(4, 8))
    assert box_of(mask, 0) == (slice(0, 1), slice(3, 4), slice(6, 8))


def test_boxes_of_other_ranks_do_not_pass():
    with pytest.raises(ValueError, match="zip"):
        overlap(box_at((0, 0), (1, 1)), box_at((0, 0, 0), GRID))
