from .config import PreparationConfig as PreparationConfig
from .native import to_native as to_native
from .run import prepare as prepare
from .scans import Scan as Scan
from .scans import find_scans as find_scans
