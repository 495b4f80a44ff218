"""Benchmark of whole models: throughput, memory and latency beside timm's, over resolutions, in one process."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subquad.ops import use_backend
from subquad.tools.benchmarks import gate, measure, recorded, report
from subquad.tools.benchmarks.measure import Budget, Deadline
from subquad.tools.benchmarks.ops import Mode, failure, head, pick_device, pick_dtype
from subquad.tools.benchmarks.registry import Tensors, select
from subquad.tools.benchmarks.systems import PEERS, TOP1, ModelSystem, core_off, our_models, ours

COLUMNS = (
    *("model", "resolution", "batch", "mode", "dtype", "params_m", "top1", "status"),
    *("error", "error_floor", "amp_error"),
    *("infer_img_s", "infer_ms", "infer_vs_ours", "train_img_s", "train_ms", "train_vs_ours", "peak_mib"),
    *("infer_graph_img_s", "train_graph_img_s", "graph_failure"),
    *("infer_cudnn_search", "train_cudnn_search", "first_infer_s", "first_train_s"),
)
SHOWN = tuple(column for column in COLUMNS if column not in ("dtype", "params_m", "infer_ms", "train_ms"))
ANNOUNCED = (
    *("model", "resolution", "batch", "mode", "status", "infer_img_s", "infer_graph_img_s"),
    *("train_img_s", "train_graph_img_s", "peak_mib", "graph_failure"),
)
LEGEND = (
    "infer: eval, inference mode; train: forward, cross entropy, backward, AdamW; vs_ours: time / our time in the same "
    "mode (above 1: ours is faster); error: worst relative L2 error of logits and gradients, float32 against float64; "
    "error_floor: that of plain PyTorch in float32, measured where error is above 1e-4; the limit of gradients is then "
    "3 times it, at most 0.01 (activations within rounding of a ReLU's kink make gradients jump, whatever computes "
    "them); amp_error: of the logits in the timed precision; cudnn_search: the better setting of cudnn.benchmark; "
    "first_*: first call, with compilation; peak_mib: of a training step, beyond weights, optimizer states and images; "
    "graph_img_s: replayed as a CUDA graph, so without the host's time; graph_failure: why there is no such figure."
)
_SWEEP = (224, 384, 512, 768, 1024, 1536, 2048)
_FLOOR_FACTOR = 3  # two results of the same precision differ in their luck
_WORST_FLOOR = 1e-2  # what is further off is wrong, whoever else is
_OTHER = 1e-6  # relative difference from which on a result is that of another computation
_AMP_TOLERANCE = 0.1  # of a whole network: many layers of 16-bit rounding, but not a wrong kernel


@dataclass
class ModelsOptions:
    """Time whole models beside timm's; a model of ours that is not correct gets no time.

    Attributes:
        models: our models, names or patterns.
        peers: names or patterns; none with an empty list.
        resolutions: sides of square images; 224 to 2048 on a GPU and 224 on a CPU by default.
        batch: images up to 224 px (128 on a GPU, 4 on a CPU by default); above, the power of two for as many pixels.
        modes: as built, or through torch.compile.
        dtype: of autocast (float32: none); bfloat16 on a GPU and float32 on a CPU by default.
        core_off: also run our models with their op handed through, eager.
        latency: also time batch 1 at the first resolution, eager and as a CUDA graph.
        train: also time training steps.
        graphs: also time everything as CUDA graphs, which is the GPU's own time (on a GPU only).
        device: ``cuda`` or ``cpu``; the GPU if there is one by default.
        milliseconds: time to spend on a figure.
        repeats: fewest calls for a figure.
        time_limit: seconds after which no new row starts.
        output: folder for models.csv, models.json and plots; ``runs/benchmark-models-<date>`` by default.
    """

    models: tuple[str, ...] = ("vmamba_tiny",)
    peers: tuple[str, ...] = ("*",)
    resolutions: tuple[int, ...] = ()
    batch: int | None = None
    modes: tuple[Mode, ...] = ("eager", "compiled")
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    core_off: bool = True
    latency: bool = True
    train: bool = True
    graphs: bool = True
    device: Literal["cuda", "cpu"] | None = None
    milliseconds: float = 500
    repeats: int = 10
    time_limit: float | None = None
    output: Path | None = None


class Job(NamedTuple):
    """One row to measure."""

    system: ModelSystem
    resolution: int
    batch: int
    mode: str
    train: bool

    def __str__(self) -> str:
        return f"{self.system.name} {self.resolution} px x {self.batch} {self.mode}"


class Setting(NamedTuple):
    """What all rows of a run share."""

    device: torch.device
    dtype: torch.dtype
    budget: Budget
    graphs: bool


def run(options: ModelsOptions) -> list[report.Row]:
    """Run the benchmark; the rows are also in the output folder.

    Raises:
        ValueError: for a model or peer that does not exist, or a size that is not positive.
    """
    device = pick_device(options.device)
    jobs = plan(options, device)
    dtype = pick_dtype(options.dtype, device)
    environment, _ = head(device)
    environment["options"] = repr(options)
    output = options.output or report.default_output("models")
    results = report.Report(output, "models", environment, columns=COLUMNS, shown=SHOWN, announced=ANNOUNCED)
    budget = Budget(options.milliseconds, options.repeats)
    setting = Setting(device, dtype, budget, options.graphs and device.type == "cuda")
    deadline = Deadline(options.time_limit)
    skipped = []
    for job in jobs:
        if deadline.passed():
            skipped.append(str(job))
            continue
        for row in (_run_job(job, setting), *_recorded(job, environment["device"], dtype)):
            results.add(_compared(row, results.rows))
    results.close(skipped, LEGEND)
    for work in ("infer", "train") if options.train else ("infer",):
        _plot(results, work)
    return results.rows


def plan(options: ModelsOptions, device: torch.device) -> list[Job]:
    """All rows, those first that cost least: eager, then batch 1, then compiled.

    Raises:
        ValueError: as ``run``.
    """
    gpu = device.type == "cuda"
    batch_at_224 = options.batch if options.batch is not None else 128 if gpu else 4
    resolutions = options.resolutions or (_SWEEP if gpu else _SWEEP[:1])
    if min(batch_at_224, *resolutions) < 1:
        raise ValueError(f"batch and resolutions must be positive, got {batch_at_224} and {resolutions}")
    mine = [ours(name) for name in select("model", options.models, our_models())]
    chosen = select("peer", options.peers, tuple(peer.name for peer in PEERS))
    peers = [peer for peer in PEERS if peer.name in chosen]
    jobs = []
    for mode in options.modes:
        off = [core_off(system.name) for system in mine] if options.core_off and mode == "eager" else []
        for resolution in resolutions:
            batch = constant_pixels(batch_at_224, resolution)
            jobs += [Job(system, resolution, batch, mode, options.train) for system in (*mine, *off, *peers)]
    if options.latency:
        single = [
            Job(system, resolutions[0], 1, mode, False)
            for mode in ("eager", "cuda graph")
            for system in (*mine, *peers)
        ]
        after = sum(job.mode == "eager" for job in jobs)
        jobs[after:after] = single
    return jobs


def constant_pixels(batch: int, resolution: int) -> int:
    """Batch for a resolution: ``batch`` up to 224, above it the nearest power of two for as many pixels."""
    if resolution <= 224:
        return batch
    return int(2 ** max(0, round(math.log2(batch * (224 / resolution) ** 2))))


class _Work:
    """What is timed: inference and a training step of a model on one batch of random images."""

    def __init__(self, model: nn.Module, job: Job, setting: Setting) -> None:
        self.job = job
        self.setting = setting
        self._call = torch.compile(model, dynamic=False) if job.mode == "compiled" else model
        size = (job.batch, 3, job.resolution, job.resolution)
        self.images = torch.randn(size, device=setting.device).contiguous(memory_format=job.system.memory_format)
        self._labels = torch.randint(cast(int, model.num_classes), (job.batch,), device=setting.device)
        self._parameters = list(model.parameters())
        self._optimizer = self._adamw()

    def infer(self) -> Tensor:
        with _inference(self.setting):
            return self._call(self.images)

    def step(self) -> Tensor:
        return self._step(self._optimizer)

    def capturable_step(self) -> Callable[[], Tensor]:
        """A training step for a CUDA graph, with an optimizer of its own: the eager one stays as it is."""
        optimizer = self._adamw(capturable=True)
        # Casts of weights must not outlive the capture. Another setting would compile a compiled model again; there
        # they do not either, as the whole of the context is captured.
        cache = self.job.mode == "compiled"
        return lambda: self._step(optimizer, cache_enabled=cache)

    def _adamw(self, *, capturable: bool = False) -> torch.optim.AdamW:
        return torch.optim.AdamW(self._parameters, lr=1e-4, weight_decay=0.05, fused=True, capturable=capturable)

    def _step(self, optimizer: torch.optim.AdamW, *, cache_enabled: bool = True) -> Tensor:
        amp = self.setting.dtype != torch.float32
        with torch.autocast(self.setting.device.type, self.setting.dtype, enabled=amp, cache_enabled=cache_enabled):
            loss = cross_entropy(self._call(self.images), self._labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # to None: a capture makes gradients of its own
        return loss.detach()


def _run_job(job: Job, setting: Setting) -> report.Row:
    row: report.Row = {"model": job.system.name, "resolution": job.resolution, "batch": job.batch, "mode": job.mode}
    row |= {"dtype": str(setting.dtype).removeprefix("torch."), "top1": TOP1.get(job.system.name)}
    if job.mode == "cuda graph" and setting.device.type != "cuda":
        return row | {"status": "skipped: needs a GPU"}
    try:
        model = job.system.build(job.resolution, setting.device)
        row["params_m"] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        work = _Work(model, job, setting)
        with job.system.context(model):
            first = _first_calls(model, work)  # before the gate, which would compile the kernels
            wrong = _gate(model, job, setting, row) if job.system.ours else None
            if wrong is not None:
                return row | {"status": f"FAIL: {wrong}"}
            return row | first | _times(model, work)
    except Exception as error:  # one model that breaks must not cost the rows of the others
        return row | {"status": failure(error)}
    finally:
        torch.compiler.reset()
        torch.cuda.empty_cache()


def _first_calls(model: nn.Module, work: _Work) -> report.Row:
    """Seconds to the first result: in a fresh process with empty caches, the cold start."""
    model.eval()
    row: report.Row = {"first_infer_s": measure.seconds(work.infer, work.setting.device)}
    if work.job.train:
        model.train()
        row["first_train_s"] = measure.seconds(work.step, work.setting.device)
    return row


def _gate(model: nn.Module, job: Job, setting: Setting, row: report.Row) -> str | None:
    """Compare the model with itself in float64 on the PyTorch path; returns what is wrong, or None."""
    images = torch.randn(min(job.batch, 2 if job.resolution <= 512 else 1), 3, job.resolution, job.resolution)
    images = images.to(setting.device)
    model.eval()
    exact = copy.deepcopy(model).double()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        have = _logits_and_gradients(model, images)
        with use_backend("torch"):
            want = _logits_and_gradients(exact, images.double())
            errors = {name: gate.relative_error(have[name], want[name]) for name in want}
            limits = dict.fromkeys(errors, gate.TOLERANCES[torch.float32])
            floors = {}
            if not all(errors[name] < limits[name] for name in errors):
                floors = _noise_floors(_logits_and_gradients(model, images), have, want)
                limits |= {
                    name: min(max(limits[name], _FLOOR_FACTOR * floor), _WORST_FLOOR) for name, floor in floors.items()
                }
    wrong = [name for name in errors if not errors[name] < limits[name]]
    worst = max(wrong or errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    row["error"], row["error_floor"] = errors[worst], floors.get(worst)
    if wrong:
        floor = f" (noise floor {floors[worst]:.2g})" if worst in floors else ""
        return f"relative error {errors[worst]:.2g} of {worst} in float32, limit {limits[worst]:.2g}{floor}"
    with _inference(setting):
        row["amp_error"] = gate.relative_error(model(images), want["logits"])
    if not row["amp_error"] < _AMP_TOLERANCE:
        return f"relative error {row['amp_error']:.2g} of logits in {row['dtype']}, limit {_AMP_TOLERANCE:g}"
    return None


def _noise_floors(plain: Tensors, have: Tensors, want: Tensors) -> dict[str, float]:
    """The errors of the PyTorch path's gradients in the model's precision, which are those of any computation in it.

    A gradient jumps where an activation lies within rounding of 0 in front of a ReLU; logits do not. What is equal but
    for rounding is no other computation, and excuses nothing.
    """
    names = [name for name in want if name != "logits" and gate.relative_error(plain[name], have[name]) > _OTHER]
    return {name: gate.relative_error(plain[name], want[name]) for name in names}


def _logits_and_gradients(model: nn.Module, images: Tensor) -> Tensors:
    images = images.clone().requires_grad_()
    logits = model(images)
    # A smooth function whose gradient depends on every logit.
    grads = torch.autograd.grad(logits.square().sum(), [images, *model.parameters()])
    parameters = torch.cat([grad.flatten() for grad in grads[1:]])
    return {"logits": logits.detach(), "d images": grads[0], "d parameters": parameters}


def _times(model: nn.Module, work: _Work) -> report.Row:
    setting, job = work.setting, work.job
    model.eval()
    logits = work.infer()
    if not torch.isfinite(logits).all():
        return {"status": "FAIL: logits are not finite"}
    if job.mode == "compiled":
        with _inference(setting):
            difference = gate.relative_error(logits, model(work.images))
        if not difference < _AMP_TOLERANCE:
            return {"status": f"FAIL: compiled logits differ by {difference:.2g} from eager, limit {_AMP_TOLERANCE:g}"}
    row: report.Row = {}
    row["infer_ms"], row["infer_cudnn_search"] = _better_setting(
        lambda: measure.graphed(work.infer) if job.mode == "cuda graph" else work.infer, setting
    )
    row["infer_img_s"] = job.batch / row["infer_ms"] * 1e3
    if setting.graphs and job.mode != "cuda graph":
        _add_graph_rate(row, "infer", work.infer, work)
    if not job.train:
        return row | {"status": "ok"}
    model.train()
    row["peak_mib"] = measure.peak_mib(work.step, setting.device)
    row["train_ms"], row["train_cudnn_search"] = _better_setting(lambda: work.step, setting)
    row["train_img_s"] = job.batch / row["train_ms"] * 1e3
    if setting.graphs:
        _add_graph_rate(row, "train", work.capturable_step(), work)
    if not torch.isfinite(work.step()):  # last, so that a loss that has become NaN takes the figures back
        return {"status": "FAIL: the loss is not finite"}
    return row | {"status": "ok"}


@contextmanager
def _inference(setting: Setting) -> Iterator[None]:
    # Without the cache of cast weights, which must not outlive the capture of a CUDA graph.
    amp = setting.dtype != torch.float32
    with torch.inference_mode(), torch.autocast(setting.device.type, setting.dtype, enabled=amp, cache_enabled=False):
        yield


def _better_setting(make: Callable[[], Callable[[], object]], setting: Setting) -> tuple[float, bool | None]:
    """Milliseconds with the better setting of ``cudnn.benchmark``, and that setting (None on a CPU)."""
    if setting.device.type != "cuda":
        return measure.median_ms(make(), setting.device, setting.budget), None
    found = {}
    for search in (False, True):
        with torch.backends.cudnn.flags(enabled=True, benchmark=search):
            found[search] = measure.median_ms(make(), setting.device, setting.budget)
    best = min(found, key=lambda search: found[search])
    return found[best], best


def _add_graph_rate(row: report.Row, name: str, function: Callable[[], object], work: _Work) -> None:
    """Add images a second of a call replayed as a CUDA graph, or why it cannot be captured."""
    setting = work.setting
    try:
        better = torch.backends.cudnn.flags(enabled=True, benchmark=row[f"{name}_cudnn_search"])
        with better, warnings.catch_warnings():
            # Before a capture the call must run without one, which is what the warning complains of.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            milliseconds = measure.median_ms(measure.graphed(function), setting.device, setting.budget)
        row[f"{name}_graph_img_s"] = work.job.batch / milliseconds * 1e3
    except Exception as error:  # the figures without graphs stay
        reason = f"{name}: {failure(error).removeprefix('FAIL: ')}"
        row["graph_failure"] = f"{row['graph_failure']}; {reason}" if "graph_failure" in row else reason
    finally:
        gc.collect()  # the frames of an error
        torch.cuda.empty_cache()  # the graph's memory


def _recorded(job: Job, gpu: str, dtype: torch.dtype) -> list[report.Row]:
    key = (job.system.name, job.resolution, job.batch)
    if gpu != recorded.GPU or dtype != torch.bfloat16 or job.mode != "eager" or key not in recorded.MODELS:
        return []
    found = recorded.MODELS[key]
    row: report.Row = {"model": found.system, "resolution": job.resolution, "batch": job.batch, "mode": job.mode}
    row |= {"status": "recorded", "dtype": "bfloat16", "peak_mib": found.train_mib}
    row |= {"infer_img_s": found.infer, "infer_ms": job.batch / found.infer * 1e3}
    row |= {"train_img_s": found.train, "train_ms": job.batch / found.train * 1e3}
    return [row]


def _compared(row: report.Row, earlier: list[report.Row]) -> report.Row:
    """Add the ratios to the first of our models that ran in the same setting."""
    same = ("resolution", "batch", "mode")
    mine = our_models()
    first = next((o for o in earlier if o["model"] in mine and all(o[key] == row[key] for key in same)), None)
    for work in ("infer", "train"):
        if first is not None and first.get(f"{work}_ms") is not None and row.get(f"{work}_ms") is not None:
            row[f"{work}_vs_ours"] = row[f"{work}_ms"] / first[f"{work}_ms"]
    return row


def _plot(results: report.Report, work: str) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows:
        if row[f"{work}_img_s"] is not None and row["mode"] in ("eager", "compiled") and row["status"] == "ok":
            name = row["model"] if row["mode"] == "eager" else f"{row['model']}, compiled"
            if row["batch"] > 1 or row["resolution"] > 224:
                curves.setdefault(name, []).append((row["resolution"], row[f"{work}_img_s"]))
    if curves:
        report.plot(results.output / f"{work}.png", curves, "resolution (px)", f"{work}: img/s")
