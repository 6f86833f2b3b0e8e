#!/bin/sh
# The runs of "Methods side by side" in evidence/README.md: 5 to 12 minutes each on one core. Run
# data.sh first, then this from the repository's root.
export OMP_NUM_THREADS=1 PYTHONPATH=.
data="--data data/cifar10_small --workers 0"
common="--dataset cifar10 --stem small --epochs 20 --precision bfloat16"

train() { # name, seed, script, flags
  output=runs/$1-$2 seed=$2 script=$3 && shift 3
  torchrun $script $data $common --seed $seed --output $output "$@"
  python linear_eval.py --checkpoint $output/checkpoint.pt $data
}

baseline() { # loss, learning rate, seed
  train ${1%-twins}-$2 $3 evidence/baselines.py --recipe cifar10 --loss $1 --optimizer adam --base-lr $2 --weight-decay 1e-6
}

for seed in 0 1 2; do
  train intl $seed train.py --recipe cifar10
  train so $seed train.py --recipe cifar10 --orthogonality so
  train srip $seed train.py --recipe cifar10 --orthogonality srip --orthogonality-weight 1e-3
  train iternorm $seed train.py --recipe cifar10 --loss iternorm
  train none $seed train.py --recipe cifar10 --loss none
  train cwrgp $seed train.py --recipe cwrgp-cifar10
  train cwrgp4 $seed train.py --recipe cwrgp-cifar10-4views
  train whiten $seed train.py --recipe whiten-cifar10
  for p in 0.2 0.45 0.55; do
    train power$p $seed train.py --recipe whiten-cifar10 --power $p
  done
  python linear_eval.py --random --arch resnet18 --stem small --seed $seed --dataset cifar10 $data --output runs/random-$seed
done

for loss in barlow-twins vicreg; do
  for lr in 0.0003 0.001 0.003; do baseline $loss $lr 0; done
done
for seed in 1 2; do # the best learning rate of each
  baseline barlow-twins 0.001 $seed
  baseline vicreg 0.001 $seed
done
