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
# `model.trace` gives the logits and the tensors you name. No hook is registered, the model does
# not change, and gradients pass. The logits are those of `forward`, to the last bit.

# %%
logits, at = model.trace(pixels, ["blocks.3.attn.q", "blocks.3.resid"])
for name, tensor in at.items():
    print(f"{name:16}", tuple(tensor.shape))
assert torch.equal(logits, model(pixels))

# %% [markdown]
# Queries are (photos, heads, tokens, numbers of a head). `resid` is the residual stream after a
# block: all tokens, (photos, tokens, 96). `*` stands for any characters, so the next line takes
# the stream after every block. The last block then computes all tokens and not only the class
# token that the head reads, so that its logits agree to rounding.

# %%
logits, at = model.trace(pixels, ["blocks.*.resid"])
print(list(at))
assert torch.allclose(logits, model(pixels), atol=1e-4)

# %% [markdown]
# The model puts only the last of these through its norm and head. The *logit lens* does it with
# each of them, and shows when the answer forms.

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

# %% [markdown]
# After the first two blocks the lens hardly reads anything. Most of the answer forms in blocks 2
# and 3. That says where the answer can be read by the head, and not where it is made: the lens
# cannot read what the later blocks still have to translate. An experiment tells more.

# %% [markdown]
# ## Edit: change a tensor and see what follows
#
# `edit` has a function for a point. The forward continues with what it returns. First an
# ablation: without one head at a time, how much does the loss of the ten photos rise?

# %%
whole = F.cross_entropy(logits, targets)
rise = torch.zeros(depth, num_heads)
for block in range(depth):
    for head in range(num_heads):
        keep = torch.ones(num_heads)
        keep[head] = 0
        edit = {f"blocks.{block}.attn.heads": lambda z, keep=keep: z * keep[:, None, None]}
        ablated, _ = model.trace(pixels, edit=edit)
        rise[block, head] = F.cross_entropy(ablated, targets) - whole

# %%
figure, axes = plt.subplots(figsize=(4.2, 4), layout="constrained")
limit = float(rise.abs().max())
shown = axes.imshow(rise.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
axes.set_xlabel("head")
axes.set_ylabel("block")
axes.set_xticks(range(num_heads))
figure.colorbar(shown, ax=axes, label="rise of the loss without the head")
plt.show()
block, head = divmod(int(rise.argmax()), num_heads)
print(f"loss {whole:.3f}; highest rise {rise.max():.3f}, without head {head} of block {block}")
assert rise.max() < 0.2

# %% [markdown]
# No head is indispensable: without any one of them the photos keep nearly all of their scores.
# Two heads of the first block matter most.
#
# ## Patching: which tokens carry the answer
#
# We run the photo of a shirt. After one block we replace some tokens by those of a bag's photo at
# the same place, and let the other blocks run. If the answer becomes "bag", these tokens carried
# the answer at that depth. We do it twice: with the class token alone, and with all patches.

# %%
stems = [path.stem for path in samples]
shirt, bag = stems.index("shirt"), stems.index("bag")
num_tokens = at["blocks.0.resid"].shape[1]
is_class_token = torch.zeros(num_tokens, 1, dtype=torch.bool)
is_class_token[0] = True


def probability_of_bag(block, replaced):
    """Return the probability of "bag" for the shirt, with tokens of the bag after a block."""
    source = at[f"blocks.{block}.resid"][bag]
    edit = {f"blocks.{block}.resid": lambda x: torch.where(replaced, source, x)}
    patched, _ = model.trace(pixels[shirt : shirt + 1], edit=edit)
    return float(patched.softmax(dim=1)[0, targets[bag]])


class_token = [probability_of_bag(block, is_class_token) for block in range(depth)]
patches = [probability_of_bag(block, ~is_class_token) for block in range(depth)]

# %%
figure, axes = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
axes.plot(range(depth), class_token, "o-", label="class token replaced")
axes.plot(range(depth), patches, "o-", label="all patches replaced")
axes.set_xlabel("replaced after block")
axes.set_ylabel("probability of bag")
axes.legend()
plt.show()

# %% [markdown]
# Up to block 2 the answer follows the patches, from block 4 on the class token. In block 3 the
# model moves the answer from the patches to the class token.

# %%
print("class token:", *(f"{value:.2f}" for value in class_token))
print("patches:    ", *(f"{value:.2f}" for value in patches))
assert max(class_token[:3]) < 0.1 < 0.9 < min(class_token[4:])
assert max(patches[4:]) < 0.1 < 0.9 < min(patches[:3])

# %% [markdown]
# ## Features of patches
#
# `forward_intermediates` gives the tokens of the patches after the blocks you name, as maps where
# you ask with `reshape=True`. Any size of image works: the positions are resampled by the
# checkpoint's own rule. We lay four garments out on a canvas of 56 by 56 pixels, twice the size
# that the model was trained on.

# %%
kinds = ("background", "top", "trouser", "shoe", "bag")
kind_of = dict.fromkeys(stems, 1) | {"trouser": 2, "bag": 4}
kind_of |= dict.fromkeys(["sandal", "sneaker", "ankle-boot"], 3)
random = np.random.default_rng(0)


def draw_canvas():
    """Return a canvas with four garments, (56, 56) uint8, and the kind at each pixel."""
    canvas, mask = np.zeros((56, 56), np.uint8), np.zeros((56, 56), np.int64)
    for quarter, index in enumerate(random.choice(len(samples), 4, replace=False)):
        side = int(random.integers(20, 29))
        photo = Image.open(samples[index]).convert("L")
        photo = photo.rotate(random.uniform(-15, 15), Image.Resampling.BILINEAR)
        garment = np.asarray(photo.resize((side, side), Image.Resampling.BILINEAR))
        garment = garment[:, :: random.choice([-1, 1])]
        top, left = 28 * np.array(divmod(quarter, 2)) + random.integers(0, 29 - side, 2)
        canvas[top : top + side, left : left + side] = garment
        mask[top : top + side, left : left + side] = (garment > 25) * kind_of[stems[index]]
    return canvas, mask


canvases, masks = zip(*(draw_canvas() for _ in range(360)), strict=True)
keep_size = vit.image_processor.with_image_size(56)
images = keep_size([Image.fromarray(canvas).convert("RGB") for canvas in canvases])
masks = torch.from_numpy(np.stack(masks))
train, test = slice(0, 300), slice(300, 360)
print(tuple(images.shape), tuple(masks.shape))

# %%
with torch.inference_mode():
    features = torch.cat(
        [
            torch.cat(model.forward_intermediates(batch, [1, 3], reshape=True, norm=True), dim=1)
            for batch in images.split(60)
        ]
    ).clone()
print(tuple(features.shape))

# %% [markdown]
# `patch_pca` shows the first three principal components of the features as colours. Garments
# stand out from the background. Their colour says more of their place than of their kind: the
# model was trained on one garment in the middle. The kind lies in other directions of the
# features, which the head below finds.

# %%
colours = explain.patch_pca(model, images[test][:4], layer=3)
figure, axes = plt.subplots(2, 4, figsize=(8, 4.2), layout="constrained")
for column in range(4):
    axes[0, column].imshow(canvases[300 + column], cmap="gray")
    axes[1, column].imshow(colours[column])
for axis in axes.flat:
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## A segmentation head
#
# The head is two convolutions over the map of features. A patch has 4 by 4 pixels, so the second
# gives 16 answers for each patch, which `pixel_shuffle` lays out as pixels. The model stays
# frozen: its features are computed once, and training takes seconds.
#
# To know what the features are worth, we train the same head on the bare pixels of each patch.


# %%
def train_head(inputs, epochs=10):
    """Train a head on the training part, and return its answers for the test part, (N, H, W)."""
    torch.manual_seed(0)
    mean = inputs[train].mean(dim=(0, 2, 3), keepdim=True)
    inputs = (inputs - mean) / inputs[train].std(dim=(0, 2, 3), keepdim=True)
    head = torch.nn.Sequential(
        torch.nn.Conv2d(inputs.shape[1], 96, 3, padding=1),
        torch.nn.GELU(),
        torch.nn.Conv2d(96, len(kinds) * 16, 1),
        torch.nn.PixelShuffle(4),
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(300).split(20):
            loss = F.cross_entropy(head(inputs[train][batch]), masks[train][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        return head(inputs[test]).argmax(dim=1)


def intersection_over_union(answers):
    """Return the IoU of each kind over the pixels of all test canvases."""
    truth = masks[test]
    return [
        float(((answers == k) & (truth == k)).sum() / ((answers == k) | (truth == k)).sum())
        for k in range(len(kinds))
    ]


answers = {
    "pixels": train_head(F.pixel_unshuffle(images[:, :1], 4)),
    "features": train_head(features),
}

# %%
scores = {name: intersection_over_union(answer) for name, answer in answers.items()}
print(f"{'':10}", *(f"{kind:>10}" for kind in kinds), f"{'mean':>10}")
for name, values in scores.items():
    print(f"{name:10}", *(f"{value:10.2f}" for value in [*values, np.mean(values)]))
assert np.mean(scores["features"]) > np.mean(scores["pixels"]) + 0.2
assert np.mean(scores["features"]) > 0.75

# %%
figure, axes = plt.subplots(4, 4, figsize=(8, 8.2), layout="constrained")
for column in range(4):
    axes[0, column].imshow(canvases[300 + column], cmap="gray")
    for row, answer in enumerate((masks[test], answers["features"], answers["pixels"]), 1):
        axes[row, column].imshow(answer[column].numpy(), cmap="tab10", vmin=0, vmax=9)
for row, title in enumerate(("canvas", "truth", "from features", "from pixels")):
    axes[row, 0].set_ylabel(title)
for axis in axes.flat:
    axis.set_xticks([])
    axis.set_yticks([])
plt.show()

# %% [markdown]
# Both heads see the same canvases. On bare pixels the head tells garments from background, and
# guesses the kind. On features it finds the kind as well. The test canvases are new, but their
# garments are the ten of the samples: the figures say what a head learns from few canvases, and
# nothing about garments that it never saw.
#
# ## More
#
# - [vitlib in research code](../research.md): all points, attention of your own, adapters, fewer
#   tokens, one file to take along.
# - [Looking inside](../looking.md): the same calls beside those of timm, DINOv2 and transformers.
# - [Features](../features.md): vectors of any layer for many photos, computed once and stored.
