"""Inference on images: Predictor gives labels, embeddings and attention.

predictor.py is what users call. open_model.py opens a checkpoint, an optimized model or an exported
file. engine.py runs batches by the calls of backends.py, and attention.py computes attention maps.
optimized_model.py keeps the optimized copy of a model. calibration.py reads and writes
calibration.json. exported_model.py computes with a file by runtimes.py.
"""
