"""Fine-tune a pretrained ResNet for COCO detection and instance segmentation.

    python detect_transfer.py            # shapes with boxes and masks, from runs/shapes
    python detect_transfer.py --random   # the same from random weights, for comparison
    torchrun --nproc_per_node 8 detect_transfer.py --recipe coco-2x --data coco --checkpoint r50.pth
    torchrun --nproc_per_node 8 detect_transfer.py --recipe coco-1x --data coco --model fpn

--model c4 is the published protocol: the ResNet up to res4 gives one level of features; res5 and
an extra BN, on RoIAlign's output, are the head that boxes and masks share. --model fpn is
torchvision's own Mask R-CNN. Both train in float32.

--data has COCO's layout: annotations/instances_train2017.json and train2017/ or images/train2017/,
the same for val, with or without the year. Masks are trained if the annotations have them. Rerun
the same command to resume.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d, RoIAlign, box_convert, clip_boxes_to_image, roi_align
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid, save_image

from linear_eval import add_backbone_flags, read_backbone
from train import (
    MEAN_STD,
    RANK,
    SHAPES,
    STEMS,
    WORLD,
    HelpFormatter,
    Logger,
    SharedList,
    add_common_flags,
    batch_indices,
    convert_batch_norm,
    decode_image,
    distributed,
    draw_scene,
    fraction,
    lock_output_dir,
    make_loader,
    non_negative,
    positive_int,
    print_rank0,
    resume_run,
    rng,
    save_checkpoint,
    seed_from,
    throughput,
    wrap_ddp,
)

# fmt: off
RECIPES = {
    # Small enough for a CPU; not from the papers.
    "shapes": {
        "images": 1600, "batch_size": 4, "base_lr": 0.08, "warmup_images": 160,
        "short_sides": [128], "test_short_side": 128, "long_side": 256, "anchors": [16, 32, 64],
        "train_proposals": [200, 50], "test_proposals": [200, 30], "rois": 16, "detections": 10,
    },
    # As in MoCo's and INTL's configurations of detectron2: R50-C4 with an extra norm.
    "coco-2x": {"year": "2017"},
    "coco-1x": {"year": "2017", "images": 1_440_000},
}
# Flags that may differ when a run is resumed.
MAY_CHANGE_ON_RESUME = [
    "data", "output", "max_steps", "evaluations", "workers", "log_every", "save_minutes", "device",
]
# fmt: on


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_common_flags(parser)
    add_backbone_flags(parser)
    # fmt: off
    add = parser.add_argument
    add("--recipe", default="shapes", choices=RECIPES,
        help="coco-2x: the published schedule; coco-1x: half as long; shapes is a toy")
    add("--data", type=Path, help="folder in COCO's layout (default: shapes, drawn into --output)")
    add("--evaluations", type=positive_int, default=2, help="how often the schedule measures AP")
    add("--max-steps", type=positive_int, help="stop after this many steps of the schedule")

    add = parser.add_argument_group("settings; a recipe changes the defaults").add_argument
    add("--year", help="choose the annotations and images of this year, if --data has several")
    add("--masks", action=argparse.BooleanOptionalAction, default=True,
        help="train masks, too, if there are any")
    add("--model", default="c4", choices=["c4", "fpn"], help="c4: published; fpn: torchvision's")
    add("--norm", default="syncbn", choices=["syncbn", "bn", "frozen"],
        help="BN over the global batch; over each process's share; or as pretrained, not trained")
    add("--images", type=positive_int, default=2_880_000, help="length of the schedule, in images")
    add("--batch-size", type=positive_int, default=16, help="GLOBAL batch size, over all processes")
    add("--base-lr", type=non_negative, default=0.02, help="learning rate per 16 images of a batch")
    add("--milestones", type=fraction, nargs="*", default=[2 / 3, 8 / 9],
        help="fractions of the schedule after which the learning rate is divided by 10")
    add("--warmup-images", type=non_negative, default=16_000, help="linear warm-up from 1/1000")
    add("--weight-decay", type=non_negative, default=1e-4, help="of all but BN parameters")
    add("--short-sides", type=positive_int, nargs="+", default=[640, 672, 704, 736, 768, 800],
        help="training images are resized to one of these, at random")
    add("--test-short-side", type=positive_int, default=800, help="short side in the evaluation")
    add("--long-side", type=positive_int, default=1333, help="upper limit of the long side")
    add("--anchors", type=positive_int, nargs="+", default=[32, 64, 128, 256, 512],
        help="sizes, each with aspect ratios 1:2, 1:1 and 2:1; with fpn one size per level")
    add("--train-proposals", type=positive_int, nargs=2, default=[12_000, 2000],
        help="proposals before and after NMS")
    add("--test-proposals", type=positive_int, nargs=2, default=[6000, 1000],
        help="the same in the evaluation; published for fpn: 1000 1000")
    add("--rois", type=positive_int, default=512, help="regions per image that train the heads")
    add("--detections", type=positive_int, default=100, help="limit of detections per image")
    # fmt: on

    # A first pass finds the recipe, whose settings then become the defaults.
    recipe_parser = argparse.ArgumentParser(add_help=False)
    recipe_parser.add_argument("--recipe", default="shapes")
    recipe = recipe_parser.parse_known_args(argv)[0].recipe
    parser.set_defaults(**RECIPES.get(recipe, {}))
    args = parser.parse_args(argv)

    if args.recipe != "shapes" and args.data is None:
        parser.error(f"--recipe {args.recipe} needs --data FOLDER")
    if args.model == "fpn" and len(args.anchors) != 5:
        parser.error("--model fpn has five levels and needs a size of --anchors for each")
    if args.batch_size % WORLD:
        parser.error(f"--batch-size {args.batch_size} is the global batch, of {WORLD} processes")
    if args.images < args.batch_size:
        parser.error(f"--images {args.images} do not fill one --batch-size {args.batch_size}")
    if args.output is None:
        suffix = "_random" if args.random else ""
        args.output = Path(f"runs/detect_{args.recipe}{suffix}")
    return args


# --- Masks in COCO's formats, and the data set of shapes ------------------------------------------


def encode_mask(mask: Tensor) -> dict:
    """(h, w) bool -> COCO's compressed run lengths, which JSON can store."""
    columns_first = (
        mask.to(torch.uint8).T.contiguous().T
    )  # the memory layout that pycocotools reads
    runs = rle.encode(columns_first.numpy())
    return {"size": list(runs["size"]), "counts": runs["counts"].decode()}


def decode_mask(segmentation: dict | list, height: int, width: int) -> Tensor:
    """COCO's polygons, run lengths or compressed run lengths -> (h, w) uint8."""
    if isinstance(segmentation, list):
        runs = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = rle.frPyObjects(segmentation, height, width)
    else:
        runs = segmentation
    return torch.from_numpy(rle.decode(runs))


def write_shapes(folder: Path, seed: int, counts: dict[str, int]):
    """Scenes of one to four shapes in COCO's layout; `counts`: images per split. A shape of which
    fewer than 30 pixels are visible is not annotated."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]
    for split, n_images in counts.items():
        (folder / split).mkdir(exist_ok=True)
        images = []
        annotations = []
        for i in range(n_images):
            key = i + 1_000_000 if split == "val" else i
            n_shapes = 1 + i % 4
            generator = rng(seed, "kinds", key)
            shapes = torch.randint(len(SHAPES), (n_shapes,), generator=generator).tolist()
            image, masks = draw_scene(seed, key, 128, shapes, 0.14, 0.28)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 128, "width": 128})

            for shape, mask in zip(shapes, masks):
                if mask.sum() < 30:
                    continue
                segmentation = encode_mask(mask)
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": shape + 1,
                    "iscrowd": 0,
                    "segmentation": segmentation,
                    "bbox": rle.toBbox(segmentation).tolist(),
                    "area": float(rle.area(segmentation)),
                }
                annotations.append(annotation)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


# --- Data in COCO's layout ------------------------------------------------------------------------


def find_split(root: Path, split: str, year: str | None) -> tuple[Path, Path]:
    """The annotation file and the image folder of a split: of this year, or without one. If no year
    is asked for, there must be only one. The folder never has another year than the file."""
    choices = [[split, f"{split}20??"], [f"{split}*"]]
    if year:
        choices = [[f"{split}{year}"], [split]]
    file = find_path(root, [[f"annotations/instances_{name}.json" for name in c] for c in choices])

    name = file.stem.removeprefix("instances_")  # e.g. train2017, or train
    names = [split, f"{split}*"] if name == split else [name, split]
    folder = find_path(root, [[f"{name}/", f"images/{name}/"] for name in names])
    return file, folder


def find_path(root: Path, choices: list[list[str]]) -> Path:
    """The match of the first list of patterns that has one. Several are an error, since otherwise
    the alphabet would decide. A pattern that ends in a slash matches only folders."""
    for patterns in choices:
        matches = []
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                if path.is_dir() or not pattern.endswith("/"):
                    matches.append(path)
        if len(matches) > 1:
            names = ", ".join(str(path) for path in matches)
            sys.exit(f"--data {root} is ambiguous: {names}. Choose by --year, or leave only one")
        if matches:
            return matches[0]
    names = " nor ".join(pattern for patterns in choices for pattern in patterns)
    sys.exit(f"--data {root} has no {names}")


def read_coco(file: Path) -> COCO:
    """pycocotools' index of an annotation file. Everything in the file is checked here. pycocotools
    does not check: it takes a polygon of four numbers for a box, and NaNs, coordinates far outside
    the image or wrong run lengths give a wrong mask, an endless loop or a crash, hours later."""
    coco = COCO()
    gc.disable()  # otherwise half of the time: it visits the millions of new lists again and again
    try:
        coco.dataset = json.loads(file.read_bytes())
        images = list(coco.dataset["images"])
        categories = list(coco.dataset["categories"])
        annotations = list(coco.dataset["annotations"])
    except (KeyError, TypeError, ValueError) as error:
        sys.exit(f"{file} is not a COCO annotation file: {error!r}")
    finally:
        gc.enable()

    images_by_id = check_entries(file, "image", images, check_image)
    categories_by_id = check_entries(file, "category", categories, lambda category: None)

    def check(annotation: dict):
        check_annotation(annotation, images_by_id, categories_by_id)

    check_entries(file, "annotation", annotations, check)
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number  # COCOeval takes the id 0 for "no match"
    with contextlib.redirect_stdout(None):  # pycocotools prints its progress
        coco.createIndex()
    return coco


def check_entries(file: Path, kind: str, entries: list[dict], check: Callable) -> dict:
    """The entries by their id. Exits at the first for which `check` raises an error."""
    by_id = {}
    for number, entry in enumerate(entries, start=1):
        entry_id = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(entry_id, (int, str)):
            sys.exit(f"{file}: {kind} number {number} has no id (an integer or a string)")
        if entry_id in by_id:
            sys.exit(f"{file}: {kind} {entry_id!r}: this id occurs twice")
        try:
            check(entry)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            sys.exit(f"{file}: {kind} {entry_id!r}: {error}")
        by_id[entry_id] = entry
    if len({type(entry_id) for entry_id in by_id}) > 1:
        sys.exit(f"{file}: {kind}: some ids are integers, others strings")
    return by_id


def check_image(image: dict):
    if not isinstance(image.get("file_name"), str):
        raise ValueError("it has no file_name")
    for name in ("height", "width"):
        if not isinstance(image.get(name), int) or image[name] < 1:
            raise ValueError(f"its {name} is {image.get(name)!r}, not a positive integer")


def check_annotation(annotation: dict, images: dict, categories: dict):
    """Raises an error, or completes the entries that are used later."""
    image = images.get(annotation.get("image_id"))
    if image is None:
        raise ValueError(f"there is no image with its image_id {annotation.get('image_id')!r}")
    if annotation.get("category_id") not in categories:
        raise ValueError(f"there is no category {annotation.get('category_id')!r}")

    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not are_coordinates(bbox):
        raise ValueError(f"its bbox is {bbox}, not four coordinates")
    _, _, width, height = bbox
    if width < 0 or height < 0:
        raise ValueError(f"its bbox {bbox} has a negative width or height")

    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
    if annotation["iscrowd"] not in (0, 1):
        raise ValueError(f"its iscrowd is {annotation['iscrowd']!r}, not 0 or 1")
    if annotation.get("area") is None:
        annotation["area"] = width * height
    if not 0 <= annotation["area"] < math.inf:
        raise ValueError(f"its area is {annotation['area']}")
    annotation["segmentation"] = check_segmentation(annotation.get("segmentation"), image)


def check_segmentation(segmentation: dict | list | None, image: dict) -> dict | list:
    """Raises an error, or returns the mask, [] if there is none. As in detectron2, polygons of
    fewer than three points are dropped."""
    if not segmentation:
        return []
    if isinstance(segmentation, dict):
        size = [image["height"], image["width"]]
        if segmentation.get("size") != size:
            raise ValueError(f"its mask has the size {segmentation.get('size')}, its image {size}")
        counts = segmentation.get("counts", [])
        if isinstance(counts, str):
            counts = decompress_counts(counts)
        if sum(counts) != size[0] * size[1] or min(counts) < 0:
            raise ValueError(f"the run lengths of its mask do not add up to the size {size}")
        return segmentation

    polygons = []
    for polygon in segmentation:
        if not isinstance(polygon, list):
            raise ValueError("its segmentation is not a list of polygons [x1, y1, x2, y2, ...]")
        if len(polygon) >= 6 and len(polygon) % 2 == 0:
            polygons.append(polygon)
            if not are_coordinates(polygon):
                raise ValueError(f"not all numbers of its polygon {polygon} are coordinates")
    return polygons


def are_coordinates(numbers: list[float]) -> bool:
    """Whether none is NaN, infinite or so large that drawing a polygon would exhaust the memory."""
    return math.hypot(*numbers) < 1e6


def decompress_counts(compressed: str) -> list[int]:
    """COCO's compressed run lengths -> numbers. Each character holds 5 bits of a number, and a bit
    that says whether the number continues. From the fourth on, numbers are differences from the
    last but one."""
    counts = []
    value = 0
    shift = 0
    for byte in compressed.encode():
        bits = byte - 48
        value += (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # a negative number
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0
    return counts


def is_valid_annotation(annotation: dict, image: dict) -> bool:
    """Whether it can be trained: no crowd, and at least a pixel wide and high inside the image."""
    x, y, width, height = annotation["bbox"]
    visible_width = min(x + width, image["width"]) - max(x, 0)
    visible_height = min(y + height, image["height"]) - max(y, 0)
    return visible_width >= 1 and visible_height >= 1 and not annotation["iscrowd"]


def reaches_beyond(annotation: dict, image: dict) -> bool:
    """Whether the box leaves the image by more than a pixel, as corners taken for a size do."""
    x, y, width, height = annotation["bbox"]
    return min(x, y) < -1 or x + width > image["width"] + 1 or y + height > image["height"] + 1


def find_missing_files(folder: Path, names: list[str]) -> list[str]:
    """Lists folders, which is much faster than asking for each file."""
    existing = set()
    for subfolder in {os.path.dirname(name) for name in names}:
        if (folder / subfolder).is_dir():
            files = os.listdir(folder / subfolder)
            existing.update(os.path.join(subfolder, file) for file in files)
    return [name for name in names if name not in existing and not (folder / name).exists()]


class CocoImages(Dataset):
    """Item (epoch, index) -> uint8 image (3, h, w) and its target: image_id (the index), boxes
    (n, 4) as x1 y1 x2 y2, labels (n,) from 1 on in the order of the category ids, and masks
    (n, h, w), if there are any. For training, half of the images are flipped, and images without a
    valid object are left out."""

    def __init__(
        self,
        root: Path,
        split: str,
        training: bool,
        seed: int = 0,
        year: str | None = None,
        masks: bool = True,
    ):
        file, self.folder = find_split(root, split, year)
        self.coco = read_coco(file)
        self.training = training
        self.seed = seed
        self.categories = sorted(self.coco.cats)
        self.names = {i: str(self.coco.cats[i].get("name", i)) for i in self.categories}
        self.masks, masks_line = self.choose_masks(masks)

        entries = []
        n_objects = 0
        n_beyond = 0
        for image_id, image in self.coco.imgs.items():
            annotations = self.coco.imgToAnns[image_id]
            objects = [a for a in annotations if is_valid_annotation(a, image)]
            n_objects += len(objects)
            n_beyond += sum(1 for a in annotations if reaches_beyond(a, image))
            if objects or not training:
                entries.append((image, objects))
        if n_objects == 0:
            sys.exit(f"{file} has no object of at least a pixel inside its image")
        missing = find_missing_files(self.folder, [image["file_name"] for image, _ in entries])
        if missing:
            sys.exit(
                f"{self.folder} lacks {len(missing)} of the {len(entries)} images in {file}, "
                f"for example {missing[0]}"
            )
        self.images = SharedList(entries)
        self.image_ids = [image["id"] for image, _ in entries]
        self[0, 0]  # if the images were resized, but not their annotations, this says so now

        n_annotations = len(self.coco.anns)
        n_crowds = sum(a["iscrowd"] for a in self.coco.anns.values())
        n_small = n_annotations - n_crowds - n_objects
        print_rank0(
            f"{file}, {self.folder}: {len(entries)} images; {n_annotations} annotations, of which "
            f"{n_objects} objects, {n_crowds} crowds, {n_small} smaller than a pixel; {masks_line}"
        )
        if n_beyond:
            print_rank0(
                f"{n_beyond} boxes reach beyond their images: is every bbox x, y, width, height?"
            )

    def choose_masks(self, wanted: bool) -> tuple[bool, str]:
        """Whether masks are used, and a line that says why. If they are, objects without one count
        as crowds: they are not trained, and it is no error to detect them."""
        annotations = list(self.coco.anns.values())
        objects = [a for a in annotations if not a["iscrowd"]]
        n_masks = sum(1 for a in objects if a["segmentation"])
        line = f"{n_masks} of {len(objects)} objects have masks"
        if not wanted or n_masks == 0:
            return False, f"{line}, only boxes are used"

        for annotation in annotations:
            if not annotation["segmentation"]:
                x, y, w, h = annotation["bbox"]
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotation["iscrowd"] = 1
        if n_masks < len(objects):
            line += ", the others count as crowds (--no-masks uses the boxes of all)"
        return True, line

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "coco": None}  # gigabytes, which workers do not need

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, index = key
        entry, objects = self.images[index]
        size = (entry["height"], entry["width"])
        path = self.folder / entry["file_name"]
        image = decode_image(str(path))
        if image.shape[1:] != size:
            raise ValueError(
                f"{path} has the size {tuple(image.shape[1:])}, not {size} as annotated (its EXIF "
                "orientation is not applied)"
            )

        labels = [1 + self.categories.index(o["category_id"]) for o in objects]
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        target = {
            "image_id": torch.tensor(index),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), size),
        }
        if self.masks:
            masks = [decode_mask(o["segmentation"], *size) for o in objects]
            empty = torch.zeros(0, *size, dtype=torch.uint8)
            target["masks"] = torch.stack(masks) if masks else empty

        flip = rng(self.seed, "flip", epoch, index)
        if self.training and torch.rand((), generator=flip) < 0.5:
            image = image.flip(-1)
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            target["boxes"] = torch.stack([size[1] - x2, y1, size[1] - x1, y2], dim=1)
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return image, target


# --- Detector -------------------------------------------------------------------------------------


class AlignedRoIs(RoIAlign):
    """RoIAlign on one level, aligned=True as published. torchvision's pooler has aligned=False,
    which shifts all regions by half a pixel."""

    def forward(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list
    ) -> Tensor:
        return super().forward(features["0"], boxes)


class L1Proposals(detection.rpn.RegionProposalNetwork):
    """With the published L1 loss of the boxes, where torchvision has a smooth L1 loss."""

    def compute_loss(self, objectness, deltas, labels, targets) -> tuple[Tensor, Tensor]:
        positive, negative = self.fg_bg_sampler(labels)
        positive = torch.cat(positive).nonzero()[:, 0]
        negative = torch.cat(negative).nonzero()[:, 0]
        sampled = torch.cat([positive, negative])
        labels = torch.cat(labels)
        targets = torch.cat(targets)

        box_error = F.l1_loss(deltas[positive], targets[positive], reduction="sum")
        box_loss = box_error / len(sampled)
        objectness = objectness.flatten()
        objectness_loss = F.binary_cross_entropy_with_logits(objectness[sampled], labels[sampled])
        return objectness_loss, box_loss


class C4Heads(detection.roi_heads.RoIHeads):
    """In training, boxes and masks share one pass through res5, since the regions of the masks are
    among those of the boxes. torchvision's forward, used in the evaluation, runs res5 twice."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
        regions = self.box_roi_pool(features, proposals, image_shapes)  # (n, width / 2, 14, 14)
        shared = self.box_head(regions)  # (n, width, 7, 7)

        # Boxes.
        logits, deltas = self.box_predictor(shared)  # (n, classes), (n, 4 classes)
        positive = [image_labels > 0 for image_labels in labels]  # per image
        all_positive = torch.cat(positive)  # (n,)
        all_labels = torch.cat(labels)  # (n,)
        positive_labels = all_labels[all_positive]  # (p,)
        deltas = deltas.unflatten(1, (-1, 4))[all_positive, positive_labels]  # (p, 4)
        box_error = F.l1_loss(deltas, torch.cat(box_targets)[all_positive], reduction="sum")
        losses = {
            "loss_classifier": F.cross_entropy(logits, all_labels),
            "loss_box_reg": box_error / len(all_labels),
        }

        # Masks.
        if self.has_mask():
            mask_logits = self.mask_predictor(shared[all_positive])  # (p, classes, 14, 14)
            rows = torch.arange(len(mask_logits), device=mask_logits.device)
            mask_logits = mask_logits[rows, positive_labels]  # (p, 14, 14)
            mask_targets = []
            for target, boxes, objects, chosen in zip(targets, proposals, matched, positive):
                masks = target["masks"][objects[chosen]]
                mask_targets.append(crop_masks(masks, boxes[chosen], mask_logits.shape[-1]))
            mask_error = F.binary_cross_entropy_with_logits(
                mask_logits, torch.cat(mask_targets), reduction="sum"
            )
            losses["loss_mask"] = mask_error / max(1, mask_logits.numel())
        return [], losses


def crop_masks(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Targets of a mask head: masks (n, h, w) inside boxes (n, 4) -> 0 or 1 (n, size, size)."""
    image_index = torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes)  # (n, 1)
    rois = torch.cat([image_index, boxes], dim=1)  # (n, 5)
    crops = roi_align(masks[:, None].to(boxes), rois, size, aligned=True)[:, 0]  # (n, size, size)
    return (crops >= 0.5).to(boxes)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Probabilities (n, 1, s, s) inside boxes (n, 4) -> (n, height, width) bool, sampled at the
    centres of the pixels."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)  # (n, 1)
    x_pixels = torch.arange(width, device=boxes.device) + 0.5
    y_pixels = torch.arange(height, device=boxes.device) + 0.5
    x = (x_pixels - x1) / (x2 - x1) * 2 - 1  # (n, width), from -1 to 1 inside the box
    y = (y_pixels - y1) / (y2 - y1) * 2 - 1  # (n, height)
    pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):  # one by one: all grids of a large image would take gigabytes
        grid = torch.stack(torch.meshgrid(x[i], y[i], indexing="xy"), dim=-1)  # (height, width, 2)
        probabilities = F.grid_sample(masks[i : i + 1], grid[None], align_corners=False)
        pasted[i] = probabilities[0, 0] >= 0.5
    return pasted


class Transform(detection.transform.GeneralizedRCNNTransform):
    """torchvision's, except that masks are pasted without rounding the boxes to whole pixels."""

    def postprocess(self, result, image_shapes, original_image_sizes):
        if self.training:
            return result
        for detections, shape, size in zip(result, image_shapes, original_image_sizes):
            boxes = detection.transform.resize_boxes(detections["boxes"], shape, size)
            detections["boxes"] = boxes
            if "masks" in detections:
                detections["masks"] = paste_masks(detections["masks"], boxes, *size)
        return result


def build_c4(
    args: argparse.Namespace, resnet: nn.Module, width: int, stem: str, classes: int, masks: bool
) -> nn.Module:
    """R50-C4 as published; numbers that are not flags are detectron2's."""
    trunk = detection.backbone_utils.IntermediateLayerGetter(resnet, {"layer3": "0"})

    # Proposals.
    anchors = detection.anchor_utils.AnchorGenerator((tuple(args.anchors),), ((0.5, 1.0, 2.0),))
    n_anchors = anchors.num_anchors_per_location()[0]
    proposals = L1Proposals(
        anchors,
        detection.rpn.RPNHead(width // 2, n_anchors),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": args.train_proposals[0], "testing": args.test_proposals[0]},
        post_nms_top_n={"training": args.train_proposals[1], "testing": args.test_proposals[1]},
        nms_thresh=0.7,
    )

    # res5 and the extra BN: regions (n, width / 2, 14, 14) -> (n, width, 7, 7).
    _, conv_stride, _, max_pool = STEMS[stem]
    stride = 4 * conv_stride * (2 if max_pool else 1)  # of res4
    regions = AlignedRoIs(14, spatial_scale=1 / stride, sampling_ratio=0, aligned=True)
    extra_norm = nn.Identity() if args.norm == "frozen" else nn.BatchNorm2d(width)
    res5 = nn.Sequential(resnet.layer4, extra_norm)

    # Predictors.
    box_predictor = detection.faster_rcnn.FastRCNNPredictor(width, classes)
    mask_predictor = detection.mask_rcnn.MaskRCNNPredictor(width, 256, classes)
    last_layers = [
        (box_predictor.cls_score, 0.01),
        (box_predictor.bbox_pred, 0.001),
        (mask_predictor.mask_fcn_logits, 0.001),
    ]
    for layer, std in last_layers:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)

    heads = C4Heads(
        regions,
        res5,
        nn.Sequential(nn.AdaptiveAvgPool2d(1), box_predictor),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=args.rois,
        positive_fraction=0.25,
        bbox_reg_weights=None,  # the default, (10, 10, 5, 5)
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=args.detections,
        mask_roi_pool=regions if masks else None,
        mask_head=res5 if masks else None,
        mask_predictor=mask_predictor if masks else None,
    )
    return detection.generalized_rcnn.GeneralizedRCNN(trunk, proposals, heads, None)


def build_fpn(
    args: argparse.Namespace, resnet: nn.Module, width: int, classes: int, masks: bool
) -> nn.Module:
    """torchvision's Faster R-CNN or Mask R-CNN on a feature pyramid."""
    trunk = detection.backbone_utils.BackboneWithFPN(
        resnet,
        return_layers={"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"},
        in_channels_list=[width // 8, width // 4, width // 2, width],
        out_channels=256,
        norm_layer=None if args.norm == "frozen" else nn.BatchNorm2d,
    )
    sizes = tuple((size,) for size in args.anchors)  # one per level
    ratios = tuple((0.5, 1.0, 2.0) for _ in sizes)
    model_class = detection.MaskRCNN if masks else detection.FasterRCNN
    return model_class(
        trunk,
        classes,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(sizes, ratios),
        rpn_pre_nms_top_n_train=args.train_proposals[0],
        rpn_pre_nms_top_n_test=args.test_proposals[0],
        rpn_post_nms_top_n_train=args.train_proposals[1],
        rpn_post_nms_top_n_test=args.test_proposals[1],
        box_batch_size_per_image=args.rois,
        box_detections_per_img=args.detections,
    )


def build_detector(
    args: argparse.Namespace,
    resnet: nn.Module,
    width: int,
    config: dict,
    classes: int,
    masks: bool,
) -> nn.Module:
    """The detector on a ResNet whose features have this width. config: how it was pretrained.
    `classes` includes the background."""
    if args.model == "c4":
        model = build_c4(args, resnet, width, config["stem"], classes, masks)
    else:
        model = build_fpn(args, resnet, width, classes, masks)
    mean, std = MEAN_STD[config.get("dataset", "folder")]
    model.transform = Transform(args.short_sides, args.long_side, mean, std)
    return model


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then divided by 10 at each milestone."""
    images_seen = step * args.batch_size
    peak = args.base_lr * args.batch_size / 16
    warmup = min(1, 0.001 + 0.999 * images_seen / max(1, args.warmup_images))
    passed = [m for m in args.milestones if images_seen >= m * args.images]
    return peak * warmup * 0.1 ** len(passed)


# --- Evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    model: nn.Module,
    data: CocoImages,
    loader: DataLoader,
    test_short_side: int,
    device: torch.device,
) -> list[dict]:
    """Detections in COCO's format. `loader` yields this process's share of the images, one by one;
    every process returns the detections of all images, in the order of the data set."""
    train_short_sides = model.transform.min_size
    model.transform.min_size = (test_short_side,)
    model.eval()
    results = []
    for image, target in loader:
        (detections,) = model([image.to(device) / 255])
        boxes = box_convert(detections["boxes"], "xyxy", "xywh").tolist()
        for i, box in enumerate(boxes):
            result = {
                "image_id": data.image_ids[int(target["image_id"])],
                "category_id": data.categories[int(detections["labels"][i]) - 1],
                "score": float(detections["scores"][i]),
                "bbox": box,
            }
            if data.masks:
                result["segmentation"] = encode_mask(detections["masks"][i].cpu())
            results.append(result)
    model.train()
    model.transform.min_size = train_short_sides

    if WORLD > 1:
        shares = [None] * WORLD
        dist.all_gather_object(shares, results)
        position = {image_id: i for i, image_id in enumerate(data.image_ids)}
        results = [result for share in shares for result in share]
        results.sort(key=lambda result: position[result["image_id"]])
    return results


def average_precision(data: CocoImages, results: list[dict], folder: Path) -> dict[str, float]:
    """COCO's AP of boxes and, if there are any, masks, in percent. Writes the results of each kind
    to a file of its own: with a box beside it, COCOeval would take a mask's area from the box."""
    names = {"bbox": "box", "segm": "mask"} if data.masks else {"bbox": "box"}
    numbers = {}
    for kind, name in names.items():
        unused = "segmentation" if kind == "bbox" else "bbox"
        results_of_kind = []
        for result in results:
            results_of_kind.append({k: v for k, v in result.items() if k != unused})
        (folder / f"results_{kind}.json").write_text(json.dumps(results_of_kind))

        values = [0.0] * 6  # nothing was detected
        if results:
            with contextlib.redirect_stdout(None):
                evaluation = COCOeval(data.coco, data.coco.loadRes(results_of_kind), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = evaluation.stats[:6].tolist()
        for metric, value in zip(["AP", "AP50", "AP75", "APs", "APm", "APl"], values):
            if value >= 0:  # -1: there are no objects of this size
                numbers[f"{name} {metric}"] = 100 * value
    return numbers


def draw_results(data: CocoImages, results: list[dict], path: Path):
    """A picture of the first six images and what was detected with a score of at least 0.5."""
    side = 320
    pictures = []
    for i in range(min(6, len(data))):
        picture, _ = data[0, i]
        image_id = data.image_ids[i]
        shown = [r for r in results if r["image_id"] == image_id and r["score"] >= 0.5]
        if shown and data.masks:
            masks = [decode_mask(r["segmentation"], *picture.shape[1:]) for r in shown]
            masks = torch.stack(masks).bool()
            picture = draw_segmentation_masks(picture, masks, alpha=0.4, colors="lime")
        if shown:
            boxes = box_convert(torch.tensor([r["bbox"] for r in shown]), "xywh", "xyxy")
            names = [f"{data.names[r['category_id']]} {r['score']:.2f}" for r in shown]
            picture = draw_bounding_boxes(picture, boxes, names, colors="lime", width=2)
        picture = TF.resize(picture, [side - 1], max_size=side)
        pictures.append(TF.center_crop(picture, [side, side]))  # padded to a square
    save_image(make_grid(pictures, nrow=3, pad_value=255) / 255, path)


# --- Training -------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace) -> tuple[CocoImages, CocoImages]:
    """Training and validation images."""
    root = args.data
    if root is None:
        root = args.output / "shapes"
        if RANK == 0:
            write_shapes(root, args.seed, {"train": 400, "val": 100})
        if WORLD > 1:
            dist.barrier()
    train_set = CocoImages(root, "train", True, args.seed, args.year, args.masks)
    val_set = CocoImages(root, "val", False, args.seed, args.year, train_set.masks)
    if train_set.names != val_set.names:
        differences = sorted(train_set.names.items() ^ val_set.names.items(), key=str)
        sys.exit(f"{root}: the categories of train and val differ in {differences}")
    if len(train_set) < args.batch_size:
        sys.exit(
            f"{len(train_set)} training images do not fill one batch: lower --batch-size "
            f"{args.batch_size}"
        )
    return train_set, val_set


def weights_are_finite(model: nn.Module) -> bool:
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    finite = [tensor.isfinite().all() for tensor in tensors]
    return bool(torch.stack(finite).all())  # the host waits only here


def fine_tune(args: argparse.Namespace, device: torch.device):
    """Trains from the last checkpoint in args.output, if there is one, to the end."""
    # Data, and the length of the run.
    train_set, val_set = load_data(args)
    total_steps = args.images // args.batch_size
    stop_step = min(total_steps, args.max_steps or total_steps)
    evaluation_steps = set()
    for i in range(args.evaluations):
        evaluation_steps.add(math.ceil((i + 1) * total_steps / args.evaluations))

    # Model and optimiser.
    options = {"norm_layer": FrozenBatchNorm2d} if args.norm == "frozen" else {}
    resnet, width, pretrained = read_backbone(args, **options)
    torch.manual_seed(args.seed)
    classes = 1 + len(train_set.categories)  # with the background
    model = build_detector(args, resnet, width, pretrained, classes, train_set.masks)
    if args.norm == "syncbn":
        model = convert_batch_norm(model)
    model = model.to(device, memory_format=torch.channels_last)
    norm_params, other_params = split_normalization_params(model)
    groups = [
        {"params": other_params, "weight_decay": args.weight_decay},
        {"params": norm_params, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)

    # Resume.
    config = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUME}
    config["checkpoint"] = str(args.checkpoint)
    config["train_images"] = len(train_set)
    step = 0
    saved = resume_run(args.output, config)
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    ddp_model = wrap_ddp(model, device)

    # Loaders.
    val_keys = [(0, i) for i in range(RANK, len(val_set), WORLD)]
    val_loader = make_loader(val_set, args.workers, batch_size=None, sampler=val_keys)
    rows = torch.arange(len(train_set))
    train_keys = batch_indices(rows, args.batch_size, args.seed, step, stop_step)
    train_loader = make_loader(train_set, args.workers, batch_sampler=train_keys, collate_fn=list)

    # Say what the run is.
    logger = Logger(args.output, config, step) if RANK == 0 else None
    weights = "RANDOM weights" if args.random else args.checkpoint
    print_rank0(f"{weights}; {total_steps} steps, from step {step}; {args.output}")

    def log_evaluation(step: int):
        start = time.time()
        if WORLD > 1 and args.norm == "bn":
            # Every process has running statistics of its share. Those of rank 0, which are saved,
            # are evaluated.
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        results = predict(model, val_set, val_loader, args.test_short_side, device)
        if logger:
            draw_results(val_set, results, args.output / "predictions.png")
            numbers = average_precision(val_set, results, args.output)
            logger(step=step, **numbers, seconds=time.time() - start)

    def save(step: int):
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "config": config,
            "step": step,
        }
        save_checkpoint(state, args.output / "checkpoint.pt")

    logged_step = step
    last_save = last_log = waiting_since = time.time()
    waited = 0.0
    model.train()
    for batch in train_loader:
        waited += time.time() - waiting_since
        images = [image.to(device, non_blocking=True) / 255 for image, _ in batch]
        targets = []
        for _, target in batch:
            targets.append({k: v.to(device, non_blocking=True) for k, v in target.items()})
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # torchvision draws the size of an image, and samples anchors and proposals.
        torch.manual_seed(seed_from(args.seed, "regions", step, RANK))

        losses = ddp_model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1

        # Log and evaluate.
        should_evaluate = step in evaluation_steps or step == stop_step
        if should_evaluate or step % args.log_every == 0:
            values = torch.stack([loss, *losses.values()]).detach()
            if WORLD > 1:  # each process has the losses of its share of the batch
                dist.all_reduce(values)
                values /= WORLD
            names = ["loss", *(name.removeprefix("loss_") for name in losses)]
            numbers = dict(zip(names, values.tolist()))
            if not math.isfinite(numbers["loss"]):
                sys.exit(f"the loss is not finite at step {step}: {numbers}. Try a lower --base-lr")
            if not weights_are_finite(model):
                sys.exit(f"the weights are not finite at step {step}. Try a lower --base-lr")
            seconds = time.time() - last_log
            if logger:
                images_seen = (step - logged_step) * args.batch_size
                images_left = (total_steps - step) * args.batch_size
                speed = throughput(images_seen, seconds, waited, images_left)
                logger(step=step, **numbers, lr=lr, **speed)
            if should_evaluate:
                log_evaluation(step)

            # Save, now that the loss and the weights are known to be finite.
            due = time.time() - last_save > 60 * args.save_minutes
            if RANK == 0 and (due or step == stop_step):
                save(step)
                last_save = time.time()
            last_log = time.time()
            logged_step = step
            waited = 0.0
        waiting_since = time.time()


def main(argv: list[str] | None = None):
    args = parse(argv)
    with distributed(args.device, "float32") as (device, _), lock_output_dir(args.output):
        fine_tune(args, device)


if __name__ == "__main__":
    main()
