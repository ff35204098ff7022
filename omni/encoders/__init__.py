"""Picture encoders for understanding: pictures to features, which enter the context stream as a block.

A new encoder is one file that registers itself in `encoders`. The towers are those of transformers, which is imported
when a tower is first used: pip install 'omni-flow[hf]'.
"""

from omni.encoders.encoder import Encoder, EncoderSpec, encoders
from omni.encoders.loading import load_encoder, read_encoder
from omni.encoders.projector import EncoderBlockConfig, FeatureProjector
from omni.encoders.qwen_vl import Qwen2VLEncoder, Qwen3VLEncoder
from omni.encoders.siglip import SiglipEncoder

__all__ = [
    "Encoder",
    "EncoderBlockConfig",
    "EncoderSpec",
    "FeatureProjector",
    "Qwen2VLEncoder",
    "Qwen3VLEncoder",
    "SiglipEncoder",
    "encoders",
    "load_encoder",
    "read_encoder",
]
