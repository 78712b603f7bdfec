"""Labelled sets of photos, read from a folder per class, a CSV or a JSONL, and split.

How data flows: read.py chooses a reader. from_folder.py, from_csv.py and from_jsonl.py yield rows
as they are written. gather.py finds the photos of the rows, merges repeated rows and refuses
contradictions. The result is a LabelledPhotos (photos.py), which splits.py divides. Photos have
labels or, for regression, numbers.
"""

from vitlib.data.photos import LabelledPhotos, Photo
from vitlib.data.read import read_photos, read_split
from vitlib.data.splits import folds, split

__all__ = ["LabelledPhotos", "Photo", "folds", "read_photos", "read_split", "split"]
