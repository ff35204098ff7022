"""Text: tokenizers without control tokens in text, documents to spans (compose), messages to documents (chat)."""

from omni.text.loading import load_tokenizer
from omni.text.tokenizer import ControlTokens, TextStream, Tokenizer

__all__ = ["ControlTokens", "TextStream", "Tokenizer", "load_tokenizer"]
