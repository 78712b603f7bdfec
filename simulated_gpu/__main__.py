"""Run a command on simulated GPUs; python -m simulated_gpu COMMAND ...

Settings, from the environment: SIMULATED_GPUS (1), SIMULATED_CAPABILITY (90), SIMULATED_MIB of each
GPU (16384), SIMULATED_TRACE=1 to name every kernel, SIMULATED_COMPUTE=0 to compute nothing, which
is fast, and shows what the host does alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from simulated_gpu.build import LIBRARIES, build

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Build the libraries where they are missing or old, and become the command."""
    command = sys.argv[1:]
    if not command:
        sys.exit("usage: python -m simulated_gpu COMMAND ..., such as pytest -m cuda")
    folder = build()
    environment = dict(os.environ)
    paths = [str(HERE / "site"), str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # torch finds its libraries by an RPATH, which precedes LD_LIBRARY_PATH, but not what is loaded.
    environment["LD_PRELOAD"] = ":".join(str(folder / library.name) for library in LIBRARIES)
    environment["TRITON_LIBCUDA_PATH"] = str(folder)
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        sys.exit(f"{command[0]} is not there")
    os.execve(program, command, environment)


if __name__ == "__main__":
    main()
