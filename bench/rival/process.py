"""What the rival's processes do: prepare weights, compile kernels, and time the cases of a folder."""

import importlib.metadata
import json
import math
import os
import pathlib
import shutil
import traceback
from typing import Any, NamedTuple, TextIO

import numpy as np

from bench.metric import relative_difference
from bench.rival import PACKAGES
from bench.rival.place import Place
from bench.shape import Shape
from bench.timing import time_per_call


class Weights(NamedTuple):
    """Gate/up and down, each an FP8 tensor and its scales, as the rival's kernel takes them."""

    gate_up: tuple[Any, Any]
    down: tuple[Any, Any]


class Rival:
    """The rival's module on the GPU of this process, in the process group of all."""

    def __init__(self, place: Place) -> None:
        find_compiler()
        # Nothing here needs NVLink's multicast, and some machines take it badly.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        import deep_gemm
        import torch
        import torch.distributed as dist

        self.torch, self.deep_gemm, self.dist, self.place = torch, deep_gemm, dist, place
        self.device = torch.device("cuda", place.rank)
        torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl",
            init_method=f"tcp://127.0.0.1:{place.port}",
            rank=place.rank,
            world_size=place.ranks,
            device_id=self.device,
        )

    def to_device(self, array: np.ndarray) -> Any:
        """A tensor of the GPU with the array's values."""
        return self.torch.from_numpy(np.array(array)).to(self.device)

    def greatest(self, value: float) -> float:
        """The most of what the processes give, when all have given theirs. NaN is more than anything."""
        if self.place.ranks == 1:
            return value
        mine = math.inf if math.isnan(value) else value
        shared = self.torch.tensor(mine, dtype=self.torch.float64, device=self.device)
        self.dist.all_reduce(shared, op=self.dist.ReduceOp.MAX)
        return float(shared.item())

    def buffer(self, share: Shape, num_tokens: int) -> Any:
        """The memory through which the ranks exchange tokens and results, for so many tokens of each rank."""
        return self.deep_gemm.get_symm_buffer_for_sm90_mega_moe(
            self.dist.group.WORLD,
            share.num_experts * self.place.ranks,
            num_tokens,
            share.top_k,
            share.hidden_size,
            share.intermediate_size,
        )

    def prepare(self, gate_up: Any, gate_up_scale: Any, down: Any, down_scale: Any) -> Weights:
        """Weights and scales (`ExpertWeights.unpack`), the former as bytes: NumPy arrays -> what the kernel takes."""
        torch = self.torch
        scales = [self.to_device(scale) for scale in (gate_up_scale, down_scale)]
        mine = [torch.empty(array.shape, dtype=torch.uint8, device=self.device) for array in (gate_up, down)]
        for e in range(len(gate_up)):  # one expert at a time: a copy of all would not fit beside the largest
            one = slice(e, e + 1)
            natural = [self.to_device(array[one]) for array in (gate_up, down)]
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
            y,
            weights.gate_up,
            weights.down,
            buffer,
            recipe=(128, 128, 128),
            activation="swiglu",
            fast_math=True,
            num_tokens_bound=x.shape[0],  # by which it chooses its schedule
        )

    def time(self, share: Shape, weights: Weights, case: dict[str, np.ndarray]) -> dict[str, Any]:
        """Times one case, together with the other ranks, and compares what the timed calls computed.

        `case` has this rank's tokens for each call: x, topk_ids, topk_weights, and ours, which is our result; with
        reference, the reference result of the first call.
        """
        torch = self.torch
        tensors = {name: self.to_device(array) for name, array in case.items()}
        of_bits = {name: bits.view(torch.bfloat16) for name, bits in tensors.items() if bits.dtype == torch.uint16}
        x, topk_ids, topk_weights = of_bits["x"], tensors["topk_ids"], tensors["topk_weights"]
        y = torch.full_like(x, float("nan"))
        buffer = self.buffer(share, x.shape[1])

        def calls() -> None:
            for n in range(len(x)):
                self.call(y[n], x[n], topk_ids[n], topk_weights[n], weights, buffer)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls()  # compiles, and loads what may not be loaded while capturing
        torch.cuda.synchronize()
        self.greatest(0.0)  # no rank captures while another one still waits for its kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            calls()
        y.fill_(float("nan"))
        torch.cuda.synchronize()
        timing = time_per_call(graph.replay, lambda _: torch.cuda.synchronize(), len(x), self.greatest)
        record: dict[str, Any] = {**timing._asdict(), "captured": True}
        if "reference" in of_bits:
            record["diff"] = self.greatest(difference(y[0], of_bits["reference"]))
        # NumPy's maximum: Python's drops a NaN.
        to_ours = float(np.max([difference(*pair) for pair in zip(y, of_bits["ours"], strict=True)]))
        record["diff_to_ours"] = self.greatest(to_ours)
        # All are here, so nobody writes into a buffer any more.
        buffer.destroy()
        return record


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


def read_weights(rival: Rival, folder: pathlib.Path, share: Shape) -> Weights:
    """This rank's part of the weights that `bench.rival.client.write_weights` wrote."""
    h, i, e = share.hidden_size, share.intermediate_size, share.num_experts
    mine = slice(rival.place.rank * e, (rival.place.rank + 1) * e)

    def read(name: str, dtype: type, *dims: int) -> np.ndarray:
        return np.memmap(folder / f"{name}.bin", dtype, "r", shape=(rival.place.ranks * e, *dims))[mine]

    return rival.prepare(
        read("gate_up", np.uint8, 2 * i, h),
        read("gate_up_scale", np.float32, 2 * i // 128, h // 128),
        read("down", np.uint8, h, i),
        read("down_scale", np.float32, h // 128, i // 128),
    )


def read_case(path: pathlib.Path, place: Place) -> dict[str, np.ndarray]:
    """This rank's tokens of a case: of each call as many, side by side, for each rank."""
    with np.load(path) as arrays:
        case = dict(arrays)
    reference = case.pop("reference", None)
    mine = {name: np.split(array, place.ranks, axis=1)[place.rank] for name, array in case.items()}
    if reference is not None:
        mine["reference"] = np.split(reference, place.ranks)[place.rank]
    return mine


def compile_kernels(rival: Rival, share: Shape, num_tokens: int) -> None:
    """Calls the layer once with weights of zeros: what is compiled depends on sizes only."""
    torch = rival.torch
    h, i, e = share.hidden_size, share.intermediate_size, share.num_experts

    def zeros(*dims: int, dtype: Any = torch.float32) -> Any:
        return torch.zeros(dims, dtype=dtype, device=rival.device)

    weights = Weights(
        (zeros(e, 2 * i, h, dtype=torch.uint8).view(torch.float8_e4m3fn), zeros(e, 2 * i // 128, h // 128)),
        (zeros(e, h, i, dtype=torch.uint8).view(torch.float8_e4m3fn), zeros(e, h // 128, i // 128)),
    )
    x = zeros(num_tokens, h, dtype=torch.bfloat16)
    slots = torch.arange(num_tokens * share.top_k, device=rival.device)
    topk_ids = (slots % (e * rival.place.ranks)).to(torch.int32).reshape(num_tokens, -1)
    buffer = rival.buffer(share, num_tokens)
    rival.call(torch.empty_like(x), x, topk_ids, zeros(num_tokens, share.top_k), weights, buffer)
    torch.cuda.synchronize()
    rival.greatest(0.0)


def run_cases(rival: Rival, folder: pathlib.Path, request: dict[str, Any], output: TextIO) -> None:
    """Times each case of the request, which the first rank reports.

    One that fails is reported, and the others still run; but not in a group, whose ranks are no longer at one place.
    """
    share = Shape(**request["shape"])
    weights = read_weights(rival, folder, share)
    for case in request["cases"]:
        record: dict[str, Any] = {"case": case["name"]}
        try:
            record.update(rival.time(share, weights, read_case(folder / f"{case['name']}.npz", rival.place)))
        except Exception:
            if rival.place.ranks > 1:
                raise
            record["error"] = traceback.format_exc()
            traceback.print_exc()
        if rival.place.rank == 0:
            print(json.dumps(record), file=output, flush=True)
