#!/bin/sh
# The runs of "Comparison with the official release" in evidence/README.md: 6 minutes each on one
# core, 40 with the 3x3 stem. Run data.sh and methods.sh first, then this from the repository's root,
# with a clone of github.com/winci-ai/INTL at commit d4cdfd8 in the folder INTL.
export OMP_NUM_THREADS=1 PYTHONPATH=.

official() { # name, seed, stem
  python evidence/official.py INTL --data data/cifar10_small --seed $2 --output runs/$1-$2 --stem $3
}

evaluate() { # checkpoint, data, flags
  checkpoint=runs/$1 data=data/$2 && shift 2
  python linear_eval.py --checkpoint $checkpoint --data $data --workers 0 "$@"
}

for seed in 0 1 2; do
  official official $seed small
  for data in cifar10_small cifar10_5000; do
    evaluate official-$seed/backbone.pt $data --arch resnet18 --stem small --dataset cifar10
  done
  evaluate intl-$seed/checkpoint.pt cifar10_5000
done

official official-cifar-stem 0 cifar
evaluate official-cifar-stem-0/backbone.pt cifar10_small --arch resnet18 --stem cifar --dataset cifar10
torchrun train.py --recipe cifar10 --data data/cifar10_small --epochs 20 --workers 0 --precision bfloat16 \
  --output runs/intl-cifar-stem-0
evaluate intl-cifar-stem-0/checkpoint.pt cifar10_small
