"""Every test. `pytest test_intl.py` needs no data, no GPU and no network.

Numbers are compared with independent sources: eigendecompositions in float64, the scalar Newton map, values computed
once with the official release, torchvision's per-image functions, one process instead of several.
"""

import argparse
import colorsys
import dataclasses
import importlib.util
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

import PIL.Image
import pycocotools.coco
import pycocotools.cocoeval
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd import gradcheck
from torchvision.transforms.v2 import functional as TF

import detect_transfer
import intl
import linear_eval
import train
from intl import (
    INTLLoss,
    condition_number,
    effective_rank,
    iter_norm,
    newton_map,
    spectral_transform,
    spectrum,
    trace_loss,
    whiten,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The image .*coding capabilities:DeprecationWarning"),  # torchvision's
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools'
]
HERE = Path(__file__).parent
AXES = ("channel", "batch")


def load(path):
    return torch.load(path, weights_only=True)


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
        lambda z: INTLLoss(axis=axis)([z], teacher=randn(m, d, seed=7)),
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
        got = torch.linalg.eigvalsh(covariance(iter_norm(z, iterations=iterations, axis=axis).double(), axis))
        assert (got - expected).abs().max() < 1e-3


def test_the_uncoupled_form_explodes():
    z = randn(256, 64, dtype=torch.float32)
    S = covariance(z, "channel")
    N, P = S / S.trace(), torch.eye(256)
    l, U = torch.linalg.eigh(N.double())
    exact = U @ (scalar_iter_norm(l, 15) * l.sum().sqrt()).diag() @ U.T
    for _ in range(15):
        P = 1.5 * P - 0.5 * P @ P @ P @ N
    assert not (P - exact).norm() < exact.norm()


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
def test_loss_equals_its_definition(views, m, d, axis):
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


@pytest.mark.parametrize("axis, m, d", [("channel", 6, 9), ("batch", 9, 6)])
def test_parts_at_an_equal_spectrum_and_at_a_collapse(axis, m, d):
    q = torch.linalg.qr(torch.cat([torch.ones(9, 1, dtype=torch.float64), randn(9, 6)], 1))[0][:, 1:]  # centred columns
    equal, line, loss = (q.T if axis == "channel" else q), randn(m, 1) * randn(1, d, seed=1), INTLLoss(axis=axis)
    for arguments in ([[equal, equal]], [[equal], line]):  # a teacher's view does not count
        loss(*arguments)
        assert loss.parts["score"].item() == pytest.approx(1)
        assert loss.parts["trace"].item() == pytest.approx(loss.parts["floor"])
        assert loss.parts["floor"] == intl.trace_floor(6, 4)
    loss([line, line])
    assert loss.parts["score"].item() == pytest.approx(loss.parts["least"]) and loss.parts["alignment"].item() < 1e-9


# Computed once in float64 with the official release (winci-ai/INTL, commit 0aa69af), run in one process on `official_views`:
# loss, its momentum form, norm of the gradient, one entry of it, trace loss of every view.
# fmt: off
OFFICIAL = [  # axis, views, m, d, iterations, values
    ("channel", 2, 8, 5, 4,
        [2.089111207159423, 2.089111207159423, 0.685797221896301, -0.03031701953065581, 2.341619928879392,
         2.7860090033599656]),
    ("batch", 2, 8, 5, 4,
        [2.005871792282227, 2.0062706621879896, 0.8918259988170488, -0.06378662004124508, 0.058824131003669386,
         0.32264142920848166]),
    ("channel", 2, 6, 16, 4,
        [2.2470518258330734, 2.2471713514484755, 0.3858647459630053, -0.002890241786796948, 0.02879875086228748,
         0.1215160913919584]),
    ("batch", 2, 6, 16, 4,
        [2.0109425113810007, 1.9301884322600364, 0.43681376935015387, 0.0011223117282641946, 8.075407912096429,
         8.007177498311913]),
    ("channel", 2, 7, 7, 1,
        [2.0779861830249997, 2.0852564054428755, 0.7450726573376574, -0.029193422079902547, 3.7738947164015775,
         3.9465418979197007]),
    ("batch", 2, 16, 4, 7,
        [1.8768154965317667, 1.8768154965317667, 0.5615442368460691, -0.05064526559534356, 0.0, 0.0]),
    ("channel", 4, 9, 12, 4,
        [2.159325566685036, 2.1576662310962926, 0.29089840094631825, 0.013173071556401803, 0.9765105632831865,
         1.1173281923947391, 2.502115239204826, 0.7758496671305604]),
]
# fmt: on


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


# ------------------------------------------------------------------------------------------------------------------
# Bad numbers, bad shapes, half precision, compilation, a lone copy


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
    losses = [INTLLoss(axis=axis), train.SpectralLoss(0.5, axis)] + ([intl.CWRGPLoss(groups=2)] if axis == "channel" else [])

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
def test_compiles_without_a_graph_break(axis):
    z = randn(2, 8, 12, dtype=torch.float32)
    loss = INTLLoss(axis=axis)
    expected, parts = value_and_gradient(loss, z), dict(loss.parts)
    for got, value in zip(value_and_gradient(torch.compile(loss, backend="aot_eager", fullgraph=True), z), expected):
        torch.testing.assert_close(got, value)
    torch.testing.assert_close(dict(loss.parts), parts)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: INTLLoss()([randn(8, 4)]), r"two or more views .*\[\(8, 4\)\]"),
        (lambda: INTLLoss()(randn(8, 4), randn(8, 4)), r"a list of two or more views .*\[\(8, 4\), \(4,\), \(4,\)\]$"),
        (lambda: INTLLoss()([randn(8, 4), randn(8, 5)]), r"one shape .*\(8, 4\), \(8, 5\)"),
        (lambda: INTLLoss()([randn(8, 4)], teacher=randn(6, 4)), r"one shape .*\(6, 4\), \(8, 4\)"),
        (lambda: INTLLoss()([randn(1, 4)] * 2), r"at least 2 samples.*\(1, 4\)"),
        (lambda: INTLLoss(axis="rows")(randn(2, 8, 4)), "axis must be .*'rows'"),
        (lambda: INTLLoss(iterations=0)(randn(2, 8, 4)), "between 1 and 40.*0"),
        (lambda: iter_norm(randn(4)), r"\(m, d\) or \(V, m, d\), got torch.float64 \(4,\)"),
        (lambda: iter_norm(torch.ones(4, 4, dtype=torch.int64)), "floating-point"),
        (lambda: spectral_transform(randn(8, 4), lambda l: l.sum()), "as many scales"),
        (lambda: intl.group_whiten(randn(8, 32), 4), r"larger than m, got \(m, d\) = \(8, 32\) and groups = 4"),
        (lambda: intl.group_whiten(randn(8, 32), 3), "groups must divide d"),
        (lambda: intl.group_whiten(randn(8, 32), 2, torch.arange(30)), r"shape \(32,\), got \(30,\)"),
        (lambda: intl.group_whiten(randn(8, 32), 2, torch.zeros(32, dtype=torch.int64)), "from 0 to 31 once"),
        (lambda: intl.CWRGPLoss(groups=2, sub_batch=3)(randn(2, 8, 32)), "divide the global batch of 8 rows, got 3"),
        (lambda: intl.orthogonality_penalty(nn.ReLU()), "ReLU has no Conv2d or Linear weight"),
        (lambda: intl.orthogonality_penalty(nn.Linear(2, 2), "frobenius"), "'frobenius'"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_lone_copy_trains(tmp_path):
    (tmp_path / "intl.py").write_text((HERE / "intl.py").read_text())
    (tmp_path / "run.py").write_text(
        """
import sys
for name in ("torchvision", "numpy", "train", "matplotlib", "tensorboard", "pycocotools"):
    sys.modules[name] = None  # importing it raises ImportError
import torch, intl
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
optimizer, loss = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), intl.INTLLoss()
values = []
for step in range(60):
    x = torch.randn(64, 16)
    value = loss([net(x + 0.1 * torch.randn_like(x)) for _ in range(2)])
    optimizer.zero_grad(); value.backward(); optimizer.step()
    values.append(value.item())
assert intl.__file__.startswith(sys.argv[1]), intl.__file__
assert sum(values[-10:]) < sum(values[:10]) - 0.5, values
"""
    )
    subprocess.run([sys.executable, "run.py", str(tmp_path)], cwd=tmp_path, check=True, timeout=120)


# ------------------------------------------------------------------------------------------------------------------
# CW-RGP, orthogonality, diagnostics, the demonstration


def test_group_whitening_whitens_every_group():
    m, d, groups = 6, 40, 4
    order = torch.randperm(d, generator=torch.Generator().manual_seed(3))
    z = randn(m, d)
    z_hat = intl.group_whiten(z, groups, order)
    for part in z_hat[:, order].split(d // groups, dim=1):  # not centred again within a group
        torch.testing.assert_close(part @ part.T / (d // groups - 1), torch.eye(m, dtype=z.dtype))
    assert gradcheck(lambda z: intl.group_whiten(z, groups, order), z.requires_grad_())


def test_cw_rgp_loss_compares_all_pairs_in_sub_batches():
    z = randn(3, 8, 32)
    torch.manual_seed(5)
    loss = intl.CWRGPLoss(groups=2, sub_batch=4)(z)
    torch.manual_seed(5)
    orders = [torch.randperm(32) for _ in range(3)]
    white = [torch.cat([intl.group_whiten(half, 2, o) for half in v.split(4)]) for v, o in zip(z, orders)]
    cosines = [F.cosine_similarity(white[a], white[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(loss, 2 - 2 * torch.stack(cosines).mean())


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 2), nn.Conv2d(2, 12, 2), nn.Linear(7, 4), nn.Linear(4, 7)])
def test_orthogonality_penalty(layer):
    layer = layer.double()
    W = layer.weight.detach().flatten(1)
    s = torch.linalg.svdvals(W)  # G = W W^T - I or W^T W - I has the eigenvalues s^2 - 1
    so, srip = ((s**2 - 1) ** 2).sum(), (s**2 - 1).abs().max()
    torch.testing.assert_close(intl.orthogonality_penalty(layer), so)
    torch.testing.assert_close(intl.orthogonality_penalty(layer, "srip", power_iterations=2000), srip)
    bounds = [intl.orthogonality_penalty(layer, "srip", power_iterations=n).item() for n in (0, 1, 5, 25)]
    assert bounds == sorted(bounds) and bounds[-1] <= srip + 1e-12
    both = nn.Sequential(layer, nn.BatchNorm1d(3), nn.Sequential(layer))  # BN has no matrix; a shared layer counts once
    torch.testing.assert_close(intl.orthogonality_penalty(both), so)
    for kind in ("so", "srip"):

        def penalty(weight, kind=kind):
            return torch.func.functional_call(Penalty(layer, kind), {"layer.weight": weight}, ())

        assert gradcheck(penalty, layer.weight.detach().clone().requires_grad_())


class Penalty(nn.Module):
    def __init__(self, layer, kind):
        super().__init__()
        self.layer, self.kind = layer, kind

    def forward(self):
        return intl.orthogonality_penalty(self, self.kind)


def test_diagnostics_of_a_known_spectrum():
    l = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    q = torch.linalg.qr(torch.cat([torch.ones(50, 1, dtype=torch.float64), randn(50, 5)], 1))[0][:, 1:]  # centred columns
    z = q * (49 * l).sqrt() @ torch.linalg.qr(randn(5, 5))[0] + 3
    torch.testing.assert_close(spectrum(z), l)
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert effective_rank(z).item() == pytest.approx(math.exp(entropy))
    assert condition_number(z).item() == pytest.approx(4)
    torch.testing.assert_close(spectrum(torch.stack([z, 2 * z])), torch.stack([l, 4 * l]))
    assert spectrum(randn(4, 9)).shape == (4,)


def test_demonstration():
    """The paper's order: no transformation and IterNorm alone lose rank, whitening keeps more, INTL keeps nearly all."""
    ranks = {name: rank for name, (rank, _) in intl.demonstrate(steps=200).items()}
    assert max(ranks["no transform"], ranks["IterNorm alone, T = 4"], ranks["power 0.2"]) < 16
    assert ranks["power 0.5, whitening"] > 1.5 * ranks["power 0.2"]
    assert ranks["INTL, T = 4"] > 48


def test_benchmark_runs(capsys):
    intl.benchmark(sizes=((8, 16),), rounds=1)
    assert "VICReg" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------
# Several processes


def torchrun(processes, *arguments, timeout=300, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(a) for a in arguments]  # torchrun's own options first
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, **kwargs)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE)}

GRADIENTS = """
import sys, torch, torch.distributed as dist
from intl import INTLLoss, CWRGPLoss, gather
from train import SpectralLoss

def gradients(rank, world, wrap):
    z = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    results = {}
    losses = {"batch": INTLLoss(axis="batch"), "channel": INTLLoss(), "few rows": INTLLoss(), "whiten": SpectralLoss(0.4, "batch")}
    losses["cwrgp"] = CWRGPLoss(groups=2, sub_batch=6)
    for name, loss in losses.items():
        for teacher in (False, True) if name != "cwrgp" else (False,):
            torch.manual_seed(1)
            out = {"few rows": 30, "cwrgp": 16}.get(name, 10)
            net = wrap(torch.nn.Linear(8, out).double())
            z_net = net(z[:, share])
            torch.manual_seed(2 + rank)  # CW-RGP's permutations are the first process's
            value = loss(list(z_net[1:]), z_net[0]) if teacher else loss(list(z_net))
            value.backward()
            results[name, teacher] = [value.detach(), *[p.grad for p in net.parameters()]]
    return results

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    everything = gather(rows)
    (everything * torch.arange(2.0 * world)[:, None]).sum().backward()
    assert everything[:, 0].tolist() == [r // 2 for r in range(2 * world)]
    assert rows.grad[:, 0].tolist() == [2 * rank, 2 * rank + 1]
    torch.save(gradients(rank, world, torch.nn.parallel.DistributedDataParallel), f"{sys.argv[1]}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_gradient_over_processes_equals_one_process(processes, tmp_path):
    """DistributedDataParallel's averaged gradient, both axes, with and without teacher, all losses."""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    run = torchrun(processes, script, tmp_path)
    assert run.returncode == 0, run.stderr
    namespace = {"__name__": "gradients"}
    exec(GRADIENTS, namespace)
    expected = namespace["gradients"](0, 1, lambda net: net)
    for rank in range(processes):
        for case, values in load(tmp_path / f"{rank}.pt").items():
            for got, value in zip(values, expected[case]):
                torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12, msg=lambda m, case=case: f"{case}: {m}")


# ------------------------------------------------------------------------------------------------------------------
# Data and augmentation


def test_shapes_depend_on_seed_and_index_alone():
    images, labels = train.draw_shapes(0, range(20))
    again, _ = train.draw_shapes(0, range(5, 7))
    assert torch.equal(again, images[5:7]) and labels.tolist() == [i % 8 for i in range(20)]
    assert not torch.equal(train.draw_shapes(1, range(20))[0], images)


def test_shapes_colour_tells_nothing():
    """Chance is 12.5 %; the standard error of 1,000 images is 1 point."""
    images, labels = train.draw_shapes(0, range(4000))
    queries, expected = train.draw_shapes(0, range(1_000_000, 1_001_000))
    for feature in (lambda x: x.float().mean((2, 3)), lambda x: x.float().mean((1, 2, 3))[:, None]):
        distances, indices = train.nearest(feature(images), feature(queries), 5, torch.device("cpu"))
        assert train.knn_accuracy(distances, labels[indices], expected) < 12.5 + 4


def test_shapes_have_equal_areas():
    y, x = torch.meshgrid(*[torch.linspace(-2, 2, 401)] * 2, indexing="ij")
    areas = torch.stack([(train.shape_level(k, x, y) > 0).float().mean() * 16 for k in range(8)])
    assert areas.max() < 1.05 * areas.min()


def pictures(size=32, n=24):
    """Smooth random images and pure noise, uint8."""
    noise = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    smooth = TF.resize(noise[: n // 2, :, :5, :5], [size, size], antialias=True)
    return torch.cat([smooth, noise[n // 2 :]])


def assert_same_picture(got, expected):
    difference = (got * 255 - expected.float()).abs()
    assert difference.max() <= 2 and difference.mean() <= 0.5, (difference.max(), difference.mean())


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_batched_jitter_equals_torchvision(operation):
    x, n = pictures(), 24
    index = ["brightness", "contrast", "saturation", "hue"].index(operation)
    recipe = train.Recipe(
        jitter=tuple(0.4 if i == index else 0.0 for i in range(4)), jitter_prob=1.0, gray=0.0, solarize=(0.0,)
    )
    u = torch.rand(n, 10, generator=torch.Generator().manual_seed(1))
    u[:, 9] = 1  # no flip
    got = unnormalize(train.augment(x / 255, u, [3, 0, 1, 2], recipe, 0))
    amount = 0.4 * (2 * u[:, 1 + index] - 1)
    adjust = getattr(TF, f"adjust_{operation}")
    expected = [adjust(image, (a if operation == "hue" else 1 + a).item()) for image, a in zip(x, amount)]
    difference = (got * 255 - torch.stack(expected).float()).abs()
    assert difference.max() <= 2 and difference.mean() <= 0.6  # torchvision cuts to integers, which is half a level


def unnormalize(x, dataset="folder"):
    mean, std = (torch.tensor(v)[:, None, None] for v in train.MEAN_STD[dataset])
    return x * std + mean


def test_batched_grey_solarise_flip_and_blur_equal_torchvision():
    x, n = pictures(), 24
    quiet = {"jitter_prob": 0.0, "gray": 0.0, "solarize": (0.0,), "blur": (0.0,)}
    u = torch.rand(n, 10, generator=torch.Generator().manual_seed(1))
    u[:, 9] = 1

    def run(u=u, **changes):
        return unnormalize(train.augment(x / 255, u, [0, 1, 2, 3], train.Recipe(**{**quiet, **changes}), 0))

    assert_same_picture(run(), x)
    assert ((run(gray=1.0) * 255).round() - TF.rgb_to_grayscale(x, 3)).abs().max() <= 1
    assert_same_picture(run(solarize=(1.0,)), TF.solarize(x, 128))
    assert_same_picture(run(solarize=(1.0,), solarize_threshold=0), TF.invert(x))
    assert_same_picture(run(torch.cat([u[:, :9], torch.zeros(n, 1)], 1)), TF.horizontal_flip(x))
    blurred = [TF.gaussian_blur(image, [13, 13], [s.item()] * 2) for image, s in zip(x, 0.1 + 1.9 * u[:, 7])]
    assert_same_picture(run(blur=(1.0,)), torch.stack(blurred))


@pytest.mark.parametrize("size", [12, 32, 40])
def test_batched_resized_crop_equals_torchvision(size):
    x = pictures()
    u = torch.rand(24, 10, 4, generator=torch.Generator().manual_seed(2))
    boxes = train.crop_boxes(32, 32, torch.tensor([[0.08, 1.0]]), u)
    for mode in ("bicubic", "bilinear"):
        expected = [
            TF.resized_crop(i, *map(int, b), [size, size], TF.InterpolationMode(mode), antialias=True)
            for i, b in zip(x, boxes.tolist())
        ]
        assert_same_picture(train.resized_crops(x, boxes, size, mode), torch.stack(expected))


@pytest.mark.parametrize("height, width, scale", [(32, 32, (0.08, 1.0)), (60, 200, (0.2, 1.0)), (90, 70, (0.5, 0.6))])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    """Area, aspect ratio and place of 20,000 boxes."""
    n = 20_000
    torch.manual_seed(0)
    draw = torchvision.transforms.RandomResizedCrop.get_params
    expected = torch.tensor([draw(torch.empty(3, height, width), scale, (3 / 4, 4 / 3)) for _ in range(n)])
    u = torch.rand(n, 10, 4, generator=torch.Generator().manual_seed(1))
    got = train.crop_boxes(height, width, torch.tensor([scale]), u)
    for statistic in (
        lambda b: b[:, 2] * b[:, 3] / (height * width),
        lambda b: (b[:, 3] / b[:, 2]).log(),
        lambda b: (b[:, 0] + b[:, 2] / 2) / height,
        lambda b: (b[:, 1] + b[:, 3] / 2) / width,
    ):
        a, b = (statistic(x.double()).sort().values for x in (got, expected))
        at = torch.cat([a, b]) + 1e-9  # Kolmogorov and Smirnov: 0.0195 is exceeded once in a thousand times
        assert (torch.searchsorted(a, at) - torch.searchsorted(b, at)).abs().max() < 0.0195 * n


def test_augmentation_is_drawn_as_published():
    """20,000 draws of pictures of two columns: how often each operation happens, and the jitter's strengths."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    picture = torch.tensor([[0.6, 0.5], [0.4, 0.3], [0.2, 0.4]])[:, None].repeat(1, 2, 1)  # (3, 2, 2)
    x, u = picture.expand(n, 3, 2, 2), torch.rand(n, 10, generator=generator)
    off = {"jitter_prob": 0.0, "gray": 0.0, "blur": (0.0,), "solarize": (0.0,)}
    u_still = torch.cat([u[:, :9], torch.ones(n, 1)], dim=1)  # not flipped

    def seen(u=u_still, order=(0, 1, 2, 3), **changes):
        recipe = train.Recipe(**(off | changes))
        return unnormalize(train.augment(x, u, list(order), recipe, 0))

    def share(changed):  # of a probability, within 4 standard errors
        return pytest.approx(changed.float().mean().item(), abs=4 * (0.25 / n) ** 0.5)

    different = lambda y: ((y - picture).abs() > 1e-4).flatten(1).any(1)  # (n,)
    assert share(different(seen(u=u))) == 0.5  # flip
    assert share(different(seen(gray=0.2))) == 0.2
    assert share(different(seen(blur=(0.1,)))) == 0.1
    assert share(different(seen(solarize=(0.2,), solarize_threshold=100))) == 0.2
    light = lambda y: (y * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1)
    hue = lambda y: torch.tensor([colorsys.rgb_to_hsv(*rgb)[0] for rgb in y[:, :, 0, 0].tolist()])
    strengths = [
        ((0.4, 0, 0, 0), lambda y: y[:, 0, 0, 0] / 0.6 - 1),
        ((0, 0.4, 0, 0), lambda y: (light(y).diff(dim=-1) / light(picture[None]).diff(dim=-1))[:, 0, 0] - 1),
        ((0, 0, 0.2, 0), lambda y: (y[:, 0] - light(y))[:, 0, 0] / (picture[0] - light(picture[None])[0])[0, 0] - 1),
        ((0, 0, 0, 0.1), lambda y: (hue(y) - hue(picture[None]) + 0.5) % 1 - 0.5),
    ]
    for jitter, measure in strengths:
        y = seen(jitter_prob=0.8, jitter=jitter)
        on, largest = different(y), max(jitter)
        assert share(on) == pytest.approx(0.8, abs=0.01)
        values = measure(y[on]).double().sort().values  # uniform from -largest to largest, by Kolmogorov and Smirnov
        uniform = torch.linspace(-largest, largest, len(values), dtype=torch.float64)
        assert (values - uniform).abs().max() < 0.0155 * 2 * largest


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """train/ and val/ with three classes of small pictures of different sizes, and as many of one size."""
    root = tmp_path_factory.mktemp("photos")
    for one_size in ("same", "mixed"):
        for split, n in (("train", 16), ("val", 5)):
            for c in range(3):
                folder = root / one_size / split / f"class {c}"
                folder.mkdir(parents=True)
                for i in range(n):
                    generator = torch.Generator().manual_seed(100 * c + i + 50 * (split == "val"))
                    coarse = torch.randint(0, 256, (3, 2 + c, 4), generator=generator, dtype=torch.uint8)
                    size = [20, 20] if one_size == "same" else [20 + i, 30 - i]
                    torchvision.io.write_png(TF.resize(coarse, size), str(folder / f"{i}.png"))
    return root


def test_order_and_crops_do_not_depend_on_workers_or_processes(photos, monkeypatch):
    recipe = train.Recipe(batch_size=8, view_sizes=(16, 16))
    device = torch.device("cpu")
    views_of = {}
    for kind, cache, held in (("same", 1, torch.Tensor), ("mixed", 1, list), ("mixed", 0, type(None))):
        images, _ = train.load_data("folder", str(photos / kind), 0, device, cache)
        assert isinstance(images.pixels, held)
        views_of[kind, cache] = whole = [next(train.training_views(images, recipe, 0, step, 0, device)) for step in range(8)]
        for workers in (0, 2):
            views = train.training_views(images, recipe, 0, 0, workers, device)
            for expected in whole:  # over the end of an epoch of 6 steps, from any step
                assert all(torch.equal(a, b) for a, b in zip(next(views), expected))
        for rank in (0, 1):
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", str(rank))
            share = next(train.training_views(images, recipe, 0, 3, 0, device))
            torch.testing.assert_close(share, [v[4 * rank : 4 * rank + 4] for v in whole[3]])
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv("RANK")
    for a, b in zip(views_of["mixed", 1], views_of["mixed", 0]):  # in memory or read by workers: the same crops
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------------
# One step, schedules, teacher


class TinyNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 10))
        self.projector = nn.Linear(10, 12)

    def forward(self, views):
        return [self.projector(self.backbone(v)) for v in views]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_steps_equal_an_independent_computation(ema):
    """Three steps in float64: forward, the formulas of the paper, SGD with momentum and weight decay, schedules, teacher."""
    recipe = train.Recipe(
        batch_size=8, epochs=3, warmup_epochs=1, weight_decay=0.1, ema=ema, view_sizes=(6,) * (4 if ema else 2)
    )
    steps = 2
    torch.manual_seed(0)
    network = TinyNetwork().double()
    mine = {k: v.clone().requires_grad_() for k, v in network.state_dict().items()}
    my_teacher = {k: v.detach().clone() for k, v in mine.items()}
    velocity = {k: torch.zeros_like(v) for k, v in mine.items()}
    trainer = train.Trainer(recipe, network, steps, 0, torch.device("cpu"), torch.float32)

    def embed(weights, x):
        h = x.flatten(1) @ weights["backbone.1.weight"].T + weights["backbone.1.bias"]
        return h @ weights["projector.weight"].T + weights["projector.bias"]

    for step in range(3):
        views = list(randn(len(recipe.view_sizes), 8, 3, 6, 6, seed=step))
        loss, _ = trainer.step(views, step)

        peak, t, T = 0.3 * 8 / 256, step - 2 + 1, 6 - 2
        rate = peak * (step + 1) / 2 if step < 2 else peak * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * t / T)))
        if ema:
            momentum = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * step / 6))
            my_teacher = {k: momentum * v + (1 - momentum) * mine[k].detach() for k, v in my_teacher.items()}
        z = [embed(mine if i or not ema else my_teacher, v) for i, v in enumerate(views)]
        expected = definition(z, "channel", 4, 0.01 * (math.log2(8) - 3), teacher=bool(ema))
        gradients = torch.autograd.grad(expected, list(mine.values()))
        for (name, w), g in zip(mine.items(), gradients):
            velocity[name] = 0.9 * velocity[name] + g + 0.1 * w.detach()
            mine[name] = (w - rate * velocity[name]).detach().requires_grad_()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, w in network.state_dict().items():
        torch.testing.assert_close(w, mine[name].detach(), rtol=1e-9, atol=1e-12)
        if ema:
            torch.testing.assert_close(trainer.teacher.state_dict()[name], my_teacher[name], rtol=1e-9, atol=1e-12)


def test_schedules_at_their_ends():
    recipe, steps = train.Recipe(batch_size=512, base_lr=0.3, epochs=10, ema=0.996), 100
    assert train.learning_rate(0, steps, recipe) == pytest.approx(0.6 / 200)
    assert train.learning_rate(199, steps, recipe) == pytest.approx(0.6)
    assert train.learning_rate(599, steps, recipe) == pytest.approx(0.6 * (1 + 0.001) / 2)
    assert train.learning_rate(999, steps, recipe) == pytest.approx(0.6 * 0.001)
    assert train.teacher_momentum(0, steps, recipe) == pytest.approx(0.996)
    assert train.teacher_momentum(500, steps, recipe) == pytest.approx(0.998)
    assert train.teacher_momentum(999, steps, recipe) == pytest.approx(1, abs=1e-6)


def test_weight_decay_spares_one_dimensional_parameters_where_the_recipe_says_so():
    network = train.Network(train.Recipe(hidden=8, out=8, decay_all=False))
    decayed, spared = train.build_optimizer(network, train.Recipe(decay_all=False)).param_groups
    assert decayed["weight_decay"] == 1e-4 and spared["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in spared["params"])
    assert len(train.build_optimizer(network, train.Recipe()).param_groups) == 1


# fmt: off
PUBLISHED = {  # the fields of every recipe
    "arch": "resnet18", "stem": "imagenet", "zero_init_residual": False, "batch_size": 256, "base_lr": 0.3, "final_lr": 0.001,
    "warmup_epochs": 2, "weight_decay": 1e-5, "decay_all": False, "loss": "intl", "iterations": 4, "axis": "channel",
    "beta": None, "orthogonality": None, "ema": None, "hidden": 8192, "out": 8192, "view_sizes": (224, 224),
    "min_scale": (0.08,), "max_scale": (1.0,), "interpolation": "bicubic", "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8,
    "gray": 0.2, "blur": (1.0, 0.1), "solarize": (0.0, 0.2), "solarize_threshold": 128,
}
CIFAR = {"stem": "cifar", "epochs": 1000, "weight_decay": 1e-4, "decay_all": True, "hidden": 2048, "out": 2048,
         "view_sizes": (32, 32), "blur": (0.0,)}
OWN = {  # and of each, where they differ
    "cifar10": CIFAR | {"dataset": "cifar10"},
    "cifar100": CIFAR | {"dataset": "cifar100"},
    "imagenet100": {"epochs": 400, "batch_size": 128, "base_lr": 0.5, "weight_decay": 2.5e-5, "hidden": 4096},
    "imagenet": {"arch": "resnet50", "epochs": 800, "zero_init_residual": True},
    "imagenet-multicrop": {
        "arch": "resnet50", "epochs": 100, "zero_init_residual": True, "base_lr": 0.5, "ema": 0.996, "blur": (0.5,),
        "view_sizes": (224, 224, 192, 160, 128, 96), "min_scale": (0.2, 0.2, 0.171, 0.143, 0.114, 0.086),
        "max_scale": (1.0, 1.0, 0.857, 0.714, 0.571, 0.429), "solarize": (0.1,),
    },
}
# fmt: on


def test_recipes_are_the_published_ones():
    for name, own in OWN.items():
        fields = dataclasses.asdict(train.RECIPES[name])
        for field, value in (PUBLISHED | own).items():
            assert fields.pop(field) == value, (name, field)
        kin = {"groups", "sub_batch", "orthogonality_weight"}  # of other methods
        assert set(fields) - kin <= {"dataset"}, fields
    for epochs, rate in ((100, 0.5), (200, 0.4), (400, 0.4), (800, 0.3)):
        assert train.parse(["--recipe", "imagenet-multicrop", "--epochs", str(epochs)])[1].base_lr == rate


def test_settings_of_the_evaluation_are_the_published_ones():
    protocols = {name: (p["epochs"], p["rates"][:1]) for name, p in linear_eval.PROTOCOLS.items()}
    assert protocols == {"features": (500, [0.01]), "knn": (0, []), "linear": (100, [0.2]), "finetune": (20, [0.2])}
    multicrop = dataclasses.asdict(train.RECIPES["imagenet-multicrop"])
    assert linear_eval.rates_of("linear", multicrop)[0] == 0.4 and linear_eval.rates_of("finetune", multicrop) == [0.2]
    assert linear_eval.rates_of("linear", multicrop | {"ema": None})[0] == 0.2 == linear_eval.rates_of("linear", {})[0]
    args = linear_eval.parse([])
    assert (args.batch_size, args.weight_decay, args.encoder_lr) == (256, 0, 0.004)
    image = pictures(70)[0, :, :50]
    transform = torchvision.transforms.v2
    expected = transform.Compose([transform.Resize(256, antialias=True), transform.CenterCrop(224)])(image)
    assert torch.equal(train.CentreCrop(224)(image), expected)
    weights = {("so", "resnet50"): 1e-6, ("srip", "resnet50"): 1e-3, ("so", "vit_small"): 1e-5}
    for (kind, arch), weight in weights.items():
        assert train.orthogonality_weight(train.Recipe(orthogonality=kind, arch=arch)) == weight


def test_every_bn_sees_one_view_and_the_teacher_keeps_statistics_of_its_own():
    recipe = train.Recipe(batch_size=8, epochs=3, stem="cifar", hidden=8, out=8, ema=0.9, view_sizes=(8, 8, 8))
    network = train.Network(recipe)
    a, b = randn(2, 8, 3, 8, 8, dtype=torch.float32)
    torch.testing.assert_close(network([a, b])[1], network([b])[0])
    trainer = train.Trainer(recipe, network, 1, 0, torch.device("cpu"), torch.float32)
    trainer.step([a, b, b], 0)
    assert trainer.teacher.training
    teacher, student = (net.backbone.bn1.running_mean for net in (trainer.teacher, trainer.network))
    assert (teacher - student).abs().max() > 1e-4 and teacher.abs().max() > 1e-4


def test_alarm_announces_collapse():
    assert "falls steadily" in train.alarm([100, 80, 70, 60], 0.9, 0.04)
    assert train.alarm([100, 80, 85, 60], 0.9, 0.04) is None and train.alarm([60, 50], 1, 0) is None
    assert "least value" in train.alarm([], 0.05, 0.04)
    assert "rank is 2.3" in train.alarm([2.2, 2.3], 1, 0) and train.alarm([3.1], 1, 0) is None


def brute_force(bank, queries, k):
    """Indices of the k nearest, of equally near ones the first, by float64 differences."""
    bank, rows = bank.double(), []
    for q in queries.double():
        rows.append((q - bank).square().sum(1).sort(stable=True).indices[:k])
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [7, 500, 4096])
@pytest.mark.parametrize("kind", ["normal", "many ties", "far away"])
def test_nearest_neighbours_are_exact_in_chunks_of_any_size(kind, chunk):
    """Ties too: rows that occur a hundred times, and distances that are whole numbers."""
    bank, queries = randn(2000, 512, dtype=torch.float32), randn(50, 512, seed=1, dtype=torch.float32)
    if kind == "many ties":
        bank, queries = bank[torch.arange(2000) % 20].sign(), queries.sign()
    if kind == "far away":  # float32 products cannot tell these apart
        bank, queries = 100 + bank / 100, 100 + queries / 100
    assert train.nearest(bank[:0], queries, 5, torch.device("cpu"))[0].shape == (50, 0)  # a process without a share
    distances, indices = train.nearest(bank, queries, 5, torch.device("cpu"), chunk)
    expected = brute_force(bank, queries, 5)
    assert torch.equal(indices, expected)
    exact = (bank[expected].double() - queries[:, None].double()).square().sum(-1)
    torch.testing.assert_close(distances, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_knn_votes_like_a_brute_force_search(temperature):
    bank, queries = randn(200, 6, dtype=torch.float32), randn(50, 6, seed=1, dtype=torch.float32)
    if temperature:
        bank, queries = F.normalize(bank), F.normalize(queries)
    labels, expected, right = torch.arange(200) % 4, torch.arange(50) % 4, 0
    for q, near, y in zip(queries, brute_force(bank, queries, 5), expected):
        votes = [0.0] * 4
        for i in near.tolist():
            cosine = (q.double() @ bank[i].double()).item()
            votes[labels[i]] += math.exp(cosine / temperature) if temperature else 1
        right += votes.index(max(votes)) == y
    distances, indices = train.nearest(bank, queries, 5, torch.device("cpu"))
    assert train.knn_accuracy(distances, labels[indices], expected, temperature) == 100 * right / 50


# ------------------------------------------------------------------------------------------------------------------
# The scripts, as a user starts them

TINY = "--dataset folder --view-sizes 16 16 --stem cifar --batch-size 16 --hidden 16 --out 24 --epochs 4 --warmup-epochs 1"
TINY = [*TINY.split(), "--base-lr", "0.03", "--log-every", "1", "--workers", "1"]


def run_script(script, *arguments, processes=0, timeout=300, cwd=HERE):
    if processes:
        return torchrun(processes, HERE / script, *arguments, timeout=timeout, cwd=cwd)
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, cwd=cwd)


def backbone_of(folder):
    return load(folder / "backbone.pt")


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    """An undisturbed tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run = run_script("train.py", *TINY, "--data", photos / "same", "--output", folder)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


@pytest.fixture
def one_thread():
    """As in the processes that the tests start: sums are rounded alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_leaves_what_is_promised(finished):
    folder, printed = finished
    assert {"checkpoint.pt", "backbone.pt", "config.json", "log.jsonl"} <= {p.name for p in folder.iterdir()}
    assert any(p.name.startswith("events.out.tfevents") for p in folder.iterdir())
    net = torchvision.models.resnet18()
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    assert net.load_state_dict(backbone_of(folder), strict=False) == (["fc.weight", "fc.bias"], [])
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["epoch"] for line in lines if "knn_top1" in line] == [0, 1, 2, 3, 4]
    assert re.search(r"5-NN top-1 on 15 held-out images: random network [\d.]+ %, after 4 epochs [\d.]+ %", printed)
    for part in ("alignment", "above its floor", "score", "lr", "images/s", "waiting for data", "ETA", "condition number"):
        assert part in printed


def test_a_killed_run_ends_bitwise_like_an_undisturbed_one(finished, photos, tmp_path):
    """SIGKILL between two checkpoints, SIGTERM in the middle of an epoch, and a half-written temporary file."""
    folder = tmp_path / "killed"
    command = [sys.executable, str(HERE / "train.py"), *TINY, "--data", str(photos / "same"), "--output", str(folder)]
    for name, until in ((signal.SIGKILL, 5), (signal.SIGTERM, 7)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for line in process.stdout:
            if f"step {until}/" in line:
                process.send_signal(name)
                break
        rest = process.stdout.read()
        code = process.wait(timeout=60)
        assert code == (-9 if name == signal.SIGKILL else 0)
        assert name == signal.SIGKILL or "told to stop: saved at step" in rest
        (folder / "checkpoint.pt.tmp").write_bytes(b"half")
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0 and "resuming at step" in run.stdout, run.stderr
    expected = backbone_of(finished[0])
    assert all(torch.equal(value, expected[name]) for name, value in backbone_of(folder).items())
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines() if "loss" in line]
    assert steps == list(range(1, 13))
    again = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)  # a finished run is left alone
    assert again.returncode == 0 and "step 12 of 12" in again.stdout


@pytest.mark.parametrize("kind, cache", [("same", "9"), ("mixed", "0")])
def test_two_processes_train_and_evaluate(kind, cache, photos, tmp_path):
    flags = ["--data", photos / kind, "--cache-mb", cache, "--output", tmp_path / "two", "--epochs", "2"]
    run = run_script("train.py", *TINY, *flags, processes=2)
    assert run.returncode == 0, run.stderr
    assert "on 2 process(es)" in run.stdout and "after 2 epochs" in run.stdout
    flags = ["--checkpoint", tmp_path / "two" / "backbone.pt", "--data", photos / kind, "--cache-mb", cache, "--epochs", "1"]
    run = run_script("linear_eval.py", *flags, "--protocol", "finetune", "knn", "--batch-size", "16", processes=2)
    assert run.returncode == 0 and "15 validation images" in run.stdout and "Traceback" not in run.stderr, run.stderr


@pytest.mark.parametrize("kind", ["same", "mixed"])
def test_benchmark_of_a_step_writes_nothing(kind, photos, tmp_path, capsys):
    arguments = [*TINY, "--data", str(photos / kind), "--cache-mb", "0" if kind == "mixed" else "9"]
    train.main([*arguments, "--output", str(tmp_path / "run"), "--benchmark", "2"])
    text = capsys.readouterr().out
    for part in ("whole step", "backbone and projector", "loss", "input", "update and rest"):
        assert re.search(rf"^{part} +-?\d+\.\d +-?\d+\.\d %$", text, re.M), text
    assert "images/s; an epoch of 3 steps" in text and "the published augmentation in PIL" in text
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--loss iternorm", "--loss whiten --orthogonality so", "--loss power:0.45 --axis batch",
    "--loss cwrgp --groups 1 --sub-batch 8", "--loss none --orthogonality srip", "--ema 0.9 --view-sizes 16 16 12 --solarize 0.1",
    "--arch vit_tiny --stem cifar", "--precision float32 --compile"])  # fmt: skip
def test_every_method_takes_a_step(flags, photos, tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))  # no compiler needed here
    arguments = [*TINY, "--data", str(photos / "same"), "--output", str(tmp_path / "run"), "--max-steps", "2"]
    train.main([*arguments, *flags.split()])
    printed = capsys.readouterr().out
    assert "step 2/" in printed and "nan" not in printed
    assert [type(module) for module in compiled] == [torchvision.models.ResNet] * ("--compile" in flags)


@pytest.mark.parametrize("recipe", [name for name in train.RECIPES if name != "shapes"])
def test_every_recipe_takes_a_step(recipe, photos, tmp_path, capsys):
    """At a tenth of the size; its own network, views, loss and teacher."""
    sizes = [max(32, s // 7) for s in train.RECIPES[recipe].view_sizes]
    small = ["--hidden", "32", "--out", "32", "--batch-size", "12", "--max-steps", "1", "--knn-images", "8"]
    options = ["--data", str(photos / "mixed"), "--output", str(tmp_path / "run"), "--view-sizes", *map(str, sizes)]
    train.main(["--recipe", recipe, *small, *options, "--workers", "1"])
    assert "step 1/" in capsys.readouterr().out


def test_a_process_that_dies_ends_the_others(photos, tmp_path):
    """torchrun notices, and stops the rest; nobody waits for the dead."""
    script = tmp_path / "dies.py"
    script.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import train
step = train.Trainer.step
def dying(*arguments):
    if os.environ["RANK"] == "1":
        os._exit(7)
    return step(*arguments)
train.Trainer.step = dying
train.main(sys.argv[1:])
"""
    )
    run = torchrun(2, script, *TINY, "--data", photos / "same", "--output", tmp_path / "run", timeout=120)
    assert run.returncode != 0 and "exitcode  : 7" in run.stderr


def test_a_process_that_fails_alone_takes_the_others_along_without_a_traceback(photos, tmp_path):
    """One line names the file, although only one process has met it."""
    shutil.copytree(photos / "mixed" / "train", tmp_path / "data")
    broken = sorted((tmp_path / "data").rglob("*.png"))[20]
    broken.write_bytes(b"no picture")
    flags = ["--data", tmp_path / "data", "--cache-mb", "0", "--output", tmp_path / "run"]
    run = torchrun(2, HERE / "train.py", *TINY, *flags, timeout=120)
    assert run.returncode != 0 and run.stderr.count(f"{broken} is no image that can be read") == 1
    assert "RuntimeError" not in run.stderr and "Connection" not in run.stderr


WITHOUT_BN = f"""
import sys
import time
sys.path.insert(0, {str(HERE)!r})
import torch, train
class Network(torch.nn.Module):
    def __init__(self, recipe):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(), torch.nn.Linear(128, 16))
        self.projector = torch.nn.Linear(16, recipe.out)
    def forward(self, views):
        return [self.projector(self.backbone(v)) for v in views]
train.Network = Network
train.main(sys.argv[1:])
"""


def test_restarts_of_torchrun_resume(photos, tmp_path):
    """--max-restarts: a process dies once, in the second epoch; both are started again and go on."""
    script = tmp_path / "dies_once.py"
    script.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import train
step, calls = train.Trainer.step, []
def dying(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(calls) == 5:
        os._exit(7)
    return step(*arguments)
train.Trainer.step = dying
train.main(sys.argv[1:])
"""
    )
    run = torchrun(
        2, "--max-restarts", "1", script, *TINY, "--fresh", "--data", photos / "same", "--output", tmp_path / "run"
    )
    assert run.returncode == 0 and "resuming at step 3 of 12" in run.stdout and "step 12/12" in run.stdout, run.stderr


def test_two_nodes_equal_one_process(photos, tmp_path):
    """Two torchrun agents with two processes each, meeting on the loopback device; a network without BatchNorm, which on
    CPUs normalises every process's share by itself."""
    script = tmp_path / "without_bn.py"
    script.write_text(WITHOUT_BN)
    options = [*TINY, "--data", photos / "mixed", "--precision", "float32", "--max-steps", "5", "--output"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", "--rdzv_id", "7"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"]
    command = [str(word) for word in [*command, script, *options, tmp_path / "four"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    agents = [subprocess.Popen(command, **pipes) for _ in range(2)]
    printed = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert any("on 4 process(es)" in p for p in printed)
    one = run_script(script, *options, tmp_path / "one")
    assert one.returncode == 0, one.stderr
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "four")]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    weights = [backbone_of(tmp_path / name) for name in ("one", "four")]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_a_run_resumes_on_another_number_of_processes(photos, tmp_path):
    script = tmp_path / "without_bn.py"
    script.write_text(WITHOUT_BN)
    options = [*TINY, "--data", photos / "same", "--precision", "float32", "--output"]
    for name, parts in {"whole": [(0, "6")], "parts": [(2, "2"), (0, "4"), (2, "6")]}.items():
        for processes, until in parts:
            run = run_script(script, *options, tmp_path / name, "--max-steps", until, processes=processes)
            assert run.returncode == 0, run.stderr
    weights = [backbone_of(tmp_path / name) for name in ("whole", "parts")]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_sigterm_to_torchrun_saves_before_the_processes_leave(photos, tmp_path):
    """With workers, which torchrun sends the signal as well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HERE / "train.py"]
    command += [*TINY, "--data", photos / "mixed", "--cache-mb", "0", "--output", tmp_path / "run", "--epochs", "300"]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )
    for line in process.stdout:
        if "step 5/" in line:
            process.send_signal(signal.SIGTERM)
            break
    assert "told to stop: saved at step" in process.communicate(timeout=60)[0]
    assert load(tmp_path / "run" / "checkpoint.pt")["step"] >= 5


PIDS = """
import os, time
class Pids:
    def __len__(self): return 10_000
    def __getitem__(self, i):
        time.sleep(0.05)
        return [os.getpid(), os.getppid()]
"""
READER = """
import itertools, pathlib, pids, train
for found in itertools.islice(train.read(pids.Pids(), 2, batch_size=None), 20):
    print(*found, flush=True)
pathlib.Path(pids.__file__).write_text("not Python")
for found in train.read(pids.Pids(), 2, batch_size=None):
    print(*found, flush=True)
"""


def alive(pid):
    """Running, not a zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_hear_no_signals_and_leave_with_a_killed_run(tmp_path):
    """The signals that torchrun and Slurm send to all processes, the server that forks the workers among them. Workers do
    not run the script, which has no guard here, and are of the text that the run was started with."""
    (tmp_path / "reader.py").write_text(READER)
    (tmp_path / "pids.py").write_text(PIDS)
    with subprocess.Popen(
        [sys.executable, tmp_path / "reader.py"], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:

        def next_pids(n):
            return {int(pid) for _ in range(n) for pid in process.stdout.readline().split()}

        earlier, pids = next_pids(20), next_pids(20)
        assert len(earlier) == len(pids) == 3 and process.pid not in pids  # two workers, and the server
        assert len(earlier & pids) == 1
        for pid in pids:
            for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(pid, name)
        assert next_pids(40) <= pids
        process.kill()
        process.wait(timeout=20)
    deadline = time.time() + 20
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_a_killed_worker_ends_the_run_with_one_line(tmp_path):
    (tmp_path / "reader.py").write_text(READER)
    (tmp_path / "pids.py").write_text(PIDS)
    command = [sys.executable, tmp_path / "reader.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        os.kill(int(process.stdout.readline().split()[0]), signal.SIGKILL)
        errors = process.communicate(timeout=60)[1].strip().splitlines()
    assert process.returncode == 2 and "a data worker has died" in errors[-1] and "Traceback" not in "".join(errors), errors


def test_any_file_name_is_read(photos, tmp_path):
    """Not UTF-8, with a newline, with a quote."""
    content = next((photos / "mixed").rglob("*.png")).read_bytes()
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "train"
    folder.mkdir(parents=True)
    for name in (b"\xff.png", b"a\nb.png", "日本 'x'.png".encode()):
        (folder / os.fsdecode(name)).write_bytes(content)
    (folder / "empty.png").touch()
    images = train.load_folder(folder, torch.device("cpu"), 0, skip=True)
    decoded = [train.decode(path) for path in images.paths if "empty" not in path]
    assert len(decoded) == 3 and all(torch.equal(x, decoded[0]) for x in decoded)
    with pytest.raises(train.UnreadableImage, match=r"empty\.png is no image"):
        train.decode(folder / "empty.png")


def test_packed_strings_come_back_and_are_shared():
    strings = ["", "a/b.png", "grün/日本.jpg", "not utf-8 \udcff", "x" * 1000]
    packed = train.Packed(strings)
    assert len(packed) == 5 and list(packed) == strings == [packed[i] for i in range(5)]
    assert list(train.Packed([])) == []
    shared = train.WORKERS.reducer.ForkingPickler.dumps(train.Packed(f"{i}.png" for i in range(100_000)))
    assert len(shared) < 2000


def test_unreadable_images_can_be_skipped(photos, tmp_path, capsys):
    folder = tmp_path / "some broken"
    folder.mkdir()
    for i, path in enumerate(sorted((photos / "mixed").rglob("*.png"))[:20]):
        (folder / f"{i}.png").write_bytes(path.read_bytes() if i % 5 else b"no picture")
    arguments = [*TINY, "--data", str(folder), "--output", str(tmp_path / "run"), "--max-steps", "1", "--skip-unreadable"]
    train.main([*arguments, "--batch-size", "20"])
    assert "unreadable images were met" in capsys.readouterr().out


def test_what_stands_in_for_an_unreadable_image_has_its_label(photos, tmp_path):
    shutil.copytree(photos / "mixed", tmp_path / "some")
    last = sorted((tmp_path / "some" / "train" / "class 0").iterdir())[-1]
    last.write_bytes(b"no picture")
    images = train.load_folder(tmp_path / "some" / "train", torch.device("cpu"), 0, skip=True)
    index = list(images.paths).index(str(last))
    assert images.labels[index] == 0 and images.labels[index + 1] == 1
    first = train.decode(images.paths[0])
    assert torch.equal(train.Decoded(images, lambda image, key: image)[index], first) and images.skipped.sum() == 1


def test_a_signal_at_the_end_of_an_epoch_saves_at_once_and_measures_later(
    finished, one_thread, photos, tmp_path, monkeypatch, capsys
):
    arguments = [*TINY, "--data", str(photos / "same"), "--output", str(tmp_path / "run")]
    steps, any_process = [], train.any_process

    def stop_at_step_6(flag, device):
        steps.append(1)
        return len(steps) == 6

    monkeypatch.setattr(train, "any_process", stop_at_step_6)
    train.main(arguments)
    printed = capsys.readouterr().out
    assert "saved at step 6 of 12" in printed and "epoch 2.00/4  5-NN" not in printed
    monkeypatch.setattr(train, "any_process", any_process)
    train.main(arguments)
    printed = capsys.readouterr().out
    assert printed.index("resuming at step 6") < printed.index("epoch 2.00/4  5-NN") < printed.index("step 7/12")
    expected = backbone_of(finished[0])
    assert all(torch.equal(value, expected[name]) for name, value in backbone_of(tmp_path / "run").items())


def test_a_network_without_a_label_trains(photos, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((photos / "mixed").rglob("*.png"))[:32]):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    (flat / "notes.txt").write_text("no image")
    train.main([*TINY, "--data", str(flat), "--output", str(tmp_path / "run"), "--max-steps", "1"])
    text = capsys.readouterr().out
    assert "effective rank" in text and "1 files that end otherwise than in" in text and "saved " in text


def test_bad_commands_fail_with_one_clear_line(photos, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    broken = tmp_path / "broken"
    for i, path in enumerate(sorted((photos / "mixed").rglob("*.png"))[:20]):
        (broken / "train").mkdir(parents=True, exist_ok=True)
        (broken / "train" / f"{i}.png").write_bytes(path.read_bytes() if i != 3 else b"no picture")
    odd = tmp_path / "odd"
    for split, name in (("train", "cat"), ("val", "dog")):
        (odd / split / name).mkdir(parents=True)
        for i in range(2):
            (odd / split / name / f"{i}.png").write_bytes(next((photos / "same").rglob("*.png")).read_bytes())

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    runs = {}
    for name, content in (
        ("cut", (finished[0] / "checkpoint.pt").read_bytes()[:100_000]),
        ("foreign", b"hello"),
        ("evil", None),
    ):
        runs[name] = tmp_path / name
        runs[name].mkdir()
        (runs[name] / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
        if content is None:
            torch.save(Evil(), runs[name] / "checkpoint.pt")
        else:
            (runs[name] / "checkpoint.pt").write_bytes(content)
    good = [*TINY, "--data", str(photos / "same"), "--max-steps", "1"]
    if not (photos / "renamed").exists():
        (photos / "renamed").mkdir()
        for path in (photos / "same" / "train").rglob("*.png"):
            (photos / "renamed" / f"{path.parent.name} {path.name}").write_bytes(path.read_bytes())
    cases = [
        (["--recipe", "nosuch"], "invalid choice: 'nosuch'"),
        (["--data", "x"], "shapes draws its images"),
        (["--recipe", "imagenet"], "needs --data"),
        (["--recipe", "imagenet", "--data", "nowhere"], "nowhere: no such folder"),
        (["--recipe", "imagenet", "--data", "empty"], "empty holds no images"),
        ([*TINY, "--data", str(odd)], "different classes, 'cat' among them"),
        (
            [*TINY, "--data", str(broken), "--batch-size", "20", "--output", "o1"],
            "3.png is no image that can be read: repair or delete it; of training images, train.py",
        ),
        ([*good, "--batch-size", "64"], "48 training images are fewer than one batch of 64"),
        ([*good, "--batch-size", "1"], "--batch-size must be at least 2"),
        ([*good, "--batch-size", "8"], "is not positive for n = 8"),
        ([*good, "--data", "cifar"], "looks like torchvision's CIFAR: give --dataset cifar10"),
        ([*good, "--epochs", "0"], "--epochs must be at least 1"),
        *[([*good, "--loss", name], f"--loss {name}") for name in ("power:x", "power:", "power", "foo", "whiten:3")],
        ([*good, "--loss", "power:nan"], "--loss power:nan"),
        ([*good, "--base-lr", "nan"], "--base-lr must be at least 0, got nan"),
        ([*good, "--loss", "whiten", "--beta", "1"], "--beta means nothing to --loss whiten, but to intl"),
        ([*good, "--groups", "2"], "--groups means nothing to --loss intl"),
        ([*good, "--orthogonality-weight", "1"], "--orthogonality-weight needs --orthogonality"),
        ([*good, "--data", "nowhere", "--arch", "vit_tiny", "--view-sizes", "18", "18"], "a multiple of 4 pixels, got 18"),
        ([*good, "--weight-decay", "-1"], "--weight-decay must be finite and not negative, got -1.0"),
        ([*good, "--gray", "7"], "--gray is a probability"),
        ([*good, "--view-sizes", "0", "0"], "--view-sizes must be at least 8"),
        ([*good, "--output", ""], "--output is empty"),
        ([*good, "--output", "notes/diary.txt"], "is no folder"),
        ([*good, "--output", str(finished[0]), "--data", str(photos / "renamed")], "another run (other images)"),
        ([*good, "--loss", "cwrgp"], "4 groups of 24 channels"),
        ([*good, "--output", "notes", "--fresh"], "notes is not empty and holds no run"),
        ([*good, "--arch", "alexnet"], "--arch alexnet"),
        ([*good, "--view-sizes", "16"], "at least two views"),
        ([*good, "--blur", "0.1", "0.2", "0.3"], "--blur takes one number"),
        ([*good, "--min-scale", "2"], "fractions of the image's area"),
        ([*good, "--iterations", "99"], "between 1 and 40"),
        ([*good, "--device", "cuda"], "no GPU"),
        ([*good, "--output", "notes"], "notes is not empty and holds no run"),
        ([*good, "--output", str(finished[0]), "--seed", "5"], "seed 0 there and 5 here"),
        ([*good, "--output", str(runs["cut"])], "checkpoint"),
        ([*good, "--output", str(runs["foreign"])], "checkpoint"),
        ([*good, "--output", str(runs["evil"])], "could run code"),
    ]
    if torch.cuda.is_available():
        cases = [case for case in cases if "cuda" not in case[0]]
    checkpoint = ["--checkpoint", str(finished[0] / "checkpoint.pt")]
    evaluation = [*checkpoint, "--data", str(photos / "same"), "--output", str(tmp_path / "eval"), "--protocol"]
    torch.save({"a": "word"}, tmp_path / "words.pt")
    (tmp_path / "list").write_text("class 1/3.png\nn01.JPEG\n")
    (tmp_path / "double").write_text("3.png\n")
    files = {p: p.read_bytes() for folder in (tmp_path, finished[0]) for p in folder.rglob("*") if p.is_file()}
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments)
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and message in error[-1], (arguments, error)
        assert len(error) == 1 or "usage" in error[0], error
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        train.main([*good, "--batch-size", "16"])
    assert "not divisible by 3 processes; 15 or 18 would be" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    for arguments, message in [
        (["--checkpoint", "nowhere.pt"], "no such file"),
        (["--checkpoint", str(runs["cut"] / "checkpoint.pt")], "checkpoint"),
        (["--checkpoint", str(runs["evil"] / "checkpoint.pt")], "could run code"),
        (["--checkpoint", str(tmp_path / "words.pt")], "no backbone with torchvision's names"),
        ([*checkpoint, "--arch", "resnet50"], "is no resnet50: it lacks layer1.0.conv3.weight"),
        ([*checkpoint, "--arch", "resnet18", "--stem", "imagenet"], "conv1.weight is (64, 3, 3, 3), not (64, 3, 7, 7)"),
        (checkpoint, "needs --data"),
        ([*checkpoint, "--data", str(photos / "renamed")], "no labelled train/ and val/"),
        ([*checkpoint, "--data", str(odd)], "different classes, 'cat' among them"),
        (["--random"], "--random needs --arch"),
        ([*evaluation, "linear", "--batch-size", "49"], "48 labelled images are fewer than one batch of 49"),
        ([*evaluation, "finetune", "--lr", "1", "2"], "give one --lr"),
        ([*evaluation, "linear", "--lr", "nan"], "--lr must be finite"),
        ([*evaluation, "finetune", "--labels-file", "nosuch"], "--labels-file nosuch cannot be read"),
        (
            [*evaluation, "finetune", "--labels-file", str(tmp_path / "list")],
            "'n01.JPEG' is no training image; 1 of 2 names are unknown",
        ),
        ([*evaluation, "finetune", "--labels-file", str(tmp_path / "list"), "--percent", "1"], "give one of them"),
        ([*evaluation, "finetune", "--labels-file", str(tmp_path / "double")], "3 images are called '3.png'"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            linear_eval.main(arguments)
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and message in error[-1] and len(error) == 1, (arguments, error)
    assert not (tmp_path / "executed").exists()
    assert all(p.read_bytes() == content for p, content in files.items())


def test_fresh_keeps_the_earlier_run(photos, tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, "--data", str(photos / "same"), "--output", str(folder), "--max-steps", "1"]
    train.main(arguments)
    before = (folder / "backbone.pt").read_bytes()
    train.main([*arguments, "--fresh", "--seed", "3"])
    assert (tmp_path / "run.1" / "backbone.pt").read_bytes() == before != (folder / "backbone.pt").read_bytes()


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    lock = train.claim(tmp_path / "run", {"epochs": 1}, False)
    for fresh in (False, True):  # --fresh does not pull the folder away from a live run either
        with pytest.raises(SystemExit):
            train.claim(tmp_path / "run", {"epochs": 1}, fresh)
        assert "another process is writing to" in capsys.readouterr().err
    lock.close()
    train.claim(tmp_path / "run", {"epochs": 1}, False).close()


def test_a_damaged_log_or_a_foreign_state(finished, photos, tmp_path, capsys, monkeypatch):
    """The log's bad lines are dropped; a checkpoint that does not fit ends in one line."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    with open(folder / "log.jsonl", "ab") as file:
        file.write(b'{"loss": 2}\n\xff\xfe not json\n')
    arguments = [*TINY, "--data", str(photos / "same"), "--output", str(folder)]
    train.main(arguments)
    assert all(json.loads(line)["step"] >= 0 for line in (folder / "log.jsonl").read_text().splitlines())
    saved = load(folder / "checkpoint.pt")
    for change, message in (({"network": {}}, "does not fit this run"), ({"step": "x"}, "no checkpoint of this script")):
        torch.save(saved | change, folder / "checkpoint.pt")
        with pytest.raises(SystemExit):
            train.main(arguments)
        assert message in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(photos, tmp_path, capsys):
    arguments = [*TINY, "--data", str(photos / "same"), "--output", str(tmp_path / "run")]
    arguments += ["--base-lr", "1e30", "--warmup-epochs", "0"]
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2 and "not finite at step" in capsys.readouterr().err


def test_documented_commands_parse():
    """Every command of the README and of the scripts' own descriptions, by the scripts' parsers."""
    scripts_of = {"train.py": train, "linear_eval.py": linear_eval, "detect_transfer.py": detect_transfer}
    text = (HERE / "README.md").read_text()
    blocks = [b for b in re.findall(r"```bash\n(.*?)```", text, re.S) if not b.startswith("for ")]
    blocks = "\n".join(blocks).replace("\\\n", " ")
    described = [line for script in scripts_of.values() for line in script.__doc__.splitlines() if line.startswith("    ")]
    blocks += "\n" + "\n".join(line for line in described if re.match(r" +(python|torchrun|mkdir) ", line))
    commands = [c.strip() for line in blocks.splitlines() for c in line.split("#")[0].split("&&") if c.strip()]
    seen = set()
    for command in commands:
        words = shlex.split(command)
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if words[0] in ("torchrun", "python", "srun") and scripts:
            script, arguments = Path(words[scripts[0]]).name, [w for w in words[scripts[0] + 1 :] if w != "&"]
            seen.add(script)
            if script == "intl.py":
                assert set(arguments) <= {"--plot", "--benchmark"} or arguments[0] == "--plot", command
            else:
                scripts_of[script].parse(arguments)
        else:
            assert words[0] in ("git", "cd", "python3", ".", "pip", "pytest", "mkdir", "tensorboard", "trap", "wait"), command
    assert seen == {"intl.py", *scripts_of}


def test_documented_python_runs(tmp_path, monkeypatch):
    """The README's three pieces, with small things in the place of the reader's own."""
    monkeypatch.chdir(tmp_path)
    loop, result, make = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    names = {"backbone": nn.Sequential(nn.Flatten(), nn.Linear(12, 512)), "loader": [torch.randn(2, 16, 3, 2, 2)]}
    exec(loop, names)
    assert {"alignment", "trace", "floor", "score", "least"} == set(names["criterion"].parts)
    Path("runs/imagenet").mkdir(parents=True)
    torch.save(train.build_backbone("resnet50", "imagenet", 32)[0].state_dict(), "runs/imagenet/backbone.pt")
    names = {"torch": torch, "torchvision": torchvision}
    exec(result.replace("backbone.load", "found = backbone.load"), names)
    assert names["found"].missing_keys == ["fc.weight", "fc.bias"] and not names["found"].unexpected_keys

    class Pictures(list):
        classes, targets = ["a", "b"], [0, 1, 0]

    pictures = Pictures((PIL.Image.new("RGB", (4, 4)), target) for target in Pictures.targets)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train, download: pictures)
    exec(make, {})
    images, val = train.load_data("folder", "cifar10_small", 0, torch.device("cpu"))
    assert images.labels.tolist() == val.labels.tolist() == [0, 0, 1]


def test_documented_slurm_script_saves_before_it_requeues(tmp_path):
    """By bash itself, with functions in the place of Slurm's programs, and Slurm's signal."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", (HERE / "README.md").read_text(), re.S)
    stand_ins = """
    step() { trap 'sleep 0.5; echo saved; exit 1' TERM; echo $BASHPID > step; echo started; while :; do sleep 0.05; done; }
    srun() { step & trap "kill -KILL $!; exit 1" TERM; wait $!; }  # which does not pass SIGTERM on
    scancel() { [ "$*" = "--signal=TERM 7.0" ] && kill -TERM $(cat step); }
    scontrol() { if [ $1 = requeue ]; then echo requeued $2; else echo first; fi; }
    """
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    command, names = ["bash", "-c", stand_ins + script], {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "first"}
    job = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT | names, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "started\n"
    job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=60)[0].splitlines() == ["saved", "requeued 7"]


def test_documented_names_exist(capsys):
    """Every flag, and every function or class, that the README's text names in backticks."""
    text = re.sub(r"```.*?```", "", (HERE / "README.md").read_text(), flags=re.S)
    quoted = re.findall(r"`([^`]+)`", text)
    for script in (train, linear_eval, detect_transfer):
        with pytest.raises(SystemExit):
            script.parse(["--help"])
    helps = capsys.readouterr().out + (HERE / "intl.py").read_text()
    flags = {flag for words in quoted if "torchrun" not in words for flag in re.findall(r"(?<!\S)--[a-z-]+", words)}
    assert len(flags) > 20 and not {f for f in flags if not re.search(rf"{f}\b", helps)} - {"--ipc"}
    names = {
        match[1]
        for words in quoted
        if (match := re.match(r"(\w*[a-z]\w*)\(", words) or re.fullmatch(r"([A-Z]\w*Loss)", words))
    }
    modules = (intl, train, linear_eval, detect_transfer)
    assert len(names) > 3 and not {n for n in names if not any(hasattr(m, n) for m in modules)} - {"criterion"}


def test_documented_comparison_starts_every_method(tmp_path):
    """The README's loop, by bash itself, with functions in the place of the programs."""
    (loop,) = re.findall(r"```bash\n(for .*?)```", (HERE / "README.md").read_text(), re.S)
    echo = "() { printf '%s\\n' \"$@\" | python3 -c 'import json, sys; print(json.dumps(sys.stdin.read().splitlines()))'; }\n"
    run = subprocess.run(
        ["bash", "-ec", f"torchrun{echo}python{echo}{loop}"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    commands = [json.loads(line) for line in run.stdout.splitlines()]
    trained = [train.parse(words[1:]) for words in commands if words[0] == "train.py"]
    for args, recipe in trained:
        train.check(recipe, args)
    evaluated = [linear_eval.parse(words[1:]) for words in commands if words[0] == "linear_eval.py"]
    assert len(trained) + len(evaluated) == len(commands) and evaluated.pop().compare
    assert [f"{args.output}/checkpoint.pt" for args, _ in trained] == [args.checkpoint for args in evaluated]
    methods = {(r.loss, r.orthogonality) for _, r in trained}
    assert len(methods) == 9 and len(trained) == 27 == len({(args.output, args.seed) for args, _ in trained})


# ------------------------------------------------------------------------------------------------------------------
# Evaluation of anybody's backbone


def published(state):
    """The same backbone as the publishers lay it out, with what has to be dropped."""

    def prefixed(prefix, *others):
        extra = {f"{prefix}fc.weight": torch.zeros(3, 512), f"{prefix}fc.bias": torch.zeros(3)}
        return {prefix + k: v for k, v in state.items()} | extra | {name: torch.zeros(2) for name in others}

    momentum = {k.replace("module.encoder_q.", "module.encoder_k."): v * 0 for k, v in prefixed("module.encoder_q.").items()}
    moco3 = {k.replace("_q.", "_k."): v for k, v in momentum.items()}
    return {
        "official INTL": {"epoch": 3, "arch": "resnet18", "optimizer": {}, "state_dict": {
            "module.backbone." + k: v for k, v in state.items()} | {"module.projector.0.weight": torch.zeros(2)}},
        "MoCo v1, v2": {"epoch": 3, "state_dict": momentum | prefixed("module.encoder_q.", "module.queue", "module.queue_ptr")},
        "MoCo v3": {"epoch": 3, "state_dict": moco3 | prefixed("module.base_encoder.", "module.predictor.0.weight")},
        "Barlow Twins": state | {"fc.weight": torch.zeros(3, 512)},
        "VICReg": {"model": prefixed("module.backbone.", "module.projector.0.weight")},
        "DINO": {"student": {}, "teacher": prefixed("backbone.", "head.mlp.0.weight"), "args": argparse.Namespace(a=1)},
        "DINO, wrapped": {"teacher": prefixed("module.backbone.", "module.head.mlp.0.weight")},
        "SwAV": prefixed("module.", "module.projection_head.0.weight", "module.prototypes.weight"),
        "solo-learn": {"state_dict": prefixed("backbone.", "projector.0.weight", "classifier.weight")},
        "stranger": {"state_dict": prefixed("my.own.", "loss.weight")},
    }  # fmt: skip


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_every_publishers_checkpoint_gives_the_features_of_the_bare_network(arch, tmp_path, capsys):
    torch.manual_seed(0)
    network = train.build_backbone(arch, "imagenet", 32)[0].eval()
    x = randn(2, 3, 32, 32, dtype=torch.float32)
    for p in network.state_dict().values():
        p.add_(torch.rand_like(p) * 0.1 if p.is_floating_point() else 3)
    for name, content in published(network.state_dict()).items():
        torch.save(content, tmp_path / "c.pt")
        checkpoint = linear_eval.read_checkpoint(tmp_path / "c.pt", size=32)
        assert (checkpoint.arch, checkpoint.stem) == (arch, "imagenet"), name
        backbone, _ = train.build_backbone(checkpoint.arch, checkpoint.stem, checkpoint.size)
        backbone.load_state_dict(checkpoint.state)
        assert torch.equal(backbone.eval()(x), network(x)), name
        assert "missing none" in capsys.readouterr().out


def test_what_a_file_does_not_tell_is_asked_for_or_read_beside_it(tmp_path, capsys):
    """A 3x3 stem has stride 1 or 2; train.py's backbone.pt lies beside its config.json."""
    state = train.build_backbone("resnet18", "small", 32)[0].state_dict()
    assert len({linear_eval.digest_of(s) for s in (state, {k: v.bfloat16() for k, v in state.items()})}) == 2
    torch.save(state, tmp_path / "backbone.pt")

    def refused(content, message, stem=None):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(SystemExit):
            linear_eval.read_checkpoint(tmp_path / "c.pt", stem=stem)
        assert message in capsys.readouterr().err

    refused(state, "give --stem cifar (1) or --stem small (2")
    refused({f"{p}.{k}": v for k, v in state.items() for p in ("online", "target")}, "several networks (online., target.)")
    refused(state | {"layer1.0.conv1.weight": state["layer1.0.conv1.weight"] * math.nan}, "not finite", "small")
    (tmp_path / "config.json").write_text('{"arch": "resnet18", "stem": "small", "view_sizes": [48, 32]}')
    checkpoint = linear_eval.read_checkpoint(tmp_path / "backbone.pt")
    assert (checkpoint.stem, checkpoint.size) == ("small", 48)


def test_the_official_stem_is_torchvisions():
    """Zero padding of 1 and a convolution with padding 2 = padding 3."""
    x, w = randn(1, 3, 20, 20), randn(4, 3, 7, 7)
    torch.testing.assert_close(F.conv2d(F.pad(x, (1,) * 4), w, stride=2, padding=2), F.conv2d(x, w, stride=2, padding=3))


def test_every_architecture_is_recognised_by_its_shapes():
    names = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d"]
    for arch in [*names, "vit_tiny", "vit_small", "vit_b_16"]:
        for stem in ("imagenet", "cifar"):
            with torch.device("meta"):
                state = train.build_backbone(arch, stem, 32)[0].state_dict()
            assert linear_eval.recognise(Path("x"), state) == arch
            if arch.startswith("vit"):
                assert linear_eval.measure(state) == (stem, 32)
            else:
                assert linear_eval.measure(state) == {"imagenet": ("imagenet", 224), "cifar": (None, 32)}[stem]


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
    (own, top5), other = linear_eval.linear_on_features(x, y, x_val, y_val, 5, [0.01, 0.1], 500, 0)
    assert abs(own - expected) <= 1 and abs(other[0] - expected) <= 1 and top5 == 100


def evaluate(arguments, monkeypatch):
    """linear_eval.main in this process; the backbone, and its weights before."""
    networks, build = [], linear_eval.build_backbone

    def spy(*arguments):
        network, width = build(*arguments)
        if not network.conv1.weight.is_meta:
            networks.append(network)
        return network, width

    monkeypatch.setattr(linear_eval, "build_backbone", spy)
    linear_eval.main(list(map(str, arguments)))
    monkeypatch.setattr(linear_eval, "build_backbone", build)
    return networks[-1].state_dict()


def test_runs_are_compared_by_what_differs_among_them(finished, photos, tmp_path, capsys):
    linear_eval.main(["--checkpoint", str(finished[0] / "checkpoint.pt"), "--data", str(photos / "same"), "--epochs", "1"])
    top1, knn = (json.loads(line)["top1"] for line in (finished[0] / "results.jsonl").read_text().splitlines()[-2:])
    rank = json.loads((finished[0] / "log.jsonl").read_text().splitlines()[-1])["embedding_rank"]
    for name, seed, loss, gain in (("a", 0, "intl", 0), ("b", 1, "intl", 2), ("c", 0, "none", 5)):
        shutil.copytree(finished[0], tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"seed": seed, "loss": loss}
        config |= {"groups": 4 + gain, "orthogonality": "so" if loss == "none" else None} if seed == 0 else {}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        results = [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        rows = [json.dumps(r | {"top1": r["top1"] + gain}) + "\n" for r in results]
        (tmp_path / name / "results.jsonl").write_text("".join(rows))
    capsys.readouterr()
    picture = tmp_path / "spectrum.png"
    has_matplotlib = importlib.util.find_spec("matplotlib")
    linear_eval.main(["--compare", *map(str, sorted(tmp_path.iterdir()))] + ["--plot", str(picture)] * bool(has_matplotlib))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert table[0][2:4] == ["linear top-1", "5-NN top-1"] and [row[:2] for row in table[2:]] == [
        ["loss intl", "2"],
        ["loss none, orthogonality so", "1"],
    ]
    assert table[2][2:6:3] == [f"{top1 + 1:.3g} ± 1.4", f"{rank:.3g} ± 0"] and table[3][3] == f"{knn + 5:.3g}"
    assert picture.exists() == bool(has_matplotlib)

    def refused(name):
        with pytest.raises(SystemExit):
            linear_eval.main(["--compare", str(tmp_path / "c"), str(tmp_path / name)])
        return capsys.readouterr().err

    (tmp_path / "b" / "results.jsonl").unlink()
    assert "b is no run of train.py that can be read" in refused("b")
    log = tmp_path / "a" / "log.jsonl"
    *earlier, last = log.read_text().splitlines(keepends=True)
    log.write_text("".join(earlier))
    assert "a has reached epoch 3 of 4" in refused("a")
    log.write_text("".join(earlier) + json.dumps({k: v for k, v in json.loads(last).items() if k != "embedding_spectrum"}))
    assert "stopped at its very last step" in refused("a")


def test_the_backbone_is_frozen_unless_it_is_fine_tuned(finished, photos, tmp_path, monkeypatch, capsys):
    options = ["--checkpoint", finished[0] / "checkpoint.pt", "--data", photos / "same", "--output", tmp_path]
    options += ["--epochs", "2", "--batch-size", "16", "--workers", "1"]
    before = (finished[0] / "checkpoint.pt").read_bytes()
    weights = backbone_of(finished[0])
    after = evaluate([*options, "--protocol", "linear", "features", "knn"], monkeypatch)
    assert all(torch.equal(weights[k], after[k]) for k in weights)
    table = capsys.readouterr().out
    assert (
        all(f"{p:10} " in table for p in ("linear", "features", "knn")) and table.count("as published") == 1
    )  # knn; the others had 2 epochs
    tuned = evaluate([*options, "--protocol", "finetune", "--percent", "100"], monkeypatch)
    moved = {k for k in weights if not torch.equal(weights[k], tuned[k])}
    assert moved == set(weights)  # weights, BN's statistics and counters
    again = linear_eval.read_checkpoint(tmp_path / "checkpoint.finetune.100.pt")  # its own files know their network
    assert (again.arch, again.stem, again.size, again.config["dataset"]) == ("resnet18", "cifar", 16, "folder")
    assert all(torch.equal(again.state[k], tuned[k]) for k in tuned)
    with pytest.raises(SystemExit):
        evaluate([*options, "--protocol", "finetune", "--percent", "100", "--precision", "bfloat16"], monkeypatch)
    assert "other settings (precision): give --fresh" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["protocol"] for row in rows] == ["features", "knn", "linear", "finetune"]
    assert all(row["validation_images"] == 15 and row["weights"] == "pretrained" for row in rows)
    assert (finished[0] / "checkpoint.pt").read_bytes() == before


def test_linear_classifiers_do_not_influence_each_other_and_resume(finished, photos, tmp_path, monkeypatch, capsys):
    """A classifier trained beside others, or stopped on its way, is bitwise the one trained alone."""
    options = ["--checkpoint", finished[0] / "checkpoint.pt", "--data", photos / "same", "--protocol", "linear"]
    options += ["--epochs", "3", "--batch-size", "16", "--output"]
    evaluate([*options, tmp_path / "alone", "--lr", "1"], monkeypatch)
    calls, any_process = [], linear_eval.any_process

    def stop_in_the_second_epoch(flag, device):
        calls.append(1)
        return len(calls) == 4

    monkeypatch.setattr(linear_eval, "any_process", stop_in_the_second_epoch)
    with pytest.raises(SystemExit) as stopped:
        evaluate([*options, tmp_path / "both", "--lr", "0.1", "1"], monkeypatch)
    assert stopped.value.code == 0 and "saved at step 4 of 9" in capsys.readouterr().out
    del stopped  # with its frames, which hold the lock of the file
    monkeypatch.setattr(linear_eval, "any_process", any_process)
    evaluate([*options, tmp_path / "both", "--lr", "0.1", "1"], monkeypatch)
    assert "resuming at step 4 of 9" in capsys.readouterr().out
    alone, both = (load(tmp_path / name / "checkpoint.linear.pt")["model"] for name in ("alone", "both"))
    assert torch.equal(alone["heads.0.weight"], both["heads.1.weight"]) and set(alone) == {"heads.0.weight", "heads.0.bias"}
    rows = [json.loads((tmp_path / name / "results.jsonl").read_text())["results"] for name in ("alone", "both")]
    assert rows[0][0] == rows[1][1]


def test_evaluation_schedules():
    published = {0: 1, 59: 1, 60: 0.1, 79: 0.1, 80: 0.01, 99: 0.01}
    for epoch, factor in published.items():
        assert linear_eval.rate_factor("linear", 5 * epoch, 5, 100) == pytest.approx(factor)
        assert linear_eval.rate_factor("linear", 5 * epoch + 4, 5, 100) == pytest.approx(factor)
    for step, factor in {0: 1, 50: 0.5, 100: 0}.items():
        assert linear_eval.rate_factor("finetune", step, 5, 20) == pytest.approx(factor, abs=1e-7)


def test_labelled_images_are_of_every_class_or_those_of_the_list(photos, tmp_path):
    images, _ = train.load_data("folder", str(photos / "same"), 0, torch.device("cpu"))
    for percent, each in ((1, 1), (10, 2), (100, 16)):
        some = linear_eval.subset(images, linear_eval.labelled_rows(images, percent, None, 0))
        assert some.labels.bincount().tolist() == [each] * 3
        assert all(torch.equal(train.decode(p), x) for p, x in zip(some.paths, some.pixels))
    again = linear_eval.labelled_rows(images, 10, None, 0).tolist()
    assert again == linear_eval.labelled_rows(images, 10, None, 0).tolist()
    assert again != linear_eval.labelled_rows(images, 10, None, 1).tolist()
    (tmp_path / "list.txt").write_text("class 2/3.png\nclass 0/11.png\n\n")
    some = linear_eval.subset(images, linear_eval.labelled_rows(images, 100, tmp_path / "list.txt", 0))
    assert ["/".join(Path(p).parts[-2:]) for p in some.paths] == ["class 0/11.png", "class 2/3.png"]
    assert some.labels.tolist() == [0, 2]


def test_every_validation_image_counts_once_over_processes(tmp_path):
    """1,001 images on 1, 2 and 3 processes: the same top-1 of every protocol."""
    for split, n in (("train", 60), ("val", 1001)):
        for i in range(n):
            path = tmp_path / split / f"class {i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = torch.randint(0, 100, (3, 8, 8), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
            image[i % 3] += 100 * (torch.rand(1, generator=torch.Generator().manual_seed(i)) < 0.8).byte()
            torchvision.io.write_png(image, str(path))
    options = ["--random", "--arch", "resnet18", "--stem", "cifar", "--size", "8", "--data", tmp_path, "--lr", "5"]
    options += ["--protocol", "features", "knn", "linear", "--epochs", "6", "--batch-size", "12", "--output", tmp_path]
    for processes in (0, 2, 3):
        run = run_script("linear_eval.py", *options, "--fresh", processes=processes)
        assert run.returncode == 0 and "RANDOM" in run.stdout, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["processes"] for row in rows] == [1] * 3 + [2] * 3 + [3] * 3
    for protocol in ("features", "knn", "linear"):
        results = [row["results"] for row in rows if row["protocol"] == protocol]
        assert results[0] == results[1] == results[2] and rows[0]["validation_images"] == 1001
        count = results[0][0]["top1"] * 1001 / 100
        assert count == pytest.approx(round(count), abs=1e-9) and (count > 800 or protocol == "features")


# ------------------------------------------------------------------------------------------------------------------
# Detection


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """6 training and 11 validation scenes in COCO's format."""
    folder = tmp_path_factory.mktemp("scenes")
    detect_transfer.write_shapes(folder, 0, {"train": 6, "val": 11})
    return folder


def coco(folder, split, masks=True, training=False):
    return detect_transfer.CocoImages(folder / split, folder / "annotations" / f"instances_{split}.json", masks, training)


SMALL = """--short-sides 64 --test-short-side 64 --long-side 128 --train-proposals 50 10 --test-proposals 50 5 --rois 8
    --images 8 --detections 5 --batch-size 2 --warmup-images 2 --log-every 1 --workers 0 --precision float32""".split()  # noqa: SIM905


def detector(finished, *flags):
    """The detector of these flags on the tiny run's backbone, for 3 categories, and the checkpoint."""
    _, recipe = detect_transfer.parse([*SMALL, *flags])
    checkpoint = linear_eval.read_checkpoint(finished[0] / "checkpoint.pt")
    torch.manual_seed(0)
    return detect_transfer.build_detector(recipe, checkpoint, False, 4, torch.float32), checkpoint.state


def example():
    image = torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 70, 90, dtype=torch.uint8)
    masks[0, 10:40, 10:50] = masks[1, 30:60, 40:80] = 1
    boxes = torch.tensor([[10.0, 10, 50, 40], [40, 30, 80, 60]])
    return image, {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}


def backbone_part(model):
    """Its tensors under torchvision's names."""
    if hasattr(model.backbone.part, "body"):
        return dict(model.backbone.part.body.state_dict())
    res5 = model.roi_heads.box_head.part[0].state_dict()
    return model.backbone.part.state_dict() | {f"layer4.{k}": v for k, v in res5.items()}


@pytest.mark.parametrize("norm", ["bn", "frozen"])
@pytest.mark.parametrize("model", ["c4", "fpn"])
def test_the_detector_has_the_backbones_weights_and_moves_what_it_should(model, norm, finished):
    flags = ["--model", model, "--norm", norm, "--trainable-layers", "3"]
    network, state = detector(finished, *flags, *(["--anchors", "8", "16", "32", "64", "128"] if model == "fpn" else []))
    part = backbone_part(network)
    still = ("conv1", "bn1", "layer1")
    fixed = {k for k in state if re.search(r"bn|downsample.1", k) and (norm == "frozen" or k.startswith(still))}  # of BN
    assert set(part) == {k for k in state if k not in fixed or "num_batches" not in k}
    assert all(torch.equal(state[k], part[k]) for k in part)
    image, target = example()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01)
    sum(network.train()([image], [target])[k] for k in ("loss_classifier", "loss_mask")).backward()
    optimizer.step()
    for k, v in backbone_part(network).items():
        assert torch.equal(v, state[k]) == (k in fixed or k.startswith(still)), k


def test_c4_equals_an_independent_computation(finished):
    """Boxes' and masks' logits from the checkpoint's tensors: trunk, RoIAlign, res5, BN, pooling, predictors."""
    network, state = detector(finished)
    network.eval()
    seen = {}
    for name in ("box_predictor", "mask_predictor", "box_roi_pool"):
        part = getattr(network.roi_heads, name)
        part.register_forward_hook(lambda _, inputs, output, name=name: seen.setdefault(name, []).append((inputs, output)))
    x = randn(1, 3, 64, 96, dtype=torch.float32)
    network([x[0]])
    resnet = torchvision.models.resnet18()
    resnet.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    resnet.maxpool = nn.Identity()
    resnet.load_state_dict(state, strict=False)
    resnet.eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    h = (x - mean[:, None, None]) / std[:, None, None]
    for part in (resnet.conv1, resnet.bn1, resnet.relu, resnet.layer1, resnet.layer2, resnet.layer3):
        h = part(h)
    for (inputs, _), kind in zip(seen["box_roi_pool"], ("box_predictor", "mask_predictor")):
        rois = torchvision.ops.roi_align(h, inputs[1], 14, 0.25, 0, aligned=True)  # this stem's stride is 4, not 16
        shared = resnet.layer4(rois) / (1 + 1e-5) ** 0.5
        if kind == "box_predictor":
            predictor, pooled = network.roi_heads.box_predictor, shared.mean((2, 3))
            for layer, got in zip((predictor.cls_score, predictor.bbox_pred), seen[kind][0][1]):
                torch.testing.assert_close(got, pooled @ layer.weight.T + layer.bias, rtol=1e-5, atol=1e-5)
        else:
            predictor = network.roi_heads.mask_predictor
            up = F.conv_transpose2d(shared, predictor.conv5_mask.weight, predictor.conv5_mask.bias, stride=2).relu()
            expected = F.conv2d(up, predictor.mask_fcn_logits.weight, predictor.mask_fcn_logits.bias)
            torch.testing.assert_close(seen[kind][0][1], expected, rtol=1e-5, atol=1e-5)
            assert len(expected) > 0


def test_c4_training_runs_res5_once_and_has_the_published_losses(finished, monkeypatch):
    """Against torchvision's own heads, with L1 in the place of its smooth L1. Those run res5 twice."""
    network, _ = detector(finished)
    heads = network.roi_heads
    heads.box_head.part[1] = nn.Identity()  # BN would see different regions in the two
    heads.box_head.eval()
    image, target = example()
    features = network.backbone(image[None])
    calls = []
    heads.box_head.register_forward_hook(lambda *_: calls.append(1))
    proposals = [torch.cat([target["boxes"] + 2, torch.tensor([[0.0, 0, 30, 30], [50, 5, 90, 30]])])]
    torch.manual_seed(1)
    _, mine = heads(features, proposals, [(70, 90)], [target])
    assert len(calls) == 1
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads.box_predictor = nn.Sequential(pooled, heads.box_predictor)
    heads.mask_roi_pool, heads.mask_head = heads.box_roi_pool, heads.box_head
    theirs = torchvision.models.detection.roi_heads
    monkeypatch.setattr(theirs.F, "smooth_l1_loss", lambda a, b, beta, reduction: F.l1_loss(a, b, reduction=reduction))
    monkeypatch.setattr(
        theirs, "project_masks_on_boxes", lambda m, b, i, size: detect_transfer.crop_masks(m[i].clone(), b, size)
    )
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
    torch.testing.assert_close(mine, (F.binary_cross_entropy_with_logits(objectness[used, 0], labels[0][used]), box))


def test_masks_survive_the_way_through_their_boxes(scenes, tmp_path):
    """Cropped to 28 x 28 and pasted back the drawn masks lose little; half a pixel of displacement would cost 10 AP."""
    data, results, displaced = coco(scenes, "val"), [], []
    for image_id in data.ids:
        target = data.target(image_id)
        height, width = target["masks"].shape[1:]
        crops = detect_transfer.crop_masks(target["masks"], target["boxes"], 28)[:, None]
        for kept, shift in ((results, 0), (displaced, 0.7)):
            masks = detect_transfer.paste_masks(crops, target["boxes"] + shift, height, width)
            found = {k: target[k] for k in ("boxes", "labels")} | {"scores": torch.ones(len(masks)), "masks": masks}
            kept += detect_transfer.as_results(found, image_id, data)
    ap, worse = (detect_transfer.average_precision(data, r, tmp_path)["segm"][0] for r in (results, displaced))
    assert ap > 93 and worse < ap - 5, (ap, worse)


def truth(data):
    """The annotations of a data set as if a network had found them."""
    results = []
    for image_id in data.ids:
        target = data.target(image_id)
        results += detect_transfer.as_results(target | {"scores": torch.ones(len(target["labels"]))}, image_id, data)
    return results


def test_ground_truth_has_an_ap_of_100(scenes, tmp_path):
    ap = detect_transfer.average_precision(data := coco(scenes, "val"), truth(data), tmp_path)
    assert ap["bbox"][:3] == pytest.approx([100] * 3) and ap["segm"][:3] == pytest.approx([100] * 3)


PENNFUDAN = HERE.parent / "shared" / "data" / "pennfudan"


@pytest.mark.skipif(not PENNFUDAN.exists(), reason="Penn-Fudan is not beside the checkout")
def test_ground_truth_of_photographs_has_an_ap_of_100(tmp_path):
    for suffix in ("", "_poly"):
        annotations = PENNFUDAN / "annotations" / f"instances_val{suffix}.json"
        data = detect_transfer.CocoImages(PENNFUDAN / "images" / "val", annotations, True, False)
        ap = detect_transfer.average_precision(data, truth(data), tmp_path)
        assert ap["bbox"][0] == pytest.approx(100) and ap["segm"][0] == pytest.approx(100)


def test_ap_is_pycocotools_on_the_written_results(scenes, tmp_path):
    """Of displaced boxes and eroded masks with random scores."""
    data, results = coco(scenes, "val"), []
    for i, r in enumerate(truth(data)):
        mask = torch.from_numpy(data.coco.annToMask(r)).bool()
        mask[:, : mask.shape[1] // 2] &= i % 3 > 0
        score = torch.rand((), generator=torch.Generator().manual_seed(i)).item()
        results.append(r | detect_transfer.measured(mask) | {"score": score})
    ap = detect_transfer.average_precision(data, results, tmp_path)
    for kind in ("bbox", "segm"):
        truths = pycocotools.coco.COCO(scenes / "annotations" / "instances_val.json")
        evaluation = pycocotools.cocoeval.COCOeval(truths, truths.loadRes(str(tmp_path / f"results_{kind}.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert ap[kind][:4] == pytest.approx(list(100 * evaluation.stats[:4])) and 5 < ap[kind][0] < 95
    assert detect_transfer.average_precision(data, [], tmp_path) == {"bbox": [0.0] * 6, "segm": [0.0] * 6}


def test_detections_do_not_depend_on_the_number_of_processes(finished, scenes, tmp_path):
    """11 images on 1, 2 and 3 processes: the same results file and AP. The first trains, the others find nothing left to do."""
    flags = [*SMALL, "--data", scenes, "--checkpoint", finished[0] / "checkpoint.pt", "--output", tmp_path / "run"]
    flags += ["--batch-size", "6", "--images", "36", "--warmup-images", "1", "--base-lr", "0.02"]
    lines, files = [], []
    for processes in (0, 2, 3):
        run = run_script("detect_transfer.py", *flags, processes=processes)
        assert run.returncode == 0, run.stderr
        lines.append([line for line in run.stdout.splitlines() if "box AP" in line][-1])
        files.append([json.loads((tmp_path / "run" / f"results_{kind}.json").read_text()) for kind in ("bbox", "segm")])
    assert lines[0] == lines[1] == lines[2] and "11 images" in lines[0] and "mask AP" in lines[0]
    assert files[0] == files[1] == files[2] and len(files[0][0]) > 11
    assert (tmp_path / "run" / "predictions.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags", ["", "--model fpn --anchors 8 16 32 64 128 --no-masks"])
def test_a_stopped_detection_run_ends_bitwise_like_an_undisturbed_one(flags, finished, scenes, tmp_path, capsys):
    flags = [*SMALL, *flags.split(), "--data", str(scenes), "--checkpoint", str(finished[0] / "checkpoint.pt"), "--output"]
    detect_transfer.main([*flags, str(tmp_path / "whole")])
    detect_transfer.main([*flags, str(tmp_path / "halves"), "--max-steps", "2"])
    detect_transfer.main([*flags, str(tmp_path / "halves")])
    assert "resuming at step 2 of 4" in capsys.readouterr().out
    whole, halves = (load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "halves"))
    assert all(torch.equal(v, halves[k]) for k, v in whole.items())


def test_detection_schedule_is_the_published_one():
    """180,000 steps of 16 images at 0.02, a tenth from 120,000 and again from 160,000; half of it for 1x."""
    _, recipe = detect_transfer.parse(["--recipe", "coco-2x"])
    rates = {0: 0.00002, 500: 0.010010, 1000: 0.02, 119_999: 0.02, 120_000: 0.002, 160_000: 0.0002, 179_999: 0.0002}
    for step, rate in rates.items():
        assert detect_transfer.learning_rate(step, recipe) == pytest.approx(rate, rel=1e-4)
    assert recipe.images == 16 * 180_000 and detect_transfer.parse(["--recipe", "coco-1x"])[1].images == 16 * 90_000
    _, small = detect_transfer.parse(["--recipe", "coco-2x", "--batch-size", "2"])
    assert detect_transfer.learning_rate(8 * 100_000, small) == pytest.approx(0.02 / 8)


def test_detection_batches_cover_every_epoch_on_any_number_of_processes(monkeypatch):
    whole = list(detect_transfer.Stream(10, 4, 0, 0, 5))
    keys = sum(whole, [])
    assert [position for position, _ in keys] == list(range(20))
    assert all(sorted(i for _, i in keys[e : e + 10]) == list(range(10)) for e in (0, 10))
    assert list(detect_transfer.Stream(10, 4, 0, 2, 5)) == whole[2:]
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(list(detect_transfer.Stream(10, 4, 0, 0, 5)))
    assert [sorted(a + b) for a, b in zip(*shares)] == whole


def write_coco(folder, **changes):
    """Two grey pictures, category ids 7 and 90, a crowd, a degenerate box, one outside, a picture without objects."""
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            torchvision.io.write_png(
                torch.full((1, 20, 30), 90, dtype=torch.uint8), str(folder / "images" / split / f"{i}.png")
            )
        annotation = {"image_id": 5, "iscrowd": 0, "area": 100, "segmentation": [[2, 3, 12, 3, 12, 13, 2, 13]]}
        content = {
            "images": [{"id": i + 5, "file_name": f"{i}.png", "height": 20, "width": 30} for i in range(2)],
            "categories": [{"id": 90, "name": "late"}, {"id": 7, "name": "early"}],
            "annotations": [
                annotation | {"id": 1, "category_id": 90, "bbox": [2, 3, 10, 10]},
                annotation | {"id": 2, "category_id": 7, "bbox": [2, 3, 10, 10], "iscrowd": 1,
                              "segmentation": {"size": [20, 30], "counts": [60, 540]}},
                annotation | {"id": 3, "category_id": 7, "bbox": [2, 3, 0.5, 10]},
                annotation | {"id": 4, "category_id": 7, "bbox": [40, 3, 5, 5]},
            ],
        }  # fmt: skip
        content |= changes.get(split, {})
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_coco_images_of_every_kind(tmp_path):
    folder = write_coco(tmp_path)
    args = detect_transfer.parse(["--recipe", "coco-1x", "--data", str(folder)])[0]
    (images, annotations), _ = detect_transfer.find_data(args).values()
    train_set = detect_transfer.CocoImages(images, annotations, True, True)
    assert train_set.names == ["early", "late"] and train_set.ids == [5]  # image 6 has no objects
    for position in range(4):
        image, target = train_set[position, 0]
        flipped = target["boxes"][0, 0] != 2
        assert image.shape == (3, 20, 30) and target["labels"].tolist() == [2]
        assert target["boxes"].tolist() == [[18, 3, 28, 13] if flipped else [2, 3, 12, 13]]
        ys, xs = target["masks"][0].nonzero().unbind(1)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == target["boxes"][0].tolist()
    val_set = detect_transfer.CocoImages(images, annotations, True, False)
    assert val_set.ids == [5, 6] and val_set[1][1] == 6 and val_set[1][0].shape == (3, 20, 30)
    assert val_set.target(6)["boxes"].shape == (0, 4) and val_set.target(6)["masks"].shape == (0, 20, 30)
    assert [a["id"] for a in val_set.coco.dataset["annotations"]] == [1, 2, 3, 4]  # whatever the file said


def test_photographs_are_turned_as_their_camera_says(tmp_path):
    pixels = torch.arange(64 * 32 * 3, dtype=torch.float32).reshape(3, 32, 64).div(24.1).to(torch.uint8)
    image = PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert train.decode(tmp_path / "a.jpg").shape == (3, 32, 64)
    turned = train.decode(tmp_path / "a.jpg", upright=True)
    assert turned.shape == (3, 64, 32) and (turned.float() - pixels.float().rot90(-1, (1, 2))).abs().mean() < 3


def test_bad_detection_commands_fail_with_one_clear_line(finished, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = ["--checkpoint", str(finished[0] / "checkpoint.pt")]
    image = {"id": 5, "file_name": "nosuch.png", "height": 20, "width": 30}
    vit = train.build_backbone("vit_tiny", "cifar", 16)[0].state_dict()
    torch.save(vit, tmp_path / "vit.pt")

    def data(name, **changes):
        return [*SMALL, *checkpoint, "--recipe", "coco-1x", "--data", str(write_coco(tmp_path / name, **changes))]

    (tmp_path / "empty").mkdir()
    good = [*SMALL, *checkpoint, "--data", str(scenes)]
    wrong = {"id": 5, "file_name": "0.png", "height": 20, "width": 31}
    annotation = {"id": 1, "image_id": 5, "category_id": 7, "bbox": [2, 3, 9, 9], "area": 9}
    annotation["segmentation"] = [[2, 3, 9, 3, 9, 9]]
    cases = [
        (data("a", train={"images": [image]}), "nosuch.png, which is not in"),
        (data("b", val={"categories": [{"id": 7, "name": "early"}, {"id": 90}]}), "category 90 has no name"),
        (data("c", train={"annotations": []}), "holds no images with objects"),
        (data("d", train={"categories": [{"id": 7, "name": "early"}]}), "annotation 1 has the unknown category 90"),
        (data("e", val={"categories": [{"id": 7, "name": "early"}, {"id": 90, "name": "x"}]}), "ids: 'late' and 'x'"),
        (data("f", train={"images": [wrong], "annotations": [annotation]}), "0.png has 30 x 20 pixels, but"),
        (data("h", val={"images": [wrong], "annotations": []}), "0.png has 30 x 20 pixels, but"),
        (data("i", train={"images": [image, image]}), "an image id or a category id occurs twice"),
        *[
            (data(f"j{i}", val={"annotations": [annotation | change]}), message)
            for i, (change, message) in enumerate(
                [
                    ({"bbox": [1, 2, 3]}, "needs a bbox of four numbers"),
                    ({"bbox": [1, 2, 3, math.nan]}, "needs a bbox of four numbers"),
                    ({"bbox": None}, "needs a bbox of four numbers"),
                    ({"area": "big"}, "needs a bbox of four numbers and an area"),
                    ({"segmentation": []}, "no usable segmentation"),
                    ({"segmentation": [[1, 2, 3, 4, 5]]}, "no usable segmentation"),
                    ({"segmentation": {"size": [20, 30], "counts": [60, 54]}}, "no usable segmentation"),
                    ({"segmentation": {"size": [2, 3], "counts": "abc"}}, "no usable segmentation"),
                    ({"image_id": 8}, "is of image 8, which is not listed"),
                ]
            )
        ],
        (data("g", train={"images": 3}), "is no COCO annotation file"),
        ([*good, "--data", "empty"], "no images for train: tried empty/train, empty/train2017"),
        ([*good, "--data", "nowhere"], "nowhere: no such folder"),
        ([*good, "--recipe", "coco-2x", "--val-images", "x"], "go together"),
        ([*SMALL, "--recipe", "coco-2x", *checkpoint], "--recipe coco-2x needs --data FOLDER"),
        ([*good, "--checkpoint", "nosuch.pt"], "nosuch.pt: no such file"),
        (["--data", str(scenes)], "runs/shapes/checkpoint.pt: no such file. `torchrun train.py` makes it"),
        ([*SMALL, "--recipe", "coco-2x"], "--recipe coco-2x needs --checkpoint FILE, or --random --arch NAME"),
        ([*SMALL, "--recipe", "coco-2x", "--random", "--arch", "vit_tiny"], "vit_tiny: detection needs a ResNet"),
        ([*good, "--checkpoint", "vit.pt"], "vit_tiny: detection needs a ResNet"),
        ([*good, "--model", "fpn"], "needs five sizes, got 3"),
        ([*good, "--trainable-layers", "6"], "has five stages"),
        ([*good, "--batch-size", "0"], "--batch-size must be at least 1"),
        ([*good, "--base-lr", "nan"], "--base-lr must be"),
    ]
    for arguments, message in cases:
        if "--val-images" in arguments:
            arguments = [a for a in arguments if a not in ("--data", str(scenes))]
        with pytest.raises(SystemExit) as stopped:
            detect_transfer.main(arguments)
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and message in error[-1] and len(error) == 1, (arguments, error)


# ------------------------------------------------------------------------------------------------------------------
# GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("flags", ["", "--precision float16", "--compile", "--ema 0.9 --view-sizes 16 16 12 --solarize 0.1"])
def test_gpu_takes_steps(flags, photos, tmp_path, capsys):
    train.main([*TINY, "--data", str(photos / "same"), "--output", str(tmp_path / "run"), "--max-steps", "4", *flags.split()])
    assert "cuda" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_step_never_waits_for_the_device(photos):
    recipe = train.Recipe(batch_size=8, view_sizes=(16, 16), stem="cifar", hidden=16, out=24)
    device = torch.device("cuda")
    images, _ = train.load_data("folder", str(photos / "same"), 0, device)
    trainer = train.Trainer(recipe, train.Network(recipe), 6, 0, device, torch.bfloat16)
    views = train.training_views(images, recipe, 0, 0, 0, device)
    trainer.step(next(views), 0)
    batch = next(views)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batch, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gpu_detects(precision, finished, scenes, tmp_path, capsys):
    flags = ["--data", str(scenes), "--checkpoint", str(finished[0] / "checkpoint.pt"), "--output", str(tmp_path / "run")]
    detect_transfer.main([*SMALL, *flags, "--precision", precision])
    assert "cuda" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("axis", AXES)
def test_gpu_loss_equals_cpu_loss(axis):
    z = randn(2, 32, 48, dtype=torch.float32)
    cpu, gpu = INTLLoss(axis=axis)(z), INTLLoss(axis=axis)(z.cuda())
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-4, atol=1e-5)
    with torch.autocast("cuda", torch.float16):
        torch.testing.assert_close(INTLLoss(axis=axis)(z.cuda()).cpu(), cpu, rtol=1e-4, atol=1e-5)
