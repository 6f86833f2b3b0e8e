"""Train with the official release's own code, to compare train.py with it: on a CPU, on a folder of images.

    git clone https://github.com/winci-ai/INTL && git -C INTL checkout d4cdfd8
    PYTHONPATH=. python evidence/official.py INTL --data data/cifar10_small --output runs/official-0
    python linear_eval.py --checkpoint runs/official-0/backbone.pt --arch resnet18 --stem small \
        --dataset cifar10 --data data/cifar10_small

That commit's README has the published CIFAR-10 accuracy; a week later the network began to pad CIFAR's images
twice. From the clone come network, loss, augmentation, optimiser's settings, schedule and
the function that trains an epoch; from here the data, the first layers of `--stem small`, and bfloat16 for
the network, as in train.py, while the loss is float32, as in both."""

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


class InBfloat16(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(x).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("clone", type=Path, help="of github.com/winci-ai/INTL, at commit d4cdfd8")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ in ImageFolder layout")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stem", choices=["cifar", "small"], default="small")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = shlex.join(sys.argv)

    # the release's modules; no logging service, and no copies to a GPU
    sys.modules["wandb"] = types.ModuleType("wandb")
    torch.Tensor.cuda = lambda self, **_: self
    sys.path[:0] = [str(args.clone / "cifar"), str(args.clone)]
    sys.argv = ["main.py", *"--dataset cifar10 --arch resnet18 --projection_size 2048".split()]
    sys.argv += [*"--lr 0.3 --wd 1e-4 --method intl --epochs".split(), str(args.epochs)]  # scripts/cifar10.sh
    import main as official

    cfg = official.get_cfg()
    cfg.distributed, cfg.base_lr = False, cfg.lr * cfg.bs / 256

    # network, optimiser, data, as its main_worker makes them
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    model = official.get_method(cfg.method)(cfg)
    if args.stem == "small":
        model.backbone.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        model.backbone.maxpool = nn.MaxPool2d(3, 2, 1)
    model.backbone, model.projection = InBfloat16(model.backbone), InBfloat16(model.projection)
    optimizer = torch.optim.SGD(model.parameters(), 0, momentum=0.9, weight_decay=cfg.weight_decay)
    views = [official.CifarTransform(cifar="cifar10", solarization_prob=p) for p in cfg.solarization_prob]
    images = ImageFolder(args.data / "train", official.Augmentations(views))
    loader = DataLoader(images, cfg.bs, shuffle=True, drop_last=True)
    cfg.total_steps, cfg.warmup_steps = args.epochs * len(loader), cfg.warmup_eps * len(loader)

    # train; of each epoch's last step what train.py logs
    args.output.mkdir(parents=True, exist_ok=True)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    (args.output / "config.json").write_text(json.dumps(config | {"images": len(images)}, indent=1))
    machine = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [{"step": 0, "date": time.strftime("%F %T"), "machine": machine, "command": command}]
    seen = []
    model.IterNorm.register_forward_hook(lambda _, inputs, z_hat: seen.append((inputs[0], z_hat)))
    for epoch in range(args.epochs):
        began = time.time()
        loss = official.train(loader, model, optimizer, epoch, cfg)
        (z, a), (_, b) = [[x.detach() for x in pair] for pair in seen[-2:]]
        seen.clear()
        numbers = {"epoch": epoch + 1, "step": (epoch + 1) * len(loader), "mean_loss": float(loss)}
        numbers["alignment"] = 2 - 2 * F.cosine_similarity(a, b).mean().item()
        numbers["trace"] = (trace_loss(a) + trace_loss(b)).item() / 2
        numbers["embedding_rank"] = effective_rank(z).item()
        numbers["images_per_second"] = len(loader) * cfg.bs / (time.time() - began)
        lines.append({k: float(f"{v:.5g}") for k, v in numbers.items()})
        print("  ".join(f"{k} {v}" for k, v in lines[-1].items()), flush=True)
        (args.output / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save(model.backbone.module.state_dict(), args.output / "backbone.pt")


if __name__ == "__main__":
    main()
