"""Every test. `pytest test_intl.py` needs no data, no GPU and no network; 5 minutes on a 2-core CPU.

Numbers are compared with independent sources: eigendecompositions in float64, the scalar Newton map, values computed once with
the official releases, torchvision's per-image functions, one process instead of several.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd import gradcheck
from torchvision.transforms.v2 import functional as TF

import intl
import linear_eval
import train
from intl import INTLLoss, condition_number, effective_rank, iter_norm, newton_map, spectral_transform, spectrum, trace_loss, whiten

HERE = Path(__file__).parent
AXES = ("channel", "batch")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def covariance(z, axis):
    """By torch.cov: rows are variables. Channels for the batch axis, samples for the channel axis."""
    return torch.cov(z if axis == "channel" else z.mT)


def scalar_iter_norm(l, iterations=4):
    """IterNorm as a function of the eigenvalues, from its definition: P_T on the eigenvalues of S / tr S, over sqrt(tr S)."""
    trace = l.sum(-1, keepdim=True)
    p = torch.ones_like(l)
    for _ in range(iterations):
        p = (3 * p - p**3 * l / trace) / 2
    return p / trace.sqrt()


# ------------------------------------------------------------------------------------------------------------------
# Spectral transformations


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("m, d", [(6, 9), (7, 7), (9, 6)])
def test_iter_norm_maps_every_eigenvalue_by_newton_map(m, d, axis):
    z = randn(m, d)
    l, U = torch.linalg.eigh(covariance(z, axis))
    l_hat = newton_map((l / l.sum()).clamp_min(0), 4)
    expected = U @ l_hat.diag() @ U.T  # the same eigenvectors
    torch.testing.assert_close(covariance(iter_norm(z, axis=axis), axis), expected, rtol=0, atol=1e-12)


def test_newton_map_is_increasing_and_concave():
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for iterations in range(1, 9):
        h = newton_map(x, iterations)
        assert h[0] == 0 and h[-1] == 1
        assert (h.diff() >= 0).all() and (h[1:-1] < 1).all()
        assert (h.diff().diff() < 1e-15).all()
    assert newton_map(1e-3, 40) == pytest.approx(1)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("m, d", [(5, 12), (12, 5)])
def test_both_gram_matrices_give_the_same_transform(m, d, axis):
    z = randn(m, d)
    dim = -1 if axis == "channel" else -2
    zc = z - z.mean(dim, keepdim=True)
    scale = (z.shape[dim] - 1) ** -0.5
    for g in (scalar_iter_norm, lambda l: l.exp()):
        left = zc @ zc.T * scale**2, lambda f: f @ zc
        right = zc.T @ zc * scale**2, lambda f: zc @ f
        for gram, apply in (left, right):
            l, U = torch.linalg.eigh(gram)
            expected = apply(U @ g(l.clamp_min(0)).diag() @ U.T)
            torch.testing.assert_close(spectral_transform(z, g, axis=axis), expected)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("m, d", [(4, 7), (5, 5), (7, 4)])
def test_spectral_transform_with_the_scalar_map_equals_iter_norm(m, d, axis):
    z = randn(2, m, d).requires_grad_()
    weight = randn(2, m, d, seed=1)
    results = [spectral_transform(z, scalar_iter_norm, axis=axis), iter_norm(z, axis=axis)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*[torch.autograd.grad((r * weight).sum(), z)[0] for r in results])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("m, d", [(4, 7), (5, 5), (7, 4)])
def test_whitening_makes_every_eigenvalue_one(m, d, axis):
    l = torch.linalg.eigvalsh(covariance(whiten(randn(m, d), axis=axis), axis))
    rank = min(m, d - 1) if axis == "channel" else min(m - 1, d)
    torch.testing.assert_close(l[-rank:], torch.ones(rank, dtype=l.dtype))
    assert l[:-rank].abs().max(initial=0) < 1e-12 if False else (l[:-rank].abs() < 1e-12).all()


def degenerate(kind, m, d):
    """Embeddings whose Gram matrix has repeated or zero eigenvalues, as a smooth function of free parameters."""
    if kind == "full rank":
        return lambda z: z, randn(m, d)
    if kind == "rank 2":  # moves within the matrices of rank 2
        b = randn(2, d, seed=1)
        return lambda a: a @ b, randn(m, 2)
    q = torch.linalg.qr(randn(max(m, d), max(m, d)) - randn(max(m, d), max(m, d)).mean(0))[0][:m, :d]
    return lambda z: z, q  # equal eigenvalues


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("m, d", [(4, 7), (5, 5), (7, 4)])
@pytest.mark.parametrize("kind", ["full rank", "rank 2", "repeated"])
def test_gradcheck(kind, m, d, axis):
    embed, x = degenerate(kind, m, d)
    functions = [
        lambda z: iter_norm(z, axis=axis),
        lambda z: iter_norm(z, axis=axis, iterations=12),
        lambda z: spectral_transform(z, scalar_iter_norm, axis=axis),
        lambda z: spectral_transform(z, lambda l: 1 / (1 + l), axis=axis),
        lambda z: trace_loss(iter_norm(z, axis=axis), axis=axis),
        lambda z: INTLLoss(axis=axis)([z, z.flip(1) + 1]),
        lambda z: INTLLoss(axis=axis)([z], teacher=z.detach().flip(1)),
    ]
    if kind != "repeated":  # whitening is not differentiable where an eigenvalue may leave zero
        functions += [lambda z: whiten(z, axis=axis), lambda z: spectral_transform(z, intl.power(0.3), axis=axis)]
    for f in functions:
        assert gradcheck(lambda x, f=f: f(embed(x)), x.clone().requires_grad_())


@pytest.mark.parametrize("m, d", [(6, 6), (4, 9)])
def test_gradient_at_exactly_equal_eigenvalues(m, d):
    """All m eigenvalues are equal on the channel axis, where autograd through eigh gives NaN."""
    q = torch.linalg.qr(torch.cat([torch.ones(d, 1, dtype=torch.float64), randn(d, m)], 1))[0][:, 1:].T[: min(m, d - 1)]
    for f in (whiten, lambda z: spectral_transform(z, intl.power(0.3)), lambda z: spectral_transform(z, scalar_iter_norm)):
        assert gradcheck(f, q.clone().requires_grad_())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("m, d", [(128, 128), (64, 128), (256, 64)])
def test_whitening_gradient_in_float32_is_that_of_float64(m, d, axis):
    z, weight = randn(m, d, dtype=torch.float32), randn(m, d, seed=1, dtype=torch.float32)

    def gradient(z, weight):
        z = z.clone().requires_grad_()
        return torch.autograd.grad((whiten(z, axis=axis) * weight).sum(), z)[0]

    exact = gradient(z.double(), weight.double())
    assert (gradient(z, weight) - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("iterations", [4, 10, 20, 40])
@pytest.mark.parametrize("m, d, kind", [(64, 128, "random"), (256, 64, "random"), (128, 128, "decaying"), (96, 256, "low rank")])
def test_iter_norm_is_stable(m, d, kind, iterations):
    z = randn(m, d)
    if kind == "decaying":
        u, s, v = torch.linalg.svd(z, full_matrices=False)
        z = u * torch.logspace(0, -3, len(s), dtype=z.dtype) @ v
    if kind == "low rank":
        z = z[:, :8] @ randn(8, d, seed=1)
    z = z.float()
    for axis in AXES:
        l = torch.linalg.eigvalsh(covariance(z.double(), axis)).clamp_min(0)
        expected = newton_map(l / l.sum(), iterations).sort().values
        got = torch.linalg.eigvalsh(covariance(iter_norm(z, iterations=iterations, axis=axis).double(), axis))
        assert (got - expected).abs().max() < 1e-3


# ------------------------------------------------------------------------------------------------------------------
# Trace loss and the INTL loss


def test_trace_loss_is_least_at_equal_eigenvalues():
    n, iterations = 16, 4
    floor = intl.trace_floor(n, iterations)
    rotations = [torch.linalg.qr(randn(n, n, seed=s))[0] for s in range(20)]
    for i, U in enumerate(rotations):
        x = torch.rand(n, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        covariance = U @ newton_map(x / x.sum(), iterations).diag() @ U.T
        assert (1 - covariance.diagonal()).square().sum() > floor + 1e-6
    equal = n * (1 - newton_map(1 / n, iterations)) ** 2
    assert floor == pytest.approx(equal, rel=1e-12)
    assert intl.trace_floor(256, 4) == pytest.approx(209.6, abs=0.05)
    assert intl.trace_floor(8, 4, rank=2) == pytest.approx(8 * (1 - 2 * newton_map(0.5, 4) / 8) ** 2)


def definition(z, axis, iterations, beta, teacher=False):
    """METHOD: the loss from iter_norm's output, in a few lines."""
    z_hat = [iter_norm(v, axis=axis, iterations=iterations) for v in z]
    total = 0
    for v in z_hat[1:]:
        cosine = (F.normalize(v, dim=1) * F.normalize(z_hat[0], dim=1)).sum(1)
        total = total + (2 - 2 * cosine).mean() + beta * trace_loss(v, axis=axis)
        total = total + (0 if teacher else beta * trace_loss(z_hat[0], axis=axis))
    return total / (len(z_hat) - 1)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("views, m, d", [(2, 12, 20), (2, 12, 12), (2, 20, 12), (4, 10, 30)])
def test_gram_form(views, m, d, axis):
    """INTLLoss, which forms no z_hat for the channel axis, equals the definition, value and gradient."""
    z = randn(views, m, d).requires_grad_()
    n = m if axis == "channel" else d
    beta = 0.01 * (math.log2(n) - 3)
    for iterations in (1, 2, 4, 11):
        losses = [INTLLoss(axis=axis, iterations=iterations)(z), definition(z, axis, iterations, beta)]
        torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
        torch.testing.assert_close(*[torch.autograd.grad(loss, z)[0] for loss in losses], rtol=1e-9, atol=1e-12)
        students = INTLLoss(axis=axis, iterations=iterations)(z[1:], teacher=z[0])
        expected = definition([z[0].detach(), *z[1:]], axis, iterations, beta, teacher=True)
        torch.testing.assert_close(students, expected, rtol=1e-10, atol=0)
        gradients = [torch.autograd.grad(loss, z)[0] for loss in (students, expected)]
        assert gradients[0][0].abs().max() == 0  # the teacher's view
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


# Computed once in float64 with the official release (winci-ai/INTL, commit 0aa69af), run in one process on `official_views`:
# loss, its momentum form, norm of the gradient, one entry of it, trace loss of every view.
OFFICIAL = [  # axis, views, m, d, iterations, values
    ("channel", 2, 8, 5, 4, [2.089111207159423, 2.089111207159423, 0.685797221896301, -0.03031701953065581, 2.341619928879392, 2.7860090033599656]),
    ("batch", 2, 8, 5, 4, [2.005871792282227, 2.0062706621879896, 0.8918259988170488, -0.06378662004124508, 0.058824131003669386, 0.32264142920848166]),
    ("channel", 2, 6, 16, 4, [2.2470518258330734, 2.2471713514484755, 0.3858647459630053, -0.002890241786796948, 0.02879875086228748, 0.1215160913919584]),
    ("batch", 2, 6, 16, 4, [2.0109425113810007, 1.9301884322600364, 0.43681376935015387, 0.0011223117282641946, 8.075407912096429, 8.007177498311913]),
    ("channel", 2, 7, 7, 1, [2.0779861830249997, 2.0852564054428755, 0.7450726573376574, -0.029193422079902547, 3.7738947164015775, 3.9465418979197007]),
    ("batch", 2, 16, 4, 7, [1.8768154965317667, 1.8768154965317667, 0.5615442368460691, -0.05064526559534356, 0.0, 0.0]),
    ("channel", 4, 9, 12, 4, [2.159325566685036, 2.1576662310962926, 0.29089840094631825, 0.013173071556401803, 0.9765105632831865, 1.1173281923947391, 2.502115239204826, 0.7758496671305604]),
]


def official_views(views, m, d):
    v, i, j = torch.meshgrid(*[torch.arange(1, n + 1, dtype=torch.float64) for n in (views, m, d)], indexing="ij")
    return (1.3 * i**2 + 0.7 * j + v * i * j).sin()


def intl_values(z, axis, iterations):
    z = z.clone().requires_grad_()
    options = {"axis": axis, "iterations": iterations}
    loss, momentum = INTLLoss(**options)(z), INTLLoss(**options)(z[1:], teacher=z[0])
    return loss, momentum, torch.autograd.grad(loss, z)[0], trace_loss(iter_norm(z, **options), axis=axis)


@pytest.mark.parametrize("axis, views, m, d, iterations, values", OFFICIAL)
def test_loss_equals_the_official_release(axis, views, m, d, iterations, values):
    loss, momentum, gradient, trace = intl_values(official_views(views, m, d), axis, iterations)
    got = [loss.item(), momentum.item(), gradient.norm().item(), gradient[0, 1, 2].item(), *trace.tolist()]
    assert got == pytest.approx(values, rel=1e-9, abs=1e-15)


REFERENCE = HERE.parent / "shared" / "golden" / "reference_values.json"


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference file is no part of the project")
def test_reference_values():
    reference = json.loads(REFERENCE.read_text())
    tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    close = lambda got, values, atol=0: torch.testing.assert_close(got, tensor(values), rtol=1e-9, atol=atol)  # noqa: E731
    for case in reference["intl"]:
        z = tensor(case["views"])
        loss, momentum, gradient, trace = intl_values(z, case["axis"], case["iterations"])
        scale = tensor(case["grad"]).abs().max().item()
        close(iter_norm(z, axis=case["axis"], iterations=case["iterations"]), case["iternorm"], 1e-12)
        close(trace, case["trace_loss"], 1e-12)
        close(loss, case["loss"])
        close(momentum, case["loss_momentum"])
        close(gradient, case["grad"], 1e-10 * scale)
    for case in reference["cw_rgp"]:
        got = intl.group_whiten(tensor(case["z"]), case["groups"], torch.tensor(case["perm"]))
        close(got, case["whitened"], 1e-11)
    for case in reference["orthogonality"]:
        out, channels, *kernel = case["shape"]
        conv = nn.Conv2d(channels, out, kernel).double()
        conv.weight.data = tensor(case["weight"]).reshape(case["shape"])
        close(intl.orthogonality_penalty(conv), case["so"])
        close(intl.orthogonality_penalty(conv, "srip", power_iterations=500), case["srip_exact"])
