"""Model cards: the README.md of a folder for the hub."""

from __future__ import annotations

import json

from omni.config import parse_json, table_of
from omni.model import Omni


def model_card(model: Omni, name: str, license: str | None = None, text_only: bool = False) -> str:
    """The text of a card, with its metadata as YAML (written as JSON, which YAML includes)."""
    c, base = model.config, model.published.get("config.json")
    family = None if base is None else table_of(parse_json(base, "config.json"), "config.json").get("model_type")
    meta = {"library_name": "transformers" if text_only else "omni-flow"}
    meta |= {"pipeline_tag": "text-generation" if text_only or c.flow is None else "any-to-any"}
    meta |= {} if license is None else {"license": license}
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in meta.items())
    lines = [f"---\n{head}---", f"# {name}"]
    if text_only:
        lines.append(f"The text path of an Omni model, as the {family} model that it was imported from.")
        lines.append(_code("from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                           f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
                           f'tokenizer = AutoTokenizer.from_pretrained("{name}")'))  # fmt: skip
        return "\n\n".join(lines) + "\n"
    lines.append(_what(model, family))
    lines.append(_code(f'import omni\n\nmodel = omni.from_pretrained("{name}")  # a local folder\n'
                       'reply = model.generate("hello")\nprint(reply.text, reply.images)'))  # fmt: skip
    lines.append(_code("import omni.hf  # registers the classes\nfrom transformers import AutoModel\n\n"
                       f'model = AutoModel.from_pretrained("{name}")'))  # fmt: skip
    t = c.transformer
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "layers, width": f"{t.depth}, {t.width}",
        "ids": f"{c.vocab_size:,}, of them {c.new_rows or 'no'} new",
        "context": f"{c.max_context:,} positions",
    }
    if c.flow is not None:
        expert = "" if t.expert is None else f", an expert of width {t.refine_spec.width}"
        rows["latents"] = f"{c.flow.channels} channels, weights {t.latent_weights}{expert}, sampler {c.sampler}"
    if model.codec is not None:
        rows["codec"] = model.codec.spec.name
    if t.loras:
        rows["LoRA"] = ", ".join(spec.name for spec in t.loras)
    lines.append("\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]))
    return "\n\n".join(lines) + "\n"


def _what(model: Omni, family: str | None) -> str:
    """One or two sentences on what the model is."""
    kind = "text" if model.config.flow is None else "text and pictures, in any order"
    text = f"An Omni model: one transformer that reads and writes {kind}."
    return text if family is None else f"{text} Its text path is a {family} model."


def _code(text: str) -> str:
    return f"```python\n{text}\n```"
