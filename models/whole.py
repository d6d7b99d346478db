"""That a model which was opened is whole: every tensor found its place, and holds finite numbers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from models.errors import Refusal, of_writing

_AGAIN = "copy the whole model again, with the config.json it was saved with"
_ODD = (
    OSError,
    ValueError,
    ImportError,
    SafetensorError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    AssertionError,
    ArithmeticError,
    RecursionError,
)
_NARROW = " as float16"
# Of the attention of GPT-Neo, GPT-J and CodeGen, kept in their checkpoints by transformers before 4.30, and made anew
# from the config since: which tokens see which, and what is put in place of those that are not seen.
_MASKS = ("attn.bias", "attn.attention.bias", "attention.bias", "masked_bias", "causal_mask")
_SUMMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def whole(told: str, what: str) -> Iterator[None]:
    """Around a load by transformers: what it raises of odd configs and tensors is a Refusal in one line, and its table
    of them is not printed. `told` and `what` begin the line."""
    tables: list[str] = []

    def kept(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return True
        tables.append(record.getMessage())
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(kept)
    try:
        yield
    except Refusal:
        raise
    except _ODD as problem:
        if of_writing(problem):  # of layers that are offloaded
            raise
        raise Refusal(f"{told}: {what}: {first_line(problem)}") from None
    except RuntimeError as problem:  # of tensors that cannot be merged as the family merges them: experts, mostly
        names = re.findall(r"^(\S+)\s*\|\s*(?:\x1b\S*m)?CONVERSION", "".join(tables), re.MULTILINE)
        if not names:
            raise
        raise Refusal(f"{told}: parts of {', '.join(names[:3])} are missing or do not fit; {_AGAIN}") from problem
    finally:
        logger.removeFilter(kept)


def without_masks(report: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The report of a load without masks that older versions of transformers saved. `shapes`: of the files' tensors."""

    def is_mask(name: str) -> bool:
        shape = shapes.get(name) or next((s for known, s in shapes.items() if name.endswith(f".{known}")), [])
        square = len(shape) == 4 and list(shape[:2]) == [1, 1] and shape[2] == shape[3]
        return name.endswith(_MASKS) and (square or list(shape) in ([], [1]))

    return report | {"unexpected_keys": [name for name in report["unexpected_keys"] if not is_mask(name)]}


def check_tied(model: Any, told: str) -> None:
    """Refuse a head of its own under a config that says it is the embeddings: transformers opens it as it is, and
    whatever counts, prunes or writes the model by its config takes it for another one."""
    if not model.config.get_text_config().tie_word_embeddings or not getattr(model, "_tied_weights_keys", None):
        return
    head, embeddings = (
        getattr(module, "weight", None) for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if head is None or embeddings is None or head is embeddings or head.is_meta or embeddings.is_meta:
        return
    if head.shape != embeddings.shape or not torch.equal(head, embeddings):
        raise Refusal(
            f"{told}: tie_word_embeddings=true in config.json, and its head is another matrix than its embeddings; set "
            f"it to false there to keep both"
        )


def check_report(report: dict[str, Any], told: str) -> None:
    """Refuse a load in which not every tensor found its place: transformers says so, and fills the gaps at random."""
    mismatched = [
        f"{name} {list(held)} where the config says {list(wanted)}" for name, held, wanted in report["mismatched_keys"]
    ]
    for found, what in (
        (report["missing_keys"], "missing from its weights"),
        (report["unexpected_keys"], "in its weights and not in the model of its config"),
        (mismatched, "of another shape"),
    ):
        if found:
            first = sorted(found)[:3]
            more = f" and {len(found) - len(first)} more" if len(found) > len(first) else ""
            raise Refusal(
                f"{told}: {len(found)} tensor{'s' if len(found) > 1 else ''} {what}: {', '.join(first)}{more}; {_AGAIN}"
            )


@torch.no_grad()
def check_finite(model: nn.Module, told: str, sharded: bool = False) -> None:
    """Refuse weights that are not finite, by name. `sharded`: by ZeRO-3; every rank then learns of every rank's."""
    wrong = [
        f"{what} in {name}" + (_NARROW if (what, part.dtype) == ("infinity", torch.float16) else "")
        for name, tensor in _saved(model)
        for part in held_in(tensor)
        if (what := not_finite(part))
    ]
    if sharded:
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, wrong)
        wrong = list(dict.fromkeys(each for mine in of_ranks for each in mine))
    if wrong:
        more = f", and in {len(wrong) - 3} more" if len(wrong) > 3 else ""
        remedy = "its weights are damaged, copy the model again"
        if all(each.endswith(_NARROW) for each in wrong):
            remedy = (
                "float16 holds no number above 65504: open it as bfloat16 or float32, and copy it again only where "
                "that finds infinity too"
            )
        raise Refusal(f"{told}: {', '.join(wrong[:3])}{more}; {remedy}")


def not_finite(tensor: Tensor) -> str | None:
    """What is wrong with the numbers, or None. A sum is not finite where one of its terms is not, and is the fastest
    look; rarely it overflows."""
    if bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all()):
        return None
    return "NaN" if bool(tensor.isnan().any()) else "infinity"


def held_in(tensor: Any) -> Iterator[Tensor]:
    """The floating-point numbers that a weight is held in here: of a ZeRO-3 shard this rank's, of packed ones their
    scales; of those on the meta device or on a disk, none."""
    if hasattr(tensor, "ds_tensor"):
        shard = tensor.ds_tensor
        if shard.status.name == "AVAILABLE":
            # The last ranks' shards are filled up with whatever was in memory.
            own = tensor.ds_numel - torch.distributed.get_rank(tensor.ds_process_group) * shard.ds_numel
            yield from held_in(shard.data.flatten()[: max(0, own)])
        return
    if tensor.is_meta:
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from held_in(getattr(tensor, name))
        return
    # SCB, quant_state: bitsandbytes' scales. What it packs in 4 bits may be stored as any type, bfloat16 too.
    scales = getattr(tensor, "quant_state", None)
    parts = [getattr(tensor, "SCB", None), *([tensor] if scales is None else [])]
    while scales is not None:
        parts += [scales.absmax, scales.offset]
        scales = scales.state2
    yield from (part.detach() for part in parts if part is not None and part.dtype in _SUMMED and part.numel())


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a checkpoint holds: others may be infinite, as masks are."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".removeprefix("."), buffer


def first_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):  # what it announces is in the next
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(problem).__name__
