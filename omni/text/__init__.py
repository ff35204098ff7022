"""Text: tokenizers without control tokens in text, documents to spans (compose), messages to documents (chat)."""

from omni.text.convert import convert_tokenizer
from omni.text.loading import load_tokenizer
from omni.text.tokenizer import ControlTokens, TextStream, Tokenizer

__all__ = ["ControlTokens", "TextStream", "Tokenizer", "convert_tokenizer", "load_tokenizer"]
