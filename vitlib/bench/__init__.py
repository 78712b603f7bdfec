"""Speed on this machine, of vitlib alone.

- model.py times a model in every precision, relative to the machine's own GEMM rate.
- exported.py times an exported file in its runtime.
- turns.py has the clock of both.
"""

from vitlib.bench.exported import measure_file
from vitlib.bench.model import measure, random_model
from vitlib.bench.turns import AS_LOADED, Bench, Timing
from vitlib.fast.flops import flops

__all__ = ["AS_LOADED", "Bench", "Timing", "flops", "measure", "measure_file", "random_model"]
