#!/bin/sh
# The runs of "Without a GPU" in evidence/README.md, each on one core. Run data.sh first, then this
# from the repository's root. torchvision's download of CIFAR-10 has the same images as data/cifar10
# in another order.
export OMP_NUM_THREADS=1
random="python linear_eval.py --random --stem small"

for seed in 0 1 2 3 4; do
  torchrun train.py --seed $seed --output runs/shapes-$seed
  python linear_eval.py --checkpoint runs/shapes-$seed/checkpoint.pt
  $random --arch resnet10 --seed $seed --dataset shapes --output runs/shapes-random-$seed
done

torchrun train.py --recipe cifar10 --stem small --epochs 30 --data data/cifar10 --workers 0 \
  --precision bfloat16 --output runs/whole
python linear_eval.py --checkpoint runs/whole/checkpoint.pt --data data/cifar10 --workers 0
$random --arch resnet18 --dataset cifar10 --data data/cifar10 --workers 0 --output runs/whole-random
