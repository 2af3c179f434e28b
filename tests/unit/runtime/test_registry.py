"""Which version is the champion, and how a person changes that; on a real store."""

import re
from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from tasks.core.errors import ConfigError
from tasks.runtime import mlflow_store, registry


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("store")
    (root / "dvc.yaml").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_ROOT", str(root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture
def three(store: None) -> Iterator[None]:
    """Versions 1, 2 and 3, none of them promoted; the last is the challenger."""
    client, _ = mlflow_store.open_store()
    for letter in "abc":
        registry.register("ppo", {"ppo/adapter": letter}, {"accepted": "True", "reasons": "good"})
    yield
    client.delete_registered_model(registry.MODEL)


def champion() -> int | None:
    found = registry.champion()
    return found.number if found else None


def promote(*numbers: int) -> None:
    for number in numbers:
        registry.set_champion(registry.find(str(number)), by="ann")


def rolled_back() -> int | None:
    registry.roll_back(by="bob", reason="it swears")
    return champion()


def test_a_version_is_found_by_number_and_by_alias(three: None) -> None:
    promote(1)
    assert registry.find("champion").number == 1
    assert registry.find("challenger").number == 3
    assert registry.find("2").weights == {"ppo/adapter": "b"}
    with pytest.raises(ConfigError, match=r"no version '7' of rlhf-policy; there are 1 \(champion\), 2, 3 \(challen"):
        registry.find("7")


def test_without_any_it_says_how_to_register_one(store: None) -> None:
    with pytest.raises(ConfigError, match="no policy is registered yet: `rlhf retrain`"):
        registry.find("champion")
    assert champion() is None


def test_the_same_weights_are_the_same_version_and_keep_what_was_decided(three: None) -> None:
    promote(1)
    again = registry.register("ppo", {"ppo/adapter": "a"}, {"accepted": "False"})
    assert again.number == 1
    assert again.tags["promoted.by"] == "ann"
    assert not again.accepted
    assert set(again.aliases) == {"champion", "challenger"}
    assert len(registry.versions()) == 3


def test_a_registration_that_was_cut_off_is_no_version_and_is_taken_up_again(
    three: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag, tags = registry._tag, {"accepted": "True", "win_rate": "0.7"}

    def cut_off(number: int | str, written: dict[str, str]) -> None:
        tag(number, dict(list(written.items())[: len(tags)]))
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "_tag", cut_off)
    with pytest.raises(KeyboardInterrupt):
        registry.register("ppo", {"ppo/adapter": "d"}, tags)
    monkeypatch.setattr(registry, "_tag", tag)
    assert [version.number for version in registry.versions()] == [1, 2, 3]
    assert registry.register("ppo", {"ppo/adapter": "d"}, tags).tags["win_rate"] == "0.7"


@pytest.mark.parametrize("promoted", [(1, 2, 3), (1, 2, 1)], ids=["each once", "one twice"])
def test_rollback_walks_back_over_every_promotion_and_ends(three: None, promoted: tuple[int, ...]) -> None:
    promote(*promoted)
    assert [rolled_back(), rolled_back()] == [2, 1]
    with pytest.raises(ConfigError, match="no champion was before version 1"):
        rolled_back()
    assert champion() == 1
    assert registry.find("1").withdrawal is None, "it is in use again"


def test_a_champion_named_in_mlflow_itself_is_known_too(three: None) -> None:
    client, _ = mlflow_store.open_store()
    client.set_registered_model_alias(registry.MODEL, registry.CHAMPION, "2")
    promote(3)
    assert rolled_back() == 2


def test_versions_that_were_deleted_are_skipped(three: None) -> None:
    promote(1, 2, 3)
    mlflow_store.open_store()[0].delete_model_version(registry.MODEL, "2")
    assert rolled_back() == 1


def test_a_promotion_that_broke_off_is_no_champion_before(three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_set_champion_alias", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            promote(3)
    assert champion() == 2
    assert rolled_back() == 1


@pytest.mark.parametrize("promoted", [(1,), (1, 2)], ids=["the first", "a later one"])
def test_every_champion_can_be_withdrawn_and_leaves_none(three: None, promoted: tuple[int, ...]) -> None:
    promote(*promoted)
    gone = registry.withdraw(by="bob", reason="it swears")
    assert gone.number == promoted[-1]
    assert champion() is None
    assert re.fullmatch("bob withdrew it at .*: it swears", registry.find(str(gone.number)).withdrawal or "")
    assert registry.find("3").aliases == ("challenger",)
    for attempt in (registry.withdraw, registry.roll_back):
        with pytest.raises(ConfigError, match="there is no champion"):
            attempt(by="bob")
    promote(3)
    if len(promoted) > 1:
        assert rolled_back() == 1, "the one that was withdrawn is not what a rollback restores"
    promote(gone.number)
    assert registry.find(str(gone.number)).withdrawal is None


def test_decisions_are_recorded(three: None) -> None:
    promote(1, 2)
    assert registry.find("2").tags["promoted.by"] == "ann"
    assert registry.find("2").tags["promoted.at"].endswith("+00:00")
    gone, back = registry.roll_back(by="bob", reason="it swears")
    assert (gone.number, back.number) == (2, 1)
    assert re.fullmatch("bob withdrew it at .*: it swears", registry.find("2").withdrawal or "")
    promote(2)
    assert registry.find("2").withdrawal is None


def test_promoting_an_old_version_leaves_the_challenger_and_no_version_is_promoted_twice(three: None) -> None:
    promote(1)
    assert registry.find("challenger").number == 3
    with pytest.raises(ConfigError, match="version 1 is the champion already"):
        promote(1)
    with pytest.raises(ConfigError, match="no champion was before"):
        rolled_back()
    promote(3)
    with pytest.raises(ConfigError, match="no version 'challenger'"):
        registry.find("challenger")


def test_a_refusal_after_the_gate_counts(three: None) -> None:
    registry.mark_refused(registry.find("3"), "a person refused it: it brags")
    assert not registry.find("3").accepted
    assert registry.find("3").tags["reasons"] == "a person refused it: it brags"
