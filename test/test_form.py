"""The form of the project: what test/form.py measures stays within its limits."""

import ast
import re

from test import form

import pytest

# None may grow without a reason that is worth it. 0.3.0, laid out alike, has 12,719 lines and
# 12,747 of tests. 0.4.0 gained data2vec 2.0 (about 1,000 and 600), and files and machines that
# mean or do something else (850 and 1,050). Beside some stands the goal.
LIMITS = {
    "product lines": 12_412,  # 8,200 without data2vec 2.0
    "test lines": 9_183,  # 6,500
    "lines that decide a number": 1217,  # 1,150
    "files of over 60 lines of code with under 8": 0,
    "lines over 100 columns": 0,
    "longest file": 400,
    "longest function": 50,
    "loop": 44,
    "update": 30,
    "README": 150,
    "docs": 1200,
    "entries at the top": 26,  # 25 and data2vec2.py
    "imports that climb": 0,
    "files in a circle": 0,
}


def test_the_numbers_of_the_form_are_within_their_limits():
    numbers = form.numbers()
    over = {name: numbers[name] for name, limit in LIMITS.items() if numbers[name] > limit}
    assert not over
    assert numbers["comments for 100 lines of code, median"] >= 10


def test_only_the_room_of_hardware_compares_the_type_of_a_device():
    for path in form.product():
        if path.parts[0] != "hardware":
            match = form.DEVICE_TYPE.search("\n".join(form.lines_of(path)))
            assert not match, (path, match[0])


def test_every_file_says_what_it_is_and_every_room_its_rule():
    for path in form.sources():
        assert ast.get_docstring(form.tree_of(path)), path


def test_no_function_of_train_holds_another_and_no_class_or_function_shares_finetunes_names():
    names = {}
    for program in ("train.py", "finetune.py"):
        body = form.tree_of(form.Path(program)).body
        kinds = (ast.FunctionDef, ast.ClassDef)
        names[program] = {node.name for node in body if isinstance(node, kinds)}
    assert names["train.py"] & names["finetune.py"] <= {"main", "add_flags"}
    for node in ast.walk(form.tree_of(form.Path("train.py"))):
        if isinstance(node, ast.FunctionDef):
            inner = [n for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
            assert inner == [node], node.name


def test_the_update_reads_like_the_paper():
    sentences = (
        r"target = teacher_targets\(.*\n +prediction = run\.student\(.*\n +loss = data2vec_loss\("
    )
    assert re.search(sentences, "\n".join(form.lines_of(form.Path("train.py"))))


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ('device.type == "cpu"', True),
        ('kind != "npu"', True),
        ('x.device.type in ("cuda", "npu")', True),
        ('f"{device.type} is full"', False),
    ],
)
def test_a_comparison_of_a_devices_type_is_found(text, is_found):
    assert bool(form.DEVICE_TYPE.search(text)) == is_found
