import json
import pickle

import pytest
import torch
from safetensors.torch import load, save

from synthlong import weights
from synthlong.detection.networks import ConcatUNet
from synthlong.errors import InputError
from synthlong.networks import UNet, UNetConfig
from synthlong.weights import read_weights, write_weights

CONFIG = UNetConfig(in_channels=3, out_channels=1, widths=(8, 16))


def network(seed=0):
    torch.manual_seed(seed)
    made = UNet(CONFIG).to(memory_format=torch.channels_last_3d)
    torch.nn.init.normal_(made.head.weight)
    return made


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, network(), task="inpainter", card={"licence": "CC0", "curve": [1, 2]})
    return path


def about(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_round_trip(stored):
    read, sha256 = read_weights(stored, task="inpainter")
    assert not read.training
    assert read.config == CONFIG
    wanted = network().state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in read.state_dict().items())
    card = json.loads(stored.with_suffix(".json").read_text())
    assert card["sha256"] == sha256
    assert card["licence"] == "CC0"
    assert card["task"] == "inpainter"
    assert card["network"] == CONFIG.as_dict()


def test_the_same_network_gives_the_same_bytes(stored, tmp_path):
    for n in range(5):
        again = tmp_path / f"{n}.safetensors"
        write_weights(again, network(), task="inpainter", card={})
        assert again.read_bytes() == stored.read_bytes()


def test_a_detector_keeps_its_windows(tmp_path):
    detector, path = ConcatUNet(UNetConfig(in_channels=2, widths=(8, 16))), tmp_path / "w.safetensors"
    detector.window = 48
    write_weights(path, detector, task="concat", card={})
    assert json.loads(path.with_suffix(".json").read_text())["window"] == 48
    read, _ = read_weights(path, task="concat")
    assert read.window == 48
    detector.window = 47
    write_weights(path, detector, task="concat", card={})
    with pytest.raises(InputError, match="not synthlong weights"):
        read_weights(path, task="concat")


def test_writing_leaves_nothing_else_behind(stored):
    assert sorted(p.name for p in stored.parent.iterdir()) == ["w.json", "w.safetensors"]


def test_weights_of_another_format_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "g.safetensors"
    monkeypatch.setitem(weights._FORMATS, "generator", "synthlong-weights/1")
    write_weights(path, network(), task="generator", card={})
    read_weights(path, task="generator")
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"weights of format 'synthlong-weights/1', this version reads .*/2") as caught:
        read_weights(path, task="generator")
    assert "synthlong fit generator" in str(caught.value)


def test_missing_weights(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_weights(path, task="inpainter")


def test_weights_of_another_task(stored):
    with pytest.raises(InputError, match="of the inpainter, not of the generator"):
        read_weights(stored, task="generator")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(stored, keep):
    stored.write_bytes(stored.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"w\.safetensors: not synthlong weights"):
        read_weights(stored, task="inpainter")


def test_a_flipped_bit_is_told_by_the_card(stored):
    data = bytearray(stored.read_bytes())
    data[-10] ^= 1
    stored.write_bytes(data)
    with pytest.raises(InputError, match="SHA-256"):
        read_weights(stored, task="inpainter")
    stored.with_suffix(".json").unlink()
    read_weights(stored, task="inpainter")  # without a card nobody can tell


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00"])
def test_a_damaged_card(stored, text):
    stored.with_suffix(".json").write_text(text)
    with pytest.raises(InputError, match=r"w\.json: not a card"):
        read_weights(stored, task="inpainter")


def altered(path, change):
    """Write the weights again with changed tensors, and no card."""
    tensors, metadata = load(path.read_bytes()), about(path)
    change(tensors)
    path.write_bytes(save(tensors, metadata=metadata))
    path.with_suffix(".json").unlink()


def poison(value):
    def change(tensors):
        tensors["head.bias"][0] = value

    return change


CHANGES = [
    (poison(float("nan")), "NaN or infinite"),
    (poison(float("inf")), "NaN or infinite"),
    (lambda t: t.update({"head.bias": t["head.bias"].half()}), "torch.float16"),
    (lambda t: t.update({"head.bias": torch.zeros(2)}), r"\(2,\), not float32 \(1,\)"),
    (lambda t: t.pop("head.bias"), "head.bias"),
    (lambda t: t.update({"extra": torch.zeros(1)}), "extra"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_tensors_that_do_not_fit(stored, change, message):
    altered(stored, change)
    with pytest.raises(InputError, match=message):
        read_weights(stored, task="inpainter")


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"synthlong": "{}"},
        {"synthlong": "no JSON"},
        {"synthlong": '{"format": "other/1", "task": "inpainter", "network": {"widths": [8]}}'},
        {"synthlong": '{"format": "synthlong-weights/1", "task": "inpainter", "network": {"widths": [3]}}'},
        {"synthlong": '{"format": "synthlong-weights/1", "task": "inpainter", "network": {"size": 3}}'},
        {"synthlong": "[]"},
    ],
)
def test_foreign_safetensors(tmp_path, described):
    path = tmp_path / "w.safetensors"
    path.write_bytes(save({"a": torch.zeros(1)}, metadata=described))
    with pytest.raises(InputError, match="not synthlong weights"):
        read_weights(path, task="inpainter")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="not synthlong weights"):
        read_weights(path, task="inpainter")
    torch.save(network().state_dict(), path)
    with pytest.raises(InputError, match="not synthlong weights"):
        read_weights(path, task="inpainter")
