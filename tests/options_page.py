"""`docs/options.md`, of the configs' defaults, docstrings and checks: `python tests/options_page.py` writes it."""

import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from unittest.mock import patch

from synthlong.options import Options
from synthlong.preparation.config import PreparationConfig
from synthlong.synthesis import SynthesisConfig
from synthlong.training.ohem import OhemConfig
from synthlong.training.stage_config import FinetuneConfig, PretrainConfig, SegmentConfig
from synthlong.training.training_config import TrainingConfig

PAGE = Path(__file__).parents[1] / "docs" / "options.md"

HEAD = """# Options of `--config`

A TOML file of `name = value` lines; what it leaves out has its default, an unknown name is refused with the nearest
known one. Paths are relative to the file. Where the command line has an option of the same name, that one counts.
Numbers in [0, 1] may be 0 and 1, too. (`python tests/options_page.py` makes this page of the code.)
"""
SECTIONS = {
    "`generate`": SynthesisConfig,
    "`prepare`, `detect`": PreparationConfig,
    "every `train`": TrainingConfig,
    "`train segment`": SegmentConfig,
    "`train pretrain`": PretrainConfig,
    "`train finetune`": FinetuneConfig,
    "`train ohem`": OhemConfig,
}
BESIDE = "Beside those of every training, or with another default:\n"
TABLE = """
`synthesis` comes last in the file, a table of the options of `generate` above; what it leaves out has their defaults,
but `artifacts` is "kamraoui" and `box` is `side`. It is for pairs made on the fly; with shards it is refused.

    [synthesis]
    artifacts = "clinical"
    flow_share = 0.6
"""
ELSEWHERE = {
    "device": '`"cpu"`, `"cuda"`, `"cuda:0"`, ...',
    "side": "a whole number, a multiple of 4",
    "widths": "multiples of 8",
    "synthesis": "a table",
}
"""What is checked elsewhere, or in other words; sides: with three `widths`."""


def row_of(config: type[Options], name: str) -> str:
    """The row of an option."""
    default = next(f.default for f in fields(config) if f.name == name)
    shown = "`a table`" if isinstance(default, Options) else "" if default is None else f"`{json.dumps(default)}`"
    return f"| `{name}` | {shown} | {allowed(config, name)} | {meaning(config, name)} |"


def allowed(config: type[Options], name: str) -> str:
    """The values that the config's checks let through, in their words."""
    said: list[str] = []

    def note(self, names, good, range_):
        said.extend([range_] if name in names and range_ not in said else [])

    with patch.object(Options, "check", note):
        config()
    default = next(f.default for f in fields(config) if f.name == name)
    text = ", ".join(said)
    if name == "device" and "cuda; " in text:
        return '`"cpu"`, `"cuda"`'
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    text = re.sub(r"the \d+ processes", "the processes", re.sub(r" \(\d+\)$", "", text))
    if isinstance(default, bool):
        return "`true`, `false`"
    if name in config.PATHS:
        return "a path"
    if isinstance(default, str) or default is None:
        return ", ".join(f'`"{word}"`' for word in re.split(r", | or ", text.removeprefix("one of ")))
    whole = isinstance(default, int) and "whole number" not in text
    return f"a whole number, {text}" if whole else text


def meaning(config: type[Options], name: str) -> str:
    """What the docstring of the config, or of one that it extends, says of an option."""
    for kind in config.__mro__:
        if found := re.search(rf"^    {name}: (.*(?:\n     .*)*)", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE):
            return re.sub(r"\s+", " ", found[1])
    raise LookupError(f"{config.__name__}: no word on {name}")


def page() -> str:
    """The whole page."""
    shared = {f.name: f.default for f in fields(TrainingConfig)}
    parts = [HEAD]
    for verb, config in SECTIONS.items():
        stage = issubclass(config, TrainingConfig) and config is not TrainingConfig
        names = [f.name for f in fields(config) if not stage or shared.get(f.name, MISSING) != f.default]
        head = f"\n## {verb}: `{config.__name__}`\n\n" + (f"{BESIDE}\n" if stage else "")
        rows = [row_of(config, name) for name in names]
        parts.append(head + "\n".join(["| option | default | allowed | what |", "|---|---|---|---|", *rows]) + "\n")
        parts.append(TABLE if config is PretrainConfig else "")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
