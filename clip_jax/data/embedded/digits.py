"""`captioned_digits`: 1,797 real scans of handwritten digits, with captions.

The scans (8 × 8 pixels, 43 people's hands) are those of scikit-learn's `load_digits`: the test part of "Optical
Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0.
"""

import io
from collections import Counter

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CAPTIONS = (
    "a handwritten {}",
    "a scan of the digit {}",
    "the number {} in somebody's handwriting",
    "a blurry grey picture of a {}",
    "a {} written with a thick pen",
    "this is the numeral {}",
    "a hand-drawn {} on paper",
    "the figure {}, scanned",
)

HELD_OUT_EVERY = 5  # of each digit: the scans come in writers' turns, so every fifth is from all of them


class CaptionedDigits(tfds.core.GeneratorBasedBuilder):
    """Real scans of handwritten digits; each with sixteen captions: eight wordings, in words and in figures."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "label": tfds.features.ClassLabel(names=DIGITS),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(held_out=False), "test": self._generate_examples(held_out=True)}

    def _generate_examples(self, held_out: bool):
        from sklearn.datasets import load_digits

        digits = load_digits()
        seen = Counter()
        for i, (scan, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
            seen[label] += 1
            if (seen[label] % HELD_OUT_EVERY == 0) == held_out:
                yield i, {"image": _png(scan), "captions": _captions(label), "label": label}


def _png(scan: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray((scan * 255 / 16).round().astype(np.uint8)).save(file, "PNG")  # 17 levels of grey
    file.seek(0)
    return file


def _captions(label: int) -> list[str]:
    return [caption.format(name) for caption in CAPTIONS for name in (DIGITS[label], str(label))]
