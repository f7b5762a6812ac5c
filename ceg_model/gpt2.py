"""GPT-2 checkpoints of Hugging Face, as a GPT of ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ceg_model.config import GPTConfig
from ceg_model.gpt import GPT


def gpt2_from_state_dict(state_dict: Mapping[str, Tensor], n_head: int, eps: float = 1e-5) -> GPT:
    """A GPT with the weights of a `GPT2LMHeadModel` (or `GPT2Model`) state dict.

    Sizes are read off the tensors; the number of heads and LayerNorm's eps are not in them. Both
    are in the model's config (`n_head`, `layer_norm_epsilon`). Raises ValueError for a missing,
    unexpected or misshapen tensor.
    """
    source = {k.removeprefix("transformer."): v for k, v in state_dict.items()}
    # Masks that old checkpoints carry, and the head, which is tied to wte.
    source = {
        k: v for k, v in source.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))
    }
    head = source.pop("lm_head.weight", None)
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if name not in source:
            raise ValueError(f"state_dict must have {name!r} (GPT-2's), got {_some(state_dict)}")
    if head is not None and not torch.equal(head, source["wte.weight"]):
        raise ValueError("lm_head.weight must equal wte.weight (GPT-2's tied head), got another")
    config = GPTConfig(
        vocab_size=source["wte.weight"].shape[0],
        seq_len=source["wpe.weight"].shape[0],
        d_model=source["wte.weight"].shape[1],
        d_ff=source["h.0.mlp.c_fc.weight"].shape[1],
        n_layer=1 + max(int(k.split(".")[1]) for k in source if k.startswith("h.")),
        n_head=n_head,
        norm="layer_norm",
        norm_eps=eps,
        bias=True,
    )
    model = GPT(config)
    model.load_state_dict(_renamed(source, model.state_dict(), config.n_layer), strict=True)
    return model


def _renamed(
    source: dict[str, Tensor], wanted: Mapping[str, Tensor], n_layer: int
) -> dict[str, Tensor]:
    """Our names and layout: Hugging Face stores (in, out), torch's Linear (out, in)."""
    ours: dict[str, Tensor] = {}
    for theirs, names in _names(n_layer).items():
        if theirs not in source:
            raise ValueError(f"state_dict must have {theirs!r} (GPT-2's), got {_some(source)}")
        tensor = source.pop(theirs)
        rows = [wanted[name].shape[0] for name in names]
        shape = (sum(rows), *wanted[names[0]].shape[1:])
        turned = theirs.startswith("h.") and len(shape) == 2
        expected = shape[::-1] if turned else shape
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{theirs} must have shape {expected}, got {tuple(tensor.shape)}")
        parts = (tensor.t() if turned else tensor).split(rows)
        ours.update(zip(names, parts, strict=True))
    if source:
        raise ValueError(f"state_dict must be GPT-2's alone, got also {_some(source)}")
    return ours


def _names(n_layer: int) -> dict[str, list[str]]:
    """Theirs -> ours; their c_attn is our q, k and v, one below the other."""
    names = {"wte.weight": ["embed.weight"], "wpe.weight": ["positions.weight"]}
    for part in ("weight", "bias"):
        names[f"ln_f.{part}"] = [f"final_norm.{part}"]
        for i in range(n_layer):
            names |= {
                f"h.{i}.ln_1.{part}": [f"blocks.{i}.attn_norm.{part}"],
                f"h.{i}.attn.c_attn.{part}": [f"blocks.{i}.attn.{x}_proj.{part}" for x in "qkv"],
                f"h.{i}.attn.c_proj.{part}": [f"blocks.{i}.attn.o_proj.{part}"],
                f"h.{i}.ln_2.{part}": [f"blocks.{i}.mlp_norm.{part}"],
                f"h.{i}.mlp.c_fc.{part}": [f"blocks.{i}.mlp.up_proj.{part}"],
                f"h.{i}.mlp.c_proj.{part}": [f"blocks.{i}.mlp.down_proj.{part}"],
            }
    return names


def _some(names: Mapping[str, Tensor]) -> str:
    shown = ", ".join(list(names)[:3])
    return f"{shown}, ... ({len(names)} tensors)" if len(names) > 3 else shown or "no tensors"
