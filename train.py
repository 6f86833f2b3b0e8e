"""Pretrain a backbone with INTL, or with its kin, on one CPU, one GPU or many nodes.

    torchrun train.py                                                          # shapes: no data, no GPU, 3 minutes
    mkdir -p data/cifar10 && torchrun train.py --recipe cifar10 --data data/cifar10       # downloads CIFAR-10 there
    torchrun --nproc_per_node 8 train.py --recipe imagenet --data /data/imagenet
    torchrun --nproc_per_node 8 train.py --recipe imagenet --data /photos      # any tree of images; labels not needed
    torchrun train.py --recipe cifar10 --data data/cifar10 --epochs 20 --base-lr 0.2 --loss whiten

Every field of a recipe is a flag. A second run of the same command resumes. Output goes to runs/<recipe>/.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import resource
import shlex
import signal
import sys
import threading
import time
import types
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchvision.transforms.v2 import functional as TF

from intl import (
    CWRGPLoss,
    INTLLoss,
    condition_number,
    effective_rank,
    gather,
    orthogonality_penalty,
    power,
    spectral_transform,
    spectrum,
    undo_ddp_average,
)

# ------------------------------------------------------------------------------------------------------------------
# Recipes: the published settings (INTL paper, appendix, and the official release), apart from the logic


def flag(default, help: str, **kwargs):
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True)
class Recipe:
    dataset: str = flag(
        "folder", "what --data holds; also chooses mean and std", choices=["shapes", "cifar10", "cifar100", "folder"]
    )
    arch: str = flag("resnet18", "backbone: a ResNet of torchvision, vit_tiny, vit_small or vit_b_16")
    stem: str = flag(
        "imagenet",
        "first layers: imagenet = 7x7 stride 2 and max-pool; cifar = 3x3 stride 1; small = 3x3 stride 2 and max-pool",
        choices=["imagenet", "cifar", "small"],
    )
    zero_init_residual: bool = flag(False, "start every residual branch at zero")
    hidden: int = flag(2048, "projector: width of its two hidden layers")
    out: int = flag(2048, "projector: width of the embedding")
    epochs: int = flag(100, "length of the whole schedule")
    batch_size: int = flag(256, "GLOBAL batch, over all processes; the loss depends on it, so it is no neutral knob")
    base_lr: float = flag(
        0.3, "learning rate per 256 images of the global batch; imagenet-multicrop: as published for --epochs"
    )
    final_lr: float = flag(0.001, "cosine ends at this fraction of the learning rate")
    warmup_epochs: int = flag(2, "linear warm-up")
    weight_decay: float = flag(1e-4, "SGD weight decay")
    decay_all: bool = flag(True, "weight decay on biases and BN parameters too")
    loss: str = flag("intl", "intl, iternorm (INTL without its trace loss), whiten, power:P, cwrgp, none")
    iterations: int = flag(4, "Newton steps of IterNorm")
    axis: str = flag("channel", "what is centred and whitened", choices=["channel", "batch"])
    beta: float | None = flag(None, "weight of the trace loss; default 0.01 (log2 n - 3)")
    groups: int = flag(4, "cwrgp: groups of channels")
    sub_batch: int | None = flag(None, "cwrgp: samples whitened together; default all")
    orthogonality: str | None = flag(None, "add this penalty on the backbone's weights", choices=["so", "srip"])
    orthogonality_weight: float | None = flag(None, "its weight; default as published")
    ema: float | None = flag(None, "momentum of a teacher for view 0, rising to 1 by a cosine; default: no teacher")
    view_sizes: tuple[int, ...] = flag((224, 224), "pixels of each view")
    min_scale: tuple[float, ...] = flag((0.08,), "least area of a crop, one number or one per view")
    max_scale: tuple[float, ...] = flag((1.0,), "largest area of a crop")
    interpolation: str = flag("bicubic", "of the crops' resizing, antialiased", choices=["bicubic", "bilinear"])
    jitter: tuple[float, ...] = flag((0.4, 0.4, 0.2, 0.1), "strength: brightness, contrast, saturation, hue")
    jitter_prob: float = flag(0.8, "probability of colour jitter")
    gray: float = flag(0.2, "probability of grey")
    blur: tuple[float, ...] = flag((0.0,), "probability of a Gaussian blur, sigma 0.1 to 2")
    solarize: tuple[float, ...] = flag((0.0, 0.2), "probability of solarising")
    solarize_threshold: int = flag(128, "grey level from which it inverts; 0 inverts the whole image")


# fmt: off
CIFAR = Recipe(stem="cifar", epochs=1000, view_sizes=(32, 32))
IMAGENET = Recipe(
    arch="resnet50", zero_init_residual=True, hidden=8192, out=8192, epochs=800, weight_decay=1e-5, decay_all=False,
    blur=(1.0, 0.1),
)
RECIPES = {
    # This project's own: strong colour jitter and inversion leave the shape as what two views share.
    "shapes": Recipe(
        dataset="shapes", stem="small", epochs=8, batch_size=128, warmup_epochs=1, hidden=512, out=512, view_sizes=(32, 32),
        min_scale=(0.4,), jitter=(0.4, 0.4, 0.4, 0.5), jitter_prob=1.0, gray=0.3, solarize=(0.5,), solarize_threshold=0,
    ),
    "cifar10": replace(CIFAR, dataset="cifar10"),
    "cifar100": replace(CIFAR, dataset="cifar100"),
    "imagenet100": replace(
        IMAGENET, arch="resnet18", zero_init_residual=False, epochs=400, batch_size=128, base_lr=0.5,
        weight_decay=2.5e-5, hidden=4096,
    ),
    "imagenet": IMAGENET,
    "imagenet-multicrop": replace(
        IMAGENET, epochs=100, ema=0.996, base_lr=0.5, blur=(0.5,), solarize=(0.1,), view_sizes=(224, 224, 192, 160, 128, 96),
        min_scale=(0.2, 0.2, 0.171, 0.143, 0.114, 0.086), max_scale=(1.0, 1.0, 0.857, 0.714, 0.571, 0.429),
    ),
}
MULTICROP_LR = {100: 0.5, 200: 0.4, 400: 0.4, 800: 0.3}  # published base learning rate by number of epochs
# fmt: on


# ------------------------------------------------------------------------------------------------------------------
# Processes, errors, random numbers


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


STORES = []  # of the process group, through which one process tells the others that it has left with an error


def fail(message: str, alone: bool = False) -> NoReturn:
    """Leave with status 2 and one line on stderr: from each node's first process, since all come here, or from one that
    fails alone."""
    if alone or int(os.environ.get("LOCAL_RANK", rank_and_world()[0])) == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    if alone and STORES:
        STORES[-1].set("failed", "")
    raise SystemExit(2)


def leave_together(main):
    """A script's main: where one process has failed alone, the others leave without tracebacks of their broken connections."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None):
        try:
            return main(argv)
        except RuntimeError:
            if STORES and STORES[-1].check(["failed"]):
                raise SystemExit(2) from None
            raise

    return wrapped


def share_of(batch: int) -> slice:
    """This process's part of a global batch."""
    rank, world = rank_and_world()
    return slice(rank * batch // world, (rank + 1) * batch // world)


def distribute(module: nn.Module, device: torch.device) -> nn.Module:
    """Under DistributedDataParallel where there are several processes."""
    if rank_and_world()[1] == 1:
        return module
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids)


def unify_buffers(module: nn.Module):
    """Without SyncBatchNorm every process has statistics of its own; the first one's are evaluated and saved."""
    if rank_and_world()[1] > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def say(message: str):
    if rank_and_world()[0] == 0:
        print(message, flush=True)


def rng(*key) -> torch.Generator:
    """A generator that depends on the key alone. Every random number of a run comes from (seed, purpose, step, ...), so
    there is no generator state to save, and what is drawn does not depend on workers, processes or interruptions."""
    return torch.Generator().manual_seed(int(digest(repr(key).encode()), 16) >> 1)


def choose_device(name: str) -> torch.device:
    """--device, or the process's own GPU, or the CPU; joins the other processes if there are any."""
    rank, world = rank_and_world()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            fail("--device cuda: torch finds no GPU here")
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            fail(f"process {local} of this node has no GPU: start at most {torch.cuda.device_count()} on it", alone=True)
        torch.cuda.set_device(local)
    if world > 1 and not dist.is_initialized():
        try:
            store, _, _ = next(dist.rendezvous("env://"))
            # Under its own name for each of torchrun's restarts: in a shared store the dead processes' addresses remain.
            store = dist.PrefixStore("start " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            STORES.append(store)
            dist.init_process_group("nccl" if name == "cuda" else "gloo", store=store, rank=rank, world_size=world)
        except ValueError as error:
            fail(f"WORLD_SIZE is {world}, but {error}: start with torchrun, or unset WORLD_SIZE", alone=True)
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Autocast's type for backbone and projector, and why. The loss is always computed in float32."""
    if name != "auto":
        return getattr(torch, name), "by --precision"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has it"
        return torch.float16, "the GPU has no bfloat16; gradients are scaled"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "the CPU has it in hardware"
    return torch.float32, "the device has no fast half precision"


# ------------------------------------------------------------------------------------------------------------------
# Data: images in memory as uint8 where they fit, else paths that workers read

MEAN_STD = {
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}


class Packed:
    """Strings, in one tensor that all workers share: a list of a million paths would be copied to each of them."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(s) for s in strings]
        self.ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)
        self.content = torch.frombuffer(bytearray(b"".join(encoded) or b" "), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.content[self.ends[i] : self.ends[i + 1]].numpy().tobytes())

    def __iter__(self):
        content = self.content.numpy().tobytes()
        return (os.fsdecode(content[start:end]) for start, end in itertools.pairwise(self.ends.tolist()))


@dataclass
class Images:
    pixels: Tensor | list[Tensor] | None  # uint8 on the device: (n, 3, h, w), or n of (3, h, w); None: workers read `paths`
    paths: Packed | None
    labels: Tensor | None  # (n,) int64
    classes: list[str]
    skipped: Tensor | None = None  # with --skip-unreadable: how often each worker met an image that it could not read

    def __len__(self) -> int:
        return len(self.paths) if self.pixels is None else len(self.pixels)


class UnreadableImage(Exception):
    pass


def decode(path: str | Path, upright: bool = False) -> Tensor:
    """(3, h, w) uint8, of an animation its first picture; upright: turned as its camera says."""
    try:
        mode, content = torchvision.io.ImageReadMode.RGB, bytearray(Path(path).read_bytes())  # any name, UTF-8 or not
        content = torch.frombuffer(content, dtype=torch.uint8)
        image = torchvision.io.decode_image(content, mode=mode, apply_exif_orientation=upright)
        return TF.to_dtype(image if image.dim() == 3 else image[0], torch.uint8, scale=True)
    except (OSError, RuntimeError, ValueError):
        raise UnreadableImage(
            f"{path} is no image that can be read: repair or delete it; of training images, train.py --skip-unreadable goes on "
            "without it"
        ) from None


SHAPES = ["disc", "ring", "square", "triangle", "cross", "star", "bars", "half-disc"]


def shape_level(kind: int, x: Tensor, y: Tensor) -> Tensor:
    """Positive inside the shape, about the distance to its edge. All kinds have the same area, 3."""
    scale = (1.223, 1.202, 1.083, 1.523, 1.249, 1.4, 1.224, 1.457)[kind]
    x, y = x / scale, y / scale
    radius, angle = (x * x + y * y).sqrt(), torch.atan2(y, x)

    def polygon(corners: int) -> Tensor:
        turn = 2 * math.pi / corners
        return math.cos(turn / 2) - radius * torch.cos(torch.remainder(angle + math.pi / 2, turn) - turn / 2)

    level = [
        lambda: 0.8 - radius,
        lambda: 0.23 - (radius - 0.72).abs(),
        lambda: 0.8 - torch.maximum(x.abs(), y.abs()),
        lambda: polygon(3),
        lambda: torch.maximum(torch.minimum(0.95 - x.abs(), 0.3 - y.abs()), torch.minimum(0.3 - x.abs(), 0.95 - y.abs())),
        lambda: (0.67 + 0.28 * torch.cos(5 * (angle + math.pi / 2)) - radius) * 0.6,
        lambda: torch.minimum(0.9 - x.abs(), 0.28 - (y.abs() - 0.55).abs()),
        lambda: torch.minimum(0.95 - ((y - 0.4).square() + x * x).sqrt(), 0.4 - y),
    ][kind]()
    return level * scale


def draw_shapes(seed: int, indices: range, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images (n, 3, size, size) uint8 and labels (n,) that depend on (seed, index) alone. The class is the shape; colour,
    place, size, rotation, background and noise are drawn without regard to it. [test_shapes_colour_tells_nothing]"""
    labels = torch.tensor([i % len(SHAPES) for i in indices])
    draws = [rng(seed, "shape", i) for i in indices]
    u = torch.stack([torch.rand(16, generator=g) for g in draws])[:, :, None, None]  # (n, 16, 1, 1)
    noise = torch.stack([torch.randn(3, size, size, generator=g) for g in draws])
    y, x = torch.meshgrid(*[torch.arange(size) * 2 / size + 1 / size - 1] * 2, indexing="ij")  # (size, size) in (-1, 1)

    radius = 0.4 + 0.2 * u[:, 0]  # (n, 1, 1)
    turn = (u[:, 1] - 0.5) * (math.pi / 4)
    reach = 0.4
    dx, dy = x - reach * (2 * u[:, 2] - 1), y - reach * (2 * u[:, 3] - 1)  # (n, size, size)
    cos, sin = turn.cos() / radius, turn.sin() / radius
    x_turned, y_turned = cos * dx + sin * dy, cos * dy - sin * dx
    level = torch.stack([shape_level(int(k), a, b) for k, a, b in zip(labels, x_turned, y_turned)])
    mask = (0.5 + level * radius * size / 2).clamp(0, 1)[:, None]  # (n, 1, size, size): antialiased over one pixel

    # Light and dark differ by 0.4 to 0.7 of the range; which is the shape's, and both tints, are random.
    dark, light = 0.05 + 0.25 * u[:, 4:5], 0.7 + 0.25 * u[:, 5:6]  # (n, 1, 1, 1)
    tint = 0.4 * (u[:, 6:12] - 0.5)  # (n, 6, 1, 1)
    direction = 2 * math.pi * u[:, 12]
    background = dark + tint[:, :3] + 0.1 * (direction.cos() * x + direction.sin() * y)[:, None]
    image = torch.lerp(background, light + tint[:, 3:], mask)
    image = torch.where(u[:, 13:14] < 0.5, image, 1 - image) + 0.03 * noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), labels


def index_folder(folder: Path) -> tuple[list[Path], Tensor | None, list[str]]:
    """Image paths below `folder` in sorted order, with labels if all of them lie in sub-folders, the classes."""
    seen, paths, ignored = set(), [], []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [] if os.path.realpath(where) in seen else [f for f in folders if not f.startswith(".")]
        if os.path.realpath(where) not in seen:  # a link may lead back
            seen.add(os.path.realpath(where))
            seen_names = [n for n in names if not n.startswith(".")]
            paths += [Path(where) / n for n in seen_names if Path(n).suffix.lower() in SUFFIXES]
            ignored += [Path(n).suffix.lower() for n in seen_names if Path(n).suffix.lower() not in SUFFIXES]
    paths.sort()
    if not paths:
        fail(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    if ignored:
        endings = ", ".join(sorted(set(ignored))[:8])
        say(
            f"{folder}: {len(ignored)} files that end otherwise than in {', '.join(sorted(SUFFIXES))} are left out ({endings})"
        )
    if any(p.parent == folder for p in paths):
        return paths, None, []
    names = [p.relative_to(folder).parts[0] for p in paths]
    position = {name: i for i, name in enumerate(sorted(set(names)))}
    return paths, torch.tensor([position[name] for name in names]), list(position)


def load_folder(folder: Path, device: torch.device, cache_mb: int, skip: bool = False) -> Images:
    """In memory if all images fit, else as paths. `skip`: go on without unreadable ones."""
    paths, labels, classes = index_folder(folder)
    skipped = torch.zeros(1024, dtype=torch.int64).share_memory_() if skip else None
    images = Images(None, Packed(map(str, paths)), labels, classes, skipped)
    pixels, size = [], 0
    for path in paths:
        try:
            pixels.append(decode(path))
        except UnreadableImage as error:
            if skip:
                return images
            fail(str(error))
        size += pixels[-1].numel()
        if size * len(paths) > cache_mb * 2**20 * max(len(pixels), min(16, len(paths))):  # judged by 16 images or more
            return images
    one_size = len({x.shape for x in pixels}) == 1
    images.pixels = torch.stack(pixels).to(device) if one_size else [x.to(device) for x in pixels]
    return images


def load_data(
    dataset: str, data: str | None, seed: int, device: torch.device, cache_mb: int = 1024, skip: bool = False
) -> tuple[Images, Images | None]:
    """Training and validation images. `data` has train/ and perhaps val/, or is any tree of images, or torchvision's CIFAR."""
    if dataset == "shapes":
        if data is not None:
            fail("the recipe shapes draws its images; for a folder of images choose another --recipe, or --dataset folder")
        splits = [draw_shapes(seed, range(start, start + n)) for start, n in ((0, 6000), (1_000_000, 1000))]
        return tuple(Images(pixels.to(device), None, labels, SHAPES) for pixels, labels in splits)
    if not data:
        fail(f"the dataset {dataset} needs --data FOLDER")
    root = Path(data)
    if not root.is_dir():
        fail(f"--data {root}: no such folder")
    if dataset == "folder" and list(root.glob("cifar-*")):
        fail(f"--data {root} looks like torchvision's CIFAR: give --dataset cifar10 or cifar100")
    if (root / "val").is_dir() and not (root / "train").is_dir():
        fail(f"{root} has a val/ but no train/")
    if not (root / "train").is_dir():
        return load_cifar(dataset, root, device) if dataset != "folder" else (load_folder(root, device, cache_mb, skip), None)
    others = sorted({path.name for path in root.iterdir() if path.is_dir()} - {"train", "val", "test"})
    if others:
        say(f"images are those of {root}/train; {', '.join(others[:5])} beside it are left out")
    train = load_folder(root / "train", device, cache_mb, skip)
    val = load_folder(root / "val", device, cache_mb) if (root / "val").is_dir() else None
    if val and (len(val) < 2 or not val.classes):
        fail(f"{root}/val needs at least 2 images, all of them in a folder for each class")
    if val and not train.classes:
        say(f"no k-NN: some images of {root}/train lie in no class folder")
    if val and train.classes and val.classes != train.classes:
        odd = sorted(set(val.classes) ^ set(train.classes))
        fail(f"{root}/train and {root}/val have different classes, {odd[0]!r} among them")
    return train, val


def load_cifar(dataset: str, root: Path, device: torch.device) -> tuple[Images, Images]:
    """torchvision's own format, downloaded to `root` where it is not there."""
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
    missing = f"--data {root} has neither train/ nor {dataset} in torchvision's format"
    if rank_and_world()[0] == 0:
        try:
            kind(root, download=True)
        except (OSError, RuntimeError) as error:
            fail(f"{missing}, and its download failed: {error}", alone=True)
    if dist.is_initialized():
        dist.barrier()
    try:
        splits = [kind(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        fail(f"{missing}: {error}", alone=True)
    return tuple(
        Images(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous().to(device), None, torch.tensor(s.targets), s.classes)
        for s in splits
    )


# ------------------------------------------------------------------------------------------------------------------
# Augmentation: crops first (in memory as two matrix products, or in a worker), then colour, batched on the device


def crop_boxes(height: int, width: int, scale: Tensor, u: Tensor) -> Tensor:
    """RandomResizedCrop's boxes (n, 4): top, left, height, width, from uniform u (n, 10, 4) and the least and largest share
    of the area, scale (n or 1, 2): of ten tries the first that fits in the image, else the largest centred box of an
    allowed aspect ratio."""
    area = height * width * torch.lerp(scale[:, :1], scale[:, 1:], u[..., 0])  # (n, 10)
    ratio = ((2 * u[..., 1] - 1) * math.log(4 / 3)).exp()  # in [3/4, 4/3], uniform in its logarithm
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = (u[..., 2] * (height - h + 1)).floor(), (u[..., 3] * (width - w + 1)).floor()
    pick = fits.int().argmax(1, keepdim=True)  # the first try that fits
    box = torch.stack([b.gather(1, pick)[:, 0] for b in (top, left, h, w)], dim=1)
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    whole = torch.tensor([(height - h) // 2, (width - w) // 2, h, w], dtype=box.dtype)
    return torch.where(fits.any(1, keepdim=True), box, whole)


def resize_matrix(start: Tensor, length: Tensor, source: int, target: int, interpolation: str) -> Tensor:
    """(n, target, source): antialiased resampling of `length` pixels from `start` to `target` pixels, as a matrix. A resized
    crop of an image is rows @ image @ columns^T."""
    step = (length / target)[:, None, None]  # (n, 1, 1) source pixels per target pixel
    stretch = step.clamp_min(1)  # antialiasing: the kernel widens when the image shrinks
    centre = start[:, None, None] + (torch.arange(target, device=start.device)[:, None] + 0.5) * step  # (n, target, 1)
    pixel = torch.arange(source, device=start.device) + 0.5  # (source,)
    t = ((pixel - centre) / stretch).abs()  # (n, target, source)
    if interpolation == "bilinear":
        weight = (1 - t).clamp_min(0)
    else:
        a = -0.5
        near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        weight = torch.where(t < 1, near, torch.where(t < 2, far, 0))
    inside = (pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = weight * inside
    return weight / weight.sum(-1, keepdim=True)


def resized_crops(images: Tensor, boxes: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """uint8 images (n, 3, h, w) and boxes (n, 4) -> (n, 3, size, size) in [0, 1]."""
    top, left, height, width = boxes.to(images.device).unbind(1)
    rows = resize_matrix(top, height, images.shape[2], size, interpolation)[:, None]  # (n, 1, size, h)
    columns = resize_matrix(left, width, images.shape[3], size, interpolation)[:, None]
    # Overshoot is cut after each pass, as for uint8.
    return (rows @ (images.float() / 255 @ columns.mT).clamp(0, 1)).clamp(0, 1)


def gray(x: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 1, h, w)."""
    return (x * x.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of x (n, 3, h, w) by shift (n, 1, 1, 1) of a full turn, through HSV."""
    value, _ = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, 1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    k = torch.remainder(hue + 6 * shift + x.new_tensor([5, 3, 1])[:, None, None], 6)  # (n, 3, h, w)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur_matrix(sigma: Tensor, size: int) -> Tensor:
    """(n, size, size): a Gaussian of `sigma` (n,) pixels, at most 2, cut off at 6 pixels, with reflected edges."""
    reach = min(6, size - 1)
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = (-0.5 * (offset / sigma[:, None]) ** 2).exp()  # (n, 2 reach + 1)
    kernel = kernel / kernel.sum(1, keepdim=True)
    position = torch.arange(size, device=sigma.device)[:, None] + offset  # (size, 2 reach + 1)
    position = (size - 1) - ((size - 1) - position.abs()).abs()  # reflect at both ends
    matrix = sigma.new_zeros(len(sigma), size, size)
    return matrix.scatter_add_(2, position.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, size, -1))


def augment(x: Tensor, u: Tensor, order: list[int], recipe: Recipe, view: int) -> Tensor:
    """Colour jitter, grey, blur, solarise, flip and normalise x (n, 3, s, s) in [0, 1]; every choice comes from the
    uniform numbers u (n, 10), the order of the jitter's four operations from `order`."""
    u = u.to(x.device)[:, :, None, None, None]  # (n, 10, 1, 1, 1)
    on = u[:, 0] < recipe.jitter_prob  # (n, 1, 1, 1)
    strength = [torch.where(on, (2 * u[:, 1 + i] - 1) * s, 0) for i, s in enumerate(recipe.jitter)]
    for operation in order if recipe.jitter_prob else []:
        amount = strength[operation]
        if operation == 0:
            x = (x * (1 + amount)).clamp(0, 1)
        elif operation == 1:
            x = torch.lerp(gray(x).mean((2, 3), keepdim=True), x, 1 + amount).clamp(0, 1)
        elif operation == 2:
            x = torch.lerp(gray(x), x, 1 + amount).clamp(0, 1)
        else:
            x = shift_hue(x, amount)
    if recipe.gray:
        x = torch.where(u[:, 5] < recipe.gray, gray(x), x)
    if of_view(recipe.blur, view):
        matrix = blur_matrix(0.1 + 1.9 * u[:, 7, 0, 0, 0], x.shape[-1])[:, None]  # (n, 1, s, s)
        x = torch.where(u[:, 6] < of_view(recipe.blur, view), matrix @ x @ matrix.mT, x)
    if of_view(recipe.solarize, view):
        inverts = (u[:, 8] < of_view(recipe.solarize, view)) & (x >= recipe.solarize_threshold / 255)
        x = torch.where(inverts, 1 - x, x)
    x = torch.where(u[:, 9] < 0.5, x.flip(-1), x)
    return normalize(x, recipe.dataset)


def normalize(x: Tensor, dataset: str) -> Tensor:
    mean, std = (x.new_tensor(values)[:, None, None] for values in MEAN_STD[dataset])
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def of_view(values: tuple, view: int):
    """A recipe's number for this view: its own, or the one for all."""
    return values[view % len(values)]


def crop_scales(recipe: Recipe) -> Tensor:
    """(V, 2): least and largest area of each view's crop."""
    views = range(len(recipe.view_sizes))
    return torch.tensor([[of_view(recipe.min_scale, v), of_view(recipe.max_scale, v)] for v in views])


class Decoded(torch.utils.data.Dataset):
    """Workers' half: decode image i, or take it from memory, then make uint8 views of it."""

    def __init__(self, images: Images, views):
        self.images, self.views = images, views

    def __getitem__(self, key):  # key: an index, or (epoch, index)
        paths, labels, skipped = self.images.paths, self.images.labels, self.images.skipped
        index = key if isinstance(key, int) else key[1]
        if self.images.pixels is not None:
            return self.views(self.images.pixels[index], key)
        for other in range(index, index + (1 if skipped is None else len(paths))):  # the next of its class stands in
            other %= len(paths)
            if labels is not None and labels[other] != labels[index]:
                continue
            try:
                return self.views(decode(paths[other]), key)
            except UnreadableImage:
                if skipped is None:
                    raise
                worker = torch.utils.data.get_worker_info()
                skipped[worker.id if worker else 0] += 1
        raise UnreadableImage(f"{paths[index]} cannot be read, nor any other image of its class")


@dataclass
class RandomCrops:
    recipe: Recipe
    seed: int

    def __call__(self, image: Tensor, key: tuple[int, int]) -> list[Tensor]:
        sizes = self.recipe.view_sizes
        u = [torch.rand(10, 4, generator=rng(self.seed, "crop", *key, v)) for v in range(len(sizes))]
        boxes = crop_boxes(*image.shape[1:], crop_scales(self.recipe), torch.stack(u)).int().tolist()  # of all views at once
        mode = TF.InterpolationMode(self.recipe.interpolation)
        return [TF.resized_crop(image, *box, [s, s], mode, antialias=True) for box, s in zip(boxes, sizes)]


@dataclass
class CentreCrop:
    size: int

    def __call__(self, image: Tensor, key: int | None = None) -> Tensor:
        if image.shape[-2:] == (self.size, self.size):  # CIFAR's, or prepared by the user
            return image
        image = TF.resize(image, [round(self.size * 256 / 224)], TF.InterpolationMode.BILINEAR, antialias=True)
        return TF.center_crop(image, [self.size, self.size])


def epoch_order(n: int, seed: int, epoch: int, batch: int) -> Tensor:
    """(steps, batch): the images of every global batch of an epoch; the same for any number of processes."""
    return torch.randperm(n, generator=rng(seed, "order", epoch))[: n // batch * batch].view(-1, batch)


def training_views(images: Images, recipe: Recipe, seed: int, step: int, workers: int, device: torch.device):
    """Endless: for every step from `step` on, this process's share of each view, (b, 3, s, s), augmented."""
    workers = workers if images.pixels is None else 0
    share = share_of(recipe.batch_size)
    steps = len(images) // recipe.batch_size
    while True:
        epoch, first = divmod(step, steps)
        order = epoch_order(len(images), seed, epoch, recipe.batch_size)[first:, share]  # (steps left, b)
        if isinstance(images.pixels, Tensor):
            batches = (memory_crops(images.pixels, b, recipe, seed, s, share) for s, b in enumerate(order, start=step))
        else:
            keys = [[(epoch, i) for i in row] for row in order.tolist()]
            batches = (
                [v.to(device, non_blocking=True).float() / 255 for v in views]
                for views in read(Decoded(images, RandomCrops(recipe, seed)), workers, batch_sampler=keys)
            )
        for views in batches:
            for v, x in enumerate(views):
                u = torch.rand(recipe.batch_size, 10, generator=rng(seed, "colour", step, v))[share]
                operations = torch.randperm(4, generator=rng(seed, "operations", step, v)).tolist()
                views[v] = augment(x, u, operations, recipe, v)
            yield views
            step += 1


STOPPING = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


class Interrupts:
    """From now on SIGTERM, SIGUSR1 and Ctrl-C are noted in `received`, to be acted upon between two steps; a second Ctrl-C
    ends the process at once."""

    def __init__(self):
        self.received, self.handlers = False, {name: signal.signal(name, self.note) for name in STOPPING}

    def note(self, number, frame):
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self):
        for name, handler in self.handlers.items():
            signal.signal(name, handler)


WORKERS = multiprocessing.get_context("forkserver")


def start_server(module: str):
    """Workers are forked by a process of its own. A fork of this one, while a thread of gloo or autograd is anywhere in
    Python or the allocator, would now and then leave the worker waiting for ever for a lock that the thread held. The
    server imports `module` once, so that workers start fast, and from the text that the run was started with.
    torchrun and Slurm send SIGTERM to them too, but the run needs them until it has saved: the server is born with
    these signals blocked, and so are its children."""
    WORKERS.set_forkserver_preload(["torchvision.transforms.v2", module])
    before, path = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING), os.environ.get("PYTHONPATH")
    try:
        resource_tracker.ensure_running()  # unblocks some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.unregister(end_workers)
    atexit.register(end_workers)  # before multiprocessing asks them by SIGTERM, and waits


def end_workers():
    for process in multiprocessing.active_children():
        process.kill()


def leave_with_parent(worker: int):
    """A worker's first act: however the run ends, its workers end as well."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def read(dataset: torch.utils.data.Dataset, workers: int, **sampling):
    """Batches made by `workers` processes, or by this one if 0. The data set's class must be importable, not of __main__.
    An unreadable image, or a worker that is killed, ends the run with one line."""
    options = {"num_workers": workers, "pin_memory": torch.cuda.is_available() and workers > 0}
    if workers:
        start_server(type(dataset).__module__)
        options |= {"prefetch_factor": 4, "multiprocessing_context": WORKERS, "worker_init_fn": leave_with_parent}
    script, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")  # workers do not run it again
    try:
        batches = iter(torch.utils.data.DataLoader(dataset, **options, **sampling))
    finally:
        sys.modules["__main__"] = script
    try:
        yield from batches
    except UnreadableImage as error:  # a worker's traceback ends with the message
        fail(str(error).strip().split("UnreadableImage: ")[-1], alone=True)
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        what = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"a data worker has died ({what}); if for want of memory, lower --workers. What was saved is kept", alone=True)


def memory_crops(pixels: Tensor, rows: Tensor, recipe: Recipe, seed: int, step: int, share: slice) -> list[Tensor]:
    """Random resized crops (b, 3, s, s) of the images `rows` that lie on the device."""
    batch, views = pixels[rows.to(pixels.device)], []
    for v, (size, scale) in enumerate(zip(recipe.view_sizes, crop_scales(recipe))):
        u = torch.rand(recipe.batch_size, 10, 4, generator=rng(seed, "crop", step, v))[share]
        views.append(resized_crops(batch, crop_boxes(*pixels.shape[2:], scale[None], u), size, recipe.interpolation))
    return views


# ------------------------------------------------------------------------------------------------------------------
# Network


def build_backbone(arch: str, stem: str, size: int, zero_init_residual: bool = False) -> tuple[nn.Module, int]:
    """A torchvision ResNet or ViT without its classifier, and the width of its features. `size`: pixels, for a ViT."""
    models = torchvision.models
    if arch in ("vit_tiny", "vit_small", "vit_b_16"):
        heads = {"vit_tiny": 3, "vit_small": 6, "vit_b_16": 12}[arch]
        patch, width = {"imagenet": 16, "small": 8, "cifar": 4}[stem], 64 * heads
        if size % patch:
            fail(f"--arch {arch} with --stem {stem} needs views of a multiple of {patch} pixels, got {size}")
        net = models.VisionTransformer(size, patch, 12, heads, width, 4 * width)
        net.heads = nn.Identity()
        return net, width
    if arch not in models.list_models(module=models) or not arch.startswith(("resnet", "wide_resnet", "resnext")):
        fail(
            f"--arch {arch}: not one of vit_tiny, vit_small, vit_b_16 and torchvision's resnet18, resnet50, wide_resnet50_2, ..."
        )
    net = getattr(models, arch)(weights=None, zero_init_residual=zero_init_residual)
    width = net.fc.in_features
    net.fc = nn.Identity()
    if stem != "imagenet":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1 if stem == "cifar" else 2, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem == "cifar":
        net.maxpool = nn.Identity()
    return net, width


class Network(nn.Module):
    """Backbone and projector. Takes the list of views, so that DistributedDataParallel sees one forward pass; every BN
    still sees one view at a time."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.backbone, width = build_backbone(recipe.arch, recipe.stem, recipe.view_sizes[0], recipe.zero_init_residual)
        self.projector = nn.Sequential(
            nn.Linear(width, recipe.hidden, bias=False), nn.BatchNorm1d(recipe.hidden), nn.ReLU(inplace=True),
            nn.Linear(recipe.hidden, recipe.hidden, bias=False), nn.BatchNorm1d(recipe.hidden), nn.ReLU(inplace=True),
            nn.Linear(recipe.hidden, recipe.out),
        )  # fmt: skip

    def forward(self, views: list[Tensor]) -> list[Tensor]:  # V times (b, 3, s, s) -> V times (b, out)
        return [self.projector(self.backbone(v)) for v in views]


class SpectralLoss(nn.Module):
    """2 - 2 cos between views transformed by an exact spectral transformation l^(-p), over the global batch."""

    def __init__(self, p: float, axis: str):
        super().__init__()
        self.p, self.axis, self.parts = p, axis, {}

    def forward(self, views: list[Tensor], teacher: Tensor | None = None) -> Tensor:
        z = gather(torch.stack(views if teacher is None else [teacher.detach(), *views]))  # (V, m, d)
        z_hat = spectral_transform(z, power(self.p), axis=self.axis)  # (V, m, d)
        loss = 2 - 2 * cosine_similarity(z_hat[1:], z_hat[:1], dim=-1).mean()
        self.parts = {"alignment": loss.detach()}
        return undo_ddp_average(loss)


def build_criterion(recipe: Recipe) -> nn.Module:
    name, _, exponent = recipe.loss.partition(":")
    if recipe.loss in ("intl", "iternorm"):
        beta = 0.0 if recipe.loss == "iternorm" else recipe.beta
        return INTLLoss(iterations=recipe.iterations, axis=recipe.axis, beta=beta)
    if recipe.loss == "cwrgp":
        return CWRGPLoss(groups=recipe.groups, sub_batch=recipe.sub_batch)
    try:
        p = {"whiten": 0.5, "none": 0.0}[recipe.loss] if name != "power" else float(exponent)
        if not math.isfinite(p):
            raise ValueError
    except (KeyError, ValueError):
        fail(f"--loss {recipe.loss}: choose intl, iternorm, whiten, power:P with a number P, cwrgp or none")
    return SpectralLoss(p, recipe.axis)


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decays = [p for p in network.parameters() if recipe.decay_all or p.ndim > 1]
    spared = [p for p in network.parameters() if not (recipe.decay_all or p.ndim > 1)]
    groups = [{"params": decays, "weight_decay": recipe.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=0.0, momentum=0.9, fused=True)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Of step 0, 1, ...: linear warm-up, then a cosine down to final_lr. `steps`: those of one epoch."""
    peak, warmup, total = recipe.base_lr * recipe.batch_size / 256, recipe.warmup_epochs * steps, recipe.epochs * steps
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = (1 + math.cos(math.pi * (step + 1 - warmup) / (total - warmup))) / 2
    return peak * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


def orthogonality_weight(recipe: Recipe) -> float:
    """The published ones: 1e-3 for SRIP, 1e-6 for SO, 1e-5 for SO and small ViTs."""
    if recipe.orthogonality_weight is not None:
        return recipe.orthogonality_weight
    return 1e-3 if recipe.orthogonality == "srip" else 1e-5 if recipe.arch in ("vit_tiny", "vit_small") else 1e-6


def teacher_momentum(step: int, steps: int, recipe: Recipe) -> float:
    """From ema at step 0 to 1 at the end, by a cosine."""
    return 1 - (1 - recipe.ema) * (1 + math.cos(math.pi * step / (recipe.epochs * steps))) / 2


# ------------------------------------------------------------------------------------------------------------------
# Evaluation: features of a frozen backbone, and nearest neighbours among them


def still_batches(images: Images, rows: Tensor, dataset: str, size: int, device: torch.device, workers: int):
    """The images `rows` without augmentation, resized and cropped at the centre: (128, 3, size, size), normalised."""
    workers = workers if images.pixels is None else 0
    if isinstance(images.pixels, Tensor):
        batches = (CentreCrop(size)(images.pixels[i]) for i in rows.to(images.pixels.device).split(128))
    else:
        batches = read(Decoded(images, CentreCrop(size)), workers, batch_size=128, sampler=rows.tolist())
    for x in batches:
        yield normalize(x.to(device).float() / 255, dataset)


@torch.no_grad()
def encode(
    backbone: nn.Module,
    images: Images,
    dataset: str,
    size: int,
    chosen: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
) -> Tensor:
    """Features (n, width), on the CPU, of this process's share chosen[rank::world] of the images, in eval mode. More than
    2 GiB of them in all are kept in half precision."""
    rank, world = rank_and_world()
    mine, was_training, features, done = chosen[rank::world], backbone.training, None, 0
    backbone.eval()
    for x in still_batches(images, mine, dataset, size, device, workers):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = backbone(x).float().cpu()
        if features is None:
            large = 4 * len(chosen) * y.shape[1] > 2 * 2**30
            features = torch.empty(len(mine), y.shape[1], dtype=torch.float16 if large else torch.float32)
        features[done : done + len(y)] = y
        done += len(y)
    backbone.train(was_training)
    return torch.empty(0, 0) if features is None else features


def gather_shares(share: Tensor) -> Tensor:
    """The rows that the processes hold as [rank::world], together again, on every process."""
    world = rank_and_world()[1]
    if world == 1:
        return share
    shares = [None] * world
    dist.all_gather_object(shares, share)
    whole = torch.empty(sum(map(len, shares)), *shares[0].shape[1:], dtype=share.dtype)
    for r, s in enumerate(shares):
        whole[r::world] = s.view(-1, *whole.shape[1:])
    return whole


def nearest(
    bank: Tensor, queries: Tensor, k: int, device: torch.device, chunk: int = 16384, spare: int = 16
) -> tuple[Tensor, Tensor]:
    """Squared Euclidean distances (q, k) and indices (q, k) of the k rows of bank (n, d) nearest to each query (q, d),
    nearest first and of equally near ones the first: as in float64, whatever the chunks. Products in float32 propose
    k + `spare` rows, float64 decides between them; where their rounding may have hidden a row, more are proposed."""
    n, d = bank.shape
    k, few = min(k, n), min(k + spare, n)
    distances, indices = torch.zeros(len(queries), k, dtype=torch.float64), torch.zeros(len(queries), k, dtype=torch.long)
    if k == 0:
        return distances, indices
    mean = sum(x.to(device).float().sum(0) for x in bank.split(chunk)) / n  # (d,); small numbers round less
    rows = max(1, min(1024, 2**25 // (few * d)))  # memory: 2^25 numbers
    for start in range(0, len(queries), rows):
        mine = slice(start, start + rows)
        q = queries[mine].to(device).float() - mean  # (b, d)
        near, which, longest = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.long, device=device), 0.0
        for first, x in zip(range(0, n, chunk), bank.split(chunk)):
            x = x.to(device).float() - mean
            square = x.square().sum(1)
            found = torch.cat([near, torch.addmm(square, q, x.mT, alpha=-2)], dim=1)  # distance^2 less that of the query
            which = torch.cat([which, torch.arange(first, first + len(x), device=device).expand(len(q), -1)], dim=1)
            near, order = found.topk(min(few, found.shape[1]), largest=False)
            which, longest = which.gather(1, order), max(longest, square.max().item())
        which = which.sort(1).values.cpu()
        exact = (bank[which].double() - queries[mine].double()[:, None]).square().sum(-1)  # (b, few)
        value, order = exact.sort(dim=1, stable=True)
        distances[mine], indices[mine] = value[:, :k], which.gather(1, order)[:, :k]
        # No row left out can be nearer than the last proposed one, less the rounding of both.
        size = q.square().sum(1).double().cpu()  # (b,)
        rounding = 8 * d**0.5 * 2**-24 * (size.sqrt() + longest**0.5) ** 2
        hidden = near.max(1).values.double().cpu() + size - 2 * rounding <= value[:, k - 1]
        if few < n and hidden.any():
            again = start + hidden.nonzero()[:, 0]
            if spare < 256:
                distances[again], indices[again] = nearest(bank, queries[again], k, device, chunk, 256)
            else:  # hundreds of equal rows
                for i in again.tolist():
                    exact = torch.cat([(x.double() - queries[i].double()).square().sum(1) for x in bank.split(chunk)])
                    value, order = exact.sort(stable=True)
                    distances[i], indices[i] = value[:k], order[:k]
    return distances, indices


def knn_accuracy(distances: Tensor, votes: Tensor, labels: Tensor, temperature: float | None = None) -> float:
    """Top-1 in percent of the vote of the nearest neighbours, whose labels are votes (q, k): each counts one, or, given a
    temperature, exp(cosine / temperature), with the cosine of unit vectors at these squared distances. A tie goes to the
    smaller label."""
    right = 0
    weights = torch.ones_like(distances) if temperature is None else ((1 - distances / 2) / temperature).exp()
    for w, v, y in zip(weights.split(4096), votes.split(4096), labels.split(4096)):
        score = w.new_zeros(len(w), int(max(votes.max(), labels.max())) + 1).scatter_add_(1, v, w)  # (b, classes)
        right += int((score.argmax(1) == y).sum())
    return 100 * right / len(labels)


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints, logs and the alarm


def save_atomically(data, path: Path):
    """Write beside `path`, flush to the disk, then rename: `path` always holds a complete file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data) if isinstance(data, bytes) else torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk must not stay full
        raise


def save_all(contents: dict[Path, object]):
    """Of the first process."""
    for path, content in contents.items():
        try:
            save_atomically(content, path)
        except (OSError, RuntimeError) as error:
            fail(f"{path} cannot be written: {error}. What was saved before is complete", alone=True)


@contextlib.contextmanager
def restoring(path: Path):
    """The state in a file that does not fit what it is loaded into."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        fail(f"{path} does not fit this run: {' '.join(str(error).split())[:200]}. --fresh starts over")


def load_checkpoint(path: Path) -> dict:
    """A file of tensors and primitives; anything else is refused, and nothing in it is executed."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # others keep their flags so; it holds values alone
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        fail(
            f"{path} holds more than tensors and numbers, or is damaged; it is not unpickled, since that could run code. If you "
            "trust it, save its tensors alone: torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, NEW)"
        )
    except Exception as error:  # a damaged file raises nearly anything
        fail(f"{path} cannot be read as a checkpoint ({(str(error).splitlines() or [type(error).__name__])[0]})")


class Log:
    """Lines on the terminal, the same numbers as JSON in log.jsonl and as scalars for TensorBoard; first process only."""

    def __init__(self, folder: Path, config: dict, fresh: bool, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the first process writes

        self.lock, self.path = claim(folder, config, fresh), folder / "log.jsonl"
        lines = self.path.read_text(errors="replace").splitlines() if step and self.path.exists() else []
        kept = [line for line in lines if 0 <= self.step_of(line) <= step]  # what came after the checkpoint comes again
        save_atomically("".join(line + "\n" for line in kept).encode(), self.path)
        self.board = SummaryWriter(folder, purge_step=step + 1 if step else 0)

    @classmethod
    def start(cls, folder: Path, config: dict, fresh: bool, step: int):
        """Claims the folder for this run. None in all processes but the first."""
        try:
            return cls(folder, config, fresh, step) if rank_and_world()[0] == 0 else None
        except OSError as error:
            fail(f"--output {folder} cannot be written: {error}", alone=True)

    def close(self):
        try:
            self.board.close()
        except OSError as error:
            fail(f"{self.path.parent} cannot be written: {error}. The checkpoint is complete", alone=True)
        self.lock.close()

    @staticmethod
    def step_of(line: str) -> int:
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return -1  # a damaged line

    def write(self, text: str, **values):
        say(text)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
            for name, value in values.items():
                if isinstance(value, list):
                    self.board.add_histogram(f"log10 {name}", torch.tensor(value).clamp_min(1e-12).log10(), values["step"])
                elif name != "step":
                    self.board.add_scalar(name, value, values["step"])
        except OSError as error:
            fail(f"{self.path.parent} cannot be written: {error}. The last checkpoint is kept", alone=True)


def leave(log: Log | None = None):
    """The end of a run, for all processes together."""
    if log:
        log.close()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def alarm(ranks: list[float], score: float, least: float) -> str | None:
    """Collapse, announced: the embedding's effective rank after the last four epochs, the score, and that of a collapse."""
    if score < least + 0.05 * (1 - least):
        return f"the spectral score {score:.3f} is near its least value {least:.3f}: one direction holds all the variance"
    if ranks and ranks[-1] < 3:
        return f"the embedding's effective rank is {ranks[-1]:.1f}: a few directions hold all the variance"
    if len(ranks) == 4 and all(a > b for a, b in itertools.pairwise(ranks)) and ranks[-1] < 0.7 * ranks[0]:
        return f"the embedding's effective rank falls steadily: {', '.join(f'{r:.1f}' for r in ranks)}"
    return None


# ------------------------------------------------------------------------------------------------------------------
# Command line


def optional(kind: type):
    """For a flag that may be `none`."""

    def convert(text: str):
        return None if text == "none" else kind(text)

    return convert


def add_fields(parser: argparse.ArgumentParser, kind: type):
    """A flag for each field of the recipe."""
    title = "fields of the recipe, which these flags override; every run prints its values; none means no value"
    group = parser.add_argument_group(title)
    for f in fields(kind):
        options = dict(f.metadata, default=argparse.SUPPRESS)
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            number = next(t for t in (int, float, str) if t.__name__ in str(f.type))
            options["type"] = optional(number) if "None" in str(f.type) else number
            options |= {"nargs": "+"} if "tuple" in str(f.type) else {}
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def override(recipe, args: argparse.Namespace):
    """The recipe with the fields that were given as flags, and the names of these."""
    given = {f.name: getattr(args, f.name) for f in fields(recipe) if hasattr(args, f.name)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return replace(recipe, **given), set(given)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", default="shapes", choices=RECIPES, help="published settings (default: shapes)")
    add("--data", help="folder with train/ and val/, or any tree of images; not for shapes")
    add("--output", help="folder of the run (default: runs/<recipe>)")
    add("--seed", type=int, default=0, help="of the weights, the order and the augmentation")
    add("--fresh", action="store_true", help="start over; an earlier run is kept under another name")
    add("--max-steps", type=int, help="stop after this many steps of the schedule")
    add("--benchmark", type=int, metavar="N", help="time N steps, their parts and the input, and write nothing")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images, for each process")
    add(
        "--cache-mb",
        type=int,
        default=1024,
        help="keep images in memory, the GPU's if there is one, up to this many MiB (%(default)s)",
    )
    add("--skip-unreadable", action="store_true", help="count unreadable training images and go on without them")
    add("--log-every", type=int, default=10, help="steps between two lines (%(default)s)")
    add("--save-every", type=int, default=1, help="epochs between two checkpoints (%(default)s)")
    add(
        "--knn-images", type=int, default=20_000, help="training images that vote in each epoch's k-NN (%(default)s); 0: none"
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--precision", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    add("--compile", action="store_true", help="torch.compile the backbone")
    add_fields(parser, Recipe)
    args = parser.parse_args(argv)
    recipe, args.given = override(RECIPES[args.recipe], args)
    if args.recipe == "imagenet-multicrop" and "base_lr" not in args.given:
        recipe = replace(recipe, base_lr=MULTICROP_LR.get(recipe.epochs, recipe.base_lr))
    return args, recipe


def at_least(least: dict[str, int], *given):
    """The limits of flags, whose values are in the recipe or the other arguments. Seeds have one above, too."""
    for name, value in least.items():
        for number in (getattr(holder, name, None) for holder in given):
            if number is not None and not value <= number < (2**63 if name == "seed" else math.inf):
                above = " and below 2^63" * (name == "seed")
                fail(f"--{name.replace('_', '-')} must be at least {value}{above}, got {number}")


USED_BY = {  # the flags that only some losses use
    "iterations": ["intl", "iternorm"],
    "beta": ["intl"],
    "axis": ["intl", "iternorm", "whiten", "power"],
    "groups": ["cwrgp"],
    "sub_batch": ["cwrgp"],
}


def check(recipe: Recipe, args: argparse.Namespace):
    """Whatever can be known to be wrong before any work is done."""
    world, views = rank_and_world()[1], len(recipe.view_sizes)
    least = {"epochs": 1, "hidden": 1, "out": 2, "batch_size": 2, "warmup_epochs": 0, "base_lr": 0, "log_every": 1, "seed": 0}
    at_least(least | {"save_every": 1, "knn_images": 0, "workers": 0, "max_steps": 1, "benchmark": 1}, recipe, args)

    def numbers(*names: str):
        for name in names:
            values = getattr(recipe, name)
            yield from ((name, value) for value in (values if isinstance(values, tuple) else [values]))

    for name, value in numbers("final_lr", "weight_decay", "beta", "orthogonality_weight", "jitter"):
        if value is not None and not (math.isfinite(value) and (value >= 0 or name == "beta")):
            fail(f"--{name.replace('_', '-')} must be finite and not negative, got {value}")
    for name, value in numbers("jitter_prob", "gray", "blur", "solarize"):
        if not 0 <= value <= 1:
            fail(f"--{name.replace('_', '-')} is a probability, between 0 and 1, got {value}")
    if args.output == "":
        fail("--output is empty")
    if min(recipe.view_sizes) < 8:
        fail(f"--view-sizes must be at least 8, got {min(recipe.view_sizes)}")
    if recipe.warmup_epochs >= recipe.epochs:
        fail(f"--warmup-epochs {recipe.warmup_epochs} leaves nothing of --epochs {recipe.epochs}")
    if recipe.batch_size % world:
        below = recipe.batch_size // world * world
        near = f"{below} or {below + world}" if below else world
        fail(f"--batch-size {recipe.batch_size}, the global batch, is not divisible by {world} processes; {near} would be")
    if recipe.batch_size // world < 2:
        fail(f"--batch-size {recipe.batch_size} on {world} processes: BatchNorm needs at least 2 images on each")
    if views < 2:
        fail("--view-sizes needs at least two views")
    for name in ("min_scale", "max_scale", "blur", "solarize"):
        if len(getattr(recipe, name)) not in (1, views):
            fail(f"--{name.replace('_', '-')} takes one number, or one for each of the {views} views")
    if any(not 0 < of_view(recipe.min_scale, v) <= of_view(recipe.max_scale, v) <= 1 for v in range(views)):
        fail("--min-scale and --max-scale are fractions of the image's area: 0 < min <= max <= 1")
    if len(recipe.jitter) != 4 or not 0 <= recipe.jitter[3] <= 0.5:
        fail("--jitter takes four numbers: brightness, contrast, saturation, and hue of at most 0.5")
    if not 1 <= recipe.iterations <= 40:
        fail(f"--iterations must be between 1 and 40, got {recipe.iterations}")
    if recipe.ema is not None and not 0 <= recipe.ema <= 1:
        fail(f"--ema is a momentum between 0 and 1, got {recipe.ema}")
    if recipe.ema is not None and recipe.loss == "cwrgp":
        fail("--loss cwrgp compares all pairs of views and has no teacher: --ema none")
    together = recipe.batch_size if recipe.sub_batch is None else recipe.sub_batch
    if recipe.loss == "cwrgp" and (
        recipe.groups < 1
        or together < 2
        or recipe.batch_size % together
        or recipe.out % recipe.groups
        or recipe.out // recipe.groups <= together
    ):
        fail(
            "--loss cwrgp needs a --sub-batch that divides --batch-size, and --groups that divide --out into parts larger than "
            f"it, got sub-batch {together} of {recipe.batch_size}, {recipe.groups} groups of {recipe.out} channels"
        )
    if recipe.arch.startswith("vit") and len(set(recipe.view_sizes)) > 1:
        fail("--arch vit_* takes views of one size: its position embedding has one length")
    n = recipe.batch_size if recipe.axis == "channel" else recipe.out
    if recipe.loss == "intl" and recipe.beta is None and n <= 8:
        fail(
            f"--beta: the weight 0.01 (log2 n - 3) of the trace loss is not positive for n = {n}; a larger batch, or give one"
        )
    build_criterion(recipe)
    for name, losses in USED_BY.items():
        if name in args.given and recipe.loss.split(":")[0] not in losses:
            fail(f"--{name.replace('_', '-')} means nothing to --loss {recipe.loss}, but to {', '.join(losses)}")
    if "orthogonality_weight" in args.given and recipe.orthogonality is None:
        fail("--orthogonality-weight needs --orthogonality so or srip")
    with torch.device("meta"):
        build_backbone(recipe.arch, recipe.stem, recipe.view_sizes[0])


def run_folder(args: argparse.Namespace, default: str) -> tuple[Path, bool]:
    """--output, if a run may lie there, and whether to start over: torchrun's own restarts resume."""
    folder, fresh = Path(args.output or default), args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        fail(f"--output {folder} is no folder")
    if folder.exists() and set(os.listdir(folder)) - {".lock"} and not (folder / "config.json").is_file():
        fail(f"{folder} is not empty and holds no run of this script: choose another --output")
    return Path(os.path.abspath(folder)) if fresh else folder, fresh  # the working directory may be renamed with it


def resume_point(folder: Path, config: dict, fresh: bool, keys: set[str]) -> dict | None:
    """The checkpoint to go on from, with these keys, or None for a new run. A folder with something else in it is left alone."""
    if fresh or not (folder / "config.json").is_file():
        return None
    try:
        there = json.loads((folder / "config.json").read_text())
        names = [name for name in sorted(there.keys() | config.keys()) if there.get(name) != config.get(name)]
    except (OSError, ValueError, AttributeError):
        fail(f"{folder}/config.json is damaged: choose another --output or give --fresh")
    if names:
        told = {name: f"{name} {there.get(name)} there and {config.get(name)} here" for name in names} | {
            "data": "other images"
        }
        differing = ", ".join(told[name] for name in names)
        fail(f"{folder} holds another run ({differing}): choose another --output or give --fresh")
    if not (folder / "checkpoint.pt").exists():
        return None
    saved = load_checkpoint(folder / "checkpoint.pt")
    if not isinstance(saved, dict) or not keys <= saved.keys() or not isinstance(saved["step"], int):
        fail(f"{folder}/checkpoint.pt is no checkpoint of this script: choose another --output or give --fresh")
    return saved


def lock(folder: Path, name: str = ".lock"):
    """The folder, or what `name` stands for there, belongs to this process for as long as it keeps the file that is returned."""
    file = open(folder / name, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing to {folder}: choose another --output", alone=True)
    except OSError as error:  # some shared file systems
        say(f"{folder} cannot be locked ({error.strerror}): let no two runs write to it")
    return file


def claim(folder: Path, config: dict, fresh: bool):
    """First process: set an earlier run aside if told to, make the folder, and lock it."""
    if fresh and folder.exists():
        folder = Path(os.path.realpath(folder))
        earlier = lock(folder)  # it may still be running
        aside = next(p for p in (folder.with_name(f"{folder.name}.{i}") for i in itertools.count(1)) if not p.exists())
        folder.rename(aside)
        earlier.close()
        say(f"--fresh: the earlier run is kept as {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    mine = lock(folder)
    if not (folder / "config.json").exists():
        save_atomically((json.dumps(config, indent=1) + "\n").encode(), folder / "config.json")
    return mine


# ------------------------------------------------------------------------------------------------------------------
# One step, and the run


def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float):
    """Parameters alone; the teacher's BN statistics are those of its own batches."""
    with torch.no_grad():
        torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


class Trainer:
    """All that a step changes, and the step itself."""

    def __init__(
        self, recipe: Recipe, network: nn.Module, steps: int, seed: int, device: torch.device, dtype: torch.dtype,
        compile: bool = False,
    ):  # fmt: skip
        self.recipe, self.steps, self.seed, self.device, self.dtype = recipe, steps, seed, device, dtype
        network = network.to(device, memory_format=torch.channels_last)
        teacher = copy.deepcopy(network).requires_grad_(False) if recipe.ema is not None else None
        if rank_and_world()[1] > 1 and device.type == "cuda":  # SyncBatchNorm is for GPUs; a CPU normalises its own share
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            teacher = nn.SyncBatchNorm.convert_sync_batchnorm(teacher) if teacher else None
        if compile:
            network.backbone.compile()
        self.network, self.teacher, self.criterion = network, teacher, build_criterion(recipe)
        self.optimizer = build_optimizer(network, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.model = distribute(network, device)

    def embed(self, views: list[Tensor]) -> list:
        """The criterion's arguments: the views' embeddings (b, out); with a teacher, which embeds view 0 alone, its own last."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.teacher is None:
                return [self.model(views)]
            with torch.no_grad():
                anchor = self.teacher(views[:1])[0]
            return [self.model(views[1:]), anchor]

    def step(self, views: list[Tensor], step: int) -> tuple[Tensor, Tensor]:
        """The loss, and the embedding (b, out) of the last view."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.recipe)
        if self.teacher:
            move_teacher(self.teacher, self.network, teacher_momentum(step, self.steps, self.recipe))
        torch.manual_seed(rng(self.seed, "loss", step).initial_seed())  # CW-RGP draws permutations
        z = self.embed(views)
        loss = self.criterion(*z)
        if self.recipe.orthogonality:
            penalty = orthogonality_penalty(self.network.backbone, self.recipe.orthogonality)
            loss = loss + orthogonality_weight(self.recipe) * penalty
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach(), z[0][-1].detach()

    def state_dict(self) -> dict:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"scaler": self.scaler.state_dict(), "teacher": self.teacher.state_dict() if self.teacher else None}

    def load_state_dict(self, state: dict):
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.teacher:
            self.teacher.load_state_dict(state["teacher"])


def compare_steps(step: int):
    """All processes have found the same checkpoint."""
    steps = [step] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        fail(f"the processes found different checkpoints (steps {steps}): --output must be a shared folder")


def any_process(flag: bool, device: torch.device) -> bool:
    if rank_and_world()[1] == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def benchmark(trainer: Trainer, images: Images, workers: int, count: int):
    """Time `count` whole steps, and the parts of a step in turn with them, on real batches."""
    recipe, device = trainer.recipe, trainer.device
    views = training_views(images, recipe, trainer.seed, 0, workers, device)
    waited, done, batch = 0.0, 0, None

    def whole():
        nonlocal waited, done, batch
        begin = time.perf_counter()
        batch = next(views)
        waited += time.perf_counter() - begin
        trainer.step(batch, done)
        done += 1

    def bare():
        z = trainer.embed(batch)[0]
        torch.autograd.backward(z, [torch.ones_like(e) for e in z])
        trainer.optimizer.zero_grad()

    def loss():
        z, *anchor = embedding
        trainer.criterion([e.detach().requires_grad_() for e in z], *anchor).backward()

    def timed(part, repeats: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            part()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    parts = {"whole step": whole, "backbone and projector": bare, "loss": loss}
    if images.pixels is not None:
        parts["input"] = lambda: next(views)
    trainer.network.train()
    for _ in range(3):
        whole()
    with torch.no_grad():
        embedding = trainer.embed(batch)
    for part in parts.values():
        part()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # Workers would read ahead while a part is timed alone: with them, all whole steps come first, in one block.
    rounds, waited = 1 if images.pixels is None else min(5, count), 0.0
    seconds = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            seconds[name].append(timed(part, math.ceil(count / rounds)))
    median = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    step = median["whole step"]
    median.setdefault("input", waited / (rounds * math.ceil(count / rounds)))
    median["update and rest"] = step - median["backbone and projector"] - median["loss"] - median["input"]
    say(f"{'':24}    ms a step   share")
    for name, value in median.items():
        say(f"{name:24} {1000 * value:12.1f} {100 * value / step:6.1f} %")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    say(f"{recipe.batch_size / step:.0f} images/s; an epoch of {trainer.steps} steps {step * trainer.steps:.1f} s, "
        f"{recipe.epochs} epochs {step * trainer.steps * recipe.epochs / 3600:.2f} h; "
        f"peak memory {memory:.2f} GiB")  # fmt: skip
    views.close()
    if images.paths and rank_and_world()[0] == 0:
        benchmark_input(images.paths, recipe, device)


def benchmark_input(paths: Packed, recipe: Recipe, device: torch.device):
    """One core's images per second, all views: the published augmentation in PIL, and what a worker does here."""
    from PIL import Image, ImageFilter
    from torchvision import transforms as v1

    def blurred(image):
        return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item()))

    pipelines = [
        v1.Compose([
            v1.RandomResizedCrop(
                size, (of_view(recipe.min_scale, v), of_view(recipe.max_scale, v)), interpolation=v1.InterpolationMode.BICUBIC
            ),
            v1.RandomApply([v1.ColorJitter(*recipe.jitter)], recipe.jitter_prob),
            v1.RandomGrayscale(recipe.gray),
            v1.RandomApply([blurred], of_view(recipe.blur, v)),
            v1.RandomSolarize(recipe.solarize_threshold, of_view(recipe.solarize, v)),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(*MEAN_STD[recipe.dataset]),
        ])
        for v, size in enumerate(recipe.view_sizes)
    ]  # fmt: skip
    crops, chosen = RandomCrops(recipe, 0), torch.randperm(len(paths), generator=rng(0, "input")).tolist()[:128]

    def pil(i: int):
        with open(paths[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        return [pipeline(image) for pipeline in pipelines]

    def worker(i: int):
        return crops(decode(paths[i]), (0, i))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {pil: 0.0, worker: 0.0}
    for start in range(0, len(chosen), 8):  # alternately, so that both meet the same machine
        for pipeline in seconds:
            begin = time.perf_counter()
            for i in chosen[start : start + 8]:
                pipeline(i)
            seconds[pipeline] += time.perf_counter() - begin
    torch.set_num_threads(threads)
    rate = {pipeline: len(chosen) / value for pipeline, value in seconds.items()}
    say(f"input of {len(recipe.view_sizes)} views on one core: the published augmentation in PIL {rate[pil]:.0f} images/s; "
        f"here a worker decodes and crops {rate[worker]:.0f} images/s, {rate[worker] / rate[pil]:.1f} times as many, "
        f"and the rest of the augmentation is batched on the {device.type}")  # fmt: skip


@leave_together
def main(argv: list[str] | None = None):
    args, recipe = parse(argv)
    rank, world = rank_and_world()
    check(recipe, args)
    folder, fresh = run_folder(args, f"runs/{args.recipe}")
    device = choose_device(args.device)
    dtype, reason = choose_precision(args.precision, device)
    train, val = load_data(recipe.dataset, args.data, args.seed, device, args.cache_mb, args.skip_unreadable)
    if len(train) < recipe.batch_size:
        fail(f"{len(train)} training images are fewer than one batch of {recipe.batch_size}: lower --batch-size")
    steps = len(train) // recipe.batch_size  # of one epoch; images left over wait for the next epoch's order
    total = recipe.epochs * steps
    last = min(total, args.max_steps or total)
    config = dataclasses.asdict(recipe) | {"recipe": args.recipe, "seed": args.seed, "images": len(train)}
    root = str(Path(args.data or ""))
    names = "".join(path.removeprefix(root).lstrip("/") for path in train.paths or [])  # relpath: 4 s a million
    config["data"] = digest(names.encode(errors="replace"))
    config = json.loads(json.dumps(config))  # as it will be read again
    keys = {"step", "network", "optimizer", "scaler", "teacher", "history"}
    saved = None if args.benchmark else resume_point(folder, config, fresh, keys)
    if dist.is_initialized():
        dist.barrier()  # all have looked at the folder before the first process writes to it

    torch.manual_seed(args.seed)
    trainer = Trainer(recipe, Network(recipe), steps, args.seed, device, dtype, args.compile)
    if args.benchmark:
        say(f"{recipe.arch}, {device}, {str(dtype).removeprefix('torch.')}: {reason}")
        benchmark(trainer, train, args.workers, args.benchmark)
        return leave()
    network, backbone, criterion = trainer.network, trainer.network.backbone, trainer.criterion
    step, history = 0, {"random_knn": None, "trained_knn": None, "measured": 0, "ranks": []}
    if saved:
        step, history = saved["step"], saved["history"]
        with restoring(folder / "checkpoint.pt"):
            trainer.load_state_dict(saved)

    log = Log.start(folder, config, fresh, step)
    say("configuration: " + ", ".join(f"{name} {value}" for name, value in config.items()))
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    where = "in memory" if train.pixels is not None else f"read by {args.workers} workers"
    say(f"{args.recipe}: {len(train)} images {where}; {recipe.epochs} epochs of {steps} steps; output {folder}")
    say(f"{recipe.arch}, projector {recipe.hidden}-{recipe.hidden}-{recipe.out}, {parameters:.1f} M parameters")
    rate = recipe.base_lr * recipe.batch_size / 256
    say(f"loss {recipe.loss}; global batch {recipe.batch_size} on {world} process(es); "
        f"learning rate {recipe.base_lr} x {recipe.batch_size}/256 = {rate:g}")  # fmt: skip
    say(f"{device}, {str(dtype).removeprefix('torch.')}: {reason}")

    # Each epoch: features of at most 10,000 validation images (without any, 2,000 for training), and --knn-images that vote.
    voters = torch.randperm(len(train), generator=rng(args.seed, "voters"))[: args.knn_images]
    probe = val or train
    queried = torch.randperm(len(probe), generator=rng(args.seed, "queries"))[: 10_000 if val else 2000]
    size = recipe.view_sizes[0]

    advice = f"What was saved in {folder} is kept. A lower --base-lr or --precision float32 may help"

    def evaluate(embedding: Tensor | None) -> float | None:
        started = time.time()
        numbers = {"step": step, "epoch": step / steps}
        unify_buffers(backbone)
        queries = gather_shares(encode(backbone, probe, recipe.dataset, size, queried, device, dtype, args.workers))
        if not queries.isfinite().all():
            fail(f"the backbone's features are not finite at step {step}. {advice}")
        numbers["feature_rank"] = effective_rank(queries).item()
        text = f"effective rank: features {numbers['feature_rank']:.1f} of {min(queries.shape)}"
        if val and len(voters) and train.classes:
            bank = gather_shares(encode(backbone, train, recipe.dataset, size, voters, device, dtype, args.workers))
            distances, indices = nearest(bank, queries, 5, device)
            numbers["knn_top1"] = knn_accuracy(distances, train.labels[voters][indices], val.labels[queried])
            text = f"5-NN top-1 {numbers['knn_top1']:.1f} %  {text}"
        if embedding is not None:
            z = gather(embedding.float())  # (batch, out)
            numbers |= {"embedding_rank": effective_rank(z).item(), "embedding_condition": condition_number(z).item()}
            numbers["embedding_spectrum"] = [float(f"{value:.3g}") for value in spectrum(z).tolist()]
            text += f", embedding {numbers['embedding_rank']:.1f} of {min(z.shape)}"
            text += f"; condition number {numbers['embedding_condition']:.3g}"
            history["ranks"] = [*history["ranks"], numbers["embedding_rank"]][-4:]
        numbers["evaluation_seconds"] = time.time() - started
        history["measured"] = step
        if log:
            log.write(f"epoch {step / steps:.2f}/{recipe.epochs}  {text}", **numbers)
        return numbers.get("knn_top1")

    def save():
        if rank == 0:
            state = {"config": config, "step": step, "history": history} | trainer.state_dict()
            plain = {k: v.cpu().contiguous() for k, v in backbone.state_dict().items()}
            save_all({folder / "checkpoint.pt": state, folder / "backbone.pt": plain})

    interrupts = Interrupts()
    compare_steps(step)
    if saved:
        say(f"resuming at step {step} of {total}")
        if step in range(steps, last + 1, steps) and history["measured"] != step:  # a signal came before it could be measured
            history["trained_knn"] = evaluate(None)
            save()
    else:
        history["random_knn"] = history["trained_knn"] = evaluate(None)
    views = training_views(train, recipe, args.seed, step, args.workers, device)
    started, training, waited, first = time.time(), 0.0, 0.0, step
    pause = started  # when training last went on after an evaluation
    network.train()
    while step < last:
        begin = time.time()
        batch = next(views)
        waited += time.time() - begin
        try:
            loss, embedding = trainer.step(batch, step)
        except torch.linalg.LinAlgError:
            fail(f"the embedding is not finite at step {step}. {advice}")
        step += 1

        epoch_ends, logs = step % steps == 0 or step == last, step % args.log_every == 0
        stop = (world == 1 or logs or epoch_ends) and any_process(interrupts.received, device)
        if logs or epoch_ends or stop:
            numbers = {k: float(v) for k, v in {"loss": loss, **criterion.parts}.items()}
            if not math.isfinite(numbers["loss"]):
                fail(f"the loss is not finite at step {step}: {numbers}. {advice}")
            training += time.time() - pause  # measured where the line above has waited for the device
            pause = time.time()
            numbers |= {"step": step, "epoch": step / steps, "lr": trainer.optimizer.param_groups[0]["lr"]}
            numbers["images_per_second"] = (step - first) * recipe.batch_size / training
            numbers["waiting"] = waited / training
            if log:
                remaining = (last - step) * (time.time() - started) / (step - first)
                log.write(progress_line(numbers, recipe, total, remaining), **numbers)
        if epoch_ends and not stop:  # who was told to stop has seconds left
            history["trained_knn"] = evaluate(embedding)
            if train.skipped is not None and train.skipped.any():
                say(f"unreadable images were met {int(train.skipped.sum())} times so far by this process's workers")
            warning = alarm(history["ranks"], numbers.get("score", 1), numbers.get("least", 0))
            if warning:
                say(f"ALARM: {warning}")
            pause = time.time()
        if stop or (epoch_ends and (math.ceil(step / steps) % args.save_every == 0 or step == last)):
            save()
        if stop:
            say(f"told to stop: saved at step {step} of {total}; the same command goes on from there")
            break
    views.close()
    interrupts.restore()
    leave(log)
    if step >= last:
        say(f"saved {folder / 'backbone.pt'}")
        if None not in (history["random_knn"], history["trained_knn"]):
            say(f"5-NN top-1 on {len(queried)} held-out images: random network {history['random_knn']:.1f} %, "
                f"after {step / steps:g} epochs {history['trained_knn']:.1f} %")  # fmt: skip
        words = ["--checkpoint", str(folder / "checkpoint.pt"), *(["--data", args.data] if args.data else [])]
        if train.classes and val:
            say(f"next: python linear_eval.py {shlex.join(words)}")


def progress_line(numbers: dict, recipe: Recipe, total: int, remaining: float) -> str:
    parts = f"alignment {numbers['alignment']:.3f}" if "alignment" in numbers else recipe.loss
    if "trace" in numbers:
        parts += f", trace {numbers['trace'] - numbers['floor']:.2f} above its floor {numbers['floor']:.1f}"
        parts += f", score {numbers['score']:.3f}"
    hours, minutes = divmod(round(remaining / 60), 60)
    return (
        f"epoch {numbers['epoch']:.2f}/{recipe.epochs}  step {numbers['step']}/{total}  loss {numbers['loss']:.3f} ({parts})  "
        f"lr {numbers['lr']:.4f}  {numbers['images_per_second']:.0f} images/s, {100 * numbers['waiting']:.0f} % waiting for data  "
        f"ETA {f'{hours} h {minutes:02d} min' if hours else f'{remaining / 60:.1f} min'}"
    )


if __name__ == "__main__":
    importlib.import_module(Path(__file__).stem).main()  # workers know its classes by this name
