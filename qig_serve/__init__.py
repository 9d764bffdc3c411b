"""Quantize vision-language models to 3- and 4-bit weights with QIG, and serve them with vLLM."""

__version__ = "0.1.0"


def _register_with_transformers() -> None:
    """Teach transformers to load qig checkpoints, once it is imported; costs nothing before."""
    import importlib.util
    import sys
    from importlib.abc import MetaPathFinder
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    target = "transformers.quantizers.auto"
    if target in sys.modules:
        importlib.import_module("qig_serve.transformers_plugin")
        return

    class Hook(MetaPathFinder):
        def find_spec(self, name: str, path: Any = None, target_: Any = None) -> ModuleSpec | None:
            if name != target:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(module: ModuleType) -> None:
                    execute(module)
                    importlib.import_module("qig_serve.transformers_plugin")

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Hook())


_register_with_transformers()
