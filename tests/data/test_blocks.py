"""Documents cut into blocks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.blocks import cut_into_blocks
from truetune.data.pack import collate
from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet


def documents(sizes: list[int]) -> TokenSet:
    ids = iter(range(sum(sizes)))
    return TokenSet.from_lists([[next(ids) for _ in range(n)] for n in sizes], [[True] * n for n in sizes],
                               [Origin("f", i + 1) for i in range(len(sizes))])  # fmt: skip


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 20))
def test_every_token_but_the_first_is_predicted_once(sizes: list[int], length: int) -> None:
    blocks = cut_into_blocks(documents(sizes), length)
    targets = [t for i in range(len(blocks)) for t in collate(blocks, [i], packing=True).targets.tolist()]
    assert targets == list(range(1, sum(sizes)))
    assert blocks.trained_count() == sum(sizes) - 1 if len(blocks) else sum(sizes) < 2


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 20))
def test_no_block_is_longer_than_asked_and_only_the_last_is_shorter(sizes: list[int], length: int) -> None:
    found = cut_into_blocks(documents(sizes), length).lengths.tolist()
    assert all(n == length for n in found[:-1])
    assert all(2 <= n <= length for n in found)


def test_each_token_is_predicted_from_the_one_before_it() -> None:
    blocks = cut_into_blocks(documents([7, 3]), 4)
    for i in range(len(blocks)):
        tokens, _ = blocks.example(i)
        assert torch.equal(tokens.diff(), torch.ones(len(tokens) - 1, dtype=tokens.dtype))


def test_a_block_is_found_in_the_document_it_begins_in() -> None:
    blocks = cut_into_blocks(documents([4, 3, 5]), 4)  # blocks begin at tokens 0, 3, 6, 9
    assert [origin.row for origin in blocks.origins] == [1, 1, 2, 3]
