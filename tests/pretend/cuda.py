"""Two CUDA devices that are not there: tensors that say they are on `cuda:0` and keep their numbers on the CPU.

`guard.cpp` tells torch that the devices exist; factories for them are registered here, and give tensors of `Pretend`, whose
operators are computed on the CPU after a look at where their arguments are:

    Mixed         a tensor of the host, or of the other device, among the arguments raises it (numbers of no dimension may
                  come from the host, and an index, as with a real device)
    SYNCS         what a real device would be waited for, with the place in trimtab that asked
    COUNTS        how often trimtab's operators and products were computed on each device
    kernels       trimtab's operators look at their arguments as its Triton kernels do, then run in eager torch

FakeTensorMode cannot stand for this: its backward pass needs a real device. None of it can be undone, so it is only in
processes that the fixture `pretend_cuda` starts (`sitecustomize.py` beside this file), and in those that these start.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import traceback
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++") or shutil.which("clang++")


def built() -> Path:
    """`guard.cpp`, compiled against the installed torch, which need not be imported."""
    version, spec = importlib.metadata.version("torch"), importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    of = (HERE / "guard.cpp").read_bytes() + f"{version} {spec.origin}".encode()
    key = hashlib.sha256(of).hexdigest()[:16]
    folder = Path(os.environ.get("TRIMTAB_CACHE", Path.home() / ".cache" / "trimtab"))
    made, where = folder / f"pretend-cuda-{key}.so", Path(spec.origin).parent
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        new = made.with_suffix(f".{os.getpid()}")
        includes = [f"-I{where / 'include'}", f"-I{where / 'include/torch/csrc/api/include'}"]
        links = [f"-L{where / 'lib'}", f"-Wl,-rpath,{where / 'lib'}", "-ltorch_cpu", "-lc10"]
        command = [str(compiler()), "-O1", "-shared", "-fPIC", "-std=c++20", str(HERE / "guard.cpp"), "-o", str(new)]
        subprocess.run([*command, *includes, *links], check=True)
        os.replace(new, made)
    return made


# torch looks once for devices, while it is imported.
assert "torch" not in sys.modules, "the devices have to be there before torch is imported"
ctypes.CDLL(str(built()), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402
from torch.utils._python_dispatch import return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map  # noqa: E402

CAPACITY = 4 * 2**30
"""Bytes that each device says it has."""
SYNCS: Counter[str] = Counter()
COUNTS: Counter[tuple[str, str]] = Counter()
REFUSED: set[torch.dtype] = set()
"""Dtypes that the devices do not have."""
aten = torch.ops.aten


class Mixed(RuntimeError):
    """An operator was given tensors of several devices."""


def place(frames: int = 1) -> str:
    """Where in trimtab this is."""
    found = [f for f in traceback.extract_stack() if "/src/trimtab/" in f.filename]
    lines = [f"{f.filename.partition('/src/trimtab/')[2]}:{f.lineno}" for f in reversed(found)]
    return " < ".join(lines[:frames]) or "elsewhere"


# ---- memory ------------------------------------------------------------------------------------------------------


class Meter:
    """Bytes of the storages of one device."""

    def __init__(self) -> None:
        self.now, self.peak, self.held = 0, 0, dict[int, list[int]]()

    def hold(self, owner: "Pretend", storage: Any) -> None:
        key = storage._cdata
        entry = self.held.setdefault(key, [storage.nbytes(), 0])
        if not entry[1]:
            self.now += entry[0]
            self.peak = max(self.peak, self.now)
        entry[1] += 1
        weakref.finalize(owner, self.release, key).atexit = False

    def release(self, key: int) -> None:
        entry = self.held[key]
        entry[1] -= 1
        if not entry[1]:
            self.now -= self.held.pop(key)[0]


METERS = [Meter(), Meter()]


# ---- tensors -----------------------------------------------------------------------------------------------------


class Pretend(torch.Tensor):
    """A tensor of a device that is not there."""

    kept: torch.Tensor
    """Its numbers."""
    where: torch.device

    @staticmethod
    def __new__(cls, kept: torch.Tensor, where: torch.device) -> "Pretend":
        assert type(kept) is torch.Tensor, type(kept)
        if kept.dtype in REFUSED:
            raise TypeError(f"the device has no {kept.dtype}: {place(3)}")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            kept.size(),
            strides=kept.stride(),
            storage_offset=kept.storage_offset(),
            dtype=kept.dtype,
            layout=kept.layout,
            device=where,
        )
        made.kept, made.where = kept, where
        METERS[where.index].hold(made, kept.untyped_storage())
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"Pretend({self.kept!r}, {self.where})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        wait("tolist")
        return self.kept.tolist()

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: "Pretend") -> None:
        torch.Tensor.data.__set__(self, value)
        METERS[value.where.index].hold(self, value.kept.untyped_storage())
        self.kept, self.where = value.kept, value.where

    def untyped_storage(self) -> Any:
        """A search for tensors that share memory finds what they keep."""
        return self.kept.untyped_storage()

    def data_ptr(self) -> int:
        return self.kept.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:  # `copy.deepcopy` and checkpoints
        return _again, (self.kept, str(self.where))


def _again(kept: torch.Tensor, where: str) -> Pretend:
    return Pretend(kept, torch.device(where))


def plain(value: Any) -> Any:
    return value.kept if isinstance(value, Pretend) else value


def wait(what: str) -> None:
    """Note that the host waits for the device here."""
    SYNCS[f"{what} {place(3)}"] += 1


def numbered(device: Any) -> torch.device:
    found = torch.device(device)
    return found if found.index is not None else torch.device(found.type, torch.cuda.current_device())


_WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten._unique2.default,
}
_INDEXED = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute an operator, after a look at where its arguments are."""
    flat = tree_flatten((args, kwargs))[0]
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    here = {t.where for t in tensors if isinstance(t, Pretend)}
    name = str(func)
    if func is aten._to_copy.default:
        return _to_copy(func, args[0], kwargs)
    if func is aten.copy_.default:
        return _copy(args[0], args[1])
    if len(here) > 1:
        raise Mixed(f"{name}: {sorted(map(str, here))} at {place(3)}")
    host = [t for t in tensors if not isinstance(t, Pretend) and t.dim()]
    if host and not (func in _INDEXED and isinstance(args[0], Pretend)):
        shapes = [tuple(t.shape) for t in host]
        raise Mixed(f"{name}: {next(iter(here), 'cuda')} and the host's {shapes} at {place(3)}")
    if func in _WAITS:
        wait(name)
    if func in _INDEXED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
        wait(f"{name} by booleans")
    if name.startswith("trimtab.") and (short := name.split(".")[1]) in _operators():
        return _kernel(short, args, here)
    if name.startswith(("aten.mm.", "aten.bmm", "aten.addmm.", "trimtab.")):
        COUNTS[name.rpartition(".")[0], str(next(iter(here), "cpu"))] += 1
    target: torch.device | None = next(iter(here), None)
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        target, kwargs = (numbered(asked) if asked.type == "cuda" else None), {**kwargs, "device": torch.device("cpu")}
    kwargs = {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs
    a, k = tree_map(plain, (args, kwargs))
    made = _softmax(func, *a) if func in _SOFTMAX else func(*a, **k)
    if target is None:
        return made
    wrapped = tree_map(lambda t: Pretend(t, target) if type(t) is torch.Tensor else t, made)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if here else wrapped


_SOFTMAX = {
    aten._softmax.default,
    aten._log_softmax.default,
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
}


def _softmax(func: Any, first: torch.Tensor, *rest: Any) -> torch.Tensor:
    """A GPU goes from half precision to single and back in these; the CPU's refuse to."""
    if isinstance(rest[-1], bool):
        return func(first.float(), rest[0], False) if rest[-1] else func(first, *rest)
    made: torch.Tensor = func(first, *rest[:-1], first.dtype).to(rest[-1])
    return made


def _to_copy(func: Any, x: Any, kwargs: dict[str, Any]) -> Any:
    here = x.where if isinstance(x, Pretend) else torch.device("cpu")
    there = here if kwargs.get("device") is None else torch.device(kwargs["device"])
    options = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
    if here.type == "cuda" and there.type == "cpu":
        wait("to the host")
    made = func(plain(x), **options)
    return Pretend(made, numbered(there)) if there.type == "cuda" else made


def _copy(to: Any, given: Any) -> Any:
    if isinstance(given, Pretend) and not isinstance(to, Pretend):
        wait("to the host")
    plain(to).copy_(plain(given))
    return to


# ---- trimtab's operators --------------------------------------------------------------------------------------------


def _operators() -> dict[str, Any]:
    from trimtab.kernels.arguments import OPERATORS

    return OPERATORS


def _kernel(short: str, args: tuple[Any, ...], here: set[torch.device]) -> Any:
    """An operator of `kernels`, whose arguments its Triton kernel would take."""
    from trimtab.kernels import dequantize

    COUNTS[f"trimtab.{short}", str(next(iter(here)))] += 1
    _operators()[short].admit(args, "triton")
    return getattr(dequantize, f"_{short}")(*map(plain, args))


# ---- the devices -----------------------------------------------------------------------------------------------------


class _Properties:
    name, major, minor, total_memory, multi_processor_count = "pretended", 8, 0, CAPACITY, 8
    warp_size, gcnArchName, max_threads_per_multi_processor = 32, "", 2048


def _index(device: Any = None) -> int:
    if device is None:
        return torch.cuda.current_device()
    return device if isinstance(device, int) else numbered(device).index


_current = threading.local()


def _set_device(device: Any) -> None:
    _current.index = _index(device)


def _patch() -> None:
    cuda: Any = torch.cuda

    def nothing() -> Any:  # a function of its own each time: torch's compiler keeps a table of them
        return lambda *args, **kwargs: None

    memory = {
        "mem_get_info": lambda device=None: (CAPACITY - METERS[_index(device)].now, CAPACITY),
        "memory_allocated": lambda device=None: METERS[_index(device)].now,
        "memory_reserved": lambda device=None: METERS[_index(device)].now,
        "max_memory_allocated": lambda device=None: METERS[_index(device)].peak,
        "reset_peak_memory_stats": lambda device=None: vars(METERS[_index(device)]).update(
            peak=METERS[_index(device)].now
        ),
    }
    about = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: getattr(_current, "index", 0),
        "set_device": _set_device,
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_properties": lambda device=None: _Properties(),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)] * 2,
    }
    for name, value in {**memory, **about}.items():
        setattr(cuda, name, value)
    for name in ("_lazy_init", "synchronize", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state",
                 "set_rng_state_all", "ipc_collect", "reset_peak_memory_stats_"):  # fmt: skip
        setattr(cuda, name, nothing())
    for name in ("get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all"):
        setattr(cuda.random, name, getattr(cuda, name))
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # bitsandbytes takes it while it is imported
    cuda.memory.mem_get_info = cuda.mem_get_info
    torch.accelerator.synchronize = nothing()  # type: ignore[assignment]
    torch.accelerator.empty_cache = nothing()  # type: ignore[assignment]


def _save_numbers() -> None:
    """Have files hold what the tensors keep: safetensors takes pointers that they have not, and pickle their class."""
    import safetensors.torch as written

    def flatten(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        return flattened({name: plain(t.detach()) for name, t in tensors.items()}, *args, **kwargs)

    def save(value: Any, *args: Any, **kwargs: Any) -> None:
        saved(tree_map(plain, value), *args, **kwargs)

    flattened, written._flatten_as_ptr = written._flatten_as_ptr, flatten
    saved, torch.save = torch.save, save


_LIBRARIES: list[Any] = []


def _register() -> None:
    """Factories of the devices, on which all others are built."""
    library = torch.library.Library("aten", "IMPL", "CUDA")

    def empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
              memory_format: Any = None) -> Any:  # fmt: skip
        made = torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
        return Pretend(made, numbered(device))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
                      pin_memory: Any = None) -> Any:  # fmt: skip
        return Pretend(torch.empty_strided(size, stride, dtype=dtype), numbered(device))

    library.impl("empty.memory_format", empty)
    library.impl("empty_strided", empty_strided)
    _LIBRARIES.append(library)


def _make_from_numbers() -> None:
    """`torch.tensor(3, device="cuda")`, which fills memory behind the dispatcher's back."""
    inside = torch.tensor
    _device_constructors()  # while it is the one that `with torch.device("meta")` looks for

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return inside(data, device=device, **options)
        return inside(data, **options).to(numbered(device))

    torch.tensor = tensor


def _replace_parameters() -> None:
    """Have `module.to("cuda")` make new parameters: torch would write one class of tensor into the other."""
    inside = torch._has_compatible_shallow_copy_type

    def alike(input: torch.Tensor, from_: torch.Tensor) -> bool:
        return isinstance(input, Pretend) == isinstance(from_, Pretend) and inside(input, from_)

    torch._has_compatible_shallow_copy_type = alike


def install() -> None:
    """Have the two devices from now on, in this process."""
    if _LIBRARIES:
        return
    _patch()
    _save_numbers()
    _make_from_numbers()
    _replace_parameters()
    torch._C._set_only_lift_cpu_tensors(True)
    _register()
