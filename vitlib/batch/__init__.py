"""Millions of images to shards of labels and embeddings; none is lost, and a kill costs a batch."""

from vitlib.batch.finish import Outcome
from vitlib.batch.run import run

__all__ = ["Outcome", "run"]
