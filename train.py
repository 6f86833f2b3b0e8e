"""Pretrain a ResNet with INTL or a related loss, on a CPU, a GPU, or several machines.

    torchrun train.py                                                    # toy images, no data
    torchrun train.py --recipe cifar10 --data data/cifar10               # downloads CIFAR-10
    torchrun --nproc_per_node 8 train.py --recipe imagenet --data /data/imagenet
    torchrun train.py --recipe cwrgp-cifar10 --data data/cifar10         # CW-RGP, as published

A recipe sets the defaults of all flags (`--recipe NAME --help` shows them); without --recipe they
are those of the toy recipe `shapes`. Writes checkpoint.pt, backbone.pt (the encoder's weights),
config.json, log.jsonl and TensorBoard events to --output. Rerun the same command to resume.

Two machines: the same command on both, with --data and --output on storage that both share.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # a fresh store for each restart
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id intl --rdzv_backend c10d \\
        --rdzv_endpoint first-machine:29500 --max-restarts 3 \\
        train.py --recipe imagenet --data /data/imagenet --output /shared/intl
"""

import argparse
import contextlib
import copy
import fcntl
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import intl

# --- Recipes: the settings of the official releases (winci-ai/INTL, winci-ai/CW-RGP) --------------
# A recipe changes the defaults of the flags in `parse`. Names in [brackets] are tests in
# test_intl.py. [test_recipes_are_the_published_ones]

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
    "warmup_epochs": 500 / 195,  # 500 steps; an epoch of CIFAR has 195
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
    # Toy images, not from the papers. Strong colour jitter and inversion leave two views nothing
    # in common but the shape.
    "shapes": {
        "dataset": "shapes", "stem": "small", "epochs": 6, "batch_size": 128, "warmup_epochs": 1,
        "hidden": 512, "out": 512, "view_sizes": [32, 32], "min_scale": [0.4],
        "jitter": [0.4, 0.4, 0.4, 0.5], "jitter_prob": 1.0, "gray": 0.3,
        "solarize": [0.5], "solarize_threshold": 0,
    },
    "cifar10": {**CIFAR, "dataset": "cifar10"},
    "cifar100": {**CIFAR, "dataset": "cifar100"},
    "imagenet100": {
        **IMAGENET, "arch": "resnet18", "zero_init_residual": False, "epochs": 400,
        "batch_size": 128, "base_lr": 0.5, "weight_decay": 2.5e-5, "hidden": 4096,
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
    # Not published: exact transformations l^-p, which need CW-RGP's settings (evidence/README.md).
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
        groups=args.groups,
        sub_batch=args.sub_batch,
        repeats=args.repeats,
        covariance_weight=args.covariance_weight,
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
ARCHS = torchvision.models.list_models(torchvision.models, include=["resn*", "wide_resn*"])

# Flags that may differ when a run is resumed: they do not alter its schedule or its objective.
# fmt: off
MAY_CHANGE_ON_RESUME = {
    "data", "output", "max_steps", "workers", "log_every", "save_minutes", "device", "precision",
    "compile", "cuda_graph",
}
# fmt: on

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def print_rank0(message: str):
    if RANK == 0:
        print(message, flush=True)


# --- Flags ----------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the description, and shows every default that is not None."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)".strip()


def bounded(low: float, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def number(text: str):
        value = kind(text)
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")

    return number


positive_int = bounded(1, kind=int)
non_negative_int = bounded(0, kind=int)
non_negative = bounded(0)
fraction = bounded(0, 1)


def spare_cores() -> int:
    """CPU cores for each process's workers, excluding one for itself: from 1 to 32."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(32, max(1, len(os.sched_getaffinity(0)) // processes - 1))


def add_common_flags(parser: argparse.ArgumentParser, precision: str | None = None):
    """Adds the flags that train.py, linear_eval.py and detect_transfer.py share. precision: the
    default of --precision; None omits the flag."""
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--output", type=Path, help="output folder (default: runs/..., or beside the checkpoint)")
    add("--seed", type=non_negative_int, default=0, help="for weights, data order and augmentation")
    add(
        "--workers",
        type=non_negative_int,
        default=spare_cores(),
        help="data-loading workers per process; increase it if `waiting` in the log is large",
    )
    add("--log-every", type=positive_int, default=10, help="log every N steps")
    add("--save-minutes", type=non_negative, default=10, help="save every N minutes")
    add("--device", default=default_device, choices=["cpu", "cuda"], help="where to train")
    if precision:
        add(
            "--precision",
            default=precision,
            choices=["auto", "bfloat16", "float16", "float32"],
            help="of the network; losses are computed in float32 or float64",
        )


def per_view(values: list[float], views: int) -> list[float]:
    """One value for each view: [a, b] for six views is a, b, a, b, a, b."""
    return [values[i % len(values)] for i in range(views)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_common_flags(parser, precision="auto")
    boolean = argparse.BooleanOptionalAction
    # fmt: off
    add = parser.add_argument
    add("--recipe", default="shapes", choices=RECIPES, metavar="NAME",
        help=f"published settings, or a toy: {', '.join(RECIPES)}")
    add("--data", type=Path, help="folder with train/ and val/, any tree of images, or the "
        "download folder of a torchvision dataset; shapes needs none")
    add("--max-steps", type=positive_int, help="stop after this many steps of the schedule")
    add("--knn-images", type=positive_int, default=20_000, help="training images that vote in k-NN")
    add("--compile", action=boolean, help="torch.compile network, augmentation and INTL loss; "
        "takes a minute at the start (default: on a GPU with a C compiler, except for shapes)")
    add("--cuda-graph", action=boolean, help="replay the training step as a CUDA graph (default: "
        "where possible, but not with several processes)")

    add = parser.add_argument_group("data and network").add_argument
    add("--dataset", default="folder", choices=MEAN_STD, help="what --data holds")
    add("--arch", default="resnet18", choices=ARCHS, metavar="RESNET", help="torchvision model")
    add("--stem", default="imagenet", choices=STEMS, help="first layers; cifar: 3x3, no max-pool")
    add("--zero-init-residual", action=boolean, default=False, help="residual branches start at 0")
    add("--layers", type=positive_int, default=3, help="projector: number of linear layers")
    add("--hidden", type=positive_int, default=2048, help="projector: width of its hidden layers")
    add("--out", type=positive_int, default=2048, help="projector: width of the embedding")
    add("--joint-head", action=boolean, default=False,
        help="projector: one BN over all views together, and biases in every layer")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="intl", choices=LOSSES, help="iternorm: intl with beta 0; whiten: "
        "exact whitening; power: l^-p; none: cosine alignment only")
    add("--iterations", type=bounded(1, 40, int), default=4, help="intl, iternorm: Newton steps T")
    add("--axis", default="channel", choices=["channel", "batch"],
        help="centre and whiten samples over channels (published), or channels over the batch")
    add("--beta", type=non_negative, help="intl: weight of the trace loss (default: published, "
        "0.01 (log2 n - 3), or intl.balanced_beta if that is larger)")
    add("--power", type=float, default=0.5, help="power: p of l^-p; 0.5 is whitening")
    add("--groups", type=positive_int, default=4, help="cwrgp: groups of channels")
    add("--sub-batch", type=positive_int, help="cwrgp: samples whitened together (default: all)")
    add("--repeats", type=positive_int, default=1, help="cwrgp: partitions averaged in a step")
    add("--covariance-weight", type=non_negative, default=0.0, help="cwrgp: weight of the "
        "covariance loss in the first half of the schedule, 0.005 to 0.01 for ImageNet")
    add("--orthogonality", choices=["so", "srip"], help="add this penalty on the backbone")
    add("--orthogonality-weight", type=non_negative, help="(default: so 1e-6, srip 1e-3)")
    add("--ema", type=fraction, default=0.0,
        help="momentum of an EMA teacher for view 0, rising to 1 along a cosine; 0: no teacher")

    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=positive_int, default=100, help="length of the schedule")
    add("--batch-size", type=positive_int, default=256,
        help="GLOBAL batch size, over all processes; the loss depends on it")
    add("--optimizer", default="sgd", choices=["sgd", "adam"], help="sgd: momentum 0.9")
    add("--base-lr", type=non_negative, default=0.3, help="learning rate; sgd: per 256 images")
    add("--warmup-epochs", type=non_negative, default=2, help="linear warm-up")
    add("--milestones", type=fraction, nargs="+",
        help="multiply the rate by 0.2 at these fractions of the schedule, instead of a cosine")
    add("--weight-decay", type=non_negative, default=1e-4, help="of the optimiser")
    add("--decay-all", action=boolean, default=True, help="decay biases and BN parameters, too")

    add = parser.add_argument_group("augmentation", "Scales, blur and solarize take one value for "
        "each view; fewer values are repeated cyclically.").add_argument
    add("--view-sizes", type=positive_int, nargs="+", default=[224, 224], help="in pixels")
    add("--min-scale", type=fraction, nargs="+", default=[0.08], help="smallest area of a crop")
    add("--max-scale", type=fraction, nargs="+", default=[1.0], help="largest area of a crop")
    add("--interpolation", default="bicubic", choices=["bicubic", "bilinear"], help="of the crop")
    add("--jitter", type=non_negative, nargs=4, default=[0.4, 0.4, 0.2, 0.1],
        help="strength of brightness, contrast, saturation, hue")
    add("--jitter-prob", type=fraction, default=0.8, help="probability of the colour jitter")
    add("--gray", type=fraction, default=0.2, help="probability of a grey image")
    add("--blur", type=fraction, nargs="+", default=[0.0],
        help="probability of a Gaussian blur, sigma 0.1 to 2 pixels")
    add("--solarize", type=fraction, nargs="+", default=[0.0, 0.2],
        help="probability of solarising")
    add("--solarize-threshold", type=int, default=128, help="invert pixels >= this value")
    # fmt: on

    # A first pass finds the recipe, whose settings then become the defaults.
    recipe_parser = argparse.ArgumentParser(add_help=False)
    recipe_parser.add_argument("--recipe", default="shapes")
    recipe = recipe_parser.parse_known_args(argv)[0].recipe
    parser.set_defaults(**RECIPES.get(recipe, {}))
    args = parser.parse_args(argv)

    views = len(args.view_sizes)
    args.min_scale = per_view(args.min_scale, views)
    args.max_scale = per_view(args.max_scale, views)
    args.blur = per_view(args.blur, views)
    args.solarize = per_view(args.solarize, views)
    if args.output is None:
        args.output = Path("runs") / args.recipe
    if args.orthogonality_weight is None:
        args.orthogonality_weight = 1e-3 if args.orthogonality == "srip" else 1e-6

    if args.batch_size % WORLD:
        parser.error(
            f"--batch-size {args.batch_size} is global: it must be a multiple of the number of "
            f"processes, {WORLD}"
        )
    if args.warmup_epochs >= args.epochs:
        parser.error("--epochs must exceed --warmup-epochs")
    if views < 2:
        parser.error("--view-sizes needs two values or more")
    if args.ema and args.loss == "cwrgp":
        parser.error("--ema: CW-RGP has no teacher")
    return args


# --- Processes and random numbers -----------------------------------------------------------------


@contextlib.contextmanager
def distributed(device_name: str, precision: str) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Joins torchrun's process group, if there are several processes, and leaves it at the end of
    the block. Yields this process's device and the dtype for autocast."""
    if device_name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = {"backend": "nccl", "device_id": device}
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        best = "bfloat16" if has_bfloat16 else "float16"
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
        backend = {"backend": "gloo"}
        best = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"  # private API
    # Float32 matrix products in full precision, as the loss needs; convolutions may use TF32.
    torch.set_float32_matmul_precision("highest")
    dtype = getattr(torch, best if precision == "auto" else precision)

    if WORLD == 1:
        yield device, dtype
        return

    store, _, _ = next(dist.rendezvous("env://"))
    if int(os.environ.get("LOCAL_WORLD_SIZE", WORLD)) == WORLD:
        # After a restart torchrun's store still holds the addresses of the previous attempt: each
        # attempt gets a prefix. On several machines the counts of restarts can differ: there the
        # variable in the command at the top gives each attempt its own store.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(store=store, rank=RANK, world_size=WORLD, **backend)
    failed = False
    try:
        yield device, dtype
    except BaseException as error:
        failed = True
        while error is not None:  # the frames of the traceback hold the DDP module, see below
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        raise
    finally:
        # DDP and a captured graph must be gone before the group: gloo can deadlock if DDP's
        # destructor runs last (pytorch #56297), NCCL waits for graphs. After an error NCCL would
        # wait for the other processes, too; torchrun ends them when this one exits.
        # [test_ddp_is_released_before_the_process_group]
        gc.collect()
        if not (failed and device.type == "cuda"):
            dist.destroy_process_group()


def wrap_ddp(network: nn.Module, device: torch.device) -> nn.Module:
    """Wraps the network in DDP, if there are several processes. DDP need not send rank 0's buffers
    before each forward pass: the statistics of GlobalBatchNorm are the same on all processes, and
    those of per-process BN (fine-tuning) are sent before an evaluation, which alone uses them."""
    if WORLD == 1:
        return network
    ddp = nn.parallel.DistributedDataParallel
    new_name = "forward_sync_buffers" in inspect.signature(ddp).parameters  # torch >= 2.13
    return ddp(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{"forward_sync_buffers" if new_name else "broadcast_buffers": False},
    )


def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes in rank order. Processes may hold different numbers of rows."""
    if WORLD == 1:
        return rows
    parts = [None] * WORLD
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


def seed_from(*key) -> int:
    """63 bits that depend only on the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(*key) -> torch.Generator:
    """A generator that depends only on the key. After initialisation every random number comes from
    (seed, purpose, place in the schedule): neither the number of workers and processes nor an
    interruption changes it, and no generator state needs to be saved.
    [test_order_and_crops_do_not_depend_on_workers_or_processes]"""
    return torch.Generator().manual_seed(seed_from(*key))


# --- Output folder: lock, checkpoints, log --------------------------------------------------------


@contextlib.contextmanager
def lock_output_dir(output_dir: Path, name: str = ".lock") -> Iterator[None]:
    """Creates the folder. Rank 0 holds an advisory lock on it while the block runs, and exits if
    another run holds it. A file system without locks is not an error."""
    if RANK != 0:
        yield
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / name).touch()
    except OSError as error:
        sys.exit(f"{output_dir} cannot be written ({error.strerror}): choose another --output")
    with open(output_dir / name, "r+") as file:  # an exclusive lock on NFS needs write access
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another run is using {output_dir}: wait for it, or choose another --output")
        except OSError:
            print(f"{output_dir} does not support locks: do not start two runs in this folder")
        yield


def to_cpu(state):
    """A nested state with every tensor on the CPU and contiguous, so that it loads anywhere."""
    if torch.is_tensor(state):
        return state.detach().cpu().contiguous()
    if isinstance(state, dict):
        return {key: to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(to_cpu(value) for value in state)
    return state


def replace_file(path: Path, write: Callable[[BinaryIO], None]):
    """Writes a temporary file, flushes and renames it: `path` is always a complete file."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(state: dict, path: Path):
    replace_file(path, lambda file: torch.save(to_cpu(state), file))


def save_text(text: str, path: Path):
    replace_file(path, lambda file: file.write(text.encode()))


def read_checkpoint(path: Path) -> dict:
    """Loads only tensors and primitives: anything else in a pickle could execute code."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError:
        sys.exit(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and "
            "plain values. If it is a whole module, save its state_dict()"
        )
    except Exception as error:  # a damaged file can raise almost any exception
        sys.exit(f"{path} cannot be read as a checkpoint: {error}")


def refuse_other_config(path: Path, recorded: dict, config: dict):
    """Exits if the configuration recorded in `path` differs from this run's."""
    differences = [
        f"{name} was {recorded.get(name)}, is now {value}"
        for name, value in config.items()
        if recorded.get(name) != value
    ]
    if differences:
        sys.exit(
            f"{path} was written with other settings ({'; '.join(differences)}): choose another "
            f"--output, or delete the folder {path.parent}"
        )


def resume(path: Path, config: dict) -> dict | None:
    """The checkpoint at `path`, or None. Exits if it belongs to another run, or if not all
    processes see the same one."""
    saved = None
    if path.exists():
        saved = read_checkpoint(path)
        refuse_other_config(path, saved.get("config", {}), config)

    if WORLD > 1:
        steps = [None] * WORLD
        dist.all_gather_object(steps, saved["step"] if saved else 0)
        if len(set(steps)) > 1:
            sys.exit(
                f"the processes found {path} at different steps, {steps}: --output must be on "
                "storage that all machines share"
            )
    return saved


def resume_run(output_dir: Path, config: dict) -> dict | None:
    """The checkpoint of the run in this folder, or None. A folder belongs to the run whose
    config.json it holds, even before the first checkpoint."""
    saved = resume(output_dir / "checkpoint.pt", config)
    if saved is None:
        path = output_dir / "config.json"
        try:
            recorded = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):  # none yet, or damaged with nothing to lose
            return None
        refuse_other_config(path, recorded, config)
    return saved


def read_log(path: Path, until_step: int) -> list[str]:
    """The lines of log.jsonl up to this step, skipping what a crash has corrupted."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(errors="replace").split("\n"):
        line = line.strip("\0")
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= until_step:
            kept.append(line)
    return kept


def round_significant(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


class Logger:
    """Writes numbers to the terminal, as JSON to log.jsonl, and for TensorBoard; only on rank 0.
    When a run is resumed, entries after its checkpoint are dropped: they will be written again."""

    def __init__(self, output_dir: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path = output_dir / "log.jsonl"
        save_text(json.dumps(config, indent=1), output_dir / "config.json")
        kept = read_log(self.path, step) if step else []
        save_text("".join(f"{line}\n" for line in kept), self.path)
        self.board = SummaryWriter(output_dir, purge_step=step + 1)

        print_rank0("  ".join(f"{name} {value}" for name, value in config.items()))
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        threads = torch.get_num_threads()
        self(
            step=step,
            date=time.strftime("%F %T"),
            machine=f"{WORLD} x {gpu}, {threads} threads, torch {torch.__version__}",
            command=shlex.join(sys.argv),
        )

    def __call__(self, **numbers):
        for name, value in numbers.items():
            if isinstance(value, float):
                numbers[name] = round_significant(value, 5)
        shown = {name: value for name, value in numbers.items() if not isinstance(value, list)}
        print_rank0("  ".join(f"{name} {value}" for name, value in shown.items()))
        with open(self.path, "a") as file:
            file.write(json.dumps(numbers) + "\n")
        for name, value in shown.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, numbers["step"])


def throughput(images: int, seconds: float, waited: float, images_left: int) -> dict[str, float]:
    """What is logged of the speed: `images` in so many seconds, of which `waited` for data."""
    images_per_second = images / seconds
    return {
        "images_per_second": images_per_second,
        "waiting": waited / seconds,
        "hours_left": images_left / images_per_second / 3600,
    }


# --- Data: a Dataset of (uint8 image (3, h, w), label) --------------------------------------------


class SharedList:
    """A list pickled into one tensor, which workers share. Each worker would get its own copy of a
    Python list of a million entries."""

    def __init__(self, items):
        pickled = [pickle.dumps(item) for item in items]
        self.ends = torch.tensor([0, *map(len, pickled)]).cumsum(0)
        self.bytes = torch.frombuffer(bytearray(b"".join(pickled)), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int):
        return pickle.loads(self.bytes[self.ends[i] : self.ends[i + 1]].numpy())


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to 8-bit RGB. 16-bit grey is scaled, since convert("RGB") would clip it to
    white. 32-bit integers and floats have no defined range and are refused."""
    if image.mode == "RGB":
        return image
    is_16_bit = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode.startswith("I;16") or is_16_bit:
        bits = 16
        if image.format == "TIFF":
            bits = image.tag_v2.get(258, (16,))[0]  # BitsPerSample, such as 12
        grey = np.asarray(image).astype(np.float64) * 255 / (2**bits - 1)
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no defined value range; convert it to 8 bits")
    return image.convert("RGB")


def decode_image(path: str) -> Tensor:
    """Reads an image file: (3, h, w) uint8. Raises an error that names the file."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # Pillow can raise almost any exception
        raise RuntimeError(
            f"{path} cannot be read as an image ({error}): repair or delete it"
        ) from error


class LabelledImageFolder(ImageFolder):
    """One folder for each class. Hidden folders are not classes."""

    def find_classes(self, directory) -> tuple[list[str], dict[str, int]]:
        classes = class_folders(Path(directory))
        return classes, {name: i for i, name in enumerate(classes)}


class UnlabelledImageFolder(ImageFolder):
    """All images of a tree as a single class."""

    def find_classes(self, directory) -> tuple[list[str], dict[str, int]]:
        return ["."], {".": 0}


def class_folders(root: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."
    )


def load_folder(root: Path, labelled: bool = True) -> ImageFolder:
    """The images in a folder, with a class for each of its subfolders if there are any."""
    has_classes = labelled and bool(class_folders(root))
    kind = LabelledImageFolder if has_classes else UnlabelledImageFolder
    images = kind(root, loader=decode_image)

    # Without hidden files and folders below the classes. (torchvision writes "/./" for no class.)
    hidden = re.compile(r"/\.[^/]")
    samples = [sample for sample in images.samples if not hidden.search(sample[0], len(str(root)))]
    if not samples:
        sys.exit(f"{root} has no images that are not hidden")
    set_samples(images, samples)
    return images


def set_samples(images: ImageFolder, samples: list[tuple[str, int]]):
    """Replaces the images of a folder by these paths and labels."""
    images.targets = torch.tensor([label for _, label in samples])
    images.samples = SharedList(samples)
    images.imgs = None  # ImageFolder's alias of its list


def load_tiny_imagenet_val(root: Path, classes: list[str]) -> ImageFolder:
    """Tiny-ImageNet's val/ as it is distributed: images/ and a table of file names and classes."""
    images = load_folder(root / "images", labelled=False)
    table = (root / "val_annotations.txt").read_text().splitlines()
    class_of = dict(line.split("\t")[:2] for line in table)
    samples = [(path, classes.index(class_of[Path(path).name])) for path, _ in images.samples]
    set_samples(images, samples)
    images.classes = classes
    return images


def in_memory_dataset(pixels: Tensor, targets: list[int], classes: list[str]) -> TensorDataset:
    """pixels: (n, 3, h, w) uint8."""
    images = TensorDataset(pixels, torch.tensor(targets))
    images.targets = images.tensors[1]
    images.classes = classes
    return images


def download(kind: type, root: Path, **split):
    """A torchvision dataset, downloaded by rank 0."""
    if RANK == 0:
        kind(root, download=True, **split)
    if WORLD > 1:
        dist.barrier()
    return kind(root, **split)


def load_torchvision(dataset: str, root: Path, labelled: bool) -> tuple[Dataset, Dataset]:
    if dataset == "stl10":
        split = "train" if labelled else "train+unlabeled"
        stl10 = torchvision.datasets.STL10
        sets = [download(stl10, root, split=split), download(stl10, root, split="test")]
        return tuple(
            in_memory_dataset(torch.from_numpy(s.data), s.labels.tolist(), s.classes) for s in sets
        )
    cifar = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    sets = [download(cifar[dataset], root, train=train) for train in (True, False)]
    return tuple(
        in_memory_dataset(torch.from_numpy(s.data).permute(0, 3, 1, 2), s.targets, s.classes)
        for s in sets
    )


def load_data(
    dataset: str, root: Path | None, seed: int, labelled: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Training and validation images. Both have `targets` (n,), -1 where the label is unknown, and
    `classes`. labelled: only training images whose label is known (STL-10 has others)."""
    if dataset == "shapes":
        if root:
            sys.exit("--dataset shapes draws its own images: with --data choose another --recipe")
        return draw_shapes(seed, 0, 6000), draw_shapes(seed, 10**6, 1000)
    if root is None:
        sys.exit(f"--dataset {dataset} needs --data FOLDER")

    train_dir, val_dir = root / "train", root / "val"
    if train_dir.is_dir():
        train_set = load_folder(train_dir)
        val_set = None
        if (val_dir / "val_annotations.txt").exists():
            val_set = load_tiny_imagenet_val(val_dir, train_set.classes)
        elif val_dir.is_dir():
            val_set = load_folder(val_dir)
        if val_set and val_set.classes != train_set.classes:
            different = sorted(set(train_set.classes) ^ set(val_set.classes))
            sys.exit(
                f"{train_dir} and {val_dir} have different class folders: {len(different)} are "
                f"only in one of them, such as {', '.join(different[:3])}"
            )
        return train_set, val_set

    if dataset in ("cifar10", "cifar100", "stl10"):
        return load_torchvision(dataset, root, labelled)
    if not root.is_dir():
        sys.exit(f"--dataset {dataset} needs --data FOLDER, and {root} is not a folder")
    return load_folder(root, labelled=False), None


# Signed distances, positive inside, in units of the radius; all shapes have area 3.
# [test_shapes_differ_only_in_outline]
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
    outline. [test_shapes_differ_only_in_outline]"""
    generator = rng(seed, "scene", index)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def colour(level: float) -> Tensor:  # (3, 1, 1)
        brightness = level + 0.25 * rand(1)
        return brightness + 0.4 * (rand(3, 1, 1) - 0.5)

    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")  # (size, size)

    # The background: a gradient.
    angle = 2 * math.pi * rand(1)
    background = colour(0.05)
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
        image = torch.lerp(image, colour(0.7), coverage)
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
    pictures = [
        draw_scene(seed, first + i, 32, [label], 0.4, 0.6)[0] for i, label in enumerate(labels)
    ]
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
        torch.default_generator.manual_seed(
            seed_from(self.seed, "crop", *key)
        )  # of torchvision's crops
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


def eval_loader(images: Dataset, dataset: str, size: int, workers: int) -> DataLoader:
    """This process's share of the images, each once and without augmentation, in order."""
    if dataset == "folder":
        crop = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size)])  # 256 for 224
    elif dataset == "stl10":
        crop = v2.Compose([v2.Resize(size * 35 // 32), v2.CenterCrop(size)])  # 70 for 64
    else:
        crop = v2.Resize(size)
    keys = [(0, i) for i in range(RANK, len(images), WORLD)]
    images = MultiViewDataset(images, [crop])
    return make_loader(images, min(8, workers), batch_size=128, sampler=keys)


def exit_with_parent(worker: int):
    """Ends a worker when its run dies. Otherwise the fork server and the workers of a killed run
    wait for each other forever.
    [test_a_killed_run_leaves_no_process_behind]"""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def make_loader(images: Dataset, workers: int, **sampling) -> DataLoader:
    """A DataLoader whose workers live as long as the run. They start from a fork server: forking
    this process, with the threads of gloo and autograd, can leave a worker waiting forever for a
    lock that a thread held."""
    options = {}
    if workers:
        if len(os.fsencode(tempfile.gettempdir())) > 75:  # 32 are added, 107 fit
            sys.exit(f"{tempfile.gettempdir()} is too long for a socket's path: set TMPDIR=/tmp")
        multiprocessing.set_forkserver_preload(["torchvision.transforms.v2"])  # import it only once
        options = {
            "num_workers": workers,
            "multiprocessing_context": "forkserver",
            "persistent_workers": True,
            "prefetch_factor": 4,
            "worker_init_fn": exit_with_parent,
        }
    return DataLoader(images, pin_memory=torch.cuda.is_available(), **options, **sampling)


# --- Augmentation: everything after the crop, batched on the training device ----------------------
# Each image gets what torchvision's function would give it, but the order of the colour jitter is
# drawn once for each batch and view. [test_batched_jitter_equals_torchvision]


def grayscale(x: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 1, h, w)."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotates the hue of x (n, 3, h, w) by shift (n, 1, 1, 1) of a full turn, through HSV."""
    value = x.amax(1, keepdim=True)  # (n, 1, h, w), as are chroma, r, g, b and hue
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, 1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, hue)
    sector = torch.arange(5, 0, -2, device=x.device)[:, None, None]  # (3, 1, 1)
    k = torch.remainder(hue + 6 * shift + sector, 6)  # (n, 3, h, w)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blurs x (n, 3, s, s) by sigma (n, 1, 1, 1) pixels, cut off at 6 pixels, edges reflected: a
    product with a matrix from the left and from the right."""
    size = x.shape[-1]
    reach = min(6, size - 1)
    offset = torch.arange(-reach, reach + 1, device=x.device)  # (13,)
    kernel = torch.softmax(-0.5 * (offset / sigma[:, 0, 0]) ** 2, dim=-1)  # (n, 13)
    position = (torch.arange(size, device=x.device)[:, None] + offset).abs()  # (s, 13)
    position = (size - 1) - (size - 1 - position).abs()  # reflected at both ends
    matrix = x.new_zeros(len(x), size, size)
    matrix.scatter_add_(2, position.expand(len(x), -1, -1), kernel[:, None].expand(-1, size, -1))
    return matrix[:, None] @ x @ matrix[:, None].mT


# The colour jitter: x (n, 3, s, s) in [0, 1], amount (n, 1, 1, 1), 0 leaves x unchanged.
def adjust_brightness(x: Tensor, amount: Tensor) -> Tensor:
    return (x * (1 + amount)).clamp(0, 1)


def adjust_contrast(x: Tensor, amount: Tensor) -> Tensor:
    mean = grayscale(x).mean((2, 3), keepdim=True)  # (n, 1, 1, 1)
    return torch.lerp(mean, x, 1 + amount).clamp(0, 1)


def adjust_saturation(x: Tensor, amount: Tensor) -> Tensor:
    return torch.lerp(grayscale(x), x, 1 + amount).clamp(0, 1)


def adjust_hue(x: Tensor, amount: Tensor) -> Tensor:
    return shift_hue(x, amount).clamp(0, 1)


def jitter_amounts(random: dict[str, Tensor], prob: float, strength: list[float]) -> list[Tensor]:
    """For brightness, contrast, saturation and hue: uniform in [-strength, strength], or 0 where
    the jitter is not applied. Each (n, 1, 1, 1)."""
    names = ("brightness", "contrast", "saturation", "hue")
    applied = random["apply"] < prob
    return [torch.where(applied, (2 * random[name] - 1) * s, 0) for name, s in zip(names, strength)]


def finish_view(
    x: Tensor,
    random: dict[str, Tensor],
    gray: float,
    blur: float,
    solarize: float,
    threshold: int,
) -> Tensor:
    """Grey, blur, solarise and flip, each with its probability: (n, 3, s, s) -> (n, 3, s, s)."""
    x = torch.where(random["gray"] < gray, grayscale(x), x)
    if blur:
        sigma = 0.1 + 1.9 * random["sigma"]
        x = torch.where(random["blur"] < blur, gaussian_blur(x, sigma), x)
    if solarize:
        inverted = (random["solarize"] < solarize) & (x >= threshold / 255)
        x = torch.where(inverted, 1 - x, x)
    return torch.where(random["flip"] < 0.5, x.flip(-1), x)


def random_names(args: argparse.Namespace, view: int) -> list[str]:
    """The uniform numbers that a view's augmentation needs for each image, in the order in which
    they are drawn."""
    names = ["apply", "brightness", "contrast", "saturation", "hue", "gray"]
    if args.blur[view]:
        names += ["blur", "sigma"]
    if args.solarize[view]:
        names += ["solarize"]
    return [*names, "flip"]


class Augmentation:
    """Turns a batch of uint8 crops into the network's input. compile: each operation is compiled
    separately, since the order of the jitter changes from batch to batch."""

    def __init__(self, args: argparse.Namespace, compile: bool = False):
        def maybe_compile(function):
            return torch.compile(function, dynamic=False) if compile else function

        self.args = args
        self.amounts = maybe_compile(jitter_amounts)
        self.jitter = [
            maybe_compile(adjust_brightness),
            maybe_compile(adjust_contrast),
            maybe_compile(adjust_saturation),
            maybe_compile(adjust_hue),
        ]
        self.finish = maybe_compile(finish_view)
        self.normalize = maybe_compile(normalize)

    def augment_view(
        self, x: Tensor, view: int, random: dict[str, Tensor], order: list[int]
    ) -> Tensor:
        """x (n, 3, s, s) in [0, 1]; random: uniform numbers (n, 1, 1, 1) by name; order: of the
        four operations of the jitter."""
        args = self.args
        amounts = self.amounts(random, args.jitter_prob, args.jitter)
        for i in order:
            x = self.jitter[i](x, amounts[i])
        return self.finish(
            x,
            random,
            args.gray,
            args.blur[view],
            args.solarize[view],
            args.solarize_threshold,
        )

    def __call__(self, views: list[Tensor], step: int, device: torch.device) -> list[Tensor]:
        """V times (b, 3, s, s) uint8 -> V times (b, 3, s, s), normalised. Numbers are drawn for the
        global batch; each process takes its share."""
        args = self.args
        augmented = []
        for view, pixels in enumerate(views):
            generator = rng(args.seed, "colour", step, view)
            # The 10 rows are enough for all of random_names.
            numbers = torch.rand(10, args.batch_size, 1, 1, 1, generator=generator)
            share = to_device(numbers.chunk(WORLD, dim=1)[RANK], device)  # (10, b, 1, 1, 1)
            random = dict(zip(random_names(args, view), share))
            order = torch.randperm(4, generator=generator).tolist()
            x = self.augment_view(to_device(pixels, device) / 255, view, random, order)
            augmented.append(self.normalize(x, args.dataset))
        return augmented


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies x without blocking the host. [test_no_step_waits_for_the_device]"""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def normalize(x: Tensor, dataset: str) -> Tensor:
    """Normalises x (n, 3, s, s) in [0, 1] by the mean and standard deviation of a dataset."""
    means, stds = MEAN_STD[dataset]
    # By channel, since a tensor of means would be copied to the device in every step.
    channels = [(x[:, c] - means[c]) / stds[c] for c in range(3)]  # 3 times (n, s, s)
    return torch.stack(channels, dim=1).to(memory_format=torch.channels_last)


# --- Batch norm over all processes ----------------------------------------------------------------


def mean_and_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased variance (C,) of x (n, C, ...) over all dimensions but the second."""
    if x.device.type == "cpu":  # what nn.BatchNorm calls there; var_mean is many times slower
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    return mean, var


class Normalize(torch.autograd.Function):
    """Batch norm of x (n, C, ...) by the mean (C,) and the biased variance (C,) over all processes,
    which together hold `count` (1,) values per channel. The gradient passes through mean and
    variance, too (Ioffe & Szegedy 2015, section 3)."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        rstd = (var + ctx.eps).rsqrt()
        # With mean and variance as constants, and z = (x - mean) * rstd: grad * weight * rstd, and
        # this process's sums of grad * z and of grad.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, mean, rstd, False, ctx.eps, [True, True, True]
        )

        # Through mean and variance: -weight * rstd * (mean(grad * z) * z + mean(grad)), with means
        # over all processes. That is one more batch norm of x, with another weight and bias.
        means = torch.stack([grad_weight, grad_bias]) / count  # (2, C), float64 as count is
        dist.all_reduce(means)
        w, b = -means.to(x.dtype) * weight * rstd  # (C,), (C,)
        grad_x = F.batch_norm(x, mean, var, w, b, eps=ctx.eps).add_(grad_x)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.BatchNorm1d and 2d with the statistics of the global batch, on CPUs and GPUs: one
    all-reduce of 2 C + 1 numbers in the forward pass and one of 2 C in the backward pass.
    Processes may hold different numbers of samples. Unlike nn.SyncBatchNorm it never makes the
    host wait for the device, and torch.compile traces it without a graph break.
    [test_global_batch_norm_equals_one_process]"""

    def _check_input_dim(self, x: Tensor):
        pass

    def forward(self, x: Tensor) -> Tensor:  # (n, C, ...)
        if not self.training:
            return super().forward(x)
        y = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

        with torch.no_grad():
            # From each process its sum, sum of squares and count per channel, in float64:
            # E[x^2] - m^2 would cancel in float32 for a mean far from zero. The count is padding,
            # since inductor shares constant parts of a torch.cat between layers, and the
            # all-reduce of one layer would overwrite that of the next.
            # [test_global_batch_norm_compiled_to_machine_code_equals_one_process]
            mean, var = mean_and_var(y)
            moments = torch.cat([mean.double(), var.double() + mean.double().square()])  # (2 C,)
            values = y.numel() // y.shape[1]  # per channel
            sums = F.pad(moments, (0, 1), value=1.0) * values  # (2 C + 1,)
            dist.all_reduce(sums)
            total_sum, total_square, count = sums.split([len(mean), len(mean), 1])
            mean = total_sum / count
            var = total_square / count - mean.square()

            unbiased = var * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
            mean, var = mean.to(y.dtype), var.to(y.dtype)

        out = Normalize.apply(y, self.weight, self.bias, mean, var, count, self.eps)
        return out.to(x.dtype)


def convert_batch_norm(network: nn.Module) -> nn.Module:
    """With several processes every nn.BatchNorm becomes a GlobalBatchNorm with its parameters and
    buffers, in place; in one process the two are the same, and nothing changes."""
    if WORLD == 1:
        return network
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm
    return network


# --- Network, schedules, and the captured step ----------------------------------------------------


def build_backbone(
    arch: str, stem: str, zero_init_residual: bool = False, **options
) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its classifier, and the width of its features."""
    net = torchvision.models.get_model(arch, zero_init_residual=zero_init_residual, **options)
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
        self.backbone, width = build_backbone(args.arch, args.stem, args.zero_init_residual)
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


def learning_rate(step: int, steps_per_epoch: int, args: argparse.Namespace) -> float:
    """For step 0, 1, ...: a linear warm-up, then a cosine down to peak / 1000, or drops."""
    peak = args.base_lr
    if args.optimizer == "sgd":
        peak = args.base_lr * args.batch_size / 256
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    total_steps = args.epochs * steps_per_epoch

    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if args.milestones is not None:
        passed = [m for m in args.milestones if step >= m * total_steps]
        return peak * 0.2 ** len(passed)
    progress = (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (0.001 + 0.999 * (1 + math.cos(math.pi * progress)) / 2)


def build_optimizer(
    network: nn.Module, args: argparse.Namespace, device: torch.device, fused: bool
) -> torch.optim.Optimizer:
    """fused: one kernel for all parameters, and the learning rate as a tensor on the device, which
    every replay of a captured step rereads."""
    decay_params, no_decay_params = [], []
    for parameter in network.parameters():
        if args.decay_all or parameter.ndim > 1:
            decay_params.append(parameter)
        else:
            no_decay_params.append(parameter)
    groups = [{"params": decay_params}, {"params": no_decay_params, "weight_decay": 0.0}]

    options = {"lr": 0.0, "weight_decay": args.weight_decay}
    if fused:
        options.update(lr=torch.tensor(0.0, device=device), fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **options)
    return torch.optim.Adam(groups, capturable=fused and device.type == "cuda", **options)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict):
    """Restores the state of each parameter. The hyperparameters are this run's: `fused` and the
    type of `lr` depend on the device."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})

    # Checkpoints are contiguous, parameters channels_last: fused optimisers walk through both in
    # memory order. [test_a_resumed_captured_run_equals_an_uncaptured_one]
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def why_not_captured(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> str | None:
    """The reason why the step is not captured in a CUDA graph; None if it is."""
    if args.cuda_graph is False:
        return "--no-cuda-graph"
    if device.type != "cuda":
        return "no GPU"
    if dtype == torch.float16:
        return "float16 may skip updates"
    if args.loss in ("power", "whiten", "none", "cwrgp"):
        return f"--loss {args.loss} computes an eigendecomposition"
    if WORLD > 1 and not args.cuda_graph:
        return "off by default for several processes"
    return None


class CapturedStep:
    """Calls `step` for the first batches, which warm up cuDNN, the compiler and the optimiser's
    state; then records it in a CUDA graph and replays that: one launch instead of hundreds. The
    views and the results then have fixed places on the device, and `step` must not depend on Python
    values that change: a replay repeats the recorded ones. All work must be on one side stream.
    [test_a_captured_step_equals_an_ordinary_one]"""

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
        try:
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.results = self.step(self.views)
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            sys.exit(f"the step cannot be captured in a CUDA graph, use --no-cuda-graph: {reason}")
        print_rank0("the step is captured in a CUDA graph")


# --- Features and nearest neighbours --------------------------------------------------------------


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    loader: DataLoader,
    dataset: str,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Features (n, width) in eval mode, in their computed dtype, and labels (n,). Exits if the
    features are not finite."""
    backbone.eval()
    features, labels = [], []
    for (images,), y in loader:
        x = normalize(to_device(images, device) / 255, dataset)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features.append(backbone(x))
        labels.append(to_device(y, device))
    features = torch.cat(features)
    if not features.isfinite().all():
        sys.exit("the features are not finite: the training has diverged. Try a lower --base-lr")
    return features, torch.cat(labels)


@torch.no_grad()
def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int,
    temperature: float | None = None,
) -> float:
    """Percentage of queries (q, d) whose k nearest rows of the bank (n, d) vote for their label:
    one vote each, or exp(cosine / temperature) for unit rows. Bank and queries are this process's
    parts. Copies at most 2^16 rows of the bank to float32 at a time."""
    queries, query_labels = all_gather_rows(queries), all_gather_rows(query_labels)
    largest = torch.stack([bank_labels.max(), query_labels.max()])
    classes = 1 + int(all_gather_rows(largest).max())

    correct = 0
    for q, y in zip(queries.split(256), query_labels.split(256)):
        # The k nearest in each part of each process's bank: (k, b) each.
        distances, votes = [], []
        for part, part_labels in zip(bank.split(2**16), bank_labels.split(2**16)):
            distance = torch.cdist(q.float(), part.float())  # (b, n)
            nearest, index = distance.topk(min(k, len(part)), largest=False)  # (b, k)
            distances.append(nearest.T)
            votes.append(part_labels[index].T)
        distances = all_gather_rows(torch.cat(distances))
        votes = all_gather_rows(torch.cat(votes))

        # The k nearest of these.
        nearest, index = distances.topk(min(k, len(distances)), dim=0, largest=False)  # (k, b)
        weight = torch.ones_like(nearest)
        if temperature is not None:
            cosine = 1 - nearest**2 / 2
            weight = (cosine / temperature).exp()
        scores = weight.new_zeros(classes, len(q))
        scores.scatter_add_(0, votes.gather(0, index), weight)
        correct += (scores.argmax(0) == y).sum().item()
    return 100 * correct / len(queries)


# --- Training -------------------------------------------------------------------------------------


def choose_beta(args: argparse.Namespace) -> float | None:
    """What to pass to INTLLoss as beta: --beta if given; otherwise the balanced beta if it exceeds
    the published one, else None (published). Warns of a beta that may permit a collapse."""
    setting = intl.INTLLoss(axis=args.axis, beta=0.0).setting(args.batch_size, args.out)
    balanced = intl.balanced_beta(setting.n, args.iterations, full=setting.full_rank)
    balanced = round_significant(balanced, 3)
    published = intl.published_beta(setting.n)

    beta = published if args.beta is None else args.beta
    if beta >= balanced:
        return args.beta
    if args.beta is None:
        print_rank0(
            f"the embedding may collapse with the published beta {beta:.3g}: using the balanced "
            f"one, {balanced:g}"
        )
        return balanced
    print_rank0(
        f"the embedding may collapse with --beta {beta:g}; the balanced one is {balanced:g}"
    )
    return beta


def use_compile(args: argparse.Namespace, device: torch.device) -> bool:
    """--compile, or by default: on a GPU, for all recipes except the short `shapes`, if Triton and
    a C compiler are installed."""
    if args.compile is not None:
        return args.compile
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    installed = importlib.util.find_spec("triton") is not None and compiler is not None
    return device.type == "cuda" and args.recipe != "shapes" and installed


def compile_modules(network: nn.Module, teacher: nn.Module | None, criterion: nn.Module):
    network.compile(dynamic=False)
    if teacher:
        teacher.compile(dynamic=False)
    if isinstance(criterion, intl.INTLLoss):  # eigendecompositions do not compile
        criterion.compile(dynamic=False)


def random_subset(images: Dataset, rows: Tensor, n: int) -> Subset:
    """n of the rows (or all), the same ones for every seed."""
    order = torch.randperm(len(rows), generator=rng("some"))
    return Subset(images, rows[order[:n]].tolist())


def evaluate(
    backbone: nn.Module,
    bank_loader: DataLoader | None,
    query_loader: DataLoader,
    dataset: str,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Effective rank of the features and, if there is a bank of labelled images, 5-NN accuracy."""
    queries, query_labels = extract_features(backbone, query_loader, dataset, device, dtype)
    rank = intl.effective_rank(all_gather_rows(queries.float()).cpu())
    numbers = {"feature_rank": rank.item()}
    if bank_loader is not None:
        bank, bank_labels = extract_features(backbone, bank_loader, dataset, device, dtype)
        numbers["knn_top1"] = knn_top1(bank, bank_labels, queries, query_labels, k=5)
    return numbers


def describe_embedding(z: Tensor) -> dict[str, float | list[float]]:
    """Diagnostics of the global embedding; z (b, out) is this process's part."""
    z = intl.gather(z.float()).cpu()  # (global batch, out)
    return {
        "embedding_rank": intl.effective_rank(z).item(),
        "condition_number": intl.condition_number(z).item(),
        "spectrum": [round_significant(value, 3) for value in intl.spectrum(z).tolist()],
    }


def pretrain(
    args: argparse.Namespace,
    config: dict,
    train_set: Dataset,
    val_set: Dataset | None,
    device: torch.device,
    dtype: torch.dtype,
):
    """Trains from the last checkpoint in args.output, if there is one, to the end."""
    steps_per_epoch = len(train_set) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    stop_step = min(total_steps, args.max_steps or total_steps)
    saved = resume_run(args.output, config)
    first_step = saved["step"] if saved else 0

    # How a step runs. A CUDA graph needs all work on one side stream from the start.
    compiled = use_compile(args, device)
    not_captured = why_not_captured(args, device, dtype)
    captured = not_captured is None
    if captured:
        torch.cuda.set_stream(torch.cuda.Stream())

    # Network, teacher, loss, optimiser.
    torch.manual_seed(args.seed)
    network = convert_batch_norm(Network(args)).to(device, memory_format=torch.channels_last)
    backbone = network.backbone
    teacher = copy.deepcopy(network).requires_grad_(False) if args.ema else None
    ema_rate = torch.zeros((), dtype=next(network.parameters()).dtype, device=device)
    criterion = LOSSES[args.loss](args)
    # A captured step reads the learning rate from the device, which needs a fused optimiser. With
    # float16 it is not fused (and never captured): the scaler may skip the first update, which
    # would leave the momenta of fused SGD undefined.
    fused = captured or (device.type == "cuda" and dtype != torch.float16)
    optimizer = build_optimizer(network, args, device, fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Resume.
    if saved:
        network.load_state_dict(saved["network"])
        load_optimizer(optimizer, saved["optimizer"])
        if saved["scaler"]:  # a scaler that was off saved nothing
            scaler.load_state_dict(saved["scaler"])
        if teacher:
            teacher.load_state_dict(saved["teacher"])

    # Compile. The evaluation calls the backbone by itself and stays eager.
    augmentation = Augmentation(args, compiled)
    if compiled:
        compile_modules(network, teacher, criterion)
    model = wrap_ddp(network, device)

    # Evaluation: a bank of labelled training images classifies validation images by k-NN. Without
    # labels or a val/ folder only the rank of the features is measured.
    query_images = train_set if val_set is None else val_set
    query_images = random_subset(query_images, torch.arange(len(query_images)), 10_000)
    eval_size = args.view_sizes[0]
    query_loader = eval_loader(query_images, args.dataset, eval_size, args.workers)
    bank_loader = None
    if val_set is not None and len(train_set.classes) > 1:
        labelled = (train_set.targets >= 0).nonzero()[:, 0]
        bank = random_subset(train_set, labelled, args.knn_images)
        bank_loader = eval_loader(bank, args.dataset, eval_size, args.workers)

    # Images to train on.
    rows = torch.arange(len(train_set))
    keys = batch_indices(rows, args.batch_size, args.seed, first_step, stop_step)
    views = MultiViewDataset(train_set, random_crops(args), args.seed)
    train_loader = make_loader(views, args.workers, batch_sampler=keys)

    # Print what the run is.
    logger = Logger(args.output, config, first_step) if RANK == 0 else None
    last_warmup_step = max(0, round(args.warmup_epochs * steps_per_epoch) - 1)
    peak = learning_rate(last_warmup_step, steps_per_epoch, args)
    print_rank0(
        f"{args.epochs} epochs of {steps_per_epoch} steps, from step {first_step}, on {WORLD} x "
        f"{device.type} in {dtype}; output: {args.output}"
    )
    print_rank0(f"peak learning rate {peak:.3g}, global batch size {args.batch_size}")
    compile_line = "yes, the first steps take a minute" if compiled else "no"
    graph_line = "yes, after 12 steps" if captured else f"no ({not_captured})"
    print_rank0(f"torch.compile: {compile_line}; CUDA graph: {graph_line}")

    def log_evaluation(step: int, z: Tensor | None = None):
        start = time.time()
        numbers = evaluate(backbone, bank_loader, query_loader, args.dataset, device, dtype)
        network.train()
        if z is not None:
            numbers.update(describe_embedding(z))
        values = [value for value in numbers.values() if isinstance(value, float)]
        if not all(map(math.isfinite, values)):
            sys.exit(f"the training has diverged at step {step}: {numbers}. Try a lower --base-lr")
        if logger:
            epoch = step / steps_per_epoch
            logger(epoch=epoch, step=step, **numbers, seconds=time.time() - start)
        if numbers.get("embedding_rank", 3) < 3:
            print_rank0("WARNING: the embedding has collapsed, its effective rank is below 3")

    def save(step: int):
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "config": config,
            "step": step,
        }
        if teacher:
            state["teacher"] = teacher.state_dict()
        save_checkpoint(state, args.output / "checkpoint.pt")
        save_checkpoint(backbone.state_dict(), args.output / "backbone.pt")

    def train_step(views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Forward, backward, update. Returns the loss () and an embedding (b, out), detached."""
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if teacher:
                # The teacher follows the network; only the teacher embeds view 0.
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

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), z[0].detach()

    run_step = CapturedStep(train_step) if captured else train_step

    if first_step == 0:
        log_evaluation(0)  # of the random network
    step = logged_step = first_step
    evaluation_interval = steps_per_epoch * math.ceil(args.epochs / 100)
    last_save = last_log = waiting_since = time.time()
    waited = 0.0
    for pixels, _ in train_loader:
        waited += time.time() - waiting_since

        # Set the scheduled values of this step.
        lr = learning_rate(step, steps_per_epoch, args)
        set_learning_rate(optimizer, lr)
        if teacher:  # 1 - momentum falls from 1 - args.ema to 0
            ema_rate.fill_((1 - args.ema) * (1 + math.cos(math.pi * step / total_steps)) / 2)
        if args.loss == "cwrgp":
            torch.manual_seed(seed_from(args.seed, "loss", step))  # random partitions
            if step >= total_steps // 2:
                criterion.covariance_weight = 0.0

        try:
            views = augmentation(pixels, step, device)
            loss, z = run_step(views)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).split("\n")[0]
            sys.exit(f"torch.compile failed, use --no-compile: {reason}")
        step += 1

        # Log and evaluate: the only places where the host waits for the device.
        should_evaluate = step % evaluation_interval == 0 or step == stop_step
        if should_evaluate or step % args.log_every == 0:
            numbers = {"loss": float(loss)}
            numbers.update((name, float(value)) for name, value in criterion.parts.items())
            if not math.isfinite(numbers["loss"]):
                sys.exit(f"the loss is not finite at step {step}: {numbers}. Try a lower --base-lr")
            seconds = time.time() - last_log
            if logger:
                images = (step - logged_step) * args.batch_size
                images_left = (total_steps - step) * args.batch_size
                speed = throughput(images, seconds, waited, images_left)
                logger(epoch=step / steps_per_epoch, step=step, **numbers, lr=lr, **speed)
            if should_evaluate:
                log_evaluation(step, z)

            # Save, now that the loss is known to be finite.
            due = time.time() - last_save > 60 * args.save_minutes
            if RANK == 0 and (due or step == stop_step):
                save(step)
                last_save = time.time()
            last_log = time.time()
            logged_step = step
            waited = 0.0
        waiting_since = time.time()

    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak_memory = torch.cuda.max_memory_allocated()
    print_rank0(
        f"peak memory {peak_memory / 2**30:.1f} GiB per process; "
        f"saved {args.output / 'backbone.pt'}"
    )


def main(argv: list[str] | None = None):
    args = parse(argv)
    with distributed(args.device, args.precision) as (device, dtype):
        train_set, val_set = load_data(args.dataset, args.data, args.seed)
        if len(train_set) < args.batch_size:
            sys.exit(
                f"{len(train_set)} training images do not fill one batch: lower --batch-size "
                f"{args.batch_size}"
            )
        if val_set is not None and len(val_set) < WORLD:
            sys.exit(
                f"{len(val_set)} validation images for {WORLD} processes: every process needs one"
            )
        if args.loss == "intl":
            args.beta = choose_beta(args)
        config = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUME}
        config["images"] = len(train_set)
        with lock_output_dir(args.output):
            pretrain(args, config, train_set, val_set, device, dtype)


if __name__ == "__main__":
    main()
