"""Looking names up in vLLM's source without importing it, for a release that is not installed."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """A tree of Python modules.

    Attributes:
        root: the folder that holds the packages.
    """

    root: Path

    def parameters(self, module: str, name: str) -> list[str]:
        """What ``inspect.signature`` would list for ``module.name``.

        A dataclass's parameters are its own fields. Methods are looked up in base classes and names
        through imports, as far as both are written out.

        Raises:
            LookupError: no such module or name.
        """
        where, node = self._find(module, name.split(".")[0])
        for part in name.split(".")[1:]:
            where, node = self._member(where, node, part)
        if isinstance(node, _Function):
            return _arguments(node.args)
        assert isinstance(node, ast.ClassDef)
        return [
            s.target.id
            for s in node.body
            if isinstance(s, ast.AnnAssign)
            and isinstance(s.target, ast.Name)
            and "ClassVar" not in ast.unparse(s.annotation)
        ]

    def has(self, module: str, name: str) -> bool:
        """Whether ``from module import name`` would work."""
        try:
            self._find(module, name)
        except LookupError:
            return False
        return True

    def _find(self, module: str, name: str) -> tuple[str, ast.stmt]:
        file, body = self._parse(module)
        for node in _statements(body):
            if isinstance(node, (*_Function, ast.ClassDef)) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                # Of a package, one dot is itself; of a module, its package.
                up = node.level - (file.name == "__init__.py")
                parts = module.split(".")[: -up or None] if node.level else []
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._find(".".join([*parts, node.module or ""]), alias.name)
        raise LookupError(f"{module} has no {name}")

    def _member(self, module: str, node: ast.stmt, name: str) -> tuple[str, ast.stmt]:
        assert isinstance(node, ast.ClassDef), f"{name} is looked up in what is not a class"
        for statement in _statements(node.body):
            if isinstance(statement, (*_Function, ast.ClassDef)) and statement.name == name:
                return module, statement
        for base in node.bases:
            if isinstance(base, ast.Name):
                try:
                    return self._member(*self._find(module, base.id), name)
                except LookupError:
                    continue
        raise LookupError(f"{module}.{node.name} has no {name}")

    def _parse(self, module: str) -> tuple[Path, list[ast.stmt]]:
        path = self.root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file, ast.parse(file.read_text(encoding="utf-8")).body
        raise LookupError(f"there is no module {module}")


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """``body`` with what stands under ``if`` and ``try`` put in its place."""
    flat: list[ast.stmt] = []
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            flat += _statements(node.body) + _statements(node.orelse)
        else:
            flat.append(node)
    return flat


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _arguments(arguments: ast.arguments) -> list[str]:
    named = [*arguments.posonlyargs, *arguments.args]
    named += [arguments.vararg] if arguments.vararg else []
    named += arguments.kwonlyargs
    named += [arguments.kwarg] if arguments.kwarg else []
    return [argument.arg for argument in named]
