"""VocabParallelEmbedding against nn.Embedding: the ranks' rows add up, and an id outside the table is an error."""

import pytest
import torch

from passes.ops.parallel_layers import VocabParallelEmbedding

TABLE = torch.arange(44, dtype=torch.float64).view(11, 4)
CUTS = {
    "even and odd": [[(0, 6)], [(6, 11)]],
    "one rank has nothing": [[(0, 11)], []],
    "three ranks": [[(0, 4)], [(4, 8)], [(8, 11)]],
    "several runs": [[(0, 3), (7, 9)], [(3, 7), (9, 11)]],
}


def ranks(cut):
    made = []
    for intervals in cut:
        layer = VocabParallelEmbedding(intervals, 11, 4, dtype=torch.float64)
        held = [TABLE[start:stop] for start, stop in intervals] or [TABLE[:0]]
        layer.weight = torch.nn.Parameter(torch.cat(held))
        made.append(layer)
    return made


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_the_ranks_rows_add_up(cut):
    ids = torch.tensor([[0, 3, 4, 10], [7, 8, 6, 5]])
    assert torch.equal(sum(layer(ids) for layer in ranks(cut)), TABLE[ids])


@pytest.mark.parametrize("outside", [-1, 11])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_an_id_outside_the_table_is_refused_by_every_rank_alike(cut, outside):
    texts = set()
    for layer in ranks(cut):
        with pytest.raises(IndexError) as caught:
            layer(torch.tensor([[2, outside]]))
        texts.add(str(caught.value))
    lowest, highest = sorted((2, outside))
    assert texts == {f"ids from {lowest} to {highest}, and the embedding has rows 0 to 10"}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_the_row_of_padding_gets_no_gradient(cut):
    ids, padding = torch.tensor([[0, 3, 4, 10, 4], [7, 8, 4, 5, 3]]), 4
    weights = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.Embedding.from_pretrained(TABLE, freeze=False, padding_idx=padding)
    (whole(ids) * weights).sum().backward()
    layers = ranks(cut)
    for layer, intervals in zip(layers, cut, strict=True):
        again = VocabParallelEmbedding(intervals, 11, 4, dtype=torch.float64, padding_idx=padding)
        again.weight = layer.weight
        (again(ids) * weights).sum().backward()
        own = [whole.weight.grad[start:stop] for start, stop in intervals] or [TABLE[:0]]
        assert torch.equal(layer.weight.grad, torch.cat(own))
