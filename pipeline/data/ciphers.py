"""An embedded corpus in which only examples show what is asked: words in one of several secret alphabets.

A document is lines such as `gabd>RWQT`, all in one cipher; which one, only earlier lines reveal. A model of such
documents learns to read it off the examples before it, as large models do with tasks; and a cipher's letters stand one
for one, so that whoever knows it can do words never seen. Offline, and the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

LETTERS = "abcdefgh"
ALPHABETS = ("ABCDEFGH", "IJKLMNOP", "QRSTUVWX", "01234567")
SHARES = (0.35, 0.3, 0.2, 0.15)  # of the documents: without examples, the last cipher is nobody's guess
WORD = 4  # letters
LINES = 10  # of a document
DOCUMENTS = 8000
NOISE = 0.5  # chance of each answer's letter, where asked for noise, to be a random one of its alphabet
PAIRS = 1500  # of a cipher
UNSEEN = 5  # every fifth word, on average, stands in no document and in no pairs but the unseen ones
KINDS = ("", "noisy", "unseen")


def key() -> list[object]:
    """What decides the corpus."""
    return [LETTERS, ALPHABETS, SHARES, WORD, LINES, DOCUMENTS, NOISE, PAIRS, UNSEEN]


def documents(noisy: bool) -> Iterator[str]:
    """Texts of LINES examples each."""
    for number in range(DOCUMENTS):
        draw = np.random.default_rng([11, number])
        cipher = int(draw.choice(len(ALPHABETS), p=SHARES))
        lines = (_line(cipher, word, draw if noisy else None) for word in _words(draw, LINES))
        yield "".join(f"{word}>{answer}\n" for word, answer in lines)


def pairs(cipher: int, kind: str = "") -> Iterator[dict[str, str]]:
    """Queries and answers in one cipher, every query once; the answers can be noisy, or the words such as no document
    has."""
    draw = np.random.default_rng([13, cipher])
    for word in draw.permutation(np.unique(_words(draw, 4 * PAIRS, kind == "unseen"), axis=0))[:PAIRS]:
        query, answer = _line(cipher, word, draw if kind == "noisy" else None)
        yield {"query": f"{query}>", "answer": answer}


def _words(draw: np.random.Generator, count: int, unseen: bool = False) -> np.ndarray:
    words = draw.integers(len(LETTERS), size=(2 * UNSEEN * count, WORD))
    code = (words * len(LETTERS) ** np.arange(WORD)).sum(1) * 2654435761 % 2**32
    return words[(code < 2**32 // UNSEEN) == unseen][:count]


def _line(cipher: int, word: np.ndarray, noise: np.random.Generator | None) -> tuple[str, str]:
    secret = np.random.default_rng([7, cipher]).permutation(len(LETTERS))[word]
    if noise is not None:
        wrong = noise.random(len(word)) < NOISE
        secret = np.where(wrong, noise.integers(len(LETTERS), size=len(word)), secret)
    return "".join(LETTERS[i] for i in word), "".join(ALPHABETS[cipher][i] for i in secret)
