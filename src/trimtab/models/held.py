"""What a folder holds that can be run, told from its files alone, and the command that serves it.

    a run or a saved model     itself (native), and every export in it
    an export                  itself
    a GGUF file                itself

Nothing is loaded and nothing heavy imported, so a card, a page and `trimtab serve` can ask.
"""

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.models.whole import check
from trimtab.reading import read_mapping

_ENGINES = {
    "compressed-tensors": "vllm",
    "gptq": "vllm",
    "awq": "vllm",
    "dense": "vllm",
    "peft": "vllm",
    "gguf": "llama.cpp",
    "mlx": "mlx-lm",
}
_INSTALL = {
    "vllm": "pip install vllm",
    "llama.cpp": "https://github.com/ggml-org/llama.cpp (brew install llama.cpp; winget install llama.cpp)",
    "mlx-lm": "pip install mlx-lm",
}


@dataclass(frozen=True)
class Held:
    """A model in one format."""

    format: str
    """Of `trimtab formats`."""
    path: Path
    """What an engine is given: the folder, or the GGUF file."""
    rank: int = 0
    """The largest rank of an adapter, where it is one beside its base."""

    @property
    def engine(self) -> str | None:
        """The engine that serves it; None for trimtab's own format, which none reads."""
        return _ENGINES.get(self.format)

    @property
    def bytes(self) -> int:
        """Of its files; exports and checkpoints in its folder are not counted."""
        if self.path.is_file():
            return self.path.stat().st_size
        below = self.path / "base" if self.format == "peft" else None
        files = [*self.path.iterdir(), *([] if below is None or not below.is_dir() else below.iterdir())]
        return sum(f.stat().st_size for f in files if f.is_file())

    def command(self, port: int | None = None) -> list[str]:
        """The command that serves it.

        Args:
            port: to listen on; None for the engine's own.
        """
        listening = [] if port is None else ["--port", str(port)]
        if self.engine == "llama.cpp":
            return ["llama-server", "--model", str(self.path), *listening]
        if self.engine == "mlx-lm":
            return ["mlx_lm.server", "--model", str(self.path), *listening]
        if self.format == "peft":
            adapter = [
                "--enable-lora",
                "--lora-modules",
                f"{self.path.name or 'adapter'}={self.path}",
                "--max-lora-rank",
            ]
            return ["vllm", "serve", str(self.path / "base"), *adapter, str(_lora_rank(self.rank)), *listening]
        assert self.engine == "vllm", self.format
        return ["vllm", "serve", str(self.path), *listening]

    def line(self, port: int | None = None) -> str:
        """The same as it is typed."""
        return shlex.join(self.command(port))


def install(engine: str) -> str:
    """How an engine is installed."""
    return _INSTALL[engine]


def _lora_rank(rank: int) -> int:
    """The least that vLLM takes for an adapter of this rank: it knows powers of two, from 8, and a few more."""
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def held(path: Path) -> list[Held]:
    """The models in a folder: its own first, then its exports by name.

    Raises:
        UserError: if there is none.
    """
    if path.is_file() and path.suffix == ".gguf":
        return [Held("gguf", path)]
    if not path.is_dir():
        raise UserError(f"{path}: no such directory or .gguf file")
    home = path / "model" if not _own(path) and (path / "model" / "config.json").is_file() else path
    found = [*_own(home)]
    for folder in sorted(f for f in home.iterdir() if f.is_dir() and (f / "export.json").is_file()):
        found += _own(folder)
    if not found:
        raise UserError(f"{path}: holds no model: neither config.json nor a .gguf file; name the folder of a run")
    return found


def _own(folder: Path) -> list[Held]:
    """The model whose files lie in this very folder, if there is one."""
    adapter = _json(folder / "adapter_config.json")
    if adapter is not None and (folder / "base").is_dir():
        pattern = adapter.get("rank_pattern")
        ranks = [adapter.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
        return [Held("peft", folder, max((r for r in ranks if isinstance(r, int)), default=0))]
    files = sorted(folder.glob("*.gguf"))
    if files:
        return [Held("gguf", files[0])]
    config = _json(folder / "config.json")
    if config is None:
        return []
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if "quantization" in config and method is None:
        return [Held("mlx", folder)]
    names = {"trimtab": "native", None: "dense"}
    return [Held(names.get(method, str(method)), folder)]


def _json(file: Path) -> dict[str, Any] | None:
    return read_mapping(file, "write it again") if file.exists() or file.is_symlink() else None


def serving(path: Path, engine: str | None = None) -> list[Held]:
    """What of a folder an engine serves, the best first.

    Args:
        path: of a run, an export, or a GGUF file.
        engine: vllm, llama.cpp or mlx-lm; None for any.

    Raises:
        UserError: if nothing in it is for one, with the command that writes it.
    """
    if engine is not None and engine not in _INSTALL:
        raise UserError(f"--engine: {engine!r} is none of {', '.join(_INSTALL)}")
    there = held(path)
    found = [h for h in there if h.engine is not None and engine in (None, h.engine)]
    if not found:
        wanted = next((f for f, e in _ENGINES.items() if e == engine), "compressed-tensors")
        has = ", ".join(h.format for h in there)
        why = "which no engine serves" if engine is None else f"which is not for {engine}"
        more = "" if engine else " (for vLLM; or gguf, mlx)"
        raise UserError(
            f"{path}: holds {has}, {why}; write what is: trimtab export {path} --format {wanted}{more}; trimtab "
            f"chat {path} needs none"
        )
    return sorted(found, key=lambda h: list(_ENGINES).index(h.format))


def start_serving(what: Held, port: int | None = None) -> None:
    """Become the engine that serves it; this process ends with it.

    Raises:
        UserError: if the engine is not installed, or the files are not what was written.
    """
    check(what.path)
    command = what.command(port)
    program = shutil.which(command[0])
    if program is None:
        assert what.engine is not None
        raise UserError(f"{command[0]}: is not installed here; {what.engine}: {install(what.engine)}")
    os.execv(program, command)
