import itertools
import json
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthlong.bank import read_bank
from synthlong.derived import lesions_of, profiles_of
from synthlong.errors import ConfigError
from synthlong.event import LesionEvent
from synthlong.lesions import core
from synthlong.orientation import Orientation
from synthlong.placement import Site, allowed_of, site_mask
from synthlong.profile import Profile
from synthlong.recipe import Artifacts, Box, Recipe, affine_of, draw_recipe, rng_of
from synthlong.synthesis import SynthesisConfig

DEFAULT = SynthesisConfig()


def draw(case, k=0, seed=0, **changes):
    return draw_recipe(case, replace(DEFAULT, **changes), rng_of(seed, case.id, k))


@pytest.fixture(scope="module")
def recipes(real_case):
    return [draw(real_case, k) for k in range(400)]


share = st.sampled_from([0.0, 0.3, 0.512, 1.0])
voxels = st.tuples(st.integers(0, 3000), st.integers(0, 3000))
whole = st.integers(-60, 220)
events = st.one_of(
    st.builds(
        LesionEvent,
        source=st.just("real"),
        at_baseline=share,
        at_followup=share,
        voxels=voxels,
        lesion=st.integers(1, 400),
    ),
    st.builds(
        LesionEvent,
        source=st.just("synthetic"),
        at_baseline=share,
        at_followup=share,
        voxels=voxels,
        site=st.builds(Site, st.integers(0, 9000), st.booleans(), st.tuples(whole, whole, whole)),
        seed=st.integers(0, 2**31 - 1),
        profile=st.builds(Profile, *[st.tuples(*[st.floats(-1, 2)] * 5)] * 2),
    ),
)
orientations = st.builds(
    Orientation,
    st.permutations((0, 1, 2)).map(tuple),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
number = st.floats(-1e6, 1e6)
steps = st.lists(
    st.sampled_from([["GaussianBlur", {"std": 1.25}], ["KSpaceGhosting", {"ghosts": 4, "restore": None}]]), max_size=2
).map(tuple)


@given(
    st.builds(
        Recipe,
        case_id=st.text(min_size=1, max_size=12),
        box=st.builds(Box, st.tuples(whole, whole, whole), st.integers(16, 160), st.sampled_from(["uniform", "event"])),
        events=st.lists(events, max_size=5).map(tuple),
        orientation=orientations,
        scaling=st.tuples(st.tuples(number, number), st.tuples(number, number)),
        origin_mm=st.tuples(number, number, number),
        max_event_mm3=st.floats(10, 1e5),
        margin=st.integers(5, 20),
        artifacts=st.builds(Artifacts, steps, steps, st.booleans()),
        offset_mm=st.tuples(*[st.floats(-0.9, 0.9)] * 3),
        flow=st.tuples(*[st.tuples(st.integers(0, 2**31 - 1), st.floats(0, 0.8))] * 2),
        tones=st.tuples(*[st.tuples(st.floats(0.6, 1.7), st.floats(0.6, 1.7))] * 2),
    )
)
def test_json_round_trip(recipe):
    text = recipe.to_json()
    assert text.isascii()
    assert Recipe.from_json(text) == recipe
    assert Recipe.from_json(text).to_json() == text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_drawn_recipes_round_trip(recipes):
    for recipe in recipes[:50]:
        assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_from_before_offsets_flow_and_tones_has_none(recipes):
    older = json.loads(recipes[0].to_json()) | {"version": 2}
    del older["tones"]
    assert Recipe.from_json(json.dumps(older)) == replace(recipes[0], version=2)
    del older["offset_mm"], older["flow"]
    assert Recipe.from_json(json.dumps(older | {"version": 1})) == replace(recipes[0], version=1)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"version":1}', '{"version":"1"}', "\x00"])
@pytest.mark.parametrize("read", [Recipe.from_json, affine_of])
def test_what_is_no_recipe_is_refused(text, read):
    with pytest.raises(ConfigError, match="not a recipe"):
        read(text)


def test_a_newer_recipe_is_refused(recipes):
    newer = {**json.loads(recipes[0].to_json()), "version": 99}
    with pytest.raises(ConfigError, match="update synthlong"):
        Recipe.from_json(json.dumps(newer))


def test_one_recipe_for_a_seed_case_and_number(small_case):
    first = draw(small_case, 3)
    fresh = replace(small_case)
    assert draw(fresh, 3) == first
    assert len({draw(small_case, k).to_json() for k in range(10)}) == 10
    assert draw(small_case, 3, seed=1) != first
    assert rng_of(0, "a", 1).random() != rng_of(0, "b", 1).random() != rng_of(1, "b", 0).random()


@pytest.mark.parametrize(
    ("at", "kind"),
    [
        ((0, 0), "removed"),
        ((1, 1), "stable"),
        ((0, 1), "new"),
        ((1, 0), "vanished"),
        ((0.3, 1), "enlarging"),
        ((1, 0.3), "shrinking"),
        ((0.4, 0.4), "stable"),
    ],
)
def test_kinds(at, kind):
    assert LesionEvent("real", *at).kind == kind


def test_shares_are_those_of_the_config(recipes):
    n = len(recipes)
    new = [sum(e.kind == "new" for e in r.events) for r in recipes]
    assert np.mean([c > 0 for c in new]) == pytest.approx(0.6, abs=4 * np.sqrt(0.24 / n))
    assert np.mean([c for c in new if c]) == pytest.approx(3.0, abs=0.7)
    assert max(new) <= DEFAULT.new_max
    assert np.mean([r.box.placed == "event" for r in recipes]) == pytest.approx(0.75, abs=0.09)
    kinds = Counter(e.kind for r in recipes for e in r.events)
    assert kinds["vanished"] / n == pytest.approx(0.4, abs=0.15)
    assert kinds["enlarging"] / n == pytest.approx(0.5, abs=0.15)
    assert kinds["shrinking"] / n == pytest.approx(0.3, abs=0.15)
    changed = [e for r in recipes for e in r.events if e.kind in ("new", "vanished")]
    assert np.mean([e.source == "real" for e in changed]) == pytest.approx(0.4, abs=0.08)
    stable = [e for r in recipes for e in r.events if e.source == "synthetic" and e.kind == "stable"]
    assert len(stable) / n == pytest.approx(1.0, abs=0.25)


def test_every_real_lesion_has_an_event(recipes, real_case):
    lesions = lesions_of(real_case, DEFAULT.max_event_mm3)
    for recipe in recipes:
        real = [e for e in recipe.events if e.source == "real"]
        assert [e.lesion for e in real] == list(range(1, len(lesions) + 1))
        for event in real:
            if event.kind not in ("stable", "removed"):
                assert lesions.mutable[event.lesion - 1]


def test_no_small_lesion_is_new_or_vanishes(recipes):
    for event in (e for r in recipes for e in r.events if e.kind in ("new", "vanished")):
        assert sorted(event.voxels)[0] == 0
        assert sorted(event.voxels)[1] > 3


def test_voxels_are_counted(recipes, real_case):
    bank, allowed = read_bank(), allowed_of(real_case, DEFAULT.margin)
    lesions = lesions_of(real_case, DEFAULT.max_event_mm3)
    for event in (e for r in recipes[:40] for e in r.events):
        if event.site:
            own, _ = site_mask(event.site, bank, allowed)
        else:
            own = lesions.labels[lesions.boxes[event.lesion - 1]] == event.lesion
        if event.kind in ("enlarging", "shrinking") or event.site:
            assert event.voxels == tuple(int(core(own, at).sum()) for at in (event.at_baseline, event.at_followup))
            assert (event.voxels[0] > 0) == (event.at_baseline > 0)
            assert (event.voxels[1] > 0) == (event.at_followup > 0)


def check_distances(case, recipe):
    bank, allowed = read_bank(), allowed_of(case, DEFAULT.margin)
    placed = [
        np.argwhere(m) + [b.start for b in box]
        for m, box in (site_mask(e.site, bank, allowed) for e in recipe.events if e.site)
    ]
    for a, b in itertools.combinations(placed, 2):
        assert np.linalg.norm(a[:, None] - b[None], axis=2).min() > DEFAULT.margin


def test_synthetic_lesions_keep_their_distance(real_case, small_case):
    for k in range(20):
        check_distances(real_case, draw(real_case, k, stable_mean=8.0))
    for k in range(3):  # crowded
        recipe = draw(small_case, k, stable_mean=30.0, volume_median_mm3=4.0, volume_log_sd=0.0)
        assert sum(e.site is not None for e in recipe.events) > 20
        check_distances(small_case, recipe)


def test_no_new_lesions_at_all(real_case):
    for k in range(100):
        assert all(e.kind != "new" for e in draw(real_case, k, with_new_lesions=0).events)
    always = [draw(real_case, k, with_new_lesions=1) for k in range(30)]
    assert all(any(e.kind == "new" for e in r.events) for r in always)


def test_there_are_no_more_new_lesions_and_no_larger_ones_than_allowed(small_case):
    always = {"with_new_lesions": 1, "real_share": 0}
    many = [draw(small_case, k, new_mean=50, new_max=2, **always) for k in range(5)]
    assert {sum(e.kind == "new" for e in r.events) for r in many} == {2}
    small = [draw(small_case, k, new_mean=5, volume_log_sd=3, max_event_mm3=50, **always) for k in range(5)]
    shapes = [e.site.shape for r in small for e in r.events if e.site]
    assert read_bank().volumes_mm3[shapes].max() < 100  # of about the wanted volume


def test_a_case_of_few_lesions_gets_visible_ones_that_vary_as_those_of_the_bank(small_case):
    recipes = [draw(small_case, k, stable_mean=30, volume_median_mm3=4) for k in range(3)]
    levels = np.array([e.profile.levels for r in recipes for e in r.events if e.profile])
    own = profiles_of(small_case, DEFAULT.max_event_mm3)[:, 3]  # at half a voxel's depth
    assert levels[:, 2].min() < 0.5 * own.min()
    assert levels[:, 2:].mean(axis=1).min() > 0.07  # 0.1, or a little fainter


def test_boxes_around_events_hold_a_voxel_of_one(recipes, real_case):
    bank, allowed = read_bank(), allowed_of(real_case, DEFAULT.margin)
    lesions = lesions_of(real_case, DEFAULT.max_event_mm3)

    def inside(event, box):
        if event.site:
            mask, at = site_mask(event.site, bank, allowed)
        else:
            at = lesions.boxes[event.lesion - 1]
            mask = lesions.labels[at] == event.lesion
        where = np.argwhere(mask) + [b.start for b in at] - box.start
        return ((where >= 0) & (where < box.size)).all(axis=1).any()

    for recipe in recipes[:150]:
        if recipe.box.placed == "event":
            kinds = {e.kind for e in recipe.events}
            best = [e for e in recipe.events if e.kind == "new"]
            if not best and kinds - {"stable", "removed"}:
                best = [e for e in recipe.events if e.kind not in ("stable", "removed")]
            assert any(inside(e, recipe.box) for e in best or recipe.events)


def test_around_events_is_honoured(real_case):
    assert all(draw(real_case, k, around_events=1).box.placed == "event" for k in range(20))
    assert all(draw(real_case, k, around_events=0).box.placed == "uniform" for k in range(20))
    no_change = {"with_new_lesions": 0, "vanished_mean": 0, "enlarging_mean": 0, "shrinking_mean": 0}
    assert all(draw(real_case, k, around_events=1, **no_change).box.placed == "event" for k in range(5))


def test_boxes_lie_in_the_grid_where_it_is_large_enough(recipes, real_case, small_case):
    for recipe in recipes:
        assert all(0 <= s <= n - 64 for s, n in zip(recipe.box.start, real_case.shape, strict=True))
        assert recipe.box.size == 64
    for k in range(10):
        assert draw(small_case, k).box.start == (-12, -12, -12)
        assert all(0 <= s <= 40 - 24 for s in draw(small_case, k, box=24).box.start)


def test_orientations(recipes, real_case):
    turns = {r.orientation for r in recipes}
    assert len(turns) == 48
    assert all(sorted(t.axes) == [0, 1, 2] for t in turns)
    for k in range(10):
        assert draw(real_case, k, orientations="none").orientation == Orientation()
        mirrored = draw(real_case, k, orientations="mirror").orientation
        assert mirrored.axes == (0, 1, 2)
        assert mirrored.flips[1:] == (False, False)


@given(orientations)
def test_an_orientation_turns_the_affine_with_the_voxels(turn):
    rng = np.random.default_rng(0)
    array = rng.random((3, 4, 5))
    affine = np.array([[1.0, 0, 0, -91], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])
    turned = turn.apply(array)
    after = turn.apply_affine(affine, array.shape)
    assert turned.flags.c_contiguous
    for index in np.ndindex(*turned.shape):
        world = after @ (*index, 1)
        source = np.rint(np.linalg.solve(affine, world))[:3].astype(int)
        assert array[tuple(source)] == turned[index]
    assert abs(np.linalg.det(after[:3, :3])) == pytest.approx(1)


def test_the_recipes_affine_is_the_boxs(recipes, real_case):
    recipe = recipes[0]
    start = np.argwhere(recipe.orientation.apply(marked(recipe.box.size)))[0]
    assert np.allclose(recipe.affine @ (*start, 1), real_case.affine @ (*(np.array(recipe.box.start) + 7), 1))


def test_the_affine_is_read_without_the_events(recipes):
    for recipe in recipes[:50]:
        plain = json.loads(recipe.to_json())
        assert np.array_equal(affine_of(json.dumps(plain | {"events": None})), recipe.affine)


def marked(size):
    box = np.zeros((size,) * 3, np.uint8)
    box[7, 7, 7] = 1
    return box


BAD = {
    "box": [15, 161, 64.0, True, "64", None, float("nan")],
    "with_new_lesions": [-0.01, 1.01, float("nan"), float("inf"), True, "0.5", None],
    "around_events": [-1, 2, float("nan"), False],
    "new_mean": [0.9, 101, float("nan"), True],
    "new_max": [0, 201, 1.5, True],
    "real_share": [-0.1, 1.1, "all"],
    "vanished_mean": [-1, 101, float("nan")],
    "enlarging_mean": [-1, 101, [1]],
    "shrinking_mean": [-1, 101, {}],
    "stable_mean": [-1, 101, 10**400],
    "removed_share": [-0.1, 1.1, True],
    "core_share": [
        (0.01, 0.5),
        (0.7, 0.3),
        (0.3,),
        (0.3, 0.4, 0.5),
        0.5,
        "ab",
        ("a", "b"),
        (True, 0.5),
        (float("nan"), 0.5),
        None,
    ],
    "contrast": [(0.04, 1), (1, 3.1), (1, 0.5), (1,), 1.0],
    "flow_share": [-0.1, 1.1, True],
    "protocol_spread": [-0.1, 0.6, True],
    "registration_sd_mm": [-0.1, 0.41, float("nan"), True],
    "volume_median_mm3": [3.9, 3001, float("nan")],
    "volume_log_sd": [-0.1, 3.1],
    "max_event_mm3": [9, 1e6, float("inf"), True],
    "gray_matter": [-0.1, 1.1],
    "margin": [4, 21, 5.5, True],
    "orientations": ["some", 1, None, ["all"]],
    "prior": [1, True, ["a"]],
    "lesion_bank": [1],
    "inpainter": [0.5],
    "generator": [{}],
    "artifacts": ["heavy", True],
    "painter": ["none", 3],
    "precision": ["fp16", 16],
    "device": [0, None],
    "compression": ["zip", False],
}


def test_each_option_is_checked():
    assert BAD.keys() == {f.name for f in fields(SynthesisConfig)}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        SynthesisConfig(**{name: value})
    with pytest.raises(ConfigError, match=name):
        SynthesisConfig.from_dict({name: value})


def test_equal_configs_have_equal_json():
    one = SynthesisConfig(max_event_mm3=2000, core_share=[0.3, 0.5], new_mean=2)
    other = SynthesisConfig(max_event_mm3=2000.0, core_share=(0.3, 0.5), new_mean=2.0)
    assert json.dumps(one.as_dict()) == json.dumps(other.as_dict())
    assert SynthesisConfig.from_dict(one.as_dict()) == one
    assert SynthesisConfig.from_dict(json.loads(json.dumps(DEFAULT.as_dict()))) == DEFAULT


def test_toml_round_trip(tmp_path):
    config = SynthesisConfig(box=96, with_new_lesions=0.4, core_share=(0.2, 0.6), orientations="mirror")
    path = tmp_path / "config.toml"
    lines = [f"{k} = {json.dumps(v)}" for k, v in config.as_dict().items() if v is not None]
    path.write_text("\n".join(lines))
    assert SynthesisConfig.from_toml(path) == config


def test_paths_in_toml_are_relative_to_it(tmp_path):
    (tmp_path / "c.toml").write_text('prior = "maps/prior.nii.gz"\n')
    assert SynthesisConfig.from_toml(tmp_path / "c.toml").prior == str(tmp_path / "maps" / "prior.nii.gz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("with_new_lesion = 0.5", "did you mean with_new_lesions"),
        ("bx = 32", "did you mean box"),
        ("zzzzzz = 1", "known: box"),
        ("[synthesis]\nbox = 64", "unknown option 'synthesis'"),
        ("box = ", "not a readable TOML"),
        ("box = 64\nbox = 64", "not a readable TOML"),
        ("box = 64.0", "box = 64.0"),
        ("new_mean = nan", "new_mean"),
        ("around_events = true", "around_events"),
        ("core_share = [0.3, 'x']", "core_share"),
    ],
)
def test_bad_toml_names_the_file_and_the_option(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.toml") as caught:
        SynthesisConfig.from_toml(path)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="not a readable"):
        SynthesisConfig.from_toml(tmp_path / "none.toml")


def test_artifacts_of_each_visit(recipes, small_case):
    """The preset "mild" by default: 30 % untouched, else one or two; each visit its own."""
    drawn = [(r.artifacts.baseline, r.artifacts.followup) for r in recipes]
    counts = Counter(len(steps) for both in drawn for steps in both)
    assert counts.keys() == {0, 1, 2}
    assert counts[0] / len(recipes) / 2 == pytest.approx(0.3, abs=0.07)
    assert sum(first == last for first, last in drawn if first or last) <= 4  # slices of 2 mm at both, say
    assert not any(r.artifacts.before_editing for r in recipes)
    none = [draw(small_case, k, artifacts="none") for k in range(20)]
    assert all(r.artifacts == Artifacts() for r in none)
    heavy = [draw(small_case, k, artifacts="kamraoui").artifacts for k in range(20)]
    assert {len(a.baseline) for a in heavy} == {1, 2, 3}
    clinical = [draw(small_case, k, artifacts="clinical") for k in range(20)]
    assert any("AnisotropicDownsampling" in dict(r.artifacts.followup) for r in clinical)
    assert all(Recipe.from_json(r.to_json()) == r for r in clinical)
    first = draw(small_case, artifacts="before_editing").artifacts
    assert first == replace(heavy[0], before_editing=True)


def test_artifacts_leave_the_rest_of_a_recipe_alone(small_case):
    plain = draw(small_case, 3, artifacts="none")
    assert replace(draw(small_case, 3), artifacts=Artifacts()) == plain


def test_synthetic_lesions_may_be_fainter(small_case):
    def levels(**options):
        events = draw(small_case, 3, with_new_lesions=1, new_mean=8, real_share=0, **options).events
        return np.array([e.profile.row for e in events if e.profile])

    whole = levels()
    assert len(whole)
    assert np.allclose(levels(contrast=(0.5, 0.5)), 0.5 * whole, atol=1e-4)
    rows = np.concatenate([levels(contrast=(0.2, 0.8), stable_mean=mean) for mean in range(10)])
    typical = np.concatenate([levels(stable_mean=mean) for mean in range(10)])
    assert np.median(rows[:, 3]) == pytest.approx(0.5 * np.median(typical[:, 3]), rel=0.3)


def test_the_baseline_may_lie_a_little_off(small_case):
    assert draw(small_case, 3).offset_mm == (0, 0, 0)
    off = [draw(small_case, k, artifacts="none", registration_sd_mm=0.3) for k in range(60)]
    offsets = np.array([r.offset_mm for r in off])
    assert offsets.std() == pytest.approx(0.3, rel=0.2)
    assert np.abs(offsets).max() <= 0.9
    assert replace(off[3], offset_mm=(0.0, 0.0, 0.0)) == draw(small_case, 3, artifacts="none")


def test_each_visit_may_have_bright_fluid(small_case):
    assert draw(small_case, 3).flow == ((0, 0), (0, 0))
    flowing = [draw(small_case, k, artifacts="none", flow_share=0.5) for k in range(60)]
    brightness = np.array([[brighter for _, brighter in r.flow] for r in flowing])
    assert ((brightness == 0) | ((brightness >= 0.1) & (brightness <= 0.8))).all()
    assert (brightness > 0).mean() == pytest.approx(0.5, abs=0.15)
    assert len({r.flow[0][0] for r in flowing} | {r.flow[1][0] for r in flowing}) > 40
    assert replace(flowing[3], flow=((0, 0.0), (0, 0.0))) == draw(small_case, 3, artifacts="none")
