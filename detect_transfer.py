"""Fine-tune a pretrained ResNet for COCO detection and instance segmentation, with torchvision's detection parts.

    python detect_transfer.py                                            # on shapes with boxes and masks, from runs/shapes
    python detect_transfer.py --random                                   # the same from random weights, for comparison
    torchrun --nproc_per_node 8 detect_transfer.py --recipe coco-2x --data /data/coco --checkpoint runs/imagenet/backbone.pt
    torchrun --nproc_per_node 8 detect_transfer.py --recipe coco-1x --data /data/coco --checkpoint resnet50.pth --model fpn

`--model c4`, the published protocol: ResNet to its third block group (res4) as features, one level of anchors, RoIAlign, and
the last group (res5), with an extra BN behind it, as the head that boxes and masks share. `--model fpn`: torchvision's
feature pyramid and heads. The AP is pycocotools'. A second run of the same command resumes.

--data is a folder with COCO's names (annotations/instances_train2017.json, train2017/, ...; also without the year, and with
the images in images/train), or give --train-images, --train-annotations, --val-images and --val-annotations.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FrozenBatchNorm2d, roi_align

from linear_eval import Checkpoint, digest_of, read_checkpoint, untrained
from train import (
    MEAN_STD,
    SHAPES,
    Interrupts,
    Log,
    Packed,
    UnreadableImage,
    add_fields,
    any_process,
    at_least,
    build_backbone,
    choose_device,
    choose_precision,
    compare_steps,
    decode,
    distribute,
    fail,
    flag,
    leave,
    leave_together,
    override,
    rank_and_world,
    read,
    restoring,
    resume_point,
    rng,
    run_folder,
    save_all,
    save_atomically,
    say,
    shape_level,
    unify_buffers,
)

# ------------------------------------------------------------------------------------------------------------------
# Recipes: the published configuration (R50-C4 with an extra norm, as MoCo's, in detectron2), apart from the logic


@dataclass(frozen=True)
class Recipe:
    model: str = flag("c4", "c4, the published one, or fpn", choices=["c4", "fpn"])
    masks: bool = flag(True, "Mask R-CNN; without masks, Faster R-CNN")
    norm: str = flag("syncbn", "BN over all processes, of each process, or frozen", choices=["syncbn", "bn", "frozen"])
    trainable_layers: int = flag(5, "of the backbone's five stages (stem and four groups), from the last one")
    images: int = flag(2_880_000, "length of the schedule, in images seen")
    batch_size: int = flag(16, "GLOBAL batch, over all processes")
    base_lr: float = flag(0.02, "learning rate per 16 images of the global batch")
    milestones: tuple[float, ...] = flag((2 / 3, 8 / 9), "fractions of the schedule at which it is divided by 10")
    warmup_images: int = flag(16_000, "linear warm-up from a thousandth")
    weight_decay: float = flag(1e-4, "of weights; BN parameters are spared")
    short_sides: tuple[int, ...] = flag((640, 672, 704, 736, 768, 800), "training: one of these is the short side")
    test_short_side: int = flag(800, "short side in the evaluation")
    long_side: int = flag(1333, "limit of the long side")
    anchors: tuple[int, ...] = flag((32, 64, 128, 256, 512), "sizes, each with ratios 1:2, 1:1, 2:1; fpn: one for a level")
    train_proposals: tuple[int, ...] = flag((12_000, 2000), "before and after NMS, training")
    test_proposals: tuple[int, ...] = flag((6000, 1000), "before and after NMS, evaluation")
    rois: int = flag(512, "regions of an image that train the heads")
    detections: int = flag(100, "of an image, at most")


RECIPES = {
    "coco-2x": Recipe(),
    "coco-1x": Recipe(images=1_440_000),
    # This project's own, for CPUs: small images, few regions.
    "shapes": Recipe(
        images=1600, batch_size=4, base_lr=0.08, warmup_images=160, short_sides=(128,), test_short_side=128, long_side=256,
        anchors=(16, 32, 64), train_proposals=(200, 50), test_proposals=(200, 30), rois=16, detections=10,
    ),
}  # fmt: skip
# As published for FPN: before NMS of each level, after it of all together.
FPN_PROPOSALS = {"train_proposals": (2000, 1000), "test_proposals": (1000, 1000)}


# ------------------------------------------------------------------------------------------------------------------
# Data in COCO's format


def draw_scene(seed: int, index: int, size: int = 128) -> tuple[Tensor, list[int], Tensor]:
    """Up to four shapes on one background, the later ones in front: (3, size, size) uint8, kinds, visible masks (n, size, size)."""
    generator = rng(seed, "scene", index)
    y, x = torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="ij")
    u = torch.rand(4, generator=generator)
    angle = 2 * math.pi * u[0]
    tint = 0.4 * (torch.rand(3, 1, 1, generator=generator) - 0.5)
    image = 0.05 + 0.25 * u[1] + tint + 0.1 * (angle.cos() * (x / size - 0.5) + angle.sin() * (y / size - 0.5))
    kinds, masks = [], []
    for _ in range(1 + int(4 * u[2])):
        v = torch.rand(8, generator=generator)
        radius, turn = 9 + 9 * v[0], (v[1] - 0.5) * (math.pi / 4)
        dx, dy = x - radius - (size - 2 * radius) * v[2], y - radius - (size - 2 * radius) * v[3]
        cos, sin = turn.cos() / radius, turn.sin() / radius
        kinds.append(int(v[4] * len(SHAPES)))
        level = shape_level(kinds[-1], cos * dx + sin * dy, cos * dy - sin * dx) * radius  # in pixels
        image = torch.lerp(image, 0.7 + 0.25 * v[5] + 0.4 * (torch.rand(3, 1, 1, generator=generator) - 0.5),
                           (0.5 + level).clamp(0, 1))  # fmt: skip
        masks = [mask & (level <= 0) for mask in masks] + [level > 0]
    image = (image if u[3] < 0.5 else 1 - image) + 0.03 * torch.randn(3, size, size, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), kinds, torch.stack(masks)


def write_shapes(folder: Path, seed: int, counts: dict[str, int]):
    """Scenes as PNG files and COCO JSON; an object of which fewer than 30 pixels are seen is not annotated."""
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, n in counts.items():
        (folder / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(n):
            image, kinds, masks = draw_scene(seed, i + (1_000_000 if split == "val" else 0))
            torchvision.io.write_png(image, str(folder / split / f"{i}.png"))
            images.append({"id": i, "file_name": f"{i}.png", "height": image.shape[1], "width": image.shape[2]})
            for kind, mask in zip(kinds, masks):
                if mask.sum() >= 30:
                    annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": kind + 1, "iscrowd": 0}
                                       | measured(mask))  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": categories}
        save_atomically(json.dumps(content).encode(), folder / "annotations" / f"instances_{split}.json")


def encode_mask(mask: Tensor) -> dict:
    """(h, w) bool -> COCO's run lengths, as JSON can hold them."""
    runs = rle.encode(mask.to(torch.uint8).T.contiguous().T.numpy())  # columns first, as it demands
    return {"size": list(runs["size"]), "counts": runs["counts"].decode()}


def decode_mask(outline: dict | list, height: int, width: int) -> Tensor:
    """COCO's polygons, run lengths or compressed run lengths -> (h, w) uint8."""
    if isinstance(outline, list):
        outline = rle.merge(rle.frPyObjects(outline, height, width))
    elif isinstance(outline["counts"], list):
        outline = rle.frPyObjects(outline, height, width)
    return torch.from_numpy(rle.decode(outline))


def measured(mask: Tensor) -> dict:
    runs = encode_mask(mask)
    return {"segmentation": runs, "bbox": rle.toBbox(runs).tolist(), "area": float(rle.area(runs))}


def problem(content: dict, masks: bool) -> str | None:
    """The first thing that is wrong with a COCO annotation file. Removes polygons of fewer than three points, as is usual."""

    def numbers(values, count: int) -> bool:
        fine = isinstance(values, list) and len(values) >= count and all(isinstance(v, (int, float)) for v in values)
        return fine and all(map(math.isfinite, values))

    images, categories = ({entry["id"]: entry for entry in content[kind]} for kind in ("images", "categories"))
    if len(images) < len(content["images"]) or len(categories) < len(content["categories"]):
        return "an image id or a category id occurs twice"
    for category in categories.values():
        if not category.get("name"):
            return f"category {category['id']} has no name"
    for i, image in images.items():
        if not isinstance(image["file_name"], str) or not all(isinstance(image[k], int) for k in ("height", "width")):
            return f"image {i} needs a file_name, and height and width as whole numbers"
    for annotation in content["annotations"]:
        name = f"annotation {annotation.get('id')}"
        for key in ("image_id", "category_id", "bbox", "area"):
            if key not in annotation:
                return f"{name} has no {key}"
        if annotation["image_id"] not in images:
            return f"{name} is of image {annotation['image_id']}, which is not listed"
        if annotation["category_id"] not in categories:
            return f"{name} has the unknown category {annotation['category_id']}"
        if not numbers(annotation["bbox"], 4) or len(annotation["bbox"]) > 4 or not numbers([annotation["area"]], 1):
            return f"{name} needs a bbox of four numbers and an area, and has {annotation['bbox']} and {annotation['area']}"
        image, outline = images[annotation["image_id"]], annotation.get("segmentation")
        if isinstance(outline, dict):
            runs, size = outline.get("counts"), [image["height"], image["width"]]
            whole = isinstance(runs, str) or numbers(runs, 1) and sum(runs) == math.prod(size)
            usable = outline.get("size") == size and whole
        else:
            usable = annotation["segmentation"] = [p for p in outline or [] if numbers(p, 6) and len(p) % 2 == 0]
        if masks and not usable:
            return f"{name} has no usable segmentation: polygons, or runs of its image's size. --no-masks trains boxes alone"
    return None


class CocoImages(torch.utils.data.Dataset):
    """Images of a COCO annotation file; for training also targets: boxes (n, 4) as x1 y1 x2 y2, labels from 1 on in the order
    of the category ids, masks (n, h, w). Crowd regions and boxes of less than a pixel are left out. What can be checked
    before the work is checked here: the whole file, that the images exist, and of those for validation the sizes."""

    def __init__(self, folder: Path, annotations: Path, masks: bool, training: bool, seed: int = 0):
        if not annotations.is_file():
            fail(f"{annotations}: no such file")
        if not folder.is_dir():
            fail(f"{folder}: no such folder")
        try:
            content = json.loads(annotations.read_text())
            wrong = problem(content, masks)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{annotations} is no COCO annotation file: {type(error).__name__} {error}")
        if wrong:
            fail(f"{annotations}: {wrong}")
        for i, annotation in enumerate(content["annotations"], start=1):
            annotation["id"] = i  # COCOeval takes 0 for no match, and wants each once
            annotation.setdefault("iscrowd", 0)
        self.coco = COCO()
        self.coco.dataset = content
        with silence():
            self.coco.createIndex()
        self.folder, self.masks, self.training, self.seed, self.annotations = folder, masks, training, seed, annotations
        self.category_ids = sorted(self.coco.cats)
        self.names = [str(self.coco.cats[c]["name"]) for c in self.category_ids]
        self.ids = sorted(self.coco.imgs)
        self.rows = {image_id: row for row, image_id in enumerate(self.ids)}
        self.entries = Packed(json.dumps(self.coco.imgs[i]) for i in self.ids)
        self.outlines = Packed(json.dumps(self.coco.imgToAnns[i]) for i in self.ids)  # apart: long to parse
        missing = [name for name in (self.coco.imgs[i]["file_name"] for i in self.ids) if not (folder / name).is_file()]
        if missing:
            fail(
                f"{annotations} names {missing[0]}, which is not in {folder}; {len(missing)} of {len(self.ids)} images are missing"
            )
        if training:  # as published, images without objects train nothing
            self.ids = [i for i in self.ids if self.objects(i)]
        else:
            for i in self.ids:
                try:
                    with Image.open(self.path(i)) as image:
                        width, height = image.size
                        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF's orientation: on its side
                except OSError:
                    fail(f"{self.path(i)} is no image that can be read")
                self.check_size(i, *((width, height) if turned else (height, width)))
        if not self.ids:
            fail(f"{annotations} holds no images{' with objects' if training else ''}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict:  # what each worker gets a copy of
        return self.__dict__ | {"coco": None}

    def entry(self, image_id: int) -> dict:
        """The file's record of the image, without its annotations."""
        return json.loads(self.entries[self.rows[image_id]])

    def path(self, image_id: int) -> Path:
        return self.folder / self.entry(image_id)["file_name"]

    def check_size(self, image_id: int, height: int, width: int):
        entry = self.entry(image_id)
        if (height, width) != (entry["height"], entry["width"]):
            fail(f"{self.path(image_id)} has {width} x {height} pixels, but {self.annotations} says "
                 f"{entry['width']} x {entry['height']}", alone=True)  # fmt: skip

    def objects(self, image_id: int) -> list[dict]:
        """Its annotations that train: no crowds, and a pixel at least in each direction inside the image."""
        entry, annotations = self.entry(image_id), json.loads(self.outlines[self.rows[image_id]])

        def trains(annotation: dict) -> bool:
            x, y, w, h = annotation["bbox"]
            inside = min(x + w, entry["width"]) - max(x, 0) >= 1 and min(y + h, entry["height"]) - max(y, 0) >= 1
            return inside and not annotation["iscrowd"]

        return [a for a in annotations if trains(a)]

    def target(self, image_id: int) -> dict[str, Tensor]:
        entry, objects = self.entry(image_id), self.objects(image_id)
        height, width = entry["height"], entry["width"]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {"boxes": boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))}
        target["labels"] = torch.tensor([self.category_ids.index(a["category_id"]) + 1 for a in objects], dtype=torch.int64)
        if self.masks:
            masks = [decode_mask(a["segmentation"], height, width) for a in objects]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
        return target

    def __getitem__(self, key):
        """index -> image, image id; for training (position in the schedule, index) -> image, target, flipped or not."""
        image_id = self.ids[key[1] if self.training else key]
        image = decode(self.path(image_id), upright=True)
        if not self.training:
            return image, image_id
        entry = self.entry(image_id)
        if image.shape[1:] != (entry["height"], entry["width"]):
            raise UnreadableImage(f"{self.path(image_id)} has {image.shape[2]} x {image.shape[1]} pixels, but {self.annotations} "
                                  "says otherwise")  # fmt: skip
        target = self.target(image_id)
        if torch.rand((), generator=rng(self.seed, "flip", key[0])) < 0.5:
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            image, target["boxes"] = image.flip(-1), torch.stack([image.shape[2] - x2, y1, image.shape[2] - x1, y2], dim=1)
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return image, target


@contextlib.contextmanager
def silence():
    """pycocotools prints its progress."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def find_data(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """For train and val the folder of images and the annotation file: as given one by one, or found in --data."""
    given = {(s, kind): getattr(args, f"{s}_{kind}") for s in ("train", "val") for kind in ("images", "annotations")}
    root = Path(args.data or "runs/shapes_coco")
    if not args.data and not any(given.values()):
        if args.recipe != "shapes":
            fail(f"--recipe {args.recipe} needs --data FOLDER")
        if not (root / "annotations" / "instances_val.json").exists() and rank_and_world()[0] == 0:  # written last
            say(f"drawing shapes with boxes and masks into {root}")
            try:
                write_shapes(root, seed=0, counts={"train": 400, "val": 100})
            except OSError as error:
                fail(f"{root} cannot be written: {error}", alone=True)
        if dist.is_initialized():
            dist.barrier()
    elif not args.data and not all(given.values()):
        fail("without --data, --train-images, --train-annotations, --val-images and --val-annotations go together")
    elif args.data and not root.is_dir():
        fail(f"--data {root}: no such folder")
    found = {}
    for (split, kind), path in given.items():
        names = [split, f"{split}2017", f"{split}2014"]
        if kind == "annotations":
            places = [root / "annotations" / f"instances_{name}.json" for name in names]
        else:
            places = [root / name for name in names] + [root / "images" / name for name in names]
        places = [Path(path)] if path else [place for place in places if place.exists()] or places
        if not places[0].exists():
            tried = ", ".join(map(str, places))
            fail(f"no {kind} for {split}: tried {tried}. --{split}-{kind} names them")
        found[split, kind] = places[0]
    return {split: (found[split, "images"], found[split, "annotations"]) for split in ("train", "val")}


class Stream:
    """This process's share of every batch from `step` on: keys (position in the schedule, index). Epochs follow each other
    without a gap, each in an order of its own."""

    def __init__(self, n: int, batch: int, seed: int, step: int, steps: int):
        self.n, self.batch, self.seed, self.step, self.steps = n, batch, seed, step, steps

    def __iter__(self):
        rank, world = rank_and_world()
        epoch, order = None, []
        for step in range(self.step, self.steps):
            keys = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.n != epoch:
                    epoch = position // self.n
                    order = torch.randperm(self.n, generator=rng(self.seed, "order", epoch)).tolist()
                keys.append((position, order[position % self.n]))
            yield keys[rank::world]


# ------------------------------------------------------------------------------------------------------------------
# Models


class Float32(nn.Module):
    """A part of the network under autocast, with float32 results: all around it, boxes and losses, is not halved."""

    def __init__(self, part: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.part, self.dtype = part, dtype
        if hasattr(part, "out_channels"):
            self.out_channels = part.out_channels

    def forward(self, x: Tensor):
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            y = self.part(x)
        return OrderedDict((k, v.float()) for k, v in y.items()) if isinstance(y, dict) else y.float()


class Trunk(nn.Module):
    """A ResNet up to its third group of blocks (res4): (b, 3, h, w) -> {"0": (b, out_channels, h / 16, w / 16)}, and h / 4 for
    the stem `cifar`."""

    def __init__(self, resnet: nn.Module):
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            setattr(self, name, getattr(resnet, name))
        self.out_channels = resnet.layer4[0].conv1.in_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for part in self.children():
            x = part(x)
        return OrderedDict([("0", x)])


class AlignedRoIs(nn.Module):
    """RoIAlign without the half-pixel offset (aligned), as the published results have it and torchvision's pooler has not."""

    def __init__(self, stride: int, size: int = 14):
        super().__init__()
        self.stride, self.size = stride, size

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list) -> Tensor:
        return roi_align(features["0"], boxes, self.size, 1 / self.stride, sampling_ratio=0, aligned=True)


class L1Proposals(RegionProposalNetwork):
    """With the published L1 loss of the boxes, where torchvision has a smooth one."""

    def compute_loss(self, objectness, deltas, labels, targets):
        positive, negative = (torch.cat(chosen).nonzero()[:, 0] for chosen in self.fg_bg_sampler(labels))
        sampled, labels, targets = torch.cat([positive, negative]), torch.cat(labels), torch.cat(targets)
        box = F.l1_loss(deltas[positive], targets[positive], reduction="sum") / len(sampled)
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled]), box


class C4Heads(roi_heads.RoIHeads):
    """Boxes and masks from the same res5 features: run once in training, where the masks' regions are among the boxes';
    once more on the detected boxes in the evaluation."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        shared = self.box_head(self.box_roi_pool(features, proposals, image_shapes))  # (n, width, 7, 7)
        logits, deltas = self.box_predictor(shared.mean((2, 3)))  # (n, classes), (n, 4 classes)
        if self.training:
            kinds, inside = torch.cat(labels), [l > 0 for l in labels]
            positive = torch.cat(inside)
            own = deltas.view(len(deltas), -1, 4)[positive, kinds[positive]]  # (positives, 4)
            box = F.l1_loss(own, torch.cat(regression)[positive], reduction="sum") / len(kinds)
            losses = {"loss_classifier": F.cross_entropy(logits, kinds), "loss_box_reg": box}
            if self.mask_predictor is not None:
                own = self.mask_predictor(shared[positive])[
                    range(int(positive.sum())), kinds[positive]
                ]  # (positives, 14, 14)
                boxes, truths = [p[i] for p, i in zip(proposals, inside)], [m[i] for m, i in zip(matched, inside)]
                wanted = [crop_masks(t["masks"][i], b, own.shape[-1]) for t, i, b in zip(targets, truths, boxes)]
                losses["loss_mask"] = (
                    F.binary_cross_entropy_with_logits(own, torch.cat(wanted)) if len(own) else 0 * own.sum()
                )
            return [], losses
        found = zip(*self.postprocess_detections(logits, deltas, proposals, image_shapes))
        result = [dict(zip(("boxes", "scores", "labels"), image)) for image in found]
        if self.mask_predictor is not None:
            boxes = [r["boxes"] for r in result]
            shared = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
            masks = roi_heads.maskrcnn_inference(self.mask_predictor(shared), [r["labels"] for r in result])
            for r, m in zip(result, masks):
                r["masks"] = m
        return result, {}


def crop_masks(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What a mask head should say: masks (n, h, w) inside boxes (n, 4), as 0 or 1 (n, size, size)."""
    rois = torch.cat([torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes), boxes], dim=1)
    return (roi_align(masks[:, None].float(), rois, size, aligned=True)[:, 0] >= 0.5).float()


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Probabilities (n, 1, s, s) inside boxes (n, 4) -> (n, height, width) bool, sampled at the pixels' centres."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)  # (n, 1)
    x = (torch.arange(width, device=boxes.device) + 0.5 - x1) / (x2 - x1) * 2 - 1  # (n, width), -1 to 1 in the box
    y = (torch.arange(height, device=boxes.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    whole = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):  # one at a time: a hundred large ones are gigabytes
        grid = torch.stack(torch.meshgrid(x[i], y[i], indexing="xy"), dim=-1)[None]  # (1, height, width, 2)
        whole[i] = F.grid_sample(masks[i : i + 1], grid, align_corners=False)[0, 0] >= 0.5
    return whole


class Transform(GeneralizedRCNNTransform):
    """torchvision's, but masks are pasted without rounding the boxes to whole pixels."""

    def postprocess(self, result, image_shapes, original_image_sizes):
        if not self.training:
            for found, shape, (height, width) in zip(result, image_shapes, original_image_sizes):
                found["boxes"] = resize_boxes(found["boxes"], shape, (height, width))
                if "masks" in found:
                    found["masks"] = paste_masks(found["masks"], found["boxes"], height, width)
        return result


def build_detector(recipe: Recipe, checkpoint: Checkpoint, random: bool, classes: int, dtype: torch.dtype) -> GeneralizedRCNN:
    """`classes`: with the background. The backbone's weights are the checkpoint's, or random."""
    resnet, width = build_backbone(checkpoint.arch, checkpoint.stem, checkpoint.size)
    if not random:
        resnet.load_state_dict(checkpoint.state)
    stages = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
    still = {name for stage in stages[: 5 - recipe.trainable_layers] for name in stage}
    for name in still:
        getattr(resnet, name).requires_grad_(False)
    freeze_norms(resnet, None if recipe.norm == "frozen" else still)
    mean, std = MEAN_STD[checkpoint.config.get("dataset", "folder")]
    norm = None if recipe.norm == "frozen" else nn.BatchNorm2d
    ratios, levels = (0.5, 1.0, 2.0), len(recipe.anchors)
    if recipe.model == "fpn":
        channels = [layer[0].conv1.in_channels for layer in (resnet.layer2, resnet.layer3, resnet.layer4)] + [width]
        backbone = BackboneWithFPN(resnet, {f"layer{i + 1}": str(i) for i in range(4)}, channels, 256, norm_layer=norm)
        model = (MaskRCNN if recipe.masks else FasterRCNN)(
            Float32(backbone, dtype), classes,
            rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in recipe.anchors), (ratios,) * levels),
            rpn_pre_nms_top_n_train=recipe.train_proposals[0], rpn_post_nms_top_n_train=recipe.train_proposals[1],
            rpn_pre_nms_top_n_test=recipe.test_proposals[0], rpn_post_nms_top_n_test=recipe.test_proposals[1],
            box_batch_size_per_image=recipe.rois, box_detections_per_img=recipe.detections,
        )  # fmt: skip
    else:
        backbone, head = Trunk(resnet), [resnet.layer4] + ([norm(width)] if norm else [])
        rpn = L1Proposals(
            AnchorGenerator((recipe.anchors,), (ratios,)), RPNHead(backbone.out_channels, 3 * levels),
            fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5, nms_thresh=0.7,
            pre_nms_top_n={"training": recipe.train_proposals[0], "testing": recipe.test_proposals[0]},
            post_nms_top_n={"training": recipe.train_proposals[1], "testing": recipe.test_proposals[1]},
        )  # fmt: skip
        boxes, masks = FastRCNNPredictor(width, classes), MaskRCNNPredictor(width, 256, classes) if recipe.masks else None
        for layer, deviation in ((boxes.cls_score, 0.01), (boxes.bbox_pred, 0.001), (masks and masks.mask_fcn_logits, 0.001)):
            if layer is not None:
                nn.init.normal_(layer.weight, std=deviation)
                nn.init.zeros_(layer.bias)
        heads = C4Heads(
            AlignedRoIs(4 if checkpoint.stem == "cifar" else 16), Float32(nn.Sequential(*head), dtype), boxes,
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=recipe.rois, positive_fraction=0.25,
            bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5, detections_per_img=recipe.detections, mask_predictor=masks,
        )  # fmt: skip
        model = GeneralizedRCNN(Float32(backbone, dtype), rpn, heads, None)
    model.transform = Transform(recipe.short_sides, recipe.long_side, mean, std)
    return model


def freeze_norms(module: nn.Module, names: set[str] | None = None):
    """BN, of all children or those with these names, becomes a fixed affine map by its statistics, the checkpoint's."""
    for name, child in module.named_children():
        if names is not None and name not in names:
            continue
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, frozen)
        else:
            freeze_norms(child)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Of step 0, 1, ...: linear warm-up, then divided by 10 at each milestone."""
    seen, peak = step * recipe.batch_size, recipe.base_lr * recipe.batch_size / 16
    factor = 0.1 ** sum(seen >= m * recipe.images for m in recipe.milestones)
    if seen < recipe.warmup_images:
        factor *= 0.001 + 0.999 * seen / recipe.warmup_images
    return peak * factor


# ------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def predict(model: nn.Module, data: CocoImages, recipe: Recipe, device: torch.device, workers: int) -> list[dict]:
    """COCO's results of every image once, with box and mask; each process does its share, one image at a time."""
    rank, world = rank_and_world()
    model.eval()
    model.transform.min_size = (recipe.test_short_side,)
    results, mine = [], range(rank, len(data), world)
    for image, image_id in read(data, workers, batch_size=None, sampler=list(mine)):
        (found,) = model([image.to(device).float() / 255])
        results += as_results(found, image_id, data)
    model.transform.min_size = recipe.short_sides
    model.train()
    if world > 1:
        dist.all_gather_object(shares := [None] * world, results)
        results = sorted(sum(shares, []), key=lambda r: r["image_id"])
    return results


def as_results(found: dict[str, Tensor], image_id: int, data: CocoImages) -> list[dict]:
    """Boxes (n, 4), labels, scores and masks (n, h, w) as COCO's results."""
    found = {name: value.cpu() for name, value in found.items()}
    boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], dim=1)
    results = [
        {"image_id": image_id, "category_id": data.category_ids[label - 1], "score": score, "bbox": box}
        for label, score, box in zip(found["labels"].tolist(), found["scores"].tolist(), boxes.tolist())
    ]
    for result, mask in zip(results, found.get("masks", ())):
        result["segmentation"] = encode_mask(mask)
    return results


def average_precision(data: CocoImages, results: list[dict], folder: Path) -> dict[str, list[float]]:
    """COCO's six AP in percent (0.5:0.95, 0.5, 0.75, small, medium, large) of boxes and, if there are any, masks. The
    results are written in COCO's format, for each kind a file of its own: with a box beside it, a mask's area would be
    the box's."""
    ap = {}
    for kind, _, other in (("bbox", "bbox", "segmentation"), ("segm", "segmentation", "bbox"))[: 1 + data.masks]:
        own = [{k: v for k, v in r.items() if k != other} for r in results]
        save_atomically(json.dumps(own).encode(), folder / f"results_{kind}.json")
        ap[kind] = [0.0] * 6
        if own:
            with silence():
                evaluation = COCOeval(data.coco, data.coco.loadRes(own), kind)
                evaluation.params.imgIds = data.ids
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            ap[kind] = [100 * v if v >= 0 else math.nan for v in evaluation.stats[:6]]  # -1: no objects of that size
    return ap


def draw_results(data: CocoImages, results: list[dict], path: Path, n: int = 6, side: int = 320):
    """A PNG: above the ground truth of n images, below what was found with a score of at least 0.5."""
    pictures = []
    for image_id in data.ids[:: max(1, len(data.ids) // n)][:n]:
        image, truth = decode(data.path(image_id), upright=True), data.objects(image_id)
        found = [r for r in results if r["image_id"] == image_id and r["score"] >= 0.5]
        for objects in (truth, found):
            picture = image
            if objects:
                kinds = [data.category_ids.index(o["category_id"]) for o in objects]
                colours = [tuple(int(c) for c in torch.randint(64, 256, (3,), generator=rng("colour", k))) for k in kinds]
                if data.masks:
                    masks = torch.stack([decode_mask(o["segmentation"], *image.shape[1:]) for o in objects])
                    picture = torchvision.utils.draw_segmentation_masks(picture, masks.bool(), alpha=0.4, colors=colours)
                boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32)
                boxes[:, 2:] += boxes[:, :2]
                names = [data.names[k] + (f" {o['score']:.2f}" if "score" in o else "") for k, o in zip(kinds, objects)]
                picture = torchvision.utils.draw_bounding_boxes(picture, boxes, names, colours, width=2)
            height, width = picture.shape[1:]
            scale = side / max(height, width)
            picture = torchvision.transforms.v2.functional.resize(picture, [round(height * scale), round(width * scale)])
            pictures.append(F.pad(picture, (0, side - picture.shape[2], 0, side - picture.shape[1]), value=255))
    ordered = pictures[0::2] + pictures[1::2]
    torchvision.io.write_png(torchvision.utils.make_grid(ordered, len(ordered) // 2, pad_value=255), str(path))


# ------------------------------------------------------------------------------------------------------------------
# Command line, and the run


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--recipe",
        default="shapes",
        choices=RECIPES,
        help="settings (default: shapes; published: coco-2x; coco-1x: half of it)",
    )
    add("--data", help="folder in COCO's layout (default: shapes, drawn into runs/shapes_coco)")
    for split in ("train", "val"):
        add(f"--{split}-images", help=f"instead of --data: folder of the {split} images")
        add(f"--{split}-annotations", help=f"instead of --data: their COCO JSON ({split})")
    add("--checkpoint", help="of the backbone, anybody's (default for shapes: runs/shapes/checkpoint.pt)")
    add("--arch", help="its architecture, where the file does not tell")
    add("--stem", choices=["imagenet", "cifar", "small"], help="its first layers, where the file does not tell")
    add("--random", action="store_true", help="random weights in the checkpoint's architecture, for comparison")
    add("--output", help="folder of the run (default: runs/detect_<recipe>)")
    add("--seed", type=int, default=0, help="of the heads' weights, the order and the regions drawn")
    add("--fresh", action="store_true", help="start over; an earlier run is kept under another name")
    add("--evaluations", type=int, default=2, help="how often in the schedule AP is measured")
    add("--max-steps", type=int, help="stop after this many steps of the schedule")
    add("--log-every", type=int, default=20, help="steps between two lines")
    add("--save-every", type=int, default=1000, help="steps between two checkpoints")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode, for each process")
    add("--precision", default="auto", choices=["auto", "bfloat16", "float16", "float32"], help="of the backbone")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add_fields(parser, Recipe)
    args = parser.parse_args(argv)
    recipe, given = override(RECIPES[args.recipe], args)
    if recipe.model == "fpn":
        recipe = replace(recipe, **{k: v for k, v in FPN_PROPOSALS.items() if k not in given and args.recipe != "shapes"})
    return args, recipe


def check(recipe: Recipe, args: argparse.Namespace):
    world = rank_and_world()[1]
    least = {"images": 1, "batch_size": 1, "warmup_images": 0, "base_lr": 0, "weight_decay": 0, "trainable_layers": 0}
    least |= {"rois": 1, "detections": 1, "test_short_side": 32, "long_side": 32, "evaluations": 1, "max_steps": 1}
    at_least(least | {"log_every": 1, "save_every": 1, "workers": 0, "seed": 0}, recipe, args)
    if recipe.trainable_layers > 5:
        fail(f"--trainable-layers: a ResNet has five stages, got {recipe.trainable_layers}")
    if recipe.batch_size % world:
        fail(f"--batch-size {recipe.batch_size}, the global batch, is not divisible by {world} processes")
    if min(recipe.short_sides) < 32:
        fail(f"--short-sides must be at least 32, got {min(recipe.short_sides)}")
    for name in ("train_proposals", "test_proposals"):
        if len(getattr(recipe, name)) != 2 or min(getattr(recipe, name)) < 1:
            fail(f"--{name.replace('_', '-')} takes two numbers: before and after NMS")
    if recipe.model == "fpn" and len(recipe.anchors) != 5:
        fail(f"--model fpn has five levels: --anchors needs five sizes, got {len(recipe.anchors)}")
    if min(recipe.anchors) < 1 or not all(0 <= m <= 1 for m in recipe.milestones):
        fail("--anchors are sizes in pixels, --milestones fractions between 0 and 1")


@leave_together
def main(argv: list[str] | None = None):
    args, recipe = parse(argv)
    check(recipe, args)
    folder, fresh = run_folder(args, f"runs/detect_{args.recipe}{'_random' * args.random}")
    device = choose_device(args.device)
    dtype, reason = choose_precision(args.precision, device)
    rank, world = rank_and_world()
    if args.random and args.arch and not args.checkpoint:
        checkpoint = untrained(args.arch, args.stem, None)
    elif args.checkpoint or args.recipe == "shapes":
        args.checkpoint = args.checkpoint or "runs/shapes/checkpoint.pt"
        checkpoint = read_checkpoint(Path(args.checkpoint), args.arch, args.stem)
    else:
        fail(f"--recipe {args.recipe} needs --checkpoint FILE, or --random --arch NAME")
    if not checkpoint.arch.startswith(("resn", "wide_resnet")):
        fail(f"{checkpoint.arch}: detection needs a ResNet")
    found = find_data(args)
    train, val = (CocoImages(*found[split], recipe.masks, split == "train", args.seed) for split in ("train", "val"))
    different = [f"{a!r} and {b!r}" for a, b in itertools.zip_longest(train.names, val.names) if a != b]
    if different:
        fail(f"{train.annotations} and {val.annotations} have different categories by order of their ids: {different[0]}")
    steps = max(1, recipe.images // recipe.batch_size)
    last = min(steps, args.max_steps or steps)
    config = dataclasses.asdict(recipe) | {"recipe": args.recipe, "seed": args.seed, "train_images": len(train)}
    weights = "random" if args.random else f"{args.checkpoint} ({digest_of(checkpoint.state)})"
    config |= {"data": str(train.annotations), "weights": weights}
    config = json.loads(json.dumps(config | {"arch": checkpoint.arch, "stem": checkpoint.stem}))
    saved = resume_point(folder, config, fresh, {"step", "model", "optimizer", "scaler"})

    torch.manual_seed(args.seed)
    model = build_detector(recipe, checkpoint, args.random, 1 + len(train.names), dtype)
    model = model.to(device, memory_format=torch.channels_last)
    if recipe.norm == "syncbn" and world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for p in m.parameters()}
    spared, decayed = ([p for p in model.parameters() if p.requires_grad and (id(p) in norms) == b] for b in (True, False))
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=0.0, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step = 0
    if saved:
        step = saved["step"]
        with restoring(folder / "checkpoint.pt"):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"]) if saved["scaler"] else None
    wrapped = distribute(model, device)

    log = Log.start(folder, config, fresh, step)
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == b) / 1e6 for b in (True, False))
    say("configuration: " + ", ".join(f"{name} {value}" for name, value in config.items()))
    say(f"{checkpoint.arch} {recipe.model} with {'RANDOM weights' if args.random else args.checkpoint}; "
        f"{trained:.2f} M parameters train, {frozen:.2f} M are frozen")  # fmt: skip
    say(f"{len(train)} training images with objects, {len(val)} validation images, {len(train.names)} categories; {steps} steps "
        f"of {recipe.batch_size} images on {world} process(es); learning rate {recipe.base_lr} x {recipe.batch_size}/16 = "
        f"{recipe.base_lr * recipe.batch_size / 16:g}")  # fmt: skip
    say(f"{device}, {str(dtype).removeprefix('torch.')}: {reason}; output {folder}")

    norm = "per process, since SyncBatchNorm is for GPUs" if world > 1 and device.type == "cpu" else "over all processes"
    say(f"norm {recipe.norm}{f': BN {norm}' * (recipe.norm == 'syncbn')}")

    def evaluate():
        started = time.time()
        unify_buffers(model)
        results = predict(model, val, recipe, device, args.workers)
        if rank == 0:
            try:
                ap = average_precision(val, results, folder)
                draw_results(val, results, folder / "predictions.png")
            except (OSError, RuntimeError) as error:
                fail(f"{folder} cannot be written: {error}. Its checkpoint.pt is complete", alone=True)
            numbers, lines = {"step": step, "evaluation_seconds": time.time() - started}, []
            for kind, six in ap.items():
                named = {name: v for name, v in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), six) if not math.isnan(v)}
                numbers |= {f"{kind}_{name}": v for name, v in named.items()}
                values = "  ".join(f"{name} {v:.1f}" for name, v in named.items())
                lines.append(f"{'box' if kind == 'bbox' else 'mask'} {values}")
            log.write(f"step {step}/{steps}, {len(val)} images:  {'  |  '.join(lines)}", **numbers)

    def save():
        if rank == 0:
            state = {"config": config, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_all({folder / "checkpoint.pt": state | {"scaler": scaler.state_dict()}})

    interrupts, first, training, waited, pause = Interrupts(), step, 0.0, 0.0, time.time()
    compare_steps(step)
    if saved:
        say(f"resuming at step {step} of {steps}")
    stream = Stream(len(train), recipe.batch_size, args.seed, step, last)
    batches = read(train, args.workers, batch_sampler=stream, collate_fn=list)
    model.train()
    while step < last:
        begin = time.time()
        images, targets = zip(*next(batches))
        waited += time.time() - begin
        images = [x.to(device, non_blocking=True).float() / 255 for x in images]
        targets = [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in targets]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        torch.manual_seed(rng(args.seed, "regions", step, rank).initial_seed())  # sizes and regions are drawn from here
        losses = wrapped(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        step += 1
        logs, saves = step % args.log_every == 0, step % args.save_every == 0
        measures = step == last or step * args.evaluations // steps > (step - 1) * args.evaluations // steps
        stop = (world == 1 or logs or saves or measures) and any_process(interrupts.received, device)
        if logs or saves or measures or stop:
            numbers = {"loss": loss.item(), **{k.removeprefix("loss_"): v.item() for k, v in losses.items()}}
            if any_process(not math.isfinite(numbers["loss"]), device):
                fail(f"the loss is not finite at step {step}: {numbers}. What was saved in {folder} is kept. A lower --base-lr "
                     "or a longer --warmup-images may help")  # fmt: skip
            training += time.time() - pause  # measured where the line above has waited for the device
            pause, seconds = time.time(), training / (step - first)
            text = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items() if k != "loss")
            numbers |= {"step": step, "lr": optimizer.param_groups[0]["lr"], "waiting": waited / training}
            numbers["images_per_second"] = recipe.batch_size / seconds
            if log:
                log.write(f"step {step}/{steps}  loss {numbers['loss']:.3f} ({text})  lr {numbers['lr']:.5f}  "
                          f"{numbers['images_per_second']:.1f} images/s, {100 * numbers['waiting']:.0f} % waiting for data  "
                          f"ETA {(last - step) * seconds / 60:.1f} min", **numbers)  # fmt: skip
        if saves or measures or stop:
            save()
        if stop:
            say(f"told to stop: saved at step {step} of {steps}; the same command goes on from there")
            break
        if measures:
            evaluate()
            pause = time.time()
    if step >= last and step == first:  # nothing was left to do but to measure
        evaluate()
    batches.close()
    interrupts.restore()
    leave(log)


if __name__ == "__main__":
    importlib.import_module(Path(__file__).stem).main()  # workers know its classes by this name
