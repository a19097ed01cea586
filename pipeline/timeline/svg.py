"""The elements that pictures are made of: SVG written the same on every machine, in pixels."""

import xml.etree.ElementTree as ET


def child(parent: ET.Element, tag: str, *, text: str = "", **attributes: str) -> ET.Element:
    """Add an element; what is not printable in its text becomes a question mark."""
    element = ET.SubElement(parent, tag, attributes)
    # What is not printable may not stand in XML at all, and a placement's name is a file's.
    element.text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text) or None
    return element


def rectangle(
    parent: ET.Element, x: float, y: float, width: float, height: float, **attributes: str
) -> None:
    """Add a rectangle."""
    size = {"x": px(x), "y": px(y), "width": px(width), "height": px(height)}
    child(parent, "rect", **attributes, **size)


def write(parent: ET.Element, x: float, y: float, text: str, look: str = "") -> None:
    """Add a line of text; `look` names its classes."""
    attributes = {"class": look} if look else {}
    child(parent, "text", text=text, **attributes, x=px(x), y=px(y))


def px(value: float) -> str:
    """Write a length with two digits at most, the same on every machine."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
