import platform
import subprocess
import sys

import pytest

PAGES_OF_A_TENSOR = 64 * 2**20 // 4096
SCRIPT = """
import resource, torch
from miti_detr.engine.cpu import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def faults_of_steps():
    for _ in range(8):  # the heap grows, sometimes once more a little later
        torch.ones(16 * 2**20)
    before = faults()
    for _ in range(4):
        torch.ones(16 * 2**20)
    return faults() - before
print(faults_of_steps())
assert keep_freed_memory()
print(faults_of_steps())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_memory_of_freed_tensors_is_used_again() -> None:
    """A tensor of 64 MiB, made four times: its pages come from the system each time, or never."""
    printed = subprocess.check_output([sys.executable, "-c", SCRIPT], text=True)
    default, kept = map(int, printed.split())
    assert default > PAGES_OF_A_TENSOR
    assert kept < PAGES_OF_A_TENSOR / 10
