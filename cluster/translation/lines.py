"""Lines of text in and out: what a line of the input is, and how a translation becomes one.

Only the line feed ends a line, so that the output has as many lines as the input.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.errors import UserError

if TYPE_CHECKING:
    from model.translator import Translation

_BYTE_ORDER_MARK = "\ufeff"


class InputError(UserError):
    """The text to translate cannot be read, or the translations cannot be written."""


def decoded_line(line: bytes, number: int, name: str) -> str:
    """Return a line's text without its end; `number` counts from 1, `name` is the file's.

    Raises InputError when it is not UTF-8.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}, line {number}, byte {error.start + 1}: "
            "not UTF-8; convert the text, for example with iconv"
        ) from None
    return text.rstrip("\r\n").removeprefix(_BYTE_ORDER_MARK if number == 1 else "")


def output_lines(number: int, translations: Sequence["Translation"], *, with_scores: bool) -> str:
    """Return what is written for a sentence, line feeds included.

    That is its best translation, or, with scores, each as `number ||| text ||| score`.
    """
    if not with_scores:
        return _one_line(translations[0].text) + "\n"
    return "".join(
        f"{number} ||| {_one_line(translation.text)} ||| {translation.score:.6f}\n"
        for translation in translations
    )


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ")
