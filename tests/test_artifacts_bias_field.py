import math

import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from transforms import check_replay, rand, with_threads

from synthlong.artifacts import bias_field
from synthlong.artifacts.bias_field import PolynomialBiasField, RandomPolynomialBiasField, polynomial_bias_field

ORDERS = range(7)


def drawn(order, seed=0, largest=0.5):
    return np.random.default_rng(seed).uniform(-largest, largest, math.comb(order + 3, 3)).tolist()


def by_torchio(x, coefficients, order):
    """TorchIO's deterministic transform, on `(C, I, J, K)`."""
    return tio.BiasField(coefficients=coefficients, order=order)(x)


@pytest.mark.parametrize("order", ORDERS)
def test_coefficients_0_change_nothing(order):
    x = rand(2, 5, 6, 7)
    y = polynomial_bias_field(x, coefficients=[0] * math.comb(order + 3, 3), order=order)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_order_0_is_a_factor():
    y = polynomial_bias_field(torch.full((4, 5, 6), 2.0), coefficients=[math.log(3)], order=0)
    assert torch.allclose(y, torch.tensor(6.0), rtol=1e-6)


@pytest.mark.parametrize(("term", "axis"), [(1, 2), (2, 1), (3, 0)])
def test_order_1_is_an_exponential_along_an_axis(term, axis):
    coefficients = [0.0] * 4
    coefficients[term] = 0.7
    y = polynomial_bias_field(torch.ones(9, 9, 9), coefficients=coefficients, order=1)
    shape = [1, 1, 1]
    shape[axis] = 9
    expected = torch.exp(0.7 * torch.linspace(-1, 1, 9)).view(shape).expand(9, 9, 9)
    assert torch.allclose(y, expected, rtol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 40), min_size=3, max_size=3), order=st.integers(0, 6), seed=st.integers(0, 999))
def test_equals_torchio(shape, order, seed):
    """To 3e-6 of each voxel's value."""
    x, coefficients = rand(*shape), drawn(order, seed)
    expected = by_torchio(x[None], coefficients, order)[0]
    y = polynomial_bias_field(x, coefficients=coefficients, order=order)
    assert torch.allclose(y, expected, rtol=3e-6, atol=0)


def test_equals_torchio_on_the_real_scan(real_case):
    """To 1e-6 of the range."""
    x = torch.tensor(real_case.flair)
    expected = by_torchio(x[None], drawn(3), 3)[0]
    error = (polynomial_bias_field(x, coefficients=drawn(3)) - expected).abs().max()
    assert error < 1e-6 * (expected.max() - expected.min())


def test_a_single_voxel_lies_in_the_middle():
    coefficients = drawn(3)
    y = polynomial_bias_field(torch.ones(1, 1, 1), coefficients=coefficients)
    assert y.item() == pytest.approx(math.exp(coefficients[0]), rel=1e-6)


def test_a_slice_is_a_volume_of_one():
    x = rand(7, 9)
    y = polynomial_bias_field(x, coefficients=drawn(3))
    assert torch.equal(y, polynomial_bias_field(x[..., None], coefficients=drawn(3))[..., 0])


@pytest.mark.parametrize("sign", [-1, 1])
def test_strong_fields(sign):
    """Up to exp(50), to the rounding of the exponent in float32."""
    for total in (1, 10, 30, 50):
        y = polynomial_bias_field(torch.ones(2, 3, 35), coefficients=[0, sign * total, 0, 0], order=1)
        expected = torch.exp(sign * total * torch.linspace(-1, 1, 35, dtype=torch.float64))
        assert torch.allclose(y.double(), expected.expand(2, 3, 35), rtol=3e-7 * (1 + total))


def test_the_exponential_is_accurate():
    """Within 3e-7, between and at whole powers of 2."""
    for e in np.concatenate([np.linspace(-20, 20, 571), np.arange(-20, 21)]).astype(np.float32):
        y = polynomial_bias_field(torch.ones(1, 1, 1), coefficients=[float(e) * math.log(2)], order=0)
        assert y.item() == pytest.approx(2 ** float(e), rel=3e-7)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(2, 20, 21, 33), (1, 1, 1, 1), (3, 8, 1, 100)])
def test_the_torch_kernel_does_the_same(order, shape):
    x, weights = rand(*shape), bias_field._weights(drawn(order), order)
    expected = torch.from_numpy(bias_field._by_numba(x.numpy(), weights))
    assert torch.allclose(bias_field._by_torch(x, weights), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = rand(2, 9, 8, 7).to(dtype)
    y = polynomial_bias_field(x, coefficients=drawn(3))
    assert y.dtype == dtype
    assert torch.equal(y, polynomial_bias_field(x.float(), coefficients=drawn(3)).to(dtype))


def test_layout_batch_and_input():
    """Strides and leading volumes do not matter, to the bit; the input stays."""
    x = rand(3, 21, 13, 20).permute(0, 3, 2, 1)
    before = x.clone()
    y = polynomial_bias_field(x, coefficients=drawn(3))
    assert torch.equal(x, before)
    assert torch.equal(y, polynomial_bias_field(x.contiguous(), coefficients=drawn(3)))
    assert torch.equal(y[2], polynomial_bias_field(x[2], coefficients=drawn(3)))


def test_threads_do_not_matter():
    x = rand(110, 101, 103)
    results = with_threads(1, 2, compute=lambda: polynomial_bias_field(x, coefficients=drawn(3)))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"coefficients": [0.1] * 19}, r"coefficients = \[.*\]: must be 20 numbers for order 3"),
        ({"coefficients": 0.1}, "coefficients = 0.1: must be 20 numbers"),
        ({"coefficients": [51] + [0] * 19}, r"coefficients = 51: must be a number in \[-50, 50\]"),
        ({"coefficients": ["a"] * 20}, "coefficients = 'a'"),
        ({"coefficients": [3] * 20}, "coefficients = .*must add up to 50 at most"),
        ({"order": 7}, r"order = 7: must be a whole number in \[0, 6\]"),
        ({"order": 1.5}, "order = 1.5"),
        ({"order": -1}, "order = -1"),
        ({"order": 2}, "must be 10 numbers for order 2"),
    ],
)
def test_wrong_parameters(wrong, message):
    params = {"coefficients": [0.1] * 20, "order": 3, **wrong}
    with pytest.raises(ValueError, match=message):
        polynomial_bias_field(rand(3, 3, 3), **params)
    with pytest.raises(ValueError, match=message):
        PolynomialBiasField(**params)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"coefficients": 3}, r"coefficients = 3: must be a number in \[0, 2.5\]"),
        ({"coefficients": (0.5, 0.1)}, "must rise"),
        ({"order": 7}, "order = 7"),
    ],
)
def test_wrong_ranges(wrong, message):
    with pytest.raises(ValueError, match=message):
        RandomPolynomialBiasField(**wrong)


def test_wrong_voxels():
    for x in (torch.full((2, 2, 2), torch.nan), torch.ones(2, 2, 2, dtype=torch.int16), torch.zeros(0, 2, 2)):
        with pytest.raises(ValueError, match="the image has"):
            polynomial_bias_field(x, coefficients=drawn(3))


@pytest.mark.parametrize("order", ORDERS)
def test_draws(order):
    rng = np.random.default_rng(0)
    params = [RandomPolynomialBiasField(order=order).draw_params(rng) for _ in range(200)]
    assert {(d["order"], len(d["coefficients"])) for d in params} == {(order, math.comb(order + 3, 3))}
    values = np.concatenate([d["coefficients"] for d in params])
    assert -0.5 <= values.min() < -0.47
    assert 0.47 < values.max() <= 0.5


@pytest.mark.parametrize("order", ORDERS)
def test_the_largest_range_gives_valid_coefficients(order):
    """The limit of a range keeps every draw from it within the limit of the sum."""
    with pytest.raises(ValueError, match="coefficients = 1000") as error:
        RandomPolynomialBiasField(1000, order)
    most = float(str(error.value).rpartition(", ")[2].rstrip("]"))
    params = RandomPolynomialBiasField((most, most), order).draw_params(np.random.default_rng(0))
    PolynomialBiasField(**params)


def test_replay_from_json():
    check_replay(RandomPolynomialBiasField(), "PolynomialBiasField")
