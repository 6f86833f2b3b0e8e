#!/bin/sh
# The runs of evidence/README.md's "Without a GPU", after data.sh, each on one core; from the repository's root.
# data/cifar10's train/ and val/ are CIFAR-10's 50,000 and 10,000 as PNG files (github.com/cyizhuo/CIFAR-10-dataset);
# torchvision's download has the same, in another order.
export OMP_NUM_THREADS=1
random="python linear_eval.py --random --arch resnet18 --stem small"

torchrun train.py
python linear_eval.py
$random --dataset shapes --output runs/shapes-random

torchrun train.py --recipe cifar10 --stem small --epochs 30 --data data/cifar10 --workers 0 --output runs/whole
python linear_eval.py --checkpoint runs/whole/checkpoint.pt --data data/cifar10 --workers 0
$random --dataset cifar10 --data data/cifar10 --workers 0 --output runs/whole-random
