"""A word-level tokenizer over the demo's closed vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

PAD, BEGIN, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK_WORDS = ("black", "blue", "red", "green", "violet", "brown", "orange", "white")
_QUESTION_WORDS = ("which", "digit", "ink", "is", "this", "a", "an", "it", "greater", "than", "caption", "the", *"?:.")
_ANSWER_WORDS = ("yes", "no", "true", "false")


class WordTokenizer:
    """Words to ids and back; an unknown word raises ``KeyError`` rather than becoming a catch-all token."""

    def __init__(self) -> None:
        self.words = (PAD, BEGIN, END, IMAGE, *DIGIT_WORDS, *_QUESTION_WORDS, *_ANSWER_WORDS, *INK_WORDS)
        self._ids = {word: index for index, word in enumerate(self.words)}
        self.pad_id, self.begin_id, self.end_id, self.image_id = (self._ids[w] for w in (PAD, BEGIN, END, IMAGE))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of a text whose words and punctuation are separated by spaces."""
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """The words up to the first end mark, without padding, begin and image marks."""
        words = []
        for index in ids:
            if index == self.end_id:
                break
            if index not in (self.pad_id, self.begin_id, self.image_id):
                words.append(self.words[index])
        return " ".join(words)
