"""Hostile calls of the group handlers on two GPUs, and after each of them the layer as it should be called.

`python -m tests.gpu.group_handlers_worker`, see test_group_handlers.py.
"""

import time

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tests.gpu.failure_worker import Session
from tests.support import hostile_calls
from tests.support.chain import per_rank
from tests.support.hostile_calls import FfiCall
from tests.support.processes import join, leave, say


def run(session: Session, call: FfiCall) -> str:
    """What a program of this one call on all ranks says: "launched", or why it was refused."""
    with jax.enable_x64(True):
        operands = [jnp.zeros(array.shape, array.dtype) for array in call.operand_types]
        program = per_rank(call.function, session.mesh, (P(),) * len(operands), P())
        try:
            jax.block_until_ready(jax.jit(program)(*operands))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            return str(error)
    return "launched"


def main() -> None:
    place = join()
    session = Session(place, captured=False)
    session.call("before")
    for name, call in hostile_calls.HOSTILE_OF_GROUPS.items():
        begun = time.monotonic()
        found = run(session, call)
        say(hostile=name, found=found, seconds=round(time.monotonic() - begun, 2))
        session.call(name)
    leave(place)


if __name__ == "__main__":
    main()
