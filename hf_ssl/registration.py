# SPDX-License-Identifier: Apache-2.0
"""Makes transformers' Auto classes know our model types without loading transformers or torch.

Each configuration and modeling file of a method ends with a line that registers its class. This module sees
to it that these files are imported once the Auto classes exist, and never while any module of transformers or
of ours is half-loaded: a file that imports from a half-loaded module ends in a circular import, and one that
makes transformers load more than it was about to breaks `from transformers import Trainer`. So a finder at
the head of `sys.meta_path` counts how many modules of the two packages are being executed on this thread's
stack, and acts when the count returns to zero.
"""

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from hf_ssl.methods import METHODS

CONFIG_REGISTRY = "transformers.models.auto.configuration_auto"
MODEL_REGISTRY = "transformers.models.auto.modeling_auto"
WATCHED = ("transformers", "hf_ssl")


class _Stack(threading.local):
    """How many watched modules this thread is executing, and whether it is importing method files already."""

    executing = 0
    registering = False


_stack = _Stack()
_finished = threading.Event()


class _CountingLoader(Loader):
    """Executes a module with its own loader, which it puts back first: nobody meets this class afterwards."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        _stack.executing += 1
        try:
            self.loader.exec_module(module)
        finally:
            _stack.executing -= 1
        if _stack.executing == 0:
            register_methods()


class _Watcher(MetaPathFinder):
    """Finds modules of the watched packages with everybody else's finders and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _finished.is_set() or fullname.partition(".")[0] not in WATCHED:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:  # a folder without code has none
                    spec.loader = _CountingLoader(spec.loader)
                return spec
        return None


def register_methods() -> None:
    """Import the configuration files if `AutoConfig` is loaded and the modeling files if the model classes
    are.

    Does nothing on a thread that is doing it already. The two are separate because `from transformers import
    AutoConfig` loads no models, and neither should we then.
    """
    if _stack.registering or _finished.is_set():
        return
    _stack.registering = True
    try:
        if CONFIG_REGISTRY in sys.modules:
            for method in METHODS.values():
                importlib.import_module(method.config.partition(":")[0])
        if MODEL_REGISTRY in sys.modules:
            for method in METHODS.values():
                importlib.import_module(method.model.partition(":")[0])
            _finished.set()
    finally:
        _stack.registering = False


def install() -> None:
    """Start watching; register at once what can be, which is all where transformers was imported first."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    register_methods()
