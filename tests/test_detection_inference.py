import copy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from synthlong.detection import ConcatUNet, SiameseUNet, detect, inference, sliding
from synthlong.detection.sliding import probability_map
from synthlong.errors import ConfigError, InputError
from synthlong.networks import UNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (34, 29, 40)
WINDOW, STRIDE = 16, 12
KINDS = (ConcatUNet, SiameseUNet)


@pytest.fixture(scope="module")
def visits():
    """Two visits with a ball of brain that touches one side of the grid, and bright spots in the second."""
    rng = np.random.default_rng(3)
    grid = np.indices(SHAPE)
    brain = np.linalg.norm(grid - np.reshape((20, 14, 12), (3, 1, 1, 1)), axis=0) < 13
    new = np.zeros(SHAPE, bool)
    for centre in ((20, 14, 6), (14, 14, 16), (26, 10, 14), (20, 20, 18), (12, 10, 8)):
        new |= np.linalg.norm(grid - np.reshape(centre, (3, 1, 1, 1)), axis=0) < 2.5
    new &= brain
    before, after = (np.where(brain, 1 + rng.normal(0, 0.05, SHAPE), 0).astype(np.float32) for _ in range(2))
    after[new] += 0.5
    for array in (before, after, brain, new):
        array.flags.writeable = False
    return before, after, brain, new


def trained(kind, visits):
    """A network that has begun to tell new spots: random ones hardly ever exceed 0.5 anywhere."""
    torch.manual_seed(0)
    network = kind(UNetConfig(in_channels=kind.channels, widths=(8, 16)))
    before, after, _, new = visits
    box = tuple(slice(n, n + 16) for n in (10, 8, 4))
    crops = (v[box].astype(np.float32) for v in (before, after, new))
    a, b, truth = (torch.from_numpy(np.stack([v, v[::-1]]))[:, None] for v in crops)  # two: one alone is slower
    adam = torch.optim.Adam(network.parameters(), lr=2e-2)
    for _ in range(20):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(a, b), truth, pos_weight=torch.tensor(9.0))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return network.eval()


@pytest.fixture(scope="module")
def networks(visits):
    return {kind: trained(kind, visits) for kind in KINDS}


def slide(networks, visits, **options):
    before, after, brain, _ = visits
    sizes = {"window": WINDOW, "stride": STRIDE, "precision": "float32"}
    return probability_map(networks, before, after, brain, **(sizes | options))


def slow(network, visits, window=WINDOW, stride=STRIDE):
    """Every window in turn, twice in its batch, wherever it lies."""
    total, count = np.zeros((2, *SHAPE))
    starts = [sorted({min(s, n - window) for s in range(0, n, stride)}) for n in SHAPE]
    for i, j, k in product(*starts):
        at = np.s_[i : i + window, j : j + window, k : k + window]
        a, b = (torch.from_numpy(np.stack([v[at]] * 2))[:, None] for v in visits[:2])
        with torch.no_grad():
            total[at] += torch.sigmoid(network(a, b))[0, 0].numpy()
        count[at] += 1
    return np.where(visits[2], total / count, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_slow_loop_gives(kind, networks, visits):
    found = slide([networks[kind]], visits)
    assert found.dtype == np.float32
    assert 20 < (found > 0.5).sum() < visits[2].sum() / 2
    np.testing.assert_allclose(found, slow(networks[kind], visits), atol=1e-5)
    assert not found[~visits[2]].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [16, 32])  # the second is wider than the grid
def test_it_is_what_monai_gives(kind, window, networks, visits):
    inferers = pytest.importorskip("monai.inferers")
    before, after, brain, _ = visits
    both = torch.from_numpy(np.stack([before, after]))[None]
    with torch.no_grad():
        logits = inferers.sliding_window_inference(
            both, window, 4, lambda x: networks[kind](*x.split(1, dim=1)).sigmoid(), overlap=0.25
        )
    theirs = np.where(brain, logits[0, 0].numpy(), 0)
    ours = slide([networks[kind]], visits, window=window, stride=window * 3 // 4)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.array_equal(ours > 0.5, theirs > 0.5)


def test_a_grid_narrower_than_a_window_is_padded_with_its_darkest_value(networks, visits):
    before, after, brain, _ = visits
    before, after = before - 1, after - 2  # as z-scores, whose background is below 0
    pads = [(max(32 - n, 0) // 2, max(32 - n, 0) - max(32 - n, 0) // 2) for n in SHAPE]
    wide = [np.pad(v, pads, constant_values=v.min()) for v in (before, after, brain)]
    own, padded = (
        slide([networks[KINDS[0]]], (*v, None), window=32, stride=24) for v in ((before, after, brain), wide)
    )
    inner = tuple(slice(a, a + n) for (a, _), n in zip(pads, SHAPE, strict=True))
    assert padded.shape > own.shape
    assert np.array_equal(own, padded[inner])


@pytest.mark.parametrize("kind", KINDS)
def test_mirrored_is_the_mean_with_what_the_mirror_image_gives(kind, networks, visits):
    wide = WINDOW + STRIDE  # windows then lie alike in the mirror image
    cut = [np.ascontiguousarray(v[:wide]) for v in visits]
    flipped = [np.ascontiguousarray(v[::-1]) for v in cut]
    plain, other = slide([networks[kind]], cut), slide([networks[kind]], flipped)[::-1]
    assert np.abs(plain - other).max() > 1e-3
    np.testing.assert_allclose(slide([networks[kind]], cut, mirrored=True), (plain + other) / 2, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_as_wide_as_the_weights_say(kind, networks, visits, monkeypatch):
    alike = networks[kind], copy.deepcopy(networks[kind])
    monkeypatch.setattr(alike[1], "window", 20)
    monkeypatch.setattr(alike[0], "window", 12)
    for network, window in zip(alike, (12, 20), strict=True):
        found = slide([network], visits, window=None, stride=None)
        assert np.array_equal(found, slide([network], visits, window=window, stride=window * 3 // 4))
    with pytest.raises(ConfigError, match="window: the weights are for windows of 12 and 20 voxels; choose one"):
        slide(alike, visits, window=None, stride=None)
    assert slide(alike, visits, window=16).any()


def windows_of(network, visits):
    """Return how many different windows a network saw."""
    seen = set()
    hook = network.down.register_forward_hook(lambda _, inputs, __: seen.update(x.numpy().tobytes() for x in inputs[0]))
    slide([network], visits)
    hook.remove()
    return len(seen)


def test_windows_without_brain_are_left_out(networks, visits):
    before, after, brain, _ = visits
    few = brain & (np.indices(SHAPE)[0] < 12)
    starts = [(0, 12, 18), (0, 12, 13), (0, 12, 24)]
    touching = sum(few[i : i + 16, j : j + 16, k : k + 16].any() for i, j, k in product(*starts))
    assert 0 < touching < 18
    assert windows_of(networks[ConcatUNet], (before, after, few, None)) == touching
    assert windows_of(networks[ConcatUNet], (before, after, np.zeros_like(brain), None)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_neither_threads_nor_other_windows_change_a_bit(kind, precision, networks, visits):
    wanted = slide([networks[kind]], visits, precision=precision)
    torch.set_num_threads(2)
    again = slide([networks[kind]], visits, precision=precision)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert np.array_equal(again, wanted)
    before, after, brain, _ = visits
    few = brain & (np.indices(SHAPE)[2] == 5)
    alone = slide([networks[kind]], (before, after, few, None), precision=precision)
    assert np.array_equal(alone[few], wanted[few])


@pytest.mark.parametrize("kind", KINDS)
def test_auto_gives_the_mask_of_float32(kind, networks, visits, monkeypatch):
    exact, fast = (slide([networks[kind]], visits, precision=p) for p in ("float32", "bf16"))
    assert 0 < np.abs(exact - fast).max() < sliding._BF16_ERROR
    monkeypatch.setattr(sliding, "default_precision", lambda device: "bf16")
    for threshold in (0.3, 0.5, 0.8):
        auto = slide([networks[kind]], visits, precision="auto", threshold=threshold)
        assert np.array_equal(auto > threshold, exact > threshold)
        assert np.array_equal(auto, np.where(fast >= threshold - sliding._BF16_ERROR, exact, fast))


@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_float32_where_bf16_is_no_help(kind, networks, visits, monkeypatch):
    exact = slide([networks[kind]], visits, precision="float32")
    monkeypatch.setattr(sliding, "default_precision", lambda device: "float32")
    assert np.array_equal(slide([networks[kind]], visits, precision="auto"), exact)
    monkeypatch.setattr(sliding, "default_precision", lambda device: "bf16")
    monkeypatch.setattr(sliding, "_BF16_ERROR", 1e-4)  # less than what it is
    assert np.array_equal(slide([networks[kind]], visits, precision="auto"), exact)
    unlikely = slide([networks[kind]], visits, precision="auto", threshold=0.99)
    assert np.array_equal(unlikely, exact)


def test_an_ensemble_is_averaged(networks, visits):
    torch.manual_seed(1)
    several = [networks[ConcatUNet], *(ConcatUNet(UNetConfig(in_channels=2, widths=(8,))) for _ in range(2))]
    alone = [slide([network], visits) for network in several]
    assert not np.array_equal(alone[0], alone[1])
    np.testing.assert_allclose(slide(several, visits), np.mean(alone, axis=0), atol=1e-6)
    assert np.array_equal(slide(several[:1] * 2, visits), alone[0])


def test_group_norms_of_large_windows_are_exact():
    torch.manual_seed(0)
    norm, x = torch.nn.GroupNorm(8, 8), 3 + torch.randn(2, 8, 40, 40, 40)
    with torch.no_grad():
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        found = sliding._Norm(norm)(x.to(memory_format=torch.channels_last_3d))
        torch.testing.assert_close(found, norm.double()(x.double()).float(), rtol=1e-5, atol=1e-5)


def test_the_networks_stay_as_they_were(networks, visits):
    network = networks[ConcatUNet].train()
    slide([network], visits)
    assert network.training
    assert network.down[1][0].weight.is_contiguous()
    network.eval()


@pytest.mark.parametrize(
    "wrong",
    [{"window": 15}, {"window": 0}, {"window": 1024}, {"stride": 17}, {"precision": "half"}, {"device": "abacus"}],
)
def test_options_out_of_range_are_refused(wrong, networks, visits):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        slide([networks[ConcatUNet]], visits, **wrong)


def test_an_ensemble_is_of_one_kind(networks, visits):
    for wrong in ([], list(networks.values())):
        with pytest.raises(ConfigError, match="one kind"):
            slide(wrong, visits)


def test_lesions_are_listed():
    probability = np.full((20, 20, 20), 0.1, np.float32)
    probability[2:4, 2:4, 2:4] = 0.75  # 8 voxels
    probability[10, 10, 10:16] = (0.6, 0.7, 0.8, 0.9, 0.8, 0.7)
    probability[3, 4, 16:19] = 0.9  # 3 voxels
    probability[11, 11, 16] = 0.9  # touches the row of six at a corner only
    probability[15, 15, 15] = 0.5
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = (-91, -126, -72)
    found = inference._detection(probability, affine, threshold=0.5, min_volume_mm3=3.0)
    first, second = found.lesions
    assert (first.voxels, first.volume_mm3, first.centre_mm) == (8, 8.0, (-88.5, -123.5, -69.5))
    assert (second.voxels, second.volume_mm3, second.centre_mm) == (6, 6.0, (-81.0, -116.0, -59.5))
    assert (second.probability, second.highest_probability) == (0.75, 0.9)
    assert found.mask.dtype == np.uint8
    assert found.mask.sum() == 14
    assert not found.mask[3, 4].any()
    every = inference._detection(probability, affine, threshold=0.5, min_volume_mm3=0)
    assert [lesion.voxels for lesion in every.lesions] == [8, 6, 3, 1]
    coarse = inference._detection(probability, affine @ np.diag([2, 1, 1, 1]), threshold=0.5, min_volume_mm3=3.0)
    assert [lesion.volume_mm3 for lesion in coarse.lesions] == [16.0, 12.0, 6.0]
    none = inference._detection(probability, affine, threshold=0.95, min_volume_mm3=3.0)
    assert none.lesions == ()
    assert not none.mask.any()


@pytest.fixture
def cases(small_case):
    """A baseline without lesions; its follow-up, with them and a little less brain."""
    brain = small_case.brain.copy()
    brain[:5] = 0
    return replace(small_case, flair=small_case.healthy), replace(small_case, brain=brain)


@pytest.mark.parametrize("kind", KINDS)
def test_detect_looks_at_what_is_brain_in_both_visits(kind, cases, networks, monkeypatch):
    monkeypatch.setattr(kind, "window", 16)
    baseline, followup = cases
    found = detect(baseline, followup, [networks[kind]], precision="float32")
    assert found.mask.shape == baseline.shape
    assert found.probability[(baseline.brain & followup.brain) > 0].all()
    assert not found.probability[(baseline.brain & followup.brain) == 0].any()
    box = np.s_[5:37, 4:37, 4:37]
    before, after = (kind.normalised(visit.flair * followup.brain)[box] for visit in cases)
    wanted = probability_map([networks[kind]], before, after, followup.brain[box], mirrored=True, precision="float32")
    assert np.array_equal(found.probability[box], wanted)
    assert found.mask.sum() == sum(lesion.voxels for lesion in found.lesions)
    wide = detect(baseline, followup, [networks[kind]], precision="float32", window=20).probability
    assert not np.array_equal(wide, found.probability)
    options = {"window": 20, "mirrored": True, "precision": "float32"}
    assert np.array_equal(wide[box], probability_map([networks[kind]], before, after, followup.brain[box], **options))
    bright = replace(baseline, flair=np.where(followup.brain, baseline.flair, 9).astype(np.float32))
    again = detect(bright, followup, [networks[kind]], precision="float32")
    assert np.array_equal(again.probability, found.probability)


@pytest.mark.parametrize("kind", KINDS)
def test_background_around_the_brain_changes_nothing(kind, cases, networks):
    def wider(case):
        pads = {name: np.pad(getattr(case, name), 7) for name in ("flair", "lesions", "brain", "tissue", "healthy")}
        affine = case.affine.copy()
        affine[:3, 3] -= 7
        return replace(case, affine=affine, **pads)

    found = detect(*cases, [networks[kind]], threshold=0.3, precision="float32")
    again = detect(*map(wider, cases), [networks[kind]], threshold=0.3, precision="float32")
    assert found.lesions
    assert again.lesions == found.lesions
    assert np.array_equal(again.mask[7:-7, 7:-7, 7:-7], found.mask)


def test_visits_that_cannot_be_compared_are_refused(cases, networks):
    baseline, followup = cases
    moved = replace(followup, affine=followup.affine + 0.01)
    with pytest.raises(InputError, match="its grid is not that of the baseline"):
        detect(baseline, moved, [networks[ConcatUNet]])
    elsewhere = replace(followup, brain=1 - baseline.brain)
    with pytest.raises(InputError, match="does not meet"):
        detect(baseline, elsewhere, [networks[ConcatUNet]])


def test_one_network_needs_no_list(cases, networks):
    options = {"mirrored": False, "precision": "float32"}
    alone, listed = (detect(*cases, given, **options) for given in (networks[ConcatUNet], [networks[ConcatUNet]]))
    assert np.array_equal(alone.probability, listed.probability)


@pytest.mark.parametrize("wrong", [{"threshold": 1.0}, {"threshold": -0.1}, {"min_volume_mm3": -1}])
def test_impossible_limits_are_refused(wrong, cases, networks):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        detect(*cases, [networks[ConcatUNet]], **wrong)
