"""Millions of images to shards of labels and embeddings, resumable after a kill."""

from vitlib.batch.outcome import Outcome
from vitlib.batch.pipeline import run

__all__ = ["Outcome", "run"]
