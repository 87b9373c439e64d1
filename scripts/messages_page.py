"""Writes docs/messages.md: every message that tells a user of an error, read off the source.

Promise: each place that makes such a message is found in the syntax tree: what `UserError`, `WorkError`, `Fault` and
the reasons of a bad file are made of, through local names, parameters and functions. What differs from case to case is
an ellipsis. `tests/test_messages.py` holds the page, and that each message has a name and a mend. Cost: two seconds.

    python scripts/messages_page.py
"""

import ast
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mixres.config_rules import RULES

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src" / "mixres"
PAGE = REPOSITORY / "docs" / "messages.md"
GAP = "…"

# What makes a message: which argument is its text, what stands before it, the exit code.
MAKERS = {
    "UserError": (0, "", 2),
    "WorkError": (0, "", 1),
    "Fault": (1, f"{GAP}: ", 2),
    "BadImageError": (0, f"{GAP}: ", 2),
    "BadCaptionError": (0, f"{GAP}: ", 2),
    "BadRowError": (0, f"{GAP}: ", 2),
}
ROOMS = {
    "config": "Arguments and configuration",
    "cli": "Arguments and configuration",
    "data": "Data",
    "examples": "Data",
    "models": "Base models and adapters",
    "training": "Training",
    "trainer": "Training",
}
OTHER = "Verbs and the cache"

INTRODUCTION = f"""\
# All messages

What mixres says when it cannot go on, a line each, behind `mixres: error:` on stderr. `{GAP}` stands for what differs
from case to case: a file, a key, a number. Each line begins with the key, the file or the sample it is about, and says
what mends it. `scripts/messages_page.py` reads this page off the source; `tests/test_messages.py` holds that it is
complete and that no line lacks a name or a mend.

Exit code 2: the input was wrong, and all faults are told together. Exit code 1: the work could not be done; what was
saved is intact. [Troubleshooting](troubleshooting.md) goes from a symptom to the cause,
[Data](data.md#what-can-be-wrong) shows the messages of a data set on real files.
"""


@dataclass(frozen=True)
class Message:
    """A template of a message, where it is made, and the exit code it ends with."""

    text: str
    module: str
    line: int
    exit_code: int


@dataclass
class Function:
    """A function (or a module's top level) and the expressions that its names are bound to."""

    module: str
    node: ast.AST
    names: dict[str, list[ast.expr]] = field(default_factory=lambda: defaultdict(list))
    parameters: list[str] = field(default_factory=list)
    positional: int = 0  # so many of them may be given without their name
    imports: dict[str, str] = field(default_factory=dict)  # names and the last part of the module they come from
    results: list[ast.expr] = field(default_factory=list)
    calls: list[ast.Call] = field(default_factory=list)


class Source:
    """All functions of the package by name."""

    def __init__(self, root: Path = SOURCE) -> None:
        self.functions: list[Function] = []
        self.by_name: dict[str, list[Function]] = defaultdict(list)
        self.constants: dict[tuple[str, str], ast.expr] = {}  # by the last part of the module's name, and their own
        self.tops: dict[str, Function] = {}
        for path in sorted(root.rglob("*.py")):
            module = path.relative_to(root).with_suffix("").as_posix()
            self._add(module, ast.parse(path.read_text(encoding="utf-8")), None)

    def _add(self, module: str, node: ast.AST, name: str | None) -> None:
        function = Function(module, node)
        self.functions.append(function)
        if isinstance(node, ast.FunctionDef):
            function.parameters = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
            function.positional = len(node.args.args)
            self.by_name[node.name].append(function)
        for child in self._own(node):
            self._note(function, child)
        if name is None:
            self.tops[module] = function
            for bound, values in function.names.items():
                self.constants[_stem(module), bound] = values[0]
        for child in self._own(node):
            if isinstance(child, ast.FunctionDef):
                self._add(module, child, child.name)

    def _own(self, node: ast.AST) -> Iterator[ast.AST]:
        """What lies in `node` but not in a function inside it; such a function itself is given."""
        for child in ast.iter_child_nodes(node):
            yield child
            if not isinstance(child, ast.FunctionDef):
                yield from self._own(child)

    def _note(self, function: Function, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(function, target, node.value)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
            self._bind(function, node.target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self._bind(function, node.target, node.iter)
        elif isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) and node.value is not None:
            function.results.append(node.value)
        elif isinstance(node, ast.ImportFrom) and node.module:
            function.imports |= {alias.asname or alias.name: _stem(node.module) for alias in node.names}
        elif isinstance(node, ast.Call):
            function.calls.append(node)
            method = node.func
            if isinstance(method, ast.Attribute) and method.attr in ("append", "extend") and len(node.args) == 1:
                self._bind(function, method.value, node.args[0])

    def _bind(self, function: Function, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            function.names[target.id].append(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._bind(function, one, its)
        elif isinstance(target, ast.Tuple):  # `_, reason = f()`, `for key, line in lines.items()`: the last is text
            match value:
                case ast.Call(func=ast.Attribute(value=mapping, attr="items")):
                    self._bind(function, target.elts[-1], mapping)
                case _:
                    self._bind(function, target.elts[-1], value)

    def texts(self, node: ast.expr, function: Function, seen: frozenset[object] = frozenset()) -> list[str]:
        """Every template that an expression may be."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.Constant(value=None):
                return []
            case ast.JoinedStr(values=parts):
                return self._joined(parts, function, seen)
            case ast.BinOp(left=left, op=ast.Add(), right=right) if self._is_list(left, function):
                return self.texts(left, function, seen) + self.texts(right, function, seen)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                pairs = itertools.product(self.texts(left, function, seen), self.texts(right, function, seen))
                return [a + b for a, b in pairs]
            case ast.IfExp(body=body, orelse=orelse):
                return self.texts(body, function, seen) + self.texts(orelse, function, seen)
            case ast.List(elts=elements) | ast.Set(elts=elements):
                return [text for element in elements for text in self.texts(element, function, seen)]
            case ast.Tuple(elts=elements):  # a key and its message: the last one is text
                return self.texts(elements[-1], function, seen) if elements else []
            case ast.ListComp(elt=inner) | ast.GeneratorExp(elt=inner) | ast.DictComp(value=inner):
                return self.texts(inner, function, seen)
            case ast.Starred(value=inner) | ast.NamedExpr(value=inner):
                return self.texts(inner, function, seen)
            case ast.Name(id=name):
                return self._named(name, function, seen)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in self.constants:
                return self._constant(module, name)
            case ast.Call(func=ast.Name(id="list" | "sorted" | "tuple" | "_Faults"), args=[inner, *_]):
                return self.texts(inner, function, seen)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="dict"), attr="fromkeys"), args=[inner, *_]):
                return self.texts(inner, function, seen)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in self.by_name:
                if name in seen:
                    return []
                called = self.by_name[name]
                found = [t for f in called for result in f.results for t in self.texts(result, f, seen | {name})]
                return found or [GAP]
        return [GAP]

    def _joined(self, parts: list[ast.expr], function: Function, seen: frozenset[object]) -> list[str]:
        """Names in braces stand for each of their texts where all are known, else for a gap."""
        choices: dict[str, list[str]] = {}  # by what stands there: a name that stands there twice is the same twice
        for part in parts:
            texts = [GAP]
            if not isinstance(part, ast.FormattedValue):
                texts = self.texts(part, function, seen)
            elif isinstance(part.value, ast.Name | ast.Attribute | ast.IfExp):
                found = list(dict.fromkeys(self.texts(part.value, function, seen)))
                texts = [GAP] if GAP in found or not found else found
            choices[ast.dump(part)] = texts
        chosen = (dict(zip(choices, one, strict=True)) for one in itertools.product(*choices.values()))
        return ["".join(one[ast.dump(part)] for part in parts) for one in chosen]

    def _named(self, name: str, function: Function, seen: frozenset[object]) -> list[str]:
        key = (id(function.node), name)
        if key in seen:
            return []
        seen = seen | {key}
        if name in function.names:
            return [text for value in function.names[name] for text in self.texts(value, function, seen)]
        if name in function.parameters:
            return self._given(name, function, seen) or [GAP]
        home = self.tops[function.module].imports.get(name, _stem(function.module))
        return self._constant(home, name) if (home, name) in self.constants else [GAP]

    def _constant(self, module: str, name: str) -> list[str]:
        top = next(top for path, top in self.tops.items() if _stem(path) == module)
        return self.texts(self.constants[module, name], top)

    def _given(self, name: str, function: Function, seen: frozenset[object]) -> list[str]:
        """What the callers of `function` give for its parameter, where they write it out."""
        assert isinstance(function.node, ast.FunctionDef)
        place = function.parameters.index(name)
        is_positional = place < function.positional
        place -= function.parameters[0] == "self"
        found = []
        for caller in self.functions:
            for call in caller.calls:
                called = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", None)
                if called != function.node.name:
                    continue
                given = [k.value for k in call.keywords if k.arg == name]
                given += call.args[place : place + 1] if is_positional else []
                for value in given:
                    written = isinstance(value, ast.Constant | ast.JoinedStr | ast.IfExp)
                    found += self.texts(value, caller, seen) if written else [GAP]
        return found

    def _is_list(self, node: ast.expr, function: Function) -> bool:
        return isinstance(node, ast.List | ast.ListComp)

    def messages(self) -> list[Message]:
        """Every message of the package, in the order of modules and lines; equal ones of a module once."""
        found: dict[tuple[str, str], Message] = {}
        for function in self.functions:
            for call in function.calls:
                for text, exit_code in self._made(call, function):
                    text = _short(text)
                    if _says_something(text):
                        found.setdefault(
                            (function.module, text), Message(text, function.module, call.lineno, exit_code)
                        )
        return sorted(found.values(), key=lambda m: (m.module, m.line, m.text))

    def _made(self, call: ast.Call, function: Function) -> Iterator[tuple[str, int]]:
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        arguments = call.args
        if name == "map" and isinstance(arguments[0], ast.Name):
            name, arguments = arguments[0].id, arguments[1:]
        if name in MAKERS and len(arguments) > MAKERS[name][0]:
            place, before, exit_code = MAKERS[name]
            for text in self.texts(arguments[place], function):
                yield before + text, exit_code
        elif name == "append" and _is_faults(call.func) and not isinstance(call.args[0], ast.Tuple):
            for text in self.texts(call.args[0], function):  # a list that a caller raises
                yield text, 2
        elif name == "append" and function.module.startswith("config") and isinstance(call.args[0], ast.Tuple):
            for text in self.texts(call.args[0], function):  # faults of a configuration: the key path and the message
                yield text, 2
        elif name == "print" and isinstance(call.args[0], ast.JoinedStr):
            for text in self.texts(call.args[0], function):
                if text.startswith("mixres: error: "):
                    yield text.removeprefix("mixres: error: "), 1


def _is_faults(method: ast.expr) -> bool:
    return isinstance(method, ast.Attribute) and isinstance(method.value, ast.Name) and method.value.id == "faults"


def _stem(module: str) -> str:
    """`manifest` of `data/manifest` and of `mixres.data.manifest`."""
    return module.replace(".", "/").rpartition("/")[2]


def _short(text: str) -> str:
    while GAP + GAP in text:
        text = text.replace(GAP + GAP, GAP)
    return text


def _says_something(text: str) -> bool:
    """Whether it is more than a message of another place with a name before it."""
    return any(c.isalpha() for c in text.replace(GAP, "").replace("(belongs to )", ""))


def rule_messages() -> list[Message]:
    """What `config_rules.RULES` says of keys that do not fit each other."""
    return [
        Message(f"{' with '.join(f'{name}: given {GAP}' for name in names)}; {mend}", "config_rules", 0, 2)
        for names, _, mend in RULES
    ]


def all_messages() -> list[Message]:
    """Every message, those of the configuration's rules included."""
    return [*Source().messages(), *rule_messages()]


def room(module: str) -> str:
    """The page's section for a module."""
    first = module.split("/")[0]
    return ROOMS.get(first, ROOMS["config"] if first.startswith("config") else OTHER)


def page(messages: Iterable[Message]) -> str:
    """The whole page."""
    rooms: dict[str, dict[int, list[str]]] = {
        name: defaultdict(list) for name in [*dict.fromkeys(ROOMS.values()), OTHER]
    }
    for message in messages:
        rooms[room(message.module)][message.exit_code].append(message.text)
    parts = [INTRODUCTION]
    for name, by_code in rooms.items():
        parts.append(f"## {name}\n")
        for code in sorted(by_code, reverse=True):
            lines = "\n".join(sorted(dict.fromkeys(by_code[code])))
            parts.append(f"Exit code {code}:\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(all_messages()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
