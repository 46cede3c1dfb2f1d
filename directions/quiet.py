"""Keeping other libraries' progress bars off the terminal, where ours are drawn."""

from __future__ import annotations

import os


def hide_bars() -> None:
    """Switch off the bars of transformers; call it before transformers is first imported.

    Some are drawn by tqdm itself, which reads its switch from the environment when it is imported.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
