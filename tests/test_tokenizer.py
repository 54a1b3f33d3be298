"""The tokenizer against transformers' T5Tokenizer, and the training of a vocabulary."""

import json
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import T5Tokenizer

from captioner.errors import UserError
from captioner.tokenizer import Tokenizer, train_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
CAPTIONS = [
    "a small red circle above a large blue square .",
    "Two dogs run across the green field, and a man watches them!",
    "the man's café isn't open; 12 people wait outside",
    "A woman in a white dress is sitting on a bench next to the sea",
] * 5
STRANGE = [
    "", " ", "a", " two  spaces   here ", "tab\tand\nnew line\r\n",
    "no\u00a0break\u2003em\u3000wide\u200bzero\u0085next\u2028line",
    "a</s>b", "a </s> b", "</s>", "<pad> a", "a<unk>b <unk> c", "x <extra_id_3> y",
    "x<extra_id_99>y<extra_id_0>", "<extra_id_100> <s> < pad> <PAD> </S>",
    "<pad><pad> </s></s>", "emoji 😀 in 😀😀 between", "日本 é ﬁ ½ … ™", "e\u0301 ﷺ Ω ℌ",
    "hello ,  world . do n't it 's", "▁a ▁▁ b▁", "\x00a\x1fb\x7f", "\u00ad\ufeff",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(CAPTIONS, tmp_path_factory.mktemp("trained") / "spiece.model", 90)


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> Tokenizer:
    """A small vocabulary of T5's own kind, made by sentencepiece; transformers reads no other kind."""
    path = tmp_path_factory.mktemp("unigram") / "spiece.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS), model_writer=file, vocab_size=90, hard_vocab_limit=False, character_coverage=1.0,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    return Tokenizer(path)


@pytest.fixture(scope="module", params=["unigram", "t5"])
def pair(request):
    """(ours, transformers') with a small vocabulary and with T5's."""
    if request.param == "unigram":
        ours = request.getfixturevalue("unigram")
    else:
        ours = Tokenizer(request.getfixturevalue("shared_dir") / "t5" / "spiece.model")
    return ours, T5Tokenizer.from_pretrained(ours.path.parent)


def assert_same(pair, texts: list[str]) -> None:
    ours, donor = pair
    ids = ours.encode(texts)
    for text, mine, theirs in zip(texts, ids, donor(texts)["input_ids"], strict=True):
        assert mine == theirs, repr(text)
    for mine, theirs in zip(ours.decode(ids), donor.batch_decode(ids, skip_special_tokens=True), strict=True):
        assert mine == theirs


def test_special_ids(pair):
    ours, donor = pair
    assert len(ours) == len(donor) == donor.vocab_size
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (0, 1, 2)
    assert (donor.pad_token_id, donor.eos_token_id, donor.unk_token_id) == (0, 1, 2)
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    expected = donor.convert_tokens_to_ids(sentinels)
    assert ours.encode(sentinels) == [[i, 1] for i in expected]
    assert expected[0] == len(ours) - 1 and expected[99] == len(ours) - 100


def test_captions_and_strange_texts(pair):
    assert_same(pair, CAPTIONS + STRANGE)


def test_every_space_and_the_basic_plane(pair):
    numbers = [i for i in range(0x10000) if not 0xD800 <= i < 0xF900 and unicodedata.category(chr(i)) != "Cn"]
    spaces = [i for i in numbers if chr(i).isspace()]
    assert_same(pair, [f"a{chr(i)}b {chr(i)}" for i in spaces + numbers[::7]])


def test_decode_of_arbitrary_ids(pair):
    ours, donor = pair
    rng = random.Random(0)
    size = len(ours) + 28  # a T5 has more rows than its vocabulary has ids
    draw = lambda: rng.choice((rng.randrange(size), rng.randrange(4)))  # noqa: E731
    rows = [[draw() for _ in range(rng.randrange(12))] for _ in range(3000)]
    assert ours.decode(rows) == donor.batch_decode(rows, skip_special_tokens=True)


def test_all_shared_captions(shared_dir):
    texts = []
    for file in sorted((shared_dir / "flickr8k").glob("*/metadata.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            texts += json.loads(line)["captions"]
    assert len(texts) == 35_000
    for file in sorted((shared_dir / "gcc-results").glob("*.txt")):
        texts += file.read_text(encoding="utf-8").splitlines()
    assert len(texts) > 80_000
    ours = Tokenizer(shared_dir / "t5" / "spiece.model")
    assert_same((ours, T5Tokenizer.from_pretrained(ours.path.parent)), texts)


def test_decode_takes_tensors_and_leaves_special_ids_out(trained):
    ids = trained.encode(["a small red circle"])[0]
    sentinel = len(trained) - 1
    rows = [[0, *ids, 0, 0, 0], [0, 2, -100, sentinel, len(trained) + 5, *ids[:-1]]]
    for given in (torch.tensor(rows), rows, torch.tensor(rows).numpy(), tuple(map(tuple, rows))):
        assert trained.decode(given) == ["a small red circle"] * 2
    assert trained.decode(torch.zeros(2, 0, dtype=torch.int64)) == ["", ""] and trained.decode([]) == []
    assert trained.decode([[*ids, *ids]]) == ["a small red circle a small red circle"], "eos does not end a text"


def test_lone_surrogates_are_an_error(trained):
    with pytest.raises(UserError, match=r"not a text that UTF-8 can hold: 'a \\ud83d'"):
        trained.encode(["fine", "a \ud83d"])


def test_number_of_sentinels(trained):
    bare = Tokenizer(trained.path, extra_ids=0)
    assert len(bare) == len(trained) - 100
    assert bare.encode(["a small red circle"]) == trained.encode(["a small red circle"])
    assert bare.unk_id in bare.encode(["<extra_id_3>"])[0], "without sentinels it is plain text"


def test_save_and_pickle_keep_it(trained, tmp_path):
    trained.save(tmp_path / "folder")
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["spiece.model"]
    assert (tmp_path / "folder" / "spiece.model").read_bytes() == trained.path.read_bytes()
    for copy in (Tokenizer(tmp_path / "folder" / "spiece.model"), pickle.loads(pickle.dumps(trained))):
        assert copy.encode(CAPTIONS + STRANGE) == trained.encode(CAPTIONS + STRANGE) and len(copy) == len(trained)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\nsize 3\n", b"{}", b"\x00" * 64])
def test_not_a_sentencepiece_model(tmp_path, content, capfd):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match="spiece.model is not a sentencepiece model"):
        Tokenizer(tmp_path / "spiece.model")
    assert capfd.readouterr() == ("", "")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="none.model: no such sentencepiece file"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match=f"cannot read the sentencepiece file {tmp_path}"):
        Tokenizer(tmp_path)


def test_vocabulary_of_another_kind_of_model(tmp_path):
    with open(tmp_path / "bert.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS), model_writer=file, vocab_size=60, minloglevel=2
        )
    with pytest.raises(UserError, match="bert.model is not a T5 vocabulary: it has no pad piece"):
        Tokenizer(tmp_path / "bert.model")


def test_training_is_deterministic_quiet_and_needs_no_torch(trained, tmp_path):
    program = (
        "import sys, json; from captioner.tokenizer import train_tokenizer\n"
        f"train_tokenizer(json.loads(sys.stdin.read()), {str(tmp_path / 'again.model')!r}, 90)\n"
        "assert 'torch' not in sys.modules"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(CAPTIONS), text=True, capture_output=True, cwd=REPOSITORY
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert (tmp_path / "again.model").read_bytes() == trained.path.read_bytes()


def test_trained_vocabulary_has_all_characters_and_at_most_the_pieces_asked_for(trained, tmp_path):
    assert len(trained) <= 90 + 100
    assert trained.decode(trained.encode(CAPTIONS)) == CAPTIONS
    tiny = train_tokenizer(["a b", "b a"] * 20, tmp_path / "tiny.model", 4000)
    assert len(tiny) < 120 and tiny.decode(tiny.encode(["b  a\tb"])) == ["b a b"]


def test_training_normalises_as_t5_does_and_skips_nothing_long(tmp_path):
    long = "ﬁne ½ line " * 2000
    tokenizer = train_tokenizer([long, "a\nb\tc </s> d"], tmp_path / "spiece.model", 60)
    assert tokenizer.decode(tokenizer.encode(["ﬁne ½", "a b c d"])) == ["fine 1⁄2", "a b c d"]


@pytest.mark.parametrize(
    "texts, size, words",
    [
        ([], 100, "no text to learn a vocabulary from"),
        (["", " \n"], 100, "no text to learn a vocabulary from"),
        (CAPTIONS, 10, r"a vocabulary of 10 pieces is too small for these texts: they need at least \d\d$"),
        (["\x7f"], 100, "cannot learn a vocabulary from these texts"),
    ],
)
def test_texts_that_give_no_vocabulary(texts, size, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        train_tokenizer(texts, tmp_path / "spiece.model", size)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
