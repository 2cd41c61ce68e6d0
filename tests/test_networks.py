import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from synthlong.networks import GroupNorm, UNet, UNetConfig, arithmetic, default_precision, infer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = UNetConfig(in_channels=3, out_channels=1, widths=(8, 16, 16))


def scrambled(config=CONFIG, seed=0):
    """A network whose head does something."""
    torch.manual_seed(seed)
    network = UNet(config)
    torch.nn.init.normal_(network.head.weight)
    return network.eval()


def test_shapes_follow_the_config():
    for config in (CONFIG, UNetConfig(1, 2, (8,)), UNetConfig(2, 4, (8, 24))):
        network = scrambled(config)
        x = torch.randn(2, config.in_channels, 8, 12, 16)
        assert network(x).shape == (2, config.out_channels, 8, 12, 16)
        assert config.multiple == 2 ** (len(config.widths) - 1)
        assert UNetConfig(**config.as_dict()) == config


def test_an_untrained_network_changes_nothing():
    assert not UNet(CONFIG)(torch.randn(1, 3, 8, 8, 8)).any()


@pytest.mark.parametrize(
    "wrong",
    [{"widths": (8.5, 16)}, {"widths": (10, 16)}, {"widths": ()}, {"in_channels": 0}, {"out_channels": 0}],
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        UNetConfig(**wrong)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("sides", [(16, 16, 16), (13, 17, 22), (5, 4, 7)])
def test_any_sides_and_both_precisions(precision, sides):
    x = np.random.default_rng(0).standard_normal((3, *sides)).astype(np.float32)
    x.flags.writeable = False
    y = infer(scrambled(), x, precision=precision)
    assert y.shape == (1, *sides)
    assert y.dtype == np.float32
    assert y.flags.c_contiguous
    assert np.isfinite(y).all()
    assert y.any()
    assert np.array_equal(y, infer(scrambled(), x, precision=precision))


def test_bf16_is_near_float32():
    x = np.random.default_rng(1).standard_normal((3, 16, 16, 16)).astype(np.float32)
    a, b = (infer(scrambled(), x, precision=p) for p in ("float32", "bf16"))
    assert np.abs(a - b).mean() < 0.05 * np.abs(a).mean()
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_result_does_not_depend_on_its_batch(precision):
    network = scrambled()
    rng = np.random.default_rng(2)
    x, other = (rng.standard_normal((3, 16, 16, 16)).astype(np.float32) for _ in range(2))
    alone = infer(network, x, precision=precision)
    batch = torch.from_numpy(np.stack([other, x, other])).to(memory_format=torch.channels_last_3d)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert np.array_equal(alone, network(batch)[1].float().numpy())


def test_default_precision():
    assert default_precision() in ("bf16", "float32")


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(2, 8, 16, 16, 16), (1, 24, 5, 7, 3), (3, 512, 2, 1, 2)])
def test_the_gradient_of_group_norm_is_that_of_torch_in_double_precision(shape, dtype, near):
    draw = torch.Generator().manual_seed(0)
    last = {"memory_format": torch.channels_last_3d}
    x = (3 * torch.randn(shape, generator=draw) + 1).to(dtype).to(**last).requires_grad_()
    dy = torch.randn(shape, generator=draw).to(dtype).to(**last)
    norm = GroupNorm(8, shape[1])
    torch.nn.init.normal_(norm.weight, generator=draw)
    slow = torch.nn.GroupNorm(8, shape[1], dtype=torch.float64)
    slow.load_state_dict(norm.state_dict())
    exact = x.detach().double().contiguous().requires_grad_()

    y = norm(x)
    assert type(y.grad_fn).__name__ == "_GroupNormBackward"
    y.backward(dy)
    slow(exact).backward(dy.double())
    assert x.grad.dtype == dtype
    assert x.grad.is_contiguous(**last)
    for ours, theirs in ((x.grad, exact.grad), (norm.weight.grad, slow.weight.grad), (norm.bias.grad, slow.bias.grad)):
        assert (ours - theirs).abs().max() < near * theirs.abs().max()


def test_the_gradients_in_channels_last_are_those_of_double_precision():
    network = scrambled()
    exact = UNet(CONFIG).double()
    exact.load_state_dict(network.state_dict())
    network.to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 3, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    network(x.to(memory_format=torch.channels_last_3d)).square().mean().backward()
    exact(x.double()).square().mean().backward()
    for (name, ours), theirs in zip(network.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max(), name


def test_arithmetic_tells_processors_apart():
    """Other instructions for bf16, as on a processor that torch calls the same."""
    assert arithmetic("cpu") == arithmetic("cpu")
    if default_precision() == "float32":
        pytest.skip("this processor does not compute bf16")
    program = "from synthlong.networks import arithmetic; print(arithmetic('cpu'))"
    found = []
    for most in ("DEFAULT", "AVX512_CORE"):
        command = [sys.executable, "-W", "ignore", "-c", program]
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.strip())
    assert found[0] == arithmetic("cpu") != found[1]


def test_arithmetic_leaves_torchs_generator_alone():
    torch.manual_seed(4)
    wanted = torch.rand(1)
    torch.manual_seed(4)
    arithmetic.__wrapped__("cpu")
    assert torch.rand(1) == wanted
