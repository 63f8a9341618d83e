"""Every Triton kernel against its reference on the device (on a CPU in Triton's interpreter), and the tests of tests/gpu.

python benchmarks/gpu/run.py correct
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.device import Rows, arguments

ROOT = Path(__file__).parents[2]


def _environment(device: str) -> dict[str, str]:
    return {**os.environ, "TRIMTAB_TEST_DEVICE": device, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}


def _kernels(device: str, every: int) -> dict[str, Any]:
    """Cases of tests/kernels/test_triton.py: each compiles a kernel, so on a GPU not all of them fit the time."""
    command = [sys.executable, str(ROOT / "tests/kernels/test_triton.py"), "cases", str(every)]
    done = subprocess.run(command, env=_environment(device), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    found: dict[str, str] = json.loads(done.stdout)
    wrong = {name: how for name, how in found.items() if how}
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(found)} cases: {wrong}")
    return {"cases": len(found)}


def _tests(device: str, tiny: bool) -> dict[str, Any]:
    """tests/gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/gpu")]
    command += ["-k", "dl_dw"] if tiny else []
    done = subprocess.run(command, env=_environment(device), capture_output=True, text=True, cwd=ROOT)
    said = done.stdout.strip().splitlines()
    if done.returncode:
        raise AssertionError("\n".join(said[-30:]) + done.stderr[-500:])
    return {"said": said[-1] if said else ""}


def main() -> int:
    """Write the section."""
    args = arguments(__doc__)
    rows = Rows(args)
    rows.add("tests", lambda: _tests(args.device, args.tiny))
    rows.add("kernels", lambda: _kernels(args.device, 60 if args.tiny else 3))
    return rows.failed


if __name__ == "__main__":
    sys.exit(main())
