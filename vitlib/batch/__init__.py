"""Millions of images to shards of labels and embeddings; none is lost, and a kill costs a batch."""

from vitlib.batch.outcome import Outcome
from vitlib.batch.pipeline import run

__all__ = ["Outcome", "run"]
