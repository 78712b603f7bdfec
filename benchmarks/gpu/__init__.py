"""GPU benchmark: one run that measures and tests vitlib's CUDA path.

How data flows: run.py starts each part in its own process. A part appends each result to
results.jsonl as soon as it is measured (experiment.py). summary.py then makes summary.md.
benchmarks/README.md describes the requirements and the output.
"""

import sys
from pathlib import Path

# The scripts of benchmarks/ import each other by bare names. tests/ has equal names, hence append.
sys.path.append(str(Path(__file__).resolve().parents[1]))
