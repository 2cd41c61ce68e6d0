"""Synthetic longitudinal MS lesion data from single-visit FLAIR scans.

Names resolve on first use, as the stub beside this file says where they are (SPEC 1): `import synthlong` costs no torch
import.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.5.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
