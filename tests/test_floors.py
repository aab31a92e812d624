"""Imports point downwards only, `import fierpatch` stays light, and no module keeps state."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fierpatch"
FLOORS = (  # low to high; a module imports from floors strictly below its own
    {"errors"},
    {"config"},
    {"hot_set", "index", "query_estimate", "rows", "select"},
    {"reference", "kernels"},
    {"ops"},
    {"flex", "offload"},
    {"cache"},
    {"hf"},
    {"report"},
    {"patching"},
    {"evaluate"},
    {"__init__"},  # the public names, for whoever imports the package as its users do
    {"cli"},
    {"__main__"},
)
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
OWNERS = {"transformers": "hf", "triton": "kernels"}  # the only part that may import it
CONTAINERS = {
    *("bytearray", "dict", "list", "set"),
    *("Counter", "OrderedDict", "defaultdict", "deque"),
    *("WeakKeyDictionary", "WeakSet", "WeakValueDictionary"),
}


def part_of(path: Path) -> str:
    """The top-level module or package of fierpatch that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(PACKAGE.rglob("*.py"))
PARTS = FLOOR.keys() | {part_of(path) for path in MODULES}

every_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix()
)


def called_name(call: ast.Call) -> str:
    """`f` of both `f(...)` and `module.f(...)`."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it: lazily, for types, or by a string."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, f"line {node.lineno}: imports are absolute"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if called_name(node) in {
                "__import__",
                "import_module",
            }:
                yield name


def imported_parts(tree: ast.Module) -> set[str]:
    """Parts of fierpatch that a module imports; `__init__` where it goes through the front."""
    parts = set()
    for name in imported_names(tree):
        root, _, rest = name.partition(".")
        if root == "fierpatch" and rest != "__version__":
            part = rest.partition(".")[0]
            parts.add(part if part in PARTS else "__init__")
    return parts


def module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those of `if`, `try`, `with` and loops included."""
    for statement in body:
        yield statement
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for block in ("body", "orelse", "finalbody"):
                yield from module_level(getattr(statement, block, []))
            for handler in getattr(statement, "handlers", []):
                yield from module_level(handler.body)


def is_mutable(value: ast.expr | None) -> bool:
    """Is the value a dict, a list, a set or one of their kin?"""
    if isinstance(value, ast.Call):
        return called_name(value) in CONTAINERS
    return isinstance(
        value, ast.Dict | ast.DictComp | ast.List | ast.ListComp | ast.Set | ast.SetComp
    )


def is_empty(value: ast.expr | None) -> bool:
    """Was the container made to be filled later?"""
    match value:
        case ast.Dict(keys=content) | ast.List(elts=content):
            return not content
        case ast.Call(args=args, keywords=keywords):
            return not args and not keywords
    return False


def state_names(tree: ast.Module) -> Iterator[str]:
    """Names that hold state in a module: globals, and containers that are not full constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names
    for statement in module_level(tree.body):
        match statement:
            case ast.Assign(targets=targets, value=value):
                pass
            case ast.AnnAssign(target=target, value=value):
                targets = [target]
            case _:
                continue
        for name in (target.id for target in targets if isinstance(target, ast.Name)):
            constant = name == "__all__" or (name.isupper() and not is_empty(value))
            if is_mutable(value) and not constant:
                yield name


@every_module
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    assert part in FLOOR, f"{part} stands on no floor: give it one in FLOORS"
    imported = imported_parts(ast.parse(path.read_text(encoding="utf-8"))) - {part}
    above = {name for name in imported & FLOOR.keys() if FLOOR[name] >= FLOOR[part]}
    assert not above, f"{part} may not import {sorted(above)}"


@every_module
def test_one_part_owns_each_heavy_dependency(path: Path) -> None:
    roots = {
        name.partition(".")[0]
        for name in imported_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    stolen = {name for name, owner in OWNERS.items() if name in roots and part_of(path) != owner}
    assert not stolen, f"only {[OWNERS[name] for name in stolen]} may import {sorted(stolen)}"


@every_module
def test_modules_keep_no_state(path: Path) -> None:
    names = list(state_names(ast.parse(path.read_text(encoding="utf-8"))))
    assert not names, f"{names}: state lives on the cache or the handle"


@pytest.mark.parametrize("heavy", sorted(OWNERS))
def test_importing_the_package_stays_light(heavy: str) -> None:
    run_in_new_process(f"import sys, fierpatch; assert {heavy!r} not in sys.modules")


def test_importing_the_package_touches_no_gpu() -> None:
    run_in_new_process(
        "import sys, fierpatch; torch = sys.modules.get('torch');"
        "assert torch is None or not torch.cuda.is_initialized()"
    )


DECODE = """
import sys, torch
from fierpatch import FierConfig
from fierpatch.cache import LayerCache
layer = LayerCache(FierConfig(budget=24))
for length in (40, 1):
    query = torch.randn(1, 4, length, 16)
    layer.update(query[:, :2], query[:, 2:])
    if length == 40:
        layer.index_prompt(query)
layer.attend(query, visible=None, scale=0.25)
assert "triton" not in sys.modules
"""
GENERATE = """
import sys, torch, fierpatch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(intermediate_size=32, **sizes)).eval()
handle = fierpatch.apply(model, budget=24)
prompt = torch.arange(40)[None]
for implementation in (None, "static"):
    options = {"cache_implementation": implementation, "disable_compile": True}
    model.generate(prompt, attention_mask=prompt > -1, max_new_tokens=3, **options)
    assert handle.report().layers[2].backend == "reference"
kernels = ("fierpatch.kernels", "fierpatch.ops.kernel_")
assert not [name for name in sys.modules if name.startswith(kernels)]
"""


def test_retrieval_on_a_cpu_loads_no_triton() -> None:
    run_in_new_process(DECODE)


def test_generate_on_a_cpu_loads_no_kernels() -> None:
    """Triton it may: transformers' models import PyTorch's compiler, which does."""
    run_in_new_process(GENERATE)


def run_in_new_process(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, check=True)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import fierpatch.cache", {"cache"}),
        ("from fierpatch.index.fier import FierIndex", {"index"}),
        ("from fierpatch import ops, apply", {"ops", "__init__"}),
        ("from fierpatch import __version__", set()),
        ("def late():\n    import fierpatch", {"__init__"}),
        ("importlib.import_module('fierpatch.hf.model')", {"hf"}),
        ("import fierpatchwork, torch", set()),
    ],
)
def test_the_reader_of_imports_sees(source: str, parts: set[str]) -> None:
    assert imported_parts(ast.parse(source)) == parts


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("NAMES = ['a']\n__all__ = ['b']\nsizes = (1, 2)", []),
        ("handles = {}", ["handles"]),
        ("PATCHED: dict[str, int] = {}", ["PATCHED"]),
        ("try:\n    import x\nexcept ImportError:\n    seen = weakref.WeakSet()", ["seen"]),
        ("def count():\n    global calls\n    calls += 1", ["calls"]),
        ("def pure():\n    rows = []\n    return rows", []),
    ],
)
def test_the_reader_of_state_sees(source: str, names: list[str]) -> None:
    assert list(state_names(ast.parse(source))) == names
