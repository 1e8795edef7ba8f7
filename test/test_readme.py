"""The README and the pages in docs/: their commands run, what they name exists, and each pair of languages agrees.

A command is run unless it holds a word in capitals, which is the reader's to fill in, or its comment begins with
"needs". The others are parsed.
"""

import contextlib
import glob
import gzip
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import bench
import config
import convert
import eval as evaluation
import finetune
import preprocess
import train
from config import InputError
from judge import plot
from test import soak
from test.helpers import FEW, HERE, call, copy_of_the_project
from run import describe as dataset
from text import reviews

import numpy as np
import pytest

README, CHINESE = "README.md", "docs/README.zh-CN.md"
DOCS = sorted(path.relative_to(HERE).as_posix() for path in HERE.glob("docs/*.md"))
PAGES = {name: (HERE / name).read_text(encoding="utf-8") for name in (README, CHINESE, *DOCS)}
ENGLISH = [name for name in PAGES if not name.endswith(".zh-CN.md")]
PAIRS = [(name, other) for name in ENGLISH if (other := name.replace(".md", ".zh-CN.md")) in PAGES]
PROGRAMS = {
    "train.py": train,
    "data.py": dataset,
    "eval.py": evaluation,
    "bench.py": bench,
    "preprocess.py": preprocess,
    "convert.py": convert,
    "finetune.py": finetune,
    "judge.plot": plot,
    "text.reviews": reviews,
    "test.soak": soak,
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def commands(text: str) -> list[tuple[list[str], str]]:
    """(words, comment) of each command in the shell blocks."""
    lines = [
        line.partition(" #")
        for kind, block in FENCE.findall(text)
        if kind == "bash"
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [(shlex.split(words), comment.strip()) for words, _, comment in lines]


COMMANDS = [command for name in ENGLISH for command in commands(PAGES[name])]


def program(words: list[str]) -> str | None:
    """The program of ours that a command starts, if any."""
    return next((word for word in words if word in PROGRAMS or word == "run_1p.sh"), None)


def flags(words: list[str]) -> list[str]:
    return words[words.index(program(words)) + 1 :]


def is_run(words: list[str], comment: str) -> bool:
    parts = [
        part
        for word in words
        for part in re.split("[=:/]", word)
        if part and not (HERE / word).exists()
    ]
    return not comment.startswith("needs") and not any(
        re.fullmatch(r"[A-Z]{3,}(\.\w+)?", part) for part in parts
    )


# ---------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "words", [words for words, comment in COMMANDS if not is_run(words, comment)], ids=" ".join
)
def test_program_and_flags_of_a_command_that_is_not_run_exist(words, monkeypatch):
    name = program(words)
    if name is None:
        assert words[0] in ("pip", "source") and all(
            (HERE / w).exists() for w in words if w.endswith(".txt")
        )
    elif name == "run_1p.sh":
        mode, *options = flags(words)
        script = (HERE / name).read_text(encoding="utf-8")
        assert words[0] == "bash" and f"#   bash run_1p.sh {mode} " in script
        assert all(f"{option.split('=')[0]}=*)" in script for option in options)
    else:
        before = words[: words.index(name)]
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            get_args_parser().parse_args(words[1:])
        else:
            assert before[-1] == "python" if name.endswith(".py") else before == ["python", "-m"]
        # the flags are read before the files that the command names
        monkeypatch.setattr(sys, "argv", [name, *flags(words), "--lr", "-1"])
        with pytest.raises(InputError, match="--lr|no such file"):
            PROGRAMS[name].main()


# Later flags override earlier ones: whatever a command asks for is done small, and on a CPU.
SMALLER = {
    "train.py": [*FEW, "--max_update", 3],
    "eval.py": ["--device", "cpu", "--probe_places", 50],
    "bench.py": [
        *FEW,
        "--updates",
        1,
        "--warmup",
        0,
        "--vocabulary",
        100,
        "--sweep_lengths",
        32,
        "--sweep_tokens",
        64,
    ],
    "preprocess.py": ["--workers", 1],
}


def stand_ins(folder: Path):
    """Small files under the names of those that a reader brings along, with the READMEs' text."""
    english, chinese = (PAGES[name].encode() for name in (README, CHINESE))
    for archive, members in {
        "wikitext-103-raw-v1.zip": [
            f"wikitext-103-raw/wiki.{split}.raw" for split in ("train", "valid", "test")
        ],
        "books.zip": ["books/train.txt", "books/valid.txt"],
    }.items():
        with zipfile.ZipFile(folder / archive, "w") as file:
            for member in members:
                file.writestr(member, english)
    for name in ("zh1.txt", "zh3.txt"):
        (folder / name).write_bytes(chinese)
    (folder / "zh2.txt.gz").write_bytes(gzip.compress(chinese))
    bpe = ("encoder.json", "vocab.bpe", "dict.txt")  # GPT-2's
    if has("tokenizers"):
        train_bpe = [
            "--train",
            folder / README,
            "--bpe",
            "train",
            "--vocab_size",
            300,
            "--workers",
            1,
        ]
        call(preprocess.main, *train_bpe, "--dest", folder / "bpe")
    for (
        name
    ) in bpe:  # without the package the empty ones are never read: its absence is noticed first
        (folder / "bpe" / name).rename(folder / name) if has("tokenizers") else (
            folder / name
        ).touch()


def has(package: str) -> bool:
    try:
        return bool(importlib.import_module(package))
    except ImportError:
        return False


def after(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def places(words: list[str]) -> list[str]:
    """The files and folders that a command's flags name for its results."""
    named = [
        after(words, f)
        for f in ("--out", "--dest", "--make_demo", "--save_dir", "--tensorboard_logdir")
    ]
    return [path for path in named if path] + (
        words[words.index("--to") + 2 :][:1] if "--to" in words else []
    )


def results(words: list[str]) -> list[str]:
    """The files that a command promises by its flags."""
    if program(words) == "run_1p.sh":
        return [
            "output/0/demo/checkpoint_last.pt",
            "output/0/demo/train.jsonl",
            "output/0/train_0.log",
        ]
    made = [after(words, "--out")] if "--out" in words else []
    if dest := after(words, "--dest") or after(words, "--make_demo"):
        made += [
            f"{dest}/{name}"
            for name in ("dict.txt", "train.bin", "train.idx", "valid.bin", "valid.idx")
        ]
        made += [f"{dest}/test.idx"] * ("--test" in words)
        made += [
            f"{dest}/{name}"
            for name in ("encoder.json", "vocab.bpe")
            if after(words, "--bpe") in ("gpt2", "train")
        ]
    if folder := after(words, "--save_dir"):
        made += [
            f"{folder}/{name}"
            for name in ("checkpoint_last.pt", "checkpoint_best.pt", "train.jsonl")
        ]
    if folder := after(words, "--tensorboard_logdir"):
        made += [f"{folder}/{name}/*tfevents*" for name in ("train_inner", "valid")]
    if "--to" in words:
        kind, path = words[words.index("--to") + 1 :][:2]
        inside = (
            ("config.json", "model.safetensors", "tokenizer_config.json") if kind == "hf" else ("",)
        )
        made += [str(Path(path, name)) for name in inside]
    return made


def test_the_commands_run_in_order_and_leave_the_files_they_promise(tmp_path, monkeypatch):
    env = copy_of_the_project(tmp_path)
    python = (
        tmp_path / "bin" / "python3"
    )  # this Python; run_1p.sh need not ask whether it has the packages
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env["PATH"] = f"{python.parent}:{env['PATH']}"
    for name in (README, CHINESE):
        (tmp_path / name).write_text(PAGES[name], encoding="utf-8")
    stand_ins(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    lacking, packages = set(), set()
    for words, comment in COMMANDS:
        if not is_run(words, comment):
            continue
        name = program(words)
        argv = [*flags(words), *map(str, SMALLER.get(name, []))]
        if after(words, "--bpe") == "train":
            argv += ["--vocab_size", "300"]
        if name == "run_1p.sh":
            assert not flags(words), words  # the other modes need a corpus
            small = ["bash", name, "demo", *map(str, SMALLER["train.py"])]
            done = subprocess.run(small, capture_output=True, text=True, env=env)
            assert done.returncode == 0 and "FPS (blocks/s)" in done.stdout, (
                done.stdout + done.stderr
            )
        elif not any(path in word for word in words for path in lacking):
            try:
                call(PROGRAMS[name].main, *argv)
            except InputError as e:
                package = re.search(r"pip install (\w+)$", str(e))
                assert package and not has(package[1]), (words, str(e))
                packages.add(package[1])
                lacking |= set(places(words))
        else:
            lacking |= set(places(words))
        missing = [path for path in results(words) if not glob.glob(path)]
        assert not missing or lacking & set(places(words)), (words, missing)
    for source, vectors in ((README, "output/lines.npy"), (CHINESE, "output/zh.npy")):
        if vectors not in lacking:
            assert len(np.load(vectors)) == PAGES[source].count("\n"), vectors
    if has("transformers") and "output/demo-hf" not in lacking:
        (block,) = (block for kind, block in FENCE.findall(PAGES[README]) if kind == "python")
        found = {}
        exec(block, found)
        assert found["states"].shape[1] == len("<s> how to write a loop </s>".split())
    else:
        packages.add("transformers")
    if shutil.which("git"):
        shutil.copy(HERE / ".gitignore", tmp_path)
        subprocess.run(["git", "init", "--quiet"], check=True)
        shown = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True
        ).stdout.splitlines()
        made = {line[3:].rstrip("/") for line in shown} - {path.name for path in HERE.iterdir()}
        assert made == {
            "bin",
            "bpe",
        }  # those of this test; what a reader puts here or makes is ignored
    if packages:
        pytest.skip(f"all ran except what needs {', '.join(sorted(packages))}")


def test_every_program_prints_its_version_and_the_changelog_begins_with_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "--version"])
    for module in PROGRAMS.values():
        with pytest.raises(SystemExit, match="^0$"):
            module.main()
        assert capsys.readouterr().out == f"data2vec-text {config.VERSION}\n", module
    newest = re.search(r"^## ([\d.]+), ([\d-]+)$", PAGES["docs/changelog.md"], re.M)
    assert newest[1] == config.VERSION
    cited = (HERE / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {newest[1]}\ndate-released: {newest[2]}\n" in cited


# ---------------------------------------------------------------------------------------------- text


def sections(text: str) -> list[str]:
    return re.split(r"^## ", FENCE.sub("", text), flags=re.M)


def shape(section: str) -> tuple:
    """What a translation keeps: rows and columns of tables, list items, pictures, spans of code."""
    rows = [line.count("|") for line in section.splitlines() if line.startswith("|")]
    return rows, section.count("\n- "), section.count("!["), sorted(re.findall(r"`[^`]+`", section))


@pytest.mark.parametrize("english, chinese", PAIRS)
def test_two_languages_have_the_same_commands_sections_tables_and_code(english, chinese):
    left, right = PAGES[english], PAGES[chinese]
    assert [words for words, _ in commands(left)] == [words for words, _ in commands(right)]
    blocks = [
        [(kind, text) for kind, text in FENCE.findall(page) if kind != "bash"]
        for page in (left, right)
    ]
    assert blocks[0] == blocks[1]  # output and Python to the letter
    for a, b in zip(sections(left), sections(right), strict=True):
        assert shape(a) == shape(b), a.splitlines()[0]
    # a line break between two Chinese characters is shown as a blank
    assert not re.search(r"[\u3000-\u9fff\uff00-\uffef]\n[\u4e00-\u9fff]", FENCE.sub("", right))


def anchor(heading: str) -> str:
    kept = (c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_and_tests_that_a_page_names_exist(name):
    text = PAGES[name]
    anchors = {anchor(heading) for heading in re.findall(r"^##+ (.+)$", text, re.M)}
    targets = re.findall(r"\]\(([^)]+)\)", text)
    for target in targets:
        there = (HERE / name).parent / target
        assert (
            target[1:] in anchors
            if target[0] == "#"
            else target.startswith("https:") or there.exists()
        ), target
    for pair in PAIRS:
        if name in pair:
            assert Path(pair[pair[0] == name]).name in targets
    tests = "".join(
        path.read_text(encoding="utf-8")
        for path in [HERE / "test_core.py", *HERE.glob("test/*.py")]
    )
    for test in re.findall(r"\btest_\w{20,}", text):
        assert f"def {test}(" in tests, test


@pytest.fixture(scope="module")
def known_flags() -> dict[str, set]:
    """The flags in each program's --help_all, or --help."""
    found = {}
    for name, module in PROGRAMS.items():
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            for word in ("--help_all", "--help"):
                with pytest.MonkeyPatch.context() as patch, pytest.raises((SystemExit, InputError)):
                    patch.setattr(sys, "argv", [name, word])
                    module.main()
        found[name] = set(re.findall(r"^  (?:-\w, )?--(\w+)", out.getvalue(), re.M))
    return found


@pytest.mark.parametrize(
    "name", [name for name in PAGES if name != "docs/changelog.md"]
)  # names old flags, too
def test_flags_that_a_page_names_exist(name, known_flags):
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", PAGES[name])):
        started = next(
            (
                p
                for p in PROGRAMS
                if re.match(rf"(python (-m )?|torchrun .*)?{re.escape(p)} ", code)
            ),
            None,
        )
        known = known_flags[started] if started else set().union(*known_flags.values())
        if started or code.startswith("--"):
            for flag in re.findall(
                r"(?<!\S)--([\w-]+)(?![\w.-])", code[code.index(started) if started else 0 :]
            ):
                assert flag.replace("-", "_") in known, code


def test_the_readmes_are_short_name_every_file_and_room_and_link_every_page():
    files = {
        path.name
        for suffix in ("py", "sh", "md", "toml", "cff")
        for path in HERE.glob(f"*.{suffix}")
    }
    files |= {path.name for path in HERE.glob("requirements*.txt")} | {"LICENSE"}
    rooms = {
        f"{path.parent.name}/"
        for path in HERE.glob("[a-z]*/*")
        if path.suffix in (".py", ".md", ".sh")
    }
    for name in (README, CHINESE):
        rows = re.findall(r"^\| (`[^|]+) \|", PAGES[name].split("\n## ")[-1], re.M)
        assert sorted(re.findall(r"`([^`]+)`", "".join(rows))) == sorted(files | rooms)
        assert PAGES[name].count("\n") <= 180
    assert set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES[README])) == set(DOCS) & set(ENGLISH)
