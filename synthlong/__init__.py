"""Synthetic longitudinal MS lesion data from single-visit FLAIR scans.

Names resolve on first use, as the stub beside this file says where they are: `import synthlong` costs no torch
import.
"""

from __future__ import annotations

from synthlong.lazy import names_of

__version__ = "0.5.0"

__getattr__, __dir__, __all__ = names_of(__name__, __file__)
