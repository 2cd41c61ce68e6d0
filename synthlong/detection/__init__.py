"""Finding new lesions between two visits: networks, inference, scores.

Names resolve on first use, as the stub beside this file says where they are (SPEC 1): scores cost no torch import.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
