"""A GPU that is simulated on the CPU: torch's build for CUDA, on libraries of this folder.

    python -m simulated_gpu COMMAND ...        such as: pytest -m cuda, or vitlib classify ...

How data flows: build.py compiles cpp/ to libraries that have the names and functions of CUDA's
runtime and driver, cuBLAS, cuDNN and NCCL, and __main__.py starts a command that loads these
instead. So torch's own code for CUDA runs: its checks, allocator, streams, events, graphs and the
choice of kernels. Memory of the device is memory of the host. The libraries keep CUDA's rules for
captures and its limits of a launch. Their kernels do nothing: compute.py computes each operation
again, on the CPU, in the same memory. While a graph is captured it keeps the operations instead,
and computes them at each replay.

Numbers copied to pinned memory arrive when the host has waited for them. A process whose pinned
memory changes before it is copied ends with a line that says HAZARD. A trace (SIMULATED_TRACE=1)
names every kernel.

Not simulated: time; kernels that are wrong, as a test of one compares its definition with itself;
work of two streams at once; and what torch.compile generates, whose kernels are launched alone.
"""
