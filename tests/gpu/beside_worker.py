"""The layer beside work that does not depend on it, run after run: `python -m tests.gpu.beside_worker [runs|measure]`.

By hand, all GPUs in this process; test_beside.py starts it, with a process for each GPU too.
`runs` compares every result of every run, `MEGAMOE_BESIDE_RUNS` of each kind, and says one line for each kind.
`measure` says how long programs take on XLA's own stream and on that of its collectives.
"""

import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_megamoe as mm
from jax_megamoe import expert_parallel
from jax_megamoe.primitives import _library
from tests.support import chain as chains
from tests.support.compare import judge
from tests.support.hlo import is_fused
from tests.support.meshes import mesh_of
from tests.support.meshes import place as place_on
from tests.support.problems import Sizes, make_problem, make_weights
from tests.support.processes import Place, join, leave, meet, say
from tests.support.skips import why_no_testing

RUNS = int(os.environ.get("MEGAMOE_BESIDE_RUNS", "250"))  # of each kind, captured and not
ENQUEUED = 10  # runs that wait for none of each other
LAYERS, TOKENS = 6, 64
SIZES = Sizes(hidden=1024, inter=512, num_experts=8, top_k=6)  # of each rank
# FP32 numbers of each rank in a collective: 64 MiB, whose kernel holds its SMs for long enough.
NUMBERS = int(os.environ.get("MEGAMOE_BESIDE_NUMBERS", str(16 << 20)))
TURNS = 16  # factors of the numbers, so that a result of the run before is a wrong one

SHIFT, PERIOD = 37, 1021


def sizes_of(ranks: int) -> Sizes:
    """Of all ranks."""
    return SIZES._replace(num_experts=ranks * SIZES.num_experts)


def numbers(rank: Any, position: Any) -> Any:
    """What a rank has at a position, whole numbers: their sums are exact in every order."""
    return ((position + SHIFT * rank) % PERIOD).astype(jnp.float32)


def psum(b: jax.Array, rank: Any, ranks: int) -> tuple[jax.Array, jax.Array]:
    positions = jnp.arange(b.size)
    return jax.lax.psum(b, "expert"), sum(numbers(r, positions) for r in range(ranks))


def gather(b: jax.Array, rank: Any, ranks: int) -> tuple[jax.Array, jax.Array]:
    """As FSDP does with the next layer's weights."""
    return jax.lax.all_gather(b, "expert"), numbers(jnp.arange(ranks)[:, None], jnp.arange(b.size)[None])


def scatter(b: jax.Array, rank: Any, ranks: int) -> tuple[jax.Array, jax.Array]:
    positions = rank * (b.size // ranks) + jnp.arange(b.size // ranks)
    return jax.lax.psum_scatter(b.reshape(ranks, -1), "expert"), sum(numbers(r, positions) for r in range(ranks))


def permute(b: jax.Array, rank: Any, ranks: int) -> tuple[jax.Array, jax.Array]:
    ring = [(r, (r + 1) % ranks) for r in range(ranks)]
    return jax.lax.ppermute(b, "expert", ring), numbers((rank - 1) % ranks, jnp.arange(b.size))


def all_to_all(b: jax.Array, rank: Any, ranks: int) -> tuple[jax.Array, jax.Array]:
    positions = rank * (b.size // ranks) + jnp.arange(b.size // ranks)[None]
    return jax.lax.all_to_all(b.reshape(ranks, -1), "expert", 0, 0), numbers(jnp.arange(ranks)[:, None], positions)


COLLECTIVES = {"psum": psum, "gather": gather, "scatter": scatter, "permute": permute, "all_to_all": all_to_all}
# The layer alone comes first. Of the others, `group` has a second expert group, and two have something outside the program.
KINDS = ("alone", *COLLECTIVES, "group", "transfers", "spinner")


def pinned(x: Any, weights: Any, ids: Any, topk_weights: Any) -> Any:
    """The layer on the stream of XLA's collectives."""
    on_stream = compute_on(compute_type="gpu_stream:collective", out_memory_spaces=jax.memory.Space.Device)
    return on_stream(lambda: mm.moe(x, weights, ids, topk_weights))()


def count_wrong(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """In how many numbers the bits differ."""
    words = {2: jnp.uint16, 4: jnp.uint32}[found.dtype.itemsize]
    return (jax.lax.bitcast_convert_type(found, words) != jax.lax.bitcast_convert_type(wanted, words)).sum()


def program(mesh: Mesh, beside: Any = None, layer: Callable[..., Any] = mm.moe, layers: int = LAYERS) -> Any:
    """Layers, each beside a collective; of each rank [wrong numbers of the layers, wrong ones of the collectives].

    A layer and its collective need what the two before them gave, and nothing of each other: XLA would otherwise have
    all collectives but one before the first layer.
    """
    ranks = mesh.size

    def run(turn: Any, big: Any, wanted: Any, *problem: Any) -> Any:
        rank, wrong = jax.lax.axis_index("expert"), [jnp.zeros(2, jnp.int32)]

        def checked_layer(x: Any, *others: Any) -> Any:
            i, never = len(wrong) - 1, wrong[-1].sum() < 0
            other = jnp.int32(0)
            if beside is not None:
                factor = jnp.where(never, 0, turn[0] + i)
                found, expected = beside(big * factor, rank, ranks)
                other = count_wrong(found, expected * factor)
            y = layer(jnp.where(never, -x, x), *others)
            wrong.append(jnp.stack([count_wrong(y, wanted[i]), other]))
            return y

        chains.chain(layers, checked_layer)(*problem)
        return jnp.stack(wrong).sum(0)[None]

    ranked = P("expert")
    return chains.per_rank(run, mesh, (ranked, ranked, P(None, "expert"), *(ranked,) * 4), ranked)


def two_groups(mesh: Mesh) -> Any:
    """On a mesh of two axes, two independent layers: one over each axis."""

    def run(wanted: Any, others_wanted: Any, x: Any, weights: Any, ids: Any, topk_weights: Any, others: Any) -> Any:
        one = chains.chain(LAYERS)(x, weights, ids, topk_weights)
        second = lambda *operands: mm.moe(*operands, expert_axis="other", token_axes=("expert", "other"))  # noqa: E731
        two = chains.chain(LAYERS, second)(x, others, ids, topk_weights)
        return jnp.stack([count_wrong(one, wanted), count_wrong(two, others_wanted)])[None]

    tokens, results = P(("expert", "other")), P(None, ("expert", "other"))
    in_specs = (results, results, tokens, P("expert"), tokens, tokens, P("other"))
    return chains.per_rank(run, mesh, in_specs, tokens)


class Way(NamedTuple):
    """Compiled programs that take turns, and the arguments of each of their turns."""

    programs: list[Any]
    arguments: list[list[tuple[Any, ...]]]


class Beside:
    """The programs of all kinds, captured and not, and their arguments on the devices."""

    def __init__(self, place: Place) -> None:
        self.place, self.devices = place, jax.devices()
        on_gpu = self.devices[0].platform == "gpu"
        if place.processes == 1:
            self.devices = self.devices[: 1 << (len(self.devices).bit_length() - 1)]
        ranks = len(self.devices)
        self.problem = make_problem(TOKENS * ranks, sizes_of(ranks))
        lowered: dict[bool, dict[Any, Any]] = {True: {}, False: {}}
        self.arguments: dict[str, list[list[tuple[Any, ...]]]] = {}
        meshes = [mesh_of(self.devices[::step], {"expert": ranks}) for step in (1, -1)]
        placed = [self._place(mesh) for mesh in meshes]
        for kind in ("alone", "reversed", *COLLECTIVES):
            backwards = kind == "reversed"
            function = program(meshes[backwards], COLLECTIVES.get(kind))
            self.arguments[kind] = [placed[backwards]]
            self._lower(lowered, kind, function)
        self.arguments["transfers"] = self.arguments["spinner"] = self.arguments["alone"]
        self.arguments["group"] = [*self.arguments["alone"], *self.arguments["reversed"]]
        if ranks >= 4:
            self.arguments["group"] = [self._place_two_groups()]
            self._lower(lowered, "group", two_groups(self.mesh_of_two))
        # One after the other, since processes tell each other by module what they have tuned, and these are the same ones.
        self.compiled = {**chains.compile_all(lowered[True]), **chains.compile_all(lowered[False])}
        assert not on_gpu or all(map(is_fused, self.compiled.values()))
        self.wrong_alone = self._check_alone()

    def _lower(self, lowered: dict[bool, dict[Any, Any]], kind: str, function: Any) -> None:
        for captured in (True, False):  # default flags capture
            options = None if captured else chains.NOT_CAPTURED
            lowered[captured][kind, captured] = jax.jit(function, compiler_options=options).lower(
                *self.arguments[kind][0][0]
            )

    def _place(self, mesh: Mesh) -> list[tuple[Any, ...]]:
        """The arguments of each turn."""
        ranks = mesh.size
        x, weights, ids, topk_weights = (place_on(mesh, value, "expert") for value in self.problem)
        ys = jax.jit(chains.per_rank(chains.chain(LAYERS), mesh, (P("expert"),) * 4, P(None, "expert")))
        wanted = ys(x, weights, ids, topk_weights)
        make_big = chains.per_rank(lambda own: numbers(own[0], jnp.arange(NUMBERS)), mesh, P("expert"), P("expert"))
        big = jax.jit(make_big)(place_on(mesh, np.arange(ranks, dtype=np.int32), "expert"))
        turns = [place_on(mesh, np.full(ranks, turn, np.float32), "expert") for turn in range(1, TURNS + 1)]
        return [(turn, big, wanted, x, weights, ids, topk_weights) for turn in turns]

    def _place_two_groups(self) -> list[tuple[Any, ...]]:
        ranks = len(self.devices)
        self.mesh_of_two = mesh = mesh_of(self.devices, {"expert": 2, "other": ranks // 2})
        tokens = ("expert", "other")
        x, ids, topk_weights = (place_on(mesh, value, tokens) for value in (*self.problem[:1], *self.problem[2:]))
        others = make_weights(sizes_of(ranks), seed=1)
        alone = [self._on_one_device(weights) for weights in (self.problem.weights, others)]
        wanted = [place_on(mesh, ys, None, tokens) for ys in alone]
        placed = (place_on(mesh, w, axis) for w, axis in ((self.problem.weights, "expert"), (others, "other")))
        weights, others = placed
        return [(*wanted, x, weights, ids, topk_weights, others)]

    def _on_one_device(self, weights: Any) -> np.ndarray:
        return np.asarray(jax.jit(chains.chain(LAYERS))(*self.problem._replace(weights=weights)))

    def _check_alone(self) -> str:
        """What the others are compared with, beside the bits that one device gives."""
        wanted = self._on_one_device(self.problem.weights)
        for kind in ("alone", "reversed"):
            for shard in self.arguments[kind][0][0][2].addressable_shards:
                if (verdict := judge(shard.data, wanted[shard.index])) != "right":
                    return f"{kind}, against one device: {verdict}"
        return ""

    def way(self, kind: str, captured: bool) -> Way:
        kinds = {"transfers": ["alone"], "spinner": ["alone"], "group": ["alone", "reversed"]}.get(kind, [kind])
        if ("group", captured) in self.compiled and kind == "group":
            kinds = ["group"]
        return Way([self.compiled[each, captured] for each in kinds], self.arguments[kind])


def start_run(way: Way, number: int) -> Any:
    which = number % len(way.programs)
    turns = way.arguments[which]
    return way.programs[which](*turns[number % len(turns)])


def counts(result: Any) -> np.ndarray:
    """Of this process's ranks: wrong numbers of the layers, and of what is beside them."""
    return np.concatenate([np.asarray(shard.data) for shard in result.addressable_shards])


def run_all(way: Way, runs: int, before_each: Callable[[int], None]) -> tuple[int, str]:
    """How many runs came to an end, and what was wrong in the last one, if anything was."""
    for first in range(0, runs, ENQUEUED):
        numbers_of_runs = range(first, min(first + ENQUEUED, runs))
        try:
            results = []
            for number in numbers_of_runs:
                before_each(number)
                results.append(start_run(way, number))
            for number, result in zip(numbers_of_runs, results, strict=True):
                if (wrong := counts(result)).any():
                    text = f"wrong numbers {wrong.tolist()} (of the layers, of what is beside them; for each rank)"
                    return number, f"{text}; failures {expert_parallel.failures()}"
        except jax.errors.JaxRuntimeError as error:
            return first, f"{type(error).__name__}: {str(error)[:400]}; failures {expert_parallel.failures()}"
    return runs, ""


def recover(alone: Way) -> bool:
    """Goes on with the layer alone until it is right again: one run may raise the error, the next one mends the group."""
    for number in range(3):
        try:
            if not counts(start_run(alone, number)).any():
                return True
        except jax.errors.JaxRuntimeError as error:
            say(recovering=str(error)[:300])
    return False


class Transfers:
    """A thread that copies to the devices of this process and back while programs run."""

    def __init__(self) -> None:
        self._done, self.wrong = threading.Event(), 0
        self.copies = 0
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        for seed in itertools.count():
            host = np.arange(seed, seed + (4 << 20), dtype=np.float32)
            for device in jax.local_devices():
                if self._done.is_set():
                    return
                self.wrong += not np.array_equal(np.asarray(jax.device_put(host, device)), host)
                self.copies += 1

    def end(self) -> str:
        self._done.set()
        self._thread.join(20)
        if self._thread.is_alive():
            return "the thread of the copies does not end"
        if self.wrong or not self.copies:
            return f"{self.wrong} of {self.copies} copies between host and device are wrong"
        return ""


def spin(number: int) -> None:
    """Takes SMs of this process's GPUs in turn, all or some, for one to three milliseconds."""
    devices = jax.local_devices()
    device = devices[number // 2 % len(devices)]
    _library._core.hold_sms(device.local_hardware_id, (8, 64, 100, 132)[number % 4], 1 + number % 3)  # type: ignore[union-attr]


def check_kinds(place: Place) -> None:
    begun = time.monotonic()
    beside = Beside(place)
    say(setup_seconds=round(time.monotonic() - begun, 1), devices=len(beside.devices), runs=RUNS)
    meet(place, "beside")
    state = {"layout": "one process" if place.processes == 1 else "a process for each GPU"}
    for captured, kind in itertools.product((True, False), KINDS):
        line: dict[str, Any] = {"kind": kind, **state, "captured": captured}
        if kind == "spinner" and (reason := why_no_testing()):
            say(**line, skip=reason)
            continue
        transfers = Transfers() if kind == "transfers" else None
        begun = time.monotonic()
        runs, wrong = run_all(beside.way(kind, captured), RUNS, spin if kind == "spinner" else lambda _: None)
        seconds = round(time.monotonic() - begun, 2)
        if transfers is not None:
            wrong = wrong or transfers.end()
            line["copies"] = transfers.copies
        if kind == "alone":
            wrong = wrong or beside.wrong_alone
        say(**line, runs=runs, seconds=seconds, outcome=wrong or "ok")
        meet(place, f"{captured}.{kind}")
        if runs < RUNS and not recover(beside.way("alone", captured)):
            say(**state, gave_up="the group did not recover: the kinds after this one are left out")
            return


def measure() -> None:
    """Microseconds of a run with a model's layer, pinned to the stream of XLA's collectives or not."""
    devices = jax.devices()
    mesh, ranks = mesh_of(devices, {"expert": len(devices)}), len(devices)
    sizes = sizes_of(ranks)
    if devices[0].platform == "gpu":
        sizes = sizes._replace(hidden=4096, inter=2048)
    problem = make_problem(TOKENS * ranks, sizes)
    placed = [place_on(mesh, value, "expert") for value in problem]
    ranked = P("expert")
    ys = jax.jit(chains.per_rank(chains.chain(LAYERS), mesh, (ranked,) * 4, P(None, "expert")))(*placed)
    big = place_on(mesh, np.ones(ranks * NUMBERS, np.float32), "expert")
    turn = place_on(mesh, np.ones(ranks, np.float32), "expert")
    arguments = (turn, big, ys, *placed)
    lowered = {
        (beside, captured, pin): jax.jit(
            program(mesh, COLLECTIVES.get(beside), pinned if pin else mm.moe),
            compiler_options=None if captured else chains.NOT_CAPTURED,
        ).lower(*arguments)
        for beside in ("nothing", "psum", "gather")
        for captured in (True, False)
        for pin in (False, True)
    }
    for (kind, captured, pin), compiled in chains.compile_all(lowered).items():
        say(kind=kind, captured=captured, pinned=pin, **time_runs(functools.partial(compiled, *arguments)))


def time_runs(call: Callable[[], Any], runs: int = 50) -> dict[str, Any]:
    """The fastest and the middle one of some rounds, in microseconds of a run."""
    try:
        for _ in range(3):
            jax.block_until_ready(call())
        rounds = []
        for _ in range(7):
            begun = time.monotonic()
            results = [call() for _ in range(runs)]
            jax.block_until_ready(results)
            rounds.append((time.monotonic() - begun) / runs * 1e6)
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)[:300], "failures": expert_parallel.failures()}
    layers_wrong = int(counts(results[-1])[:, 0].sum())
    return {"best_us": round(min(rounds), 1), "median_us": round(sorted(rounds)[3], 1), "layers_wrong": layers_wrong}


def main(what: str) -> None:
    place = join()
    if what == "measure":
        measure()
    else:
        check_kinds(place)
    leave(place)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs"])
