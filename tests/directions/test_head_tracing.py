"""Tracing finds the heads that were planted, and each method gives what its formula says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from directions.card import HeadSetDraft, ProbeDraft
from directions.errors import TrimtabError
from directions.examples import Example, ExampleSet
from directions.fingerprint import fingerprint
from directions.head_scales import every_head, scaled
from directions.head_tracing import METHODS, HeadTracing, trace
from directions.language_model import LanguageModel, Reading, opened
from directions.objective import LogOdds, Objective, ProbeObjective
from directions.store import Store
from server.cli.main import app
from tests.conftest import build_tiny_checkpoint

READING = Reading(device="cpu", batch_size=5)
TEXTS = [f"Which way does ship {n} turn when the wind is {w}?" for n in range(4) for w in "ab"]
# Late, where a random model has little left to make of what a head writes.
PLANTED = [(2, 1), (3, 2)]


def tokens(model: LanguageModel) -> list[tuple[int, ...]]:
    return [model.prompt_tokens(Example((("user", text),), None)) for text in TEXTS]


def put_probe(home: Path, checkpoint: Path, layer: int | None, read_out: str = "affine") -> str:
    model = fingerprint(checkpoint)
    draft = ProbeDraft(
        method="random",
        model=model,
        dtype="float32",
        created="2026-01-01T00:00:00Z",
        site="final_norm" if layer is None else "residual",
        layer=layer,
        read_out=read_out,
        outputs=("first", "second"),
    )
    weights = np.random.default_rng(4).standard_normal((2, model.hidden_size)) * 0.1
    return Store(home).put_probe(draft, weights, [0.3, -0.2], name="p").reference


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of which two heads write against a probe of the last layer, and the store with it.

    What such a head writes is the same whatever the text: minus the probe's vector, once for the mean of
    its outputs at the texts' last tokens.
    """
    folder = tmp_path_factory.mktemp("planted")
    plain = build_tiny_checkpoint(folder / "plain")
    reference = put_probe(folder / "home", plain, 3)
    w = torch.tensor(Store(folder / "home").load_probe(reference).weights[0])
    with opened(plain, READING) as model:
        heads = every_head(model)
        seen: dict[int, list[torch.Tensor]] = {}
        for layer, _ in PLANTED:
            heads[layer].projection.register_forward_pre_hook(
                lambda m, inputs, layer=layer: seen.setdefault(layer, []).append(inputs[0][0, -1])
            )
        with torch.no_grad():
            for text in tokens(model):
                model.network(input_ids=torch.tensor([text]))
            for layer, head in PLANTED:
                of = heads[layer]
                piece = slice(head * of.width, (head + 1) * of.width)
                mean = torch.stack(seen[layer])[:, piece].mean(dim=0)
                against = -25.0 * torch.outer(w / w.norm() ** 2, mean / mean.norm() ** 2)
                of.projection.weight[:, piece] += against
        model.network.save_pretrained(folder / "planted")
        model.tokenizer.save_pretrained(folder / "planted")
    return folder / "planted", folder / "home"


@pytest.mark.parametrize("method", METHODS)
def test_the_planted_heads_are_those_with_the_most_evidence(planted, method) -> None:
    checkpoint, home = planted
    objective = ProbeObjective(Store(home).load_probe("p@1"))
    examples = ExampleSet("texts", tuple(Example((("user", t),), None) for t in TEXTS))
    made = HeadTracing(checkpoint, (examples,), objective, method, 2, READING).run()
    assert set(made.heads) == set(PLANTED)
    assert made.card.quality["texts"] == len(TEXTS)
    ref = made.store(Store(home), f"found-{method}")
    stored = Store(home).load_head_set(ref.reference)
    assert list(stored.heads) == made.heads
    assert stored.card.method == f"heads-{method}"
    assert stored.card.settings["objective"] == "log-odds of p@1/first"
    np.testing.assert_allclose(stored.evidence, [made.evidence[h] for h in made.heads], rtol=1e-6)


def objectives(home: Path) -> list[Objective]:
    store = Store(home)
    found: list[Objective] = [ProbeObjective(store.load_probe(ref), 1) for ref in ("p@1", "p@2")]
    return [*found, LogOdds(("The", "Which"), ("?", "sea"))]


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("objectives")
    put_probe(home, tiny_checkpoint, 2)
    put_probe(home, tiny_checkpoint, None)
    return tiny_checkpoint, home


@pytest.mark.parametrize("which", [0, 1, 2])
def test_causal_is_the_difference_and_gradient_its_derivative(world, which) -> None:
    checkpoint, home = world
    objective = objectives(home)[which]
    with opened(checkpoint, READING) as model:
        texts = tokens(model)
        causal = trace(model, objective, texts, "causal")
        gradient = trace(model, objective, texts, "gradient")
        heads = every_head(model)
        for layer, head in ((0, 1), (2, 3), (3, 0)):

            def mean(factor: float, layer: int = layer, head: int = head) -> float:
                factors = torch.ones(len(heads), heads[0].count)
                factors[layer, head] = factor
                values = []
                with torch.no_grad(), scaled(heads, factors):
                    for text in texts:
                        ids = torch.tensor([text])
                        values.append(float(objective.values(model, ids, torch.ones_like(ids))[0]))
                return float(np.mean(values))

            assert causal[layer, head] == pytest.approx(mean(0.0) - mean(1.0), abs=1e-4)
            slope = (mean(1.01) - mean(0.99)) / 0.02
            assert gradient[layer, head] == pytest.approx(-slope, abs=2e-3)
        if which == 0:
            # What is read after layer 2 does not depend on layer 3.
            assert np.abs(causal[3]).max() < 1e-6
            assert np.abs(gradient[3]).max() == 0.0


@pytest.mark.parametrize("which", [0, 1, 2])
def test_direct_is_all_that_attention_writes_when_summed(world, which) -> None:
    """The parts of all heads of a layer are what its attention adds to the stream, seen by the objective."""
    checkpoint, home = world
    objective = objectives(home)[which]
    with opened(checkpoint, READING) as model:
        texts = tokens(model)
        direct = trace(model, objective, texts, "direct")
        expected = np.zeros(len(model.layers))
        for text in texts:
            ids = torch.tensor([text])
            mask = torch.ones_like(ids)
            outputs: list[torch.Tensor] = []
            handles = [
                layer.self_attn.register_forward_hook(
                    lambda m, i, o, outputs=outputs: outputs.append(o[0][0, -1])
                )
                for layer in model.layers
            ]
            with torch.no_grad():
                vector, depth = objective.sensitivity(model, ids, mask)
            for handle in handles:
                handle.remove()
            for layer in range(depth):
                expected[layer] -= float(outputs[layer] @ vector[0])
        np.testing.assert_allclose(direct.sum(axis=1), expected / len(texts), atol=1e-4)


def test_a_last_layer_s_head_has_the_same_evidence_by_every_method_for_a_linear_read_out(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Only the MLP of its own layer stands between; without it all three agree exactly."""
    objective = ProbeObjective(Store(tmp_path).load_probe(put_probe(tmp_path, tiny_checkpoint, 3)))
    with opened(tiny_checkpoint, READING) as model:
        with torch.no_grad():
            model.layers[3].mlp.down_proj.weight.zero_()
        found = [trace(model, objective, tokens(model), method)[3] for method in METHODS]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    np.testing.assert_allclose(found[0], found[2], atol=1e-4)


def test_what_cannot_be_an_objective_is_refused(world, tmp_path: Path) -> None:
    checkpoint, home = world
    cosine = put_probe(tmp_path, checkpoint, 1, "cosine")
    with pytest.raises(TrimtabError, match="E_OBJECTIVE"):
        ProbeObjective(Store(tmp_path).load_probe(cosine))
    with pytest.raises(TrimtabError, match="E_PROBE_OUTPUT"):
        ProbeObjective(Store(home).load_probe("p@1"), 2)
    with opened(checkpoint, READING) as model:
        for wanted, unwanted in ((("The",), ("The",)), (("",), ("x",))):
            with pytest.raises(TrimtabError, match="E_OBJECTIVE"):
                LogOdds(wanted, unwanted).tokens(model)


def test_the_command_stores_what_it_finds_and_draws_it(
    planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, home = planted
    monkeypatch.setenv("TRIMTAB_HOME", str(home))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    arguments = ["heads", "trace", str(checkpoint), "--name", "suppression", "--device", "cpu"]
    arguments += ["--examples", str(prompts), "--top", "2"]
    run = CliRunner().invoke
    picture = tmp_path / "heads.png"
    done = run(app, [*arguments, "--probe", "p@1", "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    assert set(Store(home).load_head_set("suppression@1").heads) == set(PLANTED)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong, code in (
        ([], "E_OPTION"),
        (["--for", "The"], "E_OPTION"),
        (["--probe", "p@1", "--method", "guess"], "E_METHOD"),
        (["--probe", "nobody@1"], "E_ARTEFACT_UNKNOWN"),
        (["--probe", "p@1", "--picture", "here.jpg"], "E_OPTION"),
    ):
        refused = run(app, [*arguments, *wrong])
        assert refused.exit_code == 2
        assert code in refused.output


def test_the_dose_response_of_the_planted_heads_is_above_that_of_random_ones(
    planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, home = planted
    monkeypatch.setenv("TRIMTAB_HOME", str(home))
    store = Store(home)
    draft = HeadSetDraft(
        method="planted",
        model=fingerprint(checkpoint),
        dtype="float32",
        created="2026-01-01T00:00:00Z",
    )
    store.put_head_set(draft, PLANTED, [1.0, 1.0], name="planted")
    store.put_head_set(draft, [(3, 0), (3, 3)], [1.0, 1.0], name="others")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    arguments = ["--examples", str(prompts), "--probe", "p@1", "--device", "cpu", "--json"]
    run = CliRunner().invoke
    done = run(app, ["heads", "verify", str(checkpoint), "planted@1", *arguments])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["holds"] is True
    doses = {dose["factor"]: dose for dose in found["doses"]}
    assert list(doses) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert doses[1.0]["objective"] == pytest.approx(found["plain"], abs=1e-4)
    # What was planted is 25 a head.
    assert doses[0.0]["objective"] - found["plain"] > 20
    assert doses[0.5]["objective"] > doses[0.75]["objective"] > doses[1.0]["objective"]
    assert len(doses[0.0]["controls"]) == 5
    done = run(app, ["heads", "verify", str(checkpoint), "others@1", *arguments])
    assert (done.exit_code, json.loads(done.stdout)["holds"]) == (1, False)
    wrong = run(
        app, ["heads", "verify", str(checkpoint), "planted@1", *arguments, "--factors", "x"]
    )
    assert wrong.exit_code == 2
    assert "E_OPTION" in wrong.output
