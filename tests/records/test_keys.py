"""python -m pytest tests/records/test_keys.py"""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from aifactory.errors import ConfigError
from aifactory.records.journal import ANONYMOUS, Journal
from aifactory.records.keys import IssuedKey, Keys, KnownKey, hash_secret, read_token
from aifactory.records.limits import Limits, Subject
from aifactory.records.tables import metadata


@pytest.fixture
def keys(journal: Journal) -> Keys:
    return Keys(journal)


def parts(issued: IssuedKey) -> tuple[str, str]:
    found = read_token(issued.token)
    assert found is not None
    return found


def known(keys: Keys, issued: IssuedKey) -> KnownKey:
    found = keys.known(parts(issued)[0])
    assert found is not None
    return found


def whole_database(journal: Journal) -> str:
    with journal.database.read() as connection:
        return "\n".join(str(row) for table in metadata.sorted_tables for row in connection.execute(sa.select(table)))


def test_a_token_proves_its_key_and_no_other_text_does(keys, clock):
    first, second = keys.create("first"), keys.create("second")
    key_id, secret = parts(first)
    assert key_id == first.key.id

    found = known(keys, first)

    assert found.is_proved_by(secret, clock())
    assert not found.is_proved_by(parts(second)[1], clock())
    for near in (secret[:-1], secret + "0", secret.upper(), "", secret[:-1] + ("0" if secret[-1] != "0" else "1")):
        assert not found.is_proved_by(near, clock())
    for text in ("", first.token[:-1], first.token + "0", "Bearer " + first.token, first.token.replace("aif_", "sk-")):
        assert read_token(text) is None
    assert keys.known("key-" + "0" * 16) is None


def test_of_a_secret_only_a_salted_hash_is_anywhere_in_the_database(keys, journal):
    issued = [keys.create("one"), keys.create("two")]
    issued.append(keys.rotate("two", overlap_s=60))

    text = whole_database(journal)

    for each in issued:
        assert each.key.id in text
        assert parts(each)[1] not in text
        assert each.token not in text
    assert repr(issued[0]).count(parts(issued[0])[1]) == 0
    kept = [secret for each in issued[:2] for secret in known(keys, each).secrets]
    assert len({secret.salt for secret in kept}) == len(kept) == 3
    assert kept[0].hash == hash_secret(kept[0].salt, parts(issued[0])[1])


def test_a_rotated_key_keeps_its_id_and_its_old_secret_for_as_long_as_was_asked(keys, clock):
    old = keys.create("app")
    new = keys.rotate("app", overlap_s=10.0)
    assert new.key.id == old.key.id

    assert [known(keys, old).is_proved_by(parts(each)[1], clock()) for each in (old, new)] == [True, True]
    clock.at += 10.0
    assert [known(keys, old).is_proved_by(parts(each)[1], clock()) for each in (old, new)] == [False, True]

    newest = keys.rotate(new.key.id)
    good = [known(keys, old).is_proved_by(parts(each)[1], clock()) for each in (old, new, newest)]
    assert good == [False, False, True]


def test_a_longer_overlap_revives_no_secret_that_was_replaced(keys, clock):
    old = keys.create("app")
    keys.rotate("app")
    keys.rotate("app", overlap_s=1_000.0)

    assert not known(keys, old).is_proved_by(parts(old)[1], clock())


def test_a_key_ends_by_time_or_by_hand_and_then_for_good(keys, clock):
    forever, passing = keys.create("forever"), keys.create("passing", expires_in_s=5.0)
    assert [key.state(clock()) for key in keys.all()] == ["active", "active"]
    assert keys.has_active()

    clock.at += 5.0
    assert {key.name: key.state(clock()) for key in keys.all()} == {"forever": "active", "passing": "expired"}
    with pytest.raises(ConfigError, match="expired"):
        keys.rotate("passing")

    assert keys.revoke("forever").revoked_at == clock()
    clock.at += 1.0
    assert keys.revoke(forever.key.id).revoked_at == clock() - 1.0, "it stays as it was"
    with pytest.raises(ConfigError, match="revoked"):
        keys.rotate(forever.key.id)
    assert not keys.has_active()
    assert keys.revoke(passing.key.id).state(clock()) == "revoked"


def test_each_change_is_a_line_of_the_audit_and_the_chain_holds(keys, journal):
    issued = keys.create("app", team="search", scopes=["operate", "infer"], limited=Limits(concurrent=2))
    keys.rotate("app", overlap_s=3)
    keys.limit("team", "search", Limits(budget_tokens=5, budget_window="day"))
    keys.limit("key", ANONYMOUS, Limits())
    keys.revoke("app", reason="lost")
    keys.revoke("app", reason="once more")

    chain = journal.audited()

    assert chain.faults == []
    assert [(line.action, line.subject, line.key_id) for line in chain.lines] == [
        ("key_created", issued.key.id, "key-1"),
        ("limited", f"key {issued.key.id}", "key-1"),
        ("key_rotated", issued.key.id, "key-1"),
        ("limited", "team search", "key-1"),
        ("limited", "key anonymous", "key-1"),
        ("key_revoked", issued.key.id, "key-1"),
    ]
    assert chain.lines[0].detail["scopes"] == ["infer", "operate"]
    assert chain.lines[3].detail == {"budget_tokens": 5, "budget_window": "day"}
    assert chain.lines[5].detail == {"name": "app", "reason": "lost"}


def test_the_newest_limits_hold_and_none_are_none(keys):
    issued = keys.create("app", team="search")
    assert not known(keys, issued).is_limited

    keys.limit("key", "app", Limits(requests_per_minute=3, concurrent=1))
    keys.limit("key", issued.key.id, Limits(requests_per_minute=4))
    mine = Subject("key", issued.key.id)
    assert keys.limits_of(mine) == {mine: Limits(requests_per_minute=4)}
    assert known(keys, issued).is_limited
    keys.limit("key", "app", Limits())
    assert keys.limits_of() == {}
    assert not known(keys, issued).is_limited

    keys.limit("team", "search", Limits(concurrent=5))
    assert known(keys, issued).is_limited
    assert not known(keys, keys.create("other")).is_limited
    keys.limit("key", ANONYMOUS, Limits(concurrent=5))
    assert keys.known(ANONYMOUS).is_limited


def test_keys_of_another_factory_are_unknown(keys, journal):
    issued = keys.create("app")
    other = Keys(Journal(journal.database, "beta"))

    assert other.known(issued.key.id) is None
    assert other.all() == []
    with pytest.raises(ConfigError, match="expected the id or the name of a key"):
        other.revoke(issued.key.id)


def test_what_is_wrong_is_said(keys):
    for name in ("", "a" * 65, "anonymous", "key-1", "aif_x", "a\nb", "ä"):
        with pytest.raises(ConfigError, match="expected a name"):
            keys.create(name)
    with pytest.raises(ConfigError, match="name of a team"):
        keys.create("app", team="")
    for scopes in ([], ["infer", "admin"]):
        with pytest.raises(ConfigError, match="expected scopes of infer, feedback, operate"):
            keys.create("app", scopes=scopes)
    with pytest.raises(ConfigError, match="future"):
        keys.create("app", expires_in_s=0)
    keys.create("app")
    keys.create("app")
    with pytest.raises(ConfigError, match="2 keys named 'app'"):
        keys.rotate("app")
    with pytest.raises(ConfigError, match="overlap of 0 or more"):
        keys.rotate("app", overlap_s=-1)
    with pytest.raises(ConfigError, match="concurrent above 0, found 0"):
        keys.limit("team", "search", Limits(concurrent=0))
    assert len(keys.all()) == 2


def test_a_name_that_is_used_again_means_the_key_that_is_good(keys):
    first = keys.create("app")
    keys.revoke("app")
    second = keys.create("app")

    assert keys.rotate("app").key.id == second.key.id != first.key.id
