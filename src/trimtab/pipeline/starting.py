"""Starting the processes that a recipe asks for (`train.processes`), as torchrun does, and saying how to start several.

All of them run the same command. torch's launcher ends the rest when one has failed, and hands on Ctrl-C; of what it says
itself nothing is shown, since the process that failed has spoken. One that a signal ended could not: it is named here.
"""

import logging
import os
import shlex
import signal
import sys
import uuid
from collections.abc import Sequence

import torch

from trimtab import processes
from trimtab.recipe.recipe import Recipe, read

_MOST_SECONDS_TO_STOP = 600
"""After Ctrl-C the step that runs is finished and saved."""


def started(recipe: str, overrides: Sequence[str], flags: Sequence[str]) -> int | None:
    """Start the processes of a recipe and wait for them.

    Args:
        recipe: its file.
        overrides: as they stood on the command line.
        flags: of `trimtab run`.

    Returns:
        The exit status of the first that failed, or 0; None where this process carries out the recipe itself.
    """
    if processes.count() > 1:
        return None
    wanted = read(recipe, overrides).train.processes or 1
    return None if wanted == 1 else _start(wanted, ["-P", "-m", "trimtab", "run", recipe, *overrides, *flags])


def _start(count: int, arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))  # else all take all cores
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=_MOST_SECONDS_TO_STOP,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        why = ", mostly for want of memory" if name == "SIGKILL" else ""
        sys.stderr.write(
            f"error: process {rank} of {count} was ended by {name}{why}; --resume continues from the last step saved\n"
        )
        return 128 - int(failure.exitcode)
    except SignalException as error:  # handed on to all of them, of which the first has spoken
        return 128 + int(error.sigval)
    return 0


def hint(recipe: Recipe) -> tuple[str, ...]:
    """A line for a user who trains on one of several GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2 or processes.count() > 1 or not recipe.train.steps or recipe.train.shard == "none":
        return ()
    file = shlex.quote(recipe.file or "recipe.yaml")
    return (
        f"{gpus} GPUs are here, and this trains on one; all of them: add train.processes={gpus} to this command, or start "
        f"it by torchrun --nproc_per_node {gpus} -m trimtab run {file} ... (train.shard=fsdp shards the model)",
    )
