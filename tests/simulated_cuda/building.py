"""Compiles device.cpp."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from pathlib import Path

ENVIRONMENT = "SIMULATED_CUDA"  # the library, in the environment of the processes that are to have devices
TORCH = Path(importlib.util.find_spec("torch").origin).parent
LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")


def build(directory: Path) -> Path:
    """Compile the device; takes half a minute of the processor."""
    library = directory / "simulated_cuda_device.so"
    includes = (TORCH / "include", TORCH / "include/torch/csrc/api/include", Path(sysconfig.get_path("include")))
    command = ["c++", "-shared", "-fPIC", "-std=c++20", "-O1", "-w", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    command += ["-DTORCH_EXTENSION_NAME=simulated_cuda_device", *(f"-isystem{path}" for path in includes)]
    command += [str(Path(__file__).with_name("device.cpp")), f"-L{TORCH / 'lib'}", *(f"-l{one}" for one in LIBRARIES)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise AssertionError("the device does not compile with this torch:\n" + "\n".join(errors[:20]))
    return library
