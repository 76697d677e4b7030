"""Reads pip-audit's JSON: fails for a known vulnerability, says what could not be looked up."""

import json
import sys


def main() -> int:
    """Judge the report on standard input."""
    packages = json.load(sys.stdin)["dependencies"]
    skipped = [package for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in "
        f"{', '.join(flaw['fix_versions']) or 'no release'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]
    print(f"{len(packages) - len(skipped)} of {len(packages)} packages were looked up", end="; ")
    print(f"{len(found)} known vulnerabilities")
    if len(skipped) == len(packages):
        # An index without PyPI's advisories, as in a closed network: no news is no good news.
        print("NOTHING WAS AUDITED: this machine's package index has no advisories")
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
