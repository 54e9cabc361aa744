"""Settings of a process that computes on a CPU; they change the whole process."""

import ctypes
import platform

import torch
from detectron2.utils import comm

# mallopt options of glibc's malloc.h. They keep the top of the heap, and keep malloc from mapping
# large blocks outside of it.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def prepare_cpu() -> None:
    """Prepare a process that computes on a CPU; call it once, at the start of a command."""
    share_threads()
    keep_freed_memory()


def share_threads() -> None:
    """Divide the cores of this machine among its processes."""
    threads = torch.get_num_threads() // comm.get_local_size()
    torch.set_num_threads(max(1, threads))


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors and use it again.

    By default, glibc returns the memory of large tensors to the system. The next step then gets it
    back page by page, and the system fills each page with zeros. Other C libraries are not changed.

    Returns:
        Whether the setting has an effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
