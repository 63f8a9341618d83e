"""One thread: tensors here are tiny, and on a shared machine torch's threads would mostly wait for each other."""

import gc
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from elsewhere import called, value

torch.set_num_threads(1)

# Engines live in environments of their own, which `make test-serving` makes; it names this folder.
collect_ignore = [] if any("tests/serving" in argument for argument in sys.argv) else ["serving"]


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Runs and loads collect garbage: what was there before a file's tests, a million objects of libraries and thousands of
    tests, need not be looked through each time, which took most of the suite's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `model`, and data, `data.jsonl`; a file that needs more has a `given` of its own."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "model")
    tiny.text(folder / "data.jsonl")
    return folder


@pytest.fixture
def rows_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where many rows are stored, which is empty; every number of rows is many."""
    from trimtab.data import stored

    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    for name in ("LARGE_BYTES", "SOUGHT_BYTES"):
        monkeypatch.setattr(stored, name, 0)
    return tmp_path / "cache" / "data"


@pytest.fixture(scope="session")
def pretend_cuda() -> Iterator[Callable[..., Any]]:
    """Calls a function of a test's file in a process that has two CUDA devices (see pretend/cuda.py)."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    with pytest.MonkeyPatch.context() as patch:
        folder = str(Path(__file__).parent / "pretend")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")])))
        patch.setenv("TRIMTAB_PRETEND_CUDA", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    with pool:
        yield lambda function, *args: value(*pool.submit(called, function, *args).result())
