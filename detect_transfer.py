"""Fine-tune a pretrained ResNet for object detection and instance segmentation.

    python detect_transfer.py            # toy scenes of shapes, from runs/shapes: 2 to 4 minutes
    python detect_transfer.py --random   # the same with random weights, for comparison
    torchrun --nproc_per_node 8 detect_transfer.py --recipe coco-2x --data coco --checkpoint r50.pth

--model c4 is the published protocol (R50-C4 with an extra BN). The ResNet up to layer3 ("res4")
gives one level of features. Its last stage (layer4, "res5") and the extra BN run on each region of
interest, for boxes and masks alike. --model fpn is torchvision's own Mask R-CNN. Both train without
autocast. The coco recipes have not been run here.

--data has COCO's layout: annotations/instances_NAME.json and the images in NAME/ or images/NAME/,
where NAME is train2017 or train, and val2017 or val. Masks are trained if all objects have one.
Rerun the same command to resume.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d, RoIAlign, box_convert, clip_boxes_to_image, roi_align
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid, save_image

import linear_eval
import train

# --- Recipes and flags ----------------------------------------------------------------------------
# The flags' own defaults are those of MoCo's configurations of detectron2, which INTL uses.

# fmt: off
RECIPES = {
    # Small enough for a CPU; not from the papers.
    "shapes": {
        "images": 1280, "batch_size": 4, "base_lr": 0.08, "warmup_images": 160,
        "short_sides": [128], "test_short_side": 128, "long_side": 256, "anchors": [16, 32, 64],
        "train_proposals": [200, 50], "test_proposals": [200, 20], "rois": 8, "detections": 10,
    },
    # A worker's copy of COCO's annotations grows to about 2 GB, and an evaluation starts as many.
    "coco-2x": {"workers": 4},
    "coco-1x": {"workers": 4, "images": 1_440_000},
}
MAY_CHANGE_ON_RESUME = train.MAY_CHANGE_ON_RESUME | {"evaluations"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=train.HelpFormatter)
    train.add_common_flags(parser)
    linear_eval.add_backbone_flags(parser)
    add = parser.add_argument
    add("--data", type=Path, help="folder in COCO's layout; None: shapes, drawn into --output")
    add("--evaluations", type=train.positive, default=2, help="how often the schedule measures AP")
    add("--max-steps", type=train.positive, help="stop after this many steps of the schedule")

    group = parser.add_argument_group("settings; a recipe changes the defaults")
    add = group.add_argument
    add("--masks", action=argparse.BooleanOptionalAction, default=True,
        help="train masks, too, if all objects have one")
    add("--model", default="c4", choices=["c4", "fpn"], help="c4: published; fpn: torchvision's")
    add("--norm", default="syncbn", choices=["syncbn", "bn", "frozen"],
        help="BN over the global batch; over each process's share; or as pretrained, not trained")
    add("--images", type=train.positive, default=2_880_000, help="length of the schedule")
    add("--batch-size", type=train.positive, default=16, help="GLOBAL, over all processes")
    add("--base-lr", type=train.non_negative, default=0.02, help="per 16 images")
    add("--milestones", type=train.fraction, nargs="*", default=[2 / 3, 8 / 9],
        help="fractions of the schedule after which the learning rate is divided by 10")
    add("--warmup-images", type=int, default=16_000, help="linear warm-up from 1/1000")
    add("--weight-decay", type=float, default=1e-4, help="of all but BN parameters")
    add("--short-sides", type=int, nargs="+", default=[640, 672, 704, 736, 768, 800],
        help="each training image is resized to one of these, at random")
    add("--test-short-side", type=int, default=800, help="short side in the evaluation")
    add("--long-side", type=int, default=1333, help="upper limit of the long side")
    add("--anchors", type=int, nargs="+", default=[32, 64, 128, 256, 512],
        help="sizes, each with aspect ratios 1:2, 1:1 and 2:1; with fpn one size per level")
    add("--train-proposals", type=int, nargs=2, default=[12_000, 2000],
        help="proposals before and after NMS")
    add("--test-proposals", type=int, nargs=2, default=[6000, 1000],
        help="the same in the evaluation; published for fpn: 1000 1000")
    add("--rois", type=int, default=512, help="regions per image that train the heads")
    add("--detections", type=train.positive, default=100, help="per image, at most 100 as in COCO")
    # fmt: on
    args = train.parse_with_recipe(parser, RECIPES, argv)

    if args.recipe != "shapes" and args.data is None:
        parser.error(f"--recipe {args.recipe} needs --data FOLDER")
    if args.model == "fpn" and len(args.anchors) != 5:
        parser.error("--model fpn has five levels and needs a size of --anchors for each")
    if args.batch_size % train.WORLD:
        parser.error(
            f"--batch-size {args.batch_size} is global: it must be a multiple of the number of "
            f"processes, {train.WORLD}"
        )
    if args.images < args.batch_size:
        parser.error(f"--images {args.images} do not fill one --batch-size {args.batch_size}")
    if args.rois < 4:
        parser.error("--rois must be at least 4: a quarter of them may be positive")
    if args.detections > 100:
        parser.error(f"--detections {args.detections}: COCO's AP is over at most 100 per image")
    if args.output is None:
        suffix = "_random" if args.random else ""
        args.output = Path(f"runs/detect_{args.recipe}{suffix}")
    return args


# --- Toy data: scenes of shapes in COCO's layout --------------------------------------------------


def encode_mask(mask: Tensor) -> dict:
    """(h, w) bool on the CPU -> COCO's compressed run lengths, which JSON can store."""
    column_major = mask.byte().T.contiguous().T  # as pycocotools reads it
    runs = rle.encode(column_major.numpy())
    return {"size": list(runs["size"]), "counts": runs["counts"].decode()}


def write_scenes(root: Path, seed: int, counts: dict[str, int], size: int = 128):
    """Square images of one to four shapes; `counts`: images per split. A shape of which fewer than
    30 pixels are visible is not annotated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in tiny operations threads only wait for each other
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(train.SHAPES)]
    for split, n_images in counts.items():
        (root / split).mkdir(exist_ok=True)
        images = []
        annotations = []
        for i in range(n_images):
            scene = i + 1_000_000 if split == "val" else i  # no scene is in both
            n_shapes = 1 + i % 4
            generator = train.rng(seed, "kinds", scene)
            kinds = torch.randint(len(categories), (n_shapes,), generator=generator).tolist()
            image, masks = train.draw_scene(seed, scene, size, kinds, 0.14, 0.28)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": size, "width": size})
            for kind, mask in zip(kinds, masks):
                if mask.sum() < 30:
                    continue
                runs = encode_mask(mask)
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": kind + 1,
                    "iscrowd": 0,
                    "segmentation": runs,
                    "bbox": rle.toBbox(runs).tolist(),
                    "area": float(rle.area(runs)),
                }
                annotations.append(annotation)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    torch.set_num_threads(threads)


# --- Data in COCO's layout ------------------------------------------------------------------------


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the image folder of "train" or "val"."""
    names = [f"{split}2017", split]
    file = the_only([root / "annotations" / f"instances_{name}.json" for name in names])
    name = file.stem.removeprefix("instances_")
    folder = the_only([root / name, root / "images" / name])
    return file, folder


def the_only(paths: list[Path]) -> Path:
    """The one of these paths that exists."""
    found = [path for path in paths if path.exists()]
    if len(found) != 1:
        choices = " and ".join(str(path) for path in paths)
        sys.exit(f"--data: exactly one of {choices} must exist, not {len(found)}")
    return found[0]


def read_coco(file: Path) -> COCO:
    """pycocotools' index of an annotation file. What it and COCOeval would misread in silence, or
    only at the first evaluation, is refused."""
    train.print_rank0(f"reading {file}")
    with contextlib.redirect_stdout(None):  # without its progress
        coco = COCO(str(file))
    by_kind = {"images": coco.imgs, "annotations": coco.anns, "categories": coco.cats}
    for kind, by_id in by_kind.items():
        if len(by_id) < len(coco.dataset[kind]):
            sys.exit(f"{file}: two of its {kind} have the same id")
    if 0 in coco.anns:
        sys.exit(f"{file}: an annotation has the id 0, which COCOeval takes for no match")
    for annotation in coco.dataset["annotations"]:
        name = f"{file}: annotation {annotation['id']}"
        missing = {"bbox", "area", "iscrowd"} - annotation.keys()
        if missing:
            sys.exit(f"{name} has no {', '.join(missing)}")
        if not are_numbers([annotation[key] for key in ("id", "area", "iscrowd")]):
            sys.exit(f"{name}: its id, area or iscrowd is not a finite number")
        if annotation["image_id"] not in coco.imgs or annotation["category_id"] not in coco.cats:
            sys.exit(f"{name} has an image_id or a category_id that the file does not list")
        if not are_numbers(annotation["bbox"]) or len(annotation["bbox"]) != 4:
            sys.exit(f"{name}: its bbox {annotation['bbox']} is not four finite numbers")
        if isinstance(annotation.get("segmentation"), list):
            # Polygons of fewer than three points are dropped: pycocotools would take four numbers
            # for a box. Without any polygon left an object has no mask.
            polygons = annotation["segmentation"]
            annotation["segmentation"] = [p for p in polygons if len(p) >= 6]
    return coco


def are_numbers(values) -> bool:
    if not isinstance(values, list):
        return False
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def is_trainable(annotation: dict, image: dict) -> bool:
    """Whether it is no crowd, and at least a pixel wide and high inside the image."""
    x, y, width, height = annotation["bbox"]
    visible_width = min(x + width, image["width"]) - max(x, 0)
    visible_height = min(y + height, image["height"]) - max(y, 0)
    return visible_width >= 1 and visible_height >= 1 and not annotation["iscrowd"]


class CocoImages(Dataset):
    """Item (epoch, index) -> uint8 image (3, h, w) and its target: boxes (n, 4) as x1 y1 x2 y2,
    labels (n,) from 1 on in the order of the category ids, and masks (n, h, w) uint8 if self.masks.
    For training, images without an object are left out, half of the others are flipped, and
    "short_side" says to which size the image will be resized. Otherwise there is its "image_id".
    (torchvision's CocoDetection and its v2 wrapper decode crowds, too, keep the category ids as
    labels, and do not know the epoch.)"""

    def __init__(self, root: Path, split: str, training: bool, seed: int = 0, short_sides=()):
        file, self.folder = find_split(root, split)
        self.coco = read_coco(file)
        self.training = training
        self.seed = seed
        self.short_sides = short_sides
        self.category_ids = sorted(self.coco.cats)
        self.names = {i: self.coco.cats[i]["name"] for i in self.category_ids}

        self.entries = []  # (image, its objects)
        trainable = []
        for image_id, image in self.coco.imgs.items():
            objects = [a for a in self.coco.imgToAnns[image_id] if is_trainable(a, image)]
            trainable += objects
            if objects or not training:
                self.entries.append((image, objects))
        if not trainable:
            sys.exit(f"{file} has no object of at least a pixel inside its image")

        file_names = [image["file_name"] for image, _ in self.entries]
        missing = [name for name in file_names if not (self.folder / name).exists()]
        if missing:
            sys.exit(
                f"{self.folder} lacks {len(missing)} of the {len(file_names)} images in {file}, "
                f"for example {missing[0]}"
            )
        self.read_image(0)  # finds now that the images were resized without their annotations

        # Training needs the masks of its objects; COCOeval needs those of crowds, too.
        annotations = self.coco.dataset["annotations"]
        need_masks = trainable if training else annotations
        n_without_mask = sum(1 for a in need_masks if not a.get("segmentation"))
        self.masks = n_without_mask == 0
        n_crowds = sum(1 for a in annotations if a["iscrowd"])
        train.print_rank0(
            f"{self.folder}: {len(self.entries)} images, {len(trainable)} objects, of which "
            f"{n_without_mask} have no mask; {n_crowds} crowds, "
            f"{len(annotations) - n_crowds - len(trainable)} objects below a pixel"
        )
        if training:
            n_empty = len(self.coco.imgs) - len(self.entries)
            train.print_rank0(f"not trained: these last two, {n_empty} images without objects")
        self.digest = train.digest(file)

    def __len__(self) -> int:
        return len(self.entries)

    def read_image(self, index: int) -> Tensor:
        entry, _ = self.entries[index]
        path = self.folder / entry["file_name"]
        image = train.decode_image(str(path))
        size = (entry["height"], entry["width"])
        if image.shape[1:] != size:
            raise ValueError(
                f"{path} has the size {tuple(image.shape[1:])}, not {size} as annotated (its EXIF "
                "orientation is not applied)"
            )
        return image

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict]:
        epoch, index = key
        image = self.read_image(index)
        _, height, width = image.shape
        entry, objects = self.entries[index]

        labels = [1 + self.category_ids.index(o["category_id"]) for o in objects]
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), (height, width))
        target = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}
        if self.masks:
            target["masks"] = torch.zeros(len(objects), height, width, dtype=torch.uint8)
            for mask, o in zip(target["masks"], objects):
                mask.copy_(torch.from_numpy(self.coco.annToMask(o)))
        if not self.training:
            return image, {**target, "image_id": entry["id"]}

        generator = train.rng(self.seed, "flip and size", epoch, index)
        if torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        choice = torch.randint(len(self.short_sides), (), generator=generator)
        return image, {**target, "short_side": self.short_sides[choice]}


# --- Detector -------------------------------------------------------------------------------------


class AlignedRoIs(RoIAlign):
    """torchvision's heads expect a pooler that takes a dictionary of levels. Here there is one
    level, and aligned=True as published; torchvision's pooler is off by half a pixel."""

    def forward(self, features, boxes, image_shapes) -> Tensor:
        return super().forward(features["res4"], boxes)


class L1Proposals(detection.rpn.RegionProposalNetwork):
    """With the published L1 loss of the boxes; torchvision's has a fixed smooth L1 loss."""

    def compute_loss(self, objectness, deltas, labels, targets) -> tuple[Tensor, Tensor]:
        positive, negative = self.fg_bg_sampler(labels)
        positive = torch.cat(positive).nonzero()[:, 0]  # (p,) indices of anchors
        negative = torch.cat(negative).nonzero()[:, 0]
        sampled = torch.cat([positive, negative])
        labels = torch.cat(labels)  # (anchors,)
        targets = torch.cat(targets)  # (anchors, 4)

        box_error = F.l1_loss(deltas[positive], targets[positive], reduction="sum")
        box_loss = box_error / len(sampled)
        objectness = objectness.flatten()
        objectness_loss = F.binary_cross_entropy_with_logits(objectness[sampled], labels[sampled])
        return objectness_loss, box_loss


class C4Heads(detection.roi_heads.RoIHeads):
    """In training the regions of the masks are among those of the boxes, so res5 runs once for
    both. The evaluation needs the masks of the refined boxes: there torchvision's forward runs
    res5 a second time."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, box_targets = self.select_training_samples(proposals, targets)
        regions = self.box_roi_pool(features, proposals, image_shapes)  # (n, width / 2, 14, 14)
        shared = self.box_head(regions)  # (n, width, 7, 7)

        # Boxes. Of the n regions p are positive; there is one at least, as the true boxes are among
        # the proposals.
        logits, deltas = self.box_predictor(shared)  # (n, classes), (n, 4 classes)
        all_labels = torch.cat(labels)  # (n,), 0 is the background
        positive = all_labels.nonzero()[:, 0]  # (p,)
        true_classes = all_labels[positive]  # (p,)
        deltas = deltas.unflatten(1, (-1, 4))[positive, true_classes]  # (p, 4)
        box_error = F.l1_loss(deltas, torch.cat(box_targets)[positive], reduction="sum")
        losses = {
            "loss_classifier": F.cross_entropy(logits, all_labels),
            "loss_box_reg": box_error / len(all_labels),
        }

        # Masks.
        if self.has_mask():
            mask_logits = self.mask_predictor(shared[positive])  # (p, classes, 14, 14)
            rows = torch.arange(len(positive), device=positive.device)
            mask_logits = mask_logits[rows, true_classes]  # (p, 14, 14)
            size = mask_logits.shape[-1]
            mask_targets = []
            for target, boxes, objects, image_labels in zip(targets, proposals, matched, labels):
                chosen = image_labels > 0
                crops = crop_masks(target["masks"], objects[chosen], boxes[chosen], size)
                mask_targets.append(crops)
            losses["loss_mask"] = F.binary_cross_entropy_with_logits(
                mask_logits, torch.cat(mask_targets)
            )
        return [], losses


def crop_masks(masks: Tensor, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Targets of a mask head: for each box (p, 4) the mask (n, h, w) of its object (p,) inside the
    box -> 0 or 1 (p, size, size)."""
    rois = torch.cat([objects[:, None].to(boxes), boxes], dim=1)  # (p, 5)
    crops = roi_align(masks[:, None].to(boxes), rois, size, aligned=True)  # (p, 1, size, size)
    return (crops[:, 0] >= 0.5).to(boxes)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Probabilities (n, 1, s, s) inside boxes (n, 4) -> (n, height, width) bool, sampled at the
    centers of the pixels."""
    pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    # In coordinates from -1 to 1 over the image, and over the box: x_box = a * x_image + b.
    x1, y1, x2, y2 = boxes.unbind(1)  # (n,)
    zero = torch.zeros_like(x1)
    to_box_x = torch.stack([width / (x2 - x1), zero, (width - x1 - x2) / (x2 - x1)], dim=1)
    to_box_y = torch.stack([zero, height / (y2 - y1), (height - y1 - y2) / (y2 - y1)], dim=1)
    to_box = torch.stack([to_box_x, to_box_y], dim=1)  # (n, 2, 3)
    for i in range(len(boxes)):  # one by one: all grids of a large image would take gigabytes
        grid = F.affine_grid(to_box[i : i + 1], [1, 1, height, width], align_corners=False)
        pasted[i] = F.grid_sample(masks[i : i + 1], grid, align_corners=False)[0, 0] >= 0.5
    return pasted


class Transform(detection.transform.GeneralizedRCNNTransform):
    """torchvision's, with two changes: the short side of a training image comes with its target,
    and masks are pasted without rounding the boxes to whole pixels."""

    def __init__(self, test_short_side: int, long_side: int, mean: tuple, std: tuple):
        super().__init__(test_short_side, long_side, mean, std)
        self.test_short_side = test_short_side

    def resize(self, image, target=None):
        short_side = self.test_short_side if target is None else target["short_side"]
        self.min_size = (short_side,)  # torchvision chooses one of these
        return super().resize(image, target)

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
    """R50-C4 as published, but for PreciseBN; numbers that are not flags are detectron2's."""
    trunk = detection.backbone_utils.IntermediateLayerGetter(resnet, {"layer3": "res4"})

    # Proposals.
    anchors = detection.anchor_utils.AnchorGenerator((tuple(args.anchors),), ((0.5, 1.0, 2.0),))
    n_anchors = anchors.num_anchors_per_location()[0]
    rpn = L1Proposals(
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

    # Regions. In res4 the resolution is that of the stem, halved by layer2 and by layer3.
    if stem == "cifar-padded":
        sys.exit(f"--model c4 cannot use the stem {stem}, whose features are larger than the image")
    _, stem_stride, _, max_pool = train.STEMS[stem]
    stride = 4 * stem_stride
    if max_pool:
        stride *= 2
    pooler = AlignedRoIs(14, spatial_scale=1 / stride, sampling_ratio=0, aligned=True)

    # res5 and the extra BN: regions (n, width / 2, 14, 14) -> (n, width, 7, 7).
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
        pooler,
        res5,
        nn.Sequential(nn.AdaptiveAvgPool2d(1), box_predictor),  # (n, width, 7, 7) -> boxes
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=args.rois,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=args.detections,
        mask_roi_pool=pooler if masks else None,
        mask_head=res5 if masks else None,
        mask_predictor=mask_predictor if masks else None,
    )
    no_transform = None  # build_detector sets it
    return detection.generalized_rcnn.GeneralizedRCNN(trunk, rpn, heads, no_transform)


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
    ratios = ((0.5, 1.0, 2.0),) * len(sizes)
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


def build_detector(args: argparse.Namespace, classes: int, masks: bool) -> nn.Module:
    """The detector on the pretrained ResNet of the flags. `classes` includes the background."""
    options = {"norm_layer": FrozenBatchNorm2d} if args.norm == "frozen" else {}
    resnet, width, settings = linear_eval.read_backbone(args, **options)
    torch.manual_seed(args.seed)
    if args.model == "c4":
        model = build_c4(args, resnet, width, settings["stem"], classes, masks)
    else:
        model = build_fpn(args, resnet, width, classes, masks)
    mean, std = train.MEAN_STD[settings.get("dataset", "folder")]
    model.transform = Transform(args.test_short_side, args.long_side, mean, std)
    return model


def build_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with weight decay for all but the parameters of batch norm."""
    norm_params = []
    other_params = []
    for module in model.modules():
        is_norm = isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
        group = norm_params if is_norm else other_params
        group.extend(module.parameters(recurse=False))
    groups = [{"params": other_params, "weight_decay": weight_decay}, {"params": norm_params}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


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
    model: nn.Module, data: CocoImages, loader: DataLoader, device: torch.device
) -> list[dict]:
    """Detections in COCO's format. `loader` yields this process's share of the images, one by one;
    every process returns the detections of all images. The model is left in training mode."""
    model.eval()
    results = []
    for image, target in loader:
        (detections,) = model([image.to(device) / 255])
        boxes = box_convert(detections["boxes"], "xyxy", "xywh").tolist()
        labels = detections["labels"].tolist()
        scores = detections["scores"].tolist()
        for i, box in enumerate(boxes):
            result = {
                "image_id": target["image_id"],
                "category_id": data.category_ids[labels[i] - 1],
                "score": scores[i],
                "bbox": box,
            }
            if data.masks:
                result["segmentation"] = encode_mask(detections["masks"][i].cpu())
            results.append(result)
    model.train()
    return [result for share in train.gather_objects(results) for result in share]


def average_precision(data: CocoImages, results: list[dict], folder: Path) -> dict[str, float]:
    """COCO's AP of boxes and, if there are any, masks, in percent. Writes the results of each kind
    to a file of its own: with a box beside it, COCOeval would take a mask's area from the box."""
    numbers = {}
    for kind, name, left_out in [("bbox", "box AP", "segmentation"), ("segm", "mask AP", "bbox")]:
        if kind == "segm" and not data.masks:
            continue
        of_kind = [{k: v for k, v in result.items() if k != left_out} for result in results]
        (folder / f"results_{kind}.json").write_text(json.dumps(of_kind))

        values = [0.0] * 6  # nothing was detected
        if results:
            with contextlib.redirect_stdout(None):
                evaluation = COCOeval(data.coco, data.coco.loadRes(of_kind), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = evaluation.stats[:6].tolist()
        for suffix, value in zip(["", "50", "75", "s", "m", "l"], values):
            if value >= 0:  # -1: there are no objects of this size
                numbers[name + suffix] = 100 * value
    return numbers


def draw_results(data: CocoImages, results: list[dict], path: Path):
    """A picture of the first six images and what was detected with a score of at least 0.5."""
    side = 320
    pictures = []
    for index in range(min(6, len(data))):
        picture, target = data[0, index]
        shown = []
        for result in results:
            if result["image_id"] == target["image_id"] and result["score"] >= 0.5:
                shown.append(result)
        if shown and data.masks:
            masks = torch.stack([torch.from_numpy(rle.decode(r["segmentation"])) for r in shown])
            picture = draw_segmentation_masks(picture, masks.bool(), alpha=0.4, colors="lime")
        if shown:
            boxes = box_convert(torch.tensor([r["bbox"] for r in shown]), "xywh", "xyxy")
            names = [f"{data.names[r['category_id']]} {r['score']:.2f}" for r in shown]
            picture = draw_bounding_boxes(picture, boxes, names, colors="lime", width=2)
        picture = TF.resize(picture, None, max_size=side)
        pictures.append(TF.center_crop(picture, [side, side]))  # padded to a square
    save_image(make_grid(pictures, nrow=3, pad_value=255) / 255, path)


# --- Training -------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace) -> tuple[CocoImages, CocoImages]:
    """Training and validation images."""
    root = args.data
    if root is None:
        train.lock_folder(args.output)
        root = args.output / f"scenes{args.seed}"
        if train.RANK == 0:
            write_scenes(root, args.seed, {"train": 400, "val": 100})
        train.gather_objects("written")
    train_set = CocoImages(root, "train", True, args.seed, args.short_sides)
    val_set = CocoImages(root, "val", False)

    if train_set.names != val_set.names:
        differences = sorted(train_set.names.items() ^ val_set.names.items(), key=str)
        sys.exit(f"{root}: the categories of train and val differ in {differences}")
    if len(train_set) < args.batch_size:
        sys.exit(f"{len(train_set)} training images do not fill one --batch-size {args.batch_size}")

    masks = args.masks and train_set.masks and val_set.masks
    train_set.masks = masks
    val_set.masks = masks
    train.print_rank0("boxes and masks are trained" if masks else "only boxes are trained")
    n_images = sum(len(objects) > args.detections for _, objects in val_set.entries)
    if n_images:
        train.print_rank0(
            f"{n_images} of {len(val_set)} validation images have more objects than --detections "
            f"{args.detections}: not all can be found"
        )
    return train_set, val_set


def fine_tune(args: argparse.Namespace, device: torch.device):
    """Trains from the last checkpoint in args.output, if there is one, to the end."""
    # Data and schedule.
    train_set, val_set = load_data(args)
    total_steps = args.images // args.batch_size
    stop_step = min(total_steps, args.max_steps or total_steps)
    evaluation_interval = math.ceil(total_steps / args.evaluations)

    # Model.
    classes = 1 + len(train_set.category_ids)  # with the background
    model = build_detector(args, classes, train_set.masks)

    # Output folder.
    config = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUME}
    config["checkpoint"] = None if args.random else train.digest(args.checkpoint)
    config["data_digest"] = train.digest(train_set.digest, val_set.digest)
    saved = train.open_run(args.output, config)

    # Optimizer.
    if args.norm == "syncbn":
        model = train.convert_batch_norm(model, device)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, args.weight_decay)
    step = 0
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    ddp_model = train.wrap_ddp(model, device)

    # Loaders. Each process evaluates its share of the validation images.
    rows = torch.arange(len(train_set))
    train_keys = train.batch_indices(rows, args.batch_size, args.seed, step, stop_step)
    train_loader = train.make_loader(
        train_set, args.workers, batch_sampler=train_keys, collate_fn=list
    )
    val_keys = [(0, i) for i in range(train.RANK, len(val_set), train.WORLD)]
    val_loader = train.make_loader(val_set, args.workers, batch_size=None, sampler=val_keys)

    log = train.Log(args.output, step)

    def log_evaluation(step: int):
        start = time.monotonic()
        train.exit_unless_finite(model.state_dict(), step)
        train.broadcast_buffers(model)
        results = predict(model, val_set, val_loader, device)
        if train.RANK == 0:
            draw_results(val_set, results, args.output / "predictions.png")
            numbers = average_precision(val_set, results, args.output)
            log(step, **numbers, seconds=time.monotonic() - start)

    def save_run(step: int):
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "config": config,
            "step": step,
        }
        train.exit_unless_finite(state, step)
        train.write_config(args.output, config)
        train.save({args.output / "checkpoint.pt": state})

    last_save = time.monotonic()
    throughput = train.Throughput(args.batch_size)
    model.train()
    for batch in throughput.watch(train_loader):
        images = [train.to_device(image, device) / 255 for image, _ in batch]
        targets = [target for _, target in batch]
        for target in targets:
            for name, value in target.items():
                if isinstance(value, Tensor):
                    target[name] = train.to_device(value, device)
        lr = learning_rate(step, args)
        train.set_learning_rate(optimizer, lr)
        # torchvision samples anchors and regions with the global generator.
        torch.manual_seed(train.seed_from(args.seed, "regions", step, train.RANK))

        losses = ddp_model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1

        should_evaluate = step % evaluation_interval == 0 or step == stop_step
        if should_evaluate or step % args.log_every == 0:
            # Each process has the losses of its share of the batch.
            values = torch.stack([loss, *losses.values()]).tolist()
            shares = train.gather_objects(values)
            means = [sum(column) / train.WORLD for column in zip(*shares)]
            names = ["loss", *(name.removeprefix("loss_") for name in losses)]
            numbers = dict(zip(names, means))
            if not math.isfinite(numbers["loss"]):
                train.exit_diverged(f"the loss at step {step}, {numbers}")
            log(step, **numbers, lr=lr, **throughput.read(total_steps - step))
        if should_evaluate:
            log_evaluation(step)
            throughput.restart()
        # After the evaluation, so that a run that is killed in it measures again when resumed.
        due = time.monotonic() - last_save >= 60 * args.save_minutes
        if train.RANK == 0 and (due or step == stop_step):
            save_run(step)
            last_save = time.monotonic()
    train.print_rank0(f"step {step} of {total_steps}; see {args.output / 'predictions.png'}")


def main(argv: list[str] | None = None):
    train.launch(fine_tune, parse(argv))


if __name__ == "__main__":
    main()
