"""Checks strategy libraries: no undefined symbol of the runtime, and of lacuna's names only `lacuna_plugin` exported."""

import argparse
import subprocess
import sys

DESCRIPTOR = "lacuna_plugin"


def offences(nm, library):
    """What is wrong with one library, a line each. nm -D prints "[address] type name"; U is undefined."""
    listing = subprocess.run([nm, "-D", "-C", library], check=True, capture_output=True, text=True).stdout
    found, has_descriptor = [], False
    for line in listing.splitlines():
        fields = line[16:].split(maxsplit=1)  # the address column is blank for undefined symbols
        kind, name = fields[0], fields[1]
        if kind == "U" and "lacuna" in name:
            found.append(f"undefined {name}")
        elif kind not in "Uw" and name == DESCRIPTOR:
            has_descriptor = True
        elif kind not in "Uw" and "lacuna" in name:
            found.append(f"exports {name}")
    if not has_descriptor:
        found.append(f"does not export {DESCRIPTOR}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nm", default="nm")
    parser.add_argument("libraries", nargs="+")
    arguments = parser.parse_args()
    bad = [f"{library}: {what}" for library in arguments.libraries for what in offences(arguments.nm, library)]
    print("\n".join(sorted(bad, reverse=True)) or f"{len(arguments.libraries)} libraries are self-contained")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
