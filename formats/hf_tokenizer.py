"""The tokenizer of a folder of transformers, written and read.

What is read must give the ids that AutoTokenizer gives. So tokenizer.json may do what our own
tokenizers do and nothing else. Three things stay as in training: white space around a text and
byte order marks at its beginning are left out, and <s>, </s> and <mask> in a text are text.
"""

import json
import shutil
from pathlib import Path

from config import InputError, read_text, reading
from text.binarized import BOS, EOS, SPECIAL, UNK, Dictionary
from text.tokens import read_bpe_files

# str.strip's; the tokenizers package knows four fewer
SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))
BYTE_LEVEL = dict(add_prefix_space=False, trim_offsets=True)  # the second changes no id

# What our tokenizers do, as tokenizer.json says it.
STRIP = dict(type="Replace", pattern={"Regex": f"\\A[{SPACES}]+|[{SPACES}]+\\z"}, content="")
MASK = {"Regex": f"(?<![^{SPACES}])<mask>(?![^{SPACES}])"}
NO_MASK = dict(type="Replace", pattern=MASK, content="<unk>")
WORDS = dict(type="Split", pattern={"Regex": f"[{SPACES}]+"}, behavior="Removed", invert=False)
GPT2 = dict(type="ByteLevel", use_regex=True, **BYTE_LEVEL)
ENDS = dict(type="RobertaProcessing", sep=["</s>", EOS], cls=["<s>", BOS], **BYTE_LEVEL)
# The names of special tokens in tokenizer_config.json.
BEGIN, PADDING, END, UNKNOWN = SPECIAL
NAMED = dict(bos_token=BEGIN, pad_token=PADDING, eos_token=END, unk_token=UNKNOWN)
NAMED |= dict(cls_token=BEGIN, sep_token=END)
# The classes of transformers that take tokenizer.json as it is, and one that builds a BPE itself.
AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")
ROBERTA = ("RobertaTokenizer", "RobertaTokenizerFast", None)
# What else a BPE of tokenizer.json can do, unless it is false or empty there.
OF_A_BPE = """dropout continuing_subword_prefix end_of_word_suffix byte_fallback
ignore_merges""".split()


# ---------------------------------------------------------------------------------------- writing


def write(folder: Path, dictionary: Dictionary, bpe, longest: int, fills_masks: bool):
    """Write the files from which AutoTokenizer makes `<s> ... </s>` in this dictionary's ids.

    As in training, outer white space is removed first. bpe: encoder.json and vocab.bpe, or None
    twice for words; longest: the most tokens of a text; fills_masks: `<mask>` and the other special
    tokens may be typed, for the fill-mask pipeline; otherwise they are text like any other, as in
    training. Returns how many ids the tokenizer has after the dictionary's: those of tokens that
    are <unk> to the model.
    """
    normalizers = [STRIP]
    if bpe[0]:
        model, lacking = _bpe(dictionary, *bpe)
        cut = decoder = GPT2
        # what slow tokenizers read
        vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
        (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
        shutil.copyfile(bpe[1], folder / "merges.txt")
    else:
        model, lacking = {"type": "WordLevel", "vocab": dictionary.ids, "unk_token": "<unk>"}, 0
        cut, decoder = WORDS, None
        if not fills_masks:  # the word <mask> is unknown in training
            normalizers.append(NO_MASK)
    # normalized: they are looked for in the normalized text; else each piece between two of them
    # would be stripped
    flags = dict(single_word=False, rstrip=False, normalized=True, special=True)
    names = sorted((*SPECIAL, "<mask>"), key=dictionary.ids.get)
    added = [dict(id=dictionary.ids[s], content=s, lstrip=s == "<mask>", **flags) for s in names]
    tokenizer = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=dict(type="Sequence", normalizers=normalizers),
        pre_tokenizer=cut,
        post_processor=ENDS,
        decoder=decoder,
        model=model,
    )
    text = json.dumps(tokenizer, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_tokenizer_config(folder, longest, fills_masks, flags)
    return lacking


def _write_tokenizer_config(folder: Path, longest: int, fills_masks: bool, flags: dict):
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        **NAMED,
        # lstrip: without it transformers 5 makes a token of the blank before <mask>
        mask_token={"__type": "AddedToken", "content": "<mask>", **flags, "lstrip": True},
        split_special_tokens=not fills_masks,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
    )
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _bpe(dictionary: Dictionary, encoder_json: Path, vocab_bpe: Path) -> tuple[dict, int]:
    """The BPE for tokenizer.json, and how many of its tokens the dictionary lacks."""
    vocab, merges = read_bpe_files(encoder_json, vocab_bpe)
    tokens = {str(number): token for token, number in vocab.items()}
    vocabulary = {tokens.get(symbol, symbol): i for symbol, i in dictionary.ids.items()}
    # fairseq turns a token that its dictionary lacks into <unk>; here each gets an id of its own
    lacking = [token for token in tokens.values() if token not in vocabulary]
    vocabulary.update((token, i) for i, token in enumerate(lacking, len(dictionary)))
    rows = [" ".join(merge) for merge in merges]
    return dict(type="BPE", vocab=vocabulary, merges=rows), len(lacking)


# ---------------------------------------------------------------------------------------- reading


def read(folder: Path, vocabulary: int) -> dict[str, bytes]:
    """The tokenizer of a folder as our files: dict.txt, and of a BPE encoder.json and vocab.bpe.

    vocabulary: how many symbols the model knows. Raises InputError, also for a tokenizer that does
    what ours do not.
    """
    advice = "name the training's files: --dict F, and for a BPE --encoder_json F --vocab_bpe F"
    with reading(f"{folder}: no tokenizer that can be read; {advice}"):
        tokenizer = _tokenizer_of(folder)
        others = [*_other_steps(folder, tokenizer), *_other_tokens(folder, tokenizer)]
        if others:
            what = ", ".join(other[:100] for other in others[:5])
            raise InputError(f"{folder}: its tokenizer has {what}, and ours has not; {advice}")
        ids = tokenizer["model"]["vocab"]
        files = {}
        symbols = {i: word for word, i in ids.items()}
        if tokenizer["model"]["type"] == "BPE":
            # transformers 5 writes pairs, older ones "a b"
            merges = tokenizer["model"]["merges"]
            rows = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
            merged = {row.replace(" ", "") for row in rows}
            # the other entries, such as <s>, are no tokens of the BPE
            bpe = {token: i for token, i in ids.items() if token in merged or len(token) == 1}
            symbols = {i: str(i) for i in bpe.values()} | {ids["<mask>"]: "<mask>"}
            files["encoder.json"] = json.dumps(bpe).encode()
            files["vocab.bpe"] = "".join(f"{row}\n" for row in rows).encode()
        # <s>, <pad>, </s>, <unk> are in every dictionary
        names = [symbols.get(i, f"unused{i}") for i in range(len(SPECIAL), vocabulary)]
        files["dict.txt"] = "".join(f"{name} 0\n" for name in names).encode()
    return files


def _json(path: Path) -> dict:
    return json.loads(read_text(path)) if path.exists() else {}


def _tokenizer_of(folder: Path) -> dict:
    """What tokenizer.json says, or would say of the two files of older tokenizers."""
    if (folder / "tokenizer.json").exists() or not (folder / "vocab.json").exists():
        tokenizer = json.loads(read_text(folder / "tokenizer.json"))
        added = tokenizer.setdefault("added_tokens", [])
        model = tokenizer["model"]
        model.setdefault("type", "BPE" if "merges" in model else None)  # of 2020: not said
        model["vocab"] = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
        return tokenizer
    rows = read_text(folder / "merges.txt").split("\n")
    merges = [row for row in rows if row and not row.startswith("#version")]
    model = dict(type="BPE", vocab=_json(folder / "vocab.json"), merges=merges)
    return dict(model=model, pre_tokenizer=GPT2, post_processor=ENDS, added_tokens=[])


def _other_steps(folder: Path, tokenizer: dict):
    """What the tokenizer does with a text and ours do not: yields names."""
    model = tokenizer["model"]
    is_bpe = model["type"] == "BPE"
    # the other settings of a post-processor change no id
    ends = {name: ENDS[name] for name in ("type", "sep", "cls")}
    ours = dict(pre_tokenizer=GPT2 if is_bpe else WORDS, post_processor=ends)
    if not is_bpe:
        ours["model"] = dict(type="WordLevel", unk_token=SPECIAL[UNK])
    for part, settings in ours.items():
        # older files do not say that they use GPT-2's pattern
        theirs = {"use_regex": True, **(tokenizer.get(part) or {})}
        for name, value in settings.items():
            if theirs.get(name) != value and name != "trim_offsets":
                yield f"a {part} with {name} {theirs.get(name)}"
    for name in OF_A_BPE:
        if model.get(name):
            yield name
    normalizer = tokenizer.get("normalizer") or {"normalizers": []}
    for step in normalizer.get("normalizers", [normalizer]):
        if step != STRIP and (is_bpe or step != NO_MASK):
            yield f"the normalizer {step['type']}"
    # these settings go before tokenizer.json
    settings = _json(folder / "tokenizer_config.json")
    if settings.get("add_prefix_space"):
        yield "add_prefix_space"
    kind = settings.get("tokenizer_class") or _json(folder / "config.json").get("tokenizer_class")
    if kind not in AS_IT_IS and not (is_bpe and kind in ROBERTA):
        yield f"the class {kind}"


def content_of(token) -> str:
    """The text of a token, which some files describe by an object."""
    return token["content"] if isinstance(token, dict) else token


def _other_tokens(folder: Path, tokenizer: dict):
    """Tokens that the tokenizer looks for in a text, or puts around it, and ours do not."""
    tokens = [*tokenizer["added_tokens"], *_json(folder / "added_tokens.json")]
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = _json(folder / file)
        for name, token in settings.items():
            if name.endswith("_token") and token is not None:
                if content_of(token) != NAMED.get(name, content_of(token)):
                    yield f"{name} {content_of(token)}"
                tokens.append(token)
        for name in ("extra_special_tokens", "additional_special_tokens"):
            tokens += settings.get(name) or []
        tokens += settings.get("added_tokens_decoder", {}).values()
    for name in dict.fromkeys(map(content_of, tokens)):
        if name not in (*SPECIAL, "<mask>"):
            yield f"the added token {name!r}"
    ids = tokenizer["model"]["vocab"]
    for i, name in enumerate(SPECIAL):
        if ids.get(name) != i:
            yield f"{name} as its token {ids.get(name)}"
