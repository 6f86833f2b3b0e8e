#!/bin/sh
# The runs of evidence/README.md's "The official release beside us": each on one core, 6 minutes; from the
# repository's root, with a clone of github.com/winci-ai/INTL at commit d4cdfd8 in the folder INTL.
export OMP_NUM_THREADS=1 PYTHONPATH=.
for seed in 0 1 2; do
  python evidence/official.py INTL --data data/cifar10_small --seed $seed --output runs/official-$seed
  python linear_eval.py --checkpoint runs/official-$seed/backbone.pt --arch resnet18 --stem small \
    --dataset cifar10 --data data/cifar10_small --workers 0
done
