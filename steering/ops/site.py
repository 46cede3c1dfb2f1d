"""Operators by which compiled code calls a site of the model.

A traced hook cannot look at what the step needs, since tracing happens once; it calls an operator that the
compiler does not look into, with the number of its site, and the site does what the step asks for. The
number is a tensor on the host, not a constant: every layer's traced code is the same and compiled once.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

_library: Any = torch.library.Library("trimtab", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("stream_(Tensor(a!) x, Tensor? rest, Tensor(b!) slots, Tensor site) -> ()")
_library.define("heads_(Tensor(a!) out, Tensor slots, Tensor site) -> ()")


class Site(Protocol):
    """A place in one layer of a loaded model."""

    def stream(self, x: torch.Tensor, rest: torch.Tensor | None) -> None:
        """Read and edit an activation ``x + rest`` ``[T, hidden_size]``, of which ``x`` is changed."""
        ...

    def heads(self, out: torch.Tensor) -> None:
        """Edit an attention output ``[T, heads * width]`` in place."""
        ...


_sites: list[Site] = []


def register_site(site: Site) -> torch.Tensor:
    """Number a site for the operators; returns the number as they take it."""
    _sites.append(site)
    return torch.tensor(len(_sites) - 1, dtype=torch.int64)


def _stream(
    x: torch.Tensor, rest: torch.Tensor | None, slots: torch.Tensor, site: torch.Tensor
) -> None:
    _sites[int(site)].stream(x, rest)


def _heads(out: torch.Tensor, slots: torch.Tensor, site: torch.Tensor) -> None:
    _sites[int(site)].heads(out)


def _nothing(*args: Any) -> None:
    return None


for _key in ("CPU", "CUDA"):
    _library.impl("stream_", _stream, _key)
    _library.impl("heads_", _heads, _key)
_library.impl("stream_", _nothing, "Meta")
_library.impl("heads_", _nothing, "Meta")

stream_ = torch.ops.trimtab.stream_.default
"""``(x, rest, slots, site)``: :meth:`Site.stream`. ``slots`` is what gates change meanwhile."""

heads_ = torch.ops.trimtab.heads_.default
"""``(out, slots, site)``: :meth:`Site.heads`. ``slots`` orders the call behind the gates before it."""
