"""Model families over one decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejax.models.description import describe

__all__ = ["describe"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the parts below are imported while families are.
    if name == "describe":
        from moejax.models.description import describe

        return describe
    raise AttributeError(f"module 'moejax.models' has no attribute {name!r}")
