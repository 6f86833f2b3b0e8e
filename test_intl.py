"""Every test. `pytest test_intl.py` needs no data, no GPU and no network.

Numbers are compared with independent sources: eigendecompositions in float64, the scalar Newton map, values
computed once with the official release, torchvision's functions, one process instead of several.
"""

import argparse
import colorsys
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
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
from intl import (
    CWRGPLoss,
    INTLLoss,
    SpectralLoss,
    condition_number,
    effective_rank,
    iter_norm,
    newton_map,
    orthogonality_penalty,
    spectral_transform,
    spectrum,
    trace_loss,
    whiten,
)

try:
    import pycocotools.coco
    import pycocotools.cocoeval

    import detect_transfer
except ImportError:
    detect_transfer = None

pytestmark = [
    pytest.mark.filterwarnings("ignore:The image .*coding capabilities:DeprecationWarning"),  # torchvision's
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools'
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
AXES = ("channel", "batch")
CPU = torch.device("cpu")
torch.set_num_threads(1)  # as in the processes that the tests start: sums are rounded alike
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE)}


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Also where a GPU is: but for the tests of the GPU."""
    if not request.node.name.startswith("test_gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def load(path):
    return torch.load(path, weights_only=True, map_location="cpu")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def covariance(z, axis):
    """By torch.cov: rows are variables. Channels for the batch axis, samples for the channel axis."""
    return torch.cov(z if axis == "channel" else z.mT)


def scalar_iter_norm(l, iterations=4):
    """IterNorm of the eigenvalues, from its definition: P_T of the eigenvalues of S / tr S, over sqrt(tr
    S)."""
    trace = l.sum(-1, keepdim=True)
    p = torch.ones_like(l)
    for _ in range(iterations):
        p = (3 * p - p**3 * l / trace) / 2
    return p / trace.sqrt()


# --- Spectral transformations -------------------------------------------------------------------------------


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
        assert (h.diff() > -1e-15).all() and (h[1:1000] < (1 if iterations < 6 else 1 + 1e-15)).all()
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
    assert (l[:-rank].abs() < 1e-12).all()


def degenerate(kind, m, d):
    """Embeddings whose Gram matrix has repeated or zero eigenvalues, as a function of free parameters."""
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
        lambda z: INTLLoss(axis=axis)([z], teacher=randn(m, d, seed=7)),
    ]
    if kind != "repeated":  # whitening is not differentiable where an eigenvalue may leave zero
        functions += [
            lambda z: whiten(z, axis=axis),
            lambda z: spectral_transform(z, intl.power(0.3), axis=axis),
        ]
    for f in functions:
        assert gradcheck(lambda x, f=f: f(embed(x)), x.clone().requires_grad_())


@pytest.mark.parametrize("m, d", [(6, 6), (4, 9)])
def test_gradient_at_exactly_equal_eigenvalues(m, d):
    """All m eigenvalues are equal on the channel axis, where autograd through eigh gives NaN."""
    columns = torch.cat([torch.ones(d, 1, dtype=torch.float64), randn(d, m)], 1)
    q = torch.linalg.qr(columns)[0][:, 1:].T[: min(m, d - 1)]
    for g in (intl.power(0.5), intl.power(0.3), scalar_iter_norm):
        assert gradcheck(lambda z, g=g: spectral_transform(z, g), q.clone().requires_grad_())
    S = torch.eye(m, dtype=torch.float64).requires_grad_()
    l, U = torch.linalg.eigh(S)
    assert torch.autograd.grad(((U * l.rsqrt()) @ U.T * randn(m, m)).sum(), S)[0].isnan().any()


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
@pytest.mark.parametrize(
    "m, d, kind", [(64, 128, "random"), (256, 64, "random"), (128, 128, "decaying"), (96, 256, "low rank")]
)
def test_iter_norm_is_stable(m, d, kind, iterations):
    z = randn(m, d)
    if kind == "decaying":
        u, s, v = torch.linalg.svd(z, full_matrices=False)
        z = u * torch.logspace(0, -3, len(s), dtype=z.dtype) @ v
    if kind == "low rank":
        z = z[:, :8] @ randn(8, d, seed=1)
    z = z.float()
    for axis in AXES:
        zc = z.double() - z.double().mean(-1 if axis == "channel" else -2, keepdim=True)
        l = F.pad(torch.linalg.svdvals(zc).square(), (0, max(0, len(covariance(z, axis)) - min(m, d))))
        expected = newton_map(l / l.sum(), iterations).sort().values
        z_hat = iter_norm(z, iterations=iterations, axis=axis).double()
        assert (torch.linalg.eigvalsh(covariance(z_hat, axis)) - expected).abs().max() < 1e-3


def test_the_uncoupled_form_explodes():
    z = randn(256, 64, dtype=torch.float32)
    S = covariance(z, "channel")
    N, P = S / S.trace(), torch.eye(256)
    l, U = torch.linalg.eigh(N.double())
    exact = U @ (scalar_iter_norm(l, 15) * l.sum().sqrt()).diag() @ U.T
    for _ in range(15):
        P = 1.5 * P - 0.5 * P @ P @ P @ N
    assert not (P - exact).norm() < exact.norm()


# --- Trace loss and the INTL loss ---------------------------------------------------------------------------


def test_trace_loss_is_least_at_equal_eigenvalues():
    n, iterations = 16, 4
    floor = intl.trace_floor(n, iterations)
    rotations = [torch.linalg.qr(randn(n, n, seed=s))[0] for s in range(20)]
    for i, U in enumerate(rotations):
        x = torch.rand(n, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        cov = U @ newton_map(x / x.sum(), iterations).diag() @ U.T
        assert (1 - cov.diagonal()).square().sum() > floor + 1e-6
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
def test_loss_equals_its_definition(views, m, d, axis):
    """INTLLoss, which forms no z_hat for the channel axis, equals the definition, value and gradient."""
    z = randn(views, m, d).requires_grad_()
    beta = 0.01 * (math.log2(m if axis == "channel" else d) - 3)
    for iterations in (1, 2, 4, 11):
        criterion = INTLLoss(axis=axis, iterations=iterations)
        losses = [criterion(z), definition(z, axis, iterations, beta)]
        torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
        gradients = [torch.autograd.grad(loss, z)[0] for loss in losses]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        students = criterion(z[1:], teacher=z[0])
        expected = definition([z[0].detach(), *z[1:]], axis, iterations, beta, teacher=True)
        torch.testing.assert_close(students, expected, rtol=1e-10, atol=0)
        gradients = [torch.autograd.grad(loss, z)[0] for loss in (students, expected)]
        assert gradients[0][0].abs().max() == 0  # the teacher's view
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
def test_spectral_loss_equals_its_definition(p, axis):
    """By an eigendecomposition of the larger covariance, which autograd differentiates at simple
    eigenvalues."""
    z = randn(3, 8, 9 if axis == "channel" else 6).requires_grad_()
    z_hat = []
    for v in z:
        zc = v - v.mean(-1 if axis == "channel" else -2, keepdim=True)
        l, U = torch.linalg.eigh(covariance(v, axis))
        f = (U * l.pow(-p)) @ U.T
        z_hat.append(F.normalize(f @ zc if axis == "channel" else zc @ f, dim=1))
    expected = torch.stack([(2 - 2 * (v * z_hat[0]).sum(1)).mean() for v in z_hat[1:]]).mean()
    loss = SpectralLoss(p, axis=axis)
    losses = [loss(z), expected]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[torch.autograd.grad(value, z)[0] for value in losses])
    torch.testing.assert_close(loss.parts["alignment"], expected.detach())
    torch.testing.assert_close(loss(z[1:], teacher=z[0]), expected)


@pytest.mark.parametrize("axis, m, d", [("channel", 6, 9), ("batch", 9, 6)])
def test_parts_at_an_equal_spectrum_and_at_a_collapse(axis, m, d):
    columns = torch.cat([torch.ones(9, 1, dtype=torch.float64), randn(9, 6)], 1)
    q = torch.linalg.qr(columns)[0][:, 1:]  # centred columns
    equal, line, loss = (
        (q.T if axis == "channel" else q),
        randn(m, 1) * randn(1, d, seed=1),
        INTLLoss(axis=axis),
    )
    for arguments in ([[equal, equal]], [[equal], line]):  # a teacher's view does not count
        loss(*arguments)
        assert loss.parts["score"].item() == pytest.approx(1)
        assert loss.parts["trace"].item() == pytest.approx(loss.parts["floor"])
        assert loss.parts["floor"] == intl.trace_floor(6, 4)
    loss([line, line])
    assert loss.parts["score"].item() == pytest.approx(loss.parts["least"])
    assert loss.parts["alignment"].item() < 1e-9


# Computed once in float64 with the official release (winci-ai/INTL, commit 0aa69af), run in one process on
# `official_views`: loss, its momentum form, norm of the gradient, one entry of it, trace loss of every view.
# fmt: off
OFFICIAL = [  # axis, views, m, d, iterations, values
    ("channel", 2, 8, 5, 4,
        [2.089111207159423, 2.089111207159423, 0.685797221896301, -0.03031701953065581, 2.341619928879392,
         2.7860090033599656]),
    ("batch", 2, 8, 5, 4,
        [2.005871792282227, 2.0062706621879896, 0.8918259988170488, -0.06378662004124508,
         0.058824131003669386, 0.32264142920848166]),
    ("channel", 2, 6, 16, 4,
        [2.2470518258330734, 2.2471713514484755, 0.3858647459630053, -0.002890241786796948,
         0.02879875086228748, 0.1215160913919584]),
    ("batch", 2, 6, 16, 4,
        [2.0109425113810007, 1.9301884322600364, 0.43681376935015387, 0.0011223117282641946,
         8.075407912096429, 8.007177498311913]),
    ("channel", 2, 7, 7, 1,
        [2.0779861830249997, 2.0852564054428755, 0.7450726573376574, -0.029193422079902547,
         3.7738947164015775, 3.9465418979197007]),
    ("batch", 2, 16, 4, 7,
        [1.8768154965317667, 1.8768154965317667, 0.5615442368460691, -0.05064526559534356, 0.0, 0.0]),
    ("channel", 4, 9, 12, 4,
        [2.159325566685036, 2.1576662310962926, 0.29089840094631825, 0.013173071556401803, 0.9765105632831865,
         1.1173281923947391, 2.502115239204826, 0.7758496671305604]),
]
# fmt: on


def official_views(views, m, d):
    grid = [torch.arange(1, n + 1, dtype=torch.float64) for n in (views, m, d)]
    v, i, j = torch.meshgrid(*grid, indexing="ij")
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


REFERENCE = SHARED / "golden" / "reference_values.json"


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference file is no part of the project")
def test_reference_values():
    reference = json.loads(REFERENCE.read_text())
    tensor = functools.partial(torch.tensor, dtype=torch.float64)

    def close(got, values, atol=0):
        torch.testing.assert_close(got, tensor(values), rtol=1e-9, atol=atol)

    for case in reference["intl"]:
        z = tensor(case["views"])
        loss, momentum, gradient, trace = intl_values(z, case["axis"], case["iterations"])
        close(iter_norm(z, axis=case["axis"], iterations=case["iterations"]), case["iternorm"], 1e-12)
        close(trace, case["trace_loss"], 1e-12)
        close(loss, case["loss"])
        close(momentum, case["loss_momentum"])
        close(gradient, case["grad"], 1e-10 * tensor(case["grad"]).abs().max().item())
    for case in reference["cw_rgp"]:
        got = intl.group_whiten(tensor(case["z"]), case["groups"], torch.tensor(case["perm"]))
        close(got, case["whitened"], 1e-11)
    for case in reference["orthogonality"]:
        out, channels, *kernel = case["shape"]
        conv = nn.Conv2d(channels, out, kernel).double()
        conv.weight.data = tensor(case["weight"]).reshape(case["shape"])
        close(orthogonality_penalty(conv), case["so"])
        close(orthogonality_penalty(conv, "srip", power_iterations=500), case["srip_exact"])


# --- Bad numbers, bad shapes, half precision, compilation, a lone copy --------------------------------------


def value_and_gradient(loss, z):
    z = z.clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("m, d", [(16, 32), (32, 16)])
def test_collapsed_and_scaled_batches_are_finite(m, d, axis):
    z = randn(2, m, d, dtype=torch.float32)
    loss = INTLLoss(axis=axis)
    value, gradient = value_and_gradient(loss, z)
    collapsed = [torch.full_like(z, 0.1), torch.zeros_like(z), z[:, :1] * z[:, :, :1], z[:, :1].expand_as(z)]
    collapsed.append(torch.cat([z[:, 1:], torch.zeros_like(z[:, :1])], dim=1))  # one sample is zero
    for bad in collapsed:
        assert all(t.isfinite().all() for t in value_and_gradient(loss, bad))
        assert all(torch.as_tensor(part).isfinite() for part in loss.parts.values())
        assert whiten(bad, axis=axis).isfinite().all() and iter_norm(bad, axis=axis).isfinite().all()
        assert effective_rank(bad).isfinite().all() and condition_number(bad).isfinite().all()
    for constant in (collapsed[0], collapsed[1], collapsed[3]):
        torch.testing.assert_close(effective_rank(constant), torch.ones(2))
        torch.testing.assert_close(condition_number(constant), torch.ones(2))
    for scale in (1e6, 1e-6):  # the loss does not depend on the scale, its gradient is inverse to it
        scaled = value_and_gradient(loss, z * scale)
        torch.testing.assert_close(scaled[0], value, rtol=1e-5, atol=0)
        torch.testing.assert_close(scaled[1] * scale, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("axis", AXES)
def test_half_precision_and_autocast_change_nothing(axis):
    z = randn(2, 16, 48, dtype=torch.float32) * 100
    losses = [INTLLoss(axis=axis), SpectralLoss(0.5, axis=axis)]
    losses += [CWRGPLoss(groups=2)] if axis == "channel" else []

    def results(loss, z, autocast=None):
        torch.manual_seed(0)
        z = z.clone().requires_grad_()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            value = loss(list(z))
        return value.detach(), torch.autograd.grad(value, z)[0]  # outside autocast

    for loss in losses:
        for dtype in (torch.bfloat16, torch.float16):
            expected = results(loss, z.to(dtype).float())
            torch.testing.assert_close(results(loss, z.to(dtype))[0], expected[0])
            torch.testing.assert_close(results(loss, z.to(dtype).float(), autocast=dtype), expected)
    transposed = z.mT.contiguous().mT  # not contiguous
    torch.testing.assert_close(iter_norm(transposed, axis=axis), iter_norm(z, axis=axis))
    torch.testing.assert_close(INTLLoss(axis=axis)(transposed), INTLLoss(axis=axis)(z))
    exact, half = covariance(z[0], axis), covariance(z[0].bfloat16(), axis).float()
    assert 0.002 < (half - exact).norm() / exact.norm() < 0.02  # what this spares


@pytest.mark.parametrize("axis", AXES)
def test_the_loss_compiles_without_a_graph_break(axis):
    z = randn(2, 8, 12, dtype=torch.float32)
    loss = INTLLoss(axis=axis)
    expected, parts = value_and_gradient(loss, z), dict(loss.parts)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_gradient(compiled, z), expected)
    torch.testing.assert_close(dict(loss.parts), parts)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: INTLLoss()([randn(8, 4)]), r"two or more views .*\[\(8, 4\)\]"),
        (lambda: INTLLoss()([randn(8, 4), randn(8, 5)]), r"one shape .*\(8, 4\), \(8, 5\)"),
        (lambda: INTLLoss()([randn(8, 4)], teacher=randn(6, 4)), r"one shape .*\(6, 4\), \(8, 4\)"),
        (lambda: INTLLoss()([randn(1, 4)] * 2), r"needs 2 samples.*\(1, 4\)"),
        (lambda: INTLLoss(axis="rows"), "axis must be .*'rows'"),  # when it is made
        (lambda: SpectralLoss(0.5, axis=0), "axis must be .*0"),
        (lambda: INTLLoss(iterations=0), "from 1 to 40.*0"),
        (lambda: INTLLoss(iterations=41), "from 1 to 40.*41"),
        (lambda: iter_norm(torch.ones(4, 4, dtype=torch.int64)), "floating-point"),
        (lambda: spectral_transform(randn(8, 4), lambda l: l.sum()), r"\(4,\) to as many, got \(\)"),
        (lambda: intl.group_whiten(randn(8, 32), 4), r"larger than m, got \(8, 32\) and groups = 4"),
        (lambda: intl.group_whiten(randn(8, 32), 2, torch.arange(30)), r"in \(32,\), got \(30,\)"),
        (lambda: CWRGPLoss(groups=2, sub_batch=3)(randn(2, 8, 32)), "global batch of 8 rows, got 3"),
        (lambda: orthogonality_penalty(nn.ReLU()), "ReLU has no Conv2d or Linear weight"),
        (lambda: orthogonality_penalty(nn.Linear(2, 2), "frobenius"), "'frobenius'"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LONE = """
import sys
for name in ("torchvision", "numpy", "train", "matplotlib", "tensorboard", "pycocotools"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
import intl
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
optimizer, loss = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), intl.INTLLoss()
values = []
for step in range(60):
    x = torch.randn(64, 16)
    value = loss([net(x + 0.1 * torch.randn_like(x)) for _ in range(2)])
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    values.append(value.item())
assert intl.__file__.startswith(sys.argv[1]), intl.__file__
assert sum(values[-10:]) < sum(values[:10]) - 0.5, values
"""


def test_a_lone_copy_trains(tmp_path):
    shutil.copy(HERE / "intl.py", tmp_path)
    (tmp_path / "run.py").write_text(LONE)
    subprocess.run([sys.executable, "run.py", str(tmp_path)], cwd=tmp_path, check=True, timeout=120)


# --- CW-RGP, orthogonality, diagnostics, the demonstration --------------------------------------------------


def group_whiten_by_eigh(z, groups, order):
    """One view (m, d): every group of channels times U diag(l^-1/2) U^T of its own Gram matrix."""
    zc, z_hat = z - z.mean(1, keepdim=True), torch.empty_like(z)
    for part in order.chunk(groups):
        l, U = torch.linalg.eigh(zc[:, part] @ zc[:, part].T / (len(part) - 1))
        z_hat[:, part] = (U * l.rsqrt()) @ U.T @ zc[:, part]
    return z_hat


def test_group_whitening_whitens_every_group_by_each_views_permutation():
    m, d, groups = 6, 40, 4
    orders = torch.rand(2, d, generator=torch.Generator().manual_seed(3)).argsort(-1)
    z = randn(2, m, d)
    for v, order, v_hat in zip(z, orders, intl.group_whiten(z, groups, orders)):
        torch.testing.assert_close(v_hat, group_whiten_by_eigh(v, groups, order))
        torch.testing.assert_close(v_hat, intl.group_whiten(v, groups, order))
        for part in v_hat[:, order].split(d // groups, dim=1):  # not centred again within a group
            torch.testing.assert_close(part @ part.T / (d // groups - 1), torch.eye(m, dtype=z.dtype))
    assert gradcheck(lambda z: intl.group_whiten(z, groups, orders), z.requires_grad_())


def test_cw_rgp_equals_an_independent_computation():
    """Random parts of the batch, a permutation for each part and view, all pairs of views, two repeats."""
    V, m, d, size, repeats = 3, 8, 32, 4, 2
    z = randn(V, m, d).requires_grad_()
    torch.manual_seed(5)
    loss = CWRGPLoss(groups=2, sub_batch=size, repeats=repeats)(z)
    torch.manual_seed(5)
    distances = []
    for _ in range(repeats):
        rows, orders = torch.rand(m).argsort(), torch.rand(V * m // size, d).argsort(-1)
        z_hat = []
        for v, own in zip(z, orders.split(m // size)):
            parts = [group_whiten_by_eigh(v[r], 2, order) for r, order in zip(rows.split(size), own)]
            z_hat.append(F.normalize(torch.cat(parts), dim=1))
        pairs = itertools.combinations(z_hat, 2)
        distances += [(2 - 2 * (a * b).sum(1)).mean() for a, b in pairs]
    expected = sum(distances) / len(distances)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*[torch.autograd.grad(value, z)[0] for value in (loss, expected)])


class Penalty(nn.Module):
    def __init__(self, layer, kind):
        super().__init__()
        self.layer, self.kind = layer, kind

    def forward(self):
        return orthogonality_penalty(self, self.kind)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 2), nn.Conv2d(2, 12, 2), nn.Linear(7, 4), nn.Linear(4, 7)])
def test_orthogonality_penalty(layer):
    layer = layer.double()
    W = layer.weight.detach().flatten(1)
    s = torch.linalg.svdvals(W)  # G = W W^T - I or W^T W - I has the eigenvalues s^2 - 1
    so, srip = ((s**2 - 1) ** 2).sum(), (s**2 - 1).abs().max()
    torch.testing.assert_close(orthogonality_penalty(layer), so)
    torch.testing.assert_close(orthogonality_penalty(layer, "srip", power_iterations=2000), srip)
    bounds = [orthogonality_penalty(layer, "srip", power_iterations=n).item() for n in (0, 1, 5, 25)]
    assert bounds == sorted(bounds) and bounds[-1] <= srip + 1e-12
    both = nn.Sequential(layer, nn.BatchNorm1d(3), nn.Sequential(layer))  # a shared layer counts once, BN not
    torch.testing.assert_close(orthogonality_penalty(both), so)
    for kind in ("so", "srip"):

        def penalty(weight, kind=kind):
            return torch.func.functional_call(Penalty(layer, kind), {"layer.weight": weight}, ())

        assert gradcheck(penalty, layer.weight.detach().clone().requires_grad_())


def test_orthogonality_counts_packed_attention_as_three_weights():
    attention = nn.MultiheadAttention(6, 2).double()
    q, k, v = attention.in_proj_weight.detach().split(6)
    expected = sum(((torch.linalg.svdvals(W) ** 2 - 1) ** 2).sum() for W in (q, k, v))
    out = attention.out_proj.weight.detach()
    expected += ((torch.linalg.svdvals(out) ** 2 - 1) ** 2).sum()
    torch.testing.assert_close(orthogonality_penalty(attention).detach(), expected)


def test_diagnostics_of_a_known_spectrum():
    l = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    columns = torch.cat([torch.ones(50, 1, dtype=torch.float64), randn(50, 5)], 1)
    q = torch.linalg.qr(columns)[0][:, 1:]  # centred columns
    z = q * (49 * l).sqrt() @ torch.linalg.qr(randn(5, 5))[0] + 3
    torch.testing.assert_close(spectrum(z), l)
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert effective_rank(z).item() == pytest.approx(math.exp(entropy))
    assert condition_number(z).item() == pytest.approx(4)
    torch.testing.assert_close(spectrum(torch.stack([z, 2 * z])), torch.stack([l, 4 * l]))
    assert spectrum(randn(4, 9)).shape == (4,)


def test_demonstration():
    """The paper's order: IterNorm alone and no transformation lose rank, whitening less, INTL next to
    none."""
    ranks = {name: rank for name, (rank, _) in intl.demonstrate(steps=200).items()}
    assert max(ranks["no transformation"], ranks["IterNorm alone, T = 4"], ranks["power 0.2"]) < 16
    assert ranks["whitening"] > 1.5 * ranks["power 0.2"]
    assert ranks["INTL, T = 4"] > 48


# --- Several processes --------------------------------------------------------------------------------------


def torchrun(processes, *arguments, cwd=HERE, timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command = [str(word) for word in [*command, *arguments]]  # torchrun's own options first
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, cwd=cwd)


GRADIENTS = """
import sys
import torch
import torch.distributed as dist
from intl import INTLLoss, CWRGPLoss, SpectralLoss, gather

def gradients(rank, world, wrap, average):
    z = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    results = {}
    losses = {"batch": INTLLoss(axis="batch"), "channel": INTLLoss(), "few rows": INTLLoss()}
    losses["whiten"] = SpectralLoss(0.4, axis="batch")
    losses["cwrgp"] = CWRGPLoss(groups=2, sub_batch=6, repeats=2)
    for name, loss in losses.items():
        for teacher in (False, True) if name != "cwrgp" else (False,):
            torch.manual_seed(1)
            out = {"few rows": 30, "cwrgp": 16}.get(name, 10)
            net = wrap(torch.nn.Linear(8, out).double())
            z_net = net(z[:, share])
            torch.manual_seed(2 + rank)  # CW-RGP's partitions are the first process's
            value = loss(list(z_net[1:]), z_net[0]) if teacher else loss(list(z_net))
            value.backward()
            results[name, teacher] = [value.detach(), *[average(p.grad) for p in net.parameters()]]
    return results

def mean_over_processes(gradient):
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    everything = gather(rows)
    (everything * torch.arange(2.0 * world)[:, None]).sum().backward()
    assert everything[:, 0].tolist() == [r // 2 for r in range(2 * world)]
    assert rows.grad[:, 0].tolist() == [2 * rank, 2 * rank + 1]
    ddp = torch.nn.parallel.DistributedDataParallel
    torch.save(gradients(rank, world, ddp, lambda g: g), f"{sys.argv[1]}/ddp {rank}.pt")
    plain = gradients(rank, world, lambda net: net, mean_over_processes)
    torch.save(plain, f"{sys.argv[1]}/plain {rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_gradient_over_processes_equals_one_process(processes, tmp_path):
    """DistributedDataParallel's average and a plain one, both axes, with and without teacher, all losses."""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    run = torchrun(processes, script, tmp_path)
    assert run.returncode == 0, run.stderr
    namespace = {"__name__": "gradients"}
    exec(GRADIENTS, namespace)
    expected = namespace["gradients"](0, 1, lambda net: net, lambda gradient: gradient)
    for kind, rank in itertools.product(("ddp", "plain"), range(processes)):
        for case, values in load(tmp_path / f"{kind} {rank}.pt").items():
            for got, value in zip(values, expected[case]):
                torch.testing.assert_close(
                    got, value, rtol=1e-9, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}"
                )


# --- Data and augmentation ---------------------------------------------------------------------------------


def run_script(script, *arguments, processes=0, timeout=300):
    if processes:
        return torchrun(processes, HERE / script, *arguments, timeout=timeout)
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_shapes_depend_on_seed_and_index_alone():
    images = train.draw_shapes(0, 0, 20)
    assert images.targets.tolist() == [i % 8 for i in range(20)]
    assert torch.equal(train.draw_shapes(0, 5, 2).tensors[0], images.tensors[0][5:7])
    assert not torch.equal(train.draw_shapes(1, 0, 20).tensors[0], images.tensors[0])


def test_shapes_colour_tells_nothing():
    """Chance is 12.5 %; the standard error of 1,000 images is 1 point."""
    (images, labels), (queries, expected) = (
        train.draw_shapes(0, *r).tensors for r in ((0, 4000), (10**6, 1000))
    )
    for feature in (lambda x: x.float().mean((2, 3)), lambda x: x.float().mean((1, 2, 3))[:, None]):
        assert train.knn_top1(feature(images), labels, feature(queries), expected, 5) < 12.5 + 4


def test_shapes_have_equal_areas():
    y, x = torch.meshgrid(*[torch.linspace(-2, 2, 401)] * 2, indexing="ij")
    areas = [(level(x, y) > 0).float().mean().item() * 16 for level in train.SHAPES.values()]
    assert areas == pytest.approx([3] * 8, rel=0.03)


def test_masks_of_a_scene_are_what_is_seen_of_its_shapes():
    picture, masks = train.draw_scene(0, 3, 64, [0, 2, 5], 0.3, 0.6)
    assert picture.shape == (3, 64, 64) and masks.shape == (3, 64, 64) and masks.dtype == torch.bool
    assert masks.sum(0).max() == 1 and masks[2].sum() > 100  # the last lies in front
    alone = train.draw_scene(0, 3, 64, [0], 0.3, 0.6)[1][0]
    assert (masks[0] & ~alone).sum() == 0 and masks[0].sum() < alone.sum()


def pictures(size=32, n=24):
    """Smooth random images and pure noise, uint8."""
    noise = torch.randint(0, 256, (n, 3, size, size), generator=generator(0), dtype=torch.uint8)
    smooth = TF.resize(noise[: n // 2, :, :5, :5], [size, size], antialias=True)
    return torch.cat([smooth, noise[n // 2 :]])


def assert_same_picture(got, expected):
    difference = (got * 255 - expected.float()).abs()
    assert difference.max() <= 2 and difference.mean() <= 0.6, (difference.max(), difference.mean())


QUIET = "--jitter 0 0 0 0 --jitter-prob 0 --gray 0 --solarize 0 --solarize-threshold 128 --blur 0"


def augment(x, flags, u, order=(3, 0, 1, 2), flip=False):
    """train.augment by flags and uniform numbers u (n, 9), with or without its flip."""
    args = train.parse([*QUIET.split(), *flags.split()])
    used = 6 + 2 * bool(args.blur[0]) + bool(args.solarize[0])
    u = torch.cat([u[:, :used], torch.full((len(u), 1), 0.0 if flip else 1.0)], dim=1)
    return train.augment(x, args, 0, iter(u.T[:, :, None, None, None]).__next__, list(order))


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_batched_jitter_equals_torchvision(operation):
    x, u = pictures(), torch.rand(24, 9, generator=generator(1))
    index = ["brightness", "contrast", "saturation", "hue"].index(operation)
    strength = " ".join("0.4" if i == index else "0" for i in range(4))
    got = augment(x / 255, f"--jitter {strength} --jitter-prob 1", u)
    amount = 0.4 * (2 * u[:, 1 + index] - 1)
    adjust = getattr(TF, f"adjust_{operation}")
    expected = [adjust(image, (a if operation == "hue" else 1 + a).item()) for image, a in zip(x, amount)]
    assert_same_picture(got, torch.stack(expected))


def test_batched_grey_solarise_flip_and_blur_equal_torchvision():
    x, u = pictures(), torch.rand(24, 9, generator=generator(1))
    assert_same_picture(augment(x / 255, "", u), x)
    grey = augment(x / 255, "--gray 1", u) * 255
    assert (grey.round() - TF.rgb_to_grayscale(x, 3)).abs().max() <= 1
    assert_same_picture(augment(x / 255, "--solarize 1", u), TF.solarize(x, 128))
    assert_same_picture(augment(x / 255, "--solarize 1 --solarize-threshold 0", u), TF.invert(x))
    assert_same_picture(augment(x / 255, "", u, flip=True), TF.horizontal_flip(x))
    blurred = [TF.gaussian_blur(image, [13, 13], [s.item()] * 2) for image, s in zip(x, 0.1 + 1.9 * u[:, 7])]
    assert_same_picture(augment(x / 255, "--blur 1", u), torch.stack(blurred))


def test_augmentation_is_drawn_as_published():
    """20,000 draws of pictures of two columns: how often each operation happens, and the jitter's
    strengths."""
    n = 20_000
    picture = torch.tensor([[0.6, 0.5], [0.4, 0.3], [0.2, 0.4]])[:, None].repeat(1, 2, 1)  # (3, 2, 2)
    x, u = picture.expand(n, 3, 2, 2), torch.rand(n, 9, generator=generator(0))
    share = lambda changed: changed.float().mean().item()
    different = lambda y: ((y - picture).abs() > 1e-4).flatten(1).any(1)  # (n,)
    error = 4 * (0.25 / n) ** 0.5
    assert share(different(augment(x, "--gray 0.2", u))) == pytest.approx(0.2, abs=error)
    assert share(different(augment(x, "--blur 0.1", u))) == pytest.approx(
        0.09, abs=error
    )  # sigma 0.1 shows not
    solarised = augment(x, "--solarize 0.2 --solarize-threshold 100", u)
    assert share(different(solarised)) == pytest.approx(0.2, abs=error)

    light = lambda y: (y * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1)
    hue = lambda y: torch.tensor([colorsys.rgb_to_hsv(*rgb)[0] for rgb in y[:, :, 0, 0].tolist()])
    red = (picture[0] - light(picture[None])[0])[0, 0]
    strengths = {
        "0.4 0 0 0": lambda y: y[:, 0, 0, 0] / 0.6 - 1,
        "0 0.4 0 0": lambda y: (light(y).diff(dim=-1) / light(picture[None]).diff(dim=-1))[:, 0, 0] - 1,
        "0 0 0.2 0": lambda y: (y[:, 0] - light(y))[:, 0, 0] / red - 1,
        "0 0 0 0.1": lambda y: (hue(y) - hue(picture[None]) + 0.5) % 1 - 0.5,
    }
    for jitter, measure in strengths.items():
        y = augment(x, f"--jitter {jitter} --jitter-prob 0.8", u, order=(0, 1, 2, 3))
        on, largest = different(y), max(map(float, jitter.split()))
        assert share(on) == pytest.approx(0.8, abs=0.01)
        values = measure(y[on]).double().sort().values  # uniform, by Kolmogorov and Smirnov
        uniform = torch.linspace(-largest, largest, len(values), dtype=torch.float64)
        assert (values - uniform).abs().max() < 0.0155 * 2 * largest


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """train/ and val/ with three classes of small pictures of different sizes."""
    root = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 16), ("val", 5)):
        for c in range(3):
            folder = root / split / f"class {c}"
            folder.mkdir(parents=True)
            for i in range(n):
                g = generator(100 * c + i + 50 * (split == "val"))
                coarse = torch.randint(0, 256, (3, 2 + c, 4), generator=g, dtype=torch.uint8)
                image = TF.to_pil_image(TF.resize(coarse, [20 + i, 30 - i]))
                image.save(folder / f"{i}.png")
    return root


def training_views(args, images, first, last, workers=0):
    crops = [torchvision.transforms.v2.RandomResizedCrop(s) for s in args.view_sizes]
    keys = train.batches(torch.arange(len(images)), args.batch_size, args.seed, first, last)
    loader = train.read(train.Views(images, crops, args.seed), workers, batch_sampler=keys)
    cpu = torch.device("cpu")
    return [train.augmented(views, args, step, cpu) for step, (views, _) in enumerate(loader, start=first)]


def test_order_and_crops_do_not_depend_on_workers_or_processes(photos, monkeypatch):
    args = train.parse(["--batch-size", "8", "--view-sizes", "16", "16"])
    images, _ = train.load_data("folder", photos, 0)
    whole = training_views(args, images, 0, 8)  # over the end of an epoch of 6 steps
    labels = [i for key in train.batches(torch.arange(48), 8, 0, 0, 6) for _, i in key]
    assert sorted(labels) == list(range(48))
    for first, workers in ((0, 2), (3, 0)):
        for got, expected in zip(training_views(args, images, first, 8, workers), whole[first:]):
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
    monkeypatch.setattr(train, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        (share,) = training_views(args, images, 3, 4)
        assert all(torch.equal(a, b[4 * rank : 4 * rank + 4]) for a, b in zip(share, whole[3]))


def test_shared_items_come_back():
    items = [("a/ü.png", 3), ("b", 0), {"boxes": [1.5, 2]}]
    shared = train.Shared(items)
    assert len(shared) == 3 and [shared[i] for i in range(3)] == items


def test_images_are_decoded_as_torchvision_does_it(photos, tmp_path):
    path = photos / "train" / "class 0" / "3.png"
    assert torch.equal(train.decode(str(path)), torchvision.io.decode_image(str(path), mode="RGB"))
    (tmp_path / "torn.png").write_bytes(path.read_bytes()[:200])
    with pytest.raises(RuntimeError, match=r"torn.png is no image that can be read"):
        train.decode(str(tmp_path / "torn.png"))


def test_held_out_images_are_cropped_at_the_centre(monkeypatch):
    image = pictures(70)[0, :, :50]
    transform = torchvision.transforms.v2
    expected = transform.Compose([transform.Resize(256), transform.CenterCrop(224)])(image)
    images = train.in_memory(image[None], [0], ["a"])
    ((got,), _) = next(iter(train.still(images, "folder", 224, 0)))
    assert torch.equal(got[0], expected)
    ((got,), _) = next(iter(train.still(images, "cifar10", 32, 0)))
    assert torch.equal(got[0], image)


# --- One step, schedules, recipes, teacher, k-NN -----------------------------------------------------------


class TinyNetwork(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 10))
        self.projector = nn.Linear(10, 12)

    def forward(self, views):
        return [self.projector(self.backbone(v)) for v in views]


def flat(folder, flags=""):
    return [*TINY, "--data", str(folder), "--precision", "float32", *flags.split()]


@pytest.mark.parametrize("ema", [0, 0.9])
def test_steps_equal_an_independent_computation(ema, photos, tmp_path, monkeypatch):
    """Three steps of main's loop: forward, the formulas of the paper, SGD with momentum and weight decay,
    schedules, teacher."""
    views = {step: list(randn(4 if ema else 2, 16, 3, 6, 6, seed=step)) for step in range(3)}
    monkeypatch.setattr(train, "Network", lambda args: TinyNetwork(args).double())
    monkeypatch.setattr(train, "augmented", lambda crops, args, step, device: views[step])
    monkeypatch.setattr(train, "normalize", lambda x, dataset: x[:, :, :6, :6].double())
    sizes = "6 6 6 6" if ema else "6 6"
    flags = f"--ema {ema} --view-sizes {sizes} --weight-decay 0.1 --base-lr 0.3 --max-steps 3 --workers 0"
    torch.manual_seed(0)
    mine = {k: v.clone().requires_grad_() for k, v in TinyNetwork(None).double().state_dict().items()}
    my_teacher = {k: v.detach().clone() for k, v in mine.items()}
    velocity = {k: torch.zeros_like(v) for k, v in mine.items()}
    train.main([*flat(photos, flags), "--output", str(tmp_path)])

    def embed(weights, x):
        h = x.flatten(1) @ weights["backbone.1.weight"].T + weights["backbone.1.bias"]
        return h @ weights["projector.weight"].T + weights["projector.bias"]

    losses = []
    for step in range(3):
        rate = 0.3 * 16 / 256 * (step + 1) / 3  # a warm-up of one epoch of 3 steps
        if ema:
            momentum = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * step / 12))
            my_teacher = {k: momentum * v + (1 - momentum) * mine[k].detach() for k, v in my_teacher.items()}
        z = [embed(mine if i or not ema else my_teacher, v) for i, v in enumerate(views[step])]
        losses.append(definition(z, "channel", 4, 0.01 * (math.log2(16) - 3), teacher=bool(ema)))
        for (name, w), g in zip(mine.items(), torch.autograd.grad(losses[-1], list(mine.values()))):
            velocity[name] = 0.9 * velocity[name] + g + 0.1 * w.detach()
            mine[name] = (w - rate * velocity[name]).detach().requires_grad_()
    saved = load(tmp_path / "checkpoint.pt")
    logged = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert logged == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    for name, w in saved["network"].items():
        torch.testing.assert_close(w, mine[name].detach(), rtol=1e-9, atol=1e-12)
        if ema:
            torch.testing.assert_close(saved["teacher"][name], my_teacher[name], rtol=1e-9, atol=1e-12)


def test_schedules_at_their_ends():
    args, steps = (train.parse("--batch-size 512 --base-lr 0.3 --epochs 10 --warmup-epochs 2".split()), 100)
    rates = {0: 0.6 / 200, 199: 0.6, 599: 0.6 * (1 + 0.001) / 2, 999: 0.6 * 0.001}
    for step, rate in rates.items():
        assert train.learning_rate(step, steps, args) == pytest.approx(rate)
    args = train.parse(["--recipe", "cwrgp-cifar10", "--batch-size", "512"])  # Adam's rate is not scaled
    rates = {0: 3e-3 / 500, 499: 3e-3, 500: 3e-3, 195 * 950 - 1: 3e-3, 195 * 950: 6e-4, 195 * 975: 1.2e-4}
    for step, rate in rates.items():
        assert train.learning_rate(step, 195, args) == pytest.approx(rate)


def test_weight_decay_spares_one_dimensional_parameters_where_the_recipe_says_so(
    photos, tmp_path, monkeypatch
):
    groups = {}
    sgd = torch.optim.SGD

    def spy(params, **options):
        groups["decayed"], groups["spared"] = params
        return sgd(params, **options)

    monkeypatch.setattr(torch.optim, "SGD", spy)
    for flag in ("--no-decay-all", "--decay-all"):
        train.main([*flat(photos, f"{flag} --max-steps 1 --workers 0"), "--output", str(tmp_path / flag)])
        spared = len(groups["spared"]["params"])
        assert groups["spared"]["weight_decay"] == 0 and (
            spared > 20 if flag == "--no-decay-all" else spared == 0
        )
        assert all(p.ndim == 1 for p in groups["spared"]["params"])


# fmt: off
PUBLISHED = {  # the fields of every recipe of INTL
    "arch": "resnet18", "stem": "imagenet", "zero_init_residual": False, "batch_size": 256, "base_lr": 0.3,
    "warmup_epochs": 2, "weight_decay": 1e-5, "decay_all": False, "loss": "intl", "iterations": 4,
    "axis": "channel", "beta": None, "orthogonality": None, "ema": 0, "layers": 3, "hidden": 8192,
    "out": 8192, "joint_head": False, "optimizer": "sgd", "milestones": None, "view_sizes": [224, 224],
    "min_scale": [0.08] * 2, "max_scale": [1] * 2, "jitter": [0.4, 0.4, 0.2, 0.1], "jitter_prob": 0.8,
    "gray": 0.2, "blur": [1.0, 0.1], "solarize": [0.0, 0.2], "solarize_threshold": 128,
}
CIFAR = {
    "stem": "cifar", "epochs": 1000, "weight_decay": 1e-4, "decay_all": True, "hidden": 2048, "out": 2048,
    "view_sizes": [32, 32], "blur": [0.0] * 2,
}
MULTICROP = {
    "arch": "resnet50", "zero_init_residual": True, "ema": 0.996, "blur": [0.5] * 6, "solarize": [0.1] * 6,
    "view_sizes": [224, 224, 192, 160, 128, 96], "min_scale": [0.2, 0.2, 0.171, 0.143, 0.114, 0.086],
    "max_scale": [1.0, 1.0, 0.857, 0.714, 0.571, 0.429],
}
CWRGP = CIFAR | {
    "dataset": "cifar10", "zero_init_residual": True, "layers": 2, "hidden": 1024, "out": 512,
    "joint_head": True, "optimizer": "adam", "base_lr": 3e-3, "weight_decay": 1e-6,
    "milestones": [0.95, 0.975],
    "loss": "cwrgp", "groups": 4, "sub_batch": 64, "repeats": 4, "warmup_epochs": 500 / 195,
    "min_scale": [0.2] * 2, "gray": 0.1, "jitter": [0.4, 0.4, 0.4, 0.1], "solarize": [0.0] * 2,
}
OWN = {  # and of each, where they differ
    "cifar10": CIFAR | {"dataset": "cifar10"},
    "cifar100": CIFAR | {"dataset": "cifar100"},
    "imagenet100": {"epochs": 400, "batch_size": 128, "base_lr": 0.5, "weight_decay": 2.5e-5, "hidden": 4096},
    "imagenet": {"arch": "resnet50", "epochs": 800, "zero_init_residual": True},
    "imagenet-multicrop-100": MULTICROP | {"epochs": 100, "base_lr": 0.5},
    "imagenet-multicrop-200": MULTICROP | {"epochs": 200, "base_lr": 0.4},
    "imagenet-multicrop-400": MULTICROP | {"epochs": 400, "base_lr": 0.4},
    "imagenet-multicrop-800": MULTICROP | {"epochs": 800, "base_lr": 0.3},
    "cwrgp-cifar10": CWRGP,
    "cwrgp-cifar10-4views": CWRGP | {"repeats": 1, "view_sizes": [32] * 4, "min_scale": [0.2] * 4,
                                     "max_scale": [1] * 4, "blur": [0.0] * 4, "solarize": [0.0] * 4},
    "whiten-cifar10": CWRGP | {"repeats": 1, "loss": "power", "power": 0.5},
}
# fmt: on


def test_recipes_are_the_published_ones():
    assert {*OWN, "shapes"} == set(train.RECIPES)
    for name, own in OWN.items():
        args = vars(train.parse(["--recipe", name]))
        for field, value in (PUBLISHED | own).items():
            assert args[field] == value, (name, field)


def test_settings_of_the_evaluation_are_the_published_ones():
    protocols = {name: (epochs, rates[:1]) for name, (epochs, rates) in linear_eval.PROTOCOLS.items()}
    assert protocols == {
        "features": (500, [0.01]),
        "knn": (0, []),
        "linear": (100, [0.2]),
        "finetune": (20, [0.2]),
    }
    assert 0.4 in linear_eval.PROTOCOLS["linear"][1]
    args = linear_eval.parse([])
    assert (args.batch_size, args.weight_decay, args.encoder_lr, args.schedule) == (256, 0, 0.006, "constant")
    for epoch, factor in {0: 1, 59: 1, 60: 0.1, 79: 0.1, 80: 0.01, 99: 0.01}.items():
        assert linear_eval.rate_factor("linear", "constant", 5 * epoch + 4, 5, 100) == pytest.approx(factor)
    for step, factor in {0: 1, 50: 0.5, 100: 0}.items():
        assert linear_eval.rate_factor("finetune", "constant", step, 5, 20) == 1
        assert linear_eval.rate_factor("finetune", "cosine", step, 5, 20) == pytest.approx(factor, abs=1e-7)


def test_every_bn_sees_one_view_but_in_a_joint_head():
    flags = "--stem cifar --hidden 8 --out 8 --view-sizes 8 8".split()
    views = list(randn(2, 8, 3, 8, 8, dtype=torch.float32))
    network = train.Network(train.parse(flags))
    torch.testing.assert_close(network(views)[1], network(views[1:])[0])
    assert [type(layer) for layer in network.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [
        nn.Linear
    ]
    assert [layer.bias is not None for layer in network.projector[::3]] == [False, False, True]
    network = train.Network(train.parse([*flags, "--joint-head", "--layers", "2"]))
    together = network.projector(torch.cat([network.backbone(v) for v in views]))
    torch.testing.assert_close(torch.cat(network(views)), together)
    assert [layer.bias is not None for layer in network.projector[::3]] == [True, True]


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_knn_votes_like_a_brute_force_search(temperature):
    bank, queries = randn(200, 6, dtype=torch.float32), randn(300, 6, seed=1, dtype=torch.float32)
    if temperature:
        bank, queries = F.normalize(bank), F.normalize(queries)
    labels, expected, right = torch.arange(200) % 4, torch.arange(300) % 4, 0
    for q, y in zip(queries, expected):
        votes = [0.0] * 4
        for i in (q.double() - bank.double()).square().sum(1).sort(stable=True).indices[:5].tolist():
            cosine = (q.double() @ bank[i].double()).item()
            votes[labels[i]] += math.exp(cosine / temperature) if temperature else 1
        right += votes.index(max(votes)) == y
    assert train.knn_top1(bank, labels, queries, expected, 5, temperature) == pytest.approx(100 * right / 300)


def test_knn_votes_over_many_parts_of_a_large_bank_and_with_fewer_rows_than_votes():
    bank, queries = randn(200, 6, dtype=torch.float32), randn(50, 6, seed=1, dtype=torch.float32)
    labels, expected = torch.arange(200) % 4, torch.arange(50) % 4
    nearest = train.knn_top1(bank, labels, queries, expected, 1)
    assert train.knn_top1(bank.repeat(400, 1), labels.repeat(400), queries, expected, 5) == nearest
    all_three = [train.knn_top1(bank[:3], labels[:3], queries, expected, k) for k in (3, 20)]
    assert all_three[0] == all_three[1]


def test_the_padded_stem_is_the_present_releases():
    """Which pads CIFAR's images by one pixel before a convolution that pads them again: maps of 34 x 34."""
    torch.manual_seed(0)
    ours, _ = train.build_backbone("resnet18", "cifar-padded")
    plain, _ = train.build_backbone("resnet18", "cifar")
    plain.load_state_dict(ours.state_dict())
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    assert ours.conv1(x).shape[-1] == 34
    torch.testing.assert_close(ours.conv1(x), plain.conv1(F.pad(x, (1,) * 4)))


# --- The scripts, as a user starts them --------------------------------------------------------------------

TINY = (
    "--dataset folder --view-sizes 16 16 --stem small --batch-size 16 --hidden 16 --out 24 --epochs 4".split()
)
TINY += "--warmup-epochs 1 --base-lr 0.03 --log-every 1 --workers 1 --save-minutes 0".split()


def tiny(data, folder, flags=""):
    """Arguments of a tiny run in this process."""
    return [*TINY, "--workers", "0", "--data", str(data), "--output", str(folder), *flags.split()]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    """An undisturbed tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run = run_script("train.py", *TINY, "--data", photos, "--output", folder)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


def test_a_run_leaves_what_is_promised(finished):
    folder, printed = finished
    assert {"checkpoint.pt", "backbone.pt", "config.json", "log.jsonl"} <= {p.name for p in folder.iterdir()}
    assert any(p.name.startswith("events.out.tfevents") for p in folder.iterdir())
    net = torchvision.models.resnet18()
    net.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    assert net.load_state_dict(load(folder / "backbone.pt"), strict=False) == (["fc.weight", "fc.bias"], [])
    lines = log_of(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["epoch"] for line in lines if "knn_top1" in line] == [0, 1, 2, 3, 4]
    names = (
        "alignment trace floor score lr images_per_second waiting hours_left embedding_rank condition_number"
    )
    assert all(f"{name} " in printed for name in names.split()) and "peak memory" in printed
    assert "command" in lines[0] and "date" in lines[0]


def test_a_killed_run_ends_bitwise_like_an_undisturbed_one(finished, photos, tmp_path):
    """SIGKILL of the whole process group, twice, in the middle of an epoch; and a half-written temporary
    file."""
    folder = tmp_path / "killed"
    command = [sys.executable, str(HERE / "train.py"), *TINY, "--data", str(photos), "--output", str(folder)]
    for until in (5, 8):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
        )
        for line in process.stdout:
            if f"step {until} " in line and "loss" in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
        assert process.wait(timeout=60) == -9
        (folder / "checkpoint.pt.tmp").write_bytes(b"half")
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0 and ", from 0, by" not in run.stdout, run.stderr
    expected = load(finished[0] / "backbone.pt")
    assert all(torch.equal(value, expected[name]) for name, value in load(folder / "backbone.pt").items())
    assert [line["step"] for line in log_of(folder) if "loss" in line] == list(range(1, 13))


def test_two_processes_train_and_evaluate(photos, tmp_path):
    flags = ["--data", photos, "--output", tmp_path / "two", "--epochs", "2"]
    run = run_script("train.py", *TINY, *flags, processes=2)
    assert run.returncode == 0 and "by 2 cpu" in run.stdout, run.stderr
    flags = ["--checkpoint", tmp_path / "two" / "backbone.pt", "--arch", "resnet18", "--stem", "small"]
    flags += ["--size", "16", "--data", photos, "--epochs", "1", "--batch-size", "16"]
    run = run_script("linear_eval.py", *flags, "--protocol", "finetune", "knn", processes=2)
    assert run.returncode == 0 and "finetune " in run.stdout and "knn " in run.stdout, run.stderr


METHODS = [
    "--loss iternorm",
    "--loss whiten --orthogonality so",
    "--loss power --power 0.45 --axis batch",
    "--loss cwrgp --groups 1 --sub-batch 8 --optimizer adam --milestones 0.5 --repeats 2",
    "--loss none --orthogonality srip --joint-head",
    "--ema 0.9 --view-sizes 16 16 12 --solarize 0.1 --blur 0.5",
    "--precision float16",
]


@pytest.mark.parametrize("flags", METHODS)
def test_every_method_takes_a_step(flags, photos, tmp_path, capsys):
    arguments = [
        *TINY,
        "--data",
        str(photos),
        "--output",
        str(tmp_path),
        "--max-steps",
        "2",
        "--workers",
        "0",
    ]
    train.main([*arguments, *flags.split()])
    assert "step 2 " in capsys.readouterr().out
    assert all(v.isfinite().all() for v in load(tmp_path / "backbone.pt").values())


@pytest.mark.parametrize("recipe", [name for name in train.RECIPES if name != "shapes"])
def test_every_recipe_takes_a_step(recipe, photos, tmp_path, capsys):
    sizes = train.parse(["--recipe", recipe]).view_sizes
    flags = ["--recipe", recipe, "--arch", "resnet18", "--hidden", "16", "--out", "96", "--batch-size", "16"]
    flags += ["--view-sizes", *["16"] * len(sizes), "--data", str(photos), "--output", str(tmp_path)]
    flags += "--max-steps 1 --workers 0 --sub-batch 16 --dataset folder".split()
    train.main(flags)
    assert "step 1 " in capsys.readouterr().out


RESTART = """
import os, sys
import train
augmented, calls = train.augmented, []
def dying(*arguments):
    calls.append(1)
    if train.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(calls) == 5:
        os._exit(7)
    return augmented(*arguments)
train.augmented = dying
if __name__ == "__main__":
    train.main(sys.argv[1:])
"""


def test_restarts_of_torchrun_resume(photos, tmp_path):
    """--max-restarts: a process dies once, in the second epoch; both are started again and go on."""
    (tmp_path / "dies_once.py").write_text(RESTART)
    options = [*TINY, "--data", photos, "--output", tmp_path / "run"]
    run = torchrun(2, "--max-restarts", "1", tmp_path / "dies_once.py", *options)
    assert run.returncode == 0 and re.search(r"from [34], by 2", run.stdout), run.stderr
    assert "step 12 " in run.stdout


WITHOUT_BN = """
import sys, torch, train
class Network(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 16))
        self.projector = torch.nn.Linear(16, 24)
    def forward(self, views):
        return [self.projector(self.backbone(v)) for v in views]
train.Network = Network
if __name__ == "__main__":
    train.main(sys.argv[1:])
"""


def test_two_nodes_equal_one_process(photos, tmp_path):
    """Two torchrun agents with two processes each, meeting on the loopback device; a network without
    BatchNorm,
    which on CPUs normalises every process's share by itself."""
    script = tmp_path / "without_bn.py"
    script.write_text(WITHOUT_BN)
    options = [*TINY, "--data", photos, "--precision", "float32", "--max-steps", "5", "--output"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
    command += ["--rdzv_id", "7", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    command += ["--local_addr", "127.0.0.1"]
    command = [str(word) for word in [*command, script, *options, tmp_path / "four"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    agents = [subprocess.Popen(command, **pipes) for _ in range(2)]
    printed = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    one = run_script(script, *options, tmp_path / "one")
    assert one.returncode == 0, one.stderr
    losses = [[line["loss"] for line in log_of(tmp_path / n) if "loss" in line] for n in ("one", "four")]
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    weights = [load(tmp_path / name / "backbone.pt") for name in ("one", "four")]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_a_run_resumes_on_another_number_of_processes(photos, tmp_path):
    script = tmp_path / "without_bn.py"
    script.write_text(WITHOUT_BN)
    options = [*TINY, "--data", photos, "--precision", "float32", "--output"]
    for name, parts in {"whole": [(0, "6")], "parts": [(2, "2"), (0, "6")]}.items():
        for processes, until in parts:
            run = run_script(script, *options, tmp_path / name, "--max-steps", until, processes=processes)
            assert run.returncode == 0, run.stderr
    weights = [load(tmp_path / name / "backbone.pt") for name in ("whole", "parts")]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


READER = """
import os, time
import train
class Pids:
    def __len__(self):
        return 10_000
    def __getitem__(self, i):
        time.sleep(0.05)
        return [os.getpid(), os.getppid()]
if __name__ == "__main__":
    for found in train.read(Pids(), 2, batch_size=None):
        print(*found, flush=True)
"""


def alive(pid):
    """Running, not a zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_leave_with_a_killed_run(tmp_path):
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, tmp_path / "reader.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        pids = {int(pid) for _ in range(20) for pid in process.stdout.readline().split()}
        assert len(pids) == 3 and process.pid not in pids  # two workers, and the server that forks them
        process.kill()
        process.wait(timeout=20)
    deadline = time.time() + 10
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_a_tree_without_labels_trains(photos, tmp_path, capsys):
    train.main(tiny(photos / "train", tmp_path, "--max-steps 2"))
    printed = capsys.readouterr().out
    assert "feature_rank" in printed and "knn_top1" not in printed


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(photos, tmp_path):
    arguments = tiny(photos, tmp_path, "--base-lr 1e30 --warmup-epochs 0")
    with pytest.raises(SystemExit, match=r"the loss is not finite at step \d+: .*--base-lr"):
        train.main(arguments)
    assert all(v.isfinite().all() for v in load(tmp_path / "checkpoint.pt")["network"].values())


def test_checkpoints_are_written_by_the_clock(photos, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(train, "save", lambda state, path: written.append(path.name))
    arguments = tiny(photos, tmp_path, "--max-steps 5")
    train.main(arguments)
    assert written == ["checkpoint.pt", "backbone.pt"] * 5
    written.clear()
    train.main([*arguments, "--save-minutes", "10"])
    assert written == ["checkpoint.pt", "backbone.pt"]


def test_a_run_is_evaluated_at_most_a_hundred_times(photos, tmp_path, monkeypatch):
    calls = []

    def encode(backbone, loader, *arguments):
        calls.append(1)
        n = len(loader.dataset.images)
        return torch.rand(n, 4), torch.arange(n) % 3

    monkeypatch.setattr(train, "encode", encode)
    monkeypatch.setattr(train, "Network", TinyNetwork)
    monkeypatch.setattr(train, "augmented", lambda crops, args, step, device: [torch.rand(16, 3, 6, 6)] * 2)
    flags = "--epochs 250 --workers 0 --log-every 1000 --save-minutes 10".split()
    train.main([*TINY, *flags, "--data", str(photos), "--output", str(tmp_path)])
    assert len(calls) == 1 + 250 // 3 + 1  # every third epoch, the first and the last


def test_a_step_that_the_scaler_skips_changes_nothing(photos, tmp_path, monkeypatch):
    """float16: a first gradient that overflows must leave neither weights nor momentum behind."""
    scales, steps = [], set()
    scale, step = torch.amp.GradScaler.scale, torch.optim.SGD.step

    def overflow(self, loss):
        scales.append(1)
        return scale(self, loss) * (math.inf if len(scales) == 1 else 1)

    def count(self, *arguments, **options):
        steps.add(len(scales))
        return step(self)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflow)
    monkeypatch.setattr(torch.optim.SGD, "step", count)
    train.main(tiny(photos, tmp_path, "--precision float16 --max-steps 12"))
    saved = load(tmp_path / "checkpoint.pt")
    assert steps and 1 not in steps  # the first was skipped
    assert all(v.isfinite().all() for v in saved["network"].values())
    assert all(s["momentum_buffer"].isfinite().all() for s in saved["optimizer"]["state"].values())
    assert saved["scaler"]["scale"] < 2**16  # halved


def test_compile_makes_one_graph_for_training(photos, tmp_path, monkeypatch):
    """And none for the evaluation, which comes first with other batch sizes."""
    graphs, compiled = [], nn.Module.compile

    def backend(graph, example):
        graphs.append([tuple(x.shape) for x in example if x.shape[1:] == (3, 16, 16)])
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compiled(self, backend=backend, **options)
    )
    arguments = tiny(photos, tmp_path, "--max-steps 4")
    train.main([*arguments, "--compile", "--precision", "float32"])
    assert graphs == [[(16, 3, 16, 16)] * 2]


BAD = {
    "--gray 7": "--gray: 7 is not between 0 and 1",
    "--epochs 0": "--epochs: 0 is not between 1 and",
    "--workers -1": "--workers: -1 is not between 0",
    "--arch vgg16": "--arch: invalid choice: 'vgg16'",
    "--flag": "unrecognized arguments: --flag",
    "--warmup-epochs 9": "--epochs must exceed --warmup-epochs",
    "--view-sizes 16": "--view-sizes name two views or more",
    "--loss cwrgp --ema 0.9": "--ema: CW-RGP has no teacher",
    "--data nowhere": "--dataset folder needs --data FOLDER, and nowhere is none",
    "--dataset shapes": "--dataset shapes draws its own images",
    "--batch-size 64": "lower --batch-size 64",
    "--iterations 99": "iterations must be from 1 to 40",
    "--data empty": "empty",
}


@pytest.mark.parametrize("flags, message", BAD.items())
def test_bad_commands_name_what_is_wrong(flags, message, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty/train").mkdir(parents=True)
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as stopped:
        train.main([*TINY, "--data", str(photos), "--output", "run", "--workers", "0", *flags.split()])
    assert message in capsys.readouterr().err + str(stopped.value)
    assert not Path("run").exists()


class Malicious:
    def __reduce__(self):
        return os.system, ("touch harm",)


def test_what_was_saved_is_neither_trusted_nor_touched(finished, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    arguments = [*TINY, "--data", str(photos), "--output", "run", "--workers", "0", "--max-steps", "13"]
    whole = (finished[0] / "checkpoint.pt").read_bytes()
    torch.save({"config": Malicious()}, "harmful.pt")
    contents = {"damaged": whole[:1000], "malicious": Path("harmful.pt").read_bytes(), "another": whole}
    messages = {
        "damaged": "cannot be read",
        "malicious": "cannot be read",
        "another": r"seed 0 there, 1 here",
    }
    for kind, content in contents.items():
        Path("run/checkpoint.pt").write_bytes(content)
        with pytest.raises(SystemExit, match=f"run/checkpoint.pt.*{messages[kind]}"):
            train.main([*arguments, "--seed", "1"])
        assert Path("run/checkpoint.pt").read_bytes() == content and not Path("harm").exists()


def test_documented_commands_parse():
    """Every command of the README and of the scripts' own descriptions, by the scripts' parsers."""
    scripts = {"train.py": train, "linear_eval.py": linear_eval, "detect_transfer.py": detect_transfer}
    text = (HERE / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    described = [line for script in scripts.values() for line in script.__doc__.splitlines()]
    blocks += "\n" + "\n".join(line for line in described if re.match(r" +(python|torchrun) ", line))
    commands = [
        c.strip() for line in blocks.splitlines() for c in line.split("#")[0].split("&&") if c.strip()
    ]
    seen = set()
    for command in commands:
        words = shlex.split(command)
        at = [i for i, word in enumerate(words) if Path(word).name in (*scripts, "intl.py")]
        if at:
            name, arguments = Path(words[at[0]]).name, [w for w in words[at[0] + 1 :] if w != "&"]
            seen.add(name)
            assert name == "intl.py" and set(arguments[:1]) <= {"--plot"} or scripts[name].parse(arguments)
        else:
            known = ("python3", ".", "pip", "pytest", "trap", "wait", "PYTHONPATH=.", "tensorboard")
            assert words[0] in known, command
    assert seen == {"intl.py", *scripts}


def test_documented_python_runs(tmp_path, monkeypatch):
    """The README's two pieces, with small things in the place of the reader's own."""
    monkeypatch.chdir(tmp_path)
    loop, result = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    names = {
        "backbone": nn.Sequential(nn.Flatten(), nn.Linear(12, 512)),
        "loader": [torch.randn(2, 16, 3, 2, 2)],
    }
    exec(loop, names)
    assert {"alignment", "trace", "floor", "score", "least"} == set(names["criterion"].parts)
    Path("runs/imagenet").mkdir(parents=True)
    torch.save(train.build_backbone("resnet50", "imagenet")[0].state_dict(), "runs/imagenet/backbone.pt")
    names = {"torch": torch, "torchvision": torchvision}
    exec(result.replace("backbone.load", "found = backbone.load"), names)
    assert names["found"].missing_keys == ["fc.weight", "fc.bias"] and not names["found"].unexpected_keys


def test_named_tests_exist():
    """Those in [brackets] in the modules."""
    own = Path(__file__).read_text()
    for module in (intl, train, linear_eval, detect_transfer):
        for names in re.findall(r"\[(test_[^\]]*)\]", Path(module.__file__).read_text()):
            for name in re.split(r",\s*(?:# )?", names):
                assert f"def {name.strip()}(" in own, name


# --- Evaluation of anybody's backbone ----------------------------------------------------------------------


def published(state):
    """The same backbone as the publishers lay it out, with what has to be dropped."""

    def prefixed(prefix, *others):
        extra = {f"{prefix}fc.weight": torch.zeros(3, 512), f"{prefix}fc.bias": torch.zeros(3)}
        return {prefix + k: v for k, v in state.items()} | extra | {name: torch.zeros(2) for name in others}

    q = prefixed("module.encoder_q.", "module.queue", "module.queue_ptr")
    k = {name.replace("_q.", "_k."): value * 0 for name, value in q.items()}
    official = {"module.backbone." + name: value for name, value in state.items()}
    official |= {"module.projector.0.weight": torch.zeros(2)}
    return {
        "official INTL": {"epoch": 3, "arch": "resnet18", "optimizer": {}, "state_dict": official},
        "MoCo v1, v2": {"epoch": 3, "state_dict": k | q},
        "MoCo v3": {"state_dict": prefixed("module.base_encoder.", "module.predictor.0.weight")},
        "Barlow Twins": state | {"fc.weight": torch.zeros(3, 512)},
        "VICReg": {"model": prefixed("module.backbone.", "module.projector.0.weight")},
        "DINO": {
            "student": {},
            "teacher": prefixed("backbone.", "head.mlp.0.weight"),
            "args": argparse.Namespace(a=1),
        },
        "DINO, wrapped": {"teacher": prefixed("module.backbone.", "module.head.mlp.0.weight")},
        "SwAV": prefixed("module.", "module.projection_head.0.weight", "module.prototypes.weight"),
        "solo-learn": {"state_dict": prefixed("backbone.", "projector.0.weight", "classifier.weight")},
        "without counters": {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    }


def test_every_publishers_checkpoint_gives_the_features_of_the_bare_network(tmp_path, capsys):
    torch.manual_seed(0)
    network = train.build_backbone("resnet18", "imagenet")[0].eval()
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    for p in network.state_dict().values():
        p.add_(torch.rand_like(p) * 0.1 if p.is_floating_point() else 3)
    args = linear_eval.parse(["--checkpoint", str(tmp_path / "c.pt"), "--arch", "resnet18"])
    for name, content in published(network.state_dict()).items():
        torch.save(content, tmp_path / "c.pt")
        backbone, width, _ = linear_eval.read_backbone(args)
        assert torch.equal(backbone.eval()(x), network(x)) and width == 512, name
        assert "resnet18" in capsys.readouterr().out


def test_no_other_network_is_evaluated_than_the_files(tmp_path):
    """Nothing missing, no layer left over, another architecture, another stem, no weights, no file."""
    state, deeper = (
        train.build_backbone(arch, "imagenet")[0].state_dict() for arch in ("resnet18", "resnet34")
    )
    small = train.build_backbone("resnet18", "small")[0].state_dict()
    lacking = {k: v for k, v in state.items() if k != "layer3.0.conv1.weight"}
    cases = {
        "lacking": lacking,
        "deeper": deeper,
        "small": small,
        "list": [1, 2],
        "nothing": {"a": torch.zeros(2)},
    }
    for name, content in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
    for name in (*cases, "missing"):
        args = linear_eval.parse(["--checkpoint", str(tmp_path / f"{name}.pt"), "--arch", "resnet18"])
        with pytest.raises((SystemExit, RuntimeError)) as stopped:
            linear_eval.read_backbone(args)
        assert f"{name}.pt" in str(stopped.value) or "conv1.weight" in str(stopped.value), stopped.value


def test_the_official_stem_is_torchvisions():
    """Zero padding of 1 and a convolution with padding 2 = padding 3."""
    x, w = randn(1, 3, 20, 20), randn(4, 3, 7, 7)
    official = F.conv2d(F.pad(x, (1,) * 4), w, stride=2, padding=2)
    torch.testing.assert_close(official, F.conv2d(x, w, stride=2, padding=3))


def test_a_linear_head_is_as_good_as_logistic_regression():
    """By L-BFGS in float64 with the same weight decay, on features whose classes overlap."""
    centres, labels = randn(5, 20, seed=3), torch.arange(3000) % 5
    x = (centres[labels] + 1.5 * randn(3000, 20)).float()
    x, y, x_val, y_val = x[:2000], labels[:2000], x[2000:], labels[2000:]
    weight = torch.zeros(5, 21, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def logits(x):
        return x.double() @ weight[:, :20].T + weight[:, 20]

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(x), y) + 2.5e-6 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = 100 * (logits(x_val).argmax(1) == y_val).double().mean().item()
    assert 60 < expected < 95
    (own, top5), other = linear_eval.linear_on_features(x, y, x_val, y_val, [0.01, 0.1], 500, 0)
    assert abs(own - expected) <= 1 and abs(other[0] - expected) <= 1 and top5 == 100


def evaluate(arguments, monkeypatch):
    """linear_eval.main in this process; the backbone's tensors after it."""
    networks, build = [], linear_eval.build_backbone

    def spy(*arguments, **options):
        networks.append(build(*arguments, **options))
        return networks[-1]

    monkeypatch.setattr(linear_eval, "build_backbone", spy)
    linear_eval.main(list(map(str, arguments)))
    monkeypatch.setattr(linear_eval, "build_backbone", build)
    return networks[-1][0].state_dict()


def results_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_backbone_is_frozen_unless_it_is_fine_tuned(finished, photos, tmp_path, monkeypatch):
    options = ["--checkpoint", finished[0] / "checkpoint.pt", "--data", photos, "--output", tmp_path]
    options += "--epochs 2 --batch-size 16 --workers 0".split()
    before, weights = (finished[0] / "checkpoint.pt").read_bytes(), load(finished[0] / "backbone.pt")
    after = evaluate([*options, "--protocol", "linear", "features", "knn"], monkeypatch)
    assert all(torch.equal(weights[k], after[k]) for k in weights)
    tuned = evaluate([*options, "--protocol", "finetune"], monkeypatch)
    assert not any(
        torch.equal(weights[k], tuned[k]) for k in weights
    )  # weights, BN's statistics and counters
    rows = results_of(tmp_path)
    assert [row["protocol"] for row in rows] == ["features", "knn", "linear", "finetune"]
    assert all(row["images"] == [48, 15] for row in rows)
    assert (finished[0] / "checkpoint.pt").read_bytes() == before


def test_linear_classifiers_do_not_influence_each_other_and_resume(finished, photos, tmp_path, monkeypatch):
    """A classifier trained beside others, and stopped on its way, is bitwise the one trained alone."""
    options = ["--checkpoint", finished[0] / "checkpoint.pt", "--data", photos, "--protocol", "linear"]
    options += "--epochs 3 --batch-size 16 --workers 0 --save-minutes 0 --log-every 1".split()
    heads, validate = {}, linear_eval.validate

    def spy(model, *arguments):
        heads[len(model.heads)] = model.heads[-1].weight.detach().clone()
        return validate(model, *arguments)

    monkeypatch.setattr(linear_eval, "validate", spy)
    evaluate([*options, "--output", tmp_path / "alone", "--lr", "1"], monkeypatch)
    calls, factor = [], linear_eval.rate_factor

    def stop_in_the_second_epoch(*arguments):
        calls.append(1)
        if len(calls) > 10:  # two groups a step: after step 5
            raise KeyboardInterrupt
        return factor(*arguments)

    both = [*options, "--output", tmp_path / "both", "--lr", "0.1", "1"]
    monkeypatch.setattr(linear_eval, "rate_factor", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(both, monkeypatch)
    assert load(tmp_path / "both" / "linear.pt")["step"] == 5
    monkeypatch.setattr(linear_eval, "rate_factor", factor)
    with pytest.raises(SystemExit, match=r"linear.pt is of another run \(.*epochs 3 there, 4 here"):
        evaluate([*both, "--epochs", "4"], monkeypatch)
    evaluate(both, monkeypatch)
    assert torch.equal(heads[1], heads[2])
    alone, both = (results_of(tmp_path / name)[0]["results"] for name in ("alone", "both"))
    assert alone["learning rate 1"] == both["learning rate 1"]
    assert not (tmp_path / "both" / "linear.pt").exists()


def test_labelled_images_are_of_every_class_or_those_of_the_list(photos, tmp_path):
    images, _ = train.load_data("folder", photos, 0)
    for percent, each in ((1, 1), (10, 2), (100, 16)):
        rows = linear_eval.labelled_rows(images, percent, None, 0)
        assert images.targets[rows].bincount().tolist() == [each] * 3
    draws = [linear_eval.labelled_rows(images, 10, None, seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    (tmp_path / "list.txt").write_text("3.png\n11.png\n\n")
    rows = linear_eval.labelled_rows(images, 100, tmp_path / "list.txt", 0)
    assert sorted(Path(images.samples[i][0]).name for i in rows.tolist()) == ["11.png", "3.png"]
    (tmp_path / "list.txt").write_text("no such.png\n")
    with pytest.raises(SystemExit, match="list.txt"):
        linear_eval.labelled_rows(images, 100, tmp_path / "list.txt", 0)


def test_every_validation_image_counts_once_over_processes(tmp_path):
    """1,001 images on 1, 2 and 3 processes: the same top-1 of every protocol."""
    for split, n in (("train", 60), ("val", 1001)):
        for i in range(n):
            path = tmp_path / split / f"class {i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = torch.randint(0, 100, (3, 8, 8), generator=generator(i)).to(torch.uint8)
            image[i % 3] += 100 * (torch.rand(1, generator=generator(i)) < 0.8).byte()
            TF.to_pil_image(image).save(path)
    options = [
        "--random",
        "--arch",
        "resnet18",
        "--stem",
        "cifar",
        "--size",
        "8",
        "--data",
        tmp_path,
        "--lr",
        "5",
    ]
    options += "--protocol features knn linear --epochs 6 --batch-size 12".split()
    for processes in (0, 2, 3):
        output = ["--output", tmp_path / str(processes), "--workers", "0"]
        run = run_script("linear_eval.py", *options, *output, processes=processes)
        assert run.returncode == 0, run.stderr
    one, two, three = ([row["results"] for row in results_of(tmp_path / str(p))] for p in (0, 2, 3))
    assert one == two == three and len(one) == 3
    count = one[2]["learning rate 5"][0] * 1001 / 100
    assert count == pytest.approx(round(count), abs=1e-3) and count > 800


# --- Detection ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """6 training and 11 validation scenes in COCO's format."""
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("scenes")
    detect_transfer.write_shapes(folder, 0, {"train": 6, "val": 11})
    return folder


def coco(folder, split="val"):
    return detect_transfer.CocoImages(folder, split, split == "train", 0)


SMALL = """--short-sides 64 --test-short-side 64 --long-side 128 --train-proposals 50 10 --rois 8 --images 8
    --test-proposals 50 5 --detections 5 --batch-size 2 --warmup-images 2 --log-every 1 --workers 0"""
SMALL = [*SMALL.split(), "--save-minutes", "0"]


def detector(finished, *flags):
    """The detector of these flags on the tiny run's backbone, for 3 categories, and the backbone's
    tensors."""
    args = detect_transfer.parse([*SMALL, "--checkpoint", str(finished[0] / "checkpoint.pt"), *flags])
    options = {"norm_layer": detect_transfer.FrozenBatchNorm2d} if args.norm == "frozen" else {}
    resnet, width, config = linear_eval.read_backbone(args, **options)
    state = {k: v.clone() for k, v in resnet.state_dict().items()}
    torch.manual_seed(0)
    return detect_transfer.build_detector(args, resnet, width, config, 4, True), state


def example():
    image = torch.rand(3, 70, 90, generator=generator(0))
    masks = torch.zeros(2, 70, 90, dtype=torch.uint8)
    masks[0, 10:40, 10:50] = masks[1, 30:60, 40:80] = 1
    boxes = torch.tensor([[10.0, 10, 50, 40], [40, 30, 80, 60]])
    return image, {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}


def backbone_part(model):
    """Its tensors under torchvision's names."""
    if hasattr(model.backbone, "body"):
        return dict(model.backbone.body.state_dict())
    res5 = model.roi_heads.box_head[0].state_dict()
    return model.backbone.state_dict() | {f"layer4.{k}": v for k, v in res5.items()}


@pytest.mark.parametrize("norm", ["bn", "frozen"])
@pytest.mark.parametrize("model", ["c4", "fpn"])
def test_the_detector_has_the_backbones_weights_and_moves_all_but_frozen_norms(model, norm, finished):
    anchors = "--anchors 8 16 32 64 128".split() if model == "fpn" else []
    network, state = detector(finished, "--model", model, "--norm", norm, *anchors)
    part = backbone_part(network)
    assert set(part) == set(state) and all(torch.equal(state[k], part[k]) for k in part)
    image, target = example()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01)
    sum(network.train()([image], [target])[k] for k in ("loss_classifier", "loss_mask")).backward()
    optimizer.step()
    for k, v in backbone_part(network).items():
        assert torch.equal(v, state[k]) == (norm == "frozen" and bool(re.search(r"bn|downsample.1", k))), k


def test_c4_equals_an_independent_computation(finished):
    """Boxes' and masks' logits from the checkpoint's tensors: trunk, RoIAlign, res5, BN, pooling,
    predictors."""
    network, state = detector(finished)
    network.eval()
    for parameter in network.roi_heads.box_predictor.parameters():
        parameter.data *= 1e-3  # hardly trained networks move boxes out of the image
    seen = {}
    for name in ("box_predictor", "mask_predictor", "box_roi_pool"):
        hook = lambda _, inputs, output, name=name: seen.setdefault(name, []).append((inputs, output))
        getattr(network.roi_heads, name).register_forward_hook(hook)
    x = randn(1, 3, 64, 96, dtype=torch.float32)
    network([x[0]])
    resnet = torchvision.models.resnet18()
    resnet.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    resnet.load_state_dict(state, strict=False)
    resnet.eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    h = (x - mean[:, None, None]) / std[:, None, None]
    parts = (
        resnet.conv1,
        resnet.bn1,
        resnet.relu,
        resnet.maxpool,
        resnet.layer1,
        resnet.layer2,
        resnet.layer3,
    )
    for part in parts:
        h = part(h)
    for (inputs, _), kind in zip(seen["box_roi_pool"], ("box_predictor", "mask_predictor")):
        rois = torchvision.ops.roi_align(h, inputs[1], 14, 1 / 16, 0, aligned=True)
        shared = resnet.layer4(rois) / (1 + 1e-5) ** 0.5
        if kind == "box_predictor":
            predictor, pooled = network.roi_heads.box_predictor[1], shared.mean((2, 3))
            for layer, got in zip((predictor.cls_score, predictor.bbox_pred), seen[kind][0][1]):
                torch.testing.assert_close(got, pooled @ layer.weight.T + layer.bias, rtol=1e-5, atol=1e-5)
        else:
            predictor = network.roi_heads.mask_predictor
            up = F.conv_transpose2d(
                shared, predictor.conv5_mask.weight, predictor.conv5_mask.bias, stride=2
            ).relu()
            expected = F.conv2d(up, predictor.mask_fcn_logits.weight, predictor.mask_fcn_logits.bias)
            torch.testing.assert_close(seen[kind][0][1], expected, rtol=1e-5, atol=1e-5)
            assert len(expected) > 0


def test_c4_training_runs_res5_once_and_has_the_published_losses(finished, monkeypatch):
    """Against torchvision's own heads, with L1 in the place of its smooth L1. Those run res5 twice."""
    network, _ = detector(finished)
    heads = network.roi_heads
    heads.box_head[1] = nn.Identity()  # BN would see different regions in the two
    heads.box_head.eval()
    image, target = example()
    features = network.backbone(image[None])
    calls = []
    heads.box_head.register_forward_hook(lambda *_: calls.append(1))
    proposals = [torch.cat([target["boxes"] + 2, torch.tensor([[0.0, 0, 30, 30], [50, 5, 90, 30]])])]
    torch.manual_seed(1)
    _, mine = heads(features, proposals, [(70, 90)], [target])
    assert len(calls) == 1
    theirs = torchvision.models.detection.roi_heads
    l1 = lambda a, b, beta, reduction: F.l1_loss(a, b, reduction=reduction)
    crop = lambda m, b, i, size: detect_transfer.crop_masks(m[i].clone(), b, size)
    monkeypatch.setattr(theirs.F, "smooth_l1_loss", l1)
    monkeypatch.setattr(theirs, "project_masks_on_boxes", crop)
    torch.manual_seed(1)
    _, expected = theirs.RoIHeads.forward(heads, features, proposals, [(70, 90)], [target])
    assert mine.keys() == expected.keys() == {"loss_classifier", "loss_box_reg", "loss_mask"}
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value)


def test_proposals_have_the_published_loss(finished):
    network, _ = detector(finished)
    labels, targets = [torch.tensor([1.0, 0, -1, 1, 0])], [randn(5, 4, dtype=torch.float32)]
    objectness, deltas = randn(5, 1, seed=1, dtype=torch.float32), randn(5, 4, seed=2, dtype=torch.float32)
    mine = network.rpn.compute_loss(objectness, deltas, labels, targets)
    used = torch.tensor([0, 1, 3, 4])
    box = (deltas - targets[0])[[0, 3]].abs().sum() / 4
    expected = F.binary_cross_entropy_with_logits(objectness[used, 0], labels[0][used]), box
    torch.testing.assert_close(mine, expected)


def as_found(data, change=lambda target: target):
    """The annotations of a data set as if a network had found them, by predict itself."""
    found = [data[0, i][1] for i in range(len(data))]
    queue = iter(change(target | {"scores": torch.ones(len(target["labels"]))}) for target in found)
    model = nn.Identity()
    model.forward = lambda images: [next(queue)]
    model.transform = argparse.Namespace(min_size=(64,))
    loader = [data[0, i] for i in range(len(data))]
    return detect_transfer.predict(model, data, loader, 64, torch.device("cpu"))


def test_masks_survive_the_way_through_their_boxes(scenes, tmp_path):
    """Cropped to 28 x 28 and pasted back the drawn masks lose little; displaced by half a pixel they lose 5
    AP."""
    data, ap = coco(scenes), []
    for shift in (0, 0.7):

        def change(target, shift=shift):
            height, width = target["masks"].shape[1:]
            crops = detect_transfer.crop_masks(target["masks"], target["boxes"], 28)[:, None]
            pasted = detect_transfer.paste_masks(crops, target["boxes"] + shift, height, width)
            return target | {"masks": pasted}

        ap.append(detect_transfer.average_precision(data, as_found(data, change), tmp_path)["mask AP"])
    assert ap[0] > 93 and ap[1] < ap[0] - 5, ap


def test_ground_truth_has_an_ap_of_100(scenes, tmp_path):
    data = coco(scenes)
    ap = detect_transfer.average_precision(data, as_found(data), tmp_path)
    assert [ap[f"{kind} {name}"] for kind in ("box", "mask") for name in ("AP", "AP50")] == pytest.approx(
        [100] * 4
    )


PENNFUDAN = HERE.parent / "shared" / "data" / "pennfudan"


@pytest.mark.skipif(not PENNFUDAN.exists(), reason="Penn-Fudan is not beside the checkout")
@pytest.mark.parametrize("outlines", ["", "_poly"])  # run lengths, polygons
def test_ground_truth_of_photographs_has_an_ap_of_100(outlines, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").symlink_to(PENNFUDAN / "images")
    file = f"annotations/instances_val{outlines}.json"
    shutil.copy(PENNFUDAN / file, tmp_path / "annotations" / "instances_val.json")
    data = coco(tmp_path)
    ap = detect_transfer.average_precision(data, as_found(data), tmp_path)
    assert ap["box AP"] == pytest.approx(100) and ap["mask AP"] == pytest.approx(100)


def test_ap_is_pycocotools_on_the_written_results(scenes, tmp_path):
    """Of halved masks and displaced boxes with random scores."""
    data = coco(scenes)

    def change(target):
        g = generator(int(target["image_id"]))
        masks = target["masks"].clone()
        masks[::3, :, : masks.shape[2] // 2] = 0
        boxes = target["boxes"] + 4 * torch.rand(target["boxes"].shape, generator=g)
        return target | {"masks": masks, "boxes": boxes, "scores": torch.rand(len(boxes), generator=g)}

    ap = detect_transfer.average_precision(data, as_found(data, change), tmp_path)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        truths = pycocotools.coco.COCO(scenes / "annotations" / "instances_val.json")
        found = truths.loadRes(str(tmp_path / f"results_{kind}.json"))
        evaluation = pycocotools.cocoeval.COCOeval(truths, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        got = [ap[f"{name} {which}"] for which in ("AP", "AP50", "AP75")]
        assert got == pytest.approx(list(100 * evaluation.stats[:3])) and 5 < got[0] < 95
    assert detect_transfer.average_precision(data, [], tmp_path)["box AP"] == 0


def test_detections_do_not_depend_on_the_number_of_processes(finished, scenes, tmp_path):
    """The detector of one short run evaluates 11 images on 1 and 2 processes: the same results."""
    flags = [*SMALL, "--data", scenes, "--checkpoint", finished[0] / "checkpoint.pt"]
    flags += "--base-lr 0.02 --evaluations 1 --images 4".split()
    files = []
    for processes in (0, 2):
        output = tmp_path / str(processes)
        script = tmp_path / "untrained.py"
        script.write_text(UNTRAINED)
        run = run_script(script, *flags, "--output", output, processes=processes)
        assert run.returncode == 0, run.stderr
        files.append([json.loads((output / f"results_{kind}.json").read_text()) for kind in ("bbox", "segm")])
    assert files[0] == files[1] and len(files[0][0]) > 11
    assert (tmp_path / "0" / "predictions.png").stat().st_size > 10_000


UNTRAINED = """
import sys, torch, detect_transfer
detect_transfer.learning_rate = lambda step, args: 0.0
torch.nn.BatchNorm2d.momentum = property(lambda self: 0.0, lambda self, value: None)
if __name__ == "__main__":
    detect_transfer.main(sys.argv[1:])
"""


@pytest.mark.parametrize("flags", ["", "--model fpn --anchors 8 16 32 64 128"])
def test_a_stopped_detection_run_ends_bitwise_like_an_undisturbed_one(flags, finished, scenes, tmp_path):
    checkpoint = ["--data", str(scenes), "--checkpoint", str(finished[0] / "checkpoint.pt")]
    flags = [*SMALL, *flags.split(), *checkpoint, "--output"]
    detect_transfer.main([*flags, str(tmp_path / "whole")])
    detect_transfer.main([*flags, str(tmp_path / "halves"), "--max-steps", "2"])
    detect_transfer.main([*flags, str(tmp_path / "halves")])
    assert [line["step"] for line in log_of(tmp_path / "halves") if "loss" in line] == [1, 2, 3, 4]
    whole, halves = (load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "halves"))
    assert all(torch.equal(v, halves[k]) for k, v in whole.items())
    with pytest.raises(SystemExit, match="base_lr .* there, 0.5 here"):
        detect_transfer.main([*flags, str(tmp_path / "halves"), "--base-lr", "0.5"])


def test_detection_schedule_is_the_published_one():
    """180,000 steps of 16 images at 0.02, a tenth from 120,000 and again from 160,000; half of it for 1x."""
    args = detect_transfer.parse(["--recipe", "coco-2x", "--data", "."])
    rates = {
        0: 0.00002,
        500: 0.01001,
        1000: 0.02,
        119_999: 0.02,
        120_000: 0.002,
        160_000: 0.0002,
        179_999: 0.0002,
    }
    for step, rate in rates.items():
        assert detect_transfer.learning_rate(step, args) == pytest.approx(rate, rel=1e-4)
    half = detect_transfer.parse(["--recipe", "coco-1x", "--data", "."])
    assert args.images == 16 * 180_000 and half.images == 16 * 90_000
    args = detect_transfer.parse("--recipe coco-2x --data . --batch-size 2".split())
    assert detect_transfer.learning_rate(8 * 100_000, args) == pytest.approx(0.02 / 8)


def test_coco_images_of_every_kind(tmp_path):
    """Polygons and both run lengths, crowds and slivers left out, category ids with gaps, ids from 0, empty
    images."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images" / "train").mkdir(parents=True)
    for i in range(3):
        TF.to_pil_image(pictures(10)[i]).save(tmp_path / "images" / "train" / f"{i}.png")
    square = torch.zeros(10, 10, dtype=torch.uint8)
    square[2:6, 1:4] = 1
    outlines = [[[1, 2, 4, 2, 4, 6, 1, 6]], detect_transfer.encode_mask(square.bool())]
    outlines.append({"size": [10, 10], "counts": [12, 4, 6, 4, 6, 4, 64]})
    own = lambda i, **more: (
        {"id": i, "image_id": 0, "category_id": 7, "bbox": [1, 2, 3, 4], "area": 12} | more
    )
    annotations = [own(i, segmentation=o) for i, o in enumerate(outlines)]
    annotations += [
        own(3, iscrowd=1, segmentation=outlines[1]),
        own(4, bbox=[9.5, 2, 3, 4], segmentation=outlines[1]),
    ]
    annotations.append(own(5, image_id=1, category_id=3, segmentation=outlines[0]))
    images = [{"id": i, "file_name": f"{i}.png", "height": 10, "width": 10} for i in range(3)]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c, "name": "x"} for c in (3, 7)],
    }
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(content))
    data = coco(tmp_path, "train")
    assert len(data) == 2 and data.masks  # the third image has no objects
    flipped = set()
    for epoch in range(20):
        image, target = data[epoch, 0]
        left = torch.equal(image, train.decode(str(tmp_path / "images/train/0.png")))
        flipped.add(left)
        x = [1.0, 2, 4, 6] if left else [6.0, 2, 9, 6]
        assert target["boxes"].tolist() == [x] * 3 and target["labels"].tolist() == [2] * 3
        assert all(torch.equal(m, square if left else square.flip(-1)) for m in target["masks"])
    assert flipped == {True, False} and data[0, 1][1]["labels"].tolist() == [1]
    file.write_text(json.dumps(content | {"annotations": [own(0)]}))
    assert not coco(tmp_path, "train").masks  # boxes alone train
    for broken in ("{", json.dumps({"images": images})):
        file.write_text(broken)
        with pytest.raises(SystemExit, match="instances_train2017.json is no COCO annotation file"):
            coco(tmp_path, "train")
    with pytest.raises(SystemExit, match="instances_val"):
        coco(tmp_path, "val")


# --- GPU ---------------------------------------------------------------------------------------------------

FLAGS = ["", "--precision float16", "--compile", "--ema 0.9 --view-sizes 16 16 12 --solarize 0.1"]


@needs_gpu
@pytest.mark.parametrize("flags", FLAGS)
def test_gpu_takes_steps_and_resumes(flags, photos, tmp_path, capsys):
    arguments = [*TINY, "--data", str(photos), "--output", str(tmp_path), "--device", "cuda", *flags.split()]
    train.main([*arguments, "--max-steps", "4"])
    train.main([*arguments, "--max-steps", "6"])
    assert "from 4, by 1 cuda" in capsys.readouterr().out


@needs_gpu
def test_gpu_input_and_step_never_wait_for_the_device(photos, tmp_path, monkeypatch):
    augmented = train.augmented

    def strict(views, args, step, device):
        torch.cuda.set_sync_debug_mode("error" if step in (3, 4) else "default")  # until the next input
        return augmented(views, args, step, device)

    monkeypatch.setattr(train, "augmented", strict)
    arguments = [*TINY, "--data", str(photos), "--output", str(tmp_path), "--device", "cuda"]
    train.main(
        [*arguments, "--log-every", "100", "--epochs", "100", "--max-steps", "8", "--save-minutes", "10"]
    )
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_gpu_detects_and_evaluates(finished, photos, scenes, tmp_path):
    checkpoint = ["--checkpoint", str(finished[0] / "checkpoint.pt"), "--device", "cuda"]
    detect_transfer.main(
        [*SMALL, *checkpoint, "--data", str(scenes), "--output", str(tmp_path / "detection")]
    )
    flags = ["--data", str(photos), "--epochs", "2", "--batch-size", "16", "--output", str(tmp_path)]
    linear_eval.main([*checkpoint, *flags, "--protocol", "features", "knn", "linear", "finetune"])
    assert len(results_of(tmp_path)) == 4


@needs_gpu
@pytest.mark.parametrize("axis", AXES)
def test_gpu_loss_equals_cpu_loss(axis):
    z = randn(2, 32, 48, dtype=torch.float32)
    cpu, gpu = INTLLoss(axis=axis)(z), INTLLoss(axis=axis)(z.cuda())
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-4, atol=1e-5)
    with torch.autocast("cuda", torch.float16):
        torch.testing.assert_close(INTLLoss(axis=axis)(z.cuda()).cpu(), cpu, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_gpu_views_and_neighbours_equal_the_cpus():
    args = train.parse("--batch-size 24 --view-sizes 32 32 --blur 0.5".split())
    views = [pictures(), pictures()]
    for a, b in zip(*(train.augmented(views, args, 3, torch.device(d)) for d in ("cpu", "cuda"))):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)
    bank, labels, queries = (
        randn(500, 8, dtype=torch.float32),
        torch.arange(500) % 4,
        randn(90, 8, dtype=torch.float32),
    )
    data = bank, labels, queries + 0.1, labels[:90]
    assert train.knn_top1(*data, 5) == train.knn_top1(*[t.cuda() for t in data], 5)
