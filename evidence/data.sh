#!/bin/sh
# The image folders of the other scripts, from the repository's root: all of CIFAR-10 as PNG files, 5,000 and 1,000 of
# them (500 and 100 of each class), and these 5,000 with all 10,000 test images.
git clone https://github.com/cyizhuo/CIFAR-10-dataset data/cifar10
mv data/cifar10/test data/cifar10/val
mkdir data/cifar10_small data/cifar10_5000
tar c -C data/cifar10 -T evidence/cifar10_small.txt | tar x -C data/cifar10_small
ln -s ../cifar10_small/train ../cifar10/val data/cifar10_5000
