"""Assemble the demo model of the package: a run on Fashion-MNIST, its metrics, sample photos.

    python examples/demo_model.py RUN REPORT FASHION vitlib/assets/demo

RUN is the output folder of `vitlib finetune`, REPORT that of `vitlib evaluate` on the test set, and
FASHION that of fashion_mnist.py, whose docstring has the commands. The samples are the first photo
of each class in the test set.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "train_config.yaml",
         "curves.png")  # fmt: skip
METRICS = ("accuracy", "f1_score_macro", "log_loss", "expected_calibration_error")
NOTICE = """The photos in this folder are of the test set of Fashion-MNIST (Xiao, Rasul and Vollgraf 1708.07747).

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""  # noqa: E501


def make_card(run: Path, report: Path) -> str:
    """Return the model card of the run with the metrics of the test set."""
    results = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    values, intervals = results["metrics"], results["intervals"]
    lines = [
        "## On the test set",
        "",
        "10,000 photos that neither trained the model nor chose it, measured by `vitlib evaluate`:",
        "",
        "| metric | value | 95 % interval |",
        "|---|---|---|",
    ]
    for name in METRICS:
        interval = "{:.4f} to {:.4f}".format(*intervals[name]) if name in intervals else ""
        lines.append(f"| {name} | {values[name]:.4f} | {interval} |")
    lines += [
        "",
        "It knows photos of one piece of clothing, light on black, and nothing else. The set is "
        "Fashion-MNIST (Xiao, Rasul and Vollgraf 1708.07747, MIT licence).",
        "",
    ]
    return (run / "README.md").read_text(encoding="utf-8") + "\n" + "\n".join(lines)


def main() -> None:
    """Copy the files, and write the card and the samples."""
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    run, report, fashion, out = map(Path, sys.argv[1:])
    samples = out / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(run / name, out / name)
    (out / "README.md").write_text(make_card(run, report), encoding="utf-8")
    for label in sorted((fashion / "test").iterdir()):
        shutil.copyfile(min(label.iterdir()), samples / f"{label.name.replace(' ', '-')}.png")
    (samples / "LICENSE").write_text(NOTICE, encoding="utf-8")


if __name__ == "__main__":
    main()
