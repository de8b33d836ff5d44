"""Articles to pairs: full-text articles of PMC become shards of figures with long descriptions.

    pmc.py       fetch: articles and their media, from the PMC Cloud Service's layout or a mirror
    article.py   what an article says: the form between reading and writing
    jats.py      JATS XML -> Article
    images.py    a figure's files -> one JPEG
    sentences.py text -> sentences, and the abbreviations that an article defines
    context.py   Article, figure -> a long description within a token budget, every sentence with its source
    enrich.py    the description rewritten by a language model, guarded against invented facts
    build.py     a folder of articles -> shards, their index and a manifest

BIOMEDICA-LongCAP (arXiv 2510.03978) enriched captions "with context-aware descriptions from full-text articles"; its
builder, language model and prompts were not published. This one is extractive by default: it needs no model and says
nothing that the article does not say.
"""
