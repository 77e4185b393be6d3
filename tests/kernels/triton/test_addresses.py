"""Kernels address beyond 2^31 elements: the far end of an arena or run that is only reserved, not filled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAR = """
import torch
from kvtier.kernels.column_sums import triton as sums
from kvtier.kernels.gather_attention import triton as attention

# A stride of 32 bit, and a product of it that has more.
FAR = 2**30 + 64
storage = torch.UntypedStorage.from_file({path!r}, shared=True, nbytes=2 * (3 * FAR + 4096))
room = torch.empty(0, dtype=torch.float16).set_(storage)
generator = torch.Generator().manual_seed(0)
q, near = (torch.randn(1, 4, n, 16, generator=generator).half() for n in (1, 8))
plain = dict(scale=0.25, softcap=None, visible=None)

pages = room.as_strided((4, 8, 16), (FAR, 16, 1))
pages.copy_(near[0])
frames = torch.arange(4).view(1, 4, 1)
expected = attention.attend_run(q, near, near, **plain)
assert attention.attend_pages(q, pages, pages, frames, **plain).out.equal(expected.out), "pages"
run = pages.unsqueeze(0)
assert attention.attend_run(q, run, run, **plain).out.equal(expected.out), "heads"
lse = expected.lse
assert sums.column_sums(q, lse, run, **plain).equal(sums.column_sums(q, lse, near, **plain)), "column sums"

apart = room.as_strided((1, 1, 4, 16), (0, 0, FAR, 1))
held = apart.clone()
expected = attention.attend_run(q, held, held, **plain)
assert attention.attend_run(q, apart, apart, **plain).out.equal(expected.out), "slots"
print("far")
"""


def test_beyond_two_to_the_31_elements(tmp_path: Path) -> None:
    """In a process of its own: an address of 32 bit would end it."""
    if os.statvfs(tmp_path).f_flag & os.ST_RDONLY or not hasattr(os, "posix_fallocate"):
        pytest.skip("needs a file system with sparse files")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-c", FAR.format(path=str(tmp_path / "sparse"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "far"
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 2**24, "the file must be sparse"
