"""Every test: no data, no GPU, no network. Numbers are compared with independent sources: eigendecompositions
in float64, the scalar Newton map, the official releases, torchvision's functions, one process for several."""

import argparse
import colorsys
import contextlib
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
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import intl
import linear_eval
import train
from intl import CWRGPLoss, INTLLoss, SpectralLoss, iter_norm, newton_map, spectral_transform, whiten

try:
    import detect_transfer
except ImportError:  # without pycocotools
    detect_transfer = None

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchvision's and pycocotools' own
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HERE = Path(__file__).parent
AXES = ("channel", "batch")
CPU = torch.device("cpu")
torch.set_num_threads(1)  # as in the processes that the tests start: sums are rounded alike
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE)}
both_axes = pytest.mark.parametrize("axis", AXES)
SPECTRA = [(64, 128, "random"), (256, 64, "random"), (128, 128, "decaying"), (96, 256, "low rank")]
QUIET = "--jitter 0 0 0 0 --jitter-prob 0 --gray 0 --solarize 0 --solarize-threshold 128 --blur 0".split()
FPN = "--model fpn --anchors 8 16 32 64 128"


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    if not request.node.name.startswith("test_gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def centred_columns(m, d):
    return torch.linalg.qr(torch.cat([torch.ones(m, 1, dtype=torch.float64), randn(m, d)], 1))[0][:, 1:]


load = functools.partial(torch.load, weights_only=True, map_location="cpu")
generator = lambda seed: torch.Generator().manual_seed(seed)
randn = lambda *n, seed=0, dtype=torch.float64: torch.randn(*n, generator=generator(seed), dtype=dtype)
randf = functools.partial(randn, dtype=torch.float32)
covariance = lambda z, axis: torch.cov(z if axis == "channel" else z.mT)  # rows are variables


def scalar_iter_norm(l, iterations=4):
    """Of eigenvalues l, by its definition: P_T of the eigenvalues of S / tr S, over sqrt(tr S)."""
    trace = l.sum(-1, keepdim=True)
    p = torch.ones_like(l)
    for _ in range(iterations):
        p = (3 * p - p**3 * l / trace) / 2
    return p / trace.sqrt()


# --- intl.py ------------------------------------------------------------------------------------------------
@both_axes
@pytest.mark.parametrize("m, d", [(6, 9), (7, 7), (9, 6)])
def test_iter_norm_maps_every_eigenvalue_by_newton_map(m, d, axis):
    """And whitening to one, but for those that are zero; both keep the eigenvectors."""
    z, rank = randn(m, d), min(m, d - 1) if axis == "channel" else min(m - 1, d)
    l, U = torch.linalg.eigh(covariance(z, axis))
    maps = {iter_norm: newton_map((l / l.sum()).clamp_min(0), 4)}
    maps[whiten] = (torch.arange(len(l)) >= len(l) - rank).double()
    for transform, l_hat in maps.items():
        found = covariance(transform(z, axis=axis), axis)
        assert_close(found, U @ l_hat.diag() @ U.T, rtol=0, atol=1e-12)


def test_newton_map_is_increasing_and_concave():
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for iterations in range(1, 9):
        h = newton_map(x, iterations)
        assert h[0] == 0 and h[-1] == 1
        assert (h.diff() > -1e-15).all() and (h[1:1000] < (1 if iterations < 6 else 1 + 1e-15)).all()
        assert (h.diff().diff() < 1e-15).all()
    assert newton_map(1e-3, 40) == pytest.approx(1)


@both_axes
@pytest.mark.parametrize("m, d", [(4, 7), (5, 5), (5, 12), (12, 5)])
def test_both_gram_matrices_give_the_same_transform(m, d, axis):
    """That of the code; which, with the scalar Newton map, is IterNorm, value and gradient."""
    z, dim = randn(m, d).requires_grad_(), -1 if axis == "channel" else -2
    zc, divisor = z - z.mean(dim, keepdim=True), z.shape[dim] - 1
    for g in (scalar_iter_norm, lambda l: l.exp()):
        for gram, apply in (zc @ zc.T, lambda f: f @ zc), (zc.T @ zc, lambda f: zc @ f):
            l, U = torch.linalg.eigh(gram / divisor)
            expected = apply(U @ g(l.clamp_min(0)).diag() @ U.T)
            assert_close(spectral_transform(z, g, axis=axis), expected)
    results = [spectral_transform(z, scalar_iter_norm, axis=axis), iter_norm(z, axis=axis)]
    assert_close(*results)
    weight = randn(m, d, seed=1)
    assert_close(*[torch.autograd.grad((r * weight).sum(), z)[0] for r in results])


@both_axes
@pytest.mark.parametrize("m, d", [(4, 7), (5, 5), (7, 4)])
@pytest.mark.parametrize("kind", ["full rank", "rank 2", "repeated"])
def test_gradcheck(kind, m, d, axis):
    """Also where eigenvalues of the Gram matrix are zero, or repeated."""
    embed, x, b = lambda z: z, randn(m, d), randn(2, d, seed=1)
    if kind == "rank 2":  # moves within the matrices of rank 2
        embed, x = lambda a: a @ b, randn(m, 2)
    if kind == "repeated":
        square = randn(max(m, d), max(m, d))
        x = torch.linalg.qr(square - square.mean(0))[0][:m, :d]
    functions = [
        lambda z: iter_norm(z, axis=axis),
        lambda z: iter_norm(z, axis=axis, iterations=12),
        lambda z: spectral_transform(z, scalar_iter_norm, axis=axis),
        lambda z: spectral_transform(z, lambda l: 1 / (1 + l), axis=axis),
        lambda z: intl.trace_loss(iter_norm(z, axis=axis), axis=axis),
        lambda z: INTLLoss(axis=axis)([z, z.flip(1) + 1]),
        lambda z: INTLLoss(axis=axis)([z], teacher=randn(m, d, seed=7)),
    ]
    if kind != "repeated":  # whitening is not differentiable where an eigenvalue may leave zero
        functions += [lambda z, p=p: spectral_transform(z, intl.power(p), axis=axis) for p in (0.5, 0.3)]
    for f in functions:
        assert gradcheck(lambda x, f=f: f(embed(x)), x.clone().requires_grad_())
    if (m, d, kind, axis) == (4, 7, "repeated", "channel"):  # all m eigenvalues are equal
        x = centred_columns(d, m).T
        for g in (intl.power(0.5), intl.power(0.3), scalar_iter_norm):
            assert gradcheck(lambda z, g=g: spectral_transform(z, g), x.clone().requires_grad_())
        S = torch.eye(m, dtype=torch.float64).requires_grad_()
        l, U = torch.linalg.eigh(S)  # through which autograd gives NaN
        assert torch.autograd.grad(((U * l.rsqrt()) @ U.T * randn(m, m)).sum(), S)[0].isnan().any()


@pytest.mark.parametrize("iterations", [4, 10, 20, 40])
@pytest.mark.parametrize("m, d, kind", SPECTRA)
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
    S = covariance(randf(256, 64), "channel")
    N, P = S / S.trace(), torch.eye(256)
    l, U = torch.linalg.eigh(N.double())
    exact = U @ (scalar_iter_norm(l, 15) * l.sum().sqrt()).diag() @ U.T
    for _ in range(15):
        P = 1.5 * P - 0.5 * P @ P @ P @ N
    assert not (P - exact).norm() < exact.norm()


def test_trace_loss_is_least_at_equal_eigenvalues():
    n, iterations = 16, 4
    floor = intl.trace_floor(n, iterations)
    for seed in range(20):
        U = torch.linalg.qr(randn(n, n, seed=seed))[0]
        x = torch.rand(n, generator=generator(seed), dtype=torch.float64)
        cov = U @ newton_map(x / x.sum(), iterations).diag() @ U.T
        assert (1 - cov.diagonal()).square().sum() > floor + 1e-6
    assert intl.trace_floor(256, 4) == pytest.approx(209.6, abs=0.05)
    assert intl.trace_floor(8, 4, rank=2) == pytest.approx(8 * (1 - 2 * newton_map(0.5, 4) / 8) ** 2)


def test_no_rank_is_worth_2():
    """Where p(r) = 2, views of rank r that agree have no less loss than unrelated ones of equal spectrum."""
    n, q = 8, centred_columns(40, 16).T
    for r, T in itertools.product(range(1, n), (2, 4)):
        beta = 2 / intl.rank_price(r, n, T, beta=1)
        loss, equal = INTLLoss(iterations=T, beta=beta), 2 + 2 * beta * intl.trace_floor(n, T)
        assert loss([q[:n], q[n:]]).item() == pytest.approx(equal)
        for seed in range(20):
            z = randn(n, r, seed=seed) * torch.rand(r, generator=generator(seed)) @ q[:r]
            assert loss([z, z]) > equal - 1e-9 and loss.parts["alignment"] < 1e-9
        z = q[torch.arange(n) % r]  # r equal eigenvalues and, where r divides n, equal variances
        assert r not in (1, 2, 4) or loss([z, z]).item() == pytest.approx(equal)
        assert loss.setting(n, 40, teacher=True)[3] == loss.setting(n, 40)[3] / 2
    for n, T, price in (256, 4, 4.4), (32, 4, 0.9), (256, 2, 0.8):
        beta = INTLLoss(iterations=T).setting(n, 999)[2]
        assert intl.rank_price(1, n, T, beta) == pytest.approx(price, abs=0.05)


def test_the_balanced_beta_is_the_least_with_both_prices():
    for n, T, full, r in ((16, 4, 16, 4), (512, 4, 512, 64), (2048, 2, 255, 255 / 4), (8, 4, 4, 1)):
        floor, beta = functools.partial(intl.trace_floor, n, T), intl.balanced_beta(n, T, full=full)
        prices = [2 * beta * (floor(rank) - floor(full)) for rank in (1, r)]
        assert min(prices[0] / 2, prices[1] / 0.6) == pytest.approx(1)
    assert intl.rank_price(64, 256, 4, INTLLoss().setting(256, 999)[2]) == pytest.approx(0.6, abs=0.01)
    assert intl.balanced_beta(2, 4, full=1) == 0
    for axis, m, d in (("batch", 5, 8), ("channel", 8, 5)):  # 8 coordinates of rank 4
        z, loss, beta = randn(2, m, d), INTLLoss(axis=axis, beta="balanced"), intl.balanced_beta(8, 4, full=4)
        assert loss.setting(m, d)[:3] == (8, 4, beta) and loss(z) == INTLLoss(axis=axis, beta=beta)(z)
        assert loss.parts["price"] == 2 * beta * (intl.trace_floor(8, 4, 1) - intl.trace_floor(8, 4, 4))


def definition(z, axis, iterations, beta, teacher=False):
    """METHOD: the loss from iter_norm's output, in a few lines."""
    z_hat = [iter_norm(v, axis=axis, iterations=iterations) for v in z]
    total = 0
    for v in z_hat[1:]:
        cosine = (F.normalize(v, dim=1) * F.normalize(z_hat[0], dim=1)).sum(1)
        total = total + (2 - 2 * cosine).mean() + beta * intl.trace_loss(v, axis=axis)
        total = total + (0 if teacher else beta * intl.trace_loss(z_hat[0], axis=axis))
    return total / (len(z_hat) - 1)


@both_axes
@pytest.mark.parametrize("views, m, d", [(2, 12, 20), (2, 12, 12), (2, 20, 12), (4, 10, 30)])
def test_loss_equals_its_definition(views, m, d, axis):
    """INTLLoss, which forms no z_hat for the channel axis, equals the definition, value and gradient."""
    z = randn(views, m, d).requires_grad_()
    beta = 0.01 * (math.log2(m if axis == "channel" else d) - 3)
    for iterations in (1, 2, 4, 11):
        criterion = INTLLoss(axis=axis, iterations=iterations)
        taught = definition([z[0].detach(), *z[1:]], axis, iterations, beta, teacher=True)
        pairs = [(criterion(z), definition(z, axis, iterations, beta))]
        pairs.append((criterion(z[1:], teacher=z[0]), taught))
        for losses in pairs:
            assert_close(*losses, rtol=1e-10, atol=0)
            gradients = [torch.autograd.grad(loss, z)[0] for loss in losses]
            assert_close(*gradients, rtol=1e-9, atol=1e-12)
        assert gradients[0][0].abs().max() == 0  # the teacher's view


@both_axes
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
def test_spectral_loss_equals_its_definition(p, axis):
    """By eigh of the larger covariance, which autograd differentiates at simple eigenvalues."""
    z, z_hat = randn(3, 8, 9 if axis == "channel" else 6).requires_grad_(), []
    for v in z:
        zc = v - v.mean(-1 if axis == "channel" else -2, keepdim=True)
        l, U = torch.linalg.eigh(covariance(v, axis))
        f = (U * l.pow(-p)) @ U.T
        z_hat.append(F.normalize(f @ zc if axis == "channel" else zc @ f, dim=1))
    expected = torch.stack([(2 - 2 * (v * z_hat[0]).sum(1)).mean() for v in z_hat[1:]]).mean()
    loss = SpectralLoss(p, axis=axis)
    losses = [loss(z), expected]
    assert_close(*losses)
    assert_close(*[torch.autograd.grad(value, z)[0] for value in losses])
    assert_close(loss.parts["alignment"], expected.detach())
    assert_close(loss(z[1:], teacher=z[0]), expected)


@pytest.mark.parametrize("axis, m, d", [("channel", 6, 9), ("batch", 9, 6)])
def test_parts_at_an_equal_spectrum_and_at_a_collapse(axis, m, d):
    q, loss = centred_columns(9, 6), INTLLoss(axis=axis)
    equal, line = q.T if axis == "channel" else q, randn(m, 1) * randn(1, d, seed=1)
    for arguments in ([[equal, equal]], [[equal], line]):  # a teacher's view does not count
        loss(*arguments)
        assert loss.parts["score"].item() == pytest.approx(1)
        assert loss.parts["trace"].item() == pytest.approx(loss.parts["floor"])
    loss([line, line])
    assert loss.parts["score"].item() == pytest.approx(1 / 6 / newton_map(1 / 6, 4))
    assert loss.parts["alignment"].item() < 1e-9


def test_losses_equal_the_official_releases():
    """Their values and gradients in float64, from one process; OR's from its definition."""
    reference = json.loads((HERE / "evidence" / "reference_values.json").read_text())
    tensor, penalty = functools.partial(torch.tensor, dtype=torch.float64), intl.orthogonality_penalty
    close = lambda got, values, atol=0: assert_close(got, tensor(values), rtol=1e-9, atol=atol)
    for case in reference["intl"]:
        z, options = tensor(case["views"]).requires_grad_(), {k: case[k] for k in ("axis", "iterations")}
        loss, z_hat = INTLLoss(**options)(z), iter_norm(z, **options)
        close(z_hat, case["iternorm"], 1e-12)
        close(intl.trace_loss(z_hat, axis=case["axis"]), case["trace_loss"], 1e-12)
        close(loss, case["loss"])
        close(INTLLoss(**options)(z[1:], teacher=z[0]), case["loss_momentum"])
        close(torch.autograd.grad(loss, z)[0], case["grad"], 1e-10 * tensor(case["grad"]).abs().max().item())
    for case in reference["cw_rgp"]:
        got = intl.group_whiten(tensor(case["z"]), case["groups"], torch.tensor(case["perm"]))
        close(got, case["whitened"], 1e-11)
    for case in reference["orthogonality"]:
        out, channels, *kernel = case["shape"]
        conv = nn.Conv2d(channels, out, kernel).double()
        conv.weight.data = tensor(case["weight"]).reshape(case["shape"])
        close(penalty(conv), case["so"])
        close(penalty(conv, "srip", power_iterations=500), case["srip_exact"])


def value_and_gradient(loss, z, autocast=None):
    torch.manual_seed(0)
    z = z.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]  # outside autocast


@both_axes
@pytest.mark.parametrize("m, d", [(16, 32), (32, 16)])
def test_collapsed_and_scaled_batches_are_finite(m, d, axis):
    z = randf(2, m, d)
    loss = INTLLoss(axis=axis)
    value, gradient = value_and_gradient(loss, z)
    constant = [torch.full_like(z, 0.1), torch.zeros_like(z), z[:, :1].expand_as(z)]
    one_is_zero = torch.cat([z[:, 1:], torch.zeros_like(z[:, :1])], dim=1)
    for bad in [*constant, z[:, :1] * z[:, :, :1], one_is_zero]:
        assert all(t.isfinite().all() for t in value_and_gradient(loss, bad))
        assert all(torch.as_tensor(part).isfinite() for part in loss.parts.values())
        assert (whiten(bad, axis=axis) + iter_norm(bad, axis=axis)).isfinite().all()
        for measure in intl.effective_rank(bad), intl.condition_number(bad):
            assert measure.isfinite().all() and (measure.allclose(torch.ones(2)) or bad is one_is_zero)
    for scale in (1e6, 1e-6):  # the loss does not depend on the scale, its gradient is inverse to it
        scaled = value_and_gradient(loss, z * scale)
        assert_close(scaled[0], value, rtol=1e-5, atol=0)
        assert_close(scaled[1] * scale, gradient, rtol=1e-3, atol=1e-5)


@both_axes
def test_half_precision_and_autocast_change_nothing(axis):
    z, losses = randf(2, 16, 48) * 100, [INTLLoss(axis=axis), SpectralLoss(0.5, axis=axis)]
    losses += [CWRGPLoss(groups=2)] if axis == "channel" else []
    for loss, dtype in itertools.product(losses, (torch.bfloat16, torch.float16)):
        expected = value_and_gradient(loss, z.to(dtype).float())
        assert_close(value_and_gradient(loss, z.to(dtype))[0], expected[0])
        assert_close(value_and_gradient(loss, z.to(dtype).float(), autocast=dtype), expected)
    transposed = z.mT.contiguous().mT  # not contiguous
    assert_close(iter_norm(transposed, axis=axis), iter_norm(z, axis=axis))
    assert_close(INTLLoss(axis=axis)(transposed), INTLLoss(axis=axis)(z))
    exact, half = covariance(z[0], axis), covariance(z[0].bfloat16(), axis).float()
    assert 0.002 < (half - exact).norm() / exact.norm() < 0.02  # what this spares


REFUSED = [
    (lambda: INTLLoss()([randn(8, 4)]), r"two or more views .*\[\(8, 4\)\]"),
    (lambda: INTLLoss()([randn(8, 4), randn(8, 5)]), r"one shape .*\(8, 4\), \(8, 5\)"),
    (lambda: INTLLoss()([randn(8, 4)], teacher=randn(6, 4)), r"one shape .*\(6, 4\), \(8, 4\)"),
    (lambda: INTLLoss()([randn(1, 4)] * 2), r"needs 2 samples.*\(1, 4\)"),
    (lambda: INTLLoss(axis="rows"), "axis must be .*'rows'"),  # when it is made
    (lambda: INTLLoss(iterations=0), "from 1 to 40.*0"),
    (lambda: spectral_transform(randn(8, 4), lambda l: l.sum()), r"\(4,\) to as many, got \(\)"),
    (lambda: intl.group_whiten(randn(8, 32), 4), r"no 4 groups larger than m in \(8, 32\)"),
    (lambda: intl.group_whiten(randn(8, 32), 2, torch.arange(30)), r"in \(8, 32\), order \(30,\)"),
    (lambda: INTLLoss(beta="rule"), "a number, None or .balanced., got 'rule'"),
    (lambda: CWRGPLoss(groups=2, sub_batch=3)(randn(2, 8, 32)), "global batch of 8 rows, got 3"),
    (lambda: intl.orthogonality_penalty(nn.ReLU()), "ReLU has no Conv2d or Linear weight"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_demonstration(tmp_path):
    """IterNorm alone and no transformation lose rank, whitening less, INTL hardly any."""
    shutil.copy(HERE / "intl.py", tmp_path)
    absent = ("torchvision", "numpy", "train", "matplotlib", "tensorboard", "pycocotools")
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import intl; intl.demonstrate(steps=200)"
    options = dict(cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": ""}, timeout=120, text=True)
    printed = subprocess.check_output([sys.executable, "-c", code], **options)
    ranks = {line[:24].strip(): float(line[24:].split()[0]) for line in printed.splitlines()[1:]}
    assert max(ranks["no transformation"], ranks["IterNorm alone, T = 4"], ranks["power 0.2"]) < 16
    assert ranks["whitening"] > 1.5 * ranks["power 0.2"] and ranks["INTL, T = 4"] > 48


def group_whiten_by_eigh(z, groups, order):
    """One view (m, d): every group of channels times U diag(l^-1/2) U^T of its own Gram matrix."""
    zc, z_hat = z - z.mean(1, keepdim=True), torch.empty_like(z)
    for part in order.chunk(groups):
        l, U = torch.linalg.eigh(zc[:, part] @ zc[:, part].T / (len(part) - 1))
        z_hat[:, part] = (U * l.rsqrt()) @ U.T @ zc[:, part]
    return z_hat


def test_group_whitening_whitens_every_group_by_each_views_permutation():
    m, d, groups, z = 6, 40, 4, randn(2, 6, 40)
    orders = torch.rand(2, d, generator=generator(3)).argsort(-1)
    for v, order, v_hat in zip(z, orders, intl.group_whiten(z, groups, orders)):
        assert_close(v_hat, group_whiten_by_eigh(v, groups, order))
        assert_close(v_hat, intl.group_whiten(v, groups, order))
        for part in v_hat[:, order].split(d // groups, dim=1):  # not centred again within a group
            assert_close(part @ part.T / (d // groups - 1), torch.eye(m, dtype=z.dtype))
    for order in (None, orders[0]):  # one for all views
        expected = torch.stack([intl.group_whiten(v, groups, order) for v in z])
        assert_close(intl.group_whiten(z, groups, order), expected)
    assert gradcheck(lambda z: intl.group_whiten(z, groups, orders), z.requires_grad_())


def test_cw_rgp_equals_an_independent_computation():
    """Random parts of the batch, a permutation for each part and view, all pairs of views, two repeats."""
    V, m, d, size, distances = 3, 8, 32, 4, []
    z = randn(V, m, d).requires_grad_()
    torch.manual_seed(5)
    loss = CWRGPLoss(groups=2, sub_batch=size, repeats=2)(z)
    torch.manual_seed(5)
    for _ in range(2):
        rows, orders = torch.rand(m).argsort(), torch.rand(V * m // size, d).argsort(-1)
        z_hat = []
        for v, own in zip(z, orders.split(m // size)):
            parts = [group_whiten_by_eigh(v[r], 2, order) for r, order in zip(rows.split(size), own)]
            z_hat.append(F.normalize(torch.cat(parts), dim=1))
        distances += [(2 - 2 * (a * b).sum(1)).mean() for a, b in itertools.combinations(z_hat, 2)]
    expected = sum(distances) / len(distances)
    assert_close(loss, expected)
    assert_close(*[torch.autograd.grad(value, z)[0] for value in (loss, expected)])


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 2), nn.Conv2d(2, 12, 2), nn.Linear(7, 4), nn.Linear(4, 7)])
def test_orthogonality_penalty(layer):
    layer, penalty = layer.double(), intl.orthogonality_penalty
    of_values = lambda W: torch.linalg.svdvals(W.flatten(1)) ** 2 - 1  # eigenvalues of W W^T - I or W^T W - I
    so, srip = of_values(layer.weight).square().sum(), of_values(layer.weight).abs().max()
    both = nn.Sequential(layer, nn.BatchNorm1d(3), nn.Sequential(layer))  # a shared layer counts once, BN not
    for got, expected in (penalty(both), so), (penalty(layer, "srip", power_iterations=2000), srip):
        assert_close(got, expected)
        assert_close(*[torch.autograd.grad(x, layer.weight, retain_graph=True)[0] for x in (got, expected)])
    bounds = [penalty(layer, "srip", power_iterations=n).item() for n in (0, 1, 5, 25)]
    assert bounds == sorted(bounds) and bounds[-1] <= srip + 1e-12
    attention = nn.MultiheadAttention(6, 2).double()
    weights = [*attention.in_proj_weight.split(6), attention.out_proj.weight]  # packed q, k, v; and out
    assert_close(penalty(attention), sum(of_values(W).square().sum() for W in weights))


def test_diagnostics_of_a_known_spectrum():
    l = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    z = centred_columns(50, 5) * (49 * l).sqrt() @ torch.linalg.qr(randn(5, 5))[0] + 3
    assert_close(intl.spectrum(z), l)
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert intl.effective_rank(z).item() == pytest.approx(math.exp(entropy))
    assert intl.condition_number(z).item() == pytest.approx(4)
    assert_close(intl.spectrum(torch.stack([z, 2 * z])), torch.stack([l, 4 * l]))


def run(script, *arguments, processes=0, options=(), **environment):
    """What the script prints, in a process of its own or in several under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *options]
    command = [str(word) for word in [sys.executable, *launch * bool(processes), HERE / script, *arguments]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def gradients(rank, world, wrap=lambda net: net):
    z, results = randn(3, 12, 8), {}
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    losses = {"batch": INTLLoss(axis="batch"), "channel": INTLLoss(), "few rows": INTLLoss()}
    losses["whiten"] = SpectralLoss(0.4, axis="batch")
    losses["cwrgp"] = CWRGPLoss(groups=2, sub_batch=6, repeats=2)
    cases = [(name, teacher) for name in losses for teacher in (False, True)[: 1 + (name != "cwrgp")]]
    for name, teacher in cases:
        torch.manual_seed(1)
        net = wrap(nn.Linear(8, {"few rows": 30, "cwrgp": 16}.get(name, 10)).double())
        z_net = net(z[:, share])
        torch.manual_seed(2 + rank)  # CW-RGP's partitions are the first process's
        value = losses[name](list(z_net[1:]), z_net[0]) if teacher else losses[name](list(z_net))
        value.backward()
        results[name, teacher] = [value.detach(), *[p.grad for p in net.parameters()]]
    return results


def save_gradients(folder):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    everything = intl.gather(rows)
    (everything * torch.arange(2.0 * world)[:, None]).sum().backward()
    assert everything[:, 0].tolist() == [r // 2 for r in range(2 * world)]
    assert rows.grad[:, 0].tolist() == [2 * rank, 2 * rank + 1]
    torch.save(gradients(rank, world, nn.parallel.DistributedDataParallel), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3])
def test_gradient_over_processes_equals_one_process(processes, tmp_path):
    run("test_intl.py", "save_gradients", tmp_path, processes=processes)
    expected = gradients(0, 1)
    for rank in range(processes):
        for case, found in load(tmp_path / f"{rank}.pt").items():
            assert_close(found, expected[case], rtol=1e-9, atol=1e-12, msg=f"{case}")


# --- Data and augmentation ---------------------------------------------------------------------------------
def test_shapes_differ_in_outline_alone():
    """Of colour: chance is 12.5 %, the standard error of 1,000 images 1 point."""
    sets = [train.draw_shapes(0, first, n).tensors for first, n in ((0, 4000), (10**6, 1000))]
    for dims in (2, 3), (1, 2, 3):  # mean colours, mean brightness
        bank, queries = [(x.float().mean(dims).reshape(len(x), -1), labels) for x, labels in sets]
        assert train.knn_top1(*bank, *queries, 5) < 12.5 + 4
    y, x = torch.meshgrid(*[torch.linspace(-2, 2, 401)] * 2, indexing="ij")
    areas = [(level(x, y) > 0).float().mean().item() * 16 for level in train.SHAPES.values()]
    assert areas == pytest.approx([3] * 8, rel=0.03)


def test_scenes_depend_on_seed_and_index_alone_and_masks_are_what_is_seen():
    images = train.draw_shapes(0, 0, 20)
    assert images.targets.tolist() == [i % 8 for i in range(20)]
    assert torch.equal(train.draw_shapes(0, 5, 2).tensors[0], images.tensors[0][5:7])
    assert not torch.equal(train.draw_shapes(1, 0, 20).tensors[0], images.tensors[0])
    picture, masks = train.draw_scene(0, 3, 64, [0, 2, 5], 0.3, 0.6)
    alone = train.draw_scene(0, 3, 64, [0], 0.3, 0.6)[1][0]
    assert picture.shape == masks.shape == (3, 64, 64) and masks.dtype == torch.bool
    assert masks.sum(0).max() == 1 and masks[2].sum() > 100  # the last lies in front
    assert (masks[0] & ~alone).sum() == 0 and masks[0].sum() < alone.sum()


def pictures(size=32, n=24):
    noise = torch.randint(0, 256, (n, 3, size, size), generator=generator(0), dtype=torch.uint8)
    smooth = TF.resize(noise[: n // 2, :, :5, :5], [size, size], antialias=True)
    return torch.cat([smooth, noise[n // 2 :]])


def assert_same_picture(got, expected):
    difference = (got * 255 - expected.float()).abs()
    assert difference.max() <= 2 and difference.mean() <= 0.6, (difference.max(), difference.mean())


def augment(x, flags, u, order=(3, 0, 1, 2), flip=False):
    """train.augment by flags and uniform numbers u (n, 9), with or without its flip."""
    args = train.parse([*QUIET, *flags.split()])
    used = 6 + 2 * bool(args.blur[0]) + bool(args.solarize[0])
    u = torch.cat([u[:, :used], torch.full((len(u), 1), 0.0 if flip else 1.0)], dim=1)
    return train.augment(x, args, 0, iter(u.T[:, :, None, None, None]).__next__, list(order))


@pytest.mark.parametrize("index, operation", [*enumerate(["brightness", "contrast", "saturation", "hue"])])
def test_batched_jitter_equals_torchvision(index, operation):
    x, u = pictures(), torch.rand(24, 9, generator=generator(1))
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
    """20,000 draws of a picture of two columns: how often each operation happens, how strong jitter is."""
    n = 20_000
    picture = torch.tensor([[0.6, 0.5], [0.4, 0.3], [0.2, 0.4]])[:, None].repeat(1, 2, 1)  # (3, 2, 2)
    x, u = picture.expand(n, 3, 2, 2), torch.rand(n, 9, generator=generator(0))
    different = lambda y: ((y - picture).abs() > 1e-4).flatten(1).any(1)  # (n,)
    shares = {"--gray 0.2": 0.2, "--solarize 0.2 --solarize-threshold 100": 0.2, "--blur 0.1": 0.09}
    for flags, share in shares.items():
        got = different(augment(x, flags, u)).float().mean().item()
        assert got == pytest.approx(share, abs=4 * (0.25 / n) ** 0.5), flags

    light = lambda y: (y * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1)
    hue = lambda y: torch.tensor([colorsys.rgb_to_hsv(*rgb)[0] for rgb in y[:, :, 0, 0].tolist()])
    change = lambda measure, y: (measure(y) / measure(picture[None]))[:, 0, 0] - 1
    strengths = {
        "0.4 0 0 0": lambda y: change(light, y),
        "0 0.4 0 0": lambda y: change(lambda y: light(y).diff(dim=-1), y),
        "0 0 0.2 0": lambda y: change(lambda y: y[:, 0] - light(y), y),
        "0 0 0 0.1": lambda y: (hue(y) - hue(picture[None]) + 0.5) % 1 - 0.5,
    }
    for jitter, measure in strengths.items():
        y = augment(x, f"--jitter {jitter} --jitter-prob 0.8", u, order=(0, 1, 2, 3))
        on, largest = different(y), max(map(float, jitter.split()))
        assert on.float().mean().item() == pytest.approx(0.8, abs=0.01)
        values = measure(y[on]).double().sort().values  # uniform, by Kolmogorov and Smirnov
        uniform = torch.linspace(-largest, largest, len(values), dtype=torch.float64)
        assert (values - uniform).abs().max() < 0.0155 * 2 * largest


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 16), ("val", 5)):
        for c, i in itertools.product(range(3), range(n)):
            g = generator(100 * c + i + 50 * (split == "val"))
            coarse = torch.randint(0, 256, (3, 2 + c, 4), generator=g, dtype=torch.uint8)
            path = root / split / f"class {c}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(TF.resize(coarse, [20 + i, 30 - i])).save(path)
    return root


def training_views(args, images, first, last, workers=0):
    crops = [v2.RandomResizedCrop(s) for s in args.view_sizes]
    keys = train.batches(torch.arange(len(images)), args.batch_size, args.seed, first, last)
    loader = train.read(train.Views(images, crops, args.seed), workers, batch_sampler=keys)
    return [train.augmented(views, args, step, CPU) for step, (views, _) in enumerate(loader, start=first)]


def test_order_and_crops_do_not_depend_on_workers_or_processes(photos, monkeypatch):
    args = train.parse(["--batch-size", "8", "--view-sizes", "16", "16"])
    images, _ = train.load_data("folder", photos, 0)
    whole = training_views(args, images, 0, 8)  # over the end of an epoch of 6 steps
    assert sorted(i for key in train.batches(torch.arange(48), 8, 0, 0, 6) for _, i in key) == [*range(48)]
    for first, workers in ((0, 2), (3, 0)):
        for got, expected in zip(training_views(args, images, first, 8, workers), whole[first:]):
            assert all(map(torch.equal, got, expected))
    monkeypatch.setattr(train, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        (share,) = training_views(args, images, 3, 4)
        assert all(torch.equal(a, b[4 * rank : 4 * rank + 4]) for a, b in zip(share, whole[3]))


def test_images_are_decoded_and_cropped_as_torchvision_does_it(photos, tmp_path):
    """And one that cannot be read ends the run with its name, also from a worker."""
    path = photos / "train" / "class 0" / "3.png"
    if hasattr(torchvision.io, "decode_image"):  # which torchvision 0.29 says it will remove
        assert torch.equal(train.decode(str(path)), torchvision.io.decode_image(str(path), mode="RGB"))
    image = pictures(70)[0, :, :50]
    cropped = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
    for dataset, size, expected in ("folder", 224, cropped), ("cifar10", 32, v2.Resize(32)(image)):
        ((got,), _) = next(iter(train.still(train.in_memory(image[None], [0], ["a"]), dataset, size, 0)))
        assert torch.equal(got[0], expected)
    shutil.copytree(photos / "train", tmp_path / "train")
    (tmp_path / "train" / "class 1" / "torn.png").write_bytes(path.read_bytes()[:200])
    for workers in "0", "1":
        with pytest.raises(RuntimeError, match=r"torn.png is no image that can be read"):
            train.main(tiny(tmp_path, tmp_path / "run", f"--workers {workers}"))


# --- One step, schedules, recipes, teacher, k-NN -----------------------------------------------------------
class TinyNetwork(nn.Module):
    """Without BatchNorm, which on CPUs normalises every process's share by itself."""

    def __init__(self, args, size=6):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, 10))
        self.projector = nn.Linear(10, 24)

    def forward(self, views):
        return [self.projector(self.backbone(v)) for v in views]


@pytest.mark.parametrize("ema, decay", [(0, "--decay-all"), (0.9, "--no-decay-all")])
def test_steps_equal_an_independent_computation(ema, decay, photos, tmp_path, monkeypatch):
    views = {step: list(randn(4 if ema else 2, 16, 3, 6, 6, seed=step)) for step in range(6)}
    monkeypatch.setattr(train, "Network", lambda args: TinyNetwork(args).double())
    monkeypatch.setattr(train, "augmented", lambda crops, args, step, device: views[step])
    monkeypatch.setattr(train, "normalize", lambda x, dataset: x[:, :, :6, :6].double())
    flags = f"--ema {ema} --view-sizes 6 6 {'6 6' * bool(ema)} {decay} --weight-decay 0.1 --beta 0.03"
    torch.manual_seed(0)
    mine = {k: v.clone().requires_grad_() for k, v in TinyNetwork(None).double().state_dict().items()}
    my_teacher = {k: v.detach().clone() for k, v in mine.items()}
    velocity = {k: torch.zeros_like(v) for k, v in mine.items()}
    train.main(tiny(photos, tmp_path, f"{flags} --max-steps 6"))

    linear = lambda w, name, x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    embed = lambda w, x: linear(w, "projector", linear(w, "backbone.1", x))
    losses = []
    for step in range(6):
        rate = (step + 1) / 3 if step < 3 else 0.001 + 0.999 * (1 + math.cos(math.pi * (step - 2) / 9)) / 2
        rate = 0.03 * 16 / 256 * rate  # a warm-up of one epoch of 3 steps, then a cosine over three epochs
        if ema:
            momentum = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * step / 12))
            my_teacher = {k: momentum * v + (1 - momentum) * mine[k].detach() for k, v in my_teacher.items()}
        z = [embed(mine if i or not ema else my_teacher, v.flatten(1)) for i, v in enumerate(views[step])]
        losses.append(definition(z, "channel", 4, 0.03, teacher=bool(ema)))
        for (name, w), g in zip(mine.items(), torch.autograd.grad(losses[-1], list(mine.values()))):
            shrink = 0 if decay == "--no-decay-all" and w.ndim == 1 else 0.1
            velocity[name] = 0.9 * velocity[name] + g + shrink * w.detach()
            mine[name] = (w - rate * velocity[name]).detach().requires_grad_()
    saved = load(tmp_path / "checkpoint.pt")
    assert losses_of(tmp_path) == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    for name, w in saved["network"].items():
        assert_close(w, mine[name].detach(), rtol=1e-9, atol=1e-12)
        if ema:
            assert_close(saved["teacher"][name], my_teacher[name], rtol=1e-9, atol=1e-12)


def test_schedules_and_settings_are_the_published_ones():
    """Of detection: 180,000 steps of 16 images, a tenth of the rate from 120,000 and again from 160,000."""
    sgd = train.parse("--batch-size 512 --base-lr 0.3 --epochs 10 --warmup-epochs 2".split())
    adam = train.parse("--recipe cwrgp-cifar10 --batch-size 512".split())  # its rate is not scaled
    probe = lambda protocol, kind, epochs: lambda s: linear_eval.rate_factor(protocol, kind, s, 5, epochs)
    schedules = [
        (lambda s: train.learning_rate(s, 100, sgd), {0: 0.003, 199: 0.6, 599: 0.3003, 999: 0.0006}),
        (lambda s: train.learning_rate(s, 195, adam), {0: 6e-6, 499: 3e-3, 185249: 3e-3, 185250: 6e-4}),
        (probe("linear", "", 100), {0: 1, 299: 1, 300: 0.1, 399: 0.1, 400: 0.01, 499: 0.01}),
        (probe("finetune", "constant", 20), {0: 1, 50: 1, 99: 1}),
        (probe("finetune", "cosine", 20), {0: 1, 50: 0.5, 100: 0}),
    ]
    if detect_transfer:
        flags = "--recipe coco-2x --data . --batch-size".split()
        coco = {n: detect_transfer.parse([*flags, str(n)]) for n in (2, 16)}
        assert coco[16].images == 16 * 180_000 and detect_transfer.RECIPES["coco-1x"]["images"] == 16 * 90_000
        rate = detect_transfer.learning_rate
        rates = {0: 2e-5, 500: 0.01001, 1000: 0.02, 119_999: 0.02, 120_000: 2e-3, 160_000: 2e-4}
        schedules.append((lambda s: rate(s, coco[16]), rates))
        schedules.append((lambda s: rate(s, coco[2]), {800_000: 0.02 / 8}))
    for schedule, rates in schedules:
        assert {step: schedule(step) for step in rates} == pytest.approx(rates, abs=1e-9)
    protocols = {name: (epochs, rates[:1]) for name, (epochs, rates) in linear_eval.PROTOCOLS.items()}
    published = {"features": (500, [0.01]), "knn": (0, []), "linear": (100, [0.2]), "finetune": (20, [0.2])}
    assert protocols == published and 0.4 in linear_eval.PROTOCOLS["linear"][1]
    args = linear_eval.parse([])
    assert (args.batch_size, args.weight_decay, args.encoder_lr, args.schedule) == (256, 0, 0.006, "constant")


def test_recipes_are_the_published_ones():
    published = json.loads((HERE / "evidence" / "published_settings.json").read_text())
    assert {*published} - {"source", "common"} == {*train.RECIPES} - {"shapes"}
    for name in {*train.RECIPES} - {"shapes"}:
        args, expected = vars(train.parse(["--recipe", name])), published["common"] | published[name]
        assert {field: args[field] for field in expected} == expected, name
        if args["loss"] == "intl":  # the published weight of the trace loss stays
            n, full, beta, _ = INTLLoss().setting(args["batch_size"], args["out"])
            assert args["beta"] is None and beta >= intl.balanced_beta(n, 4, full=full), name


def test_every_bn_sees_one_view_but_in_a_joint_head():
    flags = "--stem cifar --hidden 8 --out 8 --view-sizes 8 8".split()
    views = list(randf(2, 8, 3, 8, 8))
    biases = lambda network: [layer.bias is not None for layer in network.projector[::3]]
    network = train.Network(train.parse(flags))
    assert_close(network(views)[1], network(views[1:])[0])
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert [type(layer) for layer in network.projector] == kinds and biases(network) == [False, False, True]
    network = train.Network(train.parse([*flags, "--joint-head", "--layers", "2"]))
    together = network.projector(torch.cat([network.backbone(v) for v in views]))
    assert_close(torch.cat(network(views)), together)
    assert biases(network) == [True, True]


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_knn_votes_like_a_brute_force_search(temperature):
    """Also over the parts of a large bank, and with fewer rows than votes."""
    bank, queries = randf(200, 6), randf(300, 6, seed=1)
    if temperature:
        bank, queries = F.normalize(bank), F.normalize(queries)
    labels, expected, right = torch.arange(200) % 4, torch.arange(300) % 4, 0
    for q, y in zip(queries.double(), expected):
        votes = [0.0] * 4
        for i in (q - bank.double()).square().sum(1).sort(stable=True).indices[:5].tolist():
            cosine = (q @ bank[i].double()).item()
            votes[labels[i]] += math.exp(cosine / temperature) if temperature else 1
        right += votes.index(max(votes)) == y
    vote = lambda rows, k: train.knn_top1(bank[rows], labels[rows], queries, expected, k, temperature)
    assert vote(range(200), 5) == pytest.approx(100 * right / 300)
    assert vote([*range(200)] * 400, 5) == vote(range(200), 1) and vote(range(3), 20) == vote(range(3), 3)


def test_stems_are_the_releases():
    """CIFAR's of today pads by 1, and once more."""
    (ours, _), (plain, _) = (train.build_backbone("resnet18", stem) for stem in ("cifar-padded", "cifar"))
    plain.load_state_dict(ours.state_dict())
    x = randf(2, 3, 32, 32)
    assert_close(ours.eval()(x), plain.eval()(F.pad(x, (1,) * 4)))


# --- The scripts, as a user starts them --------------------------------------------------------------------

TINY = "--dataset folder --view-sizes 16 16 --stem small --batch-size 16 --hidden 16 --out 24 --epochs 4"
TINY += " --warmup-epochs 1 --base-lr 0.03 --log-every 1 --workers 0 --save-minutes 0 --precision float32"


def tiny(data, folder, flags=""):
    """Arguments of a tiny run: 4 epochs of 3 steps."""
    pytest.importorskip("tensorboard")
    return [*TINY.split(), "--data", str(data), "--output", str(folder), *flags.split()]


lines_of = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
losses_of = lambda folder: [line["loss"] for line in lines_of(folder / "log.jsonl") if "loss" in line]
coco = lambda folder, split="val": detect_transfer.CocoImages(folder, split, split == "train")
steps_of = lambda folder: [line["step"] for line in lines_of(folder / "log.jsonl") if "loss" in line]


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run("train.py", *tiny(photos, folder, "--workers 1"))


def test_a_run_leaves_what_is_promised(finished):
    folder, printed = finished
    assert {"checkpoint.pt", "backbone.pt", "config.json", "log.jsonl"} <= {p.name for p in folder.iterdir()}
    assert any(p.name.startswith("events.out.tfevents") for p in folder.iterdir())
    lines = lines_of(folder / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["epoch"] for line in lines if "knn_top1" in line] == [0, 1, 2, 3, 4]
    assert "beta 0.01 may collapse; balanced would be 0.0747; taken is 0.0747" in printed
    assert json.loads((folder / "config.json").read_text())["beta"] == 0.0747
    names = "alignment trace floor score price lr images_per_second waiting hours_left embedding_rank"
    assert all(f"{name} " in printed for name in [*names.split(), "condition_number", "peak memory"])
    assert "command" in lines[0] and "date" in lines[0]


def living(session):
    """Processes of a session, but for zombies that nobody has asked for."""
    stats = [path.read_text().rsplit(")", 1)[1].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return sum(state != "Z" and int(sid) == session for state, _, _, sid, *_ in stats)


def test_a_killed_run_leaves_nobody_and_ends_bitwise_like_an_undisturbed_one(finished, photos, tmp_path):
    """SIGKILL within an epoch, of the run alone, then of its process group; and a half-written file."""
    arguments = tiny(photos, tmp_path, "--workers 2")
    options = dict(stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    for until, kill in ((5, os.kill), (8, os.killpg)):
        process = subprocess.Popen([sys.executable, str(HERE / "train.py"), *arguments], **options)
        next(line for line in process.stdout if f"step {until} " in line and "loss" in line)
        assert living(process.pid) >= 4  # with two workers, and the server that forks them
        kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -9
        deadline = time.time() + 10
        while living(process.pid) and time.time() < deadline:
            time.sleep(0.1)
        assert not living(process.pid)
        (tmp_path / "checkpoint.pt.tmp").write_bytes(b"half")
    assert ", from 0, by" not in run("train.py", *arguments)
    weights, expected = load(tmp_path / "backbone.pt"), load(finished[0] / "backbone.pt")
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert steps_of(tmp_path) == list(range(1, 13))


METHODS = [f"--recipe {name} --arch resnet18 --out 96" for name in train.RECIPES if name != "shapes"]
METHODS += [
    "--loss iternorm",
    "--batch-size 4",
    "--loss whiten --orthogonality so",
    "--loss power --power 0.45 --axis batch",
    "--loss cwrgp --groups 1 --sub-batch 8 --optimizer adam --milestones 0.5 --repeats 2",
    "--loss none --orthogonality srip --joint-head",
    "--ema 0.9 --view-sizes 16 16 12 --solarize 0.1 --blur 0.5",
    "--precision float16",
    "--precision bfloat16 --view-sizes 32 32",
]


@pytest.mark.parametrize("flags", METHODS)
def test_every_recipe_and_method_takes_a_step(flags, photos, tmp_path, capsys):
    sizes = train.parse(flags.split()).view_sizes if "--recipe" in flags else [16, 16]
    small = f"--view-sizes {'16 ' * len(sizes)} --max-steps 2 --sub-batch 16"
    train.main(tiny(photos, tmp_path, f"{small} {flags}"))
    assert "step 2 " in capsys.readouterr().out
    assert all(v.isfinite().all() for v in load(tmp_path / "backbone.pt").values())


def die_once(*arguments):
    augmented, steps = train.augmented, itertools.count(1)
    dies = train.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    train.augmented = lambda *batch: os._exit(7) if dies and next(steps) == 5 else augmented(*batch)
    train.main(arguments)


def test_restarts_of_torchrun_resume_and_two_processes_evaluate(photos, tmp_path):
    arguments = "die_once", *tiny(photos, tmp_path, "--workers 1")
    printed = run("test_intl.py", *arguments, processes=2, options=("--max-restarts", 1))
    assert re.search(r"from [34], by 2 cpu", printed) and "step 12 " in printed
    flags = f"--checkpoint {tmp_path}/backbone.pt --arch resnet18 --stem small --size 16 --data {photos}"
    flags += " --epochs 1 --batch-size 16 --protocol finetune knn"
    printed = run("linear_eval.py", *flags.split(), processes=2)
    assert "finetune " in printed and "knn " in printed


def train_without_bn(*arguments):
    train.Network = functools.partial(TinyNetwork, size=16)
    train.main(arguments)


def test_two_nodes_equal_one_process_which_goes_on_from_them(photos, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc_per_node 2 --rdzv_id 7"
    command += f" --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port} --local_addr 127.0.0.1 {__file__}"
    command = [*command.split(), "train_without_bn", *tiny(photos, tmp_path / "four", "--max-steps 5")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    agents = [subprocess.Popen(command, **pipes) for _ in range(2)]
    printed = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    monkeypatch.setattr(train, "Network", functools.partial(TinyNetwork, size=16))
    for folder in "one", "four":
        train.main(tiny(photos, tmp_path / folder, "--max-steps 7"))
    losses = losses_of(tmp_path / "one")
    assert len(losses) == 7 and losses == pytest.approx(losses_of(tmp_path / "four"), rel=1e-4)
    weights = [load(tmp_path / name / "backbone.pt") for name in ("one", "four")]
    assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(photos, tmp_path):
    with pytest.raises(SystemExit, match=r"the loss is not finite at step \d+: .*--base-lr"):
        train.main(tiny(photos, tmp_path, "--base-lr 1e30 --warmup-epochs 0"))
    assert all(v.isfinite().all() for v in load(tmp_path / "checkpoint.pt")["network"].values())


def test_a_run_is_evaluated_at_most_a_hundred_times_and_saved_by_the_clock(photos, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(train, "save", lambda state, path: written.append(path.name))
    monkeypatch.setattr(train, "Network", functools.partial(TinyNetwork, size=16))
    for minutes, times in ((0, 101), (10, 1)):
        flags = f"--epochs 101 --batch-size 48 --log-every 1 --save-minutes {minutes}"
        train.main(tiny(photos / "train", tmp_path, flags))
        assert written == ["checkpoint.pt", "backbone.pt"] * times
        written.clear()
    lines = lines_of(tmp_path / "log.jsonl")
    assert sum("feature_rank" in line for line in lines) == 1 + 101 // 2 + 1  # the first, and the last


def test_steps_that_the_scaler_skips_change_nothing(photos, tmp_path, monkeypatch):
    """float16: gradients that overflow at first must leave neither weights nor momentum behind."""
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(train, "Network", functools.partial(TinyNetwork, size=16))
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**30))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *_, **__: steps.append(1) or step(self))
    train.main(tiny(photos, tmp_path, "--precision float16 --epochs 8"))
    saved = load(tmp_path / "checkpoint.pt")
    assert 0 < len(steps) < 24 and saved["scaler"]["scale"] == 2.0 ** (30 - (24 - len(steps)))
    assert all(v.isfinite().all() for v in saved["network"].values())
    assert all(s["momentum_buffer"].isfinite().all() for s in saved["optimizer"]["state"].values())


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Of every copy from the host to a device without data: whether it lets the host go on."""

    seen = []

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        result, hosts = op(*arguments, **(options or {})), [t.device for t in arguments if torch.is_tensor(t)]
        if "copy" in str(op) and CPU in hosts and result.device.type == "meta":
            self.seen.append((options or {}).get("non_blocking", arguments[2:3] == (True,)))
        return result


@pytest.mark.parametrize("flags, copies", [("", 12), (METHODS[-3], 18)])  # 3 steps; a view: pixels, numbers
def test_no_step_waits_for_the_device(flags, copies, photos, tmp_path, monkeypatch):
    """On meta tensors, of which a read is an error; the only one is that of the logged step, the third."""
    meta, spy, Network = torch.device("meta"), Copies(), train.Network
    encoded = torch.rand(63, 4), torch.arange(63)
    monkeypatch.setattr(train, "start", lambda *_: (meta, torch.float32))
    monkeypatch.setattr(train, "Network", lambda args: Network(args).to(meta))
    monkeypatch.setattr(train, "encode", lambda *_: spy.seen.clear() or encoded)  # before the first step
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with pytest.raises(RuntimeError, match="meta tensors") as stopped, spy:
        train.main(tiny(photos, tmp_path, f"{flags} --log-every 3"))
    assert "float(v)" in str(stopped.traceback[1].statement)
    assert spy.seen == [True] * copies


def test_compile_makes_one_graph_for_training(photos, tmp_path, monkeypatch):
    graphs, compiled = [], nn.Module.compile

    def backend(graph, example):
        graphs.append([tuple(x.shape) for x in example if x.shape[1:] == (3, 16, 16)])
        return graph.forward

    recorded = lambda self, **options: compiled(self, backend=backend, **options)
    monkeypatch.setattr(nn.Module, "compile", recorded)
    train.main(tiny(photos, tmp_path, "--max-steps 4 --compile"))
    assert graphs == [[(16, 3, 16, 16)] * 2]


BAD = {
    "--gray 7": "--gray: 7 is not between 0 and 1",
    "--warmup-epochs 9": "--epochs must exceed --warmup-epochs",
    "--view-sizes 16": "--view-sizes name two views or more",
    "--loss cwrgp --ema 0.9": "--ema: CW-RGP has no teacher",
    "--data nowhere": "--dataset folder needs --data FOLDER, and nowhere is none",
    "--dataset shapes": "--dataset shapes draws its own images",
    "--batch-size 64": "lower --batch-size 64",
}


@pytest.mark.parametrize("flags, message", BAD.items())
def test_bad_commands_name_what_is_wrong(flags, message, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError)) as stopped:
        train.main(tiny(photos, "run", flags))
    assert message in capsys.readouterr().err + str(stopped.value)
    assert not Path("run").exists()


def test_what_was_saved_is_neither_trusted_nor_touched(finished, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    harmful = type("Harmful", (), {"__reduce__": lambda self: (os.system, ("touch harm",))})
    torch.save({"config": harmful()}, "harmful.pt")
    whole = (finished[0] / "checkpoint.pt").read_bytes()
    damaged, malicious = whole[:1000], Path("harmful.pt").read_bytes()
    cases = (damaged, "cannot be read"), (malicious, "cannot be read"), (whole, "seed 0 there, 1 here")
    for content, message in cases:
        Path("run/checkpoint.pt").write_bytes(content)
        with pytest.raises(SystemExit, match=f"run/checkpoint.pt.*{message}"):
            train.main(tiny(photos, "run", "--max-steps 13 --seed 1"))
        assert Path("run/checkpoint.pt").read_bytes() == content and not Path("harm").exists()


def test_documented_commands_parse():
    scripts = {"train.py": train, "linear_eval.py": linear_eval, "detect_transfer.py": detect_transfer}
    scripts = {name: script for name, script in scripts.items() if script}
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    described = "\n".join(script.__doc__ for script in scripts.values())
    lines += re.findall("^ +(?:python|torchrun).*", described, re.M)
    commands = [shlex.split(part) for line in lines for part in line.split("#")[0].split("&&")]
    seen = set()
    for words in filter(None, commands):
        at = [i for i, word in enumerate(words) if Path(word).name in (*scripts, "intl.py")]
        if at:
            name, arguments = Path(words[at[0]]).name, [w for w in words[at[0] + 1 :] if w != "&"]
            seen.add(name)
            assert name == "intl.py" and set(arguments[:1]) <= {"--plot"} or scripts[name].parse(arguments)
        elif detect_transfer:
            assert words[0] in "python3 . pip pytest trap wait PYTHONPATH=. tensorboard".split(), words
    assert seen == {"intl.py", *scripts}


def test_documented_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop, result = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 512))
    names = dict(globals(), backbone=backbone, loader=[torch.randn(2, 16, 3, 2, 2)])
    exec(loop, names)
    assert {"alignment", "trace", "floor", "score", "price"} == set(names["criterion"].parts)
    Path("runs/imagenet").mkdir(parents=True)
    torch.save(train.build_backbone("resnet50", "imagenet")[0].state_dict(), "runs/imagenet/backbone.pt")
    exec(result.replace("backbone.load", "found = backbone.load"), names)
    assert names["found"] == (["fc.weight", "fc.bias"], [])


def test_tables_are_what_the_logs_say():
    written = "\n".join((HERE / name).read_text() for name in ("README.md", "evidence/README.md"))
    assert all(table in written for table in run("evidence/tables.py").strip().split("\n\n"))


def test_named_tests_exist():
    own = Path(__file__).read_text()
    for module in HERE.glob("*.py"):
        for names in re.findall(r"\[(test_[^\]]*)\]", module.read_text()):
            for name in re.split(r",\s*(?:# )?", names):
                assert f"def {name.strip()}(" in own, name


# --- Evaluation of anybody's backbone ----------------------------------------------------------------------
LAYOUTS = {  # of publishers: entry of the file, prefix, and some of what has to be dropped
    "official INTL": ("state_dict", "module.backbone.", "module.projector.0.weight"),
    "MoCo v1, v2": ("state_dict", "module.encoder_q.", "module.encoder_k.conv1.weight", "module.queue"),
    "MoCo v3": ("state_dict", "module.base_encoder.", "module.predictor.0.weight"),
    "Barlow Twins": ("", ""),
    "VICReg": ("model", "module.backbone.", "module.projector.0.weight"),
    "DINO": ("teacher", "backbone.", "head.mlp.0.weight"),
    "DINO, wrapped": ("teacher", "module.backbone.", "module.head.mlp.0.weight"),
    "SwAV": ("", "module.", "module.projection_head.0.weight", "module.prototypes.weight"),
    "solo-learn": ("state_dict", "backbone.", "projector.0.weight", "classifier.weight"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_publishers_checkpoint_gives_the_features_of_the_bare_network(name, tmp_path, capsys):
    entry, prefix, *others = LAYOUTS[name]
    network = train.build_backbone("resnet18", "imagenet")[0].eval()
    x = randf(2, 3, 32, 32)
    for p in network.state_dict().values():
        p.add_(torch.rand_like(p) * 0.1 if p.is_floating_point() else 3)
    counters = ["num_batches_tracked"] if name == "SwAV" else []  # old checkpoints have none
    weights = {prefix + k: v for k, v in network.state_dict().items() if k.split(".")[-1] not in counters}
    content = weights | {key: torch.zeros(2) for key in (f"{prefix}fc.weight", f"{prefix}fc.bias", *others)}
    content = {entry: content, "student": {}, "args": argparse.Namespace(a=1)} if entry else content
    torch.save(content, tmp_path / "c.pt")
    args = linear_eval.parse(["--checkpoint", str(tmp_path / "c.pt"), "--arch", "resnet18"])
    backbone, width, _ = linear_eval.read_backbone(args)
    assert torch.equal(backbone.eval()(x), network(x)) and width == 512
    assert "resnet18" in capsys.readouterr().out


def test_no_other_network_is_evaluated_than_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    networks = (("resnet18", "imagenet"), ("resnet34", "imagenet"), ("resnet18", "small"))
    state, deeper, small = (train.build_backbone(*network)[0].state_dict() for network in networks)
    lacking = {k: v for k, v in state.items() if k != "layer3.0.conv1.weight"}
    cases = {"lacking": lacking, "deeper": deeper, "small": small, "list": [1, 2], "a": {"a": torch.zeros(2)}}
    for name, content in cases.items():
        torch.save(content, f"{name}.pt")
    for name in (*cases, "missing"):
        args = linear_eval.parse(["--checkpoint", f"{name}.pt", "--arch", "resnet18"])
        with pytest.raises(SystemExit, match=rf"{name}.pt (is no|cannot be read)"):
            linear_eval.read_backbone(args)
    with pytest.raises(SystemExit, match="runs/shapes/checkpoint.pt cannot be read"):
        linear_eval.main([])


def test_a_linear_head_is_as_good_as_logistic_regression():
    """By L-BFGS in float64 with the same weight decay, on features whose classes overlap."""
    centres, labels = randn(5, 20, seed=3), torch.arange(3000) % 5
    x = (centres[labels] + 1.5 * randn(3000, 20)).float()
    x, y, x_val, y_val = x[:2000], labels[:2000], x[2000:], labels[2000:]
    weight = torch.zeros(5, 21, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")
    logits = lambda x: x.double() @ weight[:, :20].T + weight[:, 20]

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


def evaluate(monkeypatch, finished, photos, folder, flags):
    """linear_eval.main in this process on the tiny run; the backbone's tensors after it."""
    found, read = [], linear_eval.read_backbone
    monkeypatch.setattr(linear_eval, "read_backbone", lambda args: found.append(read(args)) or found[-1])
    own = f"--checkpoint {finished[0]}/checkpoint.pt --data {photos} --output {folder}"
    linear_eval.main(f"{own} --workers 0 --batch-size 16 {flags}".split())
    return found[-1][0].state_dict()


def test_the_backbone_is_frozen_unless_it_is_fine_tuned(finished, photos, tmp_path, monkeypatch):
    """Which happens at the published constant rates, each process with a BN of its own."""
    before, weights = (finished[0] / "checkpoint.pt").read_bytes(), load(finished[0] / "backbone.pt")
    evaluating = functools.partial(evaluate, monkeypatch, finished, photos, tmp_path)
    after = evaluating("--epochs 2 --protocol linear features knn")
    assert all(torch.equal(weights[k], after[k]) for k in weights)
    rates, step = [], torch.optim.SGD.step
    of = lambda optimizer: [group["lr"] for group in optimizer.param_groups]
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *_: rates.append(of(self)) or step(self))
    tuned = evaluating("--epochs 2 --protocol finetune")
    assert "SyncBatchNorm" not in Path(linear_eval.__file__).read_text()
    assert not any(torch.equal(weights[k], tuned[k]) for k in weights)  # BN's statistics and counters too
    assert rates == [pytest.approx([0.2 * 16 / 256, 0.006 * 16 / 256])] * 6
    rows = lines_of(tmp_path / "results.jsonl")
    assert [row["protocol"] for row in rows] == ["features", "knn", "linear", "finetune"]
    assert all(row["images"] == [48, 15] for row in rows)
    assert (finished[0] / "checkpoint.pt").read_bytes() == before


def test_linear_classifiers_do_not_influence_each_other_and_resume(finished, photos, tmp_path, monkeypatch):
    """A classifier trained beside others, and stopped on its way, is bitwise the one trained alone."""
    heads, validate, save = {}, linear_eval.validate, linear_eval.save

    def stop_in_the_second_epoch(state, path):
        save(state, path)
        if state["step"] == 5:
            raise KeyboardInterrupt

    def linear(name, rates):
        flags = f"--epochs 3 --lr {rates} --protocol linear --save-minutes 0 --log-every 1"
        evaluate(monkeypatch, finished, photos, tmp_path / name, flags)

    last = lambda model: {len(model.heads): model.heads[-1].weight.detach().clone()}
    spy = lambda model, *rest: heads.update(last(model)) or validate(model, *rest)
    monkeypatch.setattr(linear_eval, "validate", spy)
    linear("alone", "1")
    monkeypatch.setattr(linear_eval, "save", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        linear("both", "0.1 1")
    monkeypatch.setattr(linear_eval, "save", save)
    linear("both", "0.1 1")
    assert torch.equal(heads[1], heads[2])
    assert not (tmp_path / "both" / "linear.pt").exists()


def test_labelled_images_are_of_every_class_or_those_of_the_list(photos, tmp_path):
    images, names = train.load_data("folder", photos, 0)[0], tmp_path / "list.txt"
    draw = lambda percent, seed=0: linear_eval.labelled_rows(images, percent, None, seed)
    for percent, each in ((1, 1), (10, 2), (100, 16)):
        assert images.targets[draw(percent)].bincount().tolist() == [each] * 3
    assert draw(10, 0).tolist() == draw(10, 0).tolist() != draw(10, 1).tolist()
    names.write_text("3.png\n11.png\n\n")
    rows = linear_eval.labelled_rows(images, 100, str(names), 0)
    assert sorted(Path(images.samples[i][0]).name for i in rows.tolist()) == ["11.png", "3.png"]
    names.write_text("no such.png\n")
    with pytest.raises(SystemExit, match="list.txt"):
        linear_eval.labelled_rows(images, 100, str(names), 0)


def test_every_validation_image_counts_once_over_processes(tmp_path):
    for split, i in [("train", i) for i in range(60)] + [("val", i) for i in range(1001)]:
        path = tmp_path / split / f"class {i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = torch.randint(0, 100, (3, 8, 8), generator=generator(i)).to(torch.uint8)
        image[i % 3] += 100 * (torch.rand(1, generator=generator(i)) < 0.8).byte()
        TF.to_pil_image(image).save(path)
    flags = f"--random --arch resnet18 --stem cifar --size 8 --data {tmp_path} --lr 5 --workers 0"
    flags += " --protocol features knn linear --epochs 6 --batch-size 12 --output"
    for processes in (0, 2, 3):
        run("linear_eval.py", *flags.split(), tmp_path / str(processes), processes=processes)
    rows = [lines_of(tmp_path / name / "results.jsonl") for name in "023"]
    one, two, three = ([row["results"] for row in own] for own in rows)
    count = one[2]["learning rate 5"][0] * 1001 / 100
    assert one == two == three
    assert count == pytest.approx(round(count), abs=1e-3) and count > 800


# --- Detection ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("scenes")
    detect_transfer.write_shapes(folder, 0, {"train": 6, "val": 11})
    return folder


SMALL = """--short-sides 64 --test-short-side 64 --long-side 128 --train-proposals 50 10 --rois 8 --images 8
    --test-proposals 50 5 --detections 5 --batch-size 2 --warmup-images 2 --log-every 1 --workers 0
    --save-minutes 0""".split()


def detecting(finished, data, folder, flags=""):
    pytest.importorskip("pycocotools")
    paths = ["--checkpoint", finished[0] / "checkpoint.pt", "--data", data, "--output", folder]
    return [*SMALL, *map(str, paths), *flags.split()]


def detector(finished, flags=""):
    """The detector of these flags on the tiny run's backbone, for 3 classes, and its tensors."""
    args = detect_transfer.parse(detecting(finished, ".", ".", flags))
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
    if hasattr(model.backbone, "body"):
        return dict(model.backbone.body.state_dict())
    res5 = model.roi_heads.box_head[0].state_dict()
    return model.backbone.state_dict() | {f"layer4.{k}": v for k, v in res5.items()}


@pytest.mark.parametrize("norm", ["bn", "frozen"])
@pytest.mark.parametrize("model", ["", FPN])
def test_the_detector_has_the_backbones_weights_and_moves_all_but_frozen_norms(model, norm, finished):
    network, state = detector(finished, f"{model} --norm {norm}")
    part = backbone_part(network)
    assert set(part) == set(state) and all(torch.equal(state[k], part[k]) for k in part)
    image, target = example()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01)
    sum(network.train()([image], [target])[k] for k in ("loss_classifier", "loss_mask")).backward()
    optimizer.step()
    for k, v in backbone_part(network).items():
        assert torch.equal(v, state[k]) == (norm == "frozen" and bool(re.search(r"bn|downsample.1", k))), k


def test_c4_equals_an_independent_computation(finished):
    """Logits of boxes and masks from the checkpoint's tensors: trunk, RoIAlign, res5, BN, predictors."""
    network, state = detector(finished)
    heads, seen = network.eval().roi_heads, {}
    for parameter in heads.box_predictor.parameters():
        parameter.data *= 1e-3  # hardly trained networks move boxes out of the image
    for name in ("box_predictor", "mask_predictor", "box_roi_pool"):
        hook = lambda _, inputs, output, name=name: seen.setdefault(name, []).append((inputs, output))
        getattr(heads, name).register_forward_hook(hook)
    x = randf(1, 3, 64, 96)
    network([x[0]])
    resnet = torchvision.models.resnet18().eval()
    resnet.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    resnet.load_state_dict(state, strict=False)
    h = TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for part in list(resnet.children())[:7]:  # to layer3, res4
        h = part(h)

    predictor, mask = heads.box_predictor[1], heads.mask_predictor
    boxes, masks = [inputs[1] for inputs, _ in seen["box_roi_pool"]]
    res5 = lambda regions: resnet.layer4(torchvision.ops.roi_align(h, regions, 14, 1 / 16, 0, aligned=True))
    pooled = res5(boxes).mean((2, 3)) / (1 + 1e-5) ** 0.5  # the extra BN, untrained
    close = functools.partial(assert_close, rtol=1e-5, atol=1e-5)
    for layer, got in zip((predictor.cls_score, predictor.bbox_pred), seen["box_predictor"][0][1]):
        close(got, pooled @ layer.weight.T + layer.bias)
    shared, up = res5(masks) / (1 + 1e-5) ** 0.5, mask.conv5_mask
    up = F.conv_transpose2d(shared, up.weight, up.bias, stride=2).relu()
    expected = F.conv2d(up, mask.mask_fcn_logits.weight, mask.mask_fcn_logits.bias)
    close(seen["mask_predictor"][0][1], expected)
    assert len(expected) > 0


def test_c4_training_runs_res5_once_and_has_the_published_losses(finished, monkeypatch):
    """Against torchvision's own heads, with L1 in the place of its smooth L1. Those run res5 twice."""
    network, _ = detector(finished)
    heads, calls = network.roi_heads, []
    heads.box_head[1] = nn.Identity()  # BN would see different regions in the two
    heads.box_head.eval()
    image, target = example()
    features = network.backbone(image[None])
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
    assert_close(mine, expected)


def test_proposals_have_the_published_loss(finished):
    network, _ = detector(finished)
    labels, targets = [torch.tensor([1.0, 0, -1, 1, 0])], [randf(5, 4)]
    objectness, deltas = randf(5, 1, seed=1), randf(5, 4, seed=2)
    mine = network.rpn.compute_loss(objectness, deltas, labels, targets)
    used = torch.tensor([0, 1, 3, 4])
    box = (deltas - targets[0])[[0, 3]].abs().sum() / 4
    expected = F.binary_cross_entropy_with_logits(objectness[used, 0], labels[0][used]), box
    assert_close(mine, expected)


def measured_ap(data, folder, change=lambda target: target):
    """The AP of the annotations of a data set, changed, as if a network had found them, by predict itself."""
    loader = [data[0, i] for i in range(len(data))]
    queue = iter(change(t | {"scores": torch.ones(len(t["labels"]))}) for _, t in loader)
    model = nn.Identity()
    model.forward = lambda images: [next(queue)]
    model.transform = argparse.Namespace(min_size=(64,))
    found = detect_transfer.predict(model, data, loader, 64, CPU)
    return detect_transfer.average_precision(data, found, folder)


def test_ground_truth_has_an_ap_of_100(scenes, tmp_path):
    """Cropped to 28 x 28 and pasted back, masks lose little; displaced by half a pixel they lose 5 AP."""

    def paste(target, shift):
        crops = detect_transfer.crop_masks(target["masks"], target["boxes"], 28)[:, None]
        size = target["masks"].shape[1:]
        return target | {"masks": detect_transfer.paste_masks(crops, target["boxes"] + shift, *size)}

    ap = measured_ap(coco(scenes), tmp_path)
    assert [ap["box AP"], ap["box AP50"], ap["mask AP"], ap["mask AP50"]] == pytest.approx([100] * 4)
    assert detect_transfer.average_precision(coco(scenes), [], tmp_path)["box AP"] == 0
    changes = [functools.partial(paste, shift=shift) for shift in (0, 0.7)]
    exact, displaced = (measured_ap(coco(scenes), tmp_path, change)["mask AP"] for change in changes)
    assert exact > 93 and displaced < exact - 5


def test_detections_do_not_depend_on_the_number_of_processes(finished, scenes, tmp_path):
    files = []
    for processes in (0, 2):
        folder, flags = tmp_path / str(processes), "--base-lr 0 --norm frozen --evaluations 1 --max-steps 1"
        run("detect_transfer.py", *detecting(finished, scenes, folder, flags), processes=processes)
        files.append([json.loads((folder / f"results_{kind}.json").read_text()) for kind in ("bbox", "segm")])
    assert files[0] == files[1] and len(files[0][0]) > 11
    assert (tmp_path / "0" / "predictions.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags", ["", FPN])
def test_a_stopped_detection_run_ends_bitwise_like_an_undisturbed_one(flags, finished, scenes, tmp_path):
    detect_transfer.main(detecting(finished, scenes, tmp_path / "whole", flags))
    detect_transfer.main(detecting(finished, scenes, tmp_path / "halves", f"{flags} --max-steps 2"))
    detect_transfer.main(detecting(finished, scenes, tmp_path / "halves", flags))
    assert steps_of(tmp_path / "halves") == [1, 2, 3, 4]
    whole, halves = (load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "halves"))
    assert all(torch.equal(v, halves[k]) for k, v in whole.items())
    with pytest.raises(SystemExit, match="base_lr .* there, 0.5 here"):
        detect_transfer.main(detecting(finished, scenes, tmp_path / "halves", f"{flags} --base-lr 0.5"))


def test_coco_images_of_every_kind(tmp_path):
    """All kinds of masks; crowds, slivers, categories with gaps, ids from 0, images without an object."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images" / "train").mkdir(parents=True)
    for i in range(3):
        TF.to_pil_image(pictures(10)[i]).save(tmp_path / "images" / "train" / f"{i}.png")
    square = torch.zeros(10, 10, dtype=torch.uint8)
    square[2:6, 1:4] = 1
    outlines = [[[1, 2, 4, 2, 4, 6, 1, 6]], detect_transfer.encode_mask(square.bool())]
    outlines.append({"size": [10, 10], "counts": [12, 4, 6, 4, 6, 4, 64]})
    own = {"id": 0, "image_id": 0, "category_id": 7, "bbox": [1, 2, 3, 4], "segmentation": outlines[0]}
    kinds = [{"segmentation": outline} for outline in outlines] + [{"iscrowd": 1}, {"bbox": [9.5, 2, 3, 4]}]
    kinds.append({"image_id": 1, "category_id": 3})
    annotations = [own | {"id": i} | kind for i, kind in enumerate(kinds)]
    images = [{"id": i, "file_name": f"{i}.png", "height": 10, "width": 10} for i in range(3)]
    content = {"images": images, "categories": [{"id": c, "name": "x"} for c in (3, 7)]}
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(content | {"annotations": annotations}))
    data, flipped = coco(tmp_path, "train"), set()
    assert len(data) == 2 and data.masks  # the third image has no objects
    for epoch in range(20):
        image, target = data[epoch, 0]
        left = torch.equal(image, train.decode(str(tmp_path / "images/train/0.png")))
        flipped.add(left)
        x = [1.0, 2, 4, 6] if left else [6.0, 2, 9, 6]
        assert target["boxes"].tolist() == [x] * 3 and target["labels"].tolist() == [2] * 3
        assert all(torch.equal(m, square if left else square.flip(-1)) for m in target["masks"])
    assert flipped == {True, False} and data[0, 1][1]["labels"].tolist() == [1]
    file.write_text(json.dumps(content | {"annotations": [own]}))
    data = detect_transfer.CocoImages(tmp_path, "train", training=False)
    assert measured_ap(data, tmp_path)["box AP"] == pytest.approx(100)  # without a given area
    del own["segmentation"]
    file.write_text(json.dumps(content | {"annotations": [own]}))
    assert not coco(tmp_path, "train").masks  # boxes alone train
    for broken in ("{", json.dumps(content)):
        file.write_text(broken)
        with pytest.raises(SystemExit, match="instances_train2017.json is no COCO annotation file"):
            coco(tmp_path, "train")
    with pytest.raises(SystemExit, match="instances_test"):
        coco(tmp_path, "test")


# --- GPU ---------------------------------------------------------------------------------------------------
@needs_gpu
@pytest.mark.parametrize("flags", ["", "--precision float16", "--compile", METHODS[-3]])
def test_gpu_takes_steps_and_resumes(flags, photos, tmp_path, capsys):
    for until in 4, 6:
        train.main(tiny(photos, tmp_path, f"--device cuda {flags} --max-steps {until}"))
    assert "from 4, by 1 cuda" in capsys.readouterr().out


@needs_gpu
def test_gpu_input_and_step_never_wait_for_the_device(photos, tmp_path, monkeypatch):
    augmented = train.augmented

    def strict(views, args, step, device):
        torch.cuda.set_sync_debug_mode("error" if step in (3, 4) else "default")  # until the next input
        return augmented(views, args, step, device)

    monkeypatch.setattr(train, "augmented", strict)
    train.main(tiny(photos, tmp_path, "--device cuda --log-every 100 --epochs 100 --max-steps 8"))
    torch.cuda.set_sync_debug_mode("default")


def share_a_gpu(*arguments):
    """Two processes, which NCCL would refuse."""
    initialize, os.environ["LOCAL_RANK"] = dist.init_process_group, "0"
    dist.init_process_group = lambda backend, device_id, **options: initialize("gloo", **options)
    train.main(arguments)


@needs_gpu
def test_gpu_two_processes_equal_one(photos, tmp_path):
    arguments = [tiny(photos, tmp_path / name, "--device cuda --max-steps 5") for name in ("one", "two")]
    train.main(arguments[0])
    run("test_intl.py", "share_a_gpu", *arguments[1], processes=2, CUDA_VISIBLE_DEVICES="0")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-3)


@needs_gpu
def test_gpu_detects_and_evaluates(finished, photos, scenes, tmp_path, monkeypatch):
    detect_transfer.main(detecting(finished, scenes, tmp_path / "detection", "--device cuda"))
    flags = "--device cuda --epochs 2 --protocol features knn linear finetune"
    evaluate(monkeypatch, finished, photos, tmp_path, flags)
    assert len(lines_of(tmp_path / "results.jsonl")) == 4


@needs_gpu
def test_gpu_losses_views_and_neighbours_equal_the_cpus():
    z, cuda = randf(2, 32, 48), torch.device("cuda")
    for axis in AXES:
        expected = INTLLoss(axis=axis)(z)
        for dtype in (None, torch.float16):
            with torch.autocast("cuda", dtype, enabled=bool(dtype)):
                assert_close(INTLLoss(axis=axis)(z.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)
    args = train.parse("--batch-size 24 --view-sizes 32 32 --blur 0.5".split())
    for a, b in zip(*(train.augmented([pictures()] * 2, args, 3, device) for device in (CPU, cuda))):
        assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)
    data = randf(500, 8), torch.arange(500) % 4, randf(90, 8, seed=1), torch.arange(90) % 4
    assert train.knn_top1(*data, 5) == train.knn_top1(*[t.cuda() for t in data], 5)


if __name__ == "__main__":  # what tests start in processes of their own
    globals()[sys.argv[1]](*sys.argv[2:])
