from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transforms import check_replay, rand, with_threads

from synthlong.artifacts import noise
from synthlong.artifacts.noise import GaussianNoise, RandomGaussianNoise, gaussian_noise

SEEDS = (0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 3 * 2**32, 2**53 - 1, 2**62, 2**63 - 1, 2**63)


def alone(*shape, seed=0):
    """The noise itself, of SD 1."""
    return gaussian_noise(torch.zeros(shape), std=1, seed=seed)


def philox(counter, key):
    """Philox 4x32-10 as published, on whole numbers."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q % 2**32, (p >> 32) ^ d ^ m, p % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


def reference(count, seed):
    """Normal numbers of the first voxels, in float64."""
    words = np.array([philox((n, 0, 0, 0), (seed % 2**32, seed >> 32)) for n in range(-(-count // 1024) * 256)])
    radius = np.sqrt(-2 * np.log((words[:, ::2] + 0.5) / 2**32))
    angle = 2 * np.pi * words[:, 1::2] / 2**32
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # counter, half, pair
    return pairs.reshape(-1, 256, 4).transpose(0, 2, 1).ravel()[:count]


@pytest.mark.parametrize("shape", [(5, 6, 7), (2, 1, 1, 1), (4, 3)])
def test_std_0_changes_nothing(shape):
    x = rand(*shape)
    y = gaussian_noise(x, std=0, seed=3)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_reference_gives_the_published_words(counter, key, words):
    """The known answers of Random123, the authors' library."""
    assert philox(counter, key) == words


@pytest.mark.parametrize("first", [0, 77, 2**32 - 3, 2**40 + 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_words(first, seed):
    words = np.empty((4, 8), np.uint32)
    noise._philox(words, np.uint64(first), np.uint64(seed))
    for n in range(8):
        counter = ((first + n) % 2**32, (first + n) >> 32, 0, 0)
        assert tuple(words[:, n]) == philox(counter, (seed % 2**32, seed >> 32))


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_the_reference(seed):
    """To 5e-5: near the centre float32 has few places for a word close to 2^32."""
    assert np.abs(alone(10, 11, 20, seed=seed).numpy().ravel() - reference(2200, seed)).max() < 5e-5


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    std=st.floats(0, 1e6),
    seed=st.integers(0, 2**63),
)
def test_adds_std_times_the_reference(shape, std, seed):
    """To 5e-5 SD, and the rounding of the sum."""
    x = rand(*shape)
    expected = x.double() + std * torch.from_numpy(reference(x.numel(), seed)).view(x.shape)
    error = (gaussian_noise(x, std=std, seed=seed) - expected).abs()
    assert (error <= 5e-5 * std + 1e-7 * (1 + std)).all()


def test_on_the_real_scan(real_case):
    x = torch.tensor(real_case.flair)
    added = (gaussian_noise(x, std=0.1, seed=5) - x).double()
    assert abs(added.mean()) < 5 * 0.1 / x.numel() ** 0.5
    assert added.std().item() == pytest.approx(0.1, rel=5 / (2 * x.numel()) ** 0.5)
    assert abs(np.corrcoef(added.ravel(), x.ravel())[0, 1]) < 5 / x.numel() ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**53 - 1])
def test_is_normal(seed):
    n = 2**20
    drawn = alone(1, 2**10, 2**10, seed=seed).numpy().ravel().astype(np.float64)
    assert abs(drawn.mean()) < 4 / n**0.5
    assert abs(drawn.std() - 1) < 4 / (2 * n) ** 0.5
    assert abs(stats.skew(drawn)) < 4 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(drawn)) < 4 * (24 / n) ** 0.5
    assert stats.kstest(drawn, "norm").pvalue > 1e-3


def test_tails():
    """As many voxels beyond 4, 4.5 and 5 SD, on either side, as there should be."""
    drawn = alone(128, 256, 512)
    for limit in (4, 4.5, 5):
        expected = drawn.numel() * stats.norm.sf(limit)
        for side in (drawn, -drawn):
            assert abs((side > limit).sum() - expected) < 4.5 * expected**0.5


def test_extreme_words():
    words = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
    one, other = np.empty((2, 4), np.float32)
    noise._box_muller(words, np.zeros(4, np.int32), one, other, np.float32(1))
    assert one == pytest.approx(np.sqrt(-2 * np.log((words + 0.5) / 2**32)), abs=5e-4)
    assert one[0] > 6.6
    assert not other.any()


def test_seeds_give_unrelated_noise():
    """At no shift of one against another; 6.5 SD over 78 pairs of 2^16 shifts."""
    n = 2**16
    spectra = [np.fft.rfft(alone(1, 1, n, seed=seed).numpy().ravel()) for seed in SEEDS]
    for a, b in combinations(spectra, 2):
        assert np.abs(np.fft.irfft(a * b.conj())).max() < 6.5 * n**0.5


def test_squares_are_unrelated_too():
    n = 2**16
    spectra = [np.fft.rfft(alone(1, 1, n, seed=seed).numpy().ravel() ** 2 - 1) for seed in range(8)]
    for a, b in combinations(spectra, 2):
        assert np.abs(np.fft.irfft(a * b.conj())).max() < 7 * 2 * n**0.5


@pytest.mark.parametrize("shape", [(64, 64, 64), (61, 67, 71)])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_voxels_are_unrelated(shape, seed):
    """At every shift along every axis and diagonal."""
    spectrum = np.fft.rfftn(alone(*shape, seed=seed).numpy())
    correlation = np.fft.irfftn(np.abs(spectrum) ** 2, shape, (0, 1, 2)).ravel() / np.prod(shape)
    assert correlation[0] == pytest.approx(1, abs=0.02)
    assert np.abs(correlation[1:]).max() < 6 / np.prod(shape) ** 0.5


def test_volumes_differ():
    a, b = alone(2, 30, 30, 30)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / a.numel() ** 0.5
    assert torch.equal(a, alone(30, 30, 30))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 7, 9, 11), (2, 40, 1, 33)])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_torch_kernel_does_the_same(shape, seed):
    """To 1e-5 SD."""
    x = rand(*shape)
    expected = noise._by_numba(x.numpy(), 0.5, seed)
    assert np.abs(noise._by_torch(x, 0.5, seed).numpy() - expected).max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = rand(2, 9, 8, 7).to(dtype)
    y = gaussian_noise(x, std=0.1, seed=1)
    assert y.dtype == dtype
    assert torch.equal(y, gaussian_noise(x.float(), std=0.1, seed=1).to(dtype))


def test_layout_and_input():
    x = rand(2, 11, 13, 20).permute(0, 3, 2, 1)
    before = x.clone()
    y = gaussian_noise(x, std=0.1, seed=1)
    assert torch.equal(x, before)
    assert torch.equal(y, gaussian_noise(x.contiguous(), std=0.1, seed=1))


def test_threads_do_not_matter():
    x = rand(110, 101, 103)
    results = with_threads(1, 2, compute=lambda: gaussian_noise(x, std=0.1, seed=1))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"std": -0.1}, r"std = -0.1: must be a number in \[0, 1e\+06\]"),
        ({"std": 2e6}, "std = 2000000.0"),
        ({"std": None}, "std = None"),
        ({"seed": -1}, "seed = -1: must be a whole number"),
        ({"seed": 0.5}, "seed = 0.5"),
        ({"seed": 2**64}, "seed = 18446744073709551616"),
    ],
)
def test_wrong_parameters(wrong, message):
    params = {"std": 0.1, "seed": 0, **wrong}
    with pytest.raises(ValueError, match=message):
        gaussian_noise(rand(3, 3, 3), **params)
    with pytest.raises(ValueError, match=message):
        GaussianNoise(**params)


@pytest.mark.parametrize(("std", "message"), [((-0.1, 1), "std = -0.1"), ((1, 0.5), "must rise"), (-1, "std = -1")])
def test_wrong_ranges(std, message):
    with pytest.raises(ValueError, match=message):
        RandomGaussianNoise(std)


def test_wrong_voxels():
    for x in (torch.full((2, 2, 2), torch.inf), torch.ones(2, 2, 2, dtype=torch.int16), torch.zeros(0, 2, 2)):
        with pytest.raises(ValueError, match="the image has"):
            gaussian_noise(x, std=1, seed=0)


def test_draws():
    rng = np.random.default_rng(0)
    drawn = [RandomGaussianNoise().draw_params(rng) for _ in range(500)]
    stds = [d["std"] for d in drawn]
    assert 0.02 <= min(stds) < 0.021
    assert 0.099 < max(stds) <= 0.1
    assert len({d["seed"] for d in drawn}) == 500
    assert all(0 <= RandomGaussianNoise(3).draw_params(rng)["std"] <= 3 for _ in range(100))


def test_replay_from_json():
    changed = check_replay(RandomGaussianNoise(), "GaussianNoise", t1=rand(2, 12, 13, 14))
    assert not torch.equal(changed.flair.data, changed.t1.data)
