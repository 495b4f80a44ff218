"""Figures of official code that were recorded in another run; shown only on the same kind of GPU, labelled as such.

Source: one NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, triton 3.6.0, cuDNN 9.19, 2026-11-22. MzeroMiko/VMamba@2ed52ea
with its ``selective_scan_cuda_oflex`` kernels (three lines patched for CUDA 13) and its Triton cross scan and merge;
hustvl/ViG@dfb9d32 with its Triton kernels (module globals made constants, which triton 3.6 wants). NAT with the
kernels of NATTEN 0.14.6, built for that GPU; MLLA as released, the better setting of ``cudnn.benchmark``.
Ops: medians of device-event times with the L2 flushed, bfloat16 in, float32 parameters and scan output. Models:
bfloat16 AMP, eager, random inputs, medians of at least 10 steps.
"""

from __future__ import annotations

from typing import NamedTuple

GPU = "NVIDIA H100 80GB HBM3"
SYSTEM = "official VMamba, recorded in another run"

CORE: dict[tuple[tuple[int, int, int, int], int], tuple[float, float, float]] = {
    ((128, 96, 56, 56), 1): (2.13, 5.63, 1637),
    ((128, 192, 28, 28), 1): (0.97, 2.67, 816),
    ((128, 384, 14, 14), 1): (0.44, 1.44, 410),
    ((128, 768, 7, 7), 1): (0.49, 1.45, 206),
    ((8, 96, 256, 256), 1): (2.19, 5.70, 2137),
    ((8, 192, 128, 128), 1): (1.10, 2.93, 1062),
    ((8, 384, 64, 64), 1): (0.55, 1.62, 530),
    ((8, 768, 32, 32), 1): (0.26, 0.86, 265),
    ((1, 96, 256, 256), 1): (0.31, 0.87, 267),
    ((1, 192, 256, 256), 1): (0.62, 1.52, 531),
    ((128, 192, 56, 56), 1): (4.23, 11.2, 3254),
    ((128, 96, 56, 56), 16): (7.35, 31.5, 1924),
    ((128, 192, 28, 28), 16): (3.02, 11.0, 897),
    ((128, 384, 14, 14), 16): (1.64, 6.10, 449),
    ((128, 768, 7, 7), 16): (1.94, 6.08, 256),
    ((128, 192, 56, 56), 16): (14.6, 62.5, 3552),
    ((8, 96, 256, 256), 16): (5.42, 22.7, 2508),
    ((1, 96, 256, 256), 16): (0.84, 3.57, 314),
}
"""(B, E, H, W), N: forward ms, forward + backward ms, peak MiB of cross scan + scan + cross merge, step size given."""

CORE_PROJ: dict[tuple[int, int, int, int], tuple[float, float]] = {
    (128, 96, 56, 56): (3.63, 9.61),
    (128, 192, 28, 28): (1.58, 4.62),
    (128, 384, 14, 14): (0.85, 2.92),
    (128, 768, 7, 7): (0.76, 2.43),
    (8, 96, 256, 256): (4.13, 11.2),
    (8, 192, 128, 128): (1.86, 6.97),
    (8, 384, 64, 64): (0.95, 2.78),
    (8, 768, 32, 32): (1.46, 2.31),
    (1, 96, 256, 256): (0.63, 2.98),
}
"""(B, E, H, W) at N = 1: forward ms, forward + backward ms with both projections."""

GATED_SYSTEM = "official ViG (training path), recorded in another run"
GATED: dict[tuple[int, ...], tuple[float, float]] = {
    (128, 196, 3, 32, 64): (1.08, 3.13),
    (128, 196, 6, 32, 64): (0.91, 2.87),
    (32, 1024, 3, 32, 64): (0.59, 3.42),
}
"""(B, T, H, d_k, d_v): forward ms, forward + backward ms of two flipped passes."""

GATED_INFERENCE_SYSTEM = "official ViG (inference kernel), recorded in another run"
GATED_INFERENCE: dict[tuple[int, ...], float] = {(8, 4096, 3, 32, 64): 9.23, (8, 16384, 3, 32, 64): 37.7}
"""The same: forward ms of the kernel that it infers with, which walks from token to token."""

SDPA_SYSTEM = "flash SDPA (softmax attention), recorded in another run"
SDPA: dict[tuple[int, int], tuple[float, float]] = {
    (32, 196): (0.49, 2.35),
    (32, 784): (1.12, 4.66),
    (32, 1024): (1.02, 4.09),
    (32, 3136): (3.18, 12.2),
    (32, 16384): (14.3, 50.7),
    (32, 65536): (56.7, 204),
    (64, 196): (0.60, 3.55),
    (64, 784): (1.46, 6.72),
    (64, 3136): (4.24, 17.3),
    (64, 16384): (20.7, 76.3),
    (64, 65536): (82.5, 312),
}
"""(head dimension, tokens) of 1.6 M images x heads x tokens: forward ms, forward + backward ms. Another function than
linear attention: what a model would run in its place."""

NEIGHBORHOOD_SYSTEM = "NATTEN 0.14.6 (fp16, with bias), recorded in another run"
NEIGHBORHOOD: dict[tuple[int, ...], tuple[float, float]] = {
    (128, 2, 56, 56, 32, 7, 1): (0.86, 3.01),
    (128, 4, 28, 28, 32, 7, 1): (0.46, 1.58),
    (128, 8, 14, 14, 32, 7, 1): (0.24, 0.83),
    (128, 16, 7, 7, 32, 7, 1): (0.16, 0.52),
    (128, 2, 56, 56, 32, 7, 8): (1.25, 5.24),
    (128, 4, 28, 28, 32, 7, 4): (0.64, 2.79),
    (128, 8, 14, 14, 32, 7, 2): (0.56, 2.36),
    (8, 2, 256, 256, 32, 7, 1): (1.10, 4.74),
    (8, 4, 128, 128, 32, 7, 1): (0.56, 2.43),
    (8, 8, 64, 64, 32, 7, 1): (0.30, 1.22),
    (8, 4, 128, 128, 32, 7, 16): (0.76, 3.49),
    (8, 4, 128, 128, 32, 13, 1): (1.92, 7.10),
}
"""(B, heads, H, W, D, K, dilation): forward ms, forward + backward ms of its unfused kernels, built for the GPU."""


class Model(NamedTuple):
    """Throughput of a whole official model: whose, img/s, and peak MiB of a training step."""

    system: str
    infer: float
    train: float
    train_mib: float


_MLLA = "official MLLA, recorded in another run"
_NAT = "upstream NAT with NATTEN 0.14.6, recorded in another run"
_VIG = "official ViG, recorded in another run"
MODELS: dict[tuple[str, int, int], Model] = {
    ("vmamba_tiny", 224, 128): Model(SYSTEM, 2885, 1080, 11902),
    ("vmamba_tiny", 512, 32): Model(SYSTEM, 605, 228, 15476),
    ("vmamba_tiny", 1024, 8): Model(SYSTEM, 146, 53.8, 15522),
    ("vmamba_tiny", 2048, 2): Model(SYSTEM, 35.4, 13.3, 15522),
    ("vmamba_tiny_vanilla", 224, 128): Model(SYSTEM, 837, 251, 28307),
    ("mlla_tiny", 224, 128): Model(_MLLA, 3047, 878, 12490),
    ("mlla_tiny", 512, 32): Model(_MLLA, 600, 176, 16184),
    ("mlla_tiny", 1024, 8): Model(_MLLA, 148, 43.8, 16185),
    ("mlla_tiny", 2048, 2): Model(_MLLA, 34.1, 10.0, 16183),
    ("nat_tiny", 224, 128): Model(_NAT, 3596, 1124, 10790),
    ("nat_tiny", 512, 32): Model(_NAT, 722, 228, 14027),
    ("nat_tiny", 1024, 8): Model(_NAT, 181, 54.5, 14059),
    ("nat_tiny", 2048, 2): Model(_NAT, 45.3, 11.2, 14059),
    ("vig_tiny", 224, 128): Model(_VIG, 4006, 952, 3490),
    ("vig_tiny", 1024, 8): Model(_VIG, 65.3, 110, 4451),
}
"""(our name of the model, resolution, batch): figures of the authors' code."""
