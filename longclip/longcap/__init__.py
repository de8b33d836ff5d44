"""Articles to pairs: full-text articles of PMC become shards of figures with long descriptions.

    pmc.py       the PMC Cloud Service: how its bucket names articles, and what it says of each
    store.py     objects of that bucket, or of a folder laid out like it, whole and verified
    polite.py    requests at a pace, with the waits that a server asks for and retries that back off
    fetch.py     articles and their images into folders, one an article
    article.py   what an article says: the form between reading and writing
    jats.py      JATS XML -> Article; by markup.py (bytes -> a tree, hardened), text.py (markup -> plain text),
                 labels.py ("Figs. 2-4" -> figures), license.py, frontmatter.py
    images.py    a figure's files -> one JPEG
    context.py   Article, figure -> a long description within a token budget, every sentence with its source
    enrich.py    finished shards with their descriptions rewritten by a language model
    guard.py     whether a rewrite says what its source does not
    build.py     a folder of articles -> shards, their index and a manifest (command.py: as it is typed), by way of
    options.py     what was asked for; a build goes on with nothing else
    listing.py     the articles, dealt into units of work
    pairs.py       figures as pairs: keys and BIOMEDICA's fields
    unit.py        the pairs of a unit, on disk
    arrangement.py which pair goes into which shard, and which into none (against.py, hashes.py: pictures alike)
    manifest.py    what was built, what was left out and why

BIOMEDICA-LongCAP (arXiv 2510.03978) enriched captions "with context-aware descriptions from full-text articles"; its
builder, language model and prompts were not published. This one is extractive by default: it needs no model and says
nothing that the article does not say.
"""
