"""One thread: tensors here are tiny, and on a shared machine torch's threads would mostly wait for each other."""

import sys

import torch

torch.set_num_threads(1)

# Engines live in environments of their own, which `make test-serving` makes; it names this folder.
collect_ignore = [] if any("tests/serving" in argument for argument in sys.argv) else ["serving"]
