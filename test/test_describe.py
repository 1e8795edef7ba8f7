"""What data.py, and a run at its start, say of a dataset that may not be what was meant."""

import train
from run import describe
from test.helpers import call, few, make_dataset, preprocess_words, run_preprocess, small_corpus

SMALL = ["--tokens_per_sample", 32, "--max_tokens", 256]


def test_the_first_block_of_a_bpe_is_shown_as_text(tokenizers, tmp_path):
    text = "The first line.\n第二行 of it\n" + "\nother text" * 40
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    how = ["--bpe", "train", "--vocab_size", 300, "--workers", 1]
    run_preprocess(tmp_path, *how, train=[tmp_path / "t.txt"])
    printed = call(describe.main, "--data_path", tmp_path)
    assert "first block      <s>The first line.</s>第二行 of it</s>\n" in printed
    (tmp_path / "vocab.bpe").rename(tmp_path / "gone")
    assert "first block      (no vocab.bpe," in call(describe.main, "--data_path", tmp_path)


def test_why_blocks_are_short_is_said_here_and_by_a_run(tmp_path, corpus_dir, capsys):
    short, _ = make_dataset(tmp_path / "short", [[5, 6, 7, 2], [2]] * 50)
    long, _ = make_dataset(tmp_path / "long", [[*range(4, 24), 2], [2]] * 50)
    for folder, flags, note in (
        (short, [], "half of the blocks have at most 5 of 32 tokens"),
        (corpus_dir, ["--max_tokens", 20], "blocks are cut to --max_tokens 20"),
        (short, ["--sample_break_mode", "complete"], ""),
        (long, [], ""),
    ):
        call(describe.main, "--data_path", folder, *SMALL, *flags)
        said = capsys.readouterr().err
        assert note in said and bool(note) == ("blocks" in said)
        printed = call(train.main, *few(folder, tmp_path / "run", "--max_update", 1, *flags))
        assert note in printed
        (tmp_path / "run").rename(tmp_path / f"run{len(list(tmp_path.iterdir()))}")


def test_text_that_train_and_valid_share_is_noticed(tmp_path, capsys):
    texts = small_corpus(tmp_path)
    train_text, valid_text = texts["train"], texts["valid"]
    preprocess_words(tmp_path / "good", **texts)
    preprocess_words(tmp_path / "both", train=train_text + valid_text, valid=valid_text)
    preprocess_words(tmp_path / "same", train=train_text, valid=train_text)
    (tmp_path / "same" / "preprocess.log").unlink()
    capsys.readouterr()
    for name, expected in (
        ("good", ""),
        ("both", "train and valid share valid.txt;"),
        ("same", "train and valid share everything;"),
    ):
        flags = [*SMALL, "--sample_break_mode", "complete"]
        call(describe.main, "--data_path", tmp_path / name, *flags)
        said = capsys.readouterr().err
        assert expected in said if expected else not said
        told = call(train.main, *few(tmp_path / name, tmp_path / "run" / name, "--max_update", 1))
        assert expected in told and ("share" in told) == bool(expected)
    log = '{"step": "train", "made_from": 1}\n{"step": "valid"}\n'  # edited by someone
    (tmp_path / "both" / "preprocess.log").write_text(log)
    call(describe.main, "--data_path", tmp_path / "both")
