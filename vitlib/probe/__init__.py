"""Probes: how good a frozen model's features are on labelled photos, by layer and pooling.

How data flows: photos.py reads and checks the photos, division.py divides them into those that
heads are fitted to and those that measure. collect.py gets vectors of each layer and pool from the
model and the feature store. measure.py applies the methods (neighbours.py, logistic_head.py,
linear.py) to each, and journal.py stores what is finished. table.py makes rows with intervals,
head.py writes the best probe as a checkpoint, and files.py the report (figures.py, projection.py,
page.py). pipeline.py is the whole.

Sources: DINOv2's evaluation (Oquab et al. 2304.07193, section 7.1, and the code published with it).
"""

from vitlib.probe.logistic_head import LogisticHead, logistic
from vitlib.probe.neighbours import knn
from vitlib.probe.pipeline import run
from vitlib.probe.results import BestProbe, FewShotRow, ProbeReport, ProbeRow, SelectedRow

__all__ = [
    "BestProbe",
    "FewShotRow",
    "LogisticHead",
    "ProbeReport",
    "ProbeRow",
    "SelectedRow",
    "knn",
    "logistic",
    "run",
]
