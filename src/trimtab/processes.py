"""Several processes that train one model together: how many there are, which one this is, and what the first does alone.

    torchrun --nproc_per_node 2 -m trimtab run recipe.yaml          or `accelerate launch`, or `train.processes: 2`

The launcher says so in the environment (RANK, WORLD_SIZE, ...), and ends all of them when one has ended with an
error. What the first process finds or decides, `first` tells all; what reads or writes files goes through it. The others
wait for as long as that takes, hours of it if need be, in a group of their own on gloo, which no NCCL watchdog ends.

Of an error the process that has it speaks, once. Those that only hear of it wait to be ended, and say nothing.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trimtab import faults
from trimtab.ending import Terminated
from trimtab.errors import UserError
from trimtab.ranks import count, is_first, rank

_T = TypeVar("_T")
_PATIENCE, _END = timedelta(days=30), timedelta(seconds=20)
_groups: dict[Any, Any] = {}
"""The group that waits, by the group of all processes that it was made in."""
_word: list[dist.Store] = []
"""Where the block of `together` that runs leaves word, if one does."""


class Elsewhere(SystemExit):
    """Another process has failed, and says why."""


@contextmanager
def together(device: str = "auto") -> Iterator[None]:
    """Be one of several processes while the block runs; nothing where there is one.

    An error of this process leaves the block as it is, its number before a `UserError`; where another one failed first,
    what leaves is `Elsewhere`, after the starter had time to end this process.

    Args:
        device: what they are to compute on, by a name of `devices`.

    Raises:
        UserError: if there are more of them than GPUs on this machine, and each was to have one.
    """
    if count() == 1 or _word:
        yield
        return
    with ExitStack() as stack:
        if not dist.is_initialized():
            dist.init_process_group()
            stack.callback(dist.destroy_process_group)
            stack.callback(_groups.clear)
        _waiting()
        _word.append(_store())
        stack.callback(_word.clear)
        stack.push(partial(_hear, _word[0]))
        take_device(device)
        yield


def _waiting() -> Any:
    """The group that waits, made where there is none yet: every process has to ask."""
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()  # of processes that have met and parted before
        _groups[world] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _groups[world]


def take_device(name: str, key: str = "model.device") -> None:
    """Make the GPU of this process's number on this machine the current one, where it is to compute on one.

    Args:
        name: of `devices`; a number in it says nothing here.
        key: where it was named, for the message.

    Raises:
        UserError: if there are more processes than GPUs on this machine.
    """
    if (
        name.partition(":")[0] not in ("auto", "cuda")
        or "LOCAL_RANK" not in os.environ
        or not torch.cuda.is_available()
    ):
        return
    mine, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", mine + 1))
    if here > gpus:
        raise UserError(
            f"{key}: {name}: {here} processes were started on this machine, which has {gpus} "
            f"GPU{'s' if gpus > 1 else ''}; start {gpus}, or set {key}=cpu"
        )
    torch.cuda.set_device(mine)


def _store() -> dist.Store:
    """Where processes leave word for one another, even when they cannot meet any more."""
    port, began = int(os.environ["MASTER_PORT"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"trimtab/{began}", dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False))


def _hear(store: dist.Store, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
    """Raise `Elsewhere` if another process failed before this one, else let all know that it was this one."""
    if error is None:
        return
    if isinstance(error, KeyboardInterrupt):
        with suppress(dist.DistError, RuntimeError):
            # By SIGTERM the launcher ends those that did not fail.
            if isinstance(error, Terminated) and store.check(["failed"]):
                raise Elsewhere(1) from None
        return  # Ctrl-C reaches all of them, and the first one is to say how to continue
    me, failed = str(rank()), None
    with suppress(dist.DistError, RuntimeError):  # its keeper may be gone
        failed = None if isinstance(error, Elsewhere) else store.compare_set("failed", "", me).decode()
    if failed == me:
        if not is_first() and (line := faults.line(error)) is not None:
            said = f"process {me} of {count()}: {line}"
            if not isinstance(error, UserError):
                raise UserError(said) from error
            error.args = (said,)
        return
    with suppress(dist.DistError, RuntimeError):
        store.wait(["the end"], _END)  # of this process: the launcher sees that one has failed
    raise Elsewhere(1) from None


def barrier() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        dist.barrier(_waiting())


def first(call: Callable[[], _T]) -> _T:
    """What the first process gets from a call that it alone makes, in every process.

    Args:
        call: makes something that can be pickled.

    Raises:
        Elsewhere: in the others, where it fails.
    """
    if count() == 1:
        return call()
    done: list[Any] = [None]
    if is_first():
        with ExitStack() as failing:
            failing.callback(_say_failed)
            done = [pickle.dumps(call())]
            failing.pop_all()
    dist.broadcast_object_list(done, src=0, group=_waiting())
    if done[0] is None:
        raise Elsewhere(1)
    made: _T = pickle.loads(done[0])
    return made


def _say_failed() -> None:
    with suppress(RuntimeError):  # they may be gone
        dist.broadcast_object_list([None], src=0, group=_waiting())


def first_before(call: Callable[[], _T]) -> _T:
    """What every process gets from a call that it makes itself, the first one before the others: it fills their caches."""
    if count() == 1:
        return call()
    mine: list[_T] = []
    first(lambda: mine.append(call()))
    return mine[0] if mine else call()


def any_of(asked: bool) -> bool:
    """Whether any process asks."""
    if count() == 1:
        return asked
    flag = torch.tensor([int(asked)])
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=_waiting())
    return bool(flag)


def total(number: int) -> int:
    """The sum over all processes."""
    if count() == 1:
        return number
    found = torch.tensor([number])
    dist.all_reduce(found, group=_waiting())
    return int(found)
