"""What a reward model must beat on the same test texts: length, a sentiment lexicon, TF-IDF + ridge.

Each returns one score per text, higher is better, or None where the library it needs (extra `[dev]`) is
missing.
"""

from collections.abc import Sequence

from minirlhf.measure.stats import pearson

ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # ridge strengths tried on the validation split


def longer_text(texts: Sequence[str]) -> list[float]:
    """Characters of each text: the baseline that prefers the longer one [D15]."""
    return [float(len(text)) for text in texts]


def vader_lexicon(texts: Sequence[str]) -> list[float] | None:
    """Compound sentiment in -1..1 by VADER's own analyser: a lexicon with rules (Hutto & Gilbert 2014)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        return None
    analyser = SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(text)["compound"] for text in texts]


def tfidf_ridge(
    train_texts: Sequence[str],
    train_ratings: Sequence[float],
    val_texts: Sequence[str],
    val_ratings: Sequence[float],
    test_texts: Sequence[str],
    characters: bool = False,
) -> list[float] | None:
    """Predicted ratings of test_texts, by ridge regression on the TF-IDF (1 + log tf) of words and word
    pairs.

    The strength of the ridge is the one with the best Pearson's r on the validation split.  `characters` adds
    n-grams of 2 to 5 characters within words: three times slower, and stronger on short texts.
    """
    try:
        from scipy.sparse import hstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge
    except ImportError:
        return None
    views = [TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)]
    if characters:
        views += [TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)]
    train = hstack([view.fit_transform(train_texts) for view in views], format="csr")
    val, test = (hstack([view.transform(t) for view in views], format="csr") for t in (val_texts, test_texts))
    fitted = [Ridge(alpha=alpha).fit(train, train_ratings) for alpha in ALPHAS]
    best = max(fitted, key=lambda model: pearson(model.predict(val), val_ratings))
    return best.predict(test).tolist()
