"""What a worker does with a request, and what it reports of it; it never raises for one request's sake."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from steering.engine.runner import REPORTS, Reports, WorkerRequests, attach_reports
from tests.steering.engine.small_plans import HIDDEN, uniform, worker


def stamped(plan: object, strength: object = 1.0) -> dict[str, object]:
    return {"trimtab": {"plan": plan, "strength": strength}}


def placed(requests: WorkerRequests) -> dict[str, tuple[bool, str | None]]:
    reports = requests.take_reports()
    return {} if reports is None else reports.placed


def test_a_worker_reports_what_became_of_each_plan_and_never_raises() -> None:
    requests = worker(num_slots=2)
    requests.step.tables.add_plan(uniform("a"))
    requests.step.tables.add_plan(uniform("b"))
    requests.enter("plain", None)
    requests.enter("fits", stamped("a"))
    requests.enter("full", stamped("b"))
    requests.enter("unknown", stamped("zzz"))
    requests.enter("broken", stamped(7, "much"))
    assert placed(requests) == {
        "fits": (True, None),
        "full": (False, "slots_exhausted"),
        "unknown": (False, "plan_unknown"),
        "broken": (False, "internal"),
    }
    assert placed(requests) == {}
    for name in ("plain", "fits", "full", "unknown", "broken", "never seen"):
        requests.leave(name)
    assert requests.step.tables.pinned == 0


def test_a_request_for_which_there_is_no_row_is_told_so_and_pins_nothing() -> None:
    requests = worker(rows=3)  # the first is nobody's
    requests.step.tables.add_plan(uniform("a"))
    requests.step.tables.add_plan(uniform("b"))
    requests.enter("1", stamped("a"))
    requests.enter("2", stamped("a"))
    requests.enter("3", stamped("b"))
    assert placed(requests) == {
        "1": (True, None),
        "2": (True, None),
        "3": (False, "slots_exhausted"),
    }
    assert set(requests.placements) == {"1", "2"}
    assert requests.step.tables.pinned == 1
    requests.leave("1")
    requests.enter("3", stamped("b"))
    assert placed(requests) == {"3": (True, None)}


def test_a_request_that_was_preempted_keeps_its_row_and_is_not_placed_again() -> None:
    requests = worker()
    requests.step.tables.add_plan(uniform("a"))
    requests.enter("1", stamped("a"))
    placement = requests.placements["1"]
    assert placed(requests) == {"1": (True, None)}
    requests.enter("1", stamped("a"))
    assert requests.placements["1"] is placement
    assert placed(requests) == {}
    requests.leave("1")
    assert requests.step.tables.pinned == 0


def test_an_id_that_is_used_again_with_another_stamp_gets_what_the_new_one_says() -> None:
    requests = worker()
    requests.step.tables.add_plan(uniform("a"))
    requests.step.tables.add_plan(uniform("b"))
    requests.enter("1", stamped("a"))
    requests.enter("1", stamped("b", 0.5))
    assert (requests.placements["1"].plan, requests.placements["1"].strength) == ("b", 0.5)
    assert requests.step.tables.pinned == 1


def test_a_row_that_could_not_be_written_is_not_found_later(monkeypatch) -> None:
    """A device that runs out of memory once must not leave an empty row that looks resident."""
    requests = worker(num_slots=2)
    tables = requests.step.tables
    tables.add_plan(uniform("a"))

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_write", fail)
        requests.enter("first", stamped("a"))
    requests.enter("second", stamped("a"))
    assert placed(requests) == {"first": (False, "internal"), "second": (True, None)}
    (slot,) = requests.placements["second"].resident.slots
    assert tables.add[1, slot].tolist() == [1.0] * HIDDEN


def test_a_row_that_the_request_s_own_tables_refuse_pins_no_slot(monkeypatch) -> None:
    requests = worker()
    requests.step.tables.add_plan(uniform("a"))
    monkeypatch.setattr(requests.step.requests, "_write", lambda *args: 1 / 0)
    requests.enter("first", stamped("a"))
    assert placed(requests) == {"first": (False, "internal")}
    assert requests.step.tables.pinned == 0


def test_a_fault_on_a_rank_that_nobody_hears_is_not_kept_quiet(monkeypatch) -> None:
    requests = worker(heard=False)
    requests.step.tables.add_plan(uniform("a"))
    monkeypatch.setattr(requests.step.tables, "_write", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        requests.enter("first", stamped("a"))


def test_reports_travel_with_the_output_now_or_once_it_is_there() -> None:
    outputs = pytest.importorskip("vllm.v1.outputs")
    reports = Reports({"1": (False, "plan_unknown")}, None)
    resolved = {"1": {"applied": False, "reason": "plan_unknown"}}

    now = outputs.ModelRunnerOutput(req_ids=["1"], req_id_to_index={"1": 0})
    assert getattr(attach_reports(now, reports), REPORTS) == resolved

    class Later(outputs.AsyncModelRunnerOutput):
        def get_output(self):
            return SimpleNamespace()

    later = attach_reports(Later(), reports)
    assert getattr(later.get_output(), REPORTS) == resolved

    empty = outputs.EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(attach_reports(empty, reports), REPORTS), "everyone shares that object"
