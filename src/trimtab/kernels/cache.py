"""Where what is made once on a machine is kept: compiled kernels, scripts that take seconds to put together."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """`TRIMTAB_CACHE`, or the user's cache; it may not be there yet."""
    return Path(os.environ.get("TRIMTAB_CACHE") or platformdirs.user_cache_path("trimtab", appauthor=False))
