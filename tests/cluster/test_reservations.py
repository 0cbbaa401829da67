"""Laws of what is reserved: what a killed actor has left behind is freed, and nothing else."""

from __future__ import annotations

import time
from typing import Any

from aifactory.cluster.reservations import free_orphans


class Reserving:
    """An actor that reserves a place and never gives it back, as Ray Train's controller while it trains."""

    def reserve(self) -> str:
        import ray
        from ray.util.placement_group import placement_group

        group = placement_group([{"CPU": 0.1}])
        ray.get(group.ready())
        return str(group.id.hex())


def _state(group: str) -> str:
    from ray.util.placement_group import placement_group_table

    return str(placement_group_table()[group]["state"])


def _freed_in_the_end() -> int:
    deadline = time.monotonic() + 30
    while not (freed := free_orphans()) and time.monotonic() < deadline:
        time.sleep(0.1)  # Ray learns a moment later that an actor has ended
    return freed


def test_a_place_whose_actor_was_killed_is_freed_and_one_that_is_used_is_not(ray_session: None) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    actor: Any = ray.remote(num_cpus=0)(Reserving)
    killed, living = actor.remote(), actor.remote()
    left, used = ray.get([killed.reserve.remote(), living.reserve.remote()])
    own = placement_group([{"CPU": 0.1}])
    assert free_orphans() == 0

    ray.kill(killed)
    assert _freed_in_the_end() == 1
    assert (_state(left), _state(used), _state(own.id.hex())) == ("REMOVED", "CREATED", "CREATED")
    assert free_orphans() == 0

    ray.kill(living)
    assert _freed_in_the_end() == 1
    remove_placement_group(own)
