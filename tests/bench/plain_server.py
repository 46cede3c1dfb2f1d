"""vLLM's own server without the plug-in: ``python -m tests.bench.plain_server MODEL [ANY vLLM FLAG]``."""

from __future__ import annotations

import sys

from server import vllm_command

if __name__ == "__main__":
    args = vllm_command.parse([*sys.argv[1:], "--host=127.0.0.1"])
    vllm_command.run(args)
