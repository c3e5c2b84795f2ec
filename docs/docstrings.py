"""For the API pages: lines `name: meaning` of a docstring become a list, of which Markdown would make one paragraph."""

import re

import griffe

LINE = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


def listed(text: str) -> str:
    """The docstring in Markdown. What goes on in indented lines belongs to the line before it."""
    lines: list[str] = []
    within = False
    for line in text.split("\n"):
        if found := LINE.match(line):
            lines += [*([] if within else [""]), f"- **{found[1]}**: {found[2]}"]
            within = True
        elif within and line and not line.startswith("    "):
            lines += ["", line]
            within = False
        else:
            lines.append(line)
            within = within and bool(line)
    return "\n".join(lines)


class Lists(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
