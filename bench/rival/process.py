"""What the rival's process does: prepares weights, compiles kernels, and times the cases of a folder."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import socket
import sys
import traceback
import types
from typing import Any, NamedTuple, TextIO

import numpy as np

from bench.metric import relative_difference
from bench.rival import PACKAGES
from bench.shape import Shape
from bench.timing import time_per_call


class Weights(NamedTuple):
    """Gate/up and down, each an FP8 tensor and its scales, as the rival's kernel takes them."""

    gate_up: tuple[Any, Any]
    down: tuple[Any, Any]


class Rival:
    """The rival's module and its process group of one."""

    def __init__(self) -> None:
        find_compiler()
        # One rank has nothing to multicast, and some machines take it badly.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        import deep_gemm
        import torch

        self.torch, self.deep_gemm = torch, deep_gemm
        torch.cuda.set_device(0)
        self.group: Any = None
        self.has_symmetric_memory = True

    def buffer(self, shape: Shape, num_tokens: int) -> tuple[Any, str]:
        """The buffer through which tokens and intermediate results go, and the kind of its memory."""
        sizes = (shape.num_experts, num_tokens, shape.top_k, shape.hidden_size, shape.intermediate_size)
        if self.has_symmetric_memory:
            try:
                if self.group is None:
                    self.group = self._process_group()
                return self.deep_gemm.get_symm_buffer_for_sm90_mega_moe(self.group, *sizes), "symmetric memory"
            except Exception:
                # Symmetric memory asks more of the system, and one rank has no peers to share it with.
                traceback.print_exc()
                print("rival: no symmetric memory, taking plain device memory", file=sys.stderr)
                self.has_symmetric_memory = False
        return self._plain_buffer(*sizes), "device memory"

    def _process_group(self) -> Any:
        import torch.distributed as dist

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        dist.init_process_group(
            "nccl",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=0,
            world_size=1,
            device_id=self.torch.device("cuda:0"),
        )
        return dist.group.WORLD

    def _plain_buffer(self, num_experts: int, num_tokens: int, top_k: int, hidden: int, inter: int) -> Any:
        module, torch = self.deep_gemm._C, self.torch
        alignment = module.get_token_alignment_for_mega_moe()
        capacity = -(-num_tokens // alignment) * alignment
        sizes = (num_experts, capacity, top_k, hidden, inter)
        num_bytes, views_of = module.get_symm_buffer_size_for_sm90_mega_moe(1, *sizes, True, "swiglu")
        buffer = torch.zeros(num_bytes, dtype=torch.int8, device="cuda")
        x, x_sf, topk_idx, topk_weights = (torch.from_dlpack(view) for view in list(views_of(buffer))[:4])
        return types.SimpleNamespace(
            buffer=buffer,
            handle=types.SimpleNamespace(buffer_ptrs=[buffer.data_ptr()]),
            group=types.SimpleNamespace(size=lambda: 1, rank=lambda: 0),
            num_experts=num_experts,
            num_max_tokens_per_rank=capacity,
            num_topk=top_k,
            x=x if x.dtype == torch.float8_e4m3fn else x.view(torch.float8_e4m3fn),
            x_sf=x_sf,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )

    def prepare(self, gate_up: Any, gate_up_scale: Any, down: Any, down_scale: Any) -> Weights:
        """Weights and scales (`ExpertWeights.unpack`), the former as bytes: NumPy arrays -> what the kernel takes."""
        torch = self.torch
        scales = [torch.from_numpy(np.array(scale, np.float32)).cuda() for scale in (gate_up_scale, down_scale)]
        mine = [torch.empty(array.shape, dtype=torch.uint8, device="cuda") for array in (gate_up, down)]
        for e in range(len(gate_up)):  # one expert at a time: a copy of all would not fit beside the largest
            one = slice(e, e + 1)
            natural = [torch.from_numpy(np.array(array[one])).cuda() for array in (gate_up, down)]
            moved = self.deep_gemm.transform_weights_for_mega_moe_sm90(
                (natural[0], scales[0][one]), (natural[1], scales[1][one])
            )
            for target, (weight, scale), before in zip(mine, moved, scales, strict=True):
                target[one].copy_(weight)
                before[one].copy_(scale)
        gate_up_fp8, down_fp8 = (array.view(torch.float8_e4m3fn) for array in mine)
        return Weights((gate_up_fp8, scales[0]), (down_fp8, scales[1]))

    def call(self, y: Any, x: Any, topk_ids: Any, topk_weights: Any, weights: Weights, buffer: Any) -> None:
        """One layer: quantises and stages bf16 x into the buffer, then the fused kernel; the result goes to y."""
        self.deep_gemm.mega_moe_pre_dispatch_sm90(
            x,
            topk_ids,
            topk_weights,
            buffer.x,
            buffer.x_sf,
            buffer.topk_idx,
            buffer.topk_weights,
            num_tokens=x.shape[0],
            group_size=128,
            routed_scaling_factor=1.0,
        )
        self.deep_gemm.fp8_mega_moe(
            y, weights.gate_up, weights.down, buffer, recipe=(128, 128, 128), activation="swiglu", fast_math=True
        )

    def time(self, shape: Shape, weights: Weights, case: dict[str, np.ndarray]) -> dict[str, Any]:
        """Times one case and compares what the timed calls computed."""
        torch = self.torch
        x, ours, reference = (torch.from_numpy(case[name]).cuda() for name in ("x", "ours", "reference"))
        x, ours, reference = (bits.view(torch.bfloat16) for bits in (x, ours, reference))
        topk_ids, topk_weights = (torch.from_numpy(case[name]).cuda() for name in ("topk_ids", "topk_weights"))
        y = torch.full_like(x, float("nan"))
        buffer, memory = self.buffer(shape, x.shape[1])

        def calls() -> None:
            for n in range(len(x)):
                self.call(y[n], x[n], topk_ids[n], topk_weights[n], weights, buffer)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls()  # compiles, and loads what may not be loaded while capturing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            calls()
        y.fill_(float("nan"))
        timing = time_per_call(graph.replay, lambda _: torch.cuda.synchronize(), len(x))
        return {
            **timing._asdict(),
            "diff": difference(y[0], reference),
            # NumPy's maximum: Python's drops a NaN.
            "diff_to_ours": float(np.max([difference(*pair) for pair in zip(y, ours, strict=True)])),
            "captured": True,
            "memory": memory,
        }


def difference(a: Any, b: Any) -> float:
    """How far two tensors are apart."""
    return relative_difference(a.double().flatten(), b.double().flatten())


def find_compiler() -> str | None:
    """Sets CUDA_HOME, which deep_gemm reads when it is imported, to the toolkit of the nvcc on PATH; returns it."""
    nvcc = shutil.which("nvcc")
    if nvcc is not None and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        os.environ["CUDA_HOME"] = str(pathlib.Path(nvcc).resolve().parent.parent)
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def versions() -> dict[str, Any]:
    """What is installed, or under "error" what is missing."""
    found: dict[str, Any] = {}
    missing = []
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    return {**found, "error": f"not installed: {', '.join(missing)}"} if missing else found


def read_weights(rival: Rival, folder: pathlib.Path, shape: Shape) -> Weights:
    """The weights that `bench.rival.client.write_weights` wrote."""
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts

    def read(name: str, dtype: type, *dims: int) -> np.ndarray:
        return np.memmap(folder / f"{name}.bin", dtype, "r", shape=dims)

    return rival.prepare(
        read("gate_up", np.uint8, e, 2 * i, h),
        read("gate_up_scale", np.float32, e, 2 * i // 128, h // 128),
        read("down", np.uint8, e, h, i),
        read("down_scale", np.float32, e, h // 128, i // 128),
    )


def compile_kernels(rival: Rival, shape: Shape, num_tokens: int) -> None:
    """Calls the layer once with weights of zeros: what is compiled depends on sizes only."""
    torch = rival.torch
    h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts

    def zeros(*dims: int, dtype: Any = torch.float32) -> Any:
        return torch.zeros(dims, dtype=dtype, device="cuda")

    weights = Weights(
        (zeros(e, 2 * i, h, dtype=torch.uint8).view(torch.float8_e4m3fn), zeros(e, 2 * i // 128, h // 128)),
        (zeros(e, h, i, dtype=torch.uint8).view(torch.float8_e4m3fn), zeros(e, h // 128, i // 128)),
    )
    x = zeros(num_tokens, h, dtype=torch.bfloat16)
    topk_ids = (torch.arange(num_tokens * shape.top_k, device="cuda") % e).to(torch.int32).reshape(num_tokens, -1)
    buffer, _ = rival.buffer(shape, num_tokens)
    rival.call(torch.empty_like(x), x, topk_ids, zeros(num_tokens, shape.top_k), weights, buffer)
    torch.cuda.synchronize()


def run_cases(rival: Rival, folder: pathlib.Path, request: dict[str, Any], output: TextIO) -> None:
    """Times each case of the request; one that fails is reported, and the others still run."""
    shape = Shape(**request["shape"])
    weights = read_weights(rival, folder, shape)
    for case in request["cases"]:
        record: dict[str, Any] = {"case": case["name"]}
        try:
            with np.load(folder / f"{case['name']}.npz") as arrays:
                record.update(rival.time(shape, weights, dict(arrays)))
        except Exception:
            record["error"] = traceback.format_exc()
            traceback.print_exc()
        print(json.dumps(record), file=output, flush=True)
