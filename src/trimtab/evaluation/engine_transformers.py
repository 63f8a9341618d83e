"""The engine side of a parity check, transformers without trimtab: log-probabilities of a folder's model.

    python engine_transformers.py DIR TOKENS.safetensors OUT.safetensors [DEVICE]

Every engine's script has this contract: TOKENS holds `blocks`, int64 (W, L); OUT gets `logprobs`, float32 (W, L - 1, V),
those of each next token. It runs in a process, and if need be in a virtual environment, of its own. Where DIR holds LoRA
files (format peft), peft puts them on the base beside them.

Legend: W windows, L tokens in each, V vocabulary.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig


def load(folder: Path) -> Any:
    """The model of a folder, of the class that its config names, with its adapter if there is one."""
    adapted = (folder / "adapter_config.json").is_file()
    path = folder / "base" if adapted else folder
    (kind,) = AutoConfig.from_pretrained(path, trust_remote_code=False).architectures
    model = getattr(transformers, kind).from_pretrained(path, trust_remote_code=False)
    if not adapted:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def main(directory: str, tokens: str, out: str, device: str = "cpu") -> None:
    """Compute and write."""
    torch.set_num_threads(1)
    model = load(Path(directory)).eval().to(device)
    with torch.no_grad():
        found = [
            model(input_ids=ids.unsqueeze(0).to(device), use_cache=False).logits[0, :-1].float().log_softmax(-1).cpu()
            for ids in load_file(tokens)["blocks"]
        ]
    save_file({"logprobs": torch.stack(found)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
