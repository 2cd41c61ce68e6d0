"""Raw scans to cases in MNI space, and masks back to the scan's own grid (extra `prepare`)."""

from __future__ import annotations

from synthlong.lazy import names_of

__getattr__, __dir__, __all__ = names_of(__name__, __file__)
