"""``subquad benchmark ops``: floors against hand-computed ones, the gate against wrong callables, what a run leaves."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.ops import gated_linear_attention
from subquad.tools import benchmark
from subquad.tools.benchmark import ModelsOptions, OpsOptions
from subquad.tools.benchmarks import gate, measure, ops, recorded, report
from subquad.tools.benchmarks.measure import Ceilings
from subquad.tools.benchmarks.registry import Case, OpEntry, Recorded, System, Tensors

SCAN = ops.OPS["selective_scan"]
GATED = ops.OPS["gated_linear_attention"]
NEIGHBORHOOD = ops.OPS["neighborhood_attention"]
WINDOW = ops.OPS["window_attention"]
DEPTHWISE = ops.OPS["depthwise_conv"]

REGION = ops.OPS["region_attention"]
CPU = torch.device("cpu")
TINY = "3x16x4x5"


def _run_scan(quick: dict[str, Any], entry: OpEntry = SCAN, **options: Any) -> list[report.Row]:
    chosen = {"shapes": (TINY,), "variants": ("core-n1",), **quick, **options}
    return ops.run(OpsOptions(**chosen), {entry.name: entry})


# Floors and what goes into them ----------------------------------------------------------------------------------

# B, E, side, N; memory floors in ms of a forward pass and of forward + backward, step size given and low-rank, and the
# exponential floor: computed by hand from the numbers of bytes and exponentials at 3.0 TB/s and 4.13e12 /s.
FLOORS = [
    (128, 96, 56, 1, 0.156, 0.443, 0.060, 0.154, 0.112),
    (128, 192, 28, 1, 0.078, 0.220, 0.029, 0.076, 0.056),
    (128, 384, 14, 1, 0.039, 0.110, 0.015, 0.037, 0.028),
    (128, 768, 7, 1, 0.019, 0.055, 0.007, 0.019, 0.014),
    (8, 96, 256, 1, 0.204, 0.579, 0.078, 0.20, 0.146),
    (8, 768, 32, 1, 0.025, 0.071, 0.010, 0.024, 0.018),
    (1, 192, 256, 1, 0.051, 0.144, 0.019, 0.049, 0.037),
    (128, 96, 56, 16, 0.188, 0.540, 0.092, 0.251, 0.67),
    (128, 192, 56, 16, 0.343, 0.976, 0.150, 0.398, 1.34),
    (8, 96, 256, 16, 0.246, 0.705, 0.120, 0.33, 0.88),
    (1, 96, 256, 16, 0.031, 0.088, 0.015, 0.041, 0.11),
]


@pytest.mark.parametrize("batch, dim, side, states, core, core_both, low, low_both, exps", FLOORS)
def test_floors_equal_the_hand_computed_ones(
    batch: int,
    dim: int,
    side: int,
    states: int,
    core: float,
    core_both: float,
    low: float,
    low_both: float,
    exps: float,
) -> None:
    def row(form: str) -> report.Row:
        cost = SCAN.cost(Case((batch, dim, side, side), f"{form}-n{states}"), 2)
        return ops.floors(cost, Ceilings(3.0e12, 1.0, 4.13e12))

    given, low_rank, projected = row("core"), row("low-rank"), row("core+proj")
    last_digit = partial(pytest.approx, rel=0.005, abs=0.0006)
    assert given["fwd_memory_floor_ms"] == last_digit(core)
    assert given["fb_memory_floor_ms"] == last_digit(core_both)
    assert low_rank["fwd_memory_floor_ms"] == last_digit(low)
    assert low_rank["fb_memory_floor_ms"] == pytest.approx(low_both, rel=0.02, abs=0.0006)
    assert projected["fwd_memory_floor_ms"] == low_rank["fwd_memory_floor_ms"]
    assert given["fwd_exp_floor_ms"] == pytest.approx(exps, rel=0.01, abs=0.0006)
    assert given["fwd_floor_ms"] == max(given["fwd_memory_floor_ms"], given["fwd_exp_floor_ms"])


def test_floor_without_an_exp2_rate_is_the_memory_floor() -> None:
    row = ops.floors(SCAN.cost(Case((1, 16, 4, 4), "core-n16"), 4), Ceilings(1e12, 1.0, None))
    assert row["fwd_exp_floor_ms"] is None
    assert row["fwd_floor_ms"] == row["fwd_memory_floor_ms"]


def test_every_recorded_shape_is_a_case() -> None:
    cases = {(case.shape, case.variant) for case in SCAN.cases}
    assert {(shape, f"core-n{states}") for shape, states in recorded.CORE} <= cases
    assert {(shape, "core+proj-n1") for shape in recorded.CORE_PROJ} <= cases


# Runs ------------------------------------------------------------------------------------------------------------


def test_run_leaves_rows_in_csv_and_json(quick: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = benchmark.run(OpsOptions(**quick, ops=(SCAN.name,), shapes=(TINY,), variants=("core-n1", "core+proj-n16")))
    assert [row["variant"] for row in rows] == ["core-n1", "core+proj-n16"]
    with (quick["output"] / "ops.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == ops.COLUMNS
    content = json.loads((quick["output"] / "ops.json").read_text())
    assert content["rows"] == json.loads(json.dumps(rows))
    assert {"device", "torch", "triton", "copy_tb_per_s", "exp2_per_s", "command", "options"} <= set(
        content["environment"]
    )
    for row, line in zip(rows, written, strict=True):
        assert (row["system"], row["backend"], row["status"], row["shape"]) == ("ours", "torch", "ok", TINY)
        assert 0 < row["error"] < 1e-5
        assert row["fwd_floor_x"] == pytest.approx(row["fwd_ms"] / row["fwd_floor_ms"])
        assert float(line["fb_ms"]) == row["fb_ms"] > 0
        assert row["peak_mib"] is None
    # 60 pixels x 4 routes x 16 channels, 9 operations a state and 2 for the skip; backward counts three times as much
    assert rows[0]["fwd_tflop_s"] * rows[0]["fwd_ms"] == pytest.approx(60 * 4 * 16 * 11 / 1e9)
    assert rows[0]["fb_tflop_s"] * rows[0]["fb_ms"] == pytest.approx(4 * 60 * 4 * 16 * 11 / 1e9)
    first, *rest = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in first and "copy 3 TB/s" in first and "exp2 4.13e+12 /s" in first
    assert any(
        "peer mamba_ssm skipped: mamba_ssm.ops.selective_scan_interface is not importable" in line for line in rest
    )
    assert any("peer torch_path skipped: it is what ours runs on this device" in line for line in rest)


def test_ceilings_are_measured() -> None:
    found = measure.ceilings(CPU)
    assert 1e8 < found.copy < 1e13 and 1e8 < found.matmul < 1e15
    assert found.exp2 is not None and 1e7 < found.exp2 < 1e14


def test_peers_are_compared_with_ours(quick: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    twin = System("twin", lambda case, tensors: SCAN.ours.call(case, tensors))
    absent = System("absent", SCAN.ours.call, why_not=lambda device: "absent is not importable")
    rows = _run_scan(quick, replace(SCAN, peers=(twin, absent)), dtype="bfloat16")
    assert [row["system"] for row in rows] == ["ours", "twin"]
    assert rows[1]["fb_vs_ours"] == pytest.approx(rows[1]["fb_ms"] / rows[0]["fb_ms"])
    assert rows[0]["fb_vs_ours"] is None
    assert "peer absent skipped: absent is not importable" in capsys.readouterr().out
    assert [row["system"] for row in _run_scan(quick, replace(SCAN, peers=(twin,)), peers=())] == ["ours"]
    assert "peer twin skipped: not asked for" in capsys.readouterr().out


def test_compiled_mode(quick: dict[str, Any]) -> None:
    rows = _run_scan(quick, modes=("eager", "compiled"))
    assert [(row["mode"], row["status"]) for row in rows] == [("eager", "ok"), ("compiled", "ok")]


@pytest.mark.parametrize("gpu, expected", [("that very GPU", ["ours", "official"]), ("another GPU", ["ours"])])
def test_recorded_figures_appear_on_the_same_gpu_only(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, gpu: str, expected: list[str]
) -> None:
    facts = measure.environment(CPU)
    monkeypatch.setattr(measure, "environment", lambda device: facts | {"device": gpu})
    entry = replace(SCAN, recorded=lambda case: Recorded("that very GPU", "official", 2.0, 6.0, None))
    rows = _run_scan(quick, entry, dtype="bfloat16")
    assert [row["system"] for row in rows] == expected
    if len(rows) == 2:
        assert rows[1]["status"] == "recorded"
        assert rows[1]["fwd_vs_ours"] == pytest.approx(2.0 / rows[0]["fwd_ms"])


def test_cases_that_run_by_default() -> None:
    on_gpu = ops.select_cases(SCAN, OpsOptions(), torch.device("cuda"))
    assert on_gpu == list(SCAN.cases)
    on_cpu = ops.select_cases(SCAN, OpsOptions(), CPU)
    assert {case.shape[0] for case in on_cpu} == {1} and len(set(on_cpu)) == len(on_cpu) < len(on_gpu)
    asked = ops.select_cases(SCAN, OpsOptions(variants=("low-rank-n16",), shapes=(TINY,)), CPU)
    assert asked == [Case((3, 16, 4, 5), "low-rank-n16")]
    assert len(ops.select_cases(SCAN, OpsOptions(variants=("low-rank-n1",)), torch.device("cuda"))) > 1


def test_time_limit_starts_nothing_more(quick: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert _run_scan(quick, time_limit=0.0) == []
    assert f"time limit reached, 1 not run: selective_scan core-n1 {TINY}" in capsys.readouterr().out


def test_plain_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report.print_table(["a", "empty", "b"], [{"a": 1.23456, "b": "x"}, {"a": None, "b": "yy"}])
    assert capsys.readouterr().out.splitlines()[:3] == ["   a   b", "1.23   x", "   -  yy"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ops": ("selective_skan",)}, "unknown op 'selective_skan'.*selective_scan"),
        ({"variants": ("core-n7",)}, "unknown variant of selective_scan 'core-n7'.*core-n1"),
        ({"peers": ("mamba",)}, "unknown peer 'mamba'.*mamba_ssm"),
        ({"shapes": ("3x16x4",)}, "'3x16x4' does not read as BxExHxW"),
        ({"shapes": ("3x0x4x4",)}, "'3x0x4x4' does not read as BxExHxW"),
    ],
)
def test_unknown_names_are_errors(quick: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.run(OpsOptions(**{"ops": ("selective_scan",), **quick, **options}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA GPU"):
        benchmark.run(OpsOptions(device="cuda"))


# The gate --------------------------------------------------------------------------------------------------------


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.02


def _poison_one_image(y: Tensor) -> Tensor:
    """NaN in an image whose values the reference does not have."""
    mask = torch.zeros_like(y)
    mask[1, 0, 0, 0] = float("nan")
    return y + mask


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "output": lambda y: y * 1.02,
    "gradient": _WrongGradient.apply,
    "nan": lambda y: y * float("nan"),
    "nan elsewhere": _poison_one_image,
    "shape": lambda y: y.flatten(1, 2),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_systems_get_no_time(
    quick: dict[str, Any], capsys: pytest.CaptureFixture[str], spoil: Callable[[Tensor], Tensor], dtype: str
) -> None:
    def wrong(case: Case, tensors: Tensors) -> Tensor:
        return spoil(SCAN.ours.call(case, tensors))

    entry = replace(SCAN, ours=System("ours", wrong), peers=(System("right", SCAN.ours.call),))
    ours, right = _run_scan(quick, entry, shapes=("5x16x4x5",), dtype=dtype)
    assert ours["status"].startswith("FAIL")
    assert all(ours[column] is None for column in ("fwd_ms", "fb_ms", "fwd_floor_x", "fb_tflop_s", "peak_mib"))
    assert right["status"] == "ok" and right["fwd_ms"] > 0 and right["fwd_vs_ours"] is None
    printed = capsys.readouterr().out
    assert "FAIL" in printed and "1 of 2 rows FAIL" in printed


def test_a_system_that_raises_does_not_end_the_run(quick: dict[str, Any]) -> None:
    def broken(case: Case, tensors: Tensors) -> Tensor:
        raise RuntimeError("no kernel image\nis available")

    rows = _run_scan(quick, replace(SCAN, peers=(System("broken", broken),)))
    assert [row["status"] for row in rows] == ["ok", "FAIL: RuntimeError: no kernel image"]
    reference = _run_scan(quick, replace(SCAN, reference=broken))
    assert [(row["system"], row["status"]) for row in reference] == [
        ("reference", "FAIL: RuntimeError: no kernel image")
    ]


def test_relative_error() -> None:
    want = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert gate.relative_error(want + torch.tensor([0.0, 0.5]), want) == pytest.approx(0.1)
    assert gate.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert gate.relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert not gate.relative_error(torch.full((2,), float("nan")), torch.zeros(2)) < 1e9
    assert not gate.Verdict(float("nan"), "y", 1e9, 0.0).ok


def _scan_sequences(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    """Mamba's scan of (B, K*E, L) step by step, as the peers' kernels define it."""
    per_group = u.shape[1] // b.shape[1]
    b, c = b.repeat_interleave(per_group, 1), c.repeat_interleave(per_group, 1)
    step = torch.nn.functional.softplus(dt + bias[:, None])
    state = u.new_zeros(*u.shape[:2], a.shape[1])
    out = []
    for t in range(u.shape[2]):
        now = step[..., t, None]
        state = torch.exp(now * a) * state + now * b[..., t] * u[..., t, None]
        out.append((state * c[..., t]).sum(-1) + d * u[..., t])
    return torch.stack(out, -1)


def _oflex_backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, grad, _, softplus, rows = args
    assert grad.is_contiguous() and softplus is True and rows == 1
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(_scan_sequences(*leaves), leaves, grad)


@pytest.mark.parametrize("variant", SCAN.variants)
@pytest.mark.parametrize("name", ["mamba_ssm", "vmamba_oflex"])
def test_peers_that_scan_sequences_compute_the_same(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, variant: str
) -> None:
    mamba = SimpleNamespace(
        selective_scan_fn=lambda u, dt, a, b, c, d, *, delta_bias, delta_softplus: _scan_sequences(
            u, dt, a, b, c, d, delta_bias
        )
    )
    oflex = SimpleNamespace(
        fwd=lambda *args: (_scan_sequences(*args[:7]), torch.empty(0)),
        bwd=_oflex_backward,
    )
    for path, module in (("mamba_ssm", SimpleNamespace()), ("mamba_ssm.ops", SimpleNamespace())):
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", mamba)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda_oflex", oflex)
    peer = next(peer for peer in SCAN.peers if peer.name == name)
    assert peer.why_not(CPU) is not None and "needs a GPU" in str(peer.why_not(CPU))
    rows = _run_scan(quick, replace(SCAN, peers=(replace(peer, why_not=lambda device: None),)), variants=(variant,))
    assert [(row["system"], row["status"]) for row in rows] == [("ours", "ok"), (name, "ok")]


@pytest.mark.parametrize("variant", WINDOW.variants)
def test_peers_that_copy_windows_compute_the_same(quick: dict[str, Any], variant: str) -> None:
    options = OpsOptions(**{"shapes": ("2x8x15x2x8",), "variants": (variant,), **quick})
    rows = ops.run(options, {WINDOW.name: WINDOW})
    assert {row["system"]: row["status"] for row in rows} == dict.fromkeys(("ours", "timm_eager", "sdpa"), "ok")


@pytest.mark.parametrize("variant", DEPTHWISE.variants)
def test_convolutions_of_peers_compute_the_same(quick: dict[str, Any], variant: str) -> None:
    shape = "2x1x9x6" if variant.startswith("causal") else "2x5x9x6"
    rows = ops.run(OpsOptions(**{"shapes": (shape,), "variants": (variant,), **quick}), {DEPTHWISE.name: DEPTHWISE})
    assert {row["system"]: row["status"] for row in rows if row["system"] != "conv2d_search"} == {
        "ours": "ok",
        "conv2d": "ok",
    }


def test_floor_of_a_depthwise_convolution() -> None:
    cost = DEPTHWISE.cost(Case((128, 56, 56, 96), "3x3-silu"), 2)
    row = ops.floors(cost, Ceilings(copy=3.0e12, matmul=7.5e14, exp2=4.13e12))
    # 38.5 M numbers of 2 bytes, read and written; the gradients read two of them and write one
    assert row["fwd_floor_ms"] == pytest.approx(0.0514, abs=1e-4)
    assert row["fb_floor_ms"] == pytest.approx(0.1285, abs=1e-4)


def test_peer_that_gathers_regions_computes_the_same(quick: dict[str, Any]) -> None:
    options = OpsOptions(**{"shapes": ("2x9x10x2x8x3x4",), **quick})
    rows = ops.run(options, {REGION.name: REGION})
    assert {row["system"]: row["status"] for row in rows} == dict.fromkeys(("ours", "gathered_sdpa"), "ok")
    tensors = {name: torch.zeros(1, 1, 1, 1, 1).expand(2, 4096, 4096, 2, 16) for name in "qkv"}
    peer = next(peer for peer in REGION.peers if peer.name == "gathered_sdpa")
    with pytest.raises(ValueError, match="68719476736 bytes of gathered keys"):
        peer.call(Case((2, 4096, 4096, 2, 16, 16, 8), "plain"), tensors)


def test_region_attention_floor() -> None:
    """q, k, v and o of 25.7 M numbers in bfloat16 and 3.2 MB of lse at 3.0 TB/s; figures by hand."""
    cost = REGION.cost(Case((128, 56, 56, 2, 32, 7, 1), "plain"), 2)
    floor = ops.floors(cost, Ceilings(copy=3.0e12, matmul=7.5e14, exp2=4.13e12))
    assert floor["fwd_floor_ms"] == pytest.approx(0.0696, rel=2e-3)
    assert floor["fb_floor_ms"] == pytest.approx(0.2076, rel=2e-3)
    assert floor["fwd_exp_floor_ms"] == pytest.approx(0.01244, rel=2e-3)  # 64 keys a query


def test_command_line_has_both_benchmarks() -> None:
    tyro = pytest.importorskip("tyro", reason="needs tyro for the command line")
    found = tyro.cli(benchmark.Options, args=["ops", "--shapes", TINY, "2x8x3x3", "--peers", "--dtype", "float16"])
    assert found == OpsOptions(shapes=(TINY, "2x8x3x3"), peers=(), dtype="float16")
    found = tyro.cli(benchmark.Options, args=["models", "--resolutions", "224", "--no-core-off", "--output", "out"])
    assert found == ModelsOptions(resolutions=(224,), core_off=False, output=Path("out"))


@pytest.mark.parametrize("variant", GATED.variants)
def test_gated_attention_row(variant: str, quick: dict[str, Any]) -> None:
    options = OpsOptions(ops=(GATED.name,), shapes=("2x40x2x16x32",), variants=(variant,), **quick)
    (row,) = ops.run(options)
    assert row["status"] == "ok" and row["backend"] == "torch" and row["error"] < 1e-5


def test_gated_attention_floors_are_the_documented_traffic() -> None:
    """4 K + 2 V numbers a token and head forwards; 8 K + 3 V more for the gradients."""
    cost = GATED.cost(Case((128, 196, 3, 32, 64), "logits"), 2)
    tokens = 128 * 196 * 3
    assert cost.forward_bytes == tokens * (4 * 32 + 2 * 64) * 2
    assert cost.both_bytes == cost.forward_bytes + tokens * (8 * 32 + 3 * 64) * 2
    assert GATED.cost(Case((128, 196, 3, 32, 64), "decays"), 2).forward_bytes == tokens * (256 * 2 + 64 * 2)


def test_flipped_peer_computes_what_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for flash-linear-attention's kernel: our op with the other direction switched off."""

    def one_way(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, None]:
        both = gated_linear_attention(q, k, v, torch.stack([g, torch.full_like(g, -1e4)], dim=2))
        return 2 * both - q.shape[-1] ** -0.5 * (q * k).sum(-1, keepdim=True) * v, None

    monkeypatch.setitem(sys.modules, "fla.ops.gla", SimpleNamespace(chunk_gla=one_way))
    peer = next(peer for peer in GATED.peers if peer.name == "fla_chunk_gla")
    for variant in GATED.variants:
        case = Case((2, 20, 2, 4, 6), variant)
        tensors = GATED.inputs(case, torch.float32, CPU).all()
        torch.testing.assert_close(peer.call(case, tensors), GATED.ours.call(case, tensors))


# Linear attention ------------------------------------------------------------------------------------------------


def test_linear_attention_beside_plain_pytorch(quick: dict[str, Any]) -> None:
    """Every form of the entry passes the gate, and so does the peer that computes it step by step."""
    options = OpsOptions(**quick, ops=("linear_attention",), shapes=("2x9x2x8",))
    entry = ops.OPS["linear_attention"]
    forms = replace(entry, cases=tuple(Case((2, 9, 2, 8), variant) for variant in entry.variants))
    rows = ops.run(options, {entry.name: forms})
    assert [(row["variant"], row["system"]) for row in rows] == [
        (variant, system) for variant in entry.variants for system in ("ours", "eager")
    ]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(0 < row["error"] < 1e-5 for row in rows)


def test_linear_attention_floor() -> None:
    """1.6 M rows in bfloat16 at 3.02 TB/s: 4 tensors forward, 7 more backward; figures by hand."""
    for dim, forward, both in ((32, 0.136, 0.374), (64, 0.272, 0.749)):
        case = Case((128, 3136, 4, dim), "divide")
        floor = ops.floors(
            ops.OPS["linear_attention"].cost(case, 2), Ceilings(copy=3.02e12, matmul=7.5e14, exp2=4.13e12)
        )
        assert floor["fwd_memory_floor_ms"] == pytest.approx(forward, rel=2e-3)
        assert floor["fb_memory_floor_ms"] == pytest.approx(both, rel=2e-3)


# Neighborhood attention ------------------------------------------------------------------------------------------


def test_neighborhood_attention_beside_dense_attention(quick: dict[str, Any]) -> None:
    """Both forms pass the gate, and so does dense attention with the windows as a mask; a huge mask is not tried."""
    options = OpsOptions(**quick, shapes=("2x2x9x8x8x3x2",), variants=("plain", "bias"))
    rows = ops.run(options, {NEIGHBORHOOD.name: NEIGHBORHOOD})
    assert [(row["variant"], row["system"]) for row in rows] == [
        (variant, system) for variant in ("plain", "bias") for system in ("ours", "dense_sdpa")
    ]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(0 < row["error"] < 1e-5 for row in rows)
    large = Case((1, 1, 65, 64, 8, 3, 1), "plain")
    tensors = {name: torch.zeros(1, 1, 65 * 64, 8) for name in "qkv"}
    peer = next(peer for peer in NEIGHBORHOOD.peers if peer.name == "dense_sdpa")
    with pytest.raises(ValueError, match="a mask of 4160 x 4160 tokens"):
        peer.call(large, tensors)


def test_neighborhood_attention_without_peers(quick: dict[str, Any]) -> None:
    """Additional keys and volumes: ours passes the gate, and peers that are not set up for them say so."""
    options = OpsOptions(**quick, shapes=("2x2x6x5x8x3x1",), variants=("extra", "volume"))
    rows = ops.run(options, {NEIGHBORHOOD.name: NEIGHBORHOOD})
    assert [(row["variant"], row["system"]) for row in rows] == [
        (variant, system) for variant in ("extra", "volume") for system in ("ours", "dense_sdpa")
    ]
    ours, peers = rows[::2], rows[1::2]
    assert {row["status"] for row in ours} == {"ok"} and all(0 < row["error"] < 1e-5 for row in ours)
    assert all(f"variants plain, bias, not for {row['variant']}" in row["status"] for row in peers)
    # 2 images, 2 heads; of 8 channels 4 operations each and pair: windows of 9 keys and 16 more, windows of 27 keys
    for row, pairs in zip(ours, (30 * (9 + 16), 180 * 27), strict=True):
        assert row["fwd_tflop_s"] * row["fwd_ms"] == pytest.approx(4 * pairs * 8 * 4 / 1e9)


@pytest.mark.parametrize("name", ["flex_rows", "flex_tiles"])
@pytest.mark.parametrize("variant", ["plain", "bias"])
def test_flex_peers_compute_what_ours_does(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, forward only: what a CPU can do."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = Case((1, 2, 19, 18, 16, 5, 3), variant)
    tensors = NEIGHBORHOOD.inputs(case, torch.float32, CPU).all()
    peer = next(peer for peer in NEIGHBORHOOD.peers if peer.name == name)
    native = {key: peer.to_native(case, key, value) for key, value in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that it was not compiled
        y = peer.call(case, native)
    torch.testing.assert_close(
        peer.from_native(case, "y", y), NEIGHBORHOOD.ours.call(case, tensors), rtol=1e-4, atol=1e-5
    )


def test_neighborhood_attention_floor() -> None:
    """q, k, v and o of 25.7 M numbers in bfloat16 at 3.0 TB/s, three times that with the gradients; figures by hand."""
    cost = NEIGHBORHOOD.cost(Case((128, 2, 56, 56, 32, 7, 1), "plain"), 2)
    floor = ops.floors(cost, Ceilings(copy=3.0e12, matmul=7.5e14, exp2=4.13e12))
    assert floor["fwd_floor_ms"] == pytest.approx(0.0685, rel=2e-3)
    assert floor["fb_floor_ms"] == pytest.approx(0.2055, rel=2e-3)
    assert floor["fwd_exp_floor_ms"] == pytest.approx(0.00952, rel=2e-3)
