"""Raw scans to cases in MNI space, and masks back to the scan's own grid (extra `prepare`)."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
