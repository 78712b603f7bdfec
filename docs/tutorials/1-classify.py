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
# # Classify photos and look inside
#
# You give a photo to a Vision Transformer, get a label, and see what the label rests on.
# At the end you know how far to trust the answer.
#
# You need `pip install 'vitlib[plot]'` and no network. The model is the small one inside the
# package: it knows ten kinds of clothes, in pictures of 28 by 28 pixels. Every line works the
# same with a larger model: put its name on the hub, or its folder, in place of `"demo"`.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import vitlib
from vitlib import explain, plots
from vitlib.retrieval import nearest

# %% [markdown]
# ## A label for a photo
#
# A `Predictor` is a model with its preprocessing and its labels. `classify` takes one photo or a
# list of them: paths, bytes, PIL images or arrays. It returns a list of predictions for each
# photo, the best first.

# %%
vit = vitlib.Predictor.load("demo")
samples = Path(vitlib.__file__).parent / "assets/demo/samples"
shirt = samples / "shirt.png"

predictions = vit.classify(shirt, top_k=4)[0]
for prediction in predictions:
    print(f"{prediction.score:.3f}  {prediction.label}")

# %%
plots.labels(shirt, predictions, title="shirt.png")

# %% [markdown]
# The scores are the softmax of the model's outputs: over all labels they sum to 1.
# `probabilities` gives all of them as an array, a row for each photo.

# %%
photos = sorted(samples.glob("*.png"))
scores = vit.probabilities(photos)
print(scores.shape, scores.sum(axis=1).round(4))
assert np.allclose(scores.sum(axis=1), 1, atol=1e-5)

# %%
answers = vit.classify(photos, top_k=2)
plots.contact_sheet(
    photos,
    [plots.caption_predictions(answer) for answer in answers],
    columns=5,
    names=[photo.stem for photo in photos],
)

# %% [markdown]
# All ten are right, and the coat is the least certain: a quarter of its score went to the
# pullover. We come back to it.

# %%
names = [label.replace(" ", "-") for label in vit.labels]
assert all(names[row.argmax()] == photo.stem for row, photo in zip(scores, photos, strict=True))
least = scores.max(axis=1).argmin()
print(f"least certain: {photos[least].stem}, {scores[least].max():.2f}")
assert photos[least].stem == "coat"

# %% [markdown]
# ## From pixels to tokens
#
# The model itself sees normalised pixels, (batch, channels, height, width). It cuts them into
# patches of 4 by 4 pixels. Each patch becomes a token, a vector of 96 numbers, and one further
# token, the class token, comes first. The blocks let the tokens exchange what they know. The
# head reads the class token alone.

# %%
model = vit.model
pixels = vit.image_processor([shirt])
with torch.inference_mode():
    tokens = model.forward_features(pixels)
    logits = model(pixels)
grid = model.patch_grid(pixels)
print("pixels", tuple(pixels.shape))
print("patches", grid, "of", model.config.patch_size, "pixels")
print("tokens", tuple(tokens.shape))
print("logits", tuple(logits.shape))
assert tokens.shape[1] == model.num_prefix_tokens + grid[0] * grid[1]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained")
left.imshow(Image.open(shirt), cmap="gray")
left.set_title("28 x 28 pixels, cut into 7 x 7 patches")
left.set_xticks(np.arange(0, 28, 4) - 0.5, [])
left.set_yticks(np.arange(0, 28, 4) - 0.5, [])
left.grid(color="tab:orange", linewidth=0.8)
lengths = tokens[0, 1:].norm(dim=1).unflatten(0, grid).numpy()
shown = right.imshow(lengths)
right.set_title("length of each patch's token")
right.set_axis_off()
figure.colorbar(shown, ax=right)
plt.show()

# %% [markdown]
# ## Photos that are alike
#
# `embed` gives the vector that the head reads. Photos that are alike have vectors of a similar
# direction, so that the cosine of two vectors tells how alike two photos are. `nearest` compares
# every query with every vector.

# %%
vectors = vit.embed(photos)
print(vectors.shape, vectors.dtype)
for photo, neighbours in zip(photos, nearest(vectors, vectors, top_k=2), strict=True):
    other = neighbours[1]  # the first neighbour of a photo is the photo itself
    print(f"{photo.stem:15} {other.cosine:5.2f}  {photos[other.index].stem}")

# %%
unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
figure, axes = plt.subplots(figsize=(5.4, 4.6), layout="constrained")
shown = axes.imshow(unit @ unit.T, vmin=-1, vmax=1, cmap="RdBu_r")
axes.set_xticks(range(10), [photo.stem for photo in photos], rotation=60, ha="right")
axes.set_yticks(range(10), [photo.stem for photo in photos])
figure.colorbar(shown, ax=axes, label="cosine")
plt.show()

# %% [markdown]
# The pairs that the model finds alike are those that a person would name: coat and pullover,
# shirt and T-shirt, boot and sneaker.

# %% [markdown]
# ## What the heads attend to
#
# `model.attention` gives the probabilities that `forward` uses, for each layer a tensor of
# (batch, heads, tokens, tokens). A row says from which tokens a token takes its next value, so
# each row sums to 1.

# %%
with torch.inference_mode():
    (last,) = model.attention(pixels, layers=[-1])
print(tuple(last.shape))
assert torch.allclose(last.sum(dim=-1), torch.ones(()), atol=1e-5)

# %% [markdown]
# `head_maps` takes the class token's row of every head in every layer, without the prefix tokens,
# on the grid of patches. Each tile has a scale of its own: bright is the head's strongest patch.

# %%
maps = explain.head_maps(model, pixels)[0]
plots.heads(
    maps, shirt, processor=vit.image_processor, title="The class token's attention, by layer"
)

# %% [markdown]
# Attention shows where a head reads. It does not show what it does with what it reads, and it is
# the same for every label. For the reason of one label there are other maps.

# %% [markdown]
# ## Why this label, and why not another
#
# `relevance` weighs each attention by the gradient of one class, so that it answers "which
# patches speak for this label?". We ask it about the coat, for its two best labels.


# %%
def show_maps(photo, maps, vmin=None, vmax=None):
    """Draw maps over a photo, side by side, each under its title."""
    _, axes = plt.subplots(1, len(maps), figsize=(2.6 * len(maps), 2.9), layout="constrained")
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        axis.imshow(Image.open(photo), cmap="gray", extent=(0, 1, 1, 0))
        axis.imshow(values, alpha=0.6, extent=(0, 1, 1, 0), vmin=vmin, vmax=vmax)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    plt.show()


# %%
coat = samples / "coat.png"
coat_pixels = vit.image_processor([coat])
best, second = vit.classify(coat, top_k=2)[0]
show_maps(
    coat,
    {
        f"{prediction.label} {prediction.score:.2f}": explain.relevance(
            model, coat_pixels, target=prediction.index
        )[0]
        for prediction in (best, second)
    },
)

# %% [markdown]
# `occlusion` asks more directly: it covers each part of the photo in turn, and measures by how
# much the label's probability falls. Where a value is below 0, covering the part raises the
# probability: that part speaks for the other label.

# %%
falls = {
    f"{prediction.label} {prediction.score:.2f}": explain.occlusion(
        model, coat_pixels, target=prediction.index
    )[0]
    for prediction in (best, second)
}
strongest = max(abs(values).max() for values in falls.values())
show_maps(coat, falls, vmin=-strongest, vmax=strongest)

# %% [markdown]
# The two maps are nearly each other's opposite: what speaks for the coat speaks against the
# pullover, since hardly any other label is in question.

# %%
first, other = (values.ravel() for values in falls.values())
correlation = np.corrcoef(first, other)[0, 1]
print(f"correlation of the two maps: {correlation:.2f}")
assert correlation < -0.9

# %% [markdown]
# `vitlib.plots` draws such a map ready to publish, with the label above it and a scale below it.

# %%
shirt_score = predictions[0]
plots.overlay(
    shirt,
    explain.occlusion(model, pixels)[0],
    processor=vit.image_processor,
    title=f"{shirt_score.label} {shirt_score.score:.2f}",
    subtitle="by how much the probability falls where a square covers the photo",
    scale="fall of the probability",
)

# %% [markdown]
# ## Can a map be trusted?
#
# A map is a claim: "these patches matter most". `faithfulness` tests it. Deletion removes the
# patches from the photo, the most important first. The sooner the probability falls, the truer
# the claim, so a low area below the curve is good. Insertion does the reverse on a blurred photo,
# and a high area is good. A map of random numbers says what no knowledge is worth.

# %%
all_pixels = vit.image_processor(photos)
claims = {
    "occlusion": explain.occlusion(model, all_pixels),
    "relevance": explain.relevance(model, all_pixels),
    "gradient": explain.gradient(model, all_pixels),
    "rollout": explain.attention_rollout(model, all_pixels),
    "random": np.random.default_rng(0).random((len(photos), *grid)),
}
results = {name: explain.faithfulness(model, all_pixels, claim) for name, claim in claims.items()}
for name, result in results.items():
    print(f"{name:10} {result.deletion.mean():.2f} {result.insertion.mean():.2f}")

# %%
plots.curves(
    results["random"].shares,
    {name: result.deletion_curve.mean(axis=0) for name, result in results.items()},
    "probability of the label, mean of ten photos",
)

# %% [markdown]
# Here occlusion is the map to trust most, and it costs a forward for each covered part. Each of
# the four is better than chance, in both tests. Ten photos are few: measure on photos of your own
# before you believe a map of your own model.

# %%
chance = results.pop("random")
for result in results.values():
    assert result.deletion.mean() < chance.deletion.mean()
    assert result.insertion.mean() > chance.insertion.mean()
assert min(results, key=lambda name: results[name].deletion.mean()) == "occlusion"

# %% [markdown]
# ## What the model does not know
#
# A classifier always answers, also where it has learned nothing. This one saw light clothes on
# black. We turn the photos into negatives, dark clothes on white.

# %%
negatives = [Image.fromarray(255 - np.asarray(Image.open(photo))) for photo in photos]
negative_answers = vit.classify(negatives, top_k=1)
plots.contact_sheet(
    negatives,
    [plots.caption_predictions(answer) for answer in negative_answers],
    columns=5,
    names=[photo.stem for photo in photos],
)

# %%
negative_scores = vit.probabilities(negatives)
right = [
    names[row.argmax()] == photo.stem for row, photo in zip(negative_scores, photos, strict=True)
]
print(f"{sum(right)} of {len(right)} right, highest score {negative_scores.max():.2f}")
assert sum(right) <= 3
assert negative_scores.max() > 0.9

# %% [markdown]
# Nearly all are wrong, and one of the wrong answers has a score above 0.9. A score compares the
# labels with each other. It says nothing of whether the photo is of a kind that the model was
# trained on. For that, look at photos of your own, measure on them with `vitlib.evaluate`, and
# train on them: [the next tutorial](2-finetune.py) does both.
#
# ## More
#
# - [Looking inside](../looking.md): all maps, and the paper of each.
# - [Gallery](../gallery.md): the same maps of a larger model on a real photo.
# - On the command line: `vitlib classify photo.jpg`, `vitlib attend photo.jpg --out map.png`,
#   `vitlib similar photo.jpg folder`.
