"""Time and memory of the losses, forward and backward, compared with their bare matrix products.

    PYTHONPATH=. python evidence/losses.py

The input is two float32 views (m, d). "12 bare products" are those of the straightforward
computation: for each view a Gram matrix and two products with it (a Newton step's result applied to
the embedding), and twice as many in the backward pass; each costs 2 m d min(m, d) operations. The
losses take turns, so that a change in the machine's load affects all of them. Each row shows the
median time in ms, its ratio to the products, and the peak memory beyond the inputs, in views.
losses.txt is its output.
"""

import functools
import itertools
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from intl import INTLLoss, SpectralLoss

SIZES = [(256, 2048), (256, 8192), (1024, 512)]
ROUNDS = 15


def off_diagonal_squares(C: Tensor) -> Tensor:
    return C.square().sum() - C.diagonal().square().sum()


def barlow_twins(views: list[Tensor]) -> Tensor:
    """Zbontar et al., ICML 2021."""
    a, b = [(view - view.mean(0)) / view.std(0) for view in views]  # (m, d) each
    C = a.mT @ b / len(a)  # (d, d)
    return (1 - C.diagonal()).square().sum() + 0.005 * off_diagonal_squares(C)


def vicreg(views: list[Tensor]) -> Tensor:
    """Bardes et al., ICLR 2022."""
    loss = 25 * F.mse_loss(*views)
    for view in views:
        C = torch.cov(view.mT)  # (d, d)
        variance_loss = F.relu(1 - (C.diagonal() + 1e-4).sqrt()).mean()
        loss = loss + 12.5 * variance_loss + off_diagonal_squares(C) / view.shape[1]
    return loss


def peak_memory(step: Callable, device: torch.device) -> int:
    """Bytes that `step` allocates at its peak, beyond what is allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keep the profiler from reporting on itself
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def compare(m: int, d: int, device: torch.device):
    views = [torch.randn(m, d, device=device, requires_grad=True) for _ in range(2)]
    x = torch.randn(min(m, d), max(m, d), device=device)  # (n, k)
    P = torch.randn(min(m, d), min(m, d), device=device)  # (n, n)
    losses = {
        "INTL": INTLLoss(),
        "exact whitening": SpectralLoss(0.5),
        "Barlow Twins": barlow_twins,
        "VICReg": vicreg,
    }

    def products() -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(x @ x.mT, P @ x, P @ x) for _ in range(4)]

    def gradient(loss):
        torch.autograd.grad(loss(views), views)

    steps = {"12 bare products": products}
    for name, loss in losses.items():
        steps[name] = functools.partial(gradient, loss)

    times = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    median = {}
    for name, ms in times.items():
        median[name] = sorted(ms[1:])[ROUNDS // 2]  # the first round warms up

    print(f"\n{f'(m, d) = ({m}, {d})':24}{'ms':>10}{'x products':>12}{'memory':>10}")
    for name, step in steps.items():
        ratio = median[name] / median["12 bare products"]
        memory = peak_memory(step, device) / (4 * m * d)
        print(f"{name:24}{median[name]:10.1f}{ratio:12.2f}{memory:10.1f}", flush=True)


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    print(f"{device}, {threads} CPU threads, torch {torch.__version__}, {ROUNDS} rounds")
    for m, d in SIZES:
        compare(m, d, device)
