"""Native sparse attention: the three branches against a loop over queries, causality, FLOPs."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ceg_kernels.nn import RotaryEmbedding
from ceg_kernels.ops.attention import pairs
from ceg_model.config import GPTConfig
from ceg_model.data import Request, prepare
from ceg_model.flops import masked_flops, model_flops, params_count
from ceg_model.gpt import Attention, build_model
from ceg_model.sparse_attention import (
    NativeSparseAttention,
    compressed_pairs,
    selected_pairs,
)
from ceg_model.train import train
from ceg_model.train_config import TrainConfig

SPARSE = GPTConfig(
    vocab_size=37, seq_len=61, n_layer=2, n_head=4, n_kv_head=2, d_model=32,
    attention="native_sparse", compress_block=6, compress_stride=3, select_block=9,
    select_count=4, sparse_window=7,
)  # fmt: skip


def change(**fields):
    return dataclasses.replace(SPARSE, **fields)


CONFIGS = {
    "grouped": SPARSE,
    "defaults, one head a group": GPTConfig(
        vocab_size=37, seq_len=100, n_layer=1, n_head=2, d_model=32, attention="native_sparse"
    ),
    "one group, rope, qk_norm": change(n_kv_head=1, position="rope", qk_norm=True, bias=True),
    "blocks side by side": change(compress_block=3, select_block=6, norm="rms_norm"),
    "blocks longer than selected ones": change(compress_block=12, select_block=3),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def tokens(config, batch=2, seed=1):
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, config.seq_len), generator=stream)


def layer_of(config, seed=0):
    """A layer with weights large enough that blocks differ, in fp64."""
    torch.manual_seed(seed)
    layer = NativeSparseAttention(config).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.4)
    return layer


def by_hand(layer, config, x):
    """One sequence, one query and one head at a time; counts the pairs of each branch on its way.

    Blocks are read off the definition: which tokens does a compressed block share with one of the
    selection, counted in strides.
    """
    heads = (-1, config.head_dim)
    q = layer.q_norm(layer.q_proj(x).unflatten(-1, heads))
    k = layer.k_norm(layer.k_proj(x).unflatten(-1, (3, config.kv_heads, -1)))
    plain, turned = (q, k), (q, k)
    if config.position == "rope":  # each branch's keys by themselves
        rotary = RotaryEmbedding(config.head_dim, len(x))
        turns = [rotary(q[None], k[None, :, c]) for c in range(3)]
        turned = turns[0][0][0], torch.stack([keys[0] for _, keys in turns], 1)
    v = layer.v_proj(x).unflatten(-1, (3, config.kv_heads, -1))
    gates = layer.gate_proj(x).sigmoid().unflatten(-1, (3, -1))
    size, stride, wide = config.compress_block, config.compress_stride, config.select_block
    starts = list(range(0, x.shape[0] - size + 1, stride))
    k_far = [layer.compress_k(plain[1][None, s : s + size, 0])[0, 0] for s in starts]
    v_far = [layer.compress_v(v[None, s : s + size, 0])[0, 0] for s in starts]
    group, counts, rows = config.n_head // config.kv_heads, [0, 0, 0], []

    def attend(query, keys, values):
        p = (torch.stack(keys) @ query * config.head_dim**-0.5).softmax(0)
        return p, p @ torch.stack(values)

    for t in range(x.shape[0]):
        ended = [i for i, s in enumerate(starts) if s + size <= t + 1]
        current, out = t // wide, [None] * config.n_head
        for g in range(config.kv_heads):
            members = range(g * group, (g + 1) * group)
            far, importance = {}, [0.0] * (current + 1)
            for h in members:
                far[h] = torch.zeros(config.head_dim, dtype=x.dtype)
                if not ended:
                    continue
                p, far[h] = attend(
                    plain[0][t, h], [k_far[i][g] for i in ended], [v_far[i][g] for i in ended]
                )
                for i, weight in zip(ended, p.tolist(), strict=True):
                    covered = range(starts[i], starts[i] + size, stride)
                    for block in (token // wide for token in covered):
                        importance[block] += weight
            fixed = {0, max(0, current - 1), current}
            free = sorted(set(range(current + 1)) - fixed, key=lambda b: -importance[b])
            blocks = fixed | set(free[: max(0, config.select_count - len(fixed))])
            chosen = [j for j in range(t + 1) if j // wide in blocks]
            near = range(max(0, t - config.sparse_window + 1), t + 1)
            for h in members:
                parts = [far[h]]
                for branch, keys in ((1, chosen), (2, near)):
                    own = [[x[j, branch, g] for j in keys] for x in (turned[1], v)]
                    parts.append(attend(turned[0][t, h], *own)[1])
                out[h] = sum(gates[t, c, h] * part for c, part in enumerate(parts))
                for c, n in enumerate((len(ended), len(chosen), len(near))):
                    counts[c] += n
        rows.append(torch.cat(out))
    return layer.o_proj(torch.stack(rows)), counts


@configs
def test_equals_a_loop_over_queries(config):
    layer = layer_of(config)
    rotary = RotaryEmbedding(config.head_dim, config.seq_len) if config.position == "rope" else None
    x = torch.randn(config.seq_len, config.d_model, dtype=torch.float64)
    with torch.no_grad():
        expected, counts = by_hand(layer, config, x)
        torch.testing.assert_close(layer(x[None], rotary)[0], expected)
    far, chosen = compressed_pairs(config, len(x)), selected_pairs(config, len(x))
    assert counts[:2] == [config.n_head * far, config.n_head * chosen]


@configs
@pytest.mark.parametrize("seq_len", [1, 5, 20, 61])
def test_counter_sees_the_model_flops_and_the_masked_pairs(config, seq_len):
    """The pairs themselves are counted in the loop above."""
    model, idx = build_model(config), tokens(config)[:, :seq_len]
    with FlopCounterMode(display=False) as counter:
        _, loss = model(idx, idx)
        forward = counter.get_total_flops()
        loss.backward()
    needed, masked = model_flops(config, seq_len, 2), masked_flops(config, seq_len, 2)
    assert forward == needed.forward + masked // 3
    assert counter.get_total_flops() == needed.total + masked
    assert (masked > 0) == (seq_len > 1)
    assert params_count(config) == sum(p.numel() for p in model.parameters())


def test_flops_have_no_form_without_a_mask():
    with pytest.raises(ValueError, match="causal must be True with attention 'native_sparse'"):
        model_flops(SPARSE, causal=False)
    assert masked_flops(GPTConfig(), 64) == 0


@pytest.mark.parametrize("branch", [1, 2])
def test_one_open_branch_over_everything_is_full_attention(branch):
    config = change(select_count=7, sparse_window=61)  # 7 blocks of 9 tokens
    layer, x = layer_of(config), torch.randn(2, 61, 32, dtype=torch.float64)
    full = Attention(GPTConfig(d_model=32, n_head=4, n_kv_head=2)).double()
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.fill_(-1e3).view(3, 4)[branch] = 1e3
        for name in ("q_proj", "o_proj"):
            getattr(full, name).weight.copy_(getattr(layer, name).weight)
        for name in ("k_proj", "v_proj"):
            getattr(full, name).weight.copy_(getattr(layer, name).weight.chunk(3)[branch])
        torch.testing.assert_close(layer(x, None), full(x, None))


@configs
def test_a_later_token_changes_nothing_before_it(config):
    """At every position: at an edge of a block a leak would show for one query alone."""
    model, idx = build_model(config).double().eval(), tokens(config, batch=1)
    changed = idx.repeat(config.seq_len, 1)
    at = torch.arange(config.seq_len)
    changed[at, at] = (changed[at, at] + 1) % config.vocab_size
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # at its start the model hardly looks around
        differs = (model(idx)[0] - model(changed)[0]).abs().amax(-1) > 1e-9
    assert not differs[at < at[:, None]].any()
    assert differs[at >= at[:, None]].float().mean() > 0.9


def test_no_gradient_through_the_choice():
    """Keys of the compressed branch choose; where its gate is shut they learn nothing."""
    layer = layer_of(SPARSE)
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.view(3, 4)[0] = -1e3
    layer(torch.randn(1, 61, 32, dtype=torch.float64), None).square().sum().backward()
    assert layer.compress_k.merge.weight.grad.abs().max() == 0
    far, *rest = layer.k_proj.weight.grad.chunk(3)
    assert far.abs().max() == 0
    assert all(part.abs().max() > 0 for part in rest)


def test_equal_blocks_are_taken_in_order():
    layer = NativeSparseAttention(change(n_kv_head=1))
    keys = layer._selection(torch.zeros(1, 1, 61, 7))[0, 0, 0, 60]
    assert keys.nonzero().flatten().tolist() == [*range(18), *range(45, 61)]


def test_training_says_what_is_executed(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(" ".join(map(str, range(i, 90))))
    prepare(Request(sources=(str(text),), val_fraction=0.2), tmp_path / "shards")
    config = change(vocab_size=256, n_layer=1)
    steps = TrainConfig(steps=2, batch_size=3, device="cpu", dtype="float32", backend="reference")
    result = train(config, steps, tmp_path / "shards", tmp_path / "run")
    # The window branch's op, materialised: all pairs, and the scores once more in its backward.
    every, needed = 61**2, pairs(61, 61, True, 6, 0)
    window = config.n_head * config.head_dim * (14 * every - 12 * needed)
    extra = result["executed_flops"] - result["model_flops"]
    assert extra == 2 * 3 * (window + masked_flops(config, 61))
