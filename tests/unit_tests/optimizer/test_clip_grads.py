import pytest
import torch

from megatron.core.optimizer.clip_grads import (
    clip_grad_by_total_norm_fp32,
    count_zeros_fp32,
    get_grad_norm_fp32,
    sum_of_squares,
)


def test_norm_of_a_large_buffer_is_exact_to_fp32_however_it_is_cut() -> None:
    """A plain fp32 norm is off by 1e-4 and more here, and differently for every cut."""
    x = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)) + 1.0
    exact = x.double().square().sum().sqrt().item()
    for pieces in ([x], list(x.split(1_000_000)), list(x.split([7, 2_000_000, 999_994]))):
        assert get_grad_norm_fp32(pieces) == pytest.approx(exact, rel=1e-7)


def test_norms_of_nothing_and_other_types() -> None:
    assert get_grad_norm_fp32([]) == 0.0
    assert sum_of_squares([torch.full((3, 2), 2.0, dtype=torch.bfloat16)]).item() == 24.0
    assert get_grad_norm_fp32(torch.tensor([1.0, -3.0]), float("inf")) == 3.0
    with pytest.raises(ValueError, match="norm_type"):
        get_grad_norm_fp32([], 1.0)


def test_clip_and_zeros() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert count_zeros_fp32([param.grad]) == 2.0
    clip_grad_by_total_norm_fp32([param], 10.0, 5.0)
    torch.testing.assert_close(param.grad, torch.tensor([3.0, 0.0, 4.0, 0.0]), rtol=0, atol=0)
    clip_grad_by_total_norm_fp32([param], 1.0, 5.0)
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.0, 0.8, 0.0]))
