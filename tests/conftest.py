"""One thread: tensors here are tiny, and on a shared machine torch's threads would mostly wait for each other."""

import torch

torch.set_num_threads(1)
