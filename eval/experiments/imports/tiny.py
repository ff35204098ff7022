"""Tiny published language models: random weights of transformers' classes, a tokenizer of bytes, a ChatML template; and
a small table of pictures with captions. What a run with real weights and data does, in seconds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from PIL import Image as PILImage
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from omni.rng import Key

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
}  # fmt: skip
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220), "yellow": (240, 210, 40)}


def write_decoder(folder: Path, family: str, **settings: Any) -> Path:
    """A model of a family ("llama", "qwen3", ...) as its class saves it, with its tokenizer."""
    import transformers

    folder.mkdir(parents=True)
    write_tokenizer(folder)
    name = {"llama": "Llama", "qwen3": "Qwen3", "qwen2": "Qwen2", "gemma2": "Gemma2"}[family]
    vocabulary = 256 + len(SPECIAL)
    config = getattr(transformers, f"{name}Config")(
        **{**SIZES, "vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": vocabulary - 1, **settings}
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim > 1:
                value.copy_(Key(0).fold("tiny", key).normal(tuple(value.shape)) * 0.1)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One id for each byte, then the special tokens; ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    library.save(str(folder / "tokenizer.json"))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2], "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


def write_captioned(path: Path, num: int = 64, side: int = 32) -> Path:
    """A parquet file of squares on plain grounds, with their captions."""
    import pyarrow
    import pyarrow.parquet as parquet

    rows, names = [], list(COLOURS)
    for n in range(num):
        inside, ground = names[n % 4], names[(n // 4 + n + 1) % 4]
        picture = PILImage.new("RGB", (side, side), COLOURS[ground])
        at = 4 + n % 8
        picture.paste(COLOURS[inside], (at, at, at + 14, at + 14))
        data = io.BytesIO()
        picture.save(data, "PNG")
        rows.append((data.getvalue(), f"a {inside} square on {ground}"))
    pictures, captions = zip(*rows, strict=True)
    parquet.write_table(pyarrow.table({"image": pictures, "caption": captions}), path)
    return path
