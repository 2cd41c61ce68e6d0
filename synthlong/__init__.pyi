__version__: str

from .case import Case as Case
from .case import read_case as read_case
from .dataset.shards import ShardDataset as ShardDataset
from .dataset.stream import PairStream as PairStream
from .errors import InputError as InputError
from .errors import OutputError as OutputError
from .errors import ShardCorruptError as ShardCorruptError
from .errors import SynthlongError as SynthlongError
from .event import LesionEvent as LesionEvent
from .inpainting import Inpainter as Inpainter
from .manifest import read_cases as read_cases
from .painting import LesionPainter as LesionPainter
from .pair import Pair as Pair
from .pair import render as render
from .recipe import Recipe as Recipe
from .recipe import draw_recipe as draw_recipe
from .synthesis import SynthesisConfig as SynthesisConfig
