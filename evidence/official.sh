#!/bin/sh
# The runs of evidence/README.md's "The official release beside us": each on one core, 6 minutes, with the 3x3 stem
# 40; from the repository's root, with a clone of github.com/winci-ai/INTL at commit d4cdfd8 in the folder INTL.
# Those of train.py with the small stem are in methods.sh.
export OMP_NUM_THREADS=1 PYTHONPATH=.
data="--data data/cifar10_small"

official() { # name, seed, stem
  python evidence/official.py INTL $data --seed $2 --output runs/$1-$2 --stem $3
  python linear_eval.py --checkpoint runs/$1-$2/backbone.pt --arch resnet18 --stem $3 --dataset cifar10 $data --workers 0
}

for seed in 0 1 2; do
  official official $seed small
done
official official-cifar-stem 0 cifar
torchrun train.py --recipe cifar10 $data --epochs 20 --workers 0 --knn-images 1000 --output runs/intl-cifar-stem-0
python linear_eval.py --checkpoint runs/intl-cifar-stem-0/checkpoint.pt $data --workers 0
