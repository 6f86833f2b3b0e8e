"""Measure the training step on this machine: throughput, kernels, launches and memory.

    PYTHONPATH=. python evidence/gpu.py                    # three recipes
    PYTHONPATH=. python evidence/gpu.py --release INTL     # and the official release's CIFAR loop
    PYTHONPATH=. python evidence/gpu.py --tiny             # a trial with tiny sizes, also on a CPU

INTL is a clone of github.com/winci-ai/INTL at commit d4cdfd8. The images are random bytes.

Each row is a way to run the step of train.py: eager; compiled; captured in a CUDA graph; or both,
which is its default on a GPU. A step starts from uint8 crops in pinned memory and includes the
augmentation. The rows of the release start from batches that are already augmented, in float32. In
the rows "through N workers" the images are also cropped, by train.py's workers, or augmented, by
the release's. Columns: the median over several rounds of images/s and ms per step; ms that the
device spends in kernels and copies; how often the host launches a kernel, a graph or a copy; peak
memory allocated by tensors. On a CPU the last three are "-".
"""

import argparse
import contextlib
import copy
import gc
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import official
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import train

RECIPES = ["cifar10", "imagenet", "imagenet-multicrop-200"]
MODES = ["eager", "compiled", "captured", "compiled and captured"]
WARMUP = 16  # steps before the first round on a GPU: train.CapturedStep records the 13th
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


# --- Measuring ------------------------------------------------------------------------------------


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device):
    """Releases what the previous row left behind."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # a row was compiled
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_per_step(
    run_steps: Callable, arguments: argparse.Namespace, device: torch.device
) -> float:
    """run_steps(n) runs n steps. The median over the rounds."""
    run_steps(WARMUP if device.type == "cuda" else 1)
    synchronize(device)
    rounds = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        run_steps(arguments.steps)
        synchronize(device)
        rounds.append((time.perf_counter() - start) / arguments.steps)
    return statistics.median(rounds)


def profile(run_steps: Callable, steps: int = 5) -> tuple[float, float]:
    """Per step: ms of kernels and copies on the device, and launches by the host."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run_steps(steps)
        torch.cuda.synchronize()

    microseconds = 0.0
    launches = 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            # Annotations, such as that of optimizer.step, span kernels that are counted already.
            if not getattr(event, "is_user_annotation", False):
                microseconds += event.time_range.elapsed_us()
        elif event.name.startswith(LAUNCHES):
            launches += 1
    return microseconds / 1000 / steps, launches / steps


def measure(
    name: str,
    build: Callable,
    batch_size: int,
    arguments: argparse.Namespace,
    device: torch.device,
) -> list[str]:
    """A row of the table. build() gives run_steps; an error becomes the row's result."""
    free_memory(device)
    try:
        run_steps = build()
        seconds = seconds_per_step(run_steps, arguments, device)
        cells = [f"{batch_size / seconds:,.0f}", f"{1000 * seconds:.2f}", "-", "-", "-"]
        if device.type == "cuda":
            kernel_ms, launches = profile(run_steps)
            memory = torch.cuda.max_memory_allocated() / 2**30
            cells[2:] = [f"{kernel_ms:.2f}", f"{launches:.0f}", f"{memory:.1f}"]
    except (Exception, SystemExit):
        traceback.print_exc()
        cells = ["failed", "", "", "", ""]
    return [name, *cells]


# --- The step of train.py -------------------------------------------------------------------------


def recipe_arguments(recipe: str, tiny: bool) -> argparse.Namespace:
    args = train.parse(["--recipe", recipe])
    if tiny:
        args.arch = "resnet18"
        args.batch_size = 16
        args.hidden = 64
        args.out = 64
        args.stem = "small"
        args.view_sizes = [16] * len(args.view_sizes)
    return args


def random_batches(args: argparse.Namespace, device: torch.device) -> Iterator[list[Tensor]]:
    """Endlessly two batches of uint8 crops in memory, pinned as by train.py's loader."""
    batches = []
    for _ in range(2):
        crops = []
        for size in args.view_sizes:
            shape = (args.batch_size, 3, size, size)
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
            crops.append(pixels.pin_memory() if device.type == "cuda" else pixels)
        batches.append(crops)
    return itertools.cycle(batches)


def loaded_batches(args: argparse.Namespace, images: int) -> Iterator[list[Tensor]]:
    """Batches of crops of random images, cropped by the workers as in train.py."""
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
    dataset = train.in_memory_dataset(pixels, [0] * images, ["random"])
    keys = train.batch_indices(torch.arange(images), args.batch_size, args.seed, 0, 10**6)
    views = train.MultiViewDataset(dataset, train.random_crops(args), args.seed)
    for batch, _ in train.make_loader(views, args.workers, batch_sampler=keys):
        yield batch


def build_step(
    args: argparse.Namespace,
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    batches: Iterator[list[Tensor]],
) -> Callable:
    """run_steps(n), whose step is that of train.pretrain."""
    compiled = mode.startswith("compiled")
    captured = mode.endswith("captured")

    torch.manual_seed(args.seed)
    network = train.Network(args).to(device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(network).requires_grad_(False) if args.ema else None
    ema_rate = torch.full((), 1 - args.ema, device=device)
    criterion = train.LOSSES[args.loss](args)
    fused = device.type == "cuda" and dtype != torch.float16
    optimizer = train.build_optimizer(network, args, device, fused)
    augmentation = train.Augmentation(args, compiled)
    if compiled:
        train.compile_modules(network, teacher, criterion)

    def train_step(views: list[Tensor]) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if teacher:
                with torch.no_grad():
                    for t, s in zip(teacher.parameters(), network.parameters()):
                        t.lerp_(s, ema_rate)
                    (target,) = teacher(views[:1])  # (b, out)
                z = network(views[1:])  # V - 1 times (b, out)
            else:
                z = network(views)  # V times (b, out)
        loss = criterion(z, teacher=target) if teacher else criterion(z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    run_step = train.CapturedStep(train_step) if captured else train_step
    first_step = itertools.count()

    def run_steps(n: int):
        for crops in itertools.islice(batches, n):
            step = next(first_step)
            views = augmentation(crops, step, device)
            train.set_learning_rate(optimizer, train.learning_rate(step, 195, args))
            run_step(views)

    return run_steps


# --- The loop of the official release -------------------------------------------------------------


class RandomImages(Dataset):
    """Random images of 32 pixels, as torchvision's CIFAR10 gives them to a transform."""

    def __init__(self, images: int, transform: Callable):
        self.pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), np.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int):
        return self.transform(Image.fromarray(self.pixels[i])), 0


class Take:
    """The next n batches of an iterator, with the length that the release asks for."""

    def __init__(self, iterator: Iterator, n: int):
        self.iterator = iterator
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self):
        return itertools.islice(self.iterator, self.n)


def augmented_batches(cfg, device: torch.device) -> Iterator:
    """Endlessly two batches as the release's loader gives them, (views, labels), from memory."""
    batches = []
    for _ in range(2):
        views = [torch.randn(cfg.bs, 3, 32, 32) for _ in cfg.solarization_prob]
        if device.type == "cuda":
            views = [view.pin_memory() for view in views]
        batches.append((views, None))
    return itertools.cycle(batches)


def release_batches(release, cfg, images: int, workers: int) -> Iterator:
    """Batches through the release's augmentation, epoch after epoch."""
    dataset = RandomImages(images, official.build_transform(release, cfg))
    loader = DataLoader(
        dataset, cfg.bs, shuffle=True, num_workers=workers, pin_memory=True, drop_last=True
    )
    while True:
        yield from loader


def build_release(
    release, cfg, bfloat16: bool, device: torch.device, batches: Iterator
) -> Callable:
    """run_steps(n), which calls the release's train function."""
    torch.manual_seed(0)
    model, optimizer = official.build_model(release, cfg, bfloat16)
    if device.type == "cuda":
        model = torch.nn.DataParallel(model).cuda()  # as its main_worker does for one GPU
    cfg.total_steps = 1000 * 195
    cfg.warmup_steps = cfg.warmup_eps * 195

    def run_steps(n: int):
        with contextlib.redirect_stdout(None):  # it prints its progress
            release.train(Take(batches, n), model, optimizer, 0, cfg)

    return run_steps


# --- The table ------------------------------------------------------------------------------------


def measure_recipe(
    recipe: str, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Iterator[list[str]]:
    """The rows of a recipe."""
    args = recipe_arguments(recipe, arguments.tiny)
    for mode in arguments.modes:
        if mode.endswith("captured") and device.type != "cuda":
            continue
        yield measure(
            f"`{recipe}`, {mode}",
            lambda mode=mode: build_step(args, mode, device, dtype, random_batches(args, device)),
            args.batch_size,
            arguments,
            device,
        )

    if recipe == "cifar10":
        mode = arguments.modes[-1] if device.type == "cuda" else "eager"
        images = 10 * args.batch_size if arguments.tiny else 50_000
        args.workers = arguments.workers
        yield measure(
            f"`{recipe}`, {mode}, through {args.workers} workers",
            lambda: build_step(args, mode, device, dtype, loaded_batches(args, images)),
            args.batch_size,
            arguments,
            device,
        )


def measure_release(arguments: argparse.Namespace, device: torch.device) -> Iterator[list[str]]:
    """The rows of the official release."""
    release, cfg = official.import_release(arguments.release, epochs=1000)
    if device.type == "cpu":
        official.stay_on_the_cpu()
    if arguments.tiny:
        cfg.bs = 16
    for precision in ("float32", "bfloat16"):
        bfloat16 = precision == "bfloat16"
        yield measure(
            f"official release, {precision}",
            lambda bfloat16=bfloat16: build_release(
                release, cfg, bfloat16, device, augmented_batches(cfg, device)
            ),
            cfg.bs,
            arguments,
            device,
        )

    images = 10 * cfg.bs if arguments.tiny else 50_000
    yield measure(
        f"official release, float32, through {arguments.workers} workers",
        lambda: build_release(
            release,
            cfg,
            False,
            device,
            release_batches(release, cfg, images, arguments.workers),
        ),
        cfg.bs,
        arguments,
        device,
    )


def print_row(cells: list[str]):
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=train.HelpFormatter)
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=default_device, help="what to measure")
    add("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="of train.py")
    add("--modes", nargs="+", choices=MODES, help="default: all on a GPU, eager on a CPU")
    add("--release", type=Path, metavar="CLONE", help="clone of winci-ai/INTL at d4cdfd8")
    add("--rounds", type=train.positive_int, default=5, help="the median of which is printed")
    add("--steps", type=train.positive_int, default=20, help="steps in a round")
    add("--workers", type=train.non_negative_int, default=train.spare_cores(), help="for images")
    add("--tiny", action="store_true", help="ResNet-18, 16 images of 16 pixels")
    arguments = parser.parse_args()
    if arguments.modes is None:
        arguments.modes = MODES if arguments.device == "cuda" else ["eager"]

    with train.distributed(arguments.device, "auto") as (device, dtype):
        name = "CPU"
        if device.type == "cuda":
            name = torch.cuda.get_device_name()
            torch.cuda.set_stream(torch.cuda.Stream())  # a CUDA graph needs a side stream
        precision = str(dtype).removeprefix("torch.")
        print(f"{name}, {precision}, torch {torch.__version__}, {time.strftime('%F')}", end=", ")
        print(f"{torch.get_num_threads()} threads", end=", ")
        print(f"{arguments.rounds} rounds of {arguments.steps} steps\n")
        print_row(["step", "images/s", "ms per step", "ms of kernels", "launches", "GiB"])
        print_row(["---"] * 6)
        for recipe in arguments.recipes:
            for row in measure_recipe(recipe, arguments, device, dtype):
                print_row(row)
        if arguments.release:
            for row in measure_release(arguments, device):
                print_row(row)


if __name__ == "__main__":
    main()
