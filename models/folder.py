"""What a model folder holds, looked at before a library opens anything in it: names, sizes and headers, no weights."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.errors import Refusal

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
GENERATION = "generation_config.json"
_CONFIG_BYTES, _INDEX_BYTES = 1 << 24, 1 << 27  # the largest index published holds 9 MB
# transformers does without the first where it does not open, and the model then stops at other tokens
_BESIDE = (GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "vocab_size")  # each is a dimension of some tensor, in packed formats too
# Short lists: elsewhere 0 and -1 may mean none (experts, sliding windows, layers that share their keys).
_SIZES = (
    *_DEPTHS,
    *_WIDTHS,
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads", "head_dim", "d_model"),
    *("max_position_embeddings", "n_positions", "word_embed_proj_dim"),
)
_SIZES_OR_NONE = ("intermediate_size", "moe_intermediate_size", "shared_intermediate_size", "ffn_dim", "n_inner")
_PLAIN = ("F64", "F32", "F16", "BF16")
# Of each of them every model holds some tensor that is not plain. Others may not: bitnet's are packed as they are read.
_NEVER_PLAIN = (
    *("aqlm", "auto-round", "awq", "bitsandbytes_4bit", "bitsandbytes_8bit", "eetq", "fbgemm_fp8", "fp8", "gptq"),
    *("mxfp4", "spqr", "vptq"),
)
_ROTARY_BASES = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "global_rope_theta", "local_rope_theta")
_ROTARY_FACTORS = (  # inside of rope_parameters, or of rope_scaling, its older name
    *("factor", "attention_factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    "original_max_position_embeddings",
)


def check_folder(path: str, role: str, weights: bool = True) -> None:
    """Refuse, before anything is loaded, a model folder that cannot be opened safely. A hub id passes unread.

    `role`: what the model is (teacher), or the setting that names it. `weights`: whether they will be opened, or only
    what lies beside them.
    """
    told, folder = named(path, role), Path(path)
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise Refusal(f"{told}: no such folder; give a model folder or a hub id like org/name")
        return
    check_files(folder, told, weights)


def named(path: str, role: str) -> str:
    """How messages begin: the setting that names the model, and its value."""
    return f"{role if '.' in role else f'{role}.path'}={path}"


def check_files(folder: Path, told: str, weights: bool = True) -> None:
    """As `check_folder`, of a folder that is there; `told` begins the message."""
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER).is_file():
            raise Refusal(f"{told}: an adapter without its model; merge it into one, and give that folder")
        raise Refusal(f"{told}: no config.json in it; give a folder AutoModelForCausalLM can open")
    config = _json(folder / "config.json", _CONFIG_BYTES, told)
    if found := _odd_number(config):
        raise Refusal(f"{told}: {found[0]} in config.json; need {found[1]}, take the model's own config.json")
    _check_ends(config, config, "config.json", told)
    for name in _BESIDE:
        if (folder / name).exists():
            held = _json(folder / name, _CONFIG_BYTES, told)
            _check_token_ids(held, name, told)
            if name == GENERATION:
                _check_ends(held, config, name, told)
    if not weights:
        return
    if (folder / ADAPTER).is_file():  # transformers would open it too, pickled or not
        raise Refusal(
            f"{told}: {ADAPTER} lies beside the model, and its adapter would be added; merge it into the model, or "
            f"remove that file"
        )
    if (folder / "signal.json").is_file():
        raise Refusal(f"{told}: this is a teacher cache, without the model's weights; give its folder")
    if config.get("transformers_weights") is not None:  # transformers' own way to name another file, pickled or not
        raise Refusal(f"{told}: config.json names its weights by transformers_weights; call them {WEIGHTS}")
    headers = _headers(folder, told)
    _check_types(config, headers, told)
    _check_sizes(config, {name: shape for name, (shape, _) in headers.items()}, told)


def check_given(config: dict[str, Any], role: str) -> None:
    """Refuse the same values of a config that lies in no folder yet, since a person gave some of it."""
    if found := _odd_number(config):
        raise Refusal(f"{role}.{found[0]}: need {found[1]}")
    if end := _odd_end(config, config):
        raise Refusal(f"{role}.{end[0]}: it is no token of the model; they {end[1]}")


def _check_token_ids(held: dict[str, Any], file: str, told: str) -> None:
    """Refuse words where the numbers of tokens belong: a model would generate to its limit, or stop anywhere."""
    for name, value in held.items():
        if name.endswith("_token_id") and not all(
            isinstance(each, int) and not isinstance(each, bool)
            for each in (value if isinstance(value, list) else [] if value is None else [value])
        ):
            raise Refusal(
                f"{told}: {name}={value!r} in {file} is no number of a token; give a whole number, a list of them or "
                f"null"
            )


def _check_ends(held: dict[str, Any], config: dict[str, Any], file: str, told: str) -> None:
    if end := _odd_end(held, config):
        raise Refusal(f"{told}: {end[0]} in {file} is no token of the model: they {end[1]}; give its own")


def _odd_end(held: dict[str, Any], config: dict[str, Any]) -> tuple[str, str] | None:
    """Of first and last tokens that the vocabulary does not have: a model would never stop. In words, and which ones
    there are; None where all are tokens.

    -1 says none, as published models have it. A family's own default passes too: it stays in the config of every model
    of it with a shorter vocabulary, where nobody set another.
    """
    texts = config.get("text_config")
    known = [each.get("vocab_size") for each in (config, texts) if isinstance(each, dict)]
    end = max((size for size in known if isinstance(size, int)), default=math.inf)
    for name in ("bos_token_id", "eos_token_id"):
        value = held.get(name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int) and each != -1 and not 0 <= each < end and each not in _usual(config, name):
                has = "are not negative" if end == math.inf else f"are 0 to {end - 1} by vocab_size={end}"
                return f"{name}={each}", has
    return None


def _usual(config: dict[str, Any], name: str) -> list[Any]:
    """What the model's family has under that name where nothing is set."""
    from transformers import CONFIG_MAPPING

    try:
        value = getattr(CONFIG_MAPPING[config["model_type"]](), name, None)
    except Exception:  # an unknown family, or one without defaults
        return []
    return value if isinstance(value, list) else [value]


def _odd_number(config: dict[str, Any]) -> tuple[str, str] | None:
    """The first number that no model has, in words, and what is needed: some only show as tracebacks, or as NaN long
    after."""
    lowest: dict[str, int | float] = {}  # of llama3's factors, which are divided by how far they are apart
    for where, name, value in sorted(_numbers(config), key=lambda each: each[1] == "high_freq_factor"):
        need = None
        if value != value:  # NaN; math.isnan fails at whole numbers that no float holds
            need = "a number"
        elif "dropout" in name or name.endswith("pdrop"):
            need = None if 0 <= value <= 1 else "a probability from 0 to 1"
        elif name in _ROTARY_BASES:
            need = None if 0 < value < math.inf else "a finite number above 0"
        elif name in _ROTARY_FACTORS and re.search(r"rope_(parameters|scaling)\.", where):
            need = None if 0 < value < math.inf else "a finite number above 0"
            if name == "low_freq_factor":
                lowest[where.replace("low_freq", "high_freq")] = value
            elif where in lowest and value <= lowest[where]:
                need = f"a number above low_freq_factor={lowest[where]}"
        elif re.search(r"(^|_)(eps|epsilon)$", name):
            need = None if 0 <= value < math.inf else "a finite number of 0 or more"
        elif where in (name, f"text_config.{name}") and name in (*_SIZES, *_SIZES_OR_NONE):
            least = 1 if name in _SIZES else 0
            need = None if isinstance(value, int) and value >= least else f"a whole number of {least} or more"
        if need:
            return f"{where}={value}", need
    return None


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, str, int | float]]:
    """(where it stands, its own name, value) of every number; items of a list have the list's name.

    In a loop, since a config may be nested deeper than functions may.
    """
    waiting: list[tuple[str, str, Any]] = [("", "", config)]
    while waiting:
        where, name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{where}.{key}" if where else key, key, held) for key, held in reversed(value.items())]
        elif isinstance(value, list):
            waiting += [(f"{where}[{place}]", name, held) for place, held in reversed([*enumerate(value)])]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield where, name, value


def part_names(folder: Path, told: str) -> list[str]:
    """The files that transformers opens: plain names of safetensors in the folder itself."""
    if os.path.lexists(folder / WEIGHTS):
        return [WEIGHTS]
    if os.path.lexists(folder / INDEX):
        index = _json(folder / INDEX, _INDEX_BYTES, told)
        names = index.get("weight_map")
        if not isinstance(names, dict) or not names or not isinstance(index.get("metadata"), dict):
            raise Refusal(f"{told}: {INDEX} has no weight_map or no metadata; take the model's own again")
        for name in names.values():
            if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\\" in name:
                raise Refusal(f"{told}: {INDEX} names {name!r}; need *.safetensors in the same folder")
        return sorted(set(names.values()))
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        raise Refusal(f"{told}: {others[0]} is not {WEIGHTS}, and there is no {INDEX}; the weights are missing")
    if pickled:
        raise Refusal(
            f"{told}: only pickled weights ({pickled[0]}), which can run code when opened; "
            f"convert them with save_pretrained(…, safe_serialization=True)"
        )
    raise Refusal(f"{told}: no *.safetensors in it; the weights are missing")


def _json(path: Path, most: int, told: str) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes."""
    try:
        if path.stat().st_size > most:
            raise Refusal(f"{told}: {path.name} has {path.stat().st_size:,} bytes; need at most {most:,}")
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        if isinstance(problem, Refusal):
            raise
        why = "nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        raise Refusal(f"{told}: {path.name} is no JSON: {why}; take the model's own again") from None
    if not isinstance(held, dict):
        raise Refusal(f"{told}: {path.name} holds no object; take the model's own again")
    return held


def shapes_of(folder: Path, told: str) -> dict[str, list[int]]:
    """Of all tensors, by name. A file whose length is not what its header says is refused."""
    return {name: shape for name, (shape, _) in _headers(folder, told).items()}


def _headers(folder: Path, told: str) -> dict[str, tuple[list[int], str]]:
    """Shape and type of all tensors, by name."""
    found: dict[str, tuple[list[int], str]] = {}
    of: dict[str, str] = {}  # name → the part that holds it
    for part in part_names(folder, told):
        if not (folder / part).is_file():  # nor a pipe, which would wait for ever
            raise Refusal(f"{told}: {part} is not there; the weights are incomplete, copy it too")
        try:
            with safe_open(folder / part, "np") as file:
                for name in file.keys():
                    if name in of and not _same(folder, (of[name], part), name):
                        raise Refusal(
                            f"{told}: {name} is in {of[name]} and in {part}, with other values; one of them is of "
                            f"another model, copy them again"
                        )
                    held = file.get_slice(name)
                    found[name], of[name] = (held.get_shape(), held.get_dtype()), part
        except (OSError, SafetensorError) as problem:
            raise Refusal(f"{told}: {part} is damaged or no safetensors: {problem}; copy it again") from None
    return found


def _same(folder: Path, parts: tuple[str, str], name: str) -> bool:
    """Whether a tensor that two parts hold is the same in both: read only where there are two."""
    import torch

    held = []
    for part in parts:
        with safe_open(folder / part, "pt") as file:
            held.append(file.get_tensor(name))
    one, other = held
    return one.dtype == other.dtype and torch.equal(one, other)


def _check_types(config: dict[str, Any], headers: dict[str, tuple[list[int], str]], told: str) -> None:
    """Refuse weights in 8 bits and fewer, or whole numbers, of which nothing says how they are meant: they would be
    taken as they are, without their scales. And plain weights under a config that says they are packed."""
    method = _packing(config, told)
    if method in _NEVER_PLAIN and all(kind in _PLAIN for _, kind in headers.values()):
        raise Refusal(
            f"{told}: quantization_config in config.json says {method}, and none of its tensors is packed; remove "
            f"quantization_config from config.json, or give the weights it was saved with"
        )
    scaled = {name.rpartition(".")[0] for name in headers if not name.endswith((".weight", ".bias"))}
    for name, (shape, kind) in headers.items():
        module, _, last = name.rpartition(".")
        whole = not kind.startswith(("F", "BF"))
        few = re.match(r"F[468](_|$)", kind)
        if method is not None:
            if (few or whole) and last == "weight" and not {module, name} & scaled:
                raise Refusal(
                    f"{told}: {name} holds {kind}, and no scale lies beside it as {method} needs it; give the model in "
                    f"bfloat16, float16 or float32, or all the tensors it was quantized to"
                )
        elif few or (whole and (last == "weight" or (last == "bias" and len(shape) == 1))):
            raise Refusal(
                f"{told}: {name} holds {kind}, and config.json has no quantization_config that says how to read it; "
                f"give the model in bfloat16, float16 or float32, or the config.json it was quantized with"
            )


def _packing(config: dict[str, Any], told: str) -> str | None:
    """transformers' name of how the weights are packed, None where they are not. One that it does not know is refused:
    it would skip it, and take packed numbers for weights."""
    from transformers import __version__
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    held = config.get("quantization_config")
    if held is None:
        if config.get("compression_config"):
            raise Refusal(
                f"{told}: compression_config in config.json is an older name, which transformers {__version__} does "
                f"not read; call it quantization_config, with quant_method=compressed-tensors in it"
            )
        return None
    held = held if isinstance(held, dict) else {}
    bits = next((bits for bits in ("4bit", "8bit") if held.get(f"load_in_{bits}")), None)
    method = f"bitsandbytes_{bits}" if bits else held.get("quant_method")
    if isinstance(method, str) and method in AUTO_QUANTIZATION_CONFIG_MAPPING and method in AUTO_QUANTIZER_MAPPING:
        return method
    without = " without load_in_4bit or load_in_8bit" if method == "bitsandbytes" else ""
    raise Refusal(
        f"{told}: quantization_config in config.json has quant_method={method!r}{without}, of which transformers "
        f"{__version__} knows no reading; give the model in bfloat16, float16 or float32, or the config.json it was "
        f"quantized with"
    )


def _check_sizes(config: dict[str, Any], shapes: dict[str, list[int]], told: str) -> None:
    """Refuse a config of a model far larger than its tensors: it would take memory and minutes before that shows."""
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for values in (config, config.get("text_config")):
        for names, most, what in ((_DEPTHS, len(shapes), "tensors"), (_WIDTHS, largest, "is the largest dimension")):
            for name in names:
                value = values.get(name) if isinstance(values, dict) else None
                if isinstance(value, int) and value > most:
                    raise Refusal(f"{told}: {name}={value} in config.json does not fit its weights: {most} {what}")
