"""What a tokenizer is made of, whoever wrote it down: a tokenizer.json, or a SentencePiece model."""

import dataclasses
import string
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from clip_jax.errors import UserError
from clip_jax.tokenizer.file import charsmap_bytes
from clip_jax.weights import sentencepiece_model as spm

if TYPE_CHECKING:
    from tokenizers import AddedToken

# What the config calls "bos_token" and so on: tokens that begin and end a text, fill it up…
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a folder has of a tokenizer."""

    vocab: list[tuple[str, float]] | dict[str, int]  # Unigram's with scores, everybody else's with ids
    merges: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    unk_id: int = 0
    byte_fallback: bool = False
    charsmap: bytes = b""
    content: dict[str, Any] | None = None  # what the tokenizer.json says, if there is one
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults: dict[str, str] = dataclasses.field(default_factory=dict)  # the class's own tokens by their roles
    control: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # tokens that are no words of the model

    def added(self) -> list["AddedToken"]:
        """Returns the tokens that are found in a text before anything is done to it, in the order of their ids."""
        if "added_tokens_decoder" in self.config:
            by_id = {int(id): _token(token) for id, token in self.config["added_tokens_decoder"].items()}
        else:
            by_id = {token["id"]: _token(token) for token in (self.content or {}).get("added_tokens", [])}
        return [token for _, token in sorted(by_id.items())]

    def role(self, role: str) -> "AddedToken | None":
        """Returns the token with a role; None: no token has it."""
        token = self.config.get(f"{role}_token", self.defaults.get(role))
        if token is None:
            return None
        token = _token(token)
        return next((known for known in self.added() if known.content == token.content), token)

    def extra(self, generated: Iterable[str] = ()) -> list["AddedToken"]:
        """Returns the special tokens without a role; where the config has no word about them, what the class does."""
        names = ("extra_special_tokens", "additional_special_tokens")
        known = next((self.config[name] for name in names if self.config.get(name)), None)
        if known is None and not any(isinstance(self.config.get(name), list) for name in names):
            known = [*self.control, *generated]
        return [_token(token) for token in (known.values() if isinstance(known, dict) else known or [])]


def _token(token: "str | dict[str, Any]") -> "AddedToken":
    """Returns a token as the library has it: special, unless it says that it is not."""
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(token["content"], special=token.get("special", True), **flags)


def from_json(content: dict[str, Any]) -> Parts:
    """Returns the parts of a tokenizer.json, as all versions of the library have written it."""
    model = content["model"]
    vocab, merges = model["vocab"], model.get("merges", [])
    return Parts(
        vocab=[tuple(piece) for piece in vocab] if isinstance(vocab, list) else vocab,
        merges=[tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges],
        unk_id=model.get("unk_id") or 0,
        byte_fallback=model.get("byte_fallback", False),
        charsmap=charsmap_bytes(content),
        content=content,
    )


def from_sentencepiece(model: spm.SentencePieceModel) -> Parts:
    """Returns the parts of a SentencePiece model."""
    kinds = (spm.CONTROL, spm.USER_DEFINED)
    control = [
        {"content": piece.text, "special": piece.kind == spm.CONTROL, "normalized": False}
        for piece in model.pieces
        if piece.kind in kinds
    ]
    rest = {"charsmap": model.charsmap, "unk_id": model.unk_id, "byte_fallback": model.byte_fallback}
    if model.kind == spm.UNIGRAM:
        return Parts([(piece.text, piece.score) for piece in model.pieces], control=control, **rest)
    vocab = {piece.text: id for id, piece in enumerate(model.pieces)}
    return Parts(vocab, _merges(vocab), control=control, **rest)


def check_for_siglip(model: spm.SentencePieceModel) -> None:
    """Raises UserError when the model does to a text what is not done here."""
    usual = spm.SentencePieceModel(model.pieces)
    same = ("kind", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces", "treat_whitespace_as_suffix")
    wrong = [f"{name}={getattr(model, name)}" for name in same if getattr(model, name) != getattr(usual, name)]
    odd = [piece.text for piece in model.pieces if piece.kind == spm.UNUSED or _is_found(piece)]
    if wrong := wrong + [f"the piece {piece!r}" for piece in odd[:5]]:
        raise UserError(f"SiglipTokenizer's model has what is not known here: {', '.join(wrong)}")


def _is_found(piece: spm.Piece) -> bool:
    """Returns whether SentencePiece could find a symbol of the user's in a text without punctuation."""
    return piece.kind == spm.USER_DEFINED and not set(piece.text) & set(string.punctuation)


def _merges(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Returns every way to make a piece of two others, best first: by the piece's id, then the length of its parts."""
    merges = []
    for piece, id in vocab.items():
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [(vocab[left], vocab[right], left, right) for left, right in halves if left in vocab and right in vocab]
        merges += [(id, len(left), len(right), left, right) for _, _, left, right in sorted(known)]
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]
