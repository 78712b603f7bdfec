"""Evaluation of a model on labelled photos: metrics with intervals, figures, one HTML page.

How data flows: evaluation.py checks that model, photos and folder fit, and runs the Predictor.
tuning.py fits a temperature and thresholds, which predict/calibration.py stores and applies.
measurement.py computes the metrics. predictions.py, figures.py, regression_figures.py and
html_report.py turn them into files, and folder.py puts the files in place.
"""

from vitlib.evaluate.evaluation import evaluate
from vitlib.evaluate.report import Report
from vitlib.evaluate.tuning import fit
from vitlib.predict.calibration import Calibration

__all__ = ["Calibration", "Report", "evaluate", "fit"]
