"""Experiments with flow-map objectives on CIFAR-10: pictures, Omni over their patches, a judge of the samples."""
