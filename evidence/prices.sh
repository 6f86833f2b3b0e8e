#!/bin/sh
# The runs of "Small batches, and other T" in evidence/README.md: 1 to 11 minutes each on one core.
# Run data.sh first, then this from the repository's root. config.json and log.jsonl of each run were
# copied to evidence/runs/prices.
export OMP_NUM_THREADS=1
common="--workers 0 --log-every 50 --precision bfloat16"
cifar="--recipe cifar10 --data data/cifar10_small --stem small --epochs 10 $common"

train() { # prefix, flags, then n, T, beta, seeds
  prefix=$1 flags=$2 n=$3 T=$4 beta=$5 && shift 5
  for seed; do
    torchrun train.py $flags --batch-size $n --iterations $T --beta $beta --seed $seed \
      --output runs/beta/${prefix}n$n-T$T-beta$beta-$seed
  done
}

# T = 4: the published beta, the balanced one, and others
train "" "$cifar" 16 4 .01 0
train "" "$cifar" 16 4 .06 0
train "" "$cifar" 16 4 .075 0 1 2
train "" "$cifar" 32 4 .02 0 1 2
for beta in .025 .03 .035 .06 .1; do train "" "$cifar" 32 4 $beta 0; done
train "" "$cifar" 32 4 .043 0 1 2
train "" "$cifar" 64 4 .015 0
train "" "$cifar" 64 4 .03 0
train "" "$cifar" 128 4 .032 0
train "" "$cifar" 128 4 .04 0
for beta in .025 .04 .05 .1; do train "" "$cifar" 256 4 $beta 0; done
for beta in .04 .06 .087; do train "" "$cifar" 512 4 $beta 0; done
for beta in .06 .087; do train long- "$cifar --epochs 30" 512 4 $beta 0; done

# other numbers of Newton steps
train "" "$cifar" 256 2 .05 0 1 2
train "" "$cifar" 256 2 1.22 0 1 2
train "" "$cifar" 256 3 .05 0 1 2
train "" "$cifar" 256 3 .23 0 1 2
train "" "$cifar" 256 5 .05 0
train "" "$cifar" 256 5 .013 0
train "" "$cifar" 256 7 .05 0
train "" "$cifar" 256 7 .0044 0
train "" "$cifar" 256 2 1 0
train "" "$cifar" 256 3 .19 0
train "" "$cifar" 256 7 .0026 0

# a teacher; the batch axis; drawn shapes
train teacher- "$cifar --ema .996" 32 4 .02 0
train teacher- "$cifar --ema .996" 32 4 .043 0
train teacher- "$cifar --ema .996" 256 4 .05 0
train batch- "$cifar --axis batch" 256 4 .08 0
train batch- "$cifar --axis batch" 256 2 .08 0
train batch- "$cifar --axis batch" 256 2 1.2 0
# The recipe of the shapes at that time, which drew 6,000 images.
shapes="--arch resnet18 --epochs 4 --base-lr .3 --warmup-epochs 1 --evaluate-every 1 $common"
for cell in "16 4 .01" "16 4 .075" "256 4 .05" "256 3 .05" "256 3 .23"; do
  train shapes- "$shapes" $cell 0
done
train shapes- "$shapes" 32 4 .02 0 1 2
train shapes- "$shapes" 32 4 .043 0 1 2
