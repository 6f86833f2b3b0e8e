"""Evaluate a pretrained ResNet: from this project, the official INTL release or another publisher.

    python linear_eval.py                                            # the default run, runs/shapes
    python linear_eval.py --checkpoint runs/cifar10/checkpoint.pt --data data/cifar10
    python linear_eval.py --checkpoint runs/cifar10/checkpoint.pt --data data/cifar10 --random
    python linear_eval.py --protocol finetune --percent 1 --checkpoint r50.pt --data imagenet
    torchrun --nproc_per_node 8 linear_eval.py --protocol linear --checkpoint r50.pt --data imagenet

The protocols of the official release:
    features   CIFAR: a linear classifier on features that are computed once, without augmentation
               (Adam, batch 1000, 500 epochs, learning rate 1e-2 to 1e-6)
    knn        the same features: 5 nearest neighbors by Euclidean distance; also 10 and 20 by
               cosine similarity, weighted with temperature 0.07
    linear     ImageNet: a linear classifier on the frozen backbone, with random crops and flips
               (SGD, batch 256, 100 epochs, learning rate 0.2, divided by 10 at epochs 60 and 80)
    finetune   backbone and classifier, on a subset of the labels (SGD, batch 256, 20 epochs)

features and linear train one classifier for each of several learning rates in the same pass and
report all of them, the published rate first. Results are appended to results.jsonl beside the
checkpoint, or in --output. Rerun the same command to resume an interrupted linear or finetune.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from train import (
    ARCHS,
    MEAN_STD,
    RANK,
    STEMS,
    WORLD,
    HelpFormatter,
    MultiViewDataset,
    add_common_flags,
    all_gather_rows,
    batch_indices,
    bounded,
    build_backbone,
    distributed,
    eval_loader,
    extract_features,
    knn_top1,
    load_data,
    lock_output_dir,
    make_loader,
    non_negative,
    normalize,
    positive_int,
    print_rank0,
    read_checkpoint,
    resume,
    save_checkpoint,
    to_device,
    wrap_ddp,
)

# Epochs and learning rates. The published rate comes first (linear: 0.4 after multi-crop); the
# others are for networks that need a different one.
PROTOCOLS = {
    "features": (500, [0.01, 0.001, 0.1]),
    "knn": (0, []),
    "linear": (100, [0.2, 0.4, 0.02, 0.1, 1.0, 5.0, 30.0]),
    "finetune": (20, [0.2]),
}
# Flags that only concern some protocols; results.jsonl records them for these.
PROTOCOL_FLAGS = {
    "features": [],
    "knn": [],
    "linear": ["batch_size", "weight_decay"],
    "finetune": ["batch_size", "weight_decay", "encoder_lr", "schedule", "percent", "labels_file"],
}
DEFAULT_CHECKPOINT = Path("runs/shapes/checkpoint.pt")
# A file may contain several ResNets. The earliest of these names decides: in a file of train.py the
# student ("network"), as published; in DINO's the teacher; in others the trained network, not its
# moving average ("momentum_backbone", "encoder_k", "target_encoder", ...).
PREFERRED = "network teacher backbone encoder encoder_q base_encoder online_encoder".split()


# --- Reading the checkpoint of any publisher ------------------------------------------------------


def read_backbone(args: argparse.Namespace, **options) -> tuple[nn.Module, int, dict]:
    """The network that the flags name, the width of its features, and the settings that train.py
    saved with it (otherwise arch and stem). `options` go to torchvision's constructor."""
    if args.checkpoint is None and not (args.random and args.arch):
        args.checkpoint = DEFAULT_CHECKPOINT
    saved = {}
    if args.checkpoint is not None:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files contain one
            saved = read_checkpoint(args.checkpoint)

    settings = saved.get("config")
    if not isinstance(settings, dict) or not {"arch", "stem", "seed"} <= settings.keys():
        settings = {}  # not a file of train.py: others use the name "config", too
    arch = args.arch or settings.get("arch") or "resnet50"
    stem = args.stem or settings.get("stem") or "imagenet"

    torch.manual_seed(args.seed)
    backbone, width = build_backbone(arch, stem, **options)
    if not args.random:
        load_weights(backbone, saved, args.checkpoint, f"{arch} with stem {stem}")
    return backbone, width, {**settings, "arch": arch, "stem": stem}


def load_weights(backbone: nn.Module, saved: dict, path: Path, kind: str):
    """Copy the ResNet in a file into the backbone, or exit: a network of which a part is random, or
    only a part of another network, is never evaluated."""
    tensors = flatten(saved)
    prefixes = find_resnets(tensors)
    if not prefixes:
        sys.exit(
            f"{path} contains no ResNet with torchvision's names (conv1.weight, "
            f"layer1.0.conv1.weight, ...). Its tensors: {list(tensors)[:5]}"
        )
    prefix = prefixes[0]
    weights = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }

    not_that_kind = f"{path} is not a {kind}: set --arch and --stem"
    try:
        missing, unused = backbone.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # the shapes differ
        sys.exit(f"{not_that_kind}. {str(error).splitlines()[1].strip()}")
    problems = [f"{prefix}{name} is missing" for name in missing]
    problems += [f"{prefix}{name} is not used" for name in unused if name.startswith("layer")]
    if problems:
        sys.exit(f"{not_that_kind}. {problems[0]}, and {len(problems) - 1} more differences")

    for name, value in backbone.state_dict().items():
        if not value.isfinite().all():
            sys.exit(f"{path}: {prefix}{name} is not finite: the run that saved it has diverged")
    print_rank0(f"{path}: {kind}, {len(weights)} tensors {prefix}*, of which not used: {unused}")
    if len(prefixes) > 1:
        print_rank0(f"{path}: took {prefix}*, not the other networks {prefixes[1:]}")


def flatten(entries: dict, path: str = "") -> dict[str, Tensor]:
    """The tensors of nested dictionaries under dotted names, e.g. "state_dict.module.conv1.weight",
    without the "_orig_mod" that torch.compile inserts."""
    tensors = {}
    for key, value in entries.items():
        if isinstance(value, dict):
            tensors.update(flatten(value, f"{path}{key}."))
        elif isinstance(value, Tensor):
            tensors[f"{path}{key}".replace("_orig_mod.", "")] = value
    return tensors


def find_resnets(tensors: dict[str, Tensor]) -> list[str]:
    """The prefix of each ResNet's names, for example "teacher.backbone." and "student.backbone.".
    The preferred one comes first, equally preferred ones are in the order of the file."""
    prefixes = []
    for name in tensors:
        prefix = name.removesuffix("conv1.weight")
        if prefix != name and f"{prefix}layer1.0.conv1.weight" in tensors:
            prefixes.append(prefix)

    def preference(prefix: str) -> int:
        parts = prefix.split(".")
        for i, part in enumerate(PREFERRED):
            if part in parts:
                return i
        return len(PREFERRED)

    return sorted(prefixes, key=preference)


# --- The labelled images of finetune --------------------------------------------------------------


def select_labelled_subset(
    train_set: Dataset, percent: float, labels_file: str | None, seed: int
) -> Tensor:
    """Indices of the images that the file lists; without a file, of `percent` of the images of each
    class, but at least one of each."""
    if labels_file is not None:
        return read_labels_file(labels_file, train_set)
    generator = torch.Generator().manual_seed(seed)
    selected = []
    for label in range(len(train_set.classes)):
        members = (train_set.targets == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        selected.append(members[: max(1, round(len(members) * percent / 100))])
    return torch.cat(selected).sort().values


def read_labels_file(path: str, train_set: Dataset) -> Tensor:
    """Indices of the listed images. A line is a path relative to train/ (class/name), or a file
    name if it is unique. Blank lines are skipped; an image that is listed twice counts once."""
    if not hasattr(train_set, "samples"):
        sys.exit(f"--labels-file {path}: --data contains no image files in train/<class>/")
    root = f"{train_set.root}/"
    indices_by_name = defaultdict(list)
    for i, (image_path, _) in enumerate(train_set.samples):
        relative_path = image_path.removeprefix(root)
        file_name = relative_path.rpartition("/")[2]
        indices_by_name[relative_path].append(i)
        indices_by_name[file_name].append(i)

    # the error handler with which Python decodes file names: they need not be UTF-8
    text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    selected = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = indices_by_name.get(line, [])
        if not found:
            sys.exit(f"{path}, line {number}: {root} contains no image {line!r}")
        if len(found) > 1:
            paths = [train_set.samples[i][0].removeprefix(root) for i in found]
            sys.exit(
                f"{path}, line {number}: {line!r} is the name of {len(paths)} images. "
                f"Write class/name, for example {paths[0]!r} or {paths[1]!r}"
            )
        selected.append(found[0])
    if not selected:
        sys.exit(f"{path} lists no images")
    return torch.tensor(sorted(set(selected)))


# --- Linear classifiers ---------------------------------------------------------------------------


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (H, b, classes) of H classifiers, labels (b,) -> counts of top-1 and top-5 (H, 2)."""
    logits = logits.nan_to_num(nan=-torch.inf)  # a classifier may have diverged
    top5 = logits.topk(min(5, logits.shape[-1])).indices  # (H, b, 5)
    correct = top5 == labels[:, None]  # (H, b, 5)
    return torch.stack([correct[..., 0].sum(1), correct.any(-1).sum(1)], dim=1)


def train_linear_probe(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, lrs: list[float], epochs: int, seed: int
) -> list[list[float]]:
    """The CIFAR protocol on features x (n, width) and labels y (n,): a classifier for each learning
    rate, and its top-1 and top-5 in percent on x_val (q, width), y_val (q,). Adam, batch 1000,
    weight decay 5e-6; the learning rate falls exponentially to 1e-4 of its initial value."""
    torch.manual_seed(seed)
    initial_head = nn.Linear(x.shape[1], 1 + int(y.max())).to(x.device)
    heads = [copy.deepcopy(initial_head) for _ in lrs]
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, lrs)]
    optimizer = torch.optim.Adam(groups, weight_decay=5e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=1e-4 ** (1 / epochs))

    for _ in range(epochs):
        for batch in torch.randperm(len(x)).to(x.device).split(1000):
            optimizer.zero_grad()
            loss = sum(F.cross_entropy(head(x[batch]), y[batch]) for head in heads)
            loss.backward()
            optimizer.step()
        schedule.step()

    logits = torch.stack([head(x_val) for head in heads]).detach()  # (H, q, classes)
    return (100 * count_correct(logits, y_val) / len(y_val)).tolist()


class Classifier(nn.Module):
    """A backbone, frozen or not, and H linear classifiers on its features, initialized alike."""

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        classes: int,
        heads: int,
        frozen: bool,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.backbone = backbone.requires_grad_(not frozen)
        self.frozen = frozen
        self.dtype = dtype
        initial_head = nn.Linear(width, classes)
        nn.init.normal_(initial_head.weight, std=0.01)
        nn.init.zeros_(initial_head.bias)
        self.heads = nn.ModuleList(copy.deepcopy(initial_head) for _ in range(heads))

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            self.backbone.eval()  # freezes the BN statistics, too
        return self

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, s, s) -> (H, b, classes)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.backbone(x)  # (b, width)
        return torch.stack([head(features.float()) for head in self.heads])


# --- The protocols: each returns {name: [top-1, top-5]}, or {name: [top-1]}, in percent -----------


@dataclass
class Setup:
    """What the protocols have in common."""

    args: argparse.Namespace
    backbone: nn.Module
    width: int
    train_set: Dataset
    val_set: Dataset
    rows: dict[str, Tensor]  # the training images of linear and of finetune, as indices
    output_dir: Path
    device: torch.device
    dtype: torch.dtype


def extract_all_features(setup: Setup, config: dict) -> tuple[Tensor, ...]:
    """This process's share of the features x (n, width), labels y (n,), x_val and y_val."""
    dataset = config["dataset"]

    def extract(images: Dataset) -> tuple[Tensor, Tensor]:
        loader = eval_loader(images, dataset, config["size"], setup.args.workers)
        return extract_features(setup.backbone, loader, dataset, setup.device, setup.dtype)

    x, y = extract(setup.train_set)
    x_val, y_val = extract(setup.val_set)
    return x, y, x_val, y_val


def run_features(config: dict, features: tuple[Tensor, ...]) -> dict[str, list[float]]:
    """Every process trains the same classifiers, on the features of all processes."""
    x, y, x_val, y_val = features  # of this process's images RANK, RANK + WORLD, ...
    indices = torch.arange(len(x)) * WORLD + RANK
    order = all_gather_rows(indices).argsort()  # restores the order of the data set
    x = all_gather_rows(x.float())[order]
    y = all_gather_rows(y)[order]
    x_val = all_gather_rows(x_val.float())
    y_val = all_gather_rows(y_val)

    lrs = config["rates"]
    accuracies = train_linear_probe(x, y, x_val, y_val, lrs, config["epochs"], config["seed"])
    return by_learning_rate(lrs, accuracies)


def run_knn(features: tuple[Tensor, ...]) -> dict[str, list[float]]:
    """The features remain distributed over the processes."""
    x, y, x_val, y_val = features
    unit_x = F.normalize(x.float(), dim=1)
    unit_x_val = F.normalize(x_val.float(), dim=1)
    return {
        "5 nearest, Euclidean": [knn_top1(x, y, x_val, y_val, k=5)],
        "10 nearest, cosine": [knn_top1(unit_x, y, unit_x_val, y_val, k=10, temperature=0.07)],
        "20 nearest, cosine": [knn_top1(unit_x, y, unit_x_val, y_val, k=20, temperature=0.07)],
    }


def run_linear(setup: Setup, config: dict) -> dict[str, list[float]]:
    """Classifiers with several learning rates on the frozen backbone, all in the same pass."""
    model = build_classifier(setup, heads=len(config["rates"]), frozen=True)
    groups = [
        {"params": head.parameters(), "rate": lr} for head, lr in zip(model.heads, config["rates"])
    ]
    return train_classifier(setup, config, model, groups)


def run_finetune(setup: Setup, config: dict) -> dict[str, list[float]]:
    """One classifier, and the backbone with another learning rate. As published, BN uses the
    statistics of each process's share of the batch."""
    model = build_classifier(setup, heads=1, frozen=False)
    groups = [
        {"params": model.heads.parameters(), "rate": config["rates"][0]},
        {"params": model.backbone.parameters(), "rate": config["encoder_lr"]},
    ]
    return train_classifier(setup, config, model, groups)


def by_learning_rate(lrs: list[float], accuracies: list[list[float]]) -> dict[str, list[float]]:
    return {f"learning rate {lr:g}": accuracy for lr, accuracy in zip(lrs, accuracies)}


def build_classifier(setup: Setup, heads: int, frozen: bool) -> Classifier:
    torch.manual_seed(setup.args.seed)
    classes = len(setup.train_set.classes)
    model = Classifier(setup.backbone, setup.width, classes, heads, frozen, setup.dtype)
    return model.to(setup.device)


def lr_factor(protocol: str, schedule: str, step: int, steps_per_epoch: int, epochs: int) -> float:
    """linear: divided by 10 at 60 % and at 80 % of the epochs; finetune: constant, or a cosine."""
    if protocol == "linear":
        epoch = step // steps_per_epoch
        if epoch >= 0.8 * epochs:
            return 0.1**2
        if epoch >= 0.6 * epochs:
            return 0.1
        return 1.0
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * step / (steps_per_epoch * epochs))) / 2


def train_classifier(
    setup: Setup, config: dict, model: Classifier, groups: list[dict]
) -> dict[str, list[float]]:
    """Train by SGD, resuming from <protocol>.pt if it exists, and validate at the end. Each of the
    optimizer's groups has a "rate": its initial learning rate per 256 images of the batch."""
    args = setup.args
    device = setup.device
    protocol = config["protocol"]
    epochs = config["epochs"]
    path = setup.output_dir / f"{protocol}.pt"
    rows = setup.rows[protocol]
    steps_per_epoch = len(rows) // args.batch_size
    for group in groups:
        group["rate"] = group["rate"] * args.batch_size / 256
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)

    # resume
    step = 0
    saved = resume(path, config)
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    # data
    crop = v2.Compose([v2.RandomResizedCrop(config["size"]), v2.RandomHorizontalFlip()])
    crops = MultiViewDataset(setup.train_set, [crop], args.seed)
    batches = batch_indices(rows, args.batch_size, args.seed, step, epochs * steps_per_epoch)
    loader = make_loader(crops, args.workers, batch_sampler=batches)

    # train
    ddp_model = wrap_ddp(model, device)
    model.train()
    saved_at = time.time()
    for (x,), y in loader:
        x = to_device(x, device)  # (b, 3, s, s) uint8
        y = to_device(y, device)  # (b,)
        factor = lr_factor(protocol, args.schedule, step, steps_per_epoch, epochs)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor

        logits = ddp_model(normalize(x / 255, config["dataset"]))  # (H, b, classes)
        losses = torch.stack([F.cross_entropy(head_logits, y) for head_logits in logits])  # (H,)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        step += 1

        # log, save
        if step % args.log_every == 0:
            shown = ", ".join(f"{loss:.3f}" for loss in losses.tolist())
            print_rank0(f"{protocol} epoch {step / steps_per_epoch:.2f}/{epochs}  loss {shown}")
            if not losses.isfinite().any():
                sys.exit(
                    f"{protocol}: the loss is not finite at step {step}. Either the pretrained "
                    "network has diverged, or a lower --lr is needed"
                )
            if RANK == 0 and time.time() - saved_at > 60 * args.save_minutes:
                state = {
                    "config": config,
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                save_checkpoint(state, path)
                saved_at = time.time()

    return by_learning_rate(config["rates"], validate(model, setup, config))


@torch.no_grad()
def validate(model: Classifier, setup: Setup, config: dict) -> list[list[float]]:
    """Top-1 and top-5 of each classifier in percent. Each process evaluates its share of the
    images; every image counts once."""
    if WORLD > 1 and not model.frozen:
        for buffer in model.buffers():  # BN statistics differ between processes: take rank 0's
            dist.broadcast(buffer, 0)
    model.eval()
    device = setup.device
    counts = torch.zeros(len(model.heads), 2, dtype=torch.long, device=device)  # (H, 2)
    loader = eval_loader(setup.val_set, config["dataset"], config["size"], setup.args.workers)
    for (x,), y in loader:
        logits = model(normalize(to_device(x, device) / 255, config["dataset"]))  # (H, b, classes)
        counts += count_correct(logits, to_device(y, device))
    counts = all_gather_rows(counts[None]).sum(0)
    return (100 * counts / len(setup.val_set)).tolist()


# --- The command ----------------------------------------------------------------------------------


def add_backbone_flags(parser: argparse.ArgumentParser):
    """The flags of linear_eval.py and detect_transfer.py that choose the network."""
    add = parser.add_argument
    add("--checkpoint", type=Path, help=f"any ResNet (default: {DEFAULT_CHECKPOINT})")
    add("--arch", choices=ARCHS, metavar="RESNET", help="(default: as pretrained, or resnet50)")
    add("--stem", choices=STEMS, help="first layers (default: as pretrained, or imagenet)")
    add("--random", action="store_true", help="keep the random initial weights, for comparison")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_common_flags(parser, precision="float32")
    add_backbone_flags(parser)
    epochs = ", ".join(f"{name} {epochs}" for name, (epochs, _) in PROTOCOLS.items() if epochs)
    lrs = ", ".join(f"{name} {lrs}" for name, (_, lrs) in PROTOCOLS.items() if lrs)
    # fmt: off
    add = parser.add_argument
    add("--data", type=Path, help="folder with train/ and val/, or torchvision's CIFAR, STL-10")
    add("--dataset", choices=MEAN_STD, help="kind of --data (default: as pretrained, or folder)")
    add("--size", type=positive_int, help="pixels (default: as pretrained, or 224; small stems 32)")
    add("--protocol", nargs="+", choices=PROTOCOLS, default=["features", "knn"], help="see above")
    add("--epochs", type=positive_int, help=f"(default: {epochs})")
    add("--lr", type=non_negative, nargs="+", help="learning rates, one classifier each; for "
        f"linear and finetune per 256 images of the batch (default: {lrs})")
    add("--batch-size", type=positive_int, default=256, help="linear, finetune: GLOBAL batch size")
    add("--weight-decay", type=non_negative, default=0.0, help="linear, finetune")
    add("--encoder-lr", type=non_negative, default=0.006, help="finetune: --lr of the backbone; "
        "published: 0.006, after multi-crop 0.004")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="finetune: "
        "constant as published, or cosine as in most papers")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--percent", type=bounded(0, 100), default=100, help="finetune: part of each class to use")
    add("--labels-file", help="finetune: list of images to train on; a line is "
        "class/name, or a file name if it is unique")
    # fmt: on
    args = parser.parse_args(argv)

    protocols = set(args.protocol)
    if "finetune" in protocols and args.lr and len(args.lr) > 1:
        parser.error("--protocol finetune takes one --lr")
    if "finetune" in protocols and args.precision == "float16":
        parser.error("--protocol finetune does not train in float16: set another --precision")
    if args.percent == 0:
        parser.error("--percent 0 leaves no labels")
    if protocols & {"linear", "finetune"} and args.batch_size % WORLD:
        parser.error(f"--batch-size {args.batch_size} is not a multiple of {WORLD} processes")
    return args


def set_up(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[Setup, dict]:
    """The network, the data, and the settings that every protocol records. Faults in the user's
    files are found here, before the work begins."""
    # network
    backbone, width, trained = read_backbone(args)
    backbone = backbone.to(device, memory_format=torch.channels_last)

    # data
    dataset = args.dataset or trained.get("dataset", "folder")
    train_set, val_set = load_data(dataset, args.data, trained.get("seed", 0), labelled=True)
    if val_set is None or len(train_set.classes) < 2:
        sys.exit(f"--data {args.data} needs train/ and val/, each with a folder for every class")
    if min(len(train_set), len(val_set)) < WORLD:
        sys.exit(
            f"{WORLD} processes are too many for {len(train_set)} training and {len(val_set)} "
            "validation images"
        )
    default_size = 224 if trained["stem"] == "imagenet" else 32
    size = args.size or trained.get("view_sizes", [default_size])[0]

    # the images on which linear and finetune train
    rows = {}
    if "linear" in args.protocol:
        rows["linear"] = torch.arange(len(train_set))
    if "finetune" in args.protocol:
        rows["finetune"] = select_labelled_subset(
            train_set, args.percent, args.labels_file, args.seed
        )
    for protocol, selected in rows.items():
        if len(selected) < args.batch_size:
            sys.exit(
                f"{protocol}: {len(selected)} training images are less than a batch: lower "
                f"--batch-size {args.batch_size}"
            )

    if args.output:
        output_dir = args.output
    elif args.checkpoint:
        output_dir = args.checkpoint.parent
    else:
        output_dir = Path("runs/random")
    total = sum(value.double().abs().sum() for value in backbone.state_dict().values())
    description = {
        "checkpoint": str(args.checkpoint),
        "random": args.random,
        "precision": args.precision,
        "weights": float(f"{total:.6g}"),  # tells apart networks that were saved under one name
        "arch": trained["arch"],
        "stem": trained["stem"],
        "dataset": dataset,
        "size": size,
        "seed": args.seed,
    }
    setup = Setup(args, backbone, width, train_set, val_set, rows, output_dir, device, dtype)
    return setup, description


def evaluate(setup: Setup, description: dict):
    """Run the protocols, print their results and append them to results.jsonl."""
    args = setup.args
    backbone = setup.backbone
    initial_state = [value.clone() for value in backbone.state_dict().values()]
    if "features" in args.protocol or "knn" in args.protocol:
        features = extract_all_features(setup, description)

    for protocol in PROTOCOLS:  # finetune is the last, because it changes the backbone
        if protocol not in args.protocol:
            continue
        start = time.time()
        epochs, lrs = PROTOCOLS[protocol]
        config = {
            "protocol": protocol,
            "epochs": args.epochs or epochs,
            "rates": args.lr or lrs,
            **description,
            **{flag: getattr(args, flag) for flag in PROTOCOL_FLAGS[protocol]},
        }
        if protocol in setup.rows:
            config["labelled"] = len(setup.rows[protocol])

        if protocol == "features":
            results = run_features(config, features)
        elif protocol == "knn":
            results = run_knn(features)
        elif protocol == "linear":
            results = run_linear(setup, config)
        else:
            results = run_finetune(setup, config)
        if protocol != "finetune":
            for before, (name, after) in zip(initial_state, backbone.state_dict().items()):
                if not torch.equal(before, after):
                    raise RuntimeError(f"{protocol} changed {name} of the frozen backbone")

        if RANK == 0:
            for name, values in results.items():
                shown = " ".join(f"top-{k} {value:.2f}" for k, value in zip((1, 5), values))
                print_rank0(f"{protocol:10} {name:22} {shown}")
            line = {
                **config,
                "results": results,
                "images": [len(setup.train_set), len(setup.val_set)],
                "date": time.strftime("%F %T"),
                "seconds": round(time.time() - start, 1),
            }
            with open(setup.output_dir / "results.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if protocol in setup.rows:  # it is finished: nothing is left to resume
                (setup.output_dir / f"{protocol}.pt").unlink(missing_ok=True)


def main(argv: list[str] | None = None):
    args = parse(argv)
    with distributed(args.device, args.precision) as (device, dtype):
        setup, description = set_up(args, device, dtype)
        with lock_output_dir(setup.output_dir, ".linear_eval.lock"):
            evaluate(setup, description)


if __name__ == "__main__":
    main()
