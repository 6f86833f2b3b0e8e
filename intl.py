"""INTL: IterNorm with trace loss, and the transformations around it. Needs torch alone: copy this file.

    INTLLoss()([z1, z2]).backward()    # two views (m, d), in one process or under DistributedDataParallel
    python intl.py [--plot FILE]       # the paper's point as a table, and a picture, on a CPU in under 30 s

INTL: "Modulate Your Spectrum in Self-Supervised Learning", Weng et al., ICLR 2024, arXiv 2305.16789. CW-RGP:
Weng et al., NeurIPS 2022, arXiv 2210.03586. OR: He et al., NeurIPS 2024, arXiv 2411.00392.
Names in [brackets] are tests in test_intl.py that hold a claim. SPDX-License-Identifier: MIT.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- 1. Notation, centring, and the smaller Gram matrix -----------------------------------------------------
# An embedding z is (m, d): m samples in rows, d channels in columns (the paper: the transpose); V views of a
# batch are (V, m, d). zc is z centred, and S the covariance of
#   axis "batch":   the d channels, each centred over the m samples:  S = zc^T zc / (m - 1), d x d;
#   axis "channel": the m samples, each centred over its d channels:  S = zc zc^T / (d - 1), m x m.
# For every polynomial p, and so for every function of the eigenvalues,  zc p(zc^T zc) = p(zc zc^T) zc.
# Either axis can therefore be computed on whichever Gram matrix is smaller, with the same result: they differ
# only in what is centred and in the divisor. [test_both_gram_matrices_give_the_same_transform]


def _check_settings(axis: str, iterations: int = 1):
    if axis not in ("channel", "batch"):
        raise ValueError(f'axis must be "channel" or "batch", got {axis!r}')
    if not 1 <= iterations <= 40:
        raise ValueError(f"iterations must be from 1 to 40 (whiten is the limit of many), got {iterations}")


def _checked(z: Tensor, iterations: int = 1) -> Tensor:
    """z in float32 (a covariance in bfloat16 is 0.2 % off or more) or float64; ValueError for a wrong shape.
    A Newton step (section 3) multiplies eigenvalues near zero by 9/4, and so the rounding error of directions
    without variance: 2.25^10 of it fits float32, 2.25^40 needs float64. [test_iter_norm_is_stable]"""
    if not z.is_floating_point() or z.dim() not in (2, 3):
        raise ValueError(f"embeddings are floating-point (m, d) or (V, m, d), got {z.dtype} {tuple(z.shape)}")
    if min(z.shape[-2:]) < 2:
        raise ValueError(f"a covariance needs 2 samples and 2 channels, got (m, d) = {tuple(z.shape[-2:])}")
    return z.to(torch.promote_types(z.dtype, torch.float64 if iterations > 10 else torch.float32))


def _centre(z: Tensor, axis: str) -> tuple[Tensor, int]:
    """z centred along the axis (..., m, d), and the divisor of its covariance."""
    dim = -1 if axis == "channel" else -2
    zc = z + z.sum(dim, keepdim=True) * (-1 / z.shape[dim])  # z.mean() has a slower backward
    return zc, z.shape[dim] - 1


class _Gram(torch.autograd.Function):
    """x x^T, (..., n, k) -> (..., n, n). Autograd would take the factors for two matrices, and need a product
    for either in the backward pass; their sum is one product, (D + D^T) x. [test_gradcheck]"""

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


# --- 2. Spectral transformations: z_hat = zc U diag(g(l)) U^T, where S = U diag(l) U^T ----------------------
# cov(z_hat) = U diag(l g(l)^2) U^T: a function g of the eigenvalues reshapes the spectrum and keeps the
# eigenvectors. (Written for the batch axis; on the channel axis the factors stand left, U diag(g(l)) U^T zc.)
# Whitening is the instance g(l) = l^(-1/2). The paper's first finding: l^(-p) keeps an embedding from
# collapsing for p near 1/2 and not for small p, so whitening is not special. [test_demonstration]


class _MatrixFunction(torch.autograd.Function):
    """U diag(g(l)) U^T of a symmetric S. Hand-written because autograd through eigh divides by l_i - l_j: NaN
    for equal eigenvalues, and a collapsed batch has many, zero. The transform is smooth there (Daleckii
    and Krein): with D = U^T dS U its differential is U (K o D) U^T, K_ij = (g_i - g_j) / (l_i - l_j), or the
    derivative where the two coincide. g may depend on all l, say on their sum: hence J. [test_gradcheck]"""

    @staticmethod
    def forward(ctx, S: Tensor, g: Callable[[Tensor], Tensor]) -> Tensor:
        l, U = torch.linalg.eigh(S)  # (..., n), (..., n, n)
        n, eps = l.shape[-1], torch.finfo(l.dtype).eps
        l = torch.where(l > n * eps * l[..., -1:], l, 0)  # directions without variance, up to rounding
        s = g(l)  # (..., n)
        if s.shape != l.shape:
            raise ValueError(f"g must map eigenvalues {tuple(l.shape)} to as many, got {tuple(s.shape)}")
        s = torch.where(s.isfinite() | (l > 0), s, 0)  # 0^(-p): such a direction stays zero

        if ctx.needs_input_grad[0]:
            J = torch.vmap(torch.func.jacrev(g))(l.reshape(-1, n))  # J_ij = dg_i / dl_j
            J = J.reshape(*l.shape, n)  # (..., n, n), as K
            J = torch.where(J.isfinite(), J, 0)
            own, gap = J.diagonal(dim1=-2, dim2=-1), l.unsqueeze(-1) - l.unsqueeze(-2)
            # Below a relative gap of eps^(1/3) the derivative is more exact than the quotient.
            near = gap.abs() <= eps ** (1 / 3) * torch.maximum(l.unsqueeze(-1), l.unsqueeze(-2))
            limit = (own.unsqueeze(-1) + own.unsqueeze(-2) - J - J.mT) / 2  # zero on the diagonal
            K = torch.where(near, limit, (s.unsqueeze(-1) - s.unsqueeze(-2)) / torch.where(near, 1, gap))
            ctx.save_for_backward(U, K, J)
        return (U * s.unsqueeze(-2)) @ U.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        U, K, J = ctx.saved_tensors
        D = U.mT @ (grad + grad.mT) @ U / 2  # (..., n, n)
        along = (D.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) @ J).squeeze(-2)  # (..., n): by the eigenvalues
        return U @ (K * D + along.diag_embed()) @ U.mT, None


def spectral_transform(z: Tensor, g: Callable[[Tensor], Tensor], *, axis: str = "channel") -> Tensor:
    """The exact spectral transformation by g of z, (m, d) or (V, m, d); same shape. g maps eigenvalues
    (..., n), n = min(m, d), to as many scales; where it is infinite, as l^(-p) at zero, the output is zero.
    In float64, since small eigenvalues of a Gram matrix lose twice the digits; differentiable once.
    ValueError: wrong shape or axis."""
    _check_settings(axis)
    z = _checked(z)
    with torch.autocast(z.device.type, enabled=False):
        zc, divisor = _centre(z.double(), axis)  # (..., m, d)
        return _apply(_MatrixFunction.apply(_gram(zc) / divisor, g), zc).to(z.dtype)


def power(p: float) -> Callable[[Tensor], Tensor]:
    """g(l) = l^(-p): p = 0 no transformation, p = 0.5 whitening."""
    return lambda l: l.pow(-p)


def whiten(z: Tensor, *, axis: str = "channel") -> Tensor:
    """ZCA whitening of z, (m, d) or (V, m, d): every non-zero eigenvalue of the covariance becomes one."""
    return spectral_transform(z, power(0.5), axis=axis)


# --- 3. IterNorm: a spectral transformation from a few matrix products --------------------------------------
# Newton's iteration for N^(-1/2), where N = S / tr(S), whose eigenvalues x sum to one:
#
#     P_0 = I,   P_{k+1} = (3 P_k - P_k^3 N) / 2,   z_hat = zc P_T / sqrt(tr S).
#
# Every P_k is a polynomial in S, so IterNorm IS a spectral transformation. It maps an eigenvalue x to h_T(x):
# with y_k = x^(1/2) P_k(x) the iteration reads y_{k+1} = (3 y_k - y_k^3) / 2, and with h = y^2
#
#     h_0 = x,   h_{k+1} = phi(h_k),   phi(h) = h (3 - h)^2 / 4.
#
# On [0, 1] phi' = 3 (1 - h)(3 - h) / 4 >= 0 and phi'' = (6 h - 12) / 4 < 0, and phi fixes 0 and 1. A
# composition of such maps is one: h_T is increasing, strictly concave for T >= 1, stays in [0, 1], tends to 1
# for every x > 0, and is below 1 for all finite T and x < 1. [test_newton_map_is_increasing_and_concave]


def newton_map(x, iterations: int):
    """h_T(x), elementwise, of a tensor or a float: what IterNorm makes of a trace-normalised eigenvalue x."""
    for _ in range(iterations):
        x = x * (3 - x) ** 2 / 4
    return x


def _newton(S: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Of covariances S (V, n, n): P_T / sqrt(tr S), and the diagonal (V, n) of cov(z_hat) = P_T N P_T, by the
    coupled form: A_k = P_k^2 N has the eigenvalues h_k(x), and with B_k = (3I - A_k) / 2, P_{k+1} = P_k B_k
    and A_{k+1} = A_k B_k^2. [test_iter_norm_is_stable] (Written with P^3 N, as in the official code, P and N
    stop commuting, and rounding errors explode from T = 12 on. [test_the_uncoupled_form_explodes])"""
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]  # (V, 1, 1)
    trace = trace + (trace == 0)  # a constant batch has nothing to normalise
    I = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)  # (n, n)
    A = S / trace  # (V, n, n), as P and B
    P = B = 1.5 * I - 0.5 * A
    for _ in range(iterations - 1):
        A = A @ B @ B
        B = 1.5 * I - 0.5 * A
        P = P @ B
    return P * trace.rsqrt(), (A @ B * B).sum(-1)  # of A_T = A B^2 the diagonal alone: a product less


def iter_norm(z: Tensor, *, iterations: int = 4, axis: str = "channel") -> Tensor:
    """IterNorm of z, (m, d) or (V, m, d); same shape, float32 or float64: the definition, to which the tests
    hold INTLLoss's shorter way. ValueError: wrong shape, axis or number of iterations."""
    _check_settings(axis, iterations)
    zc, divisor = _centre(_checked(z, iterations).reshape(-1, *z.shape[-2:]), axis)  # (V, m, d)
    with torch.autocast(z.device.type, enabled=False):
        P, _ = _newton(_gram(zc) / divisor, iterations)  # (V, n, n), n = min(m, d)
        return _apply(P, zc).reshape(z.shape).to(torch.promote_types(z.dtype, torch.float32))


# --- 4. Trace loss: what IterNorm lacks ---------------------------------------------------------------------
# With h_T < 1 alignment may let the spectrum decay: IterNorm alone does not prevent collapse. This does:
#
#     L_trace(z_hat) = sum_j (1 - cov(z_hat)_jj)^2.
#
# It pulls the variance of every output coordinate to one. Why that equalises the spectrum: the trace of
# cov(z_hat) is sum_i h_T(x_i) with sum_i x_i = 1, and a symmetric sum of a strictly concave function has its
# only maximum at equal x_i = 1/r. More trace is less loss, as h_T < 1; so by Jensen, n coordinates of rank r
# have L_trace >= L_r = n (1 - (r/n) h_T(1/r))^2, with equality at r equal eigenvalues and n equal variances.
# 209.6 for n = r = 256 and T = 4: a loss near 21 is normal. [test_trace_loss_is_least_at_equal_eigenvalues]
#
# L_r falls as r grows. In INTL's loss (section 6) two views of rank r pay at least the price
#
#     p(r) = 2 beta (L_r - L_R),   with a teacher, whose view has no trace loss, half of it,
#
# more than an equal spectrum of full rank R, mostly n. All that losing rank can gain is alignment, from 2, of
# unrelated views, to 0. So where p(r) >= 2, no views of rank r have less loss than unrelated views of equal
# spectrum. [test_no_rank_is_worth_2] Published p(1): 4.4 for n = 256, T = 4; 0.9 for n = 32; 0.8 for T = 2.


def trace_loss(z_hat: Tensor, *, axis: str = "channel") -> Tensor:
    """sum_j (1 - var_j)^2 of samples ("channel") or channels ("batch"): (m, d) -> (), (V, m, d) -> (V,)."""
    _check_settings(axis)
    return (1 - _checked(z_hat).var(-1 if axis == "channel" else -2)).square().sum(-1)


def trace_floor(n: int, iterations: int, rank: float | None = None) -> float:
    """L_rank, the least trace loss that IterNorm reaches with n coordinates of at most `rank` (None: n)."""
    rank = n if rank is None else rank
    return n * (1 - rank / n * newton_map(1 / rank, iterations)) ** 2


def rank_price(
    rank: float, n: int, iterations: int, beta: float, *, full: int | None = None, teacher: bool = False
) -> float:
    """p(rank): what a rank of `rank` costs in the loss at least, beside the rank `full` (None: n)."""
    return (2 - teacher) * beta * (trace_floor(n, iterations, rank) - trace_floor(n, iterations, full))


def balanced_beta(n: int, iterations: int, *, full: int | None = None) -> float:
    """The least beta with p(1) >= 2 (without a teacher), so that a collapse onto one direction gains nothing,
    and p(r) >= 0.6 for r = R / 4, R = full being the full rank (None: n), at most 64: a convention, since n =
    256 and T = 4, as published, have 0.6 (evidence/README.md, "Small batches"). 0 if no rank can be lost."""
    R = n if full is None else full
    least = ((1, 2.0), (max(1, min(R / 4, 64)), 0.6)) if R > 1 else ()
    return max((p / rank_price(r, n, iterations, 1, full=R) for r, p in least), default=0.0)


# --- 5. Many processes: statistics of the global batch, and a backward pass without communication -----------
# Every rank gathers all rows and computes the full loss; so it holds the exact gradient of that loss with
# respect to its own rows. Only they keep their graph, the others arrive detached. DistributedDataParallel
# then AVERAGES over ranks what should be summed; so the losses multiply their gradient by the world size. (A
# forgotten factor shows in no loss curve.) [test_gradient_over_processes_equals_one_process]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(z: Tensor) -> Tensor:
    """The rows of all ranks in rank order, (m, d) -> (world * m, d) or (V, m, d) -> (V, world * m, d); every
    rank must hold as many. The gradient, not scaled, reaches the local rows. The identity for one process."""
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


def _all_views(views: Sequence[Tensor] | Tensor, teacher: Tensor | None, iterations: int = 1) -> list[Tensor]:
    """V >= 2 views of one shape (m, d), a teacher's first, checked and gathered: V times (world * m, d)."""
    views = list(views) if teacher is None else [teacher.detach(), *views]
    shapes = [tuple(v.shape) for v in views]
    if len(shapes) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"the loss needs a list of two or more views of one shape (m, d), got {shapes[:3]}")
    views = [_checked(v, iterations) for v in views]
    return views if _world_size() == 1 else list(gather(torch.stack(views)))


# --- 6. The INTL loss ---------------------------------------------------------------------------------------
# For V views against view 0; and, with a teacher, for its view 0 without gradient (sg):
#
#     L = mean_{i>0} [ 2 - 2 mean_rows cos(z_hat_i, z_hat_0) + beta (L_trace(z_hat_i) + L_trace(z_hat_0)) ]
#     L = mean_{i>0} [ 2 - 2 mean_rows cos(z_hat_i, sg z_hat_0) + beta L_trace(z_hat_i) ]
#
# Published, for n > 8: beta = 0.01 (log2 n - 3); n = m, the GLOBAL batch, or on the batch axis n = d.
#
# All that this asks of z_hat are variances, and cosines of rows. On the channel axis Gram matrices hold both,
# and no z_hat is formed: with G_v = zc_v zc_v^T / (d-1), C_v = zc_v zc_0^T / (d-1) and P_v from G_v, the
# diagonal of cov(z_hat_v) = P_v G_v P_v holds the variances of the rows, their squared norms / (d-1); their
# inner products / (d-1) are diag(P_v C_v P_0). For two views that is 7 products of 2 m m d operations, where
# autograd through z_hat takes 12. [test_loss_equals_its_definition]


def _statistics(z: Sequence[Tensor], iterations: int, axis: str) -> tuple[Tensor, Tensor]:
    """Of V views z (m, d): variances of the rows (axis "channel") or columns ("batch") of z_hat, (V, m) or
    (V, d), and cosines of its rows with those of view 0, (V-1, m)."""
    zc, (divisor, *_) = zip(*[_centre(v, axis) for v in z])  # V times (m, d)
    P, variance = _newton(torch.stack([_gram(v) for v in zc]) / divisor, iterations)  # (V, n, n), (V, n)

    if axis == "channel" and len(variance[0]) == len(z[0]):  # m <= d
        C = torch.stack([v @ zc[0].mT for v in zc[1:]]) / divisor  # (V-1, m, m)
        inner = ((P[1:] @ C) * P[0]).sum(-1)  # (V-1, m): diag(P_v C_v P_0)
        tiny = torch.finfo(inner.dtype).eps ** 2  # a row without variance has no direction: cosine 0
        return variance, inner * (variance[1:] * variance[0]).clamp_min(tiny).rsqrt()

    z_hat = torch.stack([_apply(p, v) for p, v in zip(P, zc)])  # (V, m, d)
    variance = z_hat.square().sum(-1 if axis == "channel" else -2) / divisor  # z_hat is centred as zc is
    return variance, F.cosine_similarity(z_hat[1:], z_hat[:1], dim=-1)


class INTLLoss(nn.Module):
    """IterNorm with trace loss. Call with views, V tensors (m, d) or one (V, m, d), m being this process's
    share of the batch, and optionally a teacher's view 0 (m, d), which gets no gradient; returns a scalar.

    iterations: Newton steps T. axis: section 1. beta: weight of the trace loss; None: as published above,
    "balanced": by balanced_beta, 0: IterNorm alone. ValueError: a wrong setting; in the call, wrong or
    different shapes of views. Call backward outside autocast, as torch advises. The scalar is float32, or
    float64 for views in float64 or more than 10 steps. [test_half_precision_and_autocast_change_nothing]

    After a call `parts` holds, detached and still on the device, `alignment` (mean 2 - 2 cos, in [0, 4]),
    `trace` (mean over the views that receive gradient) and `score` (their mean variance over its maximum: 1
    for an equal spectrum of full rank); as floats `floor`, the least trace loss, and `price` (`setting`)."""

    def __init__(self, *, iterations: int = 4, axis: str = "channel", beta: float | str | None = None):
        super().__init__()
        _check_settings(axis, iterations)
        if isinstance(beta, str) and beta != "balanced":
            raise ValueError(f'beta must be a number, None or "balanced", got {beta!r}')
        self.iterations, self.axis, self.beta = iterations, axis, beta

    def setting(self, m: int, d: int, teacher: bool = False) -> tuple[int, int, float, float]:
        """Of a global batch (m, d): n coordinates, full rank R, beta, and p(r), r = R / 4 but at most 64."""
        n, R = (m, min(m, d - 1)) if self.axis == "channel" else (d, min(m - 1, d))
        beta = 0.01 * (math.log2(n) - 3) if self.beta is None else self.beta
        beta = balanced_beta(n, self.iterations, full=R) if beta == "balanced" else beta
        r = max(1, min(R / 4, 64))
        return n, R, beta, rank_price(r, n, self.iterations, beta, full=R, teacher=teacher)

    def forward(self, views: Sequence[Tensor] | Tensor, teacher: Tensor | None = None) -> Tensor:
        z = _all_views(views, teacher, self.iterations)  # V times (m, d), global m
        n, R, beta, price = self.setting(*z[0].shape, teacher is not None)

        with torch.autocast(z[0].device.type, enabled=False):
            variance, cosine = _statistics(z, self.iterations, self.axis)  # (V, n), (V-1, m)
            alignment = 2 - 2 * cosine.mean()
            trace = (1 - variance).square().sum(-1)  # (V,)
            loss = alignment + beta * (trace[1:].mean() + (trace[0] if teacher is None else 0))

        trained = slice(0 if teacher is None else 1, None)
        most = R * newton_map(1 / R, self.iterations)  # sum of the variances at equal eigenvalues
        self.parts = {"alignment": alignment.detach(), "trace": trace[trained].detach().mean()}
        self.parts |= {"floor": trace_floor(n, self.iterations, R), "price": price}
        self.parts["score"] = variance[trained].detach().sum(-1).mean() / most
        return undo_ddp_average(loss)


# --- 7. Kin: exact transformations, channel whitening with random group partition, orthogonality ------------


class SpectralLoss(nn.Module):
    """Mean 2 - 2 cos between view 0 and the others after the exact transformation l^(-p), over the global
    batch; call as INTLLoss. p = 0.5: whitening, 0: no transformation. ValueError: wrong axis or shapes."""

    def __init__(self, p: float, *, axis: str = "channel"):
        super().__init__()
        _check_settings(axis)
        self.p, self.axis = p, axis

    def forward(self, views: Sequence[Tensor] | Tensor, teacher: Tensor | None = None) -> Tensor:
        z = torch.stack(_all_views(views, teacher))  # (V, m, d)
        z_hat = spectral_transform(z, power(self.p), axis=self.axis)  # (V, m, d)
        loss = 2 - 2 * F.cosine_similarity(z_hat[1:], z_hat[:1], dim=-1).mean()
        self.parts = {"alignment": loss.detach()}
        return undo_ddp_average(loss)


def group_whiten(z: Tensor, groups: int, permutation: Tensor | None = None) -> Tensor:
    """CW-RGP's transform of z, (m, d) or (V, m, d); same shape. Samples are centred over all their channels;
    the channels, permuted by (d,), or by (V, d) one for each view (None: in order), are split into groups;
    each is ZCA-whitened with its own m x m Gram matrix, divisor d / groups - 1; the permutation is undone.
    ValueError unless groups divides d and d / groups > m: else a group's Gram matrix is all but singular."""
    z = _checked(z)
    m, d = z.shape[-2:]
    order = torch.arange(d, device=z.device) if permutation is None else permutation.to(z.device)
    if groups < 1 or d % groups or d // groups <= m or order.shape not in ((d,), (*z.shape[:-2], d)):
        raise ValueError(f"no {groups} groups larger than m in {tuple(z.shape)}, order {tuple(order.shape)}")

    with torch.autocast(z.device.type, enabled=False):
        zc, _ = _centre(z.double(), "channel")  # (..., m, d)
        order = order.expand(*z.shape[:-2], d).unsqueeze(-2)  # (..., 1, d)
        zg = zc.take_along_dim(order, -1)  # (..., m, d)
        zg = zg.unflatten(-1, (groups, -1)).transpose(-3, -2)  # (..., groups, m, d / groups)
        zg = _MatrixFunction.apply(_gram(zg) / (d // groups - 1), power(0.5)) @ zg
        zg = zg.transpose(-3, -2).flatten(-2)  # (..., m, d)
        return zg.take_along_dim(order.argsort(-1), -1).to(z.dtype)


class CWRGPLoss(nn.Module):
    """CW-RGP: mean over all pairs of views of 2 - 2 cos between rows whitened by `group_whiten`. Call with
    views as for INTLLoss; returns a scalar.

    sub_batch: samples of the global batch, drawn at random, that are whitened together (None: all), in every
    view by a permutation of its own. repeats: how many such draws a step averages (the release's w_iter).
    Published: 64, 4 groups for d = 512. ValueError: sub_batch; and as group_whiten."""

    def __init__(self, *, groups: int = 4, sub_batch: int | None = None, repeats: int = 1):
        super().__init__()
        self.groups, self.sub_batch, self.repeats = groups, sub_batch, repeats

    def forward(self, views: Sequence[Tensor] | Tensor) -> Tensor:
        z = torch.stack(_all_views(views, None))  # (V, m, d), global m
        V, m, d = z.shape
        size = self.sub_batch or m
        if m % size:
            raise ValueError(f"sub_batch must divide the global batch of {m} rows, got {size}")

        losses = []
        for _ in range(self.repeats):
            rows = torch.rand(m, device=z.device).argsort()  # (m,): a random partition of the batch
            orders = torch.rand(V * m // size, d, device=z.device).argsort(-1)  # a permutation for each part
            for drawn in (rows, orders) if _world_size() > 1 else ():
                dist.broadcast(drawn, 0)
            parts = z[:, rows].reshape(-1, size, d)  # (V * m / size, size, d)
            z_hat = group_whiten(parts, self.groups, orders).reshape(V, m, d)
            losses += [2 - 2 * F.cosine_similarity(a, b).mean() for a, b in itertools.combinations(z_hat, 2)]
        loss = torch.stack(losses).mean()
        self.parts = {"alignment": loss.detach()}
        return undo_ddp_average(loss)


def orthogonality_penalty(module: nn.Module, kind: str = "so", power_iterations: int = 5) -> Tensor:
    """OR: sum over every Conv2d and Linear weight W of `module`, a convolution's as out x (in kh kw), of

        "so":   ||G||_F^2,  G = W W^T - I or W^T W - I, whichever is smaller;
        "srip": the spectral norm of G, by power iteration from its longest column: a lower bound.

    nn.MultiheadAttention's packed weight counts as three, q, k and v. Add it to the loss for the ENCODER
    alone: 1e-6 (so), 1e-3 (srip) for ResNets, 1e-5 (so) for small ViTs. ValueError: no weights, or kind."""
    if kind not in ("so", "srip"):
        raise ValueError(f'kind must be "so" or "srip", got {kind!r}')
    weights = []  # (out, in kh kw)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weights.append(layer.weight.flatten(1))
        elif isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            weights.extend(layer.in_proj_weight.chunk(3))
    if not weights:
        raise ValueError(f"{type(module).__name__} has no Conv2d or Linear weight to keep orthogonal")

    penalties = []
    for W in weights:
        with torch.autocast(W.device.type, enabled=False):
            G = _gram(W.to(torch.promote_types(W.dtype, torch.float32)))  # (n, n), n = min(out, in kh kw)
            G = G - torch.eye(len(G), dtype=G.dtype, device=G.device)
            if kind == "so":
                penalties.append(G.square().sum())
                continue
            v = G.index_select(1, G.norm(dim=0).argmax(keepdim=True))[:, 0]  # (n,); no wait for the device
            for _ in range(power_iterations):
                v = G @ F.normalize(v, dim=0)
            penalties.append((G @ F.normalize(v, dim=0)).norm())
    return torch.stack(penalties).sum()


# --- 8. Diagnostics: collapse shows in the spectrum before it shows in accuracy (not differentiable) --------


@torch.no_grad()
def spectrum(z: Tensor) -> Tensor:
    """Eigenvalues of cov(z) over the batch, descending: (m, d) -> (min(m, d),), and so for every view."""
    zc, divisor = _centre(_checked(z), "batch")  # (..., m, d)
    return torch.linalg.svdvals(zc).square() / divisor


def effective_rank(z: Tensor) -> Tensor:
    """exp(entropy of l / sum l), l = spectrum(z), in [1, min(m, d)]; RankMe takes z's singular values."""
    l = spectrum(z)  # (..., n)
    p = l / l.sum(-1, keepdim=True).clamp_min(torch.finfo(l.dtype).tiny)  # (..., n)
    return torch.special.entr(p).sum(-1).exp()


def condition_number(z: Tensor) -> Tensor:
    """Largest over smallest eigenvalue of cov(z) that is not zero up to rounding; 1 for a constant batch."""
    l = spectrum(z)  # (..., n)
    noise = (max(z.shape[-2:]) * torch.finfo(l.dtype).eps) ** 2 * l[..., :1]  # of singular values, squared
    return torch.where(l > noise, l[..., :1] / l, 1).amax(-1)


# --- 9. Demonstration ---------------------------------------------------------------------------------------


def demonstrate(steps: int = 400, plot: str | None = None):
    """Train an MLP on two noisy views of 16 latent factors by each loss; print, and plot, its spectra."""
    names = {0.0: "no transformation", 0.2: "power 0.2", 0.4: "power 0.4", 0.5: "whitening", 0.6: "power 0.6"}
    losses = {name: SpectralLoss(p, axis="batch") for p, name in names.items()}
    losses["IterNorm alone, T = 4"] = INTLLoss(axis="batch", beta=0.0)
    losses |= {f"INTL, T = {T}": INTLLoss(axis="batch", iterations=T) for T in (2, 4, 7)}
    spectra, mixing = {}, torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) / 4

    views = lambda samples: torch.randn(samples, 16) @ mixing + 0.3 * torch.randn(2, samples, 64)

    print(f"{'transformation':24}{'effective rank of 64':>22}{'condition number':>18}")
    for name, loss in losses.items():
        torch.manual_seed(0)
        hidden = [[nn.Linear(n, 128), nn.BatchNorm1d(128), nn.ReLU()] for n in (64, 128)]
        network = nn.Sequential(*hidden[0], *hidden[1], nn.Linear(128, 64))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            loss([network(x) for x in views(256)]).backward()
            optimizer.step()

        z = network.eval()(views(4096)[0]).detach()  # (4096, 64)
        print(f"{name:24}{effective_rank(z):22.1f}{condition_number(z):18.3g}", flush=True)
        spectra[name] = spectrum(z)  # (64,)

    if plot:
        import matplotlib.pyplot as plt

        plt.semilogy(torch.stack([l / l[0] for l in spectra.values()]).T, label=list(spectra))
        plt.legend(title="eigenvalues over the largest", fontsize="x-small", title_fontsize="x-small")
        plt.savefig(plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", help="draw the spectra, where matplotlib is installed")
    demonstrate(plot=parser.parse_args().plot)
