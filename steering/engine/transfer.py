"""Host numbers to the device without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_device(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A copy on the device, queued behind the work of its current stream.

    Copies from ordinary memory wait for the device, and so would the whole step; from pinned memory they do
    not. The pinned copy is a fresh one each time: the allocator hands it out again only once the device
    has read it, so a step that is prepared early cannot overwrite it.
    """
    tensor = torch.from_numpy(np.array(values, order="C"))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
