"""Evaluate a pretrained ResNet: this project's, the official INTL release's, or another publisher's.

    python linear_eval.py                                                  # the default run, runs/shapes
    python linear_eval.py --checkpoint runs/cifar10/checkpoint.pt --data data/cifar10
    python linear_eval.py --random --arch resnet18 --stem cifar --dataset cifar10 --data data/cifar10
    python linear_eval.py --protocol finetune --percent 1 --checkpoint resnet50.pth --data /data/imagenet
    torchrun --nproc_per_node 8 linear_eval.py --protocol linear --checkpoint r50.pth --data /data/imagenet

The official release's protocols, whose results are appended to results.jsonl beside the checkpoint:
    features   CIFAR: a linear classifier on the features of the plain images, all at once (Adam, batch 1000)
    knn        on the same features: 5 nearest, Euclidean; 10 and 20 by cosine, weighted, temperature 0.07
    linear     ImageNet: a linear classifier on the frozen backbone, random crops and flips (SGD, batch 256)
    finetune   backbone and classifier, on a part of the labels: --percent, or those that a file names
The same command goes on with linear and finetune where they were stopped.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from train import (
    MEAN_STD,
    RANK,
    STEMS,
    WORLD,
    Views,
    batches,
    build_backbone,
    collect,
    common_flags,
    distribute,
    encode,
    knn_top1,
    load,
    load_data,
    normalize,
    read,
    resume,
    save,
    start,
    still,
)

# Published epochs, and rates: the published one (linear: 0.4 after multi-crop) and more, to spare a search.
PROTOCOLS = {
    "features": (500, [0.01, 0.001, 0.1]),
    "knn": (0, []),
    "linear": (100, [0.2, 0.4, 0.02, 0.1, 1.0, 5.0, 30.0]),
    "finetune": (20, [0.2]),
}
# Where publishers keep a ResNet with torchvision's names, if the file is not the state dict itself. Prefixes:
# train.py's and DINO's, official INTL's, MoCo v1 and v2's, MoCo v3's, SwAV's, none (backbone.pt, VICReg).
ENTRIES = ("network", "state_dict", "teacher", "model")
PREFIXES = ("backbone.", "module.backbone.", "module.encoder_q.", "module.base_encoder.", "module.", "")


def read_backbone(args: argparse.Namespace, **options) -> tuple[nn.Module, int, dict]:
    """The network that the flags name, the width of its features, and train.py's configuration, if known."""
    if not args.checkpoint and not (args.random and args.arch):
        args.checkpoint = Path("runs/shapes/checkpoint.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files hold their flags
        saved = load(args.checkpoint) if args.checkpoint else {}
    config = saved["config"] if isinstance(saved.get("config"), dict) else {}
    arch, stem = args.arch or config.get("arch", "resnet50"), args.stem or config.get("stem", "imagenet")
    config |= {"arch": arch, "stem": stem}
    torch.manual_seed(args.seed)
    backbone, width = build_backbone(arch, stem, **options)
    if args.random:
        return backbone, width, config

    state = next((saved[entry] for entry in ENTRIES if isinstance(saved.get(entry), dict)), saved)
    prefix = next((p for p in PREFIXES if f"{p}conv1.weight" in state), " ")
    weights = {k.removeprefix(prefix): v for k, v in state.items() if str(k).startswith(prefix)}
    try:
        missing, dropped = backbone.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # other shapes
        sys.exit(f"{args.checkpoint} is no {arch} with stem {stem}: give its --arch and --stem. {error}")
    wrong = [f"lacks {k}" for k in missing] + [f"has {k}" for k in dropped if k.startswith("layer")]
    if wrong:  # never evaluate random weights, or a part of a network
        sys.exit(f"{args.checkpoint} is no torchvision {arch}: it {wrong[0]}, and {len(wrong) - 1} more")
    if RANK == 0:
        print(f"{args.checkpoint}: {arch}, stem {stem}; {len(weights)} tensors {prefix}*, dropped {dropped}")
    return backbone, width, config


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (H, b, classes) -> how often each classifier has the label first, and among five (H, 2)."""
    logits = logits.nan_to_num(nan=-torch.inf)  # of a classifier that has diverged
    right = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]  # (H, b, 5)
    return torch.stack([right[..., 0].sum(1), right.any(-1).sum(1)], dim=1)


def linear_on_features(x, y, x_val, y_val, rates: list[float], epochs: int, seed: int) -> list[list[float]]:
    """The CIFAR protocol: for each rate a classifier of x (n, width), and its top-1 and top-5 in % on x_val.
    Adam, batch 1000, weight decay 5e-6, the rate falls exponentially to 1e-4 of itself."""
    torch.manual_seed(seed)
    first = nn.Linear(x.shape[1], 1 + int(y.max())).to(x.device)
    heads = [copy.deepcopy(first) for _ in rates]
    groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, rates)]
    optimizer = torch.optim.Adam(groups, weight_decay=5e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=1e-4 ** (1 / epochs))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).to(x.device).split(1000):
            optimizer.zero_grad()
            sum(F.cross_entropy(head(x[rows]), y[rows]) for head in heads).backward()
            optimizer.step()
        schedule.step()
    logits = torch.stack([head(x_val) for head in heads]).detach()  # (H, q, classes)
    return (100 * count_correct(logits, y_val) / len(y_val)).tolist()


class Classifier(nn.Module):
    """A backbone, frozen or not, and linear classifiers on it, which all begin with the same weights."""

    def __init__(self, backbone, width: int, classes: int, heads: int, frozen: bool, dtype: torch.dtype):
        super().__init__()
        self.backbone, self.frozen, self.dtype = backbone.requires_grad_(not frozen), frozen, dtype
        first = nn.Linear(width, classes)
        nn.init.normal_(first.weight, std=0.01)
        nn.init.zeros_(first.bias)
        self.heads = nn.ModuleList(copy.deepcopy(first) for _ in range(heads))

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)  # frozen: BN's statistics too
        return self

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, s, s) -> (H, b, classes)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.backbone(x)
        return torch.stack([head(features.float()) for head in self.heads])


@torch.no_grad()
def validate(model: Classifier, val, config: dict, workers: int, device: torch.device) -> list[list[float]]:
    """Top-1 and top-5 in percent of each classifier, of all images, each once: a process counts its share."""
    if WORLD > 1 and not model.frozen:
        for buffer in model.buffers():  # BN's statistics are each process's own: evaluate the first one's
            dist.broadcast(buffer, 0)
    model.eval()
    counts = torch.zeros(len(model.heads), 2, dtype=torch.long, device=device)
    for (x,), y in still(val, config["dataset"], config["size"], workers):
        counts += count_correct(model(normalize(x.to(device) / 255, config["dataset"])), y.to(device))
    return (100 * collect(counts[None]).sum(0) / len(val)).tolist()


def labelled_rows(train, percent: float, names: str | None, seed: int) -> Tensor:
    """The images that a file names, or `percent` of every class, at least one."""
    if names:
        row = {Path(path).name: i for i, (path, _) in enumerate(getattr(train, "samples", []))}
        wanted = Path(names).read_text().split()
        unknown = [name for name in wanted if name not in row]
        if unknown:
            sys.exit(f"{names}: {len(unknown)} of {len(wanted)} names are of no image, {unknown[:1]}")
        return torch.tensor(sorted(row[name] for name in wanted))
    rows, generator = [], torch.Generator().manual_seed(seed)
    for c in range(len(train.classes)):
        members = (train.targets == c).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        rows.append(members[: max(1, round(len(members) * percent / 100))])
    return torch.cat(rows).sort().values


def rate_factor(protocol: str, schedule: str, step: int, steps: int, epochs: int) -> float:
    """linear: divided by 10 at 60 % and 80 % of the epochs; finetune: constant, or a cosine."""
    if protocol == "linear":
        return 0.1 ** sum(step // steps >= part * epochs for part in (0.6, 0.8))
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * step / (steps * epochs))) / 2


def train_classifier(args, config: dict, path: Path, backbone, width: int, train, val, device, dtype):
    """`linear` and `finetune`: what validate gives after the last epoch, and the number of labels."""
    protocol, epochs, rates = config["protocol"], config["epochs"], config["rates"]
    frozen, rows = protocol == "linear", torch.arange(len(train))
    if not frozen:
        rows = labelled_rows(train, args.percent, args.labels_file, args.seed)
    steps = len(rows) // args.batch_size  # of an epoch
    if not steps or args.batch_size % WORLD:
        sys.exit(f"--batch-size {args.batch_size} is more than {len(rows)} images, or no multiple of {WORLD}")

    # classifiers and optimiser, perhaps of a run that was stopped
    torch.manual_seed(args.seed)
    model = Classifier(backbone, width, len(train.classes), len(rates), frozen, dtype).to(device)
    parts = list(zip(model.heads, rates)) + [(backbone, args.encoder_lr)] * (not frozen)
    groups = [{"params": part.parameters(), "rate": rate * args.batch_size / 256} for part, rate in parts]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    config = config | {"labelled": len(rows)}
    saved, step = resume(path, config), 0
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    wrapped = distribute(model, device)

    # train
    crop = v2.Compose([v2.RandomResizedCrop(config["size"]), v2.RandomHorizontalFlip()])
    keys = batches(rows, args.batch_size, args.seed, step, epochs * steps)
    saved_at = time.time()
    model.train()
    for (x,), y in read(Views(train, [crop], args.seed), args.workers, batch_sampler=keys):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate_factor(protocol, args.schedule, step, steps, epochs)
        logits = wrapped(normalize(x / 255, config["dataset"]))  # (H, b, classes)
        losses = torch.stack([F.cross_entropy(own, y) for own in logits])  # (H,)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        step += 1

        # log, save
        if RANK == 0 and step % args.log_every == 0:
            shown = ", ".join(f"{loss:.3f}" for loss in losses.tolist())
            print(f"{protocol} epoch {step / steps:.2f}/{epochs}  loss {shown}", flush=True)
            if time.time() - saved_at > 60 * args.save_minutes:
                state = {"config": config, "step": step, "model": model.state_dict()}
                save(state | {"optimizer": optimizer.state_dict()}, path)
                saved_at = time.time()
    return validate(model, val, config, args.workers, device), len(rows)


def backbone_flags(parser: argparse.ArgumentParser):
    """Which network: for linear_eval.py and detect_transfer.py."""
    add = parser.add_argument
    add("--checkpoint", type=Path, help="anybody's ResNet (default: runs/shapes/checkpoint.pt)")
    add("--arch", help="its architecture (default: as the file says, or resnet50)")
    add("--stem", choices=STEMS, help="its first layers (default: as the file says, or imagenet)")
    add("--random", action="store_true", help="random weights, for comparison")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    count, amount, _ = common_flags(parser, precision="float32")
    backbone_flags(parser)
    add = parser.add_argument
    add("--data", type=Path, help="folder with train/ and val/, or torchvision's CIFAR")
    add("--dataset", choices=MEAN_STD, help="what it holds (default: as the file says, or folder)")
    add("--size", type=count, help="pixels of an image (default: as the file says; 224, small stems 32)")
    add("--protocol", nargs="+", choices=PROTOCOLS, default=["features", "knn"])
    add("--epochs", type=count, help="default: the protocol's")
    add("--lr", type=amount, nargs="+", help="one classifier each; per 256 images, but of `features`")
    add("--batch-size", type=count, default=256, help="linear, finetune: GLOBAL, over all processes")
    add("--weight-decay", type=amount, default=0.0, help="linear, finetune")
    add("--percent", type=amount, default=100, help="finetune: labels of each class")
    add("--labels-file", help="finetune: names of the labelled images, as SimCLR's lists")
    add("--encoder-lr", type=amount, default=0.006, help="finetune: published 0.006; 0.004 after multi-crop")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="finetune: of the rates")
    args = parser.parse_args(argv)
    if "finetune" in args.protocol and (len(args.lr or []) > 1 or args.precision == "float16"):
        parser.error("--protocol finetune takes one --lr, and no --precision float16")
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    device, dtype = start(args.device, args.precision)

    # network, data
    backbone, width, trained = read_backbone(args)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    before = [value.clone() for value in backbone.state_dict().values()]
    dataset = args.dataset or trained.get("dataset", "folder")
    size = args.size or trained.get("view_sizes", [224 if trained["stem"] == "imagenet" else 32])[0]
    train, val = load_data(dataset, args.data, trained.get("seed", 0))
    if val is None or len(train.classes) < 2:
        sys.exit(f"--data {args.data} needs train/ and val/, with a folder for each class")
    folder = args.output or (args.checkpoint.parent if args.checkpoint else Path("runs/random"))
    folder.mkdir(parents=True, exist_ok=True)

    # features of both, once
    if {"features", "knn"} & set(args.protocol):
        x, y = encode(backbone, still(train, dataset, size, args.workers), dataset, device, dtype)
        x_val, y_val = encode(backbone, still(val, dataset, size, args.workers), dataset, device, dtype)
        if not x.isfinite().all():
            sys.exit(f"the features of {args.checkpoint} are not finite: its training has diverged")

    for protocol in [p for p in PROTOCOLS if p in args.protocol]:  # finetune last: it moves the backbone
        began, (epochs, rates) = time.time(), PROTOCOLS[protocol]
        config = dict(protocol=protocol, epochs=args.epochs or epochs, rates=args.lr or rates)
        config |= dict(checkpoint=str(args.checkpoint), random=args.random, precision=args.precision)
        config |= dict(weights=float(f"{sum(v.double().abs().sum() for v in before):.6g}"))  # a checksum
        config |= dict(arch=trained["arch"], stem=trained["stem"], dataset=dataset, size=size, seed=args.seed)

        # top-1, or top-1 and top-5, by name
        if protocol == "knn":
            results = {"5 nearest, Euclidean": [knn_top1(x, y, x_val, y_val, k=5)]}
            unit = F.normalize(x.float(), dim=1), y, F.normalize(x_val.float(), dim=1), y_val
            results |= {f"{k} nearest, cosine": [knn_top1(*unit, k, temperature=0.07)] for k in (10, 20)}
        elif protocol == "features":
            order = collect(torch.arange(RANK, len(train), WORLD)).argsort()  # as in one process
            data = collect(x.float())[order], collect(y)[order], collect(x_val.float()), collect(y_val)
            top = linear_on_features(*data, config["rates"], config["epochs"], args.seed)
        else:
            more = ["encoder_lr", "schedule", "percent", "labels_file"] * (protocol == "finetune")
            config |= {name: getattr(args, name) for name in ["batch_size", "weight_decay", *more]}
            run = args, config, folder / f"{protocol}.pt", backbone, width, train, val, device, dtype
            top, config["labelled"] = train_classifier(*run)
        if protocol != "knn":
            results = {f"learning rate {rate:g}": t for rate, t in zip(config["rates"], top)}
        assert protocol == "finetune" or all(map(torch.equal, before, backbone.state_dict().values()))

        # print, append to results.jsonl
        if RANK == 0:
            for name, values in results.items():
                tops = (f"top-{k} {v:.2f}" for k, v in zip((1, 5), values))
                print(f"{protocol:10} {name:22}", *tops, flush=True)
            line = config | {"results": results, "images": [len(train), len(val)]}
            line |= {"date": time.strftime("%F %T"), "seconds": round(time.time() - began, 1)}
            with open(folder / "results.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if protocol in ("linear", "finetune"):  # what a stopped run would go on from
                (folder / f"{protocol}.pt").unlink(missing_ok=True)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
