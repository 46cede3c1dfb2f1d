"""Start one compiled engine in this process and print what it loaded and said; run by test_compile.

Usage: compiled_engine.py MODEL MODE STORE, with MODE plain, steered or steered-without-identity.
``VLLM_CACHE_ROOT`` and ``TRIMTAB_ENGINE`` come from the environment.

On CPU vLLM saves compiled code but never loads it: a method that its loader calls is missing from what
the CPU compiler saves. CUDA loads. The missing method is put in here, so that loading works as it does
there; nothing else is changed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path


def make_loading_work() -> None:
    import torch

    original = torch.compiler.load_compiled_function

    def load(*args, **kwargs):
        loaded = original(*args, **kwargs)
        function = loaded._artifacts.compiled_fn
        if not hasattr(function, "finalize_loading"):
            function.finalize_loading = lambda config: None
        return loaded

    torch.compiler.load_compiled_function = load


def forget_identity() -> None:
    """Hash the configuration as if the plug-in had not put its identity there."""
    from vllm.config import VllmConfig

    original = VllmConfig.compute_hash

    def compute_hash(self):
        kept = self.additional_config
        self.additional_config = {k: v for k, v in kept.items() if k != "trimtab"}
        try:
            return original(self)
        finally:
            self.additional_config = kept

    VllmConfig.compute_hash = compute_hash


def main(model: str, mode: str, store: str) -> None:
    from vllm.compilation.counter import compilation_counter

    from tests.steering.engine.harness import (
        Request,
        build_world,
        engine,
        every_kind,
        run,
        standard_policies,
    )

    world = build_world(Path(model), Path(store), ("t", "e"))
    standard_policies(world)
    every_kind(world)
    make_loading_work()
    if mode == "steered-without-identity":
        forget_identity()
    with engine(Path(model), enforce_eager=False, kv_cache_memory_bytes=64 * 2**20) as llm:
        prompt = tuple(world.prompt("Which way does the wind blow today?"))
        requests = [Request(prompt, max_tokens=16)]
        if mode != "plain":
            from steering.engine.control import activate_local

            activate_local(llm, world.plans.values(), world.store)
            requests += [Request(prompt, name, max_tokens=16) for name in world.policies]
            requests += [Request(prompt, "one", 0.0, max_tokens=16)]
            # The floor is the largest difference that is seen among plain requests.
            requests[1:1] = [Request(prompt + prompt[:n], max_tokens=16) for n in range(1, 25)]
        answers = run(llm, world, requests)
        config = llm.llm_engine.vllm_config
        print(
            "RESULT "
            + json.dumps(
                {
                    "mode": str(config.compilation_config.mode),
                    "key": Path(config.compilation_config.local_cache_dir).name,
                    "loaded": compilation_counter.num_aot_artifacts_loaded,
                    "answers": [
                        [
                            a.request.prompt,
                            a.request.policy,
                            a.request.strength,
                            a.token_ids,
                            a.logprobs,
                            [asdict(gate) for gate in a.gates],
                            a.scores,
                        ]
                        for a in answers
                    ],
                }
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
