import torch

from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.data.micro_batches import MicroBatchDataset
from tasks.engine.data.sampler import balance_steps, row_order


def test_every_row_comes_once_in_an_epoch():
    lengths = [i % 7 for i in range(50)]
    order = row_order(lengths, 8, 13, seed=3)
    assert len(order) == 104
    assert sorted(row_order(lengths, 10, 5, seed=3)) == list(range(50))
    assert order == row_order(lengths, 8, 13, seed=3) != row_order(lengths, 8, 13, seed=4)
    first = [lengths[row] for row in order[:8]]
    assert first == sorted(first)


def test_balanced_steps_are_of_one_size_and_have_the_window_s_rows():
    generator = torch.Generator().manual_seed(0)
    lengths, answers = (
        torch.randint(20, 90, (96,), generator=generator),
        torch.randint(3, 19, (96,), generator=generator),
    )
    sizes = list(zip(lengths.tolist(), answers.tolist(), strict=True))
    order = row_order(lengths.tolist(), 16, 14, seed=3)  # more than two epochs, and a window of two steps at the end
    balanced = balance_steps(sizes, order, 16, 4)
    assert balanced == balance_steps(sizes, order, 16, 4)
    for start in range(0, len(order), 64):
        assert sorted(balanced[start : start + 64]) == sorted(order[start : start + 64])

    def spread(rows: list[int], column: int) -> int:
        sums = [sum(sizes[row][column] for row in rows[start : start + 16]) for start in range(0, 64, 16)]
        return max(sums) - min(sums)

    for column in (0, 1):  # tokens, labels
        assert spread(balanced, column) < spread(order, column) / 4
    rows = [Example(list(range(n)), [IGNORE] * (n - a) + [5] * a) for n, a in sizes]
    dataset = MicroBatchDataset(rows, order, 16, 16, packed=True, shapes=1, multiple=16, window=4)
    assert sorted(dataset.micro_batches[0]) == sorted(balanced[:16])
