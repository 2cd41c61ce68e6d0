"""What a person looks at: one HTML page about a finished run, with pictures, and nothing outside it.

Pictures are PNGs inside the page, plots inline SVG, no scripts. The same run gives the same bytes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthlong.atlas import lesion_prior
from synthlong.dataset.assets import asset_hashes
from synthlong.dataset.index import Index
from synthlong.dataset.plan import read_plan
from synthlong.dataset.reader import SCHEMA
from synthlong.dataset.shards import ShardDataset
from synthlong.errors import ConfigError
from synthlong.event import LesionEvent
from synthlong.pair import ENLARGED, NEW, SHRUNK, STABLE, VANISHED
from synthlong.pictures import (
    COLOURS,
    DIFFERENCE_STOPS,
    DIFFERENCE_TOP,
    GRAY_TOP,
    Picture,
    data_uri,
    gray_pixels,
    panels,
    upright,
)
from synthlong.progress import Progress
from synthlong.publishing import check_place, publish
from synthlong.recipe import Recipe
from synthlong.synthesis import SynthesisConfig

__all__ = ["write_report"]

_KINDS = {NEW: "new", VANISHED: "vanished", ENLARGED: "enlarging", SHRUNK: "shrinking"}
_SOURCES = {"real": "#8a94a3", "synthetic": "#e2632b"}
_AROUND = np.ones((3, 3, 3), bool)
_PLANES = ("sagittal", "coronal", "axial")
_MOST_DOTS = 20_000


@dataclass(frozen=True)
class _Tally:
    """What the recipes of a run add up to; its size hardly grows with theirs.

    Args:
        numbers: Recipes by their number of new lesions.
        events: Lesions by kind and source.
        volumes: New lesions by source and voxels.
        places: Centres of the synthetic lesions, x, y and z in MNI millimetres one after the other.
        new: Whether each of those is new.
    """

    numbers: Counter[int] = field(default_factory=Counter)
    events: Counter[tuple[str, str]] = field(default_factory=Counter)
    volumes: Counter[tuple[str, int]] = field(default_factory=Counter)
    places: array[float] = field(default_factory=lambda: array("f"))
    new: bytearray = field(default_factory=bytearray)

    def add(self, recipe: Recipe) -> None:
        """Count one recipe."""
        self.numbers[sum(e.kind == "new" for e in recipe.events)] += 1
        for event in recipe.events:
            self.events[event.kind, event.source] += 1
            if event.kind == "new":
                self.volumes[event.source, event.voxels[1]] += 1
            if event.site:
                self.places.extend(c + o for c, o in zip(event.site.centre, recipe.origin_mm, strict=True))
                self.new.append(event.kind == "new")


def write_report(
    out: Path,
    page: Path,
    *,
    samples: int = 12,
    progress: Progress | None = None,
) -> None:
    """Write one self-contained HTML page about a finished run.

    Reads every recipe and `evolution` mask once, and the images of the pairs it shows.

    Args:
        out: Folder with a complete run.
        page: HTML file to write.
        samples: Pairs to show, 1 or more: about two thirds with new lesions in the box, spread evenly over
            the run, then other changes, then pairs without any.
        progress: Called as ("samples", done, total).

    Raises:
        InputError: The run is not finished or damaged.
        ConfigError: `samples` is below 1.
        OutputError: The page cannot be written.
    """
    if samples < 1:
        raise ConfigError(f"samples must be 1 or more, not {samples}")
    check_place(page)
    index = Index.read(out)
    names = [(number, index.subjects[k]) for number, k in enumerate(index.subject)]
    tally, codes = _Tally(), np.zeros((len(names), 6), np.int64)
    masks = ShardDataset(out, keys=("evolution", "recipe"))
    for row, sample in enumerate(masks[k] for k in range(len(masks))):
        tally.add(Recipe.from_json(sample["recipe"]))
        codes[row] = np.bincount(sample["evolution"].numpy().ravel(), minlength=6)
        if progress:
            progress("samples", row + 1, len(names))
    images = ShardDataset(out, keys=("baseline", "followup", "evolution", "recipe"))
    pairs = []
    for row in _chosen(codes, samples):
        shown = images[row]
        recipe = Recipe.from_json(shown.pop("recipe"))
        pairs.append(_pair(*names[row], recipe, **{key: volume.numpy()[0] for key, volume in shown.items()}))
    plan = read_plan(out) if (out / "run.json").exists() else None
    body = [_head(index, plan, tally, codes), _legend(), *pairs, _volumes(tally), _placements(tally, plan)]
    text = _PAGE.format(style=_STYLE, body="\n".join(body))
    publish(page, text.encode())


def _chosen(codes: NDArray[np.int64], samples: int) -> list[int]:
    """Return the rows to show; `codes` counts each row's voxels of each code of `evolution`."""
    new, changed = codes[:, NEW] > 0, (codes[:, VANISHED:] > 0).any(axis=1)
    groups = [np.flatnonzero(group) for group in (new, ~new & changed, ~new & ~changed)]
    shares = [samples - 2 * (samples // 6), samples // 6, samples // 6]
    counts = [min(len(g), share) for g, share in zip(groups, shares, strict=True)]
    for k, group in enumerate(groups):  # what one group lacks, the others give
        counts[k] += min(len(group) - counts[k], samples - sum(counts))
    spread = [np.linspace(0, len(g) - 1, n).round().astype(int) for g, n in zip(groups, counts, strict=True)]
    return [int(row) for group, at in zip(groups, spread, strict=True) for row in group[at]]


# What is in a box


def _seat(event: LesionEvent, recipe: Recipe) -> tuple[int, ...] | None:
    """Return the voxel of the turned box where a synthetic lesion's centre lies, None outside it."""
    if event.site is None:
        return None
    own = [c - s for c, s in zip(event.site.centre, recipe.box.start, strict=True)]
    last = recipe.box.size - 1
    if not all(0 <= c <= last for c in own):
        return None
    turn = recipe.orientation
    return tuple(last - own[a] if flip else own[a] for a, flip in zip(turn.axes, turn.flips, strict=True))


def _changes(recipe: Recipe, evolution: Picture) -> list[tuple[int, str]]:
    """Return code and description of the box's changing lesions: connected parts, matched with events."""
    found = []
    for code, kind in _KINDS.items():
        changed = evolution == code
        events = [e for e in recipe.events if e.kind == kind]
        parts, n = ndimage.label(changed | (evolution == STABLE) & (code in (ENLARGED, SHRUNK)), _AROUND)
        sizes = np.bincount(parts[changed], minlength=n + 1)
        seats = {e: seat for e in events if (seat := _seat(e, recipe))}
        others = " or ".join(sorted({e.source for e in events if e not in seats}))
        for part in sorted(np.flatnonzero(sizes), key=lambda p: -sizes[p]):
            equal = [e for e in events if e.lesion and abs(e.voxels[1] - e.voxels[0]) == sizes[part]]
            text = f"{kind}, {sizes[part]} mm³ in the box"
            if own := [e for e, seat in seats.items() if parts[seat] == part] or equal[:1]:
                extent = " and ".join(" → ".join(f"{v}" for v in e.voxels if v) for e in own)
                text = f"{kind}, {extent} mm³, {own[0].source}"
                if sizes[part] < sum(abs(e.voxels[1] - e.voxels[0]) for e in own):
                    text += f" ({sizes[part]} in the box)"
            elif others:
                text += f", {others}"
            found.append((code, text))
    return found


def _figures(baseline: NDArray, followup: NDArray, evolution: Picture, *, alt: str) -> str:
    """Return the four pictures of one slice."""
    figures = [
        f'<figure><img src="{data_uri(picture)}" width="{picture.shape[1]}" height="{picture.shape[0]}" '
        f'alt="{name}, {alt}"><figcaption>{name}</figcaption></figure>'
        for name, picture in panels(baseline, followup, evolution).items()
    ]
    return f'<div class="panels">{"".join(figures)}</div>'


def _chips(items: Iterable[tuple[str, str]]) -> str:
    """Return a list of texts, each with a dot of its colour."""
    dots = "".join(f'<li><i style="background:{colour}"></i>{text}</li>' for colour, text in items)
    return f'<ul class="chips">{dots}</ul>'


def _focus(evolution: Picture) -> tuple[list[int], NDArray[np.int64]]:
    """Return the slice of each axis through the box's foremost lesion, and the axes, best plane first."""
    codes = [c for c in (*_KINDS, STABLE) if (evolution == c).any()]
    if not codes:
        return [n // 2 for n in evolution.shape], np.array([2, 1, 0])
    parts, n = ndimage.label(evolution == codes[0], _AROUND)
    own = parts == 1 + np.bincount(parts.ravel(), minlength=n + 1)[1:].argmax()
    areas = [own.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return [int(a.argmax()) for a in areas], np.argsort([-a.max() for a in areas], kind="stable")


def _pair(number: int, subject: str, recipe: Recipe, baseline: NDArray, followup: NDArray, evolution: Picture) -> str:
    """Return the pictures of one pair with what is in its box."""
    at, axes = _focus(evolution)
    rows = []
    for axis in axes:
        plane = _PLANES[recipe.orientation.axes[axis]]
        name = f"plane across array axis {axis} at {at[axis]} (the scan's {plane})"
        cut = [upright(volume.take(at[axis], axis)) for volume in (baseline, followup, evolution)]
        rows.append((name, _figures(*cut, alt=f"pair {number}, {name}")))
    changes = [(COLOURS[code], text) for code, text in _changes(recipe, evolution)]
    placed = "placed uniformly"
    if recipe.box.placed == "event":
        placed = "around a lesion that changes" if changes else "around a stable lesion"
    if stable := sum(e.kind == "stable" and _seat(e, recipe) is not None for e in recipe.events):
        changes.append((COLOURS[STABLE], f"stable, {stable} synthetic"))
    more = "".join(f"<p>{name}</p>{panels}" for name, panels in rows[1:])
    return (
        f"<article><h3>Pair {number} <span>subject {escape(subject)} · box {placed} · {rows[0][0]}</span>"
        f"</h3>{_chips(changes or [('none', 'no lesion that changes')])}<p>{_artifacts(recipe)}</p>{rows[0][1]}"
        f"<details><summary>the other two planes</summary>{more}</details></article>"
    )


def _artifacts(recipe: Recipe) -> str:
    """Return what the acquisition did to each visit, in words."""
    both = (("baseline", recipe.artifacts.baseline), ("follow-up", recipe.artifacts.followup))
    return "artifacts: " + "; ".join(
        f"{visit} {', '.join(escape(name) for name, _ in steps) or 'none'}" for visit, steps in both
    )


# Numbers and plots


def _head(index: Index, plan: dict[str, Any] | None, tally: _Tally, codes: NDArray[np.int64]) -> str:
    """Return what the run holds, in numbers."""
    pairs = tally.numbers.total()
    with_new = 1 - tally.numbers[0] / max(pairs, 1)
    tiles = {
        "pairs": f"{pairs}",
        "subjects": f"{len(index.subjects)}",
        "have new lesions in the brain": f"{with_new:.0%}",
        "have new lesions in the box": f"{np.mean(codes[:, NEW] > 0):.0%}",
    }
    counts = tally.events
    names = [SCHEMA, f"run {index.run_id}", f"index {str(index.sha256)[:16]}"]
    if plan:
        names.append(f"config {plan['config_sha256'][:16]}")
    tile = "".join(f"<div><dd>{value}</dd><dt>{name}</dt></div>" for name, value in tiles.items())
    rows = "".join(
        f"<tr><th>{kind}</th><td>{counts[kind, 'real']}</td><td>{counts[kind, 'synthetic']}</td></tr>"
        for kind in (*_KINDS.values(), "stable", "removed")
    )
    return (
        f'<section class="head"><dl>{tile}</dl><table><thead><tr><th>lesions, whole brain</th><td>real</td>'
        f"<td>synthetic</td></tr></thead><tbody>{rows}</tbody></table></section><p>removed: real lesions "
        f"taken out of both visits · {escape(' · '.join(names))}</p>"
    )


def _legend() -> str:
    """Return what the pictures' grays and colours mean."""
    stops = ",".join(f"rgb{tuple(int(c) for c in stop)}" for stop in DIFFERENCE_STOPS)
    bar = f'<b class="bar" style="background:linear-gradient(90deg,{stops})"></b>'
    kinds = {**_KINDS, STABLE: "stable"}.items()
    return (
        "<h2>Pairs</h2><p>Slices through the largest change of each pair, new lesions first. Gray: 0 to "
        f"{GRAY_TOP:g}, brain mode 1. Difference, follow-up minus baseline: <span>&minus;{DIFFERENCE_TOP} {bar} "
        f"+{DIFFERENCE_TOP}</span>. Outlined at follow-up:</p>{_chips((COLOURS[c], kind) for c, kind in kinds)}"
    )


def _histogram(series: dict[str, NDArray[np.int64]], ticks: dict[float, str], label: str) -> str:
    """Return a bar chart; `series` maps colours to counts per bin, `ticks` places in bins to texts."""
    left, right, base, n = 36, 500, 170, len(next(iter(series.values())))
    top = max(1, *(int(counts.max()) for counts in series.values()))
    step = next(s for e in range(12) for s in (10**e, 2 * 10**e, 5 * 10**e) if top <= 5 * s)
    bin_, unit, bar = (right - left) / n, 160 / top, (right - left) / n * 0.84 / len(series)
    parts = [f'<text x="{(left + right) / 2}" y="204" text-anchor="middle">{label}</text>']
    for y in range(0, top + 1, step):
        parts.append(f'<path d="M{left} {base - y * unit:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{base - y * unit + 4:.1f}" text-anchor="end">{y}</text>')
    for at, text in ticks.items():
        parts.append(f'<text x="{left + at * bin_:.1f}" y="{base + 15}" text-anchor="middle">{text}</text>')
    for k, (colour, counts) in enumerate(series.items()):
        for i in np.flatnonzero(counts):
            x, height = left + (i + 0.08) * bin_ + k * bar, counts[i] * unit
            size = f'y="{base - height:.1f}" width="{bar:.1f}" height="{height:.1f}"'
            parts.append(f'<rect x="{x:.1f}" {size} fill="{colour}"/>')
    return f'<svg viewBox="0 0 520 208" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _volumes(tally: _Tally) -> str:
    """Return histograms of the new lesions' volumes and of their number per recipe."""
    numbers = np.array([tally.numbers[n] for n in range(max(tally.numbers, default=0) + 1)])
    edges = np.geomspace(3, max([3000, *(voxels for _, voxels in tally.volumes)]) + 1, 25)
    series = {}
    for name, colour in _SOURCES.items():
        found = [(voxels, count) for (source, voxels), count in tally.volumes.items() if source == name]
        voxels, counts = np.array(found, np.int64).reshape(-1, 2).T
        series[colour] = np.histogram(voxels, edges, weights=counts)[0].astype(np.int64)
    scale = 24 / np.log(edges[-1] / 3)
    marks = {float(scale * np.log(v / 3)): f"{v}" for v in (3, 10, 30, 100, 300, 1000, 3000)}
    whole = {i + 0.5: f"{i}" for i in range(0, len(numbers), 1 + len(numbers) // 12)}
    per_recipe = _histogram({"var(--soft)": numbers}, whole, "new lesions in the whole brain")
    return (
        f'<h2>New lesions</h2><div class="plots"><figure>{_histogram(series, marks, "volume, mm³")}'
        f"<figcaption>lesions {_chips((c, name) for name, c in _SOURCES.items())}</figcaption></figure>"
        f"<figure>{per_recipe}<figcaption>recipes</figcaption></figure></div>"
    )


def _placements(tally: _Tally, plan: dict[str, Any] | None) -> str:
    """Return the synthetic lesions' centres over projections of the shipped lesion prior (a run keeps none)."""
    frequency, affine = lesion_prior()
    total = len(tally.new)
    some = np.linspace(0, total - 1, min(total, _MOST_DOTS)).round().astype(int)
    voxels = np.array(tally.places).reshape(-1, 3)[some] - affine[:3, 3]
    inside = ((voxels >= 0) & (voxels < frequency.shape)).all(axis=1)
    new = np.frombuffer(tally.new, bool)[some]
    figures = []
    for axis, sides in ((2, "left to right, front up"), (1, "left to right"), (0, "back to front")):
        x, y = (a for a in range(3) if a != axis)
        width, height = frequency.shape[x], frequency.shape[y]
        shade = upright(np.sqrt(frequency.max(axis=axis) / frequency.max()))
        drawn = f'<image href="{data_uri(gray_pixels(shade * GRAY_TOP))}" width="{width}" height="{height}"/>'
        for chosen, code in ((~new, VANISHED), (new, NEW)):
            at = "".join(f"M{v[x] + 0.5:g} {height - v[y] - 0.5:g}h0" for v in voxels[chosen & inside])
            drawn += f'<path class="dots" stroke="{COLOURS[code]}" d="{at}"/>'
        figures.append(
            f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="centres">{drawn}</svg>'
            f"<figcaption>{_PLANES[axis]}, {sides}</figcaption></figure>"
        )
    shipped = asset_hashes(SynthesisConfig())["prior"]
    other = "" if not plan or plan["assets"].get("prior", shipped) == shipped else " (not the run's own)"
    of_all = f" of {total}" if total > len(some) else ""
    return (
        f"<h2>Where synthetic lesions lie</h2><p>{int(inside.sum())} centres{of_all} over the shipped lesion prior"
        f"{other} (square root of its maximum along the line of sight)</p>"
        f"{_chips([(COLOURS[NEW], 'new'), (COLOURS[VANISHED], 'other kinds')])}"
        f'<div class="maps">{"".join(figures)}</div>'
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Synthetic pairs</title><style>{style}</style></head><body><main><h1>Synthetic pairs</h1>
{body}
</main></body></html>
"""
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2127;--soft:#667080;--line:#e3e6ea;--card:#f6f7f9}
@media(prefers-color-scheme:dark){
:root{--paper:#131519;--ink:#e6e9ee;--soft:#98a1af;--line:#2b3038;--card:#1c1f25}}
*{box-sizing:border-box}main{max-width:1100px;margin:auto;padding:2.5rem 1.25rem 4rem}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.9rem;letter-spacing:-.02em;margin:0 0 1.25rem}h2{font-size:1.3rem;margin:3rem 0 .5rem}
h3{font-size:1rem;margin:0}h3 span{font-weight:400;color:var(--soft);margin-left:.5rem}
p,figcaption,summary,dt,thead,.chips{font-size:.85rem}p,figcaption,summary,dt,thead{color:var(--soft)}
.head{display:grid;grid-template-columns:3fr 2fr;gap:2rem;align-items:start}
dl{display:grid;grid-template-columns:1fr 1fr;gap:.75rem;margin:0}
dl div{background:var(--card);border-radius:10px;padding:.9rem 1.1rem}
dd{margin:0;font-size:1.8rem;font-weight:600}figure{margin:0;min-width:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
td,th{padding:.28rem 0;border-bottom:1px solid var(--line)}
td{text-align:right}th{text-align:left;font-weight:400}
article{border-top:1px solid var(--line);padding:1.25rem 0}summary{cursor:pointer;margin-top:.5rem}
.chips{display:flex;flex-wrap:wrap;gap:0 1.1rem;margin:.25rem 0 .75rem;padding:0;list-style:none}
.chips i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em}
p span{white-space:nowrap}.bar{display:inline-block;width:7rem;height:.7em;border-radius:3px}
.panels{display:grid;grid-template-columns:repeat(4,minmax(0,max-content));gap:12px}
img{display:block;max-width:100%;height:auto;image-rendering:pixelated;border-radius:3px}
figcaption{display:flex}figcaption .chips{margin:0 1.1rem}
.plots{display:grid;grid-template-columns:1fr 1fr;gap:2rem}.plots path{stroke:var(--line)}
.maps{display:grid;grid-template-columns:182fr 182fr 218fr;gap:12px}
svg{display:block;width:100%}.maps svg{background:#000;border-radius:3px}
text{fill:var(--soft);font-size:12px}.dots{stroke-width:2;stroke-linecap:round}
@media(max-width:720px){.head,.plots,.maps{grid-template-columns:1fr}h3 span{display:block;margin:0}
.panels{grid-template-columns:1fr 1fr}}
"""
