"""CIFAR-10 as a laboratory of flow-map objectives: its pictures, Omni over their patches, and a judge of what it draws."""
