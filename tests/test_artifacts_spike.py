import json

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from torchio.transforms.augmentation.intensity.random_spike import Spike
from transforms import with_threads

from synthlong.artifacts import spike
from synthlong.artifacts.base import softened
from synthlong.artifacts.spike import KSpaceSpike, RandomKSpaceSpike, kspace_spike

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = [[0.3, 0.4, 0.61]]
THREE = [[0.3, 0.4, 0.61], [0.52, 0.5, 0.7], [0.3, 0.4, 0.61]]


def difference(y, expected):
    """The largest difference as a fraction of the range."""
    return float((y - expected).abs().max() / (expected.max() - expected.min()).clamp(min=1e-6))


@pytest.mark.parametrize("params", [{"positions": [], "intensity": 2}, {"positions": ONE, "intensity": 0}])
def test_no_spikes_or_no_intensity_change_nothing(params):
    x = torch.rand(2, 9, 8, 7)
    y = kspace_spike(x, **params)
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()


def test_a_spike_is_a_wave():
    x = torch.rand(8, 10, 12)
    y = kspace_spike(x, positions=[[0.75, 0.2, 0.5]], intensity=2)  # 2 cycles along I, -3 along J
    phase = 2 * torch.pi * (2 / 8 * torch.arange(8.0)[:, None, None] - 3 / 10 * torch.arange(10.0)[:, None])
    assert torch.allclose(y, x + 2 * x.mean() * torch.cos(phase), atol=1e-5)


def test_a_spike_at_the_centre_is_a_constant():
    x = torch.rand(5, 6, 7)
    assert torch.allclose(kspace_spike(x, positions=[[0.5] * 3], intensity=-1), x - x.mean(), atol=1e-5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    least=st.sampled_from([0.0, -0.2, -0.5, -0.9, -1.0]),
    positions=st.lists(st.tuples(*[st.sampled_from([0, 0.3, 0.5, 0.7, 0.999]) | st.floats(0, 0.999)] * 3), max_size=5),
    intensity=st.sampled_from([-2.0, -1.0, -0.5, 0.2, 1.0, 3.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_torchio(shape, least, positions, intensity, seed):
    """Several spikes too, on one point, on mirrored points and on the largest: each is as high as the peak so far."""
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)) + least
    expected = Spike(np.array(positions).reshape(-1, 3), intensity)(x)
    assert difference(kspace_spike(x, positions=positions, intensity=intensity), expected) < 1e-4
    assert difference(spike._by_torch(x, positions, intensity), expected) < 1e-4 or not positions


@pytest.mark.parametrize("sign", [1, -1])
def test_a_spike_may_take_the_peak_away(sign):
    """With the centre emptied, the next spike is as high as the second largest modulus."""
    x = sign * torch.rand(1, 6, 7, 8)
    positions = [[0.5, 0.5, 0.5], [0.2, 0.3, 0.4]]
    expected = Spike(np.array(positions), -sign)(x)
    assert difference(kspace_spike(x, positions=positions, intensity=-sign), expected) < 1e-4


@pytest.mark.parametrize("positions", [ONE, THREE])
def test_equals_torchio_on_a_scan(real_case, positions):
    x = torch.tensor(real_case.flair[None, 40:140, 50:170, 40:130])
    for image in (x, x - x.mean(), (x - 0.5) * (x > 0)):
        expected = Spike(np.array(positions), 1.5)(image)
        y = kspace_spike(image, positions=positions, intensity=1.5)
        assert difference(y, expected) < 1e-4
        assert (y - image).std() > 0.01


def test_the_peak_is_at_the_centre_where_no_transform_is_made():
    """Images of one sign, and those whose SD is at most their mean; others need the transform."""
    positive, noisy = torch.rand(9, 8, 7), torch.randn(9, 8, 7, generator=torch.Generator().manual_seed(0))
    cases = [(positive, spike._Centred), (-positive, spike._Centred), (noisy * 0.9 + 1, spike._Centred)]
    for x, kind in [*cases, (noisy, spike._Transformed), (noisy * 2 + 1, spike._Transformed)]:
        assert type(spike._spectrum(x.numpy(), [(1, 2, 3)], 2.0)) is kind
        peak = spike._spectrum(x.numpy(), [(1, 2, 3)], 2.0).peak({})
        assert peak == pytest.approx(float(torch.fft.fftn(x).abs().max()), rel=1e-5)
    assert type(spike._spectrum(positive.numpy(), [(0, 0, 0)], -2.0)) is spike._Transformed


def test_both_spectra_know_each_point():
    x = torch.rand(6, 7, 8)
    whole = torch.fft.fftn(x.double())
    for point in [(0, 0, 0), (1, 2, 3), (5, 0, 4), (3, 6, 7), (0, 0, 5)]:
        for spectrum in (spike._Transformed(x), spike._Centred(x.numpy(), 0.0)):
            assert abs(spectrum.at(point) - complex(whole[point])) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = torch.rand(2, 12, 11, 10).to(dtype)
    y = kspace_spike(x, positions=THREE, intensity=1)
    assert y.dtype == dtype
    assert torch.equal(y, kspace_spike(x.float(), positions=THREE, intensity=1).to(dtype))


def test_strides_slices_and_extra_axes():
    x = torch.rand(10, 2, 3, 12, 11)
    before = x.clone()
    view = x.permute(1, 2, 3, 4, 0)
    y = kspace_spike(view, positions=THREE, intensity=1)
    assert torch.equal(y, kspace_spike(view.contiguous(), positions=THREE, intensity=1))
    assert torch.equal(y[1, 2], kspace_spike(view[1, 2], positions=THREE, intensity=1))  # each volume has its own peak
    assert torch.equal(x, before)
    flat = kspace_spike(x[0, 0, 0], positions=THREE, intensity=1)
    assert torch.equal(flat, kspace_spike(x[0, 0, 0][..., None], positions=THREE, intensity=1)[..., 0])


@pytest.mark.parametrize("least", [0, -0.5])
@pytest.mark.parametrize("shape", [(100, 96, 126), (112, 110, 100)])
def test_threads_do_not_change_bits(shape, least):
    x = torch.rand(1, *shape) + least
    one, again, two = with_threads(1, 1, 2, compute=lambda: kspace_spike(x, positions=THREE, intensity=1))
    assert torch.equal(again, one)
    assert torch.equal(two, one)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"positions": [[0.5, 0.5, 1.5]]}, r"positions = 1.5: must be a number in \[0, 1\]"),
        ({"positions": [0.5, 0.5, 0.5]}, r"positions = \[0.5, 0.5, 0.5\]: must be a list of threes"),
        ({"positions": [[0.5, 0.5]]}, "positions"),
        ({"intensity": 101}, r"intensity = 101: must be a number in \[-100, 100\]"),
        ({"intensity": "high"}, "intensity = 'high'"),
    ],
)
def test_wrong_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        kspace_spike(torch.rand(4, 4, 4), **{"positions": ONE, "intensity": 1, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"spikes": -1}, "spikes = -1"), ({"spikes": (1, 2.5)}, "spikes = 2.5"), ({"intensity": (3, 1)}, "must rise")],
)
def test_wrong_ranges_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        RandomKSpaceSpike(**wrong)
    with pytest.raises(ValueError, match="positions"):
        KSpaceSpike([[2, 2, 2]], 1)


def test_draws_stay_in_range():
    rng, random = np.random.default_rng(3), RandomKSpaceSpike(spikes=(0, 3))
    draws = [random.draw_params(rng) for _ in range(500)]
    assert {len(draw["positions"]) for draw in draws} == {0, 1, 2, 3}
    positions = np.concatenate([np.reshape(draw["positions"], (-1, 3)) for draw in draws])
    assert (positions.min(0) >= 0).all()
    assert (positions.max(0) <= 1).all()
    assert (positions.min(0) < 0.02).all()
    assert (positions.max(0) > 0.98).all()
    intensities = [draw["intensity"] for draw in draws]
    assert 1 <= min(intensities) < 1.05 < 2.95 < max(intensities) <= 3
    assert json.loads(json.dumps(draws)) == draws
    assert len(RandomKSpaceSpike().draw_params(rng)["positions"]) == 1


def test_severity_zero_is_the_identity():
    params = RandomKSpaceSpike().draw_params(np.random.default_rng(0))
    x = torch.rand(8, 9, 10)
    assert torch.equal(kspace_spike(x, **softened(params, RandomKSpaceSpike.identity, 0)), x)


def test_history_replays_the_bits():
    subject = tio.Subject(
        baseline=tio.ScalarImage(tensor=torch.rand(2, 16, 17, 12)),
        followup=tio.ScalarImage(tensor=torch.randn(1, 16, 17, 12)),
        lesions=tio.LabelMap(tensor=torch.ones(1, 16, 17, 12)),
    )
    result = RandomKSpaceSpike(spikes=(1, 3), seed=4)(subject)
    ((name, arguments),) = result.applied_transforms
    again = getattr(spike, name)(**json.loads(json.dumps(arguments)))(subject)
    for image in ("baseline", "followup"):
        params = {parameter: arguments[parameter][image] for parameter in ("positions", "intensity")}
        expected = kspace_spike(subject[image].data, **params)
        assert torch.equal(result[image].data, expected)
        assert torch.equal(again[image].data, expected)
        assert not torch.equal(expected, subject[image].data)
    assert torch.equal(result["lesions"].data, subject["lesions"].data)
