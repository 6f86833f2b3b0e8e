"""Evaluate a pretrained ResNet: from this project, the official INTL release or another publisher.

    python linear_eval.py                                            # the default run, runs/shapes
    python linear_eval.py --random                                   # untrained, for comparison
    python linear_eval.py --checkpoint runs/cifar10/checkpoint.pt --data data/cifar10
    python linear_eval.py --protocol finetune --percent 1 --checkpoint r50.pt --data imagenet
    torchrun --nproc_per_node 8 linear_eval.py --protocol linear --checkpoint r50.pt --data imagenet

The protocols are those of the official release (winci-ai/INTL):
    features   CIFAR: a linear classifier on features that are computed once, without augmentation
               (Adam, batch 1000, 500 epochs, learning rate 1e-2 to 1e-6)
    knn        the same features: 5 nearest neighbors by Euclidean distance; also 10 and 20 by
               cosine similarity, weighted with temperature 0.07. Every process holds all features:
               33 GB for ImageNet and a ResNet-50
    linear     ImageNet: a linear classifier on the frozen backbone, with random crops and flips
               (SGD, batch 256, 100 epochs, learning rate 0.2, divided by 10 at epochs 60 and 80)
    finetune   backbone and classifier, on --percent of the labels (SGD, batch 256, 20 epochs,
               learning rate 0.006 and 0.2)

features and linear train one classifier for each of several learning rates in the same pass and
report all of them, the published rate first (0.00 if that classifier has diverged). Results are
appended to results.jsonl beside the checkpoint, or in --output. linear and finetune leave linear.pt
and finetune.pt there: the same command resumes from them or, if they are finished, validates again.
Other settings need another --output.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path, PosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

import train

# The settings of each protocol, as published; flags of the same names change them. Of several
# learning rates the published one is the first: the others are for networks that need another one.
# (Published for networks that were trained with multi-crop: linear 0.4, and --encoder-lr 0.004.)
# fmt: off
PROTOCOLS = {
    "features": {"epochs": 500, "lr": [0.01, 0.001, 0.1]},
    "knn": {},
    "linear": {
        "epochs": 100, "lr": [0.2, 0.4, 0.02, 0.1, 1.0, 5.0, 30.0],
        "batch_size": 256, "weight_decay": 0.0,
    },
    "finetune": {
        "epochs": 20, "lr": [0.2], "encoder_lr": 0.006, "schedule": "constant",
        "batch_size": 256, "weight_decay": 0.0, "percent": None, "labels_file": None,
    },
}
# fmt: on


# --- Reading the checkpoint of any publisher ------------------------------------------------------

# If a file holds several ResNets, the one with the earliest of these in its name is evaluated.
PREFERRED = [
    "network",  # train.py: the student, as published, not the teacher
    "teacher",  # DINO, whose published results are the teacher's
    "backbone",  # INTL, solo-learn: not momentum_backbone
    "encoder",  # solo-learn, earlier: not momentum_encoder
    "encoder_q",  # MoCo v1, v2: not encoder_k
    "base_encoder",  # MoCo v3: not momentum_encoder
    "online_encoder",  # BYOL: not target_encoder
]
# Types that published files hold beside their tensors, and that are harmless in a pickle. A numpy
# scalar is pickled under one of two names, depending on numpy's version.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS = [
    argparse.Namespace,
    PosixPath,
    np.dtype,
    *[type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")],
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]


def add_backbone_flags(parser: argparse.ArgumentParser):
    """The flags of linear_eval.py and detect_transfer.py that choose the network."""
    # fmt: off
    add = parser.add_argument
    add("--checkpoint", type=Path, default="runs/shapes/checkpoint.pt", help="any ResNet")
    add("--arch", choices=train.ARCHS, metavar="RESNET", help="None: as pretrained, or resnet50")
    add("--stem", choices=train.STEMS, help="first layers; None: as pretrained, or imagenet")
    add("--random", action="store_true", help="keep the random initial weights, for comparison; "
        "--checkpoint then only tells --arch, --stem, --dataset and --size, and is not read if "
        "--arch is given")
    # fmt: on


def read_backbone(args: argparse.Namespace, **options) -> tuple[nn.Module, int, dict]:
    """The network that the flags name, the width of its features, and the settings of its
    pretraining: train.py's config, with the epoch of a checkpoint; for other files arch and stem.
    `options` go to torchvision's constructor. Exits if the file is not wholly that network."""
    path = args.checkpoint
    saved = {}
    settings = {}
    if not (args.random and args.arch):
        saved = train.read_checkpoint(path, safe=HARMLESS)
        settings = read_settings(path, saved)
    arch = args.arch or settings.get("arch", "resnet50")
    stem = args.stem or settings.get("stem", "imagenet")
    # Several stems have the same shapes: loading the weights would not tell them apart.
    for name, value in (("arch", arch), ("stem", stem)):
        if settings.get(name, value) != value:
            sys.exit(f"--{name} {value}: {path} was trained with --{name} {settings[name]}")

    torch.manual_seed(args.seed)
    backbone, width = train.build_backbone(arch, stem, **options)
    epoch = None
    if args.random:
        train.print_rank0(f"{arch} with stem {stem} and RANDOM weights")
    else:
        load_weights(backbone, saved, path, f"{arch} with stem {stem}")
    if not args.random and "step" in saved and "steps_per_epoch" in settings:
        epoch = round(saved["step"] / settings["steps_per_epoch"], 3)
        if epoch < settings["epochs"]:
            train.print_rank0(f"{path}: trained {epoch:g} of {settings['epochs']} epochs")
    return backbone, width, {**settings, "arch": arch, "stem": stem, "epoch": epoch}


def read_settings(path: Path, saved: dict) -> dict:
    """The config that train.py saved in a checkpoint, or as config.json beside a backbone.pt; or
    that this file saved. {} for a file of others, who use the name "config", too."""
    config = saved.get("config")
    beside = path.with_name("config.json")
    if path.name == "backbone.pt" and beside.exists():
        config = json.loads(beside.read_text())
    if isinstance(config, dict) and {"arch", "stem", "seed"} <= config.keys():
        return config
    return {}


def load_weights(backbone: nn.Module, saved: dict, path: Path, kind: str):
    """Copies the ResNet in a file into the backbone. Exits if a layer is missing, left over or of
    another shape, or if a weight is not finite."""
    tensors = flatten(saved)
    prefixes = find_resnets(tensors)
    if not prefixes:
        sys.exit(
            f"{path} contains no ResNet with torchvision's names (conv1.weight, "
            f"layer1.0.conv1.weight, ...). Its tensors: {list(tensors)[:5]}"
        )
    prefix = prefixes[0]
    layers = {name.split(".")[0] for name in backbone.state_dict()}  # conv1, bn1, layer1, ...
    weights = {}
    others = []
    for full_name, value in tensors.items():
        name = full_name.removeprefix(prefix)
        if full_name.startswith(prefix) and name.split(".")[0] in layers:
            weights[name] = value
        else:
            others.append(full_name)

    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:  # names what is missing, left over, or of another shape
        reason = "; ".join(line.strip()[:120] for line in str(error).splitlines()[1:4])
        sys.exit(f"{path} is not a {kind}: set --arch and --stem. {prefix}*: {reason}")
    for name, value in backbone.state_dict().items():
        if not value.isfinite().all():
            sys.exit(f"{path}: {prefix}{name} is not finite: the run that saved it has diverged")

    train.print_rank0(f"{path}: {kind}, {len(weights)} tensors {prefix}*")
    if len(prefixes) > 1:
        train.print_rank0(f"{path}: took {prefix}*, not the other networks {prefixes[1:]}")
    elif others:
        train.print_rank0(f"{path}: {len(others)} other tensors are not used: {others[:3]} ...")


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
    """What precedes torchvision's names in those of each ResNet, such as "teacher.backbone.": the
    preferred network first, equally preferred ones in the order of the file."""
    prefixes = []
    for name in tensors:
        prefix = name.removesuffix("conv1.weight")
        if prefix != name and f"{prefix}layer1.0.conv1.weight" in tensors:
            prefixes.append(prefix)

    def preference(prefix: str) -> int:
        ranks = [PREFERRED.index(part) for part in prefix.split(".") if part in PREFERRED]
        return min(ranks, default=len(PREFERRED))

    return sorted(prefixes, key=preference)


# --- The labeled images of finetune ---------------------------------------------------------------


def select_labeled(train_set: Dataset, config: dict) -> Tensor:
    """Indices of the images whose labels a protocol uses. linear: all. finetune: those in its
    labels_file, or its `percent` of each class, but at least one."""
    if config.get("labels_file"):
        return read_labels_file(Path(config["labels_file"]), train_set)
    if config.get("percent") is None:
        return torch.arange(len(train_set))
    generator = torch.Generator().manual_seed(config["seed"])
    selected = []
    for label in range(len(train_set.classes)):
        members = (train_set.targets == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        selected.append(members[: max(1, round(len(members) * config["percent"] / 100))])
    return torch.cat(selected).sort().values


def read_labels_file(path: Path, train_set: Dataset) -> Tensor:
    """Indices of the listed images. A line is a path relative to train/, class/name, or a file name
    if it is unique. Blank lines are skipped; an image that is listed twice counts once."""
    if not hasattr(train_set, "samples"):
        sys.exit(f"--labels-file {path}: --data contains no image files in train/<class>/")
    paths = [sample[0].removeprefix(f"{train_set.root}/") for sample in train_set.samples]
    indices_by_name = defaultdict(list)
    for i, name in enumerate(paths):
        indices_by_name[name].append(i)
        indices_by_name[name.rpartition("/")[2]].append(i)

    selected = set()
    for number, line in enumerate(path.read_text().split("\n"), start=1):
        if not line.strip():
            continue
        found = indices_by_name.get(line, [])
        if not found:
            sys.exit(f"{path}, line {number}: {train_set.root} contains no image {line!r}")
        if len(found) > 1:
            sys.exit(
                f"{path}, line {number}: {line!r} is the name of {len(found)} images. Write "
                f"class/name, for example {paths[found[0]]!r}"
            )
        selected.add(found[0])
    if not selected:
        sys.exit(f"{path} lists no images")
    return torch.tensor(sorted(selected))


# --- features and knn -----------------------------------------------------------------------------


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (H, b, classes) of H classifiers, labels (b,) -> counts of top-1 and top-5 (H, 2). A
    classifier that has diverged, so that its logits are NaN, is never correct."""
    top5 = logits.topk(min(5, logits.shape[-1])).indices  # (H, b, 5)
    correct = (top5 == labels[:, None]) & ~logits.isnan().any(-1, keepdim=True)  # (H, b, 5)
    return torch.stack([correct[..., 0].sum(1), correct.any(-1).sum(1)], dim=1)


def by_learning_rate(counts: Tensor, images: int, config: dict) -> dict[str, list[float]]:
    """Counts (H, 2) of correctly classified images -> {name: [top-1, top-5]} in percent."""
    percentages = (100 * counts.double() / images).tolist()
    return {f"learning rate {lr:g}": values for lr, values in zip(config["lr"], percentages)}


def train_on_features(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, classes: int, config: dict
) -> dict[str, list[float]]:
    """The CIFAR protocol on features x (n, width), x_val (q, width) and labels y (n,), y_val (q,):
    a classifier for each learning rate, by Adam with batch 1000 and weight decay 5e-6. The learning
    rate falls exponentially to 1e-4 of its initial value."""
    torch.manual_seed(config["seed"])
    initial_head = nn.Linear(x.shape[1], classes).to(x.device)
    heads = [copy.deepcopy(initial_head) for _ in config["lr"]]
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, config["lr"])]
    optimizer = torch.optim.Adam(groups, weight_decay=5e-6)
    gamma = 1e-4 ** (1 / config["epochs"])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in small operations on a CPU threads mostly wait for each other
    for _ in range(config["epochs"]):
        for batch in torch.randperm(len(x)).to(x.device).split(1000):
            optimizer.zero_grad()
            x_batch = x[batch]  # (1000, width)
            y_batch = y[batch]  # (1000,)
            loss = sum(F.cross_entropy(head(x_batch), y_batch) for head in heads)
            loss.backward()
            optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)

    logits = torch.stack([head(x_val) for head in heads]).detach()  # (H, q, classes)
    return by_learning_rate(count_correct(logits, y_val), len(y_val), config)


def nearest_neighbors(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> dict[str, list[float]]:
    """k-NN on features x (n, width), x_val (q, width) with labels y (n,), y_val (q,)."""
    unit_x = F.normalize(x, dim=1)
    unit_x_val = F.normalize(x_val, dim=1)
    results = {"5 nearest, Euclidean": [train.knn_top1(x, y, x_val, y_val, k=5)]}
    for k in (10, 20):
        top1 = train.knn_top1(unit_x, y, unit_x_val, y_val, k=k, temperature=0.07)
        results[f"{k} nearest, cosine"] = [top1]
    return results


# --- linear and finetune --------------------------------------------------------------------------


class Classifiers(nn.Module):
    """A backbone and linear classifiers on its features, initialized alike."""

    def __init__(self, backbone: nn.Module, width: int, classes: int, heads: int, precision: str):
        super().__init__()
        self.backbone = backbone
        self.precision = precision
        initial_head = nn.Linear(width, classes)
        nn.init.normal_(initial_head.weight, std=0.01)
        nn.init.zeros_(initial_head.bias)
        self.heads = nn.ModuleList(copy.deepcopy(initial_head) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, s, s) -> (H, b, classes)
        with train.autocast(x.device, self.precision):
            features = self.backbone(x)  # (b, width)
        return torch.stack([head(features.float()) for head in self.heads])


def lr_factor(config: dict, step: int, steps_per_epoch: int) -> float:
    """linear: divided by 10 at 60 % and at 80 % of the epochs; finetune: constant, or a cosine."""
    if config["protocol"] == "linear":
        epoch = step // steps_per_epoch
        passed = [milestone for milestone in (0.6, 0.8) if epoch >= milestone * config["epochs"]]
        return 0.1 ** len(passed)
    if config["schedule"] == "constant":
        return 1.0
    return (1 + math.cos(math.pi * step / (steps_per_epoch * config["epochs"]))) / 2


def exit_if_diverged(model: Classifiers, step: int):
    """The run ends if the backbone or all classifiers have diverged. One alone does not end it."""
    heads = [head.state_dict() for head in model.heads]
    finite_heads = [h for h in heads if all(value.isfinite().all() for value in h.values())]
    # If no classifier is finite, all of them are looked at, which ends the run.
    state = {"backbone": model.backbone.state_dict(), "heads": finite_heads or heads}
    train.exit_unless_finite(state, step)


def train_classifiers(
    args: argparse.Namespace,
    config: dict,
    model: Classifiers,
    train_set: Dataset,
    rows: Tensor,
    saved: dict | None,
    path: Path,
    device: torch.device,
):
    """Trains on the images `rows` by SGD, from the checkpoint `saved` if there is one, and saves to
    `path`. linear: only the classifiers, each with its learning rate. finetune: one classifier, and
    the backbone with a rate of its own; as published, batch norm uses the statistics of each
    process's share of the batch."""
    protocol = config["protocol"]
    batch_size = config["batch_size"]
    steps_per_epoch = len(rows) // batch_size
    total_steps = config["epochs"] * steps_per_epoch

    # Optimizer.
    model.backbone.requires_grad_(protocol == "finetune")
    lrs = config["lr"]
    groups = [{"params": head.parameters()} for head in model.heads]
    if protocol == "finetune":
        lrs = [*config["lr"], config["encoder_lr"]]
        groups.append({"params": model.backbone.parameters()})
    initial_lrs = [lr * batch_size / 256 for lr in lrs]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=config["weight_decay"])

    # Resume.
    step = 0
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    # Data.
    crop = v2.Compose([v2.RandomResizedCrop(config["size"]), v2.RandomHorizontalFlip()])
    crops = train.MultiViewDataset(train_set, [crop], config["seed"])
    batches = train.batch_indices(rows, batch_size, config["seed"], step, total_steps)
    loader = train.make_loader(crops, args.workers, batch_sampler=batches)

    # Train. In eval mode the batch norm statistics of a frozen backbone do not change.
    model.train(protocol == "finetune")
    ddp_model = train.wrap_ddp(model, device)
    saved_at = time.monotonic()
    throughput = train.Throughput(batch_size)
    for (x,), y in throughput.watch(loader):
        x = train.to_device(x, device)  # (b, 3, s, s) uint8
        y = train.to_device(y, device)  # (b,)
        factor = lr_factor(config, step, steps_per_epoch)
        for group, initial_lr in zip(optimizer.param_groups, initial_lrs):
            group["lr"] = initial_lr * factor

        logits = ddp_model(train.normalize(x / 255, config["dataset"]))  # (H, b, classes)
        losses = torch.stack([F.cross_entropy(head_logits, y) for head_logits in logits])  # (H,)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        step += 1

        # Log, save.
        if step % args.log_every == 0:
            shown = ", ".join(f"{loss:.3f}" for loss in losses.tolist())
            epoch = step / steps_per_epoch
            speed = throughput.read(total_steps - step)
            train.print_rank0(
                f"{protocol} epoch {epoch:.2f} of {config['epochs']}  loss on rank 0 {shown}  "
                f"images/s {speed['images_per_second']:.0f}  waiting {speed['waiting']:.2f}  "
                f"hours left {speed['hours_left']:.2f}"
            )
        is_due = time.monotonic() - saved_at > 60 * args.save_minutes
        if train.RANK == 0 and (is_due or step == total_steps):
            exit_if_diverged(model, step)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "config": config,
                "step": step,
            }
            train.save({path: state})
            saved_at = time.monotonic()


@torch.no_grad()
def validate(
    model: Classifiers, val_set: Dataset, config: dict, workers: int, device: torch.device
) -> dict[str, list[float]]:
    """Each process evaluates its share of the images; every image counts once."""
    train.broadcast_buffers(model)
    model.eval()
    counts = torch.zeros(len(model.heads), 2, dtype=torch.long, device=device)  # (H, 2)
    loader = train.eval_loader(val_set, config["dataset"], config["size"], workers)
    for (x,), y in loader:
        x = train.normalize(train.to_device(x, device) / 255, config["dataset"])
        counts += count_correct(model(x), train.to_device(y, device))
    counts = sum(train.gather_objects(counts.cpu()))
    return by_learning_rate(counts, len(val_set), config)


# --- The command ----------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=train.HelpFormatter)
    train.add_common_flags(parser)
    add_backbone_flags(parser)
    # fmt: off
    add = parser.add_argument
    add("--data", type=Path, help="folder with train/ and val/, or torchvision's CIFAR, STL-10")
    add("--dataset", choices=train.MEAN_STD, help="what --data holds; None: as pretrained, or "
        "folder")
    add("--size", type=train.positive, help="pixels; None: as pretrained, or 224, with other "
        "stems than imagenet 32")
    add("--precision", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the backbone; on GPUs torch's default for float32 convolutions is TF32")
    add("--protocol", nargs="+", choices=PROTOCOLS, default=["features", "knn"], help="see above")
    group = parser.add_argument_group("settings of the protocols", "None: as published, above")
    add = group.add_argument
    add("--epochs", type=train.positive, help="features, linear, finetune")
    add("--lr", type=float, nargs="+", help="features, linear, finetune: learning rates, a "
        "classifier for each; for linear and finetune per 256 images of the batch")
    add("--batch-size", type=train.positive, help="linear, finetune: GLOBAL batch size")
    add("--weight-decay", type=float, help="linear, finetune")
    add("--encoder-lr", type=float, help="finetune: learning rate of the backbone, per 256 images")
    add("--schedule", choices=["constant", "cosine"], help="finetune: constant as published, or a "
        "cosine as in most papers")
    add = group.add_mutually_exclusive_group().add_argument
    add("--percent", type=float, help="finetune: part of each class's labels to use")
    add("--labels-file", help="finetune: names of the images to train on, one a line: class/name, "
        "or a file name if it is unique")
    # fmt: on
    args = parser.parse_args(argv)

    # A setting that none of the protocols has would be ignored.
    used = {name for protocol in args.protocol for name in PROTOCOLS[protocol]}
    for settings in PROTOCOLS.values():
        for name in settings:
            if name not in used and getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} has no effect on --protocol {' '.join(args.protocol)}")
    if "finetune" in args.protocol and args.percent is None and args.labels_file is None:
        parser.error("--protocol finetune needs --percent or --labels-file")
    if args.percent is not None and not 0 < args.percent <= 100:
        parser.error("--percent must be more than 0 and at most 100")
    if "finetune" in args.protocol and args.lr is not None and len(args.lr) > 1:
        parser.error("--protocol finetune takes one --lr")
    if "finetune" in args.protocol and args.precision == "float16":
        parser.error("--protocol finetune does not train in float16: set another --precision")
    return args


def record(folder: Path, origin: dict, config: dict, results: dict[str, list[float]]):
    """Prints the results of a protocol, and appends them with its config to results.jsonl."""
    if train.RANK != 0:
        return
    for name, values in results.items():
        shown = " ".join(f"top-{k} {value:.2f}" for k, value in zip((1, 5), values))
        print(f"{config['protocol']:10} {name:22} {shown}", flush=True)
    line = {**origin, **config, "results": results, "date": time.strftime("%F %T")}
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def evaluate(args: argparse.Namespace, device: torch.device):
    """Runs the protocols one after the other. Faults of the user are found before the work."""
    # Network and data.
    backbone, width, settings = read_backbone(args)
    dataset = args.dataset or settings.get("dataset", "folder")
    seed = settings.get("seed", 0)  # of the drawn shapes
    train_set, val_set = train.load_data(dataset, args.data, seed, labeled=True)
    if val_set is None:
        sys.exit(f"--data {args.data} needs train/ and val/, each with a folder for every class")
    classes = len(train_set.classes)
    default_size = 224 if settings["stem"] == "imagenet" else 32
    size = args.size or settings.get("size") or settings.get("view_sizes", [default_size])[0]

    # The configurations: everything on which the results depend. finetune is the last protocol, as
    # it changes the backbone.
    origin = {"checkpoint": str(args.checkpoint), "checkpoint_epoch": settings["epoch"]}
    weights = train.digest(*backbone.state_dict().values())
    configs = {}
    rows = {}
    for protocol in PROTOCOLS:
        if protocol not in args.protocol:
            continue
        config = {
            "protocol": protocol,
            "random": args.random,
            "weights": weights,
            "arch": settings["arch"],
            "stem": settings["stem"],
            "dataset": dataset,
            "data_digest": train.digest(train_set.digest, val_set.digest),
            "images": [len(train_set), len(val_set)],
            "size": size,
            "precision": args.precision,
            "seed": args.seed,
        }
        for name, published in PROTOCOLS[protocol].items():
            given = getattr(args, name)
            config[name] = published if given is None else given
        if protocol in ("linear", "finetune"):
            rows[protocol] = select_labeled(train_set, config)
            config["labeled"] = len(rows[protocol])
            config["labels_digest"] = train.digest(rows[protocol])
            if config["labeled"] < config["batch_size"] or config["batch_size"] % train.WORLD:
                sys.exit(
                    f"{protocol}: --batch-size {config['batch_size']} must be at most the number "
                    f"of labeled images, {config['labeled']}, and a multiple of the number of "
                    f"processes, {train.WORLD}"
                )
        if protocol == "finetune":
            config["processes"] = train.WORLD  # each has its own batch norm
        configs[protocol] = config

    # Output, and what the same command has left there, if it was interrupted.
    folder = args.output or args.checkpoint.parent
    train.lock_folder(folder, ".linear_eval.lock")
    saved = {name: train.resume(folder / f"{name}.pt", configs[name]) for name in rows}

    torch.backends.cudnn.benchmark = True  # nearly all batches have the same shape
    backbone = backbone.to(device, memory_format=torch.channels_last)

    def extract(images: Dataset) -> tuple[Tensor, Tensor]:
        loader = train.eval_loader(images, dataset, size, args.workers)
        return train.extract_features(backbone, loader, dataset, device, args.precision)

    if "features" in configs or "knn" in configs:
        x, y = extract(train_set)
        x_val, y_val = extract(val_set)

    for protocol, config in configs.items():
        if protocol == "features":
            results = train_on_features(x, y, x_val, y_val, classes, config)
        elif protocol == "knn":
            results = nearest_neighbors(x, y, x_val, y_val)
        else:
            path = folder / f"{protocol}.pt"
            heads = len(config["lr"])
            torch.manual_seed(args.seed)
            model = Classifiers(backbone, width, classes, heads, args.precision).to(device)
            train_classifiers(
                args, config, model, train_set, rows[protocol], saved[protocol], path, device
            )
            results = validate(model, val_set, config, args.workers, device)
        record(folder, origin, config, results)


def main(argv: list[str] | None = None):
    train.launch(evaluate, parse(argv))


if __name__ == "__main__":
    main()
