"""Run a batch on an engine without the plug-in and print its answers; run by test_unsteered.

Usage: plain_engine.py MODEL REQUESTS, the requests as JSON lists of token ids. ``TRIMTAB_ENGINE`` is unset.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.steering.engine.harness import Request, engine, run


def main(model: str, prompts: str) -> None:
    with engine(Path(model), kv_cache_memory_bytes=64 * 2**20) as llm:
        config = llm.llm_engine.vllm_config.additional_config
        answers = run(
            llm, None, [Request(tuple(ids), max_tokens=32) for ids in json.loads(prompts)]
        )
    print("RESULT " + json.dumps([config, [[a.token_ids, a.logprobs] for a in answers]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
