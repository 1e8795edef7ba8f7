"""The form of the project in numbers: sizes, floors, comments. test_form.py holds them to it.

python -m test.form
"""

import ast
import re
import statistics
import subprocess
from pathlib import Path

import config
from tasks.settings import FinetuneConfig

HERE = Path(__file__).parent.parent

# From the ground up: a file imports only what is on its own floor or below.
FLOORS = [
    ["config"],
    ["text", "hardware", "formats.fairseq_config", "formats.fairseq_v2_config"],
    ["model"],
    ["data"],
    ["data2vec2"],
    ["ema", "optim"],
    ["run"],
    ["judge", "formats"],
    ["train"],
    ["convert", "tasks", "preprocess", "text.reviews", "hardware.check", "judge.features"],
    ["eval", "bench"],
    ["finetune"],
]
DECIDING = ("model.py", "data.py", "ema.py", "optim.py", "train.py")
DEVICE_TYPE = re.compile(r"""\b(\w+\.)?(type|kind) (==|!=|in|not in) [("']*(cpu|cuda|npu)\b""")


def files() -> list[Path]:
    """Every file that git knows, relative to the project; without git, every .py file."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if listing.returncode:
        return [path.relative_to(HERE) for path in HERE.glob("**/*.py")]
    return [Path(line) for line in listing.stdout.splitlines() if (HERE / line).is_file()]


def sources() -> list[Path]:
    return [path for path in files() if path.suffix == ".py"]


def product() -> list[Path]:
    return [path for path in sources() if path.parts[0] != "test" and path.name != "test_core.py"]


def lines_of(path: Path) -> list[str]:
    return (HERE / path).read_text(encoding="utf-8").splitlines()


def tree_of(path: Path) -> ast.Module:
    return ast.parse((HERE / path).read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def floor_of(module: str) -> int | None:
    """The number of a module's floor; None: not one of ours."""
    # a name may be of a function; a room's files may have floors of their own
    for name in (module, module.rpartition(".")[0], module.split(".")[0]):
        for number, floor in enumerate(FLOORS):
            if name in floor:
                return number
    return None


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, inside functions too; not those of its __main__ block."""
    modules = set()
    for part in tree_of(path).body:
        if isinstance(part, ast.If) and "__main__" in ast.unparse(part.test):
            continue
        for node in ast.walk(part):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def climbing_imports() -> list[str]:
    """Imports that go up from a floor to a higher one."""
    climbs = []
    for path in product():
        own = floor_of(module_of(path))
        for module in imports_of(path):
            floor = floor_of(module)
            if None not in (own, floor) and floor > own:
                climbs.append(f"{path} imports {module}")
    return sorted(climbs)


def circles() -> list[str]:
    """Pairs of files that reach each other by imports."""
    names = {module_of(path) for path in product()}
    reach = {}
    for path in product():
        used = imports_of(path)
        used |= {other.rpartition(".")[0] for other in used}
        reach[module_of(path)] = used & names - {module_of(path)}
    for _ in names:  # as often as the longest chain could be
        for name, others in reach.items():
            reach[name] = others.union(*(reach[other] for other in others))
    return sorted(name for name, others in reach.items() if name in others)


def functions() -> dict[str, int]:
    """Lines of every function of the product."""
    sizes = {}
    for path in product():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                sizes[f"{path}:{node.name}"] = node.end_lineno - node.lineno + 1
    return sizes


def code_and_comments(path: Path) -> tuple[int, int]:
    """Lines of code without blank lines and docstrings, and lines that hold a comment."""
    docstrings = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    code = comments = 0
    for number, line in enumerate(lines_of(path), 1):
        if number in docstrings or not line.strip():
            continue
        comments += bool(re.search(r"(^|\s)# ", line))
        code += not line.lstrip().startswith("#")
    return code, comments


def few_comments(least: int = 8) -> list[str]:
    """Product files of over 60 lines of code with fewer comments for 100 of them."""
    rows = []
    for path in product():
        code, comments = code_and_comments(path)
        if code > 60 and 100 * comments < least * code:
            rows.append(f"{path} {100 * comments / code:.0f}")
    return sorted(rows)


def numbers() -> dict:
    """The table of the form."""
    size = {path: len(lines_of(path)) for path in sources()}
    shares = [code_and_comments(path) for path in product()]
    lengths = functions()
    pages = [path for path in files() if path.suffix == ".md" and path.parts[0] == "docs"]
    shell = [path for path in files() if path.suffix == ".sh"]
    return {
        "product lines": sum(size[path] for path in product()),
        "test lines": sum(size[path] for path in size if path.parts[0] == "test"),
        "lines that decide a number": sum(size[Path(name)] for name in DECIDING),
        "comments for 100 lines of code, median": statistics.median(
            100 * comments / code for code, comments in shares if code > 10
        ),
        "files of over 60 lines of code with under 8": len(few_comments()),
        "lines over 100 columns": sum(
            len(line) > 100 for path in [*size, *shell] for line in lines_of(path)
        ),
        "longest file": max(size.values()),
        "longest function": max(lengths.values()),
        "loop": lengths["train.py:loop"],
        "update": lengths["train.py:update"],
        "settings of a run": sum(len(part.__dataclass_fields__) for part in config.PARTS),
        "settings of fine-tuning": len(FinetuneConfig.__dataclass_fields__),
        "README": len(lines_of(Path("README.md"))),
        "docs": sum(len(lines_of(path)) for path in pages),
        "entries at the top": len({p.parts[0] for p in files() if p.parts[0][0] != "."}),
        "imports that climb": len(climbing_imports()),
        "files in a circle": len(circles()),
    }


if __name__ == "__main__":
    for name, value in numbers().items():
        print(f"{value:>8,.0f}  {name}")
    for row in (*climbing_imports(), *circles(), *few_comments()):
        print(f"          {row}")
