"""Speed against two other libraries in the same run: equal work and dtype, alternating runs, ratio of medians.

    speed_training   a training step on text-image and text-image-text-image-text samples, against transfusion-pytorch
    speed_text       cached greedy decoding of one request, against transformers' LlamaForCausalLM.generate
    speed_prefill    the first token after a long prompt, against the same
    speed_batch      cached greedy decoding of a batch of requests, against the same
    speed_image      one image block after a text prompt, against transfusion-pytorch

Weights are random: speed does not depend on them, except where a report row names their values. A ratio above 1 means
that Omni is faster. In a ratio both sides compute in one dtype, do the same work, and are both eager or both compiled;
the row's note lists what is compared, with the spread. Of several settings of the other library that compute the same,
the fastest counts. Rows in bfloat16 are not measured (nan) on a machine that computes it slowly, unless `slow_bf16`.
"""

from eval.tasks.speed import image, text, training

__all__ = ["image", "text", "training"]
