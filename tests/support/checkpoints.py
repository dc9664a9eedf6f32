"""Tiny checkpoints of each family, written here, with what has to come out of them: written without the package's code.

Names of tensors and fields of configurations are those of published files, as docs/checkpoints.md says where they come
from.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import jax_megamoe as mm
from tests.support import numpy_model
from tests.support.numpy_model import Array, Experts

E, H, I, K, VOCABULARY = 8, 256, 128, 2, 16

DTYPES = {
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}
Named = dict[str, Array]
LARGE_CONFIG = {"model_type": "qwen3_moe", "num_experts_per_tok": K, "norm_topk_prob": True}


def file_bytes(
    tensors: Mapping[str, Array], metadata: dict[str, str] | None = None, dtypes: Mapping[str, str] = {}
) -> bytes:
    """A safetensors file. `dtypes` has names for tensors whose dtype NumPy does not tell."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, array in tensors.items():
        shape = list(array.shape)
        dtype = dtypes.get(name, DTYPES[array.dtype])
        if dtype == "F4":
            shape[-1] *= 2
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())


def write(
    folder: Path, config: Mapping[str, Any], tensors: Named, num_files: int = 2, dtypes: Mapping[str, str] = {}
) -> Path:
    """A checkpoint of so many files with an index; of one without."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        (folder / "model.safetensors").write_bytes(file_bytes(tensors, {"format": "pt"}, dtypes))
        return folder
    weight_map = {}
    for number in range(num_files):
        name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::num_files]}
        weight_map.update(dict.fromkeys(part, name))
        (folder / name).write_bytes(file_bytes(part, {"format": "pt"}, dtypes))
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@dataclasses.dataclass(frozen=True)
class Stored:
    """A matrix [N, K] as a checkpoint holds it, by the suffixes of its tensors, and its exact values."""

    tensors: Named
    natural: tuple[Array, Array] | None  # as `unpack` gives it, without the dimension of experts; None for floats
    values: Array  # float64[N, K]


Encode = Callable[[np.random.Generator, int, int], Stored]


def _fp8(rng: np.random.Generator, n: int, k: int) -> Array:
    return (rng.standard_normal((n, k)) * 60).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)


def _scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[Array, Array]:
    """As stored, and in float32."""
    if dtype in ("E8M0", "uint8"):
        exponents = rng.integers(113, 117, shape).astype(np.uint8)
        wide = np.exp2(exponents.astype(np.float32) - 127)
        return (exponents if dtype == "uint8" else exponents.view(ml_dtypes.float8_e8m0fnu)), wide
    scales = ((0.5 + rng.random(shape)) / 4096).astype(np.float32)
    if dtype in ("bf16", "f16"):
        scales = scales.astype(ml_dtypes.bfloat16 if dtype == "bf16" else np.float16)
    return scales, scales.astype(np.float32)


def fp8_block(scale: str = "f32", suffix: str = ".weight_scale_inv") -> Encode:
    def encode(rng: np.random.Generator, n: int, k: int) -> Stored:
        values, (stored, wide) = _fp8(rng, n, k), _scales(rng, (-(-n // 128), -(-k // 128)), scale)
        exact = values.astype(np.float64) * wide.astype(np.float64).repeat(128, 0)[:n].repeat(128, 1)[:, :k]
        return Stored({".weight": values, suffix: stored}, (values, wide), exact)

    return encode


def fp8_small_blocks(rng: np.random.Generator, n: int, k: int) -> Stored:
    """FP8 with a power of two for each 32x32 block: no format of the kernel, but exact in BF16."""
    values, (stored, wide) = _fp8(rng, n, k), _scales(rng, (n // 32, k // 32), "E8M0")
    exact = values.astype(np.float64) * wide.astype(np.float64).repeat(32, 0).repeat(32, 1)
    return Stored({".weight": values, ".scale": stored}, None, exact)


def fp8_channel(scale: str = "bf16", trailing: bool = True, suffix: str = ".weight_scale") -> Encode:
    def encode(rng: np.random.Generator, n: int, k: int) -> Stored:
        values, (stored, wide) = _fp8(rng, n, k), _scales(rng, (n, 1) if trailing else (n,), scale)
        exact = values.astype(np.float64) * wide.astype(np.float64).reshape(n, 1)
        return Stored({".weight": values, suffix: stored}, (values, wide.reshape(n)), exact)

    return encode


def fp8_matrix(scale: str = "bf16") -> Encode:
    """One scale, with a static one of activations beside it."""

    def encode(rng: np.random.Generator, n: int, k: int) -> Stored:
        values, (stored, wide) = _fp8(rng, n, k), _scales(rng, (), scale)
        tensors = {".weight": values, ".weight_scale": stored, ".input_scale": np.ones(1, np.float32)}
        return Stored(tensors, (values, np.full(n, wide, np.float32)), values.astype(np.float64) * np.float64(wide))

    return encode


def mxfp4(
    codes: str = "int8",
    exponents: str = "E8M0",
    weight: str = ".weight",
    scale: str = ".scale",
    spread: int = 8,
    largest: int = 118,
) -> Encode:
    def encode(rng: np.random.Generator, n: int, k: int) -> Stored:
        octets = rng.integers(0, 256, (n, k // 2)).astype(np.uint8)
        powers = rng.integers(largest - spread, largest + 1, (n, k // 32)).astype(np.uint8)
        e8m0 = powers.view(ml_dtypes.float8_e8m0fnu)
        tensors = {weight: octets.view(np.dtype(codes)), scale: e8m0 if exponents == "E8M0" else powers}
        return Stored(tensors, (octets, e8m0), numpy_model.dequantize_mxfp4(octets, powers))

    return encode


def floats(rng: np.random.Generator, n: int, k: int) -> Stored:
    values = (rng.standard_normal((n, k)) / k**0.5).astype(ml_dtypes.bfloat16)
    return Stored({".weight": values}, None, values.astype(np.float64))


@dataclasses.dataclass
class Stock:
    """A checkpoint to write, and by layer what it holds."""

    config: dict[str, Any]
    tensors: Named
    family: str
    experts: dict[int, list[tuple[Stored, Stored, Stored]]]  # by layer; gate, up and down of each expert
    biases: dict[int, tuple[Array, Array]]  # f32[E, 2I], gate first, and f32[E, H]; zeros where there are none
    shared: dict[int, tuple[Stored, Stored, Stored]]
    router: dict[int, Named]  # weight, bias and others, as f32
    route: dict[str, Any]
    moe: dict[str, Any]
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)

    def natural(self, layer: int) -> Experts:
        """The experts as `pack_experts` takes them, and `unpack` gives them; floats quantised to blocks."""
        if self.experts[layer][0][0].natural is None:
            gate, up, down = (
                np.stack([one[part].tensors[".weight"] for one in self.experts[layer]]) for part in range(3)
            )
            return numpy_model.quantize_experts(gate, up, down)
        parts = []
        for one in self.experts[layer]:
            of_gate, of_up, of_down = (stored.natural for stored in one)
            assert of_gate is not None and of_up is not None and of_down is not None
            parts.append([np.concatenate([of_gate[n], of_up[n]]) for n in range(2)] + list(of_down))
        return Experts(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))

    def values(self, layer: int) -> tuple[Array, Array, Array]:
        """Exact gate, up and down of all experts."""
        gate, up, down = (np.stack([one[part].values for one in self.experts[layer]]) for part in range(3))
        return gate, up, down


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `build` makes: names and encodings of a family."""

    family: str
    config: dict[str, Any]
    encode: Encode
    prefix: str = "model."
    block: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: str = "gate.weight"
    bias: str | None = None
    hash_table: str | None = None
    hash_layers: int = 0
    image_bias: str | None = None
    logit_bias: str | None = None
    shared: str | None = None
    shared_expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_gate: str | None = None
    shared_encode: Encode | None = None
    num_shared: int = 1
    moe_layers: tuple[int, ...] = (1, 2)
    num_layers: int = 3
    route: dict[str, Any] = dataclasses.field(default_factory=dict)
    moe: dict[str, Any] = dataclasses.field(default_factory=dict)
    fused: str | None = None  # "out_in" or "in_out": all experts in two tensors; "in_turn": as gpt-oss has them
    text_config: bool = False
    has_mtp: bool = False  # a layer of experts after the last
    hidden_size: int = H  # of the experts
    model_size: int = H
    intermediate_size: int = I


def build(plan: Plan, seed: int = 0) -> Stock:
    rng = np.random.default_rng(seed)
    config = {
        "num_hidden_layers": plan.num_layers,
        "hidden_size": plan.model_size,
        "moe_intermediate_size": plan.intermediate_size,
        "hidden_act": "silu",
        **plan.config,
    }
    config.update({key: plan.num_shared for key in ("n_shared_experts", "num_shared_experts") if config.get(key)})
    if plan.text_config:
        top = {"model_type": config.pop("model_type"), "architectures": config.pop("architectures", [])}
        config = {**top, "text_config": config}
    tensors: Named = {f"{plan.prefix}embed_tokens.weight": np.zeros((4, 4), ml_dtypes.bfloat16)}
    stock = Stock(config, tensors, plan.family, {}, {}, {}, {}, {"top_k": K, **plan.route}, plan.moe)
    last = (plan.num_layers,) if plan.has_mtp else ()
    for layer in (*plan.moe_layers, *last):
        stem = f"{plan.prefix}layers.{layer}.{plan.block}"
        size, hidden_size = plan.intermediate_size, plan.hidden_size
        sizes = (size, hidden_size), (size, hidden_size), (hidden_size, size)
        stock.biases[layer] = np.zeros((E, 2 * size), np.float32), np.zeros((E, hidden_size), np.float32)
        stock.experts[layer] = []
        for _ in range(E):
            gate, up, down = (plan.encode(rng, *shape) for shape in sizes)
            stock.experts[layer].append((gate, up, down))
        if plan.fused == "in_turn":
            stock.biases[layer] = _biases(rng, *stock.biases[layer])
            tensors |= _in_turn(stem, stock.experts[layer], stock.biases[layer])
        elif plan.fused:
            tensors |= _fused(stem, stock.experts[layer], plan.fused)
        else:
            for e, one in enumerate(stock.experts[layer]):
                for name, stored in zip(plan.expert, one, strict=True):
                    tensors |= {f"{stem}.experts.{e}.{name}{suffix}": a for suffix, a in stored.tensors.items()}
        stock.router[layer] = _router(rng, plan, stem, layer, tensors)
        if plan.shared:
            size = plan.intermediate_size * plan.num_shared
            shared_sizes = (size, plan.model_size), (size, plan.model_size), (plan.model_size, size)
            encode = plan.shared_encode or plan.encode
            gate, up, down = (encode(rng, *shape) for shape in shared_sizes)
            stock.shared[layer] = gate, up, down
            for name, stored in zip(plan.shared_expert, stock.shared[layer], strict=True):
                tensors |= {f"{stem}.{plan.shared}.{name}{suffix}": a for suffix, a in stored.tensors.items()}
    return stock


def _fused(stem: str, experts: list[tuple[Stored, Stored, Stored]], order: str) -> Named:
    gate, up, down = (np.stack([one[part].tensors[".weight"] for one in experts]) for part in range(3))
    gate_up = np.concatenate([gate, up], axis=1)
    if order == "in_out":
        gate_up, down = (np.ascontiguousarray(array.swapaxes(1, 2)) for array in (gate_up, down))
    return {f"{stem}.experts.gate_up_proj": gate_up, f"{stem}.experts.down_proj": down}


def _biases(rng: np.random.Generator, *like: Array) -> tuple[Array, Array]:
    """BF16 values in f32, so large that they are felt, by the bounds of the activation too."""
    of_gate_up, of_down = (
        np.asarray(size * rng.standard_normal(zeros.shape)).astype(ml_dtypes.bfloat16).astype(np.float32)
        for size, zeros in zip((4, 60), like, strict=True)
    )
    return of_gate_up, of_down


def _in_turn(stem: str, experts: list[tuple[Stored, Stored, Stored]], biases: tuple[Array, Array]) -> Named:
    """Rows of gate and up in turn: MXFP4 as gpt-oss is published, floats transposed as transformers writes them."""
    of_gate, of_up = np.split(biases[0], 2, axis=1)
    named = {
        f"{stem}.experts.gate_up_proj_bias": np.stack([of_gate, of_up], axis=2).reshape(E, -1),
        f"{stem}.experts.down_proj_bias": biases[1],
    }
    named = {name: array.astype(ml_dtypes.bfloat16) for name, array in named.items()}
    for suffix in experts[0][0].tensors:
        gate, up, down = (np.stack([one[part].tensors[suffix] for one in experts]) for part in range(3))
        gate_up = np.stack([gate, up], axis=2).reshape(E, -1, gate.shape[2])
        for name, array in (("gate_up_proj", gate_up), ("down_proj", down)):
            if suffix == ".weight":
                named[f"{stem}.experts.{name}"] = np.ascontiguousarray(array.swapaxes(1, 2))
            else:
                lead = array.shape[:2]
                named[f"{stem}.experts.{name}{suffix}"] = array.reshape(*lead, -1, 16) if suffix == "_blocks" else array
    return named


def _router(rng: np.random.Generator, plan: Plan, stem: str, layer: int, tensors: Named) -> Named:
    weight = rng.standard_normal((E, plan.model_size)).astype(ml_dtypes.bfloat16)
    tensors[f"{stem}.{plan.router}"] = weight
    found = {"weight": weight.astype(np.float32)}
    is_hashed = layer < plan.hash_layers
    if plan.bias and not is_hashed:
        found["bias"] = rng.standard_normal(E).astype(np.float32)
        tensors[f"{stem}.{plan.bias}"] = found["bias"]
    if plan.image_bias:
        found["image_bias"] = rng.standard_normal(E).astype(np.float32)
        tensors[f"{stem}.{plan.image_bias}"] = found["image_bias"]
    if plan.logit_bias:
        bias = rng.standard_normal(E).astype(ml_dtypes.bfloat16)
        tensors[f"{stem}.{plan.logit_bias}"], found["logit_bias"] = bias, bias.astype(np.float32)
    if plan.hash_table and is_hashed:
        table = np.stack([rng.permutation(E)[:K] for _ in range(VOCABULARY)]).astype(np.int64)
        tensors[f"{stem}.{plan.hash_table}"] = table
        found["hash_table"] = table.astype(np.int32)
    if plan.shared_gate:
        gate = rng.standard_normal((1, plan.model_size)).astype(ml_dtypes.bfloat16)
        tensors[f"{stem}.{plan.shared_gate}"] = gate
        found["shared_gate"] = gate.astype(np.float32)
    return found


def assert_same(weights: mm.ExpertWeights, expected: numpy_model.Experts) -> None:
    for name, found, wanted in zip(expected._fields, weights.unpack(), expected, strict=True):
        assert found.shape == wanted.shape, name
        np.testing.assert_array_equal(octets(found), octets(wanted), err_msg=name)


def octets(array: Any) -> Array:
    """The bytes of an array of any type."""
    return np.ascontiguousarray(np.asarray(array)).view(np.uint8)


def memory_of_put(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Any]:
    """Bytes of all experts of a checkpoint, and what the program that writes one into them needs, as XLA compiled it."""
    from jax_megamoe.checkpoints import loading

    found: list[Any] = []
    put = loading._put

    def spy(*arguments: Any, **options: Any) -> Any:
        if not found:
            found.append(put.lower(*arguments, **options).compile().memory_analysis())
        return put(*arguments, **options)

    monkeypatch.setattr(loading, "_put", spy)
    return mm.load_experts(folder).nbytes, found[0]


def large_checkpoint(folder: Path, kind: str, experts: int = 8, layers: int = 6) -> Path:
    """6 layers of 8 experts of 1.5 MiB in FP8, in one file for a layer; their bytes are made as they are written."""
    h, i = 1024, 512
    rng = np.random.default_rng(0)
    config = {**LARGE_CONFIG, "num_hidden_layers": layers, "hidden_size": h}
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": experts}))
    for layer in range(layers):
        gate = f"model.layers.{layer}.mlp.gate.weight"
        tensors: dict[str, Any] = {gate: np.zeros((experts, h), ml_dtypes.bfloat16)}
        for e in range(experts):
            for name, shape in (("gate_proj", (i, h)), ("up_proj", (i, h)), ("down_proj", (h, i))):
                stem = f"model.layers.{layer}.mlp.experts.{e}.{name}.weight"
                if kind == "floats":
                    tensors[stem] = (rng.standard_normal(shape, np.float32) / 50).astype(ml_dtypes.bfloat16)
                elif kind == "fp8_block":
                    tensors[stem] = rng.integers(0, 126, shape, np.uint8).view(ml_dtypes.float8_e4m3fn)
                    tensors[f"{stem}_scale_inv"] = np.full((shape[0] // 128, shape[1] // 128), 2.0**-12, np.float32)
                else:
                    tensors[stem] = rng.integers(0, 256, (shape[0], shape[1] // 2), np.uint8)
                    tensors[f"{stem}_scale"] = np.full((shape[0], shape[1] // 32), 115, np.uint8)
        (folder / f"layer{layer}.safetensors").write_bytes(file_bytes(tensors))
    return folder
