# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Features for research: trace, edit, segment
#
# You read any tensor inside a forward, change it and see what follows, and train a segmentation
# head on frozen features.
#
# You need `pip install 'vitlib[plot]'`. The model is the small one in the package; every line
# works the same with any other `ViT`. It is a plain `torch.nn.Module` of 6 blocks, 4 heads and
# tokens of 96 numbers.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import vitlib
from vitlib import explain

vit = vitlib.Predictor.load("demo")
model = vit.model.requires_grad_(False)  # frozen: this tutorial trains a head alone
depth, num_heads = model.config.depth, model.config.num_heads

samples = sorted((Path(vitlib.__file__).parent / "assets/demo/samples").glob("*.png"))
pixels = vit.image_processor(samples)
names = [label.replace(" ", "-") for label in vit.labels]
targets = torch.tensor([names.index(path.stem) for path in samples])
print(tuple(pixels.shape), f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## Trace: tensors of a forward, by name
#
# `model.trace` gives the logits and the tensors you name. `*` stands for any characters. No hook
# is registered, and gradients pass. The logits are those of `forward`, to the last bit.

# %%
logits, at = model.trace(pixels, ["blocks.3.attn.q", "blocks.*.resid"])
for name, tensor in at.items():
    print(f"{name:18}", tuple(tensor.shape))
assert torch.equal(logits, model(pixels))

# %% [markdown]
# `resid` is the residual stream after a block: all tokens, (photos, tokens, 96). The model puts
# only the last one through its norm and head. The *logit lens* does that with each of them, and
# shows when the answer forms.

# %%
lens = torch.stack(
    [
        model.forward_head(model.norm(at[f"blocks.{block}.resid"])).softmax(dim=1)
        for block in range(depth)
    ]
)  # (blocks, photos, classes)
true_class = lens[:, range(len(samples)), targets]
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for photo, path in enumerate(samples):
    axes.plot(range(depth), true_class[:, photo], label=path.stem, alpha=0.8)
axes.set_xlabel("after block")
axes.set_ylabel("probability of the true label")
axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
mean = true_class.mean(dim=1)
for block in range(depth):
    print(f"after block {block}: {mean[block]:.2f}")
assert torch.allclose(lens[-1], logits.softmax(dim=1), atol=1e-5)
assert mean[0] < 0.5 < mean[-1]
