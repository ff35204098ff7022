"""Text: tokenizers that know no control token, documents to spans (compose), chat messages to documents (chat)."""

from omni.text.loading import load_tokenizer
from omni.text.tokenizer import ControlTokens, TextStream, Tokenizer

__all__ = ["ControlTokens", "TextStream", "Tokenizer", "load_tokenizer"]
