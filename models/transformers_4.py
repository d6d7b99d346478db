"""What transformers 4 needs in a model folder that transformers 5 has written: the older words beside the new ones.

Without them version 4 opens such a folder with its own defaults, silently (rope_theta 10000), or not at all. Both
versions then compute the same; tests/formats/test_transformers_4.py runs version 4.57.6.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_NEITHER = ("rope_theta", "partial_rotary_factor")  # beside rope_scaling there, not in it
_SCALED = ("apertus", "gpt_oss")  # families whose rope is scaled there where nothing is said of it
# Of the machine that opened the tokenizer, written by save_pretrained.
_LEFTOVERS = ("is_local", "local_files_only", "name_or_path", "special_tokens_map_file", "tokenizer_file")


def add_older_words(folder: Path) -> None:
    """Rewrite config.json and tokenizer_config.json, where they are there."""
    for name, older in (("config.json", older_config), ("tokenizer_config.json", older_tokenizer)):
        path = folder / name
        if path.is_file():
            told = json.loads(path.read_text(encoding="utf-8"))
            if (wanted := older(told)) != told:
                path.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def older_config(config: Mapping[str, Any]) -> Json:
    """The config with what version 4 reads in place of rope_parameters, and of names that have changed since."""
    found, kind = dict(config), config.get("model_type")
    if kind == "qwen3_moe" and "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return found
    if isinstance(rope.get("sliding_attention"), dict):  # one rope for each kind of layer, as Gemma 3 has them
        if (theta := rope["sliding_attention"].get("rope_theta")) is not None:
            found["rope_local_base_freq"] = theta
        rope = rope.get("full_attention") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        return found
    found |= {name: rope[name] for name in _NEITHER if rope.get(name) is not None}
    if kind in ("gpt_neox", "gpt_neox_japanese"):
        older = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        found |= {name: rope[new] for new, name in older.items() if rope.get(new) is not None}
    if rope.get("rope_type", "default") == "default":
        if kind in _SCALED:
            found["rope_scaling"] = None
    else:
        scaling = {name: value for name, value in rope.items() if name not in _NEITHER}
        if rope["rope_type"] == "longrope" and kind in ("phi3", "phi4_multimodal"):  # which takes these three alone
            scaling = {"type": "longrope", **{name: rope[name] for name in ("short_factor", "long_factor")}}
        found["rope_scaling"] = scaling
    return found


def older_tokenizer(config: Mapping[str, Any]) -> Json:
    """tokenizer_config.json with a class and names that both versions know, and nothing of where it was opened."""
    found = {name: value for name, value in config.items() if name not in _LEFTOVERS}
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):  # a mapping of names there
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found
