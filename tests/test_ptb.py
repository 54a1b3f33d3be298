"""The Penn Treebank tokenizer against pycocoevalcap's (Stanford's, in Java): real, hostile and perturbed captions."""

import contextlib
import json
import os
import random
import shutil

import pytest

from captioner.metrics import ptb

HOSTILE = r"""
A man's dog can't, won't and shouldn't've bitten the girls' ball; isn't it? it's o'clock, o'neil's d'arc y'all
cannot gonna wanna gimme lemme gotta cannot. Gonna! wannabe cannot-be noncannot CANNOT 'tis 'twas 'Tis 'twasn't tis
'em 'til 'till 'cause 'nuff 'bout 'n' rock'n'roll rock 'n' roll salt 'n pepper
ol' man goin' home somethin' dunkin' donuts mens'
ma'am li'l nat'l int'l cap'n c'mon c'est qu'il hallowe'en Qur'an O'Brien's jack-o'-lantern
will-o'-the-wisp s'mores fo'c'sle A'Bc
'90s 80's '99 '99, the '60 '10s '5 5'10 5'10" 6' 2" 1980s-style 12" x1's
"hello" ''there'' ``you'' 'single' “curly” ‘single’ it’s don’t ’tis ’90s «French» ‹x› "unbalanced
wait... what.. really.... a . . . b …and . . .5 x. . .y ..... ......
well-known 10-year-old a - b -- c --- d ---- e ----- f – g — h a--b -lead trail- _ __ a_b a__b snake_case-word
http://www.foo.com/bar?x=1&y=2 https://a.b/c#d. www.example.com example.com/path/x.html
a.com/b foo@bar.com <me@foo.org> @user @user_1 #tag #1 # 1
$500 $5.99 US$10 £20 €30 ¢5 10% 50%off 1/2 3 1/2 1-1/2 24/7 9/11
1,000,000 1.5-mile .5 +1 -1 1st 2nd 20th-century 3D 5x7 16:9
5:30pm 5:30 p.m. 12/25/2010 2010-01-02 (650) 723-0293 650-723-0293 650 723 0293 +44 20 7946 0958 1-800-555-1212
u.s. U.S. u.s.-based u.s.'s st. st.-germain mr. Mr. Smith dr. jr. sr. no. No. 5 nos. 5
vs. etc. e.g. i.e. a.m.-p.m. Ph.D. J.R.R. Tolkien
he lives in the u.s.
he lives in the U.S. The end
plan b. The end of plan b
vitamin c.
he met mr.
inc. Inc. co. corp. ltd. jan. sept. mon. calif. Wash. wash. Ill. ill. Mass. mass. miss. la. mt. ft. in. pty. PTY.
(hello) [x] {y} <b>bold</b> <br/> <a href="x y" class='z'>link</a> <!-- note --> < > a<b <3 </3 << >>
AT&T R&B &amp; a & b rock&roll A+B &lt;x&gt; &quot;q&quot; &nbsp; it&apos;s &mdash; &foo; &#39;
a/b and/or 1/a a/b/c/d w/ w/o // \ \/ 1\/2 * ** a*b *** ^ ~ | = + == a+b c# C++ f#
:) :-) ;) =) :( :/ :D :P :o :'( <3 ^_^ -_- o_o (^_^) (-: >:( :)x 8)
!! ?! ??? a!!! a?!b hello!world hello?world what?! ,, ;; :: a,b 1,a a;b a:b end.Start end.
naïve café's é É ß ñandú 日本 Привет ½ 1½ ¼ ⅓ ⅛ ² x² ° 45° ™ × ÷ ☃ ♥ ❤️ 😀 a😀b 👩‍👩‍👧 •
colour grey theatre (a) a) b] c} #é@x a.b.c foo.bar-baz file.txt 1.zip photo.jpg, mp3 .hidden x.
	tab	tab  two  spaces   
jr.a st.a inc.b mr.b x.1 1.x 1.y 1.2.3 a.1.b ab.c. a.b. A.B. A.B.C no.1 co.-op
""".strip("\n").split("\n") + [""]
BASE = [
    "A child in a pink dress is climbing up a set of stairs in an entry way .",
    "two dogs' toys lie on the u.s. flag, next to mr. smith's 3 1/2 year old car.",
    "The man in the no. 7 shirt doesn't see the ball -- it's behind him!",
    "pay cash for christmas : simple ways to earn $500 by christmas day.",
    "Plan b. The women's team (in red) can't win at 5:30 p.m. on jan. 5",
    "a 10-year-old girl says \"hello\" to o'neil in the 1980s",
]
SPLICES = [*"'\"-.,;:!?()[]/&@#$%*+=<>_|~^`\\’“é½1£😀\u00ad"]
SPLICES += ["'s", "n't", "...", "--", " - ", "'ll", "10", " a.", " The ", "'n'"]


@pytest.fixture(scope="module")
def java_tokens():
    """Lines -> their tokens by pycocoevalcap's PTBTokenizer, as its scorers split them."""
    pytest.importorskip("pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("no java on PATH for pycocoevalcap's tokenizer")
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = os.path.dirname(os.path.abspath(ptbtokenizer.__file__))
    if not os.access(folder, os.W_OK):
        pytest.skip(f"pycocoevalcap's tokenizer writes into {folder}, which is read-only")

    def tokenize(lines):
        with open(os.devnull, "w") as null, _stderr_to(null):
            result = ptbtokenizer.PTBTokenizer().tokenize({k: [{"caption": line}] for k, line in enumerate(lines)})
        assert len(result) == len(lines)
        return [result[k][0].split() for k in range(len(lines))]

    return tokenize


@contextlib.contextmanager
def _stderr_to(file):
    """Also for child processes, which inherit the descriptor."""
    saved = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def apart(lines):
    """The lines with a neutral one after each: the Java program looks across line ends after an initial."""
    return [text for line in lines for text in (line, "zz")]


def assert_identical(lines, expected):
    wrong = [(line, theirs) for line, theirs in zip(lines, expected) if ptb.tokenize(line) != theirs]
    assert len(lines) == len(expected)
    assert not wrong, f"{len(wrong)} of {len(lines)} differ, the first: {wrong[0]}, ours {ptb.tokenize(wrong[0][0])}"


def test_every_shared_caption_is_tokenised_identically(java_tokens, shared_dir):
    lines = []
    for split in ("train", "val"):
        with open(shared_dir / "flickr8k" / split / "metadata.jsonl", encoding="utf-8") as rows:
            lines += [caption for row in rows for caption in json.loads(row)["captions"]]
    for path in sorted((shared_dir / "gcc-results").glob("*.txt")):
        lines += path.read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 80_000
    assert_identical(lines, java_tokens(lines))


def test_hostile_lines_and_their_words_alone_are_tokenised_identically(java_tokens):
    words = [word for line in HOSTILE for word in line.split()]
    lines = HOSTILE + words + [f"a {word} b" for word in words] + [f"({word}), The" for word in words]
    assert_identical(lines, java_tokens(apart(lines))[::2])


def test_perturbed_captions_are_tokenised_identically(java_tokens):
    draw = random.Random(0)
    words = [word for line in HOSTILE for word in line.split()]
    lines = []
    for _ in range(4000):
        text = draw.choice(BASE)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(text) + 1)
            splice = draw.choice([draw.choice(SPLICES), draw.choice(words), " " + draw.choice(words) + " "])
            text = text[:at] + splice + text[at:]
        lines.append(draw.choice([str, str, str.upper, str.title])(text))
    assert_identical(lines, java_tokens(apart(lines))[::2])


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        ("A man's dog can't bite.", "a man 's dog ca n't bite"),
        ("he cannot, and is gonna", "he can not and is gon na"),
        ('"Hello" (he said) -- it\'s 5:30pm...', "hello -lrb- he said -rrb- it 's 5:30 pm"),
        ("in the u.s. with mr. smith", "in the u.s. with mr. smith"),
        ("a 10-year-old on 3 1/2 wheels", "a 10-year-old on 3 1/2 wheels"),
        ("$500 & 10% of £20", "$ 500 & 10 % of # 20"),
        ("plan b. The end", "plan b the end"),
        ("plan b. the end", "plan b. the end"),
        ("mail me@foo.com or http://foo.com/x.", "mail me@foo.com or http://foo.com/x"),
        ("smile :) 😀 é½", "smile :-rrb- é 1/2"),
    ],
)
def test_without_java(line, tokens):
    assert ptb.tokenize(line) == tokens.split()


@pytest.mark.parametrize("line", ["", "   ", ".", " ... ", "'' `` -- ;"])
def test_nothing_but_punctuation_gives_no_tokens(line):
    assert ptb.tokenize(line) == []


def test_line_separators_inside_a_caption_are_spaces():
    assert ptb.tokenize("a dog\nruns\r\nfast") == ["a", "dog", "runs", "fast"]


def test_a_word_is_the_same_alone_remembered_and_in_a_line():
    line = HOSTILE[0]
    first = ptb.tokenize(line)
    assert ptb.tokenize(line) == first
    ptb.forget()
    assert ptb.tokenize(line) == first


def test_long_garbage_ends():  # no pattern backtracks exponentially
    for garbage in ("a." * 999, "<" * 999, "-" * 999, "a@" * 999, "'" * 999, "1-" * 999, "<a " + " " * 999):
        ptb.tokenize(garbage)
