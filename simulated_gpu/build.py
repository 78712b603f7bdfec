"""Compile the simulated libraries, which have every name that the real ones export."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "cpp"
NOT_SUPPORTED = 801  # of CUDA's runtime
# Functions of the runtime without a source here that have nothing to do, and succeed.
IDLE = {
    "cudaDeviceSetGraphMemAttribute", "cudaKernelSetAttributeForDevice", "cudaLibraryUnload",
    "cudaMemPoolSetAccess", "cudaMemPoolSetAttribute", "cudaMemPoolTrimTo", "cudaMemcpyToSymbol",
    "cudaStreamUpdateCaptureDependencies", "cudaIpcCloseMemHandle",
}  # fmt: skip


class Library(NamedTuple):
    """A library that is simulated.

    Attributes:
        name: The name of its file, which is that of the real one.
        sources: Files in cpp/.
        status: What functions without a source return.
        idle: Names, beside those of the real library, of functions that return 0.
    """

    name: str
    sources: tuple[str, ...]
    status: int = 0
    idle: tuple[str, ...] = ()


DRIVER_IDLE = (
    "cuInit", "cuDevicePrimaryCtxRelease", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuCtxSetLimit",
    "cuCtxGetLimit", "cuModuleUnload", "cuFuncSetAttribute", "cuFuncSetCacheConfig",
    "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col",
)  # fmt: skip
LIBRARIES = (
    Library(
        "libcudart.so.13",
        ("devices.cpp", "memory.cpp", "streams.cpp", "graphs.cpp"),
        NOT_SUPPORTED,
    ),
    Library("libcuda.so.1", ("driver.cpp",), idle=DRIVER_IDLE),  # no build of torch brings it
    Library("libcublas.so.13", ("cublas.cpp",)),
    Library("libcublasLt.so.13", ("cublaslt.cpp",)),
    Library("libcudnn.so.9", ("cudnn.cpp",)),
    Library("libnccl.so.2", ("nccl.cpp",)),
)


def build() -> Path:
    """Compile what is missing or old.

    Returns:
        The folder of the libraries.
    """
    packages = find_packages()
    sources = sorted(path for path in HERE.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    digest.update(str(packages).encode())
    folder = HERE.parent / "build" / "simulated_gpu" / digest.hexdigest()[:16]
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for library in LIBRARIES:
            compile_library(library, packages, folder)
        (folder / "libcuda.so").unlink(missing_ok=True)
        (folder / "libcuda.so").symlink_to("libcuda.so.1")  # which Triton links its parts with
        (folder / "complete").touch()
    return folder


def find_packages() -> Path:
    """Find the folder of torch's packages.

    Returns:
        The folder.
    """
    spec = importlib.util.find_spec("torch")
    packages = Path(spec.origin).parent.parent if spec and spec.origin else None
    if packages is None or not list(packages.glob("nvidia/*/lib/libcudart.so.13")):
        sys.exit(
            "a simulated GPU needs torch's build for CUDA 13, as `make test-simulated` installs it"
        )
    return packages


def compile_library(library: Library, packages: Path, folder: Path) -> None:
    """Compile one library, with a function for every name that the real one exports.

    Args:
        library: The library.
        packages: The folder of torch's packages.
        folder: Where it is written.
    """
    texts = [(SOURCES / name).read_text() for name in library.sources]
    written = {name for text in texts for name in find_functions(text)}
    real = next(packages.glob(f"nvidia/*/lib/{library.name}"), None)
    names = {name.removeprefix("simulated_") for name in written}
    stubs = dict.fromkeys(library.idle, 0)
    if real is not None:
        stubs |= {
            name: 0 if name in IDLE else library.status
            for name in exported_names(real)
            if name not in names
        }
    stem = folder / library.name
    rest, versions = stem.with_suffix(".c"), stem.with_suffix(".map")
    rest.write_text(
        "".join(f"long {name}(void) {{ return {code}; }}\n" for name, code in stubs.items())
    )
    # torch asks for the functions of most libraries with a version, which is the library's name.
    label = f"{library.name} " if real is not None and "nccl" not in library.name else ""
    versions.write_text(f"{label}{{ global: *; }};\n")
    common = ["-O1", "-w", "-fPIC"]
    run("gcc", *common, "-c", rest, "-o", stem.with_suffix(".o"))
    include = ["triton/backends/nvidia/include", "nvidia/cudnn/include"]
    run(
        "g++", *common, "-shared", "-std=c++17", *(f"-I{packages / name}" for name in include),
        *(SOURCES / name for name in library.sources), stem.with_suffix(".o"), "-o", stem,
        f"-Wl,-soname,{library.name}", f"-Wl,--version-script={versions}", "-ldl", "-lrt",
        *(
            f"-Wl,--defsym,{name.removeprefix('simulated_')}={name}"
            for name in written
            if name.startswith("simulated_cudnn")
        ),
    )  # fmt: skip


def find_functions(source: str) -> list[str]:
    """Find the functions that a source exports.

    Args:
        source: The text of the source.

    Returns:
        Their names.
    """
    names = re.findall(r"^EXPORT [^;{(]*?(\w+)\(", source, re.MULTILINE)
    return [*names, *re.findall(r"^PRODUCT\((\w+)\)", source, re.MULTILINE)]


def exported_names(library: Path) -> set[str]:
    """List the functions that a library exports.

    Args:
        library: The file.

    Returns:
        Their names, without versions.
    """
    lines = run("nm", "-D", "--defined-only", library).splitlines()
    parts = (line.split() for line in lines)
    found = {part[2].split("@")[0] for part in parts if len(part) == 3 and part[1] in "TWi"}
    return {name for name in found if not name.startswith("_") or name.startswith("__cuda")}


def run(*command: object) -> str:
    """Run a command, and end the program with what it printed where it fails.

    Args:
        command: The words of the command.

    Returns:
        Its stdout.
    """
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr}")
    return done.stdout
