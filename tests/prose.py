"""How long the sentences of a page are. `python -m tests.prose PAGE...` tells it for each page, with the longest."""

import re
import sys
from pathlib import Path

ABBREVIATIONS = ("e.g.", "i.e.", "et al.", "Eq.", "Eqs.", "vs.", "cf.", "approx.")


def sentences(markdown):
    """The sentences of a page, without code blocks, tables, headings, pictures and the targets of links."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    paragraphs, open_ = [], False
    for line in text.splitlines():
        bare = line.strip()
        if not bare or re.match(r"[|#]|\[[^\]]+\]:|-{3,}$", bare):
            open_ = False
        elif re.match(r"([-*]|\d+\.)\s", bare) or not open_:
            paragraphs.append(re.sub(r"^([-*]|\d+\.)\s+", "", bare))
            open_ = True
        else:
            paragraphs[-1] += " " + bare
    for paragraph in paragraphs:
        for short in ABBREVIATIONS:
            paragraph = paragraph.replace(short, short.replace(".", ""))
        yield from (s for s in re.split(r"(?<=[.!?])[*_\"')]*\s+", paragraph) if words(s))


def words(sentence):
    return len([word for word in sentence.split() if re.search(r"\w", word)])


def measured(markdown):
    """The mean number of words in a sentence, the share of sentences with more than 30, and the most."""
    lengths = [words(sentence) for sentence in sentences(markdown)] or [0]
    return sum(lengths) / len(lengths), sum(n > 30 for n in lengths) / len(lengths), max(lengths)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name).read_text()
        mean, share, most = measured(page)
        print(f"{name}: mean {mean:.1f} words, {share:.0%} over 30, longest {most}")
        for sentence in sorted(sentences(page), key=words, reverse=True)[:3]:
            print(f"    {words(sentence)}: {sentence[:150]}")
