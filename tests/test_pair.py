from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthlong.artifacts import acquire
from synthlong.bank import read_bank
from synthlong.derived import lesions_of
from synthlong.errors import InputError
from synthlong.event import LesionEvent
from synthlong.hole import REACH, soft_hole
from synthlong.lesions import core
from synthlong.orientation import Orientation
from synthlong.pair import render
from synthlong.placement import allowed_of, site_mask
from synthlong.recipe import Artifacts, Box, Recipe, draw_recipe, rng_of
from synthlong.resampling import shifted
from synthlong.synthesis import SynthesisConfig

DEFAULT = SynthesisConfig(artifacts="none")
BUSY = replace(
    DEFAULT, removed_share=0.2, enlarging_mean=3.0, shrinking_mean=2.0, vanished_mean=2.0, with_new_lesions=1
)
IMAGES = ("baseline", "followup")
MASKS = ("new_lesions", "evolution", "lesions_baseline", "lesions_followup")


class Brush:
    """Paints noise around 1.6; what it paints depends on all that a painter is given."""

    def paint(self, x, mask, *, seed, profile, donor=None):
        white = np.random.default_rng(seed).normal(1.6, 0.1, x.shape)
        weight = soft_hole(mask) * (x > 0)
        bright = white + 0.01 * np.cbrt(np.count_nonzero(mask)) + x.mean()
        return np.where(weight > 0, x + weight * (bright - x), x).astype(np.float32)


class Dirt(Brush):
    """A painter that does not keep to its mask."""

    def paint(self, x, mask, *, seed, profile, donor=None):
        return super().paint(x, mask, seed=seed, profile=profile) + np.float32(0.5)


def rendered(case, recipe, **options):
    return render(case, recipe, painter=options.pop("painter", Brush()), **options)


@pytest.fixture(scope="module")
def whole_case(real_case):
    weight = soft_hole(real_case.lesions) * (real_case.flair > 0)
    healthy = np.where(weight > 0, real_case.flair + weight * (1 - real_case.flair), real_case.flair)
    return replace(real_case, healthy=healthy.astype(np.float32))


@pytest.fixture(scope="module")
def pairs(whole_case):
    """Busy recipes, each with its pair in the box and on the whole grid, not turned."""
    config = replace(BUSY, orientations="none")
    recipes = [draw_recipe(whole_case, config, rng_of(5, whole_case.id, k)) for k in range(4)]
    return [(r, rendered(whole_case, r), rendered(whole_case, r, whole=True)) for r in recipes]


def with_events(case, kinds):
    """A recipe over the whole of a small case: the extents of its real lesions, by number."""
    volumes = lesions_of(case, 3000.0).volumes_mm3
    events = tuple(
        LesionEvent("real", *at, (round(v * at[0]), round(v * at[1])), lesion=n)
        for n, (at, v) in enumerate(zip(kinds, volumes, strict=True), start=1)
    )
    return Recipe(case.id, Box((0, 0, 0), 40, "uniform"), events)


def test_equal_away_from_what_changes(pairs):
    for _, _, pair in pairs:
        changed = pair.evolution >= 2
        assert changed.any()
        far = ndimage.distance_transform_edt(~changed) > REACH
        assert np.array_equal(pair.baseline[far], pair.followup[far])
        assert not np.array_equal(pair.baseline, pair.followup)


def test_masks_agree(pairs):
    for _, box, whole in pairs:
        for pair in (box, whole):
            code, before, after = pair.evolution, pair.lesions_baseline == 1, pair.lesions_followup == 1
            assert np.array_equal(pair.new_lesions == 1, code == 2)
            assert np.array_equal(before, np.isin(code, (1, 3, 5)))
            assert np.array_equal(after, np.isin(code, (1, 2, 4)))
            assert all(getattr(pair, m).dtype == np.uint8 for m in MASKS)
            assert all(getattr(pair, m).dtype == np.float32 for m in IMAGES)


def test_each_events_voxels_are_in_the_masks(pairs, whole_case):
    lesions, bank = lesions_of(whole_case, 3000.0), read_bank()
    allowed = allowed_of(whole_case, DEFAULT.margin)
    codes = {"new": 2, "vanished": 3, "enlarging": 4, "shrinking": 5}
    for recipe, _, pair in pairs:
        for event in recipe.events:
            if event.site:
                mask, box = site_mask(event.site, bank, allowed)
            else:
                box = lesions.boxes[event.lesion - 1]
                mask = lesions.labels[box] == event.lesion
            counts = (pair.lesions_baseline[box][mask].sum(), pair.lesions_followup[box][mask].sum())
            assert counts == event.voxels
            if event.kind in codes:
                changed = (pair.evolution[box] == codes[event.kind])[mask].sum()
                assert changed == abs(event.voxels[0] - event.voxels[1])
        assert pair.lesions_baseline.sum() == sum(e.voxels[0] for e in recipe.events)
        assert pair.lesions_followup.sum() == sum(e.voxels[1] for e in recipe.events)


def test_the_box_is_a_crop_of_the_whole(pairs):
    for recipe, box, whole in pairs:
        at = tuple(slice(s, s + 64) for s in recipe.box.start)
        for name in (*IMAGES, *MASKS):
            assert np.array_equal(getattr(box, name), getattr(whole, name)[at])


def test_boxes_that_cut_lesions_or_the_grid(pairs, whole_case):
    recipe, _, whole = pairs[0]
    size = 32
    around = [e.site.centre for e in recipe.events if e.site][:3]
    starts = [tuple(c + d for c in centre) for centre in around for d in (-1, -size + 1, 4)]
    for start in [*starts, (-9, 90, 170), (40, -12, 60), (170, 200, -20)]:
        moved = replace(recipe, box=Box(start, size, "uniform"))
        pair = rendered(whole_case, moved)
        padded = [(max(-s, 0), max(s + size - n, 0)) for s, n in zip(start, whole_case.shape, strict=True)]
        at = tuple(slice(max(s, 0), s + size) for s in start)
        for name in (*IMAGES, *MASKS):
            expected = np.pad(getattr(whole, name)[at], padded)
            assert np.array_equal(getattr(pair, name), expected), (name, start)


def test_all_lesions_kept_is_the_scan_itself(small_case):
    pair = rendered(small_case, with_events(small_case, [(1, 1)] * 3))
    for name in IMAGES:
        assert np.array_equal(getattr(pair, name), small_case.flair)
    assert np.array_equal(pair.lesions_baseline, small_case.lesions)
    assert np.array_equal(pair.evolution, small_case.lesions)


def test_all_lesions_removed_is_the_healthy_scan(small_case):
    pair = rendered(small_case, with_events(small_case, [(0, 0)] * 3))
    for name in IMAGES:
        assert np.array_equal(getattr(pair, name), small_case.healthy)
    assert not any(getattr(pair, m).any() for m in MASKS)


def test_one_new_one_vanished_one_stable(small_case):
    pair = rendered(small_case, with_events(small_case, [(0, 1), (1, 0), (1, 1)]))
    labels = lesions_of(small_case, 3000.0).labels
    for number, code in ((1, 2), (2, 3), (3, 1)):
        assert (pair.evolution[labels == number] == code).all()
    hole = soft_hole(labels == 1) > 0
    assert np.array_equal(pair.baseline[hole], small_case.healthy[hole])
    assert np.array_equal(pair.followup[hole], small_case.flair[hole])


def test_a_real_lesion_that_grows(small_case):
    pair = rendered(small_case, with_events(small_case, [(1, 1), (0.4, 1), (1, 1)]))
    own = lesions_of(small_case, 3000.0).labels == 2
    inner = core(own, 0.4)
    assert np.array_equal(pair.lesions_baseline[own] == 1, inner[own])
    assert (pair.evolution[own & ~inner] == 4).all()
    assert np.array_equal(pair.followup, small_case.flair)
    assert np.array_equal(pair.baseline[inner], small_case.flair[inner])
    outer = own & (ndimage.distance_transform_edt(~inner) > 1.5)
    assert np.array_equal(pair.baseline[outer], small_case.healthy[outer])


def test_a_removed_neighbour_does_not_touch_a_lesion_that_stays(small_case):
    labels = np.zeros(small_case.shape, np.uint8)
    labels[28:31, 20, 20] = labels[33:36, 20, 20] = 1
    flair = np.where(labels, small_case.healthy + np.float32(0.6), small_case.healthy)
    case = replace(small_case, lesions=labels, flair=flair)
    pair = rendered(case, with_events(case, [(1, 1), (0, 1)]))
    assert np.array_equal(pair.baseline[28:31, 20, 20], flair[28:31, 20, 20])
    assert np.array_equal(pair.baseline[33:36, 20, 20], case.healthy[33:36, 20, 20])


def synthetic(case, recipe, at):
    """The recipe with its first site's lesion alone, with other extents."""
    real = tuple(e for e in recipe.events if e.source == "real")
    first = next(e for e in recipe.events if e.site)
    event = replace(first, at_baseline=at[0], at_followup=at[1])
    box = Box(tuple(c - 24 for c in first.site.centre), 48, "event")
    return replace(recipe, events=(*real, event), box=box, orientation=Orientation())


@pytest.fixture(scope="module")
def large_site(whole_case):
    """A recipe with a large synthetic lesion."""
    config = replace(DEFAULT, volume_median_mm3=1500.0, volume_log_sd=0.0, with_new_lesions=1, removed_share=0)
    allowed = allowed_of(whole_case, DEFAULT.margin)
    for k in range(60):
        recipe = draw_recipe(whole_case, config, rng_of(1, whole_case.id, k))
        sites = [e.site for e in recipe.events if e.site]
        if sites and site_mask(sites[0], read_bank(), allowed)[0].sum() > 700:
            return recipe
    raise AssertionError("no large lesion was drawn")


@pytest.mark.parametrize("at", [(0, 1), (1, 0), (1, 1), (0.3, 1), (1, 0.6)])
def test_a_synthetic_lesion_is_painted(large_site, whole_case, at):
    recipe = synthetic(whole_case, large_site, at)
    pair = rendered(whole_case, recipe)
    event = recipe.events[-1]
    other = rendered(whole_case, replace(recipe, events=recipe.events[:-1]))
    mask, box = site_mask(event.site, read_bank(), allowed_of(whole_case, DEFAULT.margin))
    where = tuple(slice(b.start - s, b.stop - s) for b, s in zip(box, recipe.box.start, strict=True))
    for name, share in zip(IMAGES, at, strict=True):
        own = np.zeros(pair.baseline.shape, bool)
        own[where] = core(mask, share)
        image, plain = getattr(pair, name), getattr(other, name)
        assert (image[own] > 1.3).all()
        far = soft_hole(own) == 0
        assert np.array_equal(image[far], plain[far])
    changed = pair.evolution >= 2
    far = ndimage.distance_transform_edt(~changed) > REACH if changed.any() else ~changed
    assert np.array_equal(pair.baseline[far], pair.followup[far])
    if at == (0.3, 1):
        assert (far & (pair.evolution == 1)).any()  # its deep core is one and the same


def test_real_lesions_in_a_synthetic_ones_bounding_box_stay(pairs, whole_case):
    """Painting one lesion does not wipe out another, however careless the painter."""
    recipe, _, whole = pairs[0]
    for painter in (Brush(), Dirt()):
        pair = rendered(whole_case, recipe, whole=True, painter=painter)
        stable = [e for e in recipe.events if e.source == "real" and e.kind == "stable"]
        labels = lesions_of(whole_case, 3000.0).labels
        kept = np.isin(labels, [e.lesion for e in stable])
        assert np.array_equal(pair.baseline[kept], whole_case.flair[kept])
        changed = soft_hole(whole.evolution > 0) > 0
        removed = soft_hole(np.isin(labels, [e.lesion for e in recipe.events if e.lesion])) > 0
        untouched = ~changed & ~removed
        assert np.array_equal(pair.followup[untouched], whole_case.flair[untouched])


def test_nothing_is_painted_into_csf_or_background(pairs, whole_case):
    outside = (whole_case.tissue < 2) & (soft_hole(whole_case.lesions) == 0)
    for _, _, pair in pairs:
        for name in IMAGES:
            assert np.array_equal(getattr(pair, name)[outside], whole_case.flair[outside])


def test_one_orientation_for_all(pairs, whole_case):
    recipe, plain, _ = pairs[1]
    turn = Orientation((2, 0, 1), (True, False, True))
    turned = rendered(whole_case, replace(recipe, orientation=turn))
    for name in (*IMAGES, *MASKS):
        assert np.array_equal(getattr(turned, name), turn.apply(getattr(plain, name)))
    index = np.argwhere(turned.lesions_followup)[0]
    world = turned.affine @ (*index, 1)
    source = np.rint(np.linalg.solve(whole_case.affine, world))[:3].astype(int)
    assert plain.lesions_followup[tuple(source - recipe.box.start)] == 1
    assert turned.followup[tuple(index)] == plain.followup[tuple(source - recipe.box.start)]
    assert np.allclose(turned.affine, replace(recipe, orientation=turn).affine)


def test_the_whole_grid_keeps_its_shape(pairs, whole_case):
    recipe, _, plain = pairs[2]
    mirrored = rendered(whole_case, replace(recipe, orientation=Orientation(flips=(True, False, False))), whole=True)
    assert np.array_equal(mirrored.followup, plain.followup[::-1])
    turned = rendered(whole_case, replace(recipe, orientation=Orientation((1, 0, 2))), whole=True)
    assert turned.followup.shape == whole_case.shape
    assert np.array_equal(turned.affine, whole_case.affine)


def test_rendering_changes_nothing_and_repeats(whole_case):
    recipe = draw_recipe(whole_case, BUSY, rng_of(9, whole_case.id, 0))
    text = recipe.to_json()
    before = {n: getattr(whole_case, n).copy() for n in ("flair", "healthy", "lesions", "tissue", "affine")}
    first = rendered(whole_case, recipe)
    again = rendered(replace(whole_case), Recipe.from_json(text))
    for name in (*IMAGES, *MASKS, "affine"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert recipe.to_json() == text
    assert first.recipe is recipe
    for name, array in before.items():
        assert np.array_equal(getattr(whole_case, name), array)


def test_what_cannot_be_rendered(small_case):
    recipe = with_events(small_case, [(1, 1)] * 3)
    with pytest.raises(InputError, match="recipe is for case 'small'"):
        rendered(replace(small_case, id="other"), recipe)
    with pytest.raises(InputError, match="healthy"):
        rendered(replace(small_case, healthy=None), recipe)
    with pytest.raises(InputError, match="3 lesions, the recipe speaks of 2"):
        rendered(small_case, replace(recipe, events=recipe.events[:2]))


STEPS = (
    ["SliceThickness", {"size": 3, "axis": "axial"}],
    ["GaussianNoise", {"std": 0.05, "seed": 7}],
)
FOLLOWUP_STEPS = (["AnisotropicDownsampling", {"factor": 2.0, "axis": 0, "prefilter": False}],)


def test_the_baseline_alone_lies_off(pairs, whole_case):
    recipe, box, whole = pairs[0]
    off = replace(recipe, offset_mm=(0.3, -0.5, 0.2))
    after = rendered(whole_case, off, whole=True)
    assert np.array_equal(after.baseline, shifted(whole.baseline, off.offset_mm))
    assert not np.array_equal(after.baseline, whole.baseline)
    assert all(np.array_equal(getattr(after, k), getattr(whole, k)) for k in ("followup", *MASKS))
    assert all(np.array_equal(getattr(rendered(whole_case, off), k), getattr(box, k)) for k in ("followup", *MASKS))


def acquired(image, steps, affine):
    return acquire(torch.from_numpy(image), steps=steps, affine=affine, zero_background=True).numpy()


def test_each_visit_gets_its_own_artifacts_last(small_case):
    clean = replace(with_events(small_case, [(0, 1), (1, 0), (1, 1)]), orientation=Orientation((2, 0, 1)))
    recipe = replace(clean, artifacts=Artifacts(STEPS, FOLLOWUP_STEPS))
    plain, pair = rendered(small_case, clean), rendered(small_case, recipe)
    assert np.array_equal(pair.affine, plain.affine)
    assert np.array_equal(pair.baseline, acquired(plain.baseline, STEPS, pair.affine))
    assert np.array_equal(pair.followup, acquired(plain.followup, FOLLOWUP_STEPS, pair.affine))
    assert not np.array_equal(pair.baseline, plain.baseline)
    assert not pair.baseline[plain.baseline == 0].any(), "the background stays 0"
    for name in MASKS:
        assert np.array_equal(getattr(pair, name), getattr(plain, name))
    up = np.argmax(np.abs(pair.affine[2, :3]))
    assert up == 0, "the scan's axial direction, turned"
    slices = ndimage.uniform_filter1d(plain.baseline, 3, axis=up, mode="reflect")
    slices[plain.baseline == 0] = 0
    only = rendered(small_case, replace(clean, artifacts=Artifacts(STEPS[:1])))
    assert np.allclose(only.baseline, slices, atol=1e-6)
    assert np.array_equal(only.followup, plain.followup)


@pytest.mark.parametrize("orientation", [Orientation(), Orientation((2, 0, 1), (True, False, True))])
def test_what_moves_into_a_box_is_the_head_around_it(pairs, whole_case, orientation):
    """Not the nothing around an array, which would leave a dark rim on each face."""
    still = pairs[0][0]
    i, j, k = (n // 2 for n in whole_case.shape)
    box = Box((i - 24, j - 24, k - 24), 48, "uniform")
    motion = {"degrees": [[4.0, -3.0, 2.0]], "translation_mm": [[2.0, 3.0, -3.0]], "times": [0.6], "axis": 1}
    moved = Artifacts(followup=(("KSpaceMotion", motion),))
    recipe = replace(still, box=box, offset_mm=(0.0, 0.0, 0.0), orientation=orientation)
    plain, pair = (rendered(whole_case, replace(recipe, artifacts=a)) for a in (Artifacts(), moved))
    assert np.array_equal(pair.baseline, plain.baseline)
    assert np.array_equal(pair.evolution, plain.evolution)
    change = np.where(plain.followup > 0.65, pair.followup - plain.followup, 0)
    assert change.any()
    faces = np.ones(change.shape, bool)
    faces[2:-2, 2:-2, 2:-2] = False
    inner = np.abs(change[~faces]).mean()
    assert np.abs(change[faces]).mean() < 1.6 * inner
    alone = acquire(torch.from_numpy(plain.followup), steps=moved.followup).numpy() - plain.followup
    assert np.abs(np.where(plain.followup > 0.65, alone, 0)[faces]).mean() > 1.8 * inner


def test_motion_is_the_same_at_either_visit(small_case):
    motion = {"degrees": [[4.0, -3.0, 2.0]], "translation_mm": [[2.0, 3.0, -3.0]], "times": [0.6], "axis": 1}
    steps = (("KSpaceMotion", motion),)
    recipe = replace(with_events(small_case, [(1, 1)] * 3), box=Box((8, 9, 7), 24, "uniform"))
    first = rendered(small_case, replace(recipe, artifacts=Artifacts(baseline=steps)))
    last = rendered(small_case, replace(recipe, artifacts=Artifacts(followup=steps)))
    assert np.array_equal(first.baseline, last.followup)
    assert np.array_equal(first.followup, last.baseline)
    assert not np.array_equal(first.baseline, last.baseline)


def test_artifacts_on_a_whole_grid_that_cannot_turn(small_case):
    """They follow the axes of the turned box all the same."""
    arrays = {name: getattr(small_case, name)[:, :, 1:] for name in ("flair", "lesions", "brain", "tissue", "healthy")}
    case = replace(small_case, **arrays)
    turn = Orientation((2, 0, 1), (True, False, True))
    clean = replace(with_events(case, [(0, 1), (1, 0), (1, 1)]), orientation=turn)
    plain = rendered(case, clean, whole=True)
    pair = rendered(case, replace(clean, artifacts=Artifacts(FOLLOWUP_STEPS)), whole=True)
    turned = acquired(turn.apply(plain.baseline), FOLLOWUP_STEPS, turn.apply_affine(case.affine, case.shape))
    assert pair.baseline.shape == case.shape
    assert np.array_equal(pair.baseline, turn.inverse.apply(turned))
    assert np.array_equal(turn.inverse.apply(turn.apply(case.flair)), case.flair)


def test_artifacts_before_editing(small_case):
    """The original order of Kamraoui et al.: each visit is edited on a scan that has its artifacts already."""
    case = replace(small_case, flair=small_case.flair.copy())
    for array in (case.flair, case.healthy):
        array.flags.writeable = False  # as mapped from disk
    events = with_events(case, [(0, 1), (1, 0), (1, 1)])
    recipe = replace(events, artifacts=Artifacts(STEPS, (), before_editing=True))
    pair = rendered(case, recipe)
    flair, healthy = (acquired(x.copy(), STEPS, case.affine) for x in (case.flair, case.healthy))
    lesions = lesions_of(case, 3000.0)
    first = lesions.labels == 1
    far = ndimage.distance_transform_edt(~first) > REACH
    assert np.array_equal(pair.baseline[far], flair[far])
    assert np.array_equal(pair.baseline[first], healthy[first])
    assert np.array_equal(pair.followup[lesions.labels != 2], rendered(case, events).followup[lesions.labels != 2])


def test_a_painter_sees_the_artifacts_of_its_visit_where_they_come_first(pairs, whole_case):
    recipe = next(r for r, *_ in pairs if any(e.kind == "stable" and e.source == "synthetic" for e in r.events))
    steps = (["GaussianNoise", {"std": 0.05, "seed": 7}],)
    pair = rendered(whole_case, replace(recipe, artifacts=Artifacts(steps, (), before_editing=True)), whole=True)
    plain = rendered(whole_case, recipe, whole=True)
    brain = whole_case.brain > 0
    assert np.array_equal(pair.followup, plain.followup)
    difference = (pair.baseline - plain.baseline)[brain & (pair.evolution == 0)]
    assert abs(difference.std() - 0.05) < 0.005
