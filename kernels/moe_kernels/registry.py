"""Registry: name -> implementation, filled by the files of one package.

A new router, backend or method is one file with a `register` decorator. The files are imported at the first
look-up, so nothing is imported that nobody asks for, and no list of names is kept by hand.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """The implementations of one kind of thing, by name.

    Args:
        what: the word for one entry, used in error messages ("router", "backend").
        package: dotted name of the package whose files register the entries.
    """

    def __init__(self, what: str, *, package: str) -> None:
        self._what = what
        self._package = package
        self._entries: dict[str, T] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under `name`. Raises ValueError if the name is taken."""

        def add(entry: T) -> T:
            if name in self._entries and self._entries[name] is not entry:
                raise ValueError(f"{self._what} {name!r} is registered twice: {self._entries[name]!r} and {entry!r}")
            self._entries[name] = entry
            return entry

        return add

    def _load(self) -> dict[str, T]:
        if not self._is_loaded:
            package = importlib.import_module(self._package)
            # a flat copy of these files, beside an exported model, has no package and has imported them all by now
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{self._package}.{module.name}")
            # only now: a file that fails to import fails at every look-up, not just at the first
            self._is_loaded = True
        return self._entries

    def __getitem__(self, name: str) -> T:
        """Return the entry called `name`. Raises KeyError that lists the known names."""
        entries = self._load()
        if name not in entries:
            raise KeyError(f"{self._what} {name!r} is unknown; known are {', '.join(sorted(entries))}")
        return entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())
