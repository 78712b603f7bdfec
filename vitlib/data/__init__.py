"""Labelled sets of photos: a folder a class, a CSV or a JSONL -> photos with labels or, for
regression, numbers; split.

How data flows: from_folder.py, from_csv.py and from_jsonl.py give rows as they are written;
gather.py finds their photos, puts together what belongs together and refuses what contradicts
itself; read.py chooses among them; photos.py holds the result, splits.py divides it.
"""

from vitlib.data.photos import LabelledPhotos, Photo
from vitlib.data.read import read_photos, read_split
from vitlib.data.splits import folds, split

__all__ = ["LabelledPhotos", "Photo", "folds", "read_photos", "read_split", "split"]
