"""How many tokens a text has, by any tokenizer, without torch or transformers: for the front and the builder.

Counts include the special tokens (``[CLS]``, ``<|endoftext|>``, ...), because a window holds those too; a tokenizer's
own truncation and padding, which many a ``tokenizer.json`` carries, are switched off.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from longclip.errors import SiteError, UserError

_CLIP_MERGES = 49152 - 256 - 2
"""merges of CLIP's vocabulary file that it uses; the file holds more"""


class TokenCounter:
    """Counts the tokens of texts. May be pickled: another process reads the tokenizer again.

    Args:
        source: a folder with ``tokenizer.json`` or BERT's ``vocab.txt``, one of these files itself, CLIP's
            ``bpe_simple_vocab_16e6.txt.gz``, or a hub id (``owner/name``).

    Raises:
        UserError: there is no such tokenizer, or its file is not one.
        SiteError: the hub cannot be reached.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        try:
            self._tokenizer = _load(self.source)
        except (UserError, SiteError):
            raise
        except Exception as error:  # tokenizers raises bare Exception for whatever a file may be
            raise UserError(f"tokenizer {source}: not one that can be read ({_first_line(error)})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.specials = self("")
        """tokens of an empty text"""

    def __reduce__(self) -> tuple[type[TokenCounter], tuple[str]]:
        return TokenCounter, (self.source,)

    def __call__(self, text: str) -> int:
        return self.many([text])[0]

    def save(self, file: Path) -> None:
        """Writes the tokenizer as ``tokenizer.json``, for machines that do not reach what it was read from."""
        self._tokenizer.save(str(file))

    def many(self, texts: Sequence[str]) -> list[int]:
        """Counts of many texts: without offsets, which cost more than the counting."""
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(list(texts))]


def _load(source: str) -> Any:
    # Processes work side by side: a thread pool in each would only quarrel over the cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path = Path(source)
    if not path.exists():
        path = _from_hub(source)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise UserError(
                f"tokenizer {source}: holds neither tokenizer.json nor vocab.txt",
                "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) of transformers writes tokenizer.json",
            )
        path = found[0]
    if path.name.endswith(".txt.gz"):
        return clip_tokenizer(path)
    return wordpiece_tokenizer(path) if path.suffix == ".txt" else Tokenizer.from_file(str(path))


def _from_hub(reference: str) -> Path:
    """The folder of ``owner/name`` or ``owner/name@revision``, fetched unless it is in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    name, _, revision = reference.partition("@")
    nowhere = UserError(
        f"tokenizer {reference}: no such file or folder, and not on the hub",
        "give a folder that holds tokenizer.json or vocab.txt, or owner/name",
    )
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise nowhere
    files = ["tokenizer.json", "vocab.txt", "tokenizer_config.json"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except (HFValidationError, RepositoryNotFoundError):
        raise nowhere from None
    except (HfHubHTTPError, OSError) as error:
        raise SiteError(
            f"tokenizer {reference}: no such path, and the hub cannot be reached from here ({type(error).__name__})",
            "give a folder that holds tokenizer.json or vocab.txt",
        ) from None


def wordpiece_tokenizer(vocabulary: Path) -> Tokenizer:
    """BERT's WordPiece from its ``vocab.txt``, one token a line.

    ``tokenizer_config.json`` beside it says whether letters are lowered; without one they are, BERT's default.
    """
    config = vocabulary.with_name("tokenizer_config.json")
    lower = json.loads(config.read_text(encoding="utf-8")).get("do_lower_case", True) if config.is_file() else True
    tokens = vocabulary.read_text(encoding="utf-8").splitlines()
    ids = {token: i for i, token in enumerate(tokens)}
    if not {"[CLS]", "[SEP]", "[UNK]"} <= ids.keys():
        raise UserError(f"tokenizer {vocabulary}: not a WordPiece vocabulary (it lacks [CLS], [SEP] or [UNK])")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=bool(lower))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return tokenizer


def clip_tokenizer(vocabulary: Path) -> Tokenizer:
    """CLIP's byte-level BPE from the vocabulary file of its own repository, ``bpe_simple_vocab_16e6.txt.gz``.

    Radford et al. 2021: the 256 bytes, the same at the end of a word, one token a merge, start and end of text.
    Mended mojibake and HTML entities, which CLIP's code undoes first, are left to whoever makes the texts.
    """
    try:
        lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    except (OSError, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer {vocabulary}: not CLIP's vocabulary file ({_first_line(error)})") from None
    merges = [(pair[0], pair[1]) for line in lines[1 : _CLIP_MERGES + 1] if len(pair := line.split()) == 2]
    if len(merges) != _CLIP_MERGES:
        raise UserError(f"tokenizer {vocabulary}: not CLIP's vocabulary file (it has too few merges)")
    # CLIP's order of bytes: the printable ones first, then those that stand in for the rest
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) >= 256, ord(c)))
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token="<|endoftext|>", continuing_subword_prefix="", end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = (ids[token] for token in tokens[-2:])
    tokenizer.post_processor = processors.RobertaProcessing((tokens[-1], end), (tokens[-2], start), False, False)
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
