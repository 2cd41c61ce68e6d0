"""Finding new lesions between two visits: networks, inference, scores.

Names resolve on first use, as the stub beside this file says where they are: scores cost no torch import.
"""

from __future__ import annotations

from synthlong.lazy import names_of

__getattr__, __dir__, __all__ = names_of(__name__, __file__)
