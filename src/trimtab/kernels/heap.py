"""How glibc's heap keeps freed memory, and the two ways in which trimtab changes that. Elsewhere both do nothing.

    trim            hands freed pages back once, after a model was loaded layer by layer
    return_freed    has every large block handed back when it is freed, from then on, in the whole process

`return_freed` changes the process that imports trimtab, so it is done in one place (`tuning`), once, announced once
in the log, and left out where TRIMTAB_TUNE is 0.
"""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 4 << 20


def trim() -> None:
    """Hand freed heap pages back to the system.

    glibc keeps them between small tensors that live on: loading a 65 MB model in 4 bits left up to 250 MB resident.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if give_back is not None:
        give_back(0)


def return_freed() -> bool:
    """Have blocks of 4 MiB and more go back to the system as soon as they are freed, from now on in this process.

    glibc raises the size from which it maps blocks (up to 32 MiB) whenever one is freed, and keeps what is below.

    Returns:
        Whether this system's heap has the option.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)  # set once, it no longer moves
    return set_option is not None
