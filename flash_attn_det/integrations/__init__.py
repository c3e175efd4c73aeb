"""Other libraries that can call this one.

Nothing here imports another library: it waits until the user does. ``install()`` runs once, from
``import flash_attn_det``; whoever never imports transformers pays for one string comparison per imported module.
"""

import importlib
import importlib.abc
import sys

# The module whose end of execution means that every registry of transformers exists.
_TRANSFORMERS = "transformers.modeling_utils"


def _register_transformers(module):
    from . import huggingface

    if huggingface.unsupported_reason(module) is None:
        huggingface.register()


class _RegisterAfterExec(importlib.abc.Loader):
    """Runs the real loader, then registers. It takes itself off the module first, so nothing of it stays behind."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register_transformers(module)


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Finds one module through the finders that come after this one, and has it loaded by _RegisterAfterExec.

    It stays on sys.meta_path, so that a reload or a second import after `del sys.modules[...]` registers again.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TRANSFORMERS:
            return None
        finders = list(sys.meta_path)
        if self in finders:
            # Those before this one were asked already; asking them again would recurse into other import hooks.
            finders = finders[finders.index(self) + 1 :]
        for finder in finders:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _RegisterAfterExec(spec.loader)
                return spec
        return None


def install():
    """Register with the libraries that are already imported, and with the others when they are imported. Idempotent."""
    if not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())
    if _TRANSFORMERS in sys.modules:
        # import_module waits for a thread that is still in the middle of importing it.
        _register_transformers(importlib.import_module(_TRANSFORMERS))
