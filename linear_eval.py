"""Evaluate a pretrained backbone: this project's, the official INTL release's, or another publisher's.

    python linear_eval.py                                                      # the default run, runs/shapes
    python linear_eval.py --checkpoint runs/cifar10/checkpoint.pt --data data/cifar10 --protocol features knn
    torchrun --nproc_per_node 8 linear_eval.py --checkpoint resnet50.pth --data /data/imagenet --protocol linear
    torchrun --nproc_per_node 8 linear_eval.py --checkpoint resnet50.pth --data /data/imagenet --protocol finetune --percent 1
    python linear_eval.py --random --arch resnet18 --stem cifar --dataset cifar10 --data data/cifar10

Protocols (INTL paper, appendix):

    features   CIFAR: the features of all images once, without augmentation, then a linear classifier (Adam, batch 1000)
    knn        on the same features: 5 nearest by Euclidean distance; 10 and 20 by cosine, weighted, temperature 0.07
    linear     ImageNet: a linear classifier on the frozen backbone, random crops and flips (SGD, batch 256)
    finetune   backbone and classifier, on all labels, 1 % or 10 % of them, or those that a file names

`features` and `linear` train several classifiers with several learning rates in the one pass; the protocol's own is named.
Results are appended to results.jsonl beside the checkpoint. `linear` and `finetune` resume when they are started again.
"""

import argparse
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from intl import draw_spectra, undrawable
from train import (
    MEAN_STD,
    USED_BY,
    Images,
    Interrupts,
    Packed,
    Recipe,
    any_process,
    at_least,
    build_backbone,
    choose_device,
    choose_precision,
    compare_steps,
    digest,
    distribute,
    encode,
    epoch_order,
    fail,
    gather_shares,
    knn_accuracy,
    leave,
    leave_together,
    load_checkpoint,
    load_data,
    lock,
    nearest,
    rank_and_world,
    restoring,
    rng,
    save_all,
    say,
    share_of,
    still_batches,
    training_views,
    unify_buffers,
)

# The published settings. `rates`: of the classifiers; the first is the protocol's own (0.4 after multi-crop with a
# teacher), the others spare a search.
PROTOCOLS = {
    "features": {"epochs": 500, "rates": [0.01, 0.001, 0.1]},
    "knn": {"epochs": 0, "rates": []},
    "linear": {"epochs": 100, "rates": [0.2, 0.02, 0.1, 0.4, 1.0, 5.0, 30.0]},
    "finetune": {"epochs": 20, "rates": [0.2]},
}


def rates_of(protocol: str, config: dict) -> list[float]:
    """The learning rates of the protocol's classifiers, its own first, for a backbone with this configuration."""
    rates = PROTOCOLS[protocol]["rates"]
    if protocol == "linear" and config.get("ema") is not None and len(config["view_sizes"]) > 2:
        return [0.4, *(r for r in rates if r != 0.4)]
    return rates


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints

# Who publishes what: the entry of the file that holds the weights, and what their names begin with.
LAYOUTS = {
    ("network", "backbone."): "train.py",
    ("model", "backbone."): "linear_eval.py --protocol finetune",
    ("state_dict", "module.backbone."): "official INTL",
    ("state_dict", "module.encoder_q."): "MoCo v1, v2",
    ("state_dict", "module.base_encoder."): "MoCo v3",
    ("teacher", "module.backbone."): "DINO",
    ("teacher", "backbone."): "DINO",
    ("model", "module.backbone."): "Barlow Twins, VICReg",
    ("state_dict", "module."): "SwAV",
    ("", "module."): "SwAV",
    ("state_dict", "backbone."): "solo-learn",
    ("", ""): "torchvision's names (Barlow Twins, VICReg, DINO, backbone.pt)",
}


@dataclass
class Checkpoint:
    state: dict[str, Tensor]  # torchvision's names, without the classifier
    arch: str
    stem: str
    size: int  # pixels of the images that it was trained on
    config: dict  # of train.py's own files; empty for others


def read_checkpoint(path: Path, arch: str | None = None, stem: str | None = None, size: int | None = None) -> Checkpoint:
    """The backbone in a file, recognised by its keys. `arch`, `stem`, `size`: what is known better than the file says."""
    if not path.is_file():
        fail(
            f"--checkpoint {path}: no such file{'. `torchrun train.py` makes it' * (path == Path('runs/shapes/checkpoint.pt'))}"
        )
    saved = load_checkpoint(path)
    if not isinstance(saved, dict):
        fail(f"{path} holds no weights, but a {type(saved).__name__}")
    entries = {name: saved.get(name) for name, _ in LAYOUTS} | {"": saved}
    entries = {name: e for name, e in entries.items() if isinstance(e, dict)}
    found = [
        (name, match[1])
        for name, weights in entries.items()
        for key in map(str, weights)
        if (match := re.fullmatch(r"(.*?)(conv1|conv_proj)\.weight", key)) and not re.search(r"layer\d", match[1])
    ]
    prefixes = [prefix for _, prefix in LAYOUTS]
    known = [layout for layout in LAYOUTS if layout in found]
    known += sorted((f for f in found if f[1] in prefixes), key=lambda f: prefixes.index(f[1]))  # in another entry
    if not known and len(found) > 1:
        fail(f"{path} holds several networks ({', '.join(sorted(prefix for _, prefix in found))}): save one of them alone")
    if not found:
        keys = ", ".join(list(map(str, saved))[:5])
        fail(
            f"{path} has no backbone with torchvision's names (conv1.weight or conv_proj.weight, after a prefix), but {keys}"
        )
    entry, prefix = known[0] if known else found[0]
    tensors = {
        str(k): v for k, v in entries[entry].items() if isinstance(v, Tensor) and v.layout == torch.strided and not v.is_meta
    }
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if weights.get("conv1.weight", weights.get("conv_proj.weight", torch.zeros(0))).ndim != 4:
        fail(f"{path}: {prefix}conv1.weight is no convolution's weight")
    config = saved.get({"network": "config", "model": "settings"}.get(entry, ""))
    if path.name == "backbone.pt" and path.with_name("config.json").is_file():
        config = read_json(path.with_name("config.json"))
    config = config if isinstance(config, dict) else {}
    for name, choices in (("stem", ("imagenet", "cifar", "small")), ("dataset", MEAN_STD)):
        if name in config and config[name] not in choices:
            fail(f"{path} has {name} {config[name]!r} in its configuration, which is none of {', '.join(choices)}")
    for name, value in (("arch", arch), ("stem", stem), ("size", size)):
        there = config.get(name, (config.get("view_sizes") or [None])[0] if name == "size" else None)
        if None not in (value, there) and value != there:
            say(f"--{name} {value} is taken in the place of {there}, of which {path} was trained")
    arch = arch or config.get("arch") or recognise(path, weights)
    seen_stem, seen_size = measure(weights)
    stem = stem or config.get("stem") or seen_stem
    size = size or config.get("size") or (config.get("view_sizes") or [seen_size])[0]
    if stem is None:
        fail(
            f"{path} has a 3x3 stem, but does not tell its stride: give --stem cifar (1) or --stem small (2, and a max-pool)"
        )
    with torch.device("meta"):
        expected = build_backbone(arch, stem, size)[0].state_dict()
    wrong = [k for k in expected if k not in weights and not k.endswith("num_batches_tracked")]
    wrong += [k for k in weights if re.match(r"layer\d|encoder\.", k) and k not in expected]
    if wrong:
        there = "lacks" if wrong[0] in expected else "has"
        fail(f"{path} is no {arch}: it {there} {wrong[0]}, one of {len(wrong)} such names")
    for k in expected:
        if k in weights and weights[k].shape != expected[k].shape:
            fail(f"{path} is no {arch} with stem {stem} for {size} pixels: {k} is {tuple(weights[k].shape)}, "
                 f"not {tuple(expected[k].shape)}")  # fmt: skip
    if not all(weights[k].isfinite().all() for k in expected if k in weights):
        fail(f"{path} holds weights that are not finite: its training has diverged")
    state = {k: weights[k] if k in weights else torch.zeros(v.shape, dtype=v.dtype) for k, v in expected.items()}
    dropped = sorted({k.split(".")[0] for k in weights if k not in expected})
    others = len(entries[entry]) - len(weights)
    say(f"{path}: {arch}, stem {stem}, as {LAYOUTS.get((entry, prefix), 'an unknown publisher')} names it "
        f"({entry or 'the file'}: {prefix}*); {len(weights.keys() & expected.keys())} tensors used, dropped "
        f"{', '.join(dropped) or 'none'} and {others} with other prefixes, missing none")  # fmt: skip
    return Checkpoint(state, arch, stem, size, config)


def untrained(arch: str, stem: str | None, size: int | None) -> Checkpoint:
    """For --random without a file: an architecture alone."""
    return Checkpoint({}, arch, stem or "imagenet", size or (224 if stem in (None, "imagenet") else 32), {})


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def measure(weights: dict[str, Tensor]) -> tuple[str | None, int]:
    """Stem and image size, as far as shapes tell: a 3x3 stem may have stride 1 (cifar) or 2 (small)."""
    if "conv_proj.weight" in weights:
        patch = weights["conv_proj.weight"].shape[-1]
        positions = weights["encoder.pos_embedding"].shape[1] if "encoder.pos_embedding" in weights else 197
        return {16: "imagenet", 8: "small"}.get(patch, "cifar"), round((positions - 1) ** 0.5) * patch
    return ("imagenet", 224) if weights["conv1.weight"].shape[-1] == 7 else (None, 32)


def recognise(path: Path, weights: dict[str, Tensor]) -> str:
    """The architecture whose blocks have these names and shapes."""
    if "conv_proj.weight" in weights:
        archs, part = ["vit_tiny", "vit_small", "vit_b_16"], "encoder.layers"
    else:
        archs, part = torchvision.models.list_models(torchvision.models, include=["resn*", "wide_resnet*"]), "layer"
    blocks = {k: v.shape for k, v in weights.items() if k.startswith(part) and v.ndim > 0}
    for arch in archs:
        with torch.device("meta"):
            stem, size = measure(weights)
            expected = build_backbone(arch, stem or "cifar", size)[0].state_dict()
        if blocks == {k: v.shape for k, v in expected.items() if k.startswith(part) and v.ndim > 0}:
            return arch
    fail(f"{path}: its {len(blocks)} tensors named {part}* fit none of {', '.join(archs)}")


# ------------------------------------------------------------------------------------------------------------------
# Linear classifiers


def accuracies(correct: Tensor, total: int) -> list[tuple[float, float]]:
    return [(100 * top1 / total, 100 * top5 / total) for top1, top5 in correct.tolist()]


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Of every classifier's logits (H, b, classes) the number of images (H, 2) with the label first, and among five."""
    logits = logits.nan_to_num(nan=-torch.inf)  # of a classifier that has diverged
    guesses = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]  # (H, b, 5)
    return torch.stack([guesses[..., 0].sum(1), guesses.any(-1).sum(1)], dim=1)


def linear_on_features(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, classes: int, rates: list[float], epochs: int, seed: int
) -> list[tuple[float, float]]:
    """The CIFAR protocol: for each learning rate top-1 and top-5 in percent on validation features (n, width) of a linear
    classifier; Adam, batch 1000, weight decay 5e-6, the rate falls exponentially to 1e-4 of itself."""
    generator = rng(seed, "linear")
    heads = [nn.Linear(x.shape[1], classes).to(x.device) for _ in rates]
    with torch.no_grad():
        for parameter in (p for head in heads for p in head.parameters()):
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) / x.shape[1] ** 0.5)
    groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, rates)]
    optimizer = torch.optim.Adam(groups, weight_decay=5e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=1e-4 ** (1 / epochs))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(1000):
            batch, labels = x[rows].float(), y[rows]
            optimizer.zero_grad()
            sum(cross_entropy(head(batch), labels) for head in heads).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return accuracies(count_correct(torch.stack([head(x_val.float()) for head in heads]), y_val), len(y_val))


class Classifier(nn.Module):
    """A backbone, frozen or not, and linear classifiers on it, which all begin with the same weights."""

    def __init__(
        self, backbone: nn.Module, width: int, classes: int, heads: int, frozen: bool, dtype: torch.dtype, seed: int
    ):
        super().__init__()
        self.backbone, self.frozen, self.dtype = backbone.requires_grad_(not frozen), frozen, dtype
        weight = 0.01 * torch.randn(classes, width, generator=rng(seed, "heads"))
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))
        for head in self.heads:
            head.weight.data.copy_(weight)
            nn.init.zeros_(head.bias)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)  # frozen: BN's statistics too
        return self

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, s, s) -> (H, b, classes)
        autocast = torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen), autocast:
            features = self.backbone(x)
        return torch.stack([head(features.float()) for head in self.heads])


@torch.no_grad()
def validate(model: Classifier, val: Images, dataset: str, size: int, device: torch.device, workers: int):
    """Top-1 and top-5 in percent of every classifier; each process counts its share, so that every image counts once."""
    rank, world = rank_and_world()
    mine = torch.arange(len(val))[rank::world]
    correct, training = torch.zeros(len(model.heads), 2, dtype=torch.long, device=device), model.training
    total = torch.tensor(0, device=device)
    if not model.frozen:
        unify_buffers(model.backbone)
    model.eval()
    batches = still_batches(val, mine, dataset, size, device, workers) if len(mine) else []
    for x, rows in zip(batches, mine.split(128)):
        correct += count_correct(model(x), val.labels[rows].to(device))
        total += len(x)
    model.train(training)
    if world > 1:
        dist.all_reduce(correct)
        dist.all_reduce(total)
    assert total == len(val), f"{total} validation images were counted, of {len(val)}"
    return accuracies(correct, len(val))


def labelled_rows(images: Images, percent: int, labels_file: str | None, seed: int) -> Tensor:
    """Of the images that a file names, a line each, or of `percent` of every class, at least one."""
    if labels_file:
        try:
            lines = Path(labels_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--labels-file {labels_file} cannot be read: {error}")
        if not images.paths:
            fail("--labels-file needs --data with a folder per class: torchvision's CIFAR has no file names")
        by_name = {}
        for i, path in enumerate(map(Path, images.paths)):  # as name.jpg, or class/name.jpg where names repeat
            for name in (path.name, f"{path.parent.name}/{path.name}"):
                by_name.setdefault(name, []).append(i)
        wanted = [line.strip() for line in lines if line.strip()]
        unknown = [name for name in wanted if name not in by_name]
        if unknown:
            count = f"{len(unknown)} of {len(wanted)} names are unknown"
            fail(f"--labels-file {labels_file}: {unknown[0]!r} is no training image; {count}")
        double = [name for name in wanted if len(by_name[name]) > 1]
        if double:
            fail(f"--labels-file {labels_file}: {len(by_name[double[0]])} images are called {double[0]!r}; write class/name")
        if not wanted:
            fail(f"--labels-file {labels_file} is empty")
        return torch.tensor(sorted({by_name[name][0] for name in wanted}))
    if percent == 100:
        return torch.arange(len(images))
    rows, generator = [], rng(seed, "labels", percent)
    for c in range(len(images.classes)):
        members = (images.labels == c).nonzero()[:, 0]
        keep = max(1, round(len(members) * percent / 100))
        rows.append(members[torch.randperm(len(members), generator=generator)[:keep]])
    return torch.cat(rows).sort().values


def subset(images: Images, rows: Tensor) -> Images:
    if len(rows) == len(images):
        return images
    pixels, paths = images.pixels, list(images.paths or [])
    pixels = pixels[rows.to(pixels.device)] if isinstance(pixels, Tensor) else pixels and [pixels[i] for i in rows.tolist()]
    return Images(pixels, paths and Packed(paths[i] for i in rows.tolist()), images.labels[rows], images.classes)


def rate_factor(protocol: str, step: int, steps: int, epochs: int) -> float:
    """linear: divided by 10 at 60 % and 80 % of the epochs; finetune: a cosine, step by step."""
    if protocol == "linear":
        epoch = step // steps
        return 0.1 ** ((epoch >= 0.6 * epochs) + (epoch >= 0.8 * epochs))
    return (1 + math.cos(math.pi * step / (steps * epochs))) / 2


def unfinished(path: Path, settings: dict) -> dict | None:
    """What an interrupted `linear` or `finetune` with the same settings has saved."""
    if not path.exists():
        return None
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or not {"settings", "step", "model", "optimizer", "scaler"} <= saved.keys():
        fail(f"{path} is no file of this script: move it away, or choose another --output")
    names = [name for name in settings if settings[name] != saved["settings"].get(name)]
    if names:
        fail(f"{path} is of an evaluation with other settings ({', '.join(names)}): give --fresh to start over")
    return saved


def train_classifier(
    args: argparse.Namespace, settings: dict, backbone: nn.Module, width: int, train: Images, val: Images,
    device: torch.device, dtype: torch.dtype, path: Path, saved: dict | None,
) -> list[tuple[float, float]]:  # fmt: skip
    """`linear` and `finetune`: for each learning rate top-1 and top-5 in percent after the last epoch. Saves to `path`."""
    (rank, world), protocol, dataset, size = rank_and_world(), settings["protocol"], settings["dataset"], settings["size"]
    rates, epochs, batch = settings["rates"], settings["epochs"], args.batch_size
    frozen, steps = protocol == "linear", len(train) // batch
    recipe = Recipe(
        dataset=dataset, batch_size=batch, view_sizes=(size,), interpolation="bilinear", jitter_prob=0.0, gray=0.0,
        solarize=(0.0,),
    )  # fmt: skip
    model = Classifier(backbone, width, len(train.classes), len(rates), frozen, dtype, args.seed).to(device)
    if world > 1 and device.type == "cuda" and not frozen:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    groups = [{"params": list(head.parameters()), "rate": r * batch / 256} for head, r in zip(model.heads, rates)]
    if not frozen:
        groups.append({"params": list(model.backbone.parameters()), "rate": args.encoder_lr * batch / 256})
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16 and not frozen)

    step, top = 0, None
    if saved:
        step = saved["step"]
        with restoring(path):
            model.load_state_dict(saved["model"], strict=not frozen)
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"]) if saved["scaler"] else None
        say(f"{protocol}: resuming at step {step} of {steps * epochs}")
    compare_steps(step)
    wrapped = distribute(model, device)

    def save():
        if rank == 0:
            kept = {k: v for k, v in model.state_dict().items() if not frozen or k.startswith("heads.")}
            state = {"settings": settings, "step": step, "model": kept, "optimizer": optimizer.state_dict()}
            save_all({path: state | {"scaler": scaler.state_dict()}})

    interrupts, began, first, shown = Interrupts(), time.time(), step, time.time()
    say(f"{protocol}: {len(train)} images, {epochs} epochs of {steps} steps, global batch {batch}, learning rates "
        f"{', '.join(f'{r:g}' for r in rates)}{'' if frozen else f', encoder {args.encoder_lr:g}'} x {batch}/256")  # fmt: skip
    views = training_views(train, recipe, args.seed, step, args.workers, device)
    every = max(1, epochs // 10)
    model.train()
    while step < steps * epochs:
        epoch, position = divmod(step, steps)
        if position == 0 or step == first:
            order = epoch_order(len(train), args.seed, epoch, batch)
            labels = train.labels[order[:, share_of(batch)]].to(device)  # (steps, b)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate_factor(protocol, step, steps, epochs)
        logits = wrapped(next(views)[0])  # (H, b, classes)
        losses = torch.stack([cross_entropy(l, labels[position]) for l in logits])
        optimizer.zero_grad()
        scaler.scale(losses.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        step += 1
        ends = step % steps == 0
        stop = (world == 1 or ends or step % 10 == 0) and any_process(interrupts.received, device)
        if ends or stop or time.time() - shown > 30:
            if not frozen and not losses.isfinite().all():
                fail(f"{protocol}: the loss is not finite at step {step}; a lower --encoder-lr may help", alone=True)
            shown, eta = time.time(), (steps * epochs - step) * (time.time() - began) / (step - first)
            values = losses.detach().tolist()
            say(f"{protocol}: epoch {step / steps:.2f}/{epochs}  loss {values[0]:.3f} at rate {rates[0]:g}, least "
                f"{min(values):.3f} at {rates[values.index(min(values))]:g}  ETA {eta / 60:.1f} min")  # fmt: skip
        if ends and not (stop and step < steps * epochs) and (step // steps % every == 0 or step == steps * epochs):
            top = validate(model, val, dataset, size, device, args.workers)
            say(f"{protocol}: epoch {step // steps}/{epochs}  top-1 {top[0][0]:.2f} %, best {max(t for t, _ in top):.2f} %")
        if ends or stop:
            save()
        if stop and step < steps * epochs:
            say(f"told to stop: saved at step {step} of {steps * epochs}; the same command goes on from there")
            leave()
            raise SystemExit(0)
    views.close()
    interrupts.restore()
    return top or validate(model, val, dataset, size, device, args.workers)


# ------------------------------------------------------------------------------------------------------------------
# Runs side by side


def digest_of(state: dict[str, Tensor]) -> str:
    return digest(b"".join(value.cpu().flatten().view(torch.uint8).numpy().tobytes() for value in state.values()))


def compare(folders: list[str], plot: str | None = None):
    """A Markdown table of the runs in these folders of train.py, evaluated by `features knn`: a row for those that differ in
    nothing but their seed, named by the fields in which the rows differ, with mean and standard deviation; and the spectra
    of the first runs' embeddings as a picture."""
    runs = []  # configuration without the seed, numbers, spectrum
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        try:
            config = json.loads((folder / "config.json").read_text())
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            last = ([line for line in log if "feature_rank" in line] or [{"epoch": 0}])[-1]
            if last["epoch"] < config["epochs"]:
                fail(f"{folder} has reached epoch {last['epoch']:g} of {config['epochs']}: let it end first")
            if "embedding_spectrum" not in last:
                fail(f"{folder} was stopped at its very last step, before its spectrum was measured: repeat it with --fresh")
            lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
            mine = digest_of(load_checkpoint(folder / "backbone.pt"))
            results = {r["protocol"]: r for r in lines if r["digest"] == mine}
            for protocol in ("features", "knn"):
                if protocol not in results:
                    fail(f"{folder}/results.jsonl lacks {protocol} of its backbone.pt: let linear_eval.py measure it first")
            speed = [line["images_per_second"] for line in log if "images_per_second" in line][-1]
            numbers = {"linear top-1": results["features"]["top1"], "5-NN top-1": results["knn"]["top1"]}
            numbers |= {"effective rank of features": last["feature_rank"], "of embedding": last["embedding_rank"]}
            numbers |= {"condition number": last["embedding_condition"], "seconds an epoch": config["images"] / speed}
            identity = {name: value for name, value in config.items() if name != "seed"}
            for protocol in ("features", "knn"):
                settings = ("epochs", "rates", "size", "dataset", "precision")
                identity |= {f"{protocol} {name}": results[protocol].get(name) for name in settings}
            runs.append((identity, {k: float(v) for k, v in numbers.items()}, torch.tensor(last["embedding_spectrum"])))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            fail(f"{folder} is no run of train.py that can be read: {type(error).__name__} {error}")
    names = dict.fromkeys(name for identity, _, _ in runs for name in identity)
    differing = [name for name in names if any(run[0].get(name) != runs[0][0].get(name) for run in runs)]
    rows = {}
    for identity, numbers, eigenvalues in runs:
        values = {name: identity.get(name) for name in differing}
        loss = str(identity.get("loss")).split(":")[0]
        telling = [f"{k} {v}" for k, v in values.items() if v is not None and loss in USED_BY.get(k, [loss])]
        rows.setdefault(str(values), (", ".join(telling) or "all", []))[1].append((numbers, eigenvalues))
    columns = list(runs[0][1])
    print(f"| | seeds | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for label, group in rows.values():
        values = torch.tensor([list(numbers.values()) for numbers, _ in group], dtype=torch.float64)  # (runs, columns)
        spread = values.std(0).tolist() if len(group) > 1 else [None] * len(columns)
        cells = [f"{m:.3g}" + ("" if s is None else f" ± {s:.2g}") for m, s in zip(values.mean(0).tolist(), spread)]
        print(f"| {label} | {len(group)} | {' | '.join(cells)} |")
    if plot:
        draw_spectra({label: group[0][1] for label, group in rows.values()}, plot)


# ------------------------------------------------------------------------------------------------------------------
# Command line, and the run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="file with the backbone (default: runs/shapes/checkpoint.pt)")
    add("--data", help="folder with train/ and val/, or torchvision's CIFAR; not for shapes")
    add(
        "--protocol", nargs="+", default=["features", "knn"], choices=PROTOCOLS, help="one or several (default: features knn)"
    )
    add(
        "--dataset",
        choices=MEAN_STD,
        help="what --data holds; also chooses mean and std (default: as pretrained, else folder)",
    )
    add("--arch", help="the backbone, where the file does not tell")
    add("--stem", choices=["imagenet", "cifar", "small"], help="its first layers, where the file does not tell")
    add("--size", type=int, help="pixels of the images (default: as pretrained)")
    add("--random", action="store_true", help="random weights instead of the checkpoint's, for comparison")
    add("--lr", type=float, nargs="+", help="learning rates of the classifiers (default: the protocol's own, and others)")
    add("--epochs", type=int, help="of the classifiers (default: the protocol's own)")
    add("--batch-size", type=int, default=256, help="linear, finetune: GLOBAL batch; rates are per 256 images")
    add("--weight-decay", type=float, default=0.0, help="linear, finetune")
    add("--encoder-lr", type=float, default=0.004, help="finetune: learning rate of the backbone; 0.006 was published too")
    add("--percent", type=int, choices=[1, 10, 100], help="finetune: share of the labels, of every class (default: 100)")
    add("--labels-file", help="finetune: names of the labelled images, a line each (SimCLR's published lists)")
    add("--seed", type=int, default=0, help="of the classifiers, of the labels drawn, and of --random")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode, for each process")
    add("--cache-mb", type=int, default=1024, help="keep images in memory up to this many MiB (%(default)s)")
    add(
        "--precision",
        default="float32",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="of the backbone (%(default)s)",
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--output", help="folder of results.jsonl (default: the checkpoint's, or runs/random)")
    add("--fresh", action="store_true", help="linear, finetune: start over instead of resuming")
    add("--compare", nargs="+", metavar="RUN", help="instead: one table of these folders of train.py, evaluated before")
    add("--plot", metavar="FILE", help="compare: draw the spectra of the embeddings (needs matplotlib)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace):
    at_least({"epochs": 1, "batch_size": 2, "workers": 0, "size": 8, "seed": 0, "cache_mb": 0}, args)
    for name in ("lr", "encoder_lr", "weight_decay"):
        for value in getattr(args, name) if isinstance(getattr(args, name), list) else [getattr(args, name)]:
            if value is not None and not 0 <= value < float("inf"):
                fail(f"--{name.replace('_', '-')} must be finite and not negative, got {value}")
    if "finetune" in args.protocol and args.lr and len(args.lr) > 1:
        fail("--protocol finetune trains one classifier: give one --lr")
    if "finetune" not in args.protocol and (args.percent or args.labels_file):
        fail("--percent and --labels-file are of --protocol finetune")
    world = rank_and_world()[1]
    if args.batch_size % world or args.batch_size // world < 2:
        fail(f"--batch-size {args.batch_size} is not divisible among {world} processes, with two images at least for each")
    if args.labels_file and args.percent:
        fail("--labels-file and --percent both choose the labels: give one of them")
    if args.plot and not args.compare:
        fail("--plot draws what --compare reads")
    if args.plot and (trouble := undrawable(args.plot)):
        fail(trouble)
    if args.random and not (args.checkpoint or args.arch):
        fail("--random needs --arch, or a --checkpoint whose architecture it takes")


def knn(share: Tensor, queries: Tensor, labels: Tensor, expected: Tensor, device: torch.device) -> list[tuple[str, float]]:
    """Top-1 of the three votes. The bank lies spread over the processes, share = bank[rank::world]; its neighbours are merged."""
    rank, world = rank_and_world()

    def neighbours(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, indices = nearest(bank, queries, k, device)
        found = [(distances, indices * world + rank)]
        if world > 1:
            dist.all_gather_object(found := [None] * world, (distances, indices * world + rank))
        indices, order = torch.cat([i for _, i in found], 1).sort(1)  # of equally near ones the first, as in `nearest`
        distances, again = torch.cat([d for d, _ in found], 1).gather(1, order).sort(dim=1, stable=True)
        return distances[:, :k], indices.gather(1, again)[:, :k]

    distances, indices = neighbours(share, queries, 5)
    rows = [("5 nearest, Euclidean", knn_accuracy(distances, labels[indices], expected))]
    unit = normalize(share.float()).to(share.dtype)
    distances, indices = neighbours(unit, normalize(queries.float()), 20)
    for k in (10, 20):
        top1 = knn_accuracy(distances[:, :k], labels[indices[:, :k]], expected, temperature=0.07)
        rows.append((f"{k} nearest, cosine, weighted", top1))
    return rows


@leave_together
def main(argv: list[str] | None = None):
    args = parse(argv)
    check(args)
    if args.compare:
        return compare(args.compare, args.plot)
    device = choose_device(args.device)
    dtype, _ = choose_precision(args.precision, device)
    rank, world = rank_and_world()
    if args.random and not args.checkpoint:
        path = Path("runs/random", args.arch)
        checkpoint = untrained(args.arch, args.stem, args.size)
    else:
        path = Path(args.checkpoint or "runs/shapes/checkpoint.pt")
        checkpoint = read_checkpoint(path, args.arch, args.stem, args.size)
    config, size = checkpoint.config, checkpoint.size
    torch.manual_seed(args.seed)  # of --random
    backbone, width = build_backbone(checkpoint.arch, checkpoint.stem, size)
    if args.random:
        say(f"{checkpoint.arch} with RANDOM weights, as --random asks")
    else:
        backbone.load_state_dict(checkpoint.state)
    backbone = backbone.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    dataset, shapes_seed = args.dataset or config.get("dataset") or "folder", config.get("shapes_seed", config.get("seed", 0))
    train, val = load_data(dataset, args.data, shapes_seed, device, args.cache_mb)
    if val is None or not (train.classes and val.classes):
        fail(f"--data {args.data} has no labelled train/ and val/: an evaluation needs both, with a folder per class")
    folder = Path(args.output or path.parent)
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            open(folder / "results.jsonl", "a").close()
        except OSError as error:
            fail(f"results.jsonl cannot be written in {folder}: {error}. --output names another folder", alone=True)
    frozen = {name: value.clone() for name, value in backbone.state_dict().items()}
    identity = {"checkpoint": str(path), "weights": "random" if args.random else "pretrained", "digest": digest_of(frozen)}
    identity |= {"arch": checkpoint.arch, "stem": checkpoint.stem, "size": size, "dataset": dataset, "data": args.data}
    identity |= {"seed": args.seed, "shapes_seed": shapes_seed, "precision": args.precision}
    locks = []  # held until the end
    # All is checked before any work is done.
    jobs = []  # settings, labelled images, file to resume from and its content, the published row
    for protocol in (name for name in PROTOCOLS if name in args.protocol):  # finetune, which changes the backbone, is last
        rates, epochs = rates_of(protocol, config), args.epochs or PROTOCOLS[protocol]["epochs"]
        own, rates = f"learning rate {rates[0]:g}" if rates else "5 nearest, Euclidean", args.lr or rates
        settings, labelled, file, saved = {"protocol": protocol} | identity, train, None, None
        if protocol != "knn":
            settings |= {"epochs": epochs, "rates": rates}
        if protocol in ("linear", "finetune"):
            name = f"{path.stem}{'.random' * args.random}.{protocol}"
            if protocol == "finetune":
                rows = labelled_rows(train, args.percent or 100, args.labels_file, args.seed)
                labelled = subset(train, rows)
                name += f".{Path(args.labels_file).stem if args.labels_file else args.percent or 100}"
                settings |= {"encoder_lr": args.encoder_lr, "labelled": digest(rows.numpy().tobytes())}
            if len(labelled) < args.batch_size:
                fail(f"{len(labelled)} labelled images are fewer than one batch of {args.batch_size}: lower --batch-size")
            settings |= {"batch_size": args.batch_size, "weight_decay": args.weight_decay}
            file = folder / f"{name}.pt"
            saved = None if args.fresh else unfinished(file, settings)
            locks += [lock(folder, f".{file.name}.lock")] if rank == 0 else []
        jobs.append((settings, labelled, file, saved, own))

    began = time.time()
    if {"features", "knn"} & set(args.protocol):
        x, x_val = (
            encode(backbone, images, dataset, size, torch.arange(len(images)), device, dtype, args.workers)
            for images in (train, val)
        )
        if any_process(not (x.isfinite().all() and x_val.isfinite().all()), device):
            fail(f"the features of {path} are not finite in {args.precision}: --precision float32 may help")
        x_val = gather_shares(x_val)
        say(
            f"features of {len(train)} training and {len(val)} validation images, {width} wide, in {time.time() - began:.0f} s"
        )
    table = []  # protocol, classifier, top-1, top-5, whether measured by the published settings
    for settings, labelled, file, saved, own in jobs:
        began, protocol, rates = time.time(), settings["protocol"], settings.get("rates", [])
        if protocol == "knn":
            rows = [(name, top1, None) for name, top1 in knn(x, x_val, train.labels, val.labels, device)]
        else:
            if protocol == "features":  # every process for itself
                tensors = [t.to(device) for t in (gather_shares(x), train.labels, x_val, val.labels)]
                top = linear_on_features(*tensors, len(train.classes), rates, settings["epochs"], args.seed)
            else:
                top = train_classifier(args, settings, backbone, width, labelled, val, device, dtype, file, saved)
            rows = [(f"learning rate {r:g}", *t) for r, t in zip(rates, top)]
        if protocol != "finetune":
            now = backbone.state_dict()
            assert all(torch.equal(value, now[name]) for name, value in frozen.items()), "the frozen backbone changed"
        usual = {"epochs": PROTOCOLS[protocol]["epochs"], "batch_size": 256, "weight_decay": 0.0, "encoder_lr": 0.004}
        published = not args.random and all(settings.get(name, value) == value for name, value in usual.items())
        published &= protocol != "finetune" or len(labelled) < len(train)  # on all labels it was not
        table += [(protocol, *row, published and row[0] == own) for row in rows]
        if rank == 0:
            result = settings | {"results": [dict(zip(("classifier", "top1", "top5"), row)) for row in rows]}
            result |= {"top1": rows[0][1], "training_images": len(labelled), "validation_images": len(val)}
            result |= {"processes": world, "seconds": round(time.time() - began, 1)}
            try:
                with open(folder / "results.jsonl", "a") as lines:
                    lines.write(json.dumps(result) + "\n")
            except OSError as error:
                fail(f"results.jsonl cannot be written in {folder}: {error}", alone=True)
    say(f"\n{path}{' with RANDOM weights' if args.random else ''}, {len(val)} validation images")
    say(f"{'protocol':10} {'classifier':30} {'top-1':>7} {'top-5':>7}")
    for protocol, classifier, top1, top5, own in table:
        say(f"{protocol:10} {classifier:30} {top1:7.2f} {'' if top5 is None else f'{top5:.2f}':>7}"
            f"{'  as published' * own}")  # fmt: skip
    leave()


if __name__ == "__main__":
    main()
