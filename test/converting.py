"""What the tests of conversions share."""

import collections
import enum
import itertools
import json
import sys
import types

import convert
import train
from run import checkpoint
from test.helpers import call, few, random_encoder
from text.binarized import Dictionary

import pytest
import torch

WORDS = 60  # in the dictionary of the fixture corpus_dir


@pytest.fixture(scope="module")
def saved(tmp_path_factory, corpus_dir):
    """A run of four updates, as released, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("saved")
    argv = "--fairseq_exact --max_update 4 --save_interval_updates 2 --keep_interval_updates -1"
    call(train.main, *few(corpus_dir, folder, *argv.split(), "--disable_validation"))
    return folder


@pytest.fixture
def random_file(tmp_path, saved, request):
    """A checkpoint whose every weight is random, student and teacher apart; of a pre-norm model
    with the parameter True."""
    content = checkpoint.load(saved / "checkpoint_last.pt").content
    size, pre_norm = content["dictionary"]["size"], getattr(request, "param", False)
    models = [random_encoder(seed, size, normalize_before=pre_norm)[0] for seed in (1, 2)]
    if pre_norm:  # the moments are those of another model
        content["config"]["normalize_before"], content["optimizer"]["state"] = True, {}
    content.update(student=models[0].state_dict(), teacher=models[1].encoder.state_dict())
    checkpoint.save(content, tmp_path / "random.pt")
    return tmp_path / "random.pt", models


both_norms = pytest.mark.parametrize(
    "random_file", [False, True], indirect=True, ids=["post-norm", "pre-norm"]
)


def write_bpe(folder) -> Dictionary:
    """Write encoder.json, vocab.bpe, and a dict.txt that lacks three of the BPE's tokens."""
    alphabet = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "the", "\u0120the"]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n\u0120 the\n")
    known = [i for i, token in enumerate(tokens) if token not in ("th", "q", "z")]
    (folder / "dict.txt").write_text("".join(f"{i} 1\n" for i in reversed(known)))
    return Dictionary(folder / "dict.txt")


def edit(file, **parts):
    """Changes entries A__B of a folder's JSON file: to a value, by a function, or ... for none."""

    def change(folder):
        path = folder / file
        tree = json.loads(path.read_text("utf-8")) if path.exists() else {}
        for name, value in parts.items():
            *above, last = name.split("__")
            node = tree
            for key in above:
                node = node[key]
            node[last] = value(node[last]) if callable(value) else value
            if value is ...:
                del node[last]
        path.write_text(json.dumps(tree), "utf-8")

    return change


def replace(old: bytes, new: bytes):
    """Replaces bytes of a folder's model.safetensors."""

    def change(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(old, new))

    return change


def run(source, kind, out, *argv):
    return call(convert.main, "--ckpt", source, "--to", kind, out, *argv)


def pretend(thing, place: str, monkeypatch):
    """Lets pickle find a class or a function in a module that is not there."""
    thing.__module__, thing.__qualname__ = place, thing.__name__
    module = types.SimpleNamespace(**{thing.__name__: thing})
    for part in itertools.accumulate(place.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, part, module)


class OnNpu:
    """Pickles a tensor as torch_npu does with one that lies on an NPU."""

    def __init__(self, tensor, rebuild, layout):
        self.tensor, self.rebuild, self.layout = tensor.contiguous(), rebuild, layout

    def __reduce__(self):
        t = self.tensor
        place = (t._typed_storage(), t.storage_offset(), tuple(t.shape), t.stride())
        return self.rebuild, (*place, False, collections.OrderedDict(), self.layout)


def save_of_npu(tree, path, monkeypatch):
    """torch.save of the tree as on an NPU, with each way to tell a layout."""

    def _rebuild_npu_tensor(*args):
        raise AssertionError("a file has made torch_npu run")

    Format = enum.IntEnum("Format", {"ND": 2})
    # some releases of Python 3.11 pickle a member by getattr, which no safe loader takes
    Format.__reduce_ex__ = lambda member, _: (Format, (member.value,))
    pretend(_rebuild_npu_tensor, "torch_npu.utils.storage", monkeypatch)
    pretend(Format, "torch_npu.npu._format", monkeypatch)
    layouts = itertools.cycle([2, True, Format.ND])

    def on_npu(node):
        if isinstance(node, dict):
            return type(node)((key, on_npu(value)) for key, value in node.items())
        is_tensor = isinstance(node, torch.Tensor)
        return OnNpu(node, _rebuild_npu_tensor, next(layouts)) if is_tensor else node

    torch.save(on_npu(tree), path)


def same(a, b):
    """Whether two trees are equal to the bit, types and order included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
