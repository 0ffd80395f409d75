"""A translation set of TFDS without a download: counting, in two languages, from three to eight words a sentence."""

import itertools

import tensorflow_datasets as tfds

WORDS = {"de": "eins zwei drei vier fünf sechs sieben".split(), "en": "one two three four five six seven".split()}
SIZES = {"train": 60, "validation": 10, "test": 5}


class TinyTranslation(tfds.core.GeneratorBasedBuilder):
    """Each sentence is there once, so that no two splits share one."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="de-en")]

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(languages=("de", "en")))

    def _split_generators(self, dl_manager):
        sentences = iter(sentences_of(sum(SIZES.values())))
        return {split: self._generate_examples(list(itertools.islice(sentences, n))) for split, n in SIZES.items()}

    def _generate_examples(self, sentences):
        return enumerate(sentences)


def sentences_of(n: int) -> list[dict[str, str]]:
    """n different sentences of three to eight words: sentence i says the digits of i + 1 to base 7, over and over."""

    def words(i, language):
        digits = [(i + 1) // 7**k % 7 for k in range(3)]
        return " ".join(WORDS[language][digits[k % 3]] for k in range(3 + i % 6))

    return [{language: words(i, language) for language in WORDS} for i in range(n)]
