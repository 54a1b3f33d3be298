"""Penn Treebank tokens, lower-cased, without punctuation: what caption scores are usually computed on. No Java.

Behaviour matched: pycocoevalcap 1.2's `PTBTokenizer`, that is Stanford CoreNLP 3.4.1's tokenizer with `-preserveLines
-lowerCase`, then the removal of the tokens in PUNCTUATION, then the scorers' `str.split`. The rules below were written
from that program's output: as in it, the longest match wins (its context after the token included), and the first of
the rules that match equally far.

Where the output differs, as far as known:
- Each line is tokenised on its own. The Java program reads all captions as one text, so a caption that ends in an
  initial ("vitamin c.") loses that period to punctuation when the next caption in the file starts with a word such as
  "A" or "The".
- A carriage return, form feed or Unicode line separator inside a caption is a space here; there it shifts all captions
  that follow by a line.
- Some 960 of the 63,000 characters of the Basic Multilingual Plane: letters that Unicode added after version 6.0 are
  letters here and dropped there; combining marks and numerals of scripts that are not Latin are treated more simply.
  None lies below U+0370 or in U+1E00-U+2DFF.
- HTML entities of accented letters (`caf&eacute;`) are split here.
- Rarities: 3 of 468,000 captions with random insertions differed otherwise (soft hyphens in odd places, an emoji in a
  URL). No real caption is known to differ.
"""

import re
from functools import lru_cache

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Character classes. A soft hyphen may stand inside words and numbers and is dropped from them.
_SOFT = "\u00ad"
_NO_LETTER = (
    r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2070\u2074-\u2079\u2080-\u2089\u2150-\u2182\u2185-\u218f"
    r"\u2460-\u24ff\u2776-\u2793\U00010000-\U0010ffff"
)
_MARKS = (
    r"\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2"
    r"\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065e\u0670"
)
_ALNUM = rf"[^\W_{_NO_LETTER}]"
_LETTER_OR_MARK = rf"(?:[^\W\d_{_NO_LETTER}]|[{_MARKS}])"
_LETTER = rf"(?:[^\W\d_{_NO_LETTER}]|[{_MARKS}{_SOFT}])"
_LETTER_OR_DIGIT = rf"(?:[^\W_{_NO_LETTER}]|[{_MARKS}{_SOFT}])"
_SPACE = r"[ \t\u00a0\u2000-\u200a\u3000]"
_GAP = r"[- \t\u00a0\u2000-\u200a\u3000]"
_APOSTROPHE = "(?:['\u2019\x92]|&apos;)"
_ANY_APOSTROPHE = "(?:['\u2019`\u2018\u201b\x91\x92]|&apos;)"
_SYMBOL = re.compile(
    r"[$%&;=\\^|~*<>+/#@_\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be"
    r"\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d"
    r"\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044"
    r"\u2070\u2074-\u208e\u20a4\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129"
    r"\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]"
)

# Abbreviations whose period belongs to them.
_ENDING = (
    "al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec ed.d esq est etc ext "
    "feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla "
    "penn ph.d plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo"
).split()  # may end a sentence
_LEADING = (
    "adj adm adv alex asst assoc atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen "
    "gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep "
    "reps rev sen sens sfc sgt spc st ste supt supts treas vs wm"
).split()  # a name follows
_BEFORE_NUMBER = "art ca fig figs no nos op pp prop".split()
_CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()  # words in lower case
_NOT_UPPER = "[Mm]fg [Mm]tg [Pp]p?t[ey]s?".split()
# After an initial and a period, one of these with a capital (or a tag, "Mr." or "Ms.") starts a sentence.
_STARTERS = (
    "a about according additionally after an as at but earlier he her here however if in it last many more now once "
    "one other our she since so some such that the their then there these they this we what when while yet you"
).split()


def _any(patterns: list[str]) -> str:
    return f"(?:{'|'.join(patterns)})"


def _capital_first(words: list[str]) -> str:
    return _any([word[0].upper() + (f"(?i:{word[1:]})" if word[1:] else "") for word in words])


def _ahead(pattern: str) -> str:
    """Context after the token that counts for the length of the match."""
    return rf"(?=(?P<ahead>{pattern}))"


_AREA_CODE = rf"(?:\(\d{{2,3}}\){_SPACE}?|(?:\+\+?)?(?:\d{{2,4}}{_GAP})?\d{{2,4}}{_GAP})"
_ACRONYM = r"[a-z](?:\.[a-z])+"
_WORD = rf"{_LETTER}{_LETTER_OR_DIGIT}*(?:[.!?]{_LETTER}{_LETTER_OR_DIGIT}*)*"
_PART = rf"(?:[dol]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+"
_COMPOUND = rf"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
_DOTTED_COMPOUND = rf"[a-z0-9][a-z0-9.,{_SOFT}]*(?:-(?:{_ACRONYM}\.|[a-z0-9{_SOFT}]+))+"
_UPPER_PAIR = r"(?-i:[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+)"
_CLITIC = "(?:[msd]|re|ve|ll)"
_ENDING_PATTERN = _any(
    [word.replace(".", r"\.") for word in _ENDING] + [f"(?-i:{_capital_first(_CAPITALISED)}|{_NOT_UPPER[2]})"]
)
_HOST = r"(?:www\.(?:[^ \t\n\"<>|.!?(){},]+\.)+[a-z]{2,4}|(?-i:(?:[^\s!\"$'(),-`{|}]+\.)+)(?:com|net|org|edu))"
_ATTRIBUTE = r"(?: +[a-z][a-z0-9:._-]*(?: *= *(?:\"[^\"\n]*\"|'[^'\n]*'|[a-z0-9:._-]+))?)"
_TAG = rf"<(?:[!?][a-z-][^>\n]*|/[a-z][a-z0-9:._-]* *|[a-z][a-z0-9:._-]*{_ATTRIBUTE}* */? *)>"
_EXTENSION = (
    "(?:bat|bmp|c|cgi|class|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar"
    "|txt|wav|x|xml|zip)"
)
_SENTENCE_START = rf"(?:(?-i:{_capital_first(_STARTERS)}|M(?i:[rs])\.)|{_TAG})"
_CONTRACTIONS = "o~o li~l nat~l cap~n ev~ry c~mon c~est s~mores [a-z]*e~er".replace("~", _ANY_APOSTROPHE).split()
_FACE = r"\^x=~<>'"

# (kind, pattern), case ignored unless a pattern says otherwise; `_tokens` says what becomes of each kind.
_RULES = [
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in [
        ("tag", _TAG),
        ("split", "(?:(can)(not)|(gon|wan)(na)|(got)(ta)|(lem|gim)(me))"),
        ("plain", "'t" + _ahead("is|was")),
        ("plain", rf"[a-z{_SOFT}]*[a-mo-z{_SOFT}]" + _ahead(f"n{_ANY_APOSTROPHE}t")),
        ("clitic", rf"'{_CLITIC}(?![a-z])|(?:[\u2019\x92]|&apos;){_CLITIC}"),
        ("clitic", f"n{_ANY_APOSTROPHE}t"),
        ("plain", _WORD + _ahead(_APOSTROPHE + _CLITIC)),
        ("plain", _WORD),
        ("plain", rf"{_LETTER_OR_MARK}+[aeiouy]{_ANY_APOSTROPHE}(?-i:[aeiouA-Z]){_LETTER_OR_MARK}*"),
        ("plain", rf"{_APOSTROPHE}n{_APOSTROPHE}|'n(?=[ \t\n])|(?:[\u2019\x92]|&apos;)n"),
        ("plain", f"{_APOSTROPHE}(?:till?|em|cause)|{_any(_CONTRACTIONS)}"),
        ("plain", rf"(?-i:[A-HJ-XZn]){_ANY_APOSTROPHE}{_LETTER_OR_MARK}{{2,}}"),
        *[("plain", rf"{word}\." + _ahead("[,;:]")) for word in (_WORD, _DOTTED_COMPOUND, _COMPOUND, _UPPER_PAIR)],
        ("plain", "''|``"),
        ("plain", rf"{_APOSTROPHE}(?:[2-9]0s|\d\d(?=\n|{_SPACE}))"),
        ("plain", f"[djl]{_APOSTROPHE}"),
        ("plain", f"y{_APOSTROPHE}" + _ahead(_LETTER_OR_MARK)),
        ("plain", _COMPOUND),
        ("as is", r"(?:<|&lt;)?[a-z0-9][^ \t\n<>\"()|{}]*@(?:[^ \t\n<>()\"|{}.]+\.)*[^ \t\n<>()\"|{}.]+(?:>|&gt;)?"),
        ("plain", rf"{_ENDING_PATTERN}\." + _ahead(r"[\s\S]{2}")),
        ("plain", _DOTTED_COMPOUND),
        ("plain", r"[a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}"),
        ("plain", rf"[-+]?(?:\d*(?:[.,:{_SOFT}\u066b\u066c]\d+)+|\d+)"),
        ("plain", r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
        ("joined", r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}"),
        ("joined", rf"{_AREA_CODE}\d{{3,4}}{_GAP}?\d{{3,5}}"),
        ("plain", r"(?:\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}"),
        ("plain", rf"{_ACRONYM}\.?"),
        ("plain", "[a-z]" + _ahead(rf"\.{_SPACE}+{_SENTENCE_START}(?:{_SPACE}|\n)")),
        ("plain", r"[a-z]\."),
        ("plain", rf"(?:{_ENDING_PATTERN}|{_any(_LEADING)}|(?-i:{_any(_NOT_UPPER)}))\."),
        ("plain", rf"{_ALNUM}+(?:\.{_ALNUM}+)*\.{_EXTENSION}" + _ahead(r"[ \n.?!,]")),
        ("plain", rf"{_any(_BEFORE_NUMBER)}\." + _ahead(r" ?\d")),
        ("plain", _UPPER_PAIR),
        ("plain", r"(?-i:[A-Z]*)\$"),
        ("as is", rf"@[a-z_][a-z_0-9]*|\#{_LETTER}+"),
        ("as is", r"https?://[^ \t\n\"<>|(){}]+[^ \t\n\"<>|.!?(){},-]"),
        ("as is", rf"{_HOST}/[^ \t\n\"<>|()]+[^ \t\n\"<>|.!?(){{}},-]"),
        ("as is", _HOST),
        ("plain", r"[cf]\#|c\+\+"),
        ("quotes", "[`\u2018-\u201f\u2039\u203a\u00ab\u00bb\x91-\x94]{1,2}"),
        ("joined", r"(?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])(?![a-z0-9])"),
        ("joined", rf"(?-i:[-{_FACE}]_[-{_FACE}]|\((?:[-{_FACE}][_.]?[-{_FACE}]|[{_FACE}]-[{_FACE}])\))"),
        ("entity", r"&(?:amp|lt|gt|nbsp|quot|apos|[mn]dash|[mn]d|\#\d+);"),
        ("as is", r"[!?]+|\*+|\#+|_+|@+|\\\*|<<|>>|[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+|[\u2080-\u2089]+"),
        ("dashes", "-{2,}"),
        ("dots", r"\.{3,5}|\. \. \.(?: \.)?"),
        ("plain", f"(?:ol|dunkin|somethin){_APOSTROPHE}"),
    ]
]
_REWRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
    "\u00a3": "#", "\u20ac": "$", "\u20a0": "$", "\u00a4": "$", "\x80": "$", "\u00a2": "cents",
}  # fmt: skip
_ENTITIES = {"&quot;": "''", "&apos;": "'"}
_ENTITIES_IN_ANY_CASE = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&nbsp;": " "}
_ENTITIES_IN_ANY_CASE |= dict.fromkeys(("&mdash;", "&ndash;", "&md;", "&nd;"), "--")
_AMPERSAND = re.compile("&amp;", re.IGNORECASE)
_QUOTES = str.maketrans(
    dict.fromkeys("\u2018\u201b\u2039\x91", "`")
    | dict.fromkeys("\u2019\u203a\x92", "'")
    | dict.fromkeys("\u201c\u00ab\x93", "``")
    | dict.fromkeys("\u201d\u00bb\x94", "''")
)
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-"})

# A chunk between spaces that a rule may match together with what follows cannot be tokenised alone.
_OPEN = re.compile(r"\s|[\x00-\x1f]|[0-9)]\Z")
# Nor can one that ends in a period after these tokens.
_OPEN_WITH_PERIOD = frozenset([*_BEFORE_NUMBER, *(letter + "." for letter in "abcdefghijklmnopqrstuvwxyz")])
_SIMPLE = re.compile(r"([A-Za-z]+(?:-[A-Za-z]+)*)([.,:;!?]?)")
_SPECIAL_WORDS = frozenset("cannot gonna gotta wanna lemme gimme".split())
_WITH_PERIOD = frozenset([*_ENDING, *_LEADING, *_BEFORE_NUMBER, *(word.lower() for word in _CAPITALISED)])


def tokenize(line: str) -> list[str]:
    """The tokens of one caption: lower-cased, in order, punctuation left out."""
    if "<" in line or ". ." in line:  # tags and spaced ellipses may reach over any number of chunks
        return list(_scan(line))
    tokens: list[str] = []
    held: list[str] = []  # chunks that may belong together with the next one
    for chunk in line.split(" "):
        known = _chunk_tokens(chunk)
        if known is None or (held and (not chunk or chunk.endswith("."))):
            held.append(chunk)
        elif held:
            tokens += _scan(" ".join([*held, chunk]))
            held.clear()
        else:
            tokens += known
    return tokens + list(_scan(" ".join(held))) if held else tokens


def forget() -> None:
    """Drop the chunks remembered so far, so that a benchmark starts cold."""
    _chunk_tokens.cache_clear()


@lru_cache(maxsize=1 << 17)
def _chunk_tokens(chunk: str) -> tuple[str, ...] | None:
    """The tokens of what stands between two spaces; None where they may depend on what follows."""
    simple = _SIMPLE.fullmatch(chunk)
    if simple:
        word = simple[1].lower()
        # four letters and fewer are left to the rules: initials, and abbreviations with several spellings
        ends_sentence = simple[2] != "." or (len(word) > 4 and "-" not in word and word not in _WITH_PERIOD)
        if word not in _SPECIAL_WORDS and ends_sentence:
            return (word,)
    tokens = () if _OPEN.search(chunk) else _scan(chunk)
    if _OPEN.search(chunk) or (chunk.endswith(".") and tokens and tokens[-1] in _OPEN_WITH_PERIOD):
        return None
    return tokens


def _scan(line: str) -> tuple[str, ...]:
    text = line.replace("\n", " ") + "\n"  # rules look for the line's end
    tokens: list[str] = []
    position = 0
    while position < len(line):
        longest, kind, match = 0, "", None
        for candidate_kind, pattern in _RULES:
            candidate = pattern.match(text, position)
            if candidate:
                length = candidate.end() - position
                if "ahead" in pattern.groupindex:
                    length += len(candidate["ahead"])
                if length > longest:
                    longest, kind, match = length, candidate_kind, candidate
        if match is None:
            token = text[position]
            position += 1
            if token in _REWRITTEN:
                tokens.append(_REWRITTEN[token])
            elif _SYMBOL.match(token):
                tokens.append(token)
        else:
            position = match.end()
            tokens += _tokens(kind, match)
    kept = (token.lower() for token in tokens if token not in PUNCTUATION)
    return tuple(" ".join(kept).split())  # a token with spaces in it, such as "1 1/2", counts as several


def _tokens(kind: str, match: re.Match[str]) -> list[str]:
    text = match[0]
    match kind:
        case "plain":
            text = _AMPERSAND.sub("&", text.replace(_SOFT, ""))
        case "split":
            return [part for part in match.groups() if part]
        case "clitic":
            text = text.replace("&apos;", "'").translate(_QUOTES)
        case "joined":
            text = text.translate(_BRACKETS)
        case "quotes":
            text = text.translate(_QUOTES)
        case "entity":
            text = _ENTITIES.get(text) or _ENTITIES_IN_ANY_CASE.get(text.lower(), text)
        case "dashes":
            text = "--" if len(text) < 5 else text
        case "dots":
            text = "..."
    return [text]
