"""Leases: silence makes a device suspect, then lost; every sign of life makes it live again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wearfleet_cloud.service.leases import DeviceClass, Leases, LeaseState

SECONDS = {DeviceClass.GATEWAY: 60.0, DeviceClass.PHONE: 900.0, DeviceClass.WEARABLE: 86_400.0}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("kind", DeviceClass)
def test_a_silent_device_is_suspect_after_its_lease_and_lost_half_as_long_again_later(
    kind: DeviceClass,
) -> None:
    clock = Clock()
    leases = Leases(SECONDS, clock)
    leases.renew("a", kind)
    lease_s = leases.seconds("a")
    assert lease_s == SECONDS[kind]
    for share, state in ((1.0, LeaseState.LIVE), (1.4, LeaseState.SUSPECT), (1.6, LeaseState.LOST)):
        clock.now = 1000.0 + share * lease_s
        assert leases.state("a") == state
    assert leases.lost(("a", "b")) == ("a",)
    leases.renew("a")
    assert (leases.state("a"), leases.seconds("a")) == (LeaseState.LIVE, lease_s)


def test_a_device_that_does_not_say_what_it_is_is_a_wearable_and_begins_its_lease_when_it_is_asked_about() -> (
    None
):
    clock = Clock()
    leases = Leases(SECONDS, clock)
    assert leases.seconds("a") == SECONDS[DeviceClass.WEARABLE]
    clock.now += 1e6
    assert leases.state("a") == LeaseState.LIVE


@given(st.lists(st.floats(0.0, 59.0), max_size=30))
def test_who_is_heard_of_in_time_is_never_lost_however_long_it_works(silences: list[float]) -> None:
    clock = Clock()
    leases = Leases(SECONDS, clock)
    leases.renew("a", DeviceClass.GATEWAY)
    for silence in silences:
        clock.now += silence
        assert leases.state("a") == LeaseState.LIVE
        leases.renew("a")
