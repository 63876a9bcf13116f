"""Checks that every file includes only headers of its own module and of earlier ones, and that no headers include each other.

The order is sdk, then --modules, then cli. Strategies and plug-ins may include the SDK alone.
"""

import argparse
import pathlib
import re
import sys

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
SUFFIXES = {".hpp", ".cpp", ".cuh", ".cu"}


class Tree:
    def __init__(self, root, modules):
        self.root = pathlib.Path(root)
        self.public = self.root / "core/include"
        self.src = self.root / "core/src"
        self.order = {name: place for place, name in enumerate(["sdk", *modules, "cli"])}

    def files(self):
        for top in ("core", "strategies", "plugins"):
            yield from sorted(p for p in (self.root / top).rglob("*") if p.suffix in SUFFIXES and p.is_file())

    def module(self, path):
        """The module that a file of the tree belongs to; strategies and plug-ins count as sdk."""
        for top in (self.public / "lacuna", self.src):
            if path.is_relative_to(top):
                parts = path.relative_to(top).parts
                return "sdk" if parts == ("sdk.hpp",) else parts[0] if len(parts) > 1 else None
        if path.is_relative_to(self.root / "core/cli"):
            return "cli"
        return "sdk"

    def target(self, source, quoted, angled):
        """The file that an include means, or None when it is not one of this tree."""
        name = quoted or angled
        if name == "lacuna/build_info.hpp":  # generated for the command
            return self.root / "core/cli/build_info.hpp"
        if name.startswith("lacuna/"):
            return self.public / name
        for directory in (source.parent, self.src) if quoted else ():
            found = (directory / name).resolve()
            if found.is_file():
                return found
        return None

    def includes(self, source):
        text = source.read_text(encoding="utf-8")
        for match in INCLUDE.finditer(text):
            target = self.target(source, *match.groups())
            if target is not None:
                yield text.count("\n", 0, match.start(0)) + 1, target

    def violations(self):
        found, edges = [], {}
        for source in self.files():
            module = self.module(source)
            if module not in self.order:
                found.append(f"{source.relative_to(self.root)}: expected to be in the folder of one of {', '.join(self.order)}")
                continue
            edges[source] = []
            for line, target in self.includes(source):
                edges[source].append(target)
                other = self.module(target)
                if other not in self.order or self.order[other] > self.order[module]:
                    found.append(
                        f"{source.relative_to(self.root)}:{line}: {module} includes {target.relative_to(self.root)}"
                        f" of {other}, which comes after it"
                    )
        return found + self.cycles(edges)

    def cycles(self, edges):
        found, done, path = [], set(), []

        def visit(file):
            if file in path:
                loop = path[path.index(file):] + [file]
                found.append("cyclic include: " + " -> ".join(str(f.relative_to(self.root)) for f in loop))
            elif file not in done:
                path.append(file)
                for other in edges.get(file, ()):
                    visit(other)
                path.pop()
                done.add(file)

        for file in edges:
            visit(file)
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--modules", nargs="+", required=True)
    arguments = parser.parse_args()
    tree = Tree(pathlib.Path(arguments.root).resolve(), arguments.modules)
    violations = tree.violations()
    print("\n".join(violations) or f"{sum(1 for _ in tree.files())} files keep the order")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
