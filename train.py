"""Pretrain a ResNet with INTL or a related loss, on a CPU, a GPU, or several machines.

    torchrun train.py                                                    # toy images, no data
    torchrun train.py --recipe cifar10 --data data/cifar10               # downloads CIFAR-10
    torchrun --nproc_per_node 8 train.py --recipe imagenet --data /data/imagenet
    torchrun train.py --recipe cwrgp-cifar10 --data data/cifar10         # CW-RGP, as published

Two machines: the same command on both, with --data and --output on storage that both share.

    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id intl --rdzv_backend c10d \\
        --rdzv_endpoint first-machine:29500 train.py --recipe imagenet --data /data/imagenet

A recipe sets the defaults of all flags (`--recipe NAME --help` shows them). --data is a folder with
train/ and, for k-NN, val/, each with a subfolder for every class; or, without train/, any tree of
images, which are then unlabeled; or the folder into which torchvision downloads CIFAR or STL-10.

The folder --output belongs to one run: checkpoint.pt, backbone.pt (the encoder), config.json,
log.jsonl, and TensorBoard's files if tensorboard is installed. The same command resumes the run.
"""

import argparse
import copy
import datetime
import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

import intl

# --- Recipes: the settings of the official releases (winci-ai/INTL, winci-ai/CW-RGP) --------------
# A recipe changes the defaults of the flags in `parse`.

# fmt: off
CIFAR = {"stem": "cifar", "epochs": 1000, "view_sizes": [32, 32]}
IMAGENET = {
    "arch": "resnet50", "zero_init_residual": True, "epochs": 800, "weight_decay": 1e-5,
    "decay_all": False, "hidden": 8192, "out": 8192, "blur": [1.0, 0.1],
}
MULTICROP = {
    **IMAGENET, "ema": 0.996, "view_sizes": [224, 224, 192, 160, 128, 96],
    "min_scale": [0.2, 0.2, 0.171, 0.143, 0.114, 0.086],
    "max_scale": [1.0, 1.0, 0.857, 0.714, 0.571, 0.429],
    "blur": [0.5], "solarize": [0.1],
}
CWRGP = {
    "loss": "cwrgp", "zero_init_residual": True, "joint_head": True,
    "min_scale": [0.2], "jitter": [0.4, 0.4, 0.4, 0.1], "solarize": [0.0],
}
CWRGP_SMALL = {  # CIFAR, STL-10 and Tiny-ImageNet
    **CWRGP, "stem": "cifar", "epochs": 1000, "view_sizes": [32, 32],
    "layers": 2, "hidden": 1024, "out": 512, "sub_batch": 64,
    "optimizer": "adam", "base_lr": 3e-3, "weight_decay": 1e-6,
    "warmup_epochs": 500 / 195,  # 500 steps; an epoch of CIFAR has 195 batches of 256
    "milestones": [0.95, 0.975],  # 50 and 25 epochs before the end
    "gray": 0.1,
}
CWRGP_64_PIXELS = {"stem": "cifar-pool", "view_sizes": [64, 64], "base_lr": 2e-3}
CWRGP_IMAGENET = {
    **CWRGP, "arch": "resnet50", "batch_size": 512, "base_lr": 0.05,
    "warmup_epochs": 500 / 2502, "view_sizes": [224, 224, 224, 224],
    "interpolation": "bilinear", "blur": [0.5], "out": 1024, "sub_batch": 128, "groups": 2,
}
RECIPES = {
    # Toy images, not from the papers. Strong color jitter and inversion leave two views nothing in
    # common but the shape.
    "shapes": {
        "dataset": "shapes", "arch": "resnet10", "stem": "small", "epochs": 5, "batch_size": 128,
        "base_lr": 1.6, "hidden": 512, "out": 512, "view_sizes": [32, 32], "min_scale": [0.4],
        "jitter": [0.4, 0.4, 0.4, 0.5], "jitter_prob": 1.0, "gray": 0.3,
        "solarize": [0.5], "solarize_threshold": 0, "evaluate_every": 5,
    },
    "cifar10": {**CIFAR, "dataset": "cifar10"},
    "cifar100": {**CIFAR, "dataset": "cifar100"},
    "imagenet100": {
        **IMAGENET, "arch": "resnet18", "zero_init_residual": False, "epochs": 400,
        "batch_size": 128, "base_lr": 0.5, "weight_decay": 2.5e-5, "hidden": 4096,  # out: 8192
    },
    "imagenet": IMAGENET,
    "imagenet-multicrop-100": {**MULTICROP, "epochs": 100, "base_lr": 0.5},
    "imagenet-multicrop-200": {**MULTICROP, "epochs": 200, "base_lr": 0.4},
    "imagenet-multicrop-400": {**MULTICROP, "epochs": 400, "base_lr": 0.4},
    "imagenet-multicrop-800": {**MULTICROP, "epochs": 800, "base_lr": 0.3},
    "cwrgp-cifar10": {**CWRGP_SMALL, "dataset": "cifar10", "repeats": 4},
    "cwrgp-cifar10-4views": {**CWRGP_SMALL, "dataset": "cifar10", "view_sizes": [32, 32, 32, 32]},
    "cwrgp-cifar100": {**CWRGP_SMALL, "dataset": "cifar100"},
    "cwrgp-stl10": {
        **CWRGP_SMALL, **CWRGP_64_PIXELS, "dataset": "stl10", "epochs": 2000,
        "warmup_epochs": 500 / 410, "milestones": [0.975, 0.9875],
    },
    "cwrgp-tiny-imagenet": {
        **CWRGP_SMALL, **CWRGP_64_PIXELS, "dataset": "tiny-imagenet",
        "warmup_epochs": 500 / 390, "hidden": 2048, "out": 1024, "sub_batch": 128, "groups": 2,
    },
    "cwrgp-imagenet-100": {**CWRGP_IMAGENET, "epochs": 100},
    "cwrgp-imagenet-200": {**CWRGP_IMAGENET, "epochs": 200},
    # Not published: exact transformations, whitening or another --power of the eigenvalues. They
    # need CW-RGP's settings (evidence/README.md).
    "whiten-cifar10": {**CWRGP_SMALL, "dataset": "cifar10", "loss": "power"},
}
# fmt: on
LOSSES = {
    "intl": lambda args: intl.INTLLoss(iterations=args.iterations, axis=args.axis, beta=args.beta),
    "iternorm": lambda args: intl.INTLLoss(iterations=args.iterations, axis=args.axis, beta=0.0),
    "power": lambda args: intl.SpectralLoss(args.power, axis=args.axis),
    "whiten": lambda args: intl.SpectralLoss(0.5, axis=args.axis),
    "none": lambda args: intl.SpectralLoss(0.0, axis=args.axis),
    "cwrgp": lambda args: intl.CWRGPLoss(
        groups=args.groups, sub_batch=args.sub_batch, repeats=args.repeats
    ),
}
MEAN_STD = {
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.43, 0.42, 0.39), (0.27, 0.26, 0.27)),
    "tiny-imagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# The first convolution (kernel, stride, padding), and whether a max-pool follows.
STEMS = {
    "imagenet": (7, 2, 3, True),
    "cifar": (3, 1, 1, False),
    "cifar-pool": (3, 1, 1, True),
    # The official INTL code since June 2023, after its results were published: padding 2, not 1.
    "cifar-padded": (3, 1, 2, False),
    "small": (3, 2, 1, True),
}
ARCHS = [
    "resnet10",  # not in torchvision: BasicBlocks [1, 1, 1, 1]
    *torchvision.models.list_models(torchvision.models, include=["resn*", "wide_resn*"]),
]

# Flags that may differ when a run is resumed: they change neither its schedule nor its objective.
# (The path of the data may differ, their digest may not.)
# fmt: off
MAY_CHANGE_ON_RESUME = {
    "data", "output", "max_steps", "workers", "log_every", "evaluate_every", "save_minutes",
    "device", "precision", "compile", "cuda_graph",
}
# fmt: on

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def print_rank0(message: str):
    if RANK == 0:
        print(message, flush=True)


# --- Flags ----------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and keeps the layout of the description."""


def positive(text: str) -> int:
    """An argparse type."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def between(low: float, high: float) -> Callable[[str], float]:
    """An argparse type for numbers with which, outside of these limits, a run would go on in
    silence."""

    def number(text: str) -> float:
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return float(text)

    return number


fraction = between(0, 1)
non_negative = between(0, math.inf)


def spare_cores() -> int:
    """CPU cores for each process's workers, excluding one for itself: from 1 to 32."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(32, max(1, cores // processes - 1))


def add_common_flags(parser: argparse.ArgumentParser):
    """Adds the flags that train.py, linear_eval.py and detect_transfer.py share."""
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--output", type=Path, help="output folder; None: runs/..., or beside the checkpoint")
    add("--seed", type=int, default=0, help="for weights, data order and augmentation")
    add(
        "--workers",
        type=int,
        default=spare_cores(),
        help="data-loading workers per process; increase it if `waiting` in the log is large",
    )
    add("--log-every", type=positive, default=10, help="log every N steps")
    add("--save-minutes", type=non_negative, default=10, help="save every N minutes")
    add("--device", default=default_device, choices=["cpu", "cuda"], help="where to train")


def parse_with_recipe(
    parser: argparse.ArgumentParser, recipes: dict[str, dict], argv: list[str] | None
) -> argparse.Namespace:
    """Adds --recipe and parses. The entries of the recipe are the defaults of the other flags."""
    parsers = [argparse.ArgumentParser(add_help=False), parser]
    for each in parsers:
        each.add_argument(
            "--recipe",
            default="shapes",
            choices=recipes,
            metavar="NAME",
            help=f"a set of defaults: {', '.join(recipes)}",
        )
    known, _ = parsers[0].parse_known_args(argv)
    parser.set_defaults(**recipes[known.recipe])
    return parser.parse_args(argv)


def per_view(values: list[float], views: int) -> list[float]:
    """One value for each view: [a, b] for six views is a, b, a, b, a, b."""
    return [values[i % len(values)] for i in range(views)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_common_flags(parser)
    boolean = argparse.BooleanOptionalAction
    # fmt: off
    add = parser.add_argument
    add("--data", type=Path, help="folder of images, see above; the recipe shapes needs none")
    add("--max-steps", type=positive, help="stop after this many steps of the schedule")
    add("--evaluate-every", type=positive, help="k-NN and ranks every N epochs and at the start "
        "and end; None: a hundred times in a run, but at most every epoch")
    add("--precision", choices=["bfloat16", "float16", "float32"], help="of the network; losses "
        "are computed in float32 or float64. None: bfloat16 on a GPU that has it, float16 on "
        "another, float32 on a CPU")
    add("--compile", action=boolean, default=False, help="torch.compile network, augmentation and "
        "INTL loss: a minute at the start, then 14 %% more images/s with cifar10 on one H200; only "
        "the network's compilation has run on a GPU, and none on several")
    add("--cuda-graph", action=boolean, default=False, help="replay the training step as a CUDA "
        "graph. Only a prototype has run on a GPU, with 2.2 times the images/s of --compile alone "
        "for cifar10 on an H200")

    group = parser.add_argument_group("data and network").add_argument
    group("--dataset", default="folder", choices=MEAN_STD, help="what --data holds; decides on the "
        "mean and standard deviation of the pixels, and on the resizing for k-NN")
    group("--arch", default="resnet18", choices=ARCHS, metavar="RESNET", help="torchvision model")
    group("--stem", default="imagenet", choices=STEMS, help="first layers; cifar: 3x3, no max-pool")
    group("--zero-init-residual", action=boolean, default=False,
        help="residual branches start at 0")
    group("--layers", type=positive, default=3, help="projector: number of linear layers")
    group("--hidden", type=positive, default=2048, help="projector: width of its hidden layers")
    group("--out", type=positive, default=2048, help="projector: width of the embedding")
    group("--joint-head", action=boolean, default=False,
        help="projector: one BN over all views together, and biases in every layer")

    group = parser.add_argument_group("loss").add_argument
    group("--loss", default="intl", choices=LOSSES, help="iternorm: intl with beta 0; whiten: "
        "exact whitening; power: of the eigenvalues, ^-p; none: cosine alignment only")
    group("--iterations", type=int, default=4, choices=range(1, 11), metavar="T",
        help="intl, iternorm: Newton steps, 1 to 10")
    group("--axis", default="channel", choices=["channel", "batch"],
        help="center and whiten samples over channels (published), or channels over the batch")
    group("--beta", type=non_negative, help="intl: weight of the trace loss; None: the published "
        "0.01 (log2 n - 3), n the batch size (or --out on the batch axis)")
    group("--power", type=non_negative, default=0.5, help="power: p; 0.5 is whitening")
    group("--groups", type=positive, default=4, help="cwrgp: groups of channels")
    group("--sub-batch", type=positive, help="cwrgp: samples whitened together; None: all")
    group("--repeats", type=positive, default=1, help="cwrgp: partitions averaged in a step")
    group("--orthogonality", choices=["so", "srip"], help="add this penalty on the backbone")
    group("--orthogonality-weight", type=non_negative, help="None: so 1e-6, srip 1e-3")
    group("--ema", type=fraction, default=0.0,
        help="momentum of an EMA teacher for view 0, rising to 1 along a cosine; 0: no teacher")

    group = parser.add_argument_group("schedule").add_argument
    group("--epochs", type=positive, default=100, help="length of the schedule")
    group("--batch-size", type=positive, default=256,
        help="GLOBAL batch size, over all processes; the loss depends on it")
    group("--optimizer", default="sgd", choices=["sgd", "adam"], help="sgd: momentum 0.9")
    group("--base-lr", type=non_negative, default=0.3, help="learning rate; sgd: per 256 images")
    group("--warmup-epochs", type=non_negative, default=2, help="linear warm-up")
    group("--milestones", type=fraction, nargs="+",
        help="multiply the rate by 0.2 at these fractions of the schedule, instead of a cosine")
    group("--weight-decay", type=float, default=1e-4, help="of the optimizer")
    group("--decay-all", action=boolean, default=True, help="decay biases and BN parameters, too")

    group = parser.add_argument_group("augmentation", "Scales, blur and solarize take one value "
        "for each view; fewer values are repeated cyclically.").add_argument
    group("--view-sizes", type=int, nargs="+", default=[224, 224], help="in pixels")
    group("--min-scale", type=fraction, nargs="+", default=[0.08], help="smallest area of a crop")
    group("--max-scale", type=fraction, nargs="+", default=[1.0], help="largest area of a crop")
    group("--interpolation", default="bicubic", choices=["bicubic", "bilinear"], help="of the crop")
    group("--jitter", type=fraction, nargs=4, default=[0.4, 0.4, 0.2, 0.1],
        help="strength of brightness, contrast, saturation, hue (at most 0.5)")
    group("--jitter-prob", type=fraction, default=0.8, help="probability of the color jitter")
    group("--gray", type=fraction, default=0.2, help="probability of a gray image")
    group("--blur", type=fraction, nargs="+", default=[0.0],
        help="probability of a Gaussian blur, sigma 0.1 to 2 pixels")
    group("--solarize", type=fraction, nargs="+", default=[0.0, 0.2],
        help="probability of solarizing")
    group("--solarize-threshold", type=int, default=128, help="invert pixels >= this value")
    # fmt: on
    args = parse_with_recipe(parser, RECIPES, argv)

    views = len(args.view_sizes)
    if args.orthogonality_weight is not None and args.orthogonality is None:
        parser.error("--orthogonality-weight needs --orthogonality")
    if args.loss == "cwrgp" and args.axis != "channel":
        parser.error("--axis: CW-RGP whitens over the channels only")
    args.min_scale = per_view(args.min_scale, views)
    args.max_scale = per_view(args.max_scale, views)
    args.blur = per_view(args.blur, views)
    args.solarize = per_view(args.solarize, views)
    if args.output is None:
        args.output = Path("runs") / args.recipe
    if args.evaluate_every is None:
        args.evaluate_every = math.ceil(args.epochs / 100)
    if args.orthogonality_weight is None:
        args.orthogonality_weight = 1e-3 if args.orthogonality == "srip" else 1e-6
    if args.precision is None:
        args.precision = "float32"
        if args.device == "cuda":
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            args.precision = "bfloat16" if has_bfloat16 else "float16"

    if args.batch_size % WORLD:
        parser.error(
            f"--batch-size {args.batch_size} is global: it must be a multiple of the number of "
            f"processes, {WORLD}"
        )
    if args.warmup_epochs >= args.epochs:
        parser.error("--epochs must exceed --warmup-epochs")
    if views < 2:
        parser.error("--view-sizes needs two values or more")
    if args.jitter[3] > 0.5:
        parser.error("--jitter: the hue's strength is at most 0.5, half of a full turn")
    if args.ema and args.loss == "cwrgp":
        parser.error("--ema: CW-RGP has no teacher")
    if args.loss == "intl" and args.beta is None and intl.published_beta(whitened_rows(args)) <= 0:
        parser.error(
            "the published beta needs a batch of more than 8 (--axis batch: --out): set --beta"
        )
    if args.cuda_graph:
        if args.device != "cuda" or WORLD > 1 or args.precision == "float16":
            parser.error("--cuda-graph needs a GPU, one process, and not float16")
        if args.loss not in ("intl", "iternorm"):
            parser.error(f"--cuda-graph: --loss {args.loss} computes an eigendecomposition")
    return args


def whitened_rows(args: argparse.Namespace) -> int:
    """n: samples of the global batch, or channels on the batch axis."""
    return args.batch_size if args.axis == "channel" else args.out


# --- Processes and random numbers -----------------------------------------------------------------


def launch(function: Callable, args: argparse.Namespace):
    """Calls function(args, device) in torchrun's process group."""
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if WORLD > 1:
        # Rank 0 downloads and, in detect_transfer.py, computes COCO's AP while the others wait.
        patience = datetime.timedelta(hours=2)
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=patience)
    function(args, device)
    if WORLD > 1:
        # The function has returned, so DDP is gone: gloo can deadlock if DDP outlives the group
        # (pytorch #56297).
        dist.destroy_process_group()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def convert_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """Several processes share the statistics of nn.BatchNorm. SyncBatchNorm exists on GPUs only."""
    if WORLD == 1:
        return network
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    print_rank0("on CPUs every process normalizes its own share of the batch (no SyncBatchNorm)")
    return network


def wrap_ddp(network: nn.Module, device: torch.device) -> nn.Module:
    if WORLD == 1:
        return network
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        network, device_ids=device_ids, gradient_as_bucket_view=True
    )


def broadcast_buffers(network: nn.Module):
    """Gives all processes rank 0's batch norm statistics, which are those that it saves. (DDP does
    so before a step; on CPUs they differ after it.)"""
    if WORLD > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def gather_objects(value) -> list:
    """The values of all processes in rank order. All processes must call it."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def digest(*values) -> str:
    """12 hexadecimal digits that identify the values: files (Path) by their content, tensors by
    their bytes, others by repr."""
    total = hashlib.blake2b(digest_size=6)
    for value in values:
        if isinstance(value, Path):
            value = torch.from_file(str(value), size=value.stat().st_size, dtype=torch.uint8)
        if isinstance(value, Tensor):
            total.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            total.update(repr(value).encode())
    return total.hexdigest()


def seed_from(*key) -> int:
    """A seed that depends only on the key."""
    number = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(number, "big") >> 1


def rng(*key) -> torch.Generator:
    """A generator that depends only on the key. No generator's state needs to be saved, because
    after initialization every random number comes from (seed, purpose, place in the schedule):
    neither an interruption nor the number of workers and processes changes it."""
    return torch.Generator().manual_seed(seed_from(*key))


# --- Output folder --------------------------------------------------------------------------------


def lock_folder(folder: Path, name: str = ".lock"):
    """Makes the folder. Rank 0 locks it until its process ends, or exits if another run holds the
    lock. POSIX locks are not inherited by workers, which may outlive a killed run by seconds."""
    if RANK != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        sys.exit(f"another run is using {folder}: wait for it, or choose another --output")
    except OSError:
        print(f"{folder} does not support locks: do not start two runs in this folder")


def exit_if_different(what: str, recorded: dict, config: dict, advice: str):
    differences = [
        f"{name} is {recorded.get(name)}, here {config.get(name)}"
        for name in {**config, **recorded}
        if recorded.get(name) != config.get(name)
    ]
    if differences:
        sys.exit(f"{what} has other settings ({'; '.join(differences)}): {advice}")


def read_checkpoint(path: Path, safe: tuple = ()) -> dict:
    """Loads tensors, plain values and the types in `safe`; anything else could execute code."""
    try:
        with torch.serialization.safe_globals(list(safe)):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)|got <class '(\S+)'>", str(error))
        reason = "it is damaged"
        if refused:
            reason = f"it holds a {refused[1] or refused[2]}"
        sys.exit(f"{path} cannot be read as a checkpoint of tensors and plain values: {reason}")
    except Exception as error:  # a damaged file can raise almost any exception
        sys.exit(f"{path} cannot be read as a checkpoint: {error!r}")


def resume(path: Path, config: dict) -> dict | None:
    """The checkpoint at `path`, or None. Exits if it is of another configuration, or if not all
    processes see the same one."""
    saved = None
    if path.exists():
        saved = read_checkpoint(path)
        exit_if_different(f"{path}", saved.get("config", {}), config, "choose another --output")
    steps = gather_objects(saved["step"] if saved else None)
    if any(step != steps[0] for step in steps):
        sys.exit(
            f"the processes found {path} at the steps {steps}: --output must be on storage that "
            "all machines share"
        )
    return saved


def open_run(folder: Path, config: dict) -> dict | None:
    """Locks the folder of a run, and returns its checkpoint, or None if it has none yet. Exits if
    the folder is another run's, or if the processes do not agree."""
    lock_folder(folder)
    configs = gather_objects(config)
    for rank in range(WORLD):
        advice = "all processes must get the same flags and the same data"
        exit_if_different(f"process {rank}", configs[rank], configs[0], advice)

    if not (folder / ".lock").exists():
        sys.exit(f"process {RANK} does not see {folder}/.lock: --output must be on shared storage")
    path = folder / "config.json"
    if path.exists():
        recorded = json.loads(path.read_text())
        exit_if_different(f"{path}", recorded, config, "choose another --output")
    backbone = folder / "backbone.pt"
    checkpoint = folder / "checkpoint.pt"
    # The first save may have been interrupted between its replacements.
    interrupted = temporary(checkpoint).exists() and not temporary(backbone).exists()
    if backbone.exists() and not checkpoint.exists() and not interrupted:
        sys.exit(
            f"{folder} holds the backbone.pt of a run without its checkpoint.pt: choose another "
            "--output"
        )
    return resume(checkpoint, config)


def write_config(folder: Path, config: dict):
    """With the first save: until then the folder belongs to no run."""
    path = folder / "config.json"
    temporary(path).write_text(json.dumps(config, indent=1))
    os.replace(temporary(path), path)


def temporary(path: Path) -> Path:
    return Path(f"{path}.tmp")


def to_cpu(state):
    """A nested state with every tensor on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [to_cpu(value) for value in state]
    return state


def tensors_in(state) -> Iterator[Tensor]:
    """The tensors of a nested state."""
    if isinstance(state, Tensor):
        yield state
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        for value in state:
            yield from tensors_in(value)


def exit_unless_finite(state: dict, step: int):
    """A finite loss does not make the weights finite: it was computed before their update."""
    if not all(tensor.isfinite().all() for tensor in tensors_in(state)):
        exit_diverged(f"a weight or its momentum after step {step}")


def exit_diverged(what: str):
    sys.exit(
        f"the run has diverged: {what} is not finite. This state was not saved. Start again "
        "with another --output and a lower learning rate"
    )


def save(files: dict[Path, dict]):
    """Writes a state to each path, with its tensors on the CPU so that it loads anywhere. All files
    are complete before the first replaces an older one."""
    for path, state in files.items():
        with open(temporary(path), "wb") as file:
            torch.save(to_cpu(state), file)
            file.flush()
            os.fsync(file.fileno())
    for path in files:
        os.replace(temporary(path), path)


def round_significant(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


class Log:
    """Appends lines to log.jsonl, prints them, and passes them to TensorBoard if it is installed;
    on rank 0 only. A resumed run repeats the steps after its checkpoint: the later line counts."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "log.jsonl"
        self.board = None
        if RANK != 0:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder, purge_step=step + 1)
        except ImportError:
            print("no TensorBoard files, as tensorboard is not installed")
        name = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
        threads = torch.get_num_threads()
        self(
            step=step,
            date=time.strftime("%F %T"),
            machine=f"{WORLD} x {name}, {threads} threads, torch {torch.__version__}",
            command=shlex.join(sys.argv),
        )

    def __call__(self, step: int, **numbers):
        if RANK != 0:
            return
        line = {"step": step}
        for name, value in numbers.items():
            line[name] = round_significant(value, 5) if isinstance(value, float) else value
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = {name: value for name, value in line.items() if not isinstance(value, list)}
        print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
        for name, value in shown.items():
            if self.board and isinstance(value, int | float):
                self.board.add_scalar(name, value, step)


class Throughput:
    """Measures images per second, and the part of the time that this process waits for data.
    Evaluations are not counted; the first reading includes the start of the workers."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.restart()

    def restart(self):
        self.start = time.monotonic()
        self.waited = 0.0
        self.steps = 0

    def watch(self, loader: DataLoader) -> Iterator:
        """Yields the batches of the loader."""
        batches = iter(loader)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            self.steps += 1
            yield batch

    def read(self, steps_left: int) -> dict[str, float]:
        """The numbers since the last reading."""
        seconds = time.monotonic() - self.start
        images_per_second = self.steps * self.batch_size / seconds
        numbers = {
            "images_per_second": images_per_second,
            "waiting": self.waited / seconds,
            "hours_left": steps_left * self.batch_size / images_per_second / 3600,
        }
        self.restart()
        return numbers


# --- Data: a Dataset of (uint8 image (3, h, w), label) --------------------------------------------
# Every data set has targets (n,), -1 where the label is unknown, classes, and a digest of its
# labels and, for files, of their names, which a resumed run and the other processes compare.

# Names of folders that mean a part of a data set, without digits, "-" and "_".
SPLIT_NAME = re.compile("(train(ing)?|trainval|val(id|idation)?|test(ing)?)(set|images)?")


def decode_image(path: str) -> Tensor:
    """Reads an image file as 8-bit RGB, (3, h, w) uint8. Raises RuntimeError with the file's name,
    also for images of 16 or 32 bits or floats, whose range Pillow does not know."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {image.mode}: convert it to 8 bits per channel")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow can raise almost any exception
        raise RuntimeError(f"{path} cannot be read as an image: {error}") from error


class ImageFiles(Dataset):
    """Image files, as (path, label) below a folder."""

    def __init__(self, root: Path, samples: list[tuple[str, int]], classes: list[str]):
        self.root = root
        self.samples = samples
        self.classes = classes
        self.targets = torch.tensor([label for _, label in samples])
        names = [os.path.relpath(path, root) for path, _ in samples]
        self.digest = digest(names, self.targets)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return decode_image(path), label


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk through links. Ends at a folder that cannot be read, or that is reached twice."""

    def fail(error: OSError):
        raise error

    seen = set()
    for directory, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            sys.exit(f"{directory} is a link to a folder whose images would count twice")
        seen.add(real)
        yield directory, folders, names


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def exit_if_images_beside_folders(folder: Path, needed: str):
    for entry in os.scandir(folder):
        if entry.is_file() and is_image(entry.name):
            sys.exit(f"{entry.path} would not be used: {folder} needs its images in {needed}")


def load_labeled(folder: Path) -> ImageFiles:
    """The images of a folder with one subfolder for every class."""
    exit_if_images_beside_folders(folder, "a subfolder for every class")
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # no subfolders, or one without images
        sys.exit(f"{folder}: {error}")
    if len(found.classes) < 2:
        sys.exit(f"{folder}/ has one class folder only, {found.classes[0]}/")
    print_rank0(f"{folder}: {len(found.samples)} images of {len(found.classes)} classes")
    return ImageFiles(folder, found.samples, found.classes)


def load_split_folder(root: Path, folders: set[str]) -> tuple[ImageFiles, ImageFiles | None]:
    """train/ and val/. Images elsewhere in the folder would be left out in silence."""
    exit_if_images_beside_folders(root, "train/ and val/")
    unused = folders - {"train", "val"}
    for name in sorted(unused):
        if name == "test" and "val" in folders:
            print_rank0(f"{root / name} is not used")
        elif any(is_image(file) for _, _, files in walk(root / name) for file in files):
            sys.exit(
                f"{root} has images in {name}/, beside train/: only train/ and val/ are used. "
                "Rename or move it; for an unlabeled tree rename train/"
            )
    train_set = load_labeled(root / "train")
    if "val" not in folders:
        print_rank0(f"{root} has no val/: no k-NN")
        return train_set, None
    val_set = load_labeled(root / "val")
    different = sorted(set(train_set.classes) ^ set(val_set.classes))
    if different:
        sys.exit(
            f"{root / 'train'} and {root / 'val'} have different class folders: {len(different)} "
            f"are in one of them only, such as {', '.join(different[:3])}"
        )
    return train_set, val_set


def load_tree(root: Path) -> ImageFiles:
    """All images of a tree, unlabeled. Splits that are not train/ and val/ would be mixed."""
    paths = []
    for directory, folders, names in walk(root):
        paths += [os.path.join(directory, name) for name in names if is_image(name)]
        for name in folders:
            if SPLIT_NAME.fullmatch(re.sub("[0-9_-]", "", name.lower())):
                sys.exit(
                    f"{os.path.join(directory, name)} is named like a part of a data set, and "
                    f"{root} has no train/: --data needs train/ and val/ directly below it, or "
                    "a tree of unlabeled images without such names"
                )
    if not paths:
        sys.exit(f"{root} and its subfolders contain no images ({' '.join(IMG_EXTENSIONS)})")
    print_rank0(f"{root}: {len(paths)} unlabeled images, no k-NN")
    return ImageFiles(root, [(path, -1) for path in sorted(paths)], [])


def in_memory_dataset(pixels: Tensor, targets: list[int], classes: list[str]) -> TensorDataset:
    """pixels: (n, 3, h, w) uint8."""
    images = TensorDataset(pixels, torch.tensor(targets))
    images.targets = images.tensors[1]
    images.classes = classes
    images.digest = digest(images.targets)
    return images


def download(kind: type, root: Path, **split) -> Dataset:
    """A torchvision dataset, downloaded by rank 0."""
    if RANK == 0:
        kind(root, download=True, **split)
    gather_objects("downloaded")
    return kind(root, **split)


def load_torchvision(dataset: str, root: Path, labeled: bool) -> tuple[Dataset, Dataset]:
    if dataset == "stl10":
        stl10 = torchvision.datasets.STL10
        train_set = download(stl10, root, split="train" if labeled else "train+unlabeled")
        val_set = download(stl10, root, split="test")
        return tuple(
            in_memory_dataset(torch.from_numpy(s.data), s.labels.tolist(), s.classes)
            for s in (train_set, val_set)
        )
    kinds = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    train_set = download(kinds[dataset], root, train=True)
    val_set = download(kinds[dataset], root, train=False)
    return tuple(
        in_memory_dataset(torch.from_numpy(s.data).permute(0, 3, 1, 2), s.targets, s.classes)
        for s in (train_set, val_set)
    )


def load_data(
    dataset: str, root: Path | None, seed: int, labeled: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Training and validation images by the rule at the top of this file. labeled: only training
    images whose label is known (STL-10 has others). Exits in a line if the rule does not apply."""
    if dataset == "shapes":
        if root:
            sys.exit("--dataset shapes draws its own images: with --data set another --dataset")
        # Pictures 0 to 4999; for validation from a million on.
        return draw_shapes(seed, 0, 5000), draw_shapes(seed, 10**6, 2000)
    if root is None:
        sys.exit(f"--dataset {dataset} needs --data FOLDER")

    folders = set()
    if root.is_dir():
        folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    if "train" in folders:
        return load_split_folder(root, folders)
    if dataset in ("cifar10", "cifar100", "stl10"):
        return load_torchvision(dataset, root, labeled)
    if not root.is_dir():
        sys.exit(f"--data {root} is not a folder")
    return load_tree(root), None


# Signed distances, positive inside, in units of the radius; all shapes have area 3.
SHAPES = {
    "disc": lambda x, y: 0.978 - x.hypot(y),
    "ring": lambda x, y: 0.276 - (x.hypot(y) - 0.865).abs(),
    "square": lambda x, y: 0.866 - torch.maximum(x.abs(), y.abs()),
    "triangle": lambda x, y: 0.762 - torch.maximum(y, 0.866 * x.abs() - 0.5 * y),
    "cross": lambda x, y: torch.minimum(
        0.375 - torch.minimum(x.abs(), y.abs()), 1.187 - torch.maximum(x.abs(), y.abs())
    ),
    "star": lambda x, y: 0.6 * (0.938 + 0.392 * torch.cos(5 * torch.atan2(x, -y)) - x.hypot(y)),
    "bars": lambda x, y: torch.minimum(1.102 - x.abs(), 0.343 - (y.abs() - 0.673).abs()),
    "half-disc": lambda x, y: torch.minimum(1.384 - x.hypot(y - 0.583), 0.583 - y),
}


def draw_scene(
    seed: int, index: int, size: int, kinds: list[int], min_radius: float, max_radius: float
) -> tuple[Tensor, Tensor]:
    """A picture of shapes (3, size, size) uint8, later ones in front, and the visible part of each
    (n, size, size) bool. Radii are fractions of half the size. Kinds differ only in their
    outline."""
    generator = rng(seed, "scene", index)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def color(level: float) -> Tensor:  # (3, 1, 1)
        brightness = level + 0.25 * rand(1)
        return brightness + 0.4 * (rand(3, 1, 1) - 0.5)

    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")  # (size, size)

    # The background: a gradient.
    angle = 2 * math.pi * rand(1)
    background = color(0.05)
    image = background + 0.1 * (angle.cos() * x + angle.sin() * y)  # (3, size, size)

    masks = []
    for kind in kinds:
        radius = min_radius + (max_radius - min_radius) * rand(1)
        turn = (rand(1) - 0.5) * math.pi / 4
        dx = (x - (1 - max_radius) * (2 * rand(1) - 1)) / radius  # (size, size)
        dy = (y - (1 - max_radius) * (2 * rand(1) - 1)) / radius
        u = turn.cos() * dx + turn.sin() * dy
        v = turn.cos() * dy - turn.sin() * dx
        distance = list(SHAPES.values())[kind](u, v) * radius * size / 2  # in pixels
        coverage = (0.5 + distance).clamp(0, 1)  # antialiased over one pixel
        image = torch.lerp(image, color(0.7), coverage)
        masks = [mask & (distance <= 0) for mask in masks]
        masks.append(distance > 0)

    if rand(1) >= 0.5:
        image = 1 - image
    image = image + 0.03 * torch.randn(3, size, size, generator=generator)
    return (255 * image.clamp(0, 1)).round().to(torch.uint8), torch.stack(masks)


def draw_shapes(seed: int, first: int, n: int) -> TensorDataset:
    """n pictures (3, 32, 32) of one shape, whose kind is the label. A picture depends only on
    the seed and its number, which starts at `first`."""
    labels = [i % len(SHAPES) for i in range(first, first + n)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in tiny operations threads only wait for each other
    pictures = [
        draw_scene(seed, first + i, 32, [label], 0.4, 0.6)[0] for i, label in enumerate(labels)
    ]
    torch.set_num_threads(threads)
    return in_memory_dataset(torch.stack(pictures), labels, list(SHAPES))


def random_crops(args: argparse.Namespace) -> list[v2.RandomResizedCrop]:
    """The crop of each view."""
    interpolation = v2.InterpolationMode(args.interpolation)
    scales = zip(args.min_scale, args.max_scale)
    return [
        v2.RandomResizedCrop(size, scale, interpolation=interpolation)
        for size, scale in zip(args.view_sizes, scales)
    ]


class MultiViewDataset(Dataset):
    """Loads and crops one image per item; runs in DataLoader workers. Item (epoch, index) -> uint8
    crops, one for each view, and the label."""

    def __init__(self, images: Dataset, crops: list, seed: int = 0):
        self.images = images
        self.crops = crops
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], int]:
        torch.manual_seed(seed_from(self.seed, "crop", *key))  # torchvision's crops draw from it
        _, index = key
        image, label = self.images[index]
        return [crop(image) for crop in self.crops], label


def batch_indices(
    rows: Tensor, batch_size: int, seed: int, first_step: int, stop_step: int
) -> Iterator[list[tuple[int, int]]]:
    """For each step the keys (epoch, index) of this process's share of the global batch. The order
    of an epoch depends only on the seed; its incomplete last batch is dropped."""
    steps_per_epoch = len(rows) // batch_size
    current_epoch = None
    for step in range(first_step, stop_step):
        epoch = step // steps_per_epoch
        if epoch != current_epoch:
            order = rows[torch.randperm(len(rows), generator=rng(seed, "order", epoch))]
            batches = order.split(batch_size)
            current_epoch = epoch
        share = batches[step % steps_per_epoch].chunk(WORLD)[RANK]
        yield [(epoch, i) for i in share.tolist()]


def make_loader(images: Dataset, workers: int, **sampling) -> DataLoader:
    return DataLoader(
        images,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        **sampling,
    )


def eval_loader(images: Dataset, dataset: str, size: int, workers: int) -> DataLoader:
    """This process's share of the images, RANK, RANK + WORLD, ..., each once and without
    augmentation. Exits if there are fewer images than processes."""
    if len(images) < WORLD:
        sys.exit(f"{len(images)} images for {WORLD} processes: every process needs one")
    resized = size
    if dataset == "folder":
        resized = size * 8 // 7  # 256 for 224
    elif dataset == "stl10":
        resized = size * 35 // 32  # 70 for 64
    crop = v2.Compose([v2.Resize(resized), v2.CenterCrop(size)])
    keys = [(0, i) for i in range(RANK, len(images), WORLD)]
    return make_loader(MultiViewDataset(images, [crop]), workers, batch_size=128, sampler=keys)


# --- Augmentation: everything after the crop, batched on the training device ----------------------
# Each image is changed as by torchvision's functions, but in floating point, and the order of the
# color jitter is drawn once for each batch and view. x is (n, 3, s, s) in [0, 1].


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies x without blocking the host."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def normalize(x: Tensor, dataset: str) -> Tensor:
    """Normalizes x (n, 3, s, s) in [0, 1] by the mean and standard deviation of a dataset."""
    means, stds = MEAN_STD[dataset]
    # By channel, since a tensor of means would be copied to the device in every step.
    channels = [(x[:, c] - means[c]) / stds[c] for c in range(3)]  # 3 times (n, s, s)
    return torch.stack(channels, dim=1).to(memory_format=torch.channels_last)


def grayscale(x: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 1, h, w)."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


# The color jitter: amount (n, 1, 1, 1), 0 leaves x unchanged.
def adjust_brightness(x: Tensor, amount: Tensor) -> Tensor:
    return (x * (1 + amount)).clamp(0, 1)


def adjust_contrast(x: Tensor, amount: Tensor) -> Tensor:
    mean = grayscale(x).mean((2, 3), keepdim=True)  # (n, 1, 1, 1)
    return torch.lerp(mean, x, 1 + amount).clamp(0, 1)


def adjust_saturation(x: Tensor, amount: Tensor) -> Tensor:
    return torch.lerp(grayscale(x), x, 1 + amount).clamp(0, 1)


def adjust_hue(x: Tensor, amount: Tensor) -> Tensor:
    """Rotates the hue by `amount` of a full turn, through HSV. With the hue H in [0, 6) a channel
    is value - chroma * clamp(min(k, 4 - k), 0, 1), where k = (H + 5, 3 or 1 for R, G, B) mod 6."""
    value = x.amax(1, keepdim=True)  # (n, 1, h, w), as are chroma, r, g, b and hue
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, 1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, hue)
    offset = torch.arange(5, 0, -2, device=x.device)[:, None, None]  # (3, 1, 1)
    k = torch.remainder(hue + 6 * amount + offset, 6)  # (n, 3, h, w)
    return (value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blurs by sigma (n, 1, 1, 1) pixels, cut off at 6 pixels, edges reflected: a product with a
    banded matrix (n, s, s) from the left, for the columns, and from the right, for the rows."""
    size = x.shape[-1]
    reach = min(6, size - 1)
    offset = torch.arange(-reach, reach + 1, device=x.device)  # (13,)
    kernel = torch.softmax(-0.5 * (offset / sigma[:, 0, 0]) ** 2, dim=-1)  # (n, 13)
    position = (torch.arange(size, device=x.device)[:, None] + offset).abs()  # (s, 13)
    position = (size - 1) - (size - 1 - position).abs()  # reflected at both ends
    matrix = x.new_zeros(len(x), size, size)
    matrix.scatter_add_(2, position.expand(len(x), -1, -1), kernel[:, None].expand(-1, size, -1))
    return matrix[:, None] @ x @ matrix[:, None].mT


def jitter_amounts(numbers: Tensor, prob: float, strengths: list[float]) -> list[Tensor]:
    """numbers (5, n, 1, 1, 1), uniform in [0, 1] -> an amount (n, 1, 1, 1) for each of the four
    operations: uniform in [-strength, strength], or 0 where the jitter is not applied."""
    applied = numbers[0] < prob
    return [torch.where(applied, (2 * u - 1) * s, 0) for u, s in zip(numbers[1:], strengths)]


def finish_view(
    x: Tensor,
    numbers: Tensor,
    gray: float,
    blur: float,
    solarize: float,
    threshold: int,
    dataset: str,
) -> Tensor:
    """Gray, blur, solarization and flip, each where its next number (n, 1, 1, 1), uniform in
    [0, 1], is below its probability (without blur or solarization fewer numbers are used); then
    normalization."""
    numbers = iter(numbers)
    x = torch.where(next(numbers) < gray, grayscale(x), x)
    if blur:
        blurred = next(numbers) < blur
        x = torch.where(blurred, gaussian_blur(x, 0.1 + 1.9 * next(numbers)), x)
    if solarize:
        inverted = (next(numbers) < solarize) & (x >= threshold / 255)
        x = torch.where(inverted, 1 - x, x)
    x = torch.where(next(numbers) < 0.5, x.flip(-1), x)
    return normalize(x, dataset)


class Augmentation:
    """Turns a batch of uint8 crops into the network's input. When compiled, each operation is
    compiled by itself, since the order of the jitter changes from batch to batch."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.jitter = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]
        self.finish = finish_view
        if args.compile:
            self.jitter = [torch.compile(adjust, dynamic=False) for adjust in self.jitter]
            self.finish = torch.compile(finish_view, dynamic=False)

    def __call__(self, views: list[Tensor], step: int, device: torch.device) -> list[Tensor]:
        """V times (b, 3, s, s) uint8 -> V times (b, 3, s, s), normalized. Numbers are drawn for the
        global batch; each process takes its share."""
        args = self.args
        augmented = []
        for view, pixels in enumerate(views):
            generator = rng(args.seed, "colour", step, view)  # the word is part of the seed
            # Jitter: whether, and 4 amounts; gray, blur, its sigma, solarization, flip.
            numbers = torch.rand(10, args.batch_size, 1, 1, 1, generator=generator)
            numbers = to_device(numbers.chunk(WORLD, dim=1)[RANK], device)  # (10, b, 1, 1, 1)
            amounts = jitter_amounts(numbers[:5], args.jitter_prob, args.jitter)
            x = to_device(pixels, device) / 255
            for i in torch.randperm(4, generator=generator).tolist():
                x = self.jitter[i](x, amounts[i])
            x = self.finish(
                x,
                numbers[5:],
                args.gray,
                args.blur[view],
                args.solarize[view],
                args.solarize_threshold,
                args.dataset,
            )
            augmented.append(x)
        return augmented


# --- Network, schedules, and the captured step ----------------------------------------------------


def build_backbone(arch: str, stem: str, **options) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its classifier, and the width of its features. `options` go to
    torchvision's constructor."""
    if arch == "resnet10":
        net = ResNet(BasicBlock, [1, 1, 1, 1], **options)
    else:
        net = torchvision.models.get_model(arch, **options)
    width = net.fc.in_features
    net.fc = nn.Identity()
    kernel, stride, padding, pool = STEMS[stem]
    if stem != "imagenet":
        net.conv1 = nn.Conv2d(3, 64, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not pool:
        net.maxpool = nn.Identity()
    return net, width


class Network(nn.Module):
    """Backbone and projector. It takes the list of views, so that DDP sees one forward pass. BN
    sees one view at a time, except in a joint head."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.joint_head = args.joint_head
        self.backbone, width = build_backbone(
            args.arch, args.stem, zero_init_residual=args.zero_init_residual
        )
        layers = []
        for _ in range(args.layers - 1):
            layers.append(nn.Linear(width, args.hidden, bias=args.joint_head))
            layers.append(nn.BatchNorm1d(args.hidden))
            layers.append(nn.ReLU())
            width = args.hidden
        self.projector = nn.Sequential(*layers, nn.Linear(width, args.out))

    def forward(self, views: list[Tensor]) -> list[Tensor]:  # V times (b, 3, s, s) -> (b, out)
        features = [self.backbone(view) for view in views]  # V times (b, width)
        if self.joint_head:
            return list(self.projector(torch.cat(features)).chunk(len(views)))
        return [self.projector(x) for x in features]


def peak_learning_rate(args: argparse.Namespace) -> float:
    if args.optimizer == "sgd":
        return args.base_lr * args.batch_size / 256
    return args.base_lr


def learning_rate(step: int, steps_per_epoch: int, args: argparse.Namespace) -> float:
    """For step 0, 1, ...: a linear warm-up, then a cosine down to peak / 1000, or drops."""
    peak = peak_learning_rate(args)
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    total_steps = args.epochs * steps_per_epoch

    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if args.milestones is not None:
        passed = [m for m in args.milestones if step >= m * total_steps]
        return peak * 0.2 ** len(passed)
    progress = (step + 1 - warmup_steps) / (total_steps - warmup_steps)
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * progress)) / 2)


def build_optimizer(
    network: nn.Module, args: argparse.Namespace, device: torch.device
) -> torch.optim.Optimizer:
    decay_params, no_decay_params = [], []
    for parameter in network.parameters():
        if args.decay_all or parameter.ndim > 1:
            decay_params.append(parameter)
        else:
            no_decay_params.append(parameter)
    groups = [{"params": decay_params}, {"params": no_decay_params, "weight_decay": 0.0}]

    options = {"lr": 0.0, "weight_decay": args.weight_decay}
    if args.cuda_graph:  # a replay reads the learning rate from the device
        options.update(lr=torch.tensor(0.0, device=device), fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **options)
    return torch.optim.Adam(groups, capturable=args.cuda_graph, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class CapturedStep:
    """Calls `step` for the first batches, which warm up cuDNN, the compiler and the optimizer's
    state; then records it in a CUDA graph and replays that: one launch instead of hundreds. The
    views and the results then have fixed places on the device, and what changes from step to step
    must be a tensor on the device, as a replay repeats the recorded Python numbers. All work must
    be on one side stream."""

    def __init__(self, step: Callable, warmup: int = 12):
        self.step = step
        self.warmup = warmup
        self.calls = 0
        self.graph = None

    def __call__(self, views: list[Tensor]):
        self.calls += 1
        if self.calls <= self.warmup:
            return self.step(views)
        if self.graph is None:
            self.capture(views)
        for static, view in zip(self.views, views):
            static.copy_(view)
        self.graph.replay()
        return self.results

    def capture(self, views: list[Tensor]):
        """Records a step without running it. Other threads, such as the one that pins memory, may
        allocate meanwhile."""
        self.views = [view.clone() for view in views]
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.results = self.step(self.views)
        print_rank0("the step is captured in a CUDA graph")


# --- Features and nearest neighbors ---------------------------------------------------------------


def gather_shares(share: Tensor) -> Tensor:
    """This process's rows RANK, RANK + WORLD, ... -> the rows of all processes in their order."""
    if WORLD == 1:
        return share
    shares = gather_objects(share.cpu())
    rows = share.new_empty(sum(map(len, shares)), *share.shape[1:])
    for rank in range(WORLD):
        rows[rank::WORLD] = shares[rank].to(rows.device)
    return rows


@torch.no_grad()
def extract_features(
    backbone: nn.Module, loader: DataLoader, dataset: str, device: torch.device, precision: str
) -> tuple[Tensor, Tensor]:
    """Features (n, width) in eval mode and labels (n,) of all images of all processes, in the order
    of the data set. Exits if the features are not finite. The backbone is left in eval mode."""
    broadcast_buffers(backbone)
    backbone.eval()
    features, labels = [], []
    for (images,), y in loader:
        x = normalize(to_device(images, device) / 255, dataset)
        with autocast(device, precision):
            features.append(backbone(x).float())
        labels.append(y.clone())  # a worker's tensor would keep a file open
    features = gather_shares(torch.cat(features))
    if not features.isfinite().all():
        sys.exit("a feature is not finite: the weights are not, or --precision is too low")
    return features, gather_shares(torch.cat(labels).to(device))


@torch.no_grad()
def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int,
    temperature: float | None = None,
) -> float:
    """Percentage of queries (q, width) whose k nearest rows of the bank (n, width), by Euclidean
    distance, vote for their label: one vote each, or exp(cosine / temperature) for unit rows."""
    classes = 1 + int(max(bank_labels.max(), query_labels.max()))
    correct = 0
    for q, y in zip(queries.split(256), query_labels.split(256)):
        distance, index = torch.cdist(q, bank).topk(min(k, len(bank)), largest=False)  # (b, k)
        weight = torch.ones_like(distance)
        if temperature is not None:
            cosine = 1 - distance**2 / 2
            weight = (cosine / temperature).exp()
        votes = weight.new_zeros(len(q), classes).scatter_add_(1, bank_labels[index], weight)
        correct += (votes.argmax(1) == y).sum().item()
    return 100 * correct / len(queries)


# --- Training -------------------------------------------------------------------------------------


def random_subset(images: Dataset, rows: Tensor, n: int) -> Subset:
    """n of the rows (or all), the same ones in every run."""
    order = torch.randperm(len(rows), generator=rng("some"))
    return Subset(images, rows[order[:n]].tolist())


def describe_loss(args: argparse.Namespace):
    """Prints the least value of INTL's loss, and warns of a beta that permits a collapse."""
    n = whitened_rows(args)
    beta = intl.published_beta(n) if args.beta is None else args.beta
    terms = 1 if args.ema else 2
    floor = intl.trace_floor(n, args.iterations)
    print_rank0(
        f"loss = alignment + {terms} x {beta:.3g} x trace. The trace loss is at least {floor:.1f} "
        f"after {args.iterations} Newton steps, so the loss at least {terms * beta * floor:.2f}"
    )
    balanced = intl.balanced_beta(n, args.iterations, trace_views=terms)
    if beta < balanced:
        enough = math.ceil(1e4 * balanced) / 1e4
        print_rank0(f"WARNING: the embedding may collapse: use --beta {enough:g} or more")


def pretrain(args: argparse.Namespace, device: torch.device):
    """Trains from the last checkpoint in args.output, if there is one, to the end."""
    # Data and configuration.
    train_set, val_set = load_data(args.dataset, args.data, args.seed)
    if len(train_set) < args.batch_size:
        sys.exit(
            f"{len(train_set)} training images do not fill one batch: lower --batch-size "
            f"{args.batch_size}"
        )
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    stop_step = min(total_steps, args.max_steps or total_steps)
    config = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUME}
    config["data"] = f"{len(train_set)} images, {train_set.digest}"
    config["steps_per_epoch"] = steps_per_epoch
    saved = open_run(args.output, config)
    first_step = saved["step"] if saved else 0

    # Network, teacher, loss, optimizer.
    torch.backends.cudnn.benchmark = True  # all batches have the same shape
    if args.cuda_graph:
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.manual_seed(args.seed)
    network = convert_batch_norm(Network(args), device)
    network = network.to(device, memory_format=torch.channels_last)
    backbone = network.backbone
    teacher = copy.deepcopy(network).requires_grad_(False) if args.ema else None
    ema_rate = torch.zeros((), device=device)  # 1 - momentum
    criterion = LOSSES[args.loss](args)
    optimizer = build_optimizer(network, args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "float16")

    # Resume.
    if saved:
        network.load_state_dict(saved["network"])
        # The momentum; the optimizer's settings are those of this call's flags.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["optimizer"]})
        if saved["scaler"]:  # a scaler that was off saved nothing
            scaler.load_state_dict(saved["scaler"])
        if teacher:
            teacher.load_state_dict(saved["teacher"])
        del saved

    # The evaluation calls the backbone by itself, which is not compiled.
    augmentation = Augmentation(args)
    if args.compile:
        network.compile(dynamic=False)
        if teacher:
            teacher.compile(dynamic=False)
        if isinstance(criterion, intl.INTLLoss):  # eigendecompositions do not compile
            criterion.compile(dynamic=False)
    model = wrap_ddp(network, device)

    # Evaluation: up to 20,000 labeled training images, the bank, classify up to 10,000 validation
    # images by k-NN: fewer, and less accurately, than in linear_eval.py. Without val/ only the rank
    # of the features is measured.
    query_images = train_set if val_set is None else val_set
    query_images = random_subset(query_images, torch.arange(len(query_images)), 10_000)
    eval_size = args.view_sizes[0]
    query_loader = eval_loader(query_images, args.dataset, eval_size, args.workers)
    bank_loader = None
    if val_set is not None:
        labeled = (train_set.targets >= 0).nonzero()[:, 0]
        bank = random_subset(train_set, labeled, 20_000)
        bank_loader = eval_loader(bank, args.dataset, eval_size, args.workers)

    # Images to train on.
    keys = batch_indices(
        torch.arange(len(train_set)), args.batch_size, args.seed, first_step, stop_step
    )
    crops = MultiViewDataset(train_set, random_crops(args), args.seed)
    train_loader = make_loader(crops, args.workers, batch_sampler=keys)

    # Say what the run is.
    log = Log(args.output, first_step)
    print_rank0(
        f"{args.epochs} epochs of {steps_per_epoch} steps, from step {first_step}, on {WORLD} x "
        f"{device.type} in {args.precision}; output: {args.output}\n"
        f"peak learning rate {peak_learning_rate(args):.3g}, global batch size {args.batch_size}"
    )
    if args.loss == "intl":
        describe_loss(args)

    def log_evaluation(step: int, z: Tensor | None = None):
        """Logs 5-NN accuracy, and effective ranks of the features and of the embedding z."""
        start = time.monotonic()
        numbers = {}
        settings = (args.dataset, device, args.precision)
        queries, query_labels = extract_features(backbone, query_loader, *settings)
        if bank_loader is not None:
            bank, bank_labels = extract_features(backbone, bank_loader, *settings)
            numbers["knn_top1"] = knn_top1(bank, bank_labels, queries, query_labels, k=5)
        network.train()
        if z is not None:
            z = intl.gather(z.float())  # (global batch, out)
        if RANK != 0:
            return
        numbers["feature_rank"] = intl.effective_rank(queries).item()
        if z is not None:
            spectrum = intl.spectrum(z)
            numbers["embedding_rank"] = intl.rank_of_spectrum(spectrum).item()
            numbers["condition_number"] = intl.condition_of_spectrum(spectrum).item()
            numbers["spectrum"] = [round_significant(value, 3) for value in spectrum.tolist()]
        seconds = time.monotonic() - start
        log(step, epoch=step / steps_per_epoch, **numbers, seconds=seconds)
        if z is not None and numbers["embedding_rank"] < 3:
            print("WARNING: the embedding has collapsed, its effective rank is below 3")

    def save_run(step: int):
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict()["state"],
            "scaler": scaler.state_dict(),
            "config": config,
            "step": step,
        }
        if teacher:
            state["teacher"] = teacher.state_dict()
        exit_unless_finite(state, step)
        weights = {
            name.removeprefix("backbone."): value
            for name, value in state["network"].items()
            if name.startswith("backbone.")
        }
        write_config(args.output, config)
        save({args.output / "backbone.pt": weights, args.output / "checkpoint.pt": state})

    def train_step(views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Forward, backward, update. Returns the loss () and an embedding (b, out), detached."""
        optimizer.zero_grad()
        with autocast(device, args.precision):
            if teacher:
                # As in the official code and MoCo the teacher follows the network first, and then
                # embeds view 0, which the network does not see.
                with torch.no_grad():
                    for t, s in zip(teacher.parameters(), network.parameters()):
                        t.lerp_(s, ema_rate)
                    (target,) = teacher(views[:1])  # (b, out)
                z = model(views[1:])  # V - 1 times (b, out)
            else:
                z = model(views)  # V times (b, out)
        loss = criterion(z, teacher=target) if teacher else criterion(z)
        if args.orthogonality:
            penalty = intl.orthogonality_penalty(backbone, args.orthogonality)
            loss = loss + args.orthogonality_weight * penalty

        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), z[0].detach()

    run_step = CapturedStep(train_step) if args.cuda_graph else train_step

    step = first_step
    if step == 0:
        log_evaluation(0)  # of the random network
    evaluation_interval = steps_per_epoch * args.evaluate_every
    last_save = time.monotonic()
    throughput = Throughput(args.batch_size)
    for pixels, _ in throughput.watch(train_loader):
        lr = learning_rate(step, steps_per_epoch, args)
        set_learning_rate(optimizer, lr)
        if teacher:  # 1 - momentum falls from 1 - args.ema to 0
            ema_rate.fill_((1 - args.ema) * (1 + math.cos(math.pi * step / total_steps)) / 2)
        if args.loss == "cwrgp":
            torch.manual_seed(seed_from(args.seed, "loss", step))  # random partitions
        views = augmentation(pixels, step, device)
        loss, z = run_step(views)
        step += 1

        # The host waits for the device only to log, to save and to evaluate (and in SyncBatchNorm).
        should_evaluate = step % evaluation_interval == 0 or step == stop_step
        if should_evaluate or step % args.log_every == 0:
            numbers = {"loss": loss.item()}
            for name, value in criterion.parts.items():
                numbers[name] = value.item()
            # With float16 the scaler skips a step that overflows, and halves its scale, which is
            # always 1 otherwise.
            if not math.isfinite(numbers["loss"]) and scaler.get_scale() <= 1:
                exit_diverged(f"the loss at step {step}, {numbers}")
            speed = throughput.read(total_steps - step)
            log(step, epoch=step / steps_per_epoch, **numbers, lr=lr, **speed)
        if should_evaluate:
            log_evaluation(step, z)
            throughput.restart()
        if RANK == 0 and time.monotonic() - last_save >= 60 * args.save_minutes:
            save_run(step)
            last_save = time.monotonic()

    if RANK == 0:
        save_run(step)
    memory = ""
    if device.type == "cuda":
        memory = f"; peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB per process"
    print_rank0(f"saved {args.output / 'backbone.pt'} of step {step} of {total_steps}{memory}")


def main(argv: list[str] | None = None):
    launch(pretrain, parse(argv))


if __name__ == "__main__":
    main()
