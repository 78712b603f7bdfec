"""Engines that run a batch: local threads, or actors of Ray Data."""
