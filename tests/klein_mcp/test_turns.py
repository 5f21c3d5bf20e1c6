"""The order of waiting jobs and what they hear of it, without threads."""

import pytest

from engine.contract import Job, Queued
from klein_mcp.jobs import turns as module
from klein_mcp.jobs.turns import Ticket, Turns, seconds_until_free


def ticket(client: str, prompt: str = "x", **more: float) -> Ticket:
    return Ticket(Job(prompt), client, lambda event: None, **more)  # type: ignore[arg-type]


def waiting(*clients: str) -> Turns:
    turns = Turns()
    for client in clients:
        turns.add(ticket(client))
    return turns


def test_clients_are_served_in_turn_whatever_they_sent():
    turns = waiting("a", "a", "a", "b", "c", "b")
    announced = [each.client for each in turns]
    assert announced == [turns.take().client for _ in range(6)] == ["a", "b", "c", "a", "b", "a"]
    assert not turns


def test_client_served_last_waits_for_all_others():
    turns = waiting("a", "b")
    assert turns.take().client == "a"
    turns.add(ticket("a"))
    turns.add(ticket("new"))
    assert [turns.take().client for _ in range(3)] == ["b", "new", "a"]


def test_steady_client_is_served_among_ever_new_ones():
    turns = waiting("steady", "new 0", "new 1", "new 2")
    served = []
    for number in range(3, 23):
        served.append(turns.take().client)
        turns.add(ticket("steady" if served[-1] == "steady" else f"new {number}"))
    assert served.count("steady") == 5  # of four that always wait, each has one turn in four


@pytest.mark.parametrize(("remembered", "order"), [(1, ["new", "a"]), (256, ["a", "new"])])
def test_client_that_was_forgotten_counts_as_new(remembered: int, order: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REMEMBERED_CLIENTS", remembered)
    turns = waiting("a", "b")
    for _ in range(2):
        turns.take()
    turns.add(ticket("new"))
    turns.add(ticket("a"))
    assert [each.client for each in turns] == order


def test_ticket_is_removed_once():
    turns, doomed = waiting("a"), ticket("a")
    turns.add(doomed)
    assert turns.count("a") == len(turns) == 2
    assert turns.remove(doomed)
    assert not turns.remove(doomed)
    assert (turns.count("a"), turns.clients) == (1, 1)


def test_positions_count_running_jobs_and_are_heard_once():
    heard: list[tuple[str, Queued]] = []
    turns = Turns()
    for client in ("a", "b"):
        turns.add(Ticket(Job(client), client, lambda event, client=client: heard.append((client, event))))  # type: ignore[arg-type]
    for _ in range(2):
        turns.tell_positions([ticket("z")], 1, lambda job: None)
    assert heard == [("a", Queued(1, None)), ("b", Queued(2, None))]
    del heard[:]
    turns.tell_positions([], 1, lambda job: 3.0)
    assert heard == [("a", Queued(0, 3.0)), ("b", Queued(1, 6.0))]


def test_free_slot_comes_when_the_first_running_job_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    running = [ticket("a", began=95.0), ticket("b", began=99.0)]
    assert seconds_until_free(running, 3, lambda job: 8.0) == 0.0
    assert seconds_until_free(running, 2, lambda job: 8.0) == 3.0
    assert seconds_until_free(running, 2, lambda job: 2.0) == 0.0
    assert seconds_until_free(running, 2, lambda job: None) is None
