"""Reads the files that torch.save wrote, fairseq's of any age, without running code from them.

Files of older fairseq releases hold objects of its own classes (argparse's Namespace, OmegaConf's
containers). Each is replaced by the settings that it holds, or by an inert object.
"""

import collections
import operator
import pickle
import types

from run import checkpoint

import torch

STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()


def load(path, mmap: bool):
    """What torch.save wrote at `path`. Raises whatever torch raises for a damaged or foreign file.

    In place of an object that is no settings it has an Inert whose class has the object's name.
    """
    # torch's own reader refuses every class that is not on its list
    try:
        return checkpoint.load_plain(path, mmap)
    except pickle.UnpicklingError:
        options = dict(map_location="cpu", mmap=mmap, pickle_module=INERT_PICKLE)
        return torch.load(str(path), weights_only=False, **options)


def without_objects(node, seen: dict):
    """`node` with None in place of each Inert, so that torch.save can write it.

    seen: id -> result, {} to begin with, so that shared parts stay shared and a cycle ends.
    """
    if id(node) in seen:
        return seen[id(node)]
    if isinstance(node, (Inert, type)):
        return None
    if isinstance(node, dict):
        is_ordered = isinstance(node, collections.OrderedDict)
        seen[id(node)] = copy = collections.OrderedDict() if is_ordered else {}
        for key, value in node.items():
            if not isinstance(key, Inert):
                copy[key] = without_objects(value, seen)
    elif isinstance(node, list):
        seen[id(node)] = copy = []
        copy.extend(without_objects(value, seen) for value in node)
    elif isinstance(node, tuple):
        parts = tuple(without_objects(value, seen) for value in node)
        # torch.save writes an object once, however often it occurs
        seen[id(node)] = node if all(map(operator.is_, parts, node)) else parts
    return seen.get(id(node), node)


class Inert:
    """Replaces an object whose class must not run, and ignores what a pickle does to it."""

    def __init__(self, *args, **kwargs):
        pass

    def ignore(self, *args, **kwargs):
        return self

    # what a pickle's opcodes call, apart from setting the state
    __call__ = __setitem__ = append = extend = add = ignore


class _InertUnpickler(pickle._Unpickler):
    """The unpickler written in Python, since one in C has no load_build to override."""

    # what may be called: it makes tensors and dicts
    ALLOWED = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    }
    ALLOWED |= {("torch", f"{kind}Storage"): getattr(torch, f"{kind}Storage") for kind in STORAGES}
    ALLOWED |= {(known.__module__, known.__name__): known for known in checkpoint.NPU}

    def load_build(self):
        # pickle's own sets attributes of whatever it is told to, torch's functions among them
        state = self.stack.pop()
        node = self.stack[-1]
        if not isinstance(node, Inert) or not isinstance(state, dict):
            return
        # the settings in a Namespace, and in OmegaConf's containers and nodes
        settings = [state[key] for key in ("_content", "_val") if key in state]
        if type(node).__name__ == "Namespace":
            settings = [state]
        for value in settings[:1]:
            self.stack[-1] = value
            # whatever refers to the node later on gets the settings, too
            self.memo |= {i: value for i, other in self.memo.items() if other is node}

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def find_class(self, module, name):
        allowed = self.ALLOWED.get((module, name))
        # a class of the same name, for load_build and for messages
        return allowed or type(name[:100], (Inert,), {"__module__": module})


INERT_PICKLE = types.SimpleNamespace(
    __name__="inert_pickle",
    Unpickler=_InertUnpickler,
    load=lambda file, **options: _InertUnpickler(file, **options).load(),
)
