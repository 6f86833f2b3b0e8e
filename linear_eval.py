"""Evaluate a frozen backbone that train.py has pretrained.

    python linear_eval.py                                                      # the default run, runs/shapes
    python linear_eval.py --checkpoint runs/cifar10/checkpoint.pt --data data/cifar10
    python linear_eval.py --checkpoint runs/cifar10/checkpoint.pt --data data/cifar10 --protocol knn

Protocols (INTL paper, appendix): `features`, the CIFAR protocol: the features of all images once, without augmentation, then a
linear classifier on them (Adam, 500 epochs, batch 1000, learning rate 1e-2 to 1e-6 exponentially, weight decay 5e-6);
`knn`, 5 nearest neighbours by Euclidean distance on the same features, which `features` reports too.
Every result is appended to results.jsonl beside the checkpoint.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from train import (
    build_backbone,
    choose_device,
    encode,
    fail,
    knn_accuracy,
    load_checkpoint,
    load_data,
    rank_and_world,
    rng,
    say,
)


def load_backbone(path: Path, device: torch.device, random: bool = False) -> tuple[nn.Module, dict]:
    """The frozen backbone of a checkpoint.pt of train.py, or the same network with random weights, and its run's
    configuration."""
    if not path.is_file():
        fail(f"--checkpoint {path}: no such file")
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or not {"config", "network"} <= saved.keys():
        fail(f"{path} is no checkpoint.pt of train.py")
    config = saved["config"]
    missing = {"arch", "stem", "view_sizes", "zero_init_residual", "dataset", "seed", "recipe"} - set(config or {})
    if missing:
        fail(f"{path} lacks {', '.join(sorted(missing))} in its configuration: it is no checkpoint.pt of train.py")
    backbone, _ = build_backbone(config["arch"], config["stem"], config["view_sizes"][0], config["zero_init_residual"])
    if random:
        say(f"{config['arch']} with random weights, as {path} describes it")
    else:
        state = {k.removeprefix("backbone."): v for k, v in saved["network"].items() if k.startswith("backbone.")}
        try:
            backbone.load_state_dict(state)
        except RuntimeError as error:
            fail(f"{path} does not fit {config['arch']}: {' '.join(str(error).split())[:300]}")
        dropped = len(saved["network"]) - len(state)
        say(f"{path}: {config['arch']}, {len(state)} tensors of the backbone used, {dropped} of the projector dropped")
    return backbone.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), config


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> int:
    return int((logits.topk(min(k, logits.shape[1])).indices == labels[:, None]).sum())


def linear_on_features(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, classes: int, seed: int, epochs: int
) -> tuple[float, float]:
    """Top-1 and top-5 in percent on the validation features (n, width) of a linear classifier trained by the CIFAR protocol."""
    generator = rng(seed, "linear")
    head = nn.Linear(x.shape[1], classes).to(x.device)
    with torch.no_grad():
        for parameter in head.parameters():  # torch's own initialisation, from a generator of its own
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) / x.shape[1] ** 0.5)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2, weight_decay=5e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=(1e-6 / 1e-2) ** (1 / epochs))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(1000):
            optimizer.zero_grad()
            cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = head(x_val)
    return tuple(100 * topk_correct(logits, y_val, k) / len(y_val) for k in (1, 5))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", default="runs/shapes/checkpoint.pt", help="checkpoint.pt of train.py (default: runs/shapes)"
    )
    parser.add_argument("--data", help="folder with train/ and val/, or torchvision's CIFAR; not for shapes")
    parser.add_argument("--protocol", default="features", choices=["features", "knn"])
    parser.add_argument("--epochs", type=int, default=500, help="of the linear classifier")
    parser.add_argument(
        "--random", action="store_true", help="evaluate the same network with random weights, for comparison"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the classifier, and of --random")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images, for each process")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.epochs < 1:
        fail("--epochs must be at least 1")
    if args.workers < 0 or not 0 <= args.seed < 2**63:
        fail("--workers and --seed must not be negative, and the seed below 2^63")
    device = choose_device(args.device)
    path = Path(args.checkpoint)
    torch.manual_seed(args.seed)  # of --random
    backbone, config = load_backbone(path, device, args.random)
    frozen = {name: value.clone() for name, value in backbone.state_dict().items()}
    train, val = load_data(config["dataset"], args.data, config["seed"], device)
    if val is None or not (train.classes and val.classes):
        fail(f"--data {args.data} has no labelled train/ and val/: an evaluation needs both, with a folder per class")
    started, size = time.time(), config["view_sizes"][0]
    x, x_val = (
        encode(backbone, split, config["dataset"], size, torch.arange(len(split)), device, workers=args.workers)
        for split in (train, val)
    )
    if not (x.isfinite().all() and x_val.isfinite().all()):
        fail(f"the features of {path} are not finite: its training has diverged")
    assert all(torch.equal(value, frozen[name]) for name, value in backbone.state_dict().items()), (
        "the frozen backbone changed"
    )
    say(
        f"features of {len(x)} training and {len(x_val)} validation images, {x.shape[1]} wide, in {time.time() - started:.0f} s"
    )

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if rank_and_world()[0] > 0:  # what follows is the first process's work alone
        return

    result = {"checkpoint": str(path), "weights": "random" if args.random else "pretrained", "protocol": args.protocol}
    result |= {"data": args.data, "recipe": config["recipe"], "seed": args.seed}
    result |= {"training_images": len(x), "validation_images": len(x_val)}
    result["knn_top1"] = knn_accuracy(x, train.labels, x_val, val.labels, k=5)
    say(f"{'5-NN top-1':>14}  {result['knn_top1']:.2f} %")
    if args.protocol == "features":
        tensors = [t.to(device) for t in (x, train.labels, x_val, val.labels)]
        result["top1"], result["top5"] = linear_on_features(*tensors, len(train.classes), args.seed, args.epochs)
        say(f"{'linear top-1':>14}  {result['top1']:.2f} %\n{'linear top-5':>14}  {result['top5']:.2f} %")
    result["seconds"] = round(time.time() - started, 1)
    try:
        with open(path.with_name("results.jsonl"), "a") as file:
            file.write(json.dumps(result) + "\n")
    except OSError as error:
        fail(f"the result could not be appended to {path.with_name('results.jsonl')}: {error}")


if __name__ == "__main__":
    main()
