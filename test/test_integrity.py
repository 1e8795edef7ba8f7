"""Damaged and hostile checkpoint files: each is refused in one line, or loads equal."""

import io
import pickle
import random
import re
import resource
import struct
import tarfile
import zipfile

import convert
import eval as evaluation
import train
from config import InputError
from formats import integrity
from run import checkpoint
from test.helpers import few, small_content

import pytest
import torch

# ---------------------------------------------------------------------------------------------- damaged files


def flat(tree):
    """All leaves of a tree, tensors as lists, with the keys on the way."""
    if isinstance(tree, dict):
        return [(key, flat(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)):
        return [flat(value) for value in tree]
    return (tree.dtype, tree.tolist()) if isinstance(tree, torch.Tensor) else tree


def test_a_flipped_byte_anywhere_is_refused_or_harmless_and_a_cut_is_refused(tmp_path):
    optimizer = {
        "state": {
            0: {"step": torch.tensor(1.0), "exp_avg": torch.rand(9), "exp_avg_sq": torch.rand(9)}
        }
    }
    file = tmp_path / "x.pt"
    checkpoint.save(small_content(optimizer={**optimizer, "param_groups": []}), file)
    good = file.read_bytes()
    expected, refused = flat(torch.load(file, weights_only=True)), 0  # torch alone can read it, too
    assert flat(checkpoint.load(file).content) == expected
    rng = random.Random(0)
    for at in [0, 1, 5, len(good) - 1, len(good) - 30] + [
        rng.randrange(len(good)) for _ in range(400)
    ]:
        file.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
        try:
            assert flat(checkpoint.load(file).content) == expected
        except InputError as e:
            assert re.search("damaged: |cannot be read", str(e)) and "\n" not in str(e)
            refused += 1
        file.write_bytes(good[:at])
        with pytest.raises(InputError, match="damaged: |cannot be read"):
            checkpoint.load(file)
    assert refused > 250


def test_files_of_version_0_1_0_with_a_digest_as_the_archives_comment_are_read(tmp_path):
    file = tmp_path / "x.pt"
    checkpoint.save(small_content(5), file)
    comment = b"data2vec-text sha256 " + bytes(range(32))
    sealed = file.read_bytes()[:-2] + len(comment).to_bytes(2, "little") + comment
    file.write_bytes(sealed)
    assert checkpoint.load(file).content["progress"]["num_updates"] == 5
    file.write_bytes(
        sealed.replace(torch.tensor(77.0).numpy().tobytes(), torch.tensor(78.0).numpy().tobytes())
    )
    with pytest.raises(InputError, match="damaged: the record .* does not fit its checksum"):
        checkpoint.load(file)


def test_compressed_oversized_and_unchecked_records_are_refused_before_they_are_read(tmp_path):
    file, bomb = tmp_path / "x.pt", tmp_path / "bomb.pt"
    checkpoint.save(small_content(), file)
    with (
        zipfile.ZipFile(file) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(
                name, bytes(4_000_000) if name.endswith("data/0") else source.read(name)
            )
    assert bomb.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="damaged: a compressed record"):
        checkpoint.load(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    with zipfile.ZipFile(file) as archive:
        large = next(record for record in archive.infolist() if record.file_size == 400)
    good = file.read_bytes()
    central = good.rindex(large.filename.encode()) - 46  # of its entry in the directory at the end
    for offset, value, message in (
        (24, (10**9).to_bytes(4, "little"), "larger than the file"),
        (16, bytes(4), "checksum"),
    ):
        file.write_bytes(good[: central + offset] + value + good[central + offset + len(value) :])
        with pytest.raises(InputError, match=f"damaged: .*{message}"):
            checkpoint.load(file)


@pytest.mark.parametrize(
    "entry, value",
    [
        ("config", [1]),
        ("config", {"layers": {"a": 1}}),
        ("dictionary", {"size": 4}),
        ("student", {"weight": 1.0}),
        ("teacher", {3: torch.zeros(1)}),
        ("optimizer", {"state": {"a": {}}, "param_groups": []}),
        ("scaler", {"scale": "large"}),
        ("scaler", {"growth_factor": 2.0}),
        ("fairseq", {"cfg": {}}),
        ("rng", {}),
        ("rng", {"cpu": torch.zeros(3, dtype=torch.uint8)}),
        ("rng", {"cpu": torch.zeros(5056)}),
        ("progress", {}),
        ("progress", {"epoch": 0}),
        ("progress", {"batches": -1}),
        ("progress", {"best_loss": "low"}),
        ("progress", {"num_updates": 2**63}),
        ("progress", {"data": None}),
        ("log", {"updates": 3, "skipped": [], "seconds": 0.0}),
        (
            "log",
            {
                "updates": [dict(number=1, loss=0.1, gnorm=0.1, counts=[1, 2])],
                "skipped": [False],
                "seconds": 0.0,
            },
        ),
        ("log", {"updates": [], "skipped": [2.5], "seconds": 0.0}),
    ],
)
def test_an_entry_of_a_wrong_type_is_damage_in_one_line_that_names_it(tmp_path, entry, value):
    made = small_content()
    if entry == "progress" and value:
        value = {**made["progress"], **value}
    checkpoint.save({**made, entry: value}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=rf"x\.pt: damaged: its {entry} is not"):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("entry", [name for name in integrity.ENTRIES if not name.endswith("?")])
def test_a_missing_entry_is_damage_in_one_line_that_names_it(tmp_path, entry):
    checkpoint.save({k: v for k, v in small_content().items() if k != entry}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=rf"x\.pt: damaged: no {entry} in it"):
        checkpoint.load(tmp_path / "x.pt")


def laughs() -> list:
    """Nine levels of lists, each ten times the one below: a billion values in a small file."""
    made = ["ha"]
    for _ in range(9):
        made = [made] * 10
    return made


def endless() -> dict:
    made = {}
    made["self"] = made
    return made


@pytest.mark.parametrize(
    "value, message",
    [
        (laughs, "holds over 1,000,000 values"),
        (endless, "levels deep"),
        (lambda: 10**5000, "an integer of 16610 bits"),
    ],
)
@pytest.mark.parametrize("door", ["ours", "fairseq"])
def test_endless_entries_and_integers_are_refused_at_load(tmp_path, value, message, door):
    state = {"encoder.sentence_encoder.layernorm_embedding.bias": torch.ones(2)}
    if door == "ours":
        checkpoint.save(small_content(config={"lr": value()}), tmp_path / "x.pt")
    else:
        torch.save({"model": state, "cfg": {"model": {"lr": value()}}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        checkpoint.load(tmp_path / "x.pt")


def test_a_file_of_our_format_without_checksums_is_damaged(tmp_path):
    made = {"format": checkpoint.FORMAT, **small_content()}
    torch.save(made, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="damaged: it is not the archive"):
        checkpoint.load(tmp_path / "x.pt")


# ---------------------------------------------------------------------------------------------- hostile tensors


SHAPE = (4, 6)
ODD = dict(
    stride_0=lambda: torch.zeros(1, 1).expand(SHAPE),
    empty=lambda: torch.zeros(0),
    larger=lambda: torch.zeros(5, 6),
    smaller=lambda: torch.zeros(3),
    sparse=lambda: torch.eye(4, 6).to_sparse(),
    csr=lambda: torch.eye(4, 6).to_sparse_csr(),
    quantized=lambda: torch.quantize_per_tensor(torch.rand(SHAPE), 0.1, 0, torch.quint8),
    meta=lambda: torch.zeros(SHAPE, device="meta"),
    nested=lambda: torch.nested.nested_tensor([torch.rand(SHAPE)]),
    integer=lambda: torch.zeros(SHAPE, dtype=torch.int64),
    float4=lambda: torch.zeros(SHAPE, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    complex=lambda: torch.zeros(SHAPE, dtype=torch.complex64),
    none=lambda: None,
    number=lambda: 1.0,
)


@pytest.mark.filterwarnings("ignore")  # some of these kinds are still in beta
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused_as_moments_and_as_weights(kind, tmp_path):
    odd, good = ODD[kind](), torch.rand(SHAPE)
    module = torch.nn.Linear(6, 4, bias=False)
    for name in checkpoint.MOMENTS:
        state = {0: {"step": torch.tensor(1.0), "exp_avg": good, "exp_avg_sq": good, name: odd}}
        with pytest.raises(InputError, match=f"x.pt: the optimizer's {name} of parameter 0"):
            checkpoint.checked_moments(state, [torch.Size(SHAPE)], "x.pt")
    with pytest.raises(InputError, match="x.pt: the student weight"):
        checkpoint.put({"weight": odd}, module, "the student", "x.pt")
    if kind in ("stride_0", "sparse", "csr", "quantized", "meta", "nested"):
        for made in (
            {"model": {"x": odd}},
            {"format": checkpoint.FORMAT, **small_content(student={"x": odd})},
        ):
            torch.save(made, tmp_path / "x.pt")
            with pytest.raises(InputError, match="ordinary|cannot be read"):
                checkpoint.load(tmp_path / "x.pt")


def test_a_resume_with_moments_of_another_shape_is_refused_before_a_kernel_sees_them(
    saved, corpus_dir, tmp_path
):
    made = {
        k: v
        for k, v in checkpoint.load(saved / "checkpoint_last.pt").content.items()
        if k != "format"
    }
    made["optimizer"]["state"][5]["exp_avg"] = torch.zeros(0)
    checkpoint.save(made, tmp_path / "checkpoint_last.pt")
    with pytest.raises(
        InputError, match="checkpoint_last.pt: the optimizer's exp_avg of parameter 5 is"
    ):
        train.main(few(corpus_dir, tmp_path, "--max_update", 5))


def test_a_setting_of_a_wrong_type_is_refused_by_name(saved, corpus_dir, tmp_path):
    made = {
        k: v
        for k, v in checkpoint.load(saved / "checkpoint_last.pt").content.items()
        if k != "format"
    }
    made["config"]["layers"] = "two"
    checkpoint.save(made, tmp_path / "x.pt")
    with pytest.raises(InputError, match="--layers two: must be of type int"):
        evaluation.main(
            ["--ckpt", str(tmp_path / "x.pt"), "--data_path", str(corpus_dir), "--device", "cpu"]
        )


@pytest.mark.parametrize(
    "step", [None, float("nan"), float("inf"), -1, torch.zeros(2), torch.tensor(-1.0), 1j, "x"]
)
def test_a_step_that_is_not_one_number_is_refused(step):
    moments = {name: torch.zeros(SHAPE) for name in checkpoint.MOMENTS}
    with pytest.raises(InputError, match="step of parameter 0 is not one number"):
        checkpoint.checked_moments({0: {"step": step, **moments}}, [torch.Size(SHAPE)], "x.pt")


def test_moments_are_those_of_exactly_the_parameters_finite_and_copied_into_memory_of_their_own():
    rows = torch.rand(8, 6, dtype=torch.float64)
    shapes = [torch.Size(SHAPE)] * 2
    state = {  # views that share memory, one of them transposed
        0: {"step": 3, "exp_avg": rows[:4], "exp_avg_sq": rows[4:].half()},
        1: {"step": torch.tensor([3.0]), "exp_avg": rows[:4], "exp_avg_sq": rows.T[:, :4].T},
    }
    checked = checkpoint.checked_moments(state, shapes, "x.pt")
    assert list(checked) == [0, 1] and checkpoint.checked_moments({}, shapes, "x.pt") == {}
    for i, entry in checked.items():
        assert (
            list(entry) == ["step", *checkpoint.MOMENTS]
            and entry["step"].shape == ()
            and entry["step"] == 3
        )
        for name in checkpoint.MOMENTS:
            assert entry[name].is_contiguous() and entry[name].dtype == torch.float32
            assert torch.equal(entry[name], state[i][name].float())
    memory = [entry[name].data_ptr() for entry in checked.values() for name in checkpoint.MOMENTS]
    assert len({rows.data_ptr(), *memory}) == 5
    for wrong in ({0: state[0]}, {**state, 2: state[0]}, {0: state[0], "1": state[1]}):
        with pytest.raises(InputError, match="the optimizer has . parameters, this model has 2"):
            checkpoint.checked_moments(wrong, shapes, "x.pt")
    with pytest.raises(InputError, match="parameter 1 is not one number"):
        checkpoint.checked_moments({0: state[0], 1: [1]}, shapes[:1] + shapes[:1], "x.pt")
    state[1]["exp_avg"] = torch.full(SHAPE, float("nan"))
    with pytest.raises(InputError, match="exp_avg of parameter 1 is not finite"):
        checkpoint.checked_moments(state, shapes, "x.pt")


def test_counts_that_contradict_each_other_are_damage_in_one_line(tmp_path):
    update = dict(number=1, loss=0.1, gnorm=0.1, counts=[1, 2, 3])
    progress = small_content(3)["progress"]
    for entry, value in (
        ("log", {"updates": [update], "skipped": [], "seconds": 0.0}),  # a flag is missing
        ("log", {"updates": [{**update, "loss": 2**63}], "skipped": [False], "seconds": 0.0}),
        ("progress", {**progress, "skipped": 4}),  # of three updates
    ):
        checkpoint.save({**small_content(3), entry: value}, tmp_path / "x.pt")
        with pytest.raises(InputError, match=rf"x\.pt: damaged: its {entry} is not"):
            checkpoint.load(tmp_path / "x.pt")


def test_a_width_whose_matrices_no_memory_can_hold_is_refused_by_a_conversion(saved, tmp_path):
    made = {
        k: v
        for k, v in checkpoint.load(saved / "checkpoint_last.pt").content.items()
        if k != "format"
    }
    made["config"]["embed_dim"] = 2147483640
    checkpoint.save(made, tmp_path / "x.pt")
    with pytest.raises(InputError, match="--embed_dim 2147483640: must be at most"):
        convert.main(["--ckpt", str(tmp_path / "x.pt"), "--to", "native", str(tmp_path / "y.pt")])


# ---------------------------------------------------------------------------------------------- two readers, one file


def two_directories(harmless: bytes, hidden: bytes) -> bytes:
    """An archive with two directories of the same size: zipfile finds the first's, torch the
    second's records."""

    def parts(raw):
        size, at = struct.unpack("<LL", raw[-10:-2])
        return raw[:at], bytearray(raw[at : at + size])

    (records, directory), (others, shown) = parts(hidden), parts(harmless)
    begin, at = len(records) + len(directory), 0
    while at < len(
        shown
    ):  # zipfile adds to each offset by how much the directory is later than the end says
        offset = (
            struct.unpack("<L", shown[at + 42 : at + 46])[0]
            + begin
            - (begin + len(others) - len(records))
        )
        shown[at + 42 : at + 46] = struct.pack("<L", offset)
        at += 46 + sum(struct.unpack("<HHH", shown[at + 28 : at + 34]))
    end = (
        b"PK\5\6"
        + bytes(4)
        + harmless[-14:-10]
        + struct.pack("<LLH", len(directory), len(records), 0)
    )
    return records + directory + others + shown + end


def test_an_archive_with_a_second_directory_is_refused_before_torch_unpacks_what_zipfile_does_not_see(
    tmp_path,
):
    file, made = tmp_path / "x.pt", [io.BytesIO(), io.BytesIO()]
    torch.save(
        {"model": {"encoder.sentence_encoder.layernorm_embedding.bias": torch.ones(4_000_000)}},
        file,
    )
    with zipfile.ZipFile(file) as source:
        for name in source.namelist():
            content = source.read(name)
            for out, method, shown in zip(
                made, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), (b"harmless", content)
            ):
                with zipfile.ZipFile(out, "a") as archive:
                    archive.writestr(
                        name, shown, method if name.endswith("data/0") else zipfile.ZIP_STORED
                    )
    file.write_bytes(two_directories(*(out.getvalue() for out in made)))
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None and archive.read("x/data/0") == b"harmless"
    assert (
        torch.load(file, weights_only=True)["model"].popitem()[1].numel() == 4_000_000
    )  # torch sees the other one
    with pytest.raises(
        InputError, match=r"x\.pt: damaged: its directory is not where its end says"
    ):
        checkpoint.load(file)


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
    with pytest.raises(InputError):
        checkpoint.load(tmp_path / "x.pt")
    assert (function.__name__, function.__defaults__) == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_storage_that_is_larger_than_its_record_is_never_read_beyond_the_file(tmp_path):
    name = "encoder.sentence_encoder.layernorm_embedding.bias"
    torch.save({"model": {name: torch.ones(1_000_000)}}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as source,
        zipfile.ZipFile(tmp_path / "x.pt", "w") as target,
    ):
        for record in source.namelist():
            target.writestr(
                record, source.read(record)[: 16 if record.endswith("data/0") else None]
            )
    with pytest.raises(
        InputError, match=r"x\.pt: cannot be read as a checkpoint: .*(out of bounds|not resizable)"
    ):
        checkpoint.load(tmp_path / "x.pt")


def test_a_tar_archive_is_refused_before_torch_sees_it(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        archive.add(__file__, "\x80storages")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(InputError, match=r"x\.pt: cannot be read as a checkpoint: a tar archive"):
        checkpoint.load(tmp_path / "x.pt")
