"""What a model looks at: `vitlib.explain.relevance(model, pixels)` and others, as arrays.

maps.py holds the mathematics, which knows no model; of_model.py asks a model and returns a map of
its patches or pixels; faithfulness.py says whether a map can be trusted; explicit.py is the forward
that gradients of attention need. plots.py makes pictures of all of it.
"""

from vitlib.explain.attention_with_grads import forward_explicit
from vitlib.explain.attribution import (
    attention_rollout,
    class_named,
    foreground,
    gradient,
    head_maps,
    occlusion,
    patch_features,
    patch_pca,
    probabilities,
    relevance,
    similarity,
)
from vitlib.explain.faithfulness import Faithfulness, faithfulness

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
