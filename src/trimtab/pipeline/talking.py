"""`trimtab chat`: whatever a folder holds, answered by whom it suits."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trimtab.devices import CPU
from trimtab.errors import UserError
from trimtab.evaluation import chat_llama_cpp
from trimtab.evaluation.chat import GREEDY, Chat, Sampling, Talk
from trimtab.models.held import Held, held
from trimtab.models.load import load_as_it_is
from trimtab.models.reload import reload
from trimtab.models.sources import resolve
from trimtab.models.whole import check
from trimtab.models.with_adapter import load_model

_BY_TRANSFORMERS = ("compressed-tensors", "gptq")
"""Formats that transformers reads by itself and we do not."""


def talk(
    path: str,
    *,
    system: str | None = None,
    sampling: Sampling = GREEDY,
    engine: str = "auto",
    device: torch.device = CPU,
) -> Talk:
    """A model to talk to.

    Args:
        path: a run's folder, a saved or exported model, a .gguf file, a hub id, or a PEFT LoRA that names its base.
        system: what the model is told first.
        sampling: how it answers.
        device: where transformers computes; llama.cpp decides for itself.
        engine: auto (llama.cpp for GGUF where llama-cpp-python is installed, else transformers), transformers or llama.cpp.

    Raises:
        UserError: if nothing here runs it.
    """
    if engine not in ("auto", "transformers", "llama.cpp"):
        raise UserError(f"--engine: {engine!r} is none of auto, transformers, llama.cpp")
    found = _found(path)
    if found is not None:
        check(found.path)
    gguf = found is not None and found.format == "gguf"
    if engine == "llama.cpp" and not (gguf and chat_llama_cpp.installed()):
        why = (
            "llama-cpp-python is not installed here: pip install llama-cpp-python"
            if gguf
            else f"{path} is not a GGUF file"
        )
        raise UserError(f"--engine: {why}; or leave it out")
    if found is not None and gguf and chat_llama_cpp.installed() and engine != "transformers":
        return chat_llama_cpp.LlamaChat(found.path, system, sampling)
    if found is not None and found.format == "mlx":
        raise UserError(f"{found.path}: MLX alone runs it: mlx_lm.chat --model {found.path}")
    if found is not None and found.format in _BY_TRANSFORMERS:
        return Chat(*_by_transformers(found.path, device), system, sampling)
    if found is None or found.format == "peft":
        return Chat(*load_model(path if found is None else str(found.path), device=device), system, sampling)
    return Chat(*load_as_it_is(str(found.path), device=device), system, sampling)


def _found(path: str) -> Held | None:
    """The first model that a local path holds; None for a PEFT adapter without its base in it."""
    local = resolve(path) if not Path(path).expanduser().exists() else Path(path).expanduser()
    if (local / "adapter_config.json").is_file() and not (local / "base").is_dir():
        return None
    return held(local)[0]


def _by_transformers(folder: Path, device: torch.device) -> tuple[Any, Any]:
    try:
        return reload(folder, "auto", device), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(
            f"{folder}: transformers cannot load it here ({str(error).splitlines()[0]}); chat with what it was made from"
        ) from error
