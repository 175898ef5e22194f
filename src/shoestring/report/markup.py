"""HTML that is escaped unless it says that it is markup already.

`tag` escapes every child and attribute that is plain text. What comes from a run (a sample, a
path, a setting) is plain text everywhere, so it cannot become markup by being forgotten.
"""

import html
import re

# Control characters, which HTML does not allow, and halves of surrogate pairs, which no file can
# hold; both can be written in JSON.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = ("input", "img")  # what has no content has no end


class Html(str):
    """Text that is markup; only functions of this package make it."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Plain text as markup that shows it."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", text)))


def join(*parts: str) -> Html:
    """Parts one after the other, text escaped."""
    return Html("".join(map(escaped, parts)))


def tag(name: str, *children: str, **attributes: str | None) -> Html:
    """An element. `cls` is its class, and `data_x` its data-x; an attribute of None is left out."""
    assert name not in _VOID or not children
    named = {key.replace("cls", "class").replace("_", "-"): v for key, v in attributes.items()}
    written = "".join(f' {key}="{escaped(v)}"' for key, v in named.items() if v is not None)
    end = "" if name in _VOID else f"{join(*children)}</{name}>"
    return Html(f"<{name}{written}>{end}")
