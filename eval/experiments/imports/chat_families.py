"""Tiny tokenizers of the kinds that published language models have, with their chat templates, as transformers saves
them. A family is a function of a folder that writes one there."""

# ruff: noqa: E501 (templates are as published)

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = "the a red apple green cat dog draw what is this of two three für été 猫 рисуй user assistant system you are".split()
CORPUS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) + f".\nNow {i}?" for i in range(200)]

CHATML = (  # SmolLM2-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are"
    " a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == "
    "'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + "
    "role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
    "'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are "
    "supported!') }}{% endif %}{% endfor %}"
)
LLAMA2 = MISTRAL.replace("{{ message['content'] + eos_token}}", "{{ ' ' + message['content'] + ' ' + eos_token}}")
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'"
    "}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == "
    "'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message["
    "'content'] + '\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% elif "
    "message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n'"
    " }}{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and "
    "add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages %}{%- if message.role == "user" %}{%- set ns.last_query_index = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def special(*names: str, **options: bool) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, **options) for name in names]


def plain(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=False, normalized=False) for name in names]


def byte_level(added: Sequence[AddedToken], **parts: Any) -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3, Qwen and OLMo have."""
    library = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(
        tokenizers.Regex(r"\s*[\r\n]+|\s+(?!\S)|\s?[^\s\p{L}\p{N}]+|\s?\p{L}+|\p{N}"), "isolated"
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet)
    library.train_from_iterator(CORPUS, trainer)
    for name, part in parts.items():
        setattr(library, name, part)
    for one in added:
        (library.add_special_tokens if one.special else library.add_tokens)([one])
    return library


def byte_fallback(first: Sequence[str], added: Sequence[AddedToken], kind: str) -> tokenizers.Tokenizer:
    """As SentencePiece BPE models convert. kind: "none" (Gemma), "legacy" (Mistral, Phi-3), "first" or "always" (Llama
    2): how a space is written in front of text."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=260, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    pieces += [token for token in ("\n", "\n\n", "▁▁") if token not in pieces]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in model["merges"]] + [("▁", "▁")]
    library = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", "▁")
    if kind == "none":
        library.normalizer = replace
        library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "legacy":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    library.decoder = decoders.Sequence(steps if kind == "none" else [*steps, decoders.Strip(" ", 1, 0)])
    for one in added:
        (library.add_special_tokens if one.special else library.add_tokens)([one])
    return library


def save(folder: Path, library: tokenizers.Tokenizer, template: str | None, ends: Any = None, **special: str) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=library, chat_template=template, **special).save_pretrained(folder)
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


def chatml(folder: Path) -> None:
    library = byte_level(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), normalizer=normalizers.NFC())
    save(folder, library, CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>")


def qwen3(folder: Path) -> None:
    library = byte_level(
        [*special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), *plain("<think>", "</think>", "<x>")]
    )
    library.normalizer = normalizers.NFC()
    ends = [library.token_to_id("<|im_end|>"), library.token_to_id("<|endoftext|>")]
    save(folder, library, QWEN3, ends, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama3(folder: Path) -> None:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    library = byte_level(special(*names, *(f"<|reserved_special_token_{n}|>" for n in range(20))))
    ends = [library.token_to_id("<|end_of_text|>"), library.token_to_id("<|eot_id|>")]
    save(folder, library, LLAMA3, ends, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def olmo2(folder: Path) -> None:
    library = byte_level(special("<|endoftext|>", "<|pad|>"))  # <|user|> is text
    save(folder, library, OLMO2, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>")


def gemma(folder: Path) -> None:
    first = ("<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<start_of_turn>", "<end_of_turn>", "<table>")
    added = [*special(*first[:4]), *special("<start_of_turn>", "<end_of_turn>")]
    library = byte_fallback(first, [*added, *plain("<unused0>", "<table>", "\n", "\n\n", "▁▁")], "none")
    save(folder, library, GEMMA, [1, 6], bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def mistral(folder: Path) -> None:
    library = byte_fallback(("<unk>", "<s>", "</s>"), special("<unk>", "<s>", "</s>"), "legacy")
    save(folder, library, MISTRAL, 2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama2(folder: Path) -> None:
    library = byte_fallback(("<unk>", "<s>", "</s>"), special("<unk>", "<s>", "</s>"), "first")
    save(folder, library, LLAMA2, 2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def phi3(folder: Path) -> None:
    added = special("<unk>", "<s>")
    added += special("</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True)
    library = byte_fallback(("<unk>", "<s>", "</s>"), added, "legacy")
    ends = [library.token_to_id(name) for name in ("<|endoftext|>", "<|end|>")]
    save(folder, library, PHI3, ends, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>")


FAMILIES: dict[str, Callable[[Path], None]] = {
    one.__name__: one for one in (chatml, qwen3, llama3, olmo2, gemma, mistral, llama2, phi3)
}
HAS_NO_SYSTEM = ("gemma", "mistral", "llama2")


def read_published(folder: Path) -> Any:
    """The tokenizer in a folder, as transformers reads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
