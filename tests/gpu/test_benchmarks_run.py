"""`benchmarks/gpu/run.sh` in its tiny form on the CPU, so that it still runs on the day there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.kernels.cache import cache_folder

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("TRIMTAB_TEST_DEVICE", "cpu") != "cpu", reason="it is for CPUs on Linux"
)


def _run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    changed = {
        **os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TRIMTAB_CACHE": str(cache_folder().absolute())
    }  # fmt: skip
    command = [str(ROOT / "benchmarks/gpu/run.sh"), *options, "--out", str(out)]
    return subprocess.run(command, env=changed, capture_output=True, text=True)


@pytest.mark.slow
def test_every_section_ends_well_and_writes_its_numbers(tmp_path: Path) -> None:
    done = _run(tmp_path, "--device", "cpu", "--tiny")
    summary = json.loads((tmp_path / "summary.json").read_text())
    logs = "".join(log.read_text()[-3000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert summary.keys() == {"correct", "methods", "kernels", "steps", "generate"}
    for name in summary:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["rows"]
        assert found["environment"]["device"] == "cpu"
        assert not [row for row in found["rows"].values() if "error" in row]
    stages = json.loads((tmp_path / "methods.json").read_text())["rows"]["lr-qat"]["stages"]
    assert all(stages.values())
    steps = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert all(row["losses"][1] < row["losses"][0] for row in steps.values())


def test_a_section_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    """Both do here, since there is no such device; what they have is there all the same."""
    done = _run(tmp_path, "kernels", "generate", "--device", "meta", "--tiny")
    assert done.returncode == 2, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == {"kernels", "generate"}
    assert all(how["ended"].startswith("exit status") for how in summary.values())


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = _run(tmp_path)
    assert done.returncode == 2
    assert "torch sees no GPU here" in done.stderr
