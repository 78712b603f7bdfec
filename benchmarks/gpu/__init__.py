"""One run on a machine with a GPU that measures and tests all of vitlib's CUDA path.

How data flows: run.py starts each part as a process of its own; a part appends each number to
results.jsonl as soon as it is measured (experiment.py); summary.py makes summary.md of them.
benchmarks/README.md says what the machine needs and what comes out.
"""

import sys
from pathlib import Path

# The scripts of benchmarks/ import each other by their bare names. Last, as tests/ has some alike.
sys.path.append(str(Path(__file__).resolve().parents[1]))
