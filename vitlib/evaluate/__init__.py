"""Evaluation of a model on labelled photos: metrics with intervals, figures, one HTML page.

How data flows: evaluation.py checks that model, photos and folder fit, and runs the Predictor.
tuning.py fits a temperature and thresholds, which predict/calibration.py stores and applies.
measurement.py computes the metrics. predictions.py turns predictions into a file, figures.py,
curves.py, regression_figures.py and mistakes.py into pictures in the colours of palette.py, and
html_report.py into a page, of the parts of page.py. folder.py puts the files in place.
"""

from vitlib.evaluate.evaluation import evaluate
from vitlib.evaluate.report import Report
from vitlib.evaluate.tuning import fit
from vitlib.predict.calibration import Calibration

__all__ = ["Calibration", "Report", "evaluate", "fit"]
