"""INTL: IterNorm with trace loss, and the spectral transformations around it. Needs torch alone; copy this file.

    INTLLoss()([z1, z2]).backward()    # two views (m, d), on one process or under DistributedDataParallel
    python intl.py [--plot FILE]       # the paper's point as a table, and a picture, on a CPU in under 30 s
    python intl.py --benchmark         # time and memory beside the bare matrix products

INTL: Weng et al., "Modulate Your Spectrum in Self-Supervised Learning", ICLR 2024, arXiv 2305.16789. CW-RGP: Weng et al.,
"An Investigation into Whitening Loss for Self-supervised Learning", NeurIPS 2022, arXiv 2210.03586. OR: He et al.,
"Preventing Dimensional Collapse in Self-Supervised Learning via Orthogonality Regularization", NeurIPS 2024, arXiv
2411.00392. SPDX-License-Identifier: MIT. Names in [brackets] are the tests in test_intl.py that hold a claim.

Where the official code and the paper differ, and what this file does:
- The paper writes an embedding as d x m, the code and this file as m x d: samples in rows.
- The paper describes batch whitening; all official scripts run channel whitening (there `axis=0`). Here both, by name.
- The code iterates P <- 1.5 P - 0.5 P^3 N, which explodes in float32 from T = 12 to 15 on. Here the coupled form (section 3).
- The code whitens under autocast, and a constant batch gives NaN. Here float32 and finite values.
- The code forms the Gram matrix of the chosen axis. Here the smaller one, or no embedding at all (sections 1 and 6).
"""

import argparse
import functools
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- 1. Notation, centring, and the smaller Gram matrix -------------------------------------------------------------
# An embedding z is (m, d): m samples in rows, d channels in columns. V views of a batch are (V, m, d). zc is z, centred.
#   axis "batch":   centre every channel over the m samples;  S = zc^T zc / (m - 1), d x d: covariance of the channels.
#   axis "channel": centre every sample over its d channels;  S = zc zc^T / (d - 1), m x m: covariance of the samples.
# For every polynomial p, and so for every function of the eigenvalues,  zc p(zc^T zc) = p(zc zc^T) zc.  Either axis
# can therefore be computed on whichever Gram matrix is smaller, with the same result: the axes differ only in what is
# centred and in the divisor. [test_both_gram_matrices_give_the_same_transform]


def _checked(z: Tensor, axis: str, iterations: int = 1) -> Tensor:
    """z in float32 or float64 (a covariance in bfloat16 is 0.2 % off or more), or a ValueError that says what is wrong.

    A Newton step (section 3) multiplies eigenvalues near zero by 9/4, and so the rounding error of directions without
    variance: 2.25^10 of it fits float32, 2.25^40 needs float64. [test_iter_norm_is_stable]"""
    if not z.is_floating_point() or z.dim() not in (2, 3):
        raise ValueError(f"embeddings must be floating-point (m, d) or (V, m, d), got {z.dtype} {tuple(z.shape)}")
    if min(z.shape[-2:]) < 2:
        raise ValueError(f"a covariance needs at least 2 samples and 2 channels, got (m, d) = {tuple(z.shape[-2:])}")
    if axis not in ("channel", "batch"):
        raise ValueError(f'axis must be "channel" or "batch", got {axis!r}')
    if not 1 <= iterations <= 40:
        raise ValueError(f"iterations must be between 1 and 40 (the limit of many is whiten), got {iterations}")
    return z.to(torch.promote_types(z.dtype, torch.float64 if iterations > 10 else torch.float32))


def _centre(z: Tensor, axis: str) -> tuple[Tensor, int]:
    """z centred along the axis (..., m, d), and the divisor of its covariance."""
    dim = -1 if axis == "channel" else -2
    return z + z.sum(dim, keepdim=True) * (-1 / z.shape[dim]), z.shape[dim] - 1  # z - z.mean(): a slower backward


class _Gram(torch.autograd.Function):
    """x x^T: (..., n, k) -> (..., n, n). Autograd would take the factors for two matrices and need two products in the
    backward pass; the sum of its two terms is one, (D + D^T) x. [test_gradcheck]"""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return (grad + grad.mT) @ ctx.saved_tensors[0]


def _gram(zc: Tensor) -> Tensor:
    """The smaller of zc zc^T and zc^T zc: (..., n, n), n = min(m, d)."""
    return _Gram.apply(zc if zc.shape[-2] <= zc.shape[-1] else zc.mT)


def _apply(f: Tensor, zc: Tensor) -> Tensor:
    """zc f(zc^T zc) = f(zc zc^T) zc, from the side on which `_gram` was taken: (..., m, d)."""
    return f @ zc if zc.shape[-2] <= zc.shape[-1] else zc @ f


# --- 2. Spectral transformations: z_hat = zc U diag(g(l)) U^T, where S = U diag(l) U^T ------------------------------
# cov(z_hat) = U diag(l g(l)^2) U^T: a function g of the eigenvalues reshapes the spectrum and keeps the eigenvectors. (So
# written for the batch axis; on the channel axis the same factors stand on the left, U diag(g(l)) U^T zc.)
# Whitening is the instance g(l) = l^(-1/2). The paper's first finding: l^(-p) keeps an embedding from collapsing for p
# near 1/2 and not for small p, so whitening is not special. [test_demonstration]


class _MatrixFunction(torch.autograd.Function):
    """U diag(g(l)) U^T of a symmetric S. Hand-written because autograd through eigh divides by l_i - l_j: NaN for equal
    eigenvalues, and m <= d always gives S equal ones, zero. The transform is smooth there (Daleckii and Krein): with
    D = U^T dS U its differential is U (K o D) U^T, K_ij = (g_i - g_j) / (l_i - l_j), or the derivative where the two
    coincide. g may depend on all eigenvalues, e.g. on their sum; hence its Jacobian J. [test_gradcheck]"""

    @staticmethod
    def forward(ctx, S: Tensor, g: Callable[[Tensor], Tensor]) -> Tensor:
        l, U = torch.linalg.eigh(S)  # (..., n), (..., n, n)
        n, eps = l.shape[-1], torch.finfo(l.dtype).eps
        l = torch.where(l > n * eps * l[..., -1:], l, 0)  # directions without variance, up to rounding
        s, vjp = torch.func.vjp(g, l)  # (..., n)
        if s.shape != l.shape:
            raise ValueError(f"g must map eigenvalues {tuple(l.shape)} to as many scales, got {tuple(s.shape)}")
        s = torch.where(s.isfinite() | (l > 0), s, 0)  # 0^(-p): such a direction carries nothing and stays zero
        if ctx.needs_input_grad[0]:
            rows = torch.eye(n, dtype=l.dtype, device=l.device).reshape(n, *[1] * (l.dim() - 1), n).expand(n, *l.shape)
            J = torch.vmap(vjp)(rows)[0].movedim(0, -2)  # (..., n, n): J_ij = dg_i / dl_j
            J = torch.where(J.isfinite(), J, 0)
            own, li, lj = J.diagonal(dim1=-2, dim2=-1), l.unsqueeze(-1), l.unsqueeze(-2)
            # Below a relative gap of eps^(1/3) the derivative is more accurate than the quotient of rounded numbers.
            near = (li - lj).abs() <= eps ** (1 / 3) * torch.maximum(li, lj)  # (..., n, n), as K
            limit = (own.unsqueeze(-1) + own.unsqueeze(-2) - J - J.mT) / 2  # (..., n, n), zero on the diagonal
            K = torch.where(near, limit, (s.unsqueeze(-1) - s.unsqueeze(-2)) / torch.where(near, 1, li - lj))
            ctx.save_for_backward(U, K, J)
        return (U * s.unsqueeze(-2)) @ U.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        U, K, J = ctx.saved_tensors
        D = U.mT @ (grad + grad.mT) @ U / 2  # (..., n, n)
        along = (D.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) @ J).squeeze(-2)  # (..., n): through the eigenvalues
        return U @ (K * D + along.diag_embed()) @ U.mT, None


def spectral_transform(z: Tensor, g: Callable[[Tensor], Tensor], *, axis: str = "channel") -> Tensor:
    """The exact spectral transformation by g of z, (m, d) or (V, m, d); same shape.

    g maps eigenvalues (..., n), n = min(m, d), to scales of that shape by torch operations. Where it is infinite, as
    l^(-p) at zero, the output stays zero. Computed in float64, since small eigenvalues of a Gram matrix lose twice the
    digits; differentiable once. ValueError: wrong shape or axis."""
    z = _checked(z, axis)
    with torch.autocast(z.device.type, enabled=False):
        zc, divisor = _centre(z.double(), axis)  # (..., m, d)
        return _apply(_MatrixFunction.apply(_gram(zc) / divisor, g), zc).to(z.dtype)


def power(p: float) -> Callable[[Tensor], Tensor]:
    """g(l) = l^(-p): p = 0 no transformation, p = 0.5 whitening."""
    return lambda l: l.pow(-p)


def whiten(z: Tensor, *, axis: str = "channel") -> Tensor:
    """ZCA whitening of z, (m, d) or (V, m, d): every eigenvalue of the covariance that is not zero becomes one.
    ValueError: wrong shape or axis."""
    return spectral_transform(z, power(0.5), axis=axis)


# --- 3. IterNorm: a spectral transformation from a few matrix products ----------------------------------------------
# Newton's iteration for N^(-1/2), on the trace-normalised covariance N = S / tr(S), whose eigenvalues x sum to one:
#
#     P_0 = I,   P_{k+1} = (3 P_k - P_k^3 N) / 2,   z_hat = zc P_T / sqrt(tr S).
#
# Every P_k is a polynomial in S, so IterNorm IS a spectral transformation. It maps an eigenvalue x to h_T(x): with
# y_k = x^(1/2) P_k(x) the iteration reads y_{k+1} = (3 y_k - y_k^3) / 2, and with h = y^2
#
#     h_0 = x,   h_{k+1} = phi(h_k),   phi(h) = h (3 - h)^2 / 4.
#
# On [0, 1] phi' = 3 (1 - h)(3 - h) / 4 >= 0 and phi'' = (6 h - 12) / 4 < 0, and phi fixes 0 and 1. A composition of
# increasing concave maps is increasing and concave: h_T is increasing, strictly concave for T >= 1, stays in [0, 1],
# tends to 1 for every x > 0, and is below 1 for every finite T and x < 1. [test_newton_map_is_increasing_and_concave]


def newton_map(x, iterations: int):
    """h_T(x), elementwise, of a tensor or a float: what IterNorm makes of a trace-normalised eigenvalue x."""
    for _ in range(iterations):
        x = x * (3 - x) ** 2 / 4
    return x


def _newton(S: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """P_T / sqrt(tr S) and A_T of covariances S, all (V, n, n), by the coupled form: A_k = P_k^2 N has the eigenvalues
    h_k(x), and with B_k = (3I - A_k) / 2, P_{k+1} = P_k B_k and A_{k+1} = A_k B_k^2. (Written with P^3 N, P and N stop
    commuting and rounding errors explode.) [test_iter_norm_is_stable, test_the_uncoupled_form_explodes]"""
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]  # (V, 1, 1)
    trace = trace + (trace == 0)  # a constant batch has nothing to normalise
    A = S / trace  # (V, n, n)
    I = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)  # (n, n)
    P = None
    for _ in range(iterations):
        B = 1.5 * I - 0.5 * A  # (V, n, n)
        P = B if P is None else P @ B  # (V, n, n); P_0 = I
        A = A @ B @ B
    return P * trace.rsqrt(), A


def iter_norm(z: Tensor, *, iterations: int = 4, axis: str = "channel") -> Tensor:
    """IterNorm of z, (m, d) or (V, m, d); same shape, float32 or float64: the readable definition, to which the tests
    hold INTLLoss's shorter way. cov(z_hat) has the eigenvectors of cov(z) and the eigenvalues newton_map(l / sum l,
    iterations). ValueError: wrong shape, axis or number of iterations."""
    zc, divisor = _centre(_checked(z, axis, iterations).reshape(-1, *z.shape[-2:]), axis)  # (V, m, d)
    with torch.autocast(z.device.type, enabled=False):
        P, _ = _newton(_gram(zc) / divisor, iterations)  # (V, n, n), n = min(m, d)
        return _apply(P, zc).reshape(z.shape).to(torch.promote_types(z.dtype, torch.float32))


# --- 4. Trace loss: what IterNorm lacks -----------------------------------------------------------------------------
# With h_T < 1 an alignment loss may let the spectrum decay: IterNorm alone does not prevent collapse. The trace loss
#
#     L_trace(z_hat) = sum_j (1 - cov(z_hat)_jj)^2
#
# pulls the variance of every output coordinate to one. Why that equalises the spectrum: the trace of cov(z_hat) is
# sum_i h_T(x_i) with sum_i x_i = 1, and a symmetric sum of a strictly concave function has its only maximum at equal
# x_i = 1/r. As every h_T is below 1, more trace is less loss; by Jensen L_trace >= n (1 - (r/n) h_T(1/r))^2 for n
# coordinates of rank r, with equality at r equal eigenvalues and n equal variances. That floor is far from 0: 209.6 for
# n = r = 256 and T = 4, which is why a raw INTL loss near 21 is normal. [test_trace_loss_is_least_at_equal_eigenvalues]


def trace_loss(z_hat: Tensor, *, axis: str = "channel") -> Tensor:
    """sum_j (1 - var_j)^2 over the samples (axis "channel") or channels ("batch"): (m, d) -> (), (V, m, d) -> (V,).
    ValueError: wrong shape or axis."""
    return (1 - _checked(z_hat, axis).var(-1 if axis == "channel" else -2)).square().sum(-1)


def trace_floor(n: int, iterations: int, rank: int | None = None) -> float:
    """The least trace loss that IterNorm reaches with n coordinates of at most `rank` (None: n)."""
    rank = n if rank is None else rank
    return n * (1 - rank / n * newton_map(1 / rank, iterations)) ** 2


# --- 5. Many processes: statistics of the global batch, and a backward pass without communication -------------------
# Every rank gathers all rows and computes the full loss; so it already holds the exact gradient of that loss with
# respect to its own rows. Only they keep their graph, the others arrive detached. DistributedDataParallel then AVERAGES
# over ranks what should be summed; the losses therefore multiply their gradient by the world size. (A forgotten factor
# shows in no loss curve.) [test_gradient_over_processes_equals_one_process]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(z: Tensor) -> Tensor:
    """The rows of all ranks in rank order, (m, d) -> (world * m, d) or (V, m, d) -> (V, world * m, d); every rank must
    hold as many. The gradient, not scaled, reaches the local rows. The identity for one process."""
    if _world_size() == 1:
        return z
    local = z.detach().contiguous()
    slots = [torch.empty_like(local) for _ in range(_world_size())]
    dist.all_gather(slots, local)
    slots[dist.get_rank()] = z
    return torch.cat(slots, dim=-2)


def undo_ddp_average(loss: Tensor) -> Tensor:
    """The same value, its gradient times the world size."""
    return loss if _world_size() == 1 else loss.detach() + _world_size() * (loss - loss.detach())


def _all_views(views: Sequence[Tensor] | Tensor, axis: str, iterations: int = 1) -> list[Tensor]:
    """V >= 2 views of one shape (m, d), checked and gathered in one communication: V times (world * m, d)."""
    views = list(views)
    shapes = [tuple(v.shape) for v in views]
    if len(shapes) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"the loss needs a list of two or more views of one shape (m, d), got {shapes[:3]}")
    dtype = functools.reduce(torch.promote_types, [v.dtype for v in views])
    views = [_checked(v.to(dtype), axis, iterations) for v in views]
    return views if _world_size() == 1 else list(gather(torch.stack(views)))


# --- 6. The INTL loss -----------------------------------------------------------------------------------------------
# For V views against view 0; and, with a teacher, for its view 0 without gradient (sg) and V - 1 views of the student:
#
#     L = 1/(V-1) sum_{i>0} [ 2 - 2 mean_rows cos(z_hat_i, z_hat_0)    + beta (L_trace(z_hat_i) + L_trace(z_hat_0)) ]
#     L = 1/(V-1) sum_{i>0} [ 2 - 2 mean_rows cos(z_hat_i, sg z_hat_0) + beta  L_trace(z_hat_i) ]
#
# beta = 0.01 (log2 n - 3); n = m, the GLOBAL batch, on the channel axis, n = d on the batch axis (negative for n < 8).
#
# On the channel axis Gram matrices suffice. With G_v = zc_v zc_v^T / (d-1), C_v = zc_v zc_0^T / (d-1) and P_v from G_v:
# cov(z_hat_v) = P_v G_v P_v is A_T of the iteration; its diagonal holds the row variances of the trace loss, and also
# the squared row norms / (d-1); the rows' inner products are diag(P_v C_v P_0). For two views that is 7 products of
# 2 m m d operations, forward and backward, where forming z_hat takes 12. [test_loss_equals_its_definition]


def _statistics(zc: list[Tensor], divisor: int, iterations: int, axis: str) -> tuple[Tensor, Tensor]:
    """Variances of z_hat, (V, m) or (V, d), and cosines (V-1, m) of its rows with view 0's, for V centred zc (m, d)."""
    m, d = zc[0].shape
    P, A = _newton(torch.stack([_gram(v) for v in zc]) / divisor, iterations)  # (V, n, n), n = min(m, d)
    if axis == "channel" and m <= d:
        C = torch.stack([v @ zc[0].mT for v in zc[1:]])  # (V-1, m, m)
        inner = ((P[1:] @ C) * P[0]).sum(-1)  # (V-1, m): diag(P_v C_v P_0)
        variance = A.diagonal(dim1=-2, dim2=-1)  # (V, m)
        squares = variance * divisor
    else:
        z_hat = torch.stack([_apply(p, v) for p, v in zip(P, zc)])  # (V, m, d)
        inner = (z_hat[1:] * z_hat[0]).sum(-1)  # (V-1, m)
        squares = z_hat.square().sum(-1)  # (V, m)
        variance = squares / divisor if axis == "channel" else z_hat.square().sum(-2) / divisor  # (V, m) or (V, d)
    tiny = torch.finfo(squares.dtype).eps ** 2  # a row without variance has no direction: cosine 0
    return variance, inner * (squares[1:] * squares[0]).clamp_min(tiny).rsqrt()


class INTLLoss(nn.Module):
    """IterNorm with trace loss. Call with views, V tensors (m, d) or one (V, m, d), and optionally a teacher's view 0
    (m, d), which receives no gradient; returns a scalar. m is this process's share of the global batch.

    iterations: Newton steps T. axis: see section 1. beta: weight of the trace loss; None: the rule above, 0: IterNorm
    alone. ValueError: views of different shapes, fewer than 2 rows, a wrong axis or number of iterations.

    The scalar is float32, or float64 for views in float64 or more than 10 iterations. Call backward outside autocast, as
    torch advises: inside it the backward pass's products are halved again. [test_half_precision_and_autocast_change_nothing]

    After a call `parts` holds, detached and still on the device, `alignment` (mean 2 - 2 cos, in [0, 4]), `trace` (mean
    over the views that receive gradient) and `score` (those views' mean variance over its attainable maximum: 1 for an
    equal spectrum of full rank); and as floats `floor`, the least trace loss, and `least`, the score of a collapse."""

    def __init__(self, *, iterations: int = 4, axis: str = "channel", beta: float | None = None):
        super().__init__()
        self.iterations, self.axis, self.beta = iterations, axis, beta
        self.parts: dict[str, Tensor | float] = {}

    def forward(self, views: Sequence[Tensor] | Tensor, teacher: Tensor | None = None) -> Tensor:
        views = views if teacher is None else [teacher.detach(), *views]
        z = _all_views(views, self.axis, self.iterations)  # V times (m, d), global m
        with torch.autocast(z[0].device.type, enabled=False):
            m, d = z[0].shape
            zc = [_centre(v, self.axis)[0] for v in z]  # V times (m, d)
            n, divisor, rank = (m, d - 1, min(m, d - 1)) if self.axis == "channel" else (d, m - 1, min(m - 1, d))
            variance, cosine = _statistics(zc, divisor, self.iterations, self.axis)  # (V, n), (V-1, m)
            beta = 0.01 * (math.log2(n) - 3) if self.beta is None else self.beta
            alignment = 2 - 2 * cosine.mean()
            trace = (1 - variance).square().sum(-1)  # (V,)
            loss = alignment + beta * (trace[1:].mean() + (trace[0] if teacher is None else 0))
            trained = slice(0 if teacher is None else 1, None)
            most = rank * newton_map(1 / rank, self.iterations)  # sum of the variances at equal eigenvalues
            self.parts = {
                "alignment": alignment.detach(),
                "trace": trace[trained].detach().mean(),
                "floor": trace_floor(n, self.iterations, rank),
                "score": variance[trained].detach().mean() * n / most,
                "least": 1 / most,
            }
            return undo_ddp_average(loss)


# --- 7. Kin: channel whitening with random group partition, and orthogonality regularisation ------------------------


def group_whiten(z: Tensor, groups: int, permutation: Tensor | None = None) -> Tensor:
    """CW-RGP's transform of z, (m, d) or (V, m, d); same shape. Every sample is centred over all its channels; the
    channels, permuted by (d,) (None: in order), are split into groups; each is ZCA-whitened with its own m x m Gram
    matrix, divisor d / groups - 1; the permutation is undone. ValueError unless groups divides d and d / groups > m:
    with fewer channels than samples a group's Gram matrix is singular and its rows cannot be made orthogonal."""
    z = _checked(z, "channel")
    m, d = z.shape[-2:]
    if groups < 1 or d % groups or d // groups <= m:
        raise ValueError(f"groups must divide d into parts larger than m, got (m, d) = {(m, d)} and groups = {groups}")
    order = torch.arange(d, device=z.device) if permutation is None else permutation.to(z.device)
    if order.shape != (d,):
        raise ValueError(f"the permutation must have shape {(d,)}, got {tuple(order.shape)}")
    if not torch.equal(order.sort().values, torch.arange(d, device=z.device)):
        raise ValueError(f"the permutation must hold every number from 0 to {d - 1} once")
    with torch.autocast(z.device.type, enabled=False):
        zc, _ = _centre(z.double(), "channel")  # (..., m, d)
        zg = zc[..., order].unflatten(-1, (groups, -1)).transpose(-3, -2)  # (..., groups, m, d / groups)
        zg = _MatrixFunction.apply(_gram(zg) / (d // groups - 1), power(0.5)) @ zg
        return zg.transpose(-3, -2).flatten(-2)[..., order.argsort()].to(z.dtype)


class CWRGPLoss(nn.Module):
    """CW-RGP: mean over all pairs of views of 2 - 2 cos between rows whitened by `group_whiten`, every view with a
    random permutation of its own (the same on all ranks). Call with views as for INTLLoss; returns a scalar.

    sub_batch: samples of the global batch that are whitened together (None: all). ValueError if it does not divide the
    batch, and as group_whiten. Published: sub_batch 64, groups 4 for d = 512; 128 and 2 for d = 1024."""

    def __init__(self, *, groups: int = 4, sub_batch: int | None = None):
        super().__init__()
        self.groups, self.sub_batch = groups, sub_batch
        self.parts: dict[str, Tensor] = {}

    def forward(self, views: Sequence[Tensor] | Tensor) -> Tensor:
        z = _all_views(views, "channel")  # V times (m, d), global m
        m, d = z[0].shape
        size = m if self.sub_batch is None else self.sub_batch
        if size < 2 or m % size:
            raise ValueError(f"sub_batch must divide the global batch of {m} rows, got {size}")
        orders = torch.stack([torch.randperm(d, device=z[0].device) for _ in z])  # (V, d)
        if _world_size() > 1:
            dist.broadcast(orders, 0)
        z = [group_whiten(v.reshape(-1, size, d), self.groups, o).reshape(m, d) for v, o in zip(z, orders)]
        losses = [2 - 2 * F.cosine_similarity(a, b).mean() for a, b in itertools.combinations(z, 2)]
        self.parts = {"alignment": torch.stack(losses).detach().mean()}
        return undo_ddp_average(torch.stack(losses).mean())


def orthogonality_penalty(module: nn.Module, kind: str = "so", power_iterations: int = 5) -> Tensor:
    """OR: sum over every Conv2d and Linear weight W in `module`, a convolution flattened to out x (in kh kw), of

        "so":   ||G||_F^2,              G = W W^T - I or W^T W - I, whichever is smaller;
        "srip": the spectral norm of G, by power iteration from its longest column: a lower bound that grows with steps.

    Add it to the loss for the ENCODER alone: weight 1e-6 (so) or 1e-3 (srip) for ResNets, 1e-5 (so) for small ViTs.
    (torch's MultiheadAttention packs q, k and v into no Linear: not counted.) ValueError: no such weights, other kind."""
    if kind not in ("so", "srip"):
        raise ValueError(f'kind must be "so" or "srip", got {kind!r}')
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = [layer.weight.flatten(1) for layer in layers]  # (out, in kh kw)
    if not weights:
        raise ValueError(f"{type(module).__name__} has no Conv2d or Linear weight to keep orthogonal")
    penalties = []
    for W in weights:
        with torch.autocast(W.device.type, enabled=False):
            G = _gram(W.to(torch.promote_types(W.dtype, torch.float32)))  # (n, n), n = min(out, in)
            G = G - torch.eye(len(G), dtype=G.dtype, device=G.device)
            if kind == "srip":
                v = G.index_select(1, G.norm(dim=0).argmax(keepdim=True))[:, 0]  # (n,); no wait for the device
                for _ in range(power_iterations):
                    v = G @ F.normalize(v, dim=0)
            penalties.append(G.square().sum() if kind == "so" else (G @ F.normalize(v, dim=0)).norm())
    return torch.stack(penalties).sum()


# --- 8. Diagnostics: collapse shows in the spectrum before it shows in accuracy -------------------------------------
# Not differentiable; ValueError for what is no (m, d) or (V, m, d).


@torch.no_grad()
def spectrum(z: Tensor) -> Tensor:
    """Eigenvalues of cov(z) over the batch, descending: (m, d) -> (min(m, d),), (V, m, d) -> (V, min(m, d))."""
    zc, divisor = _centre(_checked(z, "batch"), "batch")  # (..., m, d)
    return torch.linalg.svdvals(zc).square() / divisor


def effective_rank(z: Tensor) -> Tensor:
    """exp(entropy of l / sum l), l = spectrum(z), in [1, min(m, d)]; RankMe takes the singular values of z instead.
    A constant batch has effective rank 1. (m, d) -> (), (V, m, d) -> (V,)."""
    l = spectrum(z)  # (..., n)
    p = l / l.sum(-1, keepdim=True).clamp_min(torch.finfo(l.dtype).tiny)  # (..., n)
    return torch.special.entr(p).sum(-1).exp()


def condition_number(z: Tensor) -> Tensor:
    """Largest over smallest eigenvalue of cov(z) that is not zero up to rounding; 1 for a constant batch.
    (m, d) -> (), (V, m, d) -> (V,)."""
    l = spectrum(z)  # (..., n)
    noise = (max(z.shape[-2:]) * torch.finfo(l.dtype).eps) ** 2 * l[..., :1]  # that of singular values, squared
    least = torch.where(l > noise, l, l[..., :1]).amin(-1)
    return torch.where(least > 0, l[..., 0] / torch.where(least > 0, least, 1), 1)


# --- 9. Demonstration and benchmark ---------------------------------------------------------------------------------


def demonstrate(steps: int = 400, plot: str | None = None) -> dict[str, tuple[float, float]]:
    """Train a small MLP on two noisy views of 16 latent factors with one loss after another; print what is left of the
    embedding's spectrum, and return {name: (effective rank of 64, condition number)}."""

    def aligned(p: float) -> Callable[[Tensor], Tensor]:
        return lambda z: 2 - 2 * F.cosine_similarity(*spectral_transform(z, power(p), axis="batch"), dim=-1).mean()

    losses = {"no transform": aligned(0.0), "power 0.2": aligned(0.2), "power 0.4": aligned(0.4)}
    losses |= {"power 0.5, whitening": aligned(0.5), "power 0.6": aligned(0.6)}
    losses |= {"IterNorm alone, T = 4": INTLLoss(axis="batch", beta=0.0)}
    losses |= {f"INTL, T = {T}": INTLLoss(axis="batch", iterations=T) for T in (2, 4, 7)}
    spectra, results, mixing = {}, {}, torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) / 4

    def views(samples: int) -> Tensor:  # (2, samples, 64)
        return torch.randn(samples, 16) @ mixing + 0.3 * torch.randn(2, samples, 64)

    print(f"{'transform':24}{'effective rank of 64':>22}{'condition number':>18}  verdict")
    for name, loss in losses.items():
        torch.manual_seed(0)
        hidden = [[nn.Linear(n, 128), nn.BatchNorm1d(128), nn.ReLU()] for n in (64, 128)]
        network = nn.Sequential(*hidden[0], *hidden[1], nn.Linear(128, 64))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(torch.stack([network(x) for x in views(256)])).backward()
            optimizer.step()
        z = network.eval()(views(4096)[0]).detach()  # (4096, 64)
        rank, condition = effective_rank(z).item(), condition_number(z).item()
        verdict = "keeps nearly all" if rank > 0.8 * 64 else "keeps some" if rank > 0.3 * 64 else "loses most"
        print(f"{name:24}{rank:22.1f}{condition:18.3g}  {verdict}", flush=True)
        spectra[name], results[name] = spectrum(z), (rank, condition)
    if plot:
        draw_spectra(spectra, plot)
    return results


def undrawable(file: str) -> str | None:
    """Why draw_spectra cannot write this file, as is better known before the work."""
    if importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install matplotlib"
    if os.path.splitext(file)[1] not in (".png", ".pdf", ".svg") or not os.path.isdir(os.path.dirname(file) or "."):
        return f"--plot {file}: a name that ends in .png, .pdf or .svg, in a folder that exists"
    return None


def draw_spectra(spectra: dict[str, Tensor], file: str) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, l in spectra.items():  # (n,)
        l = l[l > 1e-8 * l[0]] / l[0]  # the others are rounding, or zero since the batch is centred
        axes.semilogy(range(1, len(l) + 1), l, label=name)
    axes.set(xlabel="eigenvalues of the embedding's covariance, in order", ylabel="relative to the largest", ylim=(1e-8, 2))
    axes.legend()
    plt.savefig(file, dpi=120)


def _barlow_twins(views: list[Tensor]) -> Tensor:
    a, b = ((v - v.mean(0)) / v.std(0) for v in views)
    C = a.mT @ b / len(a)  # (d, d)
    return (1 - C.diagonal()).square().sum() + 0.005 * (C.square().sum() - C.diagonal().square().sum())


def _vicreg(views: list[Tensor]) -> Tensor:
    loss = 25 * F.mse_loss(*views)
    for v in views:
        C = torch.cov(v.mT)  # (d, d)
        spread = F.relu(1 - (C.diagonal() + 1e-4).sqrt()).mean()
        loss = loss + 12.5 * spread + (C.square().sum() - C.diagonal().square().sum()) / v.shape[1]
    return loss


def _peak_memory(step: Callable, device: torch.device) -> int:
    """Bytes that `step` holds at most beyond what is allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports on itself otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(events, initial=0))


def benchmark(sizes=((256, 2048), (256, 8192), (1024, 512)), rounds: int = 7) -> None:
    """Forward and backward of two float32 views, contenders in turn: median milliseconds, and peak memory beyond the
    inputs in units of one view. The products are those, of 2 m d min(m, d) operations, of the straightforward
    computation: a Gram matrix and a transformed embedding for either view, and twice that backward."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, median of {rounds} rounds")
    losses = {"INTL, channel axis": INTLLoss(), "INTL, batch axis": INTLLoss(axis="batch")}
    losses["exact whitening"] = lambda views: F.cosine_similarity(*whiten(torch.stack(views)), dim=-1).mean()
    losses |= {"Barlow Twins": _barlow_twins, "VICReg": _vicreg}
    for m, d in sizes:
        views = [torch.randn(m, d, device=device, requires_grad=True) for _ in range(2)]
        x = torch.randn(min(m, d), max(m, d), device=device)  # (n, k)
        f = torch.randn(min(m, d), min(m, d), device=device)  # (n, n)
        steps = {"12 bare products": lambda x=x, f=f: [(x @ x.mT, f @ x, f @ x) for _ in range(4)]}
        for name, loss in losses.items():
            steps[name] = lambda loss=loss, views=views: torch.autograd.grad(loss(views), views)
        times = {name: [] for name in steps}
        for name, step in itertools.chain(*[steps.items()] * (rounds + 1)):  # the first round warms up
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
        median = {name: sorted(t[1:])[rounds // 2] for name, t in times.items()}
        print(f"\n{f'(m, d) = ({m}, {d})':24}{'ms':>10}{'x products':>12}{'memory':>10}")
        for name, step in steps.items():
            ratio, memory = median[name] / median["12 bare products"], _peak_memory(step, device) / (4 * m * d)
            print(f"{name:24}{median[name]:10.1f}{ratio:12.2f}{memory:10.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", help="draw the spectra of the demonstration (needs matplotlib)")
    parser.add_argument("--benchmark", action="store_true", help="time the losses instead")
    arguments = parser.parse_args()
    if arguments.plot and arguments.benchmark:
        parser.error("--plot draws the demonstration: leave out --benchmark")
    if arguments.plot and (trouble := undrawable(arguments.plot)):
        parser.error(trouble)
    benchmark() if arguments.benchmark else demonstrate(plot=arguments.plot)
