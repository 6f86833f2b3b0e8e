"""Measure training steps on this machine: those of train.py as it is started, and, beside them, the
official release's CIFAR loop.

    PYTHONPATH=. python evidence/gpu.py                    # needs a GPU
    PYTHONPATH=. python evidence/gpu.py --release INTL     # and the release, from a clone
    PYTHONPATH=. python evidence/gpu.py --tiny             # a trial of a minute, also on a CPU

INTL is a clone of github.com/winci-ai/INTL at commit d4cdfd8. No data are needed: train.py draws
shapes, 32 x 32 pixels, and its workers crop them. Images/s are the median over the logged intervals
without the first, which compiles and warms up; waiting is the share of their time that was spent
waiting for the workers. The release's loop runs on batches in memory that are augmented already.
"""

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import official
import torch

import train

TRAIN = Path(train.__file__)
RUNS = {
    "`cifar10`": "--recipe cifar10 --max-steps 600 --log-every 100",
    "`cifar10 --compile`": "--recipe cifar10 --max-steps 600 --log-every 100 --compile",
    "`cifar10 --compile --cuda-graph`": (
        "--recipe cifar10 --max-steps 600 --log-every 100 --compile --cuda-graph"
    ),
    "`imagenet`": "--recipe imagenet --max-steps 60 --log-every 10",
}
TINY = "--arch resnet10 --stem small --view-sizes 16 16 --batch-size 16 --hidden 64 --out 64"
TINY += " --max-steps 6 --log-every 2"


def print_row(*cells: str):
    print(f"| {' | '.join(cells)} |", flush=True)


def measure_train(name: str, flags: str):
    """A row from the log of a run of train.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), *flags.split(), "--dataset", "shapes"]
        done = subprocess.run([*command, "--output", folder], capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stdout, done.stderr, file=sys.stderr)
            print_row(name, "failed", "", "", "")
            return
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        batch_size = json.loads((Path(folder) / "config.json").read_text())["batch_size"]
    intervals = [line for line in log if "images_per_second" in line][1:]
    speed = statistics.median(line["images_per_second"] for line in intervals)
    waiting = statistics.median(line["waiting"] for line in intervals)
    memory = re.search(r"peak memory (\S+) GiB", done.stdout)
    print_row(
        name,
        f"{speed:,.0f}",
        f"{1000 * batch_size / speed:.1f}",
        f"{100 * waiting:.0f} %",
        memory[1] if memory else "",
    )


def measure_release(clone: Path, bfloat16: bool, tiny: bool):
    """A row for the release's function that trains an epoch, in its precision or in train.py's."""
    release, cfg = official.import_release(clone, epochs=1000)
    steps = 50
    if tiny:
        steps = 2
        cfg.bs = 16
    model, optimizer = official.build_model(release, cfg, bfloat16)
    views = [torch.randn(cfg.bs, 3, 32, 32) for _ in cfg.solarization_prob]
    if torch.cuda.is_available():
        model = torch.nn.DataParallel(model).cuda()  # as the release does for one GPU
        views = [view.pin_memory() for view in views]
        torch.backends.cudnn.benchmark = True
    else:
        official.stay_on_the_cpu()
    cfg.total_steps = 1000 * 195
    cfg.warmup_steps = cfg.warmup_eps * 195

    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        with contextlib.redirect_stdout(None):  # it prints its progress
            release.train([(views, None)] * steps, model, optimizer, 0, cfg)  # reads every loss
        seconds.append((time.perf_counter() - start) / steps)
    second = statistics.median(seconds[1:])
    precision = "bfloat16" if bfloat16 else "float32"
    name = f"official release, {precision}"
    print_row(name, f"{cfg.bs / second:,.0f}", f"{1000 * second:.1f}", "", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=train.HelpFormatter)
    parser.add_argument("--release", type=Path, metavar="CLONE", help="of winci-ai/INTL at d4cdfd8")
    parser.add_argument("--tiny", action="store_true", help="ResNet-10, 16 images of 16 pixels")
    args = parser.parse_args()

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{gpu}, torch {torch.__version__}, {train.spare_cores()} workers, {time.strftime('%F')}")
    print()
    print_row("step", "images/s", "ms per step", "waiting", "GiB")
    print_row(*["---"] * 5)
    for name, flags in RUNS.items():
        if torch.cuda.is_available() or "--compile" not in flags:
            measure_train(name, f"{flags} {TINY}" if args.tiny else flags)
    if args.release:
        for bfloat16 in (False, True):
            measure_release(args.release, bfloat16, args.tiny)


if __name__ == "__main__":
    main()
