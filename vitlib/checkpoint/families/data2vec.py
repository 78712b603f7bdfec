"""Data2vec vision (2202.03555): BEiT's model under other names."""

from __future__ import annotations

from dataclasses import replace

from vitlib.checkpoint.families.beit import BEIT, NUMERICS
from vitlib.checkpoint.families.family import BASE, LARGE, Family, Published

FAMILY = Family(
    name="data2vec",
    title="data2vec vision",
    hf=replace(
        BEIT,
        model_type="data2vec-vision",
        class_name="Data2VecVision",
        prefix="data2vec_vision.",
        reads_head_dim=False,
    ),
    hf_published=(
        Published("data2vec-vision", *BASE, (16,), "", "facebook/data2vec-vision-base"),
        Published("data2vec-vision", *LARGE, (16,), "", "facebook/data2vec-vision-large"),
    ),
    hf_twin="beit",
    numerics=NUMERICS,
    original_wrapper="model",
)
