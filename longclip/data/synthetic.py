"""Drawn image-caption pairs whose best possible score is known at every context window.

An image is a montage of 3 x 3 fields. Eight of them hold a cluster of stained nuclei, and the stain is one of six:
eight **facts**. The caption reads like a figure legend. It says every fact in a sentence of its own, in random order,
spread evenly among sentences that say nothing about the image. So a window that cuts a caption hides facts, and how
many can be counted: :func:`ceilings` gives the Recall@1 of a model that makes perfect use of what a window shows.

Caption lengths follow the waste of real biomedical captions (arXiv 2510.03978, on BIOMEDICA-6M): 55 % of the tokens
lie behind a window of 77, 2.2 % behind one of 512.

The set is meant to be learnt in minutes by towers of width 128, and what that takes is on purpose. Filler is drawn
sentence by sentence from a fixed set, not word by word. Every place has its own word for each stain (upper left is
crimson where upper centre is scarlet), its own ground, and its cluster on its own side of its field. With shared
words, one ground and centred clusters, towers of width 64 (transformers' default initialisation) counted stains instead
of placing them: 9 to 27 % of the ceiling at window 77 after 90,000 samples. So the set shows what a window hides, not
whether a model can tie a word to a place.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from longclip.data.index import index_folder
from longclip.data.shards import Sample, write_shard
from longclip.errors import SiteError, UserError

PLACES = (
    "upper left", "upper centre", "upper right", "middle left", "middle right",
    "lower left", "lower centre", "lower right",
)  # fmt: skip
"""the facts, in the order in which arrays and ``fields["facts"]`` have them; the field in the centre is the scale"""
STAINS = ((196, 32, 58), (236, 172, 28), (24, 150, 84), (52, 62, 178), (45, 45, 50), (60, 200, 215))
"""a fact's values (RGB)"""
WORDS = tuple(
    zip(
        ("crimson", "scarlet", "ruby", "cherry", "carmine", "vermilion", "garnet", "cardinal"),
        ("amber", "golden", "saffron", "ochre", "honey", "mustard", "lemon", "apricot"),
        ("emerald", "jade", "olive", "fern", "moss", "malachite", "viridian", "lime"),
        ("indigo", "cobalt", "sapphire", "navy", "azure", "ultramarine", "cerulean", "gentian"),
        ("charcoal", "ebony", "onyx", "sable", "raven", "graphite", "slate", "soot"),
        ("turquoise", "teal", "cyan", "aqua", "aquamarine", "lagoon", "seafoam", "peacock"),
        strict=True,
    )
)
"""``WORDS[place][value]``: how captions and ``fields["facts"]`` call a stain, each place in its own word"""
WINDOWS = (77, 154, 256, 512)
SIZE = 48
"""width and height of an image in pixels: fields of 16 px, which are patches of 8 px at 24 px"""

_GROUNDS = (  # RGB of the nine fields' tissues, row by row
    (236, 208, 214), (208, 220, 236), (236, 228, 200),
    (208, 230, 212), (225, 225, 225), (228, 208, 236),
    (200, 200, 208), (236, 214, 192), (212, 192, 196),
)  # fmt: skip

# The word for the stain decides the fact and comes after the place: cut anywhere before it, a sentence says nothing.
_TEMPLATES = (
    "{place}: {word}.",
    "The {place} panel shows {word} cells.",
    "Nuclei of the {place} cluster appear {word}.",
    "In the {place} field the nuclei are stained {word}.",
)
_SHORTEST = 0

# Length L ~ lognormal, cut off below (eight facts need 42 tokens) and capped above. Fitted to waste(77) = 55 % and
# waste(512) = 2.2 %; the median comes to 129 tokens.
_MEDIAN, _SIGMA, _LEAST, _MOST = 115.2, 0.724, 50, 1024

_FILLER = """
Representative micrographs from three independent experiments.
Scale bar, 50 um.
Scale bars represent 200 um in overview images and 20 um in insets.
Sections were counterstained with haematoxylin and mounted in glycerol.
Original magnification, x 400.
Images were acquired on a confocal microscope with a 63 x oil immersion objective.
Data are shown as mean and standard deviation.
Error bars indicate the 95 % confidence interval.
Statistical significance was determined by one way analysis of variance followed by a post hoc test.
Asterisks mark p values below 0.05.
Not significant differences are not shown.
All experiments were repeated at least three times with similar results.
Tissue was fixed in 4 % paraformaldehyde overnight and embedded in paraffin.
Antibodies and dilutions are listed in the supplementary methods.
Patients gave written informed consent before enrolment.
The study protocol was approved by the local ethics committee.
Biopsies were taken at baseline and after twelve weeks of treatment.
Follow up examinations took place every six months.
Brightness and contrast were adjusted equally in every image.
Arrows point to structures that are discussed in the main text.
Arrowheads indicate mitotic figures.
Dashed lines outline the region that was used for quantification.
Insets show a higher magnification of the boxed areas.
Two blinded observers scored every section independently.
Disagreements were resolved by consensus with a senior pathologist.
Counts were normalised to the total number of cells per high power view.
Mice were housed under a twelve hour light and dark cycle.
Animals received vehicle or compound by oral gavage once daily.
Samples were collected at the indicated time points.
Cells were cultured for 48 h in serum free medium.
Transfection was carried out with a commercial reagent.
Knockdown efficiency was confirmed by western blotting.
Uncropped blots are provided as source data.
Each dot represents one animal.
Boxes span the interquartile range and whiskers extend to the extremes.
Curves were compared with the log rank test.
Hazard ratios were adjusted for age and sex.
Missing values were imputed by chained equations.
Reads were aligned to the reference genome and duplicates were removed.
Clusters were annotated with canonical marker genes.
The colour code of the stain is explained in the legend of the first figure.
Autofluorescence was subtracted before analysis.
Background was estimated from sections without primary antibody.
A pixel size of 0.2 um was used throughout.
Stacks were deconvolved and projected at maximum intensity.
Radiographs were taken in the standing position.
Axial slices had a thickness of 1 mm.
Contrast agent was injected 90 s before the acquisition.
No adverse events were reported during the observation period.
Written reports were extracted from the hospital information system.
Abbreviations are explained in the text.
Adapted with permission from a previous report.
See the methods for details of the segmentation.
Source code for this analysis is available from the authors.
Quantification of these results is given in the next figure.
Similar findings were obtained in a second cohort.
Controls were matched for age, sex and body mass index.
Specimens with folding artefacts or insufficient staining were excluded.
Slides were digitised with a whole slide scanner at a resolution of 0.25 um per pixel.
Stain normalisation was not applied.
Numbers in brackets give the sample size.
Experiments were performed at room temperature.
Incubation lasted for one hour at 37 degrees.
Membranes were blocked with 5 % bovine serum albumin in buffer.
The montage was assembled with a public software package.
This figure was prepared from raw data without further processing.
""".strip().splitlines()


# ------------------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Pairs:
    """What counts about ``n`` pairs: pair ``i`` is image ``i`` with caption ``i``."""

    facts: NDArray[np.int64]
    """[n, facts] which of a fact's values it has"""
    fact_tokens: NDArray[np.int64]
    """[n, facts] index, in the encoded caption with its special tokens, of the word that decides the fact"""
    lengths: NDArray[np.int64]
    """[n] tokens of the caption, special tokens included"""


@dataclass(frozen=True)
class _Caption:
    text: str
    fact_tokens: list[int]
    length: int


def train_tokenizer() -> Tokenizer:
    """Trains a word tokenizer on every sentence that captions are made of: one token per word, none unknown.

    It pads with [PAD], encodes to ``[CLS] words [SEP]`` in lower case, and does not truncate.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    facts = [_fact(*which) for which in product(range(len(_TEMPLATES)), range(len(PLACES)), range(len(STAINS)))]
    tokenizer.train_from_iterator([*_FILLER, *facts], trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _fact(form: int, place: int, value: int) -> str:
    text = _TEMPLATES[form].format(place=PLACES[place], word=WORDS[place][value])
    return text[0].upper() + text[1:]


class _Captions:
    """Writes captions of given facts and length. Facts decide which words stand for the stains, and nothing else."""

    def __init__(self, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
        def tokens(text: str) -> list[str]:
            return list(tokenizer.encode(text, add_special_tokens=False).tokens)

        self.rng = rng
        self.filler = np.array([len(tokens(sentence)) for sentence in _FILLER])
        forms = [tokens(_fact(form, 0, 0)) for form in range(len(_TEMPLATES))]
        self.forms = np.array([len(form) for form in forms])
        self.decides = [form.index(WORDS[0][0]) for form in forms]

    def write(self, facts: Sequence[int], length: int) -> _Caption:
        """A caption of about ``length`` tokens (within 4), special tokens included."""
        forms = self.rng.integers(len(_TEMPLATES), size=len(PLACES))
        room = length - 2 - int(self.forms[forms].sum())
        while room < 0:
            longest = int(self.forms[forms].argmax())
            room += int(self.forms[forms[longest]] - self.forms[_SHORTEST])
            forms[longest] = _SHORTEST
        filler = self._fill(room)
        # the facts stand evenly among the filler: one in each eighth of it, anywhere there
        starts = np.cumsum([0, *self.filler[filler]])
        at = starts[-1] * (np.arange(len(PLACES)) + self.rng.random(len(PLACES))) / len(PLACES)
        before = np.abs(starts[:, None] - at).argmin(0)  # [facts] filler sentences said before the k-th fact
        order = self.rng.permutation(len(PLACES))
        sentences: list[str] = []
        fact_tokens = [0] * len(PLACES)
        position, k = 1, 0
        for said in range(len(filler) + 1):
            while k < len(PLACES) and before[k] == said:
                place, form = int(order[k]), int(forms[k])
                fact_tokens[place] = position + self.decides[form]
                position += int(self.forms[form])
                sentences.append(_fact(form, place, facts[place]))
                k += 1
            if said < len(filler):
                position += int(self.filler[filler[said]])
                sentences.append(_FILLER[filler[said]])
        return _Caption(" ".join(sentences), fact_tokens, position + 1)

    def _fill(self, room: int) -> list[int]:
        """Filler sentences of about ``room`` tokens, in random order, each said again only when all have been."""
        chosen: list[int] = []
        least = int(self.filler.min())
        while room >= least - 2:
            for sentence in self.rng.permutation(len(_FILLER)).tolist():
                if self.filler[sentence] <= room + 2:
                    chosen.append(sentence)
                    room -= int(self.filler[sentence])
        self.rng.shuffle(chosen)
        return chosen


def _lengths(count: int, rng: np.random.Generator) -> list[int]:
    """Caption lengths in tokens: the quantiles of the distribution, shuffled, so that every split wastes alike."""
    normal = NormalDist(math.log(_MEDIAN), _SIGMA)
    below = normal.cdf(math.log(_LEAST))
    quantiles = [normal.inv_cdf(below + (1 - below) * (i + 0.5) / count) for i in range(count)]
    lengths = np.minimum(np.round(np.exp(quantiles)), _MOST).astype(int)
    rng.shuffle(lengths)
    return [int(length) for length in lengths]


# ----------------------------------------------------------------------------------------------------------- images


def draw(facts: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws one image per row of facts [n, 8] -> [n, 48, 48, 3] RGB.

    A cluster is a large nucleus and four small ones around it, at the rim of the montage and within its field. Places,
    sizes, shades and ground vary from image to image.
    """
    count, fields = facts.shape
    field = SIZE // 3
    # the tissue: a pale ground, uneven over some 10 px, with a little noise of the camera
    knots = np.linspace(0, 5, SIZE, dtype=np.float32)
    blend = np.maximum(0, 1 - np.abs(knots[:, None] - np.arange(6, dtype=np.float32)))
    uneven = rng.normal(0, 7, (count, 3, 6, 6)).astype(np.float32)
    ground = np.kron(np.array(_GROUNDS, dtype=np.float32).T.reshape(3, 3, 3), np.ones((field, field), dtype=np.float32))
    image = ground + rng.normal(0, 5, (count, 3, 1, 1)).astype(np.float32) + blend @ uneven @ blend.T
    # the clusters, each in its field
    cells = [divmod(k + (k >= 4), 3) for k in range(fields)]
    rim = 4 * np.array(cells, dtype=np.float32)[:, None] - 4
    centre = rim + field / 2 - 0.5 + rng.uniform(-1, 1, (count, fields, 1, 2)).astype(np.float32)
    offset = rng.normal(0, 2.2, (count, fields, 5, 2)).astype(np.float32)
    radius = rng.uniform(1.4, 2.2, (count, fields, 5)).astype(np.float32)
    offset[:, :, 0], radius[:, :, 0] = 0, radius[:, :, 0] + 1.6
    pixel = np.arange(field, dtype=np.float32)
    squared = (pixel - (centre + offset)[..., None]) ** 2  # [n, facts, nuclei, 2, field]
    distance = np.sqrt(squared[..., 0, :, None] + squared[..., 1, None, :])
    cover = np.clip(radius[..., None, None] - distance + 0.5, 0, 1).max(2)  # [n, facts, field, field]
    stains = np.array(STAINS, dtype=np.float32)[facts]
    stains = stains + rng.normal(0, 8, stains.shape).astype(np.float32)  # [n, facts, 3]
    for k, (row, column) in enumerate(cells):
        part = image[:, :, row * field : (row + 1) * field, column * field : (column + 1) * field]
        part += 0.9 * cover[:, None, k] * (stains[:, k, :, None, None] - part)
    image[:, :, SIZE // 2 : SIZE // 2 + 2, SIZE // 2 - 5 : SIZE // 2 + 5] = 20  # the scale bar
    image += rng.standard_normal(image.shape, dtype=np.float32) * 3
    pixels: NDArray[np.uint8] = np.clip(np.round(image), 0, 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=0)  # 4:4:4, for the colour is what counts
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------- ceilings


def ceilings(pairs: Pairs, windows: Sequence[int] = WINDOWS) -> dict[str, Any]:
    """The expected Recall@1 of the best possible ranker, per window and direction, and the tokens wasted.

    A window of ``c`` keeps the first ``c - 1`` tokens of an encoded caption and ends it with [SEP]. A fact is visible
    iff the word that decides it is among those. Images show all facts. Each query is ranked for itself (that another
    query has taken a candidate is not used), all candidates are equally likely before looking, and ties are broken at
    random. Facts are independent and uniform over ``V`` values, and nothing else ties an image to a caption. So

        p(image i | caption j)  =  prod over facts k of  [k visible in j] ? [i_k = j_k] : 1/V
                                =  [i matches all that j shows] * V ** -(facts hidden in j)

    up to what does not depend on the pairing. *Text to image*: j is given, the power is the same for every image, and
    all m images that match are equally good: the right one is among them, a hit has probability 1/m. *Image to text*:
    i is given, p(caption j | image i) is proportional to the same expression, so that among the captions that match,
    those that show the most facts win: a hit has probability 1/m if the right caption is one of these m, and 0
    otherwise.

    Returns:
        ``{"gallery": n, "windows": {"77": {"i2t": x, "t2i": y, "waste": w}, ...}}``, all as fractions of 1;
        ``waste`` = sum max(0, length - c) / sum length. Takes O(n^2) memory: one byte, a few for a moment.
    """
    count = len(pairs.lengths)
    result: dict[str, Any] = {"gallery": count, "windows": {}}
    for window in windows:
        visible = pairs.fact_tokens < window - 1
        match = np.ones((count, count), dtype=bool)  # [image, caption]
        for fact, shown in zip(pairs.facts.T, visible.T, strict=True):
            match &= (fact[:, None] == fact) | ~shown
        score = match * (1 + visible.sum(1, dtype=np.int8))  # 0: impossible; else 1 + facts that the caption shows
        best = score.max(1, keepdims=True)
        i2t = (np.diagonal(score) == best[:, 0]) / (score == best).sum(1)
        result["windows"][str(window)] = {
            "i2t": round(float(i2t.mean()), 6),
            "t2i": round(float((1 / match.sum(0)).mean()), 6),
            "waste": round(float(np.maximum(pairs.lengths - window, 0).sum() / pairs.lengths.sum()), 6),
        }
    return result


# ------------------------------------------------------------------------------------------------------------- sets


def synthesize(
    out: Path,
    train: int = 30_000,
    val: int = 400,
    test: int = 1_000,
    seed: int = 0,
    shard_size: int = 2_500,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Draws a whole data set: ``OUT/{train,val,test}/`` (shards and index), ``OUT/tokenizer/``, and the ceilings.

    ``OUT/val/ceilings.json`` and ``OUT/test/ceilings.json`` hold what :func:`ceilings` returns. The same arguments
    give the same bytes; val and test do not depend on the size of train. No caption occurs twice.

    Args:
        train, val, test: pairs.
        shard_size: pairs in a shard.
        progress: called after each shard with split, pairs drawn so far and pairs in all.

    Raises:
        UserError: a count below 1, or ``out`` holds shards that this data set would not overwrite.
        SiteError: ``out`` cannot be written.
    """
    if min(train, val, test, shard_size) < 1 or seed < 0:
        raise UserError("train, val, test and the shard size are at least 1, the seed at least 0")
    counts = {"test": test, "val": val, "train": train}  # this order: captions of train avoid those of test
    shards = {
        split: {out / split / f"{split}-{number:04}.tar": min(shard_size, count - number * shard_size)
                for number in range(math.ceil(count / shard_size))}
        for split, count in counts.items()
    }  # fmt: skip
    for split, paths in shards.items():
        if foreign := sorted(set((out / split).glob("*.tar")) - set(paths)):
            raise UserError(f"other shards lie in the way: {foreign[0]}", "give an empty folder, or remove them")
    tokenizer = train_tokenizer()
    captions: set[str] = set()
    try:
        _save_tokenizer(tokenizer, out / "tokenizer")
        for split, paths in shards.items():
            rng = np.random.default_rng([seed, ("train", "val", "test").index(split)])
            lengths = _lengths(counts[split], rng)
            pairs: list[_Caption] = []
            facts = rng.integers(len(STAINS), size=(counts[split], len(PLACES)))
            for path, size in paths.items():
                rows = slice(len(pairs), len(pairs) + size)
                writer = _Captions(tokenizer, rng)
                for row, length in zip(facts[rows].tolist(), lengths[rows], strict=True):
                    while (caption := writer.write(row, length)).text in captions:
                        pass
                    captions.add(caption.text)
                    pairs.append(caption)
                write_shard(path, _samples(split, rows.start, facts[rows], pairs[rows], rng))
                if progress is not None:
                    progress(split, len(pairs), counts[split])
            index_folder(out / split)
            if split != "train":
                drawn = Pairs(facts, np.array([p.fact_tokens for p in pairs]), np.array([p.length for p in pairs]))
                (out / split / "ceilings.json").write_text(json.dumps(ceilings(drawn), indent=1) + "\n")
    except OSError as error:
        raise SiteError(f"cannot write into {out}: {error.strerror or error}") from error


def _samples(
    split: str, first: int, facts: NDArray[np.int64], captions: list[_Caption], rng: np.random.Generator
) -> Iterator[Sample]:
    for start in range(0, len(captions), 500):  # drawn 500 at a time: some 200 MB while drawing
        images = draw(facts[start : start + 500], rng)
        for offset, pixels in enumerate(images, start):
            key, caption = f"{split}{first + offset:07}", captions[offset]
            fields = {
                "image_file_name": f"{key}.jpg",
                "image_panel_type": "Microscopy",
                "image_primary_label": ["Microscopy"],
                "image_size": [SIZE, SIZE],
                "image_set": split,
                "article_accession_id": "drawn",
                "article_title": "A drawn montage of stained nuclei",
                "article_license": "CC0-1.0",
                "facts": [words[value] for words, value in zip(WORDS, facts[offset], strict=True)],
                "fact_tokens": caption.fact_tokens,
            }
            yield Sample(key, _jpeg(pixels), caption.text, fields)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """As ``transformers.AutoTokenizer`` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1) + "\n")
