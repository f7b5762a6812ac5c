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
    model.load_state_dict(_renamed(source, config), strict=True)
    return model


def _renamed(source: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our names and layout: Hugging Face stores (in, out), torch's Linear (out, in)."""
    left = dict(source)
    ours: dict[str, Tensor] = {}

    def take(theirs: str, shape: tuple[int, ...]) -> Tensor:
        if theirs not in left:
            raise ValueError(f"state_dict must have {theirs!r}, and has not")
        tensor = left.pop(theirs)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{theirs} must have shape {shape}, got {tuple(tensor.shape)}")
        return tensor.t() if tensor.dim() == 2 and theirs.startswith("h.") else tensor

    d, width = config.d_model, config.ff_width
    ours["embed.weight"] = take("wte.weight", (config.vocab_size, d))
    ours["positions.weight"] = take("wpe.weight", (config.seq_len, d))
    for part in ("weight", "bias"):

        def shape(rows: int, columns: int, part: str = part) -> tuple[int, ...]:
            return (rows, columns) if part == "weight" else (columns,)

        ours[f"final_norm.{part}"] = take(f"ln_f.{part}", (d,))
        for i in range(config.n_layer):
            theirs, block = f"h.{i}", f"blocks.{i}"
            qkv = take(f"{theirs}.attn.c_attn.{part}", shape(d, 3 * d)).split(d)
            for name, tensor in zip("qkv", qkv, strict=True):
                ours[f"{block}.attn.{name}_proj.{part}"] = tensor
            ours[f"{block}.attn.o_proj.{part}"] = take(f"{theirs}.attn.c_proj.{part}", shape(d, d))
            ours[f"{block}.mlp.up_proj.{part}"] = take(f"{theirs}.mlp.c_fc.{part}", shape(d, width))
            ours[f"{block}.mlp.down_proj.{part}"] = take(
                f"{theirs}.mlp.c_proj.{part}", shape(width, d)
            )
            ours[f"{block}.attn_norm.{part}"] = take(f"{theirs}.ln_1.{part}", (d,))
            ours[f"{block}.mlp_norm.{part}"] = take(f"{theirs}.ln_2.{part}", (d,))
    if left:
        raise ValueError(f"state_dict must be GPT-2's alone, got also {_some(left)}")
    return ours


def _some(names: Mapping[str, Tensor]) -> str:
    shown = ", ".join(list(names)[:3])
    return f"{shown}, ... ({len(names)} tensors)" if len(names) > 3 else shown or "no tensors"
