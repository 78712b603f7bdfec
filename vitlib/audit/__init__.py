"""Audit of a set of photos: duplicates, doubtful labels, odd and damaged photos.

How data flows: source.py reads the sets, labelled or not. vitlib.features gives an embedding and a
digest of each photo, inspection.py facts of its pixels, kept for a later audit. duplicates.py
proposes pairs (hashing.py, search.py), compares them (alignment.py) and groups them (grouping.py).
labels.py and judgement.py find doubtful labels, rarity.py odd photos and what to label next,
quality.py damaged photos. findings.py ranks all of them as rows of report.py, which files.py and
page.py write. audit.py runs these in order. thresholds.py says what decides.
"""

from vitlib.audit.audit import run
from vitlib.audit.report import AuditReport

__all__ = ["AuditReport", "run"]
