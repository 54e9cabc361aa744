"""Using the cores and the memory of a CPU well. Changes the whole process: for commands only."""

import ctypes
import platform

import torch
from detectron2.utils import comm

# Of mallopt in glibc's malloc.h: never give the top of the heap back, and take no block from
# outside the heap
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def prepare_cpu() -> None:
    """Do what a process that computes on a CPU should do first."""
    share_threads()
    keep_freed_memory()


def share_threads() -> None:
    """Divide this machine's cores among its processes, so that they do not fight for them."""
    threads = torch.get_num_threads() // comm.get_local_size()
    torch.set_num_threads(max(1, threads))


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones.

    By default glibc returns the memory of large tensors to the system, and the same tensors of the
    next step get it back page by page, each filled with zeros. Other C libraries are left alone.

    Returns:
        Whether it has an effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
