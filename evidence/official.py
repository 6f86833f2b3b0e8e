"""Train with the official release's own code, on a CPU, to compare train.py with it.

    git clone https://github.com/winci-ai/INTL && git -C INTL checkout d4cdfd8
    PYTHONPATH=. python evidence/official.py INTL --data data/cifar10_small --output runs/official-0
    python linear_eval.py --checkpoint runs/official-0/backbone.pt --arch resnet18 --stem small \
        --dataset cifar10 --data data/cifar10_small

The README of that commit has the published CIFAR-10 accuracy. A week later the network began to pad
CIFAR's images twice. The clone provides the network, the loss, the augmentation, the optimizer's
settings, the schedule and the function that trains an epoch. This script provides the data, the
small stem, and bfloat16 for the network, as train.py's --precision bfloat16; the loss is computed
in float32 in both.
"""

import argparse
import json
import random
import shlex
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from intl import effective_rank, trace_loss


class Autocast(nn.Module):
    """A network that computes in bfloat16 and returns float32."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.module(x).float()


def stay_on_the_cpu():
    """The release copies its batches to a GPU; this makes it leave them where they are."""

    def cuda(self: Tensor, **options) -> Tensor:
        return self

    torch.Tensor.cuda = cuda


def import_release(clone: Path, epochs: int):
    """The release's cifar/main.py as a module, and its settings for CIFAR-10."""
    sys.modules["wandb"] = types.ModuleType("wandb")  # instead of the logging service
    sys.path[:0] = [str(clone / "cifar"), str(clone)]
    import main as release

    # The settings of scripts/cifar10.sh. The release's parser reads sys.argv.
    flags = "--dataset cifar10 --arch resnet18 --projection_size 2048 --lr 0.3 --wd 1e-4"
    own_argv = sys.argv
    sys.argv = ["main.py", *flags.split(), "--method", "intl", "--epochs", str(epochs)]
    cfg = release.get_cfg()
    sys.argv = own_argv
    cfg.distributed = False
    cfg.base_lr = cfg.lr * cfg.bs / 256
    return release, cfg


def build_model(release, cfg, bfloat16: bool, stem: str = "cifar"):
    """The release's network with its loss, and its optimizer."""
    model = release.get_method(cfg.method)(cfg)
    if stem == "small":
        model.backbone.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        model.backbone.maxpool = nn.MaxPool2d(3, 2, 1)
    if bfloat16:
        model.backbone = Autocast(model.backbone)
        model.projection = Autocast(model.projection)
    optimizer = torch.optim.SGD(model.parameters(), 0, momentum=0.9, weight_decay=cfg.weight_decay)
    return model, optimizer


def build_transform(release, cfg):
    """The release's augmentation: an image -> its views."""
    views = []
    for probability in cfg.solarization_prob:
        views.append(release.CifarTransform(cifar="cifar10", solarization_prob=probability))
    return release.Augmentations(views)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path, help="clone of winci-ai/INTL at commit d4cdfd8")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--stem", choices=["cifar", "small"], default="small")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # network, optimizer and data, as the release's main_worker builds them
    stay_on_the_cpu()
    release, cfg = import_release(args.clone, args.epochs)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    model, optimizer = build_model(release, cfg, bfloat16=True, stem=args.stem)
    images = ImageFolder(args.data / "train", build_transform(release, cfg))
    loader = DataLoader(images, cfg.bs, shuffle=True, drop_last=True)
    cfg.total_steps = args.epochs * len(loader)
    cfg.warmup_steps = cfg.warmup_eps * len(loader)

    # the first line of the log, and the configuration
    args.output.mkdir(parents=True, exist_ok=True)
    config = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    config["images"] = len(images)
    (args.output / "config.json").write_text(json.dumps(config, indent=1))
    start = {
        "step": 0,
        "date": time.strftime("%F %T"),
        "machine": f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "command": shlex.join(sys.argv),
    }
    lines = [start]

    # train; after each epoch log the terms of its last step, as train.py defines them
    seen = []  # (input, output) of IterNorm, view by view
    model.IterNorm.register_forward_hook(lambda _, inputs, z_hat: seen.append((inputs[0], z_hat)))
    for epoch in range(args.epochs):
        t0 = time.time()
        loss = release.train(loader, model, optimizer, epoch, cfg)
        seconds = time.time() - t0

        z1, z1_hat = [x.detach() for x in seen[-2]]
        z2_hat = seen[-1][1].detach()
        seen.clear()
        numbers = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * len(loader),
            "mean_loss": float(loss),
            "alignment": 2 - 2 * F.cosine_similarity(z1_hat, z2_hat).mean().item(),
            "trace": (trace_loss(z1_hat) + trace_loss(z2_hat)).item() / 2,
            "embedding_rank": effective_rank(z1).item(),
            "images_per_second": len(loader) * cfg.bs / seconds,
        }
        lines.append({name: float(f"{value:.5g}") for name, value in numbers.items()})
        print("  ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (args.output / "log.jsonl").write_text(text)
    torch.save(model.backbone.module.state_dict(), args.output / "backbone.pt")


if __name__ == "__main__":
    main()
