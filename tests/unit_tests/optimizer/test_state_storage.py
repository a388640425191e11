"""What is read is what was written, rounded as promised."""

import pytest
import torch

from megatron.core.optimizer.precision_aware_adam import PIECE, allocate_on
from megatron.core.optimizer.state_storage import (
    BFLOAT16,
    BLOCK,
    FLOAT8,
    FLOAT16,
    FloatFormat,
    RemainderStorage,
    RoundedStorage,
    uniform_noise,
)

ALLOCATE = allocate_on(torch.device("cpu"))
FORMATS = [BFLOAT16, FLOAT16, FLOAT8]
N, FIRST = 1000, 100  # no whole number of blocks, none that begins with one


def values(*, positive: bool) -> torch.Tensor:
    """Spread over a few powers of two, small as moments are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, generator=generator) * torch.randn(N, generator=generator).exp() * 1e-6
    return x.square() if positive else x


def storage(form: FloatFormat, *, second_moment: bool) -> RoundedStorage:
    return RoundedStorage(form, N, FIRST, ALLOCATE, second_moment=second_moment)


@pytest.mark.parametrize("second_moment", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_rounding_keeps_the_mean_and_what_is_stored(form: FloatFormat, second_moment: bool) -> None:
    kept, wanted = storage(form, second_moment=second_moment), values(positive=second_moment)
    assert kept.read_all().count_nonzero() == 0
    rounds = []
    for step in range(400):
        kept.write(0, wanted, step)
        rounds.append(kept.read_all())
    unit = 2.0**-form.mantissa_bits * (2 if second_moment and form is FLOAT8 else 1)
    large = wanted.abs() > wanted.abs().max() * 1e-3  # smaller ones lie in the subnormal range of their block
    error = (rounds[0] - wanted).abs()[large] / wanted.abs()[large]
    assert error.max() <= unit * 1.1
    bias = (torch.stack(rounds).mean(0) - wanted).abs()[large] / wanted.abs()[large]
    assert bias.max() < unit / 4  # five standard deviations of a mean of 400
    kept.write(0, rounds[0], step=7)
    assert torch.equal(kept.read_all(), rounds[0])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
def test_pieces_of_a_piece_are_stored_like_the_whole(form: FloatFormat) -> None:
    whole, parts, wanted = (
        storage(form, second_moment=False),
        storage(form, second_moment=False),
        values(positive=False),
    )
    whole.write(0, wanted, 3)
    border = 2 * BLOCK - FIRST % BLOCK
    for start, end in ((0, border), (border, N)):
        parts.write(start, wanted[start:end], 3)
    assert torch.equal(parts.read_all(), whole.read_all())
    assert torch.equal(parts.read(border, N), whole.read_all()[border:])
    assert PIECE % BLOCK == 0


@pytest.mark.parametrize("form", [FLOAT16, FLOAT8], ids=lambda form: str(form.dtype))
def test_second_moment_never_becomes_zero(form: FloatFormat) -> None:
    """A zero would divide the update by nothing but epsilon."""
    kept, wanted = storage(form, second_moment=True), torch.full((N,), 1e-20)
    wanted[::7], wanted[5] = 1.0, 0.0
    kept.write(0, wanted, 1)
    assert ((kept.read_all() == 0) == (wanted == 0)).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(form: FloatFormat, bad: float) -> None:
    kept, wanted = storage(form, second_moment=False), values(positive=False)
    wanted[3] = bad
    kept.write(0, wanted, 1)
    assert not kept.read_all()[3].isfinite()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: str(form.dtype))
@pytest.mark.parametrize("size", [1e-38, 1e30])
def test_extreme_sizes_survive(form: FloatFormat, size: float) -> None:
    kept, wanted = storage(form, second_moment=False), torch.full((N,), size)
    kept.write(0, wanted, 1)
    torch.testing.assert_close(kept.read_all(), wanted, rtol=0.15, atol=0)


def test_remainders_are_exact() -> None:
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32, generator=generator)
    bits[:3] = torch.tensor([0x3F808000, 0x3F818000, 0x7FFFFFFF])  # two ties, and CUDA's NaN
    wanted = bits.view(torch.float32)
    kept = RemainderStorage(torch.zeros(wanted.numel(), dtype=torch.bfloat16), ALLOCATE)
    kept.write(0, wanted, 0)
    found, number = kept.read_all(), ~wanted.isnan()
    assert torch.equal(found[number], wanted[number])
    assert found[~number].isnan().all() and kept.weights[~number].isnan().all()
    tie = (bits & 0xFFFF) == 0x8000
    assert torch.equal(kept.weights[number & ~tie], wanted[number & ~tie].bfloat16())
    assert [hex(int(one)) for one in kept.weights[:2].view(torch.int16)] == ["0x3f81", "0x3f82"]
    with pytest.raises(ValueError, match="complete bfloat16 weights"):
        RemainderStorage(torch.zeros(3, dtype=torch.float16), ALLOCATE)


def test_noise_is_uniform_and_a_function_of_place_and_step() -> None:
    noise = uniform_noise(0, 2**16, 5, 1, torch.device("cpu"))
    assert torch.equal(uniform_noise(1000, 50, 5, 1, torch.device("cpu")), noise[1000:1050])
    assert noise.min() >= 0 and noise.max() < 1
    assert abs(float(noise.mean()) - 0.5) < 0.005 and abs(float(noise.var()) * 12 - 1) < 0.02
    for other in (uniform_noise(0, 2**16, 6, 1, noise.device), uniform_noise(0, 2**16, 5, 2, noise.device)):
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1])) < 0.02
    far = uniform_noise(2**33, 4, 5, 1, noise.device)  # larger than an int32
    assert far.shape == (4,)
