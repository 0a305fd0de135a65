"""R [r, d] with orthonormal rows, from parameters that no optimizer step can take out of that set: O(d·r²).

It is `torch.nn.utils.parametrizations.orthogonal` (Householder map, trivialization) of the weight Rᵀ [d, r],
equal in value and gradient, without that one's d×d buffer and d×d products. With A = rotationᵀ [d, r]:

    V = tril(A, −1) + I_{d×r}                                a reflector in each column
    H₁···H_r = I − V·T·Vᵀ,  T⁻¹ = striu(VᵀV) + ½·diag(VᵀV)   compact WY, T from the Gram matrix
    X = V·T·V₁ᵀ − I_{d×r},  V₁ = V[:r]                       their first r columns; the sign makes X(0) = I
    Rᵀ = O·X,  O = (I − B·T_B·Bᵀ)·diag(sign, 1)              the base, r reflectors B and r signs

torch keeps O dense. Its columns after the r-th may be any that complete it, so those which the reflectors of
the first r give do as well. Saved for backward are V and diag(sign, 1)·B in fp64, 16·d·r bytes; beside the
products with them, 5·d·r² multiplications forward, there are only systems of size r.

Orthonormality holds for any V and B whose squares are finite in fp64, and long reflectors leave no system
ill-conditioned: with each of unit length, T_ij = −4·v_iᵀ·H_{i+1}···H_{j−1}·v_j. All is computed in fp64
and rounded once, so neither TF32, autocast, half precision parameters nor a load can take it away (in fp32,
‖RRᵀ − I‖ reaches 6e-6 at r = 256); weight decay only turns R back towards the base.

Compact WY: Schreiber and Van Loan 1989 (SIAM J. Sci. Stat. Comput. 10). T from the Gram matrix: Joffrain et
al. 2006 (ACM TOMS 32). Trivialization: arXiv 1909.09501.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .reference import accumulation_dtype


def complete(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The base whose first columns are `rows`: `orthonormal_rows` gives them back where the rotation is zero.

    Args:
        rows: orthonormal, [..., r, d] with r ≤ d, any floating dtype. Of rows that are independent only, the
            ones that the Gram-Schmidt process makes of them are taken.

    Returns:
        base [..., r, d] in the dtype of rows, zero but for its strict upper triangle, and base_sign [..., r]
        int8, each 1 or −1.

    Raises:
        ValueError: rows are not a wide matrix.
    """
    _check_wide("rows", rows)
    factored, tau = torch.geqrf(rows.detach().double().mT)
    diagonal = factored.diagonal(dim1=-2, dim2=-1)
    # tau = 0: LAPACK left a reflector out, where ours flips the sign.
    negative = (diagonal < 0) != (tau == 0)
    base = factored.mT.triu(1).to(rows.dtype)
    return base, torch.where(negative, -1, 1).to(torch.int8)


def orthonormal_rows(rotation: Tensor, base: Tensor, base_sign: Tensor) -> Tensor:
    """R = (O·X(rotationᵀ))ᵀ, of orthonormal rows; see the module docstring. Leading dimensions are a batch.

    Gradients flow to rotation, and to base if asked for.

    Args:
        rotation: [..., r, d] with r ≤ d, any floating dtype. Only its strict upper triangle is read.
        base: reflectors [..., r, d] of `complete`, likewise.
        base_sign: [..., r], negative or not.

    Returns:
        R [..., r, d], float32, or float64 if rotation is that.

    Raises:
        ValueError: shapes do not fit; the message names the argument.
    """
    _check_wide("rotation", rotation)
    _check_base(base, base_sign, rotation.shape)
    r, d = rotation.shape[-2:]
    flip = _flip(base_sign, d)
    V = _reflectors(rotation)
    B = _reflectors(base) * flip
    of_rotation = _times_T(V @ V.mT, V[..., :r])
    of_base = _times_T(B @ B.mT, B[..., :r] - B @ V.mT @ of_rotation)
    R = of_rotation.mT @ V + of_base.mT @ B - _eye(V, r)
    return (R * flip).to(accumulation_dtype(rotation.dtype))


def dense_base(base: Tensor, base_sign: Tensor) -> Tensor:
    """O [..., d, d], which torch's parametrization calls `base`; float32, or float64 if base is that.

    Args:
        base: reflectors [..., r, d] of `complete`.
        base_sign: [..., r], negative or not.

    Raises:
        ValueError: shapes do not fit; the message names the argument.
    """
    _check_wide("base", base)
    _check_base(base, base_sign, base.shape)
    d = base.shape[-1]
    B = _reflectors(base)
    dense = _eye(B, d) - B.mT @ _times_T(B @ B.mT, B)
    return (dense * _flip(base_sign, d)).to(accumulation_dtype(base.dtype))


class OrthonormalRows(nn.Module):
    """R [r, d] with orthonormal rows: `forward()` is `orthonormal_rows(rotation, base, base_sign)`.

    rotation [r, d] is the parameter, zero at first, and base [r, d] and base_sign [r] are buffers. R is
    float32 whatever floating dtype they are converted to (float64 if that one), and orthonormal in it; a base
    rounded to half precision is another base.

    A new one starts where `torch.nn.init.orthogonal_` of a [d, r] weight does, with the same random numbers.

    Args:
        d: columns.
        r: rows, at most d.
        dtype: of rotation and base, default torch's.
        device: of all three.

    Raises:
        ValueError: 0 ≤ r ≤ d does not hold.
    """

    rotation: nn.Parameter
    base: Tensor
    base_sign: Tensor

    def __init__(
        self,
        d: int,
        r: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= r <= d:
            raise ValueError(f"r: expected 0 ≤ r ≤ d = {d}, got {r}")
        dtype = dtype or torch.get_default_dtype()
        drawn = torch.empty(d, r, dtype=accumulation_dtype(dtype), device=device)
        if drawn.numel():
            nn.init.orthogonal_(drawn)
        self._start_at(drawn.mT.to(dtype))

    @classmethod
    def from_rows(cls, rows: Tensor) -> OrthonormalRows:
        """One whose R starts at `rows`, with parameters of their dtype and on their device.

        Args:
            rows: [r, d], r ≤ d, any floating dtype. No element of rows·rowsᵀ − I may pass √eps of their dtype
                (float32: 3.5e-4, bfloat16: 0.088), and R starts at the orthonormal rows next to them.

        Raises:
            ValueError: rows are not a matrix, not floating, or not orthonormal.
        """
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(f"rows: expected [r, d], floating, got {list(rows.shape)}, {rows.dtype}")
        _check_wide("rows", rows)
        exact = rows.detach().double()
        gram = exact @ exact.mT
        off = (gram - _eye(gram, len(gram))).abs()
        tolerance = torch.finfo(rows.dtype).eps ** 0.5
        if not bool((off <= tolerance).all()):
            raise ValueError(
                f"rows: expected orthonormal rows, |rows·rowsᵀ − I| ≤ {tolerance:.1e}, got {off.max():.1e}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._start_at(rows)
        return self

    def _start_at(self, rows: Tensor) -> None:
        base, base_sign = complete(rows)
        self.rotation = nn.Parameter(torch.zeros_like(base))
        self.register_buffer("base", base)
        self.register_buffer("base_sign", base_sign)

    def forward(self) -> Tensor:
        return orthonormal_rows(self.rotation, self.base, self.base_sign)

    def extra_repr(self) -> str:
        r, d = self.rotation.shape
        return f"d={d}, r={r}"


def _reflectors(matrix: Tensor) -> Tensor:
    """Strict upper triangle and ones on the diagonal, so that no row is zero; fp64."""
    matrix = matrix.triu(1).double()
    return matrix + _eye(matrix, matrix.shape[-2])


def _times_T(gram: Tensor, right: Tensor) -> Tensor:
    """T·right, with T⁻¹ = striu(gram) + ½·diag(gram)."""
    inverse = gram.triu() - 0.5 * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.solve_triangular(inverse, right, upper=True)


def _flip(base_sign: Tensor, d: int) -> Tensor:
    """diag(sign, 1) as a factor of columns, [..., 1, d]; no stored value makes it anything but 1 and −1."""
    negative = nn.functional.pad(base_sign < 0, (0, d - base_sign.shape[-1]))
    return 1.0 - 2.0 * negative.double().unsqueeze(-2)


def _eye(like: Tensor, r: int) -> Tensor:
    return torch.eye(r, like.shape[-1], dtype=like.dtype, device=like.device)


def _check_wide(argument: str, matrix: Tensor) -> None:
    if matrix.dim() < 2 or matrix.shape[-2] > matrix.shape[-1]:
        raise ValueError(f"{argument}: expected [..., r, d] with r ≤ d, got {list(matrix.shape)}")


def _check_base(base: Tensor, base_sign: Tensor, shape: torch.Size) -> None:
    if base.shape != shape:
        raise ValueError(f"base: expected {list(shape)}, got {list(base.shape)}")
    if base_sign.shape != shape[:-1]:
        raise ValueError(f"base_sign: expected {list(shape[:-1])}, got {list(base_sign.shape)}")
