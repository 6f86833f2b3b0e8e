#!/bin/sh
# The runs of evidence/README.md's first table: each on one core, about 6 minutes; from the repository's root.
# data/cifar10_small holds 5,000 training and 1,000 test images of CIFAR-10, 500 and 100 of each class.
export OMP_NUM_THREADS=1
common="--data data/cifar10_small --dataset cifar10 --stem small --epochs 20 --workers 0 --knn-images 5000"

train() { # name, seed, flags
  name=$1 seed=$2 && shift 2
  torchrun train.py $common --seed $seed --output runs/$name-$seed "$@"
  python linear_eval.py --checkpoint runs/$name-$seed/checkpoint.pt --data data/cifar10_small --workers 0
}

for seed in 0 1 2; do
  train intl $seed --recipe cifar10
  train cwrgp $seed --recipe cwrgp-cifar10
  train whiten $seed --recipe whiten-cifar10
  train power0.45 $seed --recipe whiten-cifar10 --power 0.45
  train power0.55 $seed --recipe whiten-cifar10 --power 0.55
done

# The same with the stem of the papers, one seed, an hour.
torchrun train.py --recipe cifar10 --data data/cifar10_small --epochs 20 --workers 0 --knn-images 1000 --output runs/cifar-stem-0
python linear_eval.py --checkpoint runs/cifar-stem-0/checkpoint.pt --data data/cifar10_small --workers 0
