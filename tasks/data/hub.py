"""Errors of the client of the Hugging Face hub."""

from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, by the hub's version

__all__ = ["HUB_ERRORS"]

HUB_ERRORS: tuple[type[Exception], ...] = (HTTPError, OSError, ValueError)
"""The hub cannot be reached, or what was asked of it cannot be found or read."""
