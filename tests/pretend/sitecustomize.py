"""Gives the pretended devices to a process that is started from one that has them (`cuda.environment`)."""

import os
import sys

if os.environ.get("TRIMTAB_PRETEND_CUDA"):
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import cuda

    cuda.install()
