"""Blocks of rows: they cover each row once, and are as large as asked for."""

import pytest
import torch

from kernels.common import rows
from kernels.common.rows import row_blocks


@pytest.mark.parametrize(
    "shape, dtype, elements, wanted",
    [
        ((7, 4), torch.float32, 8, [2, 2, 2, 1]),
        ((7, 4), torch.float64, 8, [2, 2, 2, 1]),  # entries are counted, not bytes
        ((7, 4), torch.float32, None, [4, 3]),  # 64 bytes
        ((7, 4), torch.float64, None, [2, 2, 2, 1]),
        ((5, 2, 4), torch.bfloat16, None, [4, 1]),
        ((3, 100), torch.float32, 8, [1, 1, 1]),  # a row at least
        ((3, 0), torch.float32, None, [3]),
        ((0, 4), torch.float32, 8, []),
    ],
)
def test_sizes(shape, dtype, elements, wanted, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = list(row_blocks(torch.empty(shape, dtype=dtype), elements))
    assert [block.stop - block.start for block in found] == wanted
    assert [i for block in found for i in range(block.start, block.stop)] == list(range(shape[0]))


def test_each_thread_has_its_share(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert list(row_blocks(torch.empty(7, 4), 8)) == [slice(0, 6), slice(6, 7)]


def test_an_accelerator_takes_all_rows_at_once():
    assert list(row_blocks(torch.empty(7, 4, device="meta"), 8)) == [slice(0, 7)]
