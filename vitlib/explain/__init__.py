"""Explanations of a model's output, as arrays: `vitlib.explain.relevance(model, pixels)`.

`maps.py` has the mathematics, on arrays. `attribution.py` returns maps of what a class depends on,
`features.py` maps that need no class. `faithfulness.py` measures whether a map can be
trusted. `attention_with_grads.py` is the forward that gradients of attention need. `vitlib.plots`
draws the maps.
"""

from vitlib.explain.attention_with_grads import forward_explicit
from vitlib.explain.attribution import (
    attention_rollout,
    class_named,
    gradient,
    occlusion,
    probabilities,
    relevance,
)
from vitlib.explain.faithfulness import Faithfulness, faithfulness
from vitlib.explain.features import (
    foreground,
    head_maps,
    patch_features,
    patch_pca,
    similarity,
)

__all__ = [
    "Faithfulness",
    "attention_rollout",
    "class_named",
    "faithfulness",
    "foreground",
    "forward_explicit",
    "gradient",
    "head_maps",
    "occlusion",
    "patch_features",
    "patch_pca",
    "probabilities",
    "relevance",
    "similarity",
]
