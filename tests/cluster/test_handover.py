"""Laws of what is handed to a job: it is found on the cluster as it was given, the newest one, by its own factory alone."""

from __future__ import annotations

import pytest

from aifactory.cluster.handover import HANDOVER_VARIABLE, hand_over, handed_over
from aifactory.errors import PlacementError


def test_what_was_handed_over_last_is_found_by_its_own_factory_alone(ray_session: None) -> None:
    for text in ('{"name": "handed"}', '{"name": "handed", "later": true}'):
        hand_over("handed", text)

    assert handed_over("handed") == '{"name": "handed", "later": true}'
    with pytest.raises(PlacementError, match=f"other.*found none.*{HANDOVER_VARIABLE}"):
        handed_over("other")
