"""Cached blocks of requests for which it matters where the prompt ends.

vLLM shares blocks of keys and values between requests with the same salt and the same tokens. Under a plan
that treats prompt and answer differently that is not enough: an answer that comes back as part of the next
turn's prompt has the same tokens, but its keys and values were computed as an answer's. So the key of
every block that reaches the prompt's last token also holds the prompt's length. Blocks before it are shared
as ever, and so are all blocks of plans that treat every token alike.

Extension point, checked against vLLM 0.32 and 0.33 (``v1/core/kv_cache_utils.py``):
``generate_block_hash_extra_keys(request, start_token_idx, end_token_idx, start_mm_idx)``, which vLLM calls for
every block that it hashes, by its name in that module.
"""

from __future__ import annotations

import functools
from typing import Any

from steering.engine.stamp import KEY, stamped


def wrap_block_keys(module: Any) -> None:
    """Make blocks whose meaning depends on the prompt's end say where it is."""
    original = module.generate_block_hash_extra_keys

    @functools.wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        keys, index = original(request, start_token_idx, end_token_idx, start_mm_idx)
        if end_token_idx >= request.num_prompt_tokens and stamped(request).get("phased"):
            keys = (*(keys or ()), (KEY, str(request.num_prompt_tokens)))
        return keys, index

    module.generate_block_hash_extra_keys = generate_block_hash_extra_keys
