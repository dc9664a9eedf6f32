"""`python -m bench.rival --check`: whether the rival runs here, and computes what this benchmark thinks it does."""

import subprocess
from typing import Any

import numpy as np

from bench.rival import MAX_MODEL_DIFF
from bench.rival.place import Place
from bench.rival.process import Rival, find_compiler, versions
from bench.shape import Shape
from bench.timing import NUM_CALLS

SHAPE = Shape(hidden_size=1024, intermediate_size=512, num_experts=8, top_k=4)


def check_against_model() -> dict[str, Any]:
    """What is installed, and for a few batches the distance to the quantisation model; "error" says what is wrong."""
    report = versions()
    if "error" in report:
        return report
    report["cuda_home"] = find_compiler()
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
    report["nvcc"] = nvcc.stdout.strip().splitlines()[-1] if nvcc.stdout else nvcc.stderr.strip()
    rival = Rival(Place.alone())
    report["device"] = rival.torch.cuda.get_device_name()
    natural = random_weights(np.random.default_rng(0))
    weights = rival.prepare(*natural)
    on_device = [rival.to_device(array) for array in natural]
    for num_tokens in (1, 8, 200):
        case = random_case(num_tokens)
        arrays = [rival.to_device(case[name][0]) for name in ("x", "topk_ids", "topk_weights")]
        wanted = model(rival.torch, arrays[0].view(rival.torch.bfloat16), *arrays[1:], *on_device)
        case["reference"] = wanted.view(rival.torch.uint16).cpu().numpy()
        case["ours"] = np.broadcast_to(case["reference"], case["x"].shape).copy()
        report[f"{num_tokens} tokens"] = measured = rival.time(SHAPE, weights, case)
        if not (measured["diff"] < MAX_MODEL_DIFF and measured["diff_to_ours"] < MAX_MODEL_DIFF):
            report["error"] = f"{num_tokens} tokens: the result is {measured['diff']} from the quantisation model"
    return report


def random_weights(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of finite E4M3 numbers, and scales that are all different."""
    h, i, e = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.num_experts

    def weight(*dims: int) -> np.ndarray:
        sign, magnitude = random.integers(0, 2, dims, np.uint8), random.integers(0x28, 0x60, dims, np.uint8)
        return sign << 7 | magnitude

    def scale(*dims: int) -> np.ndarray:
        return random.uniform(0.05, 0.15, dims).astype(np.float32) / np.float32(np.sqrt(h))

    return weight(e, 2 * i, h), scale(e, 2 * i // 128, h // 128), weight(e, h, i), scale(e, h // 128, i // 128)


def random_case(num_tokens: int) -> dict[str, np.ndarray]:
    """The same inputs for every call of a program; some slots are unused."""
    random = np.random.default_rng(num_tokens)
    ids = np.argsort(random.random((num_tokens, SHAPE.num_experts)), axis=1)[:, : SHAPE.top_k].astype(np.int32)
    ids[random.random(ids.shape) < 0.1] = -1
    # The upper half of a float32 is the bfloat16 next to it towards zero.
    x = (random.standard_normal((num_tokens, SHAPE.hidden_size)).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    one: dict[str, np.ndarray] = {"x": x, "topk_ids": ids, "topk_weights": random.random(ids.shape).astype(np.float32)}
    return {name: np.stack([array] * NUM_CALLS) for name, array in one.items()}


def model(
    torch: Any, x: Any, topk_ids: Any, topk_weights: Any, gate_up: Any, gate_up_scale: Any, down: Any, down_scale: Any
) -> Any:
    """The layer in torch as the rival rounds, one expert at a time: bf16 [T, H] tokens -> bf16 [T, H].

    Tokens and hidden activations get an FP32 scale for each 128 values; the routing weight is multiplied in before the
    activations are rounded, and each expert's result becomes bf16 before the results are added up in FP32.
    """

    def weight_of(bits: Any, scale: Any) -> Any:
        blocks = bits.view(torch.float8_e4m3fn).float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        return (blocks * scale[:, None, :, None]).flatten(2).flatten(0, 1)

    def rounded(values: Any) -> Any:
        blocks = values.float().unflatten(1, (-1, 128))
        scale = blocks.abs().amax(2, keepdim=True).clamp_min(1e-10) / 448
        return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)

    tokens = rounded(x)
    result = torch.zeros_like(tokens)
    for e in range(len(gate_up)):
        token, slot = torch.nonzero(topk_ids == e, as_tuple=True)
        gate, up = (tokens[token] @ weight_of(gate_up[e], gate_up_scale[e]).T).chunk(2, dim=1)
        hidden = torch.nn.functional.silu(gate) * up * topk_weights[token, slot][:, None]
        out = rounded(hidden) @ weight_of(down[e], down_scale[e]).T
        result.index_add_(0, token, out.bfloat16().float())
    return result.bfloat16()
