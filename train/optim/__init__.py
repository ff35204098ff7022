"""The training kit: optimisers, schedules of the learning rate, averages of weights, target networks.

It reads no recipe and knows no loop: the trainers of models and codecs and the laboratories of `eval` use it alike.
"""
