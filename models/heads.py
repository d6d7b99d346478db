"""A causal LM taken apart into its body and its head, so that logits need never exist all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.errors import Refusal
from models.objectives.head import Adapter, Head


def body_of(model: Any) -> nn.Module:
    """The transformer without its language-model head."""
    body = getattr(model, model.base_model_prefix, None)
    if body is None or body is model or model.get_output_embeddings() is None:
        raise Refusal(f"{type(model).__name__}: no separate body and output head found; this family is not supported")
    return body


def head_of(model: Any) -> Head:
    """The head's weights and what the family does to logits, as its config states it."""
    linear = model.get_output_embeddings()
    scale, softcap = logit_numbers(model.config)
    if not hasattr(linear, "lora_A"):
        return Head(linear.weight, getattr(linear, "bias", None), scale, softcap)
    base = linear.base_layer
    return Head(base.weight, getattr(base, "bias", None), scale, softcap, _adapter(linear))


def _adapter(linear: Any) -> Adapter | None:
    """The adapter that PEFT's LoRA layer adds to a head."""
    if linear.merged or linear.disable_adapters:
        return None
    (name, *others) = linear.active_adapters
    if others or linear.use_dora.get(name):
        raise Refusal(f"LoRA on the head: adapters {linear.active_adapters}; need one, without DoRA")
    return Adapter(_Down(linear, name), linear.lora_B[name].weight)


class _Down(nn.Module):
    def __init__(self, linear: Any, name: str) -> None:
        super().__init__()
        self.dropout, self.down, self.scale = linear.lora_dropout[name], linear.lora_A[name], linear.scaling[name]

    def forward(self, hidden: Tensor) -> Tensor:
        low: Tensor = self.down(self.dropout(hidden.to(self.down.weight.dtype))) * self.scale
        return low


def logit_numbers(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) that the family puts on its logits."""
    config, scale = config.get_text_config(), 1.0
    if getattr(config, "logit_scale", None) is not None:  # cohere
        scale *= float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:  # granite divides
        scale /= float(config.logits_scaling)
    return scale, getattr(config, "final_logit_softcapping", None)


def hidden_states(
    model: Any, input_ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"], past: Any = None
) -> Float[Tensor, "B T H"]:
    """What the head sees. A document starts wherever `position_ids` restarts; attention does not cross that line.

    There is no attention_mask: padding is a document of its own, that nothing supervised belongs to. Transformers
    derives the block mask from the positions, for sliding-window layers too; FlashAttention does so only for a single
    row, hence the flattening.

    `past`: a cache of what stands before every row, which is then one document; it grows by the rows.
    """
    shape = input_ids.shape
    if past is not None:
        grown = body_of(model)(input_ids=input_ids, position_ids=position_ids, past_key_values=past, use_cache=True)
        return grown.last_hidden_state
    if model.config._attn_implementation.startswith("flash"):
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    out = body_of(model)(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return out.last_hidden_state.reshape(*shape, -1)


def through_head(model: Any, hidden: Tensor, work: Callable[[Tensor], Any]) -> Any:
    """Run `work(hidden)` as if it were the head's own forward.

    Whatever hangs on the head's forward and backward keeps working around it: ZeRO-3 gathers the weight before and
    frees it after, and reduces its gradient.
    """
    linear = model.get_output_embeddings()
    for parameter in linear.parameters():
        if hasattr(parameter, "ds_id") and hasattr(linear, "lora_A"):  # of its children, whose forwards do not run
            import deepspeed

            deepspeed.zero.register_external_parameter(linear, parameter)
    linear.forward = work
    try:
        return linear(hidden)
    finally:
        del linear.forward


def check_split(model: Any, vocabulary: int, packed: bool) -> None:
    """Refuse a family that this module takes apart wrongly: the loss would be another model's.

    Its logits must be its head applied to its body; and, where sequences hold several documents, documents must not see
    each other.
    """
    device = next(model.parameters()).device
    ids = torch.arange(9, device=device).remainder(vocabulary)[None]
    positions = torch.arange(9, device=device)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        hidden = hidden_states(model, ids, positions)
        for what, values in (("last hidden state", hidden), ("logits", expected)):
            if not values.isfinite().all():
                raise Refusal(_not_finite(model, what))
        got = through_head(model, hidden, lambda h: head_of(model).logits(h[0].to(expected.dtype), expected.dtype))[
            None
        ]
        if not _close(got, expected):
            raise Refusal(
                f"{type(model).__name__}: its logits are not its head applied to its last hidden state; this "
                f"family is not supported"
            )
        if packed and (leak := crossing(model, vocabulary)):
            raise Refusal(leak)
    model.train(was_training)


@torch.no_grad()
def crossing(model: Any, vocabulary: int) -> str | None:
    """Why a sequence of this model holds no second document; None where it can. In eval mode.

    What is computed of a document must not depend on the other one's tokens: not a bit of it, since shapes are the
    same, and weights just made leak as little as they weigh. Only experts may round otherwise, their batches being of
    other sizes. And a document must be read as if it were alone, its positions too.
    """
    device = next(model.parameters()).device
    ids = torch.arange(9, device=device).remainder(vocabulary)[None]
    positions = torch.arange(9, device=device)[None]
    restarted = torch.cat([positions[:, :4], positions[:, :5]], dim=1)
    together = hidden_states(model, ids, restarted)[:, 4:]
    if not together.isfinite().all():  # NaN differs from itself, and would pass for a leak
        return _not_finite(model, "last hidden state")
    others = ids.clone()
    others[:, :4] = (ids[:, :4] + vocabulary // 2).remainder(vocabulary).flip(1)
    leak = (hidden_states(model, others, restarted)[:, 4:] - together).abs().max()
    rounding = 0.0
    if any("expert" in name for name, _ in model.named_modules()):
        rough = together.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
        rounding = (2**-6 if rough else 1e-5) * float(together.abs().max())
    if not leak <= rounding:
        return f"{type(model).__name__}: a document of a packed sequence sees the one before it; set data.packing=false"
    if not _close(together, hidden_states(model, ids[:, 4:], positions[:, :5])):
        return (
            f"{type(model).__name__}: a document of a packed sequence is not read as it is alone; set "
            f"data.packing=false"
        )
    return None


def _not_finite(model: Any, what: str) -> str:
    return (
        f"{type(model).__name__}: NaN or infinity in its {what}; its weights or the numbers in its config are damaged, "
        f"or too large for its precision; take the model's own files, or a wider precision"
    )


def _close(got: Tensor, expected: Tensor) -> bool:
    """Equal up to what low precision may do."""
    return (got - expected).abs().max().item() <= 0.02 * expected.abs().max().item() + 1e-4
