"""Laws of placement: what does not fit is refused at once, with what is asked and what is there."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from aifactory.cluster.placement import (
    Asked,
    asked_for_data,
    asked_for_serving,
    asked_for_training,
    number_fitting,
    require_placement,
    require_shared_state,
)
from aifactory.cluster.tasks import run_here, run_threads
from aifactory.config import Config
from aifactory.errors import PlacementError

SMALL = {"CPU": 2.0, "GPU": 0.0}


def config(**runtime):
    source = {"name": "docs", "kind": "text", "path": "docs"}
    return Config.model_validate({"name": "alpha", "ingest": {"sources": [source]}, "runtime": runtime})


def test_what_fits_is_accepted():
    asked = config(workers=2, cpus_per_worker=0.5, endpoint={"replicas": 2, "cpus_per_replica": 0.5})

    require_placement([*asked_for_training(asked), *asked_for_serving(asked)], [SMALL])
    require_placement(asked_for_data(asked), [SMALL])
    require_placement([Asked(what="x", number=20, each={"CPU": 0.1})], [SMALL])
    require_placement([], [])


def test_what_does_not_fit_is_refused_with_what_is_asked_and_what_is_there():
    asked = config(workers=2, endpoint={"replicas": 1, "cpus_per_replica": 0.1})

    with pytest.raises(PlacementError) as refused:
        require_placement([*asked_for_training(asked), *asked_for_serving(asked)], [SMALL])

    said = str(refused.value)
    assert "2 training workers (runtime.workers) of 1 CPU each" in said
    assert "1 replicas (runtime.endpoint.replicas) of 0.1 CPU each" in said
    assert "nodes with 2 CPU," in said
    assert "--set runtime.cpus_per_worker=0.5" in said


def test_one_unit_must_fit_on_one_node():
    asked = [Asked(what="workers", number=1, each={"CPU": 3.0})]

    with pytest.raises(PlacementError, match="2 CPU; 2 CPU"):
        require_placement(asked, [SMALL, SMALL])
    require_placement(asked, [SMALL, {"CPU": 3.0}])


def test_the_least_replicas_need_their_place_and_the_most_are_a_wish():
    asked = config(endpoint={"replicas": [2, 30], "cpus_per_replica": 1})

    require_placement(asked_for_serving(asked), [SMALL])
    with pytest.raises(PlacementError, match=r"30 replicas \(runtime.endpoint.replicas\)"):
        require_placement(asked_for_serving(asked, most=True), [SMALL])
    with pytest.raises(PlacementError, match="3 replicas"):
        require_placement(asked_for_serving(config(endpoint={"replicas": [3, 4], "cpus_per_replica": 1})), [SMALL])


def test_gpus_are_counted():
    asked = asked_for_training(config(workers=2, gpus_per_worker=1))

    with pytest.raises(PlacementError, match="1 CPU and 1 GPU each; found nodes with 8 CPU and 1 GPU"):
        require_placement(asked, [{"CPU": 8.0, "GPU": 1.0}])
    require_placement(asked, [{"CPU": 8.0, "GPU": 1.0}] * 2)


def test_large_units_find_their_place_beside_small_ones():
    asked = [Asked(what="small", number=2, each={"CPU": 0.5}), Asked(what="large", number=1, each={"CPU": 1.5})]

    require_placement(asked, [{"CPU": 1.5}, {"CPU": 1.0}])


def test_no_node_holds_nothing():
    with pytest.raises(PlacementError, match="no node"):
        require_placement(asked_for_data(config()), [])


def test_several_machines_need_a_database_that_is_no_file():
    with pytest.raises(PlacementError, match=r"\['a', 'b'\].*runtime\.state_url"):
        require_shared_state({"a", "b"}, sqlite=True, local_storage=False)
    require_shared_state({"a", "b"}, sqlite=False, local_storage=True)
    require_shared_state({"a"}, sqlite=True, local_storage=True)


def test_tasks_in_this_process_keep_their_order():
    assert run_here(divmod, [(7, 2), (9, 4)]) == [(3, 1), (2, 1)]
    assert run_here(divmod, []) == []


@pytest.mark.parametrize(("cpus", "fitting"), [(1.0, 1), (0.5, 3), (0.4, 4), (2.0, 1)])
def test_as_many_runs_fit_side_by_side_as_there_is_room_for_beside_what_is_served(cpus, fitting):
    asked = config(workers=1, cpus_per_worker=cpus, endpoint={"replicas": 1, "cpus_per_replica": 0.4})

    found = number_fitting(asked_for_training(asked), [SMALL], beside=asked_for_serving(asked), most=9)
    assert found == fitting
    assert number_fitting(asked_for_training(asked), [SMALL], beside=asked_for_serving(asked), most=2) == min(
        2, fitting
    )


def test_calls_in_threads_keep_their_order_and_so_many_run_at_once():
    both = threading.Barrier(2)

    def call(number):
        both.wait(timeout=30)  # nobody passes alone
        return number

    assert run_threads([partial(call, i) for i in range(4)], at_once=2) == [0, 1, 2, 3]
    assert run_threads([partial(str, 1)], at_once=5) == ["1"]


def test_where_one_call_fails_the_others_are_made_and_the_first_error_is_raised():
    made = []

    def call(number):
        if number in (1, 2):
            raise KeyError(number)
        made.append(number)

    with pytest.raises(KeyError, match="1"):
        run_threads([partial(call, i) for i in range(4)], at_once=1)
    assert made == [0, 3]
