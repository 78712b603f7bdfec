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
# # Fine-tune your photos and read the report
#
# You train a classifier on labelled photos of your own, and measure it on photos that it
# never saw. Then you read from the report what it can do, what it confuses, and how sure that is.
#
# You need `pip install 'vitlib[train,eval]'`. Here the photos are drawn: clothes with a print,
# plain, striped or dotted. The model in the package knows clothes and nothing of prints, so it
# has something to learn. For photos of your own, put a folder in place of `"photos"`. It has a
# folder for each class. A larger model goes in place of `"demo"`.

# %%
import csv
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import vitlib
from vitlib import plots
from vitlib.data import read_photos
from vitlib.evaluate import evaluate
from vitlib.train import TrainConfig, finetune

os.chdir(tempfile.mkdtemp())  # all files of this tutorial go to a new folder

# %% [markdown]
# ## The photos
#
# Each photo is one of the samples in the package, a little turned and moved, with a print of
# random position and contrast.

# %%
samples = Path(vitlib.__file__).parent / "assets/demo/samples"
random = np.random.default_rng(0)
rows, columns = np.mgrid[:28, :28]


def print_on(name):
    """Return the brightness of a print at each pixel, 0 to 1."""
    down, across = random.integers(0, 8, 2)
    on = np.ones((28, 28), bool)
    if name == "striped":
        on = (rows + down) % 8 < 4
    if name == "dotted":
        on = ((rows + down) % 7 >= 4) | ((columns + across) % 7 >= 4)
    return np.where(on, 1, random.uniform(0, 0.3))


def draw_photo(garment, name):
    """Return a photo of a garment with a print, (28, 28) uint8."""
    photo = Image.open(samples / f"{garment}.png").convert("L")
    photo = photo.rotate(
        random.uniform(-12, 12),
        Image.Resampling.BILINEAR,
        translate=tuple(random.integers(-2, 3, 2)),
    )
    pixels = np.asarray(photo)[:, :: random.choice([-1, 1])]
    return (pixels * print_on(name) * random.uniform(0.8, 1)).astype(np.uint8)


def write_photos(folder, garments, count):
    """Write a folder for each print, with so many photos of each garment."""
    for name in ("plain", "striped", "dotted"):
        Path(folder, name).mkdir(parents=True)
        for garment in garments:
            for number in range(count):
                photo = Image.fromarray(draw_photo(garment, name))
                photo.save(Path(folder, name, f"{garment}-{number:02}.png"))


# %% [markdown]
# The most important decision comes before any training: which photos measure the result. They
# must be new in the way that the photos of tomorrow will be new. We want prints to be told on any
# garment, so we keep four garments away from training altogether. If we divided the photos at
# random, copies of the same shirt would be on both sides, and the result would look too good.

# %%
new_garments = ["bag", "dress", "ankle-boot", "shirt"]
garments = [path.stem for path in sorted(samples.glob("*.png")) if path.stem not in new_garments]
write_photos("photos", garments, 20)
write_photos("new-photos", new_garments, 20)

photos, new_photos = read_photos("photos"), read_photos("new-photos")
print(len(photos.photos), "to train on:", photos.counts())
print(len(new_photos.photos), "to measure on:", new_photos.counts())
assert not {photo.path.name for photo in photos.photos} & {p.path.name for p in new_photos.photos}

# %%
some = [photo.path for photo in photos.photos[::30]]
plots.contact_sheet(some, [path.parent.name for path in some], columns=6)

# %% [markdown]
# ## Training
#
# With data, model and folder alone, the photos choose the settings. For so few photos, a linear
# head is fitted to the features of the model, and a short training of all layers follows.

# %%
done = finetune("photos", "demo", "mine")
print(f"{done.steps} steps, labels {done.labels}")

# %% [markdown]
# The second line above is a first estimate: heads that were fitted to four fifths of the photos,
# each measured on the other fifth. It is `done.fold_metrics`. It is an estimate for photos of the
# *same* garments.
#
# The folder is a complete checkpoint, with labels, preprocessing, settings and a model card.
# transformers opens it as well.

# %%
for path in sorted(Path("mine").iterdir()):
    print(path.name)
print(f"accuracy on folds: {done.fold_metrics['accuracy']:.2f}")

# %%
mine = vitlib.Predictor.load("mine")
photo = "new-photos/striped/dress-00.png"
plots.labels(photo, mine.classify(photo)[0], title=photo)

# %% [markdown]
# ## The report
#
# `evaluate` measures the model on labelled photos. It writes a folder with `report.html`, which
# needs no network, and returns the same numbers.

# %%
report = evaluate(mine, new_photos, "report")
for path in sorted(report.folder.iterdir()):
    print(path.name)

# %% [markdown]
# **The metric and its interval.** Accuracy is the share of photos whose best label is right. The
# interval says how much it could change with other photos of the same kind: with few photos it is
# wide. Always read both.

# %%
low, high = report.intervals["accuracy"]
print(f"accuracy {report.metrics['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}")
assert report.metrics["accuracy"] > 0.6  # one of three classes at random: 0.33

# %% [markdown]
# **Each class.** Recall is the share of a class's photos that were found. Precision is the share
# of right ones among the photos that were given this label. A class can have a high recall only
# because the model answers it too often: then its precision is low.

# %%
for row in report.per_class:
    print(
        f"{row.label:8} {row.support} photos, {row.predicted} predicted: "
        f"recall {row.recall:.2f}, precision {row.precision:.2f}"
    )
assert {row.support for row in report.per_class} == {80}

# %% [markdown]
# **What is confused with what.** A row of the matrix is a true class, a column an answer. The
# list below has the same, the most frequent mistake first.

# %%
Image.open("report/confusion.png").convert("RGB")

# %%
for true, predicted, count in report.confused:
    print(f"{true} photos answered {predicted}: {count}")

# %% [markdown]
# **The worst mistakes**, those with the highest wrong score. Look at them before you change any
# setting. Often the label is what is wrong, or the photo cannot be told by a person either. Here
# plain bags have a seam, and a narrow dress shows a single column of dots.

# %%
Image.open("report/mistakes.png").convert("RGB")

# %% [markdown]
# **Can the scores be believed?** Of the photos with a score of about 0.8, 80 % should be right.
# Points below the diagonal mean that the model is too sure. The expected calibration error is the
# mean distance from the diagonal. `evaluate(..., tune=...)` mends it with photos that neither
# train nor measure ([how](../finetuning.md#evaluating)).

# %%
print(f"expected calibration error: {report.metrics['expected_calibration_error']:.3f}")
Image.open("report/reliability.png").convert("RGB")

# %% [markdown]
# **Every photo** is a row of `predictions.csv`. We ask it which garments are hard.


# %%
def accuracy_by_garment(folder):
    """Return the share of right answers for each garment, from a report's predictions."""
    with Path(folder, "predictions.csv").open(encoding="utf-8", newline="") as file:
        answers = list(csv.DictReader(file))
    right = {}
    for answer in answers:
        garment = Path(answer["file"]).stem.rsplit("-", 1)[0]
        right.setdefault(garment, []).append(answer["true"] == answer["predicted"])
    return {garment: np.mean(values) for garment, values in sorted(right.items())}


by_garment = accuracy_by_garment("report")
for garment, share in by_garment.items():
    print(f"{garment:12} {share:.2f}")
assert min(by_garment, key=by_garment.get) == "dress"

# %%
odd = [f"new-photos/plain/{garment}-00.png" for garment in new_garments]
plots.contact_sheet(odd, [plots.caption_predictions(row) for row in mine.classify(odd)])

# %% [markdown]
# ## Training longer
#
# So the report says what to try: the model sees stripes where there are none. A hundred steps at
# a low rate, meant for photos like those that the model knows, did not teach it what a print is.
# We train six epochs at a higher rate. A setting of the training given by hand turns the
# automatic choice off: the defaults of
# `vitlib finetune --help` then apply, random crops among them, and a part of the photos chooses
# the best epoch.

# %%
config = TrainConfig.from_dict(
    {
        "num_train_epochs": 6,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "validation_split": 0.1,
    }
)
longer = finetune("photos", "demo", "longer", config=config)
print(f"step {longer.best_step} of {longer.steps} was the best")

# %%
epochs = [evaluation.epoch for evaluation in longer.evaluations]
figure, axes = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
axes.plot(epochs, [evaluation.train_loss for evaluation in longer.evaluations], label="training")
axes.plot(epochs, [evaluation.loss for evaluation in longer.evaluations], label="validation")
axes.set_xlabel("epoch")
axes.set_ylabel("loss")
axes.legend()
plt.show()

# %%
longer_report = evaluate(vitlib.Predictor.load("longer"), new_photos, "longer-report")
for name, measured in (("mine", report), ("longer", longer_report)):
    low, high = measured.intervals["accuracy"]
    value, error = (measured.metrics[key] for key in ("accuracy", "expected_calibration_error"))
    print(f"{name:7} accuracy {value:.3f} ({low:.3f} to {high:.3f}), calibration error {error:.3f}")
assert longer_report.intervals["accuracy"][0] > report.intervals["accuracy"][1]

# %%
longer_by_garment = accuracy_by_garment("longer-report")
positions = np.arange(len(by_garment))
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.bar(positions - 0.2, by_garment.values(), 0.4, label="mine")
axes.bar(positions + 0.2, longer_by_garment.values(), 0.4, label="longer")
axes.set_xticks(positions, by_garment)
axes.set_ylim(0, 1)
axes.set_ylabel("accuracy")
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# The intervals do not overlap: the longer training is better on these garments. Two cautions
# remain.
#
# - The interval takes each photo as a draw of its own. These are many views of four garments, so
#   that the figure for a fifth garment is less certain than the interval says.
# - If you try ten settings and take the best on the same new photos, its figure is too good. Let
#   a validation set choose, and measure at the end, once.
#
# ## More
#
# - [Fine-tuning and evaluating](../finetuning.md): every setting, several labels a photo,
#   numbers in place of classes, resuming after a kill.
# - [Probing](../probe.md): which model and which layer suit your photos, before any training.
# - [Audit](../audit.md): wrong labels, duplicates, and photos that are in both parts.
# - On the command line: `vitlib finetune photos --model demo --out mine`, then
#   `vitlib evaluate mine new-photos --out report`.
