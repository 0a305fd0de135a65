"""The one table of tolerances, each with its reason.

The criterion is relative: with everything computed again in fp64 as the truth, the error of a backend is at
most `FACTOR` times that of the same computation in plain PyTorch at the same dtypes, plus a floor of a few
units in the last place for results that plain PyTorch happens to hit exactly.
"""

import torch

FACTOR = 2.0

# For results that plain PyTorch happens to hit exactly: one rounding of a half result (its sums are fp32),
# and in fp32 the few units by which the order of a short sum with some cancellation moves it.
FLOOR = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-50}


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """‖got − truth‖ / ‖truth‖ in fp64; 0 for two empty or two zero tensors."""
    difference = (got.double() - truth.double()).norm().item()
    scale = truth.double().norm().item()
    return difference / scale if scale else difference


# Where plain PyTorch takes a long sum in more parts, with fewer roundings: those of 256 terms taken in order
# in fp32, √256 on average, of what the terms amount to without their signs.
IN_ORDER = 2.0**-20

# Of terms that are all the same, the roundings have one sign and add up: 256 of half a unit.
REPEATED = 2.0**-17


def assert_as_exact(
    name: str,
    got: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    magnitudes: torch.Tensor | None = None,
    in_order: float = IN_ORDER,
) -> None:
    """`got` is as near to the fp64 `truth` as FACTOR times `plain` (plain PyTorch at the same dtypes).

    Or within `in_order` of `magnitudes`, the sums of the absolute values of the terms, where given. What is
    too large for the dtype is its infinity.
    """
    assert got.shape == truth.shape, f"{name}: expected shape {tuple(truth.shape)}, got {tuple(got.shape)}"
    assert got.dtype == plain.dtype, f"{name}: expected {plain.dtype}, got {got.dtype}"
    if (large := truth.to(got.dtype).isinf()).any():
        assert torch.equal(got[large], truth[large].to(got.dtype)), f"{name}: expected infinities"
        got, plain, truth = got[~large], plain[~large], truth[~large]
        magnitudes = None if magnitudes is None else magnitudes[~large]
    # In this order, which forgives nothing to one whose plain PyTorch overflowed.
    bound = max(FLOOR[got.dtype], FACTOR * relative_error(plain, truth))
    if magnitudes is not None:
        bound = max(bound, in_order * (magnitudes.norm() / (truth.norm() or 1.0)).item())
    error = relative_error(got, truth)
    assert error <= bound, f"{name}: error {error:.3e} against fp64, allowed {bound:.3e}"
