"""The defaults of generation of a published model, from its generation_config.json."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from omni.generation.options import check_defaults
from omni.storage.shards import read_table

FILE = "generation_config.json"
# Keys that are read here or by omni.text.convert, and those that change no distribution of ids.
KNOWN = frozenset("""
    do_sample temperature top_p top_k bos_token_id eos_token_id pad_token_id decoder_start_token_id transformers_version
    _from_model_config use_cache cache_implementation max_length max_new_tokens chat_format max_window_size
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate num_return_sequences
    assistant_confidence_threshold num_assistant_tokens num_assistant_tokens_schedule prompt_lookup_num_tokens
    max_matching_ngram_size
""".split())  # fmt: skip
# Filters of sampling, and other settings: the values at which they have no effect.
FILTERS = {"min_p": 0.0, "typical_p": 1.0, "top_h": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
IDLE = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "guidance_scale": 1.0,
    "diversity_penalty": 0.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "num_beams": 1,
    "num_beam_groups": 1, "min_length": 0, **FILTERS,
}  # fmt: skip


def generation_defaults(folder: Path) -> dict[str, Any]:
    """Its temperature, top_p and top_k, or the likeliest ids. Warns of settings that this project does not have.
    ValueError for values out of bounds."""
    file = folder / FILE
    stored = read_table(file) if file.is_file() else {}
    samples = stored.get("do_sample") is True
    without = KNOWN if samples else KNOWN | FILTERS.keys()
    lost = {k: v for k, v in stored.items() if k not in without and v not in (None, False, [], {}, IDLE.get(k))}
    if lost:
        named = ", ".join(f"{key} = {value!r:.40}" for key, value in sorted(lost.items()))
        warnings.warn(f"{file}: generation has no option for {named}; replies are without it", stacklevel=2)
    if not samples:
        return {"temperature": 0.0}
    given = {name: stored[name] for name in ("temperature", "top_p", "top_k") if stored.get(name) is not None}
    return check_defaults({"temperature": 1.0, **given}, str(file))
