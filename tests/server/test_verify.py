"""``trimtab verify``: engines in this process, on the tiny checkpoint, right and broken."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from directions.errors import TrimtabError
from server.cli.main import app
from server.verify import Check, Finding, Verification, bound_of
from tests.server.served import put_random_direction, write_policy


def run(*arguments: object) -> Result:
    env = {"COLUMNS": "200", "TERM": "dumb"}
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], env=env)


def report(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = run(*arguments, "--json")
    document = json.loads(result.stdout)
    assert isinstance(document, dict), result.stderr
    return result.exit_code, document


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def lasting_log() -> None:
    """vLLM logs to the stream that it finds when it is first imported: not to a command's, which closes."""
    import vllm.logger  # noqa: F401


def test_the_bound_is_a_ten_thousandth_of_a_nat_or_twice_a_larger_floor() -> None:
    assert bound_of(0.0) == bound_of(1e-4) == 1e-4
    assert bound_of(1.5e-4) == 3e-4


@pytest.mark.parametrize(
    ("verdict", "asked", "holds"),
    [
        ("pass", False, True),
        ("pass", True, True),
        ("not available", False, True),
        ("not available", True, False),
        ("FAIL", False, False),
        ("no effect", False, False),
        ("not checked", False, False),
    ],
)
def test_only_a_site_that_nobody_asked_for_may_be_missing(
    verdict: Any, asked: bool, holds: bool
) -> None:
    finding = Finding(Check("mlp", "ablate", ("p",), asked), verdict)
    passed = Finding(Check("residual", "add", ("q",)), "pass")
    assert finding.holds is holds
    assert Verification(1e-6, 24, (passed, finding)).holds is holds


def test_help_states_the_rule_and_loads_nothing() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "not available" in result.stdout
    assert "--policy" in result.stdout


def test_what_is_wrong_with_the_arguments_is_bad_input(tmp_path: Path, home: Path) -> None:
    code, document = report(tmp_path / "gone")
    assert (code, document["error"]["code"]) == (2, "E_MODEL_NOT_FOUND")
    bad = tmp_path / "bad.yaml"
    bad.write_text("apiVersion: trimtab/v1\nkind: Policy\nname: bad\nmoode: off\n")
    code, document = report(tmp_path, "--policy", bad)
    assert (code, document["error"]["code"]) == (2, "E_POLICY_KEY")
    code, document = report(tmp_path, "--think-start", "<a>")
    assert (code, document["error"]["code"]) == (2, "E_THINKING_MARKERS")


@pytest.mark.engine
@pytest.mark.usefixtures("lasting_log")
def test_every_edit_at_every_site_passes_on_the_tiny_model(tiny_checkpoint: Path) -> None:
    code, document = report(tiny_checkpoint)
    rows = document["rows"]
    assert {row["verdict"] for row in rows} == {"pass"}, rows
    assert (code, document["holds"]) == (0, True)
    sites = Counter(row["site"] for row in rows)
    assert sites == {
        "residual": 5,
        "attention": 1,
        "mlp": 1,
        "heads": 2,
        "gate": 4,
        "all": 1,
        # Four probes of two outputs.
        "probe": 8,
    }
    # Four plain answers, two of each policy, and gates have a policy either side of the threshold.
    assert document["tokens"] == 24 * (4 + 2 * (10 + 2 * 4))
    assert 0 < document["floor"] <= document["bound"] == 1e-4
    for row in rows:
        assert row["difference"] <= 1e-4, row
        assert row["effect"] > 1000 * row["difference"], row


@pytest.mark.engine
@pytest.mark.usefixtures("lasting_log")
def test_an_edit_that_is_a_hundredth_too_strong_fails_where_it_acts(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steering.engine import sites

    original = sites.scale_heads_on_host
    calls = []

    def broken(out: Any, heads: Any, *rest: Any) -> None:
        calls.append(out.shape)
        original(out, heads * 1.01, *rest)

    monkeypatch.setattr(sites, "scale_heads_on_host", broken)
    result = run(tiny_checkpoint)
    assert calls
    assert result.exit_code == 1
    lines = [line for line in result.stdout.splitlines() if "│" in line]
    failed = [line for line in lines if "FAIL: differs by" in line]
    scaled = [line for line in lines if "heads" in line or "several edits" in line]
    assert len(scaled) == 3
    assert set(scaled) <= set(failed)
    probes = [line for line in lines if "│ probe" in line]
    assert len(probes) == 8
    rest = [line for line in lines if line not in scaled and line not in probes]
    others = [line for line in rest if "│ gate" not in line]
    assert len(others) == 7
    assert all("pass" in line for line in others)


@pytest.mark.engine
@pytest.mark.usefixtures("lasting_log")
def test_a_policy_of_the_users_needs_its_sites(
    tiny_checkpoint: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steering.engine import worker

    def refuse(layer: Any, number: int) -> Any:
        raise TrimtabError("E_SITE_BLOCK", "the MLP block cannot be told", field="model")

    monkeypatch.setattr(worker, "find_blocks", refuse)
    put_random_direction(home, tiny_checkpoint)
    guard = write_policy(tmp_path, "guard", strength=2.0)
    deep = tmp_path / "deep.yaml"
    ablate = "ablate: {direction: north@1, sites: [mlp, residual]}"
    deep.write_text(
        f"apiVersion: trimtab/v1\nkind: Policy\nname: deep\nedits: {{still: {{{ablate}}}}}\n"
    )
    code, document = report(tiny_checkpoint, "--policy", guard, "--policy", deep)
    assert code == 1
    added, ablated = document["rows"]
    assert (added["site"], added["edit"], added["verdict"]) == ("residual", "guard@1: add", "pass")
    assert added["effect"] > 0.1
    assert (ablated["verdict"], ablated["difference"]) == ("not available", None)
    assert "the MLP block cannot be told" in ablated["reason"]
    assert document["holds"] is False
