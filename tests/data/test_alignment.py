"""Tokens of two tokenizers are held side by side only where they are the same bytes of the same text."""

import json
import math
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data import parts
from pipeline.data.alignment import LONGEST, Aligner
from pipeline.data.batch import collate
from pipeline.data.controls import tokenized
from pipeline.data.documents import Documents
from pipeline.data.loader import PackedSequences
from pipeline.data.packing import prepare
from pipeline.data.prepared import sequences_of
from pipeline.data.token_bytes import token_bytes, vocabulary_pairs
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from tests.optional_data import STORIES, needed

ENGLISH = sorted({text.strip() for text in topics.values()}, key=len)[:20]
TEXTS = [
    *ENGLISH[:2],
    "Once upon a time there was a little girl. She was 3 years old!",
    "Привет, 你好 — naïve café 👩\u200d🚀!\n\n  \uff21 世界",
    "é" * 50,
    " spaces  and\ttabs ",
    "   three before\r\n\r\nand\n\n\nlines",
    "x",
    "e\u0301 € \ufb01",
    "🚀🚀🚀",
]
# What tokenizers take for something else than text.
ODD = "a ▁ piece ▁▁ of <0x41> and <s>not begin</s> <|endoftext|> at all"
Spans = list[tuple[int, int, int, int]]


def wrapped(backend: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def changed(tokenizer: Any, **parts: Any) -> Any:
    """A copy with other parts of its pipeline."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return wrapped(backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def unigram() -> Any:
    """SentencePiece's other kind, with a normalizer that composes and widens, and no byte fallback."""
    text = "▁".join(" ".join([*ENGLISH, *TEXTS[:4]]).split())
    counts = Counter(text[i : i + length] for length in range(1, 6) for i in range(len(text)))
    single = {piece for piece in counts if len(piece) == 1}
    pieces = sorted(single | {piece for piece, _ in counts.most_common(400) if "▁" not in piece[1:]})
    vocabulary = [(special, 0.0) for special in ("<unk>", "<s>", "</s>")]
    vocabulary += [(piece, math.log(counts[piece] / len(text))) for piece in pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return wrapped(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {f"bpe{size}": train_tokenizer(ENGLISH, size, folder / str(size)) for size in (400, 800)}
    found["trimming"] = changed(found["bpe800"], post_processor=processors.ByteLevel(trim_offsets=True))
    found["prefixing"] = changed(found["bpe400"], pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    found["composing"] = changed(found["bpe800"], normalizer=normalizers.NFKC())
    found["lowering"] = changed(found["bpe400"], normalizer=normalizers.Lowercase())
    found["unigram"] = unigram()
    if STORIES.exists():
        found["stories"] = load_tokenizer(STORIES)
    return found


NAMES = ["bpe400", "bpe800", "trimming", "prefixing", "composing", "lowering", "unigram", "stories"]


def named(kinds: dict[str, Any], name: str) -> Any:
    if name not in kinds:
        needed(STORIES)
    return kinds[name]


def spelled(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """What tokens say, told by transformers' own table or by hand; a special token is itself between zero bytes."""
    said = []
    of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    for id_, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if id_ in tokenizer.all_special_ids:
            said.append(b"\0" + token.encode() + b"\0")
        elif "ByteLevel" in str(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]):
            said.append(bytes(of_letter[letter] for letter in token))
        elif len(token) == 6 and token.startswith("<0x"):
            said.append(bytes.fromhex(token[3:5]))
        else:
            said.append(token.replace("▁", " ").encode())
    return said


def tokens_of(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    return next(iter(tokenized(tokenizer, [text])))


def align(student: Any, teacher: Any, text: str, aligner: Aligner | None = None) -> tuple[Spans, int]:
    found = (aligner or Aligner(student, teacher)).text(text, tokens_of(student, text), tokens_of(teacher, text))
    return [tuple(span) for span in found.spans.tolist()], found.dropped


# Vocabularies


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_tokens_are_what_the_tokenizer_decodes(kinds: dict[str, Any], name: str) -> None:
    tokenizer = named(kinds, name)
    words = token_bytes(tokenizer)
    assert len(words) == len(tokenizer)
    for id_, word in enumerate(words):
        if id_ in tokenizer.all_special_ids:
            assert word is None
        else:
            assert word == spelled(tokenizer, [id_])[0]
    for text in TEXTS:
        ids = tokens_of(tokenizer, text)[0]
        if not set(ids) & set(tokenizer.all_special_ids):
            together = b"".join(words[id_] or b"" for id_ in ids).decode()
            assert tokenizer.decode(ids) in (together, together.removeprefix(" "))


def test_added_tokens_stand_for_what_they_are_written_as(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(ENGLISH, 300, tmp_path / "t")
    tokenizer.add_tokens(["é\u20ac", "  "])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    words = token_bytes(tokenizer)
    assert words[-3:] == ["é\u20ac".encode(), b"  ", None]
    assert words[tokenizer.eos_token_id] is None


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (lambda: Tokenizer(models.WordPiece({"a": 0}, unk_token="a")), "WordPiece with continuing_subword_prefix '##'"),
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "the tokenizer's decoder none does not define"),
    ],
)
def test_a_decoder_that_is_not_understood_is_refused_by_its_name(backend: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        token_bytes(wrapped(backend()))
    assert "\n" not in str(refusal.value)


def test_decoders_of_words_and_slow_tokenizers_are_refused() -> None:
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoders.CTC()
    with pytest.raises(Refusal, match="the tokenizer's decoder CTC does not define which bytes"):
        token_bytes(wrapped(backend))
    with pytest.raises(Refusal, match=r"ByT5Tokenizer has no tokenizer\.json"):
        token_bytes(ByT5Tokenizer())


@pytest.mark.parametrize("name", NAMES)
def test_identical_tokenizers_pair_every_id_with_itself(kinds: dict[str, Any], name: str) -> None:
    tokenizer = named(kinds, name)
    ours, theirs = vocabulary_pairs(tokenizer, tokenizer)
    assert ours.dtype == theirs.dtype == np.int64
    assert ours.tolist() == theirs.tolist() == list(range(len(tokenizer)))


@pytest.mark.parametrize(("student", "teacher"), [("bpe400", "bpe800"), ("bpe800", "stories"), ("stories", "bpe400")])
def test_vocabularies_are_paired_one_to_one_by_bytes_and_the_ends_by_role(
    kinds: dict[str, Any], student: str, teacher: str
) -> None:
    one, other = named(kinds, student), named(kinds, teacher)
    ours, theirs = vocabulary_pairs(one, other)
    assert ours.tolist() == sorted(set(ours.tolist()))
    assert len(set(theirs.tolist())) == len(theirs)
    pairs = dict(zip(ours.tolist(), theirs.tolist(), strict=True))
    assert pairs.pop(one.eos_token_id) == other.eos_token_id
    words, others = spelled(one, list(range(len(one)))), spelled(other, list(range(len(other))))
    for id_, paired in pairs.items():
        assert words[id_] == others[paired]
    assert len(pairs) == len(set(words) & set(others) - {b"\0<|endoftext|>\0"})
    if "stories" in (student, teacher):  # its 3 + 65 is <0x41>, which no text is written with
        side, stories = (pairs.keys(), one) if student == "stories" else (pairs.values(), other)
        assert stories.convert_tokens_to_ids("A") in side
        assert stories.convert_tokens_to_ids("<0x41>") not in side
        assert stories.convert_tokens_to_ids("<0xF0>") in side


def test_begin_and_end_pair_where_both_have_their_own(kinds: dict[str, Any]) -> None:
    stories, other = named(kinds, "stories"), kinds["unigram"]
    pairs = dict(np.stack(vocabulary_pairs(other, stories), axis=1).tolist())
    assert pairs[other.bos_token_id] == stories.bos_token_id
    assert pairs[other.eos_token_id] == stories.eos_token_id
    assert other.unk_token_id not in pairs


# Texts


def by_hand(ours: list[bytes], theirs: list[bytes]) -> Spans:
    """Spans between the lengths that both ways to cut one text have in common, the long way."""
    edges = [[sum(map(len, side[:i])) for i in range(len(side) + 1)] for side in (ours, theirs)]
    common = sorted(set(edges[0]) & set(edges[1]))
    return [
        (edges[0].index(begin), edges[0].index(end), edges[1].index(begin), edges[1].index(end))
        for begin, end in pairwise(common)
    ]


@pytest.mark.parametrize(("student", "teacher"), list(product(NAMES, NAMES)))
def test_spans_are_the_same_bytes_of_the_text_on_both_sides(kinds: dict[str, Any], student: str, teacher: str) -> None:
    one, other = named(kinds, student), named(kinds, teacher)
    aligner = Aligner(one, other)
    for text in [*TEXTS, ODD]:
        spans, dropped = align(one, other, text, aligner)
        ours, theirs = (spelled(t, tokens_of(t, text)[0]) for t in (one, other))
        raw, here = b" " + text.encode(), 0  # the space that some put in front
        for (_, s1, _, t1), (s2, _, t2, _) in pairwise(spans):
            assert s1 <= s2
            assert t1 <= t2
        for s0, s1, t0, t1 in spans:
            said = b"".join(ours[s0:s1])
            assert b"".join(theirs[t0:t1]) == said != b""
            assert max(s1 - s0, t1 - t0) <= LONGEST
            # In a space put in front of every section, or in the tokens of one tokenizer alone, it is not the text.
            if text is not ODD and one is not other:
                assert raw.find(said, here) >= 0
                here = raw.find(said, here) + len(said)
        if b"".join(ours) == b"".join(theirs) in (raw, raw[1:]):
            short = [span for span in by_hand(ours, theirs) if max(span[1] - span[0], span[3] - span[2]) <= LONGEST]
            assert spans == short
            assert dropped == len(by_hand(ours, theirs)) - len(short)
        if one is other:
            assert spans == [(i, i + 1, i, i + 1) for i in range(len(ours))]


def test_a_dummy_space_is_not_taken_for_one_of_the_text(kinds: dict[str, Any]) -> None:
    stories = named(kinds, "stories")
    bpe = kinds["bpe800"]
    assert stories.tokenize("Once upon") == ["▁Once", "▁upon"]
    spans, _ = align(stories, bpe, "Once upon")
    assert [span[:2] for span in spans] == [(1, 2)]
    assert stories.tokenize(" upon") == ["▁", "▁upon"]  # the first is no part of the text, the second is all of it
    spans, _ = align(stories, bpe, " upon")
    assert spans == [(1, 2, 0, len(bpe.tokenize(" upon")))]
    spans, _ = align(stories, kinds["prefixing"], "Once upon")  # it has put the same there
    assert spans[0][:3] == (0, 1, 0)


def test_a_character_may_be_shared_out_differently_and_its_bytes_still_pair(kinds: dict[str, Any]) -> None:
    stories, bpe = named(kinds, "stories"), kinds["bpe400"]
    assert len(bpe.tokenize("🚀")) == 4
    assert stories.tokenize("🚀")[1:] == ["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>"]
    assert align(stories, bpe, "🚀")[0] == [(i + 1, i + 2, i, i + 1) for i in range(4)]


def test_nothing_is_aligned_where_the_tokens_do_not_spell_the_text(kinds: dict[str, Any]) -> None:
    """Composed letters, ligatures, lower case: the tokens around them are aligned again."""
    text = "one \ufb01ne e\u0301 THING and more"
    for name in ("composing", "lowering"):
        tokenizer = kinds[name]
        spans, _ = align(kinds["bpe400"], tokenizer, text)
        theirs = spelled(tokenizer, tokens_of(tokenizer, text)[0])
        covered = b"".join(b"".join(theirs[t0:t1]) for _, _, t0, t1 in spans)
        assert covered.startswith(b"one")
        assert covered.endswith(b" and more")
        assert ("fine" if name == "composing" else " thing").encode() in b"".join(theirs)
        assert ("fin" if name == "composing" else "thing").encode() not in covered


def test_what_a_normalizer_takes_away_is_not_found_in_its_like(kinds: dict[str, Any]) -> None:
    shortening = changed(kinds["bpe400"], normalizer=normalizers.Replace(Regex("^ab"), ""))
    text = "abab! ab"
    (ours, places), (theirs, others) = tokens_of(shortening, text), tokens_of(kinds["bpe400"], text)
    assert b"".join(spelled(shortening, ours)) == b"ab! ab"
    spans, _ = align(shortening, kinds["bpe400"], text)
    assert b"".join(b"".join(spelled(shortening, ours)[s0:s1]) for s0, s1, _, _ in spans).endswith(b"b! ab")
    for s0, s1, t0, t1 in spans:
        assert (places[s0][0], places[s1 - 1][1]) == (others[t0][0], others[t1 - 1][1])
    assert len(theirs) > len(ours)


def test_special_tokens_in_a_text_are_aligned_with_nothing(kinds: dict[str, Any]) -> None:
    text = "before<|endoftext|>after"
    bpe, stories = kinds["bpe400"], named(kinds, "stories")
    assert bpe.eos_token_id in tokens_of(bpe, text)[0]
    spans, _ = align(bpe, stories, text)
    ours = spelled(bpe, tokens_of(bpe, text)[0])
    assert b"".join(b"".join(ours[s0:s1]) for s0, s1, _, _ in spans).endswith(b"after")
    assert not any(bpe.eos_token_id in tokens_of(bpe, text)[0][s0:s1] for s0, s1, _, _ in spans)


def test_spans_too_long_to_say_anything_are_dropped_and_counted(kinds: dict[str, Any]) -> None:
    bpe = kinds["bpe400"]
    bpe = changed(bpe)
    bpe.add_tokens(["a-very-long-token-that-is-one"])
    text = "x a-very-long-token-that-is-one y"
    spans, dropped = align(bpe, kinds["bpe400"], text)
    ours = spelled(bpe, tokens_of(bpe, text)[0])
    assert dropped == 1
    assert b"".join(b"".join(ours[s0:s1]) for s0, s1, _, _ in spans) == b"x y"


# Rows


def pieces_of(row: dict[str, Any]) -> tuple[list[range], list[range]]:
    """The places of each piece, of the student and of the teacher."""
    sides = []
    for name in ("position_ids", "teacher_position_ids"):
        begins = [i for i, position in enumerate(row[name]) if position == 0]
        sides.append([range(*bounds) for bounds in pairwise([*begins, len(row[name])])])
        assert row[name] == [i for piece in sides[-1] for i in range(len(piece))]
    return sides[0], sides[1]


def spans_of(row: dict[str, Any]) -> Spans:
    return [tuple(row["spans"][i : i + 4]) for i in range(0, len(row["spans"]), 4)]


def check_spans(row: dict[str, Any], student: Any, teacher: Any) -> None:
    """Every span is supervised, predicted within its own piece, and the same bytes on both sides, or both ends."""
    ours, theirs = pieces_of(row)
    assert len(ours) == len(theirs)
    assert len(row["teacher_input_ids"]) == len(row["teacher_position_ids"])
    assert spans_of(row) == sorted(spans_of(row))
    last = (0, 0)
    for place, count, taught, taught_count in spans_of(row):
        (piece,) = (i for i, places in enumerate(ours) if place in places)
        assert place + count in ours[piece]
        assert taught in theirs[piece]
        assert taught + taught_count in theirs[piece]
        targets = row["targets"][place : place + count]
        assert IGNORED not in targets
        assert targets == row["input_ids"][place + 1 : place + count + 1]
        said = row["teacher_input_ids"][taught + 1 : taught + taught_count + 1]
        if targets[0] in student.all_special_ids:
            assert (count, taught_count) == (1, 1)
            assert said[0] in teacher.all_special_ids
        else:
            assert b"".join(spelled(student, targets)) == b"".join(spelled(teacher, said))
        assert last <= (place, taught)
        last = (place + count, taught + taught_count)


def taught_rows(
    tmp: Path, student: Any, teacher: Any, texts: list[str] = TEXTS, **fields: Any
) -> tuple[Dataset, dict[str, Any]]:
    documents = Dataset.from_dict({"text": texts})
    return prepare(documents, student, Documents(**fields), folder=tmp / "rows", teacher_tokenizer=teacher)


PAIRS = [("bpe400", "bpe800"), ("bpe800", "stories"), ("stories", "bpe400"), ("unigram", "trimming")]


@pytest.mark.parametrize("max_length", [2, 5, 40, 4096])
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_the_spans_of_rows_are_supervised_and_say_the_same(
    tmp_path: Path, kinds: dict[str, Any], student: str, teacher: str, max_length: int
) -> None:
    one, other = named(kinds, student), named(kinds, teacher)
    rows, statistics = taught_rows(tmp_path, one, other, max_length=max_length)
    for row in rows.to_list():
        check_spans(row, one, other)
        ours, theirs = pieces_of(row)
        for piece, taught in zip(ours, theirs, strict=True):
            ids = [row["input_ids"][i] for i in piece], [row["teacher_input_ids"][i] for i in taught]
            if ids[0][0] == one.bos_token_id:  # a text begins for both
                assert ids[1][0] == other.bos_token_id
            if ids[1][0] == other.bos_token_id:
                del ids[1][0]
            assert (one.eos_token_id == ids[0][-1]) == (other.eos_token_id in ids[1][-1:])
            if "unigram" not in (student, teacher):  # the teacher sees no text that the student does not
                said, held = (
                    b"".join(word for word in spelled(tokenizer, side) if b"\0" not in word)
                    for tokenizer, side in zip((one, other), ids, strict=True)
                )
                assert held in said or held.removeprefix(b" ") in said
    spans = [span for row in rows for span in spans_of(row)]
    assert statistics["spans"] == len(spans)
    assert statistics["spanned"] == sum(count for _, count, _, _ in spans)
    assert statistics["teacher_tokens"] == sum(map(len, rows["teacher_input_ids"]))
    ends = sum(one.eos_token_id in row["targets"][s : s + 1] for row in rows for s, *_ in spans_of(row))
    assert ends == len(TEXTS)
    if max_length == 4096:
        assert statistics["spanned"] > (0.55 if "unigram" in (student, teacher) else 0.9) * statistics["supervised"]


def test_the_columns_of_the_student_are_what_they_are_without_a_teacher(tmp_path: Path, kinds: dict[str, Any]) -> None:
    one, other = kinds["bpe400"], kinds["bpe800"]
    rows, statistics = taught_rows(tmp_path / "with", one, other, max_length=64)
    alone, before = prepare(
        Dataset.from_dict({"text": TEXTS}), one, Documents(max_length=64), folder=tmp_path / "without"
    )
    assert alone.column_names == ["input_ids", "position_ids", "targets", "supervised", "bytes"]
    assert {name: rows[:][name] for name in alone.column_names} == alone[:]
    assert {name: statistics[name] for name in before} == before
    further = {name for name in rows.column_names if name not in alone.column_names}
    assert further == {"teacher_input_ids", "teacher_position_ids", "spans"}


@pytest.mark.parametrize("max_length", [2, 7, 64, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_of_identical_tokenizers_every_supervised_token_is_a_span_of_one_and_one(
    tmp_path: Path, kinds: dict[str, Any], name: str, max_length: int
) -> None:
    tokenizer = named(kinds, name)
    rows, statistics = taught_rows(tmp_path, tokenizer, tokenizer, max_length=max_length)
    assert statistics["spans"] == statistics["spanned"] == statistics["supervised"]
    assert statistics["long_spans"] == 0
    begun = 0
    for row in rows.to_list():
        supervised = [i for i, target in enumerate(row["targets"]) if target != IGNORED]
        assert [span[0] for span in spans_of(row)] == supervised
        for place, count, taught, taught_count in spans_of(row):
            assert (count, taught_count) == (1, 1)
            assert row["teacher_input_ids"][taught + 1] == row["targets"][place]
        for piece, theirs in zip(*pieces_of(row), strict=True):
            ids = [row["input_ids"][i] for i in piece]
            same = [row["teacher_input_ids"][i] for i in theirs]
            begun += ids[0] == tokenizer.bos_token_id
            assert same == ids
    assert begun >= len(TEXTS)


def test_a_window_that_begins_within_a_character_has_its_spans_behind_it(tmp_path: Path, kinds: dict[str, Any]) -> None:
    bpe, stories = kinds["bpe400"], named(kinds, "stories")
    text = "🚀 is a rocket"
    rows, _ = taught_rows(tmp_path, bpe, stories, [text], max_length=4, packing=False)
    assert spelled(bpe, rows[1]["input_ids"])[:2] == [b"\x9a", b"\x80"]
    words = spelled(stories, rows[1]["teacher_input_ids"])
    assert words[0] == b"\x9a"
    assert spans_of(rows[1])[0] == (0, 1, 0, 1)
    check_spans(rows[1], bpe, stories)


def test_rows_made_some_at_a_time_and_packed_are_the_same(
    tmp_path: Path, kinds: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = kinds["bpe400"], kinds["bpe800"]
    at_once, statistics = taught_rows(tmp_path / "at-once", one, other, max_length=32)
    monkeypatch.setattr(parts, "_BATCH_DOCUMENTS", 2)
    in_parts, same = taught_rows(tmp_path / "in-parts", one, other, max_length=32)
    assert in_parts[:] == at_once[:]
    assert same == statistics
    loose, apart = taught_rows(tmp_path / "loose", one, other, max_length=32, packing=False)
    assert len(loose) > len(at_once)
    for name in ("spans", "spanned", "long_spans", "teacher_tokens"):
        assert apart[name] == statistics[name]


@pytest.mark.parametrize("texts", [[], [" "]])
def test_no_text_gives_no_rows_of_a_teacher(tmp_path: Path, kinds: dict[str, Any], texts: list[str]) -> None:
    rows, statistics = taught_rows(tmp_path, kinds["bpe400"], kinds["bpe800"], texts)
    assert len(rows) == statistics["spans"] == statistics["teacher_tokens"] == 0
    assert "spans" in rows.column_names


def test_a_teacher_without_an_end_is_refused(tmp_path: Path, kinds: dict[str, Any]) -> None:
    endless = changed(kinds["bpe800"])
    endless.eos_token = None
    with pytest.raises(Refusal, match="the teacher's tokenizer has no end token"):
        taught_rows(tmp_path, kinds["bpe400"], endless)


def test_the_folder_of_rows_depends_on_the_teacher(tmp_path: Path, kinds: dict[str, Any]) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    data = Documents(train=str(tmp_path / "a.txt"), sample_by="line", holdout=0)
    folders = [
        sequences_of(data, "train", kinds["bpe400"], tmp_path, teacher)[2]
        for teacher in (None, kinds["bpe800"], kinds["composing"], kinds["unigram"], kinds["bpe800"])
    ]
    assert len(set(folders)) == 4
    assert folders[1] == folders[4]
    assert sequences_of(data, "train", kinds["bpe400"], tmp_path)[2] == folders[0]


# Batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_shifts_spans_with_the_padding(tmp_path: Path, kinds: dict[str, Any], side: str) -> None:
    one, other = kinds["bpe400"], kinds["bpe800"]
    rows, _ = taught_rows(tmp_path, one, other, packing=False, max_length=200)
    lengths = [len(ids) for ids in rows["input_ids"]]
    chosen = [int(np.argmin(lengths)), int(np.argmax(lengths)), 3]
    batch = collate([rows[i] for i in chosen], pad_token=one.pad_token_id, side=side)
    spans = batch["spans"]
    assert spans.dtype == torch.long
    assert spans.tolist() == sorted(spans.tolist())
    assert batch["teacher_input_ids"].shape == batch["teacher_position_ids"].shape
    assert batch["teacher_input_ids"].shape[1] == max(len(rows[i]["teacher_input_ids"]) for i in chosen)
    at = 0
    for number, i in enumerate(chosen):
        row = rows[i]
        missing = batch["teacher_input_ids"].shape[1] - len(row["teacher_input_ids"])
        padding = slice(0, missing) if side == "left" else slice(len(row["teacher_input_ids"]), None)
        assert batch["teacher_position_ids"][number, padding].tolist() == list(range(missing))
        for place, count, taught, taught_count in spans_of(row):
            found = spans[at].tolist()
            at += 1
            assert (found[0], found[2], found[4]) == (number, count, taught_count)
            theirs = batch["teacher_input_ids"][number, found[3] : found[3] + taught_count + 1].tolist()
            assert theirs == row["teacher_input_ids"][taught : taught + taught_count + 1]
            ours = batch["targets"][number, found[1] : found[1] + count].tolist()
            assert ours == row["targets"][place : place + count]
    assert at == len(spans)


def test_blank_rows_have_no_spans(tmp_path: Path, kinds: dict[str, Any]) -> None:
    from pipeline.data.loader import MicroBatch

    rows, _ = taught_rows(tmp_path, kinds["bpe400"], kinds["bpe800"], max_length=64)
    module = PackedSequences(rows, rows, seed=0, global_batch=2, micro_batch=2, pad_token=0, length=None)
    batch = next(iter(module._loader(rows, [MicroBatch([0, -1], 0, 0)])))
    assert batch["teacher_input_ids"].shape[0] == 2
    assert set(batch["spans"][:, 0].tolist()) == {0}
    batch = next(iter(module._loader(rows, [MicroBatch([-1], 0, 0)])))
    assert batch["spans"].shape == (0, 5)
    assert batch["teacher_input_ids"].tolist() == [[0]]
    assert "weights" not in batch


# Conversations

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def turn(role: str, content: str, **further: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **further}


CHATS = [
    [
        turn("user", "What does break do?"),
        turn("assistant", "It ends the nearest loop — früher als geplant. 👍"),
        turn("user", "And continue?"),
        turn("assistant", "It goes on with the next cycle."),
    ],
    [turn("user", "Say it."), turn("assistant", " It.\n")],
]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("chatty")
    found = {}
    for name, size, template in (("chatml", 400, CHATML), ("marked", 800, MARKED)):
        found[name] = train_tokenizer(ENGLISH, size, folder / name)
        found[name].add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        found[name].add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        found[name].chat_template = template
    if STORIES.exists():
        found["llama"] = load_tokenizer(STORIES)
        found["llama"].chat_template = LLAMA_2
    return found


def taught_chats(tmp: Path, student: Any, teacher: Any, chats: Any = CHATS, **fields: Any) -> Any:
    documents = Dataset.from_dict({"messages": chats})
    data = Documents(**{"max_length": 4096, "packing": False, **fields})
    return prepare(documents, student, data, folder=tmp / "rows", teacher_tokenizer=teacher)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("chatml", "marked"), ("marked", "chatml"), ("marked", "llama"), ("llama", "chatml"), ("chatml", "llama")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_assistants_turns_are_aligned_across_templates(
    tmp_path: Path, chatty: dict[str, Any], student: str, teacher: str, packed: bool
) -> None:
    one, other = named(chatty, student), named(chatty, teacher)
    rows, statistics = taught_chats(tmp_path, one, other, packing=packed)
    said = b""
    ends = 0
    for row in rows.to_list():
        check_spans(row, one, other)
        for place, count, _, _ in spans_of(row):
            targets = row["targets"][place : place + count]
            ends += targets[0] in one.all_special_ids
            said += b"" if targets[0] in one.all_special_ids else b"".join(spelled(one, targets))
    assert ends == 3  # each turn's
    for content in ("ends the nearest loop — früher als geplant. 👍", "goes on with the next cycle.", "t."):
        assert content.encode() in said
    for other_text in (b"INST", b"assistant", b"What does", b"]"):
        assert other_text not in said
    assert statistics["spanned"] > 0.8 * (statistics["supervised"] - 3)
    if not packed:
        whole = [
            other.apply_chat_template(chat, tokenize=True, return_dict=True, add_special_tokens=False)["input_ids"]
            for chat in CHATS
        ]
        assert rows["teacher_input_ids"][:] == whole


@pytest.mark.parametrize("name", ["chatml", "marked", "llama"])
def test_conversations_of_identical_tokenizers_are_spans_of_one_and_one(
    tmp_path: Path, chatty: dict[str, Any], name: str
) -> None:
    tokenizer = named(chatty, name)
    for max_length in (4096, 40):
        rows, statistics = taught_chats(tmp_path / str(max_length), tokenizer, tokenizer, max_length=max_length)
        assert rows["teacher_input_ids"][:] == rows["input_ids"][:]
        assert statistics["spans"] == statistics["spanned"] == statistics["supervised"]
        for row in rows.to_list():
            supervised = [i for i, target in enumerate(row["targets"]) if target != IGNORED]
            assert spans_of(row) == [(i, 1, i, 1) for i in supervised]


def test_of_a_conversation_cut_off_the_teacher_sees_no_more_than_its_last_span(
    tmp_path: Path, chatty: dict[str, Any]
) -> None:
    one, other = chatty["chatml"], chatty["marked"]
    rows, statistics = taught_chats(tmp_path, one, other, CHATS[:1], max_length=60)
    assert statistics["truncated"] == 1
    check_spans(rows[0], one, other)
    *_, last = spans_of(rows[0])
    assert len(rows[0]["teacher_input_ids"]) == last[2] + last[3] + 1
    assert last[0] + last[1] < 60


def test_one_template_given_is_used_for_both(tmp_path: Path, chatty: dict[str, Any]) -> None:
    (tmp_path / "t.jinja").write_text(MARKED)
    one, other = chatty["chatml"], chatty["marked"]
    rows, _ = taught_chats(tmp_path, one, other, chat_template=str(tmp_path / "t.jinja"))
    for row in rows.to_list():
        for tokenizer, name in ((one, "input_ids"), (other, "teacher_input_ids")):
            assert tokenizer.decode(row[name]).startswith("[user] ")


def test_a_teacher_without_a_template_is_refused(tmp_path: Path, chatty: dict[str, Any], kinds: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match=r"the teacher's tokenizer has no chat template; give data\.chat_template=FILE"):
        taught_chats(tmp_path, chatty["chatml"], kinds["bpe800"])


def test_a_template_that_marks_other_parts_than_turns_is_refused(tmp_path: Path, chatty: dict[str, Any]) -> None:
    (tmp_path / "t.jinja").write_text(MARKED.replace("{{ eos_token }}", "{% endgeneration %}{% generation %}."))
    with pytest.raises(Refusal, match=r"conversation 0: the chat template marks 4 parts .* speaks 2 times"):
        taught_chats(tmp_path, chatty["chatml"], chatty["marked"], chat_template=str(tmp_path / "t.jinja"))


def test_a_token_that_nothing_stands_before_is_in_no_span(tmp_path: Path, chatty: dict[str, Any]) -> None:
    """A conversation gets no begin token but its template's, and this one's speaks at once."""
    chat = [turn("assistant", "Hello there, reader"), turn("user", "Hello")]
    bare = "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    bare += "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    one, other = chatty["chatml"], chatty["marked"]
    for student, teacher in ((one, other), (other, one), (one, one)):
        path = tmp_path / f"{student is one}{teacher is one}"
        path.mkdir()
        (path / "t.jinja").write_text(bare)
        rows, statistics = taught_chats(path, student, teacher, [chat], chat_template=str(path / "t.jinja"))
        check_spans(rows[0], student, teacher)
        assert spans_of(rows[0])[0][0] >= 0
        assert 0 < statistics["spanned"] <= statistics["supervised"]


def test_turns_that_are_switched_off_have_no_spans(tmp_path: Path, chatty: dict[str, Any]) -> None:
    chat = [*CHATS[0][:3], {**CHATS[0][3], "weight": 0}]
    one, other = chatty["chatml"], chatty["marked"]
    rows, _ = taught_chats(tmp_path / "off", one, other, [chat])
    whole, _ = taught_chats(tmp_path / "on", one, other, CHATS[:1])
    assert rows[0]["teacher_input_ids"] == whole[0]["teacher_input_ids"]
    assert 0 < len(spans_of(rows[0])) < len(spans_of(whole[0]))
    assert spans_of(rows[0]) == spans_of(whole[0])[: len(spans_of(rows[0]))]
    check_spans(rows[0], one, other)
