"""What data.py, and a run at its start, say of a dataset that may not be what was meant."""

import train
from config import InputError
from test.helpers import call, few, make_dataset, preprocess_words, run_preprocess, small_corpus
from run import describe as dataset

import pytest

SMALL_BLOCKS = ["--tokens_per_sample", 32, "--max_tokens", 256]


def test_the_first_block_of_a_bpe_is_shown_as_text(tokenizers, tmp_path):
    (tmp_path / "t.txt").write_text(
        "The first line.\n第二行 of it\n" + "\nother text" * 40, encoding="utf-8"
    )
    run_preprocess(
        tmp_path, "--bpe", "train", "--vocab_size", 300, "--workers", 1, train=[tmp_path / "t.txt"]
    )
    assert "first block      <s>The first line.</s>第二行 of it</s>\n" in call(
        dataset.main, "--data_path", tmp_path
    )
    (tmp_path / "vocab.bpe").rename(tmp_path / "gone")
    assert "first block      (no vocab.bpe in" in call(dataset.main, "--data_path", tmp_path)


def test_empty_lines_between_paragraphs_are_noticed_by_the_lengths_of_blocks(tmp_path, capsys):
    rows = [[5, 6, 7, 2], [2]] * 50
    folder, _ = make_dataset(tmp_path / "short", rows)
    note = "half of the blocks have at most 5 of 32 tokens, since no block crosses an empty line"
    call(dataset.main, "--data_path", folder, *SMALL_BLOCKS)
    assert f"warning: {note}" in capsys.readouterr().err
    assert f"note: {note}" in call(train.main, *few(folder, tmp_path / "run", "--max_update", 1))
    capsys.readouterr()
    call(dataset.main, "--data_path", folder, *SMALL_BLOCKS, "--sample_break_mode", "complete")
    call(
        dataset.main,
        "--data_path",
        make_dataset(tmp_path / "long", [[*range(4, 24), 2], [2]] * 50)[0],
        *SMALL_BLOCKS,
    )
    assert "empty line" not in capsys.readouterr().err


def test_max_tokens_below_a_block_says_that_blocks_are_cut(tmp_path, corpus_dir, capsys):
    text = "--max_tokens 20 is below --tokens_per_sample 32: blocks are cut to 20 tokens"
    call(dataset.main, "--data_path", corpus_dir, "--tokens_per_sample", 32, "--max_tokens", 20)
    assert f"warning: {text}" in capsys.readouterr().err
    assert f"note: {text}" in call(
        train.main, *few(corpus_dir, tmp_path, "--max_tokens", 20, "--max_update", 1)
    )


def test_unknown_words_and_text_that_train_and_valid_share_are_noticed(tmp_path, capsys):
    texts = small_corpus(tmp_path)
    preprocess_words(tmp_path / "good", **texts)
    preprocess_words(tmp_path / "few", "--nwords", 20, **texts)
    preprocess_words(tmp_path / "both", train=texts["train"] + texts["valid"], valid=texts["valid"])
    preprocess_words(tmp_path / "same", train=texts["train"], valid=texts["train"])
    (tmp_path / "same" / "preprocess.log").unlink()
    capsys.readouterr()
    for name, expected in (
        ("good", None),
        ("few", "% of the tokens are <unk>"),
        ("both", "train and valid share valid.txt;"),
        ("same", "train and valid share everything;"),
    ):
        call(
            dataset.main,
            "--data_path",
            tmp_path / name,
            *SMALL_BLOCKS,
            "--sample_break_mode",
            "complete",
        )
        said = capsys.readouterr().err
        assert expected in said if expected else not said
    (tmp_path / "both" / "preprocess.log").write_text(
        '{"step": "train", "made_from": 1}\n{"step": "valid"}\n'
    )
    call(dataset.main, "--data_path", tmp_path / "both")


def test_a_text_as_data_path_is_told_from_a_missing_folder(tmp_path):
    (tmp_path / "t.txt").write_text("text\n")
    with pytest.raises(
        InputError, match="t.txt: a file, not a dataset's folder; preprocess.py makes one"
    ):
        dataset.main(["--data_path", str(tmp_path / "t.txt")])
    with pytest.raises(InputError, match="nowhere: no such folder"):
        dataset.main(["--data_path", str(tmp_path / "nowhere")])
