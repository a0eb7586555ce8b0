"""Diversity of generated texts, and their likeness to references."""

from __future__ import annotations

from itertools import islice


def distinct_n(texts: list[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of all texts together (arXiv 1510.03055); 0 where there are none."""
    grams = [
        gram for text in texts for gram in zip(*(islice(text.lower().split(), i, None) for i in range(n)), strict=False)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: list[str], limit: int = 100) -> float:
    """Mean BLEU-4 (0–100) of each of the first `limit` texts against the others (arXiv 1802.01886): lower is more diverse."""
    from sacrebleu.metrics.bleu import BLEU

    texts = texts[:limit]
    if len(texts) < 2:
        return 0.0
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(t, texts[:i] + texts[i + 1 :]).score for i, t in enumerate(texts) if t.strip()]
    return sum(scores) / len(scores) if scores else 0.0


def likeness(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """Corpus BLEU (0–100) and ROUGE-L F1 (0–1, the best reference) against several references a text."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    width = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(width)]
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in row)
        for text, row in zip(texts, references, strict=True)
    ]
    bleu = BLEU().corpus_score(texts, columns)  # type: ignore[arg-type]
    return {"bleu": bleu.score, "rouge_l": sum(best) / len(best)}
