"""INTL (IterNorm with trace loss) and related self-supervised losses. Depends only on torch.

    loss = INTLLoss()([z1, z2])     # two views (m, d): m samples, d outputs of a projector
    python intl.py                  # which losses collapse and which do not

INTL: "Modulate Your Spectrum in Self-Supervised Learning", Weng et al., ICLR 2024,
arXiv 2305.16789. CW-RGP: Weng et al., NeurIPS 2022, arXiv 2210.03586. OR: He et al., NeurIPS 2024,
arXiv 2411.00392. SPDX-License-Identifier: MIT.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- 1. The method by its definition --------------------------------------------------------------
# All of INTL for two views in one process, for reading; for use, iter_norm and INTLLoss below have
# the same values. INTLLoss takes more views, a teacher and several processes, is finite on a
# constant batch and, where d is much larger than m, up to twice as fast (on a CPU).


def iter_norm_by_definition(z, iterations=4):  # z: (m, d), m samples with d channels
    z = z - z.mean(dim=1, keepdim=True)  # (m, d): each sample is centered over its channels
    S = z @ z.T / (z.shape[1] - 1)  # (m, m): the covariance of the samples
    N = S / S.trace()
    P = torch.eye(len(S)).to(S)
    for _ in range(iterations):  # Newton's iteration: P tends to N^(-1/2)
        P = (3 * P - P @ P @ P @ N) / 2
    return P @ z / S.trace().sqrt()  # (m, d): tends to S^(-1/2) z


def intl_loss_by_definition(z1, z2):
    z1_hat = iter_norm_by_definition(z1)
    z2_hat = iter_norm_by_definition(z2)
    alignment = 2 - 2 * F.cosine_similarity(z1_hat, z2_hat, dim=1).mean()
    trace_loss_1 = (1 - z1_hat.var(dim=1)).square().sum()  # draws variances to one
    trace_loss_2 = (1 - z2_hat.var(dim=1)).square().sum()
    beta = 0.01 * (math.log2(len(z1)) - 3)  # published; positive for m > 8
    return alignment + beta * (trace_loss_1 + trace_loss_2)


# --- 2. Notation: rows, and why one axis is enough ------------------------------------------------
# An embedding z is (m, d): m samples in rows, d channels in columns (the paper writes the
# transpose). Whitening decorrelates the rows of a matrix x (n, k). Each row is centered over its k
# entries, and S = x x^T / (k - 1), n x n, is the covariance of the rows. The axis is what means and
# variances are taken over:
#
#   axis "channel" (published):  x = z.    Rows are the n = m samples, S is m x m.
#   axis "batch":                x = z^T.  Rows are the n = d channels, S is d x d.
#
# Both can keep the embedding from collapsing, that is, from losing all but a few directions: but
# for the centering, the covariances of both axes have the same rank. Since the batch axis is the
# channel axis of the transpose, everything below is written once, for x; only its cost, n^3 + n^2
# k, differs. V views of a batch are (V, m, d).


def _check_settings(axis: str, iterations: int = 1):
    if axis not in ("channel", "batch"):
        raise ValueError(f'axis must be "channel" or "batch", got {axis!r}')
    if not 1 <= iterations <= 10:
        raise ValueError(f"iterations must be from 1 to 10, got {iterations}")


def _rows(z: Tensor, axis: str) -> Tensor:
    """x: (..., m, d) -> (..., n, k), centered, in float32 or float64. (bfloat16 would put an error
    of 0.2 % into the covariance.) Raises ValueError for a wrong shape or type."""
    if not z.is_floating_point() or z.dim() not in (2, 3) or min(z.shape[-2:]) < 2:
        raise ValueError(
            "embeddings are floating-point (m, d) or (V, m, d) with at least 2 samples and "
            f"2 channels, got {z.dtype} of shape {tuple(z.shape)}"
        )
    x = z if axis == "channel" else z.mT
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x - x.mean(dim=-1, keepdim=True)


class _Gram(torch.autograd.Function):
    """x x^T, (..., n, k) -> (..., n, n). Its backward pass is one product; autograd, which does not
    know that both factors are the same, would need two."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad + grad.mT) @ x


def _covariance(x: Tensor) -> Tensor:
    """S of centered rows: (..., n, k) -> (..., n, n)."""
    return _Gram.apply(x) / (x.shape[-1] - 1)


# --- 3. Spectral transformations ------------------------------------------------------------------
# With S = U diag(l) U^T, a function g of the eigenvalues gives
#
#     x_hat = U diag(g(l)) U^T x,        cov(x_hat) = U diag(l g(l)^2) U^T:
#
# it reshapes the spectrum and keeps the eigenvectors. Whitening is the case g(l) = l^(-1/2), which
# makes every eigenvalue one. The paper's first finding: under an alignment loss l^(-p) prevents
# collapse for p near 1/2 but not for small p, so whitening is one choice among many.


class _MatrixFunction(torch.autograd.Function):
    """U diag(g(l)) U^T of a symmetric S, (..., n, n) -> (..., n, n).

    Autograd through eigh would divide by l_i - l_j: NaN for equal eigenvalues, and a collapsed
    batch has many equal to zero. But the function itself is as smooth as g (Daleckii and Krein): if
    S changes by a symmetric dS, it changes by U (K * (U^T dS U)) U^T, * elementwise, where

        K_ij = (g(l_i) - g(l_j)) / (l_i - l_j),  or  g'(l_i)  where l_i = l_j.

    This linear map of dS is its own transpose, so the backward pass applies it to the gradient.
    Where g is infinite at 0, the derivative is that at a constant rank."""

    @staticmethod
    def forward(ctx, S: Tensor, g: Callable[[Tensor], Tensor]) -> Tensor:
        l, U = torch.linalg.eigh(S)  # (..., n) ascending, (..., n, n)
        eps = torch.finfo(l.dtype).eps
        noise = l.shape[-1] * eps * l[..., -1:]  # rounding error of an eigenvalue zero
        l = torch.where(l > noise, l, 0)
        scale = g(l)  # (..., n)
        if scale.shape != l.shape:
            raise ValueError(f"g must keep the shape {tuple(l.shape)}, got {tuple(scale.shape)}")
        slope = torch.func.grad(lambda l: g(l).sum())(l)  # g'(l), as g is elementwise
        # x has no component where l = 0, so an infinite scale there may as well be 0.
        scale = torch.where((l == 0) & ~scale.isfinite(), 0, scale)
        slope = torch.where((l == 0) & ~slope.isfinite(), 0, slope)

        l_i = l.unsqueeze(-1)  # (..., n, 1)
        l_j = l.unsqueeze(-2)  # (..., 1, n)
        gap = l_i - l_j  # (..., n, n)
        # Of nearly equal eigenvalues the quotient is less accurate than its limit.
        close = gap.abs() <= eps ** (1 / 3) * torch.maximum(l_i, l_j)
        limit = (slope.unsqueeze(-1) + slope.unsqueeze(-2)) / 2
        quotient = (scale.unsqueeze(-1) - scale.unsqueeze(-2)) / torch.where(close, 1, gap)
        ctx.save_for_backward(U, torch.where(close, limit, quotient))
        return (U * scale.unsqueeze(-2)) @ U.mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True, for which U and K would be constants
            raise RuntimeError("an exact spectral transformation can be differentiated only once")
        U, K = ctx.saved_tensors
        symmetric = (grad + grad.mT) / 2
        return U @ (K * (U.mT @ symmetric @ U)) @ U.mT, None


def spectral_transform(
    z: Tensor, g: Callable[[Tensor], Tensor], *, axis: str = "channel"
) -> Tensor:
    """The exact spectral transformation by g of z, (m, d) or (V, m, d); same shape.

    g maps a tensor of eigenvalues to one of scales, elementwise. It may be infinite at 0, as l^(-p)
    is. Computed in float64, since the condition number of S is the square of that of x; returned in
    float32, or in float64 for z in float64.

    Raises ValueError for a wrong shape or axis, RuntimeError for a second derivative."""
    _check_settings(axis)
    x = _rows(z, axis)  # (..., n, k)
    S = _covariance(x.double())  # (..., n, n); autocast leaves float64 alone
    x_hat = (_MatrixFunction.apply(S, g) @ x.double()).to(x.dtype)  # (..., n, k)
    return x_hat if axis == "channel" else x_hat.mT


def power(p: float) -> Callable[[Tensor], Tensor]:
    """g(l) = l^(-p): p = 0 only centers the rows, p = 0.5 whitens them."""
    return lambda l: l.pow(-p)


def whiten(z: Tensor, *, axis: str = "channel") -> Tensor:
    """ZCA whitening of z, (m, d) or (V, m, d); same shape: every nonzero eigenvalue of S becomes
    one. Raises as `spectral_transform`."""
    return spectral_transform(z, power(0.5), axis=axis)


# --- 4. IterNorm: a spectral transformation from a few matrix products ----------------------------
# Newton's iteration for N^(-1/2), where N = S / tr(S), so that the eigenvalues q = l / tr(S) of N,
# shares of the total variance, lie in [0, 1] and sum to one:
#
#     P_0 = I,   P_{t+1} = (3 P_t - P_t^3 N) / 2,   x_hat = P_T x / sqrt(tr S).
#
# Every P_t is a polynomial in N, so IterNorm IS a spectral transformation, and after t steps the
# covariance is A_t = P_t N P_t = P_t^2 N. Its eigenvalues h_t follow from those of N: the step,
# times N^(1/2), is y -> (3 y - y^3) / 2 for the eigenvalues y of P_t N^(1/2), and h = y^2, so
#
#     h_0 = q,   h_{t+1} = phi(h_t),   phi(h) = h (3 - h)^2 / 4.
#
# phi maps [0, 1] onto itself, increasing (phi' = 3 (1 - h)(3 - h) / 4 >= 0) and strictly concave
# (phi'' = (6 h - 12) / 4 < 0). h_T is phi applied T times, and so increasing and strictly concave,
# too. As T grows, it tends to 1 for every q > 0; for finite T it is below 1 for every q < 1.


def newton_map(q, iterations: int):
    """h_T(q), T = iterations, of a tensor or a float: the eigenvalue of cov(x_hat) that IterNorm
    makes of a share q of the total variance."""
    for _ in range(iterations):
        q = q * (3 - q) ** 2 / 4
    return q


def _newton(S: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """M = P_T / sqrt(tr S), for which x_hat = M x, and A_T = cov(x_hat), from S: all (..., n, n).

    With B_t = (3 I - A_t) / 2 a step is P_{t+1} = P_t B_t and A_{t+1} = A_t B_t^2. This coupled
    form also yields cov(x_hat), and is stable. In the definition's form P and N cease to commute,
    and for a nearly singular S rounding errors grow with every step."""
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]  # (..., 1, 1)
    trace = torch.where(trace == 0, 1, trace)  # of a constant batch; its x_hat is 0
    I = torch.eye(S.shape[-1]).to(S)  # (n, n)

    A = S / trace  # A_0 = N
    P = I  # P_0
    for _ in range(iterations):
        B = 1.5 * I - 0.5 * A
        P = P @ B
        A = A @ B @ B
    return P * trace.rsqrt(), A


def iter_norm(z: Tensor, *, iterations: int = 4, axis: str = "channel") -> Tensor:
    """IterNorm of z, (m, d) or (V, m, d); same shape, in float32 or float64.

    Raises ValueError for a wrong shape, axis or number of iterations."""
    _check_settings(axis, iterations)
    with torch.autocast(z.device.type, enabled=False):
        x = _rows(z, axis)  # (..., n, k)
        M, _ = _newton(_covariance(x), iterations)  # (..., n, n)
        x_hat = M @ x
    return x_hat if axis == "channel" else x_hat.mT


# --- 5. Trace loss: why IterNorm alone is not enough ----------------------------------------------
# For finite T the spectrum h_T(q) of x_hat still depends on that of x, and IterNorm alone does not
# prevent collapse (in section 11 rank 10 of 64 remains). The trace loss, with enough weight, does.
# It penalizes the variance of each row of x_hat for being below one (as no eigenvalue of cov(x_hat)
# is above one, no variance is):
#
#     L_trace(x_hat) = sum_i (1 - var_i)^2,   var_i = cov(x_hat)_ii,   i = 1, ..., n.
#
# Why this equalizes the spectrum: the sum of the variances is the trace of cov(x_hat),
# h_T(q_1) + ... + h_T(q_n). If r of the shares q are not zero, the sum is at most s = r h_T(1/r),
# with equality for r equal shares, as h_T is concave (Jensen's inequality). A sum of at most s
# costs at least n (1 - s/n)^2, with equality for n equal variances. So a spectrum of rank r has
#
#     L_trace >= L_r = n (1 - (r/n) h_T(1/r))^2,
#
# and L_r falls as r grows: an equal spectrum of full rank is cheapest. Even there the trace loss is
# far from 0: for T = 4 and n = r = 256 its floor is L_r = 209.6.


def trace_loss(z_hat: Tensor, *, axis: str = "channel") -> Tensor:
    """sum_i (1 - var_i)^2 over samples ("channel") or channels ("batch"): (m, d) -> (),
    (V, m, d) -> (V,). Raises ValueError for a wrong shape or axis."""
    _check_settings(axis)
    return (1 - _rows(z_hat, axis).var(dim=-1)).square().sum(-1)


def trace_floor(n: int, iterations: int, rank: float | None = None) -> float:
    """L_rank: the least trace loss after IterNorm of n rows and this rank (None: n)."""
    r = n if rank is None else rank
    return n * (1 - r / n * newton_map(1 / r, iterations)) ** 2


# --- 6. Several processes: the global batch, without communication in the backward pass -----------
# Every process gathers all rows and computes the loss of the global batch, so it holds the exact
# gradient with respect to its own rows. Only these keep their graph; the others arrive detached.
# The gradient of a weight is then the SUM over processes, but DistributedDataParallel and its
# relatives AVERAGE. So the losses multiply their gradient, not their value, by the number of
# processes. (Without that, training would look normal with a gradient that is too small.)


def _world_size(group: dist.ProcessGroup | None) -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group)
    return 1


def gather(z: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all processes of the group in rank order: (m, d) -> (world * m, d) or
    (V, m, d) -> (V, world * m, d); z itself in one process. Every process must hold equally many
    rows. The gradient of the result reaches this process's rows, exactly and unscaled."""
    if _world_size(group) == 1:
        return z
    local = z.detach().contiguous()
    rows = [torch.empty_like(local) for _ in range(_world_size(group))]
    dist.all_gather(rows, local, group=group)
    rows[dist.get_rank(group)] = z
    return torch.cat(rows, dim=-2)


def _scale_grad(loss: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The same value; its gradient times the number of processes."""
    if _world_size(group) == 1:
        return loss
    return loss.detach() + _world_size(group) * (loss - loss.detach())


def _gather_views(
    views: Sequence[Tensor], teacher: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Views of the global batch, (V, world * m, d); a teacher's comes first, without gradient."""
    if isinstance(views, Tensor):
        raise TypeError(
            "views must be a list of tensors (m, d), as in loss([z1, z2]), "
            f"got one tensor of shape {tuple(views.shape)}"
        )
    views = list(views)
    if teacher is not None:
        views = [teacher.detach(), *views]
    shapes = [tuple(view.shape) for view in views]
    if len(shapes) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(
            "the loss needs two or more views of one shape (m, d), the teacher's included, "
            f"got {shapes}"
        )
    return gather(torch.stack(views), group)


# --- 7. The INTL loss -----------------------------------------------------------------------------
# View 0 is compared with every other view v. With an EMA teacher, view 0 is the teacher's output
# and receives no gradient (sg: stop-gradient):
#
#     L = mean_{v>0} [ alignment(z_hat_v, z_hat_0) + beta (L_trace(z_hat_v) + L_trace(z_hat_0)) ]
#     L = mean_{v>0} [ alignment(z_hat_v, sg z_hat_0) + beta L_trace(z_hat_v) ]
#
# where the alignment is 2 - 2 cos of a sample's two embeddings, averaged over the samples on either
# axis, and the published beta depends on n: the GLOBAL batch size, or d on the batch axis.
#
# Most of the value is the floor of the trace loss: with T = 4 and the published beta L is at least
# 20.96 for n = 256 and 6.87 for n = 128, or half of that with a teacher. So a loss that stays
# slightly above is normal.
#
# On the channel axis, where the rows are the samples, the cosines need no x_hat. Write _newton's
# x_hat_v = M_v x_v for view v, and C_v = x_v x_0^T / (k - 1). The inner products of the rows of
# x_hat_v with those of x_hat_0, over k - 1, are the diagonal of M_v C_v M_0, and the squared norms
# of the rows, over k - 1, are their variances, the diagonal of cov(x_hat_v).


def published_beta(n: int) -> float:
    """0.01 (log2 n - 3), the official weight of the trace loss; positive for n > 8."""
    return 0.01 * (math.log2(n) - 3)


class INTLLoss(nn.Module):
    """IterNorm with trace loss: loss(views, teacher=None, group=None) -> scalar in float32, or in
    float64 for views in float64, also under autocast.

    iterations: Newton steps T, 1 to 10; the papers use up to 9.
    axis: "channel" (published) or "batch", see section 2.
    beta: weight of the trace loss; None: `published_beta`, too small for small n (section 9); 0:
        IterNorm alone.

    views: a list of V >= 2 tensors (m, d), the views of this process's m samples. The batch is that
        of one call; accumulating gradients does not enlarge it.
    teacher: (m, d), an EMA teacher's output for view 0; `views` then holds views 1 to V-1.
    group: the processes that share a batch, as in torch.distributed; None: all processes.

    After a call `parts` holds detached scalars: `alignment`, 0 for identical and 2 for unrelated
    views, and `trace`, the mean trace loss of the views that receive a gradient. (For two views the
    loss is alignment + 2 beta trace.)

    Several processes. Once a process group is initialized, every call is a collective, in
    validation, too: all processes of the group make it, each with its own samples, equally many. Do
    not gather them yourself, nor give the same samples to two processes. Pass `group` where not all
    processes are data-parallel (tensor parallelism, several trainings in one job). The gradient is
    scaled for training that averages gradients over the group, as DDP and FSDP do: where they are
    summed, or a z.grad is read by hand, it is too large by the number of processes. Compile the
    loss after the process group is initialized.

    Precision. TF32 matrix products, which torch allows on request, put an error of 0.1 to 0.9 %
    into the gradient; torch has no switch for the loss alone. Call backward() outside autocast.

    Raises ValueError for an invalid axis or number of iterations, for views of wrong or different
    shapes, for fewer than 2 samples or channels in the global batch, and for n <= 8 without beta;
    TypeError for one tensor in place of a list."""

    def __init__(self, *, iterations: int = 4, axis: str = "channel", beta: float | None = None):
        super().__init__()
        _check_settings(axis, iterations)
        self.iterations = iterations
        self.axis = axis
        self.beta = beta

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}, axis={self.axis!r}, beta={self.beta}"

    def forward(
        self,
        views: Sequence[Tensor],
        teacher: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        z = _gather_views(views, teacher, group)  # (V, m, d), m of the global batch
        with torch.autocast(z.device.type, enabled=False):
            x = _rows(z, self.axis)  # (V, n, k)
            n, k = x.shape[1:]
            if self.beta is not None:
                beta = self.beta
            elif n > 8:
                beta = published_beta(n)
            else:
                raise ValueError(
                    f"the published beta is positive for n > 8, but n is {n} for a global batch of "
                    f"shape {tuple(z.shape[1:])}: give beta, or, if it is a small last batch, use "
                    "drop_last=True"
                )

            M, cov = _newton(_covariance(x), self.iterations)  # (V, n, n) each
            variance = cov.diagonal(dim1=-2, dim2=-1)  # (V, n)
            if self.axis == "channel":
                C = x[1:] @ x[0].mT / (k - 1)  # (V-1, m, m)
                inner = ((M[1:] @ C) * M[0]).sum(-1)  # (V-1, m): diag(M_v C_v M_0)
                squared_norms = variance[1:] * variance[0]  # (V-1, m)
                tiny = torch.finfo(inner.dtype).eps ** 2  # cos = 0 for a sample without variance
                cosine = inner * squared_norms.clamp_min(tiny).rsqrt()
            else:
                z_hat = (M @ x).mT  # (V, m, d)
                cosine = F.cosine_similarity(z_hat[1:], z_hat[:1], dim=-1)  # (V-1, m)

            alignment = 2 - 2 * cosine.mean()
            trace = (1 - variance).square().sum(-1)  # (V,)
            loss = alignment + beta * trace[1:].mean()
            if teacher is None:
                loss = loss + beta * trace[0]

        trained = trace if teacher is None else trace[1:]  # the views that receive a gradient
        self.parts = {"alignment": alignment.detach(), "trace": trained.detach().mean()}
        return _scale_grad(loss, group)


# --- 8. Related losses: exact transformations, CW-RGP, orthogonality ------------------------------


class SpectralLoss(nn.Module):
    """Mean 2 - 2 cos between view 0 and the others after the exact transformation l^(-p) of the
    global batch; called like INTLLoss. p = 0.5 is whitening, p = 0 is plain cosine alignment.
    `parts` holds `alignment`, the loss itself. Raises as INTLLoss does."""

    def __init__(self, p: float, *, axis: str = "channel"):
        super().__init__()
        _check_settings(axis)
        self.p = p
        self.axis = axis

    def extra_repr(self) -> str:
        return f"p={self.p}, axis={self.axis!r}"

    def forward(
        self,
        views: Sequence[Tensor],
        teacher: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        z = _gather_views(views, teacher, group)  # (V, m, d)
        z_hat = spectral_transform(z, power(self.p), axis=self.axis)  # (V, m, d)
        loss = 2 - 2 * F.cosine_similarity(z_hat[1:], z_hat[:1], dim=-1).mean()
        self.parts = {"alignment": loss.detach()}
        return _scale_grad(loss, group)


def group_whiten(z: Tensor, groups: int, permutation: Tensor | None = None) -> Tensor:
    """The transform of CW-RGP for z, (m, d) or (V, m, d); same shape.

    Samples are centered over all their channels. The channels are permuted and split into groups;
    each group is ZCA-whitened with its own m x m Gram matrix, divisor d / groups - 1; the
    permutation is undone. permutation: (d,) for all views, or (V, d), or None to keep the order.

    Raises ValueError if groups does not divide d, or if d / groups <= m: the Gram matrix of a group
    would be singular, or nearly so."""
    m, d = z.shape[-2:]
    if d % groups or d // groups <= m:
        raise ValueError(
            f"each group needs more channels than the {m} samples, and equally many, "
            f"got {d} channels / {groups} groups"
        )
    if permutation is None:
        permutation = torch.arange(d, device=z.device)
    order = permutation.to(z.device).expand(*z.shape[:-2], d).unsqueeze(-2)  # (..., 1, d)

    x = _rows(z, "channel")  # (..., m, d)
    xg = x.double().take_along_dim(order, -1)  # (..., m, d)
    xg = xg.unflatten(-1, (groups, -1)).transpose(-3, -2)  # (..., groups, m, d / groups)
    xg_hat = _MatrixFunction.apply(_covariance(xg), power(0.5)) @ xg
    x_hat = xg_hat.transpose(-3, -2).flatten(-2)  # (..., m, d)
    return x_hat.take_along_dim(order.argsort(-1), -1).to(x.dtype)


class CWRGPLoss(nn.Module):
    """CW-RGP (channel whitening with random group partition): the mean over all pairs of views of
    2 - 2 cos between rows whitened by `group_whiten`. Called like INTLLoss, without a teacher.

    groups: number of groups of channels; published for CIFAR: 4 for d = 512.
    sub_batch: the global batch is split at random into sub-batches of so many samples, each of
        which is whitened separately, with its own permutation in every view (None: not split);
        published for CIFAR: 64.
    repeats: random splits averaged in a step (w_iter in the official release).

    Raises ValueError if sub_batch does not divide the batch, and as group_whiten does."""

    def __init__(self, *, groups: int = 4, sub_batch: int | None = None, repeats: int = 1):
        super().__init__()
        self.groups = groups
        self.sub_batch = sub_batch
        self.repeats = repeats

    def extra_repr(self) -> str:
        return f"groups={self.groups}, sub_batch={self.sub_batch}, repeats={self.repeats}"

    def forward(self, views: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
        z = _gather_views(views, None, group)  # (V, m, d), global m
        V, m, d = z.shape
        size = self.sub_batch or m
        if m % size:
            raise ValueError(f"sub_batch must divide the global batch of {m} rows, got {size}")
        count = V * m // size  # sub-batches of all views

        losses = []
        for _ in range(self.repeats):
            # All processes use the random numbers of rank 0.
            rows = gather(torch.rand(1, m, device=z.device), group)[0].argsort()  # (m,)
            orders = gather(torch.rand(1, count * d, device=z.device), group)[0]
            orders = orders.view(count, d).argsort(-1)  # a permutation for each sub-batch
            sub_batches = z[:, rows].reshape(count, size, d)
            z_hat = group_whiten(sub_batches, self.groups, orders).reshape(V, m, d)
            for a, b in itertools.combinations(z_hat, 2):  # (m, d) each
                losses.append(2 - 2 * F.cosine_similarity(a, b).mean())
        loss = torch.stack(losses).mean()
        self.parts = {"alignment": loss.detach()}
        return _scale_grad(loss, group)


def orthogonality_penalty(module: nn.Module, kind: str = "so", power_iterations: int = 5) -> Tensor:
    """Orthogonality regularization (OR): the sum over every Conv2d and Linear weight W of `module`,
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
        raise ValueError(f"{type(module).__name__} has no Conv2d or Linear weight to regularize")

    penalties = []
    for W in weights:
        with torch.autocast(W.device.type, enabled=False):
            W = W.to(torch.promote_types(W.dtype, torch.float32))
            W = W if W.shape[0] <= W.shape[1] else W.mT
            G = _Gram.apply(W) - torch.eye(len(W), dtype=W.dtype, device=W.device)  # (n, n)
            if kind == "so":
                penalties.append(G.square().sum())
            else:
                longest = G.norm(dim=0).argmax(keepdim=True)  # stays on the device
                vector = G.index_select(1, longest)[:, 0]  # (n,)
                for _ in range(power_iterations):
                    vector = G @ F.normalize(vector, dim=0)
                penalties.append((G @ F.normalize(vector, dim=0)).norm())
    return torch.stack(penalties).sum()


# --- 9. Not in the papers: when the published beta is too small -----------------------------------
# A spectrum of rank r has L_trace >= L_r, and an equal one of full rank R has L_R (section 5). With
# c trace losses in a loss (2, or 1 with a teacher) rank r therefore costs at least c beta
# (L_r - L_R). All that it can gain is alignment: at most 2, from unrelated to identical views. So
#
#     c beta (L_1 - L_R) >= 2
#
# makes a collapse onto one direction cost at least what it can gain. With the published beta the
# left side is 4.4 for n = 256 and T = 4, but 0.9 for n = 32, and 0.8 for T = 2: there networks do
# collapse. A guard against partial collapse is a mere convention, from runs with c = 2:
#
#     beta (L_r - L_R) >= 0.3,   r = min(R / 4, 64),
#
# which the published beta just meets for n = 256 and T = 4. Those in which the left side was below
# 0.25 lost most of their rank, with one exception. r is at most 64, because R / 4 would ask at n =
# 512 for more than the published beta, which was worse (evidence/README.md, "Small batches").


def balanced_beta(
    n: int, iterations: int, *, trace_views: int = 2, rank: int | None = None
) -> float:
    """The least beta that meets both conditions above; 0 if there is no rank to lose.

    n: samples of the global batch, or channels on the batch axis.
    trace_views: the number c of trace losses: 2, or 1 with a teacher.
    rank: the full rank R: min(m, d - 1), or min(m - 1, d) on the batch axis (None: n)."""
    R = n if rank is None else rank
    if R <= 1:
        return 0.0
    floor = trace_floor(n, iterations, R)
    collapse = trace_floor(n, iterations, 1) - floor
    partial_collapse = trace_floor(n, iterations, max(1, min(R / 4, 64))) - floor
    return max(2 / (trace_views * collapse), 0.3 / partial_collapse)


# --- 10. Diagnostics ------------------------------------------------------------------------------


@torch.no_grad()
def spectrum(z: Tensor) -> Tensor:
    """Eigenvalues of the covariance of the channels over the batch, descending, those that are zero
    up to rounding exactly 0: (m, d) -> (min(m, d),) or (V, m, d) -> (V, min(m, d)).
    Raises ValueError for a wrong shape."""
    x = _rows(z, "batch")  # (..., d, m)
    singular = torch.linalg.svdvals(x)  # (..., min(m, d)), descending
    noise = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * singular[..., :1]
    singular = torch.where(singular > noise, singular, 0)
    return singular.square() / (x.shape[-1] - 1)


def rank_of_spectrum(l: Tensor) -> Tensor:
    """Effective rank, exp(entropy of q) with the shares q = l / sum l, of eigenvalues (..., n) ->
    (...): between 1 and n."""
    q = l / l.sum(-1, keepdim=True).clamp_min(torch.finfo(l.dtype).tiny)  # (..., n)
    return torch.special.entr(q).sum(-1).exp()


def condition_of_spectrum(l: Tensor) -> Tensor:
    """The largest over the smallest nonzero eigenvalue, (..., n) -> (...); 1 if all are zero."""
    return torch.where(l > 0, l.amax(-1, keepdim=True) / l, 1).amax(-1)


def effective_rank(z: Tensor) -> Tensor:
    """`rank_of_spectrum` of z: (m, d) -> () or (V, m, d) -> (V,). (RankMe, Garrido et al., 2023,
    takes the singular values of z instead of the eigenvalues of its covariance.)"""
    return rank_of_spectrum(spectrum(z))


def condition_number(z: Tensor) -> Tensor:
    """`condition_of_spectrum` of z: (m, d) -> () or (V, m, d) -> (V,)."""
    return condition_of_spectrum(spectrum(z))


# --- 11. Demonstration ----------------------------------------------------------------------------


def demonstrate(steps: int = 250):
    """Trains an MLP with each loss on two noisy views of 16 latent factors, and prints effective
    rank and condition number of the embedding z (not of z_hat): a rank far below 16 has lost
    factors. It uses the batch axis, since the embedding has only 64 channels."""
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

    print(f"{'transformation':24}{'effective rank of 64':>22}{'condition number':>18}")
    for name, loss in losses.items():
        torch.manual_seed(0)
        layers = [nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64)]
        network = nn.Sequential(*layers)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            loss([network(x) for x in draw_views(256)]).backward()
            optimizer.step()

        z = network.eval()(draw_views(4096)[0]).detach()  # (4096, 64)
        print(f"{name:24}{effective_rank(z):22.1f}{condition_number(z):18.3g}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads only wait for each other at these sizes
    demonstrate()
