import json
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthlong.errors import ConfigError
from synthlong.options import Options
from synthlong.preparation import PreparationConfig


@dataclass(frozen=True)
class Bake(Options):
    """One option of each type, and a path."""

    PATHS: ClassVar = ("tin",)

    degrees: float = 180.0
    minutes: int = 40
    fan: bool = False
    sides: tuple[float, ...] = (20.0, 30.0)
    bread: str = "rye"
    tin: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check(("degrees",), lambda v: 50 <= v <= 300, "in [50, 300]")


BAD = {
    "degrees": ["200", None, True, float("nan"), 49, (180.0,)],
    "minutes": [40.0, "40", None, True],
    "fan": [0, 1, "true", None],
    "sides": [20.0, "20", None, [True, 1.0], ["20"], [None]],
    "bread": [1, None, True, ["rye"]],
    "tin": [1, False, ["x"]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_value_of_another_type_is_refused_by_name(name, value):
    for make in (Bake, lambda **values: Bake.from_dict(values), lambda **values: replace(Bake(), **values)):
        with pytest.raises(ConfigError, match=f"^{name} = .*: must be ") as caught:
            make(**{name: value})
        assert "\n" not in str(caught.value)


def test_each_type_is_tried():
    assert BAD.keys() == {f.name for f in fields(Bake)}


def test_a_number_too_large_for_a_float_is_refused():
    with pytest.raises(ConfigError, match=r"degrees = 1000.*: must be a number"):
        Bake(degrees=10**400)


def test_values_take_the_type_of_their_default():
    config = Bake(degrees=200, sides=[1, 2, 3])
    assert config == Bake(degrees=200.0, sides=(1.0, 2.0, 3.0))
    assert [type(v) for v in (config.degrees, config.sides, *config.sides)] == [float, tuple, float, float, float]
    assert Bake(fan=True).fan is True
    assert Bake(tin="a").tin == "a"
    assert Bake(tin=None).tin is None


@given(
    st.builds(
        Bake,
        degrees=st.floats(50, 300),
        minutes=st.integers(-(2**63), 2**63 - 1),
        fan=st.booleans(),
        sides=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
        bread=st.text(max_size=8),
        tin=st.none() | st.text(max_size=8),
    )
)
def test_plain_json_and_back(config):
    values = json.loads(json.dumps(config.as_dict()))
    assert values == config.as_dict()
    assert Bake.from_dict(values) == config


@pytest.mark.parametrize(
    ("key", "hint"),
    [("degree", "did you mean degrees?"), ("Fan", "did you mean fan?"), ("zzz", "known: degrees, minutes, fan")],
)
def test_an_unknown_key_gets_a_hint(key, hint):
    with pytest.raises(ConfigError, match=f"unknown option '{key}'; ") as caught:
        Bake.from_dict({key: 1})
    assert hint in str(caught.value)


def test_only_paths_of_a_file_are_relative_to_it(tmp_path):
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "c.toml"
    path.write_text('tin = "../tins/round"\nbread = "../tins/round"\n')
    config = Bake.from_toml(path)
    assert config.tin == str(tmp_path / "tins" / "round")
    assert config.bread == "../tins/round"
    path.write_text(f'tin = "{tmp_path}/square"\n')
    assert Bake.from_toml(path).tin == str(tmp_path / "square")
    assert Bake(tin="../tins/round").tin == "../tins/round"
    path.write_text("tin = 3\n")
    with pytest.raises(ConfigError, match=r"sub/c\.toml: tin = 3: must be text"):
        Bake.from_toml(path)


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Bake().degrees = 200.0
    with pytest.raises(FrozenInstanceError):
        PreparationConfig().denoise = False


# --- the config of `prepare`

PREPARATION = {
    "recipe": ["mni", True, None],
    "denoise": [1, "yes", None],
    "denoise_again": [0],
    "correct_bias": ["true"],
    "visits": ["similar", None],
    "brain": ["slow", True],
    "healthy": [None],
    "inpainter": [0.5],
    "precision": ["fp16", 16],
    "device": [0, None],
    "spacing_mm": [0.2, 2.1, "1", True, float("nan")],
}


def test_each_option_of_a_preparation_is_checked():
    assert PREPARATION.keys() == {f.name for f in fields(PreparationConfig)}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in PREPARATION.items() for v in values])
def test_a_preparation_refuses_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} = "):
        PreparationConfig(**{name: value})


def test_a_preparation_from_toml(tmp_path):
    path = tmp_path / "prepare.toml"
    path.write_text('recipe = "schmidt"\ndenoise = false\nspacing_mm = 1\ninpainter = "w.safetensors"\n')
    config = PreparationConfig.from_toml(path)
    assert config == PreparationConfig(
        recipe="schmidt", denoise=False, spacing_mm=1.0, inpainter=str(tmp_path / "w.safetensors")
    )
    assert PreparationConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    path.write_text("denoise_agan = true\n")
    with pytest.raises(ConfigError, match=r"prepare\.toml: unknown option 'denoise_agan'; did you mean denoise_again"):
        PreparationConfig.from_toml(path)
