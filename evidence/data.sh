#!/bin/sh
# Make the image folders that the other scripts use. Run it from the repository's root.
#   data/cifar10        all of CIFAR-10 as PNG files, train/ and val/
#   data/cifar10_small  500 training and 100 test images of each class
#   data/cifar10_5000   the same training images, and all 10,000 test images
git clone https://github.com/cyizhuo/CIFAR-10-dataset data/cifar10
mv data/cifar10/test data/cifar10/val
mkdir data/cifar10_small data/cifar10_5000
tar c -C data/cifar10 -T evidence/cifar10_small.txt | tar x -C data/cifar10_small
ln -s ../cifar10_small/train ../cifar10/val data/cifar10_5000
