"""INTL (IterNorm with trace loss) and related self-supervised losses. Depends only on torch.

    loss = INTLLoss()([z1, z2])     # two views (m, d), the raw output of a projector, m > 8
    python intl.py [--plot FILE]    # prints which losses collapse and which do not (30 s, CPU)

INTL: "Modulate Your Spectrum in Self-Supervised Learning", Weng et al., ICLR 2024,
arXiv 2305.16789. CW-RGP: Weng et al., NeurIPS 2022, arXiv 2210.03586. OR: He et al., NeurIPS 2024,
arXiv 2411.00392. Names in [brackets] are tests in the repository's test_intl.py.
SPDX-License-Identifier: MIT.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- The method by its definition ----------------------------------------------------------------
# This is all of INTL for two views in one process. INTLLoss below computes the same value. It also
# supports the batch axis, more views, an EMA teacher and DDP, stays accurate in float32, and takes
# about half the time. [test_the_fast_loss_equals_the_definition]


def iter_norm_by_definition(z: Tensor, iterations: int = 4) -> Tensor:
    """Approximately whitens the m samples of z over their d channels: (m, d) -> (m, d)."""
    zc = z - z.mean(dim=1, keepdim=True)  # (m, d): each sample is centred
    S = zc @ zc.T / (zc.shape[1] - 1)  # (m, m): the covariance of the samples
    N = S / S.trace()
    P = torch.eye(len(S), dtype=S.dtype, device=S.device)
    for _ in range(iterations):  # Newton's iteration: P tends to N^(-1/2)
        P = (3 * P - P @ P @ P @ N) / 2
    return P @ zc / S.trace().sqrt()


def intl_loss_by_definition(z1: Tensor, z2: Tensor, iterations: int = 4) -> Tensor:
    """The INTL loss of two views (m, d) -> (): low if they agree and their spectrum is flat."""
    z1_hat = iter_norm_by_definition(z1, iterations)
    z2_hat = iter_norm_by_definition(z2, iterations)
    alignment = (2 - 2 * F.cosine_similarity(z1_hat, z2_hat, dim=1)).mean()
    trace_loss_1 = (1 - z1_hat.var(dim=1)).square().sum()
    trace_loss_2 = (1 - z2_hat.var(dim=1)).square().sum()
    beta = 0.01 * (math.log2(len(z1)) - 3)
    return alignment + beta * (trace_loss_1 + trace_loss_2)


# --- 1. Notation, centring, and the smaller Gram matrix ------------------------------------------
# An embedding z is (m, d): m samples in rows, d channels in columns (the paper writes the
# transpose). V views of a batch are (V, m, d). The axis is what statistics are taken over. zc is z
# centred, and S is the covariance of
#   axis "batch":   the d channels, each centred over the m samples:  S = zc^T zc / (m - 1), d x d;
#   axis "channel": the m samples, each centred over its d channels:  S = zc zc^T / (d - 1), m x m.
# For every polynomial p, and so for every function of the eigenvalues, zc p(zc^T zc) =
# p(zc zc^T) zc. Either axis can therefore be computed from whichever Gram matrix is smaller, with
# the same result. The axes differ only in what is centred and in the divisor.
# [test_both_gram_matrices_give_the_same_transform]


def _validate_settings(axis: str, iterations: int = 1):
    if axis not in ("channel", "batch"):
        raise ValueError(f'axis must be "channel" or "batch", got {axis!r}')
    if not 1 <= iterations <= 40:
        raise ValueError(
            f"iterations must be from 1 to 40, got {iterations}; whiten is the exact limit"
        )


def _validate(z: Tensor, iterations: int = 1) -> Tensor:
    """Checks z, and casts it to float32 (a covariance in bfloat16 is 0.2 % off or more), or to
    float64 for more than 10 iterations: each Newton step (section 3) multiplies eigenvalues near
    zero, rounding errors included, by 9/4, and float32 tolerates 2.25^10 but not more. Raises
    ValueError for a wrong shape or type. [test_iter_norm_is_stable]"""
    if not z.is_floating_point() or z.dim() not in (2, 3):
        raise ValueError(
            f"embeddings are floating-point (m, d) or (V, m, d), got {z.dtype} {tuple(z.shape)}"
        )
    if min(z.shape[-2:]) < 2:
        raise ValueError(
            f"a covariance needs 2 samples and 2 channels, got (m, d) = {tuple(z.shape[-2:])}"
        )
    min_dtype = torch.float64 if iterations > 10 else torch.float32
    return z.to(torch.promote_types(z.dtype, min_dtype))


def _centre(z: Tensor, axis: str) -> Tensor:
    """z centred along the axis, (..., m, d)."""
    dim = -1 if axis == "channel" else -2
    # The same as z - z.mean(dim, keepdim=True), with a faster backward pass.
    return z + z.sum(dim, keepdim=True) * (-1 / z.shape[dim])


def _divisor(z: Tensor, axis: str) -> int:
    """The divisor that turns the Gram matrix of the centred z into a covariance."""
    m, d = z.shape[-2:]
    return d - 1 if axis == "channel" else m - 1


class _Gram(torch.autograd.Function):
    """x x^T, (..., n, k) -> (..., n, n). For the incoming gradient G the gradient is (G + G^T) x:
    one product, where autograd treats x and x^T as independent and needs two. [test_gradcheck]"""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad + grad.mT) @ x


def _rows_are_fewer(zc: Tensor) -> bool:
    m, d = zc.shape[-2:]
    return m <= d


def _gram(zc: Tensor) -> Tensor:
    """The smaller of zc zc^T and zc^T zc: (..., n, n), n = min(m, d)."""
    return _Gram.apply(zc if _rows_are_fewer(zc) else zc.mT)


def _multiply(f: Tensor, zc: Tensor) -> Tensor:
    """f zc or zc f, (..., m, d): on the side that matches `_gram`."""
    return f @ zc if _rows_are_fewer(zc) else zc @ f


# --- 2. Spectral transformations: z_hat = zc U diag(g(l)) U^T, where S = U diag(l) U^T ------------
# cov(z_hat) = U diag(l g(l)^2) U^T: a function g of the eigenvalues reshapes the spectrum and
# keeps the eigenvectors. (This is the batch axis; on the channel axis the matrix multiplies from
# the left, U diag(g(l)) U^T zc.) Whitening is the case g(l) = l^(-1/2). The paper's first finding:
# l^(-p) prevents collapse for p near 1/2 but not for small p, so whitening is one choice among
# many. [test_demonstration]


class _MatrixFunction(torch.autograd.Function):
    """U diag(g(l)) U^T of a symmetric S. The backward pass is hand-written because autograd through
    eigh divides by l_i - l_j: NaN for equal eigenvalues, and a collapsed batch has many equal to
    zero. The transform itself is smooth (Daleckii and Krein): with D = U^T dS U its differential
    is U (K * D + Diag(J diag(D))) U^T, where diag takes a diagonal and Diag makes a matrix of it.
    K_ij = (g_i - g_j) / (l_i - l_j), or its limit if l_i = l_j, and 0 for i = j. The diagonal goes
    through the Jacobian J of g, since g may depend on all eigenvalues, such as on their sum.
    [test_gradcheck]"""

    @staticmethod
    def forward(ctx, S: Tensor, g: Callable[[Tensor], Tensor]) -> Tensor:
        l, U = torch.linalg.eigh(S)  # (..., n), (..., n, n)
        n = l.shape[-1]
        eps = torch.finfo(l.dtype).eps
        l = torch.where(l > n * eps * l[..., -1:], l, 0)  # rounding errors of zero
        s = g(l)  # (..., n)
        if s.shape != l.shape:
            raise ValueError(
                f"g must map eigenvalues {tuple(l.shape)} to as many scales, got {tuple(s.shape)}"
            )
        s = torch.where((l == 0) & ~s.isfinite(), 0, s)  # 0, where g is infinite at 0

        if ctx.needs_input_grad[0]:
            J = torch.vmap(torch.func.jacrev(g))(l.reshape(-1, n))  # J_ij = dg_i / dl_j
            J = J.reshape(*l.shape, n)  # (..., n, n)
            J = torch.where(J.isfinite(), J, 0)
            diag = J.diagonal(dim1=-2, dim2=-1)  # (..., n)

            # Below a relative gap of eps^(1/3) the limit is more accurate than the quotient.
            l_i, l_j = l.unsqueeze(-1), l.unsqueeze(-2)  # (..., n, 1), (..., 1, n)
            gap = l_i - l_j  # (..., n, n)
            close = gap.abs() <= eps ** (1 / 3) * torch.maximum(l_i, l_j)
            limit = (diag.unsqueeze(-1) + diag.unsqueeze(-2) - J - J.mT) / 2  # 0 for i = j
            ds = s.unsqueeze(-1) - s.unsqueeze(-2)
            K = torch.where(close, limit, ds / torch.where(close, 1, gap))
            ctx.save_for_backward(U, K, J)
        return (U * s.unsqueeze(-2)) @ U.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        U, K, J = ctx.saved_tensors
        D = U.mT @ (grad + grad.mT) @ U / 2  # (..., n, n)
        diag = D.diagonal(dim1=-2, dim2=-1)  # (..., n)
        grad_l = (diag.unsqueeze(-2) @ J).squeeze(-2)  # (..., n): through the eigenvalues
        return U @ (K * D + grad_l.diag_embed()) @ U.mT, None


def spectral_transform(
    z: Tensor, g: Callable[[Tensor], Tensor], *, axis: str = "channel"
) -> Tensor:
    """The exact spectral transformation by g of z, (m, d) or (V, m, d); same shape.

    g maps eigenvalues (..., n), n = min(m, d), to scales (..., n). Where it is infinite, such as
    l^(-p) at zero, the output is zero. Computed in float64, since a Gram matrix has the square of
    the condition number of z; differentiable once. Raises ValueError for a wrong shape or axis.
    """
    _validate_settings(axis)
    z = _validate(z)
    with torch.autocast(z.device.type, enabled=False):
        zc = _centre(z.double(), axis)  # (..., m, d)
        S = _gram(zc) / _divisor(zc, axis)  # (..., n, n)
        return _multiply(_MatrixFunction.apply(S, g), zc).to(z.dtype)


def power(p: float) -> Callable[[Tensor], Tensor]:
    """g(l) = l^(-p): p = 0 only centres z, p = 0.5 is whitening."""
    return lambda l: l.pow(-p)


def whiten(z: Tensor, *, axis: str = "channel") -> Tensor:
    """ZCA whitening of z, (m, d) or (V, m, d): every non-zero eigenvalue of cov(z) becomes one."""
    return spectral_transform(z, power(0.5), axis=axis)


# --- 3. IterNorm: a spectral transformation from a few matrix products ----------------------------
# Newton's iteration for N^(-1/2), where N = S / tr(S), so that its eigenvalues x sum to one:
#
#     P_0 = I,   P_{k+1} = (3 P_k - P_k^3 N) / 2,   z_hat = zc P_T / sqrt(tr S).
#
# Every P_k is a polynomial in S, so IterNorm IS a spectral transformation. It maps an eigenvalue x
# to h_T(x): with y_k = x^(1/2) P_k(x) the iteration reads y_{k+1} = (3 y_k - y_k^3) / 2, and with
# h = y^2
#
#     h_0 = x,   h_{k+1} = phi(h_k),   phi(h) = h (3 - h)^2 / 4.
#
# On [0, 1] phi' = 3 (1 - h)(3 - h) / 4 >= 0 and phi'' = (6 h - 12) / 4 < 0, and phi fixes 0 and 1.
# Compositions of such maps have the same properties: h_T is increasing, strictly concave for
# T >= 1, stays in [0, 1], tends to 1 for every x > 0, and is below 1 for finite T and x < 1.
# [test_newton_map_is_increasing_and_concave]


def newton_map(x, iterations: int):
    """h_T(x) of a tensor or a float: the eigenvalue of cov(z_hat) for an eigenvalue x of N."""
    for _ in range(iterations):
        x = x * (3 - x) ** 2 / 4
    return x


def _newton(S: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """S (V, n, n): Gram matrices already divided by `_divisor`. Returns P_T / sqrt(tr S) (V, n, n)
    and the diagonal (V, n) of P_T N P_T, which is cov(z_hat) if S is the covariance of the axis.

    A_k = P_k^2 N is the covariance after k steps, with the eigenvalues h_k(x). With
    B_k = (3I - A_k) / 2 the step is P_{k+1} = P_k B_k and A_{k+1} = A_k B_k^2: this coupled form
    is stable. [test_iter_norm_is_stable] In the form P^3 N, as in the definition and the official
    code, P and N stop commuting, and rounding errors explode from T = 12 on.
    [test_the_uncoupled_form_explodes]"""
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]  # (V, 1, 1)
    trace = trace + (trace == 0)  # a constant batch has nothing to normalise
    I = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)  # (n, n)

    A = S / trace  # A_0 = N, (V, n, n), as are B and P
    B = 1.5 * I - 0.5 * A  # B_0
    P = B  # P_1 = P_0 B_0, since P_0 = I
    for _ in range(iterations - 1):  # k = 0, 1, ...
        A = A @ B @ B  # A_{k+1}
        B = 1.5 * I - 0.5 * A  # B_{k+1}
        P = P @ B  # P_{k+2}

    # cov(z_hat) = A_T = A B B. Only its diagonal is needed; as B is symmetric, one product less.
    variance = ((A @ B) * B).sum(-1)  # (V, n)
    return P * trace.rsqrt(), variance


def iter_norm(z: Tensor, *, iterations: int = 4, axis: str = "channel") -> Tensor:
    """IterNorm of z, (m, d) or (V, m, d); same shape, in float32 or float64.

    Raises ValueError for a wrong shape, axis or number of iterations.
    [test_iter_norm_maps_every_eigenvalue_by_newton_map]"""
    _validate_settings(axis, iterations)
    views = _validate(z, iterations).reshape(-1, *z.shape[-2:])  # (V, m, d)
    with torch.autocast(z.device.type, enabled=False):
        zc = _centre(views, axis)  # (V, m, d)
        P, _ = _newton(_gram(zc) / _divisor(zc, axis), iterations)  # (V, n, n), n = min(m, d)
        z_hat = _multiply(P, zc).reshape(z.shape)
    return z_hat.to(torch.promote_types(z.dtype, torch.float32))


# --- 4. Trace loss: why IterNorm alone is not enough ----------------------------------------------
# Since h_T < 1, the spectrum can still decay: IterNorm alone does not prevent collapse. The trace
# loss, with enough weight, does. It penalises every variance of the output below one:
#
#     L_trace(z_hat) = sum_j (1 - cov(z_hat)_jj)^2.
#
# Why this equalises the spectrum: tr cov(z_hat) is sum_i h_T(x_i) with sum_i x_i = 1, and a
# symmetric sum of a strictly concave function has its only maximum at equal x_i. By
# Jensen's inequality a total variance t = tr cov(z_hat) <= n of n coordinates has
# L_trace >= n (1 - t/n)^2, which falls as t grows; and t <= r h_T(1/r) for a covariance of rank r:
#
#     L_trace >= L_r = n (1 - (r/n) h_T(1/r))^2,
#
# with equality for r equal eigenvalues and n equal variances. For n = r = 256 and T = 4 the floor
# is 209.6. A loss near 21 is therefore normal: 2 beta L_n = 20.96 of it can't be avoided.
# [test_trace_loss_is_least_at_equal_eigenvalues]


def trace_loss(z_hat: Tensor, *, axis: str = "channel") -> Tensor:
    """sum_j (1 - var_j)^2 over samples ("channel") or channels ("batch"), divisor n - 1:
    (m, d) -> (), (V, m, d) -> (V,). Raises ValueError for a wrong shape or axis."""
    _validate_settings(axis)
    dim = -1 if axis == "channel" else -2
    return (1 - _validate(z_hat).var(dim)).square().sum(-1)


def trace_floor(n: int, iterations: int, rank: float | None = None) -> float:
    """L_rank: the least trace loss after IterNorm for n coordinates and this rank (None: n)."""
    if rank is None:
        rank = n
    return n * (1 - rank / n * newton_map(1 / rank, iterations)) ** 2


# --- 5. Several processes: statistics of the global batch, no communication in the backward pass --
# Every process gathers all rows and computes the full loss, so it holds the exact gradient of that
# loss with respect to its own rows. Only these keep their graph; the others arrive detached.
# DistributedDataParallel then AVERAGES gradients over processes where the sum is needed, so the
# losses multiply their gradient by the world size. (Without it every loss is still right, but the
# gradient is too small, and nothing reports it.) [test_gradient_over_processes_equals_one_process]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_rows_were_checked = False


def _check_equal_rows(z: Tensor):
    """Compares the shapes of all processes, once: it would cost a round trip in every step."""
    global _rows_were_checked
    if _rows_were_checked or torch.compiler.is_compiling():
        return
    shapes = [None] * _world_size()
    dist.all_gather_object(shapes, tuple(z.shape))
    if len(set(shapes)) > 1:
        raise ValueError(f"all processes must hold the same number of rows, got shapes {shapes}")
    _rows_were_checked = True


def gather(z: Tensor) -> Tensor:
    """The rows of all processes in rank order, (m, d) -> (world * m, d) or (V, m, d) ->
    (V, world * m, d); the identity in one process. The gradient reaches the local rows, unscaled.
    All processes must hold the same number of rows; the first call raises ValueError if not."""
    if _world_size() == 1:
        return z
    _check_equal_rows(z)
    local = z.detach().contiguous()
    rows = [torch.empty_like(local) for _ in range(_world_size())]
    dist.all_gather(rows, local)
    rows[dist.get_rank()] = z
    return torch.cat(rows, dim=-2)


def scale_grad_by_world_size(loss: Tensor) -> Tensor:
    """The same value; its gradient times the world size, which undoes DDP's averaging."""
    if _world_size() == 1:
        return loss
    return loss.detach() + _world_size() * (loss - loss.detach())


def _gather_views(
    views: Sequence[Tensor] | Tensor, teacher: Tensor | None, iterations: int = 1
) -> list[Tensor]:
    """V >= 2 views of one shape (m, d), the teacher's first, gathered: V times (world * m, d)."""
    views = list(views)
    if teacher is not None:
        views = [teacher.detach(), *views]

    shapes = [tuple(v.shape) for v in views]
    if len(shapes) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(
            f"the loss needs two or more views of one shape (m, d), the teacher's included, "
            f"got {shapes[:3]}"
        )
    views = [_validate(v, iterations) for v in views]
    if _world_size() == 1:
        return views
    return list(gather(torch.stack(views)))


# --- 6. The INTL loss -----------------------------------------------------------------------------
# Views 1 to V-1 are each compared with view 0. With an EMA teacher, view 0 is the teacher's output
# and receives no gradient (sg: stop-gradient):
#
#     L = mean_{i>0} [ 2 - 2 mean_rows cos(z_hat_i, z_hat_0)
#                        + beta (L_trace(z_hat_i) + L_trace(z_hat_0)) ]
#     L = mean_{i>0} [ 2 - 2 mean_rows cos(z_hat_i, sg z_hat_0) + beta L_trace(z_hat_i) ]
#
# Published for n > 8: beta = 0.01 (log2 n - 3), where n is the number of variances: the GLOBAL
# batch size m on the channel axis, d on the batch axis.
#
# The loss needs only variances of z_hat and cosines of its rows. On the channel axis Gram matrices
# hold both, so z_hat is never formed: with G_v = zc_v zc_v^T / (d-1), C_v = zc_v zc_0^T / (d-1)
# and P_v from G_v, the diagonal of cov(z_hat_v) = P_v G_v P_v holds the variances of the rows,
# which are their squared norms / (d-1); their inner products / (d-1) are diag(P_v C_v P_0). (Here
# P_v includes the 1 / sqrt(tr G_v).) Besides small m x m products that is 7 products of 2 m m d
# operations for two views, forward and backward, where autograd through z_hat takes 12.
# [test_loss_equals_its_definition]


def _variances_and_cosines(
    views: Sequence[Tensor], iterations: int, axis: str
) -> tuple[Tensor, Tensor]:
    """For V views (m, d): variances of the rows (axis "channel") or columns ("batch") of z_hat,
    (V, m) or (V, d), and cosines of its rows with those of view 0, (V-1, m)."""
    divisor = _divisor(views[0], axis)
    zc = [_centre(v, axis) for v in views]  # V times (m, d)
    S = torch.stack([_gram(v) for v in zc]) / divisor  # (V, n, n), n = min(m, d)
    P, variance = _newton(S, iterations)  # (V, n, n), (V, n)

    if axis == "channel" and _rows_are_fewer(zc[0]):
        cross = torch.stack([v @ zc[0].mT for v in zc[1:]]) / divisor  # (V-1, m, m)
        inner = ((P[1:] @ cross) * P[0]).sum(-1)  # (V-1, m): diag(P_v C_v P_0)
        variance_product = variance[1:] * variance[0]  # (V-1, m)
        smallest = torch.finfo(inner.dtype).eps ** 2  # a row without variance has cosine 0
        return variance, inner * variance_product.clamp_min(smallest).rsqrt()

    z_hat = torch.stack([_multiply(p, v) for p, v in zip(P, zc)])  # (V, m, d)
    dim = -1 if axis == "channel" else -2
    variance = z_hat.square().sum(dim) / divisor  # z_hat is centred because zc is
    return variance, F.cosine_similarity(z_hat[1:], z_hat[:1], dim=-1)


def published_beta(n: int) -> float:
    """0.01 (log2 n - 3): the weight of the trace loss for n samples, or n channels on the batch
    axis (the official release). Positive only for n > 8."""
    return 0.01 * (math.log2(n) - 3)


class Setting(NamedTuple):
    """Constants of the loss for the shape of a global batch."""

    n: int  # coordinates with a variance: samples, or channels on the batch axis
    full_rank: int  # the largest possible rank of their covariance
    beta: float  # weight of the trace loss
    price: float  # extra loss at the rank min(full_rank / 4, 64) (section 8)


class INTLLoss(nn.Module):
    """IterNorm with trace loss.

    Call it with views 0 to V-1, a list of tensors (m, d) or one tensor (V, m, d), V >= 2. With an
    EMA teacher, `views` holds views 1 to V-1 and `teacher` (m, d) is view 0, without gradient. m is
    this process's part of the batch; under DDP every process must have the same (drop_last=True).
    Returns a scalar in float32, or in float64 for views in float64 or more than 10 iterations,
    also under autocast. [test_half_precision_and_autocast_change_nothing]

    iterations: Newton steps T.
    axis: "channel" (published) or "batch", see section 1.
    beta: weight of the trace loss; None: published_beta; "balanced": balanced_beta (section 8);
        0: IterNorm alone.

    The constructor raises ValueError for an invalid axis, iterations or beta. The call raises it
    for views of wrong or different shapes, and for n <= 8 if beta is None: the published beta would
    not be positive. [test_bad_input_is_a_value_error_that_names_it]

    After a call `parts` holds detached tensors `alignment` (mean 2 - 2 cos, in [0, 4]), `trace`
    (mean trace loss of the views that receive a gradient) and `score` (their mean trace over the
    largest possible one; 1 for an equal spectrum of full rank), and the floats `floor` (the least
    trace loss) and `price` (see Setting)."""

    def __init__(
        self, *, iterations: int = 4, axis: str = "channel", beta: float | str | None = None
    ):
        super().__init__()
        _validate_settings(axis, iterations)
        if isinstance(beta, str) and beta != "balanced":
            raise ValueError(f'beta must be a number, None or "balanced", got {beta!r}')
        self.iterations = iterations
        self.axis = axis
        self.beta = beta

    def setting(self, m: int, d: int, teacher: bool = False) -> Setting:
        """The constants for a global batch (m, d)."""
        if self.axis == "channel":
            n, full_rank = m, min(m, d - 1)
        else:
            n, full_rank = d, min(m - 1, d)

        if self.beta is None:
            beta = published_beta(n)
            if beta <= 0:
                raise ValueError(
                    f"the published beta, 0.01 (log2 n - 3), is not positive for n = {n} in a "
                    f'global batch of shape {(m, d)}: use beta="balanced" or a number'
                )
        elif self.beta == "balanced":
            beta = balanced_beta(n, self.iterations, full=full_rank)
        else:
            beta = self.beta

        rank = max(1, min(full_rank / 4, 64))
        price = rank_price(rank, n, self.iterations, beta, full=full_rank, teacher=teacher)
        return Setting(n, full_rank, beta, price)

    def forward(self, views: Sequence[Tensor] | Tensor, teacher: Tensor | None = None) -> Tensor:
        views = _gather_views(views, teacher, self.iterations)  # V times (m, d), global m
        m, d = views[0].shape
        setting = self.setting(m, d, teacher is not None)

        with torch.autocast(views[0].device.type, enabled=False):
            variance, cosine = _variances_and_cosines(views, self.iterations, self.axis)
            alignment = 2 - 2 * cosine.mean()  # cosine is (V-1, m)
            trace = (1 - variance).square().sum(-1)  # (V,), variance is (V, n)
            trace_term = trace[1:].mean()
            if teacher is None:
                trace_term = trace_term + trace[0]
            loss = alignment + setting.beta * trace_term

        first = 0 if teacher is None else 1  # the first view that receives a gradient
        max_trace = setting.full_rank * newton_map(1 / setting.full_rank, self.iterations)
        self.parts = {
            "alignment": alignment.detach(),
            "trace": trace[first:].detach().mean(),
            "floor": trace_floor(setting.n, self.iterations, setting.full_rank),
            "price": setting.price,
            "score": variance[first:].detach().sum(-1).mean() / max_trace,
        }
        return scale_grad_by_world_size(loss)


# --- 7. Related losses: exact transformations, CW-RGP, orthogonality ------------------------------


class SpectralLoss(nn.Module):
    """Mean 2 - 2 cos between view 0 and the others after the exact transformation l^(-p) of the
    global batch; called like INTLLoss. p = 0.5 is whitening, p = 0 is plain cosine alignment.
    Raises ValueError for a wrong axis or wrong shapes."""

    def __init__(self, p: float, *, axis: str = "channel"):
        super().__init__()
        _validate_settings(axis)
        self.p = p
        self.axis = axis

    def forward(self, views: Sequence[Tensor] | Tensor, teacher: Tensor | None = None) -> Tensor:
        z = torch.stack(_gather_views(views, teacher))  # (V, m, d)
        z_hat = spectral_transform(z, power(self.p), axis=self.axis)  # (V, m, d)
        loss = 2 - 2 * F.cosine_similarity(z_hat[1:], z_hat[:1], dim=-1).mean()
        self.parts = {"alignment": loss.detach()}
        return scale_grad_by_world_size(loss)


def group_whiten(z: Tensor, groups: int, permutation: Tensor | None = None) -> Tensor:
    """The transform of CW-RGP for z, (m, d) or (V, m, d); same shape.

    Samples are centred over all their channels. The channels are permuted and split into groups;
    each group is ZCA-whitened with its own m x m Gram matrix, divisor d / groups - 1; the
    permutation is undone. permutation: (d,) for all views, or (V, d), or None to keep the order.

    Raises ValueError if groups does not divide d, if d / groups <= m (a group's Gram matrix would
    be singular), or for a permutation of another shape."""
    z = _validate(z)
    m, d = z.shape[-2:]
    if groups < 1 or d % groups:
        raise ValueError(f"groups must divide the {d} channels, got {groups}")
    if d // groups <= m:
        raise ValueError(
            f"a group needs more channels than the {m} samples, got {d} channels / {groups} groups"
        )
    if permutation is None:
        permutation = torch.arange(d, device=z.device)
    if permutation.shape not in ((d,), (*z.shape[:-2], d)):
        raise ValueError(
            f"the permutation must be (d,) or (V, d) for embeddings {tuple(z.shape)}, "
            f"got {tuple(permutation.shape)}"
        )
    order = permutation.to(z.device).expand(*z.shape[:-2], d).unsqueeze(-2)  # (..., 1, d)

    with torch.autocast(z.device.type, enabled=False):
        zc = _centre(z.double(), "channel")  # (..., m, d)
        zg = zc.take_along_dim(order, -1)  # (..., m, d)
        zg = zg.unflatten(-1, (groups, -1)).transpose(-3, -2)  # (..., groups, m, d / groups)
        S = _gram(zg) / (d // groups - 1)  # (..., groups, m, m)
        zg = _MatrixFunction.apply(S, power(0.5)) @ zg
        zg = zg.transpose(-3, -2).flatten(-2)  # (..., m, d)
        return zg.take_along_dim(order.argsort(-1), -1).to(z.dtype)


class CWRGPLoss(nn.Module):
    """CW-RGP (channel whitening with random group partition): the mean over all pairs of views of
    2 - 2 cos between rows whitened by `group_whiten`. Call it with views like INTLLoss; it returns
    a scalar.

    groups: number of groups of channels; published for CIFAR: 4 for d = 512.
    sub_batch: the global batch is split at random into parts of sub_batch samples, each of
        which is whitened separately, with its own permutation in every view (None: one part);
        published for CIFAR: 64.
    repeats: random splits averaged in a step (w_iter in the official release).
    covariance_weight: weight of an extra term, an option of the release for ImageNet: in each block
        of sub_batch consecutive samples the sum of squared covariances between different samples,
        over sub_batch; its mean over blocks, summed over views.

    Raises ValueError if sub_batch does not divide the batch, and as group_whiten does."""

    def __init__(
        self,
        *,
        groups: int = 4,
        sub_batch: int | None = None,
        repeats: int = 1,
        covariance_weight: float = 0.0,
    ):
        super().__init__()
        self.groups = groups
        self.sub_batch = sub_batch
        self.repeats = repeats
        self.covariance_weight = covariance_weight

    def forward(self, views: Sequence[Tensor] | Tensor) -> Tensor:
        z = torch.stack(_gather_views(views, None))  # (V, m, d), global m
        V, m, d = z.shape
        size = self.sub_batch or m
        if m % size:
            raise ValueError(f"sub_batch must divide the global batch of {m} rows, got {size}")

        losses = []
        for _ in range(self.repeats):
            rows = torch.rand(m, device=z.device).argsort()  # (m,): a random partition of the batch
            orders = torch.rand(V * m // size, d, device=z.device).argsort(-1)  # one for each part
            if _world_size() > 1:
                dist.broadcast(rows, 0)
                dist.broadcast(orders, 0)
            parts = z[:, rows].reshape(-1, size, d)  # (V * m / size, size, d)
            z_hat = group_whiten(parts, self.groups, orders).reshape(V, m, d)
            for a, b in itertools.combinations(z_hat, 2):  # (m, d) each
                losses.append(2 - 2 * F.cosine_similarity(a, b).mean())
        loss = torch.stack(losses).mean()
        self.parts = {"alignment": loss.detach()}
        if self.covariance_weight:
            zc = _centre(z, "channel").unflatten(1, (-1, size))  # (V, m / size, size, d)
            S = _gram(zc) / (d - 1)  # (V, m / size, size, size)
            off_diagonal = S - S.diagonal(dim1=-2, dim2=-1).diag_embed()
            covariance = off_diagonal.square().sum((-2, -1)).mean(1).sum() / size
            loss = loss + self.covariance_weight * covariance
        return scale_grad_by_world_size(loss)


def orthogonality_penalty(module: nn.Module, kind: str = "so", power_iterations: int = 5) -> Tensor:
    """Orthogonality regularisation (OR): the sum over every Conv2d and Linear weight W of `module`,
    where a convolution's weight is out x (in kh kw), of

        "so":   ||G||_F^2,  G = W W^T - I or W^T W - I, whichever has fewer rows;
        "srip": the spectral norm of G, by power iteration from its longest column: a lower bound.

    The packed weight of nn.MultiheadAttention counts as three: q, k and v. Add the penalty to the
    loss for the ENCODER only, with weight 1e-6 (so) or 1e-3 (srip) for ResNets and 1e-5 (so) for
    small ViTs. Raises ValueError for a module without such weights or an unknown kind."""
    if kind not in ("so", "srip"):
        raise ValueError(f'kind must be "so" or "srip", got {kind!r}')
    weights = []  # each (out, in kh kw)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weights.append(layer.weight.flatten(1))
        elif isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            weights.extend(layer.in_proj_weight.chunk(3))
    if not weights:
        raise ValueError(f"{type(module).__name__} has no Conv2d or Linear weight to regularise")

    penalties = []
    for W in weights:
        with torch.autocast(W.device.type, enabled=False):
            G = _gram(W.to(torch.promote_types(W.dtype, torch.float32)))  # (n, n)
            G = G - torch.eye(len(G), dtype=G.dtype, device=G.device)
            if kind == "so":
                penalties.append(G.square().sum())
            else:
                longest = G.norm(dim=0).argmax(keepdim=True)  # stays on the device
                v = G.index_select(1, longest)[:, 0]  # (n,)
                for _ in range(power_iterations):
                    v = G @ F.normalize(v, dim=0)
                penalties.append((G @ F.normalize(v, dim=0)).norm())
    return torch.stack(penalties).sum()


# --- 8. Not in the papers: the price of lost rank, and a beta for small batches -------------------
# The floor L_r of the trace loss falls as the rank r grows (section 4). So two views of rank r have
# a trace term that exceeds that of an equal spectrum of full rank R by at least the price
#
#     p(r) = 2 beta (L_r - L_R)        (half of it with a teacher, whose view has no trace loss).
#
# All that a lower rank can save is alignment: at most 2, the difference between unrelated and
# identical views. So if p(r) >= 2, a collapse to rank r cannot lower the loss below that of
# unrelated views with an equal spectrum. [test_no_rank_is_worth_2]
#
# With the published beta p(1) is 4.4 for n = 256 and T = 4, but only 0.9 for n = 32 and T = 4, and
# 0.8 for n = 256 and T = 2. There networks do collapse (evidence/README.md, "Small batches").


def rank_price(
    rank: float,
    n: int,
    iterations: int,
    beta: float,
    *,
    full: int | None = None,
    teacher: bool = False,
) -> float:
    """p(rank): the least extra loss of two views of this rank, compared with `full` (None: n)."""
    views_with_trace_loss = 1 if teacher else 2
    lost = trace_floor(n, iterations, rank) - trace_floor(n, iterations, full)
    return views_with_trace_loss * beta * lost


def balanced_beta(n: int, iterations: int, *, full: int | None = None) -> float:
    """The smallest beta, without a teacher, for which p(1) >= 2 and p(min(full / 4, 64)) >= 0.6.
    full: the full rank (None: n). Returns 0 if full is 1.

    The first condition means that a collapse onto one direction cannot lower the loss below that of
    unrelated views with an equal spectrum. The second is a convention: the published beta for
    n = 256 and T = 4 has p(64) = 0.6.
    [test_the_balanced_beta_is_the_least_with_both_prices]"""
    full_rank = n if full is None else full
    if full_rank <= 1:
        return 0.0

    def price_for_beta_1(rank: float) -> float:
        return rank_price(rank, n, iterations, beta=1, full=full_rank)

    quarter = max(1, min(full_rank / 4, 64))
    return max(2 / price_for_beta_1(1), 0.6 / price_for_beta_1(quarter))


# --- 9. Diagnostics: collapse is visible in the spectrum before it affects accuracy ---------------


@torch.no_grad()
def spectrum(z: Tensor) -> Tensor:
    """Eigenvalues of cov(z) over the batch, descending: (m, d) -> (min(m, d),) or (V, m, d) ->
    (V, min(m, d)). Raises ValueError for a wrong shape."""
    zc = _centre(_validate(z), "batch")  # (..., m, d)
    return torch.linalg.svdvals(zc).square() / _divisor(zc, "batch")


def effective_rank(z: Tensor) -> Tensor:
    """exp(entropy of l / sum l) of the eigenvalues l of cov(z), in [1, min(m, d)]: (m, d) -> () or
    (V, m, d) -> (V,). RankMe (Garrido et al., 2023) takes the singular values of z instead."""
    l = spectrum(z)  # (..., n)
    p = l / l.sum(-1, keepdim=True).clamp_min(torch.finfo(l.dtype).tiny)  # (..., n)
    return torch.special.entr(p).sum(-1).exp()


def condition_number(z: Tensor) -> Tensor:
    """Ratio of the largest to the smallest eigenvalue of cov(z), ignoring those that are zero up to
    rounding; 1 for a constant batch: (m, d) -> () or (V, m, d) -> (V,)."""
    l = spectrum(z)  # (..., n)
    largest = l[..., :1]
    noise = (max(z.shape[-2:]) * torch.finfo(l.dtype).eps) ** 2 * largest  # singular values squared
    return torch.where(l > noise, largest / l, 1).amax(-1)


# --- 10. Demonstration ----------------------------------------------------------------------------


def demonstrate(steps: int = 400, plot: str | None = None):
    """Trains an MLP with each loss on two noisy views of 16 latent factors, and prints effective
    rank and condition number of the embedding; plots the spectra to the file `plot`. It uses the
    batch axis, since the embedding has only 64 channels."""
    losses = {
        "no transformation": SpectralLoss(0.0, axis="batch"),
        "power 0.2": SpectralLoss(0.2, axis="batch"),
        "power 0.4": SpectralLoss(0.4, axis="batch"),
        "whitening": SpectralLoss(0.5, axis="batch"),
        "power 0.6": SpectralLoss(0.6, axis="batch"),
        "IterNorm alone, T = 4": INTLLoss(axis="batch", beta=0.0),
        "INTL, T = 2": INTLLoss(axis="batch", iterations=2),
        "INTL, T = 4": INTLLoss(axis="batch", iterations=4),
        "INTL, T = 7": INTLLoss(axis="batch", iterations=7),
    }
    mixing = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) / 4

    def draw_views(samples: int) -> Tensor:
        """Two noisy views of the same latent factors, (2, samples, 64)."""
        factors = torch.randn(samples, 16)
        return factors @ mixing + 0.3 * torch.randn(2, samples, 64)

    spectra = {}
    print(f"{'transformation':24}{'effective rank of 64':>22}{'condition number':>18}")
    for name, loss in losses.items():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(64, 128),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 64),
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            loss([network(x) for x in draw_views(256)]).backward()
            optimizer.step()

        z = network.eval()(draw_views(4096)[0]).detach()  # (4096, 64)
        print(f"{name:24}{effective_rank(z):22.1f}{condition_number(z):18.3g}", flush=True)
        spectra[name] = spectrum(z)  # (64,)

    if plot:
        import matplotlib.pyplot as plt

        normalised = torch.stack([l / l[0] for l in spectra.values()])  # (losses, 64)
        plt.semilogy(normalised.T, label=list(spectra))
        plt.legend(
            title="eigenvalues over the largest", fontsize="x-small", title_fontsize="x-small"
        )
        plt.savefig(plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", metavar="FILE", help="plot the spectra (needs matplotlib)")
    demonstrate(plot=parser.parse_args().plot)
