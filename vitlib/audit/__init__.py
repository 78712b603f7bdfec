"""Audit of a set of photos: duplicates, doubtful labels, odd and damaged photos."""
