"""How good a model is on labelled photos: numbers with intervals, pictures, one page.

How data flows: run.py checks that model, photos and folder fit, and asks the Predictor; fit.py and
calibration.py tune, keep and apply a temperature and thresholds; measure.py turns answers into
numbers; table.py, pictures.py and page.py turn them into files; folder.py puts those in place.
"""

from vitlib.evaluate.evaluation import evaluate
from vitlib.evaluate.report import Report
from vitlib.evaluate.tuning import fit
from vitlib.predict.calibration import Calibration

__all__ = ["Calibration", "Report", "evaluate", "fit"]
