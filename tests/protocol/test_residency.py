"""A launch comes to its end with any of its CTAs, whenever the others start; and each rule that makes it so is needed."""

import re

import pytest

from tests.protocol.residency import Blocker, Claims, Mechanism, Scene
from tests.protocol.residency_explorer import explore

COLLECTIVE = Blocker((0, 1))  # on both GPUs at once
ON_0, ON_1 = Blocker((0,)), Blocker((1,))  # end at any moment
FOREVER_ON_0, FOREVER_ON_1 = Blocker((0,), ends=False), Blocker((1,), ends=False)

# Of a rank's two CTAs either may come first; the other one at any time, or not before the first one has ended.
SCENES = {
    "a collective": Scene(),
    "a kernel on each GPU": Scene(blockers=(ON_0, ON_1)),
    "a kernel on each GPU, for ever": Scene(blockers=(FOREVER_ON_0, FOREVER_ON_1)),
    "first units of both kinds": Scene(gate_up=(1, 1), down=(1, 2)),
    "many units": Scene(gate_up=(3, 2), down=(1, 1), num_launches=1),
    "rings of images": Scene(gate_up=(4, 1), down=(2, 1), slots_of_rings=(2, 3), num_launches=1),
    "an idle rank": Scene(gate_up=(2, 0), down=(1, 0)),
    "idle ranks": Scene(gate_up=(0, 0), down=(0, 0)),
    "three CTAs": Scene(ctas=(3, 1), gate_up=(1, 1), down=(3, 1), num_launches=1, blockers=(FOREVER_ON_0,)),
    "fewer units than CTAs": Scene(ctas=(3, 1), gate_up=(1, 1), down=(1, 1), blockers=(FOREVER_ON_0, FOREVER_ON_0)),
    "three ranks": Scene(ctas=(2, 1, 1), gate_up=(1, 1, 0), down=(1, 1, 0), blockers=(Blocker((0, 1, 2)),)),
}
IDLE, DEADLOCK = SCENES["an idle rank"], "nobody can go on"
DISPATCHED_TWICE, MULTIPLIED_TWICE = "share 0 is dispatched twice", "unit 0 is multiplied twice"
NONE = Claims(taken_over=False)
BROKEN = {
    "nothing is taken over": (Mechanism(shares=NONE, units=NONE, ids_taken_over=False), Scene(), DEADLOCK),
    "shares are not": (Mechanism(shares=NONE), Scene(), DEADLOCK),
    "first units are not": (Mechanism(units=NONE), Scene(), DEADLOCK),
    "ids are not": (Mechanism(ids_taken_over=False), Scene(), DEADLOCK),
    "a late CTA dispatches all the same": (Mechanism(shares=Claims(heeded=False)), Scene(), DISPATCHED_TWICE),
    "a late CTA multiplies all the same": (Mechanism(units=Claims(heeded=False)), Scene(), MULTIPLIED_TWICE),
    "shares are taken over by a store": (Mechanism(shares=Claims(swapped=False)), Scene(), DISPATCHED_TWICE),
    "units are taken over by a store": (Mechanism(units=Claims(swapped=False)), Scene(), MULTIPLIED_TWICE),
    "a late CTA leaves its claim of a share": (Mechanism(shares=Claims(returned=False)), Scene(), DEADLOCK),
    "a late CTA leaves its claim of a unit": (Mechanism(units=Claims(returned=False)), Scene(), DEADLOCK),
    "CTA 0 announces that a rank is idle": (Mechanism(idle_by_first=False), IDLE, DEADLOCK),
    "CTAs divide the ranks that ids go to": (Mechanism(ids_to_all=False), Scene(), DEADLOCK),
    "the own ids are waited for last": (
        Mechanism(own_ids_in_turn=False),
        SCENES["a kernel on each GPU, for ever"],
        DEADLOCK,
    ),
    "first units are looked at backwards": (Mechanism(looks_in_order=False), SCENES["three CTAs"], DEADLOCK),
    "no look before the first down unit": (Mechanism(looks_before_down=False), Scene(), DEADLOCK),
    "no look before the end": (
        Mechanism(looks_before_end=False),
        SCENES["first units of both kinds"],
        DEADLOCK,
    ),
    "no look before images wait for a place": (
        Mechanism(looks_before_ring=False),
        SCENES["rings of images"],
        DEADLOCK,
    ),
    "the ring of activations is as short as that of tokens": (
        Mechanism(),
        Scene(gate_up=(4, 1), down=(2, 1), slots_of_rings=(2, 1), num_launches=1),
        DEADLOCK,
    ),
    "one place for ids": (Mechanism(id_places=1), Scene(), r"ids of rank 1 are 2, wanted 1"),
}


LONG = ("three ranks", "three CTAs", "fewer units than CTAs", "a kernel on each GPU")


@pytest.mark.parametrize(
    "scene",
    [
        pytest.param(scene, id=name, marks=[pytest.mark.exhaustive] if name in LONG else [])
        for name, scene in SCENES.items()
    ],
)
def test_any_ctas_are_enough(scene):
    outcome = explore(scene, Mechanism())
    assert outcome.error is None, outcome.trace
    assert outcome.num_states > 1_000


def test_steps_that_commute_in_all_orders():
    """Fewer CTAs, fewer units and one launch, since there are many more states."""
    scene = Scene(ctas=(2, 1), gate_up=(1, 1), num_launches=1, blockers=(FOREVER_ON_0,))
    outcome = explore(scene, Mechanism(), tries_all=True)
    assert outcome.error is None, outcome.trace
    assert outcome.num_states > 10_000


@pytest.mark.parametrize(("mechanism", "scene", "error"), BROKEN.values(), ids=BROKEN)
def test_each_rule_is_needed(mechanism, scene, error):
    outcome = explore(scene, mechanism)
    assert outcome.error is not None and re.search(error, outcome.error), outcome


def test_without_taking_over_a_collective_and_a_launch_wait_for_each_other():
    """It has a slot on one GPU, and on the other one CTAs that wait for what its place keeps from starting have all."""
    mechanism, scene, _ = BROKEN["nothing is taken over"]
    assert re.fullmatch(r"blocker 0 starts on GPU \d", explore(scene, mechanism).trace[-1])


def test_blockers_that_fill_a_gpu_are_beyond_help():
    """A launch needs one slot."""
    outcome = explore(Scene(blockers=(COLLECTIVE, COLLECTIVE), spare_slots=0), Mechanism())
    assert outcome.error == DEADLOCK
