"""The sentences that turn a class name into a caption; several are better than one (CLIP, section 3.1.4)."""

# by data set; {} is the class name
TEMPLATES = {
    "captioned_digits": (
        "a handwritten {}",
        "a scan of the digit {}",
        "a blurry grey picture of a {}",
        "this is the numeral {}",
        "a picture of the handwritten digit {}",
    ),
}

GENERIC = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")


def templates_for(dataset: str) -> tuple[str, ...]:
    """Returns the data set's own templates, or generic ones."""
    return TEMPLATES.get(dataset, GENERIC)
