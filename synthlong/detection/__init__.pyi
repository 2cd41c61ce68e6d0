from .inference import detect as detect
from .inference import read_detectors as read_detectors
from .networks import ConcatUNet as ConcatUNet
from .networks import SegmentationUNet as SegmentationUNet
from .networks import SiameseUNet as SiameseUNet
from .scores import lesion_scores as lesion_scores
from .visits import read_visits as read_visits
