"""All tests. They need no data set, no GPU and no network.

Numbers are compared with independent sources: eigendecompositions in float64, the scalar Newton
map, values of the official releases, torchvision's functions, and a single process where several
are tested.
"""

import argparse
import colorsys
import contextlib
import functools
import gc
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
import sysconfig
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import PIL.PngImagePlugin
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import intl
import linear_eval
import train
from intl import (
    CWRGPLoss,
    INTLLoss,
    SpectralLoss,
    iter_norm,
    newton_map,
    spectral_transform,
    whiten,
)

try:
    import detect_transfer
except ImportError:  # pycocotools is not installed
    detect_transfer = None

# Warnings inside torchvision and pycocotools.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
HAS_CPP_COMPILER = bool(
    (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)
needs_cpp_compiler = pytest.mark.skipif(
    not HAS_CPP_COMPILER, reason="needs a C++ compiler and Python.h"
)
AXES = ("channel", "batch")
both_axes = pytest.mark.parametrize("axis", AXES)

HERE = Path(__file__).parent
CPU = torch.device("cpu")
QUIET = (
    "--jitter 0 0 0 0 --jitter-prob 0 --gray 0 --solarize 0 --solarize-threshold 128 --blur 0"
).split()
FPN = "--model fpn --anchors 8 16 32 64 128"

# One thread, here and in the processes that tests start: sums are then rounded in the same order.
torch.set_num_threads(1)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(HERE),
}


@pytest.fixture(autouse=True)
def hide_gpu_from_cpu_tests(request, monkeypatch):
    if not request.node.name.startswith("test_gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def load(path):
    return torch.load(path, weights_only=True, map_location="cpu")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def randf(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=torch.float32)


def covariance(z, axis):
    """(m, d) -> (m, m) of the samples on the channel axis, (d, d) of the channels on "batch"."""
    variables = z if axis == "channel" else z.mT  # one variable per row, as torch.cov takes them
    return torch.cov(variables)


def value_and_gradient(loss, z, autocast=None):
    """The loss of z and its gradient; `autocast` is the dtype of an autocast around the loss."""
    torch.manual_seed(0)
    z = z.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        value = loss(z)
    gradient = torch.autograd.grad(value, z)[0]  # outside autocast, as PyTorch recommends
    return value.detach(), gradient


def marked_processes(mark):
    """Ids of all running processes whose environment contains the variable `mark`."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if f"{mark}=".encode() in path.read_bytes():
                pids.append(int(path.parent.name))
    return pids


@contextlib.contextmanager
def no_process_left_behind():
    """Yields an environment for child processes, and on exit kills those that still run in it.

    They are found by a variable in their environment, because torchrun starts each worker in a new
    session: killing the agent, or its process group, would leave the workers running.
    """
    mark = f"INTL_TEST_{uuid.uuid4().hex}"
    try:
        yield ENVIRONMENT | {mark: "1"}
    finally:
        deadline = time.time() + 10
        pids = marked_processes(mark)
        while pids and time.time() < deadline:  # repeated: an agent may have started a worker
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
            pids = marked_processes(mark)


def run(script, *arguments, processes=0, options=(), timeout=300, **environment):
    """Runs a script, under torchrun if `processes` is not 0, and returns its standard output."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", processes, *options]
    command += [HERE / script, *arguments]

    with no_process_left_behind() as base_environment:
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=base_environment | environment,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_running(pid):
    """False for a process that does not exist, and for one that has ended (a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    state = stat.rsplit(")", 1)[1].split()[0]
    return state != "Z"


def wait_until(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, f"nothing happened in {seconds} seconds"
        time.sleep(0.1)


@pytest.fixture
def sleeper(tmp_path):
    """A script that creates a file named after its process id, and sleeps."""
    script = tmp_path / "sleeper.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid').touch()\n"
        "time.sleep(3600)\n"
    )
    return script


def started_sleepers(tmp_path):
    return [int(path.stem) for path in tmp_path.glob("*.pid")]


@needs_proc
def test_a_failing_test_leaves_no_worker_of_torchrun_behind(sleeper, tmp_path):
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 {sleeper}"
    with (
        pytest.raises(RuntimeError, match="a test fails"),
        no_process_left_behind() as environment,
    ):
        agent = subprocess.Popen(launch.split(), env=environment, stderr=subprocess.DEVNULL)
        wait_until(lambda: len(started_sleepers(tmp_path)) == 2)
        assert all(is_running(pid) for pid in started_sleepers(tmp_path))
        raise RuntimeError("a test fails")

    assert agent.wait(timeout=10) == -signal.SIGKILL
    assert not any(is_running(pid) for pid in started_sleepers(tmp_path))


@needs_proc
def test_a_run_that_takes_too_long_leaves_no_process_behind(tmp_path):
    """The child starts a grandchild in a new session, as torchrun does, and waits for it."""
    script = tmp_path / "parent.py"
    sleep = "import time; time.sleep(3600)"
    script.write_text(
        "import pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {sleep!r}], start_new_session=True)\n"
        f"pathlib.Path({str(tmp_path)!r}, f'{{child.pid}}.pid').touch()\n"
        "child.wait()\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        run(script, timeout=10)
    (pid,) = started_sleepers(tmp_path)
    assert not is_running(pid)


# --- intl.py --------------------------------------------------------------------------------------
def centre(z, axis):
    """Centres samples over their channels, or channels over the samples: (..., m, d)."""
    return z - z.mean(-1 if axis == "channel" else -2, keepdim=True)


def centred_columns(m, d):
    """(m, d): orthonormal columns of mean zero. Their covariance is I / (m - 1)."""
    ones = torch.ones(m, 1, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.cat([ones, randn(m, d)], dim=1))  # (m, 1 + d)
    return q[:, 1:]


def scalar_iter_norm(l, iterations=4):
    """IterNorm's g(l), (..., n), by definition: P_T of x = l / tr S, over sqrt(tr S)."""
    trace = l.sum(-1, keepdim=True)
    p = torch.ones_like(l)
    for _ in range(iterations):
        p = (3 * p - p**3 * l / trace) / 2
    return p / trace.sqrt()


def gradient_of(value, z):
    return torch.autograd.grad(value, z, retain_graph=True)[0]


# --- IterNorm and whitening
@both_axes
@pytest.mark.parametrize("m, d", [(6, 9), (7, 7), (9, 6)])
def test_iter_norm_maps_every_eigenvalue_by_newton_map(m, d, axis):
    z = randn(m, d)
    l, U = torch.linalg.eigh(covariance(z, axis))
    l_hat = newton_map((l / l.sum()).clamp_min(0), 4)

    found = covariance(iter_norm(z, axis=axis), axis)
    assert_close(found, U @ l_hat.diag() @ U.T, rtol=0, atol=1e-12)


@both_axes
@pytest.mark.parametrize("m, d", [(6, 9), (7, 7), (9, 6)])
def test_whitening_maps_every_nonzero_eigenvalue_to_one(m, d, axis):
    z = randn(m, d)
    l, U = torch.linalg.eigh(covariance(z, axis))  # ascending
    rank = min(m, d - 1) if axis == "channel" else min(m - 1, d)
    l_hat = torch.zeros_like(l)
    l_hat[len(l) - rank :] = 1

    found = covariance(whiten(z, axis=axis), axis)
    assert_close(found, U @ l_hat.diag() @ U.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", range(1, 9))
def test_newton_map_is_increasing_and_concave(iterations):
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    slope = newton_map(x, iterations).diff()
    assert slope.min() > -1e-15
    assert slope.diff().max() < 1e-15


@pytest.mark.parametrize("iterations", range(1, 9))
def test_newton_map_fixes_0_and_1_and_is_below_1_between_them(iterations):
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    h = newton_map(x, iterations)
    assert h[0] == 0
    assert h[-1] == 1

    rounding = 0 if iterations < 6 else 1e-15  # from 6 steps on, h of x near 1/2 rounds to 1
    assert h[1:1000].max() < 1 + rounding


def test_newton_map_tends_to_1():
    assert newton_map(1e-3, 40) == pytest.approx(1)


@both_axes
@pytest.mark.parametrize("m, d", [(4, 7), (5, 5), (5, 12), (12, 5)])
@pytest.mark.parametrize("g", [scalar_iter_norm, torch.exp])
def test_both_gram_matrices_give_the_same_transform(g, m, d, axis):
    z = randn(m, d)
    zc = centre(z, axis)
    divisor = (d if axis == "channel" else m) - 1

    l, U = torch.linalg.eigh(zc @ zc.T / divisor)  # (m,), (m, m)
    from_the_left = U @ g(l.clamp_min(0)).diag() @ U.T @ zc
    l, U = torch.linalg.eigh(zc.T @ zc / divisor)  # (d,), (d, d)
    from_the_right = zc @ U @ g(l.clamp_min(0)).diag() @ U.T

    found = spectral_transform(z, g, axis=axis)
    assert_close(found, from_the_left)
    assert_close(found, from_the_right)


@both_axes
@pytest.mark.parametrize("m, d", [(4, 7), (5, 5), (5, 12), (12, 5)])
def test_iter_norm_is_the_spectral_transformation_by_newtons_polynomial(m, d, axis):
    z = randn(m, d).requires_grad_()
    weight = randn(m, d, seed=1)
    exact = spectral_transform(z, scalar_iter_norm, axis=axis)
    found = iter_norm(z, axis=axis)
    assert_close(found, exact)
    assert_close(gradient_of((found * weight).sum(), z), gradient_of((exact * weight).sum(), z))


SPECTRA = [(64, 128, "random"), (256, 64, "random"), (128, 128, "decaying"), (96, 256, "low rank")]


@both_axes
@pytest.mark.parametrize("iterations", [4, 10, 20, 40])
@pytest.mark.parametrize("m, d, kind", SPECTRA)
def test_iter_norm_is_stable(m, d, kind, iterations, axis):
    """In float32, against the eigenvalues in float64."""
    z = randn(m, d)
    if kind == "decaying":
        u, s, v = torch.linalg.svd(z, full_matrices=False)
        z = u * torch.logspace(0, -3, len(s), dtype=z.dtype) @ v
    if kind == "low rank":
        z = z[:, :8] @ randn(8, d, seed=1)
    z = z.float()

    n = m if axis == "channel" else d
    l = torch.linalg.svdvals(centre(z.double(), axis)).square()  # (min(m, d),)
    l = F.pad(l, (0, n - len(l)))  # (n,)
    expected = newton_map(l / l.sum(), iterations).sort().values

    z_hat = iter_norm(z, iterations=iterations, axis=axis).double()
    found = torch.linalg.eigvalsh(covariance(z_hat, axis))  # (n,), ascending
    assert (found - expected).abs().max() < 1e-3


def test_the_uncoupled_form_explodes():
    S = covariance(randf(256, 64), "channel")
    N = S / S.trace()  # (256, 256)
    l, U = torch.linalg.eigh(N.double())
    exact = U @ (scalar_iter_norm(l, 15) * l.sum().sqrt()).diag() @ U.T

    P = torch.eye(256)
    for _ in range(15):
        P = 1.5 * P - 0.5 * P @ P @ P @ N
    assert not (P - exact).norm() < exact.norm()  # it may also be NaN


# --- Gradients
SMOOTH = {
    "IterNorm": lambda z, axis: iter_norm(z, axis=axis),
    "IterNorm, 12 steps": lambda z, axis: iter_norm(z, axis=axis, iterations=12),
    "spectral IterNorm": lambda z, axis: spectral_transform(z, scalar_iter_norm, axis=axis),
    "1 / (1 + l)": lambda z, axis: spectral_transform(z, lambda l: 1 / (1 + l), axis=axis),
    "trace loss": lambda z, axis: intl.trace_loss(iter_norm(z, axis=axis), axis=axis),
    "INTL": lambda z, axis: INTLLoss(axis=axis, beta=0.05)([z, z.flip(1) + 1]),
    "INTL with a teacher": lambda z, axis: INTLLoss(axis=axis, beta=0.05)(
        [z], teacher=randn(*z.shape, seed=7)
    ),
}
POWERS = {
    "whitening": lambda z, axis: whiten(z, axis=axis),
    "power 0.3": lambda z, axis: spectral_transform(z, intl.power(0.3), axis=axis),
}


def identity(z):
    return z


def matrices(kind, m, d):
    """A function that makes z (m, d), and the point at which its gradient is checked."""
    if kind == "rank 2":  # z moves within the matrices of rank 2
        factor = randn(2, d, seed=1)
        return lambda a: a @ factor, randn(m, 2)
    if kind == "repeated":  # most eigenvalues are equal
        square = randn(max(m, d), max(m, d))
        q, _ = torch.linalg.qr(square - square.mean(0))
        return identity, q[:m, :d]
    return identity, randn(m, d)


def differentiates(function, make_z, x):
    return gradcheck(lambda x: function(make_z(x)), x.clone().requires_grad_())


@both_axes
@pytest.mark.parametrize("m, d", [(4, 7), (5, 5), (7, 4)])
@pytest.mark.parametrize("kind", ["full rank", "rank 2", "repeated"])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name, kind, m, d, axis):
    """Also where eigenvalues of the Gram matrix are zero, or repeated."""
    make_z, x = matrices(kind, m, d)
    assert differentiates(lambda z: SMOOTH[name](z, axis), make_z, x)


@both_axes
@pytest.mark.parametrize("m, d", [(4, 7), (5, 5), (7, 4)])
@pytest.mark.parametrize("kind", ["full rank", "rank 2"])
@pytest.mark.parametrize("name", POWERS)
def test_gradcheck_of_whitening_while_the_rank_stays(name, kind, m, d, axis):
    """Whitening is not differentiable where an eigenvalue may leave zero."""
    make_z, x = matrices(kind, m, d)
    assert differentiates(lambda z: POWERS[name](z, axis), make_z, x)


@pytest.mark.parametrize("name", ["whitening", "power 0.3", "spectral IterNorm"])
def test_gradcheck_where_all_eigenvalues_are_equal(name):
    function = {**SMOOTH, **POWERS}[name]
    z = centred_columns(7, 4).T  # (4, 7): the covariance of its 4 samples is I / 6
    assert differentiates(lambda z: function(z, "channel"), identity, z)


def test_autograd_through_eigh_is_nan_where_eigenvalues_are_equal():
    """The reason for the hand-written backward pass."""
    S = torch.eye(4, dtype=torch.float64).requires_grad_()
    l, U = torch.linalg.eigh(S)
    value = ((U * l.rsqrt()) @ U.T * randn(4, 4)).sum()
    assert gradient_of(value, S).isnan().any()


# --- Trace loss, its floor, and the weight beta
def test_trace_loss_is_least_at_equal_eigenvalues():
    n = 16
    iterations = 4
    floor = intl.trace_floor(n, iterations)
    for seed in range(20):
        U, _ = torch.linalg.qr(randn(n, n, seed=seed))
        x = torch.rand(n, generator=generator(seed), dtype=torch.float64)
        cov = U @ newton_map(x / x.sum(), iterations).diag() @ U.T
        assert (1 - cov.diagonal()).square().sum() > floor + 1e-6, seed


def test_trace_floor_of_the_published_setting_is_209_6():
    assert intl.trace_floor(256, 4) == pytest.approx(209.6, abs=0.05)


def test_trace_floor_of_a_lower_rank():
    expected = 8 * (1 - 2 * newton_map(0.5, 4) / 8) ** 2
    assert intl.trace_floor(8, 4, rank=2) == pytest.approx(expected)


N = 8  # samples in the tests of the price of lost rank
LOST_RANKS = [(r, T) for r in range(1, N) for T in (2, 4)]


def loss_at_price_2(r, T):
    """The loss whose beta makes rank r cost 2; its value for unrelated views of equal spectrum."""
    beta = 2 / intl.rank_price(r, N, T, beta=1)
    return INTLLoss(iterations=T, beta=beta), 2 + 2 * beta * intl.trace_floor(N, T)


@pytest.mark.parametrize("r, T", LOST_RANKS)
def test_unrelated_views_of_equal_spectrum_have_the_loss_of_the_floor_plus_2(r, T):
    loss, expected = loss_at_price_2(r, T)
    q = centred_columns(40, 16).T  # (16, 40)
    assert loss([q[:N], q[N:]]).item() == pytest.approx(expected)


@pytest.mark.parametrize("r, T", LOST_RANKS)
def test_no_rank_is_worth_2(r, T):
    """If rank r costs 2, equal views of rank r have no less loss than unrelated full-rank ones."""
    loss, unrelated = loss_at_price_2(r, T)
    q = centred_columns(40, 16).T  # (16, 40)
    for seed in range(20):
        scales = torch.rand(r, generator=generator(seed))
        z = randn(N, r, seed=seed) * scales @ q[:r]  # (8, 40), rank r
        assert loss([z, z]) > unrelated - 1e-9, seed
        assert loss.parts["alignment"] < 1e-9, seed


@pytest.mark.parametrize("r, T", [(r, T) for r, T in LOST_RANKS if N % r == 0])
def test_the_price_of_a_rank_is_reached_at_equal_eigenvalues_and_equal_variances(r, T):
    loss, unrelated = loss_at_price_2(r, T)
    q = centred_columns(40, 16).T  # (16, 40)
    z = q[torch.arange(N) % r]  # (8, 40): r equal eigenvalues; equal variances, since r divides 8
    assert loss([z, z]).item() == pytest.approx(unrelated)


@pytest.mark.parametrize("r, T", LOST_RANKS)
def test_a_teacher_halves_the_price_of_a_rank(r, T):
    loss, _ = loss_at_price_2(r, T)
    assert loss.setting(N, 40, teacher=True).price == loss.setting(N, 40).price / 2


@pytest.mark.parametrize("n, T, price", [(256, 4, 4.4), (32, 4, 0.9), (256, 2, 0.8)])
def test_prices_of_rank_1_at_the_published_beta(n, T, price):
    beta = INTLLoss(iterations=T).setting(n, 999).beta
    assert intl.rank_price(1, n, T, beta) == pytest.approx(price, abs=0.05)


def test_price_of_rank_64_in_the_published_setting_is_0_6():
    beta = INTLLoss().setting(256, 999).beta
    assert intl.rank_price(64, 256, 4, beta) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    "n, T, full, r", [(16, 4, 16, 4), (512, 4, 512, 64), (2048, 2, 255, 255 / 4), (8, 4, 4, 1)]
)
def test_the_balanced_beta_is_the_least_with_both_prices(n, T, full, r):
    """At least 2 for rank 1, and at least 0.6 for rank r = full / 4, at most 64."""
    beta = intl.balanced_beta(n, T, full=full)
    floor = intl.trace_floor(n, T, full)
    price_of_1 = 2 * beta * (intl.trace_floor(n, T, 1) - floor)
    price_of_r = 2 * beta * (intl.trace_floor(n, T, r) - floor)
    assert min(price_of_1 / 2, price_of_r / 0.6) == pytest.approx(1)


def test_the_balanced_beta_is_zero_where_no_rank_can_be_lost():
    assert intl.balanced_beta(2, 4, full=1) == 0


eight_coordinates_of_rank_4 = pytest.mark.parametrize(
    "axis, m, d", [("batch", 5, 8), ("channel", 8, 5)]
)


@eight_coordinates_of_rank_4
def test_a_loss_with_the_balanced_beta_computes_it_for_its_full_rank(axis, m, d):
    setting = INTLLoss(axis=axis, beta="balanced").setting(m, d)
    assert setting.n == 8
    assert setting.full_rank == 4
    assert setting.beta == intl.balanced_beta(8, 4, full=4)


@eight_coordinates_of_rank_4
def test_a_loss_with_the_balanced_beta_equals_one_with_its_number(axis, m, d):
    z = randn(2, m, d)
    balanced = INTLLoss(axis=axis, beta="balanced")
    beta = intl.balanced_beta(8, 4, full=4)
    assert balanced(z) == INTLLoss(axis=axis, beta=beta)(z)

    price = 2 * beta * (intl.trace_floor(8, 4, 1) - intl.trace_floor(8, 4, 4))
    assert balanced.parts["price"] == price


# n is the number of samples on the channel axis, of channels on the batch axis.
few_coordinates = pytest.mark.parametrize(
    "axis, m, d, n", [("channel", 8, 20, 8), ("channel", 3, 20, 3), ("batch", 20, 8, 8)]
)


@few_coordinates
@pytest.mark.parametrize("teacher", [False, True])
def test_the_published_beta_is_refused_where_it_is_not_positive(teacher, axis, m, d, n):
    views = randn(2, m, d)
    with pytest.raises(ValueError, match=rf"\b{n}\b") as refused:
        if teacher:
            INTLLoss(axis=axis)([views[1]], teacher=views[0])
        else:
            INTLLoss(axis=axis)(views)
    assert 'beta="balanced"' in str(refused.value)


@few_coordinates
@pytest.mark.parametrize("beta", [0.0, 0.05, "balanced"])
def test_every_other_beta_works_with_few_samples(beta, axis, m, d, n):
    assert INTLLoss(axis=axis, beta=beta)(randn(2, m, d)).isfinite()


@pytest.mark.parametrize("axis, m, d", [("channel", 9, 20), ("batch", 20, 9)])
def test_the_published_beta_is_used_from_9_on(axis, m, d):
    z = randn(2, m, d)
    beta = 0.01 * (math.log2(9) - 3)
    assert INTLLoss(axis=axis)(z) == INTLLoss(axis=axis, beta=beta)(z)


# --- The loss equals its definition, and the official releases
def definition(z, axis, iterations, beta, teacher=False):
    """The loss of views z, V times (m, d), from IterNorm's outputs. z[0] may be a teacher's."""
    z_hat = [iter_norm(v, axis=axis, iterations=iterations) for v in z]
    total = 0
    for v in z_hat[1:]:
        cosine = (F.normalize(v, dim=1) * F.normalize(z_hat[0], dim=1)).sum(1)  # (m,)
        total = total + (2 - 2 * cosine).mean() + beta * intl.trace_loss(v, axis=axis)
        if not teacher:
            total = total + beta * intl.trace_loss(z_hat[0], axis=axis)
    return total / (len(z_hat) - 1)


def published_beta(m, d, axis):
    n = m if axis == "channel" else d
    return 0.01 * (math.log2(n) - 3)


def assert_equal_loss_and_gradient(loss, expected, z):
    assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_close(gradient_of(loss, z), gradient_of(expected, z), rtol=1e-9, atol=1e-12)


several_sizes = pytest.mark.parametrize(
    "V, m, d", [(2, 12, 20), (2, 12, 12), (2, 20, 12), (4, 10, 30)]
)


@both_axes
@several_sizes
@pytest.mark.parametrize("iterations", [1, 2, 4, 11])
def test_loss_equals_its_definition(iterations, V, m, d, axis):
    """INTLLoss does not compute z_hat on the channel axis; the definition does."""
    z = randn(V, m, d).requires_grad_()
    loss = INTLLoss(axis=axis, iterations=iterations)(z)
    expected = definition(z, axis, iterations, published_beta(m, d, axis))
    assert_equal_loss_and_gradient(loss, expected, z)


@both_axes
@several_sizes
@pytest.mark.parametrize("iterations", [1, 2, 4, 11])
def test_loss_with_a_teacher_equals_its_definition(iterations, V, m, d, axis):
    z = randn(V, m, d).requires_grad_()
    loss = INTLLoss(axis=axis, iterations=iterations)(z[1:], teacher=z[0])
    beta = published_beta(m, d, axis)
    expected = definition([z[0].detach(), *z[1:]], axis, iterations, beta, teacher=True)
    assert_equal_loss_and_gradient(loss, expected, z)


@both_axes
@several_sizes
def test_the_teachers_view_receives_no_gradient(V, m, d, axis):
    z = randn(V, m, d).requires_grad_()
    gradient = gradient_of(INTLLoss(axis=axis)(z[1:], teacher=z[0]), z)
    assert gradient[0].abs().max() == 0


@pytest.mark.parametrize("iterations", [1, 4, 7])
@pytest.mark.parametrize("m, d", [(12, 20), (16, 16), (20, 12)])
def test_the_fast_loss_equals_the_definition(m, d, iterations):
    z = randn(2, m, d).requires_grad_()
    plain = intl.intl_loss_by_definition(*z, iterations=iterations)
    loss = INTLLoss(iterations=iterations)(list(z))
    assert_close(loss, plain, rtol=1e-9, atol=0)
    assert_close(gradient_of(loss, z), gradient_of(plain, z), rtol=1e-9, atol=1e-12)


REFERENCE = json.loads((HERE / "evidence" / "reference_values.json").read_text())


def case_id(case):
    return "{axis}-{m}x{d}-T{iterations}-V{V}".format(V=len(case["views"]), **case)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_official(found, values, atol=0.0):
    assert_close(found, tensor(values), rtol=1e-9, atol=atol)


def assert_official_gradient(found, values):
    assert_official(found, values, atol=1e-10 * tensor(values).abs().max().item())


def official_setting(case):
    """INTLLoss with the release's beta, which is the default where INTLLoss accepts it."""
    n = case["m"] if case["axis"] == "channel" else case["d"]
    beta = None if n > 8 else case["beta"]
    return INTLLoss(axis=case["axis"], iterations=case["iterations"], beta=beta)


official_cases = pytest.mark.parametrize("case", REFERENCE["intl"], ids=case_id)


@official_cases
def test_iter_norm_equals_the_official_release(case):
    z_hat = iter_norm(tensor(case["views"]), axis=case["axis"], iterations=case["iterations"])
    assert_official(z_hat, case["iternorm"], atol=1e-12)


@official_cases
def test_trace_loss_equals_the_official_release(case):
    z_hat = iter_norm(tensor(case["views"]), axis=case["axis"], iterations=case["iterations"])
    trace = intl.trace_loss(z_hat, axis=case["axis"])  # (V,)
    assert_official(trace, case["trace_loss"], atol=1e-12)


@official_cases
def test_loss_and_gradient_equal_the_official_release(case):
    z = tensor(case["views"]).requires_grad_()  # (V, m, d)
    loss = official_setting(case)(z)
    assert_official(loss, case["loss"])
    assert_official_gradient(gradient_of(loss, z), case["grad"])


@official_cases
def test_loss_and_gradient_with_a_teacher_equal_the_official_release(case):
    teacher, *students = tensor(case["views"])
    students = torch.stack(students).requires_grad_()  # (V-1, m, d)
    loss = official_setting(case)(students, teacher=teacher)
    assert_official(loss, case["loss_momentum"])
    assert_official_gradient(gradient_of(loss, students), case["grad_momentum"])


TWO_VIEWS = [c for c in REFERENCE["intl"] if c["axis"] == "channel" and len(c["views"]) == 2]


@pytest.mark.parametrize("case", TWO_VIEWS, ids=case_id)
def test_intl_loss_by_definition_equals_the_official_release(case):
    z = tensor(case["views"]).requires_grad_()  # (2, m, d)
    loss = intl.intl_loss_by_definition(*z, iterations=case["iterations"])
    assert_official(loss, case["loss"])
    assert_official_gradient(gradient_of(loss, z), case["grad"])


@pytest.mark.parametrize("case", REFERENCE["cw_rgp"], ids="{m}x{d}-{groups}".format_map)
def test_group_whitening_equals_the_official_release(case):
    found = intl.group_whiten(tensor(case["z"]), case["groups"], torch.tensor(case["perm"]))
    assert_official(found, case["whitened"], atol=1e-11)


def convolution(case):
    out_channels, in_channels, *kernel_size = case["shape"]
    layer = nn.Conv2d(in_channels, out_channels, kernel_size).double()
    layer.weight.data = tensor(case["weight"]).reshape(case["shape"])
    return layer


@pytest.mark.parametrize("case", REFERENCE["orthogonality"], ids=lambda case: str(case["shape"]))
def test_orthogonality_penalty_equals_the_papers_definition(case):
    layer = convolution(case)
    assert_official(intl.orthogonality_penalty(layer), case["so"])
    srip = intl.orthogonality_penalty(layer, "srip", power_iterations=500)
    assert_official(srip, case["srip_exact"])


# --- Exact transformations, and what a loss reports
def spectral_loss_by_definition(z, p, axis):
    """By eigh of the larger covariance, which autograd can differentiate at simple eigenvalues."""
    z_hat = []
    for v in z:
        zc = centre(v, axis)  # (m, d)
        l, U = torch.linalg.eigh(covariance(v, axis))
        f = (U * l.pow(-p)) @ U.T
        z_hat.append(F.normalize(f @ zc if axis == "channel" else zc @ f, dim=1))
    distances = [(2 - 2 * (v * z_hat[0]).sum(1)).mean() for v in z_hat[1:]]
    return torch.stack(distances).mean()


@both_axes
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
def test_spectral_loss_equals_its_definition(p, axis):
    z = randn(3, 8, 9 if axis == "channel" else 6).requires_grad_()
    loss = SpectralLoss(p, axis=axis)
    value = loss(z)
    expected = spectral_loss_by_definition(z, p, axis)
    assert_close(value, expected)
    assert_close(gradient_of(value, z), gradient_of(expected, z))
    assert_close(loss.parts["alignment"], expected.detach())


@both_axes
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
def test_spectral_loss_with_a_teacher_has_the_value_without(p, axis):
    z = randn(3, 8, 9 if axis == "channel" else 6)
    loss = SpectralLoss(p, axis=axis)
    assert_close(loss(z[1:], teacher=z[0]), spectral_loss_by_definition(z, p, axis))


def equal_spectrum_and_line(axis):
    """Views (6, 9) or (9, 6) with 6 equal eigenvalues, and of rank 1."""
    columns = centred_columns(9, 6)
    equal = columns.T if axis == "channel" else columns
    m, d = equal.shape
    return equal, randn(m, 1) * randn(1, d, seed=1)


@both_axes
@pytest.mark.parametrize("teacher", [False, True])
def test_parts_at_an_equal_spectrum(teacher, axis):
    """The trace loss is at its floor; a teacher's view of rank 1 does not count."""
    equal, line = equal_spectrum_and_line(axis)
    loss = INTLLoss(axis=axis, beta=0.05)
    if teacher:
        loss([equal], teacher=line)
    else:
        loss([equal, equal])
    assert loss.parts["score"].item() == pytest.approx(1)
    assert loss.parts["trace"].item() == pytest.approx(loss.parts["floor"])


@both_axes
def test_parts_at_a_collapse(axis):
    _, line = equal_spectrum_and_line(axis)
    loss = INTLLoss(axis=axis, beta=0.05)
    loss([line, line])
    assert loss.parts["score"].item() == pytest.approx(1 / 6 / newton_map(1 / 6, 4))
    assert loss.parts["alignment"].item() < 1e-9


# --- Collapsed and scaled batches, half precision
COLLAPSED = {  # from random views z (V, m, d)
    "constant": lambda z: torch.full_like(z, 0.1),
    "zero": torch.zeros_like,
    "equal rows": lambda z: z[:, :1].expand_as(z),
    "rank 1": lambda z: z[:, :1] * z[:, :, :1],
}
DEGENERATE = {
    **COLLAPSED,
    "one row is zero": lambda z: torch.cat([z[:, 1:], torch.zeros_like(z[:, :1])], dim=1),
}
wide_and_tall = pytest.mark.parametrize("m, d", [(16, 32), (32, 16)])


@both_axes
@wide_and_tall
@pytest.mark.parametrize("name", DEGENERATE)
def test_the_loss_of_a_collapsed_batch_is_finite(name, m, d, axis):
    z = DEGENERATE[name](randf(2, m, d))
    loss = INTLLoss(axis=axis)
    value, gradient = value_and_gradient(loss, z)
    assert value.isfinite()
    assert gradient.isfinite().all()
    for part, number in loss.parts.items():
        assert torch.as_tensor(number).isfinite(), part


@both_axes
@wide_and_tall
@pytest.mark.parametrize("name", DEGENERATE)
def test_the_transforms_of_a_collapsed_batch_are_finite(name, m, d, axis):
    z = DEGENERATE[name](randf(2, m, d))
    assert whiten(z, axis=axis).isfinite().all()
    assert iter_norm(z, axis=axis).isfinite().all()


@wide_and_tall
@pytest.mark.parametrize("name", DEGENERATE)
def test_the_diagnostics_of_a_collapsed_batch_are_finite(name, m, d):
    z = DEGENERATE[name](randf(2, m, d))
    assert intl.effective_rank(z).isfinite().all()
    assert intl.condition_number(z).isfinite().all()


@wide_and_tall
@pytest.mark.parametrize("name", COLLAPSED)
def test_effective_rank_and_condition_number_of_a_collapsed_batch_are_1(name, m, d):
    z = COLLAPSED[name](randf(2, m, d))
    assert intl.effective_rank(z).allclose(torch.ones(2))
    assert intl.condition_number(z).allclose(torch.ones(2))


@both_axes
@wide_and_tall
@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_the_loss_does_not_depend_on_the_scale(scale, m, d, axis):
    """Its gradient is inverse to the scale."""
    z = randf(2, m, d)
    value, gradient = value_and_gradient(INTLLoss(axis=axis), z)
    scaled_value, scaled_gradient = value_and_gradient(INTLLoss(axis=axis), z * scale)
    assert_close(scaled_value, value, rtol=1e-5, atol=0)
    assert_close(scaled_gradient * scale, gradient, rtol=1e-3, atol=1e-5)


LOSSES = {
    "INTL channel": INTLLoss(),
    "INTL batch": INTLLoss(axis="batch"),
    "whitening channel": SpectralLoss(0.5),
    "whitening batch": SpectralLoss(0.5, axis="batch"),
    "CW-RGP": CWRGPLoss(groups=2),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_autocast_change_nothing(name, dtype):
    """The loss computes in float32, and autocast does not reach into it."""
    z = (randf(2, 16, 48) * 100).to(dtype)
    value, gradient = value_and_gradient(LOSSES[name], z.float())

    half_value, _ = value_and_gradient(LOSSES[name], z)
    assert_close(half_value, value)

    autocast_value, autocast_gradient = value_and_gradient(LOSSES[name], z.float(), autocast=dtype)
    assert_close(autocast_value, value)
    assert_close(autocast_gradient, gradient)


@both_axes
def test_a_covariance_in_bfloat16_is_0_2_percent_off_or_more(axis):
    """The reason for float32."""
    z = randf(16, 48) * 100
    exact = covariance(z, axis)
    half = covariance(z.bfloat16(), axis).float()
    assert 0.002 < (half - exact).norm() / exact.norm() < 0.02


@both_axes
def test_more_than_10_iterations_make_the_loss_float64(axis):
    z = randf(2, 16, 48)
    assert INTLLoss(axis=axis, iterations=10)(z).dtype == torch.float32
    assert INTLLoss(axis=axis, iterations=11)(z).dtype == torch.float64


@both_axes
def test_the_memory_layout_changes_nothing(axis):
    z = randf(2, 16, 48) * 100
    transposed = z.mT.contiguous().mT
    assert not transposed.is_contiguous()
    assert_close(iter_norm(transposed, axis=axis), iter_norm(z, axis=axis))
    assert_close(INTLLoss(axis=axis)(transposed), INTLLoss(axis=axis)(z))


# --- torch.compile
def call_with_teacher(loss, z):
    return loss(list(z[1:]), teacher=z[0])


def call_without_teacher(loss, z):
    return loss(list(z))


with_and_without_teacher = pytest.mark.parametrize(
    "call", [call_without_teacher, call_with_teacher], ids=["no teacher", "teacher"]
)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()  # else a test could meet the limit of recompilations of those before it
    yield
    torch.compiler.reset()


@both_axes
@with_and_without_teacher
def test_a_compiled_loss_is_one_graph_and_equals_the_eager_one(call, axis, fresh_compiler):
    """`fullgraph` makes every graph break an error. The second batch has another size."""
    eager = INTLLoss(axis=axis)
    module = INTLLoss(axis=axis)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for m in (16, 12):
        z = randn(3, m, 24)
        value, gradient = value_and_gradient(lambda z: call(eager, z), z)
        compiled_value, compiled_gradient = value_and_gradient(lambda z: call(compiled, z), z)
        assert_close(compiled_value, value, rtol=1e-9, atol=0)
        assert_close(compiled_gradient, gradient, rtol=1e-9, atol=1e-12)
        assert_close(module.parts, eager.parts, rtol=1e-9, atol=1e-12)


@needs_cpp_compiler
@pytest.mark.filterwarnings("ignore::FutureWarning")  # inside torch
def test_a_loss_compiled_to_machine_code_equals_the_eager_one(fresh_compiler):
    z = randf(2, 16, 24)
    compiled = torch.compile(INTLLoss(), fullgraph=True)
    value, gradient = value_and_gradient(INTLLoss(), z)
    compiled_value, compiled_gradient = value_and_gradient(compiled, z)
    assert_close(compiled_value, value, rtol=1e-5, atol=0)
    assert_close(compiled_gradient, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


# --- Bad input
REFUSED = [
    (lambda: INTLLoss()([randn(8, 4)]), r"two or more views .*\[\(8, 4\)\]"),
    (lambda: INTLLoss()([randn(8, 4), randn(8, 5)]), r"one shape .*\(8, 4\), \(8, 5\)"),
    (lambda: INTLLoss()([randn(8, 4)], teacher=randn(6, 4)), r"one shape .*\(6, 4\), \(8, 4\)"),
    (lambda: INTLLoss()([randn(1, 4)] * 2), r"needs 2 samples.*\(1, 4\)"),
    (lambda: INTLLoss(axis="rows"), "axis must be .*'rows'"),  # raised by the constructor
    (lambda: INTLLoss(iterations=0), "from 1 to 40.*0"),
    (lambda: INTLLoss(beta="rule"), "a number, None or .balanced., got 'rule'"),
    (lambda: spectral_transform(randn(8, 4), lambda l: l.sum()), r"\(4,\) to as many .*got \(\)"),
    (lambda: intl.group_whiten(randn(8, 32), 5), "divide the 32 channels, got 5"),
    (lambda: intl.group_whiten(randn(8, 32), 0), "divide the 32 channels, got 0"),
    (lambda: intl.group_whiten(randn(8, 32), 4), "the 8 samples, got 32 channels / 4 groups"),
    (lambda: intl.group_whiten(randn(8, 32), 2, torch.arange(30)), r"\(8, 32\), got \(30,\)"),
    (lambda: CWRGPLoss(groups=2, sub_batch=3)(randn(2, 8, 32)), "global batch of 8 rows, got 3"),
    (lambda: intl.orthogonality_penalty(nn.ReLU()), "ReLU has no Conv2d or Linear weight"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- CW-RGP
def group_whiten_by_eigh(z, groups, order):
    """One view (m, d): each group of channels times U diag(l^-1/2) U^T of its Gram matrix."""
    zc = centre(z, "channel")
    z_hat = torch.empty_like(z)
    for part in order.chunk(groups):
        l, U = torch.linalg.eigh(zc[:, part] @ zc[:, part].T / (len(part) - 1))  # (m,), (m, m)
        z_hat[:, part] = (U * l.rsqrt()) @ U.T @ zc[:, part]
    return z_hat


GROUPS = 4


def two_views_and_their_permutations():
    z = randn(2, 6, 40)
    permutations = torch.rand(2, 40, generator=generator(3)).argsort(-1)
    return z, permutations


def test_group_whitening_uses_the_permutation_of_each_view():
    z, permutations = two_views_and_their_permutations()
    z_hat = intl.group_whiten(z, GROUPS, permutations)
    for v, order, v_hat in zip(z, permutations, z_hat):
        assert_close(v_hat, group_whiten_by_eigh(v, GROUPS, order))
        assert_close(v_hat, intl.group_whiten(v, GROUPS, order))


def test_group_whitening_makes_the_gram_matrix_of_every_group_the_identity():
    """The groups are not centred again; their divisor is d / groups - 1."""
    z, permutations = two_views_and_their_permutations()
    for v_hat, order in zip(intl.group_whiten(z, GROUPS, permutations), permutations):
        for part in v_hat[:, order].chunk(GROUPS, dim=1):  # (6, 10)
            assert_close(part @ part.T / 9, torch.eye(6, dtype=z.dtype))


@pytest.mark.parametrize("permuted", [False, True])
def test_group_whitening_takes_one_permutation_for_all_views_or_none(permuted):
    z, permutations = two_views_and_their_permutations()
    order = permutations[0] if permuted else None
    expected = torch.stack([intl.group_whiten(v, GROUPS, order) for v in z])
    assert_close(intl.group_whiten(z, GROUPS, order), expected)


def test_gradcheck_of_group_whitening():
    z, permutations = two_views_and_their_permutations()
    assert gradcheck(lambda z: intl.group_whiten(z, GROUPS, permutations), z.requires_grad_())


def cw_rgp_by_definition(z, groups, size, repeats):
    """Draws what CWRGPLoss draws: a partition of the batch, a permutation per part and view."""
    V, m, d = z.shape
    distances = []
    for _ in range(repeats):
        rows = torch.rand(m).argsort()
        orders = torch.rand(V * m // size, d).argsort(-1)
        z_hat = []
        for v, v_orders in zip(z, orders.split(m // size)):
            parts = [
                group_whiten_by_eigh(v[part], groups, order)
                for part, order in zip(rows.split(size), v_orders)
            ]
            z_hat.append(F.normalize(torch.cat(parts), dim=1))  # (m, d)
        pairs = itertools.combinations(z_hat, 2)
        distances += [(2 - 2 * (a * b).sum(1)).mean() for a, b in pairs]
    return sum(distances) / len(distances)


def test_cw_rgp_equals_an_independent_computation():
    """Random parts of the batch, a permutation per part and view, all pairs of views, 2 repeats."""
    z = randn(3, 8, 32).requires_grad_()
    torch.manual_seed(5)
    loss = CWRGPLoss(groups=2, sub_batch=4, repeats=2)(z)
    torch.manual_seed(5)
    expected = cw_rgp_by_definition(z, groups=2, size=4, repeats=2)
    assert_close(loss, expected)
    assert_close(gradient_of(loss, z), gradient_of(expected, z))


@pytest.mark.parametrize("size", [4, 8])
def test_the_covariance_loss_of_cw_rgp_equals_an_independent_computation(size):
    """Squared covariances of two samples of a sub-batch, over its size, summed over the views."""
    z = randn(3, 8, 32).requires_grad_()
    covariance_losses = []
    for part in z.split(size, dim=1):  # consecutive rows, as on the release's GPUs
        S = torch.stack([covariance(v, "channel") for v in part])  # (3, size, size)
        off_diagonal = S[:, ~torch.eye(size, dtype=torch.bool)]
        covariance_losses.append(off_diagonal.square().sum() / size)
    expected = 0.7 * sum(covariance_losses) / len(covariance_losses)

    torch.manual_seed(5)
    without = CWRGPLoss(groups=2, sub_batch=size)(z)
    torch.manual_seed(5)
    loss = CWRGPLoss(groups=2, sub_batch=size, covariance_weight=0.7)(z)
    assert_close(loss - without, expected)
    assert_close(gradient_of(loss - without, z), gradient_of(expected, z))


# --- Orthogonality penalty
LAYERS = [(nn.Conv2d, 3, 5, 2), (nn.Conv2d, 2, 12, 2), (nn.Linear, 7, 4), (nn.Linear, 4, 7)]


@pytest.fixture(params=LAYERS, ids=lambda spec: f"{spec[0].__name__}{spec[1:]}")
def layer(request):
    layer_type, *sizes = request.param
    torch.manual_seed(0)
    return layer_type(*sizes).double()


def eigenvalues_of_g(weight):
    """Of W W^T - I or W^T W - I, whichever is smaller."""
    return torch.linalg.svdvals(weight.flatten(1)) ** 2 - 1


def test_so_is_the_sum_of_squared_eigenvalues(layer):
    penalty = intl.orthogonality_penalty(layer)
    expected = eigenvalues_of_g(layer.weight).square().sum()
    assert_close(penalty, expected)
    assert_close(gradient_of(penalty, layer.weight), gradient_of(expected, layer.weight))


def test_srip_tends_to_the_largest_absolute_eigenvalue(layer):
    penalty = intl.orthogonality_penalty(layer, "srip", power_iterations=2000)
    expected = eigenvalues_of_g(layer.weight).abs().max()
    assert_close(penalty, expected)
    assert_close(gradient_of(penalty, layer.weight), gradient_of(expected, layer.weight))


def test_srip_is_a_lower_bound_that_grows_with_the_power_iterations(layer):
    bounds = [
        intl.orthogonality_penalty(layer, "srip", power_iterations=n).item() for n in (0, 1, 5, 25)
    ]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= eigenvalues_of_g(layer.weight).abs().max() + 1e-12


def test_orthogonality_penalty_counts_a_shared_layer_once_and_batch_norm_never(layer):
    network = nn.Sequential(layer, nn.BatchNorm1d(3), nn.Sequential(layer))
    assert_close(intl.orthogonality_penalty(network), intl.orthogonality_penalty(layer))


def test_orthogonality_penalty_counts_attention_as_four_weights():
    attention = nn.MultiheadAttention(6, 2).double()
    q, k, v = attention.in_proj_weight.split(6)
    weights = [q, k, v, attention.out_proj.weight]
    expected = sum(eigenvalues_of_g(W).square().sum() for W in weights)
    assert_close(intl.orthogonality_penalty(attention), expected)


# --- Diagnostics
def embedding_of_known_spectrum():
    """(50, 5) with the eigenvalues 4, 2, 1, 1, 0 and a mean that is not zero."""
    l = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    rotation, _ = torch.linalg.qr(randn(5, 5))
    return centred_columns(50, 5) * (49 * l).sqrt() @ rotation + 3, l


def test_spectrum_of_a_known_spectrum():
    z, l = embedding_of_known_spectrum()
    assert_close(intl.spectrum(z), l)
    assert_close(intl.spectrum(torch.stack([z, 2 * z])), torch.stack([l, 4 * l]))


def test_effective_rank_of_a_known_spectrum():
    z, _ = embedding_of_known_spectrum()
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert intl.effective_rank(z).item() == pytest.approx(math.exp(entropy))


def test_condition_number_of_a_known_spectrum_ignores_zero():
    z, _ = embedding_of_known_spectrum()
    assert intl.condition_number(z).item() == pytest.approx(4)


# --- The demonstration
def test_demonstration(tmp_path):
    """IterNorm alone and no transformation lose rank, whitening less, INTL hardly any.

    intl.py imports only torch.
    """
    shutil.copy(HERE / "intl.py", tmp_path)
    absent = ("torchvision", "numpy", "train", "matplotlib", "tensorboard", "pycocotools")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        "import intl\n"
        "intl.demonstrate(steps=200)\n"
    )
    with no_process_left_behind() as environment:
        printed = subprocess.check_output(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": ""},
            timeout=300,
            text=True,
        )
    ranks = {}
    for line in printed.splitlines()[1:]:
        ranks[line[:24].strip()] = float(line[24:].split()[0])

    assert ranks["no transformation"] < 16
    assert ranks["IterNorm alone, T = 4"] < 16
    assert ranks["power 0.2"] < 16
    assert ranks["whitening"] > 1.5 * ranks["power 0.2"]
    assert ranks["INTL, T = 4"] > 48


# --- Several processes
DISTRIBUTED = {  # loss, and the width of the embedding of 12 samples
    "batch axis": (INTLLoss(axis="batch"), 10),
    "channel axis": (INTLLoss(), 10),
    "channel axis, m < d": (INTLLoss(), 30),
    "power 0.4": (SpectralLoss(0.4, axis="batch"), 10),
    "CW-RGP": (CWRGPLoss(groups=2, sub_batch=6, repeats=2), 16),
}
DISTRIBUTED_CASES = [(name, False) for name in DISTRIBUTED]
DISTRIBUTED_CASES += [(name, True) for name in DISTRIBUTED if name != "CW-RGP"]  # it has no teacher


def loss_and_gradients(name, teacher, rank=0, world=1):
    """The loss of 3 views of 12 samples, shared among the ranks; gradients of a linear layer."""
    loss, width = DISTRIBUTED[name]
    x = randn(3, 12, 8)[:, rank * 12 // world : (rank + 1) * 12 // world]  # (3, 12 / world, 8)
    torch.manual_seed(1)
    network = nn.Linear(8, width).double()
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network)
    torch.manual_seed(2 + rank)  # CW-RGP must use the random numbers of rank 0
    z = network(x)  # (3, 12 / world, width)
    value = loss(list(z[1:]), z[0]) if teacher else loss(list(z))
    value.backward()
    return [value.detach(), *[p.grad for p in network.parameters()]]


def gather_rows(rank, world):
    """Gathers two rows of each rank; the gradient of row i of the result is i."""
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = intl.gather(rows)  # (2 * world, 3)
    (gathered * torch.arange(2.0 * world)[:, None]).sum().backward()
    return gathered.detach(), rows.grad


def save_distributed_results(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = dist.get_world_size()
    results = {"gather": gather_rows(rank, world)}
    for name, teacher in DISTRIBUTED_CASES:
        results[name, teacher] = loss_and_gradients(name, teacher, rank, world)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="session", params=[2, 3])
def distributed_results(request, tmp_path_factory):
    """The results of 2 or 3 processes, in rank order."""
    folder = tmp_path_factory.mktemp("distributed")
    run(__file__, "save_distributed_results", folder, processes=request.param)
    return [load(folder / f"{rank}.pt") for rank in range(request.param)]


def test_gather_returns_the_rows_of_all_ranks_in_rank_order(distributed_results):
    world = len(distributed_results)
    for results in distributed_results:
        gathered, _ = results["gather"]
        assert gathered[:, 0].tolist() == [r // 2 for r in range(2 * world)]


def test_gather_passes_each_rank_the_gradient_of_its_rows(distributed_results):
    for rank, results in enumerate(distributed_results):
        _, gradient = results["gather"]
        assert gradient[:, 0].tolist() == [2 * rank, 2 * rank + 1]


@pytest.mark.parametrize("name, teacher", DISTRIBUTED_CASES)
def test_gradient_over_processes_equals_one_process(name, teacher, distributed_results):
    """Under DistributedDataParallel. The loss is the same, too."""
    expected_loss, *expected_gradients = loss_and_gradients(name, teacher)
    for results in distributed_results:
        loss, *gradients = results[name, teacher]
        assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
        assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-12)


# --- Data and augmentation -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn_shapes():
    """Pictures and labels: 4,000 to search, 1,000 others to classify."""
    bank = train.draw_shapes(0, 0, 4000)
    queries = train.draw_shapes(0, 10**6, 1000)
    return bank.tensors, queries.tensors


@pytest.mark.parametrize("dims", [(2, 3), (1, 2, 3)], ids=["by mean colour", "by mean brightness"])
def test_shapes_differ_only_in_outline(dims, drawn_shapes):
    """k-NN on the mean of the pixels: chance is 12.5 %, one standard error is 1 point."""
    (bank, bank_labels), (queries, query_labels) = drawn_shapes
    bank = bank.float().mean(dims).reshape(4000, -1)
    queries = queries.float().mean(dims).reshape(1000, -1)
    assert train.knn_top1(bank, bank_labels, queries, query_labels, 5) < 12.5 + 4


def test_shapes_have_equal_areas():
    grid = torch.linspace(-2, 2, 401)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    areas = [16 * (level(x, y) > 0).float().mean().item() for level in train.SHAPES.values()]
    assert areas == pytest.approx([3] * 8, rel=0.03)


def test_a_drawn_shape_depends_only_on_seed_and_index():
    pictures = train.draw_shapes(0, 0, 20).tensors[0]
    assert torch.equal(train.draw_shapes(0, 5, 2).tensors[0], pictures[5:7])
    assert not torch.equal(train.draw_shapes(1, 0, 20).tensors[0], pictures)


def test_labels_of_drawn_shapes_are_their_kinds_in_turn():
    assert train.draw_shapes(0, 0, 20).targets.tolist() == [i % 8 for i in range(20)]


def test_masks_of_a_scene_are_the_visible_parts_of_its_shapes():
    picture, masks = train.draw_scene(0, 3, 64, [0, 2, 5], 0.3, 0.6)
    assert picture.shape == (3, 64, 64)
    assert masks.shape == (3, 64, 64)
    assert masks.dtype == torch.bool
    assert masks.sum(0).max() == 1  # no pixel belongs to two shapes
    assert masks[2].sum() > 100  # the last shape lies in front

    _, (whole,) = train.draw_scene(0, 3, 64, [0], 0.3, 0.6)
    assert (masks[0] & ~whole).sum() == 0
    assert masks[0].sum() < whole.sum()  # the first one is partly hidden


def pictures(size=32, n=24):
    """uint8 pictures (n, 3, size, size): the first half smooth, the second half noise."""
    noise = torch.randint(0, 256, (n, 3, size, size), generator=generator(0), dtype=torch.uint8)
    smooth = TF.resize(noise[: n // 2, :, :5, :5], [size, size], antialias=True)
    return torch.cat([smooth, noise[n // 2 :]])


def assert_same_picture(got, expected):
    """`got` in [0, 1] and `expected` in uint8 differ by rounding."""
    difference = (got * 255 - expected.float()).abs()
    assert difference.max() <= 2
    assert difference.mean() <= 0.6


JITTER = ("brightness", "contrast", "saturation", "hue")
RANDOM_NAMES = ("apply", *JITTER, "gray", "blur", "sigma", "solarize", "flip")


def random_numbers(n, seed):
    """A row of uniform numbers (n, 1, 1, 1) for each random decision of the augmentation."""
    rows = torch.rand(len(RANDOM_NAMES), n, 1, 1, 1, generator=generator(seed))
    return dict(zip(RANDOM_NAMES, rows))


def augment(x, flags, random, order=(3, 0, 1, 2), flip=False):
    """Augment x as view 0 of a run with these flags; `flip` replaces the random decision."""
    args = train.parse([*QUIET, *flags.split()])
    random = {name: random[name] for name in train.random_names(args, 0)}
    random["flip"] = torch.full_like(random["flip"], 0.0 if flip else 1.0)
    return train.Augmentation(args).augment_view(x, 0, random, list(order))


def test_random_numbers_are_drawn_only_for_what_a_view_may_do():
    args = train.parse("--view-sizes 8 8 8 --blur 0.5 0 0.5 --solarize 0 0.2 0.2".split())
    always = RANDOM_NAMES[:6]
    assert tuple(train.random_names(args, 0)) == (*always, "blur", "sigma", "flip")
    assert tuple(train.random_names(args, 1)) == (*always, "solarize", "flip")
    assert tuple(train.random_names(args, 2)) == RANDOM_NAMES


@pytest.mark.parametrize("operation", JITTER)
def test_batched_jitter_equals_torchvision(operation):
    x = pictures()
    random = random_numbers(len(x), seed=1)
    strengths = " ".join("0.4" if name == operation else "0" for name in JITTER)
    got = augment(x / 255, f"--jitter {strengths} --jitter-prob 1", random)

    amounts = 0.4 * (2 * random[operation].flatten() - 1)
    if operation != "hue":
        amounts = 1 + amounts
    adjust = getattr(TF, f"adjust_{operation}")
    expected = [adjust(image, amount.item()) for image, amount in zip(x, amounts)]
    assert_same_picture(got, torch.stack(expected))


def test_augmentation_without_any_operation_changes_nothing():
    x = pictures()
    assert_same_picture(augment(x / 255, "", random_numbers(24, seed=1)), x)


def test_batched_grayscale_equals_torchvision():
    x = pictures()
    got = 255 * augment(x / 255, "--gray 1", random_numbers(24, seed=1))
    assert (got.round() - TF.rgb_to_grayscale(x, 3)).abs().max() <= 1


def test_batched_solarization_equals_torchvision():
    x = pictures()
    random = random_numbers(24, seed=1)
    assert_same_picture(augment(x / 255, "--solarize 1", random), TF.solarize(x, 128))
    inverted = augment(x / 255, "--solarize 1 --solarize-threshold 0", random)
    assert_same_picture(inverted, TF.invert(x))


def test_batched_flip_equals_torchvision():
    x = pictures()
    got = augment(x / 255, "", random_numbers(24, seed=1), flip=True)
    assert_same_picture(got, TF.horizontal_flip(x))


def test_batched_blur_equals_torchvision():
    x = pictures()
    random = random_numbers(24, seed=1)
    sigmas = (0.1 + 1.9 * random["sigma"]).flatten().tolist()
    blurred = [TF.gaussian_blur(image, [13, 13], [s, s]) for image, s in zip(x, sigmas)]
    assert_same_picture(augment(x / 255, "--blur 1", random), torch.stack(blurred))


DRAWS = 20_000
TWO_COLUMNS = torch.tensor([[0.6, 0.5], [0.4, 0.3], [0.2, 0.4]])[:, None].repeat(
    1, 2, 1
)  # (3, 2, 2)


def augment_two_columns(flags):
    """DRAWS augmentations of one small picture, and which of them differ from it."""
    x = TWO_COLUMNS.expand(DRAWS, 3, 2, 2)
    y = augment(x, flags, random_numbers(DRAWS, seed=0), order=(0, 1, 2, 3))
    different = ((y - TWO_COLUMNS).abs() > 1e-4).flatten(1).any(1)  # (DRAWS,)
    return y, different


@pytest.mark.parametrize(
    "flags, probability",
    [("--gray 0.2", 0.2), ("--solarize 0.2 --solarize-threshold 100", 0.2), ("--blur 0.1", 0.09)],
)  # of the blurs, one in ten is too narrow to change a pixel
def test_operations_happen_as_often_as_asked(flags, probability):
    _, different = augment_two_columns(flags)
    tolerance = 4 * (0.25 / DRAWS) ** 0.5
    assert different.float().mean().item() == pytest.approx(probability, abs=tolerance)


def lightness(x):  # (n, 3, h, w) -> (n, h, w)
    return (x * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1)


def contrast(x):
    return lightness(x).diff(dim=-1)


def saturation(x):
    return x[:, 0] - lightness(x)


def hue(x):  # of the first pixel, (n,)
    return torch.tensor([colorsys.rgb_to_hsv(*rgb)[0] for rgb in x[:, :, 0, 0].tolist()])


def relative_change(measure, x):  # (n,)
    return (measure(x) / measure(TWO_COLUMNS[None]))[:, 0, 0] - 1


def hue_change(x):  # (n,), in turns
    return (hue(x) - hue(TWO_COLUMNS[None]) + 0.5) % 1 - 0.5


@pytest.mark.parametrize(
    "strengths, largest, measure",
    [
        ("0.4 0 0 0", 0.4, functools.partial(relative_change, lightness)),
        ("0 0.4 0 0", 0.4, functools.partial(relative_change, contrast)),
        ("0 0 0.2 0", 0.2, functools.partial(relative_change, saturation)),
        ("0 0 0 0.1", 0.1, hue_change),
    ],
    ids=JITTER,
)
def test_jitter_is_uniform_up_to_its_strength(strengths, largest, measure):
    y, different = augment_two_columns(f"--jitter {strengths} --jitter-prob 0.8")
    assert different.float().mean().item() == pytest.approx(0.8, abs=0.01)

    values = measure(y[different]).double().sort().values
    uniform = torch.linspace(-largest, largest, len(values), dtype=torch.float64)
    assert (values - uniform).abs().max() < 0.0155 * 2 * largest  # Kolmogorov and Smirnov


@needs_cpp_compiler
def test_compiled_augmentation_equals_the_eager_one():
    args = train.parse("--batch-size 24 --view-sizes 32 32 --blur 0.5 --solarize 0.5".split())
    views = [pictures(), pictures().flip(0)]
    eager = train.Augmentation(args)(views, 3, CPU)
    compiled = train.Augmentation(args, compile=True)(views, 3, CPU)
    for x, expected in zip(compiled, eager):
        assert_close(x, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of images: train/ and val/ with 16 and 5 images of each of three classes."""
    root = tmp_path_factory.mktemp("photos")
    for split, n, first_seed in (("train", 16, 0), ("val", 5, 50)):
        for label, i in itertools.product(range(3), range(n)):
            g = generator(first_seed + 100 * label + i)
            coarse = torch.randint(0, 256, (3, 2 + label, 4), generator=g, dtype=torch.uint8)
            path = root / split / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(TF.resize(coarse, [20 + i, 30 - i])).save(path)
    return root


ORDER_FLAGS = ["--batch-size", "8", "--view-sizes", "16", "16"]


def training_views(images, first_step, stop_step, workers=0):
    """The network's inputs from first_step to stop_step, as train.main makes them."""
    args = train.parse(ORDER_FLAGS)
    crops = [v2.RandomResizedCrop(size) for size in args.view_sizes]
    dataset = train.MultiViewDataset(images, crops, args.seed)
    indices = train.batch_indices(
        torch.arange(len(images)), args.batch_size, args.seed, first_step, stop_step
    )
    loader = train.make_loader(dataset, workers, batch_sampler=indices)
    augmentation = train.Augmentation(args)
    return [augmentation(views, i, CPU) for i, (views, _) in enumerate(loader, start=first_step)]


@pytest.fixture(scope="module")
def training_set(photos):
    train_set, _ = train.load_data("folder", photos, 0)
    return train_set


@pytest.fixture(scope="module")
def all_views(training_set):
    """Eight steps, which pass the end of an epoch of six."""
    return training_views(training_set, 0, 8)


def test_an_epoch_has_every_image_once():
    keys = [key for batch in train.batch_indices(torch.arange(48), 8, 0, 0, 6) for key in batch]
    assert sorted(index for _, index in keys) == [*range(48)]


def assert_equal_views(views, expected):
    """Lists of steps, of which each is a list of views."""
    assert len(views) == len(expected)
    for step_views, expected_step_views in zip(views, expected):
        for x, y in zip(step_views, expected_step_views):
            assert torch.equal(x, y)


@pytest.mark.parametrize("workers, processes", [(2, 1), (0, 2)])
def test_order_and_crops_do_not_depend_on_workers_or_processes(
    workers, processes, training_set, all_views, monkeypatch
):
    """A process has its share of each batch of eight."""
    monkeypatch.setattr(train, "WORLD", processes)
    for rank in range(processes):
        monkeypatch.setattr(train, "RANK", rank)
        views = training_views(training_set, 0, 8, workers)
        shares = [[x.chunk(processes)[rank] for x in step_views] for step_views in all_views]
        assert_equal_views(views, shares)


def test_order_and_crops_do_not_depend_on_the_first_step(training_set, all_views):
    assert_equal_views(training_views(training_set, 3, 8), all_views[3:])


@pytest.mark.skipif(
    not hasattr(torchvision.io, "decode_image"), reason="torchvision 0.29 says it will remove it"
)
def test_images_are_decoded_as_torchvision_does_it(photos):
    path = str(photos / "train" / "class 0" / "3.png")
    assert torch.equal(train.decode_image(path), torchvision.io.decode_image(path, mode="RGB"))


@pytest.mark.parametrize(
    "dataset, size, transform",
    [
        ("folder", 224, v2.Compose([v2.Resize(256), v2.CenterCrop(224)])),
        ("cifar10", 32, v2.Resize(32)),
    ],
)
def test_images_are_cropped_for_evaluation_as_torchvision_does_it(dataset, size, transform):
    image = pictures(70)[0, :, :50]  # (3, 50, 70)
    images = train.in_memory_dataset(image[None], [0], ["a"])
    ((got,), _) = next(iter(train.eval_loader(images, dataset, size, 0)))
    assert torch.equal(got[0], transform(image))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_run_with_its_name(workers, photos, tmp_path):
    intact = (photos / "train" / "class 0" / "3.png").read_bytes()
    shutil.copytree(photos / "train", tmp_path / "train")
    (tmp_path / "train" / "class 1" / "torn.png").write_bytes(intact[:200])
    with pytest.raises(RuntimeError, match=r"torn.png cannot be read as an image"):
        train.main(tiny(tmp_path, tmp_path / "run", f"--workers {workers}"))


# --- One step, schedules, recipes, k-NN ----------------------------------------------------------


class TinyNetwork(nn.Module):
    """Linear: rounding errors do not grow, as they do where a ReLU's input changes its sign."""

    def __init__(self, args, size=6):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, 10))
        self.projector = nn.Linear(10, 24)

    def forward(self, views):
        return [self.projector(self.backbone(view)) for view in views]


def tiny_embedding(weights, x):
    """TinyNetwork's forward pass by hand: x (n, 3, 6, 6) -> (n, 24)."""
    x = x.flatten(1) @ weights["backbone.1.weight"].T + weights["backbone.1.bias"]
    return x @ weights["projector.weight"].T + weights["projector.bias"]


def loss_by_hand(z, beta, teacher):
    """INTL's loss of the views z; with a teacher, z[0] is its view and has no trace loss."""
    z_hat = [iter_norm(view) for view in z]
    terms = []
    for view in z_hat[1:]:
        cosine = F.cosine_similarity(view, z_hat[0], dim=1)
        term = (2 - 2 * cosine).mean() + beta * intl.trace_loss(view)
        if not teacher:
            term = term + beta * intl.trace_loss(z_hat[0])
        terms.append(term)
    return torch.stack(terms).mean()


def lr_by_hand(step):
    """Warm-up in one epoch of three steps, then a cosine over three epochs."""
    peak = 0.03 * 16 / 256
    if step < 3:
        return peak * (step + 1) / 3
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - 2) / 9)) / 2)


def train_by_hand(views, ema, decay_all):
    """Six steps of SGD by its formulas; returns losses, weights and the teacher's weights."""
    torch.manual_seed(0)
    initial = TinyNetwork(None).double().state_dict()
    weights = {name: w.clone().requires_grad_() for name, w in initial.items()}
    teacher = {name: w.clone() for name, w in initial.items()}
    velocity = {name: torch.zeros_like(w) for name, w in initial.items()}
    losses = []

    for step in range(6):
        embedders = [weights] * len(views[step])
        if ema:
            momentum = 1 - (1 - ema) * (1 + math.cos(math.pi * step / 12)) / 2
            for name, w in weights.items():
                teacher[name] = momentum * teacher[name] + (1 - momentum) * w.detach()
            embedders[0] = teacher
        z = [tiny_embedding(w, view) for w, view in zip(embedders, views[step])]
        loss = loss_by_hand(z, beta=0.03, teacher=bool(ema))
        losses.append(loss.item())

        gradients = torch.autograd.grad(loss, list(weights.values()))
        for (name, w), gradient in zip(list(weights.items()), gradients):
            w = w.detach()
            if decay_all or w.ndim > 1:
                gradient = gradient + 0.1 * w
            velocity[name] = 0.9 * velocity[name] + gradient
            weights[name] = (w - lr_by_hand(step) * velocity[name]).requires_grad_()
    return losses, weights, teacher


@pytest.mark.parametrize("ema, decay", [(0, "--decay-all"), (0.9, "--no-decay-all")])
def test_steps_equal_an_independent_computation(ema, decay, photos, tmp_path, monkeypatch):
    n_views = 4 if ema else 2
    views = [list(randn(n_views, 16, 3, 6, 6, seed=step)) for step in range(6)]

    def prepared_views(self, crops, step, device):
        return views[step]

    monkeypatch.setattr(train, "Network", lambda args: TinyNetwork(args).double())
    monkeypatch.setattr(train.Augmentation, "__call__", prepared_views)
    monkeypatch.setattr(train, "normalize", lambda x, dataset: x[:, :, :6, :6].double())
    sizes = " ".join(["6"] * n_views)
    flags = f"--ema {ema} --view-sizes {sizes} {decay} --weight-decay 0.1 --beta 0.03"
    train.main(tiny(photos, tmp_path, f"{flags} --max-steps 6"))

    losses, weights, teacher = train_by_hand(views, ema, decay_all=decay == "--decay-all")
    saved = load(tmp_path / "checkpoint.pt")
    assert losses_of(tmp_path) == pytest.approx(losses, rel=1e-4)
    for name, w in saved["network"].items():
        assert_close(w, weights[name].detach(), rtol=1e-9, atol=1e-12)
    if ema:
        for name, w in saved["teacher"].items():
            assert_close(w, teacher[name], rtol=1e-9, atol=1e-12)


def assert_schedule(schedule, expected):
    """`expected`: the value at some steps."""
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, abs=1e-9)


def test_sgd_has_a_warmup_and_a_cosine_and_scales_its_rate_with_the_batch():
    args = train.parse("--batch-size 512 --base-lr 0.3 --epochs 10 --warmup-epochs 2".split())
    expected = {0: 0.003, 199: 0.6, 599: 0.3003, 999: 0.0006}
    assert_schedule(lambda step: train.learning_rate(step, 100, args), expected)


def test_adam_has_a_warmup_and_milestones_and_does_not_scale_its_rate():
    args = train.parse("--recipe cwrgp-cifar10 --batch-size 512".split())
    expected = {0: 6e-6, 499: 3e-3, 185_249: 3e-3, 185_250: 6e-4}
    assert_schedule(lambda step: train.learning_rate(step, 195, args), expected)


@pytest.mark.parametrize(
    "protocol, kind, epochs, expected",
    [
        ("linear", "", 100, {0: 1, 299: 1, 300: 0.1, 399: 0.1, 400: 0.01, 499: 0.01}),
        ("finetune", "constant", 20, {0: 1, 50: 1, 99: 1}),
        ("finetune", "cosine", 20, {0: 1, 50: 0.5, 100: 0}),
    ],
)
def test_evaluation_schedules_are_the_published_ones(protocol, kind, epochs, expected):
    assert_schedule(lambda step: linear_eval.lr_factor(protocol, kind, step, 5, epochs), expected)


def test_evaluation_protocols_are_the_published_ones():
    protocols = {name: (epochs, lrs[:1]) for name, (epochs, lrs) in linear_eval.PROTOCOLS.items()}
    assert protocols == {
        "features": (500, [0.01]),
        "knn": (0, []),
        "linear": (100, [0.2]),
        "finetune": (20, [0.2]),
    }
    assert 0.4 in linear_eval.PROTOCOLS["linear"][1]


def test_evaluation_defaults_are_the_published_ones():
    args = linear_eval.parse([])
    assert args.batch_size == 256
    assert args.weight_decay == 0
    assert args.encoder_lr == 0.006
    assert args.schedule == "constant"


@pytest.mark.skipif(detect_transfer is None, reason="needs pycocotools")
def test_detection_schedules_are_the_published_ones():
    """180,000 steps with 16 images; the rate falls to a tenth at 120,000 and again at 160,000."""
    flags = "--recipe coco-2x --data . --batch-size".split()
    published = detect_transfer.parse([*flags, "16"])
    small_batch = detect_transfer.parse([*flags, "2"])
    rate = detect_transfer.learning_rate
    expected = {0: 2e-5, 500: 0.01001, 1000: 0.02, 119_999: 0.02, 120_000: 2e-3, 160_000: 2e-4}
    assert published.images == 16 * 180_000
    assert detect_transfer.RECIPES["coco-1x"]["images"] == 16 * 90_000
    assert_schedule(lambda step: rate(step, published), expected)
    assert_schedule(lambda step: rate(step, small_batch), {800_000: 0.02 / 8})


PUBLISHED = json.loads((HERE / "evidence" / "published_settings.json").read_text())
PUBLISHED_RECIPES = sorted({*train.RECIPES} - {"shapes"})
PUBLISHED_INTL_RECIPES = [
    name for name in PUBLISHED_RECIPES if train.RECIPES[name].get("loss", "intl") == "intl"
]


def test_every_recipe_has_its_published_settings():
    assert {*PUBLISHED} - {"source", "common"} == {*PUBLISHED_RECIPES}


@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_recipes_are_the_published_ones(name):
    args = vars(train.parse(["--recipe", name]))
    expected = PUBLISHED["common"] | PUBLISHED[name]
    assert {field: args[field] for field in expected} == expected


@pytest.mark.parametrize("name", PUBLISHED_INTL_RECIPES)
def test_published_recipes_keep_the_published_beta(name):
    """train.main replaces a beta that is below the balanced one."""
    args = train.parse(["--recipe", name])
    setting = INTLLoss().setting(args.batch_size, args.out)
    assert args.beta is None
    assert setting.beta >= intl.balanced_beta(setting.n, 4, full=setting.full_rank)


SMALL_NETWORK = "--stem cifar --hidden 8 --out 8 --view-sizes 8 8".split()


def has_biases(network):
    return [layer.bias is not None for layer in network.projector[::3]]


def test_batch_norm_sees_one_view_at_a_time():
    views = list(randf(2, 8, 3, 8, 8))
    network = train.Network(train.parse(SMALL_NETWORK))
    assert_close(network(views)[1], network(views[1:])[0])


def test_batch_norm_of_a_joint_head_sees_all_views_together():
    views = list(randf(2, 8, 3, 8, 8))
    network = train.Network(train.parse([*SMALL_NETWORK, "--joint-head", "--layers", "2"]))
    features = torch.cat([network.backbone(view) for view in views])
    assert_close(torch.cat(network(views)), network.projector(features))
    assert has_biases(network) == [True, True]


def test_the_projector_has_batch_norm_and_relu_between_its_layers():
    network = train.Network(train.parse(SMALL_NETWORK))
    hidden_layer = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(m) for m in network.projector] == [*hidden_layer, *hidden_layer, nn.Linear]
    assert has_biases(network) == [False, False, True]


def test_the_padded_stem_pads_twice_as_the_release_does():
    """The release's CIFAR network of today pads by 1 in front of its stem, which pads by 1 too."""
    ours, _ = train.build_backbone("resnet18", "cifar-padded")
    plain, _ = train.build_backbone("resnet18", "cifar")
    plain.load_state_dict(ours.state_dict())
    x = randf(2, 3, 32, 32)
    assert_close(ours.eval()(x), plain.eval()(F.pad(x, (1, 1, 1, 1))))


def knn_problem(temperature):
    """Bank (200, 6) and queries (300, 6) with labels of four classes."""
    bank = randf(200, 6)
    queries = randf(300, 6, seed=1)
    if temperature:  # votes by cosine take unit rows
        bank = F.normalize(bank)
        queries = F.normalize(queries)
    return bank, torch.arange(200) % 4, queries, torch.arange(300) % 4


def knn_by_brute_force(bank, bank_labels, queries, query_labels, temperature):
    """Top-1 of the 5 nearest rows: a query, a row and a vote at a time."""
    bank = bank.double()
    correct = 0
    for query, label in zip(queries.double(), query_labels.tolist()):
        votes = [0.0] * 4
        nearest = (query - bank).square().sum(1).sort(stable=True).indices[:5]
        for i in nearest.tolist():
            if temperature:
                votes[bank_labels[i]] += math.exp((query @ bank[i]).item() / temperature)
            else:
                votes[bank_labels[i]] += 1
        if votes.index(max(votes)) == label:
            correct += 1
    return 100 * correct / len(queries)


with_and_without_temperature = pytest.mark.parametrize("temperature", [None, 0.07])


@with_and_without_temperature
def test_knn_equals_a_brute_force_search(temperature):
    problem = knn_problem(temperature)
    got = train.knn_top1(*problem, 5, temperature)
    assert got == pytest.approx(knn_by_brute_force(*problem, temperature))


@with_and_without_temperature
def test_knn_searches_all_parts_of_a_large_bank(temperature):
    """Five copies of the nearest row vote as this row does."""
    bank, bank_labels, queries, query_labels = knn_problem(temperature)
    many = torch.arange(200).repeat(400)
    got = train.knn_top1(bank[many], bank_labels[many], queries, query_labels, 5, temperature)
    assert got == train.knn_top1(bank, bank_labels, queries, query_labels, 1, temperature)


@with_and_without_temperature
def test_knn_with_fewer_rows_than_votes_takes_all_rows(temperature):
    bank, bank_labels, queries, query_labels = knn_problem(temperature)
    few = (bank[:3], bank_labels[:3], queries, query_labels)
    assert train.knn_top1(*few, 20, temperature) == train.knn_top1(*few, 3, temperature)


# --- Batch norm over all processes ---------------------------------------------------------------


class UserNetwork(nn.Sequential):
    """With a forward function outside torch, as train.Network: torch 2.6 compiles only the layers
    of an nn.Sequential."""

    def forward(self, x):
        return super().forward(x)


def stem_and_projector():
    return UserNetwork(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16, bias=False),
        nn.BatchNorm1d(16, eps=1e-3, momentum=0.3),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


BN_CASES = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5), (12, 5)),
    "BatchNorm1d, (n, c, length)": (lambda: nn.BatchNorm1d(5, momentum=0.3), (12, 5, 7)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(5, eps=1e-2), (12, 5, 4, 4)),
    "network": (stem_and_projector, (12, 3, 8, 8)),
    "compiled network": (stem_and_projector, (12, 3, 8, 8)),
    "network on unequal shares": (stem_and_projector, (12, 3, 8, 8)),
}


def share_of_rows(x, rank, world, unequal=False):
    size = len(x) // world
    if unequal:  # the last process has fewer rows
        size += 1
    return x.split(size)[rank].clone()


def count_graphs(network):
    """Compiles a network and returns the list to which each of its graphs will be added.

    The backend splits and recomputes as the default one does, but needs no compiler.
    """
    graphs = []
    backend = torch._dynamo.lookup_backend("aot_eager_decomp_partition")

    def counting_backend(graph, example_inputs):
        graphs.append(graph)
        return backend(graph, example_inputs)

    network.compile(backend=counting_backend, dynamic=False)
    return graphs


def two_steps(case, rank, world):
    """Two passes of a network in float64 on this process's rows, the statistics after them."""
    make, shape = BN_CASES[case]
    torch.manual_seed(0)
    network = make().double()
    for p in network.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    network = train.convert_batch_norm(network)
    graphs = []
    if case.startswith("compiled"):
        graphs = count_graphs(network)
    model = train.wrap_ddp(network, CPU)

    share = functools.partial(share_of_rows, rank=rank, world=world, unequal="unequal" in case)
    for seed in (1, 2):
        x = share(3 + 2 * randn(*shape, seed=seed)).requires_grad_()
        y = model(x)
        weight = share(randn(12, *y.shape[1:], seed=3))
        loss = (y * weight).sum()  # DDP averages its gradients over processes
        (loss * world).backward()

    n_graphs = len(graphs)  # of training; evaluation has another
    statistics = {name: b.clone() for name, b in network.named_buffers()}
    network.eval()
    return {
        "outputs": y.detach(),
        "input gradients": x.grad / world,
        "evaluated outputs": network(x).detach(),
        "parameter gradients": {name: p.grad for name, p in network.named_parameters()},
        "statistics": statistics,
        "graphs": n_graphs,
    }


def one_step(network, x, weight):
    x.requires_grad_()
    y = network(x)
    (y * weight).sum().backward()
    return {
        "outputs": y.detach(),
        "input gradients": x.grad,
        "statistics": dict(network.named_buffers()),
    }


# The mean of channels with a deviation of 1, and the tolerance.
FAR_FROM_ZERO = {
    torch.float32: (1000, {"rtol": 0, "atol": 1e-3}),
    torch.bfloat16: (10, {"rtol": 2**-7, "atol": 2**-7}),
}


def far_from_zero(dtype):
    """A layer, its input and the weight of its output in the loss."""
    mean, _ = FAR_FROM_ZERO[dtype]
    x = (mean + randf(12, 5, 6, 6)).to(dtype)
    return nn.BatchNorm2d(5), x, randf(12, 5, 6, 6, seed=1)


def two_equal_layers():
    """Of one size: inductor shares their constants. Input and weight as above."""
    network = nn.Sequential(nn.BatchNorm2d(5), nn.BatchNorm2d(5))
    return network, 3 + 2 * randf(12, 5, 6, 6), randf(12, 5, 6, 6, seed=1)


def one_step_of_a_share(problem, rank, world, compile=False):
    network, x, weight = problem
    network = train.convert_batch_norm(network)
    if compile:
        network.compile(dynamic=False)
    return one_step(network, share_of_rows(x, rank, world), share_of_rows(weight, rank, world))


class CountCollectives(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the collectives that are called inside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional"):
            self.calls.append(str(op))
        return op(*args, **(kwargs or {}))


def count_collectives(rank, world):
    """The collectives forward and backward, in the second step of a network with two BNs."""
    network = train.convert_batch_norm(stem_and_projector())
    x = share_of_rows(randf(12, 3, 8, 8), rank, world)
    network(x).mean().backward()
    with CountCollectives() as forward:
        loss = network(x).mean()
    with CountCollectives() as backward:
        loss.backward()
    return forward.calls, backward.calls


def batch_norm_results(rank, world):
    return {case: two_steps(case, rank, world) for case in BN_CASES}


def save_batch_norm_results(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = dist.get_world_size()
    results = batch_norm_results(rank, world)
    for dtype in FAR_FROM_ZERO:
        results[dtype] = one_step_of_a_share(far_from_zero(dtype), rank, world)
    if world == 2 and HAS_CPP_COMPILER:
        results["inductor"] = one_step_of_a_share(two_equal_layers(), rank, world, compile=True)
    results["collectives"] = count_collectives(rank, world)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def save_results_of_processes(photos, folder):
    """What is compared with one process, here and in "The scripts", by one start of processes."""
    save_batch_norm_results(folder)
    train_methods_in_float64(photos, folder)


@pytest.fixture(scope="session")
def start_processes(photos, tmp_path_factory):
    """A function that starts so many processes once and returns the folder of their results."""

    @functools.cache
    def start(processes):
        folder = tmp_path_factory.mktemp("by_processes")
        arguments = ("save_results_of_processes", photos, folder)
        run("test_intl.py", *arguments, processes=processes)
        return folder

    return start


@pytest.fixture(params=[2, 3], ids=["2 processes", "3 processes"])
def by_processes(request, start_processes):
    """The number of processes and the folder of their results."""
    return request.param, start_processes(request.param)


@pytest.fixture
def bn_results(by_processes):
    """Those of every process."""
    processes, folder = by_processes
    return [load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def bn_expected():
    """The results of one process, which uses nn.BatchNorm."""
    return batch_norm_results(0, 1)


every_bn_case = pytest.mark.parametrize("case", BN_CASES)


@every_bn_case
@pytest.mark.parametrize("quantity", ["outputs", "input gradients", "evaluated outputs"])
def test_global_batch_norm_equals_one_process(case, quantity, bn_results, bn_expected):
    """Each process has its rows of the batch."""
    rows = torch.cat([result[case][quantity] for result in bn_results])
    assert_close(rows, bn_expected[case][quantity], rtol=1e-12, atol=1e-12)


@every_bn_case
@pytest.mark.parametrize("quantity", ["parameter gradients", "statistics"])
def test_global_batch_norm_gives_every_process_the_same(case, quantity, bn_results, bn_expected):
    for result in bn_results:
        assert_close(result[case][quantity], bn_expected[case][quantity], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FAR_FROM_ZERO, ids=str)
def test_global_batch_norm_is_accurate_far_from_zero(dtype, bn_results):
    norm, x, weight = far_from_zero(dtype)
    expected = one_step(norm.double(), x.double(), weight.double())
    _, tolerance = FAR_FROM_ZERO[dtype]
    for quantity in ["outputs", "input gradients"]:
        rows = torch.cat([result[dtype][quantity] for result in bn_results])
        assert rows.dtype == dtype
        assert_close(rows.double(), expected[quantity], **tolerance)
    for result in bn_results:
        variance = result[dtype]["statistics"]["running_var"].double()
        assert_close(variance, expected["statistics"]["running_var"], rtol=1e-3, atol=0)


@needs_cpp_compiler
def test_global_batch_norm_compiled_to_machine_code_equals_one_process(start_processes):
    folder = start_processes(2)
    results = [load(folder / f"{rank}.pt")["inductor"] for rank in range(2)]
    expected = one_step(*two_equal_layers())
    for quantity in ["outputs", "input gradients"]:
        rows = torch.cat([result[quantity] for result in results])
        assert_close(rows, expected[quantity], rtol=1e-5, atol=1e-5)
    for result in results:
        assert_close(result["statistics"], expected["statistics"], rtol=1e-5, atol=1e-5)


def test_a_network_with_global_batch_norm_compiles_to_one_graph(bn_results):
    assert [result["compiled network"]["graphs"] for result in bn_results] == [1] * len(bn_results)


def test_global_batch_norm_takes_one_collective_forward_and_one_backward(bn_results):
    """nn.SyncBatchNorm takes one in each direction, too, but waits for the host in each layer."""
    for result in bn_results:
        forward, backward = result["collectives"]
        assert len(forward) == 2, forward
        assert len(backward) == 2, backward


def test_one_process_keeps_its_batch_norm():
    network = stem_and_projector()
    types = [type(module) for module in network.modules()]
    assert train.convert_batch_norm(network) is network
    assert [type(module) for module in network.modules()] == types


def test_several_processes_replace_every_batch_norm_and_keep_its_state(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    network = stem_and_projector()
    network[6].running_mean.fill_(3.0)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    converted = train.convert_batch_norm(network)

    for i in (1, 6):
        assert isinstance(converted[i], train.GlobalBatchNorm)
    assert (converted[6].eps, converted[6].momentum) == (1e-3, 0.3)
    assert list(converted.state_dict()) == list(state)
    for name, value in converted.state_dict().items():
        assert torch.equal(value, state[name]), name


# --- The step as a CUDA graph, imitated on a CPU -------------------------------------------------


def tree_leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


def tensors_in(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class ImitatedGraph:
    """Stands for torch.cuda.CUDAGraph: replays operations on the memory of their capture."""

    def __init__(self):
        self.calls = []  # (operation, args, kwargs, outputs)

    @torch.no_grad()
    def replay(self):
        for op, args, kwargs, outputs in self.calls:
            results = op(*args, **kwargs)
            for output, result in zip(tensors_in(outputs), tensors_in(results)):
                if output.data_ptr() != result.data_ptr():  # neither in place nor a view
                    output.copy_(result)


class ImitatedCapture(torch.utils._python_dispatch.TorchDispatchMode):
    """Stands for the context manager torch.cuda.graph: records operations and runs nothing.

    On a CPU an operation must run to give its outputs. So at the end all memory from before the
    capture is restored, and new memory is filled with NaN. Python numbers become constants, and a
    tensor that is read by Python is an error, both as on a GPU.
    """

    def __init__(self, graph, stream=None, capture_error_mode="global"):
        super().__init__()
        self.calls = graph.calls
        self.saved = {}  # address -> storage from before the capture, copy of its content
        self.created = {}  # address -> storage

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op == torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")

        for x in tensors_in((args, kwargs)):
            storage = x.untyped_storage()
            address = storage.data_ptr()
            if address not in self.created and address not in self.saved:
                self.saved[address] = (storage, storage.clone())
        outputs = op(*args, **kwargs)
        for x in tensors_in(outputs):
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.saved:
                self.created[storage.data_ptr()] = storage

        self.calls.append((op, args, kwargs, outputs))
        return outputs

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.saved.values():
            storage.copy_(content)
        for storage in self.created.values():
            storage.fill_(255)  # a float of ones only is NaN


@pytest.fixture
def imitated_cuda_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", ImitatedGraph)
    monkeypatch.setattr(torch.cuda, "graph", ImitatedCapture)
    for name in ("Stream", "current_stream", "set_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)


class TinyTraining:
    """A network with BN in float64, with or without a teacher, whose step can be captured."""

    def __init__(self, with_teacher):
        self.network = self.build_network()
        self.teacher = self.build_network().requires_grad_(False) if with_teacher else None
        self.criterion = INTLLoss(beta=0.03)
        self.teacher_weight = torch.tensor(0.0, dtype=torch.float64)
        self.lr = torch.tensor(0.0)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=self.lr, momentum=0.9, fused=True
        )
        self.calls = 0

    def build_network(self):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 16)]
        return nn.Sequential(*layers).double()

    def set_schedules(self, step):
        self.lr.fill_(0.1 * (1 - step / 30))
        self.teacher_weight.fill_(0.1 * (1 - step / 30))

    def step(self, views):
        self.calls += 1
        self.optimizer.zero_grad()
        if self.teacher is None:
            loss = self.criterion([self.network(view) for view in views])
        else:
            with torch.no_grad():
                for t, s in zip(self.teacher.parameters(), self.network.parameters()):
                    t.lerp_(s, self.teacher_weight)
                teacher_z = self.teacher(views[0])
            loss = self.criterion([self.network(view) for view in views[1:]], teacher=teacher_z)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), self.criterion.parts["alignment"]


class TinyTrainingWithPythonRate(TinyTraining):
    def set_schedules(self, step):
        super().set_schedules(step)
        self.optimizer.param_groups[0].update(lr=0.1 * (1 - step / 30), fused=False)


def thirty_steps(training, step):
    """The loss and the alignment of every step."""
    numbers = []
    for i in range(30):
        training.set_schedules(i)
        outputs = step(list(randn(3, 8, 6, seed=i)))
        numbers.append([float(x) for x in outputs])
    return torch.tensor(numbers, dtype=torch.float64)


def state_of(training):
    modules = {"network": training.network, "optimizer": training.optimizer}
    if training.teacher is not None:
        modules["teacher"] = training.teacher
    return {name: module.state_dict() for name, module in modules.items()}


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_captured_step_equals_an_ordinary_one(with_teacher, imitated_cuda_graphs):
    plain = TinyTraining(with_teacher)
    expected = thirty_steps(plain, plain.step)
    captured = TinyTraining(with_teacher)
    got = thirty_steps(captured, train.CapturedStep(captured.step))
    assert_close(got, expected, rtol=0, atol=1e-12)
    assert_close(state_of(captured), state_of(plain), rtol=0, atol=1e-12)


def test_a_captured_step_runs_its_python_code_only_until_the_capture(imitated_cuda_graphs):
    training = TinyTraining(with_teacher=False)
    thirty_steps(training, train.CapturedStep(training.step, warmup=4))
    assert training.calls == 4 + 1


def test_a_python_number_is_a_constant_of_a_captured_step(imitated_cuda_graphs):
    """Shows that the imitation can fail: a learning rate that is a number stays what it was."""
    plain = TinyTrainingWithPythonRate(with_teacher=False)
    expected = thirty_steps(plain, plain.step)
    captured = TinyTrainingWithPythonRate(with_teacher=False)
    got = thirty_steps(captured, train.CapturedStep(captured.step))
    assert_close(got[:13], expected[:13], rtol=0, atol=1e-12)  # the first replay has the right rate
    assert (got - expected)[20:].abs().max() > 1e-4


def test_a_step_that_reads_a_tensor_cannot_be_captured(imitated_cuda_graphs):
    def reading_step(views):
        return float(views[0].sum())

    step = train.CapturedStep(reading_step, warmup=0)
    with pytest.raises(SystemExit, match="use --no-cuda-graph: operation not permitted"):
        step([torch.ones(3)])


def test_an_imitated_capture_runs_nothing():
    x = torch.ones(3)
    with ImitatedCapture(ImitatedGraph()):
        y = x.mul_(2) + 1
    assert torch.equal(x, torch.ones(3))
    assert y.isnan().all()


def test_an_imitated_capture_refuses_to_read_a_tensor():
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        ImitatedCapture(ImitatedGraph()),
    ):
        float(torch.ones(1))


# --- The scripts, as a user starts them ----------------------------------------------------------

TINY = """
    --dataset folder --view-sizes 16 16 --stem small --batch-size 16 --hidden 16 --out 24 --epochs 4
    --warmup-epochs 1 --base-lr 0.03 --log-every 1 --workers 0 --save-minutes 0 --precision float32
"""


def tiny(data, folder, flags=""):
    """Arguments of a tiny run: 4 epochs of 3 steps."""
    pytest.importorskip("tensorboard")
    return [*TINY.split(), "--data", str(data), "--output", str(folder), *flags.split()]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged_steps_of(folder):
    return [line for line in lines_of(folder / "log.jsonl") if "loss" in line]


def losses_of(folder):
    return [line["loss"] for line in logged_steps_of(folder)]


def steps_of(folder):
    return [line["step"] for line in logged_steps_of(folder)]


def coco(folder, split="val"):
    return detect_transfer.CocoImages(folder, split, split == "train")


def tiny_network_of_photos(args):
    return TinyNetwork(args, size=16)


class SmallNetwork(nn.Module):
    """Has BN and ReLU, as the real network, but needs a hundredth of its time."""

    def __init__(self, args):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.projector = nn.Sequential(
            nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 24)
        )

    def forward(self, views):
        return [self.projector(self.backbone(view)) for view in views]


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    """A tiny run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    printed = run("train.py", *tiny(photos, folder, "--workers 1 --save-minutes 60"))
    return folder, printed


def test_a_run_leaves_its_files(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {"checkpoint.pt", "backbone.pt", "config.json", "log.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_a_run_logs_every_step_and_evaluates_every_epoch(finished):
    folder, _ = finished
    lines = lines_of(folder / "log.jsonl")
    assert steps_of(folder) == list(range(1, 13))
    assert [line["epoch"] for line in lines if "knn_top1" in line] == [0, 1, 2, 3, 4]


def test_a_log_begins_with_the_command_and_the_date(finished):
    folder, _ = finished
    first = lines_of(folder / "log.jsonl")[0]
    assert "command" in first
    assert "date" in first


def test_a_beta_that_may_collapse_is_replaced_by_the_balanced_one(finished):
    folder, printed = finished
    assert re.search(r"may collapse .*\b0\.01\b.*0\.0747", printed)
    assert json.loads((folder / "config.json").read_text())["beta"] == 0.0747


PRINTED = """
    alignment trace floor score price lr images_per_second waiting hours_left
    embedding_rank condition_number
"""


@pytest.mark.parametrize("name", [*PRINTED.split(), "peak memory"])
def test_a_run_prints_its_numbers(name, finished):
    _, printed = finished
    assert f"{name} " in printed


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pt"])
def test_saved_tensors_are_contiguous(name, finished):
    """The network trains in channels_last."""
    folder, _ = finished
    for x in tensors_in(load(folder / name)):
        assert x.is_contiguous()


def a_state(**options):
    """Nested as a checkpoint; its weight is in channels_last."""
    weight = (
        torch.arange(120.0).reshape(2, 3, 4, 5).to(**options, memory_format=torch.channels_last)
    )
    momentum = torch.ones(2, 3, **options).T
    lr = torch.full((), 0.5, **options)
    return {
        "network": {"weight": weight, "count": torch.full((), 7, **options)},
        "optimizer": {
            "state": {0: {"momentum_buffer": momentum}},
            "param_groups": [{"lr": lr, "params": [0]}],
        },
        "config": {"arch": "resnet18", "view_sizes": [16, 16]},
        "step": 3,
    }


def test_a_saved_state_is_contiguous_and_has_the_same_values(tmp_path):
    state = a_state()
    train.save_checkpoint(state, tmp_path / "checkpoint.pt")
    saved = train.read_checkpoint(tmp_path / "checkpoint.pt")
    assert not state["network"]["weight"].is_contiguous()
    assert all(x.is_contiguous() for x in tensors_in(saved))
    for x, y in zip(tree_leaves(saved), tree_leaves(state)):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_tensors_of_a_gpu_are_saved_as_those_of_the_cpu(tmp_path, monkeypatch):
    """On PyTorch's fake tensors, which have a device and follow its rules, but have no data."""
    saved = {}
    monkeypatch.setattr(torch, "save", lambda state, file: saved.update(state))
    with torch._subclasses.FakeTensorMode():
        state = a_state(device="cuda")
        train.save_checkpoint(state, tmp_path / "checkpoint.pt")
    assert {x.device.type for x in tensors_in(state)} == {"cuda"}
    assert {x.device.type for x in tensors_in(saved)} == {"cpu"}
    assert all(x.is_contiguous() for x in tensors_in(saved))
    assert len(tensors_in(saved)) == len(tensors_in(state))


def processes_of_session(session):
    """How many of its processes run; a zombie only waits for its parent to read its status."""
    n = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            state, _, _, session_id = path.read_text().rsplit(")", 1)[1].split()[:4]
            if state != "Z" and int(session_id) == session:
                n += 1
    return n


def kill_run_at_step(step, kill, arguments):
    """Starts train.py in a new session and kills it; returns its processes before and after."""
    command = [sys.executable, str(HERE / "train.py"), *arguments]
    with no_process_left_behind() as environment:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        for line in process.stdout:
            if f"step {step} " in line and "loss" in line:
                break
        before = processes_of_session(process.pid)
        kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL

        deadline = time.time() + 10
        while processes_of_session(process.pid) and time.time() < deadline:
            time.sleep(0.1)
        return before, processes_of_session(process.pid)


@pytest.fixture(scope="module")
def killed(photos, tmp_path_factory):
    """A run that is killed within an epoch, killed with its process group, and then resumed.

    Returns its folder, the numbers of processes before and after each kill, and the last output.
    """
    folder = tmp_path_factory.mktemp("killed")
    arguments = tiny(photos, folder, "--workers 2")
    processes = {}
    for step, kill in ((5, os.kill), (8, os.killpg)):
        processes[kill.__name__] = kill_run_at_step(step, kill, arguments)
        (folder / "checkpoint.pt.tmp").write_bytes(b"half")
    printed = run("train.py", *arguments)
    return folder, processes, printed


@needs_proc
@pytest.mark.parametrize("kill", ["kill", "killpg"])
def test_a_killed_run_leaves_no_process_behind(kill, killed):
    _, processes, _ = killed
    before, after = processes[kill]
    assert before >= 4  # two workers, and the server that forks them
    assert after == 0


@needs_proc
def test_a_killed_run_resumes_from_its_checkpoint(killed):
    folder, _, printed = killed
    assert re.search(r"from step [1-9]", printed)
    assert steps_of(folder) == list(range(1, 13))


@needs_proc
def test_a_killed_run_ends_with_bitwise_the_weights_of_an_undisturbed_one(killed, finished):
    folder, _, _ = killed
    expected = load(finished[0] / "backbone.pt")
    for name, value in load(folder / "backbone.pt").items():
        assert torch.equal(value, expected[name]), name


TEACHER = "--ema 0.9 --view-sizes 16 16 12 --solarize 0.1 --blur 0.5"
METHODS = [
    *[f"--recipe {name} --arch resnet18 --out 96" for name in PUBLISHED_RECIPES],
    "--loss iternorm",
    "--batch-size 4",
    "--loss whiten --orthogonality so",
    "--loss power --power 0.45 --axis batch",
    "--loss cwrgp --groups 1 --sub-batch 8 --optimizer adam --milestones 0.5 --repeats 2",
    "--loss none --orthogonality srip --joint-head",
    TEACHER,
    "--precision float16",
    "--precision bfloat16 --view-sizes 32 32",
]


@pytest.mark.parametrize("flags", METHODS)
def test_every_recipe_and_method_takes_a_step(flags, photos, tmp_path, capsys):
    sizes = [16, 16]
    if "--recipe" in flags:
        sizes = [16 for _ in train.parse(flags.split()).view_sizes]
    small = f"--view-sizes {' '.join(map(str, sizes))} --max-steps 2 --save-minutes 60"
    small += " --sub-batch 16"
    train.main(tiny(photos, tmp_path, f"{small} {flags}"))
    assert "step 2 " in capsys.readouterr().out
    for name, value in load(tmp_path / "backbone.pt").items():
        assert value.isfinite().all(), name


def die_once(*arguments):
    """Training in which rank 1 dies in its fifth step, unless torchrun has already restarted it."""
    augment_batch = train.Augmentation.__call__
    dies = train.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    steps = itertools.count(1)

    def augment_or_die(self, views, step, device):
        if dies and next(steps) == 5:
            os._exit(7)
        return augment_batch(self, views, step, device)

    train.Augmentation.__call__ = augment_or_die
    train.Network = SmallNetwork
    train.main(arguments)


def test_restarts_of_torchrun_resume(photos, tmp_path):
    arguments = tiny(photos, tmp_path, "--workers 1")
    restarts = ("--max-restarts", 1)
    printed = run("test_intl.py", "die_once", *arguments, processes=2, options=restarts)
    assert re.search(r"from step [34], on 2 x cpu", printed)
    assert "step 12 " in printed


def test_two_processes_evaluate(finished, photos, tmp_path):
    folder, _ = finished
    flags = f"--checkpoint {folder}/backbone.pt --arch resnet18 --stem small --size 16"
    flags += f" --data {photos} --output {tmp_path}"
    flags += " --epochs 1 --batch-size 16 --protocol finetune knn"
    printed = run("linear_eval.py", *flags.split(), processes=2)
    assert "finetune " in printed
    assert "knn " in printed


def train_tiny_network(*arguments):
    train.Network = tiny_network_of_photos
    train.main(arguments)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_on_two_nodes(*arguments):
    """Two agents of torchrun with two processes each."""
    command = f"""
        {sys.executable} -m torch.distributed.run --nnodes 2 --nproc_per_node 2 --rdzv_id 7
        --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{free_port()} --local_addr 127.0.0.1
        {HERE / "test_intl.py"}
    """
    with no_process_left_behind() as environment:
        agents = [
            subprocess.Popen(
                [*command.split(), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            for _ in range(2)
        ]
        printed = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed


def test_two_nodes_equal_one_process_which_resumes_their_run(photos, tmp_path, monkeypatch):
    four = tmp_path / "four"
    one = tmp_path / "one"
    run_on_two_nodes("train_tiny_network", *tiny(photos, four, "--max-steps 5"))

    monkeypatch.setattr(train, "Network", tiny_network_of_photos)
    train.main(tiny(photos, one, "--max-steps 7"))
    train.main(tiny(photos, four, "--max-steps 7"))

    losses = losses_of(one)
    assert len(losses) == 7
    assert losses == pytest.approx(losses_of(four), rel=1e-4)
    assert_close(load(one / "backbone.pt"), load(four / "backbone.pt"), rtol=1e-4, atol=1e-6)


# In float64: in float32 a ReLU whose input is within rounding of zero changes the gradient by 1e-3.
GLOBAL_BATCH = "--batch-size 12 --max-steps 5 --log-every 5 --save-minutes 60"
ANY_NUMBER_OF_PROCESSES = {
    "two views": (train.Network, ""),
    "three views and a teacher": (SmallNetwork, TEACHER),
    "CW-RGP": (SmallNetwork, "--loss cwrgp --groups 2 --sub-batch 6 --repeats 2"),
}


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def train_methods_in_float64(photos, folder):
    """One run after another. Each needs new addresses in torchrun's store, as after a restart."""
    with float64_by_default(), pytest.MonkeyPatch.context() as monkeypatch:
        for name, (network, flags) in ANY_NUMBER_OF_PROCESSES.items():
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", name)
            monkeypatch.setattr(train, "Network", network)
            train.main(tiny(photos, Path(folder, name), f"{GLOBAL_BATCH} {flags}"))


@pytest.fixture(scope="module")
def by_one_process(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_one_process")
    train_methods_in_float64(photos, folder)
    return folder


@pytest.mark.parametrize("name", ANY_NUMBER_OF_PROCESSES)
def test_processes_train_what_one_process_trains(name, by_processes, by_one_process):
    """The global batch is that of one process, with batch norm over all processes."""
    _, folder = by_processes
    got = load(folder / name / "checkpoint.pt")
    expected = load(by_one_process / name / "checkpoint.pt")
    parts = ["network", "teacher"] if "teacher" in name else ["network"]
    for part in parts:
        for key, value in expected[part].items():
            error = (got[part][key] - value).double().norm() / value.double().norm().clamp_min(
                1e-12
            )
            assert error < 1e-9, (part, key)


@pytest.mark.parametrize("name", ANY_NUMBER_OF_PROCESSES)
def test_processes_log_what_one_process_logs(name, by_processes, by_one_process):
    _, folder = by_processes
    got = losses_of(folder / name)
    assert len(got) > 0
    assert got == pytest.approx(losses_of(by_one_process / name), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(photos, tmp_path):
    with pytest.raises(SystemExit, match=r"the loss is not finite at step \d+: .*--base-lr"):
        train.main(tiny(photos, tmp_path, "--base-lr 1e30 --warmup-epochs 0"))
    for name, value in load(tmp_path / "checkpoint.pt")["network"].items():
        assert value.isfinite().all(), name


@pytest.fixture(scope="module", params=[0, 10], ids=["save at once", "save every 10 minutes"])
def run_of_101_epochs(request, photos, tmp_path_factory):
    """Its minutes between checkpoints, its folder, and the names of the files that it wrote."""
    folder = tmp_path_factory.mktemp("epochs")
    written = []
    flags = f"--epochs 101 --batch-size 48 --log-every 1 --save-minutes {request.param}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "save_checkpoint", lambda state, path: written.append(path.name))
        monkeypatch.setattr(train, "Network", tiny_network_of_photos)
        train.main(tiny(photos / "train", folder, flags))
    return request.param, folder, written


def test_a_run_is_saved_by_the_clock_and_at_its_end(run_of_101_epochs):
    minutes, _, written = run_of_101_epochs
    times = 101 if minutes == 0 else 1
    assert written == ["checkpoint.pt", "backbone.pt"] * times


def test_a_run_is_evaluated_at_most_a_hundred_times(run_of_101_epochs):
    _, folder, _ = run_of_101_epochs
    evaluated = [line for line in lines_of(folder / "log.jsonl") if "feature_rank" in line]
    assert len(evaluated) == 1 + 101 // 2 + 1  # before the first step, every other epoch, the end


@pytest.fixture
def overflowing_run(photos, tmp_path, monkeypatch):
    """A float16 run whose first gradients overflow: its steps that were taken, its checkpoint."""
    steps = []
    sgd_step = torch.optim.SGD.step

    def counted_step(self, *args, **kwargs):
        steps.append(1)
        return sgd_step(self, *args, **kwargs)

    overflowing_scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr(train, "Network", tiny_network_of_photos)
    monkeypatch.setattr(torch.amp, "GradScaler", overflowing_scaler)
    monkeypatch.setattr(torch.optim.SGD, "step", counted_step)
    train.main(tiny(photos, tmp_path, "--precision float16 --epochs 8"))
    return len(steps), load(tmp_path / "checkpoint.pt")


def test_the_scaler_skips_steps_whose_gradients_overflow(overflowing_run):
    steps, saved = overflowing_run
    assert 0 < steps < 24
    assert saved["scaler"]["scale"] == 2.0 ** (30 - (24 - steps))


def test_skipped_steps_leave_weights_and_momentum_finite(overflowing_run):
    _, saved = overflowing_run
    for name, value in saved["network"].items():
        assert value.isfinite().all(), name
    for state in saved["optimizer"]["state"].values():
        assert state["momentum_buffer"].isfinite().all()


class HostToDeviceCopies(torch.utils._python_dispatch.TorchDispatchMode):
    """Records for every copy from the host to a device without data whether it is non-blocking."""

    def __init__(self):
        super().__init__()
        self.non_blocking = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        from_host = any(isinstance(x, torch.Tensor) and x.device == CPU for x in args)
        if "copy" in str(op) and from_host and result.device.type == "meta":
            self.non_blocking.append(kwargs.get("non_blocking", args[2:3] == (True,)))
        return result


@pytest.mark.parametrize("flags, copies", [("", 12), (TEACHER, 18)])
def test_no_step_waits_for_the_device(flags, copies, photos, tmp_path, monkeypatch):
    """On meta tensors a read is an error: the first one must be that of the third, logged step.

    Each of three steps copies the pixels and the random numbers of each view.
    """
    meta = torch.device("meta")
    spy = HostToDeviceCopies()
    build_network = train.Network

    def fake_features(backbone, loader, dataset, device, dtype):  # called before the first step
        n = sum(len(labels) for _, labels in loader)
        spy.non_blocking.clear()
        return torch.rand(n, 4), torch.arange(n)

    def fake_distributed(device_name, precision):
        return contextlib.nullcontext((meta, torch.float32))

    monkeypatch.setattr(train, "distributed", fake_distributed)
    monkeypatch.setattr(train, "Network", lambda args: build_network(args).to(meta))
    monkeypatch.setattr(train, "extract_features", fake_features)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with pytest.raises(RuntimeError, match="meta tensors") as stopped, spy:
        train.main(tiny(photos, tmp_path, f"{flags} --log-every 3"))

    statements = [str(entry.statement) for entry in stopped.traceback]
    assert any("float(" in statement for statement in statements), statements
    assert spy.non_blocking == [True] * copies


def test_compile_makes_a_graph_of_the_network_and_one_of_the_loss(photos, tmp_path, monkeypatch):
    torch._dynamo.reset()  # other tests have compiled the same functions
    graphs = []
    compile_module = nn.Module.compile
    images = (16, 3, 16, 16)
    embedding = (16, 24)
    eager_augmentation = train.Augmentation

    def backend(graph, example_inputs):
        shapes = [tuple(x.shape) for x in example_inputs if isinstance(x, torch.Tensor)]
        graphs.append([shape for shape in shapes if shape in (images, embedding)])
        return graph.forward

    def compile_with_backend(self, **options):
        return compile_module(self, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_with_backend)
    monkeypatch.setattr(train, "Augmentation", lambda args, compile: eager_augmentation(args))
    train.main(tiny(photos, tmp_path, "--max-steps 4 --compile --save-minutes 60"))
    assert graphs == [[images, images], [embedding, embedding]]


def test_compile_without_a_compiler_names_the_flag_that_turns_it_off(photos, tmp_path):
    environment = ENVIRONMENT | {
        "CXX": str(tmp_path / "no_compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, str(HERE / "train.py"), *tiny(photos, tmp_path / "run", "--compile")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "--no-compile" in done.stderr.strip().splitlines()[-1]


@pytest.fixture
def captured_on_the_cpu(imitated_cuda_graphs, monkeypatch):
    monkeypatch.setattr(train, "why_not_captured", lambda args, device, dtype: None)


def train_small_network(photos, folder, flags=""):
    """Thirty steps in float64, unless the flags stop it."""
    with float64_by_default(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "Network", SmallNetwork)
        train.main(tiny(photos, folder, f"--epochs 10 --save-minutes 60 {flags}"))


@pytest.fixture(scope="module", params=["", TEACHER], ids=["two views", "teacher"])
def uncaptured_run(request, photos, tmp_path_factory):
    """Flags and folder."""
    folder = tmp_path_factory.mktemp("uncaptured")
    train_small_network(photos, folder, request.param)
    return request.param, folder


def assert_same_run(folder, expected_folder):
    assert steps_of(folder) == list(range(1, 31))
    assert losses_of(folder) == pytest.approx(losses_of(expected_folder), rel=1e-4)
    got = load(folder / "checkpoint.pt")
    expected = load(expected_folder / "checkpoint.pt")
    parts = [name for name in ("network", "teacher") if name in expected]
    for part in parts:
        assert_close(got[part], expected[part], rtol=1e-9, atol=1e-12)


def test_a_captured_run_equals_an_uncaptured_one(
    uncaptured_run, photos, tmp_path, captured_on_the_cpu
):
    flags, expected = uncaptured_run
    train_small_network(photos, tmp_path, flags)
    assert_same_run(tmp_path, expected)


def test_a_captured_run_says_so(photos, tmp_path, captured_on_the_cpu, capsys):
    train_small_network(photos, tmp_path, "--max-steps 13")
    assert "the step is captured in a CUDA graph" in capsys.readouterr().out


def test_a_resumed_captured_run_equals_an_uncaptured_one(
    uncaptured_run, photos, tmp_path, captured_on_the_cpu
):
    """Stopped after a step that was replayed."""
    flags, expected = uncaptured_run
    train_small_network(photos, tmp_path, f"{flags} --max-steps 15")
    train_small_network(photos, tmp_path, flags)
    assert_same_run(tmp_path, expected)


def test_a_loss_that_cannot_be_captured_ends_the_run_with_the_flag_to_use(
    photos, tmp_path, captured_on_the_cpu, monkeypatch
):
    """The checkpoint of the last ordinary step stays, and the run can be resumed."""

    class ReadingLoss(INTLLoss):
        def forward(self, z, teacher=None):
            loss = super().forward(z, teacher)
            return loss * (1 if float(loss) > 0 else 2)

    monkeypatch.setitem(train.LOSSES, "intl", lambda args: ReadingLoss(beta=args.beta))
    with pytest.raises(SystemExit, match="use --no-cuda-graph"):
        train_small_network(photos, tmp_path, "--save-minutes 0")
    saved = load(tmp_path / "checkpoint.pt")
    assert saved["step"] == 12
    for name, value in saved["network"].items():
        assert value.isfinite().all(), name


REASONS_NOT_TO_CAPTURE = {
    "": "no GPU",
    "--no-cuda-graph": "--no-cuda-graph",
    "--device cuda --precision float16": "float16",
    "--device cuda --loss whiten": "--loss whiten",
    "--device cuda --loss cwrgp": "--loss cwrgp",
    "--device cuda": None,
    "--device cuda --ema 0.9 --orthogonality so": None,
}


@pytest.mark.parametrize("flags, reason", REASONS_NOT_TO_CAPTURE.items())
def test_a_step_is_captured_where_possible_and_else_the_reason_is_named(flags, reason):
    args = train.parse(flags.split())
    dtype = torch.float16 if "float16" in flags else torch.float32
    got = train.why_not_captured(args, torch.device(args.device), dtype)
    if reason is None:
        assert got is None
    else:
        assert reason in got


@pytest.mark.parametrize("flags, captured", [("", False), ("--cuda-graph", True)])
def test_several_processes_are_captured_only_if_asked(flags, captured, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    args = train.parse(["--device", "cuda", *flags.split()])
    got = train.why_not_captured(args, torch.device("cuda"), torch.float32)
    assert (got is None) == captured


BAD = {
    "--gray 7": "--gray: 7 is not between 0 and 1",
    "--warmup-epochs 9": "--epochs must exceed --warmup-epochs",
    "--view-sizes 16": "--view-sizes needs two values or more",
    "--loss cwrgp --ema 0.9": "--ema: CW-RGP has no teacher",
    "--data nowhere": "--dataset folder needs --data FOLDER, and nowhere is not a folder",
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


class RunsACommand:
    """Its pickle creates the file `harm` when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch harm",)


def damaged_checkpoint(checkpoint):
    return checkpoint.read_bytes()[:1000]


def malicious_checkpoint(checkpoint):
    torch.save({"config": RunsACommand()}, "malicious.pt")
    return Path("malicious.pt").read_bytes()


def another_runs_checkpoint(checkpoint):
    return checkpoint.read_bytes()


@pytest.mark.parametrize(
    "make_content, message",
    [
        (damaged_checkpoint, "cannot be read"),
        (malicious_checkpoint, "cannot be read"),
        (another_runs_checkpoint, "seed was 0, is now 1"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(
    make_content, message, finished, photos, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    content = make_content(finished[0] / "checkpoint.pt")
    Path("run").mkdir()
    Path("run/checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit, match=f"run/checkpoint.pt.*{message}"):
        train.main(tiny(photos, "run", "--max-steps 13 --seed 1"))
    assert Path("run/checkpoint.pt").read_bytes() == content
    assert not Path("harm").exists()


SCRIPTS = {"train.py": train, "linear_eval.py": linear_eval}
if detect_transfer:
    SCRIPTS["detect_transfer.py"] = detect_transfer
OTHER_PROGRAMS = ["python3", ".", "pip", "pytest"]


def documented_commands():
    """The words of each command in README.md's bash blocks and in the scripts' docstrings."""
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for script in SCRIPTS.values():
        description = script.__doc__.replace("\\\n", " ")
        lines += re.findall("^ +(?:python|torchrun).*", description, re.M)
    commands = []
    for line in lines:
        for part in line.split("#")[0].split("&&"):
            words = shlex.split(part)
            if words:
                commands.append(words)
    return commands


def split_command(words):
    """A command's script of this project, or None, and the arguments after it."""
    for i, word in enumerate(words):
        name = Path(word).name
        if name in SCRIPTS or name == "intl.py":
            return name, [w for w in words[i + 1 :] if w != "&"]
    return None, words


def test_documented_commands_parse():
    seen = set()
    for words in documented_commands():
        name, arguments = split_command(words)
        if name is None:
            if detect_transfer:  # otherwise its commands are among these
                assert words[0] in OTHER_PROGRAMS, words
            continue
        seen.add(name)
        if name == "intl.py":
            assert arguments[:1] in ([], ["--plot"])
        else:
            SCRIPTS[name].parse(arguments)
    assert seen == {"intl.py", *SCRIPTS}


def documented_python():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def test_the_documented_method_equals_the_loss():
    """The README's short definition, in float32."""
    method, _, _ = documented_python()
    names = dict(globals())
    exec(method, names)
    z1, z2 = randf(2, 32, 64)
    assert_close(names["intl_loss"](z1, z2), INTLLoss()([z1, z2]))


def test_the_documented_loop_runs():
    _, loop, _ = documented_python()
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 512))
    names = dict(globals(), backbone=backbone, loader=[torch.randn(2, 16, 3, 2, 2)])
    exec(loop, names)
    assert set(names["criterion"].parts) == {"alignment", "trace", "floor", "score", "price"}


def test_a_backbone_is_read_by_the_documented_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, result = documented_python()
    backbone, _ = train.build_backbone("resnet50", "imagenet")
    Path("runs/imagenet").mkdir(parents=True)
    torch.save(backbone.state_dict(), "runs/imagenet/backbone.pt")
    names = dict(globals())
    exec(result.replace("backbone.load", "found = backbone.load"), names)
    assert names["found"] == (["fc.weight", "fc.bias"], [])


def test_tables_are_what_the_logs_say():
    files = [HERE / "README.md", HERE / "evidence" / "README.md"]
    written = "\n".join(path.read_text() for path in files)
    for table in run("evidence/tables.py").strip().split("\n\n"):
        assert table in written


def test_named_tests_exist():
    tests = Path(__file__).read_text()
    for module in HERE.glob("*.py"):
        for names in re.findall(r"\[(test_[^\]]*)\]", module.read_text()):
            for name in re.split(r",\s*(?:# )?", names):
                assert f"def {name.strip()}(" in tests, name


# --- Users' files and folders ---------------------------------------------------------------------


def ramp(bits):
    """A picture whose grey values rise from 0 to the largest of this many bits: (16, 16)."""
    return np.linspace(0, 2**bits - 1, 256).round().reshape(16, 16).astype(np.uint16)


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif", "ramp.pgm"])
def test_16_bit_grey_images_are_scaled_to_8_bits(name, tmp_path):
    grey = ramp(16)
    if name.endswith("pgm"):
        data = b"P5 16 16 65535\n" + grey.astype(">u2").tobytes()
        (tmp_path / name).write_bytes(data)
    else:
        Image.fromarray(grey).save(tmp_path / name)
    expected = torch.from_numpy((grey / 257).round().astype(np.uint8)).expand(3, 16, 16)
    assert torch.equal(train.decode_image(str(tmp_path / name)), expected)


def test_a_tiff_with_12_bits_is_scaled_by_its_own_range(tmp_path):
    image = Image.fromarray(ramp(12))
    image.format = "TIFF"
    image.tag_v2 = {258: (12,)}  # Pillow reads such files but cannot write them
    rgb = torch.from_numpy(np.array(train.to_rgb(image)))
    assert rgb[-1, -1].tolist() == [255, 255, 255]
    assert_close(rgb[..., 0].double().flatten(), torch.arange(256.0).double(), rtol=0, atol=1)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_without_a_defined_range_are_refused_by_name(dtype, tmp_path):
    Image.fromarray(ramp(16).astype(dtype)).save(tmp_path / "depth.tif")
    with pytest.raises(RuntimeError, match=r"depth.tif cannot be read .*no defined value range"):
        train.decode_image(str(tmp_path / "depth.tif"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_8_bit_images_of_other_modes_are_converted_as_pillow_does_it(mode):
    image = TF.to_pil_image(pictures(16)[0])
    image = image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)
    assert train.to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_an_image_is_named_with_the_cause_whatever_pillow_raises(tmp_path):
    """A PNG with two megabytes of text, for which Pillow raises a ValueError."""
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 2_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "text.png", pnginfo=text)
    with pytest.raises(RuntimeError, match="text.png cannot be read as an image .*too large"):
        train.decode_image(str(tmp_path / "text.png"))


def test_a_missing_image_is_not_to_be_repaired(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        train.decode_image(str(tmp_path / "gone.png"))


def save_pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        TF.to_pil_image(pictures(16)[i]).save(folder / name)


def test_a_train_folder_without_classes_is_a_tree_without_labels(tmp_path):
    save_pictures(tmp_path / "train", ["a.png", "b.png"])
    train_set, val_set = train.load_data("folder", tmp_path, 0)
    assert len(train_set) == 2
    assert train_set.classes == ["."]
    assert val_set is None


def test_hidden_folders_and_files_are_ignored(tmp_path):
    save_pictures(tmp_path / "train" / "cat", ["a.png", "._b.png"])
    save_pictures(tmp_path / "train" / "cat" / ".thumbnails", ["c.png"])
    save_pictures(tmp_path / "train" / ".ipynb_checkpoints", ["d.png"])
    train_set, _ = train.load_data("folder", tmp_path, 0)
    assert train_set.classes == ["cat"]
    assert [Path(train_set.samples[i][0]).name for i in range(len(train_set))] == ["a.png"]
    tree = train.load_folder(tmp_path / "train", labelled=False)
    assert len(tree) == 1


def test_different_class_folders_are_named(tmp_path):
    for folder in ("train/cat", "train/dog", "val/cat", "val/wolf"):
        save_pictures(tmp_path / folder, ["a.png"])
    with pytest.raises(SystemExit, match="2 are only in one of them, such as dog, wolf"):
        train.load_data("folder", tmp_path, 0)


def test_tiny_imagenet_is_read_as_it_is_distributed(tmp_path):
    save_pictures(tmp_path / "train" / "n01" / "images", ["n01_0.JPEG"])
    save_pictures(tmp_path / "train" / "n02" / "images", ["n02_0.JPEG", "n02_1.JPEG"])
    save_pictures(tmp_path / "val" / "images", ["val_0.JPEG", "val_1.JPEG"])
    table = "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n"
    (tmp_path / "val" / "val_annotations.txt").write_text(table)
    train_set, val_set = train.load_data("tiny-imagenet", tmp_path, 0)
    assert train_set.targets.tolist() == [0, 1, 1]
    assert val_set.targets.tolist() == [1, 0]
    assert [val_set[i][1] for i in range(2)] == [1, 0]


class FakeSTL10:
    """Two labelled and three unlabelled training images, one test image."""

    classes = ["airplane", "bird"]

    def __init__(self, root, split, download=False):
        labels = {"train": [1, 0], "train+unlabeled": [1, 0, -1, -1, -1], "test": [1]}
        self.labels = np.array(labels[split])
        self.data = np.zeros((len(self.labels), 3, 96, 96), dtype=np.uint8)


def test_stl10_trains_on_its_unlabelled_images_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "STL10", FakeSTL10)
    train_set, val_set = train.load_data("stl10", tmp_path, 0)
    assert train_set.targets.tolist() == [1, 0, -1, -1, -1]
    assert val_set.targets.tolist() == [1]


def test_stl10_gives_a_classifier_its_labelled_images_only(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "STL10", FakeSTL10)
    train_set, _ = train.load_data("stl10", tmp_path, 0, labelled=True)
    assert train_set.targets.tolist() == [1, 0]


def test_images_without_a_label_do_not_vote(tmp_path, photos, monkeypatch):
    train_set, val_set = train.load_data("folder", photos, 0)
    train_set.targets[::2] = -1
    banks = []

    def record_subset(images, rows, n):
        if images is train_set:
            banks.append(rows)
        return random_subset(images, rows, n)

    random_subset = train.random_subset
    monkeypatch.setattr(train, "random_subset", record_subset)
    monkeypatch.setattr(train, "load_data", lambda *_: (train_set, val_set))
    train.main(tiny(photos, tmp_path, "--max-steps 1"))
    assert banks[0].tolist() == list(range(1, 48, 2))


def test_a_long_tmpdir_is_named(tmp_path, photos, monkeypatch):
    long_path = tmp_path / ("x" * 80)
    long_path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long_path))
    with pytest.raises(SystemExit, match="too long for a socket's path: set TMPDIR"):
        train.main(tiny(photos, tmp_path / "run", "--workers 1"))


# --- Users' runs: folders, logs, divergence -------------------------------------------------------


def test_two_processes_in_one_folder_are_one_run_and_one_refusal(photos, tmp_path):
    command = [sys.executable, str(HERE / "train.py"), *tiny(photos, tmp_path, "--epochs 40")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with no_process_left_behind() as environment:
        first = subprocess.Popen(command, env=environment, **options)
        wait_until(lambda: (tmp_path / "log.jsonl").exists())
        second = subprocess.run(command, env=environment, timeout=200, **options)
        assert second.returncode == 1
        assert f"another run is using {tmp_path}" in second.stdout
        first.kill()
        first.communicate()
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1))


def test_a_folder_belongs_to_its_run_before_the_first_checkpoint(photos, tmp_path):
    train.main(tiny(photos, tmp_path, "--max-steps 1"))
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(
        SystemExit, match="config.json was written with other settings .*seed was 0"
    ):
        train.main(tiny(photos, tmp_path, "--max-steps 1 --seed 1"))


def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with train.lock_output_dir(tmp_path):
            pass


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(train.fcntl, "flock", no_locks)
    with train.lock_output_dir(tmp_path):
        pass
    assert "does not support locks" in capsys.readouterr().out


def test_a_damaged_log_does_not_stop_a_run_with_a_checkpoint(photos, tmp_path):
    train.main(tiny(photos, tmp_path, "--max-steps 2"))
    log = tmp_path / "log.jsonl"
    whole = log.read_text().splitlines()
    log.write_text("\n".join(["\0\0\0" + whole[0], *whole[1:], "\0\0", '{"torn', "7", "[1]"]))
    train.main(tiny(photos, tmp_path, "--max-steps 4"))
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert log.read_text().splitlines()[: len(whole)] == whole


def test_a_damaged_configuration_does_not_stop_a_run_with_a_checkpoint(photos, tmp_path):
    train.main(tiny(photos, tmp_path, "--max-steps 2"))
    (tmp_path / "config.json").write_text("\0\0\0")
    train.main(tiny(photos, tmp_path, "--max-steps 3"))
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_checkpoint_that_only_some_processes_see_is_an_error(tmp_path, monkeypatch):
    def gather_another_step(steps, own_step):
        steps[:] = [own_step, 0]

    train.save_checkpoint({"config": {}, "step": 5}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(dist, "all_gather_object", gather_another_step)
    with pytest.raises(SystemExit, match=r"\[5, 0\]: --output must be on storage"):
        train.resume(tmp_path / "checkpoint.pt", {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_end_the_run_as_diverged(value, photos):
    images, _ = train.load_data("folder", photos, 0)
    loader = train.eval_loader(images, "folder", 16, 0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16**2, 4))
    backbone[1].bias.data[2] = value
    with pytest.raises(SystemExit, match="the features are not finite.*diverged.*--base-lr"):
        train.extract_features(backbone, loader, "folder", CPU, torch.float32)


def test_a_divergence_that_the_loss_does_not_show_stops_the_run_before_it_is_saved(
    photos, tmp_path, monkeypatch
):
    """Weights of 1e25: IterNorm and cosines do not see the scale, but variances overflow."""

    def scaled_network(args):
        network = TinyNetwork(args, size=16)
        for parameter in network.backbone.parameters():
            parameter.data *= 1e25
        return network

    monkeypatch.setattr(train, "Network", scaled_network)
    with pytest.raises(SystemExit, match="has diverged at step 0.*--base-lr"):
        train.main(tiny(photos, tmp_path))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_covariance_loss_ends_after_half_of_the_schedule(photos, tmp_path, monkeypatch):
    weights = []
    forward = CWRGPLoss.forward

    def recorded(self, views):
        weights.append(self.covariance_weight)
        return forward(self, views)

    monkeypatch.setattr(CWRGPLoss, "forward", recorded)
    monkeypatch.setattr(train, "Network", tiny_network_of_photos)
    flags = "--loss cwrgp --groups 1 --sub-batch 8 --covariance-weight 0.01"
    train.main(tiny(photos, tmp_path, flags))
    assert weights == [0.01] * 6 + [0.0] * 6


def leave_with_ddp(outcome, *arguments):
    """Fails if a DDP module is still alive when the process group is destroyed."""
    ddp = nn.parallel.DistributedDataParallel
    destroy = dist.destroy_process_group

    def checked_destroy():
        alive = [thing for thing in gc.get_objects() if isinstance(thing, ddp)]
        print("alive:", len(alive), flush=True)
        destroy()

    dist.destroy_process_group = checked_destroy
    train.Network = SmallNetwork
    if outcome == "error":
        train.save_checkpoint = None  # a TypeError when the run is saved
    with contextlib.suppress(TypeError):
        train.main(list(arguments))


@pytest.mark.parametrize("outcome", ["success", "error"])
def test_ddp_is_released_before_the_process_group(outcome, photos, tmp_path):
    arguments = tiny(photos, tmp_path, "--max-steps 1 --save-minutes 0")
    printed = run("test_intl.py", "leave_with_ddp", outcome, *arguments, processes=2)
    assert printed.count("alive: 0") == 2
    assert printed.count("alive:") == 2


# --- Scripts in evidence/ -------------------------------------------------------------------------


def test_step_benchmark_measures_three_recipes_on_a_cpu():
    flags = "--device cpu --tiny --steps 1 --rounds 1 --workers 1".split()
    output = run("evidence/gpu.py", *flags)
    table = [line for line in output.splitlines() if line.startswith("| `")]
    names = []
    for line in table:
        name, images_per_second, ms_per_step, *device_columns = line.strip("| ").split(" | ")
        names.append(name)
        assert float(images_per_second.replace(",", "")) > 0
        assert float(ms_per_step) > 0
        assert device_columns == ["-", "-", "-"]  # kernels, launches, memory: only on a GPU
    assert names == [
        "`cifar10`, eager",
        "`cifar10`, eager, through 1 workers",
        "`imagenet`, eager",
        "`imagenet-multicrop-200`, eager",
    ]


# --- Evaluation of any publisher's backbone -------------------------------------------------------


def random_resnet18(seed, stem="imagenet"):
    """A ResNet-18 in eval mode whose weights, BN statistics and counters are all random."""
    network, _ = train.build_backbone("resnet18", stem)
    g = generator(seed)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand(value.shape, generator=g))
        else:
            value.add_(3)
    return network.eval()


def with_prefix(prefix, network):
    return {f"{prefix}{name}": value for name, value in network.state_dict().items()}


def read_saved(content, folder, flags="--arch resnet18"):
    """What linear_eval.read_backbone makes of a file with this content."""
    path = folder / "c.pt"
    torch.save(content, path)
    try:
        return linear_eval.read_backbone(
            linear_eval.parse(["--checkpoint", str(path), *flags.split()])
        )
    finally:
        path.unlink()  # 45 MB


def assert_same_features(backbone, network):
    x = randf(2, 3, 32, 32)
    assert torch.equal(backbone.eval()(x), network(x))


# Publisher: entry of the file, prefix, and some tensors that are not the backbone's.
LAYOUTS = {
    "official INTL": ("state_dict", "module.backbone.", "module.projector.0.weight"),
    "MoCo v1, v2": (
        "state_dict",
        "module.encoder_q.",
        "module.encoder_k.conv1.weight",
        "module.queue",
    ),
    "MoCo v3": ("state_dict", "module.base_encoder.", "module.predictor.0.weight"),
    "Barlow Twins": ("", ""),
    "VICReg": ("model", "module.backbone.", "module.projector.0.weight"),
    "DINO": ("teacher", "backbone.", "head.mlp.0.weight"),
    "DINO, wrapped": ("teacher", "module.backbone.", "module.head.mlp.0.weight"),
    "SwAV": ("", "module.", "module.projection_head.0.weight", "module.prototypes.weight"),
    "solo-learn": ("state_dict", "backbone.", "projector.0.weight", "classifier.weight"),
    "solo-learn, old": ("state_dict", "encoder.", "projector.0.weight", "classifier.weight"),
    "anybody": ("weights", "student.trunk.net.", "student.head.weight"),
    "torch.compile": ("state_dict", "_orig_mod.", "_orig_mod.head.weight"),
    "torch.compile within": ("model", "module._orig_mod.backbone.", "module._orig_mod.head.weight"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_publishers_checkpoint_gives_the_features_of_the_bare_network(name, tmp_path, capsys):
    entry, prefix, *others = LAYOUTS[name]
    network = random_resnet18(0)
    content = with_prefix(prefix, network)
    if name == "SwAV":  # old checkpoints have no counters
        content = {k: v for k, v in content.items() if not k.endswith("num_batches_tracked")}
    for key in (f"{prefix}fc.weight", f"{prefix}fc.bias", *others):
        content[key] = torch.zeros(2)
    if entry:
        content = {entry: content, "student": {}, "args": argparse.Namespace(a=1)}

    backbone, width, _ = read_saved(content, tmp_path)
    assert_same_features(backbone, network)
    assert width == 512
    printed = capsys.readouterr().out
    assert "resnet18" in printed
    assert "fc.weight" in printed


# The prefix of the network to take, and that of another one in the same file.
SEVERAL = {
    "train.py": ("network.backbone.", "teacher.backbone."),
    "official INTL": ("state_dict.module.backbone.", "state_dict.module.momentum_backbone."),
    "DINO": ("teacher.backbone.", "student.module.backbone."),
    "MoCo v1, v2": ("state_dict.module.encoder_q.", "state_dict.module.encoder_k."),
    "MoCo v3": ("state_dict.module.base_encoder.", "state_dict.module.momentum_encoder."),
    "solo-learn": ("state_dict.backbone.", "state_dict.momentum_backbone."),
    "solo-learn, old": ("state_dict.encoder.", "state_dict.momentum_encoder."),
    "BYOL": ("online_encoder.net.", "target_encoder.net."),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_networks_the_published_one_is_preferred_in_any_order(name):
    taken, other = SEVERAL[name]
    for prefixes in ((taken, other), (other, taken)):
        names = [
            f"{prefix}{layer}conv1.weight" for prefix in prefixes for layer in ("", "layer1.0.")
        ]
        assert linear_eval.find_resnets(dict.fromkeys(names)) == [taken, other]


def test_equally_preferred_networks_are_in_the_order_of_the_file():
    names = [f"{prefix}.{layer}conv1.weight" for prefix in "ba" for layer in ("", "layer1.0.")]
    assert linear_eval.find_resnets(dict.fromkeys(names)) == ["b.", "a."]


def test_of_several_networks_one_is_taken_and_all_are_named(tmp_path, capsys):
    network = random_resnet18(0)
    content = {
        "student": with_prefix("module.backbone.", random_resnet18(1)),
        "teacher": with_prefix("backbone.", network),
    }
    backbone, _, _ = read_saved(content, tmp_path)
    assert_same_features(backbone, network)
    expected = "took teacher.backbone.*, not the other networks ['student.module.backbone.']"
    assert expected in capsys.readouterr().out


def test_entries_are_found_by_their_content_not_by_their_name(tmp_path):
    network = random_resnet18(0)
    content = {
        "network": {"epoch": 3},
        "state_dict": {"conv1.weight": torch.zeros(1)},
        "ema": {"nested": network.state_dict()},
    }
    backbone, _, _ = read_saved(content, tmp_path)
    assert_same_features(backbone, network)


def test_another_publishers_config_is_ignored(tmp_path):
    network = random_resnet18(0)
    content = {"model": network.state_dict(), "config": {"arch": "vit_b_16", "dataset": "mine"}}
    backbone, _, settings = read_saved(content, tmp_path)
    assert_same_features(backbone, network)
    assert settings == {"arch": "resnet18", "stem": "imagenet"}


def test_a_checkpoint_of_train_py_says_which_network_it_holds(finished):
    folder, _ = finished
    args = linear_eval.parse(["--checkpoint", str(folder / "checkpoint.pt")])
    backbone, _, settings = linear_eval.read_backbone(args)
    weights = load(folder / "backbone.pt")
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, weights[name])
    assert settings == json.loads((folder / "config.json").read_text())


def test_a_checkpoint_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    network = random_resnet18(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(network.state_dict(), tmp_path / "gpu.pt")
    assert b"cuda:0" in (tmp_path / "gpu.pt").read_bytes()
    args = linear_eval.parse(["--checkpoint", str(tmp_path / "gpu.pt"), "--arch", "resnet18"])
    backbone, _, _ = linear_eval.read_backbone(args)
    assert_same_features(backbone, network)


def other_network(case):
    """Content of a file that is not a whole torchvision ResNet-18, and how the message goes on."""
    state = random_resnet18(0).state_dict()
    if case == "a layer is missing":
        del state["layer3.0.conv1.weight"]
        return state, "is not a resnet18 .*--arch.* layer3.0.conv1.weight is missing"
    if case == "no layers":
        return {"conv1.weight": state["conv1.weight"]}, "contains no ResNet"
    if case == "deeper":
        deeper, _ = train.build_backbone("resnet34", "imagenet")
        return deeper.state_dict(), r"is not a resnet18 .*--arch.* layer1.2.\S+ is not used"
    if case == "bottlenecks":
        deeper, _ = train.build_backbone("resnet50", "imagenet")
        return deeper.state_dict(), r"is not a resnet18 .*--arch.* size mismatch for layer1.0.conv1"
    if case == "small stem":
        return random_resnet18(
            0, "small"
        ).state_dict(), "is not a resnet18 with stem imagenet.*--stem"
    if case == "another model":
        return {"a": torch.zeros(2)}, r"contains no ResNet.*\['a'\]"
    if case == "whole module":
        return torchvision.models.resnet18(), "cannot be read"
    return [1, 2], "cannot be read"


@pytest.mark.parametrize(
    "case",
    [
        "a layer is missing",
        "no layers",
        "deeper",
        "bottlenecks",
        "small stem",
        "another model",
        "whole module",
        "list",
    ],
)
def test_only_the_whole_network_in_the_file_is_evaluated(case, tmp_path):
    content, message = other_network(case)
    with pytest.raises(SystemExit, match=rf"c.pt {message}"):
        read_saved(content, tmp_path)


def test_a_missing_checkpoint_ends_the_run_with_its_name(tmp_path):
    args = linear_eval.parse(["--checkpoint", str(tmp_path / "missing.pt")])
    with pytest.raises(SystemExit, match=r"missing.pt cannot be read"):
        linear_eval.read_backbone(args)


def test_a_missing_default_run_ends_the_run_with_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="runs/shapes/checkpoint.pt cannot be read"):
        linear_eval.main([])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "name, bad", [("layer2.1.conv2.weight", math.nan), ("bn1.running_var", math.inf)]
)
def test_weights_that_are_not_finite_are_not_evaluated(name, bad, tmp_path):
    network = random_resnet18(0)
    network.state_dict()[name].view(-1)[7] = bad
    with pytest.raises(SystemExit, match=rf"c.pt: model.{name} is not finite: .* has diverged"):
        read_saved({"model": network.state_dict()}, tmp_path)


def test_tensors_that_are_not_used_may_be_anything(tmp_path):
    network = random_resnet18(0)
    content = {**network.state_dict(), "fc.weight": torch.full((10, 512), math.nan)}
    backbone, _, _ = read_saved(content, tmp_path)
    assert_same_features(backbone, network)


# --- The protocols --------------------------------------------------------------------------------


def overlapping_classes():
    """Features of 5 classes that no classifier separates, for training and for validation."""
    centers = randn(5, 20, seed=3)
    labels = torch.arange(3000) % 5
    x = (centers[labels] + 1.5 * randn(3000, 20)).float()
    return x[:2000], labels[:2000], x[2000:], labels[2000:]


def logistic_regression(x, y, x_val, y_val):
    """Top-1 in percent, by L-BFGS in float64, with the weight decay of the protocol."""
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
    return 100 * (logits(x_val).argmax(1) == y_val).double().mean().item()


def test_linear_probes_are_as_good_as_logistic_regression():
    data = overlapping_classes()
    expected = logistic_regression(*data)
    assert 60 < expected < 95
    first, second = linear_eval.train_linear_probe(*data, lrs=[0.01, 0.1], epochs=500, seed=0)
    assert abs(first[0] - expected) <= 1
    assert abs(second[0] - expected) <= 1
    assert first[1] == 100  # among five classes the label is always in the top 5


def test_a_logit_that_is_not_a_number_is_not_the_largest():
    logits = torch.tensor([[[0.0, math.nan, 1.0, -1.0]]])  # (1, 1, 4)
    for label, count in enumerate([0, 0, 1, 0]):
        assert linear_eval.count_correct(logits, torch.tensor([label]))[0, 0] == count


def evaluate(finished, photos, folder, flags):
    """Evaluates the tiny run in this process; returns the tensors of its backbone afterwards."""
    read_backbone = linear_eval.read_backbone
    backbones = []

    def remember_backbone(args):
        found = read_backbone(args)
        backbones.append(found[0])
        return found

    arguments = f"--checkpoint {finished[0]}/checkpoint.pt --data {photos} --output {folder}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_eval, "read_backbone", remember_backbone)
        linear_eval.main(f"{arguments} --workers 0 --batch-size 16 {flags}".split())
    return backbones[0].state_dict()


@pytest.fixture(scope="module")
def all_protocols(finished, photos, tmp_path_factory):
    """All protocols on the tiny run: the output folder, the backbone's tensors after those that
    freeze it, those after fine-tuning, and the learning rates of fine-tuning's steps."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("evaluated")
    frozen = evaluate(finished, photos, folder, "--epochs 2 --protocol linear features knn")

    lrs = []
    step = torch.optim.SGD.step

    def remember_lrs(self, *args):
        lrs.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", remember_lrs)
        tuned = evaluate(finished, photos, folder, "--epochs 2 --protocol finetune")
    return folder, frozen, tuned, lrs


def test_linear_features_and_knn_do_not_change_the_backbone(all_protocols, finished):
    _, frozen, _, _ = all_protocols
    weights = load(finished[0] / "backbone.pt")
    for name, value in weights.items():
        assert torch.equal(frozen[name], value), name


def test_finetuning_changes_all_weights_and_batch_norm_statistics(all_protocols, finished):
    _, _, tuned, _ = all_protocols
    weights = load(finished[0] / "backbone.pt")
    for name, value in weights.items():
        assert not torch.equal(tuned[name], value), name


def test_finetuning_has_the_published_constant_learning_rates(all_protocols):
    _, _, _, lrs = all_protocols
    assert lrs == [pytest.approx([0.2 * 16 / 256, 0.006 * 16 / 256])] * 6


def test_finetuning_normalizes_by_the_share_of_each_process():
    source = Path(linear_eval.__file__).read_text()
    assert "SyncBatchNorm" not in source
    assert "convert_batch_norm" not in source
    assert "GlobalBatchNorm" not in source


def test_results_have_a_line_for_each_protocol(all_protocols):
    folder, _, _, _ = all_protocols
    rows = lines_of(folder / "results.jsonl")
    assert [row["protocol"] for row in rows] == ["features", "knn", "linear", "finetune"]
    for row in rows:
        assert row["images"] == [48, 15]


def test_results_name_the_settings_of_their_protocol(all_protocols):
    folder, _, _, _ = all_protocols
    common = "protocol epochs rates checkpoint random precision weights arch stem dataset size seed"
    results = "results images date seconds"
    sgd = "batch_size weight_decay"
    expected = [
        f"{common} {results}",
        f"{common} {results}",
        f"{common} {sgd} labelled {results}",
        f"{common} {sgd} encoder_lr schedule percent labels_file labelled {results}",
    ]
    assert [" ".join(row) for row in lines_of(folder / "results.jsonl")] == expected


def test_results_are_percentages_by_name(all_protocols):
    folder, _, _, _ = all_protocols
    features, knn, linear, finetune = (row["results"] for row in lines_of(folder / "results.jsonl"))
    assert list(features) == [f"learning rate {lr}" for lr in (0.01, 0.001, 0.1)]
    assert list(knn) == ["5 nearest, Euclidean", "10 nearest, cosine", "20 nearest, cosine"]
    assert list(linear) == [f"learning rate {lr}" for lr in (0.2, 0.4, 0.02, 0.1, 1, 5, 30)]
    assert list(finetune) == ["learning rate 0.2"]
    for top1, top5 in [*features.values(), *linear.values(), *finetune.values()]:
        assert 0 <= top1 <= top5 == 100  # of three classes


def test_evaluation_leaves_the_checkpoint_as_it_is(all_protocols, finished):
    _, frozen, _, _ = all_protocols
    saved = load(finished[0] / "checkpoint.pt")["network"]
    for name, value in frozen.items():
        assert torch.equal(saved[f"backbone.{name}"], value)


def test_a_frozen_backbone_that_changes_is_an_error_with_its_name(
    finished, photos, tmp_path, monkeypatch
):
    run_knn = linear_eval.run_knn
    backbones = []
    extract_features = linear_eval.extract_features

    def remember_backbone(backbone, *rest):
        backbones.append(backbone)
        return extract_features(backbone, *rest)

    def change_backbone(features):
        backbones[0].layer1[0].bn1.running_mean.add_(1)
        return run_knn(features)

    monkeypatch.setattr(linear_eval, "extract_features", remember_backbone)
    monkeypatch.setattr(linear_eval, "run_knn", change_backbone)
    with pytest.raises(RuntimeError, match="knn changed layer1.0.bn1.running_mean"):
        evaluate(finished, photos, tmp_path, "--protocol knn")


@pytest.fixture(scope="module")
def overflowing(finished, tmp_path_factory):
    """A checkpoint with finite weights whose features are infinite."""
    path = tmp_path_factory.mktemp("overflowing") / "backbone.pt"
    weights = load(finished[0] / "backbone.pt")
    weights["layer4.1.bn2.weight"].fill_(3e38)
    torch.save(weights, path)
    return path


@pytest.mark.parametrize(
    "protocol, message",
    [
        ("knn", "not finite"),
        ("features", "not finite"),
        ("linear", "linear: the loss is not finite at step 1.*diverged"),
        ("finetune", "finetune: the loss is not finite at step 1.*diverged"),
    ],
)
def test_features_that_are_not_finite_end_every_protocol(
    protocol, message, overflowing, photos, tmp_path
):
    flags = f"--checkpoint {overflowing} --arch resnet18 --stem small --size 16 --data {photos}"
    flags += f" --batch-size 16 --workers 0 --log-every 1 --output {tmp_path} --protocol {protocol}"
    if protocol == "finetune":  # BN in training mode does not see the scale of its input
        flags += " --encoder-lr 1e30 --epochs 5"
        message = r"finetune: the loss is not finite at step \d+"
    with pytest.raises(SystemExit, match=message):
        linear_eval.main(flags.split())
    assert not (tmp_path / "results.jsonl").exists()


def test_one_diverged_classifier_does_not_end_the_others(finished, photos, tmp_path):
    flags = "--protocol linear --epochs 4 --log-every 1 --lr 0.1 1e38"
    evaluate(finished, photos, tmp_path, flags)
    (row,) = lines_of(tmp_path / "results.jsonl")
    assert row["results"]["learning rate 0.1"][0] > 0


def test_classifiers_do_not_influence_each_other_and_resume(
    finished, photos, tmp_path, monkeypatch
):
    """A classifier trained beside another one, in a run that was interrupted and resumed, is
    bitwise the one that is trained by itself without interruption."""
    validate = linear_eval.validate
    save_checkpoint = linear_eval.save_checkpoint
    weights = []

    def remember_last_head(model, *rest):
        weights.append(model.heads[-1].weight.detach().clone())
        return validate(model, *rest)

    def stop_in_the_second_epoch(state, path):
        save_checkpoint(state, path)
        if state["step"] == 5:
            raise KeyboardInterrupt

    def run_linear(name, lrs):
        flags = f"--epochs 3 --lr {lrs} --protocol linear --save-minutes 0 --log-every 1"
        evaluate(finished, photos, tmp_path / name, flags)

    monkeypatch.setattr(linear_eval, "validate", remember_last_head)
    run_linear("one", "1")
    with monkeypatch.context() as patch:
        patch.setattr(linear_eval, "save_checkpoint", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            run_linear("two", "0.1 1")
    assert (tmp_path / "two" / "linear.pt").exists()
    run_linear("two", "0.1 1")

    assert len(weights) == 2
    assert torch.equal(*weights)
    assert not (tmp_path / "two" / "linear.pt").exists()


# --- The images with labels -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos_to_label(photos):
    train_set, _ = train.load_data("folder", photos, 0)
    return train_set


@pytest.mark.parametrize("percent, images_per_class", [(1, 1), (10, 2), (100, 16)])
def test_a_percentage_of_labels_is_of_every_class(percent, images_per_class, photos_to_label):
    rows = linear_eval.select_labelled_subset(photos_to_label, percent, None, seed=0)
    assert photos_to_label.targets[rows].bincount().tolist() == [images_per_class] * 3


def test_the_labelled_images_depend_on_the_seed(photos_to_label):
    first, again, other = (
        linear_eval.select_labelled_subset(photos_to_label, 10, None, seed).tolist()
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.fixture(scope="module")
def twin_names(tmp_path_factory):
    """Images of which two have the same name, and one has a name with spaces."""
    root = tmp_path_factory.mktemp("twins")
    for name in ("a/000.png", "a/001.png", "a/a b  c.png", "b/000.png", "b/002.png", "b/x/3.png"):
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(torch.zeros(3, 8, 8)).save(path)
    shutil.copytree(root / "train", root / "val")
    train_set, _ = train.load_data("folder", root, 0)
    return train_set


def listed(train_set, text, folder):
    """The images that a list selects, as paths relative to train/."""
    path = folder / "list.txt"
    path.write_bytes(text.encode())
    rows = linear_eval.select_labelled_subset(train_set, 100, str(path), 0)
    root = Path(train_set.root)
    return [Path(train_set.samples[i][0]).relative_to(root).as_posix() for i in rows.tolist()]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("b/000.png\n", ["b/000.png"]),
        ("a/000.png\nb/000.png\n", ["a/000.png", "b/000.png"]),
        ("002.png\n001.png", ["a/001.png", "b/002.png"]),
        ("a b  c.png\n", ["a/a b  c.png"]),
        ("a/a b  c.png\n", ["a/a b  c.png"]),
        ("b/x/3.png\n", ["b/x/3.png"]),
        ("\n001.png\n\n  \n002.png\n\n", ["a/001.png", "b/002.png"]),
        ("001.png\r\n002.png\r\n", ["a/001.png", "b/002.png"]),
        ("\ufeff001.png\n", ["a/001.png"]),
        ("001.png\na/001.png\n001.png\n", ["a/001.png"]),
    ],
    ids=[
        "path",
        "paths of the same name",
        "unique names",
        "name with spaces",
        "path with spaces",
        "folder within a class",
        "blank lines",
        "Windows line ends",
        "byte order mark",
        "repeated: counts once",
    ],
)
def test_a_list_of_labelled_images_selects(text, expected, twin_names, tmp_path):
    assert listed(twin_names, text, tmp_path) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "001.png\n\n000.png\n",
            "line 3: '000.png' is the name of 2 images.*'a/000.png' or 'b/000",
        ),
        ("001.png\nno such.png\n", "line 2: .*train/ contains no image 'no such.png'"),
        ("a/002.png\n", "line 1: .*train/ contains no image 'a/002.png'"),
        ("001.png 002.png\n", "line 1: .*train/ contains no image '001.png 002.png'"),
        ("", "lists no images"),
        ("\n \n", "lists no images"),
    ],
    ids=["ambiguous", "unknown", "of another class", "two in a line", "empty", "only blank lines"],
)
def test_a_list_of_labelled_images_refuses(text, message, twin_names, tmp_path):
    with pytest.raises(SystemExit, match=f"list.txt.*{message}"):
        listed(twin_names, text, tmp_path)


def test_a_list_that_is_no_text_is_refused_with_its_name(twin_names, tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\x80\x02\xff\n")
    with pytest.raises(SystemExit, match="list.txt, line 1"):
        linear_eval.select_labelled_subset(twin_names, 100, str(path), 0)


def test_a_list_needs_image_files(tmp_path):
    images = train.draw_shapes(0, 0, 16)
    with pytest.raises(SystemExit, match="--labels-file list.txt: --data contains no image files"):
        linear_eval.select_labelled_subset(images, 100, "list.txt", 0)


def test_finetuning_uses_only_the_listed_images(finished, photos, tmp_path, monkeypatch):
    names = [f"class {label}/{i}.png" for label in range(3) for i in range(8)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    batch_indices = linear_eval.batch_indices
    selected = []

    def remember_rows(rows, *rest):
        selected.extend(rows.tolist())
        return batch_indices(rows, *rest)

    monkeypatch.setattr(linear_eval, "batch_indices", remember_rows)
    flags = f"--protocol finetune --epochs 1 --labels-file {tmp_path}/list.txt"
    evaluate(finished, photos, tmp_path, flags)
    train_set, _ = train.load_data("folder", photos, 0)
    paths = [Path(train_set.samples[i][0]) for i in selected]
    assert sorted(f"{path.parent.name}/{path.name}" for path in paths) == sorted(names)
    (row,) = lines_of(tmp_path / "results.jsonl")
    assert row["labelled"] == 24


# --- Faults are found before the work begins ------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if an evaluation begins."""

    def refuse(*args):
        raise AssertionError("the evaluation has begun")

    monkeypatch.setattr(linear_eval, "extract_features", refuse)
    monkeypatch.setattr(linear_eval, "make_loader", refuse)


ALL = "--protocol features knn linear finetune"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--arch resnet19", "argument --arch: invalid choice: 'resnet19'"),
        ("--percent 0", "--percent 0 leaves no labels"),
        ("--percent 101", "argument --percent: 101 is not between 0 and 100"),
        (
            "--percent 1 --labels-file x.txt",
            "argument --labels-file: not allowed with .* --percent",
        ),
        ("--protocol finetune --lr 0.1 0.2", "--protocol finetune takes one --lr"),
        ("--protocol finetune --precision float16", "finetune does not train in float16"),
    ],
)
def test_wrong_flags_of_linear_eval_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        linear_eval.parse(flags.split())
    assert re.search(message, capsys.readouterr().err)


def test_a_batch_that_cannot_be_shared_among_the_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(linear_eval, "WORLD", 3)
    linear_eval.parse(["--protocol", "features", "knn"])  # they do not use --batch-size
    with pytest.raises(SystemExit):
        linear_eval.parse(["--protocol", "linear"])
    assert "--batch-size 256 is not a multiple of 3 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--batch-size 49", "linear: 48 training images .*--batch-size 49"),
        ("--percent 10", "finetune: 6 training images .*--batch-size 16"),
        ("--labels-file nowhere.txt", "nowhere.txt"),
    ],
)
def test_labels_that_do_not_suffice_are_found_before_the_work(
    flags, message, finished, photos, tmp_path, no_work
):
    output_dir = tmp_path / "out"
    with pytest.raises((SystemExit, FileNotFoundError), match=message):
        evaluate(finished, photos, output_dir, f"{ALL} {flags}")
    assert not output_dir.exists()


def test_images_without_validation_are_refused(finished, photos, tmp_path, no_work):
    shutil.copytree(photos / "train", tmp_path / "data" / "train")
    with pytest.raises(SystemExit, match="--data .*/data needs train/ and val/"):
        evaluate(finished, tmp_path / "data", tmp_path / "out", ALL)


@pytest.mark.parametrize("flags", [ALL, "--protocol linear"])
def test_a_folder_in_use_is_refused_before_the_work(flags, finished, photos, tmp_path, no_work):
    output_dir = tmp_path / "out"
    with (
        train.lock_output_dir(output_dir, ".linear_eval.lock"),
        pytest.raises(SystemExit, match=str(output_dir)),
    ):
        evaluate(finished, photos, output_dir, flags)
    assert not (output_dir / "results.jsonl").exists()


def test_a_folder_is_free_again_after_an_evaluation(finished, photos, tmp_path):
    for _ in range(2):
        evaluate(finished, photos, tmp_path, "--protocol knn")
    assert len(lines_of(tmp_path / "results.jsonl")) == 2


def test_a_run_may_be_evaluated_while_it_trains(finished, photos, tmp_path):
    with train.lock_output_dir(tmp_path):
        evaluate(finished, photos, tmp_path, "--protocol knn")
    assert (tmp_path / "results.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    finished, photos, tmp_path, no_work
):
    (tmp_path / "file").touch()
    with pytest.raises((SystemExit, OSError), match=r"file/out"):
        evaluate(finished, photos, tmp_path / "file" / "out", ALL)


# --- Several processes ----------------------------------------------------------------------------


def write_images(folder, counts):
    """Images of 8 x 8 pixels, in three classes that differ in the color which is often brighter."""
    for split, n in counts.items():
        for i in range(n):
            path = folder / split / f"class {i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = torch.randint(0, 100, (3, 8, 8), generator=generator(i)).to(torch.uint8)
            is_brighter = torch.rand(1, generator=generator(i)) < 0.8
            image[i % 3] += 100 * is_brighter.byte()
            TF.to_pil_image(image).save(path)


EIGHT_PIXELS = "--random --arch resnet18 --stem cifar --size 8 --lr 5 --workers 0 --batch-size 12"


@pytest.fixture(scope="module")
def results_by_processes(tmp_path_factory):
    """Of 60 training and 1001 validation images: [features, knn, linear] for 1, 2, 3 processes."""
    folder = tmp_path_factory.mktemp("counted")
    write_images(folder, {"train": 60, "val": 1001})
    flags = f"{EIGHT_PIXELS} --data {folder} --protocol features knn linear --epochs 6"
    results = {}
    for processes in (1, 2, 3):
        output_dir = folder / f"{processes} processes"
        launched = 0 if processes == 1 else processes
        arguments = [*flags.split(), "--output", output_dir]
        run("linear_eval.py", *arguments, processes=launched)
        rows = lines_of(output_dir / "results.jsonl")
        results[processes] = [row["results"] for row in rows]
    return results


@pytest.mark.parametrize("processes", [2, 3])
def test_results_do_not_depend_on_the_number_of_processes(processes, results_by_processes):
    assert results_by_processes[processes] == results_by_processes[1]


def test_every_validation_image_counts_once(results_by_processes):
    _, _, linear = results_by_processes[3]
    count = linear["learning rate 5"][0] * 1001 / 100
    assert count == pytest.approx(round(count), abs=1e-3)
    assert count > 800


@needs_proc
def test_fewer_images_than_processes_end_the_run_in_a_line_and_leave_no_process(tmp_path):
    write_images(tmp_path, {"train": 60, "val": 3})
    shutil.rmtree(tmp_path / "train" / "class 2")
    shutil.rmtree(tmp_path / "val" / "class 2")
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 3"
    command += f" {HERE}/linear_eval.py {EIGHT_PIXELS} --data {tmp_path} --output {tmp_path}/out"
    with no_process_left_behind() as environment:
        mark = next(name for name in environment if name.startswith("INTL_TEST_"))
        done = subprocess.run(
            command.split(), capture_output=True, text=True, timeout=120, env=environment
        )
        left = marked_processes(mark)
    assert done.returncode != 0
    assert "3 processes are too many for 40 training and 2 validation images" in done.stderr
    assert left == []
    assert not (tmp_path / "out").exists()


# --- Detection -----------------------------------------------------------------------------------

SMALL = """
    --short-sides 64 --test-short-side 64 --long-side 128 --train-proposals 50 10 --rois 8
    --test-proposals 50 5 --detections 5 --images 8 --batch-size 2 --warmup-images 2
    --log-every 1 --workers 0 --save-minutes 0
"""
MODELS = {"c4": "", "fpn": FPN}
both_models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Six training images with 1, 2, 3, 4, 1 and 2 shapes, and eleven validation images."""
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("scenes")
    detect_transfer.write_shapes(folder, 0, {"train": 6, "val": 11})
    return folder


def detecting(finished, data, folder, flags=""):
    """Arguments of a small run on the backbone of the tiny run: 4 steps of 2 images."""
    pytest.importorskip("pycocotools")
    checkpoint = finished[0] / "checkpoint.pt"
    paths = ["--checkpoint", checkpoint, "--data", data, "--output", folder]
    return [*SMALL.split(), *map(str, paths), *flags.split()]


# The detector.


def detector(finished, flags=""):
    """A detector of 3 classes on the backbone of the tiny run, and the backbone's tensors."""
    args = detect_transfer.parse(detecting(finished, ".", ".", flags))
    options = {}
    if args.norm == "frozen":
        options["norm_layer"] = detect_transfer.FrozenBatchNorm2d
    resnet, width, config = linear_eval.read_backbone(args, **options)
    state = {k: v.clone() for k, v in resnet.state_dict().items()}
    torch.manual_seed(0)
    return detect_transfer.build_detector(args, resnet, width, config, 4, True), state


def backbone_state(network):
    """The tensors of a detector's backbone, by the names that they have in a ResNet."""
    if hasattr(network.backbone, "body"):  # fpn
        return dict(network.backbone.body.state_dict())
    state = dict(network.backbone.state_dict())
    for name, value in network.roi_heads.box_head[0].state_dict().items():  # res5
        state[f"layer4.{name}"] = value
    return state


def example():
    """An image and its target."""
    image = torch.rand(3, 70, 90, generator=generator(0))
    masks = torch.zeros(2, 70, 90, dtype=torch.uint8)
    masks[0, 10:40, 10:50] = 1
    masks[1, 30:60, 40:80] = 1
    boxes = torch.tensor([[10.0, 10, 50, 40], [40, 30, 80, 60]])
    return image, {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}


@both_models
def test_the_detector_starts_with_the_weights_of_the_backbone(model, finished):
    network, expected = detector(finished, model)
    state = backbone_state(network)
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("norm", ["bn", "frozen"])
@both_models
def test_training_changes_everything_but_frozen_norms(model, norm, finished):
    network, before = detector(finished, f"{model} --norm {norm}")
    image, target = example()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01)
    losses = network.train()([image], [target])
    (losses["loss_classifier"] + losses["loss_mask"]).backward()
    optimizer.step()
    for name, value in backbone_state(network).items():
        is_frozen = norm == "frozen" and re.search(r"bn|downsample.1", name) is not None
        assert torch.equal(value, before[name]) == is_frozen, name


@pytest.fixture(scope="module")
def c4_evaluation(finished):
    """What the parts of a C4 detector received and returned for an image, and the same image's
    features from torchvision's ResNet."""
    network, state = detector(finished)
    heads = network.eval().roi_heads
    for parameter in heads.box_predictor.parameters():
        parameter.data *= 1e-3  # otherwise an untrained network moves its boxes out of the image
    calls = {name: [] for name in ("box_predictor", "mask_predictor", "box_roi_pool")}
    for name, recorded in calls.items():

        def record(module, inputs, output, recorded=recorded):
            recorded.append((inputs, output))

        getattr(heads, name).register_forward_hook(record)

    x = randf(1, 3, 64, 96)
    with torch.no_grad():
        network([x[0]])
        resnet = torchvision.models.resnet18().eval()
        resnet.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        resnet.load_state_dict(state, strict=False)
        features = TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        for module in list(resnet.children())[:7]:  # to layer3, which is res4
            features = module(features)
    return heads, calls, features, resnet.layer4


def res5_by_hand(features, boxes, layer4):
    regions = torchvision.ops.roi_align(features, boxes, 14, 1 / 16, 0, aligned=True)
    return layer4(regions) / (1 + 1e-5) ** 0.5  # the extra BN, untrained


@torch.no_grad()
def test_c4_boxes_equal_an_independent_computation(c4_evaluation):
    heads, calls, features, layer4 = c4_evaluation
    (_, boxes, _), _ = calls["box_roi_pool"][0]
    pooled = res5_by_hand(features, boxes, layer4).mean((2, 3))
    _, (logits, deltas) = calls["box_predictor"][0]
    predictor = heads.box_predictor[1]
    for layer, got in [(predictor.cls_score, logits), (predictor.bbox_pred, deltas)]:
        assert_close(got, pooled @ layer.weight.T + layer.bias, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_c4_masks_equal_an_independent_computation(c4_evaluation):
    heads, calls, features, layer4 = c4_evaluation
    (_, boxes, _), _ = calls["box_roi_pool"][1]
    shared = res5_by_hand(features, boxes, layer4)
    up = heads.mask_predictor.conv5_mask
    last = heads.mask_predictor.mask_fcn_logits
    up = F.conv_transpose2d(shared, up.weight, up.bias, stride=2).relu()
    expected = F.conv2d(up, last.weight, last.bias)
    _, got = calls["mask_predictor"][0]
    assert len(got) > 0
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", train.STEMS)
def test_c4_regions_are_pooled_at_the_stride_of_the_features(stem):
    pytest.importorskip("pycocotools")
    args = detect_transfer.parse(["--norm", "frozen"])
    resnet, width = train.build_backbone("resnet18", stem)
    network = detect_transfer.build_detector(args, resnet, width, {"stem": stem}, 2, False)
    features = network.backbone(torch.zeros(1, 3, 64, 64))["0"]
    scale = features.shape[-1] / 64
    assert network.roi_heads.box_roi_pool.spatial_scale == pytest.approx(scale, rel=0.1)


@pytest.fixture
def c4_training(finished):
    """The heads of a C4 detector without BN in res5, which would see different regions in the two
    computations that are compared, and their arguments for an image."""
    network, _ = detector(finished)
    heads = network.roi_heads
    heads.box_head[1] = nn.Identity()
    heads.box_head.eval()
    image, target = example()
    features = network.backbone(image[None])
    others = torch.tensor([[0.0, 0, 30, 30], [50, 5, 90, 30]])
    proposals = [torch.cat([target["boxes"] + 2, others])]
    return heads, (features, proposals, [(70, 90)], [target])


def test_c4_training_runs_res5_once(c4_training):
    heads, arguments = c4_training
    calls = []
    heads.box_head.register_forward_hook(lambda *_: calls.append(1))
    heads(*arguments)
    assert len(calls) == 1


def test_c4_training_has_the_published_losses(c4_training, monkeypatch):
    """Against torchvision's heads, with L1 in the place of smooth L1, and aligned mask targets."""
    heads, arguments = c4_training
    torch.manual_seed(1)
    _, losses = heads(*arguments)

    def l1_loss(a, b, beta, reduction):
        return F.l1_loss(a, b, reduction=reduction)

    def crop(masks, boxes, objects, size):
        return detect_transfer.crop_masks(masks[objects].clone(), boxes, size)

    roi_heads = torchvision.models.detection.roi_heads
    monkeypatch.setattr(roi_heads.F, "smooth_l1_loss", l1_loss)
    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", crop)
    torch.manual_seed(1)
    _, expected = roi_heads.RoIHeads.forward(heads, *arguments)
    assert set(expected) == {"loss_classifier", "loss_box_reg", "loss_mask"}
    assert_close(losses, expected)


def test_proposals_have_the_published_loss(finished):
    network, _ = detector(finished)
    labels = torch.tensor([1.0, 0, -1, 1, 0])
    targets = randf(5, 4)
    objectness = randf(5, 1, seed=1)
    deltas = randf(5, 4, seed=2)
    losses = network.rpn.compute_loss(objectness, deltas, [labels], [targets])

    used = [0, 1, 3, 4]
    positive = [0, 3]
    object_loss = F.binary_cross_entropy_with_logits(objectness[used, 0], labels[used])
    box_loss = (deltas - targets)[positive].abs().sum() / len(used)
    assert_close(losses, (object_loss, box_loss))


# AP.


def unchanged(target):
    return target


def measured_ap(data, folder, change=unchanged):
    """The AP of a data set's own objects, changed, as if a network had detected them."""
    loader = [data[0, i] for i in range(len(data))]
    detections = []
    for _, target in loader:
        detections.append(change({**target, "scores": torch.ones(len(target["labels"]))}))
    model = nn.Identity()
    model.forward = lambda images: [detections.pop(0)]
    model.transform = argparse.Namespace(min_size=(64,))
    results = detect_transfer.predict(model, data, loader, 64, CPU)
    return detect_transfer.average_precision(data, results, folder)


def cropped_and_pasted(target, shift):
    """The masks as a network predicts them, of 28 x 28 pixels, in boxes moved by `shift` pixels."""
    crops = detect_transfer.crop_masks(target["masks"], target["boxes"], 28)
    size = target["masks"].shape[1:]
    masks = detect_transfer.paste_masks(crops[:, None], target["boxes"] + shift, *size)
    return {**target, "masks": masks}


@pytest.mark.parametrize("name", ["box AP", "box AP50", "mask AP", "mask AP50"])
def test_ground_truth_has_an_ap_of_100(name, scenes, tmp_path):
    assert measured_ap(coco(scenes), tmp_path)[name] == pytest.approx(100)


def test_no_detection_has_an_ap_of_0(scenes, tmp_path):
    assert detect_transfer.average_precision(coco(scenes), [], tmp_path)["box AP"] == 0


def test_cropped_and_pasted_masks_lose_little(scenes, tmp_path):
    exact = functools.partial(cropped_and_pasted, shift=0)
    assert measured_ap(coco(scenes), tmp_path, exact)["mask AP"] > 93


def test_masks_displaced_by_less_than_a_pixel_lose_5_ap(scenes, tmp_path):
    exact = functools.partial(cropped_and_pasted, shift=0)
    displaced = functools.partial(cropped_and_pasted, shift=0.7)
    mask_ap = measured_ap(coco(scenes), tmp_path, exact)["mask AP"]
    assert measured_ap(coco(scenes), tmp_path, displaced)["mask AP"] < mask_ap - 5


# Runs.


@pytest.fixture(scope="module")
def evaluated(finished, scenes, tmp_path_factory):
    """The folders of the same evaluation by one and by two processes."""
    folders = []
    for processes in (0, 2):
        folder = tmp_path_factory.mktemp("evaluated")
        flags = "--base-lr 0 --norm frozen --evaluations 1 --max-steps 1"
        arguments = detecting(finished, scenes, folder, flags)
        run("detect_transfer.py", *arguments, processes=processes)
        folders.append(folder)
    return folders


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_detections_do_not_depend_on_the_number_of_processes(kind, evaluated):
    one, two = [json.loads((folder / f"results_{kind}.json").read_text()) for folder in evaluated]
    assert len(one) > 11
    assert two == one


def test_an_evaluation_draws_its_detections(evaluated):
    assert (evaluated[0] / "predictions.png").stat().st_size > 10_000


# In this setting the means over the anchors, regions and masks of each process have equal weights:
# of each image 256 anchors, 4 regions and 1 mask are trained.
EQUAL_WEIGHTS = "--short-sides 128 --rois 4 --batch-size 4 --images 12 --evaluations 1"


def take_the_first(sampler, labels):
    """Instead of torchvision's random choice, which differs between processes."""
    chosen_positive = []
    chosen_negative = []
    for image_labels in labels:
        positive = (image_labels >= 1).nonzero()[:, 0]
        negative = (image_labels == 0).nonzero()[:, 0]
        positive = positive[: int(sampler.batch_size_per_image * sampler.positive_fraction)]
        negative = negative[: sampler.batch_size_per_image - len(positive)]
        assert len(positive) + len(negative) == sampler.batch_size_per_image
        for chosen, rows in [(chosen_positive, positive), (chosen_negative, negative)]:
            chosen.append(torch.zeros(len(image_labels), dtype=torch.uint8))
            chosen[-1][rows] = 1
    return chosen_positive, chosen_negative


def detect_in_float64(folder, *arguments):
    """One model after another. Each needs new addresses in torchrun's store, as after a restart."""
    sampler = torchvision.models.detection._utils.BalancedPositiveNegativeSampler
    sampler.__call__ = take_the_first
    detect_transfer.predict = lambda *_: []
    with float64_by_default():
        for i, (name, flags) in enumerate(MODELS.items()):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)
            detect_transfer.main([*arguments, "--output", f"{folder}/{name}", *flags.split()])


@pytest.fixture(scope="module")
def detected_in_float64(finished, scenes, tmp_path_factory):
    """The folders of the same three steps of both models by one and by two processes."""
    folders = []
    for processes in (0, 2):
        folder = tmp_path_factory.mktemp("detected")
        arguments = detecting(finished, scenes, folder, EQUAL_WEIGHTS)
        run("test_intl.py", "detect_in_float64", folder, *arguments, processes=processes)
        folders.append(folder)
    return folders


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_fine_tune_what_one_fine_tunes(model, detected_in_float64):
    """Weights and BN statistics after three steps, where the random choice of anchors and regions
    is replaced by a fixed one, and all images have the same size: padding depends on the share."""
    one, two = [load(f / model / "checkpoint.pt")["model"] for f in detected_in_float64]
    for name, expected in one.items():
        error = (two[name] - expected).double().norm() / expected.double().norm().clamp_min(1e-12)
        assert error < 1e-9, name


@pytest.mark.parametrize("loss", "loss classifier box_reg mask objectness rpn_box_reg".split())
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_log_the_losses_of_one(model, loss, detected_in_float64):
    one, two = [[line[loss] for line in logged_steps_of(f / model)] for f in detected_in_float64]
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-4)


def save_evaluated_buffers(folder, *arguments):
    def save_buffers(model, *_):
        torch.save(dict(model.named_buffers()), f"{folder}/{train.RANK}.pt")
        return []

    detect_transfer.predict = save_buffers
    detect_transfer.main(arguments)


def test_every_process_evaluates_the_batch_norm_of_rank_0(finished, scenes, tmp_path):
    """--norm bn: each process has statistics of its own share."""
    arguments = detecting(finished, scenes, tmp_path, "--norm bn --max-steps 1")
    run("test_intl.py", "save_evaluated_buffers", tmp_path, *arguments, processes=2)
    saved = load(tmp_path / "checkpoint.pt")["model"]
    for rank in (0, 1):
        for name, value in load(tmp_path / f"{rank}.pt").items():
            assert torch.equal(value, saved[name]), (rank, name)


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def stopped_and_resumed(request, finished, scenes, tmp_path_factory):
    """The flags of a run, the folder of an undisturbed run, and of one that was stopped."""
    folder = tmp_path_factory.mktemp("detection")
    flags = request.param
    detect_transfer.main(detecting(finished, scenes, folder / "whole", flags))
    detect_transfer.main(detecting(finished, scenes, folder / "halves", f"{flags} --max-steps 2"))
    detect_transfer.main(detecting(finished, scenes, folder / "halves", flags))
    return flags, folder / "whole", folder / "halves"


def test_a_stopped_detection_run_ends_bitwise_like_an_undisturbed_one(stopped_and_resumed):
    _, whole, halves = stopped_and_resumed
    weights = load(halves / "checkpoint.pt")["model"]
    for name, expected in load(whole / "checkpoint.pt")["model"].items():
        assert torch.equal(weights[name], expected), name


def test_a_resumed_detection_run_logs_every_step_once(stopped_and_resumed):
    _, _, halves = stopped_and_resumed
    assert steps_of(halves) == [1, 2, 3, 4]


def test_a_detection_run_with_other_settings_is_refused(stopped_and_resumed, finished, scenes):
    flags, _, halves = stopped_and_resumed
    with pytest.raises(SystemExit, match="base_lr was 0.08, is now 0.5"):
        detect_transfer.main(detecting(finished, scenes, halves, f"{flags} --base-lr 0.5"))


def test_detection_evaluates_evenly_over_the_schedule(finished, scenes, tmp_path, monkeypatch):
    """7 steps, 3 evaluations: at the ends of the thirds, 7/3, 14/3 and 7, rounded up."""
    monkeypatch.setattr(detect_transfer, "predict", lambda *_: [])
    detect_transfer.main(detecting(finished, scenes, tmp_path, "--images 14 --evaluations 3"))
    lines = lines_of(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines if "box AP" in line] == [3, 5, 7]


def test_detection_does_not_share_an_output_folder(finished, scenes, tmp_path):
    with (
        train.lock_output_dir(tmp_path),
        pytest.raises(SystemExit, match=re.escape(str(tmp_path))),
    ):
        detect_transfer.main(detecting(finished, scenes, tmp_path))
    assert not (tmp_path / "log.jsonl").exists()


def test_detection_refuses_a_folder_of_another_run_before_its_first_checkpoint(
    finished, scenes, tmp_path
):
    recorded = json.dumps({"base_lr": 7})
    (tmp_path / "config.json").write_text(recorded)
    with pytest.raises(SystemExit, match="config.json .*base_lr was 7, is now 0.08"):
        detect_transfer.main(detecting(finished, scenes, tmp_path))
    assert (tmp_path / "config.json").read_text() == recorded


@both_models
def test_a_diverged_detection_run_stops_and_keeps_its_checkpoint(model, finished, scenes, tmp_path):
    flags = f"{model} --base-lr 1e30 --warmup-images 2e30"
    with pytest.raises(SystemExit, match=r"not finite at step \d.*--base-lr"):
        detect_transfer.main(detecting(finished, scenes, tmp_path, flags))


def test_weights_that_are_not_finite_are_not_evaluated_and_not_saved(
    finished, scenes, tmp_path, monkeypatch
):
    """The loss of a step is that of the weights before it."""
    step = torch.optim.SGD.step

    def overflow(self, *arguments, **options):
        step(self, *arguments, **options)
        self.param_groups[0]["params"][3].data.mul_(torch.inf)

    monkeypatch.setattr(torch.optim.SGD, "step", overflow)
    with pytest.raises(SystemExit, match=r"the weights are not finite at step 1"):
        detect_transfer.main(detecting(finished, scenes, tmp_path))
    assert not (tmp_path / "checkpoint.pt").exists()


BAD_DETECTION = {
    "--recipe coco-2x": "--recipe coco-2x needs --data",
    "--model fpn": "--model fpn has five levels",
    "--images 3": "--images 3 do not fill one --batch-size 4",
}


@pytest.mark.parametrize("flags, message", BAD_DETECTION.items())
def test_bad_detection_commands_name_what_is_wrong(flags, message, capsys):
    pytest.importorskip("pycocotools")
    with pytest.raises(SystemExit):
        detect_transfer.parse(flags.split())
    assert message in capsys.readouterr().err


# Data in COCO's layout.

POLYGON = [1, 2, 4, 2, 4, 6, 1, 6]  # 3 x 4 pixels
SQUARE = torch.zeros(10, 10, dtype=torch.uint8)
SQUARE[2:6, 1:4] = 1
RUNS = {"size": [10, 10], "counts": [12, 4, 6, 4, 6, 4, 64]}  # down the columns


def an_object(**changes):
    return {
        "id": 5,
        "image_id": 0,
        "category_id": 7,
        "bbox": [1, 2, 3, 4],
        "segmentation": [POLYGON],
        **changes,
    }


def write_coco(root, annotations, images=3, categories=None, name="train"):
    """Images of 10 x 10 pixels in root/<name>/ and their annotations in instances_<name>.json.
    `images`: their number, or their entries. Returns the path of the annotations."""
    if isinstance(images, int):
        images = [
            {"id": i, "file_name": f"{i}.png", "height": 10, "width": 10} for i in range(images)
        ]
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        TF.to_pil_image(pictures(10)[i]).save(folder / f"{i}.png")
    (root / "annotations").mkdir(exist_ok=True)
    file = root / "annotations" / f"instances_{name}.json"
    categories = categories or [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return file


def read_coco(root, *annotations, **options):
    pytest.importorskip("pycocotools")
    write_coco(root, list(annotations), **options)
    return coco(root, "train")


def refusal(root, *annotations, **options):
    """The message with which a data set ends the run."""
    with pytest.raises(SystemExit) as stopped:
        read_coco(root, *annotations, **options)
    return str(stopped.value)


SEGMENTATIONS = {
    "polygon": [POLYGON],
    "two polygons": [[1, 2, 4, 2, 4, 4, 1, 4], [1, 4, 4, 4, 4, 6, 1, 6]],
    "run lengths": RUNS,
    "compressed run lengths": {"size": [10, 10], "counts": "<46000j1"},
    "polygon and a line": [[1, 2, 9, 9], POLYGON],
    "polygon and an odd one": [POLYGON, [9, 9, 1, 1, 5]],
    "polygon and an empty one": [[], POLYGON],
}


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_masks_of_every_format_are_read(name, tmp_path):
    data = read_coco(tmp_path, an_object(segmentation=SEGMENTATIONS[name]))
    _, target = data[0, 0]
    mask = target["masks"][0]
    assert torch.equal(mask, SQUARE) or torch.equal(mask, SQUARE.flip(-1))


def test_encoded_masks_are_cocos_compressed_run_lengths():
    pytest.importorskip("pycocotools")
    assert detect_transfer.encode_mask(SQUARE.bool()) == SEGMENTATIONS["compressed run lengths"]


@pytest.mark.parametrize("seed", range(5))
def test_compressed_run_lengths_are_decompressed(seed):
    """Against pycocotools, which compresses the numbers; long and short runs, 0 at the start."""
    rle = pytest.importorskip("pycocotools.mask")
    lengths = torch.randint(1, 2 ** (3 * seed + 1), (50,), generator=generator(seed)).tolist()
    lengths[0] = 0
    runs = {"size": [sum(lengths), 1], "counts": lengths}
    compressed = rle.frPyObjects(runs, *runs["size"])["counts"].decode()
    assert detect_transfer.decompress_counts(compressed) == lengths


@pytest.fixture
def mixed(tmp_path):
    """Images with one object that counts, one of another category, and none."""
    return read_coco(
        tmp_path,
        an_object(id=0),
        an_object(id=1, iscrowd=1),
        an_object(id=2, bbox=[9.5, 2, 3, 4]),
        an_object(id=3, bbox=[5, 5, 0, 3]),
        an_object(id=4, bbox=[20, 20, 5, 5]),
        an_object(id=6, image_id=1, category_id=3),
    )


def test_crowds_and_boxes_of_less_than_a_pixel_in_the_image_are_not_trained(mixed):
    assert mixed[0, 0][1]["labels"].tolist() == [2]


def test_labels_are_in_the_order_of_the_category_ids(mixed):
    assert mixed[0, 1][1]["labels"].tolist() == [1]


def test_images_without_objects_are_not_trained_but_evaluated(mixed, tmp_path):
    evaluated = detect_transfer.CocoImages(tmp_path, "train", training=False)
    assert len(mixed) == 2
    assert len(evaluated) == 3
    assert evaluated[0, 2][1]["masks"].shape == (0, 10, 10)


def test_the_kinds_of_annotations_are_counted(mixed, capsys):
    coco(mixed.folder.parent, "train")
    printed = capsys.readouterr().out
    assert "6 annotations, of which 2 objects, 1 crowds, 3 smaller than a pixel" in printed


def test_boxes_beyond_the_image_are_clipped_and_reported(tmp_path, capsys):
    """Corners x1 y1 x2 y2 in the place of x, y, width, height cannot be told from such boxes."""
    data = read_coco(tmp_path, an_object(id=1), an_object(id=2, bbox=[4, 6, 8, 5]))
    _, target = data[0, 0]
    xs = target["boxes"][1, [0, 2]].tolist()
    assert target["boxes"][1, [1, 3]].tolist() == [6, 10]
    assert xs in ([4, 10], [0, 6])
    assert "1 boxes reach beyond their images" in capsys.readouterr().out


def test_half_of_the_training_images_are_flipped_with_their_boxes_and_masks(tmp_path):
    data = read_coco(tmp_path, an_object())
    original = train.decode_image(str(tmp_path / "train" / "0.png"))
    flips = 0
    for epoch in range(200):
        image, target = data[epoch, 0]
        if torch.equal(image, original):
            assert target["boxes"].tolist() == [[1, 2, 4, 6]]
            assert torch.equal(target["masks"], SQUARE[None])
        else:
            flips += 1
            assert torch.equal(image, original.flip(-1))
            assert target["boxes"].tolist() == [[6, 2, 9, 6]]
            assert torch.equal(target["masks"], SQUARE[None].flip(-1))
    assert 70 < flips < 130


def evaluation_set(root):
    return detect_transfer.CocoImages(root, "train", training=False)


@pytest.mark.parametrize("entry", ["area", "iscrowd", "segmentation"])
@pytest.mark.parametrize("value", ["missing", None])
def test_optional_entries_may_be_missing(entry, value, tmp_path):
    annotation = an_object(id=0, area=12, iscrowd=0)
    if value is None:
        annotation[entry] = None
    else:
        del annotation[entry]
    read_coco(tmp_path, annotation)
    assert measured_ap(evaluation_set(tmp_path), tmp_path)["box AP"] == pytest.approx(100)


STRING_IDS = [
    {"id": name, "file_name": f"{i}.png", "height": 10, "width": 10}
    for i, name in enumerate(["zebra", "apple", "10"])
]


def test_ids_may_be_strings(tmp_path):
    read_coco(
        tmp_path,
        an_object(id="a", image_id="zebra", category_id="d"),
        an_object(id="b", image_id="10", category_id="c"),
        images=STRING_IDS,
        categories=[{"id": "d", "name": "dog"}, {"id": "c", "name": "cat"}],
    )
    ap = measured_ap(evaluation_set(tmp_path), tmp_path)
    results = json.loads((tmp_path / "results_segm.json").read_text())
    found = [(result["image_id"], result["category_id"]) for result in results]
    assert ap["box AP"] == pytest.approx(100)
    assert ap["mask AP"] == pytest.approx(100)
    assert found == [("zebra", "d"), ("10", "c")]


def test_file_names_may_contain_folders(tmp_path):
    images = [{"id": 0, "file_name": "a/b/0.png", "height": 10, "width": 10}]
    (tmp_path / "train" / "a" / "b").mkdir(parents=True)
    TF.to_pil_image(pictures(10)[0]).save(tmp_path / "train" / "a" / "b" / "0.png")
    assert len(read_coco(tmp_path, an_object(), images=images)) == 1


def test_annotations_may_begin_with_a_byte_order_mark(tmp_path):
    file = write_coco(tmp_path, [an_object()])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(coco(tmp_path, "train")) == 1


# Objects without masks.

TWO_POINTS = [[1, 2, 4, 6]]  # pycocotools reads these as a box


NO_MASKS = {"none": None, "empty": [], "no run lengths": {}, "no points": [[]], "line": TWO_POINTS}


@pytest.fixture(params=NO_MASKS.values(), ids=NO_MASKS.keys())
def partly_without_masks(request, tmp_path):
    """The folder of three objects, of which the second has no mask."""
    pytest.importorskip("pycocotools")
    annotations = [
        an_object(id=1),
        an_object(id=2, bbox=[5, 5, 4, 4], segmentation=request.param),
        an_object(id=3, image_id=1),
    ]
    write_coco(tmp_path, annotations)
    return tmp_path


def test_objects_without_masks_are_not_trained_beside_others(partly_without_masks, capsys):
    data = coco(partly_without_masks, "train")
    assert data.masks
    assert [len(data[0, i][1]["labels"]) for i in (0, 1)] == [1, 1]
    assert "2 of 3 objects have masks, the others count as crowds" in capsys.readouterr().out


def test_detections_of_objects_without_masks_are_no_errors(partly_without_masks):
    """Without the second object's entry they lower the AP."""
    second = {
        "labels": torch.tensor([2]),
        "boxes": torch.tensor([[5.0, 5, 9, 9]]),
        "masks": torch.zeros(1, 10, 10, dtype=torch.uint8),
        "scores": torch.ones(1),
    }
    second["masks"][0, 5:9, 5:9] = 1

    def with_second_object(target):
        if target["image_id"] > 0:
            return target
        return {k: torch.cat([v, target[k]]) for k, v in second.items()} | {
            "image_id": target["image_id"]
        }

    root = partly_without_masks
    counted = measured_ap(evaluation_set(root), root, with_second_object)
    write_coco(root, [an_object(id=1), an_object(id=3, image_id=1)])
    removed = measured_ap(evaluation_set(root), root, with_second_object)
    for name in ("box AP", "mask AP"):
        assert counted[name] == pytest.approx(100)
        assert removed[name] < 90


def test_without_masks_the_boxes_of_all_objects_are_used(partly_without_masks):
    data = detect_transfer.CocoImages(partly_without_masks, "train", True, masks=False)
    _, target = data[0, 0]
    assert not data.masks
    assert len(target["labels"]) == 2
    assert "masks" not in target


def test_if_no_object_has_a_mask_boxes_are_used(tmp_path, capsys):
    data = read_coco(tmp_path, an_object(segmentation=[]))
    assert not data.masks
    assert len(data) == 1
    assert "0 of 1 objects have masks, only boxes are used" in capsys.readouterr().out


def test_boxes_without_masks_are_trained_and_evaluated(finished, tmp_path):
    for name in ("train", "val"):
        write_coco(tmp_path, [an_object(id=i, image_id=i) for i in range(3)], name=name)
    detect_transfer.main(detecting(finished, tmp_path, tmp_path / "run", "--no-masks"))
    lines = lines_of(tmp_path / "run" / "log.jsonl")
    assert "mask" not in lines[1]
    assert "box AP" in lines[-1]
    assert "mask AP" not in lines[-1]


# What cannot be used ends the run at its start.

NAN = float("nan")
BAD_ANNOTATIONS = {
    "image that does not exist": ({"image_id": 9}, "no image with its image_id 9"),
    "no image": ({"image_id": None}, "no image with its image_id None"),
    "image id of another type": ({"image_id": "0"}, "no image with its image_id '0'"),
    "category that does not exist": ({"category_id": 1}, "no category 1"),
    "no category": ({"category_id": None}, "no category None"),
    "no box": ({"bbox": None}, "its bbox is None"),
    "box of three numbers": ({"bbox": [1, 2, 3]}, r"its bbox is \[1, 2, 3\]"),
    "NaN in a box": ({"bbox": [1, NAN, 3, 4]}, "its bbox is .*nan"),
    "infinite box": ({"bbox": [1, 2, math.inf, 4]}, "its bbox is .*inf"),
    "distant box": ({"bbox": [1, 2, 4e9, 4]}, "its bbox is"),
    "box of strings": ({"bbox": ["1", "2", "3", "4"]}, "must be real number"),
    "negative width": ({"bbox": [4, 2, -3, 4]}, "has a negative width or height"),
    "negative height": ({"bbox": [1, 6, 3, -4]}, "has a negative width or height"),
    "crowd as a string": ({"iscrowd": "0"}, "its iscrowd is '0'"),
    "negative area": ({"area": -12}, "its area is -12"),
    "NaN area": ({"area": NAN}, "its area is nan"),
    "area as a string": ({"area": "12"}, "not supported"),
    "flat polygon": ({"segmentation": POLYGON}, "not a list of polygons"),
    "points": ({"segmentation": [[[1, 2], [4, 2], [4, 6], [1, 6], [1, 4], [1, 3]]]}, "real number"),
    "NaN in a polygon": ({"segmentation": [[*POLYGON[:-1], NAN]]}, "its polygon .*nan"),
    "distant polygon": ({"segmentation": [[*POLYGON[:-1], -4e9]]}, "its polygon"),
    "strings in a polygon": ({"segmentation": [["1"] * 6]}, "must be real number"),
    "mask of another size": (
        {"segmentation": {"size": [20, 5], "counts": [100]}},
        r"its mask has the size \[20, 5\], its image \[10, 10\]",
    ),
    "mask without a size": ({"segmentation": {"counts": [100]}}, "its mask has the size None"),
    "mask without run lengths": ({"segmentation": {"size": [10, 10]}}, "do not add up"),
    "too few run lengths": ({"segmentation": {**RUNS, "counts": [12, 4]}}, "do not add up"),
    "too long run lengths": ({"segmentation": {**RUNS, "counts": [12, 400]}}, "do not add up"),
    "negative run length": ({"segmentation": {**RUNS, "counts": [-1, 101]}}, "do not add up"),
    "too few compressed run lengths": (
        {"segmentation": {**RUNS, "counts": "<460"}},
        "do not add up",
    ),
}


@pytest.mark.parametrize("name", BAD_ANNOTATIONS)
def test_an_annotation_that_cannot_be_used_is_named(name, tmp_path):
    changes, message = BAD_ANNOTATIONS[name]
    text = refusal(tmp_path, an_object(id=4), an_object(id=17, **changes))
    assert re.search(rf"instances_train.json: annotation 17: .*{message}", text), text


@pytest.mark.parametrize("missing", ["image_id", "category_id", "bbox"])
def test_an_annotation_that_lacks_an_entry_is_named(missing, tmp_path):
    annotation = an_object(id=17)
    del annotation[missing]
    assert "instances_train.json: annotation 17: " in refusal(tmp_path, annotation)


def test_an_annotation_without_an_id_is_named_by_its_number(tmp_path):
    text = refusal(tmp_path, an_object(), an_object(id=None))
    assert "instances_train.json: annotation number 2 has no id" in text


def test_an_annotation_id_that_occurs_twice_is_named(tmp_path):
    text = refusal(tmp_path, an_object(id=6), an_object(id=17), an_object(id=17))
    assert "instances_train.json: annotation 17: this id occurs twice" in text


BAD_IMAGES = {
    "no file name": ({"file_name": None}, "it has no file_name"),
    "no height": ({"height": None}, "its height is None"),
    "no pixels": ({"width": 0}, "its width is 0"),
    "width as a string": ({"width": "10"}, "its width is '10'"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_used_is_named(name, tmp_path):
    changes, message = BAD_IMAGES[name]
    image = {"id": 17, "file_name": "0.png", "height": 10, "width": 10, **changes}
    text = refusal(tmp_path, an_object(image_id=17), images=[image])
    assert f"instances_train.json: image 17: {message}" in text


def image_entries(*ids):
    return [{"id": i, "file_name": "0.png", "height": 10, "width": 10} for i in ids]


def test_an_image_id_that_occurs_twice_is_named(tmp_path):
    text = refusal(tmp_path, an_object(), images=image_entries(0, 17, 17))
    assert "instances_train.json: image 17: this id occurs twice" in text


def test_a_category_id_that_occurs_twice_is_named(tmp_path):
    text = refusal(tmp_path, an_object(), categories=[{"id": 7, "name": name} for name in "ab"])
    assert "instances_train.json: category 7: this id occurs twice" in text


def test_ids_of_images_are_either_numbers_or_strings(tmp_path):
    """COCOeval would make strings of all of them, and find no object of image 0."""
    text = refusal(tmp_path, an_object(), images=image_entries(0, "1"))
    assert "instances_train.json: image: some ids are integers, others strings" in text


NOT_COCO = ["", "{", "[]", "{}", '{"images": [], "categories": [], "annotations": null}', "\xff"]


@pytest.mark.parametrize("text", NOT_COCO)
def test_a_file_of_another_kind_is_named(text, tmp_path):
    pytest.importorskip("pycocotools")
    file = write_coco(tmp_path, [an_object()])
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit, match="instances_train.json is not a COCO annotation file"):
        coco(tmp_path, "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_without_an_object_end_the_run(split, tmp_path):
    pytest.importorskip("pycocotools")
    write_coco(tmp_path, [an_object(bbox=[0.1, 0.2, 0.3, 0.4])], name=split)
    with pytest.raises(SystemExit, match=f"instances_{split}.json has no object of at least"):
        coco(tmp_path, split)


def test_missing_images_are_counted_and_one_is_named(tmp_path):
    images = image_entries(0, 1, 2)
    images[1]["file_name"] = "gone.png"
    images[2]["file_name"] = "away/gone.png"
    annotations = [an_object(id=i, image_id=i) for i in range(3)]
    text = refusal(tmp_path, *annotations, images=images)
    assert f"{tmp_path / 'train'} lacks 2 of the 3 images in" in text
    assert "gone.png" in text


def test_images_of_another_size_than_annotated_are_found_at_the_start(tmp_path):
    images = [{"id": 0, "file_name": "0.png", "height": 20, "width": 10}]
    with pytest.raises(ValueError, match=r"0.png has the size \(10, 10\), not \(20, 10\)"):
        read_coco(tmp_path, an_object(), images=images)


def test_categories_that_differ_between_train_and_val_are_named(finished, tmp_path):
    """The same ids, but other names."""
    for name, names in [("train", "ab"), ("val", "ba")]:
        categories = [{"id": 3, "name": names[0]}, {"id": 7, "name": names[1]}]
        write_coco(tmp_path, [an_object()], name=name, categories=categories)
    with pytest.raises(SystemExit, match=r"categories of train and val differ in .*\(3, 'a'\)"):
        detect_transfer.main(detecting(finished, tmp_path, tmp_path / "run"))


def test_fewer_training_images_than_a_batch_end_the_run(finished, tmp_path):
    for name in ("train", "val"):
        write_coco(tmp_path, [an_object()], name=name)
    with pytest.raises(SystemExit, match="1 training images do not fill one batch"):
        detect_transfer.main(detecting(finished, tmp_path, tmp_path / "run"))


# Which files.


def layout(root, *names):
    """Empty annotation files and folders of these names below root."""
    for name in names:
        path = root / name
        if name.endswith(".json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            path.mkdir(parents=True, exist_ok=True)


TWO_YEARS = [
    "annotations/instances_train2014.json",
    "annotations/instances_train2017.json",
    "annotations/instances_val2014.json",
    "annotations/instances_val2017.json",
    "train2014",
    "train2017",
    "val2014",
    "val2017",
]
LAYOUTS_OF_COCO = {
    "usual": (TWO_YEARS[1:2] + ["train2017"], None, "train2017", "train2017"),
    "no year": (["annotations/instances_train.json", "train"], None, "train", "train"),
    "folder of images": (
        ["annotations/instances_train2017.json", "images/train2017", "train_old"],
        None,
        "train2017",
        "images/train2017",
    ),
    "no year in the folder": (
        ["annotations/instances_train2017.json", "images/train"],
        None,
        "train2017",
        "images/train",
    ),
    "no year in the file": (
        ["annotations/instances_train.json", "train2017"],
        None,
        "train",
        "train2017",
    ),
    "2017 of two": (TWO_YEARS, "2017", "train2017", "train2017"),
    "2014 of two": (TWO_YEARS, "2014", "train2014", "train2014"),
    "a year is asked for, but there is none": (
        ["annotations/instances_train.json", "train"],
        "2017",
        "train",
        "train",
    ),
    "another version beside it": (
        ["annotations/instances_train.json", "annotations/instances_train_poly.json", "train"],
        None,
        "train",
        "train",
    ),
    "own name": (
        ["annotations/instances_train_v2.json", "train_v2", "train"],
        None,
        "train_v2",
        "train_v2",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS_OF_COCO)
def test_annotations_and_images_are_found(name, tmp_path):
    pytest.importorskip("pycocotools")
    names, year, file, folder = LAYOUTS_OF_COCO[name]
    layout(tmp_path, *names)
    expected = tmp_path / f"annotations/instances_{file}.json", tmp_path / folder
    assert detect_transfer.find_split(tmp_path, "train", year) == expected


AMBIGUOUS_LAYOUTS = {
    "two years": (TWO_YEARS, None, "instances_train2014.json.*instances_train2017.json"),
    "with and without a year": (
        ["annotations/instances_train.json", "annotations/instances_train2017.json", "train"],
        None,
        "instances_train.json.*instances_train2017.json",
    ),
    "two versions": (
        ["annotations/instances_train_v1.json", "annotations/instances_train_v2.json", "train"],
        None,
        "instances_train_v1.json.*instances_train_v2.json",
    ),
    "two folders": (
        ["annotations/instances_train.json", "train", "images/train"],
        None,
        "/train, .*/images/train",
    ),
    "two folders with years": (
        ["annotations/instances_train.json", "train2014", "train2017"],
        None,
        "train2014.*train2017",
    ),
    "images of another year": (
        ["annotations/instances_train2017.json", "train2014"],
        None,
        "has no train2017/ nor images/train2017/",
    ),
    "annotations of another year": (
        ["annotations/instances_train2014.json", "train2014"],
        "2017",
        "has no annotations/instances_train2017.json",
    ),
    "an archive": (
        ["annotations/instances_train.json", "train.json"],
        None,
        "has no train/ nor images/train/",
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS_LAYOUTS)
def test_no_annotations_or_images_are_chosen_by_chance(name, tmp_path):
    pytest.importorskip("pycocotools")
    names, year, message = AMBIGUOUS_LAYOUTS[name]
    layout(tmp_path, *names)
    with pytest.raises(SystemExit, match=f"--data {re.escape(str(tmp_path))} .*{message}"):
        detect_transfer.find_split(tmp_path, "train", year)


@pytest.mark.parametrize(
    "recipe, year", [("coco-2x", "2017"), ("coco-1x", "2017"), ("shapes", None)]
)
def test_the_coco_recipes_are_of_2017(recipe, year):
    pytest.importorskip("pycocotools")
    assert detect_transfer.parse(["--recipe", recipe, "--data", "."]).year == year


def test_the_files_of_a_data_set_are_printed(tmp_path, capsys):
    read_coco(tmp_path, an_object())
    printed = capsys.readouterr().out
    assert f"{tmp_path}/annotations/instances_train.json, {tmp_path}/train: 1 images" in printed


# --- GPU -----------------------------------------------------------------------------------------
# Run on an H200 before the step was captured and before GlobalBatchNorm existed:
# test_gpu_takes_steps_and_resumes and the uncaptured case of the test after it. The others have
# not yet run on a GPU.


@needs_gpu
@pytest.mark.parametrize("flags", ["", "--precision float16", "--compile", TEACHER])
def test_gpu_takes_steps_and_resumes(flags, photos, tmp_path, capsys):
    train.main(tiny(photos, tmp_path, f"--device cuda {flags} --max-steps 4"))
    train.main(tiny(photos, tmp_path, f"--device cuda {flags} --max-steps 6"))
    assert "from step 4, on 1 x cuda" in capsys.readouterr().out


@needs_gpu
@pytest.mark.parametrize("flags", ["--no-cuda-graph", "--cuda-graph"])
def test_gpu_input_and_step_never_wait_for_the_device(flags, photos, tmp_path, monkeypatch):
    """In two ordinary steps and two replayed ones, none of them before an evaluation."""
    augment_batch = train.Augmentation.__call__

    def strict(self, views, step, device):
        mode = "error" if step in (3, 4, 21, 22) else "default"  # until the next input
        torch.cuda.set_sync_debug_mode(mode)
        return augment_batch(self, views, step, device)

    monkeypatch.setattr(train.Augmentation, "__call__", strict)
    long = "--log-every 100 --epochs 100 --max-steps 25"
    train.main(tiny(photos, tmp_path, f"--device cuda {long} {flags}"))
    torch.cuda.set_sync_debug_mode("default")


def train_in_float64_on_a_gpu(*arguments):
    torch.set_default_dtype(torch.float64)
    train.main(arguments)


def share_a_gpu_in_float64(*arguments):
    """Several processes over gloo: NCCL refuses two on one GPU."""
    init_process_group = dist.init_process_group
    os.environ["LOCAL_RANK"] = "0"

    def init_gloo(backend, device_id, **options):
        init_process_group("gloo", **options)

    dist.init_process_group = init_gloo
    train_in_float64_on_a_gpu(*arguments)


def run_on_gpu(function, arguments, processes=0):
    return run("test_intl.py", function, *arguments, processes=processes, CUDA_VISIBLE_DEVICES="0")


def assert_same_training(folder, expected_folder):
    assert losses_of(folder) == pytest.approx(losses_of(expected_folder), rel=1e-4)
    got = load(folder / "checkpoint.pt")
    expected = load(expected_folder / "checkpoint.pt")
    for name, value in expected["network"].items():
        assert_close(got["network"][name], value, rtol=1e-7, atol=1e-9, msg=name)


@needs_gpu
def test_gpu_two_processes_equal_one(photos, tmp_path):
    """In float64: in float32 and TF32 rounding changes the sign of some ReLUs' inputs."""
    one = tiny(photos, tmp_path / "one", "--device cuda --max-steps 5")
    two = tiny(photos, tmp_path / "two", "--device cuda --max-steps 5")
    run_on_gpu("train_in_float64_on_a_gpu", one)
    run_on_gpu("share_a_gpu_in_float64", two, processes=2)
    assert_same_training(tmp_path / "two", tmp_path / "one")


class GroupOfOne(int):
    """A number of processes that is 1, but is neither equal to 1 nor less than 2 in comparisons."""

    def __gt__(self, other):
        return other < 2

    def __eq__(self, other):
        return False

    __hash__ = int.__hash__


def train_in_a_group_of_one(*arguments):
    train.WORLD = GroupOfOne(1)
    train_in_float64_on_a_gpu(*arguments)


@needs_gpu
@pytest.mark.parametrize("flag", ["--no-cuda-graph", "--cuda-graph"])
def test_gpu_process_group_of_one_equals_no_process_group(flag, photos, tmp_path, monkeypatch):
    """With NCCL, DistributedDataParallel and GlobalBatchNorm, captured and not."""
    plain = tiny(photos, tmp_path / "plain", "--device cuda --no-cuda-graph --epochs 10")
    group = tiny(photos, tmp_path / "group", f"--device cuda {flag} --epochs 10")
    run_on_gpu("train_in_float64_on_a_gpu", plain)
    printed = run_on_gpu("train_in_a_group_of_one", group, processes=1)
    captured = "the step is captured in a CUDA graph" in printed
    assert captured == (flag == "--cuda-graph")
    assert_same_training(tmp_path / "group", tmp_path / "plain")


@pytest.fixture(scope="module", params=["", TEACHER], ids=["two views", "teacher"])
def gpu_uncaptured_run(request, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_uncaptured")
    flags = f"--device cuda --epochs 10 {request.param}"
    run_on_gpu("train_in_float64_on_a_gpu", tiny(photos, folder, f"{flags} --no-cuda-graph"))
    return flags, folder


@needs_gpu
def test_gpu_captured_equals_uncaptured(gpu_uncaptured_run, photos, tmp_path):
    flags, expected = gpu_uncaptured_run
    printed = run_on_gpu("train_in_float64_on_a_gpu", tiny(photos, tmp_path, flags))
    assert "the step is captured in a CUDA graph" in printed
    assert len(losses_of(tmp_path)) == 30
    assert_same_training(tmp_path, expected)


@needs_gpu
def test_gpu_captured_equals_uncaptured_after_a_resume(gpu_uncaptured_run, photos, tmp_path):
    flags, expected = gpu_uncaptured_run
    first_half = tiny(photos, tmp_path, f"{flags} --max-steps 15")
    run_on_gpu("train_in_float64_on_a_gpu", first_half)
    run_on_gpu("train_in_float64_on_a_gpu", tiny(photos, tmp_path, flags))
    assert steps_of(tmp_path) == list(range(1, 31))
    assert_same_training(tmp_path, expected)


@needs_gpu
@pytest.mark.parametrize("flags", ["--loss whiten", "--precision float16", "--loss cwrgp"])
def test_gpu_step_that_cannot_be_captured_runs(flags, photos, tmp_path, capsys):
    small = "--groups 1 --sub-batch 8 --epochs 6"
    train.main(tiny(photos, tmp_path, f"--device cuda {small} {flags}"))
    assert steps_of(tmp_path) == list(range(1, 19))
    assert "CUDA graph: no (" in capsys.readouterr().out


@needs_gpu
@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pt"])
def test_gpu_run_saves_tensors_of_the_cpu(name, photos, tmp_path):
    train.main(tiny(photos, tmp_path, "--device cuda --max-steps 3"))
    saved = torch.load(tmp_path / name, weights_only=True)
    assert {x.device.type for x in tensors_in(saved)} == {"cpu"}


@needs_gpu
def test_gpu_detects(finished, scenes, tmp_path):
    detect_transfer.main(detecting(finished, scenes, tmp_path, "--device cuda"))


@needs_gpu
def test_gpu_evaluates(finished, photos, tmp_path, monkeypatch):
    flags = "--device cuda --epochs 2 --protocol features knn linear finetune"
    evaluate(monkeypatch, finished, photos, tmp_path, flags)
    assert len(lines_of(tmp_path / "results.jsonl")) == 4


@needs_gpu
@both_axes
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_gpu_loss_equals_the_cpus(dtype, axis):
    z = randf(2, 32, 48)
    expected = INTLLoss(axis=axis)(z)
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        got = INTLLoss(axis=axis)(z.cuda())
    assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_gpu_views_equal_the_cpus():
    args = train.parse("--batch-size 24 --view-sizes 32 32 --blur 0.5".split())
    views = [pictures(), pictures()]
    expected = train.Augmentation(args)(views, 3, CPU)
    got = train.Augmentation(args)(views, 3, torch.device("cuda"))
    for x, y in zip(got, expected):
        assert_close(x.cpu(), y, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_gpu_neighbours_equal_the_cpus():
    bank = (randf(500, 8), torch.arange(500) % 4)
    queries = (randf(90, 8, seed=1), torch.arange(90) % 4)
    expected = train.knn_top1(*bank, *queries, 5)
    assert train.knn_top1(*[x.cuda() for x in (*bank, *queries)], 5) == expected


if __name__ == "__main__":  # functions that tests start in other processes
    globals()[sys.argv[1]](*sys.argv[2:])
