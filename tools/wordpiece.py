"""Trains a small WordPiece tokenizer on articles: for models that learn to read from them alone.

python tools/wordpiece.py ARTICLES FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers.implementations import BertWordPieceTokenizer

from longclip.longcap.jats import BadArticle, parse
from longclip.longcap.listing import find_articles

VOCABULARY = 2048
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def texts(root: Path) -> Iterator[str]:
    """Captions and paragraphs of every article that can be read."""
    for place in find_articles(root):
        try:
            article = parse((root / place.name).read_bytes())
        except BadArticle as error:
            print(f"! {place.name}: {error}", file=sys.stderr)
            continue
        yield from (figure.caption for figure in article.figures)
        yield from (paragraph.text for paragraph in article.paragraphs)


def main(root: Path, folder: Path) -> None:
    trainer = BertWordPieceTokenizer()
    trainer.train_from_iterator(texts(root), vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.save_model(str(folder))
    # Read again, it knows its special tokens, and puts [CLS] and [SEP] around a text.
    BertWordPieceTokenizer(str(folder / "vocab.txt")).save(str(folder / "tokenizer.json"))
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
