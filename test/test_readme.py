"""The README and the pages in docs/: their commands run, what they name exists, languages agree.

A command is run unless it holds a word in capitals, which is the reader's to fill in, or its
comment begins with "needs". The others are parsed, but for those that need an older version.
"""

import gzip
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import config
from config import InputError
from test.helpers import FEW, HERE, call, copy_of_the_project

import numpy as np
import pytest
from torch.distributed.run import get_args_parser

README = "README.md"
CHINESE = "docs/README.zh-CN.md"
DOCS = sorted(f"docs/{path.name}" for path in HERE.glob("docs/*.md"))
PAGES = {name: (HERE / name).read_text(encoding="utf-8") for name in (README, *DOCS)}
ENGLISH = [name for name in PAGES if "zh-CN" not in name]
TRANSLATED = ("docs/ascend", "docs/fairseq", "docs/golden")
PAIRS = [(README, CHINESE), *((f"{name}.md", f"{name}.zh-CN.md") for name in TRANSLATED)]
NAMES = "train.py eval.py bench.py preprocess.py convert.py finetune.py".split()
NAMES += "judge.plot text.reviews tasks.word_order tasks.table test.soak".split()
PROGRAMS = {name: importlib.import_module(name.removesuffix(".py")) for name in NAMES}
PROGRAMS["data.py"] = importlib.import_module("run.describe")  # which describes a dataset, too
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def commands(text: str) -> list[tuple[list[str], str]]:
    """(words, comment) of each command in the shell blocks."""
    shell = [block for kind, block in FENCE.findall(text) if kind == "bash"]
    lines = "".join(shell).replace("\\\n", " ").splitlines()
    parts = [line.partition(" #") for line in lines]
    return [(shlex.split(words), comment.strip()) for words, _, comment in parts]


def program(words: list[str]) -> str | None:
    """The program of ours that a command starts, if any."""
    return next((word for word in words if word in PROGRAMS or word == "run_1p.sh"), None)


def flags(words: list[str]) -> list[str]:
    return words[words.index(program(words)) + 1 :]


def is_run(words: list[str], comment: str) -> bool:
    if comment.startswith("needs"):
        return False
    unknown = [word for word in words if not (HERE / word).exists()]  # README.md exists
    parts = re.split("[=:/ ]", " ".join(unknown))
    return not any(re.fullmatch(r"[A-Z]{3,}(\.\w+)?", part) for part in parts)


COMMANDS = [command for name in ENGLISH for command in commands(PAGES[name])]
RUN = [words for words, comment in COMMANDS if is_run(words, comment)]
PARSED = [words for words, comment in COMMANDS if words not in RUN and "needs 0." not in comment]


@pytest.mark.parametrize("words", PARSED, ids=" ".join)
def test_program_and_flags_of_a_command_that_is_not_run_exist(words, monkeypatch):
    name = program(words)
    if name is None:
        assert words[0] in ("pip", "source")
        assert all((HERE / word).exists() for word in words if word.endswith(".txt"))
        return
    if name == "run_1p.sh":
        mode, *options = flags(words)
        script = (HERE / name).read_text(encoding="utf-8")
        assert f"#   bash run_1p.sh {mode} " in script
        assert all(option.split("=")[0].replace("--", " __") in script for option in options)
        return
    if words[0] == "torchrun":
        get_args_parser().parse_args(words[1:])
    # flags are read before the files that the command names
    monkeypatch.setattr(sys, "argv", [name, *flags(words), "--lr", "-1"])
    with pytest.raises(InputError, match="--lr|no such file"):
        PROGRAMS[name].main()


# ----------------------------------------------------------------------- the commands that are run

# Later flags override earlier ones: whatever a command asks for is done small, and on a CPU.
SMALLER = {
    "train.py": [*FEW, "--max_update", "3"],
    "eval.py": ["--device", "cpu", "--probe_places", "50"],
    "bench.py": [*FEW, "--updates", "1", "--warmup", "0", "--vocabulary", "100"],
    "preprocess.py": ["--workers", "1"],
}
# Files that the pages' commands promise, in their order.
RESULTS = """
output/0/demo/checkpoint_last.pt output/0/demo/train.jsonl output/0/train_0.log output/curves.png
zh-bin/train.idx zh-bin/valid.bin zh-bin/vocab.bpe words-bin/dict.txt wiki-bin/test.idx
checkpoints/zh/checkpoint_last.pt checkpoints/wiki/train.jsonl
output/demo-hf/model.safetensors output/demo-hf/tokenizer_config.json output/demo-teacher-hf
output/demo-fairseq.pt output/demo-native.pt output/demo-from-hf.pt demo-bin/train.bin
"""


def stand_ins(folder: Path, scratch: Path):
    """Small files under the names of those that a reader brings along, with the READMEs' text."""
    chinese = PAGES[CHINESE].encode()
    with zipfile.ZipFile(folder / "wikitext-103-raw-v1.zip", "w") as file:
        for split in ("train", "valid", "test"):
            file.writestr(f"wikitext-103-raw/wiki.{split}.raw", PAGES[README])
    with zipfile.ZipFile(folder / "books.zip", "w") as file:
        for split in ("train", "valid"):
            file.writestr(f"books/{split}.txt", PAGES[README])
    for name in ("zh1.txt", "zh3.txt"):
        (folder / name).write_bytes(chinese)
    (folder / "zh2.txt.gz").write_bytes(gzip.compress(chinese))
    argv = ["--bpe", "train", "--vocab_size", 300, "--workers", 1, "--dest", scratch]
    call(PROGRAMS["preprocess.py"].main, "--train", HERE / README, *argv)
    for name in ("encoder.json", "vocab.bpe", "dict.txt"):  # in place of GPT-2's
        shutil.copy(scratch / name, folder / name)


def run_smaller(words: list[str], env: dict):
    name = program(words)
    if name == "run_1p.sh":
        command = ["bash", name, "demo", *SMALLER["train.py"]]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FPS (blocks/s)" in done.stdout
        return
    argv = flags(words) + SMALLER.get(name, [])
    # the small texts have too few pairs for more pieces
    if name == "preprocess.py" and "--vocab_size" in argv:
        argv += ["--vocab_size", "300"]
    call(PROGRAMS[name].main, *argv)


def test_the_commands_run_in_order_and_leave_their_files(tmp_path, tmp_path_factory, monkeypatch):
    for package in ("tokenizers", "safetensors", "transformers", "matplotlib"):
        pytest.importorskip(package)
    env = copy_of_the_project(tmp_path)
    (tmp_path / "docs").mkdir()
    for name in (README, CHINESE, ".gitignore"):
        shutil.copy(HERE / name, tmp_path / name)
    stand_ins(tmp_path, tmp_path_factory.mktemp("bpe"))
    monkeypatch.chdir(tmp_path)  # paths on the pages are relative to the project's folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for words in RUN:
        run_smaller(words, env)
    assert [path for path in RESULTS.split() if not Path(path).exists()] == []
    for source, vectors in ((README, "output/lines.npy"), (CHINESE, "output/zh.npy")):
        assert len(np.load(vectors)) == PAGES[source].count("\n")

    (block,) = (block for kind, block in FENCE.findall(PAGES[README]) if kind == "python")
    names = {}
    exec(block, names)  # the README's lines for transformers
    assert names["states"].shape[1] == len("<s> how to write a loop </s>".split())

    if shutil.which("git"):  # what a reader puts here, or makes, is ignored
        subprocess.run(["git", "init", "--quiet"], check=True)
        status = ["git", "status", "--porcelain"]
        lines = subprocess.run(status, capture_output=True, text=True).stdout.splitlines()
        assert [line for line in lines if not (HERE / line[3:].strip('"')).exists()] == []


def test_every_program_prints_its_version_and_the_changelog_begins_with_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "--version"])
    for module in PROGRAMS.values():
        with pytest.raises(SystemExit, match="^0$"):
            module.main()
        assert capsys.readouterr().out == f"data2vec-text {config.VERSION}\n"
    newest = re.search(r"^## ([\d.]+), ", PAGES["docs/changelog.md"], re.M)
    assert newest[1] == config.VERSION
    assert f"version = {{{config.VERSION}}}" in PAGES[README].replace("  ", "")


def shape(section: str) -> tuple:
    """What a translation keeps: columns of tables, list items, pictures, spans of code."""
    rows = [line.count("|") for line in section.splitlines() if line.startswith("|")]
    spans = sorted(re.findall(r"`[^`]+`", section))
    return rows, section.count("\n- "), section.count("!["), spans


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_two_languages_have_the_same_commands_sections_tables_and_code(english, chinese):
    pages = PAGES[english], PAGES[chinese]
    words, other_words = ([words for words, _ in commands(page)] for page in pages)
    assert words == other_words
    others, same = ([b for b in FENCE.findall(page) if b[0] != "bash"] for page in pages)
    assert others == same  # to the letter
    sections, other_sections = (FENCE.sub("", page).split("\n## ") for page in pages)
    for section, other in zip(sections, other_sections, strict=True):
        assert shape(section) == shape(other), section.splitlines()[0]
    # a line break between two Chinese characters is shown as a blank
    text = FENCE.sub("", PAGES[chinese])
    assert not re.search(r"[\u3000-\u9fff\uff00-\uffef]\n[\u4e00-\u9fff]", text)


@pytest.mark.parametrize("name", PAGES)
def test_links_and_tests_that_a_page_names_exist(name):
    text = PAGES[name]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path = (HERE / name).parent / target
        assert target.startswith("https:") or path.exists(), target
    files = [HERE / "test_core.py", *HERE.glob("test/*.py")]
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    for test in re.findall(r"\btest_\w{20,}", text):
        assert f"def {test}(" in tests, test


@pytest.fixture(scope="module")
def known_flags() -> set:
    """The flags of all programs, as --help_all or --help shows them."""
    shown = ""
    for name in PROGRAMS:
        start = [HERE / name] if name.endswith(".py") else ["-m", name]
        word = "--help_all" if name in ("train.py", "eval.py", "finetune.py") else "--help"
        command = [sys.executable, *start, word]
        shown += subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout
    return set(re.findall(r"--(\w+)", shown))


@pytest.mark.parametrize("name", [name for name in PAGES if name != "docs/changelog.md"])
def test_flags_that_a_page_names_exist(name, known_flags):
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", PAGES[name])):
        if code.startswith("--") or program(code.split()):
            for flag in re.findall(r"(?<!\S)--([\w-]+)(?![\w.-])", code):
                assert flag.replace("-", "_") in known_flags, code


def test_the_readme_names_every_file_and_room_and_links_every_page():
    files = {path.name for path in HERE.iterdir() if path.suffix in (".py", ".sh", ".md", ".toml")}
    files |= {"LICENSE", "requirements.txt"}
    # a folder is a room if it holds programs or pages
    rooms = {f"{path.parent.name}/" for path in [*HERE.glob("*/*.py"), *HERE.glob("docs/*.md")]}
    for name in (README, CHINESE):
        rows = re.findall(r"^\| `.+$", PAGES[name], re.M)
        assert files | rooms <= set(re.findall(r"`([^`]+)`", "".join(rows)))
    links = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES[README]))
    assert links == {name for name in ENGLISH if name != README}


def test_the_lines_that_contributing_shows_are_the_programs():
    program_text = (HERE / "train.py").read_text(encoding="utf-8")
    (block,) = [block for _, block in FENCE.findall(PAGES["docs/CONTRIBUTING.md"])]
    assert all(line in program_text for line in block.splitlines())
