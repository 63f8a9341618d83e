"""`shim.c`, compiled, and its functions: what a process calls that was started with it (see `server`)."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("shim.c")
COUNTS, DIES = 0, -1
MISSING = "" if sys.platform == "linux" and shutil.which("cc") else "the shim needs Linux and a C compiler"
"""Why there is none here; "" where there is."""


def build(folder: Path) -> Path:
    """The shared library, compiled into a folder."""
    made = folder / "shim.so"
    command = [
        "cc",
        "-O1",
        "-Wall",
        "-Werror",
        "-U_FORTIFY_SOURCE",
        "-shared",
        "-fPIC",
        "-o",
        str(made),
        str(SOURCE),
        "-ldl",
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return made


def functions() -> Any:
    """Of the shim that this process was started with."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    library.faults_count.restype = ctypes.c_long
    return library
