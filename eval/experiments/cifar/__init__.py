"""CIFAR-10 as a laboratory of flow-map objectives: pictures, Omni over their patches, a judge of what is drawn."""
