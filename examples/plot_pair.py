"""The picture in the README: a pair of a run, cut through its largest new lesion.

Run `synthlong demo -o demo` first, then `python examples/plot_pair.py demo/pairs docs/pair.png [NUMBER]`. Without
NUMBER it shows the pair with the largest new lesion in its box.
"""

import argparse
from pathlib import Path

import numpy as np

from synthlong import Recipe, ShardDataset
from synthlong.pictures import panels, png_bytes, upright


def main(run: str, page: str, number: int | None = None) -> None:
    dataset = ShardDataset(run)
    if number is None:
        sizes = [int(dataset[k]["new_lesions"].sum()) for k in range(len(dataset))]
        number = int(np.argmax(sizes))
    sample = dataset[number]
    recipe = Recipe.from_json(sample["recipe"])
    across = recipe.orientation.axes.index(2)  # the scan's axial plane
    volumes = [sample[key][0].numpy() for key in ("baseline", "followup", "evolution")]
    new = sample["new_lesions"][0].numpy()
    at = int(new.sum(axis=tuple(a for a in range(3) if a != across)).argmax())
    cuts = [upright(v.take(at, across)) for v in volumes]
    shown = panels(*cuts, side=320)
    row = []
    for name in ("baseline", "follow-up", "difference", "follow-up, outlined"):
        picture = shown[name]
        row.append(picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2))
        row.append(np.full((picture.shape[0], 8, 3), 255, np.uint8))
    Path(page).write_bytes(png_bytes(np.concatenate(row[:-1], axis=1)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder that `generate` wrote")
    parser.add_argument("page", help="PNG file to write")
    parser.add_argument("number", type=int, nargs="?", help="of the pair")
    main(**vars(parser.parse_args()))
