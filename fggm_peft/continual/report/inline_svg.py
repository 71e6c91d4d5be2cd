"""Makes of matplotlib's SVG file an element that can stand in an HTML page beside others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree


def inline_svg(file: str, name: str, alt: str, ink: str) -> str:
    """The ``<svg>`` element, without a size of its own, a style for the whole page, or ids that others may have.

    Args:
        file: as matplotlib writes it.
        name: goes before every id that is left.
        alt: what it shows.
        ink: colour that becomes the text colour of the page.
    """
    root = ElementTree.fromstring(file)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    values = " ".join(value for element in root.iter() for value in element.attrib.values())
    used = set(re.findall(r"#([\w-]+)", values))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = _attributes(element.attrib, used, name, ink)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    # what the style element said
    root.attrib |= {"role": "img", "aria-label": alt, "style": "stroke-linejoin: round; stroke-linecap: butt"}
    return re.sub(r">\s*\n\s*<", "><", ElementTree.tostring(root, encoding="unicode"))


def _attributes(attributes: Mapping[str, str], used: set[str], name: str, ink: str) -> dict[str, str]:
    result = {}
    for key, value in attributes.items():
        key = key.rpartition("}")[2]  # href instead of xlink:href
        if key == "id":
            if value in used:
                result[key] = f"{name}-{value}"
        elif key == "href":
            result[key] = f"#{name}-{value[1:]}"
        else:
            value = re.sub(r"url\(#([\w-]+)\)", rf"url(#{name}-\1)", value)
            value = re.sub(r"(\.\d\d)\d+", r"\1", value)  # a hundredth of a point is finer than any screen
            result[key] = value.replace(ink, "currentColor")
    return result
