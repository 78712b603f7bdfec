"""Probes: how good a frozen model's features are on labelled photos, by layer and pooling."""
