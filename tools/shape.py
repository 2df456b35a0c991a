"""Measures the shape of the code: sizes, imports that point the wrong way, docstrings, and words to avoid.

``python tools/shape.py [ROOT]``. Standard library only.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LAYERS = (
    ("kernels", "rope", "timing", "documents", "json_lines", "cpu"),
    ("matching", "attention", "drift"),
    ("selectors",),
    ("config", "fusion"),
    ("reporting",),
    ("integration",),
    ("client", "http_client", "local_server", "launch_server", "frontend"),
    ("warm", "evaluation", "explain"),
    ("cli",),
    ("plugin",),
)
"""Parts of the package, lowest first; a part may import from its own layer and from those below."""

PATTERNS = {
    "behind": r"\bbehind\b",
    "stand, lie": r"\b(stands?|stood|lies?|lying|lay)\b",
    "where (conditional or not)": r"\bwhere\b",
    "take off, take along": r"\b(take|takes|taken|taking|took)\s+(it\s+|them\s+|rows\s+|the\s+\w+\s+)?(off|along)\b",
    "tell, told": r"\b(tells?|told|telling)\b",
    "turn (for rotate)": r"\b(turn|turns|turned|turning)\b(?!\s*(fusion\s+)?(it\s+|itself\s+)?(off|on|out|into)\b)",
    "a layer, a pass, a token": r"\b(a layer|a pass|a token|a chunk|a line|a step)\b[.,;:)]",
    "of its own, none (noun)": r"\b(of its own|of their own|to none|from none)\b",
    "made-up": r"\bmade[- ]up\b",
    "no number": r"\bno number\b",
    "goes on": r"\b(goes|go|went|going) on\b",
    "cut off, kept back, passed over": r"\b(cut|cuts) off\b|\bkept back\b|\bpass(ed|es)? over\b",
    "so many": r"\bso (many|much)\b",
    "what X makes of it": r"\b(makes?|made) of (it|them)\b",
}


def definitions(tree: ast.Module) -> Iterator[ast.AST]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def prose(text: str, tree: ast.Module) -> str:
    """All comments and docstrings, those of attributes included."""
    parts = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            parts.append(node.value.value)
    return "\n".join(parts)


def part_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "a3_sglang" else parts[0]


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "a3_sglang" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def sources(root: Path) -> list[Path]:
    return sorted([*root.glob("a3_sglang/**/*.py"), *root.glob("kernels/*.py")])


def wrong_imports(root: Path) -> tuple[list[str], list[str]]:
    """Imports of SGLang outside ``integration`` and the entry point, and imports from a higher layer."""
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    outside, upward = [], []
    for path in sources(root):
        name = str(path.relative_to(root))
        own = "kernels" if name.startswith("kernels") else name.removesuffix(".py").split("/")[1]
        for module in imported(ast.parse(path.read_text())):
            if module.split(".")[0] == "sglang" and own not in ("integration", "plugin"):
                outside.append(name)
            if module.startswith("a3_sglang.") and rank.get(part_of(module), -1) > rank.get(own, 99):
                upward.append(f"{name} -> {module}")
    return outside, upward


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    sizes: dict[str, int] = {}
    words: Counter[str] = Counter()
    documented = total = ignores = 0
    outside, upward = wrong_imports(root)
    for path in sources(root):
        text, name = path.read_text(), str(path.relative_to(root))
        tree = ast.parse(text)
        sizes[name] = len(text.splitlines())
        ignores += text.count("type: ignore")
        said = prose(text, tree)
        words.update({word: len(re.findall(pattern, said, re.IGNORECASE)) for word, pattern in PATTERNS.items()})
        nodes = list(definitions(tree))
        total += len(nodes)
        documented += sum(ast.get_docstring(node) is not None for node in nodes)  # type: ignore[arg-type]
    print(f"{len(sizes)} files, {sum(sizes.values())} lines, median file {statistics.median(sizes.values()):.0f}")
    print("largest:", ", ".join(f"{name} {size}" for name, size in Counter(sizes).most_common(6)))
    print(f"files over 350 lines: {sum(size > 350 for size in sizes.values())}")
    print(f"imports of sglang outside integration/ and plugin.py: {len(outside)} in {len(set(outside))} files")
    print(f"upward imports: {len(upward)}", *upward, sep="\n  ")
    print(f"type: ignore: {ignores}")
    print(f"definitions with a docstring: {documented} of {total}")
    print("words in comments and docstrings:")
    for word, count in words.items():
        print(f"  {word}: {count}")


if __name__ == "__main__":
    main()
