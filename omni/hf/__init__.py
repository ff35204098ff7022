"""Omni models in the Hugging Face world. `import omni.hf` registers them with AutoConfig and AutoModel (hf.auto); needs
omni-flow[hf]."""

from omni.hf.auto import OmniHubConfig, OmniModel

__all__ = ["OmniHubConfig", "OmniModel"]
