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
# # Export a model and run it without vitlib
#
# You write a model as one ONNX file, and run it with ONNX Runtime in a process that has neither
# vitlib nor torch. Then you make the file smaller, and measure what that costs.
#
# You need `pip install 'vitlib[export,plot]'` to write the file. To run it, `pip install
# onnxruntime pillow` is enough. The model is the small one in the package; put a hub id or a
# folder in place of `"demo"`.

# %%
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
from PIL import Image

import vitlib
from vitlib import export

samples = sorted((Path(vitlib.__file__).parent / "assets/demo/samples").glob("*.png"))
os.chdir(tempfile.mkdtemp())  # all files of this tutorial go to a new folder

# %% [markdown]
# ## Write the file
#
# `to_onnx` writes the file and opens it with ONNX Runtime. It computes photos one, two and five at
# a time, and compares every output with the model's. A file that differs is deleted. The
# comparison is kept beside the file, in `model.onnx.json`.

# %%
report = export.to_onnx("demo", "fp32/model.onnx")
print(report.path, f"{report.size / 1e6:.1f} MB")
for comparison in report.comparisons:
    print(f"{comparison.output}, batches of {comparison.batch}: {comparison.error:.1e} apart")
assert report.ok

# %% [markdown]
# The difference is relative: the largest, over the largest output. Here it is rounding in
# float32.
#
# The file holds the labels and the preprocessing too, as JSON in its metadata. Its input is the
# photo's own levels, 0 to 255: the normalisation is part of the graph.

# %%
session = onnxruntime.InferenceSession("fp32/model.onnx")
for tensor in (*session.get_inputs(), *session.get_outputs()):
    print(tensor.name, tensor.type, tensor.shape)
info = json.loads(session.get_modelmeta().custom_metadata_map["vitlib"])
print(info["labels"])
print({name: info["image_processor"][name] for name in ("size", "resample", "crop_size")})

# %% [markdown]
# ## Run it without vitlib
#
# This is the whole program. It resizes a photo by the rule of the file, and runs the file. Its
# last lines say which of the large libraries were loaded.

# %%
program = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("fp32/model.onnx")
info = json.loads(session.get_modelmeta().custom_metadata_map["vitlib"])
height, width = info["image_processor"]["size"]

for name in sys.argv[1:]:
    photo = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    photo = photo.resize((width, height), info["image_processor"]["resample"])
    pixels = np.asarray(photo).transpose(2, 0, 1)[None]
    (logits,) = session.run(["logits"], {"pixels": pixels})
    scores = np.exp(logits[0] - logits[0].max())
    scores /= scores.sum()
    print(f"{scores.max():.6f} {info['labels'][scores.argmax()]}")

for library in ("vitlib", "torch"):
    print(library, "was loaded" if library in sys.modules else "was not loaded")
"""
Path("run.py").write_text(program)
# -I: the process does not see this one's folder and PYTHONPATH.
command = [sys.executable, "-I", "run.py", *map(str, samples)]
done = subprocess.run(command, capture_output=True, text=True, check=True)
print(done.stdout)
assert done.stdout.endswith("vitlib was not loaded\ntorch was not loaded\n")

# %% [markdown]
# A model with a crop in its preprocessing needs two lines more: [the recipe](../export.md#recipes)
# has them, and the same in JavaScript and for other runtimes.
#
# These are the scores of the model in vitlib:

# %%
vit = vitlib.Predictor.load("demo")
for line, (best,) in zip(done.stdout.splitlines(), vit.classify(samples, top_k=1), strict=False):
    score, label = line.split(maxsplit=1)
    assert label == best.label
    assert abs(float(score) - best.score) < 1e-5
print("the same labels, and scores equal to 1e-5")

# %% [markdown]
# ## More outputs
#
# `outputs` also takes "embedding", "tokens" and "attention": the class token's attention in the
# last block, for each head. So a program without vitlib can search for photos that are alike, and
# draw where the heads read.

# %%
export.to_onnx("demo", "look/model.onnx", outputs=("logits", "embedding", "attention"))
looking = onnxruntime.InferenceSession("look/model.onnx")
pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in samples])
pixels = pixels.transpose(0, 3, 1, 2)  # the samples have the size of the input already
logits, embedding, attention = looking.run(["logits", "embedding", "attention"], {"pixels": pixels})
print(logits.shape, embedding.shape, attention.shape)
assert np.abs(embedding - vit.embed(samples)).max() < 1e-3

# %%
heads = attention[7, :, 1:].reshape(-1, 7, 7)  # without the class token, which comes first
figure, axes = plt.subplots(1, 1 + len(heads), figsize=(9, 2.2), layout="constrained")
axes[0].imshow(Image.open(samples[7]), cmap="gray")
for number, head in enumerate(heads):
    axes[1 + number].imshow(head)
    axes[1 + number].set_title(f"head {number}", fontsize=9)
for axis in axes:
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## Smaller files
#
# `precision="fp16"` stores weights in half the bits, for GPUs and for the size of the file.
# `precision="int8"` computes the blocks' linear layers in integers. It measures the range of each
# layer's input on photos, 32 or more: take some like those that will come. Ours are variations of
# the samples. We keep 100 for calibration, and judge on 200 others.

# %%
random = np.random.default_rng(0)


def vary(path):
    """Return a sample, turned a little, larger or smaller, and not as bright."""
    photo = Image.open(path).convert("L").rotate(random.uniform(-12, 12), Image.Resampling.BILINEAR)
    side = int(random.integers(24, 33))
    photo = photo.resize((side, side), Image.Resampling.BILINEAR)
    photo = photo.crop(((side - 28) // 2, (side - 28) // 2, (side + 28) // 2, (side + 28) // 2))
    factor = random.uniform(0.7, 1)
    return photo.point(lambda level: level * factor).convert("RGB")


calibration_photos = [vary(path) for path in samples * 10]
test_photos = [vary(path) for path in samples * 20]

# %%
reports = {
    "fp32": report,
    "fp16": export.to_onnx("demo", "fp16/model.onnx", precision="fp16"),
    "int8": export.to_onnx(
        "demo", "int8/model.onnx", precision="int8", calibrate=calibration_photos
    ),
}

# %% [markdown]
# An exported file is a model like any other: `Predictor.load` opens it, and its runtime computes.
# So we compare the three on our photos.

# %%
scores = {
    name: vitlib.Predictor.load(f"{name}/model.onnx").probabilities(test_photos) for name in reports
}
reference = scores["fp32"]
print("       size   largest change of a score   labels kept")
for name, values in scores.items():
    change = np.abs(values - reference).max()
    kept = (values.argmax(axis=1) == reference.argmax(axis=1)).mean()
    print(f"{name}  {reports[name].size / 1e6:.2f} MB  {change:24.4f}  {kept:12.1%}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.6), layout="constrained", sharey=True)
for axis, name in zip(axes, ("fp16", "int8"), strict=True):
    axis.plot([0, 1], [0, 1], color="0.8")
    axis.plot(reference.ravel(), scores[name].ravel(), ".", markersize=3)
    axis.set_title(name)
    axis.set_xlabel("score in fp32")
axes[0].set_ylabel("score in the smaller file")
plt.show()

# %%
kept = {
    name: (values.argmax(axis=1) == reference.argmax(axis=1)).mean()
    for name, values in scores.items()
}
is_changed = scores["int8"].argmax(axis=1) != reference.argmax(axis=1)
second, first = np.sort(reference, axis=1)[:, -2:].T
assert (first - second)[is_changed].max(initial=0) < 0.25
assert kept["fp16"] >= 0.995
assert kept["int8"] >= 0.95
assert reports["int8"].size < reports["fp16"].size < reports["fp32"].size

# %% [markdown]
# Points on the line have kept their score. In fp16 nothing moves that counts. In int8 scores move
# by a few per cent, where the model was in doubt. Labels change only between two that were close.
# Whether that is good enough depends on what you do with the answer, so measure it on photos of
# your own: `vitlib evaluate int8/model.onnx photos --out report`.
#
# ## Check a file again
#
# `verify` repeats the comparison of the export at any time: pixels first, then each output, for
# each photo. It tells whether a file still belongs to a checkpoint.

# %%
verdict = vitlib.checks.verify("fp32/model.onnx", against="demo")
largest = max(error for _, error in verdict.errors)
print(f"{verdict.verdict}: {len(verdict.errors)} comparisons, at most {largest:.1e} apart")
assert verdict.ok

# %% [markdown]
# ## More
#
# - [Export](../export.md): torch.export, OpenVINO, MLflow, ExecuTorch, sizes that vary, recipes
#   for ONNX Runtime, JavaScript and Triton.
# - [vitlib inside another program](../inside.md): exported files as models of vitlib, and files
#   of other exporters.
# - [One file to take along](../research.md#one-file-to-take-along): the model as source code that
#   needs torch alone.
# - On the command line: `vitlib export demo --format onnx --out model.onnx`.
