"""Benchmark of the ops: our op beside its floor and its peers, on the same inputs, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from subquad.tools.benchmarks import (
    depthwise_conv,
    gate,
    gated_linear_attention,
    layer_norm,
    linear_attention,
    measure,
    neighborhood_attention,
    region_attention,
    report,
    selective_scan,
    window_attention,
)
from subquad.tools.benchmarks.measure import Budget, Ceilings, Deadline
from subquad.tools.benchmarks.registry import Case, Cost, Inputs, OpEntry, System, Tensors, select

OPS: dict[str, OpEntry] = {
    entry.name: entry
    for entry in (
        depthwise_conv.ENTRY,
        layer_norm.ENTRY,
        linear_attention.ENTRY,
        gated_linear_attention.ENTRY,
        neighborhood_attention.ENTRY,
        region_attention.ENTRY,
        selective_scan.ENTRY,
        window_attention.ENTRY,
    )
}

Mode = Literal["eager", "compiled"]

COLUMNS = (
    *("op", "variant", "shape", "dtype", "mode", "system", "backend", "status", "error", "error_of", "first_s"),
    *("fwd_ms", "fwd_floor_ms", "fwd_floor_x", "fwd_gb_s", "fwd_tflop_s", "fwd_vs_ours"),
    *("fb_ms", "fb_floor_ms", "fb_floor_x", "fb_gb_s", "fb_tflop_s", "fb_vs_ours", "peak_mib"),
    *("fwd_graph_ms", "fb_graph_ms"),
    *("fwd_memory_floor_ms", "fwd_exp_floor_ms", "fb_memory_floor_ms", "fb_exp_floor_ms"),
)
SHOWN = (
    *("variant", "shape", "mode", "system", "backend", "status", "error", "first_s"),
    *("fwd_ms", "fwd_floor_ms", "fwd_floor_x", "fwd_gb_s", "fwd_tflop_s", "fwd_vs_ours"),
    *("fb_ms", "fb_floor_ms", "fb_floor_x", "fb_gb_s", "fb_tflop_s", "fb_vs_ours", "peak_mib"),
    *("fwd_graph_ms", "fb_graph_ms"),
)
ANNOUNCED = (
    *("variant", "shape", "mode", "system", "status", "fwd_ms", "fwd_floor_x", "fwd_graph_ms"),
    *("fb_ms", "fb_floor_x", "fb_graph_ms"),
)
LEGEND = (
    "fwd: forward; fb: forward + backward to all inputs and parameters; floor: the larger of bytes / copy bandwidth "
    "and exponentials / exp2 rate; floor_x: time / floor; gb_s: unavoidable bytes / time; vs_ours: time / our time in "
    "the same mode (above 1: ours is faster); error: worst relative L2 error of output and gradients; first_s: first "
    "forward + backward, with compilation; peak_mib: of forward + backward, beyond the inputs; graph_ms: replayed as a "
    "CUDA graph, so without the time of the host (blank where the call cannot be captured)."
)


@dataclass
class OpsOptions:
    """Time ops beside their floors and peers; a system that is not correct gets no time.

    Attributes:
        ops: names or patterns; all by default.
        variants: forms of the op, as in ``core-n1``, or patterns; those of the registered cases by default.
        shapes: sizes as in ``128x96x56x56``, along the op's axes; the registered cases by default (batch 1 on a CPU).
        dtype: of the activations; bfloat16 on a GPU and float32 on a CPU by default.
        modes: as given, or through torch.compile.
        peers: names or patterns; none with an empty list.
        device: ``cuda`` or ``cpu``; the GPU if there is one by default.
        milliseconds: time to spend on a figure.
        repeats: fewest calls for a figure.
        time_limit: seconds after which no new row starts.
        output: folder for ops.csv and ops.json; ``runs/benchmark-ops-<date>`` by default.
    """

    ops: tuple[str, ...] = ("*",)
    variants: tuple[str, ...] = ("*",)
    shapes: tuple[str, ...] = ()
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    modes: tuple[Mode, ...] = ("eager",)
    peers: tuple[str, ...] = ("*",)
    device: Literal["cuda", "cpu"] | None = None
    milliseconds: float = 100
    repeats: int = 5
    time_limit: float | None = None
    output: Path | None = None


class Setting(NamedTuple):
    """What all rows of a run share."""

    device: torch.device
    dtype: torch.dtype
    budget: Budget
    ceilings: Ceilings
    gpu: str


def run(options: OpsOptions, registry: Mapping[str, OpEntry] = OPS) -> list[report.Row]:
    """Run the benchmark; the rows are also in the output folder.

    Raises:
        ValueError: for an op, variant, shape or peer that does not exist.
    """
    device = pick_device(options.device)
    plan = [
        (registry[name], case)
        for name in select("op", options.ops, tuple(registry))
        for case in select_cases(registry[name], options, device)
    ]
    peer_names = {peer.name for entry, _ in plan for peer in entry.peers}
    wanted = set(select("peer", options.peers, tuple(sorted(peer_names))))
    environment, ceilings = head(device)
    dtype = pick_dtype(options.dtype, device)
    setting = Setting(device, dtype, Budget(options.milliseconds, options.repeats), ceilings, environment["device"])
    environment["options"] = repr(options)
    output = options.output or report.default_output("ops")
    results = report.Report(output, "ops", environment, columns=COLUMNS, shown=SHOWN, announced=ANNOUNCED)
    deadline = Deadline(options.time_limit)
    skipped: list[str] = []
    peers = {name: _usable_peers(entry, wanted, device) for name, entry in registry.items()}
    for entry, case in plan:
        if deadline.passed():
            skipped.append(f"{entry.name} {case}")
            continue
        skipped += _run_case(entry, peers[entry.name], case, options.modes, setting, results, deadline)
    results.close(skipped, LEGEND)
    return results.rows


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU if there is one.

    Raises:
        ValueError: for a GPU that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA GPU; expected 'cpu'")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or what networks of this library run in on the device."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def head(device: torch.device) -> tuple[dict[str, Any], Ceilings]:
    """Measure the ceilings and print the first line."""
    environment = measure.environment(device)
    ceilings = measure.ceilings(device)
    environment |= {
        "copy_tb_per_s": ceilings.copy / 1e12,
        "matmul_tflop_per_s": ceilings.matmul / 1e12,
        "matmul_dtype": "bf16" if device.type == "cuda" else "fp32",
        "exp2_per_s": ceilings.exp2,
        "command": report.command_line(),
    }
    report.print_head(environment)
    return environment, ceilings


def select_cases(entry: OpEntry, options: OpsOptions, device: torch.device) -> list[Case]:
    """The entry's cases (with one image on a CPU), or those made of the shapes asked for.

    Raises:
        ValueError: for an unknown variant or a shape that does not read as the op's axes.
    """
    given = [_parse_shape(entry, shape) for shape in options.shapes]
    everywhere = [case.shape for case in entry.cases]
    found = []
    for variant in select(f"variant of {entry.name}", options.variants, entry.variants):
        usual = [case.shape for case in entry.cases if case.variant == variant]
        if not usual and options.variants == OpsOptions.variants:
            continue  # a form that runs on request only
        shapes = usual or everywhere
        if device.type == "cpu":
            shapes = [(1, *shape[1:]) for shape in shapes]
        found += [Case(shape, variant) for shape in given or dict.fromkeys(shapes)]
    return found


def _parse_shape(entry: OpEntry, text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) != len(entry.axes.split("x")) or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"{entry.name}: shape {text!r} does not read as {entry.axes} with positive sizes")
    return tuple(int(size) for size in sizes)


def _usable_peers(entry: OpEntry, wanted: set[str], device: torch.device) -> list[System]:
    usable = []
    for peer in entry.peers:
        reason = peer.why_not(device) if peer.name in wanted else "not asked for"
        if reason is None:
            usable.append(peer)
        else:
            print(f"{entry.name}: peer {peer.name} skipped: {reason}", flush=True)
    return usable


def _run_case(
    entry: OpEntry,
    peers: list[System],
    case: Case,
    modes: tuple[Mode, ...],
    setting: Setting,
    results: report.Report,
    deadline: Deadline,
) -> list[str]:
    """Add the rows of one case; returns what the time limit left out."""
    dtype = str(setting.dtype).removeprefix("torch.")
    base = {"op": entry.name, "variant": case.variant, "shape": "x".join(map(str, case.shape)), "dtype": dtype}
    limits = floors(entry.cost(case, setting.dtype.itemsize), setting.ceilings)
    try:
        inputs = entry.inputs(case, setting.dtype, setting.device)
        expected = gate.reference(entry, case, inputs)
    except Exception as error:
        results.add(base | {"system": "reference", "status": failure(error)})
        return []
    skipped = []
    ours: report.Row = {}
    for mode in modes:
        for system in (entry.ours, *peers):
            if system is not entry.ours and deadline.passed():
                skipped.append(f"{entry.name} {case} {mode} {system.name}")
                continue
            row = _measure(entry, system, case, mode, inputs, expected, setting)
            if system is entry.ours:
                ours = row
            results.add(_compared(base | {"mode": mode} | limits | row, ours))
        _add_recorded(entry, case, base | {"mode": mode} | limits, ours, setting, results)
    return skipped


def _measure(
    entry: OpEntry, system: System, case: Case, mode: Mode, inputs: Inputs, expected: gate.Reference, setting: Setting
) -> report.Row:
    row: report.Row = {"system": system.name}
    call = system.call
    if mode == "compiled":
        torch.compiler.reset()
        call = torch.compile(call, dynamic=False)
    try:
        with system.context():
            if system is entry.ours or system.call is entry.ours.call:
                row["backend"] = entry.backend(case, inputs.all())
            verdict = gate.check(system, call, case, inputs, expected, gate.TOLERANCES[setting.dtype])
            row |= {"error": verdict.error, "error_of": verdict.worst, "first_s": verdict.first_s}
            if not verdict.ok:
                return row | {"status": f"FAIL: {verdict}"}
            return row | {"status": "ok"} | _times(entry, system, call, case, inputs, setting)
    except Exception as error:  # one system that breaks must not cost the rows of the others
        return {**row, "status": failure(error)}
    finally:
        torch.cuda.empty_cache()


def failure(error: Exception) -> str:
    """The status of a row whose system raised an error: its kind and first line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"FAIL: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _times(
    entry: OpEntry,
    system: System,
    call: Callable[[Case, Tensors], Tensor],
    case: Case,
    inputs: Inputs,
    setting: Setting,
) -> report.Row:
    native = gate.native_leaves(system, case, inputs)
    with torch.no_grad():
        grad = torch.randn_like(call(case, native))

    def forward() -> Tensor:
        with torch.no_grad():
            return call(case, native)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(case, native), list(native.values()), grad)

    cost = entry.cost(case, setting.dtype.itemsize)
    row: report.Row = {"peak_mib": measure.peak_mib(forward_backward, setting.device)}
    flops = _flops(entry, case, inputs)
    work = (("fwd", forward, cost.forward_bytes, flops[0]), ("fb", forward_backward, cost.both_bytes, flops[1]))
    for name, function, traffic, operations in work:
        milliseconds = measure.median_ms(function, setting.device, setting.budget)
        row[f"{name}_ms"] = milliseconds
        row[f"{name}_gb_s"] = traffic / milliseconds / 1e6
        row[f"{name}_tflop_s"] = operations / milliseconds / 1e9
        if setting.device.type == "cuda":
            row[f"{name}_graph_ms"] = _graph_ms(function, setting)
    return row


def _graph_ms(function: Callable[[], object], setting: Setting) -> float | None:
    """Milliseconds of a call replayed as a CUDA graph; None if it cannot be captured."""
    try:
        return measure.median_ms(measure.graphed(function), setting.device, setting.budget)
    except RuntimeError:
        return None


def _flops(entry: OpEntry, case: Case, inputs: Inputs) -> tuple[int, int]:
    """Operations of a forward pass and of forward + backward by the op's registered formula; computes nothing."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # tables that an entry keeps for a case
    leaves = {name: fake.from_tensor(value.detach()).requires_grad_() for name, value in inputs.all().items()}
    with fake, FlopCounterMode(display=False) as counter:
        y = entry.ours.call(case, leaves)
        forward = counter.get_total_flops()
        torch.autograd.grad(y, list(leaves.values()), torch.empty_like(y))
        return forward, counter.get_total_flops()


def floors(cost: Cost, ceilings: Ceilings) -> report.Row:
    """The times in ms that no implementation beats on a device with these ceilings."""
    row: report.Row = {}
    for name, traffic, exps in (("fwd", *cost[0::2]), ("fb", *cost[1::2])):
        memory = traffic / ceilings.copy * 1e3
        exponentials = None if ceilings.exp2 is None else exps / ceilings.exp2 * 1e3
        row[f"{name}_memory_floor_ms"] = memory
        row[f"{name}_exp_floor_ms"] = exponentials
        row[f"{name}_floor_ms"] = max(memory, exponentials or 0.0)
    return row


def _compared(row: report.Row, ours: report.Row) -> report.Row:
    for name in ("fwd", "fb"):
        if row.get(f"{name}_ms") is None:
            continue
        row[f"{name}_floor_x"] = row[f"{name}_ms"] / row[f"{name}_floor_ms"]
        if ours.get(f"{name}_ms") is not None and row["system"] != ours["system"]:
            row[f"{name}_vs_ours"] = row[f"{name}_ms"] / ours[f"{name}_ms"]
    return row


def _add_recorded(
    entry: OpEntry, case: Case, base: report.Row, ours: report.Row, setting: Setting, results: report.Report
) -> None:
    found = entry.recorded(case)
    if found is None or found.gpu != setting.gpu or setting.dtype != torch.bfloat16:
        return
    row = {"system": found.system, "status": "recorded", "peak_mib": found.peak_mib}
    row |= {"fwd_ms": found.forward_ms, "fb_ms": found.both_ms}
    results.add(_compared(base | row, ours))
