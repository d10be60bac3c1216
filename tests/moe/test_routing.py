"""What the records of routing are counted with."""

from collections import Counter

import pytest
import torch

from moe.routing import count_ids


@pytest.mark.parametrize("num_rows", [0, 1, 7, 1000])
def test_ids_are_counted_and_absent_ones_count_zero(num_rows: int) -> None:
    id_N = torch.randint(9, (num_rows,), generator=torch.Generator().manual_seed(num_rows)) + 2
    counted = Counter(id_N.tolist())
    counts = count_ids(id_N, 13)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [counted[i] for i in range(13)]


def test_all_rows_may_have_one_id() -> None:
    assert count_ids(torch.full((50,), 3), 4).tolist() == [0, 0, 0, 50]
