"""Published decoder language models as models of Omni, with equal text logits: Llama, Mistral, Qwen 2 and 3, Gemma 2
and 3, OLMo 2, Phi-3, from safetensors folders or GGUF files.

    decoder = read_decoder(path)      config and tensor headers alone; `problems` names all that is refused
    import_decoder(path, out)         a model directory for omni.from_pretrained

The model has the published ids and then the control ids (omni.text.tokenizer.CONTROL_NAMES), with tables of their own.
Without a codec it is a model of text alone.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni.checkpoint import publish
from omni.codecs import Codec, load_codec
from omni.config import build, nearest
from omni.heads import FlowHeadConfig
from omni.importers.families import FAMILIES, Decoder
from omni.importers.generation_config import generation_defaults
from omni.importers.gguf_file import GGUFFile
from omni.importers.layout import Weight, head_name, layout_of
from omni.importers.published_files import published_files
from omni.importers.sources import Source
from omni.importers.writing import Written, new_rows, write_tensors, written
from omni.media.preparation import Preparation
from omni.model import PUBLISHED, Omni, OmniConfig
from omni.nn.declare import declarations, fill
from omni.rng import Key
from omni.storage.shards import DTYPES, SafetensorsFolder, read_table
from omni.text.convert import convert_tokenizer, load_published
from omni.text.tokenizer import CONTROL_NAMES
from omni.weights import unallocated

NEW_ROWS = len(CONTROL_NAMES)
PREFIXES = ("model.", "language_model.model.", "model.language_model.")
# Buffers that published classes compute, in files of older versions.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|self_attn\.masked_bias)")
# The parts of a multimodal checkpoint that are not text, below any prefix.
OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|vision_model)\..*")
MULTIMODAL_KEYS = frozenset("""
    text_config vision_config model_type architectures boi_token_index eoi_token_index eos_token_id image_token_index
    initializer_range mm_tokens_per_image torch_dtype dtype transformers_version bos_token_id pad_token_id boi_token_id
    eoi_token_id image_token_id use_cache _name_or_path
""".split())  # fmt: skip


@dataclass
class PublishedDecoder:
    """A published checkpoint, read from its headers.

    table: the keys of config.json. config: None where they are refused. weights: all but the new rows. skipped:
    published tensor -> why it is not needed. problems: one line for everything that is refused.
    """

    path: Path
    family: str
    source: Source
    table: dict[str, Any]
    keys: Decoder | None = None
    config: OmniConfig | None = None
    weights: list[Weight] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def uses(self) -> dict[str, str]:
        """Published tensor -> the weight that it is, or is a part of."""
        found: dict[str, str] = {}
        for weight in self.weights:
            names = list(dict.fromkeys(part.name for part in weight.parts))
            is_fused = len(names) > 1
            for name in names:
                more = f"{found[name]}, " if name in found else ""
                found[name] = f"{more}{'fused into' if is_fused else 'taken as'} {weight.name}"
        return found


def read_decoder(path: str | Path, context: int | None = None, channels: int | None = None) -> PublishedDecoder:
    """Config, tensors and problems of a checkpoint: a folder with config.json, or a GGUF file.

    context: the longest context that the model is for (default: the config's). channels: of a codec's latents.
    ValueError for a missing or damaged file, and for an unknown family.
    """
    path = Path(path)
    gguf = gguf_of(path)
    if gguf is not None:
        source: Any = GGUFFile(gguf)
        data, where = source.config, str(gguf)
    else:
        data, where = read_table(path / "config.json"), str(path / "config.json")
        source = SafetensorsFolder(path)
    outer, data = data.get("model_type"), _text_config(data, where)
    family = data.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        if family == "omni":
            raise ValueError(f"{path} is a model directory already; use it as it is: omni generate --model {path}")
        known = ", ".join(sorted([*FAMILIES, "gemma3"]))
        raise ValueError(f"{where}: model_type = {family!r:.80} is not implemented; implemented: {known}")
    found = PublishedDecoder(path, family, source, data)
    _read_keys(found, data, where)
    if found.keys is not None:
        _configure(found, where, context, channels, getattr(source, "has_stored_offset", False))
        _account(found, found.keys, is_multimodal=outer == "gemma3")
    return found


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path names or, as the only model file, holds."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is no folder and no .gguf file; give a published checkpoint")
    files = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} GGUF files; name one, such as {files[0]}")
    return files[0] if files else None


def is_published_decoder(path: Path) -> bool:
    """Whether a folder or file looks like a published decoder: a model_type in its config.json, or GGUF."""
    if path.is_file():
        return path.suffix == ".gguf"
    if not (path / "config.json").is_file():
        return bool(list(path.glob("*.gguf")))
    try:
        return "model_type" in read_table(path / "config.json")
    except ValueError:
        return False


# ---- config --------------------------------------------------------------------------------------------------------


def _text_config(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of the text part. ValueError for an unknown key around it."""
    if data.get("model_type") != "gemma3":
        return dict(data)
    text = data.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{where} has no text_config; download it again")
    outside = dict(data)
    tied = outside.pop("tie_word_embeddings", True)
    if unknown := sorted(outside.keys() - MULTIMODAL_KEYS):
        raise ValueError(f"{where}: key {unknown[0]!r} = {data[unknown[0]]!r:.80} beside text_config is not known")
    if text.setdefault("tie_word_embeddings", tied) != tied:
        raise ValueError(f"{where}: tie_word_embeddings = {tied} contradicts that of text_config")
    return {"model_type": "gemma3_text", **text}


def _read_keys(found: PublishedDecoder, data: Mapping[str, Any], where: str) -> None:
    """`keys`, or a problem for each key that is not known and for the values that are refused."""
    family = FAMILIES[found.family]
    known = {name: value for name, value in data.items() if name in family.model_fields}
    for name in sorted(data.keys() - known.keys() - family.without_effect):
        hint = nearest(name, family.model_fields) or "; it may change the model: remove it if it does not"
        found.problems.append(f"{where}: key {name!r} = {data[name]!r:.80} is not known for {found.family}{hint}")
    try:
        found.keys = build(known, family, where)
    except ValueError as error:
        found.problems.append(f"{error}; other values are not implemented for {found.family}")


def _configure(
    found: PublishedDecoder, where: str, context: int | None, channels: int | None, has_stored_offset: bool
) -> None:
    """`config`, or a problem."""
    c = found.keys
    assert c is not None
    longest = c.max_position_embeddings if context is None else context
    try:
        fields = c.transformer(where, longest)
        if has_stored_offset:
            fields["norm_offset"] = 0.0
        settings = {
            "transformer": fields,
            "flow": None if channels is None else FlowHeadConfig(channels=channels).model_dump(),
            "vocab_size": c.vocab_size + NEW_ROWS,
            "new_rows": NEW_ROWS,
            "tied_embeddings": c.tie_word_embeddings,
            "max_context": longest,
            **c.logits(),
        }
        settings["transformer"]["rotary"] = fields["rotary"].model_dump()
        found.config = build(settings, OmniConfig, where)
    except ValueError as error:
        message = str(error)
        found.problems.append(message if message.startswith(where) else f"{where}: {message}")


# ---- tensors -------------------------------------------------------------------------------------------------------


def _account(found: PublishedDecoder, c: Decoder, is_multimodal: bool) -> None:
    """`weights`, `skipped`, `refused`, and the problems of tensors: every one is taken, skipped or refused."""
    tensors = found.source.tensors
    prefix = next((one for one in PREFIXES if f"{one}embed_tokens.weight" in tensors), PREFIXES[0])
    found.weights = layout_of(c, _num_rotating(found, c), prefix)
    wanted = {part.name: part.shape for weight in found.weights for part in weight.parts}
    for name in sorted(wanted.keys() - tensors.keys()):
        found.problems.append(f"{found.path}: tensor {name!r} is missing; download the checkpoint again")
    for name, stored in tensors.items():
        if (shape := wanted.get(name)) is not None:
            if stored.shape != shape:
                found.refused[name] = f"has shape {stored.shape}, the config needs {shape}"
            elif stored.dtype is None:
                found.refused[name] = f"has type {stored.kind}; use a checkpoint of floating-point numbers"
        elif BUFFERS.fullmatch(name):
            found.skipped[name] = "a buffer that is computed"
        elif name == head_name(prefix) and c.tie_word_embeddings and stored.dtype is not None:
            found.skipped[name] = "equal to the tied embedding"
            if not _is_equal(found.source, name, f"{prefix}embed_tokens.weight"):
                del found.skipped[name]
                found.refused[name] = "differs from the embedding, and tie_word_embeddings is true"
        elif is_multimodal and OTHER_PARTS.fullmatch(name):
            found.skipped[name] = "no part of the text model"
        else:
            found.refused[name] = f"is not known for {found.family}{nearest(name, wanted)}"
    found.problems += [f"{found.path}: tensor {name!r} {why}" for name, why in found.refused.items()]


def _num_rotating(found: PublishedDecoder, c: Decoder) -> int:
    """The dimensions of a head that rotate."""
    head_dim = c.heads[2]
    if found.config is None:
        return head_dim
    return 2 * found.config.transformer.rotary.num_turning(head_dim)


def _is_equal(source: Source, name: str, other: str) -> bool:
    """Whether two published tensors are equal; reads them piece by piece."""
    one, two = source.tensors[name], source.tensors.get(other)
    if two is None or one.shape != two.shape or len(one.shape) != 2 or two.dtype is None:
        return False
    step = max(1, (4 << 20) // max(1, one.shape[1]))
    slices = (slice(start, start + step) for start in range(0, one.shape[0], step))
    return all(torch.equal(source.rows(name, part), source.rows(other, part)) for part in slices)


# ---- the model directory -------------------------------------------------------------------------------------------


def import_decoder(
    path: str | Path, out: str | Path, *, codec: str | Path | None = None, dtype: torch.dtype | None = None,
    context: int | None = None, replace: bool = False, with_tokenizer: bool = True,
    origin: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Write the model directory `out` of a published decoder, and return its path.

    codec: a codec's directory; the model then has a flow head with new weights. dtype: of the stored weights; None
    keeps the published ones (quantised ones become float32). context: see `read_decoder`. origin: where others find the
    checkpoint (places.origin_of), for the manifest. ValueError names the first thing that is refused, and the number of
    others.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype = {dtype} is no type of weights; use one of {', '.join(map(str, DTYPES.values()))}")
    attached = None if codec is None else load_codec(codec)
    found = read_decoder(path, context, None if attached is None else attached.spec.channels)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more: see omni inspect)" if found.problems[1:] else ""
        raise ValueError(f"{found.problems[0]}{more}")
    assert found.config is not None
    tensors = list(_tensors(found, found.config, dtype))
    gguf = gguf_of(Path(path))
    folder, name = (Path(path), None) if gguf is None else (gguf.parent, gguf.name)
    theirs = load_published(folder, name) if with_tokenizer else None
    kept = published_files(folder, gguf, found.table, theirs)
    files: dict[str, Any] = {
        "config.json": found.config.model_dump_json(indent=2) + "\n",
        "preparation.json": Preparation().model_dump_json(indent=2, exclude_none=True) + "\n",
        "generation.json": json.dumps(generation_defaults(Path(path)), indent=2) + "\n",
        "model.safetensors": partial(write_tensors, tensors=tensors),
        **{f"{PUBLISHED}/{name}": content for name, content in kept.items()},
        **_codec_files(attached),
    }
    info = {"imported": {"family": found.family, "from": Path(path).name, **(origin or {})}}
    with tempfile.TemporaryDirectory() as made:
        if with_tokenizer:
            # The control ids come after the rows of the published embedding.
            num_rows = found.config.vocab_size - NEW_ROWS
            convert_tokenizer(folder, name, num_rows, theirs=theirs).save(made)
            files["tokenizer"] = Path(made)
        return publish(out, files, info=info, replace=replace)


def _codec_files(codec: Codec | None) -> dict[str, Any]:
    return {} if codec is None else {f"codec/{name}": content for name, content in codec.files().items()}


def _tensors(found: PublishedDecoder, config: OmniConfig, dtype: torch.dtype | None) -> Iterator[Written]:
    """All weights of the model: published ones, rows of new ids, and initial values of the rest."""
    made = {weight.name: written(weight, found.source, dtype) for weight in found.weights}
    yield from made.values()
    names = set(made)
    for head in ("embedding", "unembedding"):
        if (like := made.get(f"token.{head}.weight")) is not None:
            name = f"token.new_{head}.weight"
            names.add(name)
            yield new_rows(name, like, NEW_ROWS)
    with unallocated():
        model = Omni(config)
    own = model.state_dict()
    assert names <= own.keys(), sorted(names - own.keys())
    for name in sorted(own.keys() - names):
        yield _initial(model, name, tuple(own[name].shape), made["token.embedding.weight"].dtype)


def _initial(model: Omni, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Written:
    """A weight that no published decoder has (of the flow head): its declared initial values."""
    declared = declarations(model)[name]

    def pieces() -> Iterator[torch.Tensor]:
        value = nn.Parameter(torch.empty(shape), requires_grad=False)
        fill(value, declared, Key(0).fold("initialise", declared.drawn_as or name), name)
        yield value.to(dtype)

    return Written(name, shape, dtype, pieces)
