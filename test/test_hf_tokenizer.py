"""A tokenizer of transformers read by us: its own ids for every text, or a refusal by name."""

import random

from config import InputError
from formats import hf_tokenizer
from test.converting import edit, write_bpe
from test.helpers import make_dataset
from text.binarized import BOS, UNK, Dictionary
from text.files import visible
from text.tokens import load_tokenizer

import pytest

PARTS = "a the The thin é É ﬁ 中文 中 日本語 Straße 12 ½ 's 'll ... \u0301 \u200b".split(" ")
PARTS += ["\ufeff", "👩\u200d👩", "\0"]
PARTS += ["\t", "\v", "\x1c", "\x85", "\xa0", "\u2003", "\u3000", "  ", "w1", "w2", "w11 w3"]
TYPED = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", " <mask> "]


def lines_of(parts) -> list[str]:
    """Lines of mixed Unicode, of any characters too."""
    rng = random.Random(0)
    codes = [rng.randrange(0x3000) + 0x10000 * (i % 3 == 0) for i in range(300)]
    pieces = [*parts * 100, *" " * 300, *map(chr, codes)]
    return ["".join(rng.choices(pieces, k=rng.randrange(14))) for _ in range(1100)]


def again(folder, *tokens):
    """Saves the tokenizer again, as transformers does: without vocab.json and merges.txt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def two_files(folder):
    """RoBERTa's way before tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


REPLACE = dict(type="Replace", pattern={"String": "``"}, content='"')
SETTINGS, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
LOWER = edit(TOKENIZER, normalizer__normalizers=lambda steps: [*steps, dict(type="Lowercase")])
UNIGRAM = edit(TOKENIZER, model__type="Unigram", model__vocab=[["a", 0.0]])
PAIRS = edit(TOKENIZER, model__merges=lambda merges: [merge.split(" ") for merge in merges])
CASES = [
    # kind of our export, a change of the folder, what is refused or ""
    ("bpe", lambda folder: None, ""),
    ("bpe", again, ""),
    ("bpe", PAIRS, ""),
    ("bpe", two_files, ""),
    ("bpe", edit(TOKENIZER, model__type=..., pre_tokenizer__use_regex=...), ""),
    ("bpe", edit(SETTINGS, tokenizer_class="RobertaTokenizer"), ""),
    ("bpe", edit(TOKENIZER, normalizer=None), ""),
    ("bpe", LOWER, "the normalizer Lowercase"),
    ("bpe", edit(TOKENIZER, normalizer=REPLACE), "the normalizer Replace"),
    ("bpe", edit(TOKENIZER, pre_tokenizer__add_prefix_space=True), "add_prefix_space True"),
    ("bpe", edit(TOKENIZER, pre_tokenizer__use_regex=False), "use_regex False"),
    ("bpe", edit(SETTINGS, add_prefix_space=True), "add_prefix_space"),
    ("bpe", edit(TOKENIZER, pre_tokenizer=dict(type="Whitespace")), "type Whitespace"),
    ("bpe", edit(TOKENIZER, post_processor=None), "a post_processor with type None"),
    ("bpe", edit(TOKENIZER, model__ignore_merges=True), "ignore_merges"),
    ("bpe", edit(SETTINGS, tokenizer_class="BertTokenizer"), "the class BertTokenizer"),
    ("bpe", edit(SETTINGS, cls_token="[CLS]"), "the added token '[CLS]'"),
    ("bpe", edit(SETTINGS, additional_special_tokens=["[A]"]), "the added token '[A]'"),
    ("bpe", lambda folder: again(folder, "thin"), "the added token 'thin'"),
    ("bpe", UNIGRAM, "a model with type Unigram"),
    ("words", lambda folder: None, ""),
    ("words", again, ""),
    ("words", edit(TOKENIZER, normalizer=None), ""),
    ("words", edit(TOKENIZER, model__unk_token="w1"), "unk_token w1"),
    ("words", edit(TOKENIZER, pre_tokenizer=dict(type="WhitespaceSplit")), "type WhitespaceSplit"),
    ("words", edit(TOKENIZER, pre_tokenizer__behavior="Isolated"), "behavior Isolated"),
]


@pytest.mark.parametrize("kind, change, refused", CASES)
def test_a_tokenizer_gives_the_ids_of_transformers_or_is_refused_by_name(
    tmp_path, kind, change, refused, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    data, folder = tmp_path / "data", tmp_path / "hf"
    make_dataset(data)
    dictionary = write_bpe(data) if kind == "bpe" else Dictionary(data / "dict.txt")
    bpe = [data / "encoder.json", data / "vocab.bpe"] if kind == "bpe" else [None, None]
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "data2vec-text"}')
    hf_tokenizer.write(folder, dictionary, bpe, 512, fills_masks=False)
    change(folder)
    if refused:
        with pytest.raises(InputError, match="hf: its tokenizer has ") as error:
            hf_tokenizer.read(folder, len(dictionary))
        assert refused in str(error.value) and "\n" not in str(error.value)
        return
    for name, content in hf_tokenizer.read(folder, len(dictionary)).items():
        (data / name).write_bytes(content)
    ours = load_tokenizer(data, Dictionary(data / "dict.txt"))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert [theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id] == [0, 1, 2]
    assert [theirs.unk_token_id, theirs.mask_token_id] == [3, dictionary.mask_id]
    if "Replace" in theirs.backend_tokenizer.to_str():
        lines = lines_of([*PARTS, *TYPED])
    else:  # what read's page says of such a tokenizer
        lines = [line.strip() for line in lines_of(PARTS)]
    # marks at the beginning of a line are left out wherever we read text
    lines = [line for line in lines if visible(line) == line][:1000]
    for line, row in zip(lines, theirs(lines)["input_ids"]):
        # the tokens that the dictionary lacks
        known = [i if i < len(dictionary) else UNK for i in row]
        assert [BOS, *ours([line])[0].tolist()] == known, repr(line)
