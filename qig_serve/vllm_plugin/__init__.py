"""vLLM's entry point: makes checkpoints with `quant_method: qig` load without a flag.

vLLM calls `register()` in each of its processes, so importing this module imports nothing else.
"""

from __future__ import annotations

OLDEST_VLLM, TOO_NEW_VLLM = "0.26", "0.34"
SUPPORTED_VLLM = f"vllm>={OLDEST_VLLM},<{TOO_NEW_VLLM}"


def register() -> None:
    """Make the quantization method known to vLLM; may be called more than once.

    RuntimeError, naming the supported versions, if this vLLM is not one of them.
    """
    import vllm

    check_vllm_version(vllm.__version__)
    try:
        from qig_serve.vllm_plugin import config
    except ImportError as error:
        raise RuntimeError(
            f"qig-serve's plugin does not fit this vLLM {vllm.__version__} ({error}); "
            f"it supports {SUPPORTED_VLLM}"
        ) from error
    config.register_once()


def check_vllm_version(version: str) -> None:
    """RuntimeError with one sentence if the plugin does not support the version.

    A source build, whose version vLLM does not know ("dev"), is let through.
    """
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(version).release
    except InvalidVersion:
        return
    if not Version(OLDEST_VLLM).release <= release < Version(TOO_NEW_VLLM).release:
        raise RuntimeError(
            f"qig-serve supports {SUPPORTED_VLLM}, but vLLM {version} is installed: "
            "install a supported version, or remove qig-serve from this environment"
        )
