"""The report: one page, nothing outside it, numbers of the recipes, pictures of the arrays."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from synthlong.dataset.index import write_index
from synthlong.dataset.plan import adopt_plan, make_plan
from synthlong.dataset.writer import Sample, write_shard
from synthlong.errors import ConfigError, InputError, OutputError
from synthlong.event import LesionEvent
from synthlong.orientation import Orientation
from synthlong.pictures import data_uri
from synthlong.placement import Site
from synthlong.profile import Profile
from synthlong.recipe import Box, Recipe
from synthlong.report import _changes, _chosen, write_report
from synthlong.synthesis import SynthesisConfig

SIDE, START = 16, (60, 100, 80)
TURN = Orientation((2, 0, 1), (True, False, True))
BRAIN = np.random.default_rng(0).normal(1, 0.05, (SIDE,) * 3).astype(np.float32)
Cube = tuple[slice, ...]

PROFILE = Profile((0.0, 0.1, 0.3, 0.3, 0.3), (0.05,) * 5)


def cube(*corner: int, side: int = 3) -> Cube:
    return tuple(slice(c, c + side) for c in corner)


def synthetic(before: float, after: float, centre: tuple[int, int, int], voxels: tuple[int, int]) -> LesionEvent:
    i, j, k = (c + s for c, s in zip(centre, START, strict=True))
    return LesionEvent("synthetic", before, after, voxels, site=Site(0, False, (i, j, k)), seed=1, profile=PROFILE)


NEW = synthetic(0, 1, (3, 3, 3), (0, 27))
NEW_REAL = LesionEvent("real", 0, 1, (0, 8), lesion=1)
VANISHED = LesionEvent("real", 1, 0, (40, 0), lesion=2)  # cut by the box
ENLARGING = synthetic(0.5, 1, (12, 12, 12), (1, 27))
STABLE = synthetic(1, 1, (3, 12, 3), (27, 27))
REMOVED = LesionEvent("real", 0, 0, (0, 0), lesion=3)
ALL = (NEW, NEW_REAL, VANISHED, ENLARGING, STABLE, REMOVED)


def make_sample(events: tuple[LesionEvent, ...], subject: str) -> Sample:
    """A pair as `render` would make it of cubes for lesions."""
    evolution = np.zeros(BRAIN.shape, np.uint8)
    if NEW in events:
        evolution[cube(2, 2, 2)] = 2
    if NEW_REAL in events:
        evolution[cube(8, 2, 8, side=2)] = 2
    if VANISHED in events:
        evolution[cube(0, 7, 0)] = 3
    if ENLARGING in events:
        evolution[cube(11, 11, 11)] = 4
        evolution[12, 12, 12] = 1
    if STABLE in events:
        evolution[cube(2, 11, 2)] = 1
    evolution = TURN.apply(evolution)
    new, before = evolution == 2, np.isin(evolution, (1, 3, 5))
    return Sample(
        baseline=BRAIN + 0.5 * before,
        followup=BRAIN + 0.5 * np.isin(evolution, (1, 2, 4)),
        new_lesions=new,
        evolution=evolution,
        lesions_baseline=before,
        lesions_followup=np.isin(evolution, (1, 2, 4)),
        recipe=Recipe(subject, Box(START, SIDE, "event"), events, TURN).to_json(),
        subject=subject,
    )


def write_run(out: Path, samples: list[Sample]) -> Path:
    half = (len(samples) + 1) // 2
    parts = [(0, samples[:half]), (half, samples[half:])]
    texts = {"config_json": "{}", "versions_json": "{}"}
    cars = [write_shard(out, n, part, first_index=k, **texts) for n, (k, part) in enumerate(parts) if part]
    write_index(out, "0123456789abcdef", cars)
    return out


EVENTS = [ALL, (), (VANISHED,), (NEW,), (STABLE, REMOVED), (NEW, ENLARGING), (), (NEW_REAL,)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    out = write_run(folder / "run", [make_sample(e, f"s{k % 3}") for k, e in enumerate(EVENTS)])
    write_report(out, folder / "page.html", samples=6)
    return folder / "page.html"


class Page(HTMLParser):
    """Checks that tags are balanced and collects them with their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: Counter[str] = Counter()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def decode_png(uri: str) -> np.ndarray:
    """Decode by the PNG specification, every scanline filter of the kind 'up'; check every CRC."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + body)
        chunks.append((name, body))
        at += 12 + length
    assert [name for name, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    columns, rows, depth, kind, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, rest) == (8, [0, 0, 0])
    lines = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(rows, -1)
    assert (lines[:, 0] == 2).all()
    pixels = np.cumsum(lines[:, 1:], axis=0, dtype=np.uint8)
    return pixels.reshape((rows, columns, 3) if kind == 2 else (rows, columns))


@pytest.mark.parametrize("shape", [(5, 7), (7, 5, 3), (1, 1)])
def test_png_decodes_to_its_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(decode_png(data_uri(pixels)), pixels)


def test_page_is_whole_and_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "object", "base"} & set(parsed.tags)
    for _, name, value in parsed.attributes:
        assert name not in ("src", "href") or value.startswith("data:image/png;base64,")
        assert not name.startswith("on")
    assert not re.search(r"https?:|url\(|@import", text)
    assert str(page.parent) not in text
    assert not re.search(r"/(tmp|home|work|root)/", re.sub(r"base64,[^\"]*", "", text))


def test_pictures_have_the_size_they_say(page: Path) -> None:
    pictures = re.findall(r'<img src="([^"]*)" width="(\d+)" height="(\d+)"', page.read_text(encoding="utf-8"))
    assert len(pictures) == 6 * 3 * 4
    for uri, width, height in pictures:
        assert decode_png(uri).shape[:2] == (int(height), int(width)) == (256, 256)


def test_pictures_show_the_arrays(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    article = next(a for a in text.split("<article>") if a.startswith("<h3>Pair 0 "))
    axis, at = map(int, re.search(r"array axis (\d) at (\d+)", article).groups())
    sample = make_sample(ALL, "s0")
    baseline, followup, difference, outlined = (decode_png(uri) for uri in re.findall(r'src="([^"]*)"', article)[:4])
    for picture, volume in ((baseline, sample.baseline), (followup, sample.followup)):
        plane = np.float16(volume).astype(np.float32).take(at, axis).T[::-1]
        assert np.array_equal(picture[8::16, 8::16], np.rint(np.clip(plane / 2, 0, 1) * 255).astype(np.uint8))
        assert np.array_equal(picture, np.kron(picture[::16, ::16], np.ones((16, 16), np.uint8)))
    new = (sample.evolution.take(at, axis).T[::-1] == 2).repeat(16, 0).repeat(16, 1)
    assert new.sum() >= 9 * 256, "the plane goes through the new lesion"
    assert (difference[new].astype(int) @ [1, 0, -1] > 50).all(), "brighter at follow-up is warm"
    line = (outlined == (0xFF, 0x4F, 0x4F)).all(axis=-1)
    assert line.any()
    assert not line[8::16, 8::16].any(), "an outline, not a filling"


def test_counts_are_those_of_the_recipes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"<tr><th>(\w+)</th><td>(\d+)</td><td>(\d+)</td></tr>", text)
    counts = Counter((e.kind, e.source) for events in EVENTS for e in events)
    kinds = ("new", "vanished", "enlarging", "shrinking", "stable", "removed")
    assert {k: (int(r), int(s)) for k, r, s in rows} == {k: (counts[k, "real"], counts[k, "synthetic"]) for k in kinds}
    tiles = {name: value for value, name in re.findall(r"<dd>([^<]*)</dd><dt>([^<]*)</dt>", text)}
    assert list(tiles.values()) == ["8", "3", "50%", "50%"]
    assert "synthlong/1" in text
    assert "run 0123456789abcdef" in text


def test_captions_tell_events(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    article = next(a for a in text.split("<article>") if a.startswith("<h3>Pair 0 "))
    chips = re.findall(r"</i>([^<]*)</li>", article)
    assert chips == [
        "new, 27 mm³, synthetic",
        "new, 8 mm³, real",
        "vanished, 27 mm³ in the box, real",
        "enlarging, 1 → 27 mm³, synthetic",
        "stable, 1 synthetic",
    ]


def test_an_event_that_no_recipe_explains_has_no_source() -> None:
    evolution = np.zeros((SIDE,) * 3, np.uint8)
    evolution[5, 5, 5] = 5
    assert _changes(Recipe("a", Box(START, SIDE, "uniform"), ()), evolution) == [(5, "shrinking, 1 mm³ in the box")]


def test_parts_of_touching_lesions_have_a_source() -> None:
    evolution = np.zeros((SIDE,) * 3, np.uint8)
    evolution[cube(2, 2, 2)] = 2
    evolution[8:10, 8:10, 8:12] = 2  # two real ones of 8
    events = (NEW, NEW_REAL, LesionEvent("real", 0, 1, (0, 8), lesion=4))
    plain = Recipe("a", Box(START, SIDE, "uniform"), events)
    assert [text for _, text in _changes(plain, evolution)] == [
        "new, 27 mm³, synthetic",
        "new, 16 mm³ in the box, real",
    ]
    evolution[cube(5, 2, 2)] = 2
    beside = synthetic(0, 1, (6, 3, 3), (0, 27))
    both = Recipe("a", Box(START, SIDE, "uniform"), (NEW, beside))
    evolution[8:] = 0
    assert _changes(both, evolution) == [(2, "new, 27 and 27 mm³, synthetic")]


def test_samples_are_spread_and_of_all_kinds() -> None:
    codes = np.zeros((60, 6), np.int64)
    codes[:40, 2], codes[40:50, 3], codes[0, 4] = 5, 5, 5
    chosen = _chosen(codes, 12)
    assert chosen[0] == 0
    assert chosen[7] == 39
    assert chosen[8:] == [40, 49, 50, 59]
    assert _chosen(codes[50:], 12) == list(range(10))
    assert len(set(_chosen(codes[38:52], 12))) == 12
    assert _chosen(codes, 1) == [0]


def test_same_run_same_bytes(page: Path, tmp_path: Path) -> None:
    write_report(page.parent / "run", tmp_path / "again.html", samples=6)
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_config_is_named_where_the_run_has_a_plan(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", [make_sample(ALL, "a")])
    config = SynthesisConfig()
    plan = make_plan(tmp_path / "cases.csv", out, cases=[], pairs=1, seed=1, shard_size=1, config=config, assets={})
    adopt_plan(out, plan)
    write_report(out, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"config {plan['config_sha256'][:16]}" in text
    assert "cases.csv" not in text
    assert "over the shipped lesion prior (square root" in text


def test_a_prior_of_the_run_s_own_is_told(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", [make_sample(ALL, "a")])
    own = {"prior": "0" * 64}
    options = {"cases": [], "pairs": 1, "seed": 1, "shard_size": 1, "config": SynthesisConfig(), "assets": own}
    adopt_plan(out, make_plan(tmp_path / "cases.csv", out, **options))
    write_report(out, tmp_path / "page.html")
    assert "over the shipped lesion prior (not the run's own) (square" in (tmp_path / "page.html").read_text()


def test_run_without_any_event(tmp_path: Path) -> None:
    out = write_run(tmp_path / "run", [make_sample((), "a")])
    write_report(out, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Page(text).tags["article"] == 1
    assert "no lesion that changes" in text
    assert "0 centres" in text


def test_centres_follow_the_case_s_own_grid(tmp_path: Path) -> None:
    """An MNI position is the same dot whichever grid the case has; one off the map is left out."""
    base = Recipe("a", Box(START, SIDE, "event"), (NEW,))
    i, j, k = NEW.site.centre  # type: ignore[union-attr]
    shifted = LesionEvent("synthetic", 0, 1, (0, 27), site=Site(0, False, (i - 10, j, k)), seed=1, profile=PROFILE)
    far = LesionEvent("synthetic", 0, 1, (0, 27), site=Site(0, False, (i + 500, j, k)), seed=1, profile=PROFILE)
    texts = []
    for name, events, origin in (("a", (NEW,), -91.0), ("b", (shifted, far), -81.0)):
        recipe = Recipe("a", base.box, events, origin_mm=(origin, -126.0, -72.0)).to_json()
        plain = make_sample((), "a")
        sample = Sample(**{**vars(plain), "recipe": recipe})
        write_report(write_run(tmp_path / name, [sample]), tmp_path / f"{name}.html")
        texts.append((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
    dots = [re.findall(r'<path class="dots"[^>]* d="([^"]*)"', text) for text in texts]
    assert dots[0] == dots[1]
    assert f"M{i + 0.5:g} {218 - j - 0.5:g}h0" in dots[0]
    assert all("1 centres" in text for text in texts)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "<script>alert('&\"')</script>{0}"
    out = write_run(tmp_path / "run", [make_sample(ALL, hostile)])
    write_report(out, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "script" not in Page(text).tags
    assert "&lt;script&gt;alert(&#x27;&amp;&quot;&#x27;)&lt;/script&gt;{0}" in text


def test_refusals_leave_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "none", tmp_path / "page.html")
    out = write_run(tmp_path / "run", [make_sample((), "a")])
    with pytest.raises(ConfigError, match="samples must be 1 or more, not 0"):
        write_report(out, tmp_path / "page.html", samples=0)
    with pytest.raises(OutputError, match="its folder does not exist"):
        write_report(tmp_path / "none", tmp_path / "no" / "page.html")
    assert not (tmp_path / "page.html").exists()
