"""A row of AutoRound (arXiv 2309.05516), in the environment of `auto-round.txt`: its defaults, or another of its recipes.

What differs from its defaults is what all libraries share: the calibration windows, so many and so long, and float32.
"""

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = {
    "auto-round light": {"iters": 50, "lr": 5e-3},
    "auto-round": {"iters": 200},
    "auto-round best": {"iters": 1000},
}
"""What its command's recipes of these names say, and its default."""


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    windows = load_file(job["texts"])["train"][: job["calibration"]]
    made = Path(job["out"]).with_name("made")
    AutoRound(
        AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32),
        AutoTokenizer.from_pretrained(job["base"]),
        scheme="W4A16",
        bits=job["bits"],
        group_size=job["group"],
        sym=False,
        dataset=list(windows.split(1)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        **RECIPES[job["method"]],
    ).quantize_and_save(str(made), format="fake")
    (folder,) = made.iterdir()  # it names it after the model and the grid
    folder.rename(job["out"])


if __name__ == "__main__":
    main()
