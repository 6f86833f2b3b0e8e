"""All tests. They need no data set, no GPU and no network.

Numbers are compared with independent sources: eigendecompositions in float64, the scalar Newton
map, values of the official releases, torchvision's functions, and a single process where several
are tested.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import detect_transfer
import intl
import linear_eval
import train

HERE = Path(train.__file__).parent
CPU = torch.device("cpu")
AXES = ("channel", "batch")
both_axes = pytest.mark.parametrize("axis", AXES)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torchvision's own

# One thread, here and in the processes that tests start: sums are then rounded in the same order.
torch.set_num_threads(1)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT["PYTHONPATH"] = str(HERE)

# The smallest run of train.py: 16-pixel views of drawn shapes, on the CPU and in this process.
TINY = (
    "--device cpu --epochs 1 --warmup-epochs 0 --batch-size 64 --view-sizes 16 16 "
    "--hidden 32 --out 32 --workers 0 --log-every 1"
).split()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def load(path):
    return torch.load(path, weights_only=True, map_location="cpu")


def log_lines(folder):
    """The lines of a run's log.jsonl, as dictionaries."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def write_images(folder, names, size=(20, 20)):
    """Writes an image of noise, (height, width) pixels, for every name below the folder."""
    random = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def exit_line(function, *arguments):
    """The line with which a call ends the program."""
    with pytest.raises(SystemExit) as error:
        function(*arguments)
    return str(error.value)


def run(script, *arguments, processes=0, timeout=300):
    """Runs a script, under torchrun if `processes` is not 0. Returns what it printed."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", processes]
    command += [HERE / script, *arguments]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with train/ and val/, two classes of 8 and 4 images of noise."""
    folder = tmp_path_factory.mktemp("photos")
    for split, n in (("train", 8), ("val", 4)):
        for kind in ("cat", "dog"):
            write_images(folder, [f"{split}/{kind}/{i}.png" for i in range(n)])
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a finished run of three steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    train.main([*TINY, "--max-steps", "3", "--output", str(folder)])
    return folder


# --- intl.py --------------------------------------------------------------------------------------


def gradient_of(value, z):
    return torch.autograd.grad(value, z, retain_graph=True)[0]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def as_rows(z, axis):
    """What is whitened in rows, by the definition of the axis; its own inverse."""
    return z if axis == "channel" else z.mT


def transform_by_eigh(z, g, axis):
    """U diag(g(l)) U^T x, of z (m, d)."""
    x = as_rows(z, axis)
    l, U = torch.linalg.eigh(torch.cov(x))
    x_hat = (U * g(l.clamp_min(0))) @ U.T @ (x - x.mean(dim=1, keepdim=True))
    return as_rows(x_hat, axis)


def orthonormal_rows(n, k):
    """(n, k), n < k: orthonormal rows of mean zero. Their covariance is I / (k - 1)."""
    ones = torch.ones(k, 1, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.cat([ones, randn(k, n)], dim=1))
    return q[:, 1:].T


wide_and_tall = pytest.mark.parametrize("m, d", [(6, 9), (9, 6)])


# --- The definition


def test_the_first_code_of_the_readme_runs_and_is_the_definition_letter_for_letter():
    source = Path(intl.__file__).read_text()
    definition = re.search(r"def iter_norm_by.*?def intl_loss_by.*?\n(?=\n)", source, re.DOTALL)[0]
    readme = (HERE / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    imports = "import math\n\nimport torch\nimport torch.nn.functional as F\n"
    assert code == f"{imports}\n\n{definition}"
    names = {}
    exec(code, names)
    z1, z2 = randn(2, 12, 20)
    assert_close(names["intl_loss_by_definition"](z1, z2), intl.INTLLoss()([z1, z2]))


@pytest.mark.parametrize("m, d", [(12, 20), (20, 12)])
def test_the_loss_and_its_gradient_equal_the_definition(m, d):
    z = randn(2, m, d).requires_grad_()
    loss = intl.INTLLoss()(list(z))
    expected = intl.intl_loss_by_definition(*z)
    assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_close(gradient_of(loss, z), gradient_of(expected, z), rtol=1e-9, atol=1e-12)


# --- The official releases: values and gradients computed with their code, in float64
OFFICIAL = json.loads((HERE / "evidence" / "reference_values.json").read_text())


def assert_official(found, values):
    """To 1e-9, or, of elements near zero, to 1e-12 of the largest one."""
    expected = torch.tensor(values, dtype=torch.float64)
    atol = 1e-12 * max(1.0, expected.abs().max().item())
    assert_close(found, expected, rtol=1e-9, atol=atol)


@pytest.mark.parametrize(
    "case", OFFICIAL["intl"], ids="{axis}-{m}x{d}-T{iterations}-seed{seed}".format_map
)
def test_iter_norm_and_the_loss_without_and_with_teacher_equal_the_official_release(case):
    z = torch.tensor(case["views"], dtype=torch.float64).requires_grad_()
    axis = case["axis"]
    iterations = case["iterations"]
    z_hat = intl.iter_norm(z.detach(), axis=axis, iterations=iterations)
    assert_official(z_hat, case["iternorm"])
    assert_official(intl.trace_loss(z_hat, axis=axis), case["trace_loss"])

    beta = None if case["beta"] > 0 else case["beta"]  # the default is the release's
    loss = intl.INTLLoss(axis=axis, iterations=iterations, beta=beta)
    value = loss(list(z))
    assert_official(value, case["loss"])
    assert_official(gradient_of(value, z), case["grad"])
    assert_official(loss.parts["trace"], np.mean(case["trace_loss"]))

    value = loss(list(z[1:]), teacher=z[0])
    assert_official(value, case["loss_momentum"])
    gradient = gradient_of(value, z)
    assert_official(gradient[1:], case["grad_momentum"])
    assert not gradient[0].any()
    trace = np.mean(case["trace_loss"][1:])
    assert_official(loss.parts["trace"], trace)
    assert_official(loss.parts["alignment"], case["loss_momentum"] - case["beta"] * trace)


@pytest.mark.parametrize("case", OFFICIAL["cw_rgp"], ids="{m}x{d}-{groups}".format_map)
def test_group_whitening_equals_the_official_release(case):
    z = torch.tensor(case["z"], dtype=torch.float64).requires_grad_()
    permutation = torch.tensor(case["perm"])
    assert_official(intl.group_whiten(z, case["groups"], permutation).detach(), case["whitened"])
    assert gradcheck(lambda z: intl.group_whiten(z, case["groups"], permutation), z)


@pytest.mark.parametrize("case", OFFICIAL["orthogonality"], ids="{shape}".format_map)
def test_the_orthogonality_penalty_equals_the_papers_definition(case):
    out_channels, in_channels, *kernel = case["shape"]
    layer = nn.Conv2d(in_channels, out_channels, kernel).double()
    weight = torch.tensor(case["weight"], dtype=torch.float64)
    layer.weight.data = weight.reshape(case["shape"])
    so = intl.orthogonality_penalty(layer)
    srip = intl.orthogonality_penalty(layer, "srip", power_iterations=500)
    assert_official(so, case["so"])
    assert_official(srip, case["srip_exact"])

    eigenvalues = torch.linalg.svdvals(layer.weight.flatten(1)) ** 2 - 1
    for found, expected in ((so, eigenvalues.square().sum()), (srip, eigenvalues.abs().max())):
        assert_close(gradient_of(found, layer.weight), gradient_of(expected, layer.weight))


# --- What happens to the eigenvalues


@pytest.mark.parametrize("iterations", [1, 4, 10])
def test_newton_map_is_increasing_and_concave_from_0_to_1(iterations):
    q = torch.linspace(0, 1, 2001, dtype=torch.float64)
    h = intl.newton_map(q, iterations)
    assert h[0] == 0
    assert h[-1] == 1
    slope = h.diff()
    assert slope.min() > -1e-15
    assert slope.diff().max() < 1e-15


@both_axes
@wide_and_tall
@pytest.mark.parametrize("iterations", [1, 4])
def test_iter_norm_maps_the_shares_of_the_eigenvalues_by_newton_map(iterations, m, d, axis):
    z = randn(m, d)
    z_hat = intl.iter_norm(z, iterations=iterations, axis=axis)
    l = torch.linalg.eigvalsh(torch.cov(as_rows(z, axis)))
    l_hat = torch.linalg.eigvalsh(torch.cov(as_rows(z_hat, axis)))
    h = intl.newton_map((l / l.sum()).clamp_min(0), iterations)
    assert_close(l_hat, h, rtol=0, atol=1e-10)


@both_axes
@pytest.mark.parametrize("g", [torch.exp, intl.power(0.3)], ids=["exp", "power 0.3"])
def test_a_spectral_transformation_equals_the_eigendecomposition(g, axis):
    z = as_rows(randn(2, 5, 8), axis)
    found = intl.spectral_transform(z, g, axis=axis)
    expected = torch.stack([transform_by_eigh(v, g, axis) for v in z])
    assert_close(found, expected)


@both_axes
@wide_and_tall
def test_whitening_makes_every_nonzero_eigenvalue_one(m, d, axis):
    z = randn(m, d)
    rank = min(m, d - 1) if axis == "channel" else min(m - 1, d)
    l_hat = torch.linalg.eigvalsh(torch.cov(as_rows(intl.whiten(z, axis=axis), axis)))
    assert_close(l_hat[-rank:], torch.ones_like(l_hat[-rank:]))
    assert l_hat[:-rank].abs().sum() < 1e-12


def test_whitening_of_float32_is_accurate_where_float32_would_not_be():
    """The condition number of S, 1e8, is the square of that of x."""
    x = orthonormal_rows(8, 40) * torch.logspace(0, -4, 8, dtype=torch.float64)[:, None]
    rotation, _ = torch.linalg.qr(randn(8, 8, seed=1))
    z_hat = intl.whiten((rotation @ x).float())
    assert z_hat.dtype == torch.float32
    assert_close(torch.cov(z_hat), torch.eye(8), rtol=0, atol=1e-5)


# --- Gradients
GRADIENTS = {
    "IterNorm": lambda z, axis: intl.iter_norm(z, axis=axis),
    "1 / (1 + l)": lambda z, axis: intl.spectral_transform(z, lambda l: 1 / (1 + l), axis=axis),
    "whitening": lambda z, axis: intl.whiten(z, axis=axis),
    "INTL": lambda z, axis: intl.INTLLoss(axis=axis, beta=0.05)([z, z.flip(1) + 1]),
}
# Rows x = a @ b, and the gradient with respect to a: whitening is smooth while the rank stays.
POINTS = {
    "full rank": (randn(4, 7), torch.eye(7).double()),
    "more rows than rank": (randn(7, 4), torch.eye(4).double()),
    "equal and zero eigenvalues": (torch.linalg.qr(randn(7, 3)).Q, orthonormal_rows(3, 4)),
}


@both_axes
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_right_where_eigenvalues_are_zero_or_equal(name, point, axis):
    a, b = POINTS[point]
    function = GRADIENTS[name]
    assert gradcheck(lambda a: function(as_rows(a @ b, axis), axis), a.clone().requires_grad_())


def test_a_second_derivative_of_an_exact_transformation_is_refused():
    z = randn(4, 20).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(intl.whiten(z).sum(), z, create_graph=True)


# --- Trace loss, its floor, and the weight beta


@pytest.mark.parametrize("T", [2, 4])
@pytest.mark.parametrize("r", [1, 2, 8])
def test_no_spectrum_of_rank_r_has_a_trace_loss_below_l_r_which_equal_ones_reach(r, T):
    floor = intl.trace_floor(8, T, r)
    for seed in range(20):
        z = randn(8, r, seed=seed) @ orthonormal_rows(r, 40)
        assert intl.trace_loss(intl.iter_norm(z, iterations=T)) > floor - 1e-12
    equal = orthonormal_rows(r, 40)[torch.arange(8) % r]  # (8, 40)
    assert intl.trace_loss(intl.iter_norm(equal, iterations=T)).item() == pytest.approx(floor)


def test_most_of_the_loss_is_the_floor_of_the_trace_loss_in_the_published_setting():
    assert intl.trace_floor(256, 4) == pytest.approx(209.6, abs=0.05)
    z = orthonormal_rows(256, 300)
    loss = intl.INTLLoss()
    assert loss([z, z]).item() == pytest.approx(20.96, abs=0.005)
    assert loss([z], teacher=z).item() == pytest.approx(20.96 / 2, abs=0.005)


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("n, T, R", [(16, 4, 16), (512, 4, 512), (2048, 2, 255), (8, 4, 3)])
def test_the_balanced_beta_is_the_least_that_meets_both_conditions(n, T, R, c):
    beta = intl.balanced_beta(n, T, trace_views=c, rank=R)
    r = max(1, min(R / 4, 64))
    collapse = c * beta * (intl.trace_floor(n, T, 1) - intl.trace_floor(n, T, R))
    partial_collapse = beta * (intl.trace_floor(n, T, r) - intl.trace_floor(n, T, R))
    assert min(collapse / 2, partial_collapse / 0.3) == pytest.approx(1, rel=1e-12)
    assert intl.balanced_beta(n, T) == intl.balanced_beta(n, T, trace_views=2, rank=n)
    assert intl.balanced_beta(n, T, rank=1) == 0  # no rank to lose


# --- Precision
PRECISE = [
    intl.INTLLoss(),
    intl.INTLLoss(axis="batch"),
    intl.SpectralLoss(0.5),
    intl.CWRGPLoss(groups=2),
]


def test_float32_has_the_loss_and_gradient_of_float64():
    z = randn(2, 256, 2048, dtype=torch.float32).requires_grad_()
    z64 = z.detach().double().requires_grad_()
    exact = intl.INTLLoss()(list(z64))
    value = intl.INTLLoss()(list(z))
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    assert relative_error(gradient_of(value, z), gradient_of(exact, z64)) < 2e-5


@both_axes
def test_iter_norm_is_stable_in_float32_where_the_covariance_is_singular(axis):
    z = as_rows(randn(96, 8) @ randn(8, 128, seed=1), axis)
    found = intl.iter_norm(z.float(), iterations=10, axis=axis)
    assert found.dtype == torch.float32
    assert relative_error(found, intl.iter_norm(z, iterations=10, axis=axis)) < 1e-4


@pytest.mark.parametrize("loss", PRECISE, ids=repr)
def test_half_precision_and_autocast_change_nothing(loss):
    z = (100 * randn(2, 16, 48)).bfloat16()
    z32 = z.float().requires_grad_()
    results = []
    for views, autocast in ((z32, False), (z, True), (z32, True)):
        torch.manual_seed(0)  # for the permutations of CW-RGP
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(loss(list(views)))
    expected, half, under_autocast = results
    assert half.dtype == torch.float32
    assert_close(half, expected, rtol=1e-6, atol=0)
    assert_close(under_autocast, expected, rtol=1e-6, atol=0)
    assert_close(gradient_of(under_autocast, z32), gradient_of(expected, z32))


def test_autocast_does_not_reach_into_iter_norm_and_the_penalty():
    z = randn(8, 40, dtype=torch.float32)
    layer = nn.Linear(40, 8)
    z_hat = intl.iter_norm(z)
    penalty = intl.orthogonality_penalty(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(intl.iter_norm(z), z_hat)
        assert_close(intl.orthogonality_penalty(layer), penalty)


# From random views (2, m, d).
COLLAPSED = {
    "constant": torch.ones_like,
    "equal rows": lambda z: z[:, :1].expand_as(z),
    "one row zero": lambda z: torch.cat([z[:, 1:], torch.zeros_like(z[:, :1])], dim=1),
}


@pytest.mark.parametrize("kind", COLLAPSED)
@pytest.mark.parametrize("loss", PRECISE[:3], ids=repr)
def test_a_collapsed_batch_has_a_finite_loss_and_gradient(loss, kind):
    z = COLLAPSED[kind](randn(2, 32, 24, dtype=torch.float32)).requires_grad_()
    value = loss(list(z))
    assert value.isfinite()
    assert gradient_of(value, z).isfinite().all()
    assert all(part.isfinite() for part in loss.parts.values())


@needs_gpu
@both_axes
def test_gpu_the_loss_and_its_gradient_equal_the_cpu(axis):
    z = randn(2, 64, 96, dtype=torch.float32).requires_grad_()
    on_gpu = z.detach().cuda().requires_grad_()
    loss = intl.INTLLoss(axis=axis)
    value = loss(list(on_gpu))
    expected = loss(list(z))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradient_of(value, on_gpu).cpu()
    assert relative_error(found, gradient_of(expected, z).double()) < 1e-4


# --- Related losses, and what losses report


@both_axes
def test_spectral_loss_equals_its_definition_without_and_with_teacher(axis):
    z = as_rows(randn(3, 6, 9), axis)
    loss = intl.SpectralLoss(0.3, axis=axis)
    z_hat = [transform_by_eigh(v, lambda l: l**-0.3, axis) for v in z]
    distances = [2 - 2 * F.cosine_similarity(v, z_hat[0], dim=1).mean() for v in z_hat[1:]]
    expected = torch.stack(distances).mean()
    assert_close(loss(list(z)), expected)
    assert_close(loss(list(z[1:]), teacher=z[0]), expected)
    assert_close(loss.parts, {"alignment": expected})


def test_cw_rgp_and_its_gradient_equal_an_independent_computation():
    """Random parts of the batch, a permutation per part and view, all pairs of views, 2 repeats."""
    z = randn(3, 8, 32).requires_grad_()
    torch.manual_seed(5)
    loss = intl.CWRGPLoss(groups=2, sub_batch=4, repeats=2)
    value = loss(list(z))

    torch.manual_seed(5)
    distances = []
    for _ in range(2):
        rows = torch.rand(8).argsort()
        orders = torch.rand(3, 2, 32).argsort(dim=2)
        z_hat = []
        for view, view_orders in zip(z, orders):
            parts = zip(view[rows].split(4), view_orders)
            z_hat.append(torch.cat([intl.group_whiten(part, 2, order) for part, order in parts]))
        for a, b in itertools.combinations(z_hat, 2):
            distances.append(2 - 2 * F.cosine_similarity(a, b).mean())
    expected = torch.stack(distances).mean()
    assert_close(value, expected)
    assert_close(gradient_of(value, z), gradient_of(expected, z))
    assert_close(loss.parts, {"alignment": value.detach()})


def test_the_penalty_counts_attention_as_four_weights_a_shared_layer_once_batch_norm_never():
    attention = nn.MultiheadAttention(6, 2).double()
    shared = nn.Linear(6, 6).double()
    network = nn.Sequential(attention, shared, nn.BatchNorm1d(6), nn.Sequential(shared))
    q, k, v = attention.in_proj_weight.split(6)
    expected = 0
    for weight in (q, k, v, attention.out_proj.weight, shared.weight):
        expected = expected + (torch.linalg.svdvals(weight) ** 2 - 1).square().sum()
    assert_close(intl.orthogonality_penalty(network), expected)


# --- Diagnostics, and the module as a file of its own


def test_the_diagnostics_of_a_known_spectrum():
    """The exponential of the entropy of the shares 1/2, 1/4, 1/8, 1/8 is 2^(7/4)."""
    l = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    rotation, _ = torch.linalg.qr(randn(5, 5))
    z = orthonormal_rows(5, 50).T * (49 * l).sqrt() @ rotation + 3  # (50, 5)
    views = torch.stack([z, 2 * z])
    assert_close(intl.spectrum(views), torch.stack([l, 4 * l]))
    assert intl.spectrum(z)[-1] == 0  # exactly
    assert intl.effective_rank(views).tolist() == pytest.approx([2**1.75, 2**1.75])
    assert intl.condition_number(views).tolist() == pytest.approx([4, 4])


def test_intl_py_copied_alone_demonstrates_that_intl_keeps_the_rank(tmp_path):
    shutil.copy(HERE / "intl.py", tmp_path)
    script = tmp_path / "demonstrate.py"
    script.write_text(
        "import sys\n"
        "absent = ['numpy', 'torchvision', 'train', 'pycocotools']\n"
        "sys.modules.update(dict.fromkeys(absent))  # to import them is an error\n"
        "import intl\n"
        "intl.demonstrate(steps=60)\n"
    )
    lines = run(script).splitlines()[1:]
    ranks = {line[:24].strip(): float(line[24:46]) for line in lines}
    assert ranks["no transformation"] < 16
    assert ranks["IterNorm alone, T = 4"] < 20
    assert ranks["INTL, T = 4"] > 40


# --- What is refused
REFUSED = [
    ("INTLLoss(axis='rows')", "got 'rows'"),
    ("SpectralLoss(0.5, axis=0)", "got 0"),
    ("iter_norm(z, axis='rows')", "got 'rows'"),
    ("whiten(z, axis='rows')", "got 'rows'"),
    ("INTLLoss(iterations=11)", "from 1 to 10, got 11"),
    ("iter_norm(z, iterations=11)", "from 1 to 10, got 11"),
    ("INTLLoss()([z])", "two or more views", "[(8, 20)]"),
    ("INTLLoss()([z, z[:, 1:]])", "one shape", "[(8, 20), (8, 19)]"),
    ("INTLLoss()([z[:, 1:]], teacher=z)", "teacher's included", "[(8, 20), (8, 19)]"),
    ("INTLLoss()([z[None], z[None]])", "(m, d)", "[(1, 8, 20), (1, 8, 20)]"),
    ("INTLLoss(beta=1)([z[:1], z[:1]])", "at least 2 samples", "(2, 1, 20)"),
    ("INTLLoss(beta=1)([z[:, :1], z[:, :1]])", "2 channels", "(2, 8, 1)"),
    ("iter_norm(z.long())", "floating-point", "torch.int64", "(8, 20)"),
    ("effective_rank(z[0])", "(m, d) or (V, m, d)", "(20,)"),
    ("INTLLoss()([z, z])", "n is 8", "(8, 20)", "give beta", "drop_last=True"),
    ("spectral_transform(z, torch.sum)", "keep the shape (8,), got ()"),
    ("group_whiten(z, 3)", "20 channels / 3 groups"),
    ("group_whiten(z, 4)", "8 samples", "20 channels / 4 groups"),
    ("CWRGPLoss(sub_batch=3)([z, z])", "global batch of 8 rows, got 3"),
    ("orthogonality_penalty(nn.ReLU())", "ReLU has no Conv2d or Linear weight"),
    ("orthogonality_penalty(nn.Linear(2, 2), 'norm')", "got 'norm'"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_bad_input_is_a_value_error_that_names_it(case):
    call, *fragments = case
    with pytest.raises(ValueError) as refused:
        eval(call, {**vars(intl), "z": randn(8, 20)})
    for fragment in fragments:
        assert fragment in str(refused.value)


def test_one_tensor_in_place_of_a_list_is_refused():
    z = randn(8, 20)
    with pytest.raises(TypeError, match=r"loss\(\[z1, z2\]\), got one tensor of shape \(8, 20\)"):
        intl.INTLLoss()(z, z)


# --- Several processes
SCRIPT_OF_A_PROCESS = """
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

import intl

LOSSES = [  # and whether view 0 is a teacher's
    (intl.INTLLoss(), False),
    (intl.INTLLoss(), True),
    (intl.INTLLoss(axis="batch"), False),
    (intl.SpectralLoss(0.4), False),
    (intl.SpectralLoss(0.4), True),
    (intl.CWRGPLoss(groups=2, sub_batch=6, repeats=2), False),
]


def losses_and_gradients(batch, rank=0, world=1, group=None):
    # The processes of the group share the samples. Gradients are those of weights under DDP.
    results = []
    for loss, teacher in LOSSES:
        torch.manual_seed(0)
        network = nn.Linear(16, 28, bias=False).double()
        weight = network.weight
        if world > 1:
            network = nn.parallel.DistributedDataParallel(network, process_group=group)
        torch.manual_seed(rank)  # CW-RGP must use the random numbers of the first process
        views = list(network(batch.chunk(world, dim=1)[rank]))
        value = loss(views[1:], views[0], group) if teacher else loss(views, group=group)
        value.backward()
        results.append((value.detach(), weight.grad))
    return results


torch.manual_seed(0)
batches = torch.randn(2, 3, 12, 16, dtype=torch.float64)  # of 3 views
expected = [losses_and_gradients(batch) for batch in batches]
world = int(os.environ["WORLD_SIZE"])
few = batches[0, :, :world]  # one sample for each process
loss = intl.INTLLoss(beta=0.1)
expected_of_few = loss(list(few))

dist.init_process_group("gloo")
rank = dist.get_rank()
assert_close(loss(list(few.chunk(world, dim=1)[rank])), expected_of_few)
found = losses_and_gradients(batches[0], rank, world)
assert_close(found, expected[0], rtol=1e-12, atol=1e-12)

# Processes of even and of odd rank train separately.
groups = [dist.new_group(list(range(parity, world, 2))) for parity in (0, 1)]
group = groups[rank % 2]
found = losses_and_gradients(batches[rank % 2], rank // 2, dist.get_world_size(group), group)
assert_close(found, expected[rank % 2], rtol=1e-12, atol=1e-12)

# All rows in rank order; the gradient of a process's own is exact.
part = batches[0].chunk(world, dim=1)[rank].requires_grad_()
gathered = intl.gather(part)
(gathered * batches[1]).sum().backward()
assert torch.equal(gathered, batches[0])
assert torch.equal(part.grad, batches[1].chunk(world, dim=1)[rank])
"""


@pytest.mark.parametrize("world", [2, 3])
def test_losses_and_gradients_over_processes_equal_one_process(world, tmp_path):
    script = tmp_path / "process.py"
    script.write_text(SCRIPT_OF_A_PROCESS)
    run(script, processes=world)


# --- train.py: flags, recipes, schedules and losses -----------------------------------------------

PUBLISHED = json.loads((HERE / "evidence" / "published_settings.json").read_text())


def parse_cifar(flags=""):
    """The settings of the recipe cifar10 with these flags, on the CPU."""
    return train.parse(["--recipe", "cifar10", "--device", "cpu", *flags.split()])


@pytest.mark.parametrize("name", sorted({*train.RECIPES} - {"shapes"}))
def test_a_recipe_has_its_published_settings(name):
    settings = vars(train.parse(["--recipe", name]))
    expected = {**PUBLISHED["common"], **PUBLISHED[name]}
    assert expected.pop("covariance_weight", 0) == 0  # a part of CW-RGP that no recipe uses
    assert {field: settings[field] for field in expected} == expected


def test_a_flag_overrides_the_recipe_and_a_list_is_repeated_over_the_views():
    flags = "--view-sizes 32 16 16 --min-scale 0.3 0.2 --max-scale 0.9 --blur 0 0.1 0.2"
    args = parse_cifar(f"{flags} --solarize 0.1 0 0 0.7")
    assert args.min_scale == [0.3, 0.2, 0.3]
    assert args.max_scale == [0.9, 0.9, 0.9]
    assert args.blur == [0, 0.1, 0.2]
    assert args.solarize == [0.1, 0, 0]


REFUSED_FLAGS = {
    "--gray 7": "argument --gray: 7 is not between 0 and 1",
    "--jitter 0 0 0 0.6": "the hue's strength is at most 0.5",
    "--beta -1": "argument --beta: -1 is not between 0 and inf",
    "--warmup-epochs 9 --epochs 9": "--epochs must exceed --warmup-epochs",
    "--max-steps 0": "argument --max-steps: 0 is not at least 1",
    "--view-sizes 16": "--view-sizes needs two values or more",
    "--loss cwrgp --ema 0.9": "--ema: CW-RGP has no teacher",
    "--loss cwrgp --axis batch": "--axis: CW-RGP whitens over the channels only",
    "--orthogonality-weight 1": "--orthogonality-weight needs --orthogonality",
    "--power nan": "argument --power: nan is not between 0 and inf",
    "--batch-size 8": "the published beta needs a batch of more than 8",
    "--cuda-graph": "--cuda-graph needs a GPU",
    "--cuda-graph --device cuda --precision float32 --loss whiten": "an eigendecomposition",
    "--arch vit_b_16": "argument --arch: invalid choice: 'vit_b_16'",
}


@pytest.mark.parametrize("flags, message", REFUSED_FLAGS.items())
def test_flags_that_make_no_sense_are_refused(flags, message, capsys):
    assert exit_line(parse_cifar, flags) == "2"
    assert message in capsys.readouterr().err


def test_a_batch_that_the_processes_cannot_share_equally_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 3)
    assert parse_cifar("--batch-size 255").batch_size == 255
    assert exit_line(parse_cifar, "--batch-size 256") == "2"
    assert "must be a multiple of the number of processes, 3" in capsys.readouterr().err


def test_the_learning_rate_drops_at_milestones_and_adam_does_not_scale_it_by_the_batch():
    args = train.parse("--recipe cwrgp-cifar10 --batch-size 512".split())
    expected = {0: 6e-6, 499: 3e-3, 185_249: 3e-3, 185_250: 6e-4, 190_125: 1.2e-4}
    rates = {step: train.learning_rate(step, 195, args) for step in expected}
    assert rates == pytest.approx(expected)


def test_the_losses_that_can_be_chosen_are_what_their_help_says():
    z = randn(2, 12, 16)
    newton = intl.iter_norm(z, iterations=3, axis="batch")
    transformed = {
        "none": z - z.mean(1, keepdim=True),
        "whiten": intl.whiten(z, axis="batch"),
        "power": intl.spectral_transform(z, intl.power(0.3), axis="batch"),
        "iternorm": newton,
        "intl": newton,
    }
    args = parse_cifar("--axis batch --power 0.3 --iterations 3 --beta 0.2")
    for name, z_hat in transformed.items():
        expected = 2 - 2 * F.cosine_similarity(*z_hat).mean()
        if name == "intl":
            expected = expected + 0.2 * intl.trace_loss(newton, axis="batch").sum()
        assert_close(train.LOSSES[name](args)(list(z)), expected, msg=name)


# --- The rule for --data --------------------------------------------------------------------------


def load_files(folder, names):
    write_images(folder, names)
    return train.load_data("folder", folder, 0)


TWO_CLASSES = ["train/cat/a.png", "train/cat/b.JPG", "train/dog/deeper/a.png"]


@pytest.mark.parametrize("dataset", ["folder", "cifar10"])
def test_train_and_val_are_read_with_their_classes_and_counted(dataset, tmp_path, capsys):
    write_images(tmp_path, [*TWO_CLASSES, "val/cat/c.png", "val/dog/d.png", "test/1.png"])
    (tmp_path / "val" / "annotations.txt").write_text("a table beside the class folders")
    train_set, val_set = train.load_data(dataset, tmp_path, 0)
    assert train_set.classes == val_set.classes == ["cat", "dog"]
    assert train_set.targets.tolist() == [0, 0, 1]
    assert [label for _, label in val_set] == val_set.targets.tolist() == [0, 1]
    expected = np.array(Image.open(tmp_path / "val" / "dog" / "d.png"))
    assert np.array_equal(val_set[1][0].permute(1, 2, 0).numpy(), expected)

    printed = capsys.readouterr().out
    assert f"{tmp_path / 'train'}: 3 images of 2 classes" in printed
    assert f"{tmp_path / 'test'} is not used" in printed


def test_without_val_there_is_no_validation_and_a_line_says_so(tmp_path, capsys):
    train_set, val_set = load_files(tmp_path, TWO_CLASSES)
    assert val_set is None
    assert "has no val/: no k-NN" in capsys.readouterr().out


def test_a_tree_without_train_is_read_whole_and_has_no_labels(tmp_path, capsys):
    images, val_set = load_files(tmp_path, ["a.png", "cat/b.png", "x/y/c.PNG"])
    assert [label for _, label in images] == [-1, -1, -1]
    assert val_set is None
    assert f"{tmp_path}: 3 unlabeled images, no k-NN" in capsys.readouterr().out


REFUSED_FOLDERS = {
    "an empty folder": ([], "contain no images"),
    "an image beside train/": ([*TWO_CLASSES, "c.png"], "c.png"),
    "an image beside class folders": ([*TWO_CLASSES, "train/c.png"], "c.png would not be used"),
    "Tiny-ImageNet's val/": ([*TWO_CLASSES, "val/images/a.png"], "one class folder only, images/"),
    "other classes in val/": (
        [*TWO_CLASSES, "val/cat/a.png", "val/wolf/a.png"],
        "2 are in one of them only, such as dog, wolf",
    ),
    "val/ of another name": ([*TWO_CLASSES, "Val/cat/a.png"], "has images in Val/, beside train/"),
    "test/ without val/": ([*TWO_CLASSES, "test/cat/a.png"], "has images in test/, beside train/"),
    "a split without train/": (["val/cat/a.png", "val/dog/a.png"], "val is named like a part"),
    "splits further down": (["photos/cat/a.png", "photos/test2017/a.png"], "test2017 is named"),
    "splits of other names": (
        ["training_set/a.png", "test_set/a.png"],
        "_set is named like a part",
    ),
}


@pytest.mark.parametrize("names, message", REFUSED_FOLDERS.values(), ids=REFUSED_FOLDERS)
def test_a_folder_that_does_not_fit_the_rule_is_refused(names, message, tmp_path):
    assert message in exit_line(load_files, tmp_path, names)


def test_linked_folders_are_read_but_a_loop_is_refused(tmp_path):
    write_images(tmp_path, ["elsewhere/a.png", "photos/b.png"])
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    images, _ = train.load_data("folder", tmp_path / "photos", 0)
    assert len(images) == 2
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "photos")
    line = exit_line(train.load_data, "folder", tmp_path / "photos", 0)
    assert "loop is a link to a folder whose images would count twice" in line


def test_data_that_is_not_there_or_not_wanted_is_refused(tmp_path):
    missing = tmp_path / "missing"
    assert f"{missing} is not a folder" in exit_line(train.load_data, "folder", missing, 0)
    assert "needs --data FOLDER" in exit_line(train.load_data, "cifar10", None, 0)
    assert "draws its own images" in exit_line(train.load_data, "shapes", tmp_path, 0)


def test_a_data_set_is_recognized_by_its_names_wherever_it_lies(tmp_path):
    images, _ = load_files(tmp_path / "here", TWO_CLASSES)
    moved, _ = load_files(tmp_path / "moved", TWO_CLASSES)
    other, _ = load_files(tmp_path / "other", [*TWO_CLASSES[:2], "train/dog/b.png"])
    assert moved.digest == images.digest
    assert other.digest != images.digest


# --- Image files and torchvision's data sets ------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_images_are_converted_as_pillow_does_it(mode, tmp_path):
    write_images(tmp_path, ["rgb.png"])
    path = tmp_path / "image.png"
    Image.open(tmp_path / "rgb.png").convert(mode).save(path)
    expected = np.array(Image.open(path).convert("RGB"))
    assert np.array_equal(train.decode_image(str(path)).permute(1, 2, 0).numpy(), expected)


def test_images_of_more_than_8_bits_are_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((16, 16), dtype=np.uint16)).save(tmp_path / "depth.tif")
    with pytest.raises(RuntimeError, match="depth.tif .*convert it to 8 bits per channel"):
        train.decode_image(str(tmp_path / "depth.tif"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    images, _ = load_files(tmp_path, ["a.png", "b.png"])
    torn = tmp_path / "b.png"
    torn.write_bytes(torn.read_bytes()[:200])
    with pytest.raises(RuntimeError, match=r"b\.png cannot be read as an image: "):
        list(train.eval_loader(images, "folder", 16, workers=1))


def test_cifar10_is_read_from_torchvisions_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *arguments: True)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    rows = pixels.reshape(7, -1)
    files = {f"data_batch_{i + 1}": {"data": rows[[i]], "labels": [i % 2]} for i in range(5)}
    files["test_batch"] = {"data": rows[5:], "labels": [1, 0]}
    files["batches.meta"] = {"label_names": ["plane", "car"]}
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))

    train_set, val_set = train.load_data("cifar10", tmp_path, 0)
    assert train_set.targets.tolist() == [int(y) for _, y in train_set] == [0, 1, 0, 1, 0]
    assert val_set.targets.tolist() == [1, 0]
    found = torch.stack([image for image, _ in [*train_set, *val_set]])
    assert np.array_equal(found.numpy(), pixels)
    assert train_set.classes == ["plane", "car"]


def test_stl10_trains_on_unlabeled_images_too_unless_labels_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.stl10, "check_integrity", lambda *arguments: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, n in (("train", 2), ("unlabeled", 3), ("test", 1)):
        np.zeros((n, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{name}_X.bin")
    np.array([2, 1], dtype=np.uint8).tofile(folder / "train_y.bin")
    np.array([2], dtype=np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\n")

    train_set, val_set = train.load_data("stl10", tmp_path, 0)
    assert train_set.targets.tolist() == [1, 0, -1, -1, -1]
    assert val_set.targets.tolist() == [1]
    train_set, _ = train.load_data("stl10", tmp_path, 0, labeled=True)
    assert train_set.targets.tolist() == [1, 0]


# --- Order and crops ------------------------------------------------------------------------------


def test_an_epoch_takes_every_image_at_most_once_in_an_order_of_its_own():
    """Steps of 6 images among 20: 3 steps an epoch, which leave 2 images."""
    rows = torch.arange(20)
    steps = list(train.batch_indices(rows, 6, seed=0, first_step=0, stop_step=6))
    for epoch in range(2):
        keys = list(itertools.chain(*steps[3 * epoch : 3 * epoch + 3]))
        assert {number for number, _ in keys} == {epoch}
        assert len({*keys}) == 18
    assert [i for _, i in steps[0]] != [i for _, i in steps[3]]
    assert steps[:1] != list(train.batch_indices(rows, 6, seed=1, first_step=0, stop_step=1))


@pytest.mark.parametrize("workers, interpolation", [(0, "bicubic"), (2, "bilinear")])
def test_crops_are_torchvisions_for_any_number_of_workers(workers, interpolation, photos):
    images, _ = train.load_data("folder", photos, 0)
    flags = "--view-sizes 16 12 --min-scale 0.2 0.1 --max-scale 1 0.3 --interpolation"
    crops = train.random_crops(parse_cifar(f"{flags} {interpolation}"))
    views = train.MultiViewDataset(images, crops, seed=7)
    keys = list(train.batch_indices(torch.arange(len(images)), 4, 7, 2, 5))
    batches = train.make_loader(views, workers, batch_sampler=keys)

    mode = v2.InterpolationMode(interpolation)
    first = v2.RandomResizedCrop(16, (0.2, 1.0), interpolation=mode)
    second = v2.RandomResizedCrop(12, (0.1, 0.3), interpolation=mode)
    for step_keys, ((large, small), labels) in zip(keys, batches, strict=True):
        for i, (epoch, index) in enumerate(step_keys):
            image, label = images[index]
            torch.manual_seed(train.seed_from(7, "crop", epoch, index))
            assert torch.equal(large[i], first(image))
            assert torch.equal(small[i], second(image))
            assert labels[i] == label


# --- Augmentation against torchvision, image by image ---------------------------------------------


JITTER_NAMES = ("brightness", "contrast", "saturation", "hue")


def smooth_and_noisy(n=24, size=32):
    """Pictures (n, 3, size, size) in [0, 1], on a grid of 255ths: smooth, noise, and plain ones."""
    noise = torch.randint(
        0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    smooth = TF.resize(noise[: n // 2, :, :5, :5], [size, size], antialias=True)
    plain = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [90, 90, 20]])
    noise[-4:] = plain[:, :, None, None].to(torch.uint8)
    return torch.cat([smooth, noise[n // 2 :]]) / 255


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def by_image(function, x, *numbers):
    """function(image, number, ...) for each image of x, with its own numbers."""
    columns = [column.flatten().tolist() for column in numbers]
    return torch.stack([function(image, *row) for image, *row in zip(x, *columns)])


@pytest.mark.parametrize("name", JITTER_NAMES)
def test_color_jitter_equals_torchvision(name):
    x = smooth_and_noisy()
    amount = uniform(24, 1, 1, 1) - 0.5
    got = getattr(train, f"adjust_{name}")(x, amount)
    factor = amount if name == "hue" else 1 + amount
    assert_close(got, by_image(getattr(TF, f"adjust_{name}"), x, factor), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [7, 32])
def test_blur_equals_torchvision(size):
    x = smooth_and_noisy(size=size)
    sigma = 0.1 + 1.9 * uniform(24, 1, 1, 1)
    expected = by_image(lambda image, s: TF.gaussian_blur(image, [13, 13], [s, s]), x, sigma)
    assert_close(train.gaussian_blur(x, sigma), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threshold", [128, 0])
def test_the_end_of_a_view_is_torchvisions_gray_blur_solarize_flip_and_normalize(threshold):
    """Each of the 16 combinations in 4 images; the numbers 0.2 and 0.8 mean yes and no."""
    x = smooth_and_noisy(64, 16)
    combinations = torch.tensor(list(itertools.product([0.2, 0.8], repeat=4)) * 4).T
    gray, blur, solarize, flip = combinations[..., None, None, None]
    sigma = 0.5 + uniform(64, 1, 1, 1)
    numbers = torch.stack([gray, blur, (sigma - 0.1) / 1.9, solarize, flip])
    got = train.finish_view(x, numbers, 0.5, 0.5, 0.5, threshold, "folder")

    def torchvisions(image, gray, blur, solarize, flip, sigma):
        if gray < 0.5:
            image = TF.rgb_to_grayscale(image, 3)
        if blur < 0.5:
            image = TF.gaussian_blur(image, [13, 13], [sigma, sigma])
        if solarize < 0.5:
            image = TF.solarize(image, threshold / 255)
        if flip < 0.5:
            image = TF.horizontal_flip(image)
        return TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    expected = by_image(torchvisions, x, gray, blur, solarize, flip, sigma)
    different = ((got - expected).abs() > 1e-4).float().mean()
    assert different < 1e-3  # a rounding error may lie across the threshold


def test_the_jitter_is_uniform_up_to_its_strengths():
    strengths = [0.4, 0.3, 0.2, 0.1]
    amounts = train.jitter_amounts(uniform(5, 20_000, 1, 1, 1), 0.8, strengths)
    table = torch.stack(amounts).reshape(4, -1)
    applied = table[0] != 0
    assert applied.float().mean() == pytest.approx(0.8, abs=0.012)
    assert torch.equal(table != 0, applied.expand(4, -1))  # all four, or none
    for values, strength in zip(table[:, applied].sort().values, strengths):
        line = torch.linspace(-strength, strength, len(values))
        assert (values - line).abs().max() < 0.0155 * 2 * strength  # Kolmogorov and Smirnov


NO_OPERATION = "--jitter-prob 0 --gray 0 --blur 0 --solarize 0"


@pytest.mark.parametrize(
    "flags, mirrored, expected",
    [
        ("", True, 0),
        ("", False, 0.5),  # flips
        ("--jitter-prob 0.7", True, 0.7),
        ("--gray 0.3", True, 0.3),
        ("--blur 0 0.4", True, 0.4 * 0.93),  # the others are too narrow to change a pixel
        ("--solarize 0 0.2", True, 0.2),
    ],
)
def test_an_operation_is_applied_to_each_image_with_its_probability(flags, mirrored, expected):
    """In view 1 of 4,000 copies of a picture with two rows, or two columns, in turn."""
    picture = torch.tensor([[[10]], [[200]], [[90]]], dtype=torch.uint8).repeat(1, 8, 8)
    picture[:, ::2] //= 2
    if not mirrored:
        picture = picture.mT
    args = parse_cifar(f"{NO_OPERATION} --batch-size 4000 --view-sizes 8 8 {flags}")
    views = train.Augmentation(args)([picture.expand(4000, 3, 8, 8)] * 2, 3, CPU)
    unchanged = train.normalize(picture[None] / 255, "cifar10")
    changed = ((views[1] - unchanged).abs() > 1e-3).flatten(1).any(1)
    tolerance = 4 * (0.25 / 4000) ** 0.5 if expected else 0
    assert changed.float().mean().item() == pytest.approx(expected, abs=tolerance)


def test_augmentation_depends_on_the_seed_the_step_and_the_view_only():
    crops = [(255 * smooth_and_noisy()).to(torch.uint8)] * 2
    args = parse_cifar("--batch-size 24")
    first, second = train.Augmentation(args)(crops, 5, CPU)
    assert not torch.equal(second, first)
    torch.manual_seed(1)
    assert torch.equal(train.Augmentation(args)(crops, 5, CPU)[0], first)
    assert not torch.equal(train.Augmentation(args)(crops, 6, CPU)[0], first)
    args.seed = 1
    assert not torch.equal(train.Augmentation(args)(crops, 5, CPU)[0], first)


# --- Evaluation images and nearest neighbors ------------------------------------------------------


def numbered_images(n, size=(8, 8)):
    """n pictures (3, height, width) whose label is their number."""
    pixels = (255 * uniform(n, 3, *size)).to(torch.uint8)
    return train.in_memory_dataset(pixels, [*range(n)], [])


@pytest.mark.parametrize(
    "dataset, resized, size", [("folder", 256, 224), ("stl10", 70, 64), ("cifar10", 32, 32)]
)
def test_images_are_cropped_for_evaluation_as_torchvision_does_it(dataset, resized, size):
    images = numbered_images(2, (50, 70))
    ((x,), labels) = next(iter(train.eval_loader(images, dataset, size, 0)))
    transform = v2.Compose([v2.Resize(resized), v2.CenterCrop(size)])
    assert torch.equal(x, transform(images.tensors[0]))
    assert labels.tolist() == [0, 1]


def test_fewer_images_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 3)
    message = exit_line(train.eval_loader, numbered_images(2), "cifar10", 8, 0)
    assert message == "2 images for 3 processes: every process needs one"


def knn_by_brute_force(bank, bank_labels, queries, query_labels, k, temperature):
    """A query, a row and a vote at a time."""
    correct = 0
    for query, label in zip(queries, query_labels.tolist()):
        cosines = F.cosine_similarity(query, bank).tolist()
        votes = [0.0] * 4
        for i in (query - bank).square().sum(1).argsort()[:k].tolist():
            votes[bank_labels[i]] += math.exp(cosines[i] / temperature) if temperature else 1
        if votes.index(max(votes)) == label:
            correct += 1
    return 100 * correct / len(queries)


@pytest.mark.parametrize("k", [1, 5, 500])
@pytest.mark.parametrize("temperature", [None, 0.07])
def test_nearest_neighbors_equal_a_brute_force_search(k, temperature):
    """300 queries, more than are compared at once, and a bank of 200, fewer than 500."""
    bank = randn(200, 6)
    queries = randn(300, 6, seed=1)
    if temperature:
        bank = F.normalize(bank)
        queries = F.normalize(queries)
    problem = (bank, torch.arange(200) % 4, queries, torch.arange(300) % 4, k, temperature)
    assert train.knn_top1(*problem) == pytest.approx(knn_by_brute_force(*problem))


# --- Networks -------------------------------------------------------------------------------------


STEM_SIZES = {"imagenet": 8, "cifar": 32, "cifar-pool": 16, "cifar-padded": 34, "small": 8}


@pytest.mark.parametrize("stem, size", STEM_SIZES.items())
def test_a_stem_reduces_32_pixels(stem, size):
    net, width = train.build_backbone("resnet10", stem)
    sizes = []
    net.layer1.register_forward_hook(lambda layer, x, y: sizes.append(y.shape[2:]))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, width) == (2, 512)
    assert sizes == [(size, size)]


def tiny_network(flags=""):
    torch.manual_seed(0)
    args = f"--arch resnet10 --stem small --hidden 8 --out 6 --view-sizes 16 16 {flags}"
    return train.Network(parse_cifar(args))


@pytest.mark.parametrize("zero", [True, False])
def test_residual_branches_start_at_zero_if_asked(zero):
    net = tiny_network("--zero-init-residual" if zero else "").backbone
    assert bool((net.layer4[0].bn2.weight == 0).all()) == zero


@pytest.mark.parametrize("joint", [True, False])
def test_batch_norm_sees_one_view_at_a_time_but_all_in_a_joint_head(joint):
    views = list(randn(3, 8, 3, 16, 16, dtype=torch.float32))
    network = tiny_network("--joint-head" if joint else "")
    features = [network.backbone(view) for view in views]
    expected = [network.projector(x) for x in features]
    if joint:
        expected = network.projector(torch.cat(features)).chunk(3)
    assert_close(network(views), list(expected))


@pytest.mark.parametrize("joint", [True, False])
def test_the_projector_has_batch_norm_and_relu_between_its_layers(joint):
    network = tiny_network("--joint-head" if joint else "")
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in network.projector] == [*hidden, *hidden, nn.Linear]
    linears = network.projector[::3]
    assert [layer.weight.shape for layer in linears] == [(8, 512), (8, 8), (6, 8)]
    assert [layer.bias is not None for layer in linears] == [joint, joint, True]
    assert len(tiny_network("--layers 1").projector) == 1


# --- Runs of train.py -----------------------------------------------------------------------------

TEACHER = "--ema 0.9 --view-sizes 16 16 12"


def photo_argv(photos, folder, flags=""):
    """Arguments of a run of three epochs with two steps each."""
    fixed = "--dataset folder --batch-size 8 --epochs 3 --base-lr 1 --beta 0.2"
    return [*TINY, *fixed.split(), "--data", str(photos), "--output", str(folder), *flags.split()]


def steps_with_loss(folder):
    return [line["step"] for line in log_lines(folder) if "loss" in line]


def logged_losses(folder):
    return [line["loss"] for line in log_lines(folder) if "loss" in line]


def bytes_by_name(folder):
    """The files of a run, without its lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def assert_same_end(folder, expected_folder):
    """The last checkpoint and backbone.pt are bitwise those of another run; nothing is left."""
    got = load(folder / "checkpoint.pt")
    expected = load(expected_folder / "checkpoint.pt")
    assert got.pop("config") == expected.pop("config")
    assert_close(got, expected, rtol=0, atol=0)
    backbone = load(expected_folder / "backbone.pt")
    assert_close(load(folder / "backbone.pt"), backbone, rtol=0, atol=0)
    assert list(folder.glob("*.tmp")) == []


@pytest.fixture
def float64():
    """train.main then trains in float64: rounding does not change the sign of a ReLU's input."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def photo_run(photos, tmp_path_factory):
    """The folder of a finished run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("photo_run")
    train.main(photo_argv(photos, folder, "--log-every 3 --evaluate-every 2"))
    return folder


# The training step.


def intl_loss_by_hand(z, beta, has_teacher):
    """INTL's loss of views z[0], z[1], ..., of which a teacher embeds the first."""
    z_hat = [intl.iter_norm_by_definition(view) for view in z]
    terms = []
    for view in z_hat[1:]:
        alignment = 2 - 2 * F.cosine_similarity(view, z_hat[0], dim=1).mean()
        trace = (1 - view.var(dim=1)).square().sum()
        terms.append(alignment + beta * trace)
    loss = sum(terms) / len(terms)
    if not has_teacher:
        loss = loss + beta * (1 - z_hat[0].var(dim=1)).square().sum()
    return loss


def learning_rate_by_hand(step):
    """One epoch (two steps) of warm-up, then a cosine over two epochs."""
    peak = 1.0 * 8 / 256
    if step < 2:
        return peak * (step + 1) / 2
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * (step - 1) / 4)) / 2)


def train_by_hand(args, views_of_steps):
    """SGD by its formulas. Returns the losses, the network and the teacher."""
    torch.manual_seed(args.seed)
    network = train.Network(args)
    teacher = copy.deepcopy(network)
    velocities = [torch.zeros_like(w) for w in network.parameters()]
    losses = []
    for step, views in enumerate(views_of_steps):
        z = []
        if args.ema:
            momentum = 1 - (1 - args.ema) * (1 + math.cos(math.pi * step / 6)) / 2
            with torch.no_grad():
                for t, w in zip(teacher.parameters(), network.parameters()):
                    t.copy_(momentum * t + (1 - momentum) * w)
                z.append(teacher.projector(teacher.backbone(views[0])))
            views = views[1:]
        for view in views:
            z.append(network.projector(network.backbone(view)))
        loss = intl_loss_by_hand(z, args.beta, has_teacher=args.ema > 0)
        if args.orthogonality:
            penalty = intl.orthogonality_penalty(network.backbone, args.orthogonality)
            loss = loss + args.orthogonality_weight * penalty
        losses.append(loss.item())

        weights = list(network.parameters())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, velocity, gradient in zip(weights, velocities, gradients):
                if args.decay_all or w.ndim > 1:
                    gradient = gradient + args.weight_decay * w
                velocity.copy_(0.9 * velocity + gradient)
                w.sub_(learning_rate_by_hand(step) * velocity)
    return losses, network, teacher


@pytest.mark.parametrize(
    "flags",
    ["--orthogonality so --orthogonality-weight 0.001", f"--no-decay-all {TEACHER}"],
    ids=["two views and a penalty", "three views and a teacher"],
)
def test_steps_equal_an_independent_computation(flags, photos, tmp_path, monkeypatch, float64):
    views_of_steps = []
    augment = train.Augmentation.__call__

    def recorded(self, pixels, step, device):
        views = augment(self, pixels, step, device)
        views_of_steps.append(views)
        return views

    monkeypatch.setattr(train.Augmentation, "__call__", recorded)
    fixed = "--warmup-epochs 1 --max-steps 4 --weight-decay 0.01"
    argv = photo_argv(photos, tmp_path, f"{fixed} {flags}")
    train.main(argv)
    losses, network, teacher = train_by_hand(train.parse(argv), views_of_steps)

    saved = load(tmp_path / "checkpoint.pt")
    assert logged_losses(tmp_path) == pytest.approx(losses, rel=1e-4)
    assert_close(saved["network"], dict(network.state_dict()), rtol=1e-9, atol=1e-11)
    if "ema" in flags:
        assert_close(saved["teacher"], dict(teacher.state_dict()), rtol=1e-9, atol=1e-11)


METHODS = {
    "power on the batch axis": "--loss power --power 0.45 --axis batch",
    "iternorm": "--loss iternorm --iterations 9",
    "no whitening, joint head": "--loss none --joint-head --layers 2",
    "intl on the batch axis": "--axis batch --beta 0.01",
    # Of 16 pixels the last maps are 1 x 1, where oneDNN's bfloat16 gradients are not always finite.
    "bfloat16": "--precision bfloat16 --view-sizes 32 32",
}


@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS.keys())
def test_every_method_trains(flags, photos, tmp_path):
    """A loss that is not finite would end the run."""
    train.main(photo_argv(photos, tmp_path, f"--max-steps 2 --base-lr 0.01 {flags}"))
    assert steps_with_loss(tmp_path) == [1, 2]


# What a run prints and writes.


def printed_about_loss(flags, capsys):
    train.describe_loss(train.parse(flags.split()))
    return capsys.readouterr().out


def test_a_beta_that_permits_a_collapse_is_warned_of(capsys):
    printed = printed_about_loss("--batch-size 16", capsys)
    assert "the embedding may collapse" in printed
    recommended = re.search(r"--beta (\S+)", printed)[1]
    assert float(recommended) == pytest.approx(intl.balanced_beta(16, 4), abs=2e-4)
    assert "WARNING" not in printed_about_loss(f"--batch-size 16 --beta {recommended}", capsys)


def test_the_printed_loss_is_at_least_the_floor_of_its_trace_loss(capsys):
    """The published floor is 209.6."""
    printed = printed_about_loss("--recipe cifar10", capsys)
    assert re.search(r"loss = alignment \+ 2 x 0.05 x trace.* 20.96", printed)
    printed = printed_about_loss("--recipe cifar10 --ema 0.99", capsys)
    assert re.search(r"loss = alignment \+ 1 x 0.05 x trace.* 10.48", printed)


def test_published_recipes_are_not_warned_of(capsys):
    for name, recipe in train.RECIPES.items():
        if recipe.get("loss", "intl") == "intl" and name != "shapes":
            assert "WARNING" not in printed_about_loss(f"--recipe {name}", capsys)


def test_a_collapsed_embedding_is_warned_of(photos, tmp_path, capsys):
    """Two channels have an effective rank of two at most."""
    train.main(photo_argv(photos, tmp_path, "--max-steps 1 --axis batch --out 2"))
    assert "the embedding has collapsed" in capsys.readouterr().out


def test_config_json_is_the_configuration_of_the_checkpoint(photo_run):
    config = json.loads((photo_run / "config.json").read_text())
    assert config == load(photo_run / "checkpoint.pt")["config"]
    assert config["data"].startswith("16 images, ")


def test_backbone_pt_is_the_network_of_torchvision_without_its_classifier(photos, tmp_path):
    flags = "--arch resnet18 --stem imagenet --view-sizes 32 32 --max-steps 1"
    train.main(photo_argv(photos, tmp_path, flags))
    backbone = torchvision.models.resnet18()
    result = backbone.load_state_dict(load(tmp_path / "backbone.pt"), strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"]
    assert result.unexpected_keys == []


def test_a_log_has_date_machine_and_command_and_numbers_every_few_steps_and_epochs(photo_run):
    first, *lines = log_lines(photo_run)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", first["date"])
    assert first["machine"].startswith("1 x ")
    assert first["command"] == shlex.join(sys.argv)

    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [3, 4, 6]
    assert [line["epoch"] for line in steps] == [1.5, 2, 3]
    for line in steps:
        assert line["loss"] == pytest.approx(line["alignment"] + 0.4 * line["trace"], rel=1e-3)
        assert 0 <= line["waiting"] < 1
        left = (6 - line["step"]) * 8 / line["images_per_second"] / 3600
        assert line["hours_left"] == pytest.approx(left, rel=1e-3)

    evaluations = [line for line in lines if "feature_rank" in line]
    assert [line["epoch"] for line in evaluations] == [0, 2, 3]
    for line in evaluations:
        assert 0 <= line["knn_top1"] <= 100
        assert 1 <= line["feature_rank"] <= 8  # of 8 validation images
    assert 1 <= evaluations[-1]["embedding_rank"] <= 8
    assert evaluations[-1]["condition_number"] >= 1
    assert len(evaluations[-1]["spectrum"]) > 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_the_labels_of_workers_keep_no_files_open(photos):
    open_files = []
    backbone = nn.Flatten()
    backbone.register_forward_hook(lambda *_: open_files.append(len(os.listdir("/proc/self/fd"))))
    images, _ = train.load_data("folder", photos, 0)
    views = train.MultiViewDataset(images, [v2.CenterCrop(16)])
    loader = train.make_loader(views, 1, batch_size=1, sampler=[(0, i) for i in range(16)])
    train.extract_features(backbone, loader, "folder", CPU, "float32")
    assert open_files[-1] < open_files[0] + 8


# Resuming and saving.


def test_a_resumed_run_ends_bitwise_like_an_undisturbed_one(photos, tmp_path):
    """It stops within an epoch. Workers may change."""
    flags = f"{TEACHER} --optimizer adam --base-lr 1e-3"
    train.main(photo_argv(photos, tmp_path / "whole", flags))
    train.main(photo_argv(photos, tmp_path / "parts", f"{flags} --max-steps 3"))
    assert load(tmp_path / "parts" / "checkpoint.pt")["step"] == 3
    train.main(photo_argv(photos, tmp_path / "parts", f"{flags} --workers 1"))
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    assert logged_losses(tmp_path / "parts") == logged_losses(tmp_path / "whole")


def test_a_float16_run_skips_overflows_and_resumes_with_its_scale(photos, tmp_path, monkeypatch):
    """Every step overflows, and halves the scale of the gradients."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    train.main(photo_argv(photos, tmp_path, "--precision float16 --max-steps 1"))
    train.main(photo_argv(photos, tmp_path, "--precision float16 --max-steps 2"))
    saved = load(tmp_path / "checkpoint.pt")
    assert saved["scaler"]["scale"] == 2.0**58
    torch.manual_seed(0)
    initial = train.Network(train.parse(photo_argv(photos, tmp_path)))
    for name, weight in initial.named_parameters():
        assert torch.equal(saved["network"][name], weight)


def test_the_command_of_a_finished_run_trains_nothing(photos, photo_run, tmp_path):
    """Only a config.json that was removed comes back."""
    folder = tmp_path / "run"
    shutil.copytree(photo_run, folder)
    (folder / "config.json").unlink()
    train.main(photo_argv(photos, folder))
    assert steps_with_loss(folder) == [3, 4, 6]
    before = bytes_by_name(photo_run)
    after = bytes_by_name(folder)
    for name in ("config.json", "backbone.pt", "checkpoint.pt"):
        assert after[name] == before[name]


def test_a_run_refuses_another_in_its_folder_and_after_a_kill_resumes_bitwise(photos, tmp_path):
    """It saves in every step; CW-RGP draws random partitions."""
    flags = "--epochs 4 --workers 1 --loss cwrgp --groups 1 --sub-batch 4 --repeats 2"
    folder = tmp_path / "killed"
    argv = photo_argv(photos, folder, f"{flags} --save-minutes 0")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), *argv],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    for line in process.stdout:
        if line.startswith("step 3 ") and "loss" in line:
            break
    os.kill(process.pid, signal.SIGSTOP)  # it has not ended before it is killed
    try:
        assert exit_line(train.main, argv).startswith(f"another run is using {folder}")
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.stdout.close()

    assert 2 <= load(folder / "checkpoint.pt")["step"] < 8
    (folder / "checkpoint.pt.tmp").write_bytes(b"half")
    train.main(argv)
    train.main(photo_argv(photos, tmp_path / "whole", flags))
    assert_same_end(folder, tmp_path / "whole")


# The first save writes config.json, then backbone.pt and checkpoint.pt, beside their places, and
# renames them.
@pytest.mark.parametrize("renaming", [1, 2, 3])
def test_an_interrupted_save_is_harmless(renaming, photos, photo_run, tmp_path, monkeypatch):
    argv = photo_argv(photos, tmp_path, "--save-minutes 0")
    replace = os.replace
    calls = itertools.count(1)

    def interrupted(source, target):
        if next(calls) == renaming:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv)
    assert list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    train.main(argv)
    assert_same_end(tmp_path, photo_run)


def test_a_run_that_diverges_ends_and_keeps_its_last_checkpoint(photos, tmp_path):
    """The first step takes the weights to 1e28, of which batch norm's variance is infinite."""
    flags = "--base-lr 1e30 --save-minutes 0"
    message = exit_line(train.main, photo_argv(photos, tmp_path, flags))
    assert re.search("the loss at step 2.* is not finite", message)
    assert "another --output and a lower learning rate" in message
    assert load(tmp_path / "checkpoint.pt")["step"] == 1


def test_weights_that_are_not_finite_are_not_saved(photos, tmp_path):
    """The loss, which is that of the weights before the step, is finite."""
    flags = "--base-lr 1e30 --weight-decay 1e30 --save-minutes 0"
    message = exit_line(train.main, photo_argv(photos, tmp_path, flags))
    assert "a weight or its momentum after step 1 is not finite" in message
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_folder_of_another_run_or_a_damaged_one_is_refused(photos, photo_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(photo_run, folder)
    before = bytes_by_name(folder)
    message = exit_line(train.main, photo_argv(photos, folder, "--seed 1 --beta 0.3"))
    assert "seed is 0, here 1; " in message
    assert "beta is 0.2, here 0.3" in message
    assert message.endswith(": choose another --output")
    assert bytes_by_name(folder) == before

    (folder / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:1000])
    message = exit_line(train.main, photo_argv(photos, folder))
    assert "checkpoint.pt cannot be read as a checkpoint" in message

    (folder / "checkpoint.pt").unlink()
    message = exit_line(train.main, photo_argv(photos, folder))
    assert "backbone.pt of a run without its checkpoint.pt: choose another --output" in message


# Several processes.

# Four runs of two processes in one start. Without batch norm, which is each process's own on a CPU,
# and in float64 they compute what one process computes.
TWO_PROCESSES = """
import functools
import sys
from pathlib import Path

import torch
from torch import nn

import train

folder, *argv = sys.argv[1:]


def pretrain(output, *flags):
    args = train.parse([*argv, "--output", f"{folder}/{output}", *flags])
    train.pretrain(args, torch.device("cpu"))


def runs(args, device):
    pretrain("batch_norm")
    try:
        pretrain("refused", "--data", f"{folder}/data{train.RANK}")
    except SystemExit as error:
        Path(f"{folder}/message{train.RANK}.txt").write_text(str(error))
    train.build_backbone = functools.partial(train.build_backbone, norm_layer=nn.Identity)
    torch.set_default_dtype(torch.float64)
    pretrain("float64", "--max-steps", "2")
    pretrain("float64")


train.launch(runs, train.parse(argv))
"""
TWO_PROCESS_FLAGS = f"{TEACHER} --base-lr 0.1 --max-steps 4 --layers 1"


@pytest.fixture(scope="module")
def two_processes(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    shutil.copytree(photos, folder / "data0")
    write_images(folder / "data1", [f"train/{kind}/x{i}.png" for kind in "ab" for i in range(8)])
    (folder / "script.py").write_text(TWO_PROCESSES)
    argv = photo_argv(photos, folder, TWO_PROCESS_FLAGS)
    run(folder / "script.py", folder, *argv, processes=2)
    return folder


def test_two_processes_train_and_resume_what_one_process_trains(
    two_processes, photos, tmp_path, monkeypatch, float64
):
    """The global batch is the same, image by image, and so is the gradient of its loss."""
    without_batch_norm = functools.partial(train.build_backbone, norm_layer=nn.Identity)
    monkeypatch.setattr(train, "build_backbone", without_batch_norm)
    train.main(photo_argv(photos, tmp_path, TWO_PROCESS_FLAGS))

    folder = two_processes / "float64"
    got = load(folder / "checkpoint.pt")
    expected = load(tmp_path / "checkpoint.pt")
    assert_close(got["network"], expected["network"], rtol=1e-8, atol=1e-11)
    assert_close(got["teacher"], expected["teacher"], rtol=1e-8, atol=1e-11)
    assert got["config"] == expected["config"]
    assert steps_with_loss(folder) == [1, 2, 3, 4]
    assert logged_losses(folder) == pytest.approx(logged_losses(tmp_path), rel=1e-4)


def test_two_processes_evaluate_what_they_save(two_processes, photos):
    """Batch norm differs between the processes: rank 0's is saved, and evaluated by both."""
    folder = two_processes / "batch_norm"
    backbone, _ = train.build_backbone("resnet10", "small")
    backbone.load_state_dict(load(folder / "backbone.pt"))
    _, images = train.load_data("folder", photos, 0)
    loader = train.eval_loader(images, "folder", 16, workers=0)
    features, _ = train.extract_features(backbone, loader, "folder", CPU, "float32")
    rank = intl.effective_rank(features).item()
    assert log_lines(folder)[-1]["feature_rank"] == pytest.approx(rank, rel=1e-3)


def test_processes_with_different_data_are_refused(two_processes):
    message = (two_processes / "message1.txt").read_text()
    assert message.startswith("process 1 has other settings (data is 16 images")
    assert "all processes must get the same flags and the same data" in message
    assert not (two_processes / "refused" / "config.json").exists()


def test_an_error_on_one_rank_ends_all_processes(photos, tmp_path):
    """An image that rank 1 reads first, in the evaluation before the first step."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    images = sorted((data / "val").glob("*/*.png"))
    order = torch.randperm(len(images), generator=train.rng("some"))
    broken = images[order[1]]
    broken.write_bytes(b"no image")
    with pytest.raises(AssertionError, match=f"{broken} cannot be read as an image"):
        run("train.py", *photo_argv(data, tmp_path / "run"), processes=2, timeout=120)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# Compilation, and GPUs.


def smooth_backbone(*names, **options):
    """Without ReLUs rounding errors do not grow, as they do where an input changes its sign."""
    conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
    pool = nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(conv, nn.BatchNorm2d(8), pool, nn.Flatten()), 32


def smooth_argv(photos, folder, flags=""):
    """32 steps, of which --cuda-graph captures the thirteenth."""
    return photo_argv(photos, folder, f"--epochs 16 --layers 1 --precision float32 {flags}")


def assert_close_runs(folder, expected_folder):
    assert steps_with_loss(folder) == steps_with_loss(expected_folder)
    assert logged_losses(folder) == pytest.approx(logged_losses(expected_folder), rel=1e-3)
    got = load(folder / "checkpoint.pt")
    expected = load(expected_folder / "checkpoint.pt")
    for part in {"network", "teacher"} & set(expected):
        assert_close(got[part], expected[part], rtol=1e-3, atol=1e-4)


def test_a_compiled_run_equals_an_eager_one(photos, tmp_path, monkeypatch):
    """Without inductor, which needs a minute. Every graph break is an error."""
    compiled = []
    original = torch.compile

    def compile_without_inductor(function, **options):
        compiled.append(function)
        return original(function, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(train, "build_backbone", smooth_backbone)
    monkeypatch.setattr(torch, "compile", compile_without_inductor)
    torch.compiler.reset()  # other tests have compiled the same functions
    train.main(smooth_argv(photos, tmp_path / "eager", "--max-steps 3"))
    train.main(smooth_argv(photos, tmp_path / "compiled", "--max-steps 3 --compile"))
    torch.compiler.reset()
    assert len(compiled) == 7  # the network, the loss, and five operations of the augmentation
    assert_close_runs(tmp_path / "compiled", tmp_path / "eager")


# None of the following tests has run on a GPU.


@pytest.fixture
def default_stream():
    """A run with --cuda-graph leaves this process on another stream."""
    yield
    torch.cuda.set_stream(torch.cuda.default_stream())


@needs_gpu
def test_gpu_a_captured_run_equals_an_eager_one(
    photos, tmp_path, monkeypatch, capsys, default_stream
):
    """It stops after the capture, and is resumed and captured again."""
    monkeypatch.setattr(train, "build_backbone", smooth_backbone)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    flags = f"{TEACHER} --device cuda"
    train.main(smooth_argv(photos, tmp_path / "eager", flags))
    flags = f"{flags} --cuda-graph"
    train.main(smooth_argv(photos, tmp_path / "captured", f"{flags} --max-steps 17"))
    train.main(smooth_argv(photos, tmp_path / "captured", flags))
    assert capsys.readouterr().out.count("the step is captured in a CUDA graph") == 2
    assert_close_runs(tmp_path / "captured", tmp_path / "eager")


@needs_gpu
@pytest.mark.parametrize(
    "flags", ["--precision float16", "--precision bfloat16", "--compile --cuda-graph"]
)
def test_gpu_a_run_trains_resumes_and_saves_tensors_of_the_cpu(
    flags, photos, tmp_path, capsys, default_stream
):
    torch._dynamo.reset()
    flags = f"--device cuda --epochs 16 --base-lr 0.1 {flags}"
    for steps in (15, 17):
        train.main(photo_argv(photos, tmp_path, f"{flags} --max-steps {steps}"))
    assert "from step 15, on 1 x cuda" in capsys.readouterr().out
    assert steps_with_loss(tmp_path) == list(range(1, 18))
    assert all(math.isfinite(loss) for loss in logged_losses(tmp_path))
    for name in ("checkpoint.pt", "backbone.pt"):
        state = torch.load(tmp_path / name, weights_only=True)
        assert {tensor.device for tensor in train.tensors_in(state)} == {CPU}


# --- linear_eval.py: the protocols, and the same numbers by other means ---------------------------

KINDS = 6
LINEAR_LRS = [0.2, 5.0]
LINEAR = "--protocol linear --epochs 5 --batch-size 16"
FINETUNE = "--protocol finetune --epochs 2 --batch-size 16 --percent 75"
FINETUNE_LISTED = "--protocol finetune --epochs 2 --batch-size 16 --labels-file {}/names.txt"
ALL_ROWS = torch.arange(8 * KINDS)
LISTED_ROWS = ALL_ROWS[ALL_ROWS % 8 < 6]  # the first six images of each class


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with images/, 8 for training and 20 for validation in each of six classes, whose
    mean colors overlap, and run/, which was stopped after one of its two epochs."""
    folder = tmp_path_factory.mktemp("toy")
    random = np.random.default_rng(0)
    colors = random.uniform(60, 160, (KINDS, 3))
    for kind, split in itertools.product(range(KINDS), ("train", "val")):
        images = folder / "images" / split / f"kind{kind}"
        images.mkdir(parents=True)
        for i in range(8 if split == "train" else 20):
            color = colors[kind] + random.normal(0, 25, 3)
            pixels = color + random.normal(0, 20, (20, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f"{i:02}.png")

    flags = f"--dataset folder --data {folder}/images --output {folder}/run"
    flags += " --batch-size 16 --base-lr 0.1 --epochs 2 --max-steps 3"
    train.main([*TINY, *flags.split()])
    return folder


def toy_flags(toy, output, flags):
    files = f"--checkpoint {toy}/run/checkpoint.pt --data {toy}/images --output {output}"
    return f"{files} --device cpu --workers 0 --log-every 1 {flags}".split()


def evaluate_toy(toy, output, flags):
    linear_eval.main(toy_flags(toy, output, flags))


def result_lines(folder):
    """The lines of results.jsonl by their protocol."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {line["protocol"]: line for line in lines}


@pytest.fixture(scope="module")
def evaluated(toy, tmp_path_factory):
    """The output folder of all four protocols, with what they printed in printed.txt."""
    folder = tmp_path_factory.mktemp("evaluated")
    names = [f"kind{row // 8}/{row % 8:02}.png" for row in LISTED_ROWS.tolist()]
    (toy / "names.txt").write_text("\n".join(names))
    rates = " ".join(map(str, LINEAR_LRS))
    with open(folder / "printed.txt", "w") as file, contextlib.redirect_stdout(file):
        evaluate_toy(toy, folder, "--protocol knn features --epochs 5")
        evaluate_toy(toy, folder, f"{LINEAR} --lr {rates}")
        evaluate_toy(toy, folder, FINETUNE_LISTED.format(toy))
    return folder


def test_the_settings_of_the_protocols_are_the_published_ones():
    """The first learning rate is the published one."""
    settings = copy.deepcopy(linear_eval.PROTOCOLS)
    for protocol in ("features", "linear", "finetune"):
        settings[protocol]["lr"] = settings[protocol]["lr"][0]
    sgd = {"lr": 0.2, "batch_size": 256, "weight_decay": 0}
    labels = {"percent": None, "labels_file": None}
    assert settings == {
        "features": {"epochs": 500, "lr": 0.01},
        "knn": {},
        "linear": {"epochs": 100, **sgd},
        "finetune": {"epochs": 20, "encoder_lr": 0.006, "schedule": "constant", **sgd, **labels},
    }


def test_finetuning_can_follow_a_cosine():
    config = {"protocol": "finetune", "schedule": "cosine", "epochs": 100}
    factors = [linear_eval.lr_factor(config, step, 5) for step in (0, 125, 250, 500)]
    assert factors == pytest.approx([1, 0.853553, 0.5, 0], abs=1e-6)


def test_every_protocol_prints_and_records_its_results_and_settings(evaluated):
    printed = [" ".join(line.split()) for line in (evaluated / "printed.txt").open()]
    assert any(line.endswith("checkpoint.pt: trained 1 of 2 epochs") for line in printed)
    lines = result_lines(evaluated)
    assert list(lines) == ["features", "knn", "linear", "finetune"]
    for protocol, line in lines.items():
        assert line["checkpoint_epoch"] == 1
        for name, values in line["results"].items():
            shown = [f"top-{k} {value:.2f}" for k, value in zip((1, 5), values)]
            assert " ".join([protocol, name, *shown]) in printed
    assert lines["features"]["lr"] == linear_eval.PROTOCOLS["features"]["lr"]
    assert lines["linear"]["lr"] == LINEAR_LRS
    assert lines["finetune"]["encoder_lr"] == 0.006


def toy_backbone(toy):
    """In the memory format of the scripts: another order of sums would differ after some steps."""
    backbone, width = train.build_backbone("resnet10", "small")
    backbone.load_state_dict(load(toy / "run" / "backbone.pt"))
    return backbone.to(memory_format=torch.channels_last).eval(), width


PIXELS = [
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
]


@torch.no_grad()
def center_crop_features(backbone, folder):
    """The features of all images in a folder, and their labels."""
    crop = v2.Compose([v2.Resize(18), v2.CenterCrop(16), *PIXELS])
    images = train.load_labeled(folder)
    crops = torch.stack([crop(images[i][0]) for i in range(len(images))])
    return backbone(crops), images.targets


def top1_and_top5(logits, labels):
    """In percent: the label has no logit above its own, or less than five."""
    above = (logits > logits.gather(1, labels[:, None])).sum(1)
    return [100 * (above < k).double().mean().item() for k in (1, 5)]


def test_nearest_neighbors_are_those_of_center_crops(evaluated, toy):
    backbone, _ = toy_backbone(toy)
    x, y = center_crop_features(backbone, toy / "images" / "train")
    x_val, y_val = center_crop_features(backbone, toy / "images" / "val")
    unit = (F.normalize(x), y, F.normalize(x_val), y_val)
    assert result_lines(evaluated)["knn"]["results"] == {
        "5 nearest, Euclidean": [train.knn_top1(x, y, x_val, y_val, k=5)],
        "10 nearest, cosine": [train.knn_top1(*unit, k=10, temperature=0.07)],
        "20 nearest, cosine": [train.knn_top1(*unit, k=20, temperature=0.07)],
    }


def test_classifiers_on_features_equal_those_trained_one_by_one():
    labels = torch.arange(3000) % 8
    x = (randn(8, 20, seed=3)[labels] + 1.5 * randn(3000, 20)).float()
    config = {"lr": [0.01, 0.001, 0.1], "epochs": 6, "seed": 5}
    data = (x[:1500], labels[:1500], x[1500:], labels[1500:])
    results = linear_eval.train_on_features(*data, classes=8, config=config)

    for lr in config["lr"]:
        torch.manual_seed(5)
        head = nn.Linear(20, 8)
        optimizer = torch.optim.Adam(head.parameters(), weight_decay=5e-6)
        for epoch in range(6):
            optimizer.param_groups[0]["lr"] = lr * 1e-4 ** (epoch / 6)
            for batch in torch.randperm(1500).split(1000):
                optimizer.zero_grad()
                F.cross_entropy(head(x[batch]), labels[batch]).backward()
                optimizer.step()
        expected = top1_and_top5(head(x[1500:]), labels[1500:])
        assert results[f"learning rate {lr:g}"] == pytest.approx(expected)


def classifier_by_hand(toy, rows, epochs, lr=0.2, finetune=False, shares=1):
    """A backbone, frozen or fine-tuned, and a classifier that are trained by a plain loop. Every
    share of a batch has a batch norm of its own."""
    backbone, width = toy_backbone(toy)
    backbone.train(finetune)
    torch.manual_seed(0)
    head = nn.Linear(width, KINDS)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    groups = [{"params": head.parameters(), "lr": lr * 16 / 256}]
    if finetune:
        groups.append({"params": backbone.parameters(), "lr": 0.006 * 16 / 256})
    optimizer = torch.optim.SGD(groups, momentum=0.9)

    images = train.load_labeled(toy / "images" / "train")
    crop = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])
    crops = train.MultiViewDataset(images, [crop], seed=0)
    pixels = v2.Compose(PIXELS)
    steps = len(rows) // 16  # of an epoch
    for step, keys in enumerate(train.batch_indices(rows, 16, 0, 0, epochs * steps)):
        if step in (3 * steps, 4 * steps):  # of five epochs; others train for less than three
            optimizer.param_groups[0]["lr"] /= 10
        batch = [crops[key] for key in keys]
        x = torch.stack([pixels(views[0]) for views, _ in batch])
        y = torch.tensor([label for _, label in batch])
        optimizer.zero_grad()
        # The first share comes last: its batch norm statistics are those that remain.
        buffers = copy.deepcopy(dict(backbone.named_buffers()))
        for x_share, y_share in reversed(list(zip(x.chunk(shares), y.chunk(shares)))):
            backbone.load_state_dict(buffers, strict=False)
            x_share = x_share.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(head(backbone(x_share)), y_share)
            (loss / shares).backward()
        optimizer.step()
    return backbone.eval(), head


def assert_trained_alike(toy, folder, protocol, number, by_hand):
    """The weights on disk and the accuracies of the classifier with this number."""
    backbone, head = by_hand
    kept = load(folder / f"{protocol}.pt")["model"]
    for name, value in backbone.state_dict().items():
        assert_close(kept[f"backbone.{name}"], value, rtol=1e-4, atol=1e-5)
    for name, value in head.state_dict().items():
        assert_close(kept[f"heads.{number}.{name}"], value, rtol=1e-4, atol=1e-5)

    x_val, y_val = center_crop_features(backbone, toy / "images" / "val")
    results = list(result_lines(folder)[protocol]["results"].values())
    assert results[number] == pytest.approx(top1_and_top5(head(x_val), y_val))


def test_classifiers_of_linear_equal_those_trained_one_by_one(evaluated, toy):
    for number, lr in enumerate(LINEAR_LRS):
        by_hand = classifier_by_hand(toy, ALL_ROWS, 5, lr)
        assert_trained_alike(toy, evaluated, "linear", number, by_hand)


def test_finetuning_equals_a_plain_loop_over_the_listed_images(evaluated, toy):
    by_hand = classifier_by_hand(toy, LISTED_ROWS, 2, finetune=True)
    assert_trained_alike(toy, evaluated, "finetune", 0, by_hand)


def test_two_processes_give_the_results_of_one(evaluated, toy, tmp_path):
    """With finetune each has a batch norm of its own, as published."""
    flags = "--protocol knn linear finetune --epochs 2 --batch-size 16 --lr 0.2 --percent 75"
    run("linear_eval.py", *toy_flags(toy, tmp_path, flags), processes=2)
    assert result_lines(tmp_path)["knn"]["results"] == result_lines(evaluated)["knn"]["results"]
    assert_trained_alike(toy, tmp_path, "linear", 0, classifier_by_hand(toy, ALL_ROWS, 2))
    images = train.load_labeled(toy / "images" / "train")
    rows = linear_eval.select_labeled(images, {"percent": 75, "seed": 0})
    by_hand = classifier_by_hand(toy, rows, 2, finetune=True, shares=2)
    assert result_lines(tmp_path)["finetune"]["processes"] == 2
    assert_trained_alike(toy, tmp_path, "finetune", 0, by_hand)


# --- What an evaluation leaves, and how it resumes ------------------------------------------------


def test_the_same_command_validates_a_finished_network_again(evaluated, toy, tmp_path, monkeypatch):
    shutil.copy(evaluated / "finetune.pt", tmp_path)
    monkeypatch.delattr(torch.optim.SGD, "step")  # nothing is trained
    evaluate_toy(toy, tmp_path, FINETUNE_LISTED.format(toy))
    results = result_lines(tmp_path)["finetune"]["results"]
    assert results == result_lines(evaluated)["finetune"]["results"]


def test_another_configuration_beside_a_kept_network_is_refused(evaluated, toy):
    kept = (evaluated / "linear.pt").read_bytes()
    line = exit_line(evaluate_toy, toy, evaluated, f"{LINEAR} --lr 0.1 --seed 1")
    assert (
        f"{evaluated}/linear.pt has other settings (seed is 0, here 1; lr is [0.2, 5.0], " in line
    )
    assert line.endswith("): choose another --output")  # and not: delete what was trained
    assert (evaluated / "linear.pt").read_bytes() == kept


@pytest.mark.parametrize("flags", [LINEAR, FINETUNE], ids=["linear", "finetune"])
def test_an_interrupted_protocol_resumes_to_the_same_bits(flags, toy, tmp_path, monkeypatch):
    flags += " --epochs 2 --lr 0.2"
    evaluate_toy(toy, tmp_path / "whole", flags)
    save = train.save

    def save_and_stop(files):
        save(files)
        (state,) = files.values()
        if state["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", save_and_stop)
        evaluate_toy(toy, tmp_path / "parts", f"{flags} --save-minutes 0")
    evaluate_toy(toy, tmp_path / "parts", flags)

    (path,) = (tmp_path / "whole").glob("*.pt")
    whole = load(path)
    parts = load(tmp_path / "parts" / path.name)
    for key in ("model", "step"):
        assert_close(parts[key], whole[key], rtol=0, atol=0)
    (results,) = [line["results"] for line in result_lines(tmp_path / "whole").values()]
    assert [line["results"] for line in result_lines(tmp_path / "parts").values()] == [results]


def test_one_diverged_classifier_does_not_end_the_others(toy, tmp_path):
    evaluate_toy(toy, tmp_path, f"{LINEAR} --lr 0.2 5e39")
    results = result_lines(tmp_path)["linear"]["results"]
    assert results["learning rate 0.2"][0] > 50
    assert results["learning rate 5e+39"] == [0, 0]


@pytest.mark.parametrize("flags", [f"{LINEAR} --lr 5e39", f"{FINETUNE} --encoder-lr 1e38"])
def test_a_diverged_run_ends_and_saves_nothing(flags, toy, tmp_path):
    assert "the run has diverged" in exit_line(evaluate_toy, toy, tmp_path, flags)
    assert list(tmp_path.glob("*.pt")) == []
    assert not (tmp_path / "results.jsonl").exists()


# --- Which network is evaluated -------------------------------------------------------------------


def read_network(path, flags=""):
    """The backbone that a file holds, and the settings of its training."""
    args = linear_eval.parse(["--checkpoint", str(path), *flags.split()])
    backbone, _, settings = linear_eval.read_backbone(args)
    return backbone, settings


def assert_same_weights(backbone, weights):
    for name, value in weights.items():
        assert torch.equal(backbone.state_dict()[name], value), name


def random_weights(seed, arch="resnet10", stem="imagenet"):
    """Of a ResNet: weights, batch norm statistics and counters are all random."""
    network, _ = train.build_backbone(arch, stem)
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        value.add_(torch.rand(value.shape, generator=generator).mul(10).to(value.dtype))
    return dict(network.state_dict())


# Where each publisher's file holds the network that is evaluated, and another one, such as a
# momentum encoder. What is before the slash is an entry of the file.
LAYOUTS = {
    "this project": ("network/backbone.", "teacher/backbone."),
    "INTL": ("state_dict/module.backbone.", "state_dict/module.momentum_backbone."),
    "MoCo v1, v2": ("state_dict/module.encoder_q.", "state_dict/module.encoder_k."),
    "MoCo v3": ("state_dict/module.base_encoder.", "state_dict/module.momentum_encoder."),
    "DINO": ("teacher/backbone.", "student/module.backbone."),
    "SwAV": ("module.", None),
    "Barlow Twins": ("model/module.backbone.", None),
    "VICReg, torchvision": ("", None),
    "solo-learn": ("state_dict/backbone.", "state_dict/momentum_backbone."),
    "solo-learn, earlier": ("state_dict/encoder.", "state_dict/momentum_encoder."),
    "BYOL": ("online_encoder.net.", "target_encoder.net."),
    "anybody, compiled": ("ema/trunk._orig_mod.", None),
}


def add_tensors(content, place, tensors):
    entry, _, prefix = place.rpartition("/")
    part = content.setdefault(entry, {}) if entry else content
    for name, value in tensors.items():
        part[f"{prefix}{name}"] = value


@pytest.mark.parametrize("publisher", LAYOUTS)
def test_every_publishers_file_gives_the_same_network(publisher, tmp_path, capsys):
    place, other_place = LAYOUTS[publisher]
    weights = random_weights(0)
    if publisher == "SwAV":  # its file is older than the counters of batch norm
        weights = {name: value for name, value in weights.items() if "num_batches" not in name}
    prefix = place.replace("/", ".").replace("_orig_mod.", "")
    ignored = f"1 other tensors are not used: ['{prefix}fc.weight']"
    content = {"config": {"arch": "vit_b_16", "stem": "cifar"}, "epoch": 3}
    if other_place is not None:
        add_tensors(content, other_place, random_weights(1))
        other_prefix = other_place.replace("/", ".")
        ignored = f"took {prefix}*, not the other networks ['{other_prefix}']"
    add_tensors(content, place, {**weights, "fc.weight": torch.full((9, 512), math.nan)})
    torch.save(content, tmp_path / "file.pt")

    assert_same_weights(read_network(tmp_path / "file.pt", "--arch resnet10")[0], weights)
    printed = capsys.readouterr().out
    assert f"resnet10 with stem imagenet, {len(weights)} tensors {prefix}*\n" in printed
    assert ignored in printed


def test_a_file_that_is_not_wholly_the_network_is_refused_by_name(tmp_path):
    weights = random_weights(0)
    incomplete = {name: value for name, value in weights.items() if name != "layer3.0.bn1.bias"}
    not_finite = {**weights, "bn1.running_var": torch.full((64,), math.inf)}
    contents = {
        "is not a resnet10 with stem imagenet: .*Missing.*layer3.0.bn1.bias": incomplete,
        "Unexpected key.*layer1.1.conv1.weight": random_weights(0, arch="resnet18"),
        "size mismatch for conv1.weight": random_weights(0, stem="small"),
        "model.bn1.running_var is not finite": not_finite,
        r"no ResNet.*\['model.patch.weight'\]": {"patch.weight": torch.ones(2)},
    }
    for message, content in contents.items():
        torch.save({"model": content}, tmp_path / "file.pt")
        line = exit_line(read_network, tmp_path / "file.pt", "--arch resnet10")
        assert re.match(f"{tmp_path}/file.pt.*{message}", line)


class TrainersSettings(dict):
    """A type that only some trainer has."""


class MakesFolder:
    def __reduce__(self):
        return os.mkdir, ("made",)


def test_a_pickle_of_other_types_is_refused_by_their_name_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, extra in (("TrainersSettings", TrainersSettings(lr=0.1)), ("mkdir", MakesFolder())):
        torch.save({"model": random_weights(0), "extra": extra}, "file.pt")
        line = exit_line(read_network, "file.pt", "--arch resnet10")
        assert re.match("file.pt cannot be read as a checkpoint", line)
        assert re.search(rf": it holds a \w+\.{name}$", line)
    assert not Path("made").exists()


@pytest.mark.parametrize("numpy_module", ["numpy.core", "numpy._core"])
def test_harmless_types_beside_the_tensors_are_read(numpy_module, tmp_path):
    """A number of numpy is stored with the name of its module, which depends on the version."""
    path = tmp_path / "file.pt"
    weights = random_weights(0)
    numbers = [np.float64(71.2), np.float32(0.5), np.int64(3), np.bool_(True)]
    extra = {"args": argparse.Namespace(output=Path("runs")), "best": numbers}
    torch.save({"model": weights, **extra}, path, _use_new_zipfile_serialization=False)
    content = re.sub(rb"numpy\._?core\.", f"{numpy_module}.".encode(), path.read_bytes())
    path.write_bytes(content)
    assert_same_weights(read_network(path, "--arch resnet10")[0], weights)


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pt"])
def test_a_run_of_train_py_says_which_network_it_holds(name, toy):
    """backbone.pt is read together with the config.json beside it."""
    path = toy / "run" / name
    backbone, settings = read_network(path)
    assert_same_weights(backbone, load(toy / "run" / "backbone.pt"))
    config = json.loads((toy / "run" / "config.json").read_text())
    assert {key: settings[key] for key in config} == config
    assert "--stem small" in exit_line(read_network, path, "--stem cifar")
    line = exit_line(read_network, path, "--arch resnet18")
    assert line == f"--arch resnet18: {path} was trained with --arch resnet10"


def test_the_finetuned_network_is_a_checkpoint_like_any_other(evaluated):
    backbone, settings = read_network(evaluated / "finetune.pt")
    assert settings["stem"] == "small"
    kept = load(evaluated / "finetune.pt")["model"]
    assert_same_weights(
        backbone, {name: kept[f"backbone.{name}"] for name in backbone.state_dict()}
    )


def test_results_are_beside_the_checkpoint_by_default(evaluated, toy, tmp_path):
    shutil.copytree(toy / "run", tmp_path / "run")
    flags = f"--data {toy}/images --workers 0 --device cpu --protocol knn"
    linear_eval.main(["--checkpoint", f"{tmp_path}/run/backbone.pt", *flags.split()])
    results = result_lines(tmp_path / "run")["knn"]["results"]
    assert results == result_lines(evaluated)["knn"]["results"]


def test_random_is_the_network_before_its_pretraining(toy, capsys):
    torch.manual_seed(0)
    untrained = train.Network(train.parse(TINY)).backbone.state_dict()
    assert_same_weights(read_network(toy / "run" / "checkpoint.pt", "--random")[0], untrained)
    not_read = "--random --arch resnet10 --stem small"
    assert_same_weights(read_network("no/such/file.pt", not_read)[0], untrained)
    assert capsys.readouterr().out.count("resnet10 with stem small and RANDOM weights") == 2


# --- The labels of finetune -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Images of two classes, of which two have the same name."""
    folder = tmp_path_factory.mktemp("twins")
    names = ["a/000.png", "a/001.png", "b/000.png", "b/002.png"]
    write_images(folder, names)
    return train.load_labeled(folder)


def listed_images(images, text, folder):
    """The images that a file with this text selects, as paths below the data set's folder."""
    path = folder / "names.txt"
    path.write_text(text)
    rows = linear_eval.select_labeled(images, {"labels_file": str(path)})
    return [os.path.relpath(images.samples[i][0], images.root) for i in rows.tolist()]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("b/000.png\n", ["b/000.png"]),
        ("002.png\n001.png", ["a/001.png", "b/002.png"]),
        ("\n001.png\n\n  \na/001.png\n001.png\n", ["a/001.png"]),
    ],
    ids=["path", "unique names", "blank lines and repetitions"],
)
def test_a_labels_file_selects_images_by_path_or_unique_name(text, expected, twins, tmp_path):
    assert listed_images(twins, text, tmp_path) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("001.png\n\n000.png\n", "line 3: '000.png' is the name of 2 images. .* 'a/000.png'"),
        ("001.png\nno such.png\n", "line 2: .* contains no image 'no such.png'"),
        ("\n \n", "lists no images"),
    ],
    ids=["ambiguous", "unknown", "blank"],
)
def test_a_labels_file_that_names_no_image_is_refused(text, message, twins, tmp_path):
    assert re.search(f"names.txt.*{message}", exit_line(listed_images, twins, text, tmp_path))


def test_a_percentage_of_the_labels_is_of_every_class_and_depends_on_the_seed():
    targets = torch.arange(120) % 6 // 5  # 100 times 0 and 20 times 1
    images = train.in_memory_dataset(torch.zeros(120, 3, 8, 8), targets.tolist(), ["a", "b"])
    for percent, counts in ((1, [1, 1]), (10, [10, 2])):
        rows = linear_eval.select_labeled(images, {"percent": percent, "seed": 0})
        assert targets[rows.unique()].bincount().tolist() == counts
        assert rows.equal(linear_eval.select_labeled(images, {"percent": percent, "seed": 0}))
        assert not rows.equal(linear_eval.select_labeled(images, {"percent": percent, "seed": 1}))


# --- Commands that are refused --------------------------------------------------------------------


REFUSED_EVALUATIONS = [
    ("--percent 1", "--percent has no effect on --protocol features knn"),
    ("--protocol linear --labels-file x", "--labels-file has no effect on --protocol linear"),
    (f"{FINETUNE} --labels-file x", "not allowed with argument --percent"),
    (f"{FINETUNE} --percent 0", "--percent must be more than 0 and at most 100"),
    (f"{FINETUNE} --lr 0.1 0.2", "--protocol finetune takes one --lr"),
    (f"{FINETUNE} --precision float16", "--protocol finetune does not train in float16"),
    ("--protocol finetune", "--protocol finetune needs --percent or --labels-file"),
    ("--size 0", "argument --size: 0 is not at least 1"),
    (f"{LINEAR} --batch-size 49", "49 must be at most the number of labeled images, 48"),
    ("--checkpoint no/file.pt", "no/file.pt cannot be read as a checkpoint"),
    ("--data {}/train", "{}/train needs train/ and val/, each with a folder for every class"),
]


@pytest.mark.parametrize(
    "flags, message", REFUSED_EVALUATIONS, ids=[flags for flags, _ in REFUSED_EVALUATIONS]
)
def test_a_command_that_cannot_be_meant_is_refused_before_the_work(
    flags, message, toy, tmp_path, capsys
):
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as error:
        evaluate_toy(toy, output, flags.format(toy / "images"))
    assert message.format(toy / "images") in f"{error.value} {capsys.readouterr().err}"
    assert not output.exists()


def test_a_labels_file_needs_image_files():
    images = train.in_memory_dataset(torch.zeros(4, 3, 8, 8), [0, 0, 1, 1], ["a", "b"])
    line = exit_line(linear_eval.select_labeled, images, {"labels_file": "names.txt"})
    assert line.startswith("--labels-file names.txt: --data contains no image files")


# --- Detection ------------------------------------------------------------------------------------

# 4 steps of 2 images at 64 pixels, with two evaluations.
TINY_DETECTION = (
    "--device cpu --images 8 --batch-size 2 --warmup-images 2 --short-sides 64 "
    "--test-short-side 64 --long-side 96 --anchors 16 32 --train-proposals 50 10 "
    "--test-proposals 50 5 --rois 8 --detections 5 --log-every 1 --workers 0"
).split()
FPN = "--model fpn --anchors 8 16 32 64 128".split()


def detection_command(pretrained, data, folder, *flags):
    paths = ["--checkpoint", pretrained / "checkpoint.pt", "--data", data, "--output", folder]
    return [*TINY_DETECTION, *[str(word) for word in paths], *flags]


def tiny_detector(pretrained, *flags, masks=True):
    """A detector of 3 classes and the background on the pretrained network."""
    args = detect_transfer.parse(detection_command(pretrained, ".", ".", *flags))
    return detect_transfer.build_detector(args, 4, masks)


def resnet_of(detector):
    """The tensors of a detector's ResNet, by their names in torchvision."""
    if hasattr(detector.backbone, "body"):  # fpn
        return dict(detector.backbone.body.state_dict())
    state = dict(detector.backbone.state_dict())
    for name, value in detector.roi_heads.box_head[0].state_dict().items():  # res5
        state[f"layer4.{name}"] = value
    return state


def image_with_objects():
    image = randn(3, 70, 90, dtype=torch.float32)
    masks = (randn(2, 70, 90) > 0).byte()
    boxes = torch.tensor([[10.0, 10, 50, 40], [40, 30, 80, 60]])
    labels = torch.tensor([1, 3])
    return image, {"boxes": boxes, "labels": labels, "masks": masks, "short_side": 64}


@pytest.mark.parametrize("norm, masks", [("bn", True), ("frozen", False)])
@pytest.mark.parametrize("model_flags", [[], FPN], ids=["c4", "fpn"])
def test_all_pretrained_weights_are_trained_but_frozen_norms(model_flags, norm, masks, pretrained):
    detector = tiny_detector(pretrained, *model_flags, "--norm", norm, masks=masks)
    before = copy.deepcopy(resnet_of(detector))
    image, target = image_with_objects()
    losses = detector.train()([image], [target])
    sum(losses.values()).backward()
    optimizer = detect_transfer.build_optimizer(detector, 0)
    train.set_learning_rate(optimizer, 0.01)
    optimizer.step()

    assert ("loss_mask" in losses) == masks
    expected = load(pretrained / "backbone.pt")
    for name, value in resnet_of(detector).items():
        is_frozen = norm == "frozen" and re.search(r"bn|downsample.1", name) is not None
        assert torch.equal(before[name], expected[name]), name
        assert torch.equal(value, before[name]) == is_frozen, name


def test_weight_decay_is_for_all_parameters_but_those_of_batch_norm(pretrained):
    detector = tiny_detector(pretrained)
    decayed, not_decayed = detect_transfer.build_optimizer(detector, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert not_decayed["weight_decay"] == 0
    # A ResNet-10 has 12 norms, C4 an extra one; each has a weight and a bias.
    assert [parameter.ndim for parameter in not_decayed["params"]] == [1] * 26
    assert len(decayed["params"]) + 26 == len(list(detector.parameters()))


@torch.no_grad()
def test_c4_features_of_boxes_and_masks_equal_an_independent_computation(pretrained):
    """With torchvision's ResNet, from the image to the extra BN."""
    detector = tiny_detector(pretrained).eval()
    heads = detector.roi_heads
    for parameter in heads.box_predictor.parameters():
        parameter *= 1e-3  # otherwise an untrained network moves its boxes out of the image
    calls = []

    def record(module, inputs, output):
        calls.append((inputs, output))

    heads.box_roi_pool.register_forward_hook(record)
    heads.box_head.register_forward_hook(record)
    x = randn(1, 3, 64, 96, dtype=torch.float32)
    detector([x[0]])

    resnet = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).eval()
    resnet.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    resnet.fc = nn.Identity()
    resnet.load_state_dict(load(pretrained / "backbone.pt"))
    features = (x - 0.5) / 0.25  # as train.py normalizes shapes
    for module in list(resnet.children())[:7]:  # to layer3, which is res4
        features = module(features)
    assert len(calls) == 4  # pooling and res5 for the boxes, then for the masks
    for pooling, res5 in [calls[:2], calls[2:]]:
        (_, boxes, _), _ = pooling
        _, actual = res5
        assert len(actual) > 0
        regions = torchvision.ops.roi_align(features, boxes, 14, 1 / 16, 0, aligned=True)
        expected = resnet.layer4(regions) / (1 + 1e-5) ** 0.5  # the extra BN, untrained
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_c4_pools_regions_at_stride_16_and_refuses_the_stem_that_widens_the_image():
    args = detect_transfer.parse("--random --arch resnet10 --stem imagenet".split())
    detector = detect_transfer.build_detector(args, 2, False)
    assert detector.roi_heads.box_roi_pool.spatial_scale == 1 / 16
    args.stem = "cifar-padded"
    line = exit_line(detect_transfer.build_detector, args, 2, False)
    assert "--model c4 cannot use the stem cifar-padded" in line


def test_c4_has_the_published_anchors(pretrained):
    """15 at each place: sizes from 32 to 512 pixels, heights of 1/2, 1 and 2 widths."""
    detector = tiny_detector(pretrained, *"--anchors 32 64 128 256 512".split())
    (anchors,) = detector.rpn.anchor_generator.cell_anchors
    widths, heights = (anchors[:, 2:] - anchors[:, :2]).reshape(3, 5, 2).unbind(2)
    sizes = (widths * heights).sqrt()
    ratios = heights / widths
    assert_close(sizes, torch.tensor([32.0, 64, 128, 256, 512]).expand(3, 5), rtol=0.03, atol=0)
    assert_close(ratios, torch.tensor([[0.5], [1], [2]]).expand(3, 5), rtol=0.05, atol=0)


def test_c4_heads_have_the_published_losses(pretrained, monkeypatch):
    """Against torchvision's heads with L1 in the place of smooth L1 and aligned mask targets."""
    detector = tiny_detector(pretrained)
    heads = detector.roi_heads
    heads.box_head.eval()  # its BN would see other regions in the two computations
    image, target = image_with_objects()
    others = torch.tensor([[0.0, 0, 30, 30], [50, 5, 90, 30]])
    proposals = [torch.cat([target["boxes"] + 2, others])]
    arguments = (detector.backbone(image[None]), proposals, [(70, 90)], [target])
    torch.manual_seed(1)
    _, losses = heads(*arguments)

    def l1_loss(a, b, beta, reduction):
        return F.l1_loss(a, b, reduction=reduction)

    def aligned_masks(masks, boxes, objects, size):
        rois = torch.cat([objects[:, None].float(), boxes], dim=1)
        crops = torchvision.ops.roi_align(masks[:, None].float(), rois, size, aligned=True)
        return (crops[:, 0] >= 0.5).float()

    roi_heads = torchvision.models.detection.roi_heads
    monkeypatch.setattr(roi_heads.F, "smooth_l1_loss", l1_loss)
    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", aligned_masks)
    torch.manual_seed(1)
    _, expected = roi_heads.RoIHeads.forward(heads, *arguments)
    assert_close(losses, expected)


def test_c4_proposals_have_the_published_losses(pretrained):
    detector = tiny_detector(pretrained)
    labels = torch.tensor([1, 0, -1, 1, 0], dtype=torch.float64)
    targets = randn(5, 4)
    objectness = randn(5, 1, seed=1)
    deltas = randn(5, 4, seed=2)
    losses = detector.rpn.compute_loss(objectness, deltas, [labels], [targets])

    used = [0, 1, 3, 4]
    object_loss = F.binary_cross_entropy_with_logits(objectness[used, 0], labels[used])
    box_loss = F.l1_loss(deltas[[0, 3]], targets[[0, 3]], reduction="sum") / len(used)
    assert_close(losses, (object_loss, box_loss))


# Settings: those of MoCo's and INTL's configurations of detectron2, which agree.

PUBLISHED_DETECTION = {
    "model": "c4",
    "norm": "syncbn",
    "masks": True,
    "batch_size": 16,
    "base_lr": 0.02,
    "weight_decay": 1e-4,
    "short_sides": [640, 672, 704, 736, 768, 800],
    "test_short_side": 800,
    "long_side": 1333,
    "anchors": [32, 64, 128, 256, 512],
    "train_proposals": [12_000, 2000],
    "test_proposals": [6000, 1000],
    "rois": 512,
    "detections": 100,
}
PUBLISHED_STEPS = {"coco-1x": (90_000, 60_000, 80_000), "coco-2x": (180_000, 120_000, 160_000)}


@pytest.mark.parametrize("recipe", PUBLISHED_STEPS)
def test_detection_recipes_are_the_published_ones(recipe):
    args = detect_transfer.parse(["--recipe", recipe, "--data", "."])
    for name, expected in PUBLISHED_DETECTION.items():
        assert vars(args)[name] == expected, name

    steps, first_drop, second_drop = PUBLISHED_STEPS[recipe]
    assert args.images == 16 * steps
    rates = {0: 2e-5, 500: 0.01001, first_drop - 1: 0.02, first_drop: 0.002, second_drop: 0.0002}
    args.batch_size = 2  # the same images with a rate in proportion
    for step, rate in rates.items():
        assert detect_transfer.learning_rate(8 * step, args) == pytest.approx(rate / 8), step


# Data in COCO's layout: images of 20 x 30 pixels.

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
POLYGON = [4, 6, 12, 6, 12, 16, 4, 16]  # the whole box
MASK = torch.zeros(20, 30, dtype=torch.uint8)
MASK[6:16, 4:12] = 1


def coco_object(**changes):
    """An annotation. A change to None leaves the entry out."""
    box = {"bbox": [4, 6, 8, 10], "segmentation": [POLYGON], "area": 80, "iscrowd": 0}
    annotation = {"id": 5, "image_id": 0, "category_id": 7, **box, **changes}
    return {name: value for name, value in annotation.items() if value is not None}


def coco_image(i, **changes):
    return {"id": i, "file_name": f"{i}.png", "height": 20, "width": 30, **changes}


def write_coco(root, annotations, split="train", folder=None, images=None, categories=CATEGORIES):
    """Three images in a folder of the split's name, and their annotation file."""
    write_images(root / (folder or split), ["0.png", "1.png", "2.png"], (20, 30))
    images = images or [coco_image(i) for i in range(3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def read_coco(root, annotations, training=False, **entries):
    write_coco(root, annotations, **entries)
    return detect_transfer.CocoImages(root, "train", training, 0, [20, 40])


def test_the_layout_of_coco_is_found(tmp_path):
    data = read_coco(tmp_path, [coco_object()], split="train2017", folder="images/train2017")
    assert data[0, 0][0].shape == (3, 20, 30)


def test_polygons_of_fewer_than_three_points_are_dropped(tmp_path):
    data = read_coco(tmp_path, [coco_object(segmentation=[[1, 2, 19, 19], POLYGON])])
    assert torch.equal(data[0, 0][1]["masks"], MASK[None])


def test_only_visible_objects_are_trained_and_all_images_are_evaluated(tmp_path):
    objects = [
        coco_object(id=1),
        coco_object(id=2, iscrowd=1),
        coco_object(id=3, bbox=[29.5, 2, 3, 4]),
        coco_object(id=4, bbox=[5, 5, 0, 3]),
        coco_object(id=6, image_id=1, category_id=3, bbox=[26, 14, 8, 10]),
    ]
    data = read_coco(tmp_path, objects, training=True)
    assert [data[0, i][1]["labels"].tolist() for i in range(len(data))] == [[2], [1]]
    data = read_coco(tmp_path, objects)
    assert [data[0, i][1]["image_id"] for i in range(len(data))] == [0, 1, 2]
    assert data[0, 1][1]["boxes"].tolist() == [[26, 14, 30, 20]]  # clipped to the image
    assert data[0, 2][1]["masks"].shape == (0, 20, 30)


@pytest.mark.parametrize("flags, in_val", [([], []), (["--no-masks"], [POLYGON])])
def test_masks_are_not_trained_if_an_object_has_none_or_if_told(flags, in_val, tmp_path):
    write_coco(tmp_path, [coco_object(id=1), coco_object(id=2, image_id=1)])
    write_coco(tmp_path, [coco_object(segmentation=in_val)], "val")
    args = detect_transfer.parse([*TINY_DETECTION, "--data", str(tmp_path), *flags])
    for data in detect_transfer.load_data(args):
        assert "masks" not in data[0, 0][1]


def test_images_with_more_objects_than_can_be_detected_are_counted(tmp_path, capsys):
    objects = [coco_object(id=1), coco_object(id=2), coco_object(id=3, image_id=1)]
    write_coco(tmp_path, objects)
    write_coco(tmp_path, objects, "val")
    flags = [*TINY_DETECTION, "--data", str(tmp_path), "--detections", "1"]
    detect_transfer.load_data(detect_transfer.parse(flags))
    assert (
        "1 of 3 validation images have more objects than --detections 1" in capsys.readouterr().out
    )


def test_half_of_the_training_images_are_flipped_with_their_boxes_and_masks(tmp_path):
    data = read_coco(tmp_path, [coco_object()], training=True)
    original = data.read_image(0)
    boxes = []
    short_sides = []
    for epoch in range(200):
        image, target = data[epoch, 0]
        boxes.append(target["boxes"].tolist())
        short_sides.append(target["short_side"])
        if boxes[-1] == [[18, 6, 26, 16]]:
            image = image.flip(-1)
            target["masks"] = target["masks"].flip(-1)
        assert torch.equal(image, original)
        assert torch.equal(target["masks"], MASK[None])
    assert 70 < boxes.count([[4, 6, 12, 16]]) < 130
    assert 70 < short_sides.count(20) < 130


def test_images_are_resized_and_detections_resized_back():
    """In the evaluation 20 x 30 pixels become 50 x 75: the long side has its limit."""
    transform = detect_transfer.Transform(60, 75, (0, 0, 0), (1, 1, 1))
    boxes = torch.tensor([[4.0, 6, 12, 16]])
    images, _ = transform([torch.zeros(3, 20, 30)], [{"boxes": boxes, "short_side": 40}])
    assert images.image_sizes == [(40, 60)]
    images, _ = transform.eval()([torch.zeros(3, 20, 30)])
    assert images.image_sizes == [(50, 75)]

    mask = randn(1, 1, 5, 4, dtype=torch.float32).sigmoid()
    detections = [{"boxes": torch.tensor([[10.0, 15, 30, 40]]), "masks": mask}]
    (found,) = transform.postprocess(detections, images.image_sizes, [(20, 30)])
    assert_close(found["boxes"], boxes)
    doubled = F.interpolate(F.pad(mask, (1, 1, 1, 1)), scale_factor=2, mode="bilinear")
    expected = torch.zeros(1, 20, 30, dtype=torch.bool)
    expected[0, 6:16, 4:12] = doubled[0, 0, 2:-2, 2:-2] >= 0.5
    assert torch.equal(found["masks"], expected)


def one_object(**changes):
    return {"annotations": [coco_object(**changes)]}


BAD_DATA = {
    "no file": ({"split": "other"}, "annotations/instances_train.json must exist, not 0"),
    "one id": ({"annotations": [coco_object(), coco_object()]}, "two of its annotations have the"),
    "annotation 0": (one_object(id=0), "an annotation has the id 0"),
    "no box": (one_object(bbox=None), "annotation 5 has no bbox"),
    "unknown image": (one_object(image_id=9), "annotation 5 has an image_id or a category_id that"),
    "NaN": (one_object(bbox=[4, math.nan, 8, 10]), "annotation 5: its bbox [4, nan, 8, 10] is not"),
    "three numbers": (one_object(bbox=[4, 6, 8]), "annotation 5: its bbox [4, 6, 8] is not four"),
    "no area": (one_object(area=math.nan), "annotation 5: its id, area or iscrowd is not a finite"),
    "no object": (one_object(bbox=[0, 0, 0.9, 9]), "train.json has no object of at least a pixel"),
    "missing image": ({"images": [coco_image(0, file_name="gone.png")]}, "lacks 1 of the 1 images"),
    "size": ({"images": [coco_image(0, height=30)]}, "0.png has the size (20, 30), not (30, 30)"),
    "other names": ({"categories": CATEGORIES[:1]}, "train and val differ in [(3, 'cat')]"),
    "less than a batch": ({}, "1 training images do not fill one --batch-size 2"),
}


@pytest.mark.parametrize("entries, message", BAD_DATA.values(), ids=BAD_DATA)
def test_what_is_wrong_with_the_data_is_named(entries, message, tmp_path):
    write_coco(tmp_path, **{**one_object(), **entries})
    write_coco(tmp_path, [coco_object()], "val")
    args = detect_transfer.parse([*TINY_DETECTION, "--data", str(tmp_path)])
    with pytest.raises((SystemExit, ValueError), match=re.escape(message)):
        detect_transfer.load_data(args)


BAD_FLAGS = {
    "--recipe coco-2x": "--recipe coco-2x needs --data",
    "--model fpn": "--model fpn has five levels",
    "--batch-size 4": "it must be a multiple of the number of processes, 3",
    "--batch-size 3 --images 2": "--images 2 do not fill one --batch-size 3",
    "--batch-size 3 --rois 3": "--rois must be at least 4",
    "--batch-size 3 --detections 101": "--detections 101: COCO's AP is over at most 100 per image",
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_bad_flags_of_detection_are_refused(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 3)
    with pytest.raises(SystemExit):
        detect_transfer.parse(flags.split())
    assert message in capsys.readouterr().err


class PerfectDetector(nn.Module):
    def __init__(self, targets, shift):
        super().__init__()
        self.targets = iter(targets)
        self.shift = shift

    def forward(self, images):
        target = next(self.targets)
        labels = target["labels"]
        masks = target["masks"].roll((self.shift, self.shift), (1, 2))
        boxes = target["boxes"] + self.shift
        return [{"boxes": boxes, "masks": masks, "labels": labels, "scores": labels / 10}]


# A box of 8 x 10 pixels that is displaced by one pixel in both directions has an IoU of 63 / 97
# with its place, which counts at 0.5, 0.55 and 0.6 of the ten thresholds.
@pytest.mark.parametrize("shift, expected", [(0, (100, 100, 100)), (1, (30, 100, 0))])
def test_ap_is_100_for_the_truth_less_when_displaced_and_0_for_nothing(shift, expected, tmp_path):
    crowd = coco_object(id=3, image_id=2, iscrowd=1)
    objects = [coco_object(id=1), coco_object(id=2, image_id=1, category_id=3), crowd]
    data = read_coco(tmp_path, objects)
    loader = [data[0, i] for i in range(len(data))]
    detector = PerfectDetector([target for _, target in loader], shift)
    results = detect_transfer.predict(detector, data, loader, CPU)
    numbers = detect_transfer.average_precision(data, results, tmp_path)
    for kind in ("box", "mask"):
        values = [numbers[f"{kind} AP{suffix}"] for suffix in ("", "50", "75")]
        assert values == pytest.approx(expected)
    assert detect_transfer.average_precision(data, [], tmp_path)["mask AP"] == 0


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    detect_transfer.write_scenes(folder, 0, {"train": 6, "val": 7})
    return folder


def test_without_data_scenes_of_annotated_shapes_are_drawn(tmp_path):
    args = detect_transfer.parse([*TINY_DETECTION, "--output", str(tmp_path / "run")])
    train_set, val_set = detect_transfer.load_data(args)
    assert (len(train_set), len(val_set)) == (400, 100)
    image, target = val_set[0, 0]
    (mask,) = target["masks"].bool()
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert mask[y1:y2, x1:x2].sum() == mask.sum() >= 30
    contrast = image[:, mask].float().mean() - image[:, ~mask].float().mean()
    assert contrast.abs() > 60


@pytest.fixture(scope="module")
def detected(pretrained, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detected")
    detect_transfer.main(detection_command(pretrained, scenes, folder))
    return folder


def test_a_detection_run_logs_its_losses_and_evaluates_evenly(detected):
    lines = log_lines(detected)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        parts = ["classifier", "box_reg", "mask", "objectness", "rpn_box_reg"]
        assert line["loss"] == pytest.approx(sum(line[part] for part in parts), rel=1e-3)
    assert [line["step"] for line in lines if "box AP" in line and "mask AP" in line] == [2, 4]
    assert Image.open(detected / "predictions.png").size == (3 * 322 + 2, 2 * 322 + 2)


def test_a_resumed_detection_ends_bitwise_the_same(detected, pretrained, scenes, tmp_path):
    """And evaluations, of which it has more, change nothing."""
    command = detection_command(pretrained, scenes, tmp_path)
    detect_transfer.main([*command, "--max-steps", "2"])
    detect_transfer.main([*command, "--evaluations", "4"])
    expected = load(detected / "checkpoint.pt")
    resumed = load(tmp_path / "checkpoint.pt")
    for part in ("model", "optimizer", "step"):
        assert_close(resumed[part], expected[part], rtol=0, atol=0)
    assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == [1, 2, 3, 4]


def test_a_folder_of_other_objects_or_weights_is_refused(detected, pretrained, scenes, tmp_path):
    other = tmp_path / "backbone.pt"
    shutil.copy(pretrained / "config.json", tmp_path)
    weights = {name: value + 1 for name, value in load(pretrained / "backbone.pt").items()}
    train.save({other: weights})
    command = [*detection_command(pretrained, scenes, detected), "--checkpoint", str(other)]
    assert "checkpoint is" in exit_line(detect_transfer.main, command)

    data = shutil.copytree(scenes, tmp_path / "scenes")
    shutil.copy(data / "annotations/instances_train.json", data / "annotations/instances_val.json")
    command = detection_command(pretrained, data, detected)
    assert "data_digest is" in exit_line(detect_transfer.main, command)


def test_fpn_is_fine_tuned_on_boxes_alone(pretrained, tmp_path):
    for split in ("train", "val"):
        objects = [coco_object(id=i, image_id=i % 3, segmentation=[]) for i in (1, 2, 3)]
        write_coco(tmp_path, objects, split)
    folder = tmp_path / "run"
    command = detection_command(pretrained, tmp_path, folder, *FPN, "--max-steps", "1")
    detect_transfer.main(command)
    losses, ap = log_lines(folder)[-2:]
    assert "box_reg" in losses and "mask" not in losses
    assert "box AP" in ap and "mask AP" not in ap


def test_two_processes_evaluate_every_image_once(pretrained, scenes, tmp_path):
    """Against one process with the saved weights, as in training each has its own batch norm."""
    command = detection_command(pretrained, scenes, tmp_path, "--max-steps", "1")
    run("detect_transfer.py", *command, "--warmup-images", "0", processes=2)

    detector = detect_transfer.build_detector(detect_transfer.parse(command), 9, True)
    detector.load_state_dict(load(tmp_path / "checkpoint.pt")["model"])
    detector.to(memory_format=torch.channels_last)
    data = detect_transfer.CocoImages(scenes, "val", False)
    loader = [data[0, i] for i in range(len(data))]
    expected = detect_transfer.predict(detector, data, loader, CPU)
    for result in expected:
        del result["segmentation"]
    results = json.loads((tmp_path / "results_bbox.json").read_text())
    results.sort(key=lambda result: result["image_id"])  # they were in the order of the ranks
    assert len(results) > len(data)
    assert results == expected


@needs_gpu
def test_gpu_detects(pretrained, scenes, tmp_path):
    command = detection_command(pretrained, scenes, tmp_path, "--device", "cuda")
    detect_transfer.main(command)
    assert "mask AP" in log_lines(tmp_path)[-1]


# --- README.md and evidence/ ----------------------------------------------------------------------

SCRIPTS = {
    "train.py": train,
    "linear_eval.py": linear_eval,
    "detect_transfer.py": detect_transfer,
}
EVIDENCE_SCRIPTS = ["laptop.sh", "methods.sh", "official.sh", "prices.sh"]


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def documented_commands():
    """The commands of README.md and of the docstrings."""
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    for module in SCRIPTS.values():
        text = module.__doc__.replace("\\\n", " ")
        lines += re.findall("^ +(?:python|torchrun).*", text, re.M)
    commands = []
    for line in lines:
        for command in line.split("#")[0].split("&&"):
            commands.append(command.strip())
    return [command for command in commands if command]


def commands_of(script, folder):
    """The commands of a shell script in evidence/, which programs of these names print."""
    for program in ("torchrun", "python"):
        path = folder / program
        path.write_text('#!/bin/sh\necho "$@"\n')
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", HERE / "evidence" / script],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=environment,
    )
    return done.stdout.splitlines()


def parse_command(command):
    """Parses the flags of a command, and returns the name of its script, if it is one of ours."""
    words = shlex.split(command)
    names = [word for word in words if word in SCRIPTS]
    if not names:
        return None
    flags = words[words.index(names[0]) + 1 :]
    SCRIPTS[names[0]].parse(flags)
    return names[0]


def test_the_documented_commands_parse():
    scripts = {parse_command(command) for command in documented_commands()}
    assert scripts == {None, *SCRIPTS}


def test_the_other_documented_commands_are_known():
    others = [command for command in documented_commands() if parse_command(command) is None]
    assert others == [
        "python3 -m venv .venv",
        ". .venv/bin/activate",
        "pip install -r requirements.txt",
    ]


@pytest.mark.parametrize("script", EVIDENCE_SCRIPTS)
def test_the_commands_of_the_evidence_parse(script, tmp_path):
    commands = commands_of(script, tmp_path)
    parsed = [command for command in commands if parse_command(command)]
    others = [command for command in commands if command not in parsed]
    assert len(parsed) >= 10
    assert all(re.match(r"evidence/(baselines|official).py ", command) for command in others)


def test_the_documented_loop_runs():
    loop = code_blocks("python")[1]
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 512))
    x1, x2 = randn(2, 16, 3, 2, 2, dtype=torch.float32)
    names = {"backbone": backbone, "loader": [(x1, x2)]}
    exec(loop, names)
    assert names["loss"].isfinite()
    assert set(names["criterion"].parts) == {"alignment", "trace"}
    assert backbone[1].weight.grad.any()


def test_a_backbone_is_read_by_the_documented_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved, _ = train.build_backbone("resnet50", "imagenet")
    train.save({tmp_path / "backbone.pt": saved.state_dict()})
    lines = code_blocks("python")[2].replace("runs/imagenet/backbone.pt", "backbone.pt")
    names = {"torch": torch, "torchvision": torchvision}
    exec(lines, names)
    read = names["backbone"].state_dict()
    assert all(torch.equal(value, read[name]) for name, value in saved.state_dict().items())
    assert read.keys() - saved.state_dict().keys() == {"fc.weight", "fc.bias"}


def test_the_recipes_in_the_readme_are_those_of_train():
    """A row names a recipe, and with it others that differ only in the end of their name."""
    names = []
    for row in re.findall(
        r"^\| (`.*?`) (?:\(default\) )?\|", (HERE / "README.md").read_text(), re.M
    ):
        first, *others = re.findall("`(.*?)`", row)
        if first.startswith("imagenet-multicrop") or first.startswith("cwrgp-imagenet"):
            stem = first.rpartition("-")[0]
        else:
            stem = first
        names += [first, *(stem + other for other in others)]
    assert sorted(names) == sorted(train.RECIPES)


def test_the_tables_are_what_the_logs_say():
    files = [HERE / "README.md", HERE / "evidence" / "README.md"]
    written = "\n".join(path.read_text() for path in files)
    tables = run("evidence/tables.py").strip().split("\n\n")
    assert len(tables) >= 10
    for table in tables:
        assert table in written


def test_the_links_lead_somewhere():
    for path in (HERE / "README.md", HERE / "evidence" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if not target.startswith("https://"):
                assert (path.parent / target).exists(), target
