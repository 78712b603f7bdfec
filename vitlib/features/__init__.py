"""Vectors of photos from any layer of a model, and a folder that stores them."""
