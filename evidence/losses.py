"""Time and memory of the losses, forward and backward, beside the bare matrix products.

    PYTHONPATH=. python evidence/losses.py

Two float32 views (m, d). The products are those of the straightforward computation: a Gram matrix and a
transformed embedding for either view, and twice that backward, 12 of 2 m d min(m, d) operations. The
contenders take turns, so that all meet the same machine; a row says the median time, its ratio to the
products, and the peak memory beyond the inputs in units of one view."""

import itertools
import os
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from intl import INTLLoss, SpectralLoss

SIZES = (256, 2048), (256, 8192), (1024, 512)
ROUNDS = 15


def barlow_twins(views: list[Tensor]) -> Tensor:
    """Zbontar et al., ICML 2021."""
    a, b = ((v - v.mean(0)) / v.std(0) for v in views)
    C = a.mT @ b / len(a)  # (d, d)
    return (1 - C.diagonal()).square().sum() + 0.005 * (C.square().sum() - C.diagonal().square().sum())


def vicreg(views: list[Tensor]) -> Tensor:
    """Bardes et al., ICLR 2022."""
    loss = 25 * F.mse_loss(*views)
    for v in views:
        C = torch.cov(v.mT)  # (d, d)
        spread = F.relu(1 - (C.diagonal() + 1e-4).sqrt()).mean()
        loss = loss + 12.5 * spread + (C.square().sum() - C.diagonal().square().sum()) / v.shape[1]
    return loss


def peak_memory(step, device: torch.device) -> int:
    """Bytes that `step` holds at most beyond what is allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports on itself otherwise
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(events, initial=0))


def compare(m: int, d: int, device: torch.device):
    views = [torch.randn(m, d, device=device, requires_grad=True) for _ in range(2)]
    x = torch.randn(min(m, d), max(m, d), device=device)  # (n, k)
    f = torch.randn(min(m, d), min(m, d), device=device)  # (n, n)
    steps = {"12 bare products": lambda: [(x @ x.mT, f @ x, f @ x) for _ in range(4)]}
    losses = {"INTL, channel axis": INTLLoss(), "INTL, batch axis": INTLLoss(axis="batch")}
    losses |= {"exact whitening": SpectralLoss(0.5), "Barlow Twins": barlow_twins, "VICReg": vicreg}
    for name, loss in losses.items():
        steps[name] = lambda loss=loss: torch.autograd.grad(loss(views), views)

    times = {name: [] for name in steps}
    for name, step in itertools.chain(*[steps.items()] * (ROUNDS + 1)):  # the first round warms up
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times[name].append(1000 * (time.perf_counter() - start))
    median = {name: sorted(t[1:])[ROUNDS // 2] for name, t in times.items()}

    print(f"\n{f'(m, d) = ({m}, {d})':24}{'ms':>10}{'x products':>12}{'memory':>10}")
    for name, step in steps.items():
        ratio, memory = median[name] / median["12 bare products"], peak_memory(step, device) / (4 * m * d)
        print(f"{name:24}{median[name]:10.1f}{ratio:12.2f}{memory:10.1f}", flush=True)


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, {ROUNDS} rounds")
    for size in SIZES:
        compare(*size, device)
