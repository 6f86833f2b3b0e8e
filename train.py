"""Pretrain a ResNet with INTL, or with its kin, on a CPU, a GPU or many nodes.

    torchrun train.py                                                      # shapes: no data, 3 minutes
    torchrun train.py --recipe cifar10 --data data/cifar10                 # downloads CIFAR-10 there
    torchrun --nproc_per_node 8 train.py --recipe imagenet --data /data/imagenet
    torchrun train.py --recipe cwrgp-cifar10 --data data/cifar10           # its kin, by its own recipe

A recipe gives the flags' defaults. The same command goes on from the last checkpoint. Output: runs/<recipe>/.
"""

import argparse
import copy
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import resource
import shlex
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import intl

# --- Recipes: what the official releases publish (winci-ai/INTL, winci-ai/CW-RGP); else a flag's default ----

# fmt: off
CIFAR = dict(stem="cifar", epochs=1000, view_sizes=[32, 32])
IMAGENET = dict(
    arch="resnet50", zero_init_residual=True, epochs=800, weight_decay=1e-5, decay_all=False, hidden=8192,
    out=8192, blur=[1.0, 0.1],
)
MULTICROP = IMAGENET | dict(
    ema=0.996, view_sizes=[224, 224, 192, 160, 128, 96], blur=[0.5], solarize=[0.1],
    min_scale=[0.2, 0.2, 0.171, 0.143, 0.114, 0.086], max_scale=[1.0, 1.0, 0.857, 0.714, 0.571, 0.429],
)
CWRGP = CIFAR | dict(
    dataset="cifar10", zero_init_residual=True, layers=2, hidden=1024, out=512, joint_head=True,
    loss="cwrgp", sub_batch=64, optimizer="adam", base_lr=3e-3, weight_decay=1e-6,
    warmup_epochs=500 / 195,  # 500 steps, CIFAR's epoch having 195
    milestones=[0.95, 0.975],  # 50 and 25 epochs before the end of 1000
    min_scale=[0.2], jitter=[0.4, 0.4, 0.4, 0.1], gray=0.1, solarize=[0.0],
)
RECIPES = {
    # This project's own: strong colour jitter and inversion leave the shape as what two views share.
    "shapes": dict(
        dataset="shapes", stem="small", epochs=6, batch_size=128, warmup_epochs=1, hidden=512, out=512,
        view_sizes=[32, 32], min_scale=[0.4], jitter=[0.4, 0.4, 0.4, 0.5], jitter_prob=1.0, gray=0.3,
        solarize=[0.5], solarize_threshold=0,
    ),
    "cifar10": CIFAR | dict(dataset="cifar10"),
    "cifar100": CIFAR | dict(dataset="cifar100"),
    "imagenet100": IMAGENET | dict(
        arch="resnet18", zero_init_residual=False, epochs=400, batch_size=128, base_lr=0.5, hidden=4096,
        weight_decay=2.5e-5,
    ),
    "imagenet": IMAGENET,
    "imagenet-multicrop-100": MULTICROP | dict(epochs=100, base_lr=0.5),
    "imagenet-multicrop-200": MULTICROP | dict(epochs=200, base_lr=0.4),
    "imagenet-multicrop-400": MULTICROP | dict(epochs=400, base_lr=0.4),
    "imagenet-multicrop-800": MULTICROP | dict(epochs=800, base_lr=0.3),
    "cwrgp-cifar10": CWRGP | dict(repeats=4),
    "cwrgp-cifar10-4views": CWRGP | dict(view_sizes=[32] * 4),
    "whiten-cifar10": CWRGP | dict(loss="power"),  # exact transformations, trained as CW-RGP is
}
# Flags that may differ from those of the checkpoint that a run goes on from.
FREE = "data", "output", "max_steps", "workers", "log_every", "save_minutes", "device", "precision", "compile"
# fmt: on
LOSSES = {
    "intl": lambda a: intl.INTLLoss(iterations=a.iterations, axis=a.axis, beta=a.beta),
    "iternorm": lambda a: intl.INTLLoss(iterations=a.iterations, axis=a.axis, beta=0.0),
    "power": lambda a: intl.SpectralLoss(a.power, axis=a.axis),
    "whiten": lambda a: intl.SpectralLoss(0.5, axis=a.axis),
    "none": lambda a: intl.SpectralLoss(0.0, axis=a.axis),
    "cwrgp": lambda a: intl.CWRGPLoss(groups=a.groups, sub_batch=a.sub_batch, repeats=a.repeats),
}
MEAN_STD = {
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# First convolution: kernel, stride, padding; whether a max-pool follows. cifar-padded: the official release's
# since June 2023, after its results were published; it pads CIFAR's images twice.
STEMS = {"imagenet": (7, 2, 3, True), "cifar": (3, 1, 1, False), "small": (3, 2, 1, True)}
STEMS["cifar-padded"] = (3, 1, 2, False)
ARCHS = torchvision.models.list_models(torchvision.models, include=["resn*", "wide_resn*"])
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
say = functools.partial(print, flush=True) if RANK == 0 else lambda message: None


def within(low: float, high: float = math.inf, kind: type = float):
    """An argparse type: a number from `low` to `high`."""

    def number(text: str):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")

    return number


def common_flags(parser: argparse.ArgumentParser, precision: str | None = None):
    """Of all three scripts; returns the types of a count, an amount and a share."""
    add, cores = parser.add_argument, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--output", type=Path, help="folder of the run (default: runs/..., or beside the checkpoint)")
    add("--seed", type=within(0, kind=int), default=0, help="of weights, order, augmentation")
    add("--workers", type=within(0, kind=int), default=min(8, cores), help="of each process, to read images")
    add("--log-every", type=within(1, kind=int), default=10, help="steps between two lines")
    add("--save-minutes", type=within(0), default=10, help="minutes between two checkpoints")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    if precision:
        add("--precision", default=precision, choices=["auto", "bfloat16", "float16", "float32"])
    return within(1, kind=int), within(0), within(0, 1)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    count, amount, share = common_flags(parser, precision="auto")
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--recipe", default="shapes", choices=RECIPES, help="published settings (default: shapes)")
    add("--data", type=Path, help="folder with train/ and val/, or any tree of images; shapes needs none")
    add("--max-steps", type=count, help="stop after this many steps of the schedule")
    add("--compile", action="store_true", help="torch.compile the network")

    add = parser.add_argument_group("what defines the run; a recipe gives the defaults").add_argument
    add("--dataset", default="folder", choices=MEAN_STD, help="what --data holds; chooses mean and std")
    add("--arch", default="resnet18", choices=ARCHS, metavar="RESNET", help="a ResNet of torchvision")
    add("--stem", default="imagenet", choices=STEMS, help="first layers; cifar: 3x3, no max-pool")
    add("--zero-init-residual", action=boolean, default=False, help="start every residual branch at zero")
    add("--layers", type=count, default=3, help="projector: linear layers, with BN and ReLU between them")
    add("--hidden", type=count, default=2048, help="projector: width of its hidden layers")
    add("--out", type=count, default=2048, help="projector: width of the embedding")
    add("--joint-head", action=boolean, default=False, help="projector: all views in one BN; hidden biases")
    add("--epochs", type=count, default=100, help="length of the schedule")
    add("--batch-size", type=count, default=256, help="GLOBAL, over all processes; the loss depends on it")
    add("--optimizer", default="sgd", choices=["sgd", "adam"], help="sgd: momentum 0.9")
    add("--base-lr", type=amount, default=0.3, help="learning rate; sgd: per 256 images of the global batch")
    add("--warmup-epochs", type=amount, default=2, help="linear")
    add("--milestones", type=share, nargs="+", help="no cosine: times 0.2 at these fractions of the schedule")
    add("--weight-decay", type=amount, default=1e-4)
    add("--decay-all", action=boolean, default=True, help="weight decay on biases and BN parameters too")
    add("--loss", default="intl", choices=LOSSES, help="iternorm: INTL, beta 0; none: alignment alone")
    add("--iterations", type=within(1, 40, int), default=4, help="intl, iternorm: Newton steps")
    add("--axis", default="channel", choices=["channel", "batch"], help="what is centred and whitened")
    add("--beta", type=amount, help="intl: weight of the trace loss (default: published, or balanced)")
    add("--power", type=float, default=0.5, help="power: the eigenvalues' exponent, negated")
    add("--groups", type=count, default=4, help="cwrgp: groups of channels")
    add("--sub-batch", type=count, help="cwrgp: samples whitened together (default all)")
    add("--repeats", type=count, default=1, help="cwrgp: partitions averaged in a step")
    add("--orthogonality", choices=["so", "srip"], help="add this penalty on the backbone's weights")
    add("--orthogonality-weight", type=amount, default=1e-6, help="OR's for ResNets: so 1e-6, srip 1e-3")
    add("--ema", type=share, default=0.0, help="momentum of a teacher for view 0, rising to 1; 0: none")
    add("--view-sizes", type=count, nargs="+", default=[224, 224], help="pixels of each view")
    add("--min-scale", type=share, nargs="+", default=[0.08], help="least area of a crop; one, or one a view")
    add("--max-scale", type=share, nargs="+", default=[1.0], help="largest area of a crop")
    add("--jitter", type=amount, nargs=4, default=[0.4, 0.4, 0.2, 0.1], help="of brightness, contrast, ...")
    add("--jitter-prob", type=share, default=0.8)
    add("--gray", type=share, default=0.2, help="probability")
    add("--blur", type=share, nargs="+", default=[0.0], help="probability of a Gaussian, sigma 0.1 to 2")
    add("--solarize", type=share, nargs="+", default=[0.0, 0.2], help="probability")
    add("--solarize-threshold", type=int, default=128, help="inverts from this grey on; 0: the whole image")
    add("--knn-images", type=count, default=20_000, help="training images that vote in each k-NN")
    parser.set_defaults(**RECIPES[parser.parse_known_args(argv)[0].recipe])
    args = parser.parse_args(argv)
    for name in ("min_scale", "max_scale", "blur", "solarize"):  # one number for each view
        vars(args)[name] = (getattr(args, name) * len(args.view_sizes))[: len(args.view_sizes)]
    if args.batch_size % WORLD:
        parser.error(f"--batch-size {args.batch_size} is the global batch, of {WORLD} processes")
    if args.warmup_epochs >= args.epochs or len(args.view_sizes) < 2:
        parser.error("--epochs must exceed --warmup-epochs, and --view-sizes name two views or more")
    if args.ema and args.loss == "cwrgp":
        parser.error("--ema: CW-RGP has no teacher")
    return args


# --- Processes, random numbers, files ---------------------------------------------------------------------


def start(name: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """This process's device and autocast's type; joins the other processes, if torchrun started several."""
    device, backend = torch.device(name), dict(backend="gloo")
    best = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        backend = dict(backend="nccl", device_id=device)
        best = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        say("cudnn.benchmark; float32: products exact, convolutions in TF32, as torch has it")
    torch.set_float32_matmul_precision("highest")
    if WORLD > 1:
        # Each of torchrun's restarts under a name of its own: a shared store keeps the addresses of the dead.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
        dist.init_process_group(store=store, rank=RANK, world_size=WORLD, **backend)
    return device, getattr(torch, best if precision == "auto" else precision)


def distribute(network: nn.Module, device: torch.device) -> nn.Module:
    """Under DistributedDataParallel, if there are several processes; without SyncBN, on CPUs, the first one's
    BN statistics are sent to the others before each step."""
    if WORLD == 1:
        return network
    options = dict(device_ids=[device.index], broadcast_buffers=False) if device.type == "cuda" else {}
    return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True, **options)


def rng(*key) -> torch.Generator:
    """A generator that depends on the key alone. Every random number of a run comes from (seed, purpose,
    place in the schedule): workers, processes and interruptions change nothing, and no state is saved."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def save(state, path: Path):
    """Written beside, flushed, renamed: `path` is always a whole file, whatever kills the run."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load(path: Path):
    """Tensors and primitives alone: what is more in a file could run code."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file raises nearly anything, and no error names the file
        sys.exit(f"{path} cannot be read as a checkpoint: {error}")


def resume(path: Path, config: dict) -> dict | None:
    """The checkpoint to go on from, if there is one. That of another run is left alone."""
    if not path.exists():
        return None
    saved = load(path)
    there = saved.get("config", {})
    other = [f"{k} {there.get(k)} there, {v} here" for k, v in config.items() if there.get(k) != v]
    if other:
        sys.exit(f"{path} is of another run ({'; '.join(other)}): choose another --output, or delete it")
    return saved


class Log:
    """The first process's: numbers as a line on the terminal, as JSON in log.jsonl, and for TensorBoard. What
    came after the checkpoint that a run goes on from is cut off: it comes again."""

    def __init__(self, folder: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        self.path, self.board = folder / "log.jsonl", SummaryWriter(folder, purge_step=step + 1)
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        (folder / "log.tmp").write_text("".join(f"{line}\n" for line in kept))
        os.replace(folder / "log.tmp", self.path)
        say("  ".join(f"{k} {v}" for k, v in config.items()))
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        machine = f"{WORLD} x {gpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        self(step=step, date=time.strftime("%F %T"), machine=machine, command=shlex.join(sys.argv))

    def __call__(self, **numbers):
        numbers = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in numbers.items()}
        say("  ".join(f"{k} {v}" for k, v in numbers.items() if not isinstance(v, list)))
        with open(self.path, "a") as file:
            file.write(json.dumps(numbers) + "\n")
        for name, value in numbers.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, numbers["step"])


# --- Data: a torch Dataset of (uint8 image (3, h, w), label); workers decode and crop ---------------------


class Shared:
    """A list in one tensor, which workers share: of a Python list of a million entries each gets a copy."""

    def __init__(self, items):
        pickled = [pickle.dumps(item) for item in items]
        self.ends = torch.tensor([0, *map(len, pickled)]).cumsum(0)
        self.bytes = torch.frombuffer(bytearray(b"".join(pickled)), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int):
        return pickle.loads(self.bytes[self.ends[i] : self.ends[i + 1]].numpy())


def decode(path: str) -> Tensor:
    """An image file -> (3, h, w) uint8."""
    try:
        with Image.open(path) as image:
            image = image if image.mode == "RGB" else image.convert("RGB")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    except OSError as error:
        raise RuntimeError(f"{path} is no image that can be read: repair or delete it") from error


class Tree(ImageFolder):
    """All images of a tree, without labels: one class."""

    def find_classes(self, directory):
        return ["."], {".": 0}


def load_folder(root: Path, kind=ImageFolder) -> ImageFolder:
    images = kind(root, loader=decode)
    images.samples, images.imgs, images.targets = Shared(images.samples), None, torch.tensor(images.targets)
    return images


def load_data(dataset: str, root: Path | None, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training and validation images; both have `targets` (n,) and `classes`."""
    if dataset == "shapes":
        if root:
            sys.exit("--dataset shapes draws its own images: for --data give another --recipe or --dataset")
        return draw_shapes(seed, 0, 6000), draw_shapes(seed, 10**6, 1000)
    if root is None or dataset == "folder" and not root.is_dir():
        sys.exit(f"--dataset {dataset} needs --data FOLDER, and {root} is none")
    if (root / "train").is_dir():
        train = load_folder(root / "train")
        val = load_folder(root / "val") if (root / "val").is_dir() else None
        if val and val.classes != train.classes:
            sys.exit(f"{root}/train and {root}/val have different folders of classes")
        return train, val
    if dataset == "folder":
        return load_folder(root, Tree), None

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
    if RANK == 0:
        kind(root, download=True)
    if WORLD > 1:
        dist.barrier()
    sets = [kind(root, train=train) for train in (True, False)]
    return tuple(in_memory(torch.from_numpy(s.data).permute(0, 3, 1, 2), s.targets, s.classes) for s in sets)


def in_memory(pixels: Tensor, targets: list[int], classes: list[str]) -> TensorDataset:  # (n, 3, h, w) uint8
    images = TensorDataset(pixels, torch.tensor(targets))
    images.targets, images.classes = images.tensors[1], classes
    return images


# Inside where positive; about the distance to the edge; all of area 3. [test_shapes_differ_in_outline_alone]
SHAPES = {
    "disc": lambda x, y: 0.978 - x.hypot(y),
    "ring": lambda x, y: 0.276 - (x.hypot(y) - 0.865).abs(),
    "square": lambda x, y: 0.866 - torch.maximum(x.abs(), y.abs()),
    "triangle": lambda x, y: 0.762 - torch.maximum(y, 0.866 * x.abs() - 0.5 * y),
    "cross": lambda x, y: (0.375 - torch.minimum(x.abs(), y.abs())).minimum(1.187 - x.abs().maximum(y.abs())),
    "star": lambda x, y: 0.6 * (0.938 + 0.392 * torch.cos(5 * torch.atan2(x, -y)) - x.hypot(y)),
    "bars": lambda x, y: torch.minimum(1.102 - x.abs(), 0.343 - (y.abs() - 0.673).abs()),
    "half-disc": lambda x, y: torch.minimum(1.384 - x.hypot(y - 0.583), 0.583 - y),
}


def draw_scene(seed: int, index: int, size: int, kinds: list[int], least: float, most: float):
    """A uint8 picture (3, size, size) of shapes, later ones in front, and their seen masks (n, size, size);
    radius: least to most of half the size. The kind is outline. [test_shapes_differ_in_outline_alone]"""
    generator = rng(seed, "scene", index)
    rand = functools.partial(torch.rand, generator=generator)
    colour = lambda dark: dark + 0.25 * rand(1) + 0.4 * (rand(3, 1, 1) - 0.5)  # (3, 1, 1)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")  # (size, size)

    angle, masks = 2 * math.pi * rand(1), []
    image = colour(0.05) + 0.1 * (angle.cos() * x + angle.sin() * y)  # (3, size, size): a gradient
    for kind in kinds:
        radius, turn = least + (most - least) * rand(1), (rand(1) - 0.5) * math.pi / 4
        dx, dy = ((axis - (1 - most) * (2 * rand(1) - 1)) / radius for axis in (x, y))
        u, v = turn.cos() * dx + turn.sin() * dy, turn.cos() * dy - turn.sin() * dx
        level = list(SHAPES.values())[kind](u, v) * radius * size / 2  # (size, size), in pixels
        image = torch.lerp(image, colour(0.7), (0.5 + level).clamp(0, 1))  # antialiased over one pixel
        masks = [mask & (level <= 0) for mask in masks] + [level > 0]
    image = (image if rand(1) < 0.5 else 1 - image) + 0.03 * torch.randn(3, size, size, generator=generator)
    return (255 * image.clamp(0, 1)).round().to(torch.uint8), torch.stack(masks)


def draw_shapes(seed: int, first: int, n: int) -> TensorDataset:
    """Pictures of 32 pixels with one shape, whose kind is the label; each depends on its number and seed."""
    kinds = [i % len(SHAPES) for i in range(first, first + n)]
    pictures = [draw_scene(seed, first + i, 32, [kind], 0.4, 0.6)[0] for i, kind in enumerate(kinds)]
    return in_memory(torch.stack(pictures), kinds, list(SHAPES))


class Views(Dataset):
    """What workers do. Item (epoch, index) -> uint8 crops of one image, and its label."""

    def __init__(self, images: Dataset, crops: list, seed: int = 0):
        self.images, self.crops, self.seed = images, crops, seed

    def __getitem__(self, key: tuple[int, int]):
        torch.default_generator.manual_seed(rng(self.seed, "crop", *key).initial_seed())
        image, label = self.images[key[-1]]
        return [crop(image) for crop in self.crops], label


def batches(rows: Tensor, batch: int, seed: int, first: int, last: int):
    """For steps from `first` to `last` the keys (epoch, index) of this process's share of the global batch.
    An epoch's order depends on the seed alone; what fills no batch waits for the next epoch's order."""
    steps, epoch = len(rows) // batch, None
    for step in range(first, last):
        if step // steps != epoch:
            epoch = step // steps
            order = rows[torch.randperm(len(rows), generator=rng(seed, "order", epoch))].split(batch)
        yield [(epoch, i) for i in order[step % steps].chunk(WORLD)[RANK].tolist()]


def still(images: Dataset, dataset: str, size: int, workers: int) -> DataLoader:
    """This process's share of all images, each once; photographs are cropped at the centre."""
    keys, crop = [(0, i) for i in range(RANK, len(images), WORLD)], v2.Resize(size)
    if dataset == "folder":
        crop = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size)])
    return read(Views(images, [crop]), workers, batch_size=128, sampler=keys)


def leave_with_parent(worker: int):
    """A killed run's fork server waits for its workers, and they for it: so each worker watches the run."""
    wait = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (wait(), os._exit(0)), daemon=True).start()


def read(images: Dataset, workers: int, **sampling) -> DataLoader:
    """Workers live as long as the run. They come from a fork server: a fork of this process, beside threads
    of gloo and autograd, now and then leaves a worker waiting for ever for a lock that a thread held."""
    multiprocessing.set_forkserver_preload(["torchvision.transforms.v2"])  # imported once, not by each
    options = dict(multiprocessing_context="forkserver", persistent_workers=True, prefetch_factor=4)
    options |= dict(num_workers=workers, worker_init_fn=leave_with_parent)
    options = options if workers else {}
    return DataLoader(images, pin_memory=torch.cuda.is_available(), **options, **sampling)


# --- Augmentation: colour, on the training device; of each image what torchvision does, in one order a batch


def gray(x: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, 1, h, w)."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of x (n, 3, h, w) by shift (n, 1, 1, 1) of a full turn, through HSV."""
    value = x.amax(1, keepdim=True)  # (n, 1, h, w), as chroma, r, g, b, hue
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, 1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, hue)
    sector = torch.arange(5, 0, -2, device=x.device)[:, None, None]  # (3, 1, 1)
    k = torch.remainder(hue + 6 * shift + sector, 6)  # (n, 3, h, w)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """x (n, 3, s, s) by sigma (n, 1, 1, 1) pixels, cut off at 6, edges reflected: rows @ x @ columns."""
    size, reach = x.shape[-1], min(6, x.shape[-1] - 1)
    offset = torch.arange(-reach, reach + 1, device=x.device)  # (13,)
    kernel = torch.softmax(-0.5 * (offset / sigma[:, 0, 0]) ** 2, dim=-1)  # (n, 13)
    position = (torch.arange(size, device=x.device)[:, None] + offset).abs()  # (s, 13)
    position = (size - 1) - (size - 1 - position).abs()  # reflected at both ends
    matrix = x.new_zeros(len(x), size, size)
    matrix.scatter_add_(2, position.expand(len(x), -1, -1), kernel[:, None].expand(-1, size, -1))
    return matrix[:, None] @ x @ matrix[:, None].mT


def augment(x: Tensor, args: argparse.Namespace, view: int, draw, order: list[int]) -> Tensor:
    """x (n, 3, s, s) in [0, 1]. draw() gives fresh uniform numbers (n, 1, 1, 1); `order` is the jitter's."""
    on = draw() < args.jitter_prob
    brightness, contrast, saturation, hue = (torch.where(on, (2 * draw() - 1) * s, 0) for s in args.jitter)
    jitter = [
        lambda x: x * (1 + brightness),
        lambda x: torch.lerp(gray(x).mean((2, 3), keepdim=True), x, 1 + contrast),
        lambda x: torch.lerp(gray(x), x, 1 + saturation),
        lambda x: shift_hue(x, hue),
    ]
    for i in order:
        x = jitter[i](x).clamp(0, 1)
    x = torch.where(draw() < args.gray, gray(x), x)
    if p := args.blur[view]:
        x = torch.where(draw() < p, gaussian_blur(x, 0.1 + 1.9 * draw()), x)
    if p := args.solarize[view]:
        x = torch.where((draw() < p) & (x >= args.solarize_threshold / 255), 1 - x, x)
    return torch.where(draw() < 0.5, x.flip(-1), x)


def augmented(views: list[Tensor], args: argparse.Namespace, step: int, device: torch.device) -> list[Tensor]:
    """A batch's uint8 crops -> the network's input. Numbers are drawn for the global batch, then shared."""
    result = []
    for v, x in enumerate(views):
        g = rng(args.seed, "colour", step, v)
        u = torch.rand(10, args.batch_size, 1, 1, 1, generator=g).chunk(WORLD, dim=1)[RANK]
        draw, order = iter(send(u, device)).__next__, torch.randperm(4, generator=g).tolist()
        result.append(normalize(augment(send(x, device) / 255, args, v, draw, order), args.dataset))
    return result


def send(x: Tensor, device: torch.device) -> Tensor:  # without waiting for the device
    return x.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else x


def normalize(x: Tensor, dataset: str) -> Tensor:
    """x (n, 3, s, s) in [0, 1], less the mean, over the standard deviation of a data set."""
    channels = [(x[:, c] - mean) / std for c, (mean, std) in enumerate(zip(*MEAN_STD[dataset]))]
    return torch.stack(channels, dim=1).to(memory_format=torch.channels_last)


# --- Network and schedules --------------------------------------------------------------------------------


def build_backbone(arch: str, stem: str, zero_init_residual: bool = False, **options):
    """A ResNet of torchvision without its classifier, and the width of its features."""
    net = torchvision.models.get_model(arch, zero_init_residual=zero_init_residual, **options)
    width, net.fc = net.fc.in_features, nn.Identity()
    kernel, stride, padding, pool = STEMS[stem]
    if kernel != 7:
        net.conv1 = nn.Conv2d(3, 64, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not pool:
        net.maxpool = nn.Identity()
    return net, width


class Network(nn.Module):
    """Backbone and projector. Takes the list of views, so that DistributedDataParallel sees one forward pass;
    BN still sees one view at a time, but for a joint_head."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.backbone, width = build_backbone(args.arch, args.stem, args.zero_init_residual)
        layers, self.joint = [], args.joint_head
        for _ in range(args.layers - 1):
            layers += [nn.Linear(width, args.hidden, bias=self.joint), nn.BatchNorm1d(args.hidden), nn.ReLU()]
            width = args.hidden
        self.projector = nn.Sequential(*layers, nn.Linear(width, args.out))

    def forward(self, views: list[Tensor]) -> list[Tensor]:  # V times (b, 3, s, s) -> V times (b, out)
        features = [self.backbone(view) for view in views]  # V times (b, width)
        if self.joint:
            return list(self.projector(torch.cat(features)).chunk(len(views)))
        return [self.projector(x) for x in features]


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Of step 0, 1, ...; an epoch has `steps`. Linear warm-up, then a cosine, or drops at milestones."""
    peak = args.base_lr * (args.batch_size / 256 if args.optimizer == "sgd" else 1)
    warmup, total = round(args.warmup_epochs * steps), args.epochs * steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if args.milestones is not None:
        return peak * 0.2 ** sum(step >= m * total for m in args.milestones)
    cosine = (1 + math.cos(math.pi * (step + 1 - warmup) / max(1, total - warmup))) / 2
    return peak * (0.001 + 0.999 * cosine)


# --- Features and nearest neighbours ----------------------------------------------------------------------


def collect(rows: Tensor) -> Tensor:
    """The rows of all processes, which may hold different numbers of them."""
    if WORLD == 1:
        return rows
    parts = [None] * WORLD
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


@torch.no_grad()
def encode(backbone: nn.Module, loader: DataLoader, dataset: str, device: torch.device, dtype: torch.dtype):
    """Features (n, width) in eval mode, of the type in which they are computed, and labels (n,)."""
    backbone.eval()
    for buffer in backbone.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)  # where BN is each process's own, the first one's statistics count
    x, y = [], []
    for (images,), labels in loader:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x.append(backbone(normalize(send(images, device) / 255, dataset)))
        y.append(send(labels, device))
    return torch.cat(x), torch.cat(y)


@torch.no_grad()
def knn_top1(bank: Tensor, labels: Tensor, queries: Tensor, expected: Tensor, k: int, temperature=None):
    """Percent of the queries (q, d) whose k nearest rows of the bank (n, d) vote for the expected label: a
    vote each, or exp(cosine / temperature) for unit rows. Bank and queries are this process's part of all.
    Memory beyond theirs: 2^17 rows in float32 (1 GiB if d = 2048), and distances of half of them to 256."""
    queries, expected, right = collect(queries), collect(expected), 0
    classes = 1 + int(collect(torch.stack([labels.max(), expected.max()])).max())
    for q, y in zip(queries.split(256), expected.split(256)):
        distance, votes = [], []  # of the k nearest in each part of the bank
        for part, own in zip(bank.split(2**16), labels.split(2**16)):
            near, index = torch.cdist(q.float(), part.float()).topk(min(k, len(part)), largest=False)
            distance.append(near.T)
            votes.append(own[index].T)
        distance, votes = collect(torch.cat(distance)), collect(torch.cat(votes))  # (k of every part, b)
        distance, best = distance.topk(min(k, len(distance)), dim=0, largest=False)  # (k, b)
        weight = ((1 - distance**2 / 2) / (temperature or math.inf)).exp()
        score = weight.new_zeros(classes, len(q))
        score.scatter_add_(0, votes.gather(0, best), weight)
        right += (score.argmax(0) == y).sum().item()
    return 100 * right / len(queries)


def main(argv: list[str] | None = None):
    args = parse(argv)
    folder = args.output or Path("runs") / args.recipe
    device, dtype = start(args.device, args.precision)

    # data, and the length of the run
    train, val = load_data(args.dataset, args.data, args.seed)
    steps = len(train) // args.batch_size  # of an epoch
    if not steps:
        sys.exit(f"{len(train)} training images do not fill one batch: lower --batch-size {args.batch_size}")
    total = args.epochs * steps
    last = min(total, args.max_steps or total)

    # weight of the trace loss: as published, unless lost rank would then cost too little
    if args.loss == "intl":
        n, R, beta, _ = LOSSES["intl"](args).setting(args.batch_size, args.out)
        balanced = float(f"{intl.balanced_beta(n, args.iterations, full=R):.3g}")
        if beta < balanced:
            args.beta = balanced if args.beta is None else beta
            say(f"beta {beta:.3g} may collapse; balanced would be {balanced:g}; taken is {args.beta:g}")
    config = {k: v for k, v in vars(args).items() if k not in FREE} | {"images": len(train)}
    saved = resume(folder / "checkpoint.pt", config)
    step = saved["step"] if saved else 0

    # network, teacher, loss, optimiser
    torch.manual_seed(args.seed)
    network = Network(args)
    if WORLD > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(device, memory_format=torch.channels_last)
    backbone, criterion = network.backbone, LOSSES[args.loss](args)
    teacher = copy.deepcopy(network).requires_grad_(False) if args.ema else None
    decayed = [p for p in network.parameters() if args.decay_all or p.ndim > 1]
    spared = [p for p in network.parameters() if not args.decay_all and p.ndim == 1]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    adam, sgd = torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9)
    optimizer = (sgd if args.optimizer == "sgd" else adam)(groups, lr=0.0, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    stateful = {"network": network, "optimizer": optimizer, "scaler": scaler}
    stateful |= {"teacher": teacher} if teacher else {}
    for name in filter(saved.get, stateful) if saved else ():  # a scaler that was off left nothing
        stateful[name].load_state_dict(saved[name])
    if args.compile:
        network.compile(dynamic=False)  # evaluation calls the backbone alone, and stays eager
    model = distribute(network, device)

    # say what the run is
    log = Log(folder, config, step) if RANK == 0 else lambda **numbers: None
    say(f"{args.epochs} epochs of {steps} steps, from {step}, by {WORLD} {device.type}, {dtype}; {folder}")
    say(f"learning rate {learning_rate(round(args.warmup_epochs * steps), steps, args):.3g} at its peak")

    # images to look at without augmentation; if they have labels, the first of them vote on the others
    labelled = val is not None and len(train.classes) > 1
    some = lambda images, n: Subset(images, torch.randperm(len(images), generator=rng("some"))[:n].tolist())
    voters, asked = some(train, args.knn_images) if labelled else [], some(val or train, 10_000)
    held_out = still(ConcatDataset([voters, asked]), args.dataset, args.view_sizes[0], args.workers)
    mine = len(range(RANK, len(voters), WORLD))  # of the voters

    def evaluate(z: Tensor | None = None):
        began, (x, y) = time.time(), encode(backbone, held_out, args.dataset, device, dtype)
        numbers = {"feature_rank": intl.effective_rank(collect(x[mine:].float()).cpu()).item()}
        if labelled:
            numbers["knn_top1"] = knn_top1(x[:mine], y[:mine], x[mine:], y[mine:], k=5)
        if z is not None:
            z = intl.gather(z.float()).cpu()  # (batch, out)
            numbers["embedding_rank"] = intl.effective_rank(z).item()
            numbers["condition_number"] = intl.condition_number(z).item()
            numbers["spectrum"] = [float(f"{value:.3g}") for value in intl.spectrum(z)]
        log(epoch=step / steps, step=step, **numbers, seconds=time.time() - began)
        if numbers.get("embedding_rank", 3) < 3:
            say("ALARM: the embedding has collapsed, onto fewer than 3 directions")
        network.train()

    # train
    if not step:
        evaluate()  # a random network
    bicubic, areas = v2.InterpolationMode.BICUBIC, zip(args.min_scale, args.max_scale)
    crops = [v2.RandomResizedCrop(s, area, interpolation=bicubic) for s, area in zip(args.view_sizes, areas)]
    keys = batches(torch.arange(len(train)), args.batch_size, args.seed, step, last)
    saved_at = logged_at = before = time.time()
    logged, waited = step, 0.0
    for views, _ in read(Views(train, crops, args.seed), args.workers, batch_sampler=keys):
        waited += time.time() - before
        views = augmented(views, args, step, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args)
        if args.loss == "cwrgp":  # draws partitions
            torch.manual_seed(rng(args.seed, "loss", step).initial_seed())

        # forward: with a teacher, view 0 is embedded by it alone
        anchor = ()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if teacher:
                rest = (1 - args.ema) * (1 + math.cos(math.pi * step / total)) / 2  # falls to 0
                with torch.no_grad():
                    for t, s in zip(teacher.parameters(), network.parameters()):
                        t.lerp_(s, rest)
                    anchor = teacher(views[:1])
            z = model(views[1:] if teacher else views)  # V times (b, out)
        loss = criterion(z, *anchor)
        if args.orthogonality:
            loss = loss + args.orthogonality_weight * intl.orthogonality_penalty(backbone, args.orthogonality)

        # backward, update
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        step += 1

        # log, and at most a hundred times a run evaluate: here alone the device is waited for
        measures = step % (steps * math.ceil(args.epochs / 100)) == 0 or step == last
        if measures or step % args.log_every == 0:
            numbers = {k: float(v) for k, v in {"loss": loss.detach(), **criterion.parts}.items()}
            if not math.isfinite(numbers["loss"]):
                sys.exit(f"the loss is not finite at step {step}: {numbers}. Try a lower --base-lr")
            seconds = time.time() - logged_at
            speed = (step - logged) * args.batch_size / seconds
            numbers |= {"lr": group["lr"], "images_per_second": speed, "waiting": waited / seconds}
            numbers["hours_left"] = (total - step) * args.batch_size / speed / 3600
            log(epoch=step / steps, step=step, **numbers)
            if measures:
                evaluate(z[0].detach())

            # save, now that the loss is known to be finite
            if RANK == 0 and (time.time() - saved_at > 60 * args.save_minutes or step == last):
                state = {name: part.state_dict() for name, part in stateful.items()}
                save(state | {"config": config, "step": step}, folder / "checkpoint.pt")
                save(backbone.state_dict(), folder / "backbone.pt")
                saved_at = time.time()
            logged_at, logged, waited = time.time(), step, 0.0
        before = time.time()

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory
    say(f"peak memory {memory / 2**30:.1f} GiB a process; saved {folder / 'backbone.pt'}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
