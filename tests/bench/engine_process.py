"""One engine in a process of its own, driven over pipes by ``tests.bench.overhead``.

Reads one JSON command a line, ``{"case": …, "concurrency": …, "tokens": …}``, and answers each with the
seconds of processor time that the batch took. The first line that it prints says how long the engine took
to start and how much memory the process holds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CASES = (
    "idle",
    "one layer",
    "all layers",
    "all layers, a policy each",
    "all layers, 8 heads, 2 probes",
    "2 probes read",
)


def plans_for(model: Path, store_root: Path, concurrency: int) -> dict[str, list[Any]]:
    """Compiled plans by case, one per concurrent request."""
    import numpy as np

    from directions.card import CardDraft, ProbeDraft
    from directions.fingerprint import fingerprint
    from directions.store import Store
    from steering.plan import compile_policy
    from steering.policy import parse_policy

    served = fingerprint(model, weights=False)
    store = Store(store_root)
    size = (served.num_layers, served.hidden_size)
    vectors = np.random.default_rng(0).standard_normal(size).astype(np.float32) * 0.01
    draft = CardDraft(
        method="random",
        model=served,
        activation_norms=(1.0,) * size[0],
        dtype="float32",
        created="2026-01-01T00:00:00Z",
    )
    reference = store.put(draft, vectors, np.ones(size[0], dtype=bool), name="bench").reference

    weights = np.random.default_rng(1).standard_normal((2, size[1])).astype(np.float32) * 0.01
    probe = store.put_probe(
        ProbeDraft(
            method="random",
            model=served,
            dtype="float32",
            created="2026-01-01T00:00:00Z",
            site="residual",
            layer=size[0] // 2,
            read_out="affine",
            outputs=("one", "two"),
        ),
        weights,
        [0.0, 0.0],
        name="bench-probe",
    ).reference

    def add(layers: str, strength: float) -> dict[str, Any]:
        return {"add": {"direction": reference, "layers": layers, "strength": strength}}

    def plan(edits: dict[str, Any], **more: Any) -> Any:
        document = {"apiVersion": "trimtab/v1", "kind": "Policy", "name": "bench", "edits": edits}
        return compile_policy(parse_policy({**document, **more}), store, served)

    everywhere = f"0-{size[0] - 1}"
    heads = [[size[0] - 1 - n, n % served.num_heads] for n in range(8)]
    # Both probes are read at every token; their gates never open.
    gates = {
        name: {"probe": probe, "output": n, "at": "token", "above": 1 - 1e-9, "then": ["late"]}
        for n, name in enumerate(("one", "two"))
    }
    full = plan(
        {
            "all": add(everywhere, 1.0),
            "heads": {"scale_heads": {"heads": heads, "factor": 0.9}},
            "late": add(str(size[0] - 1), 1.0),
        },
        gates=gates,
    )
    return {
        "one layer": [plan({"edit": add(str(size[0] // 2), 1.0)})] * concurrency,
        "all layers": [plan({"edit": add(everywhere, 1.0)})] * concurrency,
        "all layers, a policy each": [
            plan({"edit": add(everywhere, 1.0 + n / 64)}) for n in range(concurrency)
        ],
        "all layers, 8 heads, 2 probes": [full] * concurrency,
    }


def readings_for(model: Path, store_root: Path) -> Any:
    """What is read of every request where probes are read: two outputs."""
    from directions.fingerprint import fingerprint
    from directions.store import Store
    from steering.readings import compile_readings

    found = compile_readings(
        ["bench-probe@1"], Store(store_root), fingerprint(model, weights=False)
    )
    assert len(found) == 2
    return found


def main(model: str, store: str, eager: str, max_concurrency: str) -> None:
    """Start the engine and serve commands until standard input ends."""
    import psutil
    from vllm import LLM, SamplingParams

    steered = os.environ.get("TRIMTAB_ENGINE") == "1"
    began = time.perf_counter()
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=eager == "eager",
        max_model_len=512,
        max_num_seqs=int(max_concurrency),
        kv_cache_memory_bytes=512 * 2**20,
        enable_prefix_caching=False,
    )
    started = time.perf_counter() - began
    plans: dict[str, list[Any]] = {}
    if steered:
        from directions.store import Store
        from steering.engine.control import activate_local, activate_readings_local
        from steering.engine.exchange import Exchange, current_exchange

        plans = plans_for(Path(model), Path(store), int(max_concurrency))
        every = {p.id: p for case in plans.values() for p in case}
        activate_local(llm, every.values(), Store(Path(store)))
        readings = readings_for(Path(model), Path(store))
        activate_readings_local(llm, readings, Store(Path(store)))

    def run(case: str, concurrency: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": list(range(100 + n, 132 + n))} for n in range(concurrency)]
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={"trimtab": {"plan": plans[case][n].id, "strength": 1.0}}
                if case in plans
                else None,
            )
            for n in range(concurrency)
        ]
        # The process's own time: the engine is one thread here and never waits, so on a machine of
        # its own this is the time on the clock, and on a shared one it is less disturbed.
        began = time.process_time()
        token = None
        if case == "2 probes read":
            exchange = Exchange("off", "off", "closed", 1.0, None, readings=readings, trace=True)
            token = current_exchange.set(exchange)
        llm.generate(prompts, params, use_tqdm=False)
        if token is not None:
            current_exchange.reset(token)
            logs = exchange.scores.values()
            assert sum(len(log.trace(n)) for log in logs for n in (0, 1)) == (
                2 * concurrency * tokens
            )
        return time.process_time() - began

    for case in CASES if steered else ("idle",):
        run(case, int(max_concurrency), 4)
    memory = psutil.Process().memory_info().rss
    print("READY " + json.dumps({"start": started, "memory": memory}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        seconds = run(command["case"], command["concurrency"], command["tokens"])
        print("TOOK " + json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
