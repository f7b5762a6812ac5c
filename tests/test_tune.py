"""`ceg tune` and the table of tiles that it writes.

Not here: its times on a GPU, which no test can know; that a candidate is right is checked by
the accuracy rule before it is timed, which runs here on small arguments in Triton's interpreter.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ceg_kernels import triton
from ceg_model import cli

pytestmark = pytest.mark.skipif(triton.MISSING is not None, reason=str(triton.MISSING))
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def config():
    from ceg_kernels.triton import attention_config

    return attention_config


@pytest.fixture
def tune():
    from ceg_kernels.triton import tune

    return tune


def test_the_table_has_a_row_for_every_compiled_call_and_no_other(config, tune):
    from ceg_kernels.triton.compile import TARGETS

    covered = {key for target in TARGETS.values() for key in tune.keys(target)}
    measured = {config.plain(key) for key in config.rows()}
    assert covered == measured


def test_a_table_is_read_as_it_was_written(config, tmp_path):
    table = config.rows()
    config.write(table, tmp_path / "tiles.json")
    assert config.rows(tmp_path / "tiles.json") == table
    assert (tmp_path / "tiles.json").read_text() == config.PATH.read_text()


@pytest.mark.parametrize(
    ("arch", "warp", "row"),
    [
        ("sm_90", 32, "sm_90"),
        ("sm_86", 32, "sm_86"),
        ("sm_89", 32, "sm_86"),  # as little shared memory, the same instructions
        ("sm_103", 32, "sm_100"),
        ("sm_75", 32, "sm_120"),  # nobody's: the smallest tiles
        ("gfx90a", 64, "gfx942"),
    ],
)
def test_gpus_without_rows_use_those_of_another(config, arch, warp, row):
    from ceg_kernels.triton.launch import Gpu

    key = config.key_of("fwd", Gpu(arch, warp, 100), 128, 16, "causal")
    assert key == config.Key("fwd", row, 128, 16, "causal")
    tile = config.tile_of("fwd", Gpu(arch, warp, 100), 128, 16, "causal")
    assert tile == config.rows()[config.plain(key)][0]


def test_a_measured_row_goes_before_that_for_any_plain_mask(config, monkeypatch):
    from ceg_kernels.triton.launch import Gpu

    gpu = Gpu("sm_90", 32, 132)
    own, other = config.Tile(64, 32, 4, 1), config.Tile(32, 32, 4, 1)
    tiles = {**config._tiles(), config.Key("fwd", "sm_90", 128, 16, "causal"): own}
    monkeypatch.setattr(config, "_tiles", lambda: tiles)
    monkeypatch.setattr(config, "_tabled", config._tabled.__wrapped__)  # not what it remembers
    assert config.tile_of("fwd", gpu, 128, 16, "causal") == own
    assert config.tile_of("fwd", gpu, 128, 16, "full") != own
    with config.forced({"fwd": other}):
        assert config.tile_of("fwd", gpu, 128, 16, "causal") == other
        assert config.tile_of("bwd_dq", gpu, 128, 16, "causal") != other


def test_few_queries_take_small_tiles(config):
    tile = config.Tile(128, 64, 8, 2)
    assert config.for_queries(tile, 1000, 16) == tile
    assert config.for_queries(tile, 65, 16) == tile
    assert config.for_queries(config.Tile(128, 64, 8, 2, 1), 64, 16) == config.Tile(64, 64, 8, 2)
    assert config.for_queries(tile, 64, 16) == config.Tile(64, 64, 8, 2)
    assert config.for_queries(tile, 1, 16) == config.Tile(32, 64, 8, 2)
    assert config.for_queries(tile, 1, 32) == config.Tile(16, 64, 8, 2)
    assert config.for_queries(config.Tile(16, 16, 8, 1), 1, 16) == config.Tile(16, 16, 8, 1)


def test_every_candidate_is_a_tile_that_could_fit(config, tune):
    from ceg_kernels.triton.compile import TARGETS

    for key in tune.keys(TARGETS["sm_90"]):
        tiles = tune.candidates(key)
        assert len(tiles) > 2
        assert len(tiles) == len(set(tiles))
        assert tiles[0].m * tiles[0].n == max(t.m * t.n for t in tiles)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert cli.main(["tune"]) == 2
    assert "ceg tune must run on a GPU, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--kernels", "fwd,dq"], "kernels must be of fwd, decode, bwd, bwd_dkdv, .*, got 'dq'"),
        (["--compile", "sm_70"], "target must be one of sm_80, .*, got 'sm_70'"),
        (["--compile", "sm_89"], "target must be one of sm_80, sm_86, sm_90, .*, got 'sm_89'"),
    ],
)
def test_unknown_names_are_named(capsys, arguments, match):
    assert cli.main(["tune", *arguments]) == 2
    assert re.search(match, capsys.readouterr().err)


def test_a_tile_that_does_not_fit_is_replaced_and_a_measured_one_is_not(config, tmp_path):
    """Compiles, so in a process that does not interpret."""
    path = tmp_path / "tiles.json"
    wide = config.Tile(128, 128, 4, 3)  # 64 KiB of queries alone
    spilling = config.Key("fwd", "sm_120", 256, 16, "plain")
    unused = config.Key("bwd", "sm_120", 64, 32, "plain")  # as if nothing fitted
    kept = config.Key("bwd_dq", "sm_120", 256, 16, "plain")
    table = {**config.rows(), spilling: (wide, "compiler"), kept: (wide, {"device": "some GPU"})}
    table[unused] = config.UNUSED, "compiler"
    config.write(table, path)
    code = (
        "from ceg_kernels.triton import attention_config as c, tune; from ceg_model import cli\n"
        "keys = [c.Key(k, 'sm_120', 256, 16, 'plain') for k in ('fwd', 'bwd_dq')]\n"
        "keys.append(c.Key('bwd', 'sm_120', 64, 32, 'plain'))\n"
        "tune.keys = lambda target: iter(keys)\n"
        "tiles = {'fwd': [c.Tile(128, 128, 8, 3), c.Tile(64, 32, 8, 1)],\n"
        "         'bwd': [c.Tile(64, 64, 8, 1, 1), c.Tile(64, 32, 8, 1, 1), c.UNUSED]}\n"
        "tune.candidates = lambda key: tiles[key.kernel]\n"
        f"raise SystemExit(cli.main(['tune', '--compile', 'sm_120', '--table', {str(path)!r}]))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fwd sm_120 256 16 plain -> 64 32 8 1" in done.stdout
    found = config.rows(path)
    assert found.pop(spilling) == (config.Tile(64, 32, 8, 1), "compiler")
    assert found.pop(kept) == (wide, {"device": "some GPU"})
    tile, by = found.pop(unused)
    assert (tile, by["tried"], by["nearest"]) == (config.UNUSED, 2, [64, 32, 8, 1, 0])
    assert by["wrong"].startswith("spills ")
    assert found == {k: v for k, v in table.items() if k not in (spilling, kept, unused)}


def test_the_table_says_what_was_tried_where_a_kernel_is_not_used(config, tune):
    for key, (tile, by) in config.rows().items():
        if tile == config.UNUSED:
            assert by["tried"] == len(tune.candidates(key)) - 1, key
            assert re.match(r"spills \d+ bytes|shared memory must be <= ", by["wrong"]), key
        else:
            assert by == "compiler" or by["device"], key


@pytest.mark.skipif(not triton.INTERPRETED, reason="sizes for the interpreter")
@pytest.mark.parametrize("kernel", ["fwd", "decode", "bwd", "bwd_dkdv", "bwd_dq"])
def test_tiles_are_checked_and_then_timed(config, tune, monkeypatch, kernel):
    from ceg_kernels.triton.attention_problem import case
    from ceg_kernels.triton.compile import TARGETS
    from ceg_model.tune import tune_one

    key = config.Key(kernel, "sm_90", 64, 16, "other")
    name = "D64 bf16 everything packed"
    flags = {"left": 20, "slopes": True, "sink": True, "packed": True}
    small = case(2, 40, 2, 1, 16, queries=8 if kernel == "decode" else None, **flags)
    monkeypatch.setitem(tune.CASES, name, small)
    monkeypatch.setattr(tune, "_cases", lambda key, target: [name])
    tiles = [config.Tile(32, 32, 4, 1), config.Tile(16, 32, 4, 1)]
    tiles += tune.schedules(key, config.Tile(16, 32, 4, 1, 1))[:2]
    assert len(tiles) == (4 if kernel in ("fwd", "decode", "bwd") else 2)
    seconds = tune_one(key, tiles, TARGETS["sm_90"], "cpu")
    assert set(seconds) == set(tiles)
    assert (config.UNUSED in tiles) == (kernel in ("decode", "bwd"))
    assert all(s > 0 for s in seconds.values())


@pytest.mark.skipif(not triton.INTERPRETED, reason="sizes for the interpreter")
def test_a_tile_with_wrong_results_is_not_timed(config, tune, monkeypatch):
    from ceg_kernels.ops.attention import ATTENTION
    from ceg_kernels.triton.attention_problem import case
    from ceg_kernels.triton.compile import TARGETS
    from ceg_model.tune import tune_one

    right, wrong = config.Tile(32, 32, 4, 1), config.Tile(16, 16, 4, 1)
    name, run = "D64 bf16 causal", ATTENTION.backend("triton").run
    monkeypatch.setitem(tune.CASES, name, case(1, 40, 1, 1, 16))
    monkeypatch.setattr(tune, "_cases", lambda key, target: [name])

    def spoiled(*args):
        out, lse = run(*args)
        tile = config.tile_of("fwd", None, 64, 16, "causal")
        return out * (1.01 if tile == wrong else 1.0), lse

    with monkeypatch.context() as patch:
        patch.setattr(
            type(ATTENTION), "backend", lambda self, name: type("B", (), {"run": spoiled})
        )
        key = config.Key("fwd", "sm_90", 64, 16, "causal")
        assert set(tune_one(key, [right, wrong], TARGETS["sm_90"], "cpu")) == {right}


def test_the_new_rows_can_be_printed_as_json(capsys, monkeypatch, config):
    key, tile = config.Key("fwd", "sm_90", 64, 16, "plain"), config.Tile(64, 32, 4, 1)
    monkeypatch.setattr("ceg_model.tune.by_compiler", lambda *args: {key: tile})
    assert cli.main(["tune", "--compile", "sm_90", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"key": vars(key), "tile": vars(tile)}]
