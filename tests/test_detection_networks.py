import json

import numpy as np
import pytest
import torch

import synthlong.detection
from synthlong.atlas import MNI_SHAPE
from synthlong.detection import ConcatUNet, SegmentationUNet, SiameseUNet
from synthlong.detection.inference import read_detectors
from synthlong.errors import InputError
from synthlong.networks import UNet, UNetConfig
from synthlong.weights import read_weights, write_weights

KINDS = (SegmentationUNet, SiameseUNet, ConcatUNet)
WIDTHS = (8, 16, 16)


def small(kind, seed=0):
    torch.manual_seed(seed)
    return kind(UNetConfig(in_channels=kind.channels, widths=WIDTHS))


def visits(kind, n=2, sides=(8, 12, 16)):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(n, 1, *sides, generator=rng) for _ in range(1 if kind is SegmentationUNet else 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_logit_a_voxel(kind):
    assert small(kind)(*visits(kind)).shape == (2, 1, 8, 12, 16)
    assert kind().config == UNetConfig(in_channels=kind.channels, widths=(16, 32, 64))
    assert getattr(synthlong.detection, kind.__name__) is kind


@pytest.mark.parametrize("kind", KINDS)
def test_other_channels_are_refused(kind):
    for config in (UNetConfig(in_channels=3), UNetConfig(in_channels=kind.channels, out_channels=2)):
        with pytest.raises(ValueError, match=kind.__name__):
            kind(config)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_reaches_every_parameter(kind):
    network = small(kind)
    network(*visits(kind)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    assert not list(network.buffers())  # no running statistics: training and evaluation are alike


@pytest.mark.parametrize("kind", KINDS)
def test_lesions_are_rare_before_training(kind):
    probability = kind()(*visits(kind, sides=(16, 16, 16))).sigmoid()
    assert 0.001 < probability.mean() < 0.05


def test_the_concat_network_is_the_projects_unet_on_two_channels():
    network, (a, b) = small(ConcatUNet), visits(ConcatUNet)
    plain = UNet(network.config)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network(a, b), plain(torch.cat([a, b], dim=1)))


def test_the_siamese_network_encodes_each_visit_alone():
    network, (a, b) = small(SiameseUNet), visits(SiameseUNet)
    features = []
    for merge, of_a, of_b in zip(network.merge, network.down(a), network.down(b), strict=True):
        features.append(merge(torch.cat([of_a, of_b], dim=1)))
    torch.testing.assert_close(network(a, b), network.head(network.up(features)), rtol=1e-4, atol=1e-5)


def test_only_the_merging_tells_the_visits_apart():
    network, (a, b) = small(SiameseUNet), visits(SiameseUNet)
    assert not torch.allclose(network(a, b), network(b, a), atol=1e-3)
    for merge in network.merge:
        first, second = merge.weight.data.chunk(2, dim=1)
        second.copy_(first)
    torch.testing.assert_close(network(a, b), network(b, a), rtol=1e-4, atol=1e-5)


def test_the_siamese_network_takes_over_the_encoder():
    source = small(SegmentationUNet)
    network = SiameseUNet.from_segmentation(source)
    assert network.config == source.config
    wanted = source.down.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in network.down.state_dict().items())
    torch.nn.init.zeros_(source.down[0][0].weight)
    assert network.down[0][0].weight.any()


def test_a_frozen_encoder_gets_no_gradient():
    network = small(SiameseUNet)
    network.freeze_encoder()
    network(*visits(SiameseUNet)).square().mean().backward()
    frozen = {name for name, p in network.named_parameters() if p.grad is None}
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith("down.")}
    assert all(p.grad.any() for p in network.parameters() if p.requires_grad)


def test_z_scores_are_those_on_the_mni_grid_at_any_scale():
    scan = np.random.default_rng(0).gamma(2.0, size=(12, 10, 8)).astype(np.float32)
    scan[:4] = 0
    scan.flags.writeable = False
    scored = ConcatUNet.normalised(scan)
    assert scored.dtype == np.float32
    whole = np.zeros(MNI_SHAPE)
    whole[:12, :10, :8] = scan
    np.testing.assert_allclose(scored, ((whole - whole.mean()) / whole.std())[:12, :10, :8], rtol=1e-5)
    assert (scored[:4] == scored.min()).all()
    np.testing.assert_allclose(ConcatUNet.normalised(300 * scan), scored, rtol=1e-5)
    assert not ConcatUNet.normalised(np.zeros_like(scan)).any()
    assert SiameseUNet.normalised(scan) is scan


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back(kind, tmp_path):
    path, network = tmp_path / "w.safetensors", small(kind)
    sha256 = write_weights(path, network, task=kind.task, card={"licence": "CC0"})
    read, found = read_weights(path, task=kind.task)
    assert type(read) is kind
    assert found == sha256 == json.loads(path.with_suffix(".json").read_text())["sha256"]
    assert read.config == network.config
    assert torch.equal(read(*visits(kind)), network(*visits(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_network_are_refused(kind, tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, small(kind), task=kind.task, card={})
    for other in {"inpainter", *(k.task for k in KINDS)} - {kind.task}:
        with pytest.raises(InputError, match=f"of the {kind.task}, not of the {other}; train them with `synthlong "):
            read_weights(path, task=other)


def test_detectors_are_of_one_kind(tmp_path):
    paths = {kind: tmp_path / f"{kind.task}.safetensors" for kind in KINDS}
    for kind, path in paths.items():
        write_weights(path, small(kind), task=kind.task, card={})
    siamese, concat = paths[SiameseUNet], paths[ConcatUNet]
    for given in ([concat], [str(concat)], concat, str(concat)):
        assert [type(n) for n in read_detectors(given)] == [ConcatUNet]
    assert [type(n) for n in read_detectors([siamese, siamese])] == [SiameseUNet] * 2
    with pytest.raises(InputError, match="weights of the concat, beside those of the siamese"):
        read_detectors([siamese, concat])
    with pytest.raises(InputError, match="of the segmentation, not of the concat or siamese"):
        read_detectors([paths[SegmentationUNet]])


def test_weights_that_name_the_wrong_network_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, small(SiameseUNet), task="concat", card={})
    with pytest.raises(InputError, match="not synthlong weights"):
        read_weights(path, task="concat")
    write_weights(path, small(SegmentationUNet), task="siamese", card={})
    with pytest.raises(InputError, match="its tensors do not fit"):
        read_weights(path, task="siamese")
