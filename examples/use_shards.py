"""Read what `generate` wrote: a DataLoader over shards; then a pair drawn and rendered by hand.

Run `synthlong demo -o demo` first, then `python examples/use_shards.py demo/pairs`.
"""

import argparse
import warnings
from dataclasses import replace

from torch.utils.data import DataLoader

from synthlong import Inpainter, Recipe, ShardDataset, SynthesisConfig, draw_recipe, read_cases, render
from synthlong.dataset.plan import bundled_cases
from synthlong.errors import InputWarning
from synthlong.inpainting import heal
from synthlong.recipe import rng_of


def main(run: str) -> None:
    for batch in DataLoader(ShardDataset(run), batch_size=4):
        print(tuple(batch["baseline"].shape), int(batch["new_lesions"].sum()), "voxels of new lesions")
        recipe = Recipe.from_json(batch["recipe"][0])
        print("  first:", recipe.case_id, [e.kind for e in recipe.events if e.source == "synthetic"])

    warnings.simplefilter("ignore", InputWarning)
    case = heal(next(iter(read_cases(bundled_cases()))), Inpainter.read())
    config = replace(SynthesisConfig(), with_new_lesions=1.0, real_share=0.0)
    pair = render(case, draw_recipe(case, config, rng_of(1, case.id, 0)))
    print("by hand:", pair.baseline.shape, int(pair.new_lesions.sum()), "voxels of new lesions")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder that `generate` wrote")
    main(parser.parse_args().run)
