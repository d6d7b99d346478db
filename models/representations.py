"""What a model's layers give on the way: residual streams, queries, keys and values, caught by forward hooks.

Layers are counted from 1; number 0 stands for the embeddings, which are the first layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from models.errors import Refusal
from models.heads import body_of
from models.load import empty_model

_SEPARATE = ("q_proj", "k_proj", "v_proj")


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a causal LM, in order, found by structure: the one list inside its body that is as long as the
    config says, and not part of a layer (experts may be as many)."""
    count = model.config.get_text_config().num_hidden_layers
    found = _outermost_lists(body_of(model), count)
    if len(found) != 1:
        raise Refusal(
            f"{type(model).__name__}: {len(found)} lists of {count} layers found in its body, need one; objectives on "
            f"representations do not support this family"
        )
    return found[0]


def _outermost_lists(module: nn.Module, count: int) -> list[nn.ModuleList]:
    if isinstance(module, nn.ModuleList) and len(module) == count:
        return [module]
    return [each for child in module.children() for each in _outermost_lists(child, count)]


def projection_widths(config: PretrainedConfig) -> tuple[int, int, int]:
    """Numbers that one token's queries, keys and values have in a layer, all heads together."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    of_head = getattr(text, "head_dim", None) or text.hidden_size // heads
    of_keys = (getattr(text, "num_key_value_heads", None) or heads) * of_head
    return heads * of_head, of_keys, of_keys


def check_capture(config: PretrainedConfig, hidden: Sequence[int], relations: Sequence[int]) -> None:
    """Refuse, from the config alone, what `Capture` would refuse of the model."""
    try:
        model = empty_model(config)
    except ValueError:
        return  # a family of remote code: known only once it is loaded, and refused then
    Capture(model, hidden, relations)


class Capture:
    """Inside this context, a forward of `model`'s body leaves what the named layers gave; the newest forward counts.

    `hidden[n]` is what layer n gave, before any final norm; `queries[n]`, `keys[n]` and `values[n]` are what its
    projections gave, all heads side by side, before norms of queries and keys and before positions are rotated in.
    Shapes are [B, T, width], in the model's dtype; where FlashAttention runs on rows laid end to end, only after
    `reshape`. They carry the forward's graph, and live as long as this object, until its next forward or `clear`.

    Hooks store and do nothing else: whatever they computed inside a checkpointed layer would be missing when backward
    computes that layer again. That recomputation runs layers, not the body, and is not stored.
    """

    def __init__(self, model: Any, hidden: Sequence[int], relations: Sequence[int]) -> None:
        """Refuse layers that are not there, and projections that are not understood. Hooks nothing yet."""
        layers, config = decoder_layers(model), model.config
        for kind, lowest, numbers in (("hidden state", 0, hidden), ("attention", 1, relations)):
            for number in numbers:
                if not lowest <= number <= len(layers):
                    raise Refusal(
                        f"layer {number}: {type(model).__name__} has {kind}s of layers {lowest} to {len(layers)}"
                    )
        self._body, self._layers = body_of(model), layers
        self._wanted = tuple(sorted(set(hidden)))
        self._projections = {n: _projections(layers[n - 1], config, n) for n in sorted(set(relations))}
        self._handles: list[RemovableHandle] = []
        self._running = False
        self._hidden: dict[int, Tensor] = {}
        self._projected: dict[int, dict[int, Tensor]] = {}
        self._rows: tuple[int, int] | None = None

    def __enter__(self) -> Capture:
        if self._handles:
            raise RuntimeError("this Capture is already entered")
        hook = self._handles.append
        hook(self._body.register_forward_pre_hook(self._begin))
        hook(self._body.register_forward_hook(self._end, always_call=True))
        for number in self._wanted:
            if number == 0:
                hook(self._layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True))
            else:
                hook(self._layers[number - 1].register_forward_hook(self._keep_output(number)))
        for number, projections in self._projections.items():
            for at, module in enumerate(projections.modules):
                hook(module.register_forward_hook(self._keep_projected(number, at)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reshape(self, batch: int, length: int) -> None:
        """Read this forward's results as [batch, length, width], however attention wanted its rows."""
        self._rows = (batch, length)

    def clear(self) -> None:
        """Let go of everything captured, and so of its graph."""
        self._hidden.clear()
        self._projected.clear()
        self._rows = None

    @property
    def hidden(self) -> dict[int, Tensor]:
        return {number: self._shaped(self._found(self._hidden, number)) for number in self._wanted}

    @property
    def queries(self) -> dict[int, Tensor]:
        return self._parts(0)

    @property
    def keys(self) -> dict[int, Tensor]:
        return self._parts(1)

    @property
    def values(self) -> dict[int, Tensor]:
        return self._parts(2)

    def _parts(self, part: int) -> dict[int, Tensor]:
        return {
            number: self._shaped(projections.part(self._found(self._projected, number), part))
            for number, projections in self._projections.items()
        }

    def _shaped(self, tensor: Tensor) -> Tensor:
        return tensor if self._rows is None else tensor.reshape(*self._rows, tensor.shape[-1])

    def _found(self, seen: dict[int, Any], number: int) -> Any:
        if number not in seen:
            raise RuntimeError(f"layer {number} gave nothing: no forward ran, or it skipped the layer (layerdrop)")
        return seen[number]

    def _begin(self, *_: Any) -> None:
        self.clear()
        self._running = True

    def _end(self, *_: Any) -> None:
        self._running = False

    def _keep_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._running:
            self._hidden[0] = args[0] if args else kwargs["hidden_states"]

    def _keep_output(self, number: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._running:
                self._hidden[number] = output[0] if isinstance(output, tuple) else output

        return keep

    def _keep_projected(self, number: int, at: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._running:
                self._projected.setdefault(number, {})[at] = output

        return keep


@dataclass(frozen=True)
class _Projections:
    """The modules a layer's queries, keys and values come out of: three, or one whose output `split` takes apart."""

    modules: tuple[nn.Module, ...]
    split: Callable[[Tensor], Sequence[Tensor]] | None

    def part(self, outputs: dict[int, Tensor], part: int) -> Tensor:
        return outputs[part] if self.split is None else self.split(outputs[0])[part]


def _projections(layer: nn.Module, config: PretrainedConfig, number: int) -> _Projections:
    """Those of the one attention inside `layer`. How a fused output is laid out cannot be seen from its shape, so
    fused ones are known by the name of their class."""
    widths = projection_widths(config)

    def side_by_side(fused: Tensor) -> Sequence[Tensor]:
        return fused.split(widths, dim=-1)

    def head_by_head(fused: Tensor) -> Sequence[Tensor]:
        heads = fused.unflatten(-1, (config.get_text_config().num_attention_heads, -1))
        return [part.flatten(-2) for part in heads.chunk(3, dim=-1)]

    fused = {
        "GPT2Attention": ("c_attn", side_by_side),
        "Phi3Attention": ("qkv_proj", side_by_side),
        "GPTNeoXAttention": ("query_key_value", head_by_head),
    }
    found: _Projections | None = None
    expected: tuple[int, ...] = widths
    for module in layer.modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in _SEPARATE):
            found = _Projections(tuple(getattr(module, name) for name in _SEPARATE), None)
        elif type(module).__name__ in fused:
            name, split = fused[type(module).__name__]
            found, expected = _Projections((getattr(module, name),), split), (sum(widths),)
        if found is not None:
            break
    if found is None:
        raise Refusal(
            f"layer {number}, {type(layer).__name__}: no queries, keys and values found in it; attention relations "
            f"need q_proj, k_proj and v_proj, or the attention of {', '.join(fused)}"
        )
    got = tuple(_width(each) for each in found.modules)
    if got != expected:  # gated queries, latent keys, widths that differ by layer
        raise Refusal(
            f"layer {number}, {type(layer).__name__}: its projections give {got} numbers and its config's heads "
            f"{expected}; attention relations do not support this family"
        )
    return found


def _width(projection: Any) -> int | None:
    """Numbers a projection gives; not by its weight, which ZeRO-3 leaves empty. `nf` is GPT-2's Conv1D."""
    return getattr(projection, "out_features", getattr(projection, "nf", None))
