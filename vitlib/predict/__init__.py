"""Inference on images: Predictor gives labels, embeddings and attention.

predictor.py is what users call. engine.py runs batches, and attention.py computes attention maps.
optimized_model.py keeps the optimized copy of a model. calibration.py reads and writes
calibration.json.
"""
