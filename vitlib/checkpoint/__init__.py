"""Checkpoints of every library: their layouts, adaptation to other sizes, and writing."""
