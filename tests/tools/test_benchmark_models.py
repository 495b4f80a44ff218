"""``subquad benchmark models``: the plan, the gate against wrong models, graphs, and what a run leaves."""

from __future__ import annotations

import copy
import csv
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subquad.backbones import layers
from subquad.ops.selective_scan import ScanCall, torch_impl
from subquad.tools import benchmark
from subquad.tools.benchmark import ModelsOptions
from subquad.tools.benchmarks import measure, models, report, systems
from subquad.tools.benchmarks.measure import Budget

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "resolution, batch", [(96, 128), (224, 128), (384, 32), (512, 32), (1024, 8), (2048, 2), (9999, 1)]
)
def test_batch_keeps_the_pixels_constant(resolution: int, batch: int) -> None:
    assert models.constant_pixels(128, resolution) == batch


def _run_models(quick: dict[str, Any], **options: Any) -> list[report.Row]:
    few: dict[str, Any] = {
        "models": ("test_vmamba",),
        "peers": (),
        "resolutions": (32,),
        "batch": 2,
        "modes": ("eager",),
    }
    return benchmark.run(ModelsOptions(**{**quick, **few, **options}))


def test_models_run_leaves_rows_and_plots(quick: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib for the plots")
    rows = _run_models(quick, resolutions=(32, 64))
    found = [(row["model"], row["resolution"], row["batch"], row["mode"], row["status"]) for row in rows]
    assert found == [
        ("test_vmamba", 32, 2, "eager", "ok"),
        ("test_vmamba, core off", 32, 2, "eager", "ok"),
        ("test_vmamba", 64, 2, "eager", "ok"),
        ("test_vmamba, core off", 64, 2, "eager", "ok"),
        ("test_vmamba", 32, 1, "eager", "ok"),
        ("test_vmamba", 32, 1, "cuda graph", "skipped: needs a GPU"),
    ]
    assert 0 < rows[0]["error"] < 1e-4
    assert rows[0]["infer_img_s"] == pytest.approx(2e3 / rows[0]["infer_ms"])
    assert rows[1]["train_vs_ours"] == pytest.approx(rows[1]["train_ms"] / rows[0]["train_ms"])
    assert rows[4]["train_ms"] is None
    for column in ("infer_graph_img_s", "train_graph_img_s", "graph_failure", "error_floor"):
        assert rows[0][column] is None
    with (quick["output"] / "models.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == models.COLUMNS
    for name in ("infer.png", "train.png"):
        assert (quick["output"] / name).read_bytes().startswith(b"\x89PNG")
    assert "copy 3 TB/s" in capsys.readouterr().out.splitlines()[0]


def test_a_wrong_model_gets_no_time(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = torch_impl.forward

    def wrong_in_single_precision(call: ScanCall) -> tuple[Tensor, Tensor, Tensor]:
        y, states, kept = forward(call)
        # y is mostly 4 x at the start, and the norm behind the scan undoes a scale: another error than one of scale
        return (y + call.x.flip(-1) if call.x.dtype == torch.float32 else y), states, kept

    monkeypatch.setattr(torch_impl, "forward", wrong_in_single_precision)
    (row,) = _run_models(quick, core_off=False, latency=False)
    assert row["status"].startswith("FAIL: relative error") and row["error"] > 1e-4
    assert row["infer_ms"] is None and row["train_ms"] is None


def test_core_off_skips_the_op_and_puts_it_back() -> None:
    system = systems.core_off("test_vmamba")
    model = system.build(32, CPU)
    real = layers.selective_scan
    with system.context(model):
        x = torch.randn(1, 2, 2, 3)
        off: Any = layers.selective_scan
        assert off(x, out_dtype=torch.float64).dtype == torch.float64
        assert torch.equal(off(x), x)
        model(torch.randn(1, 3, 32, 32))
    assert layers.selective_scan is real


def test_core_off_skips_neighborhood_attention() -> None:
    """Then pixels of different patches do not meet but through convolutions."""
    system = systems.core_off("test_nat_isotropic")
    model = system.build(96, CPU).eval()
    image = torch.randn(1, 3, 96, 96)
    changed = image.clone()
    changed[..., :16, :16] += 1
    difference = [(model.forward_features(x)[0, 1:]).detach() for x in (image, changed)]
    assert not torch.equal(*difference)
    with system.context(model):
        assert torch.equal(*[(model.forward_features(x)[0, 1:]).detach() for x in (image, changed)])


def test_plan_of_a_sweep() -> None:
    jobs = models.plan(ModelsOptions(peers=("swin*", "resnet50"), resolutions=(224, 1024), batch=128), CPU)
    names = [job.system.name for job in jobs if (job.resolution, job.mode) == (1024, "eager")]
    swin = "swin_tiny_patch4_window7_224"
    assert names == ["vmamba_tiny", "vmamba_tiny, core off", swin, f"{swin}, patched", "resnet50"]
    assert {job.batch for job in jobs if job.resolution == 1024} == {8}
    order = list(dict.fromkeys((job.mode, job.batch == 1) for job in jobs))
    assert order == [("eager", False), ("eager", True), ("cuda graph", True), ("compiled", False)]


def test_peers_are_built_for_the_resolution() -> None:
    for peer in systems.PEERS:
        assert peer.build(96, CPU)(torch.randn(1, 3, 96, 96)).shape == (1, 1000)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"models": ("vmamba_huge",)}, "unknown model 'vmamba_huge', did you mean .*vmamba_base"),
        ({"models": ("resnet50",)}, "unknown model 'resnet50'"),
        ({"peers": ("resnet51",)}, "unknown peer 'resnet51'.*resnet50"),
        ({"resolutions": (224, 0)}, "must be positive"),
    ],
)
def test_unknown_models_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.run(ModelsOptions(**options))


# Graphs ----------------------------------------------------------------------------------------------------------


def _graphs_setting(device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16) -> models.Setting:
    return models.Setting(device, dtype, Budget(1, 1), graphs=True)


def _tiny_job(system: systems.ModelSystem | None = None) -> models.Job:
    return models.Job(system or systems.ours("test_vmamba"), 32, 2, "eager", True)


class _Replay:
    """What the stand-in for a capture returns."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.result = function()

    def __call__(self) -> None:
        """Nothing that takes time."""


def test_graphs_are_timed_beside_the_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for capture and clock: what is captured, when, and that its figures go to columns of their own."""
    replays: list[_Replay] = []
    caches: list[bool] = []
    caught: list[list[bool]] = []

    def graphed(function: Callable[[], object]) -> _Replay:
        caches.clear()
        replays.append(_Replay(function))
        caught.append(list(caches))
        return replays[-1]

    def watched(model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(lambda module, args: caches.append(torch.is_autocast_cache_enabled()))
        return model

    monkeypatch.setattr(measure, "graphed", graphed)
    monkeypatch.setattr(measure, "median_ms", lambda function, *args: 4.0 if isinstance(function, _Replay) else 8.0)
    row = models._run_job(_tiny_job(replace(systems.ours("test_vmamba"), change=watched)), _graphs_setting())
    assert row["status"] == "ok" and "graph_failure" not in row
    assert (row["infer_img_s"], row["train_img_s"]) == (250, 250)
    assert (row["infer_graph_img_s"], row["train_graph_img_s"]) == (500, 500)
    assert set(row) <= set(models.COLUMNS)
    logits, loss = (replay.result for replay in replays)
    assert isinstance(logits, Tensor) and logits.shape == (2, 1000)
    assert isinstance(loss, Tensor) and loss.shape == () and not loss.requires_grad
    assert caught == [[False], [False]]


def test_rows_that_are_graphs_themselves_and_runs_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "graphed", _Replay)
    setting = _graphs_setting()
    for job, chosen in (
        (_tiny_job()._replace(mode="cuda graph"), setting),
        (_tiny_job(), setting._replace(graphs=False)),
    ):
        model = job.system.build(job.resolution, CPU)
        row = models._times(model, models._Work(model, job._replace(train=False), chosen))
        assert row["status"] == "ok" and row["infer_img_s"] > 0 and "infer_graph_img_s" not in row


def test_a_call_that_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def graphed(function: Callable[[], object]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nfor debugging ...")

    monkeypatch.setattr(measure, "graphed", graphed)
    row = models._run_job(_tiny_job(), _graphs_setting())
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert row["graph_failure"] == f"infer: {reason}; train: {reason}"
    assert row["status"] == "ok" and row["infer_img_s"] > 0 and row["train_img_s"] > 0
    assert "infer_graph_img_s" not in row and "train_graph_img_s" not in row


def test_a_captured_step_that_spoils_the_weights_takes_the_figures_back(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []

    def kept(model: nn.Module) -> nn.Module:
        built.append(model)
        return model

    def graphed(function: Callable[[], object]) -> Callable[[], object]:
        result = function()
        if isinstance(result, Tensor) and result.dim() == 0:
            nn.utils.vector_to_parameters(
                torch.full((sum(p.numel() for p in built[0].parameters()),), math.nan), built[0].parameters()
            )
        return lambda: None

    monkeypatch.setattr(measure, "graphed", graphed)
    row = models._run_job(_tiny_job(replace(systems.ours("test_vmamba"), change=kept)), _graphs_setting())
    assert row["status"] == "FAIL: the loss is not finite" and "train_img_s" not in row


def _two_equal_works(setting: models.Setting) -> tuple[models._Work, models._Work]:
    job = _tiny_job()
    model = job.system.build(job.resolution, setting.device).train()
    works = []
    for each in (model, copy.deepcopy(model)):
        torch.manual_seed(0)
        works.append(models._Work(each, job, setting))
    return works[0], works[1]


def test_a_step_for_graphs_is_the_eager_step() -> None:
    eager, other = _two_equal_works(_graphs_setting())
    step = other.capturable_step()
    losses = [(float(eager.step()), float(step())) for _ in range(3)]
    assert all(mine == pytest.approx(want, rel=1e-6) for want, mine in losses)  # the same numbers in the same order
    assert losses[2][0] < losses[1][0] < losses[0][0]


@pytest.mark.gpu
def test_replays_of_a_step_train() -> None:
    """After three calls before the capture, which itself computes nothing, replays are the fourth and fifth step."""
    eager, other = _two_equal_works(_graphs_setting(torch.device("cuda"), torch.float32))
    want = [float(eager.step()) for _ in range(6)]
    found: dict[str, Tensor] = {}
    step = other.capturable_step()
    replay = measure.graphed(lambda: found.update(loss=step()))
    losses = []
    for _ in range(2):
        replay()
        losses.append(float(found["loss"]))
    # A step lowers the loss by 1 %; rounding of gradients near 0 can turn single steps of AdamW around.
    assert losses == pytest.approx(want[3:5], rel=1e-3)
    assert want[3] - want[4] > 3e-3 * want[3]
    assert float(other.step()) < losses[1]  # eager steps go on from there, with an optimizer that has seen none


@pytest.mark.gpu
def test_graphs_of_a_model_that_draws_random_numbers() -> None:
    def with_dropout(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        return model

    system = replace(systems.ours("test_vmamba"), change=with_dropout)
    row = models._run_job(_tiny_job(system), _graphs_setting(torch.device("cuda")))
    assert row["status"] == "ok" and "graph_failure" not in row
    assert row["infer_graph_img_s"] > 0 and row["train_graph_img_s"] > 0


@pytest.mark.gpu
def test_the_process_goes_on_after_a_failed_capture() -> None:
    gpu = torch.device("cuda")
    size = 2**28
    stream = torch.cuda.current_stream()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()

    def waits() -> float:
        x = torch.rand(size // 4, device=gpu)
        return x.sum().item()

    with pytest.raises(RuntimeError, match="captur") as failed:
        measure.graphed(waits)
    del failed
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.memory_reserved() < before + size
    x = torch.rand(8, device=gpu)  # a generator in the state of a capture would refuse
    replay = measure.graphed(lambda: x.copy_(torch.rand(8, device=gpu)))
    replay()
    first = x.clone()
    replay()
    assert torch.isfinite(x).all() and not torch.equal(x, first)


# The noise floor of the gate -------------------------------------------------------------------------------------


class _Inexact(nn.Module):
    """Gradients, or with ``logits`` the logits, with a relative error in float32 that depends on the path."""

    num_classes = 5
    path = "triton"

    def __init__(self, errors: dict[str, float], logits: bool) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 5)
        self.logits = logits
        self.errors = errors
        self.calls: list[str] = []

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(images.flatten(1))
        if logits.dtype == torch.float64:
            return logits
        self.calls.append(_Inexact.path)
        return logits + self.errors[_Inexact.path] * (logits if self.logits else logits - logits.detach())


def _gate_inexact(
    monkeypatch: pytest.MonkeyPatch, triton: float, plain: float, logits: bool = False
) -> tuple[str | None, report.Row, _Inexact]:
    @contextmanager
    def use_backend(name: str) -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(_Inexact, "path", name)
            yield

    monkeypatch.setattr(models, "use_backend", use_backend)
    model = _Inexact({"triton": triton, "torch": plain}, logits)
    job = models.Job(systems.ours("test_vmamba"), 8, 2, "eager", False)
    row: report.Row = {"dtype": "float32"}
    return models._gate(model, job, _graphs_setting(dtype=torch.float32), row), row, model


def test_the_noise_of_plain_pytorch_raises_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, row, _ = _gate_inexact(monkeypatch, 5e-4, 3e-4)
    assert wrong is None
    assert row["error"] == pytest.approx(5e-4, rel=1e-2) and row["error_floor"] == pytest.approx(3e-4, rel=1e-2)
    assert row["amp_error"] < 1e-5  # logits are exact


@pytest.mark.parametrize("plain", [1e-6, 1.5e-4])
def test_an_error_far_above_the_noise_is_wrong(monkeypatch: pytest.MonkeyPatch, plain: float) -> None:
    wrong, row, _ = _gate_inexact(monkeypatch, 5e-4, plain)
    assert wrong is not None and "relative error 0.0005 of d " in wrong and "(noise floor " in wrong
    assert f"limit {max(1e-4, 3 * plain):.2g} " in wrong
    assert row["error"] == pytest.approx(5e-4, rel=1e-2)
    assert row["error_floor"] == pytest.approx(plain, rel=0.3)  # beside the rounding of float32 itself
    assert "amp_error" not in row


def test_noise_excuses_neither_large_errors_nor_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, _, _ = _gate_inexact(monkeypatch, 2e-2, 1.5e-2)
    assert wrong is not None and "limit 0.01 " in wrong
    wrong, _, _ = _gate_inexact(monkeypatch, 5e-4, 3e-4, logits=True)
    assert wrong is not None and "of logits" in wrong and wrong.endswith("limit 0.0001")


def test_a_floor_of_the_same_computation_excuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU both are the PyTorch path."""
    wrong, row, _ = _gate_inexact(monkeypatch, 5e-4, 5e-4)
    assert wrong is not None and wrong.endswith("limit 0.0001") and row["error_floor"] is None


def test_no_floor_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, row, model = _gate_inexact(monkeypatch, 5e-5, 1e-6)
    assert wrong is None and row["error_floor"] is None and "torch" not in model.calls
