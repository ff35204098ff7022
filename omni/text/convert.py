"""A published tokenizer, in a folder of Hugging Face's layout or in a GGUF file, as ours.

transformers reads the files (extra `hf`), from this machine alone and without code of others; the result loads without
it. Which ids end a reply: eos_token_id of generation_config.json and config.json, the tokenizer's end token, and the
token that the chat template writes after an assistant's turn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from omni.config import parse_json
from omni.text.published import PublishedSettings, PublishedTokenizer
from omni.text.template import ChatTemplate
from omni.text.tokenizer import MAX_BYTES


def convert_tokenizer(
    path: str | Path,
    gguf_file: str | None = None,
    num_rows: int | None = None,
    variables: Mapping[str, Any] | None = None,
    theirs: Any = None,
) -> PublishedTokenizer:
    """The tokenizer of a published model, with its chat template, if it has one.

    path: the folder (tokenizer.json, or a sentencepiece tokenizer.model with tokenizer_config.json), or a GGUF file.
    gguf_file: name of a GGUF file in the folder.
    num_rows: rows of the model's embedding; None: as many as the tokenizer has ids. Our control ids come after them.
    variables: further variables of the chat template, such as {"enable_thinking": False}; saved with the tokenizer.
    theirs: what `load_published` has read of the same path, if it has.

    Raises ValueError for files that are missing, unsupported or do not belong together; ImportError without
    transformers.
    """
    path = Path(path)
    if gguf_file is None and path.suffix == ".gguf" and path.is_file():
        path, gguf_file = path.parent, path.name
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is no folder; give the folder of a published model, or a GGUF file")
    theirs = load_published(path, gguf_file) if theirs is None else theirs
    library = _text_library(theirs.backend_tokenizer)
    special = {name: str(token) for name, token in theirs.special_tokens_map.items() if not isinstance(token, list)}
    source = theirs.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    template = None if source is None else ChatTemplate(source, special, variables)
    ids = library.get_vocab().values()
    found = theirs("x")["input_ids"]
    settings = PublishedSettings(
        num_theirs=num_rows or max(ids) + 1,
        bos=theirs.bos_token_id,
        adds_bos=theirs.bos_token_id is not None and found[:1] == [theirs.bos_token_id],
        ends=_ends(path, theirs),
        marks=_marks(library, template),
        special=special,
        variables=dict(variables or {}),
    )
    tokenizer = PublishedTokenizer(library, settings, template)
    if template is None or (end := _end_of_turn(tokenizer, template)) is None:
        return tokenizer
    return PublishedTokenizer(library, settings.model_copy(update={"end": end}), template)


def load_published(path: Path, gguf_file: str | None) -> Any:
    """The tokenizer of transformers."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError("reading a published tokenizer needs transformers: pip install 'omni-flow[hf]'") from None
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file() and not _has_protobuf():
        raise ImportError("transformers reads a tokenizer.model with protobuf: pip install 'omni-flow[hf]'")
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        theirs = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False, **options)
    except ImportError:
        raise
    except Exception as error:  # of many kinds: OSError, ValueError, KeyError, the library's plain Exception
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot read the tokenizer in {str(path)!r}: {reason}") from None
    if not isinstance(getattr(theirs, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise ValueError(
            f"the tokenizer in {str(path)!r} is a {type(theirs).__name__}, which has no tokenizer.json; only those of "
            "the tokenizers library are supported"
        )
    return theirs


def _has_protobuf() -> bool:
    try:
        return importlib.util.find_spec("google.protobuf") is not None
    except ModuleNotFoundError:  # no package google
        return False


def _text_library(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The library without what is not needed for text: truncation, padding, post-processor."""
    copy = tokenizers.Tokenizer(library.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(library, part)) is not None:
            setattr(copy, part, value)
    added = library.get_added_tokens_decoder()
    for token in sorted(added):
        one = added[token]
        (copy.add_special_tokens if one.special else copy.add_tokens)([one])
    if copy.get_vocab() != library.get_vocab():
        raise ValueError("the added tokens of this tokenizer are not in the order of their ids; it is not supported")
    return copy


def _marks(library: tokenizers.Tokenizer, template: ChatTemplate | None) -> tuple[str, ...]:
    """Added tokens that are not special and that the chat template contains, white space excepted."""
    if template is None:
        return ()
    added = library.get_added_tokens_decoder()
    plain = [one.content for _, one in sorted(added.items()) if not one.special]
    return tuple(text for text in plain if text in template.literals and not text.isspace())


def _ends(path: Path, theirs: Any) -> tuple[int, ...]:
    """The ids that the model's files say end a text, and the tokenizer's."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if not file.is_file():
            continue
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"{str(file)!r} has more than {MAX_BYTES:,} bytes; no configuration is so large")
        config = parse_json(file.read_bytes(), str(file))
        nested = config.get("text_config") if isinstance(config, dict) else None
        for table in (config, nested):
            value = table.get("eos_token_id") if isinstance(table, dict) else None
            found += value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [value for value in found if type(value) is not int]:
        raise ValueError(f"eos_token_id in {str(path)!r} has {wrong[0]!r}, which is no id")
    if theirs.eos_token_id is not None:
        found.append(theirs.eos_token_id)
    return tuple(dict.fromkeys(found))


def _end_of_turn(tokenizer: PublishedTokenizer, template: ChatTemplate) -> int | None:
    """The special token that the template writes after an assistant's turn; None where it writes none."""
    sign = chr(0xF0000)
    try:
        text = template.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": sign}])
    except ValueError:
        return None
    _, found, after = text.rpartition(sign)
    first = next(tokenizer.spelled_in(after), None) if found else None
    return None if first is None or after[: first[0]].strip() else first[2]
