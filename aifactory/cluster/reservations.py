"""Reservations: the placement groups of this job, and those among them that nobody is there to give back."""

from __future__ import annotations


def free_orphans() -> int:
    """Remove the groups of this job whose actor has ended without doing so; how many there were.

    Ray 2.60 frees a group with its job, or with the actor that made it where that is detached; of one that was killed within a job
    that goes on, the CPUs stay reserved. What belongs to a driver, or is detached, is left alone.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job, nobody = ray.get_runtime_context().get_job_id(), ray.ActorID.nil().binary()
    orphans = [
        group
        for group in map(
            PlacementGroupTableData.FromString, state._connect_and_get_accessor().get_placement_group_table()
        )
        if group.state != PlacementGroupTableData.REMOVED
        and group.creator_job_id.hex() == job
        and group.creator_actor_id != nobody
        and group.creator_actor_dead
        and not group.is_detached
    ]
    for group in orphans:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return len(orphans)
