"""Text ↔ ids with a sentencepiece vocabulary, as T5 uses it. Imports no torch.

Paper: "SentencePiece: A simple and language independent subword tokenizer and detokenizer for Neural Text Processing"
(arXiv 1808.06226). Ids and text match `transformers.T5Tokenizer` (release 5.23, without clean-up of spaces). One
difference is left: where two segmentations of a word have the same score ("l ll", "ll l"), sentencepiece adds the
scores in another order and may take the other one.
"""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from captioner.errors import UserError
from captioner.files import describe_os_error, replacing

SPACE = "▁"  # how sentencepiece writes a space inside a piece
FILE_NAME = "spiece.model"
MAX_BYTES = 2**26


class Tokenizer:
    """A T5 vocabulary: the pieces of a `spiece.model`, then `extra_ids` sentinels, `<extra_id_0>` last.

    path: the sentencepiece file. Raises UserError where it is missing, damaged, or lacks T5's pad, eos and unk pieces.
    """

    def __init__(self, path: str | Path, extra_ids: int = 100):
        self.path = Path(path)
        self.extra_ids = extra_ids
        self._processor = self._read()
        self.pad_id = self._processor.pad_id()
        self.eos_id = self._processor.eos_id()
        self.unk_id = self._processor.unk_id()
        lacking = [name for name, i in (("pad", self.pad_id), ("eos", self.eos_id), ("unk", self.unk_id)) if i < 0]
        if lacking:
            raise UserError(f"{self.path} is not a T5 vocabulary: it has no {', '.join(lacking)} piece")
        try:
            self._pieces = [self._processor.id_to_piece(i) for i in range(len(self._processor))]
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is damaged: a piece of it is not UTF-8") from error
        self._special_ids = {self._pieces[i]: i for i in (self.pad_id, self.eos_id, self.unk_id)}
        self._special_ids |= {f"<extra_id_{i}>": len(self) - 1 - i for i in range(extra_ids)}
        self._special = re.compile("(" + "|".join(re.escape(piece) for piece in self._special_ids) + ")")

    def _read(self) -> sentencepiece.SentencePieceProcessor:
        if not self.path.exists():
            raise UserError(f"{self.path}: no such sentencepiece file")
        if not self.path.is_file():  # to open a pipe would wait for ever
            raise UserError(f"cannot read the sentencepiece file {self.path}: it is no file")
        if self.path.stat().st_size > MAX_BYTES:
            raise UserError(f"{self.path} is not a sentencepiece model: it is larger than {MAX_BYTES} bytes")
        try:
            proto = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the sentencepiece file {describe_os_error(error)}") from error
        try:
            if not proto:
                raise RuntimeError("the file is empty")
            return sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise UserError(f"{self.path} is not a sentencepiece model (damaged, or another kind of file)") from error

    def __len__(self) -> int:
        """Number of ids, sentinels included: the least number of rows of the embedding."""
        return len(self._pieces) + self.extra_ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, ending in eos; nothing is truncated or padded.

        Any white space counts as one space. The text of a special piece (`</s>`, `<pad>`, `<unk>`, `<extra_id_3>`)
        becomes that piece, and the words after it start anew, as in transformers. Raises UserError for lone
        surrogates, which no file can hold.
        """
        return [[*self._encode(text), self.eos_id] for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids = []
        # U+0085 is the one white space that T5's normalisation leaves in place.
        for part in self._special.split(text.replace("\x85", " ")):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
                continue
            try:
                ids += self._processor.encode(part)
            except (RuntimeError, UnicodeError) as error:
                raise UserError(f"not a text that UTF-8 can hold: {text!r}") from error
        return ids

    def decode(self, ids: Any) -> list[str]:
        """Texts of ids (B, T), a tensor or lists of lists.

        Special pieces and numbers without a piece (-100, unused rows of the embedding) are left out wherever they are;
        eos does not end a text.
        """
        rows = ids.tolist() if hasattr(ids, "tolist") else ids
        return [self._decode(row) for row in rows]

    def _decode(self, ids: Iterable[int]) -> str:
        special = (self.pad_id, self.eos_id, self.unk_id)
        pieces = [self._pieces[i] for i in ids if 0 <= i < len(self._pieces) and i not in special]
        if pieces:
            pieces[0] = pieces[0].replace(SPACE, "")
        return "".join(pieces).replace(SPACE, " ")

    def save(self, directory: str | Path) -> None:
        """Write `spiece.model` into directory. Raises UserError where it cannot be written."""
        with replacing(Path(directory) / FILE_NAME) as temporary:
            temporary.write_bytes(self._processor.serialized_model_proto())


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int) -> Tokenizer:
    """Learn a vocabulary from texts with the special pieces and the normalisation of T5 (pad 0, eos 1, unk 2, NFKC), and write it to path.

    By byte-pair merges: in a grammar of a hundred words, the unigram trainer finds too few pieces to keep words whole.
    vocab_size: pieces without sentinels, an upper bound: a small grammar may have fewer. The same texts give the same
    bytes. Raises UserError where texts has no text, or vocab_size is less than its characters need.
    """
    model = io.BytesIO()
    lines = [line for line in (" ".join(text.split()) for text in texts) if line]
    if not lines:
        raise UserError("no text to learn a vocabulary from")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, character_coverage=1.0, byte_fallback=False, normalization_rule_name="nmt_nfkc",
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, max_sentence_length=2**20, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if needed:
            raise UserError(
                f"a vocabulary of {vocab_size} pieces is too small for these texts: they need at least {needed[1]}"
            ) from error
        raise UserError(f"cannot learn a vocabulary from these texts: {' '.join(str(error).split())}") from error
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(model.getvalue())
    return Tokenizer(path)
