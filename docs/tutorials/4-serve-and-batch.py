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
# # Serve a model, and label many photos
#
# You start a server and ask it as any program would. Then you label a whole folder in one run,
# which counts every photo, also the broken ones, and continues where it was stopped.
#
# You need `pip install 'vitlib[serve,plot]'`. The model is the small one in the package; put a
# hub id or a folder in place of `demo`.

# %%
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import vitlib
from vitlib import batch

samples = sorted((Path(vitlib.__file__).parent / "assets/demo/samples").glob("*.png"))
os.chdir(tempfile.mkdtemp())  # all files of this tutorial go to a new folder

# %% [markdown]
# ## Start a server
#
# In a terminal this is `vitlib serve demo`. Port 0 takes a free one, and the server's first line
# says which. It comes when the server is ready.

# %%
command = [sys.executable, "-m", "vitlib", "serve", "demo", "--port", "0"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
first_line = server.stderr.readline()
url = re.search(r"http://[\d.:]+", first_line)[0]
print(re.sub(r":\d+$", ":PORT", url))

# %% [markdown]
# The page at that address takes photos by hand: drop, paste or choose them. `/docs` lists every
# route. We use Python's own client. A photo is the body of the request as it is. In a terminal:
# `curl --data-binary @shirt.png http://127.0.0.1:8000/classify`.


# %%
def ask(path, body=None):
    """Return the status and the answer of a request: a POST where it has a body."""
    try:
        with urllib.request.urlopen(url + path, data=body, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


shirt = next(path for path in samples if path.stem == "shirt").read_bytes()
status, answer = ask("/classify?top_k=3", shirt)
print(status, json.dumps(json.loads(answer), indent=1))

# %% [markdown]
# The server gives the numbers of `Predictor`, whatever other photos are computed beside them.

# %%
best = json.loads(answer)["predictions"][0][0]
direct = vitlib.Predictor.load("demo").classify(shirt, top_k=1)[0][0]
print(f"{best['score']:.6f} from the server, {direct.score:.6f} from Python")
assert best["label"] == direct.label
assert abs(best["score"] - direct.score) < 1e-4

# %% [markdown]
# `/score` takes JSON, in the form of Azure's model catalog and in MLflow's. Photos are in base64.
# Its answer has every class, unless `params` ask for less.

# %%
encoded = [base64.b64encode(path.read_bytes()).decode() for path in samples[:3]]
request = {"input_data": {"columns": ["image"], "data": encoded}, "params": {"top_k": 1}}
status, answer = ask("/score", json.dumps(request).encode())
print(status, *json.loads(answer), sep="\n")

# %% [markdown]
# `/embed` gives vectors, and `/attend` maps of what a label rests on: numbers from 0 to 1, a row
# for each row of patches.

# %%
status, answer = ask("/attend?method=relevance&class=shirt", shirt)
values = np.array(json.loads(answer)["maps"][0])
figure, axes = plt.subplots(figsize=(3.2, 3.2), layout="constrained")
axes.imshow(Image.open(samples[7]), cmap="gray", extent=(0, 1, 1, 0))
axes.imshow(values, alpha=0.6, extent=(0, 1, 1, 0))
axes.set_axis_off()
plt.show()
assert samples[7].stem == "shirt"

# %% [markdown]
# ## When something is wrong
#
# Every error has a code, a sentence for a person, and the number of the image. One bad photo
# spoils a request, unless you ask for the others with `"on_error": "null"`.

# %%
for path, body in (
    ("/classify", b"not a photo"),
    ("/attend?class=skirt", shirt),
    ("/nothing", None),
):
    status, answer = ask(path, body)
    print(status, json.loads(answer)["error"]["message"], end="\n\n")
    assert 400 <= status < 500

# %%
request["input_data"]["data"] = [encoded[0], base64.b64encode(b"broken").decode()]
request["params"]["on_error"] = "null"
status, answer = ask("/score", json.dumps(request).encode())
print(status, *json.loads(answer), sep="\n")
assert status == 200

# %% [markdown]
# ## Many clients
#
# The server computes images of different requests together. We send 320 photos one after the
# other, and again with 16 clients at once. `/metrics` has histograms for Prometheus; the one of
# `vitlib_batch_images` counts how many images were computed together.


# %%
def count_batches():
    """Return the number of batches by size, from the server's metrics."""
    text = ask("/metrics")[1].decode()
    found = re.findall(r'vitlib_batch_images_bucket\{le="(\d+)\.0"\} (\d+)', text)
    at_most = {int(size): int(count) for size, count in found if int(size) <= 16}
    return dict(zip(at_most, np.diff([0, *at_most.values()]), strict=True))


def send(clients):
    """Send 320 photos from so many clients; return the batches that they made, by size."""
    before = count_batches()
    bodies = [path.read_bytes() for path in samples] * 32
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: ask("/classify?top_k=1", body), bodies))
    assert {status for status, _ in answers} == {200}
    return {size: count - before[size] for size, count in count_batches().items()}


alone, together = send(clients=1), send(clients=16)

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", sharey=True)
for axis, title, counts in zip(axes, ("1 client", "16 clients"), (alone, together), strict=True):
    axis.bar([f"{size}" for size in counts], counts.values())
    axis.set_title(title)
    axis.set_xlabel("images of a batch, at most")
axes[0].set_ylabel("batches")
plt.show()

# %%
print(f"{sum(alone.values())} batches for 1 client, {sum(together.values())} for 16 clients")
assert sum(alone.values()) == 320
assert sum(together.values()) < 160

# %% [markdown]
# A lone photo is computed at once, for no other was on its way. With many clients, batches form
# by themselves, and the model's work is shared. When more arrives than the server can do in
# `--max-backlog-ms`, it answers 429 with the time to wait, and does not fall behind.
#
# After SIGTERM the server answers what it accepted, and ends with status 0.

# %%
server.terminate()
print("exit status", server.wait(timeout=60))
server.stderr.close()
assert server.returncode == 0

# %% [markdown]
# ## A folder of many photos
#
# For photos that are all there already, no server is needed. We make a folder of 600: variations
# of the samples, three files that are no photos, and one copy.

# %%
random = np.random.default_rng(0)
Path("many").mkdir()
for number in range(600):
    path = samples[number % 10]
    photo = Image.open(path).convert("L").rotate(random.uniform(-15, 15), Image.Resampling.BILINEAR)
    photo.save(f"many/{number:03}-{path.stem}.png")
for number in (77, 150, 450):
    Path(f"many/{number:03}-broken.png").write_bytes(f"no photo, number {number}".encode())
Path("many/400-copy.png").write_bytes(Path("many/007-shirt.png").read_bytes())
Path("many/notes.txt").write_text("taken on Monday")

# %% [markdown]
# `batch.run` is `vitlib batch many --model demo --out labels --max-errors 1`. With at most one
# error allowed, it stops, says so, and keeps what it finished.

# %%
try:
    batch.run("many", model="demo", out="labels", max_errors=1, shard_size=200)
except vitlib.VitlibError as error:
    print(error)
print(sorted(path.name for path in Path("labels").iterdir()))

# %% [markdown]
# The same call continues the run, as it does after a kill: here with more errors allowed. It
# computes only the rows that are missing.

# %%
outcome = batch.run("many", model="demo", out="labels", max_errors=10)
print(f"{outcome.inputs} inputs: {outcome.ok} labelled, {outcome.failed} failed")
print(f"{outcome.computed} computed now, {outcome.duplicates} with the bytes of an earlier one")
print(f"{outcome.ignored} ignored")
assert outcome.complete
assert outcome.inputs == outcome.ok + outcome.failed == 604
assert outcome.failed == 3
assert 0 < outcome.computed < 604

# %%
for path in sorted(Path("labels").iterdir()):
    if path.is_file():
        print(path.name)
print()
print(Path("labels/errors.jsonl").read_text())

# %% [markdown]
# Every input has a row, in order, the failed ones with their error. Nothing is lost silently:
# `notes.txt` is named in `ignored.txt`, and the manifest has counts and a hash of every part.

# %%
parts = [f"labels/{name}" for name in outcome.files]
rows = [json.loads(line) for part in parts for line in Path(part).read_text().splitlines()]
assert [row["row"] for row in rows] == list(range(604))
labelled = [row for row in rows if row["error"] is None]
print(json.dumps(labelled[0], indent=1))

# %%
names = [Path(row["file"]).stem[4:].replace("-", " ") for row in labelled]
known = [(name, row) for name, row in zip(names, labelled, strict=True) if name != "copy"]
wrong = [
    (name, row["labels"][0], row["probs"][0]) for name, row in known if name != row["labels"][0]
]
print(f"{len(known) - len(wrong)} of {len(known)} turned photos keep their label")
assert len(wrong) < 100

# %% [markdown]
# ## Embeddings in the same run
#
# `task="both"` writes labels and vectors. In `npy` a part is an array of float32, with NaN where
# an input failed, and an index of names beside it.

# %%
both = batch.run("many", model="demo", out="vectors", task="both", format="npy", max_errors=10)
vectors = np.concatenate([np.load(path) for path in sorted(Path("vectors").glob("part-?????.npy"))])
readable = np.isfinite(vectors).all(axis=1)
print(vectors.shape, f"{readable.sum()} readable")
assert readable.sum() == both.ok

# %%
points = vectors[readable] - vectors[readable].mean(axis=0)
directions = np.linalg.svd(points, full_matrices=False)[2][:2]
x, y = (points @ directions.T).T
figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
for name in sorted({name for name, _ in known}):
    chosen = [label == name for label in names]
    axes.scatter(x[chosen], y[chosen], s=8, label=name)
axes.set_xlabel("first principal component")
axes.set_ylabel("second")
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
plt.show()

# %% [markdown]
# `vitlib similar photo.png vectors` finds the nearest of them for any photo.
#
# ## More
#
# - [Serving](../serving.md): every route and limit, keys, several GPUs, Kubernetes, capacity.
# - [Batch](../batch.md): lists, tar files and Parquet as sources, several machines, a billion
#   photos.
# - [Performance](../performance.md): `--precision bf16` and `int8`, and what they keep.
