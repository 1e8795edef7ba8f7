"""Damaged and hostile checkpoint files: each is refused in one line, or loads equal."""

import pickle
import random
import struct
import tarfile
import zipfile

import convert
import eval as evaluation
import train
from config import InputError
from formats.load import load
from run import checkpoint
from test.helpers import few, small_content

import pytest
import torch

BIAS = "encoder.sentence_encoder.layernorm_embedding.bias"
SHAPE = (4, 6)


# --------------------------------------------------------------------------------------- archives


def test_a_flipped_byte_anywhere_is_refused_or_harmless_and_a_cut_is_refused(tmp_path):
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.rand(9), "exp_avg_sq": torch.rand(9)}
    file, rng = tmp_path / "x.pt", random.Random(0)
    checkpoint.save(small_content(optimizer=dict(state={0: moments}, param_groups=[])), file)
    # 0.1.0 kept a digest as the archive's comment
    comment = b"data2vec-text sha256 " + bytes(range(32))
    good = file.read_bytes()[:-2] + len(comment).to_bytes(2, "little") + comment
    file.write_bytes(good)
    refused, expected = 0, str(torch.load(file, weights_only=True))  # torch alone reads it, too
    ends = [0, 1, 5, len(good) - 1, len(good) - 30]
    for at in ends + [rng.randrange(len(good)) for _ in range(400)]:
        file.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
        try:
            assert str(checkpoint.load(file).content) == expected
        except InputError as e:
            assert "x.pt" in str(e) and "\n" not in str(e)
            refused += 1
        file.write_bytes(good[: min(at, len(good) - len(comment) - 1)])
        with pytest.raises(InputError):
            checkpoint.load(file)
    assert refused > 250


def rewrite(source, target, method, change=lambda name, content: content):
    """Write the records of an archive once more, changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_records_that_are_compressed_oversized_unchecked_or_too_short_are_refused(tmp_path):
    file, bad = tmp_path / "x.pt", tmp_path / "bad.pt"
    checkpoint.save(small_content(), file)
    good = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        large = next(record for record in archive.infolist() if record.file_size == 400)
    central = good.rindex(large.filename.encode()) - 46  # of its entry in the directory at the end

    def field(offset, value):
        at = central + offset
        bad.write_bytes(good[:at] + value + good[at + len(value) :])

    def shorten(name, content):
        return content[:16] if name.endswith("data/0") else content

    ours = {"format": checkpoint.FORMAT, **small_content()}
    torch.save({"model": {BIAS: torch.ones(1_000_000)}}, file)
    for damage, message in (
        (lambda: rewrite(file, bad, zipfile.ZIP_DEFLATED), "a compressed record"),
        (lambda: rewrite(file, bad, zipfile.ZIP_STORED, shorten), r"bad\.pt: cannot be read"),
        (lambda: field(24, (10**9).to_bytes(4, "little")), "larger than the file"),
        (lambda: field(16, bytes(4)), "checksum"),
        (lambda: torch.save(ours, bad, _use_new_zipfile_serialization=False), "damaged: not"),
    ):
        damage()
        with pytest.raises(InputError, match=message):
            load(bad)


def test_a_tar_archive_is_refused_before_torch_sees_it(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        archive.add(__file__, "\x80storages")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(InputError, match=r"x\.pt: cannot be read"):
        load(tmp_path / "x.pt")


def test_a_pickle_sets_no_attribute_and_writes_no_file(tmp_path):
    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    function, patch = torch._utils._rebuild_tensor_v2, tmp_path / "made"
    slots = text("dump_patches") + b"\x88" + text("__name__") + text(str(patch))
    slots += text("__defaults__") + b"(K\1K\2t"
    # torch compares an old file's sources with its own, and saves the difference where a class has
    # dump_patches
    body = b"\x80\2cforeign\nThing\n0ctorch._utils\n_rebuild_tensor_v2\nq\0(N}(" + slots + b"utb0"
    body += b"(" + text("module") + b"h\0" + text("file") + text("another\nsource\n") + b"tQ0}."
    heads = (0x1950A86A20F9469CFC6C, 1001, {})
    raw = b"".join(pickle.dumps(part, 2) for part in heads) + body + pickle.dumps([], 2)
    (tmp_path / "x.pt").write_bytes(raw)
    before = function.__name__, function.__defaults__
    for reader in (load, checkpoint.load):
        with pytest.raises(InputError):
            reader(tmp_path / "x.pt")
    assert (function.__name__, function.__defaults__) == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


# ---------------------------------------------------------------------------------------- entries


def without_format(path) -> dict:
    return {k: v for k, v in checkpoint.load(path).content.items() if k != "format"}


DAMAGE = {  # entry: what may be there instead; None: nothing
    "config": [None, [1], {"layers": {"a": 1}}, {"layers": 10**5000}, {"seed": "x" * 10**5}],
    "dictionary": [None, {"digest": 4}],
    "student": [None, {"weight": 1.0}, {3: torch.zeros(1)}],
    "teacher": [None, {"weight": torch.zeros(1)}],
    "optimizer": [None, {"state": {"a": {}}, "param_groups": []}, {"state": 3}],
    "scaler": [None, [1]],
    "rng": [None, {}, {"cpu": torch.zeros(3, dtype=torch.uint8)}, {"cpu": torch.zeros(5056)}],
    "progress": [None, {}],
    "log": [None, {"updates": 3, "skipped": [], "seconds": 0.0}, {"updates": []}],
}


@pytest.mark.parametrize("entry", DAMAGE)
def test_an_odd_entry_ends_a_resume_in_one_line_without_loss(saved, corpus_dir, tmp_path, entry):
    content, file = without_format(saved / "checkpoint_last.pt"), tmp_path / "checkpoint_last.pt"
    values = DAMAGE[entry]
    if entry == "progress":
        wrong = dict(epoch=-1, batches="x", best_loss="low", num_updates=2**63, data=None)
        values = [*values, *({**content["progress"], name: v} for name, v in wrong.items())]
    for value in values:
        damaged = {k: v for k, v in content.items() if k != entry}
        checkpoint.save(damaged if value is None else {**damaged, entry: value}, file)
        before = file.read_bytes()
        with pytest.raises(InputError, match=r"checkpoint_last\.pt") as error:
            train.main(few(corpus_dir, tmp_path, "--max_update", 5))
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000, value
        assert file.read_bytes() == before


def test_settings_of_a_wrong_type_or_size_are_refused_by_name(saved, corpus_dir, tmp_path):
    file = str(tmp_path / "x.pt")
    for name, value in (("layers", "two"), ("embed_dim", 2147483640), ("lr", [1])):
        content = without_format(saved / "checkpoint_last.pt")
        content["config"][name] = value
        checkpoint.save(content, file)
        with pytest.raises(InputError, match=f"--{name} "):
            convert.main(["--ckpt", file, "--to", "native", str(tmp_path / "y.pt")])
        with pytest.raises(InputError, match=f"--{name} "):
            evaluation.main(["--ckpt", file, "--data_path", str(corpus_dir), "--device", "cpu"])


# ---------------------------------------------------------------------------------------- tensors

ODD = dict(
    stride_0=lambda: torch.zeros(1, 1).expand(SHAPE),
    empty=lambda: torch.zeros(0),
    sparse=lambda: torch.eye(4, 6).to_sparse(),
    quantized=lambda: torch.quantize_per_tensor(torch.rand(SHAPE), 0.1, 0, torch.quint8),
    meta=lambda: torch.zeros(SHAPE, device="meta"),
    nested=lambda: torch.nested.nested_tensor([torch.rand(SHAPE)]),
    integer=lambda: torch.zeros(SHAPE, dtype=torch.int64),
    none=lambda: None,
)


@pytest.mark.filterwarnings("ignore")  # some of these kinds are still in beta
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused_as_moments_and_as_weights(kind):
    odd, good = ODD[kind](), torch.rand(SHAPE)
    module = torch.nn.Linear(6, 4, bias=False)
    for name in checkpoint.MOMENTS:
        state = {0: {"step": torch.tensor(1.0), "exp_avg": good, "exp_avg_sq": good, name: odd}}
        with pytest.raises(InputError, match=f"x.pt: the optimizer's {name} of parameter 0"):
            checkpoint.checked_moments(state, [good], "x.pt")
    with pytest.raises(InputError, match="x.pt: the student weight"):
        checkpoint.put({"weight": odd}, module, "the student", "x.pt")


STEPS = [None, float("nan"), float("inf"), -1, torch.zeros(2), torch.tensor(-1.0), 1j, "x"]


def test_moments_are_those_of_exactly_the_parameters_finite_and_in_memory_of_their_own():
    rows = torch.rand(8, 6, dtype=torch.float64)
    weights = [torch.rand(SHAPE)] * 2
    state = {  # views that share memory, one of them transposed
        0: {"step": 3, "exp_avg": rows[:4], "exp_avg_sq": rows[4:].half()},
        1: {"step": torch.tensor([3.0]), "exp_avg": rows[:4], "exp_avg_sq": rows.T[:, :4].T},
    }
    checked = checkpoint.checked_moments(state, weights, "x.pt")
    assert list(checked) == [0, 1] and checkpoint.checked_moments({}, weights, "x.pt") == {}
    memory = {rows.data_ptr()}
    for i, entry in checked.items():
        assert entry["step"].shape == () and entry["step"] == 3
        for name in checkpoint.MOMENTS:
            assert entry[name].is_contiguous() and entry[name].dtype == torch.float32
            assert torch.equal(entry[name], state[i][name].float())
            memory.add(entry[name].data_ptr())
    assert len(memory) == 5
    nan = torch.full(SHAPE, float("nan"))
    for wrong, message in (
        ({0: state[0]}, "exp_avg of parameter has no 1"),
        ({**state, 2: state[0]}, "exp_avg of parameter has 2, which"),
        ({0: state[0], "1": state[1]}, "exp_avg of parameter has no 1"),
        ({**state, 1: {**state[1], "exp_avg": nan}}, "exp_avg of parameter 1 is not finite"),
        *(
            ({**state, 0: {**state[0], "step": step}}, "optimizer's step of parameter 0")
            for step in STEPS
        ),
    ):
        with pytest.raises(InputError, match=message):
            checkpoint.checked_moments(wrong, weights, "x.pt")
