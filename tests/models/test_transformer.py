"""How blocks and positions start."""

import pytest
import torch

from omniid.models.transformer import (
    CrossBlock,
    SelfBlock,
    grid_points,
    init_blocks,
    scattered_points,
    sincos_positions,
)


def test_near_places_have_near_positions_and_far_ones_do_not():
    points = grid_points(16)
    table = sincos_positions(points, 192)
    likeness = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    distance = torch.cdist(points, points)
    assert likeness[distance < 0.07].min() > 0.8  # neighbours in the grid
    assert likeness[distance > 0.5].max() < 0.6


def test_one_place_has_one_position_on_all_grids():
    fine, coarse = grid_points(16), grid_points(8)
    assert torch.equal(fine.view(8, 2, 8, 2, 2).mean((1, 3)).flatten(0, 1), coarse)
    torch.testing.assert_close(sincos_positions(coarse[:3], 32), sincos_positions(coarse, 32)[:3])


@pytest.mark.parametrize("count", [1, 6, 32, 256])
def test_scattered_points_lie_apart_in_the_unit_square(count):
    points = scattered_points(count)
    assert points.shape == (count, 2) and points.min() >= 0 and points.max() < 1
    if count > 1:
        apart = torch.cdist(points, points) + 9 * torch.eye(count)
        assert apart.min() > 0.4 * count**-0.5


def test_positions_need_four_values_a_wave():
    with pytest.raises(ValueError, match="width must be a multiple of 4 for 2-D positions, got 30"):
        sincos_positions(grid_points(2), 30)


@pytest.mark.parametrize("context_width", [32, 48])
def test_keys_start_like_queries_where_the_widths_allow(context_width):
    torch.manual_seed(0)
    block = CrossBlock(32, context_width, num_heads=2, mlp_ratio=2).apply(init_blocks)
    keys = block.to_kv.weight.detach()[:32]
    assert not block.to_q.bias.any()
    if context_width == 32:
        both = torch.stack([keys.flatten(), block.to_q.weight.detach().flatten()])
        assert torch.corrcoef(both)[0, 1].item() == pytest.approx(0.9, abs=0.06)
        assert keys.std().item() == pytest.approx(block.to_q.weight.std().item(), rel=0.1)


def test_self_attention_starts_by_looking_at_like_rows():
    torch.manual_seed(0)
    block = SelfBlock(64, num_heads=2, mlp_ratio=2).apply(init_blocks)
    rows = block.norm_attention(torch.randn(1, 20, 64))
    queries, (keys, _) = block.queries(rows), block.keys_values(rows)
    scores = torch.einsum("blhd,bshd->bhls", queries, keys)
    assert scores.diagonal(dim1=-2, dim2=-1).mean() > scores.mean() + 2 * scores.std()
