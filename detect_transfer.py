"""Fine-tune a pretrained ResNet for COCO detection and instance segmentation, with torchvision's parts.

    python detect_transfer.py                          # on shapes with boxes and masks, from runs/shapes
    python detect_transfer.py --random                 # the same from random weights, for comparison
    torchrun --nproc_per_node 8 detect_transfer.py --recipe coco-2x --data /data/coco --checkpoint r50.pth
    torchrun --nproc_per_node 8 detect_transfer.py --recipe coco-1x --data /data/coco --model fpn

--model c4, the published protocol: the ResNet to res4 as features, one level of anchors, RoIAlign, and res5,
with an extra BN behind it, as the head of boxes and masks. --model fpn: torchvision's own. All in float32.
--data is like COCO: annotations/instances_train2017.json, train2017/, and so for val; also without the year,
and images in images/train. Masks train where the annotations have them. The same command goes on.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d, RoIAlign, box_convert, clip_boxes_to_image, roi_align
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid, save_image

from linear_eval import backbone_flags, read_backbone
from train import (
    MEAN_STD,
    RANK,
    SHAPES,
    WORLD,
    Log,
    Shared,
    batches,
    common_flags,
    decode,
    distribute,
    draw_scene,
    read,
    resume,
    rng,
    save,
    say,
    start,
)

# fmt: off
RECIPES = {
    # This project's own, for CPUs: small images, few regions.
    "shapes": dict(
        images=1600, batch_size=4, base_lr=0.08, warmup_images=160, short_sides=[128], test_short_side=128,
        long_side=256, anchors=[16, 32, 64], train_proposals=[200, 50], test_proposals=[200, 30], rois=16,
        detections=10,
    ),
    "coco-2x": dict(),
    "coco-1x": dict(images=1_440_000),
}
# These flags may change when a run goes on.
FREE = "data", "output", "max_steps", "evaluations", "workers", "log_every", "save_minutes", "device"
# fmt: on


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    count, amount, share = common_flags(parser)
    backbone_flags(parser)
    # fmt: off
    add = parser.add_argument
    add("--recipe", default="shapes", choices=RECIPES, help="published: coco-2x; coco-1x: half of it")
    add("--data", type=Path, help="folder in COCO's layout (default: shapes, drawn into --output)")
    add("--evaluations", type=count, default=2, help="how often in the schedule AP is measured")
    add("--max-steps", type=count, help="stop after this many steps of the schedule")
    # R50-C4 with an extra norm, as MoCo's and INTL's configurations for detectron2 have it.
    add = parser.add_argument_group("what defines the run; a recipe gives the defaults").add_argument
    add("--model", default="c4", choices=["c4", "fpn"])
    add("--norm", default="syncbn", choices=["syncbn", "bn", "frozen"], help="syncbn: over all GPUs")
    add("--images", type=count, default=2_880_000, help="length of the schedule, in images seen")
    add("--batch-size", type=count, default=16, help="GLOBAL, over all processes")
    add("--base-lr", type=amount, default=0.02, help="learning rate per 16 images of the global batch")
    add("--milestones", type=share, nargs="*", default=[2 / 3, 8 / 9], help="of the schedule: rate over 10")
    add("--warmup-images", type=count, default=16_000, help="linear, from a thousandth")
    add("--weight-decay", type=amount, default=1e-4, help="of weights and biases; BN's are spared")
    add("--short-sides", type=count, nargs="+", default=[640, 672, 704, 736, 768, 800], help="one by chance")
    add("--test-short-side", type=count, default=800, help="short side in the evaluation")
    add("--long-side", type=count, default=1333, help="limit of the long side")
    add("--anchors", type=count, nargs="+", default=[32, 64, 128, 256, 512], help="ratios 1:2, 1:1, 2:1")
    add("--train-proposals", type=count, nargs=2, default=[12_000, 2000], help="before and after NMS")
    add("--test-proposals", type=count, nargs=2, default=[6000, 1000], help="fpn, published: 1000 1000")
    add("--rois", type=count, default=512, help="regions of an image that train the heads")
    add("--detections", type=count, default=100, help="of an image, at most")
    # fmt: on
    parser.set_defaults(**RECIPES[parser.parse_known_args(argv)[0].recipe])
    args = parser.parse_args(argv)
    if args.recipe != "shapes" and not args.data or args.model == "fpn" and len(args.anchors) != 5:
        parser.error("--recipe coco-* needs --data FOLDER, and --model fpn five --anchors, one a level")
    args.output = args.output or Path(f"runs/detect_{args.recipe}{'_random' * args.random}")
    return args


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


def write_shapes(folder: Path, seed: int, counts: dict[str, int]):
    """Scenes of one to four shapes, PNG and COCO JSON. What shows fewer than 30 pixels is not annotated."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, n in counts.items():
        (folder / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(n):
            key = i + 10**6 * (split == "val")
            kinds = torch.randint(len(SHAPES), (1 + i % 4,), generator=rng(seed, "kinds", key)).tolist()
            image, masks = draw_scene(seed, key, 128, kinds, 0.14, 0.28)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 128, "width": 128})
            for kind, mask in zip(kinds, masks):
                if mask.sum() >= 30:
                    runs = encode_mask(mask)
                    entry = {"id": len(annotations) + 1, "image_id": i, "category_id": kind + 1, "iscrowd": 0}
                    outline = {"segmentation": runs, "bbox": rle.toBbox(runs).tolist()}
                    annotations.append(entry | outline | {"area": float(rle.area(runs))})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def find(root: Path, *patterns: str) -> Path:
    found = sorted(path for pattern in patterns for path in root.glob(pattern))
    return found[0] if found else sys.exit(f"--data {root} has no {' nor '.join(patterns)}")


class CocoImages(torch.utils.data.Dataset):
    """Item (epoch, index) -> uint8 image (3, h, w), target: image_id, boxes (n, 4) as x1 y1 x2 y2, labels
    from 1 on in the order of the category ids, masks (n, h, w) if all annotations have them. For training
    half the images are flipped, and those without a usable object are left out."""

    def __init__(self, root: Path, split: str, training: bool, seed: int = 0):
        file = find(root, f"annotations/instances_{split}*.json")
        self.folder, self.training, self.seed = find(root, f"{split}*/", f"images/{split}*/"), training, seed
        try:
            with contextlib.redirect_stdout(None):  # pycocotools prints its progress
                self.coco = coco = COCO(file)
                for i, annotation in enumerate(coco.dataset["annotations"]):
                    annotation["id"] = i + 1  # COCOeval takes 0 for no match
                    annotation.setdefault("iscrowd", 0)
                    annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
                coco.createIndex()
                assert all(a["category_id"] in coco.cats for a in coco.anns.values()), "unknown category_id"
            images = [(x, [a for a in coco.imgToAnns[i] if usable(a, x)]) for i, x in coco.imgs.items()]
            self.images = Shared(entry for entry in images if entry[1] or not training)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            sys.exit(f"{file} is no COCO annotation file, or names no object: {error!r}")
        self.categories = sorted(coco.cats)
        self.masks = all(a.get("segmentation") for a in coco.anns.values())

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"coco": None}  # gigabytes, which workers do not need

    def __getitem__(self, key: tuple[int, int]):
        entry, objects = self.images[key[-1]]
        size, path = (entry["height"], entry["width"]), self.folder / entry["file_name"]
        image = decode(str(path))
        if image.shape[1:] != size:
            raise ValueError(f"{path} is {tuple(image.shape[1:])}, not {size} as annotated")
        labels = torch.tensor([1 + self.categories.index(o["category_id"]) for o in objects]).long()
        boxes = torch.tensor([o["bbox"] for o in objects]).reshape(-1, 4).float()
        boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), size)
        target = {"image_id": torch.tensor(entry["id"]), "labels": labels, "boxes": boxes}
        if self.masks:
            masks = [decode_mask(o["segmentation"], *size) for o in objects]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)
        if self.training and torch.rand((), generator=rng(self.seed, "flip", *key)) < 0.5:
            image = image.flip(-1)
            boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return image, target


def usable(annotation: dict, image: dict) -> bool:
    """No crowd, and a pixel at least in each direction inside the image."""
    x, y, w, h = annotation["bbox"]
    inside = min(min(x + w, image["width"]) - max(x, 0), min(y + h, image["height"]) - max(y, 0))
    return inside >= 1 and not annotation["iscrowd"]


class AlignedRoIs(RoIAlign):
    """Without the half-pixel offset: the published results' has none, torchvision's own pooler has one."""

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list) -> Tensor:
        return super().forward(features["0"], boxes)


class L1Proposals(detection.rpn.RegionProposalNetwork):
    """With the published L1 loss of the boxes, where torchvision has a smooth one."""

    def compute_loss(self, objectness, deltas, labels, targets):
        positive, negative = (torch.cat(chosen).nonzero()[:, 0] for chosen in self.fg_bg_sampler(labels))
        sampled, labels, targets = torch.cat([positive, negative]), torch.cat(labels), torch.cat(targets)
        box = F.l1_loss(deltas[positive], targets[positive], reduction="sum") / len(sampled)
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled]), box


class C4Heads(detection.roi_heads.RoIHeads):
    """In training boxes and masks share one pass through res5: the masks' regions are among the boxes'.
    (torchvision's own forward, which the evaluation takes, would run res5 and its BN once more on them.)"""

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        shared = self.box_head(self.box_roi_pool(features, proposals, image_shapes))  # (n, width, 7, 7)
        logits, deltas = self.box_predictor(shared)  # (n, classes), (n, 4 classes)
        kinds, inside = torch.cat(labels), [label > 0 for label in labels]
        positive = torch.cat(inside)

        own = deltas.unflatten(1, (-1, 4))[positive, kinds[positive]]  # (positives, 4)
        box = F.l1_loss(own, torch.cat(regression)[positive], reduction="sum") / len(kinds)
        losses = {"loss_classifier": F.cross_entropy(logits, kinds), "loss_box_reg": box}
        if self.has_mask():
            masks = self.mask_predictor(shared[positive])  # (positives, classes, 14, 14)
            own = masks[range(len(masks)), kinds[positive]]  # (positives, 14, 14)
            rows = zip(targets, matched, proposals, inside)
            truth = [crop_masks(t["masks"][m[i]], p[i], own.shape[-1]) for t, m, p, i in rows]
            wrong = F.binary_cross_entropy_with_logits(own, torch.cat(truth), reduction="sum")
            losses["loss_mask"] = wrong / max(1, own.numel())
        return [], losses


def crop_masks(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What a mask head should say: masks (n, h, w) inside boxes (n, 4), as 0 or 1 (n, size, size)."""
    rois = torch.cat([torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes), boxes], dim=1)
    return (roi_align(masks[:, None].float(), rois, size, aligned=True)[:, 0] >= 0.5).float()


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Probabilities (n, 1, s, s) inside boxes (n, 4) -> (n, height, width) bool, of the pixels' centres."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)  # (n, 1); below from -1 to 1 in the box
    x = (torch.arange(width, device=boxes.device) + 0.5 - x1) / (x2 - x1) * 2 - 1  # (n, width)
    y = (torch.arange(height, device=boxes.device) + 0.5 - y1) / (y2 - y1) * 2 - 1  # (n, height)
    whole = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):  # one at a time: a hundred large ones are gigabytes
        grid = torch.stack(torch.meshgrid(x[i], y[i], indexing="xy"), dim=-1)[None]  # (1, height, width, 2)
        whole[i] = F.grid_sample(masks[i : i + 1], grid, align_corners=False)[0, 0] >= 0.5
    return whole


class Transform(detection.transform.GeneralizedRCNNTransform):
    """torchvision's, but masks are pasted without rounding the boxes to whole pixels."""

    def postprocess(self, result, image_shapes, original_image_sizes):
        if not self.training:
            for found, shape, (height, width) in zip(result, image_shapes, original_image_sizes):
                found["boxes"] = detection.transform.resize_boxes(found["boxes"], shape, (height, width))
                if "masks" in found:
                    found["masks"] = paste_masks(found["masks"], found["boxes"], height, width)
        return result


def build_detector(args, resnet: nn.Module, width: int, config: dict, classes: int, masks: bool) -> nn.Module:
    """The detector on a ResNet with features of this width; `classes`: with the background."""
    norm = nn.BatchNorm2d if args.norm != "frozen" else None
    sizes = tuple(zip(args.anchors)) if args.model == "fpn" else (tuple(args.anchors),)  # of each level
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    before, after = ({"training": n, "testing": m} for n, m in zip(args.train_proposals, args.test_proposals))
    if args.model == "fpn":
        layers, widths = {f"layer{i + 1}": str(i) for i in range(4)}, [width // 2**i for i in (3, 2, 1, 0)]
        trunk = detection.backbone_utils.BackboneWithFPN(resnet, layers, widths, 256, norm_layer=norm)
        options = dict(rpn_pre_nms_top_n_train=before["training"], rpn_pre_nms_top_n_test=before["testing"])
        options |= dict(rpn_post_nms_top_n_train=after["training"], rpn_post_nms_top_n_test=after["testing"])
        options |= dict(box_batch_size_per_image=args.rois, box_detections_per_img=args.detections)
        kind = detection.MaskRCNN if masks else detection.FasterRCNN
        model = kind(trunk, classes, rpn_anchor_generator=anchors, **options)
    else:
        trunk = detection.backbone_utils.IntermediateLayerGetter(resnet, {"layer3": "0"})
        head = detection.rpn.RPNHead(width // 2, *anchors.num_anchors_per_location())
        options = dict(fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5)
        options |= dict(pre_nms_top_n=before, post_nms_top_n=after, nms_thresh=0.7)
        rpn = L1Proposals(anchors, head, **options)

        stride = 4 if config["stem"].startswith("cifar") else 16
        regions = AlignedRoIs(14, spatial_scale=1 / stride, sampling_ratio=0, aligned=True)
        res5 = nn.Sequential(resnet.layer4, norm(width) if norm else nn.Identity())  # to (n, width, 7, 7)
        box = detection.faster_rcnn.FastRCNNPredictor(width, classes)
        mask = detection.mask_rcnn.MaskRCNNPredictor(width, 256, classes)
        for layer, std in (box.cls_score, 0.01), (box.bbox_pred, 0.001), (mask.mask_fcn_logits, 0.001):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        options = dict(fg_iou_thresh=0.5, bg_iou_thresh=0.5, positive_fraction=0.25, bbox_reg_weights=None)
        options |= dict(batch_size_per_image=args.rois, detections_per_img=args.detections, score_thresh=0.05)
        if masks:
            options |= dict(mask_roi_pool=regions, mask_head=res5, mask_predictor=mask)
        heads = C4Heads(regions, res5, nn.Sequential(nn.AdaptiveAvgPool2d(1), box), nms_thresh=0.5, **options)
        model = detection.generalized_rcnn.GeneralizedRCNN(trunk, rpn, heads, None)
    mean, std = MEAN_STD[config.get("dataset", "folder")]
    model.transform = Transform(args.short_sides, args.long_side, mean, std)
    return model


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Of step 0, 1, ...: linear warm-up, then divided by 10 at each milestone."""
    seen = step * args.batch_size
    warm = min(1, 0.001 + 0.999 * seen / max(1, args.warmup_images))
    drops = sum(seen >= milestone * args.images for milestone in args.milestones)
    return args.base_lr * args.batch_size / 16 * warm * 0.1**drops


@torch.no_grad()
def predict(model: nn.Module, data: CocoImages, loader, test_short_side: int, device) -> list[dict]:
    """COCO's results of every image once, with box and mask; each process does its share, image by image."""
    results, sides = [], model.transform.min_size
    for buffer in model.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)  # where BN is each process's own, the first one's statistics count
    model.eval()
    model.transform.min_size = (test_short_side,)
    for image, target in loader:
        (found,) = model([image.to(device).float() / 255])
        boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
        for i, box in enumerate(boxes):
            result = {"image_id": int(target["image_id"]), "score": float(found["scores"][i]), "bbox": box}
            result["category_id"] = data.categories[int(found["labels"][i]) - 1]
            if data.masks:
                result["segmentation"] = encode_mask(found["masks"][i].cpu())
            results.append(result)
    model.transform.min_size = sides
    model.train()
    if WORLD > 1:
        dist.all_gather_object(shares := [None] * WORLD, results)
        results = sorted(sum(shares, []), key=lambda result: result["image_id"])
    return results


def average_precision(data: CocoImages, results: list[dict], folder: Path) -> dict[str, float]:
    """COCO's AP in percent of boxes and, if there are any, masks. The results are written in COCO's format,
    each kind in a file of its own: with a box beside it, a mask's area would be the box's."""
    ap, names = {}, ("AP", "AP50", "AP75", "APs", "APm", "APl")
    for kind, name, other in (("bbox", "box", "segmentation"), ("segm", "mask", "bbox"))[: 1 + data.masks]:
        found = [{k: v for k, v in result.items() if k != other} for result in results]
        (folder / f"results_{kind}.json").write_text(json.dumps(found))
        values = [0.0] * 6
        if found:
            with contextlib.redirect_stdout(None):
                evaluation = COCOeval(data.coco, data.coco.loadRes(found), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = evaluation.stats[:6].tolist()  # -1: no objects of that size
        ap |= {f"{name} {ap_name}": 100 * value for ap_name, value in zip(names, values) if value >= 0}
    return ap


def draw_results(data: CocoImages, results: list[dict], path: Path, n: int = 6, side: int = 320):
    """A PNG: n images with what was found in them with a score of at least 0.5."""
    pictures = []
    for i in range(min(n, len(data))):
        picture, target = data[0, i]
        found = [r for r in results if r["image_id"] == target["image_id"] and r["score"] >= 0.5]
        if found and data.masks:
            masks = [decode_mask(r["segmentation"], *picture.shape[1:]) for r in found]
            picture = draw_segmentation_masks(picture, torch.stack(masks).bool(), alpha=0.4, colors="lime")
        if found:
            boxes = box_convert(torch.tensor([r["bbox"] for r in found]), "xywh", "xyxy")
            names = [f"{data.coco.cats[r['category_id']]['name']} {r['score']:.2f}" for r in found]
            picture = draw_bounding_boxes(picture, boxes, names, colors="lime", width=2)
        pictures.append(TF.center_crop(TF.resize(picture, [side - 1], max_size=side), [side, side]))  # padded
    save_image(make_grid(pictures, nrow=3, pad_value=255) / 255, path)


def main(argv: list[str] | None = None):
    args = parse(argv)
    folder = args.output
    device, _ = start(args.device, "float32")

    # data, and the length of the run
    folder.mkdir(parents=True, exist_ok=True)
    if not args.data:
        args.data = folder / "shapes"
        if RANK == 0:
            write_shapes(args.data, args.seed, {"train": 400, "val": 100})
        if WORLD > 1:
            dist.barrier()
    train, val = (CocoImages(args.data, split, split == "train", args.seed) for split in ("train", "val"))
    if min(len(train), args.images) < args.batch_size or args.batch_size % WORLD:
        sys.exit(f"--batch-size {args.batch_size} does not fit {len(train)} images, {WORLD} processes")
    if train.categories != val.categories or train.masks < val.masks:
        sys.exit(f"{args.data}: train and val differ in their categories, or in having masks")
    steps = args.images // args.batch_size
    last = min(steps, args.max_steps or steps)

    # model and optimiser
    options = {"norm_layer": FrozenBatchNorm2d} if args.norm == "frozen" else {}
    resnet, width, pretrained = read_backbone(args, **options)
    torch.manual_seed(args.seed)
    model = build_detector(args, resnet, width, pretrained, 1 + len(train.categories), train.masks)
    if args.norm == "syncbn" and WORLD > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)
    norms, others = split_normalization_params(model)
    groups = [{"params": others, "weight_decay": args.weight_decay}, {"params": norms}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)

    # go on from a checkpoint
    config = {k: v for k, v in vars(args).items() if k not in FREE} | {"train_images": len(train)}
    config |= {"checkpoint": str(args.checkpoint)}
    saved, step = resume(folder / "checkpoint.pt", config), 0
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    wrapped = distribute(model, device)

    # say what the run is
    log = Log(folder, config, step) if RANK == 0 else lambda **numbers: None
    say(f"{'RANDOM weights' if args.random else args.checkpoint}; {steps} steps, from step {step}; {folder}")
    say(f"all parameters train; {len(train)} images, {len(val)} to evaluate, masks: {train.masks}")

    # train
    mine = [(0, i) for i in range(RANK, len(val), WORLD)]
    held_out = read(val, args.workers, batch_size=None, sampler=mine)
    keys = batches(torch.arange(len(train)), args.batch_size, args.seed, step, last)
    saved_at = logged_at = before = time.time()
    logged, waited = step, 0.0
    model.train()
    for pairs in read(train, args.workers, batch_sampler=keys, collate_fn=list):
        waited += time.time() - before
        images = [image.to(device, non_blocking=True).float() / 255 for image, _ in pairs]
        targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for _, target in pairs]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        torch.manual_seed(rng(args.seed, "regions", step, RANK).initial_seed())  # sizes and regions are drawn

        losses = wrapped(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1

        # log, evaluate, save
        measures = step == last or step * args.evaluations // steps > (step - 1) * args.evaluations // steps
        if measures or step % args.log_every == 0:
            numbers = {k.removeprefix("loss_"): v.item() for k, v in {"loss": loss, **losses}.items()}
            if not loss.isfinite():
                sys.exit(f"the loss is not finite at step {step}: {numbers}. Try a lower --base-lr")
            seconds = time.time() - logged_at
            speed = (step - logged) * args.batch_size / seconds
            numbers |= {"lr": group["lr"], "images_per_second": speed, "waiting": waited / seconds}
            log(step=step, **numbers, hours_left=(steps - step) * args.batch_size / speed / 3600)
            if measures:
                began, results = time.time(), predict(model, val, held_out, args.test_short_side, device)
                if RANK == 0:
                    draw_results(val, results, folder / "predictions.png")
                    log(step=step, **average_precision(val, results, folder), seconds=time.time() - began)
            if RANK == 0 and (time.time() - saved_at > 60 * args.save_minutes or step == last):
                state = {"config": config, "step": step, "model": model.state_dict()}
                save(state | {"optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
                saved_at = time.time()
            logged_at, logged, waited = time.time(), step, 0.0
        before = time.time()
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
