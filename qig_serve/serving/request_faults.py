"""Errors that vLLM answers with 500 though the request is at fault."""

from __future__ import annotations

from qig_serve.vllm_plugin import patches


def request_fault(error: BaseException) -> str | None:
    """The sentence for an error that a request's body led to; None for every other error."""
    if patches.failed_in_validation(error):
        return f"the request body is not valid: {error}"
    if patches.failed_in_rendering(error):
        return (
            f"no prompt can be made of the request ({type(error).__name__}: {error}): look at the "
            "parts of its messages"
        )
    return None
