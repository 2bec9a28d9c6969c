"""What the figures rest on: shares, independent judges, FID, detection, alignment."""

from amg.evaluate.alignment import alignment, class_accuracy
from amg.evaluate.detection import auc, tpr_at_fpr
from amg.evaluate.diversity import diversity
from amg.evaluate.fid import fid, kid
from amg.evaluate.judges import MEMORIZED_CORRELATION, luminance_correlation, standardized_luminance
from amg.evaluate.shares import bootstrap_interval, memorized_share, share_interval, top1, top5

__all__ = [
    "MEMORIZED_CORRELATION",
    "alignment",
    "auc",
    "bootstrap_interval",
    "class_accuracy",
    "diversity",
    "fid",
    "kid",
    "luminance_correlation",
    "memorized_share",
    "share_interval",
    "standardized_luminance",
    "top1",
    "top5",
    "tpr_at_fpr",
]
