"""Python imports this file as it starts: operations on simulated GPUs are then computed."""

import os

if os.environ.get("SIMULATED_COMPUTE") != "0":
    from simulated_gpu import compute

    compute.install()
